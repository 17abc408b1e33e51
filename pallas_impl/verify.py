"""Decode of several tokens a row on Mosaic GPU, in any layout: one warpgroup a row and tile of channels.

The program owns its row's channels: it reads the window wherever the slot has it, walks down the tokens, and
stores results, windows of every step and the new state, all after the reads they could disturb. What it has seen
lies in shared memory as one run of entries, so the window after any token is a box of that run.

A rolling slot (`num_accepted_tokens`) has the window in column count-1 on. Its entries but the oldest go to columns
0 to width-3, the new tokens behind them, as many as the slot has columns for; the next step's count then picks the
window that ends with the last accepted token.

Draft trees (`trees`) share all but the walk.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.arithmetic import add_residual, convolve, div, load_taps, rem
from pallas_impl.config import BLOCK_T, cdiv
from pallas_impl.launch import joined, parts, run
from pallas_impl.rows import copy_out, load_rows, row_facts, store_rows, zero_tail
from pallas_impl.slots import (
    COLUMNS,
    Mover,
    find_slot,
    first_column,
    is_slot,
    leave_state,
    load_window,
    part_of_out,
)

OPERANDS = (
    "x",
    "weight",
    "bias",
    "query_start_loc",
    "cache_indices",
    "num_accepted_tokens",
    "cache_seqlens",
    "write_indices",
    "track_indices",
    "window_indices",
    "tree_parents",
    "residual",
)


class Place(NamedTuple):
    """What a program works on: tokens `start` to `end` of a row, or of the tail, and a tile of channels.

    Attributes:
      index: which program of its tile of channels; row: the row, `batch` for the tail; here: at most the last row.
      slot, live: the row's slot, and whether it is computed.
      channels, x_channels: the tile, in arrays of dim channels and in x.
      batch, tail_programs: host integers: the rows, and how many programs share the tail.
    """

    index: Any
    row: Any
    here: Any
    start: Any
    end: Any
    slot: Any
    live: Any
    channels: Any
    x_channels: Any
    batch: int
    tail_programs: int


def launch(arrays, options):
    """Runs the kernel.

    Args:
      arrays: those of an update, integers as int32, x as [tokens, channels]; rows of x, of the pool, of residual and of
        `window_out` are multiples of 16 bytes and at least 128 channels long. The pool and `window_out` are written in
        place where XLA owns them, else XLA copies them first. Without `query_start_loc` every row has
        `options.seqlen` tokens.
      options: `Options`; `channel` is a multiple of 16 bytes, `split_sizes` are of `block_d`.

    Returns:
      (out, conv_states, window_out); with `split_sizes`, `out` is a tuple.
    """
    x, pool = arrays.x, arrays.conv_states
    history, front = arrays.weight.shape[1] - 1, options.state_layout == "front"
    starts, windows = arrays.query_start_loc, arrays.window_out
    stores = options.commit and (history > 0 or (pool.shape[1] > 0 and not front))
    block_t = block_of(arrays, options)
    tail_programs = 0 if starts is None else min(cdiv(x.shape[0], block_t), 8)
    tile = lambda rows, dtype: plgpu.SMEM((rows, options.block_d), dtype)  # noqa: E731
    scratch = block_scratch(arrays, options)
    if history and windows is not None:
        scratch["recent"] = tile(history + block_t, windows.dtype)
    if stores and front and history and not (windows is not None and windows.dtype == pool.dtype):
        scratch["kept"] = tile(history + block_t, pool.dtype)
    if stores and not front:
        scratch |= dict(moved=tile(COLUMNS, pool.dtype), moved_ready=plgpu.Barrier(num_barriers=COLUMNS))
        if pool.dtype != x.dtype:
            scratch["arrived"] = tile(COLUMNS, x.dtype)
    body = functools.partial(_kernel, stores=stores)
    return run_rows(body, "verify", arrays, options, scratch, stores=stores, tail_programs=tail_programs)


def block_of(arrays, options):
    """Tokens of a row on their way at a time."""
    packed = arrays.query_start_loc is not None
    return BLOCK_T if packed else min(BLOCK_T, 1 << (options.seqlen - 1).bit_length())


def block_scratch(arrays, options):
    """Shared memory for the tokens of a block, the window, and the residual."""
    block_t, history = block_of(arrays, options), arrays.weight.shape[1] - 1
    tile = lambda rows, dtype: plgpu.SMEM((rows, options.block_d), dtype)  # noqa: E731
    scratch = dict(
        tile=tile(block_t, arrays.x.dtype),
        window=tile(max(history, 1), arrays.conv_states.dtype),
        tile_ready=plgpu.Barrier(),
        window_ready=plgpu.Barrier(num_barriers=max(history, 1)),
    )
    if arrays.residual is not None:
        scratch |= dict(added=tile(block_t, arrays.residual.dtype), added_ready=plgpu.Barrier())
    return scratch


def run_rows(body, name, arrays, options, scratch, *, stores=False, tail_programs=0):
    """Runs `body(refs, place, block_t, num_slots, state_len, o)` for every row and tile of channels, and for the tail."""
    x, pool, starts = arrays.x, arrays.conv_states, arrays.query_start_loc
    tokens, (dim, width) = x.shape[0], arrays.weight.shape
    batch = tokens // options.seqlen if starts is None else starts.shape[0] - 1
    columns = cdiv(dim, options.block_d)
    num_slots, state_len, _ = pool.shape
    windows = arrays.window_out if width > 1 else None
    body = functools.partial(
        body, block_t=block_of(arrays, options), num_slots=num_slots, state_len=state_len, o=options
    )

    def program(refs):
        place = _find_place(refs, batch, columns, num_slots, tail_programs, options)
        body(refs, place)

    operands = arrays.named(*OPERANDS)
    operands |= dict(conv_states=pool if stores or width > 1 else None, window_out=windows)
    found = run(
        program,
        name,
        (batch + tail_programs) * columns,
        operands,
        parts(x.dtype, tokens, dim, options.split_sizes),
        scratch,
        written=("conv_states", "window_out") if stores else ("window_out",),
        interpret=options.interpret,
    )
    outs, pool = (found[:-2], found[-2]) if stores else (found[:-1], pool)
    return joined(outs, options.split_sizes), pool, arrays.window_out if windows is None else found[-1]


def _find_place(refs, batch, columns, num_slots, tail_programs, o):
    program = lax.axis_index("program")
    index, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * o.block_d, o.block_d)
    x_channels = pl.ds(o.channel + column * o.block_d, o.block_d)
    row = jnp.minimum(index, batch)
    start, end = row_facts(refs.query_start_loc, row, batch, refs.x.shape[0], o.seqlen)
    slot, live = find_slot(refs.cache_indices, row, batch, num_slots, o.pad_slot_id)
    here = jnp.minimum(row, batch - 1)
    return Place(index, row, here, start, end, slot, live, channels, x_channels, batch, tail_programs)


def _kernel(refs, place, *, block_t, num_slots, state_len, stores, o):
    pool, history, interpret = refs.conv_states, refs.weight.shape[1] - 1, bool(o.interpret)
    front = o.state_layout == "front"

    begun = (place.row < place.batch) & (place.start < place.end)

    @pl.when(begun)  # whatever the slot is, which is still on its way
    def _():
        load_block(refs, place, 0, block_t)

    @pl.when(begun & place.live)
    def _():
        if history:
            first = first_column(refs, place.here, history, state_len, o.state_layout)
            load_window(
                pool, place.slot, first, place.channels, refs.window, refs.window_ready, o.state_layout
            )
        weights = load_taps(refs.weight, refs.bias, place.channels.start, o.block_d, interpret=interpret)
        _walk(refs, place, weights, block_t, stores and front and history, o)
        if stores and not front:
            target = place.slot if refs.write_indices is None else refs.write_indices[place.here]

            @pl.when(is_slot(target, num_slots, o.pad_slot_id))
            def _():
                move = Mover(refs, place.slot, place.channels, o.channel, interpret)
                seqlen = None if refs.cache_seqlens is None else refs.cache_seqlens[place.here]
                leave_state(
                    move,
                    target,
                    place.start,
                    place.end - place.start,
                    seqlen,
                    jnp.bool_(True),
                    history=history,
                    layout=o.state_layout,
                )

    pl.when(begun & jnp.logical_not(place.live))(lambda: wait_block(refs))
    store_padding(refs, place, block_t, interpret)


def _walk(refs, place, weights, block_t, stores, o):
    """The tokens of a row one after another; `stores`: it leaves the window in front of its slots."""
    pool, tile, window, recent = refs.conv_states, refs.tile, refs.window, refs.recent
    history, rolls = refs.weight.shape[1] - 1, refs.num_accepted_tokens is not None
    kept = None
    if stores:
        kept = recent if refs.kept is None else refs.kept  # both hold the entries in one dtype
    runs = [ref for ref in (recent, refs.kept) if ref is not None]
    # A rolling slot is left what arrives; the entries before that are kept for windows alone.
    carried = [ref for ref in runs if ref is recent or not rolls or refs.track_indices is not None]
    past = ()
    if history:
        for j in range(history if o.state_layout == "ring" else 1):
            plgpu.barrier_wait(refs.window_ready.at[j])
        past = tuple(window[j].astype(jnp.float32) for j in range(history))
        for entries in carried:
            for j in range(history):
                entries[j] = window[j].astype(entries.dtype)
    target = place.slot
    if stores:
        target = place.slot if refs.write_indices is None else refs.write_indices[place.here]

    def store_window(rows, target):
        @pl.when(is_slot(target, pool.shape[0], o.pad_slot_id))
        def _():
            columns = lambda channels: pool.at[target, pl.ds(0, rows.shape[0]), channels]  # noqa: E731
            copy_out(rows, columns, place.channels, pool.shape[2])

    if rolls and history > 1 and stores:
        plgpu.commit_smem()
        store_window(window.at[pl.ds(1, history - 1)], target)

    def token(t, past, arrived=None):
        if arrived is None:
            arrived = tile[t]
        for entries in runs:
            entries[history + t] = arrived.astype(entries.dtype)
        past = (*past, arrived.astype(jnp.float32))
        emit(refs, past, t, weights, o)
        return past[1:]

    blocks = div(place.end - place.start + block_t - 1, block_t)

    def turn(block, past):
        begin = place.start + block * block_t
        length = jnp.minimum(place.end - begin, block_t)
        wait_block(refs)
        if refs.query_start_loc is None and o.seqlen <= block_t:
            # before any store, which the assembler moves no load across
            arrived = [tile[t] for t in range(o.seqlen)]
            for t, value in enumerate(arrived):
                past = token(t, past, value)
        else:
            past = lax.fori_loop(0, length, token, past)
        plgpu.commit_smem()
        store_out(refs, place, begin, length)
        if recent is not None:
            store_windows(refs, place, block * block_t, length, lambda t: t + 1, o)
        if rolls and kept is not None:
            to = history - 1 + block * block_t

            @pl.when(is_slot(target, pool.shape[0], o.pad_slot_id))
            def _():
                arrived, room = kept.at[pl.ds(history, block_t)], pool.shape[1] - to
                store_rows(arrived, pool.at[target], place.channels, to, jnp.clip(room, 0, length))

        @pl.when(block + 1 == blocks)
        def _():
            if kept is not None:
                final = kept.at[pl.ds(length, history)]
                if not rolls:
                    store_window(final, target)
                if refs.track_indices is not None:
                    store_window(final, refs.track_indices[place.here])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(block + 1 < blocks)
        def _():
            load_block(refs, place, block + 1, block_t)
            for entries in carried:
                for j in range(history):
                    entries[j] = entries[block_t + j]

        return past

    lax.fori_loop(0, blocks, turn, past)


def load_block(refs, place, block, block_t):
    """Starts the copies of a block of tokens and its residual; returns its length."""
    begin = place.start + block * block_t
    length = jnp.minimum(place.end - begin, block_t)
    load_rows(refs.x, place.x_channels, refs.tile, refs.tile_ready, begin, length)
    if refs.residual is not None:
        load_rows(refs.residual, place.channels, refs.added, refs.added_ready, begin, length)
    return length


def wait_block(refs):
    plgpu.barrier_wait(refs.tile_ready)
    if refs.residual is not None:
        plgpu.barrier_wait(refs.added_ready)


def emit(refs, past, t, weights, o):
    """Leaves the result of token t of a block where the token was."""
    interpret, tile = bool(o.interpret), refs.tile
    y = convolve(past, *weights, silu=o.silu, interpret=interpret)
    if refs.residual is not None:
        y = add_residual(y, refs.added[t].astype(jnp.float32), interpret=interpret)
    tile[t] = y.astype(tile.dtype)


def store_out(refs, place, begin, length):
    """Starts the copy of a block's results into whichever part of `out` has these channels."""
    store = lambda out, part: store_rows(refs.tile, out, part, begin, length)  # noqa: E731
    part_of_out(refs.outs, place.channels, store)


def store_windows(refs, place, first, length, begin_of, o):
    """The windows after tokens `first` on; that of the t-th begins in row `begin_of(t)` of `recent`."""
    windows, history = refs.window_out, refs.weight.shape[1] - 1
    buffer = place.here if refs.window_indices is None else refs.window_indices[place.here]
    steps = windows.shape[1]

    @pl.when(is_slot(buffer, windows.shape[0], o.pad_slot_id))
    def _():
        def store(t, _):
            target = lambda channels: windows.at[buffer, first + t, pl.ds(0, history), channels]  # noqa: E731
            entries = refs.recent.at[pl.ds(begin_of(t), history)]
            copy_out(entries, target, place.channels, windows.shape[3])

        lax.fori_loop(0, jnp.clip(steps - first, 0, length), store, None)


def store_padding(refs, place, block_t, interpret):
    """The zeros of a row that is not computed, and of the tail."""

    @pl.when(jnp.logical_not(place.live))
    def _():
        zero_tail(refs.tile, interpret)
        plgpu.commit_smem()
        first, tail = place.index - place.row, jnp.int32(max(place.tail_programs, 1))
        stride = jnp.where(place.row < place.batch, jnp.int32(1), tail)
        blocks = div(jnp.maximum(place.end - place.start, 0) + block_t - 1, block_t)

        def turn(i, _):
            begin = place.start + (first + i * stride) * block_t
            store_out(refs, place, begin, jnp.minimum(place.end - begin, block_t))

        lax.fori_loop(0, lax.div(jnp.maximum(blocks - first + stride - 1, 0), stride), turn, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
