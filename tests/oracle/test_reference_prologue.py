"""The reference of the fronts against plain NumPy, written down a second time."""

import numpy as np
import pytest

from oracle import reference
from oracle import reference_prologue as fronts
from oracle.contract_prologue import PrologueFnCall, PrologueOutput, PrologueWindowOutput
from oracle.numerics import TypedArray, rounded, ulp

HK, HV, K, V = 2, 4, 6, 5
DIM, TOKENS, WIDTH = 2 * HK * K + HV * V, 9, 4
HEADS = dict(num_k_heads=HK, num_v_heads=HV, head_k_dim=K, head_v_dim=V)


def random(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def prefill(**changes):
    """Two rows of 3 and 4 tokens with two more behind them, the first continued."""
    given = dict(
        x=random(TOKENS, DIM), weight=random(DIM, WIDTH), bias=random(DIM), conv_states=random(5, WIDTH - 1, DIM),
        query_start_loc=np.array([0, 3, 7], np.int32), cache_indices=np.array([2, 1], np.int32),
        has_initial_state=np.array([True, False]), **HEADS,
    )  # fmt: skip
    return given | changes


def gates(*leading, channel=False, seed=1):
    last = (HV, K) if channel else (HV,)
    return dict(
        a=random(*leading, *last, seed=seed),
        b=random(*leading, HV, seed=seed),
        A_log=random(HV),
        dt_bias=random(*last),
    )


def plain(arguments):
    """The convolution alone, in float32."""
    keep = [name for name in arguments if name not in HEADS]
    return reference.causal_conv1d_fn(**{name: arguments[name] for name in keep}, activation="silu").out


def close(got, want):
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=1e-6, atol=1e-7)


def test_heads_and_norm():
    arguments = prefill(q_scale=K**-0.5)
    found = fronts.gated_delta_prologue_fn(**arguments)
    y = plain(prefill()).astype(np.float64)
    q, k, v = (
        part.reshape(TOKENS, heads, -1)
        for part, heads in zip(np.split(y, [HK * K, 2 * HK * K], 1), (HK, HK, HV), strict=True)
    )
    close(found.q, q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(K))
    close(found.k, k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6))
    assert np.array_equal(found.v, v.astype(np.float32))
    assert found.g is None
    assert found.beta is None
    assert not any(part[7:].any() for part in found[:3])
    assert isinstance(found, PrologueOutput)


def test_states_are_those_of_the_convolution():
    arguments = prefill()
    found = fronts.gated_delta_prologue_fn(**arguments)
    names = [name for name in arguments if name not in HEADS]
    want = reference.causal_conv1d_fn(**{name: arguments[name] for name in names}, activation="silu")
    assert np.array_equal(found.conv_states, want.conv_states)
    assert not np.array_equal(found.conv_states, arguments["conv_states"])


def test_without_norm():
    found = fronts.gated_delta_prologue_fn(**prefill(qk_l2norm=False, q_scale=0.5))
    y = plain(prefill())
    assert np.array_equal(found.q.reshape(TOKENS, -1), y[:, : HK * K] / 2)
    assert np.array_equal(found.k.reshape(TOKENS, -1), y[:, HK * K : 2 * HK * K])


@pytest.mark.parametrize("channel", [False, True])
def test_gates(channel):
    given = gates(TOKENS, channel=channel)
    given["a"][0] = 200.0  # exp of it overflows float32
    found = fronts.gated_delta_prologue_fn(**prefill(**given))
    rate = np.exp(given["A_log"].astype(np.float64)).reshape(HV, *[1] * channel)
    z = given["a"].astype(np.float64) + given["dt_bias"]
    want = -rate * np.logaddexp(0, z)
    close(found.g[:7], want[:7])
    close(found.beta[:7], 1 / (1 + np.exp(-given["b"][:7].astype(np.float64))))
    assert not found.g[7:].any()
    assert not found.beta[7:].any()
    bounded = fronts.gated_delta_prologue_fn(**prefill(**given, lower_bound=-5))
    close(bounded.g[:7], (-5 / (1 + np.exp(-rate * z)))[:7])
    assert found.g.dtype == found.beta.dtype == bounded.g.dtype == np.float32


def test_beta_rounded():
    b = rounded(random(TOKENS, HV, seed=3), "bfloat16")
    exact = fronts.gated_delta_prologue_fn(**prefill(b=b))
    found = fronts.gated_delta_prologue_fn(**prefill(b=b, beta_rounding="storage"))
    want = rounded(exact.beta.astype(np.float64), "bfloat16").values()
    assert np.array_equal(found.beta, want)
    assert not np.array_equal(exact.beta, want)


def test_rounding_before_the_norm():
    arguments = prefill(x=rounded(random(TOKENS, DIM), "bfloat16"))
    stored = fronts.gated_delta_prologue_fn(**arguments)
    free = fronts.gated_delta_prologue_fn(**arguments, norm_rounding="none")
    assert not np.array_equal(stored.k.data, free.k.data)
    assert np.array_equal(stored.v.data, free.v.data)
    far = np.abs(stored.k.values() - free.k.values())
    assert (far <= 2 * ulp(free.k.values(), "bfloat16")).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("norm", [True, False])
def test_separate_norm(dtype, norm):
    """The plain convolution and the norm behind it, in the contract's float32, are the float32 model's front."""
    x = rounded(random(TOKENS, DIM), dtype)
    arguments = prefill(x=x, qk_l2norm=norm, q_scale=K**-0.5, activation=None)
    sizes = PrologueFnCall(**arguments).check()
    given = fronts.checked("gated_delta_prologue_fn", arguments)
    found = fronts.OrderedFront().front("gated_delta_prologue_fn", given)
    op, inside = fronts.convolution("gated_delta_prologue_fn", arguments)
    y = reference.Ordered().compute(op, inside)["out"]
    for name, want in zip("qkv", fronts.separate_norm(y, sizes, arguments), strict=True):
        assert np.array_equal(found[name].bits, want.bits), name


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 128])
def test_tree_sum(size):
    values = random(3, size)

    def tree(row):
        if len(row) == 1:
            return row[0]
        half = 1 << (len(row) - 1).bit_length() - 1
        return tree(row[:half]) + tree(row[half:])

    # halves of a power of two, all the way down, is neighbours all the way up
    got = fronts.tree_sum(values)
    assert got.shape == (3, 1)
    assert got.dtype == np.float32
    assert [tree(row) for row in values] == got[:, 0].tolist()


def test_decode_is_a_prefill_of_one_token():
    x, pool = random(3, DIM), random(5, WIDTH - 1, DIM)
    given = dict(
        weight=random(DIM, WIDTH),
        bias=None,
        cache_indices=np.array([4, -1, 0], np.int32),
        **HEADS,
        **gates(3),
    )
    step = fronts.gated_delta_prologue_update(x, conv_states=pool, **given)
    whole = fronts.gated_delta_prologue_fn(
        x,
        conv_states=pool,
        query_start_loc=np.arange(4, dtype=np.int32),
        has_initial_state=np.ones(3, bool),
        **given,
    )
    for got, want in zip(step, whole, strict=True):
        assert np.array_equal(got, want)
    assert not any(part[1].any() for part in step[:5])


def test_decode_of_several_tokens_keeps_windows():
    x, pool, windows = random(2, 3, DIM), random(5, WIDTH - 1, DIM), random(2, 3, WIDTH - 1, DIM)
    found = fronts.gated_delta_prologue_update(
        x, random(DIM, WIDTH), None, pool, **HEADS, **gates(2, 3), window_out=windows, commit=False
    )
    assert isinstance(found, PrologueWindowOutput)
    assert found.q.shape == (2, 3, HK, K)
    assert found.g.shape == found.beta.shape == (2, 3, HV)
    assert np.array_equal(found.conv_states, pool)
    assert np.array_equal(found.window_out[:, -1], x)


def test_dead_rows_stay_zero():
    """A recycled slot, a tail and a padding row that hold NaN reach nothing."""
    arguments = prefill(**gates(TOKENS), cache_indices=np.array([7, 1], np.int32))
    for name in ("x", "a", "b"):
        arguments[name][:3] = arguments[name][7:] = np.nan
    found = fronts.gated_delta_prologue_fn(**arguments)
    for part in found[:5]:
        assert np.isfinite(part).all()
        assert not part[:3].any()
        assert not part[7:].any()
        assert part[3:7].any()


def gated(**changes):
    given = dict(
        bcx=random(TOKENS, 3 * DIM), weight=random(DIM, WIDTH), bias=random(DIM), conv_states=random(5, WIDTH - 1, DIM),
        query_start_loc=np.array([0, 3, 7], np.int32), cache_indices=np.array([2, 1], np.int32),
        has_initial_state=np.array([True, False]),
    )  # fmt: skip
    return given | changes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("offsets", [None, (5, DIM, 0)])
def test_gated_short_conv(dtype, offsets):
    given = gated(
        bcx=rounded(random(TOKENS, 3 * DIM), dtype), conv_states=rounded(random(5, WIDTH - 1, DIM), dtype)
    )
    given |= dict(channel_offsets=offsets)
    found = fronts.gated_short_conv_fn(**given)
    first, second, third = offsets or (0, DIM, 2 * DIM)
    values = given["bcx"].values()
    b, c, x = (values[:, o : o + DIM] for o in (first, second, third))
    u = rounded(b * x, dtype)
    inside = {name: given[name] for name in given if name not in ("bcx", "channel_offsets")}
    conv = reference.causal_conv1d_fn(u, **inside)
    want = rounded(c * TypedArray(dtype, conv.out.data).values(), dtype)
    assert np.array_equal(found.out.bits[:7], want.bits[:7])
    assert not found.out.bits[7:].any()
    assert np.array_equal(found.conv_states.bits, conv.conv_states.bits)


def test_gated_update_follows_a_prefill():
    bcx = random(1, 6, 3 * DIM)
    given = dict(
        weight=random(DIM, WIDTH), bias=None, cache_indices=np.array([3], np.int32), activation="silu"
    )
    pool = np.zeros((5, WIDTH - 1, DIM), np.float32)
    whole = fronts.gated_short_conv_fn(
        bcx[0], conv_states=pool, query_start_loc=np.array([0, 6], np.int32), **given
    )
    half = fronts.gated_short_conv_fn(
        bcx[0, :4], conv_states=pool, query_start_loc=np.array([0, 4], np.int32), **given
    )
    rest = fronts.gated_short_conv_update(bcx[:, 4:], conv_states=half.conv_states, **given)
    assert np.array_equal(np.concatenate([half.out, rest.out[0]]), whole.out)
    assert np.array_equal(rest.conv_states, whole.conv_states)


def test_gated_dead_rows_stay_zero():
    arguments = gated(cache_indices=np.array([7, 1], np.int32))
    arguments["bcx"][:3] = arguments["bcx"][7:] = np.nan
    out = fronts.gated_short_conv_fn(**arguments).out
    assert np.isfinite(out).all()
    assert not out[:3].any()
    assert not out[7:].any()
