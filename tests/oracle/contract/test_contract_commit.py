"""Checks of `commit_windows`: what passes, and for each error its exact type and text."""

import pytest

from oracle.contract import CommitSizes
from tests.tools.contract_calls import (
    COMMIT_SIZES,
    DTYPES,
    F32,
    HOST,
    I32,
    INDEX,
    a,
    accepts,
    name_rows,
    rejects,
)

ACCEPTED = [
    ("commit", {}, COMMIT_SIZES),
    ("commit", dict(cache_indices=None, window_indices=None), COMMIT_SIZES),
    ("commit", dict(cache_indices=None, conv_states=a(5, 5, 64)), CommitSizes(5, 5, 5, 6, 4, 3, 64)),
    ("commit", dict(window_indices=None, window_out=a(5, 4, 3, 64)), CommitSizes(5, 8, 5, 5, 4, 3, 64)),
    (
        "commit",
        dict(conv_states=a(8, 3, 64, dtype=F32), window_out=a(0, 0, 3, 64)),
        CommitSizes(5, 8, 3, 0, 0, 3, 64),
    ),
    (
        "commit",
        dict(window_out=a(6, 4, 0, 64), pad_slot_id=0, validate=True),
        CommitSizes(5, 8, 5, 6, 4, 0, 64),
    ),
    ("commit_values", {}, None),
    ("commit_values", dict(cache_indices=None, window_indices=None), None),
    ("commit_values", dict(cache_indices=[4, -1, 4], accepted_steps=[0, 9, -7]), None),
    ("commit_values", dict(window_indices=[5, 5, -1]), None),
]

REJECTED = [
    # commit_windows
    (
        "commit",
        dict(window_out=a(6, 3, 64)),
        ValueError,
        "window_out: expected shape [buffers, steps, width-1, dim], got [6, 3, 64]",
    ),
    ("commit", dict(window_out=a(6, 4, 3, 64, dtype=I32)), TypeError, f"window_out: {DTYPES}, got int32"),
    (
        "commit",
        dict(conv_states=a(8, 5, 63)),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim=64], got [8, 5, 63]",
    ),
    (
        "commit",
        dict(conv_states=a(8, 2, 64)),
        ValueError,
        "conv_states: expected state_len >= width-1 = 3 on axis 1, got 2",
    ),
    (
        "commit",
        dict(accepted_steps=a(5, 1, dtype=I32)),
        ValueError,
        "accepted_steps: expected shape [batch], got [5, 1]",
    ),
    ("commit", dict(accepted_steps=a(5, dtype=F32)), TypeError, f"accepted_steps: {INDEX}, got float32"),
    (
        "commit",
        dict(cache_indices=a(4, dtype=I32)),
        ValueError,
        "cache_indices: expected shape [batch=5], got [4]",
    ),
    (
        "commit",
        dict(cache_indices=None, conv_states=a(4, 3, 64)),
        ValueError,
        "conv_states: expected num_slots >= batch = 5, since cache_indices is None, got 4",
    ),
    (
        "commit",
        dict(window_indices=a(4, dtype=I32)),
        ValueError,
        "window_indices: expected shape [batch=5], got [4]",
    ),
    (
        "commit",
        dict(window_indices=None, window_out=a(4, 4, 3, 64)),
        ValueError,
        "window_out: expected buffers >= batch = 5, since window_indices is None, got 4",
    ),
    ("commit", dict(pad_slot_id=None), TypeError, f"pad_slot_id: {HOST}, got None"),
    ("commit", dict(validate=1), TypeError, "validate: expected True or False, got 1"),
    (
        "commit_values",
        dict(accepted_steps=[0, 2, 0]),
        ValueError,
        "accepted_steps: expected less than 2 steps in row 1, got 2",
    ),
    (
        "commit_values",
        dict(cache_indices=[4, 0, 4]),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 4 in rows 0 and 2",
    ),
    (
        "commit_values",
        dict(cache_indices=[4, 0, 5]),
        ValueError,
        "cache_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 2, got 5",
    ),
    (
        "commit_values",
        dict(window_indices=[0, 1, 6]),
        ValueError,
        "window_indices: expected pad_slot_id=-1 or a buffer in [0, 6) in row 2, got 6",
    ),
]


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)
