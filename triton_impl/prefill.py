"""Packed prefill: every row's tokens convolved behind its window, the new window left in its slot.

A program owns block_t tokens of one row and block_d channels. Schedule "per_sequence": behind the blocks of channels,
which come first in the grid so that programs side by side read side by side, the next axis is the row and the last
one the block of tokens in it; programs past the end of their row return at once, and stride on if the grid is too
small. Schedule "flat": the axis of rows has instead block k of row s as number `query_start_loc[s] // block_t + s + k`,
so a program finds its row by a search on the device and the grid needs no lengths. Row `batch` stands for the
padded tail.

The program of a row's first block reads the old window and writes the new one; the others take the
`width-1` tokens before their block from x. A row of one token, a decode step among prefills, has a shorter way.
Nothing is planned on the host and nothing synchronises.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl.arithmetic import (
    activate,
    convolve,
    finish,
    join_columns,
    join_residual,
    load_input,
    load_taps,
    load_weights,
    native_ptx,
    recast,
    round_to,
    split_columns,
    widen,
    word_bits,
)
from triton_impl.config import MAX_GRID_YZ
from triton_impl.launch import (
    Launch,
    known_pad,
    like_result,
    overlaps,
    program_grid,
    strides_of,
    wait_for_inputs,
)
from triton_impl.records import (
    Channels,
    Items,
    Row,
    Rows,
    Slot,
    at,
    constants,
    holds,
    slot_of,
    strides_record,
    tokens_of,
)
from triton_impl.rows import begun, channel_block_and_place, find_row, load_mark, row_facts, zero_tail
from triton_impl.slots import (
    column,
    column_start,
    first_column,
    is_slot,
    part_of_out,
    split_blocks,
    store_window,
)

ARRAYS = (
    "x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state", "cache_seqlens",
    "residual",
)  # fmt: skip
Strides = strides_record(*ARRAYS, "out")


class Options(NamedTuple):
    """What a prefill's kernel is compiled for: the call's options, then a `PrefillConfig` and what follows from layouts.

    Attributes:
      stores: whether the kernel leaves the new windows, in front of the slots that it reads.
      sizes, align: `slots.split_blocks`.
      levels: log2 of the tokens in a run of 16 bytes; aligned: whether runs begin and end on their boundaries.
      norm: an `arithmetic.Norm`, or None.
      gate: of `arithmetic.load_input`; the residual is then a factor.
    """

    width: Any
    silu: Any
    layout: Any
    stores: Any
    sizes: Any
    align: Any
    word_bits: Any
    flat: Any
    walk: Any
    folded: Any
    block_t: Any
    block_d: Any
    group: Any
    stages: Any
    search: Any
    levels: Any
    aligned: Any
    ptx: Any
    hip: Any
    norm: Any = None
    gate: Any = None
    overlap: Any = None


@triton.jit
def input_at(x, row, position, channels, dtype: tl.constexpr, o: tl.constexpr):
    """The input at a position of a row; before the row's start the entry of its slot, or zero without a state."""
    in_row = position >= row.start
    past = row.past
    if past is not None:
        i = position - row.start + o.width - 1
        if x.ptr.dtype == past.ptr.dtype and not o.hip and o.gate is None:
            # one load from either place, so that nothing waits to choose (AMD's buffer loads know no chosen pointer)
            source = tl.where(in_row, x.ptr + position * x.t, column_start(past, i, o))
            step = tl.where(in_row, x.d, past.d)
            wanted = channels.exist & holds(in_row | row.has_state)
            value = tl.load(source + channels.index * step, mask=wanted, other=0.0)
        else:
            new = load_input(at(x, position, channels), channels.exist & holds(in_row), o)
            wanted = channels.exist & holds(row.has_state) & holds(position < row.start)
            old = tl.load(column(past, i, channels, o), mask=wanted, other=0.0)
            value = tl.where(in_row, recast(new, dtype), recast(old, dtype))
    else:
        value = load_input(at(x, position, channels), channels.exist & holds(in_row), o)
    return recast(value, dtype)


@triton.jit
def _group(source, added, target, steps, window, weights, exist, left, mark, o: tl.constexpr):
    """Outputs of the first min(group, left) tokens behind `window`; returns the window behind `group` tokens.

    `steps` are the token strides of the three pointers, `mark` the `rows.load_mark` of the first token or None.
    """
    rows = ()
    for i in tl.static_range(o.group):  # all are asked for before the first is used
        rows = rows + (load_input(source, exist & holds(i < left), o),)
        source += steps[0]  # carried along, which needs fewer registers than a product a row
    residuals = ()
    if added is not None:
        for i in tl.static_range(o.group):
            residuals = residuals + (tl.load(added, mask=exist & holds(i < left), other=0.0),)
            added += steps[1]
    taps, start = load_taps(weights, o)
    for i in tl.static_range(o.group):
        if mark is not None:
            window = begun(window, o.width - 1, mark, 8 + i)
        e = window + (recast(rows[i], window[0].dtype if o.width > 1 else rows[i].dtype),)
        value = activate(convolve(e, taps, start, o.width), o)
        if added is not None:
            value = join_residual(value, residuals[i], o)
        value = finish(value, target.dtype.element_ty, o)
        tl.store(target, round_to(value, target.dtype.element_ty), mask=exist & holds(i < left))
        target += steps[2]
        window = e[1:]
    return window


@triton.jit
def _walk_block(x, residual, out, row, first, last, channels, weights, o: tl.constexpr):
    """Tokens [first, last) of a row, one vector of channels a token, `group` loads issued before the first use."""
    # inputs are carried as they were loaded, so that the wait for them comes with their first use
    raw: tl.constexpr = row.past is None or x.ptr.dtype == row.past.ptr.dtype
    carried: tl.constexpr = x.ptr.dtype.element_ty if raw else tl.float32

    # window: the width-1 inputs before `first`
    mark = None
    if row.marks is not None:
        mark = load_mark(row.marks, first - row.start)
    window = ()
    for j in tl.static_range(o.width - 1):
        if mark is not None:
            window = begun(window, j, mark, 8 + j - (o.width - 1))
        window = window + (input_at(x, row, first + (j - o.width + 1), channels, carried, o),)

    # taps, store
    source, target = at(x, first, channels), at(out, first, channels)
    added = None
    steps = (x.t, 0, out.t)
    if residual is not None:
        added = at(residual, first, channels)
        steps = (x.t, residual.t, out.t)
    if o.group == o.block_t:
        _group(source, added, target, steps, window, weights, channels.exist, last - first, mark, o)
    else:
        for t in tl.range(first, last, o.group, num_stages=o.stages):
            if row.marks is not None:
                mark = load_mark(row.marks, t - row.start)
            window = _group(source, added, target, steps, window, weights, channels.exist, last - t, mark, o)
            source += o.group * x.t
            if added is not None:
                added += o.group * residual.t
            target += o.group * out.t


@triton.jit
def _tile_block(x, residual, out, row, first, last, channels, weights, o: tl.constexpr):
    """Tokens [first, last) of a row whose x has unit token stride: runs of 16 bytes of a channel, one or a few a thread.

    `first` is a multiple of a run's tokens, so that the run which holds the row's first token may begin before the
    row. Aligned: so is everything else about x, and runs are read whole.
    """
    run: tl.constexpr = 1 << o.levels
    halo_levels: tl.constexpr = 0 if o.width < 3 else 1 if o.width == 3 else 2 if o.width < 6 else 3
    taps, start = load_taps(weights, o)
    # axes: runs, channels, tokens of a run; lanes lie along the first, so that a warp reads one stretch of memory
    ch = channels.index
    exist = channels.exist
    lane = (first >> o.levels) + tl.arange(0, o.block_t // run)
    t = (lane << o.levels).to(tl.int64)[:, None]
    i = tl.arange(0, run)[None, None, :]
    in_row = exist[None, :, None] & (t[:, :, None] + i >= row.start) & (t[:, :, None] + i < last)
    source = (x.ptr + t * x.t + ch[None, :] * x.d)[:, :, None]

    # window: the width-1 inputs before each run, then the run
    inputs = ()
    if o.width > 1:
        h = tl.arange(0, 1 << halo_levels)[None, None, :] - (1 << halo_levels)
        wanted = exist[None, :, None] & (t < last)[:, :, None]
        if o.aligned and halo_levels <= o.levels:
            wanted = wanted & (t > row.start)[:, :, None] & (t >= run)[:, :, None]
        else:  # (one token after the other where the window is longer than a run)
            wanted = wanted & (t[:, :, None] + h >= row.start)
        halo = split_columns(load_input(source + h * x.t, wanted, o), halo_levels)
        for j in tl.static_range((1 << halo_levels) - (o.width - 1), 1 << halo_levels):
            inputs = inputs + (widen(halo[j]),)
    wanted = in_row
    if o.aligned:
        wanted = exist[None, :, None] & (t < last)[:, :, None]
    columns = split_columns(load_input(source + i * x.t, wanted, o), o.levels)
    for k in tl.static_range(run):
        inputs = inputs + (widen(columns[k]),)
    if first <= row.start:  # what lies before the row are the entries of its slot, or zeros
        held = ()
        for k in tl.static_range(o.width - 1 + run):
            held = held + (tl.where(t + (k - o.width + 1) >= row.start, inputs[k], 0.0),)
        if row.past is not None:
            for c in tl.static_range(o.width - 1):
                place = column(row.past, c, channels, o)
                entry = widen(tl.load(place, mask=exist & holds(row.has_state), other=0.0))[None, :]
                filled = ()
                for k in tl.static_range(o.width - 1 + run):
                    filled = filled + (tl.where(t + (k - c) == row.start, entry, held[k]),)
                held = filled
        inputs = held

    # taps, store
    if residual is not None:
        added = (residual.ptr + t * residual.t + ch[None, :] * residual.d)[:, :, None] + i * residual.t
        residuals = split_columns(tl.load(added, mask=in_row, other=0.0), o.levels)
    columns = ()
    for k in tl.static_range(run):
        acc = start[None, :]
        for j in tl.static_range(o.width):
            acc = tl.fma(inputs[k + j], taps[j][None, :], acc)
        value = activate(acc, o)
        if residual is not None:
            value = join_residual(value, residuals[k], o)
        columns = columns + (round_to(value, out.ptr.dtype.element_ty),)
    tile = join_columns(columns, o.levels)
    target = (out.ptr + t * out.t + ch[None, :] * out.d)[:, :, None] + i * out.t
    if o.aligned:
        whole = ((t >= row.start) & (t + run <= last))[:, :, None]
        tl.store(target, tile, mask=exist[None, :, None] & whole)
        if (first < row.start) | (last % run > 0):
            tl.store(target, tile, mask=in_row & (whole == 0))
    else:
        tl.store(target, tile, mask=in_row)


@triton.jit
def _leave_window(entries, slot, channels, o: tl.constexpr):
    tl.debug_barrier()  # all reads of the slot precede all writes, whichever thread holds which channel
    store_window(slot, entries, channels, o.width - 1)


@triton.jit
def _token(x, residual, out, row, channels, weights, o: tl.constexpr):
    """A row of one token, a decode step among prefills: its window stays in registers between slot and slot."""
    # window
    new = load_input(at(x, row.start, channels), channels.exist, o)
    entries = ()
    for j in tl.static_range(o.width - 1):
        entry = tl.zeros_like(new)
        if row.past is not None:
            place = column(row.past, j, channels, o)
            entry = tl.load(place, mask=channels.exist & holds(row.has_state), other=0.0)
        entries = entries + (entry,)
    entries = entries + (new,)
    if residual is not None:
        added = tl.load(at(residual, row.start, channels), mask=channels.exist, other=0.0)

    # taps, store
    taps, start = load_taps(weights, o)
    value = activate(convolve(entries, taps, start, o.width), o)
    if residual is not None:
        value = join_residual(value, added, o)
    value = round_to(finish(value, out.ptr.dtype.element_ty, o), out.ptr.dtype.element_ty)
    tl.store(at(out, row.start, channels), value, mask=channels.exist)

    # state
    if o.stores and o.width > 1:
        _leave_window(entries[1:], row.slot, channels, o)


@triton.jit
def inputs_before(x, row, t, count: tl.constexpr, channels, dtype: tl.constexpr, o: tl.constexpr):
    """The last `count` inputs before token t of a row; before its end they are its new window."""
    entries = ()
    for c in tl.static_range(count):
        entries = entries + (input_at(x, row, t + (c - count), channels, dtype, o),)
    return entries


@triton.jit
def _new_window(x, row, channels, o: tl.constexpr):
    """The window behind a row's last token."""
    return inputs_before(x, row, row.end, o.width - 1, channels, row.slot.ptr.dtype.element_ty, o)


@triton.jit
def block_of_row(x, residual, out, row, first, channels, weights, o: tl.constexpr):
    """The block of a row that begins at token `first`: outputs, and where it is the first, the new window."""
    last = first + tl.minimum(row.end - first, o.block_t)
    if row.live:
        if o.walk and (row.end - row.start == 1):
            _token(x, residual, out, row, channels, weights, o)
        else:
            leaves = first <= row.start
            entries = ()
            early: tl.constexpr = o.walk and o.stores and not o.flat and o.block_t <= 8  # one wait less
            if early:
                some = Channels(channels.index, channels.exist & holds(leaves))
                entries = _new_window(x, row, some, o)
            if o.walk:
                _walk_block(x, residual, out, row, first, last, channels, weights, o)
            else:
                _tile_block(x, residual, out, row, first, last, channels, weights, o)
            if o.stores and o.width > 1:
                if leaves:
                    if early:
                        _leave_window(entries, row.slot, channels, o)
                    else:
                        _leave_window(_new_window(x, row, channels, o), row.slot, channels, o)
    else:
        zero_tail(out, tl.maximum(first, row.start), last, 1, channels)


@triton.jit
def row_of_program(rows, place, o: tl.constexpr):
    """The row that a program works on, its facts, and the first of its blocks that the program has."""
    if o.flat:
        row, start, end, slot, flag = find_row(rows, place, o.block_t, o.search)
        block = place - start // o.block_t - row
    else:
        row = place
        start, end, slot, flag = row_facts(rows, row)
        block = tl.program_id(2)
    return row, start, end, slot, flag, block


@triton.jit
def slot_in_layout(conv_states, slot, strides, cache_seqlens, row, in_rows, state_len, o: tl.constexpr):
    """`Slot` number `slot` as a prefill reads it; `first` is 0 but in a ring."""
    held = slot_of(conv_states, slot, strides, 0, 0)
    if o.layout == "back":
        held = Slot(held.ptr + (state_len - (o.width - 1)) * held.l, held.l, held.d, 0, 0)
    elif o.layout == "ring":
        first = first_column(cache_seqlens, None, row, in_rows, state_len, o)
        held = Slot(held.ptr, held.l, held.d, first, state_len)
    return held


@triton.jit(do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "channel_blocks"])
def _prefill_kernel(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, residual, out,
    document_marks, strides, tokens, dim, batch, num_slots, state_len, pad_slot_id, channel_blocks, o: tl.constexpr,
):  # fmt: skip
    x, out = tokens_of(x, strides.x), tokens_of(out, strides.out)
    if residual is not None:
        residual = tokens_of(residual, strides.residual)
    slots = Items(cache_indices, strides.cache_indices)
    flags = Items(has_initial_state, strides.has_initial_state)
    rows = Rows(query_start_loc, slots, flags, batch, tokens)

    # mapping of programs; the taps are under way while the row is looked for
    block_d, place = channel_block_and_place(channel_blocks, o.folded)
    channels, out = part_of_out(block_d, out, dim, tokens, o)
    wait_for_inputs(o)
    weights = load_weights(weight, bias, strides, channels, o)
    row, start, end, slot, flag, block = row_of_program(rows, place, o)
    base = start if o.walk else start - start % (1 << o.levels)
    last_block = (end - base - 1) // o.block_t
    if (block < 0) | (end <= start) | (block > last_block):
        return
    live = row < batch
    held = None
    if conv_states is not None:
        slot = slot.to(tl.int64)
        live = live & is_slot(slot, num_slots, pad_slot_id)
        seqlens = Items(cache_seqlens, strides.cache_seqlens)
        held = slot_in_layout(conv_states, slot, strides.conv_states, seqlens, row, row < batch, state_len, o)
    past = None
    if has_initial_state is not None:
        past = held
    marks = None
    if document_marks is not None:
        marks = document_marks + row.to(tl.int64) * (((end - start) >> 3) + 2)
    this = Row(start, end, live, flag != 0, held, past, marks)

    if o.flat:
        block_of_row(x, residual, out, this, base + block * o.block_t, channels, weights, o)
    else:
        for k in range(block, last_block + 1, tl.num_programs(2)):
            block_of_row(x, residual, out, this, base + k * o.block_t, channels, weights, o)


def prepare(call, sizes, config, stores, gate=None, documents=False):
    """Prepares the kernel for a checked `FnCall` of such shapes, strides and dtypes.

    Args:
      sizes: `call.check()`.
      config: a PrefillConfig.
      stores: whether the kernel leaves the new windows, in front of the slots that it reads.
      gate: how many elements from x a gate lies that x is multiplied by, or None; the residual is then a factor.
      documents: whether rows, of equal lengths that are walked, hold several; then no state of a document is left.

    Returns:
      A Launch of ARRAYS, out and, with documents, their `packed_rows.document_marks`; with `split_sizes` the parts follow each other in a flat `out`.
    """
    x, pooled = call.x, call.conv_states is not None
    layout = call.state_layout if pooled else "front"
    blocks, parts, align = split_blocks(sizes.dim, call.split_sizes, config.block_d)
    grid, folded = _grid(sizes, blocks, config)
    options = Options(
        width=sizes.width,
        silu=call.activation is not None,
        layout=layout,
        stores=stores and pooled,
        sizes=parts,
        align=align,
        word_bits=word_bits(call.weight),
        flat=config.flat,
        walk=config.walk,
        folded=folded,
        block_t=config.block_t,
        block_d=config.block_d,
        group=config.group,
        stages=config.stages,
        search=config.search,
        levels=0 if config.walk else levels(x),
        aligned=not config.walk and aligned(x),
        ptx=native_ptx(),
        overlap=overlaps(call.x.device),
        hip=torch.version.hip is not None,
        gate=gate,
    )
    values = (
        *(() if documents else (None,)),
        Strides(*strides_of(call, ARRAYS), out=(0, 1) if parts else like_result(call).stride()),
        sizes.tokens,
        sizes.dim,
        sizes.batch,
        sizes.num_slots,
        None if layout == "front" else sizes.state_len,
        known_pad(call.pad_slot_id, sizes.num_slots),
        blocks if folded else None,
        constants(options),
    )
    return Launch(_prefill_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)


def levels(x):
    """log2 of the elements of x in 16 bytes."""
    return (16 // x.element_size()).bit_length() - 1


def aligned(x):
    """Whether runs of 16 bytes along the tokens of x neither cross its end nor begin off their alignment."""
    run = 1 << levels(x)
    return x.shape[0] % run == 0 and x.stride(1) % run == 0


def _grid(sizes, channel_blocks, config):
    if config.flat:
        return program_grid(channel_blocks, sizes.tokens // config.block_t + sizes.batch + 1)
    return program_grid(channel_blocks, sizes.batch + 1, min(max(config.row_blocks, 1), MAX_GRID_YZ))
