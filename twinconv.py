"""The causal conv1d of serving engines, in Triton and in Pallas, under one NumPy oracle.

`twinconv.triton_impl` (PyTorch), `twinconv.pallas_impl` (JAX) and `twinconv.oracle` are the three packages that the
distribution installs, each imported when it is first asked for; they can as well be imported by those names.
The console script `twinconv` is `python -m oracle`: the conformance suite.
"""

from __future__ import annotations

import importlib
from types import ModuleType

PACKAGES = ("oracle", "pallas_impl", "triton_impl")

__all__ = ["PACKAGES", "main"]


def _load(name: str) -> ModuleType:
    """Imports one of the packages; where a file of the user's has its name, says so."""
    package = importlib.import_module(name)
    if not hasattr(package, "__path__") or getattr(package, "__version__", None) is None:
        found = getattr(package, "__file__", None) or list(getattr(package, "__path__", []))
        raise ImportError(
            f"{name}: expected the package of twinconv, but `import {name}` finds {found}, which hides it; "
            f"rename that file or folder"
        )
    return package


def __getattr__(name: str) -> object:
    if name in PACKAGES:
        return _load(name)
    if name == "__version__":
        return _load("oracle").__version__
    raise AttributeError(f"module 'twinconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *PACKAGES, "__version__"})


def main() -> int:
    """Runs the command line of the conformance suite; returns its exit status."""
    _load("oracle")
    from oracle.conformance.commands import main

    return main()


if __name__ == "__main__":
    raise SystemExit(main())
