"""Block sizes and the choice of schedule: pure functions of integers, the same on every machine."""

from typing import NamedTuple

# Flat: places of the batch worked on at a time, so that short rows, which mostly wait, run beside long ones, which
# fill the memory's bandwidth.
STREAMS = 4
BLOCK_T = 8  # tokens of a row that an update has on their way at a time
# Tokens of a row, on average, up to which programs take tokens whatever rows they are of: where some rows may be longer
# than a block, and where none is.
SHORT_ROW, SHORT_ROWS = 7, 12
LONG_ROW = 4  # tokens up to which one program for a row is the faster
BACKWARD_D = 128  # channels of a tile of the backward pass


class PrefillConfig(NamedTuple):
    """How a prefill is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      block_t: tokens a program, a power of two, at least 8, so that a halo never leaves the row.
      block_d: channels a program, 128 or 256 (an axis of a TMA box has at most 256 elements).
      row_blocks: per_sequence: programs along a row; 0 with flat.
      tail_blocks: per_sequence: programs that write the zeros after the last row; 0 with flat.
      short_t: tokens a program of `short_rows`, where that may run instead; 0 where it may not.
    """

    flat: bool
    block_t: int
    block_d: int
    row_blocks: int
    tail_blocks: int
    short_t: int = 0


class Grid(NamedTuple):
    """The programs of a prefill: `blocks` of tokens times `columns` of channels."""

    blocks: int
    columns: int


class UpdateConfig(NamedTuple):
    """How a decode step is launched.

    Attributes:
      rows: rows a program.
      block_d: channels of a tile: 128, 256, or in registers 512.
      in_registers: window and token meet in registers; block_d must divide the channels. Else in shared memory.
    """

    rows: int
    block_d: int
    in_registers: bool


class BackwardConfig(NamedTuple):
    """How a backward pass is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      block_t: tokens a program, a power of two; the same for both schedules, since the order of sums follows from it.
      row_blocks: per_sequence: programs along a row; 0 with flat.
    """

    flat: bool
    block_t: int
    row_blocks: int


def kernel_of(call) -> str:
    """Which kernel runs an update, the contract's `UpdateCall`.

    | kernel | file | calls |
    |---|---|---|
    | "token" | `update` | one token a row; the window in front of the slot that is read, or residual, parts of x and `out` |
    | "rows" | `verify` | several tokens a row, packed or not, rolling slots, other layouts and slots, windows of every step |
    | "tree" | `trees` | draft trees |
    """
    if call.tree_parents is not None:
        return "tree"
    one = call.query_start_loc is None and (len(call.x.shape) == 2 or call.x.shape[1] == 1)
    return "token" if one and _is_plain(call) else "rows"


def has_long_rows(call, longest: int | None) -> bool:
    """Whether an update runs as a prefill, whose programs share a row."""
    return call.tree_parents is None and _is_plain(call) and (longest is None or longest > LONG_ROW)


def _is_plain(call) -> bool:
    others = (call.num_accepted_tokens, call.write_indices, call.track_indices, call.window_out)
    return call.state_layout == "front" and call.commit and all(other is None for other in others)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tma_dim(dim: int, itemsizes: tuple[int, ...]) -> int:
    """The number of channels TMA can address: `dim` itself, or padded where its rows are no multiple of 16 bytes.

    A row must also fill the warpgroup's 128 lanes once.
    """
    channels = 16 // min(itemsizes)
    return max(cdiv(dim, channels) * channels, 128)


def choose_block_d(dim: int) -> int:
    """Channels of a tile: 256, unless too many of them would lie past the end."""
    return 128 if cdiv(dim, 128) % 2 and dim < 1024 else 256


def prefill_config(tokens: int, dim: int, batch: int, max_seqlen: int | None, schedule: str) -> PrefillConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch: sizes of the call.
      max_seqlen: host bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
    """
    block_d = choose_block_d(dim)
    average = tokens // max(batch, 1)
    enough = tokens * cdiv(dim, block_d) >= 16 * 1056  # for every program an H100 holds at once
    block_t = 16 if enough and average >= 8 else 8
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    row_blocks = max(cdiv(longest, block_t), 1)
    flat_blocks = tokens // block_t + batch + 1
    at_once = (
        batch * row_blocks * cdiv(dim, block_d) <= 1056
    )  # no program waits for another: no row to look for is best
    wasteful = batch * row_blocks > flat_blocks + flat_blocks // 8 and not at_once
    short_t = _short_t(tokens, cdiv(dim, block_d), batch, longest) if schedule == "auto" else 0
    if schedule == "flat" or (schedule == "auto" and wasteful):
        return PrefillConfig(True, block_t, block_d, 0, 0, short_t)
    return PrefillConfig(False, block_t, block_d, row_blocks, min(cdiv(tokens, block_t), 8), short_t)


def _short_t(tokens: int, columns: int, batch: int, longest: int) -> int:
    """Tokens a program of `short_rows`; 0 where rows are longer, or so few that one wait more a program shows."""
    average = cdiv(tokens, max(batch, 1))
    if average > (SHORT_ROWS if longest <= 16 else SHORT_ROW):
        return 0
    short_t, programs = (8, 1024) if tokens < 2 * batch else (16, 1408)
    return short_t if tokens * columns >= short_t * programs else 0


def prefill_grid(config: PrefillConfig, tokens: int, dim: int, batch: int) -> Grid:
    """The grid of a prefill; with flat it depends on shapes alone."""
    columns = cdiv(dim, config.block_d)
    if not config.flat:
        return Grid(batch * config.row_blocks + config.tail_blocks, columns)
    return Grid(cdiv(tokens // config.block_t + batch + 1, STREAMS) * STREAMS, columns)


def update_config(batch: int, dim: int) -> UpdateConfig:
    """Chooses rows and channels a program for a decode step of `batch` rows."""
    channels = batch * dim
    for block_d in (512, 256, 128) if channels >= 1 << 17 else (256, 128):
        if dim % block_d == 0:
            return UpdateConfig(2 if channels >= 1 << 20 else 1, block_d, True)
    block_d = choose_block_d(dim)
    work = batch * cdiv(dim, block_d)
    rows = 4 if work >= 16 * 1056 else 2 if work >= 4 * 1056 else 1
    return UpdateConfig(rows, block_d, False)


def backward_config(
    tokens: int, dim: int, batch: int, itemsize: int, max_seqlen: int | None, schedule: str, arrays: int = 2
) -> BackwardConfig:
    """Chooses blocks and schedule from sizes alone; x and dout of a block, or so many arrays, lie in shared memory together."""
    block_t = 512 // (itemsize * arrays)
    while (
        block_t > 16 and tokens * cdiv(dim, BACKWARD_D) < block_t * 396
    ):  # three on each of 132 multiprocessors
        block_t //= 2
    longest = tokens if max_seqlen is None else min(max_seqlen, tokens)
    row_blocks = max(cdiv(longest, block_t), 1)
    flat_blocks = tokens // block_t + batch + 1
    if schedule == "flat" or (schedule == "auto" and 4 * (batch + 1) * row_blocks > 5 * flat_blocks):
        return BackwardConfig(True, block_t, 0)
    return BackwardConfig(False, block_t, row_blocks)
