"""Judges the public implementations that are installed, and writes their reports and the table of all.

python -m benchmarks.peers -o docs/peers                # all, on the CPU
python -m benchmarks.peers sglang vllm --device cuda --jobs 8 --tier core -o FOLDER
python -m benchmarks.peers vllm --cases 'fn/tail@f32'   # one case
python -m benchmarks.peers --table docs/peers           # the table alone, of the reports in the folder
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from benchmarks.peers import table
from benchmarks.peers.cases import apart
from oracle.conformance import report as reports
from oracle.conformance import runner
from oracle.conformance.cases import TIERS, select
from oracle.conformance.catalogue import catalogue

PACKAGES = {
    "aiter": "aiter",
    "causal_conv1d_fn": "causal_conv1d",
    "causal_conv1d_update": "causal_conv1d",
    "fla": "fla",
    "jla": "jla",
    "onnx_reference": "onnx",
    "sglang": "sglang",
    "sglang_jax": "sgl_jax",
    "tpu_inference": "tpu_inference",
    "transformers_fallback": "transformers",
    "vllm": "vllm",
}
"""Peer -> the package that must be importable."""
FACTORIES = {"causal_conv1d_fn": "causal_conv1d:prefill", "causal_conv1d_update": "causal_conv1d:update"}
TRITON = ("aiter", "fla", "sglang", "vllm")


def main(arguments: list[str] | None = None) -> int:
    """Parses a command line and runs it. Failures of peers are results: the exit status is that of the judging."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "peers", nargs="*", metavar="PEER", help=f"of {', '.join(PACKAGES)}; default: what is installed"
    )
    parser.add_argument("--device", default="cpu", help="cpu, where Triton is interpreted, or cuda")
    parser.add_argument(
        "--cases", action="append", default=[], metavar="GLOB", help="case ids, may be repeated"
    )
    parser.add_argument(
        "--tier", action="append", choices=TIERS, help="core, full, large (default: core and full)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (1)")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="write PEER.jsonl here, or PEER_cuda.jsonl, and the table"
    )
    parser.add_argument(
        "--table", metavar="FOLDER", help="judge nothing, write README.md from the reports in a folder"
    )
    options = parser.parse_args(arguments)
    try:
        if options.table:
            write_table(Path(options.table))
            return 0
        if options.output:
            Path(options.output).mkdir(parents=True, exist_ok=True)
        for peer in chosen(options.peers):
            result = judge(peer, options.device, options.cases, options.tier or (), options.jobs)
            print(reports.summary(result))
            if options.output:
                suffix = "" if options.device == "cpu" else f"_{options.device}"
                reports.write(result, Path(options.output, f"{peer}{suffix}.jsonl"))
        if options.output:
            write_table(Path(options.output))
    except (ValueError, OSError, runner.ImplementationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_table(folder: Path) -> None:
    """Writes README.md, the table of the reports in a folder."""
    found = [reports.read(path) for path in sorted(folder.glob("*.jsonl"))]
    (folder / "README.md").write_text(table.write(found, table.causes()))
    print(f"{len(found)} reports in {folder / 'README.md'}")


def chosen(names: list[str]) -> list[str]:
    """The peers to judge: those named, or those installed.

    Raises:
      ValueError: no such peer, or a named one is not installed.
    """
    installed = [peer for peer, package in PACKAGES.items() if importlib.util.find_spec(package)]
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"peer: expected one of {', '.join(PACKAGES)}, got {name!r}")
        if name not in installed:
            raise ValueError(f"{name}: expected the package {PACKAGES[name]} on sys.path, found none")
    return names or installed


def judge(
    peer: str, device: str, patterns: list[str], tiers: tuple[str, ...] | list[str], jobs: int
) -> reports.Report:
    """Runs one peer through the catalogue taken apart.

    Every record's command repeats it. What the peer cannot run has no record: its header says what that is.
    """
    factory = FACTORIES.get(peer, f"{peer}:adapter")
    environment = {"TRITON_INTERPRET": "1"} if peer in TRITON and device == "cpu" else {}
    if device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    result = runner.run(
        f"benchmarks.peers.{factory}",
        select(apart(catalogue()), patterns=patterns, tiers=tiers),
        device=device, environment=environment, jobs=jobs, progress=runner.Progress(peer),
    )  # fmt: skip
    ran = [case for case in result.cases if case["status"] != "unsupported"]
    for record in ran:
        extra = "" if device == "cpu" else f" --device {device}"
        record["command"] = f"python -m benchmarks.peers {peer}{extra} --cases {shlex.quote(record['id'])}"
    return reports.close(result.header, ran, result.footer["seconds"], result.footer["findings"])


if __name__ == "__main__":
    sys.exit(main())
