"""`same_code.py` tells equal code from other code, of the twins as they are and of facts made up."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oracle.contract import RECORDS
from tests.tools import code_calls, same_code

ROOT = Path(__file__).resolve().parents[2]


def against(checkout, only):
    command = [sys.executable, "tests/tools/same_code.py", "--against", str(checkout), "--only", only, "-v"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("twin", "package"), same_code.PACKAGES.items())
def test_a_planted_change_of_one_instruction_is_found(tmp_path, twin, package):
    for name in ("oracle", package):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / package).glob("*.py"):
        path.write_text(path.read_text() + "# other text, the same code\n")
    only = f"{twin},update 1 row"
    same = against(tmp_path, only)
    assert same.returncode == 0, same.stdout + same.stderr
    assert f"same    {twin}: update 1 row" in same.stdout
    planted = 0
    for path in (tmp_path / package).glob("*.py"):
        text = path.read_text()
        planted += text.count("ex2.approx.ftz.f32")
        path.write_text(text.replace("ex2.approx.ftz.f32", "ex2.approx.f32"))
    assert planted
    other = against(tmp_path, only)
    assert other.returncode == 1, other.stdout + other.stderr
    assert f"DIFFERS {twin}: update 1 row" in other.stdout
    assert ("FMUL" if twin == "triton" else "ex2.approx.f32") in other.stdout


FACT = dict(
    kernel="k", grid=[4, 1, 1], threads=128, registers=40, spilled=0, shared=0, opcodes={"LDG.128": 4, "IADD3": 20}
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "different"),
    [
        ({}, False),
        (dict(registers=48), False),
        (dict(registers=49), True),
        (dict(registers=24), False),
        (dict(spilled=8), True),
        (dict(grid=[8, 1, 1]), True),
        (dict(threads=256), True),
        (dict(shared=1024), True),
        (dict(opcodes={"LDG.128": 5, "IADD3": 20}), True),
        (dict(opcodes={"LDG.128": 3, "LDG.64": 1, "IADD3": 20}), True),
        (dict(opcodes={"LDG.128": 4, "IADD3": 21}), False),
        (dict(opcodes={"LDG.128": 4, "IADD3": 30}), True),
        (dict(opcodes={"LDG.128": 4, "IADD3": 20, "FFMA": 1}), True),
    ],
    ids=str,
)
def test_what_costs_time_differs(changed, different):
    found, lines = same_code.compare([FACT], [FACT | changed])
    assert found == different
    assert bool(lines) == bool(changed)


def test_another_number_of_launches_differs():
    found, lines = same_code.compare([FACT], [FACT, FACT])
    assert found
    assert any("LDG.128: 4 -> 8" in line for line in lines)


def test_a_call_that_fails_differs_unless_it_failed_there_alike():
    failed = dict(kernel="k", failed="PassManager::run failed")
    assert same_code.compare([FACT], [failed])[0]
    assert same_code.compare([failed], [FACT])[0]
    assert not same_code.compare([failed], [failed])[0]


def test_every_argument_of_every_operation_is_in_a_call():
    for operation in ("causal_conv1d_fn", "causal_conv1d_update", "commit_windows"):
        calls = [call for call in code_calls.CALLS.values() if call.operation == operation]
        given = set().union(*(call.arrays.keys() | call.options.keys() for call in calls))
        assert set(RECORDS[operation]._fields) - given == {"pad_slot_id", "validate", "backend"}


def test_a_wrong_name_or_folder_is_an_error(tmp_path):
    assert against(tmp_path, "").returncode == 2
    assert against(ROOT, "no such call").returncode == 2
