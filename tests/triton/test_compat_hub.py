"""The layout of the `kernels` hub, built and loaded from a local path by a stand-in of its loader (kernels 0.17)."""

import ast
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hub import build

torch.set_num_threads(1)  # the tensors are tiny
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build.build(folder)
    return folder


def load(repository, backend="cpu"):
    """As `get_local_kernel`: the variant's folder becomes a package under the id of its metadata."""
    variant = repository / "build" / f"torch-{backend}"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["backend"]["type"] == backend
    assert metadata["python-depends"] == []
    spec = importlib.util.spec_from_file_location(metadata["id"], variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[metadata["id"]] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(repository):
    module = load(repository)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == module.__name__]:
        del sys.modules[name]


# The functions of transformers 5.24 that a layer stands for (26 of its models have each).
def causal_conv1d_fn(self, hidden_states, weight, bias=None, activation=None, **kwargs):
    seqlen = hidden_states.shape[2]
    out = F.conv1d(hidden_states, weight[:, None], bias, padding=weight.shape[1] - 1, groups=weight.shape[0])
    return F.silu(out[:, :, :seqlen]) if activation else out[:, :, :seqlen]


def causal_conv1d_update(self, hidden_states, conv_state, weight, bias=None, activation=None):
    extended = torch.cat([conv_state, hidden_states], dim=2)
    conv_state.copy_(extended[:, :, -conv_state.shape[2] :])
    out = F.conv1d(extended, weight[:, None], bias, groups=weight.shape[0])[:, :, -hidden_states.shape[2] :]
    return F.silu(out) if activation else out


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_update], ids=lambda f: f.__name__)
def test_layers_pass_what_the_loader_demands(function, kernel):
    """A module without a constructor or members of its own, whose forward has the arguments of what it replaces."""
    layer = getattr(kernel.layers, function.__name__)
    assert issubclass(layer, torch.nn.Module)
    assert layer.__init__ is torch.nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)}
    assert members - {name for name, _ in inspect.getmembers(torch.nn.Module)} <= {
        "can_torch_compile",
        "has_backward",
    }
    ours = inspect.signature(layer.forward).parameters.values()
    theirs = inspect.signature(function).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def test_a_prefill_and_its_gradients(kernel):
    x, weight = torch.randn(2, 6, 9, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    layer = kernel.layers.causal_conv1d_fn()
    out, want = (
        layer(x, weight, None, activation="silu", use_cache=True),
        causal_conv1d_fn(None, x, weight, None, "silu"),
    )
    torch.testing.assert_close(out, want)
    gradients = torch.autograd.grad(out.square().sum(), (x, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(want.square().sum(), (x, weight)))
    ids = torch.tensor([[0] * 4 + [1] * 5] * 2)
    parts = [layer(part, weight) for part in (x[:, :, :4], x[:, :, 4:])]
    torch.testing.assert_close(layer(x, weight, seq_idx=ids), torch.cat(parts, dim=2))


def test_a_decode_step(kernel):
    x, weight, bias, state = torch.randn(2, 6, 1), torch.randn(6, 4), torch.randn(6), torch.randn(2, 6, 4)
    mine = state.clone()
    out = kernel.layers.causal_conv1d_update()(x, mine, weight, bias, "silu")
    torch.testing.assert_close(out, causal_conv1d_update(None, x, state, weight, bias, "silu"))
    assert torch.equal(mine, state)


def test_it_needs_nothing_of_the_installed_package(repository):
    code = f"""
import importlib.util, sys
for name in ("oracle", "triton_impl", "pallas_impl", "hub", "twinconv"):
    sys.modules[name] = None
path = {str(repository / "build" / "torch-cpu" / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("_kernel", path)
sys.modules["_kernel"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import torch
print(module.layers.causal_conv1d_fn()(torch.ones(1, 2, 3), torch.ones(2, 4)).sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=repository
    )
    assert done.stdout.split() == ["12.0"], done.stderr


def test_variants_hold_the_same_files_and_only_relative_imports(repository):
    variants = sorted((repository / "build").iterdir())
    assert [variant.name for variant in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    texts = []
    for variant in variants:
        texts.append({file.relative_to(variant): file.read_text() for file in variant.rglob("*.py")})
        for path, text in texts[-1].items():
            for node in ast.walk(ast.parse(text)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for name in names:
                    assert name.partition(".")[0] in {*sys.stdlib_module_names, "torch", "triton"}, path
    assert texts[0] == texts[1] == texts[2]
    assert len(json.loads((variants[0] / "metadata.json").read_text())["id"]) > 20


def test_operators_lie_beside_those_of_the_installed_package(kernel):
    import triton_impl  # noqa: F401

    namespace = "twinconv_" + kernel.__name__.rpartition("_")[2]
    ours, theirs = torch.ops.twinconv, getattr(torch.ops, namespace)
    assert ours.causal_conv1d_forward is not theirs.causal_conv1d_forward


def test_an_absolute_import_of_a_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / "start.py").write_text("import triton_impl.api\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="expected `from package import name`"):
        build.modules("start")
