"""The serving arguments written out token by token, on small integers, so that every sum is exact."""

import numpy as np


def brute_force(
    x, weight, bias, pool, starts, slots, *, has=None, pad_slot_id=-1, state_layout="front", cache_seqlens=None,
    write_indices=None, empty_rows="skip", snapshot_indices=None, snapshot_block_size=None,
    num_computed_tokens=None, track_indices=None, track_lengths=None, residual=None, channel_offset=None,
    split_sizes=None, num_accepted_tokens=None, window_out=None, window_indices=None, commit=True,
    tree_parents=None,
):  # fmt: skip
    """(out, pool, window_out) of packed rows, float64 in and out; `has` None: every row has a state."""
    dim, width = weight.shape
    history, offset = width - 1, channel_offset or 0
    x, old = x[:, offset : offset + dim], pool
    out = np.zeros(x.shape)
    pool = None if old is None else old.copy()
    windows = None if window_out is None else window_out.copy()
    for row in range(len(starts) - 1):
        a, b = starts[row], starts[row + 1]
        length, tokens = b - a, x[a:b]
        slot = row if slots is None else int(slots[row])
        stateful = has is None or bool(has[row])
        window = np.zeros((history, dim))
        if old is not None:
            num_slots, state_len, _ = old.shape
            valid = lambda s: s != pad_slot_id and 0 <= s < num_slots  # noqa: E731, B023
            if not valid(slot):
                continue
            seen = 0 if cache_seqlens is None else max(int(cache_seqlens[row]), 0)
            first = {"front": 0, "back": state_len - history, "ring": seen - history}[state_layout]
            if num_accepted_tokens is not None:
                first = min(max(int(num_accepted_tokens[row]), 1), state_len - history + 1) - 1
            if stateful:
                window = old[slot, [(first + j) % state_len for j in range(history)]]
        entries = np.concatenate([window, tokens])
        for t in range(length):
            chain = entries[t : t + width]
            if tree_parents is not None:
                chain, node = [], t
                while node >= 0 and len(chain) < width:
                    chain.append(tokens[node])
                    node = min(int(tree_parents[row][node]), node - 1)
                chain += list(window[::-1][: width - len(chain)])
                chain = np.array(chain[::-1]).reshape(width, dim)
            out[a + t] = (weight.T * chain).sum(0) + (0 if bias is None else bias)
            if residual is not None:
                out[a + t] += residual[a + t]
            buffer = row if window_indices is None else int(window_indices[row])
            if windows is not None and buffer != pad_slot_id and 0 <= buffer < len(windows):
                windows[buffer, t] = chain[1:]
        if old is None or not commit or (length == 0 and empty_rows == "skip"):
            continue
        target = slot if write_indices is None else int(write_indices[row])
        if valid(target):
            cells = pool[target]
            whole = old[slot].copy() if stateful else np.zeros_like(old[slot])
            if state_layout == "back":
                cells[:] = np.concatenate([whole, tokens])[length:]
            elif state_layout == "ring":
                for t in range(length):
                    whole[(seen + t) % state_len] = tokens[t]
                cells[:] = whole
            elif num_accepted_tokens is not None:
                kept = entries[1 : 1 + state_len] if history else []
                cells[: len(kept)] = kept
            else:
                cells[:history] = entries[length:]
        if track_indices is not None and valid(int(track_indices[row])):
            length_ = length if track_lengths is None else min(max(int(track_lengths[row]), 0), length)
            pool[track_indices[row], :history] = entries[length_ : length_ + history]
        if snapshot_indices is not None:
            before = 0 if num_computed_tokens is None else max(int(num_computed_tokens[row]), 0)
            for k, snapshot in enumerate(snapshot_indices[row]):
                p = (k + 1) * snapshot_block_size - before
                if 0 < p <= length and valid(int(snapshot)):
                    pool[snapshot, :history] = entries[p : p + history]
    if split_sizes is not None:
        out = tuple(np.split(out, np.cumsum(split_sizes)[:-1], axis=1))
    return out, pool, windows
