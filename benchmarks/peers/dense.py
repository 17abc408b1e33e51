"""The contract on top of functions without slots: the adapter gathers and stores the windows of live rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from oracle import contract, reference
from oracle.conformance.arrays import Array
from oracle.contract import Unsupported
from oracle.numerics import TypedArray, storage_dtype

DENIED = {
    "expect:error": "the peer checks arguments by its own rules",
    "expect:undefined": "slots and offsets are read by the adapter",
    "rows:padding": "the peer has no padding rows",
    "rows:out_of_range": "the peer has no slots",
    "tokens:tail": "the peer has no padded tail",
    "state_len:wider": "the peer's state has no spare columns",
    "*.layout:*": "the adapter copies its arguments",
    "tier:large": "sizes and pitches are the adapter's",
    "width:1": "the peer has no empty state",
    "validate:True": "the peer has no such option",
    "relation:chain": "rows end at different steps, which needs padding rows",
    "relation:add_padding": "the peer has no padding rows",
    "relation:serving": "steps of packed rows, which the adapter does not take apart",
    "relation:packed_steps": "steps of packed rows, which the adapter does not take apart",
    "update:packed": "the adapter takes no packed steps apart",
    "update:rolling": "the peer has one window a slot",
}


class DenseAdapter:
    """Calls `row` for every live row; gathers and stores windows itself."""

    name, version = "", ""
    denied: ClassVar[Mapping[str, str]] = {}
    promises: ClassVar[Mapping[str, Any]] = {"bit_exact": False, "path_invariant": False}

    def capabilities(self) -> Mapping[str, Any]:
        return {"device": "cpu", **self.promises, "unsupported": {**DENIED, **self.denied}}

    def row(
        self,
        op: str,
        x: TypedArray,
        weight: TypedArray,
        bias: TypedArray | None,
        window: TypedArray | None,
        activation: str | None,
    ) -> tuple[TypedArray, TypedArray]:
        """One row: x [tokens, dim], window [width - 1, dim] or None; returns outputs and the new window."""
        raise NotImplementedError

    def rows(
        self,
        op: str,
        parts: list[TypedArray],
        weight: TypedArray,
        bias: TypedArray | None,
        windows: list[TypedArray | None],
        activation: str | None,
    ) -> list[tuple[TypedArray, TypedArray]]:
        """All live rows, each as in `row`; a peer that takes packed rows gets them in one call."""
        return [
            self.row(op, x, weight, bias, window, activation)
            for x, window in zip(parts, windows, strict=True)
        ]

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        values: dict[str, Any] = {name: None if a is None else a.typed for name, a in arrays.items()}
        try:
            sizes = contract.RECORDS[op](**values, **options).check()
        except (ValueError, TypeError) as error:
            raise Unsupported(f"arguments: {error}") from error
        if options.get("validate"):
            raise Unsupported("validate: the peer has no such option")
        if op == "causal_conv1d_update" and (
            values.get("query_start_loc") or values.get("num_accepted_tokens")
        ):
            raise Unsupported("query_start_loc, num_accepted_tokens: the peer has neither")
        if self.denied.get("dtypes:mixed"):
            names = ("x", "weight", "bias", "conv_states")
            if len(used := {values[n].dtype for n in names if values.get(n) is not None}) > 1:
                raise Unsupported(f"dtypes: expected one, got {sorted(used)}")
        pool = values["conv_states"]
        if op == "causal_conv1d_fn":
            offsets = values["query_start_loc"].data
            lengths = np.diff(offsets)
            if offsets[0] != 0 or (lengths < 0).any() or offsets[-1] != sizes.tokens:
                raise Unsupported("query_start_loc: rows must fill x")
            busy = int((lengths > 0).sum())
        else:
            busy = sizes.batch if sizes.seqlen else 0
        rows = reference.live_rows(op, {**values, **options})
        slots = [] if pool is None else [row.slot for row in rows]
        self._check(arrays, sizes, busy - len(rows), slots)

        x = values["x"].data.reshape(-1, sizes.dim)
        out = np.zeros(x.shape, storage_dtype(values["x"].dtype))
        parts = [TypedArray(values["x"].dtype, x[row.tokens]) for row in rows]
        windows = [
            TypedArray(pool.dtype, pool.data[row.slot]) if pool is not None and row.has else None
            for row in rows
        ]
        results = self.rows(op, parts, values["weight"], values["bias"], windows, options.get("activation"))
        for row, (y, new) in zip(rows, results, strict=True):
            out[row.tokens] = y.data
            if pool is not None:
                pool.data[row.slot] = new.data
        return {"out": TypedArray(values["x"].dtype, out.reshape(values["x"].shape)), "conv_states": pool}

    def _check(self, arrays: Mapping[str, Array | None], sizes: Any, padding: int, slots: list[int]) -> None:
        if any(a is not None and (a.sparse or not a.contiguous) for a in arrays.values()):
            raise Unsupported("layout: the adapter copies its arguments")
        if padding or len(set(slots)) < len(slots):
            raise Unsupported("cache_indices: the peer has no padding rows and no shared slots")
        if sizes.width == 1:
            raise Unsupported("weight: the peer has no empty state")
        if arrays["conv_states"] is not None and sizes.state_len != sizes.width - 1:
            raise Unsupported("conv_states: the peer's state has no spare columns")
