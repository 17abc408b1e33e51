"""The reference of the differentiable form and of its gradients, one row at a time, in float64.

With `e = initial ++ x` of a row of `length` tokens, `history = width - 1` and `g = dout * act'(pre)`:

    de[i]      = sum(weight[:, j] * g[i - j] for j in range(width) if 0 <= i - j < length)
               + dfinal[i - length]  if i >= length      (the final state is e[length:])
    dinitial   = de[:history],   dx = de[history:]
    dweight[j] = sum over rows and t of e[t + j] * g[t],   dbias = sum over rows and t of g[t]

In a row shorter than the window, entries of the initial state survive into the final one: then `dfinal` reaches
`dinitial` (the case i < history above), through a row of zero tokens whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from oracle import contract, reference
from oracle.contract import ConvOutput
from oracle.numerics import silu, typed


class Gradients(NamedTuple):
    """One array for each differentiable argument, in its shape, float64; None where the argument is None."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    initial_states: np.ndarray | None


class Row(NamedTuple):
    """One row of a call: which, its tokens, and `e = initial ++ x`, [history + length, dim] float64."""

    row: int
    tokens: slice
    entries: np.ndarray


def causal_conv1d(
    x: Any,
    weight: Any,
    bias: Any = None,
    initial_states: Any = None,
    query_start_loc: Any = None,
    *,
    activation: Any = None,
    max_seqlen: Any = None,
    schedule: Any = "auto",
    backend: Any = "auto",
) -> ConvOutput:
    """The differentiable form; see `contract.check_causal_conv1d`. Arrays are NumPy's or TypedArrays.

    `schedule` and `backend` are accepted and ignored, `max_seqlen` is only validated.
    """
    sizes = contract.check_causal_conv1d(
        x, weight, bias, initial_states, query_start_loc,
        activation=activation, max_seqlen=max_seqlen, schedule=schedule, backend=backend,
    )  # fmt: skip
    flat = typed(x)
    flat = type(flat)(flat.dtype, flat.data.reshape(sizes.tokens, sizes.dim))
    if initial_states is None:
        pool = type(flat)(flat.dtype, np.zeros((sizes.batch, sizes.width - 1, sizes.dim), flat.data.dtype))
    else:
        pool = typed(initial_states)
    has_state = np.full(sizes.batch, initial_states is not None)
    out, states = reference.causal_conv1d_fn(
        flat, weight, bias, pool, offsets(sizes, query_start_loc), None, has_state, activation=activation
    )
    out = type(out)(out.dtype, out.data.reshape(x.shape))
    like = reference._like
    return ConvOutput(like(x, out), like(x if initial_states is None else initial_states, states))


def causal_conv1d_backward(
    dout: Any,
    dfinal_states: Any,
    x: Any,
    weight: Any,
    bias: Any = None,
    initial_states: Any = None,
    query_start_loc: Any = None,
    *,
    activation: str | None = None,
) -> Gradients:
    """The gradients of `sum(dout * out) + sum(dfinal_states * conv_states)`, not rounded.

    Args:
      dout: x's shape; TypedArray or NumPy floats.
      dfinal_states: [batch, width-1, dim], or None for zeros.
      x, weight, bias, initial_states, query_start_loc, activation: as in `causal_conv1d`.
    """
    sizes = contract.check_causal_conv1d(
        x, weight, bias, initial_states, query_start_loc, activation=activation
    )
    history = sizes.width - 1
    w = typed(weight).values()
    start = np.zeros(sizes.dim) if bias is None else typed(bias).values()
    upstream = float64(dout).reshape(sizes.tokens, sizes.dim)
    upstream_state = None if dfinal_states is None else float64(dfinal_states)

    dx = np.zeros((sizes.tokens, sizes.dim))
    dweight, dbias = np.zeros(w.shape), np.zeros(sizes.dim)
    dinitial = np.zeros((sizes.batch, history, sizes.dim))
    for row in rows(sizes, x, initial_states, query_start_loc):
        length = len(row.entries) - history
        taps = [row.entries[j : j + length] for j in range(sizes.width)]
        pre = start + sum(w[:, j] * taps[j] for j in range(sizes.width))
        g = upstream[row.tokens] * (silu_slope(pre) if activation else 1.0)
        de = np.zeros(row.entries.shape)
        for j in range(sizes.width):
            de[j : j + length] += w[:, j] * g
            dweight[:, j] += (taps[j] * g).sum(axis=0)
        dbias += g.sum(axis=0)
        if upstream_state is not None:
            de[length:] += upstream_state[row.row]
        dinitial[row.row] = de[:history]
        dx[row.tokens] = de[history:]
    return Gradients(
        dx.reshape(x.shape),
        dweight,
        None if bias is None else dbias,
        None if initial_states is None else dinitial,
    )


def rows(sizes: contract.RowSizes, x: Any, initial_states: Any, query_start_loc: Any) -> Iterator[Row]:
    """The rows of a checked call, those of zero tokens too. Offsets are clamped to [0, tokens]."""
    values = typed(x).values().reshape(sizes.tokens, sizes.dim)
    zeros = np.zeros((sizes.batch, sizes.width - 1, sizes.dim))
    initial = zeros if initial_states is None else typed(initial_states).values()
    bounds = np.clip(typed(offsets(sizes, query_start_loc)).data.astype(np.int64), 0, sizes.tokens).tolist()
    bounds[0] = 0
    for i in range(sizes.batch):
        tokens = slice(bounds[i], max(bounds[i], bounds[i + 1]))
        yield Row(i, tokens, np.concatenate([initial[i], values[tokens]]))


def offsets(sizes: contract.RowSizes, query_start_loc: Any) -> Any:
    """`query_start_loc`, or that of rows of equal length."""
    if query_start_loc is not None:
        return query_start_loc
    return np.arange(sizes.batch + 1) * (sizes.tokens // max(sizes.batch, 1))


def silu_slope(z: np.ndarray) -> np.ndarray:
    """The derivative of SiLU, `s * (1 + z * (1 - s))` with `s = sigmoid(z)`, without overflow or cancellation."""
    s, rest = sigmoid(z), sigmoid(-z)
    return s + silu(z) * rest


def sigmoid(z: np.ndarray) -> np.ndarray:
    """`1 / (1 + exp(-z))` without overflow."""
    decay = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, decay) / (1.0 + decay)


def float64(array: Any) -> np.ndarray:
    """A TypedArray, or an array of NumPy floats, as float64."""
    return np.asarray(array, np.float64) if isinstance(array, np.ndarray) else typed(array).values()
