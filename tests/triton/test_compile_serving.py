"""The kernels of the extended operations compiled with no GPU, as their launches ask for them: no spills, wide accesses."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triton_impl import serving

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SM_90 = TARGETS["sm_90"]
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1",
}  # fmt: skip


class Recorded:
    """A stand-in for `Launch` that keeps what would be launched."""

    def __init__(self, kernel, grid, values, constants, **options):
        self.kernel, self.values, self.constants, self.options = kernel, values, constants, options
        self.programs = grid[0] * grid[1] * grid[2]

    def __call__(self, *tensors):
        self.tensors = tensors


@pytest.fixture
def launches(monkeypatch):
    """Every launch prepared during a test, in order; nothing runs."""
    made = []

    def record(*args, **options):
        made.append(Recorded(*args, **options))
        return made[-1]

    for module in (serving.prefill, serving.states, serving.steps, serving.trees, serving.windows):
        monkeypatch.setattr(module, "Launch", record)
    monkeypatch.setattr(serving, "_resolve", lambda backend, x: "triton")
    monkeypatch.setattr(serving, "recall", lambda *args: (None, None))
    monkeypatch.setattr(serving, "_launch", lambda call, x, *tensors: call(*tensors))
    return made


def compiled(launch, target):
    """Compiles a launch with the types, constants and alignments that Triton's launcher would find."""
    names = launch.kernel.arg_names
    constants, signature, attributes = (
        dict(launch.constants),
        dict.fromkeys(launch.constants, "constexpr"),
        {},
    )
    if target.backend == "hip":
        constants |= {"PTX": False} if "PTX" in constants else {}
    arguments = dict(zip(names, (*launch.tensors, *launch.values), strict=False))
    assert set(arguments) | set(constants) == set(names)
    free = set(launch.kernel.do_not_specialize)
    for number, name in enumerate(names):
        if name in constants:
            continue
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(number,)] = [["tt.divisibility", 16]]
        elif value is None or (value == 1 and name not in free):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in free:
                attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, {name: signature[name] for name in names}, constants, attrs=attributes)
    options = {name: value for name, value in launch.options.items() if value is not None}
    if target.backend == "hip":
        options.pop("maxnreg", None)
    return triton.compile(source, target=target, options=options)


def spilled_bytes(binary, target):
    if target.backend == "hip":
        return sum(map(int, re.findall(r"_spill_count:\s*(\d+)", binary.asm["amdgcn"])))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(binary.asm["ptx"])
        tools = triton.knobs.nvidia
        ptxas = (tools.ptxas_blackwell if target.arch >= 100 else tools.ptxas).path
        architecture = re.search(r"\.target (sm_\w+)", binary.asm["ptx"]).group(1)
        command = [ptxas, "-v", f"-arch={architecture}", str(path), "-o", str(path) + ".cubin"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print(re.findall(r"Used \d+ registers", report))
    return sum(map(int, re.findall(r"(\d+) bytes spill", report)))


def accesses(binary):
    """Bytes a thread of every global load and store in PTX."""
    found = re.findall(r"(ld|st)\.global\.(?:[a-z_]\w*\.)*?(?:v(\d)\.)?b(\d+)", binary.asm["ptx"])
    return [({"ld": "load", "st": "store"}[kind], int(n or 1) * int(bits) // 8) for kind, n, bits in found]


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape):
    return empty(*shape, dtype=torch.int32)


def update(batch=64, seqlen=4, dim=8192, width=4, columns=None, dtype=torch.bfloat16, packed=False, **given):
    """Runs the host path of a step on tensors without memory."""
    shape = (batch * seqlen, dim) if packed else (batch, seqlen, dim)
    tensors = dict.fromkeys(
        ("num_accepted_tokens", "cache_seqlens", "write_indices", "track_indices", "window_out", "window_indices",
         "residual", "tree_parents"),
    )  # fmt: skip
    tensors |= dict(
        x=empty(*shape, dtype=dtype), weight=empty(dim, width, dtype=dtype), bias=empty(dim, dtype=dtype),
        conv_states=empty(256, columns or width - 1, dim, dtype=dtype), cache_indices=indices(batch),
        query_start_loc=indices(batch + 1) if packed else None,
    )  # fmt: skip
    options = dict(
        max_seqlen=seqlen if packed else None, activation="silu", pad_slot_id=-1, backend="triton",
        state_layout="front", commit=True, channel_offset=None, split_sizes=None,
    )  # fmt: skip
    serving.step(**(tensors | options | given))


def windows(batch=64, steps=4, dim=8192, width=4, dtype=torch.bfloat16):
    return dict(window_out=empty(batch, steps, width - 1, dim, dtype=dtype), window_indices=indices(batch))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_verify_fast_path(launches, target):
    update(**windows(), commit=False)
    binary = compiled(launches[-1], target)
    assert spilled_bytes(binary, target) == 0
    assert launches[-1].programs * launches[-1].options["num_warps"] >= 4096, (
        "enough warps to fill the memory's pipes"
    )
    if target.backend == "cuda":
        counts = accesses(binary)
        assert counts.count(("store", 8)) == 4 + 4 * 3, "outputs and windows"
        assert {size for kind, size in counts if kind == "store"} == {8}
        assert counts.count(("load", 8)) == 4 + 3 + 1, "tokens, window, bias: nothing twice"
        assert counts.count(("load", 16)) == 2, "taps"
        text = binary.asm["ptx"]
        first_store, loads = (
            text.index("st.global"),
            [m.start() for m in re.finditer(r"ld\.global\.v2\.b32", text)],
        )
        assert sum(place < first_store for place in loads) >= 4 + 3, (
            "all inputs are asked for before a result is stored"
        )


STEPS = {
    "decode back": dict(seqlen=1, columns=4, state_layout="back"),
    "decode ring": dict(seqlen=1, columns=4, state_layout="ring", cache_seqlens=indices(64)),
    "write and track": dict(seqlen=1, write_indices=indices(64), track_indices=indices(64)),
    "verify ring": dict(commit=False, state_layout="ring", cache_seqlens=indices(64), columns=9, **windows()),
    "packed": dict(packed=True, commit=False, **windows()),
    "rolling": dict(num_accepted_tokens=indices(64), write_indices=indices(64), columns=7),
    "residual": dict(residual=empty(64, 4, 8192)),
    "split": dict(split_sizes=(2048, 2048, 4096)),
    "wide taps": dict(width=8, commit=False, **windows(width=8)),
    "float32": dict(
        dtype=torch.float32, residual=empty(64, 4, 8192, dtype=torch.float32), **windows(dtype=torch.float32)
    ),
    "mixed": dict(**windows(dtype=torch.float32)),
    "part": dict(x=empty(64, 4, 12288), channel_offset=2048, split_sizes=(2048, 2048, 4096)),
    "tree": dict(tree_parents=indices(64, 4), commit=False, **windows()),
    "tree of 32": dict(seqlen=32, tree_parents=indices(64, 32), commit=False, **windows(steps=32)),
    "tree ring": dict(
        tree_parents=indices(64, 4), commit=False, state_layout="ring", cache_seqlens=indices(64), columns=5,
        split_sizes=(2048, 2048, 4096), residual=empty(64, 4, 8192), **windows(),
    ),
    "tree wide taps": dict(tree_parents=indices(64, 4), commit=False, width=8, **windows(width=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_no_spills_in_steps_and_trees(launches, name):
    update(**STEPS[name])
    binary = compiled(launches[-1], SM_90)
    assert spilled_bytes(binary, SM_90) == 0
    assert {size for kind, size in accesses(binary) if kind == "store"} <= {8, 16}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_commit_is_a_copy(launches, target):
    kept = windows()["window_out"]
    serving.commit(empty(256, 3, 8192), kept, indices(64), indices(64), indices(64), -1, "triton")
    binary = compiled(launches[-1], target)
    assert spilled_bytes(binary, target) == 0
    if target.backend == "cuda":
        counts = accesses(binary)
        assert counts.count(("load", 16)) == counts.count(("store", 16)) == 3
        assert len(counts) == 3 + 3 + 3, "and step, slot and buffer"


def prefill(
    tokens=16384, batch=8, dim=8192, width=4, columns=None, dtype=torch.bfloat16, schedule="flat", **given
):
    """Runs the host path of a prefill on tensors without memory."""
    tensors = dict.fromkeys(
        ("cache_seqlens", "write_indices", "snapshot_indices", "num_computed_tokens", "track_indices", "track_lengths",
         "residual"),
    )  # fmt: skip
    tensors |= dict(
        x=empty(tokens, dim, dtype=dtype), weight=empty(dim, width, dtype=dtype), bias=empty(dim, dtype=dtype),
        conv_states=empty(256, columns or width - 1, dim, dtype=dtype), query_start_loc=indices(batch + 1),
        cache_indices=indices(batch), has_initial_state=empty(batch, dtype=torch.bool),
    )  # fmt: skip
    options = dict(
        activation="silu", pad_slot_id=-1, max_seqlen=tokens, schedule=schedule, backend="triton", state_layout="front",
        empty_rows="skip", snapshot_block_size=None, channel_offset=None, split_sizes=None,
    )  # fmt: skip
    serving.fn(**(tensors | options | given))


QKV = (2048, 2048, 4096)
SNAPSHOTS = dict(snapshot_indices=indices(8, 64), snapshot_block_size=64, num_computed_tokens=indices(8))
PREFILLS = {
    "split": dict(split_sizes=QKV),
    "split rows": dict(split_sizes=QKV, schedule="per_sequence"),
    "short rows": dict(split_sizes=QKV, batch=512),
    "residual": dict(residual=empty(16384, 8192)),
    "residual short rows": dict(residual=empty(16384, 8192), batch=512),
    "small": dict(residual=empty(64, 8192), split_sizes=QKV, tokens=64),
    "part": dict(x=empty(16384, 12288), channel_offset=1024, split_sizes=QKV),
    "channel first": dict(x=empty(8192, 16384).t(), residual=empty(8192, 16384).t(), split_sizes=QKV),
    "back": dict(state_layout="back", columns=4, write_indices=indices(8)),
    "ring": dict(state_layout="ring", columns=4, cache_seqlens=indices(8), write_indices=indices(8)),
    "snapshots": SNAPSHOTS,
    "track": dict(track_indices=indices(8), track_lengths=indices(8), empty_rows="apply"),
    "wide taps": dict(width=8, residual=empty(16384, 8192), **SNAPSHOTS),
    "float32": dict(dtype=torch.float32, split_sizes=QKV, residual=empty(16384, 8192, dtype=torch.float32)),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILLS)
def test_no_spills_in_prefills(launches, name):
    prefill(**PREFILLS[name])
    changes = {
        "back",
        "ring",
        "snapshots",
        "track",
        "wide taps",
    }  # these leave states that the plain rule does not
    assert len(launches) == 1 + (name in changes), "one launch for the outputs, one for the states"
    for launch in launches:
        assert spilled_bytes(compiled(launch, SM_90), SM_90) == 0


@pytest.mark.parametrize("name", ["split", "part", "residual"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_prefill_loads_and_stores_as_wide_as_the_plain_one(launches, name, target):
    """Programs, warps and the width of accesses do not change with where the result goes."""
    prefill(**PREFILLS[name])
    prefill(empty_rows="apply")  # the outputs' kernel of a plain call, but for its stores of the state
    mine, plain = launches[0], launches[1]
    assert mine.programs == plain.programs
    assert mine.options == plain.options
    binaries = [compiled(launch, target) for launch in (mine, plain)]
    assert [spilled_bytes(binary, target) for binary in binaries] == [0, 0]
    if target.backend == "cuda":
        sizes = [
            {kind: max(n for k, n in accesses(b) if k == kind) for kind in ("load", "store")}
            for b in binaries
        ]
        assert sizes[0] == sizes[1]
        stores = [[n for kind, n in accesses(binary) if kind == "store" and n > 2] for binary in binaries]
        assert stores[0] == [max(stores[0])] * len(stores[0])
        assert len(stores[0]) == len(stores[1]) + 2 * 3, (
            "and the windows of rows of one token and of longer ones"
        )


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_snapshots_fast_path(launches, target):
    """A program loads a window and stores it, 16 bytes a thread; programs follow the tokens, not the table."""
    prefill(**SNAPSHOTS)
    states = launches[1]
    assert states.programs == (8 + 16384 // 64 + 1) * 32
    binary = compiled(states, target)
    assert spilled_bytes(binary, target) == 0
    if target.backend == "cuda":
        assert {n for kind, n in accesses(binary) if kind == "store"} == {16}


def test_the_checks_can_fail(launches):
    """Too few registers spill, and tensors off their alignment are not accessed 8 bytes at a time."""
    update(**windows(), commit=False)
    launches[-1].options["maxnreg"] = 32
    assert spilled_bytes(compiled(launches[-1], SM_90), SM_90) > 0
    launches[-1].options["maxnreg"] = None
    launches[-1].values = [8195 if value == 8192 else value for value in launches[-1].values]
    assert max(size for kind, size in accesses(compiled(launches[-1], SM_90)) if kind == "store") < 8
