"""The former place of `triton_impl.modules.ConvStatePool`."""

from triton_impl.modules.pool import ConvStatePool, PoolExhausted

__all__ = ["ConvStatePool", "PoolExhausted"]
