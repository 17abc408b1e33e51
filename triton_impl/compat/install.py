"""Puts adapters where programs look for the peers, and takes them away again."""

import functools
import importlib
import importlib.machinery
import importlib.metadata
import inspect
import logging
import re
import sys
import tomllib
import types
import warnings
from pathlib import Path

from oracle.contract import Unsupported

_PEERS = tomllib.loads(Path(__file__).with_name("peers.toml").read_text())
PEERS = ("causal_conv1d", *_PEERS)
# What a peer's earlier releases call an argument: SGLang until 0.5.10, FLA until 0.5.
_RENAMED = {"num_accepted_tokens": "num_accept_tokens", "BT": "chunk_size"}

_undo = {}


def install(peer: str) -> None:
    """Makes programs that import `peer` get the adapter.

    "causal_conv1d": registers modules under that name, and its version, in front of an installed package or in
    place of a missing one. Programs bind the functions when they are imported, transformers when it imports a model's
    file: call this first.
    "sglang", "vllm", "fla", "aiter": imports the engine's own module and replaces its functions there, and wherever a
    loaded module of the engine already holds them. The engine must be installed. One line of the logger
    "<engine>.twinconv" says what was replaced. An engine that names its version must be one that was judged: SGLang
    0.5.8 to 0.5.23, vLLM 0.20 to 0.33, FLA 0.3 to 0.6, aiter 0.1; and no argument of its functions may be unknown here.

    A second call changes nothing.

    Raises:
      ValueError: an unknown peer.
      ImportError: the engine, or a function to replace, is not there; nothing is changed.
      Unsupported: an engine of another version, or functions with other arguments; nothing is changed.
    """
    _check(peer)
    if peer not in _undo:
        _undo[peer] = _register() if peer == "causal_conv1d" else _replace(peer)


def uninstall(peer: str) -> None:
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
    extension = ("causal_conv1d_fwd", "causal_conv1d_bwd", "causal_conv1d_update")
    interface = (*adapter.__all__[:2], "causal_conv1d_ref", "causal_conv1d_update_ref", "CausalConv1dFn")
    varlen = ("causal_conv1d_varlen_states", "causal_conv1d_varlen_states_ref")
    contents = {
        "causal_conv1d": {name: getattr(adapter, name) for name in adapter.__all__}
        | {"__version__": adapter.__version__, "__all__": list(adapter.__all__), "__path__": []},
        "causal_conv1d.causal_conv1d_interface": {name: getattr(adapter, name) for name in interface},
        "causal_conv1d.causal_conv1d_varlen": {name: getattr(adapter, name) for name in varlen},
        "causal_conv1d.cpp_functions": {name: getattr(functions, name) for name in functions.__all__},
        "causal_conv1d_cuda": {name: getattr(functions, name) for name in extension},
    }
    metadata = _Metadata("causal_conv1d", adapter.__version__)
    tops = ("causal_conv1d", "causal_conv1d_cuda")
    hidden = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in tops}
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
    operators = functions.register_operators()

    def restore():
        sys.meta_path.remove(metadata)
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
        sys.modules.update(hidden)
        functions.forget_operators(operators)

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
    version = _judged_version(peer)
    pairs = []
    for place in _PEERS[peer]["places"]:
        may_lack = place.get("optional", False)
        module = _first(place["modules"], may_lack)
        for theirs, ours in place["functions"].items():
            function = getattr(module, theirs, None)
            if function is None and not may_lack:
                raise ImportError(f"{module.__name__}: expected a function {theirs} to replace, found none")
            if function is not None and all(function is not known for known, _ in pairs):
                pairs.append(
                    (function, _fitting(function, [getattr(adapter, name) for name in ours], version))
                )
    restores, replaced = [], []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != peer or not isinstance(module, types.ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            for theirs, ours in pairs:
                if value is theirs:
                    setattr(module, attribute, ours)
                    restores.append(functools.partial(setattr, module, attribute, theirs))
                    replaced.append(f"{name}.{attribute}")
    logging.getLogger(f"{peer}.twinconv").info(
        "twinconv replaces %s of %s %s: %s", len(pairs), peer, version, ", ".join(replaced)
    )
    return restores


def _first(paths, may_lack):
    for path in paths:
        try:
            return importlib.import_module(path)
        except ImportError as error:
            if not may_lack and not isinstance(error, ModuleNotFoundError):
                raise
            missing = error
    if may_lack:
        return None
    raise ImportError(f"expected {' or '.join(paths)} to be installed, found neither") from missing


def _judged_version(peer):
    """The version of the installed engine, or "of unknown version"; raises if it is not one that was judged."""
    version = getattr(_first([peer], False), "__version__", None)
    for distribution in _PEERS[peer]["distributions"]:
        try:
            version = version or importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    if version is None:
        return "of unknown version"
    numbers = [int(number) for number in re.match(r"[0-9.]*", version)[0].split(".") if number]
    judged = _PEERS[peer]["judged"]
    first, last = ([int(number) for number in bound.split(".")] for bound in judged)
    if not first <= numbers[: len(first)] or not numbers[: len(last)] <= last:
        raise Unsupported(
            f"peer: expected {peer} {' to '.join(judged)}, whose functions were judged, got {version}"
        )
    return version


def _fitting(theirs, candidates, version):
    """The first candidate that knows every argument of the peer's function, taking positions in the peer's order."""
    try:
        parameters = inspect.signature(theirs).parameters.values()
    except (TypeError, ValueError):
        return candidates[0]
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for ours in candidates:
        known = list(inspect.signature(ours).parameters)
        renamed = [name if name in known else _RENAMED.get(name, name) for name in names]
        if set(renamed) <= set(known):
            break
    else:
        unknown = sorted(set(renamed) - set(known))
        raise Unsupported(
            f"{theirs.__module__}.{theirs.__name__} {version}: expected arguments that the adapter knows, got {', '.join(unknown)}"
        )
    single = ours.__name__ == "causal_conv1d" and names and "output_final_state" not in names  # FLA 0.3.0
    if renamed == known[: len(renamed)] and names == renamed and not single:
        return ours

    @functools.wraps(ours)
    def call(*args, **kwargs):
        kwargs = {_RENAMED.get(name, name) if name not in known else name: a for name, a in kwargs.items()}
        result = ours(**dict(zip(renamed, args, strict=False)), **kwargs)
        return result[0] if single else result

    return call
