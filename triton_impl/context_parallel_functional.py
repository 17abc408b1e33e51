"""Context parallel training: the differentiable form with the packed tokens split over ranks, in order.

Forward, a rank needs the last width-1 tokens before its part. Backward, it needs the first width-1 tokens after its
part and their upstream gradient: from these it computes again what the later ranks' outputs give to its own last
tokens. So `dx` is summed in one place, in the order of one device, and rounded once; sending finished gradients back
would add up rounded sums. It costs as many bytes as a float32 gradient would. Neither exchange makes the main
kernel wait: the width-1 tokens at the cut are computed again, by plain calls of the operation.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from triton_impl import context_parallel, functional


def causal_conv1d(
    x,
    weight,
    bias,
    query_start_loc,
    *,
    group=None,
    part_lengths=None,
    sum_weight_gradients=False,
    activation=None,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
):
    """`causal_conv1d` with the tokens of x split over the ranks of a process group; it mutates nothing.

    Every rank calls it, and every rank runs the backward pass through its `out`, each with the same inputs that ask
    for gradients. Every argument but x is the whole of it, the same on every rank. Rows begin with zeros: there are
    no initial and final states here. Nothing synchronises with the host.

    `dx` has the bits of one device. `dweight` and `dbias` are sums over the tokens of this rank's part, so that the
    gradient of a loss that is a sum over ranks is their sum over ranks; see `sum_weight_gradients`.

    Args:
      x: [part_lengths[rank], dim]: this rank's part of the packed tokens; float32, float16 or bfloat16. Rows may
        cross the cuts, any number of them.
      weight: [dim, width]; bias: [dim] or None; any of the three dtypes; width 1 to 8.
      query_start_loc: [batch+1] int32 or int64, offsets into the whole.
      group: the process group; None: the default one.
      part_lengths: host ints, tokens of each rank's part (0 is a length); None: all equal to this rank's.
      sum_weight_gradients: False: dweight and dbias are this rank's part, rounded to the dtype of weight and bias,
        for a caller who sums them, as data parallel wrappers over these ranks do. True: the sum over the ranks, added
        in float32 in the order of the ranks and rounded once; the same bits on every rank and in every run. It
        gathers [ranks, dim, width+1] float32.
      activation, max_seqlen, schedule, backend: as in `triton_impl.causal_conv1d`.

    Returns:
      [part_lengths[rank], dim]: this rank's part of `out`, with the bits of one device.

    Raises:
      ValueError: `part_lengths` does not fit the group or x; no `query_start_loc`.
      ValueError, TypeError, Unsupported: as `triton_impl.causal_conv1d`; a gradient of a gradient.
    """
    if query_start_loc is None:
        raise ValueError("query_start_loc: expected offsets into the whole, [batch+1], got None")
    functional._check(x, weight, bias, None, query_start_loc, activation, max_seqlen, schedule, backend)
    lengths = context_parallel._check_parts(part_lengths, x.shape[0], group)
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    offsets = query_start_loc.long().clamp(0, begins[-1])
    offsets[0] = 0
    part = _Part(dist.get_rank(group), begins, group, (activation, max_seqlen, schedule, backend))
    return _Convolution.apply(x, weight, bias, offsets, part, bool(sum_weight_gradients))


class _Part(NamedTuple):
    """Where this rank's tokens lie in the whole, `begins[rank]` to `begins[rank + 1]`, and the call's options."""

    rank: int
    begins: list[int]
    group: object
    options: tuple

    @property
    def begin(self):
        return self.begins[self.rank]

    def before(self, x, history):
        return context_parallel._receive_halo(x, history, self.begins, self.rank, self.group)

    def after(self, x, history):
        """[history, dim]: the tokens after this part; zeros past the last token."""
        wanted = [(end, end + history) for end in self.begins[1:]]
        return context_parallel._receive(x, wanted, self.begins, self.rank, self.group)

    def options_of(self, count):
        """The options of a plain call with `count` tokens: no row there is longer."""
        activation, max_seqlen, schedule, backend = self.options
        return activation, None if max_seqlen is None else min(max_seqlen, count), schedule, backend


def _windows(halo, offsets, begin):
    """[batch, width-1, dim]: the tokens before the cut that belong to the row that crosses it, zeros elsewhere."""
    position = begin - len(halo) + torch.arange(len(halo), device=halo.device)
    crosses = (offsets[:-1] < begin) & (begin < offsets[1:])
    own = crosses[:, None] & (offsets[:-1, None] <= position)
    return torch.where(own[:, :, None], halo, 0)


def _forward(x, weight, bias, offsets, part):
    """This rank's part of `out`, and the tokens before it."""
    tokens, history = x.shape[0], weight.shape[1] - 1
    starts = (offsets - part.begin).clamp(0, tokens)

    def convolve(count, windows):
        return torch.ops.twinconv.causal_conv1d_forward.default(
            x[:count], weight, bias, windows, starts.clamp(max=count), *part.options_of(count)
        )[0]

    head = min(tokens, history)
    with context_parallel._beside(x.device) as join:
        halo = part.before(x, history)
        windows = _windows(halo, offsets, part.begin)
    out = convolve(tokens, None) if head < tokens else None
    join(halo, windows)
    if out is None:
        return convolve(tokens, windows), halo
    if head:
        out[:head] = convolve(head, windows)
    return out, halo


def _backward(dout, x, weight, bias, offsets, halo, part, needs_x, needs_sums, sum_weight_gradients):
    """(dx, dweight, dbias) of this rank's part; an empty tensor for what is not needed."""
    tokens, history = x.shape[0], weight.shape[1] - 1
    starts = (offsets - part.begin).clamp(0, tokens)
    tail = min(tokens, history) if needs_x else 0

    after = None
    with context_parallel._beside(x.device) as join:
        if needs_x:
            after = part.after(torch.cat([x[:history], dout[:history]], dim=1), history)
    # Float32 copies of weight and bias, which change no product, so that their gradients come unrounded.
    dx, dweight, dbias, _ = torch.ops.twinconv.causal_conv1d_backward.default(
        dout, None, x, weight.float(), None if bias is None else bias.float(), _windows(halo, offsets, part.begin),
        starts, *part.options_of(tokens), needs_sums, False,
    )  # fmt: skip
    join(after)
    if tail:
        dx[-tail:] = _last_dx(dout, x, weight, bias, offsets, halo, part, after)
    if needs_sums:
        if sum_weight_gradients:
            dweight, dbias = _sum_over_ranks(dweight, dbias, part.group)
        dweight = dweight.to(weight.dtype)
        dbias = dbias if bias is None else dbias.to(bias.dtype)
    return dx, dweight, dbias


def _last_dx(dout, x, weight, bias, offsets, halo, part, after):
    """dx of the part's last tokens, at most width-1: a plain call over them, as many before and as many after.

    g of a token reads the width-1 tokens before it, dx the width-1 values of g after it.
    """
    history, tail = len(halo), min(len(x), len(halo))
    x_after, dout_after = after.split(x.shape[1], dim=1)
    x_around = torch.cat([torch.cat([halo, x[-2 * history :]])[-history - tail :], x_after])
    dout_around = torch.cat([torch.zeros_like(halo), dout[-tail:], dout_after])
    count = len(x_around)
    starts = (offsets - (part.begin + len(x) - tail - history)).clamp(0, count)
    dx = torch.ops.twinconv.causal_conv1d_backward.default(
        dout_around, None, x_around, weight, bias, None, starts, *part.options_of(count), False, False
    )[0]
    return dx[history : history + tail]


def _sum_over_ranks(dweight, dbias, group):
    """The float32 sums of all ranks, added in the order of the ranks; dbias may be empty."""
    mine = torch.cat([dweight.flatten(), dbias])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total[: dweight.numel()].view(dweight.shape), total[dweight.numel() :]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets, part, sum_weight_gradients):
        out, halo = _forward(x, weight, bias, offsets, part)
        ctx.save_for_backward(x, weight, bias, offsets, halo)
        ctx.part, ctx.sum_weight_gradients = part, sum_weight_gradients
        return out

    @staticmethod
    def backward(ctx, dout):
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = _Gradients.apply(
            dout, *ctx.saved_tensors, ctx.part, needs_x, needs_weight or needs_bias, ctx.sum_weight_gradients
        )
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *(None,) * 3,
        )


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _backward(*arguments)

    backward = staticmethod(functional._refuse)
