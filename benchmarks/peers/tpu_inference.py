"""tpu-inference's `ragged_conv1d` in plain JAX, `tpu_inference.layers.common.ragged_conv1d_jax`.

Mapped: the weight is [dim, 1, width]; slots and flags are required, and get the identity and all false where the
contract allows None; `distribution` says how many rows are decode steps: all of them in an update of one token, none
elsewhere. Not mapped: padding rows, which the peer has at the end of a batch and tells by their number; the activation,
which is its caller's; states of another dtype than x. JAX has no strides.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from benchmarks.peers import source
from benchmarks.peers.jax_rows import WIDE, device_of, to_jax, to_typed
from oracle import contract
from oracle.contract import Unsupported
from oracle.numerics import TypedArray

MODULE = "tpu_inference.layers.common.ragged_conv1d_jax"
TRUSTS = "the peer trusts slots and offsets"
BY_COUNT = "the peer tells padding rows by their number, at the end of the batch"
CALLER = "the activation is the peer's caller's"
DENIED = {
    "expect:error": "the peer checks arguments by its own rules",
    "expect:undefined": TRUSTS,
    "rows:out_of_range": TRUSTS,
    "rows:padding": BY_COUNT,
    "relation:add_padding": BY_COUNT,
    "relation:chain": BY_COUNT,
    "relation:serving": BY_COUNT,
    "activation:s*": CALLER,
    "conv_states:none": "the peer needs a pool",
    "state_len:wider": "the peer's slots have no spare columns",
    "dtypes:mixed": "the model has one dtype",
    "tier:large": "JAX arrays have no pitches",
    "validate:True": "the peer has no such option",
    "width:1": "the peer has no empty state",
    "update:rolling": "the peer has one window a slot",
    **WIDE,
}


class TpuInference:
    """Packed rows and slots are the peer's."""

    name = "tpu-inference-jax"
    promises: ClassVar = {"bit_exact": False, "path_invariant": False}

    def __init__(self, device: str | None = None):
        self.device = device_of(device)
        self.peer = source.load(MODULE)
        self.version = source.version_of("tpu-inference")

    def capabilities(self):
        return {"device": self.device.device_kind, **self.promises, "unsupported": DENIED}

    def run(self, op, arrays, options):
        import jax
        import jax.numpy as jnp

        values: dict[str, Any] = {name: None if a is None else a.typed for name, a in arrays.items()}
        sizes = self._check(op, arrays, values, options)
        x, pool = values["x"], values["conv_states"]
        offsets, slots, has = (
            values.get(name) for name in ("query_start_loc", "cache_indices", "has_initial_state")
        )
        rows = TypedArray(x.dtype, x.data.reshape(-1, sizes.dim))
        if offsets is None:
            offsets = TypedArray("int32", np.arange(sizes.batch + 1, dtype=np.int32) * sizes.seqlen)
        if slots is None:
            slots = TypedArray("int32", np.arange(sizes.batch, dtype=np.int32))
        if has is None:
            has = TypedArray("bool", np.full(sizes.batch, op == "causal_conv1d_update"))
        decodes = sizes.batch if op == "causal_conv1d_update" and sizes.seqlen == 1 else 0
        with jax.default_device(self.device):
            out, states = self.peer.ragged_conv1d(
                to_jax(rows), to_jax(pool), to_jax(values["weight"])[:, None], to_jax(values["bias"]),
                to_jax(offsets), to_jax(slots), jnp.asarray([decodes, decodes, sizes.batch], jnp.int32),
                to_jax(has), kernel_size=sizes.width,
            )  # fmt: skip
            return {"out": to_typed(out.reshape(x.shape)), "conv_states": to_typed(states)}

    def _check(self, op, arrays, values, options):
        try:
            sizes = contract.RECORDS[op](**values, **options).check()
        except (ValueError, TypeError) as error:
            raise Unsupported(f"arguments: {error}") from error
        pool, slots = values["conv_states"], values["cache_indices"]
        found = {
            "validate:True": options.get("validate"),
            "activation:s*": options.get("activation"),
            "conv_states:none": pool is None,
            "width:1": sizes.width == 1,
            "state_len:wider": pool is not None and sizes.state_len != sizes.width - 1,
            "update:rolling": values.get("num_accepted_tokens") is not None,
            "dtypes:mixed": len({values[n].dtype for n in ("x", "weight", "bias", "conv_states") if values[n]}) > 1,
            "*:int64": any(a and a.dtype in ("int64", "uint64") for a in values.values()),
            "tier:large": any(a and a.sparse for a in arrays.values()),
            "rows:padding": slots and not ((slots.data >= 0) & (slots.data < sizes.num_slots)).all(),
        }  # fmt: skip
        for feature, present in found.items():
            if present:
                raise Unsupported(f"{feature}: {DENIED[feature]}")
        if slots and options.get("pad_slot_id", -1) in slots.data:
            raise Unsupported(f"rows:padding: {BY_COUNT}")
        return sizes


def adapter(device: str | None = None):
    """The adapter."""
    return TpuInference(device)
