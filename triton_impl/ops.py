"""The operations as PyTorch operators, `torch.ops.twinconv.*`, for tracers: torch.compile, export, fake tensors.

The pool is declared mutable, so functionalisation keeps its order and updates the caller's tensor; nothing but
`out` is returned. Registered below Python's custom_op layer, which costs several times as much a call.
`*_serving` are the operations with all their arguments; their `out` is flat where it is split, since an operator's
results may not share memory.
"""

import torch

from oracle.contract import Unsupported
from triton_impl import run, serving

_library = torch.library.Library("twinconv", "DEF")
_library.define(
    "causal_conv1d_fn(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor query_start_loc,"
    " Tensor? cache_indices, Tensor? has_initial_state, str? activation, int pad_slot_id, SymInt? max_seqlen,"
    " str schedule, str backend) -> Tensor"
)
_library.define(
    "causal_conv1d_update(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_states, Tensor? cache_indices,"
    " Tensor? query_start_loc, Tensor? num_accepted_tokens, SymInt? max_seqlen,"
    " str? activation, int pad_slot_id, str backend) -> Tensor"
)
_library.define(
    "causal_conv1d_fn_serving(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? conv_states, Tensor query_start_loc,"
    " Tensor? cache_indices, Tensor? has_initial_state, Tensor? cache_seqlens, Tensor? write_indices,"
    " Tensor? snapshot_indices, Tensor? num_computed_tokens, Tensor? track_indices, Tensor? track_lengths,"
    " Tensor? residual, str? activation, int pad_slot_id, SymInt? max_seqlen, str schedule, str backend,"
    " str state_layout, str empty_rows, SymInt? snapshot_block_size, SymInt? channel_offset, SymInt[]? split_sizes)"
    " -> Tensor"
)
_library.define(
    "causal_conv1d_update_serving(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_states,"
    " Tensor? cache_indices, Tensor? query_start_loc, Tensor? num_accepted_tokens, Tensor? cache_seqlens,"
    " Tensor? write_indices, Tensor? track_indices, Tensor(b!)? window_out, Tensor? window_indices,"
    " Tensor? residual, Tensor? tree_parents, SymInt? max_seqlen, str? activation, int pad_slot_id, str backend,"
    " str state_layout, bool commit, SymInt? channel_offset, SymInt[]? split_sizes) -> Tensor"
)
_library.define(
    "commit_windows(Tensor(a!) conv_states, Tensor window_out, Tensor accepted_steps, Tensor? cache_indices,"
    " Tensor? window_indices, int pad_slot_id, str backend) -> ()"
)


def _with_tuple(function):
    """An operator gets `split_sizes`, the last argument, as a list."""

    def call(*args, **options):
        *args, split_sizes = args
        return function(*args, None if split_sizes is None else tuple(split_sizes), **options)

    return call


_library.impl("causal_conv1d_fn", run.fn, "CompositeExplicitAutograd")
_library.impl("causal_conv1d_update", run.step, "CompositeExplicitAutograd")
_library.impl("causal_conv1d_fn_serving", _with_tuple(serving.fn), "CompositeExplicitAutograd")
_library.impl("causal_conv1d_update_serving", _with_tuple(serving.step), "CompositeExplicitAutograd")
_library.impl("commit_windows", serving.commit, "CompositeExplicitAutograd")


@torch.library.register_fake("twinconv::causal_conv1d_fn", lib=_library)
def _(*args):
    run.check_fn(*args, validate=False)
    return torch.empty_like(args[0])


@torch.library.register_fake("twinconv::causal_conv1d_update", lib=_library)
def _(*args):
    run.check_step(*args, validate=False)
    return torch.empty_like(args[0])


@torch.library.register_fake("twinconv::causal_conv1d_fn_serving", lib=_library)
def _(*args):
    _with_tuple(serving.check_fn)(*args, validate=False)
    return _empty_out(*args)


@torch.library.register_fake("twinconv::causal_conv1d_update_serving", lib=_library)
def _(*args):
    _with_tuple(serving.check_step)(*args, validate=False)
    return _empty_out(*args)


@torch.library.register_fake("twinconv::commit_windows", lib=_library)
def _(*args):
    serving.check_commit(*args, validate=False)


def _empty_out(x, weight, *rest):
    channel_offset, split_sizes = rest[-2:]
    return serving.empty_out(serving.input_channels(x, weight, channel_offset), split_sizes)


causal_conv1d_fn = torch.ops.twinconv.causal_conv1d_fn.default
causal_conv1d_update = torch.ops.twinconv.causal_conv1d_update.default
causal_conv1d_fn_serving = torch.ops.twinconv.causal_conv1d_fn_serving.default
causal_conv1d_update_serving = torch.ops.twinconv.causal_conv1d_update_serving.default
commit_windows = torch.ops.twinconv.commit_windows.default


class NoGradient(torch.autograd.Function):
    """Passes `out` on and ties it to the inputs that ask for a gradient, so that a backward pass cannot miss it."""

    @staticmethod
    def forward(ctx, out, *inputs):
        return out

    @staticmethod
    def backward(ctx, *grads):
        raise Unsupported(
            "backward: expected a call under torch.no_grad() or torch.inference_mode(), got one whose gradient is "
            "asked for (the differentiable form is triton_impl.functional.causal_conv1d)"
        )
