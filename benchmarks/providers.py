"""The contenders by name. No framework is imported here: `open_backend` does that, in its own process.

A backend module (torch_backend, jax_backend) turns a provider's name and a workload into a `Prepared` call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gate import Gate


class Missing(RuntimeError):
    """The provider's package is not installed here."""


class Unsupported(RuntimeError):
    """The provider cannot run this workload."""


class Prepared(NamedTuple):
    """A contender with its arguments on the device.

    Attributes:
      call: one call; state carries over from call to call, as in serving.
      answer: runs once on a fresh pool and returns (out, pool or None) as NumPy arrays, bfloat16 as uint16.
      chain: a program of `n` calls in one, for JAX, where there is no graph to capture; None elsewhere.
      note: what a reader must know of this contender here.
    """

    call: Callable[[], Any]
    answer: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    chain: Callable[[int], Callable[[], Any]] | None = None
    note: str = ""


class Provider(NamedTuple):
    """Attributes: name; framework; role "twin", "limit", "copy", "floor" or "peer"; gate rule; text for readers."""

    name: str
    framework: str
    role: str
    rule: str
    text: str


PROVIDERS = {
    p.name: p
    for p in (
        Provider("triton", "torch", "twin", Gate.RULE, "triton_impl, schedule auto"),
        Provider("triton_per_sequence", "torch", "twin", Gate.RULE, "triton_impl, schedule per_sequence"),
        Provider("triton_flat", "torch", "twin", Gate.RULE, "triton_impl, schedule flat"),
        Provider(
            "torch_limit", "torch", "limit", Gate.COPY_RULE, "a copy of as many bytes as the call must move"
        ),
        Provider("torch_copy", "torch", "copy", Gate.COPY_RULE, "out.copy_(x), of a prefill"),
        Provider(
            "torch_conv1d", "torch", "peer", Gate.PEER_RULE, "torch conv1d + silu, rows of equal length"
        ),
        Provider("causal_conv1d", "torch", "peer", Gate.PEER_RULE, "Dao-AILab/causal-conv1d, CUDA"),
        Provider("fla", "torch", "peer", Gate.PEER_RULE, "flash-linear-attention, Triton"),
        Provider("sglang", "torch", "peer", Gate.PEER_RULE, "SGLang, Triton"),
        Provider("vllm", "torch", "peer", Gate.PEER_RULE, "vLLM, Triton"),
        Provider("triton_empty", "torch", "floor", "", "an empty kernel through Triton's launcher"),
        Provider("torch_add", "torch", "floor", "", "add_ on one element"),
        Provider("pallas", "jax", "twin", Gate.RULE, "pallas_impl, schedule auto"),
        Provider("pallas_per_sequence", "jax", "twin", Gate.RULE, "pallas_impl, schedule per_sequence"),
        Provider("pallas_flat", "jax", "twin", Gate.RULE, "pallas_impl, schedule flat"),
        Provider(
            "jax_limit", "jax", "limit", Gate.COPY_RULE, "a copy of as many bytes as the call must move"
        ),
        Provider("jax_copy", "jax", "copy", Gate.COPY_RULE, "x into a fresh array, of a prefill"),
        Provider("jax_conv", "jax", "peer", Gate.PEER_RULE, "lax.conv_general_dilated, rows of equal length"),
        Provider("jax_shifted", "jax", "peer", Gate.PEER_RULE, "shifted multiply-adds under XLA"),
        Provider("sgl_jax", "jax", "peer", Gate.PEER_RULE, "sglang-jax short convolution"),
        Provider("jax_add", "jax", "floor", "", "x + 1 on one element"),
    )
}
LIMIT = {"torch": "torch_limit", "jax": "jax_limit"}
COPY = {"torch": "torch_copy", "jax": "jax_copy"}
FLOOR = {"torch": "triton_empty", "jax": "jax_add"}
TWIN = {"torch": "triton", "jax": "pallas"}
FRAMEWORKS = ("torch", "jax")


def open_backend(framework: str):
    """The backend of a framework, which this process must use alone."""
    if framework == "torch":
        from benchmarks.torch_backend import TorchBackend

        return TorchBackend()
    if framework == "jax":
        from benchmarks.jax_backend import JaxBackend

        return JaxBackend()
    raise ValueError(f"framework: expected one of {FRAMEWORKS}, got {framework!r}")
