"""Path invariance of the serving arguments: whatever the slots, the blocks or the drafts, one prefill's bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from oracle.conformance.arrays import Array, plain, poisoned
from oracle.conformance.inputs import Problem, hash_uint32
from oracle.conformance.judge import Verdict
from oracle.conformance.relations.rows import Batch, Call, batch_of, differences
from oracle.numerics import from_bits

BLOCK = 4  # tokens of a cache block
NODES = 6  # of a draft tree


def layouts(problem: Problem, call: Call) -> Iterator[str]:
    """Chunks and steps in slots of any layout, each in another slot than the one before, are one prefill."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    history, dim = problem.arrays["weight"].shape[1] - 1, whole.pool.shape[2]
    rows, chance = range(len(whole.rows)), iter(hash_uint32(history, "layouts", 4096).tolist())
    for layout, state_len in (("front", history), ("back", history + 2), ("ring", max(history + 2, 1))):
        seen = [3 + 5 * row if whole.has[row] else 0 for row in rows]

        def columns(position: int, layout: str = layout, state_len: int = state_len) -> list[int]:
            """Where the window before a position of the sequence lies."""
            first = {"front": 0, "back": state_len - history, "ring": position - history}[layout]
            return [(first + j) % max(state_len, 1) for j in range(history)]

        pool = poisoned((2 * len(rows), state_len, dim), problem.arrays["conv_states"].dtype)
        for row in rows:
            if whole.has[row]:
                pool[2 * row, columns(seen[row])] = whole.pool[whole.slots[row], :history]
        slots, has, done = [2 * row for row in rows], list(whole.has), [0 for _ in rows]
        outs: list[list[np.ndarray]] = [[whole.poison(0)] for _ in rows]
        while any(done[row] < len(whole.rows[row]) for row in rows):
            part = [whole.rows[row][done[row] : done[row] + 1 + next(chance) % 4] for row in rows]
            step = replace(whole, rows=part, slots=slots, has=has, pool=pool)
            arguments = {"write_indices": _integers([slot ^ 1 for slot in slots])}
            if layout == "ring":
                arguments["cache_seqlens"] = _integers(seen)
            tail = 4 * len(rows) - sum(map(len, part))  # one shape for all steps
            taken = step.to_packed_update(tail) if all(has) and next(chance) % 2 else step.to_fn(tail)
            verdict = call(taken.with_arrays(**arguments).with_options(state_layout=layout))
            pool = verdict.conv_states.bits
            for row, out in zip(rows, step.outputs(verdict), strict=True):
                if len(out):
                    slots[row] ^= 1
                    has[row] = True
                outs[row].append(out)
                done[row] += len(out)
                seen[row] += len(out)
        ends = [pool[slots[row], columns(seen[row])] for row in rows]
        yield from _compare(f"layout {layout}", whole, reference, outs, ends)


def prefixes(problem: Problem, call: Call) -> Iterator[str]:
    """A chunked prefill, and a row that goes on from any of its snapshots in a slot of its own, are one prefill."""
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    history, rows = problem.arrays["weight"].shape[1] - 1, range(len(whole.rows))
    chance = iter(hash_uint32(history, "prefixes", 4096).tolist())
    before = [2 + 3 * row if whole.has[row] else 0 for row in rows]
    blocks = -(-max(before[row] + len(whole.rows[row]) for row in rows) // BLOCK)
    first = len(rows)  # slots: one a row, then the blocks of every row, then one to go on in
    slots = np.array([[first + blocks * row + k for k in range(blocks)] for row in rows])
    shape = (first + blocks * len(rows) + 1, *whole.pool.shape[1:])
    pool = poisoned(shape, problem.arrays["conv_states"].dtype)
    for row in rows:
        if whole.has[row]:
            pool[row, :history] = whole.pool[whole.slots[row], :history]
    done, has = [0 for _ in rows], list(whole.has)
    outs: list[list[np.ndarray]] = [[whole.poison(0)] for _ in rows]
    while any(done[row] < len(whole.rows[row]) for row in rows):
        part = [whole.rows[row][done[row] : done[row] + 1 + next(chance) % 6] for row in rows]
        step = replace(whole, rows=part, slots=list(rows), has=has, pool=pool)
        verdict = call(step.to_fn(6 * len(rows) - sum(map(len, part))).with_options(snapshot_block_size=BLOCK).with_arrays(
            snapshot_indices=_integers(slots),
            num_computed_tokens=_integers([before[row] + done[row] for row in rows]),
        ))  # fmt: skip
        pool = verdict.conv_states.bits
        for row, out in zip(rows, step.outputs(verdict), strict=True):
            outs[row].append(out)
            done[row] += len(out)
            has[row] = True
    yield from _compare("in chunks", whole, reference, outs, [pool[row, :history] for row in rows])
    for row in rows:
        wanted = whole.outputs(reference)[row]
        for k in range(blocks):
            at = (k + 1) * BLOCK - before[row]  # tokens of the row that the snapshot has seen
            if not 0 < at < len(whole.rows[row]):
                continue
            resumed = replace(
                whole, rows=[whole.rows[row][at:]], slots=[int(slots[row, k])], has=[True], pool=pool
            )
            longest = max(map(len, whole.rows))
            going_on = resumed.to_fn(longest - len(resumed.rows[0]))
            verdict = call(going_on.with_arrays(write_indices=_integers([len(pool) - 1])))
            joined = [whole.poison(0) for _ in rows]
            joined[row] = np.concatenate([wanted[:at], *resumed.outputs(verdict)])
            ends = [verdict.conv_states.bits[len(pool) - 1, :history] if i == row else None for i in rows]
            yield from _compare(f"from block {k}", whole, reference, [[out] for out in joined], ends)


def verify_windows(problem: Problem, call: Call) -> Iterator[str]:
    """Verify steps that only save windows, and a commit of the accepted one after each, are one prefill.

    Rejected drafts are NaN.
    """
    yield from _verify(problem, call, tree=False)


def verify_trees(problem: Problem, call: Call) -> Iterator[str]:
    """The same with trees of drafts, of which one path is accepted; every other node is NaN."""
    yield from _verify(problem, call, tree=True)


def _verify(problem: Problem, call: Call, tree: bool) -> Iterator[str]:
    whole = batch_of(problem)
    reference = call(whole.to_fn())
    history, rows = problem.arrays["weight"].shape[1] - 1, range(len(whole.rows))
    chance = iter(hash_uint32(history, f"verify{tree}", 8192).tolist())
    first = replace(whole, rows=[row[:1] for row in whole.rows])  # every row has a state from here on
    verdict = call(first.to_fn())
    outs = [[out] for out in first.outputs(verdict)]
    done, pool = [1 for _ in rows], verdict.conv_states.bits
    kind = problem.arrays["conv_states"].dtype
    while any(done[row] < len(whole.rows[row]) for row in rows):
        inputs, parents, accepted, slots = [], [], [], []
        for row in rows:  # those that have ended are padding
            left = len(whole.rows[row]) - done[row]
            tokens = whole.poison(NODES)
            parents.append([-1] + [next(chance) % node if tree else node - 1 for node in range(1, NODES)])
            path = _path(parents[-1], next(chance) % NODES)[: 1 + next(chance) % max(left, 1) if left else 0]
            tokens[path] = whole.rows[row][done[row] : done[row] + len(path)]
            inputs.append(tokens)
            accepted.append(path)
            slots.append(whole.slots[row] if left else whole.pad)
        step = replace(whole, rows=inputs, slots=slots, has=[True] * len(rows), pool=pool)
        buffers = [2 * row + 1 for row in rows]
        windows = from_bits(poisoned((2 * len(rows), NODES, history, pool.shape[2]), kind), kind)
        arguments: dict[str, Any] = {"window_out": plain(windows), "window_indices": _integers(buffers)}
        if tree:
            call(_links(parents))
            arguments["tree_parents"] = _integers(parents)
        verdict = call(step.to_update(3).with_arrays(**arguments).with_options(commit=False))
        for row, out, path in zip(rows, step.outputs(verdict), accepted, strict=True):
            outs[row].append(out[path])
            done[row] += len(path)
        pool = call(Problem("commit_windows", {
            "conv_states": plain(from_bits(pool, kind)), "window_out": plain(verdict.window_out),
            "accepted_steps": _integers([path[-1] if path else -1 for path in accepted]),
            "cache_indices": _integers(step.slots), "window_indices": _integers(buffers),
        }, {})).conv_states.bits  # fmt: skip
    ends = [pool[whole.slots[row], :history] for row in rows]
    yield from _compare("verified trees" if tree else "verified windows", whole, reference, outs, ends)


def _path(parents: list[int], node: int) -> list[int]:
    """The nodes from the root to a node."""
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def _links(parents: list[list[int]]) -> Problem:
    """The conversion whose result these parents are: first children and next siblings."""
    children, siblings = np.full((2, len(parents), NODES), -1)
    for row, tree in enumerate(parents):
        last: dict[int, int] = {}
        for node in range(1, NODES):
            elder = last.get(tree[node])
            if elder is None:
                children[row, tree[node]] = node
            else:
                siblings[row, elder] = node
            last[tree[node]] = node
    arrays = {"next_token": _integers(children), "next_sibling": _integers(siblings)}
    return Problem("tree_parents_from_links", arrays, {})


def _integers(values: Any) -> Array:
    return plain(np.array(values, dtype=np.int32))


def _compare(
    label: str, whole: Batch, reference: Verdict, outs: list[list[np.ndarray]], ends: list[np.ndarray | None]
) -> Iterator[str]:
    """Outputs of every row, and its window at the end where there is one, against one prefill."""
    states = reference.conv_states.bits.copy()
    for row, end in enumerate(ends):
        if end is not None:
            states[whole.slots[row], : len(end)] = end
    wanted = whole.outputs(reference)
    joined = [np.concatenate(parts) for parts in outs]
    joined = [out if len(out) or not len(want) else want for out, want in zip(joined, wanted, strict=True)]
    yield from differences(label, whole, reference, joined, from_bits(states, reference.conv_states.dtype))
