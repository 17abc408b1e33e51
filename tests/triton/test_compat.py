"""The drop-in adapters: values against plain torch, in-place behaviour, refusals, and installing."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import triton_impl.compat
from oracle.contract import Unsupported, UpdateCall
from tests.tools.synchronisation import no_synchronisation
from triton_impl import call as call_module
from triton_impl.call import run
from triton_impl.compat import causal_conv1d as dao
from triton_impl.compat import cpp_functions, fla, sglang, vllm
from triton_impl.compat.layout import folds_into_channels

torch.set_num_threads(1)  # the tensors are tiny
DIM, WIDTH = 6, 4
ROOT = Path(__file__).resolve().parents[2]
CPU = pytest.param("cpu", id="cpu")
GPU = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
DEVICES = pytest.mark.parametrize("device", [CPU, GPU])


def random(*shape, device="cpu"):
    return torch.randn(*shape).to(device)


def taps(device="cpu", width=WIDTH):
    return random(DIM, width, device=device), random(DIM, device=device)


def convolve(x, weight, bias, window=None, activation=None):
    """x [dim, tokens] behind `window` [dim, any] in float64: the definition, written with the library's conv1d."""
    width = weight.shape[1]
    if x.shape[1] == 0:
        return x.double()
    window = x.new_zeros(x.shape[0], 0) if window is None else window
    before = F.pad(window.double(), (width - 1, 0))[:, window.shape[1] :]
    extended = torch.cat([before, x.double()], dim=1)
    bias = None if bias is None else bias.double()
    out = F.conv1d(extended[None], weight.double()[:, None], bias, groups=x.shape[0])[0]
    return F.silu(out) if activation else out


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# causal-conv1d


def layouts(device):
    """x [3, 6, 9] in every kind of memory, with whether its data must be copied once."""
    return {
        "channel_first": random(3, DIM, 9, device=device),
        "channel_last": random(3, 9, DIM, device=device).transpose(1, 2),
        "slice_of_projection": random(3, 9, 16, device=device)[:, :, 2:8].transpose(1, 2),
        "half_of_channels": random(3, 2 * DIM, 9, device=device).chunk(2, dim=1)[0],
        "one_token": random(3, DIM, 1, device=device),
        "one_row": random(1, DIM, 9, device=device),
        "empty": random(3, DIM, 0, device=device),
    }


@DEVICES
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", layouts("cpu"))
def test_dense_prefill(layout, activation, device):
    weight, bias = taps(device)
    x = layouts(device)[layout]
    before = x.clone()
    out = dao.causal_conv1d_fn(x, weight, bias, activation=activation)
    assert out.shape == x.shape
    assert torch.equal(x, before)
    for row in range(x.shape[0]):
        close(out[row], convolve(x[row], weight, bias, None, activation))

    initial = random(x.shape[0], DIM, WIDTH - 1, device=device)
    kept = initial.clone()
    out, final = dao.causal_conv1d_fn(x, weight, bias, None, initial, True, None, activation)
    assert torch.equal(initial, kept)
    assert torch.equal(final, torch.cat([initial, x], dim=2)[:, :, -(WIDTH - 1) :])
    for row in range(x.shape[0]):
        close(out[row], convolve(x[row], weight, bias, initial[row], activation))

    mine = torch.empty(x.shape[0], WIDTH - 1, DIM, device=device).transpose(1, 2)
    _, final = dao.causal_conv1d_fn(x, weight, bias, None, None, True, mine, activation)
    assert final is mine
    assert torch.equal(mine, F.pad(x, (WIDTH - 1, 0))[:, :, -(WIDTH - 1) :])


@pytest.mark.parametrize(
    ("layout", "copies"),
    [
        ("channel_first", False),
        ("channel_last", False),
        ("slice_of_projection", False),
        ("half_of_channels", True),
    ],
)
def test_dense_prefill_reads_x_in_place(layout, copies, monkeypatch):
    """The packed call gets x's own memory, but for the one layout that no view covers."""
    seen = []

    def spy(x, *args, real=dao.dense_rows.__globals__["causal_conv1d_fn"], **options):
        seen.append(x.untyped_storage().data_ptr())
        return real(x, *args, **options)

    monkeypatch.setitem(dao.dense_rows.__globals__, "causal_conv1d_fn", spy)
    monkeypatch.setitem(dao.folded_channels.__globals__, "causal_conv1d_fn", spy)
    x = layouts("cpu")[layout]
    dao.causal_conv1d_fn(x, *taps())
    assert (seen == [x.untyped_storage().data_ptr()]) is not copies
    assert folds_into_channels(x) is (layout == "channel_first")


@DEVICES
def test_sequence_ids(device):
    weight, bias = taps(device)
    x = random(2, DIM, 9, device=device)
    ids = [[0, 0, 1, 1, 1, -1, 2, 2, 2], [7, 3, 3, 3, 3, 3, 3, 3, -5]]
    out = dao.causal_conv1d_fn(x, weight, bias, torch.tensor(ids, dtype=torch.int32, device=device))
    for row, runs in enumerate([[(0, 2), (2, 5), (6, 9)], [(0, 1), (1, 8)]]):
        want = torch.zeros(DIM, 9, dtype=torch.float64, device=device)
        for start, end in runs:
            want[:, start:end] = convolve(x[row, :, start:end], weight, bias)
        close(out[row], want)


@DEVICES
@pytest.mark.parametrize("slots", [None, [2, -1, 0], [3, 99, 1]])
@pytest.mark.parametrize("seqlen", [None, 1, 2, 5, 14])
@pytest.mark.parametrize("state_len", [3, 4, 6, 12])
@pytest.mark.parametrize("update", [dao.causal_conv1d_update, sglang.causal_conv1d_update])
def test_update_with_the_window_at_the_back(update, state_len, seqlen, slots, device):
    """causal-conv1d's rule: the slot becomes the last state_len entries of slot ++ x; padding rows are zero."""
    weight, bias = taps(device)
    x = random(3, DIM, device=device) if seqlen is None else random(3, DIM, seqlen, device=device)
    states = random(4, DIM, state_len, device=device)
    indices = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=device)
    tokens, want_states = x.reshape(3, DIM, -1).clone(), states.clone()
    out = update(x, states, weight, bias, "silu", conv_state_indices=indices)
    assert out.shape == x.shape
    for row, slot in enumerate(range(3) if slots is None else slots):
        if not 0 <= slot < 4:
            assert not out[row].any()
            continue
        window = want_states[slot, :, state_len - WIDTH + 1 :]
        close(out[row].reshape(DIM, -1), convolve(tokens[row], weight, bias, window, "silu"))
        want_states[slot] = torch.cat([want_states[slot], tokens[row]], dim=1)[:, -state_len:]
    assert torch.equal(states, want_states)
    if update is sglang.causal_conv1d_update:
        assert out is x
    else:
        assert torch.equal(x.reshape(3, DIM, -1), tokens)


def test_varlen_states():
    x = random(7, DIM)
    states = dao.causal_conv1d_varlen_states(x, torch.tensor([0, 1, 1, 7]), 4)
    assert states.shape == (3, DIM, 4)
    assert torch.equal(states[0], F.pad(x[:1].t(), (3, 0)))
    assert not states[1].any()
    assert torch.equal(states[2], x[3:7].t())
    assert dao.causal_conv1d_varlen_states(x[:0], torch.tensor([0, 0]), 4).shape == (1, DIM, 4)


def test_low_level_functions():
    weight, bias = taps()
    x, final = random(2, DIM, 5), torch.empty(2, DIM, WIDTH - 1)
    out = cpp_functions.causal_conv1d_fwd_function(x, weight, bias, None, None, final, True)
    assert torch.equal(out, dao.causal_conv1d_fn(x, weight, bias, activation="silu"))
    assert torch.equal(final, x[:, :, -(WIDTH - 1) :])
    token = random(2, DIM)
    step = cpp_functions.causal_conv1d_update_function(token, final.clone(), weight, bias, False, None, None)
    assert torch.equal(step, dao.causal_conv1d_update(token, final, weight, bias))


# The serving engines: a packed batch of rows of 3, 0, 1, 5 (padding) and 4 tokens, and 2 tokens of tail.

LENGTHS, SLOTS, HAS = [3, 0, 1, 5, 4], [5, 2, 1, None, 3], [True, True, False, True, True]


def packed(pad, device="cpu"):
    slots = torch.tensor([pad if s is None else s for s in SLOTS], dtype=torch.int32, device=device)
    starts = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    pool = random(7, DIM, WIDTH - 1 + 2, device=device)
    x = random(sum(LENGTHS) + 2, DIM, device=device)
    return x, pool, starts, slots, torch.tensor(HAS, device=device)


def expected(x, pool, weight, bias):
    """The outputs [dim, tokens] and the pool that the contract asks for."""
    want, after, token = torch.zeros(DIM, x.shape[0], dtype=torch.float64, device=x.device), pool.clone(), 0
    for length, slot, has in zip(LENGTHS, SLOTS, HAS, strict=True):
        if slot is not None and length:
            row = x[token : token + length].t()
            window = pool[slot, :, : WIDTH - 1] if has else torch.zeros_like(pool[slot, :, : WIDTH - 1])
            want[:, token : token + length] = convolve(row, weight, bias, window, "silu")
            after[slot, :, : WIDTH - 1] = torch.cat([window, row], dim=1)[:, -(WIDTH - 1) :]
        token += length
    return want, after


PREFILLS = {
    "sglang": (-1, lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn(x, w, b, q, s, h, p)),
    "sglang-host-lengths": (
        -1,
        lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn(x, w, b, q, s, h, p, seq_lens_cpu=LENGTHS),
    ),
    "sglang-triton": (
        -1,
        lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn_triton(x, w, b, p, q, LENGTHS, s, h),
    ),
    "sglang-triton-lengths-too-small": (
        -1,
        lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn_triton(x, w, b, p, q, [1], s, h),
    ),
    "sglang-triton-block-table": (
        -1,
        lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn_triton(
            x, w, b, p, q, None, s, h, block_table=q.new_zeros(4, 2)
        ),
    ),
    "sglang-triton-pad-0": (
        0,
        lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn_triton(
            x, w, b, p, q, torch.tensor(LENGTHS), s, h, "silu", 0
        ),
    ),
    "vllm": (0, lambda x, w, b, p, q, s, h: vllm.causal_conv1d_fn(x, w, b, p, q, s, h)),
    "vllm-minus-one": (
        -1,
        lambda x, w, b, p, q, s, h: vllm.causal_conv1d_fn(x, w, b, p, q, s, h, validate_data=False),
    ),
    "vllm-null-block": (
        6,
        lambda x, w, b, p, q, s, h: vllm.causal_conv1d_fn(x, w, b, p, q, s, h, "silu", -1, 6),
    ),
}


@DEVICES
@pytest.mark.parametrize("name", PREFILLS)
@pytest.mark.parametrize("token_major", [True, False])
def test_packed_prefill(name, token_major, device):
    pad, prefill = PREFILLS[name]
    weight, bias = taps(device)
    x, pool, starts, slots, has = packed(pad, device)
    want, after = expected(x, pool, weight, bias)
    given = x.t() if token_major else x.t().contiguous()
    out = prefill(given, weight, bias, pool, starts, slots, has)
    close(out, want)
    assert torch.equal(pool, after)
    if name.startswith("sglang") and "triton" not in name and not token_major:
        assert out is given  # in place where tokens have unit stride, as SGLang's CUDA kernel
    else:
        assert torch.equal(given, x.t())


def test_one_batch_through_both_call_styles_of_sglang_gives_the_same_bits():
    weight, bias = taps()
    x, pool, starts, slots, has = packed(-1)
    pools = [pool.clone() for _ in range(2)]
    first = sglang.causal_conv1d_fn(x.t(), weight, bias, starts, slots, has, pools[0], seq_lens_cpu=LENGTHS)
    second = sglang.causal_conv1d_fn_triton(x.t(), weight, bias, pools[1], starts, LENGTHS, slots, has)
    assert torch.equal(first, second)
    assert torch.equal(*pools)


@pytest.mark.parametrize(
    ("options", "bound", "schedule"),
    [
        (dict(seq_lens_cpu=LENGTHS), max(LENGTHS), "auto"),
        (dict(seq_lens_cpu=torch.tensor(LENGTHS)), max(LENGTHS), "auto"),
        (dict(seq_lens_cpu=[]), 0, "auto"),
        (dict(), None, "auto"),
        (dict(block_table=torch.zeros(3, 2, dtype=torch.int32)), None, "flat"),
    ],
)
def test_host_lengths_choose_the_grid(options, bound, schedule, monkeypatch):
    """SGLang's host lengths reach the schedule as a bound; nothing has to be read from the device for it."""
    seen = []
    real = sglang.packed_fn
    monkeypatch.setattr(sglang, "packed_fn", lambda *args, **kw: (seen.append(kw), real(*args, **kw))[1])
    x, pool, starts, slots, has = packed(-1)
    sglang.causal_conv1d_fn(x.t(), *taps(), starts, slots, has, pool, **options)
    assert [(kw["max_seqlen"], kw["schedule"], kw["validate"]) for kw in seen] == [(bound, schedule, False)]


@pytest.mark.gpu
def test_no_call_synchronises():
    weight, bias = taps("cuda")
    x, pool, starts, slots, has = packed(-1, "cuda")
    token = x[: len(SLOTS)].clone()
    calls = [
        lambda: sglang.causal_conv1d_fn(x.t(), weight, bias, starts, slots, has, pool, seq_lens_cpu=LENGTHS),
        lambda: sglang.causal_conv1d_fn_triton(x.t(), weight, bias, pool, starts, LENGTHS, slots, has),
        lambda: vllm.causal_conv1d_fn(x.t(), weight, bias, pool, starts, slots, has),
        lambda: vllm.causal_conv1d_update(token, pool, weight, bias, "silu", slots),
        lambda: dao.causal_conv1d_fn(x[None].mT, weight, bias, starts.new_zeros(1, x.shape[0])),
        lambda: dao.causal_conv1d_update(token, pool, weight, bias, None, None, slots),
        lambda: fla.causal_conv1d(x[None], weight, bias, None, None, True, cu_seqlens=starts),
    ]
    for call in calls:
        call()  # compiles
        with no_synchronisation():
            call()


def test_dense_prefill_of_sglang():
    weight, bias = taps()
    x, pool = random(2, 5, DIM).transpose(1, 2), random(4, DIM, WIDTH - 1)
    before = pool.clone()
    slots, has = torch.tensor([3, 1]), torch.tensor([True, False])
    out = sglang.causal_conv1d_fn(x, weight, bias, None, slots, has, pool)
    close(out[0], convolve(x[0], weight, bias, before[3], "silu"))
    close(out[1], convolve(x[1], weight, bias, None, "silu"))
    assert torch.equal(pool[[0, 2]], before[[0, 2]])
    assert torch.equal(pool[[3, 1]], x[:, :, -(WIDTH - 1) :])


UPDATES = {
    "sglang-triton": lambda x, p, w, b, s: sglang.causal_conv1d_update_triton(
        x, p, w, b, True, conv_state_indices=s, pad_slot_id=0
    ),
    "vllm": lambda x, p, w, b, s: vllm.causal_conv1d_update(x, p, w, b, "silu", s),
    "vllm-two-axes": lambda x, p, w, b, s: vllm.causal_conv1d_update(
        x, p, w, b, "silu", torch.stack([s, s + 1], dim=1)
    ),
    "vllm-out": lambda x, p, w, b, s: vllm.causal_conv1d_update(
        x, p, w, b, "silu", s, out=torch.empty_like(x)
    ),
}


@DEVICES
@pytest.mark.parametrize("seqlen", [None, 1, 3])
@pytest.mark.parametrize("name", UPDATES)
def test_update_with_the_window_in_front(name, seqlen, device):
    weight, bias = taps(device)
    x = random(3, DIM, device=device) if seqlen is None else random(3, DIM, seqlen, device=device)
    pool, tokens = random(5, DIM, WIDTH + 1, device=device), x.reshape(3, DIM, -1).clone()
    after = pool.clone()
    out = UPDATES[name](x, pool, weight, bias, torch.tensor([4, 0, 2], device=device))
    for row, slot in ((0, 4), (2, 2)):
        window = after[slot, :, : WIDTH - 1].clone()
        close(out[row].reshape(DIM, -1), convolve(tokens[row], weight, bias, window, "silu"))
        after[slot, :, : WIDTH - 1] = torch.cat([window, tokens[row]], dim=1)[:, -(WIDTH - 1) :]
    assert not out[1].any()
    assert torch.equal(pool, after)
    if name in ("vllm", "vllm-two-axes"):
        assert out is x
    else:
        assert torch.equal(x.reshape(3, DIM, -1), tokens)


@DEVICES
@pytest.mark.parametrize("layout", ["batch", "token_major", "channel_first"])
def test_the_update_kernel_may_write_over_x(layout, device):
    """What in-place peers rest on; on a CPU in Triton's interpreter."""
    weight, bias = taps(device)
    x = {
        "batch": lambda: random(5, DIM, device=device),
        "token_major": lambda: random(5, 3, DIM, device=device),
        "channel_first": lambda: random(5, DIM, 3, device=device).transpose(1, 2),
    }[layout]()
    pool, slots = random(7, WIDTH - 1, DIM, device=device), torch.tensor([3, 6, -1, 0, 5], device=device)
    pools = pool.clone(), pool.clone()
    calls = [UpdateCall(x, weight, bias, pool, slots, activation="silu", backend="triton") for pool in pools]
    want = run(UpdateCall, tuple(calls[0]))
    out = run(UpdateCall, tuple(calls[1]), out=x)
    assert out is x
    assert torch.equal(out, want)
    assert torch.equal(*pools)
    assert want.stride() == x.stride()


def test_rows_of_different_lengths_in_an_update_of_vllm():
    weight, bias = taps()
    x, pool = random(4, DIM), random(5, DIM, WIDTH - 1)
    tokens, before = x.clone(), pool.clone()
    out = vllm.causal_conv1d_update(
        x, pool, weight, bias, None, torch.tensor([2, 4]), None, torch.tensor([0, 1, 4]), 3
    )
    assert out is x
    for start, end, slot in ((0, 1, 2), (1, 4, 4)):
        row = tokens[start:end].t()
        close(out[start:end].t(), convolve(row, weight, bias, before[slot]))
        assert torch.equal(pool[slot], torch.cat([before[slot], row], dim=1)[:, -(WIDTH - 1) :])


ON_KERNELS = {
    "prefill token-major": lambda: test_packed_prefill("vllm", True, "cpu"),
    "prefill channel-major": lambda: test_packed_prefill("sglang-triton", False, "cpu"),
    "prefill in place": lambda: test_packed_prefill("sglang-host-lengths", False, "cpu"),
    "update in front": lambda: test_update_with_the_window_in_front("vllm", 3, "cpu"),
    "update to out": lambda: test_update_with_the_window_in_front("vllm-out", None, "cpu"),
    "update at the back": lambda: test_update_with_the_window_at_the_back(
        sglang.causal_conv1d_update, 6, 2, [2, -1, 0], "cpu"
    ),
    "update of a cache": lambda: test_update_with_the_window_at_the_back(
        dao.causal_conv1d_update, 4, 1, None, "cpu"
    ),
    "dense folded": lambda: test_dense_prefill("channel_first", "silu", "cpu"),
    "dense packed": lambda: test_dense_prefill("slice_of_projection", None, "cpu"),
    "ids": lambda: test_sequence_ids("cpu"),
    "fla": lambda: test_fla_dense_and_packed(True, True),
}


@pytest.mark.parametrize("name", ON_KERNELS)
def test_on_the_kernels(name, monkeypatch):
    """The same checks through the Triton kernels, in Triton's interpreter: views have strides that kernels must take."""
    monkeypatch.setattr(call_module, "resolve", lambda backend, device: "triton")
    ON_KERNELS[name]()


# flash-linear-attention


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_fla_dense_and_packed(residual, with_state):
    weight, bias = taps()
    x = random(1, 13, DIM)
    more = random(1, 13, DIM) if residual else None
    starts = torch.tensor([0, 2, 2, 6, 11])
    initial = random(4, DIM, WIDTH) if with_state else None
    kept = None if initial is None else initial.clone()
    y, final = fla.causal_conv1d(
        x, weight, bias, more, initial, True, "silu", cu_seqlens=starts, cu_seqlens_cpu=starts.cpu()
    )
    for row, (start, end) in enumerate([(0, 2), (2, 2), (2, 6), (6, 11)]):
        history = torch.zeros(DIM, WIDTH) if initial is None else kept[row]
        tokens = x[0, start:end].t()
        want = convolve(tokens, weight, bias, history, "silu")
        close(y[0, start:end].t(), want + more[0, start:end].t() if residual else want)
        assert torch.equal(final[row], torch.cat([history, tokens], dim=1)[:, -WIDTH:])
    if with_state:
        assert torch.equal(initial, kept)

    dense, none = fla.causal_conv1d(x, weight, bias)
    assert none is None
    close(dense[0].t(), convolve(x[0].t(), weight, bias))


@pytest.mark.parametrize("shape", [(3, DIM), (3, 1, DIM), (1, 3, DIM)])
def test_fla_update(shape):
    weight, bias = taps()
    x, cache = random(*shape), random(3, WIDTH, DIM).transpose(1, 2)
    before = cache.clone()
    y, same = fla.causal_conv1d_update(x, cache, None, weight, bias, "swish")
    assert same is cache
    assert y.shape == x.shape
    tokens = x.reshape(3, DIM, 1)
    for row in range(3):
        close(y.reshape(3, DIM, 1)[row], convolve(tokens[row], weight, bias, before[row, :, 1:], "silu"))
    assert torch.equal(cache, torch.cat([before, tokens], dim=2)[:, :, 1:])


# Gradients: the dense and packed prefills of the training peers.


def reference(x, weight, bias, initial=None, activation=None):
    """x [batch, dim, seqlen] behind initial [batch, dim, any], differentiable, in the library's operations."""
    before = F.pad(x.new_zeros(*x.shape[:2], 0) if initial is None else initial, (weight.shape[1], 0))
    extended = torch.cat([before, x], dim=2)
    out = F.conv1d(extended, weight[:, None], bias, groups=x.shape[1])[:, :, -x.shape[2] :]
    return (F.silu(out) if activation else out), extended


def gradients(call, inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    results = call(*leaves)
    torch.manual_seed(7)
    upstream = [torch.randn(result.shape).to(result) for result in results]
    return torch.autograd.grad(results, leaves, upstream)


def same_gradients(call, want, inputs):
    for got, expected in zip(gradients(call, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@DEVICES
@pytest.mark.parametrize("channel_last", [False, True])
def test_gradients_of_causal_conv1d(channel_last, device):
    weight, bias = taps(device)
    x, initial = random(2, DIM, 7, device=device), random(2, DIM, WIDTH - 1, device=device)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x
    same_gradients(
        lambda x, w, b: [dao.causal_conv1d_fn(x, w, b, activation="silu")],
        lambda x, w, b: [reference(x, w, b, None, "silu")[0]],
        [x, weight, bias],
    )

    def want(x, w, b, initial):
        out, extended = reference(x, w, b, initial)
        return out, extended[:, :, -(WIDTH - 1) :]

    same_gradients(
        lambda x, w, b, i: dao.causal_conv1d_fn(x, w, b, None, i, True), want, [x, weight, bias, initial]
    )

    ids = torch.tensor([[0, 0, 0, -1, 4, 4, 4]] * 2, dtype=torch.int32, device=device)
    same_gradients(
        lambda x, w, b: [dao.causal_conv1d_fn(x, w, b, ids)],
        lambda x, w, b: [
            torch.cat(
                [reference(x[:, :, :3], w, b)[0], x[:, :, 3:4] * 0, reference(x[:, :, 4:], w, b)[0]], dim=2
            )
        ],
        [x, weight, bias],
    )

    upstream, dfinal = random(2, DIM, 7, device=device), random(2, DIM, WIDTH - 1, device=device)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, initial)]
    expected = torch.autograd.grad(want(*leaves), leaves, [upstream, dfinal])
    dx = torch.empty_like(x)
    found = cpp_functions.causal_conv1d_bwd_function(
        x, weight, bias, upstream, None, initial, dfinal, dx, True, False
    )
    assert found[0] is dx
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for given in (None, initial):
        found = cpp_functions.causal_conv1d_bwd_function(
            x, weight, None, upstream, None, given, None, None, False, True
        )
        assert [gradient is None for gradient in found] == [False, False, True, True]


@DEVICES
def test_gradients_of_fla(device):
    weight, bias = taps(device)
    x, initial, residual = (
        random(1, 9, DIM, device=device),
        random(2, DIM, WIDTH, device=device),
        random(1, 9, DIM, device=device),
    )
    starts = torch.tensor([0, 2, 9], device=device)

    def call(x, w, b, residual, initial):
        return fla.causal_conv1d(x, w, b, residual, initial, True, "silu", cu_seqlens=starts)

    def want(x, w, b, residual, initial):
        tokens, parts, finals = x.transpose(1, 2), [], []
        for row, (start, end) in enumerate([(0, 2), (2, 9)]):
            # column 0 of the cache enters the new cache, but no output
            out, _ = reference(tokens[:, :, start:end], w, b, initial[row : row + 1, :, 1:], "silu")
            parts.append(out)
            finals.append(torch.cat([initial[row : row + 1], tokens[:, :, start:end]], dim=2)[:, :, -WIDTH:])
        return torch.cat(parts, dim=2).transpose(1, 2) + residual, torch.cat(finals)

    same_gradients(call, want, [x, weight, bias, residual, initial])


# What is refused, and how bad input is named.

ONE = torch.ones(1, dtype=torch.int32)
X, W = torch.ones(DIM, 3), torch.ones(DIM, WIDTH)
STATE, STARTS = torch.zeros(2, DIM, WIDTH - 1), torch.tensor([0, 3])
SPECULATIVE = (
    "num_accept_tokens",
    "intermediate_conv_window",
    "retrieve_next_token",
    "retrieve_next_sibling",
)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: dao.causal_conv1d_update(X.t()[:2], STATE, W, cache_seqlens=ONE), ValueError, "cache_seqlens"),
        (lambda: sglang.causal_conv1d_update(X.t()[:2], STATE, W, cache_seqlens=ONE), ValueError, "cache_seqlens"),
        (lambda: sglang.causal_conv1d_update_triton(X.t()[:2], STATE, W, cache_seqlens=ONE), ValueError, "cache_seqlens"),
        *[
            (lambda n=name: sglang.causal_conv1d_update_triton(X.t(), STATE, W, **{n: ONE}), ValueError, name)
            for name in SPECULATIVE
        ],
        (lambda: vllm.causal_conv1d_update(X.t(), STATE, W, num_accepted_tokens=ONE), ValueError, "num_accepted_tokens"),
        (lambda: vllm.causal_conv1d_fn(X, W, None, STATE, STARTS, pad_slot_id=1), Unsupported, "pad_slot_id"),
        (lambda: fla.causal_conv1d(X.t()[None], W, cp_context=object()), Unsupported, "cp_context"),
        (lambda: fla.causal_conv1d(X.t()[None], W, backend="hip"), ValueError, "backend"),
        (lambda: fla.causal_conv1d(X.t()[None]), ValueError, "weight"),
        (lambda: fla.causal_conv1d(torch.ones(2, 3, DIM), W, cu_seqlens=STARTS), ValueError, "x: expected batch 1"),
        (lambda: fla.causal_conv1d_update(torch.ones(2, 2, DIM), STATE, None, W), ValueError, "x: expected one token"),
        (lambda: fla.causal_conv1d_update(torch.ones(2, DIM), None, None, W), TypeError, "cache"),
        (lambda: sglang.causal_conv1d_fn(X, W, None, STARTS, no_such=1), TypeError, "no_such"),
        (lambda: sglang.causal_conv1d_fn_triton(X, W, None, STATE, STARTS, None, no_such=1), TypeError, "no_such"),
        (lambda: sglang.causal_conv1d_fn_triton(X, W, None, STATE, STARTS, "3"), TypeError, "seq_lens_cpu"),
        (lambda: sglang.causal_conv1d_fn_triton(X, W, None, STATE, STARTS, [3, -1]), ValueError, "seq_lens_cpu"),
        (lambda: sglang.causal_conv1d_fn(X, W), ValueError, r"x: expected shape \[batch, dim, seqlen\]"),
        (lambda: dao.causal_conv1d_fn(X, W), ValueError, r"x: expected shape \[batch, dim, seqlen\], got \[6, 3\]"),
        (lambda: dao.causal_conv1d_fn([1.0], W), TypeError, "x: expected a torch.Tensor, got list"),
        (lambda: dao.causal_conv1d_fn(X[None], W[1:]), ValueError, r"weight: expected shape \[dim=6, width\], got \[5, 4\]"),
        (lambda: dao.causal_conv1d_fn(X[None], torch.ones(DIM, 9)), ValueError, "weight: expected width 1 to 8"),
        (lambda: dao.causal_conv1d_fn(X[None], W, activation="relu"), ValueError, "activation"),
        (lambda: dao.causal_conv1d_fn(X[None], W, seq_idx=ONE), ValueError, "seq_idx"),
        (lambda: dao.causal_conv1d_fn(X[None], W, seq_idx=torch.ones(1, 3)), TypeError, "seq_idx"),
        (lambda: dao.causal_conv1d_fn(X[None], W, None, torch.ones(1, 3).int(), STATE), ValueError, "initial_states"),
        (lambda: dao.causal_conv1d_fn(X[None], W, None, torch.ones(1, 3).int(), None, True), Unsupported, "return_final"),
        (lambda: dao.causal_conv1d_fn(X[None], W, final_states_out=STATE[:1]), ValueError, "final_states_out"),
        (lambda: dao.causal_conv1d_fn(X[None], W, initial_states=STATE), ValueError, r"initial_states: .*batch=1"),
        (lambda: dao.causal_conv1d_update(X, STATE, W), ValueError, "weight: expected shape"),
        (lambda: dao.causal_conv1d_update(X.t()[:2], STATE[:, :, :2], W), ValueError, "conv_state: .* >= width-1 = 3 on axis 2"),
        (lambda: dao.causal_conv1d_update(X.t()[:2], STATE, W, conv_state_indices=STARTS.float()), TypeError, "conv_state_indices"),
        (lambda: sglang.causal_conv1d_update(X.t(), STATE, W, conv_state_indices=ONE), ValueError, r"conv_state_indices: .*batch=3"),
        (lambda: vllm.causal_conv1d_update(X.t()[:2], STATE.mT, W), ValueError, r"conv_state: expected shape \[num_slots, dim=6"),
        (lambda: vllm.causal_conv1d_update(X.t()[:2], STATE, W, out=torch.ones(2, DIM).half()), TypeError, "out"),
        (lambda: vllm.causal_conv1d_update(X.t()[:2], STATE, W, out=torch.ones(DIM, 2)), ValueError, "out"),
        (lambda: vllm.causal_conv1d_fn(X, W, None, STATE, STARTS.float()), TypeError, "query_start_loc"),
    ],
)  # fmt: skip
def test_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: vllm.causal_conv1d_fn(X, W, None, STATE, STARTS, ONE + 8), "cache_indices"),
        (lambda: vllm.causal_conv1d_update(X.t()[:1].clone(), STATE, W, conv_state_indices=ONE + 8), "cache_indices"),
        (lambda: sglang.causal_conv1d_fn_triton(X, W, None, STATE, torch.tensor([0, 4]), None, ONE), "query_start_loc"),
        (lambda: sglang.causal_conv1d_fn(X, W, None, torch.tensor([0, 4]), ONE, None, STATE), "query_start_loc"),
        (lambda: sglang.causal_conv1d_update_triton(X.t()[:1], STATE, W, conv_state_indices=ONE + 8), "cache_indices"),
    ],
)  # fmt: skip
def test_data_is_checked_where_that_is_asked_for(call, text):
    """By our own name: the peers' `validate_data` looks at shapes and strides only, and so never synchronises."""
    call()
    with triton_impl.compat.validated(), pytest.raises(ValueError, match=text):
        call()
    call()


# Installing


def printed(code, *paths):
    """Runs code in a fresh interpreter that finds `paths` first; returns what it printed."""
    lines = [f"import sys; sys.path[:0] = {[str(p) for p in (*paths, ROOT)]!r}", code]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def installed():
    triton_impl.compat.install("causal_conv1d")
    yield
    triton_impl.compat.uninstall("causal_conv1d")


def test_install_as_causal_conv1d(installed):
    module = importlib.import_module("causal_conv1d")
    assert importlib.util.find_spec("causal_conv1d") is module.__spec__
    assert module.__version__ == dao.__version__ == importlib.metadata.version("causal_conv1d")
    assert importlib.metadata.version("causal-conv1d") == dao.__version__
    assert module.causal_conv1d_fn is dao.causal_conv1d_fn
    low = importlib.import_module("causal_conv1d.cpp_functions")
    assert low.causal_conv1d_fwd_function is cpp_functions.causal_conv1d_fwd_function
    varlen = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
    assert varlen.causal_conv1d_varlen_states is dao.causal_conv1d_varlen_states
    interface = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    assert interface.causal_conv1d_update is dao.causal_conv1d_update
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("causal_conv1d.no_such_part")


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def test_uninstall():
    before = importlib.util.find_spec("causal_conv1d"), version("causal_conv1d")
    triton_impl.compat.install("causal_conv1d")
    triton_impl.compat.install("causal_conv1d")  # a second time: nothing more to undo
    triton_impl.compat.uninstall("causal_conv1d")
    assert importlib.util.find_spec("causal_conv1d") is before[0]
    assert version("causal_conv1d") == before[1]
    triton_impl.compat.uninstall("causal_conv1d")


def test_an_installed_package_comes_back(tmp_path, monkeypatch):
    (tmp_path / "causal_conv1d.py").write_text("causal_conv1d_fn = 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    theirs = importlib.import_module("causal_conv1d")
    triton_impl.compat.install("causal_conv1d")
    try:
        assert importlib.import_module("causal_conv1d").causal_conv1d_fn is dao.causal_conv1d_fn
    finally:
        triton_impl.compat.uninstall("causal_conv1d")
    assert importlib.import_module("causal_conv1d") is theirs
    monkeypatch.delitem(sys.modules, "causal_conv1d")


def test_importing_patches_nothing():
    code = """
import triton_impl.compat.causal_conv1d, triton_impl.compat.sglang, triton_impl.compat.vllm, triton_impl.compat.fla
import importlib.util
print([importlib.util.find_spec(name) for name in ("causal_conv1d", "sglang", "vllm", "fla")])
"""
    assert "".join(printed(code)) == "[None,None,None,None]"


ENGINES = {
    "sglang": {
        "sglang/srt/layers/attention/mamba/causal_conv1d.py": ["causal_conv1d_fn", "causal_conv1d_update"],
        "sglang/kernels/ops/mamba/causal_conv1d_triton.py": ["causal_conv1d_fn", "causal_conv1d_update"],
    },
    "vllm": {
        "vllm/model_executor/layers/mamba/ops/causal_conv1d.py": ["causal_conv1d_fn", "causal_conv1d_update"]
    },
    "fla": {"fla/modules/conv/__init__.py": ["causal_conv1d", "causal_conv1d_update"]},
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a package that stands in for an engine: {file: names of its functions}; gone after the test."""
    kept = dict(sys.modules)

    def make(files):
        for path, names in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True)
            for folder in [*file.relative_to(tmp_path).parents][:-1]:
                (tmp_path / folder / "__init__.py").touch()
            file.write_text("".join(f"def {name}(): pass\n" for name in names))
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        top = path.partition("/")[0]
        (tmp_path / top / "model.py").write_text(
            f"from {module} import {names[0]} as conv, {names[-1]} as step\n"
        )
        for name in [name for name in sys.modules if name.partition(".")[0] == top]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(f"{top}.model")

    yield make
    for name in set(sys.modules) - set(kept):
        if name.partition(".")[0] in ENGINES:
            del sys.modules[name]


@pytest.mark.parametrize("engine", ENGINES)
def test_install_into_an_engine(engine, stand_in):
    """The engine's functions are replaced wherever its modules hold them, then come back."""
    model = stand_in(ENGINES[engine])
    before = model.conv, model.step
    triton_impl.compat.install(engine)
    triton_impl.compat.install(engine)
    assert model.conv.__module__ == model.step.__module__ == f"triton_impl.compat.{engine}"
    triton_impl.compat.uninstall(engine)
    assert (model.conv, model.step) == before


def test_install_into_an_engine_that_lacks_a_function(stand_in):
    model = stand_in({next(iter(ENGINES["vllm"])): ["causal_conv1d_fn"]})
    before = model.conv
    with pytest.raises(ImportError, match="causal_conv1d_update"):
        triton_impl.compat.install("vllm")
    assert model.conv is before


def test_install_unknown_or_missing():
    with pytest.raises(ValueError, match="peer"):
        triton_impl.compat.install("conv")
    with pytest.raises(ValueError, match="peer"):
        triton_impl.compat.uninstall("conv")
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ImportError, match="vllm"):
            triton_impl.compat.install("vllm")


def test_install_too_late_warns(monkeypatch):
    stand_in = type(sys)("transformers.models.stand_in.modeling_stand_in")
    stand_in.causal_conv1d_fn = print
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    with pytest.warns(RuntimeWarning, match="modeling_stand_in"):
        triton_impl.compat.install("causal_conv1d")
    triton_impl.compat.uninstall("causal_conv1d")
