"""The Torch twin as the oracle's runner sees it: NumPy memory in, device tensors with the same strides, memory out.

TRITON_INTERPRET=1 python -m oracle run --impl triton_impl.adapter:adapter --device cpu --tier core
python -m oracle run --impl triton_impl.adapter:adapter --device cuda
python -m oracle run --impl triton_impl.adapter:eager
"""

import numpy as np
import torch

import triton_impl
from oracle.conformance.adapter import GRADIENTS, SERVING_FEATURES, UPSTREAM
from oracle.numerics import TypedArray
from triton_impl.call import interprets


class TorchAdapter:
    """Runs one backend of `triton_impl` on one device; the pool is updated in place on the device."""

    def __init__(self, backend, device):
        self.name = f"triton_impl-{backend}"
        self.version = f"torch-{torch.__version__}"
        self.backend = backend
        self.device = torch.device(device)
        # torch.empty then fills with NaN, so that an output nobody writes is seen.
        torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public one imports the compiler
        torch.utils.deterministic.fill_uninitialized_memory = True

    def capabilities(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {"device": name, "supports": list(SERVING_FEATURES)}

    def run(self, op, arrays, options):
        bases = {name: None if a is None else self._base(a) for name, a in arrays.items()}
        views = {
            name: None if a is None else bases[name].as_strided(a.shape, a.strides, a.offset)
            for name, a in arrays.items()
        }
        if op == "tree_parents_from_links":
            return {"parents": to_numpy(triton_impl.tree_parents_from_links(**views, **options))}
        if op in GRADIENTS:
            return self._gradients(op, views, options) | {"memory": _memory(arrays, bases)}
        result = getattr(triton_impl, op)(**views, **{"backend": self.backend, **options})
        found = {"conv_states": result} if op == "commit_windows" else result._asdict()
        for name in ("conv_states", "window_out"):
            if name in found and name in views and found[name] is not views[name]:
                raise RuntimeError(f"{name}: expected the very tensor that was passed in")
        return {name: typed(value) for name, value in found.items()} | {"memory": _memory(arrays, bases)}

    def _gradients(self, op, views, options):
        """The differentiable form and its backward pass, through autograd."""
        form, upstream, gradients = op.removesuffix("_backward"), UPSTREAM[op], GRADIENTS[op]
        arguments = {name: view for name, view in views.items() if name not in upstream}
        for name in gradients.values():
            # an integer tensor, which the contract refuses, cannot ask for a gradient
            if arguments[name] is not None and arguments[name].is_floating_point():
                arguments[name].requires_grad_()
        result = getattr(triton_impl, form)(**arguments, **{"backend": self.backend, **options})
        given = {of: views[name] for name, of in upstream.items() if views[name] is not None}
        leaves = {name: arguments[of] for name, of in gradients.items() if arguments[of] is not None}
        found = torch.autograd.grad(
            [getattr(result, of) for of in given], list(leaves.values()), list(given.values())
        )
        found = dict(zip(leaves, found, strict=True))
        return {name: typed(found.get(name)) for name in gradients}

    def _base(self, array):
        """The whole buffer on the device; of a huge, mostly empty one only the view is copied."""
        if not array.sparse:
            return _to_torch(array.dtype, array.base).to(self.device)
        data = _to_torch(array.dtype, np.ascontiguousarray(array.data))
        base = torch.zeros(array.base.shape, dtype=data.dtype, device=self.device)
        base.as_strided(array.shape, array.strides, array.offset).copy_(data)
        return base


def adapter(device=None):
    """The kernels, on a GPU or, with TRITON_INTERPRET=1, in Triton's interpreter."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not interprets():
        raise ValueError("device: expected a GPU, or TRITON_INTERPRET=1 in the environment, got cpu")
    return TorchAdapter("triton", device)


def eager(device=None):
    """The plain torch path."""
    return TorchAdapter("eager", device or "cpu")


def _memory(arrays, bases):
    return {name: to_numpy(bases[name]) for name, a in arrays.items() if a is not None and not a.sparse}


def _to_torch(dtype, storage):
    if dtype == "bfloat16":
        return torch.from_numpy(storage.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(storage.copy())


def to_numpy(tensor):
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def typed(tensor):
    if tensor is None:
        return None
    if isinstance(tensor, tuple):
        return tuple(typed(part) for part in tensor)
    return TypedArray(str(tensor.dtype).removeprefix("torch."), to_numpy(tensor))
