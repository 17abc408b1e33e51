"""Implementations in other processes: the worked example, and programs that break the protocol."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from oracle.conformance import runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "oracle" / "examples" / "other_process.py"
CASES = select(catalogue(), patterns=["update/width-4", "update/width-2", "fn/error-x-rank"])

BROKEN = """
import json, os, sys
sys.path.insert(0, {folder!r})
import other_process as example

mode, mark = {mode!r}, {mark!r}
NUMBERED = ("good", "dies-once", "stray-before", "stray-json", "stray-after", "other-number")
for number, line in enumerate(sys.stdin):
    request = json.loads(line)
    if request["request"] == "hello":
        answer = {{"name": mode, "version": "1", "capabilities": {{}}}}
        if mode == "no-version": del answer["version"]
    elif mode == "dies": os._exit(7)
    elif mode == "garbage": print("Segmentation fault", flush=True); continue
    elif mode == "list": answer = [1]
    elif mode == "own-error": answer = {{"error": "CudaError", "message": "no kernel image"}}
    elif mode == "refuses": answer = {{"error": "ValueError", "message": "x: expected two axes"}}
    elif mode == "bad-array": answer = {{"out": {{"dtype": "bfloat16", "shape": [4, 5], "bits": "3f80"}}}}
    else: answer = example.run(request["op"], request["arrays"], request["options"])
    first = not os.path.exists(mark) and request["request"] == "run"
    if first: open(mark, "w").close()
    numbered = {{"id": request["id"], **answer}} if isinstance(answer, dict) and mode in NUMBERED else answer
    if mode == "dies-once" and first: os._exit(7)
    if mode == "stray-before" and first: print("loading kernels", flush=True)
    if mode == "stray-json" and first: print(json.dumps({{"out": None}}), flush=True)
    if mode == "other-number" and first: numbered["id"] += 1
    print(json.dumps(numbered), flush=True)
    if mode == "stray-after" and first: print("done", flush=True)
"""


EVERYTHING = """
import json, sys
from oracle.conformance import codec
from oracle.conformance.adapter import reference_adapter
from oracle.conformance.arrays import plain
from oracle.numerics import typed

reference = reference_adapter()

def encode(value):
    if isinstance(value, tuple):
        return [encode(part) for part in value]
    return codec.encode(None if value is None else typed(value))

for line in sys.stdin:
    request = json.loads(line)
    if request["request"] == "hello":
        answer = {"name": "all", "version": "1", "capabilities": dict(reference.capabilities())}
    else:
        arrays = {k: None if v is None else plain(codec.decode(v)) for k, v in request["arrays"].items()}
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in request["options"].items()}
        try:
            answer = {k: encode(v) for k, v in reference.run(request["op"], arrays, options).items()}
        except Exception as error:
            answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
"""


def test_serving_goes_through_the_pipe(tmp_path):
    """Windows, parts, parents and commits of the reference, in another process, judged like any other's."""
    (tmp_path / "everything.py").write_text(EVERYTHING)
    cases = [case for case in select(catalogue(), tiers=["core"]) if case.serving]
    result = runner.run(
        f"process:{shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / 'everything.py'))}", cases,
        environment={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.good, result.failures
    assert result.footer["counts"] == {"passed": len(cases)}
    assert {"commit_windows", "tree_parents_from_links"} <= {case.op for case in cases}


def run(tmp_path, mode):
    program = tmp_path / "program.py"
    program.write_text(BROKEN.format(mode=mode, folder=str(EXAMPLE.parent), mark=str(tmp_path / "mark")))
    return runner.run(
        f"process:{shlex.quote(sys.executable)} {shlex.quote(str(program))}", CASES, time_limit=20
    )


def test_the_worked_example_passes():
    cases = select(
        catalogue(), patterns=["fn/*-bf16", "update/*-f16", "fn/tail*", "fn/dtypes-x_f16*", "update/dim-7"]
    )
    cases = [case for case in cases if not case.serving]
    result = runner.run(f"process:{sys.executable} {EXAMPLE}", cases)
    assert result.good, result.failures
    assert result.footer["counts"] == {"passed": len(cases)}
    assert len(cases) > 20


def test_the_worked_example_imports_the_standard_library_only():
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); " \
           "print({n.partition('.')[0] for n in sys.modules} & {'numpy', 'oracle'})"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, str(EXAMPLE)], capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("mode", "detail"),
    [("dies", "exit status 7"), ("garbage", "Segmentation fault"), ("list", "expected a JSON object"),
     ("own-error", "no kernel image"), ("bad-array", "cannot reshape"), ("refuses", "x: expected two axes")],
)  # fmt: skip
def test_a_broken_program_is_a_result(tmp_path, mode, detail):
    result = run(tmp_path, mode)
    by_id = {case["id"]: case for case in result.cases}
    assert by_id["update/width-4"]["status"] == "wrong_error"
    assert detail in by_id["update/width-4"]["detail"]
    assert by_id["fn/error-x-rank"]["status"] == ("passed" if mode == "refuses" else "wrong_error")


def test_a_program_without_a_proper_hello_is_not_loaded(tmp_path):
    with pytest.raises(runner.ImplementationError, match=r"no \['version'\]"):
        run(tmp_path, "no-version")
    with pytest.raises(runner.ImplementationError, match="exit status 3"):
        runner.run(f"process:{sys.executable} -c 'import os; os._exit(3)'", CASES)


def test_a_good_program_passes(tmp_path):
    counts = run(tmp_path, "good").footer["counts"]
    assert counts == {"passed": 2, "wrong_error": 1}  # the example does not check its arguments


@pytest.mark.parametrize(
    ("mode", "detail"),
    [("dies-once", "exit status 7"), ("stray-before", "the line 'loading kernels'"),
     ("stray-json", "expected the answer to request 1"), ("other-number", "expected the answer to request 1")],
)  # fmt: skip
def test_a_broken_answer_spoils_one_case_only(tmp_path, mode, detail):
    """The next case meets a fresh process, and its own answer."""
    result = run(tmp_path, mode)
    assert [case["status"] for case in result.cases] == ["wrong_error", "passed", "wrong_error"]
    assert detail in result.cases[0]["detail"]
    assert "does not" not in result.cases[2]["detail"]


def test_a_line_after_an_answer_is_found_at_the_next_request(tmp_path):
    result = run(tmp_path, "stray-after")
    assert result.cases[0]["status"] == "passed"
    assert "the line 'done'" in result.cases[1]["detail"]
