"""Prefill on Mosaic GPU: one warpgroup a program, one block of tokens of one row, one tile of channels.

A tile of x travels through TMA into shared memory, is convolved in place, row by row, and leaves through
TMA. TMA clips at the ends of `x`, `out` and the pool, so no dimension needs to divide by a block. The
program of a row's first block reads the old window and writes the new one, after all its reads; the other
blocks take the width-1 tokens before them from x. Under the flat schedule a row of one token, a decode step
among prefills, is read, convolved and stored in registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from oracle.contract import Unsupported
from pallas_impl.config import STREAMS, prefill_grid
from pallas_impl.taps import add, convolve, div, find_row, in_layout, issue_loads, keep, load_taps, rem

COMPILER_PARAMS = plgpu.CompilerParams(
    # Every thread rereads only what it wrote itself, in one layout.
    unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
)
GROUP = 4  # rows of a tile convolved between two turns of the loop; more take more registers


def launch(
    x, weight, bias, conv_states, starts, slots, has_state, *,
    silu, pad_slot_id, config, interpret, always_state=False, seqlen=None, residual=None, seqlens=None,
    channel=0, split_sizes=None, state_layout="front", store_state=True,
):  # fmt: skip
    """Runs the kernel.

    Args:
      x, weight, bias: as in `causal_conv1d_fn`; rows of x and of the pool are multiples of 16 bytes and
        at least 128 channels long.
      conv_states: the pool, or None. It is written in place where XLA owns it, else XLA copies it first.
      starts: [batch+1] int32, or None: every row has `seqlen` tokens, and the schedule is per_sequence.
      slots: [batch] int32, or None for the identity.
      has_state: [batch] bool, or None: no row has a state (every row, with `always_state`).
      config: a `PrefillConfig`.
      interpret: False, or the parameters of Pallas' GPU interpreter.
      residual, seqlens, state_layout: as in `causal_conv1d_fn`; seqlens is `cache_seqlens` as int32.
      channel: first channel of x that is read, a multiple of 16 bytes.
      split_sizes: channels of each result, multiples of `config.lanes`; None: one result.
      store_state: False: the pool is only read.

    Returns:
      (out, conv_states); with `split_sizes`, `out` is a tuple.
    """
    tokens = x.shape[0]
    dim, width = weight.shape
    batch = tokens // seqlen if starts is None else starts.shape[0] - 1
    pooled = conv_states is not None and width > 1 and batch > 0
    grid = prefill_grid(config, tokens, dim, batch)
    programs = check_grid(grid.blocks * grid.columns, grid.blocks * config.block_t)
    pool_dtype = conv_states.dtype if pooled else x.dtype
    window_copies = width - 1 if pooled and state_layout == "ring" else 1
    scratch = dict(
        tile=plgpu.SMEM((config.block_t, config.lanes), x.dtype),
        edge=plgpu.SMEM((max(width - 1, 1), config.lanes), x.dtype),
        window=plgpu.SMEM((max(width - 1, 1), config.lanes), pool_dtype),
        tile_ready=plgpu.Barrier(),
        edge_ready=plgpu.Barrier(),
        window_ready=plgpu.Barrier(num_barriers=window_copies),
    )
    if residual is not None:
        scratch["added"] = plgpu.SMEM((config.block_t, config.lanes), residual.dtype)
        scratch["added_ready"] = plgpu.Barrier()
    names, operands = ["x", "weight"], [x, weight]
    for name, operand in (
        ("starts", starts), ("bias", bias), ("slots", slots), ("has_state", has_state), ("residual", residual),
        ("seqlens", seqlens),
    ):  # fmt: skip
        if operand is not None:
            names.append(name)
            operands.append(operand)
    if pooled:
        names.append("pool")
        operands.append(jax.new_ref(conv_states, memory_space=plgpu.GMEM))

    body = functools.partial(
        _kernel, num_slots=None if conv_states is None else conv_states.shape[0], batch=batch, seqlen=seqlen,
        config=config, grid=grid,
        silu=silu, pad_slot_id=pad_slot_id, interpret=bool(interpret), always_state=always_state,
        channel=channel, state_layout=state_layout, store_state=store_state, window_copies=window_copies,
    )  # fmt: skip
    sizes = (dim,) if split_sizes is None else split_sizes

    def kernel(*refs):
        inputs, outs = refs[: len(names)], refs[len(names) :]
        pl.run_scoped(functools.partial(body, dict(zip(names, inputs, strict=True)), outs), **scratch)

    outs = pl.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((tokens, size), x.dtype) for size in sizes),
        mesh=plgpu.Mesh(grid=(programs,), grid_names=("program",)),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        name="causal_conv1d_prefill",
    )(*operands)
    out = outs[0] if split_sizes is None else tuple(outs)
    return out, jax.freeze(operands[-1]) if pooled else conv_states


def check_grid(programs, tokens=0):
    """Returns the number of programs if the kernel's 32-bit counters can hold it, and the tokens they cover."""
    if max(programs, tokens) >= 2**31:
        raise Unsupported(
            "backend: 'mosaic_gpu' needs fewer than 2**31 programs covering fewer than 2**31 tokens, "
            f"these sizes take {programs} programs covering {tokens} tokens"
        )
    return programs


def _kernel(
    refs, outs, *, tile, edge, window, tile_ready, edge_ready, window_ready,
    num_slots, batch, seqlen, config, grid, silu, pad_slot_id, interpret, always_state, channel, state_layout, store_state,
    window_copies, added=None, added_ready=None,
):  # fmt: skip
    x, weight, starts, pool = refs["x"], refs["weight"], refs.get("starts"), refs.get("pool")
    seqlens, new_pool = refs.get("seqlens"), pool if store_state else None
    tokens = x.shape[0]
    dim, history = weight.shape[0], weight.shape[1] - 1
    lanes, block_t = config.lanes, config.block_t
    has_edges = history > 0 and tokens > block_t
    # One token is not worth the waits for TMA; but loads and stores of registers do not clip.
    in_registers = (
        config.flat and len(outs) == 1 and added is None and state_layout == "front" and store_state
        and dim % lanes == 0
    )  # fmt: skip

    program = lax.axis_index("program")
    block, column = div(program, grid.columns), rem(program, grid.columns)
    channels = pl.ds(column * lanes, lanes)
    of_x = pl.ds(channels.start + channel, lanes) if channel else channels
    if config.flat:
        block = rem(block, STREAMS) * (grid.blocks // STREAMS) + div(block, STREAMS)
        row = find_row(starts, block, block_t, batch, tokens, interpret=interpret)
    else:
        row = jnp.minimum(div(block, config.row_blocks), batch)
    if starts is None:
        start = row * seqlen
        end = jnp.minimum(start + seqlen, tokens)
    else:
        start = jnp.where(row == 0, 0, _offset(starts, row, tokens))
        end = jnp.where(row == batch, tokens, _offset(starts, jnp.minimum(row + 1, batch), tokens))
    row_length = end - start
    # Slot and flag are asked for together with the offsets, so that they cost no wait of their own.
    slot, live = row_slot(refs, row, batch, num_slots, pad_slot_id)
    stateful = _stateful(refs, row, batch, always_state)
    issue_loads(interpret=interpret)

    def run_block(index):
        begin = start + index * block_t
        length = jnp.minimum(end - begin, block_t)
        first = index == 0
        fewest = GROUP if in_registers else 1  # a box less is a tensor map less

        @pl.when(row < batch)  # x is asked for before it is known whether the row is live
        def _():
            load_rows(x, of_x, tile, tile_ready, begin, length, fewest)
            if has_edges:
                load_edge(begin, first)

        @pl.when(live)
        def _():
            if added is not None:
                load_rows(refs["residual"], channels, added, added_ready, begin, length)
            if pool is not None:
                pl.when(first & stateful)(load_past)
            convolve_tile(length, first)

        @pl.when(jnp.logical_not(live))
        def _():
            @pl.when(row < batch)
            def _():
                plgpu.barrier_wait(tile_ready)
                if has_edges:
                    pl.when(needs_edge(first))(lambda: plgpu.barrier_wait(edge_ready))

            for r in range(block_t):  # a loop to `length` would be unrolled into far more code
                store_zeros(tile, r, interpret)

        plgpu.commit_smem()
        in_parts(outs, channels, lambda out, part: store_rows(tile, out, part, begin, length))
        if new_pool is not None:

            @pl.when(live & first)
            def _():
                slots = lambda channels: pool.at[slot, pl.ds(0, history), channels]  # noqa: E731
                copy_out(window, slots, channels, dim)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def needs_edge(first):
        later = jnp.logical_not(first)
        return later | (row_length > block_t) if store_state else later

    def load_edge(begin, first):
        """Before a later block: the tokens there. Before the first one of a longer row: the row's last tokens."""
        far = (jnp.where(first, end, begin) if store_state else begin) - history

        @pl.when(needs_edge(first))
        def _():
            halo = x.at[pl.ds(far, history), of_x]
            plgpu.copy_gmem_to_smem(halo, edge, edge_ready)

    def load_past():
        """Before the first block of a row with a state: its window."""
        load_window(pool, slot, channels, window, window_ready, state_layout, seqlens, row)

    def convolve_tile(length, first):
        taps, bias = load_taps(weight, refs.get("bias"), channels.start, lanes, interpret=interpret)
        past = ()
        if history:
            if pool is not None:

                @pl.when(first & stateful)
                def _():
                    for j in range(window_copies):
                        plgpu.barrier_wait(window_ready.at[j])

            @pl.when(first & jnp.logical_not(stateful))
            def _():
                for j in range(history):
                    store_zeros(window, j, interpret)

            if has_edges:

                @pl.when(needs_edge(first))
                def _():
                    plgpu.barrier_wait(edge_ready)

            past = lax.cond(first, lambda: _widen_rows(window, history), lambda: _widen_rows(edge, history))
        plgpu.barrier_wait(tile_ready)
        if added is not None:
            plgpu.barrier_wait(added_ready)
        if new_pool is not None:

            @pl.when(first & (row_length == 1))  # most rows of a serving batch are decode steps
            def _():
                for j in range(1, history):
                    window[j - 1] = window[j]
                window[history - 1] = tile[0].astype(window.dtype)

            @pl.when(first & (row_length != 1))
            def _():
                for j in range(history):
                    window[j] = new_state(j)

        def rows(first, count, past):
            for r in range(count):
                past = (*past, tile[first + r].astype(jnp.float32))
                y = convolve(past, taps, bias, silu=silu, interpret=interpret)
                if added is not None:
                    y = add(y, added[first + r].astype(jnp.float32), interpret=interpret)
                tile[first + r] = y.astype(tile.dtype)
                past = past[1:]
            return past

        groups = div(length, GROUP)
        past = lax.fori_loop(0, groups, lambda g, past: rows(g * GROUP, GROUP, past), past)
        lax.fori_loop(groups * GROUP, length, lambda r, past: rows(r, 1, past), past)

    def new_state(j):
        """Entry row_length + j of window ++ x, in the pool's dtype."""
        token = row_length + j - history
        short = lambda: lax.cond(  # noqa: E731
            token >= 0,
            lambda: tile[jnp.clip(token, 0, block_t - 1)].astype(window.dtype),
            lambda: window[jnp.minimum(row_length + j, history - 1)],
        )
        if tokens <= block_t:
            return short()
        return lax.cond(row_length > block_t, lambda: edge[j].astype(window.dtype), short)

    def run_token():
        """A whole row of one token; x and taps are asked for before slot and flag are waited for."""
        token = in_layout(x[start, of_x], interpret=interpret)
        taps, bias = load_taps(weight, refs.get("bias"), channels.start, lanes, interpret=interpret)
        issue_loads(interpret=interpret)
        if pool is None:
            past = (in_layout(jnp.zeros((lanes,), window.dtype), interpret=interpret),) * history
        else:
            past = read_window(pool, slot, live & stateful, channels, history, interpret=interpret)
        entries = tuple(entry.astype(jnp.float32) for entry in (*past, token))
        y = convolve(entries, taps, bias, silu=silu, interpret=interpret)
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


def _offset(starts, row, tokens):
    return jnp.clip(starts[row], 0, tokens)


def row_slot(refs, row, batch, num_slots, pad_slot_id):
    """The slot of a row, and whether the row is computed at all; row `batch` is the tail."""
    live = row < batch
    if num_slots is None:
        return row, live
    slot = refs["slots"][jnp.minimum(row, batch - 1)] if "slots" in refs else row
    live = live & (slot >= 0) & (slot < num_slots)
    if 0 <= pad_slot_id < num_slots:
        live = live & (slot != pad_slot_id)
    return slot, live


def _stateful(refs, row, batch, always_state):
    if "pool" in refs and "has_state" in refs:
        return refs["has_state"][jnp.minimum(row, batch - 1)]
    return jnp.bool_("pool" in refs and always_state)


def load_window(pool, slot, channels, window, ready, layout, seqlens, row):
    """Starts the copy of a slot's window, in front or at the back; of a rotating slot one row for each of `ready`."""
    history, state_len = window.shape[0], pool.shape[1]
    if layout == "ring":
        oldest = rem(jnp.maximum(seqlens[row], 0), state_len) + state_len - history
        for j in range(history):
            place = pool.at[slot, pl.ds(rem(oldest + j, state_len), 1), channels]
            plgpu.copy_gmem_to_smem(place, window.at[pl.ds(j, 1)], ready.at[j])
        return
    first = 0 if layout == "front" else state_len - history
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


def load_rows(x, channels, tile, ready, begin, length, fewest=1):
    """Starts the copy of `length` tokens, or a few more, into the first rows of the tile: one of three boxes."""
    smaller = 0
    sizes = sorted({min(n, x.shape[0], tile.shape[0]) for n in (fewest, GROUP, tile.shape[0])})
    for size in sizes:

        @pl.when((length > smaller) & (length <= size))
        def _(size=size):
            plgpu.copy_gmem_to_smem(x.at[pl.ds(begin, size), channels], tile.at[pl.ds(0, size)], ready)

        smaller = size


def store_rows(tile, out, channels, begin, length):
    """Starts the copy of exactly `length` rows: one box if the tile is full, else row by row."""
    size = tile.shape[0]

    def store(done, rows):
        copy_out(
            tile.at[pl.ds(done, rows)], lambda c: out.at[pl.ds(begin + done, rows), c], channels, out.shape[1]
        )

    if size > 1 and size <= out.shape[0]:

        @pl.when(length == size)
        def _():
            store(0, size)

    rest = jnp.where(length == size, 0, length) if size > 1 and size <= out.shape[0] else length
    lax.fori_loop(0, rest, lambda row, _: store(row, 1), None)


def in_parts(outs, channels, store):
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


def copy_out(rows, target, channels, dim):
    """Starts a copy from shared memory, [rows, lanes], to `target(channels)`, clipped at the last channel.

    Mosaic GPU makes a box of one row a plain run of bytes, which does not clip, so that one is cut to size.
    """
    rest = dim % channels.size
    if rows.shape[0] > 1 or not rest:
        plgpu.copy_smem_to_gmem(rows, target(channels))
        return

    @pl.when(channels.start + channels.size <= dim)
    def _():
        plgpu.copy_smem_to_gmem(rows, target(channels))

    @pl.when(channels.start + channels.size > dim)
    def _():
        plgpu.copy_smem_to_gmem(rows.at[:, pl.ds(0, rest)], target(pl.ds(channels.start, rest)))


def store_zeros(ref, row, interpret):
    """Zeroes a row of shared memory, each thread the channels that it convolves."""
    ref[row] = in_layout(jnp.zeros(ref.shape[-1:], ref.dtype), interpret=interpret)


def _widen_rows(ref, rows):
    return tuple(ref[j].astype(jnp.float32) for j in range(rows))
