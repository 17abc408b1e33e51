"""Every check of oracle/contract.py: what passes, and for each error its exact type and text.

The arrays are stand-ins of a shape and a dtype, which is all that the checks may read. The tables are shown
to be complete by mutation: the contract's syntax tree is damaged in one place at a time, and some row must notice.
"""

import ast
import copy
import inspect
import operator
import types
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from oracle import contract, contract_values
from oracle.contract import (
    CommitSizes,
    ConvOutput,
    ConvWindowOutput,
    FnSizes,
    LinksSizes,
    RowSizes,
    Unsupported,
    UpdateSizes,
)


class Array(NamedTuple):
    """Stands in for an array of any library; reading anything but these two fails."""

    shape: tuple
    dtype: object


class Named:
    """A dtype as NumPy and JAX have it: with a name."""

    def __init__(self, name):
        self.name = name


class Printed:
    """A dtype as Torch has it: with a text that ends in the name."""

    def __init__(self, name):
        self.text = f"torch.{name}"

    def __str__(self):
        return self.text


def a(*shape, dtype="bfloat16", kind=Named):
    return Array(shape, kind(dtype))


F32, I32, I64, BOOL = "float32", "int32", "int64", "bool"

# A valid call of each operation: five sequences of lengths 1, 9, 2, 17, 4.
FN = dict(
    x=a(33, 64),
    weight=a(64, 4),
    bias=a(64),
    conv_states=a(8, 3, 64),
    query_start_loc=a(6, dtype=I32),
    cache_indices=a(5, dtype=I32),
    has_initial_state=a(5, dtype=BOOL),
)
UPDATE = dict(x=a(5, 64), weight=a(64, 4), bias=a(64), conv_states=a(8, 3, 64), cache_indices=a(5, dtype=I32))
ROWS = dict(
    x=a(33, 64),
    weight=a(64, 4),
    bias=a(64),
    initial_states=a(5, 3, 64),
    query_start_loc=a(6, dtype=I32),
)
DENSE = dict(x=a(5, 7, 64), query_start_loc=None)
PACKED = dict(x=a(9, 64), query_start_loc=a(6, dtype=I32))
COUNTS = dict(num_accepted_tokens=a(5, dtype=I32))
ROLLING = PACKED | COUNTS | dict(max_seqlen=4, conv_states=a(8, 6, 64))
PACKED_VALUES = dict(sizes=UpdateSizes(3, None, 64, 4, 5, 6, 7), query_start_loc=[0, 2, 2, 6])
NO_POOL = dict(conv_states=None, cache_indices=None, has_initial_state=None)

# What serving engines ask for besides. The sizes of the calls stay those of the plain ones.
ROW_I32 = a(5, dtype=I32)
RING = dict(state_layout="ring", cache_seqlens=ROW_I32)
SNAPSHOTS = dict(snapshot_indices=a(5, 7, dtype=I32), snapshot_block_size=1)
WINDOWS = dict(window_out=a(5, 1, 3, 64))
TREE = dict(x=a(5, 2, 64), tree_parents=a(5, 2, dtype=I32), commit=False)
COMMIT = dict(
    conv_states=a(8, 5, 64),
    window_out=a(6, 4, 3, 64),
    accepted_steps=ROW_I32,
    cache_indices=ROW_I32,
    window_indices=ROW_I32,
)
FN_SIZES, UPDATE_SIZES = FnSizes(33, 64, 4, 5, 8, 3), UpdateSizes(5, 1, 64, 4, 8, 3, 5)
COMMIT_SIZES = CommitSizes(5, 8, 5, 6, 4, 3, 64)
COMMIT_VALUES = CommitSizes(3, 5, 4, 6, 2, 3, 64)

SERVING_ACCEPTED = [
    *(
        (op, more, sizes)
        for op, sizes in (("fn", FN_SIZES), ("update", UPDATE_SIZES))
        for more in (
            dict(state_layout="back"),
            RING,
            dict(write_indices=a(5, dtype="uint8")),
            dict(track_indices=ROW_I32),
            RING | dict(write_indices=ROW_I32),
            dict(channel_offset=0),
            dict(channel_offset=np.int64(0)),
            dict(split_sizes=(64,)),
            dict(split_sizes=(1,) * 7 + (57,)),
            dict(split_sizes=(np.int64(32), 32)),
        )
    ),
    ("fn", dict(empty_rows="apply"), FN_SIZES),
    ("fn", SNAPSHOTS, FN_SIZES),
    ("fn", SNAPSHOTS | dict(snapshot_indices=a(5, 0, dtype=I64), snapshot_block_size=64), FN_SIZES),
    ("fn", SNAPSHOTS | dict(num_computed_tokens=ROW_I32), FN_SIZES),
    ("fn", dict(track_indices=ROW_I32, track_lengths=ROW_I32), FN_SIZES),
    ("fn", dict(residual=a(33, 64, dtype=F32)), FN_SIZES),
    (
        "fn",
        NO_POOL | dict(state_layout="back", residual=a(33, 64), split_sizes=(1, 63)),
        FnSizes(33, 64, 4, 5, 0, 0),
    ),
    ("fn", dict(x=a(33, 80), channel_offset=16, residual=a(33, 64)), FN_SIZES),
    ("fn", dict(x=a(33, 80), channel_offset=15), FN_SIZES),
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
    ("links", {}, LinksSizes(5, 7)),
    ("links", dict(next_token=a(0, 7, dtype=I64), next_sibling=a(0, 7, dtype="int16")), LinksSizes(0, 7)),
    # Values. Base: lengths 1, 0, 3 of 6 tokens in slots 4, 4, 2 of 5.
    ("fn_values", dict(write_indices=[0, 1, 3]), None),
    ("fn_values", dict(write_indices=[0, 0, -1]), None),  # row 1 writes nothing, row 2 stores nothing
    (
        "fn_values",
        dict(write_indices=[0, 99, 3], cache_indices=[4, -1, 4], has_initial_state=[True] * 3),
        None,
    ),
    ("fn_values", dict(write_indices=[4, 1, 2], has_initial_state=[True] * 3), None),  # in place
    ("fn_values", dict(write_indices=[2, 1, 4]), None),  # rows without state read nothing
    ("fn_values", dict(empty_rows="apply", cache_indices=[4, 1, 2]), None),
    (
        "fn_values",
        dict(
            empty_rows="apply",
            cache_indices=[4, 3, 2],
            has_initial_state=[False, True, False],
            write_indices=[4, 3, 2],
        ),
        None,
    ),
    (
        "fn_values",
        dict(
            empty_rows="apply",
            cache_indices=[4, 3, 3],
            has_initial_state=[False, True, True],
            write_indices=[4, 3, 2],
        ),
        None,
    ),  # row 1 has its state where it belongs
    ("fn_values", dict(cache_seqlens=[0, -1, 9]), None),
    ("fn_values", dict(cache_seqlens=[-1, 0, 0], cache_indices=[-1, 0, 2]), None),
    # Boundaries of 2 tokens: row 0 ends at 1 of none, row 2 holds tokens 1 to 4 after one computed.
    ("fn_values", dict(snapshot_indices=[[99, 99], [99, 99], [0, 99]], snapshot_block_size=2), None),
    (
        "fn_values",
        dict(
            snapshot_indices=[[99, 99], [99, 99], [0, 1]],
            snapshot_block_size=2,
            num_computed_tokens=[0, -1, 1],
        ),
        None,
    ),
    (
        "fn_values",
        dict(snapshot_indices=[[99], [99], [0]], snapshot_block_size=2, num_computed_tokens=[0, 0, 1]),
        None,
    ),
    (
        "fn_values",
        dict(
            snapshot_indices=[[99, 99], [99, 99], [99, -1]],
            snapshot_block_size=2,
            num_computed_tokens=[0, 0, 2],
        ),
        None,
    ),
    (
        "fn_values",
        dict(snapshot_indices=[[99] * 2] * 3, snapshot_block_size=2, cache_indices=[-1, -1, -1]),
        None,
    ),
    ("fn_values", dict(track_indices=[0, 99, 1]), None),
    ("fn_values", dict(track_indices=[0, 99, -1], track_lengths=[0, 99, 3]), None),
    ("fn_values", dict(track_indices=[0, 3, -1], empty_rows="apply", cache_indices=[4, 1, 2]), None),
    ("fn_values", dict(num_slots=None, cache_indices=None, track_indices=[99] * 3), None),
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
    ("commit_values", {}, None),
    ("commit_values", dict(cache_indices=None, window_indices=None), None),
    ("commit_values", dict(cache_indices=[4, -1, 4], accepted_steps=[0, 9, -7]), None),
    ("commit_values", dict(window_indices=[5, 5, -1]), None),
]

ACCEPTED = [
    *SERVING_ACCEPTED,
    ("fn", {}, FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", NO_POOL, FnSizes(33, 64, 4, 5, 0, 0)),
    ("fn", dict(bias=None, has_initial_state=None), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(cache_indices=None, conv_states=a(5, 3, 64)), FnSizes(33, 64, 4, 5, 5, 3)),
    ("fn", dict(conv_states=a(8, 9, 64)), FnSizes(33, 64, 4, 5, 8, 9)),
    ("fn", dict(conv_states=a(0, 3, 64)), FnSizes(33, 64, 4, 5, 0, 3)),
    ("fn", dict(x=a(0, 64)), FnSizes(0, 64, 4, 5, 8, 3)),
    (
        "fn",
        dict(query_start_loc=a(1, dtype=I64), cache_indices=a(0, dtype=I64), has_initial_state=None),
        FnSizes(33, 64, 4, 0, 8, 3),
    ),
    (
        "fn",
        dict(x=a(33, 1), weight=a(1, 4), bias=a(1), conv_states=a(8, 3, 1)),
        FnSizes(33, 1, 4, 5, 8, 3),
    ),
    ("fn", dict(weight=a(64, 1), conv_states=a(8, 0, 64)), FnSizes(33, 64, 1, 5, 8, 0)),
    ("fn", dict(weight=a(64, 8), conv_states=a(8, 7, 64)), FnSizes(33, 64, 8, 5, 8, 7)),
    ("fn", dict(x=a(33, 64, dtype=F32), bias=a(64, dtype="float16")), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(weight=a(64, 4, dtype=F32), conv_states=a(8, 3, 64, dtype=F32)), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(x=a(33, 64, kind=Printed), bias=a(64, dtype=F32, kind=Printed)), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(x=a(33, 64, dtype=F32, kind=np.dtype)), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(activation="silu", schedule="flat", validate=True), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(activation="swish", schedule="per_sequence", max_seqlen=17), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(max_seqlen=0, pad_slot_id=0), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(max_seqlen=np.int64(17), pad_slot_id=np.array(-1)), FnSizes(33, 64, 4, 5, 8, 3)),
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
    ("rows", {}, RowSizes(33, 64, 4, 5)),
    ("rows", dict(bias=None, initial_states=None), RowSizes(33, 64, 4, 5)),
    ("rows", dict(x=a(0, 64)), RowSizes(0, 64, 4, 5)),
    ("rows", dict(initial_states=a(0, 3, 64), query_start_loc=a(1, dtype=I64)), RowSizes(33, 64, 4, 0)),
    ("rows", dict(activation="swish", schedule="flat", max_seqlen=0), RowSizes(33, 64, 4, 5)),
    ("rows", DENSE, RowSizes(35, 64, 4, 5)),
    ("rows", DENSE | dict(x=a(5, 0, 64)), RowSizes(0, 64, 4, 5)),
    (
        "rows",
        DENSE | dict(x=a(5, 7, 1), weight=a(1, 4), bias=a(1), initial_states=None),
        RowSizes(35, 1, 4, 5),
    ),
    ("backend", dict(backend="auto"), None),
    ("backend", dict(backend="eager"), None),
    # Offsets and slots, read to the host. Base: lengths 1, 0, 3 of 6 tokens in slots 4, 4, 2 of 5.
    ("fn_values", {}, None),
    ("fn_values", dict(max_seqlen=3), None),
    ("fn_values", dict(tokens=4), None),
    ("fn_values", dict(num_slots=None, cache_indices=None), None),
    ("fn_values", dict(cache_indices=None), None),
    ("fn_values", dict(cache_indices=[-1, 0, -1]), None),
    ("fn_values", dict(cache_indices=[2, 2, 0]), None),
    ("fn_values", dict(cache_indices=[7, 0, 7], pad_slot_id=7), None),
    ("fn_values", dict(query_start_loc=[0], cache_indices=[]), None),
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

DTYPES = "expected dtype float32 or float16 or bfloat16"
INDEX = "expected dtype int32 or int64 or int16 or int8 or uint8 or uint16 or uint32 or uint64"
HOST = "expected an integer known on the host"


def both(overrides, error, text):
    return [("fn", overrides, error, text), ("update", overrides, error, text)]


SHARED = "expected None, since conv_states is None and there is no slot to name"
NOT_FRONT = "expected None, since state_layout is 'back'"
OFFSET = "channel_offset: expected None, or an integer >= 0 with channel_offset + dim <= "
SPLIT = "split_sizes: expected 1 to 8 integers >= 1 that add up to dim=64, got "
STATELESS = NO_POOL | dict(has_initial_state=None)

SERVING_REJECTED = [
    # layouts
    *both(
        dict(state_layout="rear"),
        ValueError,
        "state_layout: expected one of ('front', 'back', 'ring'), got 'rear'",
    ),
    *both(
        dict(state_layout=None),
        ValueError,
        "state_layout: expected one of ('front', 'back', 'ring'), got None",
    ),
    *both(
        dict(state_layout="ring"),
        ValueError,
        "cache_seqlens: expected shape [batch], since state_layout is 'ring', got None",
    ),
    *both(
        dict(cache_seqlens=ROW_I32), ValueError, "cache_seqlens: expected None, since state_layout is 'front'"
    ),
    *both(
        RING | dict(state_layout="back"),
        ValueError,
        "cache_seqlens: expected None, since state_layout is 'back'",
    ),
    *both(
        RING | dict(cache_seqlens=a(6, dtype=I32)),
        ValueError,
        "cache_seqlens: expected shape [batch=5], got [6]",
    ),
    *both(RING | dict(cache_seqlens=a(5, dtype=F32)), TypeError, f"cache_seqlens: {INDEX}, got float32"),
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
    # write_indices, empty_rows, track_indices
    *both(dict(write_indices=3), TypeError, "write_indices: expected an array, got int"),
    *both(
        dict(write_indices=a(5, 1, dtype=I32)),
        ValueError,
        "write_indices: expected shape [batch=5], got [5, 1]",
    ),
    *both(dict(write_indices=a(5, dtype=BOOL)), TypeError, f"write_indices: {INDEX}, got bool"),
    (
        "fn",
        dict(empty_rows="clear"),
        ValueError,
        "empty_rows: expected one of ('skip', 'apply'), got 'clear'",
    ),
    *both(
        dict(track_indices=a(4, dtype=I32)), ValueError, "track_indices: expected shape [batch=5], got [4]"
    ),
    *both(dict(track_indices=a(5, dtype=F32)), TypeError, f"track_indices: {INDEX}, got float32"),
    *both(dict(track_indices=ROW_I32, state_layout="back"), ValueError, f"track_indices: {NOT_FRONT}"),
    (
        "fn",
        dict(track_lengths=ROW_I32),
        ValueError,
        "track_lengths: expected None, since track_indices is None",
    ),
    (
        "fn",
        dict(track_indices=ROW_I32, track_lengths=a(4, dtype=I32)),
        ValueError,
        "track_lengths: expected shape [batch=5], got [4]",
    ),
    (
        "fn",
        dict(track_indices=ROW_I32, track_lengths=a(5, dtype=F32)),
        TypeError,
        f"track_lengths: {INDEX}, got float32",
    ),
    # snapshots
    (
        "fn",
        dict(snapshot_block_size=8),
        ValueError,
        "snapshot_block_size: expected None, since snapshot_indices is None",
    ),
    (
        "fn",
        dict(num_computed_tokens=ROW_I32),
        ValueError,
        "num_computed_tokens: expected None, since snapshot_indices is None",
    ),
    ("fn", SNAPSHOTS | dict(state_layout="back"), ValueError, f"snapshot_indices: {NOT_FRONT}"),
    (
        "fn",
        SNAPSHOTS | dict(snapshot_indices=ROW_I32),
        ValueError,
        "snapshot_indices: expected shape [batch=5, blocks], got [5]",
    ),
    (
        "fn",
        SNAPSHOTS | dict(snapshot_indices=a(4, 7, dtype=I32)),
        ValueError,
        "snapshot_indices: expected shape [batch=5, blocks], got [4, 7]",
    ),
    (
        "fn",
        SNAPSHOTS | dict(snapshot_indices=a(5, 7, dtype=F32)),
        TypeError,
        f"snapshot_indices: {INDEX}, got float32",
    ),
    (
        "fn",
        SNAPSHOTS | dict(snapshot_block_size=None),
        ValueError,
        "snapshot_block_size: expected an integer, since snapshot_indices is given, got None",
    ),
    (
        "fn",
        SNAPSHOTS | dict(snapshot_block_size=0),
        ValueError,
        "snapshot_block_size: expected an integer >= 1, got 0",
    ),
    ("fn", SNAPSHOTS | dict(snapshot_block_size=8.0), TypeError, f"snapshot_block_size: {HOST}, got 8.0"),
    (
        "fn",
        SNAPSHOTS | dict(num_computed_tokens=a(6, dtype=I32)),
        ValueError,
        "num_computed_tokens: expected shape [batch=5], got [6]",
    ),
    (
        "fn",
        SNAPSHOTS | dict(num_computed_tokens=a(5, dtype=F32)),
        TypeError,
        f"num_computed_tokens: {INDEX}, got float32",
    ),
    # without a pool
    ("fn", STATELESS | dict(write_indices=ROW_I32), ValueError, f"write_indices: {SHARED}"),
    ("fn", STATELESS | RING, ValueError, f"cache_seqlens: {SHARED}"),
    ("fn", STATELESS | SNAPSHOTS, ValueError, f"snapshot_indices: {SHARED}"),
    ("fn", STATELESS | dict(track_indices=ROW_I32), ValueError, f"track_indices: {SHARED}"),
    # residual, channel_offset, split_sizes
    (
        "fn",
        dict(residual=a(32, 64)),
        ValueError,
        "residual: expected shape [tokens=33, dim=64], got [32, 64]",
    ),
    ("fn", dict(residual=a(33, 64, dtype=I32)), TypeError, f"residual: {DTYPES}, got int32"),
    (
        "fn",
        dict(x=a(33, 80), residual=a(33, 80), channel_offset=0),
        ValueError,
        "residual: expected shape [tokens=33, dim=64], got [33, 80]",
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
    *both(dict(channel_offset=1), ValueError, f"{OFFSET}64, the channels of x, for dim=64, got 1"),
    *both(dict(channel_offset=-1), ValueError, f"{OFFSET}64, the channels of x, for dim=64, got -1"),
    *both(
        dict(channel_offset=0, weight=a(65, 4)),
        ValueError,
        f"{OFFSET}64, the channels of x, for dim=65, got 0",
    ),
    *both(
        dict(channel_offset=0, weight=a(0, 4)),
        ValueError,
        "weight: expected shape [dim, width] with dim >= 1, got [0, 4]",
    ),
    *both(dict(channel_offset=0.0), TypeError, f"channel_offset: {HOST}, got 0.0"),
    *both(dict(split_sizes=[32, 32]), TypeError, "split_sizes: expected a tuple of integers, got list"),
    *both(dict(split_sizes=(32, 32.0)), TypeError, f"split_sizes: {HOST}, got 32.0"),
    *both(dict(split_sizes=()), ValueError, SPLIT + "()"),
    *both(dict(split_sizes=(1,) * 8 + (56,)), ValueError, SPLIT + "(1, 1, 1, 1, 1, 1, 1, 1, 56)"),
    *both(dict(split_sizes=(0, 64)), ValueError, SPLIT + "(0, 64)"),
    *both(dict(split_sizes=(32, 31)), ValueError, SPLIT + "(32, 31)"),
    *both(dict(split_sizes=(32, 33)), ValueError, SPLIT + "(32, 33)"),
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
    ("links", dict(next_token=a(5, dtype=I32)), ValueError, "next_token: expected shape [batch, n], got [5]"),
    ("links", dict(next_token=a(5, 7, dtype=F32)), TypeError, f"next_token: {INDEX}, got float32"),
    (
        "links",
        dict(next_sibling=a(5, 6, dtype=I32)),
        ValueError,
        "next_sibling: expected shape [batch=5, n=7], got [5, 6]",
    ),
    (
        "links",
        dict(next_sibling=a(4, 7, dtype=I32)),
        ValueError,
        "next_sibling: expected shape [batch=5, n=7], got [4, 7]",
    ),
    ("links", dict(next_sibling=a(5, 7, dtype=F32)), TypeError, f"next_sibling: {INDEX}, got float32"),
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
    # values
    (
        "fn_values",
        dict(write_indices=[0, 5, 5]),
        ValueError,
        "write_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 2, got 5",
    ),
    (
        "fn_values",
        dict(write_indices=[3, 1, 3]),
        ValueError,
        "write_indices: expected distinct slots for live rows, got 3 in rows 0 and 2",
    ),
    (
        "fn_values",
        dict(write_indices=[0, 1, 4], has_initial_state=[True, False, False]),
        ValueError,
        "write_indices: expected a slot that no other row reads, got 4 in row 2, which row 0 reads",
    ),
    (
        "fn_values",
        dict(cache_indices=[4, 4, 2], empty_rows="apply"),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 4 in rows 0 and 1",
    ),
    (
        "fn_values",
        dict(cache_indices=[4, 4, 2], empty_rows="apply", has_initial_state=[False, True, False]),
        ValueError,
        "cache_indices: expected a slot that no other row reads, got 4 in row 0, which row 1 reads",
    ),
    (
        "fn_values",
        dict(
            empty_rows="apply",
            cache_indices=[4, 1, 2],
            has_initial_state=[False, True, False],
            write_indices=[4, 2, 2],
        ),
        ValueError,
        "write_indices: expected distinct slots for live rows, got 2 in rows 1 and 2",
    ),
    (
        "fn_values",
        dict(empty_rows="apply", cache_indices=[4, 2, 1], write_indices=[4, 2, 2]),
        ValueError,
        "write_indices: expected distinct slots for live rows, got 2 in rows 1 and 2",
    ),
    (
        "fn_values",
        dict(cache_seqlens=[0, 0, -1]),
        ValueError,
        "cache_seqlens: expected at least 0 in row 2, got -1",
    ),
    (
        "fn_values",
        dict(num_computed_tokens=[-1, 0, 0]),
        ValueError,
        "num_computed_tokens: expected at least 0 in row 0, got -1",
    ),
    (
        "fn_values",
        dict(snapshot_indices=[[0], [0], [0]]),
        ValueError,
        "snapshot_indices: expected distinct slots for live rows, got 0 in rows 0 and 2",
    ),
    (
        "fn_values",
        dict(
            snapshot_indices=[[9, 0], [9, 9], [9, 9]],
            snapshot_block_size=2,
            num_computed_tokens=[3, 0, 3],
            cache_indices=[1, 2, 0],
        ),
        ValueError,
        "snapshot_indices: expected distinct slots for live rows, got 0 in rows 2 and 0",
    ),
    (
        "fn_values",
        dict(snapshot_indices=[[0], [0], [5]], snapshot_block_size=2),
        ValueError,
        "snapshot_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 2, got 5",
    ),
    (
        "fn_values",
        dict(
            snapshot_indices=[[-1], [0], [4]],
            cache_indices=[4, 4, 4],
            write_indices=[0, 1, 2],
            has_initial_state=[False, False, True],
        ),
        ValueError,
        "snapshot_indices: expected a slot that no other row reads, got 4 in row 2, which row 2 reads",
    ),
    (
        "fn_values",
        dict(track_indices=[4, 0, 0]),
        ValueError,
        "track_indices: expected distinct slots for live rows, got 4 in rows 0 and 0",
    ),
    (
        "fn_values",
        dict(track_indices=[5, 0, 0]),
        ValueError,
        "track_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 0, got 5",
    ),
    (
        "fn_values",
        dict(track_indices=[0, 5, 1], empty_rows="apply", cache_indices=[4, 3, 2]),
        ValueError,
        "track_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 1, got 5",
    ),
    (
        "fn_values",
        dict(track_indices=[0, 0, 1], track_lengths=[0, 0, 4]),
        ValueError,
        "track_lengths: expected 0 to 3, the length of the row, in row 2, got 4",
    ),
    (
        "fn_values",
        dict(track_indices=[0, 0, 1], track_lengths=[-1, 0, 0]),
        ValueError,
        "track_lengths: expected 0 to 1, the length of the row, in row 0, got -1",
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

REJECTED = [
    *SERVING_REJECTED,
    # x
    ("fn", dict(x=None), TypeError, "x: expected an array, got NoneType"),
    ("update", dict(x=[1.0]), TypeError, "x: expected an array, got list"),
    ("fn", dict(x=a(64)), ValueError, "x: expected shape [tokens, dim], got [64]"),
    ("fn", dict(x=a(1, 33, 64)), ValueError, "x: expected shape [tokens, dim], got [1, 33, 64]"),
    ("fn", dict(x=a(33, 0)), ValueError, "x: expected shape [tokens, dim] with dim >= 1, got [33, 0]"),
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
    ("fn", dict(x=a(33, 64, dtype="float64")), TypeError, f"x: {DTYPES}, got float64"),
    ("update", dict(x=a(5, 64, dtype=I32)), TypeError, f"x: {DTYPES}, got int32"),
    # weight and bias
    *both(dict(weight=None), TypeError, "weight: expected an array, got NoneType"),
    *both(dict(weight=a(4, 64)), ValueError, "weight: expected shape [dim=64, width], got [4, 64]"),
    *both(dict(weight=a(64, 1, 4)), ValueError, "weight: expected shape [dim=64, width], got [64, 1, 4]"),
    *both(dict(weight=a(64, 0)), ValueError, "weight: expected width 1 to 8 on axis 1, got 0"),
    *both(dict(weight=a(64, 9)), ValueError, "weight: expected width 1 to 8 on axis 1, got 9"),
    *both(dict(weight=a(64, 4, dtype="float64")), TypeError, f"weight: {DTYPES}, got float64"),
    *both(dict(bias=True), TypeError, "bias: expected an array, got bool"),
    *both(dict(bias=a(63)), ValueError, "bias: expected shape [dim=64], got [63]"),
    *both(dict(bias=a(64, 1)), ValueError, "bias: expected shape [dim=64], got [64, 1]"),
    *both(dict(bias=a(64, dtype="int8")), TypeError, f"bias: {DTYPES}, got int8"),
    # conv_states
    *both(dict(conv_states=3), TypeError, "conv_states: expected an array, got int"),
    *both(
        dict(conv_states=a(8, 64, 3)),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim=64], got [8, 64, 3]",
    ),
    *both(
        dict(conv_states=a(8, 3)),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim=64], got [8, 3]",
    ),
    *both(
        dict(conv_states=a(8, 2, 64)),
        ValueError,
        "conv_states: expected state_len >= width-1 = 3 on axis 1, got 2",
    ),
    *both(dict(conv_states=a(8, 3, 64, dtype="int8")), TypeError, f"conv_states: {DTYPES}, got int8"),
    (
        "update",
        dict(conv_states=None),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim], got None "
        "(an update continues from a state; a stateless call is causal_conv1d_fn)",
    ),
    *both(
        dict(conv_states=a(4, 3, 64), cache_indices=None),
        ValueError,
        "conv_states: expected num_slots >= batch = 5, since cache_indices is None, got 4",
    ),
    # query_start_loc
    ("fn", dict(query_start_loc=None), TypeError, "query_start_loc: expected an array, got NoneType"),
    (
        "fn",
        dict(query_start_loc=a(2, 6, dtype=I32)),
        ValueError,
        "query_start_loc: expected shape [batch+1], got [2, 6]",
    ),
    (
        "fn",
        dict(query_start_loc=a(0, dtype=I32)),
        ValueError,
        "query_start_loc: expected shape [batch+1] with at least one entry, got [0]",
    ),
    (
        "fn",
        dict(query_start_loc=a(6, dtype=F32)),
        TypeError,
        "query_start_loc: expected dtype int32 or int64, got float32",
    ),
    # cache_indices and has_initial_state
    *both(dict(cache_indices=[0, 1]), TypeError, "cache_indices: expected an array, got list"),
    *both(
        dict(cache_indices=a(6, dtype=I32)), ValueError, "cache_indices: expected shape [batch=5], got [6]"
    ),
    *both(dict(cache_indices=a(5, dtype=BOOL)), TypeError, f"cache_indices: {INDEX}, got bool"),
    (
        "fn",
        dict(conv_states=None, has_initial_state=None),
        ValueError,
        "cache_indices: expected None, since conv_states is None and there is no slot to name",
    ),
    (
        "fn",
        dict(conv_states=None, cache_indices=None),
        ValueError,
        "has_initial_state: expected None, since conv_states is None and there is no slot to name",
    ),
    ("fn", dict(has_initial_state=True), TypeError, "has_initial_state: expected an array, got bool"),
    (
        "fn",
        dict(has_initial_state=a(4, dtype=BOOL)),
        ValueError,
        "has_initial_state: expected shape [batch=5], got [4]",
    ),
    (
        "fn",
        dict(has_initial_state=a(5, dtype=I32)),
        TypeError,
        "has_initial_state: expected dtype bool, got int32",
    ),
    # options
    *both(dict(activation="gelu"), ValueError, "activation: expected None, 'silu' or 'swish', got 'gelu'"),
    *both(dict(activation=True), ValueError, "activation: expected None, 'silu' or 'swish', got True"),
    *both(dict(pad_slot_id=None), TypeError, f"pad_slot_id: {HOST}, got None"),
    *both(dict(pad_slot_id=1.0), TypeError, f"pad_slot_id: {HOST}, got 1.0"),
    *both(dict(pad_slot_id=True), TypeError, f"pad_slot_id: {HOST}, got True"),
    *both(dict(validate=1), TypeError, "validate: expected True or False, got 1"),
    *both(dict(validate=None), TypeError, "validate: expected True or False, got None"),
    ("fn", dict(max_seqlen=-1), ValueError, "max_seqlen: expected None or an integer >= 0, got -1"),
    ("fn", dict(max_seqlen="17"), TypeError, f"max_seqlen: {HOST}, got '17'"),
    ("fn", dict(max_seqlen=False), TypeError, f"max_seqlen: {HOST}, got False"),
    (
        "fn",
        dict(schedule="fast"),
        ValueError,
        "schedule: expected one of ('auto', 'per_sequence', 'flat'), got 'fast'",
    ),
    # the differentiable form
    ("rows", dict(x=a(1, 33, 64)), ValueError, "x: expected shape [tokens, dim], got [1, 33, 64]"),
    ("rows", dict(x=a(33, 64, dtype="float64")), TypeError, f"x: {DTYPES}, got float64"),
    *(
        (
            "rows",
            DENSE | dict(x=x),
            ValueError,
            f"x: expected shape [batch, seqlen, dim] with dim >= 1, since query_start_loc is None, got {list(x.shape)}",
        )
        for x in (a(35, 64), a(5, 7, 0), a(1, 5, 7, 64))
    ),
    ("rows", DENSE | dict(x=None), TypeError, "x: expected an array, got NoneType"),
    (
        "rows",
        dict(query_start_loc=a(0, dtype=I32)),
        ValueError,
        "query_start_loc: expected shape [batch+1] with at least one entry, got [0]",
    ),
    (
        "rows",
        dict(query_start_loc=a(6, dtype=F32)),
        TypeError,
        "query_start_loc: expected dtype int32 or int64, got float32",
    ),
    ("rows", dict(weight=a(64, 9)), ValueError, "weight: expected width 1 to 8 on axis 1, got 9"),
    (
        "rows",
        dict(initial_states=a(5, 4, 64)),
        ValueError,
        "initial_states: expected shape [batch=5, width-1=3, dim=64], got [5, 4, 64]",
    ),
    ("rows", dict(initial_states=a(5, 3, 64, dtype=I32)), TypeError, f"initial_states: {DTYPES}, got int32"),
    ("rows", dict(activation="gelu"), ValueError, "activation: expected None, 'silu' or 'swish', got 'gelu'"),
    ("rows", dict(max_seqlen=-1), ValueError, "max_seqlen: expected None or an integer >= 0, got -1"),
    (
        "backend",
        dict(backend="cuda"),
        ValueError,
        "backend: expected one of ('auto', 'triton', 'eager'), got 'cuda'",
    ),
    (
        "backend",
        dict(backend=None),
        ValueError,
        "backend: expected one of ('auto', 'triton', 'eager'), got None",
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
        "fn_values",
        dict(query_start_loc=[1, 2, 2, 4]),
        ValueError,
        "query_start_loc: expected entry 0 to be 0, got 1",
    ),
    (
        "fn_values",
        dict(query_start_loc=[0, 3, 2, 4]),
        ValueError,
        "query_start_loc: expected row 1 to end between its start 3 and tokens=6, got 2",
    ),
    (
        "fn_values",
        dict(query_start_loc=[0, 1, 1, 7]),
        ValueError,
        "query_start_loc: expected row 2 to end between its start 1 and tokens=6, got 7",
    ),
    (
        "fn_values",
        dict(max_seqlen=2),
        ValueError,
        "max_seqlen: expected at least 3, the length of row 2, got 2",
    ),
    (
        "fn_values",
        dict(cache_indices=[4, 5, 2]),
        ValueError,
        "cache_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 1, got 5",
    ),
    (
        "fn_values",
        dict(cache_indices=[-1, 0, 2], pad_slot_id=0),
        ValueError,
        "cache_indices: expected pad_slot_id=0 or a slot in [0, 5) in row 0, got -1",
    ),
    (
        "fn_values",
        dict(cache_indices=[2, 0, 2]),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 2 in rows 0 and 2",
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

ACCEPTED += [("serving", {}, None)]
REJECTED += [
    ("serving", {name: value}, contract.Unsupported, f"{name}: expected its default, since it is split")
    for name, value in (("state_layout", "back"), ("empty_rows", "apply"), ("write_indices", 0))
]


def fn_values(module, *, tokens, num_slots, **fields):
    pool = None if num_slots is None else a(num_slots, 3, 64)
    call = module.FnCall(None, None, None, pool, **fields)
    sizes = FnSizes(tokens, 64, 4, len(fields["query_start_loc"]) - 1, num_slots or 0, 3)
    return call.check_values(sizes, lambda _, values: list(values))


def update_values(module, *, sizes, num_buffers=None, **fields):
    windows = None if num_buffers is None else a(num_buffers, 4, 3, 64)
    call = module.UpdateCall(None, None, None, None, window_out=windows, **fields)
    return call.check_values(sizes, lambda _, values: list(values))


def commit_values(module, *, sizes, **fields):
    return module.CommitCall(None, None, **fields).check_values(sizes, lambda _, values: list(values))


def check(record, module, **fields):
    return getattr(module, record)(**fields).check()


OPERATIONS = {
    "fn": (partial(check, "FnCall"), FN),
    "update": (partial(check, "UpdateCall"), UPDATE),
    "rows": (partial(check, "RowsCall"), ROWS),
    "commit": (partial(check, "CommitCall"), COMMIT),
    "links": (
        partial(check, "LinksCall"),
        dict(next_token=a(5, 7, dtype=I32), next_sibling=a(5, 7, dtype=I32)),
    ),
    "backend": (lambda module, **given: module.check_backend(**given), dict(names=("triton", "eager"))),
    "serving": (
        lambda module, **given: module.refuse_serving(**given),
        dict(why="it is split", state_layout="front", empty_rows="skip", write_indices=None),
    ),
    "fn_values": (
        fn_values,
        dict(query_start_loc=[0, 1, 1, 4], cache_indices=[4, 4, 2], tokens=6, num_slots=5),
    ),
    "update_values": (update_values, dict(cache_indices=[4, 0, 2], sizes=UpdateSizes(3, 1, 64, 4, 5, 3, 3))),
    "commit_values": (
        commit_values,
        dict(
            accepted_steps=[0, 1, 1], cache_indices=[4, 0, 2], window_indices=[5, 0, 2], sizes=COMMIT_VALUES
        ),
    ),
    # as text: NumPy's integers equal Python's
    "normalised": (lambda module, **given: repr(module.normalised(module.FnCall(**FN | given))[7:]), {}),
    "given": (lambda module, **given: module.given_arrays(module.FnCall(**FN | given)), {}),
}

FN_OPTIONS = (
    None,
    -1,
    None,
    "auto",
    "auto",
    False,
    "front",
    None,
    None,
    "skip",
    None,
    None,
    None,
    None,
    None,
    None,
)
ACCEPTED += [
    ("normalised", {}, repr((*FN_OPTIONS, None, None))),
    (
        "normalised",
        dict(pad_slot_id=np.int64(-7), channel_offset=np.uint8(3), split_sizes=(np.int64(1), 63)),
        repr((None, -7, *FN_OPTIONS[2:], 3, (1, 63))),
    ),
    ("given", NO_POOL, {name: FN[name] for name in ("x", "weight", "bias", "query_start_loc")}),
]


SIGNATURES = {
    "causal_conv1d_fn": "7: x, weight, bias, conv_states, query_start_loc, cache_indices=None, "
    "has_initial_state=None, activation=None, pad_slot_id=-1, max_seqlen=None, schedule='auto', "
    "backend='auto', validate=False, state_layout='front', cache_seqlens=None, write_indices=None, "
    "empty_rows='skip', snapshot_indices=None, snapshot_block_size=None, num_computed_tokens=None, "
    "track_indices=None, track_lengths=None, residual=None, channel_offset=None, split_sizes=None",
    "causal_conv1d_update": "5: x, weight, bias, conv_states, cache_indices=None, "
    "query_start_loc=None, num_accepted_tokens=None, max_seqlen=None, activation=None, pad_slot_id=-1, "
    "backend='auto', validate=False, state_layout='front', cache_seqlens=None, write_indices=None, "
    "track_indices=None, window_out=None, window_indices=None, commit=True, tree_parents=None, residual=None, "
    "channel_offset=None, split_sizes=None",
    "commit_windows": "5: conv_states, window_out, accepted_steps, cache_indices=None, window_indices=None, "
    "pad_slot_id=-1, backend='auto', validate=False",
    "tree_parents_from_links": "2: next_token, next_sibling",
    "causal_conv1d": "5: x, weight, bias=None, initial_states=None, query_start_loc=None, "
    "activation=None, max_seqlen=None, schedule='auto', backend='auto'",
}


# Of each record: the arrays that the call updates, those whose values are checked, the options, what may be None.
ROLES = {
    "causal_conv1d_fn": (
        "conv_states",
        "query_start_loc cache_indices has_initial_state cache_seqlens write_indices snapshot_indices "
        "num_computed_tokens track_indices track_lengths",
        "activation:str pad_slot_id:integer max_seqlen:size schedule:str backend:str validate:bool state_layout:str "
        "empty_rows:str snapshot_block_size:size channel_offset:size split_sizes:sizes",
        "bias conv_states cache_indices has_initial_state activation max_seqlen cache_seqlens write_indices "
        "snapshot_indices snapshot_block_size num_computed_tokens track_indices track_lengths residual channel_offset "
        "split_sizes",
    ),
    "causal_conv1d_update": (
        "conv_states window_out",
        "cache_indices query_start_loc num_accepted_tokens cache_seqlens write_indices track_indices window_indices "
        "tree_parents",
        "max_seqlen:size activation:str pad_slot_id:integer backend:str validate:bool state_layout:str commit:bool "
        "channel_offset:size split_sizes:sizes",
        "bias cache_indices query_start_loc num_accepted_tokens max_seqlen activation cache_seqlens write_indices "
        "track_indices window_out window_indices tree_parents residual channel_offset split_sizes",
    ),
    "commit_windows": (
        "conv_states",
        "accepted_steps cache_indices window_indices",
        "pad_slot_id:integer backend:str validate:bool",
        "cache_indices window_indices",
    ),
    "tree_parents_from_links": ("", "next_token next_sibling", "", ""),
    "causal_conv1d": (
        "",
        "query_start_loc",
        "activation:str max_seqlen:size schedule:str backend:str",
        "bias initial_states query_start_loc activation max_seqlen",
    ),
}


def roles(module):
    return {
        operation: (
            " ".join(record.WRITTEN),
            " ".join(record.INDICES),
            " ".join(f"{name}:{record.KINDS[name]}" for name in record.OPTIONS),
            " ".join(record.OPTIONAL),
        )
        for operation, record in module.RECORDS.items()
    }


def signatures(module):
    """The fields of each record with their defaults, behind how many of them are positional."""

    def text(record):
        defaults = record._field_defaults
        fields = [f"{name}={defaults[name]!r}" if name in defaults else name for name in record._fields]
        return f"{record.POSITIONAL}: {', '.join(fields)}"

    return {operation: text(record) for operation, record in module.RECORDS.items()}


def call(module, operation, overrides):
    function, base = OPERATIONS[operation]
    return function(module, **base | overrides)


def short(value):
    if isinstance(value, dict):
        return "-".join(f"{k}={short(v)}" for k, v in value.items()) or "base"
    if isinstance(value, Array):
        return "x".join(map(str, value.shape)) + getattr(value.dtype, "name", "")
    return str(value)


def name_rows(table):
    return [f"{row[0]}-{short(row[1])}" for row in table]


@pytest.mark.parametrize(("operation", "overrides", "sizes"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, sizes):
    result = call(contract, operation, overrides)
    assert result == sizes
    assert type(result) is type(sizes)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    with pytest.raises(error) as caught:
        call(contract, operation, overrides)
    assert type(caught.value) is error
    assert str(caught.value) == text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("operation", ["fn", "update"])
@pytest.mark.parametrize("dtype", contract.INDEX_DTYPES)
def test_every_index_dtype(operation, dtype):
    call(contract, operation, dict(cache_indices=a(5, dtype=dtype)))


@pytest.mark.parametrize("kind", [Named, Printed])
@pytest.mark.parametrize("name", contract.FLOAT_DTYPES)
def test_dtype_name(kind, name):
    assert contract.dtype_name(kind(name)) == name
    call(contract, "fn", dict(x=a(33, 64, dtype=name, kind=kind)))


def test_dtype_name_of_what_numpy_has():
    assert contract.dtype_name(np.dtype("float32")) == "float32"
    assert contract.dtype_name(np.dtype("int64")) == "int64"
    assert contract.dtype_name(["unhashable"]) == "['unhashable']"


def test_dtype_name_is_remembered():
    dtype = Named("float16")
    assert contract.dtype_name(dtype) == "float16"
    dtype.name = "changed"
    assert contract.dtype_name(dtype) == "float16"


def test_a_traced_size_is_not_a_host_integer():
    tracer = Array((), Named("int32"))  # a shape, but no item(): nothing that the host can read
    for overrides in (dict(max_seqlen=tracer), dict(pad_slot_id=tracer)):
        with pytest.raises(TypeError, match=f"^{next(iter(overrides))}: {HOST}, got "):
            call(contract, "fn", overrides)


def test_arrays_are_not_read():
    """NumPy arrays that own no memory: reading an element would crash or fail."""

    def hollow(*shape, dtype="float32"):
        return np.lib.stride_tricks.as_strided(np.empty(0, dtype), shape, (0,) * len(shape))

    sizes = contract.check_causal_conv1d_fn(
        hollow(1 << 40, 8192),
        hollow(8192, 4),
        hollow(8192),
        hollow(1 << 30, 3, 8192),
        hollow(1 << 20, dtype="int64"),
        hollow((1 << 20) - 1, dtype="int32"),
        hollow((1 << 20) - 1, dtype="bool"),
    )
    assert sizes == FnSizes(1 << 40, 8192, 4, (1 << 20) - 1, 1 << 30, 3)


def test_unsupported_is_not_an_argument_error():
    assert issubclass(Unsupported, NotImplementedError)
    assert not issubclass(Unsupported, (ValueError, TypeError))


def test_output_has_two_named_fields():
    assert ConvOutput._fields == ("out", "conv_states")
    assert ConvWindowOutput._fields == ("out", "conv_states", "window_out")


def test_signatures():
    """The contract's own signatures, word for word: nothing may change them by accident."""
    assert signatures(contract) == SIGNATURES


def test_roles():
    assert roles(contract) == ROLES
    for record in contract.RECORDS.values():
        assert sorted(record.ARRAYS + record.OPTIONS) == sorted(record._fields)
        assert set(record.INDICES) | set(record.WRITTEN) < set(record.ARRAYS) or record is contract.LinksCall
        assert tuple(record.KINDS) == record._fields


# Mutation: one damaged copy of the contract for each place and kind of damage.

NEIGHBOURS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


def damages(node):
    """Yields (what, function that damages a node of this kind in place)."""
    if isinstance(node, ast.If):
        for value in (True, False):
            yield f"if {value}", lambda n, value=value: setattr(n, "test", ast.Constant(value))
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in NEIGHBOURS[type(op)]:
                yield (
                    f"{type(op).__name__} -> {other.__name__}",
                    lambda n, i=i, o=other: operator.setitem(n.ops, i, o()),
                )
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} -> {other.__name__}", lambda n, o=other: setattr(n, "op", o())
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call deleted", lambda n: setattr(n, "value", ast.Constant(None))
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield "error type", lambda n: setattr(n.exc, "func", ast.Name("RuntimeError", ast.Load()))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number + 1", lambda n: setattr(n, "value", n.value + 1)


def is_check(node):
    if isinstance(node, ast.FunctionDef):
        return node.name not in (
            "check_fn_values",
            "check_update_values",
            "check_commit_values",
        )  # about to go
    return isinstance(node, ast.ClassDef) and node.decorator_list


def mutants(source):
    """Yields (description, syntax tree) of each damaged copy of the functions and records in a source text."""
    tree = ast.parse(source)
    for i in [i for i, node in enumerate(tree.body) if is_check(node)]:
        for j, node in enumerate(ast.walk(tree.body[i])):
            for what, damage in damages(node):
                check = copy.deepcopy(tree.body[i])
                damage(next(n for k, n in enumerate(ast.walk(check)) if k == j))
                mutant = ast.Module(
                    [*tree.body[:i], ast.fix_missing_locations(check), *tree.body[i + 1 :]], []
                )
                text = ast.get_source_segment(source, node).split("\n")[0]
                yield f"line {node.lineno}: {what}: {text}", mutant


def load(tree, **names):
    """Runs a syntax tree as a module, in which `names` then stand for others."""
    module = types.ModuleType("damaged_contract")
    exec(compile(tree, "<damaged contract>", "exec", dont_inherit=True), module.__dict__)
    module.__dict__.update(names)
    return module


def damaged_contracts():
    """Yields (description, a contract with one place damaged in it, or in what it checks values by)."""
    for description, tree in mutants(inspect.getsource(contract)):
        try:
            yield description, load(tree)
        except Exception:  # damage to what makes a record: the module does not even load
            continue
    sound = ast.parse(inspect.getsource(contract))
    for description, tree in mutants(inspect.getsource(contract_values)):
        yield description, load(sound, contract_values=load(tree))


def first_difference(module):
    """Returns the first row of the tables on which a copy of the contract answers otherwise, or None."""
    if signatures(module) != SIGNATURES:
        return "signature", signatures(module)
    if roles(module) != ROLES:
        return "roles", roles(module)
    for operation, overrides, sizes in ACCEPTED:
        try:
            result = call(module, operation, overrides)
        except Exception as error:
            return operation, overrides, error
        if result != sizes:
            return operation, overrides, result
    for operation, overrides, error, text in REJECTED:
        try:
            result = call(module, operation, overrides)
        except Exception as caught:
            own = getattr(module, error.__name__, error)  # the damaged module has an Unsupported of its own
            if (type(caught), str(caught)) != (own, text):
                return operation, overrides, caught
        else:
            return operation, overrides, result
    return None


# Damage that changes nothing a caller can see, each with its reason.
HARMLESS = {
    "if False: if type(value) is int:": "a shortcut for the common case; operator.index gives the same",
}


def test_tables_notice_every_damaged_check():
    assert first_difference(load(ast.parse(inspect.getsource(contract)))) is None
    survivors, count = [], 0
    for description, damaged in damaged_contracts():
        count += 1
        if first_difference(damaged) is None:
            survivors.append(description)
    unexplained = [s for s in survivors if s.partition(": ")[2] not in HARMLESS]
    assert not unexplained, "\n".join(["no row of the tables notices:", *unexplained])
    stale = [h for h in HARMLESS if h not in {s.partition(": ")[2] for s in survivors}]
    assert not stale, f"listed as harmless, but noticed or gone: {stale}"
    assert count > 150
