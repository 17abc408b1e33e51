"""The convolution as models call it: dense rows with a cache, documents or padding, in any usual layout.

Everything here is plain torch around one of three operations: `causal_conv1d`, which reads a cache; `_convolve`, in which
documents begin anew within rows; and `_Stateless`, in which rows begin with zeros. The last two make no state.
"""

import torch
from torch import Tensor

from oracle.contract import ConvOutput, RowsCall, ShortConvCall, check_lengths, normalised
from triton_impl import functional, tracing
from triton_impl.api import causal_conv1d_fn
from triton_impl.call import check
from triton_impl.functional import causal_conv1d
from triton_impl.packed_rows import document_marks


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: Tensor | None = None,
    segment_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    weight_layout: str = "dim_width",
    cache_layout: str = "time",
    want_cache: bool = True,
    activation: str | None = None,
    backend: str = "auto",
) -> ConvOutput:
    """Causal depthwise convolution of dense rows, for models: differentiable, and a cache that is given is read.

    It mutates nothing. Gradients of first order in x, weight, bias and cache. Nothing synchronises but a check of
    lengths on a CPU.

    Args:
      x: [batch, seqlen, dim], or [seqlen, dim] and then no tensor has the batch axis; any strides; float32, float16 or
        bfloat16.
      weight: any of the three dtypes, in `weight_layout`; width 1 to 8.
      bias: [dim], any of the three dtypes, or None.
      cache: the last inputs before x, oldest first, any of the three dtypes, in `cache_layout`: width-1 or width of
        them; None: zeros.
      segment_ids: [batch, seqlen] integer, or None. A document is a run of equal ids: none sees another, and an id that
        comes back is a new one. The cache belongs to the first document, the new cache to the last.
      lengths: [batch] integer, or None: what is behind the first so many tokens is padding. Its outputs are zero, it has
        no gradient, and the new cache ends before it. Checked on a CPU, on another device clamped to [0, seqlen].
      weight_layout: "dim_width" [dim, width], "width_dim" [width, dim], "torch" [dim, 1, width] or "flax" [width, 1, dim].
      cache_layout: "time" [batch, columns, dim] or "channels" [batch, dim, columns].
      want_cache: False: no new cache is made, which costs nothing.
      activation: None, "silu" or "swish".
      backend: as in `causal_conv1d`. Documents cost nothing beside their rows, but for x whose tokens alone have unit stride,
        of which the kernels then take a copy.

    Returns:
      ConvOutput(out, conv_states): `out` in x's shape and dtype; `conv_states` the new cache, as the given one, or
      [batch, width-1, dim] (in `cache_layout`) in x's dtype; None without `want_cache`.

    Raises:
      ValueError, TypeError: as `oracle.contract.ShortConvCall`; tensors on different devices.
      Unsupported: the backend asked for cannot run on these tensors; a gradient of a gradient.
    """
    call = ShortConvCall(
        x, weight, bias, cache, segment_ids, lengths, weight_layout, cache_layout, want_cache, activation, backend
    )  # fmt: skip
    tracing.refuse_odd(call._fields, call)
    sizes = call.check()
    for name in ("segment_ids", "lengths", "cache"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected a tensor on {x.device}, as x is, got one on {tensor.device}")
    if lengths is not None and lengths.device.type == "cpu" and not _is_traced(lengths):
        check_lengths(lengths.reshape(-1).tolist(), sizes.seqlen)
    if sizes.batch is None:
        x, cache, segment_ids, lengths = (
            a if a is None else a.unsqueeze(0) for a in (x, cache, segment_ids, lengths)
        )
    weight = _dim_width(weight, weight_layout)
    history = weight.shape[1] - 1
    if cache is not None and cache_layout == "channels":
        cache = cache.transpose(1, 2)
    whole = x
    if lengths is not None:
        lengths = lengths.clamp(0, sizes.seqlen).long()
        padding = (torch.arange(sizes.seqlen, device=x.device) >= lengths[:, None])[..., None]
        whole = x.masked_fill(padding, 0)  # so that no gradient multiplies what lies there

    window = None if cache is None else cache[:, cache.shape[1] - history :]
    options = dict(activation=activation, backend=backend)
    if segment_ids is not None and history:
        out = _convolve(x, weight, bias, window, document_marks(segment_ids), **options)
    elif window is not None:
        out = causal_conv1d(whole, weight, bias, window, **options).out
    else:
        out = _stateless(whole, weight, bias, options)
    if lengths is not None:
        out = out.masked_fill(padding, 0)
    new = None
    if want_cache:
        columns = history if cache is None else cache.shape[1]
        new = _last_entries(whole, cache, segment_ids, lengths, columns)
        new = new.transpose(1, 2).contiguous() if cache_layout == "channels" else new
    if sizes.batch is None:
        out, new = out.squeeze(0), None if new is None else new.squeeze(0)
    return ConvOutput(out, new)


def _is_traced(tensor):
    return torch.compiler.is_compiling() or tracing.is_seen((tensor,))


def _dim_width(weight, layout):
    if layout == "torch":
        return weight.squeeze(1)
    if layout == "flax":
        weight = weight.squeeze(1)
    return weight if layout == "dim_width" else weight.t()


def _convolve(x, weight, bias, window, marks, activation, backend):
    """`out` of rows in which documents begin, without final states: one launch of equal rows, and so the gradient."""
    call = RowsCall(x, weight, bias, window, None, activation, None, "auto", backend)
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.twinconv.causal_conv1d_forward.default(*call, marks)[0]
    check(call)
    return functional.convolve(*normalised(call), marks)[0]


def _stateless(x, weight, bias, options):
    batch, seqlen, dim = x.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seqlen
    packed = x.reshape(batch * seqlen, dim)
    if torch.compiler.is_dynamo_compiling():  # which takes the operator alone; its states are of no use here
        return causal_conv1d(packed, weight, bias, None, starts, **options, max_seqlen=seqlen).out.view(
            x.shape
        )
    longest = None if torch.jit.is_tracing() else seqlen  # whose sizes are tensors
    more = options["activation"], longest, "auto", options["backend"]
    return _Stateless.apply(packed, weight, bias, starts, *more).view(x.shape)


class _Stateless(torch.autograd.Function):
    """The differentiable form without states: none is read, made or returned."""

    @staticmethod
    def forward(x, weight, bias, starts, activation, max_seqlen, schedule, backend):
        return causal_conv1d_fn(
            x, weight, bias, None, starts,
            activation=activation, max_seqlen=max_seqlen, schedule=schedule, backend=backend,
        ).out  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx, dout):
        x, weight, bias, starts = ctx.saved_tensors
        dx, dweight, dbias, _ = tracing.first_gradient("causal_conv1d_backward")(
            dout, None, x, weight, bias, None, starts, *ctx.options, any(ctx.needs_input_grad[1:3]), False
        )
        gradients = (dx, dweight, None if bias is None else dbias)
        needed = ctx.needs_input_grad
        return *(g if need else None for g, need in zip(gradients, needed, strict=False)), *(None,) * 5

    vmap = staticmethod(tracing.refuse_mapping)
    jvp = staticmethod(tracing.refuse_tangents)


def _last_entries(x, cache, segment_ids, lengths, columns):
    """[batch, columns, dim]: the last entries of cache ++ x, before padding, and zeros before the last document."""
    batch, seqlen, dim = x.shape
    if cache is None:
        cache = x.new_zeros(batch, columns, dim)
    if lengths is None:
        tail = slice(max(seqlen - columns, 0), None)
        entries = torch.cat([cache, x[:, tail].to(cache.dtype)], dim=1)
        entries = entries[:, entries.shape[1] - columns :].contiguous()
        if segment_ids is None or not seqlen or not columns:
            return entries
        ids = segment_ids[:, tail]
        begins = torch.nn.functional.pad(
            ids[:, 1:] != ids[:, :-1], (columns + 1, 0)
        )  # the cache is of the first document
        document = begins.cumsum(1)[:, ids.shape[1] :]
        return entries.masked_fill((document != document[:, -1:])[..., None], 0)
    if not columns or not seqlen:
        return cache.clone()
    index = lengths[:, None] + torch.arange(columns, device=x.device)
    row = torch.arange(batch, device=x.device)[:, None]
    tokens = x[row, (index - columns).clamp(min=0)].to(cache.dtype)
    return torch.where((index < columns)[..., None], cache[row, index.clamp(max=columns - 1)], tokens)
