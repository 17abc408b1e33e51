"""The Pallas kernels compiled to machine code with no GPU, where a CUDA build of JAX and ptxas are installed.

Skipped elsewhere: `make test-compile` makes such an environment. Lowering for CUDA, which needs neither, is
tested in test_lowering.py.
"""

import importlib.util
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_impl

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
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


@pytest.fixture(scope="module")
def on_h100():
    from jax.experimental import topologies

    (device,) = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices
    mesh = jax.sharding.Mesh(np.array([device]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


@pytest.fixture
def compiled(on_h100, monkeypatch, capfd):
    """Compiles a call; returns the executable and what ptxas printed of its kernels."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compile_call(function, *shapes, **options):
        arguments = [None if shape is None else on_h100(*shape) for shape in shapes]
        call = jax.jit(lambda *args: function(*args, backend="mosaic_gpu", **options), donate_argnums=(3,))
        executable = call.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
        return executable, capfd.readouterr().out

    return compile_call


def prefill(compiled, tokens, dim, batch, width=4, dtype=jnp.bfloat16, **options):
    return compiled(
        pallas_impl.causal_conv1d_fn,
        ((tokens, dim), dtype),
        ((dim, width), dtype),
        ((dim,), dtype),
        ((2 * batch + 3, width - 1, dim), dtype),
        ((batch + 1,), jnp.int32),
        ((batch,), jnp.int32),
        ((batch,), jnp.bool_),
        activation="silu",
        **options,
    )


def update(compiled, batch, dim, width=4, dtype=jnp.bfloat16):
    return compiled(
        pallas_impl.causal_conv1d_update,
        ((batch, dim), dtype),
        ((dim, width), dtype),
        ((dim,), dtype),
        ((batch + 3, width - 1, dim), dtype),
        ((batch,), jnp.int32),
        activation="silu",
    )


def check(executable, printed, most_registers, pool_bytes):
    """One kernel and nothing else, no spills, the pool updated in place."""
    assert [int(n) for n in re.findall(r"(\d+) bytes spill", printed)] == [0, 0]
    (registers,) = (int(n) for n in re.findall(r"Used (\d+) registers", printed))
    assert registers <= most_registers
    entry = executable.as_text().split("ENTRY")[1]
    assert len(re.findall(r"custom-call\(", entry)) == 1
    assert not re.search(r"\b(fusion|copy|copy-start|scatter)\(", entry)
    memory = executable.memory_analysis()
    assert memory.temp_size_in_bytes == 0
    assert memory.alias_size_in_bytes == pool_bytes


@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize(("tokens", "batch"), [(16384, 8), (33, 5)])
def test_prefill(compiled, tokens, batch, schedule):
    executable, printed = prefill(compiled, tokens, 8192, batch, schedule=schedule, max_seqlen=2048)
    check(executable, printed, 56, (2 * batch + 3) * 3 * 8192 * 2)


@pytest.mark.parametrize("batch", [1, 256, 1024])
def test_update(compiled, batch):
    executable, printed = update(compiled, batch, 8192)
    check(executable, printed, 64, (batch + 3) * 3 * 8192 * 2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_widths_and_dtypes(compiled, width, dtype):
    size = jnp.dtype(dtype).itemsize
    check(*prefill(compiled, 4096, 2048, 4, width, dtype), 128, 11 * (width - 1) * 2048 * size)
    check(*update(compiled, 32, 2048, width, dtype), 128, 35 * (width - 1) * 2048 * size)


@pytest.mark.parametrize("dim", [640, 1032, 3712])
def test_dims_that_no_block_divides(compiled, dim):
    check(*prefill(compiled, 4096, dim, 4), 80, 11 * 3 * dim * 2)
    check(*update(compiled, 32, dim), 64, 35 * 3 * dim * 2)
