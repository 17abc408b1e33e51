"""Mistakes of a backward pass."""

from __future__ import annotations

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import FORMATS, TypedArray, rounded
from oracle.reference_grad import silu_slope


@mutant("dht-slot-clamped")
class FinalOnShiftedTokens(Mutant):
    """Puts dfinal on the first tokens of a row shorter than the window."""

    def add_final(self, de, dfinal, length):
        start = max(length, len(dfinal))
        de[start:] += dfinal[: len(de) - start]


@mutant("dh0-passthrough-dropped")
class FinalOnTokensOnly(Mutant):
    """Adds dfinal to tokens and never to the initial state."""

    def add_final(self, de, dfinal, length):
        here = min(length, len(dfinal))
        if here:
            de[-here:] += dfinal[-here:]


@mutant("initial-state-missing-in-dweight")
class DweightWithoutInitial(Mutant):
    """Takes the initial state as zero in dweight."""

    def entries_of_taps(self, e, width):
        e = e.copy()
        e[: width - 1] = 0
        return e


@mutant("dy-assumed-contiguous")
class UpstreamTransposed(Mutant):
    """Reads the upstream gradient with the strides of its transpose."""

    def upstream(self, given):
        values = super().upstream(given)
        return values.reshape(-1, values.shape[-1]).T.copy().reshape(values.shape)


@mutant("dy-assumed-contiguous")
class UpstreamThroughItsBuffer(Mutant):
    """Reads the upstream gradient as if its elements lay side by side."""

    def upstream(self, given):
        dout = self.arrays["dout"]
        size = int(np.prod(dout.shape))
        return self.wide(TypedArray(dout.dtype, dout.base[dout.offset :][:size].reshape(dout.shape)))


@mutant("dweight-multiplied-by-batch")
class DweightTimesBatch(Mutant):
    """Counts dweight once for each row."""

    def end_backward(self, given, found):
        return found._replace(weight=found.weight * self.sizes(given).batch)


@mutant("backward-halo-wrong")
class BackwardHaloDropped(Mutant):
    """Forgets what later tokens give to the last token of every block of eight."""

    def spread(self, de, j, product):
        back = len(de) - len(product) - j  # g[t] reaches the token `back` before it
        t = np.arange(len(product))
        keep = (t // 8 == (t - back) // 8) | (t < back)
        de[j : j + len(product)] += np.where(keep[:, None], product, np.float32(0))


@mutant("tail-enters-gradient")
class TailGetsGradient(Mutant):
    """Lets the last row's gradient run on into the tail."""

    def end_backward(self, given, found):
        starts = given["query_start_loc"]
        if starts is not None and (end := starts.data[-1]):
            found.x[end:] = found.x[end - 1]
        return found


@mutant("slope-of-rounded")
class SlopeIsSigmoid(Mutant):
    """Takes SiLU' as sigmoid alone."""

    def slope(self, pre, given):
        return (1 / (1 + np.exp(-np.maximum(pre, np.float32(-80))))).astype(np.float32)


@mutant("slope-of-rounded")
class SlopeOfRounded(Mutant):
    """Takes SiLU' at the pre-activation rounded to x's dtype."""

    def slope(self, pre, given):
        return silu_slope(rounded(pre.astype(np.float64), given["x"].dtype).values()).astype(np.float32)


@mutant("partial-sums-rounded")
class GradientSumsRounded(Mutant):
    """Keeps the running sums of dweight and dbias in x's dtype."""

    def add_up(self, total, terms, given):
        for term in terms:
            total = rounded((total + term).astype(np.float64), given["x"].dtype).values().astype(np.float32)
        return total


@mutant("nondeterministic-dweight")
class OtherOrderInEveryCall(Mutant):
    """Adds terms in another order in every other call, as atomics would."""

    calls = 0

    def gradients(self, given):
        self.calls += 1
        return super().gradients(given)

    def add_up(self, total, terms, given):
        for term in terms[:: 1 if self.calls % 2 else -1]:
            total = total + term
        return total


@mutant("nondeterministic-dweight")
class OtherOrderInOneSchedule(Mutant):
    """Adds terms in another order if the schedule is flat."""

    def add_up(self, total, terms, given):
        for term in terms[:: -1 if given.get("schedule") == "flat" else 1]:
            total = total + term
        return total


@mutant("fast-path-writes-input")
class UpstreamOverwritten(Mutant):
    """Uses the memory of the upstream gradient as its workspace."""

    def end_backward(self, given, found):
        self.arrays["dout"].data[...] = np.zeros((), FORMATS[self.arrays["dout"].dtype].bits)
        return found


@mutant("bad-call-accepted")
class BackwardUnchecked(Mutant):
    """Checks no argument of the differentiable form."""

    def check(self, op, arrays, options):
        if op != "causal_conv1d_backward":
            super().check(op, arrays, options)
