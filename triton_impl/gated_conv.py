"""The gated short convolution of LFM2: `out = C * conv(B * x)`, with B, C and x as channel slices of one projection.

It is the plain convolution of the slice x, whose kernels multiply what they load by B, a fixed distance away
(`arithmetic.load_input`), and take C for their residual, by which they multiply (`arithmetic.join_residual`). So it has every
layout, slot and window of the plain operations, in one pass over the projection. So has its gradient: `backward.Gates`.
"""

import torch

from oracle.contract_prologue import GatedConvFnCall
from triton_impl import plain


def offsets(call):
    """The first channels of B, C and x."""
    dim = call.weight.shape[0]
    return (0, dim, 2 * dim) if call.channel_offsets is None else tuple(call.channel_offsets)


def slices(call):
    """B, C and x, views of the projection."""
    return [call.bcx.narrow(-1, offset, call.weight.shape[0]) for offset in offsets(call)]


def convolution_of(call):
    """The plain call that the kernels take: of the slice x, with C for the residual."""
    _, gate_out, x = slices(call)
    return call.convolution()._replace(x=x, residual=gate_out)


def distance(call):
    """How many elements B lies behind x."""
    first, _, x = offsets(call)
    return (first - x) * call.bcx.stride(-1)


def eager(call):
    """`gated_short_conv_fn` and `_update` in plain torch; returns `out`."""
    gate_in, gate_out, x = slices(call)
    conv = call.convolution()._replace(x=gate_in * x)
    live = plain.live_tokens(conv).view(x.shape[:-1])
    c = plain.prefill(conv) if isinstance(call, GatedConvFnCall) else plain.update(conv)
    return torch.where(live[..., None], gate_out * c, 0)
