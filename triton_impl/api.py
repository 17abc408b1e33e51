"""The public operations of the Torch twin: plain calls go straight to the kernel, traced ones through an operator."""

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from oracle.contract import ConvOutput, Unsupported
from triton_impl import ops, run


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    activation=None,
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
):
    """Causal depthwise convolution over packed rows, reading and leaving each row's window in its slot.

    Nothing is read back from the device unless `validate` is set, so the call never synchronises and can
    be captured in a CUDA graph.

    Args:
      x: [tokens, dim] float32, float16 or bfloat16, any strides; fast when `dim` or `tokens` has unit stride.
      weight: [dim, width], any of the three dtypes, any strides; width 1 to 8; `weight[:, width-1]` meets
        the newest token.
      bias: [dim], any of the three dtypes, or None.
      conv_states: [num_slots, state_len, dim], any of the three dtypes, any strides, state_len >= width-1,
        oldest input first; updated in place. None: rows start from zeros and nothing is stored.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; may end before `tokens`.
      cache_indices: [batch] integer slots, any stride; None: row i uses slot i.
      has_initial_state: [batch] bool; None: no row has a state.
      activation: None, "silu" or "swish".
      pad_slot_id: slot number of padding rows; slots outside [0, num_slots) are padding as well.
      max_seqlen: host int, an upper bound of the longest row in tokens; lets "auto" pick the per_sequence grid.
      schedule: "auto", "per_sequence" or "flat"; both give the same bits.
      backend: "auto" (the kernel on a GPU, eager elsewhere), "triton" or "eager".
      validate: read the index data (this synchronises) and raise on bad values before anything is written.

    Returns:
      ConvOutput(out, conv_states): `out` [tokens, dim] in x's dtype, zero for padding rows and for tokens past
      `query_start_loc[-1]`; `conv_states` is the tensor passed in.

    Raises:
      ValueError, TypeError: as `oracle.contract.check_causal_conv1d_fn`; tensors on different devices;
        with `validate`, bad offsets, slots or max_seqlen.
      Unsupported: the backend asked for cannot run on these tensors; a backward pass; `validate` in a traced call.
    """
    args = (
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation, pad_slot_id, max_seqlen, schedule, backend,
    )  # fmt: skip
    return ConvOutput(_call(run.fn, ops.causal_conv1d_fn, args, validate), conv_states)


def causal_conv1d_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    query_start_loc=None,
    num_accepted_tokens=None,
    max_seqlen=None,
    activation=None,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
):
    """One decode step: every live row continues from its slot.

    All tokens are committed, or, with `num_accepted_tokens`, the slot rolls: it keeps every new token behind the
    window, and the next step's count tells where the window then begins.

    Args:
      x: [batch, dim], [batch, seqlen, dim], or [tokens, dim] with `query_start_loc`; float32, float16 or bfloat16,
        any strides.
      weight, bias, conv_states: as in `causal_conv1d_fn`; `conv_states` is required and updated in place; with
        `num_accepted_tokens`, state_len >= width-1 + n-1 for rows of up to n tokens.
      cache_indices: [batch] integer slots, any stride; None: row i uses slot i.
      query_start_loc: [batch+1] int32 or int64: row i owns tokens `[i]` to `[i+1]`, none or more; or None.
      num_accepted_tokens: [batch] integer, any stride: how many tokens of each row's previous step were accepted,
        at least 1 (0 counts as 1); or None.
      max_seqlen: host int, an upper bound of the longest row; only with `query_start_loc`.
      activation, pad_slot_id, backend, validate: as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` has x's shape and dtype, zero for padding rows.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    args = (
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens,
        max_seqlen, activation, pad_slot_id, backend,
    )  # fmt: skip
    return ConvOutput(_call(run.step, ops.causal_conv1d_update, args, validate), conv_states)


def causal_conv1d_update_(
    x, weight, bias, conv_states, cache_indices, activation, pad_slot_id, validate=False
):
    """`causal_conv1d_update` whose result replaces x; returns x. Not public: what in-place peers are made of."""
    dense = x.is_contiguous() or x.mT.is_contiguous()
    if dense and not (_traced(x) or asks_for_gradient(x, weight, bias)):
        args = (
            x, weight, bias, conv_states, cache_indices, None, None, None, activation, pad_slot_id, "auto", validate,
        )  # fmt: skip
        return run.step(*args, out=x)
    out, _ = causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices,
        activation=activation, pad_slot_id=pad_slot_id, validate=validate,
    )  # fmt: skip
    return x.copy_(out)


def _call(direct, operator, args, validate):
    """Runs `direct`, which is quicker than an operator, wherever no tracer needs to see the call."""
    x, weight, bias = args[:3]
    traced = _traced(x)
    if traced and validate:
        raise Unsupported("validate: expected False where the call is traced, since it reads data, got True")
    if asks_for_gradient(x, weight, bias):
        with torch.no_grad():
            out = operator(*args) if traced else direct(*args, validate)
        return ops.NoGradient.apply(out, x, weight, bias)
    return operator(*args) if traced else direct(*args, validate)


def _traced(x):
    return is_compiling() or (type(x) is not Tensor and isinstance(x, Tensor))


def asks_for_gradient(*tensors):
    """Whether a call with these tensors, or None, is to be differentiated."""
    return is_grad_enabled() and any(
        isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors
    )
