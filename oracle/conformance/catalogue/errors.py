"""Calls that break the contract, and data that break their promises."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import BIG, Make, commit, fn, links, update


def calls() -> list[Case]:
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


def steps() -> list[Case]:
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


def serving() -> list[Case]:
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


def hostile() -> list[Case]:
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


def hostile_steps() -> list[Case]:
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


def hostile_serving() -> list[Case]:
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
