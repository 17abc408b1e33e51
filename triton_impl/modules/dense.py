"""Dense batches as packed rows of equal length."""

import torch

from triton_impl.api import causal_conv1d_fn


def dense_rows(
    x,
    weight,
    bias,
    conv_states=None,
    cache_indices=None,
    has_initial_state=None,
    *,
    activation=None,
    pad_slot_id=-1,
    validate=False,
):
    """`causal_conv1d_fn` for x [batch, seqlen, dim], any strides; returns out with x's shape.

    Packing is a view unless rows are neither evenly spaced nor alone, as in a channel slice of a channel-first
    tensor: then x is copied once.
    """
    batch, seqlen, dim = x.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seqlen
    out = causal_conv1d_fn(
        x.reshape(batch * seqlen, dim), weight, bias, conv_states, starts, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=seqlen, validate=bool(validate),
    ).out  # fmt: skip
    return out.view(batch, seqlen, dim)
