"""Decode steps of packed rows and of rolling slots (speculative decoding): the catalogue's cases, as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracle.conformance.cases import Case

DRAFTS = (2, 4, 3)  # tokens of three rows of a verify step


def cases(fn: Callable[..., Case], update: Callable[..., Case]) -> list[Case]:
    """The cases, from the catalogue's builders."""
    return _packed(update) + _rolling(update) + _relations(fn, update) + _errors(update) + _hostile(update)


def _packed(update: Callable[..., Case]) -> list[Case]:
    """Rows of different lengths, all tokens committed."""
    halo = "history-dropped-on-continuation sequence-leak"
    cases = [
        update(f"packed-width-{width}", f"{halo} short-sequence-state-shift fixed-draft-width-assumed tail-padding-enters-state",
               lengths=(1, 9, 2, 0, 4), width=width, dim=5 if width % 2 else 16, tail=2, activation="silu",
               tier="core" if width == 4 else "full", group="update packed")
        for width in range(1, 9)
    ]  # fmt: skip
    cases += [
        update("packed-f32", halo, lengths=DRAFTS, dtype="float32", dim=7, group="update packed"),
        update("packed-f16-pool-f32", halo, lengths=DRAFTS, dtype="float16", dtypes={"conv_states": "float32"},
               group="update packed"),
        update("packed-wide-slots", "wide-slot-window-misplaced", lengths=DRAFTS, state_len=6, group="update packed"),
        update("packed-padding", "pad-slot-not-skipped padding-row-output-uninitialised tail-padding-enters-state",
               lengths=(2, 3, 1, 4), slots=(4, -1, 0, 9), num_slots=6, tail=5, tier="core", group="update packed"),
        update("packed-empty-rows", "empty-sequence-mishandled duplicate-slot-write stale-index-in-graph-buffer",
               lengths=(2, 0, 1, 0, 0), slots=(3, 3, 1, 1, 7), num_slots=8, tail=3, tier="core",
               group="update packed"),
        update("packed-only-empty", "empty-sequence-mishandled", lengths=(0, 0), tail=4, group="update packed"),
        update("packed-no-rows", "empty-sequence-mishandled tail-padding-enters-state", lengths=(), tail=4,
               group="update packed"),
        update("packed-no-tokens", "empty-sequence-mishandled", lengths=(0, 0, 0), group="update packed"),
        update("packed-identity-slots", "wrong-index-namespace", lengths=DRAFTS, slots=None, group="update packed"),
        update("packed-offsets-int64", "index-dtype-narrowed", lengths=DRAFTS, dtypes={"query_start_loc": "int64"},
               group="update packed"),
        update("packed-offsets-strided", "indices-read-with-unit-stride", lengths=DRAFTS,
               layout={"query_start_loc": "slice", "x": "slice"}, group="update packed"),
        update("packed-max-seqlen-too-small", "launch-plan-too-small", lengths=(3, 70, 2),
               options={"max_seqlen": 1}, dim=8, group="update packed"),
        update("packed-long", "tile-halo-wrong launch-plan-too-small", lengths=(40, 1, 33), dim=8,
               group="update packed"),
    ]  # fmt: skip
    return cases


def _rolling(update: Callable[..., Case]) -> list[Case]:
    """Slots that keep every draft, windows where the last step's acceptance says."""
    offset = "accepted-offset-ignored shift-by-query-length rollback-snapshot-never-written"
    mixed = {"lengths": DRAFTS, "counts": (3, 1, 2)}
    cases = [
        update(f"rolling-width-{width}", f"{offset} overlapping-shift-without-ordering fixed-draft-width-assumed",
               **mixed, width=width, dim=5 if width % 2 else 16, tail=2, activation="silu",
               tier="core" if width == 4 else "full", group="update rolling")
        if width > 1 else
        update("rolling-width-1", "width-one-negative-zero-slice fixed-draft-width-assumed", **mixed, width=1, dim=5,
               group="update rolling")
        for width in range(1, 9)
    ]  # fmt: skip
    for dtype, short in (("float32", "f32"), ("float16", "f16")):
        cases.append(update(f"rolling-{short}", offset, **mixed, dtype=dtype, dim=24, group="update rolling"))
    cases += [
        update("rolling-dense", offset, batch=3, seqlen=3, counts=(2, 1, 3), dim=24, tier="core",
               group="update rolling"),
        update("rolling-one-token", f"{offset} spec-to-plain-transition", batch=3, counts=(2, 1, 4), tier="core",
               group="update rolling"),
        update("rolling-one-token-three-axes", f"{offset} degenerate-stride-misread", batch=3, seqlen=1,
               counts=(2, 1, 4), group="update rolling"),
        update("rolling-no-tokens", "empty-sequence-mishandled", batch=3, seqlen=0, counts=(2, 1, 4),
               group="update rolling"),
        update("rolling-every-count", "accepted-offset-ignored overlapping-shift-without-ordering",
               lengths=(3,) * 6, counts=(1, 2, 3, 4, 5, 6), dim=64, data="positions", group="update rolling"),
        update("rolling-exact-slots", offset, lengths=(3, 3), counts=(3, 1), state_len=5, group="update rolling"),
        update("rolling-wide-slots", "wide-slot-window-misplaced", **mixed, state_len=11, group="update rolling"),
        update("rolling-count-zero", "accepted-zero", lengths=(2, 2, 1), counts=(0, 2, 0), state_len=6,
               tier="core", group="update rolling"),
        update("rolling-counts-far-out", "accepted-zero offsets-trusted", lengths=(2, 2, 1),
               counts=(-2147483648, 2147483647, -1), state_len=6, group="update rolling"),
        update("rolling-count-above-length", "accepted-exceeds-current-length", lengths=(1, 2, 1),
               counts=(3, 4, 2), state_len=7, tier="core", group="update rolling"),
        update("rolling-mixed-with-plain", "partition-takes-other-rows-counts spec-to-plain-transition",
               lengths=(3, 1, 1, 2, 1), counts=(3, 1, 2, 1, 1), tier="core", group="update rolling"),
        update("rolling-padding", "pad-slot-not-skipped partition-takes-other-rows-counts",
               lengths=(2, 1, 3, 2), counts=(2, 4, 1, 3), slots=(3, -1, 0, 5), num_slots=7, tail=3, tier="core",
               group="update rolling"),
        update("rolling-null-block", "null-block-processed", lengths=(2, 1, 3), counts=(2, 3, 1), slots=(3, 0, 1),
               num_slots=5, options={"pad_slot_id": 0}, dim=5, group="update rolling"),
        update("rolling-empty-rows", "empty-sequence-mishandled duplicate-slot-write", lengths=(2, 0, 1, 0),
               counts=(2, 3, 1, 2), slots=(3, 3, 1, 6), num_slots=8, group="update rolling"),
        update("rolling-identity-slots", "wrong-index-namespace", **mixed, slots=None, group="update rolling"),
        update("rolling-pool-f32", "state-dtype-differs-from-input", **mixed, dtypes={"conv_states": "float32"},
               group="update rolling"),
        update("rolling-pool-bf16-x-f32", "state-dtype-differs-from-input", **mixed, dtype="float32",
               dtypes={"conv_states": "bfloat16"}, group="update rolling"),
        update("rolling-nan-stays-put", "nan-spreads state-not-bit-exact", **mixed, data="nan_payload", dim=24,
               group="update rolling"),
        update("rolling-strided", "indices-read-with-unit-stride stale-strides-after-copy layout-axes-swapped",
               **mixed, tail=2, layout={"num_accepted_tokens": "slice", "query_start_loc": "slice", "x": "slice",
                                        "conv_states": "transposed_pages", "cache_indices": "slice"},
               group="update rolling"),
        update("rolling-pages", "state-length-from-stride", **mixed, layout={"conv_states": "pages"},
               group="update rolling"),
        update("rolling-dim-257", "channel-tail-unmasked", **mixed, dim=257, group="update rolling"),
        update("rolling-long", "tile-halo-wrong", lengths=(40, 1, 19), counts=(9, 30, 1), dim=8,
               group="update rolling"),
    ]  # fmt: skip
    for dtype in ("int64", "int16", "int8", "uint8", "uint32"):
        counts = (3, 1, 2) if dtype != "int64" else (3, 4294967298, 2)  # the second one is clamped, not cut
        cases.append(update(f"rolling-counts-{dtype}", "index-dtype-narrowed", lengths=DRAFTS, counts=counts,
                            state_len=8, dtypes={"num_accepted_tokens": dtype}, group="update rolling"))  # fmt: skip
    return cases


def _relations(fn: Callable[..., Case], update: Callable[..., Case]) -> list[Case]:
    cases = []
    flags = "spec-to-plain-transition accepted-offset-ignored shift-by-query-length partition-takes-other-rows-counts"
    for width, dtype, pool in (
        (4, "bfloat16", None), (2, "float16", None), (3, "bfloat16", "float32"), (8, "float16", None),
        (1, "float32", None), (4, "float32", None),
    ):  # fmt: skip
        dtypes = {"conv_states": pool} if pool else {}
        cases.append(fn(f"path-serving-width-{width}-{dtype}", flags, lengths=(14, 9, 23), width=width,
                        state_len=width + 4, dtype=dtype, dtypes=dtypes, activation="silu", dim=8,
                        relation="serving", group="path invariance"))  # fmt: skip
    cases.append(fn("path-serving-short", flags, lengths=(7, 5), state_len=6, activation="silu", dim=8,
                    relation="serving", tier="core", group="path invariance"))  # fmt: skip
    steps = {
        "packed_steps": "fixed-draft-width-assumed sequence-leak result-depends-on-batch",
        "reorder_rows": "result-depends-on-batch partition-takes-other-rows-counts",
        "separate": "result-depends-on-batch partition-takes-other-rows-counts",
    }
    for name, more in steps.items():
        for counts in (None, (2, 1, 3)):
            kind = "packed" if counts is None else "rolling"
            cases.append(update(f"path-{name}-{kind}", more, batch=3, seqlen=3, counts=counts, activation="silu",
                                relation=name, group="path invariance"))  # fmt: skip
    return cases


def _errors(update: Callable[..., Case]) -> list[Case]:
    cases = []

    def bad(name: str, error: str, argument: str, **more: Any) -> None:
        flags = "bad-call-accepted rolled-past-slot" if "narrow" in name else "bad-call-accepted"
        cases.append(update(f"error-{name}", flags, **({"lengths": (3, 2), "dim": 4} | more),
                            expect={"error": error, "names": argument}, group="errors"))  # fmt: skip

    def override(name: str, **change: Any) -> dict[str, Any]:
        return {"override": {name: change}}

    bad("packed-x-rank", "ValueError", "x", **override("x", shape=(2, 3, 4)))
    bad("packed-x-dim-zero", "ValueError", "x", **override("x", shape=(5, 0)))
    bad("packed-offsets-rank", "ValueError", "query_start_loc", **override("query_start_loc", shape=(3, 1)))
    bad("packed-offsets-empty", "ValueError", "query_start_loc", **override("query_start_loc", shape=(0,)))
    bad("packed-offsets-dtype", "TypeError", "query_start_loc", **override("query_start_loc", dtype="int16"))
    bad("packed-indices-size", "ValueError", "cache_indices", **override("cache_indices", shape=(3,)))
    bad("packed-max-seqlen-negative", "ValueError", "max_seqlen", options={"max_seqlen": -1})
    bad("packed-max-seqlen-type", "TypeError", "max_seqlen", options={"max_seqlen": 1.5})
    bad(
        "max-seqlen-without-offsets",
        "ValueError",
        "max_seqlen",
        lengths=None,
        batch=2,
        options={"max_seqlen": 1},
    )
    counts = {"counts": (1, 2)}
    bad(
        "counts-size",
        "ValueError",
        "num_accepted_tokens",
        **counts,
        **override("num_accepted_tokens", shape=(3,)),
    )
    bad(
        "counts-rank",
        "ValueError",
        "num_accepted_tokens",
        **counts,
        **override("num_accepted_tokens", shape=(2, 1)),
    )
    bad("counts-dtype", "TypeError", "num_accepted_tokens", **counts,
        **override("num_accepted_tokens", dtype="float32"))  # fmt: skip
    bad("counts-without-bound", "ValueError", "max_seqlen", **counts, options={"max_seqlen": None})
    bad("rolling-slot-narrow", "ValueError", "conv_states", **counts, state_len=4)
    bad("rolling-slot-narrow-dense", "ValueError", "conv_states", lengths=None, batch=2, seqlen=4, **counts,
        state_len=5)  # fmt: skip
    bad("rolling-slot-narrow-width-2", "ValueError", "conv_states", **counts, width=2, state_len=2)
    validate = {"validate": True}
    for name, offsets in (("start", (1, 3, 5)), ("decreasing", (0, 4, 3)), ("past-end", (0, 3, 6))):
        bad(f"validate-packed-{name}", "ValueError", "query_start_loc", options=validate,
            **override("query_start_loc", values=offsets))  # fmt: skip
    bad("validate-packed-max-seqlen", "ValueError", "max_seqlen", options=validate | {"max_seqlen": 2})
    bad("validate-packed-duplicate", "ValueError", "cache_indices", slots=(3, 3), options=validate)
    bad("validate-count-zero", "ValueError", "num_accepted_tokens", counts=(1, 0), options=validate)
    bad(
        "validate-count-high",
        "ValueError",
        "num_accepted_tokens",
        counts=(4, 1),
        state_len=5,
        options=validate,
    )
    good = {"flags": "valid-call-rejected accepted-exceeds-current-length", "options": validate}
    cases += [
        update("validate-rolling-good", **good, lengths=(1, 2, 1, 0), counts=(3, 1, 0, 0), slots=(3, 0, -1, 3),
               num_slots=5, state_len=6, group="update rolling"),
        update("validate-packed-good", **good, lengths=(3, 0, 1), slots=(2, 2, -1), num_slots=4,
               group="update packed"),
    ]  # fmt: skip
    return cases


def _hostile(update: Callable[..., Case]) -> list[Case]:
    """Data that break their promises: no value is defined, no other memory may change."""
    cases = []
    big = 2**31 - 1
    for name, offsets in {
        "past-end": (0, 4, 1000), "far": (0, 4, big), "negative": (0, -5, 8), "decreasing": (0, 7, 3),
        "very-negative": (0, -big - 1, 8), "start": (3, 5, 8), "swapped": (8, 4, 0),
    }.items():  # fmt: skip
        for kind, counts in (("packed", None), ("rolling", (2, 1))):
            tier = "core" if name == "decreasing" and counts else "full"
            cases.append(update(f"hostile-offsets-{name}-{kind}", "offsets-trusted", lengths=(4, 4), counts=counts,
                                slots=(1, 2), num_slots=4, override={"query_start_loc": {"values": offsets}},
                                expect="undefined", tier=tier, group="hostile data"))  # fmt: skip
    cases += [
        update("hostile-longer-than-promised", "offsets-trusted rolled-past-slot", lengths=(9, 30), counts=(1, 2),
               slots=(1, 0), num_slots=4, state_len=5, options={"max_seqlen": 2}, expect="undefined", tier="core",
               group="hostile data"),
        update("hostile-rolling-duplicates", "offsets-trusted", lengths=(3, 2, 3), counts=(1, 2, 1), slots=(1, 1, 2),
               num_slots=4, expect="undefined", group="hostile data"),
    ]  # fmt: skip
    return cases
