"""Gradients of a packed convolution: one pass over the tokens, and a second, small one over partial sums.

A program owns BLOCK_T tokens of one row and BLOCK_D channels. It reads them once, and `width-1` tokens further:
it recomputes the pre-activation and from it `g = dout * act'(pre)`; the last `width` values of g give the gradient
of the input `width-1` tokens back, or, at the start of a row, of an entry of the initial state. Nothing of
the forward pass is needed but its inputs.

The layout of x alone chooses between two ways, both right for any strides of dout and with the same operations in the
same order for every element of dx. `_walk_back`: lanes are channels, and a program walks along its tokens. `_tile_back`,
where tokens have unit stride (channel-first memory): lanes are runs of 16 bytes along a channel, so that a warp reads
one stretch of memory; runs are taken apart in registers.

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
from triton_impl.prefill import levels
from triton_impl.records import Items, Rows
from triton_impl.rows import find_row
from triton_impl.taps import (
    NATIVE_PTX,
    convolve,
    join_columns,
    load_bias,
    load_bias_word,
    load_taps,
    load_words,
    narrow,
    offset,
    split_columns,
    unpack_taps,
    widen,
    word_bits,
)


class BackwardConfig(NamedTuple):
    """How a backward pass is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      block_t: tokens a program; the same for both schedules, since the order of sums follows from it.
      block_d: channels a program, a power of two.
      group: tokens loaded before the first is used; divides block_t. In runs: of a channel, one run a lane.
      row_blocks: per_sequence: programs along a row.
      search: row starts compared at a time when a flat program finds its row.
      num_warps: warps a program.
      stages: in runs: groups in flight; above 1 they go through shared memory asynchronously.
    """

    flat: bool
    block_t: int
    block_d: int
    group: int
    row_blocks: int
    search: int
    num_warps: int
    stages: int = 1


def backward_config(
    tokens: int,
    dim: int,
    batch: int,
    width: int,
    run: int = 0,
    max_seqlen: int | None = None,
    schedule: str = "auto",
    warp_size: int = 32,
) -> BackwardConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch, width: sizes of the call.
      run: `run_of` x.
      max_seqlen, schedule, warp_size: as in `config.prefill_config`.
    """
    if run:
        # a run a thread: half a warp for each of eight channels, or fewer lanes along the tokens of short rows
        lanes, block_d, longest, stages = warp_size // 2, 8, 16, 1
        while lanes > 4 and lanes * run * max(batch, 1) > 2 * tokens:
            lanes, block_d, longest = lanes // 2, block_d * 2, 1
        block_d = min(block_d, _next_power_of_2(max(dim, 1)))
        group, num_warps = lanes * run, max(lanes * block_d // warp_size, 1)
        block_t, least = longest * group, group
    else:
        vector = 2  # channels a thread: inputs, g, taps and sums of each lie in registers
        block_d = min(max(_next_power_of_2(dim), warp_size), 2 * warp_size * vector)
        group, num_warps, stages = 8 if width > 2 else 4, max(block_d // (warp_size * vector), 1), 1
        block_t, least = 128, 32
    # large blocks recompute less and leave fewer sums; small ones keep every multiprocessor busy
    while block_t > least and tokens * -(-dim // block_d) < block_t * 1056:
        block_t //= 2
    row_blocks = -(-(tokens if max_seqlen is None else min(max_seqlen, tokens)) // block_t)
    at_once = (batch + 1) * row_blocks * -(-dim // block_d) <= PROGRAMS_AT_ONCE
    return BackwardConfig(
        flat=schedule == "flat" or (schedule == "auto" and not at_once),
        block_t=block_t,
        block_d=block_d,
        group=group,
        row_blocks=row_blocks,
        search=32,
        num_warps=num_warps,
        stages=stages,
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
def _flip(taps, WIDTH: tl.constexpr):
    """The taps newest first."""
    flipped = ()
    for j in tl.static_range(WIDTH):
        flipped = flipped + (taps[WIDTH - 1 - j],)
    return flipped


@triton.jit
def _walk_first(
    dout, dfinal, x, initial, dinitial, taps, flipped, start_value, length, first, last, ch, in_dim, sums,
    stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, dim,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The first width-1 tokens from `first`: the inputs whose gradient they complete are the initial state's, or another
    block's.

    Returns:
      The last width-1 inputs and values of g; `sums` with tokens before `last` added; where x and dout go on.
    """
    # the width-1 inputs before `first`, the width-1 values of g before it (of no use yet)
    window = ()
    gs = ()
    in_row = first > 0
    source = x + (first - (WIDTH - 1)) * stride_x_t + ch * stride_x_d
    for j in tl.static_range(WIDTH - 1):
        past = widen(tl.load(source, mask=in_dim & in_row & (first + (j - WIDTH + 1) < length), other=0.0))
        source += stride_x_t  # carried along, which needs fewer registers than a product a token
        if HAS_INITIAL:
            kept = tl.load(
                initial + (first + j) * stride_i_l + ch * stride_i_d, mask=in_dim & (first == 0), other=0.0
            )
            past = tl.where(in_row, past, widen(kept))
        window = window + (past,)
        gs = gs + (tl.zeros_like(start_value),)

    incoming = dout + first * stride_g_t + ch * stride_g_d
    late = dfinal
    if HAS_DFINAL:
        late += (first - length) * stride_f_l + ch * stride_f_d
    for i in tl.static_range(WIDTH - 1):
        here = first + i < length
        entry = tl.load(source, mask=in_dim & here, other=0.0)
        source += stride_x_t
        upstream = tl.load(incoming, mask=in_dim & here, other=0.0)
        incoming += stride_g_t
        window = window + (widen(entry),)
        g = _gradient(window, taps, start_value, widen(upstream), here, WIDTH, SILU, PTX)
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
    return window, gs, sums, source, incoming


@triton.jit
def _walk_back(
    dout, dfinal, x, initial, dx, dinitial, taps, start_value, length, first, last, ch, in_dim, sums,
    stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, stride_o_t, stride_o_d,
    dim, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, PTX: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row of `length`, one vector of channels a token; returns `sums` with theirs added."""
    flipped = _flip(taps, WIDTH)
    window, gs, sums, source, incoming = _walk_first(
        dout, dfinal, x, initial, dinitial, taps, flipped, start_value, length, first, last, ch, in_dim, sums,
        stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, dim,
        WIDTH, SILU, HAS_BIAS, HAS_INITIAL, HAS_DFINAL, HAS_DINITIAL, HAS_SUMS, PTX,
    )  # fmt: skip

    # token t + width-1 completes the gradient of token t
    target = dx + first * stride_o_t + ch * stride_o_d
    late = dfinal
    if HAS_DFINAL:
        late += (first - length + (WIDTH - 1)) * stride_f_l + ch * stride_f_d
    for t in tl.range(first, last, GROUP):
        loaded = ()
        for i in tl.static_range(GROUP):
            wanted = in_dim & (t + (WIDTH - 1 + i) < length)
            entry = tl.load(source, mask=wanted, other=0.0)
            source += stride_x_t
            upstream = tl.load(incoming, mask=wanted, other=0.0)
            incoming += stride_g_t
            loaded = loaded + (entry, upstream)
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
            tl.store(target, value, mask=in_dim & (t + i < last))
            target += stride_o_t
            if HAS_SUMS:
                sums = _add_products(sums, window, g, new < last, WIDTH, HAS_BIAS)
            window = window[1:]
            gs = gs[1:]
    return sums


@triton.jit
def _runs(base, offset, run, ch, shift, stride_t, stride_d, LEVELS: tl.constexpr, IN_PHASE: tl.constexpr):
    """Where runs of 2**LEVELS tokens begin, [runs, channels], if the first begins `shift` tokens before `offset`.

    IN_PHASE: that is a boundary of 16 bytes of every channel, which the compiler is told.
    """
    start = offset + ch * stride_d
    if IN_PHASE:
        pointers = base + (((start >> LEVELS)[None, :] + run[:, None]) << LEVELS)
    else:
        pointers = base + start[None, :] + ((run << LEVELS)[:, None] - shift) * stride_t
    return pointers


@triton.jit
def _in_row(at, left, first, i, in_dim, EDGE: tl.constexpr, WHOLE: tl.constexpr):
    """Which of the tokens first + i of every run are a row's, if `at` tokens of it lie before the run, `left` behind.

    EDGE: not all are; WHOLE: all or none of a run.
    """
    wanted = in_dim[None, :, None]
    if EDGE:
        if WHOLE:
            wanted = wanted & ((at >= -first) & (left > first))[:, :, None]
        else:
            wanted = wanted & (at[:, :, None] >= -first - i) & (left[:, :, None] > first + i)
    return wanted


@triton.jit
def _load_runs(
    source, stride_t, at, left, first: tl.constexpr, in_dim,
    LEVELS: tl.constexpr, EDGE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """2**LEVELS tokens from `first` behind each of `source`, as a tuple of [runs, channels]; zeros outside the row."""
    i = tl.arange(0, 1 << LEVELS)[None, None, :]
    wanted = _in_row(at, left, first, i, in_dim, EDGE, WHOLE)
    return split_columns(tl.load(source[:, :, None] + (first + i) * stride_t, mask=wanted, other=0.0), LEVELS)


@triton.jit
def _tile_step(
    dout, dfinal, x, initial, dx, taps, flipped, start_value, length, t, token, ch, in_dim, sums,
    stride_g_t, stride_f_l, stride_f_d, stride_i_l, stride_i_d, stride_o_t,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_SUMS: tl.constexpr, PTX: tl.constexpr, LEVELS: tl.constexpr,
    HALO_LEVELS: tl.constexpr, ALIGNED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """A run of every lane at tokens t + `token`; returns `sums` with theirs added.

    EDGE: the runs or the tokens read around them may lie outside the row.
    """
    RUN: tl.constexpr = 1 << LEVELS
    HALO: tl.constexpr = 1 << HALO_LEVELS
    WHOLE: tl.constexpr = ALIGNED and HALO_LEVELS <= LEVELS
    # tokens from the row's start to each run, and from there to its end
    at = tl.minimum(t, 1 << 30).to(tl.int32) + token
    left = tl.minimum(length - t, 1 << 30).to(tl.int32) - token
    x += t
    dout += t * stride_g_t

    # the width-1 inputs before each run, the run, width-1 tokens behind it; all are asked for before any is used
    entries = _load_runs(x, 1, at, left, 0, in_dim, LEVELS, EDGE, ALIGNED)
    upstream = _load_runs(dout, stride_g_t, at, left, 0, in_dim, LEVELS, EDGE, ALIGNED)
    if WIDTH > 1:
        before = _load_runs(x, 1, at, left, -HALO, in_dim, HALO_LEVELS, EDGE, WHOLE)
        behind = _load_runs(x, 1, at, left, RUN, in_dim, HALO_LEVELS, EDGE, WHOLE)
        entries = before[HALO - (WIDTH - 1) :] + entries + behind[: WIDTH - 1]
        behind = _load_runs(dout, stride_g_t, at, left, RUN, in_dim, HALO_LEVELS, EDGE, WHOLE)
        upstream = upstream + behind[: WIDTH - 1]
    held = ()
    late = ()
    if EDGE:
        for c in tl.static_range(WIDTH - 1):
            if HAS_INITIAL:
                kept = tl.load(initial + c * stride_i_l + ch * stride_i_d, mask=in_dim, other=0.0)
                held = held + (widen(kept)[None, :],)
            if HAS_DFINAL:
                kept = tl.load(dfinal + c * stride_f_l + ch * stride_f_d, mask=in_dim, other=0.0)
                late = late + (widen(kept)[None, :],)
    inputs = ()
    for k in tl.static_range(RUN + 2 * (WIDTH - 1)):
        entry = widen(entries[k])
        if EDGE and HAS_INITIAL:
            for c in tl.static_range(WIDTH - 1):
                if (c - k) % RUN == 0 if ALIGNED else c - k > -RUN:  # else it is no run's
                    entry = tl.where(at == c - k, held[c], entry)
        inputs = inputs + (entry,)

    gs = ()
    for k in tl.static_range(RUN + WIDTH - 1):
        here = True
        if EDGE:
            here = (at >= -k) & (left > k)
        window = inputs[k : k + WIDTH]
        gs = gs + (_gradient(window, taps, start_value, widen(upstream[k]), here, WIDTH, SILU, PTX),)

    columns = ()
    for k in tl.static_range(RUN):
        window = gs[k : k + WIDTH]
        begin = tl.zeros_like(gs[k])
        if EDGE and HAS_DFINAL:
            for c in tl.static_range(WIDTH - 1):
                if (k + WIDTH - 1 - c) % RUN == 0 or not ALIGNED:
                    begin = tl.where(left == k + WIDTH - 1 - c, late[c], begin)
        columns = columns + (narrow(convolve(window, flipped, begin, WIDTH), dx.dtype.element_ty),)
        if HAS_SUMS:
            sums = _add_products(sums, inputs[k : k + WIDTH], gs[k], True, WIDTH, HAS_BIAS)

    i = tl.arange(0, RUN)[None, None, :]
    wanted = _in_row(at, left, 0, i, in_dim, EDGE, ALIGNED)
    tl.store((dx + t * stride_o_t)[:, :, None] + i * stride_o_t, join_columns(columns, LEVELS), mask=wanted)
    return sums


@triton.jit
def _tile_back(
    dout, dfinal, x, initial, dx, dinitial, offset_g, offset_x, offset_o, taps, start_value, length, first, last, ch, in_dim,
    stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d, stride_i_l, stride_i_d, stride_o_t, stride_o_d,
    dim, WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, PTX: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr, PHASE_G: tl.constexpr, PHASE_O: tl.constexpr,
):  # fmt: skip
    """Tokens [first, last) of a row of `length`, by runs of 16 bytes of a channel; returns their sums.

    In every channel runs lie on the boundaries of 16 bytes of x, so that the program's tokens begin up to a run before
    `first` and, if the row goes on, end as much before `last`. ALIGNED: all rows begin and end on such boundaries.
    PHASE_G, PHASE_O: dout's or dx's tokens lie to them as x's do.
    """
    RUN: tl.constexpr = 1 << LEVELS
    HALO_LEVELS: tl.constexpr = 0 if WIDTH < 3 else 1 if WIDTH == 3 else 2 if WIDTH < 6 else 3
    HALO: tl.constexpr = 0 if WIDTH == 1 else 1 << HALO_LEVELS
    SLACK: tl.constexpr = 0 if ALIGNED else RUN - 1
    flipped = _flip(taps, WIDTH)
    if HAS_DINITIAL:
        if first == 0:
            _walk_first(
                dout + offset_g, dfinal, x + offset_x, initial, dinitial, taps, flipped, start_value, length, first, last,
                ch, in_dim, (), stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d,
                stride_i_l, stride_i_d, dim, WIDTH, SILU, HAS_BIAS, HAS_INITIAL, HAS_DFINAL, HAS_DINITIAL, False, PTX,
            )  # fmt: skip
    # axes: runs, channels, and in loads and stores tokens; lanes lie along the first
    run = tl.arange(0, GROUP // RUN)
    token = (run << LEVELS)[:, None]
    shift = 0
    if not ALIGNED:
        shift = ((offset_x + ch * stride_x_d) & (RUN - 1)).to(tl.int32)[None, :]
        token -= shift
    x_runs = _runs(x, offset_x, run, ch, shift, 1, stride_x_d, LEVELS, True)
    g_runs = _runs(dout, offset_g, run, ch, shift, stride_g_t, stride_g_d, LEVELS, PHASE_G)
    o_runs = _runs(dx, offset_o, run, ch, shift, stride_o_t, stride_o_d, LEVELS, PHASE_O)
    wide_taps = ()
    wide_flipped = ()
    for j in tl.static_range(WIDTH):
        wide_taps = wide_taps + (taps[j][None, :],)
        wide_flipped = wide_flipped + (flipped[j][None, :],)
    sums = ()
    for _ in tl.static_range(WIDTH + HAS_BIAS):
        sums = sums + (tl.zeros([GROUP // RUN, ch.shape[0]], tl.float32),)

    # steps before `low` and from `high` on may touch what is not the row's; they come first
    steps = (last - first + (GROUP - 1)) // GROUP
    if last == length:
        steps = (last - first + (GROUP - 1 + SLACK)) // GROUP
    low = tl.minimum((tl.maximum(HALO + SLACK - first, 0) + (GROUP - 1)) // GROUP, steps)
    high = tl.minimum(tl.maximum(tl.maximum(length - HALO - first, 0) // GROUP, low), steps)
    for step in range(low + steps - high):
        t = first + tl.where(step < low, step, step - low + high) * GROUP
        sums = _tile_step(
            g_runs, dfinal, x_runs, initial, o_runs, wide_taps, wide_flipped, start_value[None, :], length, t, token, ch,
            in_dim, sums, stride_g_t, stride_f_l, stride_f_d, stride_i_l, stride_i_d, stride_o_t, WIDTH, SILU, HAS_BIAS,
            HAS_INITIAL, HAS_DFINAL, HAS_SUMS, PTX, LEVELS, HALO_LEVELS, ALIGNED, True,
        )  # fmt: skip
    for step in tl.range(low, high, num_stages=STAGES):
        t = first + step * GROUP
        sums = _tile_step(
            g_runs, dfinal, x_runs, initial, o_runs, wide_taps, wide_flipped, start_value[None, :], length, t, token, ch,
            in_dim, sums, stride_g_t, stride_f_l, stride_f_d, stride_i_l, stride_i_d, stride_o_t, WIDTH, SILU, HAS_BIAS,
            HAS_INITIAL, HAS_DFINAL, HAS_SUMS, PTX, LEVELS, HALO_LEVELS, ALIGNED, False,
        )  # fmt: skip
    totals = ()
    for j in tl.static_range(WIDTH + HAS_BIAS):
        totals = totals + (tl.sum(sums[j], axis=0),)
    return totals


@triton.jit(do_not_specialize=["tokens", "batch"])
def _backward_kernel(
    dout, dfinal, x, weight, bias, initial_states, query_start_loc, dx, dinitial, partial,
    tokens, dim, batch,
    stride_g_n, stride_g_t, stride_g_d, stride_f_n, stride_f_l, stride_f_d, stride_x_n, stride_x_t, stride_x_d,
    stride_w_d, stride_w_j, stride_b, stride_i_n, stride_i_l, stride_i_d, stride_o_n, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_SUMS: tl.constexpr, FLAT: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, SEARCH: tl.constexpr,
    STAGES: tl.constexpr, DENSE: tl.constexpr, LEVELS: tl.constexpr, ALIGNED: tl.constexpr, PHASE_G: tl.constexpr,
    PHASE_O: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_g_n = tl.cast(stride_g_n, tl.int64)
    stride_g_t = tl.cast(stride_g_t, tl.int64)
    stride_g_d = tl.cast(stride_g_d, tl.int64)
    stride_f_l = tl.cast(stride_f_l, tl.int64)
    stride_f_d = tl.cast(stride_f_d, tl.int64)
    stride_x_n = tl.cast(stride_x_n, tl.int64)
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_i_l = tl.cast(stride_i_l, tl.int64)
    stride_i_d = tl.cast(stride_i_d, tl.int64)
    stride_o_n = tl.cast(stride_o_n, tl.int64)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = tl.cast(stride_o_d, tl.int64)

    # mapping of programs
    channel_blocks = tl.cdiv(dim, BLOCK_D)
    block_d = tl.program_id(0) % channel_blocks
    program = tl.program_id(0) // channel_blocks
    ch = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = ch < dim
    if LEVELS:  # the taps are under way while the row is looked for
        words = load_words(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
        bias_word = load_bias_word(bias, ch, in_dim, stride_b, HAS_BIAS)
    if FLAT:
        nothing = Items(None, None)
        facts = find_row(Rows(query_start_loc, nothing, nothing, batch, tokens), program, BLOCK_T, SEARCH)
        row, row_start, row_end = facts[0], facts[1], facts[2]
    else:
        row = program
        row_start = offset(query_start_loc, row, batch, tokens)
        row_end = offset(query_start_loc, row + 1, batch, tokens)
    number = row_start // BLOCK_T + row  # of the row's first block
    blocks = row_end // BLOCK_T + row + 1 - number  # numbers up to the next row's; the last may be no block
    if FLAT:
        block = program - number
        next_block = blocks  # a program has one block
    else:
        block = tl.program_id(1).to(row_start.dtype)
        next_block = tl.num_programs(1)
    if block < 0:
        return

    wide_row = row.to(tl.int64)
    wide_dim = tl.cast(dim, tl.int64)
    if DENSE:
        offset_g = wide_row * stride_g_n
        offset_x = wide_row * stride_x_n
        offset_o = wide_row * stride_o_n
    else:
        offset_g = row_start * stride_g_t
        offset_x = row_start * stride_x_t
        offset_o = row_start * stride_o_t
    if HAS_DFINAL:
        dfinal += wide_row * stride_f_n
    if HAS_INITIAL:
        initial_states += wide_row * stride_i_n
    if HAS_DINITIAL:
        dinitial += wide_row * (WIDTH - 1) * wide_dim
    length = row_end - row_start
    zero = tl.zeros([BLOCK_D], tl.float32)
    while block < blocks:
        first = block * BLOCK_T  # from the row's start
        last = first + tl.minimum(length - first, BLOCK_T)
        sums = ()
        for _ in tl.static_range(WIDTH + HAS_BIAS):
            sums = sums + (zero,)
        if (row < batch) & ((first < length) | (block == 0)):  # a row of zero tokens hands its state on
            if LEVELS:
                taps = unpack_taps(words, WIDTH, weight.dtype.element_ty)
                sums = _tile_back(
                    dout, dfinal, x, initial_states, dx, dinitial, offset_g, offset_x, offset_o, taps, widen(bias_word),
                    length, first, last, ch, in_dim, stride_g_t, stride_g_d, stride_f_l, stride_f_d, stride_x_t, stride_x_d,
                    stride_i_l, stride_i_d, stride_o_t, stride_o_d, wide_dim, WIDTH, SILU, HAS_BIAS, HAS_INITIAL,
                    HAS_DFINAL, HAS_DINITIAL, HAS_SUMS, PTX, GROUP, STAGES, LEVELS, ALIGNED, PHASE_G, PHASE_O,
                )  # fmt: skip
            else:
                taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
                start_value = load_bias(bias, ch, in_dim, stride_b, HAS_BIAS)
                sums = _walk_back(
                    dout + offset_g, dfinal, x + offset_x, initial_states, dx + offset_o, dinitial, taps, start_value,
                    length, first, last, ch, in_dim, sums, stride_g_t, stride_g_d, stride_f_l, stride_f_d,
                    stride_x_t, stride_x_d, stride_i_l, stride_i_d, stride_o_t, stride_o_d, wide_dim,
                    WIDTH, SILU, HAS_BIAS, HAS_INITIAL, HAS_DFINAL, HAS_DINITIAL, HAS_SUMS, PTX, GROUP,
                )  # fmt: skip
        else:
            ZEROS: tl.constexpr = GROUP if LEVELS else 1  # tokens at a time
            for t in range(first, last, ZEROS):
                token = t + tl.arange(0, ZEROS)[:, None]
                tl.store(
                    dx + offset_o + token * stride_o_t + ch[None, :] * stride_o_d,
                    tl.zeros([ZEROS, BLOCK_D], dx.dtype.element_ty),
                    mask=in_dim[None, :] & (token < last),
                )
        if HAS_SUMS:
            place = partial + (number + block) * (WIDTH + HAS_BIAS) * wide_dim + ch
            for j in tl.static_range(WIDTH + HAS_BIAS):
                # (a row of zero tokens has met its initial state, which may be NaN)
                tl.store(place + j * wide_dim, tl.where(first < length, sums[j], 0.0), mask=in_dim)
        block = next_block if FLAT else block + next_block


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


def run_of(x):
    """Tokens of x in 16 bytes of a channel where tokens have unit stride, for `_tile_back`; else 0, for `_walk_back`."""
    return 0 if walks(*x.stride()[-2:]) else 1 << levels(x)


def _runs_of(dout, x, dx):
    """The constants of `_tile_back` for these strides: the default ones of a walk where x has no unit token stride."""
    run = run_of(x)
    if not run:
        return dict(LEVELS=0, ALIGNED=False, PHASE_G=False, PHASE_O=False)

    def phase(tensor):
        """By how many tokens each step but that along tokens leaves a boundary of 16 bytes."""
        return [step % run for step in (*tensor.stride()[:-2], tensor.stride(-1))]

    def in_phase(tensor):
        return tensor.stride(-2) == 1 and phase(tensor) == phase(x)

    aligned = x.dim() == 3 and x.shape[1] % run == 0 and not any(phase(x))
    return dict(LEVELS=levels(x), ALIGNED=aligned, PHASE_G=in_phase(dout), PHASE_O=in_phase(dx))


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
):
    """Prepares both kernels for checked arguments of these shapes, strides and dtypes.

    Args:
      dout, x: [tokens, dim], or [batch, seqlen, dim] where every row of `query_start_loc` has seqlen tokens, both
        with any strides; dfinal: [batch, width-1, dim] or None; the others as in `causal_conv1d`.
      silu: whether the forward pass applied SiLU.
      need_sums: whether the gradients of weight and bias are wanted.
      need_initial: whether that of the initial states is.
      config: a BackwardConfig for x's layout.

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
        grid = ((batch + 1) * channel_blocks, min(max(config.row_blocks, 1), MAX_GRID_YZ), 1)
    no_rows = () if dense else (0,)
    dx = torch.empty_like(x, device="meta")
    strides = (
        *no_rows, *dout.stride(), stride(dfinal, 0), stride(dfinal, 1), stride(dfinal, 2), *no_rows, *x.stride(),
        *weight.stride(), stride(bias, 0), stride(initial_states, 0), stride(initial_states, 1), stride(initial_states, 2),
        *no_rows, *dx.stride(),
    )  # fmt: skip
    constants = dict(
        WIDTH=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INITIAL=initial_states is not None,
        HAS_DFINAL=dfinal is not None, HAS_DINITIAL=need_initial, HAS_SUMS=need_sums, FLAT=config.flat, PTX=NATIVE_PTX,
        WORD_BITS=word_bits(weight), BLOCK_T=config.block_t, BLOCK_D=config.block_d, GROUP=config.group,
        SEARCH=config.search, STAGES=config.stages, DENSE=dense, **_runs_of(dout, x, dx),
    )  # fmt: skip
    walk = Launch(
        _backward_kernel, grid, (tokens, dim, batch, *strides), constants,
        num_warps=config.num_warps,
    )  # fmt: skip
    block_d = min(_next_power_of_2(dim), 64)
    constants = dict(WIDTH=width, HAS_BIAS=bias is not None, ROWS=32, BLOCK_D=block_d)
    grid = (triton.cdiv(dim, block_d), width + (bias is not None), 1)
    return places, walk, Launch(_reduce_kernel, grid, (places, dim), constants, num_warps=4)
