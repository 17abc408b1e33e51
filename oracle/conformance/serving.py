"""What serving engines ask for besides: layouts of a slot, write slots, snapshots, windows per step, draft trees,
residual and split. The catalogue's cases, as data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracle.conformance.cases import Case

Make = Callable[..., Case]
BIG = 2**31 - 1
MIXED = (1, 9, 2, 0, 4, 3)  # tokens of six rows
TREE = (-1, 0, 0, 1, 1, 4, -1, 2)  # two levels of forks, a long branch, and a second root


def cases(fn: Make, update: Make, commit: Make, links: Make) -> list[Case]:
    """The cases, from the catalogue's builders."""
    return (
        _layouts(fn, update) + _write_slots(fn, update) + _snapshots(fn) + _tracks(fn, update) + _empty_rows(fn)
        + _windows(update) + _commits(commit) + _trees(update, links) + _fused(fn, update) + _relations(fn)
        + _errors(fn, update, commit, links) + _hostile(fn, update, commit) + _larger(fn, update, commit)
    )  # fmt: skip


def _layouts(fn: Make, update: Make) -> list[Case]:
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


def _write_slots(fn: Make, update: Make) -> list[Case]:
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


def _snapshots(fn: Make) -> list[Case]:
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


def _tracks(fn: Make, update: Make) -> list[Case]:
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


def _empty_rows(fn: Make) -> list[Case]:
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


def _windows(update: Make) -> list[Case]:
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


def _commits(commit: Make) -> list[Case]:
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


def _trees(update: Make, links: Make) -> list[Case]:
    """Nodes whose history is their path from the root."""
    flags, more = "tree-uses-flat-order", {"group": "draft trees"}

    def tree(
        name: str, *parents: tuple[int, ...], extra: str = "", windows: Any = (3, 8), **rest: Any
    ) -> Case:
        args = {"tree_parents": parents} | (
            {} if windows is None else {"window_out": (len(parents), windows[1])}
        )
        options = {"commit": False} | rest.pop("options", {})
        return update(f"tree-{name}", f"{flags} {extra}", batch=len(parents), seqlen=len(parents[0]), options=options,
                      args=args | rest.pop("args", {}), **{"dim": 5, **more} | rest)  # fmt: skip

    chain = tuple(range(-1, 7))
    star = (-1,) + (0,) * 7
    cases = [
        tree(f"width-{width}", TREE, chain, star, width=width, tier="core" if width == 4 else "full",
             extra="width-one-negative-zero-slice" if width == 1 else "window-buffer-aliasing", activation="silu")
        for width in (1, 4, 8)
    ]  # fmt: skip
    cases += [
        tree("no-windows", (-1, 0, 0, 1), (-1, 0, 1, 1), windows=None, tier="core"),
        tree("one-node", (-1,), (0,), windows=(2, 1)),
        tree("no-nodes", (), (), windows=None, extra="empty-sequence-mishandled"),
        tree("parents-far-out", (BIG, 5, 1, 3), (-BIG - 1, -2, 0, 9), windows=(2, 4), extra="offsets-trusted", tier="core"),
        tree("deep", tuple(max(i - 1 - i % 2, -1) for i in range(40)), windows=(1, 40), dim=8),
        tree("parents-int8", (-1, 0, 0, 1), (-1, 0, 1, 1), dtypes={"tree_parents": "int8"}, extra="index-dtype-narrowed"),
        tree("strided", (-1, 0, 0, 1), (-1, 0, 1, 1), extra="indices-read-with-unit-stride",
             layout={"tree_parents": "slice", "x": "slice", "window_out": "transposed_pages"}),
        tree("padding", (-1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 1, 1), slots=(2, -1, 9), num_slots=4,
             extra="pad-slot-not-skipped"),
        tree("back", (-1, 0, 0, 1), (-1, 0, 1, 1), state_len=5, options={"state_layout": "back"},
             extra="back-slot-partly-moved"),
        tree("ring", (-1, 0, 0, 1), (-1, 0, 1, 1), state_len=5, options={"state_layout": "ring"},
             args={"cache_seqlens": (1, 7)}, extra="circular-buffer-ignored"),
        tree("split-residual", (-1, 0, 0, 1), (-1, 0, 1, 1), options={"split_sizes": (2, 3), "channel_offset": 2},
             args={"residual": True, "channels": 9}, extra="residual-misapplied split-misplaced"),
    ]  # fmt: skip
    none = (-1,) * 5
    misread = "tree-links-misread"
    cases += [
        links("tree", misread, ((1, 3, -1, -1, -1), (1, 2, 3, 4, -1)), ((-1, 2, -1, 4, -1), none), tier="core", **more),
        links("siblings", misread, ((1,) + (-1,) * 8,), ((-1, 2, 3, 4, 5, 6, 7, 8, -1),), tier="core", **more),
        links("unreached", misread, (none, (2, -1, -1, -1, -1)), (none, none), **more),
        links("out-of-range", misread, ((1, 0, 2, 9, BIG), (-5, 5, 1, -BIG, 4)), ((5, 2, 1, -2, 3), (1, 7, 3, 2, BIG)), **more),
        links("one-node", misread, ((-1,), (0,)), ((-1,), (0,)), **more),
        links("no-rows", misread, (), (), override={"next_token": {"shape": (0, 4)}, "next_sibling": {"shape": (0, 4)}}, **more),
        links("no-nodes", misread, ((), ()), ((), ()), **more),
        links("strided-int64", misread, ((1, 3, -1, -1, -1), (1, 2, 2**33 + 3, 4, -1)), ((-1, 2, -1, 4, -1), none),
              dtypes={"next_token": "int64", "next_sibling": "int64"}, layout={"next_token": "slice"}, **more),
        links("deep", misread, (tuple(i + 2 if i % 2 == 0 and i < 62 else -1 for i in range(64)),),
              (tuple(i + 1 if i % 2 == 0 and i else -1 for i in range(64)),), **more),
    ]  # fmt: skip
    return cases


def _fused(fn: Make, update: Make) -> list[Case]:
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


def _relations(fn: Make) -> list[Case]:
    cases = []
    flags = {
        "layouts": "circular-buffer-ignored back-slot-partly-moved cross-block-migration result-depends-on-batch",
        "prefixes": "boundary-snapshot-wrong short-chunk-written-to-source-block cross-block-migration",
        "verify_windows": "window-buffer-aliasing verify-commits-state commit-wrong-step",
        "verify_trees": "tree-uses-flat-order tree-links-misread commit-wrong-step result-depends-on-batch",
    }
    for name, text in flags.items():
        for width, dtype, lengths in ((4, "bfloat16", (9, 5)), (3, "float32", (14, 1, 11))):
            cases.append(fn(f"path-{name}-width-{width}", text, lengths=lengths, width=width, dtype=dtype, dim=8,
                            activation="silu", relation=name, tier="core" if width == 4 else "full",
                            num_slots=12, group="path invariance"))  # fmt: skip
    return cases


def _errors(fn: Make, update: Make, commit: Make, links: Make) -> list[Case]:
    cases = []
    slots = {"slots": (4, 2), "num_slots": 6}

    def bad(make: Make, name: str, error: str, argument: str, **more: Any) -> None:
        sized: dict[str, Any] = {}
        if make in (fn, update):
            sized = {"dim": 4, **slots} | ({"lengths": (3, 2)} if make is fn else {"batch": 2, "seqlen": 2})
        cases.append(make(f"error-{name}", "bad-call-accepted", **sized | more,
                          expect={"error": error, "names": argument}, group="errors"))  # fmt: skip

    def shape(name: str, *sizes: int) -> dict[str, Any]:
        return {"override": {name: {"shape": sizes, "dtype": "int32"}}}

    def options(**options: Any) -> dict[str, Any]:
        return {"options": options}

    for make in (fn, update):
        bad(make, "layout-name", "ValueError", "state_layout", **options(state_layout="rear"))
        bad(make, "ring-without-counter", "ValueError", "cache_seqlens", **options(state_layout="ring"))
        bad(make, "counter-without-ring", "ValueError", "cache_seqlens", args={"cache_seqlens": (1, 2)})
        bad(
            make,
            "counter-size",
            "ValueError",
            "cache_seqlens",
            **options(state_layout="ring"),
            **shape("cache_seqlens", 3),
        )
        bad(make, "write-slots-size", "ValueError", "write_indices", **shape("write_indices", 3))
        bad(make, "write-slots-dtype", "TypeError", "write_indices",
            override={"write_indices": {"shape": (2,), "dtype": "float32"}})  # fmt: skip
        bad(
            make,
            "track-layout",
            "ValueError",
            "track_indices",
            args={"track_indices": (1, 0)},
            **options(state_layout="back"),
        )
        bad(make, "residual-shape", "ValueError", "residual",
            override={"residual": {"shape": (5, 5), "dtype": "float32"}})  # fmt: skip
        bad(
            make,
            "channel-offset-high",
            "ValueError",
            "channel_offset",
            args={"channels": 6},
            **options(channel_offset=3),
        )
        bad(make, "channel-offset-low", "ValueError", "channel_offset", args={"channels": 6},
            override={"x": {"shape": (2, 2, 6) if make is update else (5, 6), "dtype": "float32"}},
            **options(channel_offset=-1))  # fmt: skip
        bad(make, "split-sum", "ValueError", "split_sizes", **options(split_sizes=(2, 3)))
        bad(make, "split-zero", "ValueError", "split_sizes", **options(split_sizes=(4, 0)))
        bad(
            make,
            "validate-write-slot-twice",
            "ValueError",
            "write_indices",
            args={"write_indices": (1, 1)},
            **options(validate=True),
        )
        bad(
            make,
            "validate-write-slot-high",
            "ValueError",
            "write_indices",
            args={"write_indices": (1, 6)},
            **options(validate=True),
        )
        bad(make, "validate-write-slot-read", "ValueError", "write_indices", args={"write_indices": (2, 1)},
            **options(validate=True), **({"has": (True, True)} if make is fn else {}))  # fmt: skip
    bad(fn, "empty-rows", "ValueError", "empty_rows", **options(empty_rows="clear"))
    bad(
        fn,
        "snapshot-size-missing",
        "ValueError",
        "snapshot_block_size",
        args={"snapshot_indices": ((1,), (0,))},
    )
    bad(fn, "snapshot-size-zero", "ValueError", "snapshot_block_size", args={"snapshot_indices": ((1,), (0,))},
        **options(snapshot_block_size=0))  # fmt: skip
    bad(fn, "snapshot-size-alone", "ValueError", "snapshot_block_size", **options(snapshot_block_size=8))
    bad(
        fn,
        "snapshot-rank",
        "ValueError",
        "snapshot_indices",
        **options(snapshot_block_size=8),
        **shape("snapshot_indices", 2),
    )
    bad(
        fn,
        "snapshot-computed-alone",
        "ValueError",
        "num_computed_tokens",
        args={"num_computed_tokens": (1, 2)},
    )
    bad(fn, "track-lengths-alone", "ValueError", "track_lengths", args={"track_lengths": (1, 2)})
    bad(fn, "validate-snapshot-slot", "ValueError", "snapshot_indices", args={"snapshot_indices": ((4,), (0,))},
        **options(snapshot_block_size=2, validate=True))  # fmt: skip
    windows = {"window_out": (2, 2)}
    bad(update, "rolling-layout", "ValueError", "state_layout", counts=(1, 1), **options(state_layout="back"))
    bad(update, "rolling-windows", "ValueError", "num_accepted_tokens", counts=(1, 1), args=windows)
    bad(
        update,
        "rolling-no-commit",
        "ValueError",
        "num_accepted_tokens",
        counts=(1, 1),
        **options(commit=False),
    )
    bad(
        update,
        "no-commit-write-slots",
        "ValueError",
        "write_indices",
        args={"write_indices": (1, 0)},
        **options(commit=False),
    )
    bad(update, "commit-type", "TypeError", "commit", **options(commit=0))
    bad(update, "windows-steps", "ValueError", "window_out", args={"window_out": (2, 1)})
    bad(
        update,
        "windows-history",
        "ValueError",
        "window_out",
        override={"window_out": {"shape": (2, 2, 4, 4), "dtype": "float32"}},
    )
    bad(update, "windows-buffers", "ValueError", "window_out", args={"window_out": (1, 2)})
    bad(update, "windows-indices-alone", "ValueError", "window_indices", args={"window_indices": (1, 0)})
    bad(update, "windows-without-bound", "ValueError", "max_seqlen", args=windows, lengths=(2, 2))
    bad(update, "tree-commits", "ValueError", "commit", args={"tree_parents": ((-1, 0), (-1, 0))})
    bad(
        update,
        "tree-axes",
        "ValueError",
        "x",
        seqlen=None,
        args={"tree_parents": ((-1,), (-1,))},
        **options(commit=False),
    )
    bad(
        update,
        "tree-shape",
        "ValueError",
        "tree_parents",
        **options(commit=False),
        **shape("tree_parents", 2, 3),
    )
    bad(update, "validate-window-twice", "ValueError", "window_indices", args=windows | {"window_indices": (1, 1)},
        **options(commit=False, validate=True))  # fmt: skip
    bad(update, "validate-tree-order", "ValueError", "tree_parents", args={"tree_parents": ((-1, 0), (-1, 1))},
        **options(commit=False, validate=True))  # fmt: skip
    bad(commit, "steps-rank", "ValueError", "accepted_steps", **shape("accepted_steps", 3, 1))
    bad(
        commit,
        "steps-dtype",
        "TypeError",
        "accepted_steps",
        override={"accepted_steps": {"dtype": "float32"}},
    )
    bad(commit, "pool-narrow", "ValueError", "conv_states", override={"conv_states": {"shape": (8, 2, 8)}})
    bad(commit, "dim", "ValueError", "conv_states", override={"conv_states": {"shape": (8, 3, 9)}})
    bad(commit, "validate-step", "ValueError", "accepted_steps", steps=(0, 3, 1), **options(validate=True))
    bad(
        commit,
        "validate-slot-twice",
        "ValueError",
        "cache_indices",
        slots=(4, 1, 4),
        **options(validate=True),
    )
    bad(commit, "backend", "ValueError", "backend", **options(backend="no_such_backend"))
    bad(links, "shape", "ValueError", "next_sibling", next_token=((-1, -1),), next_sibling=((-1,),))
    good: dict[str, Any] = {"flags": "valid-call-rejected", "dim": 4}
    cases += [
        fn("validate-serving-good", **good, lengths=(3, 0, 9, 2), slots=(4, 4, 4, -1), num_slots=8, has=(True,) * 4,
           args={"write_indices": (1, 99, 2, 4), "snapshot_indices": ((99, 0), (99, 99), (3, 5), (99, 99)),
                 "num_computed_tokens": (5, 0, 0, 0), "track_indices": (6, 99, -1, 99)},
           options={"snapshot_block_size": 4, "validate": True}, group="prefix caching"),
        update("validate-serving-good", **good, batch=3, seqlen=2, slots=(4, 4, -1), num_slots=8,
               args={"window_out": (2, 2), "window_indices": (1, -1, 1), "tree_parents": ((-1, 0), (-1, -1), (5, 5))},
               options={"commit": False, "validate": True}, group="draft trees"),
    ]  # fmt: skip
    return cases


def _hostile(fn: Make, update: Make, commit: Make) -> list[Case]:
    """Data that break their promises: no value is defined, no other memory may change."""
    flags: dict[str, Any] = {
        "flags": "offsets-trusted",
        "expect": "undefined",
        "group": "hostile data",
        "dim": 8,
    }
    offsets = {"query_start_loc": {"values": (0, 7, 3)}}
    return [
        fn("hostile-write-slots-twice", **flags, lengths=(4, 3, 2), slots=(4, 2, 5), num_slots=8, args={"write_indices": (1, 1, 4)}),
        fn("hostile-snapshot-offsets", **flags, lengths=(4, 4), slots=(4, 2), num_slots=8, override=offsets, tier="core",
           args={"snapshot_indices": ((1, 0), (5, 3)), "track_indices": (6, 7), "num_computed_tokens": (BIG, -5)},
           options={"snapshot_block_size": 2}),
        fn("hostile-ring-offsets", **flags, lengths=(4, 4), slots=(4, 2), num_slots=8, state_len=5, override=offsets,
           args={"cache_seqlens": (BIG, -BIG)}, options={"state_layout": "ring"}),
        update("hostile-windows-offsets", **flags, lengths=(4, 4), slots=(4, 2), num_slots=8, override=offsets, tier="core",
               args={"window_out": (2, 4)}, options={"commit": False, "max_seqlen": 4}),
        update("hostile-windows-longer-than-promised", **flags, lengths=(9, 30), slots=(1, 0), num_slots=4,
               args={"window_out": (3, 2)}, options={"commit": False, "max_seqlen": 2}),
        update("hostile-windows-twice", **flags, batch=3, seqlen=2, slots=(1, 0, 2), num_slots=4,
               args={"window_out": (2, 2), "window_indices": (1, 1, 1)}, options={"commit": False}),
        commit("hostile-slot-twice", **flags, slots=(4, 1, 4)),
    ]  # fmt: skip


def _larger(fn: Make, update: Make, commit: Make) -> list[Case]:
    """More rows, tokens and channels than a block of a compiled kernel has; and addresses beyond 2**31."""
    flags = "channel-tail-unmasked wrong-only-at-scale"
    wide: dict[str, Any] = {"dim": 1040, "activation": "silu", "num_slots": 150}
    rows = tuple(range(70))
    other = tuple(range(149, 79, -1))
    steps = {"batch": 70, "slots": rows, **wide}
    cases = [
        fn("snapshot-scale", f"{flags} boundary-snapshot-wrong launch-plan-too-small", lengths=(300, 1, 150), slots=(0, 1, 2),
           has=(True, True, False), options={"snapshot_block_size": 64}, **wide,
           args={"snapshot_indices": ((9, 3, 4, 5, 6), (9, 7, 9, 9, 9), (12, 13, 10, 11, 9)),
                 "num_computed_tokens": (70, 127, 62)}, group="prefix caching"),
        fn("write-slots-scale", f"{flags} cross-block-migration", lengths=(2,) * 69 + (200,), slots=rows, has=(True,) * 70,
           args={"write_indices": other}, **wide, group="prefix caching"),
        fn("projection-scale", f"{flags} split-misplaced tile-halo-wrong", lengths=(130, 1, 67), slots=(0, 1, 2),
           args={"channels": 3144, "residual": True}, options={"channel_offset": 1000, "split_sizes": (512, 16, 512)},
           **wide, group="residual and split"),
        update("write-slots-scale", f"{flags} cross-block-migration", args={"write_indices": other}, **steps, group="prefix caching"),
        update("back-scale", f"{flags} back-slot-partly-moved", state_len=6, options={"state_layout": "back"}, **steps,
               group="layouts of a slot"),
        update("ring-scale", f"{flags} circular-buffer-ignored", seqlen=3, state_len=6, options={"state_layout": "ring"},
               args={"cache_seqlens": tuple(7 * row for row in rows)}, **steps, group="layouts of a slot"),
        update("windows-scale", f"{flags} window-buffer-aliasing", seqlen=4, options={"commit": False},
               args={"window_out": (70, 4), "window_indices": rows[::-1]}, **steps, group="windows per step"),
        update("tree-scale", f"{flags} tree-uses-flat-order", seqlen=8, options={"commit": False},
               args={"window_out": (70, 8), "tree_parents": (TREE,) * 70}, **steps, group="draft trees"),
        update("split-scale", f"{flags} split-misplaced", args={"channels": 1100},
               options={"channel_offset": 40, "split_sizes": (512, 16, 512)}, **steps, group="residual and split"),
        commit("scale", f"{flags} commit-wrong-step", steps=tuple(row % 4 for row in rows), slots=rows, buffers=rows[::-1],
               dim=1040, num_slots=150, windows=(70, 4), group="windows per step"),
    ]  # fmt: skip
    far: dict[str, Any] = {"dim": 5, "tier": "large", "group": "large"}
    pool = {"slots": (3, 0), "num_slots": 4, "layout": {"conv_states": "huge_pitch_30"}}
    cases += [
        fn("write-slots-pitch-2-31", "int32-slot-offset", lengths=(3, 2), args={"write_indices": (1, 2)}, **pool, **far),
        fn("snapshot-pitch-2-31", "int32-slot-offset", lengths=(3, 2), args={"snapshot_indices": ((2,), (1,))},
           options={"snapshot_block_size": 2}, **pool, **far),
        update("back-pitch-2-31", "int32-slot-offset", batch=2, state_len=5, options={"state_layout": "back"}, **pool, **far),
        update("windows-pitch-2-31", "int32-slot-offset", batch=2, seqlen=2, options={"commit": False},
               args={"window_out": (4, 2), "window_indices": (3, 0)}, layout={"window_out": "huge_pitch_30"}, **far),
        commit("pitch-2-31", "int32-slot-offset", steps=(1, 0), buffers=(3, 2), windows=(4, 2), slots=(3, 0), num_slots=4,
               layout={"conv_states": "huge_pitch_30", "window_out": "huge_pitch_30"}, **far),
    ]  # fmt: skip
    return cases
