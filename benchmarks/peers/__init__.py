"""Adapters for public implementations, imported only when asked for and when the peer is installed.

    python -m benchmarks.peers -o FOLDER          # judge those that are installed
    python -m oracle run --impl benchmarks.peers.onnx_reference:adapter

A peer with another convention is not wrong. What an adapter can map it maps, what it cannot it declares
unsupported, and what it would do in the peer's place (slots, padding rows, padded tails) it declares unsupported too,
since that would judge the adapter. Signatures of SGLang, vLLM and causal-conv1d are served the other way round, by
`triton_impl.compat`.
"""
