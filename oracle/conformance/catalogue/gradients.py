"""Gradients of the differentiable form. The operation is causal_conv1d_backward.

Whatever must not matter is NaN: tokens of the tail, in x and in the upstream gradient.
"""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import backward

_SHORT = "dht-slot-clamped dh0-passthrough-dropped initial-state-missing-in-dweight"
_ROWS = "backward-halo-wrong dweight-multiplied-by-batch dy-assumed-contiguous"
_ROUNDING = "slope-of-rounded partial-sums-rounded"


def values() -> list[Case]:
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    found = [
        backward(f"width-{width}", f"{_SHORT} {_ROWS} tail-enters-gradient", width=width, tail=3,
                 tier="core" if width in (1, 4) else "full")
        for width in range(1, 9)
    ]  # fmt: skip
    found += [
        backward(f"{dtype}-{activation or 'linear'}", _ROUNDING, dtype=dtype, activation=activation, tail=2)
        for dtype in (f16, bf16)
        for activation in (None, "silu")
    ]
    mixed = {"x": bf16, "weight": f32, "bias": f16, "initial_states": f32}
    mixed_back = {"x": f32, "weight": bf16, "bias": f32, "initial_states": f16}
    return [
        *found,
        backward("linear", _SHORT, activation=None),
        backward("no-bias", bias=False),
        backward("no-initial", "dht-slot-clamped", initial=False, tier="core"),
        backward("no-final", final=False),
        backward("plain", bias=False, initial=False, final=False, activation=None),
        backward("mixed", dtypes=mixed, options={"schedule": "per_sequence"}, tier="core"),
        backward("mixed-back", dtypes=mixed_back, options={"schedule": "flat"}),
        backward("one-token", _SHORT, lengths=(1,)),
        backward("two-tokens", _SHORT, lengths=(2,)),
        backward("empty-rows", "dh0-passthrough-dropped", lengths=(0, 0, 5, 0), tier="core",
                 options={"schedule": "per_sequence"}),
        backward("nothing-but-empty", lengths=(0, 0), tail=2),
        backward("no-rows", lengths=(), tail=3),
        backward("dense", _ROWS, lengths=(6, 6, 6), dense=True),
        backward("dense-short", _SHORT, lengths=(2, 2), dense=True, width=5, tier="core"),
        backward("steep", "slope-of-rounded", lengths=(33,), data="steep"),
        backward("dim-1", dim=1),
        backward("dim-130", lengths=(3, 10), tail=1, dim=130),
        backward("several-blocks", _ROWS, lengths=(33, 70, 1, 32), dim=4, tail=5),
        backward("several-blocks-bf16", "partial-sums-rounded", lengths=(70, 40), dim=4, dtype=bf16),
        backward("offsets-int64", _ROWS, lengths=(3, 9, 1), dtypes={"query_start_loc": "int64"}),
    ]  # fmt: skip


def layouts() -> list[Case]:
    """Upstream gradients as autograd hands them on, and arguments that are views. Nothing but results is written."""
    flags = "dy-assumed-contiguous fast-path-writes-input"
    incoming = {
        layout: {"dout": layout, "dfinal_states": layout}
        for layout in ("misaligned", "slice", "slice_odd", "transposed", "every_other")
    }
    found = [
        backward(f"layout-{layout}{'-dense' if dense else ''}", flags, lengths=(6, 6) if dense else (6, 2, 9),
                 dense=dense, layout=layouts, tail=0 if dense else 2)
        for layout, layouts in incoming.items()
        for dense in (False, True)
    ]  # fmt: skip
    views = {"x": "slice", "weight": "transposed", "bias": "slice", "initial_states": "pages"}
    return [
        *found,
        backward("layout-arguments", flags, lengths=(6, 2, 9), layout=views),
        backward("layout-arguments-transposed", flags, lengths=(6, 2, 9),
                 layout={"x": "transposed", "initial_states": "transposed"}),
    ]  # fmt: skip


def relations() -> list[Case]:
    flags = "nondeterministic-dweight"
    bf16 = {"x": "bfloat16", "initial_states": "bfloat16"}  # not the weight: a 16-bit sum hides its order
    return [
        backward("path-schedules-bf16", flags, lengths=(40, 3, 0, 33), tail=5, dtypes=bf16,
                 relation="backward_schedules"),
        backward("path-schedules-f32", flags, lengths=(40, 3, 0, 33), tail=5, relation="backward_schedules"),
        backward("path-repeat-bf16", flags, lengths=(70, 5, 130), dim=40, dtypes=bf16, relation="backward_repeat"),
        backward("path-repeat-f32", flags, lengths=(70, 5, 130), dim=40, relation="backward_repeat"),
    ]  # fmt: skip


def bad_calls() -> list[Case]:
    """Errors of the forward pass, and offsets that must do no harm."""

    def bad(name: str, error: str, argument: str, **rest: Any) -> Case:
        return backward(
            f"error-{name}",
            "bad-call-accepted",
            lengths=(3, 2),
            dim=4,
            expect={"error": error, "names": argument},
            group="errors",
            **rest,
        )

    return [
        bad("initial-short", "ValueError", "initial_states", override={"initial_states": {"shape": (2, 2, 4)}}),
        bad("weight-dim", "ValueError", "weight", override={"weight": {"shape": (5, 4)}}),
        bad("bias-dtype", "TypeError", "bias", override={"bias": {"dtype": "int32"}}),
        bad("offsets-missing", "ValueError", "query_start_loc", override={"query_start_loc": {"none": True}}),
        *(
            backward(f"hostile-offsets-{name}", "offsets-trusted", lengths=(4, 4), expect="undefined",
                     override={"query_start_loc": {"values": offsets}}, group="hostile data")
            for name, offsets in {"far": (0, 4, 2**31 - 1), "negative": (0, -5, 8), "decreasing": (0, 7, 3)}.items()
        ),
    ]  # fmt: skip
