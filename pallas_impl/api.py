"""The public operations of the JAX twin: signatures and what they mean. `call` runs them."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

from jax import Array
from jax.typing import ArrayLike

from oracle.contract import CommitCall, ConvOutput, FnCall, LinksCall, UpdateCall
from oracle.contract_prologue import (
    GatedConvFnCall,
    GatedConvUpdateCall,
    PrologueFnCall,
    PrologueOutput,
    PrologueUpdateCall,
)
from pallas_impl import trees
from pallas_impl.call import run_commit, run_gated, run_prefill, run_prologue, run_update


def causal_conv1d_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike | None,
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    *,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    empty_rows: str = "skip",
    snapshot_indices: ArrayLike | None = None,
    snapshot_block_size: SupportsIndex | None = None,
    num_computed_tokens: ArrayLike | None = None,
    track_indices: ArrayLike | None = None,
    track_lengths: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    channel_offset: SupportsIndex | None = None,
    split_sizes: Sequence[SupportsIndex] | None = None,
) -> ConvOutput:
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
      ValueError, TypeError: as `oracle.contract.FnCall`; with `validate`, bad offsets, slots,
        counters or max_seqlen.
      Unsupported: the backend asked for cannot run here; `validate` in a trace; a grid of 2**31 programs.
    """
    call = FnCall(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation,
        pad_slot_id, max_seqlen, schedule, backend, validate, state_layout, cache_seqlens, write_indices,
        empty_rows, snapshot_indices, snapshot_block_size, num_computed_tokens, track_indices,
        track_lengths, residual, channel_offset, split_sizes,
    )  # fmt: skip
    return run_prefill(call)


def causal_conv1d_update(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    cache_indices: ArrayLike | None = None,
    *,
    query_start_loc: ArrayLike | None = None,
    num_accepted_tokens: ArrayLike | None = None,
    max_seqlen: SupportsIndex | None = None,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    track_indices: ArrayLike | None = None,
    window_out: ArrayLike | None = None,
    window_indices: ArrayLike | None = None,
    commit: bool = True,
    tree_parents: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    channel_offset: SupportsIndex | None = None,
    split_sizes: Sequence[SupportsIndex] | None = None,
) -> Any:
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
    call = UpdateCall(
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, max_seqlen,
        activation, pad_slot_id, backend, validate, state_layout, cache_seqlens, write_indices,
        track_indices, window_out, window_indices, commit, tree_parents, residual, channel_offset,
        split_sizes,
    )  # fmt: skip
    return run_update(call)


def gated_delta_prologue_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike | None,
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    *,
    num_k_heads: SupportsIndex,
    num_v_heads: SupportsIndex,
    head_k_dim: SupportsIndex,
    head_v_dim: SupportsIndex,
    a: ArrayLike | None = None,
    b: ArrayLike | None = None,
    A_log: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    qk_l2norm: bool = True,
    norm_eps: float = 1e-6,
    q_scale: float = 1.0,
    lower_bound: float | None = None,
    norm_rounding: str = "storage",
    beta_rounding: str = "none",
    activation: str | None = "silu",
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    empty_rows: str = "skip",
    snapshot_indices: ArrayLike | None = None,
    snapshot_block_size: SupportsIndex | None = None,
    num_computed_tokens: ArrayLike | None = None,
    track_indices: ArrayLike | None = None,
    track_lengths: ArrayLike | None = None,
    channel_offset: SupportsIndex | None = None,
) -> PrologueOutput:
    """The front of a gated delta rule layer over packed rows: `causal_conv1d_fn`, split, norm of heads, gates.

    One kernel where head_k_dim is a power of two from 8 to 256 and the channels of q and of v are multiples of 128 (of
    256 for head_k_dim 256); else the plain operation and what XLA makes of the rest.

    Args:
      x, conv_states, query_start_loc, cache_indices, has_initial_state: as in `causal_conv1d_fn`.
      weight, bias: [dim, width], [dim]; dim = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim, in the order q,
        k, v.
      num_k_heads: host int of at least 1, heads of q and of k.
      num_v_heads: host int, heads of v, a multiple of `num_k_heads`.
      head_k_dim, head_v_dim: host ints, channels of a head, 1 to 256.
      a: [tokens, num_v_heads], any of the three dtypes; or a gate a channel of k, [tokens, num_v_heads, head_k_dim]; or
        None: no g.
      b: [tokens, num_v_heads], any of the three dtypes; or None: no beta.
      A_log: [num_v_heads], any of the three dtypes; with `a`, and only there.
      dt_bias: any of the three dtypes, [num_v_heads] or, as `a`, [num_v_heads, head_k_dim]; None: zero.
      qk_l2norm: each head of q and k is divided by sqrt(sum of its squares + norm_eps).
      norm_eps: host number of at least 2**-126.
      q_scale: host number that q is multiplied by, with and without the norm.
      lower_bound: host number below 0: g = lower_bound * sigmoid(exp(A_log) * (a + dt_bias)); None: g =
        -exp(A_log) * softplus(a + dt_bias).
      norm_rounding: "storage": the convolution's results are rounded to x's dtype before the norm, as a norm of its own
        finds them; "none": they are not.
      beta_rounding: "none"; or "storage": beta = sigmoid(b) is rounded to b's dtype, and still float32.
      activation, to channel_offset: as in `causal_conv1d_fn`.

    Returns:
      PrologueOutput(q, k, v, g, beta, conv_states): q and k [tokens, num_k_heads, head_k_dim] and v
      [tokens, num_v_heads, head_v_dim] in x's dtype; g in the shape of `a` and beta in that of `b`, float32, None without
      them; all zero for padding rows and for tokens past `query_start_loc[-1]`; `conv_states` as in `causal_conv1d_fn`.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.PrologueFnCall`; Unsupported: as `causal_conv1d_fn`; an array
        that is split over a mesh (heads are split in `jax.shard_map`, where each device has its own q, k and v).
    """
    call = PrologueFnCall(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, num_k_heads,
        num_v_heads, head_k_dim, head_v_dim, a, b, A_log, dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound,
        norm_rounding, beta_rounding, activation, pad_slot_id, max_seqlen, schedule, backend, validate,
        state_layout, cache_seqlens, write_indices, empty_rows, snapshot_indices, snapshot_block_size,
        num_computed_tokens, track_indices, track_lengths, channel_offset,
    )  # fmt: skip
    return run_prologue(call)


def gated_delta_prologue_update(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    cache_indices: ArrayLike | None = None,
    *,
    num_k_heads: SupportsIndex,
    num_v_heads: SupportsIndex,
    head_k_dim: SupportsIndex,
    head_v_dim: SupportsIndex,
    a: ArrayLike | None = None,
    b: ArrayLike | None = None,
    A_log: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    qk_l2norm: bool = True,
    norm_eps: float = 1e-6,
    q_scale: float = 1.0,
    lower_bound: float | None = None,
    norm_rounding: str = "storage",
    beta_rounding: str = "none",
    activation: str | None = "silu",
    query_start_loc: ArrayLike | None = None,
    num_accepted_tokens: ArrayLike | None = None,
    max_seqlen: SupportsIndex | None = None,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    track_indices: ArrayLike | None = None,
    window_out: ArrayLike | None = None,
    window_indices: ArrayLike | None = None,
    commit: bool = True,
    tree_parents: ArrayLike | None = None,
    channel_offset: SupportsIndex | None = None,
) -> Any:
    """The same for a decode step: `causal_conv1d_update`, split, norm of heads, gates.

    One kernel for one token a row, and for rows of more than four, with the heads of `gated_delta_prologue_fn`.

    Args:
      x, weight, bias, conv_states, cache_indices: as in `causal_conv1d_update`, the weight as in
        `gated_delta_prologue_fn`.
      num_k_heads, to beta_rounding: as in `gated_delta_prologue_fn`, the leading axes of a and b those of x.
      activation, to channel_offset: as in `causal_conv1d_update`.

    Returns:
      PrologueOutput(q, k, v, g, beta, conv_states) as of `gated_delta_prologue_fn`, with the leading axes of x. With
      `window_out`, PrologueWindowOutput(q, k, v, g, beta, conv_states, window_out).

    Raises:
      ValueError, TypeError, Unsupported: as `gated_delta_prologue_fn`.
    """
    call = PrologueUpdateCall(
        x, weight, bias, conv_states, cache_indices, num_k_heads, num_v_heads, head_k_dim, head_v_dim, a, b,
        A_log, dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound, norm_rounding, beta_rounding, activation,
        query_start_loc, num_accepted_tokens, max_seqlen, pad_slot_id, backend, validate, state_layout,
        cache_seqlens, write_indices, track_indices, window_out, window_indices, commit, tree_parents,
        channel_offset,
    )  # fmt: skip
    return run_prologue(call)


def gated_short_conv_fn(
    bcx: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike | None,
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    *,
    channel_offsets: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    empty_rows: str = "skip",
    snapshot_indices: ArrayLike | None = None,
    snapshot_block_size: SupportsIndex | None = None,
    num_computed_tokens: ArrayLike | None = None,
    track_indices: ArrayLike | None = None,
    track_lengths: ArrayLike | None = None,
) -> ConvOutput:
    """LFM2's gated convolution of packed rows: C * conv(B * x), of three slices of one projection.

    u = B * x is rounded to the projection's dtype; it is what the convolution reads and the pool keeps. The convolution's
    results are rounded to it as well before they are multiplied by C.

    Args:
      bcx: [tokens, channels] float32, float16 or bfloat16.
      weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state: as in `causal_conv1d_fn`, for u.
      channel_offsets: three host ints, the first channels of B, C and x, in a tuple; slices may overlap. None:
        (0, dim, 2 * dim), and channels is 3 * dim.
      activation, to track_lengths: as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` [tokens, dim] in the dtype of `bcx`, zero for padding rows and for tokens past
      `query_start_loc[-1]`; `conv_states` as in `causal_conv1d_fn`.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.GatedConvFnCall`; Unsupported: as `causal_conv1d_fn`; an array
        that is split over a mesh outside `jax.shard_map`.
    """
    call = GatedConvFnCall(
        bcx, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, channel_offsets,
        activation, pad_slot_id, max_seqlen, schedule, backend, validate, state_layout, cache_seqlens,
        write_indices, empty_rows, snapshot_indices, snapshot_block_size, num_computed_tokens, track_indices,
        track_lengths,
    )  # fmt: skip
    return run_gated(call)


def gated_short_conv_update(
    bcx: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    cache_indices: ArrayLike | None = None,
    *,
    channel_offsets: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    query_start_loc: ArrayLike | None = None,
    num_accepted_tokens: ArrayLike | None = None,
    max_seqlen: SupportsIndex | None = None,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    track_indices: ArrayLike | None = None,
    window_out: ArrayLike | None = None,
    window_indices: ArrayLike | None = None,
    commit: bool = True,
    tree_parents: ArrayLike | None = None,
) -> Any:
    """One decode step of `gated_short_conv_fn`: every live row continues from its slot.

    Args:
      bcx: [batch, channels], [batch, seqlen, channels], or [tokens, channels] with `query_start_loc`.
      weight, bias, conv_states, cache_indices: as in `causal_conv1d_update`, for u.
      channel_offsets: as in `gated_short_conv_fn`.
      activation, to tree_parents: as in `causal_conv1d_update`; `window_out` takes windows of u.

    Returns:
      ConvOutput(out, conv_states), `out` with dim channels for those of `bcx`; with `window_out`, ConvWindowOutput.

    Raises:
      ValueError, TypeError, Unsupported: as `gated_short_conv_fn`.
    """
    call = GatedConvUpdateCall(
        bcx, weight, bias, conv_states, cache_indices, channel_offsets, activation, query_start_loc,
        num_accepted_tokens, max_seqlen, pad_slot_id, backend, validate, state_layout, cache_seqlens,
        write_indices, track_indices, window_out, window_indices, commit, tree_parents,
    )  # fmt: skip
    return run_gated(call)


def commit_windows(
    conv_states: ArrayLike,
    window_out: ArrayLike,
    accepted_steps: ArrayLike,
    cache_indices: ArrayLike | None = None,
    window_indices: ArrayLike | None = None,
    *,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
) -> Array:
    """Moves the window after each row's last accepted token from `window_out` to the row's slot.

    Args:
      conv_states: [num_slots, state_len, dim] float32, float16 or bfloat16, state_len >= width-1; not copied where
        the caller donates it to the enclosing `jit`.
      window_out: [buffers, steps, width-1, dim] float, as `causal_conv1d_update` returned it.
      accepted_steps: [batch] integer, the last accepted token of each row, from 0; outside [0, steps): the row is
        left alone.
      cache_indices: [batch] integer slots; None: row i uses slot i.
      window_indices: [batch] integer buffers; None: row i uses buffer i.
      pad_slot_id: slot (and buffer) number of padding rows; those out of range are padding as well.
      backend, validate: as in `causal_conv1d_fn`.

    Returns:
      The new pool: columns 0 to width-2 of the slots are exact copies, cast once if the dtypes differ.

    Raises:
      ValueError, TypeError: as `oracle.contract.CommitCall`; with `validate`, bad steps, slots or buffers.
      Unsupported: as `causal_conv1d_fn`.
    """
    call = CommitCall(
        conv_states, window_out, accepted_steps, cache_indices, window_indices, pad_slot_id, backend,
        validate,
    )  # fmt: skip
    return run_commit(call)


def tree_parents_from_links(next_token: ArrayLike, next_sibling: ArrayLike) -> Array:
    """The parents of a draft tree's nodes from its links, for `tree_parents` of `causal_conv1d_update`.

    Plain `jax.numpy` on every backend, in log2(n) steps.

    Args:
      next_token: [batch, n] integer: the first child of each node, larger than the node; any value outside
        (node, n) means none.
      next_sibling: [batch, n] integer: its next sibling, by the same rules.

    Returns:
      int32 [batch, n]. Node 0 is the root, with parent -1. A node that nobody names has parent 0.

    Raises:
      ValueError, TypeError: as `oracle.contract.LinksCall`.
    """
    sizes = LinksCall(next_token, next_sibling).check()
    return trees.parents_from_links(next_token, next_sibling, tuple(sizes))
