"""The contract of the operations: signatures, axes, dtypes, limits, errors and their one validation.

Standard library only. The checks read nothing but shapes, dtypes and host values, so the same code
serves NumPy arrays, Torch tensors, fake tensors and JAX tracers. `check_causal_conv1d_fn` and
`check_causal_conv1d_update` carry *the* signatures; every implementation repeats them exactly. So does
`check_causal_conv1d`, of the differentiable form for training.

The value. With `e = window ++ x` of a row (`window` = zeros when the row has no state):

    pre[t] = bias + sum(weight[:, j] * e[t + j] for j in range(width)),    out[t] = act(pre[t])

in float32, starting from the bias, taps from oldest to newest, rounded once, at the store.

The state. A row with at least one token leaves the last `width - 1` entries of `e` in columns
`0 .. width-2` of its slot (oldest first; later columns are never touched), as bit-exact copies of the
inputs, cast once if the pool has another dtype.

Rows that do nothing. A row is padding when its slot equals `pad_slot_id` or lies outside
`[0, num_slots)`; padding rows and rows of zero tokens touch no slot. Outputs of padding rows and of
tokens at or after `query_start_loc[-1]` are zero: every element of `out` is written.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

CONTRACT_VERSION = 1

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
OFFSET_DTYPES = ("int32", "int64")
INDEX_DTYPES = ("int32", "int64", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
MASK_DTYPES = ("bool",)
ACTIVATIONS = (None, "silu", "swish")
SCHEDULES = ("auto", "per_sequence", "flat")
WIDTH_MIN, WIDTH_MAX = 1, 8


class Unsupported(NotImplementedError):
    """The call is valid by the contract, but this implementation, backend or device cannot run it."""


class ConvOutput(NamedTuple):
    """Result of both operations.

    Attributes:
      out: same shape and dtype as `x`.
      conv_states: the pool after the call; None if none was given. Torch: the very tensor passed in,
        updated in place. JAX and NumPy: a new array. Of the differentiable form, the new states.
    """

    out: Any
    conv_states: Any


class FnSizes(NamedTuple):
    """Sizes of a checked `causal_conv1d_fn` call; `num_slots` and `state_len` are 0 without a pool."""

    tokens: int
    dim: int
    width: int
    batch: int
    num_slots: int
    state_len: int


class UpdateSizes(NamedTuple):
    """Sizes of a checked `causal_conv1d_update` call.

    `seqlen` is 1 for `x` of two axes. With `query_start_loc` it is None, and `tokens` counts the packed rows.
    """

    batch: int
    seqlen: int | None
    dim: int
    width: int
    num_slots: int
    state_len: int
    tokens: int


class RowSizes(NamedTuple):
    """Sizes of a checked `causal_conv1d` call; `tokens` is batch * seqlen for `x` of three axes."""

    tokens: int
    dim: int
    width: int
    batch: int


def check_causal_conv1d_fn(
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
) -> FnSizes:
    """Checks the shapes, dtypes and options of a packed prefill; reads no data.

    Args:
      x: [tokens, dim] float32, float16 or bfloat16; the rows of all sequences, packed.
      weight: [dim, width] float; `weight[:, width-1]` meets the newest token; width 1..8.
      bias: [dim] float, or None.
      conv_states: [num_slots, state_len, dim] float with state_len >= width-1, oldest first; or None:
        rows start from zeros and nothing is stored.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; starts at 0, may
        end before `tokens`.
      cache_indices: [batch] integer slots, or None: row i uses slot i. Needs `conv_states`.
      has_initial_state: [batch] bool, or None: no row has a state. Needs `conv_states`.
      activation: None, "silu" or its alias "swish".
      pad_slot_id: the slot number that marks a padding row.
      max_seqlen: host int, an upper bound of the longest row, or None.
      schedule: "auto", "per_sequence" or "flat".
      backend: "auto" or a name of the implementation (checked by `check_backend`).
      validate: True to let the implementation read the index data and reject bad values.

    Raises:
      ValueError: a shape or an option is wrong.
      TypeError: a dtype or the type of an option is wrong.
    """
    tokens, dim = _shape("x", x, ("tokens", "dim"))
    _dtype("x", x, FLOAT_DTYPES)
    width = _check_weight(weight, bias, dim)
    num_slots, state_len = (0, 0) if conv_states is None else _check_pool(conv_states, dim, width)

    batch = _check_offsets(query_start_loc)

    if conv_states is None:
        for name, value in (("cache_indices", cache_indices), ("has_initial_state", has_initial_state)):
            if value is not None:
                raise ValueError(
                    f"{name}: expected None, since conv_states is None and there is no slot to name"
                )
    _check_indices(cache_indices, batch, num_slots, conv_states is not None)
    if has_initial_state is not None:
        _shape("has_initial_state", has_initial_state, ("batch",), (batch,))
        _dtype("has_initial_state", has_initial_state, MASK_DTYPES)

    _check_options(activation, pad_slot_id, validate)
    _check_schedule(max_seqlen, schedule)
    return FnSizes(tokens, dim, width, batch, num_slots, state_len)


def check_causal_conv1d_update(
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
) -> UpdateSizes:
    """Checks the shapes, dtypes and options of a decode step; reads no data.

    Every row continues from its slot (there is no `has_initial_state`).

    Without `num_accepted_tokens` all tokens are committed: the slot's columns 0 .. width-2 hold the last
    width-1 inputs afterwards. With it, the slot rolls, for speculative decoding: a row whose previous step
    had `a` tokens accepted finds its window in columns a-1 .. a+width-3, and a row of n tokens leaves
    `window[1:] ++ x` in columns 0 .. width+n-3, so that the next step's count picks the right window again.
    A prefill and an update without counts leave the window where a count of 1 finds it.

    Args:
      x: [batch, dim], [batch, seqlen, dim] for several tokens a row, or [tokens, dim] with `query_start_loc`;
        float32, float16 or bfloat16.
      weight: [dim, width] float; width 1..8.
      bias: [dim] float, or None.
      conv_states: [num_slots, state_len, dim] float with state_len >= width-1; with `num_accepted_tokens`,
        state_len >= width-1 + n-1 for rows of up to n tokens.
      cache_indices: [batch] integer slots, or None: row i uses slot i.
      query_start_loc: [batch+1] int32 or int64: row i owns tokens `[i]` to `[i+1]` of x, none or more; or None.
      num_accepted_tokens: [batch] integer, how many tokens of each row's previous step were accepted, at least
        1, or None. It may exceed the tokens of this step. Values out of range are taken as the nearest in range.
      max_seqlen: host int, an upper bound of the longest row; only with `query_start_loc`, and required there
        with `num_accepted_tokens`.
      activation: None, "silu" or "swish".
      pad_slot_id: the slot number that marks a padding row.
      backend: "auto" or a name of the implementation (checked by `check_backend`).
      validate: True to let the implementation read the index data and reject bad values.

    Raises:
      ValueError: a shape or an option is wrong.
      TypeError: a dtype or the type of an option is wrong.
    """
    shape = _shape_of("x", x)
    if query_start_loc is not None:
        tokens, dim = _shape("x", x, ("tokens", "dim"))
        batch = _check_offsets(query_start_loc)
        seqlen = None
    elif len(shape) == 2:
        (batch, dim), seqlen, tokens = shape, 1, shape[0]
    elif len(shape) == 3:
        batch, seqlen, dim = shape
        tokens = batch * seqlen
        if dim < 1:
            raise ValueError(f"x: expected shape [batch, seqlen, dim] with dim >= 1, got {list(shape)}")
    else:
        raise ValueError(f"x: expected shape [batch, dim] or [batch, seqlen, dim], got {list(shape)}")
    if dim < 1:
        raise ValueError(f"x: expected dim >= 1, got shape {list(shape)}")
    _dtype("x", x, FLOAT_DTYPES)
    width = _check_weight(weight, bias, dim)
    if conv_states is None:
        raise ValueError(
            "conv_states: expected shape [num_slots, state_len, dim], got None "
            "(an update continues from a state; a stateless call is causal_conv1d_fn)"
        )
    num_slots, state_len = _check_pool(conv_states, dim, width)
    _check_indices(cache_indices, batch, num_slots, True)
    if max_seqlen is not None:
        if query_start_loc is None:
            raise ValueError(f"max_seqlen: expected None, since query_start_loc is None, got {max_seqlen!r}")
        if _host_int("max_seqlen", max_seqlen) < 0:
            raise ValueError(f"max_seqlen: expected None or an integer >= 0, got {max_seqlen}")
    if num_accepted_tokens is not None:
        _shape("num_accepted_tokens", num_accepted_tokens, ("batch",), (batch,))
        _dtype("num_accepted_tokens", num_accepted_tokens, INDEX_DTYPES)
        longest = max_seqlen if seqlen is None else seqlen
        if longest is None:
            raise ValueError(
                "max_seqlen: expected an integer, since query_start_loc and num_accepted_tokens are given "
                "(a slot must be wide enough for the longest row), got None"
            )
        if width > 1 and state_len < width - 2 + longest:
            raise ValueError(
                f"conv_states: expected state_len >= width-1 + {longest}-1 = {width - 2 + longest} on axis 1 for "
                f"rows of up to {longest} tokens with num_accepted_tokens, got {state_len}"
            )
    _check_options(activation, pad_slot_id, validate)
    return UpdateSizes(batch, seqlen, dim, width, num_slots, state_len, tokens)


def check_causal_conv1d(
    x,
    weight,
    bias=None,
    initial_states=None,
    query_start_loc=None,
    *,
    activation=None,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
) -> RowSizes:
    """Checks the shapes, dtypes and options of the differentiable form; reads no data.

    It mutates nothing. Its value is that of `causal_conv1d_fn` with a state of its own for every row, and its
    second result is the new states: `[batch, width-1, dim]` in the dtype of `initial_states`, or of x without
    them. A row of zero tokens returns its initial state. It is differentiable in x, weight, bias and
    initial_states, through both results; tokens at or after `query_start_loc[-1]` have gradient zero.

    Args:
      x: [tokens, dim] with `query_start_loc`, or [batch, seqlen, dim] without; float32, float16 or bfloat16.
      weight: [dim, width] float; width 1..8.
      bias: [dim] float, or None.
      initial_states: [batch, width-1, dim] float, oldest first; or None: rows start from zeros.
      query_start_loc: [batch+1] int32 or int64, as in `causal_conv1d_fn`; None: x has three axes.
      activation: None, "silu" or "swish".
      max_seqlen: host int, an upper bound of the longest row, or None; ignored without `query_start_loc`.
      schedule: "auto", "per_sequence" or "flat".
      backend: "auto" or a name of the implementation (checked by `check_backend`).

    Raises:
      ValueError: a shape or an option is wrong.
      TypeError: a dtype or the type of an option is wrong.
    """
    if query_start_loc is None:
        shape = _shape_of("x", x)
        if len(shape) != 3 or shape[2] < 1:
            raise ValueError(
                "x: expected shape [batch, seqlen, dim] with dim >= 1, since query_start_loc is None, "
                f"got {list(shape)}"
            )
        batch, seqlen, dim = shape
        tokens = batch * seqlen
    else:
        tokens, dim = _shape("x", x, ("tokens", "dim"))
        batch = _check_offsets(query_start_loc)
    _dtype("x", x, FLOAT_DTYPES)
    width = _check_weight(weight, bias, dim)
    if initial_states is not None:
        _shape("initial_states", initial_states, ("batch", "width-1", "dim"), (batch, width - 1, dim))
        _dtype("initial_states", initial_states, FLOAT_DTYPES)
    _check_activation(activation)
    _check_schedule(max_seqlen, schedule)
    return RowSizes(tokens, dim, width, batch)


def check_backend(backend, names: Sequence[str]) -> None:
    """Raises ValueError unless `backend` is "auto" or one of an implementation's `names`."""
    if backend != "auto" and backend not in names:
        raise ValueError(f"backend: expected one of {('auto', *names)}, got {backend!r}")


def check_fn_values(
    query_start_loc: Sequence[int],
    cache_indices: Sequence[int] | None,
    tokens: int,
    num_slots: int | None,
    pad_slot_id: int,
    max_seqlen: int | None,
) -> None:
    """Checks the index data of a packed prefill, read to the host; `num_slots` is None without a pool.

    Raises:
      ValueError: offsets that do not start at 0, decrease or exceed `tokens`; a row longer than
        `max_seqlen`; a slot that is neither `pad_slot_id` nor in range; two live rows on one slot.
    """
    lengths = _row_lengths(query_start_loc, tokens, max_seqlen)
    if num_slots is not None:
        _check_slot_values(cache_indices, lengths, num_slots, pad_slot_id)


def check_update_values(
    cache_indices: Sequence[int] | None,
    sizes: UpdateSizes,
    pad_slot_id: int,
    query_start_loc: Sequence[int] | None = None,
    num_accepted_tokens: Sequence[int] | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Checks the index data of a decode step, read to the host.

    Raises:
      ValueError: as `check_fn_values`; a count of a live row below 1, or beyond what its slot can hold.
    """
    if query_start_loc is None:
        lengths = [sizes.seqlen or 0] * sizes.batch
    else:
        lengths = _row_lengths(query_start_loc, sizes.tokens, max_seqlen)
    _check_slot_values(cache_indices, lengths, sizes.num_slots, pad_slot_id)
    if num_accepted_tokens is None:
        return
    largest = sizes.state_len - sizes.width + 2
    for row, (count, length) in enumerate(zip(num_accepted_tokens, lengths, strict=True)):
        slot = row if cache_indices is None else cache_indices[row]
        if length and slot != pad_slot_id and not 1 <= count <= largest:
            raise ValueError(
                f"num_accepted_tokens: expected 1 to {largest}, which slots of state_len={sizes.state_len} can "
                f"hold, in row {row}, got {count}"
            )


def dtype_name(dtype: Any) -> str:
    """Returns "bfloat16", "int32", ... for a NumPy, Torch or JAX dtype."""
    try:
        return _DTYPE_NAMES[dtype]
    except KeyError:
        name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
        _DTYPE_NAMES[dtype] = name
        return name
    except TypeError:  # not hashable, so no dtype object
        return str(dtype)


_DTYPE_NAMES: dict[Any, str] = {}


def _shape_of(name: str, value: Any) -> tuple:
    try:
        return tuple(value.shape)
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from None


def _shape(name: str, value: Any, axes: tuple[str, ...], sizes: tuple[int | None, ...] = ()) -> tuple:
    shape = _shape_of(name, value)
    fits = len(shape) == len(axes) and all(
        want is None or got == want for got, want in zip(shape, sizes, strict=False)
    )
    if not fits or ("dim" in axes and shape[axes.index("dim")] < 1):
        known = dict(zip(axes, sizes, strict=False))
        text = ", ".join(a if known.get(a) is None else f"{a}={known[a]}" for a in axes)
        limit = " with dim >= 1" if fits else ""
        raise ValueError(f"{name}: expected shape [{text}]{limit}, got {list(shape)}")
    return shape


def _dtype(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    got = dtype_name(value.dtype)
    if got not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(allowed)}, got {got}")


def _check_weight(weight: Any, bias: Any, dim: int) -> int:
    shape = _shape("weight", weight, ("dim", "width"), (dim, None))
    _dtype("weight", weight, FLOAT_DTYPES)
    width = shape[1]
    if not WIDTH_MIN <= width <= WIDTH_MAX:
        raise ValueError(f"weight: expected width {WIDTH_MIN} to {WIDTH_MAX} on axis 1, got {width}")
    if bias is not None:
        _shape("bias", bias, ("dim",), (dim,))
        _dtype("bias", bias, FLOAT_DTYPES)
    return width


def _check_pool(conv_states: Any, dim: int, width: int) -> tuple[int, int]:
    axes = ("num_slots", "state_len", "dim")
    num_slots, state_len, _ = _shape("conv_states", conv_states, axes, (None, None, dim))
    _dtype("conv_states", conv_states, FLOAT_DTYPES)
    if state_len < width - 1:
        raise ValueError(
            f"conv_states: expected state_len >= width-1 = {width - 1} on axis 1, got {state_len}"
        )
    return num_slots, state_len


def _check_offsets(query_start_loc: Any) -> int:
    """Returns the number of rows."""
    (offsets,) = _shape("query_start_loc", query_start_loc, ("batch+1",))
    _dtype("query_start_loc", query_start_loc, OFFSET_DTYPES)
    if offsets < 1:
        raise ValueError("query_start_loc: expected shape [batch+1] with at least one entry, got [0]")
    return offsets - 1


def _check_indices(cache_indices: Any, batch: int, num_slots: int, pooled: bool) -> None:
    if cache_indices is not None:
        _shape("cache_indices", cache_indices, ("batch",), (batch,))
        _dtype("cache_indices", cache_indices, INDEX_DTYPES)
    elif pooled and batch > num_slots:
        raise ValueError(
            f"conv_states: expected num_slots >= batch = {batch}, since cache_indices is None, got {num_slots}"
        )


def _check_activation(activation: Any) -> None:
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")


def _check_options(activation: Any, pad_slot_id: Any, validate: Any) -> None:
    _check_activation(activation)
    _host_int("pad_slot_id", pad_slot_id)
    if validate is not True and validate is not False:
        raise TypeError(f"validate: expected True or False, got {validate!r}")


def _check_schedule(max_seqlen: Any, schedule: Any) -> None:
    if max_seqlen is not None and _host_int("max_seqlen", max_seqlen) < 0:
        raise ValueError(f"max_seqlen: expected None or an integer >= 0, got {max_seqlen}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")


def _host_int(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    try:
        if isinstance(value, bool) or (hasattr(value, "shape") and not hasattr(value, "item")):
            raise TypeError
        return operator.index(value)
    except Exception:
        raise TypeError(f"{name}: expected an integer known on the host, got {value!r}") from None


def _row_lengths(query_start_loc: Sequence[int], tokens: int, max_seqlen: int | None) -> list[int]:
    if query_start_loc[0] != 0:
        raise ValueError(f"query_start_loc: expected entry 0 to be 0, got {query_start_loc[0]}")
    lengths = []
    for row in range(len(query_start_loc) - 1):
        start, end = query_start_loc[row], query_start_loc[row + 1]
        if not start <= end <= tokens:
            raise ValueError(
                f"query_start_loc: expected row {row} to end between its start {start} and tokens={tokens}, got {end}"
            )
        if max_seqlen is not None and end - start > max_seqlen:
            raise ValueError(
                f"max_seqlen: expected at least {end - start}, the length of row {row}, got {max_seqlen}"
            )
        lengths.append(end - start)
    return lengths


def _check_slot_values(
    cache_indices: Sequence[int] | None, lengths: Sequence[int], num_slots: int, pad_slot_id: int
) -> None:
    slots = range(len(lengths)) if cache_indices is None else cache_indices
    owner: dict[int, int] = {}
    for row, slot in enumerate(slots):
        if slot == pad_slot_id:
            continue
        if not 0 <= slot < num_slots:
            raise ValueError(
                f"cache_indices: expected pad_slot_id={pad_slot_id} or a slot in [0, {num_slots}) "
                f"in row {row}, got {slot}"
            )
        if lengths[row] == 0:  # touches no slot, so it may name a live one
            continue
        if slot in owner:
            raise ValueError(
                f"cache_indices: expected distinct slots for live rows, got {slot} in rows {owner[slot]} and {row}"
            )
        owner[slot] = row
