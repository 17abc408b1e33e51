"""The prologue of the gated delta rule against the plain operation with the reference's norm behind it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle.contract_prologue import PrologueFnCall, PrologueOutput, PrologueUpdateCall, PrologueWindowOutput
from oracle.numerics import TypedArray
from oracle.reference_prologue import separate_norm
from pallas_impl import plain_prologue
from pallas_impl.api import (
    causal_conv1d_fn,
    causal_conv1d_update,
    gated_delta_prologue_fn,
    gated_delta_prologue_update,
)
from tests.tools.covering import on_backends

BACKENDS = "xla", "mosaic_gpu_interpret"
SMALL = dict(num_k_heads=1, num_v_heads=2, head_k_dim=128, head_v_dim=64)  # one kernel
ODD = dict(num_k_heads=2, num_v_heads=2, head_k_dim=20, head_v_dim=30)  # composed
HEADS = {"small": SMALL, "odd": ODD}
BITS = {2: np.uint16, 4: np.uint32}


def random(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def dim_of(heads):
    return 2 * heads["num_k_heads"] * heads["head_k_dim"] + heads["num_v_heads"] * heads["head_v_dim"]


def gates(leading, heads, channel=False, dtype="bfloat16"):
    last = (heads["num_v_heads"], heads["head_k_dim"])[: 1 + channel]
    return dict(
        a=random(*leading, *last, dtype=dtype, seed=1), b=random(*leading, last[0], dtype=dtype, seed=2),
        A_log=random(last[0], dtype="float32", seed=3), dt_bias=random(*last, seed=4),
    )  # fmt: skip


def prefill(heads, dtype="bfloat16", **changes):
    """Rows of 9, 1 and 8 tokens, the last one padding, and three tokens behind them."""
    dim = dim_of(heads)
    given = dict(
        x=random(21, dim, dtype=dtype), weight=random(dim, 4, dtype=dtype), bias=random(dim, dtype=dtype),
        conv_states=random(5, 3, dim, dtype=dtype), query_start_loc=jnp.array([0, 9, 10, 18], jnp.int32),
        cache_indices=jnp.array([2, 0, -1], jnp.int32), has_initial_state=jnp.array([True, False, True]),
    )  # fmt: skip
    return given | changes


def step(heads, *leading, dtype="bfloat16", **changes):
    """A decode step of three rows, the second one padding."""
    dim = dim_of(heads)
    given = dict(
        x=random(*leading, dim, dtype=dtype), weight=random(dim, 4, dtype=dtype), bias=None,
        conv_states=random(5, 5, dim, dtype=dtype), cache_indices=jnp.array([2, 9, 0], jnp.int32),
    )  # fmt: skip
    return given | changes


def same_bits(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    kind = BITS[want.dtype.itemsize]
    assert np.array_equal(np.asarray(got).view(kind), np.asarray(want).view(kind))


def check_heads(found, plain, record, arguments):
    """q, k and v of the result are what the reference makes of the plain operation's."""
    y, dtype = np.asarray(plain), str(plain.dtype)
    stored = TypedArray(dtype, y.view(np.uint16) if dtype == "bfloat16" else y)
    sizes = record(**{**dict.fromkeys(record.OPTIONAL), **arguments}).check()
    for name, part in zip("qkv", separate_norm(stored, sizes, arguments), strict=True):
        got = getattr(found, name)
        assert (got.shape, str(got.dtype)) == (part.shape, dtype)
        kind = BITS[got.dtype.itemsize]
        assert np.array_equal(np.asarray(got).view(kind), part.data.view(kind))


def expected_gates(given, lower_bound=None):
    a, b, A_log, dt_bias = (np.asarray(given[name], np.float64) for name in ("a", "b", "A_log", "dt_bias"))
    if dt_bias.ndim == 2:
        A_log = A_log[:, None]
    z = a + dt_bias
    if lower_bound is None:
        g = -np.exp(A_log) * np.logaddexp(0, z)
    else:
        g = lower_bound / (1 + np.exp(-np.exp(A_log) * z))
    return g, 1 / (1 + np.exp(-b))


# (each dtype, heads and step once: the conformance suite has them together)
@on_backends(few=BACKENDS, every=(), strength=1, dtype=["bfloat16", "float16", "float32"], heads=HEADS)
def test_a_prefill_is_the_convolution_and_a_norm(backend, dtype, heads):
    heads = HEADS[heads]
    given = prefill(heads, dtype)
    more = gates((21,), heads)
    found = gated_delta_prologue_fn(**given, **heads, **more, q_scale=0.3, backend=backend)
    plain = causal_conv1d_fn(**given, activation="silu", backend=backend)
    assert isinstance(found, PrologueOutput)
    check_heads(found, plain.out, PrologueFnCall, given | heads | dict(q_scale=0.3))
    same_bits(found.conv_states, plain.conv_states)
    g, beta = expected_gates(more)
    assert found.g.dtype == found.beta.dtype == jnp.float32
    np.testing.assert_allclose(found.g[:10], g[:10], rtol=2e-6)
    np.testing.assert_allclose(found.beta[:10], beta[:10], rtol=1e-6)
    for result in found[:5]:
        assert not np.asarray(result, np.float32)[10:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gates_of_channels(backend, schedule, lower_bound):
    given, more = prefill(SMALL), gates((21,), SMALL, channel=True)
    options = dict(lower_bound=lower_bound, beta_rounding="storage", schedule=schedule, qk_l2norm=False)
    found = gated_delta_prologue_fn(**given, **SMALL, **more, **options, backend=backend)
    g, beta = expected_gates(more, lower_bound)
    np.testing.assert_allclose(found.g[:10], g[:10], rtol=2e-6)
    np.testing.assert_allclose(found.beta[:10], beta[:10], rtol=2**-8)
    assert np.array_equal(found.beta, found.beta.astype(jnp.bfloat16).astype(jnp.float32))
    plain = causal_conv1d_fn(**given, activation="silu", backend=backend)
    check_heads(found, plain.out, PrologueFnCall, given | SMALL | dict(qk_l2norm=False))
    assert not np.asarray(found.g)[10:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_rounding_in_between(backend):
    given = prefill(SMALL)
    found = gated_delta_prologue_fn(**given, **SMALL, norm_rounding="none", backend=backend)
    wide = given | dict(x=given["x"].astype(jnp.float32))
    exact = gated_delta_prologue_fn(**wide, **SMALL, backend=backend)
    for name in "qkv":
        same_bits(getattr(found, name), getattr(exact, name).astype(jnp.bfloat16))
    assert found.g is None
    assert found.beta is None
    same_bits(found.conv_states, exact.conv_states)


STEPS = {
    "token": ((3,), {}), "rows": ((3, 2), {}), "long": ((3, 6), {}),
    "rolling": ((3, 2), dict(num_accepted_tokens=jnp.array([1, 2, 3]))),
    "tree": ((3, 2), dict(tree_parents=jnp.array([[-1, 0]] * 3), commit=False)), "back": ((3,), dict(state_layout="back")),
}  # fmt: skip


@on_backends(few=BACKENDS, every=(), strength=1, name=STEPS, heads=HEADS)
def test_a_step_is_the_convolution_and_a_norm(backend, heads, name):
    leading, options = STEPS[name]
    heads = HEADS[heads]
    given, more = step(heads, *leading, **options), gates(leading, heads)
    found = gated_delta_prologue_update(**given, **heads, **more, backend=backend)
    plain = causal_conv1d_update(**given, activation="silu", backend=backend)
    check_heads(found, plain.out, PrologueUpdateCall, given | heads)
    same_bits(found.conv_states, plain.conv_states)
    g, beta = expected_gates(more)
    np.testing.assert_allclose(found.g[::2], g[::2], rtol=2e-6)
    np.testing.assert_allclose(found.beta[::2], beta[::2], rtol=1e-6)
    for result in found[:5]:
        assert not np.asarray(result, np.float32)[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_every_step(backend):
    given = step(SMALL, 3, 2, window_out=random(3, 2, 3, dim_of(SMALL)), commit=False)
    found = gated_delta_prologue_update(**given, **SMALL, backend=backend)
    plain = causal_conv1d_update(**given, activation="silu", backend=backend)
    assert isinstance(found, PrologueWindowOutput)
    same_bits(found.window_out, plain.window_out)
    check_heads(found, plain.out, PrologueUpdateCall, given | SMALL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [SMALL, ODD], ids=["small", "odd"])
def test_what_is_dead_stays_zero(backend, heads):
    """NaN in the rows of padding and behind the last row, in x, a and b."""
    given, more = prefill(heads), gates((21,), heads)
    for arrays, name in ((given, "x"), (more, "a"), (more, "b")):
        arrays[name] = arrays[name].at[10:].set(jnp.nan)
    found = gated_delta_prologue_fn(**given, **heads, **more, q_scale=-1.0, backend=backend)
    for result in found[:5]:
        bits = np.asarray(result).view(BITS[result.dtype.itemsize])
        assert not bits[10:].any()
        assert np.isfinite(np.asarray(result, np.float32)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_calls_without_rows(backend, tokens):
    dim = dim_of(SMALL)
    starts = jnp.zeros((1 if tokens else 3,), jnp.int32)
    found = gated_delta_prologue_fn(
        random(tokens, dim),
        random(dim, 4),
        None,
        None,
        starts,
        **SMALL,
        **gates((tokens,), SMALL),
        backend=backend,
    )
    assert [a.shape for a in found[:5]] == [(tokens, 1, 128)] * 2 + [(tokens, 2, 64)] + [(tokens, 2)] * 2
    assert not any(np.asarray(a, np.float32).any() for a in found[:5])


def lowered(function, given, options):
    jitted = jax.jit(functools.partial(function, **options, backend="mosaic_gpu"))
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in given.items() if a is not None}
    absent = dict.fromkeys(name for name, a in given.items() if a is None)
    call = lambda arrays: jitted(**arrays, **absent)  # noqa: E731
    return jax.jit(call).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("leading", [None, (3,), (3, 8)], ids=["prefill", "token", "long"])
def test_one_kernel(leading, channel):
    given = prefill(SMALL) if leading is None else step(SMALL, *leading)
    function = gated_delta_prologue_fn if leading is None else gated_delta_prologue_update
    text = lowered(function, given | gates(leading or (21,), SMALL, channel), SMALL | dict(q_scale=0.5))
    assert text.count("mosaic_gpu_v2") == 1
    assert "output_operand_alias<" in text
    assert "stablehlo.exp" not in text
    assert "stablehlo.sqrt" not in text


def test_under_jit_with_a_donated_pool():
    given, more = step(SMALL, 3), gates((3,), SMALL)
    pool = given.pop("conv_states")
    want = gated_delta_prologue_update(conv_states=pool, **given, **more, **SMALL)
    run = jax.jit(
        lambda pool, given: gated_delta_prologue_update(conv_states=pool, **given, **SMALL), donate_argnums=0
    )
    found = run(pool.copy(), given | more)
    for got, expected in zip(found, want, strict=True):
        same_bits(got, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_bits_on_every_path(backend, dtype):
    """Two tokens a row as a prefill, as one step and as two; padding among the rows."""
    dim, pool = dim_of(SMALL), random(5, 3, dim_of(SMALL), dtype=dtype)
    x, weight, bias = random(3, 2, dim, dtype=dtype), random(dim, 4, dtype=dtype), random(dim, dtype=dtype)
    slots, options = jnp.array([2, -1, 0], jnp.int32), dict(**SMALL, q_scale=0.3, backend=backend)
    step = functools.partial(
        gated_delta_prologue_update, weight=weight, bias=bias, cache_indices=slots, **options
    )
    both = step(x, conv_states=pool)
    starts, flags = jnp.arange(4, dtype=jnp.int32) * 2, jnp.ones((3,), bool)
    rows = gated_delta_prologue_fn(x.reshape(6, dim), weight, bias, pool, starts, slots, flags, **options)
    one = step(x[:, 0], conv_states=pool)
    two = step(x[:, 1], conv_states=one.conv_states)
    for name in "qkv":
        want = getattr(both, name)
        same_bits(getattr(rows, name).reshape(want.shape), want)
        same_bits(jnp.stack([getattr(one, name), getattr(two, name)], axis=1), want)
    same_bits(rows.conv_states, both.conv_states)
    same_bits(two.conv_states, both.conv_states)
    y = causal_conv1d_update(x, weight, bias, pool, slots, activation="silu", backend=backend).out
    given = dict(x=x, weight=weight, bias=bias, conv_states=pool, cache_indices=slots, **SMALL, q_scale=0.3)
    check_heads(both, y, PrologueUpdateCall, given)


def test_an_inexact_root_and_quotient_are_put_right_xla():
    """XLA's division on a GPU is up to two units off, its root one: from any such neighbour the correctly rounded value is found."""
    rng = np.random.default_rng(0)
    edges = np.array(
        [0x00800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3FFFFFFF, 0x40000000,
         0x40800000, 0x7F000000, 0x7F7FFFFF]
    )  # fmt: skip
    totals = (
        np.concatenate([rng.integers(0x00800000, 0x7F800000, 20000), edges]).astype(np.int32).view(np.float32)
    )
    roots = np.sqrt(totals)
    for exact, value, wanted in (
        (plain_prologue.exact_root, totals, roots),
        (plain_prologue.exact_reciprocal, roots, np.float32(1) / roots),
    ):
        for off in range(-3, 4):
            near = (wanted.view(np.int32) + np.int32(off)).view(np.float32)
            np.testing.assert_array_equal(exact(value, near), wanted)
    odd = np.float32([np.inf, np.nan])
    np.testing.assert_array_equal(plain_prologue.inverse_root(odd), np.float32([0, np.nan]))
    slope = jax.grad(plain_prologue.inverse_root)(2.0)
    np.testing.assert_allclose(slope, -0.5 * 2**-1.5, rtol=1e-6)
