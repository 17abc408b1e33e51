"""The convolution as a layer of torch.nn, dense batches, and the pool that serves it."""

from triton_impl.modules.conv import CausalConv1d
from triton_impl.modules.dense import dense_rows
from triton_impl.modules.pool import ConvStatePool, PoolExhausted

__all__ = ["CausalConv1d", "ConvStatePool", "PoolExhausted", "dense_rows"]
