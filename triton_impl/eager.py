"""The operations in plain torch, for CPUs: the kernels' order of float32 operations, vectorised over tokens."""

import torch


def _silu(z):
    """z * sigmoid(z), by functions of torch whose bits do not depend on an element's place in the tensor.

    (`silu`, `sigmoid` and `exp2` round the last few elements differently on a CPU.)
    """
    return torch.where(z < -80, z * torch.exp(z), z / (1 + torch.exp(-z)))  # exp(-z) overflows from -89 on


def _convolve(columns, weight, bias, silu, dtype):
    """bias + sum of weight[:, j] * columns[j], oldest first, in float32, rounded once to `dtype`."""
    taps = weight.float()
    acc = bias.float().expand_as(columns[0]).clone() if bias is not None else torch.zeros_like(columns[0])
    for j, column in enumerate(columns):
        acc += column * taps[:, j]
    return (_silu(acc) if silu else acc).to(dtype)


def _live(slots, num_slots, pad_slot_id):
    return (slots != pad_slot_id) & (slots >= 0) & (slots < num_slots)


def prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, *, silu, pad_slot_id
):
    """`causal_conv1d_fn` on checked arguments; returns `out` and updates `conv_states` in place."""
    tokens, width = x.shape[0], weight.shape[1]
    batch, device = query_start_loc.shape[0] - 1, x.device
    offsets = query_start_loc.long().clamp(0, tokens)
    offsets[0] = 0
    start, end = offsets[:-1], offsets[1:]
    slot = torch.arange(batch, device=device) if cache_indices is None else cache_indices.long()
    live = torch.ones(batch, dtype=torch.bool, device=device)
    if conv_states is not None:
        live = _live(slot, conv_states.shape[0], pad_slot_id)
    fresh = torch.ones_like(live) if has_initial_state is None else ~has_initial_state

    # the last width-1 inputs before each row; zeros for rows without a state
    window = x.new_zeros(
        (batch, width - 1, x.shape[1]), dtype=torch.float32 if conv_states is None else conv_states.dtype
    )
    if conv_states is not None:
        kept = live & ~fresh
        window[kept] = conv_states[slot[kept], : width - 1]

    out = torch.zeros_like(x)
    token = torch.arange(tokens, device=device)
    row = torch.searchsorted(end.contiguous(), token, right=True)
    token = token[(row < batch) & (torch.cat([live, live.new_zeros(1)])[row])]
    row = row[token]
    columns = []
    for j in range(width):
        source = token + (j - width + 1)
        column = x[source.clamp(min=0)].float()
        before = (source < start[row]).nonzero().squeeze(1)
        column[before] = window[row[before], (source - start[row] + width - 1)[before]].float()
        columns.append(column)
    out[token] = _convolve(columns, weight, bias, silu, x.dtype)

    if conv_states is not None and width > 1:
        live = (live & (end > start)).nonzero().squeeze(1)
        source = end[live, None] + torch.arange(1 - width, 0, device=device)
        column = (source - start[live, None] + width - 1).clamp(max=width - 2)
        old = window[live[:, None], column]
        new = x[source.clamp(min=0)].to(conv_states.dtype)
        conv_states[slot[live], : width - 1] = torch.where(
            (source >= start[live, None])[:, :, None], new, old
        )
    return out


def update(x, weight, bias, conv_states, cache_indices, *, silu, pad_slot_id):
    """`causal_conv1d_update` on checked arguments; returns `out` and updates `conv_states` in place."""
    width = weight.shape[1]
    tokens = x if x.dim() == 3 else x[:, None]
    out = torch.zeros_like(x)
    slot = torch.arange(x.shape[0], device=x.device) if cache_indices is None else cache_indices.long()
    live = _live(slot, conv_states.shape[0], pad_slot_id).nonzero().squeeze(1)
    slot = slot[live]
    tokens = tokens[live]
    seqlen = tokens.shape[1]
    window = conv_states[slot, : width - 1]
    extended = torch.cat([window.float(), tokens.float()], dim=1)
    columns = [extended[:, j : j + seqlen] for j in range(width)]
    out[live] = _convolve(columns, weight, bias, silu, x.dtype).reshape(live.shape[0], *x.shape[1:])
    conv_states[slot, : width - 1] = torch.cat([window, tokens.to(conv_states.dtype)], dim=1)[:, seqlen:]
    return out
