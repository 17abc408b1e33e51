"""The reference gradients against finite differences of the forward reference, and the cases against mutants."""

import numpy as np
import pytest

from oracle import reference, reference_grad
from oracle.conformance import gradients
from oracle.numerics import TypedArray, silu, typed
from oracle.tolerance_grad import gradient_bounds

CASES = {case.id: case for case in gradients.CASES}
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
    with_state = gradients.build(gradients.GradientCase(name, lengths=lengths))
    with_state.arguments["initial_states"].data[:] = 0
    without = gradients.GradientProblem(
        with_state.arguments | {"initial_states": None}, with_state.dout, with_state.dfinal_states, "silu"
    )
    a, b = gradients.expected(with_state), gradients.expected(without)
    assert b.initial_states is None
    for name in ("x", "weight", "bias"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("split", [1, 2, 3, 5, 8])
def test_two_chunks_give_the_gradient_of_one(split):
    problem = gradients.build(gradients.GradientCase("chunks", lengths=(9,), dtypes=("float32",) * 4))
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_model_without_a_mistake_passes(case):
    problem = gradients.build(case)
    assert gradients.judge(problem, gradients.Model()(problem)) == []


@pytest.mark.parametrize("mutant", gradients.MUTANTS, ids=lambda m: m.__name__)
def test_a_case_with_its_flag_fails_the_mutant(mutant):
    flagged = [gradients.build(case) for case in gradients.CASES if mutant.flag in case.flags]
    assert any(gradients.judge(problem, mutant()(problem)) for problem in flagged), mutant.__doc__


def test_every_flag_has_a_mutant_and_a_case():
    assert {mutant.flag for mutant in gradients.MUTANTS} == set(gradients.FLAGS)
    assert {flag for case in gradients.CASES for flag in case.flags} == set(gradients.FLAGS)


def test_the_judge_names_what_is_missing_or_of_another_kind():
    problem = gradients.build(CASES["width-4"])
    right = gradients.Model()(problem)
    assert gradients.judge(problem, right._replace(bias=None)) == ["bias: expected a gradient"]
    other = TypedArray("float16", right.weight.data.astype(np.float16))
    assert gradients.judge(problem, right._replace(weight=other)) == [
        "weight: expected float32 (8, 4), got float16 (8, 4)"
    ]
    right.x.data[0, 0] = np.nan
    assert "inf times the bound" in gradients.judge(problem, right)[0]


@pytest.mark.parametrize("name", ["width-4", "steep", "linear", "several-blocks"])
def test_bounds_are_tight(name):
    """A bound that lets a gradient be off by more of its own size than float32 sums of this length is no check."""
    problem = gradients.build(CASES[name])
    bounds = problem.call(gradient_bounds)
    for want, bound in zip(gradients.expected(problem), bounds, strict=True):
        assert np.median(bound / np.maximum(np.abs(want), 0.1)) < 3e-4
