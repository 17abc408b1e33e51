"""The JAX twin as the oracle's runner sees it: NumPy arrays in, one jitted call, NumPy arrays out.

    python -m oracle run --impl pallas_impl.adapter:adapter --device cpu --tier core     (GPU interpreter)
    python -m oracle run --impl pallas_impl.adapter:adapter --device gpu
    python -m oracle run --impl pallas_impl.adapter:xla

JAX arrays have no strides, so layouts reach the operations as contiguous arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import pallas_impl
from oracle.conformance.adapter import GRADIENTS, SERVING_FEATURES, UPSTREAM
from oracle.contract import Unsupported
from oracle.numerics import TypedArray

WIDE = ("int64", "uint64")


class JaxAdapter:
    """Runs one backend of `pallas_impl`, under jit unless the call reads its data on the host."""

    def __init__(self, backend, device):
        self.name = f"pallas_impl-{backend}"
        self.version = f"jax-{jax.__version__}"
        self.backend = backend
        self.device = device

    def capabilities(self):
        unsupported = {"*.layout:huge_pitch_*": "JAX arrays have no strides"}
        if not jax.config.jax_enable_x64:
            for dtype in WIDE:
                unsupported[f"*:{dtype}"] = "JAX has no 64-bit arrays unless jax_enable_x64 is set"
        return {
            "device": self.device.device_kind,
            "supports": list(SERVING_FEATURES),
            "unsupported": unsupported,
        }

    def run(self, op, arrays, options):
        for name, array in arrays.items():
            if array is not None and array.sparse:
                raise Unsupported(f"{name}: JAX arrays have no strides")
            if array is not None and array.dtype in WIDE and not jax.config.jax_enable_x64:
                raise Unsupported(f"{name}: {array.dtype} arrays need jax_enable_x64")
        if op != "tree_parents_from_links":  # plain jnp, without a backend
            options = {"backend": self.backend, **options}
        function = functools.partial(_operation(op), **options)
        if not options.get("validate"):
            function = _jitted(op, tuple((name, type(value), value) for name, value in options.items()))
        with jax.default_device(self.device):
            result = function(**{name: None if a is None else _to_jax(a) for name, a in arrays.items()})
            if op == "tree_parents_from_links":
                return {"parents": np.asarray(result)}
            if op == "commit_windows":
                found = {"conv_states": result}
            else:
                found = result if op in GRADIENTS else result._asdict()
            return {name: _typed(value) for name, value in found.items()}


@functools.cache
def _jitted(op, options):
    """One program for the options (name, type, value); the type tells True from 1."""
    return jax.jit(functools.partial(_operation(op), **{name: value for name, _, value in options}))


def _operation(op):
    return functools.partial(_gradients, op) if op in GRADIENTS else getattr(pallas_impl, op)


def _gradients(op, **given):
    """A differentiable form and its backward pass; the loss leaves out results without an incoming gradient."""
    upstream = {of: given.pop(name) for name, of in UPSTREAM[op].items()}
    upstream = {of: gradient for of, gradient in upstream.items() if gradient is not None}
    arguments = {name: given.pop(name) for name in GRADIENTS[op].values()}

    def forward(arguments):
        result = getattr(pallas_impl, op.removesuffix("_backward"))(**arguments, **given)
        return {of: getattr(result, of) for of in upstream}

    _, backward = jax.vjp(forward, arguments)
    (found,) = backward(upstream)
    return {name: found[argument] for name, argument in GRADIENTS[op].items()}


def adapter(device=None):
    """The kernels: compiled on a GPU, in Pallas' GPU interpreter on a CPU."""
    gpus = [d for d in jax.devices() if d.platform in ("gpu", "cuda")]
    if device in (None, "gpu", "cuda") and gpus:
        return JaxAdapter("mosaic_gpu", gpus[0])
    if device in ("gpu", "cuda"):
        raise ValueError(f"device: expected a GPU that JAX can see, got {jax.devices()}")
    return JaxAdapter("mosaic_gpu_interpret", jax.devices("cpu")[0])


def xla(device=None):
    """The plain jnp path."""
    return JaxAdapter("xla", jax.devices({"cuda": "gpu"}.get(device, device or "cpu"))[0])


def _to_jax(array):
    data = np.array(array.data, order="C")
    # (jnp.asarray compiles a program for every shape)
    return jax.device_put(data.view(jnp.bfloat16) if array.dtype == "bfloat16" else data)


def _typed(array):
    if array is None:
        return None
    if isinstance(array, tuple):
        return tuple(_typed(part) for part in array)
    data = np.asarray(array)
    name = data.dtype.name
    return TypedArray(name, data.view(np.uint16) if name == "bfloat16" else data)
