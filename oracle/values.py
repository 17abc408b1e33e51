"""Checks that read index data, for NumPy arrays; the rules are `contract.check_*_values`."""

from __future__ import annotations

from typing import Any

from oracle import contract
from oracle.numerics import typed


def check_fn_values(
    query_start_loc: Any,
    cache_indices: Any,
    tokens: int,
    num_slots: int | None,
    pad_slot_id: int,
    max_seqlen: int | None,
) -> None:
    """Raises ValueError for the first bad offset, row length or slot, naming row and value.

    Args:
      query_start_loc: [batch+1] integers.
      cache_indices: [batch] integers, or None for row i in slot i.
      tokens: length of x.
      num_slots: size of the pool, or None without one.
      pad_slot_id: the slot number of padding rows.
      max_seqlen: upper bound of the row lengths, or None.
    """
    contract.check_fn_values(
        typed(query_start_loc).data.tolist(),
        _integers(cache_indices),
        tokens,
        num_slots,
        pad_slot_id,
        max_seqlen,
    )


def check_update_values(
    cache_indices: Any,
    sizes: contract.UpdateSizes,
    pad_slot_id: int,
    query_start_loc: Any = None,
    num_accepted_tokens: Any = None,
    max_seqlen: int | None = None,
) -> None:
    """Raises ValueError for the first bad slot, offset or count, naming row and value.

    Args:
      cache_indices: [batch] integers, or None for row i in slot i.
      sizes: what `contract.check_causal_conv1d_update` returned.
      pad_slot_id: the slot number of padding rows.
      query_start_loc: [batch+1] integers, or None.
      num_accepted_tokens: [batch] integers, or None.
      max_seqlen: upper bound of the row lengths, or None.
    """
    contract.check_update_values(
        _integers(cache_indices), sizes, pad_slot_id,
        _integers(query_start_loc), _integers(num_accepted_tokens), max_seqlen,
    )  # fmt: skip


def _integers(array: Any) -> list[int] | None:
    if array is None:
        return None
    return typed(array).data.tolist()
