"""Where a call may write, apart from `out`: said again, so that the judge does not lean on the reference alone."""

from __future__ import annotations

import numpy as np

from oracle.conformance.inputs import Problem


def may_change(problem: Problem, name: str) -> np.ndarray:
    """A bool array in the shape of `conv_states` or `window_out`: True where the call may write.

    With hostile offsets, whatever live rows name; of a rolling slot then all.
    """
    changed = np.zeros(problem.arrays[name].shape, dtype=bool)
    if problem.op == "commit_windows":
        steps = _integers(problem, "accepted_steps")
        history = problem.arrays["window_out"].shape[2]
        for row, (slot, step) in enumerate(zip(_slots(problem, len(steps)), steps, strict=True)):
            buffer = _integers(problem, "window_indices", range(len(steps)))[row]
            if _names(problem, slot) and step >= 0 and buffer != _pad(problem):
                changed[slot, :history] = True
        return changed
    lengths, trusted = _lengths(problem)
    apply = problem.options.get("empty_rows") == "apply"
    slots = _slots(problem, len(lengths))
    history = problem.arrays["weight"].shape[1] - 1
    for row, length in enumerate(lengths):
        if not _names(problem, slots[row]) or not (length or apply):
            continue
        if name == "window_out":
            buffer = _integers(problem, "window_indices", range(len(lengths)))[row]
            if buffer != _pad(problem) and 0 <= buffer < changed.shape[0]:
                changed[buffer, :length] = True
        elif problem.options.get("commit", True):
            target = _integers(problem, "write_indices", slots)[row]
            if _names(problem, target):
                changed[target, : _columns(problem, history, length)] = True
            for slot in _further(problem, row, length, trusted):
                if _names(problem, slot):
                    changed[slot, :history] = True
    return changed


def _columns(problem: Problem, history: int, length: int) -> int:
    if problem.options.get("state_layout", "front") != "front":
        return problem.arrays["conv_states"].shape[1]
    if problem.arrays.get("num_accepted_tokens") is None:
        return history
    return history - 1 + length if history else 0


def _further(problem: Problem, row: int, length: int, trusted: bool) -> list[int]:
    """The slots of a row's snapshots and of its tracked window."""
    blocks, found = _integers(problem, "snapshot_indices"), []
    if blocks is not None:
        size = problem.options["snapshot_block_size"]
        before = max(_integers(problem, "num_computed_tokens", [0] * len(blocks))[row], 0)
        ends = [size * (k + 1) for k in range(len(blocks[row]))]
        found = [
            b
            for b, end in zip(blocks[row], ends, strict=True)
            if not trusted or before < end <= before + length
        ]
    tracks = _integers(problem, "track_indices")
    return found + ([] if tracks is None else [tracks[row]])


def _lengths(problem: Problem) -> tuple[list[int], bool]:
    """Tokens of the rows, and whether the offsets keep their promises; if not, any row may have all tokens."""
    x = problem.arrays.get("x") or problem.arrays["bcx"]
    if problem.arrays.get("query_start_loc") is None:
        return [1 if len(x.shape) == 2 else x.shape[1]] * x.shape[0], True
    offsets = problem.arrays["query_start_loc"].data.astype(np.int64)
    lengths = np.diff(offsets).tolist()
    if offsets[0] != 0 or min(lengths, default=0) < 0 or offsets.max() > x.shape[0]:
        return [x.shape[0]] * len(lengths), False
    return lengths, True


def _slots(problem: Problem, batch: int):
    return _integers(problem, "cache_indices", range(batch))


def _names(problem: Problem, slot: int) -> bool:
    return slot != _pad(problem) and 0 <= slot < problem.arrays["conv_states"].shape[0]


def _pad(problem: Problem) -> int:
    return problem.options.get("pad_slot_id", -1)


def _integers(problem: Problem, name: str, default=None):
    array = problem.arrays.get(name)
    return default if array is None else array.data.tolist()
