"""A call seen as rows: what relations take apart and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from oracle.conformance.arrays import POISON_BITS, plain
from oracle.conformance.inputs import Problem
from oracle.conformance.judge import Verdict
from oracle.numerics import TypedArray, from_bits, is_nan

Call = Callable[[Problem], Verdict]
FN, UPDATE = "causal_conv1d_fn", "causal_conv1d_update"


@dataclass(frozen=True)
class Batch:
    """A call seen as rows: the inputs of each as bits [tokens, dim], its slot, and whether it has a state.

    `counts` are the accepted tokens of a step with rolling slots; `packed` is a step with query_start_loc.
    """

    problem: Problem
    rows: list[np.ndarray]
    slots: list[int]
    has: list[bool]
    pool: np.ndarray
    counts: list[int] | None = None
    packed: bool = False

    @property
    def pad(self) -> int:
        return self.problem.options.get("pad_slot_id", -1)

    def poison(self, tokens: int) -> np.ndarray:
        """Inputs that nothing may use."""
        x = self.problem.arrays["x"]
        storage = x.typed.bits.dtype
        return np.full((tokens, x.shape[-1]), POISON_BITS[x.dtype], storage)

    def to_fn(self, tail: int = 0, **options) -> Problem:
        """The rows as one packed prefill."""
        arrays = self.problem.arrays
        x = np.concatenate([*self.rows, self.poison(tail)])
        offsets = np.cumsum([0] + [len(row) for row in self.rows])
        kinds = {
            name: arrays[name].dtype if arrays.get(name) else "int32"
            for name in ("query_start_loc", "cache_indices")
        }
        return Problem(FN, {
            "x": plain(from_bits(x, arrays["x"].dtype)), "weight": arrays["weight"], "bias": arrays["bias"],
            "conv_states": plain(from_bits(self.pool, arrays["conv_states"].dtype)),
            "query_start_loc": plain(offsets.astype(kinds["query_start_loc"])),
            "cache_indices": plain(np.array(self.slots).astype(kinds["cache_indices"])),
            "has_initial_state": plain(TypedArray("bool", np.array(self.has, dtype=bool))),
        }, {**self.problem.options, **options})  # fmt: skip

    def to_update(self, axes: int) -> Problem:
        """The rows, all of one length, as a decode step with x of 2 or 3 axes."""
        x = np.stack(self.rows) if axes == 3 else np.concatenate(self.rows)
        return self._step(x, None)

    def to_packed_update(self, tail: int = 0) -> Problem:
        """The rows as a packed decode step."""
        offsets = np.cumsum([0] + [len(row) for row in self.rows])
        return self._step(np.concatenate([*self.rows, self.poison(tail)]), plain(offsets.astype("int32")))

    def _step(self, x: np.ndarray, query_start_loc) -> Problem:
        arrays = self.problem.arrays
        options = {
            k: v for k, v in self.problem.options.items() if k in ("activation", "pad_slot_id", "backend")
        }
        counts = None
        if self.counts is not None:
            before = arrays.get("num_accepted_tokens")
            counts = plain(np.array(self.counts).astype(before.dtype if before else "int32"))
            if query_start_loc is not None:
                options["max_seqlen"] = max(len(row) for row in self.rows)
        return Problem(UPDATE, {
            "x": plain(from_bits(x, arrays["x"].dtype)), "weight": arrays["weight"], "bias": arrays["bias"],
            "conv_states": plain(from_bits(self.pool, arrays["conv_states"].dtype)),
            "cache_indices": plain(np.array(self.slots).astype(arrays["cache_indices"].dtype)),
            "query_start_loc": query_start_loc, "num_accepted_tokens": counts,
        }, options)  # fmt: skip

    def again(self, **options) -> Problem:
        """The same operation on these rows."""
        if self.problem.op == FN:
            return self.to_fn(**options)
        return self.to_packed_update() if self.packed else self.to_update(3)

    def outputs(self, verdict: Verdict) -> list[np.ndarray]:
        """The output bits of each row."""
        bits = verdict.out.bits.reshape(-1, verdict.out.shape[-1])
        ends = np.cumsum([0] + [len(row) for row in self.rows])
        return [bits[ends[i] : ends[i + 1]] for i in range(len(self.rows))]


def batch_of(problem: Problem) -> Batch:
    """Takes a problem apart into rows."""
    arrays = problem.arrays
    x = arrays["x"].typed.bits
    slots = arrays["cache_indices"].data.tolist()
    packed = arrays.get("query_start_loc") is not None
    rows = list(x)
    if packed:
        offsets = arrays["query_start_loc"].data
        rows = [x[offsets[i] : offsets[i + 1]] for i in range(len(slots))]
    has = arrays["has_initial_state"].data.tolist() if problem.op == FN else [True] * len(slots)
    counts = (
        None if arrays.get("num_accepted_tokens") is None else arrays["num_accepted_tokens"].data.tolist()
    )
    return Batch(problem, rows, slots, has, arrays["conv_states"].typed.bits, counts, packed)


def row_alone(batch: Batch, i: int, pool: np.ndarray) -> Batch:
    counts = batch.counts and [batch.counts[i]]
    return replace(
        batch, rows=[batch.rows[i]], slots=[batch.slots[i]], has=[batch.has[i]], pool=pool, counts=counts
    )


def differences(
    label: str, batch: Batch, want: Verdict, outs: list[np.ndarray], states: TypedArray
) -> Iterator[str]:
    for i, (expected, got) in enumerate(zip(batch.outputs(want), outs, strict=True)):
        differs = (expected != got) & ~(is_nan(expected, want.out.dtype) & is_nan(got, want.out.dtype))
        if differs.any():
            t, d = (int(v) for v in np.argwhere(differs)[0])
            yield (f"{label}: {int(differs.sum())} of {differs.size} outputs of row {i} differ, the first at token {t}, "
                   f"channel {d}: bits 0x{int(expected[t, d]):x} and 0x{int(got[t, d]):x}")  # fmt: skip
    if (want.conv_states.bits != states.bits).any():
        yield f"{label}: states differ"
