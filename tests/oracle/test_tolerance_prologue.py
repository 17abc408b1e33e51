"""The bounds of the fronts accept right-precision evaluations and reject low-precision ones."""

import numpy as np
import pytest

from oracle import reference_prologue, tolerance_prologue
from oracle.conformance import inputs
from oracle.conformance.catalogue import catalogue
from oracle.numerics import rounded
from oracle.tolerance import fraction_of_bound

FRONTS = [
    case
    for case in catalogue()
    if case.op in reference_prologue.CONVOLUTIONS and case.expect == "value" and case.data != "nan_payload"
]
COUNT = 20_000


def draw(*shape, scale=1.0, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("eps", [1e-6, 0.25])
@pytest.mark.parametrize("size", [1, 3, 64, 256])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norm_in_float32_is_inside(eps, size, scale):
    y = draw(COUNT // size, size, scale=scale)
    values, error = tolerance_prologue.normalised(
        y.astype(np.float64), np.zeros(y.shape), float(np.float32(eps))
    )
    got = y * (np.float32(1) / np.sqrt(reference_prologue.tree_sum(y * y) + np.float32(eps)))
    assert (np.abs(got - values) <= error).all()
    coarse = rounded(reference_prologue.tree_sum(y * y).astype(np.float64), "float16").values()
    coarse = y / np.sqrt(coarse + eps)
    if scale == 1.0:  # a sum that counts beside eps
        assert (np.abs(coarse - values) > error).mean() > 0.3


@pytest.mark.parametrize("size", [4, 96])
def test_norm_of_values_with_an_error_is_inside(size):
    """Every corner of the interval, and random places in it."""
    y, e = draw(COUNT // size, size).astype(np.float64), np.abs(draw(COUNT // size, size, seed=1)) * 2.0**-6
    values, error = tolerance_prologue.normalised(y, e, 1e-6)
    for moved in (
        e,
        -e,
        np.sign(y) * e,
        -np.sign(y) * e,
        e * np.random.default_rng(2).uniform(-1, 1, e.shape),
    ):
        other = y + moved
        got = other / np.sqrt((other * other).sum(-1, keepdims=True) + 1e-6)
        assert (np.abs(got - values) <= error).all()


def test_norm_of_a_head_that_overflows_may_be_zero():
    y = np.full((1, 8), 3e19)
    values, error = tolerance_prologue.normalised(y, np.zeros(y.shape), 1e-6)
    assert (np.abs(0 - values) <= error).all()
    assert (np.abs(2.1 * values - values) > error).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gates_in_float32_are_inside(scale):
    z = draw(COUNT, scale=scale)
    one, linear = np.float32(1), np.float32(20)
    with np.errstate(over="ignore"):
        softplus = {
            "log1p": np.where(z > linear, z, np.log1p(np.exp(z))),
            "log": np.where(z > linear, z, np.log(one + np.exp(z))),
        }
    values, error = tolerance_prologue.softplus_error(z.astype(np.float64), np.zeros(z.shape))
    for got in softplus.values():
        assert (np.abs(got - values) <= error).all()
    half = np.float16(0) + np.log1p(np.exp(np.minimum(z, 10).astype(np.float16))).astype(np.float32)
    assert (np.abs(half - values) > error).mean() > 0.3
    with np.errstate(over="ignore"):
        sigmoid = one / (one + np.exp(-z))
    values, error = tolerance_prologue.sigmoid_error(z.astype(np.float64), np.zeros(z.shape))
    assert (np.abs(sigmoid - values) <= error).all()
    coarse = rounded(sigmoid.astype(np.float64), "bfloat16").values()
    assert (np.abs(coarse - values) > error).mean() > 0.2


@pytest.mark.parametrize("case", FRONTS, ids=lambda case: case.id)
def test_both_evaluations_are_inside(case):
    """The reference's, in float64 and rounded, and the contract's order in float32."""
    arguments = inputs.build(case).typed()
    given = reference_prologue.checked(case.op, {**arguments, "validate": False})
    wanted = tolerance_prologue.expected(case.op, arguments)
    exact, ordered = (
        (reference_prologue.Gated(), reference_prologue.OrderedGated())
        if "bcx" in given
        else (reference_prologue.Front(), reference_prologue.OrderedFront())
    )
    for steps in (exact, ordered):
        found = (steps.gated if "bcx" in given else steps.front)(case.op, given)
        for name, want in wanted.items():
            if want.values.size:
                fraction = fraction_of_bound(found[name].values(), want.values, want.bound, want.dtype)
                assert fraction.max() <= 1.0, name
                if want.computed.any():  # the bound says something
                    live = want.bound[want.computed] / (np.abs(want.values[want.computed]) + 0.1)
                    assert np.median(live) < 0.05, name
