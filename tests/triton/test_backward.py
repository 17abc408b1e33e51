"""Gradients of the Torch twin: the kernels in Triton's interpreter, the eager path, autograd and torch.compile.

The eager path's values, and the kernels' core cases, are judged by test_conformance.py.
"""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import triton_impl
from oracle.conformance.catalogue import backward as case_of
from oracle.numerics import TypedArray
from tests.tools import gradient_cases as gradients
from tests.tools.covering import combinations, cover
from tests.tools.synchronisation import no_synchronisation
from triton_impl import backward, config, functional, packed_rows
from triton_impl import call as calls
from triton_impl.functional import causal_conv1d

CASES = gradients.CASES
KERNELS = [{"backend": "triton", "schedule": schedule} for schedule in ("flat", "per_sequence")]
FLOATS = ("x", "weight", "bias", "initial_states")
# NumPy warns where exp2 overflows to infinity, of which the reciprocal is the zero that is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


def to_torch(array, device="cpu"):
    if array is None:
        return None
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.data.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.data.copy()).to(device)


def to_typed(tensor):
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous().cpu()
    if tensor.dtype == torch.bfloat16:
        return TypedArray("bfloat16", tensor.view(torch.int16).numpy().view(np.uint16))
    return TypedArray(str(tensor.dtype).removeprefix("torch."), tensor.numpy())


def tensors(problem, device="cpu"):
    """Arguments that ask for gradients, and the upstream gradients of both results."""
    arguments = {name: to_torch(array, device) for name, array in problem.arguments.items()}
    for name in FLOATS:
        if arguments[name] is not None:
            arguments[name].requires_grad_()
    return arguments, to_torch(problem.dout, device), to_torch(problem.dfinal_states, device)


def run(arguments, dout, dfinal, activation="silu", **options):
    """The gradients, as tensors in the order of FLOATS."""
    out, states = causal_conv1d(**arguments, activation=activation, **options)
    results = [(out, dout), (states, dfinal)]
    results = [
        (result, gradient) for result, gradient in results if gradient is not None and result.requires_grad
    ]
    leaves = [arguments[name] for name in FLOATS if arguments[name] is not None]
    outputs, upstream = zip(*results, strict=True)
    found = torch.autograd.grad(outputs, leaves, upstream)
    found = dict(zip((name for name in FLOATS if arguments[name] is not None), found, strict=True))
    return [found.get(name) for name in FLOATS]


def backward_alone(arguments, dout, dfinal, activation="silu", *, backend, schedule):
    """`run` without the forward pass, of which gradients need nothing: the operator as autograd calls it."""
    a = {name: None if t is None else t.detach() for name, t in arguments.items()}
    found = torch.ops.twinconv.causal_conv1d_backward(
        dout, dfinal, *a.values(), activation, None, schedule, backend, True, a["initial_states"] is not None
    )
    return [None if a[name] is None else g for name, g in zip(FLOATS, found, strict=True)]


def assert_right(problem, differentiate, device="cpu", **options):
    found = differentiate(*tensors(problem, device), problem.activation, **options)
    assert not gradients.judge(problem, map(to_typed, found))


def assert_same(a, b):
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right), i


def wide(**changes):
    """Float32 rows over several blocks; any change of what the catalogue's builder takes."""
    return gradients.build(case_of("wide", **{"lengths": (40, 3, 0, 33), "tail": 5} | changes))


# What the conformance suite leaves to compiled code. The schedules take turns; below they are shown to give the same bits.
FULL = {name: case for name, case in CASES.items() if case.tier == "full"}


@pytest.mark.parametrize(("case", "options"), list(zip(FULL.values(), KERNELS * len(FULL))), ids=FULL)  # noqa: B905
def test_kernels_against_the_reference(case, options):
    assert_right(gradients.build(case), backward_alone, **options)


def test_forward_is_the_prefill_bit_for_bit():
    problem = gradients.build(CASES["bfloat16-silu"])
    a, _, _ = tensors(problem)
    for options in ({"backend": "eager"}, *KERNELS):
        out, states = causal_conv1d(**a, activation="silu", **options)
        with torch.no_grad():
            pool = a["initial_states"].clone()
            same = triton_impl.causal_conv1d_fn(
                a["x"], a["weight"], a["bias"], pool, a["query_start_loc"], None, torch.ones(9, dtype=torch.bool),
                activation="silu", **options,
            )  # fmt: skip
        assert torch.equal(out, same.out)
        assert torch.equal(states, pool)


def test_both_schedules_give_the_same_bits():
    problem = wide()
    first = run(*tensors(problem), **KERNELS[0])
    assert_same(run(*tensors(problem), **KERNELS[1]), first)
    assert_same(run(*tensors(problem), **KERNELS[1], max_seqlen=1), first)  # too small: programs stride on


@contextlib.contextmanager
def blocks(monkeypatch, **changes):
    """Launches with other blocks than the configuration chooses."""
    choose = backward.backward_config
    with monkeypatch.context() as patch:
        patch.setattr(backward, "backward_config", lambda *a: choose(*a)._replace(**changes))
        calls.forget()
        yield
    calls.forget()


def test_block_sizes_do_not_change_dx(monkeypatch):
    problem = wide()
    plain = backward_alone(*tensors(problem), **KERNELS[0])
    for changes in ({"block_t": 16, "group": 2}, {"block_t": 64, "block_d": 16, "group": 8, "search": 2}):
        with blocks(monkeypatch, **changes):
            other = backward_alone(*tensors(problem), **KERNELS[0])
        assert torch.equal(other[0], plain[0])
        assert torch.equal(other[3], plain[3])
        assert not gradients.judge(problem, map(to_typed, other))


UPSTREAM = {
    "slice": lambda g: torch.cat([g, g, g], dim=-1)[..., g.shape[-1] : 2 * g.shape[-1]],
    "transposed": lambda g: g.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda g: torch.stack([g, torch.full_like(g, torch.nan)], dim=-1)[..., 0],
}


@pytest.mark.parametrize("options", [{"backend": "eager"}, KERNELS[0]], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_strides_of_upstream_gradients_do_not_change_a_bit(dense, layout, options):
    case = dict(lengths=(9, 9), tail=0, dense=True) if dense else dict(lengths=(9, 2, 4))
    arguments, dout, dfinal = tensors(wide(**case))
    plain = run(arguments, dout, dfinal, **options)
    assert_same(run(arguments, layout(dout), layout(dfinal), **options), plain)


def channel_first(t):
    """The same values with unit token stride."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_of_wider(t):
    """A slice of the channels of a wider channel-first tensor, as Mamba's in_proj is split."""
    return (
        torch.cat([channel_first(t)] * 2, dim=-1)
        .transpose(-1, -2)
        .contiguous()
        .transpose(-1, -2)[..., : t.shape[-1]]
    )


def sequence_first(t):
    """Dense rows [batch, n, dim] in [n, batch, dim] memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t


LAYOUTS = {
    "x": (channel_first, None),
    "dout": (None, channel_first),
    "both": (channel_first, channel_first),
    "slices": (channels_of_wider, channels_of_wider),
    "expanded dout": (channel_first, lambda g: g[..., :1, :1].expand(g.shape)),
    "dout expanded along channels": (None, lambda g: channel_first(g)[..., :1].expand(g.shape)),
    "dout expanded along tokens": (channel_first, lambda g: g[..., :1, :].expand(g.shape)),
    "sequence-first": (sequence_first, sequence_first),
}
ROWS = {
    "packed": dict(lengths=(3, 0, 33, 9), tail=5),
    "dense, whole tiles": dict(lengths=(40, 40), tail=0, dense=True),
    "dense, uneven": dict(lengths=(37, 37), tail=0, dense=True),
    "dense, one row": dict(lengths=(40,), tail=0, dense=True),
    "dense, short": dict(lengths=(2, 2, 2), tail=0, dense=True),
}


def assert_layout_does_not_matter(problem, layout, kernels, differentiate, device="cpu"):
    """Gradients in a layout, by any of `kernels`, laid out as x is.

    Those of x and initial_states: the very bits of contiguous x and dout; of weight and bias: those of the same x with
    dout in another layout.
    """
    arguments, dout, dfinal = tensors(problem, device)
    of_x, of_dout = LAYOUTS[layout]
    if of_dout is not None:
        dout = of_dout(dout)
    plain = differentiate(arguments, dout.contiguous(), dfinal, **KERNELS[0])
    same_x, changed = plain, dict(arguments)
    if of_x is not None:
        changed["x"] = of_x(arguments["x"].detach()).requires_grad_()
        other = channel_first(dout) if dout.is_contiguous() else dout.contiguous()
        same_x = differentiate(changed, other, dfinal, **KERNELS[0])
    eager = run(changed, dout, dfinal, backend="eager")
    others = [differentiate(changed, dout, dfinal, **options) for options in kernels]
    for found in (eager, *others):
        assert found[0].stride() == torch.empty_like(changed["x"]).stride()
    for found in others:
        assert_same(found, same_x)
        assert_same([found[0], found[3]], [plain[0], plain[3]])
    if "expanded" not in layout:
        for found in (eager, plain, same_x):
            assert not gradients.judge(problem, map(to_typed, found))


def meetings(case):
    """Any two parts of a case, and short rows in every width where both tensors are channel-first; rarer layouts once."""
    layout, rows, _, width, *_ = case
    if layout == "dout expanded along tokens":
        return {layout} if width == 4 and rows == "packed" else set()
    pairs = set(itertools.combinations(enumerate(case), 2))
    return pairs | {(rows, width)} if (layout, rows) == ("both", "dense, short") else pairs


# No block divides 130, which has two blocks of channels, or 37, which has if x is channel-first. Rows may be shorter
# than width-1. Without states, what lies before a row is zero, not the row before. One dense row: in LONG.
MEETING = cover(
    itertools.product(
        LAYOUTS, [name for name in ROWS if "one row" not in name], (8, 130, 1, 5), (4, 1, 2, 8),
        ("float32", "bfloat16"), (True, False), ("flat", "per_sequence"),
    ),
    meetings,
)  # fmt: skip


@pytest.mark.parametrize(("layout", "rows", "dim", "width", "dtype", "states", "schedule"), MEETING)
def test_layouts_of_x_and_dout(layout, rows, dim, width, dtype, states, schedule):
    dim = 37 if dim == 130 and LAYOUTS[layout][0] in (channel_first, channels_of_wider) else dim
    problem = wide(dim=dim, width=width, dtype=dtype, initial=states, final=states, **ROWS[rows])
    kernels = [{"backend": "triton", "schedule": schedule}]
    assert_layout_does_not_matter(problem, layout, kernels, backward_alone)


# Three programs a row, the first two of two steps, of which one touches no end of the row.
BLOCKS = {"block_t": 32, "group": 16, "search": 2}
LONG = {
    "packed": dict(lengths=(3, 77, 0, 2), tail=19),
    "dense, whole runs": dict(lengths=(80,), tail=0, dense=True),
    "dense, uneven": dict(lengths=(77,), tail=0, dense=True),
}


# Any two of these meet.
@pytest.mark.parametrize(
    ("rows", "width", "dtype", "schedule"),
    combinations((LONG, (4, 3, 8), ("bfloat16", "float16", "float32"), (0, 1))),
)
def test_blocks_of_channel_first_rows(rows, width, dtype, schedule, monkeypatch):
    states = width != 3
    problem = wide(dim=5, width=width, dtype=dtype, initial=states, final=states, **LONG[rows])
    arguments, dout, dfinal = tensors(problem)
    plain = backward_alone(arguments, dout, dfinal, **KERNELS[0])
    arguments["x"], dout = channel_first(arguments["x"].detach()), channel_first(dout)
    with blocks(monkeypatch, **BLOCKS):
        found = backward_alone(arguments, dout, dfinal, **KERNELS[schedule])
    assert_same([found[0], found[3]], [plain[0], plain[3]])
    assert not gradients.judge(problem, map(to_typed, found))


@pytest.mark.parametrize("rows", LONG)
def test_both_schedules_give_the_same_bits_of_channel_first_rows(rows, monkeypatch):
    arguments, dout, dfinal = tensors(wide(dim=5, width=2, **LONG[rows]))
    arguments["x"] = channel_first(arguments["x"].detach())
    with blocks(monkeypatch, **BLOCKS):
        first, second = (backward_alone(arguments, dout, dfinal, **options) for options in KERNELS)
    assert_same(first, second)


class Copies(TorchDispatchMode):
    """Names the operations that write at least `numel` elements which lay elsewhere."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if (
            name in ("clone", "copy_", "_to_copy", "cat", "index", "contiguous")
            and result.numel() >= self.numel
        ):
            self.found.append(name)
        return result


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ["packed", "dense, whole tiles", "dense, uneven"])
def test_dout_is_copied_only_where_it_lies_across_x(rows, layout, monkeypatch):
    """Into x's layout, once; x never is, nor an expanded dout."""
    arguments, dout, dfinal = tensors(wide(**ROWS[rows]))
    of_x, of_dout = (of or (lambda t: t) for of in LAYOUTS[layout])
    a = {name: None if t is None else t.detach() for name, t in arguments.items()}
    a["x"], dout = of_x(a["x"]), of_dout(dout)
    given = []
    monkeypatch.setattr(packed_rows, "launch_on", lambda device, call, *tensors: given.append(tensors))
    with Copies(dout.numel()) as copies:  # (which would not see what a registered operator does)
        functional.run_backward(dout, dfinal, *a.values(), "silu", None, "flat", "triton", True, True)
    walk, _ = given
    assert walk[2].data_ptr() == a["x"].data_ptr()
    if layout in ("x", "dout"):
        assert copies.found == ["copy_"]
        assert walk[0].stride() == torch.empty_like(a["x"]).stride()
        assert torch.equal(walk[0].nan_to_num(), dout.nan_to_num())
    else:
        assert not copies.found
        assert walk[0].data_ptr() == dout.data_ptr()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_expanded_dout_is_never_copied(axis):
    x = channel_first(torch.zeros(2, 40, 8))
    dout = torch.zeros(2, 40, 8)

    def crosses(dout, x):
        return config.crosses(dout.shape, dout.stride(), x.stride())

    assert crosses(dout, x)
    assert not crosses(dout.narrow(axis, 0, 1).expand(2, 40, 8), x)
    assert not crosses(dout, x.contiguous())


def test_the_copy_check_can_fail():
    x = torch.zeros(4, 6).t()
    with Copies(24) as copies:
        x.contiguous()
        x.reshape(24)
        x.t().view(24)
    assert copies.found == ["clone", "clone"]


def test_forward_in_other_layouts():
    """The same bits in a result laid out as x is."""
    arguments, _, _ = tensors(wide(**ROWS["dense, whole tiles"]))
    plain = causal_conv1d(**arguments, activation="silu", **KERNELS[0])
    for layout in (channel_first, channels_of_wider, sequence_first):
        for options in (*KERNELS, {"backend": "eager"}):
            x = layout(arguments["x"].detach())
            out, states = causal_conv1d(**arguments | {"x": x}, activation="silu", **options)
            if layout is not channels_of_wider:
                assert out.stride() == x.stride()
            if options in KERNELS:
                assert torch.equal(out, plain.out)
            assert torch.equal(states, plain.conv_states)


@pytest.mark.parametrize("options", [{"backend": "eager"}, KERNELS[0]], ids=["eager", "triton"])
def test_an_expanded_upstream_gradient(options):
    arguments, dout, _ = tensors(wide(lengths=(9, 2, 4), final=False))
    one = torch.ones(()).expand(dout.shape)
    assert one.stride() == (0, 0)
    assert_same(run(arguments, one, None, **options), run(arguments, torch.ones(dout.shape), None, **options))


def test_strides_of_arguments_do_not_change_a_bit():
    arguments, dout, dfinal = tensors(wide(lengths=(9, 2, 4)))
    plain = backward_alone(arguments, dout, dfinal, **KERNELS[0])
    for name, layout in itertools.product(("x", "initial_states", "weight"), ("transposed", "slice")):
        if (name, layout) != (
            "x",
            "transposed",
        ):  # channel-first, of which the sums come about in another order
            changed = arguments | {name: UPSTREAM[layout](arguments[name].detach()).requires_grad_()}
            assert_same(backward_alone(changed, dout, dfinal, **KERNELS[0]), plain)


@pytest.mark.parametrize("layout", [None, channel_first], ids=["channel-last", "channel-first"])
def test_states_of_rows_without_tokens_reach_nothing_else(layout):
    """Row 1 has no tokens: its state may be anything."""
    arguments, dout, dfinal = tensors(wide(lengths=(9, 0, 4)))
    if layout is not None:
        arguments["x"] = layout(arguments["x"].detach())
    results = []
    for value in (torch.nan, 1.0):
        states = arguments["initial_states"].detach().clone()
        states[1] = value
        results.append(backward_alone(arguments | {"initial_states": states}, dout, dfinal, **KERNELS[0]))
    assert_same(*results)
    assert not results[0][1].isnan().any()


def test_dense_rows_are_packed_rows_of_equal_length():
    problem = wide(lengths=(9, 9, 9), tail=0, dense=True)
    arguments, dout, dfinal = tensors(problem)
    dense = run(arguments, dout, dfinal, **KERNELS[0])
    packed = arguments | {
        "x": arguments["x"].detach().flatten(0, 1).requires_grad_(),
        "query_start_loc": torch.arange(4) * 9,
    }
    other = run(packed, dout.flatten(0, 1), dfinal, **KERNELS[0])
    assert_same([dense[0].flatten(0, 1), *dense[1:]], other)


@pytest.mark.parametrize("options", [{"backend": "eager"}, KERNELS[0]], ids=["eager", "triton"])
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("initial_states",), ("x", "bias")])
def test_only_what_is_asked_for(wanted, options):
    """What is asked for does not change a bit of it; the rest gets no gradient."""
    problem = wide(lengths=(9, 2, 4))
    arguments, dout, dfinal = tensors(problem)
    everything = dict(zip(FLOATS, run(arguments, dout, dfinal, **options), strict=True))
    some = {
        name: a.detach().requires_grad_(name in wanted) if name in FLOATS else a
        for name, a in arguments.items()
    }
    results = causal_conv1d(**some, activation="silu", **options)
    torch.autograd.backward(results, (dout, dfinal))
    for name in FLOATS:
        if name in wanted:
            assert torch.equal(some[name].grad, everything[name])
        else:
            assert some[name].grad is None


@pytest.mark.parametrize("options", [{"backend": "eager"}, KERNELS[0]], ids=["eager", "triton"])
def test_a_loss_of_the_final_states_alone(options):
    problem = wide(lengths=(9, 2, 0))
    arguments, dout, dfinal = tensors(problem)
    states = causal_conv1d(**arguments, activation="silu", **options).conv_states
    dx, dinitial = torch.autograd.grad(states, [arguments["x"], arguments["initial_states"]], dfinal)
    everything = run(arguments, torch.zeros_like(dout), dfinal, **options)
    assert torch.equal(dx, everything[0])
    assert torch.equal(dinitial, everything[3])
    assert torch.equal(dinitial[2], dfinal[2])  # a row of zero tokens


def test_nothing_is_mutated_and_no_result_shares_memory():
    problem = wide(lengths=(9, 0))
    arguments, _, _ = tensors(problem)
    before = {name: a.detach().clone() for name, a in arguments.items()}
    for options in ({"backend": "eager"}, KERNELS[0]):
        _, states = causal_conv1d(**arguments, **options)
        states.detach().fill_(7)
        for name, a in arguments.items():
            assert torch.equal(a.detach().nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize("options", [{"backend": "eager"}, KERNELS[0]], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", ["channel_last", "channel_first", "packed"])
@pytest.mark.parametrize("with_states", [False, True])
def test_results_may_be_changed_in_place(with_states, layout, options):
    """`out += residual` and the like, as of any operation of PyTorch, and gradients go through it."""
    x = torch.randn(2, 5, 3) if layout == "channel_last" else torch.randn(2, 3, 5).mT
    starts = torch.tensor([0, 5, 10]) if layout == "packed" else None
    x = (x.reshape(10, 3) if layout == "packed" else x).requires_grad_()
    weight = torch.randn(3, 4, requires_grad=True)
    initial = torch.randn(2, 3, 3, requires_grad=True) if with_states else None
    leaves = [leaf for leaf in (x, weight, initial) if leaf is not None]

    def gradients_of(change):
        out, states = causal_conv1d(x, weight, None, initial, starts, **options)
        out, states = change(out), change(states)
        return torch.autograd.grad(out.sum() + states.square().sum(), leaves)

    changed = gradients_of(lambda result: result.mul_(3).add_(1))
    for got, want in zip(changed, gradients_of(lambda result: result * 3 + 1), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:Input .* is not a double precision:UserWarning")
@pytest.mark.parametrize(
    ("options", "activation", "fast"),
    [({"backend": "eager"}, None, False), ({"backend": "eager"}, "silu", False), (KERNELS[0], "silu", True)],
    ids=["eager-linear", "eager-silu", "triton"],
)
def test_gradcheck(options, activation, fast):
    """Float32: a step of 1/64 leaves rounding errors of about 2**-24 * 64 and a cubic term of about 64**-2 / 6."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    arguments = draw(6, 2), draw(2, 4), draw(2), draw(3, 3, 2)
    assert torch.autograd.gradcheck(
        lambda *a: tuple(causal_conv1d(*a, starts, activation=activation, **options)),
        arguments, eps=2**-6, atol=5e-4, rtol=1e-3, nondet_tol=0.0, fast_mode=fast,
    )  # fmt: skip


def test_double_backward_is_refused():
    arguments, _, _ = tensors(wide(lengths=(5,), tail=0))
    out = causal_conv1d(**arguments, activation="silu").out
    (dx,) = torch.autograd.grad(out.sum(), arguments["x"], create_graph=True)
    with pytest.raises(triton_impl.Unsupported, match="a first gradient"):
        dx.sum().backward()


def test_torch_func():
    arguments, _, _ = tensors(wide(lengths=(5, 2), tail=0))
    arguments = {name: a.detach() for name, a in arguments.items()}

    def loss(weight):
        return causal_conv1d(**arguments | {"weight": weight}, activation="silu").out.sum()

    weight = arguments["weight"].clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(weight), weight)
    assert torch.equal(torch.func.grad(loss)(arguments["weight"]), want)
    with pytest.raises(triton_impl.Unsupported, match="vmap"):
        torch.func.vmap(loss)(torch.stack([arguments["weight"]] * 2))
    with pytest.raises(triton_impl.Unsupported, match="a first gradient"):
        torch.func.grad(lambda w: torch.func.grad(loss)(w).sum())(arguments["weight"])


def test_checkpoint():
    arguments, dout, dfinal = tensors(wide(lengths=(5, 2)))
    plain = run(arguments, dout, dfinal)
    again = torch.utils.checkpoint.checkpoint(
        lambda *a: tuple(causal_conv1d(*a, activation="silu")), *arguments.values(), use_reentrant=False
    )
    leaves = [arguments[name] for name in FLOATS]
    assert_same(torch.autograd.grad(again, leaves, (dout, dfinal)), plain)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_without_breaks(dynamic):
    arguments, dout, dfinal = tensors(wide(lengths=(5, 2)))

    def loss(x, weight, bias, initial_states, query_start_loc):
        out, states = causal_conv1d(x, weight, bias, initial_states, query_start_loc, activation="silu")
        return (out.nan_to_num() * dout.nan_to_num()).sum() + (states * dfinal).sum()

    leaves = [arguments[name] for name in FLOATS]
    plain = torch.autograd.grad(loss(**arguments), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same(torch.autograd.grad(compiled(**arguments), leaves), plain)


@pytest.mark.parametrize("operator", ["forward", "backward"])
def test_registered_operators(operator):
    arguments, dout, dfinal = tensors(wide(lengths=(5, 2)))
    a = [None if t is None else t.detach().nan_to_num() for t in arguments.values()]
    a += ["silu", None, "auto", "eager"]
    if operator == "backward":
        a = [dout.nan_to_num(), dfinal, *a, True, True]
    torch.library.opcheck(getattr(torch.ops.twinconv, f"causal_conv1d_{operator}").default, tuple(a))


def test_errors_name_the_argument():
    arguments, _, _ = tensors(wide(lengths=(5,)))
    with pytest.raises(ValueError, match="initial_states: expected shape"):
        causal_conv1d(**arguments | {"initial_states": arguments["initial_states"][:, :2]})
    with pytest.raises(ValueError, match="backend: expected one of"):
        causal_conv1d(**arguments, backend="cuda")
    with pytest.raises(TypeError, match=r"weight: expected a torch\.Tensor"):
        causal_conv1d(**arguments | {"weight": np.zeros((8, 4), np.float32)})
    with pytest.raises(ValueError, match="since query_start_loc is None"):
        causal_conv1d(arguments["x"], arguments["weight"])


def test_bad_offsets_do_no_harm():
    """Undefined values, but no fault and nothing written outside."""
    arguments, dout, _ = tensors(wide(lengths=(9, 2, 4), final=False))
    for starts in ([0, 12, 5, 99], [-7, -7, 99, 3], [5, 5, 5, 5]):
        bad = arguments | {"query_start_loc": torch.tensor(starts)}
        for options in ({"backend": "eager"}, *KERNELS):
            run(bad, dout, None, **options)
        bad["x"] = channel_first(bad["x"].detach())
        backward_alone(bad, dout, None, **KERNELS[0])


@pytest.mark.parametrize("places", [1, 7, 33])
def test_workspace_size_depends_on_shapes_alone(places):
    config = backward.backward_config(places * 32 - 32, 64, 0, 4)
    x, weight = torch.zeros(places * 32 - 32, 64), torch.zeros(64, 4)
    found, _, _ = backward.prepare(
        x, None, x, weight, None, None, torch.zeros(1, dtype=torch.int32), True, True, config
    )  # fmt: skip
    assert found == places


# Compiled, on a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gpu_against_the_reference(case, schedule):
    assert_right(gradients.build(case), run, "cuda", schedule=schedule)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "states"), [("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ROWS)
def test_gpu_layouts_of_x_and_dout(rows, layout, dtype, states):
    problem = wide(dim=130, dtype=dtype, initial=states, final=states, **ROWS[rows])
    assert_layout_does_not_matter(problem, layout, KERNELS, run, "cuda")


@pytest.mark.gpu
def test_gpu_same_bits_in_every_run_and_no_synchronisation():
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4 * 2048, 4128, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(4128, 4, device="cuda", generator=generator).bfloat16().requires_grad_()
    bias = torch.zeros(4128, device="cuda").requires_grad_()
    starts = torch.arange(5, device="cuda", dtype=torch.int32) * 2048
    dout = torch.randn(x.shape, device="cuda", generator=generator).bfloat16()

    def gradients_of(schedule):
        out = causal_conv1d(x, weight, bias, None, starts, activation="silu", schedule=schedule).out
        return torch.autograd.grad(out, (x, weight, bias), dout)

    first = gradients_of("flat")
    gradients_of("per_sequence")  # compiled
    with no_synchronisation():
        others = [gradients_of(schedule) for schedule in ["flat", "per_sequence"] * 5]
    for other in others:
        for a, b in zip(other, first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_training_step_in_a_graph():
    x = torch.randn(256, 512, device="cuda").requires_grad_()
    weight = torch.randn(512, 4, device="cuda").requires_grad_()
    starts = torch.tensor([0, 100, 256], device="cuda", dtype=torch.int32)

    def step():
        out = causal_conv1d(x, weight, None, None, starts, activation="silu", schedule="flat").out
        return torch.autograd.grad(out.square().sum(), (x, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        starts.copy_(torch.tensor([0, 17, 200]))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)
