"""The backward kernels compiled with no GPU: no spills, wide accesses, no atomics, no inexact SiLU instructions."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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


LAYOUTS = {  # tensors of unit token stride, and whether they are dense rows of a multiple of 16 bytes
    "channel-first": ("gxo", True),
    "channel-first x": ("xo", True),
    "channel-first dout": ("g", True),
    "uneven rows": ("gxo", False),
}


def compiled_walk(
    target, dtype="bf16", width=4, flat=True, states=True, kinds=(), layout=("", False), **changes
):
    """`kinds` are the dtypes of tensors that differ from `dtype`, by name; `layout` is one of LAYOUTS."""
    first, aligned = layout
    of = {"g": "dout", "x": "x", "o": "dx"}
    tokens = {n: 16 // ITEMSIZE[dict(kinds).get(name, dtype)] if n in first else 1 for n, name in of.items()}
    tiles = backward.Tiles(*(n.bit_length() - 1 for n in tokens.values()), aligned)
    chosen = backward.backward_config(
        16384, 8192, 8, width, 16384, "flat" if flat else "per_sequence", target.warp_size,
        backward.tiles_at_once(tiles, states),
    )  # fmt: skip
    chosen = chosen._replace(**changes)
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
        BLOCK_T=chosen.block_t, BLOCK_D=chosen.block_d, GROUP=chosen.group, SEARCH=chosen.search,
        DENSE=aligned, TILE_G=tiles.g, TILE_X=tiles.x, TILE_O=tiles.o, ALIGNED=aligned,
    )  # fmt: skip
    even = [*pointers, *(name for name in integers if name not in ("tokens", "batch", "stride_w_d"))]
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


@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_spills(target, states):
    registers, spilled = resources(compiled_walk(target, states=states), target)
    assert spilled <= (16 if target.arch == 100 else 0), "ptxas for sm_100 stops at fewer registers by itself"
    assert registers <= 128 or target.backend == "hip"
    assert resources(compiled_reduce(target), target)[1] == 0


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "per_sequence"])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 6), ("fp32", 4), ("fp32", 8), ("bf16", 8)],
)
def test_no_spills_in_other_variants(dtype, width, flat):
    target = TARGETS["sm_90"]
    assert resources(compiled_walk(target, dtype, width, flat), target)[1] == 0


@pytest.mark.parametrize("odd", ["dout", "dfinal", "x", "weight", "bias", "initial_states"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "per_sequence"])
def test_any_mixture_of_dtypes_compiles(odd, flat):
    """Types of a loop's variables must stay what they were: the interpreter does not look."""
    kinds = {odd: "fp32"}
    if odd == "x":
        kinds["dx"] = "fp32"
    if odd == "initial_states":
        kinds["dinitial"] = "fp32"
    compiled = compiled_walk(TARGETS["sm_90"], "fp16", flat=flat, kinds=kinds)
    assert resources(compiled, TARGETS["sm_90"])[1] == 0


@pytest.mark.parametrize("states", [True, False], ids=["states", "no states"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_spills_in_other_layouts(layout, states):
    target = TARGETS["sm_90"]
    assert resources(compiled_walk(target, states=states, layout=layout), target)[1] == 0


@pytest.mark.parametrize("layout", ["channel-first", "uneven rows"])
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "gfx942"])
def test_no_spills_of_tiles_on_other_targets(target, layout):
    target = TARGETS[target]
    spilled = resources(compiled_walk(target, layout=LAYOUTS[layout]), target)[1]
    assert spilled <= (16 if target.arch == 100 else 0), "as in test_no_spills"


@pytest.mark.parametrize("layout", ["channel-first", "uneven rows"])
@pytest.mark.parametrize(
    ("dtype", "width"), [("bf16", 1), ("bf16", 2), ("fp32", 4), ("fp32", 8), ("bf16", 8)]
)
def test_no_spills_of_tiles_in_other_variants(dtype, width, layout):
    target = TARGETS["sm_90"]
    compiled = compiled_walk(target, dtype, width, states=False, layout=LAYOUTS[layout])
    assert resources(compiled, target)[1] == 0


def test_the_spill_check_can_fail():
    target = TARGETS["sm_90"]
    assert resources(compiled_walk(target, block_d=2048), target)[1] > 0  # 32 channels a thread


def test_every_token_is_read_and_written_once():
    """Four bytes a thread; the loop of eight tokens, three tokens before it and three of history."""
    ptx = compiled_walk(TARGETS["sm_90"], states=False).asm["ptx"]
    found = re.findall(r"(ld|st|atom|red)\.global\.(?:[a-z_]\w*\.)*?(?:v(\d)\.)?b(\d+)", ptx)
    counts = [(kind, int(n or 1) * int(bits) // 8) for kind, n, bits in found]
    offsets = 2 + 2  # of the search and of the row, 4 bytes as well
    assert counts.count(("ld", 4)) == 2 * (8 + 3) + 3 + 1 + offsets, "x and dout, history, bias"
    assert counts.count(("st", 4)) == 8 + 1, "dx, and the zeros of the tail"
    assert counts.count(("st", 8)) == 4 + 1, "the sums of taps and bias"
    assert not {kind for kind, _ in counts} & {"atom", "red"}


def test_tokens_of_channel_first_rows_are_sixteen_byte_accesses():
    """Two tiles of eight tokens in the loop, one before it and one of history; no turning in shared memory."""
    ptx = compiled_walk(TARGETS["sm_90"], states=False, layout=LAYOUTS["channel-first"]).asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2 * (2 + 1) + 1, "x and dout, history"
    assert ptx.count("st.global.v4.b32") == 2, "dx"
    assert len(re.findall(r"ld\.global\.b16", ptx)) == 1, "bias"
    assert len(re.findall(r"st\.global\.b16", ptx)) == 1, "the zeros of the tail"
    assert not re.search(r"\.shared\.|(atom|red)\.", ptx)


def test_uneven_rows_are_turned_in_shared_memory():
    """Lanes lie along tokens: once for each tile of x and dout, history, and dx."""
    compiled = compiled_walk(TARGETS["sm_90"], states=False, layout=LAYOUTS["uneven rows"])
    assert compiled.asm["ttgir"].count("ttg.convert_layout") == 1 + 2 + 2 + 1
    assert not re.search(r"(atom|red)\.", compiled.asm["ptx"])


def test_the_silu_instructions():
    ptx = compiled_walk(TARGETS["sm_90"]).asm["ptx"]
    assert ptx.count("ex2.approx.ftz.f32") == ptx.count("rcp.approx.ftz.f32") == 2 * (8 + 3)
    assert not re.search(r"div\.\w+\.f32", ptx)


def test_the_reduction_has_no_atomics():
    ptx = compiled_reduce(TARGETS["sm_90"]).asm["ptx"]
    assert not re.search(r"\b(atom|red)\.", ptx)
