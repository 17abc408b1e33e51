"""Gradients: the same call gives the same bits, in either schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from oracle.conformance.inputs import Problem
from oracle.conformance.relations.rows import Call


def backward_schedules(problem: Problem, call: Call) -> Iterator[str]:
    """Both schedules, with any bound of the row lengths, give the same bits."""
    first = call(problem).gradients
    longest = int(np.diff(problem.arrays["query_start_loc"].data).max())
    for schedule in ("per_sequence", "flat"):
        for bound in (None, longest, 1):
            again = call(problem.with_options(schedule=schedule, max_seqlen=bound)).gradients
            yield from _differences(f"schedule {schedule} with max_seqlen {bound}", first, again)


def backward_repeat(problem: Problem, call: Call) -> Iterator[str]:
    """The same call on the same inputs gives the same bits."""
    first = call(problem).gradients
    for attempt in (2, 3):
        yield from _differences(f"call {attempt}", first, call(problem).gradients)


def _differences(label: str, first: Any, again: Any) -> Iterator[str]:
    for name, array in first.items():
        if array is not None and (different := int((array.bits != again[name].bits).sum())):
            yield f"{label}: {different} elements of {name} differ in bits"
