"""The public operations of the JAX twin: check, choose, launch."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from oracle.contract import (
    ConvOutput,
    Unsupported,
    check_backend,
    check_causal_conv1d_fn,
    check_causal_conv1d_update,
    check_fn_values,
    check_update_values,
)
from pallas_impl import prefill, rolling, update, xla
from pallas_impl.config import choose_lanes, prefill_config, tma_dim, update_config
from pallas_impl.transforms import refuse_transforms

CLIPS = hasattr(plgpu, "InterpretGPUParams")  # the interpreter of JAX 0.10 does not clip boxes as TMA does
BACKENDS = ("mosaic_gpu", "mosaic_gpu_interpret", "xla")


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    activation=None,
    pad_slot_id=-1,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
    validate=False,
):
    """Causal depthwise convolution over packed rows, reading each row's window from its slot.

    Works under `jax.jit`; the keyword arguments are static. The pool is not copied where the caller donates
    it to the enclosing `jit`. The compiled program depends on shapes and keyword arguments only, so new
    lengths need no new compilation (a new `max_seqlen` does, unless schedule is "flat").

    Args:
      x: [tokens, dim] float32, float16 or bfloat16; the tokens of all rows, packed.
      weight: [dim, width], any of the three dtypes; width 1 to 8; `weight[:, width-1]` meets the newest token.
      bias: [dim], any of the three dtypes, or None.
      conv_states: [num_slots, state_len, dim], any of the three dtypes, state_len >= width-1, oldest input
        first. None: rows start from zeros and nothing is stored.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; may end before `tokens`.
      cache_indices: [batch] integer slots; None: row i uses slot i.
      has_initial_state: [batch] bool; None: no row has a state.
      activation: None, "silu" or "swish".
      pad_slot_id: slot number of padding rows; slots outside [0, num_slots) are padding as well.
      max_seqlen: host int, an upper bound of the longest row in tokens; lets "auto" pick the per_sequence grid.
      schedule: "auto", "per_sequence" or "flat"; both give the same bits.
      backend: "auto" (the kernel on an NVIDIA GPU from Hopper on, else xla), "mosaic_gpu",
        "mosaic_gpu_interpret" or "xla".
      validate: read the index data on the host and raise on bad values before anything runs; not in a trace.

    Returns:
      ConvOutput(out, conv_states): `out` [tokens, dim] in x's dtype, zero for padding rows and for tokens past
      `query_start_loc[-1]`; `conv_states` is the new pool, in which live rows of at least one token have
      their last width-1 inputs; None if none was given.

    Raises:
      ValueError, TypeError: as `oracle.contract.check_causal_conv1d_fn`; with `validate`, bad offsets, slots
        or max_seqlen.
      Unsupported: the backend asked for cannot run here; `validate` in a trace; a grid of 2**31 programs.
    """
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule,
        backend=backend, validate=validate,
    )  # fmt: skip
    backend = _resolve(backend, x)
    if validate:
        check_fn_values(
            _on_host("query_start_loc", query_start_loc),
            _on_host("cache_indices", cache_indices),
            sizes.tokens,
            None if conv_states is None else sizes.num_slots,
            pad_slot_id,
            max_seqlen,
        )
    config = None
    if backend != "xla":
        config = prefill_config(
            sizes.tokens, sizes.dim, sizes.batch, None if max_seqlen is None else operator.index(max_seqlen), schedule
        )  # fmt: skip
    out, pool = _prefill(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        silu=activation is not None, pad_slot_id=operator.index(pad_slot_id), config=config,
        interpret=backend == "mosaic_gpu_interpret",
    )  # fmt: skip
    return ConvOutput(out, pool)


def causal_conv1d_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    query_start_loc=None,
    num_accepted_tokens=None,
    max_seqlen=None,
    activation=None,
    pad_slot_id=-1,
    backend="auto",
    validate=False,
):
    """One decode step: every live row continues from its slot.

    Without `num_accepted_tokens` all its tokens are committed to the slot. With it the slot rolls, for
    speculative decoding: the window begins in column count-1, and `window[1:] ++ x` is left in the slot's
    first columns, so that the next step's count drops what was rejected.

    Args:
      x: [batch, dim] or [batch, seqlen, dim], or [tokens, dim] with `query_start_loc`; float32, float16 or
        bfloat16.
      weight, bias, conv_states: as in `causal_conv1d_fn`; `conv_states` is required. With
        `num_accepted_tokens` it has state_len >= width-1 + n-1 for rows of up to n tokens.
      cache_indices: [batch] integer slots; None: row i uses slot i.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; None: rows of equal length.
      num_accepted_tokens: [batch] integer, accepted tokens of each row's previous step, at least 1 (1 after a
        prefill or a step without counts); may exceed this step's tokens. Clamped to what a slot can hold.
      max_seqlen: host int, an upper bound of the longest row; only with `query_start_loc`, and required there
        with `num_accepted_tokens`.
      activation, pad_slot_id, backend, validate: as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` has x's shape and dtype, zero for padding rows.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    sizes = check_causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices, query_start_loc=query_start_loc,
        num_accepted_tokens=num_accepted_tokens, max_seqlen=max_seqlen, activation=activation,
        pad_slot_id=pad_slot_id, backend=backend, validate=validate,
    )  # fmt: skip
    backend = _resolve(backend, x)
    if validate:
        check_update_values(
            _on_host("cache_indices", cache_indices),
            sizes,
            pad_slot_id,
            _on_host("query_start_loc", query_start_loc),
            _on_host("num_accepted_tokens", num_accepted_tokens),
            max_seqlen,
        )
    config = None
    if backend != "xla":
        config = update_config(sizes.batch, sizes.dim)
        if num_accepted_tokens is None and sizes.seqlen != 1:
            longest = sizes.seqlen if max_seqlen is None else operator.index(max_seqlen)
            config = prefill_config(sizes.tokens, sizes.dim, sizes.batch, longest, "auto")
    out, pool = _update(
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens,
        silu=activation is not None, pad_slot_id=operator.index(pad_slot_id), config=config,
        interpret=backend == "mosaic_gpu_interpret",
    )  # fmt: skip
    return ConvOutput(out, pool)


@functools.partial(jax.jit, static_argnames=("silu", "pad_slot_id", "config", "interpret"))
def _prefill(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, *,
    silu, pad_slot_id, config, interpret,
):  # fmt: skip
    if config is None or x.size == 0 or query_start_loc.shape[0] == 1:
        return xla.prefill(
            x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
            silu=silu, pad_slot_id=pad_slot_id,
        )  # fmt: skip
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state = refuse_transforms(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state
    )
    starts = query_start_loc
    if starts.dtype != jnp.int32:
        starts = xla.offsets(starts, x.shape[0])
    return _on_tma(
        lambda x, weight, bias, pool, slots, pad_slot_id: prefill.launch(
            x, weight, bias, pool, starts, slots, has_initial_state,
            silu=silu, pad_slot_id=pad_slot_id, config=config, interpret=_interpreter(interpret),
        ),
        x, weight, bias, conv_states, cache_indices, pad_slot_id, starts, weight.shape[1] - 1, interpret,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("silu", "pad_slot_id", "config", "interpret"))
def _update(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, *,
    silu, pad_slot_id, config, interpret,
):  # fmt: skip
    batch, dim = x.shape[0] if query_start_loc is None else query_start_loc.shape[0] - 1, x.shape[-1]
    if config is None or x.size == 0 or batch == 0:
        return xla.update(
            x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens,
            silu=silu, pad_slot_id=pad_slot_id,
        )  # fmt: skip
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens = refuse_transforms(
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens
    )
    rows = x.reshape(-1, dim)
    options = dict(silu=silu, config=config, interpret=_interpreter(interpret))
    seqlen = None if query_start_loc is not None else rows.shape[0] // batch
    starts = query_start_loc
    if starts is None:
        starts = jnp.arange(batch + 1, dtype=jnp.int32) * seqlen
    elif starts.dtype != jnp.int32:
        starts = xla.offsets(starts, x.shape[0])
    columns = weight.shape[1] - 1
    if num_accepted_tokens is not None:
        counts = num_accepted_tokens  # the kernel clamps them
        if counts.dtype != jnp.int32:
            counts = xla.first_columns(counts, conv_states.shape[1] - columns) + 1
        columns = conv_states.shape[1] if columns else 0

    def launch(x, weight, bias, pool, slots, pad_slot_id):
        if num_accepted_tokens is not None:
            return rolling.launch(
                x, weight, bias, pool, starts if seqlen is None else None, slots, counts,
                seqlen=seqlen, pad_slot_id=pad_slot_id, **options,
            )  # fmt: skip
        if seqlen == 1:
            return update.launch(x, weight, bias, pool, slots, pad_slot_id=pad_slot_id, **options)
        return prefill.launch(
            x, weight, bias, pool, starts, slots, None, pad_slot_id=pad_slot_id, always_state=True, **options
        )

    out, pool = _on_tma(
        launch, rows, weight, bias, conv_states, cache_indices, pad_slot_id, starts, columns, interpret
    )
    return out.reshape(x.shape), pool


def _on_tma(launch, x, weight, bias, conv_states, cache_indices, pad_slot_id, starts, columns, interpret):
    """Calls `launch` with arrays that TMA can address, and with int32 slots.

    A dim whose rows are no multiple of 16 bytes is padded, which copies x and out; of the pool only the first
    `columns` columns of this batch's slots are padded, never the pool itself.
    """
    batch, dim = starts.shape[0] - 1, x.shape[1]
    slots = cache_indices
    if slots is not None and slots.dtype != jnp.int32:
        slots = xla.live_slots(slots, batch, conv_states.shape[0], pad_slot_id)
        pad_slot_id = -1
    itemsizes = tuple(a.dtype.itemsize for a in (x, conv_states) if a is not None)
    extra = tma_dim(dim, itemsizes) - dim
    if interpret and not CLIPS:
        extra = -dim % choose_lanes(dim)
    if not extra:
        return launch(x, weight, bias, conv_states, slots, pad_slot_id)

    wide = functools.partial(_pad_last, extra=extra)
    windows = None
    if conv_states is not None:
        slots = xla.live_slots(slots, batch, conv_states.shape[0], pad_slot_id)
        windows = wide(xla.read_windows(conv_states, slots, slots >= 0, columns))
    weight = jnp.pad(weight, ((0, extra), (0, 0)))
    rows = jnp.where(slots >= 0, jnp.arange(batch, dtype=jnp.int32), -1) if windows is not None else None
    out, windows = launch(wide(x), weight, None if bias is None else wide(bias), windows, rows, -1)
    out = out[:, :dim]
    if windows is None or windows.shape[1] == 0:
        return out, conv_states
    target = jnp.where(starts[1:] > starts[:-1], slots, -1)
    return out, xla.write_windows(conv_states, target, windows[:, :, :dim])


def _pad_last(array, extra):
    padded = jnp.pad(xla.to_bits(array), [(0, 0)] * (array.ndim - 1) + [(0, extra)])
    return jax.lax.bitcast_convert_type(padded, array.dtype)


def _interpreter(interpret):
    """False, or the parameters of Pallas' GPU interpreter; JAX 0.10 has them only under a private name."""
    if not interpret:
        return False
    if CLIPS:
        params = plgpu.InterpretGPUParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    # A box that ends past an array's end is clipped by TMA.
    return params(out_of_bounds_reads="uninitialized")


def _on_host(name, array):
    if array is None:
        return None
    if isinstance(array, jax.core.Tracer):
        raise Unsupported(f"validate: expected concrete arrays to read, got a tracer for {name}")
    return np.asarray(array).tolist()


def _resolve(backend, x):
    check_backend(backend, BACKENDS)
    traced = isinstance(x, jax.core.Tracer)
    if backend == "auto":
        return "mosaic_gpu" if _runs_mosaic(_device(x)) else "xla"
    # A trace may be lowered for another machine, so only a call on real arrays is refused.
    if backend == "mosaic_gpu" and not traced and not _runs_mosaic(_device(x)):
        raise Unsupported(
            f"backend: 'mosaic_gpu' needs an NVIDIA GPU of compute capability 9.0 or newer, got {_device(x)}"
        )
    return backend


def _device(x):
    """The device of an array; of a tracer or a NumPy array, the default device."""
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return min(x.devices(), key=lambda d: d.id)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def _runs_mosaic(device):
    if device.platform not in ("gpu", "cuda") or "rocm" in device.client.platform_version.lower():
        return False
    capability = str(getattr(device, "compute_capability", "0.0"))
    return capability[:1].isdigit() and float(capability) >= 9.0
