"""From a case to its arguments. Values come from a fixed integer hash, so every language can repeat them.

Whatever a correct implementation must not read holds NaN, and for indices a wrong but tempting slot: slots that
no row reads, spare columns, slots of rows without a state, tokens of padding rows and of the tail, and the
memory around every argument. Where nothing may be written either, every second element is a number.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from oracle.conformance.adapter import ARRAYS, FORMS, SERVING_ARRAYS
from oracle.conformance.arrays import POISON_BITS, Array, place, poisoned
from oracle.conformance.cases import Case
from oracle.numerics import FORMATS, TypedArray, from_bits, round_bits, storage_dtype


@dataclass(frozen=True)
class Problem:
    """One call: the operation, its array arguments (None where absent) and its other options."""

    op: str
    arrays: Mapping[str, Array | None]
    options: Mapping[str, Any]

    def typed(self) -> dict[str, Any]:
        """The call's arguments for the reference."""
        return {k: None if a is None else a.typed for k, a in self.arrays.items()} | dict(self.options)

    def with_arrays(self, **arrays: Array | None) -> Problem:
        return replace(self, arrays={**self.arrays, **arrays})

    def with_options(self, **options: Any) -> Problem:
        return replace(self, options={**self.options, **options})


def hash_uint32(seed: int, name: str, count: int) -> np.ndarray:
    """`count` well-mixed 32-bit numbers: element i is a function of (seed, name, i) alone.

    A 64-bit counter, started at CRC-32 of the name and the seed, through the splitmix64 finaliser; the upper half.
    """
    with np.errstate(over="ignore"):
        start = np.uint64(zlib.crc32(name.encode()) * 2**20 + seed)
        z = (start * np.uint64(0x632BE59BD9B4E019) + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)


def random_values(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float64 values of mean 0 and standard deviation 1.2: the sum of four uniform numbers in (-1, 1)... each
    a 32-bit integer over 2**31, so that the sums are exact.
    """
    count = int(np.prod(shape))
    parts = hash_uint32(seed, name, 4 * count).reshape(4, count).astype(np.int64).sum(axis=0)
    return ((parts - 2**33) / 2.0**31).reshape(shape)


def build(case: Case) -> Problem:
    """The arguments of a case."""
    arrays, poison = {
        "commit_windows": _commit, "tree_parents_from_links": _links, **dict.fromkeys(FORMS, _backward),
    }.get(case.op, _convolution)(case)  # fmt: skip
    for name, change in case.override.items():
        arrays[name] = _overridden(arrays.get(name), change)
    placed = {
        name: None if a is None else place(a, case.layout.get(name, "contiguous"), poison.get(name))
        for name, a in arrays.items()
    }
    options = dict(case.options)
    for name in ("split_sizes", "channel_offsets"):
        if isinstance(options.get(name), list):  # a case from JSON
            options[name] = tuple(options[name])
    return Problem(case.op, placed, options)


def _convolution(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    """Arrays of a prefill or a decode step, and what lies around the indices."""
    axes, dtypes = case.axes, case.dtypes
    dim, width = axes["dim"], axes["width"]
    fn, gated = case.op.endswith("_fn"), case.op.startswith("gated_short_conv")
    packed = "lengths" in axes
    seqlen = None if packed else axes["seqlen"]
    lengths = list(axes["lengths"]) if packed else [1 if seqlen is None else seqlen] * axes["batch"]
    batch, live_tokens = len(lengths), sum(lengths)
    tokens = live_tokens + (axes["tail"] if packed else 0)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    num_slots, slots = axes["num_slots"], axes["slots"]
    pad = case.options.get("pad_slot_id", -1)
    named = list(range(batch)) if slots is None else list(slots)
    has = (axes["has"] or [False] * batch) if fn else [True] * batch
    live = [num_slots is None or (s != pad and 0 <= s < num_slots) for s in named]

    def of_tokens(name: str, channels: int, *firsts: int) -> TypedArray:
        """An array like x; NaN outside the channels of the input, and where no live row has a token.

        `firsts` are the first of dim channels of the input; without any all are.
        """
        array = _float(case, name, (tokens, channels))
        for row in range(batch):
            if not live[row]:
                array.bits[offsets[row] : offsets[row + 1]] = POISON_BITS[array.dtype]
        array.bits[live_tokens:] = POISON_BITS[array.dtype]
        if firsts:
            read = np.concatenate([np.arange(first, first + dim) for first in firsts])
            array.bits[:, np.setdiff1d(np.arange(channels), read)] = POISON_BITS[array.dtype]
        shape = (tokens, channels) if seqlen is None else (batch, seqlen, channels)
        return TypedArray(array.dtype, array.data.reshape(shape))

    arrays: dict[str, Any] = {}
    if gated:
        offsets_of_slices = case.options.get("channel_offsets", (0, dim, 2 * dim))
        arrays["bcx"] = of_tokens("bcx", axes.get("channels", 3 * dim), *offsets_of_slices)
    else:
        arrays["x"] = of_tokens("x", axes.get("channels", dim), case.options.get("channel_offset", 0))
    arrays["weight"] = _float(case, "weight", (dim, width))
    arrays["bias"] = None if dtypes["bias"] is None else _float(case, "bias", (dim,))
    arrays["conv_states"] = None
    if num_slots is not None:
        states = _float(case, "conv_states", (num_slots, axes["state_len"], dim))
        readable = np.zeros((num_slots, axes["state_len"], 1), dtype=bool)
        state_len, layout = axes["state_len"], case.options.get("state_layout", "front")
        apply = case.options.get("empty_rows") == "apply"
        for row in range(batch):
            if not (live[row] and has[row] and (lengths[row] > 0 or apply)):
                continue
            columns = list(range(width - 1))
            if "counts" in axes:
                first = min(max(axes["counts"][row] - 1, 0), state_len - width + 1)
                columns = [first + j for j in columns]
            elif layout != "front" and case.options.get("commit", True):
                columns = list(range(state_len))  # the slot moves, or is carried over, as a whole
            elif layout == "back":
                columns = [state_len - width + 1 + j for j in columns]
            elif layout == "ring":
                seen = max(axes["cache_seqlens"][row], 0)
                columns = [(seen - width + 1 + j) % state_len for j in columns]
            readable[named[row], columns] = True
        states.bits[...] = np.where(readable, states.bits, poisoned(states.shape, states.dtype))
        arrays["conv_states"] = states
    arrays["query_start_loc"] = _integers(offsets, dtypes["query_start_loc"]) if packed else None
    arrays["cache_indices"] = None if slots is None else _integers(slots, dtypes["cache_indices"])
    if fn:
        mask = axes["has"]
        arrays["has_initial_state"] = None if mask is None else TypedArray("bool", np.array(mask, dtype=bool))
    else:
        counts = axes.get("counts")
        arrays["num_accepted_tokens"] = (
            None if counts is None else _integers(counts, dtypes["num_accepted_tokens"])
        )
    for name in SERVING_ARRAYS:
        if name == "residual" and axes.get("residual"):
            arrays[name] = of_tokens(name, dim, 0)
        elif name == "window_out" and name in axes:
            shape = (*axes[name], width - 1, dim)
            arrays[name] = from_bits(poisoned(shape, dtypes[name]), dtypes[name])
        elif name in axes:
            arrays[name] = _integers(axes[name], dtypes[name])
    if case.op.startswith("gated_delta_prologue"):
        arrays |= _gates(case, of_tokens)
    unnamed = sorted(set(range(num_slots or 1)) - set(named))
    return arrays, {
        "cache_indices": unnamed[-1] if unnamed else 0,
        "query_start_loc": tokens,
        "num_accepted_tokens": axes["state_len"] - width + 2,
    }


def _gates(case: Case, of_tokens: Callable[..., TypedArray]) -> dict[str, TypedArray | None]:
    """Arrays of a prologue's gates."""
    heads, size = case.options["num_v_heads"], case.options["head_k_dim"]
    last = (heads, size) if case.axes.get("channel_gate") else (heads,)
    found: dict[str, TypedArray | None] = {}
    for name, shape in (("a", last), ("b", (heads,))):
        found[name] = None
        if case.dtypes[name] is not None:
            array = of_tokens(name, int(np.prod(shape)))
            found[name] = TypedArray(array.dtype, array.data.reshape(*array.shape[:-1], *shape))
    for name, shape in (("A_log", (heads,)), ("dt_bias", last)):
        found[name] = None if case.dtypes[name] is None else _float(case, name, shape)
    return found


def _commit(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    """Arrays of a commit of windows. The pool is never read, nor is a window that no row names."""
    axes, dtypes = case.axes, case.dtypes
    history, dim = axes["width"] - 1, axes["dim"]
    buffers, steps = axes["window_out"]
    shape = (axes["num_slots"], axes["state_len"], dim)
    windows = _float(case, "window_out", (buffers, steps, history, dim))
    read = np.zeros((buffers, steps, 1, 1), dtype=bool)
    pad = case.options.get("pad_slot_id", -1)
    rows = range(len(axes["accepted_steps"]))
    slots, named = axes["slots"] or rows, axes.get("window_indices") or rows
    for slot, buffer, step in zip(slots, named, axes["accepted_steps"], strict=True):
        if pad not in (slot, buffer) and 0 <= slot < shape[0] and 0 <= buffer < buffers and 0 <= step < steps:
            read[buffer, step] = True
    unread = FORMATS[windows.dtype].bits(POISON_BITS[windows.dtype] + 1)  # a NaN that no slot holds
    windows.bits[...] = np.where(read, windows.bits, unread)
    arrays = {
        "conv_states": from_bits(poisoned(shape, dtypes["conv_states"]), dtypes["conv_states"]),
        "window_out": windows,
        "accepted_steps": _integers(axes["accepted_steps"], dtypes["accepted_steps"]),
        "cache_indices": None if axes["slots"] is None else _integers(axes["slots"], dtypes["cache_indices"]),
        "window_indices": None,
    }
    if axes.get("window_indices") is not None:
        arrays["window_indices"] = _integers(axes["window_indices"], dtypes["window_indices"])
    return arrays, {}


def _links(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    """The two arrays of links of draft trees."""
    return {
        name: _integers(case.axes[name], case.dtypes[name]) for name in ("next_token", "next_sibling")
    }, {}


def _backward(case: Case) -> tuple[dict[str, Any], dict[str, int]]:
    """Arrays of a backward pass. The tail is NaN, in x and in what comes in."""
    axes, dtypes = case.axes, case.dtypes
    lengths, dim, width = axes["lengths"], axes["dim"], axes["width"]
    live = sum(lengths)
    tokens = live + axes["tail"]
    states = (len(lengths), width - 1, dim)
    shapes: dict[str, tuple[int, ...]] = {
        "dfinal_states": states, "weight": (dim, width), "bias": (dim,), "initial_states": states,
    }  # fmt: skip
    of_tokens: dict[str, tuple[int, ...]] = {"dout": (dim,), "x": (dim,)}
    if "bcx" in dtypes:
        of_tokens = {"dout": (dim,), "bcx": (axes.get("channels", 3 * dim),)}
    elif "dq" in dtypes:
        keys, values = ((case.options[f"num_{k}_heads"], case.options[f"head_{k}_dim"]) for k in "kv")
        gate = (values[0], keys[1]) if axes["channel_gate"] else values[:1]
        of_tokens = {"x": (dim,), "dq": keys, "dk": keys, "dv": values, "dg": gate, "dbeta": values[:1]}
        of_tokens |= {"a": gate, "b": values[:1]}
        shapes |= {"A_log": values[:1], "dt_bias": gate}
    shapes |= {name: (tokens, *last) for name, last in of_tokens.items()}
    arrays = {
        name: None if dtypes[name] is None else _float(case, name, shapes[name])
        for name in ARRAYS[case.op]
        if name != "query_start_loc"
    }
    for name, last in of_tokens.items():
        if (array := arrays[name]) is None:
            continue
        array.bits[live:] = POISON_BITS[array.dtype]
        if axes["dense"]:
            arrays[name] = TypedArray(array.dtype, array.data.reshape(len(lengths), -1, *last))
    starts = np.cumsum([0, *lengths])
    arrays["query_start_loc"] = None if axes["dense"] else _integers(starts, dtypes["query_start_loc"])
    return arrays, {"query_start_loc": tokens}


def _float(case: Case, name: str, shape: tuple[int, ...]) -> TypedArray:
    dtype = case.dtypes[name]
    values = DATA[case.data](name, random_values(case.seed, name, shape))
    with np.errstate(over="ignore"):
        array = from_bits(round_bits(values, dtype), dtype)
    if case.data == "nan_payload" and name in ("x", "bcx", "conv_states"):
        _put_nans(array, case.seed, name)
    return array


def _integers(values: Any, dtype: str) -> TypedArray:
    return TypedArray(dtype, np.array(values, dtype="uint64" if dtype == "uint64" else "int64").astype(dtype))


def _overridden(array: TypedArray | None, change: Mapping[str, Any]) -> TypedArray | None:
    """An argument that breaks the contract: other "values", "shape" or "dtype", or {"none": True}."""
    if change.get("none"):
        return None
    dtype = change.get("dtype", array.dtype if array else "int32")
    if "values" in change:
        return _integers(change["values"], dtype)
    return TypedArray(
        dtype, np.zeros(tuple(change.get("shape", array.shape if array else ())), storage_dtype(dtype))
    )


def _put_nans(array: TypedArray, seed: int, name: str) -> None:
    """Gives a fifth of the elements quiet NaNs with payloads of their own, infinities and negative zeros."""
    fraction, emin, emax, storage = FORMATS[array.dtype]
    infinity = (emax - emin + 2) << fraction
    noise = hash_uint32(seed, name + ".nan", array.data.size).reshape(array.shape)
    sign = ((noise >> 8) & 1).astype(np.uint64) << np.uint64(8 * np.dtype(storage).itemsize - 1)
    payload = (noise >> np.uint32(12)) & np.uint32((1 << (fraction - 1)) - 1)
    nan = (sign | np.uint64(infinity | 1 << (fraction - 1)) | payload).astype(storage)
    kind = noise % 25
    bits = np.where(kind < 3, nan, array.bits)
    bits = np.where(kind == 3, storage(infinity), bits)
    array.bits[...] = np.where(kind == 4, sign.astype(storage), bits)


def _cancel(name: str, values: np.ndarray) -> np.ndarray:
    """Two taps whose products cancel but for 2**-14, which survives only in an exact product."""
    if name == "weight":
        return np.broadcast_to(np.array([1.0078125, -1.015625]), values.shape)
    if name == "x":
        return np.broadcast_to(np.where(np.arange(len(values)) % 2, 1.0, 1.0078125)[:, None], values.shape)
    return np.zeros(values.shape)


def _absorb(name: str, values: np.ndarray) -> np.ndarray:
    """Two large products that cancel, small ones before, between and after: the order of the sum shows."""
    if name == "weight":
        out, middle = values.copy(), values.shape[1] // 2
        out[:, 0] = 2.0**11 * values[:, 0]
        out[:, middle] = -out[:, 0]
        return out
    if name == "x":
        pattern = values[np.arange(len(values)) % 2]
        return np.round(pattern * 2.0**6) * 2.0**-6
    return values


def _one_hot(name: str, values: np.ndarray) -> np.ndarray:
    """Channel d has a single tap, d modulo width, of weight 1."""
    if name == "weight":
        dim, width = values.shape
        return (np.arange(width) == np.arange(dim)[:, None] % width).astype(np.float64)
    return np.zeros(values.shape) if name == "bias" else values


def _ladder(name: str, values: np.ndarray) -> np.ndarray:
    """One newest tap of weight 1 and inputs from -104 to 104, dense around 0: both ends of SiLU."""
    if name == "weight":
        return np.broadcast_to(np.arange(values.shape[1]) == values.shape[1] - 1, values.shape).astype(
            np.float64
        )
    if name == "x":
        steps = np.linspace(-1.0, 1.0, values.size).reshape(values.shape)
        return 104.0 * np.sign(steps) * np.abs(steps) ** 1.5
    return np.zeros(values.shape)


def _zero_weight(name: str, values: np.ndarray) -> np.ndarray:
    return np.zeros(values.shape) if name == "weight" else values


def _positions(name: str, values: np.ndarray) -> np.ndarray:
    """Small whole numbers that tell row, column and channel apart; all sums are exact."""
    if name == "weight":
        return np.arange(values.size).reshape(values.shape) % 7 - 3.0
    return np.arange(values.size).reshape(values.shape) % 251 - 125.0


DATA = {
    "random": lambda name, values: values,
    "nan_payload": lambda name, values: values,
    "cancel": _cancel,
    "one_hot": _one_hot,
    "absorb": _absorb,
    "ladder": _ladder,
    "zero_weight": _zero_weight,
    "positions": _positions,
    "tiny": lambda name, values: values * (1.0 if name == "weight" else 2.0**-130),
    "beyond_float16": lambda name, values: values * (1.0 if name == "weight" else 2.0**20),
    "steep": lambda name, values: values * (30.0 if name == "x" else 1.0),
    "small_sums": lambda name, values: values * (2.0**-6 if name in ("weight", "bias") else 1.0),
    "near_eps": lambda name, values: values * (2.0**-9 if name in ("x", "conv_states", "bias") else 1.0),
    "far_gates": lambda name, values: values * (80.0 if name in ("a", "b") else 1.0),
}
