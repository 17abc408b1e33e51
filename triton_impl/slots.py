"""Device code on slots: where a row's window is, and what a call leaves in a slot; and on the parts of a split result.

Layouts: "front", the window in columns 0 .. width-2; "rolling", in columns `first` .. `first`+width-2 of a slot that
keeps drafts behind it; "back", in the last width-1 columns of a slot that shifts as a whole; "ring", token n of the
sequence in column n mod state_len. All functions here take one row: `x` begins at its first token, `old` is the slot
it reads, whose `first` is the column of its window's oldest entry, before the ring is closed.
"""

import triton
import triton.language as tl

from triton_impl.arithmetic import load_input, recast
from triton_impl.records import Channels, Tokens, at, holds
from triton_impl.rows import counted


@triton.jit
def is_slot(slot, num_slots, pad_slot_id):
    return (slot != pad_slot_id) & (slot >= 0) & (slot < num_slots)


@triton.jit
def find_slot(indices, row, in_rows, num_slots, pad_slot_id):
    """Row's entry of `indices`, the row itself without, and whether it names a slot."""
    slot = row
    if indices.ptr is not None:
        slot = tl.load(indices.ptr + row * indices.i, mask=in_rows, other=-1).to(tl.int64)
    return slot, in_rows & is_slot(slot, num_slots, pad_slot_id)


@triton.jit
def first_column(cache_seqlens, num_accepted_tokens, row, in_rows, state_len, o: tl.constexpr):
    """`first` of a row's slot; in a ring, plus width-1 it is congruent to the tokens consumed so far."""
    first = tl.zeros([], tl.int64)
    if o.layout == "rolling":
        counts = num_accepted_tokens
        count = counted(tl.load(counts.ptr + row * counts.i, mask=in_rows, other=1))
        first = tl.minimum(tl.maximum(count, 1), state_len - o.width + 2) - 1
    elif o.layout == "back":
        first += state_len - (o.width - 1)
    elif o.layout == "ring":
        # the remainder at once, so that no count can overflow
        consumed = tl.load(cache_seqlens.ptr + row * cache_seqlens.i, mask=in_rows, other=0)
        length = tl.maximum(state_len, 1)
        if consumed.dtype == tl.uint64:
            turn = (consumed % length.to(tl.uint64)).to(tl.int64)
        else:
            turn = tl.maximum(consumed.to(tl.int64), 0) % length
        first = turn + state_len - (o.width - 1)
    return first


@triton.jit
def column_start(slot, i, o: tl.constexpr):
    """Where the column of the window's entry i begins."""
    place = slot.first + i
    if o.layout == "ring":
        place = place % slot.state_len
    return slot.ptr + place * slot.l


@triton.jit
def column(slot, i, channels, o: tl.constexpr):
    """Pointers to the window's entry i."""
    return column_start(slot, i, o) + channels.index * slot.d


@triton.jit
def load_window(x, old, begin, channels, has_state, count: tl.constexpr, o: tl.constexpr):
    """Entries [begin, begin+count) of window ++ x in the pool's dtype; zeros for a window that is not there."""
    entries = ()
    for c in tl.static_range(count):
        i = begin + c
        in_row = i >= o.width - 1
        new = load_input(at(x, i - (o.width - 1), channels), channels.exist & holds(in_row), o)
        wanted = channels.exist & holds(has_state) & holds(i < o.width - 1)
        kept = tl.load(column(old, i, channels, o), mask=wanted, other=0.0)
        entries = entries + (tl.where(in_row, recast(new, old.ptr.dtype.element_ty), kept),)
    return entries


@triton.jit
def store_window(slot, entries, channels, count: tl.constexpr):
    """Stores to the first columns of a slot."""
    for c in tl.static_range(count):
        entry = recast(entries[c], slot.ptr.dtype.element_ty)
        tl.store(slot.ptr + c * slot.l + channels.index * slot.d, entry, mask=channels.exist)


@triton.jit
def leave_state(x, length, old, new, channels, has_state, moves, o: tl.constexpr):
    """Leaves the row's new state in slot `new`, which may be `old`; `moves` says whether it is another.

    All reads of a slot precede all writes, whichever thread holds which channel.
    """
    if o.layout == "front":
        window = load_window(x, old, length, channels, has_state, o.width - 1, o)
        tl.debug_barrier()
        store_window(new, window, channels, o.width - 1)
    elif o.layout == "rolling":
        if o.width > 1:
            window = load_window(x, old, 1, channels, has_state, o.width - 2, o)
            tl.debug_barrier()
            store_window(new, window, channels, o.width - 2)
            for t in range(tl.minimum(length, old.state_len - (o.width - 2))):
                token = load_input(at(x, t, channels), channels.exist, o)
                place = new.ptr + (t + o.width - 2) * new.l + channels.index * new.d
                tl.store(place, recast(token, old.ptr.dtype.element_ty), mask=channels.exist)
    else:
        # The last state_len entries of slot ++ x, oldest first; in a ring only the new ones, unless all are moved.
        state_len = old.state_len
        begin = tl.zeros([], tl.int64)
        turn = tl.zeros([], tl.int64)
        if o.layout == "ring":
            begin = tl.where(moves | (has_state == 0), 0, tl.maximum(state_len - length, 0))
            turn = old.first + (o.width - 1) + length
        for c in range(begin, state_len, 4):
            entries = ()
            for j in tl.static_range(4):
                i = length + c + j
                inside = channels.exist & holds(c + j < state_len)
                arrived = load_input(at(x, i - state_len, channels), inside & holds(i >= state_len), o)
                place = (turn + c + j) % state_len if o.layout == "ring" else i
                wanted = inside & holds(has_state) & holds(i < state_len)
                kept = tl.load(old.ptr + place * old.l + channels.index * old.d, mask=wanted, other=0.0)
                arrived = recast(arrived, old.ptr.dtype.element_ty)
                entries = entries + (tl.where(i >= state_len, arrived, kept),)
            tl.debug_barrier()  # what later turns of the loop read lies behind what this one writes
            for j in tl.static_range(4):
                place = (turn + c + j) % state_len if o.layout == "ring" else c + j
                inside = channels.exist & holds(c + j < state_len)
                tl.store(new.ptr + place * new.l + channels.index * new.d, entries[j], mask=inside)


@triton.jit
def part_of_out(block, out, dim, tokens, o: tl.constexpr):
    """The channels of a block, and where their results go: a block lies in one of the parts of `o.sizes`.

    `o.align` divides all sizes. The parts follow each other in `out`, each [tokens, size].
    """
    ptr = out.ptr
    stride_t = out.t
    stride_d = out.d
    if len(o.sizes) == 0:
        ch = block * o.block_d + tl.arange(0, o.block_d)
        exist = ch < dim
    else:
        start = 0
        size = o.sizes[0]
        first_block = 0
        ahead = 0
        blocks_ahead = 0
        for part in tl.static_range(1, len(o.sizes)):
            ahead = ahead + o.sizes[part - 1]
            blocks_ahead = blocks_ahead + (o.sizes[part - 1] + o.block_d - 1) // o.block_d
            inside = block >= blocks_ahead
            start = tl.where(inside, ahead, start)
            size = tl.where(inside, o.sizes[part], size)
            first_block = tl.where(inside, blocks_ahead, first_block)
        if len(o.sizes) > 1:
            start = tl.multiple_of(start, o.align)
            size = tl.multiple_of(size, o.align)
        lane = (block - first_block) * o.block_d + tl.arange(0, o.block_d)
        ch = start + lane
        exist = lane < size
        ptr += tl.cast(tokens, tl.int64) * start - start
        stride_t = tl.cast(size, tl.int64)
        stride_d = tl.cast(1, tl.int64)
    return Channels(ch, exist), Tokens(ptr, stride_t, stride_d)


def split_blocks(dim, split_sizes, block_d):
    """How many programs share a row's channels, the parts' sizes, and the largest of 1, 2, .. 16 that divides all."""
    sizes = () if split_sizes is None else tuple(split_sizes)
    blocks = sum(triton.cdiv(size, block_d) for size in sizes or (dim,))
    align = min([16, *(size & -size for size in sizes)])
    return blocks, sizes, align
