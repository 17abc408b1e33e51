"""The training examples, a short run of each: both losses fall, and they agree."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def train(name, *options):
    command = [
        sys.executable,
        str(ROOT / "examples" / f"train_{name}.py"),
        "--steps",
        "20",
        *map(str, options),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def read(path):
    with path.open(newline="") as file:
        return [float(loss) for _, loss in list(csv.reader(file))[1:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    done = train("torch", "--losses", folder / "torch.csv")
    assert done.returncode == 0, done.stderr
    return folder


def test_both_losses_fall_together(folder):
    pytest.importorskip("matplotlib")
    done = train(
        "jax",
        "--losses",
        folder / "jax.csv",
        "--compare",
        folder / "torch.csv",
        "--plot",
        folder / "loss.png",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    for name in ("torch", "jax"):
        losses = read(folder / f"{name}.csv")
        assert len(losses) == 20
        assert losses[-1] < losses[0] - 1.5
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_losses_that_differ_are_seen(folder):
    lines = (folder / "torch.csv").read_text().splitlines()
    step, loss = lines[5].split(",")
    lines[5] = f"{step},{float(loss) + 0.002}"
    (folder / "other.csv").write_text("\n".join(lines) + "\n")
    done = train("jax", "--compare", folder / "other.csv")
    assert done.returncode == 1
    assert "0.001 is allowed: no" in done.stdout
