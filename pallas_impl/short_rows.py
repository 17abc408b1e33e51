"""Prefill of rows of few tokens on Mosaic GPU: a program owns tokens that follow each other, whatever rows they belong to.

Where rows are shorter than a block, a program for each block of a row mostly waits: for its row, its slot, its window.
Here TMA brings a tile of tokens, and the windows of all rows that begin in it, each asked for before the first is
waited for; then the program walks down its rows. Results and new windows leave from registers.

A row's slot is read and written by the program that has the row's first token. So that one also computes those of
the row's first width-1 tokens that are behind its tile, and the next one leaves them out.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.arithmetic import convolve, div, in_layout, issue_loads, keep, load_taps, rem
from pallas_impl.config import cdiv
from pallas_impl.launch import joined, parts, run
from pallas_impl.rows import HIGHEST, row_facts, rows_near, store_zeros
from pallas_impl.slots import find_slot, part_of_out

WINDOWS = 8  # on their way at a time
ZEROS, LIVE, STATEFUL = range(3)  # what a row is: without results, with them, and with a window


def takes(arrays, options):
    """Whether this kernel runs a prefill: rows that are short on average, and nothing but a window in front of each slot."""
    x, pool, (dim, width) = arrays.x, arrays.conv_states, arrays.weight.shape
    plain = options.own_state and options.state_layout == "front" and options.gates is None
    plain &= options.heads is None and arrays.residual is None and arrays.document_marks is None
    alike = pool is None or pool.dtype == x.dtype
    return bool(options.config.short_t) and plain and alike and width > 1 and dim % 128 == 0


def launch(arrays, options):
    """Runs the kernel.

    Args:
      arrays: x, weight, bias, conv_states, query_start_loc, cache_indices and has_initial_state are used, integers as
        int32. The pool is written in place where XLA owns it, else XLA copies it first.
      options: `Options` with a `PrefillConfig` that has `short_t`; `channel` is a multiple of 16 bytes.

    Returns:
      (out, conv_states); with `split_sizes`, `out` is a tuple.
    """
    x, pool, config = arrays.x, arrays.conv_states, options.config
    tokens, (dim, width) = x.shape[0], arrays.weight.shape
    batch, history = arrays.query_start_loc.shape[0] - 1, width - 1
    block_d = config.block_d if dim % config.block_d == 0 else 128
    options = options._replace(config=config._replace(block_d=block_d))
    box = min(config.short_t + 2 * history - 1, tokens)
    blocks = cdiv(tokens, config.short_t)
    *outs, new_pool = run(
        functools.partial(
            _kernel, num_slots=None if pool is None else pool.shape[0], batch=batch, box=box, o=options
        ),
        "short_rows",
        blocks * (dim // block_d),
        arrays.named("x", "weight", "query_start_loc", "bias", "cache_indices", "has_initial_state")
        | dict(conv_states=pool),
        parts(x.dtype, tokens, dim, options.split_sizes),
        dict(
            # A tile with the tokens before and behind it, windows, and one of zeros.
            entries=plgpu.SMEM((box + (WINDOWS + 1) * history, block_d), x.dtype),
            tile_ready=plgpu.Barrier(),
            window_ready=plgpu.Barrier(num_barriers=WINDOWS),
        ),
        written=("conv_states",),
        interpret=options.interpret,
        tokens=blocks * config.short_t,
    )
    return joined(outs, options.split_sizes), new_pool


def _kernel(refs, *, num_slots, batch, box, o):
    x, weight, pool, entries, interpret = (
        refs.x,
        refs.weight,
        refs.conv_states,
        refs.entries,
        bool(o.interpret),
    )
    tokens, (dim, width) = x.shape[0], weight.shape
    history, block_t, block_d = width - 1, o.config.short_t, o.config.block_d
    windows, zeros = box, box + WINDOWS * history  # where they are in `entries`

    # mapping of programs
    program = lax.axis_index("program")
    first, column = div(program, dim // block_d) * block_t, rem(program, dim // block_d)
    channels = pl.ds(column * block_d, block_d)
    of_x = pl.ds(channels.start + o.channel, block_d) if o.channel else channels
    beyond, begin = jnp.minimum(first + block_t, tokens), jnp.maximum(first - history, 0)

    plgpu.copy_gmem_to_smem(x.at[pl.ds(begin, box), of_x], entries.at[pl.ds(0, box)], refs.tile_ready)
    taps, bias = load_taps(weight, refs.bias, channels.start, block_d, interpret=interpret)
    for m in range(history):
        store_zeros(entries, zeros + m, interpret)
    issue_loads(interpret=interpret)

    def facts(row):
        start, end = row_facts(refs.query_start_loc, jnp.minimum(row, batch), batch, tokens)
        slot, live = find_slot(refs.cache_indices, row, batch, num_slots, o.pad_slot_id)
        stateful = jnp.bool_(pool is not None and o.always_state)
        if pool is not None and refs.has_initial_state is not None:
            stateful = refs.has_initial_state[jnp.minimum(row, batch - 1)]
        return start, end, slot, jnp.where(live, jnp.where(stateful, STATEFUL, LIVE), ZEROS)

    def convolve_rows(token):
        """Rows from that one on which has the token, as many as there is room for windows. Returns where they end."""
        base, lanes = rows_near(
            refs.query_start_loc, token, beyond, facts, batch, tokens, interpret=interpret
        )

        def here(lane, start, end, slot, kind):
            return (base + lane <= batch) & (start < end) & (end > token) & (start < beyond)

        def has_window(lane, start, end, slot, kind):
            return here(lane, start, end, slot, kind) & (start >= first) & (kind == STATEFUL)

        rows = lanes.where(here)
        if pool is not None:
            wanted = lanes.where(has_window)
            room = lambda state: (state[0] != 0) & (state[1] < WINDOWS)  # noqa: E731
            left, _ = lax.while_loop(room, functools.partial(load_window, lanes), (wanted, jnp.int32(0)))
            rows &= jnp.where(
                left == 0, jnp.int32(-1), ~lax.shift_right_logical(jnp.int32(-1), lax.clz(left))
            )
        pl.when(token == first)(lambda: plgpu.barrier_wait(refs.tile_ready))
        lax.while_loop(lambda state: state[0] != 0, functools.partial(walk, lanes), (rows, jnp.int32(0)))

        _, end, _, _ = lanes[lax.clz(rows & -rows)]
        end = jnp.where(rows == 0, beyond, jnp.maximum(end, token + 1))  # whatever the offsets are
        pl.when(end < beyond)(plgpu.commit_smem)  # the windows have been read
        return end

    def load_window(lanes, state):
        left, k = state
        lane = lax.clz(left)
        _, _, slot, _ = lanes[lane]
        window = entries.at[pl.ds(windows + k * history, history)]
        plgpu.copy_gmem_to_smem(pool.at[slot, pl.ds(0, history), channels], window, refs.window_ready.at[k])
        return without(left, lane), k + 1

    def walk(lanes, state):
        left, k = state
        lane = lax.clz(left)
        start, end, slot, kind = lanes[lane]
        begins = start >= first
        old = begins & (kind == STATEFUL)
        if pool is not None:
            pl.when(old)(lambda: plgpu.barrier_wait(refs.window_ready.at[k]))
        window = jnp.where(old, windows + k * history, zeros)
        convolve_row(window, start, end, slot, begins, kind != ZEROS)
        return without(left, lane), k + old.astype(jnp.int32)

    def convolve_row(window, start, end, slot, begins, live):
        early = start + history  # before it, tokens need the window
        low = jnp.where(begins, start, jnp.maximum(first, early))
        high = jnp.minimum(end, jnp.where(begins, jnp.maximum(beyond, early), beyond))
        before = entries.at[pl.ds(jnp.where(begins, window, low - begin - history), history)]
        past = tuple(before[m] for m in range(history))
        single = begins & (end - start == 1)

        @pl.when(single)
        def _():
            token = entries[start - begin]
            store(start, (*wide(past), token.astype(jnp.float32)), live)
            if pool is not None:
                pl.when(live)(lambda: store_window(slot, (*past[1:], token)))

        @pl.when(jnp.logical_not(single))
        def _():
            def convolve_token(t, past):
                past = (*past, entries[t - begin].astype(jnp.float32))
                store(t, past, live)
                return past[1:]

            lax.fori_loop(low, high, convolve_token, wide(past))
            if pool is None:
                return
            arrived = end <= begin + box

            @pl.when(live & begins & arrived)
            def _():
                newest = [end - start + m - history for m in range(history)]  # tokens of the row
                places = [jnp.where(n >= 0, start - begin + n, window + n + history) for n in newest]
                store_window(slot, [entries[place] for place in places])

            @pl.when(live & begins & jnp.logical_not(arrived))
            def _():
                newest = [x[end - history + m, of_x] for m in range(history)]
                store_window(slot, [in_layout(entry, interpret=interpret) for entry in newest])

    def wide(past):
        return tuple(entry.astype(jnp.float32) for entry in past)

    def store(t, past, live):
        y = convolve(past, taps, bias, silu=o.silu, interpret=interpret)
        y = keep(live, y, interpret=interpret).astype(x.dtype)

        def into(out, part):
            out[t, part] = y

        part_of_out(refs.outs, channels, into)

    def store_window(slot, newest):
        for m, entry in enumerate(newest):
            pool[slot, m, channels] = entry

    lax.while_loop(lambda token: token < beyond, convolve_rows, first)


def without(mask, lane):
    return mask & ~lax.shift_right_logical(HIGHEST, lane)
