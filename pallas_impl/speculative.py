"""Between two steps of speculative decoding: the accepted windows into their slots, and links of a tree to parents."""

import functools
import operator

import jax
import jax.numpy as jnp

from oracle.contract import check_commit_values, check_commit_windows, check_tree_parents_from_links
from pallas_impl import commit, xla
from pallas_impl.backends import interpreter, on_host, resolve
from pallas_impl.config import choose_lanes
from pallas_impl.serving import narrow, tma_padding
from pallas_impl.transforms import refuse_transforms


def commit_windows(
    conv_states,
    window_out,
    accepted_steps,
    cache_indices=None,
    window_indices=None,
    *,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
):
    """Moves the window after each row's last accepted token from `window_out` to the row's slot.

    Args:
      conv_states: [num_slots, state_len, dim] float32, float16 or bfloat16, state_len >= width-1; not copied where
        the caller donates it to the enclosing `jit`.
      window_out: [buffers, steps, width-1, dim] float, as `causal_conv1d_update` returned it.
      accepted_steps: [batch] integer, the last accepted token of each row, from 0; outside [0, steps): the row is
        left alone.
      cache_indices: [batch] integer slots; None: row i uses slot i.
      window_indices: [batch] integer buffers; None: row i uses buffer i.
      pad_slot_id: slot (and buffer) number of padding rows; those out of range are padding as well.
      backend, validate: as in `causal_conv1d_fn`.

    Returns:
      The new pool: columns 0 to width-2 of the slots are exact copies, cast once if the dtypes differ.

    Raises:
      ValueError, TypeError: as `oracle.contract.check_commit_windows`; with `validate`, bad steps, slots or buffers.
      Unsupported: as `causal_conv1d_fn`.
    """
    sizes = check_commit_windows(
        conv_states, window_out, accepted_steps, cache_indices, window_indices,
        pad_slot_id=pad_slot_id, backend=backend, validate=validate,
    )  # fmt: skip
    backend = resolve(backend, conv_states)
    if validate:
        check_commit_values(
            on_host("accepted_steps", accepted_steps),
            on_host("cache_indices", cache_indices),
            on_host("window_indices", window_indices),
            sizes,
            pad_slot_id,
        )
    return _commit(
        conv_states, window_out, accepted_steps, cache_indices, window_indices,
        pad_slot_id=operator.index(pad_slot_id), kernel=backend != "xla", interpret=backend == "mosaic_gpu_interpret",
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("pad_slot_id", "kernel", "interpret"))
def _commit(
    conv_states, window_out, accepted_steps, cache_indices, window_indices, *, pad_slot_id, kernel, interpret
):
    num_slots = conv_states.shape[0]
    buffers, steps = window_out.shape[:2]
    (batch,) = accepted_steps.shape
    if window_out.size == 0 or num_slots == 0 or batch == 0:
        return conv_states
    dim = conv_states.shape[2]
    if kernel and not tma_padding(dim, (conv_states, window_out), interpret):
        arrays = refuse_transforms(conv_states, window_out, accepted_steps, cache_indices, window_indices)
        conv_states, window_out, accepted, slots, rows = arrays
        return commit.launch(
            conv_states, window_out, narrow(accepted, batch, steps, -1), narrow(slots, batch, num_slots, pad_slot_id),
            narrow(rows, batch, buffers, pad_slot_id), pad_slot_id=pad_slot_id, lanes=choose_lanes(dim),
            interpret=interpreter(interpret),
        )  # fmt: skip
    slots = xla.live_slots(cache_indices, batch, num_slots, pad_slot_id)
    rows = xla.live_slots(window_indices, batch, buffers, pad_slot_id)
    step = xla.live_slots(accepted_steps, batch, steps, -1)
    windows = (
        xla.to_bits(window_out).at[jnp.maximum(rows, 0), jnp.maximum(step, 0)].get(mode="promise_in_bounds")
    )
    windows = jax.lax.bitcast_convert_type(windows, window_out.dtype)
    if windows.dtype != conv_states.dtype:
        windows = windows.astype(conv_states.dtype)
    return xla.write_windows(conv_states, jnp.where((rows >= 0) & (step >= 0), slots, -1), windows)


@jax.jit
def tree_parents_from_links(next_token, next_sibling):
    """The parents of a draft tree's nodes from its links, for `tree_parents` of `causal_conv1d_update`.

    The links are turned round by two scatters; then every node finds the eldest of its siblings in log2(n) steps
    of pointer doubling.

    Args:
      next_token: [batch, n] integer: the first child of each node, larger than the node; any value outside
        (node, n) means none.
      next_sibling: [batch, n] integer: its next sibling, by the same rules.

    Returns:
      int32 [batch, n]. Node 0 is the root, with parent -1. A node that nobody names has parent 0.

    Raises:
      ValueError, TypeError: as `oracle.contract.check_tree_parents_from_links`.
    """
    batch, n = check_tree_parents_from_links(next_token, next_sibling)
    node = jnp.arange(n, dtype=jnp.int32)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    named_by = jnp.full(
        (batch, n), -1, jnp.int32
    )  # 2 * namer, and 1 more as its sibling; the last namer counts
    for links, as_sibling in ((next_token, 0), (next_sibling, 1)):
        named = xla.live_slots(links, batch, n, -1)
        place = (row, jnp.where(named > node, named, n))
        named_by = named_by.at[place].max(2 * node + as_sibling, mode="drop")
    elder = jnp.where((named_by >= 0) & (named_by % 2 == 1), named_by >> 1, node)
    parents = jnp.where(node == 0, -1, jnp.maximum(named_by >> 1, 0))
    for _ in range(max(n - 1, 1).bit_length()):
        elder = jnp.take_along_axis(elder, elder, axis=1)
    return jnp.take_along_axis(parents, elder, axis=1)
