"""The correctness gate: no answer is timed that the oracle does not accept, on the very inputs of the timing.

Outputs are judged on whole channels (the first, the last and one in every 256 between, at all tokens, so that
every tile of 256 channels or more is met) and on whole tokens (the ends of rows and others, at all channels).
Pools are judged whole, bit for bit: slots of other requests hold NaN and must still hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.workloads import PREFILL, Workload
from oracle.numerics import FORMATS, TypedArray, cast_bits, from_bits, silu, storage_dtype
from oracle.reference import preactivation
from oracle.tolerance import error_bound, fraction_of_bound

_BLOCK = 1_000_003  # prime, so that no two rows of x repeat each other
_CHANNEL_STEP = 256
_MOST_TOKENS = 64


@dataclass(frozen=True)
class Inputs:
    """A workload's arguments on the host. Every row has a state; slots that no row names hold NaN.

    Attributes:
      x: [tokens, dim], also for updates.
      weight, bias, pool: as the operations take them; bias None without one.
      query_start_loc, cache_indices, has_initial_state: int32, int32, bool.
    """

    workload: Workload
    x: TypedArray
    weight: TypedArray
    bias: TypedArray | None
    pool: TypedArray
    query_start_loc: np.ndarray
    cache_indices: np.ndarray
    has_initial_state: np.ndarray


class Verdict(NamedTuple):
    """What a gate says: a status of the record, why, and the largest error over the allowed error."""

    status: str
    reason: str
    worst: float | None


def make_inputs(workload: Workload, seed: int = 0) -> Inputs:
    """The same arrays for the same workload and seed, whatever framework they go to."""
    random = np.random.default_rng(seed)
    block = random.standard_normal(_BLOCK, dtype=np.float32)

    def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> TypedArray:
        size = int(np.prod(shape))
        part = block if scale == 1.0 else (block * np.float32(scale)).astype(np.float32)
        part = part.astype(dtype) if dtype != "bfloat16" else (part.view(np.uint32) >> 16).astype(np.uint16)
        start = int(random.integers(_BLOCK))
        return TypedArray(dtype, np.resize(np.roll(part, start), size).reshape(shape))

    w = workload
    num_slots = w.batch + 3
    slots = random.permutation(num_slots)[: w.batch].astype(np.int32)
    pool = normal((num_slots, w.width - 1, w.dim), w.state_dtype)
    unused = np.setdiff1d(np.arange(num_slots), slots)
    pool.bits[unused] = _nan_bits(w.state_dtype)
    return Inputs(
        workload=w,
        x=normal((w.tokens, w.dim), w.dtype),
        weight=normal((w.dim, w.width), w.dtype, 0.5),
        bias=normal((w.dim,), w.dtype, 0.5) if w.bias else None,
        pool=pool,
        query_start_loc=np.concatenate([[0], np.cumsum(w.lengths)]).astype(np.int32),
        cache_indices=slots,
        has_initial_state=np.ones(w.batch, dtype=bool),
    )


class Gate:
    """Expected values of one workload, computed once, and the judgement of answers."""

    RULE = "oracle: outputs within the derived bound on sampled channels and tokens, pool bit-exact"
    PEER_RULE = "oracle, with 16-bit roundings of products, sums and pre-activation allowed; pool bit-exact"
    COPY_RULE = "out equals x bit for bit"

    def __init__(self, inputs: Inputs):
        self._inputs = inputs
        w = inputs.workload
        channels = {*range(0, w.dim, _CHANNEL_STEP), w.dim - 1}
        self._channels = np.array(sorted(channels))
        self._tokens = self._choose_tokens()
        self._samples = [self._expect(*self._on_channels()), self._expect(*self._on_tokens())]
        self._pool_bits = self._expected_pool()

    def judge(self, out: np.ndarray, pool: np.ndarray | None, rule: str = RULE) -> Verdict:
        """Judges one answer.

        Args:
          out: [tokens, dim] or the shape of the update's x, in the storage dtype (uint16 for bfloat16).
          pool: the pool after the call, in its storage dtype; None if the contender keeps none (a copy).
          rule: `RULE`, `PEER_RULE` or `COPY_RULE`.
        """
        w = self._inputs.workload
        for name, got, like in (("out", out, self._inputs.x), ("conv_states", pool, self._inputs.pool)):
            if got is None:
                continue
            if got.dtype != storage_dtype(like.dtype):
                return Verdict(
                    "wrong_dtype",
                    f"{name}: expected storage {storage_dtype(like.dtype)}, got {got.dtype}",
                    None,
                )
            if got.size != like.data.size:
                return Verdict("wrong_shape", f"{name}: expected {like.shape}, got {got.shape}", None)
        out = out.reshape(w.tokens, w.dim)
        if rule == self.COPY_RULE:
            same = np.array_equal(out.view(self._inputs.x.bits.dtype), self._inputs.x.bits)
            return Verdict("passed", "", 0.0) if same else Verdict("wrong_value", "out differs from x", None)

        worst = 0.0
        answers = (out[:, self._channels], out[self._tokens])
        for (expected, bound, rounding), answer in zip(self._samples, answers, strict=True):
            allowed = bound + rounding if rule == self.PEER_RULE else bound
            got = from_bits(np.ascontiguousarray(answer).view(FORMATS[w.dtype].bits), w.dtype).values()
            fraction = fraction_of_bound(got, expected, allowed, w.dtype)
            place = np.unravel_index(np.argmax(fraction), fraction.shape) if fraction.size else None
            if place is not None and fraction[place] > 1:
                reason = f"expected {expected[place]:.6g}, got {got[place]:.6g}, allowed error {allowed[place]:.3g}"
                return Verdict("wrong_value", reason, float(fraction[place]))
            worst = max(worst, float(fraction.max(initial=0.0)))
        if pool is None:
            return Verdict("wrong_state", "conv_states: expected the pool after the call, got none", worst)
        bits = np.ascontiguousarray(pool).view(self._pool_bits.dtype).reshape(self._pool_bits.shape)
        if not np.array_equal(bits, self._pool_bits):
            slot, column, channel = np.argwhere(bits != self._pool_bits)[0]
            return Verdict("wrong_state", f"slot {slot}, column {column}, channel {channel} differs", worst)
        return Verdict("passed", "", worst)

    def _expect(self, arguments: dict, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Expected outputs, allowed errors, and what 16-bit arithmetic may add, for a part of the problem."""
        w = self._inputs.workload
        pre, _ = preactivation(PREFILL, arguments)
        magnitude, _ = preactivation(PREFILL, arguments, "magnitude")
        bound = error_bound(pre, magnitude, width, w.dtype, w.activation)
        unit = 2.0 ** -(FORMATS[w.dtype].fraction + 1)
        return (silu(pre) if w.activation else pre), bound, 1.1 * 2 * (width + 1) * unit * magnitude

    def _on_channels(self) -> tuple[dict, int]:
        i, at = self._inputs, self._channels
        part = dict(
            x=TypedArray(i.x.dtype, i.x.data[:, at]),
            weight=TypedArray(i.weight.dtype, i.weight.data[at]),
            bias=None if i.bias is None else TypedArray(i.bias.dtype, i.bias.data[at]),
            conv_states=TypedArray(i.pool.dtype, i.pool.data[:, :, at]),
            query_start_loc=i.query_start_loc,
            cache_indices=i.cache_indices,
            has_initial_state=i.has_initial_state,
        )
        return part, i.workload.width

    def _on_tokens(self) -> tuple[dict, int]:
        """Every sampled token as a row of its own, whose state is the window before it."""
        i, w = self._inputs, self._inputs.workload
        rows = np.searchsorted(i.query_start_loc, self._tokens, side="right") - 1
        offsets = self._tokens - i.query_start_loc[rows]
        windows = np.empty((len(self._tokens), w.width - 1, w.dim), i.pool.bits.dtype)
        for column in range(w.width - 1):
            windows[:, column] = self._entries(rows, offsets + column)
        part = dict(
            x=TypedArray(i.x.dtype, i.x.data[self._tokens]),
            weight=i.weight,
            bias=i.bias,
            conv_states=from_bits(windows, i.pool.dtype),
            query_start_loc=np.arange(len(self._tokens) + 1, dtype=np.int32),
            has_initial_state=np.ones(len(self._tokens), bool),
        )
        return part, w.width

    def _expected_pool(self) -> np.ndarray:
        i, w = self._inputs, self._inputs.workload
        bits = i.pool.bits.copy()
        live = np.flatnonzero(np.array(w.lengths) > 0)
        lengths = np.array(w.lengths)[live]
        for column in range(w.width - 1):
            bits[i.cache_indices[live], column] = self._entries(live, lengths + column)
        return bits

    def _entries(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Entries of `window ++ x` of rows, as bits of the pool's dtype, [len(rows), dim]."""
        i, keep = self._inputs, self._inputs.workload.width - 1
        token = np.clip(i.query_start_loc[rows] + positions - keep, 0, None)
        from_x = cast_bits(i.x.bits[token], i.x.dtype, i.pool.dtype)
        if keep == 0:
            return from_x
        from_window = i.pool.bits[i.cache_indices[rows], np.clip(positions, 0, keep - 1)]
        return np.where((positions < keep)[:, None], from_window, from_x)

    def _choose_tokens(self) -> np.ndarray:
        """The first and last tokens of the first, last and longest rows, and others evenly between."""
        i, w = self._inputs, self._inputs.workload
        chosen: set[int] = set()
        for row in {0, w.batch - 1, int(np.argmax(w.lengths))}:
            start, end = (int(v) for v in i.query_start_loc[row : row + 2])
            chosen.update(range(start, min(start + w.width, end)))
            chosen.update(range(max(end - 2, start), end))
        chosen.update(
            np.linspace(0, w.tokens - 1, num=min(_MOST_TOKENS - len(chosen), w.tokens)).astype(int).tolist()
        )
        return np.array(sorted(chosen))


def _nan_bits(dtype: str):
    fraction, emin, emax, storage = FORMATS[dtype]
    return storage(((emax - emin + 2) << fraction) | (1 << (fraction - 1)))
