"""The mutants that fail most nearly as an implementation does: a guess at what is wrong with it.

`mutants.json` holds, of cases that tell mutants apart, those that fail each mutant. It is data, so that a run need not
repeat them; a test says when it is stale, and `python -m oracle.conformance.nearest` writes it again.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from oracle.conformance.cases import Case
from oracle.conformance.catalogue import catalogue
from oracle.conformance.judge import Promises
from oracle.conformance.mutants import MUTANTS, first_failure
from oracle.conformance.report import Report
from oracle.conformance.worker import run_case

FILE = "mutants.json"


class Guess(NamedTuple):
    """A mutant; how near it is, failures that both have over those that either has; and how many both have."""

    name: str
    nearness: float
    shared: int


@functools.cache
def table() -> Mapping[str, Mapping[str, str]]:
    """Of every mutant, case -> status of the cases that fail it."""
    cases = _data()["cases"]
    return {
        name: {cases[i]: status for status, text in failing.items() for i in numbers_of(text)}
        for name, failing in _data()["mutants"].items()
    }


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(resources.files("oracle.conformance").joinpath(FILE).read_text())


def guesses(found: Mapping[str, str], ran: Iterable[str]) -> list[Guess]:
    """Mutants by nearness, those that share no failure left out.

    Args:
      found: case -> status of the cases that failed.
      ran: the cases that were judged, failed or not.
    """
    cases = set(ran).intersection(_data()["cases"])
    mine, rows = {item for item in found.items() if item[0] in cases}, []
    for name, failing in table().items():
        theirs = {item for item in failing.items() if item[0] in cases}
        if shared := len(mine & theirs):
            rows.append(Guess(name, shared / len(mine | theirs), shared))
    return sorted(rows, key=lambda guess: -guess.nearness)


def words(report: Report, most: int = 3) -> list[str]:
    """Lines for a terminal: the mutants nearest to a report with failures."""
    ran = [case["id"] for case in report.cases if case["status"] != "unsupported"]
    found = {case["id"]: case["status"] for case in report.failures}
    rows = guesses(found, ran)
    if set(found).isdisjoint(_data()["cases"]):
        return [
            "NEAREST no guess: none of these failures is of a case that known mistakes were tried on; run the core tier"
        ]
    if not rows:
        return ["NEAREST no known mistake fails these cases in this way"]
    lines, known = [], len(set(found).intersection(_data()["cases"]))
    for guess in rows[:most]:
        mutant = MUTANTS[guess.name]
        lines.append(f"NEAREST {guess.name} ({mutant.flag}): {' '.join(mutant.__doc__.split())}")
        lines.append(
            f"    {guess.nearness:.0%} alike: it has {guess.shared} of the {known} failures among the cases that are known of it"
        )
    if (ties := sum(guess.nearness == rows[0].nearness for guess in rows)) > most:
        lines.append(f"    {ties} known mistakes are as near; more cases tell them apart")
    return lines


def failing(name: str, cases: Iterable[Case]) -> dict[str, str]:
    """Case -> status of the cases that fail a mutant. One that never returns has its sleep cut short."""
    adapter, found = MUTANTS[name](), {}
    with mock.patch.object(time, "sleep", side_effect=TimeoutError("it does not return")):
        for case in cases:
            verdict = run_case(adapter, case, Promises())
            if verdict.status != "passed":
                late = "it does not return" in verdict.detail
                claimed = "wrong_error" if verdict.status == "unsupported" else verdict.status  # as in a run
                found[case.id] = "timed_out" if late else claimed
    return found


def chosen() -> list[Case]:
    """The cases of the table: small ones that tell mutants apart, for a new mutant the first one that fails it."""
    names = dict.fromkeys(_data()["cases"])
    for name, mutant in MUTANTS.items():
        if name not in _data()["mutants"] and (found := first_failure(mutant)):
            names[found[0]] = None
    return [case for case in catalogue() if case.id in names]


def write(found: Mapping[str, Mapping[str, str]], cases: Iterable[Case], path: Path) -> None:
    """Writes the table, mutant -> case -> status, with cases by their numbers."""
    names = [case.id for case in cases]
    places = {case: number for number, case in enumerate(names)}
    rows = []
    for name, failed in found.items():
        row = {
            s: text_of(sorted(places[case] for case, got in failed.items() if got == s))
            for s in sorted(set(failed.values()))
        }
        rows.append(f"{json.dumps(name)}: {json.dumps(row)}")
    text = ",\n".join(rows)
    path.write_text(f'{{"cases": {json.dumps(names)},\n"mutants": {{\n{text}\n}}}}\n')


def numbers_of(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def text_of(numbers: list[int]) -> str:
    """Sorted numbers as ranges: "3-17,20"."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ",".join(parts)


def main() -> None:
    """Measures every mutant, on all processors, and writes the table."""
    from concurrent.futures import ProcessPoolExecutor

    cases = chosen()
    with ProcessPoolExecutor() as pool:
        found = dict(zip(MUTANTS, pool.map(functools.partial(failing, cases=cases), MUTANTS), strict=True))
    write(found, cases, Path(__file__).with_name(FILE))


if __name__ == "__main__":
    main()
