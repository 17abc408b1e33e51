"""Prefill on Mosaic GPU: one warpgroup a program, one block of tokens of one row, one tile of channels.

A tile of x travels through TMA into shared memory, is convolved in place, row by row, and leaves through
TMA. TMA clips at the ends of `x`, `out` and the pool, so no dimension needs to divide by a block. The
program of a row's first block reads the old window and writes the new one, after all its reads; the other
blocks take the width-1 tokens before them from x. Under the flat schedule a row of one token, a decode step
among prefills, is read, convolved and stored in registers.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.arithmetic import (
    add_residual,
    convolve,
    div,
    gated,
    in_layout,
    issue_loads,
    keep,
    load_taps,
    rem,
)
from pallas_impl.config import STREAMS, prefill_grid
from pallas_impl.launch import joined, parts, run
from pallas_impl.records import Share
from pallas_impl.rows import (
    GROUP,
    MARKED,
    begins_in,
    copy_out,
    find_row,
    load_rows,
    next_beginning,
    row_facts,
    same_document,
    store_rows,
    store_zeros,
    zero_tail,
)
from pallas_impl.slots import find_slot, first_column, load_window, part_of_out, read_window, write_window


def launch(arrays, options, finish=None):
    """Runs the kernel.

    Args:
      arrays: x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens and
        residual are used, integers as int32; rows of x, of the pool and of residual are multiples of 16 bytes and at
        least 128 channels long. The pool is written in place where XLA owns it, else XLA copies it first. Without
        `query_start_loc` every row has `options.seqlen` tokens, and the schedule is per_sequence.
      options: `Options`; `channel` is a multiple of 16 bytes, `split_sizes` are of `config.block_d`.
      finish: what is done with the results before they are stored, and beside it: see `prologue.Finish`.

    Returns:
      (out, conv_states); with `split_sizes`, `out` is a tuple, which ends with the results of `finish`.
    """
    x, pool, config = arrays.x, arrays.conv_states, options.config
    tokens, (dim, width), starts = x.shape[0], arrays.weight.shape, arrays.query_start_loc
    batch = tokens // options.seqlen if starts is None else starts.shape[0] - 1
    pooled = pool is not None and width > 1 and batch > 0
    grid = prefill_grid(config, tokens, dim, batch)
    window_copies = width - 1 if pooled and options.state_layout == "ring" else 1
    scratch = dict(
        tile=plgpu.SMEM((config.block_t, config.block_d), x.dtype),
        edge=plgpu.SMEM((max(width - 1, 1), config.block_d), x.dtype),
        window=plgpu.SMEM((max(width - 1, 1), config.block_d), pool.dtype if pooled else x.dtype),
        tile_ready=plgpu.Barrier(),
        edge_ready=plgpu.Barrier(),
        window_ready=plgpu.Barrier(num_barriers=window_copies),
    )
    if arrays.residual is not None:
        scratch["added"] = plgpu.SMEM((config.block_t, config.block_d), arrays.residual.dtype)
        scratch["added_ready"] = plgpu.Barrier()
    results = parts(x.dtype, tokens, dim, options.split_sizes)
    if options.gates is not None:
        scratch |= dict(
            added=plgpu.SMEM((config.block_t, config.block_d), x.dtype),
            added_ready=plgpu.Barrier(),
            gate=plgpu.SMEM((config.block_t, config.block_d), x.dtype),
            gate_ready=plgpu.Barrier(),
            gate_edge=plgpu.SMEM((max(width - 1, 1), config.block_d), x.dtype),
            gate_edge_ready=plgpu.Barrier(),
        )
    operands = {}
    if finish is not None:
        results |= finish.results()
        scratch |= finish.scratch_of_tile(config.block_t, config.block_d, x.dtype)
        operands = finish.operands()
    operands |= arrays.named(
        "x",
        "weight",
        "query_start_loc",
        "bias",
        "cache_indices",
        "has_initial_state",
        "residual",
        "cache_seqlens",
        "document_marks",
    )
    *outs, new_pool = run(
        functools.partial(
            _kernel,
            num_slots=None if pool is None else pool.shape[0],
            batch=batch,
            grid=grid,
            o=options,
            finish=finish,
        ),
        "prefill",
        grid.blocks * (grid.columns + (0 if finish is None else finish.columns(config.block_t))),
        operands | dict(conv_states=pool if pooled else None),
        results,
        scratch,
        written=("conv_states",),
        interpret=options.interpret,
        tokens=grid.blocks * config.block_t,
    )
    return joined(outs, options.split_sizes), new_pool if pooled else pool


def _kernel(refs, *, num_slots, batch, grid, o, finish):
    x, weight, pool, outs = refs.x, refs.weight, refs.conv_states, refs.outs
    tile, edge, window, added = refs.tile, refs.edge, refs.window, refs.added
    config, interpret = o.config, bool(o.interpret)
    new_pool = pool if o.own_state else None
    tokens = x.shape[0]
    dim, history = weight.shape[0], weight.shape[1] - 1
    block_d, block_t = config.block_d, config.block_t
    has_edges = history > 0 and tokens > block_t
    # One token is not worth the waits for TMA; but loads and stores of registers do not clip.
    in_registers = (
        config.flat
        and len(outs) == 1
        and added is None
        and o.state_layout == "front"
        and o.own_state
        and dim % block_d == 0
    )

    program = lax.axis_index("program")
    of_gates = 0 if finish is None else finish.columns(block_t)
    block, column = div(program, grid.columns + of_gates), rem(program, grid.columns + of_gates)
    channels = pl.ds(column * block_d, block_d)
    of_x = pl.ds(channels.start + o.channel, block_d) if o.channel else channels
    of_gate = None if o.gates is None else pl.ds(channels.start + o.gates[0], block_d)
    if config.flat:
        block = rem(block, STREAMS) * (grid.blocks // STREAMS) + div(block, STREAMS)
        row = find_row(refs.query_start_loc, block, block_t, batch, tokens, interpret=interpret)
    else:
        row = jnp.minimum(div(block, config.row_blocks), batch)
    start, end = row_facts(refs.query_start_loc, row, batch, tokens, o.seqlen)
    if refs.query_start_loc is None:
        end = jnp.minimum(end, tokens)  # the tail's programs
    row_length = end - start
    # Slot and flag are asked for together with the offsets, so that they cost no wait of their own.
    slot, live = find_slot(refs.cache_indices, row, batch, num_slots, o.pad_slot_id)
    stateful = _has_state(refs, row, batch, o)
    issue_loads(interpret=interpret)

    def run_block(index):
        begin = start + index * block_t
        length = jnp.minimum(end - begin, block_t)
        if not of_gates:
            convolve_block(index, begin, length)
            return
        share = Share(begin, length, column - grid.columns, of_gates, block_t, live)
        pl.when(column >= grid.columns)(lambda: finish.gates(refs, share))
        pl.when(column < grid.columns)(lambda: convolve_block(index, begin, length))

    def convolve_block(index, begin, length):
        first = index == 0
        fewest = GROUP if in_registers else 1  # a box less is a tensor map less

        @pl.when(row < batch)  # x is asked for before it is known whether the row is live
        def _():
            load_rows(x, of_x, tile, refs.tile_ready, begin, length, fewest)
            if o.gates is not None:
                load_rows(x, of_gate, refs.gate, refs.gate_ready, begin, length)
            if has_edges:
                load_edge(begin, first)

        @pl.when(live)
        def _():
            if o.gates is not None:
                of_out = pl.ds(channels.start + o.gates[1], block_d)
                load_rows(x, of_out, added, refs.added_ready, begin, length)
            elif added is not None:
                load_rows(refs.residual, channels, added, refs.added_ready, begin, length)
            if pool is not None:
                pl.when(first & stateful)(load_past)
            convolve_tile(index, length, first)
            if finish is not None:
                finish.tile(tile, refs.wide, length, channels.start)

        @pl.when(jnp.logical_not(live))
        def _():
            @pl.when(row < batch)
            def _():
                wait_for_tile()
                if has_edges:
                    pl.when(needs_edge(first))(wait_for_edge)

            zero_tail(tile, interpret)

        plgpu.commit_smem()
        part_of_out(outs, channels, lambda out, part: store_rows(tile, out, part, begin, length))
        if new_pool is not None:

            @pl.when(live & first)
            def _():
                copy_out(window, lambda channels: pool.at[slot, pl.ds(0, history), channels], channels, dim)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def needs_edge(first):
        later = jnp.logical_not(first)
        return later | (row_length > block_t) if o.own_state else later

    def load_edge(begin, first):
        """Before a later block: the tokens there. Before the first one of a longer row: the row's last tokens."""
        far = (jnp.where(first, end, begin) if o.own_state else begin) - history

        @pl.when(needs_edge(first))
        def _():
            halo = x.at[pl.ds(far, history), of_x]
            plgpu.copy_gmem_to_smem(halo, edge, refs.edge_ready)
            if o.gates is not None:
                halo = x.at[pl.ds(far, history), of_gate]
                plgpu.copy_gmem_to_smem(halo, refs.gate_edge, refs.gate_edge_ready)

    def wait_for_edge():
        plgpu.barrier_wait(refs.edge_ready)
        if o.gates is not None:
            plgpu.barrier_wait(refs.gate_edge_ready)

    def wait_for_tile():
        plgpu.barrier_wait(refs.tile_ready)
        if o.gates is not None:
            plgpu.barrier_wait(refs.gate_ready)

    def of_tile(r):
        """What a tap meets at token r of the tile."""
        return tile[r] if o.gates is None else gated(tile[r], refs.gate[r], x.dtype)

    def of_edge(j):
        return edge[j] if o.gates is None else gated(edge[j], refs.gate_edge[j], x.dtype)

    def load_past():
        """Before the first block of a row with a state: its window."""
        first = first_column(refs, row, history, pool.shape[1], o.state_layout)
        load_window(pool, slot, first, channels, window, refs.window_ready, o.state_layout)

    def convolve_tile(index, length, first):
        mark = None
        if refs.document_marks is not None and history:
            mark = refs.document_marks[row, index * (block_t // MARKED)]
        taps, bias = load_taps(weight, refs.bias, channels.start, block_d, interpret=interpret)
        past = ()
        if history:
            if pool is not None:

                @pl.when(first & stateful)
                def _():
                    for j in range(history if o.state_layout == "ring" else 1):
                        plgpu.barrier_wait(refs.window_ready.at[j])

            @pl.when(first & jnp.logical_not(stateful))
            def _():
                for j in range(history):
                    store_zeros(window, j, interpret)

            if has_edges:
                pl.when(needs_edge(first))(wait_for_edge)

            past = lax.cond(
                first,
                lambda: _widen_rows(lambda j: window[j], history),
                lambda: _widen_rows(of_edge, history),
            )
        wait_for_tile()
        if added is not None:
            plgpu.barrier_wait(refs.added_ready)
        if new_pool is not None:

            @pl.when(first & (row_length == 1))  # most rows of a serving batch are decode steps
            def _():
                for j in range(1, history):
                    window[j - 1] = window[j]
                window[history - 1] = of_tile(0).astype(window.dtype)

            @pl.when(first & (row_length != 1))
            def _():
                for j in range(history):
                    window[j] = new_state(j)

        results = tile if refs.wide is None else refs.wide

        def rows(first, count, past):
            for r in range(count):
                past = (*past, of_tile(first + r).astype(jnp.float32))
                y = convolve(past, taps, bias, silu=o.silu, interpret=interpret)
                if o.gates is not None:
                    y = gated(y.astype(x.dtype), added[first + r], x.dtype)
                elif added is not None:
                    y = add_residual(y, added[first + r].astype(jnp.float32), interpret=interpret)
                results[first + r] = y.astype(results.dtype)
                past = past[1:]
            return past

        def convolve_rows(first, end, past):
            groups = div(end - first, GROUP)
            past = lax.fori_loop(0, groups, lambda g, past: rows(first + g * GROUP, GROUP, past), past)
            return lax.fori_loop(first + groups * GROUP, end, lambda r, past: rows(r, 1, past), past)

        if mark is None:
            convolve_rows(0, length, past)
            return

        def convolve_document(state):
            first, past = state
            continued = jnp.logical_not(begins_in(mark, MARKED + first, 1))
            past = tuple(keep(continued, entry, interpret=interpret) for entry in past)
            end = jnp.minimum(next_beginning(mark, MARKED + first) - MARKED, length)
            return end, convolve_rows(first, end, past)

        past = same_document(mark, MARKED, past, interpret=interpret)
        lax.while_loop(lambda state: state[0] < length, convolve_document, (jnp.int32(0), past))

    def new_state(j):
        """Entry row_length + j of window ++ x, in the pool's dtype."""
        token = row_length + j - history
        short = lambda: lax.cond(  # noqa: E731
            token >= 0,
            lambda: of_tile(jnp.clip(token, 0, block_t - 1)).astype(window.dtype),
            lambda: window[jnp.minimum(row_length + j, history - 1)],
        )
        if tokens <= block_t:
            return short()
        return lax.cond(row_length > block_t, lambda: of_edge(j).astype(window.dtype), short)

    def run_token():
        """A whole row of one token; x and taps are asked for before slot and flag are waited for."""
        token = in_layout(x[start, of_x], interpret=interpret)
        taps, bias = load_taps(weight, refs.bias, channels.start, block_d, interpret=interpret)
        issue_loads(interpret=interpret)
        if pool is None:
            past = (in_layout(jnp.zeros((block_d,), window.dtype), interpret=interpret),) * history
        else:
            past = read_window(pool, slot, live & stateful, channels, history, interpret=interpret)
        entries = tuple(entry.astype(jnp.float32) for entry in (*past, token))
        y = convolve(entries, taps, bias, silu=o.silu, interpret=interpret)
        outs[0][start, channels] = keep(live, y, interpret=interpret).astype(x.dtype)
        if pool is not None:
            write_window(pool, slot, live, channels, past, token)

    if config.flat:
        index = block - div(start, block_t) - row

        @pl.when((index >= 0) & (index * block_t < row_length))
        def _():
            if not in_registers:
                run_block(index)
                return
            one_token = (row < batch) & (row_length == 1)

            pl.when(one_token)(run_token)
            pl.when(jnp.logical_not(one_token))(lambda: run_block(index))

        return

    # A row longer than max_seqlen promised: its programs walk on.
    first = block - row * config.row_blocks
    stride = jnp.where(row == batch, jnp.int32(config.tail_blocks), jnp.int32(config.row_blocks))

    def walk(index):
        run_block(index)
        return index + stride

    lax.while_loop(lambda index: index * block_t < row_length, walk, first)


def _has_state(refs, row, batch, o):
    if refs.conv_states is not None and refs.has_initial_state is not None:
        return refs.has_initial_state[jnp.minimum(row, batch - 1)]
    return jnp.bool_(refs.conv_states is not None and o.always_state)


def _widen_rows(entry, rows):
    return tuple(entry(j).astype(jnp.float32) for j in range(rows))
