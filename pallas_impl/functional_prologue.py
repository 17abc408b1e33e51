"""The differentiable forms of the prologue and of the gated short convolution, for training."""

import functools
from collections.abc import Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from oracle.contract import ConvOutput, normalised
from oracle.contract_prologue import (
    GatedConvCall,
    GatedConvFnCall,
    PrologueCall,
    PrologueFnCall,
    PrologueOutput,
)
from pallas_impl import parts, plain, prologue_backward
from pallas_impl.call import resolve, run_gated, run_prologue
from pallas_impl.tracing import refuse_transforms, vary_alike


def gated_delta_prologue(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    initial_states: ArrayLike | None = None,
    query_start_loc: ArrayLike | None = None,
    *,
    num_k_heads: SupportsIndex,
    num_v_heads: SupportsIndex,
    head_k_dim: SupportsIndex,
    head_v_dim: SupportsIndex,
    a: ArrayLike | None = None,
    b: ArrayLike | None = None,
    A_log: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    qk_l2norm: bool = True,
    norm_eps: float = 1e-6,
    q_scale: float = 1.0,
    lower_bound: float | None = None,
    norm_rounding: str = "storage",
    beta_rounding: str = "none",
    activation: str | None = "silu",
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> PrologueOutput:
    """The front of a gated delta rule layer for training: `causal_conv1d`, split, norm of heads, gates.

    The value is that of `gated_delta_prologue_fn`. Reverse-mode derivatives of first order, in x, weight, bias,
    initial_states, a, b, A_log and dt_bias, through every result; a rounding inside counts as the identity. The backward
    pass computes the convolution again, and keeps nothing but the inputs. The keyword arguments that are no arrays are
    static.

    Args:
      x, weight, bias, initial_states, query_start_loc: as in `causal_conv1d`, the weight's channels as in
        `gated_delta_prologue_fn`.
      num_k_heads, to beta_rounding: as in `gated_delta_prologue_fn`, the leading axes of a and b those of x.
      activation, to backend: as in `causal_conv1d`.

    Returns:
      PrologueOutput(q, k, v, g, beta, conv_states) as of `gated_delta_prologue_fn`, with the leading axes of x;
      `conv_states` as of `causal_conv1d`.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.PrologueCall`; Unsupported: as `causal_conv1d`; an array that is
        split over a mesh outside `jax.shard_map`.
    """
    call = PrologueCall(
        x, weight, bias, initial_states, query_start_loc, num_k_heads, num_v_heads, head_k_dim, head_v_dim,
        a, b, A_log, dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound, norm_rounding, beta_rounding,
        activation, max_seqlen, schedule, backend,
    )  # fmt: skip
    call.check()
    return _run_front(normalised(call)._replace(backend=resolve(backend, x)))


def gated_short_conv(
    bcx: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    initial_states: ArrayLike | None = None,
    query_start_loc: ArrayLike | None = None,
    *,
    channel_offsets: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> ConvOutput:
    """LFM2's gated convolution for training: C * conv(B * x), of three slices of one projection.

    The value is that of `gated_short_conv_fn`. Reverse-mode derivatives of first order, in bcx, weight, bias and
    initial_states, through both results; a rounding inside counts as the identity.

    Args:
      bcx: [tokens, channels] with `query_start_loc`, or [batch, seqlen, channels] without; the three dtypes.
      weight, bias, initial_states, query_start_loc: as in `causal_conv1d`, for u = B * x.
      channel_offsets: as in `gated_short_conv_fn`.
      activation, to backend: as in `causal_conv1d`.

    Returns:
      ConvOutput(out, conv_states): `out` with dim channels for those of `bcx`, zero for tokens past `query_start_loc[-1]`;
      `conv_states` as of `causal_conv1d`, of u.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.GatedConvCall`; Unsupported: as `gated_delta_prologue`.
    """
    call = GatedConvCall(
        bcx,
        weight,
        bias,
        initial_states,
        query_start_loc,
        channel_offsets,
        activation,
        max_seqlen,
        schedule,
        backend,
    )
    call.check()
    return _run_front(normalised(call)._replace(backend=resolve(backend, bcx)))


def _run_front(call):
    arrays = {name: getattr(call, name) for name in call.ARRAYS}
    static = call._replace(**dict.fromkeys(call.ARRAYS))
    if parts.places_of(call) is not None:
        parts.run_parts(_run_front, call, parts.places_of(call), {}, ())
    return _front_program(static, arrays)


@functools.partial(jax.jit, static_argnums=0)
def _front_program(static, arrays):
    names = tuple(arrays)
    return _front(static, dict(zip(names, vary_alike(*arrays.values()), strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _front(static, arrays):
    if static.backend != "xla":
        arrays = dict(zip(arrays, refuse_transforms(*arrays.values()), strict=True))
    call = static._replace(**arrays)
    packed = _packed_front(call)
    found = run_prologue(packed) if isinstance(call, PrologueCall) else run_gated(packed)
    leading = (call.x if isinstance(call, PrologueCall) else call.bcx).shape[:-1]
    *tokens, states = found
    return type(found)(*(None if a is None else a.reshape(*leading, *a.shape[1:]) for a in tokens), states)


def _packed_front(call):
    """The `PrologueFnCall` or `GatedConvFnCall` of packed rows, each with a state of its own."""
    is_prologue = isinstance(call, PrologueCall)
    record = PrologueFnCall if is_prologue else GatedConvFnCall
    of_tokens = ("x", "a", "b") if is_prologue else ("bcx",)
    given = {name: getattr(call, name) for name in record._fields if name in call._fields}
    x = given[of_tokens[0]]
    starts, longest = call.query_start_loc, call.max_seqlen
    if starts is None:
        batch, longest = x.shape[:2]
        starts = plain.equal_rows(batch, batch * longest)
        packed = {name: given[name] for name in of_tokens if given[name] is not None}
        given |= {name: array.reshape(-1, *array.shape[2:]) for name, array in packed.items()}
    batch, (dim, width) = starts.shape[0] - 1, call.weight.shape
    pool, has_state = call.initial_states, jnp.ones((batch,), bool)
    if pool is None:
        pool, has_state = jnp.zeros((batch, width - 1, dim), x.dtype), None
    given |= dict(query_start_loc=starts, max_seqlen=longest, conv_states=pool, has_initial_state=has_state)
    return record(**given)


def _keep_front(static, arrays):
    values = {name: None if array is None else array.value for name, array in arrays.items()}
    return _front(static, values), values


def _differentiate_front(static, arrays, upstream):
    # What no loss depends on comes as a symbolic zero.
    upstream = [None if isinstance(a, jax.custom_derivatives.SymbolicZero) else a for a in upstream]
    call = static._replace(**arrays)
    packed = _packed_front(call)
    given = packed._replace(conv_states=call.initial_states, has_initial_state=None)
    *tokens, dfinal = upstream
    axes = 1 if call.query_start_loc is not None else 2
    tokens = [None if a is None else a.reshape(-1, *a.shape[axes:]) for a in tokens]
    is_prologue = isinstance(call, PrologueCall)
    gradients_of = prologue_backward.prologue if is_prologue else prologue_backward.gated
    found = gradients_of(given, (*tokens, dfinal))
    found["initial_states"] = found.pop("conv_states")
    result = dict.fromkeys(arrays)
    for name, gradient in found.items():
        if arrays[name] is not None:
            result[name] = gradient.reshape(arrays[name].shape)
    return (result,)


_front.defvjp(_keep_front, _differentiate_front, symbolic_zeros=True)
