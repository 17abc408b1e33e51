"""The table of public implementations by failure modes, with the cause of every failure.

One cause fails many cases, and a case carries several failure modes. So a cell of the table names the causes of its
failures, which `causes.toml` describes; a failure that no cause explains is marked with a question mark.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle.conformance.flags import FLAGS
from oracle.conformance.report import Report

CAUSES = Path(__file__).with_name("causes.toml")
WHOSE = ("fault", "limit", "choice", "platform")


@dataclass(frozen=True)
class Cause:
    """Why cases of some peers fail, found by looking at them.

    Attributes:
      key: one or two letters, as in the table.
      peers: names of implementations, as reports have them.
      whose: "fault": wrong by the peer's own account; "limit": outside of what it was made for, and not refused; "choice":
        the peer defines it otherwise, or leaves it open; "platform": the compiler or interpreter it ran on.
      what: what happens.
      seen: where it is known.
      cases, flags, detail: what such a failure looks like: a glob of its id, one of its failure modes, a part of its
        text. All that are given must match.
    """

    key: str
    peers: tuple[str, ...]
    whose: str
    what: str
    seen: tuple[str, ...] = ()
    cases: tuple[str, ...] = ("*",)
    flags: tuple[str, ...] = ()
    detail: str = ""

    def explains(self, name: str, case: Mapping[str, Any]) -> bool:
        """Whether a failing case of the implementation `name` looks like this."""
        return (
            name in self.peers
            and any(fnmatch.fnmatchcase(case["id"], pattern) for pattern in self.cases)
            and (not self.flags or not set(self.flags).isdisjoint(case["flags"]))
            and self.detail in case["detail"]
        )


def causes(path: Path = CAUSES) -> list[Cause]:
    """The causes, in the order of the file.

    Raises:
      ValueError: naming the entry and what is wrong with it.
    """
    found = []
    for number, entry in enumerate(tomllib.loads(path.read_text())["cause"], 1):
        try:
            cause = Cause(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        except TypeError as error:
            raise ValueError(f"{path}: cause {number}: {error}") from error
        if cause.whose not in WHOSE:
            raise ValueError(f"{path}: cause {number}: whose: expected one of {WHOSE}, got {cause.whose!r}")
        found.append(cause)
    return found


def keys(report: Report, case: Mapping[str, Any], known: Iterable[Cause]) -> list[str]:
    """The keys of the causes of a failing case; "?" if there is none."""
    name = report.header["name"]
    return [cause.key for cause in known if cause.explains(name, case)] or ["?"]


def label(report: Report) -> str:
    """The implementation, and where it ran if that was no CPU."""
    name, device = report.header["name"], report.header["device"]
    return name if device.startswith("cpu") else f"{name} on GPU"


def write(reports: list[Report], known: list[Cause]) -> str:
    """The page, in Markdown."""
    lines = ["# Public implementations by failure modes", ""]
    lines += ["Written by `python -m benchmarks.peers`; how to read it is in "
              "[benchmarks/peers](https://github.com/twinconv/twinconv/blob/main/benchmarks/peers/README.md). What "
              "our own adapters do otherwise than these peers is [beside it](adapters.md).", ""]  # fmt: skip
    lines += ["| implementation | on | suite | date | cases | passed | failed | cannot |", "|---" * 8 + "|"]
    for report in reports:
        header, ran = report.header, report.cases
        passed = sum(case["status"] == "passed" for case in ran)
        lines.append(f"| {header['name']} {header['version']} | {header['device']} | {header['suite']} | "
                     f"{header['started'][:10]} | {header['cases']} | {passed} | {len(report.failures)} | "
                     f"{header['cases'] - len(ran)} |")  # fmt: skip
    lines += [
        "",
        "## Causes",
        "",
        "| | whose | implementation: cases | what happens | known as |",
        "|---" * 5 + "|",
    ]
    for cause in known:
        counts = {
            label(r): n
            for r in reports
            if (n := sum(cause.explains(r.header["name"], case) for case in r.failures))
        }
        if counts:
            where = ", ".join(f"{name}: {n}" for name, n in counts.items())
            lines.append(
                f"| {cause.key} | {cause.whose} | {where} | {cause.what} | {', '.join(cause.seen)} |"
            )
    lines += ["", "## Failure modes", "", "Cases passed of those run, and the causes of the others, faults in bold. "
              "Empty: it can run none.", ""]  # fmt: skip
    lines += ["| failure mode | " + " | ".join(label(r) for r in reports) + " |"]
    lines += ["|---" * (len(reports) + 1) + "|"]
    for flag in FLAGS:
        cells = [_cell(report, flag, known) for report in reports]
        if any(cells):
            lines.append(f"| {flag} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(report: Report, flag: str, known: list[Cause]) -> str:
    ran = [case for case in report.cases if flag in case["flags"]]
    if not ran:
        return ""
    passed = sum(case["status"] == "passed" for case in ran)
    reasons = {key for case in ran if case["status"] != "passed" for key in keys(report, case, known)}
    faults = {cause.key for cause in known if cause.whose == "fault" and report.header["name"] in cause.peers}
    order = dict.fromkeys([*(cause.key for cause in known if cause.key in reasons), *sorted(reasons)])
    return " ".join([f"{passed}/{len(ran)}", *(f"**{key}**" if key in faults else key for key in order)])
