"""The versions that `make` installs are ones that PyPI accepts together, and pyproject.toml lets them in."""

import contextlib
import functools
import html
import io
import platform
import re
import socket
import ssl
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# constraint file: extras that are installed under it
FILES = {"cpu-jax-0.10.txt": ("triton", "pallas"), "oldest.txt": ("triton",), "newest.txt": ("triton",)}


def pins(name):
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements" / name).read_text(), re.MULTILINE)
    return {canonicalize_name(project): version for project, version in found}


@functools.cache
def opener():
    """Reads the certificates once, where `urllib.request.urlopen` does for every request."""
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=ssl.create_default_context()))


@functools.cache
def wheels(name):
    """The addresses of a project's wheels for this machine, by version."""
    with opener().open(f"https://pypi.org/simple/{name}/", timeout=60) as page:
        links = re.findall(r'<a href="([^"#]+/([^"#/]+\.whl))[^>]*>', text := page.read().decode())
    pythons = re.findall(r'([^"#/]+\.whl)[#"][^>]*data-requires-python="([^"]*)"', text)
    pythons = {file: SpecifierSet(html.unescape(specifier)) for file, specifier in pythons}
    usable, tags = {}, set(sys_tags())
    for address, file in links:
        with contextlib.suppress(InvalidWheelFilename):
            _, version, _, kinds = parse_wheel_filename(file)
            if tags & kinds and platform.python_version() in pythons.get(file, SpecifierSet()):
                usable[version] = address
    return usable


class Remote(io.RawIOBase):
    """A file at an address, of which only the parts that are read are loaded."""

    def __init__(self, address):
        self.address, self.place = address, 0
        request = urllib.request.Request(address, method="HEAD")
        with opener().open(request, timeout=60) as answer:
            self.size = int(answer.headers["Content-Length"])

    def readable(self):
        return True

    seekable = readable

    def seek(self, offset, whence=io.SEEK_SET):
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def tell(self):
        return self.place

    def readinto(self, buffer):
        last = min(self.place + len(buffer), self.size) - 1
        if last < self.place:
            return 0
        request = urllib.request.Request(self.address, headers={"Range": f"bytes={self.place}-{last}"})
        with opener().open(request, timeout=60) as answer:
            assert answer.status == 206, "the server sends whole files alone"
            data = answer.read()
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


@functools.cache
def needs(name, version, extras):
    """What that wheel asks for on this machine: its description is read where it lies, so that no gigabytes are loaded."""
    with zipfile.ZipFile(io.BufferedReader(Remote(wheels(name)[version]), 1 << 18)) as wheel:
        (described,) = [file for file in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", file)]
        text = wheel.read(described).decode()
    wanted = map(Requirement, re.findall(r"^Requires-Dist: (.*?)\r?$", text.partition("\n\n")[0], re.M))
    return [r for r in wanted if not r.marker or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


def resolve(pinned, requirements):
    """Of all that is required, versions as pip would take them: a pin, else the newest that all ask for. An error if there is none."""
    chosen = {}
    while True:
        asked = {}
        waiting, seen = [Requirement(r) for r in requirements], set()
        while waiting:
            requirement = waiting.pop()
            name = canonicalize_name(requirement.name)
            specifiers, extras = asked.setdefault(name, (set(), set()))
            specifiers.add(requirement.specifier)
            extras |= requirement.extras
            key = name, frozenset(extras)
            if name in chosen and key not in seen:
                seen.add(key)
                waiting += needs(name, chosen[name], key[1])
        found = {}
        for name, (specifiers, _) in asked.items():
            fit = [v for v in wheels(name) if all(s.contains(v) for s in specifiers)]
            fit = [v for v in fit if name not in pinned or v == Version(pinned[name])]
            assert fit, (
                f"{name}: PyPI has no wheel of {pinned.get(name, 'any version')} for {sorted(map(str, specifiers))}"
            )
            found[name] = max(fit)
        if found == chosen:
            return {name: str(version) for name, version in found.items()}
        chosen = found


@pytest.fixture(scope="module")
def pypi():
    try:
        socket.create_connection(("pypi.org", 443), timeout=3).close()
    except OSError:
        pytest.skip("needs PyPI")


@pytest.mark.parametrize("name", FILES)
def test_pypi_accepts_the_pair(name, pypi):
    wanted = [requirement for extra in FILES[name] for requirement in EXTRAS[extra]]
    assert {"torch", "triton"} <= resolve(pins(name), wanted).keys()


def test_a_pair_that_pypi_does_not_accept_is_seen(pypi):
    """This torch asks for this Triton alone."""
    oldest = pins("oldest.txt")
    with pytest.raises(AssertionError, match="triton: PyPI has no wheel of"):
        resolve(oldest | {"triton": pins("newest.txt")["triton"]}, EXTRAS["triton"])


def test_bounds_are_the_tested_versions():
    """The upper bound is one above the newest that `make test-versions` runs, the lower the oldest."""
    for requirement in EXTRAS["triton"]:
        name, low, high = re.match(r"(\w+)>=([\d.]+),<([\d.]+)", requirement).groups()
        major, minor, *_ = map(int, pins("newest.txt")[name].split("."))
        assert high == f"{major}.{minor + 1}"
        assert pins("oldest.txt")[name].startswith(f"{low}.")
