"""The operations as PyTorch operators, `torch.ops.twinconv.*`, for tracers: torch.compile, export, fake tensors.

The pool is declared mutable, so functionalisation keeps its order and updates the caller's tensor; nothing but
`out` is returned. Registered below Python's custom_op layer, which costs several times as much a call.
"""

import torch

from oracle.contract import Unsupported
from triton_impl import run

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
_library.impl("causal_conv1d_fn", run.fn, "CompositeExplicitAutograd")
_library.impl("causal_conv1d_update", run.step, "CompositeExplicitAutograd")


@torch.library.register_fake("twinconv::causal_conv1d_fn", lib=_library)
def _(*args):
    run.check_fn(*args, validate=False)
    return torch.empty_like(args[0])


@torch.library.register_fake("twinconv::causal_conv1d_update", lib=_library)
def _(*args):
    run.check_step(*args, validate=False)
    return torch.empty_like(args[0])


causal_conv1d_fn = torch.ops.twinconv.causal_conv1d_fn.default
causal_conv1d_update = torch.ops.twinconv.causal_conv1d_update.default


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
