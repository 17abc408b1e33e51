"""Decode with a rolling slot on Mosaic GPU, for speculative decoding: one warpgroup a row and tile of channels.

The window begins in column count-1 of the slot. Its entries but the oldest go to columns 0 .. width-3, the new
tokens behind them, as many as the slot has columns for; the next step's count then picks the window that ends
with the last accepted token. One program owns a row's channels and reads the window before it stores anything.
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
    load_rows,
    row_slot,
    store_rows,
    store_zeros,
)
from pallas_impl.taps import convolve, div, load_taps, rem

BLOCK_T = 8  # tokens of a row on their way at a time


def launch(
    x, weight, bias, conv_states, starts, slots, counts, *, seqlen, silu, pad_slot_id, lanes, interpret
):
    """Runs the kernel.

    Args:
      x: [tokens, dim]; rows of x and of the pool are multiples of 16 bytes and at least 128 channels long.
      weight, bias, conv_states: as in `causal_conv1d_update`. The pool is written in place where XLA owns
        it, else XLA copies it first.
      starts: [batch+1] int32 offsets of packed rows, or None: every row has `seqlen` tokens.
      slots: [batch] int32, or None for the identity.
      counts: [batch] int32, clamped to what a slot can hold.
      seqlen: tokens of every row; not used with `starts`.
      lanes: channels of a tile, 128 or 256.
      interpret: False, or the parameters of Pallas' GPU interpreter.

    Returns:
      (out, conv_states)
    """
    tokens, dim = x.shape
    width = weight.shape[1]
    batch = counts.shape[0]
    columns = cdiv(dim, lanes)
    tail_programs = 0 if starts is None else min(cdiv(tokens, BLOCK_T), 8)
    names, operands = ["x", "weight"], [x, weight]
    for name, operand in (("bias", bias), ("starts", starts), ("slots", slots)):
        if operand is not None:
            names.append(name)
            operands.append(operand)
    if width > 1:
        names += ["counts", "pool"]
        operands += [counts, jax.new_ref(conv_states, memory_space=plgpu.GMEM)]
    scratch = dict(
        tile=plgpu.SMEM((BLOCK_T, lanes), x.dtype),
        entries=plgpu.SMEM((BLOCK_T, lanes), conv_states.dtype),
        window=plgpu.SMEM((max(width - 1, 1), lanes), conv_states.dtype),
        tile_ready=plgpu.Barrier(num_arrivals=1),
        window_ready=plgpu.Barrier(num_arrivals=1),
    )
    body = functools.partial(
        _kernel, batch=batch, seqlen=seqlen, columns=columns, tail_programs=tail_programs,
        num_slots=conv_states.shape[0], lanes=lanes, silu=silu, pad_slot_id=pad_slot_id,
        interpret=bool(interpret),
    )  # fmt: skip

    def kernel(*refs):
        *inputs, out = refs
        pl.run_scoped(functools.partial(body, dict(zip(names, inputs, strict=True)), out), **scratch)

    (out,) = pl.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct(x.shape, x.dtype),),
        mesh=plgpu.Mesh(grid=(check_grid((batch + tail_programs) * columns),), grid_names=("program",)),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        name="causal_conv1d_rolling_update",
    )(*operands)
    return out, jax.freeze(operands[-1]) if width > 1 else conv_states


def _kernel(
    refs, out, *, tile, entries, window, tile_ready, window_ready,
    batch, seqlen, columns, tail_programs, num_slots, lanes, silu, pad_slot_id, interpret,
):  # fmt: skip
    x, weight, pool = refs["x"], refs["weight"], refs.get("pool")
    tokens, dim = x.shape
    history = weight.shape[1] - 1
    program = lax.axis_index("program")
    place, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * lanes, lanes)
    row = jnp.minimum(place, batch)  # row `batch` is the tail
    start, end = _bounds(refs.get("starts"), row, batch, tokens, seqlen)
    slot, live = row_slot(refs, row, batch, num_slots, pad_slot_id)

    def load(block):
        begin = start + block * BLOCK_T
        load_rows(x, channels, tile, tile_ready, begin, jnp.minimum(end - begin, BLOCK_T))

    @pl.when(live & (start < end))
    def _():
        load(0)
        if history:
            state_len = pool.shape[1]
            first = jnp.clip(refs["counts"][row], 1, state_len - history + 1) - 1
            plgpu.copy_gmem_to_smem(pool.at[slot, pl.ds(first, history), channels], window, window_ready)
        taps, bias = load_taps(weight, refs.get("bias"), channels.start, lanes, interpret=interpret)
        past = ()
        if history:
            plgpu.barrier_wait(window_ready)
            past = tuple(window[j].astype(jnp.float32) for j in range(history))
        if history > 1:
            kept = lambda channels: pool.at[slot, pl.ds(0, history - 1), channels]  # noqa: E731
            plgpu.commit_smem()
            copy_out(window.at[pl.ds(1, history - 1)], kept, channels, dim)

        def token(t, past):
            arrived = tile[t]
            if history:
                entries[t] = arrived.astype(entries.dtype)
            past = (*past, arrived.astype(jnp.float32))
            tile[t] = convolve(past, taps, bias, silu=silu, interpret=interpret).astype(tile.dtype)
            return past[1:]

        blocks = div(end - start + BLOCK_T - 1, BLOCK_T)

        def turn(block, past):
            begin = start + block * BLOCK_T
            length = jnp.minimum(end - begin, BLOCK_T)
            plgpu.barrier_wait(tile_ready)
            past = lax.fori_loop(0, length, token, past)
            plgpu.commit_smem()
            store_rows(tile, out, channels, begin, length)
            if history:
                to = history - 1 + block * BLOCK_T
                store_rows(entries, pool.at[slot], channels, to, jnp.clip(state_len - to, 0, length))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(block + 1 < blocks)
            def _():
                load(block + 1)

            return past

        lax.fori_loop(0, blocks, turn, past)

    @pl.when(jnp.logical_not(live))
    def _():
        for t in range(BLOCK_T):
            store_zeros(tile, t, interpret)
        plgpu.commit_smem()
        first = place - row
        stride = jnp.where(row < batch, jnp.int32(1), jnp.int32(tail_programs))
        blocks = div(jnp.maximum(end - start, 0) + BLOCK_T - 1, BLOCK_T)

        def turn(i, _):
            begin = start + (first + i * stride) * BLOCK_T
            store_rows(tile, out, channels, begin, jnp.minimum(end - begin, BLOCK_T))

        lax.fori_loop(0, lax.div(jnp.maximum(blocks - first + stride - 1, 0), stride), turn, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _bounds(starts, row, batch, tokens, seqlen):
    """First token and end of a row, inside [0, tokens]; of the tail for row `batch`."""
    if starts is None:
        return row * seqlen, (row + 1) * seqlen
    offset = lambda i: jnp.clip(starts[i], 0, tokens)  # noqa: E731
    start = jnp.where(row == 0, 0, offset(row))
    return start, jnp.where(row == batch, tokens, offset(jnp.minimum(row + 1, batch)))
