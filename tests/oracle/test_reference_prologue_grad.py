"""The reference's gradients of the fronts against central differences of their differentiable forms."""

import numpy as np
import pytest

from oracle import reference_prologue_grad as grad

HK, HV, K, V, WIDTH = 2, 4, 3, 2, 3
DIM = 2 * HK * K + HV * V
HEADS = dict(num_k_heads=HK, num_v_heads=HV, head_k_dim=K, head_v_dim=V)
STEP = 2.0**-7


def draw(*shape, seed=0):
    """Float32 on a grid that a step of the differences keeps exact."""
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return (np.round(values * 2**7) / 2**7).astype(np.float32)


def front(**changes):
    given = dict(
        x=draw(7, DIM), weight=draw(DIM, WIDTH), bias=draw(DIM), initial_states=draw(2, WIDTH - 1, DIM),
        query_start_loc=np.array([0, 2, 6]), a=draw(7, HV), b=draw(7, HV, seed=1), A_log=draw(HV), dt_bias=draw(HV, seed=1),
        norm_eps=0.25, q_scale=0.5, **HEADS,
    )  # fmt: skip
    return given | changes


def upstream(found, names):
    return {
        name: None if part is None else draw(*part.shape, seed=5)
        for name, part in zip(names, found, strict=True)
    }


def check(forward, arguments, names, found, gradients):
    """Central differences of the float32 results: their error is that of the rounding over the step."""
    given = {name: value for name, value in upstream(found, names).items() if value is not None}
    for name, got in zip(gradients._fields, gradients, strict=True):
        if got is None:
            continue
        base, numeric = arguments[name], np.zeros(arguments[name].shape)
        for at in np.random.default_rng(0).permutation(list(np.ndindex(base.shape)))[:12]:
            losses = []
            for sign in (1, -1):
                moved = base.copy()
                moved[tuple(at)] += np.float32(sign * STEP)
                results = forward(**{**arguments, name: moved})
                losses.append(
                    sum((part.astype(np.float64)[: len(up)] * up).sum()
                        for part, up in zip(results, upstream(found, names).values(), strict=True) if up is not None)
                )  # fmt: skip
            numeric[tuple(at)] = (losses[0] - losses[1]) / (2 * STEP)
            assert abs(numeric[tuple(at)] - got[tuple(at)]) < 2e-3 * (1 + abs(got[tuple(at)])), (name, at)
    assert given


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("bound", [None, -5.0])
@pytest.mark.parametrize("norm", [True, False])
def test_prologue(channel, bound, norm):
    changes = dict(a=draw(7, HV, K), dt_bias=draw(HV, K)) if channel else {}
    arguments = front(lower_bound=bound, qk_l2norm=norm, **changes)
    found = grad.gated_delta_prologue(**arguments)
    given = upstream(found, grad.UPSTREAM)
    gradients = grad.gated_delta_prologue_backward(given, arguments)
    check(grad.gated_delta_prologue, arguments, grad.UPSTREAM, found, gradients)
    assert not gradients.x[6:].any()
    assert not gradients.a[6:].any()
    assert not gradients.b[6:].any()


def test_what_is_not_given_has_no_gradient():
    arguments = front(a=None, b=None, A_log=None, dt_bias=None, bias=None, initial_states=None)
    gradients = grad.gated_delta_prologue_backward({"dv": draw(7, HV, V)}, arguments)
    assert [name for name, part in gradients._asdict().items() if part is not None] == ["x", "weight"]
    assert not gradients.x[:, : 2 * HK * K].any()
    assert gradients.x[:6, 2 * HK * K :].all()


def test_the_tail_is_not_read():
    arguments = front()
    given = upstream(grad.gated_delta_prologue(**arguments), grad.UPSTREAM)
    want = grad.gated_delta_prologue_backward(given, arguments)
    for name in ("x", "a", "b"):
        arguments[name][6:] = np.nan
    for name in ("dq", "dk", "dv", "dg", "dbeta"):
        given[name][6:] = np.nan
    got = grad.gated_delta_prologue_backward(given, arguments)
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("offsets", [None, (3, 0, 5)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gated(offsets, activation):
    channels = 3 * 4 if offsets is None else 9
    arguments = dict(
        bcx=draw(7, channels), weight=draw(4, WIDTH), bias=draw(4), initial_states=draw(2, WIDTH - 1, 4),
        query_start_loc=np.array([0, 2, 6]), channel_offsets=offsets, activation=activation,
    )  # fmt: skip
    found = grad.gated_short_conv(**arguments)
    names = ("dout", "dfinal_states")
    gradients = grad.gated_short_conv_backward(upstream(found, names), arguments)
    check(grad.gated_short_conv, arguments, names, found, gradients)
    assert not gradients.bcx[6:].any()


def test_dense_rows():
    x, a = draw(2, 3, DIM), draw(2, 3, HV)
    arguments = front(x=x, a=a, b=a, query_start_loc=None, initial_states=None)
    dense = grad.gated_delta_prologue(**arguments)
    flat = {name: arguments[name].reshape(6, -1) for name in ("x", "a", "b")}
    packed = grad.gated_delta_prologue(**{**arguments, **flat, "query_start_loc": np.array([0, 3, 6])})
    assert dense.q.shape == (2, 3, HK, K)
    for one, other in zip(dense, packed, strict=True):
        assert np.array_equal(one.reshape(other.shape), other)
