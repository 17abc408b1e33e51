"""The demo's verdict: what agrees, what disagrees, what cannot run; on NumPy stand-ins, since the real run is `make demo`."""

import numpy as np
import pytest

from oracle.conformance import catalogue, demo
from oracle.conformance.report import table

MODEL = "oracle.conformance.model:Model"
BATCHES = {"serving": ("fn/serving-mixed-bf16", "update/serving-decode"), "linear": ("fn/linear-f16",)}


@pytest.fixture
def show(monkeypatch, capsys):
    def run(first, second):
        monkeypatch.setattr(demo, "BATCHES", BATCHES)
        monkeypatch.setattr(demo, "LANES", ((first, MODEL), (second, MODEL)))
        status = demo.demo("cpu")
        run.err = (said := capsys.readouterr()).err
        return status, said.out

    return run


def test_agreement(show):
    status, text = show(MODEL, MODEL)
    assert status == 0, text
    assert "All agree" in text
    assert "16-bit outputs equal in every bit (100.0000 %)" in text
    assert text.count("serving") >= 4


@pytest.mark.parametrize(
    ("wrong", "status"),
    [("arithmetic:NeverSilu", "WRONG_VALUE"), ("slots:PadSlotWritesOnly", "WRONG_MEMORY"), ("states:StateNotWritten", "WRONG_STATE")],
)  # fmt: skip
def test_disagreement(show, wrong, status):
    code, text = show(MODEL, f"oracle.conformance.mutants.{wrong}")
    assert code == 1
    assert "THEY DISAGREE" in text
    assert status in text
    assert "python -m oracle run --impl oracle.conformance.mutants." in text


def test_a_twin_that_is_not_installed(show):
    code, text = show(MODEL, "no_such_package.adapter:adapter")
    assert code == 2
    assert "NOT RUN no_such_package.adapter:adapter: impl: could not be loaded: ModuleNotFoundError" in text
    assert "DISAGREE" not in text
    assert text.splitlines()[-1].startswith("NOT RUN: 1 of 4 implementations, the others agree, ")


def test_a_missing_framework_is_named_with_the_extra_that_brings_it(show, monkeypatch):
    other = "oracle.conformance.mutants.arithmetic:NeverSilu"  # would disagree if it ran
    monkeypatch.setattr(demo, "NEEDS", {other: (("numpy", "no_such_framework"), "pallas")})
    code, text = show(MODEL, other)
    assert code == 2
    assert (
        f"NOT RUN {other}: needs no_such_framework, not installed; the extra pallas brings it: pip install '.[pallas]'"
        in text
    )
    assert text.splitlines()[-1].startswith("NOT RUN: 1 of 4 implementations, the others agree, ")


def test_what_each_implementation_needs_is_known():
    """Triton's kernels need triton besides torch, which comes without it on a CPU."""
    assert set(demo.NEEDS) == {impl for lane in demo.LANES for impl in lane}
    assert demo.NEEDS["triton_impl.adapter:adapter"] == (("torch", "triton"), "triton")


def test_a_failure_beside_a_missing_twin_is_a_disagreement(show):
    code, text = show("oracle.conformance.mutants.arithmetic:NeverSilu", "no_such_package.adapter:adapter")
    assert code == 1
    assert text.splitlines()[-1].startswith("THEY DISAGREE")


def test_nothing_that_runs_is_no_agreement(monkeypatch, capsys):
    monkeypatch.setattr(demo, "BATCHES", BATCHES)
    monkeypatch.setattr(demo, "LANES", (("no_such_package:a",), ("no_such_package:b",)))
    assert demo.demo("cpu") == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT RUN: 2 of 2 implementations, ")


def test_progress_is_told_now_and_then_where_stderr_is_no_terminal(show, monkeypatch):
    show(MODEL, MODEL)
    assert " done, " not in show.err  # it takes less than LINE_SECONDS
    monkeypatch.setattr(demo, "LINE_SECONDS", 0)
    show(MODEL, MODEL)
    lines = [line for line in show.err.splitlines() if " done, " in line]
    assert lines[-1].startswith("12 of 12 done, ")


def test_batches_are_in_the_catalogue_and_small_enough_for_interpreters():
    cases = [catalogue.find(case_id) for ids in demo.BATCHES.values() for case_id in ids]
    assert len(cases) == len({case.id for case in cases}) >= 20
    assert all(case.tier == "core" for case in cases)
    assert any(case.axes.get("lengths") == (1, 9, 2, 17, 4) for case in cases)
    assert table([])[0].startswith("implementation")


def test_twins_are_compared_element_by_element(tmp_path):
    case = catalogue.find("fn/linear-f16")
    for name, bits in (("a", [1, 2, 3, 4]), ("b", [1, 2, 3, 5])):
        np.savez(tmp_path / f"{name}.npz", **{case.id.replace("/", "|"): np.array(bits, np.uint16)})
    assert demo.compare(tmp_path / "a.npz", tmp_path / "b.npz", [case]) == (3, 4)
    assert demo.compare(tmp_path / "a.npz", tmp_path / "missing.npz", [case]) == (0, 0)
