"""The convolutions of sglang-jax, with its parameters, defaults and layouts.

`short_convolution` is that of its layers/attention/linear, `jax_causal_conv1d_prefill` and `jax_causal_conv1d_update`
those of its kernels/gdn. Its pools are [slots, dim, width-1]; the windows of a batch, and nothing else of the pool, are
transposed to and fro.

What differs, on purpose: sums are float32 with one rounding at the end (there they round to x's dtype on the way); tokens
after the last sequence give zeros (there they continue the last sequence); a slot outside the pool is padding.
"""

import enum

import jax
import jax.numpy as jnp

from oracle.contract import ACTIVATIONS, Unsupported
from pallas_impl import plain
from pallas_impl.api import causal_conv1d_fn, causal_conv1d_update
from pallas_impl.tracing import all_of, program

NULL_SLOT = 0  # read like any other slot, never written
UNFUSED = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


def short_convolution(x, weight, cache, cu_seqlens, forward_mode, bias=None, activation="silu"):
    """One convolution of packed sequences or a decode step, with a window for each sequence.

    Args:
      x: [tokens, dim] to extend, [batch, dim] to decode.
      weight: [dim, width] or [dim, 1, width].
      cache: [batch, dim, width-1] windows, oldest first; always read (zeros for a new sequence).
      cu_seqlens: [batch+1] to extend; ignored to decode.
      forward_mode: a `ForwardMode`, or any enum or string with the name "DECODE", "EXTEND" or "MIXED".
      bias: [dim] or None.
      activation: None, "silu", "swish", "gelu", "relu", "sigmoid", "tanh" or a function; all but the first three are
        applied to the rounded result.

    Returns:
      (y, new_cache) with the shapes of x and cache.

    Raises:
      ValueError: an unknown mode or activation; cu_seqlens missing; a shape.
    """
    mode = (forward_mode.name if isinstance(forward_mode, enum.Enum) else str(forward_mode)).upper()
    if mode not in ("DECODE", "EXTEND", "MIXED"):
        raise ValueError(f"forward_mode: expected DECODE, EXTEND or MIXED, got {forward_mode!r}")
    after = None
    if callable(activation) or activation in UNFUSED:
        after, activation = UNFUSED.get(activation, activation), None
    elif activation not in ACTIVATIONS:
        names = [name for name in (*ACTIVATIONS, *UNFUSED) if name]
        raise ValueError(f"activation: expected None, a function or one of {names}, got {activation!r}")
    if len(weight.shape) == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    _check_states("cache", cache, weight)
    windows = jnp.swapaxes(cache, 1, 2)
    if mode == "DECODE":
        y, windows = causal_conv1d_update(x, weight, bias, windows, activation=activation)
    else:
        if cu_seqlens is None:
            raise ValueError(f"cu_seqlens: expected [batch+1] with {mode}, got None")
        every = all_of(cu_seqlens.shape[0] - 1)
        y, windows = causal_conv1d_fn(
            x, weight, bias, windows, cu_seqlens, None, every, activation=activation
        )
    return (after(y) if after else y), jnp.swapaxes(windows, 1, 2)


def jax_causal_conv1d_prefill(
    x,
    weight,
    bias=None,
    cu_seqlens=None,
    conv_state=None,
    state_indices=None,
    has_initial_state=None,
    activation=None,
    track_indices=None,
    track_mask=None,
    dilation=1,
):
    """Packed prefill on a pool of [slots, dim, width-1].

    Args:
      x: [dim, tokens].
      weight: [dim, width].
      bias: [dim] or None.
      cu_seqlens: [batch+1]; required.
      conv_state: the pool, or None.
      state_indices: [batch] slots; given with `conv_state` or not at all. Slot 0 is read, never written.
      has_initial_state: [batch] bool; None: every row has a state. A row without one starts from zeros; if it has no
        tokens either, its slot is zeroed.
      activation: None, "silu" or "swish".
      track_indices, track_mask: [batch] slots and bool or int: where the mask is set, the row's new window is stored
        in that slot too, unless it is slot 0. None: nowhere.
      dilation: 1.

    Returns:
      (y, new_conv_state): [dim, tokens]; the new pool, or without one the windows [batch, dim, width-1].

    Raises:
      ValueError: an argument missing, a shape; Unsupported: a dilation other than 1.
    """
    _check_dilation(dilation)
    if cu_seqlens is None:
        raise ValueError("cu_seqlens: expected [batch+1], got None")
    if (conv_state is None) != (state_indices is None):
        raise ValueError("state_indices: expected them with conv_state and only then")
    batch, dim, width = cu_seqlens.shape[0] - 1, *weight.shape
    if conv_state is None:
        if track_indices is not None:
            raise ValueError("track_indices: expected None without conv_state, got an array")
        windows = _zeros((batch, width - 1, dim), x.dtype)
    else:
        conv_state, windows = _gather(conv_state, state_indices, has_initial_state, weight)
    every = all_of(batch)
    y, windows = causal_conv1d_fn(x.T, weight, bias, windows, cu_seqlens, None, every, activation=activation)
    if conv_state is None:
        return y.T, jnp.swapaxes(windows, 1, 2)
    return y.T, _scatter(conv_state, windows, state_indices, track_indices, track_mask)


def jax_causal_conv1d_update(
    x,
    conv_state,
    state_indices,
    weight,
    bias=None,
    activation=None,
    has_initial_state=None,
    track_indices=None,
    track_mask=None,
    dilation=1,
):
    """One token a row on a pool of [slots, dim, width-1].

    Args:
      x: [batch, dim].
      conv_state, state_indices, weight, bias, activation, has_initial_state, track_indices, track_mask, dilation: as
        in `jax_causal_conv1d_prefill`; the pool is required.

    Returns:
      (y, new_conv_state): [batch, dim] and the new pool.

    Raises:
      ValueError: a shape; Unsupported: a dilation other than 1.
    """
    _check_dilation(dilation)
    conv_state, windows = _gather(conv_state, state_indices, has_initial_state, weight)
    y, windows = causal_conv1d_update(x, weight, bias, windows, activation=activation)
    return y, _scatter(conv_state, windows, state_indices, track_indices, track_mask)


def _check_dilation(dilation):
    if dilation != 1:
        raise Unsupported(f"dilation: expected 1, got {dilation}")


def _check_states(name, states, weight):
    dim, width = weight.shape
    if tuple(states.shape[1:]) != (dim, width - 1):
        raise ValueError(
            f"{name}: expected shape [slots, dim={dim}, width-1={width - 1}], got {list(states.shape)}"
        )


_zeros = program(jnp.zeros, static_argnums=(0, 1))


@program
def _gather(conv_state, state_indices, has_initial_state, weight):
    """The pool, and [batch, width-1, dim], the windows of the rows, zeros for those without a state.

    Behind a barrier, as in sglang-jax, whose caller donates the pool: nothing is written to it before it is read.
    """
    _check_states("conv_state", conv_state, weight)
    (batch,) = state_indices.shape
    slots = plain.live_slots(jnp.asarray(state_indices), batch, conv_state.shape[0], pad_slot_id=-1)
    stateful = slots >= 0 if has_initial_state is None else has_initial_state & (slots >= 0)
    pool = jnp.asarray(conv_state)
    windows = jnp.swapaxes(plain.read_windows(pool, slots, stateful, conv_state.shape[1]), 1, 2)
    return jax.lax.optimization_barrier((pool, windows))


@program
def _scatter(conv_state, windows, state_indices, track_indices, track_mask):
    batch, num_slots = windows.shape[0], conv_state.shape[0]
    windows = jnp.swapaxes(windows, 1, 2)
    slots = plain.live_slots(jnp.asarray(state_indices), batch, num_slots, pad_slot_id=NULL_SLOT)
    conv_state = plain.write_windows(jnp.asarray(conv_state), slots, windows)
    if track_indices is None:
        return conv_state
    if track_mask is None:
        raise ValueError("track_mask: expected [batch] with track_indices, got None")
    slots = plain.live_slots(jnp.asarray(track_indices), batch, num_slots, pad_slot_id=NULL_SLOT)
    return plain.write_windows(conv_state, jnp.where(track_mask != 0, slots, -1), windows)
