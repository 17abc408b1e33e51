"""The differentiable prologue of the gated delta rule: gradients of q, k and v in one pass, then those of the gates.

The backward kernel is `backward`'s: a program's channels are whole heads of q or of k, or channels of v, and between its
upstream gradient and the slope of the activation comes the norm's derivative, from the value that it recomputes.
"""

import torch
import triton
import triton.language as tl

from triton_impl.arithmetic import native_ptx, word_bits
from triton_impl.backward import (
    Given,
    Options,
    Results,
    back_of_program,
    backward_config,
    prepare_sums,
)
from triton_impl.config import MAX_GRID_YZ
from triton_impl.launch import Launch
from triton_impl.prologue import head_channels, heads_of, lanes_of, norms
from triton_impl.records import Tokens, constants, strides_record

Strides = strides_record("dq", "dk", "dv", "dfinal", "x", "weight", "bias", "initial_states", "dx")


def prologue_backward_config(
    tokens, dim, batch, width, lanes, max_seqlen=None, schedule="auto", warp_size=32
):
    """`backward.backward_config` for heads of `lanes` channels, each within a warp."""
    plain = backward_config(tokens, dim, batch, width, 0, max_seqlen, schedule, warp_size)
    channels = max(lanes // warp_size, 2)  # a thread
    block_d = max(plain.block_d, warp_size * channels)
    return plain._replace(block_d=block_d, group=4, num_warps=block_d // (warp_size * channels))


@triton.jit(do_not_specialize=["tokens", "batch", "channel_blocks"])
def _prologue_backward_kernel(
    dq, dk, dv, dfinal, x, weight, bias, initial_states, query_start_loc, dx, dinitial, partial, strides,
    tokens, dim, batch, channel_blocks, h: tl.constexpr, q: tl.constexpr, k: tl.constexpr, v: tl.constexpr,
):  # fmt: skip
    block_d = tl.program_id(0) % channel_blocks
    program = tl.program_id(0) // channel_blocks
    wide: tl.constexpr = h.keys * h.key_dim
    channels, _ = head_channels(block_d, dx, tokens, h, v.block_d)
    given = Given(dfinal, x, weight, bias, initial_states, query_start_loc)
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
    walk = Launch(_prologue_backward_kernel, grid, values, num_warps=config.num_warps)
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
    need_sums, need_initial = needs
    lanes = lanes_of(sizes.head_k_dim)
    config = prologue_backward_config(
        tokens, dim, batch, width, lanes, call.max_seqlen, call.schedule, warp_size
    )
    places, walk, reduce = prepare(
        upstream, dfinal, x, weight, bias, initial_states, starts, call, sizes, need_sums, config
    )
    dx = torch.empty_like(x)
    dinitial = initial_states.new_empty(batch, width - 1, dim) if need_initial else None
    dweight = dbias = workspace = None
    if need_sums:
        workspace = x.new_empty(places, width + (bias is not None), dim, dtype=torch.float32)
        dweight = weight.new_empty(dim, width)
        dbias = None if bias is None else bias.new_empty(dim)
    walk(*upstream, dfinal, x, weight, bias, initial_states, starts, dx, dinitial, workspace)
    if need_sums:
        reduce(workspace, dweight, dbias)
    return dx, dweight, dbias, dinitial
