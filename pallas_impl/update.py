"""Decode on Mosaic GPU: one warpgroup a program, one or a few rows, one tile of channels.

Where tiles divide the channels, the window of a row and its token meet in registers: no barrier, no tensor map, no
wait but those for memory. Loads and stores of registers do not clip, those of TMA do: where a tile crosses the last
channel, window and token meet in shared memory as one run of `width` entries, so that the new window is that run
without its first entry: one TMA box in, one TMA box out.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.config import cdiv
from pallas_impl.prefill import (
    COMPILER_PARAMS,
    check_grid,
    copy_out,
    in_parts,
    read_window,
    row_slot,
    store_zeros,
    write_window,
)
from pallas_impl.taps import add, convolve, div, in_layout, issue_loads, keep, load_taps, rem


def launch(
    x, weight, bias, conv_states, slots, *, silu, pad_slot_id, config, interpret, residual=None, channel=0,
    split_sizes=None,
):  # fmt: skip
    """Runs the kernel on one token a row.

    Args:
      x: [batch, channels]; rows of x and of the pool are multiples of 16 bytes and at least 128 channels long.
      weight, bias, conv_states: as in `causal_conv1d_update`. The pool is written in place where XLA owns
        it, else XLA copies it first.
      slots: [batch] int32, or None for the identity.
      config: an `UpdateConfig`.
      interpret: False, or the parameters of Pallas' GPU interpreter.
      residual: [batch, dim], or None.
      channel: first channel of x that is read, a multiple of 16 bytes.
      split_sizes: channels of each result, multiples of `config.lanes`; None: one result.

    Returns:
      (out, conv_states); with `split_sizes`, `out` is a tuple.
    """
    batch = x.shape[0]
    dim, width = weight.shape
    columns = cdiv(dim, config.lanes)
    config = config._replace(rows=min(config.rows, batch))
    names, operands = ["x", "weight"], [x, weight]
    for name, operand in (("bias", bias), ("slots", slots), ("residual", residual)):
        if operand is not None:
            names.append(name)
            operands.append(operand)
    if width > 1:
        names.append("pool")
        operands.append(jax.new_ref(conv_states, memory_space=plgpu.GMEM))
    scratch, body = {}, _in_registers
    if not config.in_registers:
        body = _in_shared_memory
        scratch = dict(
            tile=plgpu.SMEM((config.rows, config.lanes), x.dtype),
            entries=plgpu.SMEM((config.rows, width, config.lanes), conv_states.dtype),
            tile_ready=plgpu.Barrier(num_arrivals=1),
            window_ready=plgpu.Barrier(num_arrivals=1, num_barriers=config.rows),
        )
        if residual is not None:
            scratch["added"] = plgpu.SMEM((config.rows, config.lanes), residual.dtype)
            scratch["added_ready"] = plgpu.Barrier()
    body = functools.partial(
        body, columns=columns, num_slots=conv_states.shape[0], config=config, silu=silu, pad_slot_id=pad_slot_id,
        channel=channel, interpret=bool(interpret),
    )  # fmt: skip
    sizes = (dim,) if split_sizes is None else split_sizes

    def kernel(*refs):
        inputs, outs = refs[: len(names)], refs[len(names) :]
        pl.run_scoped(functools.partial(body, dict(zip(names, inputs, strict=True)), outs), **scratch)

    outs = pl.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((batch, size), x.dtype) for size in sizes),
        mesh=plgpu.Mesh(grid=(check_grid(cdiv(batch, config.rows) * columns),), grid_names=("program",)),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        name="causal_conv1d_update",
    )(*operands)
    out = outs[0] if split_sizes is None else tuple(outs)
    return out, jax.freeze(operands[-1]) if width > 1 else conv_states


def _in_registers(refs, outs, *, columns, num_slots, config, silu, pad_slot_id, channel, interpret):
    x, weight, pool, residual = refs["x"], refs["weight"], refs.get("pool"), refs.get("residual")
    batch, history, lanes = x.shape[0], weight.shape[1] - 1, config.lanes
    program = lax.axis_index("program")
    first, channels = div(program, columns) * config.rows, pl.ds(rem(program, columns) * lanes, lanes)
    of_x = pl.ds(channels.start + channel, lanes) if channel else channels

    # window: everything else is asked for before the slots are waited for
    slots, live, tokens, added = [], [], [], []
    for r in range(config.rows):
        row = jnp.minimum(first + r, batch - 1)
        slot, is_live = row_slot(refs, first + r, batch, num_slots, pad_slot_id)
        slots.append(slot)
        live.append(is_live)
        tokens.append(in_layout(x[row, of_x], interpret=interpret))
        if residual is not None:
            added.append(in_layout(residual[row, channels], interpret=interpret))
    taps, bias = load_taps(weight, refs.get("bias"), channels.start, lanes, interpret=interpret)
    issue_loads(interpret=interpret)
    past = [()] * config.rows
    if history:
        for r in range(config.rows):
            past[r] = read_window(pool, slots[r], live[r], channels, history, interpret=interpret)

    for r in range(config.rows):
        # taps
        entries = tuple(entry.astype(jnp.float32) for entry in (*past[r], tokens[r]))
        y = convolve(entries, taps, bias, silu=silu, interpret=interpret)
        if residual is not None:
            y = add(y, added[r].astype(jnp.float32), interpret=interpret)
        y = keep(live[r], y, interpret=interpret).astype(x.dtype)

        # store
        def store(out, part, r=r, y=y):
            out[first + r, part] = y

        pl.when(first + r < batch)(functools.partial(in_parts, outs, channels, store))

        # state
        if history:
            write_window(pool, slots[r], live[r], channels, past[r], tokens[r])


def _in_shared_memory(
    refs, outs, *, tile, entries, tile_ready, window_ready, columns, num_slots, config, silu, pad_slot_id, channel,
    interpret, added=None, added_ready=None,
):  # fmt: skip
    x, weight, pool = refs["x"], refs["weight"], refs.get("pool")
    batch = x.shape[0]
    dim, history = weight.shape[0], weight.shape[1] - 1
    program = lax.axis_index("program")
    group, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * config.lanes, config.lanes)
    rows = pl.ds(group * config.rows, config.rows)
    slots, live = zip(
        *(row_slot(refs, group * config.rows + r, batch, num_slots, pad_slot_id) for r in range(config.rows)),
        strict=True,
    )

    x_channels = pl.ds(channels.start + channel, config.lanes) if channel else channels
    plgpu.copy_gmem_to_smem(x.at[rows, x_channels], tile, tile_ready)
    if added is not None:
        plgpu.copy_gmem_to_smem(refs["residual"].at[rows, channels], added, added_ready)
    if history:
        for r in range(config.rows):

            @pl.when(live[r])
            def _(r=r):
                window = pool.at[slots[r], pl.ds(0, history), channels]
                plgpu.copy_gmem_to_smem(window, entries.at[r, pl.ds(0, history)], window_ready.at[r])

    taps, bias = load_taps(weight, refs.get("bias"), channels.start, config.lanes, interpret=interpret)
    plgpu.barrier_wait(tile_ready)
    if added is not None:
        plgpu.barrier_wait(added_ready)
    for r in range(config.rows):

        @pl.when(live[r])
        def _(r=r):
            token = tile[r]
            past = ()
            if history:
                plgpu.barrier_wait(window_ready.at[r])
                past = tuple(entries[r, j].astype(jnp.float32) for j in range(history))
                entries[r, history] = token.astype(entries.dtype)
            y = convolve((*past, token.astype(jnp.float32)), taps, bias, silu=silu, interpret=interpret)
            if added is not None:
                y = add(y, added[r].astype(jnp.float32), interpret=interpret)
            tile[r] = y.astype(tile.dtype)

        @pl.when(jnp.logical_not(live[r]))
        def _(r=r):
            store_zeros(tile, r, interpret)

    plgpu.commit_smem()
    in_parts(
        outs, channels,
        lambda out, part: copy_out(tile, lambda channels: out.at[rows, channels], part, out.shape[1]),
    )  # fmt: skip
    if history:
        for r in range(config.rows):

            @pl.when(live[r])
            def _(r=r):
                window = lambda channels: pool.at[slots[r], pl.ds(0, history), channels]  # noqa: E731
                copy_out(entries.at[r, pl.ds(1, history)], window, channels, dim)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
