"""The distribution: its metadata, what a wheel holds, and that environments come from pinned files only."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import oracle

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("oracle", "triton_impl", "pallas_impl")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
VERSION = oracle.__version__


def test_metadata():
    assert PROJECT["name"] == "twinconv"
    assert importlib.metadata.version("twinconv") == VERSION
    assert {"Homepage", "Issues", "Changelog"} <= set(PROJECT["urls"])
    assert PROJECT["scripts"] == {"twinconv": "twinconv:main"}
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["numpy"]
    assert set(EXTRAS) == {
        "triton",
        "pallas",
        "flax",
        "equinox",
        "test",
        "models",
        "bench",
        "lint",
        "docs",
        "jax-models",
    }
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
        (
            "cpu-jax-0.10.txt",
            ("triton", "pallas", "flax", "equinox", "test", "models", "bench", "lint", "docs"),
        ),
        ("cpu-jax-0.12.txt", ("pallas", "flax", "equinox", "test")),
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
    assert set(installs) == {"--constraint", "--no-deps"}
    alone = re.findall(r"\$\(only\).*?(\S+)(?: 2>/dev/null \\)?$", text, re.M)  # one wheel, of a pinned file
    assert alone == ['$<)"', '$<)"']
    assert len(re.findall(r"pip install", text)) == 1  # the definition of PIP_INSTALL


def copy_sources(target):
    """Copies what the project's own files are, as a clone would hold them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    ignored = {".venv", ".venv312", ".git", "reports", "build", "dist", ".trees"}
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    else:  # no checkout, such as an unpacked source distribution
        files = [file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file()]
        names = [
            str(file) for file in files if not ignored & set(file.parts) and "__pycache__" not in file.parts
        ]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy, so that no build output lands in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copy_sources(source)
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


def test_the_wheel_holds_the_three_packages_their_roof_and_nothing_else(wheel):
    assert wheel.name == f"twinconv-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    } | {"twinconv.py"}
    info = f"twinconv-{VERSION}.dist-info/"
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


def test_a_wheel_checker_finds_nothing(wheel):
    command = [sys.executable, "-m", "check_wheel_contents", "--config", ROOT / "pyproject.toml", wheel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_source_distribution_holds_what_git_holds(tmp_path):
    """So its tests run from it: every file that they read is there."""
    source, target = tmp_path / "source", tmp_path / "dist"
    copy_sources(source)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(target)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (file,) = target.glob("*.tar.gz")
    assert file.name == f"twinconv-{VERSION}.tar.gz"
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.startswith((".github/", "twinconv.egg-info/", "build/"))}
    assert wanted <= names


def test_one_version_everywhere():
    for package in PACKAGES:
        code = f"import {package}, twinconv; print({package}.__version__, twinconv.__version__, twinconv.{package}.__name__)"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.stdout == f"{VERSION} {VERSION} {package}\n", done.stderr
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(
        rf"^## {re.escape(VERSION)} \(\d{{4}}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


@pytest.mark.parametrize("text", ["", "__version__ = '7'\n"], ids=["empty", "versioned"])
@pytest.mark.parametrize("name", ["twinconv.oracle", "triton_impl", "pallas_impl"])
def test_a_users_own_oracle_is_named_as_what_hides_ours(name, text, tmp_path):
    (tmp_path / "oracle.py").write_text(text)
    code = f"import twinconv, importlib; {name} if '.' in {name!r} else importlib.import_module({name!r})"
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: "), done.stderr
    assert str(tmp_path / "oracle.py") in last
    assert "rename" in last


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
