"""Several tokens a row: packed rows, rolling slots, windows of every token, other layouts and slots, split outputs.

A program owns one row and block_d channels. It reads the old window, leaves the new state, then walks the row's
tokens, the loads of a group of tokens issued before any is used; so every read of the slot precedes every write, and x
may be overwritten by its own result. Packed rows have a few programs more, which write the zeros after the last row.
"""

from typing import Any, NamedTuple

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
    widen,
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
    Tokens,
    at,
    behind,
    constants,
    holds,
    slot_of,
    strides_record,
    tokens_of,
    windows_of,
)
from triton_impl.rows import channel_block_and_place, offset, zero_tail
from triton_impl.slots import (
    column,
    find_slot,
    first_column,
    leave_state,
    load_window,
    part_of_out,
    split_blocks,
    store_window,
)

ARRAYS = (
    "x", "weight", "bias", "conv_states", "cache_indices", "query_start_loc", "num_accepted_tokens", "cache_seqlens",
    "write_indices", "track_indices", "window_out", "window_indices", "residual",
)  # fmt: skip
Strides = strides_record(*ARRAYS, "out")  # of x, residual and out those of row, token and channel


class Options(NamedTuple):
    """What the kernel is compiled for.

    Attributes:
      commit: whether the slots take the new state.
      sizes, align: `slots.split_blocks`.
      group: tokens loaded before the first is used; once: one group is all there is.
    """

    width: Any
    silu: Any
    layout: Any
    commit: Any
    packed: Any
    sizes: Any
    align: Any
    word_bits: Any
    group: Any
    once: Any
    folded: Any
    block_d: Any
    ptx: Any
    gate: Any = None
    overlap: Any = None


@triton.jit
def _store_windows(entries, arrived, windows, t, wanted, channels, o: tl.constexpr):
    """Stores the window behind every token of a group from token t on; returns the window behind the group."""
    for i in tl.static_range(o.group):
        entries = entries + (recast(arrived[i], windows.ptr.dtype.element_ty),)
        target = windows.ptr + (t + i) * windows.t + channels.index * windows.d
        for j in tl.static_range(o.width - 1):
            tl.store(target + j * windows.l, entries[j + 1], mask=channels.exist & holds(t + i < wanted))
        entries = entries[1:]
    return entries


@triton.jit(
    do_not_specialize=[
        "tokens", "batch", "num_slots", "state_len", "pad_slot_id", "buffers", "pad_buffer", "steps", "dim_blocks",
        "tail_programs",
    ]
)  # fmt: skip
def _verify_kernel(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens, write_indices,
    track_indices, window_out, window_indices, residual, out, strides,
    tokens, batch, seqlen, dim, num_slots, state_len, pad_slot_id, buffers, pad_buffer, steps, dim_blocks, tail_programs,
    o: tl.constexpr,
):  # fmt: skip
    x, out = tokens_of(x, strides.x[1:]), tokens_of(out, strides.out[1:])
    added = None
    if residual is not None:
        added = tokens_of(residual, strides.residual[1:])

    # mapping of programs
    block_d, row = channel_block_and_place(dim_blocks, o.folded)
    row = row.to(tl.int64)
    channels, out = part_of_out(block_d, out, dim, tokens, o)

    wait_for_inputs(o)

    # tokens of the row; packed rows from `batch` on are the tail
    in_rows = row < batch
    if o.packed:
        begin = offset(query_start_loc, tl.minimum(row, batch), batch, tokens)
        length = tl.maximum(offset(query_start_loc, tl.minimum(row, batch) + 1, batch, tokens) - begin, 0)
        if row >= batch:
            zero_tail(behind(out, begin), row - batch, length, tail_programs, channels)
            return
        x, out = behind(x, begin), behind(out, begin)
        if added is not None:
            added = behind(added, begin)
    else:
        length = tl.zeros([], tl.int64) + seqlen
        row_of_out = strides.out[0]
        if len(o.sizes) > 0:
            row_of_out = seqlen * out.t
        x, out = (
            Tokens(x.ptr + row * strides.x[0], x.t, x.d),
            Tokens(out.ptr + row * row_of_out, out.t, out.d),
        )
        if added is not None:
            added = Tokens(added.ptr + row * strides.residual[0], added.t, added.d)

    # all loads that need no slot are issued first, then the window
    indices = Items(cache_indices, strides.cache_indices)
    slot, live = find_slot(indices, row, in_rows, num_slots, pad_slot_id)
    counts, seqlens = (
        Items(num_accepted_tokens, strides.num_accepted_tokens),
        Items(cache_seqlens, strides.cache_seqlens),
    )
    first = first_column(seqlens, counts, row, in_rows, state_len, o)
    arrived = ()
    for i in tl.static_range(o.group):
        arrived = arrived + (load_input(at(x, i, channels), channels.exist & holds(i < length), o),)
    taps, start = load_taps(load_weights(weight, bias, strides, channels, o), o)
    old = slot_of(conv_states, slot, strides.conv_states, first, state_len)
    stored = ()
    for j in tl.static_range(o.width - 1):
        stored = stored + (
            tl.load(column(old, j, channels, o), mask=channels.exist & holds(live), other=0.0),
        )

    # state
    moved = live & (length > 0)
    if track_indices is not None:
        indices = Items(track_indices, strides.track_indices)
        tracked, tracks = find_slot(indices, row, in_rows, num_slots, pad_slot_id)
        some = Channels(channels.index, channels.exist & holds(moved) & holds(tracks))
        final = load_window(x, old, length, some, live, o.width - 1, o)
        tl.debug_barrier()
        store_window(slot_of(conv_states, tracked, strides.conv_states, 0, 0), final, some, o.width - 1)
    if o.commit:
        write = slot
        stores = moved
        if write_indices is not None:
            indices = Items(write_indices, strides.write_indices)
            write, stores = find_slot(indices, row, in_rows, num_slots, pad_slot_id)
            stores = stores & moved
        tl.debug_barrier()  # the window is read before anything is written
        some = Channels(channels.index, channels.exist & holds(stores))
        new = slot_of(conv_states, write, strides.conv_states, first, state_len)
        leave_state(x, length, old, new, some, live, write != slot, o)

    # taps, store; the next tokens are under way meanwhile, unless one group is all there is
    kept = ()
    if window_out is not None:
        indices = Items(window_indices, strides.window_indices)
        buffer, known = find_slot(indices, row, in_rows, buffers, pad_buffer)
        keeps = Channels(channels.index, channels.exist & holds(live) & holds(known))
        windows = windows_of(window_out, buffer, strides.window_out)
        for j in tl.static_range(o.width - 1):
            kept = kept + (recast(stored[j], window_out.dtype.element_ty),)
    window = ()
    for j in tl.static_range(o.width - 1):
        window = window + (widen(stored[j]),)
    for t in range(0, o.group if o.once else length, o.group):
        residuals = ()
        if added is not None:
            for i in tl.static_range(o.group):
                inside = channels.exist & holds(t + i < length)
                residuals = residuals + (tl.load(at(added, t + i, channels), mask=inside, other=0.0),)
        following = arrived
        if not o.once:
            following = ()
            for i in tl.static_range(o.group):
                inside = channels.exist & holds(t + o.group + i < length)
                following = following + (load_input(at(x, t + o.group + i, channels), inside, o),)
        if window_out is not None:  # they wait for no arithmetic: under way while the outputs are computed
            kept = _store_windows(kept, arrived, windows, t, tl.minimum(length, steps), keeps, o)
        for i in tl.static_range(o.group):
            window = window + (widen(arrived[i]),)
            value = activate(convolve(window, taps, start, o.width), o)
            if added is not None:
                value = join_residual(value, residuals[i], o)
            value = round_to(tl.where(live, value, 0.0), out.ptr.dtype.element_ty)
            tl.store(at(out, t + i, channels), value, mask=channels.exist & holds(t + i < length))
            window = window[1:]
        arrived = following


def prepare(call, sizes, config, gate=None):
    """Prepares the kernel for a checked `UpdateCall` of such shapes, strides and dtypes.

    Args:
      sizes: `call.check()`.
      config: an UpdateConfig, of whose rows a program has one.
      gate: as in `prefill.prepare`.

    Returns:
      A Launch of ARRAYS and out; with `split_sizes` the parts follow each other in a flat `out`.
    """
    packed, windows = call.query_start_loc is not None, call.window_out
    longest = call.max_seqlen if packed else sizes.seqlen
    dim_blocks, parts, align = split_blocks(sizes.dim, call.split_sizes, config.block_d)
    tail = triton.cdiv(sizes.tokens, 64) if packed else 0
    grid, folded = program_grid(dim_blocks, sizes.batch + tail)
    most = 8 if sizes.width <= 4 else 4
    group = min(triton.next_power_of_2(max(1, 4 if longest is None else longest)), most)
    out = (0, 0, 1) if parts else _of_rows(like_result(call), packed)
    strides = Strides(*strides_of(call, ARRAYS), out)._replace(
        x=_of_rows(call.x, packed), residual=_of_rows(call.residual, packed)
    )
    options = Options(
        width=sizes.width,
        silu=call.activation is not None,
        layout=call.state_layout if call.num_accepted_tokens is None else "rolling",
        commit=call.commit,
        packed=packed,
        sizes=parts,
        align=align,
        word_bits=word_bits(call.weight),
        group=group,
        once=not packed and sizes.seqlen <= group,
        folded=folded,
        block_d=config.block_d,
        ptx=native_ptx(),
        overlap=overlaps(call.x.device, config.hurry),
        gate=gate,
    )
    values = (
        strides,
        sizes.tokens if packed else sizes.batch * sizes.seqlen,
        sizes.batch,
        1 if packed else sizes.seqlen,
        sizes.dim,
        sizes.num_slots,
        sizes.state_len,
        known_pad(call.pad_slot_id, sizes.num_slots),
        None if windows is None else windows.shape[0],
        None if windows is None else known_pad(call.pad_slot_id, windows.shape[0]),
        None if windows is None else windows.shape[1],
        dim_blocks if folded else None,
        tail if packed else None,
        constants(options),
    )
    return Launch(_verify_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)


def _of_rows(tensor, packed):
    """Strides of row, token and channel; None for an absent tensor."""
    if tensor is None:
        return None
    if tensor.dim() == 3:
        return tensor.stride()
    return (0, *tensor.stride()) if packed else (tensor.stride(0), 0, tensor.stride(1))
