"""Hypothesis strategies for serving histories, and the check that runs one.

A history is what an engine does with one pool: requests arrive, are prefilled in chunks, decode, end, and leave their
slots to others, among padding rows and padded tails. Every step is a `Case`, so that a failing step can be
repeated alone:

    @given(histories())
    def test_histories(history):
        check_history(adapter, history)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from oracle.conformance import catalogue, inputs
from oracle.conformance.adapter import Adapter
from oracle.conformance.arrays import place, poisoned
from oracle.conformance.cases import Case
from oracle.conformance.judge import evaluate, promises_of
from oracle.numerics import from_bits

DTYPES = ("bfloat16", "float16", "float32")
MAX_SLOTS = 6


@st.composite
def histories(draw: Any, max_steps: int = 5, max_tokens: int = 20) -> tuple[Case, ...]:
    """Draws a history; shrinks towards few steps, few rows, few tokens, width 1 and one channel."""
    width = draw(st.integers(1, 5))
    num_slots = draw(st.integers(1, MAX_SLOTS))
    geometry = {
        "dim": draw(st.sampled_from((1, 2, 5, 16))), "width": width, "num_slots": num_slots,
        "state_len": width - 1 + draw(st.integers(0, 2)),
    }  # fmt: skip
    dtype, pool_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from((None, "float32")))
    common = {
        "dtype": dtype, "dtypes": {"conv_states": pool_dtype or dtype}, "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from((None, "silu"))), **geometry,
    }  # fmt: skip
    started: set[int] = set()
    steps = []
    for number in range(draw(st.integers(1, max_steps))):
        slots = draw(st.permutations(range(num_slots)))[: draw(st.integers(0, num_slots))]
        decode = bool(started) and draw(st.booleans())
        if decode:
            rows = [slot if slot in started else -1 for slot in slots]
            step = catalogue.update(f"step-{number}", batch=len(rows), slots=tuple(rows),
                                    seqlen=draw(st.sampled_from((None, 1, 3))), **common)  # fmt: skip
        else:
            rows = [draw(st.sampled_from((slot, slot, slot, -1))) for slot in slots]
            arriving = [slot not in started or draw(st.booleans()) for slot in rows]
            lengths = tuple(draw(st.integers(0, max_tokens)) for _ in rows)
            step = catalogue.fn(f"step-{number}", lengths=lengths, slots=tuple(rows), tail=draw(st.integers(0, 3)),
                                has=tuple(not new for new in arriving),
                                options={"schedule": draw(st.sampled_from(("auto", "per_sequence", "flat")))},
                                **common)  # fmt: skip
            started |= {slot for slot, n in zip(rows, lengths, strict=True) if slot >= 0 and n > 0}
        steps.append(step)
    return tuple(steps)


def check_history(adapter: Adapter, history: Sequence[Case]) -> None:
    """Runs the steps of a history on one pool and judges each.

    Raises:
      AssertionError: a step is wrong; the text holds it as a case for `python -m oracle run --case-file`.
    """
    promises, pool = promises_of(adapter), None
    for number, case in enumerate(history):
        problem = inputs.build(case)
        states = problem.arrays["conv_states"]
        bits = poisoned(states.shape, states.dtype) if pool is None else pool
        problem = problem.with_arrays(conv_states=place(from_bits(bits, states.dtype), "contiguous"))
        verdict = evaluate(adapter, problem, promises)
        assert verdict.status == "passed", (
            f"step {number + 1} of {len(history)}: {verdict.status}: {verdict.detail}\n"
            f"as a case, for `python -m oracle run --impl ... --case-file FILE`:\n{json.dumps(ready_case(case).to_json())}"
        )
        pool = np.array(verdict.conv_states.bits)


def ready_case(step: Case) -> Case:
    """A step as a case of its own, with an id that says what it is."""
    kind, _, name = step.id.partition("/")
    return replace(step, id=f"{kind}/found-{name}", group="found")
