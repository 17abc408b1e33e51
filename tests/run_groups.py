"""Runs the test suite in groups, one process a file, one more at a time than there are cores: `make test`.

    python tests/run_groups.py [--gpu] [GROUP ...]

Torch and jax must not share a process, nor Triton's two modes, nor files of JAX that ask for different numbers of
devices. Files in ALONE, the long ones among them, have a process each; the others share one by eights, since what a process
imports takes as long as many a file's tests. Where such a process ends without a result for each of its files, each
runs once more by itself. Groups: core (neither framework), triton, pallas, and pallas-newest, the kernels' files once more under the
newest JAX of .venv312 where that environment exists (see SECOND_JAX in conftest.py). With `--gpu`, the tests marked gpu run instead: one
process a framework, one after the other, in the interpreter that runs this script.

The run fails if a process fails, if a file holds no test, or if nothing in a group was executed and passed.
The last line gives the sums. Logs and JUnit files are left in reports/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWER_JAX = ".venv312/bin/python"
SLOWEST = (  # files that take 40 seconds or more, or wait for the network: they begin early, so that no core waits for one at the end
    "project/test_requirements",
    "pallas/test_conformance", "triton/test_backward", "triton/test_compile_backward", "pallas/test_serving",
    "triton/test_serving", "pallas/test_context_parallel_gradients", "triton/test_context_parallel_gradients",
    "triton/test_conformance", "triton/test_context_parallel", "triton/test_conformance_plain", "pallas/test_engine",
    "pallas/test_operations", "triton/test_operations", "pallas/test_sharding", "pallas/test_models_jla", "pallas/test_models",
    "project/test_benchmarks", "oracle/test_peers", "project/test_site",
)  # fmt: skip
ONE_JAX = (  # files of tests/pallas that are judged under the JAX of .venv alone: about plain jax.numpy, modules and tools, and
    # about operations of which every feature is in a case of the conformance suite under both
    "test_benchmark_calls", "test_bits", "test_compat", "test_context_parallel_gradients", "test_engine", "test_examples", "test_grad_definition", "test_models", "test_swap",
    "test_modules", "test_sharding_serving", "test_sharding", "test_sharding_training", "test_tracing", "test_multi_gpu",
    "test_derivatives_xla", "test_export_xla",
    "test_backward", "test_gated_conv", "test_prologue", "test_prologue_backward", "test_rolling", "test_serving",
)  # fmt: skip
NEWEST_JAX = (
    "test_models_jla",
)  # what asks for a Python of 3.12: judged under that of .venv312 alone, if it is there
DEVICES = {  # files of tests/pallas that ask for so many devices, where a process has one
    "test_prologue_sharding": 2, "test_sharding_serving": 2, "test_sharding_types": 2,
    "test_sharding": 8, "test_sharding_training": 8, "test_context_parallel_gradients": 8,
}  # fmt: skip
ALONE = {  # files that measure their own process, or start others for most of their time
    *SLOWEST, "triton/test_memory", "triton/test_examples", "triton/test_models", "pallas/test_bits", "project/test_requirements",
    "project/test_same_code", "project/test_run_groups",
}  # fmt: skip
TOGETHER = 8  # files a process
LIMIT = 1800  # seconds a process; single tests have their own limit in pyproject.toml
RUNNING: set[subprocess.Popen] = (
    set()
)  # each leads a process group of its own, so that it can be stopped whole


@dataclass(frozen=True)
class Part:
    """One pytest process: the group it counts for, the interpreter, and its files."""

    group: str
    python: str
    files: tuple[Path, ...]
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        others = len(self.files) - 1
        return f"{self.group}-{self.files[0].stem}" + (f" and {others} more" if others else "")

    @property
    def place(self) -> int:
        """Where it stands in the queue: those that hold several files, minutes each, then those in SLOWEST, then the others."""
        if len(self.files) > 1:
            return -1
        name = name_of(self.files[0])
        return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)


@dataclass
class Outcome:
    """What a process left: its exit code and the counts of its JUnit file."""

    code: int
    seconds: float
    log: Path
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    files: frozenset[str] = frozenset()  # the modules, among other names, that left a result


def name_of(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def kind_of(file: Path) -> str:
    """Returns the group of a file: that of its folder; tests/oracle and tests/project are the core."""
    return file.parent.name if file.parent.name in ("triton", "pallas") else "core"


def find_parts(root: Path, python: str, gpu: bool) -> dict[str, list[Part]]:
    """Returns the processes of each group."""
    files: dict[str, list[Path]] = {"pallas": [], "triton": [], "core": []}
    for file in sorted((root / "tests").rglob("test_*.py")):
        files[kind_of(file)].append(file)
    if gpu:
        return {
            kind: [Part(kind, python, tuple(files[kind]), ("--gpu",))] if files[kind] else []
            for kind in ("triton", "pallas")
        }
    groups = {
        kind: shared(kind, python, [file for file in found if file.stem not in NEWEST_JAX])
        for kind, found in files.items()
    }
    newer = root / NEWER_JAX
    if newer.exists():
        kernels = [file for file in files["pallas"] if file.stem not in ONE_JAX]
        again = shared("pallas-newest", str(newer), kernels)
        groups = {"pallas": groups["pallas"], "pallas-newest": again, **groups}
    else:
        print(f"no {NEWER_JAX}: the Pallas tests run under one JAX only", flush=True)
    return groups


def shared(group: str, python: str, files: list[Path]) -> list[Part]:
    """Returns the processes for the files of a group."""
    sets: dict[object, list[Path]] = {}
    for file in files:
        mode = "compile" in file.stem if group == "triton" else DEVICES.get(file.stem, 1)
        sets.setdefault(file if name_of(file) in ALONE else mode, []).append(file)
    parts = []
    for found in sets.values():
        count = -(-len(found) // TOGETHER)  # files next to each other in the alphabet often cost alike
        parts += [Part(group, python, tuple(found[i::count])) for i in range(count)]
    return parts


def run_part(part: Part, root: Path) -> Outcome:
    """Runs a process; where one with several files left some without a result, each of them by itself, which fails the part."""
    outcome = run_process(part, root)
    complete = outcome.files.issuperset(file.stem for file in part.files)
    if len(part.files) == 1 or "--gpu" in part.options or complete:
        return outcome
    again = Outcome(1, outcome.seconds, outcome.log)
    for file in part.files:
        single = run_process(dataclasses.replace(part, files=(file,)), root)
        again.passed += single.passed
        again.failed += single.failed
        again.skipped += single.skipped
        again.seconds += single.seconds
        if single.code != 0:
            again.log.write_text(again.log.read_text() + single.log.read_text())
    again.failed = max(again.failed, 1)
    return again


def run_process(part: Part, root: Path) -> Outcome:
    reports = root / "reports"
    name = part.name.replace(" ", "-")
    junit, log = reports / f"{name}.xml", reports / f"{name}.log"
    junit.unlink(missing_ok=True)
    command = [
        part.python,
        "-m",
        "pytest",
        "--color=no",
        f"--junitxml={junit}",
        *part.options,
        *map(str, part.files),
    ]
    ours = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "SECOND_JAX")
    environment = {"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k not in ours}
    if importlib.util.find_spec("pytest_timeout"):  # importing the other plugins takes a second a process
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout"}
    if part.python.endswith(NEWER_JAX):
        environment["SECOND_JAX"] = "1"
    # Compiling what a process imports takes longer than importing it.
    if environment.pop("PYTHONDONTWRITEBYTECODE", None):
        environment.setdefault("PYTHONPYCACHEPREFIX", str(reports / "bytecode"))
    begin = time.monotonic()
    with log.open("w") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        RUNNING.add(process)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            sink.write(f"\nstopped after {LIMIT} s\n")
            code = 124
        finally:
            RUNNING.discard(process)
    outcome = Outcome(code, time.monotonic() - begin, log)
    if junit.exists():
        for case in ElementTree.parse(junit).iter("testcase"):
            tags = {child.tag for child in case}
            outcome.files |= set(case.get("classname", "").split("."))
            if tags & {"failure", "error"}:
                outcome.failed += 1
            elif "skipped" in tags:
                outcome.skipped += 1
            else:
                outcome.passed += 1
    elif code == 0:
        outcome.code = 1  # it ended before pytest did
    if outcome.code != 0 and outcome.failed == 0:  # it crashed, was stopped, or found no test
        outcome.failed = 1
    return outcome


def run(groups: dict[str, list[Part]], root: Path, jobs: int) -> int:
    """Runs the groups, prints a line a process and the closing line, and returns the exit code."""
    (root / "reports").mkdir(exist_ok=True)
    parts = sorted((part for group in groups.values() for part in group), key=lambda part: part.place)
    outcomes: dict[str, list[Outcome]] = {group: [] for group in groups}
    pool = ThreadPoolExecutor(jobs)
    running = {pool.submit(run_part, part, root): part for part in parts}
    try:
        for done, future in enumerate(as_completed(running), 1):
            part, outcome = running[future], future.result()
            outcomes[part.group].append(outcome)
            print(
                f"[{done:2}/{len(parts)}] {'ok  ' if outcome.code == 0 else 'FAIL'} {part.name:44}"
                f"{outcome.passed:5} passed {outcome.failed:3} failed {outcome.skipped:3} skipped {outcome.seconds:7.1f} s",
                flush=True,
            )
            if outcome.code != 0:
                print(outcome.log.read_text(errors="replace"), flush=True)
    finally:  # interrupted: leave nothing behind
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            os.killpg(process.pid, signal.SIGKILL)

    empty = [group for group, found in outcomes.items() if not any(outcome.passed for outcome in found)]
    for group in empty:
        print(f"FAIL {group}: no test ran and passed", flush=True)
    flat = [outcome for found in outcomes.values() for outcome in found]
    failed = sum(outcome.failed for outcome in flat)
    failed += sum(1 for group in empty if not any(outcome.failed for outcome in outcomes[group]))
    passed, skipped = sum(outcome.passed for outcome in flat), sum(outcome.skipped for outcome in flat)
    print(f"total: {passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or not outcomes else 0


def main(arguments: list[str], root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="default: every group there is")
    parser.add_argument("--gpu", action="store_true", help="the tests marked gpu, one process a framework")
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        help="processes at a time; default: one more than cores, since some wait, on a GPU 1",
    )
    options = parser.parse_args(arguments)
    groups = find_parts(root, sys.executable, options.gpu)
    unknown = sorted(set(options.groups) - set(groups))
    if unknown:
        parser.error(f"GROUP: expected some of {sorted(groups)}, got {unknown}")
    chosen = {name: parts for name, parts in groups.items() if not options.groups or name in options.groups}
    return run(chosen, root, options.jobs or (1 if options.gpu else (os.cpu_count() or 1) + 1))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
