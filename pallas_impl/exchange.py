"""Device code of tokens split over devices: what a part cannot know before others have told it, written over afterwards.

One warpgroup a program, one row of the whole, one block of channels, all in registers: width-1 tokens at a cut are too few
for boxes. Offsets are into the whole and are clamped to it, so no value of `query_start_loc` leads outside of an array.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_impl.arithmetic import WARPGROUP, convolve, div, in_layout, keep, load_taps, rem
from pallas_impl.backward import gradient_step
from pallas_impl.launch import run
from pallas_impl.rows import row_facts
from pallas_impl.slots import find_slot


def fits(tokens, dim, history):
    """Whether these kernels take a part: whole blocks of channels, and as many tokens as both cuts together need."""
    return tokens >= 2 * history > 0 and dim % WARPGROUP == 0


def message(x, query_start_loc, begin, history):
    """[(1 + batch) * (width-1), dim]: a part's last tokens, and the last ones of each row; any where they are not here."""
    ends, tokens = query_start_loc[1:], x.shape[0]
    place = ends[:, None] - history + jnp.arange(history, dtype=ends.dtype) - begin
    of_rows = x[jnp.clip(place, 0, tokens - 1)].reshape(-1, x.shape[1])
    return jnp.concatenate([x[tokens - history :], of_rows])


@functools.partial(jax.jit, static_argnames=("whole", "options"))
def mend_first(out, arrays, told, begin, *, whole, options):
    """The first width-1 tokens of a part, where a row crosses the cut before it; with a pool all new windows.

    Args:
      out: [tokens, dim]: the result of a prefill of the part, wrong there; written in place where XLA owns it.
      arrays: `Arrays` of that prefill: x is the part, `query_start_loc` [batch+1] int32 of the whole; integers as int32;
        the pool still holds the old windows and is written in place where XLA owns it.
      told: with a pool [devices, (1 + batch) * (width-1), dim], of each device its `message`; else [1, width-1, dim], the
        tokens before the part.
      begin: int32, its first entry says where the part begins in the whole.
      whole: tokens of all devices.
      options: `Options`.

    Returns:
      (out, conv_states).
    """
    operands = arrays.named(
        "x", "weight", "bias", "query_start_loc", "cache_indices", "has_initial_state", "conv_states"
    )
    operands |= dict(told=told, begin=begin, out=out)
    return _mend("first", _first_kernel, operands, ("out", "conv_states"), whole, options)


def _mend(name, kernel, operands, written, whole, options):
    """Runs a kernel with a program for every row of the whole and `WARPGROUP` channels."""
    batch, columns = operands["query_start_loc"].shape[0] - 1, operands["weight"].shape[0] // WARPGROUP
    kernel = functools.partial(kernel, batch=batch, columns=columns, whole=whole, o=options)
    programs, interpret = batch * columns, options.interpret
    return run(kernel, f"mend_{name}", programs, operands, {}, {}, written=written, interpret=interpret)


def _place(refs, batch, columns, whole):
    """(row, its channels, begin of the part, begin and end of the row in the whole) of a program."""
    program = lax.axis_index("program")
    row, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * WARPGROUP, WARPGROUP)
    return row, channels, refs.begin[0], *row_facts(refs.query_start_loc, row, batch, whole)


def _first_kernel(refs, *, batch, columns, whole, o):
    x, weight, pool, told, out = refs.x, refs.weight, refs.conv_states, refs.told, refs.out
    tokens, history, interpret = x.shape[0], weight.shape[1] - 1, bool(o.interpret)
    row, channels, begin, start, end = _place(refs, batch, columns, whole)
    slot, live = find_slot(
        refs.cache_indices, row, batch, None if pool is None else pool.shape[0], o.pad_slot_id
    )
    stateful = (
        refs.has_initial_state[row] if pool is not None and refs.has_initial_state is not None else False
    )

    def entry(device, i, position, dtype):
        """The row's input at a position, which vector i of a device is, or before the row one of its old window."""
        here = position >= start
        read = lambda: in_layout(told[device, i, channels], interpret=interpret).astype(dtype)  # noqa: E731
        value = lax.cond(here, read, lambda: in_layout(jnp.zeros((WARPGROUP,), dtype), interpret=interpret))
        if pool is None or refs.has_initial_state is None:
            return value
        place = jnp.clip(position - start + history, 0, history - 1)
        old = lambda: in_layout(pool[slot, place, channels], interpret=interpret).astype(dtype)  # noqa: E731
        return lax.cond(stateful & jnp.logical_not(here), old, lambda: value)

    def mend():
        before = 0 if told.shape[0] == 1 else div(begin, tokens) - 1
        past = tuple(entry(before, j, begin - history + j, jnp.float32) for j in range(history))
        taps, bias = load_taps(weight, refs.bias, channels.start, WARPGROUP, interpret=interpret)
        for t in range(history):
            past = (*past, in_layout(x[t, channels], interpret=interpret).astype(jnp.float32))
            y = convolve(past, taps, bias, silu=o.silu, interpret=interpret).astype(out.dtype)

            @pl.when(t < end - begin)
            def _(t=t, y=y):
                out[t, channels] = y

            past = past[1:]

    def leave():
        new = []
        for c in range(history):
            position = end - history + c
            holder = div(jnp.maximum(position, 0), tokens)
            new.append(entry(holder, (1 + row) * history + c, position, pool.dtype))
        for c, value in enumerate(new):
            pool[slot, c, channels] = value

    live = live & (end > start)
    pl.when(live & (start < begin) & (begin < end))(mend)
    if pool is not None:
        pl.when(live)(leave)


@functools.partial(jax.jit, static_argnames=("whole", "options"))
def mend_last(dx, dout, arrays, after, begin, *, whole, options):
    """The gradient of a part's last width-1 tokens, where a row crosses the cut behind it.

    Args:
      dx: [tokens, dim]: the gradient of the part, of its own outputs alone; written in place where XLA owns it.
      dout: [tokens, dim]: that of the outputs.
      arrays: `Arrays`: x is the part, weight, bias, `query_start_loc` [batch+1] int32 of the whole.
      after: [width-1, 2 * dim]: the tokens after the part, and behind each the gradient of its output.
      begin, whole, options: as in `mend_first`.

    Returns:
      dx.
    """
    operands = arrays.named("x", "weight", "bias", "query_start_loc") | dict(
        dout=dout, after=after, begin=begin, dx=dx
    )
    (dx,) = _mend("last", _last_kernel, operands, ("dx",), whole, options)
    return dx


def _last_kernel(refs, *, batch, columns, whole, o):
    x, dout, weight, after, dx = refs.x, refs.dout, refs.weight, refs.after, refs.dx
    (tokens, dim), history, interpret = x.shape, weight.shape[1] - 1, bool(o.interpret)
    _, channels, begin, start, end = _place(refs, batch, columns, whole)
    upstream_channels = pl.ds(dim + channels.start, WARPGROUP)
    start, end = start - begin, end - begin  # counted in the part

    def mend():
        taps, bias = load_taps(weight, refs.bias, channels.start, WARPGROUP, interpret=interpret)
        zero = in_layout(jnp.zeros((WARPGROUP,), jnp.float32), interpret=interpret)

        def read(ref, t, lanes):
            return in_layout(ref[t, lanes], interpret=interpret).astype(jnp.float32)

        def token(t):
            value = read(x, t, channels) if t < tokens else read(after, t - tokens, channels)
            return keep(t >= start, value, interpret=interpret)

        past = tuple(token(t) for t in range(tokens - 2 * history, tokens - history))
        gs = (zero,) * history
        for t in range(tokens - history, tokens + history):
            past = (*past, token(t))
            g = read(dout, t, channels) if t < tokens else read(after, t - tokens, upstream_channels)
            (g,) = gradient_step(
                past,
                taps,
                bias,
                g,
                (),
                (t >= start) & (t < end),
                jnp.bool_(False),
                silu=o.silu,
                has_bias=False,
                interpret=interpret,
            )
            gs = (*gs, g)
            if t >= tokens:
                gradient = convolve(gs, taps[::-1], zero, silu=False, interpret=interpret)

                @pl.when(t - history >= start)
                def _(t=t, gradient=gradient):
                    dx[t - history, channels] = gradient.astype(dx.dtype)

            past, gs = past[1:], gs[-history:]

    pl.when((start < tokens) & (tokens < end))(mend)
