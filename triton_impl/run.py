"""One call on real tensors: check, choose a backend, launch.

`triton_impl.api` comes here directly, `triton_impl.ops` through PyTorch's dispatcher. Parameters are those of
the public operations; `out` alone is returned, `conv_states` is updated in place.
"""

import functools

import torch
import triton

try:
    from torch._C._dynamo.guards import _empty_strided_cuda
except ImportError:
    _empty_strided_cuda = None

from oracle.contract import (
    FnCall,
    Unsupported,
    UpdateCall,
    check_backend,
    check_causal_conv1d_fn,
    check_causal_conv1d_update,
    check_fn_values,
    check_update_values,
)
from triton_impl import eager, prefill, update, verify
from triton_impl.config import kernel_of, prefill_config, update_config, verify_config, walks
from triton_impl.launch import warp_size
from triton_impl.prepared import recall, remember

BACKENDS = ("triton", "eager")


def check_fn(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
    activation, pad_slot_id, max_seqlen, schedule, backend, validate,
):  # fmt: skip
    """Everything that can be checked without reading data; returns the sizes of the call."""
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule,
        backend=backend, validate=validate,
    )  # fmt: skip
    check_backend(backend, BACKENDS)
    _check_devices(
        x, weight=weight, bias=bias, conv_states=conv_states, query_start_loc=query_start_loc,
        cache_indices=cache_indices, has_initial_state=has_initial_state,
    )  # fmt: skip
    return sizes


def fn(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
    activation, pad_slot_id, max_seqlen, schedule, backend, validate=False,
):  # fmt: skip
    tensors = x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state
    options = activation, pad_slot_id, max_seqlen, schedule, backend
    key, call = (None, None) if validate else recall("fn", tensors, options)
    if call is None:
        sizes = check_fn(*tensors, *options, validate)
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
            return eager.prefill(*tensors, silu=activation is not None, pad_slot_id=pad_slot_id)
        if not x.numel():
            return torch.empty_like(x)
        config = prefill_config(
            sizes.tokens, sizes.dim, sizes.batch, sizes.width, walks(*x.stride()),
            max_seqlen, schedule, warp_size(),
        )  # fmt: skip
        call = prefill.prepare(FnCall(*tensors, *options), sizes, config, stores=True)
        call.result = quick_result(x)
        remember(key, call)
    out = new_result(call, x)
    offsets = unit_stride(query_start_loc)
    _launch(call, x, x, weight, bias, conv_states, offsets, cache_indices, has_initial_state, None, None, out)
    return out


def check_step(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens,
    max_seqlen, activation, pad_slot_id, backend, validate,
):  # fmt: skip
    """Everything that can be checked without reading data; returns the sizes of the call."""
    sizes = check_causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices, query_start_loc=query_start_loc,
        num_accepted_tokens=num_accepted_tokens, max_seqlen=max_seqlen, activation=activation,
        pad_slot_id=pad_slot_id, backend=backend, validate=validate,
    )  # fmt: skip
    check_backend(backend, BACKENDS)
    _check_devices(
        x, weight=weight, bias=bias, conv_states=conv_states, cache_indices=cache_indices,
        query_start_loc=query_start_loc, num_accepted_tokens=num_accepted_tokens,
    )  # fmt: skip
    return sizes


def step(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens,
    max_seqlen, activation, pad_slot_id, backend, validate=False, out=None,
):  # fmt: skip
    """`out` may be x itself, if it is laid out as torch.empty_like(x) would be: each element is read before it is written."""
    tensors = x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens
    options = max_seqlen, activation, pad_slot_id, backend
    key, call = (None, None) if validate else recall("step", tensors, options)
    if call is None:
        sizes = check_step(*tensors, *options, validate)
        if validate:
            slots, offsets, counts = (
                None if tensor is None else tensor.tolist()
                for tensor in (cache_indices, query_start_loc, num_accepted_tokens)
            )
            check_update_values(slots, sizes, pad_slot_id, offsets, counts, max_seqlen)
        if _resolve(backend, x) == "eager":
            result = eager.update(*tensors, silu=activation is not None, pad_slot_id=pad_slot_id)
            return result if out is None else out.copy_(result)
        if not x.numel():
            return torch.empty_like(x) if out is None else out
        record = UpdateCall(*tensors, *options)
        if kernel_of(record) == "token":
            config = update_config(sizes.batch, sizes.dim, x.element_size(), warp_size())
            call = update.prepare(record, sizes, config)
        else:
            call = verify.prepare(record, sizes, verify_config(sizes.dim, x.element_size(), warp_size()))
        call.result = quick_result(x)
        remember(key, call)
    if out is None:
        out = new_result(call, x)
    if kernel_of(UpdateCall(*tensors)) == "token":
        _launch(call, x, *tensors[:5], out)
    else:
        _launch(call, x, *tensors[:5], unit_stride(query_start_loc), num_accepted_tokens, *(None,) * 6, out)
    return out


def unit_stride(offsets):
    """The offsets as the kernels read them; a copy if they are a strided view."""
    return offsets if offsets is None or offsets.stride(0) == 1 else offsets.contiguous()


def quick_result(x):
    """A function that makes `torch.empty_like(x)` past PyTorch's dispatcher, or None where it might make another.

    It is the allocation of compiled graphs, has no public name, and works on the current device.
    """
    if _empty_strided_cuda is None or not x.is_cuda or _several_devices():
        return None
    like = torch.empty_like(x, device="meta")
    return functools.partial(_empty_strided_cuda, tuple(like.shape), like.stride(), like.dtype)


def new_result(call, x):
    """`torch.empty_like(x)`, quickly unless it is to be filled."""
    if call.result is None or torch.are_deterministic_algorithms_enabled():
        return torch.empty_like(x)
    return call.result()


@functools.cache
def _several_devices():
    return torch.cuda.device_count() > 1


def _launch(call, x, *tensors):
    """Launches on x's device, which need not be the current one."""
    if _several_devices() and x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            call(*tensors)
    else:
        call(*tensors)


def _check_devices(x, first="x", **others):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{first}: expected a torch.Tensor, got {type(x).__name__}")
    device = x.device
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {first}'s device {device}, got {tensor.device}")


def _resolve(backend, x):
    if backend == "auto":
        return "triton" if x.is_cuda else "eager"
    if backend == "triton" and not x.is_cuda and not triton.knobs.runtime.interpret:
        raise Unsupported(
            f"backend: 'triton' runs on CUDA or ROCm tensors, or on CPU tensors with TRITON_INTERPRET=1; got {x.device}"
        )
    return backend
