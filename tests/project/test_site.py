"""The documentation site: it builds without a warning, its examples run and print what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *ROOT.glob("*/README.md"), *PAGES]
}
TWINS = {"triton_impl/README.md", "pallas_impl/README.md"}  # they share a figure and a table on purpose
EXAMPLES = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
    if "# prints " in text
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": ""},
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target


def test_the_site_builds_without_a_warning(site):
    for page in PAGES:
        assert (site / f"{page.stem}.html").exists()


def test_no_text_stands_twice():
    places = {}
    for name, text in TEXTS.items():
        for line in text.splitlines():
            if len(line) > 60 and not line.startswith(("from ", "import ")):
                places.setdefault(line, set()).add(name)
    assert {line: found for line, found in places.items() if len(found) > 1 and found != TWINS} == {}


def test_the_twins_have_one_map():
    """The figure of a call's way and the table of files, whose files exist, are the same in both READMEs."""
    maps = []
    for name in sorted(TWINS):
        found = re.search(r"^## A call's way\n.*?^\| `adapter\.py` .*?$", TEXTS[name], re.M | re.S)
        maps.append(found[0])
        for file in re.findall(r"`([\w/]+(?:\.py|/))`", found[0].partition("| file |")[2]):
            assert (ROOT / name).with_name(file.rstrip("/")).exists(), f"{name}: no {file}"
    assert maps[0] == maps[1]


def test_sections_of_other_files_are_shown(site):
    """A line that is a link to another file's section is that section on the site, with links that hold."""
    page = (site / "versions.html").read_text()
    assert "mosaic_gpu_interpret" in page
    assert "../README.md" not in page
    assert (
        'href="https://github.com/twinconv/twinconv/blob/main/oracle/conformance/adapter.py"'
        in (site / "your-own.html").read_text()
    )


@pytest.mark.parametrize("page", ["reference-torch", "reference-jax", "reference-oracle"])
def test_the_reference_is_made_of_the_docstrings(site, page):
    text = (site / f"{page}.html").read_text()
    assert "causal_conv1d" in text
    assert len(re.findall(r'class="doc doc-heading"', text)) > 3


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_shown(example, tmp_path):
    promised = re.findall(r"# prints (.*)", example)
    assert len(promised) == example.count("print(")
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == promised


def test_there_are_examples():
    assert len(EXAMPLES) >= 6
