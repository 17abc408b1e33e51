"""The reference: the operations in NumPy, one row at a time, in float64, rounded once at the end.

Arguments are NumPy arrays or `numerics.TypedArray`s (bfloat16). Results are copies of the same kind; the
inputs are never written. `preactivation` gives the unrounded sums that error bounds and bit-exact checks
are built on. Which columns of which slot a row reads and writes is in `reference_states`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from oracle import contract, reference_states, values
from oracle.contract import CommitSizes, ConvOutput, ConvWindowOutput, FnSizes, UpdateSizes
from oracle.numerics import TypedArray, cast_bits, fma_float32, from_bits, round_bits, silu, typed
from oracle.reference_states import Row

OPERATIONS = ("causal_conv1d_fn", "causal_conv1d_update")


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    activation=None,
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    empty_rows="skip",
    snapshot_indices=None,
    snapshot_block_size=None,
    num_computed_tokens=None,
    track_indices=None,
    track_lengths=None,
    residual=None,
    channel_offset=None,
    split_sizes=None,
) -> ConvOutput:
    """Packed prefill; see `contract` for the definition and `contract.check_causal_conv1d_fn` for arguments.

    `schedule` and `backend` are accepted and ignored, `max_seqlen` is only validated.
    """
    out, conv_states, _ = _call("causal_conv1d_fn", locals())
    return ConvOutput(out, conv_states)


def causal_conv1d_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    query_start_loc=None,
    num_accepted_tokens=None,
    max_seqlen=None,
    activation=None,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    track_indices=None,
    window_out=None,
    window_indices=None,
    commit=True,
    tree_parents=None,
    residual=None,
    channel_offset=None,
    split_sizes=None,
) -> ConvOutput | ConvWindowOutput:
    """Decode step; see `contract` for the definition and `contract.check_causal_conv1d_update` for arguments.

    The result is a `ConvWindowOutput` where `window_out` is given, else a `ConvOutput`.
    """
    result = _call("causal_conv1d_update", locals())
    return ConvOutput(*result[:2]) if window_out is None else ConvWindowOutput(*result)


def commit_windows(
    conv_states,
    window_out,
    accepted_steps,
    cache_indices=None,
    window_indices=None,
    *,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
):
    """Moves accepted windows into their slots; see `contract.check_commit_windows`. Returns the new pool."""
    sizes = contract.check_commit_windows(
        conv_states, window_out, accepted_steps, cache_indices, window_indices,
        pad_slot_id=pad_slot_id, backend=backend, validate=validate,
    )  # fmt: skip
    if validate:
        values.check_commit_values(accepted_steps, cache_indices, window_indices, sizes, pad_slot_id)
    pool, windows = typed(conv_states).copy(), typed(window_out)
    for slot, buffer, step in commit_moves(accepted_steps, cache_indices, window_indices, sizes, pad_slot_id):
        pool.bits[slot, : sizes.history] = cast_bits(windows.bits[buffer, step], windows.dtype, pool.dtype)
    return _like(conv_states, pool)


def commit_moves(
    accepted_steps, cache_indices, window_indices, sizes: CommitSizes, pad_slot_id: int
) -> list[tuple[int, int, int]]:
    """The (slot, buffer, step) of every row of a commit that does something."""
    slots = _integers(cache_indices, range(sizes.batch))
    buffers = _integers(window_indices, range(sizes.batch))
    return [
        (slot, buffer, step)
        for slot, buffer, step in zip(slots, buffers, _integers(accepted_steps), strict=True)
        if 0 <= step < sizes.steps
        and slot != pad_slot_id and 0 <= slot < sizes.num_slots
        and buffer != pad_slot_id and 0 <= buffer < sizes.num_buffers
    ]  # fmt: skip


def tree_parents_from_links(next_token, next_sibling) -> np.ndarray:
    """Parents of the nodes of draft trees; see `contract.check_tree_parents_from_links`."""
    batch, nodes = contract.check_tree_parents_from_links(next_token, next_sibling)
    parents = np.zeros((batch, nodes), np.int32)  # a node that nobody names hangs on the root
    parents[:, :1] = -1
    children, siblings = _integers(next_token), _integers(next_sibling)
    for row in range(batch):
        for node in range(nodes):  # a parent and an elder sibling have smaller numbers
            if node < children[row][node] < nodes:
                parents[row, children[row][node]] = node
            if node < siblings[row][node] < nodes:
                parents[row, siblings[row][node]] = parents[row, node]
    return parents


def preactivation(
    op: str, arguments: Mapping[str, Any], order: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """The unrounded sums of a call.

    Args:
      op: "causal_conv1d_fn" or "causal_conv1d_update".
      arguments: the call's arguments by name.
      order: "float64"; "float32", the contract's order of float32 fused multiply-adds, start at the bias,
        taps oldest to newest; or "magnitude", |bias| + sum |w x| in float64.

    Returns:
      The sums as float64 in the shape of out (in one part), zero where nothing is computed, and a bool array of
      that shape that is True where something is.
    """
    rows = plan(op, arguments)
    result = _run(_SUMS[order], arguments, rows)
    return result.sums, result.computed


def finished(sums: np.ndarray, arguments: Mapping[str, Any]) -> np.ndarray:
    """What is rounded and stored: activation, then residual, of sums that are computed; in float64."""
    result = silu(sums) if arguments.get("activation") else sums
    if arguments.get("residual") is not None:
        with np.errstate(invalid="ignore"):
            result = result + typed(arguments["residual"]).values()
    return result


def plan(op: str, arguments: Mapping[str, Any]) -> list[Row]:
    """The rows of a call that do something. Offsets, counts and lengths out of range are clamped."""
    given = {"bias": None, "conv_states": None, **arguments, "validate": False}
    if op == "causal_conv1d_fn":
        sizes = contract.check_causal_conv1d_fn(**given)
        rows = fn_rows(
            given.get("conv_states"), given["query_start_loc"], given.get("cache_indices"),
            given.get("has_initial_state"), sizes, given.get("pad_slot_id", -1), given.get("empty_rows", "skip"),
        )  # fmt: skip
        return _fn_stores(rows, given, sizes)
    steps = contract.check_causal_conv1d_update(**given)
    rows = update_rows(
        given.get("cache_indices"), steps, given.get("pad_slot_id", -1),
        given.get("query_start_loc"), given.get("num_accepted_tokens"),
    )  # fmt: skip
    return _update_stores(rows, given, steps)


def fn_rows(
    conv_states, query_start_loc, cache_indices, has_initial_state, sizes, pad_slot_id, empty_rows="skip"
) -> list[Row]:
    """The rows of a packed prefill that do something. Offsets are clamped to [0, tokens]."""
    offsets = _offsets(query_start_loc, sizes.tokens)
    slots = _integers(cache_indices, range(sizes.batch))
    has = _integers(has_initial_state, [False] * sizes.batch)
    rows = []
    for i in range(sizes.batch):
        tokens = slice(offsets[i], max(offsets[i + 1], offsets[i]))
        if tokens.start == tokens.stop and empty_rows == "skip":
            continue
        if conv_states is None:
            rows.append(Row(i, tokens, None, False))
        elif slots[i] != pad_slot_id and 0 <= slots[i] < sizes.num_slots:
            rows.append(Row(i, tokens, slots[i], has[i], target=slots[i]))
    return rows


def update_rows(
    cache_indices, sizes, pad_slot_id, query_start_loc=None, num_accepted_tokens=None
) -> list[Row]:
    """The rows of a decode step that do something, as slices of x seen as [tokens, dim].

    Offsets are clamped to [0, tokens], counts to what a slot can hold.
    """
    slots = _integers(cache_indices, range(sizes.batch))
    if query_start_loc is None:
        offsets = [i * sizes.seqlen for i in range(sizes.batch + 1)]
    else:
        offsets = _offsets(query_start_loc, sizes.tokens)
    columns = [0] * sizes.batch
    if num_accepted_tokens is not None:
        last = sizes.state_len - sizes.width + 1
        columns = [min(max(count - 1, 0), last) for count in _integers(num_accepted_tokens)]
    rolls = num_accepted_tokens is not None
    return [
        Row(i, slice(offsets[i], offsets[i + 1]), slot, True, target=slot, column=columns[i], rolls=rolls)
        for i, slot in enumerate(slots)
        if slot != pad_slot_id and 0 <= slot < sizes.num_slots and offsets[i] < offsets[i + 1]
    ]


def _fn_stores(rows: list[Row], given: Mapping[str, Any], sizes: FnSizes) -> list[Row]:
    """Completes the rows of a prefill by what they store, and where."""
    if given.get("conv_states") is None:
        return rows
    tracks, lengths = _integers(given.get("track_indices")), _integers(given.get("track_lengths"))
    blocks, computed = _integers(given.get("snapshot_indices")), _integers(given.get("num_computed_tokens"))
    size = given.get("snapshot_block_size") or 1
    planned = []
    for row in _with_slots(rows, given, sizes.num_slots):
        count = row.tokens.stop - row.tokens.start
        extra = []
        if blocks is not None:
            before = 0 if computed is None else max(computed[row.row], 0)
            for k, slot in enumerate(blocks[row.row]):
                if before < (k + 1) * size <= before + count:
                    extra.append((slot, (k + 1) * size - before))
        if tracks is not None:
            after = count if lengths is None else min(max(lengths[row.row], 0), count)
            extra.append((tracks[row.row], after))
        planned.append(row._replace(extra=_stored(extra, given, sizes.num_slots)))
    return planned


def _update_stores(rows: list[Row], given: Mapping[str, Any], sizes: UpdateSizes) -> list[Row]:
    """Completes the rows of a decode step by what they store, and where."""
    tracks, parents = _integers(given.get("track_indices")), _integers(given.get("tree_parents"))
    windows = given.get("window_out")
    buffers = _integers(given.get("window_indices"), range(sizes.batch))
    planned = []
    for row in _with_slots(rows, given, sizes.num_slots):
        if tracks is not None:
            after = row.tokens.stop - row.tokens.start
            row = row._replace(extra=_stored([(tracks[row.row], after)], given, sizes.num_slots))
        if windows is not None:
            buffer = buffers[row.row]
            stored = buffer != given.get("pad_slot_id", -1) and 0 <= buffer < windows.shape[0]
            row = row._replace(buffer=buffer if stored else None)
        if parents is not None:
            row = row._replace(parents=parents[row.row])
        if not given.get("commit", True):
            row = row._replace(target=None)
        planned.append(row)
    return planned


def _with_slots(rows: list[Row], given: Mapping[str, Any], num_slots: int) -> Iterator[Row]:
    """Completes rows by their write slots, the layout, and how many tokens came before."""
    targets, seen = _integers(given.get("write_indices")), _integers(given.get("cache_seqlens"))
    layout, pad = given.get("state_layout", "front"), given.get("pad_slot_id", -1)
    for row in rows:
        if targets is not None:
            target = targets[row.row]
            row = row._replace(target=target if target != pad and 0 <= target < num_slots else None)
        if seen is not None:
            row = row._replace(seen=max(seen[row.row], 0))
        yield row._replace(layout=layout)


def _stored(extra: list[tuple[int, int]], given: Mapping[str, Any], num_slots: int):
    pad = given.get("pad_slot_id", -1)
    return tuple((slot, after) for slot, after in extra if slot != pad and 0 <= slot < num_slots)


def _offsets(query_start_loc, tokens: int) -> list[int]:
    offsets = np.clip(typed(query_start_loc).data.astype(np.int64), 0, tokens).tolist()
    offsets[0] = 0
    return offsets


def _integers(array, default=None):
    """An integer or bool array as (nested) lists; `default` for None."""
    return default if array is None else typed(array).data.tolist()


def _call(op: str, arguments: dict[str, Any]):
    """One call: checks, sums, the one rounding, states."""
    sizes = getattr(contract, f"check_{op}")(**arguments)
    if arguments["validate"]:
        values.check_call(op, arguments, sizes)
    result = _run(_sum_float64, arguments, plan(op, arguments))
    out = np.where(result.computed, finished(result.sums, arguments), 0.0)  # whatever no row computes is zero
    dtype = typed(arguments["x"]).dtype
    parts = np.split(out, np.cumsum(arguments["split_sizes"] or ())[:-1].astype(int), axis=-1)
    parts = [_like(arguments["x"], from_bits(round_bits(part, dtype), dtype)) for part in parts]
    return (
        tuple(parts) if arguments["split_sizes"] else parts[0],
        None if result.pool is None else _like(arguments["conv_states"], result.pool),
        None if result.windows is None else _like(arguments["window_out"], result.windows),
    )


class _Result(NamedTuple):
    sums: np.ndarray
    computed: np.ndarray
    pool: TypedArray | None
    windows: TypedArray | None


def _run(add_up: Callable, arguments: Mapping[str, Any], rows: list[Row]) -> _Result:
    """Runs `rows`: the sums and where there are any, both in out's shape, the new pool, the windows per step."""
    x, weight, bias = typed(arguments["x"]), typed(arguments["weight"]), arguments.get("bias")
    dim, width = weight.shape
    first = arguments.get("channel_offset") or 0
    x = TypedArray(x.dtype, x.data[..., first : first + dim])
    shape, x = x.shape, TypedArray(x.dtype, np.ascontiguousarray(x.data).reshape(-1, dim))
    w = weight.values()
    b = np.zeros(dim) if bias is None else typed(bias).values()
    old = None if arguments.get("conv_states") is None else typed(arguments["conv_states"])
    pool = None if old is None else old.copy()
    windows = None if arguments.get("window_out") is None else typed(arguments["window_out"]).copy()

    sums, computed = np.zeros(x.shape), np.zeros(x.shape, dtype=bool)
    for row in rows:
        inputs = TypedArray(x.dtype, x.data[row.tokens])
        window = reference_states.window(old, row, width - 1, dim, x.dtype)
        e = np.concatenate([window.values(), inputs.values()])
        with np.errstate(invalid="ignore", over="ignore"):  # x may hold NaN and infinities
            if row.parents is None:
                sums[row.tokens] = add_up(e, w, b)
            else:
                for node in range(len(inputs.data)):
                    taps = reference_states.chain(row.parents, node, width)
                    sums[row.tokens.start + node] = add_up(e[taps], w, b)[0]
        computed[row.tokens] = True
        if pool is not None and old is not None:
            reference_states.store(pool, old, row, window, inputs)
        if windows is not None and row.buffer is not None:
            reference_states.store_windows(windows, row, window, inputs)
    return _Result(sums.reshape(shape), computed.reshape(shape), pool, windows)


def _sum_float64(e: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`pre[t] = b + sum_j w[:, j] * e[t + j]`, e of shape [width - 1 + tokens, dim], in float64."""
    width = w.shape[1]
    tokens = len(e) - (width - 1)
    pre = np.tile(b, (tokens, 1))
    for j in range(width):
        pre += w[:, j] * e[j : j + tokens]
    return pre


def _sum_float32(e: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The same sum by float32 fused multiply-adds, in the contract's order; float32 values in float64."""
    width = w.shape[1]
    tokens = len(e) - (width - 1)
    e, w = e.astype(np.float32), w.astype(np.float32)
    acc = np.tile(b.astype(np.float32), (tokens, 1))
    for j in range(width):
        acc = fma_float32(w[:, j], e[j : j + tokens], acc)
    return acc.astype(np.float64)


def _sum_magnitude(e: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`|b| + sum_j |w[:, j] * e[t + j]|` in float64: what rounding errors are relative to."""
    return _sum_float64(np.abs(e), np.abs(w), np.abs(b))


_SUMS = {"float64": _sum_float64, "float32": _sum_float32, "magnitude": _sum_magnitude}


def _like(argument, result: TypedArray):
    """A result in the form its argument came in: a TypedArray, or a NumPy array of the argument's dtype."""
    return result if isinstance(argument, TypedArray) else result.data.view(np.asarray(argument).dtype)
