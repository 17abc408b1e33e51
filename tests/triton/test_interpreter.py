"""What Triton's interpreters of several versions ask of kernels, asked for under each of them (tests/conftest.py)."""

import contextlib
import importlib
import itertools
import pkgutil

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import triton_impl
from tests.tools import quick_triton
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


LITERALS = [
    0,
    1,
    -3,
    2**31 - 1,
    2**31,
    -(2**40),
    True,
    0.0,
    -0.0,
    1.5,
    1e-45,
    float("inf"),
    tl.constexpr(5),
    tl.constexpr(-2.5),
]
DTYPES = (
    tl.int1, tl.uint16, tl.int32, tl.uint32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.pointer_type(tl.float32)
)  # fmt: skip


def operand(dtype, shape):
    """A scalar, or a block of this shape, of small numbers, some of them negative."""
    data = (np.arange(np.prod(shape or (1,))).reshape(shape or (1,)) - 2).astype(
        np.uint64 if dtype.is_ptr() else interpreter._get_np_dtype(dtype)
    )
    return tl.tensor(
        interpreter.TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype
    )


def told(operation, *operands):
    """All that there is to know of a result, or the error."""
    try:
        found = operation(*operands)
    except Exception as error:
        return type(error)
    data = found.handle.data
    facts = str(found.type), str(found.dtype), [int(size) for size in found.shape], str(found.handle.dtype)
    return *facts, data.dtype, data.shape, data.tobytes()


@contextlib.contextmanager
def within_a_launch():
    scope = interpreter._patch_lang(_shapes_kernel.fn)
    try:
        yield
    finally:
        scope.restore()


KNOWN = pytest.mark.skipif(not quick_triton.IS_KNOWN, reason="another Triton: its own operations are used")
SHAPES = ((), (1,), (4,), (2, 4), (2, 1))
OPERANDS = [(dtype, shape) for dtype in DTYPES for shape in SHAPES]


@KNOWN
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick_triton.OPERATORS)
def test_quick_operators_are_triton_s(name):
    """tests/tools/quick_triton.py stands in for operators of the interpreter in these files."""
    with within_a_launch():
        quick = getattr(tl.tensor, name)
        for left, right in itertools.product(OPERANDS, [*OPERANDS, *LITERALS]):
            given = operand(*left), operand(*right) if isinstance(right, tuple) else right
            assert told(quick, *given) == told(quick.slow, *given), (left, right)


@KNOWN
def test_quick_casts_are_triton_s():
    with within_a_launch():
        quick = tl.cast
        assert tl.tensor.to.__code__ is quick.__code__
        for (source, shape), target, bitcast in itertools.product(OPERANDS, DTYPES, (False, True)):
            given = operand(source, shape), target, None, bitcast
            assert told(quick, *given) == told(quick.slow, *given), (source, shape, target, bitcast)


@KNOWN
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["where", "fma"])
def test_quick_functions_of_three_are_triton_s(name):
    dtypes = (tl.float32,) if name == "fma" else (tl.float32, tl.bfloat16, tl.int32)
    with within_a_launch():
        quick = getattr(tl, name)
        firsts = [(dtype, shape) for dtype in (tl.int1, *dtypes[:1]) for shape in ((), (4,), (2, 4))]
        others = [*((dtype, shape) for dtype in dtypes for shape in ((), (4,), (2, 4))), 1, -0.0, 2.5]
        for row in itertools.product(firsts, others, others):
            given = [operand(*one) if isinstance(one, tuple) else one for one in row]
            assert told(quick, *given) == told(quick.slow, *given), row
        for one, two in itertools.product(
            others, others
        ):  # what compares scalars has another dtype than its handle
            given = [operand(*each) if isinstance(each, tuple) else each for each in (one, two)]
            compared = operand(tl.int32, ()) > 1
            assert told(quick, compared, *given) == told(quick.slow, compared, *given), (one, two)


@KNOWN
def test_quick_loads_are_triton_s():
    held = torch.arange(16, dtype=torch.int16)
    with within_a_launch():
        quick = tl.load
        for dtype, (shape, size), other in itertools.product(
            (tl.int16, tl.float16, tl.bfloat16),
            [((4,), (4,)), ((2, 4), (2, 4)), ((2, 4), (2, 1)), ((4,), ())],
            (0, 0.0, 1, None),
        ):
            places = (np.arange(np.prod(shape)).reshape(shape) * 2 + held.data_ptr()).astype(np.uint64)
            kind = tl.pointer_type(dtype)
            pointer = tl.tensor(interpreter.TensorHandle(places, kind), tl.block_type(kind, list(shape)))
            row = pointer, operand(tl.int1, size), other
            assert told(quick, *row) == told(quick.slow, *row), (dtype, shape, size, other)
