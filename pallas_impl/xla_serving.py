"""The serving arguments in plain jax.numpy: layouts of a slot, snapshots, windows of drafts, trees, residual, split.

Rows of window ++ x are named by a number: below width-1 an entry of the window, from there on a token of the row.
Everything that is stored is gathered from the arguments first, as bits, so that no store is seen by a read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_impl import xla
from pallas_impl.taps import activate, add, multiply_add, split


class Arrays(NamedTuple):
    """The optional arrays of a call, as in `causal_conv1d_fn` and `causal_conv1d_update`; None where absent."""

    has_initial_state: jax.Array | None = None
    num_accepted_tokens: jax.Array | None = None
    cache_seqlens: jax.Array | None = None
    write_indices: jax.Array | None = None
    snapshot_indices: jax.Array | None = None
    num_computed_tokens: jax.Array | None = None
    track_indices: jax.Array | None = None
    track_lengths: jax.Array | None = None
    window_out: jax.Array | None = None
    window_indices: jax.Array | None = None
    tree_parents: jax.Array | None = None
    residual: jax.Array | None = None


class Options(NamedTuple):
    """What is static in a call.

    Attributes:
      always_state: every live row has a state (an update).
      apply_empty: rows of zero tokens apply the rule of the state.
      channel: the first channel of x that is read.
      split_sizes: channels of each result, or None for one result.
      commit: the pool is written.
    """

    silu: bool
    pad_slot_id: int
    always_state: bool
    state_layout: str = "front"
    apply_empty: bool = False
    snapshot_block_size: int | None = None
    channel: int = 0
    split_sizes: tuple[int, ...] | None = None
    commit: bool = True


def run(x, weight, bias, conv_states, starts, cache_indices, arrays, options):
    """Runs a prefill or an update.

    Args:
      x: [tokens, channels], of which the dim from `options.channel` on are read.
      weight, bias, conv_states, cache_indices: as in `causal_conv1d_fn`.
      starts: [batch+1] int32 inside [0, tokens].
      arrays, options: the rest.

    Returns:
      (out, conv_states, window_out): `out` [tokens, dim], or a tuple of them.
    """
    dim, width = weight.shape
    tokens, batch, history = x.shape[0], starts.shape[0] - 1, width - 1
    x = lax.slice_in_dim(x, options.channel, options.channel + dim, axis=1)
    if batch == 0 or (tokens == 0 and not options.apply_empty):
        return split_out(jnp.zeros_like(x), options), conv_states, arrays.window_out
    if tokens == 0:  # rows of zero tokens: nothing is taken from this one
        x = jnp.zeros((1, dim), x.dtype)
    slots, live, windows = rows_of(conv_states, cache_indices, batch, history, arrays, options, x)
    out = convolve(x, weight, bias, starts, live, windows, arrays, options)
    window_out = store_windows(x, starts, live, windows, arrays, options)
    if conv_states is not None and options.commit:
        conv_states = store_states(x, conv_states, starts, slots, windows, arrays, options)
    return split_out(out[:tokens], options), conv_states, window_out


def rows_of(conv_states, cache_indices, batch, history, arrays, options, x):
    """(slots, live, windows): the slot of each row or -1, which rows are computed, and [batch, history, dim]."""
    if conv_states is None:
        return None, jnp.ones((batch,), bool), jnp.zeros((batch, history, x.shape[1]), x.dtype)
    num_slots, state_len, _ = conv_states.shape
    slots = xla.live_slots(cache_indices, batch, num_slots, options.pad_slot_id)
    stateful = stateful_rows(slots >= 0, arrays, options)
    column = jnp.arange(history, dtype=jnp.int32)
    if options.state_layout == "back":
        column += state_len - history
    elif options.state_layout == "ring" and history:
        column = jnp.mod(ring_phase(arrays.cache_seqlens, state_len)[:, None] - history + column, state_len)
    elif arrays.num_accepted_tokens is not None:
        column += xla.first_columns(arrays.num_accepted_tokens, state_len - history)[:, None]
    windows = read_columns(conv_states, slots, stateful, jnp.broadcast_to(column, (batch, history)))
    return slots, slots >= 0, lax.bitcast_convert_type(windows, conv_states.dtype)


def stateful_rows(live, arrays, options):
    has = arrays.has_initial_state
    return live & options.always_state if has is None else live & has


def ring_phase(cache_seqlens, state_len):
    """The column that each row's next token goes to in a rotating slot, as int32; negative counts are 0."""
    counts = cache_seqlens if cache_seqlens.dtype.itemsize >= 4 else cache_seqlens.astype(jnp.int32)
    state_len = max(min(state_len, np.iinfo(counts.dtype).max), 1)
    return jnp.mod(jnp.maximum(counts, 0), state_len).astype(jnp.int32)


def read_columns(conv_states, slots, stateful, columns):
    """The bits of [batch, n, dim]: the columns of stateful rows; for the others zeros, selected and not multiplied."""
    shape = (*columns.shape, conv_states.shape[2])
    bits = xla.to_bits(conv_states)
    if conv_states.shape[0] == 0 or columns.shape[1] == 0:
        return jnp.zeros(shape, bits.dtype)
    values = bits.at[jnp.maximum(slots, 0)[:, None], columns].get(mode="promise_in_bounds")
    return jnp.where(stateful[:, None, None], values, 0)


def convolve(x, weight, bias, starts, live, windows, arrays, options):
    """[tokens, dim]: the result of every token, zeros for padding."""
    tokens, batch, history = x.shape[0], starts.shape[0] - 1, windows.shape[1]
    row, owner, position = locate(starts, tokens)
    wide = jnp.promote_types(x.dtype, windows.dtype)
    if arrays.tree_parents is None:
        entries = [position + j for j in range(history + 1)]
    else:
        chain = ancestors(arrays.tree_parents, history).reshape(tokens, history + 1)
        entries = [chain[:, j] for j in range(history + 1)]
    total = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    for j, entry in enumerate(entries):
        back = history - j
        if arrays.tree_parents is None:
            value = jnp.pad(x, ((back, 0), (0, 0)))[:tokens]
        else:
            value = x[jnp.clip(starts[owner] + entry - history, 0, tokens - 1)]
        if back:
            old = windows[owner, jnp.clip(entry, 0, history - 1)].astype(wide)
            value = jnp.where((entry < history)[:, None], old, value.astype(wide))
        total = multiply_add(split(weight[:, j]), split(value), total)
    if options.silu:
        total = activate(total)
    if arrays.residual is not None:
        residual = jnp.pad(arrays.residual, ((0, tokens - arrays.residual.shape[0]), (0, 0)))
        total = add(total, residual.astype(jnp.float32), interpret=True)
    computed = (row < batch) & live[owner]
    return jnp.where(computed[:, None], total, 0.0).astype(x.dtype)


def locate(starts, tokens):
    """Of each token: its row (`batch` for the tail), that clamped to the last row, and its place in that row."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], token, side="right", method="sort").astype(jnp.int32)
    owner = jnp.minimum(row, starts.shape[0] - 2)
    return row, owner, token - starts[owner]


def ancestors(tree_parents, history):
    """[batch, n, history+1]: of each node the entries its taps meet, oldest first; the last is history + node."""
    batch, n = tree_parents.shape
    node = jnp.arange(n, dtype=jnp.int32)
    parents = jnp.minimum(node_parents(tree_parents), node - 1)
    # before[e] of entry e: the entry of the parent, or the one before it in the window.
    inside = jnp.where(parents < 0, history - 1, history + parents)
    window = jnp.broadcast_to(jnp.arange(history, dtype=jnp.int32) - 1, (batch, history))
    before = jnp.concatenate([window, inside], axis=1)
    chain = [jnp.broadcast_to(history + node, (batch, n))]
    for _ in range(history):
        chain.append(jnp.take_along_axis(before, chain[-1], axis=1))
    return jnp.stack(chain[::-1], axis=2)


def node_parents(tree_parents):
    """The parents as int32; those below 0 are -1, those beyond the row its length."""
    if tree_parents.dtype == jnp.int32:
        return tree_parents
    top = min(tree_parents.shape[1], np.iinfo(tree_parents.dtype).max)
    return jnp.clip(tree_parents, max(-1, np.iinfo(tree_parents.dtype).min), top).astype(jnp.int32)


def store_windows(x, starts, live, windows, arrays, options):
    """`window_out` with the window after every token of the live rows."""
    window_out = arrays.window_out
    tokens, batch, history = x.shape[0], starts.shape[0] - 1, windows.shape[1]
    if window_out is None or window_out.size == 0:
        return window_out
    row, owner, position = locate(starts, tokens)
    if arrays.tree_parents is None:
        entry = position[:, None] + 1 + jnp.arange(history, dtype=jnp.int32)
    else:
        entry = ancestors(arrays.tree_parents, history).reshape(tokens, history + 1)[:, 1:]
    token = starts[owner][:, None] + entry - history
    old = xla.to_bits(cast(windows, window_out.dtype))[owner[:, None], jnp.clip(entry, 0, history - 1)]
    new = xla.take_rows(x, token, window_out.dtype)
    values = jnp.where((entry < history)[:, :, None], old, new)
    buffers = xla.live_slots(arrays.window_indices, batch, window_out.shape[0], options.pad_slot_id)
    stored = (row < batch) & live[owner] & (buffers[owner] >= 0) & (position < window_out.shape[1])
    buffer = jnp.where(stored, buffers[owner], window_out.shape[0])
    place = (buffer, jnp.maximum(position, 0))
    return xla._scatter(window_out, place, lax.bitcast_convert_type(values, window_out.dtype))


def cast(array, dtype):
    """The array in `dtype`; as it is where it has it, since a conversion may lose a NaN's payload."""
    return array if array.dtype == dtype else array.astype(dtype)


def store_states(x, conv_states, starts, slots, windows, arrays, options):
    """The pool after the call."""
    num_slots, state_len, _ = conv_states.shape
    batch, history = starts.shape[0] - 1, windows.shape[1]
    lengths = starts[1:] - starts[:-1]
    touched = slots >= 0
    if not options.apply_empty:
        touched &= lengths > 0
    stateful = stateful_rows(slots >= 0, arrays, options)
    writes = slots
    if arrays.write_indices is not None:
        writes = xla.live_slots(arrays.write_indices, batch, num_slots, options.pad_slot_id)
    writes = jnp.where(touched, writes, -1)
    old_windows = xla.to_bits(windows)

    def entries(old, index):
        """The bits of entries `index` [batch, n] of old ++ x."""
        columns = old.shape[1]
        if columns == 0:
            return jnp.zeros((*index.shape, x.shape[1]), old.dtype)
        arrived = xla.take_rows(x, starts[:-1, None] + index - columns, conv_states.dtype)
        kept = jnp.take_along_axis(old, jnp.clip(index, 0, columns - 1)[:, :, None], axis=1)
        return jnp.where((index < columns)[:, :, None], kept, arrived)

    pool = conv_states
    count = jnp.arange(history, dtype=jnp.int32)
    if options.state_layout == "ring":
        columns = jnp.arange(state_len, dtype=jnp.int32)
        end = ring_phase(arrays.cache_seqlens, state_len) + lengths
        # The newest token that lives in each column.
        since = jnp.mod(end[:, None] - 1 - columns, max(state_len, 1))
        token = lengths[:, None] - 1 - since
        old = read_columns(conv_states, slots, stateful, jnp.broadcast_to(columns, (batch, state_len)))
        arrived = xla.take_rows(x, starts[:-1, None] + token, conv_states.dtype)
        pool = write_columns(pool, writes, columns, jnp.where((token >= 0)[:, :, None], arrived, old))
    elif options.state_layout == "back":
        columns = jnp.arange(state_len, dtype=jnp.int32)
        old = read_columns(conv_states, slots, stateful, jnp.broadcast_to(columns, (batch, state_len)))
        pool = write_columns(pool, writes, columns, entries(old, lengths[:, None] + columns))
    elif arrays.num_accepted_tokens is not None and history:
        columns = jnp.arange(state_len, dtype=jnp.int32)
        stored = columns < (history - 1 + lengths)[:, None]
        place = jnp.where(stored, columns, state_len)
        pool = write_columns(
            pool, writes, place, entries(old_windows, jnp.broadcast_to(columns + 1, (batch, state_len)))
        )
    else:
        pool = write_columns(pool, writes, count, entries(old_windows, lengths[:, None] + count))
    if arrays.track_indices is not None:
        tracked = xla.live_slots(arrays.track_indices, batch, num_slots, options.pad_slot_id)
        length = lengths
        if arrays.track_lengths is not None:
            length = jnp.minimum(natural(arrays.track_lengths), lengths)
        values = entries(old_windows, length[:, None] + count)
        pool = write_columns(pool, jnp.where(touched, tracked, -1), count, values)
    if arrays.snapshot_indices is not None:
        table = arrays.snapshot_indices
        first, offset = first_snapshot(arrays.num_computed_tokens, batch, options.snapshot_block_size)
        block = jnp.arange(table.shape[1], dtype=jnp.int32)
        size = min(options.snapshot_block_size, np.iinfo(np.int32).max)
        more = (lengths - offset) // size  # negative: no boundary
        ahead = block - first[:, None]
        ends = (ahead >= 0) & (ahead <= more[:, None]) & (lengths >= offset)[:, None]
        ends &= touched[:, None]
        saved = jnp.where(ends, xla.live_slots(table, batch, num_slots, options.pad_slot_id), -1)
        taken = offset[:, None] + jnp.where(ends, ahead, 0) * jnp.int32(size)
        index = jnp.where(ends, taken, 0)[:, :, None] + count
        values = entries(old_windows, index.reshape(batch, -1)).reshape(*index.shape, x.shape[1])
        target = jnp.where(saved < 0, num_slots, saved)[:, :, None]
        pool = xla._scatter(pool, (target, count), lax.bitcast_convert_type(values, pool.dtype))
    return pool


def write_columns(pool, slots, columns, bits):
    """The pool with `bits` [batch, n, dim] in columns [n] or [batch, n] of the slots that are >= 0."""
    if bits.shape[1] == 0:
        return pool
    target = jnp.where(slots < 0, pool.shape[0], slots)[:, None]
    return xla._scatter(pool, (target, columns), lax.bitcast_convert_type(bits, pool.dtype))


def natural(counts):
    """Counts of any integers as int32, clamped to what it can hold; negative ones are 0."""
    return jnp.clip(counts, 0, min(2**31 - 1, np.iinfo(counts.dtype).max)).astype(jnp.int32)


def first_snapshot(num_computed_tokens, batch, block_size):
    """(block, offset): the first boundary after the tokens computed so far, and the tokens of this call before it.

    Both are int32; a boundary too far away to be reached has a large offset.
    """
    top = np.iinfo(np.int32).max
    if num_computed_tokens is None:
        return jnp.zeros((batch,), jnp.int32), jnp.full((batch,), min(block_size, top), jnp.int32)
    counts = num_computed_tokens
    unsigned = jnp.uint64 if counts.dtype.itemsize == 8 else jnp.uint32
    counts = jnp.maximum(counts, 0).astype(unsigned)
    size = np.asarray(min(block_size, np.iinfo(unsigned).max), unsigned)
    block, offset = counts // size, size - counts % size
    return jnp.minimum(block, top).astype(jnp.int32), jnp.minimum(offset, top).astype(jnp.int32)


def split_out(out, options):
    """The result as it is, or cut along its channels."""
    if options.split_sizes is None:
        return out
    ends = np.cumsum(options.split_sizes)
    return tuple(out[..., end - size : end] for size, end in zip(options.split_sizes, ends, strict=True))
