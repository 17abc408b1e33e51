"""jax-linear-attention's `ShortConv`, `jla.layers.conv`, on its plain JAX path.

It takes dense batches and a state of width-1 inputs, so each live row is a batch of one. Only the one file is loaded. Its
Mosaic GPU kernels are not judged: they take whole layers on a Hopper GPU.
"""

from __future__ import annotations

import functools
from typing import ClassVar

from benchmarks.peers import source
from benchmarks.peers.dense import DenseAdapter
from benchmarks.peers.jax_rows import device_of, to_jax, to_typed


class Jla(DenseAdapter):
    """One row a call, jitted."""

    name = "jla"
    denied: ClassVar = {"dtypes:mixed": "the state has the dtype of x"}

    def __init__(self, device: str | None = None):
        import jax

        self.device = device_of(device)
        self.peer = source.load("jla.layers.conv")
        self.version = source.version_of("jax-linear-attention")
        self.call = functools.partial(jax.jit, static_argnames="activation")(self._call)

    def _call(self, x, weight, bias, state, activation):
        import equinox

        dim, width = weight.shape
        layer = self.peer.ShortConv(dim, width, activation=activation, use_bias=bias is not None, axis=None)
        layer = equinox.tree_at(lambda conv: conv.weight, layer, weight)
        if bias is not None:
            layer = equinox.tree_at(lambda conv: conv.bias, layer, bias)
        return layer(x[None], state=None if state is None else state[None])

    def capabilities(self):
        return {**super().capabilities(), "device": self.device.device_kind}

    def row(self, op, x, weight, bias, window, activation):
        import jax

        with jax.default_device(self.device):
            arrays = [to_jax(array) for array in (x, weight, bias, window)]
            out, state = self.call(*arrays, activation is not None)
        return to_typed(out[0]), to_typed(state[0])


def adapter(device: str | None = None):
    """The adapter."""
    return Jla(device)
