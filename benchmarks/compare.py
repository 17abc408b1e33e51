"""Two results files against each other: `python -m benchmarks.compare BEFORE AFTER`.

Files of unlike devices, clocks or timers are refused: their numbers do not compare. A change counts as one
only if the two runs' ranges from the 20th to the 80th percentile are apart.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import environment, report
from benchmarks.record import Run, Timing, read


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


def verdict(before: Timing, after: Timing) -> str:
    """Says "same" where the ranges p20..p80 meet, else "faster" or "slower"."""
    if after.p80 < before.p20:
        return "faster"
    return "slower" if after.p20 > before.p80 else "same"


def table(before: Run, after: Run) -> tuple[list[str], list[str]]:
    """The comparison's lines, and the names of what became slower.

    Raises:
      ValueError: the runs cannot be compared.
    """
    check_comparable(before, after)
    lines = [f"{'workload':34} {'provider':20} {'clock':6} {'before':>10} {'after':>10} {'after/before':>12}  "
             f"{'verdict':8} ratio to the copy"]  # fmt: skip
    slower = []
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
            word = verdict(past, timing)
            if word == "slower":
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
