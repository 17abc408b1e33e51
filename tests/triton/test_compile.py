"""The kernels of plain calls compiled with no GPU, as they are launched: no spills, 16-byte accesses on the fast path."""

import functools
import json
import re
from collections import Counter

import pytest
import triton

from tests.tools import code_calls, quick_coalesce
from tests.tools.triton_code import TARGETS, accesses, launches_of, machine_opcodes, resources
from triton_impl import config

CUDA = [name for name in TARGETS if name.startswith("sm")]  # the others: test_compile_amd.py
SM_90 = TARGETS["sm_90"]
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def launch_of(call, target=SM_90):
    (launch,) = launches_of(call, target)
    return launch


@functools.cache
def prefill(target="sm_90", **sizes):
    launch = launch_of(code_calls.prefill(**sizes), TARGETS[target])
    return launch, launch.compile()


@functools.cache
def update(target="sm_90", **sizes):
    launch = launch_of(code_calls.update(**sizes), TARGETS[target])
    return launch, launch.compile()


def spilled(binary):
    return resources(binary)[1]


def loads(binary):
    """Bytes a thread of every load."""
    return [size for (kind, size), count in accesses(binary).items() if kind == "load" for _ in range(count)]


def store_sizes(binary):
    return {size for kind, size in accesses(binary) if kind == "store"}


@pytest.mark.parametrize(
    ("target", "tokens", "batch"),
    [("sm_90", 33, 5), ("sm_90", 16384, 8), ("sm_90", 2176, 129), ("sm_80", 16384, 8), ("sm_100", 2176, 129)],
)
def test_prefill_fast_path(target, tokens, batch):
    launch, binary = prefill(target, tokens=tokens, batch=batch, schedule="flat")
    assert spilled(binary) == 0
    chosen = config.prefill_config(tokens, 8192, batch, 4, True, None, "flat", 32)
    vector = 2 * chosen.block_d // (32 * launch.options["num_warps"])  # bytes a thread
    assert store_sizes(binary) == {vector}, "a thread's channels in one access"
    sizes = loads(binary)
    assert sum(size < vector for size in sizes) <= 8, "offsets, slot and flag alone are narrow"
    grouped = chosen.group if chosen.stages == 1 else 0  # else they go to shared memory
    assert sizes.count(vector) >= grouped + 3 + 3, "a group of tokens, the halo, the window"


@pytest.mark.parametrize("target", CUDA)
def test_update_fast_path(target):
    for batch in (1, 256):
        launch, binary = update(target, batch=batch)
        assert spilled(binary) == 0
        chosen = config.update_config(batch, 8192, 2, 32)
        rows, vector = chosen.rows, 2 * chosen.block_d // (32 * launch.options["num_warps"])  # bytes a thread
        # windows and tokens, bias
        expected = Counter({("load", vector): 4 * rows + 1, ("store", vector): 4 * rows})
        expected += Counter({("load", 16): 4 * vector // 16, ("load", 4): rows})  # taps, slots
        assert accesses(binary) == expected, "nothing twice"


VARIANTS = [  # widths and dtypes in turns with the schedule; the widest with both
    ("bfloat16", 1, "flat"), ("bfloat16", 2, "per_sequence"), ("bfloat16", 3, "flat"), ("float16", 4, "per_sequence"),
    ("float32", 4, "flat"), ("bfloat16", 8, "flat"), ("bfloat16", 8, "per_sequence"), ("float32", 4, "per_sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "width", "schedule"), VARIANTS)
def test_no_spills_in_other_variants(dtype, width, schedule):
    assert spilled(prefill(dtype=dtype, width=width, schedule=schedule, max_seqlen=16384)[1]) == 0
    assert spilled(update(dtype=dtype, width=width)[1]) == 0


def test_no_spills_where_rows_are_packed_or_roll():
    rolls = dict(columns=9, num_accepted_tokens=code_calls.indices(64))
    for rows in (dict(packed=4), dict(seqlen=4, **rolls), dict(packed=4, **rolls)):
        assert spilled(launch_of(code_calls.update(batch=64, **rows)).compile()) == 0


@pytest.mark.parametrize(
    ("dtype", "width", "aligned"),
    [
        *((dtype, 4, aligned) for dtype in ("bfloat16", "float32") for aligned in (True, False)),
        ("bfloat16", 8, True), ("bfloat16", 3, True), ("float16", 1, False), ("bfloat16", 2, False),
    ],
)  # fmt: skip
def test_channel_first_x(dtype, width, aligned):
    """Each run of 16 bytes is read and written once by one thread, and nothing goes through shared memory.

    With an odd number of tokens no channel begins on a boundary, and Triton turns a tile round in shared memory.
    """
    tokens = 16384 if aligned else 16381
    launch, binary = prefill(tokens=tokens, dtype=dtype, width=width, layout="channel_first", schedule="flat")
    assert spilled(binary) == 0
    assert binary.metadata.shared <= (0 if aligned else 2048 * ITEMSIZE[dtype])
    chosen = config.prefill_config(tokens, 8192, 8, width, False, None, "flat")
    threads = 32 * launch.options["num_warps"]
    runs = chosen.block_t * chosen.block_d * ITEMSIZE[dtype] // 16 // threads  # a thread
    counts = accesses(binary)
    assert counts["store", 16] == (runs if aligned else 0)
    if width == 4 and dtype == "bfloat16":
        assert counts["load", 16] == (runs if aligned else 0)
        assert counts["load", 2] <= (32 if aligned else 12 * runs + 32), (
            "entries, bias; unaligned runs and halos"
        )


def test_tensors_off_a_boundary_are_read_in_smaller_accesses():
    """The alignment that a launch finds is what is compiled for."""
    aligned, odd = (
        launch_of(call).compile() for call in (code_calls.prefill(), code_calls.CALLS["prefill off 16 bytes"])
    )
    assert max(loads(aligned)) > max(size for size in loads(odd) if size < 8)
    assert accesses(odd)["load", 2] > accesses(aligned)["load", 2] + 16


def test_the_spill_check_can_fail():
    launch, binary = prefill(schedule="flat")
    assert spilled(binary) == 0
    few = launch._replace(options=launch.options | {"maxnreg": 24}).compile()
    assert spilled(few) > 0
    assert machine_opcodes(few)["LDL"] + machine_opcodes(few)["LDL.64"] + machine_opcodes(few)["LDL.128"] > 0


def test_the_silu_instructions_are_those_of_the_pallas_twin():
    launch, binary = update(batch=16)
    ptx = binary.asm["ptx"]
    chosen = config.update_config(16, 8192, 2, 32)
    outputs = chosen.rows * chosen.block_d // (32 * launch.options["num_warps"])  # a thread
    assert ptx.count("ex2.approx.ftz.f32") == ptx.count("rcp.approx.ftz.f32") == outputs
    assert not re.search(r"div\.\w+\.f32", ptx)
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == outputs * (4 + 1), (
        "one fused multiply-add a tap, one before exp2"
    )


@pytest.mark.parametrize("name", [name for name, call in code_calls.CALLS.items() if "triton" in call.twins])
def test_a_compile_hook_is_told_of_every_kernel(name):
    """`triton.knobs.runtime.jit_post_compile_hook`, that of caches and monitors: Triton describes the constants as JSON."""
    for launch in launches_of(code_calls.CALLS[name], SM_90):
        given = {path: value for path, value in launch.constants.items() if isinstance(value, tuple)}
        assert given, launch.constants
        json.dumps(list(given.values()))


@pytest.mark.parametrize(
    ("target", "rows"),
    [
        *(("sm_90", rows) for rows in ("1 token", "5 tokens", "16 tokens", "8 tokens in a ring")),
        ("sm_80", "16 tokens"), ("sm_100", "5 tokens"),
    ],
)  # fmt: skip
def test_short_rows(target, rows):
    launch, *_ = launches_of(code_calls.CALLS[f"prefill rows of {rows}"], TARGETS[target])
    assert launch.name == "_short_rows_kernel"
    binary = launch.compile()
    registers, spills = resources(binary)
    assert spills == 0
    assert target != "sm_90" or registers <= 96, "20 warps on a multiprocessor"
    assert store_sizes(binary) == {8}, "a thread's channels in one access"


NARROW = dict(width=1, schedule="per_sequence", max_seqlen=17)
COALESCED = {  # most kernels, tiles of two axes and pointers that loops carry among them
    name: code_calls.CALLS[name]
    for name in (
        "prefill channel-first ring", "prefill rows of 5 tokens", "update packed", "tree", "commit", "prologue update 1 row",
    )
} | {
    "prologue prefill": code_calls.front(code_calls.prefill(tokens=33, batch=5, **NARROW)),
    "gradient": code_calls.gradient(tokens=33, batch=5, states=False, **NARROW),
}  # fmt: skip


@pytest.mark.parametrize("name", COALESCED)
def test_coalescing_without_searches_is_triton_s(name, monkeypatch):
    """tests/tools/quick_coalesce.py stands in for a pass of the compiler in these files."""
    quick, found = quick_coalesce.coalesced, []
    monkeypatch.setattr(triton.knobs.compilation, "always_compile", True)
    monkeypatch.setattr(quick_coalesce, "coalesced", lambda module: found.append(quick(module)) or found[-1])
    for launch in launches_of(COALESCED[name], SM_90):
        mine, count = launch.compile().asm["ptx"], len(found)
        with quick_coalesce.left_out():
            assert launch.compile().asm["ptx"] == mine
        assert len(found) == count
        found.clear()
        assert count == (1 if triton.__version__.startswith("3.7.") else 0)
