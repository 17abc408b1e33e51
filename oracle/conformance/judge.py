"""One call against the reference: shape, dtype, values, states, untouched memory, in this order."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from oracle import reference
from oracle.conformance.adapter import Adapter
from oracle.conformance.arrays import unchanged_outside
from oracle.conformance.inputs import Problem
from oracle.contract import FLOAT_DTYPES
from oracle.numerics import SMALLEST_NORMAL_FLOAT32, TypedArray, is_nan, round_bits, silu, typed, ulp_distance
from oracle.tolerance import error_bound, fraction_of_bound

# Below this size float32 products may be subnormal, and what is exact depends on flushing.
EXACT_FROM = 2.0**-100


@dataclass(frozen=True)
class Promises:
    """What an implementation claims beyond values within the bound; see `adapter.Adapter.capabilities`."""

    bit_exact: bool = True
    path_invariant: bool = True


@dataclass
class Worst:
    """The output element that is furthest from the reference, in units of its bound."""

    fraction: float
    index: list[int]
    expected: float
    got: float
    expected_bits: str
    got_bits: str
    dtype: str


@dataclass
class Verdict:
    """What one call was found to be.

    Attributes:
      status: "passed" or the first thing that is wrong.
      detail: what is wrong, in words; every finding, the first first.
      found: the status of every finding.
      worst: the worst output element, if values were compared.
      bit_exact: equal to the contract's float32 order in every bit; None where that is not defined.
      ulps: largest distance from the rounded SiLU of that sum, on 16-bit outputs; None elsewhere.
      out, conv_states: what came back, for relations.
    """

    status: str = "passed"
    detail: str = ""
    found: list[str] = field(default_factory=list)
    worst: Worst | None = None
    bit_exact: bool | None = None
    ulps: int | None = None
    out: TypedArray | None = None
    conv_states: TypedArray | None = None

    def fail(self, status: str, detail: str) -> None:
        """Notes a finding; the first one decides the status."""
        if self.status == "passed":
            self.status = status
        self.found.append(status)
        self.detail += ("; " if self.detail else "") + detail

    def numbers(self) -> dict[str, Any]:
        """The part of a report record that measures."""
        worst = asdict(self.worst) if self.worst else None
        for name in ("expected", "got"):
            if worst and not np.isfinite(worst[name]):
                worst[name] = str(worst[name])  # JSON has no NaN
        return {"found": self.found, "worst": worst, "bit_exact": self.bit_exact, "ulps": self.ulps}


def evaluate(adapter: Adapter, problem: Problem, promises: Promises, expect: Any = "value") -> Verdict:
    """Runs one call and judges it. Whatever the adapter does becomes a verdict."""
    before = {name: a if a is None or a.sparse else a.copy() for name, a in problem.arrays.items()}
    try:
        result = adapter.run(problem.op, problem.arrays, problem.options)
    except Exception as error:
        return _judge_error(error, expect)
    verdict = Verdict()
    if isinstance(expect, Mapping):
        verdict.fail("wrong_error", f"expected {expect['error']} that names {expect['names']}, got a result")
        return verdict
    snapshot = Problem(problem.op, before, problem.options)
    memory = {name: a.base for name, a in problem.arrays.items() if a is not None and not a.sparse}
    if not _take_result(verdict, snapshot, result, memory):
        return verdict
    _judge(verdict, snapshot, memory, promises, expect)
    return verdict


def _judge_error(error: Exception, expect: Any) -> Verdict:
    kind = type(error).__name__
    verdict = Verdict()
    if isinstance(error, NotImplementedError):
        verdict.fail("unsupported", str(error))
    elif not isinstance(expect, Mapping):
        frame = traceback.extract_tb(error.__traceback__)[-1]
        verdict.fail(
            "wrong_error", f"expected a result, got {kind}: {error} ({frame.filename}:{frame.lineno})"
        )
    elif not isinstance(error, {"ValueError": ValueError, "TypeError": TypeError}[expect["error"]]):
        verdict.fail(
            "wrong_error", f"expected {expect['error']} that names {expect['names']}, got {kind}: {error}"
        )
    elif expect["names"] not in str(error):
        verdict.fail("wrong_error", f"expected a message that names {expect['names']}, got {kind}: {error}")
    return verdict


def _take_result(verdict: Verdict, problem: Problem, result: Any, memory: dict[str, np.ndarray]) -> bool:
    """Checks shapes and dtypes of a result and unpacks it; False when there is nothing more to judge."""
    if not isinstance(result, Mapping) or "out" not in result:
        verdict.fail(
            "wrong_dtype", f"expected a mapping with out and conv_states, got {type(result).__name__}"
        )
        return False
    for name, like in (("out", problem.arrays["x"]), ("conv_states", problem.arrays["conv_states"])):
        value = result.get(name)
        if like is None or value is None:
            if (value is None) != (like is None):
                verdict.fail(
                    "wrong_shape",
                    f"{name}: expected {'None' if like is None else 'an array'}, got the opposite",
                )
                return False
            continue
        try:
            value = typed(value)
            shape, dtype = tuple(value.shape), value.dtype
        except Exception as error:
            verdict.fail("wrong_dtype", f"{name}: expected an array, got {type(value).__name__} ({error})")
            return False
        if dtype not in FLOAT_DTYPES:
            verdict.fail("wrong_dtype", f"{name}: expected dtype {like.dtype}, got {dtype}")
        elif shape != tuple(like.shape):
            verdict.fail("wrong_shape", f"{name}: expected shape {list(like.shape)}, got {list(shape)}")
        elif dtype != like.dtype:
            verdict.fail("wrong_dtype", f"{name}: expected dtype {like.dtype}, got {dtype}")
        else:
            setattr(verdict, name, TypedArray(dtype, np.ascontiguousarray(value.data)))
    for name, base in (result.get("memory") or {}).items():
        want = problem.arrays[name]
        if want is not None and not want.sparse:
            base = np.asarray(base)
            if base.shape != want.base.shape or base.dtype.itemsize != want.base.dtype.itemsize:
                verdict.fail("wrong_shape", f"memory of {name}: expected {want.base.shape}, got {base.shape}")
            else:
                memory[name] = base
    return verdict.status == "passed"


def _judge(
    verdict: Verdict, problem: Problem, memory: dict[str, np.ndarray], promises: Promises, expect: Any
) -> None:
    arguments = problem.typed()
    pool = problem.arrays["conv_states"]
    with np.errstate(all="ignore"):
        if expect == "value":
            _judge_values(verdict, problem, arguments, promises)
            function = getattr(reference, problem.op)
            expected_pool = function(**arguments).conv_states
    changed = None
    if pool is not None:
        changed = _may_change(problem)
        got, old = verdict.conv_states, pool.typed
        if expect == "value":
            same = got.bits == expected_pool.bits
            if pool.dtype != problem.arrays["x"].dtype:  # a cast keeps no payload
                same |= is_nan(got.bits, pool.dtype) & is_nan(expected_pool.bits, pool.dtype)
            _report_positions(verdict, "wrong_state", "conv_states", ~same & changed, got, expected_pool)
        _report_positions(verdict, "wrong_memory", "conv_states", (got.bits != old.bits) & ~changed, got, old)
    for name, base in memory.items():
        positions = unchanged_outside(problem.arrays[name], base, changed if name == "conv_states" else None)
        if len(positions):
            start = problem.arrays[name].offset
            verdict.fail("wrong_memory", f"{name}: {len(positions)} elements of its buffer changed that must not, the "
                         f"first {positions[0] - start} elements from the start of the view")  # fmt: skip


def _judge_values(verdict: Verdict, problem: Problem, arguments: dict[str, Any], promises: Promises) -> None:
    got, activation = verdict.out, arguments.get("activation")
    width = arguments["weight"].shape[1]
    pre, computed = reference.preactivation(problem.op, arguments)
    magnitude, _ = reference.preactivation(problem.op, arguments, "magnitude")
    ordered, _ = reference.preactivation(problem.op, arguments, "float32")
    expected = np.where(computed, silu(pre) if activation else pre, 0.0)
    bound = np.where(computed, error_bound(pre, magnitude, width, got.dtype, activation), 2.0**-1000)
    fraction = fraction_of_bound(got.values(), expected, bound, got.dtype)
    if not fraction.size:
        return
    expected_bits = round_bits(expected, got.dtype)
    at = np.unravel_index(np.argmax(fraction), fraction.shape)
    verdict.worst = Worst(
        float(min(fraction[at], 1e30)), [int(i) for i in at], float(expected[at]), float(got.values()[at]),
        _hex(expected_bits[at]), _hex(got.bits[at]), got.dtype,
    )  # fmt: skip
    wrong = fraction > 1.0
    if wrong.any():
        unwritten = wrong & ~computed
        where = (
            "where the contract demands zero"
            if unwritten.any()
            else f"worst {fraction[at]:.3g} times the bound"
        )
        verdict.fail(
            "wrong_value", f"out: {int(wrong.sum())} of {wrong.size} elements outside the bound, {where}"
        )

    if (bits := exact_bits(problem.op, arguments)) is None:
        return
    defined = computed & np.isfinite(ordered) & (magnitude > EXACT_FROM)
    distance = ulp_distance(got.bits, bits)
    if activation:
        defined &= np.abs(silu(ordered)) >= SMALLEST_NORMAL_FLOAT32  # smaller results may be flushed to zero
        verdict.ulps = int(distance[defined].max(initial=0))
        if promises.bit_exact and verdict.ulps > 1:
            verdict.fail("wrong_value", f"out: {verdict.ulps} ulps from the rounded SiLU, expected at most 1")
    else:
        differs = defined & (distance > 0)
        verdict.bit_exact = not differs.any()
        if promises.bit_exact and not verdict.bit_exact:
            at = tuple(np.argwhere(differs)[0])
            verdict.fail("wrong_value", f"out: {int(differs.sum())} elements differ in bits from float32 sums in the "
                         f"contract's order, the first at {[int(i) for i in at]}")  # fmt: skip


def exact_bits(op: str, arguments: Mapping[str, Any]) -> np.ndarray | None:
    """Output bits of the contract's float32 order, SiLU rounded correctly.

    None if a float32 argument makes products inexact; then the order of operations is all that is fixed.
    """
    used = [
        arguments[n].dtype for n in ("x", "weight", "bias", "conv_states") if arguments.get(n) is not None
    ]
    if "float32" in used:
        return None
    ordered, _ = reference.preactivation(op, dict(arguments), "float32")
    return round_bits(silu(ordered) if arguments.get("activation") else ordered, arguments["x"].dtype)


def _may_change(problem: Problem) -> np.ndarray:
    """Where a call may write, in the pool's shape: the first columns of slots of live rows with a token.

    With hostile offsets, of the slots of all live rows; a rolling slot may then change as a whole.
    """
    arrays = problem.arrays
    slots, pad, pool = arrays["cache_indices"], problem.options.get("pad_slot_id", -1), arrays["conv_states"]
    x, history = arrays["x"], arrays["weight"].shape[1] - 1
    rolls = arrays.get("num_accepted_tokens") is not None
    if arrays.get("query_start_loc") is not None:
        offsets = arrays["query_start_loc"].data.astype(np.int64)
        lengths = np.diff(offsets).tolist()
        if offsets[0] != 0 or min(lengths, default=0) < 0 or offsets.max() > x.shape[0]:
            lengths = [x.shape[0]] * len(lengths)
    else:
        lengths = [1 if len(x.shape) == 2 else x.shape[1]] * x.shape[0]
    changed = np.zeros(pool.shape, dtype=bool)
    named = range(len(lengths)) if slots is None else slots.data.tolist()
    for slot, length in zip(named, lengths, strict=True):
        if length > 0 and history and slot != pad and 0 <= slot < pool.shape[0]:
            changed[slot, : history - 1 + length if rolls else history] = True
    return changed


def _report_positions(
    verdict: Verdict, status: str, name: str, wrong: np.ndarray, got: TypedArray, want: TypedArray
) -> None:
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        verdict.fail(status, f"{name}: {int(wrong.sum())} elements wrong, the first at {[int(i) for i in at]}: expected "
                     f"bits {_hex(want.bits[at])}, got {_hex(got.bits[at])}")  # fmt: skip


def _hex(bits: Any) -> str:
    return f"0x{int(bits):0{2 * bits.dtype.itemsize}x}"


def promises_of(adapter: Adapter) -> Promises:
    """The promises among an adapter's capabilities."""
    stated = adapter.capabilities()
    return Promises(bool(stated.get("bit_exact", True)), bool(stated.get("path_invariant", True)))
