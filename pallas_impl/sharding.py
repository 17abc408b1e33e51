"""The operations over a mesh of devices: channels, sequences and tokens split by `jax.shard_map`.

Arrays that are split by channels, or by rows of equal length, need nothing from here: a call runs where they lie (see
`pallas_impl.parts`). These functions also split sequences with their slots, and tokens. Splitting channels (tensor
parallel) or sequences (data parallel) needs no communication at all; splitting tokens (context parallel) sends width-1
tokens to the neighbour and every row's new window to all.

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
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from oracle.contract import ConvOutput, ConvWindowOutput, RowsCall, Unsupported, UpdateCall
from pallas_impl import api, context_parallel, functional


def causal_conv1d_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike | None,
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    *,
    mesh: jax.sharding.Mesh | None,
    channel_axis: str | None = None,
    batch_axis: str | None = None,
    token_axis: str | None = None,
    **options: Any,
) -> ConvOutput:
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
      **options: the keyword arguments of `pallas_impl.causal_conv1d_fn`. Arrays with an entry a row are split with the
        rows, and slots count from the device's own part of the pool. A kernel asked for by backend "auto" is the
        default device's. Not `validate`, for there is no data to read in a trace; not the serving arguments
        (`state_layout` and what follows) with `token_axis`; not `channel_offset` and `split_sizes` with `channel_axis`.

    Returns:
      ConvOutput(out, conv_states), split as x and conv_states are.

    Raises:
      ValueError: an axis that the mesh lacks or that is named twice, a size that it does not divide.
      ValueError, TypeError, Unsupported: as `pallas_impl.causal_conv1d_fn`, which sees the parts.
    """
    call = _bind(
        api.causal_conv1d_fn,
        (x, weight, bias, conv_states, query_start_loc, cache_indices, has_initial_state),
        options,
    )
    _check_channels(channel_axis, call)
    operation = api.causal_conv1d_fn
    if token_axis is not None:
        operation = context_parallel.causal_conv1d_fn
        call = _only_of(operation, call, f"tokens are split over {token_axis!r}") | dict(axis_name=token_axis)
    return _split_pool(operation, call, mesh, partition_specs(channel_axis, batch_axis, token_axis))


def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    initial_states: ArrayLike | None = None,
    query_start_loc: ArrayLike | None = None,
    *,
    mesh: jax.sharding.Mesh | None,
    channel_axis: str | None = None,
    batch_axis: str | None = None,
    token_axis: str | None = None,
    **options: Any,
) -> ConvOutput:
    """`causal_conv1d`, the training form, with its arguments split over `mesh`; works in and outside `jit`.

    Reverse-mode derivatives as those of `pallas_impl.causal_conv1d`; those of weight and bias are added up over the
    devices that split rows and tokens. On Explicit axes a gradient is split as its argument is.

    Args:
      x, weight, bias, initial_states, query_start_loc: as in `pallas_impl.causal_conv1d`. With `batch_axis`, dense rows
        [batch, seqlen, dim] are split by rows; packed ones hold a batch for each device, one after another, each with
        offsets from 0, as in `causal_conv1d_fn` above. `initial_states` is split with the rows.
      mesh, channel_axis, batch_axis: as in `causal_conv1d_fn`.
      token_axis: mesh axis that splits the tokens of packed rows, or seqlen of dense ones, into equal parts, or None (see
        `pallas_impl.context_parallel`). Rows then begin with zeros: `initial_states` is None.
      **options: the keyword arguments of `pallas_impl.causal_conv1d`.

    Returns:
      ConvOutput(out, conv_states), split as x and initial_states are; with `token_axis` conv_states is None.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn` above.
    """
    call = _bind(functional.causal_conv1d, (x, weight, bias, initial_states, query_start_loc), options)
    RowsCall(**call).check()
    specs = partition_specs(channel_axis, batch_axis, token_axis)
    dense = query_start_loc is None
    if dense:
        specs["x"] = specs["out"] = PartitionSpec(batch_axis, token_axis, channel_axis)
    if token_axis is None:
        where = specs["out"], specs["initial_states"]
        return ConvOutput(*_split(functional.causal_conv1d, call, mesh, specs, where))
    if initial_states is not None:
        raise Unsupported(
            f"initial_states: expected None, since tokens are split over {token_axis!r}, got shape "
            f"{list(initial_states.shape)}"
        )

    call |= dict(axis_name=token_axis)
    return ConvOutput(*_split(_train_on_tokens, call, mesh, specs, (specs["out"],)), None)


def _train_on_tokens(x, weight, bias, initial_states, query_start_loc, *, max_seqlen, **options):
    if query_start_loc is not None:
        out = context_parallel.causal_conv1d(
            x, weight, bias, query_start_loc, max_seqlen=max_seqlen, **options
        )
        return (out,)
    # A part has as many tokens of each row: one row after another, each over all devices.
    one = functools.partial(context_parallel.causal_conv1d, **options)
    ends = jnp.array([0, jax.lax.axis_size(options["axis_name"]) * x.shape[1]], jnp.int32)
    return (jnp.stack([one(row, weight, bias, ends) for row in x]),)


def causal_conv1d_update(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    cache_indices: ArrayLike | None = None,
    *,
    mesh: jax.sharding.Mesh | None,
    channel_axis: str | None = None,
    batch_axis: str | None = None,
    **options: Any,
) -> Any:
    """`causal_conv1d_update` with its arguments split over `mesh`; works in and outside `jit`.

    Args:
      x, weight, bias, conv_states, cache_indices: as in `pallas_impl.causal_conv1d_update`, split as in
        `causal_conv1d_fn` above: with `batch_axis` a device's rows use the slots of its own part of the pool.
      mesh, channel_axis, batch_axis: as above.
      **options: the keyword arguments of `pallas_impl.causal_conv1d_update`, as above. `query_start_loc` is None with
        `batch_axis`, since packed rows have no equal parts; `window_out` is split along its buffers and channels.

    Returns:
      ConvOutput(out, conv_states) or ConvWindowOutput, split as x, conv_states and window_out are.

    Raises:
      ValueError, TypeError, Unsupported: as `causal_conv1d_fn` above.
    """
    call = _bind(api.causal_conv1d_update, (x, weight, bias, conv_states, cache_indices), options)
    _check_channels(channel_axis, call)
    UpdateCall(**call).check()
    if call["query_start_loc"] is not None and batch_axis is not None:
        raise ValueError(
            f"query_start_loc: expected None, since batch_axis is {batch_axis!r} and packed rows have no equal parts, "
            f"got shape {list(call['query_start_loc'].shape)}"
        )
    specs = partition_specs(channel_axis, batch_axis)
    if len(x.shape) == 3:
        specs["x"] = specs["out"] = specs["residual"] = PartitionSpec(batch_axis, None, channel_axis)
    return _split_pool(api.causal_conv1d_update, call, mesh, specs)


def partition_specs(
    channel_axis: str | None = None, batch_axis: str | None = None, token_axis: str | None = None
) -> dict[str, PartitionSpec]:
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
        initial_states=PartitionSpec(batch_axis, None, channel_axis),
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


def shardings(
    mesh: jax.sharding.Mesh,
    channel_axis: str | None = None,
    batch_axis: str | None = None,
    token_axis: str | None = None,
) -> dict[str, NamedSharding]:
    """The `NamedSharding` of every argument, by name, for `jax.device_put` and `in_shardings`."""
    specs = partition_specs(channel_axis, batch_axis, token_axis)
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _bind(operation, arguments, options):
    """All arguments of an operation by name, defaults filled in; TypeError for one that it does not know."""
    bound = inspect.signature(operation).bind(*arguments, **options)
    bound.apply_defaults()
    return bound.arguments


def _only_of(operation, call, why):
    """Those arguments of a call that `operation` takes; Unsupported if another one is not its default."""
    known = inspect.signature(operation).parameters
    for name, value in call.items():
        default = inspect.signature(api.causal_conv1d_fn).parameters[name].default
        if name not in known and value is not default and not (isinstance(value, str) and value == default):
            raise Unsupported(f"{name}: expected its default, since {why}")
    return {name: value for name, value in call.items() if name in known}


def _check_channels(channel_axis, call):
    for name in ("channel_offset", "split_sizes"):
        if call[name] is not None and channel_axis is not None:
            raise Unsupported(
                f"{name}: expected None, since channel_axis is {channel_axis!r} and a device has a part of all "
                f"channels, got {call[name]!r}"
            )


def _split(operation, call, mesh, specs, out_specs):
    """Runs `operation` on every device's part of the call's arrays, those that `specs` names. Returns a tuple."""
    arguments = {name: value for name, value in call.items() if name in specs and value is not None}
    options = {name: value for name, value in call.items() if name not in specs}
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    _check_specs(arguments, mesh, specs)
    options |= {name: None for name, value in call.items() if name in specs and value is None}
    # Outside jit a program of its own. Arrays and lists, which are refused or read below, are no keys of one.
    traced = any(isinstance(array, jax.core.Tracer) for array in arguments.values())
    unhashable = any(isinstance(value, list | np.ndarray | jax.Array) for value in options.values())
    program = _program.__wrapped__ if traced or unhashable else _program
    in_specs = {name: specs[name] for name in arguments}
    return program(arguments, operation, tuple(options.items()), mesh, tuple(in_specs.items()), out_specs)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _program(arguments, operation, options, mesh, in_specs, out_specs):
    in_specs = dict(in_specs)
    if AxisType.Explicit in mesh.axis_types:  # there a mismatch is an error, elsewhere JAX moves the array
        arguments = {n: jax.reshard(a, NamedSharding(mesh, in_specs[n])) for n, a in arguments.items()}

    def run(parts):
        return tuple(value for value in operation(**parts, **dict(options)) if value is not None)

    # Unchecked: results may be the same over an axis that splits some argument.
    return jax.shard_map(run, mesh=mesh, in_specs=(in_specs,), out_specs=out_specs, check_vma=False)(
        arguments
    )


def _split_pool(operation, call, mesh, specs):
    """As `_split`, of an operation with a pool. Returns a ConvOutput or a ConvWindowOutput."""
    split_sizes = call.get("split_sizes")
    out = specs["out"] if split_sizes is None else (specs["out"],) * len(split_sizes)
    states = tuple(specs[name] for name in ("conv_states", "window_out") if call.get(name) is not None)
    result = _split(operation, call, mesh, specs, (out, *states))
    if len(states) == 2:
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
