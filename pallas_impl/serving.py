"""Calls with serving arguments: the second path of both operations, beside the plain one in `api`.

A prefill is the plain kernel with another read of the window and, unless its own store of the state will do, a kernel
that stores all states (`states`). An update is one kernel (`verify`). Where TMA cannot address a dim, the
kernels compute `out` from padded copies of x and of the batch's windows, and `xla_serving` stores the rest.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_impl import prefill as plain_prefill
from pallas_impl import states, verify, xla, xla_serving
from pallas_impl import update as plain_update
from pallas_impl.backends import CLIPS, interpreter
from pallas_impl.config import choose_lanes, tma_dim, update_config
from pallas_impl.transforms import refuse_transforms
from pallas_impl.xla_serving import Arrays


@functools.partial(jax.jit, static_argnames=("options", "config", "interpret"))
def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, arrays, *, options, config, interpret
):
    """A packed prefill with any of `arrays` and `options`. Returns (out, conv_states)."""
    starts = query_start_loc
    if config is None or starts.dtype != jnp.int32:  # the kernels clamp them
        starts = xla.offsets(starts, x.shape[0])
    batch = starts.shape[0] - 1
    if config is None or x.size == 0 or batch == 0:
        return xla_serving.run(x, weight, bias, conv_states, starts, cache_indices, arrays, options)[:2]
    x, weight, bias, conv_states, starts, cache_indices, arrays = refuse_transforms(
        x, weight, bias, conv_states, starts, cache_indices, arrays
    )
    (dim, width), interpret = weight.shape, interpreter(interpret)
    x, split, inner, lanes = _fit(x, dim, options, config.lanes)
    launch = functools.partial(
        plain_prefill.launch, silu=options.silu, config=config._replace(lanes=lanes), interpret=interpret
    )  # fmt: skip
    if tma_padding(dim, (x, conv_states, arrays.residual), interpret):

        def out(x, weight, bias, windows, rows, stateful, residual):
            return launch(
                x, weight, bias, windows, starts, rows, stateful, residual=residual, pad_slot_id=-1, store_state=False
            )[0]  # fmt: skip

        clamped = xla.offsets(starts, x.shape[0])
        out, pool, _ = _by_windows(
            out, x, weight, bias, conv_states, clamped, cache_indices, arrays, inner, interpret
        )  # fmt: skip
        return xla_serving.split_out(out, options), pool

    own_store = (
        options.state_layout == "front" and not options.apply_empty and arrays.write_indices is None
        and arrays.snapshot_indices is None and arrays.track_indices is None
    )  # fmt: skip
    arrays = _narrow_all(arrays, conv_states, batch, options)
    slots = cache_indices
    if conv_states is not None:
        slots = narrow(slots, batch, conv_states.shape[0], options.pad_slot_id)
    out, pool = launch(
        x, weight, bias, conv_states, starts, slots, arrays.has_initial_state, pad_slot_id=options.pad_slot_id,
        residual=arrays.residual, seqlens=arrays.cache_seqlens, channel=inner.channel,
        split_sizes=inner.split_sizes, state_layout=options.state_layout, store_state=own_store,
    )  # fmt: skip
    if not own_store and pool is not None and pool.size and (width > 1 or options.state_layout != "front"):
        pool = states.launch(
            x, pool, starts, slots, arrays, after=jax.tree.leaves(out)[0], history=width - 1, options=inner,
            lanes=choose_lanes(dim), interpret=interpret,
        )  # fmt: skip
    return split(out), pool


@functools.partial(jax.jit, static_argnames=("options", "kernel", "interpret"))
def update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, arrays, *, options, kernel, interpret
):
    """A decode step with any of `arrays` and `options`. Returns (out, conv_states, window_out)."""
    shape, x, starts = x.shape[:-1], x.reshape(-1, x.shape[-1]), query_start_loc
    batch = shape[0] if starts is None else starts.shape[0] - 1
    if starts is not None and (starts.dtype != jnp.int32 or not kernel):
        starts = xla.offsets(starts, x.shape[0])
    if arrays.residual is not None:
        arrays = arrays._replace(residual=arrays.residual.reshape(-1, weight.shape[0]))
    if kernel and x.size and batch:
        out, pool, windows = _step(
            x, weight, bias, conv_states, starts, cache_indices, arrays, batch, options, interpreter(interpret)
        )  # fmt: skip
    else:
        if xla.WIDENS_SCATTERS:  # see xla.update
            x = jax.lax.optimization_barrier(x)
        starts = _equal_rows(x, batch) if starts is None else starts
        out, pool, windows = xla_serving.run(
            x, weight, bias, conv_states, starts, cache_indices, arrays, options
        )  # fmt: skip
    return jax.tree.map(lambda out: out.reshape(*shape, out.shape[-1]), out), pool, windows


def _step(x, weight, bias, conv_states, starts, cache_indices, arrays, batch, options, interpret):
    """The kernels of an update; `starts` None: rows of equal length."""
    x, weight, bias, conv_states, starts, cache_indices, arrays = refuse_transforms(
        x, weight, bias, conv_states, starts, cache_indices, arrays
    )
    dim, seqlen = weight.shape[0], x.shape[0] // batch if starts is None else None
    x, split, inner, lanes = _fit(x, dim, options, choose_lanes(dim))
    launch = functools.partial(
        verify.launch, starts=starts, seqlen=seqlen, lanes=lanes, interpret=interpret
    )  # fmt: skip
    alone = all(a is None for a in arrays._replace(residual=None)) and options.state_layout == "front"
    given, arrays = arrays, _narrow_all(arrays, conv_states, batch, options)
    if tma_padding(dim, (x, conv_states, arrays.residual, arrays.window_out), interpret):

        def out(x, weight, bias, windows, rows, _, residual):
            plain = inner._replace(
                pad_slot_id=-1, channel=0, split_sizes=None, commit=False, state_layout="front"
            )  # fmt: skip
            only = Arrays(residual=residual, tree_parents=arrays.tree_parents)
            return launch(x, weight, bias, windows, slots=rows, arrays=only, options=plain)[0]

        starts = _equal_rows(x, batch) if starts is None else xla.offsets(starts, x.shape[0])
        out, pool, windows = _by_windows(
            out, x, weight, bias, conv_states, starts, cache_indices, given, inner, interpret
        )  # fmt: skip
        return xla_serving.split_out(out, options), pool, windows

    slots = narrow(cache_indices, batch, conv_states.shape[0], options.pad_slot_id)
    if alone and options.commit and seqlen == 1:  # the kernel of one token
        config = update_config(batch, dim)
        config = config._replace(lanes=min(lanes, config.lanes))
        out, pool = plain_update.launch(
            x, weight, bias, conv_states, slots, silu=options.silu, pad_slot_id=options.pad_slot_id,
            config=config, interpret=interpret,
            residual=arrays.residual, channel=inner.channel, split_sizes=inner.split_sizes,
        )  # fmt: skip
        return split(out), pool, None
    out, pool, windows = launch(
        x, weight, bias, conv_states, slots=slots, arrays=arrays, options=inner
    )  # fmt: skip
    return split(out), pool, windows


def _by_windows(launch, x, weight, bias, conv_states, starts, cache_indices, arrays, options, interpret):
    """Runs a kernel for `out` alone, on padded arrays; states and windows are stored without one."""
    (dim, width), batch = weight.shape, starts.shape[0] - 1
    x = jax.lax.slice_in_dim(x, options.channel, options.channel + dim, axis=1)
    slots, live, windows = xla_serving.rows_of(
        conv_states, cache_indices, batch, width - 1, arrays, options, x
    )  # fmt: skip
    extra = tma_padding(dim, (x, conv_states, arrays.residual, arrays.window_out), interpret)
    wide = lambda array: array if array is None else _pad_last(array, extra)  # noqa: E731
    rows = stateful = padded = None
    if conv_states is not None:
        rows = jnp.where(live, jnp.arange(batch, dtype=jnp.int32), -1)
        stateful, padded = xla_serving.stateful_rows(live, arrays, options), wide(windows)
    weight = jnp.pad(weight, ((0, extra), (0, 0)))
    out = launch(wide(x), weight, wide(bias), padded, rows, stateful, wide(arrays.residual))
    window_out = xla_serving.store_windows(x, starts, live, windows, arrays, options)
    if conv_states is not None and options.commit:
        conv_states = xla_serving.store_states(x, conv_states, starts, slots, windows, arrays, options)
    return out[:, :dim], conv_states, window_out


def _equal_rows(x, batch):
    return jnp.arange(batch + 1, dtype=jnp.int32) * (x.shape[0] // max(batch, 1))


def _fit(x, dim, options, lanes):
    """Decides how x is read and `out` written: (x, finish of `out`, `Options` of the kernel, lanes).

    Channels that do not begin at a multiple of 16 bytes, or in rows that do not, are cut out of x first; parts
    that are no multiples of the lanes are cut from one result.
    """
    aligned = 16 // x.dtype.itemsize
    sizes = options.split_sizes
    if options.channel % aligned or x.shape[1] % aligned:
        x = jax.lax.slice_in_dim(x, options.channel, options.channel + dim, axis=1)
        options = options._replace(channel=0)
    for fewer in (lanes, 128):
        if sizes is None or not any(size % fewer for size in sizes):
            return x, lambda out: out, options, fewer
    return (
        x,
        functools.partial(xla_serving.split_out, options=options),
        options._replace(split_sizes=None),
        lanes,
    )


def tma_padding(dim, arrays, interpret):
    """By how many channels the arrays (or None) must be padded so that TMA can address them."""
    if interpret and not CLIPS:
        return -dim % choose_lanes(dim)
    return tma_dim(dim, tuple(a.dtype.itemsize for a in arrays if a is not None)) - dim


def _pad_last(array, extra):
    padded = jnp.pad(xla.to_bits(array), [(0, 0)] * (array.ndim - 1) + [(0, extra)])
    return jax.lax.bitcast_convert_type(padded, array.dtype)


def narrow(slots, batch, end, pad_slot_id):
    """Slots (or None) as int32, as they are where they have it: the kernels check their range."""
    if slots is None or slots.dtype == jnp.int32:
        return slots
    return xla.live_slots(slots, batch, end, pad_slot_id)


def _narrow_all(arrays, conv_states, batch, options):
    """The integer arrays as int32 (`num_computed_tokens` as it is); a conversion is a small kernel of its own."""
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
        buffers = arrays.window_out.shape[0]
        new["window_indices"] = narrow(arrays.window_indices, batch, buffers, options.pad_slot_id)
    if is_wide(arrays.track_lengths):
        new["track_lengths"] = xla_serving.natural(arrays.track_lengths)
    if is_wide(arrays.tree_parents):
        new["tree_parents"] = xla_serving.node_parents(arrays.tree_parents)
    return arrays._replace(**new)
