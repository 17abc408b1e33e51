"""The extended operations under torch.compile, export and fake tensors, and what plain calls do not pay for them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_impl
from oracle.contract import ConvWindowOutput, FnCall, Unsupported, UpdateCall

torch.set_num_threads(1)  # the tensors are tiny
ops = torch.ops.twinconv
DIM, WIDTH, SLOTS, BATCH = 6, 4, 16, 4
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
pytestmark = [  # of torch's own compiler
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tensors(device="cpu", columns=WIDTH - 1, seqlen=3):
    """Arguments of both operations by name; four rows, one of them padding."""
    made = dict(
        x=torch.randn(10, DIM),
        token=torch.randn(BATCH, seqlen, DIM),
        weight=torch.randn(DIM, WIDTH),
        bias=torch.randn(DIM),
        conv_states=torch.randn(SLOTS, columns, DIM),
        query_start_loc=torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32),
        cache_indices=torch.tensor([2, 5, -1, 1]),
        has_initial_state=torch.tensor([True, False, True, False]),
        cache_seqlens=torch.tensor([5, 0, 7, 2]),
        write_indices=torch.tensor([3, 4, -1, 6]),
        snapshot_indices=torch.tensor([[7, 8], [9, 9], [9, 9], [10, 11]]),
        num_computed_tokens=torch.tensor([4, 0, 2, 0]),
        track_indices=torch.tensor([12, 13, 14, 15]),
        track_lengths=torch.tensor([1, 0, 2, 2]),
        window_out=torch.full((BATCH, seqlen, WIDTH - 1, DIM), torch.nan),
        window_indices=torch.tensor([1, 0, 3, 2]),
        tree_parents=torch.tensor([-1, 0, 0]).expand(BATCH, 3),
        accepted_steps=torch.tensor([1, -1, 0, 2]),
    )
    return {name: tensor.to(device) for name, tensor in made.items()}


def operator_arguments(record, t, fixed, names, options, without=("validate",)):
    """Positional arguments of an operator: the record's fields in its order."""
    given = fixed | {name: t[name] for name in names.split()} | options
    defaults = record._field_defaults
    fields = [field for field in record._fields if field not in without]
    return tuple(given[field] if field in given else defaults[field] for field in fields)


def fn_arguments(t, names="", **options):
    """Positional arguments of the operator `causal_conv1d_fn_serving`."""
    needed = ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state")
    fixed = {name: t[name] for name in needed} | {"activation": "silu"}
    return operator_arguments(FnCall, t, fixed, names, options)


def update_arguments(t, names="", windows=False, **options):
    """Positional arguments of the operator `causal_conv1d_update_serving`, or with windows of `..._windows`."""
    fixed = {name: t[name] for name in ("weight", "bias", "conv_states", "cache_indices")}
    fixed |= {"x": t["token"], "activation": "silu"}
    without = ("validate",) if windows else ("validate", "window_out", "window_indices")
    return operator_arguments(UpdateCall, t, fixed, names, options, without)


FN = {
    "snapshots": lambda t: fn_arguments(t, "snapshot_indices num_computed_tokens", snapshot_block_size=2),
    "track": lambda t: fn_arguments(t, "track_indices track_lengths write_indices", empty_rows="apply"),
    "ring": lambda t: fn_arguments(t, "cache_seqlens", state_layout="ring"),
    "back": lambda t: fn_arguments(t, "write_indices", state_layout="back"),
    "split": lambda t: fn_arguments(t, split_sizes=[1, 2, 3], residual=t["x"].flip(0).half()),
    "part": lambda t: fn_arguments(t | {"x": torch.cat([t["x"], t["x"]], 1)}, channel_offset=3),
}
UPDATE = {
    "tree": lambda t: update_arguments(t, "tree_parents", commit=False),
    "ring": lambda t: update_arguments(t, "cache_seqlens write_indices", state_layout="ring"),
    "track": lambda t: update_arguments(t, "track_indices", residual=t["token"].flip(0)),
    "split": lambda t: update_arguments(t, split_sizes=[3, 3]),
    "part": lambda t: update_arguments(
        t | {"token": torch.cat([t["token"], t["token"]], 2)}, channel_offset=6, split_sizes=[1, 5]
    ),
}
WINDOWS = {
    "windows": lambda t: update_arguments(t, "window_out window_indices", windows=True, commit=False),
    "tree": lambda t: update_arguments(t, "window_out tree_parents", windows=True, commit=False),
}


@DEVICES
@pytest.mark.parametrize(
    ("operator", "variant"),
    [(ops.causal_conv1d_fn_serving.default, v) for v in FN.values()]
    + [(ops.causal_conv1d_update_serving.default, v) for v in UPDATE.values()]
    + [(ops.causal_conv1d_update_windows.default, v) for v in WINDOWS.values()],
    ids=[f"fn-{v}" for v in FN] + [f"update-{v}" for v in UPDATE] + [f"windows-{v}" for v in WINDOWS],
)
def test_opcheck(operator, variant, device):
    """PyTorch's own check: schema (what is mutated), fake kernel, functionalisation with dynamic shapes."""
    results = torch.library.opcheck(operator, variant(tensors(device, columns=5)))
    assert set(results.values()) == {"SUCCESS"}


@DEVICES
def test_opcheck_of_the_commit(device):
    t = tensors(device)
    names = ("conv_states", "window_out", "accepted_steps", "cache_indices", "window_indices")
    t["window_out"].normal_()
    results = torch.library.opcheck(ops.commit_windows.default, (*(t[name] for name in names), -1, "auto"))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("mutation", ["(a!)", "(b!)"])
def test_opcheck_sees_an_undeclared_mutation(mutation):
    name = f"causal_conv1d_update_windows_{mutation[1]}"
    through = ops.causal_conv1d_update_windows.default
    library = torch.library.Library("twinconv_mutant", "FRAGMENT")
    schema = str(through._schema).split("::")[1].replace(mutation, "")
    library.define(schema.replace("causal_conv1d_update_windows", name))
    library.impl(name, lambda *args: through(*args), "CompositeExplicitAutograd")
    given = update_arguments(tensors(columns=5), "window_out window_indices", windows=True)
    with pytest.raises(Exception, match="mutated"):
        torch.library.opcheck(
            getattr(torch.ops.twinconv_mutant, name).default, given, test_utils="test_schema"
        )


def verify(x, weight, pool, slots, windows, parents, steps):
    """Verifies a tree of drafts, commits what was accepted, and goes on with one token."""
    out, pool, windows = triton_impl.causal_conv1d_update(
        x,
        weight,
        None,
        pool,
        slots,
        window_out=windows,
        commit=False,
        tree_parents=parents,
        activation="silu",
    )
    triton_impl.commit_windows(pool, windows, steps, slots)
    q, k = triton_impl.causal_conv1d_update(
        out[:, 0] + 1, weight, None, pool, slots, split_sizes=(2, 4), residual=x[:, 1]
    ).out
    return q * 2, k


def cached_prefill(x, weight, pool, starts, slots, has, snapshots, track):
    q, k, v = triton_impl.causal_conv1d_fn(
        torch.cat([x, x + 1], 1), weight, None, pool, starts, slots, has, channel_offset=3, split_sizes=(1, 2, 3),
        snapshot_indices=snapshots, snapshot_block_size=2, track_indices=track, write_indices=slots, residual=x,
    ).out  # fmt: skip
    return q + 1, k, v


@DEVICES
@BACKENDS
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_verify_is_one_graph_with_equal_results(backend, dynamic, device):
    t = tensors(device)
    mine, theirs = t["conv_states"].clone(), t["conv_states"].clone()
    windows, wanted = t["window_out"].clone(), t["window_out"].clone()
    rest = t["tree_parents"].contiguous(), t["accepted_steps"]
    compiled = torch.compile(verify, fullgraph=True, backend=backend, dynamic=dynamic)
    for step in range(3):
        x = t["token"] * (step + 1)
        got = compiled(x, t["weight"], mine, t["cache_indices"], windows, *rest)
        want = verify(x, t["weight"], theirs, t["cache_indices"], wanted, *rest)
        assert all(map(torch.equal, got, want))
        assert torch.equal(mine, theirs)
        assert torch.equal(windows.nan_to_num(7), wanted.nan_to_num(7))
    assert not torch.equal(mine, t["conv_states"])


@DEVICES
@BACKENDS
def test_a_compiled_prefill_is_one_graph_with_equal_results(backend, device):
    t = tensors(device)
    names = "query_start_loc cache_indices has_initial_state snapshot_indices track_indices"
    rest = [t[name] for name in names.split()]
    mine, theirs = t["conv_states"].clone(), t["conv_states"].clone()
    compiled = torch.compile(cached_prefill, fullgraph=True, backend=backend)
    for _ in range(2):
        got = compiled(t["x"], t["weight"], mine, *rest)
        assert all(map(torch.equal, got, cached_prefill(t["x"], t["weight"], theirs, *rest)))
        assert torch.equal(mine, theirs)
    assert not torch.equal(mine[[7, 12]], t["conv_states"][[7, 12]])


def test_links_compile_without_a_graph_break():
    links = torch.tensor([[1, 3, -1, -1], [1, 2, 3, -1]]), torch.tensor([[-1, 2, -1, -1], [-1] * 4])
    compiled = torch.compile(triton_impl.tree_parents_from_links, fullgraph=True, backend="aot_eager")
    assert compiled(*links).tolist() == [[-1, 0, 0, 1], [-1, 0, 1, 2]]


def test_fake_tensors_pass_the_checks():
    with FakeTensorMode():
        t = tensors()
        names = ("weight", "bias", "conv_states", "cache_indices")
        result = triton_impl.causal_conv1d_update(
            t["token"], *(t[name] for name in names), window_out=t["window_out"], split_sizes=(2, 4)
        )
        assert isinstance(result, ConvWindowOutput)
        assert [part.shape for part in result.out] == [(BATCH, 3, 2), (BATCH, 3, 4)]
        assert result.window_out is t["window_out"]
        out = triton_impl.causal_conv1d_fn(
            torch.empty(10, 9), t["weight"], None, None, t["query_start_loc"], channel_offset=1
        ).out
        assert out.shape == (10, DIM)
        with pytest.raises(ValueError, match="tree_parents: expected shape"):
            triton_impl.causal_conv1d_update(
                t["token"], *(t[name] for name in names), tree_parents=t["tree_parents"][1:], commit=False
            )
        with pytest.raises(ValueError, match="accepted_steps: expected shape"):
            triton_impl.commit_windows(t["conv_states"], t["window_out"], t["tree_parents"])
        for call in (
            lambda: triton_impl.commit_windows(
                t["conv_states"], t["window_out"], t["accepted_steps"], validate=True
            ),
            lambda: triton_impl.causal_conv1d_update(
                t["token"], *(t[name] for name in names), commit=False, validate=True
            ),
        ):
            with pytest.raises(Unsupported, match="validate"):
                call()


@pytest.mark.parametrize("which", ["token", "weight", "bias", "residual"])
def test_a_backward_pass_is_refused(which):
    t = tensors() | {"residual": torch.randn(BATCH, 3, DIM)}
    t[which].requires_grad_()
    result = triton_impl.causal_conv1d_update(
        t["token"], t["weight"], t["bias"], t["conv_states"], t["cache_indices"],
        residual=t["residual"], window_out=t["window_out"], split_sizes=(3, 3),
    )  # fmt: skip
    with pytest.raises(Unsupported, match="no_grad"):
        result.out[1].sum().backward()


def test_the_module_passes_serving_arguments_on():
    """A pool of wide slots, drafts in packed rows, a snapshot, and the refusal of what a dense prefill cannot take."""
    from triton_impl.modules import CausalConv1d, ConvStatePool

    conv = CausalConv1d(DIM, WIDTH)
    pool = ConvStatePool(4, DIM, WIDTH, state_len=WIDTH + 2, layers=2)
    slots, (snapshot,) = pool.allocate(2), pool.allocate(1)
    x = torch.randn(9, DIM)
    with torch.no_grad():
        q, k = conv.prefill(
            x, torch.tensor([0, 4, 9]), pool, slots, layer=1, split_sizes=(2, 4),
            snapshot_indices=torch.tensor([[-1], [snapshot]]), snapshot_block_size=3,
        )  # fmt: skip
        assert (q.shape, k.shape) == ((9, 2), (9, 4))
        assert torch.equal(pool.layer(1)[snapshot, : WIDTH - 1], x[4:7])
        windows = torch.full((2, 2, WIDTH - 1, DIM), torch.nan)
        before = pool.states.clone()
        out = conv.step(
            x[:3], pool, slots, layer=1, query_start_loc=torch.tensor([0, 1, 3]), max_seqlen=2, window_out=windows,
            commit=False,
        )  # fmt: skip
        assert out.shape == (3, DIM)
        assert torch.equal(pool.states, before)
        assert torch.equal(windows[1, 1], torch.stack([x[8], x[1], x[2]]))
        conv.step(x[:2], pool, slots, layer=1, num_accepted_tokens=torch.tensor([1, 1]))
        assert torch.equal(pool.layer(1)[slots[0], : WIDTH - 1], torch.stack([x[2], x[3], x[0]]))
        with pytest.raises(ValueError, match="residual: expected None without query_start_loc"):
            conv(x[None], residual=x[None])
    with pytest.raises(ValueError, match="state_len: expected at least width-1 = 3, got 2"):
        ConvStatePool(4, DIM, WIDTH, state_len=2)
