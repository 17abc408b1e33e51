"""Calls on arrays that are split over a mesh: each device runs the call on its own part, where the parts are independent.

A compiler cannot split a kernel: it would gather the arrays first. And where mesh axes are Explicit, types say how an
array is split, which gathers and scatters do not take as it comes. So a call whose arrays say that they are split (their
types on Explicit axes; outside jit their shardings) runs inside `jax.shard_map`, and a kernel whose arrays the compiler
splits (Auto axes inside jit) is partitioned by a rule of its own. Channels are independent, and so are rows of equal
length. What is not is refused: see `pallas_impl.sharding` for it.
"""

import functools

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oracle.contract import Unsupported
from pallas_impl.tracing import refuse_transforms, without_references

BATCH, CHANNELS = "rows", "channels"


def places_of(call):
    """{name: (mesh, the mesh axes that split each axis)} of a call's arrays; None where none is split."""
    arrays = {name: getattr(call, name) for name in call.ARRAYS}
    places = {name: _placed(array) for name, array in arrays.items() if array is not None}
    return places if any(any(spec) for _, spec in places.values()) else None


def run_parts(run, call, places, roles, results):
    """`run(call)` on every device's own part, or None where the compiler is left to split plain array code.

    Args:
      run: takes a record and returns a tuple of arrays, tuples of arrays and None; hashable.
      call: a checked record; its arrays may be split, its other values are static.
      places: of `places_of`.
      roles: {name: (BATCH, CHANNELS or None an axis)} of arrays that may be split; others are needed whole.
      results: those of the results, in their order.

    Raises:
      Unsupported: an array is split along an axis that has no role, or two arrays are split in different ways.
    """
    mesh = next(mesh for mesh, spec in places.values() if any(spec))
    try:
        specs, out_specs = _specs(places, roles, results)
    except Unsupported:
        if call.backend == "xla" and AxisType.Explicit not in mesh.axis_types:
            return None
        raise
    arrays = {name: getattr(call, name) for name in places}
    static = call._replace(**dict.fromkeys(call.ARRAYS))
    return _run_parts(arrays, run, static, mesh, tuple(specs.items()), out_specs)


@functools.partial(jax.jit, static_argnames=("run", "call", "mesh", "in_specs", "out_specs"))
def _run_parts(arrays, run, call, mesh, in_specs, out_specs):
    in_specs = dict(in_specs)
    if AxisType.Explicit in mesh.axis_types:  # there a mismatch is an error, elsewhere JAX moves the array
        arrays = {
            name: jax.reshard(array, NamedSharding(mesh, in_specs[name])) for name, array in arrays.items()
        }
    part = lambda arrays: tuple(run(call._replace(**arrays)))  # noqa: E731
    if (
        mesh.manual_axes
    ):  # JAX takes no other values than arguments along to a derivative of a nested shard_map
        part = jax.checkpoint(part)
    return jax.shard_map(part, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs)(arrays)


# Not the interpreter: its callbacks are ordered effects, which no partitioned operation may have.
PARTITIONED = ("mosaic_gpu",)


def compiler_splits(backend, x):
    """Whether a call on x is traced into a program in which the compiler may find its kernels' arrays split."""
    if backend not in PARTITIONED or jax.device_count() == 1 or not isinstance(x, jax.core.Tracer):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.manual_axes and AxisType.Explicit not in mesh.axis_types


def partitioned(run, call, roles, results, sums=()):
    """`run(call)` inside a trace, as one operation that the compiler may split by roles, and by nothing else.

    Where arrays of a program for several devices come split along another axis, the compilation stops with
    `Unsupported`, rather than gather them.

    Args:
      run, call, roles: as above.
      results: the roles of the leaves of the result.
      sums: numbers of those leaves of which each device has the part of its rows; they are added up.
    """
    names = tuple(name for name in call.ARRAYS if getattr(call, name) is not None)

    shapes = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (getattr(call, name) for name in names))
    (given,) = refuse_transforms(tuple(getattr(call, name) for name in names))

    def whole(*arrays):
        return run(call._replace(**dict(zip(names, arrays, strict=True))))

    def partition(mesh, arguments, _):
        places = {}
        for name, argument in zip(names, arguments, strict=True):
            place = argument.sharding
            if isinstance(place, NamedSharding):
                places[name] = _placed_as(place)
            elif place is None or place.is_fully_replicated:
                places[name] = mesh, ()
            else:
                raise Unsupported(
                    f"{name}: expected a mesh to be set (jax.set_mesh), since it is split, got {place}"
                )
        specs, out_specs = _specs(places, roles, results)
        rows = next(
            (
                spec[axis]
                for name, spec in specs.items()
                for axis, role in enumerate(roles.get(name, ()))
                if role == BATCH
            ),
            None,
        )

        def part(*arrays):
            found, tree = jax.tree.flatten(without_references(whole, *arrays))
            if rows is not None:
                found = [jax.lax.psum(a, rows) if i in sums else a for i, a in enumerate(found)]
            return jax.tree.unflatten(tree, found)

        place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
        tree = jax.tree.structure(jax.eval_shape(whole, *shapes))
        where = jax.tree.unflatten(tree, [place(spec) for spec in out_specs])
        return mesh, part, where, tuple(place(specs[name]) for name in names)

    def rule(mesh, arguments, found):
        sides = []
        for side, given in (("a", [roles.get(name, ()) for name in names]), ("r", results)):
            types = arguments if side == "a" else found
            factors = [
                [
                    given_role if given_role else f"{side}{i}_{axis}"
                    for axis, given_role in enumerate(of or (None,) * len(kind.shape))
                ]
                for i, (of, kind) in enumerate(zip(given, types, strict=True))
            ]
            sides.append(", ".join(" ".join(one) for one in factors))
        return " -> ".join(sides)

    operation = custom_partitioning(whole)
    operation.def_partition(partition, sharding_rule=rule)
    return operation(*given)


def _placed(array):
    """(mesh, the mesh axes that split each axis) of an array, as far as it is known here."""
    if isinstance(array, jax.core.Tracer):
        sharding = jax.typeof(array).sharding
    else:
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return None, ()
    return _placed_as(sharding)


def _placed_as(sharding):
    mesh = sharding.mesh
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

    def splits(axis):
        return kinds[axis] is AxisType.Explicit or mesh.shape[axis] > 1  # Explicit ones are in the type

    found = []
    for axes in sharding.spec:
        axes = axes if isinstance(axes, tuple) else (axes,) if isinstance(axes, str) else ()
        found.append(tuple(axis for axis in axes if splits(axis)))
    return mesh, tuple(found)


def _specs(places, roles, results):
    """({name: PartitionSpec}, those of the results): the roles' mesh axes, those of x where arrays differ."""
    found = {}
    for name, (_, spec) in places.items():
        for axis, axes in enumerate(spec):
            if not axes:
                continue
            role = roles[name][axis] if name in roles else None
            if role is None:
                raise Unsupported(
                    f"{name}: expected axis {axis} whole on every device, since its parts depend on each other, got it "
                    f"split over {_named(axes)}; pallas_impl.sharding splits sequences, tokens and channels"
                )
            first = found.setdefault(role, (name, axes))
            if first[1] != axes:
                raise Unsupported(
                    f"{name}: expected its {role} split over {_named(first[1])}, as those of {first[0]}, got "
                    f"{_named(axes)}"
                )
    both = set(found[BATCH][1]) & set(found[CHANNELS][1]) if len(found) == 2 else ()
    if both:
        raise Unsupported(
            f"{found[CHANNELS][0]}: expected channels split over other mesh axes than the rows of {found[BATCH][0]}, "
            f"got {_named(tuple(both))} for both"
        )
    axes = {role: axes if len(axes) > 1 else axes[0] for role, (_, axes) in found.items()}
    of = lambda roles: PartitionSpec(*(axes.get(role) for role in roles))  # noqa: E731
    return {name: of(roles.get(name, ())) for name in places}, tuple(of(result) for result in results)


def _named(axes):
    return " and ".join(repr(axis) for axis in axes)
