"""The reference: the operations in NumPy, one row at a time, in float64, rounded once at the end.

Arguments are NumPy arrays or `numerics.TypedArray`s (bfloat16). Results are copies of the same kind; the
inputs are never written. `preactivation` gives the unrounded sums that error bounds and bit-exact checks
are built on.

A call is a series of small steps, the methods of `Reference`: what a row reads and writes is in
`reference_states`, what it computes here. A class that overrides a step is another implementation: `Ordered` sums
in the contract's float32 order, `Magnitude` sums absolute values, and the mutants of the conformance suite each
make one mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle import contract
from oracle.contract import ConvOutput, ConvWindowOutput
from oracle.numerics import TypedArray, fma_float32, from_bits, round_bits, silu, typed
from oracle.reference_states import Call, Row, States, integers

OPERATIONS = ("causal_conv1d_fn", "causal_conv1d_update")


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
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
    residual=None,
    channel_offset=None,
    split_sizes=None,
) -> ConvOutput:
    """Packed prefill; see `contract.FnCall` for its arguments.

    `schedule` and `backend` are accepted and ignored, `max_seqlen` is only validated.
    """
    out, conv_states, _ = _call("causal_conv1d_fn", locals())
    return ConvOutput(out, conv_states)


def causal_conv1d_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    query_start_loc=None,
    num_accepted_tokens=None,
    max_seqlen=None,
    activation=None,
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
    residual=None,
    channel_offset=None,
    split_sizes=None,
) -> ConvOutput | ConvWindowOutput:
    """Decode step; see `contract.UpdateCall` for its arguments.

    The result is a `ConvWindowOutput` where `window_out` is given, else a `ConvOutput`.
    """
    result = _call("causal_conv1d_update", locals())
    return ConvOutput(*result[:2]) if window_out is None else ConvWindowOutput(*result)


def commit_windows(
    conv_states,
    window_out,
    accepted_steps,
    cache_indices=None,
    window_indices=None,
    *,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
):
    """Moves accepted windows into their slots; see `contract.CommitCall`. Returns the new pool."""
    call = _checked("commit_windows", locals())
    return like(conv_states, Reference().commit(call))


def tree_parents_from_links(next_token, next_sibling) -> np.ndarray:
    """Parents of the nodes of draft trees; see `contract.LinksCall`."""
    shape = contract.LinksCall(next_token, next_sibling).check()
    links = zip(integers(next_token), integers(next_sibling), strict=True)
    return np.array([Reference().parents(*row) for row in links], np.int32).reshape(shape)


def preactivation(
    op: str, arguments: Mapping[str, Any], order: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """The unrounded sums of a call.

    Args:
      op: "causal_conv1d_fn" or "causal_conv1d_update".
      arguments: the call's arguments by name.
      order: "float64"; "float32", the contract's order of float32 fused multiply-adds, start at the bias,
        taps oldest to newest; or "magnitude", |bias| + sum |w x| in float64.

    Returns:
      The sums as float64 in the shape of out (in one part), zero where nothing is computed, and a bool array of
      that shape that is True where something is.
    """
    steps = _ORDERS[order]()
    call = steps.prepare(op, _checked(op, {**arguments, "validate": False}))
    sums, computed = steps.blank(call), np.zeros(call.x.shape, dtype=bool)
    with np.errstate(invalid="ignore", over="ignore"):  # x may hold NaN and infinities
        for row in steps.rows(call):
            sums[row.tokens] = steps.sums(call, row, steps.window(call, row))
            computed[row.tokens] = True
    return sums.reshape(call.shape), computed.reshape(call.shape)


def finished(sums: np.ndarray, arguments: Mapping[str, Any]) -> np.ndarray:
    """What is rounded and stored: activation, then residual, of sums that are computed; in float64."""
    result = silu(sums) if arguments.get("activation") else sums
    if arguments.get("residual") is not None:
        with np.errstate(invalid="ignore"):
            result = result + typed(arguments["residual"]).values()
    return result


def live_rows(op: str, arguments: Mapping[str, Any]) -> list[Row]:
    """The rows of a call that do something. Offsets, counts and lengths out of range are clamped."""
    steps = Reference()
    return steps.rows(steps.prepare(op, _checked(op, {**arguments, "validate": False})))


class Reference(States):
    """The operations, step by step."""

    dtype: Any = np.float64

    def compute(self, op: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Runs a checked call: "out", or its parts, "conv_states" and "window_out"; None where there is none.

        Args:
          op: "causal_conv1d_fn" or "causal_conv1d_update".
          given: the call's arguments by name.
        """
        call = self.prepare(op, given)
        out, _ = self.convolved(call)
        return self.finish(call, out)

    # The steps, in the order in which they happen.

    def prepare(self, op: str, given: Mapping[str, Any]) -> Call:
        """Takes a call apart."""
        weight, x = typed(given["weight"]).values().astype(self.dtype), typed(given["x"])
        dim, first = len(weight), self.first_channel(given)
        part = x.data[..., first : first + dim]
        bias = None if given.get("bias") is None else typed(given["bias"]).values().astype(self.dtype)
        residual = given.get("residual")
        if residual is not None:
            residual = typed(residual).values().astype(self.dtype).reshape(-1, dim)
        flat = TypedArray(x.dtype, np.ascontiguousarray(part).reshape(-1, dim))
        return self.with_states(Call(op, given, flat, part.shape, weight, bias, residual))

    def first_channel(self, given: Mapping[str, Any]) -> int:
        """The first of the channels of x that are the input."""
        return given.get("channel_offset") or 0

    def blank(self, call: Call) -> np.ndarray:
        """The outputs before any row is computed, [tokens, dim] float64: whatever no row computes is zero."""
        return np.zeros(call.x.shape)

    def convolved(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        """Computes every row and stores what it leaves: the outputs, not rounded, and which tokens a row has."""
        out, live = self.blank(call), np.zeros(len(call.x.data), dtype=bool)
        with np.errstate(invalid="ignore", over="ignore"):  # x may hold NaN and infinities
            for row in self.rows(call):
                self.process(call, row, out)
                live[row.tokens] = True
        return out, live

    def process(self, call: Call, row: Row, out: np.ndarray) -> None:
        """Computes one row and stores what it leaves."""
        window = self.window(call, row)
        pre = self.sums(call, row, window)
        out[row.tokens] = self.add_residual(call, row, self.activate(call, row, pre))
        self.leave(call, row, window, out)

    def sums(self, call: Call, row: Row, window: TypedArray) -> np.ndarray:
        """The unrounded sums of a row, [tokens, dim]."""
        e = self.extended(call, row, window)
        if "tree_parents" not in call.indices:
            return self.convolve(call, row, e)
        taps = [self.chain(call, row, node) for node in range(row.count)]
        return np.concatenate([self.convolve(call, row, e[entries]) for entries in taps])

    def extended(self, call: Call, row: Row, window: TypedArray) -> np.ndarray:
        """`e = window ++ inputs`, [history + tokens, dim]."""
        return np.concatenate([window.values(), self.inputs(call, row).values()]).astype(self.dtype)

    def convolve(self, call: Call, row: Row, e: np.ndarray) -> np.ndarray:
        """`pre[t] = bias + sum_j weight[:, j] * e[t + j]`."""
        tokens = len(e) - call.history
        weight, acc = self.weight(call, row), np.zeros((tokens, e.shape[1]), self.dtype)
        if call.bias is not None:
            acc[:] = call.bias
        for j in self.taps(call):
            acc = self.multiply_add(call, weight[:, j], e[j : j + tokens], acc)
        return acc

    def weight(self, call: Call, row: Row) -> np.ndarray:
        """The weight that a row meets."""
        return call.weight

    def taps(self, call: Call) -> range:
        """The taps in the order of their sum: oldest to newest."""
        return range(call.history + 1)

    def multiply_add(self, call: Call, w: np.ndarray, e: np.ndarray, acc: np.ndarray) -> np.ndarray:
        """One tap's part of the sums."""
        return acc + w * e

    def activate(self, call: Call, row: Row, pre: np.ndarray) -> np.ndarray:
        """The activation, in float64."""
        return self.silu(pre) if call.activation else pre.astype(np.float64)

    def silu(self, pre: np.ndarray) -> np.ndarray:
        """SiLU, in float64."""
        return silu(pre)

    def add_residual(self, call: Call, row: Row, out: np.ndarray) -> np.ndarray:
        """Adds the residual, before the one rounding."""
        if call.residual is None:
            return out
        return (out.astype(self.dtype) + call.residual[row.tokens]).astype(np.float64)

    def finish(self, call: Call, out: np.ndarray) -> Mapping[str, Any]:
        """Rounds the outputs, and gives the results their form."""
        joined = from_bits(self.round(out, call.x.dtype).reshape(call.shape), call.x.dtype)
        return {"out": self.parts(call, joined), "conv_states": call.pool, "window_out": call.windows}

    def round(self, out: np.ndarray, dtype: str) -> np.ndarray:
        """The one rounding: bits of x's dtype."""
        return round_bits(out, dtype)

    def parts(self, call: Call, out: TypedArray) -> Any:
        """The output, or its parts."""
        sizes = call.given.get("split_sizes")
        if sizes is None:
            return out
        ends = np.cumsum(sizes).tolist()
        return [
            TypedArray(out.dtype, np.ascontiguousarray(out.data[..., end - size : end]))
            for size, end in zip(sizes, ends, strict=True)
        ]


class Ordered(Reference):
    """The same by float32 fused multiply-adds, in the contract's order."""

    dtype = np.float32

    def multiply_add(self, call: Call, w: np.ndarray, e: np.ndarray, acc: np.ndarray) -> np.ndarray:
        return fma_float32(w, e, acc)


class Magnitude(Reference):
    """`|bias| + sum |w x|`: what rounding errors are relative to."""

    def prepare(self, op: str, given: Mapping[str, Any]) -> Call:
        call = super().prepare(op, given)
        call.weight, call.bias = np.abs(call.weight), None if call.bias is None else np.abs(call.bias)
        return call

    def extended(self, call: Call, row: Row, window: TypedArray) -> np.ndarray:
        return np.abs(super().extended(call, row, window))


_ORDERS: dict[str, type[Reference]] = {"float64": Reference, "float32": Ordered, "magnitude": Magnitude}


def _checked(op: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that keeps the contract, all of them."""
    record = contract.RECORDS[op]
    call = record(**{**dict.fromkeys(record.OPTIONAL), **arguments})
    sizes = call.check()
    if call.validate:
        call.check_values(sizes, lambda name, array: integers(array))
    return contract.normalised(call)._asdict()


def _call(op: str, arguments: dict[str, Any]):
    """One call: checks, sums, the one rounding, states; in the kinds of arrays that came."""
    result = Reference().compute(op, _checked(op, arguments))
    out, x = result["out"], arguments["x"]
    return (
        like(x, out) if isinstance(out, TypedArray) else tuple(like(x, part) for part in out),
        None if result["conv_states"] is None else like(arguments["conv_states"], result["conv_states"]),
        None if result["window_out"] is None else like(arguments["window_out"], result["window_out"]),
    )


def like(argument, result: TypedArray):
    """A result in the form its argument came in: a TypedArray, or a NumPy array of the argument's dtype."""
    return result if isinstance(argument, TypedArray) else result.data.view(np.asarray(argument).dtype)
