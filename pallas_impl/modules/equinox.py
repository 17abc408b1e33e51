"""The convolution as an Equinox module."""

from typing import Any, SupportsIndex

import equinox
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from pallas_impl.modules.layer import (
    call_layer,
    check_bias,
    check_layer,
    draw_parameters,
    host_integer,
    load_weight,
)
from pallas_impl.short_conv import AxisNames, short_conv


class CausalConv1d(equinox.Module):
    """Causal depthwise conv1d with optional SiLU, for training and inference.

    The pool of conv states is no part of the module: it goes in and comes out as a value, so that the caller can
    donate it, shard it, and share one between requests.

    Attributes:
      weight: [dim, width].
      bias: [dim], or None.
      activation: None, "silu" or "swish".
      backend: as in `pallas_impl.causal_conv1d_fn`.
    """

    weight: jax.Array
    bias: jax.Array | None
    activation: str | None = equinox.field(static=True)
    backend: str = equinox.field(static=True)

    def __init__(
        self,
        dim: SupportsIndex,
        width: SupportsIndex,
        *,
        use_bias: bool = True,
        activation: str | None = "silu",
        dtype: DTypeLike = jnp.float32,
        backend: str = "auto",
        key: Array,
    ) -> None:
        """Draws the parameters as torch.nn.Conv1d does.

        Args:
          dim: channels.
          width: taps, 1 to 8.
          use_bias: whether there is a bias.
          activation: None, "silu" or "swish".
          dtype: of weight and bias; the operations take any mix with x.
          backend: as in `pallas_impl.causal_conv1d_fn`.
          key: a JAX random key.
        """
        dim, width = check_layer(dim, width, activation)
        self.weight, self.bias = draw_parameters(key, dim, width, use_bias, dtype)
        self.activation, self.backend = activation, backend

    @classmethod
    def from_weights(
        cls,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        *,
        activation: str | None = "silu",
        layout: str | None = None,
        backend: str = "auto",
    ) -> "CausalConv1d":
        """A module with a checkpoint's parameters; see `pallas_impl.modules.load_weight` for shapes and `layout`."""
        weight = load_weight(weight, layout=layout)
        dim, width = weight.shape
        module = cls(
            dim,
            width,
            use_bias=bias is not None,
            activation=activation,
            backend=backend,
            key=jax.random.key(0),
        )
        return module.load(weight, bias)

    def load(
        self, weight: ArrayLike, bias: ArrayLike | None = None, *, layout: str | None = None
    ) -> "CausalConv1d":
        """A module like this one with a checkpoint's parameters, in their dtypes; see `pallas_impl.modules.load_weight`.

        Raises:
          ValueError: a shape does not fit, or a bias comes or is missing against this module's.
        """
        if (bias is None) != (self.bias is None):
            wanted = "None" if self.bias is None else "an array"
            raise ValueError(f"bias: expected {wanted}, as use_bias says, got {type(bias).__name__}")
        dim, width = self.weight.shape
        new = (load_weight(weight, dim=dim, width=width, layout=layout), check_bias(bias, dim))
        return equinox.tree_at(lambda m: (m.weight, m.bias), self, new, is_leaf=lambda leaf: leaf is None)

    def empty_states(self, num_slots: SupportsIndex, dtype: DTypeLike = jnp.float32) -> Array:
        """A pool of zeros, [num_slots, width-1, dim]."""
        dim, width = self.weight.shape
        return jnp.zeros((host_integer("num_slots", num_slots), width - 1, dim), dtype)

    def __call__(
        self,
        x: Array,
        query_start_loc: Array | None = None,
        conv_states: Array | None = None,
        cache_indices: Array | None = None,
        has_initial_state: Array | None = None,
        *,
        decode: bool = False,
        **options: Any,
    ) -> Any:
        """One convolution.

        Args:
          x: [tokens, dim] with `query_start_loc`, [batch, seqlen, dim] without; with `decode` [batch, dim] or
            [batch, seqlen, dim].
          query_start_loc: [batch+1], or None for a dense x.
          conv_states: [num_slots, state_len, dim], or None, then with gradients on every backend.
          cache_indices: as in `pallas_impl.causal_conv1d_fn`.
          has_initial_state: [batch] bool; None: every row continues from its slot, where there is a pool.
          decode: run `causal_conv1d_update`: every row continues from its slot.
          **options: further arguments of the operation that runs, `pallas_impl.causal_conv1d_fn` or with `decode`
            `causal_conv1d_update`.

        Returns:
          ConvOutput(out, conv_states): `out` has x's shape; the new pool, or None.

        Raises:
          ValueError, TypeError, Unsupported: as the operations do.
        """
        return call_layer(
            self.weight,
            self.bias,
            x,
            query_start_loc,
            conv_states,
            cache_indices,
            has_initial_state,
            activation=self.activation,
            decode=decode,
            backend=self.backend,
            options=options,
        )


class ShortConv(equinox.Module):
    """`pallas_impl.short_conv` as a layer, under `jax.vmap` over rows [seqlen, dim] too.

    Attributes:
      weight: [dim, width]; bias: [dim], or None.
      activation, backend, axes: as in `pallas_impl.short_conv`.
    """

    weight: jax.Array
    bias: jax.Array | None
    activation: str | None = equinox.field(static=True)
    backend: str = equinox.field(static=True)
    axes: tuple[AxisNames, AxisNames] | None = equinox.field(static=True)

    def __init__(
        self,
        dim: SupportsIndex,
        width: SupportsIndex,
        *,
        use_bias: bool = True,
        activation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        backend: str = "auto",
        axes: tuple[AxisNames, AxisNames] | None = None,
        key: Array,
    ) -> None:
        """Draws the parameters as equinox.nn.Conv1d does."""
        dim, width = check_layer(dim, width, activation)
        self.weight, self.bias = draw_parameters(key, dim, width, use_bias, dtype)
        self.activation, self.backend, self.axes = activation, backend, axes

    def __call__(self, x: Array, cache: Array | None = None, **options: Any) -> Any:
        """ConvOutput(out, cache); `options`: `segment_ids`, `lengths`, `want_cache`, `cache_layout`."""
        given = dict(activation=self.activation, backend=self.backend, axes=self.axes)
        return short_conv(x, self.weight, self.bias, cache=cache, **given, **options)
