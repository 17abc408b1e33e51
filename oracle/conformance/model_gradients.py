"""The backward pass of the model, in NumPy float32: each step that a mutant replaces is a method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from oracle import contract
from oracle.conformance.arrays import Array
from oracle.numerics import TypedArray, rounded
from oracle.reference_grad import silu_slope


class Backward:
    """The part of `model.Model` that runs causal_conv1d_backward."""

    def backward(self, arrays: Mapping[str, Array | None], options: dict[str, Any]) -> dict[str, Any]:
        given = {name: None if a is None else a.typed for name, a in arrays.items()}
        x, weight, bias, initial, starts = (
            given[name] for name in ("x", "weight", "bias", "initial_states", "query_start_loc")
        )
        self.check_backward(x, weight, bias, initial, starts, options)
        dim, width = weight.shape
        x32, dout = self.float32(x).reshape(-1, dim), self.upstream(arrays["dout"]).reshape(-1, dim)
        batch = x.shape[0] if starts is None else len(starts.data) - 1
        bounds = [i * x.shape[1] for i in range(batch + 1)] if starts is None else starts.data.tolist()
        bounds = [0, *np.clip(bounds[1:], 0, len(x32)).tolist()]
        w = self.float32(weight)
        b = np.zeros(dim, np.float32) if bias is None else self.float32(bias)
        h = np.zeros((batch, width - 1, dim), np.float32) if initial is None else self.float32(initial)
        final = given["dfinal_states"]
        dfinal = np.zeros_like(h) if final is None else self.float32(final)
        dx, dh = np.zeros_like(x32), np.zeros_like(h)
        dweight, dbias = np.zeros((dim, width), np.float32), np.zeros(dim, np.float32)
        for i in range(batch):
            tokens = slice(bounds[i], max(bounds[i], bounds[i + 1]))
            e = np.concatenate([h[i], x32[tokens]])
            length = len(e) - (width - 1)
            pre = b + sum(w[:, j] * e[j : j + length] for j in range(width))
            g = dout[tokens] * (self.slope(pre, x.dtype) if options.get("activation") else np.float32(1))
            de = np.zeros_like(e)
            for j in range(width):
                self.spread(de, j, w[:, j] * g)
                terms = self.entries_of_taps(e, width)[j : j + length] * g
                dweight[:, j] = self.add_up(dweight[:, j], terms, x.dtype, options)
            dbias = self.add_up(dbias, g, x.dtype, options)
            self.add_final(de, dfinal[i], length)
            dh[i], dx[tokens] = de[: width - 1], de[width - 1 :]
        self.end_backward(arrays, dx, dweight, bounds)
        found = {
            "dx": (dx.reshape(x.shape), x),
            "dweight": (dweight, weight),
            "dbias": (dbias, bias),
            "dinitial_states": (dh, initial),
        }
        return {
            name: None if argument is None else rounded(value.astype(np.float64), argument.dtype)
            for name, (value, argument) in found.items()
        }

    def check_backward(self, x, weight, bias, initial, starts, options) -> None:
        contract.check_causal_conv1d(x, weight, bias, initial, starts, **options)

    def float32(self, array: TypedArray) -> np.ndarray:
        return array.values().astype(np.float32)

    def upstream(self, dout: Array) -> np.ndarray:
        return self.float32(dout.typed)

    def slope(self, pre, dtype) -> np.ndarray:
        return silu_slope(pre.astype(np.float64)).astype(np.float32)

    def spread(self, de, j, product) -> None:
        """Adds what tap j gives to the entries that it has read."""
        de[j : j + len(product)] += product

    def entries_of_taps(self, e, width) -> np.ndarray:
        return e

    def add_up(self, total, terms, dtype, options) -> np.ndarray:
        """A running sum of dweight or dbias and the terms of one row."""
        return total + terms.sum(axis=0)

    def add_final(self, de, dfinal, length) -> None:
        de[length:] += dfinal

    def end_backward(self, arrays, dx, dweight, bounds) -> None:
        pass
