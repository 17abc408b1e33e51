"""Wrong-on-purpose references: each makes one mistake of `flags`, and the suite must fail it.

A check that has not been shown to fail does not count.
"""

from __future__ import annotations

import contextlib

from oracle.conformance import catalogue
from oracle.conformance.judge import Promises
from oracle.conformance.mutants import (
    arithmetic,
    boundaries,
    calls,
    fronts,
    gradients,
    memory,
    serving,
    slots,
    speculative,
    states,
)
from oracle.conformance.mutants.base import MUTANTS, Mutant
from oracle.conformance.worker import run_case

__all__ = [
    "MUTANTS", "Mutant", "arithmetic", "boundaries", "calls", "first_failure", "fronts", "gradients", "memory", "serving", "slots",
    "speculative", "states",
]  # fmt: skip


def first_failure(mutant: type[Mutant]) -> tuple[str, str] | None:
    """The id and status of the first case that carries the mutant's flag and fails it; None if all pass.

    Mutants that never return are run in a process of their own with a short limit.
    """
    order = {"core": 0, "full": 1, "large": 2}
    cases = sorted((c for c in catalogue.catalogue() if mutant.flag in c.flags), key=lambda c: order[c.tier])
    if mutant.hangs:
        from oracle.conformance import runner

        spec = f"{mutant.__module__}:{mutant.__name__}"
        with contextlib.suppress(runner.ImplementationError):
            for record in runner.run(spec, cases[:1], time_limit=3.0).failures:
                return record["id"], record["status"]
        return None
    for case in cases:
        verdict = run_case(mutant(), case, Promises())
        if verdict.status != "passed":
            return case.id, verdict.status
    return None
