"""Each relation holds for the model, and sees a single wrong bit in any call that it makes after the first."""

import copy

import numpy as np
import pytest

from oracle.conformance import inputs, relations
from oracle.conformance.catalogue import BACKWARD, FN, UPDATE, catalogue
from oracle.conformance.judge import Promises, evaluate
from oracle.conformance.model import Model
from oracle.conformance.relations.rows import batch_of

CASES = {}
for case in catalogue():
    dtype = case.dtypes.get("x") or case.dtypes.get("bcx")
    if case.relation and dtype == "bfloat16" and case.op != BACKWARD:
        CASES.setdefault((case.relation, case.op), case)


def call(problem):
    verdict = evaluate(Model(), problem, Promises())
    assert verdict.status == "passed", verdict.detail
    return verdict


def differences(case, call):
    return list(relations.RELATIONS[case.relation](inputs.build(case), call))


def test_every_relation_has_a_case():
    gradients = {case.relation for case in catalogue() if case.op == BACKWARD}  # see test_reference_grad.py
    assert {name for name, _ in CASES} | gradients - {None} == set(relations.RELATIONS)


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]}-{key[1]}")
def test_the_model_keeps_it(key):
    assert differences(CASES[key], call) == []


@pytest.mark.parametrize("field", ["out", "conv_states"])
@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_single_bit_is_seen(key, field):
    """Flips the lowest bit of what the relation looks at, in the last call it makes that returns such an array with something in it."""
    case, seen = CASES[key], []

    def counting(problem):
        seen.append(call(problem))
        return seen[-1]

    differences(case, counting)
    arrays = [getattr(verdict, field) for verdict in seen]
    last = 1 + max(i for i, array in enumerate(arrays) if array is not None and array.bits.any())
    number = 0

    def spoiled(problem):
        nonlocal number
        number += 1
        verdict = call(problem)
        if number == last:
            verdict = copy.copy(verdict)
            array = copy.deepcopy(getattr(verdict, field))
            if field == "out":
                live = np.argwhere(array.bits != 0)[
                    0
                ]  # zeros may belong to padding, which no relation compares
                array.bits[tuple(live)] ^= 1
            else:
                slots = problem.arrays.get("write_indices") or problem.arrays.get("cache_indices")
                slot = next(s for s in slots.data.tolist() if s >= 0) if slots else 0
                array.bits[slot] ^= 1
            setattr(verdict, field, array)
        return verdict

    assert last >= 2
    found = differences(case, spoiled)
    assert found, f"{case.relation} did not see it"
    assert any(("states differ" in text) == (field == "conv_states") for text in found)


@pytest.mark.parametrize("key", [key for key in CASES if key[1] in (FN, UPDATE)], ids="-".join)
def test_parts_say_what_the_whole_says(key):
    """A batch taken apart and put together again is the same call."""
    problem = inputs.build(CASES[key])
    batch = batch_of(problem)
    again = batch.again()
    for name, array in again.arrays.items():
        if array is not None:
            np.testing.assert_array_equal(array.typed.data, problem.arrays[name].typed.data)
