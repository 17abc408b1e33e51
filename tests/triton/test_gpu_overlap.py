"""Programmatic dependent launch on a GPU: kernels that begin while those ahead still run read and write nothing too early.

Ahead of a call stands a kernel that lets the next one begin at once, waits for half a millisecond, and only then copies.
"""

import pytest
import torch
import triton
import triton.language as tl

import triton_impl
from triton_impl import commit, prefill, states, trees, update, verify

pytestmark = pytest.mark.gpu
DEVICE, DIM = "cuda", 1024
KERNELS = prefill, states, update, verify, trees, commit


@triton.jit
def _late_copy(source, target, words, block: tl.constexpr):
    tl.extra.cuda.gdc_launch_dependents()
    begin = tl.extra.cuda.globaltimer()
    now = begin
    while now - begin < 500_000:
        now = tl.extra.cuda.globaltimer()
    for first in range(tl.program_id(0) * block, words, tl.num_programs(0) * block):
        place = first + tl.arange(0, block)
        tl.store(target + place, tl.load(source + place, mask=place < words), mask=place < words)


def late_copy(source, target):
    _late_copy[(32,)](source, target, source.numel(), block=1024)


def in_one_memory(arrays):
    """(all arrays as one int64 tensor, a function from such a tensor to the arrays it holds)."""
    places, size = {}, 0
    for name, array in arrays.items():
        places[name] = size
        size += -(-array.nbytes // 256) * 256
    memory = torch.zeros(size // 8, dtype=torch.int64, device=DEVICE)

    def views(memory):
        content = memory.view(torch.uint8)
        return {
            name: content[places[name] : places[name] + array.nbytes].view(array.dtype).view(array.shape)
            for name, array in arrays.items()
        }

    for name, view in views(memory).items():
        view.copy_(arrays[name])
    return memory, views


def normal(*shape):
    return torch.randn(*shape, device=DEVICE).bfloat16()


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def call_of(name):
    """(operation, its arrays, its options)."""
    torch.manual_seed(0)
    common = dict(weight=normal(DIM, 4), bias=normal(DIM))
    lengths = [1, 1, 40, 1, 7, 2]
    rows = dict(conv_states=normal(9, 3, DIM), cache_indices=numbers(3, 0, 8, 5, 2, 7))
    if name.startswith("prefill"):
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
        more = dict(query_start_loc=offsets, has_initial_state=torch.arange(6, device=DEVICE) % 3 > 0)
        x = normal(sum(lengths) + 3, DIM)
        options = dict(activation="silu", schedule="flat" if "flat" in name else "per_sequence")
        if "first" in name:
            x = x.T.contiguous()
        elif "states" in name:
            more["write_indices"] = numbers(1, 0, 8, 4, 2, 6)
        return triton_impl.causal_conv1d_fn, dict(x=x, **common, **rows, **more), options
    if name == "commit":
        more = dict(window_out=normal(6, 3, 3, DIM), accepted_steps=numbers(2, 0, 1, -1, 2, 1))
        return triton_impl.commit_windows, rows | more, {}
    arrays, options = common | rows, dict(activation="silu")
    if name == "update":
        arrays["x"] = normal(6, DIM)
    elif name == "verify":
        arrays["x"] = normal(6, 3, DIM)
    else:
        arrays |= dict(x=normal(6, 3, DIM), window_out=normal(6, 3, 3, DIM))
        arrays["tree_parents"] = numbers(-1, 0, 0).repeat(6, 1)
        options["commit"] = False
    return triton_impl.causal_conv1d_update, arrays, options


CALLS = (
    "prefill flat", "prefill per_sequence", "prefill flat, states", "prefill flat, channel-first", "update", "verify",
    "tree", "commit",
)  # fmt: skip


def run(operation, arrays, options):
    """The result, as a kernel behind the call sees it."""
    if "x" in arrays and arrays["x"].shape[0] == DIM:
        arrays = arrays | {"x": arrays["x"].T}
    return operation(**arrays, **options)[0].clone()


def in_a_graph(function):
    """What a function returns, run within a captured graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    graph.replay()
    return result


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Whatever a call takes on the host the first time, it takes before."""
    source = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    late_copy(source, source.clone())
    for name in CALLS:
        run(*call_of(name))
    torch.cuda.synchronize()


@pytest.mark.parametrize("way", [lambda function: function(), in_a_graph], ids=["stream", "graph"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_too_early(name, way):
    operation, arrays, options = call_of(name)
    ready, views = in_one_memory(arrays)
    arriving = torch.zeros_like(ready)

    def late():
        late_copy(ready, arriving)
        return run(operation, views(arriving), options)

    got = way(late)
    torch.cuda.synchronize()
    want = run(operation, views(ready), options)
    assert torch.equal(got, want)
    assert torch.equal(arriving, ready)


@pytest.mark.parametrize("way", [lambda function: function(), in_a_graph], ids=["stream", "graph"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_written_too_early(name, way):
    operation, arrays, options = call_of(name)
    memory, views = in_one_memory(arrays)
    before, seen = memory.clone(), torch.zeros_like(memory)

    def late():
        late_copy(memory, seen)
        return run(operation, views(memory), options)

    way(late)
    torch.cuda.synchronize()
    assert torch.equal(seen, before)
    assert name == "tree" or not torch.equal(memory, before), "a call that writes nothing shows nothing"
