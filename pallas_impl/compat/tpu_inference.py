"""The ragged convolutions of tpu-inference 0.32, with its parameters and layouts; no activation, which its callers apply.

Its own models no longer call this interface: in 0.32 they run one fused kernel (convolution, gates and delta rule), and
only tests, and engines that took the functions over, come here.

As there, a row of zero tokens without a state zeroes its slot, and offsets of rows past `distribution[2]` may be
anything: the offset at `distribution[2]` ends the last row. What differs, on purpose: sums are float32 with one
rounding at the end; has_initial_state counts in batches of single tokens too; padding rows touch no slot, and their
tokens give zeros.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from pallas_impl.api import causal_conv1d_fn
from pallas_impl.tracing import program


@functools.partial(
    jax.jit, donate_argnames="conv_state", static_argnames=("kernel_size", "decode_only_bucket")
)
def ragged_conv1d(
    x,
    conv_state,
    conv_weight,
    conv_bias,
    query_start_loc,
    state_indices,
    distribution,
    has_initial_state,
    *,
    kernel_size,
    decode_only_bucket=False,
):
    """Packed sequences on a pool, which is donated.

    Args:
      x: [tokens, dim].
      conv_state: [slots, kernel_size-1, dim].
      conv_weight: [dim, 1, kernel_size].
      conv_bias: [dim] or None.
      query_start_loc: [batch+1].
      state_indices: at least batch slots; those after the first batch are ignored.
      distribution: [3] integers; from row `distribution[2]` on, rows are padding.
      has_initial_state: at least batch bool, likewise.
      kernel_size: taps.
      decode_only_bucket: a hint that every row has one token; results do not depend on it.

    Returns:
      (out, new_conv_state)

    Raises:
      ValueError: `kernel_size` is not that of `conv_weight`; a shape.
    """
    del decode_only_bucket
    if len(conv_weight.shape) != 3 or conv_weight.shape[1:] != (1, kernel_size):
        raise ValueError(
            f"conv_weight: expected shape [dim, 1, kernel_size={kernel_size}], got {list(conv_weight.shape)}"
        )
    if tuple(distribution.shape) != (3,):
        raise ValueError(f"distribution: expected shape [3], got {list(distribution.shape)}")
    rows = _rows(query_start_loc, state_indices, distribution, has_initial_state)
    return tuple(causal_conv1d_fn(x, conv_weight[:, 0], conv_bias, conv_state, *rows, empty_rows="apply"))


@program
def _rows(query_start_loc, state_indices, distribution, has_initial_state):
    """(offsets, slots, has_initial_state) of `causal_conv1d_fn`."""
    batch = query_start_loc.shape[0] - 1
    rows = jnp.clip(distribution[2], 0, batch)
    slots = state_indices[:batch]
    slots = jnp.where(jnp.arange(slots.shape[0]) < rows, slots, -1)
    starts = jnp.where(jnp.arange(batch + 1) <= rows, query_start_loc, query_start_loc[rows])
    return starts, slots, has_initial_state[:batch]


_single = program(functools.partial(jnp.arange, dtype=jnp.int32), static_argnums=0)


def ragged_conv1d_mixed_prefill(
    x,
    conv_state,
    conv_weight,
    conv_bias,
    query_start_loc,
    state_indices,
    distribution,
    has_initial_state,
    *,
    kernel_size,
):
    """As `ragged_conv1d`, but the pool is not donated: the branch that it takes for rows of any lengths."""
    rows = conv_bias, query_start_loc, state_indices, distribution, has_initial_state
    return ragged_conv1d.__wrapped__(x, conv_state, conv_weight, *rows, kernel_size=kernel_size)


def ragged_conv1d_decode_only(
    x,
    conv_state,
    conv_weight,
    conv_bias,
    query_start_loc,
    state_indices,
    distribution,
    has_initial_state,
    *,
    kernel_size,
):
    """As `ragged_conv1d_mixed_prefill` for rows of one token each: token i is row i, as there, whatever the offsets say."""
    starts = _single(query_start_loc.shape[0])
    rows = conv_bias, starts, state_indices, distribution, has_initial_state
    return ragged_conv1d.__wrapped__(x, conv_state, conv_weight, *rows, kernel_size=kernel_size)


def ragged_causal_conv1d(
    x,
    conv_state,
    conv_weight,
    conv_bias,
    query_start_loc,
    state_indices,
    distribution,
    has_initial_state,
    *,
    kernel_size,
    tile_size=64,
):
    """As `ragged_conv1d`; `tile_size` (tokens a block, at least 1) is left to this library, results do not depend on it.

    x is not donated.
    """
    if operator.index(tile_size) < 1:
        raise ValueError(f"tile_size: expected at least 1, got {tile_size}")
    rows = conv_bias, query_start_loc, state_indices, distribution, has_initial_state
    return ragged_conv1d(x, conv_state, conv_weight, *rows, kernel_size=kernel_size)
