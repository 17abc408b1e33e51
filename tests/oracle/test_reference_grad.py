"""The reference gradients against finite differences of the forward reference; the judge and the relations of gradients."""

import copy

import numpy as np
import pytest

from oracle import reference, reference_grad
from oracle.conformance import inputs, judge, relations
from oracle.conformance.catalogue import BACKWARD, catalogue
from oracle.conformance.catalogue import backward as case_of
from oracle.conformance.model import Model
from oracle.conformance.mutants import gradients as mutants
from oracle.conformance.worker import run_case
from oracle.numerics import TypedArray, silu, typed
from oracle.tolerance_grad import gradient_bounds
from tests.tools import gradient_cases as gradients

CASES = gradients.CASES
STEP = 2.0**-10  # the values below lie on a grid of 2**-8, so that x + STEP is exact in float32


def on_grid(problem):
    """The arguments and upstream gradients in float32, rounded to a grid; no NaN."""

    def grid(array):
        if array is None or array.dtype == "int32":
            return None if array is None else array.data
        return (np.round(np.nan_to_num(array.values()) * 2**8) / 2**8).astype(np.float32)

    arguments = {name: grid(array) for name, array in problem.arguments.items()}
    dfinal = None if problem.dfinal_states is None else grid(problem.dfinal_states)
    return arguments, grid(problem.dout), dfinal


def loss(arguments, dout, dfinal, activation):
    """sum(dout * out) + sum(dfinal * states) in float64, from the forward reference alone."""
    x, initial, starts = (arguments[name] for name in ("x", "initial_states", "query_start_loc"))
    width, dim = arguments["weight"].shape[1], x.shape[-1]
    if starts is None:
        starts = np.arange(len(x) + 1, dtype=np.int32) * x.shape[1]
    pool = np.zeros((len(starts) - 1, width - 1, dim), np.float32) if initial is None else initial
    call = dict(
        x=x.reshape(-1, dim),
        weight=arguments["weight"],
        bias=arguments["bias"],
        conv_states=pool,
        query_start_loc=starts,
        has_initial_state=np.ones(len(pool), bool),
    )
    pre, computed = reference.preactivation("causal_conv1d_fn", call)
    total = (dout.reshape(-1, dim) * np.where(computed, silu(pre) if activation else pre, 0)).sum()
    if dfinal is not None:
        total += (dfinal.astype(np.float64) * reference.causal_conv1d_fn(**call).conv_states).sum()
    return total


@pytest.mark.parametrize(
    "name",
    [
        "width-1",
        "width-2",
        "width-4",
        "width-8",
        "linear",
        "no-initial",
        "no-final",
        "dense-short",
        "empty-rows",
    ],
)
def test_finite_differences(name):
    problem = gradients.build(CASES[name])
    arguments, dout, dfinal = on_grid(problem)
    exact = reference_grad.causal_conv1d_backward(dout, dfinal, **arguments, activation=problem.activation)
    for argument, gradient in zip(exact._fields, exact, strict=True):
        if gradient is None:
            continue
        flat = arguments[argument].reshape(-1)
        for i in np.linspace(0, flat.size - 1, 40).astype(int) if flat.size else ():
            sides = []
            for step in (STEP, -STEP):
                kept, flat[i] = flat[i], flat[i] + step
                sides.append(loss(arguments, dout, dfinal, problem.activation))
                flat[i] = kept
            slope = (sides[0] - sides[1]) / (2 * STEP)
            # a central difference is off by STEP**2 / 6 times the third derivative
            assert gradient.reshape(-1)[i] == pytest.approx(slope, rel=1e-5, abs=2e-4), f"{argument}[{i}]"


@pytest.mark.parametrize("name", ["dh0-short", "dh0-long"])
def test_dweight_does_not_depend_on_who_asks_for_dinitial(name):
    """A zero initial state and none are the same to every other gradient."""
    lengths = (3,) if name == "dh0-short" else (9, 2)
    with_state = gradients.build(case_of(name, lengths=lengths))
    with_state.arguments["initial_states"].data[:] = 0
    without = with_state._replace(arguments=with_state.arguments | {"initial_states": None})
    a, b = gradients.expected(with_state), gradients.expected(without)
    assert b.initial_states is None
    for name in ("x", "weight", "bias"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("split", [1, 2, 3, 5, 8])
def test_two_chunks_give_the_gradient_of_one(split):
    problem = gradients.build(case_of("chunks", lengths=(9,)))
    whole = gradients.expected(problem)
    a, dout = problem.arguments, problem.dout.values()
    first, second = a["x"].data[:split], a["x"].data[split:]
    state = reference_grad.causal_conv1d(
        first, a["weight"], a["bias"], a["initial_states"], starts(split)
    ).conv_states

    def backward(dout, dfinal, x, initial):
        return reference_grad.causal_conv1d_backward(
            dout, dfinal, x, a["weight"], a["bias"], initial, starts(len(x)), activation="silu"
        )

    late = backward(dout[split:], problem.dfinal_states, second, state)
    early = backward(dout[:split], late.initial_states, first, a["initial_states"])
    assert np.allclose(np.concatenate([early.x, late.x]), whole.x, rtol=1e-12, atol=1e-12)
    assert np.allclose(early.weight + late.weight, whole.weight, rtol=1e-12, atol=1e-12)
    assert np.allclose(early.initial_states, whole.initial_states, rtol=1e-12, atol=1e-12)


def starts(length):
    return np.array([0, length], np.int32)


def test_forward_is_the_prefill_with_a_slot_a_row():
    problem = gradients.build(CASES["bfloat16-silu"])
    out, states = reference_grad.causal_conv1d(**problem.arguments, activation="silu")
    a = problem.arguments
    same = reference.causal_conv1d_fn(
        a["x"], a["weight"], a["bias"], a["initial_states"], a["query_start_loc"], None, np.ones(9, bool),
        activation="silu",
    )  # fmt: skip
    assert np.array_equal(out.bits, same.out.bits)
    assert np.array_equal(states.bits, same.conv_states.bits)


def test_forward_without_states_starts_from_zeros_in_the_dtype_of_x():
    problem = gradients.build(CASES["no-initial"])
    states = reference_grad.causal_conv1d(**problem.arguments).conv_states
    assert typed(states).dtype == "float32"
    assert np.array_equal(states.data[3], np.zeros((3, 8)))  # a row of zero tokens
    assert np.array_equal(states.data[0], np.concatenate([np.zeros((2, 8)), problem.arguments["x"].data[:1]]))


def test_silu_slope():
    z = np.array([-np.inf, -1e30, -800.0, -1.0, 0.0, 1.0, 800.0, 1e30, np.inf])
    with np.errstate(invalid="ignore"):
        slope = reference_grad.silu_slope(z)
    assert np.array_equal(slope[[0, 1, 2, 4, 6, 7]], [0, 0, 0, 0.5, 1, 1])
    near = np.linspace(-6, 6, 101)
    difference = (silu(near + 1e-5) - silu(near - 1e-5)) / 2e-5
    assert np.allclose(reference_grad.silu_slope(near), difference, rtol=0, atol=1e-9)


def outcome(**changes):
    """What the suite says of width-4 where the results named are replaced; a function is applied to a copy."""
    problem = inputs.build(CASES["width-4"])

    class Changed(Model):
        def run(self, op, arrays, options):
            found = super().run(op, arrays, options)
            return found | {k: v(copy.deepcopy(found[k])) if callable(v) else v for k, v in changes.items()}

    return judge.evaluate(Changed(), problem, judge.Promises())


def poisoned(array):
    array.data[0, 0] = np.nan
    return array


def test_the_judge_names_what_is_missing_or_of_another_kind():
    assert outcome().status == "passed"
    missing = outcome(dbias=None)
    assert (missing.status, missing.detail) == ("wrong_shape", "dbias: expected an array, got None")
    other = outcome(dweight=lambda a: TypedArray("float16", a.data.astype(np.float16)))
    assert (other.status, other.detail) == ("wrong_dtype", "dweight: expected dtype float32, got float16")
    assert outcome(dx=lambda a: TypedArray("float32", a.data.T)).status == "wrong_shape"
    nan = outcome(dx=poisoned)
    assert nan.status == "wrong_value"
    assert "dx: 1 of 320 elements outside the bound, the worst at [0, 0]" in nan.detail
    assert nan.worst.fraction == 1e30


def test_the_worst_gradient_is_the_worst_of_all():
    assert 0 < outcome().worst.fraction <= 1
    assert outcome(dbias=lambda a: TypedArray("float32", a.data + 1)).worst.index == [
        int(np.argmax(1 / gradients.build(CASES["width-4"]).call(gradient_bounds).bias))
    ]


RELATIONS = {case.id: case for case in catalogue() if case.op == BACKWARD and case.relation}


@pytest.mark.parametrize("name", ["dx", "dweight", "dbias", "dinitial_states"])
@pytest.mark.parametrize("case", RELATIONS.values(), ids=RELATIONS)
def test_a_relation_sees_a_single_bit(case, name):
    """Of any gradient, in any call after the first."""

    def differences(spoiled):
        number = 0

        def call(problem):
            nonlocal number
            number += 1
            verdict = judge.evaluate(Model(), problem, judge.Promises())
            assert verdict.status == "passed", verdict.detail
            if number == spoiled:
                verdict.gradients[name].bits.reshape(-1)[0] ^= 1
            return verdict

        return list(relations.RELATIONS[case.relation](inputs.build(case), call)), number

    found, calls = differences(None)
    assert not found
    assert calls > 2
    for spoiled in range(2, calls + 1):
        found, _ = differences(spoiled)
        assert len(found) == 1
        assert f" 1 elements of {name} differ" in found[0]


@pytest.mark.parametrize(
    ("mutant", "relations"),
    [(mutants.OtherOrderInEveryCall, {"backward_schedules", "backward_repeat"}),
     (mutants.OtherOrderInOneSchedule, {"backward_schedules"})],
)  # fmt: skip
def test_relations_fail_their_mutants(mutant, relations):
    """Of one call alone, both are right."""
    failed = {
        case.relation
        for case in RELATIONS.values()
        if run_case(mutant(), case, judge.Promises()).status == "wrong_value"
    }
    assert failed == relations
    assert run_case(mutant(), CASES["width-4"], judge.Promises()).status == "passed"


@pytest.mark.parametrize("name", ["width-4", "steep", "linear", "several-blocks"])
def test_bounds_are_tight(name):
    """A bound that lets a gradient be off by more of its own size than float32 sums of this length is no check."""
    problem = gradients.build(CASES[name])
    bounds = problem.call(gradient_bounds)
    for want, bound in zip(gradients.expected(problem), bounds, strict=True):
        assert np.median(bound / np.maximum(np.abs(want), 0.1)) < 3e-4
