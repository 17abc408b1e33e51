"""Device code on slots: where a row's window is, and what a call leaves in a slot.

Layouts: "front", the window in columns 0 .. width-2; "rolling", in columns `first` .. `first`+width-2 of a slot that
keeps drafts behind it; "back", in the last width-1 columns of a slot that shifts as a whole; "ring", token n of the
sequence in column n mod state_len. All functions here take one row: `x` points at its first token, `old` at the slot
it reads, `first` is the column of its window's oldest entry, before the ring is closed.
"""

import triton
import triton.language as tl

from triton_impl.taps import recast


@triton.jit
def find_slot(indices, row, in_rows, stride, num_slots, pad_slot_id):
    """Row's entry of `indices`, the row itself without, and whether it names a slot."""
    slot = row
    if indices is not None:
        slot = tl.load(indices + row * stride, mask=in_rows, other=-1).to(tl.int64)
    return slot, in_rows & (slot != pad_slot_id) & (slot >= 0) & (slot < num_slots)


@triton.jit
def find_window(
    cache_seqlens, num_accepted_tokens, row, in_rows, stride_q, stride_a, state_len,
    WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """`first` of a row; in a ring, plus width-1 it is congruent to the tokens consumed so far."""
    first = tl.zeros([], tl.int64)
    if LAYOUT == "rolling":
        count = tl.load(num_accepted_tokens + row * stride_a, mask=in_rows, other=1).to(tl.int64)
        first = tl.minimum(tl.maximum(count, 1), state_len - WIDTH + 2) - 1
    elif LAYOUT == "back":
        first += state_len - (WIDTH - 1)
    elif LAYOUT == "ring":
        # the remainder at once, so that no count can overflow
        consumed = tl.maximum(tl.load(cache_seqlens + row * stride_q, mask=in_rows, other=0).to(tl.int64), 0)
        first = consumed % tl.maximum(state_len, 1) + state_len - (WIDTH - 1)
    return first


@triton.jit
def column(first, i, state_len, LAYOUT: tl.constexpr):
    """Column of the window's entry i."""
    at = first + i
    if LAYOUT == "ring":
        at = at % state_len
    return at


@triton.jit
def load_entries(
    x, old, begin, first, state_len, ch, in_dim, has_state, stride_x_t, stride_x_d, stride_s_l, stride_s_d,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Entries [begin, begin+COUNT) of window ++ x in the pool's dtype; zeros for a window that is not there."""
    entries = ()
    for c in tl.static_range(COUNT):
        i = begin + c
        in_row = i >= WIDTH - 1
        new = tl.load(x + (i - (WIDTH - 1)) * stride_x_t + ch * stride_x_d, mask=in_dim & in_row, other=0.0)
        kept = tl.load(
            old + column(first, i, state_len, LAYOUT) * stride_s_l + ch * stride_s_d,
            mask=in_dim & has_state & (i < WIDTH - 1),
            other=0.0,
        )
        entries = entries + (tl.where(in_row, recast(new, old.dtype.element_ty), kept),)
    return entries


@triton.jit
def store_entries(slot, entries, ch, mask, stride_s_l, stride_s_d, COUNT: tl.constexpr):
    """Stores to the first columns of a slot."""
    for c in tl.static_range(COUNT):
        tl.store(slot + c * stride_s_l + ch * stride_s_d, entries[c], mask=mask)


@triton.jit
def leave_state(
    x, length, old, new, first, state_len, ch, in_dim, has_state, moves, stride_x_t, stride_x_d, stride_s_l, stride_s_d,
    WIDTH: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Leaves the row's new state in slot `new`, which may be `old`; `moves` says whether it is another.

    All reads of a slot precede all writes, whichever thread holds which channel.
    """
    if LAYOUT == "front":
        window = load_entries(
            x, old, length, first, state_len, ch, in_dim, has_state,
            stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH - 1, WIDTH, LAYOUT,
        )  # fmt: skip
        tl.debug_barrier()
        store_entries(new, window, ch, in_dim, stride_s_l, stride_s_d, WIDTH - 1)
    elif LAYOUT == "rolling":
        if WIDTH > 1:
            window = load_entries(
                x, old, 1, first, state_len, ch, in_dim, has_state,
                stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH - 2, WIDTH, LAYOUT,
            )  # fmt: skip
            tl.debug_barrier()
            store_entries(new, window, ch, in_dim, stride_s_l, stride_s_d, WIDTH - 2)
            for t in range(tl.minimum(length, state_len - (WIDTH - 2))):
                token = tl.load(x + t * stride_x_t + ch * stride_x_d, mask=in_dim, other=0.0)
                place = new + (t + WIDTH - 2) * stride_s_l + ch * stride_s_d
                tl.store(place, recast(token, old.dtype.element_ty), mask=in_dim)
    else:
        # The last state_len entries of slot ++ x, oldest first; in a ring only the new ones, unless all are moved.
        begin = tl.zeros([], tl.int64)
        turn = tl.zeros([], tl.int64)
        if LAYOUT == "ring":
            begin = tl.where(moves | (has_state == 0), 0, tl.maximum(state_len - length, 0))
            turn = first + (WIDTH - 1) + length
        for c in range(begin, state_len, 4):
            entries = ()
            for j in tl.static_range(4):
                i = length + c + j
                inside = in_dim & (c + j < state_len)
                token = x + (i - state_len) * stride_x_t + ch * stride_x_d
                arrived = tl.load(token, mask=inside & (i >= state_len), other=0.0)
                at = (turn + c + j) % state_len if LAYOUT == "ring" else i
                kept = tl.load(
                    old + at * stride_s_l + ch * stride_s_d,
                    mask=inside & has_state & (i < state_len),
                    other=0.0,
                )
                entries = entries + (tl.where(i >= state_len, recast(arrived, old.dtype.element_ty), kept),)
            tl.debug_barrier()  # what later turns of the loop read lies behind what this one writes
            for j in tl.static_range(4):
                at = (turn + c + j) % state_len if LAYOUT == "ring" else c + j
                tl.store(
                    new + at * stride_s_l + ch * stride_s_d, entries[j], mask=in_dim & (c + j < state_len)
                )


@triton.jit
def output_channels(
    block,
    dim,
    tokens,
    out,
    stride_o_t,
    stride_o_d,
    SIZES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The channels of a block, and where their results go: a block lies in one of the parts of SIZES.

    ALIGN divides all sizes. The parts follow each other in `out`, each [tokens, size].

    Returns:
      The channels, which of them exist, and `out` with the strides of tokens and channels for this block.
    """
    if len(SIZES) == 0:
        ch = block * BLOCK_D + tl.arange(0, BLOCK_D)
        in_dim = ch < dim
    else:
        start = 0
        size = SIZES[0]
        first_block = 0
        ahead = 0
        blocks_ahead = 0
        for part in tl.static_range(1, len(SIZES)):
            ahead = ahead + SIZES[part - 1]
            blocks_ahead = blocks_ahead + (SIZES[part - 1] + BLOCK_D - 1) // BLOCK_D
            inside = block >= blocks_ahead
            start = tl.where(inside, ahead, start)
            size = tl.where(inside, SIZES[part], size)
            first_block = tl.where(inside, blocks_ahead, first_block)
        if len(SIZES) > 1:
            start = tl.multiple_of(start, ALIGN)
            size = tl.multiple_of(size, ALIGN)
        lane = (block - first_block) * BLOCK_D + tl.arange(0, BLOCK_D)
        ch = start + lane
        in_dim = lane < size
        out += tl.cast(tokens, tl.int64) * start - start
        stride_o_t = tl.cast(size, tl.int64)
        stride_o_d = tl.cast(1, tl.int64)
    return ch, in_dim, out, stride_o_t, stride_o_d


@triton.jit
def add_residual(value, residual, PTX: tl.constexpr):
    """The sum of two float32 blocks, never fused with the product before it."""
    if PTX:
        total = tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [value, residual], tl.float32, is_pure=True, pack=1
        )
    else:
        total = value + residual
    return total


def split_blocks(dim, split_sizes, block_d):
    """How many programs share a row's channels, the parts' sizes, and the largest of 1, 2, .. 16 that divides all."""
    sizes = () if split_sizes is None else tuple(split_sizes)
    blocks = sum(triton.cdiv(size, block_d) for size in sizes or (dim,))
    align = min([16, *(size & -size for size in sizes)])
    return blocks, sizes, align
