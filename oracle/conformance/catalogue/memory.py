"""How arguments lie in memory: strides, pages, views of other arrays."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import fn, update


def layouts() -> list[Case]:
    cases = []
    every = {
        "x": ("slice", "slice_odd", "transposed", "misaligned"),
        "weight": ("slice", "transposed", "misaligned"),
        "bias": ("slice",),
        "conv_states": ("transposed", "pages", "transposed_pages", "every_other", "misaligned"),
        "cache_indices": ("slice",),
        "query_start_loc": ("slice",),
        "has_initial_state": ("slice",),
    }
    flags = {
        "x": "stride-restriction-surprises initial-state-ignored-by-layout",
        "weight": "stride-restriction-surprises",
        "bias": "stride-restriction-surprises",
        "conv_states": "stale-strides-after-copy layout-axes-swapped state-length-from-stride",
        "cache_indices": "indices-read-with-unit-stride",
        "query_start_loc": "indices-read-with-unit-stride",
        "has_initial_state": "indices-read-with-unit-stride",
    }
    core = {("x", "slice"), ("x", "transposed"), ("conv_states", "transposed"), ("conv_states", "pages")}
    for name, layouts in every.items():
        for layout in layouts:
            for dim in (16, 5) if name in ("x", "conv_states") else (16,):
                tier = "core" if (name, layout) in core and dim == 16 else "full"
                more: dict[str, Any] = {"layout": {name: layout}, "dim": dim, "tier": tier}
                label = f"layout-{name}-{layout}-{dim}"
                cases.append(fn(label, flags[name], activation="silu", group="prefill layouts", **more))
                if name not in ("query_start_loc", "has_initial_state"):
                    cases.append(update(label, flags[name], seqlen=3 if layout == "transposed" else None,
                                        activation="silu", group="update layouts", **more))  # fmt: skip
    cases += [
        fn("layout-all-strided", flags["conv_states"], dim=24, tail=3, group="prefill layouts",
           layout={"x": "transposed", "conv_states": "transposed_pages", "weight": "transposed",
                   "cache_indices": "slice", "bias": "slice"}),
        update("layout-all-strided", flags["conv_states"], dim=24, seqlen=2, group="update layouts",
               layout={"x": "transposed", "conv_states": "transposed_pages", "weight": "transposed",
                       "cache_indices": "slice", "bias": "slice"}),
        fn("unit-token", "degenerate-stride-misread", lengths=(1,), dim=5, layout={"x": "odd_unit_axis"},
           group="prefill layouts"),
        fn("unit-dim", "degenerate-stride-misread", dim=1, layout={"x": "odd_unit_axis", "conv_states": "odd_unit_axis"},
           group="prefill layouts"),
        update("unit-seqlen", "degenerate-stride-misread", batch=3, seqlen=1, dim=5, layout={"x": "odd_unit_axis"},
               tier="core", group="update layouts"),
        update("unit-everything", "degenerate-stride-misread", batch=1, dim=1, width=2, slots=(0,), num_slots=1,
               layout={"x": "odd_unit_axis", "conv_states": "odd_unit_axis", "weight": "odd_unit_axis"},
               group="update layouts"),
        fn("square", "positional-abi-drift", lengths=(8,), dim=8, width=8, group="prefill layouts"),
        update("square", "positional-abi-drift", batch=4, dim=4, width=4, num_slots=4, slots=(3, 0, 1, 2), state_len=4,
               tier="core", group="update layouts"),
        update("cube", "positional-abi-drift", batch=4, seqlen=4, dim=4, width=4, num_slots=4, slots=(3, 0, 1, 2),
               state_len=4, group="update layouts"),
        fn("x-unwritten", "fast-path-writes-input", lengths=(1, 1, 1), has=(True,) * 3, group="prefill layouts"),
        update("x-unwritten", "fast-path-writes-input", group="update layouts"),
        update("once", "autotune-reruns-mutate-state", batch=1, dim=5, tier="core", group="update linear"),
        fn("once", "autotune-reruns-mutate-state", lengths=(1, 2), has=(True, True), group="prefill linear"),
    ]  # fmt: skip
    return cases
