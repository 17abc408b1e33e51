"""Where a run took place: GPU, driver, clocks, versions, commit. Reads only; sets nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_QUERY = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
)


def gpu() -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    line = _output(command)
    if not line:
        return {}
    return dict(zip(_QUERY, (value.strip() for value in line.splitlines()[0].split(",")), strict=False))


def commit() -> tuple[str, bool | None]:
    """The commit and whether the tree differs from it.

    Where BENCHMARK_COMMIT is set, as for a copy of the tree without its history, it names the commit, and the second
    value is None.
    """
    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named, None
    short = _output(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"])
    if not short:
        return "unknown", None
    return short, bool(_output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]))


def describe() -> dict:
    """Everything but the framework's versions."""
    name, dirty = commit()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": name,
        "dirty": dirty,
        "gpu": gpu(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def slug(name: str) -> str:
    """A device's name as a folder's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
