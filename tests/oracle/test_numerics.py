"""Rounding, ulps, fma and SiLU against independent definitions."""

import fractions

import numpy as np
import pytest

from oracle import numerics

RNG = np.random.default_rng(1)
EDGES = [
    0.0, -0.0, np.inf, -np.inf, np.nan, 65504.0, 65519.99, 65520.0, 65536.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001,
    3.3895e38, 3.3961e38, 3.4028235e38, 3.4028236e38, 1e300, 5e-324, 2.0**-126, 2.0**-133, 2.0**-134, 2.0**-149,
]  # fmt: skip


def wide_values(count):
    return np.concatenate([RNG.standard_normal(count) * np.exp2(RNG.integers(-160, 140, count)), EDGES])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounding_agrees_with_numpy(dtype):
    values = wide_values(200_000)
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    got = numerics.rounded(values, dtype).data
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_bfloat16_rounding_agrees_with_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    single = np.concatenate([
        RNG.integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32),
        np.arange(2**16, dtype=np.uint32) << 16,  # every bfloat16
        (np.arange(2**16, dtype=np.uint32) << 16) + 0x8000,  # every tie
    ]).view(np.float32)  # fmt: skip
    with np.errstate(all="ignore"):
        expected = single.astype(ml_dtypes.bfloat16).view(np.uint16)
        got = numerics.round_bits(single.astype(np.float64), "bfloat16")
    numbers = ~np.isnan(single)
    np.testing.assert_array_equal(got[numbers], expected[numbers])
    assert numerics.is_nan(got[~numbers], "bfloat16").all()


@pytest.mark.parametrize("dtype", numerics.FORMATS)
def test_rounding_is_once_and_to_even(dtype):
    """Against exact rational arithmetic: nearest representable number, ties to the even one."""
    step = fractions.Fraction(float(numerics.ulp(np.array(1.5), dtype)))
    for halves in range(-5, 6):
        for nudge in (-1, 0, 1):
            exact = fractions.Fraction(3, 2) + step * halves / 2 + nudge * step / 2**20
            count = round(exact / step)  # Python rounds ties to even
            got = fractions.Fraction(float(numerics.rounded(np.array(float(exact)), dtype).values()))
            assert got == count * step, (dtype, halves, nudge)


@pytest.mark.parametrize("dtype", numerics.FORMATS)
def test_bits_round_trip(dtype):
    storage = numerics.FORMATS[dtype].bits
    bits = (
        np.arange(2**16, dtype=storage)
        if storage is np.uint16
        else RNG.integers(0, 2**32, 10**5, dtype=storage)
    )
    numbers = bits[~numerics.is_nan(bits, dtype)]
    np.testing.assert_array_equal(numerics.round_bits(numerics.to_float64(numbers, dtype), dtype), numbers)


def test_a_nan_stays_a_nan():
    for source in numerics.FORMATS:
        for target in numerics.FORMATS:
            nan = numerics.round_bits(np.array([np.nan, -np.nan]), source)
            assert numerics.is_nan(numerics.cast_bits(nan, source, target), target).all()
    signalling = np.array([0x7FA0, 0xFF81], dtype=np.uint16)
    np.testing.assert_array_equal(numerics.cast_bits(signalling, "bfloat16", "bfloat16"), signalling)


def test_ulp_and_distance():
    assert numerics.ulp(np.array(1.0), "bfloat16") == 2.0**-7
    assert numerics.ulp(np.array(1.9), "float16") == 2.0**-10
    assert numerics.ulp(np.array(0.0), "float32") == 2.0**-149
    assert numerics.ulp(np.array(2.0**-130), "bfloat16") == 2.0**-133
    values = np.array([1.0, -1.0, 0.0, -0.0])
    bits = numerics.round_bits(values, "bfloat16")
    np.testing.assert_array_equal(numerics.ulp_distance(bits, bits + np.uint16(3)), [3, 3, 3, 3])
    zeros = bits[2:]
    assert numerics.ulp_distance(zeros[:1], zeros[1:])[0] == 0
    tiny = np.array([1, 0x8001], dtype=np.uint16)
    assert numerics.ulp_distance(tiny[:1], tiny[1:])[0] == 2


def test_fma_rounds_once():
    """Against exact rational arithmetic, on operands that cancel and on ties of the double rounding."""
    a = RNG.standard_normal(4000).astype(np.float32)
    b = RNG.standard_normal(4000).astype(np.float32)
    c = (-(a.astype(np.float64) * b)).astype(np.float32)
    c[::2] = (RNG.standard_normal(2000) * np.exp2(RNG.integers(-60, 60, 2000))).astype(np.float32)
    got = numerics.fma_float32(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        exact = fractions.Fraction(x) * fractions.Fraction(y) + fractions.Fraction(z)
        below, above = (
            np.nextafter(np.float32(result), np.float32(s), dtype=np.float32) for s in (-np.inf, np.inf)
        )
        error = abs(fractions.Fraction(result) - exact)
        assert error <= abs(fractions.Fraction(float(below)) - exact)
        assert error <= abs(fractions.Fraction(float(above)) - exact)
    # float64 alone would round this product and sum to a tie first, and then the wrong way.
    x, tie = np.float32([1 + 2**-12]), np.float32([2.0**-60])
    assert numerics.fma_float32(x, x, tie)[0] == np.float32(1 + 2**-11 + 2**-23)


def test_silu_at_both_ends():
    z = np.array([-np.inf, -1e4, -745.0, -104.0, -88.9, -1.0, -0.0, 0.0, 1.0, 88.9, 1e4, np.inf, np.nan])
    got = numerics.silu(z)
    np.testing.assert_array_equal(got[[0, 1]], [0.0, 0.0])
    np.testing.assert_allclose(got[3], -104 * np.exp(-104.0), rtol=1e-15)
    np.testing.assert_allclose(got[5], -1 / (1 + np.e), rtol=1e-15)
    assert np.signbit(got[6])
    assert not np.signbit(got[7])
    np.testing.assert_array_equal(got[[9, 10, 11]], [88.9, 1e4, np.inf])
    assert np.isnan(got[12])


def test_typed_arrays_hold_the_contracts_dtype_names():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    extension = np.array([1.0, -2.5], dtype=ml_dtypes.bfloat16)
    array = numerics.typed(extension)
    assert array.dtype == "bfloat16"
    np.testing.assert_array_equal(array.values(), [1.0, -2.5])
    assert numerics.typed(np.zeros(3, np.float16)).bits.dtype == np.uint16
    assert numerics.typed(np.zeros(3, np.int16)).dtype == "int16"
    assert numerics.typed(array) is array
