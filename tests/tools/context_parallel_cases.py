"""Batches for the checks of context parallel gradients, and their judge; NumPy alone, for both frameworks."""

from typing import NamedTuple

import numpy as np

from oracle.numerics import rounded, typed
from oracle.reference_grad import Gradients, causal_conv1d_backward
from oracle.tolerance import fraction_of_bound
from oracle.tolerance_grad import gradient_bounds


class Case(NamedTuple):
    """Packed rows over ranks: rows that cross, skip and end at cuts; parts and rows shorter than the window.

    Attributes:
      name: what is special.
      lengths, tail: tokens of each row, and after the last.
      width: of the window.
      dtypes: of x, weight, bias (None: none).
      activation: None or "silu".
      parts: tokens of each rank; None: equal ones.
    """

    name: str
    lengths: list
    tail: int
    width: int = 4
    dtypes: tuple = ("float32",) * 3
    activation: str | None = "silu"
    parts: list | None = None


def cases(ranks):
    """Those of equal parts first, so that both frameworks can take them."""
    bf16, f32 = ("bfloat16",) * 3, "float32"
    long = [19 * ranks, 0, 3, 8 * ranks], 5 * ranks - 3
    yield Case("long", *long)
    yield Case("long bf16", *long, dtypes=bf16)
    yield Case("linear", *long, dtypes=bf16, activation=None)
    yield Case("wide window", *long, width=8)
    yield Case("no window", *long, width=1)
    yield Case("no bias", *long, dtypes=(f32, f32, None))
    yield Case("mixed", *long, dtypes=("bfloat16", f32, "float16"))
    yield Case("mixed back", *long, dtypes=(f32, "bfloat16", "float16"))
    yield Case("packed", [1] * (3 * ranks) + [13 * ranks], 0, width=3)
    yield Case("short rows", [2, 1, 3, 2, 0] * ranks, 0, width=6)
    yield Case("short parts", [2, 2 * ranks - 3], 1, width=8)  # of 2 tokens: a window spans several
    yield Case("short parts bf16", [1, 2 * ranks - 2], 1, width=4, dtypes=bf16, activation=None)
    yield Case("single tokens", [ranks], 0, width=8)
    yield Case("no rows", [], 2 * ranks)
    yield Case("no tokens", [0, 0], 0)


def uneven_cases(ranks):
    parts = [5, 0, 1, 9][:ranks]
    yield Case("uneven", [3, sum(parts) - 4], 1, parts=parts)
    yield Case("uneven, wide", [1, sum(parts) - 1], 0, width=8, dtypes=("bfloat16",) * 3, parts=parts)
    yield Case("first part empty", [6], 0, width=5, parts=[0, 6, 0, 0][:ranks])


def build(case, dim=8):
    """(arguments by name, dout), TypedArrays or None; NaN in the tail."""
    random = np.random.default_rng(sum(map(ord, case.name)))
    live = sum(case.lengths)

    def draw(*shape, dtype, live=None):
        values = random.standard_normal(shape)
        if live is not None:
            values[live:] = np.nan
        return None if dtype is None else rounded(values, dtype)

    x_dtype, weight_dtype, bias_dtype = case.dtypes
    tokens = live + case.tail
    arguments = dict(
        x=draw(tokens, dim, dtype=x_dtype, live=live),
        weight=draw(dim, case.width, dtype=weight_dtype),
        bias=draw(dim, dtype=bias_dtype),
        query_start_loc=typed(np.cumsum([0, *case.lengths]).astype(np.int32)),
    )
    return arguments, draw(tokens, dim, dtype=x_dtype, live=live)


def judge(case, arguments, dout, found):
    """Gradients of x, weight and bias that leave the reference's bounds; `found` holds TypedArrays by name."""
    call = dict(dout=dout, dfinal_states=None, **arguments, activation=case.activation)
    wrong = []
    references = causal_conv1d_backward(**call), gradient_bounds(**call)
    for name, want, bound in zip(Gradients._fields, *references, strict=True):
        if want is None:
            continue
        fraction = fraction_of_bound(found[name].values(), want, bound, arguments[name].dtype)
        if found[name].dtype != arguments[name].dtype or (fraction.size and not fraction.max() <= 1):
            wrong.append(f"{name}: {found[name].dtype}, {fraction.max():.3g} times the bound")
    return wrong
