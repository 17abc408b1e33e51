"""How far a gradient of a front may lie from the reference: derived, as `tolerance_prologue` and `tolerance_grad` do.

dn         of q one rounded product with q_scale.
sum n dn   the error of each n times |dn|, and one rounding for each product and sum of a head.
dy         the error of r times what it multiplies, r times the error of that, and four rounded products and sums.
conv       `tolerance_grad.gradient_bounds`, with dy's error.
da, db     the errors of the rate, of the argument and of the sigmoid; s (1 - s) may be computed by a difference, which
rounds once; five rounded products. Parameters sum them over tokens, as dbias, and A_log over channels.
gated      c has the error of what the plain operation stores; du that of the convolution's dx in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle import contract_prologue
from oracle.numerics import (
    SMALLEST_NORMAL_FLOAT32,
    UNIT_ROUNDOFF_FLOAT32,
    rounded,
    silu,
    typed,
    ulp,
)
from oracle.reference_grad import float64
from oracle.reference_prologue import SOFTPLUS_LINEAR, Gated
from oracle.reference_prologue_grad import UPSTREAM, FrontBackward, FrontGradients, GatedGradients
from oracle.tolerance import error_bound
from oracle.tolerance_grad import BLOCK, gradient_bounds
from oracle.tolerance_prologue import (
    exp_error,
    inverse_norm,
    normalised,
    sigmoid,
    sigmoid_error,
    softplus_error,
    split_heads,
)

_U, _TINY = UNIT_ROUNDOFF_FLOAT32, SMALLEST_NORMAL_FLOAT32


def prologue_bounds(upstream: Mapping[str, Any], arguments: Mapping[str, Any]) -> FrontGradients:
    """The largest allowed |gradient - reference| of `reference_prologue_grad.gated_delta_prologue_backward`."""
    call = contract_prologue.PrologueCall(**arguments)
    call.check()
    given = {**call._asdict(), **dict.fromkeys(UPSTREAM), **upstream}
    y, stored, free, live = _convolved(given)
    dy, error = _into_heads(given, y, stored if given["norm_rounding"] == "storage" else free)
    dy, error = (np.where(live[:, None], part, 0.0) for part in (dy, error))
    conv = _conv_bounds(given, dy, error)
    return FrontGradients(*conv, *_gates(given, live))


def gated_bounds(upstream: Mapping[str, Any], arguments: Mapping[str, Any]) -> GatedGradients:
    """The same of `reference_prologue_grad.gated_short_conv_backward`."""
    call = contract_prologue.GatedConvCall(**arguments)
    given: dict[str, Any] = {**call._asdict(), "channel_offsets": call.check().offsets, "dfinal_states": None}
    given |= upstream
    steps, dtype = Gated(), typed(given["bcx"]).dtype
    b, c_gate, x = steps.slices(given)
    u = steps.gate_in(b, x)
    inside = {**given, "x": u}
    c, stored, _, live = _convolved(inside)
    gates = [part.values().reshape(c.shape) for part in (b, c_gate, x)]
    dout = np.where(live[:, None], float64(given["dout"]).reshape(c.shape), 0.0)
    dc = np.where(live[:, None], dout * gates[1], 0.0)
    wide = rounded(u.values(), "float32")
    exact = FrontBackward().gradients({**inside, "dout": dc, "x": u}).x.reshape(c.shape)
    conv = _conv_bounds({**inside, "x": wide}, dc, _U * np.abs(dc) + _TINY)
    du = conv[0].reshape(c.shape)
    values, error = np.zeros((2, len(c), given["bcx"].shape[-1]))
    parts = ((exact * gates[2], du * np.abs(gates[2])), (dout * c, np.abs(dout) * stored),
             (exact * gates[0], du * np.abs(gates[0])))  # fmt: skip
    for first, (part, part_error) in zip(given["channel_offsets"], parts, strict=True):
        here = np.s_[:, first : first + c.shape[1]]
        size = np.abs(np.where(live[:, None], part, 0.0))
        values[here] += size
        error[here] += np.where(live[:, None], part_error, 0.0) + 3 * _U * size + _TINY
    error += 0.5 * ulp(values + error, dtype)
    return GatedGradients(error.reshape(given["bcx"].shape), *conv[1:])


def _convolved(given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The convolution's output [tokens, dim], its error as it is stored and in float32, and the tokens of rows."""
    steps = FrontBackward()
    pre, live = steps.forward({**given, "activation": None})
    absolute = {name: _absolute(given[name]) for name in ("x", "weight", "bias", "initial_states")}
    magnitude, _ = steps.forward({**given, **absolute, "activation": None})
    width, activation, dtype = given["weight"].shape[1], given["activation"], typed(given["x"]).dtype
    stored, free = (error_bound(pre, magnitude, width, kind, activation) for kind in (dtype, "float32"))
    return (silu(pre) if activation else pre), stored, free, live


def _absolute(array: Any) -> Any:
    return None if array is None else rounded(np.abs(typed(array).values()), typed(array).dtype)


def _conv_bounds(given: Mapping[str, Any], dy: np.ndarray, error: np.ndarray) -> Any:
    return gradient_bounds(
        dy, given["dfinal_states"], given["x"], given["weight"], given["bias"], given["initial_states"],
        given["query_start_loc"], activation=given["activation"], dout_error=error,
    )  # fmt: skip


def _into_heads(given: Mapping[str, Any], y: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dy and its error."""
    exact, error = FrontBackward().into_heads(given, y), np.zeros(y.shape)
    eps = float(np.float32(given["norm_eps"]))
    for name, (first, heads, size) in split_heads(given).items():
        here = np.s_[:, first : first + heads * size]
        if name == "v" or given[f"d{name}"] is None:
            continue
        shape = (len(y), heads, size)
        dn = float64(given[f"d{name}"]).reshape(shape)
        dn_error = np.zeros(shape)
        if name == "q":
            dn = dn * float(np.float32(given["q_scale"]))
            dn_error = _U * np.abs(dn) + _TINY
        if not given["qk_l2norm"]:
            error[here] = dn_error.reshape(len(y), -1)
            continue
        part, part_error = y[here].reshape(shape), e[here].reshape(shape)
        n, n_error = normalised(part, part_error, eps)
        r, low, high = inverse_norm(part, part_error, eps)
        r_error = np.maximum(high - r, r - low)
        n_size, dn_size = np.abs(n) + n_error, np.abs(dn) + dn_error
        along = (n * dn).sum(-1, keepdims=True)
        total = (n_size * dn_size).sum(-1, keepdims=True)
        along_error = (n_error * dn_size + n_size * dn_error).sum(-1, keepdims=True)
        along_error += (size + 3) * _U * total + size * _TINY
        inner = dn - n * along
        inner_error = (
            dn_error + n_error * np.abs(along) + n_size * along_error + 4 * _U * (dn_size + n_size * total)
        )
        found = high * inner_error + r_error * np.abs(inner) + 2 * _U * high * np.abs(inner) + _TINY
        error[here] = found.reshape(len(y), -1)
    return exact, error


def _gates(given: Mapping[str, Any], live: np.ndarray) -> list[np.ndarray | None]:
    """Bounds of da, db, dA_log and ddt_bias."""
    steps, found = FrontBackward(), dict.fromkeys(("a", "b", "A_log", "dt_bias"))
    result: dict[str, np.ndarray | None] = dict(found)
    with np.errstate(all="ignore"):
        if given["a"] is not None:
            dz, drate = (steps.of_live(part, live) for part in steps.through_decay(given, live))
            dz_error, drate_error = (steps.of_live(part, live) for part in _decay_errors(given, live))
            result["a"] = _store(dz, dz_error, given["a"])
            for name, terms, error in (("A_log", drate, drate_error), ("dt_bias", dz, dz_error)):
                if given[name] is not None:
                    result[name] = _summed(terms, error, given[name], steps.sizes(given).batch)
        if given["b"] is not None:
            b = steps.per_token(given, "b", live)
            size = np.abs(steps.upstream_of(given, "dbeta", b.shape))
            values, error = _slope_of_sigmoid(b, np.zeros(b.shape))
            error = steps.of_live(size * (error + 4 * _U * values) + _TINY, live)
            result["b"] = _store(steps.of_live(size * values, live), error, given["b"])
    return list(result.values())


def _slope_of_sigmoid(w: np.ndarray, e: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`s * (1 - s)`, and its error where `1 - s` is a difference."""
    s, error = sigmoid_error(w, e)
    return s * sigmoid(-w), error * (1 + s) + 2 * _U * s


def _decay_errors(given: Mapping[str, Any], live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the gradients of z and of the logarithm of the rate."""
    steps = FrontBackward()
    z, log_rate = steps.per_token(given, "a", live), float64(given["A_log"])
    log_rate = log_rate.reshape(*log_rate.shape, *[1] * (z.ndim - 2))
    if given["dt_bias"] is not None:
        z = z + float64(given["dt_bias"])
    rate, inexact = np.exp(log_rate), exp_error(log_rate)
    size = np.abs(steps.upstream_of(given, "dg", z.shape))
    if given["lower_bound"] is not None:
        w, bound = rate * z, abs(float(np.float32(given["lower_bound"])))
        w_error = np.abs(w) * (inexact + 2 * _U)
        slope, slope_error = _slope_of_sigmoid(w, w_error)
        dw, dw_error = bound * slope * size, bound * size * (slope_error + 4 * _U * slope) + _TINY
        return (
            rate * (dw_error * (1 + inexact) + dw * (inexact + 2 * _U)) + _TINY,
            np.abs(w) * dw_error + (dw + dw_error) * w_error + 2 * _U * np.abs(w) * dw + _TINY,
        )
    slope = np.where(z > SOFTPLUS_LINEAR, 1.0, sigmoid(z))
    _, slope_error = sigmoid_error(z, np.abs(z) * _U)
    values, error = softplus_error(z, np.abs(z) * _U)
    return (
        rate * size * (slope_error * (1 + inexact) + slope * (inexact + 4 * _U)) + _TINY,
        rate * size * (error * (1 + inexact) + values * (inexact + 4 * _U)) + _TINY,
    )


def _summed(terms: np.ndarray, error: np.ndarray, argument: Any, rows: int) -> np.ndarray:
    """The bound of a sum over tokens, and over the channels that a parameter has not."""
    tokens, shape = len(terms), typed(argument).shape
    depth = min(BLOCK, tokens) + -(-tokens // BLOCK) + rows + 2
    axes: tuple[int, ...] = (0,)
    if terms.ndim - 1 > len(shape):
        axes, depth = (0, terms.ndim - 1), depth + terms.shape[-1]
    size = (np.abs(terms) + error).sum(axis=axes)
    return _store(terms.sum(axis=axes), error.sum(axis=axes) + depth * _U * size, argument)


def _store(values: np.ndarray, error: np.ndarray, argument: Any) -> np.ndarray:
    error = error + _TINY
    return (error + 0.5 * ulp(np.abs(values) + error, typed(argument).dtype)).reshape(typed(argument).shape)
