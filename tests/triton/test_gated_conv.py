"""The gated short convolution: plain torch and the kernels, in Triton's interpreter, against the oracle."""

import numpy as np
import pytest
import torch

import triton_impl
from oracle.contract_prologue import RECORDS
from oracle.numerics import TypedArray
from oracle.reference_prologue import Gated, checked
from triton_impl import prologue_backward
from triton_impl.adapter import to_numpy
from triton_impl.call import forget

FN, UPDATE = "gated_short_conv_fn", "gated_short_conv_update"
DIM = 20
NEARLY = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def numpy_of(value):
    if not isinstance(value, torch.Tensor):
        return value
    return TypedArray(str(value.dtype).removeprefix("torch."), to_numpy(value).copy())


def arrays(leading, dtype=torch.bfloat16, channels=3 * DIM, slots=6, state_len=4, width=3):
    torch.manual_seed(0)
    return dict(
        bcx=torch.randn(*leading, channels).to(dtype),
        weight=torch.randn(DIM, width).to(dtype),
        bias=torch.randn(DIM).to(dtype),
        conv_states=torch.randn(slots, state_len, DIM).to(dtype),
    )


def packed(dtype=torch.bfloat16, **options):
    """Rows of 5, 0, 1, 9 and 2 tokens, the fourth of padding, and a tail; NaN where nothing is computed."""
    given = arrays((21,), dtype, **options)
    given["query_start_loc"] = torch.tensor([0, 5, 5, 6, 15, 17], dtype=torch.int32)
    given["cache_indices"] = torch.tensor([4, 0, 2, -1, 5])
    given["has_initial_state"] = torch.tensor([True, False, True, True, False])
    given["bcx"][6:15] = given["bcx"][17:] = float("nan")
    return given


def judge(op, given, backend):
    """Runs a call and compares it with the oracle: results closely, states and windows bit for bit."""
    call = RECORDS[op](**{name: numpy_of(value) for name, value in given.items()})
    expected = Gated().gated(op, checked(op, call._asdict()))
    found = getattr(triton_impl, op)(**given, backend=backend)._asdict()
    near = NEARLY[given["bcx"].dtype]
    np.testing.assert_allclose(found["out"].double().numpy(), expected["out"].values(), rtol=near, atol=near)
    for name in ("conv_states", "window_out"):
        if given.get(name) is not None:
            assert found[name] is given[name]
            np.testing.assert_array_equal(to_numpy(given[name]), expected[name].data)


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", list(NEARLY), ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "silu", "schedule": "flat"}], ids=str)
def test_packed_rows(dtype, options, backend):
    judge(FN, packed(dtype) | options, backend)


def test_slices_anywhere_and_channel_first(backend):
    given = packed(channels=71)
    judge(FN, {**given, "channel_offsets": (40, 3, 11)}, backend)
    judge(FN, {**given, "channel_offsets": (9, 9, 51)}, backend)
    judge(FN, {**given, "channel_offsets": (9, 29, 51), "bcx": given["bcx"].t().contiguous().t()}, backend)


def test_states_elsewhere(backend):
    given = packed()
    judge(FN, {**given, "write_indices": torch.tensor([1, 0, 3, -1, 5])}, backend)
    judge(FN, {**given, "conv_states": None, "cache_indices": None, "has_initial_state": None}, backend)
    judge(FN, {**given, "state_layout": "ring", "cache_seqlens": torch.tensor([7, 0, 3, 2, 9])}, backend)
    judge(FN, {**given, "state_layout": "back"}, backend)


@pytest.mark.parametrize("leading", [(5,), (5, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_decode(leading, width, backend):
    given = arrays(leading, width=width) | {"cache_indices": torch.tensor([4, 0, 2, -1, 5])}
    given["bcx"][3] = float("nan")
    judge(UPDATE, given, backend)


def test_windows_trees_and_packed_steps(backend):
    given = arrays((3, 4))
    judge(UPDATE, {**given, "window_out": torch.zeros(3, 4, 2, DIM).bfloat16(), "commit": False}, backend)
    tree = {"tree_parents": torch.tensor([[-1, 0, 0, 1]] * 3), "commit": False}
    judge(UPDATE, {**given, **tree, "window_out": torch.zeros(3, 4, 2, DIM).bfloat16()}, backend)
    rolls = {"conv_states": torch.randn(3, 6, DIM).bfloat16(), "num_accepted_tokens": torch.tensor([1, 2, 3])}
    judge(UPDATE, {**given, **rolls}, backend)
    steps = {"query_start_loc": torch.tensor([0, 3, 3, 8]), "max_seqlen": 5}
    judge(UPDATE, {**arrays((9,)), **steps}, backend)


def test_gradients(backend):
    """Against autograd through the formula in float64; NaN behind the last row reaches nothing."""
    starts, history = [0, 5, 5, 6, 17], 2
    given = arrays((20,), torch.float32)
    initial = torch.randn(4, history, DIM)
    names = ("bcx", "weight", "bias", "initial_states")
    real = dict(zip(names, (given["bcx"], given["weight"], given["bias"], initial), strict=True))
    exact = {name: value.double().requires_grad_() for name, value in real.items()}
    rows, finals = [], []
    for i in range(4):
        b, c, x = exact["bcx"][starts[i] : starts[i + 1]].split(DIM, 1)
        e = torch.cat([exact["initial_states"][i], b * x])
        taps = exact["weight"]
        rows.append(c * (exact["bias"] + sum(e[j : j + len(c)] * taps[:, j] for j in range(history + 1))))
        finals.append(e[len(c) :])
    expected = [torch.cat([*rows, torch.zeros(3, DIM).double()]), torch.stack(finals)]
    real["bcx"][17:] = float("nan")
    real = {name: value.requires_grad_() for name, value in real.items()}
    found = triton_impl.gated_short_conv(**real, query_start_loc=torch.tensor(starts), backend=backend)
    upstream = [torch.randn(result.shape) for result in found]
    wanted = torch.autograd.grad(expected, list(exact.values()), [g.double() for g in upstream])
    grads = torch.autograd.grad(list(found), list(real.values()), upstream)
    torch.testing.assert_close(found.out.double(), expected[0], rtol=1e-5, atol=1e-5)
    for one, two in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5)


# Dynamo makes an instance of the function that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_gradients_in_bfloat16_are_rounded_once(backend):
    """Autograd through the products would round each step. Compiled, and under torch.func, they have the same bits."""
    torch.manual_seed(2)
    bcx, weight, dout = (torch.randn(*shape).bfloat16() for shape in ((2, 5, 3 * DIM), (DIM, 3), (2, 5, DIM)))

    def gradients(function, bcx, weight):
        bcx, weight = bcx.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(function(bcx, weight).out, (bcx, weight), dout.to(bcx.dtype))

    def front(bcx, weight):
        return triton_impl.gated_short_conv(bcx, weight, backend=backend)

    found, exact = gradients(front, bcx, weight), gradients(front, bcx.double().float(), weight.float())
    gate_in, _, x = bcx.chunk(3, -1)
    same = (
        gate_in * x
    ).float() == gate_in.float() * x.float()  # where u needs no rounding dC has none either
    assert same.any()
    assert torch.equal(found[0][..., -DIM:], exact[0][..., -DIM:].bfloat16())
    loss = lambda *args: (front(*args).out * dout).sum()  # noqa: E731
    for one, two in zip(torch.func.grad(loss, (0, 1))(bcx, weight), found, strict=True):
        assert torch.equal(one, two)
    if backend == "eager":
        compiled = torch.compile(front, backend="aot_eager", fullgraph=True)
        for one, two in zip(gradients(compiled, bcx, weight), found, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("width", "dtype", "order", "options"),
    [
        (1, torch.float32, (1, 2, 0), {}),
        (2, torch.bfloat16, (0, 1, 2), {"schedule": "flat", "activation": "silu"}),
        (3, torch.float16, (2, 0, 1), {"schedule": "per_sequence", "max_seqlen": 79}),
        (8, torch.float32, (0, 2, 1), {"activation": "silu"}),
    ],
    ids=str,
)
def test_one_pass_has_the_gradients_of_products_around_the_convolution(
    width, dtype, order, options, monkeypatch
):
    """Over several blocks; NaN behind the last row reaches nothing. A projection with more channels is not one pass."""
    torch.manual_seed(1)
    rows, starts = 83, torch.tensor([0, 1, 1, 80], dtype=torch.int32)
    bcx, dout = torch.randn(rows, 3 * DIM).to(dtype), torch.randn(rows, DIM).to(dtype)
    bcx[80:] = dout[80:] = float("nan")
    weight, bias = torch.randn(DIM, width).to(dtype), torch.randn(DIM).to(dtype)
    initial = torch.randn(3, width - 1, DIM).to(dtype)
    dfinal = torch.randn(3, width - 1, DIM).to(dtype)
    offsets = tuple(DIM * place for place in order)
    taken = []
    prepare = prologue_backward.prepare_gated
    monkeypatch.setattr(prologue_backward, "prepare_gated", lambda *a: taken.append(1) or prepare(*a))
    forget()

    def gradients(extra, upstream):
        given = [t.clone().requires_grad_() for t in (bcx, weight, bias, initial)]
        wide = torch.nn.functional.pad(given[0], (0, extra))
        found = triton_impl.gated_short_conv(
            wide, *given[1:], starts, channel_offsets=offsets, backend="triton", **options
        )
        pairs = [pair for pair in zip(found, upstream, strict=True) if pair[1] is not None]
        return torch.autograd.grad([a for a, _ in pairs], given, [b for _, b in pairs])

    for upstream in ([dout, dfinal], [dout, None], [None, dfinal]):
        found, expected = gradients(0, upstream), gradients(1, upstream)
        for one, two in zip(found, expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, two, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
        assert not found[0][80:].any()
    assert len(taken) == 3


def test_dense_rows_are_one_pass_too():
    torch.manual_seed(1)
    bcx, weight = torch.randn(2, 40, 3 * DIM), torch.randn(DIM, 3)
    dense, packed, starts = (
        bcx.clone().requires_grad_(),
        bcx.reshape(80, -1).clone().requires_grad_(),
        [0, 40, 80],
    )
    triton_impl.gated_short_conv(dense, weight, backend="triton").out.square().sum().backward()
    found = triton_impl.gated_short_conv(
        packed, weight, query_start_loc=torch.tensor(starts), backend="triton"
    )
    found.out.square().sum().backward()
    assert torch.equal(dense.grad.view(80, -1), packed.grad)
