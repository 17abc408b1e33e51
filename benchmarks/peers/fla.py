"""flash-linear-attention's causal_conv1d and causal_conv1d_update, Triton backend.

Its cache has `width` columns, of which the first is spare; the adapter fills it with zero. Several tokens of a decode step
go through the prefill function, as its update takes one. On a CPU (TRITON_INTERPRET=1) Triton cannot measure, so that
every configuration of the autotuner counts as equally fast.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import ClassVar

from benchmarks.peers.dense import DenseAdapter
from benchmarks.peers.torch_rows import to_torch, to_typed
from oracle.contract import Unsupported

TRUNCATES = "Triton's interpreter cuts float32 to bfloat16 where a device rounds"


class Fla(DenseAdapter):
    """One sequence a call."""

    name = "fla"
    denied: ClassVar = {"dtypes:mixed": "the cache has the dtype of x"}

    def __init__(self, device: str | None = None):
        triton = importlib.import_module("triton")
        self.interpreted = triton.knobs.runtime.interpret
        if self.interpreted:
            tuner = triton.runtime.autotuner.Autotuner
            tuner.do_bench = lambda self, call, quantiles: [1.0, 1.0, 1.0]
        self.ops = importlib.import_module("fla.modules.causal_conv1d.ops")  # after that, since it tunes
        self.version = version("fla-core")
        self.device = device or ("cpu" if self.interpreted else "cuda")

    def capabilities(self):
        stated = dict(super().capabilities())
        if self.interpreted:
            stated["unsupported"] = {**stated["unsupported"], "*:bfloat16": TRUNCATES}
        return {**stated, "device": self.device}

    def row(self, op, x, weight, bias, window, activation):
        import torch

        if self.interpreted and x.dtype == "bfloat16":
            raise Unsupported(f"x: {TRUNCATES}")
        tokens, dim = x.shape
        width = weight.shape[1]
        inputs, taps = to_torch(x).to(self.device), to_torch(weight).to(self.device)
        b = None if bias is None else to_torch(bias).to(self.device)
        kept = None if window is None else to_torch(window)
        state = None
        if kept is not None:
            state = torch.zeros(1, dim, width, dtype=kept.dtype)
            state[0, :, 1:] = kept.T
            state = state.to(self.device)
        if op == "causal_conv1d_update" and tokens == 1:
            out, state = self.ops.causal_conv1d_update(
                inputs, state, weight=taps, bias=b, activation=activation
            )
        else:
            out, state = self.ops.causal_conv1d(
                inputs[None], taps, b, initial_state=state, output_final_state=True, activation=activation
            )
        return to_typed(out.reshape(tokens, dim)), to_typed(state[0, :, 1:].T)


def adapter(device: str | None = None):
    """The adapter."""
    return Fla(device)
