"""Grids whose axis of rows is too short for them: the programs are folded into the first axis, with equal results."""

import pytest
import torch

import triton_impl
from triton_impl import call as calls
from triton_impl import launch, prefill, update, verify

DIM = 648  # the last block of channels is not full


def run(operation, limit, monkeypatch):
    """(outputs and pool of a call on fixed data, whether a grid was folded) where an axis holds `limit` programs."""
    folded = []
    real = launch.program_grid

    def grid(*args):
        result = real(*args)
        folded.append(result[1])
        return result

    generator = torch.Generator().manual_seed(4)
    x, weight = torch.randn(14, DIM, generator=generator), torch.randn(DIM, 4, generator=generator)
    pool = torch.randn(9, 3, DIM, generator=generator)
    starts = torch.tensor([0, 2, 2, 7, 12], dtype=torch.int32)
    slots = torch.tensor([4, 1, 8, 0])
    monkeypatch.setattr(launch, "MAX_GRID_YZ", limit)
    for module in (prefill, update, verify):
        monkeypatch.setattr(module, "program_grid", grid)
    calls.forget()
    result = operation(x, weight, pool, starts, slots)
    calls.forget()
    monkeypatch.undo()
    return result, any(folded)


OPERATIONS = {
    "flat": lambda x, w, p, q, s: triton_impl.causal_conv1d_fn(
        x, w, None, p, q, s, schedule="flat", backend="triton"
    ),
    "per_sequence": lambda x, w, p, q, s: triton_impl.causal_conv1d_fn(
        x, w, None, p, q, s, schedule="per_sequence", backend="triton"
    ),
    "split": lambda x, w, p, q, s: triton_impl.causal_conv1d_fn(
        x, w, None, p, q, s, split_sizes=(200, 448), backend="triton"
    ),
    "update": lambda x, w, p, q, s: triton_impl.causal_conv1d_update(x[:4], w, None, p, s, backend="triton"),
    "packed update": lambda x, w, p, q, s: triton_impl.causal_conv1d_update(
        x, w, None, p, s, query_start_loc=q, backend="triton"
    ),
    "residual": lambda x, w, p, q, s: triton_impl.causal_conv1d_update(
        x, w, None, p, s, query_start_loc=q, residual=x, max_seqlen=5, backend="triton"
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_folded_programs_compute_the_same(operation, monkeypatch):
    plain, folded = run(operation, 65535, monkeypatch)
    assert not folded
    few, folded = run(operation, 3, monkeypatch)
    assert folded
    outs = [r.out if isinstance(r.out, tuple) else (r.out,) for r in (plain, few)]
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.conv_states, few.conv_states)
