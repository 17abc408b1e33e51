"""Checks that read index data, for NumPy arrays; the rules are `contract.check_*_values`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oracle import contract
from oracle.numerics import typed


def check_call(op: str, arguments: Mapping[str, Any], sizes: Any) -> None:
    """Raises ValueError for the first bad offset, slot, count or buffer of a call, naming row and value.

    Args:
      op: "causal_conv1d_fn" or "causal_conv1d_update".
      arguments: the call's arguments by name.
      sizes: what `contract.check_<op>` returned for them.
    """
    given = {name: _on_host(value) for name, value in arguments.items() if name in _INDICES}
    pad_slot_id, max_seqlen = arguments.get("pad_slot_id", -1), arguments.get("max_seqlen")
    if op == "causal_conv1d_fn":
        num_slots = None if arguments.get("conv_states") is None else sizes.num_slots
        offsets, slots = given.pop("query_start_loc"), given.pop("cache_indices", None)
        contract.check_fn_values(
            offsets, slots, sizes.tokens, num_slots, pad_slot_id, max_seqlen, **given,
            empty_rows=arguments.get("empty_rows", "skip"),
            snapshot_block_size=arguments.get("snapshot_block_size") or 1,
        )  # fmt: skip
        return
    windows = arguments.get("window_out")
    slots = given.pop("cache_indices", None)
    contract.check_update_values(
        slots, sizes, pad_slot_id, max_seqlen=max_seqlen, **given,
        num_buffers=None if windows is None else windows.shape[0], commit=arguments.get("commit", True),
    )  # fmt: skip


def check_commit_values(
    accepted_steps: Any,
    cache_indices: Any,
    window_indices: Any,
    sizes: contract.CommitSizes,
    pad_slot_id: int,
) -> None:
    """Raises ValueError for the first bad step, slot or buffer of a commit, naming row and value."""
    contract.check_commit_values(
        _on_host(accepted_steps), _on_host(cache_indices), _on_host(window_indices), sizes, pad_slot_id
    )


_INDICES = frozenset((
    "query_start_loc", "cache_indices", "has_initial_state", "num_accepted_tokens", "cache_seqlens",
    "write_indices", "snapshot_indices", "num_computed_tokens", "track_indices", "track_lengths",
    "window_indices", "tree_parents",
))  # fmt: skip


def _on_host(array: Any) -> Any:
    return None if array is None else typed(array).data.tolist()
