"""Every store of state of a prefill whose rows leave more, or elsewhere, than the plain kernel does.

One launch behind the outputs: new states in any layout and in any slot, windows at multiples of a block size
(snapshots), one tracked window a row. Block k of row s is program `query_start_loc[s] // BLOCK + s + k`, as in the
flat schedule, so that a long row's snapshots are taken by many programs. The program of a row's first block does all
that reads the old slot, reads before writes; the others read x alone.
"""

import triton
import triton.language as tl

from triton_impl.launch import Launch, known_pad, stride
from triton_impl.slots import find_slot, find_window, leave_state, load_entries, store_entries
from triton_impl.taps import offset

NO_SNAPSHOTS = 1 << 62  # a block no row fills


@triton.jit
def _row_of_block(query_start_loc, block, batch, tokens, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """The last row in [0, batch] whose first block is at most `block`, SEARCH candidates at a time."""
    row = 0
    size = batch + 1
    lane = tl.arange(0, SEARCH)
    while size > 1:
        step = (size + SEARCH - 1) // SEARCH
        candidate = row + lane * step
        start = offset(query_start_loc, candidate, batch, tokens).to(tl.int64)  # BLOCK may be as wide
        passed = (lane * step < size) & (start // BLOCK + candidate <= block)
        ahead = tl.maximum(tl.sum(passed.to(tl.int32), axis=0) - 1, 0) * step
        row += ahead
        size = tl.minimum(step, size - ahead)
    return row


@triton.jit
def _keep_window(
    x, old, length, first, state_len, conv_states, target, stores, ch, in_dim, has_state,
    stride_x_t, stride_x_d, stride_s_n, stride_s_l, stride_s_d, WIDTH: tl.constexpr,
):  # fmt: skip
    """Leaves the window behind `length` tokens of the row in slot `target`."""
    mask = in_dim & stores
    window = load_entries(
        x, old, length, first, state_len, ch, mask, has_state, stride_x_t, stride_x_d, stride_s_l, stride_s_d,
        WIDTH - 1, WIDTH, "front",
    )  # fmt: skip
    store_entries(conv_states + target * stride_s_n, window, ch, mask, stride_s_l, stride_s_d, WIDTH - 1)


@triton.jit(
    do_not_specialize=["tokens", "batch", "num_slots", "state_len", "pad_slot_id", "snapshots", "dim_blocks"]
)
def _states_kernel(
    x, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
    snapshot_indices, num_computed_tokens, track_indices, track_lengths,
    tokens, dim, batch, num_slots, state_len, pad_slot_id, snapshots, dim_blocks,
    stride_x_t, stride_x_d, stride_s_n, stride_s_l, stride_s_d, stride_c, stride_h, stride_q, stride_w,
    stride_i_b, stride_i_k, stride_n, stride_k, stride_l,
    WIDTH: tl.constexpr, LAYOUT: tl.constexpr, APPLY_EMPTY: tl.constexpr, BLOCK: tl.constexpr,
    SEARCH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # strides may pass 2**31 elements when multiplied: all offsets are 64-bit
    stride_x_t = tl.cast(stride_x_t, tl.int64)
    stride_x_d = tl.cast(stride_x_d, tl.int64)
    stride_s_l = tl.cast(stride_s_l, tl.int64)
    stride_s_d = tl.cast(stride_s_d, tl.int64)

    # mapping of programs
    program = tl.program_id(0) // dim_blocks
    ch = (tl.program_id(0) % dim_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = ch < dim
    if snapshot_indices is None:
        row = program.to(tl.int64)
    else:
        row = _row_of_block(query_start_loc, program, batch, tokens, BLOCK, SEARCH).to(tl.int64)
    row_start = offset(query_start_loc, row, batch, tokens).to(tl.int64)
    length = tl.maximum(offset(query_start_loc, row + 1, batch, tokens) - row_start, 0)
    in_rows = row < batch
    slot, live = find_slot(cache_indices, row, in_rows, stride_c, num_slots, pad_slot_id)
    if not APPLY_EMPTY:
        live = live & (length > 0)
    if live:
        has_state = row < 0
        if has_initial_state is not None:
            has_state = tl.load(has_initial_state + row * stride_h, mask=in_rows, other=0) != 0
        first = find_window(cache_seqlens, None, row, in_rows, stride_q, 0, state_len, WIDTH, LAYOUT)
        tokens_of_row = x + row_start * stride_x_t
        old = conv_states + slot * stride_s_n

        block = program * 0
        if snapshot_indices is not None:
            block = program - row_start // BLOCK - row
            # boundary m of this call lies `ahead` + m * BLOCK tokens inside it and is boundary `passed` + m of the row
            consumed = tl.zeros([], tl.int64)
            if num_computed_tokens is not None:
                consumed = tl.load(num_computed_tokens + row * stride_n, mask=in_rows, other=0).to(tl.int64)
                consumed = tl.maximum(consumed, 0)
            passed = consumed // BLOCK
            ahead = BLOCK - consumed % BLOCK
            count = tl.where(length >= ahead, (length - ahead) // BLOCK + 1, 0)
            count = tl.minimum(count, tl.maximum(snapshots - passed, 0))
            near = tl.minimum(
                count, tl.cdiv(tl.maximum(WIDTH - 1 - ahead, 0), BLOCK)
            )  # these see the old window
            begin = tl.where(block == 0, 0, tl.maximum(block, near))
            end = tl.where(block == 0, tl.maximum(near, 1), block + 1)
            for m in range(begin, tl.minimum(end, count)):
                target, stores = find_slot(
                    snapshot_indices + row * stride_i_b,
                    passed + m,
                    in_rows,
                    stride_i_k,
                    num_slots,
                    pad_slot_id,
                )
                _keep_window(
                    tokens_of_row, old, ahead + m * BLOCK, first, state_len, conv_states, target, stores, ch, in_dim, has_state,
                    stride_x_t, stride_x_d, stride_s_n, stride_s_l, stride_s_d, WIDTH,
                )  # fmt: skip
        if block == 0:
            if track_indices is not None:
                at = length
                if track_lengths is not None:
                    at = tl.load(track_lengths + row * stride_l, mask=in_rows, other=0).to(tl.int64)
                    at = tl.minimum(tl.maximum(at, 0), length)
                target, stores = find_slot(track_indices, row, in_rows, stride_k, num_slots, pad_slot_id)
                _keep_window(
                    tokens_of_row, old, at, first, state_len, conv_states, target, stores, ch, in_dim, has_state,
                    stride_x_t, stride_x_d, stride_s_n, stride_s_l, stride_s_d, WIDTH,
                )  # fmt: skip
            write = slot
            stores = live
            if write_indices is not None:
                write, stores = find_slot(write_indices, row, in_rows, stride_w, num_slots, pad_slot_id)
            moves = write != slot
            # a row of no tokens that keeps its slot and its state has nothing to do
            changes = stores & (moves | (length > 0) | (has_state == 0))
            leave_state(
                tokens_of_row, length, old, conv_states + write * stride_s_n, first, state_len, ch, in_dim & changes,
                has_state, moves, stride_x_t, stride_x_d, stride_s_l, stride_s_d, WIDTH, LAYOUT,
            )  # fmt: skip


def prepare(tensors, *, layout, apply_empty, block_size, width, pad_slot_id, config):
    """Prepares the kernel for checked arguments of these shapes, strides and dtypes.

    Args:
      tensors: x, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
        snapshot_indices, num_computed_tokens, track_indices, track_lengths.
      config: an UpdateConfig, whose channel blocks it takes.

    Returns:
      A Launch of these tensors.
    """
    (
        x, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
        snapshot_indices, num_computed_tokens, track_indices, track_lengths,
    ) = tensors  # fmt: skip
    tokens, dim = x.shape
    batch = query_start_loc.shape[0] - 1
    num_slots, state_len, _ = conv_states.shape
    dim_blocks = triton.cdiv(dim, config.block_d)
    block = NO_SNAPSHOTS if snapshot_indices is None else min(block_size, NO_SNAPSHOTS)
    programs = batch + (0 if snapshot_indices is None else tokens // block + 1)
    snapshots = 0 if snapshot_indices is None else snapshot_indices.shape[1]
    values = (
        tokens, dim, batch, num_slots, state_len, known_pad(pad_slot_id, num_slots), snapshots, dim_blocks,
        *x.stride(), *conv_states.stride(), stride(cache_indices, 0), stride(has_initial_state, 0),
        stride(cache_seqlens, 0), stride(write_indices, 0), stride(snapshot_indices, 0), stride(snapshot_indices, 1),
        stride(num_computed_tokens, 0), stride(track_indices, 0), stride(track_lengths, 0),
    )  # fmt: skip
    constants = dict(
        WIDTH=width, LAYOUT=layout, APPLY_EMPTY=apply_empty, BLOCK=block, SEARCH=32 if batch < 32 else 128,
        BLOCK_D=config.block_d,
    )  # fmt: skip
    grid = (programs * dim_blocks, 1, 1)
    return Launch(_states_kernel, grid, values, constants, num_warps=config.num_warps)
