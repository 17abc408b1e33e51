"""Cases of relations: what must hold bit for bit between calls."""

from __future__ import annotations

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import SHORT, fn, update


def plain() -> list[Case]:
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


def steps() -> list[Case]:
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


def serving() -> list[Case]:
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


def models() -> list[Case]:
    """Prefills that are also called as models do, by `short_conv`."""
    cases = []
    names = {
        "short_documents": ("sequence-leak", (1, 1, 12, 3)),
        "short_padding": ("right-padded-batch-state", (1, 0, 12, 3)),
    }
    for name, (flags, lengths) in names.items():
        for width, dtype, rows, pool in (
            (4, "bfloat16", (5, 2, 9), None), (3, "float16", lengths, None), (8, "float32", (3, 9, 2, 17), None),
            (1, "bfloat16", (2, 3), None), (2, "bfloat16", (4, 11, 1), "float32"),
        ):  # fmt: skip
            cases.append(fn(f"path-{name}-width-{width}", flags, lengths=rows, has=(True,) * len(rows), width=width, dim=8,
                            dtype=dtype, dtypes={"conv_states": pool} if pool else {}, activation=None if width == 3 else "silu",
                            relation=name, tier="core" if width == 4 else "full", group="path invariance"))  # fmt: skip
    return cases
