"""The documentation site: it builds without a warning, its examples run and print what they say."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
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


RUNNER = """
import contextlib, io, json, sys, traceback
found = []
for example in json.load(sys.stdin):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(example, "example.py", "exec"), {"__name__": "__main__"})
        found.append([printed.getvalue(), None])
    except BaseException:
        found.append([printed.getvalue(), traceback.format_exc()])
json.dump(found, sys.stdout)
"""


def framework(example):
    return "jax" if re.search(r"^(import|from) (jax|pallas_impl)", example, re.M) else "torch"


@functools.cache
def printed(name):
    """What each example of a framework prints, and the error that ended it, in one process: importing a framework takes longest."""
    examples = [example for (example,) in (row.values for row in EXAMPLES) if framework(example) == name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", RUNNER], input=json.dumps(examples), cwd=folder, env=environment,
            capture_output=True, text=True, timeout=250,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(examples, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_as_shown(example):
    promised = re.findall(r"# prints (.*)", example)
    assert len(promised) == example.count("print(")
    output, error = printed(framework(example))[example]
    assert error is None, error
    assert output.splitlines() == promised


def test_there_are_examples():
    assert len(EXAMPLES) >= 6
