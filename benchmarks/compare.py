"""Two results files against each other: `python -m benchmarks.compare BEFORE AFTER`.

Files of unlike devices, clocks or timers are refused: their numbers do not compare. A change counts as one
only if it is larger than the noise: that of the samples of both files, and how far apart the files' copies and
empty kernels are, which no commit changes. Those are shown, and never count as slower themselves.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

from benchmarks import environment, report
from benchmarks.providers import PROVIDERS
from benchmarks.record import Run, Timing, quantile, read

CONTROLS = ("limit", "copy", "floor")
LEAST_NOISE = 0.002  # of a median: clocks of a GPU hold no steadier


def check_comparable(before: Run, after: Run) -> None:
    """Raises ValueError if the runs cannot be compared, naming what differs."""

    def facts(run: Run) -> dict[str, object]:
        found: dict[str, object] = {
            "device": environment.slug(run.header["device"]),
            "clock": run.header["clock"],
            "contract_version": run.header.get("contract_version"),
        }
        for name, framework in run.header["frameworks"].items():
            found[f"{name} timer"] = framework["timer"]
        return found

    first, second = facts(before), facts(after)
    for name in first.keys() & second.keys():
        if first[name] != second[name]:
            raise ValueError(
                f"{name}: expected the same in both files, got {first[name]!r} and {second[name]!r}"
            )


def noise(timing: Timing) -> float:
    """By how much of itself the median of such samples may lie elsewhere in another run.

    The larger of the spread of the samples and of the clock's tick, which a short time shows as one step: samples that
    are all alike do not mean that the next run's are.
    """
    values = sorted(set(timing.samples))
    tick = min((b - a for a, b in itertools.pairwise(values)), default=0.0)
    spread = max(timing.p80 - timing.p20, tick)
    return max(spread / timing.median if timing.median else 0.0, LEAST_NOISE)


def verdict(before: Timing, after: Timing, run_noise: float = 0.0) -> str:
    """Says "same" where the medians differ by less than both runs' noise, else "faster" or "slower"."""
    allowed = noise(before) + noise(after) + run_noise
    change = after.median / before.median - 1 if before.median else 0.0
    if abs(change) <= allowed:
        return "same"
    return "slower" if change > 0 else "faster"


def run_noise(before: Run, after: Run) -> dict[tuple[str, str], float]:
    """By framework and clock, how much those contenders differ that no commit changes: copies and empty kernels.

    The 90th percentile of the differences of their medians: what two runs on one device differ by in themselves.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for new in after.results:
        old = before.find(new.workload, new.provider)
        if old is None or PROVIDERS[new.provider].role not in CONTROLS:
            continue
        for clock in new.timings.keys() & old.timings.keys():
            first, second = old.timings[clock].median, new.timings[clock].median
            if first:
                found.setdefault((new.framework, clock), []).append(abs(second / first - 1))
    return {key: quantile(values, 0.9) for key, values in found.items()}


def table(before: Run, after: Run) -> tuple[list[str], list[str]]:
    """The comparison's lines, and the names of what became slower.

    Raises:
      ValueError: the runs cannot be compared.
    """
    check_comparable(before, after)
    lines = [f"{'workload':34} {'provider':20} {'clock':6} {'before':>10} {'after':>10} {'after/before':>12}  "
             f"{'verdict':8} ratio to the limit"]  # fmt: skip
    slower, runs = [], run_noise(before, after)
    for new in after.results:
        old = before.find(new.workload, new.provider)
        if old is None:
            continue
        if old.status != new.status:
            lines.append(
                f"{new.workload:34} {new.provider:20} status: {old.status} -> {new.status} {new.reason[:60]}"
            )
        for clock, timing in new.timings.items():
            if clock not in old.timings:
                continue
            past = old.timings[clock]
            word = verdict(past, timing, runs.get((new.framework, clock), 0.0))
            if word == "slower" and PROVIDERS[new.provider].role not in CONTROLS:
                slower.append(f"{new.workload} {new.provider} {clock}")
            ratios = [report.ratio(run, r, clock) for run, r in ((before, old), (after, new))]
            text = " -> ".join("-" if value is None else f"{value:.3f}" for value in ratios)
            lines.append(
                f"{new.workload:34} {new.provider:20} {clock:6} {past.median:10.2f} {timing.median:10.2f} "
                f"{timing.median / past.median if past.median else float('nan'):12.3f}  {word:8} {text}"
            )
    return lines, slower


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--fail-slower", action="store_true", help="exit with 1 if anything became slower")
    options = parser.parse_args(argv)
    try:
        lines, slower = table(read(options.before), read(options.after))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(lines))
    if slower:
        print(f"\nslower: {', '.join(slower)}")
    return 1 if slower and options.fail_slower else 0


if __name__ == "__main__":
    sys.exit(main())
