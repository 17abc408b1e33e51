"""vLLM's Triton functions, `vllm.model_executor.layers.mamba.ops.causal_conv1d`.

Mapped: x and the pool are channel-first, so the peer gets transposed views; its sentinel is `null_block_id`, which may
be any number; it wants slots and flags where the contract allows None, and gets the identity and all false; the update
gets an `out`, without which it writes over x. A prefill is planned on the host by the engine's own function.

Only the one file is loaded. What it takes from the package: constants and the planning function, which are read from
their own file; Triton; and whether the GPU has programmatic dependent launch, which is answered as the package answers
for CUDA: from compute capability 9.0 on. On a CPU the package would put other functions in the place of these.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.peers import source
from benchmarks.peers.pooled import PooledAdapter

MODULE = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
UTILS = "vllm.v1.attention.backends.utils"


class Platform:
    """A CUDA GPU, as far as the file asks."""

    @staticmethod
    def is_cpu() -> bool:
        return False

    @staticmethod
    def is_arch_support_pdl() -> bool:
        import torch

        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


class Vllm(PooledAdapter):
    """Metadata of a prefill are made for every call, as the engine does for every batch."""

    name = "vllm-triton"

    def __init__(self, device: str | None = None):
        import torch

        super().__init__(device)
        given = {
            "torch": torch,
            "np": np,
            "Any": Any,
            "np_to_pinned_tensor": torch.from_numpy,
            "PIN_MEMORY": False,
        }
        constants = ("PAD_SLOT_ID", "NULL_BLOCK_ID")
        utils = source.definitions(UTILS, (*constants, "compute_causal_conv1d_metadata"), given)
        triton = importlib.import_module("triton")
        self.plan = utils["compute_causal_conv1d_metadata"]
        self.peer = source.load(
            MODULE,
            {
                "vllm.platforms": {"current_platform": Platform},
                "vllm.triton_utils": {"triton": triton, "tl": importlib.import_module("triton.language")},
                UTILS: {name: utils[name] for name in constants},
            },
        )
        if self.interpreted:
            kernel = "_causal_conv1d_fwd_kernel"
            setattr(self.peer, kernel, GridSeesCopy(getattr(self.peer, kernel)))
        self.version = source.version_of("vllm")

    def call(self, op, tensors, arrays, options):
        import torch

        x, weight, bias = (tensors[name] for name in ("x", "weight", "bias"))
        states, slots, offsets = (
            tensors.get(name) for name in ("conv_states", "cache_indices", "query_start_loc")
        )
        batch = x.shape[0] if offsets is None else len(offsets) - 1
        if slots is None:
            slots = torch.arange(batch, dtype=torch.int32, device=self.device)
        states = states.transpose(1, 2)
        more = {"activation": options.get("activation"), "null_block_id": options.get("pad_slot_id", -1)}
        if op == "causal_conv1d_fn":
            has = tensors["has_initial_state"]
            if has is None:
                has = torch.zeros(batch, dtype=torch.bool, device=self.device)
            on_host = torch.from_numpy(arrays["query_start_loc"].data.astype(np.int32))
            fields = ("nums_dict", "batch_ptr", "token_chunk_offset_ptr")
            plan = SimpleNamespace(**dict(zip(fields, self.plan(on_host, device=self.device), strict=True)))
            return self.peer.causal_conv1d_fn(
                x.t(), weight, bias, states, offsets, cache_indices=slots, has_initial_state=has,
                metadata=plan, **more,
            ).t()  # fmt: skip
        if offsets is not None:
            longest = int(np.diff(arrays["query_start_loc"].data).max(initial=0))
            more |= {
                "query_start_loc": offsets,
                "max_query_len": max(longest, options.get("max_seqlen") or 0),
            }
        swapped = x.dim() == 3
        out = self.peer.causal_conv1d_update(
            x.transpose(1, 2) if swapped else x, states, weight, bias, conv_state_indices=slots,
            num_accepted_tokens=tensors.get("num_accepted_tokens"),
            out=torch.empty_like(x.transpose(1, 2) if swapped else x), **more,
        )  # fmt: skip
        return out.transpose(1, 2) if swapped else out


class GridSeesCopy:
    """A kernel in the interpreter, whose grid function may write to its dictionary of arguments.

    A device's launcher hands it a copy; the interpreter hands it the kernel's own arguments.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[lambda arguments: grid(dict(arguments))]


def adapter(device: str | None = None):
    """The adapter."""
    return Vllm(device)
