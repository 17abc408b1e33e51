"""Draft trees: every node convolved behind its ancestors and the slot's window, nothing committed.

A program owns NODES nodes of a row and BLOCK_D channels. The nodes' chains of parents are followed first, then all
their inputs are loaded, so that the waits of all nodes overlap.
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
from triton_impl.launch import Launch, known_pad, like_result, overlaps, strides_of, wait_for_inputs
from triton_impl.records import (
    Items,
    Tokens,
    at,
    constants,
    holds,
    slot_of,
    strides_record,
    tokens_of,
    windows_of,
)
from triton_impl.rows import counted
from triton_impl.slots import column, find_slot, first_column, part_of_out, split_blocks

ARRAYS = (
    "x", "weight", "bias", "conv_states", "cache_indices", "cache_seqlens", "tree_parents", "window_out", "window_indices",
    "residual",
)  # fmt: skip
Strides = strides_record(*ARRAYS, "out")


class Options(NamedTuple):
    """What the kernel is compiled for; sizes, align: `slots.split_blocks`; nodes: of a program."""

    width: Any
    silu: Any
    layout: Any
    sizes: Any
    align: Any
    word_bits: Any
    nodes: Any
    block_d: Any
    ptx: Any
    gate: Any = None
    overlap: Any = None


@triton.jit
def _ancestors(parents, stride, node, seqlen, o: tl.constexpr):
    """A node, its parent, ..., `width` in all, then -1, -2, ... for the window's newest entry and those before it."""
    sources = ()
    source = node
    for _ in tl.static_range(o.width):
        sources = sources + (source,)
        inside = (source >= 0) & (source < seqlen)
        parent = counted(tl.load(parents + source * stride, mask=inside, other=-1))
        parent = tl.maximum(tl.minimum(parent, source - 1), -1)
        source = tl.where(source >= 0, parent, source - 1)
    return sources


@triton.jit
def _entry(sources, arrived, stored, k: tl.constexpr, dtype: tl.constexpr):
    """Input k of all: of a token, or of the window where its source is no token."""
    return tl.where(sources[k] >= 0, recast(arrived[k], dtype), recast(stored[k], dtype))


@triton.jit(
    do_not_specialize=[
        "batch", "num_slots", "state_len", "pad_slot_id", "buffers", "pad_buffer", "dim_blocks",
    ]
)  # fmt: skip
def _tree_kernel(
    x, weight, bias, conv_states, cache_indices, cache_seqlens, tree_parents, window_out, window_indices, residual, out,
    strides, batch, seqlen, dim, num_slots, state_len, pad_slot_id, buffers, pad_buffer, dim_blocks, o: tl.constexpr,
):  # fmt: skip
    x, out = tokens_of(x, strides.x[1:]), tokens_of(out, strides.out[1:])

    # mapping of programs
    node_blocks = tl.cdiv(seqlen, o.nodes)
    turn = tl.program_id(0) // dim_blocks
    row = (turn // node_blocks).to(tl.int64)
    node = (turn % node_blocks * o.nodes).to(tl.int64)
    tokens = tl.cast(batch, tl.int64) * seqlen
    channels, out = part_of_out(tl.program_id(0) % dim_blocks, out, dim, tokens, o)
    row_of_out = strides.out[0]
    if len(o.sizes) > 0:
        row_of_out = seqlen * out.t
    x, out = Tokens(x.ptr + row * strides.x[0], x.t, x.d), Tokens(out.ptr + row * row_of_out, out.t, out.d)
    added = None
    if residual is not None:
        added = tokens_of(residual + row * strides.residual[0], strides.residual[1:])
    tree_parents += row * strides.tree_parents[0]

    indices, seqlens = (
        Items(cache_indices, strides.cache_indices),
        Items(cache_seqlens, strides.cache_seqlens),
    )
    wait_for_inputs(o)
    slot, live = find_slot(indices, row, row < batch, num_slots, pad_slot_id)
    first = first_column(seqlens, None, row, row < batch, state_len, o)
    old = slot_of(conv_states, slot, strides.conv_states, first, state_len)
    taps, start = load_taps(load_weights(weight, bias, strides, channels, o), o)

    # all chains of parents are followed, then all inputs are asked for, so that waits overlap
    sources = ()
    for i in tl.static_range(o.nodes):
        stride = tl.cast(strides.tree_parents[1], tl.int64)
        sources = sources + _ancestors(tree_parents, stride, node + i, seqlen, o)
    arrived = ()
    stored = ()
    for k in tl.static_range(o.nodes * o.width):
        source = sources[k]
        inside = (source >= 0) & (source < seqlen)
        arrived = arrived + (load_input(at(x, source, channels), channels.exist & holds(inside), o),)
        if k % o.width > 0:
            place = column(old, o.width - 1 + source, channels, o)
            stored = stored + (
                tl.load(place, mask=channels.exist & holds(live) & holds(source < 0), other=0.0),
            )
        else:
            stored = stored + (tl.zeros([o.block_d], conv_states.dtype.element_ty),)

    keeps = live
    if window_out is not None:
        indices = Items(window_indices, strides.window_indices)
        buffer, known = find_slot(indices, row, row < batch, buffers, pad_buffer)
        keeps = live & known
        windows = windows_of(window_out, buffer, strides.window_out)
    for i in tl.static_range(o.nodes):
        t = node + i
        inside = channels.exist & holds(t < seqlen)
        window = ()
        for j in tl.static_range(o.width):  # oldest first
            entry = _entry(sources, arrived, stored, (i + 1) * o.width - 1 - j, tl.float32)
            window = window + (entry,)
        value = activate(convolve(window, taps, start, o.width), o)
        if added is not None:
            value = join_residual(value, tl.load(at(added, t, channels), mask=inside, other=0.0), o)
        value = round_to(tl.where(live, value, 0.0), out.ptr.dtype.element_ty)
        tl.store(at(out, t, channels), value, mask=inside)
        if window_out is not None:
            for j in tl.static_range(o.width - 1):
                dtype = window_out.dtype.element_ty
                kept = _entry(sources, arrived, stored, (i + 1) * o.width - 2 - j, dtype)
                place = windows.ptr + t * windows.t + j * windows.l + channels.index * windows.d
                tl.store(place, kept, mask=inside & holds(keeps))


def prepare(call, sizes, config, gate=None):
    """Prepares the kernel for a checked `UpdateCall` of such shapes, strides and dtypes.

    Args:
      sizes, config, gate: as in `verify.prepare`.

    Returns:
      A Launch of ARRAYS and out; with `split_sizes` the parts follow each other in a flat `out`.
    """
    windows = call.window_out
    dim_blocks, parts, align = split_blocks(sizes.dim, call.split_sizes, config.block_d)
    nodes = min(2 if sizes.width <= 4 else 1, max(sizes.seqlen, 1))
    options = Options(
        width=sizes.width,
        silu=call.activation is not None,
        layout=call.state_layout,
        sizes=parts,
        align=align,
        word_bits=word_bits(call.weight),
        nodes=nodes,
        block_d=config.block_d,
        ptx=native_ptx(),
        overlap=overlaps(call.x.device, config.hurry),
        gate=gate,
    )
    values = (
        Strides(*strides_of(call, ARRAYS), out=(0, 0, 1) if parts else like_result(call).stride()),
        sizes.batch,
        sizes.seqlen,
        sizes.dim,
        sizes.num_slots,
        sizes.state_len,
        known_pad(call.pad_slot_id, sizes.num_slots),
        None if windows is None else windows.shape[0],
        None if windows is None else known_pad(call.pad_slot_id, windows.shape[0]),
        dim_blocks,
        constants(options),
    )
    grid = (sizes.batch * triton.cdiv(sizes.seqlen, nodes) * dim_blocks, 1, 1)
    return Launch(_tree_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)


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
