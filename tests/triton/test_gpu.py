"""The Triton kernels compiled, on a GPU: conformance, sizes past 2**31 elements, no synchronisation, no recompilation."""

import json
import subprocess
import sys

import pytest
import torch
import triton

import triton_impl
from oracle.contract import FnCall
from tests.tools.synchronisation import no_synchronisation
from triton_impl import call as calls
from triton_impl import config, prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
DEVICE = "cuda"


def batch(lengths, dim=512, width=4, dtype=torch.bfloat16, tail=0, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rows = len(lengths)
    return dict(
        x=normal(int(offsets[-1]) + tail, dim),
        weight=normal(dim, width),
        bias=normal(dim),
        conv_states=normal(2 * rows + 1, width - 1, dim),
        query_start_loc=offsets.to(DEVICE, torch.int32),
        cache_indices=torch.randperm(2 * rows + 1, device=DEVICE, generator=generator)[:rows],
        has_initial_state=torch.arange(rows, device=DEVICE) % 2 == 0,
    )


def run_fn(arguments, **options):
    arguments = arguments | {"conv_states": arguments["conv_states"].clone()}
    return triton_impl.causal_conv1d_fn(**arguments, activation="silu", **options)


@pytest.mark.timeout(1200)
def test_conformance(tmp_path):
    report = tmp_path / "report.jsonl"
    command = [
        sys.executable,
        "-m",
        "oracle",
        "run",
        "--impl",
        "triton_impl.adapter:adapter",
        "--device",
        "cuda",
    ]
    done = subprocess.run(
        [*command, "--tier", "core", "--tier", "full", "--report", str(report)], check=False
    )
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert done.returncode == 0
    assert len(records) > 400


@pytest.mark.parametrize(
    "lengths", [(1, 9, 2, 17, 4), (2048,) * 3, (5000, *[1] * 100), (0, 0, 3000), (1,) * 2000]
)
def test_schedules_and_blocks_agree_in_every_bit(lengths):
    arguments = batch(lengths, dim=1040, tail=7)
    plain = run_fn(arguments, schedule="flat")
    rows = run_fn(arguments, schedule="per_sequence", max_seqlen=max(lengths))
    assert torch.equal(rows.out, plain.out)
    assert torch.equal(rows.conv_states, plain.conv_states)
    for block_t, block_d, num_warps, group, stages in [
        (4, 256, 2, 4, 1),
        (8, 256, 1, 8, 1),
        (16, 512, 2, 8, 1),
        (32, 1024, 4, 8, 1),
        (64, 512, 2, 8, 3),
    ]:
        chosen = config.PrefillConfig(True, True, block_t, block_d, group, 1, 32, num_warps, stages)
        pool, out = arguments["conv_states"].clone(), torch.full_like(arguments["x"], torch.nan)
        call = FnCall(**arguments | {"conv_states": pool}, activation="silu")
        launch = prefill.prepare(call, call.check(), chosen, stores=True)
        launch(*(getattr(call, name) for name in prefill.ARRAYS), out)
        assert torch.equal(out, plain.out)
        assert torch.equal(pool, plain.conv_states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("split", [1, 2, 3, 8, 64, 999])
def test_chunks_and_steps_equal_the_whole(dtype, split):
    arguments = batch((1000,), dtype=dtype)
    x, weight, bias = arguments["x"], arguments["weight"], arguments["bias"]

    def chunk(x, pool, has):
        offsets = torch.tensor([0, x.shape[0]], device=DEVICE)
        flags = torch.tensor([has], device=DEVICE)
        return triton_impl.causal_conv1d_fn(
            x, weight, bias, pool, offsets, None, flags, activation="silu"
        ).out

    pools = [torch.full((1, 3, 512), torch.nan, dtype=dtype, device=DEVICE) for _ in range(3)]
    whole = chunk(x, pools[0], False)
    chunks = torch.cat([chunk(x[:split], pools[1], False), chunk(x[split:], pools[1], True)])
    steps = [chunk(x[:split], pools[2], False)]
    rest = x[split : split + 30]
    steps += [
        triton_impl.causal_conv1d_update(t[None], weight, bias, pools[2], activation="silu").out for t in rest
    ]
    assert torch.equal(chunks, whole)
    assert torch.equal(torch.cat(steps), whole[: split + len(rest)])
    assert torch.equal(pools[1], pools[0])


def test_repeated_runs_are_bit_identical():
    arguments = batch([3, 700, 1, 1, 64, 65, 2], dim=4096)
    first = run_fn(arguments)
    for _ in range(50):
        again = run_fn(arguments)
        assert torch.equal(again.out, first.out)
        assert torch.equal(again.conv_states, first.conv_states)


def test_offsets_past_two_to_the_31_elements():
    """x of pitch 36864 elements and 60000 tokens, and a pool whose last slots start past 2**32 elements."""
    dim, tokens, pitch = 64, 60000, 36864
    wide = torch.empty(tokens, pitch, dtype=torch.bfloat16, device=DEVICE)
    x = wide[:, -dim:]
    x.copy_(torch.randn(tokens, dim, device=DEVICE))
    assert x.storage_offset() + (tokens - 1) * pitch > 2**31
    slots = 2**32 // (3 * 8192) + 10
    pages = torch.empty(slots * 3 * 8192, dtype=torch.bfloat16, device=DEVICE).view(slots, 3, 8192)
    pool = pages[:, :, -dim:]
    pool.zero_()
    arguments = batch([tokens - 5, 5], dim=dim) | {
        "x": x,
        "conv_states": pool,
        "cache_indices": torch.tensor([slots - 1, slots - 2], device=DEVICE),
    }
    small = arguments | {
        "x": x.contiguous(),
        "conv_states": pool[-2:].contiguous(),
        "cache_indices": torch.tensor([1, 0], device=DEVICE),
    }
    expected = triton_impl.causal_conv1d_fn(**small)
    for schedule in ("flat", "per_sequence"):
        pool.zero_()
        result = triton_impl.causal_conv1d_fn(**arguments, schedule=schedule)
        assert torch.equal(result.out, expected.out)
        assert torch.equal(pool[-2:], expected.conv_states)
        assert not pool[:-2].any()
    step = torch.randn(2, dim, device=DEVICE).to(torch.bfloat16)
    got = triton_impl.causal_conv1d_update(step, arguments["weight"], None, pool, arguments["cache_indices"])
    want = triton_impl.causal_conv1d_update(
        step, arguments["weight"], None, expected.conv_states, small["cache_indices"]
    )
    assert torch.equal(got.out, want.out)
    assert torch.equal(pool[-2:], want.conv_states)


def test_channel_first_x_past_two_to_the_31_elements():
    x = torch.randn(8200, 262144, dtype=torch.float16, device=DEVICE).t()
    arguments = batch([262144], dim=8200, dtype=torch.float16) | {"x": x}
    last = run_fn(arguments).out[:, -8:]
    part = {name: arguments[name][-8:].contiguous() for name in ("weight", "bias")}
    part |= {"x": x[:, -8:].contiguous(), "conv_states": arguments["conv_states"][:, :, -8:].contiguous()}
    assert torch.equal(last, run_fn(arguments | part).out)


def test_many_channels_and_many_rows():
    """65,536 channels and 70,000 rows: more than a grid axis of 65,535."""
    wide = batch([4, 4], dim=65536, width=2)
    assert torch.equal(run_fn(wide).out[:, -512:], run_fn(_channels(wide, slice(-512, None))).out)
    rows = batch([1] * 70000, dim=32)
    expected = run_fn(rows, backend="eager")
    for schedule in ("flat", "per_sequence"):
        result = run_fn(rows, schedule=schedule, max_seqlen=1)
        assert torch.equal(result.conv_states, expected.conv_states)
        torch.testing.assert_close(result.out, expected.out, rtol=2**-7, atol=1e-6)
    wide = torch.randn(32, 8, dtype=torch.bfloat16, device=DEVICE)  # of which a program takes one row
    steps = []
    for backend in ("triton", "eager"):
        pool = torch.randn(
            70001, 7, 32, generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE
        ).bfloat16()
        steps.append(triton_impl.causal_conv1d_update(rows["x"], wide, None, pool, backend=backend))
    assert torch.equal(steps[0].conv_states, steps[1].conv_states)
    torch.testing.assert_close(steps[0].out, steps[1].out, rtol=2**-7, atol=1e-6)


def _channels(arguments, part):
    cut = {name: arguments[name][part].contiguous() for name in ("weight", "bias")}
    cut |= {name: arguments[name][..., part].contiguous() for name in ("x", "conv_states")}
    return arguments | cut


def test_nothing_synchronises():
    arguments = batch([5, 100, 1])
    step = arguments["x"][:3]

    def calls():
        run_fn(arguments)
        run_fn(arguments, schedule="per_sequence", max_seqlen=100)
        triton_impl.causal_conv1d_update(
            step, arguments["weight"], None, arguments["conv_states"], arguments["cache_indices"]
        )

    calls()  # compiles
    with no_synchronisation():
        calls()


def test_the_check_sees_a_synchronisation():
    with pytest.raises(RuntimeError, match="synchronizing"), no_synchronisation():
        torch.ones(2, device="cuda").sum().item()


def test_nothing_is_compiled_when_only_lengths_change(monkeypatch):
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts))
    generator = torch.Generator().manual_seed(1)
    cuts = torch.randint(0, 4097, (200, 15), generator=generator).sort(dim=1).values
    before = None
    for cut in cuts.tolist():
        arguments = batch([b - a for a, b in zip([0, *cut], [*cut, 4096], strict=True)])
        run_fn(arguments)
        run_fn(arguments, schedule="flat")
        if before is None:
            before, count = len(compiled), calls.remembered()
    assert len(compiled) == before
    assert calls.remembered() == count, "a prepared call does not depend on the lengths"


def test_a_tensor_on_the_second_device_is_computed_there():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = {name: value.to("cuda:1") for name, value in batch([5, 7]).items()}
    assert torch.equal(run_fn(arguments).out.cpu(), run_fn(batch([5, 7])).out.cpu())


def documents(seqlen, dim, width, dtype, seed=0):
    """x, weight and bias of four rows, ids of which each comes back, and where the documents begin in packed tokens."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(4, seqlen, generator=generator) < 0.02
    begins[:, 0] = False
    begins[0, 1:6] = True  # one token each
    ids = begins.cumsum(1).remainder(2)
    begins[:, 0] = True
    starts = torch.cat([begins.flatten().nonzero()[:, 0], torch.tensor([4 * seqlen])])
    arrays = (torch.randn(*shape, generator=generator) for shape in ((4, seqlen, dim), (dim, width), (dim,)))
    arrays = [array.to(DEVICE, dtype).requires_grad_() for array in arrays]
    return arrays, ids.to(DEVICE, torch.int32), starts.to(DEVICE, torch.int32)


@pytest.mark.parametrize("layout", ["rows", "apart", "channel-first"])
@pytest.mark.parametrize(
    ("seqlen", "dim", "width", "dtype"),
    [(2048, 2048, 4, torch.bfloat16), (133, 640, 3, torch.float16), (77, 96, 8, torch.float32), (40, 64, 2, torch.bfloat16)],
)  # fmt: skip
def test_documents_have_the_bits_of_rows_alone(seqlen, dim, width, dtype, layout):
    """Outputs, and gradients of x; sums over tokens up to their order. Nothing synchronises."""
    (x, weight, bias), ids, starts = documents(seqlen, dim, width, dtype)
    with torch.no_grad():
        if layout == "apart":
            x = torch.cat([x, x], 2)[..., dim:]
        elif layout == "channel-first":
            x = x.mT.contiguous().mT
    given = x.detach().requires_grad_(), weight, bias
    dout = torch.randn(4, seqlen, dim, device=DEVICE).to(dtype)

    def rows(x, weight, bias):
        return triton_impl.short_conv(
            x, weight, bias, segment_ids=ids, activation="silu", want_cache=False
        ).out

    def alone(x, weight, bias):
        packed = x.reshape(-1, dim), weight, bias, None, starts
        return triton_impl.causal_conv1d(*packed, activation="silu").out.view(x.shape)

    torch.autograd.grad(rows(*given), given, dout)  # compiles
    with no_synchronisation():
        out = rows(*given)
        found = torch.autograd.grad(out, given, dout)
    want = alone(*given)
    wanted = torch.autograd.grad(want, given, dout)
    assert torch.equal(out, want)
    assert torch.equal(found[0], wanted[0])
    for got, sums in zip(found[1:], wanted[1:], strict=True):
        near = (torch.finfo(dtype).eps + 1e-5) * sums.abs().max().item()
        torch.testing.assert_close(got, sums, rtol=0, atol=near)


def test_documents_compiled_by_inductor():
    (x, weight, bias), ids, _ = documents(133, 640, 4, torch.bfloat16)
    cache = torch.randn(4, 3, 640, device=DEVICE).to(x.dtype).requires_grad_()

    def step(x, weight, bias, cache, ids):
        return triton_impl.short_conv(x, weight, bias, cache=cache, segment_ids=ids, activation="silu")

    given = x, weight, bias, cache
    compiled = torch.compile(step, fullgraph=True)
    found, wanted = compiled(*given, ids), step(*given, ids)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
    dout = torch.randn_like(wanted.out)
    gradients = (torch.autograd.grad(result.out, given, dout) for result in (found, wanted))
    for got, want in zip(*gradients, strict=True):
        assert torch.equal(got, want)
