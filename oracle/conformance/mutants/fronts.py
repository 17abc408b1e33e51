"""Mistakes of the fronts of linear-attention layers."""

from __future__ import annotations

import numpy as np

from oracle.conformance.model import rounded_to
from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray
from oracle.reference_prologue import tree_sum


@mutant("norm-over-all-heads")
class NormOverAllHeads(Mutant):
    """Adds the squares of all heads."""

    def sum_of_squares(self, call, y):
        return tree_sum((y * y).reshape(len(y), 1, -1))


@mutant("norm-over-all-heads")
class NormIsAMean(Mutant):
    """Divides by the mean of the squares, as RMSNorm does."""

    def sum_of_squares(self, call, y):
        return super().sum_of_squares(call, y) / np.float32(y.shape[-1])


@mutant("norm-eps-outside-root")
class EpsOutsideTheRoot(Mutant):
    """Adds eps to the norm."""

    def norm(self, call, y):
        return y / (np.sqrt(self.sum_of_squares(call, y)) + np.float32(call.given["norm_eps"]))


@mutant("norm-eps-outside-root")
class EpsAsAFloor(Mutant):
    """Takes the larger of norm and eps, as torch.nn.functional.normalize does."""

    def norm(self, call, y):
        return y / np.maximum(np.sqrt(self.sum_of_squares(call, y)), np.float32(call.given["norm_eps"]))


@mutant("norm-eps-outside-root")
class EpsFixed(Mutant):
    """Uses 1e-6 whatever the call says."""

    def norm(self, call, y):
        return y * (np.float32(1) / np.sqrt(self.sum_of_squares(call, y) + np.float32(1e-6)))


@mutant("norm-before-activation")
class NormBeforeActivation(Mutant):
    """Normalises the sums of the convolution, and activates what comes of it."""

    def activate(self, call, row, pre):
        return pre.astype(np.float64) if "head_k_dim" in call.given else super().activate(call, row, pre)

    def heads(self, call, y):
        return [
            super(NormBeforeActivation, self).silu(part).astype(np.float32) for part in super().heads(call, y)
        ]


@mutant("norm-of-v")
class NormOfV(Mutant):
    """Normalises every head."""

    def heads(self, call, y):
        q, k, v = super().heads(call, y)
        return [q, k, self.norm(call, v)]


@mutant("norm-of-v")
class NormOfQAlone(Mutant):
    """Leaves k as it is."""

    def heads(self, call, y):
        q, _, v = super().heads(call, y)
        keys = call.given["num_k_heads"] * call.given["head_k_dim"]
        return [q, y[:, keys : 2 * keys].reshape(q.shape), v]


@mutant("norm-misapplied")
class NormAlways(Mutant):
    """Normalises whatever the call says."""

    def heads(self, call, y):
        call.given = {**call.given, "qk_l2norm": True}
        return super().heads(call, y)


@mutant("norm-rounding-misplaced")
class RoundedBeforeTheNorm(Mutant):
    """Rounds to x's dtype before the norm, always."""

    def stored(self, call, y):
        return rounded_to(y, call.x.dtype)


@mutant("norm-rounding-misplaced")
class NeverRoundedBeforeTheNorm(Mutant):
    """Hands float32 to the norm, always."""

    def stored(self, call, y):
        return y.astype(np.float32)


@mutant("norm-sum-order")
class SquaresFromOneEnd(Mutant):
    """Adds the squares one after another."""

    def sum_of_squares(self, call, y):
        total = np.zeros((*y.shape[:-1], 1), np.float32)
        for i in range(y.shape[-1]):
            total = total + y[..., i : i + 1] * y[..., i : i + 1]
        return total


@mutant("norm-sum-order")
class HalvesNotNeighbours(Mutant):
    """Adds the second half to the first, and so on."""

    def sum_of_squares(self, call, y):
        width = 1 << (y.shape[-1] - 1).bit_length()
        sums = np.pad(y * y, [(0, 0), (0, 0), (0, width - y.shape[-1])])
        while sums.shape[-1] > 1:
            half = sums.shape[-1] // 2
            sums = sums[..., :half] + sums[..., half:]
        return sums


@mutant("norm-sum-order")
class ApproximateRoot(Mutant):
    """Takes the reciprocal root in one approximation that is an ulp off."""

    def norm(self, call, y):
        r = np.float32(1) / np.sqrt(self.sum_of_squares(call, y) + np.float32(call.given["norm_eps"]))
        return y * np.nextafter(r, np.float32(0))


@mutant("q-scale-misapplied")
class ScaledTwice(Mutant):
    """Scales q before and behind the norm's store."""

    def scale(self, call, q):
        return super().scale(call, super().scale(call, q))


@mutant("q-scale-misapplied")
class ScaledWithTheNormAlone(Mutant):
    """Loses the scale without the norm."""

    def scale(self, call, q):
        return super().scale(call, q) if call.given["qk_l2norm"] else q


@mutant("q-scale-misapplied")
class ScaledWithK(Mutant):
    """Scales k as well."""

    def heads(self, call, y):
        q, k, v = super().heads(call, y)
        return [q, self.scale(call, k), v]


@mutant("head-tail-unmasked")
class NeighbourInTheSum(Mutant):
    """Takes the squares of the channels that follow until the head is a power of two."""

    def sum_of_squares(self, call, y):
        tokens, heads, size = y.shape
        width = 1 << (size - 1).bit_length()
        flat = np.pad((y * y).reshape(tokens, -1), [(0, 0), (0, width)])
        return np.stack([tree_sum(flat[:, h * size : h * size + width]) for h in range(heads)], axis=1)


@mutant("head-tail-unmasked")
class LastChannelsDropped(Mutant):
    """Adds only as many squares as the largest power of two holds."""

    def sum_of_squares(self, call, y):
        return tree_sum((y * y)[..., : 1 << y.shape[-1].bit_length() - 1])


@mutant("heads-misordered")
class KeysFirst(Mutant):
    """Takes the first channels for k."""

    def heads(self, call, y):
        keys = call.given["num_k_heads"] * call.given["head_k_dim"]
        exchanged = np.concatenate([y[:, keys : 2 * keys], y[:, :keys], y[:, 2 * keys :]], axis=1)
        return super().heads(call, exchanged)


@mutant("heads-misordered")
class HeadsInterleaved(Mutant):
    """Takes neighbouring channels for different heads."""

    def heads(self, call, y):
        found = super().heads(call, y)
        found[2] = (
            y[:, -found[2][0].size :].reshape(len(y), found[2].shape[2], -1).swapaxes(1, 2)
            if len(y)
            else found[2]
        )
        return found


@mutant("heads-misordered")
class QueriesRepeated(Mutant):
    """Gives q and k one head for each head of v."""

    def heads(self, call, y):
        q, k, v = super().heads(call, y)
        times = call.given["num_v_heads"] // call.given["num_k_heads"]
        return [np.repeat(q, times, axis=1), np.repeat(k, times, axis=1), v]


@mutant("softplus-overflow")
class SoftplusOverflows(Mutant):
    """Takes log(1 + exp(z)) for every z."""

    def softplus(self, z):
        return np.log1p(np.exp(z))


@mutant("softplus-overflow")
class SigmoidOverflows(Mutant):
    """Takes exp(z) / (1 + exp(z))."""

    def sigmoid(self, z):
        return np.exp(z) / (1 + np.exp(z))


@mutant("decay-misapplied")
class RateNotThroughExp(Mutant):
    """Takes A_log for the rate."""

    def per_head(self, call, name, a):
        values = super().per_head(call, name, a)
        return np.log(np.abs(values)) if name == "A_log" else values


@mutant("decay-misapplied")
class TimeBiasDropped(Mutant):
    """Ignores dt_bias."""

    def per_head(self, call, name, a):
        values = super().per_head(call, name, a)
        return values * np.float32(0) if name == "dt_bias" else values


@mutant("decay-misapplied")
class RatesOfOtherHeads(Mutant):
    """Takes the rate of the head before."""

    def per_head(self, call, name, a):
        values = super().per_head(call, name, a)
        return np.roll(values, 1, axis=0) if name == "A_log" else values


@mutant("decay-misapplied")
class BoundIsAClamp(Mutant):
    """Bounds softplus's g from below."""

    def decay(self, call, a):
        if call.given["lower_bound"] is None:
            return super().decay(call, a)
        bound, call.given = call.given["lower_bound"], {**call.given, "lower_bound": None}
        return np.maximum(super().decay(call, a), np.float32(bound))


@mutant("beta-rounded")
class BetaInStorage(Mutant):
    """Rounds beta to 16 bits."""

    def round_beta(self, call, beta, dtype):
        return rounded_to(beta.astype(np.float64), "bfloat16" if dtype == "float32" else dtype)


@mutant("beta-rounded")
class BetaNeverRounded(Mutant):
    """Keeps beta in float32."""

    def round_beta(self, call, beta, dtype):
        return beta


@mutant("gates-not-optional")
class GateWithoutInput(Mutant):
    """Gives zeros for a gate that was not asked for."""

    def gates(self, call):
        zeros = np.zeros((len(call.x.data), call.given["num_v_heads"]), np.float32)
        return [zeros if gate is None else gate for gate in super().gates(call)]


@mutant("dead-rows-in-front")
class DeadRowsGated(Mutant):
    """Computes gates of rows that do nothing."""

    def dead(self, values, live):
        return values


@mutant("dead-rows-in-front")
class ZeroOverZero(Mutant):
    """Divides a row of zeros by its norm."""

    def norm(self, call, y):
        norm = np.sqrt(self.sum_of_squares(call, y))
        found = super().norm(call, y)
        return np.where(norm == 0, y / norm, found)

    def dead(self, values, live):
        mask = live.reshape(-1, *[1] * (values.ndim - 1))
        return np.where(mask | np.isnan(values), values, 0)


@mutant("dead-rows-in-front")
class DeadRowsMultiplied(Mutant):
    """Multiplies by a mask, which keeps NaN."""

    def dead(self, values, live):
        return values * live.reshape(-1, *[1] * (values.ndim - 1))


@mutant("norm-gradient-wrong")
class NormIsAConstant(Mutant):
    """Takes the norm for a constant in the backward pass."""

    def through_norm(self, y, dn, eps):
        return dn / np.sqrt((y * y).sum(-1, keepdims=True) + eps)


@mutant("norm-gradient-wrong")
class ProjectedOverAllHeads(Mutant):
    """Projects the gradient of a head on all heads."""

    def through_norm(self, y, dn, eps):
        r = 1 / np.sqrt((y * y).sum(-1, keepdims=True) + eps)
        n = y * r
        return r * (dn - n * (n * dn).sum((-1, -2), keepdims=True))


@mutant("q-scale-misapplied")
class GradientNotScaled(Mutant):
    """Forgets the scale of q in the backward pass."""

    def into_heads(self, given, y):
        return super().into_heads({**given, "q_scale": 1.0}, y)


@mutant("gate-gradient-wrong")
class SoftplusIsLinear(Mutant):
    """Takes 1 for the slope of softplus."""

    def softplus_slope(self, z):
        return np.ones_like(z)


@mutant("gate-gradient-wrong")
class RateNotDifferentiated(Mutant):
    """Takes the gradient of the rate for that of its logarithm."""

    def through_decay(self, given, live):
        dz, drate = super().through_decay(given, live)
        rate = np.exp(given["A_log"].values()).astype(np.float32)
        return dz, drate / rate.reshape(*rate.shape, *[1] * (drate.ndim - 2))


@mutant("gate-gradient-wrong")
class ParametersOfTheLastToken(Mutant):
    """Gives A_log and dt_bias what the last token alone gives them."""

    def over_tokens(self, values, shape):
        return super().over_tokens(values[-1:] if len(values) else values, shape)


@mutant("gate-gradient-wrong")
class SlopeOfBetaMissing(Mutant):
    """Hands the gradient of beta to b as it is."""

    def into_gates(self, given, live):
        da, drate, db = super().into_gates(given, live)
        if db is not None:
            db = self.of_live(self.upstream_of(given, "dbeta", db.shape), live)
        return da, drate, db


@mutant("gated-gradient-wrong")
class GradientsExchanged(Mutant):
    """Gives x the gradient of B."""

    def of_slices(self, du, dout, c, gate_in, x):
        db, dc, dx = super().of_slices(du, dout, c, gate_in, x)
        return dx, dc, db


@mutant("gated-gradient-wrong")
class SharedChannelsOverwritten(Mutant):
    """Lets the last of overlapping slices have its channels."""

    def add_slice(self, into, part):
        into[...] = part


@mutant("gate-slices-exchanged")
class GatesExchanged(Mutant):
    """Takes B for C."""

    def slices(self, given):
        b, c, x = super().slices(given)
        return [c, b, x]


@mutant("gate-slices-exchanged")
class SlicesAtFixedPlaces(Mutant):
    """Takes the slices to lie side by side."""

    def offsets(self, given):
        dim = given["weight"].shape[0]
        return (0, dim, 2 * dim) if given["bcx"].shape[-1] >= 3 * dim else super().offsets(given)


@mutant("gated-product-misplaced")
class PoolOfX(Mutant):
    """Keeps x, and multiplies by B of the newest token behind the convolution."""

    def gate_in(self, gate, x):
        self.first_gate = gate
        return x

    def gate_out(self, gate, c):
        return gate * self.first_gate.values().reshape(c.shape) * c


@mutant("gated-product-misplaced")
class ProductNotRounded(Mutant):
    """Hands the float32 product to the convolution."""

    def gated(self, op, given):
        b, _, x = self.slices(given)
        self.exact = (b.values() * x.values()).reshape(-1, x.shape[-1])
        return super().gated(op, given)

    def extended(self, call, row, window):
        if "bcx" not in self.arrays:
            return super().extended(call, row, window)
        inputs = self.exact[row.tokens]
        return np.concatenate([window.values(), inputs]).astype(self.dtype)


@mutant("gated-product-misplaced")
class GateMeetsTheSum(Mutant):
    """Multiplies the unrounded sum by C."""

    def rounded_conv(self, u: TypedArray, c):
        return c
