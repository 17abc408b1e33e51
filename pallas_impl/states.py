"""Every store of state of a call on Mosaic GPU: new slots in any layout, write slots, snapshots, tracked slots.

The output kernel reads the windows and stores none; this kernel follows it. One program is a row and a tile of
channels, with snapshots also a group of them. It moves columns as they are, from the old slot and from x
through shared memory, 8 to 32 at a time, each a run of bytes.

Snapshots lie far apart, so a long row has many programs. They are numbered like the blocks of a flat prefill: group k
of row s, of `SNAPSHOTS` boundaries, is number `start // (SNAPSHOTS * block size) + s + k`. Only a row's first group
reads the old window, and it stores the new state after all its reads.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl import xla_serving
from pallas_impl.config import cdiv
from pallas_impl.prefill import COMPILER_PARAMS, check_grid, copy_out, row_slot, store_zeros
from pallas_impl.taps import div, find_row, rem

SNAPSHOTS = 8  # at least width-2, so that only a first group meets the old window
COLUMNS = 8  # of a wide slot, moved at a time
BARRIERS = 32  # Mosaic GPU has no more in an array
OLD, ARRIVED, ZERO, NOTHING = range(4)  # where a column comes from


def launch(x, conv_states, starts, slots, arrays, *, after, history, options, lanes, interpret):
    """Runs the kernel.

    Args:
      x: [tokens, channels]; rows of x and of the pool are multiples of 16 bytes and at least 128 channels long.
      conv_states: the pool. It is written in place where XLA owns it, else XLA copies it first.
      starts: [batch+1] int32.
      slots: [batch] int32, or None for the identity.
      arrays: `Arrays` of int32 and bool; `num_computed_tokens` of any integers.
      after: the output kernel's result. It is not read, but as an operand it tells XLA that this kernel comes after
        the one that reads the windows, so that the pool need not be copied.
      history: width-1.
      options: `Options`; `channel` is a multiple of 16 bytes.
      lanes: channels of a tile.
      interpret: False, or the parameters of Pallas' GPU interpreter.

    Returns:
      The new pool.
    """
    tokens, dim = x.shape[0], conv_states.shape[2]
    batch = starts.shape[0] - 1
    columns = cdiv(dim, lanes)
    operands = dict(
        x=x, starts=starts, after=after, slots=slots, has_state=arrays.has_initial_state, writes=arrays.write_indices, seqlens=arrays.cache_seqlens,
        tracked=arrays.track_indices, track_lengths=arrays.track_lengths,
    )  # fmt: skip
    groups, group_t, moves = batch, None, COLUMNS
    if arrays.snapshot_indices is not None and arrays.snapshot_indices.shape[1]:
        computed, size = arrays.num_computed_tokens, options.snapshot_block_size
        operands |= dict(snapshots=arrays.snapshot_indices, computed=computed)
        if size >= 2**31 or (computed is not None and computed.dtype != jnp.int32):
            first, until = xla_serving.first_snapshot(computed, batch, size)
            operands |= dict(computed=None, first=first, until=until)
        group_t = min(SNAPSHOTS * size, tokens)
        groups = tokens // group_t + batch
        moves = min(SNAPSHOTS, BARRIERS // history) * history
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    pool = jax.new_ref(conv_states, memory_space=plgpu.GMEM)
    scratch = dict(
        moved=plgpu.SMEM((moves, lanes), conv_states.dtype), ready=plgpu.Barrier(num_barriers=moves)
    )
    if x.dtype != conv_states.dtype:
        scratch["arrived"] = plgpu.SMEM((moves, lanes), x.dtype)
    body = functools.partial(
        _kernel, batch=batch, columns=columns, group_t=group_t, history=history, options=options, lanes=lanes,
        interpret=bool(interpret),
    )  # fmt: skip

    def kernel(*refs):
        pl.run_scoped(functools.partial(body, dict(zip((*operands, "pool"), refs, strict=True))), **scratch)

    pl.kernel(
        kernel,
        out_type=(),
        mesh=plgpu.Mesh(grid=(check_grid(groups * columns),), grid_names=("program",)),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        name="causal_conv1d_states",
    )(*operands.values(), pool)
    return jax.freeze(pool)


def _kernel(refs, *, moved, ready, batch, columns, group_t, history, options, lanes, interpret, arrived=None):
    x, pool, starts = refs["x"], refs["pool"], refs["starts"]
    tokens, num_slots = x.shape[0], pool.shape[0]
    program = lax.axis_index("program")
    row, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * lanes, lanes)
    if group_t is not None:
        group = row
        row = find_row(starts, group, group_t, batch, tokens, interpret=interpret)
    offset = lambda i: jnp.clip(starts[jnp.minimum(i, batch)], 0, tokens)  # noqa: E731
    start = jnp.where(row == 0, 0, offset(row))
    length = jnp.maximum(offset(row + 1) - start, 0)
    index = jnp.int32(0) if group_t is None else group - div(start, group_t) - row
    slot, live = row_slot(refs, row, batch, num_slots, options.pad_slot_id)
    row = jnp.minimum(row, batch - 1)
    stateful = jnp.bool_(options.always_state)
    if "has_state" in refs:
        stateful = refs["has_state"][row]
    move = Mover(x, pool, slot, channels, options.channel, moved, arrived, ready, interpret)
    window = functools.partial(entry, start=start, columns=history, stateful=stateful)
    valid = functools.partial(in_range, end=num_slots, pad_slot_id=options.pad_slot_id)

    def store_snapshots():
        table, size = refs["snapshots"], min(options.snapshot_block_size, 2**31 - 1)
        before = jnp.maximum(refs["computed"][row], 0) if "computed" in refs else jnp.int32(0)
        first, until = div(before, size), size - rem(before, size)
        if "first" in refs:
            first, until = refs["first"][row], refs["until"][row]
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

    @pl.when(live & ((length > 0) | options.apply_empty))
    def _():
        if group_t is not None:
            store_snapshots()

        @pl.when(index == 0)
        def _():
            if "tracked" in refs:
                after = length
                if "track_lengths" in refs:
                    after = jnp.clip(refs["track_lengths"][row], 0, length)
                target = refs["tracked"][row]

                @pl.when(valid(target))
                def _():
                    move(history, lambda m: window(after + m), lambda m: (target, m))

            target = refs["writes"][row] if "writes" in refs else slot

            @pl.when(valid(target) & ((length > 0) | (target != slot) | jnp.logical_not(stateful)))
            def _():
                seqlen = refs["seqlens"][row] if "seqlens" in refs else None
                store_slot(
                    move,
                    target,
                    slot,
                    start,
                    length,
                    seqlen,
                    stateful,
                    history=history,
                    layout=options.state_layout,
                )


def entry(index, *, start, columns, stateful):
    """Where entry `index` of the row's first `columns` columns ++ x is: (kind, column or token)."""
    old = index < columns
    kind = jnp.where(old, jnp.where(stateful, OLD, ZERO), ARRIVED)
    return kind, jnp.where(old, index, start + index - columns)


def in_range(slot, *, end, pad_slot_id):
    valid = (slot >= 0) & (slot < end)
    return valid & (slot != pad_slot_id) if 0 <= pad_slot_id < end else valid


def store_slot(move, target, slot, start, length, seqlen, stateful, *, history, layout):
    """Stores a row's new state in slot `target`; columns ascend, so one slot may be source and target."""
    state_len = move.pool.shape[1]
    if layout == "front":
        place = functools.partial(entry, start=start, columns=history, stateful=stateful)
        move(history, lambda m: place(length + m), lambda m: (target, m))
        return

    def source(column):
        if layout == "back":
            return entry(length + column, start=start, columns=state_len, stateful=stateful)
        newest = rem(jnp.maximum(seqlen, 0), state_len) + length - 1
        token = length - 1 - rem(newest - column + state_len, state_len)
        kept = jnp.where(stateful, jnp.where(target == slot, NOTHING, OLD), ZERO)
        return jnp.where(token >= 0, ARRIVED, kept), jnp.where(token >= 0, start + token, column)

    def turn(i, _):
        first = i * COLUMNS
        move(
            jnp.minimum(state_len - first, COLUMNS),
            lambda m: source(first + m),
            lambda m: (target, first + m),
        )

    lax.fori_loop(0, cdiv(state_len, COLUMNS), turn, None)


class Mover:
    """Moves columns of a row to slots: one call loads them all, then stores them all."""

    def __init__(self, x, pool, slot, channels, channel, moved, arrived, ready, interpret):
        self.x, self.pool, self.slot, self.channels = x, pool, slot, channels
        self.x_channels = pl.ds(channel + channels.start, channels.size)
        self.moved, self.arrived, self.ready, self.interpret = moved, arrived, ready, interpret

    def __call__(self, count, source, target):
        """Stores column m, for m below `count`, at `target(m)`: (slot, column), from `source(m)`: see `entry`."""
        moved, ready, one = self.moved, self.ready, lambda m: pl.ds(m, 1)
        arrived = moved if self.arrived is None else self.arrived

        def load(m, _):
            kind, place = source(m)

            @pl.when(kind == OLD)
            def _():
                column = self.pool.at[self.slot, one(place), self.channels]
                plgpu.copy_gmem_to_smem(column, moved.at[one(m)], ready.at[m])

            @pl.when(kind == ARRIVED)
            def _():
                plgpu.copy_gmem_to_smem(
                    self.x.at[one(place), self.x_channels], arrived.at[one(m)], ready.at[m]
                )

        def settle(m, _):
            kind, _ = source(m)

            @pl.when((kind == OLD) | (kind == ARRIVED))
            def _():
                plgpu.barrier_wait(ready.at[m])

            if arrived is not moved:

                @pl.when(kind == ARRIVED)
                def _():
                    moved[m] = arrived[m].astype(moved.dtype)

            @pl.when(kind == ZERO)
            def _():
                store_zeros(moved, m, self.interpret)

        def store(m, _):
            slot, column = target(m)

            @pl.when(source(m)[0] != NOTHING)
            def _():
                place = lambda channels: self.pool.at[slot, one(column), channels]  # noqa: E731
                copy_out(moved.at[one(m)], place, self.channels, self.pool.shape[2])

        lax.fori_loop(0, count, load, None)
        lax.fori_loop(0, count, settle, None)
        plgpu.commit_smem()
        lax.fori_loop(0, count, store, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
