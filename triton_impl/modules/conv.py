"""The convolution as a module: parameters that load from nn.Conv1d and from checkpoints, and serving calls."""

import math
from collections.abc import Iterable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from oracle.contract import ACTIVATIONS, WIDTH_MAX, WIDTH_MIN, Unsupported
from triton_impl.api import causal_conv1d_fn, causal_conv1d_update
from triton_impl.functional import causal_conv1d
from triton_impl.modules.dense import dense_rows
from triton_impl.modules.pool import ConvStatePool, host_integer
from triton_impl.tracing import asks_for_gradient


class CausalConv1d(nn.Module):
    """Causal depthwise conv1d with optional SiLU; calls without a pool can be differentiated.

    `weight` [dim, width] and `bias` [dim] are plain parameters. `load_state_dict` also takes weights of
    shape [dim, 1, width], as nn.Conv1d and model checkpoints hold them. Under autocast x is cast to the autocast
    dtype first, as it is for nn.Conv1d; the parameters may stay in float32, the kernels read any mix.

    Every call goes through `forward`, so that hooks and wrappers (FSDP, torch.compile) see all of them.

    Args:
      dim: channels.
      width: taps, 1 to 8.
      bias: whether there is one.
      activation: None, "silu" or "swish".
      device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: SupportsIndex,
        width: SupportsIndex,
        bias: bool = True,
        activation: str | None = "silu",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, width = host_integer("dim", dim), host_integer("width", width)
        if not WIDTH_MIN <= width <= WIDTH_MAX:
            raise ValueError(f"width: expected {WIDTH_MIN} to {WIDTH_MAX}, got {width}")
        if dim < 1:
            raise ValueError(f"dim: expected at least 1, got {dim}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(dim, width, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @classmethod
    def from_conv1d(cls, conv: nn.Conv1d, activation: str | None = None) -> "CausalConv1d":
        """A module with the values of a depthwise nn.Conv1d's parameters (not the parameters), frozen where those are.

        Its padding is taken to be what makes it causal: callers of such a layer cut the outputs that see later tokens.

        Raises:
          TypeError: `conv` is no nn.Conv1d.
          ValueError: it is not depthwise with stride 1 and dilation 1, pads with something else than zeros, or its weight
            is computed from other parameters or has no values yet.
        """
        if not isinstance(conv, nn.Conv1d):
            raise TypeError(f"conv: expected an nn.Conv1d, got {type(conv).__name__}")
        for name in ("weight", "bias"):
            values = conv._parameters.get(name)
            if (values is None and getattr(conv, name) is not None) or isinstance(
                values, UninitializedParameter
            ):
                raise ValueError(
                    f"conv: expected a {name} that is a parameter and has values, got one that is parametrised, pruned or lazy"
                )
        wanted = {
            "groups": conv.in_channels,
            "out_channels": conv.in_channels,
            "stride": (1,),
            "dilation": (1,),
            "padding_mode": "zeros",
        }
        for name, value in wanted.items():
            if getattr(conv, name) != value:
                raise ValueError(f"conv: expected {name}={value}, got {getattr(conv, name)}")
        module = cls(
            conv.in_channels,
            conv.kernel_size[0],
            conv.bias is not None,
            activation,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        module.load_state_dict(conv.state_dict())
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(getattr(conv, name).requires_grad)
        return module

    def reset_parameters(self) -> None:
        """Draws the parameters as nn.Conv1d does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        query_start_loc: Tensor | None = None,
        conv_states: Tensor | None = None,
        cache_indices: Tensor | None = None,
        has_initial_state: Tensor | None = None,
        *,
        pad_slot_id: SupportsIndex = -1,
        max_seqlen: SupportsIndex | None = None,
        decode: bool = False,
        **serving: Any,
    ) -> Any:
        """One convolution; `conv_states` is updated in place.

        Args:
          x: [tokens, dim] with `query_start_loc`, [batch, seqlen, dim] without; with `decode` [batch, dim] or
            [batch, seqlen, dim].
          query_start_loc: [batch+1], or None for a dense x.
          conv_states, cache_indices, has_initial_state, pad_slot_id, max_seqlen: as in `causal_conv1d_fn`.
          decode: run `causal_conv1d_update`: every row continues from its slot; `query_start_loc` and `max_seqlen` then
            pack rows of different lengths.
          serving: further arguments of the operation, such as `window_out`, `write_indices` or `split_sizes`; a
            prefill takes them with `query_start_loc` only.

        Returns:
          out, with x's shape, in x's dtype (the autocast dtype under autocast); a tuple with `split_sizes`.

        Raises:
          ValueError, TypeError, Unsupported: as the operations do.
        """
        if isinstance(x, torch.fx.Proxy):
            given = dict(
                query_start_loc=query_start_loc,
                conv_states=conv_states,
                cache_indices=cache_indices,
                has_initial_state=has_initial_state,
                pad_slot_id=pad_slot_id,
                max_seqlen=max_seqlen,
                decode=decode,
            )
            return self._as_leaf(x, given, serving)
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        options = dict(activation=self.activation, pad_slot_id=pad_slot_id)
        if decode:
            if has_initial_state is not None:
                raise ValueError(
                    f"has_initial_state: expected None with decode, got {type(has_initial_state).__name__}"
                )
            return causal_conv1d_update(
                x,
                self.weight,
                self.bias,
                conv_states,
                cache_indices,
                query_start_loc=query_start_loc,
                max_seqlen=max_seqlen,
                **options,
                **serving,
            ).out
        if query_start_loc is None and x.dim() != 3:
            raise ValueError(
                f"x: expected shape [batch, seqlen, dim] without query_start_loc, got {list(x.shape)}"
            )
        if query_start_loc is None and serving:
            raise ValueError(f"{next(iter(serving))}: expected None without query_start_loc or decode")
        if conv_states is None and cache_indices is None and has_initial_state is None and not serving:
            if asks_for_gradient(x, self.weight, self.bias):
                return causal_conv1d(
                    x,
                    self.weight,
                    self.bias,
                    None,
                    query_start_loc,
                    activation=self.activation,
                    max_seqlen=max_seqlen,
                ).out
        if query_start_loc is None:
            return dense_rows(
                x, self.weight, self.bias, conv_states, cache_indices, has_initial_state, **options
            )
        return causal_conv1d_fn(
            x,
            self.weight,
            self.bias,
            conv_states,
            query_start_loc,
            cache_indices,
            has_initial_state,
            max_seqlen=max_seqlen,
            **options,
            **serving,
        ).out

    def prefill(
        self,
        x: Tensor,
        query_start_loc: Tensor | None,
        pool: ConvStatePool,
        slots: Iterable[int] | Tensor,
        has_initial_state: Tensor | None = None,
        *,
        layer: SupportsIndex = 0,
        max_seqlen: SupportsIndex | None = None,
        **serving: Any,
    ) -> Any:
        """Prefill, or one chunk of it, of sequences in a ConvStatePool.

        Args:
          x: [tokens, dim], or [batch, seqlen, dim] with `query_start_loc` None.
          query_start_loc: [batch+1] or None.
          pool: a ConvStatePool.
          slots: host integers, which the pool checks, or cache_indices [batch] on x's device, which it does not.
          has_initial_state: [batch] bool: rows that continue an earlier chunk; None: no row does.
          layer: layer of the pool.
          max_seqlen: host bound of the longest row, or None.
          serving: further arguments of `causal_conv1d_fn`.

        Returns:
          out, with x's shape.
        """
        return self(
            x,
            query_start_loc,
            pool.layer(layer),
            _indices(pool, slots),
            has_initial_state,
            pad_slot_id=pool.pad_slot_id,
            max_seqlen=max_seqlen,
            **serving,
        )

    def step(
        self,
        x: Tensor,
        pool: ConvStatePool,
        slots: Iterable[int] | Tensor,
        *,
        layer: SupportsIndex = 0,
        **serving: Any,
    ) -> Any:
        """Decode step of sequences in a ConvStatePool: x [batch, dim] or [batch, seqlen, dim]; see `prefill`.

        `serving` holds further arguments of `causal_conv1d_update`.
        """
        query_start_loc = serving.pop("query_start_loc", None)
        return self(
            x,
            query_start_loc,
            pool.layer(layer),
            _indices(pool, slots),
            pad_slot_id=pool.pad_slot_id,
            decode=True,
            **serving,
        )

    def _as_leaf(self, x, options, serving):
        """In torch.fx.symbolic_trace of a model: a call of this layer."""
        path = x.tracer.path_of_module(self)
        if not path:
            raise Unsupported(
                "x: expected a tensor, got a proxy of torch.fx.symbolic_trace of the layer itself (a model around it takes it "
                "as a leaf; torch.export traces calls)"
            )
        return x.tracer.create_proxy("call_module", path, (x,), options | serving)

    def __prepare_scriptable__(self):
        """What torch.jit.script asks of a module."""
        raise Unsupported(
            "torch.jit.script: expected torch.compile, torch.export or torch.jit.trace of this layer"
        )

    def extra_repr(self) -> str:
        """Shows the sizes and options."""
        dim, width = self.weight.shape
        return f"{dim}, width={width}, bias={self.bias is not None}, activation={self.activation!r}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Drops the middle axis of a [dim, 1, width] weight."""
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dim() == 3 and weight.shape[1] == 1:
            state_dict[prefix + "weight"] = weight.squeeze(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _indices(pool, slots):
    return slots if isinstance(slots, torch.Tensor) else pool.indices(slots)
