"""Public implementations through the suite, where they are installed; their adapters on peers that are known to be right.

Peers that are not in the test environment are found on PYTHONPATH; benchmarks/peers/README.md says how to have them.
"""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as command
from benchmarks.peers import source, table
from benchmarks.peers.cases import SIXTEEN_BITS, apart
from oracle.conformance import report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.flags import FLAGS

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "docs" / "peers"
SOME = (
    "fn/width-4-float32", "fn/linear-f16", "fn/tail@f32", "fn/null-block@f32", "fn/empty-fresh@f32", "fn/layout-x-slice-16@f32",
    "fn/silu-ladder-float32", "update/width-4-float32", "update/packed-f32", "update/rolling-f32", "update/padding-rows@f32",
)  # fmt: skip
NEEDS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("peer", sorted(command.PACKAGES))
def test_an_installed_peer_fails_what_it_is_known_to_fail(peer):
    if importlib.util.find_spec(command.PACKAGES[peer]) is None or peer.startswith("causal_conv1d"):
        pytest.skip(f"{command.PACKAGES[peer]} is not installed, or needs a GPU")
    judged = command.judge(peer, "cpu", list(SOME), (), 1)
    assert judged.header["cases"] == len(SOME)
    assert judged.footer["counts"]["passed"] >= 2
    assert judged.footer["findings"] == []
    known = table.causes()
    assert not [case for case in judged.failures if table.keys(judged, case, known) == ["?"]]
    for case in judged.cases:
        assert f"peers {peer} --cases {case['id']}" in case["command"]


# Peers that are right: what fails then is the adapter.

EAGER = """
from benchmarks.peers.pooled import PooledAdapter
import triton_impl

class Eager(PooledAdapter):
    name, version, in_triton = "eager", "0", False

    def call(self, op, tensors, arrays, options):
        {damage}
        return getattr(triton_impl, op)(**tensors, **options, backend="eager").out

def adapter(device):
    return Eager(device)
"""

CAUSAL_CONV1D = """
import torch
from torch.nn.functional import conv1d, silu

def answer(e, weight, bias, activation, dtype):
    b = None if bias is None else bias.float()
    out = conv1d(e.float(), weight.float()[:, None], b, groups=e.shape[1])
    return (silu(out) if activation in ("silu", "swish") else out).to(dtype)

def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    (_, dim, seqlen), keep = x.shape, weight.shape[1] - 1
    last = x.stride(1) == 1 and x.stride(2) > 1
    if last and x.stride(2) % 8:
        raise RuntimeError("channel last layout requires strides to be multiples of 8")
    if initial_states is not None and not last:
        raise RuntimeError("initial_states is only supported for channel last layout")
    state = x.new_zeros(1, dim, keep) if initial_states is None else initial_states
    assert state.shape == (1, dim, keep) and state.dtype == x.dtype and (bias is None or bias.dtype == weight.dtype)
    e = torch.cat([state, x], dim=2)
    return answer(e, weight, bias, activation, x.dtype), e[:, :, seqlen:]

def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None):
    assert conv_state.dtype == x.dtype and conv_state.shape[1] == x.shape[1]
    whole = x[:, :, None] if x.dim() == 2 else x
    slots = torch.arange(len(x)) if conv_state_indices is None else conv_state_indices
    assert conv_state_indices is None or slots.dtype == torch.int32
    out = torch.zeros_like(whole)
    for row, slot in enumerate(slots.tolist()):
        if {skips}:
            continue
        e = torch.cat([conv_state[slot : slot + 1], whole[row : row + 1]], dim=2)
        out[row] = answer(e[:, :, -(whole.shape[2] + weight.shape[1] - 1):], weight, bias, activation, x.dtype)[0]
        conv_state[slot] = e[0, :, -conv_state.shape[2]:]
    return out[:, :, 0] if x.dim() == 2 else out
"""


def judge(tmp_path, monkeypatch, module, text, impl, patterns, tiers=("core",)):
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
    return runner.run(impl, select(apart(catalogue()), patterns=patterns, tiers=tiers), device="cpu")


@NEEDS_TORCH
def test_a_peer_with_slots_that_is_right_passes(tmp_path, monkeypatch):
    text = EAGER.format(damage="")
    judged = judge(tmp_path, monkeypatch, "eager_peer", text, "eager_peer:adapter", ["*f32", "*float32"])
    assert judged.good, report.summary(judged)
    assert judged.footer["counts"]["passed"] > 60


@NEEDS_TORCH
@pytest.mark.parametrize(
    ("damage", "status"),
    [
        ("tensors['conv_states'].roll(1, 0)[0] += 1; tensors['conv_states'][-1] += 1", "wrong_memory"),
        ("tensors['x'].zero_()", "wrong_memory"),
        ("options = {**options, 'activation': None}", "wrong_value"),
        ("tensors = {**tensors, 'conv_states': tensors['conv_states'].clone()}", "wrong_state"),
        ("import os; os.abort()", "crashed"),
    ],
)
def test_a_peer_with_slots_that_is_wrong_fails(tmp_path, monkeypatch, damage, status):
    text = EAGER.format(damage=damage)
    judged = judge(tmp_path, monkeypatch, "eager_peer", text, "eager_peer:adapter", ["fn/seed@f32"])
    assert status in judged.cases[0]["found"]


@NEEDS_TORCH
@pytest.mark.parametrize("factory", ["prefill", "update"])
def test_causal_conv1d_is_called_as_it_asks(tmp_path, monkeypatch, factory):
    text = CAUSAL_CONV1D.replace("{skips}", "slot < 0")
    impl = f"benchmarks.peers.causal_conv1d:{factory}"
    judged = judge(tmp_path, monkeypatch, "causal_conv1d", text, impl, ["*f32", "*float32"])
    assert judged.footer["counts"]["passed"] >= 15
    assert judged.footer["findings"] == []
    for (
        case
    ) in judged.failures:  # prefills of any other number of channels than a multiple of 8, which it refuses
        assert case["id"] == "fn/silu-ladder-float32" or "initial_states is only supported" in case["detail"]
    if factory == "update":
        assert judged.good, report.summary(judged)


@NEEDS_TORCH
def test_a_causal_conv1d_that_uses_padding_slots_fails(tmp_path, monkeypatch):
    text = CAUSAL_CONV1D.replace("{skips}", "False")
    impl = "benchmarks.peers.causal_conv1d:update"
    judged = judge(tmp_path, monkeypatch, "causal_conv1d", text, impl, ["update/padding-rows@f32"], tiers=())
    assert judged.cases[0]["status"].startswith("wrong_")


# Cases taken apart.


def test_cases_are_taken_apart_by_failure_mode():
    whole = [case for case in catalogue() if not case.serving]
    parts = list(apart(catalogue()))
    assert len({case.id for case in parts}) == len(parts)
    assert {flag for case in parts for flag in case.flags} == {flag for case in whole for flag in case.flags}
    floats = ("x", "weight", "bias", "conv_states")
    for case in parts:
        used = {case.dtypes[name] for name in floats if case.dtypes.get(name)}
        if case.expect != "value" or len(used) > 1:
            continue
        if case.id.endswith("@f32"):
            assert used == {"float32"}
            assert not SIXTEEN_BITS & set(case.flags)
        elif used != {"float32"}:
            assert set(case.flags) <= SIXTEEN_BITS
    assert set(FLAGS) >= SIXTEEN_BITS


# Files loaded alone.


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, of which one file can be loaded."""
    folder = tmp_path / "heavy_engine"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "deep" / "kernel.py").write_text(
        "from heavy_engine.platform import width\n\nWIDTH = width + 1\n"
    )
    (folder / "utils.py").write_text(
        "import no_such_module\n\nONE = 1\n\n\ndef two():\n    return ONE + given\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "heavy_engine"


def test_a_file_is_loaded_without_its_package(package):
    loaded = source.load(f"{package}.deep.kernel", {f"{package}.platform": {"width": 3}})
    assert loaded.WIDTH == 4
    found = source.definitions(f"{package}.utils", ("ONE", "two"), {"given": 1})
    assert found["two"]() == 2


def test_what_is_not_there_is_named(package):
    with pytest.raises(ImportError, match=r"no_such_engine: not installed"):
        source.load("no_such_engine.kernel")
    with pytest.raises(ImportError, match=r"heavy_engine: installed, but without deep.missing"):
        source.load(f"{package}.deep.missing")
    with pytest.raises(ImportError, match=r"expected definitions of \['three'\]"):
        source.definitions(f"{package}.utils", ("ONE", "three"), {})
    assert source.version_of("heavy-engine") == "unknown"


def test_commands_say_what_they_expected(capsys):
    assert command.main(["no_such_peer"]) == 2
    assert "peer: expected one of aiter, causal_conv1d_fn" in capsys.readouterr().err


def test_a_failure_without_a_cause_is_marked():
    case = {
        "id": "fn/seed@f32",
        "status": "wrong_state",
        "flags": ["sequence-leak"],
        "detail": "conv_states: wrong",
    }
    header = {
        "name": "vllm-triton",
        "version": "0",
        "device": "cuda",
        "suite": "1.1",
        "started": "2026-01-02T03:04:05Z",
        "cases": 3,
    }
    judged = report.Report(header, [case, {**case, "status": "passed"}], {})
    page = table.write([judged], table.causes())
    assert "| vllm-triton 0 | cuda | 1.1 | 2026-01-02 | 3 | 1 | 1 | 1 |" in page
    assert "| sequence-leak | 1/2 ? |" in page
    cause = table.Cause("V", ("vllm-triton",), "fault", "what", cases=("fn/seed*",), detail="conv_states")
    assert "| sequence-leak | 1/2 **V** |" in table.write([judged], [cause])
    for other in (
        {"peers": ("fla",)},
        {"cases": ("fn/tail*",)},
        {"flags": ("tile-halo-wrong",)},
        {"detail": "out:"},
    ):
        assert not dataclasses.replace(cause, **other).explains("vllm-triton", case)


# What is committed.


def test_every_failure_of_the_committed_reports_has_a_cause():
    known, used = table.causes(), set()
    judged = [report.read(path) for path in sorted(REPORTS.glob("*.jsonl"))]
    assert {r.header["name"] for r in judged} >= {
        "sglang-triton",
        "vllm-triton",
        "fla",
        "sglang-jax",
        "tpu-inference-jax",
    }
    for r in judged:
        assert r.footer["findings"] == []
        for case in r.failures:
            causes = [cause for cause in known if cause.explains(r.header["name"], case)]
            assert causes, f"{r.header['name']}: {case['id']}: {case['detail']}"
            used.update(causes)
    assert set(known) == used, "a cause that explains nothing"


def test_the_committed_table_is_of_the_committed_reports():
    judged = [report.read(path) for path in sorted(REPORTS.glob("*.jsonl"))]
    assert (REPORTS / "README.md").read_text() == table.write(judged, table.causes())
    assert "?" not in (REPORTS / "README.md").read_text().partition("## Failure modes")[2]
