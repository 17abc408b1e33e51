"""The peers' backward passes in benchmarks.features: right ones get a time, wrong and missing ones a reason."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import features
from triton_impl.compat import causal_conv1d as adapter

ROWS, LENGTH, DIM = 2, 24, 1030


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("ROWS", ROWS), ("LENGTH", LENGTH), ("DIM", DIM)):
        monkeypatch.setattr(features, name, value)


def arguments():
    leaves = [
        torch.randn(*shape).bfloat16().requires_grad_() for shape in ((ROWS * LENGTH, DIM), (DIM, 4), (DIM,))
    ]
    return (
        leaves,
        torch.randn(ROWS * LENGTH, DIM).bfloat16(),
        torch.arange(ROWS + 1, dtype=torch.int32) * LENGTH,
    )


def peer(monkeypatch, function):
    module = ModuleType("causal_conv1d")
    module.causal_conv1d_fn = function
    monkeypatch.setitem(sys.modules, "causal_conv1d", module)
    monkeypatch.setitem(sys.modules, "fla", None)


def verdict(leaves, dout, offsets):
    found, absent = features.torch_peers(leaves, dout, offsets)
    gate = features.GradientGate(*(t.detach() for t in leaves), offsets, dout)
    return {name: gate.judge(call()) for name, call in found.items()}, absent


def test_a_right_peer_passes_and_a_missing_one_is_named(monkeypatch):
    peer(monkeypatch, adapter.causal_conv1d_fn)
    verdicts, absent = verdict(*arguments())
    assert verdicts == {"backward of causal_conv1d": None}
    assert absent["backward of fla"].startswith("missing: ")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, bias, activation: adapter.causal_conv1d_fn(x, weight, bias, activation=None),
        lambda x, weight, bias, activation: adapter.causal_conv1d_fn(x, weight, -bias, activation=activation),
        lambda x, weight, bias, activation: adapter.causal_conv1d_fn(x, weight.flip(1), bias, activation=activation),
    ],
    ids=["no activation", "bias negated", "taps reversed"],
)  # fmt: skip
def test_a_wrong_peer_fails(monkeypatch, wrong):
    peer(monkeypatch, wrong)
    verdicts, _ = verdict(*arguments())
    assert verdicts["backward of causal_conv1d"].startswith("wrong: ")


def test_a_peer_that_raises_is_named(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel image")

    peer(monkeypatch, broken)
    _, absent = verdict(*arguments())
    assert absent["backward of causal_conv1d"] == "RuntimeError: no kernel image"
