"""The README tells the truth: its examples run and print what they say, its links and commands exist."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_examples_run_as_shown(framework, tmp_path):
    (example,) = [text for text in EXAMPLES if f"import {framework}\n" in text]
    promised = re.findall(r"# prints (.*)", example)
    assert len(promised) == example.count("print(") >= 3
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,  # as after an install: nothing is found through the working directory
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == promised
    assert "Warning" not in done.stderr


def test_there_are_no_other_examples():
    assert len(EXAMPLES) == 2


def test_signatures_are_the_contracts():
    tree = ast.parse(
        (ROOT / "oracle/reference.py").read_text()
    )  # test_twins: its signatures are the contract's
    functions = {node.name: ast.unparse(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}
    contract = (ROOT / "docs/contract.md").read_text()
    shown = re.findall(r"^(causal_conv1d_\w+)\((.*?)\)$", contract, re.M | re.S)
    assert {name for name, _ in shown} == {"causal_conv1d_fn", "causal_conv1d_update"}
    for name, text in shown:
        arguments = ast.unparse(ast.parse(f"def f({text}): pass").body[0].args)
        assert arguments == functions[name]


def test_pictures_are_seen_outside_a_checkout():
    """A package index shows this page: its images have absolute addresses, of files that exist."""
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    base = "https://raw.githubusercontent.com/twinconv/twinconv/main/"
    assert images
    assert all(image.startswith(base) and (ROOT / image.removeprefix(base)).exists() for image in images)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_exist(document):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / document).read_text())
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_exist(document):
    text = (ROOT / document).read_text()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", text, re.M))
    for target in {a or b for a, b in targets}:
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}: no such target"
    commands = set(re.findall(r"python -m oracle ([a-z-]+)", text))
    shown = subprocess.run(
        [sys.executable, "-m", "oracle", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    for command in commands:
        assert re.search(rf"\b{command}\b", shown), f"python -m oracle {command}: not in --help"


@pytest.fixture(scope="module")
def draw_grid():
    spec = importlib.util.spec_from_file_location("draw_grid", ROOT / "docs/draw_grid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_the_script_draws(draw_grid):
    assert (ROOT / "docs/grid.svg").read_text() == draw_grid.draw()


@pytest.mark.parametrize("lengths", [(1, 9, 2, 17, 4), (8,), (1,) * 20, (0, 16, 0, 0, 7), (64, 1, 64)])
def test_both_schedules_cover_every_token_once(draw_grid, lengths):
    work = {(row, block): n for row, block, n in draw_grid.per_sequence_programs(lengths, 8) if n}
    assert sum(work.values()) == sum(lengths)
    flat = [program for program in draw_grid.flat_programs(lengths, 8) if program]
    assert {(row, block): n for row, block, n in flat} == work
    assert len(flat) == len(work)
