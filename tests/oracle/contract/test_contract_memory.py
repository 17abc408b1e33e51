"""An array that a call updates shares memory with no other argument, nor with itself: ranges, strides and errors."""

import random

import numpy as np
import pytest

from oracle.contract import CommitCall, FnCall, Memory, UpdateCall, check_memory
from oracle.contract_memory import overlap, overlaps_itself


def where(array):
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Memory("cpu", array.__array_interface__["data"][0], array.itemsize, array.shape, strides)


def empty(*shape):
    return np.zeros(shape, np.float32)


def fn(**given):
    x, weight, pool = empty(6, 8), empty(8, 4), empty(5, 3, 8)
    return FnCall(**dict(x=x, weight=weight, bias=None, conv_states=pool, query_start_loc=empty(3)) | given)


def update(**given):
    x, weight, pool = empty(5, 8), empty(8, 4), empty(5, 3, 8)
    return UpdateCall(**dict(x=x, weight=weight, bias=None, conv_states=pool) | given)


def shared(text):
    return pytest.raises(ValueError, match=f"^{text}$")


def test_arrays_of_their_own_pass():
    check_memory(fn(), where)
    check_memory(fn(conv_states=None), where)
    check_memory(update(window_out=empty(5, 1, 3, 8), residual=empty(5, 8)), where)
    check_memory(CommitCall(empty(5, 3, 8), empty(5, 1, 3, 8), empty(5)), where)


def test_inputs_may_share_memory():
    x = empty(6, 8)
    check_memory(fn(x=x, residual=x), where)
    check_memory(fn(x=np.broadcast_to(x[:1], x.shape)), where)


@pytest.mark.parametrize("name", ["x", "residual", "bias", "weight", "query_start_loc", "cache_indices"])
def test_no_argument_shares_memory_with_the_pool(name):
    pool = empty(5, 3, 8)
    text = (
        f"{name}: expected memory of its own, since the call updates conv_states, got memory that they share"
    )
    for view in (pool[2], pool[4, 2], pool.reshape(-1)[-1:]):
        with shared(text):
            check_memory(fn(conv_states=pool, **{name: view}), where)


def test_windows_and_pool_are_two():
    memory = empty(200)
    pool, windows = memory[:120].reshape(5, 3, 8), memory[119:143].reshape(1, 1, 3, 8)
    with shared(
        "window_out: expected memory of its own, since the call updates conv_states, got memory that they share"
    ):
        check_memory(update(conv_states=pool, window_out=windows), where)
    with shared(
        "window_out: expected memory of its own, since the call updates conv_states, got memory that they share"
    ):
        check_memory(CommitCall(pool, windows, empty(1)), where)
    check_memory(update(conv_states=pool, window_out=memory[120:144].reshape(1, 1, 3, 8)), where)


def test_a_pool_that_is_not_updated_may_be_shared():
    pool = empty(5, 3, 8)
    check_memory(update(x=pool[:, 0], conv_states=pool, commit=False), where)
    with shared(
        "conv_states: expected memory of its own, since the call updates window_out, got memory that they share"
    ):
        check_memory(update(conv_states=pool, window_out=pool[:, None], commit=False), where)


def test_an_expanded_pool_is_refused():
    pool = np.broadcast_to(empty(1, 3, 8), (5, 3, 8))
    with shared(
        r"conv_states: expected elements that share no memory, since the call updates them, "
        r"got shape \[5, 3, 8\] with strides \[0, 8, 1\]"
    ):
        check_memory(fn(conv_states=pool), where)
    check_memory(update(conv_states=pool, commit=False), where)
    with pytest.raises(ValueError, match=r"^window_out: expected elements that share no memory"):
        check_memory(update(window_out=np.broadcast_to(empty(1, 1, 3, 8), (5, 1, 3, 8))), where)


def test_pages_of_one_allocation_share_nothing():
    """Each page holds a slot and, behind it, a window of the speculated tokens and the input of a row."""
    pages = empty(5, 100)
    pool = pages[:, :24].reshape(5, 3, 8, copy=False)
    windows = pages[:, 24:48].reshape(5, 1, 3, 8, copy=False)
    check_memory(update(x=pages[:, 48:56], conv_states=pool, window_out=windows), where)
    with pytest.raises(
        ValueError, match=r"^x: expected memory of its own, since the call updates window_out"
    ):
        check_memory(update(x=pages[:, 47:55], conv_states=pool, window_out=windows), where)
    channels = empty(5, 3, 16)
    check_memory(update(x=channels[:, 0, 8:], conv_states=channels[:, :, :8]), where)


def test_devices_have_memories_of_their_own():
    one = Memory("cuda:0", 0, 2, (4,), (1,))
    assert overlap(one, one)
    assert not overlap(one, one._replace(device="cuda:1"))


def test_sizes_of_real_pools_take_few_steps():
    pool = Memory("cuda:0", 0, 2, (1 << 20, 7, 8192), (7 * 8192 * 3, 8192, 1))
    other = pool._replace(begin=7 * 8192 * 2)
    assert not overlap(pool, other)
    assert overlap(pool, other._replace(begin=other.begin - 2))
    assert overlap(pool, other._replace(begin=pool.begin + 1))
    assert not overlaps_itself(pool)
    assert overlaps_itself(pool._replace(strides=(7 * 8192 - 1, 8192, 1)))


def test_any_strides_are_answered_as_numpy_does():
    source, generator = np.zeros(64, np.int16), random.Random(5)
    count = {True: 0, False: 0}

    def view():
        shape = [generator.choice((0, 1, 2, 3, 4)) for _ in range(generator.randint(1, 3))]
        strides = [generator.choice((-5, -2, -1, 0, 1, 2, 3, 4, 6, 8)) for _ in shape]
        low = -sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if s < 0 and n)
        return np.lib.stride_tricks.as_strided(
            source[low + generator.randint(0, 9) :], shape, [2 * stride for stride in strides]
        )

    for _ in range(600):
        a, b = view(), view()
        wanted = np.shares_memory(a, b)
        count[wanted] += 1
        assert overlap(where(a), where(b)) == wanted, (a.strides, a.shape, b.strides, b.shape)
        places = np.add.reduce(
            np.meshgrid(*(np.arange(n) * s for n, s in zip(a.shape, a.strides, strict=True)))
        )
        assert overlaps_itself(where(a)) == (len(np.unique(places)) < places.size), (a.strides, a.shape)
    assert min(count.values()) > 100


def test_strides_too_odd_to_tell_are_not_refused():
    """Even addresses beside odd ones: nothing is shared, which no bound of the sums can say."""
    even = Memory("cpu", 0, 1, (1 << 30,) * 4, (6, 10, 14, 22))
    assert not overlap(even, even._replace(begin=(1 << 20) + 1, strides=(12, 20, 28, 44)))
