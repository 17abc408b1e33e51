"""Public implementations through the suite, where they are installed: judged without mishap, and right where they should be."""

import importlib.util
from pathlib import Path

import pytest

from oracle.conformance import report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.peers import dense

PEERS = {
    "onnx_reference": ("onnx", {}, ("fn/*float32", "fn/path-split-f32", "update/*-f16", "fn/padding-rows", "fn/tail")),
    "transformers_fallback": ("transformers", {}, ("*/width-?", "*/width-?-float32", "fn/silu-bf16", "fn/null-block")),
    "fla": ("fla", {"TRITON_INTERPRET": "1"}, ("fn/width-4-float32", "update/*-f16", "fn/tail", "fn/linear-bf16")),
}  # fmt: skip
FLOAT32_LADDER = "fn/silu-ladder-float32"


@pytest.fixture(scope="module", params=PEERS)
def judged(request):
    package, environment, patterns = PEERS[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    impl = f"oracle.conformance.peers.{request.param}:adapter"
    return runner.run(impl, select(catalogue(), patterns=patterns), environment=environment)


@pytest.mark.timeout(600)
def test_nothing_goes_wrong_but_numbers(judged):
    assert set(judged.footer["counts"]) <= {"passed", "unsupported", "wrong_value", "wrong_state"}, (
        judged.failures
    )
    assert judged.footer["findings"] == []
    assert judged.footer["counts"]["passed"] >= 2


@pytest.mark.timeout(600)
def test_float32_is_right(judged):
    """But for the far end of SiLU, where exp overflows."""
    wrong = {c["id"] for c in judged.failures if c["id"].endswith("float32")}
    assert wrong <= {FLOAT32_LADDER}


@pytest.mark.timeout(600)
def test_what_the_adapter_would_do_is_not_judged(judged):
    for case in judged.cases:
        if case["id"] in ("fn/padding-rows", "fn/tail", "fn/null-block"):
            assert case["status"] == "unsupported"
            assert any(reason in case["detail"] for reason in dense.DENIED.values())


def test_the_committed_reports_can_be_read():
    folder = Path(__file__).resolve().parent.parent / "docs" / "peers"
    names = {report.read(path).header["name"] for path in folder.glob("*.jsonl")}
    assert names == {"onnx-reference", "transformers-fallback", "fla"}
