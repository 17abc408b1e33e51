"""Tables of results files of one commit and device: `python -m benchmarks.report FILE [FILE ...]`.

`ratio` is a time over that of the limit, a copy of as many bytes as the call must move; `of x` over a copy of x into
out. Both were timed in the same run, by the same clock and the same framework.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.providers import COPY, FLOOR, LIMIT, PROVIDERS, TWIN
from benchmarks.record import Result, Run, join, read
from benchmarks.workloads import UPDATE, WORKLOADS, Target

TWINS = tuple(TWIN.values())
AUTO_SLACK = 1.03  # schedule auto against the better of the two
HOST_SLACK = 1.5  # a call's host time against an empty Triton kernel's


def limit(run: Run, result: Result) -> Result | None:
    """The limit's result beside this one. Of an update, files before `short` and `narrow` call it the copy."""
    found = run.find(result.workload, LIMIT[result.framework])
    workload = WORKLOADS.get(result.workload)
    if found is None and workload is not None and workload.op == UPDATE:
        return run.find(result.workload, COPY[result.framework])
    return found


def over(result: Result, other: Result | None, clock: str) -> float | None:
    """A median over another's on the same clock."""
    if other is None or clock not in result.timings or clock not in other.timings:
        return None
    return result.timings[clock].median / other.timings[clock].median


def ratio(run: Run, result: Result, clock: str) -> float | None:
    """A median over that of the same framework's limit on the same clock."""
    return over(result, limit(run, result), clock)


def ratio_to_copy(run: Run, result: Result, clock: str) -> float | None:
    """The same over a copy of x."""
    return over(result, run.find(result.workload, COPY[result.framework]), clock)


def measured(run: Run, result: Result, target: Target) -> tuple[float, str] | None:
    """The value that a target speaks of, and the clock it was read from: warm where there is no graph."""
    clock = target.clock
    if clock == "graph" and clock not in result.timings:
        clock = "warm"
    if clock not in result.timings:
        return None
    if target.unit == "ratio":
        value = ratio(run, result, clock)
    else:
        value = result.timings[clock].median
        if target.unit == "us over":
            floor = run.find(result.workload, FLOOR[result.framework])
            value = value - floor.timings[clock].median if floor and clock in floor.timings else None
    return None if value is None else (value, clock)


def mark(value: float, target: Target) -> str:
    if target.goal is not None and value <= target.goal:
        return "goal"
    return "met" if value <= target.required else "MISS"


def targets_table(run: Run) -> list[str]:
    """One line for every workload with a target: both twins, required, goal, with the clock that a value is of."""
    head = f"{'workload':34} {'unit':8} {'least':>6} {'required':>8} {'goal':>6}"
    lines = [head + "".join(f" {name:>22}" for name in TWINS)]
    for name in dict.fromkeys(r.workload for r in run.results):
        workload = WORKLOADS.get(name)
        if workload is None or workload.target is None:
            continue
        target = workload.target
        goal = f"{target.goal:g}" if target.goal is not None else "-"
        line = f"{name:34} {target.unit:8} {workload.least_ratio:6.2f} {target.required:8g} {goal:>6}"
        for twin in TWINS:
            result = run.find(name, twin)
            found = measured(run, result, target) if result else None
            if found:
                value, clock = found
                text = f"{value:.3f} {clock} {mark(value, target)}"
            else:
                text = result.status if result else "-"
            line += f" {text:>22}"
        lines.append(line)
    return lines if len(lines) > 1 else []


def results_table(run: Run) -> list[str]:
    """One line for every result: medians, spread of the first clock, ratios to the limit and to a copy of x."""
    head = f"{'workload':34} {'provider':20} {'status':8} {'cold us':>10} {'p20..p80':>19} {'ratio':>7} {'of x':>7}"
    lines = [head + f" {'warm us':>9} {'graph us':>9} {'ratio':>6} {'host us':>8} {'GB/s':>6} {'worst':>6}"]
    dry = run.header["clock"] != "gpu"
    clock = "wall" if dry else "cold"
    if dry:
        lines[0] = lines[0].replace("cold us", "wall us")
    for result in run.results:
        if result.status != "passed":
            lines.append(f"{result.workload:34} {result.provider:20} {result.status:8} {result.reason[:90]}")
            continue

        def median(name, digits=1, result=result):
            return f"{result.timings[name].median:.{digits}f}" if name in result.timings else "-"

        def over(name, among=ratio, result=result):
            value = among(run, result, name)
            return f"{value:.3f}" if value is not None else "-"

        first = result.timings.get(clock)
        spread = f"{first.p20:.1f}..{first.p80:.1f}" if first else "-"
        workload = WORKLOADS.get(result.workload)
        rate = "-"
        if first and workload and not dry:
            of_x = PROVIDERS[result.provider].role == "copy"
            moved = (workload.x_bytes if of_x else workload.least_bytes) * workload.layers
            rate = f"{moved / first.median / 1e3:.0f}"
        worst = f"{result.worst:.2f}" if result.worst is not None else "-"
        lines.append(
            f"{result.workload:34} {result.provider:20} {result.status:8} {median(clock):>10} {spread:>19} "
            f"{over(clock):>7} {over(clock, ratio_to_copy):>7} {median('warm', 2):>9} {median('graph', 2):>9} {over('graph'):>6} "
            f"{median('host'):>8} {rate:>6} {worst:>6}"
        )
    return lines


def checks(run: Run) -> list[str]:
    """What must hold across lines: schedules, host time, and the two frameworks' copies."""
    lines = []
    for name in dict.fromkeys(r.workload for r in run.results):
        for twin in TWINS:
            times = {}
            for suffix in ("", "_per_sequence", "_flat"):
                result = run.find(name, twin + suffix)
                if result and "cold" in result.timings:
                    times[suffix] = result.timings["cold"].median
            if len(times) == 3:
                better = min(times["_per_sequence"], times["_flat"])
                if times[""] > AUTO_SLACK * better:
                    lines.append(f"{name} {twin}: auto is {times[''] / better:.3f} of the better schedule")
        limits = [run.find(name, found) for found in LIMIT.values()]
        times = [found.timings["cold"].median for found in limits if found and "cold" in found.timings]
        if len(times) == 2 and not 0.95 <= times[1] / times[0] <= 1.05:
            lines.append(f"{name}: JAX's copy of the limit takes {times[1] / times[0]:.3f} of torch's")
        floor, twin = run.find(name, "triton_empty"), run.find(name, "triton")
        if floor and twin and "host" in floor.timings and "host" in twin.timings:
            value = twin.timings["host"].median / floor.timings["host"].median
            word = "met" if value <= HOST_SLACK else "MISS"
            lines.append(
                f"{name} triton: host time {value:.2f} empty Triton kernels, required {HOST_SLACK}: {word}"
            )
    for counter in run.counters:
        value = counter.value if counter.value is not None else f"not counted ({counter.reason})"
        lines.append(f"{counter.name} of {counter.provider}: {value} [{counter.method}]")
    return lines


def text(run: Run) -> str:
    """The whole report of a run."""
    header = run.header
    title = f"{header['device']}, {header['date']}, commit {header['commit']}{' (dirty)' if header['dirty'] else ''}"
    blocks = [[title]]
    if header["clock"] != "gpu":
        blocks[0].append("DRY RUN on a CPU: wall-clock times, no GPU result")
    blocks[0] += [f"note: {note}" for note in header["notes"]]
    notes = {
        f"{r.provider}: {note}"
        for r in run.results
        for note in r.notes
        if PROVIDERS[r.provider].role == "twin"
    }
    blocks += [results_table(run), checks(run), sorted(notes), targets_table(run)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="results/<device>/<date>-<commit>.jsonl"
    )
    options = parser.parse_args(argv)
    try:
        print(text(join([read(file) for file in options.files])))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
