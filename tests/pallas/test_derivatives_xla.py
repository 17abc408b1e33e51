"""Derivatives of the operations in plain jax.numpy, through states and windows, against differences of their values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_impl

DIM, WIDTH = 3, 4
FLOATS = ("x", "weight", "bias", "conv_states", "window_out", "residual")


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def index(*values):
    return jnp.asarray(values, jnp.int32)


def prefill(columns=3, dtype="float32", tail=1, **more):
    """Rows of 5, 0, 2 and 1 tokens, the last one padding."""
    return dict(
        x=normal(0, 8 + tail, DIM, dtype=dtype), weight=normal(1, DIM, WIDTH, dtype=dtype),
        bias=normal(2, DIM, dtype=dtype), conv_states=normal(3, 9, columns, DIM, dtype=dtype),
        query_start_loc=index(0, 5, 5, 7, 8), cache_indices=index(2, 0, 4, -1),
        has_initial_state=jnp.asarray([True, True, False, True]), **more,
    )  # fmt: skip


def step(*shape, columns=3, dtype="float32", **more):
    """Rows 0 and 2 of three live."""
    return dict(
        x=normal(4, *(shape or (3,)), DIM, dtype=dtype), weight=normal(1, DIM, WIDTH, dtype=dtype),
        bias=normal(2, DIM, dtype=dtype), conv_states=normal(3, 9, columns, DIM, dtype=dtype),
        cache_indices=index(5, -1, 2), **more,
    )  # fmt: skip


ROWS = index(3, 6, 7)
WINDOWS = normal(6, 4, 3, WIDTH - 1, DIM)
CASES = {
    "prefill": ("causal_conv1d_fn", prefill(), {}),
    "prefill more columns": ("causal_conv1d_fn", prefill(columns=5), {}),
    "prefill back": ("causal_conv1d_fn", prefill(columns=5), dict(state_layout="back")),
    "prefill ring": (
        "causal_conv1d_fn", prefill(columns=5, cache_seqlens=index(7, 0, 1, 2), write_indices=index(2, 8, 6, 1)),
        dict(state_layout="ring", empty_rows="apply"),
    ),
    "snapshots": (
        "causal_conv1d_fn",
        prefill(
            write_indices=index(2, 8, 6, 1), track_indices=index(1, 3, -1, 7), track_lengths=index(2, 0, 9, 1),
            snapshot_indices=index(5, 7, -1, -1, -1, -1, 3, -1).reshape(4, 2), num_computed_tokens=index(1, 0, 0, 0),
            residual=normal(5, 9, DIM),
        ),
        dict(snapshot_block_size=3),
    ),
    "parts": ("causal_conv1d_fn", prefill() | dict(x=normal(0, 9, 6)), dict(channel_offset=2, split_sizes=(1, 2))),
    "decode": ("causal_conv1d_update", step(), {}),
    "decode many": ("causal_conv1d_update", step(3, 2, residual=normal(5, 3, 2, DIM)), {}),
    "packed": ("causal_conv1d_update", step(7) | dict(query_start_loc=index(0, 2, 3, 6)), dict(max_seqlen=3)),
    "rolling": (
        "causal_conv1d_update", step(3, 3, columns=6, num_accepted_tokens=index(2, 1, 4), write_indices=ROWS), {}
    ),
    "decode back": ("causal_conv1d_update", step(3, 2, columns=5), dict(state_layout="back")),
    "decode ring": (
        "causal_conv1d_update", step(3, 2, columns=5, cache_seqlens=index(1, 9, 8)), dict(state_layout="ring")
    ),
    "windows": (
        "causal_conv1d_update", step(3, 3, window_out=WINDOWS, window_indices=index(3, 0, 1), track_indices=ROWS), {}
    ),
    "tree": (
        "causal_conv1d_update",
        step(3, 3, window_out=WINDOWS, tree_parents=index(-1, 0, 0, -1, -1, -1, -1, 0, 1).reshape(3, 3)),
        dict(commit=False),
    ),
    "commit": (
        "commit_windows",
        dict(
            conv_states=normal(3, 9, 5, DIM), window_out=WINDOWS, accepted_steps=index(2, -1, 0),
            cache_indices=index(4, 1, 2), window_indices=index(0, 1, 3),
        ),
        {},
    ),
}  # fmt: skip


def loss_of(operation, arrays, options):
    """(a weighted sum of every result as a function of the float arguments, these)."""
    fixed = {name: array for name, array in arrays.items() if name not in FLOATS}
    call = functools.partial(getattr(pallas_impl, operation), backend="xla", **options)

    def loss(floats):
        total = jnp.float32(0)
        for seed, result in enumerate(jax.tree.leaves(call(**floats, **fixed))):
            total += (result.astype(jnp.float32) * normal(50 + seed, *result.shape)).sum()
        return total

    return loss, {name: array for name, array in arrays.items() if name in FLOATS}


def check_gradients(loss, floats, gradients, step=1e-2):
    for name, array in floats.items():
        direction = normal(99, *array.shape)
        ahead, behind = (loss(floats | {name: array + sign * step * direction}) for sign in (1, -1))
        found = float((gradients[name] * direction).sum())
        assert abs(found) > 1e-2, name
        np.testing.assert_allclose(found, (ahead - behind) / (2 * step), rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_values(case):
    operation, arrays, options = CASES[case]
    if operation != "commit_windows":
        options = options | dict(activation="silu")
    loss, floats = loss_of(operation, arrays, options)
    loss = jax.jit(loss)
    tangents = jax.tree.map(lambda a: normal(98, *a.shape), floats)

    @jax.jit
    def both_modes(floats, tangents):
        return jax.grad(loss)(floats), jax.jvp(loss, (floats,), (tangents,))[1]

    gradients, tangent = both_modes(floats, tangents)
    check_gradients(loss, floats, gradients)
    along = sum(float((gradients[name] * tangents[name]).sum()) for name in floats)
    np.testing.assert_allclose(float(tangent), along, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["prefill", "prefill ring", "rolling", "windows", "commit"])
def test_gradients_outside_jit_and_of_16_bit_pools(case):
    operation, arrays, options = CASES[case]
    loss, floats = loss_of(operation, arrays, options)
    exact = jax.grad(loss)(floats)
    floats = {name: array.astype(jnp.bfloat16) for name, array in floats.items()}
    for name, gradient in jax.jit(jax.grad(loss))(floats).items():
        assert gradient.dtype == jnp.bfloat16
        scale = float(jnp.abs(exact[name]).max())
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), np.asarray(exact[name]), atol=0.03 * scale, err_msg=name
        )


def test_chunks_have_the_gradient_of_the_whole():
    x, weight = normal(0, 12, DIM), normal(1, DIM, WIDTH)

    def loss(x, weight, cut):
        pool, outs = jnp.zeros((1, WIDTH - 1, DIM)), []
        for begin, end, has in ((0, cut, False), (cut, 12, True)):
            out, pool = pallas_impl.causal_conv1d_fn(
                x[begin:end], weight, None, pool, index(0, end - begin), index(0), jnp.asarray([has]), backend="xla"
            )  # fmt: skip
            outs.append(out)
        return (jnp.concatenate(outs) ** 2).sum() + (pool**3).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for got, wanted in zip(gradients(x, weight, 5), gradients(x, weight, 12), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert jax.jit(jax.hessian(lambda x: loss(x, weight, 5)))(x[:12]).shape == (12, DIM, 12, DIM)


def test_padding_and_large_arguments_leave_gradients_finite():
    """NaN in padding, in slots that nothing reads and in the tail; SiLU far from zero."""
    arrays = prefill(columns=5)
    pool = arrays["conv_states"].at[jnp.asarray([0, 1, 3, 4, 5])].set(jnp.nan).at[2, 3:].set(jnp.nan)
    arrays |= dict(x=arrays["x"].at[7:].set(jnp.nan).at[0].set(-3e4).at[5].set(3e4), conv_states=pool)

    def loss(x, weight, pool):
        given = arrays | dict(x=x, weight=weight, conv_states=pool)
        out, new = pallas_impl.causal_conv1d_fn(**given, activation="silu", backend="xla")
        return out.sum() + new[jnp.asarray([2, 4]), :3].sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for gradient in gradients(*(arrays[n] for n in ("x", "weight", "conv_states"))):
        assert np.isfinite(gradient).all()
        assert np.any(gradient != 0)


HEADS = dict(num_k_heads=1, num_v_heads=2, head_k_dim=2, head_v_dim=3)
FRONTS = {
    "front": ("gated_delta_prologue_fn", "x", 10, HEADS, ()),
    "bounded, a gate a channel": (
        "gated_delta_prologue_fn", "x", 10, HEADS | dict(lower_bound=-3.0, beta_rounding="storage"), (2,)
    ),
    "front of a step": ("gated_delta_prologue_update", "x", 10, HEADS, ()),
    "gated": ("gated_short_conv_fn", "bcx", DIM, {}, None),
    "gated step": ("gated_short_conv_update", "bcx", DIM, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", FRONTS)
def test_fronts_of_padding_and_of_large_gates_leave_gradients_finite(case):
    """NaN where no row is live, gates far from zero, a beta below the normal numbers of its dtype."""
    operation, name, dim, options, channels = FRONTS[case]
    arrays = prefill() if operation.endswith("_fn") else step()
    tokens, dead = len(arrays.pop("x")), 7 if operation.endswith("_fn") else 1
    arrays |= dict(weight=normal(1, dim, WIDTH), bias=normal(2, dim), conv_states=normal(3, 9, 3, dim))
    given = {name: normal(0, tokens, dim if name == "x" else 3 * dim)}
    if channels is not None:
        b = normal(7, tokens, 2, dtype="float16").at[0].set(jnp.asarray([-200.0, -11.0], jnp.float16))
        given |= dict(
            a=normal(6, tokens, 2, *channels).at[2].set(-500.0), b=b, A_log=normal(8, 2),
            dt_bias=normal(9, 2, *channels),
        )  # fmt: skip
    poisoned = {n: a if n in ("A_log", "dt_bias") else a.at[dead].set(jnp.nan) for n, a in given.items()}
    run = functools.partial(getattr(pallas_impl, operation), backend="xla", **options)

    def loss(given):
        return sum(result.astype(jnp.float32).sum() for result in jax.tree.leaves(run(**arrays | given)[:-1]))

    gradient = jax.jit(jax.grad(loss))
    gradients = gradient(poisoned)
    for name, wanted in gradient(given).items():
        np.testing.assert_array_equal(gradients[name], wanted, err_msg=name)
        assert np.isfinite(wanted).all(), name
    if channels is not None:
        np.testing.assert_allclose(gradients["b"][0, 1], jax.nn.sigmoid(-11.0), rtol=0.05)


@pytest.mark.parametrize("case", ["prefill", "windows", "commit"])
def test_a_pool_without_slots(case):
    operation, arrays, options = CASES[case]
    empty = {name: arrays[name][:0] for name in ("conv_states", "window_out") if name in arrays}
    loss, floats = loss_of(operation, arrays | empty, options)
    assert all(np.isfinite(gradient).all() for gradient in jax.grad(loss)(floats).values())
