"""The convolution as a layer of Flax (`pallas_impl.modules.nnx`, `linen`) and of Equinox (`pallas_impl.modules.equinox`).

Each needs its own package (`pip install 'twinconv[flax]'`, `'twinconv[equinox]'`); nothing here imports either.
"""

from pallas_impl.modules.layer import load_weight

__all__ = ["load_weight"]
