"""The states of the reference: which rows do something, what of which slot each reads, and what it leaves where.

`old` is the pool before the call, from which everything is read; `pool` is the copy that is written. All that is
stored is a bit-exact copy of a column of the old pool or of an input, cast once where dtypes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle.numerics import TypedArray, cast_bits, storage_dtype, typed

INDICES = (
    "cache_seqlens", "write_indices", "snapshot_indices", "num_computed_tokens", "track_indices", "track_lengths",
    "window_indices", "tree_parents",
)  # fmt: skip


@dataclass
class Call:
    """A call taken apart.

    Attributes:
      op: "causal_conv1d_fn" or "causal_conv1d_update".
      given: its arguments by name.
      x: its input as [tokens, dim].
      shape: of x before that, and of out.
      weight, bias: [dim, width] and [dim] in the dtype of the sums; bias may be None.
      residual: [tokens, dim] in that dtype, or None.
      old, pool: the pool before the call, and a copy that becomes the result; None without a pool.
      windows: a copy of window_out that becomes the result, or None.
      offsets: of the rows: row i has tokens offsets[i] to offsets[i + 1].
      slots, has: of each row, the slot that it reads and whether it has a state.
      counts: of each row, num_accepted_tokens; or None.
      indices: the integer arguments of `INDICES` that are given, as (nested) lists.
    """

    op: str
    given: Mapping[str, Any]
    x: TypedArray
    shape: tuple[int, ...]
    weight: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None
    old: TypedArray | None = None
    pool: TypedArray | None = None
    windows: TypedArray | None = None
    offsets: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    has: list[bool] = field(default_factory=list)
    counts: list[int] | None = None
    indices: dict[str, Any] = field(default_factory=dict)

    @property
    def fn(self) -> bool:
        return self.op == "causal_conv1d_fn"

    @property
    def history(self) -> int:
        """width - 1."""
        return self.weight.shape[1] - 1

    @property
    def activation(self) -> str | None:
        return self.given.get("activation")

    @property
    def pad(self) -> int:
        return self.given.get("pad_slot_id", -1)

    @property
    def layout(self) -> str:
        return self.given.get("state_layout", "front")

    @property
    def num_slots(self) -> int:
        return self.pool.shape[0]

    @property
    def state_len(self) -> int:
        return self.pool.shape[1]


@dataclass(frozen=True)
class Row:
    """A row: its number, its first token and the one after its last, its slot, and whether it has a state.

    Without a state its window is zeros, whatever the slot holds. `column` is where its window begins ("front").
    """

    index: int
    start: int
    stop: int
    slot: int
    has: bool
    column: int = 0

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> slice:
        """Of x seen as [tokens, dim]; empty for a row of no tokens that applies the state rule."""
        return slice(self.start, self.stop)


class States:
    """The steps of a call that read and write slots."""

    def with_states(self, call: Call) -> Call:
        """Completes a call by its rows and its states."""
        given, tokens = call.given, len(call.x.data)
        if given.get("query_start_loc") is not None:
            starts = typed(given["query_start_loc"]).data
            call.offsets = [0, *np.clip(starts[1:].astype(np.int64), 0, tokens).tolist()]
        else:
            seqlen = call.shape[1] if len(call.shape) == 3 else 1
            call.offsets = [i * seqlen for i in range(call.shape[0] + 1)]
        batch = len(call.offsets) - 1
        call.slots = integers(given.get("cache_indices"), list(range(batch)))
        call.has = integers(given.get("has_initial_state"), [False] * batch) if call.fn else [True] * batch
        call.counts = integers(given.get("num_accepted_tokens"))
        call.indices = {name: integers(given[name]) for name in INDICES if given.get(name) is not None}
        if given.get("conv_states") is not None:
            call.old = typed(given["conv_states"])
            call.pool = call.old.copy()
        if given.get("window_out") is not None:
            call.windows = typed(given["window_out"]).copy()
        return call

    # Which rows do something.

    def rows(self, call: Call) -> list[Row]:
        """The rows that do something."""
        every = [
            Row(i, start, max(start, stop), self.slot(call, i), self.has(call, i), self.column(call, i))
            for i, (start, stop) in enumerate(zip(call.offsets, call.offsets[1:], strict=False))
        ]
        return [row for row in every if self.live(call, row)]

    def slot(self, call: Call, i: int) -> int:
        return call.slots[i]

    def has(self, call: Call, i: int) -> bool:
        return call.has[i]

    def column(self, call: Call, i: int) -> int:
        """Where a row's window begins; a count is clamped to what a slot can hold."""
        if call.counts is None:
            return 0
        return min(max(self.count(call, i), 1), call.state_len - call.history + 1) - 1

    def count(self, call: Call, i: int) -> int:
        return call.counts[i]

    def live(self, call: Call, row: Row) -> bool:
        """Whether a row does something: one of no tokens, or of a slot that is padding, does not."""
        if not row.count and not self.applies(call):
            return False
        return call.pool is None or not self.padding(call, row.slot)

    def applies(self, call: Call) -> bool:
        """Whether rows of no tokens follow the state rule."""
        return call.given.get("empty_rows") == "apply"

    def padding(self, call: Call, slot: int) -> bool:
        return slot == call.pad or not 0 <= slot < call.num_slots

    # What a row reads.

    def inputs(self, call: Call, row: Row) -> TypedArray:
        return TypedArray(call.x.dtype, call.x.data[row.tokens])

    def window(self, call: Call, row: Row) -> TypedArray:
        """The `history` inputs before the row's first, oldest first; zeros without a state (of x's dtype without a pool)."""
        kind = call.x.dtype if call.old is None else call.old.dtype
        if call.old is None or not row.has:  # selected, not masked: a recycled slot may hold NaN
            return TypedArray(kind, np.zeros((call.history, call.x.shape[1]), storage_dtype(kind)))
        return TypedArray(kind, call.old.data[row.slot, self.window_columns(call, row)])

    def window_columns(self, call: Call, row: Row) -> list[int]:
        if call.layout == "ring":
            return [self.ring_column(call, row, j - call.history) for j in range(call.history)]
        first = row.column if call.layout == "front" else call.state_len - call.history
        return list(range(first, first + call.history))

    def ring_column(self, call: Call, row: Row, t: int) -> int:
        """The column of the row's token t; of tokens before this call for t < 0."""
        return (self.seen(call, row) + t) % call.state_len

    def seen(self, call: Call, row: Row) -> int:
        """Tokens of the sequence before this call."""
        return max(call.indices["cache_seqlens"][row.index], 0)

    def chain(self, call: Call, row: Row, node: int) -> list[int]:
        """The entries of `window ++ inputs` that the taps of a tree's node meet, oldest first.

        From the node to its parent, and so on; behind a node without a parent comes the window, newest entry first.
        """
        path = [node]
        while (parent := self.parent(call, row, path[-1])) >= 0 and len(path) <= call.history:
            path.append(parent)
        before = call.history + 1 - len(path)
        return [*range(call.history - before, call.history), *(call.history + i for i in reversed(path))]

    def parent(self, call: Call, row: Row, node: int) -> int:
        """The parent of a node, at most the node before it; below 0 for none."""
        return min(call.indices["tree_parents"][row.index][node], node - 1)

    # What a row leaves.

    def leave(self, call: Call, row: Row, window: TypedArray, out: np.ndarray) -> None:
        """Stores the windows after tokens of the row, and its new state. `out` holds its outputs, unrounded."""
        if call.windows is not None and (buffer := self.buffer(call, row)) is not None:
            for t in range(row.count):
                self.save_step(call, row, buffer, t, self.step_window(call, row, window, t))
        if call.pool is None:
            return
        for slot, after in [*self.snapshots(call, row), *self.tracked(call, row)]:
            if not self.padding(call, slot):
                call.pool.bits[slot, : call.history] = self.window_after(call, row, window, after)
        if self.commits(call) and (target := self.target(call, row)) is not None:
            self.store(call, row, target, self.new_state(call, row, window, out))

    def buffer(self, call: Call, row: Row) -> int | None:
        """Where the windows per step go, or None."""
        buffer = call.indices.get("window_indices", range(len(call.slots)))[row.index]
        return buffer if buffer != call.pad and 0 <= buffer < call.windows.shape[0] else None

    def step_window(self, call: Call, row: Row, window: TypedArray, t: int) -> np.ndarray:
        """The window after token (or node) t, as bits of window_out's dtype."""
        dtype, inputs = call.windows.dtype, self.inputs(call, row)
        entries = np.concatenate([
            cast_bits(window.bits, window.dtype, dtype), cast_bits(inputs.bits, inputs.dtype, dtype),
        ])  # fmt: skip
        if "tree_parents" in call.indices:
            return entries[self.chain(call, row, t)[1:]]
        return entries[t + 1 : t + 1 + call.history]

    def save_step(self, call: Call, row: Row, buffer: int, t: int, window: np.ndarray) -> None:
        if t < call.windows.shape[1]:
            call.windows.bits[buffer, t] = window

    def snapshots(self, call: Call, row: Row) -> list[tuple[int, int]]:
        """(slot, after how many tokens of the row) of every block boundary that the row reaches."""
        found, size = [], call.given.get("snapshot_block_size")
        for k, slot in enumerate(call.indices.get("snapshot_indices", [[]] * len(call.slots))[row.index]):
            after = (k + 1) * size - self.computed(call, row)
            if 0 < after <= row.count:
                found.append((slot, after))
        return found

    def computed(self, call: Call, row: Row) -> int:
        """Tokens of the sequence before this chunk."""
        return max(call.indices.get("num_computed_tokens", [0] * len(call.slots))[row.index], 0)

    def tracked(self, call: Call, row: Row) -> list[tuple[int, int]]:
        """(slot, after how many tokens of the row) of the tracked window, if there is one."""
        if "track_indices" not in call.indices:
            return []
        after = row.count
        if "track_lengths" in call.indices:
            after = min(max(call.indices["track_lengths"][row.index], 0), after)
        return [(call.indices["track_indices"][row.index], after)]

    def window_after(self, call: Call, row: Row, window: TypedArray, after: int) -> np.ndarray:
        """The window after some tokens of the row, as bits of the pool's dtype."""
        entries = np.concatenate([window.bits, self.cast(call, self.inputs(call, row).bits)])
        return entries[after : after + call.history]

    def commits(self, call: Call) -> bool:
        return call.given.get("commit", True)

    def target(self, call: Call, row: Row) -> int | None:
        """The slot that gets the new state, or None."""
        slot = call.indices.get("write_indices", call.slots)[row.index]
        return None if self.padding(call, slot) else slot

    def new_state(self, call: Call, row: Row, window: TypedArray, out: np.ndarray) -> np.ndarray:
        """What the first columns of the written slot become, in "back" and "ring" all of them; as bits."""
        if call.layout == "back":
            return self.shifted(call, row, self.old_slot(call, row))
        if call.layout == "ring":
            return self.turned(call, row, self.old_slot(call, row))
        if not call.history:
            return window.bits
        new = self.new_window if call.counts is None else self.rolled
        return new(call, row, window, out)

    def new_window(self, call: Call, row: Row, window: TypedArray, out: np.ndarray) -> np.ndarray:
        """The last `history` entries of `window ++ inputs`."""
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([window.bits, arrived])[-call.history :]

    def rolled(self, call: Call, row: Row, window: TypedArray, out: np.ndarray) -> np.ndarray:
        """`window[1:] ++ inputs`, so that any number of the inputs can be accepted later."""
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([window.bits[1:], arrived])[: call.state_len]

    def old_slot(self, call: Call, row: Row) -> np.ndarray:
        """A row's slot; zeros without a state."""
        old = call.old.bits[row.slot].copy()
        return old if row.has else np.zeros_like(old)

    def shifted(self, call: Call, row: Row, slot: np.ndarray) -> np.ndarray:
        """The slot as the last `state_len` inputs."""
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([slot, arrived])[len(arrived) :]

    def turned(self, call: Call, row: Row, slot: np.ndarray) -> np.ndarray:
        """The slot with every input in the column of its position."""
        for t, entry in enumerate(self.cast(call, self.inputs(call, row).bits)):
            if len(slot):
                slot[self.ring_column(call, row, t)] = entry
        return slot

    def cast(self, call: Call, bits: np.ndarray) -> np.ndarray:
        """Inputs in the pool's dtype."""
        return cast_bits(bits, call.x.dtype, call.pool.dtype)

    def store(self, call: Call, row: Row, target: int, state: np.ndarray) -> None:
        call.pool.bits[target, : len(state)] = state

    # The operations without outputs.

    def commit(self, given: Mapping[str, Any]) -> TypedArray:
        """The pool after the accepted windows were moved into their slots."""
        pool, windows = typed(given["conv_states"]).copy(), typed(given["window_out"])
        steps, pad = integers(given["accepted_steps"]), given.get("pad_slot_id", -1)
        slots, buffers = (integers(given[n], range(len(steps))) for n in ("cache_indices", "window_indices"))
        for slot, buffer, accepted in zip(slots, buffers, steps, strict=True):
            step = self.step(accepted)
            inside = 0 <= slot < len(pool.data) and 0 <= buffer < len(windows.data)
            if inside and pad not in (slot, buffer) and 0 <= step < windows.shape[1]:
                window = cast_bits(windows.bits[buffer, step], windows.dtype, pool.dtype)
                pool.bits[slot, : windows.shape[2]] = window
        return pool

    def step(self, step: int) -> int:
        """The step whose window is committed; below 0 for none."""
        return step

    def parents(self, children: list[int], siblings: list[int]) -> list[int]:
        """The parents of the nodes of one tree: a parent and an elder sibling have smaller numbers."""
        parents = (
            [-1] + [0] * (len(children) - 1) if children else []
        )  # a node that nobody names hangs on the root
        for node, (child, sibling) in enumerate(zip(children, siblings, strict=True)):
            if node < child < len(children):
                parents[child] = node
            if node < sibling < len(children):
                parents[sibling] = parents[node]
        return parents


def integers(array: Any, default: Any = None) -> Any:
    """An integer or bool array as (nested) lists; `default` for None."""
    return default if array is None else typed(array).data.tolist()
