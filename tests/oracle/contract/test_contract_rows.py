"""Checks of the differentiable `causal_conv1d`: what passes, and for each error its exact type and text."""

import pytest

from oracle.contract import RowSizes
from tests.tools.contract_calls import DENSE, DTYPES, F32, I32, I64, a, accepts, name_rows, rejects

ACCEPTED = [
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
]

REJECTED = [
    # the differentiable form
    ("rows", dict(x=a(1, 33, 64)), ValueError, "x: expected shape [tokens, dim], got [1, 33, 64]"),
    ("rows", dict(x=a(33, 64, dtype="float64")), TypeError, f"x: {DTYPES}, got float64"),
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
    *(
        (
            "rows",
            DENSE | dict(x=x),
            ValueError,
            f"x: expected shape [batch, seqlen, dim] with dim >= 1, since query_start_loc is None, got {list(x.shape)}",
        )
        for x in (a(35, 64), a(5, 7, 0), a(1, 5, 7, 64))
    ),
]


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)
