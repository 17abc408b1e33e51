"""The reference against definitions that are not its own: numpy.convolve, cases by hand, torch, ONNX."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oracle import numerics, reference

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(2)


def silu(z):
    return z / (1 + np.exp(-z))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_against_numpy_convolve(width, activation):
    """Packed rows, channel by channel, in float64."""
    dim, lengths, slots, has = 3, (5, 0, 1, 2, 9), (4, 0, 5, 2, 1), (True, True, False, True, False)
    offsets = np.cumsum([0, *lengths])
    x, w = RNG.standard_normal((19, dim)), RNG.standard_normal((dim, width))
    bias, pool = RNG.standard_normal(dim), RNG.standard_normal((6, width + 1, dim))
    x, w, bias, pool = (a.astype(np.float32) for a in (x, w, bias, pool))
    out, states = reference.causal_conv1d_fn(
        x, w, bias, pool, offsets.astype(np.int32), np.array(slots), np.array(has), activation=activation
    )
    expected_states = pool.copy()
    for row, (slot, flag) in enumerate(zip(slots, has, strict=True)):
        tokens = slice(offsets[row], offsets[row + 1])
        window = pool[slot, : width - 1] if flag else np.zeros((width - 1, dim), np.float32)
        history = np.concatenate([window, x[tokens]]).astype(np.float64)
        for d in range(dim):
            if lengths[row]:
                pre = np.convolve(history[:, d], w[d, ::-1].astype(np.float64), mode="valid") + bias[d]
                want = silu(pre) if activation else pre
                np.testing.assert_allclose(out[tokens, d], want, rtol=1e-6, atol=1e-30)
        if lengths[row]:
            expected_states[slot, : width - 1] = history[len(history) - (width - 1) :]
    np.testing.assert_array_equal(states, expected_states)
    np.testing.assert_array_equal(out[17:], 0)
    assert out.dtype == np.float32


@pytest.mark.parametrize("seqlen", [None, 1, 2, 5])
def test_update_against_numpy_convolve(seqlen):
    batch, dim, width, slots = 3, 4, 4, (5, -1, 2)
    shape = (batch, dim) if seqlen is None else (batch, seqlen, dim)
    x, w = RNG.standard_normal(shape).astype(np.float32), RNG.standard_normal((dim, width)).astype(np.float32)
    pool = RNG.standard_normal((6, 5, dim)).astype(np.float32)
    out, states = reference.causal_conv1d_update(x, w, None, pool, np.array(slots))
    expected = pool.copy()
    for row, slot in enumerate(slots):
        if slot < 0:
            np.testing.assert_array_equal(out[row], 0)
            continue
        history = np.concatenate([pool[slot, :3], x[row].reshape(-1, dim)]).astype(np.float64)
        want = [np.convolve(history[:, d], w[d, ::-1].astype(np.float64), mode="valid") for d in range(dim)]
        np.testing.assert_allclose(out[row].reshape(-1, dim), np.array(want).T, rtol=1e-6)
        expected[slot, :3] = history[-3:]
    np.testing.assert_array_equal(states, expected)


def test_by_hand():
    """One channel, weights 1, 10, 100: the digits of an output are its window."""
    x = np.array([[1.0], [2], [3], [4], [5]], np.float32)
    weight = np.array([[1.0, 10, 100]], np.float32)
    pool = np.array([[[7.0], [8]], [[9.0], [9]], [[0.0], [6]]], np.float32)
    out, states = reference.causal_conv1d_fn(
        x,
        weight,
        np.array([0.5], np.float32),
        pool,
        np.array([0, 1, 4]),
        np.array([2, 0]),
        np.array([True, False]),
    )
    # row 0 sees 0, 6 and then 1; row 1 sees 0, 0 and then 2, 3, 4; token 4 belongs to no row.
    np.testing.assert_array_equal(out[:, 0], [160.5, 200.5, 320.5, 432.5, 0])
    np.testing.assert_array_equal(states[:, :, 0], [[3, 4], [9, 9], [6, 1]])
    out, states = reference.causal_conv1d_update(
        np.array([[5.0], [6.0]], np.float32), weight, None, states, np.array([0, 2]), activation=None
    )
    np.testing.assert_array_equal(out[:, 0], [543, 616])
    np.testing.assert_array_equal(states[:, :, 0], [[4, 5], [9, 9], [1, 6]])


def test_the_cancellation_example():
    """Two products that cancel but for 2**-14, which only exact products keep."""
    x = numerics.rounded(np.array([[1.0078125], [1.0]]), "bfloat16")
    weight = numerics.rounded(np.array([[1.0078125, -1.015625]]), "bfloat16")
    out, states = reference.causal_conv1d_fn(x, weight, None, None, np.array([0, 2]))
    assert out.values()[1, 0] == 2.0**-14
    assert states is None


def test_inputs_are_never_written_and_kinds_are_kept():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = RNG.standard_normal((4, 2)).astype(ml_dtypes.bfloat16)
    pool = np.zeros((2, 3, 2), np.float16)
    weight = np.ones((2, 4), np.float32)
    before = x.copy()
    out, states = reference.causal_conv1d_fn(x, weight, None, pool, np.array([0, 4]), np.array([1]))
    assert out.dtype == x.dtype
    assert states.dtype == np.float16
    assert not pool.any()
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(states[1], x[1:].astype(np.float16))


def test_states_are_copies_bit_for_bit():
    bits = np.array([[0x7FA1, 0xFFC3, 0x8000, 0x0001]], np.uint16).T  # signalling NaN, NaN, -0, subnormal
    x = numerics.from_bits(bits, "bfloat16")
    pool = numerics.from_bits(np.zeros((1, 4, 1), np.uint16), "bfloat16")
    weight = np.zeros((1, 5), np.float32)
    states = reference.causal_conv1d_fn(x, weight, None, pool, np.array([0, 4]), np.array([0])).conv_states
    np.testing.assert_array_equal(states.bits[0], bits)


def test_the_float32_order_by_hand():
    """2**24 + 1 - 2**24 is 0 in float32 from oldest to newest, and 1 in float64."""
    arguments = {
        "x": np.array([[2.0**24], [1.0], [2.0**24]], np.float32),
        "weight": np.array([[1.0, 1.0, -1.0]], np.float32),
        "query_start_loc": np.array([0, 3]),
    }
    exact, computed = reference.preactivation("causal_conv1d_fn", arguments)
    ordered, _ = reference.preactivation("causal_conv1d_fn", arguments, "float32")
    magnitude, _ = reference.preactivation("causal_conv1d_fn", arguments, "magnitude")
    assert (exact[2, 0], ordered[2, 0], magnitude[2, 0]) == (1.0, 0.0, 2.0**25 + 1)
    assert computed.all()


def test_the_float32_order_against_an_exact_sum():
    """16-bit products are exact in float32, so a plain loop of float32 additions gives the same bits."""
    x = numerics.rounded(RNG.standard_normal((40, 6)), "float16")
    weight = numerics.rounded(RNG.standard_normal((6, 4)), "bfloat16")
    bias = numerics.rounded(RNG.standard_normal(6), "bfloat16")
    arguments = {"x": x, "weight": weight, "bias": bias, "query_start_loc": np.array([0, 40])}
    ordered, _ = reference.preactivation("causal_conv1d_fn", arguments, "float32")
    e = np.concatenate([np.zeros((3, 6), np.float32), x.values().astype(np.float32)])
    w = weight.values().astype(np.float32)
    acc = np.tile(bias.values().astype(np.float32), (40, 1))
    for j in range(4):
        acc = acc + w[:, j] * e[j : j + 40]
    np.testing.assert_array_equal(ordered, acc)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ((0, 4, 3), "row 1 to end between its start 4 and tokens=5, got 3"),
        ((1, 3, 5), "entry 0 to be 0, got 1"),
        ((0, 3, 6), "got 6"),
    ],
)
def test_validate_reads_the_offsets(offsets, message):
    pool = np.zeros((4, 3, 2), np.float32)
    with pytest.raises(ValueError, match=message):
        reference.causal_conv1d_fn(
            np.zeros((5, 2), np.float32), np.zeros((2, 4), np.float32), None, pool, np.array(offsets),
            np.array([0, 1]), validate=True,
        )  # fmt: skip


def test_validate_reads_the_slots():
    x, weight, pool = (
        np.zeros((2, 2), np.float32),
        np.zeros((2, 4), np.float32),
        np.zeros((4, 3, 2), np.float32),
    )
    with pytest.raises(ValueError, match="got 3 in rows 0 and 1"):
        reference.causal_conv1d_update(x, weight, None, pool, np.array([3, 3]), validate=True)
    with pytest.raises(ValueError, match=r"in row 1, got 4"):
        reference.causal_conv1d_update(x, weight, None, pool, np.array([3, 4]), validate=True)
    reference.causal_conv1d_update(x, weight, None, pool, np.array([3, -1]), validate=True)


def test_against_onnx():
    """Dense rows against ONNX's own reference of its CausalConvWithState operator."""
    module = pytest.importorskip("onnx.reference.ops.op_causal_conv_with_state")
    for width in (1, 2, 4, 6):
        x = RNG.standard_normal((2, 3, 7)).astype(np.float32)  # batch, channels, tokens
        weight = RNG.standard_normal((3, width)).astype(np.float32)
        bias = RNG.standard_normal(3).astype(np.float32)
        past = RNG.standard_normal((2, 3, width - 1)).astype(np.float32)
        want, present = module.CausalConvWithState._run(
            None, x, weight[:, None], bias, past, activation="silu"
        )
        out, states = reference.causal_conv1d_fn(
            x.transpose(0, 2, 1).reshape(14, 3), weight, bias, past.transpose(0, 2, 1), np.array([0, 7, 14]),
            None, np.array([True, True]), activation="silu",
        )  # fmt: skip
        np.testing.assert_allclose(out.reshape(2, 7, 3).transpose(0, 2, 1), want, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(states.transpose(0, 2, 1), present)


TORCH = """
import json, sys
import torch
import torch.nn.functional as F
x, weight, bias, window = (torch.tensor(v, dtype=torch.float64) for v in json.load(sys.stdin))
e = torch.cat([window, x]).T[None]
out = F.silu(F.conv1d(e, weight[:, None], bias, groups=weight.shape[0]))[0].T
print(json.dumps(out.tolist()))
"""


def test_against_torch():
    """torch.nn.functional.conv1d in a process of its own."""
    x, weight = (
        RNG.standard_normal((11, 5)).astype(np.float32),
        RNG.standard_normal((5, 4)).astype(np.float32),
    )
    bias, pool = RNG.standard_normal(5).astype(np.float32), RNG.standard_normal((1, 3, 5)).astype(np.float32)
    data = json.dumps([a.tolist() for a in (x, weight, bias, pool[0])])
    done = subprocess.run(
        [sys.executable, "-c", TORCH], input=data, capture_output=True, text=True, timeout=120
    )
    if "No module named 'torch'" in done.stderr:
        pytest.skip("torch is not installed")
    assert done.returncode == 0, done.stderr
    out = reference.causal_conv1d_fn(
        x, weight, bias, pool, np.array([0, 11]), None, np.array([True]), activation="silu"
    ).out
    np.testing.assert_allclose(out, json.loads(done.stdout), rtol=1e-6)


@pytest.mark.parametrize(
    "module",
    ["reference", "conformance.commands", "conformance.runner", "conformance.mutants", "conformance.demo",
     "conformance.judge", "conformance.relations", "conformance.traffic.engine", "tolerance", "contract"],
)  # fmt: skip
def test_the_oracle_loads_nothing_but_numpy(module):
    code = f"import sys; before = set(sys.modules); import oracle.{module}; tops = {{n.partition('.')[0] for n in " \
           "set(sys.modules) - before}; print(sorted(tops - set(sys.stdlib_module_names)))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() in ("['numpy', 'oracle']", "['oracle']"), done.stderr
