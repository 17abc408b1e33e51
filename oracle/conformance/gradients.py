"""Gradients as cases: calls of the differentiable form as data, their judge, and wrong-on-purpose models.

    for case in gradients.CASES:
        problem = gradients.build(case)
        got = my_backward(problem)              # Gradients of TypedArrays or NumPy arrays
        for wrong in gradients.judge(problem, got):
            print(case.id, wrong)

Whatever must not matter is NaN: tokens of the tail, in x and in the upstream gradient.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from oracle.conformance.arrays import POISON_BITS
from oracle.conformance.inputs import random_values
from oracle.numerics import TypedArray, from_bits, round_bits, rounded, typed
from oracle.reference_grad import Gradients, causal_conv1d_backward, silu_slope
from oracle.tolerance import fraction_of_bound
from oracle.tolerance_grad import gradient_bounds

SHORT = (1, 9, 2, 0, 17, 3, 1, 0, 4)
FLAGS = {
    "dht-slot-clamped": "in a row shorter than the window the final state's gradient lands on shifted tokens",
    "dh0-passthrough-dropped": "entries of the initial state that survive into the final one get no gradient",
    "initial-state-missing-in-dweight": "dweight leaves out taps that read the initial state",
    "dy-assumed-contiguous": "the upstream gradient is read with assumed strides",
    "dweight-multiplied-by-batch": "dweight counts every row once for each row",
    "backward-halo-wrong": "at the end of a block or row, dx misses later tokens or takes another row's",
    "tail-enters-gradient": "tokens past the last row get a gradient, or give one",
    "slope-of-rounded": "SiLU' is taken of the rounded output, of another formula, or left out",
    "partial-sums-rounded": "dweight or dbias is summed in 16 bits, or with atomics in no fixed order",
}


@dataclass(frozen=True)
class GradientCase:
    """One call of the differentiable form and the gradients that come in.

    Attributes:
      id: stable and never reused.
      lengths: tokens of each row; equal where dense.
      tail: tokens after the last row.
      dim, width: sizes.
      dtypes: of x, weight, bias (None: none), initial_states (None: none).
      activation: None or "silu".
      dense: x of three axes, no query_start_loc.
      dfinal: whether a gradient comes in through the final states.
      scale: of x; above 1 reaches both ends of SiLU.
      flags: failure modes that this case is there to catch.
    """

    id: str
    lengths: tuple[int, ...] = SHORT
    tail: int = 0
    dim: int = 8
    width: int = 4
    dtypes: tuple[str, str, str | None, str | None] = ("float32",) * 4
    activation: str | None = "silu"
    dense: bool = False
    dfinal: bool = True
    scale: float = 1.0
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class GradientProblem:
    """A built case: array arguments by name (TypedArray or None), the upstream gradients, the activation."""

    arguments: dict[str, Any]
    dout: TypedArray
    dfinal_states: TypedArray | None
    activation: str | None

    def call(self, function: Callable[..., Any]) -> Any:
        """`function(dout, dfinal_states, x, weight, bias, initial_states, query_start_loc, activation=...)`."""
        return function(self.dout, self.dfinal_states, **self.arguments, activation=self.activation)


def _cases() -> list[GradientCase]:
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    short = ("dht-slot-clamped", "dh0-passthrough-dropped", "initial-state-missing-in-dweight")
    rows = ("backward-halo-wrong", "dweight-multiplied-by-batch", "dy-assumed-contiguous")
    cases = [
        GradientCase(f"width-{width}", width=width, tail=3, flags=(*short, *rows, "tail-enters-gradient"))
        for width in range(1, 9)
    ]
    cases += [
        GradientCase(f"{dtype}-{activation or 'linear'}", dtypes=(dtype,) * 4, activation=activation, tail=2,
                     flags=("slope-of-rounded", "partial-sums-rounded"))
        for dtype in (f16, bf16)
        for activation in (None, "silu")
    ]  # fmt: skip
    cases += [
        GradientCase("linear", activation=None, flags=short),
        GradientCase("no-bias", dtypes=(f32, f32, None, f32)),
        GradientCase("no-initial", dtypes=(f32, f32, f32, None), flags=("dht-slot-clamped",)),
        GradientCase("no-final", dfinal=False),
        GradientCase("plain", dtypes=(f32, f32, None, None), dfinal=False, activation=None),
        GradientCase("mixed", dtypes=(bf16, f32, f16, f32)),
        GradientCase("mixed-back", dtypes=(f32, bf16, f32, f16)),
        GradientCase("one-token", lengths=(1,), flags=short),
        GradientCase("two-tokens", lengths=(2,), flags=short),
        GradientCase("empty-rows", lengths=(0, 0, 5, 0), flags=("dh0-passthrough-dropped",)),
        GradientCase("nothing-but-empty", lengths=(0, 0), tail=2),
        GradientCase("no-rows", lengths=(), tail=3),
        GradientCase("dense", lengths=(6, 6, 6), dense=True, flags=rows),
        GradientCase("dense-short", lengths=(2, 2), dense=True, width=5, flags=short),
        GradientCase("steep", lengths=(33,), scale=30.0, flags=("slope-of-rounded",)),
        GradientCase("dim-1", dim=1),
        GradientCase("dim-130", dim=130, lengths=(3, 10), tail=1),
        GradientCase("several-blocks", lengths=(33, 70, 1, 32), dim=4, tail=5, flags=rows),
        GradientCase("several-blocks-bf16", lengths=(70, 40), dim=4, dtypes=(bf16, bf16, bf16, bf16),
                     flags=("partial-sums-rounded",)),
    ]  # fmt: skip
    return cases


CASES = _cases()


def build(case: GradientCase) -> GradientProblem:
    """The arguments of a case, from the suite's integer hash."""
    seed = zlib.crc32(case.id.encode()) % 1000
    history, batch, live = case.width - 1, len(case.lengths), sum(case.lengths)
    tokens = live + case.tail

    def draw(name: str, shape: tuple[int, ...], dtype: str | None, scale: float = 1.0) -> TypedArray | None:
        if dtype is None:
            return None
        return from_bits(round_bits(scale * random_values(seed, name, shape), dtype), dtype)

    x_dtype, weight_dtype, bias_dtype, initial_dtype = case.dtypes
    x = draw("x", (tokens, case.dim), x_dtype, case.scale)
    dout = draw("dout", (tokens, case.dim), x_dtype)
    for array in (x, dout):
        array.bits[live:] = POISON_BITS[x_dtype]
    if case.dense:
        x, dout = (TypedArray(a.dtype, a.data.reshape(batch, -1, case.dim)) for a in (x, dout))
    states = (batch, history, case.dim)
    arguments = {
        "x": x,
        "weight": draw("weight", (case.dim, case.width), weight_dtype),
        "bias": draw("bias", (case.dim,), bias_dtype),
        "initial_states": draw("initial_states", states, initial_dtype),
        "query_start_loc": None,
    }
    if not case.dense:
        arguments["query_start_loc"] = TypedArray("int32", np.cumsum([0, *case.lengths]).astype(np.int32))
    dfinal = draw("dfinal_states", states, (initial_dtype or x_dtype) if case.dfinal else None)
    return GradientProblem(arguments, dout, dfinal, case.activation)


def expected(problem: GradientProblem) -> Gradients:
    """The reference's gradients, float64."""
    return problem.call(causal_conv1d_backward)


def judge(problem: GradientProblem, got: Gradients) -> list[str]:
    """What is wrong with the gradients `got` (TypedArrays or NumPy arrays), one line a gradient."""
    wrong = []
    bounds = problem.call(gradient_bounds)
    for name, given, want, bound in zip(Gradients._fields, got, expected(problem), bounds, strict=True):
        if given is None or want is None:
            if (given is None) != (want is None):
                wrong.append(f"{name}: expected {'no' if want is None else 'a'} gradient")
            continue
        value, dtype = typed(given), problem.arguments[name].dtype
        if (value.dtype, value.shape) != (dtype, want.shape):
            wrong.append(f"{name}: expected {dtype} {want.shape}, got {value.dtype} {value.shape}")
            continue
        fraction = fraction_of_bound(value.values(), want, bound, dtype)
        if fraction.size and not fraction.max() <= 1:
            at = tuple(map(int, np.unravel_index(np.argmax(fraction), fraction.shape)))
            wrong.append(
                f"{name}{list(at)}: expected {want[at]:.9g}, got {value.values()[at]:.9g}, "
                f"{fraction[at]:.3g} times the bound"
            )
    return wrong


class Model:
    """Gradients in NumPy float32, written for mutation: each step that a mutant replaces is a method."""

    def __call__(self, problem: GradientProblem) -> Gradients:
        arguments = problem.arguments
        x, weight, bias, initial, starts = arguments.values()
        batch = len(starts.data) - 1 if starts else x.shape[0]
        dim, width = weight.shape
        bounds = starts.data.tolist() if starts else [i * x.shape[1] for i in range(batch + 1)]
        x32, dout = self.read(x).reshape(-1, dim), self.upstream(problem.dout).reshape(-1, dim)
        w = self.read(weight)
        b = np.zeros(dim, np.float32) if bias is None else self.read(bias)
        h = np.zeros((batch, width - 1, dim), np.float32) if initial is None else self.read(initial)
        dfinal = np.zeros_like(h) if problem.dfinal_states is None else self.read(problem.dfinal_states)
        dx, dh = np.zeros_like(x32), np.zeros_like(h)
        dweight, dbias = np.zeros((dim, width), np.float32), np.zeros(dim, np.float32)
        for i in range(batch):
            tokens = slice(bounds[i], bounds[i + 1])
            e = np.concatenate([h[i], x32[tokens]])
            length = len(e) - (width - 1)
            pre = b + sum(w[:, j] * e[j : j + length] for j in range(width))
            g = dout[tokens] * (self.slope(pre, x.dtype) if problem.activation else np.float32(1))
            de = np.zeros_like(e)
            for j in range(width):
                self.spread(de, j, w[:, j] * g)
                dweight[:, j] = self.add_up(dweight[:, j], self.seen(e, width)[j : j + length] * g, x.dtype)
            dbias = self.add_up(dbias, g, x.dtype)
            self.final(de, dfinal[i], length)
            dh[i], dx[tokens] = de[: width - 1], de[width - 1 :]
        self.finish(dx, dweight, bounds)

        def store(value, argument):
            return None if argument is None else rounded(value.astype(np.float64), argument.dtype)

        return Gradients(
            store(dx.reshape(x.shape), x), store(dweight, weight), store(dbias, bias), store(dh, initial)
        )

    def read(self, array):
        return array.values().astype(np.float32)

    def upstream(self, dout):
        return self.read(dout)

    def slope(self, pre, dtype):
        return silu_slope(pre.astype(np.float64)).astype(np.float32)

    def spread(self, de, j, product):
        de[j : j + len(product)] += product

    def seen(self, e, width):
        return e

    def add_up(self, total, terms, dtype):
        return total + terms.sum(axis=0)

    def final(self, de, dfinal, length):
        de[length:] += dfinal

    def finish(self, dx, dweight, bounds):
        pass


class FinalOnShiftedTokens(Model):
    """Puts dfinal on the first tokens of a row shorter than the window."""

    flag = "dht-slot-clamped"

    def final(self, de, dfinal, length):
        start = max(length, len(dfinal))
        de[start:] += dfinal[: len(de) - start]


class FinalOnTokensOnly(Model):
    """Adds dfinal to tokens and never to the initial state."""

    flag = "dh0-passthrough-dropped"

    def final(self, de, dfinal, length):
        history = len(dfinal)
        here = min(length, history)
        if here:
            de[-here:] += dfinal[-here:]


class DweightWithoutInitial(Model):
    """Takes the initial state as zero in dweight."""

    flag = "initial-state-missing-in-dweight"

    def seen(self, e, width):
        e = e.copy()
        e[: width - 1] = 0
        return e


class UpstreamTransposed(Model):
    """Reads the upstream gradient with the strides of its transpose."""

    flag = "dy-assumed-contiguous"

    def upstream(self, dout):
        values = self.read(dout)
        return values.reshape(-1, values.shape[-1]).T.copy().reshape(values.shape)


class DweightTimesBatch(Model):
    """Counts dweight once for each row."""

    flag = "dweight-multiplied-by-batch"

    def finish(self, dx, dweight, bounds):
        dweight *= len(bounds) - 1


class HaloDropped(Model):
    """Forgets what later tokens give to the last token of every block of eight."""

    flag = "backward-halo-wrong"

    def spread(self, de, j, product):
        history = len(de) - len(product)
        back = history - j  # g[t] reaches the token `back` before it
        t = np.arange(len(product))
        keep = (t // 8 == (t - back) // 8) | (t < back)
        de[j : j + len(product)] += np.where(keep[:, None], product, np.float32(0))


class TailGetsGradient(Model):
    """Lets the last row's gradient run on into the tail."""

    flag = "tail-enters-gradient"

    def finish(self, dx, dweight, bounds):
        if bounds[-1]:
            dx[bounds[-1] :] = dx[bounds[-1] - 1]


class SlopeLeftOut(Model):
    """Takes SiLU' as sigmoid alone."""

    flag = "slope-of-rounded"

    def slope(self, pre, dtype):
        return (1 / (1 + np.exp(-np.maximum(pre, np.float32(-80))))).astype(np.float32)


class SlopeOfRounded(Model):
    """Takes SiLU' at the pre-activation rounded to x's dtype."""

    flag = "slope-of-rounded"

    def slope(self, pre, dtype):
        return silu_slope(rounded(pre.astype(np.float64), dtype).values()).astype(np.float32)


class SumsRounded(Model):
    """Keeps the running sums of dweight and dbias in x's dtype."""

    flag = "partial-sums-rounded"

    def add_up(self, total, terms, dtype):
        for term in terms:
            total = rounded((total + term).astype(np.float64), dtype).values().astype(np.float32)
        return total


MUTANTS = (
    FinalOnShiftedTokens, FinalOnTokensOnly, DweightWithoutInitial, UpstreamTransposed, DweightTimesBatch, HaloDropped,
    TailGetsGradient, SlopeLeftOut, SlopeOfRounded, SumsRounded,
)  # fmt: skip
