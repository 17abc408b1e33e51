"""Runs cases on one implementation in a process of its own: a crash or a hang is a result, not the end."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oracle import contract
from oracle.conformance import report as reports
from oracle.conformance.adapter import wrong_capabilities
from oracle.conformance.cases import Case
from oracle.conformance.catalogue import catalogue
from oracle.conformance.report import Report

SUITE_VERSION = "1.4"
START_LIMIT = 300.0  # seconds for loading an implementation: frameworks import slowly


ROOT = Path(__file__).resolve().parents[2]
# This package is found first, whatever lies in the folder that the run was started in, and nothing else of its folder.
_START = "import sys; sys.path.insert(0, {root!r}); from oracle.conformance.worker import main; del sys.path[0]; main()"


class ImplementationError(RuntimeError):
    """The implementation could not be loaded."""


class _Worker:
    """One worker process and its line protocol."""

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(root=str(ROOT)), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.hello = self._answer(START_LIMIT)
        if self.hello is None or "hello" not in self.hello:
            self.stop()
            reason = (self.hello or {}).get("failed", f"no answer; exit status {self.process.poll()}")
            raise ImplementationError(f"impl: could not be loaded: {reason}")

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _answer(self, limit: float) -> dict[str, Any] | None:
        line = self.lines.get(timeout=limit)
        return None if line is None else json.loads(line)

    def ask(self, case: Case, limit: float) -> dict[str, Any]:
        """The worker's record of a case, or one that says how it died."""
        start = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps(case.to_json()) + "\n")
            self.process.stdin.flush()
            answer = self._answer(limit)
        except queue.Empty:
            self.stop()
            return _dead("timed_out", f"no answer within {limit:g} s", time.perf_counter() - start)
        except BrokenPipeError:
            answer = None
        if answer is None:
            code = self.process.wait()
            name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return _dead("crashed", f"the process ended with {name}", time.perf_counter() - start)
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def finish(self) -> None:
        """Lets the worker end by itself."""
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=60)

    def kill(self) -> None:
        """Kills the worker and what it started."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kills the worker, and closes its pipes."""
        self.kill()
        self.process.wait()
        self.reader.join(5)
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def _dead(status: str, detail: str, seconds: float) -> dict[str, Any]:
    return {"status": status, "detail": detail, "found": [status], "seconds": round(seconds, 3), "worst": None, "bit_exact": None,
            "ulps": None}  # fmt: skip


def run(
    impl: str,
    cases: Iterable[Case],
    *,
    device: str | None = None,
    time_limit: float = 300.0,
    environment: dict[str, str] | None = None,
    outputs: str | None = None,
    probe: bool = True,
    jobs: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """Runs cases on an implementation and returns the report.

    Args:
      impl: "package.module:object" or "process:command".
      cases: in the order in which they are reported.
      device: handed to the adapter.
      time_limit: seconds a case may take; then its process is killed and the next case gets a new one.
      environment: extra environment variables of the process.
      outputs: an .npz file to write the output bits of every case to, for comparing implementations.
      probe: run cases that the implementation denies, to see whether the denial is true.
      jobs: processes at a time, each of which loads the implementation; 1 with `outputs`.
      progress: called with (done, all, case id).

    Ctrl-C ends the run early: the report holds the cases that ran, and a finding says so.

    Raises:
      ImplementationError: the implementation cannot be loaded, or states capabilities that do not exist.
      ValueError: no job, or several and `outputs`.
    """
    if jobs < 1:
        raise ValueError(f"jobs: expected at least 1, got {jobs}")
    if outputs and jobs > 1:
        raise ValueError(f"jobs: expected 1 with outputs, got {jobs}")
    cases = list(cases)
    start = time.perf_counter()
    arguments = ["--impl", impl]
    arguments += ["--device", device] if device else []
    arguments += ["--outputs", outputs] if outputs else []
    first = _Worker(arguments, environment or {})
    hello = first.hello["hello"]
    every = frozenset[str]().union(*(case.features for case in (*catalogue(), *cases)))
    if wrong := list(wrong_capabilities(hello["capabilities"], every)):
        first.stop()
        raise ImplementationError(f"capabilities of {hello['name']}: {'; '.join(wrong)}")
    denied = dict(hello["capabilities"].get("unsupported", {}))
    supported = list(hello["capabilities"].get("supports", ()))
    waiting = iter(range(len(cases)))
    records: list[dict[str, Any]] = [{}] * len(cases)
    lock, interrupted, running = threading.Lock(), threading.Event(), {first}

    def launch() -> _Worker:
        worker = _Worker(arguments, environment or {})
        running.add(worker)
        return worker

    def judge(worker: _Worker, case: Case) -> tuple[_Worker, dict[str, Any]]:
        if missing := [f for f in case.serving if not any(fnmatch.fnmatchcase(f, p) for p in supported)]:
            return worker, _dead("unsupported", f"not among what it supports: {', '.join(missing)}", 0.0)
        reasons = [f"{p}: {why}" for p, why in denied.items() if fnmatch.filter(case.features, p)]
        if reasons and not probe:
            return worker, _dead("unsupported", "; ".join(reasons), 0.0)
        if not worker.alive:
            worker.stop()
            try:
                worker = launch()
            except ImplementationError as error:
                return worker, _dead("crashed", f"not loaded again after the case before: {error}", 0.0)
        record = worker.ask(case, time_limit)
        if reasons:
            record |= {"probe": record["status"], "status": "unsupported", "detail": "; ".join(reasons)}
        elif record["status"] == "unsupported":
            detail = f"Unsupported, though capabilities() claims this: {record['detail']}"
            record |= {"status": "wrong_error", "found": ["wrong_error"], "detail": detail}
        return worker, record

    def serve(worker: _Worker | None) -> None:
        worker = worker or launch()
        try:
            while not interrupted.is_set():
                with lock:
                    number = next(waiting, None)
                    if number is None:
                        break
                    if progress:
                        progress(number, len(cases), cases[number].id)
                worker, record = judge(worker, cases[number])
                if interrupted.is_set():  # it was killed with the run
                    break
                case = cases[number]
                records[number] = {
                    "kind": "case", "id": case.id, "op": case.op, "group": case.group, "tier": case.tier,
                    "flags": list(case.flags), "expect": case.expect, **record, "command": _command(impl, device, case),
                }  # fmt: skip
        finally:
            if worker.alive:
                worker.finish()
            worker.stop()

    workers = [first, *[None] * (min(jobs, len(cases)) - 1)]
    with ThreadPoolExecutor(len(workers)) as pool:
        served = [pool.submit(serve, worker) for worker in workers]
        try:
            for future in served:
                future.result()
        except KeyboardInterrupt:
            interrupted.set()
            for worker in list(running):
                worker.kill()
    findings = list(_denials(denied, cases, records))
    if interrupted.is_set():
        ran = [record for record in records if record]
        findings = [f"interrupted: {len(ran)} of {len(cases)} cases ran"]
        records = ran
    elif progress:
        progress(len(cases), len(cases), "")
    header = {
        "kind": "header", "format": reports.FORMAT_VERSION, "contract": contract.CONTRACT_VERSION,
        "suite": SUITE_VERSION, "impl": impl, "name": hello["name"], "version": hello["version"],
        "device": hello["capabilities"].get("device", device or "cpu"), "capabilities": hello["capabilities"],
        "environment": first.hello["environment"], "cases": len(cases),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - (time.perf_counter() - start))),
    }  # fmt: skip
    return reports.close(header, records, time.perf_counter() - start, findings)


def _denials(patterns: dict[str, str], cases: list[Case], records: list[dict[str, Any]]) -> Iterable[str]:
    """Capabilities that are denied although every case that needs them, and nothing else denied, passes."""
    for pattern in patterns:
        alone = [
            record["probe"]
            for case, record in zip(cases, records, strict=True)
            if "probe" in record
            and case.expect == "value"
            and [p for p in patterns if fnmatch.filter(case.features, p)] == [pattern]
        ]
        if alone and all(status == "passed" for status in alone):
            yield f"{pattern}: denied, but all {len(alone)} cases that need it pass"


def _command(impl: str, device: str | None, case: Case) -> str:
    extra = f" --device {device}" if device else ""
    return f"python -m oracle run --impl {shlex.quote(impl)}{extra} --cases {shlex.quote(case.id)}"


class Progress:
    """A progress bar on a terminal's stderr; elsewhere, a line for every tenth of the run."""

    def __init__(self, label: str):
        self.label, self.tenth, self.terminal = label, -1, sys.stderr.isatty()

    def __call__(self, done: int, total: int, case_id: str) -> None:
        if self.terminal:
            filled = 24 * done // max(total, 1)
            end = "\n" if done == total else ""
            sys.stderr.write(
                f"\r{self.label:<12} [{'#' * filled:<24}] {done}/{total} {case_id[:48]:<48}{end}"
            )
        elif (tenth := 10 * done // max(total, 1)) > self.tenth:
            self.tenth = tenth
            sys.stderr.write(f"{self.label}: {done}/{total}\n")
        sys.stderr.flush()
