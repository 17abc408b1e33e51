"""The fronts compiled, on a GPU: bits at real sizes, no synchronisation, graphs, torch.compile."""

import pytest
import torch

import triton_impl
from tests.tools.synchronisation import no_synchronisation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
DEVICE = "cuda"


def normal(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)


def call(keys, values, key_dim, value_dim, leading, dtype=torch.bfloat16, channel=False, **options):
    """Arguments of a decode step of `leading` rows."""
    dim = 2 * keys * key_dim + values * value_dim
    gate = (values, key_dim) if channel else (values,)
    return dict(
        x=normal(*leading, dim, dtype=dtype),
        weight=normal(dim, 4, dtype=dtype, seed=1) * 0.5,
        bias=None,
        conv_states=normal(2 * leading[0], 6, dim, dtype=dtype, seed=2),
        cache_indices=torch.randperm(2 * leading[0], device=DEVICE)[: leading[0]],
        num_k_heads=keys,
        num_v_heads=values,
        head_k_dim=key_dim,
        head_v_dim=value_dim,
        a=normal(*leading, *gate, seed=3),
        b=normal(*leading, values, seed=4),
        A_log=normal(values, dtype=torch.float32, seed=5),
        dt_bias=normal(*gate, dtype=torch.float32, seed=6),
        **options,
    )


def packed(*heads, lengths=(1000, 1, 0, 37, 5), tail=3, **options):
    tokens, rows = sum(lengths) + tail, len(lengths)
    given = call(*heads, (tokens,), **options)
    given["conv_states"] = given["conv_states"][: 2 * rows]
    slots = torch.arange(rows) * 2
    slots[3] = -1
    given["cache_indices"] = slots.to(DEVICE)
    given["query_start_loc"] = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    given["has_initial_state"] = torch.arange(rows, device=DEVICE) % 2 == 0
    return given


def plain(operation, given):
    """q, k and v of the plain convolution and a norm in torch, with its pool."""
    names = ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state")
    inner = {name: given[name] for name in names if name in given}
    inner["conv_states"] = inner["conv_states"].clone()
    keys = given["num_k_heads"], given["head_k_dim"]
    values = given["num_v_heads"], given["head_v_dim"]
    sizes = [keys[0] * keys[1]] * 2 + [values[0] * values[1]]
    q, k, v = getattr(triton_impl, operation)(**inner, activation="silu", split_sizes=sizes).out

    def norm(y):
        y = y.unflatten(-1, keys).float()
        total = torch.nn.functional.pad(y * y, (0, (1 << (keys[1] - 1).bit_length()) - keys[1]))
        while total.shape[-1] > 1:
            total = total[..., 0::2] + total[..., 1::2]
        root = torch.sqrt((total + 1e-6).double()).float()
        return (y * (1.0 / root.double()).float()).to(q.dtype)

    return norm(q), norm(k), v.unflatten(-1, values), inner["conv_states"]


SHAPES = [(16, 32, 128, 128), (4, 8, 64, 128), (3, 6, 256, 64), (2, 2, 96, 80), (5, 5, 7, 3)]


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bits_are_those_of_the_plain_convolution_and_a_norm(heads, dtype):
    steps = [("gated_delta_prologue_fn", "causal_conv1d_fn", packed(*heads, dtype=dtype))]
    steps += [
        ("gated_delta_prologue_update", "causal_conv1d_update", call(*heads, leading, dtype=dtype))
        for leading in ((1,), (300,), (5, 4))
    ]
    for operation, inner, given in steps:
        expected = plain(inner, given)
        found = getattr(triton_impl, operation)(**given)
        for name, wanted in zip(("q", "k", "v", "conv_states"), expected, strict=True):
            assert torch.equal(getattr(found, name), wanted), (operation, name)


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gates(channel, lower_bound):
    given = packed(4, 8, 128, 128, channel=channel, lower_bound=lower_bound)
    found = triton_impl.gated_delta_prologue_fn(**given)
    z, rate = given["a"].double() + given["dt_bias"].double(), given["A_log"].double().exp()
    rate = rate[:, None] if channel else rate
    expected = -rate * torch.nn.functional.softplus(z)
    if lower_bound is not None:
        expected = lower_bound * torch.sigmoid(rate * z)
    live = torch.ones(len(z), dtype=torch.bool, device=DEVICE)
    live[1001:1038] = live[-3:] = False
    # exp of an argument u is off by u's own error, some roundings of |u|; the sigmoid at -u is exp(-u) where that is small
    argument = torch.zeros_like(z) if lower_bound is None else (rate * z).abs()
    error = 3e-6 + 4 * 2.0**-24 * argument
    assert ((found.g.double() - expected).abs() <= error * expected.abs() + 1e-30)[live].all()
    torch.testing.assert_close(
        found.beta[live].double(), given["b"][live].double().sigmoid(), rtol=1e-6, atol=0
    )
    assert not found.g[~live].any()
    assert not found.beta[~live].any()


def test_a_graph_replays_both_and_nothing_waits_for_the_device():
    prefill, decode = packed(4, 8, 128, 128), call(4, 8, 128, 128, (7,))
    bcx, taps = normal(7, 300), normal(100, 3)
    states = normal(9, 2, 100)

    def run():
        first = triton_impl.gated_delta_prologue_fn(**prefill)
        second = triton_impl.gated_delta_prologue_update(**decode)
        third = triton_impl.gated_short_conv_update(bcx, taps, None, states)
        return *first[:5], *second[:5], third.out

    pools = [prefill["conv_states"], decode["conv_states"], states]
    kept = [pool.clone() for pool in pools]
    run()
    for pool, before in zip(pools, kept, strict=True):
        pool.copy_(before)
    with no_synchronisation():
        expected = run()
    expected = [tensor.clone() for tensor in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for pool, before in zip(pools, kept, strict=True):
        pool.copy_(before)
    graph.replay()
    assert all(map(torch.equal, found, expected))


def test_compiled_by_inductor():
    given, bcx, taps = packed(4, 8, 128, 128), normal(40, 300), normal(100, 3)
    starts = torch.tensor([0, 40], device=DEVICE)
    other = {**given, "conv_states": given["conv_states"].clone()}

    def run(arguments):
        found = triton_impl.gated_delta_prologue_fn(**arguments)
        gated = triton_impl.gated_short_conv_fn(bcx, taps, None, None, starts).out
        return found.q * 2, found.k, found.v, found.g + 1, found.beta, gated

    expected = run(given)
    found = torch.compile(run, fullgraph=True)(other)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(given["conv_states"], other["conv_states"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [3, 8])
def test_gradients_of_the_gated_convolution(width, dtype):
    """One pass over the projection has the gradients of the composed form, waits for nothing, and compiles."""
    dim, starts = 520, torch.tensor([0, 1, 1, 900, 2000], dtype=torch.int32, device=DEVICE)
    given = [normal(2048, 3 * dim, dtype=dtype), normal(dim, width, dtype=dtype), normal(dim, dtype=dtype)]
    given.append(normal(4, width - 1, dim, dtype=dtype))
    upstream = normal(2048, dim, dtype=dtype, seed=3), normal(4, width - 1, dim, dtype=dtype, seed=4)
    offsets = (0, dim, 2 * dim)

    def gradients(*arrays, extra=0):
        arrays = [array.detach().requires_grad_() for array in arrays]
        wide = torch.nn.functional.pad(arrays[0], (0, extra))
        found = triton_impl.gated_short_conv(
            wide, *arrays[1:], starts, channel_offsets=offsets, activation="silu"
        )
        return torch.autograd.grad(tuple(found), arrays, upstream)

    gradients(*given)
    with no_synchronisation():
        found = gradients(*given)
    close = dict(rtol=8 * torch.finfo(dtype).eps, atol=1e-4)
    for one, two in zip(found, gradients(*given, extra=8), strict=True):
        torch.testing.assert_close(one, two, **close)
    assert not found[0][2000:].any()

    def loss(*arrays):
        return triton_impl.gated_short_conv(*arrays, starts, channel_offsets=offsets, activation="silu").out

    arrays = [array.detach().requires_grad_() for array in given]
    again = torch.autograd.grad(torch.compile(loss)(*arrays), arrays[:3], upstream[0])
    plain = torch.autograd.grad(loss(*arrays), arrays[:3], upstream[0])
    assert all(map(torch.equal, again, plain))
