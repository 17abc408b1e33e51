"""The fronts for training: they mutate nothing and are differentiable in all their floating-point arguments.

As `functional`: forward and backward are PyTorch operators, and nothing is kept for the backward pass but the inputs.
"""

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from oracle.contract import ConvOutput, normalised
from oracle.contract_prologue import GatedConvCall, PrologueCall, PrologueFnCall, PrologueOutput
from triton_impl import gated_conv, plain_prologue, tracing
from triton_impl.call import check, front_of, kernels, launch_on, resolve, run_real
from triton_impl.config import walks
from triton_impl.packed_rows import fresh_states, owned, row_starts

_FIELDS = PrologueCall._fields
_DIFFERENTIABLE = ("x", "weight", "bias", "initial_states", "a", "b", "A_log", "dt_bias")
_UPSTREAM = ("dq", "dk", "dv", "dg", "dbeta", "dfinal_states")
_ARGUMENTS = ", ".join(tracing.arguments(PrologueCall, _FIELDS))
tracing.library.define(f"gated_delta_prologue_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
tracing.library.define(
    f"gated_delta_prologue_backward({', '.join(f'Tensor? {name}' for name in _UPSTREAM)}, {_ARGUMENTS}, bool need_sums, "
    f"bool need_initial) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})"
)


def gated_delta_prologue(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    *,
    num_k_heads: SupportsIndex,
    num_v_heads: SupportsIndex,
    head_k_dim: SupportsIndex,
    head_v_dim: SupportsIndex,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    qk_l2norm: bool = True,
    norm_eps: float = 1e-6,
    q_scale: float = 1.0,
    lower_bound: float | None = None,
    norm_rounding: str = "storage",
    beta_rounding: str = "none",
    activation: str | None = "silu",
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> PrologueOutput:
    """The front of a linear-attention layer, for training: `gated_delta_prologue_fn` without a pool, differentiable.

    Gradients arrive at x, weight, bias, initial_states, a, b, A_log and dt_bias, through every result; a rounding inside
    counts as the identity. One kernel computes those of x, weight, bias and initial_states from the inputs alone,
    another those of the gates. Channel-first x, and gradients of q, k and v whose heads do not lie side by side,
    are copied first in the backward pass. Nothing synchronises.

    Args:
      x, weight, bias, initial_states, query_start_loc: as in `causal_conv1d`, with
        dim = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim.
      num_k_heads, num_v_heads, head_k_dim, head_v_dim, a, b, A_log, dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound,
        norm_rounding, beta_rounding: as in `gated_delta_prologue_fn`; the leading axes of a and b are those of x.
      activation, max_seqlen, schedule, backend: as in `causal_conv1d`.

    Returns:
      PrologueOutput(q, k, v, g, beta, conv_states), with the leading axes of x; `conv_states` are the final states, as in
      `causal_conv1d`.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.PrologueCall`; tensors on different devices.
      Unsupported: the backend asked for cannot run on these tensors; a gradient of a gradient.
    """
    call = PrologueCall(
        x, weight, bias, initial_states, query_start_loc, num_k_heads, num_v_heads, head_k_dim, head_v_dim, a, b, A_log,
        dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound, norm_rounding, beta_rounding, activation, max_seqlen,
        schedule, backend,
    )  # fmt: skip
    if torch.compiler.is_dynamo_compiling():
        *found, states = torch.ops.twinconv.gated_delta_prologue_forward.default(*call)
        return PrologueOutput(*front_of(call, found), states)
    check(call)
    q, k, v, g, beta, states = _Prologue.apply(*normalised(call))
    return PrologueOutput(q, k, v, None if a is None else g, None if b is None else beta, states)


def _packed(call):
    """(the call of packed rows, whose pool is new and holds the initial states; sizes; where rows start)"""
    sizes = call.check().conv
    starts, longest = row_starts(call.x, sizes, call.query_start_loc, call.max_seqlen)
    states = fresh_states(call.x, call.initial_states, sizes)
    has_state = None
    if call.initial_states is not None:
        has_state = torch.ones(sizes.batch, dtype=torch.bool, device=call.x.device)

    def flat(tensor):
        axes = call.x.dim() - 1
        return None if tensor is None else tensor.reshape(sizes.tokens, *tensor.shape[axes:])

    more = {name: getattr(call, name) for name in _FIELDS if name in PrologueFnCall._fields}
    more |= {"x": flat(call.x), "a": flat(call.a), "b": flat(call.b), "max_seqlen": longest}
    more |= {"query_start_loc": starts, "conv_states": states, "has_initial_state": has_state}
    return PrologueFnCall(**more), sizes, starts


def _forward(*arguments):
    call = PrologueCall(*arguments)
    packed, _, _ = _packed(call)
    flat, g, beta = run_real(PrologueFnCall, tuple(packed))
    leading = call.x.shape[:-1]
    if call.a is not None:
        g = owned(g.view(*leading, *g.shape[1:]))
    if call.b is not None:
        beta = owned(beta.view(*leading, *beta.shape[1:]))
    return flat, g, beta, owned(packed.conv_states)


def _backward(*arguments):
    count = len(_UPSTREAM)
    upstream, rest, needs = arguments[:count], arguments[count:-2], arguments[-2:]
    call = PrologueCall(*rest)
    packed, sizes, starts = _packed(call)
    grads = []
    for part, width in zip(upstream[:3], plain_prologue.widths(call), strict=True):
        if part is None:
            part = call.x.new_zeros(()).expand(sizes.tokens, width)
        grads.append(part.reshape(sizes.tokens, width))
    dg, dbeta, dfinal = upstream[3:]
    if resolve(call.backend, call.x.device) == "eager" or not call.x.numel():
        dx, dweight, dbias, dinitial = plain_prologue.backward(
            packed, grads, dfinal, starts, call.initial_states
        )
        gates = plain_prologue.gates_backward(packed, dg, dbeta)
    else:
        checked = packed.check()
        x = packed.x if walks(*packed.x.stride()) else packed.x.contiguous()
        dx, dweight, dbias, dinitial = launch_on(
            x.device, kernels("prologue_backward").launch, grads, dfinal, x, call.weight, call.bias, call.initial_states,
            starts, packed, checked, needs, kernels("launch").warp_size(),
        )  # fmt: skip
        gates = launch_on(x.device, kernels("prologue_backward").launch_gates, packed, checked, dg, dbeta)
    wanted = (True, needs[0], needs[0], needs[1], True, True, True, True)
    results = []
    for name, grad, want in zip(_DIFFERENTIABLE, (dx, dweight, dbias, dinitial, *gates), wanted, strict=True):
        given = getattr(call, name)
        absent = given is None or not want
        results.append(call.x.new_empty(0) if absent else owned(grad.reshape(given.shape)))
    return tuple(results)


def _forward_fake(*arguments):
    call = PrologueCall(*arguments)
    check(call)
    states = fresh_states(call.x, call.initial_states, call.check().conv)
    return *plain_prologue.empty_front(call), states


def _backward_fake(*arguments):
    call = PrologueCall(*arguments[len(_UPSTREAM) : -2])
    need_sums, need_initial = arguments[-2:]
    wanted = (True, need_sums, need_sums, need_initial, True, True, True, True)
    results = []
    for name, want in zip(_DIFFERENTIABLE, wanted, strict=True):
        given = getattr(call, name)
        results.append(call.x.new_empty(0) if given is None or not want else given.new_empty(given.shape))
    return tuple(results)


def _backward_flops(*shapes, out_shape=None, **options):
    """Of the convolution alone, as everywhere."""
    call = PrologueCall(*shapes[len(_UPSTREAM) : -2])
    return tracing.backward_flops(None, None, call.x, call.weight, *shapes[-2:])


_SAVED = tuple(name for name in _FIELDS if PrologueCall.KINDS[name].endswith("array"))


def _keep_inputs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    call = PrologueCall(*inputs)
    ctx.save_for_backward(*(getattr(call, name) for name in _SAVED))
    ctx.options = tuple(
        (name, value) for name, value in zip(_FIELDS, inputs, strict=True) if name not in _SAVED
    )


def _differentiate_flat(ctx, dflat, *upstream):
    """`_differentiate` of the operator, whose results may share no memory: q, k and v are one."""
    parts = (None,) * 3
    if dflat is not None:
        call = PrologueCall(**dict(ctx.options), x=ctx.saved_tensors[0], weight=ctx.saved_tensors[1])
        widths = plain_prologue.widths(call)
        tokens = dflat.numel() // sum(widths)
        parts = dflat.split([tokens * width for width in widths])
    return _differentiate(ctx, *parts, *upstream)


def _differentiate(ctx, *upstream, backward=torch.ops.twinconv.gated_delta_prologue_backward.default):
    if all(grad is None for grad in upstream):
        return (None,) * len(_FIELDS)
    call = PrologueCall(**dict(zip(_SAVED, ctx.saved_tensors, strict=True)), **dict(ctx.options))
    needed = dict(zip(_FIELDS, ctx.needs_input_grad, strict=True))
    found = backward(*upstream, *call, needed["weight"] or needed["bias"], needed["initial_states"])
    grads = dict(zip(_DIFFERENTIABLE, found, strict=True))
    return tuple(grads[name] if name in grads and needed[name] else None for name in _FIELDS)


for _name, _impl, _fake in (
    ("gated_delta_prologue_forward", _forward, _forward_fake),
    ("gated_delta_prologue_backward", _backward, _backward_fake),
):
    tracing.library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"twinconv::{_name}", _fake, lib=tracing.library)
torch.library.register_autograd(
    "twinconv::gated_delta_prologue_forward",
    _differentiate_flat,
    setup_context=_keep_inputs,
    lib=tracing.library,
)
torch.library.register_autograd(
    "twinconv::gated_delta_prologue_backward", tracing.refuse_second_gradient, lib=tracing.library
)
tracing.count_flops("gated_delta_prologue_forward")
tracing.count_flops("gated_delta_prologue_backward", _backward_flops)


class _Prologue(torch.autograd.Function):
    """The operator's autograd again, for torch.func, which does not take it from a registered operator."""

    @staticmethod
    def forward(*arguments):
        *found, states = torch.ops.twinconv.gated_delta_prologue_forward.default(*arguments)
        q, k, v, *_ = front_of(PrologueCall(*arguments), found)
        return owned(q), owned(k), owned(v), *found[1:], states

    setup_context = staticmethod(_keep_inputs)

    @staticmethod
    def backward(ctx, *upstream):
        return _differentiate(
            ctx, *upstream, backward=tracing.first_gradient("gated_delta_prologue_backward")
        )

    vmap = staticmethod(tracing.refuse_mapping)
    jvp = staticmethod(tracing.refuse_tangents)


def gated_short_conv(
    bcx: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    *,
    channel_offsets: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> ConvOutput:
    """LFM2's gated convolution for training: C * conv(B * x), differentiable in bcx, weight, bias and initial_states.

    The kernels of `causal_conv1d` between two products in torch: four passes over the tokens where `gated_short_conv_fn` takes
    one. Gradients are float32 inside, and rounded once.

    Args:
      bcx: [tokens, channels] with `query_start_loc`, or [batch, seqlen, channels] without; float32, float16 or bfloat16.
      weight, bias, initial_states, query_start_loc: as in `causal_conv1d`, for u = B * x.
      channel_offsets: as in `gated_short_conv_fn`.
      activation, max_seqlen, schedule, backend: as in `causal_conv1d`.

    Returns:
      ConvOutput(out, conv_states): `out` in the shape of x; `conv_states` the last inputs u of each row.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.GatedConvCall`; tensors on different devices.
      Unsupported: as `causal_conv1d`.
    """
    call = GatedConvCall(
        bcx,
        weight,
        bias,
        initial_states,
        query_start_loc,
        channel_offsets,
        activation,
        max_seqlen,
        schedule,
        backend,
    )
    check(call)
    call = normalised(call)
    function = _RefusingGatedConv.apply
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        # the one takes a function without a gradient for one that gets ctx, the other sees none of its operators
        function = _GatedConv.apply if tracing.asks_for_gradient(*call[:4]) else _GatedConv.forward
    out, states, _ = function(gated_conv.offsets(call), *call[:5], *call[6:])
    return ConvOutput(out, states)


class _GatedConv(torch.autograd.Function):
    """The convolution between two products; keeps the projection and c, the convolution's result.

    A gradient is float32 until it has arrived: autograd through the products would round every step to the projection's dtype.
    """

    @staticmethod
    def forward(offsets, bcx, weight, bias, initial_states, query_start_loc, *options):
        gate_in, gate_out, x = _live_slices(bcx, query_start_loc, offsets, weight)
        c, states = torch.ops.twinconv.causal_conv1d_forward.default(
            gate_in * x, weight, bias, initial_states, query_start_loc, *options
        )
        return gate_out * c, states, c

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs[1:6], output[2])
        ctx.offsets, ctx.options = inputs[0], inputs[6:]

    @staticmethod
    def backward(ctx, dout, dfinal_states, _):
        bcx, weight, bias, initial_states, query_start_loc, c = ctx.saved_tensors
        nothing = (None,) * len(ctx.needs_input_grad)
        if dout is None and dfinal_states is None:
            return nothing
        gate_in, gate_out, x = _live_slices(bcx, query_start_loc, ctx.offsets, weight)
        dc = None
        if dout is not None:
            dout = _live(dout, query_start_loc).float()
            dc = dout * gate_out
        _, needs_x, needs_weight, needs_bias, needs_initial, *_ = ctx.needs_input_grad
        compiled = torch.compiler.is_dynamo_compiling()
        name = "causal_conv1d_backward"
        backward = getattr(torch.ops.twinconv, name).default if compiled else tracing.first_gradient(name)
        du, dweight, dbias, dinitial = backward(
            dc, dfinal_states, (gate_in * x).float(), weight, bias, initial_states, query_start_loc, *ctx.options,
            needs_weight or needs_bias, needs_initial,
        )  # fmt: skip
        dbcx = None
        if needs_x:
            dbcx = torch.zeros(bcx.shape, dtype=torch.float32, device=bcx.device)
            parts = du * x, None if dout is None else dout * c, du * gate_in
            for first, part in zip(ctx.offsets, parts, strict=True):
                if part is not None:
                    dbcx.narrow(-1, first, part.shape[-1]).add_(part)
            dbcx = dbcx.to(bcx.dtype)
        found = dbcx, dweight, dbias, dinitial
        wanted = needs_x, needs_weight, needs_bias, needs_initial
        found = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return None, *found, *nothing[5:]


class _RefusingGatedConv(_GatedConv):
    """What compilers do not take a function with."""

    vmap, jvp = staticmethod(_Prologue.vmap), staticmethod(_Prologue.jvp)


def _live(tensor, query_start_loc):
    """Zeros for what lies behind the last row, which may be NaN."""
    if query_start_loc is None:
        return tensor
    tokens = torch.arange(tensor.shape[0], device=tensor.device)
    return torch.where((tokens < query_start_loc[-1])[:, None], tensor, 0)


def _live_slices(bcx, query_start_loc, offsets, weight):
    """B, C and x."""
    live = _live(bcx, query_start_loc)
    return [live.narrow(-1, first, weight.shape[0]) for first in offsets]
