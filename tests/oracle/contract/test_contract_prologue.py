"""The fronts of oracle/contract_prologue.py: what their checks let pass and what they refuse."""

import numpy as np
import pytest

from oracle import contract, contract_prologue
from oracle.contract import FnSizes, RowSizes
from oracle.contract_prologue import GatedConvSizes, PrologueSizes
from tests.oracle.contract.test_contract_records import roles_of, signatures_of
from tests.tools.contract_calls import (
    CHANNEL_GATE,
    COUNTS,
    DTYPES,
    F32,
    FN,
    FN_SIZES,
    GATES,
    HEADS,
    HOST,
    I32,
    INDEX,
    NO_POOL,
    OPERATIONS,
    PACKED,
    RING,
    ROLLING,
    SHARED,
    SNAPSHOTS,
    STEP_GATES,
    TREE,
    UPDATE_SIZES,
    WINDOWS,
    Dimension,
    SymInt,
    Tracer,
    a,
    accepts,
    name_rows,
    rejects,
)  # fmt: skip

HEAD_SIZES = (2, 4, 8, 8)
FRONT = PrologueSizes(FN_SIZES, *HEAD_SIZES, None)
STEP = PrologueSizes(UPDATE_SIZES, *HEAD_SIZES, None)
ROW_SIZES = RowSizes(33, 64, 4, 5)
STEPS = dict(x=a(5, 7, 64))
STEPS_SIZES = UPDATE_SIZES._replace(seqlen=7, tokens=35)
S0, B = SymInt("s0"), Dimension("b")
NUMBER = "expected a number known on the host"
EPS = "norm_eps: expected a finite number >= 2**-126, got "
SCALE = "q_scale: expected a finite number, got "
BOUND = "lower_bound: expected None or a finite number below 0, got "
NO_A = "expected None, since a is None"
OFFSETS = "channel_offsets: expected None, or 3 integers >= 0 with offset + dim <= 192, the channels of bcx, for dim=64, got "
CHANNELS = (
    "bcx: expected 3 * dim = 192 channels on the last axis, since channel_offsets is None and the weight has dim=64, got "
)  # fmt: skip

# Of each front: how many arguments are positional, fields with defaults, required keywords, numbers.
CONV = "activation={}, pad_slot_id=-1, max_seqlen=None, schedule='auto', backend='auto', validate=False, "
LAYOUT = "state_layout='front', cache_seqlens=None, write_indices=None, "
PREFILL = (
    CONV + LAYOUT + "empty_rows='skip', snapshot_indices=None, snapshot_block_size=None, "
    "num_computed_tokens=None, track_indices=None, track_lengths=None"
)
DECODE = (
    "activation={}, query_start_loc=None, num_accepted_tokens=None, max_seqlen=None, pad_slot_id=-1, backend='auto', "
    "validate=False, " + LAYOUT + "track_indices=None, window_out=None, window_indices=None, commit=True, "
    "tree_parents=None"
)
ROWS_LAST = "activation={}, max_seqlen=None, schedule='auto', backend='auto'"
POSITIONAL = {
    "fn": "7: {}, weight, bias, conv_states, query_start_loc, cache_indices=None, has_initial_state=None, ",
    "update": "5: {}, weight, bias, conv_states, cache_indices=None, ",
    "rows": "5: {}, weight, bias=None, initial_states=None, query_start_loc=None, ",
}
EXTRA = (
    "num_k_heads, num_v_heads, head_k_dim, head_v_dim, a=None, b=None, A_log=None, dt_bias=None, "
    "qk_l2norm=True, norm_eps=1e-06, q_scale=1.0, lower_bound=None, norm_rounding='storage', beta_rounding='none', "
)
SIGNATURES = {
    "gated_delta_prologue_fn": POSITIONAL["fn"].format("x") + EXTRA + PREFILL.format("'silu'") + ", channel_offset=None",
    "gated_delta_prologue_update": POSITIONAL["update"].format("x") + EXTRA + DECODE.format("'silu'") + ", channel_offset=None",
    "gated_delta_prologue": POSITIONAL["rows"].format("x") + EXTRA + ROWS_LAST.format("'silu'"),
    "gated_short_conv_fn": POSITIONAL["fn"].format("bcx") + "channel_offsets=None, " + PREFILL.format("None"),
    "gated_short_conv_update": POSITIONAL["update"].format("bcx") + "channel_offsets=None, " + DECODE.format("None"),
    "gated_short_conv": POSITIONAL["rows"].format("bcx") + "channel_offsets=None, " + ROWS_LAST.format("None"),
}  # fmt: skip
REQUIRED = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
NUMBERS = ("norm_eps", "q_scale", "lower_bound")
INSIDE = {
    "gated_delta_prologue_fn": contract.FnCall, "gated_delta_prologue_update": contract.UpdateCall,
    "gated_delta_prologue": contract.RowsCall, "gated_short_conv_fn": contract.FnCall,
    "gated_short_conv_update": contract.UpdateCall, "gated_short_conv": contract.RowsCall,
}  # fmt: skip

ACCEPTED = [
    # numbers
    ("numbers", {}, "(None, 1.0, None)"),
    ("numbers", dict(scale=np.float32(0.5), most=np.int64(-3)), "(None, 0.5, -3.0)"),
    ("numbers", dict(scale=10**309, most=-(10**309)), "(None, inf, -inf)"),
    # heads
    ("front_fn", {}, FRONT),
    ("front_fn", dict(num_k_heads=np.int64(2)), FRONT),
    (
        "front_fn",
        dict(num_k_heads=1, num_v_heads=1, head_k_dim=31, head_v_dim=2),
        FRONT._replace(num_k_heads=1, num_v_heads=1, head_k_dim=31, head_v_dim=2),
    ),
    (
        "front_fn",
        dict(
            FN, x=a(33, 768), weight=a(768, 4), bias=None, conv_states=a(8, 3, 768), num_k_heads=1, num_v_heads=1,
            head_k_dim=256, head_v_dim=256,
        ),
        PrologueSizes(FN_SIZES._replace(dim=768), 1, 1, 256, 256, None),
    ),
    ("front_fn", NO_POOL, FRONT._replace(conv=FN_SIZES._replace(num_slots=0, state_len=0))),
    ("front_fn", SNAPSHOTS | RING | dict(state_layout="front", cache_seqlens=None), FRONT),
    ("front_fn", dict(x=a(33, 80), channel_offset=16), FRONT),
    ("front_fn", dict(x=a(33, 80), channel_offset=B), FRONT),
    ("front_fn", dict(x=a(S0, 64)), FRONT._replace(conv=FN_SIZES._replace(tokens=S0))),
    # gates
    ("front_fn", GATES, FRONT._replace(gate="head")),
    ("front_fn", GATES | dict(dt_bias=None, b=None), FRONT._replace(gate="head")),
    ("front_fn", dict(b=GATES["b"]), FRONT),
    ("front_fn", GATES | CHANNEL_GATE, FRONT._replace(gate="channel")),
    ("front_fn", GATES | CHANNEL_GATE | dict(dt_bias=None), FRONT._replace(gate="channel")),
    ("front_fn", GATES | dict(lower_bound=-5), FRONT._replace(gate="head")),
    ("front_fn", GATES | dict(lower_bound=-(2.0**128 - 2.0**104)), FRONT._replace(gate="head")),
    ("front_fn", GATES | dict(lower_bound=np.float32(-0.5)), FRONT._replace(gate="head")),
    ("front_fn", GATES | dict(a=a(33, 4, dtype="float16"), b=a(33, 4, dtype=F32)), FRONT._replace(gate="head")),
    # options
    ("front_fn", dict(qk_l2norm=False, norm_eps=2.0**-126, q_scale=-3, activation=None), FRONT),
    ("front_fn", dict(norm_eps=2.0**128 - 2.0**104, q_scale=2.0**128 - 2.0**104), FRONT),
    ("front_fn", dict(norm_eps=1, q_scale=-(2.0**128 - 2.0**104)), FRONT),
    ("front_fn", dict(norm_eps=np.float64(1e-5), q_scale=0, norm_rounding="none"), FRONT),
    ("front_fn", dict(b=GATES["b"], beta_rounding="storage"), FRONT),
    # decode steps
    ("front_update", {}, STEP),
    ("front_update", STEP_GATES, STEP._replace(gate="head")),
    ("front_update", STEP_GATES | dict(a=a(5, 4, 8), dt_bias=a(4, 8)), STEP._replace(gate="channel")),
    (
        "front_update",
        STEPS | STEP_GATES | dict(a=a(5, 7, 4), b=a(5, 7, 4)),
        PrologueSizes(STEPS_SIZES, *HEAD_SIZES, "head"),
    ),
    (
        "front_update",
        STEPS | STEP_GATES | dict(a=a(5, 7, 4, 8), b=a(5, 7, 4), dt_bias=a(4, 8)),
        PrologueSizes(STEPS_SIZES, *HEAD_SIZES, "channel"),
    ),
    (
        "front_update",
        PACKED | STEP_GATES | dict(a=a(9, 4), b=a(9, 4)),
        PrologueSizes(UPDATE_SIZES._replace(seqlen=None, tokens=9), *HEAD_SIZES, "head"),
    ),
    ("front_update", ROLLING, STEP._replace(conv=UPDATE_SIZES._replace(seqlen=None, tokens=9, state_len=6))),
    ("front_update", WINDOWS, STEP),
    ("front_update", dict(x=a(5, 80), channel_offset=16), STEP),
    ("front_update", TREE, STEP._replace(conv=UPDATE_SIZES._replace(seqlen=2, tokens=10))),
    # the differentiable form
    ("front_rows", {}, PrologueSizes(ROW_SIZES, *HEAD_SIZES, None)),
    ("front_rows", GATES, PrologueSizes(ROW_SIZES, *HEAD_SIZES, "head")),
    (
        "front_rows",
        GATES | dict(x=a(5, 7, 64), query_start_loc=None, a=a(5, 7, 4, 8), dt_bias=a(4, 8), b=a(5, 7, 4)),
        PrologueSizes(ROW_SIZES._replace(tokens=35), *HEAD_SIZES, "channel"),
    ),
    # the gated short convolution
    ("gated_fn", {}, GatedConvSizes(FN_SIZES, (0, 64, 128))),
    ("gated_fn", dict(channel_offsets=(128, 0, 64)), GatedConvSizes(FN_SIZES, (128, 0, 64))),
    ("gated_fn", dict(channel_offsets=[np.int64(0), 0, 0]), GatedConvSizes(FN_SIZES, (0, 0, 0))),
    ("gated_fn", dict(bcx=a(33, 64), channel_offsets=(0, 0, 0)), GatedConvSizes(FN_SIZES, (0, 0, 0))),
    ("gated_fn", dict(bcx=a(33, 200), channel_offsets=(0, 136, 1)), GatedConvSizes(FN_SIZES, (0, 136, 1))),
    (
        "gated_fn",
        NO_POOL,
        GatedConvSizes(FN_SIZES._replace(num_slots=0, state_len=0), (0, 64, 128)),
    ),
    ("gated_update", {}, GatedConvSizes(UPDATE_SIZES, (0, 64, 128))),
    ("gated_update", dict(bcx=a(5, 7, 192)), GatedConvSizes(STEPS_SIZES, (0, 64, 128))),
    (
        "gated_update",
        dict(bcx=a(9, 192), query_start_loc=a(6, dtype=I32)),
        GatedConvSizes(UPDATE_SIZES._replace(seqlen=None, tokens=9), (0, 64, 128)),
    ),
    ("gated_update", WINDOWS, GatedConvSizes(UPDATE_SIZES, (0, 64, 128))),
    ("gated_rows", {}, GatedConvSizes(ROW_SIZES, (0, 64, 128))),
    (
        "gated_rows",
        dict(bcx=a(5, 7, 192), query_start_loc=None),
        GatedConvSizes(ROW_SIZES._replace(tokens=35), (0, 64, 128)),
    ),
    # values
    ("front_values", {}, None),
    ("front_step_values", {}, None),
    ("gated_values", {}, None),
    ("gated_step_values", {}, None),
]  # fmt: skip

REJECTED = [
    # numbers
    ("numbers", dict(scale=True), TypeError, f"scale: {NUMBER}, got True"),
    ("numbers", dict(scale="1"), TypeError, f"scale: {NUMBER}, got '1'"),
    ("numbers", dict(scale=np.zeros(())), TypeError, f"scale: {NUMBER}, got numpy.ndarray"),
    ("numbers", dict(most=Tracer()), TypeError, f"most: {NUMBER}, got tests.Tracer (make the argument static)"),
    # heads
    ("front_fn", dict(num_k_heads=None), TypeError, f"num_k_heads: {HOST}, got None"),
    ("front_fn", dict(num_v_heads=4.0), TypeError, f"num_v_heads: {HOST}, got 4.0"),
    ("front_fn", dict(head_k_dim=S0), TypeError, f"head_k_dim: {HOST}, got s0+0"),
    ("front_fn", dict(head_v_dim=True), TypeError, f"head_v_dim: {HOST}, got True"),
    ("front_fn", dict(num_k_heads=0), ValueError, "num_k_heads: expected an integer >= 1, got 0"),
    ("front_fn", dict(num_v_heads=-4), ValueError, "num_v_heads: expected an integer >= 1, got -4"),
    ("front_fn", dict(head_k_dim=0), ValueError, "head_k_dim: expected an integer from 1 to 256, got 0"),
    ("front_fn", dict(head_k_dim=257), ValueError, "head_k_dim: expected an integer from 1 to 256, got 257"),
    ("front_fn", dict(head_v_dim=257), ValueError, "head_v_dim: expected an integer from 1 to 256, got 257"),
    ("front_fn", dict(num_v_heads=3), ValueError, "num_v_heads: expected a multiple of num_k_heads=2, got 3"),
    (
        "front_fn",
        dict(head_v_dim=9),
        ValueError,
        "weight: expected dim=68 on axis 0, of 2 * 2 heads of 8 and 4 heads of 9, got 64",
    ),
    ("front_update", dict(num_v_heads=1), ValueError, "num_v_heads: expected a multiple of num_k_heads=2, got 1"),
    ("front_rows", dict(head_k_dim=257), ValueError, "head_k_dim: expected an integer from 1 to 256, got 257"),
    # what the convolution refuses
    ("front_fn", dict(weight=a(64)), ValueError, "weight: expected shape [dim, width], got [64]"),
    ("front_fn", dict(x=a(33, 63)), ValueError, "weight: expected shape [dim=63, width], got [64, 4]"),
    ("front_fn", dict(bias=a(63)), ValueError, "bias: expected shape [dim=64], got [63]"),
    ("front_fn", dict(NO_POOL, write_indices=a(5, dtype=I32)), ValueError, f"write_indices: {SHARED}"),
    ("front_fn", dict(cache_indices=a(5, dtype=F32)), TypeError, f"cache_indices: {INDEX}, got float32"),
    ("front_fn", dict(activation="gelu"), ValueError, "activation: expected None, 'silu' or 'swish', got 'gelu'"),
    (
        "front_update",
        COUNTS | dict(state_layout="back"),
        ValueError,
        "state_layout: expected 'front', since num_accepted_tokens is given, got 'back'",
    ),
    (
        "front_rows",
        dict(initial_states=a(5, 4, 64)),
        ValueError,
        "initial_states: expected shape [batch=5, width-1=3, dim=64], got [5, 4, 64]",
    ),
    # gates
    ("front_fn", GATES | dict(a=None), ValueError, f"A_log: {NO_A}"),
    ("front_fn", dict(dt_bias=a(4)), ValueError, f"dt_bias: {NO_A}"),
    ("front_fn", dict(lower_bound=-1.0), ValueError, f"lower_bound: {NO_A}"),
    ("front_fn", GATES | dict(a=3), TypeError, "a: expected an array, got int"),
    ("front_fn", GATES | dict(a=a(33)), ValueError, "a: expected shape [tokens=33, num_v_heads=4], got [33]"),
    ("front_fn", GATES | dict(a=a(33, 2)), ValueError, "a: expected shape [tokens=33, num_v_heads=4], got [33, 2]"),
    ("front_fn", GATES | dict(a=a(32, 4)), ValueError, "a: expected shape [tokens=33, num_v_heads=4], got [32, 4]"),
    (
        "front_fn",
        GATES | dict(a=a(33, 4, 7)),
        ValueError,
        "a: expected shape [tokens=33, num_v_heads=4, head_k_dim=8], got [33, 4, 7]",
    ),
    ("front_fn", GATES | dict(a=a(33, 4, dtype=I32)), TypeError, f"a: {DTYPES}, got int32"),
    ("front_fn", GATES | dict(b=a(33, 2)), ValueError, "b: expected shape [tokens=33, num_v_heads=4], got [33, 2]"),
    ("front_fn", GATES | dict(b=a(33, 4, 8)), ValueError, "b: expected shape [tokens=33, num_v_heads=4], got [33, 4, 8]"),
    ("front_fn", GATES | dict(b=a(33, 4, dtype=I32)), TypeError, f"b: {DTYPES}, got int32"),
    ("front_fn", GATES | dict(A_log=None), ValueError, "A_log: expected shape [num_v_heads], since a is given, got None"),
    ("front_fn", GATES | dict(A_log=a(2)), ValueError, "A_log: expected shape [num_v_heads=4], got [2]"),
    ("front_fn", GATES | dict(A_log=a(4, dtype=I32)), TypeError, f"A_log: {DTYPES}, got int32"),
    ("front_fn", GATES | dict(dt_bias=a(2)), ValueError, "dt_bias: expected shape [num_v_heads=4], got [2]"),
    ("front_fn", GATES | dict(dt_bias=a(4, 8)), ValueError, "dt_bias: expected shape [num_v_heads=4], got [4, 8]"),
    (
        "front_fn",
        GATES | CHANNEL_GATE | dict(dt_bias=a(4)),
        ValueError,
        "dt_bias: expected shape [num_v_heads=4, head_k_dim=8], got [4]",
    ),
    ("front_fn", GATES | dict(dt_bias=a(4, dtype=I32)), TypeError, f"dt_bias: {DTYPES}, got int32"),
    ("front_fn", GATES | dict(lower_bound=0), ValueError, f"{BOUND}0"),
    ("front_fn", GATES | dict(lower_bound=-float("inf")), ValueError, f"{BOUND}-inf"),
    ("front_fn", GATES | dict(lower_bound=float("nan")), ValueError, f"{BOUND}nan"),
    ("front_fn", GATES | dict(lower_bound="-5"), TypeError, f"lower_bound: {NUMBER}, got '-5'"),
    (
        "front_update",
        STEPS | STEP_GATES,
        ValueError,
        "a: expected shape [batch=5, seqlen=7, num_v_heads=4], got [5, 4]",
    ),
    (
        "front_update",
        STEPS | dict(b=a(5, 7, 5)),
        ValueError,
        "b: expected shape [batch=5, seqlen=7, num_v_heads=4], got [5, 7, 5]",
    ),
    ("front_rows", GATES | dict(b=a(33, 2)), ValueError, "b: expected shape [tokens=33, num_v_heads=4], got [33, 2]"),
    # options
    ("front_fn", dict(qk_l2norm=1), TypeError, "qk_l2norm: expected True or False, got 1"),
    ("front_fn", dict(norm_eps=0), ValueError, f"{EPS}0"),
    ("front_fn", dict(norm_eps=2.0**-127), ValueError, f"{EPS}{2.0**-127!r}"),
    ("front_fn", dict(norm_eps=2.0**128), ValueError, f"{EPS}{2.0**128!r}"),
    ("front_fn", dict(norm_eps=10**309), ValueError, f"{EPS}{10**309}"),
    ("front_fn", dict(norm_eps=float("nan")), ValueError, f"{EPS}nan"),
    ("front_fn", dict(norm_eps=None), TypeError, f"norm_eps: {NUMBER}, got None"),
    ("front_fn", dict(q_scale=float("inf")), ValueError, f"{SCALE}inf"),
    ("front_fn", dict(q_scale=-float("inf")), ValueError, f"{SCALE}-inf"),
    ("front_fn", dict(q_scale=float("nan")), ValueError, f"{SCALE}nan"),
    ("front_fn", dict(q_scale=True), TypeError, f"q_scale: {NUMBER}, got True"),
    ("front_fn", dict(norm_rounding="float32"), ValueError, "norm_rounding: expected one of ('storage', 'none'), got 'float32'"),
    ("front_fn", dict(beta_rounding=None), ValueError, "beta_rounding: expected one of ('none', 'storage'), got None"),
    # the gated short convolution
    ("gated_fn", dict(bcx=a(192)), ValueError, "bcx: expected shape [tokens, channels], got [192]"),
    ("gated_fn", dict(bcx=a(5, 7, 192)), ValueError, "bcx: expected shape [tokens, channels], got [5, 7, 192]"),
    ("gated_fn", dict(bcx=3), TypeError, "bcx: expected an array, got int"),
    ("gated_fn", dict(bcx=a(33, 192, dtype=I32)), TypeError, f"bcx: {DTYPES}, got int32"),
    ("gated_fn", dict(bcx=a(33, 191)), ValueError, f"{CHANNELS}191"),
    ("gated_fn", dict(weight=a(64)), ValueError, "weight: expected shape [dim, width], got [64]"),
    ("gated_fn", dict(channel_offsets=(0, 64)), ValueError, f"{OFFSETS}(0, 64)"),
    ("gated_fn", dict(channel_offsets=(0, 64, 128, 0)), ValueError, f"{OFFSETS}(0, 64, 128, 0)"),
    ("gated_fn", dict(channel_offsets=(0, 64, 129)), ValueError, f"{OFFSETS}(0, 64, 129)"),
    ("gated_fn", dict(channel_offsets=(0, -1, 64)), ValueError, f"{OFFSETS}(0, -1, 64)"),
    ("gated_fn", dict(channel_offsets=3), TypeError, "channel_offsets: expected a tuple of integers, got int"),
    ("gated_fn", dict(channel_offsets=(0, 64.0, 128)), TypeError, f"channel_offsets: {HOST}, got 64.0"),
    ("gated_fn", dict(bias=a(63)), ValueError, "bias: expected shape [dim=64], got [63]"),
    ("gated_update", dict(bcx=a(192)), ValueError, "bcx: expected shape [batch, channels] or [batch, seqlen, channels], got [192]"),
    (
        "gated_update",
        dict(bcx=a(5, 7, 192), query_start_loc=a(6, dtype=I32)),
        ValueError,
        "bcx: expected shape [tokens, channels], got [5, 7, 192]",
    ),
    ("gated_update", dict(commit=1), TypeError, "commit: expected True or False, got 1"),
    (
        "gated_rows",
        dict(query_start_loc=None),
        ValueError,
        "bcx: expected shape [batch, seqlen, channels], got [33, 192]",
    ),
    ("gated_rows", dict(bcx=a(5, 7, 192)), ValueError, "bcx: expected shape [tokens, channels], got [5, 7, 192]"),
    # values
    (
        "front_values",
        dict(cache_indices=[4, 4, 4]),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 4 in rows 0 and 2",
    ),
    (
        "front_step_values",
        dict(cache_indices=[4, 0, 5]),
        ValueError,
        "cache_indices: expected pad_slot_id=-1 or a slot in [0, 5) in row 2, got 5",
    ),
    (
        "gated_values",
        dict(query_start_loc=[0, 1, 1, 7]),
        ValueError,
        "query_start_loc: expected row 2 to end between its start 1 and tokens=6, got 7",
    ),
    (
        "gated_step_values",
        dict(cache_indices=[4, 0, 4]),
        ValueError,
        "cache_indices: expected distinct slots for live rows, got 4 in rows 0 and 2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "overrides", "result"), ACCEPTED, ids=name_rows(ACCEPTED))
def test_accepts(operation, overrides, result):
    accepts(operation, overrides, result)


@pytest.mark.parametrize(("operation", "overrides", "error", "text"), REJECTED, ids=name_rows(REJECTED))
def test_rejects(operation, overrides, error, text):
    rejects(operation, overrides, error, text)


def test_signatures():
    """The fields and their defaults, word for word: nothing may change them by accident."""
    assert signatures_of(contract_prologue.RECORDS) == SIGNATURES


@pytest.mark.parametrize("operation", SIGNATURES)
def test_roles_are_those_of_the_convolution(operation):
    record, inside = contract_prologue.RECORDS[operation], INSIDE[operation]
    written, indices, options, _ = roles_of(record)
    plain = roles_of(inside)
    assert (written, indices) == plain[:2]
    front = "delta" in operation
    assert (REQUIRED if front else ()) == record.REQUIRED
    assert (NUMBERS if front else ()) == record.FLOATS
    own = [option for option in options.split() if option not in plain[2].split()]
    heads = [f"{name}:integer" for name in REQUIRED]
    numbers = (
        "qk_l2norm:bool norm_eps:float q_scale:float lower_bound:float norm_rounding:str beta_rounding:str"
    )
    assert own == ([*heads, *numbers.split()] if front else ["channel_offsets:sizes"])
    arrays = ("a", "b", "A_log", "dt_bias")
    assert [name for name in record.ARRAYS if name not in inside.ARRAYS] == list(
        arrays if front else ("bcx",)
    )


@pytest.mark.parametrize(
    "operation", ["front_fn", "front_update", "front_rows", "gated_fn", "gated_update", "gated_rows"]
)
def test_the_convolution_inside(operation):
    """Every argument that the plain operation has as well arrives there."""
    kinds = {"front_fn": "PrologueFnCall", "front_update": "PrologueUpdateCall", "front_rows": "PrologueCall",
             "gated_fn": "GatedConvFnCall", "gated_update": "GatedConvUpdateCall", "gated_rows": "GatedConvCall"}  # fmt: skip
    record = getattr(contract_prologue, kinds[operation])
    call = record(**{name: f"the {name}" for name in record._fields})
    inside = call.convolution()
    assert type(inside) is INSIDE[record.OPERATION]
    for name in inside._fields:
        missing = {"residual": None, "split_sizes": None, "channel_offset": None, "x": "the bcx"}
        assert getattr(inside, name) == (f"the {name}" if name in record._fields else missing[name])
    assert OPERATIONS[operation][1].keys() <= set(record._fields)


def test_a_call_is_normalised():
    call = contract_prologue.PrologueFnCall(
        **FN
        | HEADS
        | GATES
        | dict(num_k_heads=np.int64(2), norm_eps=1, q_scale=np.float32(0.25), lower_bound=-5)
    )
    plain = contract.normalised(call)
    assert repr(plain[7:11]) == "(2, 4, 8, 8)"
    assert repr((plain.norm_eps, plain.q_scale, plain.lower_bound)) == "(1.0, 0.25, -5.0)"


def test_sizes_name_what_they_are():
    assert FRONT.conv == FnSizes(33, 64, 4, 5, 8, 3)
    assert PrologueSizes._fields == ("conv", "num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "gate")
    assert contract_prologue.PrologueOutput._fields == ("q", "k", "v", "g", "beta", "conv_states")
    assert contract_prologue.PrologueWindowOutput._fields == (
        *contract_prologue.PrologueOutput._fields,
        "window_out",
    )
