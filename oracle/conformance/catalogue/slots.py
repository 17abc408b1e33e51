"""Which slot a row reads and writes, and where in it the window lies."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import BIG, fn, update

MIXED = (1, 9, 2, 0, 4, 3)  # tokens of six rows


def numbers() -> list[Case]:
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


def layouts() -> list[Case]:
    """Slots whose window lies at the end, or turns around."""
    back = {"options": {"state_layout": "back"}, "group": "layouts of a slot"}
    ring = {"options": {"state_layout": "ring"}, "group": "layouts of a slot"}
    moved = "back-slot-partly-moved fresh-slot-not-cleared"
    turns = "circular-buffer-ignored negative-ring-position fresh-slot-not-cleared"
    cases = []
    for width, state_len in ((4, 7), (2, 3), (1, 2), (8, 7)):
        tier = "core" if state_len == 7 and width == 4 else "full"
        name, shape = f"width-{width}-of-{state_len}", {"width": width, "state_len": state_len, "tier": tier}
        seen = {"args": {"cache_seqlens": (0, 5, 1, 3, 9, 2 * state_len)}}
        cases += [
            fn(f"back-{name}", moved, lengths=MIXED, dim=8, **shape, **back),
            fn(f"ring-{name}", turns, lengths=MIXED, dim=8, **shape, **ring, **seen),
        ]
    wrapped = {"args": {"cache_seqlens": (4, 1, 13)}}
    cases += [
        fn("ring-long", turns, lengths=(40, 33), state_len=5, dim=5, activation="silu", **ring,
           args={"cache_seqlens": (3, 0)}),
        fn("ring-exact", turns, lengths=MIXED, state_len=3, dim=8, **ring,
           args={"cache_seqlens": (0, 5, 1, 3, 9, 4)}),
        fn("back-stateless", "null-state-pointer", lengths=(3, 2), slots=None, num_slots=None, has=None, dim=5, **back),
        update("back-width-4-of-4", moved, batch=3, dim=8, state_len=4, **back),
        update("ring-width-4-of-4", turns, batch=3, dim=8, state_len=4, **ring, args={"cache_seqlens": (0, 5, 7)}),
        update("back-tokens", moved, batch=3, seqlen=3, state_len=5, dim=8, activation="silu", tier="core", **back),
        update("ring-tokens", turns, batch=3, seqlen=3, state_len=5, dim=8, activation="silu", tier="core", **ring,
               **wrapped),
        update("ring-more-tokens-than-columns", turns, batch=2, seqlen=9, state_len=4, dim=5, **ring,
               args={"cache_seqlens": (2, 0)}),
        update("back-packed", f"{moved} short-sequence-state-shift", lengths=(2, 0, 5), tail=2, state_len=5, dim=8,
               **back),
        update("ring-packed", f"{turns} short-sequence-state-shift", lengths=(2, 0, 5), tail=2, state_len=5, dim=8,
               **ring, **wrapped),
        update("ring-padding", "pad-slot-not-skipped", batch=4, slots=(3, -1, 9, 0), num_slots=6, state_len=5, dim=8,
               **ring, args={"cache_seqlens": (7, 1, 2, 1)}),
        update("ring-counter-below-zero", "negative-ring-position", batch=3, seqlen=2, state_len=5, dim=8, **ring,
               args={"cache_seqlens": (-1, -BIG - 1, 2)}, tier="core"),
        update("ring-counter-large", "negative-ring-position index-dtype-narrowed", batch=3, seqlen=4, state_len=5,
               dim=8, **ring, args={"cache_seqlens": (BIG, BIG - 2, BIG - 5)}, tier="core"),
        update("ring-counter-int64", "index-dtype-narrowed", batch=2, seqlen=2, state_len=5, dim=8, **ring,
               args={"cache_seqlens": (2**33 + 1, 4)}, dtypes={"cache_seqlens": "int64"}),
        update("back-nan-stays-put", "nan-spreads state-not-bit-exact", batch=3, seqlen=2, state_len=6, data="nan_payload",
               **back),
        update("ring-pool-f32", "state-dtype-differs-from-input", batch=3, seqlen=2, state_len=5, dim=8,
               dtypes={"conv_states": "float32"}, **ring, **wrapped),
        update("ring-strided", "indices-read-with-unit-stride state-length-from-stride", batch=3, seqlen=2, state_len=5,
               layout={"conv_states": "transposed_pages", "cache_seqlens": "slice", "cache_indices": "slice"},
               **ring, **wrapped),
        update("back-strided", "state-length-from-stride layout-axes-swapped", batch=3, seqlen=2, state_len=5,
               layout={"conv_states": "transposed_pages", "x": "slice"}, **back),
    ]  # fmt: skip
    return cases


def write_slots() -> list[Case]:
    """Rows that write another slot than they read."""
    prefix = "short-chunk-written-to-source-block cross-block-migration"
    more: dict[str, Any] = {"group": "prefix caching"}
    five = {"num_slots": 12, "slots": (0, 2, 4, 6, 8), "dim": 8, "args": {"write_indices": (1, 3, 5, 7, 9)}}
    cases = [
        fn("write-slots", prefix, lengths=(1, 2, 3, 9, 0), has=(True,) * 5, tier="core", **five, **more),
        fn("write-slots-fresh", f"{prefix} stale-halo-when-no-initial-state", lengths=(1, 2, 3, 9, 1), has=None,
           **five, **more),
        fn("shared-prefix", f"{prefix} duplicate-slot-write", lengths=(1, 2, 9), has=(True,) * 3, slots=(4, 4, 4), num_slots=8,
           dim=8, args={"write_indices": (1, 3, 0)}, activation="silu", tier="core", **more),
        fn("write-slots-some-in-place", prefix, lengths=(1, 2, 3), has=(True,) * 3, slots=(4, 2, 5), num_slots=8, dim=8,
           args={"write_indices": (4, 0, 5)}, **more),
        fn("write-slots-nowhere", "pad-slot-not-skipped out-of-range-slot-used", lengths=(3, 2, 9, 1), has=(True,) * 4,
           slots=(4, 2, 5, -1), num_slots=8, dim=8, args={"write_indices": (-1, 8, BIG, 3)}, tier="core", **more),
        fn("write-slots-null-block", "null-block-processed", lengths=(3, 2), has=(True, True), slots=(4, 2), num_slots=8,
           dim=8, args={"write_indices": (0, 5)}, options={"pad_slot_id": 0}, **more),
        fn("write-slots-int64", "index-dtype-narrowed", lengths=(3, 2), has=(True, True), slots=(4, 2), num_slots=8,
           dim=8, args={"write_indices": (2**32 + 1, 5)}, dtypes={"write_indices": "int64"}, **more),
        fn("write-slots-pool-f32", "state-dtype-differs-from-input", lengths=(1, 2, 3, 9, 4), dtypes={"conv_states": "float32"},
           layout={"write_indices": "slice", "conv_states": "pages"}, **five, **more),
        update("write-slots", prefix, batch=3, slots=(4, 2, 5), num_slots=8, dim=8, args={"write_indices": (1, 3, 0)},
               tier="core", **more),
        update("write-slots-tokens", prefix, batch=3, seqlen=2, slots=(4, 4, 4), num_slots=8, dim=8, state_len=5,
               args={"write_indices": (1, 3, -1)}, **more),
        update("write-slots-packed", prefix, lengths=(1, 0, 5), slots=(4, 2, 5), num_slots=8, dim=8, tail=2,
               args={"write_indices": (1, 3, 0)}, **more),
        update("write-slots-rolling", f"{prefix} overlapping-shift-without-ordering", lengths=(2, 4, 3), counts=(3, 1, 2),
               slots=(4, 2, 5), num_slots=8, dim=8, args={"write_indices": (1, 3, 0)}, tier="core", **more),
    ]  # fmt: skip
    for layout, args in (("back", {}), ("ring", {"cache_seqlens": (0, 4, 1, 8, 3)})):
        both: dict[str, Any] = five | {"args": {"write_indices": (1, 3, 5, 7, 9), **args}}
        cases.append(fn(f"write-slots-{layout}", f"{prefix} fresh-slot-not-cleared", lengths=(1, 2, 3, 9, 1), state_len=5,
                        options={"state_layout": layout}, tier="core", **both, **more))  # fmt: skip
    return cases


def unsigned() -> list[Case]:
    """Counts, counters and parents that a signed reading makes negative."""
    flags, huge = "index-dtype-narrowed", 2**63
    return [
        update("rolling-counts-uint64", flags, lengths=(2, 4, 3), counts=(3, huge, 2 * huge - 1), state_len=8,
               dtypes={"num_accepted_tokens": "uint64"}, group="update rolling"),
        fn("snapshot-computed-uint64", flags, lengths=(4, 3), has=(True, True), slots=(0, 1), num_slots=16, dim=8,
           options={"snapshot_block_size": 2}, group="prefix caching", dtypes={"num_computed_tokens": "uint64"},
           args={"snapshot_indices": ((9, 3), (9, 4)), "num_computed_tokens": (huge, 1)}),
        update("slots-uint64", flags, batch=3, slots=(3, 2 * huge - 1, 0), num_slots=4, dim=8,
               dtypes={"cache_indices": "uint64"}, group="update linear"),
        update("ring-counter-uint64", flags, batch=3, dim=8, slots=(1, 3, 0), num_slots=4, state_len=5,
               options={"state_layout": "ring"}, args={"cache_seqlens": (huge, 2 * huge - 1, 7)},
               dtypes={"cache_seqlens": "uint64"}, group="layouts of a slot"),
        update("tree-parents-uint64", flags, batch=1, seqlen=4, dim=8, slots=(1,), num_slots=3, options={"commit": False},
               args={"tree_parents": ((2 * huge - 1, 0, huge, 1),)}, dtypes={"tree_parents": "uint64"}, group="draft trees"),
    ]  # fmt: skip
