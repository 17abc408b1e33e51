"""Verdicts that localise: the table of mutants by failing cases is fresh, and finds the mistake that was made."""

import zlib

import numpy as np
import pytest

from oracle.conformance import nearest, report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.mutants import MUTANTS

CASES = {case.id: case for case in nearest.chosen()}
TABLE = nearest.table()
LARGE = 7  # mutants that only cases of many elements fail, which the table leaves out


def test_the_table_holds_every_mutant():
    assert list(TABLE) == list(MUTANTS)
    for name, failing in TABLE.items():
        assert set(failing) <= set(CASES), name
    assert sum(not failing for failing in TABLE.values()) <= LARGE


def test_each_mutant_is_its_own_first_or_second_guess():
    """Run as an implementation, on every case of the table; a mutant that only larger cases fail counts as missed."""
    second = 0
    for name, failing in TABLE.items():
        rows = [guess.name for guess in nearest.guesses(failing, CASES)]
        second += name in rows[:2]
    print(f"{second} of {len(TABLE)} mutants are the first or second guess")
    assert second >= 0.9 * len(TABLE)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_table_is_fresh(name):
    """Of each mutant some cases that fail it and some that pass, the same in every run, small ones first.

    Where it is not: python -m oracle.conformance.nearest
    """
    order = sorted(CASES, key=lambda case: (CASES[case].tier != "core", zlib.crc32((name + case).encode())))
    known = TABLE[name]
    chosen = [case for case in order if case in known][:2] + [case for case in order if case not in known][:2]
    expected = {case: known[case] for case in chosen if case in known}
    assert nearest.failing(name, [CASES[case] for case in chosen]) == expected


@pytest.mark.parametrize(
    "name", ["taps-reversed", "short-row-zero-filled", "ring-never-wraps", "only-the-last-window"]
)
def test_a_run_of_the_core_tier_names_the_mistake(name):
    core = [case for case in CASES.values() if case.tier == "core" and case.relation is None]
    rows = nearest.guesses(nearest.failing(name, core), [case.id for case in core])
    assert name in [guess.name for guess in rows[:2]]


REVERSED = """
import numpy as np
from oracle import reference
from oracle.conformance.adapter import NumpyAdapter
from oracle.contract import Unsupported

def causal_conv1d_fn(x, weight, *rest, **options):
    return reference.causal_conv1d_fn(x, np.ascontiguousarray(weight[:, ::-1]), *rest, **options)

def causal_conv1d_update(*args, **kwargs):
    raise Unsupported("no decode step yet")

adapter = NumpyAdapter(causal_conv1d_fn, causal_conv1d_update, "reversed", "1", {
    "unsupported": {"*:bfloat16": "none in NumPy", "op:causal_conv1d_update": "not written", "backend:*": "one"},
})
"""


def test_reversed_taps_are_named_as_such(tmp_path, monkeypatch):
    """In an implementation of its own that cannot do half of what is asked."""
    (tmp_path / "reversed_taps.py").write_text(REVERSED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cases = [case for case in select(catalogue(), tiers=["core"], patterns=["fn/*"]) if not case.serving]
    result = runner.run("reversed_taps:adapter", cases, probe=False)
    words = nearest.words(result)
    assert words[0] == (
        "NEAREST taps-reversed (tap-order-reversed): True convolution instead of cross-correlation."
    )
    assert len(words) <= 7


def test_what_resembles_nothing_is_said(monkeypatch):
    case = {"id": next(iter(CASES)), "status": "wrong_dtype"}
    result = report.Report({}, [case], {"findings": []})
    monkeypatch.setattr(nearest, "table", lambda: {"a": {next(iter(CASES)): "wrong_value"}})
    assert nearest.words(result) == ["NEAREST no known mistake fails these cases in this way"]


def test_numbers_go_through_text():
    for numbers in ([3], [0, 1, 2], [1, 3, 4, 5, 9], list(np.arange(40) * 2)):
        assert nearest.numbers_of(nearest.text_of([int(n) for n in numbers])) == numbers
