"""Gradients of context parallel training in JAX: tokens split over virtual CPU devices, against one device's."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import pallas_impl
from oracle.numerics import TypedArray
from pallas_impl import context_parallel
from pallas_impl.context_parallel import causal_conv1d
from tests.tools.context_parallel_cases import build, cases, judge
from tests.tools.kernel_results import written_into_kernels
from tests.tools.signatures import parameters

if os.environ.get("JAX_PLATFORMS") == "cpu":  # not with --gpu, where other files may have started JAX
    jax.config.update("jax_num_cpu_devices", 8)

CASES = {case.name: case for case in cases(4)}
NEEDED = ("x", "weight", "bias")


def make_mesh(devices):
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:devices]), ("t",), axis_types=(AxisType.Auto,))


def to_jax(array):
    if array is None:
        return None
    return jnp.asarray(array.data.view(jnp.bfloat16) if array.dtype == "bfloat16" else array.data)


def to_typed(array):
    data = np.asarray(array)
    return TypedArray(data.dtype.name, data.view(np.uint16) if data.dtype.name == "bfloat16" else data)


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def arrays(case, dim=8):
    arguments, dout = build(case, dim)
    return {name: to_jax(array) for name, array in arguments.items()}, to_jax(dout)


def split_gradients(arguments, dout, mesh, **options):
    """(out, {name: gradient}) with `jax.vjp` inside shard_map; sums of weight and bias are those of every device."""
    present = {name: arguments[name] for name in NEEDED if arguments[name] is not None}
    parts = {name: P("t") if name == "x" else P() for name in present}

    def run(leaves, starts, dout):
        def forward(leaves):
            return causal_conv1d(**{"bias": None, **leaves}, query_start_loc=starts, axis_name="t", **options)

        out, pull = jax.vjp(forward, leaves)
        (found,) = pull(dout)
        return out, {name: g if name == "x" else g[None] for name, g in found.items()}

    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(parts, P(), P("t")), out_specs=(P("t"), P("t")), check_vma=False
    )
    return jax.jit(mapped)(present, arguments["query_start_loc"], dout)


def whole_gradients(arguments, dout, **options):
    @jax.jit
    def run(leaves, starts, dout):
        def forward(leaves):
            return pallas_impl.causal_conv1d(
                **{"bias": None, **leaves}, query_start_loc=starts, **options
            ).out

        out, pull = jax.vjp(forward, leaves)
        return out, pull(dout)[0]

    present = {name: arguments[name] for name in NEEDED if arguments[name] is not None}
    return run(present, arguments["query_start_loc"], dout)


def wrong_with(case, devices=4, **options):
    """What is wrong with the gradients of a case over the devices, as a list."""
    arguments, dout = arrays(case)
    options = dict(activation=case.activation, max_seqlen=max(case.lengths, default=0)) | options
    wanted, whole = whole_gradients(arguments, dout, **options)
    out, found = split_gradients(arguments, dout, make_mesh(devices), sum_weight_gradients=True, **options)
    wrong = [] if same_bits(out, wanted) else ["out"]
    # Where products are exact there is one way to round, however the compiler fuses.
    exact = case.activation is None and case.dtypes[0] == "bfloat16"
    if (exact or options.get("backend") == "mosaic_gpu_interpret") and not same_bits(found["x"], whole["x"]):
        wrong.append("bits of dx")
    for name in found:
        if name != "x":
            wrong += [
                f"{name} of device {i}"
                for i in range(devices)
                if not same_bits(found[name][i], found[name][0])
            ]
            found[name] = found[name][0]
    return wrong + judge(case, *build(case), {name: to_typed(array) for name, array in found.items()})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_of_one_device(case):
    assert wrong_with(case, backend="xla") == []


def test_kernels_in_the_interpreter():
    """On one device: the interpreter's callbacks on several wait for each other."""
    assert wrong_with(CASES["short parts bf16"], devices=1, backend="mosaic_gpu_interpret") == []


def test_parts_are_summed_by_whoever_differentiates_outside():
    """`jax.grad` of a shard_map adds up the parts; in float32 nothing was rounded before."""
    case = CASES["packed"]
    arguments, dout = arrays(case)
    mesh = make_mesh(4)

    def loss(weight, bias):
        split = jax.shard_map(
            functools.partial(causal_conv1d, axis_name="t", activation="silu"),
            mesh=mesh, in_specs=(P("t"), P(), P(), P()), out_specs=P("t"), check_vma=False,
        )  # fmt: skip
        return (split(arguments["x"], weight, bias, arguments["query_start_loc"]) * dout).sum()

    dweight, dbias = jax.jit(jax.grad(loss, (0, 1)))(arguments["weight"], arguments["bias"])
    _, parts = split_gradients(arguments, dout, mesh, activation="silu")
    found = {"x": parts["x"], "weight": dweight, "bias": dbias}
    assert judge(case, *build(case), {name: to_typed(array) for name, array in found.items()}) == []
    _, summed = split_gradients(arguments, dout, mesh, activation="silu", sum_weight_gradients=True)
    for name in ("weight", "bias"):
        total, *rest = np.asarray(parts[name])
        for part in rest:
            total = total + part
        assert same_bits(total, summed[name][0])


def only_the_next(real, x, history, axis, after=False):
    found = real(x, history, axis, after)
    return found.at[len(x) :].set(0) if after else found


def rounded_twice(real, options, dout, x, weight, bias, offsets, halo, after, begin):
    """Finished gradients added: of this device's outputs, and of the later ones', each rounded."""
    no_upstream = after.at[:, x.shape[1] :].set(0)
    alone = real(options, dout, x, weight, bias, offsets, halo, no_upstream, begin)
    dout = dout.at[-len(alone) :].set(0)
    return alone + real(options, dout, x, weight, bias, offsets, halo, after, begin)


def in_own_order(real, part, axis):
    parts = jnp.roll(jax.lax.all_gather(part, axis), jax.lax.axis_index(axis), axis=0)
    return functools.reduce(jnp.add, list(parts))


MUTANTS = {
    "only the next device sends": ("short parts", context_parallel, "_halo", only_the_next, "x: "),
    "nothing comes from later devices": (
        "packed", context_parallel, "_halo",
        lambda real, x, history, axis, after=False: real(x, history, axis, after) * (not after), "x: ",
    ),
    "finished gradients are added, rounded twice": (
        "short parts bf16", context_parallel, "_last_dx", rounded_twice, "bits of dx",
    ),
    "the row before the cut is seen": (
        "short rows", context_parallel, "_windows",
        lambda real, halo, offsets, begin: jnp.broadcast_to(halo, (len(offsets) - 1, *halo.shape)), "out",
    ),
    "every device sums in an order of its own": (
        "long", context_parallel, "_sum_over_devices", in_own_order, "weight of device",
    ),
    "parts are rounded before they are added": (
        "long", context_parallel, "_sum_over_devices",
        lambda real, part, axis: real(part.astype(jnp.bfloat16).astype(part.dtype), axis), "weight: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_backward_is_seen(name, monkeypatch):
    case, module, function, damage, seen = MUTANTS[name]
    monkeypatch.setattr(module, function, functools.partial(damage, getattr(module, function)))
    wrong = wrong_with(CASES[case], backend="xla")
    assert any(line.startswith(seen) for line in wrong), wrong


def test_check_grads():
    """Against finite differences over two devices; a step of 1/64 as for one device."""
    from jax.test_util import check_grads

    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 2), (2, 5), (2,))]
    function = jax.shard_map(
        functools.partial(causal_conv1d, axis_name="t", activation="silu"),
        mesh=make_mesh(2), in_specs=(P("t"), P(), P(), P()), out_specs=P("t"), check_vma=False,
    )  # fmt: skip
    starts = jnp.array([0, 4, 6], jnp.int32)
    function = jax.jit(functools.partial(lambda f, *a: f(*a, starts), function))
    check_grads(function, inputs, order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=2**-6)


def test_kernels_lower_for_cuda():
    """A mesh of two GPUs that this machine does not have: a part, its first and its last tokens; one neighbour."""
    mesh = AbstractMesh((2,), ("t",), axis_types=(AxisType.Auto,))

    def run(x, weight, bias, starts, dout):
        forward = functools.partial(
            causal_conv1d, query_start_loc=starts, axis_name="t", backend="mosaic_gpu"
        )
        out, pull = jax.vjp(functools.partial(forward, activation="silu"), x, weight, bias)
        return out, *pull(dout)

    specs = P("t"), P(), P(), P(), P("t")
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=specs, out_specs=(P("t"), P("t"), P(), P()), check_vma=False
    )
    kinds = [((64, 512), "bfloat16"), ((512, 4), "bfloat16"), ((512,), "bfloat16"), ((6,), "int32")]
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip([*kinds, kinds[0]], specs, strict=True)
    ]
    lowered = jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    sent = re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", text)
    assert sent == ["collective_permute"] * 2
    assert text.count("causal_conv1d_backward") >= 2
    assert written_into_kernels(lowered) == []


@pytest.mark.parametrize(
    ("shape", "count"), [((7, 128), 3), ((5, 65), 2), ((4, 3), 2), ((3, 130), 1)], ids=str
)
def test_rows_written_over(shape, count):
    """The kernel that writes rows into another kernel's result, at either end; few channels take another way."""
    whole = jnp.arange(np.prod(shape), dtype=jnp.bfloat16).reshape(shape)
    rows = -1 - jnp.arange(count * shape[1], dtype=jnp.bfloat16).reshape(count, -1)
    for first in (0, shape[0] - count):
        wanted = whole.at[first : first + count].set(rows)
        for backend in ("mosaic_gpu_interpret", "xla"):
            got = context_parallel.overwrite(whole, rows, first, backend)
            np.testing.assert_array_equal(got, wanted)


def test_inside_shard_map_as_it_comes():
    """JAX itself sums the gradients of weight; asking for a second sum is refused."""
    case = CASES["packed"]
    arguments, dout = arrays(case)
    starts = arguments["query_start_loc"]

    def split(**options):
        run = lambda x, weight: causal_conv1d(x, weight, None, starts, axis_name="t", **options)  # noqa: E731
        return jax.jit(jax.shard_map(run, mesh=make_mesh(4), in_specs=(P("t"), P()), out_specs=P("t")))

    plain = lambda x, weight: pallas_impl.causal_conv1d(x, weight, query_start_loc=starts).out  # noqa: E731
    found, wanted = (
        jax.vjp(function, arguments["x"], arguments["weight"])[1](dout) for function in (split(), plain)
    )
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(pallas_impl.Unsupported, match="sum_weight_gradients: expected False"):
        split(sum_weight_gradients=True)(arguments["x"], arguments["weight"])


def test_bad_arguments():
    x, weight, starts = jnp.ones((6, 2)), jnp.ones((2, 4)), jnp.array([0, 6])
    run = functools.partial(causal_conv1d, axis_name="t")
    with pytest.raises(ValueError, match=r"query_start_loc: expected offsets .* got None"):
        run(x, weight, None, None)
    with pytest.raises(ValueError, match="width 1 to 8"):
        run(x, jnp.ones((2, 9)), None, starts)
    with pytest.raises(ValueError, match="backend"):
        run(x, weight, None, starts, backend="triton")
    with pytest.raises(TypeError, match="x: expected"):
        run(x.astype(jnp.int32), weight, None, starts)


def test_the_signature_adds_the_axis_and_has_no_states():
    plain = parameters(pallas_impl.causal_conv1d)
    split = parameters(causal_conv1d)
    assert split.keys() - plain.keys() == {"axis_name", "sum_weight_gradients"}
    assert plain.keys() - split.keys() == {"initial_states"}
    for name in plain.keys() & split.keys() - {"bias", "query_start_loc"}:
        assert split[name] == plain[name]
