"""Every check of oracle/contract.py: what passes, and for each error its exact type and text.

The arrays are stand-ins of a shape and a dtype, which is all that the checks may read. The tables are shown
to be complete by mutation: the contract's syntax tree is damaged in one place at a time, and some row must notice.
"""

import ast
import copy
import inspect
import operator
import types
from typing import NamedTuple

import numpy as np
import pytest

from oracle import contract
from oracle.contract import ConvOutput, FnSizes, RowSizes, Unsupported, UpdateSizes


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

ACCEPTED = [
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


REJECTED = [
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

OPERATIONS = {
    "fn": ("check_causal_conv1d_fn", FN),
    "update": ("check_causal_conv1d_update", UPDATE),
    "rows": ("check_causal_conv1d", ROWS),
    "backend": ("check_backend", dict(names=("triton", "eager"))),
    "fn_values": (
        "check_fn_values",
        dict(
            query_start_loc=[0, 1, 1, 4],
            cache_indices=[4, 4, 2],
            tokens=6,
            num_slots=5,
            pad_slot_id=-1,
            max_seqlen=None,
        ),
    ),
    "update_values": (
        "check_update_values",
        dict(cache_indices=[4, 0, 2], sizes=UpdateSizes(3, 1, 64, 4, 5, 3, 3), pad_slot_id=-1),
    ),
}


SIGNATURES = {
    "check_causal_conv1d_fn": "(x, weight, bias, conv_states, query_start_loc, cache_indices=None, "
    "has_initial_state=None, *, activation=None, pad_slot_id=-1, max_seqlen=None, schedule='auto', "
    "backend='auto', validate=False, state_layout='front', cache_seqlens=None, write_indices=None, "
    "empty_rows='skip', snapshot_indices=None, snapshot_block_size=None, num_computed_tokens=None, "
    "track_indices=None, track_lengths=None, residual=None, channel_offset=None, split_sizes=None) -> 'FnSizes'",
    "check_causal_conv1d_update": "(x, weight, bias, conv_states, cache_indices=None, *, "
    "query_start_loc=None, num_accepted_tokens=None, max_seqlen=None, activation=None, pad_slot_id=-1, "
    "backend='auto', validate=False, state_layout='front', cache_seqlens=None, write_indices=None, "
    "track_indices=None, window_out=None, window_indices=None, commit=True, tree_parents=None, residual=None, "
    "channel_offset=None, split_sizes=None) -> 'UpdateSizes'",
    "check_commit_windows": "(conv_states, window_out, accepted_steps, cache_indices=None, window_indices=None, *, "
    "pad_slot_id=-1, backend='auto', validate=False) -> 'CommitSizes'",
    "check_tree_parents_from_links": "(next_token, next_sibling) -> 'tuple[int, int]'",
    "check_causal_conv1d": "(x, weight, bias=None, initial_states=None, query_start_loc=None, *, "
    "activation=None, max_seqlen=None, schedule='auto', backend='auto') -> 'RowSizes'",
}


def signatures(module):
    return {name: str(inspect.signature(getattr(module, name))) for name in SIGNATURES}


def call(module, operation, overrides):
    name, base = OPERATIONS[operation]
    return getattr(module, name)(**{**base, **overrides})


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


def test_signatures():
    """The contract's own signatures, word for word: nothing may change them by accident."""
    assert signatures(contract) == SIGNATURES


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


def mutants(source):
    """Yields (description, syntax tree) of each damaged copy of the functions in a source text."""
    tree = ast.parse(source)
    functions = [i for i, node in enumerate(tree.body) if isinstance(node, ast.FunctionDef)]
    for i in functions:
        for j, node in enumerate(ast.walk(tree.body[i])):
            for what, damage in damages(node):
                mutant = copy.deepcopy(tree)
                target = next(n for k, n in enumerate(ast.walk(mutant.body[i])) if k == j)
                damage(target)
                text = ast.get_source_segment(source, node).split("\n")[0]
                yield f"line {node.lineno}: {what}: {text}", ast.fix_missing_locations(mutant)


def load(tree):
    module = types.ModuleType("damaged_contract")
    exec(compile(tree, "<damaged contract>", "exec", dont_inherit=True), module.__dict__)
    return module


def first_difference(module):
    """Returns the first row of the tables on which a copy of the contract answers otherwise, or None."""
    if signatures(module) != SIGNATURES:
        return "signature", signatures(module)
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
            if (type(caught), str(caught)) != (error, text):
                return operation, overrides, caught
        else:
            return operation, overrides, result
    return None


# Damage that changes nothing a caller can see, each with its reason.
HARMLESS = {
    "if False: if type(value) is int:": "a shortcut for the common case; operator.index gives the same",
}


def test_tables_notice_every_damaged_check():
    source = inspect.getsource(contract)
    assert first_difference(load(ast.parse(source))) is None
    survivors, count = [], 0
    for description, tree in mutants(source):
        count += 1
        if first_difference(load(tree)) is None:
            survivors.append(description)
    unexplained = [s for s in survivors if s.partition(": ")[2] not in HARMLESS]
    assert not unexplained, "\n".join(["no row of the tables notices:", *unexplained])
    stale = [h for h in HARMLESS if h not in {s.partition(": ")[2] for s in survivors}]
    assert not stale, f"listed as harmless, but noticed or gone: {stale}"
    assert count > 150
