"""Every operation under settings that refuse what JAX does by itself: promotion of dtypes and ranks, and transfers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_impl
from pallas_impl import sharding
from pallas_impl.compat import sglang_jax, tpu_inference
from pallas_impl.modules import nnx

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


HEADS = dict(num_k_heads=2, num_v_heads=2, head_k_dim=16, head_v_dim=32)


def gates(*tokens, channels=()):
    return dict(
        a=floats("float16", *tokens, 2, *channels), b=floats("bfloat16", *tokens, 2), A_log=floats("float32", 2),
        dt_bias=floats("bfloat16", 2, *channels),
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
    "front": ("gated_delta_prologue_fn", prefill() | gates(6), HEADS),
    "front of channels": (
        "gated_delta_prologue_update", step() | gates(2, 3, channels=(16,)), HEADS | dict(lower_bound=-2.0, norm_rounding="none")
    ),
    "gated": ("gated_short_conv_fn", prefill(bcx=floats("bfloat16", 6, 3 * DIM)) | dict(x=None), {}),
    "front, rows": ("gated_delta_prologue", rows() | gates(6), HEADS),
    "gated, dense": ("gated_short_conv", rows(packed=False, bcx=floats("bfloat16", 2, 3, 3 * DIM)) | dict(x=None), {}),
    "rows": ("causal_conv1d", rows(), {}),
    "dense": ("causal_conv1d", rows(packed=False), {}),
}  # fmt: skip
DIFFERENTIABLE = ("causal_conv1d", "gated_delta_prologue", "gated_short_conv")


def call_of(case, backend):
    """A function of the case's arrays, the gradients as well for the differentiable form, and these."""
    operation, arrays, options = CALLS[case]
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if operation != "tree_parents_from_links":
        options = options | dict(backend=backend)
    if operation not in ("commit_windows", "tree_parents_from_links"):
        options = options | dict(activation="silu")
    call = functools.partial(getattr(pallas_impl, operation), **options)
    if operation not in DIFFERENTIABLE:
        return call, arrays

    def with_gradients(query_start_loc=None, **arrays):
        out, pull = jax.vjp(lambda arrays: call(**arrays, query_start_loc=query_start_loc), arrays)
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


@pytest.mark.parametrize("case", ["prefill", "rolling", "commit", "front", "gated", "rows", "gated, dense"])
def test_numpy_arrays_without_jit_on_xla(case):
    """`jax.disable_jit`, for a debugger: no program makes JAX arrays of them first."""
    call, arrays = call_of(case, "xla")
    wanted = call(**arrays)
    with jax.disable_jit():
        found = call(**{name: np.asarray(array) for name, array in arrays.items()})
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0.02, atol=0.02
        )


def around_the_operations():
    """name: a call of what stands around the operations, on arrays that are ready."""
    x, packed, pool = floats("float32", 2, 3, 8), floats("float32", 6, 8), floats("float32", 4, 3, 8)
    starts, slots, has_state = index(0, 4, 5), index(2, 0), jnp.asarray([True, False])
    layer, weight = nnx.CausalConv1d(8, 4, rngs=nnx.nnx.Rngs(0)), floats("float32", 8, 4)
    channels, torch_weight, distribution = pool.swapaxes(1, 2), weight[:, None], index(0, 1, 2)
    windows, transposed, row = channels[:2], packed.T, packed[:2]
    ragged = dict(state_indices=slots, distribution=distribution, has_initial_state=has_state, kernel_size=4)
    mesh = jax.make_mesh((1,), ("d",), devices=jax.devices()[:1])
    return {
        "layer, dense": lambda: layer(x, None, pool, slots),
        "layer, packed": lambda: layer(packed, starts, pool, slots),
        "sglang prefill": lambda: sglang_jax.jax_causal_conv1d_prefill(
            transposed, weight, cu_seqlens=starts, conv_state=channels, state_indices=slots,
            track_indices=slots, track_mask=has_state,
        ),
        "sglang prefill without a pool": lambda: sglang_jax.jax_causal_conv1d_prefill(transposed, weight, cu_seqlens=starts),
        "sglang update": lambda: sglang_jax.jax_causal_conv1d_update(row, channels, slots, weight),
        "sglang layer": lambda: sglang_jax.short_convolution(packed, weight, windows, starts, "EXTEND"),
        "tpu_inference": lambda: tpu_inference.ragged_conv1d_mixed_prefill(
            packed, pool, torch_weight, None, starts, **ragged
        ),
        "tpu_inference decode": lambda: tpu_inference.ragged_conv1d_decode_only(
            row, pool, torch_weight, None, starts, **ragged
        ),
        "split tokens": lambda: sharding.causal_conv1d_fn(
            packed, weight, None, pool, starts, slots, mesh=mesh, token_axis="d"
        ),
        "split tokens, training": lambda: sharding.causal_conv1d(
            packed, weight, None, None, starts, mesh=mesh, token_axis="d"
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", around_the_operations())
def test_what_stands_around_the_operations_transfers_nothing_on_xla(name):
    call = around_the_operations()[name]
    wanted = jax.tree.leaves(call())
    with jax.transfer_guard("disallow"):
        found = jax.block_until_ready(jax.tree.leaves(call()))
    assert all(np.array_equal(got, want) for got, want in zip(found, wanted, strict=True))
