"""Packed prefill: every row's tokens convolved behind its window, the new window left in its slot.

A program owns BLOCK_T tokens of one row and BLOCK_D channels. Schedule "per_sequence": grid axis 0 is
the row, axis 1 the block of tokens in it, axis 2 the block of channels; programs past the end of their
row return at once, and stride on if the grid is too small. Schedule "flat": block k of row s is program
`query_start_loc[s] // BLOCK_T + s + k`, so a program finds its row by a search on the device and the
grid needs no lengths. Row `batch` stands for the padded tail.

The program of a row's first block reads the old window and writes the new one; the others take the
`width-1` tokens before their block from x. Nothing is planned on the host and nothing synchronises.
"""

import torch
import triton
import triton.language as tl

from triton_impl.config import MAX_GRID_YZ
from triton_impl.launch import Launch, known_pad, stride
from triton_impl.taps import (
    NATIVE_PTX,
    activate,
    convolve,
    load_bias,
    load_taps,
    narrow,
    offset,
    recast,
    widen,
    word_bits,
)


@triton.jit
def _find_row(query_start_loc, block, batch, tokens, BLOCK_T: tl.constexpr, SEARCH: tl.constexpr):
    """The last row in [0, batch] whose first block is at most `block`, SEARCH candidates at a time."""
    row = 0
    size = batch + 1
    lane = tl.arange(0, SEARCH)
    while size > 1:
        step = (size + SEARCH - 1) // SEARCH
        candidate = row + lane * step
        inside = lane * step < size
        start = offset(query_start_loc, candidate, batch, tokens)
        passed = tl.sum((inside & (start // BLOCK_T + candidate <= block)).to(tl.int32), axis=0)
        ahead = tl.maximum(passed - 1, 0) * step
        row += ahead
        size = tl.minimum(step, size - ahead)
    return row


@triton.jit
def _walk_block(
    x, out, pool, taps, start_value, row_start, first, last, ch, in_dim, has_state,
    stride_x_t, stride_x_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_POOL: tl.constexpr, PTX: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row, one vector of channels a token, GROUP loads issued before the first use."""
    # window: the width-1 inputs before `first`
    window = ()
    for j in tl.static_range(WIDTH - 1):
        before = first + (j - WIDTH + 1)
        in_row = before >= row_start
        past = widen(tl.load(x + before * stride_x_t + ch * stride_x_d, mask=in_dim & in_row, other=0.0))
        if HAS_POOL:
            column = before - row_start + (WIDTH - 1)
            kept = tl.load(
                pool + column * stride_s_l + ch * stride_s_d,
                mask=in_dim & has_state & (before < row_start),
                other=0.0,
            )
            past = tl.where(in_row, past, widen(kept))
        window = window + (past,)

    # taps, store; addresses are carried along, which needs fewer registers than a product a row
    source = x + first * stride_x_t + ch * stride_x_d
    target = out + first * stride_o_t + ch * stride_o_d
    for t in tl.range(first, last, GROUP, num_stages=STAGES):
        rows = ()
        for i in tl.static_range(GROUP):
            rows = rows + (tl.load(source, mask=in_dim & (t + i < last), other=0.0),)
            source += stride_x_t
        for i in tl.static_range(GROUP):
            window = window + (widen(rows[i]),)
            value = activate(convolve(window, taps, start_value, WIDTH), SILU, PTX)
            tl.store(target, narrow(value, out.dtype.element_ty), mask=in_dim & (t + i < last))
            target += stride_o_t
            window = window[1:]


@triton.jit
def _tile_block(
    x, out, pool, taps, start_value, row_start, first, last, ch, in_dim, has_state,
    stride_x_t, stride_x_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_POOL: tl.constexpr, PTX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row as one tile, a shifted load for each tap: for x with unit token stride."""
    t = first + tl.arange(0, BLOCK_T)[:, None]
    ch = ch[None, :]
    here = (t < last) & in_dim[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32) + start_value[None, :]
    for j in tl.static_range(WIDTH):
        source = t + (j - WIDTH + 1)
        in_row = source >= row_start
        value = widen(tl.load(x + source * stride_x_t + ch * stride_x_d, mask=here & in_row, other=0.0))
        if HAS_POOL and j < WIDTH - 1:
            column = source - row_start + (WIDTH - 1)
            kept = tl.load(
                pool + column * stride_s_l + ch * stride_s_d,
                mask=here & has_state & (source < row_start),
                other=0.0,
            )
            value = tl.where(in_row, value, widen(kept))
        acc = tl.fma(value, taps[j][None, :], acc)
    tl.store(
        out + t * stride_o_t + ch * stride_o_d,
        narrow(activate(acc, SILU, PTX), out.dtype.element_ty),
        mask=here,
    )


@triton.jit
def _store_window(
    x, pool, row_start, row_end, ch, in_dim, has_state, stride_x_t, stride_x_d, stride_s_l, stride_s_d,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Leaves the last width-1 entries of old window ++ x in the slot."""
    entries = ()
    for c in tl.static_range(WIDTH - 1):
        source = row_end + (c - WIDTH + 1)
        in_row = source >= row_start
        new = tl.load(x + source * stride_x_t + ch * stride_x_d, mask=in_dim & in_row, other=0.0)
        column = row_end - row_start + c
        kept = tl.load(
            pool + column * stride_s_l + ch * stride_s_d,
            mask=in_dim & has_state & (source < row_start),
            other=0.0,
        )
        entries = entries + (tl.where(in_row, recast(new, pool.dtype.element_ty), kept),)
    tl.debug_barrier()  # all reads of the slot precede all writes, whichever thread holds which channel
    for c in tl.static_range(WIDTH - 1):
        tl.store(pool + c * stride_s_l + ch * stride_s_d, entries[c], mask=in_dim)


@triton.jit(do_not_specialize=["tokens", "batch", "num_slots", "pad_slot_id"])
def _prefill_kernel(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, out,
    tokens, dim, batch, num_slots, pad_slot_id,
    stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d,
    stride_c, stride_h, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr,
    HAS_INDICES: tl.constexpr, HAS_MASK: tl.constexpr, FLAT: tl.constexpr, WALK: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    SEARCH: tl.constexpr,
    STREAMS: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = tl.cast(stride_o_d, tl.int64)

    # mapping of programs
    if FLAT:
        channel_blocks = tl.cdiv(dim, BLOCK_D)
        block_d = tl.program_id(0) % channel_blocks
        turn = tl.program_id(0) // channel_blocks
        stream_blocks = tl.num_programs(0) // channel_blocks // STREAMS
        program = turn % STREAMS * stream_blocks + turn // STREAMS
        row = _find_row(query_start_loc, program, batch, tokens, BLOCK_T, SEARCH)
    else:
        row = tl.program_id(0)
        block_d = tl.program_id(2)

    # slot, flag and offsets are asked for before any is used: one wait for all
    slot = row.to(tl.int64)
    live = row < batch
    has_state = row < 0
    if HAS_POOL:
        if HAS_INDICES:
            slot = tl.load(cache_indices + row.to(tl.int64) * stride_c, mask=live, other=-1).to(tl.int64)
        live = live & (slot != pad_slot_id) & (slot >= 0) & (slot < num_slots)
        if HAS_MASK:
            has_state = (
                tl.load(has_initial_state + row.to(tl.int64) * stride_h, mask=row < batch, other=0) != 0
            )
    pool = conv_states + slot * stride_s_n if HAS_POOL else conv_states
    row_start = offset(query_start_loc, row, batch, tokens)
    row_end = offset(query_start_loc, row + 1, batch, tokens)
    if FLAT:
        block = program - row_start // BLOCK_T - row
        next_block = tl.cdiv(tokens, BLOCK_T) + 1  # a program has one block
    else:
        block = tl.program_id(1).to(tl.int64)
        next_block = tl.num_programs(1)
    first = row_start + block * BLOCK_T
    if (block < 0) | (first >= row_end):
        return

    ch = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = ch < dim
    while first < row_end:
        last = tl.minimum(first + BLOCK_T, row_end)
        if live:
            taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
            start_value = load_bias(bias, ch, in_dim, stride_b, HAS_BIAS)
            if WALK:
                _walk_block(
                    x, out, pool, taps, start_value, row_start, first, last, ch, in_dim, has_state,
                    stride_x_t, stride_x_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
                    WIDTH, SILU, HAS_POOL and HAS_MASK, PTX, GROUP, STAGES,
                )  # fmt: skip
            else:
                _tile_block(
                    x, out, pool, taps, start_value, row_start, first, last, ch, in_dim, has_state,
                    stride_x_t, stride_x_d, stride_s_l, stride_s_d, stride_o_t, stride_o_d,
                    WIDTH, SILU, HAS_POOL and HAS_MASK, PTX, BLOCK_T, BLOCK_D,
                )  # fmt: skip
            if HAS_POOL and WIDTH > 1:
                if first == row_start:
                    _store_window(
                        x, pool, row_start, row_end, ch, in_dim, has_state,
                        stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH,
                    )  # fmt: skip
        else:
            zero = tl.zeros([BLOCK_D], out.dtype.element_ty)
            for t in range(first, last):
                tl.store(out + t * stride_o_t + ch * stride_o_d, zero, mask=in_dim)
        first += next_block * BLOCK_T


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
    channel_blocks = triton.cdiv(dim, config.block_d)
    if config.flat:
        stream_blocks = triton.cdiv(tokens // config.block_t + batch + 1, config.streams)
        grid = (stream_blocks * config.streams * channel_blocks, 1, 1)
    else:
        grid = (batch + 1, min(max(config.row_blocks, 1), MAX_GRID_YZ), channel_blocks)
    num_slots = 0 if conv_states is None else conv_states.shape[0]
    strides = (
        *x.stride(), *weight.stride(), stride(bias, 0),
        stride(conv_states, 0), stride(conv_states, 1), stride(conv_states, 2),
        stride(cache_indices, 0), stride(has_initial_state, 0), *torch.empty_like(x, device="meta").stride(),
    )  # fmt: skip
    constants = dict(
        WIDTH=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_POOL=conv_states is not None,
        HAS_INDICES=cache_indices is not None, HAS_MASK=has_initial_state is not None,
        FLAT=config.flat, WALK=config.walk, PTX=NATIVE_PTX, WORD_BITS=word_bits(weight),
        BLOCK_T=config.block_t, BLOCK_D=config.block_d, GROUP=config.group, STAGES=config.stages, SEARCH=config.search,
        STREAMS=config.streams,
    )  # fmt: skip
    return Launch(
        _prefill_kernel, grid, (tokens, dim, batch, num_slots, known_pad(pad_slot_id, num_slots), *strides), constants,
        num_warps=config.num_warps, maxnreg=config.maxnreg,
    )  # fmt: skip
