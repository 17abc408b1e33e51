"""Launching a kernel again with other tensors of the same shapes, strides and dtypes, at little host time."""

import copy
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl.arithmetic import native_ptx
from triton_impl.config import MAX_GRID_YZ

_HOOKS = triton.knobs.runtime
_ENTER, _EXIT = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook


class Launch:
    """A kernel with everything but its tensors fixed.

    The first call goes through Triton's launcher, which examines every argument and compiles if need be. Later
    calls hand the compiled kernel the addresses at once, as long as they are 16-byte aligned as in the first.

    Args:
      kernel: the `triton.jit` function; its tensor parameters come first.
      grid: three ints.
      values: the arguments after the tensors, constants included.
      overlap: as `overlaps` says; None: it is launched when the kernel before it has ended.
      options: num_warps and other compiler options; None means the default.
    """

    def __init__(self, kernel, grid, values, overlap=None, **options):
        self._kernel, self._grid, self._values = kernel, grid, values
        given = {name: value for name, value in options.items() if value is not None}
        # said at each launch, since Triton 3.9 warns of the default and 3.10 changes it
        self._options = {"enable_fp_fusion": True} | given | ({"launch_pdl": True} if overlap else {})
        self._again = self._entry = self._read = None

    def __call__(self, *tensors):
        """Launches; a tensor parameter that was None in the first call stays None."""
        addresses = None if self._again is None else self._read(*tensors)
        if addresses is None:
            self._compile(tensors)
            return
        hooked = _HOOKS.launch_enter_hook is not _ENTER or _HOOKS.launch_exit_hook is not _EXIT
        if self._entry is None or hooked or _ENTER.calls or _EXIT.calls:
            self._again(*addresses, *self._values)
            return
        launch, before, current_stream, device, after, packed = self._entry
        if packed:
            launch(*before, current_stream(device), *after, (*addresses, *self._values))
        else:
            launch(*before, current_stream(device), *after, *addresses, *self._values)

    def _compile(self, tensors):
        compiled = self._kernel[self._grid](*tensors, *self._values, **self._options)
        read = aligned_addresses(tuple(tensor is not None for tensor in tensors))
        addresses = read(*tensors)
        if compiled is not None and addresses is not None:  # the interpreter compiles nothing
            self._again, self._read = compiled[self._grid], read
            self._entry = launcher_entry(compiled, self._grid, (*addresses, *self._values))


@functools.cache
def aligned_addresses(there):
    """A function of tensors: the tuple of their addresses, or None if one is not a multiple of 16 bytes.

    It is written for these tensors, as `namedtuple` writes its methods: a loop over a dozen takes twice the time.

    Args:
      there: whether each is a tensor; if not, its address is 0.
    """
    names = [f"t{i}" for i in range(len(there))]
    read = [f"(a_{name} := {name}.data_ptr())" for name, given in zip(names, there, strict=True) if given]
    addresses = [f"a_{name}" if given else "0" for name, given in zip(names, there, strict=True)]
    return eval(
        f"lambda {', '.join(names)}: None if ({' | '.join(read)}) & 15 else ({', '.join(addresses)},)"
    )


class Entry(NamedTuple):
    """The function that a launcher ends in, and its arguments around the stream and the kernel's own.

    It is called as `launch(*before, current_stream(device), *after, *arguments)`, with `packed` as
    `launch(*before, current_stream(device), *after, arguments)`.
    """

    launch: Any
    before: tuple
    current_stream: Any
    device: int
    after: tuple
    packed: bool


def launcher_entry(compiled, grid, arguments):
    """The Entry of a compiled kernel, or None where its launcher does anything else than to call one function.

    Triton's launchers are Python around a C function, whose arguments differ by version and device. So a copy of the
    launcher is called as Triton calls it, with a recorder in that function's place; nothing is launched. What it
    handed over is taken for later calls only if each part of it is known: the grid, the stream, what belongs to the
    kernel and to its launcher, and at the end the kernel's arguments, one by one or in one tuple. Scratch memory,
    say, which is made anew for every launch, is none of these.

    Args:
      compiled: what a first call of a `triton.jit` function returned.
      grid: three ints.
      arguments: all arguments of the kernel, with addresses for its tensors.
    """
    recorded, stream = [], object()
    try:
        launcher = compiled.run
        launch, probe = launcher.launch, copy.copy(launcher)
        probe.launch = lambda *args: recorded.append(args)
        probe(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
        (args,) = recorded
        known = (*grid, None, compiled.function, compiled.packed_metadata, *vars(launcher).values())
        driver = triton.runtime.driver.active
        current_stream, device = driver.get_current_stream, driver.get_current_device()
    except Exception:  # no launcher that this knows: calls then go through it
        return None
    packed = type(args[-1]) is tuple and _same(args[-1], arguments)
    if not packed and not _same(args[-len(arguments) :], arguments):
        return None
    around = args[: -1 if packed else -len(arguments)]
    places = [i for i, argument in enumerate(around) if argument is stream]
    if len(places) != 1:
        return None
    before, after = around[: places[0]], around[places[0] + 1 :]
    if not all(any(argument is k for k in known) for argument in (*before, *after)):
        return None
    return Entry(launch, before, current_stream, device, after, packed)


def _same(some, others):
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def overlaps(device, hurry=True):
    """How a kernel on a device meets its neighbours, for `wait_for_inputs`: None, or "wait" or with `hurry` "hurry".

    With either it is launched while the kernel before it ends: programmatic dependent launch (PDL).
    """
    if not native_ptx() or torch.cuda.get_device_capability(device) < (9, 0):
        return None
    return "hurry" if hurry else "wait"


@triton.jit
def wait_for_inputs(o: tl.constexpr):
    """Stands in front of a kernel's first access to memory, on every path.

    Launched by PDL (`o.overlap`) a program may begin before the kernels ahead have ended and their writes are seen; behind
    this they have, and are. "hurry" lets the next kernel begin in turn, once all programs have come here.
    """
    if o.overlap is not None:
        tl.extra.cuda.gdc_wait()
        if o.overlap == "hurry":
            tl.extra.cuda.gdc_launch_dependents()


def warp_size():
    """Threads of a warp of this PyTorch's devices."""
    return 64 if torch.version.hip else 32


def program_grid(channel_blocks, places, blocks=1):
    """Returns (the grid, whether it is folded) of programs that `rows.channel_block_and_place` tells apart.

    Args:
      channel_blocks: they come first within the grid: programs side by side read side by side.
      places: rows, groups of rows or blocks of tokens; on axis 1, or folded into axis 0 where that is too short.
      blocks: programs on axis 2, at most MAX_GRID_YZ.
    """
    folded = places > MAX_GRID_YZ
    return ((channel_blocks * places, 1, blocks) if folded else (channel_blocks, places, blocks)), folded


def strides_of(call, names):
    """Strides in elements of a call's arrays; of an array of one axis the one stride, of an absent one None."""
    arrays = (getattr(call, name) for name in names)
    return [a if a is None else a.stride() if a.dim() > 1 else a.stride(0) for a in arrays]


def like_result(call):
    """A tensor without memory, laid out as the result of a call will be: flat where it is split."""
    out = torch.empty_like(call.x, device="meta")
    return out if call.split_sizes is None else out.new_empty(out.numel())


def known_pad(pad_slot_id, num_slots):
    """`pad_slot_id` if it names a slot, else -1: a slot out of range is padding whatever the sentinel is."""
    return pad_slot_id if 0 <= pad_slot_id < num_slots else -1
