"""aiter's Triton functions (`aiter.ops.triton.conv`, September 2026): SGLang's, but a decode step is in place on x.

    from triton_impl.compat.aiter import causal_conv1d_fn, causal_conv1d_update

What `triton_impl.compat.sglang` says of padding, long index tensors and errors holds here.
"""

import torch

from oracle.contract import Unsupported
from triton_impl.compat import sglang, vllm

__all__ = ["PAD_SLOT_ID", "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_update_single_token"]

PAD_SLOT_ID = -1


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    seq_lens_cpu,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=PAD_SLOT_ID,
    validate_data=False,
    **kwargs,
):
    """As `triton_impl.compat.sglang.causal_conv1d_fn_triton`; other keywords are ignored, as in aiter."""
    rows = conv_states, query_start_loc, seq_lens_cpu, cache_indices, has_initial_state
    return sglang.causal_conv1d_fn_triton(x, weight, bias, *rows, activation, pad_slot_id)


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
    num_accepted_tokens=None,
    intermediate_conv_window=None,
    pad_slot_id=PAD_SLOT_ID,
    metadata=None,
    validate_data=False,
):
    """As `triton_impl.compat.sglang.causal_conv1d_update_triton`, but the result overwrites x, which is returned.

    `intermediate_conv_window` [num_slots, steps, dim, width-1] has its buffers by slot, not by row.
    """
    rows = cache_seqlens, conv_state_indices, num_accepted_tokens, intermediate_conv_window
    window = None if intermediate_conv_window is None else conv_state_indices
    out = sglang.causal_conv1d_update_triton(
        x, conv_state, weight, bias, activation, *rows, window, pad_slot_id=pad_slot_id
    )
    return x.copy_(out)


def causal_conv1d_update_single_token(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    conv_state_indices=None,
    num_accepted_tokens=None,
    query_start_loc=None,
    max_query_len=-1,
    pad_slot_id=PAD_SLOT_ID,
    block_idx_last_scheduled_token=None,
    initial_state_idx=None,
    validate_data=False,
):
    """As `triton_impl.compat.vllm.causal_conv1d_update_blocks` for rows of one token, in place on x."""
    if num_accepted_tokens is not None or query_start_loc is not None:
        raise Unsupported("num_accepted_tokens, query_start_loc: expected None for rows of one token")
    if isinstance(x, torch.Tensor) and x.dim() == 3 and x.shape[2] != 1:
        raise ValueError(f"x: expected shape [batch, dim] or [batch, dim, 1], got {list(x.shape)}")
    blocks = block_idx_last_scheduled_token, initial_state_idx
    return vllm.causal_conv1d_update_blocks(
        x, conv_state, weight, bias, activation, conv_state_indices, None, None, -1, pad_slot_id, *blocks
    )
