"""Pallas' GPU interpreter without a compilation: kernels run operation by operation on NumPy arrays.

JAX's interpreter makes an XLA program of every kernel, which takes a second to trace, lower and compile and then runs once. Here the
program holds one callback, which is that interpreter all the same: its modules once more, so its memory, barriers, bounds and allocations with
every check, but over NumPy, Python's loops and calls in place of jax.numpy, XLA's loops and callbacks. Arithmetic rounds as
XLA does without optimisation: every operation once.

The interpreter itself still runs what this does not know: several threads a program, races, versions of JAX other
than VERSIONS; and the conformance suite's exact cases. `tests/pallas/test_interpreter.py` compares the two.
"""

import functools
import importlib.util
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
from jax import lax
from jax._src import callback as callbacks
from jax._src import core
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as original

DEVICE = threading.local()
VERSIONS = ("0.10.", "0.12.")
PACKAGE = "jax._src.pallas.mosaic_gpu.interpret"


class Over:
    """A module with some names of its own."""

    def __init__(self, module, **names):
        self.module = module
        self.__dict__.update(names)

    def __getattr__(self, name):
        return getattr(self.module, name)


# Arithmetic


def quotient(x, y):
    if np.issubdtype(x.dtype, np.integer):  # towards zero
        found = np.floor_divide(np.abs(x), np.abs(y))
        return np.where((x < 0) != (y < 0), -found, found).astype(x.dtype)
    return np.true_divide(x, y)


def converted(x, *, new_dtype, **_):
    x = np.asarray(x)
    if np.issubdtype(new_dtype, np.integer) and not np.issubdtype(x.dtype, np.integer) and x.dtype != bool:
        limits = np.iinfo(new_dtype)  # saturating, NaN as 0
        wide = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
        return np.clip(wide, limits.min, limits.max).astype(new_dtype)
    return x.astype(new_dtype)


def spread(x, *, shape, broadcast_dimensions, **_):
    x = np.asarray(x)
    sizes = [1] * len(shape)
    for size, place in zip(x.shape, broadcast_dimensions, strict=True):
        sizes[place] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def selected(which, *cases):
    if len(cases) == 2:
        return np.where(which.astype(bool), cases[1], cases[0])
    return np.choose(which, cases)


def sliced(x, *, start_indices, limit_indices, strides):
    return x[tuple(map(slice, start_indices, limit_indices, strides or (1,) * x.ndim))]


def padded(x, value, *, padding_config):
    if any(low < 0 or high < 0 or inner for low, high, inner in padding_config):
        raise NotImplementedError(f"pad {padding_config}")
    return np.pad(x, [pair[:2] for pair in padding_config], constant_values=value)


def counted(*, dtype, shape, dimension, **_):
    sizes = [1] * len(shape)
    sizes[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(sizes), shape)


def shifted(function):
    def shift(x, by):
        return np.where(by < 8 * x.dtype.itemsize, function(x, by), x.dtype.type(0)).astype(x.dtype)

    return shift


def precisely(function):
    """In float64 and rounded once, as no library differs in."""

    def call(x, **_):
        return function(x.astype(np.float64)).astype(x.dtype)

    return call


def plain(function):
    return lambda *operands, **_: function(*operands)


ARITHMETIC = {
    lax.add_p: np.add, lax.sub_p: np.subtract, lax.mul_p: np.multiply, lax.div_p: quotient, lax.rem_p: np.fmod,
    lax.max_p: np.maximum, lax.min_p: np.minimum, lax.neg_p: np.negative, lax.abs_p: np.abs, lax.sign_p: np.sign,
    lax.and_p: np.bitwise_and, lax.or_p: np.bitwise_or, lax.xor_p: np.bitwise_xor, lax.not_p: np.invert,
    lax.eq_p: np.equal, lax.ne_p: np.not_equal, lax.lt_p: np.less, lax.le_p: np.less_equal,
    lax.gt_p: np.greater, lax.ge_p: np.greater_equal, lax.is_finite_p: np.isfinite,
    lax.exp_p: precisely(np.exp), lax.exp2_p: precisely(np.exp2), lax.log_p: precisely(np.log),
    lax.log1p_p: precisely(np.log1p), lax.tanh_p: precisely(np.tanh),
    lax.sqrt_p: plain(np.sqrt), lax.rsqrt_p: precisely(lambda x: 1 / np.sqrt(x)),
    lax.floor_p: np.floor, lax.select_n_p: selected, lax.convert_element_type_p: converted,
    lax.bitcast_convert_type_p: lambda x, *, new_dtype: np.asarray(x).view(new_dtype),
    lax.broadcast_in_dim_p: spread, lax.slice_p: sliced, lax.pad_p: padded, lax.iota_p: counted,
    lax.squeeze_p: lambda x, *, dimensions: np.squeeze(x, dimensions),
    lax.reshape_p: lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
    lax.transpose_p: lambda x, *, permutation: np.transpose(x, permutation),
    lax.concatenate_p: lambda *parts, dimension: np.concatenate(parts, dimension),
    lax.shift_left_p: shifted(np.left_shift), lax.shift_right_logical_p: shifted(
        lambda x, by: (x.view(f"u{x.dtype.itemsize}") >> by.view(f"u{by.dtype.itemsize}")).view(x.dtype)
    ),
    lax.shift_right_arithmetic_p: lambda x, by: np.right_shift(x, np.minimum(by, 8 * x.dtype.itemsize - 1)),
}  # fmt: skip
SAME = {"optimization_barrier", "stop_gradient"}
INNER = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
         "custom_vjp_call": "call_jaxpr"}  # fmt: skip


def bound(primitive, parameters, *operands):
    """What is not in the table, by JAX itself."""
    found = primitive.bind(*operands, **parameters)
    return [np.asarray(value) for value in found] if primitive.multiple_results else np.asarray(found)


@functools.lru_cache(4096)
def steps_of(jaxpr):
    """The operations of a jaxpr as (kind, call, equation, operands, results); an operand is a variable or a value."""
    steps = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        operands = tuple(
            (None, np.asarray(v.val, v.aval.dtype)[()]) if isinstance(v, core.Literal) else (v, None)
            for v in eqn.invars
        )
        if name in INNER:
            kind, call = "inner", eqn.params[INNER[name]]
        elif name in SAME:
            kind, call = "same", None
        elif eqn.primitive in ARITHMETIC:
            kind, call = "one", ARITHMETIC[eqn.primitive]
            if eqn.params and call not in PARAMETERLESS:
                call = functools.partial(call, **eqn.params)
        else:
            kind, call = "other", functools.partial(bound, eqn.primitive, eqn.params)
        steps.append((kind, call, eqn, operands, tuple(eqn.outvars)))
    return tuple(steps)


PARAMETERLESS = {
    call for call in ARITHMETIC.values() if isinstance(call, np.ufunc) or call in (selected, quotient)
}


# Control and memory


def interpret(self, jaxpr, token, *arguments):
    """`JaxprInterpreter.interpret` on NumPy arrays."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))
    for kind, call, eqn, operands, results in steps_of(jaxpr):
        given = [value if v is None else values[v] for v, value in operands]
        if kind == "one":
            values[results[0]] = call(*given)
            continue
        if kind == "inner":
            token, found = interpret(self, call.jaxpr, token, *call.consts, *given)
        elif kind == "same":
            found = given
        elif handler := self.handlers.get(eqn.primitive.name):
            token, found = handler(self, eqn, token, lambda given=given: given)
            if not eqn.primitive.multiple_results:
                found = (found,)
        else:
            found = call(*given)
            if not eqn.primitive.multiple_results:
                found = (found,)
        values.update(zip(results, found, strict=True))
    return token, [
        np.asarray(v.val, v.aval.dtype)[()] if isinstance(v, core.Literal) else values[v]
        for v in jaxpr.outvars
    ]


def switch(index, branches, *operands):
    return branches[min(max(int(index), 0), len(branches) - 1)](*operands)


def while_loop(condition, body, value):
    while condition(value):
        value = body(value)
    return value


def fori_loop(lower, upper, body, value):
    for i in range(lower, upper):
        value = body(np.int32(i), value)
    return value


def scan(body, carry, xs, length):
    rows = []
    for i in range(length):
        carry, row = body(carry, [x[i] for x in xs])
        rows.append(row)
    return carry, [np.stack(column) for column in zip(*rows, strict=True)]


def called(function, _, *operands, ordered=False, **named):
    return function(*operands, **named)


def handlers_of(interpreter):
    """The interpreter's own methods by primitive; those with another signature are adapted."""
    names = (
        "get",
        "swap",
        "run_scoped",
        "cond",
        "scan",
        "while",
        "barrier_wait",
        "barrier_arrive",
        "copy_gmem_to_smem",
    )
    found = {name: getattr(interpreter, f"_interpret_{name}_p") for name in names}
    found["axis_index"] = lambda self, eqn, token, _: (token, self._interpret_axis_index_p(eqn))
    found["copy_smem_to_gmem"] = lambda self, eqn, token, given: self._interpret_copy_smem_to_gmem_p(
        eqn, token, *given(), **eqn.params
    )
    for nothing in ("commit_group", "wait_smem_to_gmem", "set_max_registers", "commit_smem"):
        found[nothing] = getattr(
            interpreter, f"_interpret_{nothing}_p", lambda self, eqn, token, _: (token, [])
        )
    found |= {"load": found["get"], "store": found["swap"]}  # of JAX 0.12
    return found


def copy_of(name):
    """A module of the interpreter once more."""
    spec = importlib.util.find_spec(f"{PACKAGE}.{name}")
    spec = importlib.util.spec_from_file_location(f"quick_pallas_{name}", spec.origin)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.jnp = np
    module.callback = SimpleNamespace(io_callback=called)
    return module


@functools.cache
def quick():
    """`interpret_pallas_call` that runs where it is called."""
    memory, kernels, calls = map(copy_of, ("gpu_callbacks", "jaxpr_interpret", "interpret_pallas_call"))
    kernels.gpu_callbacks = calls.gpu_callbacks = memory
    calls.jaxpr_interpret = kernels
    kernels.lax = Over(lax, switch=switch, scan=scan, while_loop=while_loop, rem=np.fmod)
    calls.jax = Over(jax, lax=Over(lax, fori_loop=fori_loop))
    utils = calls.interpret_utils
    kernels.interpret_utils = calls.interpret_utils = Over(
        utils,
        get_uninitialized_array=lambda shape, dtype, kind: np.full(
            shape, utils.get_uninitialized_value(dtype, kind), dtype
        ),
        get_indices=lambda sizes, place: (
            tuple(map(np.int32, np.unravel_index(int(place), sizes))) if sizes else ()
        ),
    )
    calls.thread_map = Over(
        calls.thread_map,
        thread_map=lambda body, count, token, *arguments, **_: body(np.int32(0), token, *arguments),
    )
    kernels.DeviceInfo = lambda: DEVICE.info
    kernels.JaxprInterpreter.handlers = handlers_of(kernels.JaxprInterpreter)
    kernels.JaxprInterpreter.interpret = interpret
    return calls.interpret_pallas_call


def install():
    """Puts this in the interpreter's place, once."""
    interpreter = original.interpret_pallas_call
    if hasattr(interpreter, "quick") or not jax.__version__.startswith(VERSIONS):
        return

    def call(*operands, grid_mapping, mesh, interpret_params, **given):
        given |= dict(grid_mapping=grid_mapping, mesh=mesh, interpret_params=interpret_params)
        _, cluster, threads = original._get_grid_and_cluster_dims_and_num_threads(grid_mapping, mesh)
        if (
            cluster
            or threads > 1
            or interpret_params.detect_races
            or interpret_params.skip_floating_point_ops
        ):
            return interpreter(*operands, **given)

        device = (
            original.jaxpr_interpret.DeviceInfo()
        )  # of a mesh, whose devices come here each in a thread of its own

        def run(number, places, *arrays):
            places = dict(zip(device.axis_indices, places, strict=True))
            DEVICE.info = SimpleNamespace(
                device_id=int(number), num_devices=device.num_devices, axis_indices=places
            )
            kernel = quick()
            try:
                with np.errstate(all="ignore"):
                    return tuple(kernel(*arrays, **given))
            except Exception:  # what the kernel has not freed is no fault of the next one
                sys.modules["quick_pallas_gpu_callbacks"].reset_gpu_interpret_mode_state()
                raise

        results = [bm.array_aval for bm in grid_mapping.block_mappings_output]
        shapes = tuple(jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results)
        return callbacks.io_callback(
            run, shapes, device.device_id, tuple(device.axis_indices.values()), *operands, ordered=True
        )

    call.quick = interpreter
    original.interpret_pallas_call = call
