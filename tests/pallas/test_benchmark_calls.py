"""What benchmarks time in JAX, called once on a CPU: the calls exist, right contenders get a time and wrong ones a reason."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import features, jla
from benchmarks.jax_backend import JaxBackend


def normed(x, weight, bias, *, head_dim, activation):
    out = (
        plain(x, weight, bias, activation=activation).astype(jnp.float32).reshape(*x.shape[:2], -1, head_dim)
    )
    return (out * jax.lax.rsqrt((out**2).sum(-1, keepdims=True) + 1e-6)).reshape(x.shape).astype(x.dtype)


def plain(x, weight, bias, *, activation, segment_ids=None):
    from pallas_impl import short_conv

    return short_conv(x, weight, bias, segment_ids=segment_ids, activation="silu", backend="xla").out


def stand_in(monkeypatch, **functions):
    """A package jla of these functions in the place of its kernels."""
    for name in ("jla", "jla.ops", "jla.ops.mosaic_gpu"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, function in functions.items():
        module = types.ModuleType(f"jla.ops.mosaic_gpu.{name}")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(
    "row", [jla.Row("norm", 1, 8, 512), jla.Row("documents", 2, 8, 128, 3)], ids=lambda row: row.form
)
def test_right_kernels_of_jla_are_timed(row, monkeypatch):
    stand_in(monkeypatch, short_conv=plain, short_conv_l2norm=normed)
    calls, absent = jla.prepare(row, JaxBackend(), "xla")
    assert absent == {}
    assert {
        "ours, forward",
        "ours, training",
        "jla, forward",
        "jla, training",
        "xla, training",
    } <= calls.keys()
    for call in calls.values():
        call()


def test_wrong_and_missing_kernels_of_jla_are_not(monkeypatch):
    row = jla.Row("dense", 1, 8, 128)
    stand_in(
        monkeypatch,
        short_conv=lambda x, *args, **kwargs: 1.1 * plain(x, *args, **kwargs),
        short_conv_l2norm=normed,
    )
    calls, absent = jla.prepare(row, JaxBackend(), "xla")
    assert absent["jla"].startswith("wrong: out is ")
    assert not any(name.startswith("jla") for name in calls)
    monkeypatch.setitem(sys.modules, "jla.ops.mosaic_gpu.short_conv", None)
    assert jla.prepare(row, JaxBackend(), "xla")[1]["jla"].startswith("Missing: ")


def test_features_in_jax(monkeypatch):
    for name, value in dict(
        ROWS=4, LENGTH=32, DIM=8, BLOCK=4, TOKENS=128, SNAPSHOTS=8, SIZES=(2, 2, 4), DRAFTS=(2, 2)
    ).items():
        monkeypatch.setattr(features, name, value)
    _, calls, graphs, failures, _ = features.jax_calls()
    assert failures == []
    for call in (calls | graphs).values():
        call()
