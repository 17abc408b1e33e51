"""The kernels that mend what was computed at a cut between devices, device by device in one process: the bits of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle.contract import FnCall
from pallas_impl import backward, exchange, plain
from pallas_impl.call import interpreter, prefill_part, run_prefill
from pallas_impl.records import Arrays, Options
from tests.tools.races_jax import run_with_races

DEVICES, DIM = 3, 128
INTERPRETER = "mosaic_gpu_interpret"
ON = [INTERPRETER, pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
# tokens of a part, lengths: rows across one cut and two, that begin or end at a cut, of a token, of none, before the tail
ROWS = {
    "across": (12, [20, 3, 0, 11]),
    "across two": (8, [1, 21]),
    "to the cut": (8, [8, 7, 1, 0, 4]),
    "barely": (9, [8, 2, 7, 9, 1]),
    "no row": (6, [3]),
}
KINDS = {"alike": (4, "bfloat16", "bfloat16"), "wide pool": (3, "bfloat16", "float32"), "narrow": (2, "float32", "float16"),
         "8 taps": (8, "float16", "float16")}  # fmt: skip
CASES = {
    f"{rows}, {kind}": (rows, kind)
    for rows, kind in [
        *((rows, "alike") for rows in ROWS if rows != "across two"),
        ("across", "wide pool"),
        ("barely", "narrow"),
        ("across two", "8 taps"),
    ]
}


def normal(seed, dtype, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def offsets_of(lengths):
    return jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


def problem(rows, kind):
    """(a prefill of the whole, tokens of a part); slots by their numbers, a padding row, unused slots of NaN."""
    (tokens, lengths), (width, dtype, pool_dtype) = ROWS[rows], KINDS[kind]
    tokens = max(tokens, 2 * width - 2)
    batch = len(lengths)
    slots = np.random.default_rng(1).permutation(batch + 2)[:batch]
    stateful = np.arange(batch) % 3 != 1
    pool = normal(2, pool_dtype, batch + 2, width, DIM)
    used = np.isin(np.arange(batch + 2), slots[stateful])
    slots[3:4] = -1
    pool = jnp.where(jnp.asarray(used)[:, None, None], pool, jnp.nan)
    call = FnCall(
        normal(3, dtype, DEVICES * tokens, DIM), normal(4, dtype, DIM, width), normal(5, dtype, DIM), pool,
        offsets_of(lengths), jnp.asarray(slots, jnp.int32), jnp.asarray(stateful), "silu",
    )  # fmt: skip
    return call, tokens


def parts_of(call, tokens):
    """Of each device: (where its part begins, the call on its part)."""
    for device in range(DEVICES):
        begin = device * tokens
        starts = jnp.clip(call.query_start_loc - begin, 0, tokens)
        yield begin, call._replace(x=call.x[begin : begin + tokens], query_start_loc=starts)


def same_bits(found, wanted):
    return found.dtype == wanted.dtype and np.array_equal(
        np.asarray(found).view(np.uint8), np.asarray(wanted).view(np.uint8)
    )


def mend(part, begin, told, call):
    out, arrays, options = prefill_part(part)
    arrays = arrays._replace(query_start_loc=call.query_start_loc)
    return exchange.mend_first(
        out, arrays, told, jnp.full((1,), begin, jnp.int32), whole=len(call.x), options=options
    )


@pytest.mark.parametrize("backend", ON)
@pytest.mark.parametrize(("rows", "kind"), CASES.values(), ids=CASES)
def test_prefill(rows, kind, backend):
    """`out` part by part, and the whole new pool on every device."""
    call, tokens = problem(rows, kind)
    call = call._replace(backend=backend)
    history = call.weight.shape[1] - 1
    wanted = run_prefill(call)
    parts = list(parts_of(call, tokens))
    told = jnp.stack(
        [exchange.message(part.x, call.query_start_loc, begin, history) for begin, part in parts]
    )
    for begin, part in parts:
        out, pool = mend(part, begin, told, call)
        assert same_bits(out, wanted.out[begin : begin + tokens])
        assert same_bits(pool, wanted.conv_states)


@pytest.mark.parametrize("backend", ON)
@pytest.mark.parametrize("rows", ["across two", "barely"])
def test_training(rows, backend):
    """Forward and `dx`, where the neighbours' tokens and gradients come as they are."""
    call, tokens = problem(rows, "alike")
    call = call._replace(conv_states=None, cache_indices=None, has_initial_state=None, backend=backend)
    history, dout = call.weight.shape[1] - 1, normal(6, call.x.dtype, *call.x.shape)
    options = "silu", None, "auto", backend
    wanted = run_prefill(call).out
    inputs = call.x, call.weight, call.bias, None, call.query_start_loc
    dx, *_ = backward.differentiate(options, inputs, (dout, None))
    static = Options(silu=True, interpret=interpreter(backend == INTERPRETER))
    behind = lambda a, begin: jnp.pad(a, ((0, history), (0, 0)))[begin : begin + history]  # noqa: E731
    for begin, part in parts_of(call, tokens):
        halo = jnp.pad(call.x, ((history, 0), (0, 0)))[begin : begin + history]
        out, _ = mend(part, begin, halo[None], call)
        assert same_bits(out, wanted[begin : begin + tokens])

        position = begin - history + jnp.arange(history)
        crosses = (call.query_start_loc[:-1] < begin) & (begin < call.query_start_loc[1:])
        own = crosses[:, None] & (call.query_start_loc[:-1, None] <= position)
        windows = jnp.where(own[:, :, None], halo, 0)
        mine, end = dout[begin : begin + tokens], begin + tokens
        found, *_ = backward.differentiate(
            options, (part.x, call.weight, call.bias, windows, part.query_start_loc), (mine, None)
        )
        after = jnp.concatenate([behind(call.x, end), behind(dout, end)], axis=1)
        arrays = Arrays(x=part.x, weight=call.weight, bias=call.bias, query_start_loc=call.query_start_loc)
        found = exchange.mend_last(
            found, mine, arrays, after, jnp.full((1,), begin, jnp.int32), whole=len(call.x), options=static
        )
        assert same_bits(found, dx[begin:end])


def test_what_is_not_told_is_seen():
    """Each part of a message is needed: that of the tokens at the cut, and that of the rows' last ones."""
    call, tokens = problem("across", "alike")
    call = call._replace(backend=INTERPRETER)
    wanted = run_prefill(call)
    begin, part = list(parts_of(call, tokens))[1]
    told = jnp.stack([exchange.message(p.x, call.query_start_loc, b, 3) for b, p in parts_of(call, tokens)])
    out, _ = mend(part, begin, told.at[0, :3].set(0), call)
    assert not same_bits(out, wanted.out[begin : begin + tokens])
    _, pool = mend(part, begin, told.at[:, 3:].set(0), call)
    assert not same_bits(pool, wanted.conv_states)


def test_offsets_that_are_wrong_lead_nowhere():
    """They give some result; nothing outside of the arrays is read, which the interpreter would refuse."""
    call, tokens = problem("across", "alike")
    bad = jnp.asarray([5, -7, 2**31 - 1, 3, 900], jnp.int32)
    call = call._replace(
        query_start_loc=bad, cache_indices=jnp.asarray([1, 9**9, -5, 2], jnp.int32), backend=INTERPRETER
    )
    for begin, part in parts_of(call._replace(query_start_loc=plain.offsets(bad, len(call.x))), tokens):
        told = jnp.stack([exchange.message(part.x, plain.offsets(bad, len(call.x)), begin, 3)] * DEVICES)
        _, pool = jax.block_until_ready(mend(part, begin, told, call))
        others = jnp.asarray([0, 3, 4, 5])
        assert same_bits(pool[others], call.conv_states[others])


def test_no_data_races():
    call, tokens = problem("across", "alike")
    begin, part = list(parts_of(call, tokens))[1]
    told = jnp.stack([exchange.message(p.x, call.query_start_loc, b, 3) for b, p in parts_of(call, tokens)])
    arrays = Arrays(*part[:7])._replace(query_start_loc=call.query_start_loc)
    place = jnp.full((1,), begin, jnp.int32)

    def launch(arrays, options):
        return exchange.mend_first(
            jnp.zeros_like(arrays.x), arrays, told, place, whole=len(call.x), options=options
        )

    assert not run_with_races(launch, arrays, Options(silu=True))[1]
    last = functools.partial(
        exchange.mend_last, after=jnp.zeros((3, 2 * DIM), part.x.dtype), begin=place, whole=len(call.x)
    )
    run = lambda arrays, options: last(jnp.zeros_like(part.x), part.x, arrays, options=options)  # noqa: E731
    assert not run_with_races(
        run, arrays._replace(conv_states=None, cache_indices=None, has_initial_state=None), Options(silu=True)
    )[1]
