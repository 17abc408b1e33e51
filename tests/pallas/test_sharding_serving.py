"""The serving arguments over a mesh of devices: the bits of one device."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import pallas_impl
from oracle.contract import Unsupported
from pallas_impl import sharding

if os.environ.get("JAX_PLATFORMS") == "cpu":  # not with --gpu, where other files may have started JAX
    jax.config.update("jax_num_cpu_devices", 2)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "bfloat16")


def index(*values):
    return jnp.asarray(values, jnp.int32)


def same_bits(got, want):
    assert type(got) is type(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


WEIGHT, POOL, X = normal(0, 8, 4), normal(1, 12, 3, 8), normal(2, 4, 3, 8)


def mesh(**axes):
    devices = np.array(jax.devices("cpu")[: int(np.prod(tuple(axes.values())))]).reshape(tuple(axes.values()))
    return jax.sharding.Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def test_channels_of_a_verify_step_and_a_prefill():
    step = dict(window_out=normal(3, 4, 3, 3, 8), commit=False, tree_parents=jnp.zeros((4, 3), jnp.int32))
    arguments = (X, WEIGHT, None, POOL, index(3, 0, 9, 1))
    split = dict(mesh=mesh(model=2), channel_axis="model")
    same_bits(
        sharding.causal_conv1d_update(*arguments, **step, **split),
        pallas_impl.causal_conv1d_update(*arguments, **step),
    )
    arguments = (X.reshape(12, 8), WEIGHT, None, POOL, index(0, 5, 12), index(1, 2))
    more = dict(
        write_indices=index(3, 4), snapshot_indices=index(5, 6, 7, 8).reshape(2, 2), snapshot_block_size=2,
        track_indices=index(9, 10), residual=normal(4, 12, 8), empty_rows="apply",
    )  # fmt: skip
    same_bits(
        sharding.causal_conv1d_fn(*arguments, **more, **split),
        pallas_impl.causal_conv1d_fn(*arguments, **more),
    )


def test_rows_with_their_slots_and_parts():
    """Two batches of two rows, each with its own half of the pool and of the buffers."""
    call = functools.partial(sharding.causal_conv1d_update, mesh=mesh(data=2), batch_axis="data")
    buffers, slots, writes = normal(5, 4, 3, 3, 8), index(1, 4, 0, 5), index(2, 3, 2, 1)
    got = call(X, WEIGHT, None, POOL, slots, write_indices=writes, window_out=buffers, split_sizes=(5, 3))
    for half in range(2):
        rows, pool = slice(2 * half, 2 * half + 2), slice(6 * half, 6 * half + 6)
        want = pallas_impl.causal_conv1d_update(
            X[rows], WEIGHT, None, POOL[pool], slots[rows], write_indices=writes[rows], window_out=buffers[rows],
            split_sizes=(5, 3),
        )  # fmt: skip
        same_bits(tuple(part[rows] for part in got.out), want.out)
        same_bits(got.conv_states[pool], want.conv_states)
        same_bits(got.window_out[rows], want.window_out)


def test_what_cannot_be_split_is_refused():
    arguments = (X.reshape(12, 8), WEIGHT, None, POOL, index(0, 5, 12), index(1, 2))
    with pytest.raises(Unsupported, match="split_sizes: expected None, since channel_axis is 'm'"):
        sharding.causal_conv1d_fn(*arguments, split_sizes=(4, 4), mesh=mesh(m=2), channel_axis="m")
    with pytest.raises(Unsupported, match="write_indices: expected its default, since tokens are split"):
        sharding.causal_conv1d_fn(*arguments, write_indices=index(3, 4), mesh=mesh(m=2), token_axis="m")
