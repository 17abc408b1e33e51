"""What Triton's interpreters of several versions ask of kernels, asked for under each of them (tests/conftest.py)."""

import importlib
import pkgutil

import pytest
import torch
import triton
import triton.language as tl

import triton_impl
from triton_impl.records import holds


@triton.jit
def _copy_kernel(x, out, count, bare: tl.constexpr):
    lane = tl.arange(0, 4)
    if bare:
        mask = (lane < 3) & (count > 1)
    else:
        mask = (lane < 3) & holds(count > 1)
    tl.store(out + lane, tl.load(x + lane, mask=mask, other=0.0), mask=lane < 4)


@pytest.mark.parametrize(("count", "expected"), [(1, [0, 0, 0, 0]), (2, [1, 2, 3, 0])])
def test_a_condition_on_a_scalar_masks_lanes(count, expected):
    x, out = torch.tensor([1.0, 2, 3, 4]), torch.empty(4)
    _copy_kernel[(1,)](x, out, count, False)
    assert out.tolist() == expected


def test_a_mask_of_integers_is_refused_under_every_version():
    with pytest.raises(Exception, match="mask"):
        _copy_kernel[(1,)](torch.ones(4), torch.empty(4), 2, True)


@triton.jit
def _shapes_kernel(out, rows: tl.constexpr, lanes: tl.constexpr):
    tile = tl.arange(0, rows)[:, None] * lanes + tl.arange(0, lanes)[None, :]
    tl.static_assert(tile.shape[0] == rows and tile.shape[1] == lanes and tile.numel == rows * lanes)
    tl.store(out + tile, tile.to(tl.float32))


@pytest.mark.parametrize(("rows", "lanes"), [(2, 4), (4, 2), (8, 1)])
def test_what_is_kept_of_a_shape_is_that_shape(rows, lanes):
    out = torch.empty(rows * lanes)
    _shapes_kernel[(1,)](out, rows, lanes)
    assert out.tolist() == list(range(rows * lanes))


def test_no_field_of_a_record_is_an_attribute_of_tritons_tuples():
    """Under Triton 3.9 `record.values` is the list of all fields."""
    taken = {name for name in dir(tl.core.tuple([])) if not name.startswith("__")}
    assert "values" in taken
    records = {}
    for found in pkgutil.iter_modules(triton_impl.__path__):
        module = importlib.import_module(f"triton_impl.{found.name}")
        records |= {value: value._fields for value in vars(module).values() if hasattr(value, "_fields")}
    kernels = {r: f for r, f in records.items() if r.__module__.startswith("triton_impl.")}
    assert len(kernels) > 10
    assert {
        record.__name__: {*fields} & taken for record, fields in kernels.items() if {*fields} & taken
    } == {}
