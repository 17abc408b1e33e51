"""Decode steps of several tokens: packed rows, rolling slots, windows per step and their commit."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import BIG, commit, update

DRAFTS = (2, 4, 3)  # tokens of three rows of a verify step


def packed() -> list[Case]:
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


def rolling() -> list[Case]:
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


def windows() -> list[Case]:
    """A window after every token, with and without the slot moving on."""
    flags = "window-buffer-aliasing verify-commits-state"
    more: dict[str, Any] = {"group": "windows per step"}
    stay = {"commit": False}
    args = {"window_out": (4, 3), "window_indices": (2, 0, 3)}
    dense = {"batch": 3, "seqlen": 3, "dim": 5, "args": args}
    packed = {"lengths": (3, 1, 2), "dim": 8, "args": args}
    cases = [
        update(f"windows-width-{width}", flags, **dense, width=width, options=stay, tier="core" if width == 4 else "full",
               activation="silu", **more)
        for width in (1, 4, 8)
    ]  # fmt: skip
    cases += [
        update("windows-one-token", flags, batch=3, dim=8, args={"window_out": (3, 1)}, options=stay, tier="core", **more),
        update("windows-packed", f"{flags} fixed-draft-width-assumed", **packed, tail=2, options=stay | {"max_seqlen": 3},
               tier="core", **more),
        update("windows-committed", "window-buffer-aliasing", **dense, tier="core", **more),
        update("windows-more-steps", flags, batch=2, seqlen=2, dim=8, args={"window_out": (2, 5)}, options=stay, **more),
        update("windows-not-stored", "window-buffer-aliasing out-of-range-slot-used", batch=4, seqlen=2, dim=8,
               args={"window_out": (4, 2), "window_indices": (-1, 4, 1, -BIG)}, options=stay, **more),
        update("windows-padding", "pad-slot-not-skipped", batch=4, seqlen=2, slots=(3, -1, 9, 0), num_slots=6, dim=8,
               args={"window_out": (4, 2)}, options=stay, **more),
        update("windows-empty-rows", "empty-sequence-mishandled", lengths=(0, 2, 0), dim=8, args=args,
               options=stay | {"max_seqlen": 2}, **more),
        update("windows-f32-of-bf16", f"{flags} state-dtype-differs-from-input", **dense, options=stay,
               dtypes={"window_out": "float32"}, **more),
        update("windows-bf16-of-f32", f"{flags} state-dtype-differs-from-input", **dense, options=stay, dtype="float32",
               dtypes={"window_out": "bfloat16"}, **more),
        update("windows-strided", f"{flags} layout-axes-swapped", **dense, options=stay,
               layout={"window_out": "transposed_pages", "window_indices": "slice", "conv_states": "pages"}, **more),
        update("windows-back", f"{flags} back-slot-partly-moved", **dense, state_len=6, options=stay | {"state_layout": "back"},
               **more),
        update("windows-ring", f"{flags} circular-buffer-ignored", batch=3, seqlen=3, dim=5, state_len=6,
               options=stay | {"state_layout": "ring"}, args=args | {"cache_seqlens": (2, 0, 13)}, **more),
        update("windows-nan-stays-put", "state-not-bit-exact nan-spreads", **dense, options=stay, data="nan_payload", **more),
        update("no-commit", "verify-commits-state", batch=3, dim=8, options=stay, **more),
        update("no-commit-shared-slot", "verify-commits-state duplicate-slot-write", batch=3, seqlen=4, slots=(2, 2, 2),
               num_slots=4, dim=8, options=stay, activation="silu", tier="core", **more),
    ]  # fmt: skip
    return cases


def commits() -> list[Case]:
    """Accepted windows into slots."""
    flags, more = "commit-wrong-step", {"group": "windows per step"}
    return [
        commit("steps", flags, tier="core", **more),
        commit("steps-f16-width-2", flags, dtype="float16", width=2, dim=5, state_len=3, **more),
        commit("width-1", f"{flags} width-one-negative-zero-slice", width=1, state_len=2, **more),
        commit("steps-out-of-range", flags, steps=(-1, 3, 2, -BIG, BIG), slots=(5, 1, 0, 2, 3), buffers=(4, 0, 5, 1, 2),
               tier="core", **more),
        commit("padding", f"{flags} pad-slot-not-skipped out-of-range-slot-used", steps=(0, 1, 2, 1, 2), slots=(-1, 8, 0, 2, 3),
               buffers=(0, 1, 2, -1, 6), tier="core", **more),
        commit("identity", f"{flags} wrong-index-namespace", slots=None, buffers=None, windows=(3, 3), **more),
        commit("no-rows", flags, steps=(), slots=(), buffers=(), **more),
        commit("wide-slots", f"{flags} wide-slot-window-misplaced", state_len=6, **more),
        commit("null-block", "null-block-processed", slots=(0, 4, 2), options={"pad_slot_id": 0}, buffers=(1, 2, 3), **more),
        commit("f32-to-bf16", "state-dtype-differs-from-input", dtypes={"window_out": "float32"}, **more),
        commit("bf16-to-f32", "state-dtype-differs-from-input", dtypes={"conv_states": "float32"}, **more),
        commit("strided", "indices-read-with-unit-stride layout-axes-swapped", dim=5, **more,
               layout={"conv_states": "transposed_pages", "window_out": "transposed_pages", "accepted_steps": "slice",
                       "cache_indices": "slice", "window_indices": "slice"}),
        commit("steps-int64", "index-dtype-narrowed", steps=(2**32, 1, 2), dtypes={"accepted_steps": "int64"}, **more),
    ]  # fmt: skip
