"""The bound accepts every right-precision evaluation and rejects each low-precision one."""

import numpy as np
import pytest

from oracle import numerics, tolerance
from oracle.conformance.model import rounded_to

COUNT = 50_000
SIXTEEN = ("bfloat16", "float16")


def draw(width, dtype, seed=0):
    rng = np.random.default_rng(seed)
    e, w = (rounded_to(rng.standard_normal((COUNT, width)), dtype) for _ in range(2))
    bias = rounded_to(rng.standard_normal(COUNT), dtype)
    return e, w, bias


def worst(e, w, bias, width, dtype, activation, bits):
    pre = bias + (e.astype(np.float64) * w).sum(axis=1)
    magnitude = np.abs(bias).astype(np.float64) + np.abs(e.astype(np.float64) * w).sum(axis=1)
    bound = tolerance.error_bound(pre, magnitude, width, dtype, activation)
    expected = numerics.silu(pre) if activation else pre
    return tolerance.fraction_of_bound(numerics.to_float64(bits, dtype), expected, bound, dtype)


def evaluate(e, w, bias, *, order=1, bias_last=False, sigmoid=lambda s: s):
    acc = np.zeros_like(bias) if bias_last else bias.copy()
    for j in range(e.shape[1])[::order]:
        acc = acc + e[:, j] * w[:, j]
    acc = acc + bias if bias_last else acc
    return acc, acc * sigmoid(1 / (1 + np.exp(-acc)))


@pytest.mark.parametrize("dtype", numerics.FORMATS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_float32_evaluations_are_inside(dtype, width, activation):
    e, w, bias = draw(width, dtype)
    for order in (1, -1):
        for bias_last in (False, True):
            pre, act = evaluate(e, w, bias, order=order, bias_last=bias_last)
            bits = numerics.round_bits((act if activation else pre).astype(np.float64), dtype)
            assert worst(e, w, bias, width, dtype, activation, bits).max() <= 1.0


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_low_precision_evaluations_are_outside(dtype, activation):
    width = 4
    e, w, bias = draw(width, dtype)
    finish = (lambda z: z * (1 / (1 + np.exp(-z)))) if activation else (lambda z: z)

    def accumulator_rounded():
        acc = bias.copy()
        for j in range(width):
            acc = rounded_to(acc + e[:, j] * w[:, j], dtype)
        return finish(acc)

    def products_rounded():
        return finish(bias + sum(rounded_to(e[:, j] * w[:, j], dtype) for j in range(width)))

    def one_tap_off():
        off = w.copy()
        off[:, 0] = rounded_to(off[:, 0] + numerics.ulp(off[:, 0], dtype), dtype)
        return finish(evaluate(e, off, bias)[0])

    wrong = {f.__name__: f() for f in (accumulator_rounded, products_rounded, one_tap_off)}
    if activation:
        pre = evaluate(e, w, bias)[0]
        wrong["sum_rounded_before_silu"] = finish(rounded_to(pre, dtype))
        wrong["sigmoid_rounded"] = evaluate(e, w, bias, sigmoid=lambda s: rounded_to(s, dtype))[1]
    for name, values in wrong.items():
        share = (
            worst(e, w, bias, width, dtype, activation, numerics.round_bits(values.astype(float), dtype)) > 1
        ).mean()
        assert share > 0.1, f"{name}: only {share:.1%} of elements outside the bound"


def test_a_truncated_store_is_outside():
    e, w, bias = draw(4, "bfloat16")
    pre, _ = evaluate(e, w, bias)
    bits = (pre.view(np.uint32) >> 16).astype(np.uint16)
    assert (worst(e, w, bias, 4, "bfloat16", None, bits) > 1).mean() > 0.2


def test_the_bound_is_tight_where_silu_vanishes():
    """At z = -80 an error of a tenth of the result is outside, though the sum's rounding is larger than the result."""
    z = np.array([-80.0])
    bound = tolerance.error_bound(z, np.array([80.0]), 4, "float32", "silu")
    assert bound[0] < 0.1 * abs(numerics.silu(z)[0])


def test_special_values():
    bound = np.full(6, 1.0)
    expected = np.array([np.nan, np.inf, 1.0, np.nan, -np.inf, 65519.0])
    got = np.array([np.nan, np.inf, np.nan, 1.0, np.inf, np.inf])
    fraction = tolerance.fraction_of_bound(got, expected, bound + 10, "float16")
    np.testing.assert_array_equal(fraction, [0, 0, np.inf, np.inf, np.inf, 0])
