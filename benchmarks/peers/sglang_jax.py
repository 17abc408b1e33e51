"""sglang-jax's `short_convolution`, in `sgl_jax.srt.layers.attention.linear.short_convolution`.

It takes packed rows and a cache of one window a row, [rows, dim, width - 1]; slots are its caller's, and so the adapter
gathers and stores windows. A row without state gets zeros, as the function's text asks. Decode steps of one token go
through its decode path, longer ones through its extend path.

Only the one file is loaded, with `ForwardMode` from its own file.
"""

from __future__ import annotations

import enum
import itertools
from typing import ClassVar

import numpy as np

from benchmarks.peers import source
from benchmarks.peers.dense import DenseAdapter
from benchmarks.peers.jax_rows import device_of, to_jax, to_typed

PACKAGE = "sgl_jax.srt"
BATCH = f"{PACKAGE}.model_executor.forward_batch_info"


class SglangJax(DenseAdapter):
    """All live rows in one jitted call."""

    name = "sglang-jax"
    denied: ClassVar = {"dtypes:mixed": "the model has one dtype"}

    def __init__(self, device: str | None = None):
        import jax

        self.device = device_of(device)
        given = {"IntEnum": enum.IntEnum, "auto": enum.auto}
        self.mode = source.definitions(BATCH, ("ForwardMode",), given)["ForwardMode"]
        source.load(f"{PACKAGE}.utils.profiling_utils")
        peer = source.load(
            f"{PACKAGE}.layers.attention.linear.short_convolution", {BATCH: {"ForwardMode": self.mode}}
        )
        self.call = jax.jit(peer.short_convolution, static_argnames=("forward_mode", "activation"))
        self.version = source.version_of("sglang-jax")

    def capabilities(self):
        return {**super().capabilities(), "device": self.device.device_kind}

    def rows(self, op, parts, weight, bias, windows, activation):
        import jax
        import jax.numpy as jnp

        if not parts:
            return []
        width = weight.shape[1]
        lengths = [part.shape[0] for part in parts]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        decode = op == "causal_conv1d_update" and set(lengths) == {1}
        with jax.default_device(self.device):
            x = jnp.concatenate([to_jax(part) for part in parts])
            empty = jnp.zeros((width - 1, x.shape[1]), x.dtype)
            cache = jnp.stack([empty if window is None else to_jax(window) for window in windows])
            out, new = self.call(
                x, to_jax(weight), cache.swapaxes(1, 2), jnp.asarray(offsets, jnp.int32),
                forward_mode=self.mode.DECODE if decode else self.mode.EXTEND, bias=to_jax(bias),
                activation=activation,
            )  # fmt: skip
            outs = [to_typed(out[start:stop]) for start, stop in itertools.pairwise(offsets)]
            return [(y, to_typed(state.T)) for y, state in zip(outs, new, strict=True)]


def adapter(device: str | None = None):
    """The adapter."""
    return SglangJax(device)
