"""The Mosaic GPU kernels lowered for CUDA on a machine that need not have a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_impl import Unsupported, causal_conv1d_fn, causal_conv1d_update, gated_delta_prologue, short_conv
from tests.tools import pallas_code
from tests.tools.code_calls import CALLS
from tests.tools.kernel_results import beside_kernels


def spec(shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def lower(function, *arguments, **options):
    jitted = jax.jit(functools.partial(function, backend="mosaic_gpu", **options))
    return jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def lower_prefill(
    tokens=100,
    dim=512,
    batch=5,
    width=4,
    dtype="bfloat16",
    pool_dtype=None,
    slots=9,
    index="int32",
    **options,
):
    return lower(
        causal_conv1d_fn,
        spec((tokens, dim), dtype), spec((dim, width), dtype), spec((dim,), dtype),
        spec((slots, width, dim), pool_dtype or dtype), spec((batch + 1,), "int32"), spec((batch,), index),
        spec((batch,), bool), **options,
    )  # fmt: skip


def lower_update(*shape, width=4, dtype="bfloat16", slots=2000, **options):
    dim = shape[-1]
    return lower(
        causal_conv1d_update,
        spec(shape, dtype), spec((dim, width), dtype), None, spec((slots, width, dim), dtype),
        spec((shape[0],), "int32"), **options,
    )  # fmt: skip


def operations(text):
    """The operations of the lowered module, a custom call by the name of what it calls; a barrier runs nothing."""
    found = [called or name for name, called in re.findall(r"(?<!#)stablehlo\.(\w+)(?: @(\w+))?", text)]
    return [name for name in found if name != "optimization_barrier"]


@pytest.mark.parametrize("schedule", ["flat", "per_sequence", "auto"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_prefill_is_one_kernel_that_writes_the_pool_in_place(schedule, activation):
    text = lower_prefill(schedule=schedule, activation=activation)
    assert operations(text) == ["mosaic_gpu_v2"]
    # Outputs: out, pool. The pool is the last operand of x, weight, starts, bias, slots, has_state, pool.
    assert re.search(r"output_tuple_indices = \[1\], operand_index = 6,", text)


@pytest.mark.parametrize("shape", [(1, 8192), (256, 2048), (5, 200)])
def test_a_decode_step_is_one_kernel_that_writes_the_pool_in_place(shape):
    text = lower_update(*shape, activation="silu")
    assert operations(text) == ["mosaic_gpu_v2"]
    assert re.search(r"output_tuple_indices = \[1\], operand_index = 3,", text)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(width=1, dim=1, tokens=1, batch=1),
        dict(width=2, dim=100, tokens=7, batch=3),
        # batches: the row search is by descent, by vote, or both
        dict(width=3, dim=128, batch=7, dtype="float16", pool_dtype="float32"),
        dict(width=4, dim=136, batch=8, dtype="float32", pool_dtype="bfloat16"),
        dict(width=5, dim=200, batch=129),
        dict(width=6, dim=384, batch=3000, slots=4000, index="uint16"),
        dict(width=7, dim=4352, batch=1, schedule="per_sequence"),
        dict(width=8, dim=8192, slots=1 << 20),
        dict(tokens=1 << 20, dim=8192, batch=256),  # 2**33 elements
    ],
    ids=str,
)
def test_every_size_lowers(sizes):
    assert "mosaic_gpu_v2" in operations(lower_prefill(**sizes))


@pytest.mark.parametrize(
    ("shape", "width"),
    [((3, 4, 128), 1), ((2, 100), 2), ((1, 1), 1), ((1, 1), 4), ((7, 128), 2), ((1 << 20, 8192), 4)],
)
def test_every_decode_size_lowers(shape, width):
    assert "mosaic_gpu_v2" in operations(lower_update(*shape, width=width, slots=1 << 20))


def test_only_rows_that_tma_cannot_address_are_padded():
    assert "pad" not in operations(lower_prefill(dim=200))
    assert "pad" in operations(lower_prefill(dim=100))
    assert "pad" in operations(lower_prefill(dim=201))


def test_the_pool_is_never_padded():
    text = lower_prefill(dim=100, slots=7777)
    assert re.findall(r"stablehlo\.pad[^\n]*7777", text) == []
    assert re.search(r"tensor<7777x4x100xbf16>", text)


def test_without_a_pool_nothing_is_aliased():
    text = lower(
        causal_conv1d_fn,
        spec((64, 256), "bfloat16"),
        spec((256, 4), "bfloat16"),
        None,
        None,
        spec((3,), "int32"),
    )
    assert operations(text) == ["mosaic_gpu_v2"]
    assert "operand_index" not in text


def grid(kernel):
    """How many programs a Mosaic kernel's text launches."""
    name = re.search(r'gpu\.launch"\(%\w+, (%\w+)', kernel)[1]
    return int(re.search(rf"{name} = .*value = (\d+)", kernel)[1])


def test_documents_are_rows_of_equal_length():
    """The kernels, their grids and the sums of the gradient are those of rows without documents, and marks are no search."""

    def training(x, weight, cache, segment_ids, dout):
        def run(x, weight, cache):
            options = dict(segment_ids=segment_ids, want_cache=False, activation="silu")
            return short_conv(x, weight, cache=cache, backend="mosaic_gpu", **options).out

        out, back = jax.vjp(run, x, weight, cache)
        return out, *back(dout)

    def lowered(ids):
        x = spec((8, 2048, 512), "bfloat16")
        arrays = x, spec((512, 4), "bfloat16"), spec((8, 3, 512), "bfloat16"), ids, x
        return jax.jit(training).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    texts = lowered(None), lowered(spec((8, 2048), "int32"))
    calls, grids = [], []
    for text in texts:
        assert not {"sort", "gather", "scatter", "while", "reduce", "reduce_window"} & set(operations(text))
        calls.append(re.findall(r"custom_call @mosaic_gpu\S*\(.*-> (.*)", text))
        grids.append([grid(kernel) for kernel, _ in pallas_code.kernels(text)])
    assert len(calls[0]) == 3
    assert calls[0] == calls[1]
    assert grids[0] == grids[1]
    assert max(grids[0]) < 8 * 2048


@pytest.mark.parametrize(("size", "kernels"), [(128, 2), (64, 2), (16, 2), (256, 3)])
def test_the_gradient_of_whole_heads_is_two_kernels(size, kernels):
    """The walk and its sums; nothing else touches an array of the width of x, of q, k or v. Larger heads: composed."""
    dim, tokens, count = 1024, 100, 256 // size
    heads = dict(num_k_heads=count, num_v_heads=2 * count, head_k_dim=size, head_v_dim=size)
    x, weight = spec((tokens, dim), "bfloat16"), spec((dim, 4), "bfloat16")
    parts = [spec((tokens, n * count, size), "bfloat16") for n in (1, 1, 2)]

    def gradient(x, weight, starts, parts, backend):
        def forward(x, weight):
            return gated_delta_prologue(x, weight, query_start_loc=starts, **heads, backend=backend)[:3]

        return jax.vjp(forward, x, weight)[1](tuple(parts))

    text = lower(gradient, x, weight, spec((4,), "int32"), parts)
    assert operations(text).count("mosaic_gpu_v2") == kernels
    wide = {
        name
        for name, rest in re.findall(r"(?<!#)stablehlo\.(\w+)([^\n]*)", text)
        if re.search(rf"tensor<{tokens}x(256|512|{dim})x", rest) and name not in ("custom_call", "reshape")
    }
    assert (wide - {"optimization_barrier"} == set()) == (kernels == 2), wide


def test_a_grid_beyond_32_bits_is_unsupported():
    with pytest.raises(Unsupported, match=r"^backend: 'mosaic_gpu' needs fewer than 2\*\*31 programs"):
        lower_prefill(tokens=2**31 - 2, dim=8192)


APART = (
    "prefill flat", "prefill per_sequence", "prefill snapshots", "update 256 rows", "update rolling packed", "verify", "tree",
    "commit", "gradient flat", "gradient dense", "gated update",
)  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_xla_makes_no_kernel_one_with_a_slice(name):
    """A barrier lies around each: see `pallas_impl.launch`, and `test_gpu` for what happens without."""
    kernels, beside = beside_kernels(pallas_code.lowered(CALLS[name]))
    assert kernels
    assert beside == []


def test_a_kernel_without_a_barrier_would_be_seen(monkeypatch):
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda arrays: arrays)
    jax.clear_caches()
    assert beside_kernels(lower_update(5, 200, activation="silu")) == (1, ["argument", "return"])
    jax.clear_caches()
