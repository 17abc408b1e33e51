"""causal-conv1d (CUDA): `causal_conv1d_fn` and `causal_conv1d_update`, one adapter each.

The prefill takes dense rows, so each live row is one call with its initial state, and windows are gathered and stored by
the adapter. x is token-major, which the peer calls channel-last and restricts to multiples of 8 channels; other widths go
to it channel-first, where it takes no initial state.

The update knows slots: any negative one is padding, so the contract's sentinel is given as -1. Indices must be int32 and
dense. The peer keeps its window at the end of a slot, the contract at the front: slots with spare columns are not mapped.
"""

from __future__ import annotations

import importlib
from typing import ClassVar

from benchmarks.peers.dense import DenseAdapter
from benchmarks.peers.pooled import PooledAdapter
from benchmarks.peers.source import version_of
from benchmarks.peers.torch_rows import to_torch, to_typed
from oracle.contract import Unsupported

ONE_DTYPE = "states have the dtype of x, the bias that of the weight"
NO_PACKED_STEPS = "the peer's update takes no packed rows and no counts"


class Prefill(DenseAdapter):
    """One row a call."""

    name = "causal-conv1d fn"
    denied: ClassVar = {
        "dtypes:mixed": ONE_DTYPE,
        "op:causal_conv1d_update": "judged by the other adapter",
    }

    def __init__(self, device: str | None = None):
        self.peer = importlib.import_module("causal_conv1d")
        self.version = version_of("causal-conv1d")
        self.device = device or "cuda"

    def capabilities(self):
        return {**super().capabilities(), "device": self.device}

    def row(self, op, x, weight, bias, window, activation):
        import torch

        if op == "causal_conv1d_update":
            raise Unsupported(f"op: {self.denied['op:causal_conv1d_update']}")
        inputs, taps = to_torch(x).to(self.device).T[None], to_torch(weight).to(self.device)
        if x.shape[1] % 8:
            inputs = torch.empty(inputs.shape, dtype=inputs.dtype, device=self.device).copy_(inputs)
        out, new = self.peer.causal_conv1d_fn(
            inputs, taps, None if bias is None else to_torch(bias).to(self.device),
            initial_states=None if window is None else to_torch(window).to(self.device).T[None],
            return_final_states=True, activation=activation,
        )  # fmt: skip
        return to_typed(out[0].T), to_typed(new[0].T)


class Update(PooledAdapter):
    """The whole step in one call."""

    name = "causal-conv1d update"
    in_triton = False
    denied: ClassVar = {
        "op:causal_conv1d_fn": "judged by the other adapter",
        "relation:*": "relations need both operations",
        "dtypes:mixed": ONE_DTYPE,
        "state_len:wider": "the peer's window is at the other end of a slot",
        "update:packed": NO_PACKED_STEPS,
        "update:rolling": NO_PACKED_STEPS,
    }

    def __init__(self, device: str | None = None):
        self.peer = importlib.import_module("causal_conv1d")
        super().__init__(device)
        self.version = version_of("causal-conv1d")

    def call(self, op, tensors, arrays, options):
        import torch

        if op == "causal_conv1d_fn":
            raise Unsupported(f"op: {self.denied['op:causal_conv1d_fn']}")
        if tensors.get("query_start_loc") is not None or tensors.get("num_accepted_tokens") is not None:
            raise Unsupported(f"query_start_loc, num_accepted_tokens: {NO_PACKED_STEPS}")
        x, slots = tensors["x"], tensors["cache_indices"]
        if slots is not None:
            slots = torch.where(slots == options.get("pad_slot_id", -1), -1, slots).to(torch.int32)
        out = self.peer.causal_conv1d_update(
            x if x.dim() == 2 else x.transpose(1, 2), tensors["conv_states"].transpose(1, 2),
            tensors["weight"], tensors["bias"], options.get("activation"), conv_state_indices=slots,
        )  # fmt: skip
        return out if x.dim() == 2 else out.transpose(1, 2)


def prefill(device: str | None = None):
    """The adapter of `causal_conv1d_fn`."""
    return Prefill(device)


def update(device: str | None = None):
    """The adapter of `causal_conv1d_update`."""
    return Update(device)
