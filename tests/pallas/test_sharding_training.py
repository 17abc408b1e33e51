"""`sharding.causal_conv1d`: the training form over a mesh, values and gradients against one device's."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import pallas_impl
from oracle.contract import Unsupported
from pallas_impl import context_parallel, sharding
from tests.tools.kernel_results import written_into_kernels

if os.environ.get("JAX_PLATFORMS") == "cpu":  # not with --gpu, where other files may have started JAX
    jax.config.update("jax_num_cpu_devices", 8)

AXES = dict(batch_axis="data", token_axis="context", channel_axis="model")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def index(*values):
    return jnp.asarray(values, jnp.int32)


TAPS = dict(weight=normal(0, 8, 4), bias=normal(1, 8))
DENSE = dict(x=normal(2, 4, 6, 8), **TAPS)
PACKED = dict(x=normal(3, 24, 8), query_start_loc=index(0, 3, 17, 22), **TAPS)
STATES = dict(initial_states=normal(4, 4, 3, 8))
CASES = {
    "rows": (DENSE | STATES, dict(batch_axis="data")),
    "channels": (DENSE | STATES, dict(channel_axis="model")),
    "packed channels": (PACKED, dict(channel_axis="model")),
    "tokens": (PACKED, dict(token_axis="context")),
    "tokens of rows": (DENSE, dict(token_axis="context")),
    "everything": (DENSE, AXES),
}


def loss(run, arrays):
    return sum((result**2).sum() for result in run(**arrays) if result is not None)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    ("kind", "pool", "together", "checked"),
    [(AUTO, "float32", 8, True), (EXPLICIT, "float32", 1, False), (AUTO, "bfloat16", 8, False)],
)
def test_gradients_of_a_prefill_with_split_tokens_on_xla(kind, pool, together, checked, monkeypatch):
    """Through what devices tell each other: the tokens before a cut, and the rows' new windows."""
    monkeypatch.setattr(context_parallel, "TOGETHER", together)
    arrays = PACKED | dict(
        x=normal(3, 8, 8), query_start_loc=index(0, 1, 7), conv_states=normal(5, 4, 3, 8).astype(pool)
    )
    given = dict(
        cache_indices=index(2, 0),
        has_initial_state=jnp.asarray([True, True]),
        activation="silu",
        backend="xla",
    )
    starts = arrays.pop("query_start_loc")
    alone = functools.partial(pallas_impl.causal_conv1d_fn, query_start_loc=starts, **given)
    wanted = jax.grad(functools.partial(loss, alone))(arrays)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=jax.devices()[:2])
    split = functools.partial(
        sharding.causal_conv1d_fn, query_start_loc=starts, mesh=mesh, token_axis="d", **given
    )
    if checked:  # a shard_map of the caller's own, which types what varies

        def split(x, **others):
            part = functools.partial(
                context_parallel.causal_conv1d_fn, query_start_loc=starts, axis_name="d", **given
            )
            specs = P("d"), P()
            run = jax.shard_map(
                lambda x, others: tuple(part(x, **others)), mesh=mesh, in_specs=specs, out_specs=specs
            )
            return run(x, others)

    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(functools.partial(loss, split)))(arrays)
    for name, gradient in found.items():
        tolerance = 1e-4 if pool == "float32" else 0.05
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32),
            np.asarray(wanted[name], np.float32),
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rows", EXPLICIT), ("channels", AUTO), ("packed channels", EXPLICIT), ("tokens", EXPLICIT), ("tokens", AUTO),
     ("tokens of rows", EXPLICIT), ("everything", AUTO), ("everything", EXPLICIT)],
)  # fmt: skip
def test_values_and_gradients(name, kind):
    arrays, axes = CASES[name]
    plain = functools.partial(pallas_impl.causal_conv1d, activation="silu", backend="xla")
    if "token_axis" in axes:  # which has no final states
        plain = lambda plain=plain, **arrays: (plain(**arrays).out,)  # noqa: E731
    shape = tuple(2 if axis in axes.values() else 1 for axis in AXES.values())
    mesh = jax.make_mesh(
        shape, tuple(AXES.values()), axis_types=(kind,) * 3, devices=jax.devices("cpu")[: np.prod(shape)]
    )
    split = functools.partial(sharding.causal_conv1d, mesh=mesh, activation="silu", backend="xla", **axes)
    floats = {n: a for n, a in arrays.items() if n != "query_start_loc"}
    rest = {n: a for n, a in arrays.items() if n not in floats}
    for got, want in zip(jax.jit(split)(**arrays), plain(**arrays), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    wanted = jax.grad(lambda floats: loss(plain, floats | rest))(floats)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(lambda floats: loss(split, floats | rest)))(floats)
    for n in floats:
        np.testing.assert_allclose(found[n], wanted[n], rtol=1e-4, atol=1e-4)


def test_batches_of_packed_rows():
    starts = index(0, 5, 12, 0, 1, 9)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    arrays = PACKED | dict(query_start_loc=starts)
    got = sharding.causal_conv1d(**arrays, mesh=mesh, batch_axis="data", backend="xla")
    for half in range(2):
        part = arrays | dict(x=PACKED["x"][12 * half :][:12], query_start_loc=starts[3 * half :][:3])
        want = pallas_impl.causal_conv1d(**part, backend="xla")
        np.testing.assert_array_equal(got.out[12 * half :][:12], want.out)
        np.testing.assert_array_equal(got.conv_states[2 * half :][:2], want.conv_states)


@pytest.mark.parametrize("name", ["rows", "channels", "tokens", "tokens of rows"])
def test_kernels_lower_for_cuda(name):
    arrays, axes = CASES[name]
    mesh = AbstractMesh((2,), tuple(axes.values()), axis_types=(AxisType.Auto,))
    wide = {n: jnp.tile(a, (64,) + (1,) * (a.ndim - 1)) if n in TAPS else jnp.tile(a, 64) if a.ndim > 1 else a
            for n, a in arrays.items()}  # fmt: skip
    split = functools.partial(sharding.causal_conv1d, mesh=mesh, backend="mosaic_gpu", **axes)
    if name == "tokens of rows":  # one row after another: one is enough
        wide["x"] = wide["x"][:1]
    starts = wide.pop("query_start_loc", None)

    def run(floats):
        return jax.grad(lambda floats: loss(split, floats | dict(query_start_loc=starts)))(floats)

    lowered = jax.jit(run).trace(wide).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert "custom_call @mosaic_gpu" in text
    assert "all_gather" not in text
    assert ("collective_permute" in text) == ("token_axis" in axes)
    assert written_into_kernels(lowered) == []


def test_bad_arguments():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])
    split = functools.partial(sharding.causal_conv1d, mesh=mesh)
    with pytest.raises(Unsupported, match="initial_states: expected None, since tokens are split over 'd'"):
        split(**DENSE, **STATES, token_axis="d")
    with pytest.raises(ValueError, match="x: expected axis 0 to be a multiple of 2"):
        split(**DENSE | dict(x=DENSE["x"][:3]), batch_axis="d")
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk_size'"):
        split(**DENSE, batch_axis="d", chunk_size=1)
