"""Device code on packed rows: where a row begins and ends, which row a program belongs to, zeros where nothing is computed."""

import triton
import triton.language as tl

from triton_impl.records import at


@triton.jit
def counted(value):
    """An integer of any dtype as int64, a count: what only uint64 can hold is as good as 2**62, not negative."""
    wide = value.to(tl.int64)
    if value.dtype == tl.uint64:
        wide = tl.where(wide < 0, 1 << 62, wide)
    return wide


@triton.jit
def channel_block_and_place(channel_blocks, folded: tl.constexpr):
    """Which program of a `launch.program_grid` this is; unless it is folded, two registers and no division."""
    if folded:
        return tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks
    else:
        return tl.program_id(0), tl.program_id(1)


@triton.jit
def offset(query_start_loc, i, batch, tokens):
    """Entry i of query_start_loc, clamped to [0, tokens]; entry 0 is taken as 0, entry batch+1 is `tokens`.

    It has the width of `tokens`, which is 32 bits wherever that is enough.
    """
    offset = tl.load(query_start_loc + i, mask=(i > 0) & (i <= batch), other=0)
    offset = tl.maximum(tl.minimum(offset, tokens), 0).to(tokens.dtype)
    return tl.where(i > batch, tokens, offset)


@triton.jit
def row_facts(rows, row):
    """Start, end, slot and flag of rows, all asked for before any is used: one wait."""
    slot = row
    flag = tl.zeros_like(row)
    start = offset(rows.query_start_loc, row, rows.batch, rows.tokens)
    end = offset(rows.query_start_loc, row + 1, rows.batch, rows.tokens)
    if rows.slots.ptr is not None:
        slot = tl.load(rows.slots.ptr + row.to(tl.int64) * rows.slots.i, mask=row < rows.batch, other=0)
    if rows.flags.ptr is not None:
        flag = tl.load(rows.flags.ptr + row.to(tl.int64) * rows.flags.i, mask=row < rows.batch, other=0)
        flag = flag.to(tl.int32)
    return start, end, slot, flag


@triton.jit
def find_row(rows, block, block_t: tl.constexpr, search: tl.constexpr):
    """The last row in [0, batch] whose first block is at most `block`, with its facts; `search` candidates at a time.

    Block k of row s has the number `query_start_loc[s] // block_t + s + k`. The last step of the search loads the
    facts of all candidates, which saves a wait for those of the row found.
    """
    row = 0
    size = rows.batch + 1
    lane = tl.arange(0, search)
    while size > search:
        step = (size + search - 1) // search
        candidate = row + lane * step
        start = offset(rows.query_start_loc, candidate, rows.batch, rows.tokens)
        passed = (lane * step < size) & (start // block_t + candidate <= block)
        ahead = tl.maximum(tl.sum(passed.to(tl.int32), axis=0) - 1, 0) * step
        row += ahead
        size = tl.minimum(step, size - ahead)
    candidate = row + lane
    start, end, slot, flag = row_facts(rows, candidate)
    passed = (lane < size) & (start // block_t + candidate <= block)
    ahead = tl.maximum(tl.sum(passed.to(tl.int32), axis=0) - 1, 0)
    found = lane == ahead
    start = tl.sum(tl.where(found, start, 0), axis=0)
    end = tl.sum(tl.where(found, end, 0), axis=0)
    if rows.slots.ptr is not None:
        slot = tl.sum(tl.where(found, slot, 0), axis=0)
    else:
        slot = row + ahead
    if rows.flags.ptr is not None:
        flag = tl.sum(tl.where(found, flag, 0), axis=0)
    else:
        flag = 0
    return row + ahead, start, end, slot, flag


@triton.jit
def load_mark(marks, position):
    """Bit 8 + i, from the highest: whether a document begins i tokens behind a row's token `position`, see `document_marks`.

    i is -8 to 15, less what `position` lies behind a multiple of 8.
    """
    return tl.load(marks + (position >> 3)).to(tl.uint32, bitcast=True) << tl.cast(position & 7, tl.uint32)


@triton.jit
def begins_in(mark, place: tl.constexpr, count: tl.constexpr):
    """Whether a document begins at one of `count` tokens of a mark, the first of them bit `place`."""
    return ((mark << place) >> (32 - count)) != 0


@triton.jit
def begun(window, count: tl.constexpr, mark, place: tl.constexpr):
    """The `count` entries before the token at bit `place`: zeros if a document begins with it."""
    anew = begins_in(mark, place, 1)
    entries = ()
    for j in tl.static_range(count):
        entries = entries + (tl.where(anew, 0.0, window[j]).to(window[j].dtype),)
    return entries


@triton.jit
def same_document(gs, count: tl.constexpr, mark, place: tl.constexpr):
    """Values of the token at bit `place` and of those behind it, `count`; zeros for those of later documents."""
    entries = gs[:1]
    for k in tl.static_range(1, count):
        entries = entries + (tl.where(begins_in(mark, place + 1, k), 0.0, gs[k]),)
    return entries


@triton.jit
def zero_tail(out, first, last, step, channels):
    """Zeros for tokens first, first + step, ... before `last`: of padding rows, and behind the last row."""
    zero = tl.zeros(channels.index.shape, out.ptr.dtype.element_ty)
    # carried along: Triton 3.7.1 and later store element by element where the address is made from this loop's index
    target = at(out, first, channels)
    for _ in range(first, last, step):
        tl.store(target, zero, mask=channels.exist)
        target += step * out.t
