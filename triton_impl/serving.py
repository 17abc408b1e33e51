"""Calls with arguments beyond the plain ones, on real tensors: check, choose a backend, launch. See `run`.

`triton_impl.api` comes here only where one of those arguments is given. With `split_sizes`, `out` is one flat
tensor that holds the parts one after the other; `parts` are its views.
"""

import torch

from oracle.contract import (
    CommitCall,
    FnCall,
    UpdateCall,
    check_backend,
    check_causal_conv1d_fn,
    check_causal_conv1d_update,
    check_commit_values,
    check_commit_windows,
    check_fn_values,
    check_tree_parents_from_links,
    check_update_values,
)
from triton_impl import commit as commit_kernel
from triton_impl import eager_serving, prefill, states, trees, verify
from triton_impl.config import prefill_config, row_config, verify_config, walks
from triton_impl.launch import warp_size
from triton_impl.prepared import recall, remember
from triton_impl.run import (
    BACKENDS,
    _check_devices,
    _launch,
    _resolve,
    unit_stride,
)


def check_fn(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
    snapshot_indices, num_computed_tokens, track_indices, track_lengths, residual,
    activation, pad_slot_id, max_seqlen, schedule, backend, state_layout, empty_rows, snapshot_block_size,
    channel_offset, split_sizes, validate,
):  # fmt: skip
    """Everything that can be checked without reading data; returns the sizes of the call."""
    tensors = dict(
        cache_seqlens=cache_seqlens, write_indices=write_indices, snapshot_indices=snapshot_indices,
        num_computed_tokens=num_computed_tokens, track_indices=track_indices, track_lengths=track_lengths,
        residual=residual,
    )  # fmt: skip
    sizes = check_causal_conv1d_fn(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, activation=activation,
        pad_slot_id=pad_slot_id, max_seqlen=max_seqlen, schedule=schedule, backend=backend, validate=validate,
        state_layout=state_layout, empty_rows=empty_rows, snapshot_block_size=snapshot_block_size,
        channel_offset=channel_offset, split_sizes=split_sizes, **tensors,
    )  # fmt: skip
    check_backend(backend, BACKENDS)
    _check_devices(
        x, weight=weight, bias=bias, conv_states=conv_states, query_start_loc=query_start_loc,
        cache_indices=cache_indices, has_initial_state=has_initial_state, **tensors,
    )  # fmt: skip
    return sizes


def fn(
    x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
    snapshot_indices, num_computed_tokens, track_indices, track_lengths, residual,
    activation, pad_slot_id, max_seqlen, schedule, backend, state_layout, empty_rows, snapshot_block_size,
    channel_offset, split_sizes, validate=False,
):  # fmt: skip
    tensors = (
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
        snapshot_indices, num_computed_tokens, track_indices, track_lengths, residual,
    )  # fmt: skip
    options = (
        activation, pad_slot_id, max_seqlen, schedule, backend, state_layout, empty_rows, snapshot_block_size,
        channel_offset, split_sizes,
    )  # fmt: skip
    key, call = (None, None) if validate else recall("serving fn", tensors, options)
    if call is None:
        sizes = check_fn(*tensors, *options, validate)
        if validate:
            check_fn_values(
                query_start_loc.tolist(), _host(cache_indices), sizes.tokens,
                None if conv_states is None else sizes.num_slots, pad_slot_id, max_seqlen,
                has_initial_state=_host(has_initial_state), cache_seqlens=_host(cache_seqlens),
                write_indices=_host(write_indices), empty_rows=empty_rows, snapshot_indices=_host(snapshot_indices),
                snapshot_block_size=snapshot_block_size or 1, num_computed_tokens=_host(num_computed_tokens),
                track_indices=_host(track_indices), track_lengths=_host(track_lengths),
            )  # fmt: skip
    x = input_channels(x, weight, channel_offset)
    tensors = (x, *tensors[1:])
    if call is None:
        if _resolve(backend, x) == "eager":
            return eager_serving.prefill(
                *tensors, silu=activation is not None, pad_slot_id=pad_slot_id, layout=state_layout,
                apply_empty=empty_rows == "apply", block_size=snapshot_block_size, split_sizes=split_sizes,
            )  # fmt: skip
        record = FnCall(
            *tensors[:7], activation, pad_slot_id, max_seqlen, schedule, backend, validate, state_layout, cache_seqlens,
            write_indices, empty_rows, snapshot_indices, snapshot_block_size, *tensors[10:], None, split_sizes,
        )  # fmt: skip
        call = _prepare_fn(record, sizes)
        remember(key, call)
    out = empty_out(x, split_sizes)
    _launch(call, x, *tensors[:4], unit_stride(query_start_loc), *tensors[5:], out)
    return out


def _prepare_fn(call, sizes):
    """The outputs' kernel, which also leaves the state where that is the plain rule, and the states' kernel."""
    plain = call.state_layout == "front" and call.empty_rows == "skip"
    for tensor in (call.write_indices, call.snapshot_indices, call.track_indices):
        plain = plain and tensor is None
    outputs = states_ = None
    if call.x.numel():
        config = prefill_config(
            sizes.tokens, sizes.dim, sizes.batch, sizes.width, walks(*call.x.stride()), call.max_seqlen, call.schedule, warp_size()
        )  # fmt: skip
        outputs = prefill.prepare(call, sizes, config, stores=plain)
    if call.conv_states is not None and not plain and sizes.batch:
        config = row_config(sizes.dim, call.conv_states.element_size(), warp_size())
        states_ = states.prepare(call, sizes, config)

    def launch(
        x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
        snapshot_indices, num_computed_tokens, track_indices, track_lengths, residual, out,
    ):  # fmt: skip
        if outputs is not None:
            outputs(
                x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens,
                residual, out,
            )  # fmt: skip
        if states_ is not None:
            states_(
                x, conv_states, query_start_loc, cache_indices, has_initial_state, cache_seqlens, write_indices,
                snapshot_indices, num_computed_tokens, track_indices, track_lengths,
            )  # fmt: skip

    return launch


def check_step(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens, write_indices,
    track_indices, window_out, window_indices, residual, tree_parents,
    max_seqlen, activation, pad_slot_id, backend, state_layout, commit, channel_offset, split_sizes, validate,
):  # fmt: skip
    """Everything that can be checked without reading data; returns the sizes of the call."""
    tensors = dict(
        query_start_loc=query_start_loc, num_accepted_tokens=num_accepted_tokens, cache_seqlens=cache_seqlens,
        write_indices=write_indices, track_indices=track_indices, window_out=window_out,
        window_indices=window_indices, tree_parents=tree_parents, residual=residual,
    )  # fmt: skip
    sizes = check_causal_conv1d_update(
        x, weight, bias, conv_states, cache_indices, max_seqlen=max_seqlen, activation=activation,
        pad_slot_id=pad_slot_id, backend=backend, validate=validate, state_layout=state_layout, commit=commit,
        channel_offset=channel_offset, split_sizes=split_sizes, **tensors,
    )  # fmt: skip
    check_backend(backend, BACKENDS)
    _check_devices(
        x, weight=weight, bias=bias, conv_states=conv_states, cache_indices=cache_indices, **tensors
    )
    return sizes


def step(
    x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens, write_indices,
    track_indices, window_out, window_indices, residual, tree_parents,
    max_seqlen, activation, pad_slot_id, backend, state_layout, commit, channel_offset, split_sizes,
    validate=False, out=None,
):  # fmt: skip
    """`out` may be x itself, as in `run.step`, without `channel_offset`, `split_sizes` and `tree_parents`."""
    tensors = (
        x, weight, bias, conv_states, cache_indices, query_start_loc, num_accepted_tokens, cache_seqlens,
        write_indices, track_indices, window_out, window_indices, residual, tree_parents,
    )  # fmt: skip
    options = (
        max_seqlen, activation, pad_slot_id, backend, state_layout, commit, channel_offset, split_sizes,
    )  # fmt: skip
    key, call = (None, None) if validate else recall("serving step", tensors, options)
    if call is None:
        sizes = check_step(*tensors, *options, validate)
        if validate:
            check_update_values(
                _host(cache_indices), sizes, pad_slot_id, _host(query_start_loc), _host(num_accepted_tokens), max_seqlen,
                cache_seqlens=_host(cache_seqlens), write_indices=_host(write_indices),
                track_indices=_host(track_indices), num_buffers=None if window_out is None else window_out.shape[0],
                window_indices=_host(window_indices), commit=commit, tree_parents=_host(tree_parents),
            )  # fmt: skip
    x = input_channels(x, weight, channel_offset)
    tensors = (x, *tensors[1:])
    if call is None:
        if _resolve(backend, x) == "eager":
            result = eager_serving.update(
                *tensors, silu=activation is not None, pad_slot_id=pad_slot_id, layout=state_layout, commit=commit,
                split_sizes=split_sizes,
            )  # fmt: skip
            return result if out is None else out.copy_(result)
        record = UpdateCall(
            *tensors[:7], max_seqlen, activation, pad_slot_id, backend, validate, state_layout, cache_seqlens,
            write_indices, track_indices, window_out, window_indices, commit, tree_parents, residual, None, split_sizes,
        )  # fmt: skip
        call = _prepare_step(record, sizes)
        remember(key, call)
    if out is None:
        out = empty_out(x, split_sizes)
    if out.numel():
        rest = tensors[6:] if tree_parents is not None else tensors[6:-1]
        _launch(call, x, *tensors[:5], unit_stride(query_start_loc), *rest, out)
    return out


def _prepare_step(call, sizes):
    config = verify_config(sizes.dim, call.x.element_size(), warp_size())
    if call.tree_parents is None:
        return verify.prepare(call, sizes, config)
    launch = trees.prepare(call, sizes, config)
    # of the step's tensors, the tree's kernel takes those that a tree can have
    return (
        lambda x, weight, bias, states, slots, _q, _a, seqlens, _w, _k, kept, buffers, added, parents, out: (
            launch(x, weight, bias, states, slots, seqlens, parents, kept, buffers, added, out)
        )
    )


def check_commit(
    conv_states, window_out, accepted_steps, cache_indices, window_indices, pad_slot_id, backend, validate
):
    """Everything that can be checked without reading data; returns the sizes of the call."""
    sizes = check_commit_windows(
        conv_states, window_out, accepted_steps, cache_indices, window_indices, pad_slot_id=pad_slot_id,
        backend=backend, validate=validate,
    )  # fmt: skip
    check_backend(backend, BACKENDS)
    _check_devices(
        conv_states, "conv_states", window_out=window_out, accepted_steps=accepted_steps, cache_indices=cache_indices,
        window_indices=window_indices,
    )  # fmt: skip
    return sizes


def commit(
    conv_states,
    window_out,
    accepted_steps,
    cache_indices,
    window_indices,
    pad_slot_id,
    backend,
    validate=False,
):
    tensors = conv_states, window_out, accepted_steps, cache_indices, window_indices
    key, call = (None, None) if validate else recall("commit", tensors, (pad_slot_id, backend))
    if call is None:
        sizes = check_commit(*tensors, pad_slot_id, backend, validate)
        if validate:
            check_commit_values(
                accepted_steps.tolist(), _host(cache_indices), _host(window_indices), sizes, pad_slot_id
            )
        if _resolve(backend, conv_states) == "eager":
            eager_serving.commit(*tensors, pad_slot_id=pad_slot_id)
            return
        config = row_config(sizes.dim, conv_states.element_size(), warp_size())
        call = commit_kernel.prepare(CommitCall(*tensors, pad_slot_id), sizes, config)
        remember(key, call)
    if accepted_steps.shape[0] and window_out.shape[2]:
        _launch(call, conv_states, *tensors)


def parents_from_links(next_token, next_sibling):
    check_tree_parents_from_links(next_token, next_sibling)
    _check_devices(next_token, "next_token", next_sibling=next_sibling)
    return trees.parents_from_links(next_token, next_sibling)


def parts(out, shape, split_sizes):
    """Views of the parts of a flat `out`: contiguous, each in `shape` but for its channels."""
    views, tokens, first = [], out.numel() // shape[-1], 0
    for size in split_sizes:
        views.append(out[tokens * first : tokens * (first + size)].view(*shape[:-1], size))
        first += size
    return tuple(views)


def input_channels(x, weight, channel_offset):
    return x if channel_offset is None else x.narrow(-1, channel_offset, weight.shape[0])


def empty_out(x, split_sizes, device=None):
    if split_sizes is None:
        return torch.empty_like(x, device=device)
    return torch.empty(x.numel(), dtype=x.dtype, device=device or x.device)


def _host(tensor):
    return None if tensor is None else tensor.tolist()
