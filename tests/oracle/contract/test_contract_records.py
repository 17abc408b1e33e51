"""The records of oracle/contract.py: fields and defaults, which field is what, and what is asked of any record."""

import types

import numpy as np
import pytest

from oracle import contract
from oracle.contract import ConvOutput, ConvWindowOutput, FnCall, FnSizes, Unsupported
from tests.tools.contract_calls import (
    FN,
    FN_SIZES,
    HOST,
    NO_POOL,
    SNAPSHOTS,
    UPDATE,
    UPDATE_SIZES,
    WINDOWS,
    Dimension,
    Named,
    Printed,
    SymInt,
    Tracer,
    a,
    accepts,
    name_rows,
    rejects,
)  # fmt: skip

SIGNATURES = {
    "causal_conv1d_fn": "7: x, weight, bias, conv_states, query_start_loc, cache_indices=None, "
    "has_initial_state=None, activation=None, pad_slot_id=-1, max_seqlen=None, schedule='auto', "
    "backend='auto', validate=False, state_layout='front', cache_seqlens=None, write_indices=None, "
    "empty_rows='skip', snapshot_indices=None, snapshot_block_size=None, num_computed_tokens=None, "
    "track_indices=None, track_lengths=None, residual=None, channel_offset=None, split_sizes=None",
    "causal_conv1d_update": "5: x, weight, bias, conv_states, cache_indices=None, "
    "query_start_loc=None, num_accepted_tokens=None, max_seqlen=None, activation=None, pad_slot_id=-1, "
    "backend='auto', validate=False, state_layout='front', cache_seqlens=None, write_indices=None, "
    "track_indices=None, window_out=None, window_indices=None, commit=True, tree_parents=None, residual=None, "
    "channel_offset=None, split_sizes=None",
    "commit_windows": "5: conv_states, window_out, accepted_steps, cache_indices=None, window_indices=None, "
    "pad_slot_id=-1, backend='auto', validate=False",
    "tree_parents_from_links": "2: next_token, next_sibling",
    "causal_conv1d": "5: x, weight, bias=None, initial_states=None, query_start_loc=None, "
    "activation=None, max_seqlen=None, schedule='auto', backend='auto'",
}


# Of each record: the arrays that the call updates, those whose values are checked, the options, what may be None.
ROLES = {
    "causal_conv1d_fn": (
        "conv_states",
        "query_start_loc cache_indices has_initial_state cache_seqlens write_indices snapshot_indices "
        "num_computed_tokens track_indices track_lengths",
        "activation:str pad_slot_id:integer max_seqlen:size schedule:str backend:str validate:bool state_layout:str "
        "empty_rows:str snapshot_block_size:size channel_offset:size split_sizes:sizes",
        "bias conv_states cache_indices has_initial_state activation max_seqlen cache_seqlens write_indices "
        "snapshot_indices snapshot_block_size num_computed_tokens track_indices track_lengths residual channel_offset "
        "split_sizes",
    ),
    "causal_conv1d_update": (
        "conv_states window_out",
        "cache_indices query_start_loc num_accepted_tokens cache_seqlens write_indices track_indices window_indices "
        "tree_parents",
        "max_seqlen:size activation:str pad_slot_id:integer backend:str validate:bool state_layout:str commit:bool "
        "channel_offset:size split_sizes:sizes",
        "bias cache_indices query_start_loc num_accepted_tokens max_seqlen activation cache_seqlens write_indices "
        "track_indices window_out window_indices tree_parents residual channel_offset split_sizes",
    ),
    "commit_windows": (
        "conv_states",
        "accepted_steps cache_indices window_indices",
        "pad_slot_id:integer backend:str validate:bool",
        "cache_indices window_indices",
    ),
    "tree_parents_from_links": ("", "next_token next_sibling", "", ""),
    "causal_conv1d": (
        "",
        "query_start_loc",
        "activation:str max_seqlen:size schedule:str backend:str",
        "bias initial_states query_start_loc activation max_seqlen",
    ),
}


def roles(module):
    return {operation: roles_of(record) for operation, record in module.RECORDS.items()}


def roles_of(record):
    return (
        " ".join(record.WRITTEN),
        " ".join(record.INDICES),
        " ".join(f"{name}:{record.KINDS[name]}" for name in record.OPTIONS),
        " ".join(record.OPTIONAL),
    )


def signatures(module):
    return signatures_of(module.RECORDS)


def signatures_of(records):
    """The fields of each record with their defaults, behind how many of them are positional."""

    def text(record):
        defaults = {k: v for k, v in record._field_defaults.items() if k not in record.REQUIRED}
        fields = [f"{name}={defaults[name]!r}" if name in defaults else name for name in record._fields]
        return f"{record.POSITIONAL}: {', '.join(fields)}"

    return {operation: text(record) for operation, record in records.items()}


FN_OPTIONS = tuple(FnCall._field_defaults[name] for name in FnCall._fields[7:])
S0, B = SymInt("s0"), Dimension("b")
BACKENDS = "backend: expected one of ('auto', 'triton', 'eager'), got "
OWN = "expected memory of its own, since the call updates {}, got memory that they share"
STATIC = "tests.Tracer (make the argument static)"

ACCEPTED = [
    ("backend", dict(backend="auto"), None),
    ("backend", dict(backend="eager"), None),
    ("normalised", {}, repr(FN_OPTIONS)),
    (
        "normalised",
        dict(pad_slot_id=np.int64(-7), channel_offset=np.uint8(3), split_sizes=[np.int64(1), 63]),
        repr((None, -7, *FN_OPTIONS[2:-2], 3, (1, 63))),
    ),
    ("normalised", dict(pad_slot_id=2**63), repr(FN_OPTIONS)),
    ("normalised", dict(pad_slot_id=-(2**63) - 1), repr(FN_OPTIONS)),
    ("normalised", dict(pad_slot_id=2**63 - 1), repr((None, 2**63 - 1, *FN_OPTIONS[2:]))),
    ("normalised", dict(pad_slot_id=-(2**63)), repr((None, -(2**63), *FN_OPTIONS[2:]))),
    ("normalised", dict(max_seqlen=2**63 - 2), repr((None, -1, 2**63 - 2, *FN_OPTIONS[3:]))),
    ("normalised", dict(max_seqlen=2**63), repr((None, -1, 2**63 - 1, *FN_OPTIONS[3:]))),
    ("normalised", dict(max_seqlen=S0), repr((None, -1, S0, *FN_OPTIONS[3:]))),
    ("normalised", dict(max_seqlen=B), repr((None, -1, B, *FN_OPTIONS[3:]))),
    ("fn", dict(max_seqlen=S0), FN_SIZES),
    ("fn", dict(max_seqlen=B), FN_SIZES),
    ("fn", dict(x=a(33, 80), channel_offset=B), FN_SIZES),
    ("fn", dict(x=a(33, SymInt("channels")), channel_offset=S0), FN_SIZES),
    ("fn", SNAPSHOTS | dict(snapshot_block_size=S0), FN_SIZES),
    ("update", WINDOWS | dict(window_out=a(5, S0, 3, 64)), UPDATE_SIZES),
    ("given", NO_POOL, {name: FN[name] for name in ("x", "weight", "bias", "query_start_loc")}),
    ("memory", {}, None),
    ("memory", dict(window_out=None), None),
    ("memory", dict(x=20, commit=False), None),
    ("memory", dict(residual=0), None),
]

REJECTED = [
    ("backend", dict(backend="cuda"), ValueError, BACKENDS + "'cuda'"),
    ("backend", dict(backend=None), ValueError, BACKENDS + "None"),
    ("backend", dict(backend=np.zeros(3)), ValueError, BACKENDS + "numpy.ndarray"),
    ("fn", dict(pad_slot_id=S0), TypeError, f"pad_slot_id: {HOST}, got s0+0"),
    ("fn", dict(max_seqlen=Tracer()), TypeError, f"max_seqlen: {HOST}, got {STATIC}"),
    ("fn", dict(pad_slot_id=np.array(-1)), TypeError, f"pad_slot_id: {HOST}, got numpy.ndarray"),
    ("fn", dict(pad_slot_id=np.float64(1)), TypeError, f"pad_slot_id: {HOST}, got np.float64(1.0)"),
    ("fn", dict(weight=Tracer()), ValueError, "weight: expected shape [dim=64, width], got []"),
    (
        "fn",
        dict(x=types.SimpleNamespace(shape=(33, 64))),
        TypeError,
        "x: expected an array, got SimpleNamespace",
    ),
    ("memory", dict(x=20), ValueError, f"x: {OWN.format('conv_states')}"),
    ("memory", dict(x=20, window_out=None), ValueError, f"x: {OWN.format('conv_states')}"),
    ("memory", dict(conv_states=30), ValueError, f"window_out: {OWN.format('conv_states')}"),
    ("memory", dict(conv_states=30, commit=False), ValueError, f"conv_states: {OWN.format('window_out')}"),
]


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)


def test_signatures():
    """The fields and their defaults, word for word: nothing may change them by accident."""
    assert signatures(contract) == SIGNATURES


def test_roles():
    assert roles(contract) == ROLES
    for record in contract.RECORDS.values():
        assert sorted(record.ARRAYS + record.OPTIONS) == sorted(record._fields)
        assert {*record.INDICES, *record.WRITTEN} <= set(record.ARRAYS)
        assert tuple(record.KINDS) == record._fields


def test_a_record_is_its_arguments():
    call = FnCall(**FN)
    assert FnCall._make(tuple(call)) == call
    assert call.OPERATION == "causal_conv1d_fn"
    assert contract.RECORDS[call.OPERATION] is FnCall


def test_index_data_is_read_where_it_is_given():
    read = []

    def on_host(name, array):
        read.append(name)
        return array

    call = FnCall(a(4, 8), None, None, a(5, 3, 8), [0, 1, 4], [4, 2], track_indices=[0, 1])
    call.check_values(FnSizes(4, 8, 4, 2, 5, 3), on_host)
    assert read == ["query_start_loc", "cache_indices", "track_indices"]


@pytest.mark.parametrize("record", [contract.FnCall, contract.UpdateCall])
@pytest.mark.parametrize("dtype", contract.INDEX_DTYPES)
def test_every_index_dtype(record, dtype):
    base = FN if record is contract.FnCall else UPDATE
    record(**base | dict(cache_indices=a(5, dtype=dtype))).check()


@pytest.mark.parametrize("kind", [Named, Printed])
@pytest.mark.parametrize("name", contract.FLOAT_DTYPES)
def test_dtype_name(kind, name):
    assert contract.dtype_name(kind(name)) == name
    FnCall(**FN | dict(x=a(33, 64, dtype=name, kind=kind))).check()


def test_dtype_name_of_what_numpy_has():
    assert contract.dtype_name(np.dtype("float32")) == "float32"
    assert contract.dtype_name(np.dtype("int64")) == "int64"
    assert contract.dtype_name(["unhashable"]) == "['unhashable']"


def test_dtype_name_is_remembered():
    dtype = Named("float16")
    assert contract.dtype_name(dtype) == "float16"
    dtype.name = "changed"
    assert contract.dtype_name(dtype) == "float16"


def test_arrays_are_not_read():
    """NumPy arrays that own no memory: reading an element would crash or fail."""

    def hollow(*shape, dtype="float32"):
        return np.lib.stride_tricks.as_strided(np.empty(0, dtype), shape, (0,) * len(shape))

    sizes = FnCall(
        hollow(1 << 40, 8192),
        hollow(8192, 4),
        hollow(8192),
        hollow(1 << 30, 3, 8192),
        hollow(1 << 20, dtype="int64"),
        hollow((1 << 20) - 1, dtype="int32"),
        hollow((1 << 20) - 1, dtype="bool"),
    ).check()
    assert sizes == FnSizes(1 << 40, 8192, 4, (1 << 20) - 1, 1 << 30, 3)


def test_unsupported_is_not_an_argument_error():
    assert issubclass(Unsupported, NotImplementedError)
    assert not issubclass(Unsupported, (ValueError, TypeError))


def test_output_has_two_named_fields():
    assert ConvOutput._fields == ("out", "conv_states")
    assert ConvWindowOutput._fields == ("out", "conv_states", "window_out")
