"""Values of one window: taps, sums, activation, rounding, dtypes, and what is fused with them."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import ALL_LENGTHS, SHORT, fn, update


def values() -> list[Case]:
    cases = []
    for width in range(1, 9):
        tier = "core" if width in (1, 2, 3, 4, 5) else "full"
        flags = "tap-order-reversed short-sequence-state-shift has-initial-ignored"
        flags += " wide-kernel-truncated" if width > 4 else ""
        flags += " width-one-negative-zero-slice" if width == 1 else ""
        cases += [
            fn(f"width-{width}", flags, lengths=ALL_LENGTHS, width=width, dim=5, tier=tier, group="prefill linear"),
            fn(f"width-{width}-silu", flags, lengths=ALL_LENGTHS, width=width, dim=16, bias=False,
               activation="silu", group="prefill silu"),
            fn(f"width-{width}-float32", flags, lengths=ALL_LENGTHS, width=width, dim=7, dtype="float32",
               activation="silu", group="prefill float32"),
            update(f"width-{width}", flags, width=width, dim=5, tier=tier, group="update linear"),
            update(f"width-{width}-silu", flags, width=width, seqlen=3, bias=False, activation="silu",
                   group="update silu"),
            update(f"width-{width}-float32", flags, width=width, dim=7, dtype="float32", activation="silu",
                   group="update float32"),
            update(f"width-{width}-tokens", flags, width=width, seqlen=width + 1, dim=9, dtype="float16",
                   group="update linear"),
        ]  # fmt: skip
    order = "tap-order-reversed"
    rounding = "product-rounded-before-accumulate preactivation-rounded output-truncated"
    for dtype in ("bfloat16", "float16"):
        s = SHORT[dtype]
        silu_flags = f"silu-inaccurate {rounding} bias-misapplied activation-hardwired"
        cases += [
            fn(f"one-hot-{s}", order, data="one_hot", width=4, dim=8, dtype=dtype, group="prefill linear"),
            update(f"one-hot-{s}", order, data="one_hot", dim=8, dtype=dtype, group="update linear"),
            fn(f"linear-{s}", rounding + " bias-misapplied activation-hardwired output-not-truncated",
               dtype=dtype, dim=24, tier="core", group="prefill linear"),
            fn(f"sum-order-{s}", "sum-order-changed", data="absorb", dtype=dtype, dim=64, tier="core",
               group="prefill linear"),
            update(f"sum-order-{s}", "sum-order-changed", data="absorb", dtype=dtype, dim=64, seqlen=8,
                   group="update linear"),
            fn(f"silu-{s}", silu_flags, dtype=dtype, dim=24, activation="silu", tier="core", group="prefill silu"),
            update(f"linear-{s}", rounding + " bias-misapplied activation-hardwired",
                   dtype=dtype, dim=24, tier="core", group="update linear"),
            update(f"silu-{s}", silu_flags, dtype=dtype, dim=24, activation="silu", tier="core", group="update silu"),
            update(f"silu-tokens-{s}", silu_flags, dtype=dtype, dim=24, seqlen=3, activation="silu",
                   group="update silu"),
            fn(f"silu-ladder-{s}", "silu-inaccurate", data="ladder", dtype=dtype, lengths=(64,), has=None, bias=False,
               activation="silu", group="prefill silu"),
            fn(f"small-sums-{s}", "silu-inaccurate preactivation-rounded", data="small_sums", dtype=dtype,
               activation="silu", group="prefill silu"),
        ]  # fmt: skip
    cases += [
        fn("cancellation", "product-rounded-before-accumulate", data="cancel", width=2, lengths=(6,), has=None,
           bias=False, dim=5, tier="core", group="prefill linear"),
        update("cancellation", "product-rounded-before-accumulate", data="cancel", width=2, seqlen=4, bias=False,
               dim=5, group="update linear"),
        fn("linear-float32", "product-rounded-before-accumulate sum-order-changed bias-misapplied", dtype="float32",
           dim=24, tier="core", group="prefill float32"),
        fn("silu-float32", "silu-inaccurate", dtype="float32", dim=24, activation="silu", tier="core",
           group="prefill float32"),
        update("silu-float32", "silu-inaccurate", dtype="float32", dim=24, activation="silu", tier="core",
               group="update float32"),
        fn("silu-ladder-float32", "silu-inaccurate", data="ladder", dtype="float32", lengths=(64,), has=None,
           bias=False, activation="silu", tier="core", group="prefill float32"),
        fn("swish", "swish-alias-dropped", activation="swish", lengths=(3, 2), tier="core", group="prefill silu"),
        update("swish", "swish-alias-dropped", activation="swish", group="update silu"),
        fn("no-bias", "bias-misapplied", bias=False, lengths=(5, 2), tier="core", group="prefill linear"),
        update("no-bias", "bias-misapplied activation-hardwired", bias=False, tier="core", group="update linear"),
        fn("one-token", "bias-misapplied output-not-truncated", lengths=(1,), dim=5, group="prefill linear"),
        fn("one-row", "output-not-truncated varlen-detected-by-boundary-count", lengths=(7,), dim=5,
           group="prefill linear"),
        fn("arch-spot", "wrong-arch-binary", lengths=(32,), dim=64, group="prefill linear"),
        fn("nan-stays-put", "nan-spreads state-not-bit-exact", data="nan_payload", dim=24, tier="core",
           group="prefill linear"),
        update("nan-stays-put", "nan-spreads state-not-bit-exact", data="nan_payload", dim=24, tier="core",
               group="update linear"),
    ]  # fmt: skip
    for dim in (1, 2, 3, 7, 8, 17, 24, 31, 33, 63, 64, 65, 100, 127, 128, 130, 255, 257, 520, 1032, 2064):
        tier = "core" if dim in (1, 65, 130) else "full"
        cases += [
            fn(
                f"dim-{dim}",
                "channel-tail-unmasked",
                lengths=(1, 9, 2),
                dim=dim,
                tier=tier,
                group="prefill linear",
            ),
            update(f"dim-{dim}", "channel-tail-unmasked", batch=3, dim=dim, tier=tier, group="update linear"),
        ]
    return cases


def dtypes() -> list[Case]:
    cases = []
    flag = "state-dtype-differs-from-input"
    core = {("bfloat16", "float32", "float32"), ("float16", "bfloat16", "float32"), ("float32", "float32", "bfloat16"),
            ("float32", "bfloat16", "float16")}  # fmt: skip
    for x in SHORT:
        for weight in SHORT:
            for states in SHORT:
                name = f"dtypes-x_{SHORT[x]}-w_{SHORT[weight]}-s_{SHORT[states]}"
                kinds: dict[str, Any] = {"x": x, "weight": weight, "bias": weight, "conv_states": states}
                tier = "core" if (x, weight, states) in core else "full"
                cases.append(
                    fn(
                        name,
                        flag,
                        dtypes=kinds,
                        lengths=(5, 2, 1, 9),
                        tier=tier,
                        group="prefill mixed dtypes",
                    )
                )
                cases.append(
                    update(
                        name, flag, dtypes=kinds, seqlen=2, batch=3, tier=tier, group="update mixed dtypes"
                    )
                )
    kinds = {"x": "bfloat16", "weight": "bfloat16", "bias": "float32", "conv_states": "float32"}
    cases += [
        fn("dtypes-bias-f32", flag, dtypes=kinds | {"conv_states": "bfloat16"}, group="prefill mixed dtypes"),
        fn("state-f32-beyond-f16", flag, dtypes=kinds, data="beyond_float16", group="prefill mixed dtypes"),
        update("state-f32-beyond-f16", flag, dtypes=kinds, data="beyond_float16", group="update mixed dtypes"),
        fn("state-exact-bf16", "state-not-bit-exact", data="tiny", dim=24, tier="core", group="prefill linear"),
        update("state-exact-f32", "state-not-bit-exact", data="tiny", dtype="float32", group="update float32"),
        update("state-exact-bf16", "state-not-bit-exact", data="nan_payload", batch=3, seqlen=2, group="update linear"),
    ]  # fmt: skip
    return cases


def fused() -> list[Case]:
    """Residual, input inside a wider projection, output in parts."""
    more: dict[str, Any] = {"group": "residual and split"}
    added, parts = "residual-misapplied", "split-misplaced"
    three = {"lengths": (5, 0, 2, 9, 1, 1), "dim": 24, "tail": 2}
    wide = {"channel_offset": 8, "split_sizes": (8, 4, 12)}
    return [
        fn("residual-bf16", added, **three, args={"residual": True}, tier="core", **more),
        fn("residual-silu-bf16", added, **three, activation="silu", args={"residual": True}, **more),
        fn("residual-silu-f16", added, **three, dtype="float16", activation="silu", args={"residual": True}, **more),
        fn("residual-f32", added, **three, dtype="float32", args={"residual": True}, **more),
        update("residual-bf16", added, batch=3, dim=24, activation="silu", args={"residual": True}, tier="core", **more),
        update("residual-f32", added, batch=3, dim=24, dtype="float32", activation="silu", args={"residual": True}, **more),
        fn("residual-f32-of-bf16", added, **three, args={"residual": True}, dtypes={"residual": "float32"}, **more),
        fn("residual-padding", f"{added} pad-slot-not-skipped padding-row-output-uninitialised", lengths=(2, 3, 1), tail=4,
           slots=(2, -1, 9), num_slots=4, dim=8, args={"residual": True}, tier="core", **more),
        fn("residual-strided", added, **three, args={"residual": True}, layout={"residual": "transposed", "x": "slice"}, **more),
        fn("residual-no-bias-stateless", added, lengths=(5, 3), dim=8, slots=None, num_slots=None, has=None, bias=False,
           args={"residual": True}, **more),
        update("residual-tokens", added, batch=3, seqlen=3, dim=8, args={"residual": True}, layout={"residual": "slice"}, **more),
        fn("split", parts, **three, options={"split_sizes": (8, 8, 8)}, activation="silu", tier="core", **more),
        fn("split-uneven", parts, lengths=(5, 2), dim=37, options={"split_sizes": (1, 16, 3, 17)}, tier="core", **more),
        fn("split-eight", parts, lengths=(5, 2), dim=20, options={"split_sizes": (1, 2, 3, 4, 4, 3, 2, 1)}, **more),
        fn("split-wide", f"{parts} channel-tail-unmasked", lengths=(5, 2), dim=300, options={"split_sizes": (128, 128, 44)}, **more),
        fn("split-padding", f"{parts} padding-row-output-uninitialised", lengths=(2, 3, 1), tail=4, slots=(2, -1, 9),
           num_slots=4, dim=8, options={"split_sizes": (5, 3)}, **more),
        fn("split-no-tokens", f"{parts} empty-sequence-mishandled", lengths=(0,), dim=8, options={"split_sizes": (5, 3)}, **more),
        fn("channel-offset", parts, **three, options={"channel_offset": 8}, args={"channels": 40}, tier="core", **more),
        fn("channel-offset-odd", parts, lengths=(5, 2), dim=7, options={"channel_offset": 3}, args={"channels": 13},
           layout={"x": "slice"}, **more),
        fn("projection", f"{parts} {added}", **three, options=wide, args={"channels": 40, "residual": True}, activation="silu",
           tier="core", **more),
        fn("projection-long", f"{parts} tile-halo-wrong", lengths=(70, 33), dim=24, options=wide, args={"channels": 40},
           activation="silu", **more),
        update("split", parts, batch=3, dim=24, options=wide, args={"channels": 40}, tier="core", **more),
        update("split-tokens", parts, batch=3, seqlen=2, dim=24, options=wide, args={"channels": 40, "residual": True}, **more),
        update("split-packed", parts, lengths=(2, 0, 5), tail=1, dim=24, options=wide, args={"channels": 40}, **more),
        update("split-rolling", parts, lengths=(2, 4, 3), counts=(3, 1, 2), dim=24, options=wide, args={"channels": 40}, **more),
    ]  # fmt: skip
