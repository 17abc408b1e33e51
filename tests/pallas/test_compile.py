"""The Pallas kernels compiled to machine code with no GPU, where a CUDA build of JAX and ptxas are installed.

Skipped elsewhere: `make test-compile` makes such an environment. Lowering for CUDA, which needs neither, is
tested in test_lowering.py.
"""

import functools
import importlib.util
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_impl
from pallas_impl import context_parallel, sharding

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


def check(executable, printed, most_registers, pool_bytes, table=0):
    """One kernel and nothing else, no spills, the pool updated in place; `table`: bytes of the results' addresses."""
    assert [int(n) for n in re.findall(r"(\d+) bytes spill", printed)] == [0, 0]
    (registers,) = (int(n) for n in re.findall(r"Used (\d+) registers", printed))
    assert registers <= most_registers
    entry = executable.as_text().split("ENTRY")[1]
    assert len(re.findall(r"custom-call\(", entry)) == 1
    assert not re.search(r"\b(fusion|copy|copy-start|scatter)\(", entry)
    memory = executable.memory_analysis()
    assert memory.temp_size_in_bytes == table
    assert memory.alias_size_in_bytes == pool_bytes


@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize(("tokens", "batch"), [(16384, 8), (33, 5)])
def test_prefill(compiled, tokens, batch, schedule):
    executable, printed = prefill(compiled, tokens, 8192, batch, schedule=schedule, max_seqlen=2048)
    check(executable, printed, 56, (2 * batch + 3) * 3 * 8192 * 2)


@pytest.mark.parametrize(("tokens", "batch"), [(4096, 4096), (7500, 1500), (1280, 257)])
def test_rows_of_few_tokens(compiled, tokens, batch):
    executable, printed = prefill(compiled, tokens, 8192, batch)
    assert "causal_conv1d_short_rows" in printed
    check(executable, printed, 72, (2 * batch + 3) * 3 * 8192 * 2)


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


HEADS = dict(num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128)


def gates(tokens, channel):
    last = (32, 128)[: 1 + channel]
    return (
        ((tokens, *last), jnp.bfloat16),
        ((tokens, 32), jnp.bfloat16),
        ((32,), jnp.float32),
        (last, jnp.bfloat16),
    )


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
def test_prologue(compiled, schedule, channel):
    def front(x, weight, bias, pool, starts, slots, flags, a, b, A_log, dt_bias, **options):
        given = dict(a=a, b=b, A_log=A_log, dt_bias=dt_bias, **HEADS, **options)
        return pallas_impl.gated_delta_prologue_fn(x, weight, bias, pool, starts, slots, flags, **given)

    shapes = (
        ((16384, 8192), jnp.bfloat16), ((8192, 4), jnp.bfloat16), ((8192,), jnp.bfloat16),
        ((19, 3, 8192), jnp.bfloat16), ((9,), jnp.int32), ((8,), jnp.int32), ((8,), jnp.bool_),
    )  # fmt: skip
    executable, printed = compiled(
        front, *shapes, *gates(16384, channel), schedule=schedule, max_seqlen=2048, q_scale=0.1
    )
    check(executable, printed, 72, 19 * 3 * 8192 * 2, 48)


@pytest.mark.parametrize("batch", [1, 32, 256])
def test_prologue_of_a_step(compiled, batch):
    def front(x, weight, bias, pool, slots, a, b, A_log, dt_bias, **options):
        given = dict(a=a, b=b, A_log=A_log, dt_bias=dt_bias, **HEADS, **options)
        return pallas_impl.gated_delta_prologue_update(x, weight, bias, pool, slots, **given)

    shapes = (
        ((batch, 8192), jnp.bfloat16), ((8192, 4), jnp.bfloat16), ((8192,), jnp.bfloat16),
        ((batch + 3, 3, 8192), jnp.bfloat16), ((batch,), jnp.int32),
    )  # fmt: skip
    executable, printed = compiled(front, *shapes, *gates(batch, False))
    check(executable, printed, 80, (batch + 3) * 3 * 8192 * 2, 48)


def test_gated_convolution(compiled):
    shapes = (
        ((16384, 3 * 2048), jnp.bfloat16), ((2048, 3), jnp.bfloat16), ((2048,), jnp.bfloat16),
        ((19, 2, 2048), jnp.bfloat16), ((9,), jnp.int32), ((8,), jnp.int32), ((8,), jnp.bool_),
    )  # fmt: skip
    check(*compiled(pallas_impl.gated_short_conv_fn, *shapes, max_seqlen=2048), 64, 19 * 2 * 2048 * 2)
    step = (*shapes[:3], ((259, 2, 2048), jnp.bfloat16), ((256,), jnp.int32))
    step = (((256, 3 * 2048), jnp.bfloat16), *step[1:])
    check(*compiled(pallas_impl.gated_short_conv_update, *step), 40, 259 * 2 * 2048 * 2)


@pytest.fixture(scope="module")
def two_h100s():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x2").devices
    return jax.sharding.Mesh(np.array(devices), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def compiled_order(executable):
    """The kernels, collectives and copies of a compiled program in their order; of a kernel what it is for."""
    found = []
    for line in executable.as_text().split("ENTRY")[1].splitlines():
        if kernel := re.search(r" custom-call\(.*\bcausal_conv1d_(\w+)/mpmd_map", line):
            found.append(kernel[1])
        elif other := re.search(r" ((?:all|collective|reduce)-[\w-]+|copy|scatter)\(", line):
            found.append(other[1])
    return found


def test_tokens_over_two_gpus(two_h100s):
    """XLA takes the program; what travels is under way while the kernel of the whole part runs; no copies."""
    where = sharding.shardings(two_h100s, token_axis="d")
    kinds = dict(
        x=((8192, 4096), "bfloat16"), weight=((4096, 4), "bfloat16"), bias=((4096,), "bfloat16"),
        conv_states=((9, 3, 4096), "bfloat16"), query_start_loc=((5,), "int32"), cache_indices=((4,), "int32"),
        has_initial_state=((4,), bool),
    )  # fmt: skip
    shapes = {name: jax.ShapeDtypeStruct(*kind, sharding=where[name]) for name, kind in kinds.items()}
    split = functools.partial(
        sharding.causal_conv1d_fn, mesh=two_h100s, token_axis="d", activation="silu", backend="mosaic_gpu"
    )
    traced = jax.jit(split, donate_argnames="conv_states").trace(**shapes)
    order = compiled_order(traced.lower(lowering_platforms=("cuda",)).compile())
    assert order == ["all-gather-start", "prefill", "all-gather-done", "mend_first"]


def test_training_over_two_gpus(two_h100s):
    """The same of both passes; the upstream gradient follows from the result, as in training."""

    def step(x, weight, starts):
        split = jax.shard_map(
            lambda x, weight, starts: context_parallel.causal_conv1d(
                x, weight, None, starts, axis_name="d", activation="silu", backend="mosaic_gpu"
            ),
            mesh=two_h100s, in_specs=(P("d"), P(), P()), out_specs=P("d"), check_vma=False,
        )  # fmt: skip
        out, pull = jax.vjp(lambda x, weight: split(x, weight, starts), x, weight)
        return out, *pull(out)

    kinds = [((8192, 4096), "bfloat16", P("d")), ((4096, 4), "bfloat16", P()), ((5,), "int32", P())]
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(two_h100s, spec))
        for shape, dtype, spec in kinds
    ]
    order = compiled_order(jax.jit(step).trace(*shapes).lower(lowering_platforms=("cuda",)).compile())
    assert order == [
        "collective-permute-start", "prefill", "collective-permute-done", "mend_first",
        "collective-permute-start", "backward", "collective-permute-done", "backward_sums",
        "all-reduce-start", "mend_last", "all-reduce-done",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["causal_conv1d_fn", "causal_conv1d_update", "commit_windows"])
def test_kernels_that_write_a_pool_split_by_the_compiler(two_h100s, monkeypatch, name):
    """Auto axes inside jit, channels split: XLA takes the kernel, which writes to a reference, on each device's part."""
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    pool, x = ((8, 3, 512), "bfloat16", P(None, None, "d")), ((8, 512), "bfloat16", P(None, "d"))
    weight = (512, 4), "bfloat16", P("d")
    kinds = {
        "causal_conv1d_fn": dict(
            x=x, weight=weight, bias=None, conv_states=pool, query_start_loc=((3,), "int32", P())
        ),
        "causal_conv1d_update": dict(x=x, weight=weight, bias=None, conv_states=pool),
        "commit_windows": dict(
            conv_states=pool,
            window_out=((2, 3, 3, 512), "bfloat16", P(None, None, None, "d")),
            accepted_steps=((2,), "int32", P()),
        ),
    }[name]
    arguments = {
        key: kind and jax.ShapeDtypeStruct(*kind[:2], sharding=jax.sharding.NamedSharding(two_h100s, kind[2]))
        for key, kind in kinds.items()
    }
    run = jax.jit(functools.partial(getattr(pallas_impl, name), backend="mosaic_gpu"))
    with jax.set_mesh(two_h100s):
        executable = run.trace(**arguments).lower(lowering_platforms=("cuda",)).compile()
    assert len(re.findall(r"custom-call\(", executable.as_text())) == 1
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", executable.as_text())
