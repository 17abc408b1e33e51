"""The kernels compiled for AMD as its launcher asks for them, `tt.pointer_range` included: they compile, and do not spill.

The package looks at the device when it is imported, so another process imports it as on an AMD device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.code_calls import CALLS

ROOT = Path(__file__).resolve().parents[2]
NAMES = {  # each call for one of the two, which have one compiler
    "gfx942": [
        "prefill per_sequence", "prefill small flat", "prefill float32",
        "prefill width 8", "prefill no pool", "prefill pool float32", "prefill channel-first",
        "prefill channel-first uneven", "prefill parts", "prefill residual", "prefill back", "prefill ring",
        "prefill snapshots", "prefill tracks", "update 256 rows", "update width 8", "update 4 tokens",
        "update packed", "update rolling", "update ring", "verify", "verify ring", "tree", "commit", "gradient flat",
        "gradient per_sequence", "gradient channel-first", "gradient channel-first packed", "gradient of the gated convolution",
    ],
    "gfx950": ["prefill flat", "prefill short rows", "update 1 row"],
}  # fmt: skip
PROGRAM = """
import sys
from tests.tools import quick_coalesce, same_code
quick_coalesce.install()
same_code.write_facts(*sys.argv[1:])
"""
ROWS = [(target, name) for target, names in NAMES.items() for name in names]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """By target and call, what `triton_code.facts` found."""
    found = {}
    environment = dict(os.environ, TRITON_INTERPRET="0")
    for target, names in NAMES.items():
        path = tmp_path_factory.mktemp("amd") / f"{target}.json"
        command = [sys.executable, "-c", PROGRAM, str(ROOT), "triton", target, str(path), *names]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=800)
        found[target] = json.loads(path.read_text())
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("target", "name"), ROWS)
def test_a_call_compiles_as_launched_and_does_not_spill(facts, target, name):
    launches = facts[target][name]
    assert launches
    for launch in launches:
        assert "failed" not in launch, f"{launch['kernel']}: {launch['failed']}"
        assert launch["spilled"] == 0
        assert launch["threads"] % 64 == 0, "a warp has 64 threads"


def test_the_fast_paths_access_memory_as_wide_as_on_other_devices(facts):
    """A thread's channels in one access; outputs and windows of a verification 8 bytes a thread."""
    for name, size in (("update 256 rows", 8), ("verify", 8), ("commit", 16)):
        (launch,) = facts["gfx942"][name]
        assert {bytes_ for kind, bytes_, _ in launch["accesses"] if kind == "store"} == {size}


def test_every_name_is_a_call():
    assert set().union(*NAMES.values()) <= CALLS.keys()
