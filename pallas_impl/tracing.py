"""What JAX's transformations need to know: errors for vmap and derivatives of kernels, a name for export."""

import jax
from jax import export

from oracle.contract import ConvOutput, ConvWindowOutput, Unsupported

# So that an exported program returns these where it is loaded; that process imports pallas_impl as well.
export.register_namedtuple_serialization(ConvOutput, serialized_name="twinconv.ConvOutput")
export.register_namedtuple_serialization(ConvWindowOutput, serialized_name="twinconv.ConvWindowOutput")


def refuse_transforms(*arrays):
    """The arrays (or None) as they are; under `jax.vmap` or a derivative the trace stops with `Unsupported`."""
    return _no_derivative(arrays)


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
