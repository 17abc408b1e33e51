"""Launching a kernel again with other tensors of the same shapes, strides and dtypes, at little host time."""

import triton

from triton_impl.config import MAX_GRID_YZ

try:
    from triton.backends.nvidia.driver import CudaLauncher
except ImportError:  # a build of Triton without NVIDIA's backend
    CudaLauncher = None

_KNOWS_ENTRY = triton.__version__.startswith(
    "3.6."
)  # the C entry of its launcher; other versions' is not relied on
_HOOKS = triton.knobs.runtime
_ENTER, _EXIT = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook


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

    Attributes:
      result: a function that makes the tensor for the result, or None; the caller's to set.
    """

    def __init__(self, kernel, grid, values, constants, **options):
        self._kernel, self._grid, self._values, self._constants = kernel, grid, values, constants
        self._options = {name: value for name, value in options.items() if value is not None}
        self._rest = (*values, *constants.values())
        self._again = self._entry = self.result = None

    def __call__(self, *tensors):
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        every = 0
        for address in addresses:
            every |= address
        aligned = every & 15 == 0
        if aligned and self._again is not None:
            hooked = _HOOKS.launch_enter_hook is not _ENTER or _HOOKS.launch_exit_hook is not _EXIT
            if self._entry is None or hooked or _ENTER.calls or _EXIT.calls:
                self._again(*addresses, *self._rest)
            else:
                entry, device, current_stream, middle = self._entry
                entry(*self._grid, current_stream(device), *middle, *addresses, *self._rest)
            return
        compiled = self._kernel[self._grid](*tensors, *self._values, **self._constants, **self._options)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self._again, self._entry = compiled[self._grid], _entry(compiled)


def _entry(compiled):
    """What `compiled[grid]` comes down to without hooks, or None: the C function, device, its stream, what comes next."""
    run = compiled.run
    if not (_KNOWS_ENTRY and CudaLauncher is not None and type(run) is CudaLauncher):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    driver = triton.runtime.driver.active
    middle = (
        compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, compiled.packed_metadata,
        None, None, None,
    )  # fmt: skip
    return run.launch, driver.get_current_device(), driver.get_current_stream, middle


def program_grid(channel_blocks, places, blocks=1):
    """Returns (the grid, FOLDED) of programs that `taps.channel_block_and_place` tells apart.

    Args:
      channel_blocks: they come first within the grid: programs side by side read side by side.
      places: rows, groups of rows or blocks of tokens; on axis 1, or folded into axis 0 where that is too short.
      blocks: programs on axis 2, at most MAX_GRID_YZ.
    """
    folded = places > MAX_GRID_YZ
    return ((channel_blocks * places, 1, blocks) if folded else (channel_blocks, places, blocks)), folded


def stride(tensor, axis):
    """A stride in elements; 0 for an absent tensor."""
    return 0 if tensor is None else tensor.stride(axis)


def known_pad(pad_slot_id, num_slots):
    """`pad_slot_id` if it names a slot, else -1: a slot out of range is padding whatever the sentinel is."""
    return pad_slot_id if 0 <= pad_slot_id < num_slots else -1
