"""Packed prefill: every row's tokens convolved behind its window, the new window left in its slot.

A program owns BLOCK_T tokens of one row and BLOCK_D channels. Schedule "per_sequence": behind the blocks of channels,
which come first in the grid so that programs side by side read side by side, the next axis is the row and the last
one the block of tokens in it; programs past the end of their row return at once, and stride on if the grid is too
small. Schedule "flat": the axis of rows has instead block k of row s as number `query_start_loc[s] // BLOCK_T + s + k`,
so a program finds its row by a search on the device and the grid needs no lengths. Row `batch` stands for the
padded tail.

The program of a row's first block reads the old window and writes the new one; the others take the
`width-1` tokens before their block from x. A row of one token, a decode step among prefills, has a shorter way.
Nothing is planned on the host and nothing synchronises.
"""

import torch
import triton
import triton.language as tl

from triton_impl.config import MAX_GRID_YZ
from triton_impl.launch import Launch, known_pad, program_grid, stride
from triton_impl.slots import add_residual, find_window, output_channels, split_blocks
from triton_impl.taps import (
    NATIVE_PTX,
    activate,
    channel_block_and_place,
    convolve,
    join_columns,
    load_bias_word,
    load_words,
    narrow,
    offset,
    recast,
    split_columns,
    unpack_taps,
    widen,
    word_bits,
)


@triton.jit
def _row_facts(
    query_start_loc, cache_indices, has_initial_state, row, batch, tokens, stride_c, stride_h,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Start, end, slot and flag of rows, all asked for before any is used: one wait."""
    slot = row
    flag = tl.zeros_like(row)
    start = offset(query_start_loc, row, batch, tokens)
    end = offset(query_start_loc, row + 1, batch, tokens)
    if HAS_INDICES:
        slot = tl.load(cache_indices + row.to(tl.int64) * stride_c, mask=row < batch, other=0)
    if HAS_MASK:
        flag = tl.load(has_initial_state + row.to(tl.int64) * stride_h, mask=row < batch, other=0).to(
            tl.int32
        )
    return start, end, slot, flag


@triton.jit
def _find_row(
    query_start_loc, cache_indices, has_initial_state, block, batch, tokens, stride_c, stride_h,
    BLOCK_T: tl.constexpr, SEARCH: tl.constexpr, HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The last row in [0, batch] whose first block is at most `block`, with its facts; SEARCH candidates at a time.

    The last step of the search loads the facts of all candidates, which saves a wait for those of the row found.
    """
    row = 0
    size = batch + 1
    lane = tl.arange(0, SEARCH)
    while size > SEARCH:
        step = (size + SEARCH - 1) // SEARCH
        candidate = row + lane * step
        start = offset(query_start_loc, candidate, batch, tokens)
        passed = (lane * step < size) & (start // BLOCK_T + candidate <= block)
        ahead = tl.maximum(tl.sum(passed.to(tl.int32), axis=0) - 1, 0) * step
        row += ahead
        size = tl.minimum(step, size - ahead)
    candidate = row + lane
    start, end, slot, flag = _row_facts(
        query_start_loc, cache_indices, has_initial_state, candidate, batch, tokens, stride_c, stride_h,
        HAS_INDICES, HAS_MASK,
    )  # fmt: skip
    passed = (lane < size) & (start // BLOCK_T + candidate <= block)
    ahead = tl.maximum(tl.sum(passed.to(tl.int32), axis=0) - 1, 0)
    found = lane == ahead
    start = tl.sum(tl.where(found, start, 0), axis=0)
    end = tl.sum(tl.where(found, end, 0), axis=0)
    if HAS_INDICES:
        slot = tl.sum(tl.where(found, slot, 0), axis=0)
    else:
        slot = row + ahead
    if HAS_MASK:
        flag = tl.sum(tl.where(found, flag, 0), axis=0)
    else:
        flag = 0
    return row + ahead, start, end, slot, flag


@triton.jit
def _column(ring, i):
    """Column of the window's entry i, given (column of entry 0, state_len) of a ring, or None."""
    if ring is not None:
        i = (ring[0] + i) % ring[1]
    return i


@triton.jit
def _entry(
    x, pool, ring, position, row_start, ch, wanted, has_state, stride_x_t, stride_x_d, stride_s_l, stride_s_d,
    WIDTH: tl.constexpr, HAS_POOL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The input at a position of a row; before the row's start the entry of its slot, or zero without a state."""
    in_row = position >= row_start
    source = x + position * stride_x_t
    if HAS_POOL:
        slot_source = pool + _column(ring, position - row_start + WIDTH - 1) * stride_s_l
        if x.dtype == pool.dtype:  # one load from either place, so that nothing waits to choose
            source = tl.where(in_row, source, slot_source)
            step = tl.where(in_row, stride_x_d, stride_s_d)
            value = tl.load(source + ch * step, mask=wanted & (in_row | has_state), other=0.0)
        else:
            new = tl.load(source + ch * stride_x_d, mask=wanted & in_row, other=0.0)
            old = tl.load(
                slot_source + ch * stride_s_d, mask=wanted & has_state & (position < row_start), other=0.0
            )
            value = tl.where(in_row, recast(new, DTYPE), recast(old, DTYPE))
    else:
        value = tl.load(source + ch * stride_x_d, mask=wanted & in_row, other=0.0)
    return recast(value, DTYPE)


@triton.jit
def _group(
    source, added, target, window, words, bias_word, in_dim, left, stride_x_t, stride_r_t, stride_o_t,
    weight_dtype: tl.constexpr, carried: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, PTX: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Outputs of the first min(GROUP, left) tokens behind `window`; returns the window behind GROUP tokens."""
    rows = ()
    for i in tl.static_range(GROUP):  # all are asked for before the first is used
        rows = rows + (tl.load(source, mask=in_dim & (i < left), other=0.0),)
        source += stride_x_t  # carried along, which needs fewer registers than a product a row
    residuals = ()
    if added is not None:
        for i in tl.static_range(GROUP):
            residuals = residuals + (tl.load(added, mask=in_dim & (i < left), other=0.0),)
            added += stride_r_t
    taps = unpack_taps(words, WIDTH, weight_dtype)
    start = widen(bias_word)
    for i in tl.static_range(GROUP):
        e = window + (recast(rows[i], carried),)
        value = activate(convolve(e, taps, start, WIDTH), SILU, PTX)
        if added is not None:
            value = add_residual(value, widen(residuals[i]), PTX)
        tl.store(target, narrow(value, target.dtype.element_ty), mask=in_dim & (i < left))
        target += stride_o_t
        window = e[1:]
    return window


@triton.jit
def _walk_block(
    x, residual, out, pool, ring, words, bias_word, row_start, first, last, ch, in_dim, has_state, stride_x_t, stride_x_d,
    stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d, weight_dtype: tl.constexpr,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_POOL: tl.constexpr, PTX: tl.constexpr,
    BLOCK_T: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row, one vector of channels a token, GROUP loads issued before the first use."""
    # inputs are carried as they were loaded, so that the wait for them comes with their first use
    raw: tl.constexpr = not HAS_POOL or x.dtype == pool.dtype
    carried: tl.constexpr = x.dtype.element_ty if raw else tl.float32

    # window: the width-1 inputs before `first`
    window = ()
    for j in tl.static_range(WIDTH - 1):
        before = _entry(
            x, pool, ring, first + (j - WIDTH + 1), row_start, ch, in_dim, has_state,
            stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH, HAS_POOL, carried,
        )  # fmt: skip
        window = window + (before,)

    # taps, store
    source = x + first * stride_x_t + ch * stride_x_d
    target = out + first * stride_o_t + ch * stride_o_d
    added = None
    if residual is not None:
        added = residual + first * stride_r_t + ch * stride_r_d
    if GROUP == BLOCK_T:
        _group(
            source, added, target, window, words, bias_word, in_dim, last - first, stride_x_t, stride_r_t, stride_o_t,
            weight_dtype, carried, WIDTH, SILU, PTX, GROUP,
        )  # fmt: skip
    else:
        for t in tl.range(first, last, GROUP, num_stages=STAGES):
            window = _group(
                source, added, target, window, words, bias_word, in_dim, last - t, stride_x_t, stride_r_t, stride_o_t,
                weight_dtype, carried, WIDTH, SILU, PTX, GROUP,
            )  # fmt: skip
            source += GROUP * stride_x_t
            if added is not None:
                added += GROUP * stride_r_t
            target += GROUP * stride_o_t


@triton.jit
def _tile_block(
    x, residual, out, pool, ring, words, bias_word, row_start, first, last, ch, in_dim, has_state, stride_x_t, stride_x_d,
    stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d, weight_dtype: tl.constexpr,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_POOL: tl.constexpr, PTX: tl.constexpr,
    BLOCK_T: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row whose x has unit token stride: runs of 16 bytes of a channel, one or a few a thread.

    `first` is a multiple of a run's tokens, so that the run which holds the row's first token may begin before the
    row. ALIGNED: so is everything else about x, and runs are read whole.
    """
    RUN: tl.constexpr = 1 << LEVELS
    HALO_LEVELS: tl.constexpr = 0 if WIDTH < 3 else 1 if WIDTH == 3 else 2 if WIDTH < 6 else 3
    taps = unpack_taps(words, WIDTH, weight_dtype)
    # axes: runs, channels, tokens of a run; lanes lie along the first, so that a warp reads one stretch of memory
    run = (first >> LEVELS) + tl.arange(0, BLOCK_T // RUN)
    t = (run << LEVELS).to(tl.int64)[:, None]
    i = tl.arange(0, RUN)[None, None, :]
    in_row = in_dim[None, :, None] & (t[:, :, None] + i >= row_start) & (t[:, :, None] + i < last)
    source = (x + t * stride_x_t + ch[None, :] * stride_x_d)[:, :, None]

    # window: the width-1 inputs before each run, then the run
    inputs = ()
    if WIDTH > 1:
        h = tl.arange(0, 1 << HALO_LEVELS)[None, None, :] - (1 << HALO_LEVELS)
        wanted = in_dim[None, :, None] & (t < last)[:, :, None]
        if ALIGNED and HALO_LEVELS <= LEVELS:
            wanted = wanted & (t > row_start)[:, :, None] & (t >= RUN)[:, :, None]
        else:  # (one token after the other where the window is longer than a run)
            wanted = wanted & (t[:, :, None] + h >= row_start)
        halo = split_columns(tl.load(source + h * stride_x_t, mask=wanted, other=0.0), HALO_LEVELS)
        for j in tl.static_range((1 << HALO_LEVELS) - (WIDTH - 1), 1 << HALO_LEVELS):
            inputs = inputs + (widen(halo[j]),)
    wanted = in_row
    if ALIGNED:
        wanted = in_dim[None, :, None] & (t < last)[:, :, None]
    columns = split_columns(tl.load(source + i * stride_x_t, mask=wanted, other=0.0), LEVELS)
    for k in tl.static_range(RUN):
        inputs = inputs + (widen(columns[k]),)
    if first <= row_start:  # what lies before the row are the entries of its slot, or zeros
        held = ()
        for k in tl.static_range(WIDTH - 1 + RUN):
            held = held + (tl.where(t + (k - WIDTH + 1) >= row_start, inputs[k], 0.0),)
        if HAS_POOL:
            for c in tl.static_range(WIDTH - 1):
                place = pool + _column(ring, c) * stride_s_l + ch * stride_s_d
                entry = widen(tl.load(place, mask=in_dim & has_state, other=0.0))[None, :]
                filled = ()
                for k in tl.static_range(WIDTH - 1 + RUN):
                    filled = filled + (tl.where(t + (k - c) == row_start, entry, held[k]),)
                held = filled
        inputs = held

    # taps, store
    if residual is not None:
        added = (residual + t * stride_r_t + ch[None, :] * stride_r_d)[:, :, None] + i * stride_r_t
        residuals = split_columns(tl.load(added, mask=in_row, other=0.0), LEVELS)
    columns = ()
    for k in tl.static_range(RUN):
        acc = widen(bias_word)[None, :]
        for j in tl.static_range(WIDTH):
            acc = tl.fma(inputs[k + j], taps[j][None, :], acc)
        value = activate(acc, SILU, PTX)
        if residual is not None:
            value = add_residual(value, widen(residuals[k]), PTX)
        columns = columns + (narrow(value, out.dtype.element_ty),)
    tile = join_columns(columns, LEVELS)
    target = (out + t * stride_o_t + ch[None, :] * stride_o_d)[:, :, None] + i * stride_o_t
    if ALIGNED:
        whole = ((t >= row_start) & (t + RUN <= last))[:, :, None]
        tl.store(target, tile, mask=in_dim[None, :, None] & whole)
        if (first < row_start) | (last % RUN > 0):
            tl.store(target, tile, mask=in_row & (whole == 0))
    else:
        tl.store(target, tile, mask=in_row)


@triton.jit
def _store_entries(entries, pool, ch, in_dim, stride_s_l, stride_s_d, WIDTH: tl.constexpr):
    tl.debug_barrier()  # all reads of the slot precede all writes, whichever thread holds which channel
    for c in tl.static_range(WIDTH - 1):
        entry = recast(entries[c], pool.dtype.element_ty)
        tl.store(pool + c * stride_s_l + ch * stride_s_d, entry, mask=in_dim)


@triton.jit
def _token(
    x, residual, out, pool, ring, words, bias_word, position, ch, in_dim, has_state, stride_x_t, stride_x_d,
    stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d, weight_dtype: tl.constexpr,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_POOL: tl.constexpr, STORES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A row of one token, a decode step among prefills: its window stays in registers between slot and slot."""
    # window
    new = tl.load(x + position * stride_x_t + ch * stride_x_d, mask=in_dim, other=0.0)
    window = ()
    for j in tl.static_range(WIDTH - 1):
        entry = tl.zeros_like(new)
        if HAS_POOL:
            place = pool + _column(ring, j) * stride_s_l + ch * stride_s_d
            entry = tl.load(place, mask=in_dim & has_state, other=0.0)
        window = window + (entry,)
    window = window + (new,)
    if residual is not None:
        added = tl.load(residual + position * stride_r_t + ch * stride_r_d, mask=in_dim, other=0.0)

    # taps, store
    taps = unpack_taps(words, WIDTH, weight_dtype)
    value = activate(convolve(window, taps, widen(bias_word), WIDTH), SILU, PTX)
    if residual is not None:
        value = add_residual(value, widen(added), PTX)
    tl.store(out + position * stride_o_t + ch * stride_o_d, narrow(value, out.dtype.element_ty), mask=in_dim)

    # state
    if STORES and WIDTH > 1:
        _store_entries(window[1:], pool, ch, in_dim, stride_s_l, stride_s_d, WIDTH)


@triton.jit
def _store_window(
    x, pool, row_start, row_end, ch, in_dim, has_state, stride_x_t, stride_x_d, stride_s_l, stride_s_d,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Leaves the last width-1 entries of old window ++ x in the slot."""
    entries = ()
    for c in tl.static_range(WIDTH - 1):
        entry = _entry(
            x, pool, None, row_end + (c - WIDTH + 1), row_start, ch, in_dim, has_state,
            stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH, True, pool.dtype.element_ty,
        )  # fmt: skip
        entries = entries + (entry,)
    _store_entries(entries, pool, ch, in_dim, stride_s_l, stride_s_d, WIDTH)


@triton.jit
def _block(
    x, residual, out, pool, ring, words, bias_word, row_start, row_end, first, live, ch, in_dim, has_state,
    stride_x_t, stride_x_d, stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
    weight_dtype: tl.constexpr, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_POOL: tl.constexpr,
    HAS_MASK: tl.constexpr, STORES: tl.constexpr, PTX: tl.constexpr,
    WALK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    LEVELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The block of a row that begins at token `first`: outputs, and with STORES the new window if it is the first."""
    last = first + tl.minimum(row_end - first, BLOCK_T)
    if live:
        if WALK and (row_end - row_start == 1):
            _token(
                x, residual, out, pool, ring, words, bias_word, row_start, ch, in_dim, has_state, stride_x_t, stride_x_d,
                stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d, weight_dtype,
                WIDTH, SILU, HAS_POOL and HAS_MASK, STORES, PTX,
            )  # fmt: skip
        else:
            if WALK:
                _walk_block(
                    x, residual, out, pool, ring, words, bias_word, row_start, first, last, ch, in_dim, has_state, stride_x_t,
                    stride_x_d, stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d, weight_dtype,
                    WIDTH, SILU, HAS_POOL and HAS_MASK, PTX, BLOCK_T, GROUP, STAGES,
                )  # fmt: skip
            else:
                _tile_block(
                    x, residual, out, pool, ring, words, bias_word, row_start, first, last, ch, in_dim, has_state, stride_x_t,
                    stride_x_d, stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d, weight_dtype,
                    WIDTH, SILU, HAS_POOL and HAS_MASK, PTX, BLOCK_T, LEVELS, ALIGNED,
                )  # fmt: skip
            if STORES and WIDTH > 1:
                if first <= row_start:
                    _store_window(
                        x, pool, row_start, row_end, ch, in_dim, has_state,
                        stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH,
                    )  # fmt: skip
    else:
        zero = tl.zeros([BLOCK_D], out.dtype.element_ty)
        for t in range(tl.maximum(first, row_start), last):
            tl.store(out + t * stride_o_t + ch * stride_o_d, zero, mask=in_dim)


@triton.jit
def _prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, residual, out,
    tokens, dim, batch, num_slots, state_len, pad_slot_id, channel_blocks,
    stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d,
    stride_c, stride_h, stride_q, stride_r_t, stride_r_d, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr, FLAT: tl.constexpr, WALK: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    SEARCH: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr, LAYOUT: tl.constexpr, STORES: tl.constexpr, SIZES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_r_t = tl.cast(stride_r_t, tl.int64)
    stride_r_d = tl.cast(stride_r_d, tl.int64)
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = tl.cast(stride_o_d, tl.int64)

    # mapping of programs; the taps are under way while the row is looked for
    block_d, place = channel_block_and_place(channel_blocks, FOLDED)
    ch, in_dim, out, stride_o_t, stride_o_d = output_channels(
        block_d, dim, tokens, out, stride_o_t, stride_o_d, SIZES, ALIGN, BLOCK_D
    )
    words = load_words(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
    bias_word = load_bias_word(bias, ch, in_dim, stride_b, HAS_BIAS)
    if FLAT:
        row, row_start, row_end, slot, flag = _find_row(
            query_start_loc, cache_indices, has_initial_state, place, batch, tokens, stride_c, stride_h,
            BLOCK_T, SEARCH, HAS_INDICES, HAS_MASK,
        )  # fmt: skip
        block = place - row_start // BLOCK_T - row
    else:
        row = place
        row_start, row_end, slot, flag = _row_facts(
            query_start_loc, cache_indices, has_initial_state, row, batch, tokens, stride_c, stride_h,
            HAS_INDICES, HAS_MASK,
        )  # fmt: skip
        block = tl.program_id(2)
    base = row_start if WALK else row_start - row_start % (1 << LEVELS)
    last_block = (row_end - base - 1) // BLOCK_T
    if (block < 0) | (row_end <= row_start) | (block > last_block):
        return
    slot = slot.to(tl.int64)
    live = row < batch
    if HAS_POOL:
        live = live & (slot != pad_slot_id) & (slot >= 0) & (slot < num_slots)
    has_state = flag != 0
    pool = conv_states + slot * stride_s_n if HAS_POOL else conv_states
    ring = None
    if LAYOUT == "back":
        pool += (state_len - (WIDTH - 1)) * stride_s_l
    elif LAYOUT == "ring":
        ring = (
            find_window(cache_seqlens, None, row, row < batch, stride_q, 0, state_len, WIDTH, LAYOUT),
            state_len,
        )

    if FLAT:
        _block(
            x, residual, out, pool, ring, words, bias_word, row_start, row_end, base + block * BLOCK_T, live, ch, in_dim,
            has_state, stride_x_t, stride_x_d, stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
            weight.dtype.element_ty, WIDTH, SILU, HAS_POOL, HAS_MASK, STORES, PTX, WALK, BLOCK_T, BLOCK_D, GROUP, STAGES,
            LEVELS, ALIGNED,
        )  # fmt: skip
    else:
        for k in range(block, last_block + 1, tl.num_programs(2)):
            _block(
                x, residual, out, pool, ring, words, bias_word, row_start, row_end, base + k * BLOCK_T, live, ch, in_dim,
                has_state, stride_x_t, stride_x_d, stride_r_t, stride_r_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
                weight.dtype.element_ty, WIDTH, SILU, HAS_POOL, HAS_MASK, STORES, PTX, WALK, BLOCK_T, BLOCK_D, GROUP, STAGES,
                LEVELS, ALIGNED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "batch", "num_slots", "pad_slot_id"])
def _prefill_kernel(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, out,
    tokens, dim, batch, num_slots, pad_slot_id,
    stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d,
    stride_c, stride_h, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr, FLAT: tl.constexpr, WALK: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    SEARCH: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    _prefill(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, None, None, out,
        tokens, dim, batch, num_slots, 0, pad_slot_id, tl.cdiv(dim, BLOCK_D),
        stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d,
        stride_c, stride_h, 0, 0, 0, stride_o_t, stride_o_d,
        WIDTH, SILU, HAS_BIAS, HAS_POOL, HAS_INDICES, HAS_MASK, FLAT, WALK, PTX, WORD_BITS,
        BLOCK_T, BLOCK_D, GROUP, STAGES, SEARCH, LEVELS, ALIGNED, FOLDED, "front", HAS_POOL, (), 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "channel_blocks"])
def _serving_kernel(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, residual, out,
    tokens, dim, batch, num_slots, state_len, pad_slot_id, channel_blocks,
    stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d,
    stride_c, stride_h, stride_q, stride_r_t, stride_r_d, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr, FLAT: tl.constexpr, WALK: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    SEARCH: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr, FOLDED: tl.constexpr, LAYOUT: tl.constexpr, STORES: tl.constexpr, SIZES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The same with a residual, split outputs, and windows elsewhere in their slots; STORES: leaves the new windows."""
    _prefill(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, residual, out,
        tokens, dim, batch, num_slots, state_len, pad_slot_id, channel_blocks,
        stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d,
        stride_c, stride_h, stride_q, stride_r_t, stride_r_d, stride_o_t, stride_o_d,
        WIDTH, SILU, HAS_BIAS, HAS_POOL, HAS_INDICES, HAS_MASK, FLAT, WALK, PTX, WORD_BITS,
        BLOCK_T, BLOCK_D, GROUP, STAGES, SEARCH, LEVELS, ALIGNED, FOLDED, LAYOUT, STORES, SIZES, ALIGN,
    )  # fmt: skip


def prepare(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, silu, pad_slot_id, config
):
    """Prepares the kernel for checked arguments of these shapes, strides and dtypes.

    Args:
      silu: whether to apply SiLU.
      pad_slot_id: as in the contract.
      config: a PrefillConfig.

    Returns:
      A Launch of (x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, out).
    """
    tokens, dim = x.shape
    batch = query_start_loc.shape[0] - 1
    grid, folded = _grid(tokens, batch, triton.cdiv(dim, config.block_d), config)
    num_slots = 0 if conv_states is None else conv_states.shape[0]
    strides = (
        *x.stride(), *weight.stride(), stride(bias, 0),
        stride(conv_states, 0), stride(conv_states, 1), stride(conv_states, 2),
        stride(cache_indices, 0), stride(has_initial_state, 0), *torch.empty_like(x, device="meta").stride(),
    )  # fmt: skip
    constants = _constants(
        x, weight, bias, conv_states, cache_indices, has_initial_state, silu, config, folded
    )
    return Launch(
        _prefill_kernel, grid, (tokens, dim, batch, num_slots, known_pad(pad_slot_id, num_slots), *strides), constants,
        num_warps=config.num_warps,
    )  # fmt: skip


def prepare_serving(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, residual, silu,
    pad_slot_id, config, *, layout, stores, split_sizes,
):  # fmt: skip
    """`prepare` for windows in another layout, a residual, and split outputs.

    Args:
      stores: whether the kernel leaves the new windows, in front of the slots that it reads.
      split_sizes: channels of each part, or None; the parts then follow each other in a flat `out`.

    Returns:
      A Launch of (x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens,
      residual, out).
    """
    tokens, dim = x.shape
    batch = query_start_loc.shape[0] - 1
    blocks, sizes, align = split_blocks(dim, split_sizes, config.block_d)
    num_slots, state_len = (0, 0) if conv_states is None else conv_states.shape[:2]
    strides = (
        *x.stride(), *weight.stride(), stride(bias, 0),
        stride(conv_states, 0), stride(conv_states, 1), stride(conv_states, 2),
        stride(cache_indices, 0), stride(has_initial_state, 0), stride(cache_seqlens, 0),
        stride(residual, 0), stride(residual, 1),
        *((0, 1) if sizes else torch.empty_like(x, device="meta").stride()),
    )  # fmt: skip
    values = tokens, dim, batch, num_slots, state_len, known_pad(pad_slot_id, num_slots), blocks, *strides
    grid, folded = _grid(tokens, batch, blocks, config)
    constants = _constants(
        x, weight, bias, conv_states, cache_indices, has_initial_state, silu, config, folded
    )
    pooled = conv_states is not None
    constants |= dict(
        LAYOUT=layout if pooled else "front", STORES=stores and pooled, SIZES=sizes, ALIGN=align
    )
    return Launch(_serving_kernel, grid, values, constants, num_warps=config.num_warps)


def levels(x):
    """log2 of the elements of x in 16 bytes."""
    return (16 // x.element_size()).bit_length() - 1


def aligned(x):
    """Whether runs of 16 bytes along the tokens of x neither cross its end nor begin off their alignment."""
    run = 1 << levels(x)
    return x.shape[0] % run == 0 and x.stride(1) % run == 0


def _grid(tokens, batch, channel_blocks, config):
    if config.flat:
        return program_grid(channel_blocks, tokens // config.block_t + batch + 1)
    return program_grid(channel_blocks, batch + 1, min(max(config.row_blocks, 1), MAX_GRID_YZ))


def _constants(x, weight, bias, conv_states, cache_indices, has_initial_state, silu, config, folded):
    return dict(
        WIDTH=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_POOL=conv_states is not None,
        HAS_INDICES=cache_indices is not None, HAS_MASK=has_initial_state is not None,
        FLAT=config.flat, WALK=config.walk, PTX=NATIVE_PTX, WORD_BITS=word_bits(weight),
        BLOCK_T=config.block_t, BLOCK_D=config.block_d, GROUP=config.group, STAGES=config.stages,
        SEARCH=config.search, LEVELS=0 if config.walk else levels(x), ALIGNED=not config.walk and aligned(x), FOLDED=folded,
    )  # fmt: skip
