"""The convolution as a Flax linen module."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from pallas_impl.short_conv import short_conv


class ShortConv(nn.Module):
    """`pallas_impl.short_conv` with the parameters of a depthwise linen Conv: `kernel` [width, 1, dim] and `bias` [dim].

    Called with x and the arguments of `short_conv`, of which `cache`, `segment_ids` and `lengths` are arrays; returns
    ConvOutput(out, cache).
    """

    width: int
    use_bias: bool = True
    activation: str | None = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: Any, **options: Any) -> Any:
        """One convolution."""
        dim = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (self.width, 1, dim), self.param_dtype)
        bias = self.param("bias", self.bias_init, (dim,), self.param_dtype) if self.use_bias else None
        given = dict(activation=self.activation, backend=self.backend) | options
        return short_conv(x, kernel, bias, weight_layout="flax", **given)
