"""The extended operations in plain torch, for CPUs: other layouts and slots, snapshots, windows, trees, residual."""

import torch

from triton_impl.eager import _bounds, _convolve, _live, _packed


def _inputs(before, x, start, source, dtype):
    """Inputs [rows, n, dim] of rows in `dtype`, cast once.

    Args:
      before: [rows, m, dim]: what precedes the rows.
      x: [tokens, dim].
      start: [rows]: first tokens of the rows.
      source: [rows, n]: tokens counted from there; -1 is the last entry of `before`, and so on.
    """
    old = new = None
    if x.shape[0]:
        new = x[(start[:, None] + source).clamp(0, x.shape[0] - 1)].to(dtype)
    if before.shape[1]:
        row = torch.arange(source.shape[0], device=x.device)[:, None]
        old = before[row, (before.shape[1] + source).clamp(0, before.shape[1] - 1)].to(dtype)
    if new is None or old is None:
        either = old if new is None else new
        return x.new_zeros((*source.shape, x.shape[1]), dtype=dtype) if either is None else either
    return torch.where((source >= 0)[:, :, None], new, old)


class _Rows:
    """A call's rows: tokens [start, end) of x [tokens, dim], slots, and the windows before the call.

    Attributes:
      live: [batch], rows that are no padding.
      has_state: [batch], those whose slot is read.
      window: [batch, width-1, dim] in the pool's dtype; zeros for rows without a state.
      consumed: [batch], with layout "ring", the tokens before the call modulo state_len.
    """

    def __init__(
        self, x, start, end, conv_states, cache_indices, has_state, pad_slot_id, width,
        layout="front", cache_seqlens=None, num_accepted_tokens=None,
    ):  # fmt: skip
        self.x, self.start, self.length = x, start, (end - start).clamp(min=0)
        batch, history, device = start.shape[0], width - 1, x.device
        self.history, self.pad_slot_id, self.layout = history, pad_slot_id, layout
        self.number = torch.arange(batch, device=device)
        self.slot = self.number if cache_indices is None else cache_indices.long()
        if conv_states is None:
            self.live = torch.ones_like(self.number, dtype=torch.bool)
            self.window = torch.zeros((batch, history, x.shape[1]), device=device)
            return
        self.state_len = conv_states.shape[1]
        self.live = _live(self.slot, conv_states.shape[0], pad_slot_id)
        self.has_state = self.live if has_state is None else self.live & has_state
        first = torch.zeros_like(self.slot)
        if num_accepted_tokens is not None:
            first = num_accepted_tokens.long().clamp(1, self.state_len - history + 1) - 1
        elif layout == "back":
            first += self.state_len - history
        elif layout == "ring":
            self.consumed = cache_seqlens.long().clamp(min=0) % max(self.state_len, 1)
            first = self.consumed + self.state_len - history
        column = first[:, None] + torch.arange(history, device=device)
        if layout == "ring" and history:
            column %= self.state_len
        self.window = conv_states.new_zeros((batch, history, x.shape[1]))
        kept = self.has_state
        self.window[kept] = conv_states[self.slot[kept, None], column[kept]]

    def tokens(self):
        """The tokens of live rows and their rows: (row [n], token counted from its row's start [n])."""
        place = torch.arange(self.x.shape[0], device=self.x.device)
        ends = (self.start + self.length).contiguous()
        row = torch.searchsorted(ends, place, right=True)
        known = torch.cat([self.live, self.live.new_zeros(1)])[row]
        row, place = row[known], place[known]
        kept = place >= self.start[row]
        return row[kept], (place - self.start[row])[kept]

    def windows(self, row, at, dtype):
        """The last width-1 inputs of rows [n] behind `at` [n] of their tokens: [n, width-1, dim]."""
        source = at[:, None] + torch.arange(-self.history, 0, device=at.device)
        return _inputs(self.window[row], self.x, self.start[row], source, dtype)

    # What is to be stored: (slots [n], columns [n], entries [n, dim]).

    def further_windows(self, conv_states, row, at, slot):
        """One more window of rows [n], behind `at` tokens, in the first columns of `slot`."""
        stored = self.live[row] & _live(slot, conv_states.shape[0], self.pad_slot_id)
        row, at, slot = row[stored], at[stored], slot[stored]
        column = torch.arange(self.history, device=row.device).expand(row.shape[0], self.history)
        entries = self.windows(row, at, conv_states.dtype)
        return slot[:, None].expand_as(column).flatten(), column.flatten(), entries.flatten(0, 1)

    def snapshots(self, conv_states, snapshot_indices, block_size, num_computed_tokens):
        computed = torch.zeros_like(self.slot) if num_computed_tokens is None else num_computed_tokens.long()
        computed = computed.clamp(min=0)
        m = torch.arange(self.x.shape[0] // block_size + 1, device=self.x.device)
        at = (block_size - computed % block_size)[:, None] + m * block_size
        block = (computed // block_size)[:, None] + m
        reached = (at <= self.length[:, None]) & (block >= 0) & (block < snapshot_indices.shape[1])
        row, m = reached.nonzero(as_tuple=True)
        slot = snapshot_indices[row, block[row, m]].long()
        return self.further_windows(conv_states, row, at[row, m], slot)

    def new_states(self, conv_states, moved, write_indices, rolls=False):
        """The states that live rows `moved` [batch] leave in their write slots."""
        write = self.slot if write_indices is None else write_indices.long()
        moves = write != self.slot
        # a row of no tokens that keeps its slot and its state has nothing to do
        changes = moved & (moves | (self.length > 0) | ~self.has_state)
        row = (changes & _live(write, conv_states.shape[0], self.pad_slot_id)).nonzero().squeeze(1)
        length, start, columns = self.length[row, None], self.start[row], self.state_len
        if self.layout == "front" and not rolls:
            columns = self.history
        column = torch.arange(columns, device=row.device).expand(row.shape[0], columns)
        stored = torch.ones_like(column, dtype=torch.bool)
        before, dtype = self.window[row], conv_states.dtype
        if rolls:
            source = column + 1 - self.history
            stored = (column < length + self.history - 1) & (self.history > 0)
        elif self.layout == "front":
            source = length + column - self.history
        else:  # all columns, in order of age
            source, place = length + column - self.state_len, column
            if self.layout == "ring":
                place = (self.consumed[row, None] + column) % max(self.state_len, 1)
                column = (place + length) % max(self.state_len, 1)
                stored = (source >= 0) | (moves | ~self.has_state)[row, None]
            before = conv_states[self.slot[row, None], place]
            before[~self.has_state[row]] = 0
        entries = _inputs(before, self.x, start, source, dtype)
        return write[row, None].expand_as(column)[stored], column[stored], entries[stored]


def _store(conv_states, parts):
    """All parts have been read before the first is stored."""
    for slot, column, entries in parts:
        conv_states[slot, column] = entries


def _flat_parts(out, split_sizes):
    """`out`, or its parts [tokens, size] one after the other in one flat tensor, as the kernels leave them."""
    if split_sizes is None:
        return out
    parts = out.reshape(-1, out.shape[-1]).split(list(split_sizes), dim=1)
    return torch.cat([part.flatten() for part in parts])


def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
    snapshot_indices, num_computed_tokens, track_indices, track_lengths, residual,
    *, silu, pad_slot_id, layout, apply_empty, block_size, split_sizes,
):  # fmt: skip
    """`causal_conv1d_fn` on checked arguments; returns `out`, flat if split, and updates `conv_states` in place."""
    start, end = _bounds(query_start_loc, x.shape[0])
    if has_initial_state is None:
        has_initial_state = torch.zeros(start.shape[0], dtype=torch.bool, device=x.device)
    rows = _Rows(
        x, start, end, conv_states, cache_indices, has_initial_state, pad_slot_id, weight.shape[1], layout, cache_seqlens
    )  # fmt: skip
    out = _packed(x, weight, bias, silu, start, end, rows.live, rows.window, residual)
    if conv_states is not None:
        rows.live &= (rows.length > 0) | apply_empty
        parts = [rows.new_states(conv_states, rows.live, write_indices)]
        if snapshot_indices is not None:
            parts.append(rows.snapshots(conv_states, snapshot_indices, block_size, num_computed_tokens))
        if track_indices is not None:
            at = rows.length
            if track_lengths is not None:
                at = torch.minimum(track_lengths.long().clamp(min=0), at)
            parts.append(rows.further_windows(conv_states, rows.number, at, track_indices.long()))
        _store(conv_states, parts)
    return _flat_parts(out, split_sizes)


def update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens, write_indices,
    track_indices, window_out, window_indices, residual, tree_parents,
    *, silu, pad_slot_id, layout, commit, split_sizes,
):  # fmt: skip
    """`causal_conv1d_update` on checked arguments; returns `out`, flat if split; updates the pool and `window_out`."""
    dim, width = weight.shape
    tokens = x.reshape(-1, dim)
    added = None if residual is None else residual.reshape(-1, dim)
    if query_start_loc is None:
        seqlen = x.shape[1] if x.dim() == 3 else 1
        start = torch.arange(x.shape[0], device=x.device) * seqlen
        end = start + seqlen
    else:
        start, end = _bounds(query_start_loc, x.shape[0])
    rows = _Rows(
        tokens, start, end, conv_states, cache_indices, None, pad_slot_id, width, layout, cache_seqlens,
        num_accepted_tokens,
    )  # fmt: skip
    if tree_parents is None:
        out = _packed(tokens, weight, bias, silu, start, end, rows.live, rows.window, added)
    else:
        out = _tree(rows, tree_parents, weight, bias, silu, added)
    if window_out is not None:
        row, place = rows.tokens()
        buffer = rows.number if window_indices is None else window_indices.long()
        kept = _live(buffer, window_out.shape[0], pad_slot_id)[row] & (place < window_out.shape[1])
        row, place = row[kept], place[kept]
        if tree_parents is None:
            windows = rows.windows(row, place + 1, window_out.dtype)
        else:
            chain = _chains(tree_parents, width - 1)[row, place].flip(1)
            windows = _inputs(rows.window[row], tokens, start[row], chain, window_out.dtype)
        window_out[buffer[row], place] = windows
    if commit:
        moved = rows.live & (rows.length > 0)
        parts = [rows.new_states(conv_states, moved, write_indices, num_accepted_tokens is not None)]
        if track_indices is not None:
            row = moved.nonzero().squeeze(1)
            parts.append(rows.further_windows(conv_states, row, rows.length[row], track_indices[row].long()))
        _store(conv_states, parts)
    return _flat_parts(out.reshape(x.shape), split_sizes)


def commit(conv_states, window_out, accepted_steps, cache_indices, window_indices, *, pad_slot_id):
    """`commit_windows` on checked arguments, in place."""
    row = torch.arange(accepted_steps.shape[0], device=conv_states.device)
    slot = row if cache_indices is None else cache_indices.long()
    buffer = row if window_indices is None else window_indices.long()
    step, steps = accepted_steps.long(), window_out.shape[1]
    moves = _live(slot, conv_states.shape[0], pad_slot_id) & _live(buffer, window_out.shape[0], pad_slot_id)
    moves &= (step >= 0) & (step < steps)
    accepted = window_out[buffer[moves], step[moves]]
    conv_states[slot[moves], : window_out.shape[2]] = accepted.to(conv_states.dtype)


def _chains(tree_parents, count):
    """[batch, n, count]: each node, its parent, its grandparent, ..., then -1, -2, ... for the window's entries."""
    batch, nodes = tree_parents.shape
    node = torch.arange(nodes, device=tree_parents.device)
    parents = torch.minimum(tree_parents.long(), node - 1).clamp(min=-1)
    chain, source = [], node.expand(batch, nodes)
    for _ in range(count):
        chain.append(source)
        above = parents.gather(1, source.clamp(min=0)) if nodes else source
        source = torch.where(source >= 0, above, source - 1)
    return torch.stack(chain, dim=2) if chain else parents.new_zeros((batch, nodes, 0))


def _tree(rows, tree_parents, weight, bias, silu, residual):
    """The outputs of trees: taps meet a node and its ancestors."""
    row, place = rows.tokens()
    token = rows.start[row] + place
    out = torch.zeros_like(rows.x)
    chain = _chains(tree_parents, weight.shape[1])[row, place].flip(1)
    inputs = _inputs(rows.window[row], rows.x, rows.start[row], chain, torch.float32)
    added = None if residual is None else residual[token]
    out[token] = _convolve(list(inputs.unbind(1)), weight, bias, silu, out.dtype, added)
    return out
