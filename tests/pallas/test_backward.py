"""Gradients of the JAX twin: plain XLA, the Mosaic GPU kernels in Pallas' interpreter and lowered for CUDA, and
JAX's transformations. The core cases, which cover all branches of the kernels, are judged by
test_conformance.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle.conformance.catalogue import backward as case_of
from oracle.numerics import TypedArray
from pallas_impl import Unsupported, backward
from pallas_impl.call import interpreter
from pallas_impl.functional import causal_conv1d
from tests.tools import gradient_cases as gradients

CASES = {name: case for name, case in gradients.CASES.items() if "int64" not in case.dtypes.values()}
FLOATS = ("x", "weight", "bias", "initial_states")


def to_jax(array):
    if array is None:
        return None
    return jnp.asarray(array.data.view(jnp.bfloat16) if array.dtype == "bfloat16" else array.data)


def to_typed(array):
    if array is None:
        return None
    data = np.asarray(array)
    return TypedArray(data.dtype.name, data.view(np.uint16) if data.dtype.name == "bfloat16" else data)


def inputs(problem):
    return {name: to_jax(array) for name, array in problem.arguments.items()}


def run(arguments, dout, dfinal, activation="silu", **options):
    """The gradients in the order of FLOATS; `dfinal` None leaves the final states out of the loss."""

    @jax.jit
    def backward(arguments, dout, dfinal):
        leaves = {name: arguments[name] for name in FLOATS if arguments[name] is not None}

        def forward(leaves):
            result = causal_conv1d(**arguments | leaves, activation=activation, **options)
            return result.out if dfinal is None else tuple(result)

        return jax.vjp(forward, leaves)[1](dout if dfinal is None else (dout, dfinal))[0]

    found = backward(arguments, dout, dfinal)
    return [found.get(name) for name in FLOATS]


def assert_right(problem, **options):
    found = run(
        inputs(problem), to_jax(problem.dout), to_jax(problem.dfinal_states), problem.activation, **options
    )
    assert not gradients.judge(problem, map(to_typed, found))
    return found


def wide(**changes):
    return gradients.build(case_of("wide", **{"lengths": (5, 0, 9), "tail": 2} | changes))


# What the conformance suite leaves to compiled code.
FULL = {name: case for name, case in CASES.items() if case.tier == "full"}


@pytest.mark.parametrize("case", FULL.values(), ids=FULL)
def test_xla_against_the_reference(case):
    assert_right(gradients.build(case), backend="xla")


def test_both_schedules_give_the_same_bits():
    """With max_seqlen too small, so that programs walk on."""
    problem = wide(lengths=(40, 3, 0, 33), tail=5)
    flat, per_sequence = (
        assert_right(problem, backend="mosaic_gpu_interpret", schedule=schedule, max_seqlen=20)
        for schedule in ("flat", "per_sequence")
    )
    for name, a, b in zip(FLOATS, flat, per_sequence, strict=True):
        assert np.array_equal(a, b), name


def lower(width, dtype, schedule, states=True):
    batch, tokens, dim = 5, 4096, 1032
    kind = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    state = kind((batch, width - 1, dim))

    def gradient(x, weight, bias, initial, starts, dout, dfinal):
        def forward(x, weight, bias, initial):
            result = causal_conv1d(
                x, weight, bias, initial, starts,
                activation="silu", schedule=schedule, backend="mosaic_gpu", max_seqlen=1000,
            )  # fmt: skip
            return tuple(result) if states else result.out

        return jax.vjp(forward, x, weight, bias, initial)[1]((dout, dfinal) if states else dout)

    arguments = (
        kind((tokens, dim)), kind((dim, width)), kind((dim,)), state if states else None,
        jax.ShapeDtypeStruct((batch + 1,), jnp.int32), kind((tokens, dim)), state,
    )  # fmt: skip
    return jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("width", "dtype", "schedule", "states"),
    [(4, "bfloat16", "flat", True), (8, "float32", "per_sequence", True), (1, "float16", "flat", True),
     (2, "bfloat16", "auto", False)],
)  # fmt: skip
def test_lowers_for_cuda(width, dtype, schedule, states):
    """Two kernels for the gradients: the forward pass is not needed for them, so XLA drops it."""
    text = lower(width, dtype, schedule, states)
    assert "causal_conv1d_backward" in text
    assert "causal_conv1d_backward_sums" in text


def test_sum_of_the_workspace_in_its_order():
    """Every place is added once, in order: float32 additions one after another give these very bits."""
    sums = np.random.default_rng(0).standard_normal((19, 3, 256)).astype(np.float32)
    want = np.zeros((3, 256), np.float32)
    for place in sums:
        want += place
    assert np.array_equal(backward.add_places(jnp.asarray(sums), interpreter(True)), want)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", ["float32"])
def test_check_grads_of_xla(activation, dtype):
    """Float32: a step of 1/64 leaves rounding errors of about 2**-24 * 64 and a cubic term of about 64**-2 / 6."""
    from jax.test_util import check_grads

    rng = np.random.default_rng(0)
    arguments = [
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((6, 2), (2, 4), (2,), (3, 3, 2))
    ]
    starts = jnp.array([0, 2, 2, 5], jnp.int32)
    function = jax.jit(lambda *a: tuple(causal_conv1d(*a, starts, activation=activation, backend="xla")))
    check_grads(function, arguments, order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=2**-6)


def test_grad_of_a_loss_in_xla_under_jit_and_checkpoint():
    problem = wide()
    arguments = inputs(problem)

    def loss(weight, remat=False):
        function = functools.partial(causal_conv1d, activation="silu", backend="xla")
        function = jax.checkpoint(function) if remat else function
        values = arguments | {"weight": weight}
        out, states = function(*values.values())
        return jnp.nansum(out**2) + states.sum()

    plain = jax.grad(loss)(arguments["weight"])
    assert np.allclose(jax.jit(jax.grad(loss))(arguments["weight"]), plain, rtol=1e-5)
    assert np.allclose(jax.grad(functools.partial(loss, remat=True))(arguments["weight"]), plain, rtol=1e-5)


def test_a_loss_of_the_final_states_alone_in_xla():
    problem = wide()
    arguments = inputs(problem)
    dfinal = to_jax(problem.dfinal_states)

    def states(x, initial):
        return causal_conv1d(**arguments | {"x": x, "initial_states": initial}, backend="xla").conv_states

    dx, dinitial = jax.vjp(states, arguments["x"], arguments["initial_states"])[1](dfinal)
    assert np.array_equal(dinitial[1], dfinal[1])  # a row of zero tokens
    assert np.array_equal(dx[2:5], dfinal[0])
    assert not np.any(dx[:2])


@pytest.mark.parametrize("dense", [True, False])
def test_vmap_of_xla_is_a_loop(dense):
    changes = dict(lengths=(4, 4), tail=0, dense=True) if dense else dict(lengths=(5, 2), tail=1)
    problems = [wide(**changes, data=data) for data in ("random", "positions", "small_sums")]
    arguments = [inputs(problem) for problem in problems]
    shared = {name: arguments[0][name] for name in ("weight", "bias", "initial_states", "query_start_loc")}

    def loss(x):
        out, states = causal_conv1d(x, *shared.values(), activation="silu", backend="xla")
        return jnp.nansum(out**2) + jnp.nansum(states)

    gradient = jax.jit(jax.grad(loss))
    xs = jnp.stack([jnp.nan_to_num(a["x"]) for a in arguments])
    assert np.allclose(
        jax.jit(jax.vmap(gradient))(xs), jnp.stack([gradient(x) for x in xs]), rtol=1e-5, atol=1e-6
    )
    per_example = jax.vmap(
        jax.grad(lambda w, x: jnp.nansum(causal_conv1d(x, w, *list(shared.values())[1:], backend="xla").out)),
        (None, 0),
    )
    assert jax.jit(per_example)(shared["weight"], xs).shape == (3, *shared["weight"].shape)


def test_vmap_of_a_kernel_is_refused():
    arguments = inputs(wide(lengths=(4,), tail=0, dense=True))

    def kernel(x):
        return causal_conv1d(x, arguments["weight"], backend="mosaic_gpu_interpret").out

    with pytest.raises(Unsupported, match=r"jax\.vmap"):
        jax.vmap(kernel)(jnp.stack([arguments["x"]] * 2))


def lowered_kernel(transform):
    """A transformed loss of the compiled kernels, lowered for CUDA; its argument is (weight, x)."""

    def loss(arguments):
        weight, x = arguments
        return causal_conv1d(x, weight, activation="silu", backend="mosaic_gpu").out.sum()

    arguments = jnp.ones((256, 4)), jnp.ones((1, 64, 256))
    return jax.jit(transform(loss)).trace(arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "transform",
    [
        lambda loss: jax.grad(jax.checkpoint(loss)),
        lambda loss: jax.grad(
            lambda a: jax.lax.scan(lambda total, _: (total + loss(a), None), 0.0, None, length=3)[0]
        ),
    ],
    ids=["checkpoint", "scan"],
)
def test_kernels_under_transformations(transform):
    assert "causal_conv1d_backward" in lowered_kernel(transform)


def test_a_gradient_of_a_kernels_gradient_is_refused():
    with pytest.raises(Unsupported, match="no derivative"):
        lowered_kernel(lambda loss: jax.grad(lambda a: jax.grad(loss)(a)[0].sum()))


def test_forward_mode_is_refused_by_jax():
    arguments = inputs(wide(tail=0))

    def loss(weight):
        return causal_conv1d(**arguments | {"weight": weight}, activation="silu", backend="xla").out.sum()

    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(loss, (arguments["weight"],), (arguments["weight"],))


def test_errors_name_the_argument():
    arguments = inputs(wide())
    with pytest.raises(ValueError, match="initial_states: expected shape"):
        causal_conv1d(**arguments | {"initial_states": arguments["initial_states"][:, :2]})
    with pytest.raises(ValueError, match="backend: expected one of"):
        causal_conv1d(**arguments, backend="cuda")
    with pytest.raises(Unsupported, match="needs an NVIDIA GPU"):
        causal_conv1d(**arguments, backend="mosaic_gpu")
    with pytest.raises(ValueError, match="since query_start_loc is None"):
        causal_conv1d(arguments["x"], arguments["weight"])


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gpu_against_the_reference(case, schedule):
    assert_right(gradients.build(case), backend="mosaic_gpu", schedule=schedule)


@pytest.mark.gpu
def test_gpu_same_bits_in_every_run():
    keys = iter(jax.random.split(jax.random.key(0), 4))
    dim = 4128
    arguments = dict(
        x=jax.random.normal(next(keys), (4 * 2048, dim), jnp.bfloat16),
        weight=jax.random.normal(next(keys), (dim, 4), jnp.bfloat16),
        bias=jnp.zeros((dim,), jnp.float32),
        initial_states=None,
        query_start_loc=jnp.arange(5, dtype=jnp.int32) * 2048,
    )
    dout = jax.random.normal(next(keys), (4 * 2048, dim), jnp.bfloat16)
    first = run(arguments, dout, None, backend="mosaic_gpu", schedule="flat")
    for schedule in ["flat", "per_sequence"] * 5:
        again = run(arguments, dout, None, backend="mosaic_gpu", schedule=schedule)
        for a, b in zip(again[:3], first[:3], strict=True):
            assert np.array_equal(a, b)
