"""Slots on the device: which one a row has, where its window lies, reading it, leaving the new one; parts of `out`."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.arithmetic import in_layout, rem
from pallas_impl.config import cdiv
from pallas_impl.rows import copy_out, store_zeros

COLUMNS = 8  # of a wide slot, moved at a time
OLD, ARRIVED, ZERO, NOTHING = range(4)  # where a column comes from


def is_slot(slot, num_slots, pad_slot_id):
    """Whether that is a slot (or a buffer) of so many, and not the one of padding rows."""
    valid = (slot >= 0) & (slot < num_slots)
    return valid & (slot != pad_slot_id) if 0 <= pad_slot_id < num_slots else valid


def find_slot(cache_indices, row, batch, num_slots, pad_slot_id):
    """The slot of a row, and whether the row is computed at all; row `batch` is the tail."""
    live = row < batch
    if num_slots is None:
        return row, live
    slot = row if cache_indices is None else cache_indices[jnp.minimum(row, batch - 1)]
    live = live & (slot >= 0) & (slot < num_slots)
    if 0 <= pad_slot_id < num_slots:
        live = live & (slot != pad_slot_id)
    return slot, live


def first_column(refs, row, history, state_len, layout):
    """The column of a slot in which the row's window begins."""
    if refs.num_accepted_tokens is not None:
        return jnp.clip(refs.num_accepted_tokens[row], 1, state_len - history + 1) - 1
    if layout == "ring":
        return rem(jnp.maximum(refs.cache_seqlens[row], 0), state_len) + state_len - history
    return 0 if layout == "front" else state_len - history


def column(first, entry, state_len, layout):
    """The column of an entry of the window that begins in column `first`."""
    if layout == "ring":
        return rem(first + entry, state_len)
    return entry if isinstance(first, int) and first == 0 else first + entry


def load_window(pool, slot, first, channels, window, ready, layout):
    """Starts the copy of the window that begins in column `first`; of a rotating slot one row for each of `ready`."""
    history, state_len = window.shape[0], pool.shape[1]
    if layout == "ring":
        for j in range(history):
            place = pool.at[slot, pl.ds(column(first, j, state_len, layout), 1), channels]
            plgpu.copy_gmem_to_smem(place, window.at[pl.ds(j, 1)], ready.at[j])
        return
    plgpu.copy_gmem_to_smem(pool.at[slot, pl.ds(first, history), channels], window, ready.at[0])


def read_window(pool, slot, wanted, channels, history, *, interpret):
    """The window in front of a slot, in registers; zeros unless it is wanted."""
    return lax.cond(
        wanted,
        lambda: tuple(in_layout(pool[slot, j, channels], interpret=interpret) for j in range(history)),
        lambda: (in_layout(jnp.zeros((channels.size,), pool.dtype), interpret=interpret),) * history,
    )


def write_window(pool, slot, wanted, channels, past, token):
    """Leaves the last entries of `past` and the token in front of a slot, if wanted."""

    @pl.when(wanted)
    def _():
        for j, entry in enumerate((*past[1:], token.astype(pool.dtype))):
            pool[slot, j, channels] = entry


def entry(index, *, start, columns, stateful):
    """Where entry `index` of the row's first `columns` columns ++ x is: (kind, column or token)."""
    old = index < columns
    kind = jnp.where(old, jnp.where(stateful, OLD, ZERO), ARRIVED)
    return kind, jnp.where(old, index, start + index - columns)


def leave_state(move, target, start, length, seqlen, stateful, *, history, layout):
    """Stores a row's new state in slot `target`; columns ascend, so one slot may be source and target."""
    state_len, slot = move.pool.shape[1], move.slot
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

    def __init__(self, refs, slot, channels, channel, interpret):
        self.x, self.pool, self.slot, self.channels = refs.x, refs.conv_states, slot, channels
        self.x_channels = pl.ds(channel + channels.start, channels.size)
        self.moved, self.arrived, self.ready = refs.moved, refs.arrived, refs.moved_ready
        self.interpret = interpret

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


def part_of_out(outs, channels, store):
    """Calls `store(out, its channels)` for that of several results which has these channels of all of them."""
    if len(outs) == 1:
        store(outs[0], channels)
        return
    first = 0
    for out in outs:
        end = first + out.shape[1]

        @pl.when((channels.start >= first) & (channels.start < end))
        def _(out=out, first=first):
            store(out, pl.ds(channels.start - first, channels.size))

        first = end
