"""Checks of `causal_conv1d_update`: what passes, and for each error its exact type and text."""

import numpy as np
import pytest

from oracle.contract import UpdateSizes
from tests.tools.contract_calls import (
    BOTH_ACCEPTED,
    BOTH_REJECTED,
    COUNTS,
    DTYPES,
    F32,
    HOST,
    I32,
    I64,
    INDEX,
    PACKED,
    PACKED_VALUES,
    RING,
    ROLLING,
    ROW_I32,
    TREE,
    UPDATE_SIZES,
    WINDOWS,
    a,
    accepts,
    name_rows,
    rejects,
)

ACCEPTED = [
    *(("update", more, UPDATE_SIZES) for more in BOTH_ACCEPTED),
    ("update", dict(x=a(5, 80), channel_offset=16), UPDATE_SIZES),
    (
        "update",
        dict(x=a(5, 2, 80), channel_offset=3, residual=a(5, 2, 64)),
        UpdateSizes(5, 2, 64, 4, 8, 3, 10),
    ),
    (
        "update",
        PACKED | dict(x=a(9, 80), channel_offset=3, residual=a(9, 64)),
        UpdateSizes(5, None, 64, 4, 8, 3, 9),
    ),
    ("update", dict(residual=a(5, 64)), UPDATE_SIZES),
    ("update", WINDOWS, UPDATE_SIZES),
    ("update", WINDOWS | dict(commit=False), UPDATE_SIZES),
    ("update", dict(commit=False), UPDATE_SIZES),
    ("update", RING | WINDOWS | dict(commit=False), UPDATE_SIZES),
    ("update", dict(window_out=a(0, 9, 3, 64), window_indices=ROW_I32), UPDATE_SIZES),
    ("update", dict(x=a(5, 2, 64), window_out=a(7, 2, 3, 64)), UpdateSizes(5, 2, 64, 4, 8, 3, 10)),
    ("update", PACKED | dict(max_seqlen=4, window_out=a(5, 4, 3, 64)), UpdateSizes(5, None, 64, 4, 8, 3, 9)),
    (
        "update",
        dict(weight=a(64, 1), window_out=a(5, 1, 0, 64, dtype=F32)),
        UpdateSizes(5, 1, 64, 1, 8, 3, 5),
    ),
    (
        "update",
        ROLLING | dict(write_indices=ROW_I32, track_indices=ROW_I32),
        UpdateSizes(5, None, 64, 4, 8, 6, 9),
    ),
    ("update", TREE, UpdateSizes(5, 2, 64, 4, 8, 3, 10)),
    ("update", TREE | RING | dict(window_out=a(5, 2, 3, 64)), UpdateSizes(5, 2, 64, 4, 8, 3, 10)),
    ("update", {}, UpdateSizes(5, 1, 64, 4, 8, 3, 5)),
    ("update", dict(x=a(5, 2, 64)), UpdateSizes(5, 2, 64, 4, 8, 3, 10)),
    ("update", dict(x=a(5, 0, 64)), UpdateSizes(5, 0, 64, 4, 8, 3, 0)),
    ("update", dict(x=a(0, 64), cache_indices=a(0, dtype=I64)), UpdateSizes(0, 1, 64, 4, 8, 3, 0)),
    ("update", dict(bias=None, cache_indices=None), UpdateSizes(5, 1, 64, 4, 8, 3, 5)),
    ("update", dict(cache_indices=None, conv_states=a(5, 3, 64)), UpdateSizes(5, 1, 64, 4, 5, 3, 5)),
    (
        "update",
        dict(x=a(5, 1), weight=a(1, 4), bias=a(1), conv_states=a(8, 3, 1)),
        UpdateSizes(5, 1, 1, 4, 8, 3, 5),
    ),
    (
        "update",
        dict(x=a(5, 2, 1), weight=a(1, 4), bias=a(1), conv_states=a(8, 3, 1)),
        UpdateSizes(5, 2, 1, 4, 8, 3, 10),
    ),
    ("update", dict(activation="silu", validate=True, pad_slot_id=0), UpdateSizes(5, 1, 64, 4, 8, 3, 5)),
    ("update", PACKED, UpdateSizes(5, None, 64, 4, 8, 3, 9)),
    (
        "update",
        PACKED | dict(query_start_loc=a(6, dtype=I64), max_seqlen=0),
        UpdateSizes(5, None, 64, 4, 8, 3, 9),
    ),
    (
        "update",
        PACKED | dict(query_start_loc=a(1, dtype=I32), cache_indices=a(0, dtype=I32)),
        UpdateSizes(0, None, 64, 4, 8, 3, 9),
    ),
    ("update", PACKED | dict(x=a(0, 64)), UpdateSizes(5, None, 64, 4, 8, 3, 0)),
    (
        "update",
        PACKED | dict(x=a(9, 1), weight=a(1, 4), bias=a(1), conv_states=a(8, 3, 1)),
        UpdateSizes(5, None, 1, 4, 8, 3, 9),
    ),
    ("update", COUNTS, UpdateSizes(5, 1, 64, 4, 8, 3, 5)),
    ("update", COUNTS | dict(x=a(5, 4, 64), conv_states=a(8, 6, 64)), UpdateSizes(5, 4, 64, 4, 8, 6, 20)),
    ("update", COUNTS | dict(x=a(5, 0, 64)), UpdateSizes(5, 0, 64, 4, 8, 3, 0)),
    ("update", ROLLING, UpdateSizes(5, None, 64, 4, 8, 6, 9)),
    (
        "update",
        ROLLING | dict(max_seqlen=np.int64(0), conv_states=a(8, 3, 64)),
        UpdateSizes(5, None, 64, 4, 8, 3, 9),
    ),
    (
        "update",
        ROLLING | dict(weight=a(64, 1), conv_states=a(8, 0, 64)),
        UpdateSizes(5, None, 64, 1, 8, 0, 9),
    ),
    (
        "update",
        ROLLING | dict(weight=a(64, 2), conv_states=a(8, 4, 64)),
        UpdateSizes(5, None, 64, 2, 8, 4, 9),
    ),
    ("update", ROLLING | dict(num_accepted_tokens=a(5, dtype="uint8")), UpdateSizes(5, None, 64, 4, 8, 6, 9)),
    # Base: rows of one token in slots 4, 0, 2 of 5.
    ("update_values", dict(write_indices=[1, -1, 3]), None),
    ("update_values", dict(write_indices=[4, 0, 2]), None),
    ("update_values", dict(cache_indices=[4, 4, 4], write_indices=[0, 1, 2]), None),
    ("update_values", dict(cache_indices=[4, 4, 4], commit=False), None),
    (
        "update_values",
        dict(cache_indices=[4, -1, 2], write_indices=[4, 4, 2], track_indices=[1, 1, -1]),
        None,
    ),
    ("update_values", dict(track_indices=[1, 3, -1]), None),
    ("update_values", dict(cache_seqlens=[0, 5, 7]), None),
    (
        "update_values",
        PACKED_VALUES | dict(cache_indices=None, cache_seqlens=[0, -5, 7], track_indices=[3, 99, 4]),
        None,
    ),
    ("update_values", dict(num_buffers=3), None),
    ("update_values", dict(num_buffers=2, window_indices=[1, -1, 0]), None),
    ("update_values", dict(num_buffers=2, window_indices=[-1, -1, 0]), None),
    ("update_values", dict(num_buffers=2, window_indices=[1, 1, 0], cache_indices=[-1, 0, 2]), None),
    (
        "update_values",
        PACKED_VALUES | dict(cache_indices=None, num_buffers=2, window_indices=[1, 1, 0]),
        None,
    ),
    (
        "update_values",
        dict(
            sizes=UpdateSizes(3, 3, 64, 4, 5, 3, 9),
            commit=False,
            tree_parents=[[-1, 0, 0], [-1, -9, 1], [-1, 0, 1]],
        ),
        None,
    ),
    (
        "update_values",
        dict(
            sizes=UpdateSizes(3, 3, 64, 4, 5, 3, 9),
            commit=False,
            cache_indices=[-1, 0, 2],
            tree_parents=[[7, 7, 7], [-1, 0, 1], [-1, 0, 1]],
        ),
        None,
    ),
    ("update_values", {}, None),
    ("update_values", dict(cache_indices=None), None),
    ("update_values", dict(cache_indices=[-1, 0, -1]), None),
    ("update_values", dict(cache_indices=[3, 3, 3], sizes=UpdateSizes(3, 0, 64, 4, 5, 3, 0)), None),
    # Packed: lengths 2, 0, 4 of 7 tokens in slots of 6 columns, which hold counts up to 4.
    ("update_values", PACKED_VALUES, None),
    ("update_values", PACKED_VALUES | dict(max_seqlen=4, num_accepted_tokens=[1, 0, 4]), None),
    ("update_values", PACKED_VALUES | dict(cache_indices=[2, 2, 0]), None),
    ("update_values", PACKED_VALUES | dict(cache_indices=[2, 2, -1], num_accepted_tokens=[4, 9, 5]), None),
    (
        "update_values",
        PACKED_VALUES | dict(cache_indices=[2, 2, 7], num_accepted_tokens=[4, 9, 5], pad_slot_id=7),
        None,
    ),
    ("update_values", PACKED_VALUES | dict(cache_indices=None, num_accepted_tokens=[1, 9, 1]), None),
    (
        "update_values",
        PACKED_VALUES | dict(cache_indices=None, num_accepted_tokens=[1, 9, 9], pad_slot_id=2),
        None,
    ),
    ("update_values", dict(num_accepted_tokens=[1, 1, 1]), None),
    (
        "update_values",
        dict(num_accepted_tokens=[0, 9, 9], sizes=UpdateSizes(3, 0, 64, 4, 5, 3, 0)),
        None,
    ),
]

REJECTED = [
    *(("update", *row) for row in BOTH_REJECTED),
    (
        "update",
        dict(x=a(5, 64, 2)),
        ValueError,
        "x: expected dim=64, as the weight has, on the last axis, got [5, 64, 2] (transposed?)",
    ),
    (
        "update",
        COUNTS | dict(state_layout="back"),
        ValueError,
        "state_layout: expected 'front', since num_accepted_tokens is given, got 'back'",
    ),
    (
        "update",
        COUNTS | RING,
        ValueError,
        "state_layout: expected 'front', since num_accepted_tokens is given, got 'ring'",
    ),
    (
        "update",
        dict(residual=a(5, 1, 64)),
        ValueError,
        "residual: expected shape [tokens=5, dim=64], got [5, 1, 64]",
    ),
    (
        "update",
        dict(x=a(5, 2, 64), residual=a(10, 64)),
        ValueError,
        "residual: expected shape [batch=5, seqlen=2, dim=64], got [10, 64]",
    ),
    ("update", dict(residual=a(5, 64, dtype="float64")), TypeError, f"residual: {DTYPES}, got float64"),
    # windows per step
    (
        "update",
        dict(window_indices=ROW_I32),
        ValueError,
        "window_indices: expected None, since window_out is None",
    ),
    (
        "update",
        dict(window_out=a(5, 3, 64)),
        ValueError,
        "window_out: expected shape [buffers, steps, width-1=3, dim=64], got [5, 3, 64]",
    ),
    (
        "update",
        dict(window_out=a(5, 1, 4, 64)),
        ValueError,
        "window_out: expected shape [buffers, steps, width-1=3, dim=64], got [5, 1, 4, 64]",
    ),
    ("update", dict(window_out=a(5, 1, 3, 64, dtype=I32)), TypeError, f"window_out: {DTYPES}, got int32"),
    (
        "update",
        dict(window_out=a(5, 0, 3, 64)),
        ValueError,
        "window_out: expected steps >= 1 on axis 1, the tokens of the longest row, got 0",
    ),
    (
        "update",
        WINDOWS | dict(x=a(5, 2, 64)),
        ValueError,
        "window_out: expected steps >= 2 on axis 1, the tokens of the longest row, got 1",
    ),
    (
        "update",
        WINDOWS | PACKED | dict(max_seqlen=2),
        ValueError,
        "window_out: expected steps >= 2 on axis 1, the tokens of the longest row, got 1",
    ),
    (
        "update",
        WINDOWS | PACKED,
        ValueError,
        "max_seqlen: expected an integer, since query_start_loc and window_out are given "
        "(window_out must have steps enough for the longest row), got None",
    ),
    (
        "update",
        dict(window_out=a(4, 1, 3, 64)),
        ValueError,
        "window_out: expected buffers >= batch = 5, since window_indices is None, got 4",
    ),
    (
        "update",
        WINDOWS | dict(window_indices=a(4, dtype=I32)),
        ValueError,
        "window_indices: expected shape [batch=5], got [4]",
    ),
    (
        "update",
        WINDOWS | dict(window_indices=a(5, dtype=F32)),
        TypeError,
        f"window_indices: {INDEX}, got float32",
    ),
    ("update", dict(commit=None), TypeError, "commit: expected True or False, got None"),
    ("update", dict(commit=1), TypeError, "commit: expected True or False, got 1"),
    (
        "update",
        dict(commit=False, write_indices=ROW_I32),
        ValueError,
        "write_indices: expected None, since commit is False and no slot is written",
    ),
    (
        "update",
        dict(commit=False, track_indices=ROW_I32),
        ValueError,
        "track_indices: expected None, since commit is False and no slot is written",
    ),
    (
        "update",
        COUNTS | dict(commit=False),
        ValueError,
        "num_accepted_tokens: expected None, since commit is False",
    ),
    ("update", COUNTS | WINDOWS, ValueError, "num_accepted_tokens: expected None, since window_out is given"),
    # trees
    (
        "update",
        TREE | dict(x=a(5, 64)),
        ValueError,
        "x: expected shape [batch, seqlen, dim], since tree_parents is given, got [5, 64]",
    ),
    (
        "update",
        TREE | dict(commit=True),
        ValueError,
        "commit: expected False, since tree_parents is given and a tree has no last node, got True",
    ),
    ("update", TREE | PACKED, ValueError, "query_start_loc: expected None, since tree_parents is given"),
    (
        "update",
        TREE | COUNTS | dict(commit=True, conv_states=a(8, 6, 64)),
        ValueError,
        "num_accepted_tokens: expected None, since tree_parents is given",
    ),
    (
        "update",
        TREE | dict(tree_parents=a(5, 3, dtype=I32)),
        ValueError,
        "tree_parents: expected shape [batch=5, seqlen=2], got [5, 3]",
    ),
    (
        "update",
        TREE | dict(tree_parents=a(5, 2, dtype=F32)),
        TypeError,
        f"tree_parents: {INDEX}, got float32",
    ),
    ("update", dict(x=[1.0]), TypeError, "x: expected an array, got list"),
    (
        "update",
        dict(x=a(64)),
        ValueError,
        "x: expected shape [batch, dim] or [batch, seqlen, dim], got [64]",
    ),
    (
        "update",
        dict(x=a(1, 5, 2, 64)),
        ValueError,
        "x: expected shape [batch, dim] or [batch, seqlen, dim], got [1, 5, 2, 64]",
    ),
    ("update", dict(x=a(5, 0)), ValueError, "x: expected dim >= 1, got shape [5, 0]"),
    (
        "update",
        dict(x=a(5, 2, 0)),
        ValueError,
        "x: expected shape [batch, seqlen, dim] with dim >= 1, got [5, 2, 0]",
    ),
    ("update", dict(x=a(5, 64, dtype=I32)), TypeError, f"x: {DTYPES}, got int32"),
    (
        "update",
        dict(conv_states=None),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim], got None "
        "(an update continues from a state; a stateless call is causal_conv1d_fn)",
    ),
    # packed rows and rolling slots
    ("update", PACKED | dict(x=a(9, 2, 64)), ValueError, "x: expected shape [tokens, dim], got [9, 2, 64]"),
    (
        "update",
        PACKED | dict(x=a(9, 0)),
        ValueError,
        "x: expected shape [tokens, dim] with dim >= 1, got [9, 0]",
    ),
    ("update", PACKED | dict(x=a(9, 64, dtype=I32)), TypeError, f"x: {DTYPES}, got int32"),
    (
        "update",
        PACKED | dict(query_start_loc=a(6, 1, dtype=I32)),
        ValueError,
        "query_start_loc: expected shape [batch+1], got [6, 1]",
    ),
    (
        "update",
        PACKED | dict(query_start_loc=a(6, dtype="int16")),
        TypeError,
        "query_start_loc: expected dtype int32 or int64, got int16",
    ),
    (
        "update",
        PACKED | dict(query_start_loc=a(0, dtype=I32)),
        ValueError,
        "query_start_loc: expected shape [batch+1] with at least one entry, got [0]",
    ),
    (
        "update",
        PACKED | dict(cache_indices=a(9, dtype=I32)),
        ValueError,
        "cache_indices: expected shape [batch=5], got [9]",
    ),
    (
        "update",
        dict(max_seqlen=4),
        ValueError,
        "max_seqlen: expected None, since query_start_loc is None, got 4",
    ),
    (
        "update",
        PACKED | dict(max_seqlen=-1),
        ValueError,
        "max_seqlen: expected None or an integer >= 0, got -1",
    ),
    ("update", PACKED | dict(max_seqlen=1.5), TypeError, f"max_seqlen: {HOST}, got 1.5"),
    (
        "update",
        dict(num_accepted_tokens=a(4, dtype=I32)),
        ValueError,
        "num_accepted_tokens: expected shape [batch=5], got [4]",
    ),
    (
        "update",
        dict(num_accepted_tokens=a(5, dtype=F32)),
        TypeError,
        f"num_accepted_tokens: {INDEX}, got float32",
    ),
    (
        "update",
        ROLLING | dict(max_seqlen=None),
        ValueError,
        "max_seqlen: expected an integer, since query_start_loc and num_accepted_tokens are given "
        "(a slot must be wide enough for the longest row), got None",
    ),
    (
        "update",
        ROLLING | dict(max_seqlen=5),
        ValueError,
        "conv_states: expected state_len >= width-1 + 5-1 = 7 on axis 1 for rows of up to 5 tokens with "
        "num_accepted_tokens, got 6",
    ),
    (
        "update",
        ROLLING | dict(max_seqlen=np.int64(5)),
        ValueError,
        "conv_states: expected state_len >= width-1 + 5-1 = 7 on axis 1 for rows of up to 5 tokens with "
        "num_accepted_tokens, got 6",
    ),
    (
        "update",
        COUNTS | dict(x=a(5, 2, 64)),
        ValueError,
        "conv_states: expected state_len >= width-1 + 2-1 = 4 on axis 1 for rows of up to 2 tokens with "
        "num_accepted_tokens, got 3",
    ),
    (
        "update",
        ROLLING | dict(weight=a(64, 2), conv_states=a(8, 3, 64)),
        ValueError,
        "conv_states: expected state_len >= width-1 + 4-1 = 4 on axis 1 for rows of up to 4 tokens with "
        "num_accepted_tokens, got 3",
    ),
    (
        "update_values",
        dict(write_indices=[0, 1, 2]),
        ValueError,
        "write_indices: expected a slot that no other row reads, got 0 in row 0, which row 1 reads",
    ),
    (
        "update_values",
        dict(write_indices=[1, 1, 2]),
        ValueError,
        "write_indices: expected distinct slots for live rows, got 1 in rows 0 and 1",
    ),
    (
        "update_values",
        dict(cache_indices=[4, 5, 2], commit=False),
        ValueError,
        "cache_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 1, got 5",
    ),
    (
        "update_values",
        dict(track_indices=[1, 1, 3]),
        ValueError,
        "track_indices: expected distinct slots for live rows, got 1 in rows 0 and 1",
    ),
    (
        "update_values",
        dict(track_indices=[1, 2, 3]),
        ValueError,
        "track_indices: expected distinct slots for live rows, got 2 in rows 2 and 1",
    ),
    (
        "update_values",
        dict(cache_seqlens=[0, -1, 0]),
        ValueError,
        "cache_seqlens: expected at least 0 in row 1, got -1",
    ),
    (
        "update_values",
        dict(num_buffers=2),
        ValueError,
        "window_indices: expected pad_slot_id=-1 or a buffer in [0, 2) in row 2, got 2",
    ),
    (
        "update_values",
        dict(num_buffers=3, window_indices=[0, 2, 2]),
        ValueError,
        "window_indices: expected distinct buffers for live rows, got 2 in rows 1 and 2",
    ),
    (
        "update_values",
        dict(
            sizes=UpdateSizes(3, 3, 64, 4, 5, 3, 9),
            commit=False,
            tree_parents=[[-1, 0, 0], [-1, 1, 1], [-1, 0, 1]],
        ),
        ValueError,
        "tree_parents: expected a number below 1, the node's own, at [1, 1], got 1",
    ),
    # data, for validate=True
    (
        "update_values",
        PACKED_VALUES | dict(query_start_loc=[0, 3, 2, 4]),
        ValueError,
        "query_start_loc: expected row 1 to end between its start 3 and tokens=7, got 2",
    ),
    (
        "update_values",
        PACKED_VALUES | dict(max_seqlen=3),
        ValueError,
        "max_seqlen: expected at least 4, the length of row 2, got 3",
    ),
    (
        "update_values",
        PACKED_VALUES | dict(cache_indices=[3, 0, 3]),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 3 in rows 0 and 2",
    ),
    (
        "update_values",
        PACKED_VALUES | dict(num_accepted_tokens=[1, 1, 0]),
        ValueError,
        "num_accepted_tokens: expected 1 to 4, which slots of state_len=6 can hold, in row 2, got 0",
    ),
    (
        "update_values",
        PACKED_VALUES | dict(num_accepted_tokens=[5, 1, 1]),
        ValueError,
        "num_accepted_tokens: expected 1 to 4, which slots of state_len=6 can hold, in row 0, got 5",
    ),
    (
        "update_values",
        dict(num_accepted_tokens=[1, 2, 1]),
        ValueError,
        "num_accepted_tokens: expected 1 to 1, which slots of state_len=3 can hold, in row 1, got 2",
    ),
    (
        "update_values",
        dict(cache_indices=[3, 1, 3]),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 3 in rows 0 and 2",
    ),
    (
        "update_values",
        dict(cache_indices=[3, -2, 0]),
        ValueError,
        "cache_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 1, got -2",
    ),
    (
        "update_values",
        dict(cache_indices=None, sizes=UpdateSizes(6, 1, 64, 4, 5, 3, 6)),
        ValueError,
        "cache_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 5, got 5",
    ),
]


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)
