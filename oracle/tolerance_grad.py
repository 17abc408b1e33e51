"""How far a gradient may lie from the reference: derived, element by element, as `tolerance` does for outputs.

With u = 2**-24, z the exact pre-activation, M = |bias| + sum |w e|, s = sigmoid(z) and d = SiLU'(z):

  recomputed z   e = 2 * width * u * M, as in the forward pass.
  slope          e times SiLU'', which within e of z is at most 0.5 and at most
                 sigmoid(e - |z|) * (2 + |z| + e).
  argument       the exponent of exp2 is a rounded product and sum with a rounded constant: a relative error
                 of (2 |z| + 10) u of exp(-z), which moves d by at most s (1 - s) (1 + |z|) times that.
  SiLU'          SLOPE_ULPS ulps of s (1 + |z| (1 - s)) for exp2, reciprocal, products and sums.
  g              |dout| times these, one rounding of the product, and what a flush to zero may take: 2**-126 of
                 SiLU' and of the product. Without an activation g is dout itself, without error.
  dx, dinitial   width products and sums of w g and one sum with dfinal, at most 2 (width + 1) u of their
                 absolute sum, and the error of each g times |w|.
  dweight, dbias a float32 sum whose every term passes at most `depth` roundings. That many suffice for sums
                 over at most BLOCK tokens of a row, one token after another, and then over these sums, one
                 after another. A longer chain loses more digits than it needs to.
  store          half an ulp of the gradient's dtype, at the far end of the interval so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from oracle import contract
from oracle.numerics import SMALLEST_NORMAL_FLOAT32, UNIT_ROUNDOFF_FLOAT32, typed, ulp
from oracle.reference_grad import Gradients, float64, rows, sigmoid, silu_slope

SLOPE_ULPS = 8  # two approximations of at most 2 ulp each, and four rounded products and sums
BLOCK = 512


def gradient_bounds(
    dout: Any,
    dfinal_states: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    initial_states: Any = None,
    query_start_loc: Any = None,
    *,
    activation: str | None = None,
    dout_error: np.ndarray | None = None,
) -> Gradients:
    """The largest allowed |gradient - reference| of every element, for arguments as in `causal_conv1d_backward`.

    Each gradient has the dtype of its argument. `dout_error` is how far dout itself may lie from what is given.
    """
    sizes = contract.RowsCall(x, weight, bias, initial_states, query_start_loc, activation=activation).check()
    history = sizes.width - 1
    w = typed(weight).values()
    start = np.zeros(sizes.dim) if bias is None else typed(bias).values()
    upstream = float64(dout).reshape(sizes.tokens, sizes.dim)
    moved = np.zeros(upstream.shape) if dout_error is None else dout_error.reshape(upstream.shape)
    upstream_state = None if dfinal_states is None else np.abs(float64(dfinal_states))
    u, taken = UNIT_ROUNDOFF_FLOAT32, SMALLEST_NORMAL_FLOAT32
    rounded = (min(BLOCK, sizes.tokens) + -(-sizes.tokens // BLOCK) + sizes.batch + 2) * u

    value = np.zeros((2, sizes.tokens, sizes.dim))  # of dx: exact, error
    weight_value, weight_error = np.zeros(w.shape), np.zeros(w.shape)
    bias_value, bias_error = np.zeros(sizes.dim), np.zeros(sizes.dim)
    initial = np.zeros((2, sizes.batch, history, sizes.dim))
    for row in rows(sizes, x, initial_states, query_start_loc):
        length = len(row.entries) - history
        taps = [row.entries[j : j + length] for j in range(sizes.width)]
        pre = start + sum(w[:, j] * taps[j] for j in range(sizes.width))
        magnitude = np.abs(start) + sum(np.abs(w[:, j] * taps[j]) for j in range(sizes.width))
        g = upstream[row.tokens]
        g_error = moved[row.tokens]
        if activation:
            slope, inexact = silu_slope(pre), slope_error(pre, 2 * sizes.width * u * magnitude)
            g_error = np.abs(g) * inexact + g_error * (np.abs(slope) + inexact)
            g = g * slope
            g_error += u * np.abs(g) + taken
        size = np.abs(g) + g_error

        exact, error, total = (np.zeros(row.entries.shape) for _ in range(3))
        for j in range(sizes.width):
            here = slice(j, j + length)
            exact[here] += w[:, j] * g
            total[here] += np.abs(w[:, j]) * size
            error[here] += np.abs(w[:, j]) * g_error
            weight_value[:, j] += (taps[j] * g).sum(axis=0)
            weight_error[:, j] += (np.abs(taps[j]) * (g_error + rounded * size)).sum(axis=0)
        bias_value += g.sum(axis=0)
        bias_error += (g_error + rounded * size).sum(axis=0)
        if upstream_state is not None:
            exact[length:] += float64(dfinal_states)[row.row]
            total[length:] += upstream_state[row.row]
        error += 2 * (sizes.width + 1) * u * total
        for target, source in zip((value, initial), (np.s_[history:], np.s_[:history]), strict=True):
            place = row.tokens if target is value else row.row
            target[0, place], target[1, place] = exact[source], error[source]

    def stored(exact: np.ndarray, error: np.ndarray, argument: Any) -> np.ndarray:
        error = error + taken
        return error + 0.5 * ulp(np.abs(exact) + error, typed(argument).dtype)

    return Gradients(
        stored(value[0], value[1], x).reshape(x.shape),
        stored(weight_value, weight_error, weight),
        None if bias is None else stored(bias_value, bias_error, bias),
        None if initial_states is None else stored(initial[0], initial[1], initial_states),
    )


def slope_error(z: np.ndarray, e: np.ndarray) -> np.ndarray:
    """The error of SiLU' where z was computed with an error of at most `e`."""
    u, size = UNIT_ROUNDOFF_FLOAT32, np.abs(z)
    s, rest = sigmoid(z), sigmoid(-z)
    moved = e * np.minimum(0.5, sigmoid(e - size) * (2 + size + e))
    argument = s * rest * (1 + size) * (2 * size + 10) * u
    return moved + argument + SLOPE_ULPS * 2 * u * s * (1 + size * rest) + SMALLEST_NORMAL_FLOAT32
