"""Moves accepted windows of speculative steps into their slots: one copy of width-1 vectors a row."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, overlaps, strides_of, wait_for_inputs
from triton_impl.records import Channels, Items, constants, holds, slot_of, strides_record, windows_of
from triton_impl.rows import counted
from triton_impl.slots import find_slot, store_window

ARRAYS = ("conv_states", "window_out", "accepted_steps", "cache_indices", "window_indices")
Strides = strides_record(*ARRAYS)


class Options(NamedTuple):
    """What the kernel is compiled for; columns: of a window."""

    columns: Any
    block_d: Any
    overlap: Any


@triton.jit(
    do_not_specialize=["batch", "num_slots", "pad_slot_id", "buffers", "pad_buffer", "steps", "dim_blocks"]
)
def _commit_kernel(
    conv_states, window_out, accepted_steps, cache_indices, window_indices, strides,
    batch, dim, num_slots, pad_slot_id, buffers, pad_buffer, steps, dim_blocks, o: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // dim_blocks).to(tl.int64)
    ch = (tl.program_id(0) % dim_blocks) * o.block_d + tl.arange(0, o.block_d)
    wait_for_inputs(o)
    step = counted(tl.load(accepted_steps + row * strides.accepted_steps))
    slots, indices = (
        Items(cache_indices, strides.cache_indices),
        Items(window_indices, strides.window_indices),
    )
    slot, live = find_slot(slots, row, row < batch, num_slots, pad_slot_id)
    buffer, known = find_slot(indices, row, row < batch, buffers, pad_buffer)
    moves = Channels(ch, (ch < dim) & holds(live) & holds(known) & holds(step >= 0) & holds(step < steps))
    windows = windows_of(window_out, buffer, strides.window_out)
    source = windows.ptr + step * windows.t + ch * windows.d
    entries = ()
    for c in tl.static_range(o.columns):
        entries = entries + (tl.load(source + c * windows.l, mask=moves.exist, other=0.0),)
    store_window(slot_of(conv_states, slot, strides.conv_states, 0, 0), entries, moves, o.columns)


def prepare(call, sizes, config):
    """Prepares the kernel for a checked `CommitCall` of such shapes, strides and dtypes.

    Args:
      sizes: `call.check()`.
      config: an UpdateConfig, of whose rows a program has one.

    Returns:
      A Launch of ARRAYS.
    """
    dim_blocks = triton.cdiv(sizes.dim, config.block_d)
    options = Options(sizes.history, config.block_d, overlaps(call.conv_states.device, config.hurry))
    values = (
        Strides(*strides_of(call, ARRAYS)),
        sizes.batch,
        sizes.dim,
        sizes.num_slots,
        known_pad(call.pad_slot_id, sizes.num_slots),
        sizes.num_buffers,
        known_pad(call.pad_slot_id, sizes.num_buffers),
        sizes.steps,
        dim_blocks,
        constants(options),
    )
    return Launch(
        _commit_kernel,
        (sizes.batch * dim_blocks, 1, 1),
        values,
        num_warps=config.num_warps,
        overlap=options.overlap,
    )
