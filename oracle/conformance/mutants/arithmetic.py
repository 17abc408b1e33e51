"""Mistakes in the arithmetic of one window."""

from __future__ import annotations

import numpy as np

from oracle.conformance.model import rounded_to
from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import from_bits, round_bits, silu


@mutant("tap-order-reversed")
class TapsReversed(Mutant):
    """True convolution instead of cross-correlation."""

    def weight(self, call, row):
        return call.weight[:, ::-1]


@mutant("tap-order-reversed")
class HistoryTapsReversed(Mutant):
    """Only the taps of the history are mirrored."""

    def weight(self, call, row):
        return np.concatenate(
            [call.weight[:, : call.history][:, ::-1], call.weight[:, call.history :]], axis=1
        )


@mutant("product-rounded-before-accumulate")
class ProductsRounded(Mutant):
    """Products are rounded to the input's dtype (float32: to bfloat16) before they are summed."""

    def multiply_add(self, call, w, e, acc):
        return acc + rounded_to(w * e, "bfloat16" if call.x.dtype == "float32" else call.x.dtype)


@mutant("product-rounded-before-accumulate")
class SumRoundedAfterEachTap(Mutant):
    """The accumulator is 16-bit."""

    def multiply_add(self, call, w, e, acc):
        return rounded_to(
            super().multiply_add(call, w, e, acc), "bfloat16" if call.x.dtype == "float32" else call.x.dtype
        )


@mutant("product-rounded-before-accumulate")
class InputsRoundedToTen(Mutant):
    """float32 inputs lose bits on a matrix unit (11-bit significands)."""

    def multiply_add(self, call, w, e, acc):
        def short(a):
            return (a.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)

        return super().multiply_add(call, short(np.ascontiguousarray(w)), short(np.ascontiguousarray(e)), acc)


@mutant("preactivation-rounded")
class PreactivationRounded(Mutant):
    """The sum is rounded to the output's dtype before SiLU."""

    def activate(self, call, row, pre):
        return super().activate(call, row, rounded_to(pre, call.x.dtype))


@mutant("preactivation-rounded")
class PreactivationRoundedInUpdate(Mutant):
    """The same in the decode path alone, so that decode and prefill disagree."""

    def activate(self, call, row, pre):
        return super().activate(call, row, pre if call.fn else rounded_to(pre, call.x.dtype))


@mutant("output-truncated")
class OutputTruncated(Mutant):
    """The store drops the low bits."""

    def round(self, out, dtype):
        single = out.astype(np.float32).view(np.uint32)
        if dtype == "bfloat16":
            return (single >> 16).astype(np.uint16)
        if dtype == "float16":
            return round_bits((single & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64), dtype)
        return super().round(out, dtype)


@mutant("output-truncated")
class HalfRoundedUp(Mutant):
    """Ties are rounded away from zero in bfloat16."""

    def round(self, out, dtype):
        if dtype != "bfloat16":
            return super().round(out, dtype)
        single = out.astype(np.float32).view(np.uint32)
        return ((single + np.uint32(0x8000)) >> 16).astype(np.uint16)


@mutant("sum-order-changed")
class TapsNewestFirst(Mutant):
    """Taps are added from newest to oldest."""

    def taps(self, call):
        return range(call.history, -1, -1)


@mutant("sum-order-changed")
class BiasAddedLast(Mutant):
    """The sum starts from zero and the bias comes last."""

    def convolve(self, call, row, e):
        bias, call.bias = call.bias, None
        acc = super().convolve(call, row, e)
        call.bias = bias
        return acc if bias is None else acc + bias


@mutant("bias-misapplied")
class BiasIgnored(Mutant):
    """No bias is added."""

    def convolve(self, call, row, e):
        call.bias = None
        return super().convolve(call, row, e)


@mutant("bias-misapplied")
class BiasIgnoredInUpdate(Mutant):
    """No bias is added in a decode step."""

    def convolve(self, call, row, e):
        call.bias = call.bias if call.fn else None
        return super().convolve(call, row, e)


@mutant("bias-misapplied")
class BiasAfterActivation(Mutant):
    """The bias is added to the activated sum."""

    def activate(self, call, row, pre):
        if call.bias is None or not call.activation:
            return super().activate(call, row, pre)
        return silu(pre - call.bias) + call.bias


@mutant("bias-misapplied")
class BiasRequired(Mutant):
    """A call without a bias fails."""

    def convolve(self, call, row, e):
        if call.bias is None:
            raise TypeError("unsupported operand: NoneType")
        return super().convolve(call, row, e)


@mutant("activation-hardwired")
class AlwaysSilu(Mutant):
    """SiLU whatever the caller says."""

    def activate(self, call, row, pre):
        return silu(pre)


@mutant("activation-hardwired")
class NeverSilu(Mutant):
    """No activation whatever the caller says."""

    def activate(self, call, row, pre):
        return pre.astype(np.float64)


@mutant("activation-hardwired")
class UpdateAlwaysSilu(Mutant):
    """The one-token path applies SiLU unasked."""

    def activate(self, call, row, pre):
        return super().activate(call, row, pre) if call.fn or len(pre) > 1 else silu(pre)


@mutant("activation-hardwired")
class SiluLostForManyTokens(Mutant):
    """The path for several tokens of a decode step has no activation."""

    def activate(self, call, row, pre):
        return super().activate(call, row, pre) if call.fn or len(pre) == 1 else pre.astype(np.float64)


@mutant("swish-alias-dropped")
class SwishDropped(Mutant):
    """Only the name silu is recognised."""

    def activate(self, call, row, pre):
        return silu(pre) if call.activation == "silu" else pre.astype(np.float64)


@mutant("silu-inaccurate")
class SiluUnderflowsEarly(Mutant):
    """z / (1 + exp(-z)) in float32: exp overflows from -88.8 on and the result is 0."""

    def silu(self, pre):
        return (pre / (1 + np.exp(-pre))).astype(np.float64)


@mutant("silu-inaccurate")
class SiluOverflows(Mutant):
    """z * exp(z) / (1 + exp(z)) in float32: NaN for large z."""

    def silu(self, pre):
        return (pre * np.exp(pre) / (1 + np.exp(pre))).astype(np.float64)


@mutant("silu-inaccurate")
class SigmoidRounded(Mutant):
    """The sigmoid is a bfloat16 number."""

    def silu(self, pre):
        return pre * rounded_to(1 / (1 + np.exp(-pre.astype(np.float64))), "bfloat16").astype(np.float64)


@mutant("silu-inaccurate")
class SiluByTanh(Mutant):
    """The sigmoid is (1 + tanh(z/2)) / 2 in float32, which loses the small ones."""

    def silu(self, pre):
        return (pre * (0.5 * (1 + np.tanh(0.5 * pre)))).astype(np.float64)


@mutant("wide-kernel-truncated")
class FourTapsOnly(Mutant):
    """Only the newest four taps are used."""

    def taps(self, call):
        return range(max(0, call.history - 3), call.history + 1)


@mutant("wide-kernel-truncated")
class WidthAboveFourRefused(Mutant):
    """More than four taps are refused."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        if arrays["weight"].shape[1] > 4:
            raise ValueError("weight: width must be at most 4")


@mutant("width-one-negative-zero-slice")
class WidthOneStoresEverything(Mutant):
    """The last 0 columns are taken as [-0:], which is all of them."""

    def process(self, call, row, out):
        super().process(call, row, out)
        columns = 0 if call.pool is None else call.pool.shape[1]
        if call.history == 0 and columns:
            last = self.cast(call, self.inputs(call, row).bits)[-columns:]
            call.pool.bits[row.slot, : len(last)] = last


@mutant("width-one-negative-zero-slice")
class WidthOneFails(Mutant):
    """An empty window cannot be concatenated."""

    def process(self, call, row, out):
        if call.history == 0:
            raise ValueError("zero-size array")
        super().process(call, row, out)


@mutant("output-not-truncated")
class OutputsOfPaddedLength(Mutant):
    """A single row returns width - 1 outputs too many."""

    def finish(self, call, out):
        if call.fn and len(call.slots) == 1 and call.history:
            longer = np.concatenate([out, out[-call.history :]])
            return {
                "out": from_bits(round_bits(longer, call.x.dtype), call.x.dtype),
                "conv_states": call.pool,
            }
        return super().finish(call, out)


@mutant("output-not-truncated")
class WrongEndKept(Mutant):
    """Outputs are ahead by a token: each sees the next input."""

    def convolve(self, call, row, e):
        pre = super().convolve(call, row, e)
        return np.concatenate([pre[1:], pre[-1:]])


@mutant("channel-tail-unmasked")
class ChannelTailDropped(Mutant):
    """Channels past the last full block of 16 are not computed."""

    def activate(self, call, row, pre):
        y = super().activate(call, row, pre)
        y[:, y.shape[1] // 16 * 16 :] = 0
        return y


@mutant("channel-tail-unmasked")
class ChannelTailReadsNextWeights(Mutant):
    """The last block of 64 channels reads weights one channel further on when it is not full."""

    def weight(self, call, row):
        weight, full = call.weight.copy(), call.weight.shape[0] // 64 * 64
        weight[full:] = np.roll(weight[full:], -1, axis=0)
        return weight


@mutant("channel-tail-unmasked")
class OddChannelLost(Mutant):
    """Channels are taken in pairs; the last of an odd number is lost."""

    def activate(self, call, row, pre):
        y = super().activate(call, row, pre)
        y[:, y.shape[1] // 2 * 2 :] = 0
        return y


@mutant("wrong-arch-binary")
class WrongBinary(Mutant):
    """Outputs of a 32-token call are off by a constant and the state is lost."""

    def process(self, call, row, out):
        super().process(call, row, out)
        if row.count == 32:
            out[row.start : row.stop] += 0.5


@mutant("nan-spreads")
class NanSpreadsAlongRow(Mutant):
    """Taps outside the window are multiplied by zero instead of being left out."""

    def convolve(self, call, row, e):
        return super().convolve(call, row, e) + np.float32(0) * e.sum(axis=0)


@mutant("nan-spreads")
class NanSpreadsAcrossChannels(Mutant):
    """Channels of a block of four share a zero that is not one."""

    def convolve(self, call, row, e):
        pre = super().convolve(call, row, e)
        padded = np.pad(pre, ((0, 0), (0, -pre.shape[1] % 4))).reshape(len(pre), -1, 4)
        return pre + np.repeat(padded.sum(axis=2) * np.float32(0), 4, axis=1)[:, : pre.shape[1]]


@mutant("nan-spreads")
class NanSwallowed(Mutant):
    """NaN sums become zero (a maximum or a clamp swallows them)."""

    def activate(self, call, row, pre):
        return super().activate(call, row, np.where(np.isnan(pre), np.float32(0), pre))
