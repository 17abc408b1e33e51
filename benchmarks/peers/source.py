"""Single files of installed packages, loaded without the packages around them.

Serving engines import dozens of dependencies before they reach a kernel. What is judged here is one file; it is loaded
from where the package lies on sys.path (an installation, or a folder made with `pip install --no-deps --target`),
under its own name, and the package's `__init__` files do not run.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any


def path_of(module: str) -> Path:
    """The file of a module, by name alone: nothing is imported.

    Raises:
      ImportError: the package is not installed, or has no such file.
    """
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package}: not installed")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder, *rest.split(".")).with_suffix(".py")
        if path.is_file():
            return path
    raise ImportError(f"{package}: installed, but without {rest}")


def load(module: str, stand_ins: Mapping[str, Mapping[str, Any]] | None = None) -> ModuleType:
    """Runs the file of a module alone.

    Args:
      module: dotted name.
      stand_ins: module name -> the names that the file imports from it. They take the place of modules whose own
        imports are the rest of the package.

    Raises:
      ImportError: as `path_of`.
    """
    path = path_of(module)
    for name, members in (stand_ins or {}).items():
        stand_in = ModuleType(name)
        vars(stand_in).update(members)
        sys.modules[name] = stand_in
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def definitions(module: str, names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Runs nothing of a file but the top-level definitions of some names.

    Args:
      module: dotted name.
      names: functions, classes and variables, each after those that it uses.
      given: what they use of the rest of the file.

    Raises:
      ImportError: as `path_of`, or the file defines no such name.
    """
    path = path_of(module)
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = node
    if missing := [name for name in names if name not in found]:
        raise ImportError(f"{module}: expected definitions of {missing}")
    body: list[ast.stmt] = [found[name] for name in names]
    namespace = {"__name__": module, **given}
    exec(compile(ast.Module(body, []), str(path), "exec"), namespace)
    return {name: namespace[name] for name in names}


def version_of(distribution: str) -> str:
    """The installed version, or "unknown" where only the files are there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
