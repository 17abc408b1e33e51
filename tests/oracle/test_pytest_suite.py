"""The five lines in a project's own tests, with its ledger of known failures; and the ledger by itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oracle.conformance import ledger, report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.commands import main

ROOT = Path(__file__).resolve().parents[2]

PROJECT = """
from oracle.conformance.pytest_suite import conformance_tests

test_conformance = conformance_tests("mine:adapter", cases=["update/width-*-silu", "update/width-1"],
                                     known_failures={ledger!r}, report="out/report.jsonl")
"""
ADAPTER = '''
from oracle.conformance.model import Model

class Narrow(Model):
    """Wrong for widths above 6."""
    def taps(self, call):
        return range(call.history + 1 - (call.history > 5))

adapter = Narrow()
'''
LEDGER = """
[[failure]]
cases = "update/width-[78]-silu"
reason = "the newest tap is lost; issue 7"
"""


def project(tmp_path, text, *options):
    (tmp_path / "mine.py").write_text(ADAPTER)
    (tmp_path / "known_failures.toml").write_text(text)
    (tmp_path / "test_mine.py").write_text(PROJECT.format(ledger=str(tmp_path / "known_failures.toml")))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    counts = {
        word: int(n)
        for n, word in re.findall(r"(\d+) (passed|failed|xfailed|error)", done.stdout.splitlines()[-1])
    }
    return counts, done.stdout + done.stderr


def test_one_test_a_case_with_known_failures(tmp_path):
    counts, text = project(tmp_path, LEDGER)
    assert counts == {"passed": 8, "xfailed": 2}, text
    assert report.read(tmp_path / "out" / "report.jsonl").footer["counts"] == {"passed": 7, "xfailed": 2}


def test_unknown_failures_fail_with_the_command(tmp_path):
    counts, text = project(tmp_path, "")
    assert counts == {"passed": 8, "failed": 2}, text
    assert "repeat: python -m oracle run --impl mine:adapter --cases update/width-7-silu" in text


def test_the_ledger_is_found_from_any_folder(tmp_path):
    """Beside the test file or above it, wherever pytest was started."""
    folder = tmp_path / "tests" / "conformance"
    folder.mkdir(parents=True)
    (tmp_path / "mine.py").write_text(ADAPTER)
    (tmp_path / "tests" / "known.toml").write_text(LEDGER)
    (folder / "test_mine.py").write_text(PROJECT.format(ledger="known.toml"))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    for start in (Path("/"), tmp_path, folder):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", str(folder)], cwd=start,
            capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
    with pytest.raises(ValueError, match=r"nowhere.toml: expected a file in the working folder"):
        ledger.find("nowhere.toml", folder)
    assert ledger.find("known.toml", folder) == tmp_path / "tests" / "known.toml"


def test_stale_entries_fail(tmp_path):
    entry = '[[failure]]\ncases = "update/width-1"\nreason = "was wrong once"\n'
    counts, text = project(tmp_path, LEDGER + entry)
    assert counts == {"passed": 7, "xfailed": 2, "failed": 1}, text
    assert "was wrong once, but it passes" in text
    entry = '[[failure]]\ncases = "update/width-99"\nreason = "a typo"\n'
    counts, text = project(tmp_path, LEDGER + entry)
    assert counts == {"passed": 7, "xfailed": 2, "failed": 1}, text
    assert "'update/width-99' names no case of this run" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [('[[failure]]\ncases = "x"', "failure 1: expected the fields cases and reason"),
     ('[[failure]]\ncases = "x"\nreason = " "', "failure 1: reason: expected text"),
     ("[[failures]]\n", "entries only"), ("[[failure", "expected a TOML file"),
     ('[[failure]]\ncases = "x"\nreason = "r"\nsometimes = 1', "failure 1: sometimes: expected true or false, got 1"),
     ('[[failure]]\ncases = 3\nreason = "r"', "failure 1: cases: expected text")],
)  # fmt: skip
def test_a_damaged_ledger_is_named(tmp_path, text, message):
    path = tmp_path / "known_failures.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        ledger.read(path)


def test_the_ledger_on_the_command_line(tmp_path, capsys):
    cases = ["--cases", "fn/seed", "--impl", "oracle.conformance.mutants.arithmetic:NeverSilu"]
    path = tmp_path / "known.toml"
    path.write_text('[[failure]]\ncases = "fn/se*"\nreason = "no SiLU yet"\n')
    assert main(["run", *cases]) == 1
    assert main(["run", *cases, "--known-failures", str(path)]) == 0
    assert "1 xfailed" in capsys.readouterr().out


def test_crashes_can_be_known_too():
    result = runner.run(
        "oracle.conformance.mutants.arithmetic:BiasRequired", select(catalogue(), patterns=["fn/no-bias"])
    )
    marked = ledger.apply(result, [ledger.Entry("fn/no-*", "soon")])
    assert marked.good
    assert "wrong_error" in marked.cases[0]["detail"]


@pytest.mark.parametrize(
    "adapter", ["oracle.conformance.mutants.arithmetic:BiasRequired", "oracle.conformance.model:Model"]
)
def test_what_depends_on_the_machine(adapter):
    result = runner.run(adapter, select(catalogue(), patterns=["fn/no-bias"]))
    marked = ledger.apply(result, [ledger.Entry("fn/no-bias", "where bias is a pointer", sometimes=True)])
    assert marked.good
    assert marked.cases[0]["status"] == ("xfailed" if "mutants" in adapter else "passed")
    assert not marked.footer["findings"]
