"""Context parallel prefill: the packed tokens split over devices, equal parts, in order.

A device needs the last width-1 tokens before its part and nothing else, so only those travel, from neighbour to
neighbour; a part shorter than width-1 is passed on as a whole. The convolution of the part does not wait for
them: it runs at once with a wrong window where a row crosses the cut, and the first width-1 tokens are then
computed again with the right one. Both are plain calls of the operation, so the bits are those of one device.
"""

import jax.numpy as jnp
from jax import lax

from oracle.contract import ConvOutput, check_causal_conv1d_fn, refuse_serving
from pallas_impl import api, xla


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    axis_name,
    activation=None,
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    empty_rows="skip",
    snapshot_indices=None,
    snapshot_block_size=None,
    num_computed_tokens=None,
    track_indices=None,
    track_lengths=None,
    residual=None,
    channel_offset=None,
    split_sizes=None,
):
    """`causal_conv1d_fn` inside `jax.shard_map`, with the tokens of x split over the mesh axis `axis_name`.

    Every argument but x is the whole of it, the same on every device of the axis; so is the pool that comes
    back. (`pallas_impl.sharding.causal_conv1d_fn` does the splitting; channels may be split besides.)

    Args:
      x: [tokens / devices, dim]: this device's part of the packed tokens. Rows may cross the cuts, any number of
        them; where the tokens do not divide, let padding follow the last row.
      axis_name: the mesh axis.
      query_start_loc: [batch+1], offsets into the whole.
      weight, bias, conv_states, cache_indices, has_initial_state, activation, pad_slot_id, max_seqlen, schedule,
        backend: as in `pallas_impl.causal_conv1d_fn`.
      validate: False; there is no data to read in a trace.
      state_layout and what follows: their defaults; anything else is Unsupported.

    Returns:
      ConvOutput(out, conv_states): this device's part of `out`, and the whole new pool, both with the bits of the
      run on one device.

    Raises:
      ValueError, TypeError, Unsupported: as `pallas_impl.causal_conv1d_fn`.
    """
    refuse_serving(
        f"tokens are split over {axis_name!r}", state_layout=state_layout, empty_rows=empty_rows,
        cache_seqlens=cache_seqlens, write_indices=write_indices, snapshot_indices=snapshot_indices,
        snapshot_block_size=snapshot_block_size, num_computed_tokens=num_computed_tokens,
        track_indices=track_indices, track_lengths=track_lengths, residual=residual, channel_offset=channel_offset,
        split_sizes=split_sizes,
    )  # fmt: skip
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule,
        backend=backend, validate=validate,
    )  # fmt: skip
    tokens, history, batch = sizes.tokens, sizes.width - 1, sizes.batch
    begin = lax.axis_index(axis_name) * tokens
    offsets = xla.offsets(query_start_loc, lax.axis_size(axis_name) * tokens)
    starts = jnp.clip(offsets - begin, 0, tokens)
    here = offsets[:-1] >= begin  # the row does not begin in an earlier part

    slots = rows = None
    stateful = jnp.zeros((batch,), bool)
    windows = jnp.zeros((batch, history, sizes.dim), x.dtype)
    if conv_states is not None:
        slots = xla.live_slots(cache_indices, batch, sizes.num_slots, pad_slot_id)
        rows = jnp.where(slots >= 0, jnp.arange(batch, dtype=jnp.int32), -1)
        if has_initial_state is not None:
            stateful = has_initial_state & (slots >= 0)
        windows = xla.read_windows(conv_states, slots, stateful, history)

    def convolve(count, windows, stateful):
        """The first `count` tokens of the part, each row from its own window."""
        longest = None if max_seqlen is None else min(max_seqlen, count)
        return api.causal_conv1d_fn(
            x[:count], weight, bias, windows, jnp.minimum(starts, count), rows, stateful,
            activation=activation, pad_slot_id=-1, max_seqlen=longest, schedule=schedule, backend=backend,
            validate=validate,
        ).out  # fmt: skip

    if tokens == 0 or history == 0 or batch == 0:
        return ConvOutput(convolve(tokens, windows, stateful), conv_states)
    head = min(tokens, history)
    out = convolve(tokens, windows, stateful & here) if head < tokens else None

    # Bits where the dtypes agree: XLA moves 16-bit floats through float32 on some backends. Else float32 holds both.
    same = windows.dtype == x.dtype
    as_entries = xla.to_bits if same else lambda a: a.astype(jnp.float32)
    arrived = as_entries(x)
    windows = as_entries(windows)
    entry = jnp.arange(history, dtype=jnp.int32)
    # Entry i of a crossing row's window is entry `done + i` of its old window ++ its tokens before the cut.
    done = jnp.where(here, 0, begin - offsets[:-1])[:, None]
    old = jnp.take_along_axis(windows, jnp.minimum(done + entry, history - 1)[:, :, None], axis=1)
    windows = jnp.where((done + entry < history)[:, :, None], old, _halo(arrived, history, axis_name))

    at_cut = lax.bitcast_convert_type(windows, x.dtype) if same else windows
    first = convolve(head, at_cut, stateful | ~here)
    out = first if out is None else out.at[:head].set(first)
    if slots is None:
        return ConvOutput(out, None)

    # The device that holds a row's last token knows the row's new window and tells the others.
    length = starts[1:] - starts[:-1]
    source = length[:, None] + entry
    kept = jnp.take_along_axis(windows, jnp.minimum(source, history - 1)[:, :, None], axis=1)
    fresh = arrived[jnp.clip(starts[:-1, None] + source - history, 0, tokens - 1)]
    new = jnp.where((source < history)[:, :, None], kept, fresh)
    new = new if same else xla.to_bits(new.astype(conv_states.dtype))
    ends_here = (length > 0) & (offsets[1:] <= begin + tokens)
    told = jnp.where(ends_here[:, None, None], new, 0).astype(jnp.uint32)  # NCCL adds no 16-bit integers
    new = lax.bitcast_convert_type(lax.psum(told, axis_name).astype(new.dtype), conv_states.dtype)
    written = jnp.where(offsets[1:] > offsets[:-1], slots, -1)
    return ConvOutput(out, xla.write_windows(conv_states, written, new))


def _halo(x, history, axis_name, after=False):
    """[history, dim]: the tokens before this part, or those after it, oldest first; zeros outside the whole."""
    devices = lax.axis_size(axis_name)
    take = min(x.shape[0], history)
    sent = x[:take] if after else x[x.shape[0] - take :]
    parts = []
    for hop in range(-(-history // take), 0, -1):
        pairs = [(i + hop, i) if after else (i, i + hop) for i in range(devices - hop)]
        parts.append(lax.ppermute(sent, axis_name, pairs) if pairs else jnp.zeros_like(sent))
    return jnp.concatenate(parts[::-1])[:history] if after else jnp.concatenate(parts)[-history:]
