"""The registry of mutants."""

from __future__ import annotations

import re
from collections.abc import Callable

from oracle.conformance.flags import FLAGS
from oracle.conformance.model import Model


class Mutant(Model):
    """A model with one mistake; `flag` says which, the docstring how."""

    flag = ""
    hangs = False


MUTANTS: dict[str, type[Mutant]] = {}


def mutant(flag: str) -> Callable[[type[Mutant]], type[Mutant]]:
    """Registers a mutant of a failure mode; its name is the class name in kebab case."""

    def register(cls: type[Mutant]) -> type[Mutant]:
        if flag not in FLAGS:
            raise ValueError(f"flag: expected a failure mode of flags.FLAGS, got {flag!r}")
        cls.flag = flag
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        MUTANTS[cls.name] = cls
        return cls

    return register
