"""The contract on top of functions of torch that know packed rows, slots and padding themselves.

Arguments reach the peer as views of the case's own memory, so that strides, and what surrounds an argument, are its to
handle. What a peer leaves uninitialised is filled with NaN, and so is seen.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from benchmarks.peers.torch_rows import base_of, to_typed
from oracle import contract
from oracle.conformance.arrays import Array
from oracle.contract import Unsupported

TRUSTS = "the peer trusts slots and offsets, so a bad one would reach memory of the judge; not run"
TRUNCATES = "Triton's interpreter cuts float32 to bfloat16 where a device rounds"
DENIED = {
    "expect:error": "the peer checks arguments by its own rules",
    "expect:undefined": TRUSTS,
    "rows:out_of_range": TRUSTS,
    "conv_states:none": "the peer needs a pool",
    "width:1": "the peer has no empty state",
    "validate:True": "the peer has no such option",
}


class PooledAdapter:
    """Hands the arguments of a call to `call`, and returns what is in the case's memory afterwards."""

    name, version = "", ""
    denied: ClassVar[Mapping[str, str]] = {}
    promises: ClassVar[Mapping[str, Any]] = {"bit_exact": False, "path_invariant": False}
    in_triton = True

    def __init__(self, device: str | None = None):
        import torch

        self.interpreted = self.in_triton and importlib.import_module("triton").knobs.runtime.interpret
        self.device = device or ("cpu" if self.interpreted else "cuda")
        torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public one imports the compiler
        torch.utils.deterministic.fill_uninitialized_memory = True

    def capabilities(self) -> Mapping[str, Any]:
        import torch

        unsupported = {**DENIED, **self.denied} | ({"*:bfloat16": TRUNCATES} if self.interpreted else {})
        device = self.device + (", Triton interpreted" if self.interpreted else "")
        if self.device.startswith("cuda"):
            device = torch.cuda.get_device_name(self.device)
        return {"device": device, **self.promises, "unsupported": unsupported}

    def call(
        self, op: str, tensors: Mapping[str, Any], arrays: Mapping[str, Array], options: Mapping[str, Any]
    ):
        """One call of the peer, which updates `tensors["conv_states"]`; returns out in the layout of x.

        Args:
          op: the operation.
          tensors: views on the device, by the contract's names; an absent argument is None.
          arrays: the same on the host, for what an engine knows there.
          options: the contract's, all of them valid.
        """
        raise NotImplementedError

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        import torch

        self._check(op, arrays, options)
        bases = {name: None if a is None else base_of(a, self.device) for name, a in arrays.items()}
        tensors = {
            name: None if a is None else bases[name].as_strided(a.shape, a.strides, a.offset)
            for name, a in arrays.items()
        }
        try:
            out = self.call(op, tensors, arrays, options)
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
        except RuntimeError as error:
            if not any(text in str(error) for text in ("CUDA error", "Triton Error [CUDA]")):
                raise
            print(error, file=sys.stderr, flush=True)
            os._exit(70)  # a fault leaves no usable context: this case crashed, the next gets a new process
        memory = {
            name: to_typed(bases[name]).data for name, a in arrays.items() if a is not None and not a.sparse
        }
        return {"out": to_typed(out), "conv_states": to_typed(tensors["conv_states"]), "memory": memory}

    def _check(self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]) -> None:
        try:
            sizes = contract.RECORDS[op](**arrays, **options).check()
        except (ValueError, TypeError) as error:
            raise Unsupported(f"arguments: {error}") from error
        if options.get("validate"):
            raise Unsupported("validate: the peer has no such option")
        if arrays["conv_states"] is None:
            raise Unsupported(f"conv_states: {DENIED['conv_states:none']}")
        if sizes.width == 1:
            raise Unsupported(f"weight: {DENIED['width:1']}")
        if self.interpreted and any(a is not None and a.dtype == "bfloat16" for a in arrays.values()):
            raise Unsupported(f"dtypes: {TRUNCATES}")
        if self.denied.get("dtypes:mixed") and len(used_dtypes(arrays)) > 1:
            raise Unsupported(f"dtypes: {self.denied['dtypes:mixed']}")
        if self.denied.get("state_len:wider") and sizes.state_len != sizes.width - 1:
            raise Unsupported(f"conv_states: {self.denied['state_len:wider']}")
        pad = options.get("pad_slot_id", -1)
        slots = arrays["cache_indices"].data.tolist() if arrays["cache_indices"] is not None else []
        live = [slot for slot in slots if slot != pad]
        if any(not 0 <= slot < sizes.num_slots for slot in live):
            raise Unsupported(f"cache_indices: {TRUSTS}")
        if arrays.get("query_start_loc") is not None:
            offsets = arrays["query_start_loc"].data.tolist()
            if offsets[0] != 0 or offsets != sorted(offsets) or offsets[-1] > sizes.tokens:
                raise Unsupported(f"query_start_loc: {TRUSTS}")


def used_dtypes(arrays: Mapping[str, Array | None]) -> set[str]:
    """Dtypes of the floating-point arguments."""
    return {a.dtype for n in ("x", "weight", "bias", "conv_states") if (a := arrays.get(n)) is not None}
