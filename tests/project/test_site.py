"""The documentation site: it builds without a warning, its examples run and print what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
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
