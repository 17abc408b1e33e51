"""What PyTorch expects of an operation: compilers, gradients and transformations, version counters, meta tensors, modes."""

import io
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import triton_impl
from oracle.contract import ConvOutput, Unsupported
from triton_impl.compat import causal_conv1d as dao
from triton_impl.compat import fla, sglang, vllm
from triton_impl.modules import CausalConv1d, ConvStatePool, dense_rows
from triton_impl.short_conv import short_conv

torch.set_num_threads(1)  # the tensors are tiny
DIM, WIDTH = 4, 3
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
pytestmark = [  # of torch's own compiler
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tensors(device="cpu", tokens=7):
    generator = torch.Generator().manual_seed(3)
    made = dict(
        x=torch.randn(tokens, DIM, generator=generator), weight=torch.randn(DIM, WIDTH, generator=generator),
        bias=torch.randn(DIM, generator=generator), conv_states=torch.randn(5, WIDTH - 1, DIM, generator=generator),
        query_start_loc=torch.tensor([0, 3, tokens], dtype=torch.int32), cache_indices=torch.tensor([3, 1]),
        has_initial_state=torch.tensor([True, False]),
    )  # fmt: skip
    return {name: tensor.to(device) for name, tensor in made.items()}


def fn(t, **options):
    return triton_impl.causal_conv1d_fn(**t, **options)


def update(t, **options):
    names = ("weight", "bias", "conv_states", "cache_indices")
    return triton_impl.causal_conv1d_update(t["x"][:2], *(t[name] for name in names), **options)


def verify(t, **options):
    windows = options.pop("window_out", None)
    windows = t["x"].new_zeros(2, 1, WIDTH - 1, DIM) if windows is None else windows
    return update(t, window_out=windows, commit=False, **options)


OPERATIONS = {"fn": fn, "update": update, "verify": verify}

HEADS = dict(num_k_heads=1, num_v_heads=1, head_k_dim=1, head_v_dim=2)  # of DIM channels


def gates(t, tokens):
    return dict(a=t["x"][:tokens, :1], b=t["x"][:tokens, 1:2], A_log=t["bias"][:1], dt_bias=t["bias"][1:2])


def prologue_fn(t, **options):
    return triton_impl.gated_delta_prologue_fn(**t, **HEADS, **gates(t, len(t["x"])), **options)


def prologue_update(t, **options):
    given = {name: t[name] for name in ("weight", "bias", "conv_states", "cache_indices")}
    return triton_impl.gated_delta_prologue_update(t["x"][:2], **given, **HEADS, **gates(t, 2), **options)


def gated_fn(t, **options):
    given = {name: value for name, value in t.items() if name != "x"}
    return triton_impl.gated_short_conv_fn(torch.cat([t["x"]] * 3, -1), **given, **options)


def gated_update(t, **options):
    given = {name: t[name] for name in ("weight", "bias", "conv_states", "cache_indices")}
    return triton_impl.gated_short_conv_update(torch.cat([t["x"][:2]] * 3, -1), **given, **options)


UPDATES = {"update": update, "prologue_update": prologue_update, "gated_update": gated_update}
ALL = UPDATES | {"fn": fn, "verify": verify, "prologue_fn": prologue_fn, "gated_fn": gated_fn}

# Compiled as users compile.


@DEVICES
@pytest.mark.parametrize("split", [False, True])
def test_inductor_takes_a_prefill_without_a_pool(split, device):
    t = tensors(device)
    options = dict(activation="silu") | (dict(split_sizes=(1, 3), residual=t["x"]) if split else {})

    def call(x):
        out = triton_impl.causal_conv1d_fn(x, t["weight"], None, None, t["query_start_loc"], **options).out
        return [part * 2 for part in out] if split else out * 2

    got, want = torch.compile(call, fullgraph=True)(t["x"]), call(t["x"])
    assert all(map(torch.equal, got, want)) if split else torch.equal(got, want)


@DEVICES
def test_inductor_takes_the_layer(device):
    conv = CausalConv1d(DIM, WIDTH, device=device).requires_grad_(False)
    x = tensors(device)["x"][None]
    compiled = torch.compile(conv, fullgraph=True)
    for length in (4, 5, 7):
        assert torch.equal(compiled(x[:, :length]), conv(x[:, :length]))


@pytest.mark.parametrize("dynamic", [None, True])
def test_host_bounds_and_lengths_do_not_compile_again(dynamic):
    counter = CompileCounterWithBackend("aot_eager")

    def call(t, bound):
        packed = fn(t, max_seqlen=bound).out
        return packed, dense_rows(t["x"][None], t["weight"], t["bias"])

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for tokens in (7, 8, 11, 13):
        t = tensors(tokens=tokens)
        got = compiled(dict(t, conv_states=t["conv_states"].clone()), tokens - 3)
        assert all(map(torch.equal, got, call(t, tokens - 3)))
    assert counter.frame_count <= 2


def test_host_lengths_of_an_engine_do_not_compile_again():
    counter = CompileCounterWithBackend("aot_eager")

    def call(t, lengths):
        return sglang.causal_conv1d_fn_triton(
            t["x"].mT, t["weight"], None, t["conv_states"].mT, t["query_start_loc"], lengths, t["cache_indices"],
            t["has_initial_state"],
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for tokens in (7, 8, 11, 13):
        lengths = [3, tokens - 3]
        assert torch.equal(compiled(tensors(tokens=tokens), lengths), call(tensors(tokens=tokens), lengths))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("how", ["auto", "named"])
def test_a_dynamic_length_is_exported(how, strict):
    conv = CausalConv1d(DIM, WIDTH).requires_grad_(False)
    length = torch.export.Dim.AUTO if how == "auto" else torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        conv, (torch.randn(2, 9, DIM),), dynamic_shapes={"x": {1: length}}, strict=strict
    )
    for tokens in (3, 9, 200):
        x = torch.randn(2, tokens, DIM)
        assert torch.equal(program.module()(x), conv(x))


def test_a_program_that_returns_the_result_is_saved():
    class Prefill(torch.nn.Module):
        def forward(self, x, weight, pool, starts):
            return triton_impl.causal_conv1d_fn(x, weight, None, pool, starts)

    t = tensors()
    given = t["x"], t["weight"], t["conv_states"], t["query_start_loc"]
    saved = io.BytesIO()
    torch.export.save(torch.export.export(Prefill(), given), saved)
    saved.seek(0)
    found = torch.export.load(saved).module()(*given)
    assert isinstance(found, ConvOutput)


def test_a_result_is_saved():
    saved = io.BytesIO()
    torch.save(fn(tensors()), saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved).out, fn(tensors()).out)


# Gradients: refused where they would be lost, whatever carries them.


@DEVICES
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("which", ["x", "weight", "bias", "conv_states", "residual", "window_out"])
def test_no_gradient_is_lost(which, operation, device):
    if (which == "window_out") != (operation == "verify") and which == "window_out":
        pytest.skip("it takes no windows")
    t = tensors(device)
    options = {}
    if which in t:
        t[which] = t[which].clone().requires_grad_() * 1  # no leaf: it may be written
    elif which == "residual":
        options[which] = torch.randn_like(t["x"] if operation == "fn" else t["x"][:2], requires_grad=True)
    else:
        options[which] = torch.zeros(2, 1, WIDTH - 1, DIM, device=device, requires_grad=True) * 1
    result = OPERATIONS[operation](t, **options)
    for found in result:
        if found is result.conv_states and operation == "verify":
            continue  # it was not written
        assert found.requires_grad
        with pytest.raises(Unsupported, match="no_grad"):
            found.sum().backward(retain_graph=True)


@DEVICES
def test_a_gradient_through_a_later_call_is_not_lost(device):
    t = tensors(device)
    t["x"].requires_grad_()
    fn(t)
    t["x"] = t["x"].detach()
    later = update(t).out
    with pytest.raises(Unsupported, match="no_grad"):
        later.sum().backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_leaf_that_asks_for_a_gradient_is_not_written(operation):
    t = tensors()
    t["conv_states"].requires_grad_()
    if operation == "verify":
        options = dict(window_out=torch.zeros(2, 1, WIDTH - 1, DIM, requires_grad=True))
        t["conv_states"] = t["conv_states"].detach()
    else:
        options = {}
    before = t["conv_states"].detach().clone()
    with pytest.raises(
        Unsupported, match=r"(conv_states|window_out): expected a tensor that asks for no gradient"
    ):
        OPERATIONS[operation](t, **options)
    assert torch.equal(t["conv_states"], before)


@pytest.mark.parametrize("operation", ALL)
def test_no_gradient_is_lost_in_a_traced_program(operation):
    """What a tracer kept of a call is its operator."""
    t = tensors()
    names = [*t]
    with torch.no_grad():
        traced = make_fx(lambda *given: ALL[operation](dict(zip(names, given, strict=True))))(*t.values())
    assert "twinconv" in traced.code
    t["weight"].requires_grad_()
    result = traced(*t.values())
    for found in result[:1] if operation == "verify" else (result[0], result.conv_states):
        assert found.requires_grad
        with pytest.raises(Unsupported, match="no_grad"):
            found.sum().backward(retain_graph=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("operation", ["fn", "update", "prologue_update"])
def test_parameters_that_ask_for_a_gradient_are_exported(operation, strict):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(tensors()["weight"])

        def forward(self, t):
            return ALL[operation](t | {"weight": self.weight})[0]

    t = tensors()
    t.pop("weight")
    program = torch.export.export(
        Layer(), (t | {"conv_states": t["conv_states"].clone()},), strict=strict
    ).module()
    with torch.no_grad():
        assert torch.equal(program(t), Layer()(t | {"conv_states": tensors()["conv_states"]}))
    with pytest.raises(Unsupported, match="no_grad"):
        program(t).sum().backward()


@pytest.mark.parametrize("operation", ["fn", "update", "prologue_fn"])
def test_a_graph_that_asks_for_a_gradient_is_refused_by_name(operation):
    t = tensors()
    t["weight"].requires_grad_()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"expected a call under torch\.no_grad"):
        torch.compile(ALL[operation], fullgraph=True, backend="aot_eager")(t)


@DEVICES
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("which", ["x", "weight", "conv_states"])
def test_forward_mode_is_refused(which, operation, device):
    t = tensors(device)
    with torch.no_grad():
        for _ in range(3):
            OPERATIONS[operation](t)  # the call is known by now
    with forward_ad.dual_level():
        t[which] = forward_ad.make_dual(t[which], torch.ones_like(t[which]))
        with pytest.raises(Unsupported, match=f"{which}: expected a tensor without a tangent"):
            OPERATIONS[operation](t)
        with pytest.raises(Unsupported, match="tangent"):
            triton_impl.causal_conv1d(
                forward_ad.make_dual(torch.randn(1, 3, DIM, device=device), torch.ones(1, 3, DIM, device=device)),
                tensors(device)["weight"],
            )  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transformations_are_refused_by_name(transform, operation):
    t = tensors()

    def call(x):
        return OPERATIONS[operation](t | {"x": x}).out.sum()

    if transform == "grad":
        run = lambda: torch.func.grad(call)(t["x"])  # noqa: E731
    elif transform == "vmap":
        run = lambda: torch.func.vmap(call)(t["x"][None])  # noqa: E731
    else:
        run = lambda: torch.func.jvp(call, (t["x"],), (t["x"],))  # noqa: E731
    with pytest.raises(Unsupported, match=r"x: expected a tensor outside of torch\.func"):
        run()
    assert call(t["x"]).isfinite()


WEIGHT = torch.arange(DIM * WIDTH, dtype=torch.float32).view(DIM, WIDTH).cos()
SHORT = torch.arange(14 * DIM, dtype=torch.float32).view(2, 7, DIM).sin()
DIFFERENTIABLE = {
    "conv": lambda x: triton_impl.causal_conv1d(x, WEIGHT).out,
    "prologue": lambda x: triton_impl.gated_delta_prologue(x, WEIGHT, **HEADS).q,
    "gated": lambda x: triton_impl.gated_short_conv(torch.cat([x] * 3, -1), WEIGHT).out,
    "short": lambda x: short_conv(x, WEIGHT).out,
    "documents": lambda x: short_conv(x, WEIGHT, segment_ids=(x[..., 0] > 0).long()).out,
}  # fmt: skip


@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_differentiable_forms_take_a_gradient_alone(form):
    call = DIFFERENTIABLE[form]
    x = SHORT.clone().requires_grad_()
    (want,) = torch.autograd.grad(call(x).square().sum(), x)
    found = torch.func.grad(lambda x: call(x).square().sum())(SHORT)
    assert torch.equal(found, want)
    with pytest.raises(Unsupported, match="vmap"):
        torch.func.vmap(call)(SHORT[None])
    with pytest.raises(Unsupported, match="tangent"):
        torch.func.jvp(call, (SHORT,), (SHORT,))
    with pytest.raises(Unsupported, match="first gradient"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: call(x).square().sum())(x).sum())(SHORT)


@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_differentiable_forms_are_compiled_without_a_gradient(form):
    call = DIFFERENTIABLE[form]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(SHORT), call(SHORT))


@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_a_dynamic_length_of_every_form_is_exported(form):
    class Form(torch.nn.Module):
        def forward(self, x):
            return DIFFERENTIABLE[form](x)

    length = torch.export.Dim("length", min=WIDTH, max=4096)
    program = torch.export.export(Form(), (SHORT,), dynamic_shapes={"x": {1: length}}, strict=False)
    for x in (SHORT, SHORT[:, :3], SHORT.repeat(1, 9, 1)):
        assert torch.equal(program.module()(x), DIFFERENTIABLE[form](x))


def test_documents_are_mapped_by_name():
    ids = torch.zeros(3, 2, 7, dtype=torch.int64)
    with pytest.raises(Unsupported, match="vmap"):
        torch.func.vmap(lambda ids: short_conv(SHORT, WEIGHT, segment_ids=ids).out)(ids)


# Version counters.


@DEVICES
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_what_is_written_is_counted(operation, mode, device):
    t = tensors(device)
    windows = torch.zeros(2, 1, WIDTH - 1, DIM, device=device)
    written = windows if operation == "verify" else t["conv_states"]
    options = dict(window_out=windows) if operation == "verify" else {}
    with mode():
        for _ in range(3):
            before = written._version, t["x"]._version
            OPERATIONS[operation](t, **options)
            assert written._version > before[0]
            assert t["x"]._version == before[1]


@DEVICES
def test_a_commit_is_counted(device):
    pool, windows = torch.zeros(5, 2, DIM, device=device), torch.ones(2, 1, WIDTH - 1, DIM, device=device)
    for _ in range(3):
        before = pool._version
        triton_impl.commit_windows(pool, windows, torch.zeros(2, dtype=torch.int64, device=device))
        assert pool._version > before


@DEVICES
@pytest.mark.parametrize("compiled", [False, True])
def test_autograd_sees_that_a_saved_tensor_was_written(compiled, device):
    t = tensors(device)
    run = torch.compile(update, fullgraph=True) if compiled else update
    leaf = torch.ones(DIM, device=device, requires_grad=True)
    for _ in range(2):
        product = leaf * t["conv_states"]
        with torch.no_grad():
            run(t)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.gpu
def test_a_captured_call_is_counted():
    t = tensors("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        update(t)
        before = t["conv_states"]._version
        with torch.cuda.graph(graph):
            update(t)
    assert t["conv_states"]._version > before


@DEVICES
def test_x_that_is_replaced_is_counted(device):
    t = tensors(device)
    x = t["x"][:2].clone()
    with torch.no_grad():
        for _ in range(3):
            before = x._version
            sglang.causal_conv1d_update(x, t["conv_states"].mT, t["weight"], t["bias"])
            assert x._version > before


@pytest.mark.parametrize("operation", ALL)
def test_what_is_written_is_counted_within_a_mode(operation):
    t = tensors()
    windows = torch.zeros(2, 1, WIDTH - 1, DIM)
    written = windows if operation == "verify" else t["conv_states"]
    options = dict(window_out=windows) if operation == "verify" else {}
    with torch.no_grad(), FlopCounterMode(display=False):
        before = written._version
        ALL[operation](t, **options)
        assert written._version > before


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("operation", UPDATES)
def test_a_pool_that_is_only_read_is_not_counted(operation, windows):
    """A draft leaves the pool as it is, also through an operator."""
    options = dict(window_out=torch.zeros(2, 1, WIDTH - 1, DIM)) if windows else {}
    t = tensors()
    leaf = torch.ones(DIM, requires_grad=True)
    product = leaf * t["conv_states"]
    before = t["conv_states"]._version

    def draft(t, **options):
        return UPDATES[operation](t, commit=False, **options)[0]

    with torch.no_grad():
        want = draft(t, **options)
        with FlopCounterMode(display=False):
            draft(t, **options)
        compiled = torch.compile(draft, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(t, **options), want)
        lazy = t | {"conv_states": torch._neg_view(-t["conv_states"])}
        assert torch.equal(draft(lazy, **options), want)
    assert t["conv_states"]._version == before
    product.sum().backward()


# Meta, lazy and other tensors.


@pytest.mark.parametrize("operation", OPERATIONS)
def test_meta_tensors_give_meta_results(operation):
    t = {name: tensor.to("meta") for name, tensor in tensors().items()}
    result = OPERATIONS[operation](t)
    assert all(found.device.type == "meta" for found in result)
    assert result.out.shape == (t["x"] if operation == "fn" else t["x"][:2]).shape
    with pytest.raises(ValueError, match="weight: expected shape"):
        OPERATIONS[operation](t | {"weight": t["weight"][1:]})


def test_a_layer_and_a_pool_on_meta():
    conv = CausalConv1d(DIM, WIDTH, device="meta")
    x = torch.empty(2, 5, DIM, device="meta", requires_grad=True)
    out = conv(x)
    assert (out.shape, out.device.type) == (x.shape, "meta")
    out.sum().backward()
    assert (x.grad.shape, conv.weight.grad.shape, conv.bias.grad.shape) == (x.shape, (DIM, WIDTH), (DIM,))
    pool = ConvStatePool(4, DIM, WIDTH, device="meta")
    slots = pool.allocate(2)
    with torch.no_grad():
        assert conv.prefill(x, None, pool, slots).shape == x.shape
        assert conv.step(x[:, 0], pool, slots).shape == (2, DIM)
    pool.reset(slots)
    assert pool.gather(slots).shape == (1, 2, WIDTH - 1, DIM)


@DEVICES
@pytest.mark.parametrize("operation", ["fn", "update"])
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_a_lazy_negative_is_read_as_it_is(which, operation, device):
    wanted, lazy = tensors(device), tensors(device)
    with torch.no_grad():
        OPERATIONS[operation](tensors(device))
        wanted[which] = -wanted[which]
        lazy[which] = torch._neg_view(lazy[which])
        want, got = OPERATIONS[operation](wanted), OPERATIONS[operation](lazy)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.conv_states, want.conv_states)
    lazy = tensors(device) | {"conv_states": torch._neg_view(wanted["conv_states"])}
    with pytest.raises(Unsupported, match="conv_states: expected a tensor that holds its values"):
        OPERATIONS[operation](lazy)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_by_name(layout):
    nested = torch.nested.nested_tensor([torch.randn(2, DIM), torch.randn(3, DIM)], layout=layout)
    t = tensors()
    for call in (
        lambda: fn(t | {"x": nested}),
        lambda: triton_impl.causal_conv1d(nested, t["weight"]),
        lambda: CausalConv1d(DIM, WIDTH)(nested),
        lambda: CausalConv1d(DIM, WIDTH).requires_grad_(False)(nested),
        lambda: short_conv(nested, t["weight"]),
        lambda: triton_impl.gated_short_conv(nested, t["weight"]),
        lambda: fla.causal_conv1d(nested, t["weight"]),
        lambda: fla.causal_conv1d_update_states(nested, WIDTH),
        lambda: dao.causal_conv1d_fn(nested, t["weight"]),
        lambda: triton_impl.tree_parents_from_links(nested, nested),
    ):
        with pytest.raises(Unsupported, match=r"(x|bcx|next_token): expected a dense tensor"):
            call()


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_the_largest_counters_are_taken_as_the_nearest_in_range(value):
    x, weight, pool = torch.randn(1, 2, DIM), torch.randn(DIM, WIDTH), torch.randn(1, 5, DIM)
    counts = torch.tensor([value], dtype=torch.uint64)
    found = []
    for count in (counts, torch.tensor([2**62])):
        found.append(
            triton_impl.causal_conv1d_update(x, weight, None, pool.clone(), num_accepted_tokens=count)
        )
    assert torch.equal(found[0].out, found[1].out)
    tree = dict(commit=False, tree_parents=torch.tensor([[value, value]], dtype=torch.uint64))
    chain = dict(commit=False, tree_parents=torch.tensor([[-1, 0]]))
    first, second = (triton_impl.causal_conv1d_update(x, weight, None, pool, **p).out for p in (tree, chain))
    assert torch.equal(first, second)


def test_validation_takes_parameters():
    t = tensors()
    t["weight"] = torch.nn.Parameter(t["weight"])
    fn(t, validate=True)
    with pytest.raises(ValueError, match="cache_indices"):
        fn(t | {"cache_indices": torch.tensor([3, 9])}, validate=True)


def test_validation_takes_lazy_tensors_and_refuses_those_without_data():
    fn(tensors() | {"cache_indices": torch._neg_view(torch.tensor([-3, -1]))}, validate=True)
    with pytest.raises(ValueError, match="cache_indices"):
        fn(tensors() | {"cache_indices": torch._neg_view(torch.tensor([-3, -9]))}, validate=True)
    for operation in ALL:
        meta = {name: tensor.to("meta") for name, tensor in tensors().items()}
        with pytest.raises(Unsupported, match="validate: expected False on meta"):
            ALL[operation](meta, validate=True)


# Tracers and modes.


@pytest.mark.parametrize("operation", ALL)
def test_host_integers_follow_one_rule_within_a_mode(operation):
    for value in (True, 1.0, "1", None, torch.tensor(1)):
        with (
            FlopCounterMode(display=False),
            pytest.raises(TypeError, match="pad_slot_id: expected an integer"),
        ):
            ALL[operation](tensors(), pad_slot_id=value)
    with FlopCounterMode(display=False):
        ALL[operation](tensors(), pad_slot_id=2**70)


@pytest.mark.parametrize("seen_by", ["mode", "compiler"])
def test_host_integers_beyond_64_bits_reach_an_operator(seen_by):
    huge = dict(max_seqlen=2**70, snapshot_block_size=2**70, snapshot_indices=torch.tensor([[4], [2]]))

    def call(t):
        return fn(t, **huge).out

    want = call(tensors())
    if seen_by == "compiler":
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(tensors()), want)
    else:
        with FlopCounterMode(display=False):
            assert torch.equal(call(tensors()), want)


def test_a_lazy_zero_is_not_written():
    with pytest.raises(Unsupported, match="conv_states: expected a tensor that holds its values"):
        update(tensors() | {"conv_states": torch._efficientzerotensor(5, WIDTH - 1, DIM)})


@DEVICES
@pytest.mark.parametrize("operation", OPERATIONS)
def test_modes_see_plain_calls(operation, device):
    t = tensors(device)
    with torch.no_grad():
        for _ in range(2):
            OPERATIONS[operation](t)
            with FlopCounterMode(display=False) as counter:
                OPERATIONS[operation](t)
            tokens = 7 if operation == "fn" else 2
            assert counter.get_total_flops() == 2 * tokens * DIM * WIDTH


def test_the_differentiable_form_is_counted():
    x = torch.randn(1, 7, DIM, requires_grad=True)
    weight = torch.randn(DIM, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        triton_impl.causal_conv1d(x, weight).out.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * DIM * WIDTH


@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_every_gradient_is_counted(form):
    x = SHORT.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        DIFFERENTIABLE[form](x).sum().backward()  # no sums: the weight asks for no gradient
    assert counter.get_total_flops() == 2 * 2 * SHORT.numel() * WIDTH


def test_make_fx_records_the_operator():
    t = tensors()
    traced = make_fx(
        lambda x: triton_impl.causal_conv1d_fn(x, t["weight"], None, None, t["query_start_loc"]).out
    )(t["x"])
    assert "twinconv" in traced.code
    x = torch.randn_like(t["x"])
    assert torch.equal(
        traced(x), triton_impl.causal_conv1d_fn(x, t["weight"], None, None, t["query_start_loc"]).out
    )


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator():
    t = tensors()
    plain = lambda x: triton_impl.causal_conv1d_fn(x, t["weight"], None, None, t["query_start_loc"]).out  # noqa: E731
    traced = torch.jit.trace(plain, (t["x"],))
    x = torch.randn_like(t["x"])
    assert torch.equal(traced(x), plain(x))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = CausalConv1d(DIM, WIDTH).requires_grad_(False)

    def forward(self, x):
        return self.conv(x * 2) + 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", DIFFERENTIABLE)
def test_jit_trace_takes_a_dense_call(form):
    traced = torch.jit.trace(DIFFERENTIABLE[form], (SHORT,))
    assert torch.equal(traced(SHORT * -1), DIFFERENTIABLE[form](SHORT * -1))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_takes_links():
    links = torch.tensor([[1, -1, -1]]), torch.tensor([[-1, 2, -1]])
    traced = torch.jit.trace(triton_impl.tree_parents_from_links, links)
    assert torch.equal(traced(*links), triton_impl.tree_parents_from_links(*links))


def test_symbolic_trace_refuses_by_name():
    weight = tensors()["weight"]
    for call in (
        lambda x: short_conv(x, weight),
        lambda x: triton_impl.gated_short_conv(x, weight),
        lambda x: triton_impl.tree_parents_from_links(x, x),
        lambda x: fla.causal_conv1d_update_states(x, WIDTH),
        lambda x: dao.causal_conv1d_fn(x, weight),
        lambda x: vllm.causal_conv1d_update(x, None, weight),
        lambda x: sglang.causal_conv1d_update(x, None, weight),
    ):
        with pytest.raises(Unsupported, match="symbolic_trace"):
            torch.fx.symbolic_trace(call)


def test_symbolic_trace_takes_the_layer_as_a_leaf():
    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["conv"]
    x = torch.randn(2, 5, DIM)
    assert torch.equal(traced(x), model(x))
    with pytest.raises(Unsupported, match="symbolic_trace"):
        torch.fx.symbolic_trace(model.conv)


def test_script_is_refused_clearly():
    with pytest.raises(Unsupported, match=r"torch\.jit\.script"):
        torch.jit.script(Model())


# Layers and pools.


def test_from_conv1d_keeps_what_it_can_and_refuses_the_rest():
    conv = torch.nn.Conv1d(DIM, DIM, WIDTH, groups=DIM)
    conv.weight.requires_grad_(False)
    layer = CausalConv1d.from_conv1d(conv)
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    for mode in ("circular", "reflect", "replicate"):
        with pytest.raises(ValueError, match=f"conv: expected padding_mode=zeros, got {mode}"):
            CausalConv1d.from_conv1d(
                torch.nn.Conv1d(DIM, DIM, WIDTH, groups=DIM, padding=2, padding_mode=mode)
            )
    for other in (
        torch.nn.ConvTranspose1d(DIM, DIM, WIDTH, groups=DIM),
        torch.nn.Linear(DIM, DIM),
        layer,
        None,
    ):
        with pytest.raises(TypeError, match=f"conv: expected an nn.Conv1d, got {type(other).__name__}"):
            CausalConv1d.from_conv1d(other)
    reparametrised = (
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(DIM, DIM, WIDTH, groups=DIM)),
        prune.identity(torch.nn.Conv1d(DIM, DIM, WIDTH, groups=DIM), "weight"),
        torch.nn.LazyConv1d(DIM, WIDTH, groups=DIM),
    )
    for other in reparametrised:
        with pytest.raises(ValueError, match="conv: expected a weight that is a parameter and has values"):
            CausalConv1d.from_conv1d(other)


def test_sizes_of_layers_and_pools_are_checked():
    with pytest.raises(TypeError, match="dim: expected an integer, got '8'"):
        CausalConv1d("8", 4)
    with pytest.raises(TypeError, match=r"width: expected an integer, got 4\.0"):
        CausalConv1d(8, 4.0)
    with pytest.raises(ValueError, match="num_slots: expected a positive integer, got 0"):
        ConvStatePool(0, DIM, WIDTH)
    with pytest.raises(TypeError, match=r"num_slots: expected an integer, got 2\.5"):
        ConvStatePool(2.5, DIM, WIDTH)
    pool = ConvStatePool(4, DIM, WIDTH, layers=2)
    for layer in (5, -3, 2):
        with pytest.raises(ValueError, match=f"layer: expected one of 2 layers, from 0, got {layer}"):
            pool.layer(layer)
    assert (
        repr(pool)
        == "ConvStatePool(num_slots=4, dim=4, layers=2, state_len=2, dtype=torch.float32, device=cpu, free=4)"
    )


# Shared memory.


def test_arguments_that_share_memory_with_what_is_written_are_refused():
    t = tensors()
    pool = torch.randn(8, WIDTH - 1, DIM)
    with pytest.raises(ValueError, match="conv_states"):
        fn(t | {"conv_states": pool, "x": pool.view(-1, DIM)[:7]})
    with pytest.raises(ValueError, match="conv_states"):
        fn(t | {"conv_states": pool[:1].expand(5, -1, -1)})
    windows = pool.as_strided((2, 1, WIDTH - 1, DIM), (8, 8, 4, 1))
    with pytest.raises(ValueError, match=r"window_out|conv_states"):
        update(t | {"conv_states": pool}, window_out=windows)


# Without Triton.


def test_the_plain_path_does_without_triton():
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import torch, triton_impl\nfrom triton_impl.modules import CausalConv1d\nfrom triton_impl import adapter\n"
        "conv = CausalConv1d(4, 3)\nconv(torch.ones(1, 5, 4)).sum().backward()\nadapter.eager()\n"
        "try:\n    triton_impl.causal_conv1d(torch.ones(1, 5, 4), conv.weight, backend='triton')\n"
        "except triton_impl.Unsupported as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "needs the package triton" in done.stdout
