"""The catalogue: every case, as data. Ids are stable; a changed case gets a new id."""

from __future__ import annotations

import functools
import zlib
from typing import Any

from oracle.conformance import gradients, serving, steps
from oracle.conformance.cases import Case

FN, UPDATE, BACKWARD = "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_backward"
SEED_LENGTHS = (1, 9, 2, 17, 4)
ALL_LENGTHS = (0, 1, 2, 3, 4, 8, 9, 17)
INTEGER_AXES = (
    "cache_seqlens", "write_indices", "snapshot_indices", "num_computed_tokens", "track_indices", "track_lengths",
    "window_indices", "tree_parents", "accepted_steps", "next_token", "next_sibling",
)  # fmt: skip
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def spread(batch: int) -> tuple[int, ...]:
    """Slots that are permuted, start above 0 and reach above the batch size: 2*batch, .., 4, 2."""
    return tuple(2 * (batch - i) for i in range(batch))


def fn(
    name: str,
    flags: str = "",
    *,
    lengths: tuple[int, ...] = SEED_LENGTHS,
    tail: int = 0,
    dim: int = 16,
    width: int = 4,
    slots: Any = "spread",
    num_slots: Any = "fit",
    state_len: int | None = None,
    has: Any = "alternate",
    args: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    """A prefill. Defaults: the seed's five rows, bfloat16, bias, every second row with state, no activation.

    `args` are serving arguments as axes, see `cases.Case`.
    """
    batch = len(lengths)
    slots = spread(batch) if slots == "spread" else slots
    if num_slots == "fit":
        num_slots = 2 * batch + 2
    if has == "alternate":
        has = tuple(i % 2 == 0 for i in range(batch))
    axes = {
        "lengths": lengths, "tail": tail, "dim": dim, "width": width, "slots": slots, "num_slots": num_slots,
        "state_len": (width - 1 if state_len is None else state_len), "has": has,
    }  # fmt: skip
    return _case("fn/" + name, FN, axes | (args or {}), flags, **rest)


def update(
    name: str,
    flags: str = "",
    *,
    batch: int = 4,
    seqlen: int | None = None,
    dim: int = 16,
    width: int = 4,
    slots: Any = "spread",
    num_slots: Any = "fit",
    state_len: int | None = None,
    lengths: tuple[int, ...] | None = None,
    tail: int = 0,
    counts: tuple[int, ...] | None = None,
    options: dict[str, Any] | None = None,
    args: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    """A decode step. Defaults: four rows of one token (x has two axes), bfloat16, bias, no activation.

    With `lengths` the rows are packed, with `counts` slots roll, by default as wide as counts and lengths need.
    `args` are serving arguments as axes.
    """
    options = dict(options or {})
    if lengths is not None:
        batch = len(lengths)
    longest = seqlen or 1 if lengths is None else max(lengths, default=0)
    if counts is not None:
        if lengths is not None:
            options.setdefault("max_seqlen", longest)
        if state_len is None:
            state_len = max(width - 2 + max(longest, 1, *counts), 0)
    slots = spread(batch) if slots == "spread" else slots
    axes = {
        "batch": batch, "seqlen": seqlen, "dim": dim, "width": width, "slots": slots,
        "num_slots": 2 * batch + 2 if num_slots == "fit" else num_slots,
        "state_len": width - 1 if state_len is None else state_len,
    }  # fmt: skip
    if lengths is not None:
        axes |= {"lengths": lengths, "tail": tail}
    if counts is not None:
        axes["counts"] = counts
    return _case("update/" + name, UPDATE, axes | (args or {}), flags, options=options, **rest)


def commit(
    name: str,
    flags: str = "",
    *,
    steps: tuple[int, ...] = (0, 2, 1),
    dim: int = 8,
    width: int = 4,
    slots: Any = "spread",
    num_slots: int = 8,
    state_len: int | None = None,
    windows: tuple[int, int] = (6, 3),
    buffers: tuple[int, ...] | None = (4, 0, 5),
    **rest: Any,
) -> Case:
    """A commit of accepted steps. Defaults: three rows, bfloat16, permuted slots and buffers."""
    axes = {
        "dim": dim, "width": width, "slots": spread(len(steps)) if slots == "spread" else slots,
        "num_slots": num_slots, "state_len": width - 1 if state_len is None else state_len,
        "accepted_steps": steps, "window_out": windows, "window_indices": buffers,
    }  # fmt: skip
    return _case("commit/" + name, "commit_windows", axes, flags, **rest)


def links(name: str, flags: str, next_token: Any, next_sibling: Any, **rest: Any) -> Case:
    """A conversion of a draft tree's links to parents."""
    axes = {"next_token": next_token, "next_sibling": next_sibling}
    return _case("links/" + name, "tree_parents_from_links", axes, flags, **rest)


def backward(
    name: str,
    flags: str = "",
    *,
    lengths: tuple[int, ...] = (1, 9, 2, 0, 17, 3, 1, 0, 4),
    tail: int = 0,
    dim: int = 8,
    width: int = 4,
    dense: bool = False,
    dtype: str = "float32",
    initial: bool = True,
    final: bool = True,
    dtypes: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    """A backward pass. Defaults: short rows, float32, bias, SiLU, an initial state, a gradient of the final states."""
    axes = {"lengths": lengths, "tail": tail, "dim": dim, "width": width, "dense": dense}
    kinds = dict.fromkeys(("x", "weight", "bias"), dtype) | {"initial_states": dtype if initial else None}
    kinds |= {"query_start_loc": None if dense else "int32"} | (dtypes or {})
    kinds |= {"dout": kinds["x"], "dfinal_states": (kinds["initial_states"] or kinds["x"]) if final else None}
    rest = {"activation": "silu", "group": "gradients"} | rest
    return _case("backward/" + name, BACKWARD, axes, flags, dtypes=kinds, **rest)


def _case(
    name: str,
    op: str,
    axes: dict[str, Any],
    flags: str,
    *,
    dtype: str = "bfloat16",
    dtypes: dict[str, Any] | None = None,
    bias: bool = True,
    activation: str | None = None,
    group: str = "",
    tier: str = "full",
    options: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    kinds: dict[str, Any] = {}
    if op in (FN, UPDATE):
        kinds = dict.fromkeys(("x", "weight", "bias", "conv_states"), dtype) | {"cache_indices": "int32"}
    if op == "commit_windows":
        kinds = {"conv_states": dtype, "cache_indices": "int32"}
    if "lengths" in axes:
        kinds["query_start_loc"] = "int32"
    if "counts" in axes:
        kinds["num_accepted_tokens"] = "int32"
    kinds |= {name: dtype for name in ("residual", "window_out") if name in axes}
    kinds |= {name: "int32" for name in INTEGER_AXES if name in axes}
    kinds |= dtypes or {}
    if not bias:
        kinds["bias"] = None
    options = dict(options or {})
    if activation:
        options["activation"] = activation
    return Case(
        id=name,
        op=op,
        axes=axes,
        dtypes=kinds,
        options=options,
        seed=zlib.crc32(name.encode()) % 1000,
        flags=tuple(flags.split()),
        tier=tier,
        group=group or {FN: "prefill", UPDATE: "update"}.get(op, "speculation"),
        **rest,
    )


def _arithmetic() -> list[Case]:
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


def _dtypes() -> list[Case]:
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


def _boundaries() -> list[Case]:
    cases = [
        fn("seed", "sequence-leak tile-halo-wrong", activation="silu", dim=64, tier="core", group="prefill silu"),
        fn("leak", "sequence-leak", lengths=(5, 3), has=None, dim=5, group="prefill linear"),
        fn("leak-stateless", "sequence-leak null-state-pointer", lengths=(5, 3, 4), has=None, slots=None,
           num_slots=None, tier="core", group="prefill linear"),
        fn("all-lengths-fresh", "stale-halo-when-no-initial-state short-sequence-stale-left has-initial-ignored",
           lengths=ALL_LENGTHS, has=(False,) * 8, tier="core", group="prefill linear"),
        fn("all-lengths-fresh-none", "stale-halo-when-no-initial-state short-sequence-stale-left has-initial-ignored",
           lengths=ALL_LENGTHS, has=None, group="prefill linear"),
        fn("all-lengths-continued",
           "history-dropped-on-continuation short-sequence-state-shift seq-idx-excludes-initial-state",
           lengths=ALL_LENGTHS, has=(True,) * 8, tier="core", group="prefill linear"),
        fn("has-per-row", "has-initial-reduced-over-batch", lengths=(2, 3), has=(True, False), group="prefill linear"),
        fn("has-per-row-last", "has-initial-reduced-over-batch seq-idx-excludes-initial-state", lengths=(2, 3),
           has=(False, True), group="prefill linear"),
        fn("empty-first", "empty-sequence-mishandled", lengths=(0, 4), has=(True, False), group="prefill linear"),
        fn("empty-last", "empty-sequence-mishandled", lengths=(4, 0), has=(True, True), group="prefill linear"),
        fn("empty-fresh", "empty-sequence-mishandled", lengths=(0, 4, 0), has=(False, True, False), tier="core",
           group="prefill linear"),
        fn("empty-only", "empty-sequence-mishandled", lengths=(0,), has=(True,), group="prefill linear"),
        fn("empty-everything", "empty-sequence-mishandled", lengths=(), has=(), group="prefill linear"),
        fn("empty-rows-tail", "empty-sequence-mishandled tail-padding-enters-state", lengths=(0, 0), tail=3,
           tier="core", group="prefill linear"),
        fn("no-rows-tail", "tail-padding-enters-state", lengths=(), tail=3, has=(), group="prefill linear"),
        fn("tail", "tail-padding-enters-state", lengths=(4,), tail=2, tier="core", group="prefill linear"),
        fn("tail-one-row", "varlen-detected-by-boundary-count tail-padding-enters-state", lengths=(5,), tail=20,
           activation="silu", group="prefill silu"),
        fn("tail-packed", "tail-padding-enters-state", lengths=SEED_LENGTHS, tail=31, activation="silu", tier="core",
           group="prefill silu"),
        fn("ragged-windows", "right-padded-batch-state", lengths=(3, 8, 5), group="prefill linear"),
        fn("many-short-one-long", "launch-plan-too-small", lengths=(1,) * 64 + (513,), dim=8, group="prefill linear"),
        fn("long-then-short", "launch-plan-too-small", lengths=(130,) + (1,) * 9, dim=8, tier="core",
           group="prefill linear"),
        fn("max-seqlen-exact", "launch-plan-too-small", lengths=(3, 17, 2), options={"max_seqlen": 17},
           group="prefill linear"),
        fn("max-seqlen-loose", "launch-plan-too-small", lengths=(3, 17, 2), options={"max_seqlen": 500},
           group="prefill linear"),
        fn("max-seqlen-too-small", "launch-plan-too-small", lengths=(3, 300, 2), dim=8, options={"max_seqlen": 3},
           tier="core", group="prefill linear"),
        fn("max-seqlen-zero", "launch-plan-too-small", lengths=(3, 70, 2), options={"max_seqlen": 0},
           group="prefill linear"),
    ]  # fmt: skip
    for schedule in ("per_sequence", "flat"):
        cases += [
            fn(f"{schedule}-seed", "tile-halo-wrong sequence-leak", activation="silu", tail=5, tier="core",
               options={"schedule": schedule}, group="prefill silu"),
            fn(f"{schedule}-skew", "launch-plan-too-small", lengths=(1,) * 40 + (300,) + (0, 1), dim=8,
               options={"schedule": schedule}, group="prefill linear"),
            fn(f"{schedule}-short-bound", "launch-plan-too-small", lengths=(40, 200, 1), dim=8,
               options={"schedule": schedule, "max_seqlen": 1}, group="prefill linear"),
        ]  # fmt: skip
    for tile in (8, 16, 32, 64, 128, 256):
        lengths = (tile - 1, tile, tile + 1, 2 * tile, 2 * tile + 1)
        tier = "core" if tile in (8, 32) else "full"
        cases += [
            fn(f"tiles-{tile}", "tile-halo-wrong inplace-output-halo", lengths=lengths, dim=8, tier=tier,
               group="prefill linear"),
            fn(f"tiles-{tile}-silu", "tile-halo-wrong inplace-output-halo", lengths=lengths[::-1], dim=5, tail=3,
               dtype="float16", activation="silu", group="prefill silu"),
        ]  # fmt: skip
    for start in (1, 81, 161):
        sweep = tuple(range(start, start + 80, 8)) + tuple(range(start + 1, start + 80, 27))
        cases.append(fn(f"length-sweep-{start}", "hang-on-specific-lengths tile-halo-wrong", lengths=sweep, dim=4,
                        group="prefill linear"))  # fmt: skip
    return cases


def _states() -> list[Case]:
    cases = []
    for op, name in ((fn, "prefill"), (update, "update")):
        group = f"{name} linear"
        cases += [
            op("stored", "state-not-written state-holds-post-activation undeclared-mutation", activation="silu",
               tier="core", group=f"{name} silu"),
            op("zero-weight", "state-holds-post-activation", data="zero_weight", group=group),
            op("wide-slots", "wide-slot-window-misplaced", state_len=6, tier="core", group=group),
            op("wide-slots-silu", "wide-slot-window-misplaced", state_len=9, dtype="float16", activation="silu",
               group=f"{name} silu"),
            op("width-1-wide-slots", "width-one-negative-zero-slice wide-slot-window-misplaced", width=1,
               state_len=4, group=group),
            op("width-1-no-columns", "width-one-negative-zero-slice", width=1, state_len=0, group=group),
        ]  # fmt: skip
    cases += [
        fn("short-fresh", "short-sequence-stale-left short-sequence-state-shift", lengths=(1, 2), has=None, tier="core",
           group="prefill linear"),
        fn("short-continued", "short-sequence-state-shift history-dropped-on-continuation", lengths=(1, 2),
           has=(True, True), group="prefill linear"),
        fn("width-8-short", "short-sequence-state-shift history-overwritten-while-read", lengths=(1, 2, 3, 4, 5, 6),
           has=(True,) * 6, width=8, tier="core", group="prefill linear"),
        update("multi-token", "history-dropped-on-continuation state-not-written", seqlen=5, tier="core",
               group="update linear"),
        update("multi-token-short", "short-sequence-state-shift history-overwritten-while-read", seqlen=2, width=8,
               group="update linear"),
        update("one-token-three-axes", "degenerate-stride-misread", seqlen=1, group="update linear"),
        update("no-tokens", "empty-sequence-mishandled", seqlen=0, group="update linear"),
        update("no-rows", "empty-sequence-mishandled", batch=0, group="update linear"),
        update("history-order", "history-overwritten-while-read cross-program-state-shift", data="positions", dim=64,
               group="update linear"),
        update("history-order-tokens", "history-overwritten-while-read cross-program-state-shift", data="positions",
               dim=64, seqlen=3, group="update linear"),
        fn("history-order", "history-overwritten-while-read cross-program-state-shift", data="positions", dim=64,
           lengths=(1, 2, 40), has=(True,) * 3, tier="core", group="prefill linear"),
    ]  # fmt: skip
    return cases


def _slots() -> list[Case]:
    cases = []
    for op, name in ((fn, "prefill"), (update, "update")):
        group = f"{name} linear"

        def rows(*slots, op=op, **more):
            sized: dict[str, Any] = (
                {"lengths": (4, 2, 5, 3, 1, 6, 2, 9)[: len(slots)]} if op is fn else {"batch": len(slots)}
            )
            return {"slots": slots, **sized, **more}

        cases += [
            op("padding-rows", "pad-slot-not-skipped padding-row-output-uninitialised pad-slot-clamped-to-zero",
               **rows(2, -1, 0, -1, num_slots=5), activation="silu", tier="core", group=f"{name} silu"),
            op("padding-last-slot-live", "pad-slot-not-skipped", **rows(2, -1, num_slots=3), group=group),
            op("all-padding", "padding-row-output-uninitialised pad-slot-not-skipped", **rows(-1, -1, num_slots=3),
               tier="core", group=group),
            op("slot-zero", "slot-zero-treated-as-padding pad-slot-clamped-to-zero", **rows(0, 2, num_slots=4),
               tier="core", group=group),
            op("null-block", "null-block-processed padding-row-output-uninitialised", **rows(3, 0, 0, num_slots=5),
               options={"pad_slot_id": 0}, tier="core", group=group),
            op("pad-inside-pool", "null-block-processed pad-slot-not-skipped", **rows(1, 2, 0, num_slots=4),
               options={"pad_slot_id": 2}, group=group),
            op("pad-large", "null-block-processed out-of-range-slot-used", **rows(1, 9999, 0, num_slots=4),
               options={"pad_slot_id": 9999}, group=group),
            op("minus-one-is-no-pad", "out-of-range-slot-used", **rows(1, -1, 0, num_slots=4),
               options={"pad_slot_id": 2}, group=group),
            op("slots-out-of-range", "out-of-range-slot-used offsets-trusted",
               **rows(4, 2, 2147483647, -2147483648, -2, num_slots=4), tier="core", group=group),
            op("slots-permuted", "wrong-index-namespace", **rows(2, 0, 1, num_slots=3), group=group),
            op("slots-above-batch", "slot-masked-by-batch-size wrong-index-namespace", **rows(2, num_slots=3),
               has=(True,), group=group) if op is fn else
            op("slots-above-batch", "slot-masked-by-batch-size wrong-index-namespace", **rows(2, num_slots=3),
               group=group),
            op("batch-above-pool", "valid-call-rejected", **rows(4, -1, 2, -1, -1, 0, -1, -1, num_slots=5),
               tier="core", group=group),
            op("identity-slots", "wrong-index-namespace slot-zero-treated-as-padding", **rows(0, 0, 0, num_slots=3) |
               {"slots": None}, tier="core", group=group),
            op("indices-strided", "indices-read-with-unit-stride", **rows(4, 5, 1, num_slots=7),
               layout={"cache_indices": "slice"}, tier="core", group=group),
            op("indices-int64", "index-dtype-narrowed", **rows(4294967297, 1, 4294967295, num_slots=4),
               dtypes={"cache_indices": "int64"}, group=group),
            op("indices-int16", "index-dtype-narrowed", **rows(3, -1, 0, num_slots=4),
               dtypes={"cache_indices": "int16"}, group=group),
            op("indices-int8", "index-dtype-narrowed", **rows(3, -1, 0, num_slots=4),
               dtypes={"cache_indices": "int8"}, group=group),
            op("indices-uint8", "index-dtype-narrowed", **rows(200, 255, 0, num_slots=202),
               dtypes={"cache_indices": "uint8"}, options={"pad_slot_id": 255}, dim=2, group=group),
            op("indices-uint8-minus-one", "index-dtype-narrowed", **rows(200, 255, 0, num_slots=256),
               dtypes={"cache_indices": "uint8"}, dim=2, group=group),
            op("indices-uint32", "index-dtype-narrowed", **rows(3, 4294967295, 0, num_slots=4),
               dtypes={"cache_indices": "uint32"}, group=group),
        ]  # fmt: skip
    cases += [
        fn("empty-row-shares-slot", "duplicate-slot-write empty-sequence-mishandled", lengths=(4, 0), slots=(2, 2),
           num_slots=4, has=(True, True), group="prefill linear"),
        fn("padding-row-after-live", "duplicate-slot-write", lengths=(4, 2, 0), slots=(1, -1, 1), num_slots=3,
           has=(False, True, True), group="prefill linear"),
        fn("graph-tail", "stale-index-in-graph-buffer duplicate-slot-write", lengths=(2, 1, 3, 0, 0, 0, 0, 0),
           slots=(2, 4, 3, 6, 7, 8, 2, 4), num_slots=10, has=(True,) * 8, tail=4, tier="core", group="prefill linear"),
        fn("offsets-int64", "index-dtype-narrowed", dtypes={"query_start_loc": "int64"}, group="prefill linear"),
    ]  # fmt: skip
    return cases


def _layouts() -> list[Case]:
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


def _relations() -> list[Case]:
    cases = []
    names = {
        "split": "history-dropped-on-continuation result-depends-on-batch",
        "chain": "history-dropped-on-continuation preactivation-rounded result-depends-on-batch",
        "separate": "sequence-leak result-depends-on-batch",
        "schedules": "result-depends-on-batch tile-halo-wrong",
        "permute_slots": "wrong-index-namespace",
        "reorder_rows": "result-depends-on-batch",
        "add_padding": "result-depends-on-batch stale-index-in-graph-buffer",
        "repeat": "undeclared-mutation autotune-reruns-mutate-state",
    }
    for name, flags in names.items():
        for dtype, activation in (("bfloat16", "silu"), ("float16", None), ("float32", "silu")):
            tier = "core" if dtype == "bfloat16" and name in ("chain", "schedules", "add_padding") else "full"
            lengths = (5, 2, 9) if tier == "core" else (3, 12, 1, 8, 0, 5)
            cases.append(fn(f"path-{name}-{SHORT[dtype]}", flags, lengths=lengths, dim=16, dtype=dtype,
                            activation=activation, relation=name, tier=tier, group="path invariance"))  # fmt: skip
    for width in (1, 2, 3, 8):
        cases.append(fn(f"path-chain-width-{width}", names["chain"], lengths=(5, 1, 9), width=width, activation="silu",
                        relation="chain", group="path invariance"))  # fmt: skip
    cases += [
        fn("path-split-f32-pool", names["split"], dtypes={"conv_states": "float32"}, lengths=(9, 4), activation="silu",
           relation="split", group="path invariance"),
        fn("path-chain-f32-pool", names["chain"], dtypes={"conv_states": "float32"}, lengths=(6, 3), activation="silu",
           relation="chain", group="path invariance"),
        fn("path-split-long", names["split"] + " tile-halo-wrong", lengths=(300,), dim=8, activation="silu",
           relation="split", group="path invariance"),
        fn("path-separate-long", names["separate"], lengths=(129, 64, 200, 31), dim=8, activation="silu",
           relation="separate", group="path invariance"),
    ]  # fmt: skip
    for name in ("tokens_one_by_one", "permute_slots", "reorder_rows", "separate", "repeat"):
        for dtype in ("bfloat16", "float32"):
            flags = names.get(name, "history-dropped-on-continuation result-depends-on-batch")
            tier = "core" if name == "tokens_one_by_one" and dtype == "bfloat16" else "full"
            cases.append(update(f"path-{name}-{SHORT[dtype]}", flags, seqlen=4, dtype=dtype, activation="silu",
                                batch=3, relation=name, tier=tier, group="path invariance"))  # fmt: skip
    return cases


def _errors() -> list[Case]:
    cases = []
    flag = "bad-call-accepted"

    def bad(op, name, error, argument, **more):
        sized: dict[str, Any] = {"lengths": (3, 2), "dim": 4} if op is fn else {"batch": 2, "dim": 4}
        cases.append(op(f"error-{name}", flag, **(sized | more), expect={"error": error, "names": argument},
                        group="errors"))  # fmt: skip

    def shape(name, *sizes):
        return {"override": {name: {"shape": sizes}}}

    for op in (fn, update):
        rank = {"shape": (3, 2, 4, 1)} if op is update else {"shape": (5, 4, 1)}
        bad(op, "x-rank", "ValueError", "x", override={"x": rank})
        bad(op, "x-dim-zero", "ValueError", "x", **shape("x", 5, 0))
        bad(op, "x-dtype", "TypeError", "x", override={"x": {"dtype": "int32"}})
        bad(op, "weight-rank", "ValueError", "weight", **shape("weight", 4))
        bad(op, "weight-dim", "ValueError", "weight", **shape("weight", 5, 4))
        bad(op, "weight-transposed", "ValueError", "weight", **shape("weight", 3, 4))
        bad(op, "weight-dtype", "TypeError", "weight", override={"weight": {"dtype": "int8"}})
        bad(op, "width-0", "ValueError", "weight", **shape("weight", 4, 0))
        bad(op, "width-9", "ValueError", "weight", **shape("weight", 4, 9))
        bad(op, "bias-size", "ValueError", "bias", **shape("bias", 3))
        bad(op, "bias-rank", "ValueError", "bias", **shape("bias", 4, 1))
        bad(op, "bias-dtype", "TypeError", "bias", override={"bias": {"dtype": "int32"}})
        bad(op, "pool-rank", "ValueError", "conv_states", **shape("conv_states", 6, 12))
        bad(op, "pool-dim", "ValueError", "conv_states", **shape("conv_states", 6, 3, 5))
        bad(op, "pool-short", "ValueError", "conv_states", **shape("conv_states", 6, 2, 4))
        bad(op, "pool-dtype", "TypeError", "conv_states", override={"conv_states": {"dtype": "int16"}})
        bad(op, "pool-small", "ValueError", "conv_states", slots=None, num_slots=1)
        bad(op, "indices-size", "ValueError", "cache_indices", **shape("cache_indices", 3))
        bad(op, "indices-rank", "ValueError", "cache_indices", **shape("cache_indices", 2, 1))
        bad(
            op,
            "indices-dtype",
            "TypeError",
            "cache_indices",
            override={"cache_indices": {"dtype": "float32"}},
        )
        bad(op, "activation", "ValueError", "activation", options={"activation": "relu"})
        bad(op, "activation-true", "ValueError", "activation", options={"activation": True})
        bad(op, "pad-slot-id", "TypeError", "pad_slot_id", options={"pad_slot_id": 0.5})
        bad(op, "backend", "ValueError", "backend", options={"backend": "no_such_backend"})
        bad(op, "validate-slot-high", "ValueError", "cache_indices", slots=(1, 6), num_slots=6,
            options={"validate": True})  # fmt: skip
        bad(op, "validate-slot-low", "ValueError", "cache_indices", slots=(1, -2), num_slots=6,
            options={"validate": True})  # fmt: skip
        bad(op, "validate-duplicate", "ValueError", "cache_indices", slots=(3, 3), num_slots=6,
            options={"validate": True})  # fmt: skip
        cases.append(op("validate-good", "valid-call-rejected", slots=(3, -1), num_slots=6, options={"validate": True},
                        **({"lengths": (3, 2)} if op is fn else {"batch": 2})))  # fmt: skip
    bad(update, "pool-none", "ValueError", "conv_states", override={"conv_states": {"none": True}})
    bad(fn, "offsets-rank", "ValueError", "query_start_loc", **shape("query_start_loc", 3, 1))
    bad(fn, "offsets-empty", "ValueError", "query_start_loc", **shape("query_start_loc", 0))
    bad(
        fn,
        "offsets-dtype",
        "TypeError",
        "query_start_loc",
        override={"query_start_loc": {"dtype": "float32"}},
    )
    bad(fn, "has-size", "ValueError", "has_initial_state", **shape("has_initial_state", 3))
    bad(fn, "has-dtype", "TypeError", "has_initial_state", override={"has_initial_state": {"dtype": "int32"}})
    bad(fn, "indices-without-pool", "ValueError", "cache_indices", override={"conv_states": {"none": True}})
    bad(fn, "has-without-pool", "ValueError", "has_initial_state", slots=None, num_slots=None,
        override={"has_initial_state": {"values": (1, 0), "dtype": "bool"}})  # fmt: skip
    bad(fn, "max-seqlen-negative", "ValueError", "max_seqlen", options={"max_seqlen": -1})
    bad(fn, "max-seqlen-type", "TypeError", "max_seqlen", options={"max_seqlen": 2.5})
    bad(fn, "schedule", "ValueError", "schedule", options={"schedule": "fast"})
    validate: dict[str, Any] = {"options": {"validate": True}}
    for name, offsets in (
        ("start", (1, 3, 5)),
        ("decreasing", (0, 4, 3)),
        ("past-end", (0, 3, 6)),
        ("negative", (0, -1, 5)),
    ):
        bad(fn, f"validate-offsets-{name}", "ValueError", "query_start_loc", **validate,
            override={"query_start_loc": {"values": offsets}})  # fmt: skip
    bad(fn, "validate-max-seqlen", "ValueError", "max_seqlen", options={"validate": True, "max_seqlen": 2})
    cases.append(fn("validate-empty-row-shares-slot", "valid-call-rejected", lengths=(3, 0), slots=(2, 2), num_slots=4,
                    options={"validate": True}, group="prefill linear"))  # fmt: skip
    return cases


def _undefined() -> list[Case]:
    cases = []
    flag = "offsets-trusted"
    big = 2**31 - 1
    for name, offsets in {
        "past-end": (0, 4, 1000), "far": (0, 4, big), "negative": (0, -5, 8), "decreasing": (0, 7, 3),
        "very-negative": (0, -big - 1, 8), "start": (3, 5, 8), "swapped": (8, 4, 0),
    }.items():  # fmt: skip
        for schedule in ("per_sequence", "flat"):
            tier = "core" if name in ("far", "decreasing") and schedule == "flat" else "full"
            cases.append(fn(f"hostile-offsets-{name}-{schedule}", flag, lengths=(4, 4), slots=(1, 2), num_slots=4,
                            override={"query_start_loc": {"values": offsets}}, options={"schedule": schedule},
                            expect="undefined", tier=tier, group="hostile data"))  # fmt: skip
    cases += [
        fn("hostile-duplicate-slots", flag, lengths=(4, 3, 2), slots=(1, 1, 2), num_slots=4, expect="undefined",
           group="hostile data"),
        update("hostile-duplicate-slots", flag, batch=3, slots=(1, 1, 2), num_slots=4, expect="undefined",
               group="hostile data"),
        update("hostile-duplicate-slots-tokens", flag, batch=3, seqlen=3, slots=(1, 1, 2), num_slots=4,
               expect="undefined", group="hostile data"),
    ]  # fmt: skip
    return cases


def _large() -> list[Case]:
    small: dict[str, Any] = {"width": 4, "bias": False, "group": "large", "tier": "large"}
    return [
        fn("pitch-2-31", "int32-token-offset", lengths=(3,), dim=5, layout={"x": "huge_pitch_30"}, **small),
        fn("pitch-2-32", "uint32-silent-wrap int32-token-offset", lengths=(3,), dim=5, layout={"x": "huge_pitch_31"},
           **small),
        fn("slot-pitch-2-31", "int32-slot-offset", lengths=(3, 2), dim=5, slots=(3, 0), num_slots=4,
           layout={"conv_states": "huge_pitch_30"}, **small),
        update("pitch-2-31", "int32-token-offset", batch=3, dim=5, layout={"x": "huge_pitch_30"}, **small),
        update("slot-pitch-2-31", "int32-slot-offset", batch=2, dim=5, slots=(3, 0), num_slots=4,
               layout={"conv_states": "huge_pitch_30"}, **small),
        update("slot-pitch-2-32", "uint32-silent-wrap", batch=2, dim=5, slots=(2, 0), num_slots=3,
               layout={"conv_states": "huge_pitch_31"}, **small),
        fn("many-rows", "grid-dimension-limit", lengths=(1,) * 66000, dim=2, **small),
        update("many-rows", "grid-dimension-limit", batch=66000, dim=2, **small),
        fn("scale", "wrong-only-at-scale", lengths=(2048, 1, 4095, 300), dim=2048, activation="silu", **small),
        fn("many-channels", "grid-dimension-limit", lengths=(2, 2), dim=4200000, **small),
    ]  # fmt: skip


def _wide() -> list[Case]:
    return [
        fn("dim-65540", "grid-dimension-limit channel-tail-unmasked", lengths=(4,), dim=65540, width=2, bias=False,
           group="prefill linear"),
        update("dim-65540", "grid-dimension-limit", batch=1, dim=65540, width=2, bias=False, group="update linear"),
        fn("scale-small", "wrong-only-at-scale", lengths=(400, 112), dim=1040, activation="silu",
           group="prefill silu"),
        fn("rows-256x32", "hang-on-specific-lengths", lengths=(32,) * 64, dim=128, activation="silu",
           group="prefill silu"),
        update("rows-300", "slot-masked-by-batch-size wrong-index-namespace", batch=300, dim=40, activation="silu",
               group="update silu"),
    ]  # fmt: skip


def _serving() -> list[Case]:
    """Batches as an engine sends them; the demo shows these."""
    cases = []
    mixed: dict[str, Any] = {
        "lengths": (17, 1, 1, 6, 1, 0, 1),
        "has": (False, True, True, True, True, True, True),
        "tail": 3,
    }
    for dtype in SHORT:
        s = SHORT[dtype]
        cases += [
            fn(f"serving-mixed-{s}", "sequence-leak short-sequence-state-shift", **mixed, dim=24, dtype=dtype,
               activation="silu", tier="core", group="serving"),
            fn(f"serving-mixed-linear-{s}", "sequence-leak sum-order-changed", **mixed, dim=24, dtype=dtype,
               tier="core" if dtype != "float32" else "full", group="serving"),
        ]  # fmt: skip
    cases += [
        fn("serving-chunks", "history-dropped-on-continuation", lengths=(5, 2), has=(False, True), relation="split",
           activation="silu", tier="core", group="serving"),
        update("serving-decode", "pad-slot-not-skipped", batch=6, slots=(9, 0, -1, 4, 7, -1), num_slots=11, dim=64,
               state_len=5, activation="silu", tier="core", group="serving"),
    ]  # fmt: skip
    return cases


@functools.cache
def catalogue() -> tuple[Case, ...]:
    """Every case, in a fixed order."""
    return tuple(
        _arithmetic() + _dtypes() + _boundaries() + _states() + _slots() + _layouts() + _relations() + _errors()
        + _undefined() + _serving() + _wide() + _large() + steps.cases(fn, update)
        + serving.cases(fn, update, commit, links) + gradients.cases(backward)
    )  # fmt: skip


def find(case_id: str) -> Case:
    """The case with this id.

    Raises:
      ValueError: there is none.
    """
    for case in catalogue():
        if case.id == case_id:
            return case
    raise ValueError(f"case: expected an id of the catalogue, got {case_id!r}")
