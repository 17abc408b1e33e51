"""What sglang-jax (cddbf6f) passes to its convolutions, as data: in jax.numpy, in the kernels, and compiled with donation.

A compiled call is JAX's captured graph: shapes are those of the padded batch, what is padding follows from data.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl.compat import sglang_jax

DIM, WIDTH, SLOTS = 12, 4, 7
PREFILL, UPDATE, SHORT = "jax_causal_conv1d_prefill", "jax_causal_conv1d_update", "short_convolution"
FLOATS = {"x", "weight", "bias", "conv_state", "cache"}
GDN = dict(weight=(DIM, WIDTH), bias=None, conv_state=(SLOTS, DIM, WIDTH - 1), activation="silu")
# (kind, function, {argument: shape of a float array, list of integers or flags, or a value})
CALLS = [
    ("prefill", PREFILL, dict(
        x=(DIM, 9), **GDN, cu_seqlens=[0, 4, 5, 9], state_indices=[3, 1, 5], has_initial_state=[True, False, True],
    )),
    ("prefill, rows of padding and tokens behind them", PREFILL, dict(
        x=(DIM, 12), **GDN, cu_seqlens=[0, 4, 9, 9, 9], state_indices=[3, 1, 0, 0],
        has_initial_state=[True, False, False, False],
    )),
    ("prefill that tracks states for the radix cache", PREFILL, dict(
        x=(DIM, 9), **GDN, cu_seqlens=[0, 4, 9], state_indices=[3, 1], has_initial_state=[True, True],
        track_indices=[4, 0], track_mask=[True, True],
    )),
    ("prefill of an idle data-parallel rank", PREFILL, dict(
        x=(DIM, 2), **GDN, cu_seqlens=[0, 0], state_indices=[0], has_initial_state=[False],
    )),
    ("decode", UPDATE, dict(x=(3, DIM), **GDN, state_indices=[3, 1, 5])),
    ("decode, rows of padding", UPDATE, dict(
        x=(4, DIM), **GDN, state_indices=[3, 1, 0, 0], has_initial_state=[True, True, False, False],
        track_indices=[2, 0, 0, 0], track_mask=[1, 0, 0, 0],
    )),
    ("decode of an idle data-parallel rank", UPDATE, dict(x=(2, DIM), **GDN, state_indices=[0, 0])),
    ("prefill of KDA", SHORT, dict(
        x=(9, DIM), weight=(DIM, WIDTH), cache=(2, DIM, WIDTH - 1), cu_seqlens=[0, 4, 9], forward_mode="EXTEND",
    )),
    ("decode of KDA", SHORT, dict(
        x=(3, DIM), weight=(DIM, WIDTH), cache=(3, DIM, WIDTH - 1), cu_seqlens=None, forward_mode="DECODE",
    )),
]  # fmt: skip
EVERY_CALL = pytest.mark.parametrize(
    ("function", "arguments"), [call[1:] for call in CALLS], ids=[c[0] for c in CALLS]
)


def arrays(arguments):
    """Small integers: every sum is exact."""
    rng, made = np.random.default_rng(0), {}
    for name, value in arguments.items():
        if name in FLOATS and value is not None:
            made[name] = jnp.asarray(rng.integers(-4, 5, value), jnp.float32)
        else:
            made[name] = jnp.asarray(value) if isinstance(value, list) else value
    return made


def run(function, arguments):
    return [np.asarray(array) for array in getattr(sglang_jax, function)(**arrays(arguments))]


def same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-6, atol=1e-6)


@EVERY_CALL
def test_the_kernels_give_what_jax_numpy_gives(function, arguments, monkeypatch):
    wanted = run(function, arguments)
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        plain = getattr(sglang_jax, name)
        monkeypatch.setattr(sglang_jax, name, functools.partial(plain, backend="mosaic_gpu_interpret"))
    same(run(function, arguments), wanted)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@EVERY_CALL
def test_compiled_with_the_pool_donated_and_without_transfers(function, arguments, device):
    wanted = run(function, arguments)
    given = arrays(arguments)
    fixed = {name: given.pop(name) for name in ("activation", "forward_mode", "bias") if name in given}
    pool = "cache" if function == SHORT else "conv_state"
    step = jax.jit(functools.partial(getattr(sglang_jax, function), **fixed), donate_argnames=pool)
    given = jax.device_put(given, jax.devices(device)[0])
    held = given[pool]
    with jax.transfer_guard("disallow"):
        found = step(**given)
    assert held.is_deleted()
    same(found, wanted)


@EVERY_CALL
def test_slots_of_padding_change_nothing(function, arguments):
    if "state_indices" not in arguments:
        return
    before = np.asarray(arrays(arguments)["conv_state"])
    after = run(function, arguments)[1]
    tracked = [
        s
        for s, m in zip(arguments.get("track_indices", []), arguments.get("track_mask", []), strict=True)
        if m
    ]
    touched = {slot for slot in (*arguments["state_indices"], *tracked) if slot}
    for slot in set(range(SLOTS)) - touched:
        np.testing.assert_array_equal(after[slot], before[slot])
