"""Gradients of a packed convolution: one pass over the tokens, and a second, small one over partial sums.

A program owns BLOCK_T tokens of one row and BLOCK_D channels. It walks them once, and `width-1` tokens further:
it recomputes the pre-activation and from it `g = dout * act'(pre)`; the last `width` values of g give the gradient
of the input `width-1` tokens back, or, at the start of a row, of an entry of the initial state. Nothing of
the forward pass is needed but its inputs.

The mapping of programs is that of `prefill`. Block k of row s has the number `query_start_loc[s] // BLOCK_T + s + k` in
both schedules and leaves its sums for weight and bias in that place of a float32 workspace; numbers that no block
has get zeros. A second kernel adds the places up in their order, so the sums have the same bits in every run
and in both schedules.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_impl.config import MAX_GRID_YZ, PROGRAMS_AT_ONCE, _next_power_of_2
from triton_impl.launch import Launch, stride
from triton_impl.prefill import _find_row
from triton_impl.taps import NATIVE_PTX, convolve, load_bias, load_taps, narrow, offset, widen, word_bits


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
) -> BackwardConfig:
    """Chooses blocks and schedule from sizes alone; arguments as in `config.prefill_config`."""
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
        group=8 if width > 2 else 4,
        row_blocks=row_blocks,
        search=32,
        num_warps=max(block_d // (warp_size * vector), 1),
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
def _walk_back(
    dout, dfinal, x, initial, dx, dinitial, taps, start_value, row_start, row_end, first, last, ch, in_dim, sums,
    stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, dim,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, PTX: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row; returns `sums` with theirs added."""
    # the width-1 inputs before `first`, the width-1 values of g before it (of no use yet), the taps newest first
    window = ()
    gs = ()
    flipped = (taps[WIDTH - 1],)
    for j in tl.static_range(WIDTH - 1):
        before = first + (j - WIDTH + 1)
        in_row = before >= row_start
        past = widen(tl.load(x + before * stride_x_t + ch * stride_x_d, mask=in_dim & in_row, other=0.0))
        if HAS_INITIAL:
            column = before - row_start + (WIDTH - 1)
            kept = tl.load(
                initial + column * stride_i_l + ch * stride_i_d, mask=in_dim & (before < row_start), other=0.0
            )
            past = tl.where(in_row, past, widen(kept))
        window = window + (past,)
        gs = gs + (tl.zeros_like(start_value),)
        flipped = flipped + (taps[WIDTH - 2 - j],)

    # the first width-1 tokens: the inputs whose gradient they complete are the initial state's, or another block's
    source = x + first * stride_x_t + ch * stride_x_d
    incoming = dout + first * stride_g_t + ch * stride_g_d
    late = dfinal
    if HAS_DFINAL:
        late += (first - row_end) * stride_f_l + ch * stride_f_d
    for i in tl.static_range(WIDTH - 1):
        here = first + i < row_end
        window = window + (widen(tl.load(source, mask=in_dim & here, other=0.0)),)
        upstream = widen(tl.load(incoming, mask=in_dim & here, other=0.0))
        source += stride_x_t
        incoming += stride_g_t
        g = _gradient(window, taps, start_value, upstream, here, WIDTH, SILU, PTX)
        gs = gs + (g,)
        if HAS_DINITIAL:
            begin = _load_final(late, first + i - row_end, in_dim, start_value, WIDTH, HAS_DFINAL)
            kept = narrow(convolve(gs, flipped, begin, WIDTH), dinitial.dtype.element_ty)
            tl.store(dinitial + i * dim + ch, kept, mask=in_dim & (first == row_start))
        if HAS_DFINAL:
            late += stride_f_l
        if HAS_SUMS:
            sums = _add_products(sums, window, g, first + i < last, WIDTH, HAS_BIAS)
        window = window[1:]
        gs = gs[1:]

    # every further token completes the gradient of the input width-1 tokens before it
    target = dx + first * dim + ch
    for t in tl.range(first + (WIDTH - 1), last + (WIDTH - 1), GROUP):
        loaded = ()
        for i in tl.static_range(GROUP):
            here = t + i < row_end
            loaded = loaded + (
                tl.load(source, mask=in_dim & here, other=0.0),
                tl.load(incoming, mask=in_dim & here, other=0.0),
            )
            source += stride_x_t
            incoming += stride_g_t
        for i in tl.static_range(GROUP):
            window = window + (widen(loaded[2 * i]),)
            g = _gradient(
                window, taps, start_value, widen(loaded[2 * i + 1]), t + i < row_end, WIDTH, SILU, PTX
            )
            gs = gs + (g,)
            begin = _load_final(late, t + i - row_end, in_dim, start_value, WIDTH, HAS_DFINAL)
            if HAS_DFINAL:
                late += stride_f_l
            value = narrow(convolve(gs, flipped, begin, WIDTH), dx.dtype.element_ty)
            tl.store(target, value, mask=in_dim & (t + i < last + (WIDTH - 1)))
            target += dim
            if HAS_SUMS:
                sums = _add_products(sums, window, g, t + i < last, WIDTH, HAS_BIAS)
            window = window[1:]
            gs = gs[1:]
    return sums


@triton.jit(do_not_specialize=["tokens", "batch"])
def _backward_kernel(
    dout, dfinal, x, weight, bias, initial_states, query_start_loc, dx, dinitial, partial,
    tokens, dim, batch,
    stride_g_t, stride_g_d, stride_f_n, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b,
    stride_i_n, stride_i_l, stride_i_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, FLAT: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_g_t = tl.cast(stride_g_t, tl.int64)
    stride_g_d = tl.cast(stride_g_d, tl.int64)
    stride_f_l = tl.cast(stride_f_l, tl.int64)
    stride_f_d = tl.cast(stride_f_d, tl.int64)
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_i_l = tl.cast(stride_i_l, tl.int64)
    stride_i_d = tl.cast(stride_i_d, tl.int64)

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
    zero = tl.zeros([BLOCK_D], tl.float32)
    while block < blocks:
        first = row_start + block * BLOCK_T
        last = tl.minimum(first + BLOCK_T, row_end)
        sums = ()
        for _ in tl.static_range(WIDTH + HAS_BIAS):
            sums = sums + (zero,)
        if (row < batch) & ((first < row_end) | (block == 0)):  # a row of zero tokens hands its state on
            taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
            start_value = load_bias(bias, ch, in_dim, stride_b, HAS_BIAS)
            sums = _walk_back(
                dout, dfinal + wide_row * stride_f_n if HAS_DFINAL else dfinal, x,
                initial_states + wide_row * stride_i_n if HAS_INITIAL else initial_states, dx,
                dinitial + wide_row * (WIDTH - 1) * wide_dim if HAS_DINITIAL else dinitial,
                taps, start_value, row_start, row_end, first, last, ch, in_dim, sums,
                stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, wide_dim,
                WIDTH, SILU, HAS_BIAS, HAS_INITIAL, HAS_DFINAL, HAS_DINITIAL, HAS_SUMS, PTX, GROUP,
            )  # fmt: skip
        else:
            for t in range(first, last):
                tl.store(dx + t * wide_dim + ch, zero.to(dx.dtype.element_ty), mask=in_dim)
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


def prepare(
    dout, dfinal, x, weight, bias, initial_states, query_start_loc, silu, need_sums, need_initial, config
):
    """Prepares both kernels for checked arguments of these shapes, strides and dtypes.

    Args:
      dout, x: [tokens, dim]; dfinal: [batch, width-1, dim] or None; the others as in `causal_conv1d`.
      silu: whether the forward pass applied SiLU.
      need_sums: whether the gradients of weight and bias are wanted.
      need_initial: whether that of the initial states is.
      config: a BackwardConfig.

    Returns:
      (the number of places in the workspace, a Launch of (dout, dfinal, x, weight, bias, initial_states,
      query_start_loc, dx, dinitial, workspace), a Launch of (workspace, dweight, dbias)). dx, dinitial and dweight
      are contiguous; the workspace is float32 of [places, width + 1 with a bias, dim].
    """
    tokens, dim = x.shape
    batch, width = query_start_loc.shape[0] - 1, weight.shape[1]
    places = tokens // config.block_t + batch + 1
    channel_blocks = triton.cdiv(dim, config.block_d)
    if config.flat:
        grid = (places * channel_blocks, 1, 1)
    else:
        grid = (batch + 1, min(max(config.row_blocks, 1), MAX_GRID_YZ), channel_blocks)
    strides = (
        *dout.stride(), stride(dfinal, 0), stride(dfinal, 1), stride(dfinal, 2), *x.stride(), *weight.stride(),
        stride(bias, 0), stride(initial_states, 0), stride(initial_states, 1), stride(initial_states, 2),
    )  # fmt: skip
    constants = dict(
        WIDTH=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INITIAL=initial_states is not None,
        HAS_DFINAL=dfinal is not None, HAS_DINITIAL=need_initial, HAS_SUMS=need_sums, FLAT=config.flat, PTX=NATIVE_PTX,
        WORD_BITS=word_bits(weight), BLOCK_T=config.block_t, BLOCK_D=config.block_d, GROUP=config.group,
        SEARCH=config.search,
    )  # fmt: skip
    walk = Launch(
        _backward_kernel, grid, (tokens, dim, batch, *strides), constants,
        num_warps=config.num_warps,
    )  # fmt: skip
    block_d = min(_next_power_of_2(dim), 64)
    constants = dict(WIDTH=width, HAS_BIAS=bias is not None, ROWS=32, BLOCK_D=block_d)
    grid = (triton.cdiv(dim, block_d), width + (bias is not None), 1)
    return places, walk, Launch(_reduce_kernel, grid, (places, dim), constants, num_warps=4)
