"""Where rows, blocks and batches end, what a row leaves behind, and batches as an engine sends them."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import ALL_LENGTHS, SEED_LENGTHS, SHORT, fn, update


def boundaries() -> list[Case]:
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


def states() -> list[Case]:
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


def batches() -> list[Case]:
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
