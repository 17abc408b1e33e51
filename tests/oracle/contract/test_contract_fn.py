"""Checks of `causal_conv1d_fn`: what passes, and for each error its exact type and text."""

import numpy as np
import pytest

from oracle.contract import FnSizes
from tests.tools.contract_calls import (
    BOOL,
    BOTH_ACCEPTED,
    BOTH_REJECTED,
    DTYPES,
    F32,
    FN_SIZES,
    HOST,
    I32,
    I64,
    INDEX,
    NO_POOL,
    NOT_FRONT,
    RING,
    ROW_I32,
    SHARED,
    SNAPSHOTS,
    STATELESS,
    Printed,
    a,
    accepts,
    name_rows,
    rejects,
)

ACCEPTED = [
    *(("fn", more, FN_SIZES) for more in BOTH_ACCEPTED),
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
    ("fn", {}, FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", NO_POOL, FnSizes(33, 64, 4, 5, 0, 0)),
    ("fn", dict(bias=None, has_initial_state=None), FnSizes(33, 64, 4, 5, 8, 3)),
    ("fn", dict(cache_indices=None, conv_states=a(5, 3, 64)), FnSizes(33, 64, 4, 5, 5, 3)),
    ("fn", dict(conv_states=a(8, 9, 64)), FnSizes(33, 64, 4, 5, 8, 9)),
    ("fn", dict(conv_states=a(0, 3, 64)), FnSizes(33, 64, 4, 5, 0, 3)),
    ("fn", dict(x=a(0, 64)), FnSizes(0, 64, 4, 5, 8, 3)),
    ("fn", dict(x=a(64, 64)), FnSizes(64, 64, 4, 5, 8, 3)),
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
    ("fn", dict(max_seqlen=np.int64(17), pad_slot_id=np.int8(-1)), FnSizes(33, 64, 4, 5, 8, 3)),
    # Values. Base: lengths 1, 0, 3 of 6 tokens in slots 4, 4, 2 of 5.
    ("fn_values", dict(write_indices=[0, 1, 3]), None),
    ("fn_values", dict(write_indices=[0, 0, -1]), None),
    # row 1 writes nothing, row 2 stores nothing
    (
        "fn_values",
        dict(write_indices=[0, 99, 3], cache_indices=[4, -1, 4], has_initial_state=[True] * 3),
        None,
    ),
    ("fn_values", dict(write_indices=[4, 1, 2], has_initial_state=[True] * 3), None),
    # in place
    ("fn_values", dict(write_indices=[2, 1, 4]), None),
    # rows without state read nothing
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
    ),
    # row 1 has its state where it belongs
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
]

REJECTED = [
    *(("fn", *row) for row in BOTH_REJECTED),
    (
        "fn",
        dict(x=a(64, 33)),
        ValueError,
        "x: expected dim=64, as the weight has, on the last axis, got [64, 33] (transposed?)",
    ),
    (
        "fn",
        dict(empty_rows="clear"),
        ValueError,
        "empty_rows: expected one of ('skip', 'apply'), got 'clear'",
    ),
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
    # x
    ("fn", dict(x=None), TypeError, "x: expected an array, got NoneType"),
    ("fn", dict(x=a(64)), ValueError, "x: expected shape [tokens, dim], got [64]"),
    ("fn", dict(x=a(1, 33, 64)), ValueError, "x: expected shape [tokens, dim], got [1, 33, 64]"),
    ("fn", dict(x=a(33, 0)), ValueError, "x: expected shape [tokens, dim] with dim >= 1, got [33, 0]"),
    ("fn", dict(x=a(33, 64, dtype="float64")), TypeError, f"x: {DTYPES}, got float64"),
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
    ("fn", dict(max_seqlen=-1), ValueError, "max_seqlen: expected None or an integer >= 0, got -1"),
    ("fn", dict(max_seqlen="17"), TypeError, f"max_seqlen: {HOST}, got '17'"),
    ("fn", dict(max_seqlen=False), TypeError, f"max_seqlen: {HOST}, got False"),
    (
        "fn",
        dict(schedule="fast"),
        ValueError,
        "schedule: expected one of ('auto', 'per_sequence', 'flat'), got 'fast'",
    ),
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
]


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)
