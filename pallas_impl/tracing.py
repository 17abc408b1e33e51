"""What JAX's transformations need to know: errors for vmap and derivatives of kernels, a name for export."""

import functools

import jax
import jax.numpy as jnp
from jax import export
from jax._src import config
from jax._src.custom_batching import custom_vmap_p
from jax._src.state import discharge
from jax.extend.core import jaxpr_as_fun

from oracle.contract import ConvOutput, ConvWindowOutput, Unsupported
from oracle.contract_prologue import PrologueOutput, PrologueWindowOutput

# So that an exported program returns these where it is loaded; that process imports pallas_impl as well.
for _result in (ConvOutput, ConvWindowOutput, PrologueOutput, PrologueWindowOutput):
    export.register_namedtuple_serialization(_result, serialized_name=f"twinconv.{_result.__name__}")


# Outside jit a program of its own, whose constants are copied to the device once; in a trace nothing but what it does.
program = functools.partial(jax.jit, inline=True)


@functools.partial(program, static_argnums=0)
def all_of(batch):
    """[batch] bool: every row."""
    return jnp.ones((batch,), bool)


def refuse_transforms(*arrays):
    """The arrays (or None) as they are; under `jax.vmap` or a derivative the trace stops with `Unsupported`."""
    return _no_derivative(arrays)


def vary_alike(*arrays):
    """The arrays, also in records and None, as JAX arrays, each over every axis of a `jax.shard_map` over which one of them varies.

    The gradient of an array that was the same on all devices is then summed over them, as in plain jax.numpy.
    """
    axes = _varying(arrays)
    return jax.tree.map(lambda array: _vary(jnp.asarray(array), axes), arrays)


def axes_are_typed(array):
    """Whether an array's type says over which axes of a `jax.shard_map` it varies: not if that was told to check nothing."""
    return bool(_varying(array))


def beside_shard_map(run, arrays):
    """`run(arrays)`, where inside `jax.shard_map` no type says over which axes an array varies; results vary as arrays do.

    For kernels: Pallas writes to no array that varies (JAX 0.10 to 0.12), and takes no result that does not say it.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return run(arrays)
    axes = _varying(arrays)
    with config._check_vma(False):  # no public name; an operation in it forgets, two reshapes cost nothing
        plain = jax.tree.map(lambda a: a.reshape(1, *a.shape).reshape(a.shape) if _varying(a) else a, arrays)
        results = jax.jit(run)(plain)
    return jax.tree.map(lambda result: _vary(result, axes), results)


def _varying(arrays):
    return set().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(arrays)))


def _vary(array, axes):
    missing = tuple(sorted(axes - _varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


@jax.custom_batching.custom_vmap
def _no_vmap(arrays):
    return arrays


@_no_vmap.def_vmap
def _explain_vmap(size, batched, arrays):
    raise Unsupported(
        "backend: a kernel takes no jax.vmap; expected one call on one packed batch (x, query_start_loc and "
        "cache_indices joined along axis 0, the pools as one pool), or backend='xla', which jax.vmap understands"
    )


@jax.custom_jvp
def _no_derivative(arrays):
    return _no_vmap(arrays)


@_no_derivative.defjvp
def _explain_derivative(primals, tangents):
    raise Unsupported(
        "backend: this call of a kernel has no derivative; expected pallas_impl.causal_conv1d, the differentiable "
        "form, once differentiated, or backend='xla', or jax.lax.stop_gradient around every argument"
    )


def mappable(operation, rule):
    """`operation(*arrays)`, a kernel's call, that `jax.vmap` runs by `rule(size, batched, *arrays)`."""
    mapped = jax.custom_batching.custom_vmap(operation)
    mapped.def_vmap(rule)
    return mapped


def without_references(run, *arrays):
    """`run(*arrays)` without the references that kernels write to: `jax.jit` discharges them, `custom_partitioning` does not."""
    traced, kinds = jax.make_jaxpr(run, return_shape=True)(*arrays)
    found = jaxpr_as_fun(discharge.discharge_state(traced))(*jax.tree.leaves(arrays))
    return jax.tree.unflatten(jax.tree.structure(kinds), found)


@discharge.register_discharge_rule(custom_vmap_p)
def _inline_custom_vmap(*given, call, **_):
    """What JAX 0.10 to 0.12 leave out: a kernel, which writes to references, inside `custom_vmap`. No vmap follows here."""
    args = given[len(given) - len(call.in_avals) :]  # behind a context, or in JAX 0.10 two lists of types
    return [None] * len(args), jaxpr_as_fun(discharge.discharge_state(call))(*args)
