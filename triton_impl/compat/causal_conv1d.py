"""The interface of causal-conv1d 1.7, which transformers and mamba_ssm import too; channel-first axes.

    from triton_impl.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

or, for programs that import `causal_conv1d` themselves, `triton_impl.compat.install("causal_conv1d")`.

Beyond the peer: any strides and any `dim`, initial and final states in either memory layout, widths 1 to 8, every
mix of float dtypes, slots past the pool are padding rather than a fault. The prefill has gradients; the update, as
the peer's, has none. `causal_conv1d_ref` and `causal_conv1d_update_ref` are the definitions in PyTorch's operations.
"""

import itertools

import torch
import torch.nn.functional as F

from oracle.contract import ACTIVATIONS, Unsupported
from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.compat.layout import (
    expect,
    expect_states,
    expect_weight,
    folded_channels,
    folds_into_channels,
    leading,
    token_axes,
    token_major,
    update_at_back,
)
from triton_impl.functional import causal_conv1d
from triton_impl.modules.dense import dense_rows
from triton_impl.tracing import asks_for_gradient

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]
__version__ = "1.7.0"  # of the interface


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Dense prefill. Nothing given is written but `final_states_out`.

    Args:
      x: [batch, dim, seqlen], any strides. A view serves both channel-first and channel-last memory; a channel
        slice of a channel-first tensor with batch > 1 is copied once.
      weight: [dim, width].
      bias: [dim] or None.
      seq_idx: [batch, seqlen] int32 or int64 or None: each run of equal ids is a sequence of its own, and outputs
        where the id is negative are zero. An id that comes back after another one starts afresh (the peer,
        which compares ids token by token, lets it see through a gap shorter than width-1).
      initial_states: [batch, dim, width-1] or None; with `seq_idx` they belong to the first run of each row.
      return_final_states: also return the last width-1 inputs; not together with `seq_idx`.
      final_states_out: [batch, dim, width-1] to write them to; needs `return_final_states`.
      activation: None, "silu" or "swish".

    Returns:
      out [batch, dim, seqlen] in x's dtype, or (out, final_states [batch, dim, width-1] in x's dtype).

    Raises:
      ValueError, TypeError: as `oracle.contract.FnCall`.
      Unsupported: `seq_idx` with final states, of which a row of several runs has no single one.
    """
    batch, dim, _ = expect("x", x, ("batch", "dim", "seqlen"))
    width = expect_weight(weight, dim)
    axes, sizes = ("batch", "dim", "width-1"), {"batch": batch, "dim": dim, "width-1": width - 1}
    if initial_states is not None:
        expect("initial_states", initial_states, axes, **sizes)
    if final_states_out is not None:
        expect("final_states_out", final_states_out, axes, **sizes)
        if not return_final_states:
            raise ValueError("final_states_out: expected None, since return_final_states is False")
    if seq_idx is not None:
        if return_final_states:
            raise Unsupported("return_final_states: expected False together with seq_idx, got True")
        return _packed_by_ids(x, weight, bias, seq_idx, initial_states, activation)

    if asks_for_gradient(x, weight, bias, initial_states):
        rows = None if initial_states is None else initial_states.transpose(1, 2)
        out, final = causal_conv1d(x.transpose(1, 2), weight, bias, rows, activation=activation)
        return _results(out, final, return_final_states, final_states_out)

    folded = folds_into_channels(x)
    states = None
    if initial_states is not None or return_final_states:
        shape = (batch, dim, width - 1) if folded else (batch, width - 1, dim)
        # float32 where x and the initial states differ, so that neither is rounded on the way
        dtype = x.dtype if initial_states is None else torch.promote_types(x.dtype, initial_states.dtype)
        states = torch.zeros(shape, dtype=dtype, device=x.device)
        by_channel = states if folded else states.transpose(1, 2)
        if initial_states is not None:
            by_channel.copy_(initial_states)
    if folded:
        out = folded_channels(x, weight, bias, states, initial_states is not None, activation=activation)
        out, states = out.transpose(1, 2), None if states is None else by_channel.transpose(1, 2)
    else:
        has_state = None if initial_states is None else x.new_ones(batch, dtype=torch.bool)
        out = dense_rows(x.transpose(1, 2), weight, bias, states, None, has_state, activation=activation)
    return _results(out, states, return_final_states, final_states_out)


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    """Decode step; `conv_state` is updated in place, x is not written.

    Args:
      x: [batch, dim] or [batch, dim, seqlen].
      conv_state: [batch or num_slots, dim, state_len], state_len >= width-1, any strides. The window is the last
        width-1 columns and the slot shifts as a whole, as the peer does it.
      weight: [dim, width].
      bias: [dim] or None.
      activation: None, "silu" or "swish".
      cache_seqlens: [batch] integer, tokens of each row before this step, or None. With it a slot is a circular
        buffer: column n mod state_len holds token n; the caller advances the counts.
      conv_state_indices: [batch or more] integer slots, the first `batch` of which count, or None: row i uses slot
        i. Negative slots, and slots past the pool, are padding: their output is zero and no slot is touched.

    Returns:
      out, with x's shape and dtype.

    Raises:
      ValueError, TypeError: as `oracle.contract.UpdateCall`.
      Unsupported: a backward pass.
    """
    dim = token_axes(x)
    width = expect_weight(weight, dim)
    expect_states("conv_state", conv_state, dim, width)
    slots = leading("conv_state_indices", conv_state_indices, x.shape[0])
    out = update_at_back(
        token_major(x), weight, bias, conv_state, slots, cache_seqlens, activation=activation
    )
    return token_major(out)


def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """The last `state_len` tokens of each packed sequence, zeros in front of short ones; plain torch.

    Args:
      x: [tokens, dim].
      cu_seqlens: [batch+1] int32 or int64.
      state_len: columns wanted.

    Returns:
      [batch, dim, state_len] in x's dtype.
    """
    tokens, dim = expect("x", x, ("tokens", "dim"))
    expect("cu_seqlens", cu_seqlens, ("batch+1",))
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    if tokens == 0:
        return x.new_zeros(starts.shape[0], state_len, dim).transpose(1, 2)
    source = ends + torch.arange(-state_len, 0, device=x.device)
    states = x[source.clamp(0, tokens - 1)]
    return torch.where((source >= starts)[:, :, None], states, 0).transpose(1, 2)


def causal_conv1d_varlen_states_ref(x, cu_seqlens, state_len):
    """`causal_conv1d_varlen_states`, row by row; reads the offsets, which synchronises."""
    states = [
        F.pad(x[max(start, end - state_len) : end].t(), (max(state_len - (end - start), 0), 0))
        for start, end in itertools.pairwise(cu_seqlens.tolist())
    ]
    return torch.stack(states) if states else x.new_zeros(0, x.shape[1], state_len)


def _results(out, states, return_final_states, final_states_out):
    """What the peer returns, from token-major out [batch, seqlen, dim] and states [batch, width-1, dim]."""
    out = out.transpose(1, 2)
    if not return_final_states:
        return out
    final = states.transpose(1, 2)
    return out, final.to(out.dtype) if final_states_out is None else final_states_out.copy_(final)


def _packed_by_ids(x, weight, bias, seq_idx, initial_states, activation):
    """Each run of equal ids as a packed row; how many runs there are stays on the device.

    Initial states stand before the first run of their row, as tokens whose outputs are dropped.
    """
    batch, dim, seqlen = x.shape
    expect("seq_idx", seq_idx, ("batch", "seqlen"), batch=batch, seqlen=seqlen)
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seq_idx: expected dtype int32 or int64, got {seq_idx.dtype}")
    packed, history = x.transpose(1, 2), 0
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    if initial_states is not None and initial_states.numel():
        history = initial_states.shape[2]
        dtype = torch.promote_types(x.dtype, initial_states.dtype)
        packed = torch.cat([initial_states.transpose(1, 2).to(dtype), packed.to(dtype)], dim=1)
        begins = F.pad(begins[:, 1:], (history + 1, 0))[:, : history + seqlen]
        begins[:, :1] = True
    tokens = batch * (history + seqlen)
    position = torch.arange(tokens + 1, dtype=torch.int32, device=x.device)
    starts = torch.where(begins.reshape(tokens), position[:-1], tokens).sort().values
    convolve = causal_conv1d if asks_for_gradient(x, weight, bias, initial_states) else packed_fn
    out = convolve(
        packed.reshape(tokens, dim),
        weight,
        bias,
        None,
        torch.cat([starts, position[-1:]]),
        activation=activation,
        schedule="flat",
    ).out
    out = out.view(batch, history + seqlen, dim)[:, history:].to(x.dtype)
    return out.masked_fill(seq_idx[:, :, None] < 0, 0).transpose(1, 2)


class CausalConv1dFn:
    """What the peer calls its autograd function; `apply` is `causal_conv1d_fn`."""

    apply = staticmethod(causal_conv1d_fn)


def causal_conv1d_ref(
    x,
    weight,
    bias=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
    seq_idx=None,
):
    """`causal_conv1d_fn` by its definition, in torch's operations, differentiable; products and sums in float32 or wider.

    Ids are compared token by token, as the peer does it.
    """
    _check_activation(activation)
    width = weight.shape[1]
    history = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    extended = torch.cat([history.to(torch.promote_types(x.dtype, history.dtype)), x], dim=2)
    taps = weight.to(torch.promote_types(weight.dtype, torch.float32))
    windows = extended.to(taps.dtype).unfold(2, width, 1)
    if seq_idx is not None:
        if return_final_states:
            raise Unsupported("return_final_states: expected False together with seq_idx, got True")
        before = torch.full_like(seq_idx[:, :1], -1) if initial_states is None else seq_idx[:, :1]
        ids = torch.cat([before.expand(-1, width - 1), seq_idx], dim=1).unfold(1, width, 1)
        windows = torch.where((ids == seq_idx[:, :, None])[:, None], windows, 0)
    out = (windows * taps[:, None]).sum(3)
    out = out if bias is None else out + bias[:, None].to(out.dtype)
    out = (out if activation is None else F.silu(out)).to(x.dtype)
    if seq_idx is not None:
        out = out.masked_fill(seq_idx[:, None] < 0, 0)
    if not return_final_states:
        return out
    final = extended[:, :, extended.shape[2] - (width - 1) :].to(x.dtype)
    return out, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update_ref(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    """`causal_conv1d_update` by its definition, in torch's operations; row i uses slot i."""
    _check_activation(activation)
    tokens = x if x.dim() == 3 else x[:, :, None]
    state_len, width = conv_state.shape[2], weight.shape[1]
    columns = torch.arange(-state_len, 0, device=x.device)
    if cache_seqlens is not None:  # the slot in the order in which its columns were written
        columns = columns + cache_seqlens[:, None].long()
        order = columns.remainder(state_len)[:, None].expand(-1, x.shape[1], -1)
        slot = conv_state.gather(2, order)
    else:
        slot = conv_state.clone()
    window = slot[:, :, state_len - (width - 1) :]
    out = causal_conv1d_ref(tokens, weight, bias, window, activation=activation)
    new = torch.cat([slot, tokens.to(slot.dtype)], dim=2)[:, :, tokens.shape[2] :]
    if cache_seqlens is None:
        conv_state.copy_(new)
    else:
        order = (columns + tokens.shape[2]).remainder(state_len)[:, None].expand(-1, x.shape[1], -1)
        conv_state.scatter_(2, order, new)
    return out if x.dim() == 3 else out[:, :, 0]


def _check_activation(activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
