"""The differentiable form for training: a pure function with gradients through both results."""

import functools
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from oracle.contract import ConvOutput, RowsCall, normalised
from pallas_impl import api, backward, plain
from pallas_impl.call import resolve
from pallas_impl.tracing import refuse_transforms, vary_alike


def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    initial_states: ArrayLike | None = None,
    query_start_loc: ArrayLike | None = None,
    *,
    activation: str | None = None,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> ConvOutput:
    """Causal depthwise convolution of packed or dense rows, for training.

    The value is that of `causal_conv1d_fn`, in which each row has a state of its own. Reverse-mode derivatives of first
    order, in x, weight, bias and initial_states, through `out` and through the final states; they are summed
    in float32 and rounded once, and the forward pass keeps nothing for them but its inputs. Works under
    `jax.jit` and `jax.checkpoint`, with backend "xla" also under `jax.vmap`; for the kernels a batch belongs into
    x's first axis or into packed rows. The keyword arguments are static.

    Args:
      x: [tokens, dim] with `query_start_loc`, or [batch, seqlen, dim] without; float32, float16 or bfloat16.
      weight: [dim, width], any of the three dtypes; width 1 to 8; `weight[:, width-1]` meets the newest token.
      bias: [dim], any of the three dtypes, or None.
      initial_states: [batch, width-1, dim], any of the three dtypes, oldest input first; None: zeros.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; may end before `tokens`.
      activation: None, "silu" or "swish".
      max_seqlen: host int, an upper bound of the longest row in tokens; lets "auto" pick the per_sequence grid.
      schedule: "auto", "per_sequence" or "flat"; both give the same bits.
      backend: "auto", "mosaic_gpu", "mosaic_gpu_interpret" or "xla", as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` in x's shape and dtype, zero for tokens past `query_start_loc[-1]`;
      `conv_states` [batch, width-1, dim], the last inputs of each row behind its initial state, in the
      dtype of `initial_states`, or of x without them.

    Raises:
      ValueError, TypeError: as `oracle.contract.RowsCall`.
      Unsupported: the backend asked for cannot run here; a kernel under `jax.vmap` or differentiated twice.
    """
    call = RowsCall(
        x, weight, bias, initial_states, query_start_loc, activation, max_seqlen, schedule, backend
    )
    sizes, call = call.check(), normalised(call)
    longest = x.shape[1] if query_start_loc is None else call.max_seqlen
    options = activation, longest, schedule, resolve(backend, x)
    return ConvOutput(*_run(options, sizes.batch, x, weight, bias, initial_states, query_start_loc))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(options, batch, x, weight, bias, initial_states, query_start_loc):
    """As a program, also outside jit: then no constant of it is copied to the device in every call."""
    if query_start_loc is None and options[-1] == "xla":
        return plain.dense(options[0] is not None, *vary_alike(x, weight, bias, initial_states), None)
    rows = x.reshape(-1, x.shape[-1])
    if query_start_loc is None:
        query_start_loc = plain.equal_rows(batch, rows.shape[0])
    out, states = _convolve(options, *vary_alike(rows, weight, bias, initial_states, query_start_loc))
    return out.reshape(x.shape), states


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, x, weight, bias, initial_states, query_start_loc):
    activation, max_seqlen, schedule, backend = options
    batch, width = query_start_loc.shape[0] - 1, weight.shape[1]

    if backend != "xla":
        x, weight, bias, initial_states = refuse_transforms(x, weight, bias, initial_states)
    pool, has_state = initial_states, jnp.ones((batch,), bool)
    if initial_states is None:  # rows of zero tokens keep their zeros
        pool, has_state = jnp.zeros((batch, width - 1, x.shape[1]), x.dtype), None
    return tuple(
        api.causal_conv1d_fn(
            x, weight, bias, pool, query_start_loc, None, has_state,
            activation=activation, max_seqlen=max_seqlen, schedule=schedule, backend=backend,
        )
    )  # fmt: skip


def _keep_inputs(options, *primals):
    inputs = tuple(None if primal is None else primal.value for primal in primals)
    return _convolve(options, *inputs), inputs


_convolve.defvjp(_keep_inputs, backward.differentiate, symbolic_zeros=True)
