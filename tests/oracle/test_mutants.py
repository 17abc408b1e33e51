"""Every check is shown to fail: each wrong-on-purpose reference is failed by a case that carries its flag."""

import numpy as np
import pytest

from oracle.conformance import catalogue, flags, inputs, model
from oracle.conformance.arrays import plain
from oracle.conformance.judge import Promises
from oracle.conformance.mutants import MUTANTS, first_failure, gradients
from oracle.conformance.worker import run_case

FN, UPDATE = catalogue.FN, catalogue.UPDATE


@pytest.mark.parametrize("name", MUTANTS)
def test_a_case_with_its_flag_fails_the_mutant(name):
    assert first_failure(MUTANTS[name]) is not None, f"{name}: {MUTANTS[name].__doc__}"


def test_the_model_without_a_mistake_passes():
    """So what fails a mutant is its mistake."""
    for case in catalogue.catalogue():
        if case.tier != "large":
            verdict = run_case(model.Model(), case, Promises())
            assert verdict.status == "passed", f"{case.id}: {verdict.detail}"


def test_every_flag_has_a_mutant_and_a_case():
    carried = {flag for case in catalogue.catalogue() for flag in case.flags}
    assert carried == set(flags.FLAGS)
    assert {mutant.flag for mutant in MUTANTS.values()} == set(flags.FLAGS)
    assert len(MUTANTS) >= 60
    assert not set(flags.NOT_EXPRESSIBLE) & set(flags.FLAGS)
    for flag in flags.FLAGS.values():
        assert flag.kind in flags.KINDS
        assert all("#" in reference and "/" in reference for reference in flag.references)


def naive_problems():
    """What projects usually test: two equal rows, slots 0 and 1, a zeroed pool, no initial state, SiLU, width 4;
    and one decode step of two rows."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return plain(rng.standard_normal(shape).astype(np.float32))

    shared = {"weight": draw(8, 4), "bias": draw(8), "cache_indices": plain(np.array([0, 1], np.int32))}
    pool = np.zeros((2, 3, 8), np.float32)
    yield inputs.Problem(
        FN,
        {"x": draw(32, 8), "conv_states": plain(pool), "query_start_loc": plain(np.array([0, 16, 32], np.int32)),
         "has_initial_state": plain(np.array([False, False])), **shared},
        {"activation": "silu"},
    )  # fmt: skip
    yield inputs.Problem(
        UPDATE, {"x": draw(2, 8), "conv_states": draw(2, 3, 8), **shared}, {"activation": "silu"}
    )


def test_a_naive_suite_misses_many_of_them():
    """Why the catalogue is needed: the usual test, outputs and states compared closely, lets these mutants pass."""
    missed = []
    forward = {name: m for name, m in MUTANTS.items() if m.__module__ != gradients.__name__}
    for name, mutant in forward.items():
        for problem in naive_problems():
            want = model.Model().run(problem.op, problem.arrays, problem.options)
            try:
                got = mutant().run(problem.op, problem.arrays, problem.options)
                same = all(
                    got[key].data.shape == want[key].data.shape
                    and np.allclose(got[key].data, want[key].data, rtol=0, atol=1e-6)
                    for key in ("out", "conv_states")
                )
            except Exception:
                same = False
            if not same:
                break
        else:
            missed.append(name)
    assert len(missed) >= 25, missed
    print(f"the naive suite misses {len(missed)} of {len(forward)} mutants")
