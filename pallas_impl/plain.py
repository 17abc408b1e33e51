"""Every operation in plain jax.numpy, for CPUs and TPUs: forward, states in any layout, drafts, gradients.

Vectorised over the packed tokens: the work is O((tokens + batch) * dim * width). Entries of window ++ x of a row are named
by a number: below width-1 an entry of the window, from there on a token of the row. Everything that is stored is
gathered from the arguments first, so that no store is seen by a read.

States move as unsigned integers, since XLA may change a float NaN's payload. Integers have no derivative, so each move
has a rule of its own (`moved`): the same move of the tangents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_impl import arithmetic
from pallas_impl.arithmetic import add_residual, round_to, silu_slope, split

# Before 0.11 the CPU compiler widens a bfloat16 scatter to float32: it copies the pool twice and loses the
# payload of NaNs. As integers the pool is copied once, and exactly.
WIDENS_SCATTERS = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)


def run(arrays, options):
    """Runs a prefill or an update.

    Args:
      arrays: those of the call; x as [tokens, channels], `query_start_loc` int32 inside [0, tokens].
      options: `Options`.

    Returns:
      (out, conv_states, window_out): `out` [tokens, dim], or a tuple of them.
    """
    dim, width = arrays.weight.shape
    tokens, batch, history = arrays.x.shape[0], arrays.query_start_loc.shape[0] - 1, width - 1
    x, conv_states = of_channels(arrays.x, dim, options), arrays.conv_states
    if batch == 0 or (tokens == 0 and not options.apply_empty):
        return split_out(jnp.zeros_like(x), options), conv_states, arrays.window_out
    if tokens == 0:  # rows of zero tokens: nothing is taken from this one
        x = jnp.zeros((1, dim), x.dtype)
    arrays = arrays._replace(x=x)
    slots, live, windows = rows_of(arrays, history, options)
    out = convolve(arrays, live, windows, options)
    window_out = store_windows(arrays, live, windows, options)
    if conv_states is not None and options.commit:
        conv_states = store_states(arrays, slots, windows, options)
    return split_out(out[:tokens], options), conv_states, window_out


def commit(arrays, options):
    """Accepted windows into their slots. Returns the new pool."""
    conv_states, window_out, accepted_steps = arrays.conv_states, arrays.window_out, arrays.accepted_steps
    (batch,), (buffers, steps) = accepted_steps.shape, window_out.shape[:2]
    slots = live_slots(arrays.cache_indices, batch, conv_states.shape[0], options.pad_slot_id)
    rows = live_slots(arrays.window_indices, batch, buffers, options.pad_slot_id)
    step = live_slots(accepted_steps, batch, steps, -1)
    windows = take(window_out, (jnp.maximum(rows, 0), jnp.maximum(step, 0)), mode="promise_in_bounds")
    return write_windows(
        conv_states, jnp.where((rows >= 0) & (step >= 0), slots, -1), round_to(windows, conv_states.dtype)
    )


# Moves: values as they are, of which the derivative is the same move.


def to_bits(array):
    """The float array as unsigned integers, which XLA moves as they are: a float NaN may lose its payload."""
    return lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def moved(move, places, *arrays):
    """`move(places, *arrays)` of float arrays of one dtype, made of their bits; `move` is linear in them."""
    return lax.bitcast_convert_type(move(places, *map(to_bits, arrays)), arrays[0].dtype)


@moved.defjvp
def _moved_tangent(move, primals, tangents):
    places, *arrays = primals
    _, tangent = jax.jvp(functools.partial(move, places), tuple(arrays), tuple(tangents[1:]))
    return moved(move, places, *arrays), tangent


def _indices(place):
    """A place's index arrays, and the slices that may follow them."""
    arrays = tuple(index for index in place if not isinstance(index, slice))
    return arrays, tuple(place[len(arrays) :])


def take(array, place, mode=None):
    """`array[place]`."""
    return moved(lambda place, array: array.at[place].get(mode=mode), place, array)


def choose(condition, chosen, other):
    """The rows [..., dim] of one array where the condition [...] holds, else those of the other."""
    return moved(lambda condition, a, b: jnp.where(condition[..., None], a, b), condition, chosen, other)


def take_rows(x, rows, dtype):
    """`x[rows]` in `dtype`, out-of-range rows clamped."""
    return round_to(take(x, jnp.clip(rows, 0, x.shape[0] - 1)), dtype)


def take_entries(old, index):
    """Entries `index` [batch, n] of each row of `old` [batch, columns, dim], clamped."""
    index = jnp.clip(index, 0, old.shape[1] - 1)[:, :, None]
    return moved(lambda index, old: jnp.take_along_axis(old, index, axis=1), index, old)


def scatter(pool, place, new):
    """The pool with `new` stored at `place`, outside the pool dropped; in place where XLA owns it."""
    if pool.shape[0] == 0:  # JAX makes no derivative of that
        return pool
    place, slices = _indices(place)
    store = lambda place, pool, new: pool.at[(*place, *slices)].set(new, mode="drop")  # noqa: E731
    if WIDENS_SCATTERS and pool.dtype == jnp.bfloat16:
        return moved(store, place, pool, new)
    return store(place, pool, new)


# Integers of any dtype as int32.


def offsets(query_start_loc, tokens):
    """The offsets as int32, clamped to [0, tokens], the first one 0."""
    return jnp.clip(query_start_loc, 0, tokens).astype(jnp.int32).at[0].set(0)


def equal_rows(batch, tokens):
    """The offsets of rows of equal length."""
    return jnp.arange(batch + 1, dtype=jnp.int32) * (tokens // max(batch, 1))


def live_slots(cache_indices, batch, num_slots, pad_slot_id):
    """The slot of each row as int32, -1 for padding rows. Compares in the indices' own dtype."""
    slots = jnp.arange(batch, dtype=jnp.int32) if cache_indices is None else cache_indices
    top = np.iinfo(slots.dtype).max
    live = slots >= 0
    if not isinstance(num_slots, int) or num_slots <= top:
        live &= slots < num_slots
    if 0 <= pad_slot_id <= top:
        live &= slots != pad_slot_id
    return jnp.where(live, slots, 0).astype(jnp.int32) - jnp.where(live, 0, 1).astype(jnp.int32)


def first_columns(num_accepted_tokens, last):
    """The column in which each row's window begins, count-1 as int32, clamped to [0, last]."""
    top = min(last + 1, np.iinfo(num_accepted_tokens.dtype).max)
    return jnp.clip(num_accepted_tokens, 1, top).astype(jnp.int32) - 1


def ring_phase(cache_seqlens, state_len):
    """The column that each row's next token goes to in a rotating slot, as int32; negative counts are 0."""
    counts = cache_seqlens if cache_seqlens.dtype.itemsize >= 4 else cache_seqlens.astype(jnp.int32)
    state_len = max(min(state_len, np.iinfo(counts.dtype).max), 1)
    return jnp.mod(jnp.maximum(counts, 0), state_len).astype(jnp.int32)


def node_parents(tree_parents):
    """The parents as int32; those below 0 are -1, those beyond the row its length."""
    if tree_parents.dtype == jnp.int32:
        return tree_parents
    top = min(tree_parents.shape[1], np.iinfo(tree_parents.dtype).max)
    return jnp.clip(tree_parents, max(-1, np.iinfo(tree_parents.dtype).min), top).astype(jnp.int32)


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


# The window of each row.


def rows_of(arrays, history, options):
    """(slots, live, windows): the slot of each row or -1, which rows are computed, and [batch, history, dim]."""
    x, conv_states, batch = arrays.x, arrays.conv_states, arrays.query_start_loc.shape[0] - 1
    if conv_states is None:
        return None, jnp.ones((batch,), bool), jnp.zeros((batch, history, x.shape[1]), x.dtype)
    num_slots, state_len, _ = conv_states.shape
    slots = live_slots(arrays.cache_indices, batch, num_slots, options.pad_slot_id)
    stateful = stateful_rows(slots >= 0, arrays, options)
    columns = slice(history)
    if options.state_layout == "back":
        columns = slice(state_len - history, state_len)
    elif options.state_layout == "ring" and history:
        phase = ring_phase(arrays.cache_seqlens, state_len)
        columns = jnp.mod(phase[:, None] - history + jnp.arange(history, dtype=jnp.int32)[None], state_len)
    elif arrays.num_accepted_tokens is not None:
        columns = first_columns(arrays.num_accepted_tokens, state_len - history)[:, None]
        columns = columns + jnp.arange(history, dtype=jnp.int32)[None]
    return slots, slots >= 0, read_columns(conv_states, slots, stateful, columns)


def stateful_rows(live, arrays, options):
    has = arrays.has_initial_state
    return live & options.always_state if has is None else live & has


def read_windows(conv_states, slots, stateful, history):
    """[batch, history, dim]: the windows in front of the slots of stateful rows, for the others zeros."""
    return read_columns(conv_states, slots, stateful, slice(history))


def read_columns(conv_states, slots, stateful, columns):
    """[batch, n, dim]: the columns, a slice or [batch, n], of stateful rows; for the others zeros, selected and not
    multiplied.
    """
    count = (
        len(range(*columns.indices(conv_states.shape[1]))) if isinstance(columns, slice) else columns.shape[1]
    )
    if conv_states.shape[0] == 0 or count == 0:
        return jnp.zeros((slots.shape[0], count, conv_states.shape[2]), conv_states.dtype)
    slots = jnp.maximum(slots, 0)
    place, slices = _indices((slots if isinstance(columns, slice) else slots[:, None], columns))

    def read(place, conv_states):
        *place, stateful = place
        values = conv_states.at[(*place, *slices)].get(mode="promise_in_bounds")
        return jnp.where(stateful[:, None, None], values, jnp.zeros_like(values))

    return moved(read, (*place, stateful), conv_states)


# Results.


def of_channels(x, dim, options):
    """The channels of x that are read."""
    return lax.slice_in_dim(x, options.channel, options.channel + dim, axis=1)


# Their derivatives select `computed` [tokens, 1], so that no gradient multiplies what lies in padding.


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def multiply_add(tap, value, total, computed, short):
    """total + tap * value in float32, `value` float32; `short`: its values have 12 significant bits at most."""
    return arithmetic.multiply_add(split(tap), (value,) if short else split(value), total)


@multiply_add.defjvp
def _multiply_add_tangent(short, primals, tangents):
    (tap, value, total, computed), (dtap, dvalue, dtotal, _) = primals, tangents
    met = jnp.where(computed, value, 0.0)
    tangent = dtotal + dtap.astype(jnp.float32) * met + tap.astype(jnp.float32) * dvalue
    return multiply_add(tap, value, total, computed, short), tangent


@jax.custom_jvp
def activate(z, computed):
    """`arithmetic.activate`, with a derivative that no large argument makes a NaN."""
    return arithmetic.activate(z)


@activate.defjvp
def _activate_tangent(primals, tangents):
    z, computed = primals
    return activate(z, computed), jnp.where(computed, silu_slope(z), 0.0) * tangents[0]


def convolve(arrays, live, windows, options):
    """[tokens, dim]: the result of every token, zeros for padding."""
    x, weight, bias, starts = arrays.x, arrays.weight, arrays.bias, arrays.query_start_loc
    tokens, history = x.shape[0], windows.shape[1]
    row, owner, position = locate(starts, tokens)
    computed = ((row < starts.shape[0] - 1) & live[owner])[:, None]
    if arrays.tree_parents is None:
        entries = [position + j for j in range(history + 1)]
    else:
        chain = ancestors(arrays.tree_parents, history).reshape(tokens, history + 1)
        entries = [chain[:, j] for j in range(history + 1)]
    short = x.dtype == windows.dtype != jnp.float32
    windows = windows.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    total = jnp.zeros((1, 1), jnp.float32) if bias is None else bias.astype(jnp.float32)[None]
    for j, entry in enumerate(entries):
        back = history - j
        if arrays.tree_parents is None:
            value = jnp.pad(wide, ((back, 0), (0, 0)))[:tokens]
        else:
            value = wide[jnp.clip(starts[owner] + entry - history, 0, tokens - 1)]
        if back:
            old = windows[owner, jnp.clip(entry, 0, history - 1)]
            value = jnp.where((entry < history)[:, None], old, value)
        total = multiply_add(weight[None, :, j], value, total, computed, short)
    if options.silu:
        total = activate(total, computed)
    if arrays.residual is not None:
        residual = jnp.pad(arrays.residual, ((0, tokens - arrays.residual.shape[0]), (0, 0)))
        total = add_residual(total, residual.astype(jnp.float32), interpret=True)
    return jnp.where(computed, total, 0.0).astype(x.dtype)


def stored(value):
    """The value as memory would hold it: XLA may keep more of what it rounds and reads again."""
    return lax.optimization_barrier(value)


def where_live(live, value):
    """The value [..., channels or heads and channels], zeros where `live` [...] does not hold."""
    return jnp.where(
        live.reshape(*live.shape, *(1,) * (value.ndim - live.ndim)), value, jnp.zeros_like(value)
    )


def locate(starts, tokens):
    """Of each token: its row (`batch` for the tail), that clamped to the last row, and its place in that row."""
    token = jnp.arange(tokens, dtype=jnp.int32)
    if isinstance(tokens, int) and isinstance(starts.shape[0], int):
        row = jnp.searchsorted(starts[1:], token, side="right", method="sort").astype(jnp.int32)
    else:  # no sort is made of a symbolic number of rows or tokens (`jax.export`)
        row = (starts[None, 1:] <= token[:, None]).sum(axis=1, dtype=jnp.int32)
    owner = jnp.minimum(row, starts.shape[0] - 2)
    return row, owner, token - starts[owner]


def ancestors(tree_parents, history):
    """[batch, n, history+1]: of each node the entries its taps meet, oldest first; the last is history + node."""
    batch, n = tree_parents.shape
    node = jnp.arange(n, dtype=jnp.int32)
    parents = jnp.minimum(node_parents(tree_parents), node[None] - 1)
    # before[e] of entry e: the entry of the parent, or the one before it in the window.
    inside = jnp.where(parents < 0, history - 1, history + parents)
    window = jnp.broadcast_to(jnp.arange(history, dtype=jnp.int32) - 1, (batch, history))
    before = jnp.concatenate([window, inside], axis=1)
    chain = [jnp.broadcast_to(history + node, (batch, n))]
    for _ in range(history):
        chain.append(jnp.take_along_axis(before, chain[-1], axis=1))
    return jnp.stack(chain[::-1], axis=2)


def split_out(out, options):
    """The result as it is, or cut along its channels."""
    if options.split_sizes is None:
        return out
    ends = np.cumsum(options.split_sizes)
    return tuple(out[..., end - size : end] for size, end in zip(options.split_sizes, ends, strict=True))


# States.


def store_windows(arrays, live, windows, options):
    """`window_out` with the window after every token of the live rows."""
    x, window_out, starts = arrays.x, arrays.window_out, arrays.query_start_loc
    tokens, batch, history = x.shape[0], starts.shape[0] - 1, windows.shape[1]
    if window_out is None or window_out.size == 0:
        return window_out
    row, owner, position = locate(starts, tokens)
    if arrays.tree_parents is None:
        entry = position[:, None] + 1 + jnp.arange(history, dtype=jnp.int32)[None]
    else:
        entry = ancestors(arrays.tree_parents, history).reshape(tokens, history + 1)[:, 1:]
    token = starts[owner][:, None] + entry - history
    old = take(round_to(windows, window_out.dtype), (owner[:, None], jnp.clip(entry, 0, history - 1)))
    values = choose(entry < history, old, take_rows(x, token, window_out.dtype))
    buffers = live_slots(arrays.window_indices, batch, window_out.shape[0], options.pad_slot_id)
    stored = (row < batch) & live[owner] & (buffers[owner] >= 0) & (position < window_out.shape[1])
    buffer = jnp.where(stored, buffers[owner], window_out.shape[0])
    return scatter(window_out, (buffer, jnp.maximum(position, 0)), values)


def store_states(arrays, slots, windows, options):
    """The pool after the call."""
    x, starts, conv_states = arrays.x, arrays.query_start_loc, arrays.conv_states
    num_slots, state_len, _ = conv_states.shape
    batch, history = starts.shape[0] - 1, windows.shape[1]
    lengths = starts[1:] - starts[:-1]
    touched = slots >= 0
    if not options.apply_empty:
        touched &= lengths > 0
    writes = slots
    if arrays.write_indices is not None:
        writes = live_slots(arrays.write_indices, batch, num_slots, options.pad_slot_id)
    writes = jnp.where(touched, writes, -1)
    count = jnp.arange(history, dtype=jnp.int32)[None]
    if options.state_layout != "front":
        pool = _store_slots(arrays, slots, writes, options)
    elif arrays.num_accepted_tokens is not None and history:
        columns = jnp.arange(state_len, dtype=jnp.int32)[None]
        place = jnp.where(columns < (history - 1 + lengths)[:, None], columns, state_len)
        index = jnp.broadcast_to(columns + 1, (batch, state_len))
        pool = write_columns(conv_states, writes, place, _entries(arrays, windows, index))
    else:
        pool = write_windows(conv_states, writes, _entries(arrays, windows, lengths[:, None] + count))
    if arrays.track_indices is not None:
        tracked = live_slots(arrays.track_indices, batch, num_slots, options.pad_slot_id)
        length = lengths
        if arrays.track_lengths is not None:
            length = jnp.minimum(natural(arrays.track_lengths), lengths)
        values = _entries(arrays, windows, length[:, None] + count)
        pool = write_windows(pool, jnp.where(touched, tracked, -1), values)
    if arrays.snapshot_indices is not None:
        saved, taken = _snapshots(arrays, lengths, touched, num_slots, options)
        index = (taken[:, :, None] + count[None]).reshape(batch, -1)
        values = _entries(arrays, windows, index).reshape(*taken.shape, history, x.shape[1])
        target = jnp.where(saved < 0, num_slots, saved)[:, :, None]
        pool = scatter(pool, (target, count[None]), values)
    return pool


def _entries(arrays, old, index):
    """Entries `index` [batch, n] of old [batch, columns, dim] ++ x of each row, in the pool's dtype."""
    dtype, columns = arrays.conv_states.dtype, old.shape[1]
    if columns == 0:
        return jnp.zeros((*index.shape, arrays.x.shape[1]), dtype)
    arrived = take_rows(arrays.x, arrays.query_start_loc[:-1, None] + index - columns, dtype)
    return choose(index < columns, take_entries(old, index), arrived)


def _store_slots(arrays, slots, writes, options):
    """The pool with whole slots written, in the layouts "back" and "ring"."""
    conv_states, starts = arrays.conv_states, arrays.query_start_loc
    state_len, lengths = conv_states.shape[1], starts[1:] - starts[:-1]
    columns = jnp.arange(state_len, dtype=jnp.int32)[None]
    old = read_windows(conv_states, slots, stateful_rows(slots >= 0, arrays, options), state_len)
    if options.state_layout == "back":
        return write_columns(conv_states, writes, columns, _entries(arrays, old, lengths[:, None] + columns))
    end = ring_phase(arrays.cache_seqlens, state_len) + lengths
    # The newest token that lives in each column.
    since = jnp.mod(end[:, None] - 1 - columns, max(state_len, 1))
    token = lengths[:, None] - 1 - since
    arrived = take_rows(arrays.x, starts[:-1, None] + token, conv_states.dtype)
    return write_columns(conv_states, writes, columns, choose(token >= 0, arrived, old))


def _snapshots(arrays, lengths, touched, num_slots, options):
    """(saved, taken), each [batch, blocks]: the slot of each snapshot or -1, and after how many tokens it is taken."""
    table, batch = arrays.snapshot_indices, lengths.shape[0]
    first, offset = first_snapshot(arrays.num_computed_tokens, batch, options.snapshot_block_size)
    block = jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    size = min(options.snapshot_block_size, np.iinfo(np.int32).max)
    more = (lengths - offset) // size  # negative: no boundary
    ahead = block - first[:, None]
    ends = (ahead >= 0) & (ahead <= more[:, None]) & (lengths >= offset)[:, None]
    ends &= touched[:, None]
    saved = jnp.where(ends, live_slots(table, batch, num_slots, options.pad_slot_id), -1)
    taken = offset[:, None] + jnp.where(ends, ahead, 0) * jnp.int32(size)
    return saved, jnp.where(ends, taken, 0)


def write_windows(conv_states, slots, windows):
    """The pool with the windows of rows with a slot >= 0 stored in front; in place where XLA owns the pool."""
    if windows.shape[1] == 0:
        return conv_states
    target = jnp.where(slots < 0, conv_states.shape[0], slots)
    return scatter(conv_states, (target, slice(windows.shape[1])), windows)


def write_columns(pool, slots, columns, values):
    """The pool with `values` [batch, n, dim] in columns [1, n] or [batch, n] of the slots that are >= 0."""
    if values.shape[1] == 0:
        return pool
    target = jnp.where(slots < 0, pool.shape[0], slots)[:, None]
    return scatter(pool, (target, columns), values)


# Rows of equal length: shifts instead of gathers.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(silu, x, weight, bias, initial_states, documents):
    """The differentiable form for x [batch, seqlen, dim].

    Args:
      silu: whether SiLU follows.
      x, weight, bias, initial_states: checked arguments of `causal_conv1d`.
      documents: [batch, seqlen] int32, the number of each token's document from 0, ascending; or None: one a row.

    Returns:
      (out, final_states), the bits of every document alone; initial states belong to the first, final ones to the last.
    """
    history = weight.shape[1] - 1
    dtype = x.dtype if initial_states is None else initial_states.dtype
    short = x.dtype == dtype != jnp.float32
    total = jnp.zeros((1, 1, 1), jnp.float32) if bias is None else bias.astype(jnp.float32)[None, None]
    for j in range(history + 1):
        value = _met(x, initial_states, documents, j, history)
        parts = (value,) if short else split(value)
        total = arithmetic.multiply_add(split(weight[None, None, :, j]), parts, total)
    out = (arithmetic.activate(total) if silu else total).astype(x.dtype)
    return out, last_entries(x, initial_states, documents, history)


def _shift(array, by, fill=0):
    """[batch, seqlen, ...] moved `by` tokens towards the end (below 0: the beginning)."""
    edge = [(0, 0)] * (array.ndim - 2)
    before, after = max(by, 0), max(-by, 0)
    padded = jnp.pad(array, [(0, 0), (before, after), *edge], constant_values=fill)
    return padded[:, : array.shape[1]] if by > 0 else padded[:, after:]


def _met(x, initial_states, documents, tap, history):
    """What a tap meets at each token, as float32: an entry of the initial states, a token, or zero."""
    back = history - tap
    value = _shift(x.astype(jnp.float32), back)
    if not back:
        return value
    if documents is not None:
        value = jnp.where((_shift(documents, back, -1) == documents)[..., None], value, 0.0)
    if initial_states is not None:
        seqlen = x.shape[1]
        old = initial_states[:, tap:].astype(jnp.float32)
        old = jnp.pad(old, [(0, 0), (0, seqlen), (0, 0)])[:, :seqlen]
        first = jnp.arange(seqlen, dtype=jnp.int32)[None] < back
        if documents is not None:
            first = first & (documents == 0)
        value = jnp.where(first[..., None], old, value)
    return value


def last_entries(x, cache, documents, columns):
    """[batch, columns, dim]: the last entries of cache ++ x in the cache's dtype, zeros before the last document."""
    batch, seqlen, dim = x.shape
    if cache is None:
        cache = jnp.zeros((batch, columns, dim), x.dtype)
    tail = x[:, max(seqlen - columns, 0) :] if isinstance(seqlen, int) else x

    def join(documents, cache, tail):
        entries = jnp.concatenate([cache, tail], axis=1)
        entries = entries[:, entries.shape[1] - columns :]
        if documents is None or seqlen == 0:
            return entries
        of_entry = jnp.pad(documents, [(0, 0), (columns, 0)])[:, seqlen:]
        return jnp.where((of_entry == documents[:, -1:])[..., None], entries, 0)

    return moved(join, documents, cache, round_to(tail, cache.dtype))


def _dense_forward(silu, *inputs):
    return dense(silu, *inputs), inputs


def _dense_backward(silu, inputs, upstream):
    """The gradients of `dense`, summed in float32 and rounded once."""
    x, weight, bias, initial_states, documents = inputs
    dout, dfinal = upstream
    seqlen, history = x.shape[1], weight.shape[1] - 1
    taps = weight.astype(jnp.float32)
    columns = [_met(x, initial_states, documents, j, history) for j in range(history + 1)]
    g = dout.astype(jnp.float32)
    if silu:
        pre = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)[None, None]
        for j, column in enumerate(columns):
            pre = pre + taps[None, None, :, j] * column
        g = g * silu_slope(pre)

    kept = dfinal.astype(jnp.float32)  # of entries that lie in the last document
    if documents is not None and seqlen:
        of_entry = jnp.pad(documents, [(0, 0), (history, 0)])[:, seqlen:]
        kept = jnp.where((of_entry == documents[:, -1:])[..., None], kept, 0.0)
    late = jnp.pad(kept, [(0, 0), (seqlen, 0), (0, 0)])  # the gradient of each entry of initial ++ x
    dx = late[:, history:]
    for back in range(history + 1):
        met = _shift(g, -back)
        if back and documents is not None:
            met = jnp.where((_shift(documents, -back, -1) == documents)[..., None], met, 0.0)
        dx = dx + taps[None, None, :, history - back] * met

    dweight = jnp.stack([(column * g).sum((0, 1)) for column in columns], axis=1).astype(weight.dtype)
    dbias = None if bias is None else g.sum((0, 1)).astype(bias.dtype)
    dinitial = None
    if initial_states is not None:
        first = g if documents is None else jnp.where((documents == 0)[..., None], g, 0.0)
        first = jnp.pad(first, [(0, 0), (0, history), (0, 0)])[:, :history]
        dinitial = late[:, :history]
        for j in range(history, -1, -1):
            dinitial = dinitial + taps[None, None, :, j] * _shift(first, j)[:, :history]
        dinitial = dinitial.astype(initial_states.dtype)
    return dx.astype(x.dtype), dweight, dbias, dinitial, None


dense.defvjp(_dense_forward, _dense_backward)


# Gradients of the differentiable form.


def backward(dout, dfinal, x, weight, bias, initial_states, query_start_loc, *, silu):
    """The gradients of checked arguments, x and dout of shape [tokens, dim].

    Returns:
      (dx, dweight, dbias, dinitial), each in the dtype of its argument; dbias and dinitial None without one.
    """
    (tokens, dim), history = x.shape, weight.shape[1] - 1
    batch = query_start_loc.shape[0] - 1
    if tokens == 0 or batch == 0:
        dinitial = dfinal
        if initial_states is not None:
            dinitial = (
                jnp.zeros_like(initial_states) if dfinal is None else dfinal.astype(initial_states.dtype)
            )
        return (
            jnp.zeros_like(x),
            jnp.zeros_like(weight),
            None if bias is None else jnp.zeros_like(bias),
            None if initial_states is None else dinitial,
        )
    starts = offsets(query_start_loc, tokens)
    taps = weight.astype(jnp.float32)
    initial = jnp.zeros((batch, history, dim), jnp.float32)
    if initial_states is not None:
        initial = initial_states.astype(jnp.float32)

    row, owner, position = locate(starts, tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    live, end = row < batch, starts[owner + 1]
    values = jnp.where(live[:, None], x.astype(jnp.float32), 0.0)
    columns = []  # for each tap what it meets
    for j in range(history + 1):
        back = history - j
        column = jnp.pad(values, ((back, 0), (0, 0)))[:tokens]
        if back:
            entry = jnp.clip(position + j, 0, history - 1)
            column = jnp.where((position < back)[:, None], initial[owner, entry], column)
        columns.append(column)

    g = jnp.where(live[:, None], dout.astype(jnp.float32), 0.0)
    if silu:
        pre = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)[None]
        for j, column in enumerate(columns):
            pre = pre + taps[None, :, j] * column
        g = jnp.where(live[:, None], g * silu_slope(pre), 0.0)
    padded = jnp.pad(g, ((0, history), (0, 0)))

    dx = jnp.zeros((), jnp.float32)
    if dfinal is not None and history:
        column = token - (end - history)
        late = live & (column >= 0)
        dx = jnp.where(
            late[:, None], dfinal.astype(jnp.float32)[owner, jnp.clip(column, 0, history - 1)], 0.0
        )
    for back in range(history + 1):  # the tokens that meet an input: from its own on, newest tap first
        met = jnp.where((live & (token + back < end))[:, None], padded[back : back + tokens], 0.0)
        dx = dx + taps[None, :, history - back] * met

    dweight = jnp.stack([(column * g).sum(0) for column in columns], axis=1).astype(weight.dtype)
    dbias = None if bias is None else g.sum(0).astype(bias.dtype)
    dinitial = None
    if initial_states is not None:
        length = starts[1:] - starts[:-1]
        entries = []
        for c in range(history):
            value = jnp.zeros((batch, dim), jnp.float32)
            if dfinal is not None:
                column = jnp.clip(c - length, 0, history - 1)[:, None, None]
                kept = jnp.take_along_axis(dfinal.astype(jnp.float32), column, axis=1)[:, 0]
                value = jnp.where((c >= length)[:, None], kept, 0.0)
            for j in range(c, -1, -1):
                met = padded[jnp.minimum(starts[:-1] + (c - j), tokens)]
                value = value + taps[None, :, j] * jnp.where((c - j < length)[:, None], met, 0.0)
            entries.append(value)
        dinitial = jnp.stack(entries, axis=1) if entries else initial
        dinitial = dinitial.astype(initial_states.dtype)
    return dx.astype(x.dtype), dweight, dbias, dinitial
