"""What the layers of both libraries share: sizes, parameters, and the call itself."""

import math
import operator

import jax
import jax.numpy as jnp

from oracle.contract import ACTIVATIONS, WIDTH_MAX, WIDTH_MIN, ConvOutput
from pallas_impl.api import causal_conv1d_fn, causal_conv1d_update

LAYOUTS = ("dim_width", "torch", "flax")


def load_weight(weight, *, dim=None, width=None, layout=None):
    """A checkpoint's weight as [dim, width]; done once, when it is loaded.

    Args:
      weight: [dim, width], [dim, 1, width] as torch.nn.Conv1d has it, or [width, 1, dim] as flax.linen.Conv and
        nnx.Conv have it; a NumPy or JAX array.
      dim, width: sizes it must have, or None.
      layout: "dim_width", "torch" or "flax"; None: by the shape, which tells unless [n, 1, m] fits both ways
        (n and m at most 8, and `dim` and `width` do not decide).

    Raises:
      ValueError: the shape fits no layout, or more than one.
    """
    shape = tuple(weight.shape)
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected None or one of {LAYOUTS}, got {layout!r}")
    readings = {"dim_width": shape} if len(shape) == 2 else {}
    if len(shape) == 3 and shape[1] == 1:
        readings = {"torch": (shape[0], shape[2]), "flax": (shape[2], shape[0])}
    fits = [
        name
        for name, (d, w) in readings.items()
        if layout in (None, name) and dim in (None, d) and width in (None, w) and WIDTH_MIN <= w <= WIDTH_MAX
    ]
    if not fits:
        wanted = {"dim": dim, "width": width, "layout": layout}
        known = ", ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
        raise ValueError(
            "weight: expected shape [dim, width], [dim, 1, width] or [width, 1, dim] with width "
            f"{WIDTH_MIN} to {WIDTH_MAX}{f' and {known}' if known else ''}, got {list(shape)}"
        )
    if len(fits) > 1:
        raise ValueError(
            f"layout: expected 'torch' or 'flax' for a weight of shape {list(shape)}, which fits both, got None"
        )
    weight = jnp.asarray(weight)
    return {"dim_width": lambda: weight, "torch": lambda: weight[:, 0], "flax": lambda: weight[:, 0].T}[
        fits[0]
    ]()


def check_layer(dim, width, activation):
    """Returns dim and width as ints, or raises ValueError."""
    if operator.index(dim) < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    if not WIDTH_MIN <= operator.index(width) <= WIDTH_MAX:
        raise ValueError(f"width: expected {WIDTH_MIN} to {WIDTH_MAX}, got {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    return operator.index(dim), operator.index(width)


def check_bias(bias, dim):
    """The bias [dim] as a JAX array, or None."""
    if bias is None:
        return None
    if tuple(bias.shape) != (dim,):
        raise ValueError(f"bias: expected shape [dim={dim}], got {list(bias.shape)}")
    return jnp.asarray(bias)


def draw_parameters(key, dim, width, use_bias, dtype):
    """(weight, bias): uniform within 1/sqrt(width), as torch.nn.Conv1d draws them."""
    bound = 1 / math.sqrt(width)
    keys = jax.random.split(key)
    weight = jax.random.uniform(keys[0], (dim, width), dtype, -bound, bound)
    return weight, jax.random.uniform(keys[1], (dim,), dtype, -bound, bound) if use_bias else None


def call_layer(
    weight,
    bias,
    x,
    query_start_loc,
    conv_states,
    cache_indices,
    has_initial_state,
    *,
    activation,
    pad_slot_id,
    max_seqlen,
    decode,
    backend,
):
    """The `__call__` of both layers."""
    options = dict(activation=activation, pad_slot_id=pad_slot_id, backend=backend)
    if decode:
        for name, value in (("query_start_loc", query_start_loc), ("has_initial_state", has_initial_state)):
            if value is not None:
                raise ValueError(f"{name}: expected None with decode, got {type(value).__name__}")
        return causal_conv1d_update(x, weight, bias, conv_states, cache_indices, **options)
    shape = x.shape
    if query_start_loc is None:
        if len(shape) != 3:
            raise ValueError(
                f"x: expected shape [batch, seqlen, dim] without query_start_loc, got {list(shape)}"
            )
        batch, seqlen, dim = shape
        query_start_loc = jnp.arange(batch + 1, dtype=jnp.int32) * seqlen
        x, max_seqlen = x.reshape(batch * seqlen, dim), seqlen
    out, conv_states = causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        max_seqlen=max_seqlen, **options,
    )  # fmt: skip
    return ConvOutput(out.reshape(shape), conv_states)
