"""What the adapters share: checks in the peer's own axes, and the peers' layouts as views of ours."""

import contextlib
from collections.abc import Iterator

import torch

from oracle.contract import (
    INDEX_DTYPES,
    MASK_DTYPES,
    OFFSET_DTYPES,
    WIDTH_MAX,
    WIDTH_MIN,
    dtype_name,
    host_int,
)
from triton_impl.api import causal_conv1d_fn, causal_conv1d_update
from triton_impl.call import update_in_place
from triton_impl.tracing import refuse_odd

_checks = {"data": False}


@contextlib.contextmanager
def validated() -> Iterator[None]:
    """Within it the serving adapters read their index data, which synchronises, and raise ValueError on bad values.

    The peers have no such check: their `validate_data` looks at shapes and strides and never waits for the GPU.
    It holds for the whole process.
    """
    before = _checks["data"]
    _checks["data"] = True
    try:
        yield
    finally:
        _checks["data"] = before


def validates():
    return _checks["data"]


def expect(name, value, axes, **sizes):
    """Returns the shape of tensor `value`; raises in terms of the peer's `axes` unless it has them."""
    refuse_odd((name,), (value,))
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    shape = value.shape
    fits = len(shape) == len(axes)
    if fits:
        for axis, size in sizes.items():
            if shape[axes.index(axis)] != size:
                fits = False
    if not fits:
        text = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise ValueError(f"{name}: expected shape [{text}], got {list(shape)}")
    return shape


def token_axes(x):
    """Checks x [batch, dim] or [batch, dim, seqlen]; returns dim."""
    if isinstance(x, torch.Tensor) and not x.is_nested and x.dim() in (2, 3):
        return x.shape[1]
    return expect("x", x, ("batch", "dim", "seqlen, or none"))[1]


def expect_weight(weight, dim):
    """Checks weight [dim, width]; returns width."""
    width = expect("weight", weight, ("dim", "width"), dim=dim)[1]
    if not WIDTH_MIN <= width <= WIDTH_MAX:
        raise ValueError(f"weight: expected width {WIDTH_MIN} to {WIDTH_MAX} on axis 1, got {width}")
    return width


def expect_states(name, states, dim, width):
    """Checks a pool [num_slots, dim, state_len]."""
    if states is None:
        raise ValueError(f"{name}: expected shape [num_slots, dim={dim}, state_len], got None")
    state_len = expect(name, states, ("num_slots", "dim", "state_len"), dim=dim)[2]
    if state_len < width - 1:
        raise ValueError(f"{name}: expected state_len >= width-1 = {width - 1} on axis 2, got {state_len}")


def leading(name, values, batch, dtypes=INDEX_DTYPES, axis="batch"):
    """The first `batch` of slots, counts or flags [batch or more], or None: all that the peers' kernels look at.

    Buffers of captured graphs and of padded ranks are longer than a batch.
    """
    if values is None:
        return None
    if expect(name, values, (axis,))[0] < batch:
        raise ValueError(f"{name}: expected shape [{axis}={batch}] or longer, got {list(values.shape)}")
    if dtype_name(values.dtype) not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {dtype_name(values.dtype)}")
    return values if values.shape[0] == batch else values[:batch]


def leading_rows(query_start_loc, slots, slots_name, *more):
    """Cuts packed rows to those that both the offsets and the slots have.

    `more` are pairs of a name and values, with as many rows at least.

    Returns:
      (query_start_loc, slots, *values).
    """
    rows = expect("query_start_loc", query_start_loc, ("batch+1",))[0] - 1
    if rows < 0:  # which the operation refuses
        return query_start_loc, slots, *[values for _, values in more]
    if slots is not None:
        rows = min(rows, expect(slots_name, slots, ("batch",))[0])
    flags = {"has_initial_state": MASK_DTYPES}
    return (
        leading("query_start_loc", query_start_loc, rows + 1, OFFSET_DTYPES, "batch+1"),
        leading(slots_name, slots, rows),
        *[leading(name, values, rows, flags.get(name, INDEX_DTYPES)) for name, values in more],
    )


def expect_rolling_states(name, states, width, longest):
    """Checks that slots [num_slots, dim, state_len] hold a window and the drafts of a row of `longest` tokens."""
    if width > 1 and states.shape[2] < width - 2 + longest:
        raise ValueError(
            f"{name}: expected state_len >= width-1 + {longest}-1 = {width - 2 + longest} on axis 2 for rows of up to "
            f"{longest} tokens, got {states.shape[2]}"
        )


def refuse_unknown(function, kwargs):
    for name in kwargs:
        raise TypeError(f"{name}: {function} takes no such argument (expected none that would go unused)")


def activation_name(activation):
    """The Triton peers take True for "silu" and False for None."""
    if isinstance(activation, bool):
        return "silu" if activation else None
    return activation


def longest(name, lengths):
    """The largest of some host lengths, or None; refuses what would have to be read from a device."""
    if lengths is None:
        return None
    if isinstance(lengths, torch.Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(f"{name}: expected lengths on the host, got a tensor on {lengths.device}")
        lengths = lengths.tolist()
    try:
        lengths = [host_int(name, length) for length in lengths]
    except TypeError:
        raise TypeError(f"{name}: expected a list of integers or a CPU tensor, got {lengths!r}") from None
    if any(length < 0 for length in lengths):
        raise ValueError(f"{name}: expected lengths >= 0, got {lengths}")
    return max(lengths) if lengths else 0


def token_major(x):
    """[rows, dim, tokens] to [rows, tokens, dim] and back, a view; None and [rows, dim] as they are."""
    return x if x is None or x.dim() == 2 else x.transpose(1, 2)


def folds_into_channels(x):
    """Whether x [batch, dim, seqlen] is a view [batch*dim, seqlen] but not a view [batch*seqlen, dim]."""
    batch, dim, seqlen = x.shape
    packs = batch == 1 or seqlen == 1 or x.stride(0) == seqlen * x.stride(2)
    return not packs and x.stride(0) == dim * x.stride(1)


def folded_channels(x, weight, bias, states=None, has_state=False, *, activation):
    """Convolves a channel-first batch x [batch, dim, seqlen] as ONE row of batch*dim channels, a view of x.

    The taps are repeated for each row (batch*dim*width values). `states` is [batch, dim, width-1], contiguous.
    """
    batch, dim, seqlen = x.shape
    starts = torch.arange(2, dtype=torch.int32, device=x.device) * seqlen
    out = causal_conv1d_fn(
        x.view(batch * dim, seqlen).t(),
        weight.repeat(batch, 1),
        None if bias is None else bias.repeat(batch),
        None if states is None else states.view(batch * dim, weight.shape[1] - 1).t()[None],
        starts,
        None,
        torch.ones(1, dtype=torch.bool, device=x.device) if has_state else None,
        activation=activation,
        max_seqlen=seqlen,
    ).out
    return out.t().view(batch, dim, seqlen)


def update_at_back(
    x, weight, bias, states, slots, cache_seqlens=None, *, activation, pad_slot_id=-1, in_place=False
):
    """A decode step on slots whose window is their LAST width-1 columns and which shift as a whole, or on rings.

    Args:
      x: [batch, dim] or [batch, seqlen, dim].
      states: [num_slots, dim, state_len], state_len >= width-1.
      slots: [batch or more] integer, or None.
      cache_seqlens: [batch or more] integer, tokens before this step: column n mod state_len holds token n; None: no
        rings.
      in_place: whether the result replaces x, and x is returned.
    """
    layout = dict(activation=activation, pad_slot_id=pad_slot_id, validate=validates())
    slots = leading("conv_state_indices", slots, x.shape[0])
    if cache_seqlens is not None:
        layout |= dict(state_layout="ring", cache_seqlens=leading("cache_seqlens", cache_seqlens, x.shape[0]))
    elif states.shape[2] > weight.shape[1] - 1:  # else front and back are the same
        layout |= dict(state_layout="back")
    states = states.transpose(1, 2)
    if in_place:
        return update_in_place(x, weight, bias, states, slots, **layout)
    return causal_conv1d_update(x, weight, bias, states, slots, **layout).out
