"""The reference: both operations in NumPy, one row at a time, in float64, rounded once at the end.

Arguments are NumPy arrays or `numerics.TypedArray`s (bfloat16). Results are copies of the same kind; the
inputs are never written. `preactivation` gives the unrounded sums that error bounds and bit-exact checks
are built on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from oracle import contract, values
from oracle.contract import ConvOutput
from oracle.numerics import TypedArray, cast_bits, fma_float32, from_bits, round_bits, silu, typed


class Row(NamedTuple):
    """A row that does something: at least one token, and a slot of its own or no pool at all."""

    row: int
    tokens: slice
    slot: int | None
    has_state: bool
    column: int = 0  # where the window begins in the slot
    rolls: bool = False  # leave window[1:] ++ x in the slot instead of the last width-1 entries


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
) -> ConvOutput:
    """Packed prefill; see `contract` for the definition and `contract.check_causal_conv1d_fn` for arguments.

    `schedule` and `backend` are accepted and ignored, `max_seqlen` is only validated.
    """
    sizes = contract.check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen,
        schedule=schedule, backend=backend, validate=validate,
    )  # fmt: skip
    if validate:
        num_slots = None if conv_states is None else sizes.num_slots
        values.check_fn_values(
            query_start_loc, cache_indices, sizes.tokens, num_slots, pad_slot_id, max_seqlen
        )
    rows = fn_rows(conv_states, query_start_loc, cache_indices, has_initial_state, sizes, pad_slot_id)
    sums, computed, pool = _run(_sum_float64, x, weight, bias, conv_states, rows)
    new_states = None if conv_states is None else _like(conv_states, pool)
    return ConvOutput(_store(x, sums, computed, activation), new_states)


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
) -> ConvOutput:
    """Decode step; see `contract` for the definition and `contract.check_causal_conv1d_update` for arguments."""
    sizes = contract.check_causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices,
        query_start_loc=query_start_loc, num_accepted_tokens=num_accepted_tokens, max_seqlen=max_seqlen,
        activation=activation, pad_slot_id=pad_slot_id, backend=backend, validate=validate,
    )  # fmt: skip
    if validate:
        values.check_update_values(
            cache_indices, sizes, pad_slot_id, query_start_loc, num_accepted_tokens, max_seqlen
        )
    rows = update_rows(cache_indices, sizes, pad_slot_id, query_start_loc, num_accepted_tokens)
    sums, computed, pool = _run(_sum_float64, x, weight, bias, conv_states, rows)
    new_states = None if conv_states is None else _like(conv_states, pool)
    return ConvOutput(_store(x, sums, computed, activation), new_states)


def preactivation(
    op: str, arguments: dict[str, Any], order: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """The unrounded sums of a call.

    Args:
      op: "causal_conv1d_fn" or "causal_conv1d_update".
      arguments: the call's arguments by name.
      order: "float64"; "float32", the contract's order of float32 fused multiply-adds, start at the bias,
        taps oldest to newest; or "magnitude", |bias| + sum |w x| in float64.

    Returns:
      The sums as float64 in the shape of x, zero where nothing is computed, and a bool array of that
      shape that is True where something is.
    """
    optional = {name: arguments.get(name) for name in ("conv_states", "cache_indices", "bias")}
    pad_slot_id = arguments.get("pad_slot_id", -1)
    if op == "causal_conv1d_fn":
        has, offsets = arguments.get("has_initial_state"), arguments["query_start_loc"]
        sizes = contract.check_causal_conv1d_fn(
            arguments["x"], arguments["weight"], optional["bias"], optional["conv_states"], offsets,
            optional["cache_indices"], has,
        )  # fmt: skip
        rows = fn_rows(optional["conv_states"], offsets, optional["cache_indices"], has, sizes, pad_slot_id)
    else:
        packing = {
            name: arguments.get(name) for name in ("query_start_loc", "num_accepted_tokens", "max_seqlen")
        }
        update_sizes = contract.check_causal_conv1d_update(
            arguments["x"], arguments["weight"], optional["bias"], optional["conv_states"],
            optional["cache_indices"], **packing,
        )  # fmt: skip
        rows = update_rows(
            optional["cache_indices"], update_sizes, pad_slot_id,
            packing["query_start_loc"], packing["num_accepted_tokens"],
        )  # fmt: skip
    sums, computed, _ = _run(
        _SUMS[order], arguments["x"], arguments["weight"], optional["bias"], optional["conv_states"], rows
    )
    return sums, computed


def fn_rows(conv_states, query_start_loc, cache_indices, has_initial_state, sizes, pad_slot_id) -> list[Row]:
    """The rows of a packed prefill that do something. Offsets are clamped to [0, tokens]."""
    offsets = _offsets(query_start_loc, sizes.tokens)
    slots = range(sizes.batch) if cache_indices is None else typed(cache_indices).data.tolist()
    has = [False] * sizes.batch if has_initial_state is None else typed(has_initial_state).data.tolist()
    rows = []
    for i in range(sizes.batch):
        tokens = slice(offsets[i], offsets[i + 1])
        if tokens.start >= tokens.stop:
            continue
        if conv_states is None:
            rows.append(Row(i, tokens, None, False))
        elif slots[i] != pad_slot_id and 0 <= slots[i] < sizes.num_slots:
            rows.append(Row(i, tokens, slots[i], has[i]))
    return rows


def update_rows(
    cache_indices, sizes, pad_slot_id, query_start_loc=None, num_accepted_tokens=None
) -> list[Row]:
    """The rows of a decode step that do something, as slices of x seen as [tokens, dim].

    Offsets are clamped to [0, tokens], counts to what a slot can hold.
    """
    slots = range(sizes.batch) if cache_indices is None else typed(cache_indices).data.tolist()
    if query_start_loc is None:
        offsets = [i * sizes.seqlen for i in range(sizes.batch + 1)]
    else:
        offsets = _offsets(query_start_loc, sizes.tokens)
    columns = [0] * sizes.batch
    if num_accepted_tokens is not None:
        last = sizes.state_len - sizes.width + 1
        columns = [min(max(count - 1, 0), last) for count in typed(num_accepted_tokens).data.tolist()]
    return [
        Row(i, slice(offsets[i], offsets[i + 1]), slot, True, columns[i], num_accepted_tokens is not None)
        for i, slot in enumerate(slots)
        if slot != pad_slot_id and 0 <= slot < sizes.num_slots and offsets[i] < offsets[i + 1]
    ]


def _offsets(query_start_loc, tokens: int) -> list[int]:
    offsets = np.clip(typed(query_start_loc).data.astype(np.int64), 0, tokens).tolist()
    offsets[0] = 0
    return offsets


def _run(add_up: Callable, x, weight, bias, conv_states, rows: list[Row]):
    """Runs `rows`; returns the sums and where there are any, both in x's shape, and the new pool."""
    x, weight = typed(x), typed(weight)
    dim, width = weight.shape
    x_bits = x.bits.reshape(-1, dim)
    x_values = x.values().reshape(-1, dim)
    w = weight.values()
    b = np.zeros(dim) if bias is None else typed(bias).values()
    pool = None if conv_states is None else typed(conv_states).copy()

    sums = np.zeros(x_values.shape)
    computed = np.zeros(x_values.shape, dtype=bool)
    for row in rows:
        window = np.zeros((width - 1, dim))  # selected, not masked: a recycled slot may hold NaN
        if pool is not None and row.has_state:
            window = TypedArray(pool.dtype, pool.data[row.slot, row.column : row.column + width - 1]).values()
        with np.errstate(invalid="ignore", over="ignore"):  # x may hold NaN and infinities
            sums[row.tokens] = add_up(np.concatenate([window, x_values[row.tokens]]), w, b)
        computed[row.tokens] = True
        if pool is not None and width > 1:
            arrived = cast_bits(x_bits[row.tokens], x.dtype, pool.dtype)
            kept = _zero_bits(pool, width - 1, dim)
            if row.has_state:
                kept = pool.bits[row.slot, row.column : row.column + width - 1].copy()
            entries = np.concatenate([kept, arrived])
            left = entries[1:][: pool.shape[1]] if row.rolls else entries[-(width - 1) :]
            pool.bits[row.slot, : len(left)] = left
    return sums.reshape(x.shape), computed.reshape(x.shape), pool


def _sum_float64(e: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`pre[t] = b + sum_j w[:, j] * e[t + j]`, e of shape [width - 1 + tokens, dim], in float64."""
    width = w.shape[1]
    tokens = len(e) - (width - 1)
    pre = np.tile(b, (tokens, 1))
    for j in range(width):
        pre += w[:, j] * e[j : j + tokens]
    return pre


def _sum_float32(e: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same sum by float32 fused multiply-adds, in the contract's order; float32 values in float64."""
    width = w.shape[1]
    tokens = len(e) - (width - 1)
    e, w = e.astype(np.float32), w.astype(np.float32)
    acc = np.tile(b.astype(np.float32), (tokens, 1))
    for j in range(width):
        acc = fma_float32(w[:, j], e[j : j + tokens], acc)
    return acc.astype(np.float64)


def _sum_magnitude(e: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`|b| + sum_j |w[:, j] * e[t + j]|` in float64: what rounding errors are relative to."""
    return _sum_float64(np.abs(e), np.abs(w), np.abs(b))


_SUMS = {"float64": _sum_float64, "float32": _sum_float32, "magnitude": _sum_magnitude}


def _store(x, sums: np.ndarray, computed: np.ndarray, activation):
    """The one rounding. Whatever no row computes is zero."""
    out = np.where(computed, silu(sums) if activation else sums, 0.0)
    dtype = typed(x).dtype
    return _like(x, from_bits(round_bits(out, dtype), dtype))


def _like(argument, result: TypedArray):
    """A result in the form its argument came in: a TypedArray, or a NumPy array of the argument's dtype."""
    return result if isinstance(argument, TypedArray) else result.data.view(np.asarray(argument).dtype)


def _zero_bits(pool: TypedArray, columns: int, dim: int) -> np.ndarray:
    return np.zeros((columns, dim), dtype=pool.bits.dtype)
