"""The training examples, a short run of each: both losses fall, and they agree."""

import csv
import importlib
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        (["--steps", "ten"], "argument --steps: expected a whole number"),
        (["--losses", "/dev/null/losses.csv"], "--losses: expected a file that can be written"),
        (["--plot", "/dev/null/loss.png"], "--plot: expected a file that can be written"),
        (["--compare", "/no/such.csv"], "--compare: expected losses as --losses writes them"),
        (["--compare", __file__], "--compare: expected losses as --losses writes them"),
    ],
)
def test_bad_arguments_are_said_before_the_training(monkeypatch, capsys, options, says):
    monkeypatch.syspath_prepend(ROOT / "examples")
    common = importlib.import_module("train_common")
    with pytest.raises(SystemExit) as ended:
        common.main("torch", lambda *_: pytest.fail("it trains"), options)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
