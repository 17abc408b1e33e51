"""The gated short convolution of LFM2: `out = C * conv(B * x)`, with B, C and x as channel slices of one projection.

The kernels of `prefill` and `update` read the three slices in place (`Options.gates`). What they do not do (`is_fused`) is
the plain operation between two products.
"""

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


def is_fused(call, sizes, options):
    """Whether one kernel runs a call: it stores a window in front of the slot that is read, and slices are aligned."""
    if options.kernel not in ("prefill", "token") or not call.bcx.size or not sizes.batch:
        return False
    if options.kernel == "token" and not options.config.in_registers:
        return False
    others = ("write_indices", "snapshot_indices", "track_indices")
    if any(getattr(call, name, None) is not None for name in others):
        return False
    if call.state_layout != "front" or options.apply_empty:
        return False
    return not any(place % (16 // call.bcx.dtype.itemsize) for place in (*offsets(call), call.bcx.shape[-1]))


def composed(call, run):
    """The result of a checked call from `run`, which runs the call of the plain operation inside."""
    conv = call.convolution()
    live = live_tokens(conv)
    # Selected before they are multiplied, so that no gradient meets what lies in padding.
    gate_in, gate_out, x = (plain.where_live(live, part) for part in slices(call))
    found = run(conv._replace(x=plain.stored(gate_in * x)))
    return found._replace(out=gate_out * plain.stored(found.out))
