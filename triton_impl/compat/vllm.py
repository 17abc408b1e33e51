"""vLLM 0.33's two functions (`vllm/model_executor/layers/mamba/ops/causal_conv1d.py`), and those of 0.20 to 0.32.

    from triton_impl.compat.vllm import causal_conv1d_fn, causal_conv1d_update

`causal_conv1d_fn_blocks` and `causal_conv1d_update_blocks` take the block arguments that 0.33 dropped.

Slot `null_block_id`, 0 unless told otherwise, is the null block: rows that name it are padding. So are rows whose
slot lies outside the pool, -1 among them, which vLLM would follow out of bounds. Padding rows and tokens past
`query_start_loc[-1]` come back as zeros; vLLM leaves them uninitialised or keeps x. Index tensors may be longer than
the batch, whose first entries count; the batch of packed rows is the shorter of offsets and slots.
x stays in its own dtype; vLLM rounds it to the dtype of the states first. `validate_data` changes nothing: shapes are
checked in any case, every layout works, and data is checked within `triton_impl.compat.validated()` alone.
Bad shapes and values raise ValueError, dtypes TypeError, a backward pass Unsupported.
"""

import torch

from oracle.contract import Unsupported
from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.api import causal_conv1d_update as packed_update
from triton_impl.call import update_in_place
from triton_impl.compat.layout import (
    activation_name,
    expect,
    expect_rolling_states,
    expect_states,
    expect_weight,
    leading,
    leading_rows,
    token_axes,
    token_major,
    validates,
)

__all__ = [
    "NULL_BLOCK_ID",
    "PAD_SLOT_ID",
    "causal_conv1d_fn",
    "causal_conv1d_fn_blocks",
    "causal_conv1d_update",
    "causal_conv1d_update_blocks",
]

PAD_SLOT_ID = -1
NULL_BLOCK_ID = 0


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=PAD_SLOT_ID,
    null_block_id=NULL_BLOCK_ID,
    metadata=None,
    validate_data=False,
):
    """Packed prefill.

    Args:
      x: [dim, tokens], any strides; not written.
      weight, bias: [dim, width]; [dim] or None.
      conv_states: [num_slots, dim, state_len], any strides, window in front, updated in place.
      query_start_loc: [batch+1] int32 or int64.
      cache_indices: [batch] integer slots, or None: row i uses slot i (row 0 then names the null block).
      has_initial_state: [batch] bool, or None: no row has a state.
      activation: None, "silu", "swish", True or False.
      pad_slot_id: a slot outside the pool (all of those are padding), or the null block; another slot is refused.
      null_block_id: the slot whose rows are padding.
      metadata: not needed and not read: it holds vLLM's list of blocks, which the flat schedule finds on the device.

    Returns:
      A fresh [dim, tokens] tensor laid out as x, in x's dtype.

    Raises:
      Unsupported: two padding slots inside the pool; a backward pass.
    """
    rows = leading_rows(
        query_start_loc, cache_indices, "cache_indices", ("has_initial_state", has_initial_state)
    )
    return _prefill(x, weight, bias, conv_states, rows, activation, pad_slot_id, null_block_id)


def causal_conv1d_fn_blocks(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=PAD_SLOT_ID,
    null_block_id=NULL_BLOCK_ID,
    block_idx_first_scheduled_token=None,
    block_idx_last_scheduled_token=None,
    initial_state_idx=None,
    num_computed_tokens=None,
    block_size_to_align=0,
    metadata=None,
    validate_data=False,
):
    """`causal_conv1d_fn` of vLLM 0.20 to 0.32, whose rows may have a slot for every block of their sequence.

    Args:
      cache_indices: [batch, blocks] integer slots with the block arguments, [batch] without.
      block_idx_first_scheduled_token: not needed: it follows from the counts.
      block_idx_last_scheduled_token: [batch] integer, the block that takes the new state; None: no blocks.
      initial_state_idx: [batch] integer, the block that holds the old one.
      num_computed_tokens: [batch] integer, tokens of each sequence before this call.
      block_size_to_align: tokens of a block. The window at the end of every block that the call completes goes to
        the slot of that block (also where vLLM took the wrong entries: closer than width-1 to the first new token).
      others: as in `causal_conv1d_fn`.
    """
    options = activation, pad_slot_id, null_block_id
    if block_idx_last_scheduled_token is None:
        rows = query_start_loc, cache_indices, has_initial_state
        return causal_conv1d_fn(x, weight, bias, conv_states, *rows, *options)
    expect("cache_indices", cache_indices, ("batch", "blocks"))
    starts, read, write, has, computed = leading_rows(
        query_start_loc,
        _block(cache_indices, "initial_state_idx", initial_state_idx),
        "cache_indices",
        (
            "block_idx_last_scheduled_token",
            _block(cache_indices, "block_idx_last_scheduled_token", block_idx_last_scheduled_token),
        ),
        ("has_initial_state", has_initial_state),
        ("num_computed_tokens", num_computed_tokens),
    )
    blocks = dict(
        write_indices=write,
        snapshot_indices=cache_indices[: read.shape[0]],
        snapshot_block_size=block_size_to_align,
        num_computed_tokens=computed,
    )
    return _prefill(x, weight, bias, conv_states, (starts, read, has), *options, **blocks)


def _prefill(x, weight, bias, conv_states, rows, activation, pad_slot_id, null_block_id, **blocks):
    dim = expect("x", x, ("dim", "tokens"))[0]
    width = expect_weight(weight, dim)
    if conv_states is not None:
        expect_states("conv_states", conv_states, dim, width)
        if pad_slot_id != null_block_id and 0 <= pad_slot_id < conv_states.shape[0]:
            raise Unsupported(
                f"pad_slot_id: expected null_block_id={null_block_id} or a slot outside the pool, got {pad_slot_id}"
            )
    return packed_fn(
        x.t(),
        weight,
        bias,
        token_major(conv_states),
        *rows,
        activation=activation_name(activation),
        pad_slot_id=null_block_id,
        validate=validates(),
        **blocks,
    ).out.t()


def _block(table, name, blocks):
    """The slots [batch] of one block a row, of a table [batch, blocks]; nothing is read on the host."""
    rows = min(table.shape[0], expect(name, blocks, ("batch",))[0])
    return table[:rows].gather(1, blocks[:rows, None].long().clamp(0, table.shape[1] - 1))[:, 0]


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    conv_state_indices=None,
    num_accepted_tokens=None,
    query_start_loc=None,
    max_query_len=-1,
    null_block_id=NULL_BLOCK_ID,
    validate_data=False,
    out=None,
):
    """Decode step. As in vLLM the result overwrites x unless `out` is given, here whatever the dtypes are.

    Args:
      x: [batch, dim], [batch, dim, seqlen], or, with `query_start_loc`, [tokens, dim]; any strides.
      conv_state: [num_slots, dim, state_len], any strides, window in front, updated in place.
      weight, bias, activation, null_block_id: as in `causal_conv1d_fn`.
      conv_state_indices: [batch] integer slots, or [batch, n], of which column 0 counts; None: row i uses slot i.
      num_accepted_tokens: [batch] integer, how many tokens of each row's previous step were accepted (0 counts as
        1), or None. With it the window begins in column count-1 of a slot that keeps all new tokens behind it;
        state_len >= width-1 + n-1 for rows of up to n tokens.
      query_start_loc: [batch+1]; every row then continues from its slot with its own number of tokens (without
        `num_accepted_tokens` vLLM stores too few columns for rows shorter than the longest).
      max_query_len: host bound of the longest row; used with `query_start_loc` only, where `num_accepted_tokens`
        needs it; -1 if unknown.
      out: a tensor with x's shape and dtype that takes the result; x is then left alone.

    Returns:
      `out` if given, else x.
    """
    slots = conv_state_indices
    if isinstance(slots, torch.Tensor) and slots.dim() == 2:
        slots = slots[:, 0]
    rows = query_start_loc, slots, num_accepted_tokens
    return _step(x, conv_state, weight, bias, activation, rows, max_query_len, null_block_id, out)


def causal_conv1d_update_blocks(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    conv_state_indices=None,
    num_accepted_tokens=None,
    query_start_loc=None,
    max_query_len=-1,
    null_block_id=NULL_BLOCK_ID,
    block_idx_last_scheduled_token=None,
    initial_state_idx=None,
    validate_data=False,
    out=None,
):
    """`causal_conv1d_update` of vLLM 0.20 to 0.32 (`out` since 0.28), with the blocks of `causal_conv1d_fn_blocks`."""
    rows = query_start_loc, conv_state_indices, num_accepted_tokens
    options = max_query_len, null_block_id
    if block_idx_last_scheduled_token is None:
        return causal_conv1d_update(
            x, conv_state, weight, bias, activation, rows[1], rows[2], rows[0], *options, out=out
        )
    expect("conv_state_indices", conv_state_indices, ("batch", "blocks"))
    write = _block(conv_state_indices, "block_idx_last_scheduled_token", block_idx_last_scheduled_token)
    rows = query_start_loc, _block(conv_state_indices, "initial_state_idx", initial_state_idx), rows[2], write
    return _step(x, conv_state, weight, bias, activation, rows, *options, out)


def _step(x, conv_state, weight, bias, activation, rows, max_query_len, null_block_id, out):
    """`rows` are offsets, slots, counts and, if the new state goes elsewhere, its slots."""
    starts, slots, counts, *write = rows
    packed = starts is not None
    dim = expect("x", x, ("tokens", "dim"))[1] if packed else token_axes(x)
    width = expect_weight(weight, dim)
    expect_states("conv_state", conv_state, dim, width)
    if out is not None:
        axes = tuple(f"axis {i}" for i in range(x.dim()))
        expect("out", out, axes, **dict(zip(axes, x.shape, strict=True)))
        if out.dtype != x.dtype:
            raise TypeError(f"out: expected x's dtype {x.dtype}, got {out.dtype}")
    named = [("num_accepted_tokens", counts), *[("block_idx_last_scheduled_token", w) for w in write]]
    more = {}
    if packed:
        starts, slots, counts, *write = leading_rows(starts, slots, "conv_state_indices", *named)
        more = dict(query_start_loc=starts, max_seqlen=max_query_len if max_query_len >= 0 else None)
    else:
        slots = leading("conv_state_indices", slots, x.shape[0])
        counts, *write = [leading(name, values, x.shape[0]) for name, values in named]
    if write:
        more |= dict(write_indices=write[0])
    if counts is not None:
        longest = max_query_len if packed else 1 if x.dim() == 2 else x.shape[2]
        if longest < 0:
            raise ValueError(
                "max_query_len: expected the tokens of the longest row, since query_start_loc and num_accepted_tokens "
                f"are given, got {max_query_len}"
            )
        expect_rolling_states("conv_state", conv_state, width, longest)
        more |= dict(num_accepted_tokens=counts)
    arguments = token_major(x), weight, bias, token_major(conv_state), slots
    activation, validate = activation_name(activation), validates()
    if out is None and not write:
        update_in_place(
            *arguments, activation=activation, pad_slot_id=null_block_id, validate=validate, **more
        )
        return x
    result = packed_update(
        *arguments, activation=activation, pad_slot_id=null_block_id, validate=validate, **more
    ).out
    return (x if out is None else out).copy_(token_major(result))
