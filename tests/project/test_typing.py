"""A user's program passes mypy --strict: public functions say the types of their arguments and results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# What lies outside the program and our packages is skipped: its types are then Any, and minutes are seconds.
SETTINGS = """
[mypy]
strict = True
python_version = 3.11
follow_imports = skip
disallow_subclassing_any = False
enable_error_code = deprecated

[mypy-oracle.*,triton_impl.*,pallas_impl.*,twinconv]
follow_imports = silent
"""

TORCH = """
import torch

import twinconv
import triton_impl
from oracle.contract import Unsupported
from triton_impl import ConvOutput, causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from triton_impl import commit_windows, context_parallel, short_conv, tree_parents_from_links
from triton_impl.compat import PEERS, install, uninstall, validated
from triton_impl.modules import CausalConv1d, ConvStatePool, PoolExhausted, dense_rows
from triton_impl.short_conv import short_conv


def serve(x: torch.Tensor, weight: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    result: ConvOutput = causal_conv1d_fn(x, weight, None, pool, slots, activation="silu", split_sizes=(2, 2))
    out, states = causal_conv1d_update(x, weight, None, pool, slots, pad_slot_id=-1)
    out, states, windows = causal_conv1d_update(x, weight, None, pool, window_out=x, commit=False)
    states = commit_windows(states, windows, slots)
    parents = tree_parents_from_links(slots, slots)
    mine = context_parallel.causal_conv1d(x, weight, None, slots, part_lengths=[4, 4])
    mine, _ = context_parallel.causal_conv1d_fn(x, weight, None, pool, slots, group=None)
    dense = dense_rows(x, weight, None)
    trained = causal_conv1d(x, weight, max_seqlen=17).out
    trained, cache = short_conv(x, weight, cache=None, lengths=slots, want_cache=False)
    return dense


def layers(x: torch.Tensor) -> int:
    conv = CausalConv1d(256, 4, activation=None, dtype=torch.bfloat16)
    conv = CausalConv1d.from_conv1d(torch.nn.Conv1d(8, 8, 4, groups=8))
    pool = ConvStatePool(16, 256, 4, layers=2, device="cpu")
    try:
        slots = pool.allocate(2)
    except PoolExhausted:
        return pool.num_free
    conv.prefill(x, None, pool, slots, layer=1, max_seqlen=5)
    conv.step(x, pool, pool.indices(slots, batch=4))
    pool.free(slots)
    return pool.num_slots


def switch() -> str:
    install(PEERS[0])
    with validated():
        uninstall("vllm")
    try:
        return triton_impl.__version__
    except Unsupported:
        return str(twinconv.__version__)
"""

JAX = """
import jax
import jax.numpy as jnp
from flax import nnx

from pallas_impl import ConvOutput, causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from pallas_impl import commit_windows, context_parallel, sharding, short_conv, tree_parents_from_links
from pallas_impl.modules import equinox as eqx
from pallas_impl.modules import load_weight
from pallas_impl.modules import nnx as flax_layers
from pallas_impl.short_conv import short_conv


def serve(x: jax.Array, weight: jax.Array, pool: jax.Array, slots: jax.Array) -> jax.Array:
    result: ConvOutput = causal_conv1d_fn(x, weight, None, pool, slots, activation="silu", split_sizes=(2, 2))
    out, pool = causal_conv1d_update(x, weight, None, pool, slots, pad_slot_id=-1)
    out, pool, windows = causal_conv1d_update(x, weight, None, pool, window_out=x, commit=False)
    pool = commit_windows(pool, windows, slots)
    parents = tree_parents_from_links(slots, slots)
    mine = context_parallel.causal_conv1d(x, weight, None, slots, axis_name="tokens")
    trained = causal_conv1d(x, weight, max_seqlen=17).out
    trained, cache = short_conv(x, weight, segment_ids=slots, axes=("data", None))
    return pool


def split(x: jax.Array, mesh: jax.sharding.Mesh) -> dict[str, jax.sharding.NamedSharding]:
    out, pool = sharding.causal_conv1d_fn(x, x, None, None, x, mesh=mesh, channel_axis="model", activation="silu")
    out, pool = sharding.causal_conv1d_update(x, x, None, x, mesh=mesh, batch_axis="data")
    sharding.partition_specs("model", token_axis="tokens")
    return sharding.shardings(mesh, batch_axis="data")


def layers(x: jax.Array) -> jax.Array:
    first = flax_layers.CausalConv1d(256, 4, activation=None, rngs=nnx.Rngs(0))
    second = eqx.CausalConv1d.from_weights(load_weight(x, layout="torch")).load(x)
    out, pool = first(x, conv_states=second.empty_states(16), decode=True)
    return first.empty_states(4, jnp.bfloat16)
"""


def check(program, tmp_path):
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "/dev/null", "program.py"],
        cwd=tmp_path, env={"MYPYPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip


@pytest.mark.parametrize("program", [TORCH, JAX], ids=["torch", "jax"])
def test_a_users_program_passes(program, tmp_path):
    done = check(program, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_argument_is_seen(tmp_path):
    program = """
from triton_impl import ConvOutput, causal_conv1d_fn, commit_windows
from triton_impl.modules import ConvStatePool

causal_conv1d_fn(1, 2, 3, 4, 5, activaton="silu")
causal_conv1d_fn(1, 2, 3, 4, 5, max_seqlen=5.0)
pool = ConvStatePool("16", 256, 4)
pool.allocate([3])
out: str = pool.num_free
"""
    done = check(program, tmp_path)
    lines = sorted({int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line})
    assert lines == [5, 6, 7, 8, 9], done.stdout + done.stderr
