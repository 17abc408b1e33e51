"""What an implementation writes to be judged: an object with `name`, `version`, `capabilities()` and `run()`.

    class Mine:
        name, version = "mine", "1.0"
        def capabilities(self):
            return {"unsupported": {"width:5": "at most four taps"}}
        def run(self, op, arrays, options):
            result = my_functions[op](**{k: a and to_mine(a) for k, a in arrays.items()}, **options)
            return {"out": to_typed(result.out), "conv_states": to_typed(result.conv_states)}

`arrays` maps every array argument of the call, by the names of the contract's record, to an `arrays.Array`, or None
where the case has none; `options` holds the host arguments that a case sets. Errors of the contract (ValueError,
TypeError, Unsupported) are raised as they are.

The serving arguments (layouts of a slot, write slots, snapshots, windows per step, trees, residual, split) are for
implementations that say so: capabilities() names them under "supports", and cases that need any other are recorded
as unsupported without being run. An adapter never meets a name that it does not support:

- `arrays` holds an argument of `SERVING_ARRAYS` only if the adapter supports its feature.
- `options` likewise: state_layout, empty_rows, snapshot_block_size, commit, channel_offset and split_sizes (a tuple).
- With split_sizes, "out" of the result is a list or tuple of arrays.
- With window_out among the arrays, the result has "window_out": the whole array after the call, in the shape that
  was given. It arrives like conv_states, in guarded memory with strides. An implementation that writes in place on
  a device returns its base buffer under "memory", as for conv_states.
- Two more operations: "commit_windows", whose result is {"conv_states": ...} (and "memory"), and
  "tree_parents_from_links", whose result is {"parents": an integer array}.

Gradients are opt-in in the same way. The operation "causal_conv1d_backward" is the differentiable form `causal_conv1d`
and its backward pass: `arrays` holds that form's arguments, "dout" (the gradient of out, in x's dtype and shape) and
"dfinal_states" (of the final states, in their dtype, or None). The result is {"dx", "dweight", "dbias",
"dinitial_states"} (and "memory"), each in the dtype and shape of its argument, None where that is None. Options are
activation, and schedule and max_seqlen where a case sets them. "gated_delta_prologue_backward" and
"gated_short_conv_backward" are the same of the fronts' forms: `UPSTREAM` names what comes in, `GRADIENTS` what goes out.

The fronts of linear-attention layers (`oracle.contract_prologue`) are two more features, each of some operations with the
records' arguments:

- "gated_delta_prologue": gated_delta_prologue_fn and gated_delta_prologue_update. The result is {"q", "k", "v", "g",
  "beta", "conv_states"} (and "window_out", "memory"), with None for what the case does not ask for.
- "gated_short_conv": gated_short_conv_fn and gated_short_conv_update, with the results of the plain operations.

"short_conv" (`oracle.contract_short`) is called by relations alone: x has three axes, layouts are the default ones, and a cache of
width-1 columns is given. The result is {"out", "conv_states": the new cache}; no argument changes.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from oracle import (
    contract_prologue,
    reference,
    reference_grad,
    reference_prologue,
    reference_prologue_grad,
    reference_short,
)
from oracle.conformance.arrays import Array
from oracle.contract import CONTRACT_VERSION, RECORDS
from oracle.numerics import rounded, typed

OPS = (
    "causal_conv1d_fn", "causal_conv1d_update", "commit_windows", "tree_parents_from_links", "causal_conv1d_backward",
    "gated_delta_prologue_fn", "gated_delta_prologue_update", "gated_short_conv_fn", "gated_short_conv_update",
    "gated_delta_prologue_backward", "gated_short_conv_backward", "short_conv",
)  # fmt: skip
"""Operations: of cases, and the last, which relations alone call on cases of `causal_conv1d_fn` in another form."""
FORWARD = tuple(op for op in OPS if op.endswith(("_fn", "_update")))
"""Operations that read and write slots."""

_RECORDS = RECORDS | contract_prologue.RECORDS
_ROWS = ("weight", "bias", "initial_states")

UPSTREAM = {
    "causal_conv1d_backward": {"dout": "out", "dfinal_states": "conv_states"},
    "gated_delta_prologue_backward": {
        f"d{name}": name for name in ("q", "k", "v", "g", "beta")
    } | {"dfinal_states": "conv_states"},
    "gated_short_conv_backward": {"dout": "out", "dfinal_states": "conv_states"},
}  # fmt: skip
"""Of every backward pass its incoming gradients, and the results of the differentiable form that they belong to."""

GRADIENTS = {
    op: {f"d{name}": name for name in names}
    for op, names in {
        "causal_conv1d_backward": ("x", *_ROWS),
        "gated_delta_prologue_backward": ("x", *_ROWS, "a", "b", "A_log", "dt_bias"),
        "gated_short_conv_backward": ("bcx", *_ROWS),
    }.items()
}
"""Of every backward pass its results, and the arguments that they are the gradients of."""

FORMS = {op: _RECORDS[op.removesuffix("_backward")] for op in UPSTREAM}
"""Of every backward pass the record of the differentiable form."""

ARRAYS = {op: record.ARRAYS for op, record in _RECORDS.items() if op in OPS} | {
    op: (*UPSTREAM[op], *FORMS[op].ARRAYS) for op in FORMS
} | {"short_conv": ("x", "weight", "bias", "cache", "segment_ids", "lengths")}  # fmt: skip
"""The array arguments of every operation, in the order of its signature."""

SERVING_ARRAYS = {
    "cache_seqlens": "state_layout_ring", "write_indices": "write_indices", "snapshot_indices": "snapshot",
    "num_computed_tokens": "snapshot", "track_indices": "track", "track_lengths": "track", "window_out": "window_out",
    "window_indices": "window_out", "tree_parents": "tree_parents", "residual": "residual",
}  # fmt: skip
"""Arrays of a prefill or a decode step that belong to a feature, and which."""

SERVING_FEATURES = {
    "state_layout_back": 'state_layout="back"',
    "state_layout_ring": 'state_layout="ring" with cache_seqlens',
    "write_indices": "a row may write another slot than it reads",
    "empty_rows": 'empty_rows="apply"',
    "snapshot": "snapshot_indices, snapshot_block_size, num_computed_tokens",
    "track": "track_indices, track_lengths",
    "window_out": "a window per step, with window_indices",
    "no_commit": "commit=False",
    "commit_windows": "the operation commit_windows",
    "tree_parents": "draft trees",
    "tree_parents_from_links": "the operation tree_parents_from_links",
    "residual": "residual",
    "channel_offset": "x wider than the weight",
    "split": "split_sizes",
    "causal_conv1d_backward": "gradients of the differentiable form",
    "gated_delta_prologue": "the operations gated_delta_prologue_fn and gated_delta_prologue_update",
    "gated_short_conv": "the operations gated_short_conv_fn and gated_short_conv_update",
    "gated_delta_prologue_backward": "gradients of gated_delta_prologue",
    "gated_short_conv_backward": "gradients of gated_short_conv",
    "short_conv": "the operation short_conv",
}
"""What capabilities() may name under "supports"."""


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

        Keys, all optional; any other, and a name or pattern that matches nothing, is an error:
          supports: names of `SERVING_FEATURES`, or patterns of them: ["*"] for all, ["state_layout_*", "split"].
            Cases that need one that is not named are unsupported. Default: none.
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
          op: one of OPS; those behind the first two only if "supports" names them.
          arrays: the array arguments: every name of ARRAYS, but for those of SERVING_ARRAYS that are not supported.
          options: the other keyword-only arguments that the case sets.

        Returns:
          "out": a TypedArray, or a NumPy array of x's dtype; a list or tuple of them with split_sizes.
          "conv_states": the same, or None without a pool.
          "window_out": the same, where the case gives one.
          "parents": an integer NumPy array, of tree_parents_from_links alone.
          "q", "k", "v", "g", "beta": of the prologue in place of "out".
          the names of GRADIENTS: of a backward pass alone.
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
        *,
        commit_windows=None,
        tree_parents_from_links=None,
        causal_conv1d_backward=None,
        fronts: Mapping[str, Any] | None = None,
    ):
        """Operations of the fronts, and short_conv, by name, come in `fronts`; the others each as an argument.

        A backward pass returns its gradients in the order of GRADIENTS.
        """
        self._functions = {
            "causal_conv1d_fn": fn, "causal_conv1d_update": update, "commit_windows": commit_windows,
            "tree_parents_from_links": tree_parents_from_links, "causal_conv1d_backward": causal_conv1d_backward,
            **(fronts or {}),
        }  # fmt: skip
        self._capabilities = dict(capabilities or {})
        self.name, self.version = name, version

    def capabilities(self) -> Mapping[str, Any]:
        return {"device": "cpu", **self._capabilities}

    def run(self, op, arrays, options):
        arguments = {name: None if a is None else numpy_or_typed(a) for name, a in arrays.items()}
        result = self._functions[op](**arguments, **options)
        if op == "commit_windows":
            return {"conv_states": result}
        if op == "tree_parents_from_links":
            return {"parents": result}
        if op in GRADIENTS:
            return dict(zip(GRADIENTS[op], result, strict=True))
        names = ("q", "k", "v", "g", "beta") if op.startswith("gated_delta_prologue") else ("out",)
        return dict(zip((*names, "conv_states", "window_out"), result, strict=False))


def numpy_or_typed(array: Array):
    """The logical argument: a TypedArray for bfloat16, else a NumPy view of the case's memory."""
    return array.typed if array.dtype == "bfloat16" else array.data


def gradients_of(op: str, arguments: Mapping[str, Any], functions: Mapping[str, Any]) -> Any:
    """What one of `functions`, by operation, says of a backward pass: the exact gradients, or their bounds.

    Args:
      op: the operation.
      arguments: of the case by name, incoming gradients among them.
      functions: that of causal_conv1d_backward takes all in one, those of the fronts incoming gradients and the call.
    """
    upstream = {name: arguments[name] for name in UPSTREAM[op]}
    call = {name: value for name, value in arguments.items() if name not in upstream}
    if op != "causal_conv1d_backward":
        return functions[op](upstream, call)
    read = {name: call.get(name) for name in ("x", *_ROWS, "query_start_loc", "activation")}
    return functions[op](**upstream, **read)


EXACT_GRADIENTS = {
    "causal_conv1d_backward": reference_grad.causal_conv1d_backward,
    "gated_delta_prologue_backward": reference_prologue_grad.gated_delta_prologue_backward,
    "gated_short_conv_backward": reference_prologue_grad.gated_short_conv_backward,
}
"""The reference of every backward pass, for `gradients_of`."""


def _rounded_gradients(op: str, **arguments: Any) -> list[Any]:
    """The reference's gradients, rounded once to the dtypes of their arguments."""
    FORMS[op](**{name: value for name, value in arguments.items() if name not in UPSTREAM[op]}).check()
    exact = gradients_of(op, arguments, EXACT_GRADIENTS)
    return [
        None if value is None else rounded(value, typed(arguments[name]).dtype)
        for value, name in zip(exact, GRADIENTS[op].values(), strict=True)
    ]


def reference_adapter(device: str | None = None) -> NumpyAdapter:
    """The reference as an implementation."""
    return NumpyAdapter(
        reference.causal_conv1d_fn,
        reference.causal_conv1d_update,
        "reference",
        f"contract-{CONTRACT_VERSION}",
        {
            "supports": ["*"],
            "bit_exact": False,  # float64 sums may round to another 16-bit value than float32 sums do
            "unsupported": {"backend:*": "the reference ignores the name of a backend"},
        },
        commit_windows=reference.commit_windows,
        tree_parents_from_links=reference.tree_parents_from_links,
        causal_conv1d_backward=functools.partial(_rounded_gradients, "causal_conv1d_backward"),
        fronts={op: getattr(reference_prologue, op) for op in reference_prologue.CONVOLUTIONS}
        | {op: functools.partial(_rounded_gradients, op) for op in FORMS if op != "causal_conv1d_backward"}
        | {"short_conv": reference_short.short_conv},
    )


CAPABILITIES = ("supports", "unsupported", "bit_exact", "path_invariant", "device")


def wrong_capabilities(stated: Any, features: Iterable[str]) -> Iterator[str]:
    """What is wrong with capabilities: unknown keys, values of another type, patterns that match nothing.

    Args:
      stated: what `capabilities()` returned.
      features: of every case that there is.
    """
    if not isinstance(stated, Mapping):
        yield f"expected a mapping, got {type(stated).__name__}"
        return
    for key in stated:
        if key not in CAPABILITIES:
            yield f"{key!r}: expected one of {', '.join(CAPABILITIES)}{_near(key, CAPABILITIES)}"
    for key, known in (("supports", SERVING_FEATURES), ("unsupported", sorted(features))):
        patterns, kind = (
            stated.get(key, ()),
            "a list of names" if key == "supports" else "a mapping to reasons",
        )
        if isinstance(patterns, str) or not isinstance(patterns, Iterable):
            yield f"{key}: expected {kind}, got {patterns!r}"
            continue
        if key == "unsupported" and patterns and not isinstance(patterns, Mapping):
            yield f"{key}: expected {kind}, got {patterns!r}"
        for pattern in patterns:
            if pattern != "*" and not fnmatch.filter(known, str(pattern)):
                yield f"{key}: {pattern!r} matches no feature{_near(str(pattern), known)}"
    for key in ("bit_exact", "path_invariant"):
        if not isinstance(stated.get(key, True), bool):
            yield f"{key}: expected True or False, got {stated[key]!r}"


def _near(name: Any, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def offered(op: str, arrays: Mapping[str, Array | None], supports: Iterable[str]) -> dict[str, Array | None]:
    """The arrays of a call as an adapter gets them: all that it knows, None where the call has none."""
    patterns = list(supports)

    def known(name: str) -> bool:
        feature = SERVING_ARRAYS.get(name) if op in FORWARD else None
        return feature is None or any(fnmatch.fnmatchcase(feature, pattern) for pattern in patterns)

    return {name: arrays.get(name) for name in ARRAYS[op] if arrays.get(name) is not None or known(name)}
