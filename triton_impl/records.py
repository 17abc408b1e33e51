"""Records that kernels take and hand on: an array with its strides, the rows of a call, a slot, a program's channels.

A record is a NamedTuple. Triton takes it apart when it compiles, so passing one costs no instruction; an absent array is
None, which is known when a kernel is compiled. A launch hands over pointers, then all strides as one record, then sizes,
then one record of constants; a kernel first makes records of an array each.

What Triton asks of them:
- a device function returns no None, nor a record that holds one: optional records are made in place;
- a record that is compared with None holds none: `residual is None`, but `slots.ptr is None`;
- no dtype in a record: it is the pointer's;
- no records in a tuple that grows by `+`: they become plain tuples;
- sizes that change from call to call are parameters of their own, since `do_not_specialize` does not reach into records.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tokens(NamedTuple):
    """[tokens, dim] in device memory; strides in elements, 64-bit."""

    ptr: Any
    t: Any
    d: Any


class Items(NamedTuple):
    """One item a row; `ptr` None: there are none."""

    ptr: Any
    i: Any


class Rows(NamedTuple):
    """What tells rows apart: where they begin, and the slot and the flag of each, `Items`."""

    query_start_loc: Any
    slots: Any
    flags: Any
    batch: Any
    tokens: Any


class Pool(NamedTuple):
    """[num_slots, state_len, dim] in device memory; slot `pad_slot_id` is nobody's."""

    ptr: Any
    num_slots: Any
    pad_slot_id: Any


class Slot(NamedTuple):
    """[state_len, dim] in device memory; the row's window begins in column `first`, before a ring is closed."""

    ptr: Any
    l: Any  # noqa: E741
    d: Any
    first: Any
    state_len: Any


class Windows(NamedTuple):
    """[steps, width-1, dim] in device memory: the window behind every token of a row."""

    ptr: Any
    t: Any
    l: Any  # noqa: E741
    d: Any


class Row(NamedTuple):
    """One row of a prefill: its tokens [start, end), whether it is computed at all, its slot, and whether it has a state.

    `past` is the slot that may be read, None where no row has a state; `marks` says where documents begin, None: nowhere.
    """

    start: Any
    end: Any
    live: Any
    has_state: Any
    slot: Any
    past: Any
    marks: Any


class Channels(NamedTuple):
    """The channels of a program, and which of them exist."""

    index: Any
    exist: Any


class Weights(NamedTuple):
    """Taps and bias of a program's channels as they were loaded from `ptr`, for `unpack_taps`."""

    ptr: Any
    words: Any
    bias: Any


@triton.jit
def tokens_of(ptr, strides):
    """`Tokens` from the strides of token and channel, which may pass 2**31 elements when multiplied: 64-bit from here on."""
    return Tokens(ptr, tl.cast(strides[0], tl.int64), tl.cast(strides[1], tl.int64))


@triton.jit
def slot_of(conv_states, slot, strides, first, state_len):
    """`Slot` number `slot` of a pool, from its strides of slot, column and channel."""
    return Slot(
        conv_states + slot * strides[0],
        tl.cast(strides[1], tl.int64),
        tl.cast(strides[2], tl.int64),
        first,
        state_len,
    )


@triton.jit
def windows_of(window_out, buffer, strides):
    """`Windows` in buffer number `buffer`, from the strides of buffer, token, column and channel."""
    return Windows(
        window_out + buffer * strides[0],
        tl.cast(strides[1], tl.int64),
        tl.cast(strides[2], tl.int64),
        tl.cast(strides[3], tl.int64),
    )


@triton.jit
def behind(array, t):
    """The tokens of an array from token t on."""
    return Tokens(array.ptr + t * array.t, array.t, array.d)


@triton.jit
def holds(condition):
    """A condition on a scalar, for a mask of lanes.

    Triton 3.9's interpreter takes no mask but of booleans, and spreads over lanes what a comparison of integers gave as
    integers. Compiled, it is the condition itself.
    """
    return True & condition


@triton.jit
def at(array, t, channels):
    """Pointers to token t's channels."""
    return array.ptr + t * array.t + channels.index * array.d


_INTERPRETED = triton.knobs.runtime.interpret  # asked once, as `triton.jit` does


class _Constant(tl.constexpr, dict):
    """A constant of a record, which Triton describes to compile hooks as JSON, and knows alone how to write of a bare constant."""

    def __init__(self, value):
        super().__init__(value)
        self.update(constexpr=value)


def constants(record):
    """What a kernel is compiled for, as the value of its one `tl.constexpr` parameter."""
    if _INTERPRETED:
        return record
    return type(record)(*map(_Constant, record))


def strides_record(*names):
    """The type of a record of strides, in elements: a tuple an array, or the one stride.

    It ends with a None: Triton forgets, where a kernel returns early, the constants of tuples behind a record's last
    own constant.
    """
    return namedtuple("Strides", (*names, "end"), defaults=(None,))
