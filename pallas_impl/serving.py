"""Calls with serving arguments: the second path of both operations, beside the plain one in `api`.

Where TMA cannot address a dim, the kernels compute `out` from padded copies of x and of the batch's windows, and
`xla_serving` stores states and windows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_impl import verify, xla, xla_serving
from pallas_impl.backends import CLIPS, interpreter
from pallas_impl.config import choose_lanes, tma_dim
from pallas_impl.transforms import refuse_transforms
from pallas_impl.xla_serving import Arrays


@functools.partial(jax.jit, static_argnames=("options", "config", "interpret"))
def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, arrays, *, options, config, interpret
):
    """A packed prefill with any of `arrays` and `options`. Returns (out, conv_states)."""
    starts = xla.offsets(query_start_loc, x.shape[0])
    out, pool, _ = xla_serving.run(x, weight, bias, conv_states, starts, cache_indices, arrays, options)
    return out, pool


@functools.partial(jax.jit, static_argnames=("options", "kernel", "interpret"))
def update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, arrays, *, options, kernel, interpret
):
    """A decode step with any of `arrays` and `options`. Returns (out, conv_states, window_out)."""
    shape, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    batch = shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    seqlen = rows.shape[0] // max(batch, 1) if query_start_loc is None else None
    if seqlen is not None:
        starts = np.arange(batch + 1, dtype=np.int32) * np.int32(seqlen)  # a constant of the program
    elif query_start_loc.dtype == jnp.int32 and kernel:
        starts = query_start_loc  # the kernel clamps them
    else:
        starts = xla.offsets(query_start_loc, rows.shape[0])
    if kernel and rows.size and batch:
        arrays = (
            arrays
            if arrays.residual is None
            else arrays._replace(residual=arrays.residual.reshape(-1, weight.shape[0]))
        )
        out, pool, windows = _verify(
            rows, weight, bias, conv_states, starts, cache_indices, arrays, seqlen, options, interpret
        )
    else:
        if xla.WIDENS_SCATTERS:  # see xla.update
            rows = jax.lax.optimization_barrier(rows)
        out, pool, windows = xla_serving.run(
            rows, weight, bias, conv_states, jnp.asarray(starts), cache_indices, arrays, options
        )
    return jax.tree.map(lambda out: out.reshape(*shape, out.shape[-1]), out), pool, windows


def _verify(x, weight, bias, conv_states, starts, cache_indices, arrays, seqlen, options, interpret):
    x, weight, bias, conv_states, starts, cache_indices, arrays = refuse_transforms(
        x, weight, bias, conv_states, starts, cache_indices, arrays
    )
    batch = starts.shape[0] - 1
    x, split, inner, lanes = _fit(x, weight.shape[0], options, interpret)
    launch = functools.partial(
        verify.launch, starts=None if seqlen is not None else starts, seqlen=seqlen, lanes=lanes,
        interpret=interpreter(interpret),
    )  # fmt: skip
    extra = tma_padding(weight.shape[0], (x, conv_states, arrays.residual, arrays.window_out), interpret)
    if not extra:
        slots = narrow(cache_indices, batch, conv_states.shape[0], options.pad_slot_id)
        out, pool, windows = launch(
            x,
            weight,
            bias,
            conv_states,
            slots=slots,
            arrays=_narrow_all(arrays, conv_states, batch, options),
            options=inner,
        )
        return split(out), pool, windows
    dim, starts = weight.shape[0], xla.offsets(starts, x.shape[0])
    x = jax.lax.slice_in_dim(x, inner.channel, inner.channel + dim, axis=1)
    slots, live, windows = xla_serving.rows_of(
        conv_states, cache_indices, batch, weight.shape[1] - 1, arrays, options, x
    )
    wide = functools.partial(_pad_last, extra=extra)
    alone = Arrays(
        residual=wide(arrays.residual),
        tree_parents=_narrow_all(arrays, conv_states, batch, options).tree_parents,
    )
    out, _, _ = launch(
        wide(x), jnp.pad(weight, ((0, extra), (0, 0))), wide(bias), wide(windows),
        slots=jnp.where(live, jnp.arange(batch, dtype=jnp.int32), -1), arrays=alone,
        options=inner._replace(pad_slot_id=-1, channel=0, split_sizes=None, commit=False, state_layout="front"),
    )  # fmt: skip
    window_out = xla_serving.store_windows(x, starts, live, windows, arrays, options)
    if options.commit:
        conv_states = xla_serving.store_states(x, conv_states, starts, slots, windows, arrays, options)
    return xla_serving.split_out(out[0][:, :dim], options), conv_states, window_out


def _fit(x, dim, options, interpret):
    """Decides how x is read and `out` written: (x, finish of `out`, `Options` of the kernel, lanes).

    Channels that do not begin at a multiple of 16 bytes, or in rows that do not, are cut out first; parts that
    are no multiple of the lanes are cut from one result.
    """
    channel = 16 // x.dtype.itemsize
    if options.channel % channel or x.shape[1] % channel:
        x = jax.lax.slice_in_dim(x, options.channel, options.channel + dim, axis=1)
        options = options._replace(channel=0)
    lanes, sizes = choose_lanes(dim), options.split_sizes
    if sizes is None:
        return x, lambda out: out[0], options, lanes
    if any(size % lanes for size in sizes):
        lanes = 128
    if any(size % lanes for size in sizes):
        split = lambda out: xla_serving.split_out(out[0], options)  # noqa: E731
        return x, split, options._replace(split_sizes=None), choose_lanes(dim)
    return x, lambda out: tuple(out), options, lanes


def tma_padding(dim, arrays, interpret):
    """By how many channels the arrays (or None) must be padded so that TMA can address them."""
    if interpret and not CLIPS:
        return -dim % choose_lanes(dim)
    return tma_dim(dim, tuple(a.dtype.itemsize for a in arrays if a is not None)) - dim


def _pad_last(array, extra):
    if array is None:
        return None
    padded = jnp.pad(xla.to_bits(array), [(0, 0)] * (array.ndim - 1) + [(0, extra)])
    return jax.lax.bitcast_convert_type(padded, array.dtype)


def narrow(slots, batch, end, pad_slot_id):
    """Slots (or None) as int32, as they are where they have it: the kernels check their range."""
    if slots is None or slots.dtype == jnp.int32:
        return slots
    return xla.live_slots(slots, batch, end, pad_slot_id)


def _narrow_all(arrays, conv_states, batch, options):
    """The integer arrays as int32; a conversion is a small kernel of its own."""
    is_wide = lambda array: array is not None and array.dtype != jnp.int32  # noqa: E731
    new = {}
    if conv_states is not None:
        num_slots, state_len, _ = conv_states.shape
        for name in ("write_indices", "snapshot_indices", "track_indices"):
            new[name] = narrow(getattr(arrays, name), batch, num_slots, options.pad_slot_id)
        if is_wide(arrays.cache_seqlens):
            new["cache_seqlens"] = xla_serving.ring_phase(arrays.cache_seqlens, state_len)
        if is_wide(arrays.num_accepted_tokens):
            new["num_accepted_tokens"] = xla.first_columns(arrays.num_accepted_tokens, state_len) + 1
    if arrays.window_out is not None:
        new["window_indices"] = narrow(
            arrays.window_indices, batch, arrays.window_out.shape[0], options.pad_slot_id
        )
    if is_wide(arrays.track_lengths):
        new["track_lengths"] = xla_serving.natural(arrays.track_lengths)
    if is_wide(arrays.tree_parents):
        new["tree_parents"] = xla_serving.node_parents(arrays.tree_parents)
    return arrays._replace(**new)
