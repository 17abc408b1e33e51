"""The serving example checks itself, and its check sees what it is there for."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import triton_impl.compat
from triton_impl.modules import CausalConv1d

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products warn in deterministic mode
torch.set_num_threads(1)  # the tensors are tiny
ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "examples" / "torch_serving.py"


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


def migration_blocks():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/migration.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("block", range(len(migration_blocks())))
def test_the_migration_guide_runs(block, capsys):
    """Every block runs, the lines that switch a program over included, and prints what it says."""
    code = migration_blocks()[block]
    try:
        exec(compile(code, f"block {block}", "exec"), {})
    finally:
        triton_impl.compat.uninstall("causal_conv1d")
    assert capsys.readouterr().out.splitlines() == re.findall(r"# prints (.*)", code)


def test_the_migration_guide_has_a_block_for_every_peer():
    text = "".join(migration_blocks())
    for peer in triton_impl.compat.PEERS:
        assert f"from triton_impl.compat.{peer} import" in text


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


@pytest.mark.parametrize("option", ["--requests", "--slots", "--budget"])
@pytest.mark.parametrize("value", ["0", "-3", "few"])
def test_a_bad_count_is_said_at_once(example, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        example.main([option, value])
    assert ended.value.code == 2
    assert (
        f"argument {option}: expected a whole number of at least 1, got '{value}'" in capsys.readouterr().err
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:77"])
def test_a_device_that_is_not_here_is_said_at_once(example, capsys, device):
    with pytest.raises(SystemExit) as ended:
        example.main(["--device", device])
    assert ended.value.code == 2
    assert "--device: expected one that torch has here" in capsys.readouterr().err
