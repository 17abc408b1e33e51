"""Calls with serving arguments compiled to machine code with no GPU, where a CUDA build of JAX and ptxas are
installed; skipped elsewhere, as in test_compile.py."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_impl
from tests.pallas.test_compile import on_h100, pytestmark  # noqa: F401  (pytest finds them here)

DIM = 8192


def fn_arrays(tokens=16384, batch=8, width=4, dim=DIM, columns=3, dtype="bfloat16", pool_dtype=None):
    return dict(
        x=((tokens, dim), dtype), weight=((dim, width), dtype), bias=((dim,), dtype),
        conv_states=((600, columns, dim), pool_dtype or dtype), query_start_loc=((batch + 1,), "int32"),
        cache_indices=((batch,), "int32"), has_initial_state=((batch,), "bool"),
    )  # fmt: skip


def update_arrays(batch=64, seqlen=4, **sizes):
    arrays = fn_arrays(batch=batch, **sizes)
    dim, dtype = arrays["weight"][0][0], arrays["x"][1]
    del arrays["query_start_loc"], arrays["has_initial_state"]
    return arrays | dict(x=((batch, seqlen, dim), dtype))


@pytest.fixture
def compiled(on_h100, monkeypatch, capfd):  # noqa: F811
    """Compiles a call with donated states; returns (kernels, other operations, registers) and checks the rest."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compile_call(function, arrays, **options):
        names = list(arrays)
        donated = [names.index(name) for name in ("conv_states", "window_out") if name in names]
        call = jax.jit(
            lambda *args: function(**dict(zip(names, args, strict=True)), backend="mosaic_gpu", **options),
            donate_argnums=donated,
        )
        shapes = [on_h100(shape, jnp.dtype(dtype)) for shape, dtype in arrays.values()]
        executable = call.trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
        printed = capfd.readouterr().out
        assert set(re.findall(r"(\d+) bytes spill", printed)) == {"0"}
        memory = executable.memory_analysis()
        states = [shapes[i] for i in donated]
        assert memory.alias_size_in_bytes == sum(s.size * s.dtype.itemsize for s in states)
        assert memory.temp_size_in_bytes < 1024
        entry = executable.as_text().split("ENTRY")[1]
        others = re.findall(r"\b(fusion|copy|copy-start|scatter|slice|pad|gather)\(", entry)
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", printed)]
        return len(re.findall(r"custom-call\(", entry)), others, max(registers)

    return compile_call


def integers(*shape):
    return shape, "int32"


PREFILLS = {
    "split": (1, {}, dict(split_sizes=(2048, 2048, 4096))),
    "split-128": (1, {}, dict(split_sizes=(128, 8064))),
    "projection": (1, dict(x=((16384, DIM + 4096), "bfloat16")), dict(channel_offset=1024)),
    "residual": (1, dict(residual=((16384, DIM), "float32")), {}),
    "snapshots": (
        2,
        dict(snapshot_indices=integers(8, 64), num_computed_tokens=integers(8), track_indices=integers(8)),
        dict(snapshot_block_size=64),
    ),
    "write": (2, dict(write_indices=integers(8)), dict(empty_rows="apply")),
    "back": (2, dict(conv_states=((600, 9, DIM), "bfloat16")), dict(state_layout="back")),
    "ring": (
        2,
        dict(conv_states=((600, 9, DIM), "float32"), cache_seqlens=integers(8)),
        dict(state_layout="ring"),
    ),
}


@pytest.mark.parametrize(("kernels", "arrays", "options"), PREFILLS.values(), ids=PREFILLS)
def test_a_prefill_is_its_kernels_and_nothing_else(compiled, kernels, arrays, options):
    found = compiled(
        pallas_impl.causal_conv1d_fn, fn_arrays() | arrays, activation="silu", max_seqlen=2048, **options
    )
    assert found[:2] == (kernels, [])
    assert found[2] <= 80


WINDOWS = dict(window_out=((64, 4, 3, DIM), "bfloat16"), window_indices=integers(64))
UPDATES = {
    "verify": (WINDOWS, dict(commit=False)),
    "tree": (WINDOWS | dict(tree_parents=integers(64, 4)), dict(commit=False)),
    "windows-and-state": (WINDOWS, {}),
    "windows-in-float32": (WINDOWS | dict(window_out=((64, 4, 3, DIM), "float32")), {}),
    "split": ({}, dict(split_sizes=(2048, 2048, 4096))),
    "back": (dict(conv_states=((600, 9, DIM), "bfloat16"), write_indices=integers(64)), dict(state_layout="back")),
    "ring": (dict(conv_states=((600, 9, DIM), "float32"), cache_seqlens=integers(64)), dict(state_layout="ring")),
    "rolling": (
        dict(
            conv_states=((600, 6, DIM), "bfloat16"), num_accepted_tokens=integers(64), write_indices=integers(64),
            track_indices=integers(64),
        ),
        {},
    ),
    "plain": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("arrays", "options"), UPDATES.values(), ids=UPDATES)
def test_an_update_is_one_kernel(compiled, arrays, options):
    found = compiled(pallas_impl.causal_conv1d_update, update_arrays() | arrays, activation="silu", **options)
    assert found[:2] == (1, [])
    assert found[2] <= 80


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("width", [1, 2, 8])
def test_widths_and_dtypes(compiled, width, dtype):
    sizes = dict(width=width, columns=11, dim=640, dtype=dtype, pool_dtype="bfloat16")
    extra = dict(track_indices=integers(8), snapshot_indices=integers(8, 9))
    found = compiled(
        pallas_impl.causal_conv1d_fn, fn_arrays(**sizes) | extra, snapshot_block_size=3, max_seqlen=2048
    )
    assert found[:2] == (1 if width == 1 else 2, [])
    windows = dict(window_out=((64, 9, width - 1, 640), dtype), tree_parents=integers(64, 9))
    found = compiled(
        pallas_impl.causal_conv1d_update, update_arrays(seqlen=9, **sizes) | windows, commit=False
    )
    assert found[0] == 1
    assert width == 1 or not found[1]  # without a window XLA copies the arrays that only pass through


def test_commit_windows_is_one_kernel(compiled):
    arrays = dict(
        conv_states=((600, 3, DIM), "bfloat16"), windows=((64, 4, 3, DIM), "bfloat16"), accepted_steps=integers(64),
        cache_indices=integers(64), window_indices=integers(64),
    )  # fmt: skip
    commit = lambda windows, **rest: pallas_impl.commit_windows(window_out=windows, **rest)  # noqa: E731
    assert compiled(commit, arrays)[:2] == (1, [])
