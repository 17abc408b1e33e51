"""Packed prefill of rows of few tokens, as many as `max_seqlen` says: a program has whole rows.

Nobody looks for a row, and nothing is read twice: a row's window and its tokens are asked for at once and stay in
registers until the new window is left. A token that the row does not have costs a branch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl.arithmetic import (
    activate,
    convolve,
    join_residual,
    load_input,
    load_taps,
    load_weights,
    native_ptx,
    recast,
    round_to,
    word_bits,
)
from triton_impl.launch import (
    Launch,
    known_pad,
    like_result,
    overlaps,
    program_grid,
    strides_of,
    wait_for_inputs,
)
from triton_impl.prefill import ARRAYS, Strides, inputs_before, slot_in_layout
from triton_impl.records import Channels, Items, Row, Rows, at, constants, holds, tokens_of
from triton_impl.rows import channel_block_and_place, row_facts, zero_tail
from triton_impl.slots import column, is_slot, part_of_out, split_blocks, store_window


class Options(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
      stores, sizes, align, gate: as of `prefill.Options`.
      rows, block_t, block_d: as of `config.ShortRowsConfig`.
    """

    width: Any
    silu: Any
    layout: Any
    stores: Any
    sizes: Any
    align: Any
    word_bits: Any
    folded: Any
    rows: Any
    block_t: Any
    block_d: Any
    ptx: Any
    hip: Any
    gate: Any = None
    overlap: Any = None


@triton.jit
def _window_of(row, channels, dtype: tl.constexpr, o: tl.constexpr):
    """A row's window as it was left in its slot; zeros without a state."""
    window = ()
    for j in tl.static_range(o.width - 1):
        entry = tl.zeros(channels.index.shape, dtype)
        if row.past is not None:
            wanted = channels.exist & holds(row.live & row.has_state)
            entry = recast(tl.load(column(row.past, j, channels, o), mask=wanted, other=0.0), dtype)
        window = window + (entry,)
    return window


@triton.jit
def _tokens_at(x, row, t, channels, dtype: tl.constexpr, o: tl.constexpr):
    """The block of a row's tokens from token t on, all asked for at once; zeros behind the row's end."""
    tokens = ()
    source = at(x, t, channels)
    for i in tl.static_range(o.block_t):
        wanted = channels.exist & holds(row.live & (t + i < row.end))
        tokens = tokens + (recast(load_input(source, wanted, o), dtype),)
        source += x.t
    return tokens


@triton.jit
def _output(inputs, residual, out, t, row, channels, weights, o: tl.constexpr):
    """Token t's output from its width inputs; zeros in a row that is not live."""
    taps, start = load_taps(weights, o)
    value = activate(convolve(inputs, taps, start, o.width), o)
    if residual is not None:
        value = join_residual(value, tl.load(at(residual, t, channels), mask=channels.exist, other=0.0), o)
    value = round_to(tl.where(row.live, value, 0.0), out.ptr.dtype.element_ty)
    tl.store(at(out, t, channels), value, mask=channels.exist)


@triton.jit
def _leave_row(x, residual, out, row, inputs, channels, weights, o: tl.constexpr):
    """A row's outputs and then its new window, `inputs` its old window and first tokens."""
    length = row.end - row.start
    some = Channels(channels.index, channels.exist & holds(row.live))
    for i in tl.static_range(o.block_t):
        if i < length:
            _output(inputs[i : i + o.width], residual, out, row.start + i, row, channels, weights, o)
            if o.stores and o.width > 1:
                if i + 1 == length:
                    store_window(row.slot, inputs[i + 1 : i + o.width], some, o.width - 1)
    dtype: tl.constexpr = inputs[0].dtype
    # what `max_seqlen` did not count, one token after the other and nothing kept in registers
    for t in range(row.start + o.block_t, row.end):
        again = inputs_before(x, row, t + 1, o.width, some, dtype, o)
        _output(again, residual, out, t, row, channels, weights, o)
    if o.stores and o.width > 1:
        if length > o.block_t:
            window = inputs_before(x, row, row.end, o.width - 1, some, row.slot.ptr.dtype.element_ty, o)
            tl.debug_barrier()  # all reads of the slot precede all writes
            store_window(row.slot, window, some, o.width - 1)


@triton.jit(
    do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "channel_blocks", "tails"]
)
def _short_rows_kernel(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, residual, out,
    strides, tokens, dim, batch, num_slots, state_len, pad_slot_id, channel_blocks, tails, o: tl.constexpr,
):  # fmt: skip
    x, out = tokens_of(x, strides.x), tokens_of(out, strides.out)
    if residual is not None:
        residual = tokens_of(residual, strides.residual)
    slots = Items(cache_indices, strides.cache_indices)
    flags = Items(has_initial_state, strides.has_initial_state)
    seqlens = Items(cache_seqlens, strides.cache_seqlens)
    rows = Rows(query_start_loc, slots, flags, batch, tokens)

    # mapping of programs
    block_d, place = channel_block_and_place(channel_blocks, o.folded)
    channels, out = part_of_out(block_d, out, dim, tokens, o)
    wait_for_inputs(o)
    weights = load_weights(weight, bias, strides, channels, o)
    first_row = place * o.rows
    if first_row >= batch:
        start, end, slot, flag = row_facts(rows, batch)
        zero_tail(out, start + place - (batch + o.rows - 1) // o.rows, end, tails, channels)
        return
    facts = ()
    for r in tl.static_range(o.rows):
        start, end, slot, flag = row_facts(rows, first_row + r)
        end = tl.where(first_row + r < batch, end, start)
        slot = slot.to(tl.int64)
        live = end > start
        if conv_states is not None:
            live = live & is_slot(slot, num_slots, pad_slot_id)
        facts = facts + (start, end, live, flag != 0, slot)

    # windows and tokens of all rows
    raw: tl.constexpr = conv_states is None or x.ptr.dtype == conv_states.dtype
    dtype: tl.constexpr = x.ptr.dtype.element_ty if raw else tl.float32
    count: tl.constexpr = o.width - 1 + o.block_t
    inputs = ()
    # twice, since what reads slots precedes what writes them; a tuple of rows would not stay one of records
    for turn in tl.static_range(2 * o.rows):
        start, end, live, has_state, slot = facts[turn % o.rows * 5 : turn % o.rows * 5 + 5]
        held = None
        if conv_states is not None:
            row_number = first_row + turn % o.rows
            held = slot_in_layout(
                conv_states, slot, strides.conv_states, seqlens, row_number, row_number < batch, state_len, o
            )
        past = None
        if has_initial_state is not None:
            past = held
        row = Row(start, end, live, has_state, held, past, None)
        if turn < o.rows:
            inputs = (
                inputs + _window_of(row, channels, dtype, o) + _tokens_at(x, row, start, channels, dtype, o)
            )
        else:
            # taps, store, state
            if turn == o.rows:
                tl.debug_barrier()  # all reads of the slots precede all writes, whichever thread holds which channel
            _leave_row(
                x,
                residual,
                out,
                row,
                inputs[turn % o.rows * count : (turn % o.rows + 1) * count],
                channels,
                weights,
                o,
            )


def prepare(call, sizes, config, stores, gate=None):
    """Prepares the kernel for a checked `FnCall` of such shapes, strides and dtypes.

    Args:
      sizes: `call.check()`.
      config: a ShortRowsConfig.
      stores, gate: as of `prefill.prepare`.

    Returns:
      A Launch of ARRAYS and out; with `split_sizes` the parts follow each other in a flat `out`.
    """
    pooled = call.conv_states is not None
    layout = call.state_layout if pooled else "front"
    blocks, parts, align = split_blocks(sizes.dim, call.split_sizes, config.block_d)
    grid, folded = program_grid(blocks, triton.cdiv(sizes.batch, config.rows) + config.tails)
    options = Options(
        width=sizes.width,
        silu=call.activation is not None,
        layout=layout,
        stores=stores and pooled,
        sizes=parts,
        align=align,
        word_bits=word_bits(call.weight),
        folded=folded,
        rows=config.rows,
        block_t=config.block_t,
        block_d=config.block_d,
        ptx=native_ptx(),
        hip=torch.version.hip is not None,
        gate=gate,
        overlap=overlaps(call.x.device),
    )
    values = (
        Strides(*strides_of(call, ARRAYS), out=(0, 1) if parts else like_result(call).stride()),
        sizes.tokens,
        sizes.dim,
        sizes.batch,
        sizes.num_slots,
        None if layout == "front" else sizes.state_len,
        known_pad(call.pad_slot_id, sizes.num_slots),
        blocks if folded else None,
        config.tails,
        constants(options),
    )
    return Launch(_short_rows_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)
