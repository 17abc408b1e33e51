"""Known failures: a file that lives with the implementation, never with the suite.

    [[failure]]
    cases = "fn/layout-x-transposed-*"      # glob of case ids
    reason = "the TPU path copies x; issue 41"

A case that an entry names and that fails is "xfailed". One that passes is "xpassed" and an error, and so is an
entry that names no case of the run: a stale ledger hides the next failure. With `sometimes = true`, of what depends on the
machine, a case that passes counts as passed.
"""

from __future__ import annotations

import fnmatch
import tomllib
from dataclasses import dataclass
from pathlib import Path

from oracle.conformance import report as reports
from oracle.conformance.report import GOOD, Report


@dataclass(frozen=True)
class Entry:
    """One known failure: a glob of case ids, why they fail, and whether on some machines only."""

    cases: str
    reason: str
    sometimes: bool = False


def read(path: str | Path) -> list[Entry]:
    """Reads a ledger.

    Raises:
      ValueError: naming file, entry and field.
    """
    try:
        data = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: expected a TOML file, got {error}") from error
    if unknown := set(data) - {"failure"}:
        raise ValueError(f"{path}: expected [[failure]] entries only, got {sorted(unknown)}")
    entries = []
    for number, entry in enumerate(data.get("failure", []), 1):
        if set(entry) - {"sometimes"} != {"cases", "reason"}:
            raise ValueError(
                f"{path}: failure {number}: expected the fields cases and reason, and perhaps sometimes, got {sorted(entry)}"
            )
        for field in ("cases", "reason"):
            if not isinstance(value := entry[field], str) or not value.strip():
                raise ValueError(f"{path}: failure {number}: {field}: expected text, got {value!r}")
        if not isinstance(value := entry.get("sometimes", False), bool):
            raise ValueError(f"{path}: failure {number}: sometimes: expected true or false, got {value!r}")
        entries.append(Entry(**entry))
    return entries


def find(path: str | Path, near: Path) -> Path:
    """A ledger's path: as it is, or seen from a folder or from any folder that it lies in.

    Raises:
      ValueError: there is no such file.
    """
    folders = [near, *near.parents]
    for folder in [Path(), *folders]:
        if (folder / path).is_file():
            return folder / path
    raise ValueError(
        f"{path}: expected a file in the working folder, {near} or a folder above it, found none"
    )


def apply(report: Report, entries: list[Entry]) -> Report:
    """The report with known failures marked, and every stale entry as a finding."""
    findings, cases = list(report.footer["findings"]), []
    for case in report.cases:
        known = case["status"] not in GOOD
        reasons = [
            entry.reason
            for entry in entries
            if fnmatch.fnmatchcase(case["id"], entry.cases) and (known or not entry.sometimes)
        ]
        if reasons and case["status"] != "unsupported":
            detail = f"known: {'; '.join(reasons)}" + (
                f" ({case['status']}: {case['detail']})" if known else ", but it passes"
            )
            case = {**case, "status": "xfailed" if known else "xpassed", "detail": detail}
        cases.append(case)
    for entry in entries:
        if not any(fnmatch.fnmatchcase(case["id"], entry.cases) for case in report.cases):
            findings.append(f"known failure {entry.cases!r} names no case of this run")
    return reports.close(report.header, cases, report.footer["seconds"], findings)
