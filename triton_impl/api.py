"""The public operations of the Torch twin: check, choose, launch."""

import torch
import triton

from oracle.contract import (
    ConvOutput,
    Unsupported,
    check_backend,
    check_causal_conv1d_fn,
    check_causal_conv1d_update,
    check_fn_values,
    check_update_values,
)
from triton_impl import eager, prefill, update
from triton_impl.config import prefill_config, update_config

BACKENDS = ("triton", "eager")


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
      Unsupported: the backend asked for cannot run on these tensors.
    """
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule,
        backend=backend, validate=validate,
    )  # fmt: skip
    _check_devices(
        x, weight=weight, bias=bias, conv_states=conv_states, query_start_loc=query_start_loc,
        cache_indices=cache_indices, has_initial_state=has_initial_state,
    )  # fmt: skip
    if validate:
        check_fn_values(
            query_start_loc.tolist(),
            None if cache_indices is None else cache_indices.tolist(),
            sizes.tokens,
            None if conv_states is None else sizes.num_slots,
            pad_slot_id,
            max_seqlen,
        )
    if _resolve(backend, x) == "eager":
        out = eager.prefill(
            x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
            silu=activation is not None, pad_slot_id=pad_slot_id,
        )  # fmt: skip
        return ConvOutput(out, conv_states)
    config = prefill_config(
        sizes.tokens, sizes.dim, sizes.batch, x.element_size(), x.stride(1) == 1 or x.stride(0) != 1,
        max_seqlen, schedule,
    )  # fmt: skip
    with torch.cuda.device_of(x):
        out = prefill.launch(
            x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
            silu=activation is not None, pad_slot_id=pad_slot_id, config=config,
        )  # fmt: skip
    return ConvOutput(out, conv_states)


def causal_conv1d_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    activation=None,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
):
    """One decode step: every live row continues from its slot, and all its tokens are committed to it.

    Args:
      x: [batch, dim] or [batch, seqlen, dim] float32, float16 or bfloat16, any strides.
      weight, bias, conv_states: as in `causal_conv1d_fn`; `conv_states` is required and updated in place.
      cache_indices: [batch] integer slots, any stride; None: row i uses slot i.
      activation, pad_slot_id, backend, validate: as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` has x's shape and dtype, zero for padding rows.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    sizes = check_causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices,
        activation=activation, pad_slot_id=pad_slot_id, backend=backend, validate=validate,
    )  # fmt: skip
    _check_devices(x, weight=weight, bias=bias, conv_states=conv_states, cache_indices=cache_indices)
    if validate:
        check_update_values(
            None if cache_indices is None else cache_indices.tolist(),
            sizes.batch,
            sizes.seqlen,
            sizes.num_slots,
            pad_slot_id,
        )
    if _resolve(backend, x) == "eager":
        out = eager.update(
            x, weight, bias, conv_states, cache_indices, silu=activation is not None, pad_slot_id=pad_slot_id
        )
        return ConvOutput(out, conv_states)
    config = update_config(sizes.batch, sizes.dim, x.element_size())
    with torch.cuda.device_of(x):
        out = update.launch(
            x, weight, bias, conv_states, cache_indices,
            silu=activation is not None, pad_slot_id=pad_slot_id, config=config,
        )  # fmt: skip
    return ConvOutput(out, conv_states)


def _check_devices(x, **others):
    device = x.device
    for name, tensor in others.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on x's device {device}, got {tensor.device}")


def _resolve(backend, x):
    check_backend(backend, BACKENDS)
    if backend == "auto":
        return "triton" if x.is_cuda else "eager"
    if backend == "triton" and not x.is_cuda and not triton.knobs.runtime.interpret:
        raise Unsupported(
            f"backend: 'triton' runs on CUDA or ROCm tensors, or on CPU tensors with TRITON_INTERPRET=1; got {x.device}"
        )
    return backend
