"""Which backend runs a call, and with which parameters of the interpreter."""

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from oracle.contract import Unsupported, check_backend

CLIPS = hasattr(plgpu, "InterpretGPUParams")  # the interpreter of JAX 0.10 does not clip boxes as TMA does
BACKENDS = ("mosaic_gpu", "mosaic_gpu_interpret", "xla")


def resolve(backend, x):
    """The name of the backend that runs; raises where the one asked for cannot run on x's device."""
    check_backend(backend, BACKENDS)
    traced = isinstance(x, jax.core.Tracer)
    if backend == "auto":
        return "mosaic_gpu" if _runs_mosaic(_device(x)) else "xla"
    # A trace may be lowered for another machine, so only a call on real arrays is refused.
    if backend == "mosaic_gpu" and not traced and not _runs_mosaic(_device(x)):
        raise Unsupported(
            f"backend: 'mosaic_gpu' needs an NVIDIA GPU of compute capability 9.0 or newer, got {_device(x)}"
        )
    return backend


def interpreter(interpret):
    """False, or the parameters of Pallas' GPU interpreter; JAX 0.10 has them only under a private name."""
    if not interpret:
        return False
    if CLIPS:
        params = plgpu.InterpretGPUParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    # A box that ends past an array's end is clipped by TMA.
    return params(out_of_bounds_reads="uninitialized")


def on_host(name, array):
    """The values of an array as a list, for `validate`; None stays None."""
    if array is None:
        return None
    if isinstance(array, jax.core.Tracer):
        raise Unsupported(f"validate: expected concrete arrays to read, got a tracer for {name}")
    return np.asarray(array).tolist()


def _device(x):
    """The device of an array; of a tracer or a NumPy array, the default device."""
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return min(x.devices(), key=lambda d: d.id)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def _runs_mosaic(device):
    if device.platform not in ("gpu", "cuda") or "rocm" in device.client.platform_version.lower():
        return False
    capability = str(getattr(device, "compute_capability", "0.0"))
    return capability[:1].isdigit() and float(capability) >= 9.0
