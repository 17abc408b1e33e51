"""Fronts against the plain operation, and against themselves however a sequence is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
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
    joined = np.concatenate([part.bits.reshape(*found.out.shape[:-1], -1) for part in parts], axis=-1)
    yield from _differences("a separate norm", found, {"out": joined})
    if found.conv_states is not None and (found.conv_states.bits != convolved.conv_states.bits).any():
        yield "the plain operation: states differ"


def front_schedules(problem: Problem, call: Call) -> Iterator[str]:
    """Both schedules give the same bits."""
    found = call(problem)
    for schedule in ("per_sequence", "flat"):
        again = call(problem.with_options(schedule=schedule))
        yield from _differences(f"schedule {schedule}", found, _bits(again))
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
        later = _bits(tail)
        joined = {name: np.concatenate([bits, later[name]])[order] for name, bits in _bits(head).items()}
        yield from _differences(f"split at {at}", whole, joined)
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
        parts.append(_bits(step))
    joined = {name: np.stack([step[name] for step in parts], axis=1) for name in parts[0]}
    yield from _differences("token by token", whole, joined)
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


def _bits(verdict: Verdict) -> dict[str, np.ndarray]:
    """The bits of what came back but states: q, k and v joined, as they lie in the weight; or out."""
    gates = {name: verdict.parts.get(name) for name in ("g", "beta")}
    return {"out": verdict.out.bits} | {name: gate.bits for name, gate in gates.items() if gate is not None}


def _differences(label: str, want: Verdict, again: Mapping[str, np.ndarray]) -> Iterator[str]:
    wanted = _bits(want)
    for name, bits in again.items():
        differs, dtype = wanted[name] != bits, want.out.dtype if name == "out" else "float32"
        differs &= ~(is_nan(wanted[name], dtype) & is_nan(bits, dtype))
        if differs.any():
            at = tuple(int(i) for i in np.argwhere(differs)[0])
            yield (f"{label}: {int(differs.sum())} of {differs.size} elements of {name} differ in bits, the first at "
                   f"{list(at)}: 0x{int(wanted[name][at]):x} and 0x{int(bits[at]):x}")  # fmt: skip
