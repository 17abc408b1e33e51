"""A small part of `make test-versions`: the oldest and the newest Triton interpret, compile and are entered.

Triton's wheel alone is laid over the environment, from whatever index pip is set to, into .versions, where it stays.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = ["tests/triton/test_launch.py", "tests/triton/test_interpreter.py"]
COMPILED = [
    "tests/triton/test_compile.py::test_update_fast_path[sm_90]",
    "tests/triton/test_compile_prologue.py::test_one_launch_within_the_registers_of_warps[update 1 row]",
]
CASES = ("fn/width-4", "update/width-4", "front-update/heads-odd", "backward/two-tokens")


def run(command, **environment):
    """Fails with what a command printed unless it succeeds."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module", params=["oldest", "newest"])
def environment(request):
    """Variables under which that Triton is imported."""
    pins = (ROOT / "requirements" / f"{request.param}.txt").read_text()
    version = re.search(r"^triton==(\S+)$", pins, re.MULTILINE).group(1)
    folder = ROOT / ".versions" / f"triton-{version}"
    if not folder.exists():
        part = folder.with_suffix(f".{os.getpid()}")
        run([
            sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--only-binary", ":all:",
            "--disable-pip-version-check", "--target", str(part), f"triton=={version}",
        ])  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    found = dict(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    assert run([sys.executable, "-c", "import triton; print(triton.__version__)"], **found).strip() == version
    return found


@pytest.mark.parametrize("tests", [INTERPRETED, COMPILED], ids=["interpreted", "compiled"])
def test_a_pair_runs(environment, tests):
    run([sys.executable, "-m", "pytest", "-q", *tests], **environment)


def test_a_pair_keeps_the_contract_in_the_interpreter(environment):
    cases = [word for case in CASES for word in ("--cases", case)]
    implementation = ["--impl", "triton_impl.adapter:adapter", "--device", "cpu"]
    printed = run(
        [sys.executable, "-m", "oracle", "run", *implementation, *cases], TRITON_INTERPRET="1", **environment
    )
    assert f"{len(CASES)} passed" in printed
