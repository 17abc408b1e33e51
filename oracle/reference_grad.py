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

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from oracle import contract, reference
from oracle.contract import ConvOutput, RowSizes
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
    """The differentiable form; see `contract.RowsCall`. Arrays are NumPy's or TypedArrays.

    `schedule` and `backend` are accepted and ignored, `max_seqlen` is only validated.
    """
    sizes = contract.RowsCall(**locals()).check()
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
    return ConvOutput(
        reference.like(x, out), reference.like(x if initial_states is None else initial_states, states)
    )


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
    contract.RowsCall(x, weight, bias, initial_states, query_start_loc, activation=activation).check()
    return Backward().gradients({
        "dout": dout, "dfinal_states": dfinal_states, "x": x, "weight": weight, "bias": bias,
        "initial_states": initial_states, "query_start_loc": query_start_loc, "activation": activation,
    })  # fmt: skip


class Backward:
    """The backward pass, step by step; as in `reference.Reference`, a mutant overrides one."""

    dtype: Any = np.float64

    def gradients(self, given: Mapping[str, Any]) -> Gradients:
        """The gradients of a checked call, given by the names of its arguments."""
        x, (dim, width) = given["x"], given["weight"].shape
        bias, initial_states, final = (given.get(n) for n in ("bias", "initial_states", "dfinal_states"))
        history, w = width - 1, self.wide(given["weight"])
        start = np.zeros(dim, self.dtype) if bias is None else self.wide(bias)
        upstream = self.upstream(given).reshape(-1, dim)
        upstream_state = None if final is None else self.wide(final)
        sizes = self.sizes(given)
        dx = np.zeros((sizes.tokens, dim), self.dtype)
        dweight, dbias = np.zeros((dim, width), self.dtype), np.zeros(dim, self.dtype)
        dinitial = np.zeros((sizes.batch, history, dim), self.dtype)
        for row in rows(sizes, x, initial_states, given.get("query_start_loc")):
            e = row.entries.astype(self.dtype)
            length = len(e) - history
            pre = start + sum(w[:, j] * e[j : j + length] for j in range(width))
            g = upstream[row.tokens]
            if given.get("activation"):
                g = g * self.slope(pre, given)
            de = np.zeros_like(e)
            for j in range(width):
                self.spread(de, j, w[:, j] * g)
                terms = self.entries_of_taps(e, width)[j : j + length] * g
                dweight[:, j] = self.add_up(dweight[:, j], terms, given)
            dbias = self.add_up(dbias, g, given)
            if upstream_state is not None:
                self.add_final(de, upstream_state[row.row], length)
            dinitial[row.row], dx[row.tokens] = de[:history], de[history:]
        found = Gradients(
            dx.reshape(x.shape),
            dweight,
            None if bias is None else dbias,
            None if initial_states is None else dinitial,
        )
        return self.end_backward(given, found)

    def sizes(self, given: Mapping[str, Any]) -> RowSizes:
        """Sizes of the call; `x` may have three axes."""
        x, (dim, width), starts = given["x"], given["weight"].shape, given.get("query_start_loc")
        tokens = x.shape[0] if len(x.shape) == 2 else x.shape[0] * x.shape[1]
        return RowSizes(tokens, dim, width, x.shape[0] if starts is None else starts.shape[0] - 1)

    def wide(self, array: Any) -> np.ndarray:
        """An argument in the dtype of the sums."""
        return float64(array).astype(self.dtype)

    def upstream(self, given: Mapping[str, Any]) -> np.ndarray:
        """The gradient of out."""
        return self.wide(given["dout"])

    def slope(self, pre: np.ndarray, given: Mapping[str, Any]) -> np.ndarray:
        """The derivative of the activation."""
        return silu_slope(pre.astype(np.float64)).astype(self.dtype)

    def spread(self, de: np.ndarray, j: int, product: np.ndarray) -> None:
        """Adds what tap j gives to the entries that it has read."""
        de[j : j + len(product)] += product

    def entries_of_taps(self, e: np.ndarray, width: int) -> np.ndarray:
        """The entries that count for dweight."""
        return e

    def add_up(self, total: np.ndarray, terms: np.ndarray, given: Mapping[str, Any]) -> np.ndarray:
        """A running sum of dweight or dbias and the terms of one row."""
        return total + terms.sum(axis=0)

    def add_final(self, de: np.ndarray, dfinal: np.ndarray, length: int) -> None:
        """Adds the final state's gradient to the entries that it holds."""
        de[length:] += dfinal

    def end_backward(self, given: Mapping[str, Any], found: Gradients) -> Gradients:
        """The gradients, not rounded."""
        return found


def rows(sizes: RowSizes, x: Any, initial_states: Any, query_start_loc: Any) -> Iterator[Row]:
    """The rows of a checked call, those of zero tokens too. Offsets are clamped to [0, tokens]."""
    values = typed(x).values().reshape(sizes.tokens, sizes.dim)
    zeros = np.zeros((sizes.batch, sizes.width - 1, sizes.dim))
    initial = zeros if initial_states is None else typed(initial_states).values()
    bounds = np.clip(typed(offsets(sizes, query_start_loc)).data.astype(np.int64), 0, sizes.tokens).tolist()
    bounds[0] = 0
    for i in range(sizes.batch):
        tokens = slice(bounds[i], max(bounds[i], bounds[i + 1]))
        yield Row(i, tokens, np.concatenate([initial[i], values[tokens]]))


def offsets(sizes: RowSizes, query_start_loc: Any) -> Any:
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
