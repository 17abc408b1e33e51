"""The demo: the same serving batches through both twins' kernels and plain paths, against the oracle."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from oracle.conformance import catalogue, runner
from oracle.conformance.cases import Case
from oracle.conformance.report import Report, table

BATCHES = {
    "prefill of 1, 9, 2, 17, 4 tokens": ("fn/seed", "fn/per_sequence-seed", "fn/flat-seed", "fn/tail-packed"),
    "prefill and decode mixed, silu": ("fn/serving-mixed-bf16", "fn/serving-mixed-f16"),
    "prefill and decode mixed, linear": ("fn/serving-mixed-linear-bf16", "fn/serving-mixed-linear-f16", "fn/sum-order-bf16"),
    "padding, empty rows, tails": ("fn/padding-rows", "fn/empty-fresh", "fn/empty-rows-tail", "fn/graph-tail", "fn/null-block"),
    "wide slots, NaN in recycled ones": ("fn/wide-slots", "update/wide-slots", "fn/all-lengths-fresh"),
    "decode": ("update/serving-decode", "update/silu-f16", "update/linear-bf16", "update/multi-token"),
    "float32": ("fn/serving-mixed-f32", "update/silu-float32"),
    "chunks = one prefill = updates": ("fn/serving-chunks", "fn/path-chain-bf16", "update/path-tokens_one_by_one-bf16"),
}  # fmt: skip
LANES = (  # the first of each is a twin's kernel; lanes run side by side
    ("triton_impl.adapter:adapter", "triton_impl.adapter:eager"),
    ("pallas_impl.adapter:adapter", "pallas_impl.adapter:xla"),
)
EQUAL_SHARE = 0.9999  # of the twins' 16-bit outputs
NEEDS = {  # modules, and the extra that brings them
    "triton_impl.adapter:adapter": (("torch", "triton"), "triton"),
    "triton_impl.adapter:eager": (("torch",), "triton"),
    "pallas_impl.adapter:adapter": (("jax",), "pallas"),
    "pallas_impl.adapter:xla": (("jax",), "pallas"),
}
LINE_SECONDS = 5  # where stderr is no terminal, between two lines of progress
# On a CPU XLA takes longer to optimise an interpreted kernel, which runs once, than all else together.
QUICK_COMPILE = (  # a program split over threads is linked and copied once for each
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    " --xla_cpu_parallel_codegen_split_count=1"
)
QUIET = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}


def demo(device: str | None = None) -> int:
    """Runs the batches on four implementations and prints how they agree.

    Returns:
      The exit status: 0 all agree, 1 they disagree, 2 those that ran agree, but not all could run.
    """
    device = device or ("cuda" if _has_gpu() else "cpu")
    cases = [replace(catalogue.find(i), group=group) for group, ids in BATCHES.items() for i in ids]
    environment = {**QUIET, "TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    where = "compiled, on the GPU" if device == "cuda" else "on the CPU, kernels in their interpreters"
    print(
        f"{len(cases)} serving batches, four implementations, {where}. Reference: NumPy, float64.", flush=True
    )
    start = time.perf_counter()
    lacks = {impl: _lacks(impl) for lane in LANES for impl in lane}
    progress = _SharedProgress(len(cases) * sum(not lacks[impl] for lane in LANES for impl in lane))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(LANES)) as pool:

        def run_lane(number: int) -> list[Report | str]:
            found: list[Report | str] = []
            for position, impl in enumerate(LANES[number]):
                if lacks[impl]:
                    found.append(f"{impl}: {lacks[impl]}")
                    continue
                settings = dict(environment)
                if device == "cpu" and impl == "pallas_impl.adapter:adapter":
                    settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILE}".strip()
                outputs = str(Path(folder) / f"{number}.npz") if position == 0 else None
                try:
                    report = runner.run(impl, cases, device=device, environment=settings, outputs=outputs,
                                        progress=progress.lane())  # fmt: skip
                    found.append(report)
                except runner.ImplementationError as error:
                    found.append(f"{impl}: {error}")
            return found

        triton, pallas = pool.map(run_lane, range(len(LANES)))
        progress.close()
        results = [r for pair in zip(triton, pallas, strict=True) for r in pair]
        reports = [r for r in results if isinstance(r, Report)]
        print("\n".join(table(reports)))
        good = not any(report.failures for report in reports)
        for result in results:
            if isinstance(result, str):
                print(f"NOT RUN {result}")
                continue
            for case in result.failures:
                print(
                    f"{case['status'].upper()} {result.header['name']} {case['id']}\n    {case['detail']}\n    {case['command']}"
                )
        equal, total = compare(Path(folder) / "0.npz", Path(folder) / "1.npz", cases)
    if total:
        enough = equal >= EQUAL_SHARE * total
        good &= enough
        print(f"Triton and Pallas: {equal} of {total} 16-bit outputs equal in every bit ({100 * equal / total:.4f} %)"
              + ("" if enough else f", expected {100 * EQUAL_SHARE} %"))  # fmt: skip
    missing = len(results) - len(reports)
    if not good:
        verdict = "THEY DISAGREE"
    elif missing:
        verdict = f"NOT RUN: {missing} of {len(results)} implementations" + (
            ", the others agree" if reports else ""
        )
    elif not total:
        good, verdict = False, "THEY DISAGREE: the twins have no 16-bit output in common"
    else:
        verdict = "All agree"
    print(f"{verdict}, {time.perf_counter() - start:.0f} s")
    return 1 if not good else 2 if missing else 0


def _lacks(impl: str) -> str:
    """What an implementation lacks here and what brings it; empty if nothing."""
    modules, extra = NEEDS.get(impl, ((), ""))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"needs {' and '.join(missing)}, not installed; the extra {extra} brings it: pip install '.[{extra}]' in the checkout"


def compare(first: Path, second: Path, cases: list[Case]) -> tuple[int, int]:
    """Equal elements and all elements of the 16-bit outputs that two runs saved."""
    if not first.exists() or not second.exists():
        return 0, 0
    equal = total = 0
    with np.load(first) as a, np.load(second) as b:
        for name in set(a.files) & set(b.files):
            if a[name].dtype == np.uint16 and any(c.id == name.replace("|", "/") for c in cases):
                equal += int((a[name] == b[name]).sum())
                total += a[name].size
    return equal, total


def _has_gpu() -> bool:
    """Whether both frameworks can use a GPU here; asked in other processes, and only where there is one."""
    tool = shutil.which("nvidia-smi")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or tool is None:
        return False
    questions = (
        [tool, "-L"],
        [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"],
        [sys.executable, "-c", "import jax; assert jax.devices('gpu')"],
    )
    return all(subprocess.run(q, capture_output=True, check=False).returncode == 0 for q in questions)


class _SharedProgress:
    """One bar on stderr for runs that happen side by side; where that is no terminal, a line now and then."""

    def __init__(self, total: int):
        self.total, self.done, self.lock = total, 0, threading.Lock()
        self.start = self.told = time.monotonic()

    def lane(self):
        def step(done: int, total: int, case_id: str) -> None:
            with self.lock:
                self.done += done > 0
                if sys.stderr.isatty():
                    filled = 30 * self.done // self.total
                    sys.stderr.write(f"\r[{'#' * filled:<30}] {self.done}/{self.total} {case_id[:40]:<40}")
                    sys.stderr.flush()
                elif (now := time.monotonic()) - self.told >= LINE_SECONDS:
                    self.told = now
                    print(
                        f"{self.done} of {self.total} done, {now - self.start:.0f} s: {case_id}",
                        file=sys.stderr,
                        flush=True,
                    )

        return step

    def close(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r" + " " * 90 + "\r")
