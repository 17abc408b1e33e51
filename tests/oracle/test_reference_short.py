"""The reference of `short_conv`: documents are rows of `causal_conv1d` alone, padding ends a shorter row, layouts are layouts."""

import itertools
import re

import numpy as np
import pytest

from oracle import reference_grad
from oracle.numerics import rounded
from oracle.reference_short import short_conv
from tests.tools import short_conv_cases as cases


def alone(arrays, rows, activation):
    """(out, cache) of every document as a call of its own."""
    x, weight, bias = arrays["x"], arrays["weight"], arrays["bias"]
    history = weight.shape[1] - 1
    cache = arrays.get("cache", np.zeros((len(x), history, x.shape[2]), np.float32))
    out, new, columns = np.zeros_like(x), np.zeros_like(cache), cache.shape[1]
    for row in range(len(x)):
        for number, (begin, end) in enumerate(itertools.pairwise(cases.cuts(row, rows, x.shape[1]))):
            window = cache[row] if number == 0 else np.zeros_like(cache[row])
            part = x[row : row + 1, begin:end]
            initial = window[None, columns - history :]
            found = reference_grad.causal_conv1d(part, weight, bias, initial, activation=activation)
            out[row, begin:end] = found.out[0]
            new[row] = np.concatenate([window, part[0]])[-columns:] if columns else new[row]
    return out, new


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: "-".join(map(str, case)))
def test_documents_and_padding_are_rows_alone(case, width):
    rows, cached, weight_layout, cache_layout, extra = case
    activation = "silu" if cached else None
    arrays = cases.inputs(width, cached, extra)
    given = cases.in_layout(arrays, weight_layout, cache_layout) | cases.ROWS[rows]
    out, new = short_conv(
        **given, weight_layout=weight_layout, cache_layout=cache_layout, activation=activation
    )
    want, kept = alone(arrays, cases.ROWS[rows], activation)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(new if cache_layout == "time" else new.swapaxes(1, 2), kept)


def test_a_row_without_batch_and_no_cache_wanted():
    arrays = cases.inputs()
    whole = short_conv(**arrays)
    one = short_conv(arrays["x"][1], arrays["weight"], arrays["bias"], cache=arrays["cache"][1])
    np.testing.assert_array_equal(one.out, whole.out[1])
    np.testing.assert_array_equal(one.conv_states, whole.conv_states[1])
    assert short_conv(**arrays, want_cache=False).conv_states is None


def test_results_are_rounded_once_to_their_formats():
    arrays = {name: rounded(a, "bfloat16") for name, a in cases.inputs().items()}
    exact = short_conv(**{name: _float32(a) for name, a in arrays.items()})
    got = short_conv(**arrays)
    np.testing.assert_array_equal(got.out.bits, rounded(exact.out, "bfloat16").bits)
    np.testing.assert_array_equal(got.conv_states.bits, rounded(exact.conv_states, "bfloat16").bits)


def _float32(array):
    return reference_grad.float64(array).astype(np.float32)


def test_padding_may_hold_anything():
    arrays = cases.inputs()
    want = short_conv(**arrays, lengths=cases.LENGTHS)
    arrays["x"][0, 5:], arrays["x"][1, 1:] = np.nan, np.inf
    for found, wanted in zip(short_conv(**arrays, lengths=cases.LENGTHS), want, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("changes", "error", "text"), cases.REFUSED)
def test_bad_input(changes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        short_conv(**cases.inputs() | changes)
