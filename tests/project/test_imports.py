"""What each package loads, seen in fresh processes from which other packages are hidden.

Hidden means as good as not installed: the import system does not find it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HIDE = """
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
before = set(sys.modules)

def third_party():
    tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
    return sorted(tops - sys.stdlib_module_names - {{"oracle", "triton_impl", "pallas_impl"}})
"""

TORCH = ("torch", "triton", "triton_impl")
JAX = ("jax", "jaxlib", "pallas_impl")
OTHERS = ("ml_dtypes", "onnx", "scipy", "hypothesis", "pytest", "matplotlib")


def python(code, hidden=()):
    command = [sys.executable, "-c", HIDE.format(hidden=set(hidden)) + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ImportError(done.stderr)
    return done.stdout.strip()


def test_hiding_works():
    with pytest.raises(ImportError, match="ModuleNotFoundError: No module named 'numpy'"):
        python("import numpy", hidden=["numpy"])
    assert python("import numpy; print(third_party())") == "['numpy']"


def test_the_contract_loads_the_standard_library_only():
    assert (
        python("import oracle, oracle.contract; print(third_party())", ["numpy", *TORCH, *JAX, *OTHERS])
        == "[]"
    )


# Helpers for a test tool; nothing else of the oracle may load them.
TOOLS = {"oracle.conformance.pytest_suite": "pytest", "oracle.conformance.traffic.histories": "hypothesis"}


def modules_of(folder):
    files = (ROOT / folder).rglob("*.py")
    names = (file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files)
    return sorted(
        {name.removesuffix(".__init__") for name in names if not name.endswith("__main__")} - set(TOOLS)
    )


@pytest.mark.parametrize("folder", ["oracle", "benchmarks/peers"])
def test_the_oracle_and_adapters_of_peers_load_numpy_only(folder):
    code = "".join(f"import {module}\n" for module in modules_of(folder)) + "print(third_party())"
    assert python(code, [*TORCH, *JAX, *OTHERS]).replace("'benchmarks', ", "") == "['numpy']"


@pytest.mark.parametrize("module", TOOLS)
def test_a_tools_helper_loads_no_framework(module):
    assert (
        python(f"import {module}; print({TOOLS[module]!r} in third_party())", [*TORCH, *JAX, "onnx"])
        == "True"
    )


def test_the_oracles_command_runs_with_numpy_only():
    code = "import runpy; sys.argv[1:] = ['list']; runpy.run_module('oracle', run_name='__main__')"
    assert len(python(code, [*TORCH, *JAX, *OTHERS]).splitlines()) > 50


CALL_TORCH = """
import torch

def refuse(*args, **kwargs):
    raise SystemError("the import asked for a GPU")

names = ("is_available", "device_count", "current_device", "get_device_properties", "get_device_capability", "init")
kept = {name: getattr(torch.cuda, name) for name in names}
for name in names:
    setattr(torch.cuda, name, refuse)
import triton_impl, triton_impl.adapter
for name, function in kept.items():
    setattr(torch.cuda, name, function)
x, weight = torch.ones(3, 2), torch.ones(2, 4)
out, pool = triton_impl.causal_conv1d_fn(x, weight, None, torch.zeros(1, 3, 2), torch.tensor([0, 3]))
out, pool = triton_impl.causal_conv1d_update(x[:1], weight, None, pool)
print(out.tolist())
"""

CALL_JAX = """
import jax
import jax.numpy as jnp

def refuse(*args, **kwargs):
    raise SystemError("the import asked for a device")

names = ("devices", "local_devices", "device_count", "local_device_count", "default_backend")
kept = {name: getattr(jax, name) for name in names}
for name in names:
    setattr(jax, name, refuse)
import pallas_impl, pallas_impl.adapter
for name, function in kept.items():
    setattr(jax, name, function)
x, weight = jnp.ones((3, 2)), jnp.ones((2, 4))
out, pool = pallas_impl.causal_conv1d_fn(x, weight, None, jnp.zeros((1, 3, 2)), jnp.array([0, 3]))
out, pool = pallas_impl.causal_conv1d_update(x[:1], weight, None, pool)
print(out.tolist())
"""


@pytest.mark.parametrize(
    ("code", "hidden"), [(CALL_TORCH, JAX), (CALL_JAX, TORCH)], ids=["triton_impl", "pallas_impl"]
)
def test_each_twin_works_without_the_other(code, hidden, monkeypatch):
    """Importing asks for no device, and a call, with its late imports, needs one framework."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert python(code, [*hidden, "onnx", "hypothesis", "pytest", "matplotlib"]) == "[[4.0, 4.0]]"


WITHOUT_TRITON = """
import importlib
import torch
import triton_impl, triton_impl.compat, triton_impl.modules, triton_impl.context_parallel

for peer in triton_impl.compat.PEERS:
    importlib.import_module(f"triton_impl.compat.{peer}")
x, weight = torch.ones(3, 2, requires_grad=True), torch.ones(2, 4)
pool, starts = torch.zeros(1, 3, 2), torch.tensor([0, 3])
with torch.no_grad():
    triton_impl.causal_conv1d_fn(x, weight, None, pool, starts)
    out, _ = triton_impl.causal_conv1d_update(x[:1], weight, None, pool)
triton_impl.causal_conv1d(x, weight, None, None, starts).out.sum().backward()
try:
    triton_impl.causal_conv1d_update(x[:1].detach(), weight, None, pool, backend="triton")
except triton_impl.Unsupported as error:
    print(out.tolist(), x.grad[0].tolist(), "the package triton, which is not installed" in str(error))
"""


def test_the_plain_path_needs_no_triton(monkeypatch):
    """As on a CPU, or off Linux, where Triton has no wheels: only the kernels asked for by name are missing."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert python(WITHOUT_TRITON, ["triton", *JAX]) == "[[4.0, 4.0]] [3.0, 3.0] True"
