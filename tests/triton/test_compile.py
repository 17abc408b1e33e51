"""The Triton kernels compiled with no GPU, for every target: no spills, 16-byte accesses on the fast path."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_impl import config, prefill, update

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def compile_kernel(kernel, target, sizes, pointers, constants, integers, aligned, **options):
    """Compiles as a launch would with these argument types, constants and alignments."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    assert set(pointers) | set(constants) | set(integers) == set(names), (
        "an argument of the kernel is not described"
    )
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    return triton.compile(source, target=target, options={k: v for k, v in options.items() if v is not None})


def word_bits(dtype, width):
    bits = 8 * ITEMSIZE[dtype] * width
    return bits if bits in (32, 64) and width > 1 else 0


def compiled_prefill(
    target, dtype="bf16", width=4, flat=True, walk=True, dim=8192, tokens=16384, batch=8, aligned=True
):
    schedule = "flat" if flat else "per_sequence"
    chosen = config.prefill_config(tokens, dim, batch, width, walk, tokens, schedule, target.warp_size)
    unit = ["stride_x_d", "stride_o_d"] if walk else ["stride_x_t", "stride_o_t"]
    other = ["stride_x_t", "stride_o_t"] if walk else ["stride_x_d", "stride_o_d"]
    floats = dict.fromkeys(["x", "weight", "bias", "conv_states", "out"], "*" + dtype)
    pointers = floats | {"query_start_loc": "*i32", "cache_indices": "*i32", "has_initial_state": "*i1"}
    constants = dict.fromkeys(["stride_w_j", "stride_b", "stride_s_d", "stride_c", "stride_h", *unit], 1) | dict(
        WIDTH=width, SILU=True, HAS_BIAS=True, HAS_POOL=True, HAS_INDICES=True, HAS_MASK=True, FLAT=flat, WALK=walk,
        PTX=target.backend == "cuda", WORD_BITS=word_bits(dtype, width), BLOCK_T=chosen.block_t, BLOCK_D=chosen.block_d,
        GROUP=chosen.group, STAGES=chosen.stages, SEARCH=chosen.search,
        LEVELS=0 if walk else {2: 3, 4: 2}[ITEMSIZE[dtype]], ALIGNED=aligned and not walk, FOLDED=False,
    )  # fmt: skip
    strides = ["stride_s_n", "stride_s_l", *other]
    integers = ["tokens", "dim", "batch", "num_slots", "pad_slot_id", "stride_w_d", *strides]
    return compile_kernel(
        prefill._prefill_kernel, target, chosen, pointers, constants, integers, [*pointers, "dim", *strides],
        num_warps=chosen.num_warps,
    )  # fmt: skip


def compiled_update(target, dtype="bf16", width=4, batch=256, dim=8192, varlen=False, rolls=False):
    chosen = config.update_config(batch, dim, ITEMSIZE[dtype], target.warp_size)
    pointers = dict.fromkeys(["x", "weight", "bias", "conv_states", "out"], "*" + dtype) | {
        "cache_indices": "*i32"
    }
    if varlen:
        pointers |= {"query_start_loc": "*i32"}
    if rolls:
        pointers |= {"num_accepted_tokens": "*i32"}
    unit = ["seqlen", "stride_b", "stride_x_d", "stride_w_j", "stride_s_d", "stride_c", "stride_o_d"]
    constants = dict.fromkeys(unit, 1) | dict(
        stride_x_t=0, stride_o_t=0, WIDTH=width, SILU=True, HAS_BIAS=True, HAS_INDICES=True,
        PTX=target.backend == "cuda", WORD_BITS=word_bits(dtype, width), VARLEN=varlen, ROLLS=rolls,
        FOLDED=False, ROWS=1 if varlen or rolls else chosen.rows, BLOCK_D=chosen.block_d,
    )  # fmt: skip
    constants |= dict.fromkeys({"query_start_loc", "num_accepted_tokens"} - set(pointers))
    constants["stride_a"] = 1 if rolls else 0
    strides = ["stride_x_b", "stride_s_n", "stride_s_l", "stride_o_b"]
    integers = [
        "tokens",
        "batch",
        "dim",
        "num_slots",
        "state_len",
        "pad_slot_id",
        "tail_programs",
        "stride_w_d",
        *strides,
    ]
    return compile_kernel(
        update._update_kernel, target, chosen, pointers, constants, integers, [*pointers, "dim", *strides],
        num_warps=chosen.num_warps,
    )  # fmt: skip


def spilled_bytes(compiled, target):
    if target.backend == "hip":
        return sum(map(int, re.findall(r"_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        tools = triton.knobs.nvidia
        ptxas = (tools.ptxas_blackwell if target.arch >= 100 else tools.ptxas).path
        architecture = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        command = [ptxas, "-v", f"-arch={architecture}", str(path)]
        report = subprocess.run(
            [*command, "-o", str(path) + ".cubin"], capture_output=True, text=True, check=True
        )
    return sum(map(int, re.findall(r"(\d+) bytes spill", report.stderr)))


def accesses(compiled, target):
    """How many global loads and stores there are, by bytes a thread."""
    if target.backend == "hip":
        found = re.findall(r"(?:global|buffer)_(load|store)_(\w+)", compiled.asm["amdgcn"])
        return [(kind, {"dwordx4": 16, "dwordx2": 8, "dword": 4}.get(size, 2)) for kind, size in found]
    found = re.findall(r"(ld|st)\.global\.(?:[a-z_]\w*\.)*?(?:v(\d)\.)?b(\d+)", compiled.asm["ptx"])
    return [({"ld": "load", "st": "store"}[kind], int(n or 1) * int(bits) // 8) for kind, n, bits in found]


@pytest.mark.parametrize(
    ("tokens", "batch"), [(33, 5), (16384, 8), (2176, 129)], ids=["small", "long", "short"]
)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_prefill_fast_path(target, tokens, batch):
    compiled = compiled_prefill(target, tokens=tokens, batch=batch)
    assert spilled_bytes(compiled, target) == 0
    chosen = config.prefill_config(tokens, 8192, batch, 4, True, None, "flat", target.warp_size)
    vector = 2 * chosen.block_d // (chosen.num_warps * target.warp_size)  # bytes a thread
    counts = accesses(compiled, target)
    assert {size for kind, size in counts if kind == "store"} == {vector}, "a thread's channels in one access"
    loads = [size for kind, size in counts if kind == "load"]
    assert sum(size < vector for size in loads) <= 8, "offsets, slot and flag alone are narrow"
    grouped = (
        chosen.group if chosen.stages == 1 or target.backend == "hip" else 0
    )  # else they go to shared memory
    assert loads.count(vector) >= grouped + 3 + 3, "a group of tokens, the halo, the window"


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_update_fast_path(target):
    for batch in (1, 256):
        compiled = compiled_update(target, batch=batch)
        assert spilled_bytes(compiled, target) == 0
        chosen = config.update_config(batch, 8192, 2, target.warp_size)
        rows, vector = (
            chosen.rows,
            2 * chosen.block_d // (target.warp_size * chosen.num_warps),
        )  # bytes a thread
        expected = Counter(
            {("load", vector): 4 * rows + 1, ("store", vector): 4 * rows}
        )  # windows and tokens, bias
        expected += Counter({("load", 16): 4 * vector // 16})  # taps
        if target.backend == "cuda":  # AMD reads the slots by scalar loads
            expected += Counter({("load", 4): rows})
        assert Counter(accesses(compiled, target)) == expected, "nothing twice"


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "per_sequence"])
@pytest.mark.parametrize(
    ("dtype", "width"), [("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 4), ("fp32", 4), ("bf16", 8)]
)
def test_no_spills_in_other_variants(dtype, width, flat):
    target = TARGETS["sm_90"]
    assert spilled_bytes(compiled_prefill(target, dtype, width, flat), target) == 0
    if flat:
        assert spilled_bytes(compiled_update(target, dtype, width), target) == 0


def test_no_spills_where_rows_are_packed_or_roll():
    target = TARGETS["sm_90"]
    for varlen, rolls in [(True, False), (False, True), (True, True)]:
        assert spilled_bytes(compiled_update(target, varlen=varlen, rolls=rolls), target) == 0


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("dtype", "width"), [("bf16", 4), ("bf16", 8), ("fp32", 4), ("fp16", 1), ("bf16", 2), ("bf16", 3)]
)
def test_channel_first_x(dtype, width, aligned):
    """Each run of 16 bytes is read and written once by one thread, and nothing goes through shared memory."""
    target = TARGETS["sm_90"]
    compiled = compiled_prefill(target, dtype, width, walk=False, aligned=aligned)
    assert spilled_bytes(compiled, target) == 0
    assert compiled.metadata.shared == 0
    chosen = config.prefill_config(16384, 8192, 8, width, False, 16384, "flat")
    runs = chosen.block_t * chosen.block_d * ITEMSIZE[dtype] // 16 // (32 * chosen.num_warps)  # a thread
    counts = Counter(accesses(compiled, target))
    assert counts["store", 16] == (runs if aligned else 0)
    if width == 4 and dtype == "bf16":
        assert counts["load", 16] == (runs if aligned else 0)
        assert counts["load", 2] <= (32 if aligned else 12 * runs + 32), (
            "entries, bias; unaligned runs and halos"
        )


def test_the_spill_check_can_fail():
    target = TARGETS["sm_90"]
    config_function = config.prefill_config
    try:
        config.prefill_config = lambda *args: config_function(*args)._replace(
            block_d=4096
        )  # 32 channels a thread
        assert spilled_bytes(compiled_prefill(target), target) > 0
    finally:
        config.prefill_config = config_function


def test_the_silu_instructions_are_those_of_the_pallas_twin():
    ptx = compiled_update(TARGETS["sm_90"], batch=16).asm["ptx"]
    chosen = config.update_config(16, 8192, 2, 32)
    outputs = chosen.rows * chosen.block_d // (32 * chosen.num_warps)  # a thread
    assert ptx.count("ex2.approx.ftz.f32") == ptx.count("rcp.approx.ftz.f32") == outputs
    assert not re.search(r"div\.\w+\.f32", ptx)
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == outputs * (4 + 1), (
        "one fused multiply-add a tap, one before exp2"
    )
