"""Checks of `tree_parents_from_links`: what passes, and for each error its exact type and text."""

import pytest

from oracle.contract import LinksSizes
from tests.tools.contract_calls import F32, I32, I64, INDEX, a, accepts, name_rows, rejects

ACCEPTED = [
    ("links", {}, LinksSizes(5, 7)),
    ("links", dict(next_token=a(0, 7, dtype=I64), next_sibling=a(0, 7, dtype="int16")), LinksSizes(0, 7)),
]

REJECTED = [
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
]


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)
