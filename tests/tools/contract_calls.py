"""Calls for the tests of oracle/contract.py: stand-ins for arrays, a valid call of each operation, and how a row is judged.

The stand-ins have a shape and a dtype, which is all that the checks may read. A row of a table is (operation, what
differs from the valid call, result) or (operation, what differs, error type, error text). Rows of both prefill and
decode step stand here, without the operation.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from oracle import contract, contract_prologue
from oracle.contract import CommitSizes, FnSizes, UpdateSizes


class Array(NamedTuple):
    """Stands in for an array of any library; reading anything but these two fails."""

    shape: tuple
    dtype: object


class Named:
    """A dtype as NumPy and JAX have it: with a name."""

    def __init__(self, name):
        self.name = name


class Printed:
    """A dtype as Torch has it: with a text that ends in the name."""

    def __init__(self, name):
        self.text = f"torch.{name}"

    def __str__(self):
        return self.text


class Unreadable:
    """An array of one integer, of a library whose arrays wait for a device when they are read or printed."""

    shape, dtype = (), Named("int32")

    def read(self, *_):
        raise AssertionError("an array was read")

    __index__ = __int__ = __bool__ = __repr__ = __str__ = __eq__ = __lt__ = item = tolist = read
    __hash__ = object.__hash__


class Tracer(Unreadable):
    """What JAX gives for an argument that is not static; it has what a dimension has."""

    dimension_as_value = None


class Guard(BaseException):
    """A question to a symbol, which no handler of exceptions hides."""


class SymInt:
    """A size of a graph that is being traced: `terms` symbols plus a number. Any question but "the same?" is a guard."""

    def __init__(self, symbol, more=0):
        self.symbol, self.more = symbol, more

    def __add__(self, number):
        return SymInt(self.symbol, self.more + number)

    def __sub__(self, number):
        return SymInt(self.symbol, self.more - number)

    def __mul__(self, other):
        return SymInt(f"{self.symbol}*{getattr(other, 'symbol', other)}")

    __radd__ = __add__

    def __rsub__(self, number):
        return SymInt(f"{number}-{self.symbol}")

    def __eq__(self, other):
        if isinstance(other, SymInt) and (self.symbol, self.more) == (other.symbol, other.more):
            return True
        raise Guard(f"{self} == {other}")

    def guard(self, *_):
        raise Guard(f"on {self}")

    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __index__ = __int__ = guard
    __hash__ = object.__hash__

    def __repr__(self):
        return f"{self.symbol}+{self.more}"


class Inconclusive(Exception):
    pass


class Dimension(SymInt):
    """A dimension of `jax.export`: some questions have an answer, others raise; no two symbols are the same."""

    dimension_as_value = None

    def __eq__(self, other):
        return isinstance(other, SymInt) and (self.symbol, self.more) == (other.symbol, other.more)

    def __lt__(self, other):
        if isinstance(other, int) and other <= 1 + self.more:
            return False  # a symbol is at least 1
        raise Inconclusive

    def __gt__(self, other):
        raise Inconclusive

    __index__ = SymInt.guard
    __hash__ = object.__hash__


def a(*shape, dtype="bfloat16", kind=Named):
    return Array(shape, kind(dtype))


F32, I32, I64, BOOL = "float32", "int32", "int64", "bool"

# A valid call of each operation: five sequences of lengths 1, 9, 2, 17, 4.
FN = dict(
    x=a(33, 64),
    weight=a(64, 4),
    bias=a(64),
    conv_states=a(8, 3, 64),
    query_start_loc=a(6, dtype=I32),
    cache_indices=a(5, dtype=I32),
    has_initial_state=a(5, dtype=BOOL),
)
UPDATE = dict(x=a(5, 64), weight=a(64, 4), bias=a(64), conv_states=a(8, 3, 64), cache_indices=a(5, dtype=I32))
ROWS = dict(
    x=a(33, 64),
    weight=a(64, 4),
    bias=a(64),
    initial_states=a(5, 3, 64),
    query_start_loc=a(6, dtype=I32),
)
DENSE = dict(x=a(5, 7, 64), query_start_loc=None)
PACKED = dict(x=a(9, 64), query_start_loc=a(6, dtype=I32))
COUNTS = dict(num_accepted_tokens=a(5, dtype=I32))
ROLLING = PACKED | COUNTS | dict(max_seqlen=4, conv_states=a(8, 6, 64))
PACKED_VALUES = dict(sizes=UpdateSizes(3, None, 64, 4, 5, 6, 7), query_start_loc=[0, 2, 2, 6])
NO_POOL = dict(conv_states=None, cache_indices=None, has_initial_state=None)

# What serving engines ask for besides. The sizes of the calls stay those of the plain ones.
ROW_I32 = a(5, dtype=I32)
RING = dict(state_layout="ring", cache_seqlens=ROW_I32)
SNAPSHOTS = dict(snapshot_indices=a(5, 7, dtype=I32), snapshot_block_size=1)
WINDOWS = dict(window_out=a(5, 1, 3, 64))
TREE = dict(x=a(5, 2, 64), tree_parents=a(5, 2, dtype=I32), commit=False)
COMMIT = dict(
    conv_states=a(8, 5, 64),
    window_out=a(6, 4, 3, 64),
    accepted_steps=ROW_I32,
    cache_indices=ROW_I32,
    window_indices=ROW_I32,
)
FN_SIZES, UPDATE_SIZES = FnSizes(33, 64, 4, 5, 8, 3), UpdateSizes(5, 1, 64, 4, 8, 3, 5)
COMMIT_SIZES = CommitSizes(5, 8, 5, 6, 4, 3, 64)
COMMIT_VALUES = CommitSizes(3, 5, 4, 6, 2, 3, 64)

DTYPES = "expected dtype float32 or float16 or bfloat16"
INDEX = "expected dtype int32 or int64 or int16 or int8 or uint8 or uint16 or uint32 or uint64"
HOST = "expected an integer known on the host"


SHARED = "expected None, since conv_states is None and there is no slot to name"
NOT_FRONT = "expected None, since state_layout is 'back'"
OFFSET = "channel_offset: expected None, or an integer >= 0 with channel_offset + dim <= "
SPLIT = "split_sizes: expected 1 to 8 integers >= 1 that add up to dim=64, got "
CONV1D = "weight: expected shape [{}, width], got [64, 1, 4] (that of a Conv1d: give weight.squeeze(1))"
STATELESS = NO_POOL | dict(has_initial_state=None)


def fn_values(module, *, tokens, num_slots, **fields):
    pool = None if num_slots is None else a(num_slots, 3, 64)
    call = module.FnCall(None, None, None, pool, **fields)
    sizes = FnSizes(tokens, 64, 4, len(fields["query_start_loc"]) - 1, num_slots or 0, 3)
    return call.check_values(sizes, lambda _, values: list(values))


def update_values(module, *, sizes, num_buffers=None, **fields):
    windows = None if num_buffers is None else a(num_buffers, 4, 3, 64)
    call = module.UpdateCall(None, None, None, None, window_out=windows, **fields)
    return call.check_values(sizes, lambda _, values: list(values))


def commit_values(module, *, sizes, **fields):
    return module.CommitCall(None, None, **fields).check_values(sizes, lambda _, values: list(values))


def memory(module, **fields):
    """Of a decode step on arrays given by the byte where their 10 bytes begin."""
    base = dict(x=0, weight=10, bias=None, conv_states=20)
    module.check_memory(
        module.UpdateCall(**base | fields), lambda at: module.Memory("cpu", at, 2, (5,), (1,))
    )


# The fronts: two heads of q and k with 8 channels, four of v with 8.
HEADS = dict(num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=8)
GATES = dict(a=a(33, 4), b=a(33, 4), A_log=a(4, dtype=F32), dt_bias=a(4, dtype=F32))
CHANNEL_GATE = dict(a=a(33, 4, 8), dt_bias=a(4, 8))
STEP_GATES = GATES | dict(a=a(5, 4), b=a(5, 4))
GATED_FN = {"bcx": a(33, 192)} | {name: value for name, value in FN.items() if name != "x"}
GATED_UPDATE = {"bcx": a(5, 192)} | {name: value for name, value in UPDATE.items() if name != "x"}
GATED_ROWS = {"bcx": a(33, 192)} | {name: value for name, value in ROWS.items() if name != "x"}


def prologue_of(module):
    """The contract of the fronts; a damaged contract may have one of its own."""
    return getattr(module, "contract_prologue", contract_prologue)


def check_front(record, module, **fields):
    """What a check of a front returns, as a plain tuple in which the convolution's sizes have their name."""
    return getattr(prologue_of(module), record)(**fields).check()


class Scaled(NamedTuple):
    """A record of an operation that takes numbers."""

    x: contract.Array
    scale: float
    most: "float | None" = None


def normalised_numbers(module, **given):
    """As text: NumPy's numbers equal Python's."""
    record = module.record("scaled", positional=1, registry={})(Scaled)
    return repr(tuple(module.normalised(record(None, **given))))


def front_values(module, *, record, sizes, **fields):
    """The value checks of a front, of which the arrays that are no index data stay None."""
    made = getattr(prologue_of(module), record)
    missing = {name: None for name in made._fields if name not in made._field_defaults}
    call = made(**missing | fields)
    return call.check_values(prologue_of(module).PrologueSizes(sizes, 2, 4, 8, 8, None), lambda _, v: list(v))


def check(record, module, **fields):
    return getattr(module, record)(**fields).check()


OPERATIONS = {
    "fn": (partial(check, "FnCall"), FN),
    "update": (partial(check, "UpdateCall"), UPDATE),
    "rows": (partial(check, "RowsCall"), ROWS),
    "commit": (partial(check, "CommitCall"), COMMIT),
    "links": (
        partial(check, "LinksCall"),
        dict(next_token=a(5, 7, dtype=I32), next_sibling=a(5, 7, dtype=I32)),
    ),
    "fn_values": (
        fn_values,
        dict(query_start_loc=[0, 1, 1, 4], cache_indices=[4, 4, 2], tokens=6, num_slots=5),
    ),
    "update_values": (update_values, dict(cache_indices=[4, 0, 2], sizes=UpdateSizes(3, 1, 64, 4, 5, 3, 3))),
    "commit_values": (
        commit_values,
        dict(
            accepted_steps=[0, 1, 1], cache_indices=[4, 0, 2], window_indices=[5, 0, 2], sizes=COMMIT_VALUES
        ),
    ),
    "backend": (lambda module, **given: module.check_backend(**given), dict(names=("triton", "eager"))),
    # as text: NumPy's integers equal Python's
    "normalised": (lambda module, **given: repr(module.normalised(module.FnCall(**FN | given))[7:]), {}),
    "given": (lambda module, **given: module.given_arrays(module.FnCall(**FN | given)), {}),
    "memory": (memory, dict(window_out=30)),
    "numbers": (normalised_numbers, dict(scale=1)),
    "front_fn": (partial(check_front, "PrologueFnCall"), FN | HEADS),
    "front_update": (partial(check_front, "PrologueUpdateCall"), UPDATE | HEADS),
    "front_rows": (partial(check_front, "PrologueCall"), ROWS | HEADS),
    "gated_fn": (partial(check_front, "GatedConvFnCall"), GATED_FN),
    "gated_update": (partial(check_front, "GatedConvUpdateCall"), GATED_UPDATE),
    "gated_rows": (partial(check_front, "GatedConvCall"), GATED_ROWS),
    "front_values": (
        front_values,
        dict(record="PrologueFnCall", sizes=FnSizes(6, 64, 4, 3, 5, 3), conv_states=a(5, 3, 64),
             query_start_loc=[0, 1, 1, 4], cache_indices=[4, 4, 2]),
    ),
    "front_step_values": (
        front_values,
        dict(record="PrologueUpdateCall", sizes=UpdateSizes(3, 1, 64, 4, 5, 3, 3), conv_states=a(5, 3, 64),
             cache_indices=[4, 0, 2]),
    ),
    "gated_values": (
        front_values,
        dict(record="GatedConvFnCall", sizes=FnSizes(6, 64, 4, 3, 5, 3), conv_states=a(5, 3, 64),
             query_start_loc=[0, 1, 1, 4], cache_indices=[4, 4, 2]),
    ),
    "gated_step_values": (
        front_values,
        dict(record="GatedConvUpdateCall", sizes=UpdateSizes(3, 1, 64, 4, 5, 3, 3), conv_states=a(5, 3, 64),
             cache_indices=[4, 0, 2]),
    ),
}  # fmt: skip


def call(module, operation, overrides):
    function, base = OPERATIONS[operation]
    return function(module, **base | overrides)


def short(value):
    if isinstance(value, dict):
        return "-".join(f"{k}={short(v)}" for k, v in value.items()) or "base"
    if isinstance(value, Array):
        return "x".join(map(str, value.shape)) + getattr(value.dtype, "name", "")
    return type(value).__name__ if isinstance(value, (Unreadable, SymInt)) else str(value)


def name_rows(table):
    return [f"{row[0]}-{short(row[1])}" for row in table]


def accepts(operation, overrides, result):
    got = call(contract, operation, overrides)
    assert got == result, got
    assert type(got) is type(result), got


def rejects(operation, overrides, error, text):
    with pytest.raises(error) as caught:
        call(contract, operation, overrides)
    assert type(caught.value) is error, caught.value
    assert str(caught.value) == text, f"got: {caught.value}\nnot: {text}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


BOTH_ACCEPTED = [
    dict(state_layout="back"),
    RING,
    dict(write_indices=a(5, dtype="uint8")),
    dict(track_indices=ROW_I32),
    RING | dict(write_indices=ROW_I32),
    dict(channel_offset=0),
    dict(channel_offset=np.int64(0)),
    dict(split_sizes=(64,)),
    dict(split_sizes=(1,) * 7 + (57,)),
    dict(split_sizes=(np.int64(32), 32)),
    dict(split_sizes=[32, 32]),
]

BOTH_REJECTED = [
    # layouts
    (
        dict(state_layout="rear"),
        ValueError,
        "state_layout: expected one of ('front', 'back', 'ring'), got 'rear'",
    ),
    (
        dict(state_layout=None),
        ValueError,
        "state_layout: expected one of ('front', 'back', 'ring'), got None",
    ),
    (
        dict(state_layout="ring"),
        ValueError,
        "cache_seqlens: expected shape [batch], since state_layout is 'ring', got None",
    ),
    (dict(cache_seqlens=ROW_I32), ValueError, "cache_seqlens: expected None, since state_layout is 'front'"),
    (
        RING | dict(state_layout="back"),
        ValueError,
        "cache_seqlens: expected None, since state_layout is 'back'",
    ),
    (
        RING | dict(cache_seqlens=a(6, dtype=I32)),
        ValueError,
        "cache_seqlens: expected shape [batch=5], got [6]",
    ),
    (RING | dict(cache_seqlens=a(5, dtype=F32)), TypeError, f"cache_seqlens: {INDEX}, got float32"),
    # write_indices, empty_rows, track_indices
    (dict(write_indices=3), TypeError, "write_indices: expected an array, got int"),
    (
        dict(write_indices=a(5, 1, dtype=I32)),
        ValueError,
        "write_indices: expected shape [batch=5], got [5, 1]",
    ),
    (dict(write_indices=a(5, dtype=BOOL)), TypeError, f"write_indices: {INDEX}, got bool"),
    (dict(track_indices=a(4, dtype=I32)), ValueError, "track_indices: expected shape [batch=5], got [4]"),
    (dict(track_indices=a(5, dtype=F32)), TypeError, f"track_indices: {INDEX}, got float32"),
    (dict(track_indices=ROW_I32, state_layout="back"), ValueError, f"track_indices: {NOT_FRONT}"),
    (dict(channel_offset=1), ValueError, f"{OFFSET}64, the channels of x, for dim=64, got 1"),
    (dict(channel_offset=-1), ValueError, f"{OFFSET}64, the channels of x, for dim=64, got -1"),
    (
        dict(channel_offset=0, weight=a(65, 4)),
        ValueError,
        f"{OFFSET}64, the channels of x, for dim=65, got 0",
    ),
    (
        dict(channel_offset=0, weight=a(0, 4)),
        ValueError,
        "weight: expected shape [dim, width] with dim >= 1, got [0, 4]",
    ),
    (dict(channel_offset=0.0), TypeError, f"channel_offset: {HOST}, got 0.0"),
    (dict(split_sizes={32: 32}), TypeError, "split_sizes: expected a tuple of integers, got dict"),
    (dict(split_sizes=[32, 33]), ValueError, SPLIT + "[32, 33]"),
    (dict(split_sizes=(32, 32.0)), TypeError, f"split_sizes: {HOST}, got 32.0"),
    (dict(split_sizes=()), ValueError, SPLIT + "()"),
    (dict(split_sizes=(1,) * 8 + (56,)), ValueError, SPLIT + "(1, 1, 1, 1, 1, 1, 1, 1, 56)"),
    (dict(split_sizes=(0, 64)), ValueError, SPLIT + "(0, 64)"),
    (dict(split_sizes=(32, 31)), ValueError, SPLIT + "(32, 31)"),
    (dict(split_sizes=(32, 33)), ValueError, SPLIT + "(32, 33)"),
    # weight and bias
    (dict(weight=None), TypeError, "weight: expected an array, got NoneType"),
    (dict(weight=a(4, 64)), ValueError, "weight: expected shape [dim=64, width], got [4, 64]"),
    (dict(weight=a(64, 1, 4)), ValueError, CONV1D.format("dim=64")),
    (dict(weight=a(64, 1, 4), channel_offset=0), ValueError, CONV1D.format("dim")),
    (dict(weight=a(64, 2, 4)), ValueError, "weight: expected shape [dim=64, width], got [64, 2, 4]"),
    (dict(weight=a(64, 0)), ValueError, "weight: expected width 1 to 8 on axis 1, got 0"),
    (dict(weight=a(64, 9)), ValueError, "weight: expected width 1 to 8 on axis 1, got 9"),
    (dict(weight=a(64, 4, dtype="float64")), TypeError, f"weight: {DTYPES}, got float64"),
    (dict(bias=True), TypeError, "bias: expected an array, got bool"),
    (dict(bias=a(63)), ValueError, "bias: expected shape [dim=64], got [63]"),
    (dict(bias=a(64, 1)), ValueError, "bias: expected shape [dim=64], got [64, 1]"),
    (dict(bias=a(64, dtype="int8")), TypeError, f"bias: {DTYPES}, got int8"),
    # conv_states
    (dict(conv_states=3), TypeError, "conv_states: expected an array, got int"),
    (
        dict(conv_states=a(8, 64, 3)),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim=64], got [8, 64, 3]",
    ),
    (
        dict(conv_states=a(8, 3)),
        ValueError,
        "conv_states: expected shape [num_slots, state_len, dim=64], got [8, 3]",
    ),
    (
        dict(conv_states=a(8, 2, 64)),
        ValueError,
        "conv_states: expected state_len >= width-1 = 3 on axis 1, got 2",
    ),
    (dict(conv_states=a(8, 3, 64, dtype="int8")), TypeError, f"conv_states: {DTYPES}, got int8"),
    (
        dict(conv_states=a(4, 3, 64), cache_indices=None),
        ValueError,
        "conv_states: expected num_slots >= batch = 5, since cache_indices is None, got 4",
    ),
    # cache_indices and has_initial_state
    (dict(cache_indices=[0, 1]), TypeError, "cache_indices: expected an array, got list"),
    (dict(cache_indices=a(6, dtype=I32)), ValueError, "cache_indices: expected shape [batch=5], got [6]"),
    (dict(cache_indices=a(5, dtype=BOOL)), TypeError, f"cache_indices: {INDEX}, got bool"),
    # options
    (dict(activation="gelu"), ValueError, "activation: expected None, 'silu' or 'swish', got 'gelu'"),
    (dict(activation=True), ValueError, "activation: expected None, 'silu' or 'swish', got True"),
    (dict(pad_slot_id=None), TypeError, f"pad_slot_id: {HOST}, got None"),
    (dict(pad_slot_id=1.0), TypeError, f"pad_slot_id: {HOST}, got 1.0"),
    (dict(pad_slot_id=True), TypeError, f"pad_slot_id: {HOST}, got True"),
    (dict(validate=1), TypeError, "validate: expected True or False, got 1"),
    (dict(validate=None), TypeError, "validate: expected True or False, got None"),
]
