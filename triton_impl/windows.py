"""Moves accepted windows of speculative steps into their slots: one copy of width-1 vectors a row."""

import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, stride
from triton_impl.slots import find_slot
from triton_impl.taps import recast


@triton.jit(
    do_not_specialize=["batch", "num_slots", "pad_slot_id", "buffers", "pad_buffer", "steps", "dim_blocks"]
)
def _commit_kernel(
    conv_states, window_out, accepted_steps, cache_indices, window_indices,
    batch, dim, num_slots, pad_slot_id, buffers, pad_buffer, steps, dim_blocks,
    stride_s_n, stride_s_l, stride_s_d, stride_v_n, stride_v_t, stride_v_l, stride_v_d, stride_t, stride_c, stride_i,
    COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)
    stride_v_l = tl.cast(stride_v_l, tl.int64)
    stride_v_d = tl.cast(stride_v_d, tl.int64)
    row = (tl.program_id(0) // dim_blocks).to(tl.int64)
    ch = (tl.program_id(0) % dim_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = tl.load(accepted_steps + row * stride_t).to(tl.int64)
    slot, live = find_slot(cache_indices, row, row < batch, stride_c, num_slots, pad_slot_id)
    buffer, known = find_slot(window_indices, row, row < batch, stride_i, buffers, pad_buffer)
    moves = (ch < dim) & live & known & (step >= 0) & (step < steps)
    source = window_out + buffer * stride_v_n + step * stride_v_t + ch * stride_v_d
    target = conv_states + slot * stride_s_n + ch * stride_s_d
    entries = ()
    for c in tl.static_range(COLUMNS):
        entries = entries + (tl.load(source + c * stride_v_l, mask=moves, other=0.0),)
    for c in tl.static_range(COLUMNS):
        tl.store(target + c * stride_s_l, recast(entries[c], conv_states.dtype.element_ty), mask=moves)


def prepare(tensors, pad_slot_id, config):
    """Prepares the kernel for checked arguments of these shapes, strides and dtypes.

    Args:
      tensors: conv_states, window_out, accepted_steps, cache_indices, window_indices.
      config: an UpdateConfig, of whose rows a program has one.

    Returns:
      A Launch of `tensors`.
    """
    conv_states, window_out, accepted_steps, cache_indices, window_indices = tensors
    buffers, steps, columns, dim = window_out.shape
    batch, num_slots = accepted_steps.shape[0], conv_states.shape[0]
    dim_blocks = triton.cdiv(dim, config.block_d)
    values = (
        batch, dim, num_slots, known_pad(pad_slot_id, num_slots), buffers, known_pad(pad_slot_id, buffers), steps,
        dim_blocks, *conv_states.stride(), *window_out.stride(), accepted_steps.stride(0), stride(cache_indices, 0),
        stride(window_indices, 0),
    )  # fmt: skip
    constants = dict(COLUMNS=columns, BLOCK_D=config.block_d)
    return Launch(_commit_kernel, (batch * dim_blocks, 1, 1), values, constants, num_warps=config.num_warps)
