"""The differentiable prologue of the gated delta rule: gradients of q, k and v in one pass, those of the gates in another.

The backward kernel is `backward`'s: a program's channels are whole heads of q or of k, or channels of v, and between its
upstream gradient and the slope of the activation comes the norm's derivative, from the value that it recomputes.
Programs of the gates' kernel take some tokens times some columns of g and beta, as `prologue.make_gates`, and leave what
their tokens add to A_log and dt_bias in a place of their own; a second kernel adds the places up in their order.

That of the gated convolution is `backward`'s own kernel, on slices of the projection.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl import backward, gated_conv
from triton_impl.arithmetic import native_ptx, round_to, widen, word_bits
from triton_impl.backward import (
    Gates,
    Given,
    Options,
    Results,
    back_of_program,
    backward_config,
    prepare_sums,
)
from triton_impl.config import MAX_GRID_YZ, next_power_of_2
from triton_impl.launch import Launch
from triton_impl.packed_rows import launch_backward
from triton_impl.prologue import (
    exponential,
    head_channels,
    heads_of,
    lanes_of,
    norms,
    sigmoid,
    softplus,
)
from triton_impl.records import Tokens, constants, strides_record
from triton_impl.rows import offset

PROGRAMS = 6336  # three for every warp of 128 registers that an H100 holds at once
Strides = strides_record("dq", "dk", "dv", "dfinal", "x", "weight", "bias", "initial_states", "dx")


def prologue_backward_config(
    tokens, dim, batch, width, lanes, max_seqlen=None, schedule="auto", warp_size=32
):
    """`backward.backward_config` for heads of `lanes` channels, each within a warp."""
    plain = backward_config(tokens, dim, batch, width, 0, max_seqlen, schedule, warp_size)
    channels = max(lanes // warp_size, 2)  # a thread
    block_d = max(plain.block_d, warp_size * channels)
    # long blocks recompute less, but where there are few of them some multiprocessors get one more than others
    many = tokens * -(-dim // block_d) >= 128 * PROGRAMS
    block_t = min(plain.block_t, 128 if many else 64)
    return plain._replace(
        block_d=block_d,
        block_t=block_t,
        group=2,
        stages=2,
        num_warps=block_d // (warp_size * channels),
        row_blocks=-(-(tokens if max_seqlen is None else min(max_seqlen, tokens)) // block_t),
    )


@triton.jit(do_not_specialize=["tokens", "batch", "channel_blocks"])
def _prologue_backward_kernel(
    dq, dk, dv, dfinal, x, weight, bias, initial_states, query_start_loc, dx, dinitial, partial, strides,
    tokens, dim, batch, channel_blocks, h: tl.constexpr, q: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    block_d = tl.program_id(0) % channel_blocks
    program = tl.program_id(0) // channel_blocks
    wide: tl.constexpr = h.keys * h.key_dim
    channels, _ = head_channels(block_d, dx, tokens, h, v.block_d)
    given = Given(dfinal, x, weight, bias, initial_states, query_start_loc, None)
    results = Results(dx, dinitial, partial)
    if block_d < h.blocks:
        dout = Tokens(dq, tl.cast(strides.dq[0], tl.int64), tl.cast(strides.dq[1], tl.int64))
        back_of_program(dout, 0, given, results, strides, program, channels, tokens, dim, batch, q)
    elif block_d < 2 * h.blocks:
        step = tl.cast(strides.dk[1], tl.int64)
        dout = Tokens(dk - wide * step, tl.cast(strides.dk[0], tl.int64), step)
        back_of_program(dout, 0, given, results, strides, program, channels, tokens, dim, batch, k)
    else:
        step = tl.cast(strides.dv[1], tl.int64)
        dout = Tokens(dv - 2 * wide * step, tl.cast(strides.dv[0], tl.int64), step)
        back_of_program(dout, 0, given, results, strides, program, channels, tokens, dim, batch, v)


def prepare(upstream, dfinal, x, weight, bias, initial_states, query_start_loc, call, sizes, needs, config):
    """Prepares both kernels for checked arguments of these shapes, strides and dtypes.

    Args:
      upstream: gradients of q, k and v, [tokens, channels] each; dfinal: [batch, width-1, dim] or None.
      x: [tokens, dim]; the others as in `gated_delta_prologue`.
      call, sizes: the record and its checked sizes.
      needs: whether the gradients of weight and bias are wanted.
      config: a BackwardConfig.

    Returns:
      As `backward.prepare`; the first Launch takes the three gradients for dout.
    """
    tokens, dim = x.shape
    batch, width = query_start_loc.shape[0] - 1, weight.shape[1]
    places = tokens // config.block_t + batch + 1
    h, programs = heads_of(call, sizes, config.block_d, gates=False)
    if config.flat:
        grid = (places * programs, 1, 1)
    else:
        grid = ((batch + 1) * programs, min(max(config.row_blocks, 1), MAX_GRID_YZ), 1)
    dq, dk, dv = upstream
    strides = Strides(
        dq=dq.stride(),
        dk=dk.stride(),
        dv=dv.stride(),
        dfinal=None if dfinal is None else dfinal.stride(),
        x=(0, *x.stride()),
        weight=weight.stride(),
        bias=None if bias is None else bias.stride(0),
        initial_states=None if initial_states is None else initial_states.stride(),
        dx=(0, *torch.empty_like(x, device="meta").stride()),
    )
    options = Options(
        width=width,
        silu=call.activation is not None,
        bias=bias is not None,
        sums=needs,
        word_bits=word_bits(weight),
        flat=config.flat,
        block_t=config.block_t,
        block_d=config.block_d,
        group=config.group,
        search=config.search,
        stages=config.stages,
        dense=False,
        levels=0,
        aligned=False,
        phase_g=False,
        phase_o=False,
        ptx=native_ptx(),
    )
    variants = [constants(options._replace(norm=norm)) for norm in norms(call, sizes)]
    values = (strides, tokens, dim, batch, programs, constants(h), *variants)
    # heads of 128: as many programs at a time as they hold without spills
    most = 128 if native_ptx() and config.block_d // config.num_warps == 128 and width <= 4 else None
    walk = Launch(_prologue_backward_kernel, grid, values, num_warps=config.num_warps, maxnreg=most)
    return places, walk, prepare_sums(width, bias is not None, dim, places)


def launch(upstream, dfinal, x, weight, bias, initial_states, starts, call, sizes, needs, warp_size):
    """Runs both kernels.

    Args:
      upstream: as in `prepare`; x: [tokens, dim], channels side by side; needs: whether the gradients of weight and
        bias, and of the initial states, are wanted.

    Returns:
      (dx, dweight, dbias, dinitial), None for what is not.
    """
    tokens, dim = x.shape
    batch, width = starts.shape[0] - 1, weight.shape[1]
    lanes = lanes_of(sizes.head_k_dim)
    config = prologue_backward_config(
        tokens, dim, batch, width, lanes, call.max_seqlen, call.schedule, warp_size
    )
    tensors = dfinal, x, weight, bias, initial_states, starts
    prepared = prepare(upstream, *tensors, call, sizes, needs[0], config)
    return launch_backward(prepared, (*upstream, *tensors), torch.empty_like(x), needs)


def prepare_gated(dout, dfinal, call, initial_states, starts, need_sums, warp_size):
    """`backward.prepare` of a checked `GatedConvFnCall`, whose slices lie side by side: x and dx are slices of bcx and its gradient.

    Args:
      dout: [tokens, dim]; dfinal, initial_states, starts, need_sums: as there.
    """
    tokens, (dim, width), batch = call.bcx.shape[0], call.weight.shape, starts.shape[0] - 1
    of_in, of_out, of_x = gated_conv.offsets(call)
    x, gates = call.bcx.narrow(-1, of_x, dim), Gates(of_in - of_x, of_out - of_x, call.bcx)
    config = backward_config(tokens, dim, batch, width, 0, call.max_seqlen, call.schedule, warp_size)
    config = config._replace(group=4)  # a token loads more than twice as much
    given = x, call.weight, call.bias, initial_states, starts, call.activation is not None, need_sums, config
    return backward.prepare(dout, dfinal, *given, gates=gates)


# The gates.


class Columns(NamedTuple):
    """The gates of a call; constants.

    Attributes:
      heads: columns of b; per_head: those of a for each of them; lower: lower_bound, or None.
      lanes: the power of two that holds `per_head`.
      block_t, block_c: tokens and columns a program.
    """

    heads: Any
    per_head: Any
    lower: Any
    lanes: Any
    block_t: Any
    block_c: Any


@triton.jit
def _gate_slopes(z, rate, dg, h: tl.constexpr):
    """The gradients of z and of the rate's logarithm."""
    if h.lower is None:
        slope = tl.where(z > 20.0, 1.0, sigmoid(z))
        dz = -rate * slope * dg
        drate = -rate * softplus(z) * dg
    else:
        s = sigmoid(rate * z)
        dw = h.lower * s * (1.0 - s) * dg
        dz = rate * dw
        drate = rate * z * dw
    return dz, drate


@triton.jit(do_not_specialize=["tokens", "batch"])
def _gates_backward_kernel(
    a, b, A_log, dt_bias, dg, dbeta, query_start_loc, da, db, partial, tokens, batch, h: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    t = place * h.block_t + tl.arange(0, h.block_t)
    c = tl.program_id(1) * h.block_c + tl.arange(0, h.block_c)
    columns: tl.constexpr = h.heads * h.per_head
    inside = (t < tokens)[:, None]
    live = (t < offset(query_start_loc, batch, batch, tokens))[:, None]
    if a is not None:
        exist = c < columns
        wanted = inside & exist[None, :]
        of_a = t[:, None] * columns + c[None, :]
        z = widen(tl.load(a + of_a, mask=wanted, other=0.0))
        if dt_bias is not None:
            z = z + widen(tl.load(dt_bias + c, mask=exist, other=0.0))[None, :]
        rate = exponential(widen(tl.load(A_log + c // h.per_head, mask=exist, other=0.0)))[None, :]
        if dg is not None:
            upstream = widen(tl.load(dg + of_a, mask=wanted, other=0.0))
        else:
            upstream = tl.zeros_like(z)
        dz, drate = _gate_slopes(z, rate, upstream, h)
        dz = tl.where(live & wanted, dz, 0.0)
        drate = tl.where(live & wanted, drate, 0.0)
        tl.store(da + of_a, round_to(dz, da.dtype.element_ty), mask=wanted)
        sums = partial + place * (2 * columns) + c
        tl.store(sums, tl.sum(drate, axis=0), mask=exist)
        tl.store(sums + columns, tl.sum(dz, axis=0), mask=exist)
    if b is not None:
        wanted = inside & (c < h.heads)[None, :]
        of_b = t[:, None] * h.heads + c[None, :]
        s = sigmoid(widen(tl.load(b + of_b, mask=wanted, other=0.0)))
        if dbeta is not None:
            upstream = widen(tl.load(dbeta + of_b, mask=wanted, other=0.0))
        else:
            upstream = tl.zeros_like(s)
        slope = tl.where(live, s * (1.0 - s) * upstream, 0.0)
        tl.store(db + of_b, round_to(slope, db.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["places"])
def _gates_sum_kernel(partial, dA_log, ddt_bias, places, h: tl.constexpr):
    """The sums over all places, of the columns of one head."""
    head = tl.program_id(0)
    lane = tl.arange(0, h.lanes)
    exist = lane < h.per_head
    columns: tl.constexpr = h.heads * h.per_head
    rows: tl.constexpr = 4096 // h.lanes
    row = tl.arange(0, rows)
    rate = tl.zeros([rows, h.lanes], tl.float32)
    bias = tl.zeros([rows, h.lanes], tl.float32)
    for first in range(0, places, rows):
        wanted = (first + row < places)[:, None] & exist[None, :]
        source = (first + row).to(tl.int64)[:, None] * (2 * columns) + (head * h.per_head + lane)[None, :]
        rate += tl.load(partial + source, mask=wanted, other=0.0)
        bias += tl.load(partial + source + columns, mask=wanted, other=0.0)
    total = tl.sum(tl.sum(rate, axis=0), axis=0)
    tl.store(dA_log + head, round_to(total, dA_log.dtype.element_ty))
    if ddt_bias is not None:
        total = round_to(tl.sum(bias, axis=0), ddt_bias.dtype.element_ty)
        tl.store(ddt_bias + head * h.per_head + lane, total, mask=exist)


def launch_gates(call, sizes, dg, dbeta):
    """Runs the kernels of the gates of a `PrologueFnCall` of packed rows.

    Args:
      dg, dbeta: upstream gradients, or None for zeros.

    Returns:
      (da, db, dA_log, ddt_bias), None for what the call does not have.
    """
    tokens, heads = call.x.shape[0], sizes.num_v_heads
    per_head = sizes.head_k_dim if sizes.gate == "channel" else 1
    columns = heads * per_head
    block_c = min(next_power_of_2(columns), 128)
    h = Columns(
        heads, per_head, call.lower_bound, next_power_of_2(per_head), min(4096 // block_c, 512), block_c
    )
    places = triton.cdiv(tokens, h.block_t)
    a, b, A_log, dt_bias, dg, dbeta = (
        None if tensor is None else tensor.contiguous()
        for tensor in (call.a, call.b, call.A_log, call.dt_bias, dg, dbeta)
    )
    da = db = partial = drate = dbias = None
    if a is not None:
        da, drate = torch.empty_like(a), torch.empty_like(A_log)
        dbias = None if dt_bias is None else torch.empty_like(dt_bias)
        partial = a.new_empty(places, 2, columns, dtype=torch.float32)
    if b is not None:
        db = torch.empty_like(b)
    blocks = triton.cdiv(columns if a is not None else heads, block_c)
    grid, batch = (places, blocks, 1), call.query_start_loc.shape[0] - 1
    run = Launch(_gates_backward_kernel, grid, (tokens, batch, constants(h)), num_warps=4)
    run(a, b, A_log, dt_bias, dg, dbeta, call.query_start_loc, da, db, partial)
    if a is not None:
        add = Launch(_gates_sum_kernel, (heads, 1, 1), (places, constants(h)), num_warps=4)
        add(partial, drate, dbias)
    return da, db, drate, dbias
