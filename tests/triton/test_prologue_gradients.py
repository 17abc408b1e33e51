"""Gradients of the differentiable prologue: plain torch and the kernels against autograd through the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

import triton_impl

EVEN = dict(num_k_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=8)
ODD = dict(num_k_heads=3, num_v_heads=3, head_k_dim=5, head_v_dim=7)
NAMES = ("x", "weight", "bias", "initial_states", "a", "b", "A_log", "dt_bias")


def arrays(heads, leading, rows, channel, dtype):
    torch.manual_seed(0)
    keys, values = heads["num_k_heads"] * heads["head_k_dim"], heads["num_v_heads"]
    dim = 2 * keys + values * heads["head_v_dim"]
    gate = (values, heads["head_k_dim"]) if channel else (values,)
    given = dict(
        x=torch.randn(*leading, dim),
        weight=torch.randn(dim, 4),
        bias=torch.randn(dim),
        initial_states=torch.randn(rows, 3, dim),
        a=torch.randn(*leading, *gate) * 3,
        b=torch.randn(*leading, values),
        A_log=torch.randn(values) / 2,
        dt_bias=torch.randn(gate),
    )
    return {name: tensor.to(dtype) for name, tensor in given.items()}


def formula(
    given, heads, starts, lower_bound=None, q_scale=1.0, qk_l2norm=True, activation="silu", norm_eps=1e-6
):
    """The results of packed rows in float64; zeros behind the last row."""
    x, weight, history = given["x"], given["weight"], given["weight"].shape[1] - 1
    outs, finals = [], []
    for i in range(len(starts) - 1):
        e = torch.cat([given["initial_states"][i], x[starts[i] : starts[i + 1]]])
        pre = given["bias"] + sum(e[j : len(e) - history + j] * weight[:, j] for j in range(history + 1))
        outs.append(F.silu(pre) if activation else pre)
        finals.append(e[len(e) - history :])
    outs.append(torch.zeros_like(x[starts[-1] :]))
    y, keys = torch.cat(outs), heads["num_k_heads"] * heads["head_k_dim"]
    parts = [
        part.unflatten(1, (heads[f"num_{kind}_heads"], heads[f"head_{kind}_dim"]))
        for part, kind in zip(y.split([keys, keys, y.shape[1] - 2 * keys], 1), "kkv", strict=True)
    ]
    if qk_l2norm:
        parts[:2] = [p / torch.sqrt((p * p).sum(-1, keepdim=True) + norm_eps) for p in parts[:2]]
    parts[0] = parts[0] * q_scale
    rate, z = given["A_log"].exp(), given["a"] + given["dt_bias"]
    rate = rate[:, None] if z.dim() == 3 else rate
    g = -rate * F.softplus(z) if lower_bound is None else lower_bound * torch.sigmoid(rate * z)
    live = torch.arange(len(x)) < starts[-1]
    g = torch.where(live.view(-1, *[1] * (g.dim() - 1)), g, 0)
    beta = torch.where(live[:, None], given["b"].sigmoid(), 0)
    return *parts, g, beta, torch.stack(finals)


def gradients(results, given):
    torch.manual_seed(1)
    upstream = [torch.randn(result.shape).to(result.dtype) for result in results]
    leaves = [given[name] for name in NAMES if name in given]
    return torch.autograd.grad(results, leaves, upstream, allow_unused=True)


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("heads", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lower_bound": -5.0, "q_scale": 0.5, "norm_eps": 0.1},
        {"qk_l2norm": False, "activation": None, "q_scale": 2.0},
    ],
    ids=lambda o: " ".join(o) or "plain",
)
def test_gradients_of_packed_rows(heads, channel, options, backend):
    starts = [0, 5, 5, 6, 17]
    given = arrays(heads, (20,), 4, channel, torch.float64)
    exact = {name: tensor.requires_grad_() for name, tensor in given.items()}
    expected = gradients(formula(exact, heads, starts, **options), exact)
    real = {name: tensor.detach().float().requires_grad_() for name, tensor in given.items()}
    found = triton_impl.gated_delta_prologue(
        **real, **heads, query_start_loc=torch.tensor(starts), **options, backend=backend
    )
    for name, wanted, grad in zip(NAMES, expected, gradients(found, real), strict=True):
        torch.testing.assert_close(
            grad.double(), wanted, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_dense_rows_in_bfloat16(backend):
    given = arrays(EVEN, (2, 7), 2, False, torch.bfloat16)
    flat = {
        name: tensor.double().flatten(0, 1) if name in ("x", "a", "b") else tensor.double()
        for name, tensor in given.items()
    }
    exact = {name: tensor.requires_grad_() for name, tensor in flat.items()}
    expected = gradients(formula(exact, EVEN, [0, 7, 14]), exact)
    real = {name: tensor.requires_grad_() for name, tensor in given.items()}
    found = triton_impl.gated_delta_prologue(**real, **EVEN, backend=backend)
    assert found.q.shape == (2, 7, 2, 16)
    torch.manual_seed(1)
    shapes = [result.shape for result in formula(exact, EVEN, [0, 7, 14])]
    upstream = [
        torch.randn(shape).view(result.shape).to(result.dtype)
        for shape, result in zip(shapes, found, strict=True)
    ]
    grads = torch.autograd.grad(list(found), [real[name] for name in NAMES], upstream)
    for name, wanted, grad in zip(NAMES, expected, grads, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            grad.double().view(wanted.shape),
            wanted,
            rtol=0.05,
            atol=0.03 * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_only_some_gradients_and_inputs(backend):
    given = arrays(EVEN, (2, 7), 2, False, torch.float32)
    x = given["x"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # channel-first
    found = triton_impl.gated_delta_prologue(x, given["weight"], **EVEN, backend=backend)
    assert found.g is None
    assert found.beta is None
    (first,) = torch.autograd.grad(found.k.sum(), x)
    other = x.detach().contiguous().requires_grad_()
    again = triton_impl.gated_delta_prologue(other, given["weight"], **EVEN, backend=backend)
    (second,) = torch.autograd.grad(again.k.sum(), other)
    assert torch.equal(first, second)


def test_compiled():
    given = arrays(EVEN, (2, 7), 2, False, torch.float32)
    real = {name: tensor.requires_grad_() for name, tensor in given.items()}

    def loss(given):
        found = triton_impl.gated_delta_prologue(**given, **EVEN, backend="eager")
        return sum((part * part).sum() for part in found)

    expected = torch.autograd.grad(loss(real), list(real.values()))
    found = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(real), list(real.values())
    )
    for wanted, grad in zip(expected, found, strict=True):
        torch.testing.assert_close(grad, wanted)
