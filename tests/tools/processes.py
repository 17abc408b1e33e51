"""Running one process a device and collecting what they print."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_processes(script, arguments, ranks, environment=(), limit=280):
    """Runs `python tests/tools/script RANK *arguments` for every rank at the same time; returns (exit codes, texts)."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/tools" / script), str(rank), *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        texts = [process.communicate(timeout=limit)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def count_gpus():
    """GPUs that CUDA_VISIBLE_DEVICES leaves, without starting CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return 0
    return listed.stdout.count("GPU ")
