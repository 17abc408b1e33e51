"""Arrays as JSON: floats by their bits, integers by value. The same form in vectors and in the process protocol.

    {"dtype": "bfloat16", "shape": [2, 2], "bits": "3f80 4000 4040 4080"}      {"dtype": "int32", "shape": [3], "values": [0, 1, 2]}

Row-major order; a float is as many hexadecimal digits as its size asks for, most significant first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle.numerics import FORMATS, TypedArray, from_bits, storage_dtype


def encode(array: TypedArray | None) -> dict[str, Any] | None:
    """An array as JSON-ready data."""
    if array is None:
        return None
    head = {"dtype": array.dtype, "shape": list(array.shape)}
    if array.dtype not in FORMATS:
        return {**head, "values": array.data.reshape(-1).tolist()}
    bits = np.ascontiguousarray(array.bits).reshape(-1)
    return {**head, "bits": " ".join(f"{b:0{2 * bits.itemsize}x}" for b in bits.tolist())}


def decode(data: Mapping[str, Any] | None) -> TypedArray | None:
    """The array of `encode`.

    Raises:
      ValueError: a missing or unknown field, or elements that do not fill the shape.
    """
    if data is None:
        return None
    if not isinstance(data, Mapping) or "dtype" not in data or "shape" not in data:
        raise ValueError(
            f"array: expected an object with dtype, shape and bits or values, got {str(data)[:60]}"
        )
    dtype, shape = data["dtype"], tuple(data["shape"])
    try:
        if dtype in FORMATS:
            words = data["bits"].split()
            digits = 2 * storage_dtype(dtype).itemsize
            if any(len(word) != digits for word in words):
                raise ValueError(f"array: expected bits in words of {digits} hexadecimal digits for {dtype}")
            bits = np.array([int(word, 16) for word in words], dtype=FORMATS[dtype].bits)
            return from_bits(bits.reshape(shape), dtype)
        return TypedArray(dtype, np.array(data["values"], dtype=storage_dtype(dtype)).reshape(shape))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"array: {type(error).__name__}: {error} in an array of {dtype} {list(shape)}"
        ) from error
