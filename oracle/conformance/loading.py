"""Finding an implementation by its text: a Python object, or a program."""

from __future__ import annotations

import importlib
import inspect
import shlex
from typing import Any

from oracle.conformance.adapter import Adapter
from oracle.conformance.process import ProcessAdapter


class NotFound(ValueError):
    """The text of an implementation does not lead to one."""


def load_adapter(spec: str, device: str | None = None) -> Adapter:
    """Loads "package.module:object", or "process:command line" for another language.

    The object is an adapter, or a function that returns one and may take `device`.

    Raises:
      NotFound: the text has another form, there is no such module or object, or it is no adapter.
    """
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise NotFound(f"expected package.module:object or process:command, got {spec!r}")
    if module == "process":
        return ProcessAdapter(shlex.split(name), device)
    try:
        target: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise NotFound(f"ModuleNotFoundError: {error}") from None
    for number, part in enumerate(name.split(".")):
        if not hasattr(target, part):
            where = ".".join([module, *name.split(".")[:number]])
            hint = f", the package at {target.__file__}" if module == "oracle" else ""
            raise NotFound(f"AttributeError: {where}{hint} has no {part!r}")
        target = getattr(target, part)
    if not hasattr(target, "run"):
        takes_device = "device" in inspect.signature(target).parameters
        target = target(device=device) if takes_device else target()
    elif inspect.isclass(target):
        target = target()
    for attribute in ("name", "version", "capabilities", "run"):
        if not hasattr(target, attribute):
            raise NotFound(
                f"expected an adapter with {attribute!r}, got {type(target).__name__} from {spec!r}"
            )
    return target
