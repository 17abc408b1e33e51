"""`short_conv`: the oracle's values for documents, padding, caches and layouts; gradients; bad input."""

import itertools
import re

import numpy as np
import pytest
import torch

from oracle import reference_short
from oracle.contract_checks import dtype_name
from tests.tools import short_conv_cases as cases
from triton_impl import causal_conv1d, short_conv


def tensors(arrays, **options):
    return {name: torch.tensor(np.ascontiguousarray(a), **options) for name, a in arrays.items()}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: "-".join(map(str, case)))
def test_documents_and_padding_are_rows_alone(case, backend):
    rows, cached, weight_layout, cache_layout, extra = case
    given = cases.in_layout(cases.inputs(cached=cached, extra=extra), weight_layout, cache_layout)
    given |= cases.ROWS[rows]
    options = dict(
        weight_layout=weight_layout, cache_layout=cache_layout, activation="silu" if cached else None
    )
    out, cache = short_conv(**tensors(given), **options, backend=backend)
    want, new = reference_short.short_conv(**given, **options)
    np.testing.assert_allclose(out.numpy(), want, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(cache.numpy(), new)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("rows", cases.ROWS)
def test_gradients_are_those_of_rows_alone(rows, backend):
    """Each document as a call of its own: one graph against the other."""
    sums = []
    for alone in (False, True):
        a = tensors(cases.inputs(), requires_grad=True)
        if not alone:
            out, new = short_conv(**a, **tensors(cases.ROWS[rows]), activation="silu", backend=backend)
            loss = (out**2).sum() + (new**3).sum()
        else:
            loss = 0.0
            for row in range(cases.BATCH):
                edges = cases.cuts(row, cases.ROWS[rows], cases.SEQLEN)
                for begin, end in itertools.pairwise(edges):
                    window = a["cache"][row : row + 1] if begin == 0 else None
                    out, new = causal_conv1d(
                        a["x"][row : row + 1, begin:end], a["weight"], a["bias"], window, activation="silu", backend=backend
                    )  # fmt: skip
                    loss = loss + (out**2).sum()
                loss = loss + (new**3).sum()
        loss.backward()
        sums.append({name: tensor.grad for name, tensor in a.items()})
    for name, gradient in sums[0].items():
        torch.testing.assert_close(gradient, sums[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_padding_may_hold_anything():
    a = tensors(cases.inputs(), requires_grad=True)
    with torch.no_grad():
        a["x"][0, 5:], a["x"][1, 1:] = torch.nan, torch.inf
    out, new = short_conv(**a, lengths=torch.tensor(cases.LENGTHS), activation="silu")
    (out.sum() + new.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in a.values())
    assert not a["x"].grad[0, 5:].any()


def test_a_row_without_batch_and_no_cache_wanted():
    a = tensors(cases.inputs())
    whole = short_conv(**a)
    one = short_conv(a["x"][1], a["weight"], a["bias"], cache=a["cache"][1])
    assert torch.equal(one.out, whole.out[1])
    assert torch.equal(one.conv_states, whole.conv_states[1])
    assert short_conv(**a, want_cache=False).conv_states is None


@pytest.mark.parametrize(("changes", "error", "text"), cases.REFUSED)
def test_bad_input(changes, error, text):
    a = tensors(cases.inputs()) | {
        name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in changes.items()
    }
    with pytest.raises(error, match=re.escape(text)):
        short_conv(**a)


def test_it_compiles_whole():
    a = tensors(cases.inputs())
    ids = torch.tensor(cases.IDS)
    dtype_name(np.dtype("float32"))  # NumPy's dtypes among the known ones are no obstacle
    compiled = torch.compile(
        lambda a, ids: short_conv(**a, segment_ids=ids, activation="silu"),
        fullgraph=True,
        backend="aot_eager",
    )
    got, want = compiled(a, ids), short_conv(**a, segment_ids=ids, activation="silu")
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.conv_states, want.conv_states)
