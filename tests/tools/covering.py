"""Few cases for what is slow: enough that everything meets, where all combinations would take too long."""

import itertools
import os

import pytest


def cover(items, parts):
    """Few of the items, taken greedily, that together have every part that any item has; `parts(item)` is a set."""
    found = [(item, set(parts(item))) for item in items]
    chosen, left = [], set().union(*(part for _, part in found))
    while left:
        item, part = max(found, key=lambda pair: len(pair[1] & left))  # the first of equals
        chosen.append(item)
        left -= part
    return chosen


def combinations(axes, strength=2):
    """Tuples, a value of each axis, in which any `strength` of the axes meet in every combination of their values."""
    axes = [list(axis) for axis in axes]
    places = itertools.product(*(range(len(axis)) for axis in axes))
    few = cover(places, lambda place: itertools.combinations(enumerate(place), strength))
    return [tuple(axis[i] for axis, i in zip(axes, place, strict=True)) for place in few]


def on_backends(*, few, every, strength=2, **axes):
    """Parametrizes a test by `axes` and then `backend`: backends of `every` take all combinations of the values,
    those of `few`, the interpreters, as many as `combinations` leaves; under a second JAX each value once."""
    strength = 1 if os.environ.get("SECOND_JAX") == "1" else strength
    rows = [(row, backend) for backend in few for row in combinations(axes.values(), strength)]
    rows += [(row, backend) for backend in every for row in itertools.product(*axes.values())]
    return pytest.mark.parametrize((*axes, "backend"), [_parameter(*pair) for pair in rows])


def _parameter(row, backend):
    marks = getattr(backend, "marks", ())
    return pytest.param(*row, *(backend.values if marks else (backend,)), marks=marks)
