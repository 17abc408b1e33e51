"""A second implementation of the contract, in small steps that a mutant can replace one at a time.

It follows the contract's float32 order, so it matches bit-exact checks that the float64 reference need not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle import contract, values
from oracle.conformance.arrays import Array
from oracle.numerics import TypedArray, cast_bits, fma_float32, from_bits, round_bits, silu, to_float64


@dataclass
class Call:
    """A call taken apart: inputs as bits and as float32, indices as Python integers."""

    op: str
    arrays: Mapping[str, Array | None]
    options: dict[str, Any]
    x: TypedArray  # [tokens, dim]
    weight: np.ndarray  # float32 [dim, width]
    bias: np.ndarray | None  # float32 [dim]
    pool: TypedArray | None  # a copy, which becomes the result
    offsets: list[int]
    slots: list[int]
    has: list[bool]
    shape: tuple[int, ...]
    counts: list[int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def fn(self) -> bool:
        return self.op == "causal_conv1d_fn"

    @property
    def history(self) -> int:
        """width - 1."""
        return self.weight.shape[1] - 1

    @property
    def pad(self) -> int:
        return self.options.get("pad_slot_id", -1)

    @property
    def activation(self) -> str | None:
        return self.options.get("activation")

    @property
    def num_slots(self) -> int:
        return self.pool.shape[0]


@dataclass(frozen=True)
class Row:
    """A live row."""

    index: int
    start: int
    stop: int
    slot: int
    has: bool
    column: int = 0  # where its window begins


class Model:
    """The faithful model; an adapter like any other."""

    name, version = "model", str(contract.CONTRACT_VERSION)

    def capabilities(self) -> Mapping[str, Any]:
        return {"device": "cpu"}

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        with np.errstate(all="ignore"):
            self.check(op, arrays, options)
            call = self.prepare(op, arrays, dict(options))
            out = self.blank(call)
            for row in self.rows(call):
                self.process(call, row, out)
            return self.finish(call, out)

    # Steps, in the order in which they happen.

    def check(self, op, arrays, options) -> None:
        check = getattr(contract, f"check_{op}")
        sizes = check(**arrays, **options)
        contract.check_backend(options.get("backend", "auto"), ("model",))
        if options.get("validate"):
            self.check_values(op, arrays, options, sizes)

    def check_values(self, op, arrays, options, sizes) -> None:
        slots = None if arrays["cache_indices"] is None else arrays["cache_indices"].typed
        num_slots = None if arrays["conv_states"] is None else sizes.num_slots
        pad = options.get("pad_slot_id", -1)
        if op == "causal_conv1d_fn":
            offsets = arrays["query_start_loc"].typed
            values.check_fn_values(offsets, slots, sizes.tokens, num_slots, pad, options.get("max_seqlen"))
        else:
            offsets, counts = (
                None if arrays.get(name) is None else arrays[name].typed
                for name in ("query_start_loc", "num_accepted_tokens")
            )
            values.check_update_values(slots, sizes, pad, offsets, counts, options.get("max_seqlen"))

    def prepare(self, op, arrays, options) -> Call:
        shape = arrays["x"].shape
        x = self.read(arrays, "x")
        x = TypedArray(x.dtype, x.data.reshape(-1, shape[-1]))
        tokens = x.shape[0]
        if arrays.get("query_start_loc") is not None:
            offsets = np.clip(self.read(arrays, "query_start_loc").data.astype(np.int64), 0, tokens).tolist()
            offsets[0] = 0
            batch = len(offsets) - 1
        else:
            batch, seqlen = shape[0], shape[1] if len(shape) == 3 else 1
            offsets = [i * seqlen for i in range(batch + 1)]
        if op == "causal_conv1d_fn":
            mask = arrays["has_initial_state"]
            has = [False] * batch if mask is None else self.read(arrays, "has_initial_state").data.tolist()
        else:
            has = [True] * batch
        counts = None
        if arrays.get("num_accepted_tokens") is not None:
            counts = self.read(arrays, "num_accepted_tokens").data.tolist()
        slots = list(range(batch))
        if arrays["cache_indices"] is not None:
            slots = self.read(arrays, "cache_indices").data.tolist()
        bias = None if arrays["bias"] is None else self.read(arrays, "bias").values().astype(np.float32)
        pool = None if arrays["conv_states"] is None else self.read(arrays, "conv_states")
        weight = self.read(arrays, "weight").values().astype(np.float32)
        return Call(op, arrays, options, x, weight, bias, pool, offsets, slots, has, shape, counts)

    def read(self, arrays, name: str) -> TypedArray:
        return arrays[name].typed.copy()

    def blank(self, call: Call) -> np.ndarray:
        return np.zeros(call.x.shape)

    def rows(self, call: Call) -> list[Row]:
        rows = []
        for i in range(len(call.slots)):
            row = Row(
                i,
                call.offsets[i],
                call.offsets[i + 1],
                self.slot(call, i),
                self.has(call, i),
                self.column(call, i),
            )
            if self.live(call, row):
                rows.append(row)
        return rows

    def slot(self, call: Call, i: int) -> int:
        return call.slots[i]

    def has(self, call: Call, i: int) -> bool:
        return call.has[i]

    def column(self, call: Call, i: int) -> int:
        if call.counts is None:
            return 0
        return min(max(self.count(call, i), 1), call.pool.shape[1] - call.history + 1) - 1

    def count(self, call: Call, i: int) -> int:
        return call.counts[i]

    def live(self, call: Call, row: Row) -> bool:
        return row.start < row.stop and (call.pool is None or not self.padding(call, row.slot))

    def padding(self, call: Call, slot: int) -> bool:
        return slot == call.pad or not 0 <= slot < call.num_slots

    def process(self, call: Call, row: Row, out: np.ndarray) -> None:
        window = self.window(call, row)
        pre = self.convolve(call, row, self.extended(call, row, window))
        out[row.start : row.stop] = self.activate(call, row, pre)
        if call.pool is not None and call.history:
            new = self.new_window if call.counts is None else self.rolled
            self.store(call, row, new(call, row, window, out))

    def window(self, call: Call, row: Row) -> TypedArray:
        dtype = call.x.dtype if call.pool is None else call.pool.dtype
        if call.pool is None or not row.has:
            return from_bits(
                np.zeros((call.history, call.x.shape[1]), np.uint32 if dtype == "float32" else np.uint16),
                dtype,
            )
        return TypedArray(dtype, call.pool.data[row.slot, row.column : row.column + call.history].copy())

    def inputs(self, call: Call, row: Row) -> TypedArray:
        return TypedArray(call.x.dtype, call.x.data[row.start : row.stop])

    def extended(self, call: Call, row: Row, window: TypedArray) -> np.ndarray:
        return np.concatenate([window.values(), self.inputs(call, row).values()]).astype(np.float32)

    def convolve(self, call: Call, row: Row, e: np.ndarray) -> np.ndarray:
        tokens = len(e) - call.history
        acc = np.zeros((tokens, e.shape[1]), np.float32)
        if call.bias is not None:
            acc += call.bias
        for j in self.taps(call):
            acc = self.multiply_add(call, self.weight(call, row)[:, j], e[j : j + tokens], acc)
        return acc

    def taps(self, call: Call):
        return range(call.history + 1)

    def weight(self, call: Call, row: Row) -> np.ndarray:
        return call.weight

    def multiply_add(self, call: Call, w: np.ndarray, e: np.ndarray, acc: np.ndarray) -> np.ndarray:
        return fma_float32(w, e, acc)

    def activate(self, call: Call, row: Row, pre: np.ndarray) -> np.ndarray:
        return self.silu(pre) if call.activation else pre.astype(np.float64)

    def silu(self, pre: np.ndarray) -> np.ndarray:
        return silu(pre)

    def new_window(self, call: Call, row: Row, window: TypedArray, out: np.ndarray) -> np.ndarray:
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([window.bits, arrived])[-call.history :]

    def rolled(self, call: Call, row: Row, window: TypedArray, out: np.ndarray) -> np.ndarray:
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([window.bits[1:], arrived])[: call.pool.shape[1]]

    def cast(self, call: Call, bits: np.ndarray) -> np.ndarray:
        return cast_bits(bits, call.x.dtype, call.pool.dtype)

    def store(self, call: Call, row: Row, window: np.ndarray) -> None:
        call.pool.bits[row.slot, : len(window)] = window

    def round(self, out: np.ndarray, dtype: str) -> np.ndarray:
        return round_bits(out, dtype)

    def finish(self, call: Call, out: np.ndarray) -> Mapping[str, Any]:
        out_bits = self.round(out, call.x.dtype).reshape(call.shape)
        return {"out": from_bits(out_bits, call.x.dtype), "conv_states": call.pool}


def rounded_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to a format, as float32."""
    return to_float64(round_bits(values, dtype), dtype).astype(np.float32)
