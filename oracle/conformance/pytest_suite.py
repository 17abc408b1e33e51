"""The suite as a project's own pytest tests, one test a case:

    # tests/test_conformance.py
    from oracle.conformance.pytest_suite import conformance_tests

    test_conformance = conformance_tests("my_package.adapter:adapter", known_failures="known_failures.toml")

The implementation runs in a process of its own, once, when the first test starts.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from oracle.conformance import ledger, runner
from oracle.conformance import report as reports
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.report import Report

WHOLE = "(capabilities and known failures)"


def conformance_tests(
    impl: str,
    *,
    device: str | None = None,
    tiers: Iterable[str] = ("core", "full"),
    cases: Iterable[str] = (),
    known_failures: str | Path | None = None,
    time_limit: float = 300.0,
    total_limit: float = 1800.0,
    environment: dict[str, str] | None = None,
    report: str | Path | None = None,
) -> Callable[..., None]:
    """Makes a parametrised test function; assign it to a name that starts with test_.

    Args:
      impl: "package.module:adapter" or "process:command".
      device: handed to the adapter.
      tiers: core, full, large.
      cases: globs of case ids; default all.
      known_failures: a ledger; see `ledger`. A relative path is looked for in the working folder, beside the file that calls
        this, and in the folders above it.
      time_limit: seconds a case may take.
      total_limit: seconds for the first test, which runs all cases (for the pytest-timeout plugin).
      environment: extra environment variables of the implementation's process.
      report: where to leave the report, for `python -m oracle report`.

    Raises:
      ValueError: a pattern matches nothing, or the ledger is damaged.
    """
    chosen = select(catalogue(), tiers=tiers, patterns=cases)
    caller = Path(sys._getframe(1).f_code.co_filename).resolve().parent
    entries = ledger.read(ledger.find(known_failures, caller)) if known_failures else []

    @functools.cache
    def judged() -> Report:
        result = runner.run(impl, chosen, device=device, time_limit=time_limit, environment=environment)
        result = ledger.apply(result, entries)
        if report:
            Path(report).parent.mkdir(parents=True, exist_ok=True)
            reports.write(result, report)
        return result

    @pytest.mark.parametrize("case_id", [case.id for case in chosen] + [WHOLE])
    def test(case_id: str) -> None:
        result = judged()
        if case_id == WHOLE:
            assert not result.footer["findings"], "\n".join(result.footer["findings"])
            assert result.judged, "nothing was judged: capabilities() denies every case"
            return
        (record,) = [case for case in result.cases if case["id"] == case_id]
        if record["status"] == "unsupported":
            pytest.skip(record["detail"])
        if record["status"] == "xfailed":
            pytest.xfail(record["detail"])
        assert record["status"] == "passed", (
            f"{record['status']}: {record['detail']}\nrepeat: {record['command']}"
        )

    has_timeouts = importlib.util.find_spec("pytest_timeout") is not None
    return pytest.mark.timeout(total_limit)(test) if has_timeouts else test
