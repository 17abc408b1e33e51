"""What the layers of both libraries share: sizes, parameters, and the call itself."""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from oracle.contract import ACTIVATIONS, WIDTH_MAX, WIDTH_MIN, ConvOutput
from pallas_impl import plain
from pallas_impl.api import causal_conv1d_fn, causal_conv1d_update
from pallas_impl.functional import causal_conv1d
from pallas_impl.tracing import all_of, program

LAYOUTS = ("dim_width", "torch", "flax")


def load_weight(
    weight: ArrayLike, *, dim: int | None = None, width: int | None = None, layout: str | None = None
) -> Array:
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


def host_integer(name, value):
    """`value` as an int.

    Raises:
      TypeError: it is no integer.
    """
    try:
        if isinstance(value, bool | jax.Array):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def check_layer(dim, width, activation):
    """Returns dim and width as ints, or raises TypeError or ValueError."""
    dim, width = host_integer("dim", dim), host_integer("width", width)
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    if not WIDTH_MIN <= width <= WIDTH_MAX:
        raise ValueError(f"width: expected {WIDTH_MIN} to {WIDTH_MAX}, got {width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    return dim, width


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


@functools.partial(program, static_argnums=(0, 1))
def _starts(batch, seqlen):
    return plain.equal_rows(batch, batch * seqlen)


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
    decode,
    backend,
    options,
):
    """The `__call__` of both layers; `options`: further arguments of the operation that runs."""
    options = options | dict(activation=activation, backend=backend)
    if decode:
        if has_initial_state is not None:
            raise ValueError(
                f"has_initial_state: expected None with decode, got {type(has_initial_state).__name__}"
            )
        return causal_conv1d_update(
            x, weight, bias, conv_states, cache_indices, query_start_loc=query_start_loc, **options
        )
    shape = x.shape
    if query_start_loc is None and len(shape) != 3:
        raise ValueError(f"x: expected shape [batch, seqlen, dim] without query_start_loc, got {list(shape)}")
    further = {name for name, value in options.items() if value is not None}
    if conv_states is None and further <= {"activation", "backend", "max_seqlen", "schedule"}:
        out = causal_conv1d(x, weight, bias, query_start_loc=query_start_loc, **options).out
        return ConvOutput(out, None)
    if query_start_loc is None:
        batch, seqlen, dim = shape
        query_start_loc = _starts(batch, seqlen)
        x, options["max_seqlen"] = x.reshape(batch * seqlen, dim), seqlen
    if conv_states is not None and has_initial_state is None:  # a cache that is given is read
        has_initial_state = all_of(query_start_loc.shape[0] - 1)
    out, conv_states = causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, **options
    )
    if isinstance(out, tuple):
        return ConvOutput(tuple(part.reshape(*shape[:-1], part.shape[-1]) for part in out), conv_states)
    return ConvOutput(out.reshape(*shape[:-1], out.shape[-1]), conv_states)
