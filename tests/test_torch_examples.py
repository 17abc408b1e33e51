"""The serving example checks itself, and its check sees what it is there for."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from triton_impl.module import CausalConv1d

torch.set_num_threads(1)  # the tensors are tiny
PATH = Path(__file__).resolve().parent.parent / "examples" / "torch_serving.py"


@pytest.fixture
def example(monkeypatch):
    spec = importlib.util.spec_from_file_location("torch_serving", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_serving(example, device, dtype, capsys):
    arguments = ["--device", device, "--dtype", dtype, "--requests", "24", "--slots", "5", "--budget", "29"]
    assert example.main(arguments) == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said
    assert "up to 5 rows a step, 19 slots reused" in said
    assert "every logit is the same bits" in said


SMALL = ["--device", "cpu", "--requests", "12", "--slots", "3"]


def forget(real):
    """A chunk starts from zeros instead of its slot."""
    return lambda self, x, starts, pool, slots, has, **options: real(
        self, x, starts, pool, slots, torch.zeros_like(has), **options
    )


def remember(real):
    """A new request starts from what its slot held."""
    return lambda self, x, starts, pool, slots, has, **options: real(
        self, x, starts, pool, slots, torch.ones_like(has), **options
    )


def misplace(real):
    """Rows use each other's slots."""
    return lambda self, x, starts, pool, slots, has, **options: real(
        self, x, starts, pool, torch.where(slots >= 0, (slots + 1) % 3, slots), has, **options
    )


@pytest.mark.parametrize("mutant", [forget, remember, misplace])
def test_a_mistake_is_seen(example, mutant, monkeypatch, capsys):
    monkeypatch.setattr(CausalConv1d, "prefill", mutant(CausalConv1d.prefill))
    assert example.main(SMALL) > 0
    assert "DIFFER" in capsys.readouterr().out
