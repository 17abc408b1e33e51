"""What `check_values` of the contract's records checks: index data, read to the host as (nested) lists.

Standard library only. Each function takes the record of a call in which lists stand for the index arrays, and the
sizes that its `check` returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oracle.contract import CommitCall, CommitSizes, FnCall, FnSizes, UpdateCall, UpdateSizes


def check_fn(call: FnCall, sizes: FnSizes) -> None:
    """Checks the index data of a packed prefill.

    Raises:
      ValueError: offsets that do not start at 0, decrease or exceed `tokens`; a row longer than
        `max_seqlen`; a slot that is neither `pad_slot_id` nor in range; a slot that two live rows write, or one
        writes and another reads; a counter of a live row below 0; a tracked length beyond its row.
    """
    lengths = _row_lengths(call.query_start_loc, sizes.tokens, call.max_seqlen)
    if call.conv_states is None:
        return
    apply, pad_slot_id = call.empty_rows == "apply", call.pad_slot_id
    slots = range(sizes.batch) if call.cache_indices is None else call.cache_indices
    has = [False] * sizes.batch if call.has_initial_state is None else call.has_initial_state
    for name in ("cache_seqlens", "num_computed_tokens"):
        _check_counters(name, getattr(call, name), slots, lengths, pad_slot_id)
    extra = []
    for row, length in enumerate(lengths):
        if slots[row] == pad_slot_id:
            continue
        if call.snapshot_indices is not None:
            block = call.snapshot_block_size or 1
            before = 0 if call.num_computed_tokens is None else call.num_computed_tokens[row]
            first, end = before // block, (before + length) // block
            extra += [("snapshot_indices", row, slot) for slot in call.snapshot_indices[row][first:end]]
        if call.track_indices is not None and (length or apply):
            extra.append(("track_indices", row, call.track_indices[row]))
            if call.track_lengths is not None and not 0 <= call.track_lengths[row] <= length:
                raise ValueError(
                    f"track_lengths: expected 0 to {length}, the length of the row, in row {row}, "
                    f"got {call.track_lengths[row]}"
                )
    reads = [bool(has[row] and (length or apply)) for row, length in enumerate(lengths)]
    # A row of no tokens that has a state writes it only where it is not.
    targets = slots if call.write_indices is None else call.write_indices
    writes = [
        bool(length or (apply and not (has[row] and targets[row] == slots[row])))
        for row, length in enumerate(lengths)
    ]
    _check_slots(call, reads, writes, extra, sizes.num_slots)


def check_update(call: UpdateCall, sizes: UpdateSizes) -> None:
    """Checks the index data of a decode step.

    Raises:
      ValueError: as `check_fn`; a count of a live row below 1, or beyond what its slot can hold; a buffer
        that is neither `pad_slot_id` nor in range, or of two live rows; a node that does not follow its parent.
    """
    if call.query_start_loc is None:
        lengths = [sizes.seqlen or 0] * sizes.batch
    else:
        lengths = _row_lengths(call.query_start_loc, sizes.tokens, call.max_seqlen)
    slots = range(sizes.batch) if call.cache_indices is None else call.cache_indices
    live = [bool(length and slot != call.pad_slot_id) for length, slot in zip(lengths, slots, strict=True)]
    tracked = enumerate(() if call.track_indices is None else call.track_indices)
    extra = [("track_indices", row, slot) for row, slot in tracked if live[row]]
    reads = [length > 0 for length in lengths]
    writes = reads if call.commit else [False] * sizes.batch
    _check_slots(call, reads, writes, extra, sizes.num_slots)
    _check_counters("cache_seqlens", call.cache_seqlens, slots, lengths, call.pad_slot_id)
    if call.window_out is not None:
        _check_buffers(call.window_indices, live, call.window_out.shape[0], call.pad_slot_id)
    for row, parents in enumerate(() if call.tree_parents is None else call.tree_parents):
        for node, parent in enumerate(parents):
            if live[row] and parent >= node:
                raise ValueError(
                    f"tree_parents: expected a number below {node}, the node's own, at [{row}, {node}], got {parent}"
                )
    largest = sizes.state_len - sizes.width + 2
    for row, count in enumerate(() if call.num_accepted_tokens is None else call.num_accepted_tokens):
        if live[row] and not 1 <= count <= largest:
            raise ValueError(
                f"num_accepted_tokens: expected 1 to {largest}, which slots of state_len={sizes.state_len} can "
                f"hold, in row {row}, got {count}"
            )


def check_commit(call: CommitCall, sizes: CommitSizes) -> None:
    """Checks the index data of a commit. A step below 0 leaves its row alone.

    Raises:
      ValueError: a step at or past `steps`; a slot or buffer that is neither `pad_slot_id` nor in range; two
        rows that write one slot.
    """
    slots = range(sizes.batch) if call.cache_indices is None else call.cache_indices
    for row, step in enumerate(call.accepted_steps):
        if slots[row] != call.pad_slot_id and step >= sizes.steps:
            raise ValueError(
                f"accepted_steps: expected less than {sizes.steps} steps in row {row}, got {step}"
            )
    writes = [step >= 0 for step in call.accepted_steps]
    _check_slots(call, [False] * sizes.batch, writes, [], sizes.num_slots)
    for row, buffer in enumerate(() if call.window_indices is None else call.window_indices):
        _check_in_range("window_indices", "a buffer", buffer, row, sizes.num_buffers, call.pad_slot_id)


def _row_lengths(query_start_loc: Sequence[int], tokens: int, max_seqlen: int | None) -> list[int]:
    if query_start_loc[0] != 0:
        raise ValueError(f"query_start_loc: expected entry 0 to be 0, got {query_start_loc[0]}")
    lengths = []
    for row in range(len(query_start_loc) - 1):
        start, end = query_start_loc[row], query_start_loc[row + 1]
        if not start <= end <= tokens:
            raise ValueError(
                f"query_start_loc: expected row {row} to end between its start {start} and tokens={tokens}, got {end}"
            )
        if max_seqlen is not None and end - start > max_seqlen:
            raise ValueError(
                f"max_seqlen: expected at least {end - start}, the length of row {row}, got {max_seqlen}"
            )
        lengths.append(end - start)
    return lengths


def _check_counters(
    name: str, counters: Sequence[int] | None, slots: Sequence[int], lengths: Sequence[int], pad_slot_id: int
) -> None:
    for row, count in enumerate(() if counters is None else counters):
        if lengths[row] and slots[row] != pad_slot_id and count < 0:
            raise ValueError(f"{name}: expected at least 0 in row {row}, got {count}")


def _check_in_range(name: str, what: str, value: int, row: int, end: int, pad_slot_id: int) -> None:
    if value != pad_slot_id and not 0 <= value < end:
        raise ValueError(
            f"{name}: expected pad_slot_id={pad_slot_id} or {what} in [0, {end}) in row {row}, got {value}"
        )


def _check_slots(
    call: Any,
    reads: Sequence[bool],
    writes: Sequence[bool],
    extra: Sequence[tuple[str, int, int]],
    num_slots: int,
) -> None:
    """Checks that slots are in range, and that nothing that is written is written twice or read by another row.

    `reads` and `writes` tell of each row whether it does; `extra` lists (argument, row, slot) of further windows.
    """
    pad_slot_id, write_indices = call.pad_slot_id, getattr(call, "write_indices", None)
    slots = range(len(writes)) if call.cache_indices is None else call.cache_indices
    for row, slot in enumerate(slots):
        _check_in_range("cache_indices", "a slot", slot, row, num_slots, pad_slot_id)
    target, targets = ("cache_indices", slots) if write_indices is None else ("write_indices", write_indices)
    stores = [
        (target, row, slot) for row, slot in enumerate(targets) if writes[row] and slots[row] != pad_slot_id
    ]
    owner: dict[int, tuple[str, int]] = {}
    for name, row, slot in [*stores, *extra]:
        _check_in_range(name, "a slot", slot, row, num_slots, pad_slot_id)
        if slot == pad_slot_id:
            continue
        if slot in owner:
            rows = f"rows {owner[slot][1]} and {row}"
            raise ValueError(f"{name}: expected distinct slots for live rows, got {slot} in {rows}")
        owner[slot] = name, row
    for row, slot in enumerate(slots):
        name, other = owner.get(slot, (target, row))
        if reads[row] and (name, other) != (target, row):
            raise ValueError(
                f"{name}: expected a slot that no other row reads, got {slot} in row {other}, which row {row} reads"
            )


def _check_buffers(
    window_indices: Sequence[int] | None, live: Sequence[bool], num_buffers: int, pad_slot_id: int
) -> None:
    owner: dict[int, int] = {}
    for row, buffer in enumerate(range(len(live)) if window_indices is None else window_indices):
        _check_in_range("window_indices", "a buffer", buffer, row, num_buffers, pad_slot_id)
        if not live[row] or buffer == pad_slot_id:
            continue
        if buffer in owner:
            raise ValueError(
                f"window_indices: expected distinct buffers for live rows, got {buffer} in rows {owner[buffer]} and {row}"
            )
        owner[buffer] = row
