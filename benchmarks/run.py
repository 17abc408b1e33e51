"""Runs benchmarks: one process a framework, the gate before every timing, one results file, one table.

    python -m benchmarks.run                                     # main, decode and verify, both frameworks
    python -m benchmarks.run --workloads 'main/skew*' decode --providers 'triton*' torch_copy
    python -m benchmarks.run --quick --workloads main/seed-d8192

On a machine without a GPU this is a dry run: wall-clock times, marked so, written only where --out says.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import environment, report
from benchmarks.gate import Gate, make_inputs
from benchmarks.providers import (
    COPY,
    FRAMEWORKS,
    LIMIT,
    PROVIDERS,
    TWIN,
    Missing,
    Prepared,
    Unsupported,
    open_backend,
)
from benchmarks.record import Counter, Result, Run, read, write
from benchmarks.timing import CuptiTimer, CuptiUnavailable, host_time, take_turns
from benchmarks.workloads import UPDATE, WORKLOADS, Workload, select
from oracle.contract import CONTRACT_VERSION

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_WORKLOADS = ("main", "decode", "verify")
SEED = "main/seed-d8192"  # small enough to show what a call costs the host
WAITS, WAIT_CALLS = "driver synchronisations", 20
DECODE_BYTES = 4 << 20  # below this a graph holds more calls, so that its own launch does not show


def choose_providers(patterns: list[str], framework: str) -> list[str]:
    """Provider names of a framework that match; the framework's limit and its copy of x are always among them.

    Raises:
      ValueError: a pattern matches no provider of any framework.
    """
    chosen = {LIMIT[framework], COPY[framework]}
    for pattern in patterns:
        found = fnmatch.filter(PROVIDERS, pattern)
        if not found:
            raise ValueError(f"providers: expected a glob over {sorted(PROVIDERS)}, got {pattern!r}")
        chosen.update(found)
    return [name for name, p in PROVIDERS.items() if name in chosen and p.framework == framework]


class Session:
    """All contenders of one framework: prepares, judges, times. One per process."""

    def __init__(
        self,
        backend,
        providers: list[str],
        *,
        samples: int = 30,
        host: bool = True,
        count: bool = True,
        log=print,
    ):
        self.backend = backend
        self.providers = providers
        self.samples = samples
        self.host = host
        self.count = count
        self.log = log
        self.results: list[Result] = []
        self.counters: list[Counter] = []
        self._kept: dict[str, tuple[dict[str, Result], dict[str, Prepared]]] = {}
        self._absent: dict[str, str] = {}

    def prepare(self, workload: Workload) -> tuple[dict[str, Result], dict[str, Prepared]]:
        """A result for every contender, and the prepared calls of those that passed the gate."""
        results, ready = {}, {}
        inputs = make_inputs(workload)
        gate = Gate(inputs)
        try:
            args, refused = self.backend.load(inputs), None
        except Unsupported as error:
            args, refused = None, str(error)
        for name in self.providers:
            provider = PROVIDERS[name]

            def conclude(status, reason="", gate_rule="", worst=None, name=name):
                results[name] = Result(
                    workload.name, name, self.backend.framework, status, reason[:500], gate_rule, worst
                )

            if name in self._absent:
                conclude("missing", self._absent[name])
                continue
            if refused:
                conclude("unsupported", refused)
                continue
            try:
                prepared = self._layers(name, args, inputs)
                if provider.role == "floor":  # no answer to judge: it bounds what a launch costs
                    conclude("passed", gate_rule="none: computes no answer")
                else:
                    verdict = gate.judge(*prepared.answer(), provider.rule)
                    conclude(verdict.status, verdict.reason, provider.rule, verdict.worst)
            except Missing as error:
                self._absent[name] = f"not installed: {error}"
                conclude("missing", self._absent[name])
            except (Unsupported, NotImplementedError) as error:
                conclude("unsupported", str(error) or type(error).__name__)
            except Exception as error:
                conclude("crashed", f"{type(error).__name__}: {error}")
            if results[name].status == "passed":
                ready[name] = prepared
                if prepared.note:
                    results[name].notes.append(prepared.note)
            elif results[name].status not in ("missing", "unsupported"):
                self.log(f"  {workload.name} {name}: {results[name].status}: {results[name].reason}")
        return results, ready

    def _layers(self, name: str, args, inputs) -> Prepared:
        """The contender, whose call is that of every layer of the workload, each with arrays of its own."""
        first, layers = self.backend.prepare(name, args), inputs.workload.layers
        if layers == 1 or PROVIDERS[name].role == "floor":
            return first
        calls = [first.call]
        calls += [self.backend.prepare(name, self.backend.load(inputs)).call for _ in range(layers - 1)]
        chain = None if first.chain is None else lambda calls: first.chain(calls * layers)
        return first._replace(call=lambda: [call() for call in calls][-1], chain=chain)

    def launches(self, workload: Workload) -> None:
        """Host time and captured graphs. Before CUPTI is loaded: it slows launches."""
        results, ready = self.prepare(workload)
        self._kept[workload.name] = results, ready
        if not self.backend.is_gpu:
            return
        calls = {name: prepared.call for name, prepared in ready.items()}
        if self.host:
            self._add(results, "host", *host_time(calls, self.backend.synchronize))
        if self.backend.framework == "torch" and (workload.op == UPDATE or workload.layers > 1):
            self._graphs(workload, results, ready)

    def gpu_times(self, workload: Workload, timer) -> list[Result]:
        """Cold and, for small workloads, warm times."""
        small = workload.name in self._kept
        results, ready = self._kept.pop(workload.name) if small else self.prepare(workload)
        over_floor = workload.target is not None and workload.target.unit == "us over"
        contenders = {n: p for n, p in ready.items() if PROVIDERS[n].role != "floor"}
        if timer.gpu and (small or over_floor):
            contenders |= {n: p for n, p in ready.items() if n not in contenders}
        calls = {name: prepared.call for name, prepared in contenders.items()}
        clock = "cold" if timer.gpu else "wall"
        taken = take_turns(calls, timer.cold, timer.cold_method, samples=self.samples, warmup=2)
        self._add(results, clock, *taken)
        if timer.gpu and small:
            if self.count:
                self._count_waits(workload, calls, timer)
            taken = take_turns(calls, timer.warm, timer.warm_method, samples=self.samples, warmup=1)
            self._add(results, "warm", *taken)
            in_graph = workload.layers > 1 or (workload.target and workload.target.clock == "graph")
            if self.backend.framework == "jax" and in_graph:
                twins = {
                    n: p for n, p in ready.items() if PROVIDERS[n].role == "twin"
                }  # a chain compiles slowly
                self._graphs(workload, results, twins)
        self.results += results.values()
        return list(results.values())

    def _count_waits(self, workload, calls, timer) -> None:
        """What the twin's calls make the driver wait for or copy, once for each operation."""
        twin = TWIN[self.backend.framework]
        known = any(c.name == WAITS and workload.op in c.method for c in self.counters)
        if known or twin not in calls or not isinstance(timer, CuptiTimer):
            return
        method = f"CUPTI, {WAIT_CALLS} calls of {workload.op} ({workload.name})"
        try:
            waits, copies = timer.waits(calls[twin], WAIT_CALLS)
        except CuptiUnavailable as error:
            waits, copies, reason = None, None, str(error)
        else:
            reason = ""
        for name, value in ((WAITS, waits), ("host-device copies", copies)):
            self.counters.append(Counter(name, twin, self.backend.framework, value, method, reason))

    def _graphs(self, workload, results, ready) -> None:
        calls = 200 if workload.least_bytes < DECODE_BYTES else 50
        if self.backend.framework == "jax":
            calls = 20
        self._add(results, "graph", *self.backend.graph(ready, calls, max(self.samples // 2, 3)))

    def _add(self, results, clock, timings, failed) -> None:
        for name, timing in timings.items():
            results[name].add(clock, timing)
        for name, reason in failed.items():
            results[name].notes.append(f"{clock}: {reason}"[:500])


def run_framework(framework: str, workloads: list[Workload], options, path: Path) -> None:
    """The whole run of one framework, in this process; the file is rewritten after every workload."""
    begin = time.monotonic()

    def log(text: str) -> None:
        print(f"[{framework} {time.monotonic() - begin:6.1f} s] {text}", flush=True)

    backend = open_backend(framework)
    backend.without_gradients()  # as serving engines call
    session = Session(
        backend,
        choose_providers(options.providers, framework),
        samples=options.samples,
        host=not options.no_host,
        count=not options.no_counters,
        log=log,
    )
    header = {"device": backend.device_name, "clock": "gpu" if backend.is_gpu else "wall"}
    header |= {"versions": backend.versions(), "notes": []}
    run = Run(header, session.results, session.counters)
    log(f"{backend.device_name}, {header['versions']}")
    if not options.no_counters:
        try:
            run.counters += backend.count()
        except Exception as error:  # a broken twin must not cost the other contenders' times
            reason = f"{type(error).__name__}: {error}"[:500]
            run.counters.append(Counter("compilations", TWIN[framework], framework, None, "", reason))
        log(
            "counted "
            + ", ".join(f"{c.name} {c.value if c.value is not None else c.reason}" for c in run.counters)
        )
    for workload in workloads:
        if workload.op == UPDATE or workload.name == SEED or workload.layers > 1:
            session.launches(workload)
            log(f"{workload.name}: gate, host, graphs")
    timer, notes = backend.timer()
    header["notes"] += [f"{framework}: {note}" for note in notes]
    header["timer"] = timer.cold_method
    log(f"timer: {timer.cold_method} {notes or ''}")
    for workload in workloads:
        results = session.gpu_times(workload, timer)
        write(path, run)
        clock = "cold" if timer.gpu else "wall"
        times = (f"{r.provider} {r.timings[clock].median:.1f}" for r in results if clock in r.timings)
        log(f"{workload.name} ({clock}, us): " + ", ".join(times))
    timer.close()
    header["seconds"] = round(time.monotonic() - begin, 1)
    write(path, run)


def merge(parts: dict[str, Run], ended: dict[str, str], command: str) -> Run:
    """One run of the frameworks' runs.

    Raises:
      ValueError: the frameworks saw different devices.
    """
    devices = {environment.slug(part.header["device"]) for part in parts.values()}
    clocks = {part.header["clock"] for part in parts.values()}
    if len(devices) > 1 or len(clocks) > 1:
        raise ValueError(
            f"device: expected the same for all frameworks, got {sorted(devices)}, clocks {sorted(clocks)}"
        )
    first = next(iter(parts.values())).header
    header = {
        **environment.describe(),
        "device": first["device"],
        "clock": first["clock"],
        "command": command,
        "contract_version": CONTRACT_VERSION,
    }
    header["frameworks"] = {
        name: {key: part.header.get(key) for key in ("versions", "timer", "seconds")}
        for name, part in parts.items()
    }
    header["notes"] = [note for part in parts.values() for note in part.header["notes"]]
    header["notes"] += [f"{name}: {text}" for name, text in ended.items()]
    run = Run(header)
    for part in parts.values():
        run.results += part.results
        run.counters += part.counters
    return run


def destination(run: Run, out: Path | None) -> Path:
    """Where a run's file goes: <out>/<device>/<date>-<commit>.jsonl, or -2, -3, ... if there is one already.

    Raises:
      ValueError: a dry run without --out; results/ holds GPU results only.
    """
    if out is None:
        if run.header["clock"] != "gpu":
            raise ValueError("out: expected --out for a run without a GPU; results/ holds GPU results only")
        out = RESULTS
    stem = f"{run.header['date'][:10]}-{run.header['commit']}"
    folder = out / environment.slug(run.header["device"])
    paths = (
        folder / f"{stem}{suffix}.jsonl"
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    )
    return next(path for path in paths if not path.exists())


def writable(folder: Path) -> None:
    """Makes the folder and a file in it, before an hour is spent; raises OSError where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", metavar="GLOB",
                        help=f"groups or globs over names (default: {' '.join(DEFAULT_WORKLOADS)})")  # fmt: skip
    parser.add_argument("--providers", nargs="+", default=["*"], metavar="GLOB",
                        help="globs over names; each framework's limit and copy are always added (default: all)")  # fmt: skip
    parser.add_argument("--frameworks", nargs="+", default=list(FRAMEWORKS), choices=FRAMEWORKS)
    parser.add_argument(
        "--out", type=Path, help=f"folder for <device>/<date>-<commit>.jsonl (default: {RESULTS.name})"
    )
    parser.add_argument("--quick", action="store_true", help="7 samples, no counters, no host times")
    parser.add_argument(
        "--samples", type=int, default=30, help="samples of each clock (default: %(default)s)"
    )
    parser.add_argument("--no-host", action="store_true", help="no host times")
    parser.add_argument(
        "--no-counters", action="store_true", help="do not count compilations and synchronisations"
    )
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds a framework may take (default: %(default)s)"
    )
    parser.add_argument(
        "--list",
        action="store_true",
        help="print all workloads, or those of --workloads, and providers; run nothing",
    )
    parser.add_argument("--child", choices=FRAMEWORKS, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.samples, options.no_counters, options.no_host = 7, True, True
    if options.samples < 1:
        parser.error(f"--samples: expected at least 1, got {options.samples}")
    try:
        every = sorted({name.partition("/")[0] for name in WORKLOADS}) if options.list else DEFAULT_WORKLOADS
        options.selected = select(options.workloads or list(every))
        choose_providers(options.providers, FRAMEWORKS[0])
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(argv)
    if options.list:
        for w in options.selected:
            print(f"{w.name:32} {w.op:22} tokens {w.tokens:7} batch {w.batch:5} D {w.dim:6} "
                  f"least {w.least_bytes / 1e6:10.2f} MB = {w.least_ratio:.3f} copies   {w.source}")  # fmt: skip
        for p in PROVIDERS.values():
            print(f"{p.name:22} {p.framework:6} {p.role:6} {p.text}")
        return 0
    if options.child:
        run_framework(options.child, options.selected, options, options.part)
        return 0

    if options.out is None and not environment.gpu():
        print(
            f"--out: expected a folder for a run without a GPU; {RESULTS.name}/ holds GPU results only",
            file=sys.stderr,
        )
        return 2
    try:
        writable(options.out or RESULTS)
    except OSError as error:
        print(f"--out: expected a folder that can be written, got {error}", file=sys.stderr)
        return 2
    parts, ended = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for framework in options.frameworks:
            part = Path(folder) / f"{framework}.jsonl"
            command = [
                sys.executable,
                "-m",
                "benchmarks.run",
                "--child",
                framework,
                "--part",
                str(part),
                *argv,
            ]
            environ = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            root = str(environment.ROOT)
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
            try:
                code = subprocess.run(
                    command, cwd=root, env=environ, timeout=options.limit, check=False
                ).returncode
                if code:
                    ended[framework] = f"its process ended with code {code}; results are incomplete"
            except subprocess.TimeoutExpired:
                ended[framework] = (
                    f"its process was stopped after {options.limit:.0f} s; results are incomplete"
                )
            if part.exists():
                parts[framework] = read(part)
            else:
                ended.setdefault(framework, "its process left no results")
        if not parts:
            print(f"no results: {ended}", file=sys.stderr)
            return 1
        run = merge(parts, ended, " ".join(["python", "-m", "benchmarks.run", *argv]))
    print("\n" + report.text(run))
    path = destination(run, options.out)
    write(path, run)
    print(f"written: {path}")
    wrong = [r for r in run.results if r.status in ("crashed",) or r.status.startswith("wrong")]
    return 1 if ended or any(PROVIDERS[r.provider].role != "peer" for r in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
