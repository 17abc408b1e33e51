"""This checkout's twins beside another checkout's, in turns on one GPU: is any row slower?

    python -m benchmarks.against ../before                                   # main, decode, verify, variants, short, narrow
    python -m benchmarks.against ../before --workloads main 'short/*-d2048' --frameworks torch --allow 1.03

Each checkout's twin runs in a process of its own, with its own contract, under this checkout's workloads, gate and
timers. The two take turns of a few samples, the other one first each time, so that clocks and temperature hit both.
A row shows the median of the turns' ratios, after over before, with the 20th and 80th percentile. `control` is the ratio
of what is the same program in both processes, and so is worth 1: the limit, of host times an empty kernel. Exits with 1 if a ratio is above --allow or an answer is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.record import quantile
from benchmarks.run import SEED
from benchmarks.workloads import UPDATE, Workload, select

HERE = Path(__file__).resolve().parents[1]
PACKAGES = {"torch": "triton_impl", "jax": "pallas_impl"}
WORKLOADS = ("main", "decode", "verify", "variants", "short", "narrow")
SAMPLES = 3  # a turn
GRAPH_CALLS = {"torch": 50, "jax": 20}


# The process of one checkout.


def load_twin(checkout: str, framework: str) -> None:
    """Imports a checkout's twin with the contract beside it, and then this checkout's oracle for the gate."""
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != HERE]
    forget("oracle")
    sys.path[:] = [checkout, *elsewhere]
    twin = importlib.import_module(PACKAGES[framework])
    importlib.import_module(f"{PACKAGES[framework]}.functional")
    if not Path(twin.__file__).resolve().is_relative_to(Path(checkout).resolve()):
        raise SystemExit(f"expected {PACKAGES[framework]} of {checkout}, got {twin.__file__}")
    forget("oracle", "benchmarks")
    sys.path[:] = [str(HERE), checkout, *elsewhere]


def forget(*packages: str) -> None:
    """Lets the next import of these packages look for them anew."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


class Server:
    """Answers the requests of `main`, a JSON object a line: prepares a workload, takes samples of one clock."""

    def __init__(self, framework: str):
        from benchmarks import run
        from benchmarks.providers import FLOOR, LIMIT, TWIN, open_backend

        self.backend = open_backend(framework)
        self.backend.without_gradients()
        self.names = {"twin": TWIN[framework], "limit": LIMIT[framework], "floor": FLOOR[framework]}
        self.session = run.Session(self.backend, list(self.names.values()), log=lambda text: None)
        self.ready, self.timer = {}, None

    def about(self):
        return dict(
            device=self.backend.device_name, gpu=self.backend.is_gpu, versions=self.backend.versions()
        )

    def open_timer(self):
        self.timer, notes = self.backend.timer()
        return dict(method=self.timer.cold_method, notes=notes)

    def prepare(self, workload):
        from benchmarks.workloads import WORKLOADS

        self.ready = {}  # frees what was there before
        results, self.ready = self.session.prepare(WORKLOADS[workload])
        for name, prepared in self.ready.items():
            if prepared.chain is not None:  # compiled once for all turns
                self.ready[name] = prepared._replace(chain=functools.cache(prepared.chain))
        result = results[self.names["twin"]]
        return dict(status=result.status, reason=result.reason)

    def sample(self, clock, who):
        """A turn's samples of one clock, in microseconds a call."""
        from benchmarks.timing import host_time, take_turns

        name = self.names[who]
        prepared = {name: self.ready[name]}
        call = prepared[name].call
        if clock == "host":
            timings, failed = host_time({name: call}, self.backend.synchronize, samples=SAMPLES)
        elif clock == "graph":
            timings, failed = self.backend.graph(prepared, GRAPH_CALLS[self.backend.framework], SAMPLES)
        else:
            sample = self.timer.cold
            timings, failed = take_turns(
                {name: call}, sample, self.timer.cold_method, samples=SAMPLES, warmup=1
            )
        if failed:
            raise RuntimeError(failed[name])
        return timings[name].samples


def serve(checkout: str, framework: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints does not reach the answers
    load_twin(checkout, framework)
    from benchmarks.against import Server

    server = Server(framework)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = dict(answer=getattr(server, request.pop("do"))(**request))
        except Exception as error:  # of the twin, of any kind: said, and the next request is answered
            answer = dict(error=f"{type(error).__name__}: {error}"[:500])
        answers.write(json.dumps(answer) + "\n")


# The process that asks both.


class Side:
    """One checkout's process."""

    def __init__(self, checkout: Path, framework: str):
        command = [sys.executable, "-m", "benchmarks.against", "--serve", str(checkout), framework]
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false", PYTHONPATH=str(HERE))
        self.name = str(checkout)
        self.process = subprocess.Popen(
            command,
            cwd=HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, do: str, **arguments):
        """The answer; raises `Failed` as `hear`."""
        self.tell(do, **arguments)
        return self.hear()

    def tell(self, do: str, **arguments) -> None:
        with contextlib.suppress(BrokenPipeError):  # `hear` says so
            self.process.stdin.write(json.dumps(dict(do=do, **arguments)) + "\n")

    def hear(self):
        """The answer to the oldest request.

        Raises:
          Failed: the process ended, or the request raised there.
        """
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.name}: its process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(f"{self.name}: {answer['error']}")
        return answer["answer"]

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(60)


class Failed(RuntimeError):
    """A side could not do what it was asked."""


class Row(NamedTuple):
    """One workload on one clock: all samples of each turn, before and after, of the twin and of the control, if any."""

    workload: str
    framework: str
    clock: str
    twin: tuple[list[list[float]], list[list[float]]]
    control: tuple[list[list[float]], list[list[float]]] | None

    def medians(self, who) -> tuple[float, float]:
        """Of all samples, before and after."""
        before, after = (quantile([s for turn in turns for s in turn], 0.5) for turns in who)
        return before, after

    @property
    def ratios(self) -> list[float]:
        """After over before, of each turn."""
        return [quantile(b, 0.5) / quantile(a, 0.5) for a, b in zip(*self.twin, strict=True)]

    @property
    def control_ratio(self) -> float | None:
        """The same of the control: what two processes differ by alone."""
        if self.control is None:
            return None
        before, after = self.medians(self.control)
        return after / before

    def line(self) -> str:
        before, after = self.medians(self.twin)
        ratios, same = self.ratios, self.control_ratio
        return (
            f"{self.framework:6} {self.workload:34} {self.clock:6} {before:10.2f} {after:10.2f} "
            f"{quantile(ratios, 0.5):7.3f} {quantile(ratios, 0.2):7.3f}..{quantile(ratios, 0.8):.3f} "
            f"{'-' if same is None else format(same, '.3f'):>7}"
        )


HEAD = f"{'':6} {'workload':34} {'clock':6} {'before us':>10} {'after us':>10} {'ratio':>7} {'p20..p80':>14} {'control':>7}"


def clocks_of(workload: Workload, framework: str, timed: bool) -> tuple[str, ...]:
    """The clocks of a workload before CUPTI is loaded, which slows launches, or behind that."""
    small = workload.op == UPDATE or workload.name == SEED
    if not timed:
        return (
            (("host", "graph") if framework == "torch" and workload.op == UPDATE else ("host",))
            if small
            else ()
        )
    chained = framework == "jax" and workload.target and workload.target.clock == "graph"
    return ("cold", "graph") if chained else ("cold",)


def take(sides: list[Side], workload: Workload, framework: str, clocks, turns: int, log) -> list[Row]:
    """The rows of a workload; a clock that fails is said and left out.

    Raises:
      Failed: an answer is wrong, or a process has ended.
    """
    for side in sides:  # both at once: the gate takes longer than the timing
        side.tell("prepare", workload=workload.name)
    for side, found in [(side, side.hear()) for side in sides]:
        if found["status"] == "unsupported":
            return []
        if found["status"] != "passed":
            raise Failed(f"{side.name}: {workload.name}: {found['status']}: {found['reason']}")
    rows = []
    for clock in clocks:
        control = {"cold": "limit", "wall": "limit", "host": "floor"}.get(clock)
        times = {who: ([], []) for who in ("twin", control) if who}
        try:
            for turn in range(turns):
                for who in times:
                    order = (0, 1) if turn % 2 == 0 else (1, 0)
                    for which in order:
                        times[who][which].append(sides[which].ask("sample", clock=clock, who=who))
        except Failed as error:
            log(f"{workload.name} {clock}: {error}")
            continue
        rows.append(Row(workload.name, framework, clock, times["twin"], times.get(control)))
    return rows


def compare(checkout: Path, framework: str, workloads: list[Workload], turns: int, log) -> list[Row]:
    """All rows of a framework, printed as they come."""
    sides = [Side(checkout, framework), Side(HERE, framework)]
    rows = []
    try:
        about = [side.ask("about") for side in sides]
        log(f"{framework}: {about[0]['device']}, {about[0]['versions']}")
        if not about[0]["gpu"]:
            log("DRY RUN on a CPU: wall-clock times, no GPU result")
        for timed in (False, True):
            if timed:
                methods = [side.ask("open_timer")["method"] for side in sides]
                log(f"{framework}: {methods[0]}")
            for workload in workloads:
                clocks = clocks_of(workload, framework, timed) if about[0]["gpu"] else ("wall",) * timed
                found = take(sides, workload, framework, clocks, turns, log) if clocks else []
                for row in found:
                    log(row.line())
                rows += found
    finally:
        for side in sides:
            side.close()
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkout", type=Path, help="the other checkout, that of `before`")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), metavar="GLOB")
    parser.add_argument("--frameworks", nargs="+", default=list(PACKAGES), choices=PACKAGES)
    parser.add_argument(
        "--turns", type=int, default=6, help=f"turns of {SAMPLES} samples each (default: %(default)s)"
    )
    parser.add_argument("--allow", type=float, default=1.02, help="the largest ratio (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.turns < 1:
        parser.error(f"--turns: expected at least 1, got {options.turns}")
    checkout = options.checkout.resolve()
    for package in (PACKAGES[framework] for framework in options.frameworks):
        if not (checkout / package).is_dir():
            parser.error(f"checkout: expected a folder with {package}, got {options.checkout}")
    try:
        workloads = select(options.workloads)
    except ValueError as error:
        parser.error(str(error))

    def log(text):
        print(text, flush=True)

    log(HEAD)
    rows, failed = [], []
    for framework in options.frameworks:
        try:
            rows += compare(checkout, framework, workloads, options.turns, log)
        except Failed as error:
            failed.append(f"{framework}: {error}")
    slower = [row for row in rows if quantile(row.ratios, 0.5) > options.allow]
    print(f"\n{len(rows)} rows, {len(slower)} above {options.allow}")
    print("\n".join([HEAD, *(row.line() for row in slower)] if slower else []))
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if slower or failed or not rows else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        sys.exit(main())
