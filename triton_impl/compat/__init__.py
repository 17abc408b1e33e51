"""Drop-in adapters with the exact signatures of SGLang, vLLM, causal-conv1d and flash-linear-attention.

    from triton_impl.compat.sglang import causal_conv1d_fn, causal_conv1d_update

or, without touching the program that imports the peer,

    import triton_impl.compat
    triton_impl.compat.install("causal_conv1d")

Peers' layouts become views of ours, never copies, but where a docstring says so. Every argument is honoured or
refused. Importing this package patches nothing.
"""

from triton_impl.compat.install import PEERS, install, uninstall
from triton_impl.compat.layout import validated

__all__ = ["PEERS", "install", "uninstall", "validated"]
