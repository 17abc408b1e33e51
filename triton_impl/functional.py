"""The differentiable form for training: it mutates nothing and has gradients through both results.

Forward and backward are PyTorch operators, `torch.ops.twinconv.causal_conv1d_forward` and `..._backward`, so that
torch.compile and fake tensors see through them. The forward pass keeps nothing for the backward pass but
its inputs.
"""

from typing import SupportsIndex

import torch
from torch import Tensor

from oracle.contract import ConvOutput, FnCall, RowsCall, RowSizes, normalised
from triton_impl import plain, tracing
from triton_impl.call import (
    check,
    kernels,
    launch_on,
    recall,
    remember,
    resolve,
    run_real,
)
from triton_impl.config import crosses, prefill_config, walks
from triton_impl.packed_rows import (
    folds,
    fresh_states,
    launch_backward,
    owned,
    row_starts,
    rows_of_documents,
)

_ARGUMENTS = ", ".join(tracing.arguments(RowsCall, RowsCall._fields))
tracing.library.define(
    f"causal_conv1d_forward({_ARGUMENTS}, Tensor? document_marks=None) -> (Tensor, Tensor)"
)
tracing.library.define(
    f"causal_conv1d_backward(Tensor? dout, Tensor? dfinal_states, {_ARGUMENTS}, bool need_sums, bool need_initial,"
    " Tensor? document_marks=None) -> (Tensor, Tensor, Tensor, Tensor)"
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    *,
    activation: str | None = None,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> ConvOutput:
    """Causal depthwise convolution of packed or dense rows, for training: differentiable, and it mutates nothing.

    The value is that of `causal_conv1d_fn`, in which each row has a state of its own. Gradients arrive at x, weight,
    bias and initial_states, through `out` and through the final states; they are summed in float32, in an
    order that depends on shapes and on the layout of x alone, and rounded once: the same bits in every run and in
    both schedules. The gradients of x and initial_states have the same bits in every layout of x as well.
    x and upstream gradients may have any strides, and x's gradient is laid out as torch.empty_like(x). They are read
    as they lie, but for an upstream gradient of `out` that is channel-last where x is channel-first, or the reverse:
    that is copied into x's layout first, which takes less time than reading it across; an expanded one is not.
    Channel-first x is read fastest with rows and strides of a multiple of 8 (float32: 4) tokens. Nothing synchronises.

    Args:
      x: [tokens, dim] with `query_start_loc`, or [batch, seqlen, dim] without; float32, float16 or bfloat16.
      weight: [dim, width], any of the three dtypes; width 1 to 8; `weight[:, width-1]` meets the newest token.
      bias: [dim], any of the three dtypes, or None.
      initial_states: [batch, width-1, dim], any of the three dtypes, oldest input first; None: zeros.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; may end before `tokens`.
      activation: None, "silu" or "swish".
      max_seqlen: host int, an upper bound of the longest row in tokens; lets "auto" pick the per_sequence grid.
      schedule: "auto", "per_sequence" or "flat"; both give the same bits.
      backend: "auto" (the kernels on a GPU, eager elsewhere), "triton" or "eager".

    Returns:
      ConvOutput(out, conv_states): `out` in x's shape and dtype, zero for tokens past `query_start_loc[-1]`;
      `conv_states` [batch, width-1, dim], the last inputs of each row behind its initial state, in the
      dtype of `initial_states`, or of x without them.

    Raises:
      ValueError, TypeError: as `oracle.contract.RowsCall`; tensors on different devices.
      Unsupported: the backend asked for cannot run on these tensors; a gradient of a gradient.
    """
    call = RowsCall(
        x, weight, bias, initial_states, query_start_loc, activation, max_seqlen, schedule, backend
    )
    if torch.compiler.is_dynamo_compiling():
        return ConvOutput(*torch.ops.twinconv.causal_conv1d_forward.default(*call))
    check(call)
    return ConvOutput(*_Convolution.apply(*normalised(call)))


def _sizes(x, weight, query_start_loc):
    """The sizes of a checked call."""
    batch = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1
    dim, width = weight.shape
    return RowSizes(x.shape[0] * (x.shape[1] if x.dim() == 3 else 1), dim, width, batch)


def _fold(x):
    """[batch, n, dim] as [n, batch * dim], a view."""
    batch, n, dim = x.shape
    return x.transpose(1, 2).view(batch * dim, n).t()


def _unfold(x, batch):
    """The converse of `_fold`."""
    n, channels = x.shape
    return x.t().view(batch, channels // batch, n).transpose(1, 2)


def _forward(
    x, weight, bias, initial_states, query_start_loc, activation, max_seqlen, schedule, backend, document_marks=None
):  # fmt: skip
    if document_marks is not None:
        given = x, weight, bias, initial_states, document_marks, activation, backend
        return _documents(*given), x.new_empty(0)
    sizes = _sizes(x, weight, query_start_loc)
    states = fresh_states(x, initial_states, sizes)
    starts, longest = row_starts(x, sizes, query_start_loc, max_seqlen)
    folded = folds(x)
    if folded:
        rows, pool, starts = _fold(x), _fold(states)[None], starts[:2]
        weight, bias = weight.repeat(sizes.batch, 1), None if bias is None else bias.repeat(sizes.batch)
    else:  # dense rows at uneven distances, as of a slice of channels of [batch, dim, seqlen] memory, are copied
        rows, pool = x.reshape(sizes.tokens, sizes.dim), states
    has_state = None
    if initial_states is not None:
        has_state = torch.ones(pool.shape[0], dtype=torch.bool, device=x.device)
    call = FnCall(
        rows, weight, bias, pool, starts, None, has_state, activation, -1, longest, schedule, backend
    )
    out = run_real(FnCall, tuple(call))
    out = _unfold(out, sizes.batch) if folded else out.view(x.shape)
    return owned(out), owned(states)


def _documents(x, weight, bias, window, marks, activation, backend):
    """The outputs of rows of documents."""
    batch, seqlen, dim = x.shape
    if not x.numel():
        return x.new_empty(x.shape)
    if resolve(backend, x.device) == "eager":
        tokens, starts = rows_of_documents(x, window, marks)
        packed = tokens.reshape(-1, dim), weight, bias, None, starts
        call = FnCall(*packed, activation=activation, backend=backend)
        out = run_real(FnCall, tuple(call)).view(tokens.shape)[:, tokens.shape[1] - seqlen :]
        return out.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    packed = x.reshape(batch * seqlen, dim)
    packed = packed if walks(*packed.stride()) else packed.contiguous()
    starts, _ = row_starts(x, _sizes(x, weight, None), None, None)
    has_state = None if window is None else torch.ones(batch, dtype=torch.bool, device=x.device)
    call = FnCall(packed, weight, bias, window, starts, None, has_state, activation, max_seqlen=seqlen)
    kernel = kernels("prefill")
    if (launch := recall("documents", call)) is None:
        sizes = call.check()
        config = prefill_config(
            sizes.tokens, dim, batch, sizes.width, True, seqlen, warp_size=kernels("launch").warp_size()
        )
        launch = kernel.prepare(call, sizes, config, stores=False, documents=True)
        remember("documents", call, launch)
    out = torch.empty_like(packed)
    launch_on(x.device, launch, *(getattr(call, name) for name in kernel.ARRAYS), out, marks)
    return out.view(x.shape)


def _backward(
    dout,
    dfinal_states,
    x,
    weight,
    bias,
    initial_states,
    query_start_loc,
    activation,
    max_seqlen,
    schedule,
    backend,
    need_sums,
    need_initial,
    document_marks=None,
):
    sizes = _sizes(x, weight, query_start_loc)
    if dout is None:
        dout = x.new_zeros(()).expand(x.shape)
    starts, longest = row_starts(x, sizes, query_start_loc, max_seqlen)
    if resolve(backend, x.device) == "eager":
        tokens, states, upstream = x, initial_states, dout
        if document_marks is not None:
            tokens, starts = rows_of_documents(x, initial_states, document_marks)
            states, upstream = None, torch.zeros_like(tokens, dtype=dout.dtype)
            upstream[:, tokens.shape[1] - x.shape[1] :] = dout
        packed = -1, sizes.dim
        dx, dweight, dbias, dinitial = plain.backward(
            upstream.reshape(packed),
            dfinal_states,
            tokens.reshape(packed),
            weight,
            bias,
            states,
            starts,
            silu=activation is not None,
        )
        dx = dx.view(tokens.shape)
        if document_marks is not None:
            history = tokens.shape[1] - x.shape[1]
            dx, dinitial = dx[:, history:], dx[:, :history]
            dinitial = dinitial.to(initial_states.dtype).contiguous() if need_initial else None
        dx = torch.empty_like(x).copy_(dx)
    else:
        dx, dweight, dbias, dinitial = _launch(
            dout,
            dfinal_states,
            x,
            weight,
            bias,
            initial_states,
            starts,
            activation is not None,
            longest,
            schedule,
            (need_sums, need_initial),
            document_marks,
        )
    return (
        dx,
        dweight if need_sums else x.new_empty(0),
        dbias if need_sums and bias is not None else x.new_empty(0),
        dinitial if need_initial else x.new_empty(0),
    )


def _launch(dout, dfinal, x, weight, bias, initial_states, starts, silu, max_seqlen, schedule, needs, marks):
    """Runs the kernels on x as it lies in memory, and on dout unless that lies across it; with documents x is walked.

    needs: whether the gradients of weight and bias, and of the initial states, are wanted.
    """
    like, (need_sums, need_initial) = x, needs
    if marks is not None and not walks(*x.stride()[-2:]):
        x = x.contiguous()
    if crosses(dout.shape, dout.stride(), x.stride()):
        dout = torch.empty_like(x, dtype=dout.dtype).copy_(dout)
    sizes = _sizes(x, weight, starts if x.dim() == 2 else None)
    tokens, dim, batch, width = sizes.tokens, sizes.dim, sizes.batch, sizes.width
    tensors = dout, dfinal, x, weight, bias, initial_states, starts
    weight_second = x, weight, dout, dfinal, bias, initial_states, starts
    options = silu, max_seqlen, schedule, need_sums, need_initial, marks is not None
    kept = (*weight_second, *options)
    if (call := recall("backward", kept)) is None:
        backward = kernels("backward")
        config = backward.backward_config(
            tokens, dim, batch, width, backward.run_of(x), max_seqlen, schedule, kernels("launch").warp_size()
        )
        call = backward.prepare(*tensors, silu, need_sums, config, marks is not None)
        remember("backward", kept, call)
    given = () if marks is None else (marks,)
    dx, *others = launch_backward(call, tensors, torch.empty_like(x), needs, given)
    return dx if like is x else torch.empty_like(like).copy_(dx), *others


def _forward_fake(x, weight, bias, initial_states, query_start_loc, *options):
    check(RowsCall(x, weight, bias, initial_states, query_start_loc, *options[:4]))
    if options[4:] and options[4] is not None:
        return x.new_empty(x.shape), x.new_empty(0)
    sizes = _sizes(x, weight, query_start_loc)
    if folds(x):
        out = _unfold(torch.empty_like(_fold(x)), sizes.batch)
    else:
        out = torch.empty_like(x.reshape(sizes.tokens, sizes.dim)).view(x.shape)
    return out, fresh_states(x, initial_states, sizes)


run_backward = _backward  # as a plain function, past the operator


def _backward_fake(
    dout,
    dfinal_states,
    x,
    weight,
    bias,
    initial_states,
    query_start_loc,
    activation,
    max_seqlen,
    schedule,
    backend,
    need_sums,
    need_initial,
    document_marks=None,
):
    return (
        torch.empty_like(x),
        weight.new_empty(weight.shape) if need_sums else x.new_empty(0),
        bias.new_empty(bias.shape) if need_sums and bias is not None else x.new_empty(0),
        initial_states.new_empty(initial_states.shape) if need_initial else x.new_empty(0),
    )


def _keep_inputs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *inputs[9:])
    ctx.options = inputs[5:9]


def _differentiate(ctx, dout, dfinal_states, backward=torch.ops.twinconv.causal_conv1d_backward.default):
    saved = ctx.saved_tensors
    nothing = (None,) * (len(saved) + 4)
    if dout is None and dfinal_states is None:
        return nothing
    needs_x, needs_weight, needs_bias, needs_initial, *_ = ctx.needs_input_grad
    dx, dweight, dbias, dinitial = backward(
        dout, dfinal_states, *saved[:5], *ctx.options, needs_weight or needs_bias, needs_initial, *saved[5:]
    )
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        dinitial if needs_initial else None,
        *nothing[4:],
    )


tracing.register_differentiable(
    "causal_conv1d", (_forward, _forward_fake), (_backward, _backward_fake), _keep_inputs, _differentiate
)
tracing.count_flops("causal_conv1d_forward")
tracing.count_flops(  # less the marks of documents behind what it asks for
    "causal_conv1d_backward", lambda *shapes, **options: tracing.backward_flops(*shapes[:13], **options)
)


class _Convolution(torch.autograd.Function):
    """The operator's autograd again, for torch.func, which does not take it from a registered operator."""

    @staticmethod
    def forward(*arguments):
        return torch.ops.twinconv.causal_conv1d_forward.default(*arguments)

    setup_context = staticmethod(_keep_inputs)

    @staticmethod
    def backward(ctx, dout, dfinal_states):
        return _differentiate(ctx, dout, dfinal_states, tracing.first_gradient("causal_conv1d_backward"))

    vmap = staticmethod(tracing.refuse_mapping)
    jvp = staticmethod(tracing.refuse_tangents)


convolve = _Convolution.apply  # `short_conv` hands it marks of documents, too
