"""Dense batches as packed rows of equal length."""

from typing import SupportsIndex

import torch
from torch import Tensor

from triton_impl.api import causal_conv1d_fn
from triton_impl.tracing import refuse_odd


def dense_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None = None,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    validate: bool = False,
) -> Tensor:
    """`causal_conv1d_fn` for x [batch, seqlen, dim], any strides; returns out with x's shape.

    Packing is a view unless rows are neither evenly spaced nor alone, as in a channel slice of a channel-first
    tensor: then x is copied once.
    """
    refuse_odd(("x",), (x,))
    batch, seqlen, dim = x.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * seqlen
    out = causal_conv1d_fn(
        x.reshape(batch * seqlen, dim),
        weight,
        bias,
        conv_states,
        starts,
        cache_indices,
        has_initial_state,
        activation=activation,
        pad_slot_id=pad_slot_id,
        max_seqlen=seqlen,
        validate=bool(validate),
    ).out
    return out.view(batch, seqlen, dim)
