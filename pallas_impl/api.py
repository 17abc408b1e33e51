"""The public operations of the JAX twin: check, choose, launch."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from oracle.contract import (
    ConvOutput,
    ConvWindowOutput,
    check_causal_conv1d_fn,
    check_causal_conv1d_update,
    check_fn_values,
    check_update_values,
)
from pallas_impl import prefill, rolling, serving, update, xla
from pallas_impl.backends import CLIPS
from pallas_impl.backends import interpreter as _interpreter
from pallas_impl.backends import on_host as _on_host
from pallas_impl.backends import resolve as _resolve
from pallas_impl.config import choose_lanes, prefill_config, tma_dim, update_config
from pallas_impl.transforms import refuse_transforms
from pallas_impl.xla_serving import Arrays, Options


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
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    empty_rows="skip",
    snapshot_indices=None,
    snapshot_block_size=None,
    num_computed_tokens=None,
    track_indices=None,
    track_lengths=None,
    residual=None,
    channel_offset=None,
    split_sizes=None,
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
      state_layout: where a slot holds its window. "front": in columns 0 to width-2. "back": the slot is the row's
        last state_len inputs, oldest first. "ring": token n of a sequence lives in column n mod state_len.
      cache_seqlens: [batch] integer, tokens of each row before this call; with "ring", and only there. The caller
        advances it.
      write_indices: [batch] integer slots that get the new states; None: those of `cache_indices`. Out of range or
        `pad_slot_id`: not stored. Several rows may read one slot that none writes.
      empty_rows: "skip": a row of zero tokens touches no slot. "apply": a fresh one clears its window ("back", "ring":
        its slot), one with a state copies it to its write slot.
      snapshot_indices: [batch, blocks] integer slots, "front" only: slot `[row, k]` gets the window that ends with
        token (k+1)*snapshot_block_size of the row's sequence, if that is one of this call. Out of range or
        `pad_slot_id`: not stored.
      snapshot_block_size: host int of at least 1, in tokens; required with `snapshot_indices`.
      num_computed_tokens: [batch] integer, tokens of each row's sequence before this call; None: 0.
      track_indices: [batch] integer, "front" only: one more slot of each row that gets its window.
      track_lengths: [batch] integer, after how many tokens of this call; clamped; None: after all.
      residual: [tokens, dim], any of the three dtypes, added in float32 after the activation, before the rounding.
      channel_offset: host int; x may then be wider than dim, and its channels from this one on are the input.
      split_sizes: tuple of 1 to 8 host ints that add up to dim; `out` is then a tuple of arrays of these channels.

    Returns:
      ConvOutput(out, conv_states): `out` [tokens, dim] in x's dtype, zero for padding rows and for tokens past
      `query_start_loc[-1]`; `conv_states` is the new pool, in which live rows of at least one token have
      their last width-1 inputs; None if none was given.

    Raises:
      ValueError, TypeError: as `oracle.contract.check_causal_conv1d_fn`; with `validate`, bad offsets, slots,
        counters or max_seqlen.
      Unsupported: the backend asked for cannot run here; `validate` in a trace; a grid of 2**31 programs.
    """
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state,
        activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule,
        backend=backend, validate=validate, state_layout=state_layout, cache_seqlens=cache_seqlens,
        write_indices=write_indices, empty_rows=empty_rows, snapshot_indices=snapshot_indices,
        snapshot_block_size=snapshot_block_size, num_computed_tokens=num_computed_tokens,
        track_indices=track_indices, track_lengths=track_lengths, residual=residual,
        channel_offset=channel_offset, split_sizes=split_sizes,
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
            has_initial_state=_on_host("has_initial_state", has_initial_state),
            cache_seqlens=_on_host("cache_seqlens", cache_seqlens),
            write_indices=_on_host("write_indices", write_indices),
            empty_rows=empty_rows,
            snapshot_indices=_on_host("snapshot_indices", snapshot_indices),
            snapshot_block_size=1 if snapshot_block_size is None else snapshot_block_size,
            num_computed_tokens=_on_host("num_computed_tokens", num_computed_tokens),
            track_indices=_on_host("track_indices", track_indices),
            track_lengths=_on_host("track_lengths", track_lengths),
        )
    config = None
    if backend != "xla":
        config = prefill_config(
            sizes.tokens, sizes.dim, sizes.batch, None if max_seqlen is None else operator.index(max_seqlen), schedule
        )  # fmt: skip
    plain = (
        state_layout == "front" and write_indices is None and empty_rows == "skip" and snapshot_indices is None
        and track_indices is None and residual is None and channel_offset is None and split_sizes is None
    )  # fmt: skip
    if not plain:
        arrays = Arrays(
            has_initial_state=has_initial_state, cache_seqlens=cache_seqlens, write_indices=write_indices,
            snapshot_indices=snapshot_indices, num_computed_tokens=num_computed_tokens, track_indices=track_indices,
            track_lengths=track_lengths, residual=residual,
        )  # fmt: skip
        options = Options(
            silu=activation is not None, pad_slot_id=operator.index(pad_slot_id), always_state=False,
            state_layout=state_layout, apply_empty=empty_rows == "apply",
            snapshot_block_size=None if snapshot_indices is None else operator.index(snapshot_block_size),
            channel=0 if channel_offset is None else operator.index(channel_offset),
            split_sizes=None if split_sizes is None else tuple(map(operator.index, split_sizes)),
        )  # fmt: skip
        out, pool = serving.prefill(
            x, weight, bias, conv_states, query_start_loc, cache_indices, arrays, options=options, config=config,
            interpret=backend == "mosaic_gpu_interpret",
        )  # fmt: skip
        return ConvOutput(out, pool)
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
    state_layout="front",
    cache_seqlens=None,
    write_indices=None,
    track_indices=None,
    window_out=None,
    window_indices=None,
    commit=True,
    tree_parents=None,
    residual=None,
    channel_offset=None,
    split_sizes=None,
):
    """One decode step: every live row continues from its slot.

    Without `num_accepted_tokens` all its tokens are committed to the slot. With it the slot rolls, for
    speculative decoding: the window begins in column count-1, and `window[1:] ++ x` is left in the slot's
    first columns, so that the next step's count drops what was rejected. The other way of speculation leaves the
    pool as it is (`commit=False`) and the window after every token in `window_out`; `commit_windows` then moves
    the accepted one into the slot.

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
        with `num_accepted_tokens` or `window_out`.
      activation, pad_slot_id, backend, validate: as in `causal_conv1d_fn`.
      state_layout, cache_seqlens, write_indices: as in `causal_conv1d_fn`; layouts other than "front" only without
        `num_accepted_tokens`.
      track_indices: [batch] integer slots, "front" only, that get the final windows too.
      window_out: [buffers, steps, width-1, dim], any of the three dtypes: after token t of a row, `[buffer, t]` gets
        its last width-1 inputs, cast once if the dtype differs; steps is at least the longest row. Not copied where
        the caller donates it.
      window_indices: [batch] integer, each row's buffer; None: row i uses buffer i. Out of range or `pad_slot_id`:
        not stored.
      commit: False leaves the pool as it is, without a copy.
      tree_parents: [batch, seqlen] integer, with x [batch, seqlen, dim] and `commit=False`: each row is a tree. The
        taps of node i meet i, its parent (at most i-1), grandparent and so on; behind a node with a parent
        below 0 comes the row's window.
      residual: any of the three dtypes, in the shape of `out`; as in `causal_conv1d_fn`.
      channel_offset, split_sizes: as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` has x's shape and dtype, zero for padding rows. With `window_out`,
      ConvWindowOutput(out, conv_states, window_out).

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    sizes = check_causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices, query_start_loc=query_start_loc,
        num_accepted_tokens=num_accepted_tokens, max_seqlen=max_seqlen, activation=activation,
        pad_slot_id=pad_slot_id, backend=backend, validate=validate, state_layout=state_layout,
        cache_seqlens=cache_seqlens, write_indices=write_indices, track_indices=track_indices,
        window_out=window_out, window_indices=window_indices, commit=commit, tree_parents=tree_parents,
        residual=residual, channel_offset=channel_offset, split_sizes=split_sizes,
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
            cache_seqlens=_on_host("cache_seqlens", cache_seqlens),
            write_indices=_on_host("write_indices", write_indices),
            track_indices=_on_host("track_indices", track_indices),
            num_buffers=None if window_out is None else window_out.shape[0],
            window_indices=_on_host("window_indices", window_indices),
            commit=commit,
            tree_parents=_on_host("tree_parents", tree_parents),
        )
    plain = (
        state_layout == "front" and write_indices is None and track_indices is None and window_out is None and commit
        and tree_parents is None and residual is None and channel_offset is None and split_sizes is None
    )  # fmt: skip
    if not plain:
        arrays = Arrays(
            num_accepted_tokens=num_accepted_tokens, cache_seqlens=cache_seqlens, write_indices=write_indices,
            track_indices=track_indices, window_out=window_out, window_indices=window_indices,
            tree_parents=tree_parents, residual=residual,
        )  # fmt: skip
        options = Options(
            silu=activation is not None, pad_slot_id=operator.index(pad_slot_id), always_state=True,
            state_layout=state_layout, channel=0 if channel_offset is None else operator.index(channel_offset),
            split_sizes=None if split_sizes is None else tuple(map(operator.index, split_sizes)), commit=commit,
        )  # fmt: skip
        out, pool, windows = serving.update(
            x, weight, bias, conv_states, cache_indices, query_start_loc, arrays, options=options,
            kernel=backend != "xla", interpret=backend == "mosaic_gpu_interpret",
        )  # fmt: skip
        return ConvOutput(out, pool) if window_out is None else ConvWindowOutput(out, pool, windows)
    config = None
    if backend != "xla":
        config = update_config(sizes.batch, sizes.dim)
        if num_accepted_tokens is None and sizes.seqlen != 1:
            longest = sizes.seqlen if max_seqlen is None else operator.index(max_seqlen)
            # Rows of equal length need no flat schedule, and no offsets.
            schedule = "auto" if sizes.seqlen is None else "per_sequence"
            config = prefill_config(sizes.tokens, sizes.dim, sizes.batch, longest, schedule)
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
    options = dict(silu=silu, interpret=_interpreter(interpret))
    seqlen = None if query_start_loc is not None else rows.shape[0] // batch
    starts = query_start_loc
    if starts is None:
        starts = np.arange(batch + 1, dtype=np.int32) * np.int32(seqlen)
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
                seqlen=seqlen, pad_slot_id=pad_slot_id, lanes=choose_lanes(dim), **options,
            )  # fmt: skip
        if seqlen == 1:
            return update.launch(
                x, weight, bias, pool, slots, pad_slot_id=pad_slot_id, config=config, **options
            )
        return prefill.launch(
            x, weight, bias, pool, starts if seqlen is None else None, slots, None, seqlen=seqlen,
            pad_slot_id=pad_slot_id, always_state=True, config=config, **options
        )  # fmt: skip

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
