"""One capture, many batches: static buffers of a padded batch, refilled between runs.

On a GPU the calls are captured once in a CUDA graph and replayed. On a CPU the same buffers go through Triton's
interpreter again. The judge is the plain torch path on fresh tensors of the live rows alone.
"""

import pytest
import torch

import triton_impl
from tests.tools.synchronisation import no_synchronisation
from triton_impl.compat import sglang, vllm

torch.set_num_threads(1)
DIM, WIDTH, SLOTS, ROWS, TOKENS = 40, 4, 11, 5, 24
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)


class Static:
    """The buffers of a padded batch and a pool, which never move."""

    def __init__(self, device, dtype=torch.bfloat16):
        self.device = device
        self.x = torch.zeros(TOKENS, DIM, dtype=dtype, device=device)
        self.weight = torch.randn(DIM, WIDTH).to(device, dtype)
        self.bias = torch.randn(DIM).to(device, dtype)
        self.pool = torch.randn(SLOTS, WIDTH - 1, DIM).to(device, dtype)
        self.starts = torch.zeros(ROWS + 1, dtype=torch.int32, device=device)
        self.slots = torch.full((ROWS,), -1, dtype=torch.int32, device=device)
        self.has = torch.zeros(ROWS, dtype=torch.bool, device=device)

    def fill(self, lengths, slots, has):
        """A batch of len(lengths) live rows; the rest are padding, and tokens past the last row hold NaN."""
        rest = ROWS - len(lengths)
        ends = torch.tensor(lengths).cumsum(0)
        self.x.fill_(float("nan"))
        self.x[: ends[-1]] = torch.randn(int(ends[-1]), DIM).to(self.x)
        self.starts.copy_(torch.cat([torch.zeros(1), ends, ends[-1:].repeat(rest)]))
        self.slots.copy_(torch.tensor([*slots, *[-1] * rest]))
        self.has.copy_(torch.tensor([*has, *[False] * rest]))


def capture(call, device):
    """Runs `call` once and returns (its outputs, a function that runs it again on the same memory)."""
    if device == "cpu":
        return None, call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph), no_synchronisation():
        out = call()

    def replay():
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        return out

    return out, replay


BATCHES = [
    ([3, 9, 1, 7, 4], [4, 0, 10, 7, 2], [True, False, True, True, False]),
    ([1, 1], [2, 4], [True, True]),
    ([24], [9], [False]),
    ([0, 5, 0, 2], [1, 3, 5, 6], [True, True, False, False]),
    ([2, 2, 2, 2, 2], [0, 1, 2, 3, 4], [True] * 5),
]

PREFILLS = {
    "own": lambda s, backend: triton_impl.causal_conv1d_fn(
        s.x, s.weight, s.bias, s.pool, s.starts, s.slots, s.has, activation="silu", schedule="flat", backend=backend
    ).out,
    "own per_sequence": lambda s, backend: triton_impl.causal_conv1d_fn(
        s.x, s.weight, s.bias, s.pool, s.starts, s.slots, s.has, activation="silu", max_seqlen=TOKENS,
        schedule="per_sequence", backend=backend,
    ).out,
}  # fmt: skip
ADAPTERS = {
    "sglang": lambda s: sglang.causal_conv1d_fn_triton(
        s.x.t(), s.weight, s.bias, s.pool.mT, s.starts, None, s.slots, s.has
    ).t(),
    "vllm": lambda s: vllm.causal_conv1d_fn(
        s.x.t(), s.weight, s.bias, s.pool.mT, s.starts, s.slots, s.has, null_block_id=-1
    ).t(),
}


def judge_prefill(static, run):
    for lengths, slots, has in BATCHES:
        static.fill(lengths, slots, has)
        live = sum(lengths)
        before = static.pool.clone()
        want, after = triton_impl.causal_conv1d_fn(
            static.x[:live].clone(), static.weight, static.bias, before.clone(),
            torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=static.device),
            torch.tensor(slots, device=static.device), torch.tensor(has, device=static.device),
            activation="silu", backend="eager",
        )  # fmt: skip
        out = run()
        torch.testing.assert_close(out[:live], want)  # bfloat16: a rounding step of SiLU
        assert not out[live:].any()
        assert torch.equal(static.pool, after)
        touched = [slot for slot, length in zip(slots, lengths, strict=True) if length]
        others = [slot for slot in range(SLOTS) if slot not in touched]
        assert torch.equal(static.pool[others], before[others])


@DEVICES
@pytest.mark.parametrize("name", PREFILLS)
def test_prefill(name, device):
    static = Static(device)
    static.fill(*BATCHES[0])
    _, run = capture(lambda: PREFILLS[name](static, "triton"), device)
    judge_prefill(static, run)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ADAPTERS)
def test_prefill_through_an_adapter(name):
    static = Static("cuda")
    static.fill(*BATCHES[0])
    _, run = capture(lambda: ADAPTERS[name](static), "cuda")
    judge_prefill(static, run)


@DEVICES
def test_decode(device):
    """Two layers of decode in one capture, then batches with fewer live rows and other slots."""
    static = Static(device)
    token = static.x[:ROWS]
    pools = [static.pool, static.pool.flip(0).contiguous()]

    def call():
        y = token
        for pool in pools:
            y = triton_impl.causal_conv1d_update(
                y, static.weight, static.bias, pool, static.slots, activation="silu", backend="triton"
            ).out
        return y

    static.fill([1] * ROWS, [0, 1, 2, 3, 4], [True] * ROWS)
    _, run = capture(call, device)
    for slots in ([4, 0, 10, 7, 2], [9], [3, 1], [5, 6, 7, 8]):
        rows = len(slots)
        static.fill([1] * rows, slots, [True] * rows)
        befores = [pool.clone() for pool in pools]
        want, index = token[:rows].clone(), torch.tensor(slots, device=device)
        afters = []
        for before in befores:
            want, after = triton_impl.causal_conv1d_update(
                want, static.weight, static.bias, before.clone(), index, activation="silu", backend="eager"
            )
            afters.append(after)
        out = run()
        torch.testing.assert_close(out[:rows], want)
        assert not out[rows:].any()
        assert torch.equal(pools[0], afters[0])
        torch.testing.assert_close(pools[1], afters[1])  # its inputs went through SiLU
        others = [slot for slot in range(SLOTS) if slot not in slots]
        for pool, before in zip(pools, befores, strict=True):
            assert torch.equal(pool[others], before[others])


@pytest.mark.gpu
def test_the_capture_check_sees_a_synchronisation():
    """The mutant: a call that reads a value back must not be capturable under the check."""
    x = torch.ones(2, device="cuda")
    with pytest.raises(Exception, match=r"synchronizing CUDA operation|capture"):
        capture(lambda: x * x.sum().item(), "cuda")
