"""What a front must give, and how far it may lie from that: derived, element by element, as `tolerance` does.

With u = 2**-24, y the exact output of the convolution, and e what `tolerance.error_bound` allows of it, which with
`norm_rounding` "storage" is the error of what the plain operation stores, without it that of a float32:

  sum        lies between the sums over max(|y| - e, 0)**2 and (|y| + e)**2; a square and each level of the tree are
             rounded once, and a square below the smallest normal float32 may be flushed.
  r          one rounding each for the sum with eps, the root and the division.
  q, k       the largest and the smallest |y| r within these intervals; if e exceeds |y|, also of the other sign. One
             rounding for each of the two products, and the store.
  v          e, of what is stored.
  g          z is one rounded sum. exp has the relative error of `tolerance`: its argument is a rounded product with a
             rounded constant, and EXP_ULPS. log(1 + exp(z)) moves by sigmoid(z) times the relative error of exp(z) and
             by u for the rounded sum; the logarithm has EXP_ULPS and, near 1, an absolute LOG_ERROR.
  sigmoid    the error of its argument times the slope, which is at most 1/4 and at most exp(-(|w| - e)); then as for
             SiLU.
  beta       the sigmoid, and with "storage" half an ulp of b's dtype.
  out        of the gated convolution: |C| times what `tolerance.error_bound` allows of c, and the store. B * x is
             exact before its rounding, so that u has no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from oracle import reference
from oracle.numerics import SMALLEST_NORMAL_FLOAT32, UNIT_ROUNDOFF_FLOAT32, silu, typed, ulp
from oracle.reference_prologue import SOFTPLUS_LINEAR, Gated, checked, convolution
from oracle.tolerance import EXP_ULPS, error_bound

LOG_ERROR = 2.0**-22
"""The absolute error of a logarithm whose argument is above 1 and may be near it, as that of softplus, log(1 + exp(z)).

GPUs take lg2.approx.f32 times log(2). NVIDIA's PTX ISA bounds the error of that instruction by 2**-22, absolute for arguments from 0.5
to 2 and relative beyond; log(2) < 1 leaves the first below this, and the second, 4 u, lies within EXP_ULPS. Where softplus itself is
below 2**-22 (z < -15) this admits an error of its own size: exp(g) is then 1 to within rate * 2**-22.
"""
LARGEST_FLOAT32 = 2.0**128 - 2.0**104
NOWHERE = 2.0**-1000  # the bound where the contract demands zero

_U, _TINY = UNIT_ROUNDOFF_FLOAT32, SMALLEST_NORMAL_FLOAT32


class Expected(NamedTuple):
    """One result of a call, in its shape.

    Attributes:
      values: not rounded, float64; zero where nothing is computed.
      bound: the largest allowed |result - values|.
      computed: where something is computed.
      dtype: of the result.
    """

    values: np.ndarray
    bound: np.ndarray
    computed: np.ndarray
    dtype: str


def expected(op: str, arguments: Mapping[str, Any]) -> dict[str, Expected]:
    """Every floating-point result of a front but its states, by name; without those that are None.

    Args:
      op: the operation.
      arguments: of the call by name, valid by the contract.
    """
    given = checked(op, {**arguments, "validate": False})
    inner, inside = convolution(op, arguments)
    pre, computed = reference.preactivation(inner, inside)
    magnitude, _ = reference.preactivation(inner, inside, "magnitude")
    width, activation = typed(inside["weight"]).shape[1], inside.get("activation")
    dtype = typed(inside["x"]).dtype
    y = np.where(computed, silu(pre) if activation else pre, 0.0)
    finite = np.isfinite(pre)  # what comes of an infinity is an infinity, a zero or NaN, without error
    stored = np.where(finite, error_bound(pre, magnitude, width, dtype, activation), 0.0)
    if "bcx" in given:
        return {"out": _gated(given, y, stored, computed, dtype)}
    free = np.where(finite, error_bound(pre, magnitude, width, "float32", activation), 0.0)
    e = stored if given["norm_rounding"] == "storage" else free
    return _heads(given, y, e, stored, computed, dtype) | _gates(given, computed)


def _heads(
    given: Mapping[str, Any],
    y: np.ndarray,
    e: np.ndarray,
    stored: np.ndarray,
    computed: np.ndarray,
    dtype: str,
) -> dict[str, Expected]:
    """q, k and v."""
    leading, found = y.shape[:-1], {}
    for name, (first, heads, size) in split_heads(given).items():
        part = np.s_[..., first : first + heads * size]
        values, error, live = (
            array[part].reshape(*leading, heads, size)
            for array in (y, stored if name == "v" else e, computed)
        )
        if name != "v":
            if given["qk_l2norm"]:
                values, error = normalised(values, error, float(np.float32(given["norm_eps"])))
            if name == "q":
                scale = float(np.float32(given["q_scale"]))
                values = values * scale
                error = error * abs(scale) + _U * (np.abs(values) + error * abs(scale)) + _TINY
            error = error + 0.5 * ulp(np.abs(values) + error, dtype)
        found[name] = Expected(np.where(live, values, 0.0), np.where(live, error, NOWHERE), live, dtype)
    return found


def split_heads(given: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Of q, k and v the first channel, the number of heads and the channels of a head."""
    keys = given["num_k_heads"] * given["head_k_dim"]
    return {
        "q": (0, given["num_k_heads"], given["head_k_dim"]),
        "k": (keys, given["num_k_heads"], given["head_k_dim"]),
        "v": (2 * keys, given["num_v_heads"], given["head_v_dim"]),
    }


def inverse_norm(y: np.ndarray, e: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """r of heads on the last axis, and the smallest and the largest that it may be; that axis stays."""
    size = np.abs(y)
    rounded = (max(y.shape[-1] - 1, 0).bit_length() + 1) * _U
    rounded = rounded / (1 - rounded)
    least = (np.maximum(size - e, 0) ** 2).sum(-1, keepdims=True) * (1 - rounded) - y.shape[-1] * _TINY
    most = ((size + e) ** 2).sum(-1, keepdims=True) * (1 + rounded) + y.shape[-1] * _TINY
    total = (y * y).sum(-1, keepdims=True)
    exact = 1 / np.sqrt(total + eps)
    low = np.where(most > LARGEST_FLOAT32, 0.0, (1 - 4 * _U) / np.sqrt(most + eps))
    high = (1 + 4 * _U) / np.sqrt(np.maximum(least, 0) + eps)
    return exact, low, np.where(np.isinf(total), 0.0, high)  # an infinity in the head


def normalised(y: np.ndarray, e: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """`y * r` of heads on the last axis where y has an error of at most e, and the error of that."""
    size, (exact, low, high) = np.abs(y), inverse_norm(y, e, eps)
    values = y * exact
    above = (size + e) * high * (1 + _U) - np.abs(values)
    below = np.abs(values) - np.maximum(size - e, 0) * low * (1 - _U)
    beyond = np.where(e > size, np.abs(values) + np.maximum(e - size, 0) * high * (1 + _U), 0.0)
    return values, np.maximum(np.maximum(above, below), beyond) + _TINY


def _gates(given: Mapping[str, Any], computed: np.ndarray) -> dict[str, Expected]:
    """g and beta."""
    live, found = computed[..., 0], {}
    with np.errstate(all="ignore"):
        if given["a"] is not None:
            values, error = decay(given)
            found["g"] = _gate(values, error + 0.5 * ulp(np.abs(values) + error, "float32"), live)
        if given["b"] is not None:
            b = typed(given["b"])
            values, error = sigmoid_error(b.values(), np.zeros(b.shape))
            error = error + 0.5 * ulp(values + error, "float32")
            if given["beta_rounding"] == "storage":
                error = error + 0.5 * ulp(values + error, b.dtype)
            found["beta"] = _gate(values, error, live)
    return found


def _gate(values: np.ndarray, error: np.ndarray, live: np.ndarray) -> Expected:
    live = np.broadcast_to(live.reshape(*live.shape, *[1] * (values.ndim - live.ndim)), values.shape)
    return Expected(np.where(live, values, 0.0), np.where(live, error, NOWHERE), live, "float32")


def decay(given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """g before its rounding, and its error."""
    z, rate = gate_arguments(given)
    rate_error = exp_error(np.log(rate))
    if given["lower_bound"] is not None:
        bound = float(np.float32(given["lower_bound"]))
        values, error = sigmoid_error(rate * z, np.abs(rate * z) * (rate_error + 2 * _U))
        return bound * values, abs(bound) * (error + _U * values) + _TINY
    values, error = softplus_error(z, np.abs(z) * _U)
    return -rate * values, rate * error * (1 + rate_error) + rate * values * (rate_error + _U) + _TINY


def gate_arguments(given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """`a + dt_bias` and `exp(A_log)`, which has the axes of `a` behind the heads."""
    z, rate = typed(given["a"]).values(), np.exp(typed(given["A_log"]).values())
    if given["dt_bias"] is not None:
        z = z + typed(given["dt_bias"]).values()
    channel = z.ndim > len(typed(given["x"]).shape)
    return z, rate[:, None] if channel else rate


def exp_error(argument: np.ndarray) -> np.ndarray:
    """The relative error of exp in float32."""
    return 2 * np.abs(argument) * _U + EXP_ULPS * 2 * _U


def softplus_error(z: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """softplus of an argument with an error of at most e, and the error of that."""
    values = np.where(z > SOFTPLUS_LINEAR, z, np.logaddexp(0.0, z))
    error = e * sigmoid(z + e) + exp_error(z) * sigmoid(z) + _U + LOG_ERROR + EXP_ULPS * 2 * _U * values
    return values, np.where(z > SOFTPLUS_LINEAR + e, e, error) + _TINY


def sigmoid_error(w: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sigmoid of an argument with an error of at most e, and the error of that."""
    values = sigmoid(w)
    moved = e * np.minimum(0.25, np.exp(-np.maximum(np.abs(w) - e, 0)))
    argument = values * 2 * np.abs(w) * _U * sigmoid(-w)
    return values, moved + argument + EXP_ULPS * 2 * _U * values + _TINY


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Without overflow."""
    decayed = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, decayed) / (1.0 + decayed)


def _gated(
    given: Mapping[str, Any], y: np.ndarray, stored: np.ndarray, computed: np.ndarray, dtype: str
) -> Expected:
    """out of the gated convolution."""
    gate = Gated().slices(given)[1].values()
    with np.errstate(all="ignore"):
        values, error = gate * y, np.abs(gate) * stored + _TINY
        error = error + 0.5 * ulp(np.abs(values) + error, dtype)
    return Expected(np.where(computed, values, 0.0), np.where(computed, error, NOWHERE), computed, dtype)
