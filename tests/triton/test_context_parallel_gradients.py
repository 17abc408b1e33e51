"""Gradients of context parallel training in Torch, on a CPU: several processes, gloo, dx in every bit as on one device."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import triton_impl
from oracle.contract import Unsupported
from tests.tools.signatures import parameters
from tests.triton.test_context_parallel import run_all
from triton_impl.context_parallel import causal_conv1d

WORKER = Path(__file__).parents[1] / "tools/context_parallel_gradients_torch.py"

FIRST = "import torch\nfrom triton_impl import context_parallel as c\n"
# Triton's interpreter is slow: the cases with something of their own for the kernels.
FOR_KERNELS = "packed,short parts bf16,uneven"


@pytest.mark.parametrize(("ranks", "count"), [(2, 18), (4, 18)])
def test_gradients_of_one_device(ranks, count, launched):
    codes, texts = launched[ranks]
    assert codes == [0] * ranks, "\n".join(texts)
    assert all(f"agreed: {count}" in text for text in texts)


def test_gradients_of_one_device_on_kernels(tmp_path):
    runs = {FOR_KERNELS: (2, (FOR_KERNELS,), FIRST)}
    codes, texts = run_all(WORKER, tmp_path, "triton", runs)[FOR_KERNELS]
    assert codes == [0, 0], "\n".join(texts)
    assert all("agreed: 3" in text for text in texts)


# name: (ranks, cases, what is reported, the damage to the module c)
MUTANTS = {
    "nothing comes from later ranks": (
        2, "packed", "gradients of x differ",
        "c._Part.after = lambda part, x, history: x.new_zeros(history, x.shape[1])",
    ),
    "only the next rank sends": (
        4, "short parts", "gradients of x differ",
        "after = c._Part.after\n"
        "def near(part, x, history):\n"
        "    found = after(part, x, history); found[len(x):] = 0; return found\n"
        "c._Part.after = near",
    ),
    "finished gradients are added, rounded twice": (
        2, "long bf16", "gradients of x differ",
        "last = c._last_dx\n"
        "def halves(dout, *rest):\n"
        "    *rest, after = rest\n"
        "    alone = torch.cat([after[:, :8], after[:, 8:] * 0], 1)\n"
        "    return last(dout, *rest, alone) + last(dout * 0, *rest, after)\n"
        "c._last_dx = halves",
    ),
    "the backward pass forgets the tokens before the part": (
        2, "linear", "gradients and reference",
        "backward = c._backward_part\n"
        "def blind(*a):\n"
        "    right, c._windows = c._windows, lambda halo, offsets, begin: right(halo * 0, offsets, begin)\n"
        "    try:\n        return backward(*a)\n"
        "    finally:\n        c._windows = right\n"
        "c._backward_part = blind",
    ),
    "a row that begins at the cut sees the row before": (
        2, "short rows", "outputs differ",
        "c._windows = lambda halo, offsets, begin: halo.expand(len(offsets) - 1, *halo.shape)",
    ),
    "every rank sums in an order of its own": (
        4, "long", "ranks' gradients of weight differ",
        "gather = c.dist.all_gather\n"
        "def rotated(parts, mine, group=None):\n"
        "    gather(parts, mine, group=group); r = c.dist.get_rank(); parts[:] = parts[r:] + parts[:r]\n"
        "c.dist.all_gather = rotated",
    ),
    "parts are rounded before they are added": (
        4, "long", "gradients and reference",
        "total = c._sum_over_ranks\n"
        "c._sum_over_ranks = lambda w, b, group: total(w.bfloat16().float(), b.bfloat16().float(), group)",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The runs of the undamaged module by their ranks, the mutants by name."""
    runs = {ranks: (ranks, ("",), FIRST) for ranks in (2, 4)}
    runs |= {name: (ranks, (names,), FIRST + damage) for name, (ranks, names, _, damage) in MUTANTS.items()}
    return run_all(WORKER, tmp_path_factory.mktemp("mutants"), "eager", runs)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_backward_is_seen(name, launched):
    seen = MUTANTS[name][2]
    codes, texts = launched[name]
    assert any(codes)
    assert any(seen in text for text in texts), "\n".join(texts)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def arguments(**changes):
    leaves = dict(x=torch.ones(6, 2), weight=torch.ones(2, 4), bias=torch.ones(2))
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return leaves | dict(query_start_loc=torch.tensor([0, 4, 6])) | changes


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # of a precision below float64
def test_gradcheck(alone):
    """Against finite differences; a step of 1/64 leaves a cubic term of about 64**-2 and rounding of 2**-24 * 64."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((6, 2), (2, 4), (2,))]
    starts = torch.tensor([0, 4, 6])
    function = lambda *a: causal_conv1d(*a, starts, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, eps=2**-6, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("needed", [["x"], ["weight"], ["bias"], ["x", "bias"]])
def test_only_the_gradients_asked_for(alone, needed):
    inputs = arguments()
    for name in ("x", "weight", "bias"):
        inputs[name] = inputs[name].detach().requires_grad_(name in needed)
    causal_conv1d(**inputs, sum_weight_gradients=True).sum().backward()  # an expanded upstream gradient
    whole = {name: value.detach().requires_grad_(name in needed) if name in needed else value
             for name, value in inputs.items()}  # fmt: skip
    triton_impl.causal_conv1d(**whole).out.sum().backward()
    for name in ("x", "weight", "bias"):
        assert (inputs[name].grad is not None) == (name in needed)
        assert name not in needed or torch.equal(inputs[name].grad, whole[name].grad)


def test_gradient_of_a_gradient(alone):
    inputs = arguments()
    (dx,) = torch.autograd.grad(
        causal_conv1d(**inputs, activation="silu").sum(), inputs["x"], create_graph=True
    )
    with pytest.raises(Unsupported, match="backward: expected a first gradient"):
        dx.sum().backward()


def test_bad_arguments(alone):
    with pytest.raises(ValueError, match=r"query_start_loc: expected offsets .* got None"):
        causal_conv1d(**arguments(query_start_loc=None))
    with pytest.raises(ValueError, match=r"part_lengths: expected 1 lengths, .*got \[3, 3\]"):
        causal_conv1d(**arguments(), part_lengths=[3, 3])
    with pytest.raises(ValueError, match="part_lengths: expected 6, the tokens of x, for rank 0, got 5"):
        causal_conv1d(**arguments(), part_lengths=[5])
    with pytest.raises(ValueError, match="width 1 to 8"):
        causal_conv1d(**arguments(weight=torch.ones(2, 9)))
    with pytest.raises(TypeError, match="x: expected"):
        causal_conv1d(**arguments(x=torch.ones(6, 2, dtype=torch.float64)))


def test_the_signature_adds_the_group_and_has_no_states():
    plain = parameters(triton_impl.causal_conv1d)
    split = parameters(causal_conv1d)
    assert split.keys() - plain.keys() == {"group", "part_lengths", "sum_weight_gradients"}
    assert plain.keys() - split.keys() == {"initial_states"}
    for name in plain.keys() & split.keys() - {"bias", "query_start_loc"}:
        assert split[name] == plain[name]
