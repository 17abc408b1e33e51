"""The result record: a time can only be stated together with the proof that the answer was right.

A results file is JSON Lines: one `header`, then `result` and `counter` lines, then one `footer` with their
number; `read` refuses a file without a footer, so a broken run is never taken for a short one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = (
    "passed",
    "wrong_shape",
    "wrong_dtype",
    "wrong_value",
    "wrong_state",
    "crashed",
    "unsupported",
    "missing",
)
CLOCKS = ("cold", "warm", "graph", "host", "wall")  # see timing.py; wall: a dry run on a CPU


def quantile(samples: list[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy.quantile does by default."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Timing:
    """All samples of one clock, in microseconds a call, in the order taken.

    Attributes:
      samples: never empty.
      method: what was measured, by which means, so that a number is never read as another.
      kernels: GPU operations a call, where the method can count them.
    """

    samples: list[float]
    method: str
    kernels: int | None = None

    def __post_init__(self):
        if not self.samples or not all(math.isfinite(s) and s >= 0 for s in self.samples):
            raise ValueError(f"samples: expected finite times >= 0, got {self.samples!r:.80}")

    @property
    def median(self) -> float:
        return quantile(self.samples, 0.5)

    @property
    def p20(self) -> float:
        return quantile(self.samples, 0.2)

    @property
    def p80(self) -> float:
        return quantile(self.samples, 0.8)


@dataclass
class Result:
    """One contender on one workload.

    Attributes:
      workload, provider, framework: names.
      status: one of `STATUSES`; only "passed" may carry timings.
      reason: why not, when not passed.
      gate: the rule that judged the answer.
      worst: largest error as a fraction of the allowed error, where the gate computes one.
      timings: by clock.
      notes: what a reader of the numbers must know; failures of a single clock.
    """

    workload: str
    provider: str
    framework: str
    status: str
    reason: str = ""
    gate: str = ""
    worst: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.status not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {self.status!r}")
        if self.timings and self.status != "passed":
            raise ValueError(
                f"timings: expected none with status {self.status!r}, got {sorted(self.timings)}"
            )
        if unknown := set(self.timings) - set(CLOCKS):
            raise ValueError(f"timings: expected clocks of {CLOCKS}, got {sorted(unknown)}")
        if self.status != "passed" and not self.reason:
            raise ValueError(f"reason: expected one with status {self.status!r}, got none")

    def add(self, clock: str, timing: Timing) -> None:
        """Adds a timing; refused unless the answer passed."""
        if self.status != "passed":
            raise ValueError(f"timings: expected none with status {self.status!r}, got {clock!r}")
        if clock not in CLOCKS:
            raise ValueError(f"clock: expected one of {CLOCKS}, got {clock!r}")
        self.timings[clock] = timing

    def to_json(self) -> dict[str, Any]:
        record = {"kind": "result", **asdict(self)}
        for clock, timing in self.timings.items():
            rounded = dict(samples=[round(s, 4) for s in timing.samples])
            summary = dict(median=round(timing.median, 4), p20=round(timing.p20, 4), p80=round(timing.p80, 4))
            record["timings"][clock] |= rounded | summary
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Result:
        fields = {key: value for key, value in record.items() if key != "kind"}
        fields["timings"] = {
            clock: Timing(t["samples"], t["method"], t.get("kernels"))
            for clock, t in record["timings"].items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class Counter:
    """A number that is no time: synchronisations, compilations.

    Attributes:
      name: what was counted.
      provider, framework: of whom.
      value: the count; None if it could not be had, and then `reason` says why.
      method: how it was counted.
    """

    name: str
    provider: str
    framework: str
    value: int | None
    method: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "counter", **asdict(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Counter:
        return cls(**{key: value for key, value in record.items() if key != "kind"})


@dataclass
class Run:
    """A whole results file.

    Attributes:
      header: schema, date, commit, dirty, device, clock ("gpu" or "wall"), command and environments.
      results, counters: in file order.
    """

    header: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)

    def find(self, workload: str, provider: str) -> Result | None:
        return next((r for r in self.results if (r.workload, r.provider) == (workload, provider)), None)


def write(path: Path, run: Run) -> None:
    """Writes header, lines and footer; the parent folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "header", "schema": SCHEMA, **run.header}]
    lines += [line.to_json() for line in (*run.results, *run.counters)]
    lines.append({"kind": "footer", "lines": len(lines) - 1})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> Run:
    """Reads a results file.

    Raises:
      ValueError: no header, no footer, a wrong count, another schema, or a line that is no valid record.
    """
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    if not lines or lines[0].get("kind") != "header":
        raise ValueError(f"{path}: expected a header on line 1")
    if lines[-1].get("kind") != "footer" or lines[-1].get("lines") != len(lines) - 2:
        raise ValueError(f"{path}: expected a footer that counts {len(lines) - 2} lines; the run was cut off")
    header = {key: value for key, value in lines[0].items() if key not in ("kind", "schema")}
    if lines[0].get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {lines[0].get('schema')!r}")
    run = Run(header)
    for number, line in enumerate(lines[1:-1], 2):
        if line.get("kind") == "result":
            run.results.append(Result.from_json(line))
        elif line.get("kind") == "counter":
            run.counters.append(Counter.from_json(line))
        else:
            raise ValueError(f"{path}:{number}: expected a result or a counter, got {line.get('kind')!r}")
    return run


def join(runs: list[Run]) -> Run:
    """One run of several on one device and commit; what a later run measured anew replaces the earlier.

    A workload is replaced for a whole framework at a time, since ratios need the copy of the same run.

    Raises:
      ValueError: unlike devices, clocks or commits.
    """
    for key in ("device", "clock", "commit"):
        found = {str(run.header[key]) for run in runs}
        if len(found) > 1:
            raise ValueError(f"{key}: expected the same in all files, got {sorted(found)}")
    joined = Run({**runs[-1].header, "notes": [note for run in runs for note in run.header["notes"]]})
    for run in runs:
        renewed = {(r.workload, r.framework) for r in run.results}
        joined.results = [r for r in joined.results if (r.workload, r.framework) not in renewed] + run.results
        counted = {(c.name, c.provider, c.method) for c in run.counters}
        joined.counters = [
            c for c in joined.counters if (c.name, c.provider, c.method) not in counted
        ] + run.counters
        joined.header["frameworks"] = {**joined.header["frameworks"], **run.header["frameworks"]}
    return joined
