"""Decode with serving arguments on Mosaic GPU: one warpgroup a row and tile of channels, as in `rolling`.

The program owns its row's channels: it reads the window wherever the slot's layout has it, walks down the tokens, and
stores results, windows of every step and the new state, all after the reads they could disturb. What it has seen
lies in shared memory as one run of entries, so the window after any token is a box of that run.

A tree has no such run. There every node brings its width-1 ancestors, single rows of x or of the window, which
makes a run for each node, and no limit of nodes.
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
    load_rows,
    load_window,
    row_slot,
    store_rows,
    store_zeros,
)
from pallas_impl.rolling import BLOCK_T, _bounds
from pallas_impl.states import COLUMNS, Mover, in_range, store_slot
from pallas_impl.taps import add, convolve, div, load_taps, rem


def launch(x, weight, bias, conv_states, starts, slots, arrays, *, seqlen, options, lanes, interpret):
    """Runs the kernel.

    Args:
      x: [tokens, channels]; rows of x, of the pool, of `arrays.residual` and of `arrays.window_out` are multiples
        of 16 bytes and at least 128 channels long.
      weight, bias, conv_states: as in `causal_conv1d_update`. The pool and `window_out` are written in place
        where XLA owns them, else XLA copies them first.
      starts: [batch+1] int32 offsets of packed rows, or None: every row has `seqlen` tokens.
      slots: [batch] int32, or None for the identity.
      arrays: `Arrays` of int32.
      seqlen: tokens of every row; not used with `starts`.
      options: `Options`; `channel` is a multiple of 16 bytes, `split_sizes` are of `lanes`.
      lanes: channels of a tile.
      interpret: False, or the parameters of Pallas' GPU interpreter.

    Returns:
      (out, conv_states, window_out); with `split_sizes`, `out` is a tuple.
    """
    tokens = x.shape[0]
    dim, width = weight.shape
    history, state_len = width - 1, conv_states.shape[1]
    batch = tokens // seqlen if starts is None else starts.shape[0] - 1
    columns = cdiv(dim, lanes)
    block_t = BLOCK_T if starts is not None else min(BLOCK_T, 1 << (seqlen - 1).bit_length())
    tail_programs = 0 if starts is None else min(cdiv(tokens, block_t), 8)
    stores = options.commit and (history > 0 or (state_len > 0 and options.state_layout != "front"))
    front = options.state_layout == "front"
    windows = arrays.window_out if history else None
    tree = arrays.tree_parents is not None
    operands = dict(
        x=x, weight=weight, bias=bias, starts=starts, slots=slots, counts=arrays.num_accepted_tokens,
        seqlens=arrays.cache_seqlens, writes=arrays.write_indices, tracked=arrays.track_indices,
        buffers=arrays.window_indices, parents=arrays.tree_parents, residual=arrays.residual,
    )  # fmt: skip
    if stores or history:
        operands["pool"] = jax.new_ref(conv_states, memory_space=plgpu.GMEM) if stores else conv_states
    if windows is not None:
        operands["windows"] = jax.new_ref(windows, memory_space=plgpu.GMEM)
    operands = {name: operand for name, operand in operands.items() if operand is not None}

    tile = lambda rows, dtype: plgpu.SMEM((rows, lanes), dtype)  # noqa: E731
    scratch = dict(
        tile=tile(block_t, x.dtype), window=tile(max(history, 1), conv_states.dtype),
        tile_ready=plgpu.Barrier(), window_ready=plgpu.Barrier(num_barriers=max(history, 1)),
    )  # fmt: skip
    if arrays.residual is not None:
        scratch |= dict(added=tile(block_t, arrays.residual.dtype), added_ready=plgpu.Barrier())
    if tree:
        rows = block_t * max(history, 1)
        scratch |= dict(
            chain=tile(rows, x.dtype),
            chain_ready=plgpu.Barrier(num_arrivals=max(history, 1), num_barriers=block_t),
        )
        if conv_states.dtype != x.dtype:
            scratch["older"] = tile(rows, conv_states.dtype)
        if windows is not None:
            scratch["recent"] = tile(rows, windows.dtype)
    elif windows is not None:
        scratch["recent"] = tile(history + block_t, windows.dtype)
    if stores and front and history and not (windows is not None and windows.dtype == conv_states.dtype):
        scratch["kept"] = tile(history + block_t, conv_states.dtype)
    if stores and not front:
        scratch |= dict(
            moved=tile(COLUMNS, conv_states.dtype), moved_ready=plgpu.Barrier(num_barriers=COLUMNS)
        )
        if conv_states.dtype != x.dtype:
            scratch["arrived"] = tile(COLUMNS, x.dtype)
    sizes = (dim,) if options.split_sizes is None else options.split_sizes
    body = functools.partial(
        _kernel, batch=batch, seqlen=seqlen, columns=columns, tail_programs=tail_programs,
        pool_shape=conv_states.shape, stores=stores, options=options, block_t=block_t, lanes=lanes,
        interpret=bool(interpret),
    )  # fmt: skip

    def kernel(*refs):
        inputs, outs = refs[: len(operands)], refs[len(operands) :]

        def run(**scratch):
            body(dict(zip(operands, inputs, strict=True)) | scratch, outs)

        pl.run_scoped(run, **scratch)

    outs = pl.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((tokens, size), x.dtype) for size in sizes),
        mesh=plgpu.Mesh(grid=(check_grid((batch + tail_programs) * columns),), grid_names=("program",)),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        name="causal_conv1d_verify",
    )(*operands.values())
    out = outs[0] if options.split_sizes is None else tuple(outs)
    pool = jax.freeze(operands["pool"]) if stores else conv_states
    return out, pool, jax.freeze(operands["windows"]) if windows is not None else arrays.window_out


def _kernel(
    refs, outs, *, batch, seqlen, columns, tail_programs, pool_shape, stores, options, block_t, lanes, interpret,
):  # fmt: skip
    """`refs`: operands and scratch memory by name; what a call does not need is absent."""
    x, weight, pool, windows = refs["x"], refs["weight"], refs.get("pool"), refs.get("windows")
    tile, window = refs["tile"], refs["window"]
    residual, recent, kept = refs.get("residual"), refs.get("recent"), refs.get("kept")
    tree, front = "parents" in refs, options.state_layout == "front"
    tokens = x.shape[0]
    (dim, width), (num_slots, state_len, _) = weight.shape, pool_shape
    history = width - 1
    if stores and front and history and kept is None:
        kept = recent  # both hold the entries in one dtype
    program = lax.axis_index("program")
    place, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * lanes, lanes)
    x_channels = pl.ds(options.channel + column * lanes, lanes)
    row = jnp.minimum(place, batch)  # row `batch` is the tail
    start, end = _bounds(refs.get("starts"), row, batch, tokens, seqlen)
    slot, live = row_slot(refs, row, batch, num_slots, options.pad_slot_id)
    here = jnp.minimum(row, batch - 1)
    valid = functools.partial(in_range, pad_slot_id=options.pad_slot_id)

    def load(block):
        begin = start + block * block_t
        length = jnp.minimum(end - begin, block_t)
        load_rows(x, x_channels, tile, refs["tile_ready"], begin, length)
        if residual is not None:
            load_rows(residual, channels, refs["added"], refs["added_ready"], begin, length)
        if tree and history:
            lax.fori_loop(0, length, lambda t, _: load_ancestors(block * block_t + t, t), None)

    def store_out(begin, length):
        in_parts(outs, channels, lambda out, part: store_rows(tile, out, part, begin, length))

    def load_windows():
        if "counts" in refs:
            first = jnp.clip(refs["counts"][here], 1, state_len - history + 1) - 1
            past = pool.at[slot, pl.ds(first, history), channels]
            plgpu.copy_gmem_to_smem(past, window, refs["window_ready"].at[0])
            return
        ready, seqlens = refs["window_ready"], refs.get("seqlens")
        load_window(pool, slot, channels, window, ready, options.state_layout, seqlens, here)

    def wait_window():
        for j in range(history if options.state_layout == "ring" else 1):
            plgpu.barrier_wait(refs["window_ready"].at[j])

    def result(past, t, taps, bias):
        y = convolve(past, taps, bias, silu=options.silu, interpret=interpret)
        if residual is not None:
            y = add(y, refs["added"][t].astype(jnp.float32), interpret=interpret)
        tile[t] = y.astype(tile.dtype)

    def store_windows(first, length, begin_of):
        """The windows after tokens `first` on; that of the t-th begins in row `begin_of(t)` of `recent`."""
        buffer = refs["buffers"][here] if "buffers" in refs else here
        steps = windows.shape[1]

        @pl.when(valid(buffer, end=windows.shape[0]))
        def _():
            def store(t, _):
                target = lambda channels: windows.at[buffer, first + t, pl.ds(0, history), channels]  # noqa: E731
                copy_out(recent.at[pl.ds(begin_of(t), history)], target, channels, dim)

            lax.fori_loop(0, jnp.clip(steps - first, 0, length), store, None)

    def walk(taps, bias):
        """The tokens of a row one after another."""
        runs = [ref for ref in (recent, kept) if ref is not None]
        runs = runs[:1] if kept is recent else runs
        past = ()
        if history:
            wait_window()
            past = tuple(window[j].astype(jnp.float32) for j in range(history))
            for run in runs:
                for j in range(history):
                    run[j] = window[j].astype(run.dtype)
        target = slot
        if stores and front and history:
            target = refs["writes"][here] if "writes" in refs else slot
        if "counts" in refs and history > 1 and stores:
            plgpu.commit_smem()
            store_state(window.at[pl.ds(1, history - 1)], target, 0)

        def token(t, past):
            arrived = tile[t]
            for run in runs:
                run[history + t] = arrived.astype(run.dtype)
            past = (*past, arrived.astype(jnp.float32))
            result(past, t, taps, bias)
            return past[1:]

        blocks = div(end - start + block_t - 1, block_t)

        def turn(block, past):
            begin = start + block * block_t
            length = jnp.minimum(end - begin, block_t)
            wait_block()
            past = lax.fori_loop(0, length, token, past)
            plgpu.commit_smem()
            store_out(begin, length)
            if recent is not None:
                store_windows(block * block_t, length, lambda t: t + 1)
            if "counts" in refs and kept is not None:
                to = history - 1 + block * block_t

                @pl.when(valid(target, end=num_slots))
                def _():
                    arrived = kept.at[pl.ds(history, block_t)]
                    store_rows(arrived, pool.at[target], channels, to, jnp.clip(state_len - to, 0, length))

            @pl.when(block + 1 == blocks)
            def _():
                if kept is not None:
                    final = kept.at[pl.ds(length, history)]
                    if "counts" not in refs:
                        store_state(final, target, 0)
                    if "tracked" in refs:
                        store_state(final, refs["tracked"][here], 0)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(block + 1 < blocks)
            def _():
                load(block + 1)
                for run in runs:
                    for j in range(history):
                        run[j] = run[block_t + j]

            return past

        lax.fori_loop(0, blocks, turn, past)

    def store_state(rows, target, first):
        @pl.when(valid(target, end=num_slots))
        def _():
            place = lambda channels: pool.at[target, pl.ds(first, rows.shape[0]), channels]  # noqa: E731
            copy_out(rows, place, channels, dim)

    def wait_block():
        plgpu.barrier_wait(refs["tile_ready"])
        if residual is not None:
            plgpu.barrier_wait(refs["added_ready"])

    def ancestors(node):
        """The entries that the older taps of a node meet, newest first: below width-1 of the window, else tokens."""
        entry = history + node
        for _ in range(history):
            token = jnp.maximum(entry - history, 0)
            parent = jnp.minimum(refs["parents"][here, token], token - 1)
            inside = jnp.where(parent < 0, history - 1, history + parent)
            entry = jnp.where(entry < history, entry - 1, inside)
            yield entry

    def load_ancestors(node, t):
        older = refs.get("older", refs["chain"])
        for back, entry in enumerate(ancestors(node), 1):
            at = pl.ds(t * history + history - back, 1)

            @pl.when(entry < history)
            def _(entry=entry, at=at):
                column = pool.at[slot, pl.ds(window_column(entry), 1), channels]
                plgpu.copy_gmem_to_smem(column, older.at[at], refs["chain_ready"].at[t])

            @pl.when(entry >= history)
            def _(entry=entry, at=at):
                token = x.at[pl.ds(start + entry - history, 1), x_channels]
                plgpu.copy_gmem_to_smem(token, refs["chain"].at[at], refs["chain_ready"].at[t])

    def window_column(entry):
        if options.state_layout == "ring":
            phase = rem(jnp.maximum(refs["seqlens"][here], 0), state_len)
            return rem(phase + state_len - history + entry, state_len)
        return entry if front else state_len - history + entry

    def climb(taps, bias):
        """The nodes of a row, each with the chain of its ancestors."""
        older, chain = refs.get("older"), refs["chain"]

        def node(t, first):
            values = []
            if history:
                plgpu.barrier_wait(refs["chain_ready"].at[t])
            entries = list(ancestors(first + t)) if older is not None else [None] * history
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
            result((*values, arrived.astype(jnp.float32)), t, taps, bias)
            return first

        blocks = div(end - start + block_t - 1, block_t)

        def turn(block, _):
            begin = start + block * block_t
            length = jnp.minimum(end - begin, block_t)
            wait_block()
            lax.fori_loop(0, length, node, block * block_t)
            plgpu.commit_smem()
            store_out(begin, length)
            if recent is not None:
                store_windows(block * block_t, length, lambda t: t * history)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(block + 1 < blocks)
            def _():
                load(block + 1)

        lax.fori_loop(0, blocks, turn, None)

    @pl.when(live & (start < end))
    def _():
        load(0)
        if history and not tree:
            load_windows()
        taps, bias = load_taps(weight, refs.get("bias"), channels.start, lanes, interpret=interpret)
        (climb if tree else walk)(taps, bias)
        if stores and not front:
            target = refs["writes"][here] if "writes" in refs else slot

            @pl.when(valid(target, end=num_slots))
            def _():
                move = Mover(
                    x, pool, slot, channels, options.channel, refs["moved"], refs.get("arrived"), refs["moved_ready"],
                    interpret,
                )  # fmt: skip
                seqlen = refs["seqlens"][here] if "seqlens" in refs else None
                store_slot(
                    move, target, slot, start, end - start, seqlen, jnp.bool_(True), history=history,
                    layout=options.state_layout,
                )  # fmt: skip

    @pl.when(jnp.logical_not(live))
    def _():
        for t in range(block_t):
            store_zeros(tile, t, interpret)
        plgpu.commit_smem()
        first = place - row
        stride = jnp.where(row < batch, jnp.int32(1), jnp.int32(max(tail_programs, 1)))
        blocks = div(jnp.maximum(end - start, 0) + block_t - 1, block_t)

        def turn(i, _):
            begin = start + (first + i * stride) * block_t
            store_out(begin, jnp.minimum(end - begin, block_t))

        lax.fori_loop(0, lax.div(jnp.maximum(blocks - first + stride - 1, 0), stride), turn, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
