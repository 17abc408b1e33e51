"""Gradients of a packed convolution: one pass over the tokens, and a second, small one over partial sums.

A program owns BLOCK_T tokens of one row and BLOCK_D channels. It reads them once, and `width-1` tokens further:
it recomputes the pre-activation and from it `g = dout * act'(pre)`; the last `width` values of g give the gradient
of the input `width-1` tokens back, or, at the start of a row, of an entry of the initial state. Nothing of
the forward pass is needed but its inputs.

The layout of x alone chooses between two ways, both right for any strides of dout and with the same operations in the
same order for every element of dx. `_walk_back`: lanes are channels, and a program walks along its tokens. `_tile_back`,
where tokens have unit stride (channel-first memory): lanes are runs of 16 bytes along a channel, so that a warp reads
one stretch of memory; runs are taken apart in registers.

Of a gated convolution x is the product of two slices of a projection, and the gradients of all three take their places in
the projection's: C's with the token itself, B's and x's with the entry that the token completes.

The mapping of programs is that of `prefill`. Block k of row s has the number `query_start_loc[s] // BLOCK_T + s + k` in
both schedules and leaves its sums for weight and bias in that place of a float32 workspace; numbers that no block
has get zeros. A second kernel adds the places up in their order, so the sums have the same bits in every run
and in both schedules.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl.arithmetic import (
    convolve,
    join_columns,
    load_input,
    load_taps,
    load_weights,
    native_ptx,
    normalise_back,
    round_to,
    rounded,
    silu_and_slope,
    silu_slope,
    split_columns,
    widen,
    word_bits,
)
from triton_impl.config import MAX_GRID_YZ, PROGRAMS_AT_ONCE, next_power_of_2, walks
from triton_impl.launch import Launch
from triton_impl.prefill import levels
from triton_impl.records import (
    Channels,
    Items,
    Rows,
    Tokens,
    at,
    behind,
    constants,
    holds,
    strides_record,
    tokens_of,
)
from triton_impl.rows import begun, find_row, load_mark, offset, same_document


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
        block_d = min(block_d, next_power_of_2(max(dim, 1)))
        group, num_warps = lanes * run, max(lanes * block_d // warp_size, 1)
        block_t, least = longest * group, group
    else:
        vector = 2  # channels a thread: inputs, g, taps and sums of each lie in registers
        block_d = min(max(next_power_of_2(dim), warp_size), 2 * warp_size * vector)
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


Strides = strides_record("dout", "dfinal", "x", "weight", "bias", "initial_states", "dx")  # of rows first


class Options(NamedTuple):
    """What the kernel is compiled for: the call's options, then a BackwardConfig and what follows from layouts.

    Attributes:
      sums: whether the gradients of weight and bias are wanted; bias: whether there is one.
      dense: whether rows have an axis of their own.
      levels: log2 of a run's tokens for `_tile_back`, 0 for `_walk_back`.
      aligned, phase_g, phase_o: see `_tile_back`.
      norm: an `arithmetic.Norm` of what `dout` is the gradient of, or None.
      gate, gate_out: of a gated convolution, whose x is walked, how many elements from x and dx B lies and C; or None.
    """

    width: Any
    silu: Any
    bias: Any
    sums: Any
    word_bits: Any
    flat: Any
    block_t: Any
    block_d: Any
    group: Any
    search: Any
    stages: Any
    dense: Any
    levels: Any
    aligned: Any
    phase_g: Any
    phase_o: Any
    ptx: Any
    norm: Any = None
    gate: Any = None
    gate_out: Any = None


class Gates(NamedTuple):
    """Where B and C lie in a projection, in elements from x; like: the projection, whose gradient is laid out as torch.empty_like."""

    of_x: int
    of_out: int
    like: Any


class Arrays(NamedTuple):
    """A row's arrays, `Tokens`; of the states, columns in tokens' place; its marks of documents. Absent ones are None."""

    dout: Any
    dfinal: Any
    x: Any
    initial: Any
    dx: Any
    dinitial: Any
    marks: Any


class Given(NamedTuple):
    """What a backward pass reads besides dout; pointers, None where absent."""

    dfinal: Any
    x: Any
    weight: Any
    bias: Any
    initial_states: Any
    query_start_loc: Any
    document_marks: Any


class Results(NamedTuple):
    """What it writes; pointers, None where absent."""

    dx: Any
    dinitial: Any
    partial: Any


class Span(NamedTuple):
    """Tokens [first, last) of a row of `length`."""

    length: Any
    first: Any
    last: Any


class Taps(NamedTuple):
    """The taps oldest first, the same newest first, and the bias."""

    taps: Any
    flipped: Any
    start: Any


@triton.jit
def _moved(array, offset):
    return Tokens(array.ptr + offset, array.t, array.d)


@triton.jit
def _zero_tokens(dx, first, last, channels, count: tl.constexpr):
    """Zeros for tokens [first, last), `count` at a time; the pointers are carried along, as in `rows.zero_tail`."""
    token = first + tl.arange(0, count)[:, None]
    target = dx.ptr + token * dx.t + channels.index[None, :] * dx.d
    zero = tl.zeros(target.shape, dx.ptr.dtype.element_ty)
    for _ in range(first, last, count):
        tl.store(target, zero, mask=channels.exist[None, :] & (token < last))
        token += count
        target += count * dx.t


@triton.jit
def _taps_of(weights, o: tl.constexpr):
    taps, start = load_taps(weights, o)
    flipped = ()
    for j in tl.static_range(o.width):
        flipped = flipped + (taps[o.width - 1 - j],)
    return Taps(taps, flipped, start)


@triton.jit
def _gradient(window, weights, upstream, here, dtype: tl.constexpr, o: tl.constexpr):
    """The gradient of one pre-activation; zero where the token is not `here`, in the row. dtype: of x, and of results."""
    g = upstream
    if o.norm is not None:
        value = convolve(window, weights.taps, weights.start, o.width)
        if o.silu:
            value, slope = silu_and_slope(value, o)
        if o.norm.stored:
            value = rounded(value, dtype, o)
        g = normalise_back(value, g, o.norm, o)
        if o.silu:
            g = g * slope
        g = tl.where(here, g, 0.0)
    elif o.silu:
        slope = silu_slope(convolve(window, weights.taps, weights.start, o.width), o)
        g = tl.where(here, g * slope, 0.0)
    return g


@triton.jit
def _gated_gradient(window, weights, upstream, gate, here, dtype: tl.constexpr, o: tl.constexpr):
    """`_gradient` behind a gate, and the gradient of that."""
    value = convolve(window, weights.taps, weights.start, o.width)
    g = upstream * gate
    if o.silu:
        value, slope = silu_and_slope(value, o)
        g = g * slope
    return tl.where(here, g, 0.0), upstream * rounded(value, dtype, o)


@triton.jit
def _add_products(sums, window, g, o: tl.constexpr):
    """Adds one token to the sums of every tap and of the bias."""
    new = ()
    for j in tl.static_range(o.width):
        new = new + (tl.fma(window[j], g, sums[j]),)
    if o.bias:
        new = new + (sums[o.width] + g,)
    return new


@triton.jit
def _load_final(late, column, exist, like, o: tl.constexpr):
    """What comes in through column `column` of the final state; zeros for a column that it does not have."""
    value = tl.zeros_like(like)
    if late is not None:
        value = widen(tl.load(late, mask=exist & holds(column >= 0) & holds(column < o.width - 1), other=0.0))
    return value


@triton.jit
def _walk_first(arrays, weights, span, channels, sums, adds: tl.constexpr, o: tl.constexpr):
    """The first width-1 tokens from `first`: the inputs whose gradient they complete are the initial state's, or another
    block's.

    Returns:
      The last width-1 inputs and values of g; `sums` with a row's first tokens added, if it `adds`; where x and dout go on.
    """
    length, first, _ = span
    exist = channels.exist
    # the width-1 inputs before `first`, the width-1 values of g before it (of no use yet)
    window = ()
    gs = ()
    in_row = first > 0
    mark = None
    if arrays.marks is not None:
        mark = load_mark(arrays.marks, first)
    source = at(arrays.x, first - (o.width - 1), channels)
    for j in tl.static_range(o.width - 1):
        if mark is not None:
            window = begun(window, j, mark, 8 + j - (o.width - 1))
        wanted = exist & holds(in_row) & holds(first + (j - o.width + 1) < length)
        past = widen(load_input(source, wanted, o))
        source += arrays.x.t  # carried along, which needs fewer registers than a product a token
        if arrays.initial is not None:
            kept = tl.load(at(arrays.initial, first + j, channels), mask=exist & holds(first == 0), other=0.0)
            past = tl.where(in_row, past, widen(kept))
        window = window + (past,)
        gs = gs + (tl.zeros_like(weights.start),)

    incoming = at(arrays.dout, first, channels)
    late = None
    if arrays.dfinal is not None:
        late = at(arrays.dfinal, first - length, channels)
    dtype: tl.constexpr = arrays.x.ptr.dtype.element_ty
    for i in tl.static_range(o.width - 1):
        here = first + i < length
        entry = load_input(source, exist & holds(here), o)
        if o.gate is not None:
            gate = widen(tl.load(source + o.gate_out, mask=exist & holds(here), other=0.0))
        source += arrays.x.t
        upstream = tl.load(incoming, mask=exist & holds(here), other=0.0)
        incoming += arrays.dout.t
        if mark is not None:
            window = begun(window, o.width - 1, mark, 8 + i)
        window = window + (widen(entry),)
        if o.gate is None:
            g = _gradient(window, weights, widen(upstream), here, dtype, o)
        else:
            g, dgate = _gated_gradient(window, weights, widen(upstream), gate, here, dtype, o)
            place = at(arrays.dx, first + i, channels) + o.gate_out
            tl.store(place, round_to(dgate, dtype), mask=exist & holds(first + i < span.last))
        gs = gs + (g,)
        if arrays.dinitial is not None:
            begin = _load_final(late, first + i - length, exist, weights.start, o)
            own = gs
            if mark is not None:
                own = same_document(gs, o.width, mark, 8 + i - (o.width - 1))
            kept = round_to(
                convolve(own, weights.flipped, begin, o.width), arrays.dinitial.ptr.dtype.element_ty
            )
            tl.store(at(arrays.dinitial, i, channels), kept, mask=exist & holds(first == 0))
        if late is not None:
            late += arrays.dfinal.t
        if adds:
            if first == 0:
                sums = _add_products(sums, window, g, o)
        window = window[1:]
        gs = gs[1:]
    return window, gs, sums, source, incoming


@triton.jit
def _load_group(arrays, source, incoming, t, end, exist, o: tl.constexpr):
    """x and dout of the tokens before `end` of the group that begins width-1 behind t, and where both go on.

    With gates also C of those tokens, and x and B of the tokens from t on.
    """
    loaded = ()
    for i in tl.static_range(o.group):
        wanted = exist & holds(t + (o.width - 1 + i) < end)
        entry = load_input(source, wanted, o)
        gates = ()
        if o.gate is not None:
            own = exist & holds(t + i < end)
            done = source - (o.width - 1) * arrays.x.t
            gates = (
                tl.load(source + o.gate_out, mask=wanted, other=0.0),
                tl.load(done, mask=own, other=0.0),
                tl.load(done + o.gate, mask=own, other=0.0),
            )
        source += arrays.x.t
        upstream = tl.load(incoming, mask=wanted, other=0.0)
        incoming += arrays.dout.t
        loaded = loaded + (entry, upstream) + gates
    return loaded, source, incoming


@triton.jit
def _walk_back(arrays, weights, span, channels, sums, o: tl.constexpr):
    """The tokens of a span, one vector of channels a token.

    Returns:
      `sums` with the tokens added that it completes others with: from width-1 behind the span's first to width-1 behind its
      last, and a row's first ones.
    """
    length, first, last = span
    window, gs, sums, source, incoming = _walk_first(arrays, weights, span, channels, sums, o.sums, o)
    per: tl.constexpr = 2 if o.gate is None else 5  # values a token that are loaded
    dtype: tl.constexpr = arrays.x.ptr.dtype.element_ty

    # token t + width-1 completes the gradient of token t
    target = at(arrays.dx, first, channels)
    late = None
    if arrays.dfinal is not None:
        late = at(arrays.dfinal, first - length + (o.width - 1), channels)
    if o.stages > 1:
        ahead, source, incoming = _load_group(arrays, source, incoming, first, length, channels.exist, o)
    for t in tl.range(first, last, o.group):
        mark = None
        if arrays.marks is not None:
            mark = load_mark(arrays.marks, t)
        if o.stages > 1:
            loaded = ahead
            end = tl.minimum(length, last + (o.width - 1))
            ahead, source, incoming = _load_group(
                arrays, source, incoming, t + o.group, end, channels.exist, o
            )
        else:
            loaded, source, incoming = _load_group(arrays, source, incoming, t, length, channels.exist, o)
        for i in tl.static_range(o.group):
            new = t + (o.width - 1 + i)
            if mark is not None:
                window = begun(window, o.width - 1, mark, 8 + o.width - 1 + i)
            window = window + (widen(loaded[per * i]),)
            upstream = widen(loaded[per * i + 1])
            if o.gate is None:
                g = _gradient(window, weights, upstream, new < length, dtype, o)
            else:
                gate = widen(loaded[per * i + 2])
                g, dgate = _gated_gradient(window, weights, upstream, gate, new < length, dtype, o)
                place = target + (o.width - 1) * arrays.dx.t + o.gate_out
                tl.store(place, round_to(dgate, dtype), mask=channels.exist & holds(new < last))
            gs = gs + (g,)
            # (64 bits: else ptxas takes more than 128 registers on sm_80)
            begin = _load_final(late, tl.cast(new, tl.int64) - length, channels.exist, weights.start, o)
            if late is not None:
                late += arrays.dfinal.t
            own = gs
            if mark is not None:
                own = same_document(gs, o.width, mark, 8 + i)
            value = convolve(own, weights.flipped, begin, o.width)
            here = channels.exist & holds(t + i < last)
            if o.gate is not None:
                tl.store(target + o.gate, round_to(value * widen(loaded[per * i + 3]), dtype), mask=here)
                value = value * widen(loaded[per * i + 4])
            tl.store(target, round_to(value, target.dtype.element_ty), mask=here)
            target += arrays.dx.t
            if o.sums:
                sums = _add_products(sums, window, g, o)
            window = window[1:]
            gs = gs[1:]
    return sums


@triton.jit
def _runs(array, offset, run, channels, shift, in_phase: tl.constexpr, o: tl.constexpr):
    """Where runs begin, [runs, channels], if the first begins `shift` tokens before `offset`, as `Tokens`.

    In phase: that is a boundary of 16 bytes of every channel, which the compiler is told.
    """
    start = offset + channels.index * array.d
    if in_phase:
        pointers = array.ptr + (((start >> o.levels)[None, :] + run[:, None]) << o.levels)
    else:
        pointers = array.ptr + start[None, :] + ((run << o.levels)[:, None] - shift) * array.t
    return Tokens(pointers, array.t, array.d)


@triton.jit
def _in_row(before, left, first, i, exist, edge: tl.constexpr, whole: tl.constexpr):
    """Which of the tokens first + i of every run are a row's, if `before` tokens of it lie before the run, `left` behind.

    Edge: not all are; whole: all or none of a run.
    """
    wanted = exist[None, :, None]
    if edge:
        if whole:
            wanted = wanted & ((before >= -first) & (left > first))[:, :, None]
        else:
            wanted = wanted & (before[:, :, None] >= -first - i) & (left[:, :, None] > first + i)
    return wanted


@triton.jit
def _load_runs(
    runs,
    before,
    left,
    first: tl.constexpr,
    exist,
    levels: tl.constexpr,
    edge: tl.constexpr,
    whole: tl.constexpr,
):
    """2**levels tokens from `first` behind each run's start, as a tuple of [runs, channels]; zeros outside the row."""
    i = tl.arange(0, 1 << levels)[None, None, :]
    wanted = _in_row(before, left, first, i, exist, edge, whole)
    return split_columns(tl.load(runs.ptr[:, :, None] + (first + i) * runs.t, mask=wanted, other=0.0), levels)


@triton.jit
def _tile_step(runs, weights, length, t, token, channels, sums, edge: tl.constexpr, o: tl.constexpr):
    """A run of every lane at tokens t + `token`; returns `sums` with theirs added.

    Edge: the runs or the tokens read around them may lie outside the row.
    """
    RUN: tl.constexpr = 1 << o.levels
    HALO_LEVELS: tl.constexpr = 0 if o.width < 3 else 1 if o.width == 3 else 2 if o.width < 6 else 3
    HALO: tl.constexpr = 1 << HALO_LEVELS
    WHOLE: tl.constexpr = o.aligned and o.levels >= HALO_LEVELS
    exist = channels.exist
    # tokens from the row's start to each run, and from there to its end
    before = tl.minimum(t, 1 << 30).to(tl.int32) + token
    left = tl.minimum(length - t, 1 << 30).to(tl.int32) - token
    x, dout = behind(runs.x, t), behind(runs.dout, t)

    # the width-1 inputs before each run, the run, width-1 tokens behind it; all are asked for before any is used
    entries = _load_runs(x, before, left, 0, exist, o.levels, edge, o.aligned)
    upstream = _load_runs(dout, before, left, 0, exist, o.levels, edge, o.aligned)
    if o.width > 1:
        earlier = _load_runs(x, before, left, -HALO, exist, HALO_LEVELS, edge, WHOLE)
        later = _load_runs(x, before, left, RUN, exist, HALO_LEVELS, edge, WHOLE)
        entries = earlier[HALO - (o.width - 1) :] + entries + later[: o.width - 1]
        later = _load_runs(dout, before, left, RUN, exist, HALO_LEVELS, edge, WHOLE)
        upstream = upstream + later[: o.width - 1]
    held = ()
    late = ()
    if edge:
        for c in tl.static_range(o.width - 1):
            if runs.initial is not None:
                kept = tl.load(at(runs.initial, c, channels), mask=exist, other=0.0)
                held = held + (widen(kept)[None, :],)
            if runs.dfinal is not None:
                kept = tl.load(at(runs.dfinal, c, channels), mask=exist, other=0.0)
                late = late + (widen(kept)[None, :],)
    inputs = ()
    for k in tl.static_range(RUN + 2 * (o.width - 1)):
        entry = widen(entries[k])
        if edge and runs.initial is not None:
            for c in tl.static_range(o.width - 1):
                if (c - k) % RUN == 0 if o.aligned else c - k > -RUN:  # else it is no run's
                    entry = tl.where(before == c - k, held[c], entry)
        inputs = inputs + (entry,)

    gs = ()
    for k in tl.static_range(RUN + o.width - 1):
        here = True
        if edge:
            here = (before >= -k) & (left > k)
        g = _gradient(inputs[k : k + o.width], weights, widen(upstream[k]), here, entries[0].dtype, o)
        gs = gs + (g,)

    columns = ()
    for k in tl.static_range(RUN):
        window = gs[k : k + o.width]
        begin = tl.zeros_like(gs[k])
        if edge and runs.dfinal is not None:
            for c in tl.static_range(o.width - 1):
                if (k + o.width - 1 - c) % RUN == 0 or not o.aligned:
                    begin = tl.where(left == k + o.width - 1 - c, late[c], begin)
        value = convolve(window, weights.flipped, begin, o.width)
        columns = columns + (round_to(value, runs.dx.ptr.dtype.element_ty),)
        if o.sums:
            sums = _add_products(sums, inputs[k : k + o.width], gs[k], o)

    i = tl.arange(0, RUN)[None, None, :]
    wanted = _in_row(before, left, 0, i, exist, edge, o.aligned)
    target = behind(runs.dx, t).ptr[:, :, None] + i * runs.dx.t
    tl.store(target, join_columns(columns, o.levels), mask=wanted)
    return sums


@triton.jit
def _tile_back(arrays, offsets, weights, span, channels, o: tl.constexpr):
    """The tokens of a span, by runs of 16 bytes of a channel; returns their sums.

    `offsets` of dout, x and dx to the row. In every channel runs lie on the boundaries of 16 bytes of x, so that the
    program's tokens begin up to a run before `first` and, if the row goes on, end as much before `last`. Aligned: all
    rows begin and end on such boundaries. phase_g, phase_o: dout's or dx's tokens lie to them as x's do.
    """
    length, first, last = span
    RUN: tl.constexpr = 1 << o.levels
    HALO_LEVELS: tl.constexpr = 0 if o.width < 3 else 1 if o.width == 3 else 2 if o.width < 6 else 3
    HALO: tl.constexpr = 0 if o.width == 1 else 1 << HALO_LEVELS
    SLACK: tl.constexpr = 0 if o.aligned else RUN - 1
    if arrays.dinitial is not None:
        if first == 0:
            here = Arrays(
                _moved(arrays.dout, offsets[0]),
                arrays.dfinal,
                _moved(arrays.x, offsets[1]),
                arrays.initial,
                _moved(arrays.dx, offsets[2]),
                arrays.dinitial,
                None,
            )
            _walk_first(here, weights, span, channels, (), False, o)
    # axes: runs, channels, and in loads and stores tokens; lanes lie along the first
    run = tl.arange(0, o.group // RUN)
    token = (run << o.levels)[:, None]
    shift = 0
    if not o.aligned:
        shift = ((offsets[1] + channels.index * arrays.x.d) & (RUN - 1)).to(tl.int32)[None, :]
        token -= shift
    runs = Arrays(
        _runs(arrays.dout, offsets[0], run, channels, shift, o.phase_g, o),
        arrays.dfinal,
        _runs(Tokens(arrays.x.ptr, 1, arrays.x.d), offsets[1], run, channels, shift, True, o),
        arrays.initial,
        _runs(arrays.dx, offsets[2], run, channels, shift, o.phase_o, o),
        None,
        None,
    )
    taps = ()
    flipped = ()
    for j in tl.static_range(o.width):
        taps = taps + (weights.taps[j][None, :],)
        flipped = flipped + (weights.flipped[j][None, :],)
    wide = Taps(taps, flipped, weights.start[None, :])
    sums = ()
    for _ in tl.static_range(o.width + o.bias):
        sums = sums + (tl.zeros([o.group // RUN, o.block_d], tl.float32),)

    # steps before `low` and from `high` on may touch what is not the row's; they come first
    steps = (last - first + (o.group - 1)) // o.group
    if last == length:
        steps = (last - first + (o.group - 1 + SLACK)) // o.group
    low = tl.minimum((tl.maximum(HALO + SLACK - first, 0) + (o.group - 1)) // o.group, steps)
    high = tl.minimum(tl.maximum(tl.maximum(length - HALO - first, 0) // o.group, low), steps)
    inner = (high - low) * o.group
    t = first + tl.where(low == 0, inner, 0)  # carried along, as in `rows.zero_tail`
    for step in range(low + steps - high):
        sums = _tile_step(runs, wide, length, t, token, channels, sums, True, o)
        t += o.group + tl.where(step + 1 == low, inner, 0)
    t = first + low * o.group
    for _ in tl.range(low, high, num_stages=o.stages):
        sums = _tile_step(runs, wide, length, t, token, channels, sums, False, o)
        t += o.group
    totals = ()
    for j in tl.static_range(o.width + o.bias):
        totals = totals + (tl.sum(sums[j], axis=0),)
    return totals


@triton.jit
def back_of_program(
    dout, dout_row, given, results, strides, program, channels, tokens, dim, batch, o: tl.constexpr
):
    """The gradients of a program's rows and channels.

    Args:
      dout: `Tokens` of the upstream gradient; dout_row: its stride of rows, where they have an axis of their own.
      given: `Given`; results: `Results`.
    """
    x, weight, bias, initial_states = given.x, given.weight, given.bias, given.initial_states
    dfinal, query_start_loc = given.dfinal, given.query_start_loc
    dx, dinitial, partial = results.dx, results.dinitial, results.partial
    ch = channels.index
    if o.levels:  # the taps are under way while the row is looked for
        weights = load_weights(weight, bias, strides, channels, o)
    if o.flat:
        nothing = Items(None, None)
        facts = find_row(Rows(query_start_loc, nothing, nothing, batch, tokens), program, o.block_t, o.search)
        row, row_start, row_end = facts[0], facts[1], facts[2]
    else:
        row = program
        row_start = offset(query_start_loc, row, batch, tokens)
        row_end = offset(query_start_loc, row + 1, batch, tokens)
    number = row_start // o.block_t + row  # of the row's first block
    blocks = row_end // o.block_t + row + 1 - number  # numbers up to the next row's; the last may be no block
    if o.flat:
        block = program - number
        next_block = blocks  # a program has one block
    else:
        block = tl.program_id(1).to(row_start.dtype)
        next_block = tl.num_programs(1)
    block = tl.where(block < 0, blocks, block)  # none

    wide_row = row.to(tl.int64)
    wide_dim = tl.cast(dim, tl.int64)
    dx = tokens_of(dx, strides.dx[1:])
    x = tokens_of(x, strides.x[1:])
    if o.dense:
        offsets = (wide_row * dout_row, wide_row * strides.x[0], wide_row * strides.dx[0])
    else:
        offsets = (row_start * dout.t, row_start * x.t, row_start * dx.t)
    late = None
    if dfinal is not None:
        late = tokens_of(dfinal + wide_row * strides.dfinal[0], strides.dfinal[1:])
    initial = None
    if initial_states is not None:
        initial = tokens_of(initial_states + wide_row * strides.initial_states[0], strides.initial_states[1:])
    result = None
    if dinitial is not None:
        result = Tokens(dinitial + wide_row * (o.width - 1) * wide_dim, wide_dim, 1)
    marks = None
    if given.document_marks is not None:
        marks = given.document_marks + wide_row * (((row_end - row_start) >> 3) + 2)
    arrays = Arrays(dout, late, x, initial, dx, result, marks)
    length = row_end - row_start
    zero = tl.zeros([o.block_d], tl.float32)
    while block < blocks:
        first = block * o.block_t  # from the row's start
        span = Span(length, first, first + tl.minimum(length - first, o.block_t))
        sums = ()
        for _ in tl.static_range(o.width + o.bias):
            sums = sums + (zero,)
        if (row < batch) & ((first < length) | (block == 0)):  # a row of zero tokens hands its state on
            if o.levels:
                sums = _tile_back(arrays, offsets, _taps_of(weights, o), span, channels, o)
            else:
                taps = _taps_of(load_weights(weight, bias, strides, channels, o), o)
                here = Arrays(
                    _moved(dout, offsets[0]),
                    late,
                    _moved(x, offsets[1]),
                    initial,
                    _moved(dx, offsets[2]),
                    result,
                    marks,
                )
                sums = _walk_back(here, taps, span, channels, sums, o)
        else:
            zeros: tl.constexpr = o.group if o.levels else 1  # tokens at a time
            _zero_tokens(_moved(dx, offsets[2]), first, span.last, channels, zeros)
            if o.gate is not None:
                _zero_tokens(_moved(dx, offsets[2] + o.gate), first, span.last, channels, zeros)
                _zero_tokens(_moved(dx, offsets[2] + o.gate_out), first, span.last, channels, zeros)
        if o.sums:
            place = partial + (number + block) * (o.width + o.bias) * wide_dim + ch
            for j in tl.static_range(o.width + o.bias):
                # (a row of zero tokens has met its initial state, which may be NaN; the walk of 3.8 spills `first`)
                met = first < length if o.levels or o.dense else length > 0
                tl.store(place + j * wide_dim, tl.where(met, sums[j], 0.0), mask=channels.exist)
        block = next_block if o.flat else block + next_block


@triton.jit(do_not_specialize=["tokens", "batch"])
def _backward_kernel(
    dout, dfinal, x, weight, bias, initial_states, query_start_loc, dx, dinitial, partial, document_marks,
    strides, tokens, dim, batch, o: tl.constexpr,
):  # fmt: skip
    # mapping of programs
    channel_blocks = tl.cdiv(dim, o.block_d)
    block_d = tl.program_id(0) % channel_blocks
    program = tl.program_id(0) // channel_blocks
    ch = block_d * o.block_d + tl.arange(0, o.block_d)
    back_of_program(
        tokens_of(dout, strides.dout[1:]), strides.dout[0],
        Given(dfinal, x, weight, bias, initial_states, query_start_loc, document_marks),
        Results(dx, dinitial, partial), strides, program, Channels(ch, ch < dim), tokens, dim, batch, o,
    )  # fmt: skip


class Sums(NamedTuple):
    """What the second kernel is compiled for; rows: places added up at a time."""

    width: Any
    bias: Any
    rows: Any
    block_d: Any


@triton.jit(do_not_specialize=["places"])
def _reduce_kernel(partial, dweight, dbias, places, dim, o: tl.constexpr):
    """Adds up the places of the workspace, for one tap (or the bias) and block_d channels."""
    tap = tl.program_id(1)
    ch = tl.program_id(0).to(tl.int64) * o.block_d + tl.arange(0, o.block_d)
    in_dim = ch < dim
    lane = tl.arange(0, o.rows)
    acc = tl.zeros([o.rows, o.block_d], tl.float32)
    for first in range(0, places, o.rows):
        row = (first + lane).to(tl.int64) * (o.width + o.bias) + tap
        acc += tl.load(
            partial + row[:, None] * dim + ch[None, :],
            mask=(first + lane < places)[:, None] & in_dim[None, :],
            other=0.0,
        )
    total = tl.sum(acc, axis=0)
    if tap < o.width:
        tl.store(dweight + ch * o.width + tap, round_to(total, dweight.dtype.element_ty), mask=in_dim)
    else:
        if o.bias:
            tl.store(dbias + ch, round_to(total, dbias.dtype.element_ty), mask=in_dim)


def run_of(x):
    """Tokens of x in 16 bytes of a channel where tokens have unit stride, for `_tile_back`; else 0, for `_walk_back`."""
    return 0 if walks(*x.stride()[-2:]) else 1 << levels(x)


def _phases(dout, x, dx):
    """The options levels, aligned, phase_g and phase_o for these strides: all 0 for a walk, where x has no unit token stride."""
    run = run_of(x)
    if not run:
        return 0, False, False, False

    def phase(tensor):
        """By how many tokens each step but that along tokens leaves a boundary of 16 bytes."""
        return [step % run for step in (*tensor.stride()[:-2], tensor.stride(-1))]

    def in_phase(tensor):
        return tensor.stride(-2) == 1 and phase(tensor) == phase(x)

    aligned = x.dim() == 3 and x.shape[1] % run == 0 and not any(phase(x))
    return levels(x), aligned, in_phase(dout), in_phase(dx)


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
    config,
    documents=False,
    gates=None,
):
    """Prepares both kernels for checked arguments of these shapes, strides and dtypes.

    Args:
      dout, x: [tokens, dim], or [batch, seqlen, dim] where every row of `query_start_loc` has seqlen tokens, both
        with any strides; dfinal: [batch, width-1, dim] or None; the others as in `causal_conv1d`.
      silu: whether the forward pass applied SiLU.
      need_sums: whether the gradients of weight and bias are wanted.
      config: a BackwardConfig for x's layout.
      documents: whether the rows of x, which is walked, hold several.
      gates: `Gates` of a gated convolution, of whose projection x is a slice; dx is one as well.

    Returns:
      (the number of places in the workspace, a Launch of (dout, dfinal, x, weight, bias, initial_states,
      query_start_loc, dx, dinitial, workspace, with documents their `packed_rows.document_marks`), a Launch of (workspace, dweight, dbias)). dx is laid out as
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
    dx = torch.empty_like(x if gates is None else gates.like, device="meta")
    strides = Strides(
        dout=(*no_rows, *dout.stride()),
        dfinal=None if dfinal is None else dfinal.stride(),
        x=(*no_rows, *x.stride()),
        weight=weight.stride(),
        bias=None if bias is None else bias.stride(0),
        initial_states=None if initial_states is None else initial_states.stride(),
        dx=(*no_rows, *dx.stride()),
    )
    run_levels, aligned, phase_g, phase_o = _phases(dout, x, dx)
    options = Options(
        width=width,
        silu=silu,
        bias=bias is not None,
        sums=need_sums,
        word_bits=word_bits(weight),
        flat=config.flat,
        block_t=config.block_t,
        block_d=config.block_d,
        group=config.group,
        search=config.search,
        stages=config.stages,
        dense=dense,
        levels=run_levels,
        aligned=aligned,
        phase_g=phase_g,
        phase_o=phase_o,
        ptx=native_ptx(),
        gate=None if gates is None else gates.of_x,
        gate_out=None if gates is None else gates.of_out,
    )
    values = (*(() if documents else (None,)), strides, tokens, dim, batch, constants(options))
    walk = Launch(_backward_kernel, grid, values, num_warps=config.num_warps)
    return places, walk, prepare_sums(width, bias is not None, dim, places)


def prepare_sums(width, bias, dim, places):
    """Prepares the sum over the workspace: a Launch of (workspace, dweight, dbias)."""
    sums = Sums(width, bias, rows=32, block_d=min(next_power_of_2(dim), 64))
    grid = (triton.cdiv(dim, sums.block_d), width + sums.bias, 1)
    return Launch(_reduce_kernel, grid, (places, dim, constants(sums)), num_warps=4)
