"""Decode on Mosaic GPU: one warpgroup a program, one or a few rows, one tile of channels.

Where tiles divide the channels, the window of a row and its token meet in registers: no barrier, no tensor map, no
wait but those for memory. Loads and stores of registers do not clip, those of TMA do: where a tile crosses the last
channel, window and token meet in shared memory as one run of `width` entries, so that the new window is that run
without its first entry: one TMA box in, one TMA box out.
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
from pallas_impl.config import cdiv
from pallas_impl.launch import joined, parts, run
from pallas_impl.records import Share
from pallas_impl.rows import copy_out, store_zeros
from pallas_impl.slots import find_slot, part_of_out, read_window, write_window


def launch(arrays, options, finish=None):
    """Runs the kernel on one token a row.

    Args:
      arrays: x [batch, channels], weight, bias, conv_states, cache_indices and residual are used, slots as int32; rows
        of x, of the pool and of residual are multiples of 16 bytes and at least 128 channels long. The pool is written
        in place where XLA owns it, else XLA copies it first.
      options: `Options`; `channel` is a multiple of 16 bytes, `split_sizes` are of `config.block_d`.
      finish: as in `prefill.launch`; only with a `config` in registers.

    Returns:
      (out, conv_states); with `split_sizes`, `out` is a tuple, which ends with the results of `finish`.
    """
    x, pool = arrays.x, arrays.conv_states
    batch, (dim, width) = x.shape[0], arrays.weight.shape
    config = options.config._replace(rows=min(options.config.rows, batch))
    columns, of_gates = cdiv(dim, config.block_d), 0
    scratch, body = {}, _in_registers
    if not config.in_registers:
        body = _in_shared_memory
        scratch = dict(
            tile=plgpu.SMEM((config.rows, config.block_d), x.dtype),
            entries=plgpu.SMEM((config.rows, width, config.block_d), pool.dtype),
            tile_ready=plgpu.Barrier(num_arrivals=1),
            window_ready=plgpu.Barrier(num_arrivals=1, num_barriers=config.rows),
        )
        if arrays.residual is not None:
            scratch["added"] = plgpu.SMEM((config.rows, config.block_d), arrays.residual.dtype)
            scratch["added_ready"] = plgpu.Barrier()
    operands = arrays.named("x", "weight", "bias", "cache_indices", "residual")
    results = parts(x.dtype, batch, dim, options.split_sizes)
    if finish is not None:
        operands |= finish.operands()
        results |= finish.results()
        scratch = finish.scratch_of_rows(config.rows, config.block_d)
        of_gates = finish.columns(config.rows)
        body = functools.partial(body, finish=finish, of_gates=of_gates)
    *outs, new_pool = run(
        functools.partial(body, columns=columns, num_slots=pool.shape[0], o=options._replace(config=config)),
        "update",
        cdiv(batch, config.rows) * (columns + of_gates),
        operands | dict(conv_states=pool if width > 1 else None),
        results,
        scratch,
        written=("conv_states",),
        interpret=options.interpret,
    )
    return joined(outs, options.split_sizes), pool if new_pool is None else new_pool


def _in_registers(refs, *, columns, num_slots, o, finish=None, of_gates=0):
    program = lax.axis_index("program")
    first, column = div(program, columns + of_gates) * o.config.rows, rem(program, columns + of_gates)
    if not of_gates:
        _convolve_rows(refs, first, column, num_slots, o, finish)
        return

    @pl.when(column >= columns)
    def _():
        batch = refs.x.shape[0]
        for r in range(o.config.rows):
            _, live = find_slot(refs.cache_indices, first + r, batch, num_slots, o.pad_slot_id)
            count = jnp.where(first + r < batch, 1, 0)
            finish.gates(refs, Share(first + r, count, column - columns, of_gates, 1, live))

    pl.when(column < columns)(lambda: _convolve_rows(refs, first, column, num_slots, o, finish))


def _convolve_rows(refs, first, column, num_slots, o, finish):
    x, weight, pool, residual = refs.x, refs.weight, refs.conv_states, refs.residual
    config, interpret = o.config, bool(o.interpret)
    batch, history, block_d = x.shape[0], weight.shape[1] - 1, config.block_d
    channels = pl.ds(column * block_d, block_d)
    of_x = pl.ds(channels.start + o.channel, block_d) if o.channel else channels

    # window: everything else is asked for before the slots are waited for
    slots, live, tokens, added, gates = [], [], [], [], []
    for r in range(config.rows):
        row = jnp.minimum(first + r, batch - 1)
        slot, is_live = find_slot(refs.cache_indices, first + r, batch, num_slots, o.pad_slot_id)
        slots.append(slot)
        live.append(is_live)
        tokens.append(in_layout(x[row, of_x], interpret=interpret))
        if residual is not None:
            added.append(in_layout(residual[row, channels], interpret=interpret))
        if o.gates is not None:
            of_gates = [pl.ds(channels.start + first_channel, block_d) for first_channel in o.gates]
            gates.append([in_layout(x[row, of_gate], interpret=interpret) for of_gate in of_gates])
    taps, bias = load_taps(weight, refs.bias, channels.start, block_d, interpret=interpret)
    issue_loads(interpret=interpret)
    past = [()] * config.rows
    if history:
        for r in range(config.rows):
            past[r] = read_window(pool, slots[r], live[r], channels, history, interpret=interpret)

    for r in range(config.rows):
        # taps
        if o.gates is not None:
            tokens[r] = gated(tokens[r], gates[r][0], x.dtype)
        entries = tuple(entry.astype(jnp.float32) for entry in (*past[r], tokens[r]))
        y = convolve(entries, taps, bias, silu=o.silu, interpret=interpret)
        if residual is not None:
            y = add_residual(y, added[r].astype(jnp.float32), interpret=interpret)
        if o.gates is not None:
            y = gated(y.astype(x.dtype), gates[r][1], x.dtype).astype(jnp.float32)
        if finish is not None:
            y = finish.row(y, getattr(refs, f"partial{r}"), channels.start, x.dtype)
        y = keep(live[r], y, interpret=interpret).astype(x.dtype)

        # store
        def store(out, part, r=r, y=y):
            out[first + r, part] = y

        pl.when(first + r < batch)(functools.partial(part_of_out, refs.outs, channels, store))

        # state
        if history:
            write_window(pool, slots[r], live[r], channels, past[r], tokens[r])


def _in_shared_memory(refs, *, columns, num_slots, o):
    x, weight, pool = refs.x, refs.weight, refs.conv_states
    tile, entries, added, window_ready = refs.tile, refs.entries, refs.added, refs.window_ready
    config, interpret = o.config, bool(o.interpret)
    batch, block_d = x.shape[0], config.block_d
    dim, history = weight.shape[0], weight.shape[1] - 1
    program = lax.axis_index("program")
    group, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * block_d, block_d)
    rows = pl.ds(group * config.rows, config.rows)
    slots, live = zip(
        *(
            find_slot(refs.cache_indices, group * config.rows + r, batch, num_slots, o.pad_slot_id)
            for r in range(config.rows)
        ),
        strict=True,
    )

    x_channels = pl.ds(channels.start + o.channel, block_d) if o.channel else channels
    plgpu.copy_gmem_to_smem(x.at[rows, x_channels], tile, refs.tile_ready)
    if added is not None:
        plgpu.copy_gmem_to_smem(refs.residual.at[rows, channels], added, refs.added_ready)
    if history:
        for r in range(config.rows):

            @pl.when(live[r])
            def _(r=r):
                window = pool.at[slots[r], pl.ds(0, history), channels]
                plgpu.copy_gmem_to_smem(window, entries.at[r, pl.ds(0, history)], window_ready.at[r])

    taps, bias = load_taps(weight, refs.bias, channels.start, block_d, interpret=interpret)
    plgpu.barrier_wait(refs.tile_ready)
    if added is not None:
        plgpu.barrier_wait(refs.added_ready)
    for r in range(config.rows):

        @pl.when(live[r])
        def _(r=r):
            token = tile[r]
            past = ()
            if history:
                plgpu.barrier_wait(window_ready.at[r])
                past = tuple(entries[r, j].astype(jnp.float32) for j in range(history))
                entries[r, history] = token.astype(entries.dtype)
            y = convolve((*past, token.astype(jnp.float32)), taps, bias, silu=o.silu, interpret=interpret)
            if added is not None:
                y = add_residual(y, added[r].astype(jnp.float32), interpret=interpret)
            tile[r] = y.astype(tile.dtype)

        @pl.when(jnp.logical_not(live[r]))
        def _(r=r):
            store_zeros(tile, r, interpret)

    plgpu.commit_smem()
    part_of_out(
        refs.outs,
        channels,
        lambda out, part: copy_out(tile, lambda channels: out.at[rows, channels], part, out.shape[1]),
    )
    if history:
        for r in range(config.rows):

            @pl.when(live[r])
            def _(r=r):
                window = lambda channels: pool.at[slots[r], pl.ds(0, history), channels]  # noqa: E731
                copy_out(entries.at[r, pl.ds(1, history)], window, channels, dim)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
