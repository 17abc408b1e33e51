"""The operations over a mesh of devices: channels, sequences and tokens split by `jax.shard_map`.

A compiler cannot split a kernel: given sharded arrays outside `shard_map`, it would gather them first. These
wrappers run the operation on every device's own part. Splitting channels (tensor parallel) or sequences (data
parallel) needs no communication at all; splitting tokens (context parallel) sends width-1 tokens to the neighbour
and every row's new window to all.

    mesh = jax.make_mesh((4, 2), ("data", "model"))
    axes = dict(batch_axis="data", channel_axis="model")
    where = sharding.shardings(mesh, **axes)
    pool = jax.device_put(pool, where["conv_states"])
    step = jax.jit(
        functools.partial(sharding.causal_conv1d_update, mesh=mesh, **axes),
        donate_argnames="conv_states",
        out_shardings=ConvOutput(where["out"], where["conv_states"]),
    )

`out_shardings` tells JAX which result takes the donated pool's memory; without it XLA may give that to another result
of the same size, and then copies the pool.
Arrays placed as `shardings` says stay where they are; others are moved there first.
"""

import functools

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oracle.contract import ConvOutput, ConvWindowOutput, Unsupported, check_causal_conv1d_update
from pallas_impl import api, context_parallel


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    *,
    mesh,
    channel_axis=None,
    batch_axis=None,
    token_axis=None,
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
    """`causal_conv1d_fn` with its arguments split over `mesh`; works in and outside `jit`.

    Args:
      x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state: as in
        `pallas_impl.causal_conv1d_fn`, but where `batch_axis` is given every array except `weight` and `bias`
        holds the batches of its devices one after another along axis 0. Each batch is complete in itself: its
        offsets start at 0 (query_start_loc is [devices * (batch+1)]) and its slots count from its own part of the
        pool.
      mesh: a `jax.sharding.Mesh`, or None for the current one.
      channel_axis: mesh axis that splits `dim`, or None.
      batch_axis: mesh axis that splits sequences, with their tokens and slots, or None.
      token_axis: mesh axis that splits the tokens of a batch into equal parts, wherever rows begin, or None
        (see `pallas_impl.context_parallel`).
      activation, pad_slot_id, max_seqlen, schedule, backend: as in `pallas_impl.causal_conv1d_fn`; a kernel
        asked for by "auto" is the default device's.
      validate: False; there is no data to read in a trace.
      state_layout and what follows: as in `pallas_impl.causal_conv1d_fn`; arrays with an entry a row are split with
        the rows, and slots count from the device's own part of the pool. Not with `token_axis`; `channel_offset`
        and `split_sizes` not with `channel_axis`.

    Returns:
      ConvOutput(out, conv_states), split as x and conv_states are.

    Raises:
      ValueError: an axis that the mesh lacks or that is named twice, a size that it does not divide.
      ValueError, TypeError, Unsupported: as `pallas_impl.causal_conv1d_fn`, which sees the parts.
    """
    operation = api.causal_conv1d_fn
    if token_axis is not None:
        operation = functools.partial(context_parallel.causal_conv1d_fn, axis_name=token_axis)
    operation = functools.partial(
        operation, activation=activation, pad_slot_id=pad_slot_id, max_seqlen=max_seqlen,
        schedule=schedule, backend=backend, validate=validate, state_layout=state_layout, empty_rows=empty_rows,
        snapshot_block_size=snapshot_block_size, channel_offset=channel_offset, split_sizes=split_sizes,
    )  # fmt: skip
    _check_channels(channel_axis, channel_offset, split_sizes)
    arguments = dict(
        x=x, weight=weight, bias=bias, conv_states=conv_states, query_start_loc=query_start_loc,
        cache_indices=cache_indices, has_initial_state=has_initial_state, cache_seqlens=cache_seqlens,
        write_indices=write_indices, snapshot_indices=snapshot_indices, num_computed_tokens=num_computed_tokens,
        track_indices=track_indices, track_lengths=track_lengths, residual=residual,
    )  # fmt: skip
    specs = partition_specs(channel_axis, batch_axis, token_axis)
    return _split(operation, arguments, mesh, specs, split_sizes)


def causal_conv1d_update(
    x,
    weight,
    bias,
    conv_states,
    cache_indices=None,
    *,
    mesh,
    channel_axis=None,
    batch_axis=None,
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
    """`causal_conv1d_update` with its arguments split over `mesh`; works in and outside `jit`.

    Args:
      x, weight, bias, conv_states, cache_indices: as in `pallas_impl.causal_conv1d_update`, split as in
        `causal_conv1d_fn` above: with `batch_axis` a device's rows use the slots of its own part of the pool.
      query_start_loc: as in `pallas_impl.causal_conv1d_update`; None with `batch_axis`, since packed rows have
        no equal parts.
      num_accepted_tokens, max_seqlen: as in `pallas_impl.causal_conv1d_update`.
      mesh, channel_axis, batch_axis, activation, pad_slot_id, backend, validate: as above.
      state_layout and what follows: as in `pallas_impl.causal_conv1d_update` and above; `window_out` is split along
        its buffers and channels.

    Returns:
      ConvOutput(out, conv_states) or ConvWindowOutput, split as x, conv_states and window_out are.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn` above.
    """
    options = dict(
        max_seqlen=max_seqlen,
        activation=activation,
        pad_slot_id=pad_slot_id,
        backend=backend,
        validate=validate,
        state_layout=state_layout,
        commit=commit,
        channel_offset=channel_offset,
        split_sizes=split_sizes,
    )
    arguments = dict(
        x=x, weight=weight, bias=bias, conv_states=conv_states, cache_indices=cache_indices,
        query_start_loc=query_start_loc, num_accepted_tokens=num_accepted_tokens, cache_seqlens=cache_seqlens,
        write_indices=write_indices, track_indices=track_indices, window_out=window_out,
        window_indices=window_indices, tree_parents=tree_parents, residual=residual,
    )  # fmt: skip
    _check_channels(channel_axis, channel_offset, split_sizes)
    check_causal_conv1d_update(**arguments, **options)
    if query_start_loc is not None and batch_axis is not None:
        raise ValueError(
            f"query_start_loc: expected None, since batch_axis is {batch_axis!r} and packed rows have no equal parts, "
            f"got shape {list(query_start_loc.shape)}"
        )
    specs = partition_specs(channel_axis, batch_axis)
    if len(x.shape) == 3:
        specs["x"] = specs["out"] = specs["residual"] = PartitionSpec(batch_axis, None, channel_axis)
    return _split(functools.partial(api.causal_conv1d_update, **options), arguments, mesh, specs, split_sizes)


def partition_specs(channel_axis=None, batch_axis=None, token_axis=None):
    """The `PartitionSpec` of every argument, by name, and of "out"; x and out of two axes."""
    rows = (
        batch_axis if token_axis is None else token_axis if batch_axis is None else (batch_axis, token_axis)
    )
    batch = PartitionSpec(batch_axis)
    return dict(
        x=PartitionSpec(rows, channel_axis),
        weight=PartitionSpec(channel_axis, None),
        bias=PartitionSpec(channel_axis),
        conv_states=PartitionSpec(batch_axis, None, channel_axis),
        query_start_loc=batch,
        cache_indices=batch,
        has_initial_state=batch,
        num_accepted_tokens=batch,
        cache_seqlens=batch,
        write_indices=batch,
        snapshot_indices=batch,
        num_computed_tokens=batch,
        track_indices=batch,
        track_lengths=batch,
        window_out=PartitionSpec(batch_axis, None, None, channel_axis),
        window_indices=batch,
        tree_parents=batch,
        residual=PartitionSpec(rows, channel_axis),
        out=PartitionSpec(rows, channel_axis),
    )


def shardings(mesh, channel_axis=None, batch_axis=None, token_axis=None):
    """The `NamedSharding` of every argument, by name, for `jax.device_put` and `in_shardings`."""
    specs = partition_specs(channel_axis, batch_axis, token_axis)
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _check_channels(channel_axis, channel_offset, split_sizes):
    for name, value in (("channel_offset", channel_offset), ("split_sizes", split_sizes)):
        if value is not None and channel_axis is not None:
            raise Unsupported(
                f"{name}: expected None, since channel_axis is {channel_axis!r} and a device has a part of all "
                f"channels, got {value!r}"
            )


def _split(operation, arguments, mesh, specs, split_sizes):
    """Runs `operation(**arguments)` on every device's part; absent arguments stay absent."""
    arguments = {name: array for name, array in arguments.items() if array is not None}
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    _check_specs(arguments, mesh, specs)
    if AxisType.Explicit in mesh.axis_types:  # there a mismatch is an error, elsewhere JAX moves the array
        arguments = {name: jax.reshard(a, NamedSharding(mesh, specs[name])) for name, a in arguments.items()}
    names = tuple(arguments)

    def run(*parts):
        result = operation(**{"bias": None, "conv_states": None, **dict(zip(names, parts, strict=True))})
        return tuple(value for value in result if value is not None)

    out = specs["out"] if split_sizes is None else (specs["out"],) * len(split_sizes)
    states = tuple(specs[name] for name in ("conv_states", "window_out") if name in arguments)
    result = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=tuple(specs[name] for name in names),
        out_specs=(out, *states),
        check_vma=False,  # a kernel's results carry no type that says over which axes they vary
    )(*arguments.values())
    if "window_out" in arguments:
        return ConvWindowOutput(*result)
    return ConvOutput(*result) if states else ConvOutput(*result, None)


def _check_specs(arguments, mesh, specs):
    sizes = dict(mesh.shape)
    used = [axis for axis in jax.tree.leaves(tuple(specs["x"])) if axis is not None]
    for axis in used:
        if axis not in sizes:
            raise ValueError(f"mesh: expected an axis named {axis!r}, got the axes {tuple(sizes)}")
        if used.count(axis) > 1:
            raise ValueError(
                f"channel_axis, batch_axis, token_axis: expected distinct axes, got {axis!r} twice"
            )
    for name, array in arguments.items():
        for position, axes in enumerate(specs[name]):
            parts = 1
            for axis in jax.tree.leaves(axes):
                parts *= sizes[axis]
            if position < len(array.shape) and array.shape[position] % parts:
                raise ValueError(
                    f"{name}: expected axis {position} to be a multiple of {parts}, the devices that split it, "
                    f"got shape {list(array.shape)}"
                )
