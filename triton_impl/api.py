"""The public operations of the Torch twin: plain calls go straight to the kernel, traced ones through an operator."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

from torch import Tensor

from oracle.contract import CommitCall, ConvOutput, ConvWindowOutput, FnCall, LinksCall, UpdateCall
from oracle.contract_prologue import (
    GatedConvFnCall,
    GatedConvUpdateCall,
    PrologueFnCall,
    PrologueOutput,
    PrologueUpdateCall,
    PrologueWindowOutput,
)
from triton_impl import plain
from triton_impl.call import check, front_of, parts, run


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None,
    query_start_loc: Tensor,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    empty_rows: str = "skip",
    snapshot_indices: Tensor | None = None,
    snapshot_block_size: SupportsIndex | None = None,
    num_computed_tokens: Tensor | None = None,
    track_indices: Tensor | None = None,
    track_lengths: Tensor | None = None,
    residual: Tensor | None = None,
    channel_offset: SupportsIndex | None = None,
    split_sizes: Sequence[SupportsIndex] | None = None,
) -> ConvOutput:
    """Causal depthwise convolution over packed rows, reading and leaving each row's window in its slot.

    Nothing is read back from the device unless `validate` is set, so the call never synchronises and can
    be captured in a CUDA graph.

    Args:
      x: [tokens, dim] float32, float16 or bfloat16, any strides; fast when `dim` or `tokens` has unit stride.
      weight: [dim, width], any of the three dtypes, any strides; width 1 to 8; `weight[:, width-1]` meets
        the newest token.
      bias: [dim], any of the three dtypes, or None.
      conv_states: [num_slots, state_len, dim], any of the three dtypes, any strides, state_len >= width-1,
        oldest input first; updated in place. None: rows start from zeros and nothing is stored.
      query_start_loc: [batch+1] int32 or int64; row i owns tokens `[i]` to `[i+1]`; may end before `tokens`.
      cache_indices: [batch] integer slots, any stride; None: row i uses slot i.
      has_initial_state: [batch] bool; None: no row has a state.
      activation: None, "silu" or "swish".
      pad_slot_id: slot number of padding rows; slots outside [0, num_slots) are padding as well.
      max_seqlen: host int, an upper bound of the longest row in tokens; bounds the per_sequence grid.
      schedule: "auto", "per_sequence" or "flat"; both give the same bits.
      backend: "auto" (the kernel on a GPU, eager elsewhere), "triton" or "eager".
      validate: read the index data (this synchronises) and raise on bad values before anything is written.
      state_layout: where a slot holds the window: "front", in columns 0 .. width-2; "back", in the last width-1
        columns of a slot that holds the last state_len inputs; "ring", token n in column n mod state_len.
      cache_seqlens: [batch] integer, with "ring" and only there: tokens of each row before this call.
      write_indices: [batch] integer slots that receive the new states; None: the slots that are read. A slot that is
        padding receives nothing.
      empty_rows: "skip": a row of zero tokens touches no slot. "apply": a fresh one clears its state, another one
        is copied to its write slot.
      snapshot_indices: [batch, blocks] integer slots for the windows at multiples of `snapshot_block_size` tokens of
        the whole sequence: entry k takes the window that ends at token (k+1) * snapshot_block_size, if this call
        reaches it. "front" only, as is `track_indices`.
      snapshot_block_size: host int >= 1, tokens; with `snapshot_indices` and only there.
      num_computed_tokens: [batch] integer, tokens of each row's sequence before this call; None: 0.
      track_indices: [batch] integer slots for one more window a row, behind `track_lengths` of its tokens.
      track_lengths: [batch] integer, clamped to [0, the row's tokens]; None: all of them.
      residual: [tokens, dim] float, any strides, added after the activation, before the one rounding; or None.
      channel_offset: host int o: x may be wider, and channels o to o+dim are the input, read in place; None: x has dim.
      split_sizes: tuple of 1 to 8 host ints that add up to dim; `out` is then split, in the same launch.

    Returns:
      ConvOutput(out, conv_states): `out` [tokens, dim] in x's dtype, zero for padding rows and for tokens past
      `query_start_loc[-1]`; `conv_states` is the tensor passed in. With `split_sizes`, `out` is a tuple of contiguous
      tensors [tokens, size], which share one allocation.

    Raises:
      ValueError, TypeError: as `oracle.contract.FnCall`; tensors on different devices;
        with `validate`, bad offsets, slots or max_seqlen.
      Unsupported: the backend asked for cannot run on these tensors; a backward pass; `validate` in a traced call.
    """
    args = (
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation, pad_slot_id, max_seqlen,
        schedule, backend, validate, state_layout, cache_seqlens, write_indices, empty_rows, snapshot_indices,
        snapshot_block_size, num_computed_tokens, track_indices, track_lengths, residual, channel_offset, split_sizes,
    )  # fmt: skip
    out = run(FnCall, args)
    return ConvOutput(out if split_sizes is None else parts(out, x.shape, split_sizes), conv_states)


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    cache_indices: Tensor | None = None,
    *,
    query_start_loc: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    max_seqlen: SupportsIndex | None = None,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    track_indices: Tensor | None = None,
    window_out: Tensor | None = None,
    window_indices: Tensor | None = None,
    commit: bool = True,
    tree_parents: Tensor | None = None,
    residual: Tensor | None = None,
    channel_offset: SupportsIndex | None = None,
    split_sizes: Sequence[SupportsIndex] | None = None,
) -> Any:
    """One decode step: every live row continues from its slot.

    All tokens are committed, or, with `num_accepted_tokens`, the slot rolls: it keeps every new token behind the
    window, and the next step's count tells where the window then begins. The other way to verify drafts keeps the
    window after every token in `window_out`, with `commit=False`; `commit_windows` then moves one into the slot.

    Args:
      x: [batch, dim], [batch, seqlen, dim], or [tokens, dim] with `query_start_loc`; float32, float16 or bfloat16,
        any strides.
      weight, bias, conv_states: as in `causal_conv1d_fn`; `conv_states` is required and updated in place; with
        `num_accepted_tokens`, state_len >= width-1 + n-1 for rows of up to n tokens.
      cache_indices: [batch] integer slots, any stride; None: row i uses slot i.
      query_start_loc: [batch+1] int32 or int64: row i owns tokens `[i]` to `[i+1]`, none or more; or None.
      num_accepted_tokens: [batch] integer, any stride: how many tokens of each row's previous step were accepted,
        at least 1 (0 counts as 1); or None.
      max_seqlen: host int, an upper bound of the longest row; only with `query_start_loc`.
      activation, pad_slot_id, backend, validate: as in `causal_conv1d_fn`.
      state_layout, cache_seqlens, write_indices, residual, channel_offset, split_sizes: as in `causal_conv1d_fn`;
        layouts other than "front" without `num_accepted_tokens` only.
      track_indices: [batch] integer slots, "front" only, that receive the final windows as well.
      window_out: [buffers, steps, width-1, dim], any of the three dtypes, any strides, written in place: entry
        [buffer, t] takes the window after token t of a row. steps is at least the longest row (`max_seqlen`, which is
        then required with `query_start_loc`). Not with `num_accepted_tokens`.
      window_indices: [batch] integer, the buffer of each row; None: row i uses buffer i. Nothing is kept where it
        is `pad_slot_id` or out of range.
      commit: False leaves `conv_states` as it is. Not with `num_accepted_tokens`.
      tree_parents: [batch, seqlen] integer: the tokens are nodes of a tree, which comes with x [batch, seqlen, dim]
        and `commit=False`. The taps meet a node, its parent, its grandparent, ..., then the window from its newest
        entry on. min(parent, i-1) counts; below 0, node i follows the window.

    Returns:
      ConvOutput(out, conv_states): `out` has x's shape and dtype, zero for padding rows; split as in
      `causal_conv1d_fn`. With `window_out`, ConvWindowOutput(out, conv_states, window_out).

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    args = (
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, max_seqlen, activation, pad_slot_id,
        backend, validate, state_layout, cache_seqlens, write_indices, track_indices, window_out, window_indices, commit,
        tree_parents, residual, channel_offset, split_sizes,
    )  # fmt: skip
    out = run(UpdateCall, args)
    if split_sizes is not None:
        out = parts(out, x.shape, split_sizes)
    if window_out is None:
        return ConvOutput(out, conv_states)
    return ConvWindowOutput(out, conv_states, window_out)


def commit_windows(
    conv_states: Tensor,
    window_out: Tensor,
    accepted_steps: Tensor,
    cache_indices: Tensor | None = None,
    window_indices: Tensor | None = None,
    *,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """Moves the window after each row's last accepted token into its slot, in place.

    Args:
      conv_states: [num_slots, state_len, dim], any of the three dtypes, any strides, state_len >= width-1. Columns
        0 .. width-2 of the slots of rows that accepted a token are written.
      window_out: [buffers, steps, width-1, dim], as `causal_conv1d_update` left it; cast once if its dtype differs.
      accepted_steps: [batch] integer, the last accepted token of each row, from 0; a row whose step lies outside
        [0, steps) is left alone.
      cache_indices: [batch] integer slots; None: row i uses slot i. Rows of padding are left alone.
      window_indices: [batch] integer buffers; None: row i uses buffer i. Likewise.
      pad_slot_id, backend, validate: as in `causal_conv1d_fn`.

    Returns:
      conv_states.

    Raises:
      ValueError, TypeError: as `oracle.contract.CommitCall`; tensors on different devices; with
        `validate`, bad steps, slots or buffers.
      Unsupported: the backend asked for cannot run on these tensors; `validate` in a traced call.
    """
    args = (
        conv_states, window_out, accepted_steps, cache_indices, window_indices, pad_slot_id, backend, validate,
    )  # fmt: skip
    run(CommitCall, args)
    return conv_states


def tree_parents_from_links(next_token: Tensor, next_sibling: Tensor) -> Tensor:
    """The parents of draft trees that are given by first children and next siblings; nothing synchronises.

    Args:
      next_token: [batch, n] integer: the first child of each node i; any value outside (i, n), such as -1, is none.
      next_sibling: [batch, n] integer: the next sibling of each node, likewise.

    Returns:
      [batch, n] int32, the `tree_parents` of `causal_conv1d_update`: -1 for node 0 and its siblings, 0 for a node
      that nothing names.

    Raises:
      ValueError, TypeError: as `oracle.contract.LinksCall`; tensors on different devices.
    """
    call = LinksCall(next_token, next_sibling)
    check(call)
    return plain.parents_from_links(call)


def gated_delta_prologue_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None,
    query_start_loc: Tensor,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    *,
    num_k_heads: SupportsIndex,
    num_v_heads: SupportsIndex,
    head_k_dim: SupportsIndex,
    head_v_dim: SupportsIndex,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
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
    cache_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    empty_rows: str = "skip",
    snapshot_indices: Tensor | None = None,
    snapshot_block_size: SupportsIndex | None = None,
    num_computed_tokens: Tensor | None = None,
    track_indices: Tensor | None = None,
    track_lengths: Tensor | None = None,
    channel_offset: SupportsIndex | None = None,
) -> PrologueOutput:
    """The front of a linear-attention layer: `causal_conv1d_fn`, split into q, k and v, L2 norm of their heads, gates.

    One kernel, where x's channels lie side by side in memory; channel-first x takes two. With `norm_rounding` "storage" q, k
    and v have the bits of the plain convolution followed by a norm of its own.

    Args:
      x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state: as in `causal_conv1d_fn`, with
        dim = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim: the heads of q, of k, of v.
      num_k_heads: host int >= 1, heads of q and of k.
      num_v_heads: host int, heads of v, a multiple of `num_k_heads`.
      head_k_dim, head_v_dim: host ints, channels of a head, 1 to 256.
      a: [tokens, num_v_heads] float32, float16 or bfloat16, any strides; or [tokens, num_v_heads, head_k_dim], a gate
        for each channel of k; None: no g.
      b: [tokens, num_v_heads], likewise; None: no beta.
      A_log: [num_v_heads] float; with `a`, and only there.
      dt_bias: [num_v_heads], or [num_v_heads, head_k_dim] if `a` is per channel, float; None: zero.
      qk_l2norm: whether each head of q and k is divided by sqrt(sum of its squares + norm_eps).
      norm_eps: float, at least 2**-126.
      q_scale: float, q is multiplied by it, with and without the norm.
      lower_bound: float below 0: g = lower_bound * sigmoid(exp(A_log) * (a + dt_bias)); None:
        g = -exp(A_log) * softplus(a + dt_bias).
      norm_rounding: "storage": the convolution is rounded to x's dtype before the norm; "none": q and k are rounded once.
      beta_rounding: "none", or "storage": beta = sigmoid(b) is rounded to b's dtype, and still float32.
      activation, and all behind it: as in `causal_conv1d_fn`.

    Returns:
      PrologueOutput(q, k, v, g, beta, conv_states): q, k [tokens, num_k_heads, head_k_dim] and v [tokens, num_v_heads,
      head_v_dim] in x's dtype, contiguous, which share one allocation; g float32 in the shape of `a`, beta float32 [tokens,
      num_v_heads], or None; `conv_states` is the tensor passed in. Zero for padding rows and for tokens past
      `query_start_loc[-1]`.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.PrologueFnCall`; otherwise as `causal_conv1d_fn`.
      Unsupported: as `causal_conv1d_fn`.
    """
    args = (
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, num_k_heads, num_v_heads, head_k_dim, head_v_dim, a, b, A_log,
        dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound, norm_rounding, beta_rounding, activation, pad_slot_id,
        max_seqlen, schedule, backend, validate, state_layout, cache_seqlens, write_indices, empty_rows, snapshot_indices,
        snapshot_block_size, num_computed_tokens, track_indices, track_lengths, channel_offset,
    )  # fmt: skip
    return PrologueOutput(*front_of(PrologueFnCall(*args), run(PrologueFnCall, args)), conv_states)


def gated_delta_prologue_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    cache_indices: Tensor | None = None,
    *,
    num_k_heads: SupportsIndex,
    num_v_heads: SupportsIndex,
    head_k_dim: SupportsIndex,
    head_v_dim: SupportsIndex,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    qk_l2norm: bool = True,
    norm_eps: float = 1e-6,
    q_scale: float = 1.0,
    lower_bound: float | None = None,
    norm_rounding: str = "storage",
    beta_rounding: str = "none",
    activation: str | None = "silu",
    query_start_loc: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    max_seqlen: SupportsIndex | None = None,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    track_indices: Tensor | None = None,
    window_out: Tensor | None = None,
    window_indices: Tensor | None = None,
    commit: bool = True,
    tree_parents: Tensor | None = None,
    channel_offset: SupportsIndex | None = None,
) -> Any:
    """One decode step of the front: `causal_conv1d_update`, then as `gated_delta_prologue_fn`.

    One kernel for one token a row; several tokens, packed rows, trees and all other layouts and slots take two.

    Args:
      x, weight, bias, conv_states, cache_indices: as in `causal_conv1d_update`.
      num_k_heads, num_v_heads, head_k_dim, head_v_dim, a, b, A_log, dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound,
        norm_rounding, beta_rounding: as in `gated_delta_prologue_fn`; the leading axes of a and b are those of x.
      activation, and all behind it: as in `causal_conv1d_update`.

    Returns:
      PrologueOutput as `gated_delta_prologue_fn`, with the leading axes of x; with `window_out`,
      PrologueWindowOutput(q, k, v, g, beta, conv_states, window_out).

    Raises:
      ValueError, TypeError, Unsupported: as `gated_delta_prologue_fn`.
    """
    args = (
        x, weight, bias, conv_states, cache_indices, num_k_heads, num_v_heads, head_k_dim, head_v_dim, a, b, A_log,
        dt_bias, qk_l2norm, norm_eps, q_scale, lower_bound, norm_rounding, beta_rounding, activation, query_start_loc, num_accepted_tokens, max_seqlen,
        pad_slot_id, backend, validate, state_layout, cache_seqlens, write_indices, track_indices, window_out,
        window_indices, commit, tree_parents, channel_offset,
    )  # fmt: skip
    found = front_of(PrologueUpdateCall(*args), run(PrologueUpdateCall, args))
    if window_out is None:
        return PrologueOutput(*found, conv_states)
    return PrologueWindowOutput(*found, conv_states, window_out)


def gated_short_conv_fn(
    bcx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor | None,
    query_start_loc: Tensor,
    cache_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    *,
    channel_offsets: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    empty_rows: str = "skip",
    snapshot_indices: Tensor | None = None,
    snapshot_block_size: SupportsIndex | None = None,
    num_computed_tokens: Tensor | None = None,
    track_indices: Tensor | None = None,
    track_lengths: Tensor | None = None,
) -> ConvOutput:
    """LFM2's gated convolution of packed rows: C * conv(B * x), of three slices of one projection, read in place.

    u = B * x is rounded to the projection's dtype; it is what the convolution reads and the pool keeps. The convolution is
    rounded to that dtype as well before it is multiplied by C.

    Args:
      bcx: [tokens, channels] float32, float16 or bfloat16, any strides.
      weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state: as in `causal_conv1d_fn`, for u.
      channel_offsets: three host ints, the first channels of B, C and x, in a tuple; slices may overlap. None:
        (0, dim, 2 * dim), and channels is 3 * dim.
      activation, and all behind it: as in `causal_conv1d_fn`.

    Returns:
      ConvOutput(out, conv_states): `out` [tokens, dim] in the dtype of `bcx`, zero for padding rows and the tail;
      `conv_states` is the tensor passed in.

    Raises:
      ValueError, TypeError: as `oracle.contract_prologue.GatedConvFnCall`; otherwise as `causal_conv1d_fn`.
      Unsupported: as `causal_conv1d_fn`.
    """
    args = (
        bcx, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, channel_offsets, activation,
        pad_slot_id, max_seqlen, schedule, backend, validate, state_layout, cache_seqlens, write_indices, empty_rows,
        snapshot_indices, snapshot_block_size, num_computed_tokens, track_indices, track_lengths,
    )  # fmt: skip
    return ConvOutput(run(GatedConvFnCall, args), conv_states)


def gated_short_conv_update(
    bcx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_states: Tensor,
    cache_indices: Tensor | None = None,
    *,
    channel_offsets: Sequence[SupportsIndex] | None = None,
    activation: str | None = None,
    query_start_loc: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    max_seqlen: SupportsIndex | None = None,
    pad_slot_id: SupportsIndex = -1,
    backend: str = "auto",
    validate: bool = False,
    state_layout: str = "front",
    cache_seqlens: Tensor | None = None,
    write_indices: Tensor | None = None,
    track_indices: Tensor | None = None,
    window_out: Tensor | None = None,
    window_indices: Tensor | None = None,
    commit: bool = True,
    tree_parents: Tensor | None = None,
) -> Any:
    """One decode step of `gated_short_conv_fn`: every live row continues from its slot.

    Args:
      bcx: [batch, channels], [batch, seqlen, channels], or [tokens, channels] with `query_start_loc`.
      weight, bias, conv_states, cache_indices: as in `causal_conv1d_update`, for u.
      channel_offsets: as in `gated_short_conv_fn`.
      activation, and all behind it: as in `causal_conv1d_update`; `window_out` takes windows of u.

    Returns:
      ConvOutput(out, conv_states), `out` in the shape of x; with `window_out`, ConvWindowOutput.

    Raises:
      ValueError, TypeError, Unsupported: as `gated_short_conv_fn`.
    """
    args = (
        bcx, weight, bias, conv_states, cache_indices, channel_offsets, activation, query_start_loc, num_accepted_tokens,
        max_seqlen, pad_slot_id, backend, validate, state_layout, cache_seqlens, write_indices, track_indices, window_out,
        window_indices, commit, tree_parents,
    )  # fmt: skip
    out = run(GatedConvUpdateCall, args)
    if window_out is None:
        return ConvOutput(out, conv_states)
    return ConvWindowOutput(out, conv_states, window_out)
