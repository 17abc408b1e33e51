"""Installed = switched: versions, arguments of earlier releases, and the entry points that engines call.

The engines and their plug-in loaders are small stand-ins, with the module paths, names and loops of the releases named.
"""

import importlib
import importlib.metadata
import inspect
import logging
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch

import triton_impl.compat
from oracle.contract import Unsupported
from triton_impl.compat import fla, plugin, sglang, vllm

torch.set_num_threads(1)  # the tensors are tiny
ROOT = Path(__file__).resolve().parents[2]
VLLM = "vllm/model_executor/layers/mamba/ops/causal_conv1d.py"
SGLANG = (
    "sglang/srt/layers/attention/mamba/causal_conv1d.py",
    "sglang/kernels/ops/mamba/causal_conv1d_triton.py",
)


def parameters(function):
    return f"{inspect.signature(function)}"[1:-1]


def source(**functions):
    """A module with functions of the given parameters."""
    return "".join(f"def {name}({given}): return 'theirs'\n" for name, given in functions.items())


TWO_OF_VLLM = source(
    causal_conv1d_fn=parameters(vllm.causal_conv1d_fn),
    causal_conv1d_update=parameters(vllm.causal_conv1d_update),
)
BLOCKS_OF_VLLM = source(
    causal_conv1d_fn=parameters(vllm.causal_conv1d_fn_blocks),
    causal_conv1d_update=parameters(vllm.causal_conv1d_update_blocks).replace(", out=None", ""),
)
DISPATCHER = source(
    causal_conv1d_fn=parameters(sglang.causal_conv1d_fn),
    causal_conv1d_update=parameters(sglang.causal_conv1d_update),
)
TRITON = source(
    causal_conv1d_fn=parameters(sglang.causal_conv1d_fn_triton),
    causal_conv1d_update=parameters(sglang.causal_conv1d_update_triton),
)


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Makes a package that stands in for an engine: {file: source}, and its version; gone after the test."""
    made = set()

    def make(top, files, version=None):
        made.add(top)
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
            for folder in [*file.relative_to(tmp_path).parents][:-1]:
                (tmp_path / folder / "__init__.py").touch()
        if version is not None:
            (tmp_path / top / "__init__.py").write_text(f"__version__ = {version!r}\n")
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            monkeypatch.delitem(sys.modules, name)
        if str(tmp_path) not in sys.path:
            monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return importlib.import_module(
            next(iter(files)).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        )

    yield make
    for top in made:
        triton_impl.compat.uninstall(top)
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            del sys.modules[name]


@pytest.mark.parametrize("version", ["0.19.1", "0.34.0", "0.34.0.dev12+gabc", "1.0"])
def test_an_engine_that_was_not_judged_is_refused(version, engine):
    module = engine("vllm", {VLLM: TWO_OF_VLLM}, version)
    before = module.causal_conv1d_fn
    with pytest.raises(Unsupported, match=rf"expected vllm 0\.20\.0 to 0\.33, .* got {version[:4]}"):
        triton_impl.compat.install("vllm")
    assert module.causal_conv1d_fn is before


@pytest.mark.parametrize("version", ["0.33.0", "0.33.2rc1", "0.33.1+cu130", None])
def test_judged_engines_are_replaced_and_the_log_says_so(version, engine, caplog):
    module = engine("vllm", {VLLM: TWO_OF_VLLM}, version)
    before = module.causal_conv1d_fn
    with caplog.at_level(logging.INFO, "vllm"):
        triton_impl.compat.install("vllm")
        triton_impl.compat.install("vllm")
    assert module.causal_conv1d_fn is vllm.causal_conv1d_fn
    (record,) = caplog.records
    assert record.name == "vllm.twinconv"
    for word in ("twinconv", version or "unknown version", f"{module.__name__}.causal_conv1d_update"):
        assert word in record.getMessage()
    triton_impl.compat.uninstall("vllm")
    assert module.causal_conv1d_fn is before


def test_the_version_of_a_distribution_counts_where_the_package_names_none(engine, tmp_path):
    engine("fla", {"fla/modules/convolution.py": source(causal_conv1d="x", causal_conv1d_update="x, cache")})
    info = tmp_path / "flash_linear_attention-0.7.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-linear-attention\nVersion: 0.7.0\n")
    with pytest.raises(Unsupported, match=r"expected fla 0\.3\.0 to 0\.6, .* got 0\.7\.0"):
        triton_impl.compat.install("fla")


def test_vllm_with_block_arguments(engine):
    """0.20 to 0.32: the functions that know them take their place, in their order of arguments."""
    module = engine("vllm", {VLLM: BLOCKS_OF_VLLM}, "0.25.1")
    triton_impl.compat.install("vllm")
    assert module.causal_conv1d_fn is vllm.causal_conv1d_fn_blocks
    assert module.causal_conv1d_update is vllm.causal_conv1d_update_blocks


def test_an_argument_that_no_adapter_knows_is_refused(engine):
    text = TWO_OF_VLLM.replace("metadata=None", "metadata=None, tile_hint=None")
    module = engine("vllm", {VLLM: text}, "0.33.1")
    before = module.causal_conv1d_fn
    with pytest.raises(Unsupported, match="tile_hint"):
        triton_impl.compat.install("vllm")
    assert module.causal_conv1d_fn is before


def test_earlier_names_and_orders_of_sglang(engine):
    """Until 0.5.10 the counts were called num_accepted_tokens, and the modules lay elsewhere."""
    old = TRITON.replace("num_accept_tokens", "num_accepted_tokens").replace("block_table=None, ", "")
    files = {
        "sglang/srt/layers/attention/mamba/causal_conv1d.py": DISPATCHER,
        "sglang/srt/layers/attention/mamba/causal_conv1d_triton.py": old,
    }
    engine("sglang", files, "0.5.8")
    module = importlib.import_module("sglang.srt.layers.attention.mamba.causal_conv1d_triton")
    triton_impl.compat.install("sglang")
    assert module.causal_conv1d_fn is sglang.causal_conv1d_fn_triton
    weight, pool, x = torch.randn(4, 4), torch.randn(3, 4, 5), torch.randn(2, 4, 3)
    counts, slots = torch.tensor([2, 1]), torch.tensor([2, 0])
    pools = [pool.clone() for _ in range(3)]
    want = sglang.causal_conv1d_update_triton(
        x, pools[0], weight, conv_state_indices=slots, num_accept_tokens=counts
    )
    by_name = module.causal_conv1d_update(
        x, pools[1], weight, conv_state_indices=slots, num_accepted_tokens=counts
    )
    by_place = module.causal_conv1d_update(x, pools[2], weight, None, None, None, slots, counts)
    assert torch.equal(by_name, want)
    assert torch.equal(by_place, want)
    assert torch.equal(pools[0], pools[1])


def test_kernels_below_sglangs_dispatcher_are_replaced(engine):
    below = source(
        causal_conv1d_fwd=parameters(sglang.causal_conv1d_fwd_cuda),
        causal_conv1d_update=parameters(sglang.causal_conv1d_update_cuda),
    )
    files = {
        SGLANG[0]: DISPATCHER
        + "from sglang.kernels.ops.mamba.causal_conv1d import causal_conv1d_update as below\n",
        SGLANG[1]: TRITON,
        "sglang/kernels/ops/mamba/causal_conv1d.py": below,
    }
    dispatcher = engine("sglang", files, "0.5.23")
    triton_impl.compat.install("sglang")
    module = importlib.import_module("sglang.kernels.ops.mamba.causal_conv1d")
    assert module.causal_conv1d_fwd is sglang.causal_conv1d_fwd_cuda
    assert module.causal_conv1d_update is dispatcher.below is sglang.causal_conv1d_update_cuda
    assert dispatcher.causal_conv1d_update is sglang.causal_conv1d_update
    triton_impl.compat.uninstall("sglang")
    assert module.causal_conv1d_fwd.__module__ == module.__name__


FLA_RELEASES = {
    "0.3.0": "x, weight=None, bias=None, residual=None, activation=None, cu_seqlens=None",
    "0.3.1": "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, "
    "cu_seqlens=None",
    "0.3.2": "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, "
    "backend='triton', cu_seqlens=None, **kwargs",
    "0.4.1": "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None, "
    "backend='triton', cu_seqlens=None, chunk_indices=None, **kwargs",
    "0.5.2": parameters(fla.causal_conv1d),
    "0.6.0": parameters(fla.causal_conv1d),
}


@pytest.mark.parametrize("version", FLA_RELEASES)
def test_every_release_of_fla_since_0_3(version, engine):
    """The order of arguments is the release's; 0.3.0 returns y alone. 0.5 splits the module, 0.6 makes it an alias."""
    functions = source(
        causal_conv1d=FLA_RELEASES[version], causal_conv1d_update=parameters(fla.causal_conv1d_update)
    )
    if version >= "0.6":
        place = "fla/modules/causal_conv1d/ops.py"
        files = {place: functions}
    elif version >= "0.5":
        place = "fla/modules/conv/functions.py"
        files = {place: functions, "fla/modules/convolution.py": "from fla.modules.conv.functions import *\n"}
    else:
        place = "fla/modules/convolution.py"
        files = {place: functions}
    files["fla/layers/gated_deltanet.py"] = (
        f"from {place.removesuffix('.py').replace('/', '.')} import causal_conv1d as conv, causal_conv1d_update as step\n"
    )
    engine("fla", files, version)
    if version >= "0.6":
        real = importlib.import_module("fla.modules.causal_conv1d.ops")
        alias = type(sys)("fla.modules.convolution")
        vars(alias).update(causal_conv1d=real.causal_conv1d, causal_conv1d_update=real.causal_conv1d_update)
        sys.modules[alias.__name__] = alias
    layer = importlib.import_module("fla.layers.gated_deltanet")
    before = layer.conv
    triton_impl.compat.install("fla")
    x, weight, starts = torch.randn(1, 5, 4), torch.randn(4, 4), torch.tensor([0, 2, 5])
    want, state = fla.causal_conv1d(x, weight, None, None, None, True, "silu", cu_seqlens=starts)
    if version == "0.3.0":
        assert torch.equal(layer.conv(x, weight, None, None, "silu", starts), want)
    else:
        place = [] if version == "0.3.1" else ["triton"]
        found = layer.conv(x, weight, None, None, None, True, "silu", *place, starts)
        assert torch.equal(found[0], want)
        assert torch.equal(found[1], state)
    assert layer.step is fla.causal_conv1d_update
    triton_impl.compat.uninstall("fla")
    assert layer.conv is before


# The entry points, and the hosts that call them.


def entry_point(group):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"][group].items()
    return importlib.metadata.EntryPoint(name, value, group)


HOSTS = {
    # vLLM 0.33: vllm/plugins/__init__.py load_general_plugins, which catches nothing that a plugin raises
    "vllm": """
        loaded = False
        def load(entry_points):
            global loaded
            if loaded:
                return
            loaded = True
            plugins = {}
            for plugin in entry_points:
                try:
                    plugins[plugin.name] = plugin.load()
                except Exception:
                    pass
            for function in plugins.values():
                function()
    """,
    # SGLang 0.5.23: sglang/srt/plugins/__init__.py load_plugins, which logs and goes on, then patches what was hooked
    "sglang": """
        import logging
        loaded = False
        def load(entry_points):
            global loaded
            if loaded:
                return
            loaded = True
            plugins = {}
            for plugin in entry_points:
                try:
                    plugins[plugin.name] = (plugin.load(), plugin.dist.name if plugin.dist else None)
                except Exception:
                    logging.getLogger(__name__).exception("failed to load")
            for name, (function, _) in plugins.items():
                try:
                    function()
                except Exception:
                    logging.getLogger(__name__).exception("failed to execute %s", name)
    """,
}
GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins"}
FILES = {"vllm": {VLLM: TWO_OF_VLLM}, "sglang": dict(zip(SGLANG, (DISPATCHER, TRITON), strict=True))}
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}


def started(engine, name, version=None):
    """A stand-in engine, started: its plug-ins are loaded. Returns the module of its functions."""
    files = FILES[name] | {f"{name}/plugins/__init__.py": HOSTS[name]}
    module = engine(name, files, version or VERSIONS[name])
    host = importlib.import_module(f"{name}.plugins")
    for _ in range(2):  # engines call the loader more than once in a process
        host.load([entry_point(GROUPS[name])])
    return module


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("engines", [None, "", " , "])
def test_an_installed_package_switches_nothing_by_itself(engines, name, engine, monkeypatch):
    if engines is None:
        monkeypatch.delenv(plugin.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(plugin.VARIABLE, engines)
    assert started(engine, name).causal_conv1d_fn.__module__.startswith(name)


@pytest.mark.parametrize("name", HOSTS)
def test_the_variable_switches_the_engines_that_it_names(name, engine, monkeypatch, caplog):
    monkeypatch.setenv(plugin.VARIABLE, "vllm, sglang")
    with caplog.at_level(logging.INFO):
        module = started(engine, name)
    assert module.causal_conv1d_fn.__module__ == f"triton_impl.compat.{name}"
    assert [record.name for record in caplog.records] == [f"{name}.twinconv"]
    triton_impl.compat.uninstall(name)
    assert module.causal_conv1d_fn.__module__.startswith(name)


def test_the_variable_may_name_another_engine(engine, monkeypatch):
    monkeypatch.setenv(plugin.VARIABLE, "sglang")
    assert started(engine, "vllm").causal_conv1d_fn.__module__.startswith("vllm")


def test_a_misspelt_engine_is_an_error(engine, monkeypatch):
    monkeypatch.setenv(plugin.VARIABLE, "vlm")
    with pytest.raises(ValueError, match=r"TWINCONV_ENGINES: expected names among .* got 'vlm'"):
        started(engine, "vllm")


def test_what_was_asked_for_and_cannot_be_done_is_an_error(engine, monkeypatch):
    monkeypatch.setenv(plugin.VARIABLE, "vllm")
    with pytest.raises(Unsupported, match=r"0\.20\.0 to 0\.33"):
        started(engine, "vllm", "0.40.0")


def test_a_host_that_goes_on_has_the_error_in_its_log(engine, monkeypatch, caplog):
    monkeypatch.setenv(plugin.VARIABLE, "sglang")
    module = started(engine, "sglang", "0.6.0")
    assert module.causal_conv1d_fn.__module__.startswith("sglang")
    assert "0.5.8 to 0.5.23" in caplog.text
