"""vLLM 0.33's two functions (`vllm/model_executor/layers/mamba/ops/causal_conv1d.py`).

    from triton_impl.compat.vllm import causal_conv1d_fn, causal_conv1d_update

Slot `null_block_id`, 0 unless told otherwise, is the null block: rows that name it are padding. So are rows whose
slot lies outside the pool, -1 among them, which vLLM would follow out of bounds. Padding rows and tokens past
`query_start_loc[-1]` come back as zeros; vLLM leaves them uninitialised or keeps x.
x stays in its own dtype; vLLM rounds it to the dtype of the states first.
"""

import torch

from oracle.contract import Unsupported
from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.api import causal_conv1d_update as packed_update
from triton_impl.api import causal_conv1d_update_
from triton_impl.compat.layout import (
    activation_name,
    expect,
    expect_integers,
    expect_rolling_states,
    expect_states,
    expect_weight,
    token_axes,
)

__all__ = ["NULL_BLOCK_ID", "PAD_SLOT_ID", "causal_conv1d_fn", "causal_conv1d_update"]

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
      validate_data: read the index data, which synchronises, and raise ValueError on bad values.

    Returns:
      A fresh [dim, tokens] tensor laid out as x, in x's dtype.

    Raises:
      ValueError, TypeError: bad shapes, dtypes or values.
      Unsupported: two padding slots inside the pool; a backward pass.
    """
    dim = expect("x", x, ("dim", "tokens"))[0]
    width = expect_weight(weight, dim)
    if conv_states is not None:
        expect_states("conv_states", conv_states, dim, width)
        if pad_slot_id != null_block_id and 0 <= pad_slot_id < conv_states.shape[0]:
            raise Unsupported(
                f"pad_slot_id: expected null_block_id={null_block_id} or a slot outside the pool, got {pad_slot_id}"
            )
    return packed_fn(
        x.t(), weight, bias, None if conv_states is None else conv_states.transpose(1, 2), query_start_loc,
        cache_indices, has_initial_state, activation=activation_name(activation), pad_slot_id=null_block_id,
        validate=bool(validate_data),
    ).out.t()  # fmt: skip


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
      weight, bias: [dim, width]; [dim] or None.
      activation: None, "silu", "swish", True or False.
      conv_state_indices: [batch] integer slots, or [batch, n], of which column 0 counts; None: row i uses slot i.
      num_accepted_tokens: [batch] integer, how many tokens of each row's previous step were accepted (0 counts as
        1), or None. With it the window begins in column count-1 of a slot that keeps all new tokens behind it;
        state_len >= width-1 + n-1 for rows of up to n tokens.
      query_start_loc: [batch+1]; every row then continues from its slot with its own number of tokens (without
        `num_accepted_tokens` vLLM stores too few columns for rows shorter than the longest).
      max_query_len: host bound of the longest row; used with `query_start_loc` only, where `num_accepted_tokens`
        needs it; -1 if unknown.
      null_block_id: the slot whose rows are padding.
      validate_data: read the index data, which synchronises, and raise ValueError on bad values.
      out: a tensor with x's shape and dtype that takes the result; x is then left alone.

    Returns:
      `out` if given, else x.

    Raises:
      ValueError, TypeError: bad shapes, dtypes or values.
      Unsupported: a backward pass.
    """
    if query_start_loc is None:
        dim = token_axes(x)
    else:
        dim = expect("x", x, ("tokens", "dim"))[1]
    width = expect_weight(weight, dim)
    expect_states("conv_state", conv_state, dim, width)
    if out is not None:
        expect(
            "out",
            out,
            tuple(f"axis {i}" for i in range(x.dim())),
            **{f"axis {i}": n for i, n in enumerate(x.shape)},
        )
        if out.dtype != x.dtype:
            raise TypeError(f"out: expected x's dtype {x.dtype}, got {out.dtype}")
    slots = conv_state_indices
    if isinstance(slots, torch.Tensor) and slots.dim() == 2:
        slots = slots[:, 0]
    batch = (
        x.shape[0]
        if query_start_loc is None
        else expect("query_start_loc", query_start_loc, ("batch+1",))[0] - 1
    )
    if batch >= 0:  # else query_start_loc is empty, which the operation refuses
        expect_integers("conv_state_indices", slots, batch)
    more = {}
    if query_start_loc is not None:
        more = dict(query_start_loc=query_start_loc, max_seqlen=max_query_len if max_query_len >= 0 else None)
    if num_accepted_tokens is not None:
        longest = max_query_len if query_start_loc is not None else 1 if x.dim() == 2 else x.shape[2]
        if longest < 0:
            raise ValueError(
                "max_query_len: expected the tokens of the longest row, since query_start_loc and num_accepted_tokens "
                f"are given, got {max_query_len}"
            )
        expect_integers("num_accepted_tokens", num_accepted_tokens, batch)
        expect_rolling_states("conv_state", conv_state, width, longest)
        more |= dict(num_accepted_tokens=num_accepted_tokens)
    states = conv_state.transpose(1, 2)
    activation, validate = activation_name(activation), bool(validate_data)
    tokens = x if x.dim() == 2 else x.transpose(1, 2)
    if out is None:
        causal_conv1d_update_(
            tokens, weight, bias, states, slots, activation, null_block_id, validate, **more
        )
        return x
    result = packed_update(
        tokens, weight, bias, states, slots, activation=activation, pad_slot_id=null_block_id, validate=validate, **more
    ).out  # fmt: skip
    return out.copy_(result if x.dim() == 2 else result.transpose(1, 2))
