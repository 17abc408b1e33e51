"""Properties that hold bit for bit between calls, without any expected value: path invariance.

A relation is a generator: it takes a problem and a `call`, which runs and judges another problem, and yields a
text for every difference it finds. It works on rows, so that the same code serves both operations.
"""

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
    """A call seen as rows: the inputs of each as bits [tokens, dim], its slot, and whether it has a state."""

    problem: Problem
    rows: list[np.ndarray]
    slots: list[int]
    has: list[bool]
    pool: np.ndarray

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
        arrays = self.problem.arrays
        x = np.stack(self.rows) if axes == 3 else np.concatenate(self.rows)
        options = {
            k: v for k, v in self.problem.options.items() if k in ("activation", "pad_slot_id", "backend")
        }
        return Problem(UPDATE, {
            "x": plain(from_bits(x, arrays["x"].dtype)), "weight": arrays["weight"], "bias": arrays["bias"],
            "conv_states": plain(from_bits(self.pool, arrays["conv_states"].dtype)),
            "cache_indices": plain(np.array(self.slots).astype(arrays["cache_indices"].dtype)),
        }, options)  # fmt: skip

    def again(self, **options) -> Problem:
        """The same operation on these rows."""
        return self.to_fn(**options) if self.problem.op == FN else self.to_update(3)

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
    if problem.op == FN:
        offsets = arrays["query_start_loc"].data
        rows = [x[offsets[i] : offsets[i + 1]] for i in range(len(slots))]
        has = arrays["has_initial_state"].data.tolist()
    else:
        rows, has = list(x), [True] * len(slots)
    return Batch(problem, rows, slots, has, arrays["conv_states"].typed.bits)


def split(problem: Problem, call: Call) -> Iterator[str]:
    """A prefill in two chunks, cut at every interesting place, is one prefill."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    longest = max(len(row) for row in whole.rows)
    for at in sorted(
        {*range(1, min(longest, 10)), 16, 31, 32, 33, 63, 64, 65, 128, longest // 2, longest - 1}
    ):
        if not 0 < at < longest:
            continue
        first = replace(whole, rows=[row[:at] for row in whole.rows])
        head = call(first.to_fn())
        second = replace(whole, rows=[row[at:] for row in whole.rows], has=_has_after(first),
                         pool=head.conv_states.bits)  # fmt: skip
        tail = call(second.to_fn())
        parts = zip(first.outputs(head), second.outputs(tail), strict=True)
        yield from _differences(
            f"split at {at}", whole, reference, [np.concatenate(p) for p in parts], tail.conv_states
        )


def chain(problem: Problem, call: Call) -> Iterator[str]:
    """A prefill of three tokens a row and then one decode step for each further token is one prefill."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    part = replace(whole, rows=[row[:3] for row in whole.rows])
    head = call(part.to_fn())
    done = [list(out) for out in part.outputs(head)]
    states = head.conv_states
    for t in range(3, max(len(row) for row in whole.rows)):
        alive = [t < len(row) for row in whole.rows]
        rows = [row[t : t + 1] if on else whole.poison(1) for row, on in zip(whole.rows, alive, strict=True)]
        slots = [slot if on else whole.pad for slot, on in zip(whole.slots, alive, strict=True)]
        step = replace(whole, rows=rows, slots=slots, pool=states.bits)
        verdict = call(step.to_update(2))
        states = verdict.conv_states
        for out, new, on in zip(done, step.outputs(verdict), alive, strict=True):
            out.extend(new if on else ())
    outs = [np.array(out, dtype=states.bits.dtype if not out else out[0].dtype).reshape(-1, whole.rows[0].shape[1])
            for out in done]  # fmt: skip
    yield from _differences("a chain of updates", whole, reference, outs, states)


def tokens_one_by_one(problem: Problem, call: Call) -> Iterator[str]:
    """A decode step of n tokens a row is n steps of one, and is a prefill of n that continues."""
    whole = batch_of(problem)
    reference = call(whole.to_update(3))
    states, done = whole.pool, []
    for t in range(len(whole.rows[0])):
        step = replace(whole, rows=[row[t : t + 1] for row in whole.rows], pool=states)
        verdict = call(step.to_update(2))
        states = verdict.conv_states.bits
        done.append(step.outputs(verdict))
    outs = [np.concatenate([step[i] for step in done]) for i in range(len(whole.rows))]
    yield from _differences("token by token", whole, reference, outs, verdict.conv_states)
    verdict = call(whole.to_fn())
    yield from _differences("as a prefill", whole, reference, whole.outputs(verdict), verdict.conv_states)


def separate(problem: Problem, call: Call) -> Iterator[str]:
    """Each row alone gives what it gives in the batch."""
    whole = batch_of(problem)
    reference = call(whole.again())
    states, outs = whole.pool, []
    for i in range(len(whole.rows)):
        alone = replace(whole, rows=[whole.rows[i]], slots=[whole.slots[i]], has=[whole.has[i]], pool=states)
        verdict = call(alone.again())
        states = verdict.conv_states.bits
        outs += alone.outputs(verdict)
    yield from _differences("each row alone", whole, reference, outs, verdict.conv_states)


def schedules(problem: Problem, call: Call) -> Iterator[str]:
    """Both schedules, with and without a bound of the row lengths, give the same bits."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    for schedule in ("per_sequence", "flat"):
        for bound in (None, max(len(row) for row in whole.rows), 2):
            verdict = call(whole.to_fn(schedule=schedule, max_seqlen=bound))
            label = f"schedule {schedule} with max_seqlen {bound}"
            yield from _differences(label, whole, reference, whole.outputs(verdict), verdict.conv_states)


def permute_slots(problem: Problem, call: Call) -> Iterator[str]:
    """Renaming the slots renames the states and changes nothing else."""
    whole = batch_of(problem)
    reference = call(whole.again())
    last = len(whole.pool) - 1
    renamed = replace(whole, slots=[last - slot for slot in whole.slots], pool=whole.pool[::-1].copy())
    verdict = call(renamed.again())
    states = from_bits(verdict.conv_states.bits[::-1].copy(), verdict.conv_states.dtype)
    yield from _differences("renamed slots", whole, reference, renamed.outputs(verdict), states)


def reorder_rows(problem: Problem, call: Call) -> Iterator[str]:
    """The order of rows in a batch changes nothing."""
    whole = batch_of(problem)
    reference = call(whole.again())
    turned = replace(whole, rows=whole.rows[::-1], slots=whole.slots[::-1], has=whole.has[::-1])
    verdict = call(turned.again())
    yield from _differences(
        "rows reversed", whole, reference, turned.outputs(verdict)[::-1], verdict.conv_states
    )


def add_padding(problem: Problem, call: Call) -> Iterator[str]:
    """Padding rows, empty rows that name live slots, and a padded tail change nothing."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    rows, slots, has = [], [], []
    for row, slot, flag in zip(whole.rows, whole.slots, whole.has, strict=True):
        rows += [whole.poison(2), row]
        slots += [whole.pad, slot]
        has += [True, flag]
    empty = [whole.poison(0)] * 3
    padded = replace(whole, rows=rows + empty, slots=slots + whole.slots[:3], has=has + [True] * 3)
    verdict = call(padded.to_fn(tail=7))
    outs = padded.outputs(verdict)[1 : len(rows) : 2]
    yield from _differences("padding added", whole, reference, outs, verdict.conv_states)


def repeat(problem: Problem, call: Call) -> Iterator[str]:
    """The same call on the same inputs gives the same bits."""
    whole = batch_of(problem)
    reference = call(whole.again())
    for attempt in (2, 3):
        verdict = call(whole.again())
        yield from _differences(
            f"call {attempt}", whole, reference, whole.outputs(verdict), verdict.conv_states
        )


RELATIONS = {
    f.__name__: f
    for f in (
        split,
        chain,
        tokens_one_by_one,
        separate,
        schedules,
        permute_slots,
        reorder_rows,
        add_padding,
        repeat,
    )
}


def _has_after(batch: Batch) -> list[bool]:
    return [flag or len(row) > 0 for flag, row in zip(batch.has, batch.rows, strict=True)]


def _differences(
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
