"""Prefix caching: windows at block boundaries, one more window a row, rows of no tokens."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import BIG, fn, update


def snapshots() -> list[Case]:
    """Windows at multiples of a block size."""
    flags = "boundary-snapshot-wrong tracked-window-from-flat-tokens"

    def snapshot(
        name: str, extra: str = "", *, size: int, blocks: Any, computed: Any = None, **rest: Any
    ) -> Case:
        args = {"snapshot_indices": blocks} | ({} if computed is None else {"num_computed_tokens": computed})
        return fn(f"snapshot-{name}", f"{flags} {extra}", options={"snapshot_block_size": size}, dim=8, args=args,
                  **{"num_slots": 16, "slots": (0, 1, 2)[: len(rest["lengths"])], "group": "prefix caching"} | rest)  # fmt: skip

    two = {"lengths": (4, 9), "has": (True, True), "computed": (7, 3)}
    near = {
        "lengths": (9, 9, 9),
        "has": (True,) * 3,
        "computed": (7, 6, 5),
        "blocks": ((9, 3), (10, 4), (11, 5)),
        "size": 8,
    }
    return [
        snapshot("blocks", size=8, blocks=((9, 3, 9), (4, 5, 6)), **two, tier="core"),
        snapshot("near-start", **near, tier="core"),
        snapshot("near-start-fresh", size=2, blocks=((3, 4), (5, 6), (7, 8)), lengths=(4, 3, 5), has=None),
        snapshot("chunk-end", size=4, blocks=((9, 3), (4, 9)), lengths=(3, 4), has=(True, False), computed=(5, 0)),
        snapshot("every-token", size=1, blocks=((3, 4, 5, 6), (9, 9, 7, 8)), lengths=(4, 3), has=(False, True),
                 computed=(0, 1), tier="core"),
        snapshot("no-boundary", size=64, blocks=((9,), (9,)), **two),
        snapshot("no-blocks", size=2, blocks=((), ()), **two),
        snapshot("more-boundaries-than-blocks", size=2, blocks=((9, 9, 9), (9, 3, 4)), **two),
        snapshot("long", "launch-plan-too-small", size=16, blocks=((3, 4, 5, 6, 7), (9,) * 5), lengths=(70, 1), has=(True, True),
                 computed=(11, 9)),
        snapshot("not-stored", "pad-slot-not-skipped out-of-range-slot-used", size=2, blocks=((-1, 16, 3, BIG), (4, -2, 5, 6)),
                 lengths=(8, 5), has=(True, False)),
        snapshot("padding-rows", "pad-slot-not-skipped", size=2, blocks=((9, 9), (3, 4), (9, 9)), lengths=(4, 4, 4),
                 slots=(-1, 1, 16), has=(True, False, True), tail=3),
        snapshot("empty-rows", "empty-sequence-mishandled", size=2, blocks=((9, 9), (3, 4), (9, 9)), lengths=(0, 4, 0),
                 has=(True, False, False), computed=(2, 0, 2)),
        snapshot("computed-below-zero", size=2, blocks=((3, 4), (5, 9)), lengths=(4, 3), has=None, computed=(-3, -BIG - 1)),
        snapshot("computed-large", "index-dtype-narrowed", size=2, blocks=((9, 9), (9, 9)), lengths=(4, 3),
                 has=(True, True), computed=(BIG, BIG - 2)),
        snapshot("width-1", "width-one-negative-zero-slice", size=2, blocks=((3, 4), (5, 9)), lengths=(4, 3), width=1,
                 state_len=2),
        snapshot("width-8", size=3, blocks=((9, 3, 4), (5, 6, 9)), lengths=(5, 6), width=8, computed=(4, 0)),
        snapshot("pool-f32", "state-dtype-differs-from-input", size=8, blocks=((9, 3, 9), (4, 5, 6)),
                 dtypes={"conv_states": "float32"}, **two),
        snapshot("strided", "indices-read-with-unit-stride", size=8, blocks=((9, 3, 9), (4, 5, 6)), **two,
                 layout={"snapshot_indices": "slice", "num_computed_tokens": "slice", "conv_states": "transposed_pages",
                         "x": "slice"}),
        snapshot("nan-stays-put", "state-not-bit-exact", size=2, blocks=((3, 4), (5, 9)), lengths=(4, 3), has=(True, True),
                 data="nan_payload"),
        fn("snapshot-and-write-slots", f"{flags} cross-block-migration", lengths=(9, 5), has=(True, True), slots=(0, 0),
           num_slots=12, dim=8, options={"snapshot_block_size": 4}, tier="core", group="prefix caching",
           args={"snapshot_indices": ((9, 3, 4), (9, 5, 9)), "num_computed_tokens": (4, 4), "write_indices": (1, 2),
                 "track_indices": (6, 7), "track_lengths": (1, 5)}),
    ]  # fmt: skip


def tracks() -> list[Case]:
    """One more window per row."""
    flags = "tracked-window-from-flat-tokens"
    more: dict[str, Any] = {"group": "prefix caching", "dim": 8, "num_slots": 14}
    lengths = {"lengths": (4, 9, 1, 2), "slots": (0, 1, 2, 3)}
    return [
        fn("track", flags, **lengths, args={"track_indices": (6, 7, 8, 9)}, **more),
        fn("track-lengths", flags, **lengths, has=(True,) * 4, tier="core",
           args={"track_indices": (6, 7, 8, 9), "track_lengths": (1, 2, 0, 2)}, **more),
        fn("track-lengths-far-out", f"{flags} offsets-trusted", **lengths,
           args={"track_indices": (6, 7, 8, 9), "track_lengths": (-1, BIG, -BIG - 1, 5)}, **more),
        fn("track-not-stored", "pad-slot-not-skipped out-of-range-slot-used", lengths=(4, 9, 0, 2), slots=(0, -1, 2, 3),
           args={"track_indices": (-1, 7, 8, BIG)}, **more),
        update("track", flags, batch=3, slots=(0, 1, -1), args={"track_indices": (6, 7, 8)}, **more),
        update("track-tokens", flags, batch=3, seqlen=2, slots=(0, 1, 2), args={"track_indices": (6, -1, 8)},
               layout={"track_indices": "slice"}, tier="core", **more),
        update("track-rolling", flags, lengths=(2, 4, 1), counts=(3, 1, 2), slots=(0, 1, 2),
               args={"track_indices": (6, 7, 8)}, **more),
        update("track-packed", flags, lengths=(2, 0, 5), slots=(0, 1, 2), args={"track_indices": (6, 7, 8)}, **more),
    ]  # fmt: skip


def empty_rows() -> list[Case]:
    """Rows of no tokens that follow the rule for any number."""
    flags = "empty-row-rule-ignored"
    rows: dict[str, Any] = {"lengths": (0, 4, 0, 0, 0), "has": (True, True, False, False, True), "slots": (0, 1, 2, -1, 9),
                            "num_slots": 8, "dim": 8, "group": "empty rows"}  # fmt: skip
    apply = {"empty_rows": "apply"}
    return [
        fn("empty-apply", flags, **rows, options=apply, tier="core"),
        fn("empty-apply-only", flags, **rows | {"lengths": (0,) * 5}, tail=2, options=apply),
        fn("empty-apply-wide", f"{flags} wide-slot-window-misplaced", **rows, state_len=6, options=apply),
        fn("empty-apply-write-slots", flags, **rows, options=apply, args={"write_indices": (3, 4, 5, 6, 7)}, tier="core"),
        fn("empty-apply-track", flags, **rows, options=apply, args={"track_indices": (3, 4, 5, 6, 7)}),
        fn("empty-apply-back", f"{flags} fresh-slot-not-cleared", **rows, state_len=5, options=apply | {"state_layout": "back"}),
        fn("empty-apply-ring", f"{flags} fresh-slot-not-cleared", **rows, state_len=5, options=apply | {"state_layout": "ring"},
           args={"cache_seqlens": (3, 7, 0, 1, 2), "write_indices": (3, 1, 5, 6, 7)}),
        fn("empty-apply-stateless", flags, lengths=(0, 3), slots=None, num_slots=None, has=None, dim=5, options=apply,
           group="empty rows"),
    ]  # fmt: skip
