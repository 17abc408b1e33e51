"""Gradients of a packed convolution in plain torch, for CPUs: float32, vectorised over tokens."""

import torch


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
    offsets = query_start_loc.long().clamp(0, tokens)
    offsets[0] = 0
    start, end = offsets[:-1], offsets[1:]
    taps = weight.float()
    initial = x.new_zeros((batch, history, x.shape[1]), dtype=torch.float32)
    if initial_states is not None:
        initial = initial_states.float()

    token = torch.arange(tokens, device=device)
    row = torch.searchsorted(end.contiguous(), token, right=True)
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
