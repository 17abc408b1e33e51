"""Decode step of one token a row: convolved behind its slot's window, the window moved on in place.

A program owns `rows` rows and block_d channels, so that the taps are read once for all its rows. Rows of several tokens,
packed rows and all other layouts and slots are `verify`'s.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_impl.arithmetic import (
    activate,
    convolve,
    finish,
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
from triton_impl.records import (
    Channels,
    Items,
    Pool,
    at,
    constants,
    holds,
    slot_of,
    strides_record,
    tokens_of,
)
from triton_impl.rows import channel_block_and_place
from triton_impl.slots import column, find_slot, store_window

ARRAYS = ("x", "weight", "bias", "conv_states", "cache_indices")
Strides = strides_record(*ARRAYS, "out")  # of x and out those of row and channel


class Options(NamedTuple):
    """What the kernel is compiled for; rows: of a program; norm: an `arithmetic.Norm`, or None."""

    width: Any
    silu: Any
    word_bits: Any
    folded: Any
    rows: Any
    block_d: Any
    ptx: Any
    layout: Any = "front"
    norm: Any = None
    gate: Any = None
    overlap: Any = None


@triton.jit
def update_rows(x, out, weight, bias, pool, indices, strides, first_row, batch, channels, o: tl.constexpr):
    """One token of `o.rows` rows from `first_row` on, some of their channels: outputs and new windows."""
    # slots
    live = ()
    slots = ()
    for r in tl.static_range(o.rows):
        row = first_row + r
        slot, found = find_slot(indices, row, row < batch, pool.num_slots, pool.pad_slot_id)
        live = live + (found,)
        slots = slots + (slot,)

    # what does not depend on a slot is asked for first, then the windows of all rows
    taps, start = load_taps(load_weights(weight, bias, strides, channels, o), o)
    tokens = ()
    for r in tl.static_range(o.rows):
        inside = channels.exist & holds(first_row + r < batch)
        tokens = tokens + (load_input(at(x, first_row + r, channels), inside, o),)
    windows = ()
    for r in tl.static_range(o.rows):
        old = slot_of(pool.ptr, slots[r], strides.conv_states, 0, 0)
        window = ()
        for j in tl.static_range(o.width - 1):
            entry = tl.load(column(old, j, channels, o), mask=channels.exist & holds(live[r]), other=0.0)
            window = window + (entry,)
        windows = windows + (window,)

    # taps, store
    for r in tl.static_range(o.rows):
        value = activate(convolve(windows[r] + (tokens[r],), taps, start, o.width), o)
        value = finish(tl.where(live[r], value, 0.0), out.ptr.dtype.element_ty, o)
        value = round_to(value, out.ptr.dtype.element_ty)
        tl.store(at(out, first_row + r, channels), value, mask=channels.exist & holds(first_row + r < batch))

    # state
    if o.width > 1:
        tl.debug_barrier()  # all reads of the slots precede all writes, whichever thread holds which channel
        for r in tl.static_range(o.rows):
            entries = windows[r][1:] + (recast(tokens[r], pool.ptr.dtype.element_ty),)
            new = slot_of(pool.ptr, slots[r], strides.conv_states, 0, 0)
            some = Channels(channels.index, channels.exist & holds(live[r]))
            store_window(new, entries, some, o.width - 1)


@triton.jit(do_not_specialize=["batch", "num_slots", "pad_slot_id"])
def _update_kernel(
    x,
    weight,
    bias,
    conv_states,
    cache_indices,
    out,
    strides,
    batch,
    dim,
    num_slots,
    pad_slot_id,
    o: tl.constexpr,
):
    x, out = tokens_of(x, strides.x), tokens_of(out, strides.out)

    # mapping of programs
    block_d, place = channel_block_and_place(tl.cdiv(dim, o.block_d), o.folded)
    ch = block_d * o.block_d + tl.arange(0, o.block_d)
    wait_for_inputs(o)
    indices = Items(cache_indices, strides.cache_indices)
    pool = Pool(conv_states, num_slots, pad_slot_id)
    first_row = place.to(tl.int64) * o.rows
    update_rows(x, out, weight, bias, pool, indices, strides, first_row, batch, Channels(ch, ch < dim), o)


def prepare(call, sizes, config):
    """Prepares the kernel for a checked `UpdateCall` of such shapes, strides and dtypes.

    Args:
      sizes: `call.check()`.
      config: an UpdateConfig.

    Returns:
      A Launch of ARRAYS and out.
    """
    places = triton.cdiv(sizes.batch, config.rows)
    grid, folded = program_grid(triton.cdiv(sizes.dim, config.block_d), places)
    x, *others = strides_of(call, ARRAYS)
    out = like_result(call).stride()
    options = Options(
        width=sizes.width,
        silu=call.activation is not None,
        word_bits=word_bits(call.weight),
        folded=folded,
        rows=config.rows,
        block_d=config.block_d,
        ptx=native_ptx(),
        overlap=overlaps(call.x.device, config.hurry),
    )
    values = (
        Strides((x[0], x[-1]), *others, (out[0], out[-1])),
        sizes.batch,
        sizes.dim,
        sizes.num_slots,
        known_pad(call.pad_slot_id, sizes.num_slots),
        constants(options),
    )
    return Launch(_update_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)
