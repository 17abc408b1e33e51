"""Gradients of a packed convolution: one pass over the tokens, and a second, small one over partial sums.

A program owns BLOCK_T tokens of one row and BLOCK_D channels. It walks them once, and `width-1` tokens further:
it recomputes the pre-activation and from it `g = dout * act'(pre)`; the last `width` values of g give the gradient
of the input `width-1` tokens back, or, at the start of a row, of an entry of the initial state. Nothing of
the forward pass is needed but its inputs.

Lanes are channels. Where a tensor has unit token stride instead (channel-first memory), each reads or writes its own
channel's tokens, 16 bytes at a time, and the walk goes on in registers: the same operations in the same order.

The mapping of programs is that of `prefill`. Block k of row s has the number `query_start_loc[s] // BLOCK_T + s + k` in
both schedules and leaves its sums for weight and bias in that place of a float32 workspace; numbers that no block
has get zeros. A second kernel adds the places up in their order, so the sums have the same bits in every run
and in both schedules.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl.config import MAX_GRID_YZ, PROGRAMS_AT_ONCE, _next_power_of_2, walks
from triton_impl.launch import Launch, stride
from triton_impl.prefill import _find_row, levels
from triton_impl.taps import (
    NATIVE_PTX,
    convolve,
    join_columns,
    load_bias,
    load_taps,
    narrow,
    offset,
    split_columns,
    widen,
    word_bits,
)


class BackwardConfig(NamedTuple):
    """How a backward pass is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      block_t: tokens a program; the same for both schedules, since the order of sums follows from it.
      block_d: channels a program, a power of two.
      group: tokens loaded before the first is used.
      row_blocks: per_sequence: programs along a row.
      search: row starts compared at a time when a flat program finds its row.
      num_warps: warps a program.
    """

    flat: bool
    block_t: int
    block_d: int
    group: int
    row_blocks: int
    search: int
    num_warps: int


def backward_config(
    tokens: int,
    dim: int,
    batch: int,
    width: int,
    max_seqlen: int | None = None,
    schedule: str = "auto",
    warp_size: int = 32,
    tiles: int = 0,
) -> BackwardConfig:
    """Chooses blocks and schedule from sizes alone; arguments as in `config.prefill_config`.

    Args:
      tiles: what `tiles_at_once` says. Blocks do not depend on it: sums come about in the same order in any layout.
    """
    vector = 2  # channels a thread: inputs, g, taps and sums of each lie in registers
    block_d = min(max(_next_power_of_2(dim), warp_size), 2 * warp_size * vector)
    # large blocks recompute less and leave fewer sums; small ones keep every multiprocessor busy
    block_t = 128
    while block_t > 32 and tokens * -(-dim // block_d) < block_t * 1056:
        block_t //= 2
    row_blocks = -(-(tokens if max_seqlen is None else min(max_seqlen, tokens)) // block_t)
    at_once = (batch + 1) * row_blocks * -(-dim // block_d) <= PROGRAMS_AT_ONCE
    return BackwardConfig(
        flat=schedule == "flat" or (schedule == "auto" and not at_once),
        block_t=block_t,
        block_d=block_d,
        group=8 * tiles if tiles else 8 if width > 2 else 4,
        row_blocks=row_blocks,
        search=32,
        num_warps=max(block_d // (warp_size * (1 if tiles else vector)), 1),
    )


@triton.jit
def _silu_slope(z, PTX: tl.constexpr):
    """The derivative of SiLU, s * (1 + z * (1 - s)); 2**14 * s in between, and no cancellation in 1 - s.

    Beyond 97 it is 0 or 1 to the last bit of a float32.
    """
    z = tl.clamp(z, -97.0, 97.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.fma(z, -1.4426950408889634, -14.0)
    if PTX:
        p = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], tl.float32, is_pure=True, pack=1
        )
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [p + 0.00006103515625], tl.float32, is_pure=True, pack=1
        )
    else:
        p = tl.exp2(exponent)
        r = 1.0 / (p + 0.00006103515625)
    return r * tl.fma(z, p * r, 1.0) * 0.00006103515625


@triton.jit
def _gradient(
    window, taps, start_value, upstream, here, WIDTH: tl.constexpr, SILU: tl.constexpr, PTX: tl.constexpr
):
    """The gradient of one pre-activation; zero where the token is not `here`, in the row."""
    g = upstream
    if SILU:
        g = tl.where(here, g * _silu_slope(convolve(window, taps, start_value, WIDTH), PTX), 0.0)
    return g


@triton.jit
def _add_products(sums, window, g, counted, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Adds one token to the sums of every tap and of the bias."""
    g = tl.where(counted, g, 0.0)
    new = ()
    for j in tl.static_range(WIDTH):
        new = new + (tl.fma(window[j], g, sums[j]),)
    if HAS_BIAS:
        new = new + (sums[WIDTH] + g,)
    return new


@triton.jit
def _load_final(late, column, in_dim, like, WIDTH: tl.constexpr, HAS_DFINAL: tl.constexpr):
    """What comes in through column `column` of the final state; zeros for a column that it does not have."""
    value = tl.zeros_like(like)
    if HAS_DFINAL:
        value = widen(tl.load(late, mask=in_dim & (column >= 0) & (column < WIDTH - 1), other=0.0))
    return value


@triton.jit
def _wide(stride, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """A stride as 64 bits, known to be a multiple of an aligned tile's tokens."""
    stride = tl.cast(stride, tl.int64)
    if TILE and ALIGNED:
        stride = tl.multiple_of(stride, 1 << TILE)
    return stride


@triton.jit
def _load_tile(
    source, t, end, ch, wanted, stride_d, COUNT: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr
):
    """Tokens t to t + COUNT = 2**LEVELS of unit stride in one load, as a tuple of a vector of channels a token.

    ALIGNED: t and `end` are multiples of COUNT, so that the tokens of a channel are one access of one thread. Else
    lanes lie along tokens, and the compiler turns the tile in shared memory.
    """
    token = tl.arange(0, COUNT)[None, :]
    here = t < end if ALIGNED else t + token < end
    tile = tl.load(source + ch[:, None] * stride_d + (t + token), mask=wanted[:, None] & here, other=0.0)
    return split_columns(tile, LEVELS)


@triton.jit
def _store_tile(
    target, columns, t, end, ch, in_dim, stride_d, COUNT: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The converse of `_load_tile`."""
    token = tl.arange(0, COUNT)[None, :]
    here = t < end if ALIGNED else t + token < end
    tl.store(
        target + ch[:, None] * stride_d + (t + token),
        join_columns(columns, LEVELS),
        mask=in_dim[:, None] & here,
    )


@triton.jit
def _next(source, ahead, t, end, ch, wanted, stride_t, stride_d, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Token t of a row as a vector of channels; (it, the tokens loaded beyond it, `source` behind it)."""
    if TILE:
        if len(ahead) == 0:
            ahead = _load_tile(source, t, end, ch, wanted, stride_d, 1 << TILE, TILE, ALIGNED)
    else:
        ahead = (tl.load(source, mask=wanted & (t < end), other=0.0),)
        source += stride_t  # carried along, which needs fewer registers than a product a token
    return ahead[0], ahead[1:], source


@triton.jit
def _walk_back(
    dout, dfinal, x, initial, dx, dinitial, taps, start_value, length, first, last, ch, in_dim, sums,
    stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, stride_o_t, stride_o_d,
    dim, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, PTX: tl.constexpr, GROUP: tl.constexpr,
    TILE_G: tl.constexpr, TILE_X: tl.constexpr, TILE_O: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row of `length`; returns `sums` with theirs added."""
    # the width-1 inputs before `first`, the width-1 values of g before it (of no use yet), the taps newest first
    LEAD: tl.constexpr = -(-(WIDTH - 1) >> TILE_X) << TILE_X  # whole tiles
    window = ()
    gs = ()
    flipped = (taps[WIDTH - 1],)
    in_row = first > 0
    source = x if TILE_X else x + (first - LEAD) * stride_x_t + ch * stride_x_d
    ahead_x = ()
    for j in tl.static_range(WIDTH - 1 - LEAD, WIDTH - 1):
        past, ahead_x, source = _next(
            source, ahead_x, first + (j - WIDTH + 1), length, ch, in_dim & in_row, stride_x_t, stride_x_d, TILE_X, ALIGNED
        )  # fmt: skip
        if j >= 0:
            past = widen(past)
            if HAS_INITIAL:
                kept = tl.load(
                    initial + (first + j) * stride_i_l + ch * stride_i_d,
                    mask=in_dim & (first == 0),
                    other=0.0,
                )
                past = tl.where(in_row, past, widen(kept))
            window = window + (past,)
            gs = gs + (tl.zeros_like(start_value),)
            flipped = flipped + (taps[WIDTH - 2 - j],)

    # the first width-1 tokens: the inputs whose gradient they complete are the initial state's, or another block's
    incoming = dout if TILE_G else dout + first * stride_g_t + ch * stride_g_d
    ahead_g = ()
    late = dfinal
    if HAS_DFINAL:
        late += (first - length) * stride_f_l + ch * stride_f_d
    for i in tl.static_range(WIDTH - 1):
        entry, ahead_x, source = _next(
            source, ahead_x, first + i, length, ch, in_dim, stride_x_t, stride_x_d, TILE_X, ALIGNED
        )
        upstream, ahead_g, incoming = _next(
            incoming, ahead_g, first + i, length, ch, in_dim, stride_g_t, stride_g_d, TILE_G, ALIGNED
        )
        window = window + (widen(entry),)
        g = _gradient(window, taps, start_value, widen(upstream), first + i < length, WIDTH, SILU, PTX)
        gs = gs + (g,)
        if HAS_DINITIAL:
            begin = _load_final(late, first + i - length, in_dim, start_value, WIDTH, HAS_DFINAL)
            kept = narrow(convolve(gs, flipped, begin, WIDTH), dinitial.dtype.element_ty)
            tl.store(dinitial + i * dim + ch, kept, mask=in_dim & (first == 0))
        if HAS_DFINAL:
            late += stride_f_l
        if HAS_SUMS:
            sums = _add_products(sums, window, g, first + i < last, WIDTH, HAS_BIAS)
        window = window[1:]
        gs = gs[1:]

    # token t + width-1 completes the gradient of token t
    target = dx if TILE_O else dx + first * stride_o_t + ch * stride_o_d
    for t in tl.range(first, last, GROUP):
        loaded = ()
        for i in tl.static_range(GROUP):
            entry, ahead_x, source = _next(
                source,
                ahead_x,
                t + (WIDTH - 1 + i),
                length,
                ch,
                in_dim,
                stride_x_t,
                stride_x_d,
                TILE_X,
                ALIGNED,
            )
            upstream, ahead_g, incoming = _next(
                incoming,
                ahead_g,
                t + (WIDTH - 1 + i),
                length,
                ch,
                in_dim,
                stride_g_t,
                stride_g_d,
                TILE_G,
                ALIGNED,
            )
            loaded = loaded + (entry, upstream)
        values = ()
        for i in tl.static_range(GROUP):
            new = t + (WIDTH - 1 + i)
            window = window + (widen(loaded[2 * i]),)
            g = _gradient(window, taps, start_value, widen(loaded[2 * i + 1]), new < length, WIDTH, SILU, PTX)
            gs = gs + (g,)
            # (64 bits: else ptxas takes more than 128 registers on sm_80)
            begin = _load_final(late, tl.cast(new, tl.int64) - length, in_dim, start_value, WIDTH, HAS_DFINAL)
            if HAS_DFINAL:
                late += stride_f_l
            value = narrow(convolve(gs, flipped, begin, WIDTH), dx.dtype.element_ty)
            if TILE_O:
                values = values + (value,)
            else:
                tl.store(target, value, mask=in_dim & (t + i < last))
                target += stride_o_t
            if HAS_SUMS:
                sums = _add_products(sums, window, g, new < last, WIDTH, HAS_BIAS)
            window = window[1:]
            gs = gs[1:]
        if TILE_O:
            for i in tl.static_range(0, GROUP, 1 << TILE_O):
                _store_tile(
                    target,
                    values[i : i + (1 << TILE_O)],
                    t + i,
                    last,
                    ch,
                    in_dim,
                    stride_o_d,
                    1 << TILE_O,
                    TILE_O,
                    ALIGNED,
                )
    return sums


@triton.jit(do_not_specialize=["tokens", "batch"])
def _backward_kernel(
    dout, dfinal, x, weight, bias, initial_states, query_start_loc, dx, dinitial, partial,
    tokens, dim, batch,
    stride_g_n, stride_g_t, stride_g_d, stride_f_n, stride_f_l, stride_f_d, stride_x_n, stride_x_t, stride_x_d,
    stride_w_d, stride_w_j, stride_b, stride_i_n, stride_i_l, stride_i_d, stride_o_n, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, FLAT: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, SEARCH: tl.constexpr,
    DENSE: tl.constexpr, TILE_G: tl.constexpr, TILE_X: tl.constexpr, TILE_O: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_g_n = _wide(stride_g_n, TILE_G, ALIGNED)
    stride_g_t = tl.cast(stride_g_t, tl.int64)
    stride_g_d = _wide(stride_g_d, TILE_G, ALIGNED)
    stride_f_l = tl.cast(stride_f_l, tl.int64)
    stride_f_d = tl.cast(stride_f_d, tl.int64)
    stride_x_n = _wide(stride_x_n, TILE_X, ALIGNED)
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = _wide(stride_x_d, TILE_X, ALIGNED)
    stride_i_l = tl.cast(stride_i_l, tl.int64)
    stride_i_d = tl.cast(stride_i_d, tl.int64)
    stride_o_n = _wide(stride_o_n, TILE_O, ALIGNED)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = _wide(stride_o_d, TILE_O, ALIGNED)

    # mapping of programs
    if FLAT:
        channel_blocks = tl.cdiv(dim, BLOCK_D)
        block_d = tl.program_id(0) % channel_blocks
        program = tl.program_id(0) // channel_blocks
        facts = _find_row(
            query_start_loc, None, None, program, batch, tokens, 0, 0, BLOCK_T, SEARCH, False, False
        )
        row = facts[0]
    else:
        row = tl.program_id(0)
        block_d = tl.program_id(2)
    row_start = offset(query_start_loc, row, batch, tokens)
    row_end = offset(query_start_loc, row + 1, batch, tokens)
    number = row_start // BLOCK_T + row  # of the row's first block
    blocks = row_end // BLOCK_T + row + 1 - number  # numbers up to the next row's; the last may be no block
    if FLAT:
        block = program - number
        next_block = tl.cdiv(tokens, BLOCK_T) + 1  # a program has one block
    else:
        block = tl.program_id(1).to(tl.int64)
        next_block = tl.num_programs(1)
    if block < 0:
        return

    wide_row = row.to(tl.int64)
    ch = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = ch < dim
    wide_dim = tl.cast(dim, tl.int64)
    if DENSE:
        dout += wide_row * stride_g_n
        x += wide_row * stride_x_n
        dx += wide_row * stride_o_n
    else:
        dout += row_start * stride_g_t
        x += row_start * stride_x_t
        dx += row_start * stride_o_t
    length = row_end - row_start
    zero = tl.zeros([BLOCK_D], tl.float32)
    while block < blocks:
        first = block * BLOCK_T  # from the row's start
        last = tl.minimum(first + BLOCK_T, length)
        sums = ()
        for _ in tl.static_range(WIDTH + HAS_BIAS):
            sums = sums + (zero,)
        if (row < batch) & ((first < length) | (block == 0)):  # a row of zero tokens hands its state on
            taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
            start_value = load_bias(bias, ch, in_dim, stride_b, HAS_BIAS)
            sums = _walk_back(
                dout, dfinal + wide_row * stride_f_n if HAS_DFINAL else dfinal, x,
                initial_states + wide_row * stride_i_n if HAS_INITIAL else initial_states, dx,
                dinitial + wide_row * (WIDTH - 1) * wide_dim if HAS_DINITIAL else dinitial,
                taps, start_value, length, first, last, ch, in_dim, sums,
                stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d,
                stride_o_t, stride_o_d, wide_dim, WIDTH, SILU, HAS_BIAS, HAS_INITIAL, HAS_DFINAL, HAS_DINITIAL, HAS_SUMS, PTX,
                GROUP, TILE_G, TILE_X, TILE_O, ALIGNED,
            )  # fmt: skip
        else:
            for t in range(first, last):
                tl.store(dx + t * stride_o_t + ch * stride_o_d, zero.to(dx.dtype.element_ty), mask=in_dim)
        if HAS_SUMS:
            place = partial + (number + block) * (WIDTH + HAS_BIAS) * wide_dim + ch
            for j in tl.static_range(WIDTH + HAS_BIAS):
                tl.store(place + j * wide_dim, sums[j], mask=in_dim)
        block += next_block


@triton.jit(do_not_specialize=["places"])
def _reduce_kernel(
    partial, dweight, dbias, places, dim,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds up the places of the workspace, ROWS at a time, for one tap (or the bias) and BLOCK_D channels."""
    tap = tl.program_id(1)
    ch = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = ch < dim
    lane = tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(0, places, ROWS):
        row = (first + lane).to(tl.int64) * (WIDTH + HAS_BIAS) + tap
        acc += tl.load(
            partial + row[:, None] * dim + ch[None, :],
            mask=(first + lane < places)[:, None] & in_dim[None, :],
            other=0.0,
        )
    total = tl.sum(acc, axis=0)
    if tap < WIDTH:
        tl.store(dweight + ch * WIDTH + tap, narrow(total, dweight.dtype.element_ty), mask=in_dim)
    else:
        if HAS_BIAS:
            tl.store(dbias + ch, narrow(total, dbias.dtype.element_ty), mask=in_dim)


class Tiles(NamedTuple):
    """How tensors of unit token stride are read and written.

    Attributes:
      g, x, o: log2 of the tokens of a tile of dout, x and dx, 16 bytes; 0: a vector of channels at a time.
      aligned: the rows are dense, and every tile lies within its row and on a boundary of 16 bytes.
    """

    g: int
    x: int
    o: int
    aligned: bool


def tiles_of(dout, x):
    """The Tiles of dout and x, [tokens, dim] or dense [batch, seqlen, dim]."""
    chosen, aligned = [], x.dim() == 3
    for tensor in (dout, x, torch.empty_like(x, device="meta")):
        chosen.append(0 if walks(*tensor.stride()[-2:]) else levels(tensor))
        tokens = 1 << chosen[-1]
        steps = tensor.shape[-2], tensor.stride(0), tensor.stride(-1)
        aligned = aligned and all(step % tokens == 0 for step in steps)
    return Tiles(*chosen, aligned and any(chosen))


def tiles_at_once(tiles, has_states):
    """Eights of tokens asked for before the first is used, as registers allow; 0 without tiles."""
    if not any(tiles[:3]):
        return 0
    return 2 if tiles.aligned and not has_states else 1


def prepare(
    dout,
    dfinal,
    x,
    weight,
    bias,
    initial_states,
    query_start_loc,
    silu,
    need_sums,
    need_initial,
    config,
    tiles,
):
    """Prepares both kernels for checked arguments of these shapes, strides and dtypes.

    Args:
      dout, x: [tokens, dim], or [batch, seqlen, dim] where every row of `query_start_loc` has seqlen tokens, both
        with any strides; dfinal: [batch, width-1, dim] or None; the others as in `causal_conv1d`.
      silu: whether the forward pass applied SiLU.
      need_sums: whether the gradients of weight and bias are wanted.
      need_initial: whether that of the initial states is.
      config: a BackwardConfig.
      tiles: `tiles_of` dout and x.

    Returns:
      (the number of places in the workspace, a Launch of (dout, dfinal, x, weight, bias, initial_states,
      query_start_loc, dx, dinitial, workspace), a Launch of (workspace, dweight, dbias)). dx is laid out as
      torch.empty_like(x); dinitial and dweight are contiguous; the workspace is float32 of
      [places, width + 1 with a bias, dim].
    """
    dim, dense = x.shape[-1], x.dim() == 3
    tokens = x.shape[:-1].numel()
    batch, width = query_start_loc.shape[0] - 1, weight.shape[1]
    places = tokens // config.block_t + batch + 1
    channel_blocks = triton.cdiv(dim, config.block_d)
    if config.flat:
        grid = (places * channel_blocks, 1, 1)
    else:
        grid = (batch + 1, min(max(config.row_blocks, 1), MAX_GRID_YZ), channel_blocks)
    no_rows = () if dense else (0,)
    strides = (
        *no_rows, *dout.stride(), stride(dfinal, 0), stride(dfinal, 1), stride(dfinal, 2), *no_rows, *x.stride(),
        *weight.stride(), stride(bias, 0), stride(initial_states, 0), stride(initial_states, 1), stride(initial_states, 2),
        *no_rows, *torch.empty_like(x, device="meta").stride(),
    )  # fmt: skip
    constants = dict(
        WIDTH=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INITIAL=initial_states is not None,
        HAS_DFINAL=dfinal is not None, HAS_DINITIAL=need_initial, HAS_SUMS=need_sums, FLAT=config.flat, PTX=NATIVE_PTX,
        WORD_BITS=word_bits(weight), BLOCK_T=config.block_t, BLOCK_D=config.block_d, GROUP=config.group,
        SEARCH=config.search, DENSE=dense, TILE_G=tiles.g, TILE_X=tiles.x, TILE_O=tiles.o, ALIGNED=tiles.aligned,
    )  # fmt: skip
    walk = Launch(
        _backward_kernel, grid, (tokens, dim, batch, *strides), constants,
        num_warps=config.num_warps,
    )  # fmt: skip
    block_d = min(_next_power_of_2(dim), 64)
    constants = dict(WIDTH=width, HAS_BIAS=bias is not None, ROWS=32, BLOCK_D=block_d)
    grid = (triton.cdiv(dim, block_d), width + (bias is not None), 1)
    return places, walk, Launch(_reduce_kernel, grid, (places, dim), constants, num_warps=4)
