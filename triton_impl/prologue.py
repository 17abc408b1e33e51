"""The front of a linear-attention layer in one launch: convolution, split into q, k and v, L2 norm of heads, gates.

Prefill: a program is one of `prefill`'s walk, block_t tokens of one row times block_d channels, which are whole heads of q or
of k, or channels of v. Decode: one of `update`. A value is normalised between its activation and its store, in the
registers of the warp that holds the head. Behind the blocks of channels come those of the gates: the same tokens times
some columns of g and beta.

What other kernels convolve (several tokens a row, trees, channel-first x) has a second launch behind them, `prepare_behind`,
which normalises q and k where they lie and makes the gates.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl import prefill, update
from triton_impl.arithmetic import Norm, finish, load_weights, native_ptx, round_to, widen, word_bits
from triton_impl.config import MAX_GRID_YZ, next_power_of_2
from triton_impl.launch import Launch, known_pad, overlaps, program_grid, strides_of, wait_for_inputs
from triton_impl.prefill import block_of_row, row_of_program, slot_in_layout
from triton_impl.records import (
    Channels,
    Items,
    Pool,
    Row,
    Rows,
    Tokens,
    at,
    constants,
    holds,
    strides_record,
    tokens_of,
)
from triton_impl.rows import channel_block_and_place, find_row
from triton_impl.slots import find_slot, is_slot
from triton_impl.update import update_rows

GATES = ("a", "b", "A_log", "dt_bias")
ARRAYS = (
    "x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state", "cache_seqlens", *GATES,
)  # fmt: skip
UPDATE_ARRAYS = ("x", "weight", "bias", "conv_states", "cache_indices", *GATES)
BEHIND_ARRAYS = ("query_start_loc", "cache_indices", *GATES)
Strides = strides_record(*ARRAYS)  # of a and b those of row, token, head and channel
UpdateStrides = strides_record(*UPDATE_ARRAYS)
BehindStrides = strides_record(*BEHIND_ARRAYS)


class Heads(NamedTuple):
    """Heads and gates of a call; constants.

    Attributes:
      keys, key_dim: heads of q, and of k; channels of each; lanes: the power of two that holds these.
      value_channels: channels of v; value_heads: their heads, the columns of beta.
      blocks: programs over q's channels, and over k's.
      gates_from: the first program of gates; gate_columns: columns of each; g_blocks: how many of them have columns of g.
      columns: of g; per_head: of each head.
      scaled: whether q is scaled, and k not; lower: lower_bound, or None; rounds: whether beta is rounded to b's dtype.
    """

    keys: Any
    key_dim: Any
    lanes: Any
    value_channels: Any
    value_heads: Any
    blocks: Any
    gates_from: Any
    gate_columns: Any
    g_blocks: Any
    columns: Any
    per_head: Any
    scaled: Any
    lower: Any
    rounds: Any


class Gates(NamedTuple):
    """What the gates are made of, and the gates [tokens, columns], None where there are none; the call's strides."""

    a: Any
    b: Any
    A_log: Any
    dt_bias: Any
    g: Any
    beta: Any
    strides: Any


class Behind(NamedTuple):
    """What the kernel behind a convolution is compiled for; see `prefill.Options`."""

    packed: Any
    pooled: Any
    folded: Any
    block_t: Any
    block_d: Any
    search: Any
    ptx: Any
    norm: Any


@triton.jit
def head_channels(block, out, tokens, h: tl.constexpr, block_d: tl.constexpr):
    """The channels of a block, and where their results go: q, k and v lie one behind the other in `out`."""
    wide: tl.constexpr = h.keys * h.key_dim
    part = (block >= h.blocks).to(tl.int32) + (block >= 2 * h.blocks).to(tl.int32)
    size = tl.where(part < 2, wide, h.value_channels)
    lane = (block - part * h.blocks) * block_d + tl.arange(0, block_d)
    local = lane
    exist = lane < size
    if h.lanes != h.key_dim:
        local = tl.where(part < 2, lane // h.lanes * h.key_dim + lane % h.lanes, lane)
        exist = tl.where(part < 2, (lane % h.lanes < h.key_dim) & (lane // h.lanes < h.keys), exist)
    exist = exist & holds(block < h.gates_from)
    first = part * wide
    ptr = out + (tl.cast(tokens, tl.int64) * first - first)
    return Channels(first + local, exist), Tokens(ptr, tl.cast(size, tl.int64), tl.cast(1, tl.int64))


@triton.jit
def exponential(z):
    """exp of a float32 block to about an ulp: what the product with log2(e) loses comes back as a factor."""
    exponent = z * 1.4426950408889634
    lost = tl.fma(z, 1.925963033500443e-08, tl.fma(z, 1.4426950408889634, -exponent))
    p = tl.exp2(exponent)
    return tl.where((p > 0.0) & (p < float("inf")), tl.fma(p, lost * 0.6931471805599453, p), p)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + exponential(-z))


@triton.jit
def softplus(z):
    """log(1 + exp(z)) up to 20, z beyond."""
    u = exponential(tl.minimum(z, 20.0, propagate_nan=tl.PropagateNan.ALL))
    more = 1.0 + u
    # what the sum lost, times the logarithm's slope
    return tl.where(z > 20.0, z, tl.log(more) + (u - (more - 1.0)) / more)


@triton.jit
def make_gates(gates, row, t, target, inside, live, block, h: tl.constexpr):
    """A block of g's and beta's columns for some tokens; zeros for those that are not live.

    Args:
      row, t: a row and [T] tokens in it, as a and b count them; target: [T], as g and beta do, all 64-bit.
      inside: [T], the tokens that exist; live: [T] or one for all, those that are computed. No load waits for it.
    """
    c = block * h.gate_columns + tl.arange(0, h.gate_columns)
    t = t[:, None]
    if gates.a is not None:
        if block < h.g_blocks:
            head = c // h.per_head
            channel = c % h.per_head
            exist = c < h.columns
            stored = inside[:, None] & exist[None, :]
            column = head * tl.cast(gates.strides.a[2], tl.int64) + channel * tl.cast(
                gates.strides.a[3], tl.int64
            )
            source = gates.a + row * gates.strides.a[0] + t * gates.strides.a[1] + column[None, :]
            z = widen(tl.load(source, mask=stored, other=0.0))
            if gates.dt_bias is not None:
                place = gates.dt_bias + head * gates.strides.dt_bias[0] + channel * gates.strides.dt_bias[1]
                z = z + widen(tl.load(place, mask=exist, other=0.0))[None, :]
            rate = tl.load(gates.A_log + head * gates.strides.A_log, mask=exist, other=0.0)
            rate = exponential(widen(rate))[None, :]
            if h.lower is None:
                g = -rate * softplus(z)
            else:
                g = h.lower * sigmoid(rate * z)
            tl.store(gates.g + target[:, None] * h.columns + c[None, :], tl.where(live, g, 0.0), mask=stored)
    if gates.b is not None:
        own = block
        if h.per_head > 1:
            own = block - h.g_blocks
        c = own * h.gate_columns + tl.arange(0, h.gate_columns)
        stored = inside[:, None] & ((c >= 0) & (c < h.value_heads))[None, :]
        source = (
            gates.b
            + row * gates.strides.b[0]
            + t * gates.strides.b[1]
            + (c * tl.cast(gates.strides.b[2], tl.int64))[None, :]
        )
        beta = sigmoid(widen(tl.load(source, mask=stored, other=0.0)))
        if h.rounds:
            beta = widen(round_to(beta, gates.b.dtype.element_ty))
        tl.store(
            gates.beta + target[:, None] * h.value_heads + c[None, :],
            tl.where(live, beta, 0.0),
            mask=stored,
        )


@triton.jit
def _block(
    x, out, gates, row, first, block, channels, weights,
    h: tl.constexpr, q: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    """The block of a row that begins at token `first`: channels of q, k or v, or gates."""
    if block >= h.gates_from:
        t = first.to(tl.int64) + tl.arange(0, v.block_t)
        make_gates(gates, 0, t, t, t < row.end, holds(row.live), block - h.gates_from, h)
    elif block >= 2 * h.blocks:
        block_of_row(x, None, out, row, first, channels, weights, v)
    elif h.scaled:
        if block < h.blocks:
            block_of_row(x, None, out, row, first, channels, weights, q)
        else:
            block_of_row(x, None, out, row, first, channels, weights, k)
    else:
        block_of_row(x, None, out, row, first, channels, weights, k)


@triton.jit(do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "channel_blocks"])
def _prologue_kernel(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, a, b, A_log, dt_bias,
    out, g, beta, strides, tokens, batch, num_slots, state_len, pad_slot_id, channel_blocks,
    h: tl.constexpr, q: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    x = tokens_of(x, strides.x)
    gates = Gates(a, b, A_log, dt_bias, g, beta, strides)
    slots = Items(cache_indices, strides.cache_indices)
    flags = Items(has_initial_state, strides.has_initial_state)
    rows = Rows(query_start_loc, slots, flags, batch, tokens)

    # mapping of programs; the taps are under way while the row is looked for
    block_d, place = channel_block_and_place(channel_blocks, v.folded)
    channels, out = head_channels(block_d, out, tokens, h, v.block_d)
    wait_for_inputs(v)
    weights = load_weights(weight, bias, strides, channels, v)
    row, start, end, slot, flag, block = row_of_program(rows, place, v)
    last_block = (end - start - 1) // v.block_t
    if (block < 0) | (end <= start) | (block > last_block):
        return
    live = row < batch
    held = None
    if conv_states is not None:
        slot = slot.to(tl.int64)
        live = live & is_slot(slot, num_slots, pad_slot_id)
        seqlens = Items(cache_seqlens, strides.cache_seqlens)
        held = slot_in_layout(conv_states, slot, strides.conv_states, seqlens, row, row < batch, state_len, v)
    past = None
    if has_initial_state is not None:
        past = held
    this = Row(start, end, live, flag != 0, held, past, None)

    if v.flat:
        first = start + block * v.block_t
        _block(x, out, gates, this, first, block_d, channels, weights, h, q, k, v)
    else:
        for i in range(block, last_block + 1, tl.num_programs(2)):
            first = start + i * v.block_t
            _block(x, out, gates, this, first, block_d, channels, weights, h, q, k, v)


@triton.jit(do_not_specialize=["batch", "num_slots", "pad_slot_id"])
def _prologue_update_kernel(
    x, weight, bias, conv_states, cache_indices, a, b, A_log, dt_bias, out, g, beta, strides,
    batch, num_slots, pad_slot_id, channel_blocks,
    h: tl.constexpr, q: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    x = tokens_of(x, strides.x)
    block_d, place = channel_block_and_place(channel_blocks, v.folded)
    first = place.to(tl.int64) * v.rows
    indices = Items(cache_indices, strides.cache_indices)
    pool = Pool(conv_states, num_slots, pad_slot_id)
    wait_for_inputs(v)
    if block_d >= h.gates_from:
        t = first + tl.arange(0, v.rows)
        _, live = find_slot(indices, t, t < batch, num_slots, pad_slot_id)
        gates = Gates(a, b, A_log, dt_bias, g, beta, strides)
        make_gates(gates, 0, t, t, t < batch, live[:, None], block_d - h.gates_from, h)
        return
    channels, out = head_channels(block_d, out, batch, h, v.block_d)
    if block_d >= 2 * h.blocks:
        update_rows(x, out, weight, bias, pool, indices, strides, first, batch, channels, v)
    elif h.scaled:
        if block_d < h.blocks:
            update_rows(x, out, weight, bias, pool, indices, strides, first, batch, channels, q)
        else:
            update_rows(x, out, weight, bias, pool, indices, strides, first, batch, channels, k)
    else:
        update_rows(x, out, weight, bias, pool, indices, strides, first, batch, channels, k)


@triton.jit
def _finish_block(source, out, live, first, last, channels, o: tl.constexpr):
    """Stored values of tokens [first, last) as `o.norm` says."""
    for i in tl.static_range(o.block_t):
        inside = channels.exist & holds(first + i < last)
        value = widen(tl.load(at(source, first + i, channels), mask=inside, other=0.0))
        value = tl.where(live, finish(value, out.ptr.dtype.element_ty, o), 0.0)
        tl.store(at(out, first + i, channels), round_to(value, out.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "batch", "seqlen", "num_slots", "pad_slot_id", "channel_blocks"])
def _behind_kernel(
    query_start_loc, cache_indices, a, b, A_log, dt_bias, source, out, g, beta, strides,
    tokens, batch, seqlen, num_slots, pad_slot_id, channel_blocks,
    h: tl.constexpr, q: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    block_d, place = channel_block_and_place(channel_blocks, v.folded)
    channels, into = head_channels(block_d, out, tokens, h, v.block_d)
    _, source = head_channels(block_d, source, tokens, h, v.block_d)
    slots = Items(cache_indices, strides.cache_indices)
    if v.packed:
        rows = Rows(query_start_loc, slots, Items(None, None), batch, tokens)
        row, start, end, slot, _ = find_row(rows, place, v.block_t, v.search)
        block = place - start // v.block_t - row
        ahead = start * 0
    else:
        blocks = tl.maximum((seqlen + v.block_t - 1) // v.block_t, 1)
        row = place // blocks
        block = place % blocks
        start = row * seqlen
        end = start + seqlen
        ahead = start
        slot = row
        if cache_indices is not None:
            slot = tl.load(slots.ptr + row.to(tl.int64) * slots.i)
    first = start + block * v.block_t
    last = tl.minimum(end, first + v.block_t)
    if (block < 0) | (first >= last):
        return
    live = row < batch
    if v.pooled:
        live = live & is_slot(slot.to(tl.int64), num_slots, pad_slot_id)
    if block_d >= h.gates_from:
        gates = Gates(a, b, A_log, dt_bias, g, beta, strides)
        t = first.to(tl.int64) + tl.arange(0, v.block_t)
        outer = row.to(tl.int64)
        make_gates(gates, outer, t - ahead, t, t < last, holds(live), block_d - h.gates_from, h)
    elif block_d >= 2 * h.blocks:
        _finish_block(source, into, live, first, last, channels, v)
    elif h.scaled:
        if block_d < h.blocks:
            _finish_block(source, into, live, first, last, channels, q)
        else:
            _finish_block(source, into, live, first, last, channels, k)
    else:
        _finish_block(source, into, live, first, last, channels, k)


# On the host.


def lanes_of(head_k_dim):
    """The power of two that holds a head of q or k."""
    return next_power_of_2(head_k_dim)


def norms(call, sizes):
    """What becomes of q, k and v behind the activation: a `Norm` each, or None."""
    lanes = lanes_of(sizes.head_k_dim)
    scales = call.q_scale, 1.0
    stored = call.norm_rounding == "storage"
    found = [
        Norm(lanes, call.norm_eps, scale, stored, call.qk_l2norm) if call.qk_l2norm or scale != 1.0 else None
        for scale in scales
    ]
    return *found, None


def prepare(call, sizes, config, stores):
    """Prepares the kernel for a checked `PrologueFnCall` whose x is walked.

    Args:
      sizes: `call.check()`.
      config: a PrefillConfig; a program's channels hold whole heads.
      stores: as in `prefill.prepare`.

    Returns:
      A Launch of ARRAYS, the flat q, k and v, g and beta.
    """
    conv, pooled = sizes.conv, call.conv_states is not None
    layout = call.state_layout if pooled else "front"
    h, programs = heads_of(call, sizes, config.block_d)
    places = conv.tokens // config.block_t + conv.batch + 1 if config.flat else conv.batch + 1
    deep = 1 if config.flat else min(max(config.row_blocks, 1), MAX_GRID_YZ)
    grid, folded = program_grid(programs, places, deep)
    options = prefill.Options(
        width=conv.width,
        silu=call.activation is not None,
        layout=layout,
        stores=stores and pooled,
        sizes=(),
        align=1,
        word_bits=word_bits(call.weight),
        flat=config.flat,
        walk=True,
        folded=folded,
        block_t=config.block_t,
        block_d=config.block_d,
        group=config.group,
        stages=config.stages,
        search=config.search,
        levels=0,
        aligned=False,
        ptx=native_ptx(),
        overlap=overlaps(call.x.device),
        hip=torch.version.hip is not None,
    )
    strides = Strides(*strides_of(call, ARRAYS))._replace(**_gate_strides(call))
    values = (
        strides,
        conv.tokens,
        conv.batch,
        conv.num_slots,
        None if layout == "front" else conv.state_len,
        known_pad(call.pad_slot_id, conv.num_slots),
        programs if folded else None,
        constants(h),
        *_variants(options, call, sizes),
    )
    return Launch(_prologue_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)


def prepare_update(call, sizes, config):
    """Prepares the kernel for a checked `PrologueUpdateCall` of one token a row, as `update.prepare`.

    Args:
      sizes: `call.check()`.
      config: an UpdateConfig; a program's channels hold whole heads.

    Returns:
      A Launch of UPDATE_ARRAYS, the flat q, k and v, g and beta.
    """
    conv = sizes.conv
    h, programs = heads_of(call, sizes, config.block_d)
    grid, folded = program_grid(programs, triton.cdiv(conv.batch, config.rows))
    options = update.Options(
        width=conv.width,
        silu=call.activation is not None,
        word_bits=word_bits(call.weight),
        folded=folded,
        rows=config.rows,
        block_d=config.block_d,
        ptx=native_ptx(),
        overlap=overlaps(call.x.device, config.hurry),
    )
    strides = UpdateStrides(*strides_of(call, UPDATE_ARRAYS))._replace(**_gate_strides(call, rows=True))
    strides = strides._replace(x=(call.x.stride(0), call.x.stride(-1)))
    values = (
        strides,
        conv.batch,
        conv.num_slots,
        known_pad(call.pad_slot_id, conv.num_slots),
        programs,
        constants(h),
        *_variants(options, call, sizes),
    )
    return Launch(_prologue_update_kernel, grid, values, num_warps=config.num_warps, overlap=options.overlap)


def prepare_behind(call, sizes, config, copies):
    """Prepares what follows the plain convolution of a checked call: norm and gates.

    Args:
      sizes: `call.check()`.
      config: a PrefillConfig, whose block_t, block_d, search and num_warps are taken.
      copies: whether the convolution's result is float32 memory of its own; else q and k are normalised in place.

    Returns:
      A Launch of BEHIND_ARRAYS, the convolution's flat result, the flat q, k and v, g and beta; None: nothing is left to do.
    """
    conv = sizes.conv
    idle = not copies and norms(call, sizes)[0] is None and norms(call, sizes)[1] is None
    h, programs = heads_of(call, sizes, config.block_d, behind=not copies, idle=idle)
    if not programs:
        return None
    packed = call.query_start_loc is not None
    tokens = conv.tokens
    seqlen = None if packed else conv.seqlen
    if packed:
        places = tokens // config.block_t + conv.batch + 1
    else:
        places = conv.batch * max(triton.cdiv(seqlen, config.block_t), 1)
    grid, folded = program_grid(programs, places)
    options = Behind(
        packed=packed,
        pooled=call.conv_states is not None,
        folded=folded,
        block_t=config.block_t,
        block_d=config.block_d,
        search=config.search,
        ptx=native_ptx(),
        norm=None,
    )
    strides = BehindStrides(*strides_of(call, BEHIND_ARRAYS))._replace(**_gate_strides(call))
    values = (
        strides,
        conv.tokens if packed else conv.batch * seqlen,
        conv.batch,
        seqlen,
        conv.num_slots,
        known_pad(call.pad_slot_id, conv.num_slots),
        programs if folded else None,
        constants(h),
        *_variants(options, call, sizes),
    )
    return Launch(_behind_kernel, grid, values, num_warps=config.num_warps)


def _variants(options, call, sizes):
    return [constants(options._replace(norm=norm)) for norm in norms(call, sizes)]


def heads_of(call, sizes, block_d, behind=False, idle=False, gates=True):
    """(`Heads`, programs along the channels and gates).

    Args:
      behind: v is where it belongs already; idle: so are q and k; gates: whether there are programs for them.
    """
    lanes, channel = lanes_of(sizes.head_k_dim), sizes.gate == "channel"
    values = sizes.num_v_heads * sizes.head_v_dim
    blocks = 0 if idle else triton.cdiv(sizes.num_k_heads * lanes, block_d)
    gates_from = 2 * blocks + (0 if behind else triton.cdiv(values, block_d))
    columns = sizes.num_v_heads * (sizes.head_k_dim if channel else 1)
    gate_columns = min(next_power_of_2(columns), 256)
    g_blocks = triton.cdiv(columns, gate_columns)
    more = g_blocks if call.a is not None or call.b is not None else 0
    if channel and call.b is not None:
        more += triton.cdiv(sizes.num_v_heads, gate_columns)
    heads = Heads(
        keys=sizes.num_k_heads,
        key_dim=sizes.head_k_dim,
        lanes=lanes,
        value_channels=values,
        value_heads=sizes.num_v_heads,
        blocks=blocks,
        gates_from=gates_from,
        gate_columns=gate_columns,
        g_blocks=g_blocks,
        columns=columns,
        per_head=sizes.head_k_dim if channel else 1,
        scaled=call.q_scale != 1.0,
        lower=call.lower_bound,
        rounds=call.beta_rounding == "storage",
    )
    return heads, gates_from + (more if gates else 0)


def _gate_strides(call, rows=False):
    """Strides of row, token, head and channel of a and b; of head and channel of dt_bias.

    rows: a row has one token, and rows count as tokens.
    """
    found = {}
    packed = call.query_start_loc is not None
    axes = call.x.dim() - 1
    for name in ("a", "b"):
        if (array := getattr(call, name)) is not None:
            strides = array.stride()
            if rows or (axes == 1 and packed):
                outer = (0, strides[0])
            else:
                outer = (strides[0], 0) if axes == 1 else strides[:2]
            found[name] = (*outer, *strides[axes:], 0)[:4]
    if call.dt_bias is not None:
        found["dt_bias"] = (*call.dt_bias.stride(), 0)[:2]
    return found
