"""The distribution: its metadata, what a wheel holds, and that environments come from pinned files only."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("oracle", "triton_impl", "pallas_impl")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_metadata():
    assert (PROJECT["name"], PROJECT["version"]) == ("twinconv", importlib.metadata.version("twinconv"))
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["numpy"]
    assert set(EXTRAS) == {"triton", "pallas", "flax", "equinox", "test", "models", "bench", "lint"}
    assert not {Requirement(text).name for text in EXTRAS["triton"]} & {"jax", "jaxlib"}
    assert not {Requirement(text).name for text in EXTRAS["pallas"]} & {"torch", "triton"}


def pins(file):
    lines = (
        line.partition("#")[0].strip() for line in (ROOT / "requirements" / file).read_text().splitlines()
    )
    return {
        name.lower().replace("_", "-"): Version(version)
        for name, version in (x.split("==") for x in lines if x)
    }


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("cpu-jax-0.10.txt", ("triton", "pallas", "flax", "equinox", "test", "models", "bench", "lint")),
        ("cpu-jax-0.11.txt", ("pallas", "flax", "equinox", "test")),
    ],
)
def test_every_requirement_is_pinned_inside_its_range(file, extras):
    pinned = pins(file)
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]:
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        assert name in pinned, f"{file}: {name} is open"
        assert pinned[name] in wanted.specifier, f"{file}: {name} {pinned[name]} is outside {text}"


def test_make_installs_nothing_unconstrained():
    text = (ROOT / "Makefile").read_text()
    installs = re.findall(r"\$\(PIP_INSTALL\) (\S+)", text)
    assert len(installs) >= 3
    assert set(installs) == {"--constraint"}
    assert len(re.findall(r"pip install", text)) == 1  # the definition of PIP_INSTALL


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy, so that no build output lands in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "tests", "docs", "benchmarks"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    subprocess.run([*command, "--wheel-dir", target, source], check=True, timeout=200)
    (file,) = target.glob("*.whl")
    return file


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel):
    assert wheel.name == f"twinconv-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    info = f"twinconv-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == wanted
    assert info + "licenses/LICENSE" in names


def test_the_oracle_runs_from_the_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    command = [sys.executable, "-m", "oracle", "list"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 50


def test_ci_runs_the_suite_and_passes_its_verdict_on(tmp_path):
    """With a stand-in for make: CI's exit code is that of `make test`, run in the checkout's root."""
    fake = tmp_path / "make"
    fake.write_text('#!/bin/sh\necho "$PWD $*"\nexit 3\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci/run"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, f"{ROOT} test\n")
