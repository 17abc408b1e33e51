"""Chunks, steps, batches, schedules and repeats: however a sequence is cut and batched, one prefill's bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from oracle.conformance.inputs import Problem, hash_uint32
from oracle.conformance.relations.rows import Batch, Call, batch_of, differences, row_alone
from oracle.numerics import from_bits


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
        yield from differences(
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
    yield from differences("a chain of updates", whole, reference, outs, states)


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
    yield from differences("token by token", whole, reference, outs, verdict.conv_states)
    verdict = call(whole.to_fn())
    yield from differences("as a prefill", whole, reference, whole.outputs(verdict), verdict.conv_states)


def separate(problem: Problem, call: Call) -> Iterator[str]:
    """Each row alone gives what it gives in the batch."""
    whole = batch_of(problem)
    reference = call(whole.again())
    states, outs = whole.pool, []
    for i in range(len(whole.rows)):
        alone = row_alone(whole, i, states)
        verdict = call(alone.again())
        states = verdict.conv_states.bits
        outs += alone.outputs(verdict)
    yield from differences("each row alone", whole, reference, outs, verdict.conv_states)


def schedules(problem: Problem, call: Call) -> Iterator[str]:
    """Both schedules, with and without a bound of the row lengths, give the same bits."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    for schedule in ("per_sequence", "flat"):
        for bound in (None, max(len(row) for row in whole.rows), 2):
            verdict = call(whole.to_fn(schedule=schedule, max_seqlen=bound))
            label = f"schedule {schedule} with max_seqlen {bound}"
            yield from differences(label, whole, reference, whole.outputs(verdict), verdict.conv_states)


def permute_slots(problem: Problem, call: Call) -> Iterator[str]:
    """Renaming the slots renames the states and changes nothing else."""
    whole = batch_of(problem)
    reference = call(whole.again())
    last = len(whole.pool) - 1
    renamed = replace(whole, slots=[last - slot for slot in whole.slots], pool=whole.pool[::-1].copy())
    verdict = call(renamed.again())
    states = from_bits(verdict.conv_states.bits[::-1].copy(), verdict.conv_states.dtype)
    yield from differences("renamed slots", whole, reference, renamed.outputs(verdict), states)


def reorder_rows(problem: Problem, call: Call) -> Iterator[str]:
    """The order of rows in a batch changes nothing."""
    whole = batch_of(problem)
    reference = call(whole.again())
    turned = replace(whole, rows=whole.rows[::-1], slots=whole.slots[::-1], has=whole.has[::-1],
                     counts=whole.counts and whole.counts[::-1])  # fmt: skip
    verdict = call(turned.again())
    yield from differences(
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
    yield from differences("padding added", whole, reference, outs, verdict.conv_states)


def packed_steps(problem: Problem, call: Call) -> Iterator[str]:
    """A packed step is the same rows as a dense one; rows of different lengths are each what they are alone."""
    whole = batch_of(problem)
    reference = call(whole.to_update(3))
    verdict = call(whole.to_packed_update(tail=3))
    yield from differences("packed", whole, reference, whole.outputs(verdict), verdict.conv_states)
    ragged = replace(whole, rows=[row[: 1 + i % len(row)] for i, row in enumerate(whole.rows)])
    reference, states, outs = call(ragged.to_packed_update()), whole.pool, []
    for i in range(len(ragged.rows)):
        alone = row_alone(ragged, i, states)
        verdict = call(alone.to_update(3))
        states = verdict.conv_states.bits
        outs += alone.outputs(verdict)
    yield from differences("ragged rows alone", ragged, reference, outs, verdict.conv_states)


def serving(problem: Problem, call: Call) -> Iterator[str]:
    """Chunks, decode steps and verify steps with any acceptance, in any order, are one prefill.

    Rejected drafts are NaN. A row whose last acceptance was not 1 must go on with a count; others may take any step.
    """
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    history, state_len = problem.arrays["weight"].shape[1] - 1, whole.pool.shape[1]
    most = state_len - history + 1
    chance = iter(hash_uint32(history, "serving", 4096).tolist())
    rows = range(len(whole.rows))
    done, counts, has, states = [0 for _ in rows], [1 for _ in rows], list(whole.has), whole.pool
    outs: list[list[np.ndarray]] = [[whole.poison(0)] for _ in rows]

    def take(kind: str, members: list[int]) -> None:
        """One call of some rows, each as many tokens as chance says; a padding row goes along."""
        nonlocal states
        inputs, accepted = [], []
        for row in members:
            left = len(whole.rows[row]) - done[row]
            length = 1 + next(chance) % most
            accept = min(1 + next(chance) % length, left) if kind == "verify" else min(length, left)
            inputs.append(whole.rows[row][done[row] : done[row] + accept])
            if kind == "verify":
                inputs[-1] = np.concatenate([inputs[-1], whole.poison(length - accept)])
            accepted.append(accept)
        step = replace(
            whole, rows=[whole.poison(1), *inputs], slots=[whole.pad] + [whole.slots[row] for row in members],
            has=[True] + [has[row] for row in members], pool=states,
            counts=[2] + [counts[row] for row in members] if kind == "verify" else None,
        )  # fmt: skip
        verdict = call(step.to_fn() if kind == "prefill" else step.to_packed_update(tail=1))
        states = verdict.conv_states.bits
        for row, out, accept in zip(members, step.outputs(verdict)[1:], accepted, strict=True):
            outs[row].append(out[:accept])
            done[row] += accept
            counts[row] = accept if kind == "verify" else 1
            has[row] = True

    while any(done[row] < len(whole.rows[row]) for row in rows):
        groups: dict[str, list[int]] = {"prefill": [], "decode": [], "verify": []}
        for row in rows:
            kinds = (
                ["prefill"] * (counts[row] == 1)
                + ["decode"] * (counts[row] == 1 and has[row])
                + ["verify"] * 2 * has[row]
            )
            if done[row] < len(whole.rows[row]):
                groups[kinds[next(chance) % len(kinds)]].append(row)
        for kind, members in groups.items():
            if members:
                take(kind, members)
    ends = whole.pool.copy()
    for row in rows:  # each window where its count says, as a plain run leaves it in front
        window = states[whole.slots[row], counts[row] - 1 : counts[row] - 1 + history]
        ends[whole.slots[row], :history] = window
        ends[whole.slots[row], history:] = reference.conv_states.bits[whole.slots[row], history:]
    joined = [np.concatenate(parts) for parts in outs]
    yield from differences(
        "served in steps", whole, reference, joined, from_bits(ends, reference.conv_states.dtype)
    )


def repeat(problem: Problem, call: Call) -> Iterator[str]:
    """The same call on the same inputs gives the same bits."""
    whole = batch_of(problem)
    reference = call(whole.again())
    for attempt in (2, 3):
        verdict = call(whole.again())
        yield from differences(
            f"call {attempt}", whole, reference, whole.outputs(verdict), verdict.conv_states
        )


def _has_after(batch: Batch) -> list[bool]:
    return [flag or len(row) > 0 for flag, row in zip(batch.has, batch.rows, strict=True)]
