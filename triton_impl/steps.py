"""Decode step with what serving adds: windows of every token, other layouts and slots, residual, split outputs.

A program owns one row and BLOCK_D channels. It reads the old window, leaves the new state, then walks the row's
tokens, the loads of GROUP tokens issued before any is used; so every read of the slot precedes every write, and x
may be overwritten by its own result. Packed rows have a few programs more, which write the zeros after the last row.
"""

import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, program_grid, stride
from triton_impl.slots import (
    add_residual,
    column,
    find_slot,
    find_window,
    leave_state,
    load_entries,
    output_channels,
    split_blocks,
    store_entries,
)
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


@triton.jit(
    do_not_specialize=[
        "tokens",
        "batch",
        "num_slots",
        "state_len",
        "pad_slot_id",
        "buffers",
        "pad_buffer",
        "steps",
        "dim_blocks",
        "tail_programs",
    ]
)
def _step_kernel(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens, write_indices,
    track_indices, window_out, window_indices, residual, out,
    tokens, batch, seqlen, dim, num_slots, state_len, pad_slot_id, buffers, pad_buffer, steps, dim_blocks,
    tail_programs, stride_x_b, stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d, stride_c,
    stride_a, stride_q, stride_w, stride_k, stride_v_n, stride_v_t, stride_v_l, stride_v_d, stride_i,
    stride_r_b, stride_r_t, stride_r_d, stride_o_b, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, LAYOUT: tl.constexpr, COMMIT: tl.constexpr, VARLEN: tl.constexpr,
    SIZES: tl.constexpr, ALIGN: tl.constexpr, PTX: tl.constexpr, WORD_BITS: tl.constexpr, GROUP: tl.constexpr, ONCE: tl.constexpr,
    FOLDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)
    stride_v_t = tl.cast(stride_v_t, tl.int64)
    stride_v_l = tl.cast(stride_v_l, tl.int64)
    stride_v_d = tl.cast(stride_v_d, tl.int64)
    stride_r_t = tl.cast(stride_r_t, tl.int64)
    stride_r_d = tl.cast(stride_r_d, tl.int64)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = tl.cast(stride_o_d, tl.int64)

    # mapping of programs
    block_d, row = channel_block_and_place(dim_blocks, FOLDED)
    row = row.to(tl.int64)
    ch, in_dim, out, stride_o_t, stride_o_d = output_channels(
        block_d, dim, tokens, out, stride_o_t, stride_o_d, SIZES, ALIGN, BLOCK_D
    )
    if len(SIZES) > 0:
        stride_o_b = seqlen * stride_o_t

    # tokens of the row; packed rows from `batch` on are the tail
    in_rows = row < batch
    if VARLEN:
        begin = offset(query_start_loc, tl.minimum(row, batch), batch, tokens)
        length = tl.maximum(offset(query_start_loc, tl.minimum(row, batch) + 1, batch, tokens) - begin, 0)
        if row >= batch:
            zero = tl.zeros([BLOCK_D], out.dtype.element_ty)
            for t in range(row - batch, length, tail_programs):
                tl.store(out + (begin + t) * stride_o_t + ch * stride_o_d, zero, mask=in_dim)
            return
        x += begin * stride_x_t
        out += begin * stride_o_t
        if residual is not None:
            residual += begin * stride_r_t
    else:
        length = tl.zeros([], tl.int64) + seqlen
        x += row * stride_x_b
        out += row * stride_o_b
        if residual is not None:
            residual += row * stride_r_b

    # all loads that need no slot are issued first, then the window
    slot, live = find_slot(cache_indices, row, in_rows, stride_c, num_slots, pad_slot_id)
    first = find_window(
        cache_seqlens, num_accepted_tokens, row, in_rows, stride_q, stride_a, state_len, WIDTH, LAYOUT
    )
    arrived = ()
    for i in tl.static_range(GROUP):
        arrived = arrived + (
            tl.load(x + i * stride_x_t + ch * stride_x_d, mask=in_dim & (i < length), other=0.0),
        )
    taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
    start = load_bias(bias, ch, in_dim, stride_b, bias is not None)
    old = conv_states + slot * stride_s_n
    stored = ()
    for j in tl.static_range(WIDTH - 1):
        place = old + column(first, j, state_len, LAYOUT) * stride_s_l + ch * stride_s_d
        stored = stored + (tl.load(place, mask=in_dim & live, other=0.0),)

    # state
    moved = live & (length > 0)
    if track_indices is not None:
        tracked, tracks = find_slot(track_indices, row, in_rows, stride_k, num_slots, pad_slot_id)
        final = load_entries(
            x, old, length, first, state_len, ch, in_dim & moved & tracks, live,
            stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH - 1, WIDTH, LAYOUT,
        )  # fmt: skip
        tl.debug_barrier()
        store_entries(
            conv_states + tracked * stride_s_n,
            final,
            ch,
            in_dim & moved & tracks,
            stride_s_l,
            stride_s_d,
            WIDTH - 1,
        )
    if COMMIT:
        write = slot
        stores = moved
        if write_indices is not None:
            write, stores = find_slot(write_indices, row, in_rows, stride_w, num_slots, pad_slot_id)
            stores = stores & moved
        tl.debug_barrier()  # the window is read before anything is written
        leave_state(
            x, length, old, conv_states + write * stride_s_n, first, state_len, ch, in_dim & stores, live,
            write != slot, stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH, LAYOUT,
        )  # fmt: skip

    # taps, store; the next tokens are under way meanwhile, unless one group is all there is (ONCE)
    kept = ()
    keeps = live
    if window_out is not None:
        buffer, known = find_slot(window_indices, row, in_rows, stride_i, buffers, pad_buffer)
        keeps = live & known
        window_out += buffer * stride_v_n
        for j in tl.static_range(WIDTH - 1):
            kept = kept + (recast(stored[j], window_out.dtype.element_ty),)
    window = ()
    for j in tl.static_range(WIDTH - 1):
        window = window + (widen(stored[j]),)
    for t in range(0, GROUP if ONCE else length, GROUP):
        added = ()
        if residual is not None:
            for i in tl.static_range(GROUP):
                source = residual + (t + i) * stride_r_t + ch * stride_r_d
                added = added + (tl.load(source, mask=in_dim & (t + i < length), other=0.0),)
        following = arrived
        if not ONCE:
            following = ()
            for i in tl.static_range(GROUP):
                token = x + (t + GROUP + i) * stride_x_t + ch * stride_x_d
                following = following + (tl.load(token, mask=in_dim & (t + GROUP + i < length), other=0.0),)
        if window_out is not None:  # they wait for no arithmetic: under way while the outputs are computed
            for i in tl.static_range(GROUP):
                kept = kept + (recast(arrived[i], window_out.dtype.element_ty),)
                mask = in_dim & keeps & (t + i < length) & (t + i < steps)
                target = window_out + (t + i) * stride_v_t + ch * stride_v_d
                for j in tl.static_range(WIDTH - 1):
                    tl.store(target + j * stride_v_l, kept[j + 1], mask=mask)
                kept = kept[1:]
        for i in tl.static_range(GROUP):
            window = window + (widen(arrived[i]),)
            value = activate(convolve(window, taps, start, WIDTH), SILU, PTX)
            if residual is not None:
                value = add_residual(value, widen(added[i]), PTX)
            value = narrow(tl.where(live, value, 0.0), out.dtype.element_ty)
            tl.store(out + (t + i) * stride_o_t + ch * stride_o_d, value, mask=in_dim & (t + i < length))
            window = window[1:]
        arrived = following


def row_strides(tensor, packed):
    """Strides of row, token and channel; zeros for an absent tensor."""
    if tensor is None:
        return 0, 0, 0
    if tensor.dim() == 3:
        return tensor.stride()
    return (0, *tensor.stride()) if packed else (tensor.stride(0), 0, tensor.stride(1))


def prepare(tensors, out, *, layout, commit, silu, pad_slot_id, split_sizes, longest, config):
    """Prepares the kernel for checked arguments of these shapes, strides and dtypes.

    Args:
      tensors: x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens,
        write_indices, track_indices, window_out, window_indices, residual.
      out: a tensor laid out as the result will be; with `split_sizes` the parts one after the other, flat.
      layout: of the slots, as in `triton_impl.slots`.
      commit: whether the pool takes the new state.
      longest: host bound of the longest row, or None.
      config: an UpdateConfig, of whose rows a program has one.

    Returns:
      A Launch of `tensors` and out.
    """
    (
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens, write_indices,
        track_indices, window_out, window_indices, residual,
    ) = tensors  # fmt: skip
    packed = query_start_loc is not None
    dim = x.shape[-1]
    batch = query_start_loc.shape[0] - 1 if packed else x.shape[0]
    seqlen = x.shape[1] if x.dim() == 3 else 1
    tokens = x.shape[0] if packed else batch * seqlen
    num_slots, state_len, _ = conv_states.shape
    buffers, steps = (0, 0) if window_out is None else window_out.shape[:2]
    dim_blocks, sizes, align = split_blocks(dim, split_sizes, config.block_d)
    tail = triton.cdiv(tokens, 64) if packed else 0
    grid, folded = program_grid(dim_blocks, batch + tail)
    group = min(
        triton.next_power_of_2(max(1, 4 if longest is None else longest)), 8 if weight.shape[1] <= 4 else 4
    )
    values = (
        tokens, batch, seqlen, dim, num_slots, state_len, known_pad(pad_slot_id, num_slots), buffers,
        known_pad(pad_slot_id, buffers), steps, dim_blocks, tail,
        *row_strides(x, packed), *weight.stride(), stride(bias, 0), *conv_states.stride(), stride(cache_indices, 0),
        stride(num_accepted_tokens, 0), stride(cache_seqlens, 0), stride(write_indices, 0), stride(track_indices, 0),
        *(stride(window_out, axis) for axis in range(4)), stride(window_indices, 0),
        *row_strides(residual, packed), *((0, 0, 1) if sizes else row_strides(out, packed)),
    )  # fmt: skip
    constants = dict(
        WIDTH=weight.shape[1], SILU=silu, LAYOUT=layout, COMMIT=commit, VARLEN=packed, SIZES=sizes, ALIGN=align,
        PTX=NATIVE_PTX, WORD_BITS=word_bits(weight), GROUP=group,
        ONCE=not packed and seqlen <= group, FOLDED=folded, BLOCK_D=config.block_d,
    )  # fmt: skip
    return Launch(_step_kernel, grid, values, constants, num_warps=config.num_warps)
