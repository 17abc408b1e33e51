"""The fronts for training: they mutate nothing and are differentiable in all their floating-point arguments.

As `functional`: forward and backward are PyTorch operators, and nothing is kept for the backward pass but the inputs.
"""

import functools
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from oracle.contract import ConvOutput, FnCall, normalised
from oracle.contract_prologue import (
    GatedConvCall,
    GatedConvFnCall,
    PrologueCall,
    PrologueFnCall,
    PrologueOutput,
)
from triton_impl import gated_conv, plain_prologue, tracing
from triton_impl.call import check, front_of, kernels, launch_on, recall, remember, resolve, run_real
from triton_impl.config import walks
from triton_impl.functional import run_backward
from triton_impl.packed_rows import fresh_states, launch_backward, owned, row_starts

_FIELDS = PrologueCall._fields
_DIFFERENTIABLE = ("x", "weight", "bias", "initial_states", "a", "b", "A_log", "dt_bias")
_UPSTREAM = ("dq", "dk", "dv", "dg", "dbeta", "dfinal_states")
_ARGUMENTS = ", ".join(tracing.arguments(PrologueCall, _FIELDS))
tracing.library.define(f"gated_delta_prologue_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
tracing.library.define(
    f"gated_delta_prologue_backward({', '.join(f'Tensor? {name}' for name in _UPSTREAM)}, {_ARGUMENTS}, bool need_sums, "
    f"bool need_initial) -> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})"
)
_OF_GATED = ("bcx", "weight", "bias", "initial_states")
_ARGUMENTS = ", ".join(tracing.arguments(GatedConvCall, GatedConvCall._fields))
tracing.library.define(f"gated_short_conv_forward({_ARGUMENTS}) -> (Tensor, Tensor)")
tracing.library.define(
    f"gated_short_conv_backward(Tensor? dout, Tensor? dfinal_states, {_ARGUMENTS}, bool need_sums, bool need_initial)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
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
    record, of_tokens = PrologueFnCall, ("x", "a", "b")
    if isinstance(call, GatedConvCall):
        record, of_tokens = GatedConvFnCall, ("bcx",)
    x, sizes = getattr(call, of_tokens[0]), call.check().conv
    starts, longest = row_starts(x, sizes, call.query_start_loc, call.max_seqlen)
    states = fresh_states(x, call.initial_states, sizes)
    has_state = None
    if call.initial_states is not None:
        has_state = torch.ones(sizes.batch, dtype=torch.bool, device=x.device)

    def flat(tensor):
        return None if tensor is None else tensor.reshape(sizes.tokens, *tensor.shape[x.dim() - 1 :])

    more = {name: getattr(call, name) for name in call._fields if name in record._fields}
    more |= {name: flat(more[name]) for name in of_tokens}
    more |= {"max_seqlen": longest, "query_start_loc": starts}
    more |= {"conv_states": states, "has_initial_state": has_state}
    return record(**more), sizes, starts


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
    return _empty_gradients(PrologueCall(*arguments[len(_UPSTREAM) : -2]), _DIFFERENTIABLE, arguments[-2:])


def _empty_gradients(call, differentiable, needs):
    """Of the shapes of the arguments with these names: what has tokens, weight, bias and initial states first."""
    need_sums, need_initial = needs
    wanted = (True, need_sums, need_sums, need_initial, *[True] * (len(differentiable) - 4))
    given = [getattr(call, name) for name in differentiable]
    return tuple(
        given[0].new_empty(0) if array is None or not want else array.new_empty(array.shape)
        for array, want in zip(given, wanted, strict=True)
    )


def _backward_flops(*shapes, out_shape=None, **options):
    """Of the convolution alone, as everywhere."""
    call = PrologueCall(*shapes[len(_UPSTREAM) : -2])
    return tracing.backward_flops(None, None, call.x, call.weight, *shapes[-2:])


def _saved(record):
    return tuple(name for name in record._fields if record.KINDS[name].endswith("array"))


def _keep_inputs(ctx, inputs, output, record=PrologueCall):
    ctx.set_materialize_grads(False)
    saved, call = _saved(record), record(*inputs)
    ctx.save_for_backward(*(getattr(call, name) for name in saved))
    ctx.options = tuple(
        (name, value) for name, value in zip(record._fields, inputs, strict=True) if name not in saved
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
    return _gradients(ctx, upstream, PrologueCall, _DIFFERENTIABLE, backward)


def _gradients(ctx, upstream, record, differentiable, backward):
    """Those of a record's fields, by its operator `backward`; None for what is not differentiable or not asked for."""
    fields = record._fields
    if all(grad is None for grad in upstream):
        return (None,) * len(fields)
    call = record(**dict(zip(_saved(record), ctx.saved_tensors, strict=True)), **dict(ctx.options))
    needed = dict(zip(fields, ctx.needs_input_grad, strict=True))
    found = backward(*upstream, *call, needed["weight"] or needed["bias"], needed["initial_states"])
    grads = dict(zip(differentiable, found, strict=True))
    return tuple(grads[name] if name in grads and needed[name] else None for name in fields)


tracing.register_differentiable(
    "gated_delta_prologue",
    (_forward, _forward_fake),
    (_backward, _backward_fake),
    _keep_inputs,
    _differentiate_flat,
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

    Forward it is `gated_short_conv_fn` without a pool, and backward one pass as well, where B, C and x are all of the projection and
    its channels lie side by side; else the convolution is computed again and differentiated between products in torch.
    Gradients are float32 inside, and rounded once; a rounding inside counts as the identity.

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
    if torch.compiler.is_dynamo_compiling():
        return ConvOutput(*torch.ops.twinconv.gated_short_conv_forward.default(*call))
    check(call)
    return ConvOutput(*_GatedConv.apply(*normalised(call)))


def _forward_gated(*arguments):
    call = GatedConvCall(*arguments)
    packed, sizes, _ = _packed(call)
    out = run_real(GatedConvFnCall, tuple(packed))
    return owned(out.view(*call.bcx.shape[:-1], sizes.dim)), owned(packed.conv_states)


def _backward_gated(dout, dfinal, *arguments):
    needs, call = arguments[-2:], GatedConvCall(*arguments[:-2])
    packed, sizes, starts = _packed(call)
    bcx, dim, initial = packed.bcx, sizes.dim, call.initial_states
    if dout is not None:
        dout = dout.reshape(sizes.tokens, dim)
    whole = sorted(gated_conv.offsets(call)) == [0, dim, 2 * dim] and bcx.shape[-1] == 3 * dim
    real = bcx.numel() and resolve(call.backend, bcx.device) != "eager"
    differentiate = _launch_gated if real and whole and bcx.stride(-1) == 1 else _composed
    dbcx, dweight, dbias, dinitial = differentiate(dout, dfinal, packed, initial, starts, needs)
    return (
        owned(dbcx.view(call.bcx.shape)),
        dweight if needs[0] else bcx.new_empty(0),
        dbias if needs[0] and call.bias is not None else bcx.new_empty(0),
        dinitial if needs[1] else bcx.new_empty(0),
    )


def _launch_gated(dout, dfinal, call, initial_states, starts, needs):
    """The kernels of `backward` on the three slices as they lie, each of whose gradients takes its place in bcx's."""
    bcx, dim, of_x = call.bcx, call.weight.shape[0], gated_conv.offsets(call)[2]
    if dout is None:
        dout = bcx.new_zeros(()).expand(bcx.shape[0], dim)
    others = call.weight, call.bias, initial_states, starts
    options = call.channel_offsets, call.activation, call.max_seqlen, call.schedule
    kept = (bcx, *others, dout, dfinal, *options, *needs)
    if (prepared := recall("gated backward", kept)) is None:
        prepare = kernels("prologue_backward").prepare_gated
        prepared = prepare(
            dout, dfinal, call, initial_states, starts, needs[0], kernels("launch").warp_size()
        )
        remember("gated backward", kept, prepared)
    dbcx = torch.empty_like(bcx)
    x, dx = (tensor.narrow(-1, of_x, dim) for tensor in (bcx, dbcx))
    _, *found = launch_backward(prepared, (dout, dfinal, x, *others), dx, needs)
    return dbcx, *found


def _composed(dout, dfinal, call, initial_states, starts, needs):
    """The convolution computed again and differentiated, between products in torch."""
    live = (torch.arange(call.bcx.shape[0], device=call.bcx.device) < starts[-1])[:, None]
    gate_in, gate_out, x = (torch.where(live, part, 0) for part in gated_conv.slices(call))
    u = gate_in * x
    dc = None
    if dout is not None:
        c = run_real(FnCall, tuple(call.convolution()._replace(x=u)))
        dout = torch.where(live, dout, 0).float()
        dc = dout * gate_out
    du, *found = run_backward(
        dc, dfinal, u.float(), call.weight, call.bias, initial_states, starts, call.activation, call.max_seqlen,
        call.schedule, call.backend, *needs,
    )  # fmt: skip
    dbcx = torch.zeros(call.bcx.shape, dtype=torch.float32, device=call.bcx.device)
    parts = du * x, None if dout is None else dout * c, du * gate_in
    for first, part in zip(gated_conv.offsets(call), parts, strict=True):
        if part is not None:
            dbcx.narrow(-1, first, part.shape[-1]).add_(part)
    return dbcx.to(call.bcx.dtype), *found


def _forward_gated_fake(*arguments):
    call = GatedConvCall(*arguments)
    check(call)
    sizes = call.check().conv
    return call.bcx.new_empty(*call.bcx.shape[:-1], sizes.dim), fresh_states(
        call.bcx, call.initial_states, sizes
    )


def _backward_gated_fake(dout, dfinal, *arguments):
    return _empty_gradients(GatedConvCall(*arguments[:-2]), _OF_GATED, arguments[-2:])


def _gated_backward_flops(dout, dfinal, bcx, weight, *rest, out_shape=None, **options):
    return tracing.backward_flops(dout, dfinal, torch.Size((*bcx[:-1], weight[0])), weight, *rest)


class _GatedConv(torch.autograd.Function):
    """As `_Prologue`."""

    @staticmethod
    def forward(*arguments):
        return torch.ops.twinconv.gated_short_conv_forward.default(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep_inputs(ctx, inputs, output, GatedConvCall)

    @staticmethod
    def backward(ctx, *upstream, backward=None):
        backward = backward or tracing.first_gradient("gated_short_conv_backward")
        return _gradients(ctx, upstream, GatedConvCall, _OF_GATED, backward)

    vmap = staticmethod(tracing.refuse_mapping)
    jvp = staticmethod(tracing.refuse_tangents)


tracing.register_differentiable(
    "gated_short_conv",
    (_forward_gated, _forward_gated_fake),
    (_backward_gated, _backward_gated_fake),
    _GatedConv.setup_context,
    functools.partial(_GatedConv.backward, backward=torch.ops.twinconv.gated_short_conv_backward.default),
)
tracing.count_flops("gated_short_conv_forward")
tracing.count_flops("gated_short_conv_backward", _gated_backward_flops)
