"""Heads split over a mesh inside `jax.shard_map`: every device has q, k and v of its own heads."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_impl import (
    Unsupported,
    gated_delta_prologue,
    gated_delta_prologue_fn,
    gated_delta_prologue_update,
    gated_short_conv,
    gated_short_conv_fn,
    gated_short_conv_update,
)
from tests.tools.kernel_results import written_into_kernels

if os.environ.get("JAX_PLATFORMS") == "cpu":  # not with --gpu, where other files may have started JAX
    jax.config.update("jax_num_cpu_devices", 2)

HK, HV, K, V, TOKENS = 2, 4, 16, 8, 12
WHOLE = dict(num_k_heads=HK, num_v_heads=HV, head_k_dim=K, head_v_dim=V, backend="xla")
PART = WHOLE | dict(num_k_heads=HK // 2, num_v_heads=HV // 2)
SIZES = HK * K, HK * K, HV * V
STARTS, SLOTS = jnp.array([0, 5, 12], jnp.int32), jnp.array([2, 0], jnp.int32)
OF_TOKENS, OF_CHANNELS, OF_POOL = P(None, "heads"), P("heads"), P(None, None, "heads")


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])


def random(*shape):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape), jnp.float32)


def device_order():
    """Channels as the devices have them, first all of the first one's."""
    parts = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return np.concatenate([np.split(part, 2)[device] for device in range(2) for part in parts])


def test_a_prefill_over_heads(mesh):
    dim, order = sum(SIZES), device_order()
    x, weight, bias, pool = random(TOKENS, dim), random(dim, 4), random(dim), random(3, 3, dim)
    gates = dict(a=random(TOKENS, HV), b=random(TOKENS, HV), A_log=random(HV), dt_bias=random(HV))
    want = gated_delta_prologue_fn(x, weight, bias, pool, STARTS, SLOTS, **gates, **WHOLE)

    def part(x, weight, bias, pool, gates, starts, slots):
        return tuple(gated_delta_prologue_fn(x, weight, bias, pool, starts, slots, **gates, **PART))

    of_gates = dict(a=OF_TOKENS, b=OF_TOKENS, A_log=OF_CHANNELS, dt_bias=OF_CHANNELS)
    specs = OF_TOKENS, OF_CHANNELS, OF_CHANNELS, OF_POOL, of_gates, P(), P()
    split = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(*(OF_TOKENS,) * 5, OF_POOL))
    found = jax.jit(split)(x[:, order], weight[order], bias[order], pool[:, :, order], gates, STARTS, SLOTS)
    for got, expected in zip(found[:5], want[:5], strict=True):
        assert np.array_equal(got, expected)
    assert np.array_equal(found[5], want.conv_states[:, :, order])


def test_gradients_over_heads(mesh):
    dim, order = sum(SIZES), device_order()
    x, weight, a, A_log = random(TOKENS, dim), random(dim, 4), random(TOKENS, HV), random(HV)

    def front(x, weight, a, A_log, starts, heads):
        return tuple(gated_delta_prologue(x, weight, query_start_loc=starts, a=a, A_log=A_log, **heads))[:4]

    specs = OF_TOKENS, OF_CHANNELS, OF_TOKENS, OF_CHANNELS, P()
    split = jax.shard_map(
        lambda *arrays: front(*arrays, PART), mesh=mesh, in_specs=specs, out_specs=(OF_TOKENS,) * 4
    )
    gradients = lambda run: jax.jit(  # noqa: E731
        jax.grad(lambda *given: sum(jnp.sin(result).sum() for result in run(*given, STARTS)), (0, 1, 2, 3))
    )
    found = gradients(split)(x[:, order], weight[order], a, A_log)
    dx, dweight, da, dA_log = gradients(lambda *arrays: front(*arrays, WHOLE))(x, weight, a, A_log)
    for got, expected in zip(found, (dx[:, order], dweight[order], da, dA_log), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_channels_that_are_split_outside_are_refused(mesh):
    dim = sum(SIZES)
    x = jax.device_put(random(TOKENS, dim), NamedSharding(mesh, OF_TOKENS))
    with pytest.raises(Unsupported, match="x: expected axis 1 whole on every device"):
        gated_delta_prologue_fn(
            x, random(dim, 4), None, None, STARTS, **WHOLE | dict(backend="mosaic_gpu_interpret")
        )


# Of one device: its own heads, or its own channels of a gated convolution.
LARGE = dict(num_k_heads=1, num_v_heads=1, head_k_dim=128, head_v_dim=128, backend="mosaic_gpu")
FRONTS = {
    "front": (gated_delta_prologue_fn, dict(x=(TOKENS, 384), conv_states=(3, 3, 384)), LARGE, False),
    "rows that are not in front": (
        gated_delta_prologue_fn, dict(x=(TOKENS, 384), conv_states=(3, 4, 384)), LARGE | dict(state_layout="back"), False
    ),
    "step": (gated_delta_prologue_update, dict(x=(3, 384), conv_states=(3, 3, 384)), LARGE, False),
    "training": (gated_delta_prologue, dict(x=(TOKENS, 384), initial_states=(2, 3, 384)), LARGE, True),
    "gated": (gated_short_conv_fn, dict(bcx=(TOKENS, 768), conv_states=(3, 3, 256)), {}, False),
    "gated, step": (gated_short_conv_update, dict(bcx=(3, 768), conv_states=(3, 3, 256)), {}, False),
    "gated, training": (gated_short_conv, dict(bcx=(TOKENS, 768), initial_states=(2, 3, 256)), {}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", FRONTS)
def test_kernels_lower_for_two_gpus(name):
    """Nothing is sent, and no slice is written into a kernel's result; gradients in training."""
    operation, sizes, options, trains = FRONTS[name]
    dim = next(reversed(sizes.values()))[-1]
    sizes = sizes | dict(weight=(dim, 4), bias=(dim,))
    shapes = {n: jax.ShapeDtypeStruct((2, *shape), jnp.bfloat16) for n, shape in sizes.items()}
    given = {} if "update" in operation.__name__ else dict(query_start_loc=STARTS)

    def results(arrays):
        return tuple(operation(**arrays, **given, **dict(backend="mosaic_gpu") | options))

    def loss(arrays):
        return sum(result.astype(jnp.float32).sum() for result in results(arrays) if result is not None)

    def part(stacks):
        found = (jax.grad(loss) if trains else results)({n: stack[0] for n, stack in stacks.items()})
        return jax.tree.map(lambda a: a[None], found)

    mesh, each = AbstractMesh((2,), ("heads",), axis_types=(AxisType.Auto,)), P("heads")
    split = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(each,), out_specs=each))
    lowered = split.trace(shapes).lower(lowering_platforms=("cuda",))
    assert "custom_call @mosaic_gpu" in lowered.as_text()
    assert not re.search(r"stablehlo\.(all_|collective_)", lowered.as_text())
    assert written_into_kernels(lowered) == []
