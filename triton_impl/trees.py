"""Draft trees: every node convolved behind its ancestors and the slot's window, nothing committed.

A program owns NODES nodes of a row and BLOCK_D channels. The nodes' chains of parents are followed first, then all
their inputs are loaded, so that the waits of all nodes overlap.
"""

import torch
import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, stride
from triton_impl.slots import add_residual, column, find_slot, find_window, output_channels, split_blocks
from triton_impl.taps import (
    NATIVE_PTX,
    activate,
    convolve,
    load_bias,
    load_taps,
    narrow,
    recast,
    widen,
    word_bits,
)


@triton.jit(
    do_not_specialize=[
        "batch",
        "num_slots",
        "state_len",
        "pad_slot_id",
        "buffers",
        "pad_buffer",
        "dim_blocks",
    ]
)
def _tree_kernel(
    x, weight, bias, conv_states, cache_indices, cache_seqlens, tree_parents, window_out, window_indices, residual, out,
    batch, seqlen, dim, num_slots, state_len, pad_slot_id, buffers, pad_buffer, dim_blocks,
    stride_x_b, stride_x_t, stride_x_d, stride_w_d, stride_w_j, stride_b, stride_s_n, stride_s_l, stride_s_d, stride_c,
    stride_q, stride_p_b, stride_p_t, stride_v_n, stride_v_t, stride_v_l, stride_v_d, stride_i,
    stride_r_b, stride_r_t, stride_r_d, stride_o_b, stride_o_t, stride_o_d,
    WIDTH: tl.constexpr, SILU: tl.constexpr, LAYOUT: tl.constexpr, SIZES: tl.constexpr, ALIGN: tl.constexpr,
    PTX: tl.constexpr, WORD_BITS: tl.constexpr, NODES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)
    stride_p_t = tl.cast(stride_p_t, tl.int64)
    stride_v_t = tl.cast(stride_v_t, tl.int64)
    stride_v_l = tl.cast(stride_v_l, tl.int64)
    stride_v_d = tl.cast(stride_v_d, tl.int64)
    stride_r_t = tl.cast(stride_r_t, tl.int64)
    stride_r_d = tl.cast(stride_r_d, tl.int64)
    stride_o_t = tl.cast(stride_o_t, tl.int64)
    stride_o_d = tl.cast(stride_o_d, tl.int64)

    # mapping of programs
    node_blocks = tl.cdiv(seqlen, NODES)
    turn = tl.program_id(0) // dim_blocks
    row = (turn // node_blocks).to(tl.int64)
    node = (turn % node_blocks * NODES).to(tl.int64)
    tokens = tl.cast(batch, tl.int64) * seqlen
    ch, in_dim, out, stride_o_t, stride_o_d = output_channels(
        tl.program_id(0) % dim_blocks, dim, tokens, out, stride_o_t, stride_o_d, SIZES, ALIGN, BLOCK_D
    )
    if len(SIZES) > 0:
        stride_o_b = seqlen * stride_o_t
    x += row * stride_x_b
    out += row * stride_o_b
    tree_parents += row * stride_p_b

    slot, live = find_slot(cache_indices, row, row < batch, stride_c, num_slots, pad_slot_id)
    first = find_window(cache_seqlens, None, row, row < batch, stride_q, 0, state_len, WIDTH, LAYOUT)
    old = conv_states + slot * stride_s_n
    taps = load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
    start = load_bias(bias, ch, in_dim, stride_b, bias is not None)

    # ancestors: node i itself, its parent, ..., then -1, -2, ... for the window's newest entry and those before it
    sources = ()
    for i in tl.static_range(NODES):
        source = node + i
        for _ in tl.static_range(WIDTH):
            sources = sources + (source,)
            inside = (source >= 0) & (source < seqlen)
            parent = tl.load(tree_parents + source * stride_p_t, mask=inside, other=-1).to(tl.int64)
            parent = tl.maximum(tl.minimum(parent, source - 1), -1)
            source = tl.where(source >= 0, parent, source - 1)

    arrived = ()
    stored = ()
    for k in tl.static_range(NODES * WIDTH):
        source = sources[k]
        inside = (source >= 0) & (source < seqlen)
        arrived = arrived + (
            tl.load(x + source * stride_x_t + ch * stride_x_d, mask=in_dim & inside, other=0.0),
        )
        if k % WIDTH > 0:
            at = column(first, WIDTH - 1 + source, state_len, LAYOUT)
            place = old + at * stride_s_l + ch * stride_s_d
            stored = stored + (tl.load(place, mask=in_dim & live & (source < 0), other=0.0),)
        else:
            stored = stored + (tl.zeros([BLOCK_D], conv_states.dtype.element_ty),)

    keeps = live
    if window_out is not None:
        buffer, known = find_slot(window_indices, row, row < batch, stride_i, buffers, pad_buffer)
        keeps = live & known
        window_out += buffer * stride_v_n
    for i in tl.static_range(NODES):
        t = node + i
        inside = in_dim & (t < seqlen)
        window = ()
        for j in tl.static_range(WIDTH):  # oldest first
            new = widen(arrived[i * WIDTH + WIDTH - 1 - j])
            entry = tl.where(
                sources[i * WIDTH + WIDTH - 1 - j] >= 0, new, widen(stored[i * WIDTH + WIDTH - 1 - j])
            )
            window = window + (entry,)
        value = activate(convolve(window, taps, start, WIDTH), SILU, PTX)
        if residual is not None:
            place = residual + row * stride_r_b + t * stride_r_t + ch * stride_r_d
            value = add_residual(value, widen(tl.load(place, mask=inside, other=0.0)), PTX)
        value = narrow(tl.where(live, value, 0.0), out.dtype.element_ty)
        tl.store(out + t * stride_o_t + ch * stride_o_d, value, mask=inside)
        if window_out is not None:
            for j in tl.static_range(WIDTH - 1):
                kept = recast(arrived[i * WIDTH + WIDTH - 2 - j], window_out.dtype.element_ty)
                past = recast(stored[i * WIDTH + WIDTH - 2 - j], window_out.dtype.element_ty)
                kept = tl.where(sources[i * WIDTH + WIDTH - 2 - j] >= 0, kept, past)
                place = window_out + t * stride_v_t + j * stride_v_l + ch * stride_v_d
                tl.store(place, kept, mask=inside & keeps)


def prepare(tensors, out, *, layout, silu, pad_slot_id, split_sizes, config):
    """Prepares the kernel for checked arguments of these shapes, strides and dtypes.

    Args:
      tensors: x, weight, bias, conv_states, cache_indices, cache_seqlens, tree_parents, window_out, window_indices,
        residual.
      out, layout, config: as in `steps.prepare`.

    Returns:
      A Launch of `tensors` and out.
    """
    (
        x, weight, bias, conv_states, cache_indices, cache_seqlens, tree_parents, window_out, window_indices, residual,
    ) = tensors  # fmt: skip
    batch, seqlen, dim = x.shape
    width = weight.shape[1]
    num_slots, state_len, _ = conv_states.shape
    buffers = 0 if window_out is None else window_out.shape[0]
    dim_blocks, sizes, align = split_blocks(dim, split_sizes, config.block_d)
    nodes = min(2 if width <= 4 else 1, max(seqlen, 1))
    values = (
        batch, seqlen, dim, num_slots, state_len, known_pad(pad_slot_id, num_slots), buffers,
        known_pad(pad_slot_id, buffers), dim_blocks, *x.stride(), *weight.stride(), stride(bias, 0),
        *conv_states.stride(), stride(cache_indices, 0), stride(cache_seqlens, 0), *tree_parents.stride(),
        *(stride(window_out, axis) for axis in range(4)), stride(window_indices, 0),
        *(stride(residual, axis) for axis in range(3)), *((0, 0, 1) if sizes else out.stride()),
    )  # fmt: skip
    constants = dict(
        WIDTH=width, SILU=silu, LAYOUT=layout, SIZES=sizes, ALIGN=align, PTX=NATIVE_PTX,
        WORD_BITS=word_bits(weight), NODES=nodes, BLOCK_D=config.block_d,
    )  # fmt: skip
    grid = (batch * triton.cdiv(seqlen, nodes) * dim_blocks, 1, 1)
    return Launch(_tree_kernel, grid, values, constants, num_warps=config.num_warps)


def parents_from_links(next_token, next_sibling):
    """`tree_parents_from_links` on checked arguments; plain torch, nothing synchronises."""
    batch, nodes = next_token.shape
    node = torch.arange(nodes, device=next_token.device)
    # Who names a node: twice its number, plus 1 if as a sibling. Of several the last counts; column `nodes` takes the rest.
    links, names = [], []
    for as_sibling, link in enumerate((next_token.long(), next_sibling.long())):
        links.append(torch.where((link > node) & (link < nodes), link, nodes))
        names.append((2 * node + as_sibling).expand(batch, nodes))
    named = torch.full((batch, nodes + 1), -1, device=node.device)
    named = named.scatter_reduce(1, torch.cat(links, 1), torch.cat(names, 1), "amax")[:, :nodes]
    # The first of its siblings, found by jumps of 1, 2, 4, ... siblings; then its parent, 0 if nobody names it.
    first = torch.where((named >= 0) & (named % 2 == 1), named // 2, node)
    for _ in range((nodes - 1).bit_length() if nodes else 0):
        first = first.gather(1, first)
    parent = torch.where(named >= 0, named // 2, 0).gather(1, first)
    return torch.where(first == 0, -1, parent).int()
