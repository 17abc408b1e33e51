"""The contract of the operations: signatures, axes, dtypes, limits, errors and their one validation.

Standard library only. The checks read nothing but shapes, dtypes and host values, so the same code
serves NumPy arrays, Torch tensors, fake tensors and JAX tracers. One record stands for a call of each operation:
its fields are *the* arguments, in the order and with the defaults of the signature, which every implementation
repeats exactly; its docstring says what they mean, `check()` whether they fit. See `RECORDS`.

The value. With `e = window ++ x` of a row (`window` = zeros when the row has no state):

    pre[t] = bias + sum(weight[:, j] * e[t + j] for j in range(width)),    out[t] = act(pre[t])

in float32, starting from the bias, taps from oldest to newest, rounded once, at the store.

The state. A row with at least one token leaves the last `width - 1` entries of `e` in columns
`0 .. width-2` of its slot (oldest first; later columns are never touched), as bit-exact copies of the
inputs, cast once if the pool has another dtype.

Rows that do nothing. A row is padding when its slot equals `pad_slot_id` or lies outside
`[0, num_slots)`; padding rows and rows of zero tokens touch no slot. Outputs of padding rows and of
tokens at or after `query_start_loc[-1]` are zero: every element of `out` is written.

Where the window lies. `state_layout` "front" is the above. "back": the slot is the last `state_len` inputs of
the row, oldest first, and the window its last `width-1` columns; a call leaves the last `state_len` entries of
`slot ++ x`, and a fresh row counts its old slot as zeros. "ring": token `n` of a sequence lives in column
`n mod state_len`, and `cache_seqlens` says how many tokens the row consumed before this call; a fresh row
first clears its slot. The caller advances that counter.

Other slots. `write_indices` names the slot that receives a row's new state (None: the slot it reads); a live
row whose write slot is `pad_slot_id` or out of range stores nothing. "front" writes the window's columns of
that slot, "back" and "ring" all of them, a rolling step all that it keeps. `snapshot_indices` and
`track_indices` name further slots that receive one window each.

Index data. An integer is what its dtype says, also a uint64 from 2**63 on: as a slot it is out of range, as a
count, counter or parent the nearest in range counts. Nothing in the data can make a call touch other memory.

Host integers. An argument that is one takes whatever `operator.index` takes, NumPy's integers among it, but no
bool, and no array of any library: reading one may wait for a device, so it is refused unread. Implementations get
plain ints (`normalised`). A size may be a symbol of a tracer (`torch.SymInt`, a dimension of `jax.export`): equal
sizes must then be the same symbol, while an inequality that is not known is taken to hold, so that no trace is
specialised by a check. `pad_slot_id` may be any integer; one that no slot can have marks none.

Memory. An array that a call updates shares none with another argument, nor with itself (`check_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias, TypeVar, get_args, get_type_hints

from oracle import contract_memory, contract_values
from oracle.contract_checks import (
    ACTIVATIONS,
    EMPTY_ROWS,
    FLOAT_DTYPES,
    INDEX_DTYPES,
    MASK_DTYPES,
    OFFSET_DTYPES,
    SCHEDULES,
    SPLITS_MAX,
    STATE_LAYOUTS,
    WIDTH_MAX,
    WIDTH_MIN,
    below,
    check_activation,
    check_array,
    check_buffers,
    check_channels,
    check_choice,
    check_dtype,
    check_flag,
    check_layout,
    check_max_seqlen,
    check_offsets,
    check_options,
    check_pool,
    check_rows,
    check_schedule,
    check_shape,
    check_slots,
    check_split,
    check_track,
    check_tree,
    check_weight,
    check_window_out,
    dtype_name,
    host_float,
    host_int,
    shape_of,
    shown,
)
from oracle.contract_memory import Memory
from oracle.contract_short import (
    CACHE_LAYOUTS,
    WEIGHT_LAYOUTS,
    ShortConvCall,
    ShortConvSizes,
    check_lengths,
)

__all__ = [
    "ACTIVATIONS",
    "CACHE_LAYOUTS",
    "CONTRACT_VERSION",
    "EMPTY_ROWS",
    "FLOAT_DTYPES",
    "INDEX_DTYPES",
    "MASK_DTYPES",
    "OFFSET_DTYPES",
    "RECORDS",
    "SCHEDULES",
    "SPLITS_MAX",
    "STATE_LAYOUTS",
    "WEIGHT_LAYOUTS",
    "WIDTH_MAX",
    "WIDTH_MIN",
    "Array",
    "CommitCall",
    "CommitSizes",
    "ConvOutput",
    "ConvWindowOutput",
    "FnCall",
    "FnSizes",
    "IndexArray",
    "Integer",
    "LinksCall",
    "LinksSizes",
    "Memory",
    "OnHost",
    "RowSizes",
    "RowsCall",
    "ShortConvCall",
    "ShortConvSizes",
    "Size",
    "Sizes",
    "Unsupported",
    "UpdateCall",
    "UpdateSizes",
    "WrittenArray",
    "check_backend",
    "check_lengths",
    "check_memory",
    "dtype_name",
    "given_arrays",
    "host_int",
    "normalised",
    "record",
]

CONTRACT_VERSION = 1


class Unsupported(NotImplementedError):
    """The call is valid by the contract, but this implementation, backend or device cannot run it."""


class ConvOutput(NamedTuple):
    """Result of both operations.

    Attributes:
      out: same shape and dtype as `x`; with `channel_offset`, dim channels; with `split_sizes`, a tuple of arrays.
      conv_states: the pool after the call; None if none was given. Torch: the very tensor passed in,
        updated in place. JAX and NumPy: a new array. Of the differentiable form, the new states.
    """

    out: Any
    conv_states: Any


class ConvWindowOutput(NamedTuple):
    """Result of `causal_conv1d_update` with `window_out`.

    Attributes:
      out, conv_states: as in `ConvOutput`.
      window_out: the windows after the call. Torch: the very tensor passed in. JAX and NumPy: a new array.
    """

    out: Any
    conv_states: Any
    window_out: Any


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


class CommitSizes(NamedTuple):
    """Sizes of a checked `commit_windows` call; `history` is width-1."""

    batch: int
    num_slots: int
    state_len: int
    num_buffers: int
    steps: int
    history: int
    dim: int


class LinksSizes(NamedTuple):
    """Sizes of a checked `tree_parents_from_links` call."""

    batch: int
    nodes: int


class RowSizes(NamedTuple):
    """Sizes of a checked `causal_conv1d` call; `tokens` is batch * seqlen for `x` of three axes."""

    tokens: int
    dim: int
    width: int
    batch: int


# What a field of a record is. In the records below "array" is read, never kept on the host; "index array" holds
# offsets, slots, counts or flags, which `check_values` reads; "written array" is updated by the call; "integer" is a
# host integer; "size" and "sizes" are host integers that may be a tracer's symbols; "float" is a number on the host;
# others are Python's own types.
Array: TypeAlias = Annotated[Any, "array"]
IndexArray: TypeAlias = Annotated[Any, "index array"]
WrittenArray: TypeAlias = Annotated[Any, "written array"]
Integer: TypeAlias = Annotated[Any, "integer"]
Size: TypeAlias = Annotated[Any, "size"]
Sizes: TypeAlias = Annotated[Any, "sizes"]

RECORDS: dict[str, Any] = {}  # the record of each operation, by the operation's name

Record = TypeVar("Record", bound=Any)
OnHost: TypeAlias = Callable[[str, Any], Any]


def record(
    operation: str, *, positional: int, registry: dict[str, Any] = RECORDS
) -> Callable[[Record], Record]:
    """Registers a record and says, from the annotations of its fields, which arguments of the call are what.

    The record gets these attributes, all but the first two tuples of field names in the signature's order:

      OPERATION: the operation's name.
      POSITIONAL: how many arguments are positional; the others are keyword only.
      ARRAYS: every array; WRITTEN: those that the call updates; INDICES: those that `check_values` reads.
      OPTIONS: everything else; INTEGERS: those that are host integers; FLOATS: those that are numbers on the host.
      OPTIONAL: fields that may be None.
      REQUIRED: keywords without a default: fields that may not be None, but are where nothing is given.
      KINDS: not a tuple but {field: kind}, a kind being "array", "index array", "written array", "integer", "size",
        "sizes", "float", "str" or "bool".
    """

    def register(record: Any) -> Any:
        hints = get_type_hints(record, globals(), include_extras=True)
        kinds, optional = {}, []
        for name in record._fields:
            hint = hints[name]
            if type(None) in get_args(hint):
                optional.append(name)
                hint = get_args(hint)[0]
            kinds[name] = hint.__metadata__[0] if hasattr(hint, "__metadata__") else hint.__name__
        record.OPERATION, record.POSITIONAL = operation, positional
        record.KINDS, record.OPTIONAL = kinds, tuple(optional)
        record.ARRAYS = tuple(name for name, kind in kinds.items() if kind.endswith("array"))
        record.WRITTEN = tuple(name for name, kind in kinds.items() if kind == "written array")
        record.INDICES = tuple(name for name, kind in kinds.items() if kind == "index array")
        record.OPTIONS = tuple(name for name in kinds if name not in record.ARRAYS)
        record.INTEGERS = tuple(name for name, kind in kinds.items() if kind in ("integer", "size", "sizes"))
        record.FLOATS = tuple(name for name, kind in kinds.items() if kind == "float")
        defaults = record._field_defaults
        record.REQUIRED = tuple(
            name for name in defaults if defaults[name] is None and name not in record.OPTIONAL
        )
        registry[operation] = record
        return record

    return register


@record("causal_conv1d_fn", positional=7)
class FnCall(NamedTuple):
    """A packed prefill.

    Attributes:
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
      backend: "auto" or a name of the implementation (`check_backend`).
      validate: True to let the implementation read the index data and reject bad values.
      state_layout: "front", "back" or "ring": where the window lies in a slot.
      cache_seqlens: [batch] integer, tokens of each row before this call; with "ring", and only there. Below 0
        counts as 0.
      write_indices: [batch] integer slots that receive the new states, or None: the slots that are read.
      empty_rows: "skip": a row of zero tokens touches no slot. "apply": it follows the rule for any number of
        tokens: a fresh row clears its window (or slot), a row with state is copied if its write slot differs.
      snapshot_indices: [batch, blocks] integer slots, "front" only: for every k with
        c < (k+1)*snapshot_block_size <= c + L, slot `[row, k]` gets the window that ends at absolute token
        (k+1)*snapshot_block_size; c is `num_computed_tokens[row]`, L the row's tokens. Not stored where the slot
        is `pad_slot_id` or out of range. No slot may be one that the call reads or writes otherwise.
      snapshot_block_size: host int >= 1; with `snapshot_indices`, and only there.
      num_computed_tokens: [batch] integer, tokens of each row's sequence before this call, or None: 0. Below 0
        counts as 0.
      track_indices: [batch] integer slots, "front" only: one more window per row, after `track_lengths` tokens.
      track_lengths: [batch] integer, clamped to [0, L]; None: L.
      residual: [tokens, dim] float, added in float32 after the activation, before the one rounding; or None.
      channel_offset: host int o: x has any number of channels, and o to o+dim are the input; None: x has dim.
      split_sizes: 1 to 8 host ints >= 1 that add up to dim, in a tuple: `out` is a tuple of arrays, one per size.
    """

    x: Array
    weight: Array
    bias: Array | None
    conv_states: WrittenArray | None
    query_start_loc: IndexArray
    cache_indices: IndexArray | None = None
    has_initial_state: IndexArray | None = None
    activation: str | None = None
    pad_slot_id: Integer = -1
    max_seqlen: Size | None = None
    schedule: str = "auto"
    backend: str = "auto"
    validate: bool = False
    state_layout: str = "front"
    cache_seqlens: IndexArray | None = None
    write_indices: IndexArray | None = None
    empty_rows: str = "skip"
    snapshot_indices: IndexArray | None = None
    snapshot_block_size: Size | None = None
    num_computed_tokens: IndexArray | None = None
    track_indices: IndexArray | None = None
    track_lengths: IndexArray | None = None
    residual: Array | None = None
    channel_offset: Size | None = None
    split_sizes: Sizes | None = None

    def check(self) -> FnSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        tokens, dim = check_shape("x", self.x, ("tokens", "dim"))
        if self.channel_offset is not None:
            dim = check_channels(dim, self.weight, self.channel_offset)
        check_dtype("x", self.x, FLOAT_DTYPES)
        width = check_weight(self.x, self.weight, self.bias, dim)
        pooled = self.conv_states is not None
        num_slots, state_len = check_pool(self.conv_states, dim, width) if pooled else (0, 0)
        batch = check_offsets(self.query_start_loc)
        if not pooled:
            for name in (
                "cache_indices", "has_initial_state", "cache_seqlens", "write_indices", "snapshot_indices", "track_indices",
            ):  # fmt: skip
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: expected None, since conv_states is None and there is no slot to name"
                    )
        check_slots(self.cache_indices, batch, num_slots, pooled)
        check_rows("has_initial_state", self.has_initial_state, batch, MASK_DTYPES)
        check_options(self.activation, self.pad_slot_id, self.validate)
        check_schedule(self.max_seqlen, self.schedule)
        check_layout(self.state_layout, self.cache_seqlens, batch)
        check_rows("write_indices", self.write_indices, batch)
        check_choice("empty_rows", self.empty_rows, EMPTY_ROWS)
        self._check_snapshots(batch)
        check_track(self.track_indices, self.state_layout, batch)
        if self.track_lengths is not None and self.track_indices is None:
            raise ValueError("track_lengths: expected None, since track_indices is None")
        check_rows("track_lengths", self.track_lengths, batch)
        if self.residual is not None:
            check_array("residual", self.residual, ("tokens", "dim"), FLOAT_DTYPES, (tokens, dim))
        check_split(self.split_sizes, dim)
        return FnSizes(tokens, dim, width, batch, num_slots, state_len)

    def check_values(self, sizes: FnSizes, on_host: OnHost) -> None:
        """Checks the index data; see `contract_values.check_fn`. `on_host(name, array)` reads one as (nested) lists."""
        contract_values.check_fn(_on_host(self, on_host), sizes)

    def _check_snapshots(self, batch: int) -> None:
        if self.snapshot_indices is None:
            for name in ("snapshot_block_size", "num_computed_tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected None, since snapshot_indices is None")
            return
        if self.state_layout != "front":
            raise ValueError(f"snapshot_indices: expected None, since state_layout is {self.state_layout!r}")
        check_array(
            "snapshot_indices", self.snapshot_indices, ("batch", "blocks"), INDEX_DTYPES, (batch, None)
        )
        if self.snapshot_block_size is None:
            raise ValueError(
                "snapshot_block_size: expected an integer, since snapshot_indices is given, got None"
            )
        if below(host_int("snapshot_block_size", self.snapshot_block_size), 1):
            raise ValueError(f"snapshot_block_size: expected an integer >= 1, got {self.snapshot_block_size}")
        check_rows("num_computed_tokens", self.num_computed_tokens, batch)


@record("causal_conv1d_update", positional=5)
class UpdateCall(NamedTuple):
    """A decode step. Every row continues from its slot (there is no `has_initial_state`).

    Without `num_accepted_tokens` all tokens are committed: the slot's columns 0 .. width-2 hold the last
    width-1 inputs afterwards. With it, the slot rolls, for speculative decoding: a row whose previous step
    had `a` tokens accepted finds its window in columns a-1 .. a+width-3, and a row of n tokens leaves
    `window[1:] ++ x` in columns 0 .. width+n-3, so that the next step's count picks the right window again.
    A prefill and an update without counts leave the window where a count of 1 finds it.

    The other way of speculation: `window_out` receives the window after every token and `commit=False` leaves
    the pool as it is; `commit_windows` then moves the accepted step's window into the slot. With `tree_parents`
    the tokens of a row are nodes of a tree: the taps of node i meet i, its parent, its grandparent and so on, and
    behind the last of them the row's window, newest entry first.

    Attributes:
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
      backend: "auto" or a name of the implementation (`check_backend`).
      validate: True to let the implementation read the index data and reject bad values.
      state_layout, cache_seqlens, write_indices, channel_offset, split_sizes: as in `FnCall`;
        layouts other than "front" only without `num_accepted_tokens`.
      track_indices: [batch] integer slots, "front" only, that receive the final windows as well.
      window_out: [buffers, steps, width-1, dim] float: after token t of a row, `window_out[buffer, t]` gets the
        row's last width-1 inputs, cast once if the dtype differs. steps is at least the longest row (`seqlen`, or
        `max_seqlen`, which is then required with `query_start_loc`).
      window_indices: [batch] integer, the buffer of each row, or None: row i uses buffer i. Not stored where it is
        `pad_slot_id` or out of range.
      commit: False leaves `conv_states` as it is; several rows may then read one slot.
      tree_parents: [batch, seqlen] integer, with x [batch, seqlen, dim] and `commit=False`: the parent of node i, of
        which the smaller of it and i-1 is used; below 0, node i continues the row's window.
      residual: float, in the shape of `out`; as in `FnCall`.
    """

    x: Array
    weight: Array
    bias: Array | None
    conv_states: WrittenArray
    cache_indices: IndexArray | None = None
    query_start_loc: IndexArray | None = None
    num_accepted_tokens: IndexArray | None = None
    max_seqlen: Size | None = None
    activation: str | None = None
    pad_slot_id: Integer = -1
    backend: str = "auto"
    validate: bool = False
    state_layout: str = "front"
    cache_seqlens: IndexArray | None = None
    write_indices: IndexArray | None = None
    track_indices: IndexArray | None = None
    window_out: WrittenArray | None = None
    window_indices: IndexArray | None = None
    commit: bool = True
    tree_parents: IndexArray | None = None
    residual: Array | None = None
    channel_offset: Size | None = None
    split_sizes: Sizes | None = None

    def check(self) -> UpdateSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        shape = shape_of("x", self.x)
        if self.query_start_loc is not None:
            tokens, dim = check_shape("x", self.x, ("tokens", "dim"))
            batch = check_offsets(self.query_start_loc)
            seqlen = None
        elif len(shape) == 2:
            (batch, dim), seqlen, tokens = shape, 1, shape[0]
        elif len(shape) == 3:
            batch, seqlen, dim = shape
            tokens = batch * seqlen
            if below(dim, 1):
                raise ValueError(f"x: expected shape [batch, seqlen, dim] with dim >= 1, got {list(shape)}")
        else:
            raise ValueError(f"x: expected shape [batch, dim] or [batch, seqlen, dim], got {list(shape)}")
        if below(dim, 1):
            raise ValueError(f"x: expected dim >= 1, got shape {list(shape)}")
        if self.channel_offset is not None:
            dim = check_channels(dim, self.weight, self.channel_offset)
        check_dtype("x", self.x, FLOAT_DTYPES)
        width = check_weight(self.x, self.weight, self.bias, dim)
        if self.conv_states is None:
            raise ValueError(
                "conv_states: expected shape [num_slots, state_len, dim], got None "
                "(an update continues from a state; a stateless call is causal_conv1d_fn)"
            )
        num_slots, state_len = check_pool(self.conv_states, dim, width)
        check_slots(self.cache_indices, batch, num_slots, True)
        if self.max_seqlen is not None and self.query_start_loc is None:
            got = shown(self.max_seqlen)
            raise ValueError(f"max_seqlen: expected None, since query_start_loc is None, got {got}")
        check_max_seqlen(self.max_seqlen)
        if self.num_accepted_tokens is not None:
            check_rows("num_accepted_tokens", self.num_accepted_tokens, batch)
            longest = self.max_seqlen if seqlen is None else seqlen
            if longest is None:
                raise ValueError(
                    "max_seqlen: expected an integer, since query_start_loc and num_accepted_tokens are given "
                    "(a slot must be wide enough for the longest row), got None"
                )
            if not below(width, 2) and below(state_len, width - 2 + longest):
                raise ValueError(
                    f"conv_states: expected state_len >= width-1 + {longest}-1 = {width - 2 + longest} on axis 1 for "
                    f"rows of up to {longest} tokens with num_accepted_tokens, got {state_len}"
                )
        check_options(self.activation, self.pad_slot_id, self.validate)
        check_layout(self.state_layout, self.cache_seqlens, batch)
        if self.num_accepted_tokens is not None and self.state_layout != "front":
            raise ValueError(
                f"state_layout: expected 'front', since num_accepted_tokens is given, got {self.state_layout!r}"
            )
        check_rows("write_indices", self.write_indices, batch)
        check_track(self.track_indices, self.state_layout, batch)
        if self.window_out is not None:
            longest = self.max_seqlen if seqlen is None else seqlen
            if longest is None:
                raise ValueError(
                    "max_seqlen: expected an integer, since query_start_loc and window_out are given "
                    "(window_out must have steps enough for the longest row), got None"
                )
            check_window_out(self.window_out, self.window_indices, batch, width, dim, longest)
        elif self.window_indices is not None:
            raise ValueError("window_indices: expected None, since window_out is None")
        check_flag("commit", self.commit)
        if not self.commit:
            for name in ("write_indices", "track_indices"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected None, since commit is False and no slot is written")
        if self.num_accepted_tokens is not None and (self.window_out is not None or not self.commit):
            other = "commit is False" if self.window_out is None else "window_out is given"
            raise ValueError(f"num_accepted_tokens: expected None, since {other}")
        if self.tree_parents is not None:
            check_tree(self.tree_parents, shape, self.query_start_loc, self.num_accepted_tokens, self.commit)
        if self.residual is not None:
            axes = ("batch", "seqlen", "dim") if len(shape) == 3 else ("tokens", "dim")
            check_array("residual", self.residual, axes, FLOAT_DTYPES, (*shape[:-1], dim))
        check_split(self.split_sizes, dim)
        return UpdateSizes(batch, seqlen, dim, width, num_slots, state_len, tokens)

    def check_values(self, sizes: UpdateSizes, on_host: OnHost) -> None:
        """Checks the index data; see `contract_values.check_update`, and `FnCall.check_values`."""
        contract_values.check_update(_on_host(self, on_host), sizes)


@record("commit_windows", positional=5)
class CommitCall(NamedTuple):
    """A commit of accepted windows.

    `conv_states[cache_indices[row], :width-1] = window_out[window_indices[row], accepted_steps[row]]`, cast once
    if the dtypes differ. A row whose step lies outside [0, steps), or whose slot or buffer is `pad_slot_id` or out
    of range, is left alone. Torch: in place, the same tensor is returned. JAX and NumPy: a new array.

    Attributes:
      conv_states: [num_slots, state_len, dim] float, state_len >= width-1.
      window_out: [buffers, steps, width-1, dim] float, as `causal_conv1d_update` left it.
      accepted_steps: [batch] integer, the last accepted token of each row, from 0.
      cache_indices: [batch] integer slots, or None: row i uses slot i.
      window_indices: [batch] integer buffers, or None: row i uses buffer i.
      pad_slot_id: the slot (and buffer) number that marks a padding row.
      backend: "auto" or a name of the implementation (`check_backend`).
      validate: True to let the implementation read the index data and reject bad values.
    """

    conv_states: WrittenArray
    window_out: Array
    accepted_steps: IndexArray
    cache_indices: IndexArray | None = None
    window_indices: IndexArray | None = None
    pad_slot_id: Integer = -1
    backend: str = "auto"
    validate: bool = False

    def check(self) -> CommitSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        axes = ("buffers", "steps", "width-1", "dim")
        num_buffers, steps, history, dim = check_array("window_out", self.window_out, axes, FLOAT_DTYPES)
        num_slots, state_len = check_pool(self.conv_states, dim, history + 1)
        (batch,) = check_array("accepted_steps", self.accepted_steps, ("batch",), INDEX_DTYPES)
        check_slots(self.cache_indices, batch, num_slots, True)
        check_buffers(self.window_indices, batch, num_buffers)
        check_options(None, self.pad_slot_id, self.validate)
        return CommitSizes(batch, num_slots, state_len, num_buffers, steps, history, dim)

    def check_values(self, sizes: CommitSizes, on_host: OnHost) -> None:
        """Checks the index data; see `contract_values.check_commit`, and `FnCall.check_values`."""
        contract_values.check_commit(_on_host(self, on_host), sizes)


@record("tree_parents_from_links", positional=2)
class LinksCall(NamedTuple):
    """A conversion of links to parents.

    The result is int32 [batch, n], as `tree_parents` of `causal_conv1d_update`. Node 0 is the root, its parent
    -1. A first child's parent is the node that names it; a sibling's parent is its sibling's; a node that
    nobody names has parent 0, and one that two links name the parent that either gives it.

    Attributes:
      next_token: [batch, n] integer: the first child of each node, larger than the node; any value outside
        (node, n) means none.
      next_sibling: [batch, n] integer: its next sibling, by the same rules.
    """

    next_token: IndexArray
    next_sibling: IndexArray

    def check(self) -> LinksSizes:
        """Checks the shapes and dtypes; reads no data.

        Raises:
          ValueError: a shape is wrong.
          TypeError: a dtype is wrong.
        """
        batch, nodes = check_array("next_token", self.next_token, ("batch", "n"), INDEX_DTYPES)
        check_array("next_sibling", self.next_sibling, ("batch", "n"), INDEX_DTYPES, (batch, nodes))
        return LinksSizes(batch, nodes)


@record("causal_conv1d", positional=5)
class RowsCall(NamedTuple):
    """The differentiable form.

    It mutates nothing. Its value is that of `causal_conv1d_fn` with a state of its own for every row, and its
    second result is the new states: `[batch, width-1, dim]` in the dtype of `initial_states`, or of x without
    them. A row of zero tokens returns its initial state. It is differentiable in x, weight, bias and
    initial_states, through both results; tokens at or after `query_start_loc[-1]` have gradient zero.

    Attributes:
      x: [tokens, dim] with `query_start_loc`, or [batch, seqlen, dim] without; float32, float16 or bfloat16.
      weight: [dim, width] float; width 1..8.
      bias: [dim] float, or None.
      initial_states: [batch, width-1, dim] float, oldest first; or None: rows start from zeros.
      query_start_loc: [batch+1] int32 or int64, as in `causal_conv1d_fn`; None: x has three axes.
      activation: None, "silu" or "swish".
      max_seqlen: host int, an upper bound of the longest row, or None; ignored without `query_start_loc`.
      schedule: "auto", "per_sequence" or "flat".
      backend: "auto" or a name of the implementation (`check_backend`).
    """

    x: Array
    weight: Array
    bias: Array | None = None
    initial_states: Array | None = None
    query_start_loc: IndexArray | None = None
    activation: str | None = None
    max_seqlen: Size | None = None
    schedule: str = "auto"
    backend: str = "auto"

    def check(self) -> RowSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        if self.query_start_loc is None:
            shape = shape_of("x", self.x)
            if len(shape) != 3 or below(shape[2], 1):
                raise ValueError(
                    "x: expected shape [batch, seqlen, dim] with dim >= 1, since query_start_loc is None, "
                    f"got {list(shape)}"
                )
            batch, seqlen, dim = shape
            tokens = batch * seqlen
        else:
            tokens, dim = check_shape("x", self.x, ("tokens", "dim"))
            batch = check_offsets(self.query_start_loc)
        check_dtype("x", self.x, FLOAT_DTYPES)
        width = check_weight(self.x, self.weight, self.bias, dim)
        if self.initial_states is not None:
            axes = ("batch", "width-1", "dim")
            check_array("initial_states", self.initial_states, axes, FLOAT_DTYPES, (batch, width - 1, dim))
        check_activation(self.activation)
        check_schedule(self.max_seqlen, self.schedule)
        return RowSizes(tokens, dim, width, batch)


def normalised(call: Record) -> Record:
    """A checked call as implementations take it: its host integers are plain ints, or symbols; sizes are a tuple.

    Numbers are plain floats.

    A `pad_slot_id` that does not fit into an int64, and so is no slot's number, becomes -1; a larger `max_seqlen` or
    `snapshot_block_size` the largest int64.
    """
    plain: dict[str, Any] = {}
    for name in call.INTEGERS:
        value = getattr(call, name)
        if value is None:
            continue
        if call.KINDS[name] == "sizes":
            plain[name] = tuple(host_int(name, size) for size in value)
        else:
            plain[name] = host_int(name, value)
    for name in call.FLOATS:
        if getattr(call, name) is not None:
            plain[name] = host_float(name, getattr(call, name))
    if "pad_slot_id" in plain and not -(2**63) <= plain["pad_slot_id"] < 2**63:
        plain["pad_slot_id"] = -1
    for name in ("max_seqlen", "snapshot_block_size"):
        if type(plain.get(name)) is int:
            plain[name] = min(plain[name], 2**63 - 1)
    return call._replace(**plain)


def given_arrays(call: Any) -> dict[str, Any]:
    """The arrays of a call by name, in the signature's order, without those that are None."""
    arrays = {name: getattr(call, name) for name in call.ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def check_memory(call: Any, where: Callable[[Any], Memory]) -> None:
    """Raises ValueError where an array that a call updates shares memory with another argument, or with itself.

    Args:
      where: says of an array of the call where it lies.
    """
    commits = getattr(call, "commit", True)
    layouts = {name: where(array) for name, array in given_arrays(call).items()}
    written = [name for name in call.WRITTEN if name in layouts and (commits or name != "conv_states")]
    contract_memory.check(layouts, written)


def _on_host(call: Record, on_host: OnHost) -> Record:
    """The call with lists for its index arrays."""
    arrays = {name: getattr(call, name) for name in call.INDICES}
    return call._replace(**{name: on_host(name, a) for name, a in arrays.items() if a is not None})


def check_backend(backend, names: Sequence[str]) -> None:
    """Raises ValueError unless `backend` is "auto" or one of an implementation's `names`."""
    check_choice("backend", backend, ("auto", *names))
