"""What tests compare of two signatures."""

import inspect


def parameters(function):
    """The parameters of a function without annotations, which each file spells its own way."""
    found = inspect.signature(function).parameters
    return {name: p.replace(annotation=inspect.Parameter.empty) for name, p in found.items()}
