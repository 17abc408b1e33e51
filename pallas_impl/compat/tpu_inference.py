"""The ragged convolutions of tpu-inference, with its parameters and layouts; no activation, which its callers apply.

As there, a row of zero tokens without a state zeroes its slot. What differs, on purpose: sums are float32 with one
rounding at the end; has_initial_state counts in batches of single tokens too; padding rows touch no slot, and their
tokens give zeros.
"""

import functools
import operator

import jax
import jax.numpy as jnp

from pallas_impl.api import causal_conv1d_fn


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
    batch = query_start_loc.shape[0] - 1
    slots = state_indices[:batch]
    slots = jnp.where(jnp.arange(slots.shape[0]) < distribution[2], slots, -1)
    result = causal_conv1d_fn(
        x, conv_weight[:, 0], conv_bias, conv_state, query_start_loc, slots, has_initial_state[:batch],
        empty_rows="apply",
    )  # fmt: skip
    return tuple(result)


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
    return ragged_conv1d(
        x, conv_state, conv_weight, conv_bias, query_start_loc, state_indices, distribution, has_initial_state,
        kernel_size=kernel_size,
    )  # fmt: skip
