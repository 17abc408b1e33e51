"""What serving engines pass to their own functions: circular buffers, rolling slots, windows of drafts, draft trees.

Inputs are small integers in bfloat16, so that the definition, one row and one token at a time, is met in every bit.
"""

import pytest
import torch

import triton_impl
from tests.triton.test_serving import define_update, integers, same_bits, tree
from triton_impl.compat import causal_conv1d as dao
from triton_impl.compat import sglang, vllm

torch.set_num_threads(1)  # the tensors are tiny
DIM, SLOTS, BATCH = 10, 9, 4
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
CHOSEN = [3, -1, 0, 5]


class Step:
    """Tensors of a decode step, token-major, and the same as the peers have them."""

    def __init__(self, device, columns, seqlen=None, width=4):
        shape = (BATCH, DIM) if seqlen is None else (BATCH, seqlen, DIM)
        self.x, self.pool = integers(*shape).to(device), integers(SLOTS, columns, DIM).to(device)
        self.weight = integers(DIM, width, low=-3, high=3).to(device)
        self.bias = integers(DIM, low=-3, high=3).to(device)
        self.slots = torch.tensor(CHOSEN, device=device)
        self.states = self.pool.transpose(1, 2).contiguous() if columns > 5 else self.pool.clone().mT
        self.given = self.x.clone() if seqlen is None else self.x.mT.clone()

    def define(self, **options):
        on_host = [t.cpu() for t in (self.x, self.weight, self.bias, self.pool, self.slots)]
        options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return define_update(*on_host, **options)

    def check(self, out, want, pool):
        same_bits((out if out.dim() == 2 else out.mT).cpu(), want)
        same_bits(self.states.mT.cpu(), pool)


@DEVICES
@pytest.mark.parametrize("peer", ["causal_conv1d", "sglang", "sglang_triton"])
@pytest.mark.parametrize("seqlen", [None, 1, 3, 11])
@pytest.mark.parametrize("columns", [3, 4, 8])
def test_circular_buffers(columns, seqlen, peer, device):
    step = Step(device, columns, seqlen)
    seqlens = torch.tensor([7, 1, 0, 21], dtype=torch.int32, device=device)
    want, pool, _ = step.define(state_layout="ring", cache_seqlens=seqlens)
    functions = {
        "causal_conv1d": dao.causal_conv1d_update, "sglang": sglang.causal_conv1d_update,
        "sglang_triton": sglang.causal_conv1d_update_triton,
    }  # fmt: skip
    out = functions[peer](
        step.given, step.states, step.weight, step.bias, None, seqlens, conv_state_indices=step.slots
    )
    step.check(out, want, pool)
    assert (out is step.given) == (peer == "sglang")


@DEVICES
def test_a_circular_buffer_follows_its_counter(device):
    """Steps of 1 to 3 tokens in a buffer of 4 columns give the bits of one long step in a slot that shifts."""
    step = Step(device, 4, 9)
    states, seqlens = torch.zeros_like(step.states), torch.zeros(BATCH, dtype=torch.int32, device=device)
    shifted = torch.zeros_like(states)
    whole = dao.causal_conv1d_update(
        step.given, shifted, step.weight, step.bias, "silu", None, step.slots
    ).clone()
    parts = []
    for count in (1, 3, 2, 1, 2):
        begin = int(seqlens[0])
        token = step.given[:, :, begin : begin + count]
        parts.append(
            dao.causal_conv1d_update(token, states, step.weight, step.bias, "silu", seqlens, step.slots)
        )
        seqlens += count
    assert torch.equal(torch.cat(parts, dim=2), whole)
    order = (9 + torch.arange(4, device=device)) % 4
    assert torch.equal(states[:, :, order], shifted)


@DEVICES
@pytest.mark.parametrize("peer", ["vllm", "vllm_out", "sglang_triton"])
@pytest.mark.parametrize("seqlen", [None, 3])
def test_rolling_slots(seqlen, peer, device):
    step = Step(device, 6, seqlen)
    counts = torch.tensor([1, 2, 4, 3], dtype=torch.int32, device=device)
    want, pool, _ = step.define(num_accepted_tokens=counts)
    if peer == "sglang_triton":
        out = sglang.causal_conv1d_update_triton(
            step.given, step.states, step.weight, step.bias, None, None, step.slots, counts
        )
    else:
        result = None if peer == "vllm" else torch.empty_like(step.given)
        slots = torch.stack([step.slots, step.slots + 1], dim=1)  # a block table, whose first column counts
        out = vllm.causal_conv1d_update(
            step.given, step.states, step.weight, step.bias, None, slots, counts, null_block_id=-1, out=result
        )
        assert out is (step.given if result is None else result)
    step.check(out, want, pool)


@DEVICES
@pytest.mark.parametrize("rolls", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_packed_rows_of_vllm(in_place, rolls, device):
    step = Step(device, 6)
    step.x = integers(11, DIM).to(device)
    step.given = step.x.clone()
    starts = torch.tensor([0, 2, 5, 6, 10], dtype=torch.int32, device=device)
    counts = torch.tensor([1, 2, 4, 3], dtype=torch.int32, device=device) if rolls else None
    want, pool, _ = step.define(num_accepted_tokens=counts, query_start_loc=starts, max_seqlen=4)
    result = None if in_place else torch.empty_like(step.given)
    out = vllm.causal_conv1d_update(
        step.given, step.states, step.weight, step.bias, None, step.slots, counts, starts, 4, -1, out=result
    )
    step.check(out, want, pool)
    same_bits(step.given.cpu(), want if in_place else step.x.cpu())


@DEVICES
@pytest.mark.parametrize("seqlen", [1, 5])
def test_windows_of_drafts(seqlen, device):
    """SGLang's buffers [buffers, steps, dim, width-1], a slice of a larger one, written in place."""
    step = Step(device, 3, seqlen)
    pages = torch.full((6, seqlen + 2, DIM, 5), torch.nan, dtype=torch.bfloat16, device=device)
    buffers, chosen = pages[:, :, :, 1:4], torch.tensor([5, 0, 2, -1], device=device)
    want, pool, windows = step.define(window_out=buffers.mT, window_indices=chosen)
    out = sglang.causal_conv1d_update_triton(
        step.given, step.states, step.weight, step.bias, None, conv_state_indices=step.slots,
        intermediate_conv_window=buffers, intermediate_state_indices=chosen,
    )  # fmt: skip
    step.check(out, want, pool)
    same_bits(buffers.mT.cpu(), windows)
    assert pages[:, :, :, [0, 4]].isnan().all()
    assert not pages.isnan().all()


def parents_one_by_one(next_token, next_sibling):
    """The definition of SGLang's links: nodes in order, each naming its first child and its next sibling."""
    batch, nodes = next_token.shape
    parents = torch.zeros(batch, nodes, dtype=torch.int32)
    parents[:, :1] = -1
    for row in range(batch):
        for node in range(nodes):
            for link, parent in ((next_token, node), (next_sibling, int(parents[row, node]))):
                if node < link[row, node] < nodes:
                    parents[row, link[row, node]] = parent
    return parents


def links(parents):
    """First children and next siblings of a tree."""
    batch, nodes = parents.shape
    child, sibling = torch.full((batch, nodes), -1), torch.full((batch, nodes), -1)
    for row in range(batch):
        last = {}
        for node in range(1, nodes):
            parent = int(parents[row, node])
            if parent in last:
                sibling[row, last[parent]] = node
            else:
                child[row, parent] = node
            last[parent] = node
    return child, sibling


def random_tree(nodes, seed):
    parents = tree(BATCH, nodes, seed).clamp(min=0)
    parents = torch.minimum(parents, (torch.arange(nodes) - 1).clamp(min=0))
    parents[:, :1] = -1
    return parents


@DEVICES
@pytest.mark.parametrize("nodes", [0, 1, 2, 7, 33])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8])
def test_parents_from_links(nodes, dtype, device):

    for seed in range(4):
        child, sibling = links(random_tree(nodes, seed) if nodes else torch.zeros(BATCH, 0))
        parents = triton_impl.tree_parents_from_links(
            child.to(device, dtype), sibling.t().contiguous().t().to(device, dtype)
        )
        assert parents.dtype == torch.int32
        assert torch.equal(parents.cpu(), parents_one_by_one(child, sibling))
        if nodes:
            assert torch.equal(parents.cpu(), random_tree(nodes, seed).int())
        any_links = [torch.randint(-3, nodes + 3, (BATCH, nodes)) for _ in range(2)]
        parents = triton_impl.tree_parents_from_links(*(link.to(device, dtype) for link in any_links))
        assert torch.equal(parents.cpu(), parents_one_by_one(*any_links))


@DEVICES
@pytest.mark.parametrize("nodes", [2, 7])
def test_draft_trees(nodes, device):
    step = Step(device, 3, nodes)
    parents = random_tree(nodes, 1)
    child, sibling = (link.to(device) for link in links(parents))
    buffers = torch.full((BATCH, nodes, DIM, 3), torch.nan, dtype=torch.bfloat16, device=device)
    want, pool, windows = step.define(window_out=buffers.mT, tree_parents=parents, commit=False)
    found = torch.full_like(child, 77)
    out = sglang.causal_conv1d_update_triton(
        step.given, step.states, step.weight, step.bias, None, conv_state_indices=step.slots,
        intermediate_conv_window=buffers, intermediate_state_indices=torch.arange(BATCH, device=device),
        retrieve_next_token=child, retrieve_next_sibling=sibling, retrieve_parent_token=found,
    )  # fmt: skip
    step.check(out, want, pool)
    same_bits(buffers.mT.cpu(), windows)
    assert torch.equal(found.cpu(), parents.clamp(min=0))


ONE = torch.ones(BATCH, dtype=torch.int32)
WINDOWS = torch.zeros(BATCH, 3, DIM, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (sglang.causal_conv1d_update_triton, dict(num_accept_tokens=ONE), r"conv_state: .* >= width-1 \+ 3-1 = 5 on axis 2"),
        (sglang.causal_conv1d_update_triton, dict(num_accept_tokens=ONE, intermediate_conv_window=WINDOWS), "num_accept_tokens: expected None"),
        (sglang.causal_conv1d_update_triton, dict(intermediate_conv_window=WINDOWS[:, :2]), "intermediate_conv_window: expected steps >= 3"),
        (sglang.causal_conv1d_update_triton, dict(intermediate_conv_window=WINDOWS.mT), "intermediate_conv_window: expected shape"),
        (sglang.causal_conv1d_update_triton, dict(retrieve_next_token=ONE, retrieve_next_sibling=ONE), "retrieve_next_token: expected shape"),
        (sglang.causal_conv1d_update_triton, dict(retrieve_next_sibling=ONE), "retrieve_next_sibling: expected both or none"),
        (vllm.causal_conv1d_update, dict(num_accepted_tokens=ONE), r"conv_state: .* >= width-1 \+ 3-1 = 5 on axis 2"),
        (vllm.causal_conv1d_update, dict(num_accepted_tokens=ONE[1:]), r"num_accepted_tokens: expected shape \[batch=4\]"),
    ],
)  # fmt: skip
def test_refused(function, options, text):
    step = Step("cpu", 4, 3)
    with pytest.raises(ValueError, match=text):
        function(step.given, step.states, step.weight, **options)
    same_bits(step.states.mT, step.pool)


def test_rolling_packed_rows_need_a_bound():
    step = Step("cpu", 4)
    with pytest.raises(ValueError, match="max_query_len"):
        vllm.causal_conv1d_update(
            step.given, step.states, step.weight, None, None, step.slots, ONE, torch.arange(BATCH + 1)
        )
