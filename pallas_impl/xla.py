"""Both operations in plain jax.numpy, for CPUs and TPUs, with the gathers and scatters of windows.

Vectorised over the packed tokens: the work is O((tokens + batch) * dim * width).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_impl.taps import activate, multiply_add, split

# Before 0.11 the CPU compiler widens a bfloat16 scatter to float32: it copies the pool twice and loses the
# payload of NaNs. As integers the pool is copied once, and exactly.
WIDENS_SCATTERS = tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11)


def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, *,
    silu, pad_slot_id, always_state=False, num_accepted_tokens=None,
):  # fmt: skip
    """A packed prefill; arguments as in `causal_conv1d_fn`. Returns (out, conv_states).

    With `num_accepted_tokens` a packed step of rolling slots, see `causal_conv1d_update`.
    """
    tokens = x.shape[0]
    history = weight.shape[1] - 1
    batch = query_start_loc.shape[0] - 1
    if tokens == 0 or batch == 0:
        return jnp.zeros_like(x), conv_states
    starts = offsets(query_start_loc, tokens)
    slots = None
    live = jnp.ones((batch,), bool)
    windows = jnp.zeros((batch, history, x.shape[1]), x.dtype)
    if conv_states is not None:
        slots = live_slots(cache_indices, batch, conv_states.shape[0], pad_slot_id)
        live = slots >= 0
        stateful = live & always_state if has_initial_state is None else live & has_initial_state
        column = None
        if num_accepted_tokens is not None:
            column = first_columns(num_accepted_tokens, conv_states.shape[1] - history)
        windows = read_windows(conv_states, slots, stateful, history, column)

    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], token, side="right", method="sort").astype(jnp.int32)
    owner = jnp.minimum(row, batch - 1)
    position = token - starts[owner]
    total = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    for j in range(history + 1):
        back = history - j
        value = jnp.pad(x, ((back, 0), (0, 0)))[:tokens]
        if back:
            entry = jnp.clip(position + j, 0, history - 1)
            wide = jnp.promote_types(x.dtype, windows.dtype)
            value = jnp.where(
                (position < back)[:, None], windows[owner, entry].astype(wide), value.astype(wide)
            )
        total = multiply_add(split(weight[:, j]), split(value), total)
    computed = (row < batch) & live[owner]
    out = jnp.where(computed[:, None], activate(total) if silu else total, 0.0).astype(x.dtype)
    if slots is None or history == 0:
        return out, conv_states

    if num_accepted_tokens is not None:
        kept = write_windows(conv_states, jnp.where(starts[1:] > starts[:-1], slots, -1), windows[:, 1:])
        column = jnp.where(computed, position + history - 1, conv_states.shape[1])
        return out, _scatter(kept, (slots[owner], column), x.astype(conv_states.dtype))

    # Entry lengths + i of window ++ x, for i in 0 .. history-1.
    lengths = starts[1:] - starts[:-1]
    entry = lengths[:, None] + jnp.arange(history, dtype=jnp.int32)
    kept = jnp.take_along_axis(to_bits(windows), jnp.clip(entry, 0, history - 1)[:, :, None], axis=1)
    arrived = take_rows(x, starts[:-1, None] + entry - history, conv_states.dtype)
    windows = lax.bitcast_convert_type(
        jnp.where((entry < history)[:, :, None], kept, arrived), conv_states.dtype
    )
    return out, write_windows(conv_states, jnp.where(lengths > 0, slots, -1), windows)


def update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, *, silu, pad_slot_id
):
    """A decode step; arguments as in `causal_conv1d_update`. Returns (out, conv_states)."""
    if x.size == 0:
        return jnp.zeros_like(x), conv_states
    dim = x.shape[-1]
    starts = query_start_loc
    if starts is None:
        starts = jnp.arange(x.shape[0] + 1, dtype=jnp.int32) * (x.size // (x.shape[0] * dim))
    tokens = x.reshape(-1, dim)
    if WIDENS_SCATTERS:  # that compiler widens the reshape as well, unless it has to be a tensor of its own
        tokens = lax.optimization_barrier(tokens)
    out, conv_states = prefill(
        tokens, weight, bias, conv_states, starts, cache_indices, None,
        silu=silu, pad_slot_id=pad_slot_id, always_state=True, num_accepted_tokens=num_accepted_tokens,
    )  # fmt: skip
    return out.reshape(x.shape), conv_states


def offsets(query_start_loc, tokens):
    """The offsets as int32, clamped to [0, tokens], the first one 0."""
    return jnp.clip(query_start_loc, 0, tokens).astype(jnp.int32).at[0].set(0)


def live_slots(cache_indices, batch, num_slots, pad_slot_id):
    """The slot of each row as int32, -1 for padding rows. Compares in the indices' own dtype."""
    slots = jnp.arange(batch, dtype=jnp.int32) if cache_indices is None else cache_indices
    live = slots >= 0
    if num_slots <= np.iinfo(slots.dtype).max:
        live &= slots < num_slots
    if 0 <= pad_slot_id <= np.iinfo(slots.dtype).max:
        live &= slots != pad_slot_id
    return jnp.where(live, slots, 0).astype(jnp.int32) - jnp.where(live, 0, 1).astype(jnp.int32)


def first_columns(num_accepted_tokens, last):
    """The column in which each row's window begins, count-1 as int32, clamped to [0, last]."""
    top = min(last + 1, np.iinfo(num_accepted_tokens.dtype).max)
    return jnp.clip(num_accepted_tokens, 1, top).astype(jnp.int32) - 1


def to_bits(array):
    """The float array as unsigned integers, which XLA moves as they are: a float NaN may lose its payload."""
    return lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize])


def take_rows(x, rows, dtype):
    """The bits of `x[rows]` in `dtype`, out-of-range rows clamped."""
    rows = jnp.clip(rows, 0, x.shape[0] - 1)
    return to_bits(x)[rows] if x.dtype == dtype else to_bits(x[rows].astype(dtype))


def read_windows(conv_states, slots, stateful, history, column=None):
    """[batch, history, dim]: the windows of stateful rows; for the others zeros, selected and not multiplied.

    A window begins in column 0, or where `column` [batch] says.
    """
    if conv_states.shape[0] == 0:
        return jnp.zeros((slots.shape[0], history, conv_states.shape[2]), conv_states.dtype)
    place = (jnp.maximum(slots, 0), slice(history))
    if column is not None:
        place = (place[0][:, None], column[:, None] + jnp.arange(history, dtype=jnp.int32))
    windows = to_bits(conv_states).at[place].get(mode="promise_in_bounds")
    windows = jnp.where(stateful[:, None, None], windows, 0)
    return lax.bitcast_convert_type(windows, conv_states.dtype)


def write_windows(conv_states, slots, windows):
    """The pool with the windows of rows with a slot >= 0 stored; in place where XLA owns the pool."""
    target = jnp.where(slots < 0, conv_states.shape[0], slots)
    return _scatter(conv_states, (target, slice(windows.shape[1])), windows)


def _scatter(pool, place, new):
    """The pool with `new` stored at `place`, outside the pool dropped."""
    if WIDENS_SCATTERS and pool.dtype == jnp.bfloat16:
        stored = to_bits(pool).at[place].set(to_bits(new), mode="drop")
        return lax.bitcast_convert_type(stored, pool.dtype)
    return pool.at[place].set(new, mode="drop")
