"""Draft trees, and the links that they are made of."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import BIG, TREE, links, update


def trees() -> list[Case]:
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
