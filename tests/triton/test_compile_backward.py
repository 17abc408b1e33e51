"""The backward kernels compiled with no GPU: no spills, wide accesses, no atomics, no inexact SiLU instructions."""

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.tools.covering import cover
from triton_impl import backward

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_kernel(kernel, target, pointers, constants, integers, aligned, **options):
    """Compiles as a launch would with these argument types, constants and alignments."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    assert set(pointers) | set(constants) | set(integers) == set(names), "an argument is not described"
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    return triton.compile(
        ASTSource(kernel, signature, constants, attrs=attributes),
        target=target,
        options={name: value for name, value in options.items() if value is not None},
    )


LAYOUTS = {  # which of dout, x and dx have unit token stride, which lie to 16 bytes as x does, and whether all rows do
    "token-first": ("", "", False),
    "channel-first": ("gxo", "gxo", True),
    "channel-first, expanded dout": ("xo", "xo", True),
    "uneven rows": ("gxo", "gxo", False),
    "slices of uneven rows": ("gxo", "gx", False),
}


@functools.cache
def compiled_back(
    target, dtype="bf16", width=4, flat=True, states=True, kinds=(), layout="token-first", **changes
):
    """`kinds` are pairs of a tensor and its dtype where that is not `dtype`; `layout` is a name of LAYOUTS."""
    first, in_phase, aligned = LAYOUTS[layout]
    run = 16 // ITEMSIZE[dict(kinds).get("x", dtype)] if "x" in first else 0
    chosen = backward.backward_config(
        16384, 8192, 8, width, run, 16384, "flat" if flat else "per_sequence", target.warp_size
    )._replace(**changes)
    floats = ["dout", "x", "weight", "bias", "dx"]
    pointers = dict.fromkeys(floats, "*" + dtype) | {"query_start_loc": "*i32", "partial": "*fp32"}
    unit = [f"stride_{n}_{'t' if n in first else 'd'}" for n in "gxo"]
    other = [f"stride_{n}_{'d' if n in first else 't'}" for n in "gxo"]
    rows = [f"stride_{n}_n" for n in "gxo"]
    integers = ["tokens", "dim", "batch", "stride_w_d", *other, *rows]
    constants = dict.fromkeys([*unit, "stride_w_j", "stride_b"], 1)
    state_strides = ["stride_f_n", "stride_f_l", "stride_i_n", "stride_i_l"]
    if states:
        pointers |= dict.fromkeys(["dfinal", "initial_states", "dinitial"], "*" + dtype)
        constants |= dict.fromkeys(["stride_f_d", "stride_i_d"], 1)
        integers += state_strides
    else:
        constants |= dict.fromkeys(["dfinal", "initial_states", "dinitial"])
        constants |= dict.fromkeys([*state_strides, "stride_f_d", "stride_i_d"], 0)
    pointers |= {name: "*" + kind for name, kind in dict(kinds).items()}
    bits = 8 * ITEMSIZE[dict(kinds).get("weight", dtype)] * width
    constants |= dict(
        WIDTH=width, SILU=True, HAS_BIAS=True, HAS_INITIAL=states, HAS_DFINAL=states, HAS_DINITIAL=states, HAS_SUMS=True,
        FLAT=flat, PTX=target.backend == "cuda", WORD_BITS=bits if bits in (32, 64) and width > 1 else 0,
        BLOCK_T=chosen.block_t, BLOCK_D=chosen.block_d, GROUP=chosen.group, SEARCH=chosen.search, STAGES=chosen.stages,
        DENSE=aligned, LEVELS=run.bit_length() - 1 if run else 0, ALIGNED=aligned, PHASE_G="g" in in_phase,
        PHASE_O="o" in in_phase,
    )  # fmt: skip
    uneven = {"tokens", "batch", "stride_w_d", *(other if run and not aligned else ())}
    even = [*pointers, *(name for name in integers if name not in uneven)]
    return compile_kernel(
        backward._backward_kernel,
        target,
        pointers,
        constants,
        integers,
        even,
        num_warps=chosen.num_warps,
    )


def compiled_reduce(target, dtype="bf16", width=4):
    pointers = {"partial": "*fp32", "dweight": "*" + dtype, "dbias": "*" + dtype}
    constants = dict(WIDTH=width, HAS_BIAS=True, ROWS=32, BLOCK_D=64)
    return compile_kernel(
        backward._reduce_kernel,
        target,
        pointers,
        constants,
        ["places", "dim"],
        [*pointers, "dim"],
        num_warps=4,
    )


def resources(compiled, target):
    """(registers a thread, bytes spilled)"""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        spilled = sum(map(int, re.findall(r"_spill_count:\s*(\d+)", text)))
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)), spilled
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        tools = triton.knobs.nvidia
        ptxas = (tools.ptxas_blackwell if target.arch >= 100 else tools.ptxas).path
        architecture = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        command = [ptxas, "-v", f"-arch={architecture}", str(path), "-o", str(path) + ".cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report).group(1))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def meetings(case):
    """Any two parts of a case, and every target with what most launches are; rarer layouts once."""
    target, layout, states = case
    if layout in ("channel-first, expanded dout", "slices of uneven rows"):
        return {layout} if target == "sm_90" and not states else set()
    pairs = set(itertools.combinations(case, 2))
    return pairs | {target} if layout == "token-first" and states else pairs


@pytest.mark.parametrize(
    ("target", "layout", "states"), cover(itertools.product(TARGETS, LAYOUTS, (True, False)), meetings)
)
def test_no_spills(target, layout, states):
    target = TARGETS[target]
    registers, spilled = resources(compiled_back(target, states=states, layout=layout), target)
    assert spilled == 0
    assert registers <= 128 or target.backend == "hip"


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_spills_in_the_reduction(target):
    assert resources(compiled_reduce(target), target)[1] == 0


# Widths, dtypes and layouts in turns with the schedule; the widest in every layout.
VARIANTS = [
    ("bf16", 1, "token-first", True, True),
    ("bf16", 2, "token-first", False, True),
    ("fp16", 6, "token-first", False, False),
    ("fp32", 4, "token-first", True, False),
    ("fp32", 8, "token-first", False, True),
    ("bf16", 3, "channel-first", False, False),
    ("fp32", 4, "channel-first", False, False),
    ("fp32", 8, "channel-first", True, False),
    ("bf16", 2, "uneven rows", True, False),
    ("bf16", 8, "uneven rows", False, False),
]


@pytest.mark.parametrize(("dtype", "width", "layout", "flat", "states"), VARIANTS)
def test_no_spills_in_other_variants(dtype, width, layout, flat, states):
    target = TARGETS["sm_90"]
    compiled = compiled_back(target, dtype, width, flat, states, layout=layout)
    assert resources(compiled, target)[1] == 0


TENSORS = ("dout", "dfinal", "x", "weight", "bias", "initial_states")
# Sets of tensors that are float32 where the others are float16: of any two, each is in one without the other.
MIXTURES = cover(
    [wide for count in (3, 2, 4, 1, 5) for wide in itertools.combinations(TENSORS, count)],
    lambda wide: itertools.product(wide, set(TENSORS) - set(wide)),
)


@pytest.mark.parametrize("wide", MIXTURES, ids=" ".join)
def test_any_mixture_of_dtypes_compiles(wide):
    """Types of a loop's variables must stay what they were: the interpreter does not look."""
    results = {"x": "dx", "initial_states": "dinitial"}
    names = [*wide, *(results[name] for name in wide if name in results)]
    flat = MIXTURES.index(wide) % 2 == 0
    layout, kinds = "token-first" if flat else "channel-first", tuple((name, "fp32") for name in names)
    compiled = compiled_back(TARGETS["sm_90"], "fp16", flat=flat, kinds=kinds, layout=layout)
    assert resources(compiled, TARGETS["sm_90"])[1] == 0


def test_the_spill_check_can_fail():
    target = TARGETS["sm_90"]
    compiled = compiled_back(target, states=False, block_d=512, group=4, num_warps=1)  # 16 channels a thread
    assert resources(compiled, target)[1] > 16


def test_every_token_is_read_and_written_once():
    """Four bytes a thread; the loop of eight tokens, three tokens before it and three of history."""
    ptx = compiled_back(TARGETS["sm_90"], states=False).asm["ptx"]
    found = re.findall(r"(ld|st|atom|red)\.global\.(?:[a-z_]\w*\.)*?(?:v(\d)\.)?b(\d+)", ptx)
    counts = [(kind, int(n or 1) * int(bits) // 8) for kind, n, bits in found]
    offsets = 1 + 2  # of the search, 4 bytes as well
    assert counts.count(("ld", 4)) == 2 * (8 + 3) + 3 + 1 + offsets, "x and dout, history, bias"
    assert counts.count(("st", 4)) == 8 + 1, "dx, and the zeros of the tail"
    assert counts.count(("st", 8)) == 4 + 1, "the sums of taps and bias"
    assert not {kind for kind, _ in counts} & {"atom", "red"}


def channel_first_accesses(ptx):
    """Counts of (kind, bytes) of global accesses, but those of the search and of the row's ends, and of the tail's zeros."""
    found = re.findall(r"(ld|st|atom|red)\.global\.(?:[a-z_]\w*\.)*?(?:v(\d)\.)?b(\d+)", ptx)
    return Counter((kind, int(n or 1) * int(bits) // 8) for kind, n, bits in found)


@pytest.mark.parametrize("layout", ["channel-first", "uneven rows"])
def test_runs_of_channel_first_rows_are_sixteen_byte_accesses(layout):
    """Lanes lie along a channel: half a warp's runs are one stretch of 256 bytes. Taken apart in registers."""
    compiled = compiled_back(TARGETS["sm_90"], states=False, layout=layout)
    counts = channel_first_accesses(compiled.asm["ptx"])
    steps = 2 if layout == "channel-first" else 1  # at the ends of a row and between, or between alone
    assert counts["ld", 16] == 2 * steps, "x and dout"
    assert counts["st", 16] == steps, "dx"
    if layout == "channel-first":
        assert counts["ld", 8] == 3 * steps + 1, "tokens around a run of x, behind one of dout; the taps"
        assert counts["ld", 2] == 1, "bias"
    assert not {kind for kind, _ in counts} & {"atom", "red"}
    ir = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<{(.*)}>", ir, re.MULTILINE))
    tiles = re.findall(r"tt\.(?:load|store) .*tensor<16x8x[48]x!tt\.ptr<bf16>, (#\w+)>", ir)
    assert len(tiles) == 2 * (5 + 1)
    assert all("threadsPerWarp = [16, 2, 1], warpsPerCTA = [1, 4, 1]" in layouts[name] for name in tiles)
    loops = ir[ir.index("tt.load", ir.index("16x8x8x!tt.ptr")) :]
    assert "convert_layout" not in loops[: loops.rindex("16x8x8x!tt.ptr")]


def test_the_silu_instructions():
    ptx = compiled_back(TARGETS["sm_90"]).asm["ptx"]
    assert ptx.count("ex2.approx.ftz.f32") == ptx.count("rcp.approx.ftz.f32") == 2 * (8 + 3)
    assert not re.search(r"div\.\w+\.f32", ptx)


def test_the_reduction_has_no_atomics():
    ptx = compiled_reduce(TARGETS["sm_90"]).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)
