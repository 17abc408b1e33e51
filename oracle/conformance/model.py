"""A second implementation of the contract, in small steps that a mutant can replace one at a time.

It follows the contract's float32 order, so it matches bit-exact checks that the float64 reference need not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from oracle import contract, values
from oracle.conformance.adapter import SERVING_ARRAYS
from oracle.conformance.arrays import Array
from oracle.conformance.model_gradients import Backward
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
    indices: dict[str, Any] = field(default_factory=dict)  # the serving arguments, as (nested) lists
    residual: np.ndarray | None = None  # float32 [tokens, dim]
    windows: TypedArray | None = None  # a copy of window_out, which becomes the result

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

    @property
    def layout(self) -> str:
        return self.options.get("state_layout", "front")

    @property
    def state_len(self) -> int:
        return self.pool.shape[1]


@dataclass(frozen=True)
class Row:
    """A live row."""

    index: int
    start: int
    stop: int
    slot: int
    has: bool
    column: int = 0  # where its window begins

    @property
    def tokens(self) -> int:
        return self.stop - self.start


class Model(Backward):
    """The faithful model; an adapter like any other."""

    name, version = "model", str(contract.CONTRACT_VERSION)

    def capabilities(self) -> Mapping[str, Any]:
        return {"device": "cpu", "supports": ["*"]}

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        with np.errstate(all="ignore"):
            if op == "causal_conv1d_backward":
                return self.backward(arrays, dict(options))
            self.check(op, arrays, options)
            if op == "commit_windows":
                return {"conv_states": self.commit(arrays, dict(options))}
            if op == "tree_parents_from_links":
                links = (arrays[name].data.tolist() for name in ("next_token", "next_sibling"))
                parents = [self.parents(*row) for row in zip(*links, strict=True)]
                return {"parents": np.array(parents, np.int32).reshape(arrays["next_token"].shape)}
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
        given = {name: None if a is None else a.typed for name, a in arrays.items()}
        if op == "commit_windows":
            steps, slots, buffers = (
                given[name] for name in ("accepted_steps", "cache_indices", "window_indices")
            )
            values.check_commit_values(steps, slots, buffers, sizes, options.get("pad_slot_id", -1))
        else:
            values.check_call(op, {**given, **options}, sizes)

    def prepare(self, op, arrays, options) -> Call:
        x, dim = self.read(arrays, "x"), arrays["weight"].shape[0]
        first = self.first_channel(options)
        x = TypedArray(x.dtype, np.ascontiguousarray(x.data[..., first : first + dim]))
        shape = x.shape
        x = TypedArray(x.dtype, x.data.reshape(-1, dim))
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
        call = Call(op, arrays, options, x, weight, bias, pool, offsets, slots, has, shape, counts)
        for name in SERVING_ARRAYS[op]:
            if arrays.get(name) is None:
                continue
            array = self.read(arrays, name)
            if name == "residual":
                call.residual = array.values().astype(np.float32).reshape(-1, dim)
            elif name == "window_out":
                call.windows = array
            else:
                call.indices[name] = array.data.tolist()
        return call

    def first_channel(self, options) -> int:
        return options.get("channel_offset") or 0

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
        if row.start >= row.stop and not self.applies(call):
            return False
        return call.pool is None or not self.padding(call, row.slot)

    def applies(self, call: Call) -> bool:
        """Whether rows of no tokens follow the state rule."""
        return call.options.get("empty_rows") == "apply"

    def padding(self, call: Call, slot: int) -> bool:
        return slot == call.pad or not 0 <= slot < call.num_slots

    def process(self, call: Call, row: Row, out: np.ndarray) -> None:
        window = self.window(call, row)
        e = self.extended(call, row, window)
        if "tree_parents" in call.indices:
            pre = np.concatenate(
                [self.convolve(call, row, e[self.chain(call, row, i)]) for i in range(row.tokens)]
            )
        else:
            pre = self.convolve(call, row, e)
        out[row.start : row.stop] = self.add_residual(call, row, self.activate(call, row, pre))
        if call.windows is not None and (buffer := self.buffer(call, row)) is not None:
            for t in range(row.tokens):
                self.save_step(call, row, buffer, t, self.step_window(call, row, window, t))
        if call.pool is None:
            return
        for slot, after in [*self.snapshots(call, row), *self.tracked(call, row)]:
            if not self.padding(call, slot):
                call.pool.bits[slot, : call.history] = self.window_after(call, row, window, after)
        if self.commits(call) and (target := self.target(call, row)) is not None:
            self.keep(call, row, window, target, out)

    def commits(self, call: Call) -> bool:
        return call.options.get("commit", True)

    def target(self, call: Call, row: Row) -> int | None:
        """The slot that gets the new state."""
        slot = call.indices.get("write_indices", call.slots)[row.index]
        return None if self.padding(call, slot) else slot

    def keep(self, call: Call, row: Row, window: TypedArray, target: int, out: np.ndarray) -> None:
        if call.layout == "front":
            if call.history:
                new = self.new_window if call.counts is None else self.rolled
                self.store(call, replace(row, slot=target), new(call, row, window, out))
        elif call.layout == "back":
            self.store(call, replace(row, slot=target), self.shifted(call, row, self.old_slot(call, row)))
        else:
            self.store(call, replace(row, slot=target), self.turned(call, row, self.old_slot(call, row)))

    def old_slot(self, call: Call, row: Row) -> np.ndarray:
        """The bits of a row's slot; zeros without a state."""
        old = call.pool.bits[row.slot].copy()
        return old if row.has else np.zeros_like(old)

    def shifted(self, call: Call, row: Row, slot: np.ndarray) -> np.ndarray:
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([slot, arrived])[len(arrived) :]

    def turned(self, call: Call, row: Row, slot: np.ndarray) -> np.ndarray:
        for t, entry in enumerate(self.cast(call, self.inputs(call, row).bits)):
            if call.state_len:
                slot[self.ring_column(call, row, t)] = entry
        return slot

    def ring_column(self, call: Call, row: Row, t: int) -> int:
        """The column of the row's token t; of tokens before this call for t < 0."""
        return (self.seen(call, row) + t) % call.state_len

    def seen(self, call: Call, row: Row) -> int:
        return max(call.indices["cache_seqlens"][row.index], 0)

    def snapshots(self, call: Call, row: Row) -> list[tuple[int, int]]:
        """(slot, after how many tokens of the row) of every boundary that the row reaches."""
        found, size = [], call.options.get("snapshot_block_size")
        for k, slot in enumerate(call.indices.get("snapshot_indices", [[]] * len(call.slots))[row.index]):
            after = self.boundary(call, row, k, size)
            if 0 < after <= row.tokens:
                found.append((slot, after))
        return found

    def boundary(self, call: Call, row: Row, k: int, size: int) -> int:
        return (k + 1) * size - self.computed(call, row)

    def computed(self, call: Call, row: Row) -> int:
        return max(call.indices.get("num_computed_tokens", [0] * len(call.slots))[row.index], 0)

    def tracked(self, call: Call, row: Row) -> list[tuple[int, int]]:
        if "track_indices" not in call.indices:
            return []
        after = row.tokens
        if "track_lengths" in call.indices:
            after = min(max(call.indices["track_lengths"][row.index], 0), after)
        return [(call.indices["track_indices"][row.index], after)]

    def window_after(self, call: Call, row: Row, window: TypedArray, after: int) -> np.ndarray:
        """The window after some tokens of the row, as bits of the pool's dtype."""
        entries = np.concatenate([window.bits, self.cast(call, self.inputs(call, row).bits)])
        return entries[after : after + call.history]

    def buffer(self, call: Call, row: Row) -> int | None:
        buffer = call.indices.get("window_indices", range(len(call.slots)))[row.index]
        return buffer if buffer != call.pad and 0 <= buffer < call.windows.shape[0] else None

    def step_window(self, call: Call, row: Row, window: TypedArray, t: int) -> np.ndarray:
        """The last inputs up to token (or node) t, as bits of window_out's dtype."""
        dtype, inputs = call.windows.dtype, self.inputs(call, row)
        entries = np.concatenate([
            cast_bits(window.bits, window.dtype, dtype), cast_bits(inputs.bits, inputs.dtype, dtype),
        ])  # fmt: skip
        if "tree_parents" in call.indices:
            return entries[self.chain(call, row, t)[1:]]
        return entries[t + 1 : t + 1 + call.history]

    def save_step(self, call: Call, row: Row, buffer: int, t: int, window: np.ndarray) -> None:
        if t < call.windows.shape[1]:
            call.windows.bits[buffer, t] = window

    def chain(self, call: Call, row: Row, node: int) -> list[int]:
        """Positions in window ++ inputs of a node's taps, oldest first."""
        path = [node]
        while (parent := self.parent(call, row, path[-1])) >= 0 and len(path) <= call.history:
            path.append(parent)
        before = call.history + 1 - len(path)
        return [*range(call.history - before, call.history), *(call.history + i for i in reversed(path))]

    def parent(self, call: Call, row: Row, node: int) -> int:
        return min(call.indices["tree_parents"][row.index][node], node - 1)

    def parents(self, children: list[int], siblings: list[int]) -> list[int]:
        """Parents from the links of one row."""
        parents = [-1] + [0] * (len(children) - 1) if children else []
        for node, (child, sibling) in enumerate(zip(children, siblings, strict=True)):
            if node < child < len(children):
                parents[child] = node
            if node < sibling < len(children):
                parents[sibling] = parents[node]
        return parents

    def commit(self, arrays, options) -> TypedArray:
        pool, windows = self.read(arrays, "conv_states"), self.read(arrays, "window_out")
        steps = arrays["accepted_steps"].data.tolist()
        rows = range(len(steps))
        slots = rows if arrays["cache_indices"] is None else arrays["cache_indices"].data.tolist()
        buffers = rows if arrays["window_indices"] is None else arrays["window_indices"].data.tolist()
        pad = options.get("pad_slot_id", -1)
        for slot, buffer, step in zip(slots, buffers, steps, strict=True):
            step = self.step(step)
            if (
                slot == pad
                or buffer == pad
                or not 0 <= slot < pool.shape[0]
                or not 0 <= buffer < windows.shape[0]
            ):
                continue
            if 0 <= step < windows.shape[1]:
                window = cast_bits(windows.bits[buffer, step], windows.dtype, pool.dtype)
                pool.bits[slot, : windows.shape[2]] = window
        return pool

    def step(self, step: int) -> int:
        return step

    def add_residual(self, call: Call, row: Row, out: np.ndarray) -> np.ndarray:
        if call.residual is None:
            return out
        return (out.astype(np.float32) + call.residual[row.start : row.stop]).astype(np.float64)

    def window(self, call: Call, row: Row) -> TypedArray:
        dtype = call.x.dtype if call.pool is None else call.pool.dtype
        if call.pool is None or not row.has:
            return from_bits(
                np.zeros((call.history, call.x.shape[1]), np.uint32 if dtype == "float32" else np.uint16),
                dtype,
            )
        return TypedArray(dtype, call.pool.data[row.slot, self.window_columns(call, row)].copy())

    def window_columns(self, call: Call, row: Row) -> list[int]:
        if call.layout == "ring":
            return [self.ring_column(call, row, j - call.history) for j in range(call.history)]
        first = row.column if call.layout == "front" else call.state_len - call.history
        return list(range(first, first + call.history))

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
        joined = from_bits(self.round(out, call.x.dtype).reshape(call.shape), call.x.dtype)
        return {"out": self.parts(call, joined), "conv_states": call.pool, "window_out": call.windows}

    def parts(self, call: Call, out: TypedArray) -> Any:
        sizes = call.options.get("split_sizes")
        if sizes is None:
            return out
        ends = np.cumsum(sizes).tolist()
        return [
            TypedArray(out.dtype, np.ascontiguousarray(out.data[..., end - size : end]))
            for size, end in zip(sizes, ends, strict=True)
        ]


def rounded_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to a format, as float32."""
    return to_float64(round_bits(values, dtype), dtype).astype(np.float32)
