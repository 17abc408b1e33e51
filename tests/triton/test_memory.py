"""conftest.py's promises to torch files: poisoned memory, Triton's interpreter, fixed seeds."""

import os

import pytest
import torch


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(33, 7),
        lambda: torch.empty(5, dtype=torch.bfloat16),
        lambda: torch.empty_like(torch.zeros(3, 4, dtype=torch.float16)),
        lambda: torch.zeros(3).new_empty(6),
        lambda: torch.empty_strided((4, 3), (1, 4)),
        lambda: torch.zeros(2).resize_(9)[2:],
    ],
    ids=["empty", "bfloat16", "empty_like", "new_empty", "empty_strided", "resize_"],
)
def test_fresh_floats_are_nan(make):
    assert make().isnan().all()


def test_fresh_integers_are_out_of_every_range():
    assert (torch.empty(9, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_triton_is_interpreted():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("attempt", [1, 2])
def test_every_test_starts_from_the_same_seed(attempt):
    assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(0)).item()
