"""Calls with serving arguments lowered for CUDA on a machine that need not have a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_impl import causal_conv1d_fn, causal_conv1d_update, commit_windows
from tests.pallas.test_lowering import operations


def spec(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def lower(function, arrays, **options):
    jitted = jax.jit(functools.partial(function, backend="mosaic_gpu", **options))
    return jitted.trace(**arrays).lower(lowering_platforms=("cuda",)).as_text()


def prefill(dim=512, wide=0, columns=3, **arrays):
    return dict(
        x=spec("bfloat16", 100, dim + wide), weight=spec("bfloat16", dim, 4), bias=None,
        conv_states=spec("bfloat16", 40, columns, dim), query_start_loc=spec("int32", 6),
        cache_indices=spec("int32", 5), has_initial_state=spec("bool", 5), **arrays,
    )  # fmt: skip


def step(dim=512, wide=0, seqlen=4, columns=3, **arrays):
    return dict(
        x=spec("bfloat16", 5, seqlen, dim + wide), weight=spec("bfloat16", dim, 4), bias=None,
        conv_states=spec("bfloat16", 40, columns, dim), cache_indices=spec("int32", 5), **arrays,
    )  # fmt: skip


ROWS = spec("int32", 5)
TABLE = spec("int32", 5, 9)
WINDOWS = spec("bfloat16", 5, 4, 3, 512)


@pytest.mark.parametrize(
    ("kernels", "arrays", "options"),
    [
        (1, prefill(), dict(split_sizes=(128, 384))),
        (1, prefill(wide=8), dict(channel_offset=8)),
        (1, prefill(residual=spec("float32", 100, 512)), {}),
        (2, prefill(snapshot_indices=TABLE, num_computed_tokens=ROWS), dict(snapshot_block_size=16)),
        (2, prefill(track_indices=ROWS, write_indices=ROWS), dict(empty_rows="apply")),
        (2, prefill(columns=7), dict(state_layout="back")),
        (2, prefill(columns=7, cache_seqlens=ROWS), dict(state_layout="ring", split_sizes=(256, 256))),
    ],
    ids=str,
)
def test_a_prefill_is_one_kernel_or_two(kernels, arrays, options):
    assert operations(lower(causal_conv1d_fn, arrays, **options)) == ["mosaic_gpu_v2"] * kernels


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        (step(window_out=WINDOWS, window_indices=ROWS), dict(commit=False)),
        (step(window_out=WINDOWS, tree_parents=spec("int32", 5, 4)), dict(commit=False)),
        (step(write_indices=ROWS, track_indices=ROWS), {}),
        (step(columns=7, cache_seqlens=ROWS, write_indices=ROWS), dict(state_layout="ring")),
        (step(columns=7), dict(state_layout="back", split_sizes=(128, 384))),
        (step(columns=7, num_accepted_tokens=ROWS, write_indices=ROWS), {}),
        (step(wide=8, seqlen=1), dict(channel_offset=8, split_sizes=(256, 256))),
        (step(), {}),  # rows of equal length need no offsets
    ],
    ids=str,
)
def test_an_update_is_one_kernel(arrays, options):
    found = operations(lower(causal_conv1d_update, arrays, **options))
    assert set(found) == {"mosaic_gpu_v2", "reshape"}
    assert found.count("mosaic_gpu_v2") == 1


def test_commit_windows_is_one_kernel():
    arrays = dict(
        conv_states=spec("float32", 40, 3, 512), window_out=WINDOWS, accepted_steps=ROWS, cache_indices=ROWS
    )
    assert operations(lower(commit_windows, arrays)) == ["mosaic_gpu_v2"]


def test_states_and_windows_are_written_in_place():
    text = lower(causal_conv1d_update, step(window_out=WINDOWS))
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", text)
    assert [out for out, _ in aliases] == ["1", "2"]
    text = lower(causal_conv1d_update, step(window_out=WINDOWS), commit=False)
    assert len(re.findall("output_tuple_indices", text)) == 1


@pytest.mark.parametrize("sizes", [(100, 412), (511, 1)])
def test_parts_of_no_whole_tiles_are_cut_from_one_kernels_result(sizes):
    text = lower(causal_conv1d_fn, prefill(), split_sizes=sizes)
    assert operations(text) == ["mosaic_gpu_v2", "slice", "slice"]


def test_channels_that_tma_cannot_address_are_cut_out_first():
    assert "slice" not in operations(lower(causal_conv1d_fn, prefill(wide=16), channel_offset=8))
    assert operations(lower(causal_conv1d_fn, prefill(wide=16), channel_offset=3))[0] == "slice"
    assert operations(lower(causal_conv1d_fn, prefill(wide=3), channel_offset=0))[0] == "slice"


@pytest.mark.parametrize("dim", [100, 201])
def test_the_pool_is_never_padded(dim):
    arrays = step(dim=dim, columns=7, window_out=spec("bfloat16", 5, 4, 3, dim))
    for text in (
        lower(causal_conv1d_fn, prefill(dim=dim, columns=7), state_layout="back"),
        lower(causal_conv1d_update, arrays),
    ):
        assert "mosaic_gpu_v2" in operations(text)
        assert re.findall(r"stablehlo\.pad[^\n]*<40x", text) == []
