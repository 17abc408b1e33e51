"""The prologue of the gated delta rule: plain torch and the kernels, in Triton's interpreter, against the oracle."""

import numpy as np
import pytest
import torch

import triton_impl
from oracle.contract_prologue import RECORDS
from oracle.numerics import TypedArray
from oracle.reference_prologue import OrderedFront, checked, separate_norm
from triton_impl.adapter import to_numpy

HEADS = dict(num_k_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=8)
ODD = dict(num_k_heads=3, num_v_heads=3, head_k_dim=5, head_v_dim=7)
FN, UPDATE = "gated_delta_prologue_fn", "gated_delta_prologue_update"
GATE_TOLERANCE = dict(rtol=2e-6, atol=1e-7)


def numpy_of(value):
    if value is None or not isinstance(value, torch.Tensor):
        return value
    return TypedArray(str(value.dtype).removeprefix("torch."), to_numpy(value).copy())


def dim_of(heads):
    return 2 * heads["num_k_heads"] * heads["head_k_dim"] + heads["num_v_heads"] * heads["head_v_dim"]


def arrays(heads, leading, dtype=torch.bfloat16, slots=6, state_len=3, channel=False, bias=True, seed=0):
    """x, taps, a pool and gates' inputs; a and b are slices of one projection."""
    torch.manual_seed(seed)
    dim, hv = dim_of(heads), heads["num_v_heads"]
    columns = hv * heads["head_k_dim"] if channel else hv
    projected = torch.randn(*leading, columns + hv + 3) * 4
    a = projected[..., :columns]
    return dict(
        x=torch.randn(*leading, dim).to(dtype),
        weight=torch.randn(dim, 4).to(dtype),
        bias=torch.randn(dim).to(dtype) if bias else None,
        conv_states=torch.randn(slots, state_len, dim).to(dtype),
        a=(a.unflatten(-1, (hv, heads["head_k_dim"])) if channel else a).to(dtype),
        b=projected[..., columns : columns + hv],
        A_log=torch.randn(hv),
        dt_bias=torch.randn(hv, heads["head_k_dim"]) if channel else torch.randn(hv),
    )


def judge(op, given, backend):
    """Runs a call and compares every result with the float32 model: q, k, v by distance in x's dtype, gates closely."""
    call = RECORDS[op](**{name: numpy_of(value) for name, value in given.items()})
    expected = OrderedFront().front(op, checked(op, call._asdict()))
    found = getattr(triton_impl, op)(**given, backend=backend)._asdict()
    for name in ("q", "k", "v"):
        a, b = found[name].double().numpy(), expected[name].values()
        eps = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[given["x"].dtype]
        assert a.shape == b.shape
        assert found[name].is_contiguous()
        np.testing.assert_allclose(a, b, rtol=eps, atol=eps / 10)
        assert not np.signbit(a[b == 0]).any()
    for name in ("g", "beta"):
        if expected[name] is None:
            assert found[name] is None
        else:
            assert found[name].dtype == torch.float32
            np.testing.assert_allclose(found[name].numpy(), expected[name].values(), **GATE_TOLERANCE)
    for name in ("conv_states", "window_out"):
        if given.get(name) is not None:
            assert found[name] is given[name]
            np.testing.assert_array_equal(to_numpy(given[name]), expected[name].data)
    return found


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    return request.param


def packed(heads, dtype=torch.bfloat16, **options):
    """Rows of 5, 0, 1, 9 and 2 tokens, the fourth of padding, and a tail of 4 tokens; NaN where nothing is computed."""
    given = arrays(heads, (21,), dtype, **options)
    given["query_start_loc"] = torch.tensor([0, 5, 5, 6, 15, 17], dtype=torch.int32)
    given["cache_indices"] = torch.tensor([4, 0, 2, -1, 5])
    given["has_initial_state"] = torch.tensor([True, False, True, True, False])
    for name in ("x", "a", "b"):
        given[name] = given[name].clone()
        given[name][6:15] = given[name][17:] = float("nan")
    return given


@pytest.mark.parametrize("heads", [HEADS, ODD], ids=["even", "odd"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_scale": -0.25, "schedule": "flat"},
        {"norm_rounding": "none", "q_scale": 0.5, "beta_rounding": "storage"},
        {"qk_l2norm": False, "activation": None, "schedule": "per_sequence"},
        {"qk_l2norm": False, "q_scale": 3.0, "norm_eps": 0.5},
        {"norm_eps": 1e-2, "lower_bound": -5.0},
    ],
    ids=lambda o: " ".join(o) or "plain",
)
def test_packed_rows(heads, options, backend):
    judge(FN, packed(heads) | heads | options, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channel", [False, True])
def test_gates_of_heads_and_of_channels(dtype, channel, backend):
    given = packed(HEADS, dtype, channel=channel, bias=False) | HEADS
    judge(FN, given, backend)
    judge(FN, {**given, "lower_bound": -5.0, "b": None}, backend)
    judge(FN, {**given, "a": None, "A_log": None, "dt_bias": None}, backend)
    judge(FN, {**given, "dt_bias": None}, backend)


def test_channel_first_and_offset_input(backend):
    given = packed(HEADS) | HEADS
    wide = torch.randn(21, 3 + dim_of(HEADS)).bfloat16()
    wide[:, 2:-1] = given["x"]
    judge(FN, {**given, "x": given["x"].t().contiguous().t()}, backend)
    judge(FN, {**given, "x": wide, "channel_offset": 2}, backend)


def test_states_elsewhere(backend):
    given = packed(HEADS) | HEADS
    judge(FN, {**given, "write_indices": torch.tensor([1, 0, 3, -1, 5])}, backend)
    judge(FN, {**given, "conv_states": None, "cache_indices": None, "has_initial_state": None}, backend)
    ring = {"state_layout": "ring", "cache_seqlens": torch.tensor([7, 0, 3, 2, 9])}
    judge(FN, {**given, "conv_states": torch.randn(6, 5, dim_of(HEADS)).bfloat16(), **ring}, backend)


@pytest.mark.parametrize("heads", [HEADS, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("leading", [(5,), (5, 1), (5, 3)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"q_scale": 0.5}, {"norm_rounding": "none", "qk_l2norm": True}], ids=str
)
def test_decode(heads, leading, options, backend):
    given = arrays(heads, leading) | heads | options
    given["cache_indices"] = torch.tensor([4, 0, 2, -1, 5])
    for name in ("x", "a", "b"):
        given[name] = given[name].clone()
        given[name][3] = float("nan")
    judge(UPDATE, given, backend)


def test_decode_of_many_rows(backend):
    given = arrays(HEADS, (9, 1), channel=True, slots=12) | HEADS
    judge(UPDATE, given, backend)


def test_windows_trees_and_packed_steps(backend):
    given = arrays(HEADS, (3, 4)) | HEADS
    windows = torch.zeros(3, 4, 3, dim_of(HEADS)).bfloat16()
    judge(UPDATE, {**given, "window_out": windows, "commit": False}, backend)
    tree = {"tree_parents": torch.tensor([[-1, 0, 0, 1]] * 3), "commit": False}
    judge(UPDATE, {**given, **tree}, backend)
    rolls = {
        "conv_states": torch.randn(3, 6, dim_of(HEADS)).bfloat16(),
        "num_accepted_tokens": torch.tensor([1, 2, 3]),
    }
    judge(UPDATE, {**given, **rolls}, backend)
    given = arrays(HEADS, (9,)) | HEADS
    judge(UPDATE, {**given, "query_start_loc": torch.tensor([0, 3, 3, 8]), "max_seqlen": 5}, backend)


@pytest.mark.parametrize("heads", [HEADS, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_is_the_plain_convolution_and_a_norm_of_its_own(heads, activation, dtype, backend):
    given = packed(heads, dtype) | heads | {"q_scale": 0.7, "activation": activation, "backend": backend}
    states = given["conv_states"].clone()
    found = triton_impl.gated_delta_prologue_fn(**given)
    plain = RECORDS[FN](**given)._replace(conv_states=states).convolution()
    y = triton_impl.causal_conv1d_fn(*plain[:7], activation=activation, backend=backend).out
    sizes = RECORDS[FN](**given).check()
    for name, part in zip("qkv", separate_norm(numpy_of(y), sizes, {"q_scale": 0.7}), strict=True):
        np.testing.assert_array_equal(to_numpy(getattr(found, name)), part.data)
    assert torch.equal(states, given["conv_states"])


def test_nothing_to_do(backend):
    given = arrays(HEADS, (0,)) | HEADS | {"query_start_loc": torch.tensor([0, 0])}
    found = judge(FN, given, backend)
    assert found["q"].shape == (0, 2, 16)
    assert found["g"].shape == (0, 4)


def test_gates_of_rows_that_another_kernel_convolves(backend):
    """x [batch, dim] in a ring: a row's gates are its own, not the first row's."""
    given = arrays(HEADS, (4,), state_len=5) | HEADS
    ring = {"state_layout": "ring", "cache_seqlens": torch.tensor([7, 0, 3, 2])}
    judge(UPDATE, given | ring, backend)
