"""One call against the reference: shape, dtype, values, states, untouched memory, in this order."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from oracle import (
    reference,
    reference_prologue,
    reference_short,
    tolerance_grad,
    tolerance_prologue,
    tolerance_prologue_grad,
)
from oracle.conformance import touched
from oracle.conformance.adapter import EXACT_GRADIENTS, GRADIENTS, Adapter, gradients_of, offered
from oracle.conformance.arrays import unchanged_outside
from oracle.conformance.inputs import Problem
from oracle.contract import FLOAT_DTYPES
from oracle.numerics import (
    SMALLEST_NORMAL_FLOAT32,
    TypedArray,
    from_bits,
    is_nan,
    round_bits,
    rounded,
    silu,
    typed,
    ulp_distance,
)  # fmt: skip
from oracle.tolerance import error_bound, fraction_of_bound

# Below this size float32 products may be subnormal, and what is exact depends on flushing.
EXACT_FROM = 2.0**-100


@dataclass(frozen=True)
class Promises:
    """What an implementation claims beyond values within the bound; see `adapter.Adapter.capabilities`."""

    bit_exact: bool = True
    path_invariant: bool = True
    supports: tuple[str, ...] = ("*",)


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
      out, conv_states, window_out: what came back, for relations; the parts of a split out are joined.
      parts: of a prologue q, k, v, g and beta, by name; None where there is none.
      gradients: of a backward pass, by the names of `adapter.GRADIENTS[op]`; None where the argument is None.
    """

    status: str = "passed"
    detail: str = ""
    found: list[str] = field(default_factory=list)
    worst: Worst | None = None
    bit_exact: bool | None = None
    ulps: int | None = None
    out: TypedArray | None = None
    conv_states: TypedArray | None = None
    window_out: TypedArray | None = None
    parts: dict[str, TypedArray | None] = field(default_factory=dict)
    gradients: dict[str, TypedArray | None] = field(default_factory=dict)

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
        arrays = offered(problem.op, problem.arrays, promises.supports)
        result = adapter.run(problem.op, arrays, problem.options)
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
    _judge(verdict, snapshot, result, memory, promises, expect)
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
    if not isinstance(result, Mapping) or RESULTS[problem.op] not in result:
        got = f"one with {sorted(map(str, result))}" if isinstance(result, Mapping) else _kind(result)
        verdict.fail("wrong_dtype", f"expected a mapping with {RESULTS[problem.op]!r}, got {got}")
        return False
    if problem.op == "tree_parents_from_links":
        return True
    if problem.op in GRADIENTS:
        _take_gradients(verdict, problem, result)
    elif problem.op in PROLOGUES:
        _take_parts(verdict, problem, result)
    elif problem.op != "commit_windows":
        _take_out(verdict, problem, result["out"])
    for name in ("conv_states", "window_out") if problem.op.endswith("_update") else ("conv_states",):
        value, like = result.get(name), problem.arrays.get("cache" if problem.op == "short_conv" else name)
        if like is None or value is None:
            if (value is None) != (like is None):
                wanted = "None" if like is None else "an array"
                verdict.fail("wrong_shape", f"{name}: expected {wanted}, got {_kind(value)}")
            continue
        if (taken := _take(verdict, name, value, tuple(like.shape), like.dtype)) is not None:
            setattr(verdict, name, taken)
    for name, base in (result.get("memory") or {}).items():
        want = problem.arrays[name]
        if want is not None and not want.sparse:
            base = np.asarray(base)
            if base.shape != want.base.shape or base.dtype.itemsize != want.base.dtype.itemsize:
                verdict.fail("wrong_shape", f"memory of {name}: expected {want.base.shape}, got {base.shape}")
            else:
                memory[name] = base
    return verdict.status == "passed"


RESULTS = {
    "causal_conv1d_fn": "out", "causal_conv1d_update": "out", "commit_windows": "conv_states",
    "tree_parents_from_links": "parents", "gated_delta_prologue_fn": "q", "gated_delta_prologue_update": "q",
    "gated_short_conv_fn": "out", "gated_short_conv_update": "out", "short_conv": "out", **{op: next(iter(of)) for op, of in GRADIENTS.items()},
}  # fmt: skip
PROLOGUES = tuple(op for op, result in RESULTS.items() if result == "q")


def _take_out(verdict: Verdict, problem: Problem, value: Any) -> None:
    """Takes out, or joins its parts."""
    x, weight = problem.arrays.get("x") or problem.arrays["bcx"], problem.arrays["weight"]
    shape, dim = tuple(x.shape[:-1]), weight.shape[0]
    sizes = problem.options.get("split_sizes")
    if sizes is None:
        verdict.out = _take(verdict, "out", value, (*shape, dim), x.dtype)
        return
    if not isinstance(value, (list, tuple)) or len(value) != len(sizes):
        got = f"{len(value)}" if isinstance(value, (list, tuple)) else _kind(value)
        verdict.fail("wrong_shape", f"out: expected a list of {len(sizes)} arrays, got {got}")
        return
    parts = [
        _take(verdict, f"out[{i}]", part, (*shape, size), x.dtype)
        for i, (part, size) in enumerate(zip(value, sizes, strict=True))
    ]
    if verdict.status == "passed":
        verdict.out = TypedArray(x.dtype, np.concatenate([part.data for part in parts], axis=-1))


def _take_parts(verdict: Verdict, problem: Problem, result: Mapping[str, Any]) -> None:
    """Takes q, k, v, g and beta."""
    options, arrays = problem.options, problem.arrays
    leading, dtype = tuple(arrays["x"].shape[:-1]), arrays["x"].dtype
    keys = (*leading, options["num_k_heads"], options["head_k_dim"])
    values = (*leading, options["num_v_heads"], options["head_v_dim"])
    wanted = {"q": (keys, dtype), "k": (keys, dtype), "v": (values, dtype)}
    wanted |= {
        name: None if arrays[source] is None else (tuple(arrays[source].shape), "float32")
        for name, source in (("g", "a"), ("beta", "b"))
    }
    for name, like in wanted.items():
        value = result.get(name)
        verdict.parts[name] = None
        if (value is None) != (like is None):
            expected = "None" if like is None else "an array"
            verdict.fail("wrong_shape", f"{name}: expected {expected}, got {_kind(value)}")
        elif like is not None:
            verdict.parts[name] = _take(verdict, name, value, *like)
    if verdict.status == "passed":
        parts = [verdict.parts[name].data for name in "qkv"]  # perhaps of no tokens
        joined = [part.reshape(*leading, part.shape[-2] * part.shape[-1]) for part in parts]
        verdict.out = TypedArray(dtype, np.concatenate(joined, axis=-1))


def _take_gradients(verdict: Verdict, problem: Problem, result: Mapping[str, Any]) -> None:
    for name, argument in GRADIENTS[problem.op].items():
        value, like = result.get(name), problem.arrays[argument]
        if (value is None) != (like is None):
            wanted = "None" if like is None else "an array"
            verdict.fail("wrong_shape", f"{name}: expected {wanted}, got {_kind(value)}")
        elif like is None:
            verdict.gradients[name] = None
        else:
            verdict.gradients[name] = _take(verdict, name, value, tuple(like.shape), like.dtype)


def _take(verdict: Verdict, name: str, value: Any, shape: tuple[int, ...], dtype: str) -> TypedArray | None:
    """An array of a result, if it has the right shape and dtype; a list of numbers is rounded to that dtype."""
    try:
        if isinstance(value, (list, tuple)):
            value = rounded(
                np.asarray(value, np.float64).reshape(shape if not np.size(value) else np.shape(value)), dtype
            )
        if not hasattr(value, "shape"):
            raise TypeError("it has no shape")
        value = typed(value)
        got_shape, got = tuple(value.shape), value.dtype
    except Exception as error:
        verdict.fail("wrong_dtype", f"{name}: expected an array, got {_kind(value)} ({error})")
        return None
    if got not in FLOAT_DTYPES:
        verdict.fail("wrong_dtype", f"{name}: expected dtype {dtype}, got {got}")
    elif got_shape != shape:
        verdict.fail("wrong_shape", f"{name}: expected shape {list(shape)}, got {list(got_shape)}")
    elif got != dtype:
        verdict.fail("wrong_dtype", f"{name}: expected dtype {dtype}, got {got}")
    else:
        return TypedArray(dtype, np.ascontiguousarray(value.data))
    return None


def _judge(
    verdict: Verdict,
    problem: Problem,
    result: Any,
    memory: dict[str, np.ndarray],
    promises: Promises,
    expect: Any,
) -> None:
    arguments = problem.typed()
    if problem.op == "tree_parents_from_links":
        _judge_parents(verdict, result["parents"], reference.tree_parents_from_links(**arguments))
    elif problem.op in GRADIENTS and expect == "value":
        with np.errstate(all="ignore"):
            _judge_gradients(verdict, problem.op, arguments)
    expected: dict[str, Any] = {}
    if expect == "value" and problem.op not in ("tree_parents_from_links", *GRADIENTS):
        with np.errstate(all="ignore"):
            if problem.op == "commit_windows":
                expected["conv_states"] = reference.commit_windows(**arguments)
            elif problem.op == "short_conv":
                rows = reference_short.as_rows(arguments)
                flat = TypedArray(verdict.out.dtype, verdict.out.data.reshape(rows["x"].shape))
                _judge_values(verdict, "causal_conv1d_fn", flat, rows, promises)
                want, got = reference_short.short_conv(**arguments).conv_states, verdict.conv_states
                same = (got.bits == typed(want).bits) | (
                    is_nan(got.bits, got.dtype) & is_nan(typed(want).bits, got.dtype)
                )
                _report_positions(verdict, "wrong_state", "conv_states", ~same, got, typed(want))
            elif problem.op in reference_prologue.CONVOLUTIONS:
                _judge_front(verdict, problem.op, arguments, promises)
                expected = getattr(reference_prologue, problem.op)(**arguments)._asdict()
            else:
                _judge_values(verdict, problem.op, verdict.out, arguments, promises)
                expected = getattr(reference, problem.op)(**arguments)._asdict()
    changed = {}
    for name in ("conv_states", "window_out"):
        array, got = problem.arrays.get(name), getattr(verdict, name)
        if array is None or got is None:
            continue
        changed[name], old = touched.may_change(problem, name), array.typed
        if expect == "value":
            want = expected[name]
            same = got.bits == want.bits
            cast = any(a is not None and a.dtype != array.dtype for a in map(problem.arrays.get, SOURCES))
            if cast or "bcx" in problem.arrays:
                same |= is_nan(got.bits, array.dtype) & is_nan(
                    want.bits, array.dtype
                )  # a cast keeps no payload, nor does a product
            _report_positions(verdict, "wrong_state", name, ~same & changed[name], got, want)
        _report_positions(verdict, "wrong_memory", name, (got.bits != old.bits) & ~changed[name], got, old)
    for name, base in memory.items():
        positions = unchanged_outside(problem.arrays[name], base, changed.get(name))
        if len(positions):
            start = problem.arrays[name].offset
            verdict.fail("wrong_memory", f"{name}: {len(positions)} elements of its buffer changed that must not, the "
                         f"first {positions[0] - start} elements from the start of the view")  # fmt: skip


SOURCES = ("x", "conv_states", "window_out")


def _kind(value: Any) -> str:
    """What came, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if shape is not None:
        return f"an array of {dtype} {list(shape)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _judge_parents(verdict: Verdict, got: Any, want: np.ndarray) -> None:
    got = np.asarray(got, np.int32 if isinstance(got, (list, tuple)) else None)
    if got.dtype.name != "int32":
        verdict.fail("wrong_dtype", f"parents: expected dtype int32, got {got.dtype.name}")
    elif got.shape != want.shape:
        verdict.fail("wrong_shape", f"parents: expected shape {list(want.shape)}, got {list(got.shape)}")
    elif (got != want).any():
        at = tuple(np.argwhere(got != want)[0])
        verdict.fail("wrong_value", f"parents: {int((got != want).sum())} of {got.size} wrong, the first at "
                     f"{[int(i) for i in at]}: expected {want[at]}, got {got[at]}")  # fmt: skip


GRADIENT_BOUNDS = {
    "causal_conv1d_backward": tolerance_grad.gradient_bounds,
    "gated_delta_prologue_backward": tolerance_prologue_grad.prologue_bounds,
    "gated_short_conv_backward": tolerance_prologue_grad.gated_bounds,
}


def _judge_gradients(verdict: Verdict, op: str, arguments: Mapping[str, Any]) -> None:
    """Every gradient within its bound; the worst element is the worst of all of them."""
    exact, bounds = (gradients_of(op, arguments, given) for given in (EXACT_GRADIENTS, GRADIENT_BOUNDS))
    for (name, got), want, bound in zip(verdict.gradients.items(), exact, bounds, strict=True):
        if got is None or not want.size:
            continue
        fraction = fraction_of_bound(got.values(), want, bound, got.dtype)
        at = np.unravel_index(np.argmax(fraction), fraction.shape)
        if verdict.worst is None or not fraction[at] <= verdict.worst.fraction:
            verdict.worst = _worst(fraction, at, want, got)
        wrong = ~(fraction <= 1.0)
        if wrong.any():
            verdict.fail("wrong_value", f"{name}: {int(wrong.sum())} of {wrong.size} elements outside the bound, the "
                         f"worst at {[int(i) for i in at]}: expected {want[at]:.9g}, got {got.values()[at]:.9g}, "
                         f"{fraction[at]:.3g} times the bound")  # fmt: skip


def _worst(fraction: np.ndarray, at: tuple[Any, ...], expected: np.ndarray, got: TypedArray) -> Worst:
    return Worst(
        float(min(fraction[at], 1e30)), [int(i) for i in at], float(expected[at]), float(got.values()[at]),
        _hex(round_bits(expected, got.dtype)[at]), _hex(got.bits[at]), got.dtype,
    )  # fmt: skip


def _judge_values(
    verdict: Verdict, op: str, got: TypedArray, arguments: dict[str, Any], promises: Promises
) -> None:
    activation = arguments.get("activation")
    width, residual = arguments["weight"].shape[1], arguments.get("residual")
    added = None if residual is None else residual.values()
    pre, computed = reference.preactivation(op, arguments)
    magnitude, _ = reference.preactivation(op, arguments, "magnitude")
    ordered, _ = reference.preactivation(op, arguments, "float32")
    expected = np.where(computed, reference.finished(pre, arguments), 0.0)
    bound = error_bound(pre, magnitude, width, got.dtype, activation, added)
    bound = np.where(computed, bound, 2.0**-1000)
    if not got.data.size:
        return
    _judge_bound(verdict, "out", got, tolerance_prologue.Expected(expected, bound, computed, got.dtype))
    if (bits := exact_bits(op, arguments)) is None:
        return
    defined = computed & np.isfinite(ordered) & (magnitude > EXACT_FROM)
    distance = ulp_distance(got.bits, bits)
    if activation:
        defined &= np.abs(silu(ordered)) >= SMALLEST_NORMAL_FLOAT32  # smaller results may be flushed to zero
        if added is not None:  # where they cancel, an error of SiLU in float32 is many ulps of the sum
            defined &= np.abs(silu(ordered)) <= 8 * np.abs(expected)
        verdict.ulps = int(distance[defined].max(initial=0))
        if promises.bit_exact and verdict.ulps > 1:
            verdict.fail("wrong_value", f"out: {verdict.ulps} ulps from the rounded SiLU, expected at most 1")
    else:
        differs = defined & (distance > 0)
        verdict.bit_exact = not differs.any()
        if promises.bit_exact and not verdict.bit_exact:
            at = tuple(np.argwhere(differs)[0])
            want = from_bits(bits, got.dtype).values()[at]
            verdict.fail("wrong_value", f"out: {int(differs.sum())} elements differ in bits from float32 sums in the "
                         f"contract's order, the first at {[int(i) for i in at]}: expected {want:.9g}, got "
                         f"{got.values()[at]:.9g}")  # fmt: skip


def _judge_bound(verdict: Verdict, name: str, got: TypedArray, want: tolerance_prologue.Expected) -> None:
    """One result within its bound; the worst element of a call is the worst of all its results."""
    expected, computed = want.values, want.computed
    fraction = fraction_of_bound(got.values(), expected, want.bound, got.dtype)
    at = np.unravel_index(np.argmax(fraction), fraction.shape)
    if verdict.worst is None or not fraction[at] <= verdict.worst.fraction:
        verdict.worst = _worst(fraction, at, expected, got)
    wrong = fraction > 1.0
    if wrong.any():
        unwritten = wrong & ~computed
        if unwritten.any():
            at, where = tuple(np.argwhere(unwritten)[0]), "where the contract demands zero"
        else:
            where = f"{fraction[at]:.3g} times the bound"
        verdict.fail("wrong_value", f"{name}: {int(wrong.sum())} of {wrong.size} elements outside the bound, the worst at "
                     f"{[int(i) for i in at]}: expected {expected[at]:.6g}, got {got.values()[at]:.6g}, {where}")  # fmt: skip


def _judge_front(verdict: Verdict, op: str, arguments: dict[str, Any], promises: Promises) -> None:
    """Every result of a front within its bound; in 16 bits, behind a linear convolution, in every bit."""
    found = verdict.parts or {"out": verdict.out}
    wanted = tolerance_prologue.expected(op, arguments)
    for name, want in wanted.items():
        if want.values.size:
            _judge_bound(verdict, name, found[name], want)
    if arguments.get("beta_rounding") == "storage" and (beta := found["beta"]) is not None:
        storage = typed(arguments["b"]).dtype
        wrong = beta.values() != rounded(beta.values(), storage).values()
        if wrong.any():
            verdict.fail("wrong_value", f"beta: {int(wrong.sum())} elements are no {storage}, though beta_rounding is 'storage'")  # fmt: skip
    if (bits := front_bits(op, arguments)) is None:
        return
    verdict.bit_exact = True
    for name, exact in bits.items():
        differs = wanted[name].computed & np.isfinite(exact.values()) & (found[name].bits != exact.bits)
        differs &= (np.abs(exact.values()) > 0) | (np.abs(found[name].values()) > 0)  # zeros of either sign
        if differs.any():
            verdict.bit_exact = False
            at = tuple(np.argwhere(differs)[0])
            if promises.bit_exact:
                verdict.fail("wrong_value", f"{name}: {int(differs.sum())} elements differ in bits from float32 in the "
                             f"contract's order, the first at {[int(i) for i in at]}: expected {exact.values()[at]:.9g}, "
                             f"got {found[name].values()[at]:.9g}")  # fmt: skip


def front_bits(op: str, arguments: Mapping[str, Any]) -> dict[str, TypedArray] | None:
    """Bits of q, k and v, or of out, in the contract's float32 order; None where the contract fixes none."""
    given = reference_prologue.checked(op, {**arguments, "validate": False})
    names = ("x", "bcx", "weight", "bias", "conv_states")
    used = [typed(given[n]).dtype for n in names if given.get(n) is not None]
    if "float32" in used or given["activation"]:
        return None
    with np.errstate(all="ignore"):
        if "bcx" in given:
            return {"out": reference_prologue.OrderedGated().gated(op, given)["out"]}
        found = reference_prologue.OrderedFront().front(op, given)
    return {name: found[name] for name in "qkv"}


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
    result = reference.finished(ordered, arguments)
    if arguments.get("residual") is not None:  # a float32 sum as well
        with np.errstate(over="ignore", invalid="ignore"):
            result = result.astype(np.float32).astype(np.float64)
    return round_bits(result, arguments["x"].dtype)


def _report_positions(
    verdict: Verdict, status: str, name: str, wrong: np.ndarray, got: TypedArray, want: TypedArray
) -> None:
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        verdict.fail(status, f"{name}: {int(wrong.sum())} elements wrong, the first at {[int(i) for i in at]}: expected "
                     f"{want.values()[at]:.6g} (bits {_hex(want.bits[at])}), got {got.values()[at]:.6g} (bits "
                     f"{_hex(got.bits[at])})")  # fmt: skip


def _hex(bits: Any) -> str:
    return f"0x{int(bits):0{2 * bits.dtype.itemsize}x}"


def promises_of(adapter: Adapter) -> Promises:
    """The promises among an adapter's capabilities."""
    stated = adapter.capabilities()
    return Promises(
        bool(stated.get("bit_exact", True)),
        bool(stated.get("path_invariant", True)),
        tuple(stated.get("supports", ())),
    )
