"""Block sizes and the choice of schedule: pure functions of integers, the same on every machine."""

from typing import NamedTuple

MAX_GRID_YZ = 65535


class PrefillConfig(NamedTuple):
    """How a prefill is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      walk: walk tokens one channel vector at a time (x with unit channel stride), else shifted tiles.
      block_t: tokens a program; at least 8, so that a halo never leaves the row.
      block_d: channels a program, a power of two.
      group: tokens loaded before the first is used; divides block_t.
      row_blocks: per_sequence: programs along a row.
      search: row starts compared at a time when a flat program finds its row.
      num_warps: warps a program.
      streams: flat: places of the batch worked on at a time, so that short rows, which mostly wait, run beside
        long ones, which fill the memory's bandwidth.
      stages: groups in flight; above 1 they go through shared memory asynchronously.
      maxnreg: registers a thread may use, or None for no limit.
    """

    flat: bool
    walk: bool
    block_t: int
    block_d: int
    group: int
    row_blocks: int
    search: int
    num_warps: int
    streams: int = 1
    stages: int = 1
    maxnreg: int | None = None


class UpdateConfig(NamedTuple):
    """How a decode step is launched: rows and channels a program, warps a program."""

    rows: int
    block_d: int
    num_warps: int


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def walks(stride_t: int, stride_d: int) -> bool:
    """Whether to walk tokens one channel vector at a time: unless only the token axis has unit stride."""
    return stride_d == 1 or stride_t != 1


def prefill_config(
    tokens: int,
    dim: int,
    batch: int,
    width: int,
    itemsize: int,
    walk: bool,
    max_seqlen: int | None = None,
    schedule: str = "auto",
    warp_size: int = 32,
) -> PrefillConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch, width: sizes of the call.
      itemsize: bytes of an element of x.
      walk: whether to walk tokens one channel vector at a time.
      max_seqlen: host bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
      warp_size: threads of a warp of the device.
    """
    if walk:
        vector = 16 // itemsize  # channels a thread
        block_d = min(max(_next_power_of_2(dim), warp_size), 64 * vector)
        num_warps = max(block_d // (warp_size * vector), 1)
        # large blocks reload less of the row before them; small ones keep every multiprocessor busy
        programs = 1056  # 8 on each of 132 multiprocessors
        block_t = 64
        while block_t > 8 and tokens * -(-dim // block_d) < block_t * programs:
            block_t //= 2
        maxnreg = 144 if width <= 4 else None  # as many programs on a multiprocessor as fit without spills
    else:
        block_t, block_d, num_warps, maxnreg = 64, min(max(_next_power_of_2(dim), 1), 16), 4, None
    row_blocks = -(-(tokens if max_seqlen is None else min(max_seqlen, tokens)) // block_t)
    per_sequence_blocks, flat_blocks = (batch + 1) * row_blocks, tokens // block_t + batch + 1
    flat = schedule == "flat" or (schedule == "auto" and 4 * per_sequence_blocks > 5 * flat_blocks)
    return PrefillConfig(
        flat=flat,
        walk=walk,
        block_t=block_t,
        block_d=block_d,
        group=8,
        row_blocks=row_blocks,
        search=32 if batch < 32 else 512,
        num_warps=num_warps,
        streams=8 if flat_blocks >= 64 else 1,
        maxnreg=maxnreg,
    )


def update_config(batch: int, dim: int, width: int, itemsize: int, warp_size: int = 32) -> UpdateConfig:
    """Chooses rows and channels a program for a decode step of `batch` rows.

    Args:
      batch, dim, width: sizes of the call.
      itemsize: bytes of an element of x.
      warp_size: threads of a warp of the device.
    """
    block_d = min(max(_next_power_of_2(dim), warp_size), warp_size * (16 // itemsize))
    # several rows a program share the taps, where there are rows enough to fill the device and registers to hold them
    rows = 4 if batch * dim >= 1 << 20 and width <= 4 else 1
    return UpdateConfig(rows, block_d, 1)
