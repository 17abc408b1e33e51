"""The case type and its selection. The catalogue itself is in `catalogue`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

TIERS = ("core", "full", "large")
FRONT_NUMBERS = (
    "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "q_scale", "norm_eps", "lower_bound", "channel_offsets",
)  # fmt: skip
RELATIONS_NEED: dict[str | None, tuple[str, ...]] = {
    "layouts": ("state_layout_back", "state_layout_ring", "write_indices"),
    "prefixes": ("snapshot", "write_indices"),
    "verify_windows": ("window_out", "no_commit", "commit_windows"),
    "verify_trees": ("window_out", "no_commit", "commit_windows", "tree_parents", "tree_parents_from_links"),
    "short_documents": ("short_conv",),
    "short_padding": ("short_conv",),
}
"""Of `adapter.SERVING_FEATURES`, what the calls inside a relation use."""
_STEPS = ("op:causal_conv1d_update",)
RELATIONS_USE: dict[str | None, tuple[str, ...]] = {
    "chain": _STEPS,
    "serving": (*_STEPS, "update:packed", "update:rolling"),
    "layouts": (*_STEPS, "update:packed"),
    "verify_windows": (*_STEPS, "update:multi_token"),
    "verify_trees": (*_STEPS, "update:multi_token"),
    "packed_steps": ("update:packed",),
}
"""Features of the calls inside a relation that its case alone would not have."""


@dataclass(frozen=True)
class Case:
    """One case, as data.

    Attributes:
      id: stable and never reused.
      op: one of `adapter.OPS`.
      axes: dim, width, state_len, num_slots (None: no pool), slots (None: row i in slot i); for a prefill
        lengths (tokens of each row), tail (tokens after the last row) and has (flag of each row, or None);
        for an update batch and seqlen (None: x has two axes), and where used lengths and tail (packed rows)
        and counts (num_accepted_tokens). Where used, by the names of the arguments: integer arrays as nested lists
        (cache_seqlens, write_indices, snapshot_indices, num_computed_tokens, track_indices, track_lengths,
        window_indices, tree_parents), window_out as [buffers, steps], residual as True; and channels of x. For a
        commit: width, dim, slots, num_slots, state_len, window_out, window_indices and accepted_steps; for links
        next_token and next_sibling. For a backward pass: lengths (equal where dense), tail, dim, width, and dense (x has
        three axes). For the fronts what the plain operations have, of a gated convolution channels of bcx where they are
        not 3 * dim; and channel_gate, whether `a` has an axis of channels.
      dtypes: of every array argument; bias None means no bias.
      options: keyword-only arguments of the call.
      layout: argument -> memory layout, where not contiguous; see `arrays.place`.
      data: what the values are; see `inputs.DATA`.
      seed: of the values.
      override: argument -> {"values" | "shape" | "dtype" | "none"}, to break the contract on purpose.
      relation: name of a property that is checked besides the values, see `relations`; or None.
      expect: "value"; "undefined" (any values in the named slots and out, but no fault and no other memory);
        or {"error": type name, "names": argument}.
      flags: failure modes that this case is there to catch.
      tier: "core" is small enough for kernel interpreters, "full" for compiled code, "large" needs a GPU.
      group: how tables sum cases up.
      since: contract version that introduced it.
    """

    id: str
    op: str
    axes: Mapping[str, Any]
    dtypes: Mapping[str, str | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, str] = field(default_factory=dict)
    data: str = "random"
    seed: int = 0
    override: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    relation: str | None = None
    expect: Any = "value"
    flags: tuple[str, ...] = ()
    tier: str = "full"
    group: str = ""
    since: int = 1

    def to_json(self) -> dict[str, Any]:
        """The case as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """The case of `to_json`.

        Raises:
          ValueError: a field is missing or unknown.
        """
        names = {f.name for f in fields(cls)}
        required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
        if not isinstance(data, Mapping) or set(data) - names or required - set(data):
            raise ValueError(
                f"case: expected an object with {sorted(required)} and fields of {sorted(names)}, got {str(data)[:80]}"
            )
        return cls(**{**data, "flags": tuple(data.get("flags", ()))})

    @property
    def serving(self) -> list[str]:
        """What of `adapter.SERVING_FEATURES` an implementation must support to run this case."""
        used = {*self.options, *self.axes, *self.override}
        layout = self.options.get("state_layout")
        found = {
            "state_layout_back": layout not in (None, "front", "ring"),
            "state_layout_ring": layout == "ring" or "cache_seqlens" in used,
            "snapshot": not used.isdisjoint(("snapshot_indices", "snapshot_block_size", "num_computed_tokens")),
            "track": not used.isdisjoint(("track_indices", "track_lengths")),
            "window_out": not used.isdisjoint(("window_out", "window_indices")) and self.op.endswith("_update"),
            "no_commit": "commit" in used,
            "split": "split_sizes" in used,
            **{name: name in used for name in (
                "write_indices", "empty_rows", "tree_parents", "residual", "channel_offset",
            )},
            **{name: self.op == name for name in (
                "commit_windows", "tree_parents_from_links", "causal_conv1d_backward", "gated_delta_prologue_backward",
                "gated_short_conv_backward", "short_conv",
            )},
            **{name: self.op in (f"{name}_fn", f"{name}_update") for name in ("gated_delta_prologue", "gated_short_conv")},
        }  # fmt: skip
        return [
            name for name, needed in found.items() if needed or name in RELATIONS_NEED.get(self.relation, ())
        ]

    @cached_property
    def features(self) -> frozenset[str]:
        """What an implementation must support to run this case; matched against its `unsupported` patterns."""
        axes = self.axes
        found = {f"op:{self.op}", f"tier:{self.tier}", *self.serving, *RELATIONS_USE.get(self.relation, ())}
        if self.expect != "value":
            found.add("expect:undefined" if self.expect == "undefined" else "expect:error")
        used = {k: v for k, v in self.dtypes.items() if v is not None}
        found |= {f"{name}.layout:{layout}" for name, layout in self.layout.items()}
        if self.op in ("commit_windows", "tree_parents_from_links"):
            return frozenset(found | {f"{name}:{dtype}" for name, dtype in used.items()})
        found.add(f"width:{axes['width']}")
        if self.relation:
            found.add(f"relation:{self.relation}")
        if self.op.endswith("_backward"):
            return frozenset(found | self._backward_features(used))
        if axes["num_slots"] is None:
            used.pop("conv_states", None)
            found.add("conv_states:none")
        elif axes["state_len"] != axes["width"] - 1:
            found.add("state_len:wider")
        if axes["slots"] is None:
            used.pop("cache_indices", None)
            found.add("cache_indices:none")
        else:
            pad = self.options.get("pad_slot_id", -1)
            found.add(f"pad_slot_id:{pad}")
            if any(s == pad for s in axes["slots"]):
                found.add("rows:padding")
            if any(s != pad and not 0 <= s < (axes["num_slots"] or 0) for s in axes["slots"]):
                found.add("rows:out_of_range")
        floats = {v for k, v in used.items() if k in ("x", "bcx", "weight", "bias", "conv_states")}
        found.add("dtypes:mixed" if len(floats) > 1 else "dtypes:equal")
        found |= {f"{name}:{dtype}" for name, dtype in used.items()}
        quiet = ("pad_slot_id", "split_sizes", "channel_offset", "snapshot_block_size", *FRONT_NUMBERS)
        found |= {f"{name}:{value}" for name, value in self.options.items() if name not in quiet}
        found.add(f"bias:{self.dtypes['bias']}" if self.dtypes["bias"] else "bias:none")
        if "head_k_dim" in self.options:
            found |= self._head_features()
        if self.op.endswith("_fn"):
            found.add("has_initial_state:none" if axes["has"] is None else "has_initial_state:given")
            if any(axes["has"] or ()):
                found.add("rows:continued")
            if axes["tail"]:
                found.add("tokens:tail")
            if 0 in axes["lengths"]:
                found.add("rows:empty")
            if len(axes["lengths"]) > 1:
                found.add("rows:packed")
        else:
            if axes["seqlen"] is not None:
                found.add("update:multi_token")
            if "lengths" in axes:
                found.add("update:packed")
            if "counts" in axes:
                found.add("update:rolling")
        if self.data == "nan_payload":
            found.add("values:nan")
        return frozenset(found)

    def _head_features(self) -> set[str]:
        options = self.options
        found = {f"{name}:given" for name in ("q_scale", "norm_eps", "lower_bound") if name in options}
        found.add("heads:equal" if options["num_k_heads"] == options["num_v_heads"] else "heads:grouped")
        if self.dtypes.get("a"):
            found.add("gate:channel" if self.axes["channel_gate"] else "gate:head")
        return found

    def _backward_features(self, used: Mapping[str, str]) -> set[str]:
        floats = {v for k, v in used.items() if k in ("x", "bcx", "weight", "bias", "initial_states")}
        found = {f"{name}:{dtype}" for name, dtype in used.items()}
        if "head_k_dim" in self.options:
            found |= self._head_features()
        found |= {f"{name}:none" for name, dtype in self.dtypes.items() if dtype is None}
        found |= {f"{name}:{value}" for name, value in self.options.items() if name not in FRONT_NUMBERS}
        found.add("dtypes:mixed" if len(floats) > 1 else "dtypes:equal")
        found.add("rows:dense" if self.axes["dense"] else "rows:packed")
        if self.axes["tail"]:
            found.add("tokens:tail")
        if 0 in self.axes["lengths"]:
            found.add("rows:empty")
        return found


def select(
    cases: Iterable[Case],
    *,
    tiers: Iterable[str] = (),
    patterns: Iterable[str] = (),
    op: str | None = None,
    flags: Iterable[str] = (),
) -> list[Case]:
    """Chooses cases.

    Args:
      cases: the catalogue.
      tiers: default core and full; besides these, a case that a pattern names exactly.
      patterns: globs of ids; any one must match.
      op: one of the operations.
      flags: failure modes; the case must carry one.

    Raises:
      ValueError: a pattern, an op or a flag matches nothing.
    """
    tiers, patterns, flags = set(tiers), list(patterns), set(flags)
    chosen = [case for case in cases if op in (None, case.op)]
    if not chosen:
        raise ValueError(f"op: expected the operation of a case, got {op!r}")
    if unknown := flags - {flag for case in chosen for flag in case.flags}:
        raise ValueError(f"flag: expected one that a case carries, got {sorted(unknown)[0]!r}")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.id, pattern) for case in chosen):
            raise ValueError(f"cases: expected a pattern that matches a case id, got {pattern!r}")

    def wanted(case: Case) -> bool:
        by_id = not patterns or any(fnmatch.fnmatchcase(case.id, pattern) for pattern in patterns)
        by_tier = case.tier in (tiers or ("core", "full")) or case.id in patterns
        return by_id and by_tier and (not flags or bool(flags & set(case.flags)))

    return [case for case in chosen if wanted(case)]
