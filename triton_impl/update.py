"""Decode step: each row's tokens convolved behind its slot's window, the window moved on in place.

A program owns ROWS rows and BLOCK_D channels, so that the taps are read once for all its rows.
"""

import torch
import triton
import triton.language as tl

from triton_impl.taps import NATIVE_PTX, activate, convolve, load_bias, load_taps, narrow, recast, widen, word_bits


@triton.jit(do_not_specialize=["batch", "num_slots", "pad_slot_id"])
def _update_kernel(
    x, weight, bias, conv_states, cache_indices, out,
    batch, seqlen, dim, num_slots, pad_slot_id,
    stride_x_b, stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l,
    stride_s_d, stride_c, stride_o_b, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # mapping of programs
    channel_blocks = tl.cdiv(dim, BLOCK_D)
    row = (tl.program_id(0) // channel_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    ch = (tl.program_id(0) % channel_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    in_dim = ch < dim
    live = row < batch
    here = live & in_dim
    slot = row
    if HAS_INDICES:
        slot = tl.load(cache_indices + row * stride_c, mask=live, other=-1).to(tl.int64)
    live = live & (slot != pad_slot_id) & (slot >= 0) & (slot < num_slots)
    active = live & in_dim

    # window: as stored, and as float32
    wide_ch = ch.to(tl.int64)
    pool = conv_states + slot * stride_s_n + wide_ch * stride_s_d
    stored = ()
    window = ()
    for j in tl.static_range(WIDTH - 1):
        past = tl.load(pool + j * stride_s_l, mask=active, other=0.0)
        stored = stored + (past,)
        window = window + (widen(past),)
    taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
    start = load_bias(bias, ch, in_dim, stride_b, HAS_BIAS)

    # taps, store
    for t in range(seqlen):
        new = tl.load(x + row * stride_x_b + t * stride_x_t + wide_ch * stride_x_d, mask=active, other=0.0)
        stored = stored + (recast(new, conv_states.dtype.element_ty),)
        window = window + (widen(new),)
        value = activate(convolve(window, taps, start, WIDTH), SILU, PTX)
        value = narrow(tl.where(live, value, 0.0), out.dtype.element_ty)
        tl.store(out + row * stride_o_b + t * stride_o_t + wide_ch * stride_o_d, value, mask=here)
        stored = stored[1:]
        window = window[1:]

    # state
    if WIDTH > 1:
        tl.debug_barrier()  # all reads of the slots precede all writes, whichever thread holds which channel
        for j in tl.static_range(WIDTH - 1):
            tl.store(pool + j * stride_s_l, stored[j], mask=active)


def launch(x, weight, bias, conv_states, cache_indices, *, silu, pad_slot_id, config):
    """Runs the kernel on checked arguments; returns `out`, laid out as x is; `conv_states` is updated in place."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, dim = x.shape[0], x.shape[-1]
    seqlen = x.shape[1] if x.dim() == 3 else 1
    num_slots = conv_states.shape[0]
    grid = (triton.cdiv(batch, config.rows) * triton.cdiv(dim, config.block_d),)
    _update_kernel[grid](
        x, weight, bias, conv_states, cache_indices, out,
        batch, seqlen, dim, num_slots, pad_slot_id if 0 <= pad_slot_id < num_slots else -1,
        x.stride(0), x.stride(1) if x.dim() == 3 else 0, x.stride(-1), *weight.stride(),
        bias.stride(0) if bias is not None else 0, *conv_states.stride(),
        cache_indices.stride(0) if cache_indices is not None else 0,
        out.stride(0), out.stride(1) if x.dim() == 3 else 0, out.stride(-1),
        WIDTH=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_INDICES=cache_indices is not None,
        PTX=NATIVE_PTX, WORD_BITS=word_bits(weight), ROWS=config.rows, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out
