"""The gated short convolution against the reference, bit for bit without an activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import reference_prologue
from oracle.numerics import typed
from pallas_impl import gated_short_conv_fn, gated_short_conv_update

BACKENDS = "xla", "mosaic_gpu_interpret"
DIM = 128


def random(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def prefill(dtype="bfloat16", channels=3 * DIM, **changes):
    """Rows of 12, 1 and 5 tokens, the last one padding, and two tokens behind them."""
    given = dict(
        bcx=random(20, channels, dtype=dtype), weight=random(DIM, 3, dtype=dtype), bias=random(DIM, dtype=dtype),
        conv_states=random(5, 2, DIM, dtype=dtype), query_start_loc=jnp.array([0, 12, 13, 18], jnp.int32),
        cache_indices=jnp.array([2, 0, -1], jnp.int32), has_initial_state=jnp.array([True, False, True]),
    )  # fmt: skip
    return given | changes


def step(*leading, dtype="bfloat16", **changes):
    """A decode step of three rows, the second one padding."""
    given = dict(
        bcx=random(*leading, 3 * DIM, dtype=dtype), weight=random(DIM, 3, dtype=dtype), bias=None,
        conv_states=random(5, 4, DIM, dtype=dtype), cache_indices=jnp.array([2, 9, 0], jnp.int32),
    )  # fmt: skip
    return given | changes


def expected(operation, given):
    arrays = {
        name: typed(np.asarray(value)) if isinstance(value, jax.Array) else value
        for name, value in given.items()
    }
    return getattr(reference_prologue, operation)(**arrays)


def check(found, want, exact):
    for got, expect in zip(found, want, strict=True):
        expect = typed(expect)
        got = typed(np.asarray(got))
        assert (got.shape, got.dtype) == (expect.shape, expect.dtype)
        if exact:
            assert np.array_equal(got.bits, expect.bits)
        else:
            np.testing.assert_allclose(got.values(), expect.values(), rtol=2**-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "options", [{}, dict(channels=400, channel_offsets=(8, 272, 64)), dict(activation="silu")]
)
def test_a_prefill(backend, dtype, options):
    given = prefill(dtype, **options)
    channels = given.pop("channels", None)
    assert channels is None or given["bcx"].shape[1] == channels
    found = gated_short_conv_fn(**given, backend=backend)
    exact = dtype != "float32" and "activation" not in options
    check(found, expected("gated_short_conv_fn", given), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("leading", "options"),
    [((3,), {}), ((3, 2), {}), ((3, 6), {}), ((3, 2), dict(num_accepted_tokens=jnp.array([1, 2, 3]))),
     ((3,), dict(state_layout="back")), ((3, 2), dict(window_out=random(3, 2, 2, DIM), commit=False))],
    ids=["token", "rows", "long", "rolling", "back", "windows"],
)  # fmt: skip
def test_a_step(backend, leading, options):
    given = step(*leading, **options)
    check(gated_short_conv_update(**given, backend=backend), expected("gated_short_conv_update", given), True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dead_stays_zero(backend):
    given = prefill()
    given["bcx"] = given["bcx"].at[13:].set(jnp.nan)
    out = np.asarray(gated_short_conv_fn(**given, backend=backend).out)
    assert not out.view(np.uint16)[13:].any()
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize("leading", [None, (3,), (3, 8)], ids=["prefill", "token", "long"])
def test_one_kernel(leading):
    given = prefill() if leading is None else step(*leading)
    function = gated_short_conv_fn if leading is None else gated_short_conv_update
    arrays = {name: value for name, value in given.items() if value is not None}
    absent = {name: None for name, value in given.items() if value is None}
    jitted = jax.jit(lambda arrays: function(**arrays, **absent, backend="mosaic_gpu"))
    text = jitted.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    assert "output_operand_alias<" in text
    assert "stablehlo.multiply" not in text
    assert "stablehlo.slice" not in text


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
def test_the_same_bits_on_every_path(backend):
    """Two tokens a row as a prefill, as one step and as two, of a dim that no tile divides as well."""
    for dim in (128, 152):
        bcx, weight, pool = random(3, 2, 3 * dim), random(dim, 3), random(5, 2, dim)
        slots, flags = jnp.array([2, -1, 0], jnp.int32), jnp.ones((3,), bool)
        both = gated_short_conv_update(bcx, weight, None, pool, slots, backend=backend)
        starts = jnp.arange(4, dtype=jnp.int32) * 2
        rows = gated_short_conv_fn(
            bcx.reshape(6, -1), weight, None, pool, starts, slots, flags, backend=backend
        )
        one = gated_short_conv_update(bcx[:, 0], weight, None, pool, slots, backend=backend)
        two = gated_short_conv_update(bcx[:, 1], weight, None, one.conv_states, slots, backend=backend)
        want = np.asarray(both.out).view(np.uint16)
        assert np.array_equal(np.asarray(rows.out).view(np.uint16).reshape(want.shape), want)
        assert np.array_equal(np.stack([np.asarray(a.out).view(np.uint16) for a in (one, two)], 1), want)
        for found in (rows, two):
            assert np.array_equal(
                np.asarray(found.conv_states).view(np.uint16), np.asarray(both.conv_states).view(np.uint16)
            )
