"""Block sizes and the choice of schedule: pure functions of integers, the same on every machine."""

from typing import NamedTuple

# Flat: places of the batch worked on at a time, so that short rows, which mostly wait, run beside long ones, which
# fill the memory's bandwidth.
STREAMS = 4


class PrefillConfig(NamedTuple):
    """How a prefill is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      block_t: tokens a program, a power of two, at least 8, so that a halo never leaves the row.
      lanes: channels a program, 128 or 256 (an axis of a TMA box has at most 256 elements).
      row_blocks: per_sequence: programs along a row; 0 with flat.
      tail_blocks: per_sequence: programs that write the zeros after the last row; 0 with flat.
    """

    flat: bool
    block_t: int
    lanes: int
    row_blocks: int
    tail_blocks: int


class Grid(NamedTuple):
    """The programs of a prefill: `blocks` of tokens times `columns` of channels."""

    blocks: int
    columns: int


class UpdateConfig(NamedTuple):
    """How a decode step is launched.

    Attributes:
      rows: rows a program.
      lanes: channels of a tile: 128, 256, or in registers 512.
      in_registers: window and token meet in registers; the lanes must divide the channels. Else in shared memory.
    """

    rows: int
    lanes: int
    in_registers: bool


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tma_dim(dim: int, itemsizes: tuple[int, ...]) -> int:
    """The number of channels TMA can address: `dim` itself, or padded where its rows are no multiple of 16 bytes.

    A row must also fill the warpgroup's 128 lanes once.
    """
    channels = 16 // min(itemsizes)
    return max(cdiv(dim, channels) * channels, 128)


def choose_lanes(dim: int) -> int:
    """Channels of a tile: 256, unless too many of them would lie past the end."""
    return 128 if cdiv(dim, 128) % 2 and dim < 1024 else 256


def prefill_config(tokens: int, dim: int, batch: int, max_seqlen: int | None, schedule: str) -> PrefillConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch: sizes of the call.
      max_seqlen: host bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
    """
    lanes = choose_lanes(dim)
    average = tokens // max(batch, 1)
    enough = tokens * cdiv(dim, lanes) >= 32 * 1056  # for every program an H100 holds at once
    block_t = 16 if enough and average >= 8 else 8
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    row_blocks = max(cdiv(longest, block_t), 1)
    flat_blocks = tokens // block_t + batch + 1
    at_once = (
        batch * row_blocks * cdiv(dim, lanes) <= 1056
    )  # no program waits for another: no row to look for is best
    wasteful = batch * row_blocks > flat_blocks + flat_blocks // 8 and not at_once
    if schedule == "flat" or (schedule == "auto" and wasteful):
        return PrefillConfig(True, block_t, lanes, 0, 0)
    return PrefillConfig(False, block_t, lanes, row_blocks, min(cdiv(tokens, block_t), 8))


def prefill_grid(config: PrefillConfig, tokens: int, dim: int, batch: int) -> Grid:
    """The grid of a prefill; with flat it depends on shapes alone."""
    columns = cdiv(dim, config.lanes)
    if not config.flat:
        return Grid(batch * config.row_blocks + config.tail_blocks, columns)
    return Grid(cdiv(tokens // config.block_t + batch + 1, STREAMS) * STREAMS, columns)


def update_config(batch: int, dim: int) -> UpdateConfig:
    """Chooses rows and channels a program for a decode step of `batch` rows."""
    channels = batch * dim
    for lanes in (512, 256, 128) if channels >= 1 << 17 else (256, 128):
        if dim % lanes == 0:
            return UpdateConfig(2 if channels >= 1 << 20 else 1, lanes, True)
    lanes = choose_lanes(dim)
    work = batch * cdiv(dim, lanes)
    rows = 4 if work >= 16 * 1056 else 2 if work >= 4 * 1056 else 1
    return UpdateConfig(rows, lanes, False)
