"""The versions that `make` installs are ones that PyPI accepts together, and pyproject.toml lets them in."""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# constraint file: extras that are installed under it, as many as pip resolves in seconds
FILES = {"cpu-jax-0.10.txt": ("triton", "pallas"), "oldest.txt": ("triton",), "newest.txt": ("triton",)}


def pins(name):
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / name).read_text(), re.MULTILINE))


def resolve(constraints, *requirements):
    """What pip would install from PyPI alone for Linux, without local wheels or settings: (exit code, {name: version}, errors)."""
    settings = {
        name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name == "PIP_CERT"
    }
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-",
         "--only-binary", ":all:", "--disable-pip-version-check", "--constraint", constraints, *requirements],
        env=settings | {"PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    found = json.loads(done.stdout)["install"] if done.returncode == 0 else []
    return (
        done.returncode,
        {item["metadata"]["name"]: item["metadata"]["version"] for item in found},
        done.stderr,
    )


@pytest.fixture(scope="module")
def pypi():
    try:
        socket.create_connection(("pypi.org", 443), timeout=3).close()
    except OSError:
        pytest.skip("needs PyPI")


@pytest.mark.parametrize("name", FILES)
def test_pypi_accepts_the_pair(name, pypi):
    wanted = [requirement for extra in FILES[name] for requirement in EXTRAS[extra]]
    code, found, errors = resolve(ROOT / "requirements" / name, *wanted)
    assert code == 0, errors
    pinned = pins(name)
    assert {"torch", "triton"} <= found.keys()
    assert {n: v for n, v in found.items() if n in pinned and v != pinned[n]} == {}


def test_bounds_are_the_tested_versions():
    """The upper bound is one above the newest that `make test-versions` runs, the lower the oldest."""
    for requirement in EXTRAS["triton"]:
        name, low, high = re.match(r"(\w+)>=([\d.]+),<([\d.]+)", requirement).groups()
        major, minor, *_ = map(int, pins("newest.txt")[name].split("."))
        assert high == f"{major}.{minor + 1}"
        assert pins("oldest.txt")[name].startswith(f"{low}.")
