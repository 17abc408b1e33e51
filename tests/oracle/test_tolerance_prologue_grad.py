"""The bounds of the fronts' gradients accept float32 and reject 16-bit evaluations."""

import numpy as np
import pytest

from oracle import reference_prologue_grad as grad
from oracle import tolerance_prologue_grad as bounds
from oracle.contract_prologue import GatedConvCall, PrologueCall
from oracle.numerics import rounded, typed
from oracle.tolerance import fraction_of_bound
from tests.oracle.test_reference_prologue_grad import DIM, HV, WIDTH, K, draw, front, upstream


class Float32(grad.FrontBackward):
    dtype = np.float32


class Coarse(Float32):
    """Hands on what it has in bfloat16."""

    def through_norm(self, y, dn, eps):
        return (
            rounded(super().through_norm(y, dn, eps).astype(np.float64), "bfloat16")
            .values()
            .astype(np.float32)
        )

    def of_live(self, values, live):
        return (
            rounded(super().of_live(values, live).astype(np.float64), "bfloat16").values().astype(np.float32)
        )


def worst(got, want, bound, arguments):
    """Of each gradient the worst fraction of its bound, when it is stored in its argument's dtype."""
    found = {}
    for name, exact in want._asdict().items():
        if exact is not None:
            dtype = typed(arguments[name]).dtype
            stored = rounded(getattr(got, name).astype(np.float64), dtype).values()
            found[name] = fraction_of_bound(stored, exact, getattr(bound, name), dtype).max()
    return found


def prologue(changes):
    arguments = front(**changes)
    given = upstream(grad.gated_delta_prologue(**arguments), grad.UPSTREAM)
    every = {**PrologueCall(**arguments)._asdict(), **dict.fromkeys(grad.UPSTREAM), **given}
    want = grad.gated_delta_prologue_backward(given, arguments)
    bound = bounds.prologue_bounds(given, arguments)
    return [worst(kind().front_gradients(every), want, bound, arguments) for kind in (Float32, Coarse)]


CHANGES = {
    "plain": {},
    "channel": dict(a=draw(7, HV, K), dt_bias=draw(HV, K)),
    "bounded": dict(a=draw(7, HV, K), dt_bias=draw(HV, K), lower_bound=-5.0),
    "unnormalised": dict(qk_l2norm=False),
    "none": dict(norm_rounding="none", activation=None),
    "far": dict(a=draw(7, HV) * np.float32(40)),
    "near-eps": dict(x=draw(7, DIM) * np.float32(2**-9), norm_eps=1e-6),
}


@pytest.mark.parametrize("name", CHANGES)
def test_prologue(name):
    right, coarse = prologue(CHANGES[name])
    assert max(right.values()) <= 1.0, right
    seen = ("a", "b", "A_log") if name == "unnormalised" else ("x", "a", "b", "A_log")
    for argument in seen:
        assert coarse[argument] > 1.0, coarse


def test_prologue_in_sixteen_bits():
    changes = dict(
        x=rounded(draw(7, DIM), "bfloat16"), initial_states=rounded(draw(2, WIDTH - 1, DIM), "bfloat16")
    )
    arguments = front(**changes)
    found = grad.gated_delta_prologue(**arguments)
    given = {
        name: None if part is None else draw(*part.shape, seed=5)
        for name, part in zip(grad.UPSTREAM, found, strict=True)
    }
    every = {**PrologueCall(**arguments)._asdict(), **given}
    want, bound = (
        grad.gated_delta_prologue_backward(given, arguments),
        bounds.prologue_bounds(given, arguments),
    )
    assert max(worst(Float32().front_gradients(every), want, bound, arguments).values()) <= 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offsets", [None, (3, 0, 5)])
def test_gated(dtype, offsets):
    arguments = dict(
        bcx=rounded(draw(7, 12 if offsets is None else 9), dtype), weight=draw(4, WIDTH), bias=draw(4),
        query_start_loc=np.array([0, 2, 6]), channel_offsets=offsets, activation="silu",
    )  # fmt: skip
    given = {"dout": draw(7, 4)}
    call = GatedConvCall(**arguments)
    every = {**call._asdict(), "channel_offsets": call.check().offsets, "dfinal_states": None, **given}
    want, bound = grad.gated_short_conv_backward(given, arguments), bounds.gated_bounds(given, arguments)
    right, coarse = (
        worst(kind().gated_gradients(every), want, bound, arguments) for kind in (Float32, Coarse)
    )
    assert max(right.values()) <= 1.0, right
    assert max(coarse[name] for name in ("bcx", "weight", "bias")) > 1.0, coarse
