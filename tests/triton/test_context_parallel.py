"""Context parallel prefill in Torch, on a CPU: several processes, gloo, every bit as on one device."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import triton_impl
from oracle.contract import Unsupported
from tests.tools.signatures import parameters
from triton_impl import context_parallel
from triton_impl.launch import Launch

WORKER = Path(__file__).parents[1] / "tools/context_parallel_torch.py"
# Imports once, and becomes as many ranks, one run after the other: imports took half of the time.
LAUNCHER = """
import gc, json, os, runpy, sys, traceback, sympy  # which a first gradient imports
worker, runs = sys.argv[1], json.loads(sys.argv[2])
main = runpy.run_path(worker)["main"]
if os.environ["TRITON_INTERPRET"] == "1":
    from tests.conftest import quick_interpreters
    quick_interpreters()
gc.freeze()  # a search for garbage would copy what the ranks share
for first, ranks, folder, arguments in runs:
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if not children[-1]:
            text = os.open(f"{folder}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
            os.dup2(text, 1)
            os.dup2(text, 2)
            code = 1
            try:
                exec(first)
                main(rank, ranks, f"{folder}/rendezvous", *arguments)
                code = 0
            except BaseException:  # SystemExit, too: it says what differs
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)  # to take the imports apart would take as long as many a run
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


def run_all(worker, folder, backend, runs):
    """Runs the worker's ranks for each of {name: (ranks, the worker's other arguments, code that changes them first)}.

    Returns {name: (exit codes, texts)}.
    """
    folders = [folder / str(place) for place in range(len(runs))]
    for made in folders:
        made.mkdir()
    orders = [
        (first, ranks, str(made), ["cpu", backend, *rest])
        for made, (ranks, rest, first) in zip(folders, runs.values(), strict=True)
    ]
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(worker), json.dumps(orders)],
        cwd=worker.parent.parent,
        env=os.environ | {"TRITON_INTERPRET": str(int(backend == "triton"))},
        stdout=subprocess.PIPE,
        text=True,
        timeout=280,
        check=True,
    )
    codes = [list(map(int, line.split())) for line in launched.stdout.splitlines()]
    texts = [
        [(made / f"{rank}.txt").read_text() for rank in range(len(found))]
        for made, found in zip(folders, codes, strict=True)
    ]
    return dict(zip(runs, zip(codes, texts, strict=True), strict=True))


@pytest.mark.parametrize(("ranks", "backend"), [(2, "eager"), (4, "eager"), (2, "triton")])
def test_same_bits_as_one_device(ranks, backend, launched):
    codes, texts = launched(backend)[ranks]
    assert codes == [0] * ranks, "\n".join(texts)
    assert all("agreed: 13" in text for text in texts)


MUTANTS = {
    "the halo never arrives": "c._receive_halo = lambda x, history, *rest: x.new_zeros(history, x.shape[1])",
    "the pool keeps its old windows": "c._write = lambda *args: None",
    "the first rank's tokens are cut short": (
        "real = c._receive_halo\n"
        "def late(x, history, *rest):\n    halo = real(x, history, *rest); halo[0] = 0; return halo\n"
        "c._receive_halo = late"
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_exchange_is_seen(name, launched):
    codes, texts = launched("eager")[name]
    assert any(codes)
    assert any("differ" in text for text in texts), "\n".join(texts)


KERNEL_MUTANTS = {
    "no rank tells what is before the others' parts": (
        "from triton_impl import exchange\n"
        "exchange.Part.ahead = lambda part, most: (most,) * len(part.lengths)"
    ),
    "the cut is not mended": (
        "from triton_impl import exchange as e\n"
        "real = e.prepare\n"
        "e.prepare = lambda *args: (*real(*args)[:2], lambda *tensors: None)"
    ),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Returns a function from a backend to its runs: those of the undamaged module by their ranks, the mutants by name."""
    first = "from triton_impl import context_parallel as c\n"

    @functools.cache
    def launch(backend):
        whole, mutants = {"eager": ((2, 4), MUTANTS), "triton": ((2,), KERNEL_MUTANTS)}[backend]
        runs = {ranks: (ranks, (), "") for ranks in whole}
        runs |= {name: (2, (), first + damage) for name, damage in mutants.items()}
        return run_all(WORKER, tmp_path_factory.mktemp(backend), backend, runs)

    return launch


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_a_wrong_exchange_is_seen_on_kernels(name, launched):
    """The first batch shows it."""
    codes, texts = launched("triton")[name]
    assert any(codes)
    assert any("case 0" in text and "differ" in text for text in texts), "\n".join(texts)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def arguments():
    return dict(
        x=torch.ones(3, 2), weight=torch.ones(2, 4), bias=None, conv_states=torch.zeros(1, 3, 2),
        query_start_loc=torch.tensor([0, 3]),
    )  # fmt: skip


def test_a_group_of_one(alone):
    wanted = triton_impl.causal_conv1d_fn(**arguments())
    got = context_parallel.causal_conv1d_fn(**arguments())
    assert got.out.tolist() == wanted.out.tolist()
    assert got.conv_states.tolist() == wanted.conv_states.tolist()


class Operations(TorchDispatchMode):
    """Counts what the host asks of PyTorch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_call_on_kernels_is_few_operations_of_the_host(alone, monkeypatch):
    """Each takes several microseconds of the host on a GPU. With more than one rank a collective comes to it."""
    launches = []
    monkeypatch.setattr(Launch, "__call__", lambda launch, *tensors: launches.append(launch))
    monkeypatch.setattr(context_parallel, "_refuse_unequal", lambda lengths: None)
    given, starts = arguments(), torch.tensor([0, 3])
    leaves = [torch.ones(shape, requires_grad=True) for shape in ((3, 2), (2, 4), (2,))]
    options = dict(sum_weight_gradients=True, backend="triton")
    train = lambda: context_parallel.causal_conv1d(*leaves, starts, **options)  # noqa: E731
    out = train()
    for call, operations, launched in (
        (lambda: context_parallel.causal_conv1d_fn(**given, backend="triton"), 3, 3),
        (train, 3, 3),
        (lambda: torch.autograd.grad(out, leaves, torch.ones(3, 2), retain_graph=True), 17, 6),
    ):
        call()
        launches.clear()
        with Operations() as seen:
            call()
        assert (seen.count <= operations, len(launches)) == (True, launched), seen.count


def test_bad_arguments(alone):
    with pytest.raises(
        ValueError, match=r"part_lengths: expected 1 lengths, one a rank, all >= 0, got \[3, 4\]"
    ):
        context_parallel.causal_conv1d_fn(**arguments(), part_lengths=[3, 4])
    with pytest.raises(ValueError, match="part_lengths: expected 3, the tokens of x, for rank 0, got 5"):
        context_parallel.causal_conv1d_fn(**arguments(), part_lengths=[5])
    with pytest.raises(Unsupported, match="validate"):
        context_parallel.causal_conv1d_fn(**arguments(), validate=True)
    with pytest.raises(ValueError, match="width 1 to 8"):
        context_parallel.causal_conv1d_fn(**arguments() | {"weight": torch.ones(2, 9)})
    for name, value in {
        "state_layout": "back",
        "write_indices": torch.zeros(1),
        "split_sizes": (1, 1),
    }.items():
        with pytest.raises(TypeError, match=name):
            context_parallel.causal_conv1d_fn(**arguments(), **{name: value})


def test_the_signature_adds_the_group():
    plain = parameters(triton_impl.causal_conv1d_fn)
    split = parameters(context_parallel.causal_conv1d_fn)
    assert split.keys() - plain.keys() == {"group", "part_lengths"}
    assert split.keys() <= plain.keys() | {"group", "part_lengths"}
    assert {name: split[name] for name in split.keys() & plain.keys()} == {
        name: plain[name] for name in split.keys() & plain.keys()
    }
