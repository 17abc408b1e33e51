"""Cases of causal_conv1d_backward taken apart, for tests that call a backward pass themselves."""

from types import SimpleNamespace
from typing import Any, NamedTuple

from oracle import reference_grad
from oracle.conformance import catalogue, inputs
from oracle.conformance.adapter import GRADIENTS
from oracle.conformance.judge import Promises, evaluate
from oracle.numerics import TypedArray

CASES = {
    case.id.removeprefix("backward/"): case
    for case in catalogue.catalogue()
    if case.op == catalogue.BACKWARD and case.expect == "value" and case.relation is None and not case.layout
}


class GradientProblem(NamedTuple):
    """A built case: the arguments by name (TypedArray or None), what comes in, the activation."""

    problem: inputs.Problem
    arguments: dict[str, Any]
    dout: TypedArray
    dfinal_states: TypedArray | None
    activation: str | None

    def call(self, function):
        """`function(dout, dfinal_states, x, weight, bias, initial_states, query_start_loc, activation=...)`."""
        return function(self.dout, self.dfinal_states, **self.arguments, activation=self.activation)


def build(case):
    problem = inputs.build(case)
    arrays = {name: None if a is None else a.typed for name, a in problem.arrays.items()}
    dout, dfinal = arrays.pop("dout"), arrays.pop("dfinal_states")
    return GradientProblem(problem, arrays, dout, dfinal, problem.options.get("activation"))


def expected(problem):
    """The reference's gradients, float64."""
    return problem.call(reference_grad.causal_conv1d_backward)


def judge(problem, found):
    """What the suite says of gradients (TypedArrays or None) in the order of its names; empty if they are right."""
    result = dict(zip(GRADIENTS[catalogue.BACKWARD], found, strict=True))
    adapter = SimpleNamespace(run=lambda op, arrays, options: result)
    return evaluate(adapter, problem.problem, Promises()).detail
