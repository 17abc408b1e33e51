"""The backward kernels of the JAX twin compiled to machine code with no GPU, where a CUDA build of JAX and ptxas are
installed; skipped elsewhere, as in test_compile.py."""

import importlib.util
import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl import short_conv
from pallas_impl.functional import causal_conv1d
from pallas_impl.functional_prologue import gated_delta_prologue

PLUGINS = [name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.skipif(not PLUGINS, reason="needs a CUDA build of JAX (no GPU): run `make test-compile`"),
    pytest.mark.skipif(not shutil.which("ptxas"), reason="needs ptxas on PATH: run `make test-compile`"),
]

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture(scope="module")
def sharding():
    from jax.experimental import topologies

    (device,) = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices
    mesh = jax.sharding.Mesh(np.array([device]), ("one",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize(
    ("width", "dtype", "schedule", "states", "most_registers"),
    [(4, "bfloat16", "flat", False, 64), (4, "bfloat16", "per_sequence", True, 72), (1, "float16", "flat", True, 64),
     (8, "float32", "flat", True, 96), (8, "bfloat16", "per_sequence", True, 96)],
)  # fmt: skip
def test_two_kernels_without_spills(
    sharding, monkeypatch, capfd, width, dtype, schedule, states, most_registers
):
    """XLA adds only the slices of the sums and their casts; three programs fit on a multiprocessor."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    batch, tokens, dim = 8, 16384, 8192

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

    def gradient(x, weight, bias, initial, starts, dout, dfinal):
        def forward(x, weight, bias, initial):
            result = causal_conv1d(
                x, weight, bias, initial, starts,
                activation="silu", schedule=schedule, backend="mosaic_gpu", max_seqlen=2048,
            )  # fmt: skip
            return tuple(result) if states else result.out

        return jax.vjp(forward, x, weight, bias, initial)[1]((dout, dfinal) if states else dout)

    state = shape(batch, width - 1, dim)
    arguments = (
        shape(tokens, dim), shape(dim, width), shape(dim), state if states else None,
        shape(batch + 1, dtype="int32"), shape(tokens, dim), state,
    )  # fmt: skip
    executable = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    printed = capfd.readouterr().out
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", printed)} == {0}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", printed)]
    assert len(registers) == 2
    assert max(registers) <= most_registers
    entry = executable.as_text().split("ENTRY")[1]
    assert len(re.findall(r"custom-call\(", entry)) == 2
    workspace = (tokens // (256 // jnp.dtype(dtype).itemsize) + batch + 1) * (width + 1) * dim * 4
    assert executable.memory_analysis().temp_size_in_bytes <= workspace + 2**20


@pytest.mark.parametrize(("width", "dtype", "most_registers"), [(4, "bfloat16", 104), (8, "float32", 168)])
def test_documents_cost_one_operation(sharding, monkeypatch, capfd, width, dtype, most_registers):
    """Besides that of the marks, the operations and the workspace are those of rows without documents.

    A group's tokens are loaded before any is stored: ptxas moves no load across a store whose address it cannot tell apart.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    batch, seqlen, dim = 8, 2048, 2048

    def training(x, weight, bias, ids, dout):
        options = dict(segment_ids=ids, want_cache=False, activation="silu", backend="mosaic_gpu")
        out, back = jax.vjp(lambda *arrays: short_conv(*arrays, **options).out, x, weight, bias)
        return out, *back(dout)

    def compiled(run, ids):
        sizes = (batch, seqlen, dim), (dim, width), (dim,), (batch, seqlen), (batch, seqlen, dim)
        x, weight, bias, documents, dout = (
            jax.ShapeDtypeStruct(size, jnp.dtype(kind), sharding=sharding)
            for size, kind in zip(sizes, (dtype, dtype, dtype, "int32", dtype), strict=True)
        )
        arguments = x, weight, bias, documents if ids else None, dout
        executable = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        printed = capfd.readouterr().out
        assert {int(n) for n in re.findall(r"(\d+) bytes spill", printed)} == {0}
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", printed)]
        assert len(registers) == 3
        assert max(registers) <= most_registers  # three programs of the gradient fit on a multiprocessor
        (kernel,) = re.findall(r"\.entry causal_conv1d_backward_mosaic.*?\n}", printed, re.DOTALL)
        accesses = re.findall(r"\b(ld|st)\.shared\.", kernel)
        assert accesses.count("st") >= 8 * (1 + ids)  # tokens of a group
        assert [*itertools.pairwise(accesses)].count(("st", "ld")) <= ids
        operations = re.findall(r"(fusion|custom-call)\(", executable.as_text().split("ENTRY")[1])
        return len(operations), executable.memory_analysis().temp_size_in_bytes

    (operations, workspace), (dense_operations, dense_workspace) = (
        compiled(training, True), compiled(training, False)
    )  # fmt: skip
    assert operations == dense_operations + 1
    assert workspace <= dense_workspace + 4 * batch * seqlen // 8 + 2**10


@pytest.mark.parametrize(
    ("width", "dtype", "size", "states", "rounding", "programs"),
    [(4, "bfloat16", 128, False, "storage", 3), (4, "bfloat16", 64, True, "none", 3), (5, "float16", 16, True, "storage", 2),
     (4, "float32", 128, True, "storage", 3)],
)  # fmt: skip
def test_a_fronts_gradient_is_two_kernels_without_spills(
    sharding, monkeypatch, capfd, width, dtype, size, states, rounding, programs
):
    """So many programs have the registers of a multiprocessor; wide arrays are read and written by the kernels alone."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    batch, tokens, dim = 8, 16384, 4096
    heads = dict(num_k_heads=1024 // size, num_v_heads=2048 // size, head_k_dim=size, head_v_dim=size)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

    def gradient(x, weight, bias, initial, starts, parts, dfinal):
        def forward(x, weight, bias, initial):
            found = gated_delta_prologue(
                x, weight, bias, initial, starts, **heads, q_scale=0.5, norm_rounding=rounding, max_seqlen=2048,
                backend="mosaic_gpu",
            )  # fmt: skip
            return (*found[:3], *found[-1:] * states)

        return jax.vjp(forward, x, weight, bias, initial)[1]((*parts, *[dfinal] * states))

    state = shape(batch, width - 1, dim)
    parts = [shape(tokens, n // size, size) for n in (1024, 1024, 2048)]
    arguments = (
        shape(tokens, dim), shape(dim, width), shape(dim), state if states else None,
        shape(batch + 1, dtype="int32"), parts, state,
    )  # fmt: skip
    executable = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    printed = capfd.readouterr().out
    assert {int(n) for n in re.findall(r"(\d+) bytes spill", printed)} == {0}
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", printed)]
    assert len(registers) == 2
    assert max(registers) <= 65536 // (programs * 128) // 8 * 8
    entry = executable.as_text().split("ENTRY")[1]
    assert len(re.findall(r"custom-call\(", entry)) == 2
    workspace = (tokens // (256 // jnp.dtype(dtype).itemsize) + batch + 1) * (width + 1) * dim * 4
    assert executable.memory_analysis().temp_size_in_bytes <= workspace + 2**20
