"""Block sizes and the choice of schedule: pure functions of integers, the same on every machine."""

from typing import NamedTuple


class PrefillConfig(NamedTuple):
    """How a prefill is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      block_t: tokens a program, a power of two, at least 8.
      lanes: channels of a tile, 128 or 256 (an axis of a TMA box has at most 256 elements).
      tiles: tiles a program; its channels are `tiles * lanes`.
      row_blocks: per_sequence: programs along a row.
      tail_blocks: per_sequence: programs that write the zeros after the last row.
    """

    flat: bool
    block_t: int
    lanes: int
    tiles: int
    row_blocks: int
    tail_blocks: int


class UpdateConfig(NamedTuple):
    """How a decode step is launched: rows a program, channels a tile, tiles a program."""

    rows: int
    lanes: int


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


def prefill_config(
    tokens: int, dim: int, batch: int, itemsize: int, max_seqlen: int | None, schedule: str
) -> PrefillConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch: sizes of the call.
      itemsize: bytes of an element of x.
      max_seqlen: host bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
    """
    lanes = choose_lanes(dim)
    columns = cdiv(dim, lanes)
    block_t = 32 if tokens * columns >= 32 * 1056 and tokens >= 16 * batch else 8
    tiles = 1
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    row_blocks = max(cdiv(longest, block_t), 1)
    tail_blocks = min(cdiv(tokens, block_t), 8)
    flat_blocks = tokens // block_t + batch + 1
    flat = schedule == "flat" or (schedule == "auto" and batch * row_blocks > flat_blocks + flat_blocks // 8)
    return PrefillConfig(flat, block_t, lanes, tiles, row_blocks, tail_blocks)


def update_config(batch: int, dim: int) -> UpdateConfig:
    """Chooses rows and channels a program for a decode step of `batch` rows."""
    lanes = choose_lanes(dim)
    rows = 4 if batch * cdiv(dim, lanes) >= 4 * 1056 else 1
    return UpdateConfig(min(rows, max(batch, 1)), lanes)
