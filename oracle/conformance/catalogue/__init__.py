"""The catalogue: every case, as data. Ids are stable; a changed case gets a new id."""

from __future__ import annotations

import functools

from oracle.conformance.cases import Case
from oracle.conformance.catalogue import (
    arithmetic,
    errors,
    fronts,
    gradients,
    memory,
    paths,
    prefixes,
    rows,
    scale,
    slots,
    trees,
    verify,
)  # fmt: skip
from oracle.conformance.catalogue.builders import BACKWARD, FN, UPDATE, backward, commit, fn, links, update

__all__ = [
    "BACKWARD", "FN", "UPDATE", "backward", "catalogue", "commit", "find", "fn", "links", "update",
]  # fmt: skip

# In the order of reports. A new section comes last.
SECTIONS = (
    arithmetic.values, arithmetic.dtypes, rows.boundaries, rows.states, slots.numbers, memory.layouts, paths.plain,
    errors.calls, errors.hostile, rows.batches, scale.wide, scale.large, verify.packed, verify.rolling, paths.steps,
    errors.steps, errors.hostile_steps, slots.layouts, slots.write_slots, prefixes.snapshots, prefixes.tracks,
    prefixes.empty_rows, verify.windows, verify.commits, trees.trees, arithmetic.fused, paths.serving, errors.serving,
    errors.hostile_serving, scale.serving, gradients.values, gradients.layouts, gradients.relations,
    gradients.bad_calls, slots.unsigned, fronts.prologues, fronts.steps, fronts.gated_convolutions, fronts.bad_calls,
    fronts.prologue_gradients, fronts.gated_gradients, paths.models,
)  # fmt: skip


@functools.cache
def catalogue() -> tuple[Case, ...]:
    """Every case, in a fixed order."""
    return tuple(case for section in SECTIONS for case in section())


def find(case_id: str) -> Case:
    """The case with this id.

    Raises:
      ValueError: there is none.
    """
    for case in catalogue():
        if case.id == case_id:
            return case
    raise ValueError(f"case: expected an id of the catalogue, got {case_id!r}")
