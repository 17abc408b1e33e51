"""The catalogue for peers: every case once for 16-bit arithmetic, and once in float32 for everything else.

Most cases are in bfloat16. A peer that rounds there once too often would fail nearly all of them, and the table would say
nothing about its rows, slots and states. So a case of one 16-bit dtype is taken apart: as it is, for the failure modes of
16-bit arithmetic alone; in float32, as `ID@f32`, for the others it carries. Cases of float32 and of mixed dtypes stay.
Those of the contract's serving arguments are left out, since no two engines share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from oracle.conformance.cases import Case

SIXTEEN_BITS = frozenset({
    "product-rounded-before-accumulate", "preactivation-rounded", "output-truncated", "silu-inaccurate",
    "sum-order-changed", "state-not-bit-exact",
})  # fmt: skip
FLOATS = ("x", "weight", "bias", "conv_states")


def apart(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, those of one 16-bit dtype taken apart by failure mode."""
    for case in cases:
        if case.serving:
            continue
        floats = {case.dtypes[name] for name in FLOATS if case.dtypes.get(name)}
        if case.expect != "value" or len(floats) > 1 or floats == {"float32"}:
            yield case
            continue
        rounding = tuple(flag for flag in case.flags if flag in SIXTEEN_BITS)
        others = tuple(flag for flag in case.flags if flag not in SIXTEEN_BITS)
        if rounding:
            yield replace(case, flags=rounding)
        if others:
            dtypes = dict(case.dtypes) | {name: "float32" for name in FLOATS if case.dtypes.get(name)}
            yield replace(case, id=f"{case.id}@f32", dtypes=dtypes, flags=others)
