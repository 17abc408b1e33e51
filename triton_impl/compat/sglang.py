"""SGLang 0.5.23's functions: the dispatcher's pair, the Triton pair (`_triton`) and the pair below both (`_cuda`).

    from triton_impl.compat.sglang import causal_conv1d_fn, causal_conv1d_update                  # the dispatcher's
    from triton_impl.compat.sglang import causal_conv1d_fn_triton, causal_conv1d_update_triton    # the Triton pair

SGLang has two orders of arguments under one name: its dispatcher (and TensorRT-LLM) passes `query_start_loc`
fourth, its Triton module `conv_states` fourth and `seq_lens_cpu` sixth. Host lengths only choose the grid: nothing
synchronises with or without them, or with `validate_data`, and lengths that are too small skip no token.

Index tensors may be longer than the batch, whose first entries count. Padding rows (slot == pad_slot_id, or outside
the pool) and tokens past `query_start_loc[-1]` come back as zeros; SGLang leaves them uninitialised or keeps x. A
`pad_slot_id` is compared with slots only, so 0 does not skip row 0. Bad shapes and values raise ValueError, dtypes and
unknown keywords TypeError, a backward pass Unsupported.
"""

from oracle.contract import MASK_DTYPES
from triton_impl.api import causal_conv1d_fn as packed_fn
from triton_impl.api import causal_conv1d_update as packed_update
from triton_impl.api import tree_parents_from_links
from triton_impl.compat.layout import (
    activation_name,
    expect,
    expect_rolling_states,
    expect_states,
    expect_weight,
    leading,
    leading_rows,
    longest,
    refuse_unknown,
    token_axes,
    token_major,
    update_at_back,
    validates,
)
from triton_impl.modules.dense import dense_rows

__all__ = [
    "PAD_SLOT_ID",
    "causal_conv1d_fn",
    "causal_conv1d_fn_triton",
    "causal_conv1d_fwd_cuda",
    "causal_conv1d_update",
    "causal_conv1d_update_cuda",
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
    """Prefill in the dispatcher's order of arguments, which are those of `causal_conv1d_fn_triton`.

    Args:
      x: [dim, tokens] with `query_start_loc`, or [batch, dim, seqlen] without; any strides.
      seq_lens_cpu, block_table, validate_data: (keyword) as there; the first two only with `query_start_loc`.

    Returns:
      x itself, overwritten, where tokens have unit stride (SGLang's CUDA kernel works in place, this costs a
      copy); otherwise, as with every token-major projection, a fresh tensor laid out as x.
    """
    seq_lens_cpu = kwargs.pop("seq_lens_cpu", None)
    block_table = kwargs.pop("block_table", None)
    kwargs.pop("validate_data", None)
    refuse_unknown("causal_conv1d_fn", kwargs)
    if query_start_loc is None:
        if seq_lens_cpu is not None or block_table is not None:
            raise ValueError(
                "query_start_loc: expected shape [batch+1] beside seq_lens_cpu or block_table, got None"
            )
        batch, dim, _ = expect("x", x, ("batch", "dim", "seqlen"))
        width = expect_weight(weight, dim)
        if conv_states is not None:
            expect_states("conv_states", conv_states, dim, width)
        out = dense_rows(
            x.transpose(1, 2),
            weight,
            bias,
            token_major(conv_states),
            leading("cache_indices", cache_indices, batch),
            leading("has_initial_state", has_initial_state, batch, MASK_DTYPES),
            activation=activation_name(activation),
            pad_slot_id=pad_slot_id,
            validate=validates(),
        ).transpose(1, 2)
    else:
        rows = conv_states, query_start_loc, seq_lens_cpu, cache_indices, has_initial_state
        out = causal_conv1d_fn_triton(
            x, weight, bias, *rows, activation, pad_slot_id, block_table=block_table
        )
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
      x: [batch, dim] or [batch, dim, seqlen]; overwritten with the result, and returned.
      conv_state: [num_slots, dim, state_len]; the window is the last width-1 columns and the slot shifts as a
        whole. (SGLang's prefill leaves the window in front: with wider slots its two halves do not fit together, and
        neither do these.)
      others: as in `causal_conv1d_update_triton`.
    """
    dim = token_axes(x)
    expect_states("conv_state", conv_state, dim, expect_weight(weight, dim))
    update_at_back(
        token_major(x),
        weight,
        bias,
        conv_state,
        conv_state_indices,
        cache_seqlens,
        activation=activation_name(activation),
        pad_slot_id=pad_slot_id,
        in_place=True,
    )
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
      validate_data: shapes are checked in any case; see `triton_impl.compat.validated` for data.
      block_table: [blocks, 2] or None. It spares SGLang the host lengths; here it selects the flat schedule, which
        finds the blocks on the device, and its entries are not read.

    Returns:
      A fresh [dim, tokens] tensor laid out as x.
    """
    refuse_unknown("causal_conv1d_fn", kwargs)
    dim = expect("x", x, ("dim", "tokens"))[0]
    width = expect_weight(weight, dim)
    if conv_states is not None:
        expect_states("conv_states", conv_states, dim, width)
    if block_table is not None:
        expect("block_table", block_table, ("blocks", "2"), **{"2": 2})
    rows = leading_rows(
        query_start_loc, cache_indices, "cache_indices", ("has_initial_state", has_initial_state)
    )
    return packed_fn(
        x.t(),
        weight,
        bias,
        token_major(conv_states),
        *rows,
        activation=activation_name(activation),
        pad_slot_id=pad_slot_id,
        max_seqlen=longest("seq_lens_cpu", seq_lens_cpu),
        schedule="auto" if block_table is None else "flat",
        validate=validates(),
    ).out.t()


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
      weight, bias, activation, pad_slot_id, validate_data: as in `causal_conv1d_fn_triton`.
      cache_seqlens: [batch] integer, tokens of each row before this step, or None. With it a slot is a circular
        buffer: column n mod state_len holds token n. (SGLang ignores it, which gives wrong values.)
      conv_state_indices: [batch] integer slots, or None: row i uses slot i.
      num_accept_tokens: [batch] integer, how many tokens of each row's previous step were accepted, or None. With it
        the window begins in column count-1 of a slot that keeps all new tokens behind it; state_len >= width-1 +
        seqlen-1.
      intermediate_conv_window: [buffers, steps, dim, width-1], any strides, or None; takes the window after every
        token, in place. Not with `num_accept_tokens`.
      intermediate_state_indices: [batch] integer buffers, or None: row i uses buffer i. Ignored without a window.
      retrieve_next_token, retrieve_next_sibling: [batch, seqlen] integer, both or none: first child and next sibling
        of every node of a draft tree, -1 for none. `conv_state` is then left as it is, for the caller to move an
        accepted window into it (SGLang leaves the window of the last nodes by number there, which is no sequence's).
      retrieve_parent_token: [batch, seqlen] integer, or None; takes the parent of every node, 0 for the root. Ignored
        without a tree.
      metadata: unused, as in SGLang.

    Returns:
      A fresh tensor with x's shape and dtype.
    """
    dim = token_axes(x)
    batch, seqlen = x.shape[0], 1 if x.dim() == 2 else x.shape[2]
    width = expect_weight(weight, dim)
    expect_states("conv_state", conv_state, dim, width)
    slots = leading("conv_state_indices", conv_state_indices, batch)
    more = {}
    if cache_seqlens is not None:
        more |= dict(state_layout="ring", cache_seqlens=leading("cache_seqlens", cache_seqlens, batch))
    if num_accept_tokens is not None:
        if intermediate_conv_window is not None:
            raise ValueError("num_accept_tokens: expected None, since intermediate_conv_window is given")
        more |= dict(num_accepted_tokens=leading("num_accept_tokens", num_accept_tokens, batch))
        expect_rolling_states("conv_state", conv_state, width, seqlen)
    if intermediate_conv_window is not None:
        axes, sizes = ("buffers", "steps", "dim", "columns"), dict(dim=dim, columns=width - 1)
        steps = expect("intermediate_conv_window", intermediate_conv_window, axes, **sizes)[1]
        if steps < seqlen:
            raise ValueError(f"intermediate_conv_window: expected steps >= {seqlen} on axis 1, got {steps}")
        more |= dict(
            window_out=intermediate_conv_window.transpose(2, 3),
            window_indices=leading("intermediate_state_indices", intermediate_state_indices, batch),
        )
    if retrieve_next_token is not None or retrieve_next_sibling is not None:
        links = {"retrieve_next_token": retrieve_next_token, "retrieve_next_sibling": retrieve_next_sibling}
        if retrieve_next_token is None or retrieve_next_sibling is None:
            raise ValueError("retrieve_next_token, retrieve_next_sibling: expected both or none, got one")
        parents = tree_parents_from_links(
            *[_nodes(name, link, batch, seqlen) for name, link in links.items()]
        )
        if retrieve_parent_token is not None:
            _nodes("retrieve_parent_token", retrieve_parent_token, batch, seqlen).copy_(parents.clamp(min=0))
        more |= dict(tree_parents=parents, commit=False)
    out = packed_update(
        token_major(x),
        weight,
        bias,
        token_major(conv_state),
        slots,
        activation=activation_name(activation),
        pad_slot_id=pad_slot_id,
        validate=validates(),
        **more,
    ).out
    return token_major(out)


def _nodes(name, links, batch, seqlen):
    """The nodes of a batch in a buffer [batch or more, seqlen or more]."""
    shape = expect(name, links, ("batch", "seqlen"))
    if shape[0] < batch or shape[1] < seqlen:
        raise ValueError(
            f"{name}: expected shape [batch={batch}, seqlen={seqlen}] or larger, got {list(shape)}"
        )
    return links[:batch, :seqlen]


def causal_conv1d_fwd_cuda(
    x,
    weight,
    bias_,
    conv_states,
    query_start_loc,
    cache_indices,
    has_initial_state,
    silu_activation,
    pad_slot_id,
):
    """`causal_conv1d_fwd` of `sglang.kernels.ops.mamba`: the result replaces x, whatever its strides, and None is returned."""
    rows = query_start_loc, cache_indices, has_initial_state, conv_states
    out = causal_conv1d_fn(x, weight, bias_, *rows, bool(silu_activation), pad_slot_id)
    if out is not x:
        x.copy_(out)


def causal_conv1d_update_cuda(
    x, conv_state, weight, bias_, silu_activation, cache_seqlens, conv_state_indices, pad_slot_id
):
    """`causal_conv1d_update` of `sglang.kernels.ops.mamba`: the result replaces x, and None is returned."""
    options = bool(silu_activation), cache_seqlens, conv_state_indices, pad_slot_id
    causal_conv1d_update(x, conv_state, weight, bias_, *options)
