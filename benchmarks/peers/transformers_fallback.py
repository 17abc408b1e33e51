"""The torch fallback that transformers uses where no kernel package is installed (functions of Qwen3-Next's model).

Its cache has `width` columns; the adapter puts a zero before the window, which the convolution never uses, and takes
the last width-1 back. A prefill that continues is what the model does then: window and tokens go through the prefill
function together, and the outputs of the window are dropped.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import ClassVar

from benchmarks.peers.dense import DenseAdapter
from benchmarks.peers.torch_rows import to_torch, to_typed


class TransformersFallback(DenseAdapter):
    """`conv_state` of one request, in the dtype of its inputs."""

    name = "transformers-fallback"
    denied: ClassVar = {"dtypes:mixed": "the model has one dtype"}

    def __init__(self) -> None:
        self.model = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
        self.version = version("transformers")

    def row(self, op, x, weight, bias, window, activation):
        import torch

        tokens, dim = x.shape
        width = weight.shape[1]
        inputs, taps, b = to_torch(x).T[None], to_torch(weight), to_torch(bias)
        state = torch.zeros(1, dim, width, dtype=inputs.dtype)
        if window is not None:
            state[0, :, 1:] = to_torch(window).T
        if op == "causal_conv1d_update":
            out = self.model.causal_conv1d_update(inputs, state, taps, b, activation)
        else:
            history = state[:, :, 1:] if window is not None else inputs[:, :, :0]
            whole = torch.cat([history, inputs], dim=-1)
            out = self.model.causal_conv1d_fn(whole, taps, b, activation)[:, :, -tokens:]
            state = torch.cat([state, inputs], dim=-1)[:, :, -width:]
        return to_typed(out[0].T), to_typed(state[0, :, 1:].T)


def adapter():
    """The adapter."""
    return TransformersFallback()
