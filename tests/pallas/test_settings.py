"""Every operation under settings that refuse what JAX does by itself: promotion of dtypes and ranks, and transfers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_impl

DIM = 128
BACKENDS = ("xla", "mosaic_gpu_interpret")


def floats(dtype, *shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def index(*values, dtype="int32"):
    return jnp.asarray(values, dtype)


def prefill(columns=3, **more):
    """Every array in a dtype of its own."""
    return dict(
        x=floats("bfloat16", 6, DIM), weight=floats("float32", DIM, 4), bias=floats("float16", DIM),
        conv_states=floats("float32", 9, columns, DIM), query_start_loc=index(0, 4, 5), cache_indices=index(2, 0, dtype="uint8"),
        has_initial_state=jnp.asarray([True, False]), **more,
    )  # fmt: skip


def step(columns=3, tokens=3, **more):
    return dict(
        x=floats("bfloat16", 2, tokens, DIM), weight=floats("float32", DIM, 4), bias=floats("float16", DIM),
        conv_states=floats("float16", 9, columns, DIM), cache_indices=index(2, 0, dtype="int16"), **more,
    )  # fmt: skip


def rows(packed=True, **more):
    x = floats("bfloat16", 6, DIM) if packed else floats("bfloat16", 2, 3, DIM)
    return dict(
        x=x, weight=floats("float32", DIM, 4), bias=floats("float16", DIM),
        initial_states=floats("float32", 2, 3, DIM), **(dict(query_start_loc=index(0, 4, 5)) if packed else {}), **more,
    )  # fmt: skip


WINDOWS = floats("float32", 3, 3, 3, DIM)
CALLS = {
    "prefill": ("causal_conv1d_fn", prefill(), {}),
    "snapshots": (
        "causal_conv1d_fn",
        prefill(
            snapshot_indices=index(4, 5, 6, 7).reshape(2, 2), num_computed_tokens=index(1, 0, dtype="uint8"),
            track_indices=index(3, 8), track_lengths=index(2, 1, dtype="int8"), residual=floats("float16", 6, DIM),
            write_indices=index(1, 0),
        ),
        dict(snapshot_block_size=2, empty_rows="apply", split_sizes=(64, 64)),
    ),
    "ring": (
        "causal_conv1d_fn", prefill(columns=5, cache_seqlens=index(3, 0, dtype="int8")), dict(state_layout="ring")
    ),
    "token": ("causal_conv1d_update", step(tokens=1), {}),
    "rolling": (
        "causal_conv1d_update", step(columns=6, num_accepted_tokens=index(1, 2, dtype="uint8")), {}
    ),
    "windows": (
        "causal_conv1d_update", step(columns=5, window_out=WINDOWS, window_indices=index(1, 2)), dict(state_layout="back")
    ),
    "tree": (
        "causal_conv1d_update",
        step(window_out=WINDOWS, tree_parents=index(-1, 0, 0, -1, -1, 1, dtype="int8").reshape(2, 3)),
        dict(commit=False),
    ),
    "commit": (
        "commit_windows",
        dict(conv_states=floats("float16", 9, 4, DIM), window_out=WINDOWS, accepted_steps=index(2, 0, dtype="int8")), {},
    ),
    "links": (
        "tree_parents_from_links",
        dict(next_token=index(1, -1, -1).reshape(1, 3), next_sibling=index(-1, 2, -1, dtype="int8").reshape(1, 3)), {},
    ),
    "rows": ("causal_conv1d", rows(), {}),
    "dense": ("causal_conv1d", rows(packed=False), {}),
}  # fmt: skip
OF_ROWS = ("x", "weight", "bias", "initial_states")


def call_of(case, backend):
    """A function of the case's arrays, the gradients as well for the differentiable form, and these."""
    operation, arrays, options = CALLS[case]
    if operation != "tree_parents_from_links":
        options = options | dict(backend=backend)
    if operation not in ("commit_windows", "tree_parents_from_links"):
        options = options | dict(activation="silu")
    call = functools.partial(getattr(pallas_impl, operation), **options)
    if operation != "causal_conv1d":
        return call, arrays

    def with_gradients(**arrays):
        plain = {name: array for name, array in arrays.items() if name not in OF_ROWS}
        out, pull = jax.vjp(lambda given: call(**given, **plain), {name: arrays[name] for name in OF_ROWS})
        return out, pull(out)

    return with_gradients, arrays


def backends_of(case):
    return BACKENDS[: 1 if case == "links" else 2]


EVERY = [(case, backend) for case in CALLS for backend in backends_of(case)]


@pytest.mark.parametrize(("case", "backend"), EVERY)
def test_no_dtype_or_rank_is_promoted_by_jax(case, backend):
    call, arrays = call_of(case, backend)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        strict = jax.jit(lambda arrays: call(**arrays)).trace(arrays)
    assert jax.tree.leaves(strict.out_info)


@pytest.mark.parametrize("case", CALLS)
def test_a_warm_call_outside_jit_transfers_nothing(case):
    call, arrays = call_of(case, "xla")
    wanted = call(**arrays)
    with jax.transfer_guard("disallow"):
        found = jax.block_until_ready(call(**arrays))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
