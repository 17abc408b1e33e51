"""Prefills as models call them: dense rows with documents or padding are the packed rows alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from oracle.conformance.arrays import plain
from oracle.conformance.inputs import Problem
from oracle.conformance.judge import Verdict
from oracle.conformance.relations.rows import Batch, Call, batch_of, differences
from oracle.numerics import from_bits


def short_documents(problem: Problem, call: Call) -> Iterator[str]:
    """Documents of one row, told by ids of which each comes back, are rows; the first one has the cache, the last the new one."""
    whole = batch_of(problem)
    size = len(whole.rows)
    for order in (range(size), range(size)[::-1]):
        rows = replace(
            whole, rows=[whole.rows[i] for i in order], slots=[whole.slots[i] for i in order], has=[True] + [False] * (size - 1)
        )  # fmt: skip
        reference = call(rows.to_fn())
        ids = np.repeat(np.arange(size) % 2, [len(row) for row in rows.rows])[None]
        verdict = _dense(rows, call, [np.concatenate(rows.rows)], rows.slots[:1], segment_ids=ids)
        ends = np.cumsum([len(row) for row in rows.rows])[:-1]
        yield from _compare(
            "documents", rows, reference, np.split(verdict.out.bits[0], ends), verdict, rows.slots[-1:]
        )


def short_padding(problem: Problem, call: Call) -> Iterator[str]:
    """Shorter rows, padded on the right with what nothing may read, are the same rows packed."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    lengths = np.array([len(row) for row in whole.rows])
    padded = [np.concatenate([row, whole.poison(lengths.max() + 2 - len(row))]) for row in whole.rows]
    verdict = _dense(whole, call, padded, whole.slots, lengths=lengths)
    outs = [out[:length] for out, length in zip(verdict.out.bits, lengths, strict=True)]
    yield from _compare("padding", whole, reference, outs, verdict, whole.slots)


def _dense(
    batch: Batch, call: Call, rows: list[np.ndarray], slots: list[int], **integers: np.ndarray
) -> Verdict:
    """`short_conv` of dense rows, each with the window of a slot as its cache."""
    arrays, options = batch.problem.arrays, batch.problem.options
    given = {name: plain(values.astype(np.int32)) for name, values in integers.items()}
    history = arrays["weight"].shape[1] - 1
    return call(Problem("short_conv", {
        "x": plain(from_bits(np.stack(rows), arrays["x"].dtype)), "weight": arrays["weight"], "bias": arrays["bias"],
        "cache": plain(from_bits(batch.pool[slots, :history], arrays["conv_states"].dtype)), **given,
    }, {name: options[name] for name in ("activation", "backend") if name in options}))  # fmt: skip


def _compare(
    label: str, batch: Batch, reference: Verdict, outs: list[np.ndarray], verdict: Verdict, slots: list[int]
) -> Iterator[str]:
    """Outputs of every row, and the new cache against the slots that it is the window of."""
    states = reference.conv_states.bits.copy()
    states[slots, : verdict.conv_states.shape[1]] = verdict.conv_states.bits
    yield from differences(label, batch, reference, outs, from_bits(states, reference.conv_states.dtype))
