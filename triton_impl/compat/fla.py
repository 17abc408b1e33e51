"""flash-linear-attention 0.6's functions (`fla.modules.causal_conv1d`), token-major, caches of `width` columns.

    from triton_impl.compat.fla import causal_conv1d, causal_conv1d_update

FLA's cache holds the last `width` inputs, one more than an output needs; the window is its last width-1 columns.
x may have its channels in several axes, [batch, seqlen, heads, head_dim] with `dim = heads * head_dim`; caches have
dim. The residual is added after the activation to the rounded output (FLA adds before it rounds; the difference is
one rounding, and none in float32). `weight` is required, as in FLA in fact.
"""

import functools
import logging

import torch

from oracle.contract import Unsupported
from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.compat.causal_conv1d import causal_conv1d_fn as channel_first
from triton_impl.compat.layout import expect, expect_weight, longest, update_at_back
from triton_impl.functional import causal_conv1d as differentiable
from triton_impl.modules.dense import dense_rows
from triton_impl.tracing import asks_for_gradient, refuse_odd

__all__ = [
    "causal_conv1d",
    "causal_conv1d_bwd",
    "causal_conv1d_fwd",
    "causal_conv1d_update",
    "causal_conv1d_update_states",
    "fast_causal_conv1d_fn",
]


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
      weight, bias: [dim, width]; [dim] or None.
      residual: as many values as x, or None.
      initial_state: [rows, dim, width] or None.
      output_final_state: also return the last `width` inputs of each row.
      activation: None, "silu" or "swish".
      backend: "triton"; for "cuda" and "mix" these kernels run as well, and a warning in the log says so once. With
        them, as in FLA, the keyword `seq_idx` [batch, seqlen] tells rows apart where `cu_seqlens` does not.
      cu_seqlens: [rows+1] int32 or int64, or None.
      cu_seqlens_cpu: the same on the host; only chooses the grid.
      chunk_indices: not needed and not read: the flat schedule finds the blocks on the device.
      cp_context: None; context parallelism is refused.
      kwargs: other keywords are ignored, as in FLA, whose layers hand on what a model was called with.

    Returns:
      (y, final_state): y with x's shape and dtype; final_state [rows, dim, width] in x's dtype, or None.
      Tokens past `cu_seqlens[-1]` are zero (plus the residual).

    Raises:
      ValueError, TypeError: bad shapes, dtypes or values; an unknown backend.
      Unsupported: `cp_context`; `seq_idx` with states.
    """
    if cp_context is not None:
        raise Unsupported(f"cp_context: expected None, got {type(cp_context).__name__} (context parallelism)")
    ids = None
    if backend in ("cuda", "mix"):
        say_once(backend)
        ids = kwargs.get("seq_idx") if cu_seqlens is None else None
    elif backend != "triton":
        raise ValueError(f"backend: expected 'triton', 'cuda' or 'mix', got {backend!r}")
    refuse_odd(("x",), (x,))
    shape = x.shape if isinstance(x, torch.Tensor) else ()
    x = _one_axis(x)
    batch, seqlen, dim = expect("x", x, ("batch", "seqlen", "dim"))
    width = _width(weight, dim)
    if residual is not None and residual.numel() != x.numel():
        raise ValueError(f"residual: expected x's shape {list(shape)}, got {list(residual.shape)}")
    if ids is not None:
        states = None if initial_state is None else initial_state[:, :, 1:]
        y = channel_first(x.transpose(1, 2), weight, bias, ids, states, output_final_state, None, activation)
        return _with_residual(y.transpose(1, 2), residual, shape), None
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
    y = _with_residual(y, residual, shape)
    if not output_final_state:
        return y, None
    oldest = _oldest(x.reshape(batch * seqlen, dim), initial_state, ends, lengths, width)
    return y, torch.cat([oldest[:, :, None], states.transpose(1, 2).to(x.dtype)], dim=2)


def fast_causal_conv1d_fn(
    x,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    output_final_state=False,
    activation=None,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    seq_idx=None,
):
    """`causal_conv1d` of the backend "mix", here with residual and states as well."""
    options = residual, initial_state, output_final_state, activation, "mix", cu_seqlens, cu_seqlens_cpu
    return causal_conv1d(x, weight, bias, *options, seq_idx=seq_idx)


def causal_conv1d_fwd(
    x,
    weight,
    bias,
    residual,
    initial_state=None,
    output_final_state=False,
    activation=None,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    chunk_size=64,
    layout_fallback=False,
):
    """`causal_conv1d` without gradients; the last three arguments only choose blocks in FLA."""
    options = residual, initial_state, output_final_state, activation, "triton", cu_seqlens, cu_seqlens_cpu
    with torch.no_grad():
        return causal_conv1d(x, weight, bias, *options)


def causal_conv1d_bwd(
    x,
    dy,
    dht,
    weight=None,
    bias=None,
    residual=None,
    initial_state=None,
    activation=None,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    chunk_size=64,
    layout_fallback=False,
):
    """Gradients (dx, dweight, dbias, dresidual, dinitial_state) of `causal_conv1d`, None where there is none.

    Args:
      dy, dht: upstream gradients of y and, or None, of the final state; the others as in `causal_conv1d`.
    """
    inputs = (x, weight, bias, initial_state)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        options = None, leaves[3], dht is not None, activation, "triton", cu_seqlens, cu_seqlens_cpu
        y, final = causal_conv1d(*leaves[:3], *options)
    results, upstream = ((y,), (dy,)) if dht is None else ((y, final), (dy, dht))
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(results, wanted, upstream))
    dx, dweight, dbias, dinitial = (None if leaf is None else next(found) for leaf in leaves)
    return dx, dweight, dbias, dy if residual is not None else None, dinitial


def causal_conv1d_update_states(x, state_len, initial_state=None, cu_seqlens=None):
    """The last `state_len` inputs of each row behind its initial state, in plain torch; nothing synchronises.

    Args:
      x: [batch, seqlen, dim]; with `cu_seqlens` [1, tokens, dim] or [tokens, dim].
      initial_state: [rows, dim, state_len] or None: zeros.

    Returns:
      [rows, dim, state_len] in x's dtype.

    Raises:
      Unsupported: x is nested, sparse or a proxy.
    """
    refuse_odd(("x",), (x,))
    tokens = x.reshape(-1, x.shape[-1])
    if cu_seqlens is None:
        ends = torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[1]
        lengths = torch.full_like(ends, x.shape[1])
    else:
        ends, lengths = cu_seqlens[1:], cu_seqlens.diff()
    columns = [
        _oldest(tokens, initial_state, ends, lengths, state_len, column) for column in range(state_len)
    ]
    return torch.stack(columns, dim=2)


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
    ).out
    return y[None], states


def causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    """One token a row; `cache` is updated in place (FLA updates a copy of a non-contiguous one).

    Args:
      x: [rows, dim], [rows, 1, dim] or [1, rows, dim].
      cache: [rows or more, dim, width], any strides; the first `rows` count.
      residual: as many values as x, or None.
      weight, bias: [dim, width]; [dim] or None.
      activation: None, "silu" or "swish".

    Returns:
      (y, cache): y with x's shape and dtype.

    Raises:
      ValueError, TypeError: bad shapes or dtypes; no cache (FLA then leaves x out of the result).
      Unsupported: a backward pass.
    """
    refuse_odd(("x",), (x,))
    shape = x.shape if isinstance(x, torch.Tensor) else ()
    x = _one_axis(x)
    if not shape or x.dim() == 2:
        rows, dim = expect("x", x, ("rows", "dim"))
    else:
        batch, seqlen, dim = expect("x", x, ("batch", "seqlen", "dim"))
        if batch != 1 and seqlen != 1:
            raise ValueError(
                f"x: expected one token a row, [rows, 1, dim] or [1, rows, dim], got {list(x.shape)}"
            )
        rows = batch * seqlen
    width = _width(weight, dim)
    if expect("cache", cache, ("rows", "dim", "width"), dim=dim, width=width)[0] < rows:
        raise ValueError(f"cache: expected shape [rows={rows}, dim, width], got {list(cache.shape)}")
    if residual is not None and residual.numel() != x.numel():
        raise ValueError(f"residual: expected x's shape {list(shape)}, got {list(residual.shape)}")
    y = update_at_back(x.reshape(rows, dim), weight, bias, cache, None, activation=activation)
    return _with_residual(y, residual, shape), cache


def _one_axis(x):
    """x with all axes from the third on as one."""
    return x.flatten(2) if isinstance(x, torch.Tensor) and x.dim() > 3 else x


def _with_residual(y, residual, shape):
    y = y.reshape(shape)
    return y if residual is None else y + residual.reshape(shape)


@functools.cache
def say_once(backend):
    logging.getLogger("fla.twinconv").warning(
        "backend %r: expected 'triton'; the same kernels run in its place", backend
    )


def _width(weight, dim):
    if weight is None:
        raise ValueError(
            f"weight: expected shape [dim={dim}, width], got None (without taps there is no convolution)"
        )
    return expect_weight(weight, dim)


def _oldest(tokens, initial_state, ends, lengths, width, column=0):
    """Column `column` of the final states [rows, dim]: the input `width - column` tokens before the end.

    Column 0 is what no output needs.
    """
    back = width - column
    if tokens.shape[0]:
        recent = tokens[(ends - back).long().clamp(0, tokens.shape[0] - 1)]
    else:
        recent = tokens.new_zeros(lengths.shape[0], tokens.shape[1])
    if initial_state is None:
        earlier = 0
    else:
        place = (lengths.long() + column).clamp(0, width - 1)[:, None, None].expand(-1, tokens.shape[1], 1)
        earlier = initial_state.to(tokens.dtype).gather(2, place)[:, :, 0]
    return torch.where((lengths >= back)[:, None], recent, earlier)
