"""Decode step: each row's tokens convolved behind its slot's window, the window moved on in place.

A program owns ROWS rows and BLOCK_D channels, so that the taps are read once for all its rows. Packed rows
(VARLEN) have one program each and channel block, and a few programs more write the zeros after the last row.
With counts (ROLLS) the window begins in column count-1, and the slot keeps every new token behind it, so that
the next step's count can drop what was rejected.
"""

import torch
import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, program_grid, stride
from triton_impl.taps import (
    NATIVE_PTX,
    activate,
    channel_block_and_place,
    convolve,
    load_bias,
    load_taps,
    narrow,
    offset,
    recast,
    widen,
    word_bits,
)


@triton.jit(do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "tail_programs"])
def _update_kernel(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, out,
    tokens, batch, seqlen, dim, num_slots, state_len, pad_slot_id, tail_programs,
    stride_x_b, stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l,
    stride_s_d, stride_c, stride_a, stride_o_b, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, PTX: tl.constexpr,
    WORD_BITS: tl.constexpr, VARLEN: tl.constexpr, ROLLS: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = tl.cast(stride_o_d, tl.int64)

    # mapping of programs
    block_d, group = channel_block_and_place(tl.cdiv(dim, BLOCK_D), FOLDED)
    first_row = group.to(tl.int64) * ROWS
    ch = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = ch < dim

    # tokens of the rows; packed rows from `batch` on are the tail
    if VARLEN:
        tl.static_assert(ROWS == 1)
        begin = offset(query_start_loc, tl.minimum(first_row, batch), batch, tokens)
        length = tl.maximum(
            offset(query_start_loc, tl.minimum(first_row, batch) + 1, batch, tokens) - begin, 0
        )
        if first_row >= batch:
            zero = tl.zeros([BLOCK_D], out.dtype.element_ty)
            for t in range(first_row - batch, length, tail_programs):
                tl.store(out + (begin + t) * stride_o_t + ch * stride_o_d, zero, mask=in_dim)
            return
        x += begin * stride_x_t
        out += begin * stride_o_t
        stride_x_b = 0
        stride_o_b = 0
    else:
        length = seqlen

    # slots
    live = ()
    pools = ()
    for r in tl.static_range(ROWS):
        slot = first_row + r
        is_row = slot < batch
        if HAS_INDICES:
            slot = tl.load(cache_indices + slot * stride_c, mask=is_row, other=-1).to(tl.int64)
        live = live + (is_row & (slot != pad_slot_id) & (slot >= 0) & (slot < num_slots),)
        pools = pools + (conv_states + slot * stride_s_n + ch * stride_s_d,)

    # what does not depend on a slot is asked for first, then the windows of all rows
    taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
    start = load_bias(bias, ch, in_dim, stride_b, HAS_BIAS)
    arrived = ()
    for r in tl.static_range(ROWS):
        token = x + (first_row + r) * stride_x_b + ch * stride_x_d
        arrived = arrived + (tl.load(token, mask=in_dim & (first_row + r < batch) & (length > 0), other=0.0),)
    stored = ()
    for r in tl.static_range(ROWS):
        column = tl.zeros([], tl.int64)
        if ROLLS:
            count = tl.load(
                num_accepted_tokens + (first_row + r) * stride_a, mask=first_row + r < batch, other=1
            )
            column = tl.minimum(tl.maximum(count.to(tl.int64), 1), state_len - WIDTH + 2) - 1
        for j in tl.static_range(WIDTH - 1):
            stored = stored + (
                tl.load(pools[r] + (column + j) * stride_s_l, mask=in_dim & live[r], other=0.0),
            )
    window = ()
    for i in tl.static_range(ROWS * (WIDTH - 1)):
        window = window + (widen(stored[i]),)
    if ROLLS and WIDTH > 1:
        tl.debug_barrier()  # all reads of the slots precede all writes, whichever thread holds which channel
        for r in tl.static_range(ROWS):
            for j in tl.static_range(1, WIDTH - 1):
                moves = in_dim & live[r] & (length > 0)
                tl.store(pools[r] + (j - 1) * stride_s_l, stored[r * (WIDTH - 1) + j], mask=moves)

    for t in range(length):
        # taps, store; the next token is under way meanwhile
        following = ()
        for r in tl.static_range(ROWS):
            token = x + (first_row + r) * stride_x_b + (t + 1) * stride_x_t + ch * stride_x_d
            more = in_dim & (first_row + r < batch) & (t + 1 < length)
            following = following + (tl.load(token, mask=more, other=0.0),)
        next_stored = ()
        next_window = ()
        for r in tl.static_range(ROWS):
            e = window[r * (WIDTH - 1) : (r + 1) * (WIDTH - 1)] + (widen(arrived[r]),)
            entry = recast(arrived[r], conv_states.dtype.element_ty)
            s = stored[r * (WIDTH - 1) : (r + 1) * (WIDTH - 1)] + (entry,)
            value = activate(convolve(e, taps, start, WIDTH), SILU, PTX)
            value = narrow(tl.where(live[r], value, 0.0), out.dtype.element_ty)
            place = out + (first_row + r) * stride_o_b + t * stride_o_t + ch * stride_o_d
            tl.store(place, value, mask=in_dim & (first_row + r < batch))
            if ROLLS and WIDTH > 1:
                fits = in_dim & live[r] & (t + WIDTH - 2 < state_len)
                tl.store(pools[r] + (t + WIDTH - 2) * stride_s_l, entry, mask=fits)
            next_stored = next_stored + s[1:]
            next_window = next_window + e[1:]
        stored = next_stored
        window = next_window
        arrived = following

    # state
    if WIDTH > 1 and not ROLLS:
        tl.debug_barrier()  # as above
        for r in tl.static_range(ROWS):
            for j in tl.static_range(WIDTH - 1):
                moves = in_dim & live[r] & (length > 0)
                tl.store(pools[r] + j * stride_s_l, stored[r * (WIDTH - 1) + j], mask=moves)


def prepare(
    x,
    weight,
    bias,
    conv_states,
    cache_indices,
    query_start_loc,
    num_accepted_tokens,
    silu,
    pad_slot_id,
    config,
):
    """Prepares the kernel for checked arguments of these shapes, strides and dtypes.

    Returns:
      A Launch of (x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, out).
    """
    varlen, rolls = query_start_loc is not None, num_accepted_tokens is not None
    dim = x.shape[-1]
    batch = query_start_loc.shape[0] - 1 if varlen else x.shape[0]
    seqlen = x.shape[1] if x.dim() == 3 else 1
    rows = 1 if varlen or rolls else config.rows
    tail = triton.cdiv(x.shape[0], 64) if varlen else 0
    grid, folded = program_grid(triton.cdiv(dim, config.block_d), triton.cdiv(batch + tail, rows))
    num_slots, state_len, _ = conv_states.shape
    out = torch.empty_like(x, device="meta")

    def strides(tensor):  # of batch, token, channel
        if tensor.dim() == 3:
            return tensor.stride()
        return (0, *tensor.stride()) if varlen else (tensor.stride(0), 0, tensor.stride(1))

    values = (
        x.shape[0], batch, seqlen, dim, num_slots, state_len, known_pad(pad_slot_id, num_slots), tail,
        *strides(x), *weight.stride(), stride(bias, 0), *conv_states.stride(),
        stride(cache_indices, 0), stride(num_accepted_tokens, 0), *strides(out),
    )  # fmt: skip
    constants = dict(
        WIDTH=weight.shape[1], SILU=silu, HAS_BIAS=bias is not None, HAS_INDICES=cache_indices is not None,
        PTX=NATIVE_PTX, WORD_BITS=word_bits(weight), VARLEN=varlen, ROLLS=rolls, FOLDED=folded,
        ROWS=rows, BLOCK_D=config.block_d,
    )  # fmt: skip
    return Launch(_update_kernel, grid, values, constants, num_warps=config.num_warps)
