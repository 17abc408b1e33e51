"""The operations in plain torch, for CPUs: the kernels' order of float32 operations, vectorised over tokens."""

import torch


def _silu(z):
    """z * sigmoid(z), by functions of torch whose bits do not depend on an element's place in the tensor.

    (`silu`, `sigmoid` and `exp2` round the last few elements differently on a CPU.)
    """
    return torch.where(z < -80, z * torch.exp(z), z / (1 + torch.exp(-z)))  # exp(-z) overflows from -89 on


def _convolve(columns, weight, bias, silu, dtype, residual=None):
    """act(bias + sum of weight[:, j] * columns[j], oldest first) + residual in float32, rounded once to `dtype`."""
    taps = weight.float()
    acc = bias.float().expand_as(columns[0]).clone() if bias is not None else torch.zeros_like(columns[0])
    for j, column in enumerate(columns):
        acc += column * taps[:, j]
    acc = _silu(acc) if silu else acc
    return (acc if residual is None else acc + residual.float()).to(dtype)


def _live(slots, num_slots, pad_slot_id):
    return (slots != pad_slot_id) & (slots >= 0) & (slots < num_slots)


def _packed(x, weight, bias, silu, start, end, live, window, residual=None):
    """The outputs of packed rows behind their windows [batch, width-1, dim]; zeros outside live rows."""
    width = weight.shape[1]
    out = torch.zeros_like(x)
    token = torch.arange(x.shape[0], device=x.device)
    row = _row_of(token, end)
    computed = torch.cat([live, live.new_zeros(1)])[row]  # row `batch` is the tail
    token, row = token[computed], row[computed]
    columns = []
    for j in range(width):
        source = token + (j - width + 1)
        column = x[source.clamp(min=0)].float()
        before = (source < start[row]).nonzero().squeeze(1)
        column[before] = window[row[before], (source - start[row] + width - 1)[before]].float()
        columns.append(column)
    added = None if residual is None else residual[token]
    out[token] = _convolve(columns, weight, bias, silu, x.dtype, added)
    return out


def _row_of(token, end):
    """The row of each token: the first that ends behind it."""
    return torch.searchsorted(end.contiguous(), token, right=True)


def _leave_window(x, conv_states, slot, live, start, end, window):
    """Leaves the last entries of window ++ x in the first columns of the slots of live rows with a token."""
    history = window.shape[1]
    if history == 0:
        return
    live = (live & (end > start)).nonzero().squeeze(1)
    source = end[live, None] + torch.arange(-history, 0, device=x.device)
    column = (source - start[live, None] + history).clamp(max=history - 1)
    old = window[live[:, None], column]
    new = x[source.clamp(min=0)].to(conv_states.dtype)
    inside = (source >= start[live, None])[:, :, None]
    conv_states[slot[live], :history] = torch.where(inside, new, old)


def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, *, silu, pad_slot_id
):
    """`causal_conv1d_fn` on checked arguments; returns `out` and updates `conv_states` in place."""
    history, device = weight.shape[1] - 1, x.device
    start, end = _bounds(query_start_loc, x.shape[0])
    slot = torch.arange(start.shape[0], device=device) if cache_indices is None else cache_indices.long()
    if conv_states is None:
        live = torch.ones_like(slot, dtype=torch.bool)
        window = torch.zeros((slot.shape[0], history, x.shape[1]), device=device)
        return _packed(x, weight, bias, silu, start, end, live, window)
    live = _live(slot, conv_states.shape[0], pad_slot_id)
    window = conv_states.new_zeros(
        (slot.shape[0], history, x.shape[1])
    )  # a row without a state starts from zeros
    if has_initial_state is not None:
        kept = live & has_initial_state
        window[kept] = conv_states[slot[kept], :history]
    out = _packed(x, weight, bias, silu, start, end, live, window)
    _leave_window(x, conv_states, slot, live, start, end, window)
    return out


def update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, *, silu, pad_slot_id
):
    """`causal_conv1d_update` on checked arguments; returns `out` and updates `conv_states` in place."""
    history, state_len, device = weight.shape[1] - 1, conv_states.shape[1], x.device
    tokens = x.reshape(-1, x.shape[-1])
    if query_start_loc is None:
        seqlen = x.shape[1] if x.dim() == 3 else 1
        start = torch.arange(x.shape[0], device=device) * seqlen
        end = start + seqlen
    else:
        start, end = _bounds(query_start_loc, x.shape[0])
    slot = torch.arange(start.shape[0], device=device) if cache_indices is None else cache_indices.long()
    live = _live(slot, conv_states.shape[0], pad_slot_id)
    column = torch.zeros_like(slot)
    if num_accepted_tokens is not None:
        column = num_accepted_tokens.long().clamp(1, state_len - history + 1) - 1
    window = conv_states.new_zeros((slot.shape[0], history, x.shape[-1]))
    window[live] = conv_states[slot[live, None], column[live, None] + torch.arange(history, device=device)]
    out = _packed(tokens, weight, bias, silu, start, end, live, window).reshape(x.shape)
    if num_accepted_tokens is None:
        _leave_window(tokens, conv_states, slot, live, start, end, window)
    elif history:
        live &= end > start
        conv_states[slot[live], : history - 1] = window[live, 1:]
        token = torch.arange(tokens.shape[0], device=device)
        row = _row_of(token, end)
        token, row = token[row < slot.shape[0]], row[row < slot.shape[0]]
        place = token - start[row]
        fits = live[row] & (place >= 0) & (place + history - 1 < state_len)
        token, row, place = token[fits], row[fits], place[fits] + history - 1
        conv_states[slot[row], place] = tokens[token].to(conv_states.dtype)
    return out


def _bounds(query_start_loc, tokens):
    """First token and end of each row, clamped to [0, tokens]; the first row is taken to start at 0."""
    offsets = query_start_loc.long().clamp(0, tokens)
    offsets[0] = 0
    return offsets[:-1], offsets[1:]
