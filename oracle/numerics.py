"""Number formats: rounding to float32, float16 and bfloat16 by integer arithmetic, ulps, fma and SiLU.

Nothing here knows about convolution. NumPy has no bfloat16, so an array of it travels as its bits: a
`TypedArray` is a dtype name and the storage (uint16 for bfloat16, the array itself otherwise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from oracle.contract import dtype_name


class Format(NamedTuple):
    """A binary floating-point format: `fraction` explicit bits, normal exponents `emin..emax`."""

    fraction: int
    emin: int
    emax: int
    bits: Any  # unsigned integer type of the same size


FORMATS = {
    "float32": Format(23, -126, 127, np.uint32),
    "float16": Format(10, -14, 15, np.uint16),
    "bfloat16": Format(7, -126, 127, np.uint16),
}
UNIT_ROUNDOFF_FLOAT32 = 2.0**-24
SMALLEST_NORMAL_FLOAT32 = 2.0**-126


@dataclass(frozen=True)
class TypedArray:
    """An array with its dtype by name; bfloat16 is stored as its uint16 bits.

    Attributes:
      dtype: "float32", "float16", "bfloat16", "bool" or the name of an integer dtype.
      data: the storage; for every dtype but bfloat16 an ordinary NumPy array of that dtype.
    """

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def bits(self) -> np.ndarray:
        """The storage of a float array as unsigned integers."""
        return self.data.view(FORMATS[self.dtype].bits)

    def values(self) -> np.ndarray:
        """A float array as float64, exactly."""
        return to_float64(self.bits, self.dtype)

    def copy(self) -> TypedArray:
        return TypedArray(self.dtype, self.data.copy())


def storage_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype that stores a dtype name: uint16 for bfloat16, itself otherwise."""
    return np.dtype(np.uint16 if dtype == "bfloat16" else dtype)


def typed(array: Any) -> TypedArray:
    """Takes a TypedArray, a NumPy array, or an array of an extension type named bfloat16."""
    if isinstance(array, TypedArray):
        return array
    array = np.asarray(array)
    name = dtype_name(array.dtype)
    return TypedArray(name, array.view(np.uint16) if name == "bfloat16" else array)


def from_bits(bits: np.ndarray, dtype: str) -> TypedArray:
    """The float array with these bits."""
    return TypedArray(dtype, bits if dtype == "bfloat16" else bits.view(dtype))


def to_float64(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of a float format as float64, exactly."""
    if dtype == "bfloat16":
        bits, dtype = bits.astype(np.uint32) << 16, "float32"
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return bits.view(dtype).astype(np.float64)


def round_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float64 values once, to nearest even, and returns the bits of `dtype`.

    Overflow gives infinity. A NaN keeps its sign and the top of its payload and becomes quiet.
    """
    fraction, emin, emax, storage = FORMATS[dtype]
    raw = np.ascontiguousarray(values, dtype=np.float64).view(np.uint64)
    exponent = ((raw >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64) - 1023
    significand = (raw & np.uint64(2**52 - 1)) | np.uint64(2**52)  # float64 subnormals round to 0 anyway

    shift = np.minimum(52 - fraction + np.maximum(emin - exponent, 0), 54).astype(np.uint64)
    kept = significand >> shift
    rest = significand - (kept << shift)
    half = np.uint64(1) << (shift - np.uint64(1))
    kept += (rest > half) | ((rest == half) & (kept & np.uint64(1) == 1))
    # `kept` holds the leading one, which the exponent field absorbs; a carry moves up by itself.
    magnitude = (np.maximum(exponent - emin, 0).astype(np.uint64) << np.uint64(fraction)) + kept

    infinity = np.uint64((emax - emin + 2) << fraction)
    magnitude = np.minimum(np.where(exponent > emax, infinity, magnitude), infinity)
    payload = (raw & np.uint64(2**52 - 1)) >> np.uint64(52 - fraction)
    nan = infinity | payload | np.uint64(1 << (fraction - 1))
    magnitude = np.where(np.isnan(values), nan, magnitude)
    sign = (raw >> np.uint64(63)) << np.uint64(8 * np.dtype(storage).itemsize - 1)
    return (sign | magnitude).astype(storage).reshape(np.shape(values))


def rounded(values: np.ndarray, dtype: str) -> TypedArray:
    """`round_bits` as a typed array."""
    return from_bits(round_bits(values, dtype), dtype)


def cast_bits(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Bits of one format as bits of another: a plain copy when they are the same, else one rounding."""
    return bits.copy() if source == target else round_bits(to_float64(bits, source), target)


def ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """The distance, in float64, between neighbours of `dtype` at the size of `values`."""
    fraction, emin, emax, _ = FORMATS[dtype]
    magnitude = np.abs(np.asarray(values, dtype=np.float64))
    _, exponent = np.frexp(np.where(np.isfinite(magnitude), magnitude, 1.0))
    exponent = np.where(magnitude == 0, emin, exponent - 1)
    return np.ldexp(1.0, np.clip(exponent, emin, emax) - fraction)


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many representable steps lie between two arrays of bits; +0 and -0 are one point."""

    def ordered(bits: np.ndarray) -> np.ndarray:
        width = 8 * bits.dtype.itemsize
        wide = bits.astype(np.int64)
        sign = wide >> (width - 1)
        magnitude = wide & ((1 << (width - 1)) - 1)
        return np.where(sign == 1, -magnitude, magnitude)

    return np.abs(ordered(a) - ordered(b))


def is_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Where bits of a float format are NaN."""
    fraction, emin, emax, storage = FORMATS[dtype]
    magnitude = bits & storage((1 << (8 * np.dtype(storage).itemsize - 1)) - 1)
    return magnitude > storage((emax - emin + 2) << fraction)


def fma_float32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a * b + c` of float32 arrays with one rounding to float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)  # exact: 24 + 24 bits fit into 53
        addend = c.astype(np.float64)
        total = product + addend
        # float64 may round this sum. Knuth's TwoSum gives what it lost; moving the sum to its odd neighbour
        # ("round to odd") makes the second rounding, to float32, behave as if it were the only one.
        back = total - product
        lost = (product - (total - back)) + (addend - back)
        inexact = np.isfinite(total) & (lost != 0) & (total.view(np.int64) & 1 == 0)
        odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(np.float32)


def silu(z: np.ndarray) -> np.ndarray:
    """`z / (1 + exp(-z))` in float64, without overflow; its limit at minus infinity is 0."""
    z = np.asarray(z, dtype=np.float64)
    decay = np.exp(-np.abs(z))
    with np.errstate(invalid="ignore"):
        positive = z / (1.0 + decay)
        negative = np.where(np.isneginf(z), -0.0, z * decay / (1.0 + decay))
    return np.where(z < 0, negative, positive)
