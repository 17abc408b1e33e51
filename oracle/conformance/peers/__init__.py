"""Adapters for public implementations, imported only when asked for and when the peer is installed.

    python -m oracle run --impl oracle.conformance.peers.onnx_reference:adapter
    python -m oracle run --impl oracle.conformance.peers.transformers_fallback:adapter
    TRITON_INTERPRET=1 python -m oracle run --impl oracle.conformance.peers.fla:adapter --device cpu --tier core

A peer with another convention is not wrong. What an adapter can map it maps, what it cannot it declares
unsupported, and what it would do in the peer's place (slots, padding rows, padded tails) it declares unsupported too,
since that would judge the adapter. Signatures of SGLang, vLLM and causal-conv1d are served the other way round, by
`triton_impl.compat`.
"""
