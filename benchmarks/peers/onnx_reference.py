"""ONNX's reference of its CausalConvWithState operator: dense rows, channel-first, one dtype for all inputs.

The operator computes in the inputs' dtype and takes its numbers from NumPy, so 16-bit inputs other than float16 cannot
be handed to it; its definition leaves precision to the implementation.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import ClassVar

import numpy as np

from benchmarks.peers.dense import DenseAdapter
from oracle.contract import Unsupported
from oracle.numerics import TypedArray


class OnnxReference(DenseAdapter):
    """`past_state` of a row without one is left out; the state is the operator's `present_state`."""

    name = "onnx-reference"
    denied: ClassVar = {"*:bfloat16": "NumPy has no bfloat16", "dtypes:mixed": "the operator has one dtype"}

    def __init__(self) -> None:
        ops = importlib.import_module("onnx.reference.ops.op_causal_conv_with_state")
        self.run_operator = ops.CausalConvWithState._run
        self.version = version("onnx")

    def row(self, op, x, weight, bias, window, activation):
        if x.dtype == "bfloat16":
            raise Unsupported("x: NumPy has no bfloat16")
        past = None if window is None else window.data.T[None]
        out, present = self.run_operator(
            None, x.data.T[None], weight.data[:, None], None if bias is None else bias.data, past, activation
        )
        return TypedArray(x.dtype, np.ascontiguousarray(out[0].T)), TypedArray(x.dtype, present[0].T)


def adapter():
    """The adapter."""
    return OnnxReference()
