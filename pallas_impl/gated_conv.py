"""The gated short convolution of LFM2: `out = C * conv(B * x)`, with B, C and x as channel slices of one projection."""

from pallas_impl import plain
from pallas_impl.plain_prologue import live_tokens


def offsets(call):
    """The first channels of B, C and x."""
    dim = call.weight.shape[0]
    return (0, dim, 2 * dim) if call.channel_offsets is None else call.channel_offsets


def slices(call):
    """B, C and x, each [..., dim]."""
    dim = call.weight.shape[0]
    return tuple(call.bcx[..., first : first + dim] for first in offsets(call))


def composed(call, run):
    """The result of a checked call from `run`, which runs the call of the plain operation inside."""
    gate_in, gate_out, x = slices(call)
    conv = call.convolution()._replace(x=plain.stored(gate_in * x))
    found = run(conv)
    out = gate_out * plain.stored(found.out)
    return found._replace(out=plain.where_live(live_tokens(conv), out))
