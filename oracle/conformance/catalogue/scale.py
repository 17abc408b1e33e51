"""Sizes: many rows, channels and tokens, and addresses beyond 32 bits."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import TREE, commit, fn, update


def wide() -> list[Case]:
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


def large() -> list[Case]:
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


def serving() -> list[Case]:
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
