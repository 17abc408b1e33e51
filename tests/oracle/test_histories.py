"""Serving histories drawn by Hypothesis: the model survives them, mutants do not, and shrink to a ready case."""

import json
import re

import pytest
from hypothesis import Phase, given, settings

from oracle.conformance.cases import Case
from oracle.conformance.commands import main
from oracle.conformance.model import Model
from oracle.conformance.mutants import MUTANTS
from oracle.conformance.traffic.histories import check_history, histories

SETTINGS = settings(max_examples=100, deadline=None, database=None, derandomize=True)


@SETTINGS
@given(histories())
def test_the_model_survives(history):
    check_history(Model(), history)


@pytest.mark.parametrize(
    "name", ["short-row-stale-left", "history-dropped", "pad-slot-wraps-to-last", "update-runs-twice"],
)  # fmt: skip
def test_a_mutant_shrinks_to_a_case_that_can_be_repeated(name, tmp_path, capsys):
    # (to explain which parts of a history may vary takes as long as to shrink it)
    @settings(SETTINGS, max_examples=400, report_multiple_bugs=False, phases=set(Phase) - {Phase.explain})
    @given(histories(max_steps=2, max_tokens=4))
    def check(history):
        check_history(MUTANTS[name](), history)

    with pytest.raises(AssertionError) as failure:
        check()
    text = str(failure.value)
    case = Case.from_json(json.loads(re.search(r"^{.*}$", text, re.MULTILINE).group()))
    rows = len(case.axes["slots"])
    assert rows <= 2, text
    assert case.axes["dim"] <= 2
    path = tmp_path / "case.jsonl"
    path.write_text(json.dumps(case.to_json()))
    mutant = f"{MUTANTS[name].__module__}:{MUTANTS[name].__name__}"
    assert main(["run", "--impl", mutant, "--case-file", str(path)]) == 1
    assert main(["run", "--impl", "oracle.conformance.model:Model", "--case-file", str(path)]) == 0
    capsys.readouterr()


def test_a_damaged_case_is_refused(tmp_path, capsys):
    path = tmp_path / "case.jsonl"
    path.write_text('{"id": "fn/x", "colour": 1}')
    assert main(["run", "--impl", "oracle.conformance.model:Model", "--case-file", str(path)]) == 2
    assert "case: expected an object with" in capsys.readouterr().err
