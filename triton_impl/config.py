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
    """

    flat: bool
    walk: bool
    block_t: int
    block_d: int
    group: int
    row_blocks: int
    search: int
    num_warps: int


class UpdateConfig(NamedTuple):
    """How a decode step is launched: rows and channels a program, warps a program."""

    rows: int
    block_d: int
    num_warps: int


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def prefill_config(
    tokens: int, dim: int, batch: int, itemsize: int, walk: bool, max_seqlen: int | None, schedule: str
) -> PrefillConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch: sizes of the call.
      itemsize: bytes of an element of x.
      walk: whether x has unit channel stride.
      max_seqlen: host bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
    """
    if walk:
        vector = 16 // itemsize  # channels a thread
        block_d = min(max(_next_power_of_2(dim), 32), 64 * vector)
        work = tokens * -(-dim // block_d)
        block_t = 8 if work <= 8 * 132 else 16 if work <= 16 * 1056 else 32 if work <= 32 * 1056 else 64
        num_warps = max(block_d // (32 * vector), 1)
        group = 8
    else:
        block_t, block_d, num_warps, group = 64, min(max(_next_power_of_2(dim), 1), 32), 4, 8
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    row_blocks = -(-longest // block_t)
    flat_blocks = tokens // block_t + batch + 1
    flat = schedule == "flat" or (schedule == "auto" and (batch + 1) * row_blocks > flat_blocks + flat_blocks // 4)
    return PrefillConfig(flat, walk, block_t, block_d, group, row_blocks, 32 if batch < 32 else 512, num_warps)


def update_config(batch: int, dim: int, itemsize: int) -> UpdateConfig:
    """Chooses rows and channels a program for a decode step of `batch` rows."""
    vector = 16 // itemsize
    block_d = min(max(_next_power_of_2(dim), 32), 32 * vector)
    rows = 4 if batch * dim >= 1 << 20 else 1
    return UpdateConfig(rows, block_d, 1)
