"""The prologue of the gated delta rule without a kernel of its own: the plain operation, and what stands behind it."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from oracle.contract_prologue import PrologueOutput, PrologueWindowOutput
from pallas_impl import plain
from pallas_impl.records import Heads


def heads_of(call):
    """The `Heads` of a checked call."""
    return Heads(
        call.num_k_heads,
        call.num_v_heads,
        call.head_k_dim,
        call.head_v_dim,
        call.qk_l2norm,
        float(np.float32(call.norm_eps)),
        float(np.float32(call.q_scale)),
        call.norm_rounding == "storage",
        None if call.lower_bound is None else float(np.float32(call.lower_bound)),
        call.beta_rounding == "storage",
    )


def leaves(call):
    """How many arrays its result has."""
    gates = (call.a is not None) + (call.b is not None)
    return 3 + gates + (call.conv_states is not None) + (getattr(call, "window_out", None) is not None)


def output(call, parts, pool, windows):
    """The result of a call of q, k, v and the gates that it has, each [..., channels]."""
    q, k, v, *gates = parts
    leading, found = call.x.shape[:-1], {}
    if call.a is not None:
        found["g"] = gates.pop(0).reshape(call.a.shape)
    if call.b is not None:
        found["beta"] = gates.pop(0).reshape(call.b.shape)
    of_k = (*leading, call.num_k_heads, call.head_k_dim)
    of_v = (*leading, call.num_v_heads, call.head_v_dim)
    results = (q.reshape(of_k), k.reshape(of_k), v.reshape(of_v), found.get("g"), found.get("beta"), pool)
    if getattr(call, "window_out", None) is None:
        return PrologueOutput(*results)
    return PrologueWindowOutput(*results, windows)


def composed(call, run, norm=None):
    """The result of a checked call from `run`, which runs the call of the plain operation inside.

    `norm(y, heads)`: makes q and k of y [tokens, dim], else jax.numpy does.
    """
    conv, dtype, heads = call.convolution(), call.x.dtype, heads_of(call)
    if not heads.storage and heads.changes:  # exact, and then nothing is rounded but what is stored here
        conv = conv._replace(x=conv.x.astype(jnp.float32))
    y, pool, *windows = run(conv)
    live = live_tokens(conv)
    gates = gates_of(call, heads, live)
    q, k, v = split_heads(plain.stored(y), heads, dtype, norm)
    if heads.q_scale < 0:
        q = plain.where_live(live, q)  # else a zero with a sign
    return output(call, (q, k, v, *gates), pool, windows[0] if windows else None)


def split_heads(y, heads, dtype, by_kernel=None):
    """q, k and v [..., channels] of what was convolved."""
    of_q, of_k, _ = heads.sizes
    q, k, v = jnp.split(y, (of_q, of_q + of_k), axis=-1)

    def norm(part, scale):
        values = part.astype(jnp.float32)
        if heads.norm:
            apart = values.reshape(*values.shape[:-1], heads.num_k_heads, heads.head_k_dim)
            values = normed(apart, heads.eps).reshape(values.shape)
        return (values if scale == 1.0 else values * scale).astype(dtype)

    if by_kernel is not None:
        q, k = (part.reshape(q.shape) for part in by_kernel(y.reshape(-1, y.shape[-1]), heads))
    elif heads.changes:
        q, k = norm(q, heads.q_scale), norm(k, 1.0)
    return q, k, v.astype(dtype)


def gates_of(call, heads, live):
    """(g, beta) of a call, those that it has, zeros where no row is `live`; what lies there meets no gradient."""
    found, read = [], lambda gate: plain.where_live(live, gate)
    if call.a is not None:
        found.append(decay(read(call.a).astype(jnp.float32), *parameters_of(call), heads.lower_bound))
    if call.b is not None:
        storage = call.b.dtype if heads.round_beta and call.b.dtype != jnp.float32 else None
        found.append(rate(read(call.b), storage))
    return [plain.where_live(live, gate) for gate in found]


def parameters_of(call):
    """(A_log, dt_bias or None) in float32, with the axes of `a`."""
    leading, channels = (1,) * (call.x.ndim - 1), (1,) * (call.a.ndim - call.x.ndim)
    A_log = call.A_log.astype(jnp.float32).reshape(*leading, -1, *channels)
    if call.dt_bias is None:
        return A_log, None
    return A_log, call.dt_bias.astype(jnp.float32).reshape(*leading, *call.dt_bias.shape)


def live_tokens(conv):
    """[...] as the leading axes of x: whether a token is computed, of a checked call of the plain operation."""
    leading, starts = conv.x.shape[:-1], conv.query_start_loc
    tokens = functools.reduce(operator.mul, leading)
    if starts is None:
        starts = plain.equal_rows(leading[0], tokens)
    else:
        starts = plain.offsets(starts, tokens)
    batch, live = starts.shape[0] - 1, True
    if batch == 0 or tokens == 0:
        return jnp.zeros(leading, bool)
    row, owner, _ = plain.locate(starts, tokens)
    if conv.conv_states is not None:
        slots = plain.live_slots(conv.cache_indices, batch, conv.conv_states.shape[0], conv.pad_slot_id)
        live = (slots >= 0)[owner]
    return ((row < batch) & live).reshape(leading)


# The sum of a head, and what it is divided by: plain.


def tree_sum(values):
    """The sum over the last axis, a power of two long: neighbours first, then neighbours of those."""
    while (size := values.shape[-1]) > 1:
        pairs = values.reshape(*values.shape[:-1], size // 2, 2)
        values = pairs[..., 0] + pairs[..., 1]
    return values[..., 0]


def rounded(value):
    """A float32 value that no compiler fuses with what is made of it: none does so across a choice."""
    return jnp.where(value == value, value, jnp.nan)


def normed(heads, eps):
    """heads * (1 / sqrt(sum of squares + eps)) of float32 [..., K]."""
    size = heads.shape[-1]
    squares = rounded(heads * heads)
    whole = 1 << (size - 1).bit_length()
    if whole != size:
        squares = jnp.pad(squares, [(0, 0)] * (heads.ndim - 1) + [(0, whole - size)])
    return heads * inverse_root(tree_sum(squares) + jnp.float32(eps))[..., None]


def inverse_root(total):
    """1 / sqrt(total) of normal float32, root and quotient each correctly rounded; differentiable.

    XLA's division is not exact on a GPU, nor need its root be: they are near, and integers say which neighbour is right.
    """
    near = 1.0 / jnp.sqrt(total)  # for its derivative
    fixed = lax.stop_gradient(total)
    root = exact_root(fixed, jnp.sqrt(fixed))
    return near + (exact_reciprocal(root, 1.0 / root) - lax.stop_gradient(near))  # both sums are exact


SIGNIFICAND = 1 << 23


def exact_root(value, near):
    """The float32 nearest to sqrt(value), a normal number, from one at most three units in the last place away.

    With M the significand of `value` as an integer, s that of its root and T = M * 2**23 or M * 2**24, whichever has an
    even exponent, s is right where -s < T - s * s <= s. That difference is small, and exact modulo 2**32.
    """
    bits = lax.bitcast_convert_type(value, jnp.int32)
    significand, exponent = (bits & (SIGNIFICAND - 1)) | SIGNIFICAND, bits >> 23
    base = (exponent + 127 >> 1 << 23) - SIGNIFICAND
    root = lax.bitcast_convert_type(near, jnp.int32) - base
    target = jnp.where(exponent % 2 == 1, significand << 23, significand << 24)
    for _ in range(3):
        rest = target - root * root
        root = root + (rest > root).astype(jnp.int32) - (rest <= -root).astype(jnp.int32)
    return jnp.where(jnp.isfinite(value), lax.bitcast_convert_type(base + root, jnp.float32), near)


def exact_reciprocal(value, near):
    """The float32 nearest to 1 / value, both normal numbers, from one at most three units in the last place away.

    With m the significand of `value` as an integer, q that of its reciprocal is right where 2**47 - q * m is within m / 2
    of zero; modulo 2**32 it is -q * m.
    """
    bits = lax.bitcast_convert_type(value, jnp.int32)
    significand = (bits & (SIGNIFICAND - 1)) | SIGNIFICAND
    base = (253 - (bits >> 23) << 23) - SIGNIFICAND
    quotient = lax.bitcast_convert_type(near, jnp.int32) - base
    for _ in range(3):
        twice = -2 * (quotient * significand)
        more = (twice > significand).astype(jnp.int32) - (twice < -significand).astype(jnp.int32)
        quotient = quotient + more
    return jnp.where(jnp.isfinite(value), lax.bitcast_convert_type(base + quotient, jnp.float32), near)


def finished(row, scale, heads):
    """A row of channels of whole heads, normed and scaled."""
    if heads.norm:
        row = normed(row.reshape(-1, heads.head_k_dim), heads.eps).reshape(row.shape)
    return row if heads.q_scale == 1.0 else row * scale


@jax.custom_jvp
def sigmoid(z):
    return 1.0 / (1.0 + jnp.exp(-z))


@sigmoid.defjvp
def _sigmoid_tangent(primals, tangents):
    """Of exp(-z) itself, infinite for a large argument, it would be a NaN."""
    return sigmoid(*primals), sigmoid_slope(*primals) * tangents[0]


def sigmoid_slope(z):
    return sigmoid(z) * sigmoid(-z)


def softplus(z):
    return jnp.where(z > 20.0, z, jnp.log1p(jnp.exp(jnp.where(z > 20.0, 0.0, z))))


def decay(value, A_log, dt_bias, lower_bound):
    """g of float32 values."""
    z = value if dt_bias is None else value + dt_bias
    if lower_bound is None:
        return -jnp.exp(A_log) * softplus(z)
    return lower_bound * sigmoid(jnp.exp(A_log) * z)


def rate(value, storage):
    """beta of b's values; rounded to the dtype `storage`, if there is one."""
    found = sigmoid(value.astype(jnp.float32))
    return found if storage is None else stored(found, storage)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def stored(value, dtype):
    """Float32 values in [0, 1] as a dtype holds them; XLA may leave out a conversion there and back."""
    kind = jnp.finfo(dtype)
    near = lax.reduce_precision(value, kind.nexp, kind.nmant)
    if kind.nexp == 8:
        return near
    # below the normal values, which reduce_precision has as zero
    steps = float(1 << (kind.nmant - kind.minexp))
    return jnp.where(value < kind.smallest_normal, jnp.round(value * steps) / steps, near)


@stored.defjvp
def _stored_tangent(dtype, primals, tangents):
    return stored(*primals, dtype), tangents[0]
