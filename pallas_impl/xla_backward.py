"""Gradients of a packed convolution in plain jax.numpy, for CPUs and TPUs: float32, vectorised over tokens."""

import jax.numpy as jnp

from pallas_impl.taps import LOG2E, SCALE
from pallas_impl.xla import offsets


def silu_slope(z):
    """The derivative of SiLU, s * (1 + z * (1 - s)); 2**14 * s in between, and no cancellation in 1 - s.

    Beyond 97 it is 0 or 1 to the last bit of a float32.
    """
    z = jnp.clip(z, -97.0, 97.0)
    p = jnp.exp2(z * -LOG2E - 14.0)
    r = 1.0 / (p + SCALE)
    return r * (1.0 + z * (p * r)) * SCALE


def backward(dout, dfinal, x, weight, bias, initial_states, query_start_loc, *, silu):
    """The gradients of checked arguments, x and dout of shape [tokens, dim].

    Returns:
      (dx, dweight, dbias, dinitial), each in the dtype of its argument; dbias and dinitial None without one.
    """
    (tokens, dim), history = x.shape, weight.shape[1] - 1
    batch = query_start_loc.shape[0] - 1
    if tokens == 0 or batch == 0:
        dinitial = dfinal
        if initial_states is not None:
            dinitial = (
                jnp.zeros_like(initial_states) if dfinal is None else dfinal.astype(initial_states.dtype)
            )
        return (
            jnp.zeros_like(x),
            jnp.zeros_like(weight),
            _zeros(bias),
            None if initial_states is None else dinitial,
        )
    starts = offsets(query_start_loc, tokens)
    taps = weight.astype(jnp.float32)
    initial = jnp.zeros((batch, history, dim), jnp.float32)
    if initial_states is not None:
        initial = initial_states.astype(jnp.float32)

    token = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.searchsorted(starts[1:], token, side="right", method="sort").astype(jnp.int32)
    live = row < batch
    owner = jnp.minimum(row, batch - 1)
    begin, end = starts[owner], starts[owner + 1]
    values = jnp.where(live[:, None], x.astype(jnp.float32), 0.0)
    columns = []  # for each tap what it meets
    for j in range(history + 1):
        back = history - j
        column = jnp.pad(values, ((back, 0), (0, 0)))[:tokens]
        if back:
            entry = jnp.clip(token - begin + j, 0, history - 1)
            column = jnp.where((token - begin < back)[:, None], initial[owner, entry], column)
        columns.append(column)

    g = jnp.where(live[:, None], dout.astype(jnp.float32), 0.0)
    if silu:
        pre = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
        for j, column in enumerate(columns):
            pre = pre + taps[:, j] * column
        g = jnp.where(live[:, None], g * silu_slope(pre), 0.0)
    padded = jnp.pad(g, ((0, history), (0, 0)))

    dx = jnp.zeros((), jnp.float32)
    if dfinal is not None and history:
        column = token - (end - history)
        late = live & (column >= 0)
        dx = jnp.where(
            late[:, None], dfinal.astype(jnp.float32)[owner, jnp.clip(column, 0, history - 1)], 0.0
        )
    for back in range(history + 1):  # the tokens that meet an input: from its own on, newest tap first
        met = jnp.where((live & (token + back < end))[:, None], padded[back : back + tokens], 0.0)
        dx = dx + taps[:, history - back] * met

    dweight = jnp.stack([(column * g).sum(0) for column in columns], axis=1).astype(weight.dtype)
    dbias = None if bias is None else g.sum(0).astype(bias.dtype)
    dinitial = None
    if initial_states is not None:
        length = starts[1:] - starts[:-1]
        entries = []
        for c in range(history):
            value = jnp.zeros((batch, dim), jnp.float32)
            if dfinal is not None:
                column = jnp.clip(c - length, 0, history - 1)[:, None, None]
                kept = jnp.take_along_axis(dfinal.astype(jnp.float32), column, axis=1)[:, 0]
                value = jnp.where((c >= length)[:, None], kept, 0.0)
            for j in range(c, -1, -1):
                met = padded[jnp.minimum(starts[:-1] + (c - j), tokens)]
                value = value + taps[:, j] * jnp.where((c - j < length)[:, None], met, 0.0)
            entries.append(value)
        dinitial = jnp.stack(entries, axis=1) if entries else initial
        dinitial = dinitial.astype(initial_states.dtype)
    return dx.astype(x.dtype), dweight, dbias, dinitial


def _zeros(array):
    return None if array is None else jnp.zeros_like(array)
