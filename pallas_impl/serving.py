"""Calls with serving arguments: the second path of both operations, beside the plain one in `api`."""

import functools

import jax
import jax.numpy as jnp

from pallas_impl import xla, xla_serving


@functools.partial(jax.jit, static_argnames=("options", "config", "interpret"))
def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, arrays, *, options, config, interpret
):
    """A packed prefill with any of `arrays` and `options`. Returns (out, conv_states)."""
    starts = xla.offsets(query_start_loc, x.shape[0])
    out, pool, _ = xla_serving.run(
        x, weight, bias, conv_states, starts, cache_indices, arrays, options
    )
    return out, pool


@functools.partial(jax.jit, static_argnames=("options", "config", "interpret"))
def update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, arrays, *, options, config, interpret
):
    """A decode step with any of `arrays` and `options`. Returns (out, conv_states, window_out)."""
    channels, shape = x.shape[-1], x.shape[:-1]
    rows = x.reshape(-1, channels)
    if query_start_loc is None:
        seqlen = 1 if len(shape) == 1 else shape[1]
        starts = jnp.arange(shape[0] + 1, dtype=jnp.int32) * seqlen
    else:
        starts = xla.offsets(query_start_loc, rows.shape[0])
    if xla.WIDENS_SCATTERS:  # see xla.update
        rows = jax.lax.optimization_barrier(rows)
    out, pool, windows = xla_serving.run(
        rows, weight, bias, conv_states, starts, cache_indices, arrays, options
    )
    reshape = lambda out: out.reshape(*shape, out.shape[-1])  # noqa: E731
    return jax.tree.map(reshape, out), pool, windows
