"""The packed tokens split over the ranks of a process group, in order: prefill, and the differentiable form for training.

Forward, a rank needs the last width-1 tokens before its part and nothing else, so only those travel, point to point;
where parts are shorter than width-1 they come from several ranks. Backward, it needs the first width-1 tokens after its
part and their upstream gradient: from these it computes again what the later ranks' outputs give to its own last
tokens. So `dx` is summed in one place, in the order of one device, and rounded once; sending finished gradients back
would add up rounded sums. It costs as many bytes as a float32 gradient would.

The main kernel waits for neither. It runs at once, wrong at the cut, and the width-1 tokens at the cut are then computed
again, by the operation's own arithmetic: the bits are those of one device. On a GPU the communication has a stream of
its own, beside the kernel.

On kernels (`exchange`) a pass is: one small launch that fills a message, the main kernel, beside it one collective, one
small launch that mends the cut. Without Triton the tokens travel point to point and plain calls do the rest.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor

from oracle.contract import ConvOutput, FnCall, RowsCall, Unsupported, normalised
from triton_impl import api
from triton_impl.call import (
    Prepared,
    check,
    kernels,
    launch_on,
    recall,
    remember,
    resolve,
    tied,
    unit_stride,
)
from triton_impl.config import crosses, prefill_config, walks
from triton_impl.tracing import asks_for_gradient, refuse_second_gradient


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None,
    query_start_loc: Tensor,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    part_lengths: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
) -> ConvOutput:
    """`causal_conv1d_fn` with the tokens of x split over the ranks of a process group; every rank calls it.

    Every argument but x is the whole of it, the same on every rank; so is the pool, which every rank updates. The
    call never synchronises with the host.

    Args:
      x: [part_lengths[rank], dim]: this rank's part of the packed tokens. Rows may cross the cuts, any number of them.
      group: the process group; None: the default one.
      part_lengths: host ints, tokens of each rank's part (0 is a length); None: all equal to this rank's, which is
        checked beside the kernel, on a GPU by an assertion on the device.
      query_start_loc: [batch+1], offsets into the whole.
      weight, bias, conv_states, cache_indices, has_initial_state, activation, pad_slot_id, max_seqlen, schedule,
        backend: as in `triton_impl.causal_conv1d_fn`.
      validate: False; a rank that raised would leave the others waiting.

    Returns:
      ConvOutput(out, conv_states): this rank's part of `out`, and the pool passed in, both with the bits of the run
      on one device.

    Raises:
      ValueError: `part_lengths` does not fit the group or x; parts of different lengths without it.
      ValueError, TypeError, Unsupported: as `triton_impl.causal_conv1d_fn`; `validate`.
    """
    if validate:
        raise Unsupported(
            "validate: expected False, since a rank that raised would leave the others waiting, got True"
        )
    call = FnCall(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation, pad_slot_id,
        max_seqlen, schedule, backend,
    )  # fmt: skip
    facts = dist.get_rank(group), dist.get_world_size(group), _host_ints(part_lengths)
    if (split := recall("context_parallel", (*call, *facts))) is None:
        sizes = check(call)
        lengths, equal = _check_parts(facts, sizes.tokens), part_lengths is None
        if resolve(backend, x.device) == "triton":
            split = _Split(normalised(call), sizes, facts[0], lengths, equal)
            remember("context_parallel", (*call, *facts), split)
    if split is not None:
        run = lambda record, args: split(args, group)[0]  # noqa: E731
    else:
        call = normalised(call)
        run = lambda record, args: _prefill(record(*args), sizes, lengths, group, equal)  # noqa: E731
    if asks_for_gradient(x, weight, bias, conv_states):
        out = tied(FnCall, tuple(call), run)
    else:
        out = run(FnCall, tuple(call))
    return ConvOutput(out, conv_states)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_start_loc: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    part_lengths: Sequence[SupportsIndex] | None = None,
    sum_weight_gradients: bool = False,
    activation: str | None = None,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> Tensor:
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
      part_lengths: as in `causal_conv1d_fn`.
      sum_weight_gradients: False: dweight and dbias are this rank's part, rounded to the dtype of weight and bias,
        for a caller who sums them, as data parallel wrappers over these ranks do. True: the sum over the ranks, added
        in float32 in the order of the ranks and rounded once; the same bits on every rank and in every run. It
        gathers [ranks, dim, width+1] float32.
      activation, max_seqlen, schedule, backend: as in `triton_impl.causal_conv1d`.

    Returns:
      [part_lengths[rank], dim]: this rank's part of `out`, with the bits of one device.

    Raises:
      ValueError: `part_lengths` does not fit the group or x; parts of different lengths without it; no
        `query_start_loc`.
      ValueError, TypeError, Unsupported: as `triton_impl.causal_conv1d`; a gradient of a gradient.
    """
    if query_start_loc is None:
        raise ValueError("query_start_loc: expected offsets into the whole, [batch+1], got None")
    call = RowsCall(x, weight, bias, None, query_start_loc, activation, max_seqlen, schedule, backend)
    check(call)
    call = normalised(call)
    facts = dist.get_rank(group), dist.get_world_size(group), _host_ints(part_lengths)
    lengths = _check_parts(facts, x.shape[0])
    if resolve(backend, x.device) == "triton":
        part = _KernelPart(group, facts, lengths, call[5:])
        return _ConvolutionOnKernels.apply(x, weight, bias, query_start_loc, part, bool(sum_weight_gradients))
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    offsets = query_start_loc.long().clamp(0, begins[-1])
    offsets[0] = 0
    part = _Part(facts[0], begins, group, call[5:], part_lengths is None)
    return _Convolution.apply(x, weight, bias, offsets, part, bool(sum_weight_gradients))


def _prefill(call, sizes, lengths, group, equal):
    """This rank's part of `out` of a checked call; updates the pool."""
    x, conv_states, max_seqlen = call.x, call.conv_states, call.max_seqlen
    rank = dist.get_rank(group)
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    begin, tokens, history, batch = begins[rank], sizes.tokens, sizes.width - 1, sizes.batch

    offsets = call.query_start_loc.long().clamp(0, begins[-1])
    offsets[0] = 0
    starts = (offsets - begin).clamp(0, tokens)
    here = offsets[:-1] >= begin  # the row does not begin in an earlier part

    live = rows = slots = new = None
    stateful = torch.zeros(batch, dtype=torch.bool, device=x.device)
    windows = x.new_zeros(batch, history, sizes.dim)
    if conv_states is not None:
        number = torch.arange(batch, device=x.device)
        slots = number if call.cache_indices is None else call.cache_indices.long()
        live = (slots != call.pad_slot_id) & (slots >= 0) & (slots < sizes.num_slots)
        slots = torch.where(live, slots, 0)
        rows = torch.where(live, number, -1)
        if call.has_initial_state is not None:
            stateful = call.has_initial_state & live
        # A pool without slots has no live rows, and nothing to select from.
        read = conv_states[slots, :history] if sizes.num_slots else windows.to(conv_states.dtype)
        windows = torch.where(stateful[:, None, None], read, 0)

    def convolve(count, windows, stateful):
        """The first `count` tokens of the part, each row from its own window."""
        longest = None if max_seqlen is None else min(max_seqlen, count)
        return api.causal_conv1d_fn(
            x[:count], call.weight, call.bias, windows, starts.clamp(max=count), rows, stateful,
            activation=call.activation, pad_slot_id=-1, max_seqlen=longest, schedule=call.schedule, backend=call.backend,
        ).out  # fmt: skip

    if history == 0 or batch == 0:
        if equal:
            _check_equal(x, group)
        return convolve(tokens, windows, stateful)

    with _beside(x.device) as join:
        if equal:
            _check_equal(x, group)
        # Both dtypes of entries fit into one: their own, or float32.
        entries = torch.promote_types(x.dtype, windows.dtype)
        entry = torch.arange(history, device=x.device)
        halo = _receive_halo(x, history, begins, rank, group).to(entries)
        # Entry i of a crossing row's window is entry `done + i` of its old window ++ its tokens before the cut.
        done = torch.where(here, 0, begin - offsets[:-1])[:, None] + entry
        old = windows.to(entries).gather(1, _over_dim(done.clamp(max=history - 1), sizes.dim))
        at_cut = torch.where((done < history)[:, :, None], old, halo)
        if conv_states is not None:
            # The rank that holds a row's last token knows the row's new window and tells the others, as bits.
            length = starts[1:] - starts[:-1]
            source = length[:, None] + entry
            new = at_cut.gather(1, _over_dim(source.clamp(max=history - 1), sizes.dim))
            if tokens:
                fresh = x[(starts[:-1, None] + source - history).clamp(0, tokens - 1)]
                new = torch.where((source < history)[:, :, None], new, fresh.to(entries))
            new = new.to(conv_states.dtype)
            integer = {2: torch.int16, 4: torch.int32}[new.element_size()]
            ends_here = (length > 0) & (offsets[1:] <= begin + tokens)
            told = torch.where(ends_here[:, None, None], new.view(integer), 0).to(torch.int32)
            dist.all_reduce(told, group=group)
            new = told.to(integer).view(new.dtype)

    head = min(tokens, history)
    out = None
    if head < tokens:
        out = convolve(
            tokens, windows.clone(), stateful & here
        )  # it writes new windows over those it is given
    join(at_cut, new)
    first = convolve(head, at_cut, stateful | ~here)
    if out is None:
        out = first
    else:
        out[:head] = first
    if conv_states is not None and sizes.num_slots:
        _write(conv_states[:, :history], slots, live & (offsets[1:] > offsets[:-1]), new)
    return out


def _host_ints(part_lengths):
    return None if part_lengths is None else tuple(operator.index(n) for n in part_lengths)


def _check_parts(facts, tokens):
    """The tokens of every rank; facts: this rank, the number of ranks, what the caller says of their tokens or None."""
    rank, size, given = facts
    lengths = [tokens] * size if given is None else list(given)
    if len(lengths) != size or min(lengths) < 0:
        raise ValueError(f"part_lengths: expected {size} lengths, one a rank, all >= 0, got {lengths}")
    if lengths[rank] != tokens:
        raise ValueError(
            f"part_lengths: expected {tokens}, the tokens of x, for rank {rank}, got {lengths[rank]}"
        )
    return lengths


def _check_equal(x, group):
    """Compares the ranks' numbers of tokens; nothing waits for a GPU, which asserts it.

    Raises:
      ValueError: on a CPU, on every rank: they differ.
    """
    if dist.get_world_size(group) == 1:
        return
    mine = (
        torch.tensor([x.shape[0]])
        if x.device.type == "cpu"
        else torch.full((1,), x.shape[0], device=x.device)
    )
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    found = torch.cat(found)
    if x.device.type == "cpu":
        _refuse_unequal(found.tolist())
    else:
        torch._assert_async(
            (found == mine).all(),
            "part_lengths: expected the tokens of each rank, since they differ, got None",
        )


def _refuse_unequal(lengths):
    if lengths != lengths[:1] * len(lengths):
        raise ValueError(
            f"part_lengths: expected the tokens of each rank, since they differ, {lengths}, got None"
        )


def _receive_halo(x, history, begins, rank, group):
    """[history, dim]: the tokens before this part, oldest first; zeros before the first token."""
    return _receive(x, [(begin - history, begin) for begin in begins[:-1]], begins, rank, group)


def _receive(x, wanted, begins, rank, group):
    """The tokens [first, last) = `wanted[rank]` of the whole, which are none of this part; zeros outside the whole.

    `wanted` has a range for every rank; x needs no tokens but those that the others want.
    """

    def overlap(sender, receiver):
        first, last = wanted[receiver]
        return max(first, begins[sender]), min(last, begins[sender + 1])

    first_here, last_here = wanted[rank]
    found = x.new_zeros(last_here - first_here, x.shape[1])
    calls = []
    for peer in range(len(begins) - 1):
        if peer == rank:
            continue
        name = peer if group is None else dist.get_global_rank(group, peer)
        first, last = (n - begins[rank] for n in overlap(rank, peer))
        if first < last:
            calls.append(dist.P2POp(dist.isend, x[first:last].contiguous(), name, group))
        first, last = (n - first_here for n in overlap(peer, rank))
        if first < last:
            calls.append(dist.P2POp(dist.irecv, found[first:last], name, group))
    if calls:
        for request in dist.batch_isend_irecv(calls):
            request.wait()
    return found


def _write(target, slots, written, new):
    """`target[slots[i]] = new[i]` where `written[i]`, in place, without a list of those rows, which would synchronise.

    The other rows repeat the first written one; if there is none, all put back what slot `slots[0]` holds.
    """
    first = written.to(torch.int32).argmax()
    row = torch.where(written, torch.arange(len(slots), device=slots.device), first)
    slot = slots[row]
    target[slot] = torch.where(written.any(), new[row], target[slot])


def _over_dim(index, dim):
    return index[:, :, None].expand(-1, -1, dim)


_streams = {}


@contextlib.contextmanager
def _beside(device):
    """Work queued here runs beside what the current stream gets next, until `join(*tensors)` waits for it.

    `join` takes the tensors made here that the current stream goes on with.
    """
    if device.type != "cuda":
        yield lambda *tensors: None
        return
    current = torch.cuda.current_stream(device)
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    side = _streams[device]
    side.wait_stream(current)

    def join(*tensors):
        current.wait_stream(side)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)

    with torch.cuda.stream(side):
        yield join


class _Part(NamedTuple):
    """Where this rank's tokens lie in the whole, `begins[rank]` to `begins[rank + 1]`, and the call's options.

    `equal`: all parts are taken to be as long as this one, which is to be checked.
    """

    rank: int
    begins: list[int]
    group: object
    options: tuple
    equal: bool

    @property
    def begin(self):
        return self.begins[self.rank]

    def before(self, x, history):
        return _receive_halo(x, history, self.begins, self.rank, self.group)

    def after(self, x, history):
        """[history, dim]: the tokens after this part; zeros past the last token."""
        wanted = [(end, end + history) for end in self.begins[1:]]
        return _receive(x, wanted, self.begins, self.rank, self.group)

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


def _forward_part(x, weight, bias, offsets, part):
    """This rank's part of `out`, and the tokens before it."""
    tokens, history = x.shape[0], weight.shape[1] - 1
    starts = (offsets - part.begin).clamp(0, tokens)

    def convolve(count, windows):
        return torch.ops.twinconv.causal_conv1d_forward.default(
            x[:count], weight, bias, windows, starts.clamp(max=count), *part.options_of(count)
        )[0]

    head = min(tokens, history)
    with _beside(x.device) as join:
        if part.equal:
            _check_equal(x, part.group)
        halo = part.before(x, history)
        windows = _windows(halo, offsets, part.begin)
    out = convolve(tokens, None) if head < tokens else None
    join(halo, windows)
    if out is None:
        return convolve(tokens, windows), halo
    if head:
        out[:head] = convolve(head, windows)
    return out, halo


def _backward_part(dout, x, weight, bias, offsets, halo, part, needs_x, needs_sums, sum_weight_gradients):
    """(dx, dweight, dbias) of this rank's part; an empty tensor for what is not needed."""
    tokens, history = x.shape[0], weight.shape[1] - 1
    starts = (offsets - part.begin).clamp(0, tokens)
    tail = min(tokens, history) if needs_x else 0

    after = None
    with _beside(x.device) as join:
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
        out, halo = _forward_part(x, weight, bias, offsets, part)
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
        return _backward_part(*arguments)

    backward = staticmethod(refuse_second_gradient)


# On kernels.

_all_gather_single = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)  # before torch 2.13


class _Beside:
    """What is queued inside runs beside what the current stream gets after this was made, until `join`.

    Its stream has priority: a collective that began behind a kernel that fills the device would end behind it too.
    Memory of the side stream needs no record of its use: the next work there waits for the current stream.
    """

    def __init__(self, device):
        self.side = None
        if device.type == "cuda":
            if device not in _streams:
                _streams[device] = torch.cuda.Stream(device, priority=-1)
            self.side, self.current = _streams[device], torch.cuda.current_stream(device.index)
            self.begin = self.current.record_event()

    def __enter__(self):
        if self.side is not None:
            self.side.wait_event(self.begin)
            # `torch.cuda.stream` asks for streams and devices that are known here
            torch.cuda.set_stream(self.side)

    def __exit__(self, *error):
        if self.side is not None:
            torch.cuda.set_stream(self.current)

    def join(self):
        if self.side is not None:
            self.current.wait_stream(self.side)


class _Split:
    """A checked `FnCall` on a part of the tokens, on kernels, with everything but its tensors and the group decided."""

    def __init__(self, call, sizes, rank, lengths, equal):
        exchange = kernels("exchange")
        part = exchange.Part(rank, tuple(lengths), equal)
        self.device, self.ranks, self.equal = call.x.device, len(lengths), equal
        call = call._replace(query_start_loc=unit_stride(call.query_start_loc))
        self.size, self.tell, self.cut = exchange.prepare(call, sizes, part)
        self.sends = self.ranks > 1 and (equal or (sizes.width > 1 and sum(lengths) > 0))
        outputs = None, ()
        if call.x.numel():
            longest = None if call.max_seqlen is None else min(call.max_seqlen, sizes.tokens)
            config = prefill_config(
                sizes.tokens,
                sizes.dim,
                sizes.batch,
                sizes.width,
                walks(*call.x.stride()),
                longest,
                call.schedule,
                kernels("launch").warp_size(),
            )
            kernel = kernels("prefill")
            outputs = kernel.prepare(call, sizes, config, stores=False), kernel.ARRAYS
        self.main = Prepared(call, outputs, memory=torch.empty_like(call.x, device="meta"))

    def __call__(self, args, group):
        """Returns `out`, the rows' offsets into the part, and the sum of the ranks' messages."""
        return launch_on(self.device, self._run, args, group)

    def _run(self, args, group):
        x, weight, bias, conv_states, offsets, cache_indices, has_initial_state, *options = args
        offsets = unit_stride(offsets)
        message = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        starts = torch.empty_like(offsets)
        self.tell(x, offsets, message, starts)
        beside = _Beside(self.device)
        # It leaves no windows: the slots are read again at the cut.
        out = self.main((x, weight, bias, conv_states, starts, cache_indices, has_initial_state, *options))
        if self.sends:
            with beside:
                dist.all_reduce(message, group=group)
            beside.join()
            if self.equal and self.device.type == "cpu":
                _refuse_unequal(message[: 8 * self.ranks].view(torch.int64).tolist())
        self.cut(x, weight, bias, conv_states, offsets, cache_indices, has_initial_state, message, out)
        return out, starts, message


class _KernelPart(NamedTuple):
    """This rank's part in a differentiable call, and the call's options.

    Attributes:
      facts: the rank, the number of ranks, the lengths that the caller named, or None.
      lengths: tokens of every rank.
    """

    group: object
    facts: tuple
    lengths: list
    options: tuple

    def forward(self, x, weight, bias, query_start_loc):
        activation, max_seqlen, schedule, backend = self.options
        call = FnCall(
            x, weight, bias, None, query_start_loc, None, None, activation, -1, max_seqlen, schedule, backend
        )
        args = (*call, *self.facts)
        if (split := recall("context_parallel", args)) is None:
            split = _Split(call, call.check(), self.facts[0], self.lengths, self.facts[2] is None)
            remember("context_parallel", args, split)
        return split(call, self.group)

    def backward(self, tensors, needs_x, needs_sums, sum_weight_gradients):
        """(dx, dweight, dbias), None for what is not needed; tensors: dout, then what the forward pass kept."""
        return launch_on(
            tensors[0].device, self._backward, tensors, needs_x, needs_sums, sum_weight_gradients
        )

    def _backward(self, tensors, needs_x, needs_sums, sum_weight_gradients):
        dout, x, weight, bias, offsets, starts, told = tensors
        if crosses(dout.shape, dout.stride(), x.stride()):
            dout = torch.empty_like(x).copy_(dout)
        together = needs_sums and sum_weight_gradients
        needs = needs_x, needs_sums, together
        kept = (x, weight, dout, offsets, bias, *self.options, *self.facts, *needs)
        if (split := recall("context_parallel backward", kept)) is None:
            call = RowsCall(x, weight, bias, None, offsets, *self.options)
            split = _SplitBackward(call, dout, self.facts[0], self.lengths, needs)
            remember("context_parallel backward", kept, split)

        message = torch.empty(split.size, dtype=torch.uint8, device=x.device)
        windows = x.new_empty(split.windows)
        split.tell(x, dout, offsets, told, message, windows)
        beside = None if together else _Beside(x.device)
        dx, dx_around = torch.empty_like(x), None
        dweight = dbias = workspace = None
        if needs_sums:
            workspace = x.new_empty(split.workspace, dtype=torch.float32)
            dweight = weight.new_empty(weight.shape)
            dbias = None if bias is None else bias.new_empty(bias.shape)
        split.walk(dout, None, x, weight, bias, windows, starts, dx, None, workspace)
        if needs_sums:
            sums = dweight, dbias
            if together:  # they leave unrounded, behind the message
                own = message[split.first : split.first + 4 * split.numbers].view(torch.float32)
                sums = own, None if bias is None else own[weight.numel() :]
            split.reduce(workspace, *sums)
        around = x, weight, bias, dout, offsets, told
        if together:  # one collective, whose sums come behind the walk
            every = self._gather(message)
            dx_around = split.run_around(*around, every)
            split.add(every, dweight, dbias)
        elif split.sends:
            with beside:
                dx_around = split.run_around(*around, self._gather(message))
            beside.join()
        if split.tail:
            dx[-split.tail :].copy_(dx_around)
        return dx if needs_x else None, dweight, dbias

    def _gather(self, message):
        """The messages of all ranks, one behind the other."""
        if len(self.lengths) == 1:
            return message
        every = message.new_empty(len(self.lengths) * message.numel())
        _all_gather_single(every, message, group=self.group)
        return every


class _SplitBackward:
    """The backward pass of a part of the tokens, on kernels, with everything but its tensors decided.

    dx of the part's last tokens, at most width-1, is that of a plain pass over them, as many before and as many after:
    g of a token reads the width-1 tokens before it, dx the width-1 values of g after it.
    """

    def __init__(self, call, dout, rank, lengths, needs):
        exchange, sizes = kernels("exchange"), call.check()
        needs_x, needs_sums, together = needs
        part = exchange.Part(rank, tuple(lengths), False)
        self.history = sizes.width - 1
        self.sends = needs_x and self.history > 0
        self.tail = min(sizes.tokens, self.history) if needs_x else 0
        self.numbers = sizes.dim * (sizes.width + (call.bias is not None)) if together else 0
        (self.first, self.size), self.tell, self.around, self.add = exchange.prepare_backward(
            call, dout, sizes, part, self.tail, self.numbers
        )
        self.windows = sizes.batch, self.history, sizes.dim
        self.around_shape = 3, self.tail + 2 * self.history, sizes.dim
        windows, around = (
            call.x.new_empty(shape, device="meta") for shape in (self.windows, self.around_shape[1:])
        )
        places, self.walk, self.reduce = self._plain(call, sizes, (dout, call.x, windows), needs_sums)
        self.workspace = places, sizes.width + (call.bias is not None), sizes.dim
        _, self.walk_around, _ = self._plain(call, sizes, (around, around, None), False)

    def run_around(self, x, weight, bias, dout, offsets, told, every):
        """dx of the part's last tokens; None where it has none."""
        if not self.tail:
            return None
        x_around, dout_around, dx = x.new_empty(self.around_shape).unbind(0)
        starts = torch.empty_like(offsets)
        self.around(x, dout, offsets, told, every, x_around, dout_around, starts)
        self.walk_around(dout_around, None, x_around, weight, bias, None, starts, dx, None, None)
        return dx[self.history : self.history + self.tail]

    @staticmethod
    def _plain(call, sizes, tensors, needs_sums):
        backward, (dout, x, windows) = kernels("backward"), tensors
        longest = None if call.max_seqlen is None else min(call.max_seqlen, len(x))
        config = backward.backward_config(
            len(x),
            sizes.dim,
            sizes.batch,
            sizes.width,
            backward.run_of(x),
            longest,
            call.schedule,
            kernels("launch").warp_size(),
        )
        return backward.prepare(
            dout,
            None,
            x,
            call.weight,
            call.bias,
            windows,
            call.query_start_loc,
            call.activation is not None,
            needs_sums,
            config,
        )


class _ConvolutionOnKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, offsets, part, sum_weight_gradients):
        offsets = unit_stride(offsets)
        out, starts, message = part.forward(x, weight, bias, offsets)
        ctx.save_for_backward(x, weight, bias, offsets, starts, message)
        ctx.part, ctx.sum_weight_gradients = part, sum_weight_gradients
        return out

    @staticmethod
    def backward(ctx, dout):
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        needs = needs_x, needs_weight or needs_bias, ctx.sum_weight_gradients
        if torch.is_grad_enabled():  # a second gradient would be asked for here
            dx, dweight, dbias = _GradientsOnKernels.apply(ctx.part, *needs, dout, *ctx.saved_tensors)
        else:
            dx, dweight, dbias = ctx.part.backward((dout, *ctx.saved_tensors), *needs)
        return dx, dweight if needs_weight else None, dbias if needs_bias else None, None, None, None


class _GradientsOnKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, needs_x, needs_sums, sum_weight_gradients, *tensors):
        return part.backward(tensors, needs_x, needs_sums, sum_weight_gradients)

    backward = staticmethod(refuse_second_gradient)
