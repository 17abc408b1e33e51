"""SGLang's Triton functions, `sglang.kernels.ops.mamba.causal_conv1d_triton`.

Mapped: x and the pool are channel-first, so the peer gets transposed views; it wants the lengths on the host as well;
`num_accepted_tokens` is called num_accept_tokens. Not mapped: packed decode steps, which the peer does not have. The
sentinel, `pad_slot_id`, is the contract's own.

Only the one file is loaded. Of the rest of the package it asks whether the GPU has programmatic dependent launch,
which is answered as the package answers on NVIDIA's: from compute capability 9.0 on.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from benchmarks.peers import source
from benchmarks.peers.pooled import PooledAdapter
from oracle.contract import Unsupported

MODULES = (
    "sglang.kernels.ops.mamba.causal_conv1d_triton",
    "sglang.srt.layers.attention.mamba.causal_conv1d_triton",  # where releases before 0.5.20 have it
)
NO_PACKED_STEPS = "the peer's update takes no packed rows"


class Sglang(PooledAdapter):
    """The prefill's grid comes from the host's lengths, as in the engine without a block table."""

    name = "sglang-triton"
    denied: ClassVar = {
        "update:packed": NO_PACKED_STEPS,
        "relation:serving": NO_PACKED_STEPS,
        "relation:packed_steps": NO_PACKED_STEPS,
    }

    def __init__(self, device: str | None = None):
        import torch

        super().__init__(device)

        def is_arch_support_pdl() -> bool:
            return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9

        stand_ins = {"sglang.kernels.jit.utils": {"is_arch_support_pdl": is_arch_support_pdl}}
        try:
            self.peer = source.load(MODULES[0], stand_ins)
        except ImportError:
            self.peer = source.load(MODULES[1], stand_ins)
        self.version = source.version_of("sglang")

    def call(self, op, tensors, arrays, options):
        x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
        states, slots = tensors["conv_states"].transpose(1, 2), tensors["cache_indices"]
        more = {"activation": options.get("activation"), "pad_slot_id": options.get("pad_slot_id", -1)}
        if op == "causal_conv1d_fn":
            return self.peer.causal_conv1d_fn(
                x.t(), weight, bias, states, tensors["query_start_loc"],
                np.diff(arrays["query_start_loc"].data).tolist(), cache_indices=slots,
                has_initial_state=tensors["has_initial_state"], **more,
            ).t()  # fmt: skip
        if tensors.get("query_start_loc") is not None:
            raise Unsupported(f"query_start_loc: {NO_PACKED_STEPS}")
        out = self.peer.causal_conv1d_update(
            x if x.dim() == 2 else x.transpose(1, 2), states, weight, bias, conv_state_indices=slots,
            num_accept_tokens=tensors.get("num_accepted_tokens"), **more,
        )  # fmt: skip
        return out if x.dim() == 2 else out.transpose(1, 2)


def adapter(device: str | None = None):
    """The adapter."""
    return Sglang(device)
