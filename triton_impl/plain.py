"""The operations in plain torch, for CPUs: the kernels' order of float32 operations, vectorised over tokens.

Each function takes the record of a checked call and updates what the call writes in place.
"""

import torch

_LARGEST = torch.iinfo(torch.int64).max


def prefill(call):
    """`causal_conv1d_fn`; returns `out`, flat if it is split."""
    x = input_channels(call)
    start, end = bounds(call.query_start_loc, x.shape[0])
    flags = call.has_initial_state
    if flags is None:
        flags = torch.zeros(start.shape[0], dtype=torch.bool, device=x.device)
    rows = _Rows(call, x, start, end, flags)
    out = _packed(rows, call, call.residual)
    if call.conv_states is not None:
        rows.live &= (rows.length > 0) | (call.empty_rows == "apply")
        parts = [rows.new_states(call, rows.live)]
        if call.snapshot_indices is not None:
            parts.append(rows.snapshots(call))
        if call.track_indices is not None:
            at = rows.length
            if call.track_lengths is not None:
                at = torch.minimum(int64(call.track_lengths).clamp(min=0), at)
            parts.append(rows.further_windows(call.conv_states, rows.number, at, int64(call.track_indices)))
        _store(call.conv_states, parts)
    return flat_parts(out, call.split_sizes)


def update(call):
    """`causal_conv1d_update`; returns `out`, flat if it is split."""
    x = input_channels(call)
    dim, width = call.weight.shape
    tokens = x.reshape(-1, dim)
    residual = None if call.residual is None else call.residual.reshape(-1, dim)
    if call.query_start_loc is None:
        seqlen = x.shape[1] if x.dim() == 3 else 1
        start = torch.arange(x.shape[0], device=x.device) * seqlen
        end = start + seqlen
    else:
        start, end = bounds(call.query_start_loc, x.shape[0])
    rows = _Rows(call, tokens, start, end, None, call.num_accepted_tokens)
    out = _packed(rows, call, residual) if call.tree_parents is None else _tree(rows, call, residual)
    if call.window_out is not None:
        row, place = rows.tokens()
        buffer = rows.number if call.window_indices is None else int64(call.window_indices)
        kept = live_slots(buffer, call.window_out.shape[0], call.pad_slot_id)[row]
        kept &= place < call.window_out.shape[1]
        row, place = row[kept], place[kept]
        if call.tree_parents is None:
            windows = rows.windows(row, place + 1, call.window_out.dtype)
        else:
            chain = _chains(call.tree_parents, width - 1)[row, place].flip(1)
            windows = _inputs(rows.window[row], tokens, start[row], chain, call.window_out.dtype)
        call.window_out[buffer[row], place] = windows
    if call.commit:
        moved = rows.live & (rows.length > 0)
        parts = [rows.new_states(call, moved, call.num_accepted_tokens is not None)]
        if call.track_indices is not None:
            row = moved.nonzero().squeeze(1)
            slot = int64(call.track_indices)[row]
            parts.append(rows.further_windows(call.conv_states, row, rows.length[row], slot))
        _store(call.conv_states, parts)
    return flat_parts(out.reshape(x.shape), call.split_sizes)


def commit(call):
    """`commit_windows`."""
    row = torch.arange(call.accepted_steps.shape[0], device=call.conv_states.device)
    slot = row if call.cache_indices is None else int64(call.cache_indices)
    buffer = row if call.window_indices is None else int64(call.window_indices)
    step, steps = int64(call.accepted_steps), call.window_out.shape[1]
    moves = live_slots(slot, call.conv_states.shape[0], call.pad_slot_id)
    moves &= live_slots(buffer, call.window_out.shape[0], call.pad_slot_id) & (step >= 0) & (step < steps)
    accepted = call.window_out[buffer[moves], step[moves]]
    call.conv_states[slot[moves], : call.window_out.shape[2]] = accepted.to(call.conv_states.dtype)


def parents_from_links(call):
    """`tree_parents_from_links`; nothing synchronises, so this is the one path on every device."""
    batch, nodes = call.next_token.shape
    node = torch.arange(nodes, device=call.next_token.device)
    # Who names a node: twice its number, plus 1 if as a sibling. Of several the last counts; column `nodes` takes the rest.
    links, names = [], []
    for as_sibling, link in enumerate((int64(call.next_token), int64(call.next_sibling))):
        links.append(torch.where((link > node) & (link < nodes), link, nodes))
        names.append((2 * node + as_sibling).expand(batch, nodes))
    named = torch.full((batch, nodes + 1), -1, device=node.device)
    named = named.scatter_reduce(1, torch.cat(links, 1), torch.cat(names, 1), "amax")[:, :nodes]
    # The first of its siblings, found by jumps of 1, 2, 4, ... siblings; then its parent, 0 if nobody names it.
    first = torch.where((named >= 0) & (named % 2 == 1), named // 2, node)
    for _ in range(int(nodes - 1).bit_length() if nodes else 0):
        first = first.gather(1, first)
    parent = torch.where(named >= 0, named // 2, 0).gather(1, first)
    return torch.where(first == 0, -1, parent).int()


def input_channels(call):
    """The channels of x that are the input, a view."""
    if call.channel_offset is None:
        return call.x
    return call.x.narrow(-1, call.channel_offset, call.weight.shape[0])


def live_tokens(call):
    """[tokens] bool: the tokens of rows that are no padding, of a prefill or an update."""
    x = input_channels(call)
    if call.query_start_loc is None:
        batch, seqlen = x.shape[0], x.shape[1] if x.dim() == 3 else 1
        row = torch.arange(batch, device=x.device).repeat_interleave(seqlen)
        inside = torch.ones_like(row, dtype=torch.bool)
    else:
        start, end = bounds(call.query_start_loc, x.shape[0])
        batch, place = start.shape[0], torch.arange(x.shape[0], device=x.device)
        row = row_of(place, torch.maximum(start, end))
        inside = place >= torch.cat([start, start.new_full((1,), x.shape[0])])[row]  # row `batch` is the tail
    if call.conv_states is None:
        return inside
    slot = torch.arange(batch, device=x.device) if call.cache_indices is None else int64(call.cache_indices)
    live = live_slots(slot, call.conv_states.shape[0], call.pad_slot_id)
    return inside & torch.cat([live, live.new_zeros(1)])[row]


def int64(values):
    """Integers as int64; what only uint64 can hold becomes the largest."""
    wide = values.long()
    return torch.where(wide < 0, _LARGEST, wide) if values.dtype == torch.uint64 else wide


def remainder(counts, n):
    """Of counts of any integer dtype, exact for all of uint64 too; below 0 counts as 0."""
    wide = counts.long()
    if counts.dtype == torch.uint64:
        return torch.where(wide < 0, wide % n + 2**64 % n, wide) % n
    return wide.clamp(min=0) % n


def bounds(query_start_loc, tokens):
    """First token and end of each row, clamped to [0, tokens]; the first row is taken to start at 0."""
    offsets = query_start_loc.long().clamp(0, tokens)
    offsets[0] = 0
    return offsets[:-1], offsets[1:]


def live_slots(slots, num_slots, pad_slot_id):
    """Which slots exist and are no padding."""
    return (slots != pad_slot_id) & (slots >= 0) & (slots < num_slots)


def flat_parts(out, split_sizes):
    """`out`, or its parts [tokens, size] one after the other in one flat tensor, as the kernels leave them."""
    if split_sizes is None:
        return out
    parts = out.reshape(-1, out.shape[-1]).split(list(split_sizes), dim=1)
    return torch.cat([part.flatten() for part in parts])


class _Rows:
    """A call's rows: tokens [start, end) of x [tokens, dim], slots, and the windows before the call.

    Attributes:
      live: [batch], rows that are no padding.
      has_state: [batch], those whose slot is read.
      window: [batch, width-1, dim] in the pool's dtype; zeros for rows without a state.
      consumed: [batch], with layout "ring", the tokens before the call modulo state_len.
    """

    def __init__(self, call, x, start, end, has_state, num_accepted_tokens=None):
        self.x, self.start, self.end, self.length = x, start, end, (end - start).clamp(min=0)
        batch, device = start.shape[0], x.device
        self.history, self.pad_slot_id, self.layout = (
            call.weight.shape[1] - 1,
            call.pad_slot_id,
            call.state_layout,
        )
        self.number = torch.arange(batch, device=device)
        self.slot = self.number if call.cache_indices is None else int64(call.cache_indices)
        pool, history = call.conv_states, self.history
        if pool is None:
            self.live = torch.ones_like(self.number, dtype=torch.bool)
            self.window = torch.zeros((batch, history, x.shape[1]), device=device)
            return
        self.state_len = pool.shape[1]
        self.live = live_slots(self.slot, pool.shape[0], call.pad_slot_id)
        self.has_state = self.live if has_state is None else self.live & has_state
        first = torch.zeros_like(self.slot)
        if num_accepted_tokens is not None:
            first = int64(num_accepted_tokens).clamp(1, self.state_len - history + 1) - 1
        elif self.layout == "back":
            first += self.state_len - history
        elif self.layout == "ring":
            self.consumed = remainder(call.cache_seqlens, max(self.state_len, 1))
            first = self.consumed + self.state_len - history
        column = first[:, None] + torch.arange(history, device=device)
        if self.layout == "ring" and history:
            column %= self.state_len
        self.window = pool.new_zeros((batch, history, x.shape[1]))
        kept = self.has_state
        self.window[kept] = pool[self.slot[kept, None], column[kept]]

    def tokens(self):
        """The tokens of live rows: (row [n], token counted from its row's start [n])."""
        place = torch.arange(self.x.shape[0], device=self.x.device)
        row = row_of(place, self.start + self.length)
        known = torch.cat([self.live, self.live.new_zeros(1)])[row]  # row `batch` is the tail
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
        stored = self.live[row] & live_slots(slot, conv_states.shape[0], self.pad_slot_id)
        row, at, slot = row[stored], at[stored], slot[stored]
        column = torch.arange(self.history, device=row.device).expand(row.shape[0], self.history)
        entries = self.windows(row, at, conv_states.dtype)
        return slot[:, None].expand_as(column).flatten(), column.flatten(), entries.flatten(0, 1)

    def snapshots(self, call):
        """The windows at multiples of `snapshot_block_size` tokens of the whole sequence."""
        size = min(call.snapshot_block_size, _LARGEST // 4)
        computed = torch.zeros_like(self.slot)
        if call.num_computed_tokens is not None:
            computed = int64(call.num_computed_tokens).clamp(min=0)
        m = torch.arange(self.x.shape[0] // size + 1, device=self.x.device)
        at = (size - computed % size)[:, None] + m * size
        block = (computed // size)[:, None] + m
        reached = (at <= self.length[:, None]) & (block >= 0) & (block < call.snapshot_indices.shape[1])
        row, m = reached.nonzero(as_tuple=True)
        slot = int64(call.snapshot_indices)[row, block[row, m]]
        return self.further_windows(call.conv_states, row, at[row, m], slot)

    def new_states(self, call, moved, rolls=False):
        """The states that live rows `moved` [batch] leave in their write slots."""
        pool = call.conv_states
        write = self.slot if call.write_indices is None else int64(call.write_indices)
        moves = write != self.slot
        # a row of no tokens that keeps its slot and its state has nothing to do
        changes = moved & (moves | (self.length > 0) | ~self.has_state)
        row = (changes & live_slots(write, pool.shape[0], self.pad_slot_id)).nonzero().squeeze(1)
        length, start, columns = self.length[row, None], self.start[row], self.state_len
        if self.layout == "front" and not rolls:
            columns = self.history
        column = torch.arange(columns, device=row.device).expand(row.shape[0], columns)
        stored = torch.ones_like(column, dtype=torch.bool)
        before = self.window[row]
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
            before = pool[self.slot[row, None], place]
            before[~self.has_state[row]] = 0
        entries = _inputs(before, self.x, start, source, pool.dtype)
        return write[row, None].expand_as(column)[stored], column[stored], entries[stored]


def row_of(token, end):
    """The row of each token: the first that ends behind it."""
    return torch.searchsorted(end.contiguous(), token, right=True)


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


def _store(conv_states, parts):
    """All parts have been read before the first is stored."""
    for slot, column, entries in parts:
        conv_states[slot, column] = entries


def _activate(z):
    """z * sigmoid(z), by functions of torch whose bits do not depend on an element's place in the tensor.

    (`silu`, `sigmoid` and `exp2` round the last few elements differently on a CPU.)
    """
    return torch.where(z < -80, z * torch.exp(z), z / (1 + torch.exp(-z)))  # exp(-z) overflows from -89 on


def _convolve(columns, call, dtype, residual=None):
    """act(bias + sum of weight[:, j] * columns[j], oldest first) + residual in float32, rounded once to `dtype`."""
    taps, bias = call.weight.float(), call.bias
    acc = bias.float().expand_as(columns[0]).clone() if bias is not None else torch.zeros_like(columns[0])
    for j, column in enumerate(columns):
        acc += column * taps[:, j]
    acc = acc if call.activation is None else _activate(acc)
    return (acc if residual is None else acc + residual.float()).to(dtype)


def _packed(rows, call, residual):
    """The outputs of packed rows behind their windows; zeros outside live rows."""
    x, start, width = rows.x, rows.start, call.weight.shape[1]
    out = torch.zeros_like(x)
    token = torch.arange(x.shape[0], device=x.device)
    row = row_of(token, rows.end)
    computed = torch.cat([rows.live, rows.live.new_zeros(1)])[row]
    token, row = token[computed], row[computed]
    columns = []
    for j in range(width):
        source = token + (j - width + 1)
        column = x[source.clamp(min=0)].float()
        before = (source < start[row]).nonzero().squeeze(1)
        column[before] = rows.window[row[before], (source - start[row] + width - 1)[before]].float()
        columns.append(column)
    added = None if residual is None else residual[token]
    out[token] = _convolve(columns, call, x.dtype, added)
    return out


def _chains(tree_parents, count):
    """[batch, n, count]: each node, its parent, its grandparent, ..., then -1, -2, ... for the window's entries."""
    batch, nodes = tree_parents.shape
    node = torch.arange(nodes, device=tree_parents.device)
    parents = torch.minimum(int64(tree_parents), node - 1).clamp(min=-1)
    chain, source = [], node.expand(batch, nodes)
    for _ in range(count):
        chain.append(source)
        above = parents.gather(1, source.clamp(min=0)) if nodes else source
        source = torch.where(source >= 0, above, source - 1)
    return torch.stack(chain, dim=2) if chain else parents.new_zeros((batch, nodes, 0))


def _tree(rows, call, residual):
    """The outputs of trees: taps meet a node and its ancestors."""
    row, place = rows.tokens()
    token = rows.start[row] + place
    out = torch.zeros_like(rows.x)
    chain = _chains(call.tree_parents, call.weight.shape[1])[row, place].flip(1)
    inputs = _inputs(rows.window[row], rows.x, rows.start[row], chain, torch.float32)
    added = None if residual is None else residual[token]
    out[token] = _convolve(list(inputs.unbind(1)), call, out.dtype, added)
    return out


def silu_slope(z):
    """The derivative of SiLU in the kernel's form; see `backward._silu_slope`."""
    z = z.clamp(-97, 97)
    p = torch.exp(-z - 9.704060527839234)  # 2**-14 * exp(-z)
    r = 1 / (p + 2**-14)
    return r * (1 + z * (p * r)) * 2**-14


def backward(dout, dfinal, x, weight, bias, initial_states, query_start_loc, *, silu):
    """The gradients of checked arguments, x and dout of shape [tokens, dim].

    Returns:
      (dx, dweight, dbias, dinitial), each in the dtype of its argument; dbias and dinitial None without one.
    """
    tokens, history = x.shape[0], weight.shape[1] - 1
    batch, device = query_start_loc.shape[0] - 1, x.device
    start, end = bounds(query_start_loc, tokens)
    taps = weight.float()
    initial = x.new_zeros((batch, history, x.shape[1]), dtype=torch.float32)
    if initial_states is not None:
        initial = initial_states.float()

    token = torch.arange(tokens, device=device)
    row = row_of(token, end)
    token = token[row < batch]
    row = row[token]
    columns = []  # for each tap what it meets
    for j in range(history + 1):
        source = token + (j - history)
        column = x[source.clamp(min=0)].float()
        before = (source < start[row]).nonzero().squeeze(1)
        column[before] = initial[row[before], (source - start[row] + history)[before]]
        columns.append(column)

    g = dout[token].float()
    if silu:
        pre = bias.float() if bias is not None else torch.zeros_like(g)
        for j, column in enumerate(columns):
            pre = pre + column * taps[:, j]
        g = g * silu_slope(pre)
    g = torch.cat([g, g.new_zeros(1, g.shape[1])])  # the last one stands for tokens past a row's end

    def entry_gradient(begin, token, row, newest):
        """`begin` + sum of tap * g over the tokens that meet an entry: from `token`, by tap `newest`, on."""
        for j in range(newest, -1, -1):
            meets = token + (newest - j)
            here = (meets < end[row]) & (meets < len(g))
            begin = begin + g[torch.where(here, meets, len(g) - 1)] * taps[:, j]
        return begin

    begin = torch.zeros_like(g[:-1])
    if dfinal is not None:
        column = token - (end[row] - history)
        late = ((column >= 0) & (column < history)).nonzero().squeeze(1)  # decreasing offsets reach beyond
        begin[late] = dfinal[row[late], column[late]].float()
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    dx[token] = entry_gradient(begin, token, row, history).to(x.dtype)

    dweight = torch.stack([(column * g[:-1]).sum(0) for column in columns], dim=1).to(weight.dtype)
    dbias = None if bias is None else g.sum(0).to(bias.dtype)
    dinitial = None
    if initial_states is not None:
        dinitial = torch.zeros_like(initial)
        for c in range(history):
            begin = torch.zeros_like(initial[:, c])
            if dfinal is not None:
                column = c - (end - start)
                kept = ((column >= 0) & (column < history)).nonzero().squeeze(1)
                begin[kept] = dfinal[kept, column[kept]].float()
            dinitial[:, c] = entry_gradient(begin, start, torch.arange(batch, device=device), c)
        dinitial = dinitial.to(initial_states.dtype)
    return dx, dweight, dbias, dinitial
