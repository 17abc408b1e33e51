"""Gradients of the prologue and of the gated short convolution against derivatives of their formulas in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl import causal_conv1d, gated_delta_prologue, gated_short_conv

BACKENDS = "xla", "mosaic_gpu_interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
HEADS = dict(num_k_heads=1, num_v_heads=2, head_k_dim=128, head_v_dim=64)
ODD = dict(num_k_heads=2, num_v_heads=2, head_k_dim=20, head_v_dim=24)


def random(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def prologue(arrays, starts, heads, lower_bound=None):
    """The formula, for autodiff."""
    x, (hk, hv, size, _) = arrays["x"], heads.values()
    leading = x.shape[:-1]
    y, states = causal_conv1d(
        x,
        arrays["weight"],
        arrays["bias"],
        arrays["initial_states"],
        starts,
        activation="silu",
        backend="xla",
    )
    q, k, v = jnp.split(y, (hk * size, 2 * hk * size), axis=-1)
    q, k = (part.reshape(*leading, hk, size) for part in (q, k))
    norm = lambda part: part / jnp.sqrt((part * part).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    live = jnp.ones(leading, bool) if starts is None else jnp.arange(x.shape[0]) < starts[-1]
    A_log, z = arrays["A_log"], arrays["a"] + arrays["dt_bias"]
    if z.ndim > x.ndim:
        A_log = A_log[:, None]
    g = -jnp.exp(A_log) * jax.nn.softplus(z)
    if lower_bound is not None:
        g = lower_bound * jax.nn.sigmoid(jnp.exp(A_log) * z)
    g = jnp.where(live.reshape(*live.shape, *(1,) * (g.ndim - live.ndim)), g, 0.0)
    beta = jnp.where(live[..., None], jax.nn.sigmoid(arrays["b"]), 0.0)
    return norm(q) * 0.5, norm(k), v.reshape(*leading, hv, -1), g, beta, states


def compare(function, formula, arrays):
    """Gradients of a random combination of all results."""

    def loss(run):
        def total(arrays):
            found = [result for result in run(arrays) if result is not None]
            return sum((random(*result.shape, seed=9) * result).sum() for result in found)

        return jax.jit(jax.grad(total))(arrays)  # one program, where each operation would be one

    got, want = loss(function), loss(formula)
    for name, gradient in want.items():
        assert got[name].dtype == arrays[name].dtype
        scale = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(got[name], gradient, rtol=2e-4, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("leading", "heads", "channel", "lower_bound"),
    [((20,), HEADS, False, None), ((2, 9), HEADS, True, -3.0), ((20,), ODD, True, None)],
    ids=["packed", "dense", "odd"],
)
def test_gradients_of_the_prologue(backend, leading, heads, channel, lower_bound):
    hk, hv, of_k, of_v = heads.values()
    dim, last = 2 * hk * of_k + hv * of_v, (hv, of_k)[: 1 + channel]
    starts = jnp.array([0, 11, 11, 17], jnp.int32) if len(leading) == 1 else None
    rows = 3 if len(leading) == 1 else 2
    arrays = dict(
        x=random(*leading, dim), weight=random(dim, 4), bias=random(dim), initial_states=random(rows, 3, dim),
        a=4 * random(*leading, *last), b=random(*leading, hv), A_log=0.5 * random(hv), dt_bias=random(*last, seed=1),
    )  # fmt: skip

    def run(arrays):
        options = dict(q_scale=0.5, lower_bound=lower_bound, backend=backend)
        return gated_delta_prologue(query_start_loc=starts, **arrays, **heads, **options)

    compare(run, lambda arrays: prologue(arrays, starts, heads, lower_bound), arrays)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_of_one_result_in_16_bits(backend):
    """No gradient where no loss depends on an argument; NaN behind the last row goes nowhere."""
    dim, starts = 384, jnp.array([0, 12], jnp.int32)
    x = random(15, dim, dtype="bfloat16").at[12:].set(jnp.nan)
    b = random(15, 2, dtype="bfloat16").at[12:].set(jnp.nan)

    def loss(x, b):
        found = gated_delta_prologue(
            x, random(dim, 4), query_start_loc=starts, b=b, **HEADS, norm_rounding="none", backend=backend
        )
        return found.k.astype(jnp.float32).sum()

    dx, db = jax.jit(jax.grad(loss, (0, 1)))(x, b)
    assert dx.dtype == db.dtype == jnp.bfloat16
    assert not db.astype(jnp.float32).any()
    dx = np.asarray(dx, np.float32)
    assert np.isfinite(dx).all()
    assert dx[:12, 128:256].any()
    assert not dx[12:].any()
    assert not dx[:, :128].any()
    assert not dx[:, 256:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("leading", "dim", "offsets", "activation"),
    [
        ((20,), 128, None, "silu"), ((2, 9), 128, (0, 16, 160), "silu"), ((61,), 128, (128, 256, 0), None),
        ((2, 30), 256, None, "silu"), ((20,), 40, None, None),
    ],
    ids=["packed", "overlapping", "blocks", "tiles", "narrow"],
)  # fmt: skip
def test_gradients_of_the_gated_convolution(backend, leading, dim, offsets, activation):
    starts = None
    if len(leading) == 1:
        starts = jnp.array([0, leading[0] - 9, leading[0] - 3], jnp.int32)
    arrays = dict(
        bcx=random(*leading, 3 * dim),
        weight=random(dim, 3),
        bias=random(dim),
        initial_states=random(2, 2, dim),
    )

    def run(arrays):
        options = dict(channel_offsets=offsets, activation=activation, backend=backend)
        return gated_short_conv(query_start_loc=starts, **arrays, **options)

    def formula(arrays):
        first, second, third = offsets or (0, dim, 2 * dim)
        bcx = arrays["bcx"]
        u = bcx[..., first : first + dim] * bcx[..., third : third + dim]
        others = {name: array for name, array in arrays.items() if name != "bcx"}
        c, states = causal_conv1d(u, query_start_loc=starts, **others, activation=activation, backend="xla")
        return bcx[..., second : second + dim] * c, states

    compare(run, formula, arrays)


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_gradients_without_tokens_on_xla(leading):
    dim, starts = 384, jnp.array([0, 0], jnp.int32) if len(leading) == 1 else None
    given = dict(x=random(*leading, dim), weight=random(dim, 4), a=random(*leading, 2, 128), A_log=random(2))

    def loss(given):
        found = gated_delta_prologue(**given, query_start_loc=starts, **HEADS, backend="xla")
        return sum(result.sum() for result in jax.tree.leaves(found))

    for name, gradient in jax.grad(loss)(given).items():
        assert gradient.shape == given[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("kernel", BACKENDS[1:])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_the_gated_convolution_in_16_bits(dtype, kernel):
    """One pass over the slices has the values of the composed one; what lies behind the last row goes nowhere."""
    dim, starts = 128, jnp.array([0, 2, 2, 40, 41], jnp.int32)
    bcx = random(48, 3 * dim, dtype=dtype).at[41:].set(jnp.nan)
    weight, bias = random(dim, 4, dtype=dtype), random(dim, dtype=dtype)
    upstream = random(48, dim, dtype=dtype, seed=5).at[41:].set(jnp.nan)

    def gradients(bcx, backend, wide=0):
        def loss(bcx, weight, bias):
            options = dict(query_start_loc=starts, channel_offsets=(0, dim, 2 * dim), backend=backend)
            found = gated_short_conv(jnp.pad(bcx, ((0, 0), (0, wide))), weight, bias, **options)
            return (jnp.where(jnp.isnan(upstream), 0, upstream) * found.out).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(bcx, weight, bias)

    found, composed = gradients(bcx, kernel), gradients(bcx, kernel, wide=8)
    assert not np.asarray(found[0][41:], np.float32).any()
    for got, want in zip(found, composed, strict=True):
        assert got.dtype == jnp.dtype(dtype)
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-3)


def test_the_gated_convolution_is_differentiated_in_one_pass():
    """Two kernels in the whole program of its gradients: the pass over the tokens, and its sums."""
    weight, starts = random(256, 3, dtype="bfloat16"), jnp.array([0, 40], jnp.int32)

    def run(bcx, upstream):
        def loss(bcx):
            return gated_short_conv(bcx, weight, query_start_loc=starts, backend="mosaic_gpu_interpret").out

        return jax.vjp(loss, bcx)[1](upstream)

    jaxpr = str(jax.make_jaxpr(run)(random(40, 768, dtype="bfloat16"), random(40, 256, dtype="bfloat16")))
    assert "backward_sums" in jaxpr
    assert "concatenate" not in jaxpr
