"""Gradients of the prologue of the gated delta rule and of the gated short convolution.

The convolution is computed again and differentiated by `backward`; XLA computes what lies behind it, and in front. A
rounding inside counts as the identity, and gradients are float32 up to the one rounding of each result.
"""

import jax.numpy as jnp

from oracle.contract import FnCall
from pallas_impl import plain
from pallas_impl.backward import differentiate
from pallas_impl.call import run_prefill
from pallas_impl.gated_conv import offsets, slices
from pallas_impl.plain_prologue import (
    heads_of,
    parameters_of,
    rounded,
    sigmoid,
    sigmoid_slope,
    softplus,
    tree_sum,
)


def prologue(call, upstream):
    """The gradients of a checked `PrologueFnCall` without slots, `conv_states` being the rows' own.

    Args:
      call: the packed call; `conv_states` may be None.
      upstream: the gradients of the six results, None where no loss depends on one.

    Returns:
      {name: gradient} of x, weight, bias, conv_states, a, b, A_log and dt_bias; None for those that are None.
    """
    dq, dk, dv, dg, dbeta, dfinal = upstream
    heads, tokens = heads_of(call), call.x.shape[0]
    live = jnp.arange(tokens) < plain.offsets(call.query_start_loc, tokens)[-1]
    stored = heads.storage or not heads.changes
    y = _convolved(call, call.x if stored else call.x.astype(jnp.float32))
    of_q, of_k, _ = heads.sizes
    q, k, v = jnp.split(y, (of_q, of_q + of_k), axis=1)
    parts = (
        _norm_gradient(q, dq, heads, heads.q_scale),
        _norm_gradient(k, dk, heads, 1.0),
        jnp.zeros(v.shape, jnp.float32) if dv is None else dv.reshape(v.shape).astype(jnp.float32),
    )
    dy = plain.where_live(live, jnp.concatenate(parts, axis=1))
    return _convolution(call, call.x, dy, dfinal) | _gates(call, heads, live, dg, dbeta)


def _convolved(call, x):
    """What the convolution of a call stores, for this x."""
    starts, pool = call.query_start_loc, call.conv_states
    has_state = None if pool is None else jnp.ones((starts.shape[0] - 1,), bool)
    conv = FnCall(x, call.weight, call.bias, pool, starts, None, has_state)
    options = dict(activation=call.activation, max_seqlen=call.max_seqlen)
    return run_prefill(conv._replace(**options, schedule=call.schedule, backend=call.backend)).out


def _convolution(call, x, dy, dfinal):
    names = "x", "weight", "bias", "conv_states", "query_start_loc"
    options = call.activation, call.max_seqlen, call.schedule, call.backend
    inputs = x, call.weight, call.bias, call.conv_states, call.query_start_loc
    return dict(zip(names[:4], differentiate(options, inputs, (dy, dfinal)), strict=False))


def _norm_gradient(y, upstream, heads, scale):
    """The gradient of y [tokens, channels] through norm and scale."""
    if upstream is None:
        return jnp.zeros(y.shape, jnp.float32)
    dn = upstream.reshape(y.shape).astype(jnp.float32) * jnp.float32(scale)
    if not heads.norm:
        return dn
    shape, apart = y.shape, (y.shape[0], heads.num_k_heads, heads.head_k_dim)
    y, dn = y.astype(jnp.float32).reshape(apart), dn.reshape(apart)
    size = heads.head_k_dim
    padding = [(0, 0), (0, 0), (0, (1 << (size - 1).bit_length()) - size)]
    total = tree_sum(jnp.pad(rounded(y * y), padding))[..., None]
    r = 1.0 / jnp.sqrt(total + jnp.float32(heads.eps))
    along = (dn * (y * r)).sum(-1, keepdims=True)
    return (r * (dn - (y * r) * along)).reshape(shape)


def _gates(call, heads, live, dg, dbeta):
    found = dict.fromkeys(("a", "b", "A_log", "dt_bias"))
    if call.a is not None:
        dg = jnp.zeros(call.a.shape, jnp.float32) if dg is None else plain.where_live(live, dg)
        a, (A_log, dt_bias) = plain.where_live(live, call.a.astype(jnp.float32)), parameters_of(call)
        z = a if dt_bias is None else a + dt_bias
        scale = jnp.exp(A_log)
        if heads.lower_bound is None:
            dz = -dg * scale * jnp.where(z > 20.0, 1.0, sigmoid(z))
            dA_log = -dg * scale * softplus(z)
        else:
            t = scale * z
            dt = dg * heads.lower_bound * sigmoid_slope(t)
            dz, dA_log = dt * scale, dt * t
        found["a"] = dz.astype(call.a.dtype)
        found["A_log"] = dA_log.sum((0, *range(2, a.ndim))).astype(call.A_log.dtype)
        if call.dt_bias is not None:
            found["dt_bias"] = dz.sum(0).astype(call.dt_bias.dtype)
    if call.b is not None:
        b = plain.where_live(live, call.b.astype(jnp.float32))
        db = jnp.zeros_like(b) if dbeta is None else plain.where_live(live, dbeta)
        found["b"] = (db * sigmoid_slope(b)).astype(call.b.dtype)
    return found


def gated(call, upstream):
    """The gradients of a checked `GatedConvFnCall` without slots, by name: bcx, weight, bias and conv_states."""
    dout, dfinal = upstream
    bcx, tokens = call.bcx, call.bcx.shape[0]
    live = jnp.arange(tokens) < plain.offsets(call.query_start_loc, tokens)[-1]
    gate_in, gate_out, x = slices(call)
    u = plain.stored(gate_in * x)
    c = _convolved(call, u)
    wide = lambda array: plain.where_live(live, array.astype(jnp.float32))  # noqa: E731
    dout = jnp.zeros(x.shape, jnp.float32) if dout is None else wide(dout)
    found = _convolution(call, u.astype(jnp.float32), dout * wide(gate_out), dfinal)
    du = wide(found.pop("x"))
    dbcx = jnp.zeros(bcx.shape, jnp.float32)
    for first, part in zip(offsets(call), (du * wide(x), dout * wide(c), du * wide(gate_in)), strict=True):
        dbcx = dbcx.at[:, first : first + part.shape[1]].add(part)
    return found | {"bcx": dbcx.astype(bcx.dtype)}
