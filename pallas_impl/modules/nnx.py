"""The convolution as a Flax NNX module."""

import inspect
from typing import Any, SupportsIndex

import jax.numpy as jnp
from flax import nnx
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


class CausalConv1d(nnx.Module):
    """Causal depthwise conv1d with optional SiLU, for training and inference.

    The pool of conv states is no part of the module: it goes in and comes out as a value, so that the caller can
    donate it, shard it, and share one between requests.

    Attributes:
      weight: nnx.Param [dim, width].
      bias: nnx.Param [dim], or None.
    """

    def __init__(
        self,
        dim: SupportsIndex,
        width: SupportsIndex,
        *,
        use_bias: bool = True,
        activation: str | None = "silu",
        param_dtype: DTypeLike = jnp.float32,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters as torch.nn.Conv1d does.

        Args:
          dim: channels.
          width: taps, 1 to 8.
          use_bias: whether there is a bias.
          activation: None, "silu" or "swish".
          param_dtype: of weight and bias; the operations take any mix with x.
          backend: as in `pallas_impl.causal_conv1d_fn`.
          rngs: nnx.Rngs; its "params" stream is used.
        """
        self.dim, self.width = check_layer(dim, width, activation)
        self.activation, self.backend = activation, backend
        weight, bias = draw_parameters(rngs.params(), self.dim, self.width, use_bias, param_dtype)
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

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
            dim, width, use_bias=bias is not None, activation=activation, param_dtype=weight.dtype, backend=backend,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        module.load(weight, bias)
        return module

    def load(self, weight: ArrayLike, bias: ArrayLike | None = None, *, layout: str | None = None) -> None:
        """Takes a checkpoint's parameters, in their dtypes; see `pallas_impl.modules.load_weight`.

        Raises:
          ValueError: a shape does not fit, or a bias comes or is missing against `use_bias`.
        """
        if (bias is None) != (self.bias is None):
            wanted = "None" if self.bias is None else "an array"
            raise ValueError(f"bias: expected {wanted}, as use_bias says, got {type(bias).__name__}")
        weight, bias = (
            load_weight(weight, dim=self.dim, width=self.width, layout=layout),
            check_bias(bias, self.dim),
        )
        self.weight = nnx.Param(weight)
        if bias is not None:
            self.bias = nnx.Param(bias)

    def empty_states(self, num_slots: SupportsIndex, dtype: DTypeLike = jnp.float32) -> Array:
        """A pool of zeros, [num_slots, width-1, dim]."""
        return jnp.zeros((host_integer("num_slots", num_slots), self.width - 1, self.dim), dtype)

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
            self.weight[...], None if self.bias is None else self.bias[...], x, query_start_loc, conv_states,
            cache_indices, has_initial_state, activation=self.activation, decode=decode, backend=self.backend, options=options,
        )  # fmt: skip


KERNEL_INIT, BIAS_INIT = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()  # nnx.Conv's


class ShortConv(nnx.Module):
    """`pallas_impl.short_conv` with the parameters of a depthwise nnx.Conv, so that checkpoints and sharding rules stay.

    Attributes:
      kernel: nnx.Param [width, 1, dim], with whatever metadata `kernel_init` gives it (`nnx.with_partitioning`).
      bias: nnx.Param [dim], or None.
      dtype: x and the parameters are cast to it first, as nnx.Conv does; None: to what they promote to.
    """

    def __init__(
        self,
        dim: SupportsIndex,
        width: SupportsIndex,
        *,
        use_bias: bool = True,
        activation: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Any = KERNEL_INIT,
        bias_init: Any = BIAS_INIT,
        backend: str = "auto",
        axes: tuple[AxisNames, AxisNames] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters as nnx.Conv does."""
        dim, width = check_layer(dim, width, activation)
        self.activation, self.dtype, self.backend, self.axes = activation, dtype, backend, axes
        self.kernel = nnx.Param(kernel_init(rngs.params(), (width, 1, dim), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (dim,), param_dtype)) if use_bias else None

    @classmethod
    def of(
        cls,
        conv: nnx.Conv,
        *,
        activation: str | None = None,
        backend: str = "auto",
        axes: tuple[AxisNames, AxisNames] | None = None,
    ) -> "ShortConv":
        """The layer with a causal depthwise nnx.Conv's own parameters, the very variables."""
        width, _, dim = conv.kernel.shape
        options = dict(
            use_bias=conv.bias is not None,
            activation=activation,
            dtype=conv.dtype,
            backend=backend,
            axes=axes,
        )
        layer = cls(dim, width, rngs=nnx.Rngs(0), **options)
        layer.kernel = conv.kernel
        if conv.bias is not None:
            layer.bias = conv.bias
        return layer

    def __call__(
        self,
        x: ArrayLike,
        cache: ArrayLike | None = None,
        *,
        want_cache: bool | None = None,
        cache_layout: str = "time",
        segment_ids: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
    ) -> Any:
        """`out`, or (out, new cache) where a cache is given or wanted; arguments as in `pallas_impl.short_conv`."""
        want_cache = cache is not None if want_cache is None else want_cache
        result = _convolve(
            self, x, cache=cache, want_cache=want_cache, cache_layout=cache_layout, segment_ids=segment_ids,
            lengths=lengths, activation=self.activation, backend=self.backend, axes=self.axes,
        )  # fmt: skip
        return tuple(result) if want_cache else result.out


def _convolve(conv, x, **options):
    """`short_conv` with a layer's kernel and bias, all in its dtype, or in what they promote to."""
    kernel, bias = conv.kernel[...], None if conv.bias is None else conv.bias[...]
    given = [a for a in (jnp.asarray(x), kernel, bias) if a is not None]
    dtype = jnp.result_type(*given) if conv.dtype is None else conv.dtype
    x, kernel, bias = (a if a is None else jnp.asarray(a, dtype) for a in (x, kernel, bias))
    return short_conv(x, kernel, bias, weight_layout="flax", **options)


class CachedConv(nnx.Module):
    """A layer around a depthwise nnx.Conv called `conv`, as mamba2-jax and bonsai have it, with a [batch, dim, width-1] cache."""

    def __init__(
        self, conv: nnx.Conv, *, backend: str = "auto", axes: tuple[AxisNames, AxisNames] | None = None
    ) -> None:
        self.conv, self.backend, self.axes = conv, backend, axes

    def __call__(self, x: ArrayLike, conv_state: ArrayLike | None = None) -> tuple[Array, Array]:
        """(out, new state)."""
        options = dict(backend=self.backend, axes=self.axes)
        return tuple(_convolve(self.conv, x, cache=conv_state, cache_layout="channels", **options))


def swap(
    model: nnx.Module, *, backend: str = "auto", axes: tuple[AxisNames, AxisNames] | None = None
) -> dict[str, str]:
    """Replaces every causal depthwise convolution in an NNX tree, in place; parameters stay the very variables.

    Those are: an nnx.Conv with feature_group_count = in_features = out_features, one axis, no stride or dilation, and
    padding "CAUSAL" or (width-1, 0); and a module that holds such an nnx.Conv as `conv`, pads for it, and is called
    with (x, conv_state) for (out, new conv_state [batch, dim, width-1]).

    Returns:
      {path: the class that stood there}; empty where there is none.
    """
    found = {}
    for path, module in list(nnx.iter_modules(model)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Conv) and _is_causal(child):
                new = ShortConv.of(child, backend=backend, axes=axes)
            elif isinstance(child, nnx.Module) and _is_cached(child):
                new = CachedConv(child.conv, backend=backend, axes=axes)
            else:
                continue
            found[".".join(map(str, (*path, name)))] = type(child).__name__
            setattr(module, name, new)
    return found


def _is_depthwise(conv):
    width = conv.kernel_size if isinstance(conv.kernel_size, tuple) else (conv.kernel_size,)
    once = all(set(jnp.atleast_1d(jnp.asarray(n or 1)).tolist()) == {1}
               for n in (conv.strides, conv.input_dilation, conv.kernel_dilation))  # fmt: skip
    return (
        len(width) == 1 and 1 <= width[0] <= 8 and once and getattr(conv, "mask", None) is None
        and conv.feature_group_count == conv.in_features == conv.out_features
    )  # fmt: skip


def _is_causal(conv):
    padding, width = conv.padding, conv.kernel.shape[0]
    return _is_depthwise(conv) and (
        (isinstance(padding, str) and padding == "CAUSAL")
        or (not isinstance(padding, str | int) and tuple(map(tuple, padding)) == ((width - 1, 0),))
    )


def _is_cached(module):
    conv = getattr(module, "conv", None)
    if not isinstance(conv, nnx.Conv) or not _is_depthwise(conv):
        return False
    return list(inspect.signature(type(module).__call__).parameters)[1:] == ["x", "conv_state"]
