"""The differentiable form for training: a pure function with gradients through both results."""

import functools
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from oracle.contract import ConvOutput, FnCall, RowsCall, normalised
from pallas_impl import backward, parts, plain
from pallas_impl.call import resolve, run_prefill
from pallas_impl.parts import BATCH, CHANNELS
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
    call.check()
    return _run_call(normalised(call)._replace(backend=resolve(backend, x)))


def _run_call(call):
    """Runs a checked call, on every device's own part where its arrays are split by rows or channels."""
    if (places := parts.places_of(call)) is not None:
        roles = _roles(call)
        found = parts.run_parts(_run_call, call, places, roles, (roles["x"], roles["initial_states"]))
        if found is not None:
            return ConvOutput(*found)
    return ConvOutput(*_run(*call))


def _roles(call):
    """What each axis of the arrays of a `RowsCall` or of its gradients is, for `parts`."""
    rows = BATCH if call.query_start_loc is None else None
    states = rows, None, CHANNELS
    x = states if rows else (None, CHANNELS)
    taps = {"weight": (CHANNELS, None), "bias": (CHANNELS,)}
    return {"x": x, "dout": x, "initial_states": states, "dfinal": states, **taps}


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _run(x, weight, bias, initial_states, query_start_loc, *options):
    """As a program, also outside jit: then no constant of it is copied to the device in every call."""
    if query_start_loc is None and options[-1] == "xla":
        return plain.dense(options[0] is not None, *vary_alike(x, weight, bias, initial_states), None)
    return _convolve(options, *vary_alike(x, weight, bias, initial_states, query_start_loc))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, x, weight, bias, initial_states, query_start_loc):
    if options[-1] != "xla":
        x, weight, bias, initial_states = refuse_transforms(x, weight, bias, initial_states)
    call = RowsCall(x, weight, bias, initial_states, query_start_loc, *options)
    if parts.compiler_splits(call.backend, x):
        roles = _roles(call)
        return parts.partitioned(_forward, call, roles, (roles["x"], roles["initial_states"]))
    return _forward(call)


def _forward(call):
    x, starts, longest = _packed(call)
    batch, width = starts.shape[0] - 1, call.weight.shape[1]
    pool, has_state = call.initial_states, jnp.ones((batch,), bool)
    if pool is None:  # rows of zero tokens keep their zeros
        pool, has_state = jnp.zeros((batch, width - 1, x.shape[1]), x.dtype), None
    rows = FnCall(x, call.weight, call.bias, pool, starts, None, has_state)
    out, states = run_prefill(
        rows._replace(
            activation=call.activation, max_seqlen=longest, schedule=call.schedule, backend=call.backend
        )
    )
    return out.reshape(call.x.shape), states


def _packed(call):
    """(x [tokens, dim], its offsets, a bound of the longest row)."""
    if call.query_start_loc is not None:
        return call.x, call.query_start_loc, call.max_seqlen
    x = call.x.reshape(-1, call.x.shape[-1])
    return x, plain.equal_rows(call.x.shape[0], x.shape[0]), call.x.shape[1]


def _keep_inputs(options, *primals):
    inputs = tuple(None if primal is None else primal.value for primal in primals)
    return _convolve(options, *inputs), inputs


class _Gradients(NamedTuple):
    """A `RowsCall` with the gradients of its results, None where no loss depends on one."""

    x: Any
    weight: Any
    bias: Any
    initial_states: Any
    query_start_loc: Any
    dout: Any
    dfinal: Any
    options: tuple

    max_seqlen = property(lambda self: self.options[1])
    ARRAYS = "x", "weight", "bias", "initial_states", "query_start_loc", "dout", "dfinal"


def _differentiate(options, inputs, upstream):
    # What no loss depends on comes as a symbolic zero.
    upstream = [None if isinstance(a, jax.custom_derivatives.SymbolicZero) else a for a in upstream]
    call = _Gradients(*inputs, *upstream, options)
    if not parts.compiler_splits(options[-1], call.x):
        return (*_backward(call), None)
    # Float32 copies of weight and bias, which change no product, so that the sums over devices are rounded once.
    weight, bias = call.weight, call.bias
    precise = call._replace(weight=weight.astype(jnp.float32))
    if bias is not None:
        precise = precise._replace(bias=bias.astype(jnp.float32))
    roles = _roles(call)
    names = [name for name in call.ARRAYS[:4] if getattr(call, name) is not None]
    sums = [names.index(name) for name in ("weight", "bias") if name in names]
    dx, dweight, dbias, dinitial = parts.partitioned(
        _backward, precise, roles, tuple(roles[name] for name in names), sums
    )
    return (
        dx,
        dweight.astype(weight.dtype),
        None if bias is None else dbias.astype(bias.dtype),
        dinitial,
        None,
    )


def _backward(call):
    activation, _, schedule, backend = call.options
    x, starts, longest = _packed(call)
    dout = None if call.dout is None else call.dout.reshape(x.shape)
    inputs = x, call.weight, call.bias, call.initial_states, starts
    dx, *others, _ = backward.differentiate(
        (activation, longest, schedule, backend), inputs, (dout, call.dfinal)
    )
    return dx.reshape(call.x.shape), *others


_convolve.defvjp(_keep_inputs, _differentiate, symbolic_zeros=True)
