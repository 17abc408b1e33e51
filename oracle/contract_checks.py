"""What the checks of the contract's records are made of: one argument, or a few that belong together.

Standard library only; nothing here reads data. Sizes may be a tracer's symbols: of those only `==` is asked, since
`torch.SymInt` makes a guard of any other comparison, which would specialise the graph, and a dimension of `jax.export`
may have no answer. An operator checks again when it has the numbers.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
OFFSET_DTYPES = ("int32", "int64")
INDEX_DTYPES = ("int32", "int64", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
MASK_DTYPES = ("bool",)
ACTIVATIONS = (None, "silu", "swish")
SCHEDULES = ("auto", "per_sequence", "flat")
STATE_LAYOUTS = ("front", "back", "ring")
EMPTY_ROWS = ("skip", "apply")
WIDTH_MIN, WIDTH_MAX = 1, 8
SPLITS_MAX = 8


def dtype_name(dtype: Any) -> str:
    """Returns "bfloat16", "int32", ... for a NumPy, Torch or JAX dtype."""
    # Apart, since PyTorch 2.11 compiles no look into a dict with keys of NumPy's.
    names = _NUMPY_NAMES if hasattr(dtype, "kind") else _DTYPE_NAMES
    try:
        return names[dtype]
    except KeyError:
        name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
        names[dtype] = name
        return name
    except TypeError:  # not hashable, so no dtype object
        return str(dtype)


_DTYPE_NAMES: dict[Any, str] = {}
_NUMPY_NAMES: dict[Any, str] = {}


def shape_of(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return tuple(value.shape)
    except (AttributeError, TypeError):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}") from None


def check_shape(
    name: str, value: Any, axes: tuple[str, ...], sizes: tuple[int | None, ...] = (), hint: str = ""
) -> tuple[Any, ...]:
    shape = shape_of(name, value)
    fits = len(shape) == len(axes) and all(
        want is None or got == want for got, want in zip(shape, sizes, strict=False)
    )
    if not fits or ("dim" in axes and below(shape[axes.index("dim")], 1)):
        known = dict(zip(axes, sizes, strict=False))
        text = ", ".join(a if known.get(a) is None else f"{a}={known[a]}" for a in axes)
        limit = " with dim >= 1" if fits else ""
        raise ValueError(f"{name}: expected shape [{text}]{limit}, got {list(shape)}{hint}")
    return shape


def check_dtype(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}")
    got = dtype_name(value.dtype)
    if got not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(allowed)}, got {got}")


def check_array(
    name: str, value: Any, axes: tuple[str, ...], allowed: tuple[str, ...], sizes: tuple[int | None, ...] = ()
) -> tuple[Any, ...]:
    """Checks shape and dtype; returns the shape."""
    shape = check_shape(name, value, axes, sizes)
    check_dtype(name, value, allowed)
    return shape


def check_rows(name: str, value: Any, batch: int, allowed: tuple[str, ...] = INDEX_DTYPES) -> None:
    """Checks an array of one integer (or flag) a row, if it is given."""
    if value is not None:
        check_array(name, value, ("batch",), allowed, (batch,))


def check_weight(x: Any, weight: Any, bias: Any, dim: int) -> int:
    """Returns the width. Where another axis of x has the weight's dim, x is blamed."""
    shape = shape_of("weight", weight)
    if len(shape) == 2 and shape[0] != dim and shape[0] in x.shape[:-1]:
        raise ValueError(
            f"x: expected dim={shape[0]}, as the weight has, on the last axis, got {list(x.shape)} (transposed?)"
        )
    _, width = weight_shape(weight, dim)
    check_dtype("weight", weight, FLOAT_DTYPES)
    if below(width, WIDTH_MIN) or below(WIDTH_MAX, width):
        raise ValueError(f"weight: expected width {WIDTH_MIN} to {WIDTH_MAX} on axis 1, got {width}")
    if bias is not None:
        check_array("bias", bias, ("dim",), FLOAT_DTYPES, (dim,))
    return width


def weight_shape(weight: Any, dim: int | None = None) -> tuple[Any, ...]:
    shape = shape_of("weight", weight)
    conv1d = len(shape) == 3 and shape[1] == 1
    hint = " (that of a Conv1d: give weight.squeeze(1))" if conv1d else ""
    return check_shape("weight", weight, ("dim", "width"), (dim, None), hint)


def check_pool(conv_states: Any, dim: int, width: int) -> tuple[int, int]:
    axes = ("num_slots", "state_len", "dim")
    num_slots, state_len, _ = check_array("conv_states", conv_states, axes, FLOAT_DTYPES, (None, None, dim))
    if below(state_len, width - 1):
        raise ValueError(
            f"conv_states: expected state_len >= width-1 = {width - 1} on axis 1, got {state_len}"
        )
    return num_slots, state_len


def check_offsets(query_start_loc: Any) -> int:
    """Returns the number of rows."""
    (offsets,) = check_array("query_start_loc", query_start_loc, ("batch+1",), OFFSET_DTYPES)
    if below(offsets, 1):
        raise ValueError("query_start_loc: expected shape [batch+1] with at least one entry, got [0]")
    return offsets - 1


def check_slots(cache_indices: Any, batch: int, num_slots: int, pooled: bool) -> None:
    if cache_indices is not None:
        check_rows("cache_indices", cache_indices, batch)
    elif pooled and below(num_slots, batch):
        raise ValueError(
            f"conv_states: expected num_slots >= batch = {batch}, since cache_indices is None, got {num_slots}"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {shown(value)}")


def check_flag(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_activation(activation: Any) -> None:
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {shown(activation)}")


def check_options(activation: Any, pad_slot_id: Any, validate: Any) -> None:
    check_activation(activation)
    if is_symbol(host_int("pad_slot_id", pad_slot_id)):
        raise TypeError(f"pad_slot_id: expected an integer known on the host, got {shown(pad_slot_id)}")
    check_flag("validate", validate)


def check_max_seqlen(max_seqlen: Any) -> None:
    if max_seqlen is not None and below(host_int("max_seqlen", max_seqlen), 0):
        raise ValueError(f"max_seqlen: expected None or an integer >= 0, got {max_seqlen}")


def check_schedule(max_seqlen: Any, schedule: Any) -> None:
    check_max_seqlen(max_seqlen)
    check_choice("schedule", schedule, SCHEDULES)


def check_layout(state_layout: Any, cache_seqlens: Any, batch: int) -> None:
    check_choice("state_layout", state_layout, STATE_LAYOUTS)
    if state_layout != "ring":
        if cache_seqlens is not None:
            raise ValueError(f"cache_seqlens: expected None, since state_layout is {state_layout!r}")
        return
    if cache_seqlens is None:
        raise ValueError("cache_seqlens: expected shape [batch], since state_layout is 'ring', got None")
    check_rows("cache_seqlens", cache_seqlens, batch)


def check_track(track_indices: Any, state_layout: str, batch: int) -> None:
    if track_indices is not None and state_layout != "front":
        raise ValueError(f"track_indices: expected None, since state_layout is {state_layout!r}")
    check_rows("track_indices", track_indices, batch)


def check_channels(channels: int, weight: Any, channel_offset: Any) -> int:
    """Returns how many channels of x are the input: those of the weight."""
    dim, _ = weight_shape(weight)
    offset = host_int("channel_offset", channel_offset)
    if below(offset, 0) or below(channels - dim, offset):
        raise ValueError(
            f"channel_offset: expected None, or an integer >= 0 with channel_offset + dim <= {channels}, the channels "
            f"of x, for dim={dim}, got {offset}"
        )
    return dim


def check_split(split_sizes: Any, dim: int) -> None:
    if split_sizes is None:
        return
    if not isinstance(split_sizes, (tuple, list)):
        raise TypeError(f"split_sizes: expected a tuple of integers, got {type(split_sizes).__name__}")
    sizes = [host_int("split_sizes", size) for size in split_sizes]
    small = any(below(size, 1) for size in sizes)
    if not 1 <= len(sizes) <= SPLITS_MAX or small or sum(sizes) != dim:
        raise ValueError(
            f"split_sizes: expected 1 to {SPLITS_MAX} integers >= 1 that add up to dim={dim}, got {split_sizes}"
        )


def check_buffers(window_indices: Any, batch: int, num_buffers: int) -> None:
    if window_indices is not None:
        check_rows("window_indices", window_indices, batch)
    elif below(num_buffers, batch):
        raise ValueError(
            f"window_out: expected buffers >= batch = {batch}, since window_indices is None, got {num_buffers}"
        )


def check_window_out(
    window_out: Any, window_indices: Any, batch: int, width: int, dim: int, longest: int
) -> None:
    axes = ("buffers", "steps", "width-1", "dim")
    sizes = (None, None, width - 1, dim)
    num_buffers, steps, _, _ = check_array("window_out", window_out, axes, FLOAT_DTYPES, sizes)
    if below(steps, longest):
        raise ValueError(
            f"window_out: expected steps >= {longest} on axis 1, the tokens of the longest row, got {steps}"
        )
    check_buffers(window_indices, batch, num_buffers)


def check_tree(
    tree_parents: Any, shape: tuple[Any, ...], query_start_loc: Any, num_accepted_tokens: Any, commit: bool
) -> None:
    for name, value in (("query_start_loc", query_start_loc), ("num_accepted_tokens", num_accepted_tokens)):
        if value is not None:
            raise ValueError(f"{name}: expected None, since tree_parents is given")
    if len(shape) != 3:
        raise ValueError(
            f"x: expected shape [batch, seqlen, dim], since tree_parents is given, got {list(shape)}"
        )
    if commit:
        raise ValueError(
            "commit: expected False, since tree_parents is given and a tree has no last node, got True"
        )
    check_array("tree_parents", tree_parents, ("batch", "seqlen"), INDEX_DTYPES, shape[:-1])


def host_int(name: str, value: Any) -> Any:
    """The plain int that a value stands for, or the symbol that it is."""
    if type(value) is int or is_symbol(value):
        return value
    # NumPy's integers have a shape and yet are no arrays.
    array = hasattr(value, "shape") and not isinstance(value, numbers.Integral)
    try:
        if isinstance(value, bool) or array:
            raise TypeError
        return int(operator.index(value))
    except Exception:
        raise TypeError(f"{name}: expected an integer known on the host, got {shown(value)}") from None


def host_float(name: str, value: Any) -> float:
    """The plain float that a number on the host stands for; infinite if no float is as large."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number known on the host, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value == abs(value) else -math.inf


def is_symbol(value: Any) -> bool:
    """Whether this is a tracer's symbol for a size: asking `torch.SymInt` for its number would fix it."""
    dimension = hasattr(value, "dimension_as_value") and not hasattr(
        value, "shape"
    )  # JAX's tracers have both
    return dimension or type(value).__name__ == "SymInt"


def below(a: Any, b: Any) -> bool:
    """Whether a < b, where that is known."""
    if type(a) is type(b) is int:
        return a < b
    if type(a).__name__ == "SymInt" or type(b).__name__ == "SymInt":
        return False  # the comparison would become a guard; the operator checks again when it has the numbers
    try:
        return bool(a < b)
    except Exception:  # inconclusive for a dimension of `jax.export`
        return False


def shown(value: Any) -> str:
    """What an error says that it got. An array is not printed: that would read it."""
    if not hasattr(value, "shape") or isinstance(value, numbers.Number):
        return repr(value)
    kind = type(value)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    return name + (" (make the argument static)" if "Tracer" in name else "")
