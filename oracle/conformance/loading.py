"""Finding an implementation by its text: a Python object, or a program."""

from __future__ import annotations

import importlib
import inspect
import shlex
from typing import Any

from oracle.conformance.adapter import Adapter
from oracle.conformance.process import ProcessAdapter


def load_adapter(spec: str, device: str | None = None) -> Adapter:
    """Loads "package.module:object", or "process:command line" for another language.

    The object is an adapter, or a function that returns one and may take `device`.

    Raises:
      ValueError: the text has another form, or the object is no adapter.
    """
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"impl: expected package.module:object or process:command, got {spec!r}")
    if module == "process":
        return ProcessAdapter(shlex.split(name), device)
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    if not hasattr(target, "run"):
        takes_device = "device" in inspect.signature(target).parameters
        target = target(device=device) if takes_device else target()
    elif inspect.isclass(target):
        target = target()
    for attribute in ("name", "version", "capabilities", "run"):
        if not hasattr(target, attribute):
            raise ValueError(
                f"impl: expected an adapter with {attribute!r}, got {type(target).__name__} from {spec!r}"
            )
    return target
