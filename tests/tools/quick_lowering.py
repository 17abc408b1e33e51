"""Mosaic GPU's layout inference without doing again what cannot change: most of the time of lowering a kernel.

Its solver reduces every constraint again after every guess. One that was reduced before and holds no variable that has got a
value since stays as it is. What it finds is the same. `tests/pallas/test_interpreter.py` compares the two.
"""

import jax
from jax.experimental.mosaic.gpu import constraints


def variables(expression):
    """The variables of a constraint's field, which is an expression or a plain value."""
    while hasattr(expression, "expression"):
        expression = expression.expression
    return [expression] if isinstance(expression, constraints.Variable) else []


def install():
    """Puts this in the solver's place, once."""
    reduce, hashed = getattr(constraints, "reduce_constraint", None), constraints.Variable.__hash__
    if not jax.__version__.startswith("0.10.") or hasattr(reduce, "whole"):  # JAX 0.12 does so itself
        return

    def settled(constraint, assignments):
        free = constraint.__dict__.get("free")
        return free is not None and assignments.isdisjoint(free)

    def reduce_system(system):
        assignments = system.assignments.keys()
        return None if all(settled(c, assignments) for c in system.constraints) else reduce_once(system)

    def reduce_constraint(constraint, assignments):
        if settled(constraint, assignments.keys()):
            return constraint
        found = reduce(constraint, assignments)
        if not isinstance(found, constraints.Unsatisfiable):
            found.__dict__["free"] = [v for field in list(found.__dict__.values()) for v in variables(field)]
        return found

    def kept_hash(variable):
        found = variable.__dict__.get("hash")
        if found is None:
            found = variable.__dict__["hash"] = hashed(variable)
        return found

    reduce_once = constraints._reduce_system_once
    reduce_constraint.whole, reduce_system.whole = reduce, reduce_once
    constraints.reduce_constraint, constraints._reduce_system_once = reduce_constraint, reduce_system
    constraints.Variable.__hash__ = kept_hash
