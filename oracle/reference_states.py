"""The states of the reference: which columns of which slot a row reads, and what it leaves where.

`old` is the pool before the call, from which everything is read; `pool` is the copy that is written. All that is
stored is a bit-exact copy of a column of the old pool or of an input, cast once where dtypes differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from oracle.numerics import TypedArray, cast_bits, storage_dtype


class Row(NamedTuple):
    """A row that does something.

    Attributes:
      row: its number in the batch.
      tokens: its slice of x seen as [tokens, dim]; empty for a row of no tokens that applies the state rule.
      slot: the slot it reads, or None without a pool.
      has_state: False: the window is zeros, whatever the slot holds.
      target: the slot that gets the new state, or None.
      layout: "front", "back" or "ring".
      seen: tokens of the sequence before this call ("ring").
      column: where the window begins ("front").
      rolls: leave window[1:] ++ x in the slot instead of the last width-1 entries ("front").
      extra: (slot, after) of further windows, each after so many tokens of the row.
      buffer: where the windows per step go, or None.
      parents: of the nodes of a tree, or None for a chain.
    """

    row: int
    tokens: slice
    slot: int | None
    has_state: bool
    target: int | None = None
    layout: str = "front"
    seen: int = 0
    column: int = 0
    rolls: bool = False
    extra: tuple[tuple[int, int], ...] = ()
    buffer: int | None = None
    parents: list[int] | None = None


def window(old: TypedArray | None, row: Row, history: int, dim: int, dtype: str) -> TypedArray:
    """The `history` inputs before the row's first, oldest first; zeros without a state (of `dtype` without a pool)."""
    if (
        old is None or row.slot is None or not row.has_state
    ):  # selected, not masked: a recycled slot may hold NaN
        kind = dtype if old is None else old.dtype
        return TypedArray(kind, np.zeros((history, dim), storage_dtype(kind)))
    state_len = old.shape[1]
    columns = {
        "front": [row.column + j for j in range(history)],
        "back": [state_len - history + j for j in range(history)],
        "ring": [(row.seen - history + j) % max(state_len, 1) for j in range(history)],
    }[row.layout]
    return TypedArray(old.dtype, old.data[row.slot, columns])


def chain(parents: list[int], node: int, width: int) -> list[int]:
    """The entries of `window ++ x` that the taps of a tree's node meet, oldest first.

    From the node to its parent, and so on; behind a node without a parent comes the window, newest entry first.
    """
    history = width - 1
    entries, at = [], history + node
    for _ in range(width):
        entries.append(at)
        if at >= history:
            parent = min(parents[at - history], at - history - 1)
            at = history + parent if parent >= 0 else history - 1
        else:
            at -= 1
    return entries[::-1]


def store(pool: TypedArray, old: TypedArray, row: Row, before: TypedArray, inputs: TypedArray) -> None:
    """Writes what a row leaves in the pool: its new state, and further windows. `before` is its window."""
    history, count = len(before.data), len(inputs.data)
    arrived = cast_bits(inputs.bits, inputs.dtype, pool.dtype)
    entries = np.concatenate([before.bits, arrived])
    for further, after in row.extra:
        pool.bits[further, :history] = entries[after : after + history]
    if row.target is None:
        return
    if row.layout == "front":
        left = entries[count:]
        if row.rolls:
            left = entries[1:][: pool.shape[1]] if history else entries[:0]
        pool.bits[row.target, : len(left)] = left
        return
    slot = old.bits[row.slot].copy() if row.has_state else np.zeros_like(old.bits[0])
    state_len = len(slot)
    if row.layout == "back":
        pool.bits[row.target] = np.concatenate([slot, arrived])[count:]
        return
    for t in range(max(count - state_len, 0), count):
        slot[(row.seen + t) % state_len] = arrived[t]
    pool.bits[row.target] = slot


def store_windows(windows: TypedArray, row: Row, before: TypedArray, inputs: TypedArray) -> None:
    """Writes the window after every token of a row into its buffer."""
    history = len(before.data)
    entries = np.concatenate([
        cast_bits(before.bits, before.dtype, windows.dtype), cast_bits(inputs.bits, inputs.dtype, windows.dtype),
    ])  # fmt: skip
    for t in range(min(len(inputs.data), windows.shape[1])):
        last = list(range(t + 1, t + 1 + history))
        if row.parents is not None:
            last = chain(row.parents, t, history + 1)[1:]
        windows.bits[row.buffer, t] = entries[last]
