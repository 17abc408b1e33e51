"""aiter's Triton functions, `aiter.ops.triton.conv.causal_conv1d`: SGLang's kernels and arguments, by an earlier name.

Mapped as for SGLang; the update writes over x, so it gets a copy. Only two files are loaded, the functions and their
kernels, with a logger that says nothing.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from benchmarks.peers import source
from benchmarks.peers.pooled import PooledAdapter
from benchmarks.peers.sglang import NO_PACKED_STEPS, Sglang
from oracle.contract import Unsupported

TAPS = "the peer refuses more than 4 taps"


class Silent:
    """Stands in for the package's logger."""

    def __getattr__(self, name):
        return lambda *args: None


class Aiter(PooledAdapter):
    """The prefill's grid comes from the host's lengths."""

    name = "aiter-triton"
    denied: ClassVar = {**Sglang.denied, "width:[5-8]": TAPS}

    def __init__(self, device: str | None = None):
        super().__init__(device)
        kernels = source.load("aiter.ops.triton._triton_kernels.conv.causal_conv1d")
        stand_ins = {
            kernels.__name__: vars(kernels),
            "aiter.ops.triton.utils.logger": {"AiterTritonLogger": Silent},
        }
        self.peer = source.load("aiter.ops.triton.conv.causal_conv1d", stand_ins)
        self.version = source.version_of("amd-aiter")

    def call(self, op, tensors, arrays, options):
        x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
        states, slots = tensors["conv_states"].transpose(1, 2), tensors["cache_indices"]
        if weight.shape[1] > 4:
            raise Unsupported(f"weight: {TAPS}")
        more = {"activation": options.get("activation"), "pad_slot_id": options.get("pad_slot_id", -1)}
        if op == "causal_conv1d_fn":
            rows = tensors["query_start_loc"], np.diff(arrays["query_start_loc"].data).tolist()
            given = dict(cache_indices=slots, has_initial_state=tensors["has_initial_state"])
            return self.peer.causal_conv1d_fn(x.t(), weight, bias, states, *rows, **given, **more).t()
        if tensors.get("query_start_loc") is not None:
            raise Unsupported(f"query_start_loc: {NO_PACKED_STEPS}")
        given = dict(
            conv_state_indices=slots, num_accepted_tokens=tensors.get("num_accepted_tokens"), bias=bias
        )
        mine = x.clone() if x.dim() == 2 else x.clone().transpose(1, 2)
        out = self.peer.causal_conv1d_update(mine, states, weight, **given, **more)
        return out if x.dim() == 2 else out.transpose(1, 2)


def adapter(device: str | None = None):
    """The adapter."""
    return Aiter(device)
