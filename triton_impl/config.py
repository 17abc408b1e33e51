"""Block sizes and the choice of schedule: pure functions of integers, the same on every machine."""

from typing import NamedTuple

MAX_GRID_YZ = 65535
# Small batches of up to so many programs take per_sequence with "auto": all run at once, and none has to look for its
# row. Beyond, flat was the faster on every batch measured: its programs work on neighbouring memory.
PROGRAMS_AT_ONCE = 960
BLOCKS_AT_ONCE = 1056  # of 16 tokens and 256 channels: an H100 holds so many
# Steps of so many elements run at once: only latency shows, and the next kernel may begin while they run. Where programs
# still wait for their turn, those of the next kernel would take it.
AT_ONCE = 1 << 18


class PrefillConfig(NamedTuple):
    """How a prefill is launched.

    Attributes:
      flat: schedule "flat" rather than "per_sequence".
      walk: walk tokens one channel vector at a time (x with unit channel stride), else shifted tiles.
      block_t: tokens a program; at least width-1, so that only a row's first program reads its slot.
      block_d: channels a program, a power of two.
      group: tokens loaded before the first is used; divides block_t.
      row_blocks: per_sequence: programs along a row.
      search: row starts compared at a time when a flat program finds its row: one a lane.
      num_warps: warps a program.
      stages: groups in flight; above 1 they go through shared memory asynchronously.
    """

    flat: bool
    walk: bool
    block_t: int
    block_d: int
    group: int
    row_blocks: int
    search: int
    num_warps: int
    stages: int = 1


class UpdateConfig(NamedTuple):
    """How a decode step is launched.

    Attributes:
      rows, block_d: rows and channels a program.
      num_warps: warps a program.
      hurry: whether the next kernel may begin once all programs have (`launch.wait_for_inputs`).
    """

    rows: int
    block_d: int
    num_warps: int
    hurry: bool = True


class ShortRowsConfig(NamedTuple):
    """How a prefill of rows of few tokens is launched.

    Attributes:
      rows, block_d: rows and channels a program.
      block_t: tokens of a row that are asked for at once.
      tails: programs that zero what lies behind the last row.
      num_warps: warps a program.
    """

    rows: int
    block_t: int
    block_d: int
    tails: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def walks(stride_t: int, stride_d: int) -> bool:
    """Whether to walk tokens one channel vector at a time: unless only the token axis has unit stride."""
    return stride_d == 1 or stride_t != 1


def crosses(shape: tuple, strides: tuple, x_strides: tuple) -> bool:
    """Whether a gradient is channel-first where x is channel-last, or the reverse: a copy then takes less than reading it."""
    stride_t, stride_d = strides[-2:]
    # expanded, so little to read; or of one token or channel, so neither of both
    if 0 in strides or 1 in shape[-2:]:
        return False
    return walks(*x_strides[-2:]) != (stride_d <= stride_t)


def prefill_config(
    tokens: int,
    dim: int,
    batch: int,
    width: int,
    walk: bool,
    max_seqlen: int | None = None,
    schedule: str = "auto",
    warp_size: int = 32,
) -> PrefillConfig:
    """Chooses blocks and schedule from sizes alone.

    Args:
      tokens, dim, batch, width: sizes of the call.
      walk: whether to walk tokens one channel vector at a time.
      max_seqlen: host bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
      warp_size: threads of a warp of the device.
    """
    small = tokens * dim < 1 << 20  # too little to fill a device: only latency shows, so short programs
    blocks = -(-tokens // 16) * -(-dim // (8 * warp_size))
    few = blocks <= 2 * BLOCKS_AT_ONCE and tokens >= (8 if tokens * dim < 5 << 19 else 16) * batch
    stages = 1
    if not walk:
        # long rows take long stretches of a channel's memory; a thread has 16 bytes of one or a few channels
        block_t, block_d, num_warps = (256, 8, 4) if tokens >= 128 * batch else (32, 16, 1)
        block_d, group = min(next_power_of_2(max(dim, 1)), block_d), 8
    else:
        if small:
            channels = 2  # a thread
            block_t = group = max(4, next_power_of_2(width - 1))
        elif tokens >= 128 * batch or few:  # long rows: all loads of a block at once, in many threads
            channels = 2
            # half as many where blocks would leave many multiprocessors without one, at first or in the end
            idle = blocks < 0.9 * BLOCKS_AT_ONCE or BLOCKS_AT_ONCE < blocks < 1.5 * BLOCKS_AT_ONCE
            block_t = group = max(8, next_power_of_2(width - 1)) if idle else 16
        else:  # short rows mostly wait: fewer registers, so that more of them wait at a time
            channels, block_t, group, stages = 4, 16, 8, 2
        most = 4 * warp_size * channels
        if not small and -dim % most >= most // 2:  # half of the lanes of the last block idle
            most, stages = most // 2, 1
        block_d = min(max(next_power_of_2(dim), warp_size), most)
        num_warps = max(block_d // (warp_size * channels), 1)
    row_blocks = -(-(tokens if max_seqlen is None else min(max_seqlen, tokens)) // block_t)
    at_once = small and (batch + 1) * row_blocks * -(-dim // block_d) <= PROGRAMS_AT_ONCE
    whole = (
        walk and row_blocks == 1
    )  # a block a row: no more programs than flat has, and none looks for its row
    return PrefillConfig(
        flat=schedule == "flat" or (schedule == "auto" and not (at_once or whole)),
        walk=walk,
        block_t=block_t,
        block_d=block_d,
        group=group,
        row_blocks=row_blocks,
        search=32,
        num_warps=num_warps,
        stages=stages,
    )


def short_rows_config(
    tokens: int, dim: int, max_seqlen: int | None, warp_size: int = 32
) -> ShortRowsConfig | None:
    """Chooses blocks for rows of few tokens; None where rows may be longer, or a batch is small: its programs all run at once.

    Arguments as in `prefill_config`.
    """
    if max_seqlen is None or max_seqlen > 16 or tokens * dim < 1 << 20:
        return None
    block_t = next(n for n in (1, 4, 8, 16) if max_seqlen <= n)
    channels = 2 if tokens * dim < 1 << 22 else 4  # a thread
    num_warps = 2 if channels == 2 or block_t in (4, 8) else 4
    block_d = min(max(next_power_of_2(dim), warp_size), warp_size * channels * num_warps)
    return ShortRowsConfig(
        rows=2 if block_t == 1 else 1,
        block_t=block_t,
        block_d=block_d,
        tails=min(tokens // 64 + 1, 32),
        num_warps=max(block_d // (warp_size * channels), 1),
    )


def kernel_of(call) -> str:
    """Which kernel computes an `UpdateCall`.

    =======  =======  ==============================================================================================
    "token"  update   one token a row, the new window in front of the slot that was read, nothing else asked for
    "rows"   verify   several tokens a row, packed rows, rolling slots, windows, other layouts and slots, a residual,
                      split results
    "tree"   trees    draft trees
    =======  =======  ==============================================================================================
    """
    if call.tree_parents is not None:
        return "tree"
    others = (
        call.query_start_loc, call.num_accepted_tokens, call.cache_seqlens, call.write_indices, call.track_indices,
        call.window_out, call.residual, call.split_sizes,
    )  # fmt: skip
    plain = call.state_layout == "front" and call.commit and all(other is None for other in others)
    return "token" if plain and (len(call.x.shape) == 2 or call.x.shape[1] == 1) else "rows"


def row_config(tokens: int, dim: int, itemsize: int, warp_size: int = 32) -> UpdateConfig:
    """One row and one warp of 16-byte accesses a program; arguments as in `update_config`, tokens of all rows."""
    block_d = min(max(next_power_of_2(dim), warp_size), warp_size * (16 // itemsize))
    return UpdateConfig(1, block_d, 1, hurry=tokens * dim <= AT_ONCE)


def verify_config(
    tokens: int, dim: int, itemsize: int, warp_size: int = 32, light: bool = False
) -> UpdateConfig:
    """The same with 8-byte accesses, for rows of several tokens: twice the warps hide their arithmetic.

    Light: of steps that have no offsets, leave no windows but the last, in front of their slots; then two channels a thread,
    so more warps still.
    """
    if light:
        block_d = min(max(next_power_of_2(dim), warp_size), 8 * warp_size)
        return UpdateConfig(1, block_d, max(block_d // (2 * warp_size), 1), hurry=tokens * dim <= AT_ONCE)
    return row_config(tokens, dim, 2 * itemsize, warp_size)


def update_config(batch: int, dim: int, itemsize: int, warp_size: int = 32) -> UpdateConfig:
    """Chooses rows and channels a program for a decode step of `batch` rows.

    Args:
      batch, dim: sizes of the call.
      itemsize: bytes of an element of x.
      warp_size: threads of a warp of the device.
    """
    if batch * dim <= AT_ONCE:  # only latency shows: two channels a thread, so fewer instructions in a row
        return verify_config(batch, dim, itemsize, warp_size, light=True)
    # rows of a program share the taps
    return verify_config(batch, dim, itemsize, warp_size)._replace(rows=2 if batch * dim <= 1 << 22 else 4)


def prologue_config(
    tokens: int,
    dim: int,
    batch: int,
    width: int,
    lanes: int,
    max_seqlen: int | None = None,
    schedule: str = "auto",
    warp_size: int = 32,
) -> PrefillConfig:
    """Like `prefill_config`, for a prefill that normalises heads of `lanes` channels, each within a warp."""
    plain = prefill_config(tokens, dim, batch, width, True, max_seqlen, schedule, warp_size)
    channels = max(lanes // warp_size, 4)  # a thread
    halo = next_power_of_2(width - 1)
    if tokens * dim < 1 << 20:
        block_t, group, num_warps = max(4, halo), max(4, halo), 2
    elif channels > 4:
        block_t, group, num_warps = 16, max(4, halo), 4
    else:  # the sums of a token's heads are a chain of shuffles: all tokens of a block side by side hide it best
        block_t, group, num_warps = max(8, halo), max(8, halo), 4
    num_warps = min(num_warps, max(next_power_of_2(dim) // (warp_size * channels), 1))
    return plain._replace(
        block_t=block_t,
        group=group,
        block_d=warp_size * channels * num_warps,
        num_warps=num_warps,
        stages=1,
        row_blocks=-(-(tokens if max_seqlen is None else min(max_seqlen, tokens)) // block_t),
    )


def prologue_update_config(batch: int, dim: int, lanes: int, warp_size: int = 32) -> UpdateConfig:
    """Like `update_config`, for heads of `lanes` channels, each within a warp."""
    channels = max(lanes // warp_size, 4)
    hurry = batch * dim <= AT_ONCE
    rows = 1 if batch * dim <= AT_ONCE // 2 else 2
    num_warps = 1 if hurry else 2
    return UpdateConfig(rows, warp_size * channels * num_warps, num_warps, hurry)
