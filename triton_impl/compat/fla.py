"""flash-linear-attention's two functions (`fla.modules.conv`), token-major, caches of `width` columns.

    from triton_impl.compat.fla import causal_conv1d, causal_conv1d_update

FLA's cache holds the last `width` inputs, one more than an output needs; the window is its last width-1 columns.
"""

import torch

from oracle.contract import Unsupported
from triton_impl.api import asks_for_gradient
from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.compat.layout import (
    expect,
    expect_weight,
    longest,
    refuse,
    refuse_unknown,
    update_at_back,
)
from triton_impl.dense import dense_rows
from triton_impl.functional import causal_conv1d as differentiable

__all__ = ["causal_conv1d", "causal_conv1d_update"]


def causal_conv1d(
    x,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    output_final_state=False,
    activation=None,
    backend="triton",
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    cp_context=None,
    **kwargs,
):
    """Dense or packed prefill, with gradients; nothing given is written.

    Args:
      x: [batch, seqlen, dim], any strides; with `cu_seqlens`, batch is 1 and seqlen counts the packed tokens.
      weight: [dim, width]; required, as in FLA in fact.
      bias: [dim] or None.
      residual: [batch, seqlen, dim] or None, added after the activation to the rounded output (FLA adds before
        it rounds; the difference is one rounding, and none in float32).
      initial_state: [rows, dim, width] or None.
      output_final_state: also return the last `width` inputs of each row.
      activation: None, "silu" or "swish".
      backend: "triton"; FLA's other backends are refused.
      cu_seqlens: [rows+1] int32 or int64, or None.
      cu_seqlens_cpu: the same on the host; only chooses the grid.
      chunk_indices: not needed and not read: the flat schedule finds the blocks on the device.
      cp_context: None; context parallelism is refused.

    Returns:
      (y, final_state): y [batch, seqlen, dim] in x's dtype; final_state [rows, dim, width] in x's dtype, or None.
      Tokens past `cu_seqlens[-1]` are zero (plus the residual).

    Raises:
      ValueError, TypeError: bad shapes, dtypes or values; an unknown keyword.
      Unsupported: another backend, `cp_context`.
    """
    refuse("context parallelism", cp_context=cp_context)
    refuse_unknown("causal_conv1d", kwargs)
    if backend != "triton":
        raise Unsupported(f"backend: expected 'triton', got {backend!r}")
    batch, seqlen, dim = expect("x", x, ("batch", "seqlen", "dim"))
    width = _width(weight, dim)
    if residual is not None:
        expect("residual", residual, ("batch", "seqlen", "dim"), batch=batch, seqlen=seqlen, dim=dim)
    rows = batch
    if cu_seqlens is not None:
        rows = expect("cu_seqlens", cu_seqlens, ("rows+1",))[0] - 1
        if batch != 1:
            raise ValueError(f"x: expected batch 1 with cu_seqlens, got {list(x.shape)}")
    if initial_state is not None:
        expect("initial_state", initial_state, ("rows", "dim", "width"), rows=rows, dim=dim, width=width)

    if cu_seqlens is None:
        ends = torch.arange(1, rows + 1, device=x.device) * seqlen
        lengths, bound = torch.full_like(ends, seqlen), seqlen
    else:
        ends, lengths = cu_seqlens[1:], cu_seqlens.diff()
        bound = longest("cu_seqlens_cpu", None if cu_seqlens_cpu is None else cu_seqlens_cpu.diff())
    window = None if initial_state is None else initial_state[:, :, 1:].transpose(1, 2)
    if asks_for_gradient(x, weight, bias, initial_state):
        tokens = x if cu_seqlens is None else x[0]
        y, states = differentiable(
            tokens, weight, bias, window, cu_seqlens, activation=activation, max_seqlen=bound
        )
        y = y.view(x.shape)
    else:
        y, states = _prefill(x, weight, bias, window, output_final_state, cu_seqlens, bound, rows, activation)
    if residual is not None:
        y = y + residual
    if not output_final_state:
        return y, None
    oldest = _oldest(x.reshape(batch * seqlen, dim), initial_state, ends, lengths, width)
    return y, torch.cat([oldest[:, :, None], states.transpose(1, 2).to(x.dtype)], dim=2)


def _prefill(x, weight, bias, window, output_final_state, cu_seqlens, bound, rows, activation):
    """The forward pass alone; returns y and the new windows [rows, width-1, dim], or None if there are none."""
    states = has_state = None
    if window is not None:
        states, has_state = (
            window.to(torch.promote_types(x.dtype, window.dtype), copy=True),
            x.new_ones(rows).bool(),
        )
    elif output_final_state:
        states = x.new_zeros(rows, weight.shape[1] - 1, x.shape[2])
    if cu_seqlens is None:
        return dense_rows(x, weight, bias, states, None, has_state, activation=activation), states
    y = packed_fn(
        x[0], weight, bias, states, cu_seqlens, None, has_state, activation=activation, max_seqlen=bound
    ).out  # fmt: skip
    return y[None], states


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """One token a row; `cache` is updated in place (FLA updates a copy of a non-contiguous one).

    Args:
      x: [rows, dim], [rows, 1, dim] or [1, rows, dim].
      cache: [rows, dim, width], any strides.
      residual: as x, or None; added after the activation to the rounded output.
      weight, bias: [dim, width]; [dim] or None. `weight` is required.
      activation: None, "silu" or "swish".

    Returns:
      (y, cache): y with x's shape and dtype.

    Raises:
      ValueError, TypeError: bad shapes or dtypes; no cache (FLA then leaves x out of the result).
      Unsupported: a backward pass.
    """
    if not isinstance(x, torch.Tensor) or x.dim() == 2:
        rows, dim = expect("x", x, ("rows", "dim"))
    else:
        batch, seqlen, dim = expect("x", x, ("batch", "seqlen", "dim"))
        if batch != 1 and seqlen != 1:
            raise ValueError(
                f"x: expected one token a row, [rows, 1, dim] or [1, rows, dim], got {list(x.shape)}"
            )
        rows = batch * seqlen
    width = _width(weight, dim)
    expect("cache", cache, ("rows", "dim", "width"), rows=rows, dim=dim, width=width)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected x's shape {list(x.shape)}, got {list(residual.shape)}")
    y = update_at_back(x.reshape(rows, dim), weight, bias, cache, None, activation=activation).view(x.shape)
    return (y if residual is None else y.add_(residual)), cache


def _width(weight, dim):
    if weight is None:
        raise ValueError(
            f"weight: expected shape [dim={dim}, width], got None (without taps there is no convolution)"
        )
    return expect_weight(weight, dim)


def _oldest(tokens, initial_state, ends, lengths, width):
    """Column 0 of the final states [rows, dim], which no output needs: the input `width` tokens before the end."""
    if tokens.shape[0]:
        recent = tokens[(ends - width).long().clamp(0, tokens.shape[0] - 1)]
    else:
        recent = tokens.new_zeros(lengths.shape[0], tokens.shape[1])
    if initial_state is None:
        earlier = 0
    else:
        column = lengths.long().clamp(0, width - 1)[:, None, None].expand(-1, tokens.shape[1], 1)
        earlier = initial_state.to(tokens.dtype).gather(2, column)[:, :, 0]
    return torch.where((lengths >= width)[:, None], recent, earlier)
