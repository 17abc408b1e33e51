"""Whether the arrays of a call share memory, of which an array that is updated must have its own.

Standard library only. Arrays that interleave without touching (the pages of one allocation) share none: what is
asked is whether two sums of strides meet, which for arrays as they occur is answered in a few steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

_STEPS_MAX = 10_000  # then strides are too odd to tell; the call is not refused


class Memory(NamedTuple):
    """Where an array lies.

    Attributes:
      device: memories that differ in it have nothing in common.
      begin: the address of the first element in bytes.
      itemsize: bytes of an element.
      shape: elements on each axis.
      strides: elements from one to the next on each axis.
    """

    device: Hashable
    begin: int
    itemsize: int
    shape: Sequence[int]
    strides: Sequence[int]


def check(layouts: Mapping[str, Memory], written: Sequence[str]) -> None:
    """Checks that the written arrays share no memory with another one, nor with themselves.

    Args:
      layouts: where each argument lies.
      written: the arguments that the call updates.

    Raises:
      ValueError: two that share memory, or one of which two elements do.
    """
    for name in written:
        memory = layouts[name]
        if overlaps_itself(memory):
            raise ValueError(
                f"{name}: expected elements that share no memory, since the call updates them, "
                f"got shape {list(memory.shape)} with strides {list(memory.strides)}"
            )
        for other, others in layouts.items():
            if other != name and overlap(memory, others):
                raise ValueError(
                    f"{other}: expected memory of its own, since the call updates {name}, got memory that they share"
                )


def overlaps_itself(memory: Memory) -> bool:
    """Whether two elements of an array have one address."""
    if 0 in memory.shape:
        return False
    axes = sorted(((abs(stride), size - 1) for size, stride in _axes(memory)), reverse=True)
    # differences of two indices, moved to where they start at 0; all of them 0 is the one trivial solution
    trivial = tuple(last for _, last in axes)
    total = sum(stride * last for stride, last in axes)
    differences = [(stride, 2 * last) for stride, last in axes]
    if any(stride == 0 for stride, _ in axes):
        return True
    return any(found != trivial for found in _solutions(differences, total, iter(range(_STEPS_MAX))))


def overlap(a: Memory, b: Memory) -> bool:
    """Whether two arrays have a byte in common."""
    if a.device != b.device or 0 in a.shape or 0 in b.shape:
        return False
    distance, terms = _lowest(b) - _lowest(a), [(1, a.itemsize - 1), (1, b.itemsize - 1)]
    for memory in (a, b):
        terms += [(abs(stride) * memory.itemsize, size - 1) for size, stride in _axes(memory) if stride]
    # lowest a + steps of a = lowest b + steps of b, in which b's are counted from its end
    total = distance + b.itemsize - 1
    total += sum(abs(stride) * b.itemsize * (size - 1) for size, stride in _axes(b))
    found = _solutions(sorted(terms, reverse=True), total, iter(range(_STEPS_MAX)))
    return next(found, None) is not None


def _axes(memory: Memory) -> list[tuple[int, int]]:
    """(size, stride) of the axes that have more than one element."""
    return [(n, stride) for n, stride in zip(memory.shape, memory.strides, strict=True) if n > 1]


def _lowest(memory: Memory) -> int:
    back = sum((size - 1) * stride for size, stride in _axes(memory) if stride < 0)
    return memory.begin + back * memory.itemsize


def _solutions(
    terms: Sequence[tuple[int, int]], total: int, steps: Iterator[int]
) -> Iterator[tuple[int, ...]]:
    """Yields the counts, each from 0 to the most of its (size, most), largest size first, that add up to a total."""
    if not terms:
        if total == 0:
            yield ()
        return
    (size, most), rest = terms[0], terms[1:]
    reach = sum(step * count for step, count in rest)
    least = max(0, -((reach - total) // size))
    for count in range(least, min(most, total // size) + 1):
        if next(steps, None) is None:
            return
        for others in _solutions(rest, total - count * size, steps):
            yield (count, *others)
