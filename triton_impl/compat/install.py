"""Puts adapters where programs look for the peers, and takes them away again."""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import sys
import types
import warnings

# peer: for each pair of functions, the modules of the peer that may hold it (the first one found counts, releases
# differ), and {name of the peer's function: name of ours}
_REPLACED = {
    "sglang": [
        (
            ["sglang.srt.layers.attention.mamba.causal_conv1d"],
            {"causal_conv1d_fn": "causal_conv1d_fn", "causal_conv1d_update": "causal_conv1d_update"},
        ),
        (
            [
                "sglang.kernels.ops.mamba.causal_conv1d_triton",
                "sglang.srt.layers.attention.mamba.causal_conv1d_triton",
            ],
            {
                "causal_conv1d_fn": "causal_conv1d_fn_triton",
                "causal_conv1d_update": "causal_conv1d_update_triton",
            },
        ),
    ],
    "vllm": [
        (
            ["vllm.model_executor.layers.mamba.ops.causal_conv1d"],
            {"causal_conv1d_fn": "causal_conv1d_fn", "causal_conv1d_update": "causal_conv1d_update"},
        ),
    ],
    "fla": [
        (
            ["fla.modules.causal_conv1d", "fla.modules.conv"],
            {"causal_conv1d": "causal_conv1d", "causal_conv1d_update": "causal_conv1d_update"},
        ),
    ],
}
PEERS = ("causal_conv1d", *_REPLACED)

_undo = {}


def install(peer):
    """Makes programs that import `peer` get the adapter.

    "causal_conv1d": registers modules under that name, and its version, in front of an installed package or in
    place of a missing one. Programs bind the functions when they are imported, transformers when it imports a model's
    file: call this first.
    "sglang", "vllm", "fla": imports the engine's own module and replaces its functions there, and wherever a loaded
    module of the engine already holds them. The engine must be installed.

    A second call changes nothing.

    Raises:
      ValueError: an unknown peer.
      ImportError: the engine, or a function to replace, is not there; nothing is changed.
    """
    _check(peer)
    if peer not in _undo:
        _undo[peer] = _register() if peer == "causal_conv1d" else _replace(peer)


def uninstall(peer):
    """Undoes `install`; does nothing if there is nothing to undo. Programs keep what they have bound themselves.

    Raises:
      ValueError: an unknown peer.
    """
    _check(peer)
    for restore in _undo.pop(peer, ()):
        restore()


def _check(peer):
    if peer not in PEERS:
        raise ValueError(f"peer: expected one of {PEERS}, got {peer!r}")


def _register():
    adapter = importlib.import_module("triton_impl.compat.causal_conv1d")
    functions = importlib.import_module("triton_impl.compat.cpp_functions")
    late = sorted(
        name
        for name, module in sys.modules.items()
        if name.startswith(("transformers.models.", "mamba_ssm.")) and "causal_conv1d_fn" in vars(module)
    )
    if late:
        warnings.warn(
            f"install('causal_conv1d'): expected to be called before models are imported, but {', '.join(late)} "
            "already bound other functions",
            RuntimeWarning,
            stacklevel=3,
        )
    contents = {
        "causal_conv1d": {name: getattr(adapter, name) for name in adapter.__all__}
        | {"__version__": adapter.__version__, "__all__": list(adapter.__all__), "__path__": []},
        "causal_conv1d.causal_conv1d_interface": {
            name: getattr(adapter, name) for name in ("causal_conv1d_fn", "causal_conv1d_update")
        },
        "causal_conv1d.causal_conv1d_varlen": {
            "causal_conv1d_varlen_states": adapter.causal_conv1d_varlen_states
        },
        "causal_conv1d.cpp_functions": {name: getattr(functions, name) for name in functions.__all__},
    }
    metadata = _Metadata("causal_conv1d", adapter.__version__)
    hidden = {name: m for name, m in sys.modules.items() if name.partition(".")[0] == "causal_conv1d"}
    for name in hidden:
        del sys.modules[name]
    modules = {}
    for name, names in contents.items():
        module = types.ModuleType(name, adapter.__doc__)
        module.__spec__ = importlib.machinery.ModuleSpec(
            name, None, origin=adapter.__file__, is_package="__path__" in names
        )
        module.__file__ = adapter.__file__
        vars(module).update(names)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        modules[name] = module
    sys.modules.update(modules)
    sys.meta_path.insert(0, metadata)

    def restore():
        sys.meta_path.remove(metadata)
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        sys.modules.update(hidden)

    return [restore]


class _Metadata(importlib.metadata.DistributionFinder):
    """Tells importlib.metadata the version of a module that no installed distribution provides."""

    def __init__(self, name, version):
        self._name, self._version = name, version

    def find_spec(self, *args):
        return None

    def find_distributions(self, context=None):
        if context and context.name and context.name.replace("-", "_").lower() == self._name:
            yield _Distribution(self._name, self._version)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name, version):
        self._text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"

    def read_text(self, filename):
        return self._text if filename == "METADATA" else None

    def locate_file(self, path):
        return path


def _replace(peer):
    adapter = importlib.import_module(f"triton_impl.compat.{peer}")
    pairs = []
    for paths, names in _REPLACED[peer]:
        module = _first(paths)
        for theirs, ours in names.items():
            if not hasattr(module, theirs):
                raise ImportError(f"{module.__name__}: expected a function {theirs} to replace, found none")
            pairs.append((getattr(module, theirs), getattr(adapter, ours)))
    restores = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != peer:
            continue
        for attribute, value in list(vars(module).items()):
            for theirs, ours in pairs:
                if value is theirs:
                    setattr(module, attribute, ours)
                    restores.append(functools.partial(setattr, module, attribute, theirs))
    return restores


def _first(paths):
    for path in paths:
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            missing = error
    raise ImportError(f"expected {' or '.join(paths)} to be installed, found neither") from missing
