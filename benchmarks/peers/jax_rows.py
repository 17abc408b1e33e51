"""NumPy arguments to JAX arrays and back, for peers written in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oracle.numerics import TypedArray

if TYPE_CHECKING:
    import jax

WIDE = {
    f"*:{dtype}": "JAX has no 64-bit arrays unless jax_enable_x64 is set" for dtype in ("int64", "uint64")
}


def to_jax(array: TypedArray | None) -> jax.Array | None:
    """The array on the default device, or None."""
    import jax.numpy as jnp

    if array is None:
        return None
    return jnp.asarray(array.data.view(jnp.bfloat16) if array.dtype == "bfloat16" else array.data)


def to_typed(array: jax.Array) -> TypedArray:
    """The array's values with their dtype name."""
    data = np.asarray(array)
    name = data.dtype.name
    return TypedArray(name, data.view(np.uint16) if name == "bfloat16" else data)


def device_of(name: str | None) -> jax.Device:
    """The first device of a platform; "cuda" is JAX's "gpu"."""
    import jax

    return jax.devices({"cuda": "gpu"}.get(name, name or "cpu"))[0]
