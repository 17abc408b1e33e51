"""The reference of the fronts' differentiable forms and of their gradients, in float64.

With y the convolution's output, r = 1 / sqrt(sum(y * y) + eps) of a head and n = y * r, what the head passes on is

    dn = dq * q_scale (of k: dk),   dy = r * (dn - n * sum(n * dn)),   without the norm dy = dn,   of v: dy = dv

and dy is the upstream gradient of the convolution, whose gradients are those of `reference_grad`. Of the gates, with
rate = exp(A_log), z = a + dt_bias and s = sigmoid(z), or w = rate * z and s = sigmoid(w) with a lower bound L,

    da = -rate * s * dg (above 20: -rate * dg),   dA_log = sum(g * dg)
    da = rate * L * s * (1 - s) * dg,             dA_log = sum(w * L * s * (1 - s) * dg)
    ddt_bias = sum(da) over tokens,               db = beta * (1 - beta) * dbeta

Of the gated convolution, dC = dout * c, dc = dout * C, and with du of the convolution dB = du * x, dx = du * B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from oracle import contract_prologue, reference_grad, reference_prologue
from oracle.contract import ConvOutput
from oracle.contract_prologue import PrologueOutput
from oracle.numerics import TypedArray, rounded, silu, typed
from oracle.reference_grad import Backward, rows
from oracle.reference_prologue import SOFTPLUS_LINEAR, Gated


class FrontGradients(NamedTuple):
    """One array for each differentiable argument, in its shape, float64; None where the argument is None."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    initial_states: np.ndarray | None
    a: np.ndarray | None
    b: np.ndarray | None
    A_log: np.ndarray | None
    dt_bias: np.ndarray | None


class GatedGradients(NamedTuple):
    """The same of the gated convolution."""

    bcx: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    initial_states: np.ndarray | None


UPSTREAM = ("dq", "dk", "dv", "dg", "dbeta", "dfinal_states")
"""Gradients of the prologue's results, each of which may be None: it then counts as zero."""


def gated_delta_prologue(
    x: Any,
    weight: Any,
    bias: Any = None,
    initial_states: Any = None,
    query_start_loc: Any = None,
    *,
    num_k_heads: Any,
    num_v_heads: Any,
    head_k_dim: Any,
    head_v_dim: Any,
    a: Any = None,
    b: Any = None,
    A_log: Any = None,
    dt_bias: Any = None,
    qk_l2norm: Any = True,
    norm_eps: Any = 1e-6,
    q_scale: Any = 1.0,
    lower_bound: Any = None,
    norm_rounding: Any = "storage",
    beta_rounding: Any = "none",
    activation: Any = "silu",
    max_seqlen: Any = None,
    schedule: Any = "auto",
    backend: Any = "auto",
) -> PrologueOutput:
    """The differentiable form; see `contract_prologue.PrologueCall`. Arrays are NumPy's or TypedArrays."""
    given = locals()
    call = contract_prologue.PrologueCall(**given)
    sizes = call.check()
    flat = {name: given[name] for name in ("x", "a", "b")}
    if query_start_loc is None:
        flat = {name: None if value is None else _joined(value) for name, value in flat.items()}
    kept = {
        name: given[name]
        for name in given
        if name in contract_prologue.PrologueFnCall._fields and name not in flat
    }
    found = reference_prologue.gated_delta_prologue_fn(**flat, **kept | _pool(sizes.conv, given, flat["x"]))
    if query_start_loc is not None:
        return found
    leading = tuple(x.shape[:-1])
    parts = {name: getattr(found, name) for name in ("q", "k", "v", "g", "beta")}
    return found._replace(**{name: _apart(part, leading) for name, part in parts.items() if part is not None})


def gated_short_conv(
    bcx: Any,
    weight: Any,
    bias: Any = None,
    initial_states: Any = None,
    query_start_loc: Any = None,
    *,
    channel_offsets: Any = None,
    activation: Any = None,
    max_seqlen: Any = None,
    schedule: Any = "auto",
    backend: Any = "auto",
) -> ConvOutput:
    """The differentiable form; see `contract_prologue.GatedConvCall`. Arrays are NumPy's or TypedArrays."""
    given = locals()
    sizes = contract_prologue.GatedConvCall(**given).check()
    flat = bcx if query_start_loc is not None else _joined(bcx)
    kept = {
        name: given[name]
        for name in given
        if name in contract_prologue.GatedConvFnCall._fields and name != "bcx"
    }
    found = reference_prologue.gated_short_conv_fn(flat, **kept | _pool(sizes.conv, given, flat))
    if query_start_loc is not None:
        return found
    return ConvOutput(_apart(found.out, tuple(bcx.shape[:-1])), found.conv_states)


def _joined(array: Any) -> Any:
    """[batch, seqlen, ...] as [tokens, ...]."""
    shape = (array.shape[0] * array.shape[1], *array.shape[2:])
    if isinstance(array, TypedArray):
        return TypedArray(array.dtype, array.data.reshape(shape))
    return np.asarray(array).reshape(shape)


def _apart(array: Any, leading: tuple[int, ...]) -> Any:
    """[tokens, ...] as [*leading, ...]."""
    shape = (*leading, *array.shape[1:])
    if isinstance(array, TypedArray):
        return TypedArray(array.dtype, array.data.reshape(shape))
    return array.reshape(shape)


def _pool(sizes: Any, given: Mapping[str, Any], x: Any) -> dict[str, Any]:
    """The arguments of a prefill in which every row has a slot of its own."""
    initial, like = given["initial_states"], typed(x)
    pool = initial
    if initial is None:
        zeros = np.zeros((sizes.batch, sizes.width - 1, sizes.dim), like.data.dtype)
        pool = TypedArray(like.dtype, zeros) if isinstance(x, TypedArray) else zeros.view(np.asarray(x).dtype)
    return {
        "conv_states": pool,
        "query_start_loc": reference_grad.offsets(sizes, given["query_start_loc"]),
        "has_initial_state": np.full(sizes.batch, initial is not None),
    }


def gated_delta_prologue_backward(
    upstream: Mapping[str, Any], arguments: Mapping[str, Any]
) -> FrontGradients:
    """The gradients of the sum of every result times its upstream gradient, not rounded.

    Args:
      upstream: by the names of `UPSTREAM`, in the shape of the result; TypedArray or NumPy floats; or None.
      arguments: of `gated_delta_prologue`, by name.
    """
    call = contract_prologue.PrologueCall(**arguments)
    call.check()
    return FrontBackward().front_gradients({**call._asdict(), **dict.fromkeys(UPSTREAM), **upstream})


def gated_short_conv_backward(upstream: Mapping[str, Any], arguments: Mapping[str, Any]) -> GatedGradients:
    """The same of `gated_short_conv`; `upstream` holds "dout", and "dfinal_states" or None for zeros."""
    call = contract_prologue.GatedConvCall(**arguments)
    offsets = call.check().offsets
    given = {**call._asdict(), "channel_offsets": offsets, "dfinal_states": None, **upstream}
    return FrontBackward().gated_gradients(given)


class FrontBackward(Backward):
    """The backward pass of both fronts, step by step. Arrays of a step are [tokens, ...] in the dtype of the sums."""

    def front_gradients(self, given: Mapping[str, Any]) -> FrontGradients:
        """The gradients of a checked call of the prologue, given by the names of its arguments and of `UPSTREAM`."""
        y, live = self.forward(given)
        if given["norm_rounding"] == "storage":
            y = self.round_like(y, given["x"])
        dy = self.into_heads(given, y)
        conv = self.gradients({**given, "dout": np.where(live[:, None], dy, 0)})
        da, drate, db = self.into_gates(given, live)
        return FrontGradients(
            *conv,
            None if da is None else da.reshape(given["a"].shape),
            None if db is None else db.reshape(given["b"].shape),
            None if drate is None else self.over_tokens(drate, typed(given["A_log"]).shape),
            None
            if da is None or given["dt_bias"] is None
            else self.over_tokens(da, typed(given["dt_bias"]).shape),
        )

    def forward(self, given: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """The convolution's output, [tokens, dim], and which tokens a row has."""
        weight, sizes = self.wide(given["weight"]), self.sizes(given)
        y, live = np.zeros((sizes.tokens, sizes.dim), self.dtype), np.zeros(sizes.tokens, bool)
        bias = np.zeros(sizes.dim, self.dtype) if given["bias"] is None else self.wide(given["bias"])
        for row in rows(sizes, given["x"], given["initial_states"], given["query_start_loc"]):
            e = row.entries.astype(self.dtype)
            length = len(e) - sizes.width + 1
            pre = bias + sum(weight[:, j] * e[j : j + length] for j in range(sizes.width))
            y[row.tokens] = silu(pre.astype(np.float64)) if given["activation"] else pre
            live[row.tokens] = True
        return y, live

    def round_like(self, values: np.ndarray, like: Any) -> np.ndarray:
        """Values as a result of this dtype stores them."""
        return rounded(values.astype(np.float64), typed(like).dtype).values().astype(self.dtype)

    def into_heads(self, given: Mapping[str, Any], y: np.ndarray) -> np.ndarray:
        """The upstream gradient of the convolution, [tokens, dim]."""
        found, first = [], 0
        for name in ("dq", "dk", "dv"):
            kind = "v" if name == "dv" else "k"
            heads, size = given[f"num_{kind}_heads"], given[f"head_{kind}_dim"]
            part = y[:, first : first + heads * size].reshape(len(y), heads, size)
            first += heads * size
            dn = np.zeros(part.shape, self.dtype)
            if given[name] is not None:
                dn = self.wide(given[name]).reshape(part.shape)
            if name == "dq":
                dn = dn * self.dtype(np.float32(given["q_scale"]))
            if name != "dv" and given["qk_l2norm"]:
                dn = self.through_norm(part, dn, self.dtype(np.float32(given["norm_eps"])))
            found.append(dn.reshape(len(y), -1))
        return np.concatenate(found, axis=1)

    def through_norm(self, y: np.ndarray, dn: np.ndarray, eps: Any) -> np.ndarray:
        """dy of a norm whose upstream gradient is dn."""
        r = 1 / np.sqrt((y * y).sum(-1, keepdims=True) + eps)
        n = y * r
        return r * (dn - n * (n * dn).sum(-1, keepdims=True))

    def into_gates(
        self, given: Mapping[str, Any], live: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Gradients of a, of the logarithm of the rate before its sum, and of b, [tokens, ...]."""
        da = drate = db = None
        if given["a"] is not None:
            da, drate = (self.of_live(part, live) for part in self.through_decay(given, live))
        if given["b"] is not None:
            beta = self.sigmoid(self.per_token(given, "b", live))
            db = self.of_live(beta * (1 - beta) * self.upstream_of(given, "dbeta", beta.shape), live)
        return da, drate, db

    def through_decay(self, given: Mapping[str, Any], live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of z and of the logarithm of the rate."""
        z, rate = self.per_token(given, "a", live), np.exp(self.wide(given["A_log"]))
        rate = rate.reshape(*rate.shape, *[1] * (z.ndim - 2))
        if given["dt_bias"] is not None:
            z = z + self.wide(given["dt_bias"])
        dg = self.upstream_of(given, "dg", z.shape)
        if given["lower_bound"] is not None:
            w = rate * z
            s = self.sigmoid(w)
            dw = self.dtype(np.float32(given["lower_bound"])) * s * (1 - s) * dg
            return rate * dw, w * dw
        dz = -rate * self.softplus_slope(z) * dg
        return dz, -rate * self.softplus(z) * dg

    def softplus(self, z: np.ndarray) -> np.ndarray:
        return np.where(z > SOFTPLUS_LINEAR, z, np.logaddexp(z, 0)).astype(self.dtype)

    def softplus_slope(self, z: np.ndarray) -> np.ndarray:
        return np.where(z > SOFTPLUS_LINEAR, 1, self.sigmoid(z)).astype(self.dtype)

    def sigmoid(self, z: np.ndarray) -> np.ndarray:
        return reference_grad.sigmoid(z).astype(self.dtype)

    def per_token(self, given: Mapping[str, Any], name: str, live: np.ndarray) -> np.ndarray:
        """A gate's argument as [tokens, ...]; zeros where no row has a token."""
        values, axes = self.wide(given[name]), len(given["x"].shape) - 1
        return self.of_live(values.reshape(len(live), *values.shape[axes:]), live)

    def upstream_of(self, given: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, self.dtype) if given[name] is None else self.wide(given[name]).reshape(shape)

    def of_live(self, values: np.ndarray, live: np.ndarray) -> np.ndarray:
        return np.where(live.reshape(-1, *[1] * (values.ndim - 1)), values, self.dtype(0))

    def over_tokens(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A sum over tokens, and over the channels that a parameter has not."""
        total = values.sum(axis=0)
        return total.sum(axis=-1) if total.ndim > len(shape) else total

    def gated_gradients(self, given: Mapping[str, Any]) -> GatedGradients:
        """The gradients of a checked call of the gated convolution, with `channel_offsets` as numbers."""
        steps = Gated()
        gate_in, gate_out, x = (part.values().astype(self.dtype) for part in steps.slices(given))
        b, _, own = steps.slices(given)
        inside = {**given, "x": steps.gate_in(b, own)}
        c, live = self.forward(inside)
        c = self.round_like(c, given["bcx"])
        gate_in, gate_out, x = (part.reshape(c.shape) for part in (gate_in, gate_out, x))
        dout = self.wide(given["dout"]).reshape(c.shape)
        conv = self.gradients({**inside, "dout": self.of_live(dout * gate_out, live)})
        du = conv.x.reshape(c.shape)
        dbcx = np.zeros((len(c), given["bcx"].shape[-1]), self.dtype)
        parts = self.of_slices(du, dout, c, gate_in, x)
        for first, part in zip(given["channel_offsets"], parts, strict=True):
            self.add_slice(dbcx[:, first : first + c.shape[1]], self.of_live(part, live))
        return GatedGradients(dbcx.reshape(given["bcx"].shape), *conv[1:])

    def of_slices(
        self, du: np.ndarray, dout: np.ndarray, c: np.ndarray, gate_in: np.ndarray, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The gradients of B, C and x."""
        return du * x, dout * c, du * gate_in

    def add_slice(self, into: np.ndarray, part: np.ndarray) -> None:
        """Adds a slice's gradient to that of its channels, which other slices may share."""
        into += part
