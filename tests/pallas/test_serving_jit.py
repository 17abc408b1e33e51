"""The serving arguments of the JAX twin under jit and scan: programs, donation, index data out of range, validate."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl import (
    ConvWindowOutput,
    Unsupported,
    causal_conv1d_fn,
    causal_conv1d_update,
    commit_windows,
)

BACKENDS = ("xla", "mosaic_gpu_interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu))
DIM, WIDTH = 128, 4


def normal(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def index(*values):
    return jnp.asarray(values, jnp.int32)


WEIGHT = normal(0, DIM, WIDTH)


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_speculation_by_windows_gives_the_bits_of_plain_decoding(backend):
    """Verify, accept some, commit, go on, all in one scan with a donated carry."""
    x, pool, steps = normal(1, 3, 12, DIM), normal(2, 5, 3, DIM), 4
    slots = index(4, 0, 2)
    plain = causal_conv1d_update(x, WEIGHT, None, pool, slots, activation="silu", backend=backend)
    verify = functools.partial(causal_conv1d_update, activation="silu", backend=backend, commit=False)

    def step(carry, accepted):
        pool, done, buffers = carry
        tokens = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, steps))(
            jnp.pad(x, ((0, 0), (0, steps), (0, 0)), constant_values=9), done
        )
        out, pool, buffers = verify(tokens, WEIGHT, None, pool, slots, window_out=buffers)
        pool = commit_windows(pool, buffers, accepted - 1, slots, backend=backend)
        return (pool, done + accepted, buffers), out

    accepted = jnp.asarray([[1, 4, 2], [4, 1, 3], [3, 4, 4], [4, 3, 3]], jnp.int32)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, accepted), donate_argnums=0)
    buffers = jnp.full((3, steps, 3, DIM), jnp.nan, "bfloat16")
    (pool, done, _), outs = run((jnp.array(pool), jnp.zeros(3, jnp.int32), buffers))
    assert done.tolist() == [12, 12, 12]
    for row in range(3):
        pieces = [outs[i, row, : accepted[i, row]] for i in range(4)]
        same_bits(jnp.concatenate(pieces), plain.out[row])
    same_bits(pool, plain.conv_states)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_residual_is_one_rounding_after_the_activation(backend, activation):
    """float32: out is the plain call's out plus the residual, in every bit; on any path."""
    x, residual = normal(3, 11, DIM, dtype="float32"), normal(4, 11, DIM, dtype="float32")
    pool, starts = normal(5, 2, 3, DIM, dtype="float32"), index(0, 10, 11)
    call = functools.partial(causal_conv1d_fn, activation=activation, backend=backend)
    has = jnp.asarray([True, True])
    plain = call(x, WEIGHT, None, pool, starts, None, has)
    added = call(x, WEIGHT, None, pool, starts, None, has, residual=residual)
    same_bits(added.out, np.asarray(plain.out) + np.asarray(residual))
    same_bits(added.conv_states, plain.conv_states)
    state = pool[:1]
    for t in range(10):
        token = causal_conv1d_update(
            x[t : t + 1],
            WEIGHT,
            None,
            state,
            activation=activation,
            residual=residual[t : t + 1],
            backend=backend,
        )
        same_bits(token.out[0], added.out[t])
        state = token.conv_states


@pytest.mark.parametrize("layout", ["back", "ring"])
def test_layouts_give_the_bits_of_the_front(layout):
    """Chunks of one sequence, prefill then updates, in a slot of 5 columns."""
    x, lengths = normal(6, 23, DIM), [9, 1, 2, 8, 3]
    whole = causal_conv1d_fn(x, WEIGHT, None, None, index(0, 23), activation="silu")
    pool, done, outs = jnp.full((1, 5, DIM), jnp.nan, "bfloat16"), 0, []
    for n in lengths:
        options = dict(activation="silu", state_layout=layout)
        if layout == "ring":
            options["cache_seqlens"] = index(done)
        part = x[done : done + n]
        if done == 0:
            result = causal_conv1d_fn(part, WEIGHT, None, pool, index(0, n), None, None, **options)
        else:
            result = causal_conv1d_update(part[None], WEIGHT, None, pool, **options)
        outs, pool, done = [*outs, result.out.reshape(n, DIM)], result.conv_states, done + n
    same_bits(jnp.concatenate(outs), whole.out)


def test_new_values_need_no_compilation():
    update = jax.jit(functools.partial(causal_conv1d_update, backend="xla", commit=False))
    prefill = jax.jit(
        functools.partial(causal_conv1d_fn, backend="xla", snapshot_block_size=2, split_sizes=(64, 64))
    )
    pool, buffers = normal(7, 9, 3, DIM), normal(8, 2, 4, 3, DIM)
    for i in range(3):
        update(
            normal(i, 2, 4, DIM), WEIGHT, None, pool, index(i, 7), window_out=buffers, window_indices=index(1, i - 1),
            tree_parents=jnp.full((2, 4), i, jnp.int32),
        )  # fmt: skip
        prefill(
            normal(i, 6, DIM), WEIGHT, None, pool, index(0, i, 6), index(0, 1), write_indices=index(2, 3 + i),
            snapshot_indices=jnp.full((2, 3), 8 - i, jnp.int32), num_computed_tokens=index(i, 0),
        )  # fmt: skip
    assert update._cache_size() == prefill._cache_size() == 1


def test_donated_states_and_windows_are_written_in_place():
    pool, buffers = normal(9, 9, 3, DIM, dtype="float32"), normal(10, 2, 4, 3, DIM, dtype="float32")
    x = normal(11, 2, 4, DIM)
    verify = jax.jit(
        lambda pool, buffers: causal_conv1d_update(
            x, WEIGHT, None, pool, index(3, 7), window_out=buffers, backend="xla"
        ),
        donate_argnums=(0, 1),
    )
    memory = verify.lower(pool, buffers).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= pool.nbytes + buffers.nbytes
    result = verify(pool, buffers)
    assert isinstance(result, ConvWindowOutput)
    assert pool.is_deleted()
    assert buffers.is_deleted()
    commit = jax.jit(functools.partial(commit_windows, backend="xla"), donate_argnums=0)
    pool = result.conv_states
    commit(pool, result.window_out, index(1, 2), index(3, 7))
    assert pool.is_deleted()


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_out_of_range_touch_nothing(backend):
    far = index(-(2**31), 2**31 - 1)
    pool, starts = normal(12, 4, 5, DIM), index(0, 3, 7)
    x, has = normal(13, 7, DIM), jnp.asarray([True, False])
    result = causal_conv1d_fn(
        x, WEIGHT, None, pool, starts, index(0, 1), has, write_indices=far, track_indices=far[::-1],
        track_lengths=far, snapshot_indices=jnp.stack([far, far]), snapshot_block_size=1, num_computed_tokens=far,
        backend=backend,
    )  # fmt: skip
    same_bits(result.conv_states, pool)
    buffers = normal(14, 2, 4, 3, DIM)
    result = causal_conv1d_update(
        x[:6].reshape(2, 3, DIM), WEIGHT, None, pool, index(0, 1), window_out=buffers, window_indices=far,
        tree_parents=jnp.asarray([[2**31 - 1] * 3, [-(2**31)] * 3], jnp.int32), commit=False, backend=backend,
    )  # fmt: skip
    same_bits(result.window_out, buffers)
    same_bits(result.conv_states, pool)
    same_bits(commit_windows(pool, buffers, far, index(0, 1), backend=backend), pool)
    same_bits(commit_windows(pool, buffers, index(0, 1), far, backend=backend), pool)
    same_bits(commit_windows(pool, buffers, index(0, 1), None, far, backend=backend), pool)
    ring = causal_conv1d_update(
        x[:2], WEIGHT, None, pool, index(0, 1), state_layout="ring", cache_seqlens=far, backend=backend
    )
    same_bits(ring.conv_states[2:], pool[2:])


@pytest.mark.parametrize(
    (
        "dtype",
        "backend",
    ),  # one conversion ahead of the kernels serves all, and the interpreter takes its time
    [(dtype, "xla") for dtype in ("int8", "uint8", "int16", "uint32")]
    + [("int8", "mosaic_gpu_interpret"), pytest.param("int8", "mosaic_gpu", marks=pytest.mark.gpu)],
)
def test_any_integers(dtype, backend):
    """Slots, counters and parents in other dtypes than int32, to which they are converted for the kernels."""
    narrow = lambda *values: jnp.asarray(values, dtype)  # noqa: E731
    pool, starts, x = normal(15, 9, 5, DIM), index(0, 3, 7), normal(16, 7, DIM)
    buffers, has = normal(17, 3, 4, 3, DIM), jnp.asarray([True, False])
    results = []
    for cast in (index, narrow):
        table = jnp.stack([cast(7, 100), cast(8, 6)])
        fn = causal_conv1d_fn(
            x, WEIGHT, None, pool, starts, cast(0, 1), has, write_indices=cast(2, 3), track_indices=cast(4, 120),
            track_lengths=cast(1, 9), snapshot_indices=table, snapshot_block_size=2,
            num_computed_tokens=cast(0, 1), backend=backend,
        )  # fmt: skip
        update = causal_conv1d_update(
            x[:6].reshape(2, 3, DIM), WEIGHT, None, pool, cast(0, 1), window_out=buffers,
            window_indices=cast(2, 0), tree_parents=jnp.stack([cast(0, 0, 100), cast(5, 0, 1)]), commit=False,
            backend=backend,
        )  # fmt: skip
        ring = causal_conv1d_update(
            x[:2], WEIGHT, None, pool, cast(0, 1), state_layout="ring", cache_seqlens=cast(3, 126),
            write_indices=cast(4, 100), backend=backend,
        )  # fmt: skip
        committed = commit_windows(pool, buffers, cast(3, 100), cast(0, 1), cast(1, 2), backend=backend)
        results.append((*fn, *update, *ring, committed))
    for got, want in zip(*results, strict=True):
        same_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_size_beyond_32_bits_has_no_boundary(backend):
    pool = normal(18, 9, 3, DIM)
    result = causal_conv1d_fn(
        normal(19, 3, DIM), WEIGHT, None, pool, index(0, 3), index(0), snapshot_indices=index(5, 6)[None],
        snapshot_block_size=2**40, num_computed_tokens=index(2**31 - 2), backend=backend,
    )  # fmt: skip
    same_bits(result.conv_states[1:], pool[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_counters_near_the_end_of_32_bits_reach_no_block(backend):
    pool = normal(18, 9, 3, DIM)
    result = causal_conv1d_fn(
        normal(19, 9, DIM), WEIGHT, None, pool, index(0, 9), index(0), snapshot_indices=index(5, 6)[None],
        snapshot_block_size=1, num_computed_tokens=index(2**31 - 2), backend=backend,
    )  # fmt: skip
    same_bits(result.conv_states[1:], pool[1:])


def test_validate_reads_the_new_values():
    pool, x = normal(20, 5, 3, DIM), normal(21, 4, DIM)
    fn = functools.partial(
        causal_conv1d_fn, x, WEIGHT, None, pool, index(0, 2, 4), index(0, 1), validate=True
    )
    fn(write_indices=index(2, 3), track_indices=index(4, -1))
    for bad, message in (
        (dict(write_indices=index(2, 2)), "write_indices: expected distinct slots for live rows, got 2"),
        (dict(track_indices=index(1, 3)), "got 1"),
        (dict(snapshot_indices=index(3, 9)[:, None], snapshot_block_size=1), "snapshot_indices: expected"),
        (
            dict(state_layout="ring", cache_seqlens=index(0, -2)),
            "cache_seqlens: expected at least 0 in row 1",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fn(**bad)
    update = functools.partial(causal_conv1d_update, x.reshape(2, 2, DIM), WEIGHT, None, pool, validate=True)
    buffers = normal(22, 2, 2, 3, DIM)
    for bad, message in (
        (dict(window_out=buffers, window_indices=index(0, 2)), "window_indices: expected"),
        (dict(tree_parents=jnp.asarray([[-1, 0], [-1, 1]]), commit=False), "at [1, 1], got 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            update(**bad)
    with pytest.raises(ValueError, match="accepted_steps: expected less than 2 steps in row 0, got 2"):
        commit_windows(pool, buffers, index(2, 0), validate=True)
    with pytest.raises(Unsupported, match="got a tracer for write_indices"):
        jax.jit(lambda slots: fn(write_indices=slots))(index(2, 3))


def test_shapes_and_options_are_checked():
    with pytest.raises(ValueError, match="split_sizes: expected"):
        causal_conv1d_fn(normal(0, 4, DIM), WEIGHT, None, None, index(0, 4), split_sizes=(64, 65))
    with pytest.raises(TypeError, match="split_sizes: expected a tuple"):
        causal_conv1d_fn(normal(0, 4, DIM), WEIGHT, None, None, index(0, 4), split_sizes={64: 64})
    parts = causal_conv1d_fn(
        normal(0, 4, DIM), WEIGHT, None, None, index(0, 4), split_sizes=[64, np.int64(64)]
    )
    assert [part.shape for part in parts.out] == [(4, 64), (4, 64)]


def test_a_kernel_takes_no_vmap():
    call = functools.partial(causal_conv1d_fn, backend="mosaic_gpu_interpret", split_sizes=(128,))
    with pytest.raises(Unsupported, match=r"a kernel takes no jax\.vmap"):
        jax.vmap(lambda x: call(x, WEIGHT, None, None, index(0, 4)))(normal(0, 2, 4, DIM))
