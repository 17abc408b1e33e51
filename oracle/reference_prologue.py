"""The reference of the prologue of the gated delta rule and of the gated short convolution.

The convolution inside takes the steps of `reference.Reference`; what stands before and behind it are the methods of
`Front` and of `Gated`, which a class overrides to be another implementation: `OrderedFront` computes what the contract
fixes in float32, the mutants of the conformance suite each make one mistake. Arrays are as in `reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle import contract, contract_prologue
from oracle.contract import ConvOutput, ConvWindowOutput
from oracle.contract_prologue import PrologueOutput, PrologueSizes, PrologueWindowOutput
from oracle.numerics import TypedArray, from_bits, round_bits, rounded, typed
from oracle.reference import Ordered, Reference, like
from oracle.reference_states import Call, integers

CONVOLUTIONS = {
    "gated_delta_prologue_fn": "causal_conv1d_fn", "gated_delta_prologue_update": "causal_conv1d_update",
    "gated_short_conv_fn": "causal_conv1d_fn", "gated_short_conv_update": "causal_conv1d_update",
}  # fmt: skip
"""The plain convolution inside each operation."""

SOFTPLUS_LINEAR = 20.0
"""Above this softplus(z) is z."""


def gated_delta_prologue_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    num_k_heads,
    num_v_heads,
    head_k_dim,
    head_v_dim,
    a=None,
    b=None,
    A_log=None,
    dt_bias=None,
    qk_l2norm=True,
    norm_eps=1e-6,
    q_scale=1.0,
    lower_bound=None,
    norm_rounding="storage",
    beta_rounding="none",
    activation="silu",
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    empty_rows="skip",
    snapshot_indices=None,
    snapshot_block_size=None,
    num_computed_tokens=None,
    track_indices=None,
    track_lengths=None,
    channel_offset=None,
) -> PrologueOutput:
    """Packed prefill; see `contract_prologue.PrologueFnCall` for its arguments."""
    return PrologueOutput(*_prologue("gated_delta_prologue_fn", locals())[:6])


def gated_delta_prologue_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    num_k_heads,
    num_v_heads,
    head_k_dim,
    head_v_dim,
    a=None,
    b=None,
    A_log=None,
    dt_bias=None,
    qk_l2norm=True,
    norm_eps=1e-6,
    q_scale=1.0,
    lower_bound=None,
    norm_rounding="storage",
    beta_rounding="none",
    activation="silu",
    query_start_loc=None,
    num_accepted_tokens=None,
    max_seqlen=None,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    track_indices=None,
    window_out=None,
    window_indices=None,
    commit=True,
    tree_parents=None,
    channel_offset=None,
) -> PrologueOutput | PrologueWindowOutput:
    """Decode step; see `contract_prologue.PrologueUpdateCall` for its arguments.

    The result is a `PrologueWindowOutput` where `window_out` is given, else a `PrologueOutput`.
    """
    result = _prologue("gated_delta_prologue_update", locals())
    return PrologueOutput(*result[:6]) if window_out is None else PrologueWindowOutput(*result)


def gated_short_conv_fn(
    bcx,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    channel_offsets=None,
    activation=None,
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    empty_rows="skip",
    snapshot_indices=None,
    snapshot_block_size=None,
    num_computed_tokens=None,
    track_indices=None,
    track_lengths=None,
) -> ConvOutput:
    """Packed prefill; see `contract_prologue.GatedConvFnCall` for its arguments."""
    return ConvOutput(*_gated("gated_short_conv_fn", locals())[:2])


def gated_short_conv_update(
    bcx,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    channel_offsets=None,
    activation=None,
    query_start_loc=None,
    num_accepted_tokens=None,
    max_seqlen=None,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    track_indices=None,
    window_out=None,
    window_indices=None,
    commit=True,
    tree_parents=None,
) -> ConvOutput | ConvWindowOutput:
    """Decode step; see `contract_prologue.GatedConvUpdateCall` for its arguments.

    The result is a `ConvWindowOutput` where `window_out` is given, else a `ConvOutput`.
    """
    result = _gated("gated_short_conv_update", locals())
    return ConvOutput(*result[:2]) if window_out is None else ConvWindowOutput(*result)


class Selecting(Reference):
    """What both fronts share."""

    def dead(self, values: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Zeros where no row computes, selected: a gate may be NaN there."""
        return np.where(live.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


class Front(Selecting):
    """The prologue, step by step. Arrays of a step are [tokens, ...] in the dtype of the sums."""

    def front(self, op: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Runs a checked call: "q", "k", "v", "g", "beta", "conv_states" and "window_out"; None where there is none.

        Args:
          op: "gated_delta_prologue_fn" or "gated_delta_prologue_update".
          given: the call's arguments by name.
        """
        call = self.prepare(CONVOLUTIONS[op], given)
        y, live = self.convolved(call)
        with np.errstate(all="ignore"):  # y may hold NaN and infinities
            parts = self.heads(call, self.stored(call, y))
            gates = self.gates(call)
        found: dict[str, Any] = {"conv_states": call.pool, "window_out": call.windows}
        leading = call.shape[:-1]
        for name, values, dtype in (
            *((name, part, call.x.dtype) for name, part in zip("qkv", parts, strict=True)),
            *((name, gate, "float32") for name, gate in zip(("g", "beta"), gates, strict=True)),
        ):
            found[name] = None
            if values is not None:
                values = self.dead(values, live).astype(np.float64)
                found[name] = rounded(values.reshape(*leading, *values.shape[1:]), dtype)
        return found

    # q, k and v.

    def stored(self, call: Call, y: np.ndarray) -> np.ndarray:
        """What the norm meets: the convolution as the plain operation stores it, or before that."""
        if call.given["norm_rounding"] == "storage":
            y = rounded(y, call.x.dtype).values()
        return y.astype(self.dtype)

    def heads(self, call: Call, y: np.ndarray) -> list[np.ndarray]:
        """q, k and v, [tokens, heads, channels]."""
        given, tokens = call.given, len(y)
        sizes = [(given["num_k_heads"], given["head_k_dim"])] * 2 + [
            (given["num_v_heads"], given["head_v_dim"])
        ]
        ends = np.cumsum([heads * channels for heads, channels in sizes]).tolist()
        q, k, v = (
            y[:, end - heads * channels : end].reshape(tokens, heads, channels)
            for end, (heads, channels) in zip(ends, sizes, strict=True)
        )
        if given["qk_l2norm"]:
            q, k = self.norm(call, q), self.norm(call, k)
        return [self.scale(call, q), k, v]

    def norm(self, call: Call, y: np.ndarray) -> np.ndarray:
        """`y * (1 / sqrt(sum(y * y) + eps))` of each head."""
        one, eps = self.dtype(1), self.dtype(np.float32(call.given["norm_eps"]))
        return y * (one / np.sqrt(self.sum_of_squares(call, y) + eps))

    def sum_of_squares(self, call: Call, y: np.ndarray) -> np.ndarray:
        """The tree of neighbours, [tokens, heads, 1]."""
        return tree_sum(y * y)

    def scale(self, call: Call, q: np.ndarray) -> np.ndarray:
        return q * self.dtype(np.float32(call.given["q_scale"]))

    # The gates.

    def gates(self, call: Call) -> tuple[np.ndarray | None, np.ndarray | None]:
        """g and beta, or None."""
        given = call.given
        a, b = self.rows_of(call, "a"), self.rows_of(call, "b")
        return (
            None if a is None else self.decay(call, a),
            None if b is None else self.round_beta(call, self.sigmoid(b), typed(given["b"]).dtype),
        )

    def rows_of(self, call: Call, name: str) -> np.ndarray | None:
        """A gate's argument as [tokens, ...]."""
        if call.given[name] is None:
            return None
        values, axes = typed(call.given[name]).values().astype(self.dtype), len(call.shape) - 1
        return values.reshape(len(call.x.data), *values.shape[axes:])

    def decay(self, call: Call, a: np.ndarray) -> np.ndarray:
        """g."""
        bound, rate = call.given["lower_bound"], np.exp(self.per_head(call, "A_log", a))
        if call.given["dt_bias"] is not None:
            a = a + self.per_head(call, "dt_bias", a)
        if bound is not None:
            return self.dtype(np.float32(bound)) * self.sigmoid(rate * a)
        return -rate * self.softplus(a)

    def per_head(self, call: Call, name: str, a: np.ndarray) -> np.ndarray:
        """A parameter of the gate, with the axes of `a` behind the first."""
        values = typed(call.given[name]).values().astype(self.dtype)
        return values.reshape(*values.shape, *[1] * (a.ndim - 1 - values.ndim))

    def softplus(self, z: np.ndarray) -> np.ndarray:
        return np.where(z > SOFTPLUS_LINEAR, z, np.log1p(np.exp(np.minimum(z, SOFTPLUS_LINEAR))))

    def sigmoid(self, z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    def round_beta(self, call: Call, beta: np.ndarray, dtype: str) -> np.ndarray:
        return (
            rounded(beta.astype(np.float64), dtype).values()
            if call.given["beta_rounding"] == "storage"
            else beta
        )


class OrderedFront(Front, Ordered):
    """The same in float32, in the contract's order: its norm has the contract's bits, its gates have none."""


class Gated(Selecting):
    """The gated short convolution, step by step."""

    def gated(self, op: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Runs a checked call: "out", "conv_states" and "window_out"; None where there is none.

        Args:
          op: "gated_short_conv_fn" or "gated_short_conv_update".
          given: the call's arguments by name, with `channel_offsets` as numbers.
        """
        gate_in, gate_out, x = self.slices(given)
        with np.errstate(all="ignore"):  # they may hold NaN and infinities
            u = self.gate_in(gate_in, x)
            inner = {name: value for name, value in given.items() if name not in ("bcx", "channel_offsets")}
            call = self.prepare(CONVOLUTIONS[op], {**inner, "x": u})
            c, live = self.convolved(call)
            c = self.rounded_conv(u, c)
            out = self.gate_out(gate_out.values().reshape(c.shape), c)
        out = self.dead(out, live).reshape(call.shape)
        return {"out": rounded(out, u.dtype), "conv_states": call.pool, "window_out": call.windows}

    def slices(self, given: Mapping[str, Any]) -> list[TypedArray]:
        """B, C and x."""
        bcx, dim = typed(given["bcx"]), len(typed(given["weight"]).data)
        return [TypedArray(bcx.dtype, bcx.data[..., o : o + dim]) for o in self.offsets(given)]

    def offsets(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        """The first channels of B, C and x."""
        return given["channel_offsets"]

    def gate_in(self, gate: TypedArray, x: TypedArray) -> TypedArray:
        """u, which the convolution reads and the pool keeps."""
        return rounded(gate.values() * x.values(), x.dtype)

    def rounded_conv(self, u: TypedArray, c: np.ndarray) -> np.ndarray:
        """The convolution as the plain operation stores it."""
        return rounded(c, u.dtype).values()

    def gate_out(self, gate: np.ndarray, c: np.ndarray) -> np.ndarray:
        return gate * c


class OrderedGated(Gated, Ordered):
    """The same with the convolution's sums in float32, in the contract's order."""


def tree_sum(values: np.ndarray) -> np.ndarray:
    """The sum over the last axis, which stays: a perfect binary tree over neighbours, padded with zeros at the end."""
    width = 1 << max(values.shape[-1] - 1, 0).bit_length()
    padding = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    sums = np.pad(values, padding)
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    return sums


def separate_norm(y: TypedArray, sizes: PrologueSizes, arguments: Mapping[str, Any]) -> list[TypedArray]:
    """q, k and v of an output of the plain convolution, [..., dim], with the contract's bits of "storage".

    Args:
      y: what the plain convolution stored.
      sizes: of the prologue's call.
      arguments: of the prologue's call by name; `qk_l2norm`, `norm_eps` and `q_scale` are read.
    """
    steps, shape = OrderedFront(), y.shape
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    given = {"qk_l2norm": True, "norm_eps": 1e-6, "q_scale": 1.0, **arguments}
    given |= {name: getattr(sizes, name) for name in names}
    flat = y.values().reshape(-1, shape[-1]).astype(np.float32)
    call = Call("", given, y, shape, np.zeros((0, 0)), None, None)
    with np.errstate(all="ignore"):
        parts = steps.heads(call, flat)
    return [
        from_bits(round_bits(part.astype(np.float64), y.dtype).reshape(*shape[:-1], *part.shape[1:]), y.dtype)
        for part in parts
    ]


def checked(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that keeps the contract, all of them; `channel_offsets` as numbers."""
    record = contract_prologue.RECORDS[op]
    call = record(**{**dict.fromkeys(record.OPTIONAL), **arguments})
    sizes = call.check()
    if getattr(call, "validate", False):
        call.check_values(sizes, lambda name, array: integers(array))
    given = contract.normalised(call)._asdict()
    if "channel_offsets" in given:
        given["channel_offsets"] = sizes.offsets
    return given


def convolution(op: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The plain operation inside a call, and its arguments: for the gated convolution u for x."""
    given = checked(op, {**arguments, "validate": False})
    call = contract_prologue.RECORDS[op](**given).convolution()
    if "bcx" in given:
        steps = Gated()
        gate, _, x = steps.slices(given)
        with np.errstate(all="ignore"):
            call = call._replace(x=steps.gate_in(gate, x))
    return CONVOLUTIONS[op], call._asdict()


def _prologue(op: str, arguments: dict[str, Any]) -> list[Any]:
    found = Front().front(op, checked(op, arguments))
    x = arguments["x"]
    forms = [(name, x) for name in "qkv"]
    forms += [(name, _like_gate(x)) for name in ("g", "beta")]
    forms += [(name, arguments.get(name)) for name in ("conv_states", "window_out")]
    return [None if found[name] is None else like(form, found[name]) for name, form in forms]


def _like_gate(x: Any) -> Any:
    """A gate is float32 in the kind of array that x is."""
    return x if isinstance(x, TypedArray) else np.zeros(0, np.float32)


def _gated(op: str, arguments: dict[str, Any]) -> list[Any]:
    found = Gated().gated(op, checked(op, arguments))
    forms = [("out", arguments["bcx"])]
    forms += [(name, arguments.get(name)) for name in ("conv_states", "window_out")]
    return [None if found[name] is None else like(form, found[name]) for name, form in forms]
