"""The reference's steps in float32, in the contract's order, as an implementation: what mutants override.

Its outputs have the bits that an implementation promises, which those of the float64 reference need not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle import contract, contract_prologue, contract_short
from oracle.conformance.adapter import FORMS, GRADIENTS
from oracle.conformance.arrays import Array
from oracle.numerics import TypedArray, round_bits, rounded, to_float64
from oracle.reference_prologue import CONVOLUTIONS, OrderedFront, OrderedGated, checked
from oracle.reference_prologue_grad import FrontBackward
from oracle.reference_short import as_rows


class Model(OrderedFront, OrderedGated, FrontBackward):
    """The faithful model; an adapter like any other. `arrays` are those of the call, with their memory."""

    name, version = "model", str(contract.CONTRACT_VERSION)
    dtype = np.float32
    arrays: Mapping[str, Array | None]

    def capabilities(self) -> Mapping[str, Any]:
        return {"device": "cpu", "supports": ["*"]}

    def run(
        self, op: str, arrays: Mapping[str, Array | None], options: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        self.arrays = arrays
        self.check(op, arrays, options)
        given = {name: None if a is None else self.read(arrays, name) for name, a in arrays.items()}
        if op == "commit_windows":
            return {"conv_states": self.commit({**given, **options})}
        if op == "tree_parents_from_links":
            links = zip(given["next_token"].data.tolist(), given["next_sibling"].data.tolist(), strict=True)
            parents = np.array([self.parents(*row) for row in links], np.int32)
            return {"parents": parents.reshape(given["next_token"].shape)}
        with np.errstate(all="ignore"):
            if op in GRADIENTS:
                found = self.backward(op, {**given, **options})
                likes = (given[argument] for argument in GRADIENTS[op].values())
                return {
                    name: None if value is None else rounded(value.astype(np.float64), like.dtype)
                    for name, value, like in zip(GRADIENTS[op], found, likes, strict=True)
                }
            if op in CONVOLUTIONS:
                run = self.gated if "bcx" in given else self.front
                return run(op, checked(op, {**given, **options, "validate": False}))
            if op == "short_conv":
                return self.of_documents(self.documents_of({**given, **options}), *given["x"].shape[:2])
            return self.compute(op, {**given, **options})

    def documents_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The documents of a `short_conv` as rows of a prefill, of whose pool the second half is the new cache."""
        return as_rows(given)

    def of_documents(self, rows: Mapping[str, Any], batch: int, seqlen: int) -> dict[str, TypedArray]:
        found = self.compute("causal_conv1d_fn", rows)
        out, states = found["out"], found["conv_states"]
        return {
            "out": TypedArray(out.dtype, out.data.reshape(batch, seqlen, -1)),
            "conv_states": TypedArray(states.dtype, states.data[batch:]),
        }

    def backward(self, op: str, given: Mapping[str, Any]) -> Any:
        """The gradients of a checked call."""
        if op == "causal_conv1d_backward":
            return self.gradients(given)
        call = FORMS[op](**{name: value for name, value in given.items() if name in FORMS[op]._fields})
        given = {**contract.normalised(call)._asdict(), **given}
        if "bcx" in given:
            return self.gated_gradients({**given, "channel_offsets": call.check().offsets})
        return self.front_gradients(given)

    def check(self, op: str, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        if op in FORMS:
            FORMS[op](**{name: arrays[name] for name in FORMS[op].ARRAYS}, **options).check()
            return
        records = contract.RECORDS | contract_prologue.RECORDS | {"short_conv": contract_short.ShortConvCall}
        call = records[op](**arrays, **options)
        sizes = call.check()
        contract.check_backend(options.get("backend", "auto"), ("model",))
        if options.get("validate"):
            self.check_values(call, sizes)

    def check_values(self, call: Any, sizes: Any) -> None:
        call.check_values(sizes, lambda name, array: array.data.tolist())

    def read(self, arrays: Mapping[str, Any], name: str) -> TypedArray:
        """An argument, taken out of its memory."""
        return arrays[name].typed


def rounded_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values rounded to a format, as float32."""
    return to_float64(round_bits(values, dtype), dtype).astype(np.float32)
