"""Frozen vectors: a small set of cases with arguments and allowed results as bit patterns, for any language.

`freeze` writes a version once, `verify` checks hashes, structure and that the reference still agrees. Frozen
files are never edited; a mistake is mended in the next version, with a note in the changelog.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from oracle import contract, reference
from oracle.conformance import codec, inputs, schema
from oracle.conformance.cases import Case
from oracle.conformance.catalogue import catalogue
from oracle.conformance.flags import FLAGS
from oracle.conformance.judge import EXACT_FROM, exact_bits
from oracle.conformance.runner import SUITE_VERSION
from oracle.numerics import FORMATS, TypedArray, from_bits, is_nan, round_bits, silu, to_float64, ulp_distance
from oracle.tolerance import error_bound

FOLDER = Path(__file__).resolve().parent.parent / "vectors" / "v1"
SCHEMA = "vector_v1.json"
SMALL, LARGEST = 900, 6000  # elements of all arguments; the second where a failure mode has no smaller case


class VectorError(ValueError):
    """Damaged or outdated vectors; the text names file and field."""


def chosen() -> list[Case]:
    """For every failure mode that a single call can show, its smallest cases of each operation.

    The format has no place for windows per step, parts of an output and the two operations without one, so cases
    of the serving arguments are left out.
    """
    found: dict[str, Case] = {}
    sizes = {
        c.id: _size(c)
        for c in catalogue()
        if c.tier != "large" and c.relation is None and c.expect != "undefined" and not c.serving
    }
    for flag in FLAGS:
        for op in ("causal_conv1d_fn", "causal_conv1d_update"):
            cases = [
                c for c in catalogue() if c.id in sizes and c.op == op and flag in c.flags and not c.layout
            ]
            errors = [c for c in cases if c.expect != "value"]
            values = sorted((c for c in cases if c.expect == "value"), key=lambda c: sizes[c.id])
            few = [c for c in values[:2] if sizes[c.id] <= SMALL] or [
                c for c in values[:1] if sizes[c.id] <= LARGEST
            ]
            found |= {c.id: c for c in few + errors[:12]}
    return [c for c in catalogue() if c.id in found]


def _size(case: Case) -> int:
    problem = inputs.build(case)
    return sum(int(np.prod(a.shape)) for a in problem.arrays.values() if a is not None)


def freeze(folder: Path = FOLDER) -> int:
    """Writes the vectors and their manifest into a new folder; returns how many.

    Raises:
      VectorError: the folder holds vectors already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise VectorError(f"{folder}: expected no vectors there, since frozen files are never rewritten")
    folder.mkdir(parents=True, exist_ok=True)
    cases, files = chosen(), {}
    for op in ("causal_conv1d_fn", "causal_conv1d_update"):
        vectors = [_vector(case) for case in cases if case.op == op]
        flags = sorted({flag for vector in vectors for flag in vector["flags"]})
        notes = {flag: {k: v for k, v in asdict(FLAGS[flag]).items() if k != "id"} for flag in flags}
        head = {"format": 1, "contract": contract.CONTRACT_VERSION, "op": op, "notes": notes}
        lines = ",\n".join(json.dumps(vector) for vector in vectors)
        text = json.dumps(head, indent=1)[:-2] + ',\n "vectors": [\n' + lines + "\n]}\n"
        (folder / f"{op}.json").write_text(text)
        files[f"{op}.json"] = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "vectors": len(vectors)}
    manifest = {"format": 1, "contract": contract.CONTRACT_VERSION, "suite": SUITE_VERSION, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return len(cases)


def _vector(case: Case) -> dict[str, Any]:
    problem = inputs.build(case)
    arguments = {name: codec.encode(None if a is None else a.typed) for name, a in problem.arrays.items()}
    expect = dict(case.expect) if case.expect != "value" else _result(problem.op, problem.typed())
    return {"id": case.id, "flags": list(case.flags), "since": case.since, "arguments": arguments,
            "options": dict(case.options), "expect": expect}  # fmt: skip


def _result(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    low, high = allowed(op, arguments)
    exact = None if arguments.get("activation") else exact_bits(op, arguments)
    magnitude, computed = reference.preactivation(op, arguments, "magnitude")
    if (computed & (magnitude <= EXACT_FROM) & (magnitude > 0)).any():
        exact = None
    states = getattr(reference, op)(**arguments).conv_states
    return {"low": codec.encode(low), "high": codec.encode(high),
            "exact": codec.encode(None if exact is None else from_bits(exact, low.dtype)),
            "conv_states": codec.encode(states)}  # fmt: skip


def allowed(op: str, arguments: dict[str, Any]) -> tuple[TypedArray, TypedArray]:
    """The smallest and the largest right output of every element; NaN where the output must be NaN."""
    dtype, activation = arguments["x"].dtype, arguments.get("activation")
    pre, computed = reference.preactivation(op, arguments)
    magnitude, _ = reference.preactivation(op, arguments, "magnitude")
    expected = np.where(computed, silu(pre) if activation else pre, 0.0)
    bound = np.where(
        computed, error_bound(pre, magnitude, arguments["weight"].shape[1], dtype, activation), 0.0
    )
    with np.errstate(invalid="ignore"):
        low, high = expected - bound, expected + bound
    finite = np.isfinite(expected)
    low, high = np.where(finite, low, expected), np.where(finite, high, expected)
    return inward(low, dtype, up=True), inward(high, dtype, up=False)


def inward(values: np.ndarray, dtype: str, *, up: bool) -> TypedArray:
    """Values rounded to the format towards the inside of an interval."""
    bits = round_bits(values, dtype)
    got = to_float64(bits, dtype)
    outside = (got < values) if up else (got > values)
    sign = FORMATS[dtype].bits(1 << (8 * bits.itemsize - 1))
    negative = (bits & sign) != 0
    step = np.where(negative == up, -1, 1)  # towards plus infinity a negative number's bits fall
    moved = (bits.astype(np.int64) + step).astype(bits.dtype)
    zero = (bits & ~sign) == 0
    moved = np.where(zero, FORMATS[dtype].bits(1) if up else sign | FORMATS[dtype].bits(1), moved)
    return from_bits(np.where(outside, moved, bits), dtype)


def verify(folder: Path = FOLDER) -> int:
    """Checks hashes and structure, and that the reference is inside every vector; returns how many there are.

    Raises:
      VectorError: naming file and field.
    """
    manifest = _load(folder / "manifest.json", "manifest")
    names = {path.name for path in folder.glob("*.json")} - {"manifest.json"}
    if names != set(manifest["files"]):
        raise VectorError(
            f"{folder / 'manifest.json'}: files: expected {sorted(names)}, got {sorted(manifest['files'])}"
        )
    count = 0
    for name, facts in manifest["files"].items():
        path = folder / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != facts["sha256"]:
            raise VectorError(
                f"{path}: sha256: expected {facts['sha256']}, got {digest}: frozen files are never edited"
            )
        data = _load(path, "file")
        if len(data["vectors"]) != facts["vectors"]:
            raise VectorError(f"{path}: vectors: expected {facts['vectors']}, got {len(data['vectors'])}")
        for vector in data["vectors"]:
            if missing := set(vector["flags"]) - set(data["notes"]):
                raise VectorError(
                    f"{path}: notes: nothing about {sorted(missing)}, which {vector['id']} carries"
                )
            if problem := _disagreement(data["op"], vector):
                raise VectorError(f"{path}: {vector['id']}: {problem}")
            count += 1
    return count


def _load(path: Path, definition: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise VectorError(f"{path}: expected a JSON file, got {error}") from error
    for wrong in schema.errors(data, SCHEMA, definition):
        raise VectorError(f"{path}: {wrong}")
    return data


def _disagreement(op: str, vector: dict[str, Any]) -> str | None:
    """How the reference disagrees with a vector, if it does."""
    try:
        arguments = {name: codec.decode(value) for name, value in vector["arguments"].items()} | vector[
            "options"
        ]
    except ValueError as error:
        return str(error)
    expect = vector["expect"]
    if "error" in expect:
        if "backend" in vector["options"]:
            return None  # the reference ignores the name of a backend
        try:
            getattr(reference, op)(**arguments)
        except (ValueError, TypeError) as error:
            right = type(error).__name__ == expect["error"] and expect["names"] in str(error)
            return None if right else f"expect: the reference raises {type(error).__name__}: {error}"
        return "expect: the reference raises nothing"
    got = getattr(reference, op)(**arguments)
    low, high, exact, states = (codec.decode(expect[k]) for k in ("low", "high", "exact", "conv_states"))
    nan = is_nan(low.bits, low.dtype)
    with np.errstate(invalid="ignore"):
        inside = (low.values() <= got.out.values()) & (got.out.values() <= high.values())
    if not (inside | (nan & is_nan(got.out.bits, got.out.dtype))).all():
        return "expect.low, expect.high: the reference is outside"
    if exact is not None:
        differs = ulp_distance(exact.bits, exact_bits(op, arguments)) > 0
        if (differs & ~is_nan(exact.bits, exact.dtype)).any():
            return "expect.exact: the float32 order gives other bits"
    if (states is None) != (got.conv_states is None):
        return "expect.conv_states: null on one side only"
    if states is not None:
        same = (states.bits == got.conv_states.bits) | (
            is_nan(states.bits, states.dtype) & is_nan(got.conv_states.bits, states.dtype)
        )
        if not same.all():
            return "expect.conv_states: the reference has other bits"
    return None
