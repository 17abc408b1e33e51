"""One rule for host integers: what `operator.index` takes, but no bool and no array; sizes may be symbols."""

import enum

import numpy as np
import pytest

from oracle.contract import CommitCall, FnCall, RowsCall, UpdateCall, normalised
from tests.tools.contract_calls import (
    COMMIT,
    COUNTS,
    F32,
    FN,
    HOST,
    PACKED,
    ROW_I32,
    ROWS,
    SNAPSHOTS,
    UPDATE,
    Array,
    Dimension,
    Named,
    SymInt,
    Tracer,
    Unreadable,
    a,
)  # fmt: skip

# Every host integer of every operation: the record, a valid call, the argument.
ARGUMENTS = [
    (FnCall, FN, "pad_slot_id"),
    (FnCall, FN, "max_seqlen"),
    (FnCall, FN | SNAPSHOTS, "snapshot_block_size"),
    (FnCall, FN | dict(x=a(33, 80)), "channel_offset"),
    (UpdateCall, UPDATE, "pad_slot_id"),
    (UpdateCall, UPDATE | PACKED, "max_seqlen"),
    (UpdateCall, UPDATE | dict(x=a(5, 80)), "channel_offset"),
    (CommitCall, COMMIT, "pad_slot_id"),
    (RowsCall, ROWS, "max_seqlen"),
]
NAMES = [f"{record.__name__}-{name}" for record, _, name in ARGUMENTS]


class Slots(enum.IntEnum):
    SEVEN = 7


class Indexed:
    """No number of any library, but `operator.index` takes it."""

    def __index__(self):
        return 7


@pytest.mark.parametrize(("record", "base", "name"), ARGUMENTS, ids=NAMES)
@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), Slots.SEVEN, Indexed()], ids=str)
def test_integers_arrive_as_plain_ints(record, base, name, value):
    call = record(**base | {name: value})
    call.check()
    got = getattr(normalised(call), name)
    assert (type(got), got) == (int, 7)


@pytest.mark.parametrize(("record", "base", "name"), ARGUMENTS, ids=NAMES)
@pytest.mark.parametrize("value", [7.0, True, "7", np.float64(7), 7j, (7,), Array((), Named(F32))], ids=str)
def test_others_are_type_errors(record, base, name, value):
    got = f"tests.{type(value).__name__}" if isinstance(value, Array) else repr(value)
    with pytest.raises(TypeError) as caught:
        record(**base | {name: value}).check()
    assert str(caught.value) == f"{name}: {HOST}, got {got}"


@pytest.mark.parametrize(("record", "base", "name"), ARGUMENTS, ids=NAMES)
@pytest.mark.parametrize(
    "value", [np.array(7), np.array([7]), np.True_, Unreadable()], ids=lambda v: type(v).__name__
)
def test_arrays_are_refused_unread(record, base, name, value):
    with pytest.raises(TypeError, match=f"^{name}: {HOST}, got \\w+.{type(value).__name__}$"):
        record(**base | {name: value}).check()


@pytest.mark.parametrize(
    ("base", "name", "error"),
    [
        (FN, "max_seqlen", TypeError),
        (FN, "split_sizes", TypeError),
        (FN, "activation", ValueError),
        (FN, "schedule", ValueError),
        (FN, "state_layout", ValueError),
        (FN, "empty_rows", ValueError),
        (FN, "validate", TypeError),
        (UPDATE, "max_seqlen", ValueError),
        (UPDATE, "commit", TypeError),
    ],
)
def test_no_option_is_read_or_printed_if_it_is_an_array(base, name, error):
    record = FnCall if base is FN else UpdateCall
    for array in (Unreadable(), Tracer()):
        with pytest.raises(
            error, match=f"^{name}: expected .*, got (tests.)?{type(array).__name__}"
        ) as caught:
            record(**base | {name: array}).check()
        hint = isinstance(array, Tracer) and name != "split_sizes"
        assert ("make the argument static" in str(caught.value)) == hint


@pytest.mark.parametrize("sizes", [[32, 32], (np.int64(32), 32), [np.int32(32), Indexed(), 25]], ids=str)
def test_split_sizes_arrive_as_a_tuple_of_plain_ints(sizes):
    call = FnCall(**FN | dict(split_sizes=sizes))
    call.check()
    got = normalised(call).split_sizes
    assert (type(got), sum(got)) == (tuple, 64)
    assert {type(size) for size in got} == {int}


def test_a_bound_beyond_int64_is_the_largest():
    call = FnCall(**FN | dict(max_seqlen=2**70))
    call.check()
    assert normalised(call).max_seqlen == 2**63 - 1


@pytest.mark.parametrize(
    ("value", "slot"),
    [
        (-(2**63), -(2**63)),
        (2**63 - 1, 2**63 - 1),
        (2**63, -1),
        (-(2**63) - 1, -1),
        (2**70, -1),
        (-(2**70), -1),
    ],
)
@pytest.mark.parametrize(("record", "base"), [(FnCall, FN), (UpdateCall, UPDATE), (CommitCall, COMMIT)])
def test_a_pad_slot_id_that_no_slot_can_have_marks_none(record, base, value, slot):
    call = record(**base | dict(pad_slot_id=value))
    call.check()
    assert normalised(call).pad_slot_id == slot


def test_what_is_not_an_integer_stays():
    call = FnCall(**FN | dict(activation="swish"))
    assert normalised(call) == call


KINDS = [SymInt, Dimension]


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_pass_a_prefill(kind):
    tokens, batch, slots, longest = map(kind, ("tokens", "batch", "slots", "longest"))
    call = FnCall(
        a(tokens, 80), a(64, 4), None, a(slots, 3, 64), a(batch + 1, dtype="int32"),
        has_initial_state=a(batch, dtype="bool"), max_seqlen=longest, residual=a(tokens, 64), channel_offset=3,
        snapshot_indices=a(batch, kind("blocks"), dtype="int32"), snapshot_block_size=kind("size"),
    )  # fmt: skip
    sizes = call.check()
    assert (sizes.tokens, sizes.batch, sizes.num_slots) == (tokens, batch, slots)
    plain = normalised(call)
    assert plain.max_seqlen is longest
    assert plain.snapshot_block_size is call.snapshot_block_size
    assert FnCall(a(tokens, kind("channels")), *call[1:5], channel_offset=kind("offset")).check().dim == 64


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_pass_a_decode_step(kind):
    batch, seqlen, longest = map(kind, ("batch", "seqlen", "longest"))
    weight, pool, starts = a(64, 4), a(kind("slots"), kind("columns"), 64), a(batch + 1, dtype="int32")
    windows = a(kind("buffers"), kind("steps"), 3, 64)
    UpdateCall(a(batch, 64), weight, None, pool).check()
    UpdateCall(a(batch, seqlen, 64), weight, None, pool, window_out=windows).check()
    packed = UpdateCall(a(kind("tokens"), 64), weight, None, pool, query_start_loc=starts, max_seqlen=longest)
    for more in (dict(window_out=windows), dict(num_accepted_tokens=a(batch, dtype="int32"))):
        assert packed._replace(**more).check().batch == batch
    steps = a(batch, dtype="int32")
    assert CommitCall(pool, windows, steps).check().batch == batch


@pytest.mark.parametrize("kind", KINDS)
def test_symbols_pass_the_differentiable_form(kind):
    batch, seqlen = kind("batch"), kind("seqlen")
    x, states = a(batch, seqlen, kind("dim")), a(batch, 3, kind("dim"))
    assert RowsCall(x, a(kind("dim"), 4), initial_states=states, max_seqlen=seqlen).check().batch == batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_number_is_no_size(kind):
    for record, base in ((FnCall, FN), (UpdateCall, UPDATE), (CommitCall, COMMIT)):
        with pytest.raises(TypeError, match=f"^pad_slot_id: {HOST}, got s"):
            record(**base | dict(pad_slot_id=kind("s"))).check()


def test_what_is_known_of_a_symbol_is_checked():
    dim = Dimension("dim")
    with pytest.raises(ValueError, match=r"^max_seqlen: expected None or an integer >= 0, got -1$"):
        RowsCall(a(2, 3, dim), a(dim, 4), max_seqlen=-1).check()
    with pytest.raises(ValueError, match=r"^x: expected shape \[tokens, dim\]"):
        FnCall(a(dim, 2, 3), *FnCall(**FN)[1:]).check()
    with pytest.raises(ValueError, match=r"^cache_indices: expected shape \[batch=5\], got \[dim\+0\]"):
        UpdateCall(**UPDATE | dict(cache_indices=a(dim, dtype="int32"))).check()


def test_counts_and_windows_still_compare_numbers():
    """The same places as above, with numbers: nothing that can be known is let through."""
    with pytest.raises(ValueError, match=r"^conv_states: expected state_len >= width-1 \+ 5-1"):
        UpdateCall(**UPDATE | PACKED | COUNTS | dict(max_seqlen=np.int64(5))).check()
    with pytest.raises(ValueError, match=r"^window_out: expected steps >= 2"):
        UpdateCall(**UPDATE | dict(x=a(5, 2, 64), window_out=a(5, 1, 3, 64))).check()
    with pytest.raises(ValueError, match=r"^snapshot_block_size: expected an integer >= 1, got 0"):
        FnCall(**FN | SNAPSHOTS | dict(snapshot_block_size=np.int64(0))).check()
    with pytest.raises(ValueError, match=r"^window_out: expected buffers >= batch = 5"):
        CommitCall(
            **COMMIT | dict(window_indices=None, window_out=a(4, 4, 3, 64), accepted_steps=ROW_I32)
        ).check()
