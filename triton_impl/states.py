"""Every store of state of a prefill whose rows leave more, or elsewhere, than the plain kernel does.

One launch behind the outputs: new states in any layout and in any slot, windows at multiples of a block size
(snapshots), one tracked window a row. Block k of row s is program `query_start_loc[s] // BLOCK + s + k`, as in the
flat schedule, so that a long row's snapshots are taken by many programs. The program of a row's first block does all
that reads the old slot, reads before writes; the others read x alone.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, overlaps, strides_of, wait_for_inputs
from triton_impl.records import (
    Channels,
    Items,
    Rows,
    behind,
    constants,
    holds,
    slot_of,
    strides_record,
    tokens_of,
)
from triton_impl.rows import counted, find_row, row_facts
from triton_impl.slots import find_slot, first_column, is_slot, leave_state, load_window, store_window

ARRAYS = (
    "x", "conv_states", "query_start_loc", "cache_indices", "has_initial_state", "cache_seqlens", "write_indices",
    "snapshot_indices", "num_computed_tokens", "track_indices", "track_lengths",
)  # fmt: skip
Strides = strides_record(*ARRAYS)
NO_SNAPSHOTS = 1 << 62  # a block no row fills


class Options(NamedTuple):
    """What the kernel is compiled for; block: tokens between snapshots, span: the same within int32; search: as of a `PrefillConfig`."""

    width: Any
    layout: Any
    apply_empty: Any
    block: Any
    span: Any
    search: Any
    block_d: Any
    gate: Any = None
    overlap: Any = None


@triton.jit
def _count(items, row, in_rows):
    """Row's entry, at least 0, where there are any; 0 without."""
    count = tl.zeros([], tl.int64)
    if items.ptr is not None:
        count = tl.maximum(counted(tl.load(items.ptr + row * items.i, mask=in_rows, other=0)), 0)
    return count


@triton.jit
def _keep_window(x, length, old, new, channels, has_state, o: tl.constexpr):
    """Leaves the window behind `length` tokens of the row in slot `new`."""
    store_window(new, load_window(x, old, length, channels, has_state, o.width - 1, o), channels, o.width - 1)


@triton.jit(
    do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "snapshots", "dim_blocks"]
)
def _states_kernel(
    x, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
    snapshot_indices, num_computed_tokens, track_indices, track_lengths, strides,
    tokens, dim, batch, num_slots, state_len, pad_slot_id, snapshots, dim_blocks, o: tl.constexpr,
):  # fmt: skip
    # mapping of programs
    program = tl.program_id(0) // dim_blocks
    ch = (tl.program_id(0) % dim_blocks) * o.block_d + tl.arange(0, o.block_d)
    exist = ch < dim
    slots, flags = (
        Items(cache_indices, strides.cache_indices),
        Items(has_initial_state, strides.has_initial_state),
    )
    wait_for_inputs(o)
    rows = Rows(query_start_loc, slots, flags, batch, tokens)
    if snapshot_indices is None:
        row = program
        start, end, slot, flag = row_facts(rows, row)
    else:
        row, start, end, slot, flag = find_row(rows, program, o.span, o.search)
    row, start, slot = row.to(tl.int64), start.to(tl.int64), slot.to(tl.int64)
    length = tl.maximum(end - start, 0)
    in_rows = row < batch
    live = in_rows & is_slot(slot, num_slots, pad_slot_id)
    if not o.apply_empty:
        live = live & (length > 0)
    if live:
        has_state = row < 0
        if has_initial_state is not None:
            has_state = flag != 0
        seqlens = Items(cache_seqlens, strides.cache_seqlens)
        first = first_column(seqlens, None, row, in_rows, state_len, o)
        arrived = behind(tokens_of(x, strides.x), start)
        old = slot_of(conv_states, slot, strides.conv_states, first, state_len)

        block = program * 0
        if snapshot_indices is not None:
            block = program - start // o.span - row
            # boundary m of this call lies `ahead` + m * block tokens inside it and is boundary `passed` + m of the row
            consumed = _count(Items(num_computed_tokens, strides.num_computed_tokens), row, in_rows)
            passed = consumed // o.block
            ahead = o.block - consumed % o.block
            count = tl.where(length >= ahead, (length - ahead) // o.block + 1, 0)
            count = tl.minimum(count, tl.maximum(snapshots - passed, 0))
            # the first of them see the old window
            near = tl.minimum(count, tl.cdiv(tl.maximum(o.width - 1 - ahead, 0), o.block))
            begin = tl.where(block == 0, 0, tl.maximum(block, near))
            limit = tl.where(block == 0, tl.maximum(near, 1), block + 1)
            targets = snapshot_indices + row * strides.snapshot_indices[0]
            indices = Items(targets, strides.snapshot_indices[1])
            m = begin  # carried along, as in `rows.zero_tail`
            for _ in range(begin, tl.minimum(limit, count)):
                target, stores = find_slot(indices, passed + m, in_rows, num_slots, pad_slot_id)
                new = slot_of(conv_states, target, strides.conv_states, 0, 0)
                _keep_window(
                    arrived, ahead + m * o.block, old, new, Channels(ch, exist & holds(stores)), has_state, o
                )
                m += 1
        if block == 0:
            if track_indices is not None:
                kept = length
                if track_lengths is not None:
                    kept = tl.minimum(
                        _count(Items(track_lengths, strides.track_lengths), row, in_rows), length
                    )
                indices = Items(track_indices, strides.track_indices)
                target, stores = find_slot(indices, row, in_rows, num_slots, pad_slot_id)
                new = slot_of(conv_states, target, strides.conv_states, 0, 0)
                _keep_window(arrived, kept, old, new, Channels(ch, exist & holds(stores)), has_state, o)
            write = slot
            stores = live
            if write_indices is not None:
                indices = Items(write_indices, strides.write_indices)
                write, stores = find_slot(indices, row, in_rows, num_slots, pad_slot_id)
            moves = write != slot
            # a row of no tokens that keeps its slot and its state has nothing to do
            changes = stores & (moves | (length > 0) | (has_state == 0))
            new = slot_of(conv_states, write, strides.conv_states, first, state_len)
            leave_state(arrived, length, old, new, Channels(ch, exist & holds(changes)), has_state, moves, o)


def prepare(call, sizes, config, gate=None):
    """Prepares the kernel for a checked `FnCall` of such shapes, strides and dtypes.

    Args:
      sizes: `call.check()`.
      config: an UpdateConfig, whose channel blocks it takes.
      gate: as in `prefill.prepare`.

    Returns:
      A Launch of ARRAYS.
    """
    snapshots = call.snapshot_indices
    dim_blocks = triton.cdiv(sizes.dim, config.block_d)
    block, programs = NO_SNAPSHOTS, sizes.batch
    if snapshots is not None:
        block = min(call.snapshot_block_size, NO_SNAPSHOTS)
        programs += sizes.tokens // block + 1
    options = Options(
        width=sizes.width,
        layout=call.state_layout,
        apply_empty=call.empty_rows == "apply",
        block=block,
        span=min(block, 2**31 - 1),  # no batch has more tokens
        search=32 if sizes.batch < 32 else 128,
        block_d=config.block_d,
        overlap=overlaps(call.x.device, config.hurry),
        gate=gate,
    )
    values = (
        Strides(*strides_of(call, ARRAYS)),
        sizes.tokens,
        sizes.dim,
        sizes.batch,
        sizes.num_slots,
        sizes.state_len,
        known_pad(call.pad_slot_id, sizes.num_slots),
        None if snapshots is None else snapshots.shape[1],
        dim_blocks,
        constants(options),
    )
    return Launch(
        _states_kernel,
        (programs * dim_blocks, 1, 1),
        values,
        num_warps=config.num_warps,
        overlap=options.overlap,
    )
