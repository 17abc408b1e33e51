"""Triton kernels as a call launches them, compiled without a GPU.

A call of a public operation runs on CPU tensors up to Triton's own launcher, which finds types, constants and attributes
as for a GPU of the target; there the launch is recorded and nothing runs. Import `triton_impl` after `pretend` only:
it looks at the device when it is imported.
"""

import contextlib
import importlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}


class Launch(NamedTuple):
    """What one launch asks Triton to compile, and the grid it starts."""

    kernel: Any
    grid: tuple
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    target: GPUTarget

    @property
    def name(self):
        return self.kernel.__name__

    def compile(self):
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        with _without_dumps():
            return triton.compile(source, target=self.target, options=self.options)


@contextlib.contextmanager
def _without_dumps():
    """The compiler writes a failing module, thousands of lines, to the process' stderr before it raises."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class _Driver:
    """As much of a driver as a launch asks before it compiles."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def pretend(target):
    """Makes torch and Triton of this process those of such a device, for good."""
    torch.version.hip = "6.0" if target.backend == "hip" else None


@contextlib.contextmanager
def recorded(target):
    """A list of the launches made within, for such a device; the kernels do not run."""
    launches, grids = [], []
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def run_recorded(kernel, *args, grid, **kwargs):
        kernel.device_caches.clear()  # they know the target
        grids.append(grid)
        return run(kernel, *args, grid=grid, **kwargs)

    def record(kernel, key, signature, device, constants, options, attributes, warmup):
        launches.append(
            Launch(kernel, grids[-1], signature, constants, attributes, dict(options.__dict__), target)
        )

    interpreted, fills = triton.knobs.runtime.interpret, torch.utils.deterministic.fill_uninitialized_memory
    JITFunction.run, JITFunction._do_compile = run_recorded, record
    driver.set_active(_Driver(target))
    capability = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: divmod(target.arch, 10)
    torch.utils.deterministic.fill_uninitialized_memory = False  # gigabytes, under tests/conftest.py
    triton.knobs.runtime.interpret = True  # so that backend="triton" takes tensors of a CPU
    calls = importlib.import_module("triton_impl.call")
    calls.forget()  # what was prepared for another device
    try:
        yield launches
    finally:
        calls.forget()
        JITFunction.run, JITFunction._do_compile = run, do_compile
        driver._active = None
        torch.cuda.get_device_capability = capability
        triton.knobs.runtime.interpret = interpreted
        torch.utils.deterministic.fill_uninitialized_memory = fills


def tensor(array):
    """An uninitialised tensor; its memory is hardly touched."""
    shape, dtype = array.shape, getattr(torch, array.dtype)
    if array.layout == "expanded":
        return torch.empty((), dtype=dtype).expand(shape)
    if array.layout == "odd":
        return torch.empty(math.prod(shape) + 1, dtype=dtype)[1:].view(shape)
    if array.layout in ("channel_first", "sliced"):
        longer = shape[-2] + 8 * (array.layout == "sliced")
        return torch.empty(*shape[:-2], shape[-1], longer, dtype=dtype)[..., : shape[-2]].transpose(-1, -2)
    return torch.empty(shape, dtype=dtype)


def make(call):
    """Runs a `code_calls.Call` of the package that is imported."""
    triton_impl = importlib.import_module("triton_impl")
    arrays = {name: tensor(array) for name, array in call.arrays.items()}
    options = call.options_on("triton")
    if call.operation == "backward":
        names = ("dout", "dfinal_states", "x", "weight", "bias", "initial_states", "query_start_loc")
        more = (
            options["activation"],
            options.get("max_seqlen"),
            options.get("schedule", "auto"),
            options["backend"],
        )
        needed = (True, "initial_states" in arrays)
        with torch.no_grad():
            return torch.ops.twinconv.causal_conv1d_backward(*map(arrays.get, names), *more, *needed)
    operation = getattr(triton_impl, call.operation.removeprefix("gradient "))
    if call.operation.startswith("gradient "):
        wanted = [a for a in arrays.values() if a.is_floating_point()]
        for a in wanted:
            a.requires_grad_()
        results = tuple(operation(**arrays, **options))
        return torch.autograd.grad(results, wanted, tuple(map(torch.empty_like, results)))
    with torch.inference_mode():
        return operation(**arrays, **options)


def launches_of(call, target):
    """The launches of a call."""
    importlib.import_module(
        "triton_impl"
    )  # before `recorded`: `@triton.jit` asks whether kernels are interpreted
    with recorded(target) as launches:
        make(call)
    return launches


def tool(name, *arguments):
    """What a program of the CUDA toolkit that Triton brings prints."""
    path = Path(triton.knobs.nvidia.ptxas.path).with_name(name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(binary):
    """(registers a thread, bytes spilled a thread)"""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        # (scalar registers spill into lanes of vector registers, not into memory)
        spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)))
        return int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1)), spilled
    with _cubin(binary) as path:
        report = tool("cuobjdump", "-res-usage", path)
    # no kernel has arrays of its own, so a stack holds nothing but what was spilled
    return int(re.search(r"REG:(\d+)", report).group(1)), int(re.search(r"STACK:(\d+)", report).group(1))


def machine_opcodes(binary):
    """How often each machine instruction occurs, by its name without modifiers but the width of a memory access."""
    if "amdgcn" in binary.asm:
        return Counter(re.findall(r"^\t([a-z]\w+)", binary.asm["amdgcn"], re.MULTILINE))
    return Counter(_short(name) for name in instructions(binary) if name != "NOP")


def instructions(binary):
    """The names of NVIDIA's machine instructions, in their order."""
    with _cubin(binary) as path:
        text = tool("cuobjdump", "-sass", path)
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)


def _short(name):
    """LDG.E.128.CONSTANT -> LDG.128; FFMA.FTZ -> FFMA."""
    first, *rest = name.split(".")
    width = [part for part in rest if part in ("U8", "U16", "64", "128")]
    return ".".join([first, *(width if first[:2] in ("LD", "ST") else ())])


def ptx_opcodes(binary):
    """How often each PTX instruction occurs."""
    text = re.sub(r"//[^\n]*", "", binary.asm.get("ptx", ""))
    return Counter(re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s[^;{]*;", text, re.MULTILINE))


def accesses(binary):
    """How many accesses to global memory there are, by kind and bytes a thread; "atom" and "red" are kinds too."""
    if "amdgcn" in binary.asm:
        found = re.findall(r"(?:global|buffer)_(load|store|atomic)_(\w+)", binary.asm["amdgcn"])
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
        return Counter((kind, sizes.get(size, 2)) for kind, size in found)
    found = re.findall(r"\b(ld|st|atom|red)\.global\.(?:[a-z_]\w*\.)*?(?:v(\d)\.)?b(\d+)", binary.asm["ptx"])
    kinds = {"ld": "load", "st": "store"}
    return Counter((kinds.get(kind, kind), int(n or 1) * int(bits) // 8) for kind, n, bits in found)


@contextlib.contextmanager
def _cubin(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        yield file.name


def facts(call, target):
    """What a call launches: name, programs, threads, registers, spills, shared memory, opcodes, of each launch."""
    found = []
    for launch in launches_of(call, target):
        try:
            binary = launch.compile()
        except Exception as error:  # the compiler's own, of any kind
            found.append(dict(kernel=launch.name, failed=str(error).strip().splitlines()[0][:200]))
            continue
        registers, spilled = resources(binary)
        found.append(
            dict(
                kernel=launch.name,
                grid=list(launch.grid),
                threads=launch.options["num_warps"] * target.warp_size,
                registers=registers,
                spilled=spilled,
                shared=binary.metadata.shared,
                accesses=[[*key, count] for key, count in sorted(accesses(binary).items())],
                opcodes=machine_opcodes(binary),
                ptx=ptx_opcodes(binary),
            )
        )
    return found
