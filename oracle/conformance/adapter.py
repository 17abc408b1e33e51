"""What an implementation writes to be judged: an object with `name`, `version`, `capabilities()` and `run()`.

    class Mine:
        name, version = "mine", "1.0"
        def capabilities(self):
            return {"unsupported": {"width:5": "at most four taps"}}
        def run(self, op, arrays, options):
            result = my_functions[op](**{k: a and to_mine(a) for k, a in arrays.items()}, **options)
            return {"out": to_typed(result.out), "conv_states": to_typed(result.conv_states)}

`arrays` maps every array argument of the contract's signature to an `arrays.Array` or None; `options` holds
the keyword-only arguments that a case sets. Errors of the contract (ValueError, TypeError, Unsupported) are
raised as they are.
"""

from __future__ import annotations

import importlib
import inspect
import shlex
from collections.abc import Mapping
from typing import Any, Protocol

from oracle import reference
from oracle.conformance.arrays import Array
from oracle.contract import CONTRACT_VERSION

OPS = ("causal_conv1d_fn", "causal_conv1d_update")
ARRAY_ARGUMENTS = {
    "causal_conv1d_fn": (
        "x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state",
    ),
    "causal_conv1d_update": (
        "x", "weight", "bias", "conv_states", "cache_indices", "query_start_loc", "num_accepted_tokens",
    ),
}  # fmt: skip


class Adapter(Protocol):
    """The plug-in protocol.

    Attributes:
      name: of the implementation, as reports show it.
      version: of the implementation.
    """

    name: str
    version: str

    def capabilities(self) -> Mapping[str, Any]:
        """What it cannot do, and what it promises beyond values.

        Keys, all optional:
          unsupported: feature pattern -> reason. Features are strings such as "width:5", "x:bfloat16" or
            "conv_states.layout:pages"; `python -m oracle list --features` prints them. Patterns may hold *.
            Whatever is not denied is claimed.
          bit_exact: True if float32 sums follow the contract's order, so that 16-bit linear outputs must
            match in every bit and 16-bit SiLU outputs within 1 ulp. Default True.
          path_invariant: True if splitting, chaining and batching never change a bit. Default True.
          device: what it runs on, for the report.
        """

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Runs one call.

        Args:
          op: "causal_conv1d_fn" or "causal_conv1d_update".
          arrays: the array arguments, every name of the signature.
          options: the keyword-only arguments that the case sets.

        Returns:
          "out": a TypedArray, or a NumPy array of x's dtype.
          "conv_states": the same, or None without a pool.
          "memory" (optional): argument name -> its whole base buffer after the call, for an implementation
            that works on a copy of it (a device). Without it the buffers in `arrays` are inspected.
        """


class NumpyAdapter:
    """An adapter for functions with the contract's signatures that take NumPy arrays or TypedArrays."""

    def __init__(
        self,
        fn,
        update,
        name: str = "numpy",
        version: str = "0",
        capabilities: Mapping[str, Any] | None = None,
    ):
        self._functions = {"causal_conv1d_fn": fn, "causal_conv1d_update": update}
        self._capabilities = dict(capabilities or {})
        self.name, self.version = name, version

    def capabilities(self) -> Mapping[str, Any]:
        return {"device": "cpu", **self._capabilities}

    def run(self, op, arrays, options):
        arguments = {name: None if a is None else numpy_or_typed(a) for name, a in arrays.items()}
        out, conv_states = self._functions[op](**arguments, **options)
        return {"out": out, "conv_states": conv_states}


def numpy_or_typed(array: Array):
    """The logical argument: a TypedArray for bfloat16, else a NumPy view of the case's memory."""
    return array.typed if array.dtype == "bfloat16" else array.data


def reference_adapter(device: str | None = None) -> NumpyAdapter:
    """The reference as an implementation."""
    return NumpyAdapter(
        reference.causal_conv1d_fn,
        reference.causal_conv1d_update,
        "reference",
        f"contract-{CONTRACT_VERSION}",
        {
            "bit_exact": False,  # float64 sums may round to another 16-bit value than float32 sums do
            "unsupported": {"backend:*": "the reference ignores the name of a backend"},
        },
    )


def load_adapter(spec: str, device: str | None = None) -> Adapter:
    """Loads "package.module:object", or "process:command line" for another language.

    The object is an adapter, or a function that returns one and may take `device`.

    Raises:
      ValueError: the text has another form, or the object is no adapter.
    """
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"impl: expected package.module:object or process:command, got {spec!r}")
    if module == "process":
        from oracle.conformance.process import ProcessAdapter

        return ProcessAdapter(shlex.split(name), device)
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    if not hasattr(target, "run"):
        takes_device = "device" in inspect.signature(target).parameters
        target = target(device=device) if takes_device else target()
    elif inspect.isclass(target):
        target = target()
    for attribute in ("name", "version", "capabilities", "run"):
        if not hasattr(target, attribute):
            raise ValueError(
                f"impl: expected an adapter with {attribute!r}, got {type(target).__name__} from {spec!r}"
            )
    return target
