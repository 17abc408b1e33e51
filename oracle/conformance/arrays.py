"""Arguments with their memory: a strided view on a guarded base buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from oracle.numerics import FORMATS, TypedArray, storage_dtype

GUARD = 64  # elements before and after; a multiple of 16 bytes for every dtype, so data stay aligned
POISON_BITS = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}  # the canonical quiet NaN
MARK_BITS = {
    "float32": 0x47000000,
    "float16": 0x7800,
    "bfloat16": 0x4700,
}  # 32768: shows up if a NaN lands on it


@dataclass
class Array:
    """One argument: where its elements lie in a flat buffer, and everything around them.

    An implementation on a device copies `base` as a whole and rebuilds the view from `offset`, `shape` and
    `strides` (as in torch.as_strided); one without strides takes `data`.

    Attributes:
      dtype: dtype name; bfloat16 is stored as uint16 bits.
      base: flat storage; what is not part of the view is NaN (floats) or a wrong but tempting index.
      offset, shape, strides: the view, in elements.
      sparse: the base is huge and mostly untouched zero pages; only the view can be compared.
    """

    dtype: str
    base: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sparse: bool = False

    @property
    def data(self) -> np.ndarray:
        """The logical array, a view of `base`."""
        step = self.base.itemsize
        return np.ndarray(
            self.shape, self.base.dtype, self.base, self.offset * step, [s * step for s in self.strides]
        )

    @property
    def typed(self) -> TypedArray:
        """The logical array as a contiguous copy with its dtype name."""
        return TypedArray(self.dtype, np.ascontiguousarray(self.data))

    @property
    def contiguous(self) -> bool:
        return self.data.flags.c_contiguous

    def copy(self) -> Array:
        return Array(self.dtype, self.base.copy(), self.offset, self.shape, self.strides)


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Bits that must be neither read nor written: NaN and a large number in turn.

    A NaN shows that it was read; over the number, a NaN shows that it was written.
    """
    bits = np.full(shape, POISON_BITS[dtype], FORMATS[dtype].bits)
    if len(shape) == 1:
        bits[1::2] = MARK_BITS[dtype]
    elif shape:
        bits[np.indices(shape).sum(axis=0) % 2 == 1] = MARK_BITS[dtype]
    return bits


def plain(array: TypedArray | np.ndarray, poison: int | None = None) -> Array:
    """A contiguous argument with guards on both sides."""
    if not isinstance(array, TypedArray):
        array = TypedArray(array.dtype.name, array)
    return place(array, "contiguous", poison)


def place(array: TypedArray, layout: str, poison: int | None = None) -> Array:
    """Lays an array out in guarded memory.

    Layouts (the last axis is called channel, the first row):
      contiguous; misaligned (one element later); slice (a part of wider, 16-byte-aligned rows; of one axis: a
      column of a table); slice_odd (of rows of an odd pitch); transposed (two axes: rows have unit stride;
      three: the last two axes change places); transposed_pages (the same inside pages); pages (each entry of
      the first axis in a page of its own, with foreign data between); every_other (every second entry of the
      first axis); odd_unit_axis (axes of size 1 have a meaningless stride); huge_pitch_N (entries of the first
      axis are 2**N elements apart).

    Raises:
      ValueError: no such layout.
    """
    shape = array.data.shape
    strides = _strides(shape, layout)
    extent = 1 + sum((max(n, 1) - 1) * s for n, s in zip(shape, strides, strict=True))
    offset = GUARD + {"misaligned": 1, "slice": 8}.get(layout, 0)
    sparse = layout.startswith("huge_pitch_")
    count = offset + extent + GUARD
    base = (
        np.zeros(count, storage_dtype(array.dtype)) if sparse else _surroundings(array.dtype, count, poison)
    )
    placed = Array(array.dtype, base, offset, tuple(shape), tuple(strides), sparse)
    placed.data[...] = array.data
    return placed


def _strides(shape: tuple[int, ...], layout: str) -> list[int]:
    axes = list(range(len(shape)))
    if layout in ("transposed", "transposed_pages") and len(shape) > 1:
        axes[-2:] = reversed(axes[-2:])
    strides, step = [0] * len(shape), 1
    for axis in reversed(axes):
        strides[axis] = step
        step *= max(shape[axis], 1)
    rows = max(len(shape) - 2, 0)  # the axis whose entries are rows of channels
    match layout:
        case "contiguous" | "misaligned":
            pass
        case "slice" | "slice_odd" | "transposed" if len(shape) == 1:
            strides = [3]
        case "slice" | "slice_odd":
            wide = (2 * max(shape[-1], 1) + 15) // 16 * 16 if layout == "slice" else 2 * max(shape[-1], 1) + 3
            strides[rows] = wide
            if rows:
                strides[0] = wide * max(shape[1], 1)
        case "transposed":
            pass
        case "pages" | "transposed_pages":
            strides[0] = 2 * strides[0] + 16
        case "every_other":
            strides[0] *= 2
        case "odd_unit_axis":
            strides = [7 if n == 1 else s for n, s in zip(shape, strides, strict=True)]
        case _ if layout.startswith("huge_pitch_"):
            strides[0] = 2 ** int(layout.rpartition("_")[2]) + 8
        case _:
            raise ValueError(f"layout: expected a name that `arrays.place` lists, got {layout!r}")
    return strides


def _surroundings(dtype: str, count: int, poison: int | None) -> np.ndarray:
    if dtype in FORMATS:
        return poisoned((count,), dtype).view(storage_dtype(dtype))
    return np.full(count, True if dtype == "bool" else 1 if poison is None else poison, storage_dtype(dtype))


def unchanged_outside(before: Array, after_base: np.ndarray, changed: np.ndarray | None) -> np.ndarray:
    """Flat positions of the base that differ and must not.

    Args:
      before: the argument as it was.
      after_base: its base buffer after the call.
      changed: bool array in the view's shape, True where the call may write; None for nowhere.
    """
    raw = np.dtype(f"u{before.base.itemsize}")
    wrong = before.base.view(raw) != after_base.view(raw)
    if changed is not None:
        step = wrong.itemsize
        view = np.ndarray(before.shape, bool, wrong, before.offset * step, [s * step for s in before.strides])
        view[changed] = False
    return np.flatnonzero(wrong)
