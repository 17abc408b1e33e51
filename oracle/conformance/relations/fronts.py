"""Fronts against the plain operation, and against themselves however a sequence is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from oracle import contract_prologue, reference_prologue
from oracle.conformance.arrays import Array, plain
from oracle.conformance.inputs import Problem
from oracle.conformance.judge import Verdict
from oracle.conformance.relations.rows import Call
from oracle.numerics import TypedArray, is_nan

TOKENS = ("x", "bcx", "a", "b")  # arrays with an entry for each token


def separate_norm(problem: Problem, call: Call) -> Iterator[str]:
    """q, k, v and the states are those of the plain operation and a separate norm behind it."""
    found = call(problem)
    record = contract_prologue.RECORDS[problem.op]
    inside = record(**problem.arrays, **problem.options).convolution()
    arrays = {name: value for name, value in inside._asdict().items() if name in problem.arrays}
    defaults = inside._field_defaults
    options = {
        name: value
        for name, value in inside._asdict().items()
        if name in inside.OPTIONS and (name not in defaults or value != defaults[name])
    }
    convolved = call(Problem(reference_prologue.CONVOLUTIONS[problem.op], arrays, options))
    sizes = record(**problem.typed()).check()
    parts = reference_prologue.separate_norm(convolved.out, sizes, problem.options)
    for name, want in zip("qkv", parts, strict=True):
        yield from _difference(f"a separate norm: {name}", found.parts[name], want)
    if found.conv_states is not None and (found.conv_states.bits != convolved.conv_states.bits).any():
        yield "the plain operation: states differ"


def front_schedules(problem: Problem, call: Call) -> Iterator[str]:
    """Both schedules give the same bits."""
    found = call(problem)
    for schedule in ("per_sequence", "flat"):
        again = call(problem.with_options(schedule=schedule))
        yield from _differences(f"schedule {schedule}", _results(found), _results(again))
        if (found.conv_states.bits != again.conv_states.bits).any():
            yield f"schedule {schedule}: states differ"


def front_split(problem: Problem, call: Call) -> Iterator[str]:
    """A prefill in two chunks is one prefill."""
    offsets = problem.arrays["query_start_loc"].data.astype(np.int64)
    rows = [np.arange(start, stop) for start, stop in itertools.pairwise(offsets)]
    whole = call(problem)
    for at in (1, 2, 4):
        first = _prefill(problem, [row[:at] for row in rows])
        head = call(first)
        second = _prefill(problem, [row[at:] for row in rows], head.conv_states)
        tail = call(second)
        order = np.argsort(np.concatenate([row[:at] for row in rows] + [row[at:] for row in rows]))
        joined = {
            name: None if part is None else np.concatenate([part.bits, _results(tail)[name].bits])[order]
            for name, part in _results(head).items()
        }
        yield from _bits_differ(f"split at {at}", _results(whole), joined)
        if (whole.conv_states.bits != tail.conv_states.bits).any():
            yield f"split at {at}: states differ"


def front_steps(problem: Problem, call: Call) -> Iterator[str]:
    """A decode step of n tokens a row is n steps of one token."""
    whole, states, parts = call(problem), problem.arrays["conv_states"].typed, []
    steps = (problem.arrays.get("x") or problem.arrays["bcx"]).shape[1]
    for t in range(steps):
        arrays = {
            name: _tokens_of(problem.arrays[name], np.s_[:, t]) for name in TOKENS if name in problem.arrays
        }
        step = call(problem.with_arrays(**arrays, conv_states=plain(states)))
        states = step.conv_states
        parts.append(_results(step))
    joined = {
        name: None if part is None else np.stack([step[name].bits for step in parts], axis=1)
        for name, part in _results(whole).items()
    }
    yield from _bits_differ("token by token", _results(whole), joined)
    if (whole.conv_states.bits != states.bits).any():
        yield "token by token: states differ"


def _prefill(problem: Problem, rows: list[np.ndarray], states: TypedArray | None = None) -> Problem:
    """A prefill of these tokens of a packed problem, of rows that continue from `states`, if they are given."""
    kept = np.concatenate(rows)
    arrays: dict[str, Any] = {
        name: _tokens_of(problem.arrays[name], kept) for name in TOKENS if name in problem.arrays
    }
    offsets = np.cumsum([0] + [len(row) for row in rows]).astype("int32")
    arrays["query_start_loc"] = plain(offsets)
    if states is not None:
        arrays["conv_states"] = plain(states)
        arrays["has_initial_state"] = plain(TypedArray("bool", np.ones(len(rows), bool)))
    return problem.with_arrays(**arrays)


def _tokens_of(array: Array | None, kept: Any) -> Array | None:
    return None if array is None else plain(TypedArray(array.dtype, np.ascontiguousarray(array.data[kept])))


def _results(verdict: Verdict) -> dict[str, TypedArray | None]:
    return verdict.parts or {"out": verdict.out}


def _differences(label: str, first: Any, again: Any) -> Iterator[str]:
    yield from _bits_differ(label, first, {name: part and part.bits for name, part in again.items()})


def _bits_differ(label: str, want: Any, bits: Any) -> Iterator[str]:
    for name, part in want.items():
        if part is not None and (different := int((part.bits != bits[name]).sum())):
            yield f"{label}: {different} elements of {name} differ in bits"


def _difference(label: str, got: TypedArray, want: TypedArray) -> Iterator[str]:
    differs = (got.bits != want.bits) & ~(is_nan(got.bits, got.dtype) & is_nan(want.bits, got.dtype))
    if differs.any():
        at = tuple(int(i) for i in np.argwhere(differs)[0])
        yield (f"{label}: {int(differs.sum())} of {differs.size} elements differ in bits, the first at {list(at)}: "
               f"0x{int(want.bits[at]):x} and 0x{int(got.bits[at]):x}")  # fmt: skip
