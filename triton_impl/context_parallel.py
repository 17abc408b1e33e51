"""Context parallel prefill: the packed tokens split over the ranks of a process group, in order.

A rank needs the last width-1 tokens before its part and nothing else, so only those travel, point to point; where
parts are shorter than width-1 they come from several ranks. The convolution of the part does not wait for them: it
runs at once with a wrong window where a row crosses the cut, and the first width-1 tokens are then computed again
with the right one. Both are plain calls of the operation, so the bits are those of one device. On a GPU the
communication has a stream of its own, beside the kernel.
"""

import contextlib
import operator

import torch
import torch.distributed as dist

from oracle.contract import ConvOutput, Unsupported, check_causal_conv1d_fn, refuse_serving
from triton_impl import api


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    group=None,
    part_lengths=None,
    activation=None,
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    empty_rows="skip",
    snapshot_indices=None,
    snapshot_block_size=None,
    num_computed_tokens=None,
    track_indices=None,
    track_lengths=None,
    residual=None,
    channel_offset=None,
    split_sizes=None,
):
    """`causal_conv1d_fn` with the tokens of x split over the ranks of a process group; every rank calls it.

    Every argument but x is the whole of it, the same on every rank; so is the pool, which every rank updates. The
    call never synchronises with the host.

    Args:
      x: [part_lengths[rank], dim]: this rank's part of the packed tokens. Rows may cross the cuts, any number of them.
      group: the process group; None: the default one.
      part_lengths: host ints, tokens of each rank's part (0 is a length); None: all equal to this rank's.
      query_start_loc: [batch+1], offsets into the whole.
      weight, bias, conv_states, cache_indices, has_initial_state, activation, pad_slot_id, max_seqlen, schedule,
        backend: as in `triton_impl.causal_conv1d_fn`.
      validate: False; a rank that raised would leave the others waiting.
      state_layout and what follows: their defaults; anything else is Unsupported.

    Returns:
      ConvOutput(out, conv_states): this rank's part of `out`, and the pool passed in, both with the bits of the run
      on one device.

    Raises:
      ValueError: `part_lengths` does not fit the group or x.
      ValueError, TypeError, Unsupported: as `triton_impl.causal_conv1d_fn`; `validate`.
    """
    if validate:
        raise Unsupported(
            "validate: expected False, since a rank that raised would leave the others waiting, got True"
        )
    refuse_serving(
        "the tokens are split over ranks", state_layout=state_layout, empty_rows=empty_rows,
        cache_seqlens=cache_seqlens, write_indices=write_indices, snapshot_indices=snapshot_indices,
        snapshot_block_size=snapshot_block_size, num_computed_tokens=num_computed_tokens,
        track_indices=track_indices, track_lengths=track_lengths, residual=residual, channel_offset=channel_offset,
        split_sizes=split_sizes,
    )  # fmt: skip
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule,
        backend=backend, validate=validate,
    )  # fmt: skip
    rank, lengths = dist.get_rank(group), _check_parts(part_lengths, sizes.tokens, group)
    begins = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    begin, tokens, history, batch = begins[rank], sizes.tokens, sizes.width - 1, sizes.batch

    offsets = query_start_loc.long().clamp(0, begins[-1])
    offsets[0] = 0
    starts = (offsets - begin).clamp(0, tokens)
    here = offsets[:-1] >= begin  # the row does not begin in an earlier part

    live = rows = slots = new = None
    stateful = torch.zeros(batch, dtype=torch.bool, device=x.device)
    windows = x.new_zeros(batch, history, sizes.dim)
    if conv_states is not None:
        number = torch.arange(batch, device=x.device)
        slots = number if cache_indices is None else cache_indices.long()
        live = (slots != pad_slot_id) & (slots >= 0) & (slots < sizes.num_slots)
        slots = torch.where(live, slots, 0)
        rows = torch.where(live, number, -1)
        if has_initial_state is not None:
            stateful = has_initial_state & live
        # A pool without slots has no live rows, and nothing to select from.
        read = conv_states[slots, :history] if sizes.num_slots else windows.to(conv_states.dtype)
        windows = torch.where(stateful[:, None, None], read, 0)

    def convolve(count, windows, stateful):
        """The first `count` tokens of the part, each row from its own window."""
        longest = None if max_seqlen is None else min(max_seqlen, count)
        return api.causal_conv1d_fn(
            x[:count], weight, bias, windows, starts.clamp(max=count), rows, stateful,
            activation=activation, pad_slot_id=-1, max_seqlen=longest, schedule=schedule, backend=backend,
        ).out  # fmt: skip

    if history == 0 or batch == 0:
        return ConvOutput(convolve(tokens, windows, stateful), conv_states)

    with _beside(x.device) as join:
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
    return ConvOutput(out, conv_states)


def _check_parts(part_lengths, tokens, group):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    lengths = [tokens] * size if part_lengths is None else [operator.index(n) for n in part_lengths]
    if len(lengths) != size or min(lengths) < 0:
        raise ValueError(f"part_lengths: expected {size} lengths, one a rank, all >= 0, got {lengths}")
    if lengths[rank] != tokens:
        raise ValueError(
            f"part_lengths: expected {tokens}, the tokens of x, for rank {rank}, got {lengths[rank]}"
        )
    return lengths


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
