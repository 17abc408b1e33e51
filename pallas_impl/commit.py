"""Accepted windows into their slots on Mosaic GPU: one warpgroup a row and tile of channels, one box in, one out."""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_impl.config import cdiv
from pallas_impl.prefill import COMPILER_PARAMS, check_grid, copy_out, row_slot
from pallas_impl.states import in_range
from pallas_impl.taps import div, rem


def launch(conv_states, window_out, steps, slots, buffers, *, pad_slot_id, lanes, interpret):
    """Runs the kernel.

    Args:
      conv_states: the pool. It is written in place where XLA owns it, else XLA copies it first.
      window_out: as in `commit_windows`; its rows and the pool's are multiples of 16 bytes and at least 128
        channels long.
      steps: [batch] int32.
      slots, buffers: [batch] int32, or None for the identity.
      pad_slot_id: of slots and buffers.
      lanes: channels of a tile.
      interpret: False, or the parameters of Pallas' GPU interpreter.

    Returns:
      The new pool.
    """
    (batch,), dim, history = steps.shape, conv_states.shape[2], window_out.shape[2]
    columns = cdiv(dim, lanes)
    operands = dict(steps=steps, windows=window_out, slots=slots, buffers=buffers)
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    pool = jax.new_ref(conv_states, memory_space=plgpu.GMEM)
    scratch = dict(window=plgpu.SMEM((history, lanes), window_out.dtype), ready=plgpu.Barrier())
    if window_out.dtype != conv_states.dtype:
        scratch["rounded"] = plgpu.SMEM((history, lanes), conv_states.dtype)
    body = functools.partial(_kernel, batch=batch, columns=columns, lanes=lanes, pad_slot_id=pad_slot_id)

    def kernel(*refs):
        pl.run_scoped(functools.partial(body, dict(zip((*operands, "pool"), refs, strict=True))), **scratch)

    pl.kernel(
        kernel,
        out_type=(),
        mesh=plgpu.Mesh(grid=(check_grid(batch * columns),), grid_names=("program",)),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
        name="causal_conv1d_commit_windows",
    )(*operands.values(), pool)
    return jax.freeze(pool)


def _kernel(refs, *, window, ready, batch, columns, lanes, pad_slot_id, rounded=None):
    pool, windows = refs["pool"], refs["windows"]
    history = window.shape[0]
    program = lax.axis_index("program")
    row, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * lanes, lanes)
    slot, live = row_slot(refs, row, batch, pool.shape[0], pad_slot_id)
    buffer = refs["buffers"][row] if "buffers" in refs else row
    step = refs["steps"][row]
    kept = (
        (step >= 0)
        & (step < windows.shape[1])
        & in_range(buffer, end=windows.shape[0], pad_slot_id=pad_slot_id)
    )

    @pl.when(live & kept)
    def _():
        plgpu.copy_gmem_to_smem(windows.at[buffer, step, pl.ds(0, history), channels], window, ready)
        plgpu.barrier_wait(ready)
        if rounded is not None:
            for j in range(history):
                rounded[j] = window[j].astype(rounded.dtype)
            plgpu.commit_smem()
        rows = window if rounded is None else rounded
        copy_out(rows, lambda channels: pool.at[slot, pl.ds(0, history), channels], channels, pool.shape[2])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
