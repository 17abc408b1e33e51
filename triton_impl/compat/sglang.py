"""SGLang 0.5.23's four entry points: the dispatcher's pair and the Triton pair, told apart by `_triton`.

    from triton_impl.compat.sglang import causal_conv1d_fn, causal_conv1d_update                  # the dispatcher's
    from triton_impl.compat.sglang import causal_conv1d_fn_triton, causal_conv1d_update_triton    # the Triton pair

SGLang has two orders of arguments under one name: its dispatcher (and TensorRT-LLM) passes `query_start_loc`
fourth, its Triton module `conv_states` fourth and `seq_lens_cpu` sixth. Host lengths only choose the grid: nothing
synchronises with or without them, and lengths that are too small skip no token.

Padding rows (slot == pad_slot_id, or outside the pool) and tokens past `query_start_loc[-1]` come back as zeros;
SGLang leaves them uninitialised or keeps x. A `pad_slot_id` is compared with slots only, so 0 does not skip row 0.
"""

from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.api import causal_conv1d_update as packed_update
from triton_impl.api import tree_parents_from_links
from triton_impl.compat.layout import (
    activation_name,
    expect,
    expect_integers,
    expect_rolling_states,
    expect_states,
    expect_weight,
    longest,
    refuse_unknown,
    token_axes,
    update_at_back,
)
from triton_impl.dense import dense_rows

__all__ = [
    "PAD_SLOT_ID",
    "causal_conv1d_fn",
    "causal_conv1d_fn_triton",
    "causal_conv1d_update",
    "causal_conv1d_update_triton",
]

PAD_SLOT_ID = -1


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    query_start_loc=None,
    cache_indices=None,
    has_initial_state=None,
    conv_states=None,
    activation="silu",
    pad_slot_id=PAD_SLOT_ID,
    **kwargs,
):
    """Prefill in the dispatcher's order of arguments.

    Args:
      x: [dim, tokens] with `query_start_loc`, or [batch, dim, seqlen] without; any strides.
      weight: [dim, width].
      bias: [dim] or None.
      query_start_loc: [batch+1] int32 or int64, or None for a dense x.
      cache_indices: [batch] integer slots, or None: row i uses slot i.
      has_initial_state: [batch] bool, or None: no row has a state.
      conv_states: [num_slots, dim, state_len], any strides, window in front, updated in place; or None.
      activation: None, "silu", "swish", True or False.
      pad_slot_id: slot number of padding rows.
      seq_lens_cpu: (keyword) host lengths of the rows, a list or a CPU tensor.
      block_table, validate_data: (keyword) as in `causal_conv1d_fn_triton`.

    Returns:
      x itself, overwritten, where tokens have unit stride (SGLang's CUDA kernel works in place, this costs a
      copy); otherwise, as with every token-major projection, a fresh tensor laid out as x.

    Raises:
      ValueError, TypeError: bad shapes, dtypes or values; an unknown keyword.
      Unsupported: a backward pass.
    """
    seq_lens_cpu = kwargs.pop("seq_lens_cpu", None)
    block_table = kwargs.pop("block_table", None)
    validate = kwargs.pop("validate_data", False)
    refuse_unknown("causal_conv1d_fn", kwargs)
    if query_start_loc is None:
        if seq_lens_cpu is not None or block_table is not None:
            raise ValueError(
                "query_start_loc: expected shape [batch+1] beside seq_lens_cpu or block_table, got None"
            )
        dim = expect("x", x, ("batch", "dim", "seqlen"))[1]
        width = expect_weight(weight, dim)
        if conv_states is not None:
            expect_states("conv_states", conv_states, dim, width)
        out = dense_rows(
            x.transpose(1, 2), weight, bias, _token_major(conv_states), cache_indices, has_initial_state,
            activation=activation_name(activation), pad_slot_id=pad_slot_id, validate=validate,
        ).transpose(1, 2)  # fmt: skip
    else:
        out = causal_conv1d_fn_triton(
            x, weight, bias, conv_states, query_start_loc, seq_lens_cpu, cache_indices, has_initial_state,
            activation, pad_slot_id, validate, block_table,
        )  # fmt: skip
    return x.copy_(out) if x.stride(-1) == 1 else out


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
    pad_slot_id=PAD_SLOT_ID,
):
    """Decode step of the dispatcher (SGLang's CUDA kernel): in place on x, window at the back of wide slots.

    Args:
      x: [batch, dim] or [batch, dim, seqlen]; overwritten with the result.
      conv_state: [num_slots, dim, state_len]; the window is the last width-1 columns and the slot shifts as a
        whole. (SGLang's prefill leaves the window in front: with wider slots its two halves do not fit together, and
        neither do these.)
      weight, bias: [dim, width]; [dim] or None.
      activation: None, "silu", "swish", True or False.
      cache_seqlens: [batch] integer, tokens of each row before this step, or None. With it a slot is a circular
        buffer: column n mod state_len holds token n.
      conv_state_indices: [batch] integer slots, or None: row i uses slot i.
      pad_slot_id: slot number of padding rows; their output is zero (SGLang keeps x).

    Returns:
      x.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    dim = token_axes(x)
    expect_states("conv_state", conv_state, dim, expect_weight(weight, dim))
    expect_integers("conv_state_indices", conv_state_indices, x.shape[0])
    update_at_back(
        x if x.dim() == 2 else x.transpose(1, 2), weight, bias, conv_state, conv_state_indices, cache_seqlens,
        activation=activation_name(activation), pad_slot_id=pad_slot_id, in_place=True,
    )  # fmt: skip
    return x


def causal_conv1d_fn_triton(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    seq_lens_cpu,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    pad_slot_id=PAD_SLOT_ID,
    validate_data=False,
    block_table=None,
    **kwargs,
):
    """Prefill in the Triton module's order of arguments.

    Args:
      x: [dim, tokens], any strides; not written.
      weight, bias: [dim, width]; [dim] or None.
      conv_states: [num_slots, dim, state_len], any strides, window in front, updated in place; or None.
      query_start_loc: [batch+1] int32 or int64.
      seq_lens_cpu: host lengths of the rows, a list or a CPU tensor, or None.
      cache_indices: [batch] integer slots, or None: row i uses slot i.
      has_initial_state: [batch] bool, or None: no row has a state.
      activation: None, "silu", "swish", True or False.
      pad_slot_id: slot number of padding rows.
      validate_data: read the index data, which synchronises, and raise ValueError on bad values.
      block_table: [blocks, 2] or None. It spares SGLang the host lengths; here it selects the flat schedule, which
        finds the blocks on the device, and its entries are not read.

    Returns:
      A fresh [dim, tokens] tensor laid out as x.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    refuse_unknown("causal_conv1d_fn", kwargs)
    dim = expect("x", x, ("dim", "tokens"))[0]
    width = expect_weight(weight, dim)
    if conv_states is not None:
        expect_states("conv_states", conv_states, dim, width)
    if block_table is not None:
        expect("block_table", block_table, ("blocks", "2"), **{"2": 2})
    return packed_fn(
        x.t(), weight, bias, _token_major(conv_states), query_start_loc, cache_indices, has_initial_state,
        activation=activation_name(activation), pad_slot_id=pad_slot_id,
        max_seqlen=longest("seq_lens_cpu", seq_lens_cpu),
        schedule="auto" if block_table is None else "flat", validate=bool(validate_data),
    ).out.t()  # fmt: skip


def causal_conv1d_update_triton(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    cache_seqlens=None,
    conv_state_indices=None,
    num_accept_tokens=None,
    intermediate_conv_window=None,
    intermediate_state_indices=None,
    retrieve_next_token=None,
    retrieve_next_sibling=None,
    retrieve_parent_token=None,
    pad_slot_id=PAD_SLOT_ID,
    metadata=None,
    validate_data=False,
):
    """Decode step of the Triton module: window in front of wide slots, columns behind it never touched.

    Args:
      x: [batch, dim] or [batch, dim, seqlen], any strides; not written. All tokens are committed, unless they roll
        or are a tree.
      conv_state: [num_slots, dim, state_len], any strides, updated in place.
      weight, bias: [dim, width]; [dim] or None.
      activation: None, "silu", "swish", True or False.
      cache_seqlens: [batch] integer, tokens of each row before this step, or None. With it a slot is a circular
        buffer: column n mod state_len holds token n. (SGLang ignores it, which gives wrong values.)
      conv_state_indices: [batch] integer slots, or None: row i uses slot i.
      num_accept_tokens: [batch] integer, how many tokens of each row's previous step were accepted, or None. With it
        the window begins in column count-1 of a slot that keeps all new tokens behind it; state_len >= width-1 +
        seqlen-1.
      intermediate_conv_window: [buffers, steps, dim, width-1], any strides, or None; takes the window after every
        token, in place. Not with `num_accept_tokens`.
      intermediate_state_indices: [batch] integer buffers, or None: row i uses buffer i.
      retrieve_next_token, retrieve_next_sibling: [batch, seqlen] integer, both or none: first child and next sibling
        of every node of a draft tree, -1 for none. `conv_state` is then left as it is, for the caller to move an
        accepted window into it (SGLang leaves the window of the last nodes by number there, which is no sequence's).
      retrieve_parent_token: [batch, seqlen] integer, or None; takes the parent of every node, 0 for the root.
      pad_slot_id: slot number of padding rows.
      metadata: unused, as in SGLang.
      validate_data: read the index data, which synchronises, and raise ValueError on bad values.

    Returns:
      A fresh tensor with x's shape and dtype.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn`.
    """
    dim = token_axes(x)
    batch, seqlen = x.shape[0], 1 if x.dim() == 2 else x.shape[2]
    width = expect_weight(weight, dim)
    expect_states("conv_state", conv_state, dim, width)
    expect_integers("conv_state_indices", conv_state_indices, batch)
    more = {}
    if cache_seqlens is not None:
        more |= dict(state_layout="ring", cache_seqlens=cache_seqlens)
    if num_accept_tokens is not None:
        if intermediate_conv_window is not None:
            raise ValueError("num_accept_tokens: expected None, since intermediate_conv_window is given")
        expect_integers("num_accept_tokens", num_accept_tokens, batch)
        expect_rolling_states("conv_state", conv_state, width, seqlen)
        more |= dict(num_accepted_tokens=num_accept_tokens)
    if intermediate_conv_window is not None:
        sizes = dict(dim=dim, columns=width - 1)
        steps = expect(
            "intermediate_conv_window",
            intermediate_conv_window,
            ("buffers", "steps", "dim", "columns"),
            **sizes,
        )[1]
        if steps < seqlen:
            raise ValueError(f"intermediate_conv_window: expected steps >= {seqlen} on axis 1, got {steps}")
        expect_integers("intermediate_state_indices", intermediate_state_indices, batch)
        more |= dict(
            window_out=intermediate_conv_window.transpose(2, 3), window_indices=intermediate_state_indices
        )
    elif intermediate_state_indices is not None:
        raise ValueError("intermediate_state_indices: expected None, since intermediate_conv_window is None")
    if retrieve_next_token is not None or retrieve_next_sibling is not None:
        links = {"retrieve_next_token": retrieve_next_token, "retrieve_next_sibling": retrieve_next_sibling}
        if retrieve_next_token is None or retrieve_next_sibling is None:
            raise ValueError("retrieve_next_token, retrieve_next_sibling: expected both or none, got one")
        for name, link in links.items():
            expect(name, link, ("batch", "seqlen"), batch=batch, seqlen=seqlen)
        parents = tree_parents_from_links(retrieve_next_token, retrieve_next_sibling)
        if retrieve_parent_token is not None:
            retrieve_parent_token.copy_(parents.clamp(min=0))
        more |= dict(tree_parents=parents, commit=False)
    elif retrieve_parent_token is not None:
        raise ValueError("retrieve_parent_token: expected None, since retrieve_next_token is None")
    out = packed_update(
        x if x.dim() == 2 else x.transpose(1, 2), weight, bias, _token_major(conv_state), conv_state_indices,
        activation=activation_name(activation), pad_slot_id=pad_slot_id, validate=bool(validate_data), **more,
    ).out  # fmt: skip
    return out if x.dim() == 2 else out.transpose(1, 2)


def _token_major(states):
    return None if states is None else states.transpose(1, 2)
