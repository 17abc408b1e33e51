"""The kernels of the extended operations compiled with no GPU, as they are launched: no spills, wide accesses."""

import math
import re

import pytest

from tests.tools.code_calls import QKV, Array, commit, indices, prefill, update, verify
from tests.tools.triton_code import TARGETS, accesses, launches_of, resources

CUDA = [name for name in TARGETS if name.startswith("sm")]  # the others: test_compile_amd.py
SM_90 = TARGETS["sm_90"]


def spilled(binary):
    return resources(binary)[1]


def sizes(binary, wanted):
    """The set of bytes a thread of loads, or of stores."""
    return {size for kind, size in accesses(binary) if kind == wanted}


@pytest.mark.parametrize("target", CUDA)
def test_verify_fast_path(target):
    (launch,) = launches_of(verify(), TARGETS[target])
    binary = launch.compile()
    assert spilled(binary) == 0
    warps = math.prod(launch.grid) * launch.options["num_warps"]
    assert warps >= 4096, "enough warps to fill the memory's pipes"
    counts = accesses(binary)
    assert counts["store", 8] == 4 + 4 * 3, "outputs and windows"
    assert sizes(binary, "store") == {8}
    assert counts["load", 8] == 4 + 3 + 1, "tokens, window, bias: nothing twice"
    assert counts["load", 16] == 2, "taps"
    text = binary.asm["ptx"]
    first_store, loads = (
        text.index("st.global"),
        [m.start() for m in re.finditer(r"ld\.global\.v2\.b32", text)],
    )
    assert sum(place < first_store for place in loads) >= 4 + 3, (
        "all inputs are asked for before a result is stored"
    )


FOUR = dict(batch=64, seqlen=4)
WIDE = Array((64, 4, 8192), "float32")
STEPS = {
    "decode back": update(batch=64, columns=4, state_layout="back"),
    "decode ring": update(batch=64, columns=4, state_layout="ring", cache_seqlens=indices(64)),
    "write and track": update(batch=64, write_indices=indices(64), track_indices=indices(64)),
    "verify ring": verify(columns=9, state_layout="ring", cache_seqlens=indices(64)),
    "packed": verify(pack=True),
    "rolling": update(**FOUR, columns=7, num_accepted_tokens=indices(64), write_indices=indices(64)),
    "residual": update(**FOUR, residual=Array((64, 4, 8192))),
    "split": update(**FOUR, split_sizes=QKV),
    "wide taps": verify(width=8),
    "float32": verify(dtype="float32", residual=WIDE),
    "mixed": verify(commit=True, windows="float32"),
    "part": update(**FOUR, wide=4096, channel_offset=2048, split_sizes=QKV),
    "tree": verify(tree_parents=indices(64, 4)),
    "tree of 32": verify(steps=32, tree_parents=indices(64, 32)),
    "tree ring": verify(
        tree_parents=indices(64, 4), state_layout="ring", cache_seqlens=indices(64), columns=5, split_sizes=QKV,
        residual=Array((64, 4, 8192)),
    ),
    "tree wide taps": verify(width=8, tree_parents=indices(64, 4)),
}  # fmt: skip
# steps of equal rows in front of their slots, without windows: two channels a thread in twice the warps
TWO_CHANNELS = {
    "write and track", "rolling", "residual", "split", "part"
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_no_spills_in_steps_and_trees(name):
    (launch,) = launches_of(STEPS[name], SM_90)
    binary = launch.compile()
    assert spilled(binary) == 0
    narrow = {4} if name in TWO_CHANNELS else {8}
    assert sizes(binary, "store") <= narrow | {2 * size for size in narrow}
    assert sizes(binary, "store") & narrow, "of bfloat16; what is float32 takes twice the bytes"


@pytest.mark.parametrize("target", CUDA)
def test_commit_is_a_copy(target):
    (launch,) = launches_of(commit(), TARGETS[target])
    binary = launch.compile()
    assert spilled(binary) == 0
    counts = accesses(binary)
    assert counts["load", 16] == counts["store", 16] == 3
    assert counts.total() == 3 + 3 + 3, "and step, slot and buffer"


SNAPSHOTS = dict(snapshot_indices=indices(8, 64), snapshot_block_size=64, num_computed_tokens=indices(8))
RESIDUAL = dict(residual=Array((16384, 8192)))
ROWS = dict(schedule="per_sequence", max_seqlen=16384)
FLAT = dict(schedule="flat")
QUEUE = dict(tokens=528, batch=17, dim=2560)  # a chunk among decode rows
PREFILLS = {  # with how many launches: one for the outputs, one for states that the plain rule does not leave
    "split": (1, prefill(**FLAT, split_sizes=QKV)),
    "split rows": (1, prefill(**ROWS, split_sizes=QKV)),
    "short rows": (1, prefill(**FLAT, split_sizes=QKV, batch=512)),
    "residual": (1, prefill(**FLAT, **RESIDUAL)),
    "residual short rows": (1, prefill(**FLAT, **RESIDUAL, batch=512)),
    "small": (1, prefill(**FLAT, residual=Array((64, 8192)), split_sizes=QKV, tokens=64)),
    "few blocks": (1, prefill(**FLAT, **QUEUE)),
    "few blocks, wide taps": (1, prefill(**FLAT, **QUEUE, width=8)),
    "part": (1, prefill(**FLAT, wide=4096, channel_offset=1024, split_sizes=QKV)),
    "channel first": (
        1, prefill(**FLAT, layout="channel_first", residual=Array((16384, 8192), layout="channel_first"), split_sizes=QKV)
    ),
    "back": (2, prefill(**FLAT, state_layout="back", columns=4, write_indices=indices(8))),
    "ring": (
        2, prefill(**FLAT, state_layout="ring", columns=4, cache_seqlens=indices(8), write_indices=indices(8))
    ),
    "snapshots": (2, prefill(**FLAT, **SNAPSHOTS)),
    "track": (2, prefill(**FLAT, track_indices=indices(8), track_lengths=indices(8), empty_rows="apply")),
    "wide taps": (2, prefill(**FLAT, width=8, **RESIDUAL, **SNAPSHOTS)),
    "float32": (1, prefill(**FLAT, dtype="float32", split_sizes=QKV, residual=Array((16384, 8192), "float32"))),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILLS)
def test_no_spills_in_prefills(name):
    count, call = PREFILLS[name]
    launches = launches_of(call, SM_90)
    assert len(launches) == count
    for launch in launches:
        assert spilled(launch.compile()) == 0


@pytest.mark.parametrize(
    ("target", "name"),
    [*(("sm_90", name) for name in ("split", "part", "residual")), ("sm_80", "residual"), ("sm_100", "part")],
)
def test_prefill_loads_and_stores_as_wide_as_the_plain_one(name, target):
    """Programs, warps and the width of accesses do not change with where the result goes."""
    (mine,) = launches_of(PREFILLS[name][1], TARGETS[target])
    (plain,) = launches_of(prefill(**FLAT), TARGETS[target])
    assert mine.grid == plain.grid
    assert mine.options == plain.options
    binaries = [launch.compile() for launch in (mine, plain)]
    assert [spilled(binary) for binary in binaries] == [0, 0]
    widest = [{kind: max(sizes(binary, kind)) for kind in ("load", "store")} for binary in binaries]
    assert widest[0] == widest[1]
    stores = [{key: n for key, n in accesses(binary).items() if key[0] == "store"} for binary in binaries]
    assert stores[0] == stores[1], "outputs, and the windows of rows of one token and of longer ones"


@pytest.mark.parametrize("target", CUDA)
def test_snapshots_fast_path(target):
    """A program loads a window and stores it, 16 bytes a thread; programs follow the tokens, not the table."""
    _, states = launches_of(PREFILLS["snapshots"][1], TARGETS[target])
    assert math.prod(states.grid) == (8 + 16384 // 64 + 1) * 32
    binary = states.compile()
    assert spilled(binary) == 0
    assert sizes(binary, "store") == {16}


def test_the_checks_can_fail():
    """Too few registers spill, and tensors off their alignment are not accessed 8 bytes at a time."""
    (launch,) = launches_of(verify(), SM_90)
    few = launch._replace(options=launch.options | {"maxnreg": 32}).compile()
    assert spilled(few) > 0
    (uneven,) = launches_of(verify(dim=8195), SM_90)
    assert max(sizes(uneven.compile(), "store")) < 8
