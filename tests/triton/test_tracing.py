"""torch.compile, export and fake tensors: operators with declared mutation, the same results as plain calls."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_impl
from oracle.contract import Unsupported
from triton_impl import api, tracing
from triton_impl.compat import causal_conv1d as dao
from triton_impl.compat import fla, sglang, vllm

torch.set_num_threads(1)  # the tensors are tiny
ops = torch.ops.twinconv
DIM, WIDTH, SLOTS = 6, 4, 13
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
pytestmark = [  # of torch's own compiler
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def arguments(device="cpu", dtype=torch.float32, tokens=10):
    """x, weight, bias, pool, query_start_loc, cache_indices and has_initial_state of four rows, one of them padding."""
    tensors = [
        torch.randn(tokens, DIM, dtype=dtype),
        torch.randn(DIM, WIDTH, dtype=dtype),
        torch.randn(DIM, dtype=dtype),
        torch.randn(SLOTS, WIDTH - 1, DIM, dtype=dtype),
        torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32),
        torch.tensor([2, 5, -1, 1]),
        torch.tensor([True, False, True, False]),
    ]
    return [tensor.to(device) for tensor in tensors]


def transposed(pool):
    """The same pool in channel-first memory."""
    return pool.transpose(1, 2).contiguous().transpose(1, 2)


FN_VARIANTS = {
    "full": lambda x, w, b, p, q, s, h: (x, w, b, p, q, s, h, "silu", -1, None, "auto"),
    "host bound": lambda x, w, b, p, q, s, h: (x, w, b, p, q, s, h, None, 0, 4, "per_sequence"),
    "views": lambda x, w, b, p, q, s, h: (
        x[:, ::2], w[::2], b[::2], transposed(p)[:, :, ::2], q, s, h, None, -1, None, "flat",
    ),
}  # fmt: skip
UPDATE_VARIANTS = {
    "full": lambda x, w, b, p, q, s, h: (x[:4], w, b, p, s, None, None, None, "silu", -1),
    "identity": lambda x, w, b, p, q, s, h: (x[:4], w, None, transposed(p), None, None, None, None, None, -1),
    "tokens": lambda x, w, b, p, q, s, h: (x[:8].view(4, 2, DIM), w, b, p, s, None, None, None, None, 5),
    "packed": lambda x, w, b, p, q, s, h: (x, w, b, p, s, q, None, None, "silu", -1),
    "rolling": lambda x, w, b, p, q, s, h: (x, w, b, torch.cat([p, p], 1), s, q, s.abs(), 4, "silu", -1),
}


STATELESS = {
    "plain": lambda x, w, b, p, q, s, h: (x, w, None, q, "swish", None, "flat", "auto", None, None, None),
    "extended": lambda x, w, b, p, q, s, h: (
        torch.cat([x, x], 1), w, b, q, "silu", 4, "auto", "auto", x.half(), 3, [2, 4],
    ),
}  # fmt: skip


@DEVICES
@pytest.mark.parametrize("variant", STATELESS)
def test_opcheck_without_a_pool(variant, device):
    """It mutates nothing: compilers do not take an optional tensor that is mutated."""
    assert not ops.causal_conv1d_fn_stateless.default._schema.is_mutable
    arguments_ = STATELESS[variant](*arguments(device))
    results = torch.library.opcheck(ops.causal_conv1d_fn_stateless.default, arguments_)
    assert set(results.values()) == {"SUCCESS"}


@DEVICES
@pytest.mark.parametrize(
    ("operator", "variant"),
    [(ops.causal_conv1d_fn.default, v) for v in FN_VARIANTS.values()]
    + [(ops.causal_conv1d_update.default, v) for v in UPDATE_VARIANTS.values()],
    ids=[f"fn-{v}" for v in FN_VARIANTS] + [f"update-{v}" for v in UPDATE_VARIANTS],
)  # fmt: skip
def test_opcheck(operator, variant, device):
    """PyTorch's own check: schema (what is mutated), fake kernel, functionalisation with dynamic shapes."""
    results = torch.library.opcheck(operator, (*variant(*arguments(device)), "auto"))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_sees_an_undeclared_mutation():
    library = torch.library.Library("twinconv_mutant", "DEF")
    library.define(str(ops.causal_conv1d_update.default._schema).split("::")[1].replace("(a!)", ""))
    through = ops.causal_conv1d_update.default
    library.impl("causal_conv1d_update", lambda *args: through(*args), "CompositeExplicitAutograd")
    x, weight, bias, pool, _, slots, _ = arguments()
    with pytest.raises(Exception, match="mutated"):
        torch.library.opcheck(
            torch.ops.twinconv_mutant.causal_conv1d_update.default,
            (x[:4], weight, bias, pool, slots, None, None, None, "silu", -1, "auto"),
            test_utils="test_schema",
        )


@pytest.mark.parametrize("variant", FN_VARIANTS)
def test_operator_and_plain_call_give_the_same_bits(variant):
    args = FN_VARIANTS[variant](*arguments(dtype=torch.bfloat16))
    x, weight, bias, pool, starts, slots, has, activation, pad, bound, schedule = args
    pools = [pool.clone() for _ in range(2)]
    via = ops.causal_conv1d_fn(x, weight, bias, pools[0], *args[4:], "auto")
    out, same = triton_impl.causal_conv1d_fn(
        x, weight, bias, pools[1], starts, slots, has, activation=activation, pad_slot_id=pad, max_seqlen=bound,
        schedule=schedule,
    )  # fmt: skip
    assert same is pools[1]
    assert torch.equal(via, out)
    assert pool is None or torch.equal(*pools)


def two_steps(x, weight, bias, pool, slots):
    first, pool = triton_impl.causal_conv1d_update(x, weight, bias, pool, slots, activation="silu")
    second, pool = triton_impl.causal_conv1d_update(
        first * 2 + x, weight, bias, pool, slots, activation="silu"
    )
    return second, pool


def prefill_and_step(x, weight, bias, pool, starts, slots, has):
    out, _ = triton_impl.causal_conv1d_fn(x, weight, bias, pool, starts, slots, has, activation="silu")
    step, _ = triton_impl.causal_conv1d_update(out[:4].relu(), weight, bias, pool, slots)
    return out + 1, step


@DEVICES
@BACKENDS
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_decode_is_one_graph_with_equal_results(backend, dynamic, device):
    x, weight, bias, pool, _, slots, _ = arguments(device)
    mine, theirs = pool.clone(), pool.clone()
    compiled = torch.compile(two_steps, fullgraph=True, backend=backend, dynamic=dynamic)
    for step in range(3):
        token = x[step : step + 4] * (step + 1)
        out, same = compiled(token, weight, bias, mine, slots)
        want, _ = two_steps(token, weight, bias, theirs, slots)
        assert torch.equal(out, want)
        assert torch.equal(mine, theirs)
        assert same is mine
    assert not torch.equal(mine, pool)
    assert torch.equal(mine[[0, 3, 4]], pool[[0, 3, 4]])


@DEVICES
@BACKENDS
def test_a_compiled_prefill_is_one_graph_with_equal_results(backend, device):
    x, weight, bias, pool, *rest = arguments(device)
    mine, theirs = transposed(pool), transposed(pool)
    compiled = torch.compile(prefill_and_step, fullgraph=True, backend=backend)
    for _ in range(3):
        for got, want in zip(
            compiled(x, weight, bias, mine, *rest),
            prefill_and_step(x, weight, bias, theirs, *rest),
            strict=True,
        ):
            assert torch.equal(got, want)
        assert torch.equal(mine, theirs)


def test_no_graph_break_and_no_copy_of_the_pool():
    x, weight, bias, pool, _, slots, _ = arguments()
    report = torch._dynamo.explain(two_steps)(x[:4], weight, bias, pool, slots)
    assert (report.graph_count, report.graph_break_count) == (1, 0)

    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend="inductor")
    _, code = run_and_get_code(compiled, x[:4], weight, bias, pool, slots)
    assert sum(text.count("torch.ops.twinconv.causal_conv1d_update.default(") for text in code) == 2
    allocated = [line for text in code for line in text.splitlines() if "= empty_strided" in line]
    assert not [line for line in allocated if f"({SLOTS}, {WIDTH - 1}, {DIM})" in line], allocated


def test_other_sizes_do_not_compile_again():
    """One graph serves every number of tokens and rows, once sizes are known to change."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prefill_and_step, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (10, 11, 17, 23):
        x, weight, bias, pool, *rest = arguments(tokens=tokens)
        theirs = pool.clone()
        out, _ = compiled(x, weight, bias, pool, *rest)
        assert torch.equal(out, prefill_and_step(x, weight, bias, theirs, *rest)[0])
    assert counter.frame_count == 1


def test_export():
    class Step(torch.nn.Module):
        def __init__(self, weight, pool):
            super().__init__()
            self.register_buffer("weight", weight)
            self.register_buffer("pool", pool)

        def forward(self, x, slots):
            return triton_impl.causal_conv1d_update(x, self.weight, None, self.pool, slots)[0]

    x, weight, _, pool, _, slots, _ = arguments()
    program = torch.export.export(Step(weight, pool.clone()), (x[:4], slots))
    module = program.module()
    out = module(x[:4], slots)
    want, theirs = triton_impl.causal_conv1d_update(x[:4], weight, None, pool, slots)
    assert torch.equal(out, want)
    assert torch.equal(module.pool, theirs)


def test_fake_tensors_pass_the_checks():
    with FakeTensorMode():
        x, weight, bias, pool, starts, slots, has = arguments()
        out, same = triton_impl.causal_conv1d_fn(
            x.t().contiguous().t(), weight, bias, pool, starts, slots, has
        )
        assert out.shape == x.shape
        assert out.stride() == (1, x.shape[0])
        assert same is pool
        assert triton_impl.causal_conv1d_update(x[:4], weight, bias, pool, slots).out.shape == (4, DIM)
        with pytest.raises(ValueError, match=r"weight: expected shape \[dim=6, width\]"):
            triton_impl.causal_conv1d_fn(x, weight[1:], bias, pool, starts, slots, has)
        with pytest.raises(TypeError, match="cache_indices: expected dtype"):
            triton_impl.causal_conv1d_update(x[:4], weight, bias, pool, slots.float())
        with pytest.raises(Unsupported, match="validate"):
            triton_impl.causal_conv1d_update(x[:4], weight, bias, pool, slots, validate=True)


def test_a_traced_call_does_not_validate():
    def validated(x, weight, pool):
        return triton_impl.causal_conv1d_update(x, weight, None, pool, validate=True)[0]

    x, weight, _, pool, *_ = arguments()
    with pytest.raises(Exception, match="validate"):
        torch.compile(validated, fullgraph=True, backend="eager")(x, weight, pool)


def test_bad_input_is_named_by_a_compiled_call():
    x, weight, bias, pool, _, slots, _ = arguments()
    with pytest.raises(Exception, match=r"weight: expected shape \[dim=6, width\], got \[5, 4\]"):
        torch.compile(two_steps, fullgraph=True, backend="eager")(x[:4], weight[1:], bias, pool, slots)


def test_a_plain_call_does_not_pay_for_the_operator(monkeypatch):
    def refuse(*args):
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(tracing, "through_operator", refuse)
    x, weight, bias, pool, starts, slots, has = arguments()
    triton_impl.causal_conv1d_fn(x, weight, bias, pool, starts, slots, has)
    triton_impl.causal_conv1d_update(x[:4], torch.nn.Parameter(weight), bias, pool, slots)
    with pytest.raises(AssertionError, match="dispatcher"), FakeTensorMode():
        triton_impl.causal_conv1d_fn(*arguments())


# Gradients are refused when they are asked for, not lost.


@DEVICES
@pytest.mark.parametrize("operation", ["fn", "update"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_backward_pass_is_refused(operation, which, device):
    x, weight, bias, pool, starts, slots, has = arguments(device)
    tensors = [x if operation == "fn" else x[:4].clone(), weight, bias]
    tensors[which].requires_grad_()
    rest = (pool, starts, slots, has) if operation == "fn" else (pool, slots)
    function = getattr(triton_impl, f"causal_conv1d_{operation}")
    out = function(*tensors, *rest).out
    with pytest.raises(Unsupported, match="no_grad"):
        out.sum().backward()
    with torch.no_grad():
        assert not function(*tensors, *rest).out.requires_grad
    with torch.inference_mode():
        assert not function(*tensors, *rest).out.requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_backward_pass_is_refused():
    x, weight, bias, pool, _, slots, _ = arguments()
    weight.requires_grad_()

    def differentiate():
        out, _ = torch.compile(two_steps, backend="aot_eager")(x[:4], weight, bias, pool, slots)
        out.sum().backward()

    # PyTorch 2.11 asks for the gradient as it compiles
    with pytest.raises((Unsupported, torch._dynamo.exc.BackendCompilerFailed), match="no_grad"):
        differentiate()
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(two_steps, backend="aot_eager", fullgraph=True)(x[:4], weight, bias, pool, slots)


# The adapters compile too.

ADAPTERS = {
    "sglang": lambda x, w, b, p, q, s, h: sglang.causal_conv1d_fn(x.t(), w, b, q, s, h, p.mT, seq_lens_cpu=[4]),
    "sglang update": lambda x, w, b, p, q, s, h: sglang.causal_conv1d_update(
        x[:4] * 1, p.mT, w, b, "silu", None, s
    ),
    "vllm": lambda x, w, b, p, q, s, h: vllm.causal_conv1d_fn(x.t(), w, b, p.mT, q, s, h),
    "vllm update": lambda x, w, b, p, q, s, h: vllm.causal_conv1d_update(
        x[:8].view(4, 2, DIM).mT * 1, p.mT, w, b, "silu", s
    ),
    "causal_conv1d": lambda x, w, b, p, q, s, h: dao.causal_conv1d_fn(
        x.view(2, 5, DIM).mT, w, b, None, p.mT[:2], True, None, "silu"
    )[0],
    "causal_conv1d ids": lambda x, w, b, p, q, s, h: dao.causal_conv1d_fn(
        x.view(2, 5, DIM).mT, w, b, (x.view(2, 5, DIM)[:, :, 0] > 0).int().cumsum(1)
    ),
    "causal_conv1d update": lambda x, w, b, p, q, s, h: dao.causal_conv1d_update(x[:4], p.mT, w[:, 1:], b, None, None, s),
    "fla": lambda x, w, b, p, q, s, h: fla.causal_conv1d(x[None], w, b, None, None, True, "silu", cu_seqlens=q)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_compiled_adapter(name):
    args = arguments()
    pools = args[3].clone(), args[3].clone()
    compiled = torch.compile(ADAPTERS[name], fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got = compiled(*args[:3], pools[0], *args[4:])
        want = ADAPTERS[name](*args[:3], pools[1], *args[4:])
        assert torch.equal(got, want)
        assert torch.equal(*pools)


@pytest.mark.gpu
def test_host_time_of_the_dispatch():
    """A plain call stays well below one through the operator, which itself costs microseconds, not tens."""
    import time

    x, weight, bias, pool, _, slots, _ = arguments("cuda")
    x, slots = x[:4].contiguous(), slots.int()
    calls = {
        "plain": lambda: api.causal_conv1d_update(x, weight, bias, pool, slots),
        "operator": lambda: ops.causal_conv1d_update(
            x, weight, bias, pool, slots, None, None, None, None, -1, "auto"
        ),
    }
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for name, _ in itertools.product(calls, range(20)):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(50):
                calls[name]()
            best[name] = min(best[name], (time.perf_counter() - begin) / 50)
    print({name: f"{1e6 * seconds:.1f} us" for name, seconds in best.items()})
    assert best["plain"] < best["operator"] + 2e-6
    assert best["operator"] < best["plain"] + 20e-6
