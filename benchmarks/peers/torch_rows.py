"""NumPy arguments to torch tensors and back, for peers written in torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from oracle.conformance.arrays import Array
from oracle.numerics import TypedArray

if TYPE_CHECKING:
    import torch


def to_torch(array: TypedArray | None) -> torch.Tensor | None:
    """A contiguous tensor with the array's dtype, or None."""
    import torch

    if array is None:
        return None
    data = np.ascontiguousarray(array.data)
    if array.dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(data.copy())


def to_typed(tensor: torch.Tensor) -> TypedArray:
    """The tensor's values with their dtype name."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        return TypedArray(name, tensor.view(torch.int16).numpy().view(np.uint16))
    return TypedArray(name, tensor.numpy())


def base_of(array: Array, device: str) -> torch.Tensor:
    """The argument's whole buffer on the device; of a huge, mostly empty one only the view is copied."""
    import torch

    if not array.sparse:
        return to_torch(TypedArray(array.dtype, array.base)).to(device)
    data = to_torch(array.typed).to(device)
    base = torch.zeros(array.base.shape, dtype=data.dtype, device=device)
    base.as_strided(array.shape, array.strides, array.offset).copy_(data)
    return base
