"""One request in both frameworks, its pool moved by DLPack. A process of its own holds the two: tests/tools/interchange.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (this file belongs to the torch group, whose GPU is asked for with --gpu)

from tests.conftest import QUICK_COMPILE

QUICK = "import triton_impl, pallas_impl\nfrom tests.conftest import quick_interpreters\nquick_interpreters()"
SCRIPT = Path(__file__).parents[1] / "tools/interchange.py"


def run(device, mutate=""):
    quick = QUICK if device == "cpu" else ""
    script = f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code = f"import runpy, sys\nsys.path.insert(0, '.')\n{quick}\n{mutate}\n{script}"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if device == "cpu":
        environment["XLA_FLAGS"] = QUICK_COMPILE
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, device],
        cwd=SCRIPT.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prefill_in_one_decode_in_the_other(device):
    done = run(device)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agreed: 4"


MUTANTS = {
    "copied: Tensor": "import jax.numpy as jnp\nreal = jnp.from_dlpack\njnp.from_dlpack = lambda a: real(a) + 0",
    "differ from the oracle's": (
        "import pallas_impl\nreal = pallas_impl.causal_conv1d_update\n"
        "pallas_impl.causal_conv1d_update = lambda x, w, b, pool, *a, **k: real(x, w, b, pool, *a, **k)._replace(conv_states=pool)"
    ),
}


@pytest.mark.parametrize("message", MUTANTS)
def test_a_copy_and_a_lost_state_are_seen(message):
    done = run("cpu", MUTANTS[message])
    assert done.returncode == 1
    assert message in done.stderr
