"""The process that holds one implementation: reads cases, writes records, one JSON object a line.

Started by `runner`, never by hand. Whatever the implementation prints goes to stderr, so that it cannot
garble the records.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from typing import Any

import numpy as np

from oracle.conformance import inputs, relations
from oracle.conformance.adapter import Adapter
from oracle.conformance.cases import Case
from oracle.conformance.judge import Promises, Verdict, evaluate, promises_of
from oracle.conformance.loading import NotFound, load_adapter


class RelationFailed(Exception):
    """A call inside a relation was wrong; carries its verdict."""


def run_case(adapter: Adapter, case: Case, promises: Promises) -> Verdict:
    """Runs and judges one case: its call, and its relation if it has one."""
    verdict = evaluate(adapter, inputs.build(case), promises, case.expect)
    if case.relation is None or verdict.status != "passed":
        return verdict

    def call(problem: inputs.Problem) -> Verdict:
        part = evaluate(adapter, problem, promises)
        if part.status != "passed":
            raise RelationFailed(part.status, part.detail)
        return part

    promised = promises.path_invariant and (promises.bit_exact or case.relation not in relations.FROM_BITS)
    try:
        for difference in relations.RELATIONS[case.relation](inputs.build(case), call):
            if promised:
                verdict.fail(
                    "wrong_state" if difference.endswith("states differ") else "wrong_value", difference
                )
    except RelationFailed as error:
        status, detail = error.args
        verdict.fail(status, f"in relation {case.relation}: {detail}")
    return verdict


def main(arguments: list[str] | None = None) -> None:
    """Serves cases on stdin until it closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--impl", required=True)
    parser.add_argument("--device")
    parser.add_argument("--outputs", help="file for the output bits of every passed value case")
    options = parser.parse_args(arguments)

    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(record: dict[str, Any]) -> None:
        channel.write(json.dumps(record) + "\n")

    try:
        adapter = load_adapter(options.impl, options.device)
        hello = {
            "name": adapter.name,
            "version": str(adapter.version),
            "capabilities": dict(adapter.capabilities()),
        }
        promises = promises_of(adapter)
    except NotFound as error:
        say({"failed": str(error)})
        return
    except Exception as error:
        traceback.print_exc()
        say({"failed": f"{type(error).__name__}: {error}"})
        return
    environment = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
    }
    say({"hello": hello, "environment": environment})

    outputs: dict[str, np.ndarray] = {}
    for line in sys.stdin:
        case = Case.from_json(json.loads(line))
        start = time.perf_counter()
        verdict = run_case(adapter, case, promises)
        say({"status": verdict.status, "detail": verdict.detail, "seconds": round(time.perf_counter() - start, 4),
             **verdict.numbers()})  # fmt: skip
        if verdict.out is not None and case.expect == "value":
            outputs[case.id] = verdict.out.bits
    if options.outputs:
        np.savez(options.outputs, **{name.replace("/", "|"): bits for name, bits in outputs.items()})


if __name__ == "__main__":
    main()
