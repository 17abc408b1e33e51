"""The commands of `python -m oracle`.

Exit status: 0 all right, 1 something disagrees, 2 a wrong command or nothing judged, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oracle.conformance import ledger, nearest, runner
from oracle.conformance import report as reports
from oracle.conformance.adapter import OPS
from oracle.conformance.cases import TIERS, Case, select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.flags import FLAGS

VECTORS = Path(__file__).resolve().parent.parent / "vectors" / "v1"


def main(arguments: list[str] | None = None) -> int:
    """Parses a command line and runs it."""
    parser = argparse.ArgumentParser(prog="python -m oracle", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    sub = command("run", _run, "Judge an implementation.")
    sub.add_argument("--impl", required=True, help="package.module:adapter, or process:command")
    sub.add_argument("--device", help="handed to the adapter, for example cuda")
    _selection(sub)
    sub.add_argument("--report", help="write the report to this JSON Lines file")
    sub.add_argument(
        "--known-failures", metavar="FILE", help="ledger of cases that are known to fail, with reasons"
    )
    sub.add_argument("--case-file", metavar="FILE", help="cases as JSON Lines, as `list --json` prints them")
    sub.add_argument("--time-limit", type=float, default=300.0, help="seconds a case may take (300)")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (1)")
    sub.add_argument(
        "--no-probe", action="store_true", help="do not try cases that the implementation denies"
    )

    sub = command("report", _report, "Make one HTML page of reports: implementations by failure modes.")
    sub.add_argument("reports", nargs="+", help="JSON Lines files that `run --report` wrote")
    sub.add_argument("-o", "--output", required=True, help="the page; a name in .md gets the bare table")

    sub = command("list", _list, "List cases, or what they are made of.")
    _selection(sub)
    sub.add_argument("--json", action="store_true", help="whole cases, one JSON object a line")
    sub.add_argument("--features", action="store_true", help="feature strings that capabilities() may deny")
    sub.add_argument(
        "--flags", action="store_true", help="failure modes: what goes wrong, the rule, references"
    )

    sub = command("mutants", _mutants, "Show which case fails each wrong-on-purpose reference.")
    sub.add_argument("--only", help="a mutant's name")

    sub = command(
        "engine", _engine, "Serve random traffic; every request must end with the bits of its own plain run."
    )
    sub.add_argument("--impl", required=True, help="package.module:adapter")
    sub.add_argument("--device", help="handed to the adapter, for example cuda")
    sub.add_argument(
        "--steps", type=int, default=2000, help="of the engine; layouts but the first get a quarter (2000)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of everything that is random (0)")

    sub = command("demo", _demo, "Run serving batches through both twins and compare them with the oracle.")
    sub.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the kernels run (default: what there is)"
    )

    sub = command("freeze", _freeze, "Write the frozen vectors of a new version.")
    sub.add_argument("--folder", default=str(VECTORS), help="a folder that holds none yet")
    sub = command(
        "verify-vectors", _verify, "Check the frozen vectors: hashes, structure, and the reference."
    )
    sub.add_argument("--folder", default=str(VECTORS))

    options = parser.parse_args(arguments)
    try:
        status = options.function(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # of `list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, runner.ImplementationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", action="append", default=[], metavar="GLOB", help="case ids, may be repeated"
    )
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--flag", action="append", default=[], help="cases that carry this failure mode")
    parser.add_argument(
        "--tier", action="append", choices=TIERS, help="core, full, large (default: core and full)"
    )


def _selected(options: Any) -> list[Case]:
    return select(
        catalogue(), tiers=options.tier or (), patterns=options.cases, op=options.op, flags=options.flag
    )


def _run(options: Any) -> int:
    entries = ledger.read(options.known_failures) if options.known_failures else []
    if options.report:
        reports.check_path(options.report)
    result = runner.run(
        options.impl,
        _cases_of(options.case_file) if options.case_file else _selected(options),
        device=options.device,
        time_limit=options.time_limit,
        probe=not options.no_probe,
        jobs=options.jobs,
        progress=runner.Progress(options.impl.rpartition(":")[2]),
    )
    result = ledger.apply(result, entries)
    if options.report:
        reports.write(result, options.report)
    print(reports.summary(result))
    if result.failures:
        print("\n".join(nearest.words(result)))
    if result.interrupted:
        return 130
    if not result.judged:
        print("error: nothing was judged: no case ran for its result", file=sys.stderr)
        return 2
    return 0 if result.good else 1


def _cases_of(path: str) -> list[Case]:
    return [Case.from_json(json.loads(line)) for line in Path(path).read_text().splitlines() if line.strip()]


def _report(options: Any) -> int:
    from oracle.conformance.html import matrix, page

    make = matrix if options.output.endswith(".md") else page
    Path(options.output).write_text(make([reports.read(path) for path in options.reports]))
    print(f"{len(options.reports)} reports in {options.output}")
    return 0


def _list(options: Any) -> int:
    cases = _selected(options)
    if options.flags:
        for flag in FLAGS.values():
            print(f"{flag.id} ({flag.kind}): {flag.wrong}\n    rule: {flag.rule}")
            if flag.references:
                print(f"    seen: {', '.join(flag.references)}")
    elif options.features:
        print("\n".join(sorted({feature for case in cases for feature in case.features})))
    elif options.json:
        for case in cases:
            print(json.dumps(case.to_json()))
    else:
        for case in cases:
            print(f"{case.id:<44} {case.tier:<6} {' '.join(case.flags)}")
        print(f"{len(cases)} cases")
    return 0


def _mutants(options: Any) -> int:
    from oracle.conformance.mutants import MUTANTS, first_failure

    names = [options.only] if options.only else list(MUTANTS)
    missed = 0
    for name in names:
        if name not in MUTANTS:
            raise ValueError(f"only: expected the name of a mutant, got {name!r}")
        found = first_failure(MUTANTS[name])
        missed += found is None
        print(
            f"{name:<42} {MUTANTS[name].flag:<36} "
            + ("NOT CAUGHT" if found is None else f"{found[1]} in {found[0]}")
        )
    print(f"{len(names)} mutants, {len(names) - missed} caught")
    return 1 if missed else 0


def _freeze(options: Any) -> int:
    from oracle.conformance.vectors import freeze

    print(f"{freeze(Path(options.folder))} vectors written to {options.folder}")
    return 0


def _verify(options: Any) -> int:
    from oracle.conformance.vectors import VectorError, verify

    try:
        print(f"{verify(Path(options.folder))} vectors: hashes, structure and reference agree")
    except VectorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _engine(options: Any) -> int:
    from oracle.conformance.loading import load_adapter
    from oracle.conformance.traffic.engine import EngineFailure, run_engines

    if options.steps < 1:
        raise ValueError(f"steps: expected at least 1, got {options.steps}")
    adapter = load_adapter(options.impl, options.device)
    try:
        counts = run_engines(adapter, options.steps, options.seed)
    except EngineFailure as failure:
        print(f"FAILED: {failure}")
        return 1
    for layout, done in counts.items():
        print(f"{layout}: " + ", ".join(f"{count} {what}" for what, count in sorted(done.items())))
    ended = sum(done["ended"] for done in counts.values())
    print(f"{adapter.name} {adapter.version}: {ended} requests, each with the bits of its plain run")
    return 0


def _demo(options: Any) -> int:
    from oracle.conformance.demo import demo

    return demo(options.device)
