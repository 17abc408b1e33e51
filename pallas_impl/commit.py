"""Accepted windows into their slots on Mosaic GPU: one warpgroup a row and tile of channels, one box in, one out."""

import functools

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.arithmetic import div, rem, round_to
from pallas_impl.config import cdiv
from pallas_impl.launch import run
from pallas_impl.rows import copy_out
from pallas_impl.slots import find_slot, is_slot


def launch(arrays, options):
    """Runs the kernel.

    Args:
      arrays: conv_states, window_out, accepted_steps, cache_indices and window_indices, integers as int32; rows of
        the pool and of the windows are multiples of 16 bytes and at least 128 channels long. The pool is written in
        place where XLA owns it, else XLA copies it first.
      options: `Options`; pad_slot_id is that of slots and buffers.

    Returns:
      The new pool.
    """
    pool, windows, block_d = arrays.conv_states, arrays.window_out, options.block_d
    (batch,), history = arrays.accepted_steps.shape, windows.shape[2]
    columns = cdiv(pool.shape[2], block_d)
    scratch = dict(window=plgpu.SMEM((history, block_d), windows.dtype), ready=plgpu.Barrier())
    if windows.dtype != pool.dtype:
        scratch["rounded"] = plgpu.SMEM((history, block_d), pool.dtype)
    (pool,) = run(
        functools.partial(_kernel, batch=batch, columns=columns, o=options),
        "commit_windows",
        batch * columns,
        arrays.named("accepted_steps", "window_out", "cache_indices", "window_indices", "conv_states"),
        {},
        scratch,
        written=("conv_states",),
        interpret=options.interpret,
    )
    return pool


def _kernel(refs, *, batch, columns, o):
    pool, windows, window, rounded = refs.conv_states, refs.window_out, refs.window, refs.rounded
    history = window.shape[0]
    program = lax.axis_index("program")
    row, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * o.block_d, o.block_d)
    slot, live = find_slot(refs.cache_indices, row, batch, pool.shape[0], o.pad_slot_id)
    buffer = row if refs.window_indices is None else refs.window_indices[row]
    step = refs.accepted_steps[row]
    kept = (step >= 0) & (step < windows.shape[1]) & is_slot(buffer, windows.shape[0], o.pad_slot_id)

    @pl.when(live & kept)
    def _():
        plgpu.copy_gmem_to_smem(windows.at[buffer, step, pl.ds(0, history), channels], window, refs.ready)
        plgpu.barrier_wait(refs.ready)
        if rounded is not None:
            for j in range(history):
                rounded[j] = round_to(window[j], rounded.dtype)
            plgpu.commit_smem()
        rows = window if rounded is None else rounded
        copy_out(rows, lambda channels: pool.at[slot, pl.ds(0, history), channels], channels, pool.shape[2])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
