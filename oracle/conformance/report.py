"""The report: JSON Lines of one header, a record for every case, and a footer.

A file without a footer comes from a run that did not end, and is refused.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle.conformance import schema

FORMAT_VERSION = 1
GOOD = ("passed", "unsupported", "xfailed")


class ReportError(ValueError):
    """A report file that cannot be trusted; the text names file, line and field."""


@dataclass
class Report:
    """One run of one implementation."""

    header: dict[str, Any]
    cases: list[dict[str, Any]]
    footer: dict[str, Any]

    @property
    def failures(self) -> list[dict[str, Any]]:
        """The records of cases that did not go as they should."""
        return [case for case in self.cases if case["status"] not in GOOD]

    @property
    def good(self) -> bool:
        """At least one case was judged, none is wrong, and capabilities are true."""
        return self.judged and not self.failures and not self.footer["findings"]

    @property
    def judged(self) -> bool:
        """Whether any case was run for its result: an implementation that denies everything is not right."""
        return any(case["status"] != "unsupported" for case in self.cases)

    @property
    def interrupted(self) -> bool:
        """Whether the run ended before all its cases had run."""
        return any(finding.startswith("interrupted:") for finding in self.footer["findings"])


def close(
    header: dict[str, Any], cases: list[dict[str, Any]], seconds: float, findings: Iterable[str]
) -> Report:
    """Builds a report from its parts."""
    counts = dict(Counter(case["status"] for case in cases))
    footer = {"kind": "footer", "cases": len(cases), "counts": counts, "seconds": round(seconds, 2),
              "findings": list(findings)}  # fmt: skip
    return Report(header, cases, footer)


def check_path(path: str | Path) -> None:
    """Raises ValueError if no report can be written there: said before a run rather than after it."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir() or not os.access(path if Path(path).exists() else folder, os.W_OK):
        what = (
            "a folder"
            if Path(path).is_dir()
            else "no folder there"
            if not folder.is_dir()
            else "no right to write it"
        )
        raise ValueError(
            f"report: expected the path of a file that can be written, got {str(path)!r}: {what}"
        )


def write(report: Report, path: str | Path) -> None:
    """Writes a report as JSON Lines."""
    lines = [report.header, *report.cases, report.footer]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: str | Path) -> Report:
    """Reads a report.

    Raises:
      ReportError: damaged, incomplete, or of another format version.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ReportError(f"{path}:{number}: expected a JSON object, got {line[:60]!r}") from error
        kind = record.get("kind") if isinstance(record, dict) else None
        ended = bool(records) and records[-1]["kind"] == "footer"
        expected = ["header"] if number == 1 else [] if ended else ["case", "footer"]
        if kind not in expected:
            raise ReportError(
                f"{path}:{number}: kind: expected {' or '.join(expected) or 'nothing more'}, got {kind!r}"
            )
        for wrong in schema.errors(record, "report_v1.json", kind):
            raise ReportError(f"{path}:{number}: {wrong}")
        records.append(record)
    if not records:
        raise ReportError(f"{path}: header: missing, the file is empty")
    if records[-1]["kind"] != "footer":
        raise ReportError(f"{path}: footer: missing, so the run did not end")
    report = Report(records[0], records[1:-1], records[-1])
    if report.footer["cases"] != len(report.cases):
        raise ReportError(
            f"{path}: cases: the footer counts {report.footer['cases']}, the file has {len(report.cases)}"
        )
    return report


def summary(report: Report) -> str:
    """A few lines for a terminal: a table by group, then every failure with the command that repeats it."""
    lines = [f"{report.header['name']} {report.header['version']} on {report.header['device']}"]
    lines += table([report])
    for case in report.failures:
        lines += [f"{case['status'].upper()} {case['id']}", f"    {case['detail']}", f"    {case['command']}"]
    lines += [f"CAPABILITIES {finding}" for finding in report.footer["findings"]]
    counts = ", ".join(f"{n} {status}" for status, n in sorted(report.footer["counts"].items()))
    lines.append(f"{report.footer['cases']} cases in {report.footer['seconds']} s: {counts or 'none ran'}")
    return "\n".join(lines)


def table(reports: Iterable[Report]) -> list[str]:
    """Lines of implementation x case group."""
    heads = (
        "implementation",
        "cases of",
        "passed",
        "error/bound",
        "bit-exact",
        "silu ulps",
        "states",
        "memory",
    )
    rows = [heads]
    for report in reports:
        for group in dict.fromkeys(case["group"] for case in report.cases):
            cases = [c for c in report.cases if c["group"] == group]
            ran = [c for c in cases if c["status"] not in ("unsupported", "xfailed")]
            worst = max((c["worst"]["fraction"] for c in ran if c["worst"]), default=None)
            exact = [c["bit_exact"] for c in ran if c["bit_exact"] is not None]
            ulps = [c["ulps"] for c in ran if c["ulps"] is not None]
            found = {status for c in ran for status in c["found"]}
            judged = any(c["worst"] or c["expect"] == "undefined" for c in ran)
            left = f", {len(cases) - len(ran)} left out" if len(ran) < len(cases) else ""
            rows.append((
                report.header["name"], group,
                f"{sum(c['status'] == 'passed' for c in ran)}/{len(ran)}{left}",
                "-" if worst is None else f"{worst:.3f}" if worst < 1e6 else "inf",
                "-" if not exact else "yes" if all(exact) else f"{sum(exact)}/{len(exact)}",
                "-" if not ulps else str(max(ulps)),
                "-" if not judged else "WRONG" if "wrong_state" in found else "exact",
                "-" if not judged else "TOUCHED" if "wrong_memory" in found else "untouched",
            ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
