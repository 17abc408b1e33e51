"""Launching a kernel again with other tensors of the same shapes, strides and dtypes, at little host time."""


class Launch:
    """A kernel with everything but its tensors fixed.

    The first call goes through Triton's launcher, which examines every argument and compiles if need be. Later
    calls hand the compiled kernel the addresses at once, as long as they are 16-byte aligned as in the first.

    Args:
      kernel: the `triton.jit` function; its tensor parameters come first.
      grid: three ints.
      values: the run-time arguments after the tensors.
      constants: the constexpr arguments by name, in the kernel's order.
      options: num_warps and other compiler options; None means the default.
    """

    def __init__(self, kernel, grid, values, constants, **options):
        self._kernel, self._grid, self._values, self._constants = kernel, grid, values, constants
        self._options = {name: value for name, value in options.items() if value is not None}
        self._rest = (*values, *constants.values())
        self._compiled = None

    def __call__(self, *tensors):
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        aligned = True
        for address in addresses:
            if address is not None and address & 15:
                aligned = False
        if aligned and self._compiled is not None:
            self._compiled(*addresses, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._values, **self._constants, **self._options)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self._compiled = compiled[self._grid]


def stride(tensor, axis):
    """A stride in elements; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.stride(axis)


def known_pad(pad_slot_id, num_slots):
    """`pad_slot_id` if it names a slot, else -1: a slot out of range is padding whatever the sentinel is."""
    return pad_slot_id if 0 <= pad_slot_id < num_slots else -1
