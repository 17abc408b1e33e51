"""Draft trees on Mosaic GPU, and links of a tree to parents: the frame of `verify`, another walk.

A row of a tree is no run of entries. Every node brings its width-1 ancestors, single rows of x or of the window,
which makes a run for each node, and no limit of nodes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl import plain
from pallas_impl.arithmetic import div, load_taps
from pallas_impl.slots import column, first_column
from pallas_impl.verify import (
    block_of,
    block_scratch,
    emit,
    load_block,
    run_rows,
    store_out,
    store_padding,
    store_windows,
    wait_block,
)


def launch(arrays, options):
    """Runs the kernel; as `verify.launch`, with `tree_parents`, rows of `options.seqlen` tokens, and the pool only read."""
    history, x, windows = arrays.weight.shape[1] - 1, arrays.x, arrays.window_out
    block_t = block_of(arrays, options)
    rows = block_t * max(history, 1)
    tile = lambda rows, dtype: plgpu.SMEM((rows, options.block_d), dtype)  # noqa: E731
    scratch = block_scratch(arrays, options) | dict(
        chain=tile(rows, x.dtype),
        chain_ready=plgpu.Barrier(num_arrivals=max(history, 1), num_barriers=block_t),
    )
    if arrays.conv_states.dtype != x.dtype:
        scratch["older"] = tile(rows, arrays.conv_states.dtype)
    if history and windows is not None:
        scratch["recent"] = tile(rows, windows.dtype)
    return run_rows(_kernel, "verify", arrays, options, scratch)


def _kernel(refs, place, *, block_t, num_slots, state_len, o):
    interpret = bool(o.interpret)

    @pl.when(place.live & (place.start < place.end))
    def _():
        _load_nodes(refs, place, 0, block_t, o)
        weights = load_taps(refs.weight, refs.bias, place.channels.start, o.block_d, interpret=interpret)
        _climb(refs, place, weights, block_t, o)

    store_padding(refs, place, block_t, interpret)


def _ancestors(refs, row, node, history):
    """The entries that the older taps of a node meet, newest first: below width-1 of the window, else tokens."""
    entry = history + node
    for _ in range(history):
        token = jnp.maximum(entry - history, 0)
        parent = jnp.minimum(refs.tree_parents[row, token], token - 1)
        inside = jnp.where(parent < 0, history - 1, history + parent)
        entry = jnp.where(entry < history, entry - 1, inside)
        yield entry


def _load_nodes(refs, place, block, block_t, o):
    """Starts the copies of a block of nodes and of the ancestors of each."""
    length = load_block(refs, place, block, block_t)
    if refs.weight.shape[1] > 1:
        load = lambda t, _: _load_ancestors(refs, place, block * block_t + t, t, o)  # noqa: E731
        lax.fori_loop(0, length, load, None)


def _load_ancestors(refs, place, node, t, o):
    pool, history, chain = refs.conv_states, refs.weight.shape[1] - 1, refs.chain
    older = chain if refs.older is None else refs.older
    for back, entry in enumerate(_ancestors(refs, place.here, node, history), 1):
        at = pl.ds(t * history + history - back, 1)

        @pl.when(entry < history)
        def _(entry=entry, at=at):
            first = first_column(refs, place.here, history, pool.shape[1], o.state_layout)
            there = pl.ds(column(first, entry, pool.shape[1], o.state_layout), 1)
            window = pool.at[place.slot, there, place.channels]
            plgpu.copy_gmem_to_smem(window, older.at[at], refs.chain_ready.at[t])

        @pl.when(entry >= history)
        def _(entry=entry, at=at):
            token = refs.x.at[pl.ds(place.start + entry - history, 1), place.x_channels]
            plgpu.copy_gmem_to_smem(token, chain.at[at], refs.chain_ready.at[t])


def _climb(refs, place, weights, block_t, o):
    """The nodes of a row, each with the chain of its ancestors."""
    older, chain, recent, tile = refs.older, refs.chain, refs.recent, refs.tile
    history = refs.weight.shape[1] - 1

    def node(t, first):
        values = []
        if history:
            plgpu.barrier_wait(refs.chain_ready.at[t])
        entries = [None] * history
        if older is not None:
            entries = list(_ancestors(refs, place.here, first + t, history))
        for back in range(history, 0, -1):
            at, entry = t * history + history - back, entries[back - 1]

            def read(dtype, at=at, entry=entry):
                if older is None:
                    return chain[at].astype(dtype)
                new, old = lambda: chain[at].astype(dtype), lambda: older[at].astype(dtype)
                return lax.cond(entry < history, old, new)

            values.append(read(jnp.float32))
            if recent is not None and back < history:
                recent[at - 1] = read(recent.dtype)
        arrived = tile[t]
        if recent is not None:
            recent[t * history + history - 1] = arrived.astype(recent.dtype)
        emit(refs, (*values, arrived.astype(jnp.float32)), t, weights, o)
        return first

    blocks = div(place.end - place.start + block_t - 1, block_t)

    def turn(block, _):
        begin = place.start + block * block_t
        length = jnp.minimum(place.end - begin, block_t)
        wait_block(refs)
        lax.fori_loop(0, length, node, block * block_t)
        plgpu.commit_smem()
        store_out(refs, place, begin, length)
        if recent is not None:
            store_windows(refs, place, block * block_t, length, lambda t: t * history, o)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(block + 1 < blocks)
        def _():
            _load_nodes(refs, place, block + 1, block_t, o)

    lax.fori_loop(0, blocks, turn, None)


@functools.partial(jax.jit, static_argnames=("shape",))
def parents_from_links(next_token, next_sibling, shape):
    """`tree_parents_from_links` of checked arguments of a shape.

    Two scatters turn the links round; then every node finds the eldest of its siblings in log2(n) steps of pointer
    doubling.
    """
    batch, n = shape
    node = jnp.arange(n, dtype=jnp.int32)[None]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    # 2 * namer, and 1 more as its sibling; the last namer counts
    named_by = jnp.full((batch, n), -1, jnp.int32)
    for links, as_sibling in ((next_token, 0), (next_sibling, 1)):
        named = plain.live_slots(links, batch, n, -1)
        to = (row, jnp.where(named > node, named, n))
        named_by = named_by.at[to].max(2 * node + as_sibling, mode="drop")
    elder = jnp.where((named_by >= 0) & (named_by % 2 == 1), named_by >> 1, node)
    parents = jnp.where(node == 0, -1, jnp.maximum(named_by >> 1, 0))
    step = lambda _, elder: jnp.take_along_axis(elder, elder, axis=1)  # noqa: E731
    fixed = isinstance(n, int)  # or a symbol (`jax.export`): as many turns as any number takes
    turns = max(n - 1, 1).bit_length() if fixed else 31
    elder = lax.fori_loop(0, turns, step, elder, unroll=fixed)
    return jnp.take_along_axis(parents, elder, axis=1)
