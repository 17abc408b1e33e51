"""The layers with nnx.Conv's own parameters, and `swap`: the same values, the very variables, nothing else replaced."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if importlib.util.find_spec("flax") is None or importlib.util.find_spec("equinox") is None:
    pytest.skip("needs flax and equinox: pip install 'twinconv[flax,equinox]'", allow_module_level=True)

import equinox
from flax import linen, nnx

from pallas_impl.modules import equinox as equinox_layers
from pallas_impl.modules import linen as linen_layers
from pallas_impl.modules import nnx as layers

DIM, WIDTH = 8, 4
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, DIM)), jnp.float32)


def conv(padding="CAUSAL", **options):
    options = dict(feature_group_count=DIM, use_bias=True, rngs=nnx.Rngs(0)) | options
    return nnx.Conv(DIM, DIM, (WIDTH,), padding=padding, **options)


class Net(nnx.Module):
    def __init__(self):
        self.causal, self.left = conv(), conv(((WIDTH - 1, 0),), use_bias=False, dtype=jnp.bfloat16)
        self.same, self.dense = conv("SAME"), conv(feature_group_count=1)
        self.apart, self.strided = conv(kernel_dilation=2), conv(strides=2)
        self.blocks = nnx.List([conv()])


def test_swap_replaces_causal_depthwise_convolutions_and_says_which():
    net, before = Net(), Net()
    kernel = net.causal.kernel
    found = layers.swap(net)
    assert sorted(found) == ["blocks.0", "causal", "left"]
    assert set(found.values()) == {"Conv"}
    assert net.causal.kernel is kernel
    for name in ("causal", "left"):
        got, want = getattr(net, name)(X), getattr(before, name)(X)
        assert got.dtype == want.dtype
        tolerance = 1e-6 if got.dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance)
    assert layers.swap(net) == {}
    assert jax.tree.structure(nnx.state(net)) == jax.tree.structure(nnx.state(before))


def test_a_cache_that_is_given_is_read():
    layer = layers.ShortConv(DIM, WIDTH, activation="silu", rngs=nnx.Rngs(1))
    whole = layer(X)
    head, cache = layer(X[:, :4], want_cache=True)
    tail, cache = layer(X[:, 4:], cache)
    np.testing.assert_array_equal(jnp.concatenate([head, tail], axis=1), whole)
    np.testing.assert_array_equal(cache, X[:, -WIDTH + 1 :])


def test_partition_metadata_stays():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None, "model"))
    with jax.set_mesh(jax.make_mesh((1,), ("model",))):
        layer = layers.ShortConv(DIM, WIDTH, kernel_init=init, rngs=nnx.Rngs(0))
    assert nnx.get_partition_spec(nnx.state(layer))["kernel"].get_value()[-1] == "model"


def test_linen():
    layer = linen_layers.ShortConv(WIDTH)
    own = linen.Conv(DIM, (WIDTH,), padding="CAUSAL", feature_group_count=DIM)
    parameters = own.init(jax.random.key(0), X)
    got = layer.apply(parameters, X, want_cache=False)
    np.testing.assert_allclose(got.out, own.apply(parameters, X), rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(layer.init(jax.random.key(0), X)) == jax.tree.structure(parameters)


def test_equinox():
    """The values of its own depthwise convolution, of a batch and under vmap over rows; a cache that is given is read."""
    key = jax.random.key(0)
    layer = equinox_layers.ShortConv(DIM, WIDTH, activation="silu", key=key)
    own = equinox.nn.Conv1d(DIM, DIM, WIDTH, groups=DIM, padding=((WIDTH - 1, 0),), key=key)
    own = equinox.tree_at(lambda c: (c.weight, c.bias), own, (layer.weight[:, None], layer.bias[:, None]))
    want = jax.nn.silu(jax.vmap(own)(X.swapaxes(1, 2)).swapaxes(1, 2))
    np.testing.assert_allclose(layer(X).out, want, rtol=1e-6, atol=1e-6)
    head, cache = jax.vmap(layer)(X[:, :4])
    tail, _ = jax.vmap(layer)(X[:, 4:], cache)
    np.testing.assert_array_equal(jnp.concatenate([head, tail], axis=1), layer(X).out)
    total = lambda layer: jax.vmap(lambda x: layer(x, want_cache=False).out)(X).sum()  # noqa: E731
    assert equinox.filter_grad(total)(layer).weight.shape == (DIM, WIDTH)
