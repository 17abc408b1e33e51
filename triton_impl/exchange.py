"""Device code of tokens split over ranks: what a rank tells the others, and what it makes of what it was told.

A message is bytes and as long on every rank. A rank fills the places of what it knows and leaves zeros in all others, so
that the sum over the ranks, byte by byte, is the whole of it: one collective, of no dtype. It begins with an int64 a
rank, its number of tokens; then come vectors of dim channels in x's dtype:

    forward    [ranks, width-1]     the tokens before each rank's part
               [batch, width-1]     with a pool: the last tokens of each row
    backward   [ranks, 2, width-1]  the tokens after each rank's part, and their upstream gradient

A backward message is not summed but gathered, since behind it lie sums in float32 that are added in the order of the ranks;
who reads it joins the bits of all ranks.

Tokens that do not exist are zeros. All offsets are into the whole and are clamped to it, so no value of
`query_start_loc` leads outside of a tensor, nor does a part of another length than was expected.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_impl.arithmetic import (
    activate,
    convolve,
    load_taps,
    load_weights,
    native_ptx,
    recast,
    round_to,
    widen,
    word_bits,
)
from triton_impl.config import next_power_of_2
from triton_impl.launch import Launch, known_pad, like_result, program_grid, strides_of
from triton_impl.records import Channels, Items, Rows, at, constants, slot_of, strides_record, tokens_of
from triton_impl.rows import channel_block_and_place, offset, row_facts
from triton_impl.slots import column, is_slot, store_window

FORWARD = ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state")
Strides = strides_record(*FORWARD, "out")
BackwardStrides = strides_record("x", "dout")
BLOCK_D = 256
UNEQUAL = tl.constexpr("part_lengths: expected the tokens of each rank, since they differ, got None")


class Part(NamedTuple):
    """This rank's part of the whole.

    Attributes:
      rank: of the process group.
      lengths: tokens of every rank.
      equal: the lengths of the others are taken to be this one's, which is to be checked.
    """

    rank: int
    lengths: tuple
    equal: bool

    @property
    def begin(self):
        return sum(self.lengths[: self.rank])

    def ahead(self, most):
        """Tokens between the end of this part and the begin of each later one, at most `most`; `most` for others."""
        lengths, rank = self.lengths, self.rank
        return tuple(min(sum(lengths[rank + 1 : r]), most) if r > rank else most for r in range(len(lengths)))

    def behind(self, most):
        """Tokens between the end of each earlier part and the begin of this one, likewise."""
        lengths, rank = self.lengths, self.rank
        return tuple(min(sum(lengths[r + 1 : rank]), most) if r < rank else most for r in range(len(lengths)))

    def header(self):
        """Bytes before a message's vectors, which are aligned to 16."""
        return -(-8 * len(self.lengths) // 16) * 16


class Options(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
      apart: `Part.ahead(width-1)`, in the backward pass `Part.behind(width-1)`.
      header: `Part.header()`.
      lanes: a power of two, at least the number of ranks.
      pooled: there is a pool.
      checks: the parts are asserted to be equal.
    """

    width: Any
    silu: Any
    word_bits: Any
    apart: Any
    header: Any
    lanes: Any
    pooled: Any
    checks: Any
    folded: Any
    block_d: Any
    ptx: Any
    layout: Any = "front"


@triton.jit
def _place(channel_blocks, dim, o: tl.constexpr):
    """(a program's channels, its number among those with the same, whether its channels are the first)."""
    block, place = channel_block_and_place(channel_blocks, o.folded)
    index = block * o.block_d + tl.arange(0, o.block_d)
    return Channels(index, index < dim), place, block == 0


@triton.jit
def _vectors(message, like, o: tl.constexpr):
    """Where a message's vectors begin, in the dtype of `like`."""
    return (message + o.header).to(tl.pointer_type(like.dtype.element_ty))


@triton.jit
def _tell(vectors, i, dim, source, t, own, channels):
    """Vector i becomes token t of the source, or zeros."""
    token = tl.load(at(source, t, channels), mask=channels.exist & own, other=0.0)
    place = vectors + tl.cast(i, tl.int64) * dim + channels.index
    tl.store(place, token.to(vectors.dtype.element_ty), mask=channels.exist)


@triton.jit
def _told(vectors, i, dim, wanted, channels):
    place = vectors + tl.cast(i, tl.int64) * dim + channels.index
    return tl.load(place, mask=channels.exist & wanted, other=0.0)


@triton.jit
def _told_by_any(every, size, like, i, dim, wanted, channels, o: tl.constexpr):
    """Vector i of the messages of all ranks, `size` bytes each; one rank at most has told it, the others zeros."""
    bits: tl.constexpr = tl.int16 if like.dtype.element_ty.primitive_bitwidth == 16 else tl.int32
    joined = tl.zeros([o.block_d], bits)
    for r in tl.static_range(len(o.apart)):
        vectors = _vectors(every + tl.cast(size, tl.int64) * r, like, o)
        joined = joined | _told(vectors, i, dim, wanted, channels).to(bits, bitcast=True)
    return joined.to(like.dtype.element_ty, bitcast=True)


@triton.jit
def _bounds(query_start_loc, row, batch, whole):
    """A row's first token and its end in the whole, 64-bit."""
    start = offset(query_start_loc, row, batch, whole).to(tl.int64)
    return start, offset(query_start_loc, row + 1, batch, whole).to(tl.int64)


@triton.jit
def _store_start(starts, i, bound, base, tokens, first):
    """Entry i of the offsets into the tokens [base, base + tokens); one program of a row stores it."""
    place = tl.minimum(tl.maximum(bound - base, 0), tokens)
    tl.store(starts + i, place.to(starts.dtype.element_ty), mask=first)


@triton.jit(do_not_specialize=["tokens", "whole", "begin", "batch", "rank", "channel_blocks"])
def _tell_kernel(
    x,
    query_start_loc,
    message,
    starts,
    strides,
    tokens,
    whole,
    begin,
    dim,
    batch,
    rank,
    channel_blocks,
    o: tl.constexpr,
):
    """Fills a forward message, and the offsets of the rows into the part."""
    vectors = _vectors(message, x, o)
    x = tokens_of(x, strides.x)
    channels, place, first = _place(channel_blocks, dim, o)
    if place == 0:
        lane = tl.arange(0, o.lanes)
        length = tl.where(lane == rank, tokens, 0).to(tl.int64)
        known = (lane < len(o.apart)) & first
        tl.store(message.to(tl.pointer_type(tl.int64)) + lane, length, mask=known)
        tl.store(starts, tl.zeros([], starts.dtype.element_ty), mask=first)
        for r in tl.static_range(len(o.apart)):
            for j in tl.static_range(o.width - 1):
                t = tl.cast(tokens, tl.int64) + (o.apart[r] - (o.width - 1) + j)
                _tell(vectors, r * (o.width - 1) + j, dim, x, t, (t >= 0) & (t < tokens), channels)
    else:
        row = (place - 1).to(tl.int64)
        start, end = _bounds(query_start_loc, row, batch, whole)
        _store_start(starts, row + 1, end, begin, tokens, first)
        if o.pooled:
            for c in tl.static_range(o.width - 1):
                position = end + (c - (o.width - 1))
                t = position - begin
                own = (position >= start) & (t >= 0) & (t < tokens)
                _tell(vectors, (len(o.apart) + row) * (o.width - 1) + c, dim, x, t, own, channels)


@triton.jit
def _entry(vectors, i, position, start, dim, held, has_state, channels, o: tl.constexpr):
    """The input at a position, float32: vector i, or before the row's start the entry of its slot, or zero."""
    in_row = position >= start
    entry = widen(_told(vectors, i, dim, in_row, channels))
    if o.pooled:
        wanted = channels.exist & has_state & (in_row == 0)
        old = tl.load(column(held, position - start + (o.width - 1), channels, o), mask=wanted, other=0.0)
        entry = tl.where(in_row, entry, widen(old))
    return entry


@triton.jit(
    do_not_specialize=[
        "tokens",
        "whole",
        "begin",
        "batch",
        "num_slots",
        "pad_slot_id",
        "rank",
        "channel_blocks",
    ]
)
def _cut_kernel(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices,
    has_initial_state,
    message,
    out,
    strides,
    tokens,
    whole,
    begin,
    dim,
    batch,
    num_slots,
    pad_slot_id,
    rank,
    channel_blocks,
    o: tl.constexpr,
):
    """What a part cannot know without its message: the first outputs of the row that crosses the cut, and new windows."""
    vectors = _vectors(message, x, o)
    x, out = tokens_of(x, strides.x), tokens_of(out, strides.out)
    channels, place, _ = _place(channel_blocks, dim, o)
    if place == 0:
        if o.checks:
            lane = tl.arange(0, o.lanes)
            known = lane < len(o.apart)
            found = tl.load(message.to(tl.pointer_type(tl.int64)) + lane, mask=known, other=0)
            tl.device_assert((found == tokens) | (known == 0), UNEQUAL)
    elif o.width > 1:
        row = (place - 1).to(tl.int64)
        slots = Items(cache_indices, strides.cache_indices)
        flags = Items(has_initial_state, strides.has_initial_state)
        start, end, slot, flag = row_facts(Rows(query_start_loc, slots, flags, batch, whole), row)
        start, end, slot = start.to(tl.int64), end.to(tl.int64), slot.to(tl.int64)
        live = end > start
        has_state = flag != 0
        held = None
        if o.pooled:
            live = live & is_slot(slot, num_slots, pad_slot_id)
            held = slot_of(conv_states, slot, strides.conv_states, 0, 0)
        if live:
            entries = ()
            if o.pooled:
                dtype: tl.constexpr = conv_states.dtype.element_ty
                for c in tl.static_range(o.width - 1):
                    position = end + (c - (o.width - 1))
                    in_row = position >= start
                    new = _told(vectors, (len(o.apart) + row) * (o.width - 1) + c, dim, in_row, channels)
                    wanted = channels.exist & has_state & (in_row == 0)
                    old = column(held, position - start + (o.width - 1), channels, o)
                    kept = tl.load(old, mask=wanted, other=0.0)
                    entries = entries + (tl.where(in_row, recast(new, dtype), kept),)
            if (start < begin) & (begin < end):
                window = ()
                for j in tl.static_range(o.width - 1):
                    position = tl.cast(begin, tl.int64) + (j - (o.width - 1))
                    i = rank * (o.width - 1) + j
                    window = window + (
                        _entry(vectors, i, position, start, dim, held, has_state, channels, o),
                    )
                taps, added = load_taps(load_weights(weight, bias, strides, channels, o), o)
                last = tl.minimum(end - begin, tokens)
                for t in tl.static_range(o.width - 1):
                    inside = channels.exist & (t < last)
                    e = window + (widen(tl.load(at(x, t, channels), mask=inside, other=0.0)),)
                    value = activate(convolve(e, taps, added, o.width), o)
                    tl.store(at(out, t, channels), round_to(value, out.ptr.dtype.element_ty), mask=inside)
                    window = e[1:]
            if o.pooled:
                tl.debug_barrier()  # all reads of the slot precede all writes, whichever thread holds which channel
                store_window(held, entries, channels, o.width - 1)


@triton.jit(do_not_specialize=["tokens", "whole", "begin", "batch", "rank", "channel_blocks"])
def _tell_back_kernel(
    x,
    dout,
    query_start_loc,
    before,
    message,
    windows,
    strides,
    tokens,
    whole,
    begin,
    dim,
    batch,
    rank,
    channel_blocks,
    o: tl.constexpr,
):
    """Fills a backward message, and the initial windows of the part's rows: of what the forward message told."""
    vectors, halo = _vectors(message, x, o), _vectors(before, x, o)
    x, dout = tokens_of(x, strides.x), tokens_of(dout, strides.dout)
    channels, place, _ = _place(channel_blocks, dim, o)
    if place == 0:
        for r in tl.static_range(len(o.apart)):
            for j in tl.static_range(o.width - 1):
                t = tl.zeros([], tl.int64) + (j - o.apart[r])
                own = (t >= 0) & (t < tokens)
                _tell(vectors, 2 * r * (o.width - 1) + j, dim, x, t, own, channels)
                _tell(vectors, (2 * r + 1) * (o.width - 1) + j, dim, dout, t, own, channels)
    else:
        row = (place - 1).to(tl.int64)
        start, end = _bounds(query_start_loc, row, batch, whole)
        crosses = (start < begin) & (begin < end)
        for j in tl.static_range(o.width - 1):
            own = crosses & (tl.cast(begin, tl.int64) + (j - (o.width - 1)) >= start)
            entry = _told(halo, rank * (o.width - 1) + j, dim, own, channels)
            target = windows + (row * (o.width - 1) + j) * dim + channels.index
            tl.store(target, entry.to(windows.dtype.element_ty), mask=channels.exist)


@triton.jit(
    do_not_specialize=["tokens", "whole", "begin", "batch", "rank", "count", "size", "channel_blocks"]
)
def _around_kernel(
    x,
    dout,
    query_start_loc,
    before,
    every,
    x_around,
    dout_around,
    starts,
    strides,
    tokens,
    whole,
    begin,
    dim,
    batch,
    rank,
    count,
    size,
    channel_blocks,
    o: tl.constexpr,
):
    """The `count` tokens around the part's last ones, width-1 of them behind it; their gradients; the rows' offsets."""
    halo, like_x, like_dout = _vectors(before, x, o), x, dout
    x, dout = tokens_of(x, strides.x), tokens_of(dout, strides.dout)
    channels, place, first = _place(channel_blocks, dim, o)
    base = tl.cast(tokens, tl.int64) + (o.width - 1) - count  # counted in the part, so below 0 before it
    if place < count:
        t = base + place
        here = (t >= 0) & (t < tokens)
        later = tl.maximum(t - tokens, 0)
        told = _told(halo, rank * (o.width - 1) + t + (o.width - 1), dim, t < 0, channels)
        of_x = 2 * rank * (o.width - 1) + later
        after = _told_by_any(every, size, like_x, of_x, dim, t >= tokens, channels, o)
        own = tl.load(at(x, t, channels), mask=channels.exist & here, other=0.0)
        entry = tl.where(here, own, tl.where(t < 0, told, after))
        target = place.to(tl.int64) * dim + channels.index
        tl.store(x_around + target, entry, mask=channels.exist)
        # what lies before the tokens whose dx is wanted gives nothing to it
        here = here & (place >= o.width - 1)
        of_dout = of_x + (o.width - 1)
        after = _told_by_any(every, size, like_dout, of_dout, dim, t >= tokens, channels, o)
        own = tl.load(at(dout, t, channels), mask=channels.exist & here, other=0.0)
        tl.store(dout_around + target, tl.where(here, own, after), mask=channels.exist)
    else:
        row = (place - count).to(tl.int64)
        _, end = _bounds(query_start_loc, row, batch, whole)
        _store_start(starts, row + 1, end, begin + base, count, first)
    tl.store(starts, tl.zeros([], starts.dtype.element_ty), mask=(place == 0) & first)


@triton.jit(do_not_specialize=["weights", "numbers", "ranks", "first", "size"])
def _sum_kernel(every, dweight, dbias, weights, numbers, ranks, first, size, block: tl.constexpr):
    """The sums over ranks, in their order, of `numbers` float32 from `first` on of each rank's `size`.

    The first `weights` of them are dweight's.
    """
    i = tl.program_id(0) * block + tl.arange(0, block)
    exist = i < numbers
    parts = every.to(tl.pointer_type(tl.float32)) + first
    total = tl.load(parts + i, mask=exist, other=0.0)
    for r in range(1, ranks):
        total += tl.load(parts + tl.cast(r, tl.int64) * size + i, mask=exist, other=0.0)
    tl.store(dweight + i, round_to(total, dweight.dtype.element_ty), mask=i < weights)
    if dbias is not None:
        biases = exist & (i >= weights)
        tl.store(dbias + (i - weights), round_to(total, dbias.dtype.element_ty), mask=biases)


def _options(call, sizes, part, apart, places):
    block_d = min(next_power_of_2(sizes.dim), BLOCK_D)
    blocks = triton.cdiv(sizes.dim, block_d)
    grid, folded = program_grid(blocks, places)
    options = Options(
        width=sizes.width,
        silu=call.activation is not None,
        word_bits=word_bits(call.weight),
        apart=apart,
        header=part.header(),
        lanes=next_power_of_2(len(part.lengths)),
        pooled=getattr(call, "conv_states", None) is not None,
        checks=part.equal and call.x.device.type == "cuda",
        folded=folded,
        block_d=block_d,
        ptx=native_ptx(),
    )
    return options, grid, blocks if folded else None


def prepare(call, sizes, part):
    """Prepares the kernels around a prefill of a part of the tokens.

    Args:
      call: a checked `FnCall` whose x is the part, all else the whole.
      sizes: `call.check()`.
      part: a Part.

    Returns:
      (bytes of the message, a Launch of x, query_start_loc, the message and the part's offsets, a Launch of FORWARD,
      the summed message and out).
    """
    history = sizes.width - 1
    options, grid, blocks = _options(call, sizes, part, part.ahead(history), 1 + sizes.batch)
    vectors = (len(part.lengths) + (sizes.batch if options.pooled else 0)) * history
    size = part.header() + vectors * sizes.dim * call.x.element_size()
    strides = Strides(*strides_of(call, FORWARD), out=like_result(call).stride())
    place = sizes.tokens, sum(part.lengths), part.begin, sizes.dim, sizes.batch
    tell = Launch(_tell_kernel, grid, (strides, *place, part.rank, blocks, constants(options)))
    slots = sizes.num_slots, known_pad(call.pad_slot_id, sizes.num_slots)
    checked = dict(debug=True, sanitize_overflow=False) if options.checks else {}
    cut = (strides, *place, *slots, part.rank, blocks, constants(options))
    return size, tell, Launch(_cut_kernel, grid, cut, **checked)


def prepare_backward(call, dout, sizes, part, tail, numbers):
    """Prepares the kernels around the backward pass of a part of the tokens.

    Args:
      call: a checked `RowsCall` whose x is the part, all else the whole.
      dout: the gradient of its result.
      sizes: `call.check()`.
      part: a Part.
      tail: tokens at its end whose dx needs the later ranks.
      numbers: how many float32 lie behind a message, to be summed over the ranks.

    Returns:
      (bytes of the message without them and with them; a Launch of x, dout, query_start_loc, the forward message, the message, initial
      windows; a Launch of x, dout, query_start_loc, the forward message, the messages of all ranks, x, dout and offsets
      around the tail; a Launch of those messages, dweight and dbias).
    """
    history = sizes.width - 1
    count = tail + 2 * history
    size = part.header() + 2 * len(part.lengths) * history * sizes.dim * call.x.element_size()
    first = -(-size // 16) * 16
    size = first + -(-numbers // 4) * 16
    strides = BackwardStrides(call.x.stride(), dout.stride())
    place = sizes.tokens, sum(part.lengths), part.begin, sizes.dim, sizes.batch, part.rank
    behind = part.behind(history)
    options, grid, blocks = _options(call, sizes, part, behind, 1 + sizes.batch)
    tell = Launch(_tell_back_kernel, grid, (strides, *place, blocks, constants(options)))
    options, grid, blocks = _options(call, sizes, part, behind, count + sizes.batch)
    around = Launch(_around_kernel, grid, (strides, *place, count, size, blocks, constants(options)))
    weights, ranks, block = sizes.dim * sizes.width, len(part.lengths), 1024
    values = weights, numbers, ranks, first // 4, size // 4, block
    return (first, size), tell, around, Launch(_sum_kernel, (triton.cdiv(numbers, block), 1, 1), values)
