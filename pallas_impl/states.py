"""Every store of state of a call on Mosaic GPU: new slots in any layout, write slots, snapshots, tracked slots.

The output kernel reads the windows and stores none; this kernel follows it. One program is a row and a tile of
channels, with snapshots also a group of them. It moves columns as they are, from the old slot and from x
through shared memory, 8 to 32 at a time, each a run of bytes.

Snapshots lie far apart, so a long row has many programs. They are numbered like the blocks of a flat prefill: group k
of row s, of `SNAPSHOTS` boundaries, is number `start // (SNAPSHOTS * block size) + s + k`. Only a row's first group
reads the old window, and it stores the new state after all its reads.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl import plain
from pallas_impl.arithmetic import div, rem
from pallas_impl.config import cdiv
from pallas_impl.launch import run
from pallas_impl.rows import find_row, row_facts
from pallas_impl.slots import COLUMNS, NOTHING, Mover, entry, find_slot, is_slot, leave_state

SNAPSHOTS = 8  # at least width-2, so that only a first group meets the old window
BARRIERS = 32  # Mosaic GPU has no more in an array


def launch(arrays, options, *, after):
    """Runs the kernel.

    Args:
      arrays: those of a prefill, integers as int32 (`num_computed_tokens` of any integers); rows of x and of the pool
        are multiples of 16 bytes and at least 128 channels long. The pool is written in place where XLA owns it, else
        XLA copies it first.
      options: `Options`; `channel` is a multiple of 16 bytes.
      after: the output kernel's result. It is not read, but as an operand it tells XLA that this kernel comes after
        the one that reads the windows, so that the pool need not be copied.

    Returns:
      The new pool.
    """
    x, pool, block_d = arrays.x, arrays.conv_states, options.block_d
    tokens, dim, history = x.shape[0], pool.shape[2], arrays.weight.shape[1] - 1
    batch = arrays.query_start_loc.shape[0] - 1
    columns = cdiv(dim, block_d)
    operands = arrays.named("x", "query_start_loc") | dict(after=after)
    operands |= arrays.named(
        "cache_indices",
        "has_initial_state",
        "write_indices",
        "cache_seqlens",
        "track_indices",
        "track_lengths",
    )
    groups, group_t, moves = batch, None, COLUMNS
    if arrays.snapshot_indices is not None and arrays.snapshot_indices.shape[1]:
        computed, size = arrays.num_computed_tokens, options.snapshot_block_size
        operands |= arrays.named("snapshot_indices", "num_computed_tokens")
        if size >= 2**31 or (computed is not None and computed.dtype != jnp.int32):
            first, until = plain.first_snapshot(computed, batch, size)
            operands |= dict(num_computed_tokens=None, first_snapshot=first, until_snapshot=until)
        group_t = min(SNAPSHOTS * size, tokens)
        groups = tokens // group_t + batch
        moves = min(SNAPSHOTS, BARRIERS // history) * history
    scratch = dict(
        moved=plgpu.SMEM((moves, block_d), pool.dtype), moved_ready=plgpu.Barrier(num_barriers=moves)
    )
    if x.dtype != pool.dtype:
        scratch["arrived"] = plgpu.SMEM((moves, block_d), x.dtype)
    (pool,) = run(
        functools.partial(_kernel, batch=batch, columns=columns, group_t=group_t, history=history, o=options),
        "states",
        groups * columns,
        operands | dict(conv_states=pool),
        {},
        scratch,
        written=("conv_states",),
        interpret=options.interpret,
    )
    return pool


def _kernel(refs, *, batch, columns, group_t, history, o):
    moved, interpret = refs.moved, bool(o.interpret)
    tokens, num_slots = refs.x.shape[0], refs.conv_states.shape[0]
    program = lax.axis_index("program")
    row, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * o.block_d, o.block_d)
    if group_t is not None:
        group = row
        row = find_row(refs.query_start_loc, group, group_t, batch, tokens, interpret=interpret)
    start, end = row_facts(refs.query_start_loc, row, batch, tokens)
    length = jnp.maximum(end - start, 0)
    index = jnp.int32(0) if group_t is None else group - div(start, group_t) - row
    slot, live = find_slot(refs.cache_indices, row, batch, num_slots, o.pad_slot_id)
    row = jnp.minimum(row, batch - 1)
    stateful = jnp.bool_(o.always_state)
    if refs.has_initial_state is not None:
        stateful = refs.has_initial_state[row]
    move = Mover(refs, slot, channels, o.channel, interpret)
    window = functools.partial(entry, start=start, columns=history, stateful=stateful)
    valid = functools.partial(is_slot, num_slots=num_slots, pad_slot_id=o.pad_slot_id)

    def store_snapshots():
        table, size = refs.snapshot_indices, min(o.snapshot_block_size, 2**31 - 1)
        computed = refs.num_computed_tokens
        before = jnp.int32(0) if computed is None else jnp.maximum(computed[row], 0)
        first, until = div(before, size), size - rem(before, size)
        if refs.first_snapshot is not None:
            first, until = refs.first_snapshot[row], refs.until_snapshot[row]
        last = jnp.where(length >= until, div(jnp.maximum(length - until, 0), size), -1)

        def boundary(m):
            """Of a move: how many boundaries of this row come before its own, and whose slot it is."""
            ahead = index * SNAPSHOTS + div(m, history)
            block = first + ahead
            named = (block >= 0) & (block < table.shape[1])  # it may overflow
            target = table[row, jnp.clip(block, 0, table.shape[1] - 1)]
            return ahead, target, (ahead >= 0) & (ahead <= last) & named & valid(target)

        def source(m):
            ahead, _, stored = boundary(m)
            kind, place = window(until + jnp.where(stored, ahead, 0) * size + rem(m, history))
            return jnp.where(stored, kind, NOTHING), place

        for begin in range(0, SNAPSHOTS * history, moved.shape[0]):
            count = min(moved.shape[0], SNAPSHOTS * history - begin)

            @pl.when((index >= 0) & (index * SNAPSHOTS + begin // history <= last))
            def _(begin=begin, count=count):
                move(
                    count,
                    lambda m: source(begin + m),
                    lambda m: (boundary(begin + m)[1], rem(begin + m, history)),
                )

    @pl.when(live & ((length > 0) | o.apply_empty))
    def _():
        if group_t is not None:
            store_snapshots()

        @pl.when(index == 0)
        def _():
            if refs.track_indices is not None:
                after = length
                if refs.track_lengths is not None:
                    after = jnp.clip(refs.track_lengths[row], 0, length)
                target = refs.track_indices[row]

                @pl.when(valid(target))
                def _():
                    move(history, lambda m: window(after + m), lambda m: (target, m))

            target = slot if refs.write_indices is None else refs.write_indices[row]

            @pl.when(valid(target) & ((length > 0) | (target != slot) | jnp.logical_not(stateful)))
            def _():
                seqlen = None if refs.cache_seqlens is None else refs.cache_seqlens[row]
                leave_state(
                    move, target, start, length, seqlen, stateful, history=history, layout=o.state_layout
                )
