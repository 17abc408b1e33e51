"""Arrays that are split over a mesh, given to the operations as they are: types follow the arguments, nothing is gathered."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_impl
from oracle.contract import Unsupported
from pallas_impl import backward, call, parts, plain
from tests.tools.kernel_results import written_into_kernels

if os.environ.get("JAX_PLATFORMS") == "cpu":  # not with --gpu, where other files may have started JAX
    jax.config.update("jax_num_cpu_devices", 2)

INTERPRETER = "mosaic_gpu_interpret", 1  # on several devices its callbacks wait for each other
WRAPS = {"outside jit": lambda f: f, "inside jit": jax.jit}
KINDS = [AxisType.Explicit, AxisType.Auto]
COLLECTIVE = re.compile(
    r"(all-gather|all-to-all|collective-permute|all_gather|all_to_all|collective_permute)"
)
BATCH, SEQLEN, DIM, WIDTH = 2, 5, 8, 3


def mesh_of(devices, kind):
    return jax.make_mesh((devices,), ("d",), axis_types=(kind,), devices=jax.devices("cpu")[:devices])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def index(*values):
    return jnp.asarray(values, jnp.int32)


def put(mesh, specs, arrays):
    return {name: jax.device_put(a, NamedSharding(mesh, specs.get(name, P()))) for name, a in arrays.items()}


def widened(arrays):
    """The arrays with 64 times as many channels."""
    return {
        n: jnp.repeat(a, 64, 0 if n in ("weight", "bias") else -1)
        if a.shape[-1] == DIM or n == "weight"
        else a
        for n, a in arrays.items()
    }


def training(**options):
    return functools.partial(pallas_impl.causal_conv1d, activation="silu", **options)


X, WEIGHT, BIAS = normal(0, BATCH, SEQLEN, DIM), normal(1, DIM, WIDTH), normal(2, DIM)
DENSE = dict(x=X, weight=WEIGHT, bias=BIAS, initial_states=normal(3, BATCH, WIDTH - 1, DIM))
PACKED = dict(
    x=normal(4, 10, DIM), weight=WEIGHT, bias=BIAS, conv_states=normal(5, 4, WIDTH, DIM), query_start_loc=index(0, 3, 8),
    cache_indices=index(2, 0), has_initial_state=jnp.array([True, False]),
)  # fmt: skip
STEP = dict(x=normal(6, BATCH, DIM), weight=WEIGHT, bias=BIAS, conv_states=normal(7, BATCH, WIDTH, DIM))
COMMIT = dict(
    conv_states=STEP["conv_states"], window_out=normal(8, 2, 3, WIDTH - 1, DIM), accepted_steps=index(0, 2)
)
CHANNELS = dict(
    weight=P("d"), bias=P("d"), conv_states=P(None, None, "d"), window_out=P(None, None, None, "d"),
    initial_states=P(None, None, "d"),
)  # fmt: skip
DENSE_CHANNELS, PACKED_CHANNELS = CHANNELS | dict(x=P(None, None, "d")), CHANNELS | dict(x=P(None, "d"))
ROWS = dict(x=P("d"), initial_states=P("d"), conv_states=P("d"))
MODEL = dict(x=X, weight=WEIGHT, bias=BIAS, cache=DENSE["initial_states"])
DOCUMENTS = dict(segment_ids=index([3, 3, 4, 3, 3], [1, 1, 1, 1, 2]))
CALLS = {
    "training, model": (functools.partial(functools.partial, pallas_impl.short_conv), MODEL | DOCUMENTS,
                        dict(x=P("d"), cache=P("d"), segment_ids=P("d"))),
    "training, channels of a model": (functools.partial(functools.partial, pallas_impl.short_conv, activation="silu"), MODEL,
                                      CHANNELS | dict(x=P(None, None, "d"), cache=P(None, None, "d"))),
    "training, rows": (training, DENSE, ROWS),
    "training, channels": (training, DENSE, DENSE_CHANNELS),
    "training, channels of x alone": (training, DENSE, dict(x=P(None, None, "d"))),
    "packed, channels": (functools.partial(functools.partial, pallas_impl.causal_conv1d_fn), PACKED, PACKED_CHANNELS),
    "update, rows": (functools.partial(functools.partial, pallas_impl.causal_conv1d_update), STEP, ROWS),
    "update, channels": (functools.partial(functools.partial, pallas_impl.causal_conv1d_update), STEP, PACKED_CHANNELS),
    "commit, channels": (functools.partial(functools.partial, pallas_impl.commit_windows), COMMIT, CHANNELS),
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("kind", KINDS, ids=["explicit", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_split_as_the_arguments_are(name, kind, wrap):
    check_split(name, kind, wrap, "xla", 2)


def check_split(name, kind, wrap, backend, devices):
    make, arrays, specs = CALLS[name]
    run = make(backend=backend)
    wanted = run(**arrays)
    placed = put(mesh_of(devices, kind), specs, arrays)
    got = wrap(run)(**placed)
    for found, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
        if devices > 1 and (kind is AxisType.Explicit or wrap is not jax.jit):
            sizes = sorted(
                n // m for n, m in zip(found.shape, found.sharding.shard_shape(found.shape), strict=True)
            )
            assert sizes == [1] * (found.ndim - 1) + [2]


@pytest.mark.parametrize("name", CALLS)
def test_kernels_on_explicit_axes(name):
    check_split(name, AxisType.Explicit, jax.jit, *INTERPRETER)


@pytest.mark.parametrize(
    ("name", "backend", "devices", "wrap"),
    [
        ("training, rows", "xla", 2, "outside jit"),
        ("training, rows", "xla", 2, "inside jit"),
        ("training, channels", "xla", 2, "inside jit"),
        ("training, channels of x alone", "xla", 2, "inside jit"),
        ("training, rows", *INTERPRETER, "inside jit"),
    ],
)
def test_gradients_on_explicit_axes(name, backend, devices, wrap):
    make, arrays, specs = CALLS[name]
    specs = specs | dict(weight=P("d"), bias=P("d")) if "channels" in name else specs

    def loss(arrays):
        out, states = make(backend=backend)(**arrays)
        return (out**2).sum() + (states**2).sum()

    wanted = jax.grad(loss)(arrays)
    mesh = mesh_of(devices, AxisType.Explicit)
    placed = put(mesh, specs, arrays)
    with jax.set_mesh(mesh):  # plain jax.numpy wants it too for a gradient outside jit
        gradients = WRAPS[wrap](jax.grad(loss))(placed)
    for name, found in gradients.items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-4)
        assert jax.typeof(found).sharding.spec == jax.typeof(placed[name]).sharding.spec


@pytest.mark.parametrize("name", ["training, channels", "update, channels"])
def test_gradients_inside_a_partial_shard_map_on_xla(name):
    """Explicit axes that an outer `jax.shard_map` leaves to the types."""
    make, arrays, specs = CALLS[name]
    run = make(backend="xla")
    mesh = jax.make_mesh(
        (1, 2), ("rows", "d"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices("cpu")[:2]
    )
    of_rows = {n: P() if n in ("weight", "bias") else P("rows") for n in arrays}
    both = {n: specs[n] if of_rows[n] == P() else P("rows", *specs[n][1:]) for n in arrays}

    def loss(run, arrays):
        return sum((result**2).sum() for result in run(arrays))

    wanted = jax.grad(functools.partial(loss, lambda arrays: run(**arrays)))(arrays)
    with jax.set_mesh(mesh):
        part = jax.shard_map(
            lambda arrays: tuple(run(**arrays)), in_specs=(of_rows,), out_specs=P("rows"), axis_names={"rows"}
        )
        found = jax.jit(jax.grad(functools.partial(loss, part)))(put(mesh, both, arrays))
    for n, gradient in found.items():
        np.testing.assert_allclose(gradient, wanted[n], rtol=1e-4, atol=1e-4)


def test_what_depends_on_each_other_is_refused():
    mesh = mesh_of(2, AxisType.Explicit)
    four = STEP | dict(conv_states=PACKED["conv_states"])  # row 1 has slot 1, which is on the first device
    refused = [
        (
            pallas_impl.causal_conv1d,
            DENSE | dict(x=DENSE["x"][:, :4]),
            dict(x=P(None, "d")),
            "x: expected axis 1 whole",
        ),
        (pallas_impl.causal_conv1d_fn, PACKED, dict(x=P("d")), "x: expected axis 0 whole .* split over 'd'"),
        (
            pallas_impl.causal_conv1d_fn,
            PACKED,
            dict(cache_indices=P("d")),
            "cache_indices: expected axis 0 whole",
        ),
        (pallas_impl.causal_conv1d_update, four, ROWS, "x: expected axis 0 whole"),
        (
            pallas_impl.causal_conv1d,
            DENSE,
            dict(x=P("d"), weight=P("d")),
            "weight: expected channels split over other",
        ),
        (pallas_impl.commit_windows, COMMIT, dict(conv_states=P("d")), "conv_states: expected axis 0 whole"),
    ]
    for run, arrays, specs, message in refused:
        placed = put(mesh, specs, arrays)
        for wrap in WRAPS.values():
            with pytest.raises(Unsupported, match=message):
                wrap(run)(**placed)
    halves = functools.partial(pallas_impl.causal_conv1d_update, split_sizes=(4, 4))
    with pytest.raises(Unsupported, match="x: expected axis 1 whole"):
        halves(**put(mesh, PACKED_CHANNELS, STEP))


@pytest.mark.parametrize("name", CALLS)
def test_kernels_lower_for_two_gpus(name):
    """Explicit axes: one kernel a device (and the second of a prefill), on its own part."""
    make, arrays, specs = CALLS[name]
    mesh = AbstractMesh((2,), ("d",), axis_types=(AxisType.Explicit,))
    shapes = {
        n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, specs.get(n, P())))
        for n, a in widened(arrays).items()
    }
    lowered = jax.jit(make(backend="mosaic_gpu")).trace(**shapes).lower(lowering_platforms=("cuda",))
    assert "custom_call @mosaic_gpu" in lowered.as_text()
    assert not COLLECTIVE.search(lowered.as_text())
    assert written_into_kernels(lowered) == []


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_gathered(name):
    make, arrays, specs = CALLS[name]
    placed = put(mesh_of(2, AxisType.Explicit), specs, arrays)
    assert not COLLECTIVE.search(jax.jit(make(backend="xla")).lower(**placed).compile().as_text())


TRAINED = [name for name in CALLS if name.startswith("training") and name != "training, channels of x alone"]
AUTO = [*TRAINED, "packed, channels", "update, rows", "update, channels"]


@pytest.fixture
def plain_kernels(monkeypatch):
    """Plain array code in the place of the kernels: the interpreter's callbacks on several devices wait for each other."""

    def of_documents(marks, silu, x, weight, bias, windows, batch):
        rows = x.reshape(batch, -1, x.shape[-1])
        begins = marks[:, :, None] >> (23 - jnp.arange(8)) & 1
        documents = jnp.cumsum(begins.reshape(batch, -1)[:, : rows.shape[1]], axis=1)
        return plain.dense(silu, rows, weight, bias, windows, documents)[0].reshape(x.shape)

    def run(arrays, options):
        if arrays.document_marks is not None:
            batch, pool = arrays.x.shape[0] // options.seqlen, arrays.conv_states
            given = arrays.x, arrays.weight, arrays.bias, pool, batch
            return of_documents(arrays.document_marks, options.silu, *given), pool, None
        if arrays.query_start_loc is None:
            starts = plain.equal_rows(arrays.x.shape[0] // options.seqlen, arrays.x.shape[0])
            arrays = arrays._replace(query_start_loc=starts)
        return plain.run(arrays, options)

    def differentiate(options, inputs, upstream, document_marks=None, **more):
        if document_marks is not None:
            given, batch = (document_marks, options[0] is not None), inputs[0].shape[0] // options[1]
            forward = lambda *floats: of_documents(*given, *floats, batch)  # noqa: E731
            return *jax.vjp(forward, *inputs[:4])[1](upstream[0]), None
        return real((*options[:-1], "xla"), inputs, upstream, **more)

    real = backward.differentiate
    monkeypatch.setattr(call, "_launch_prefill", run)
    monkeypatch.setattr(call, "_launch_update", run)
    monkeypatch.setattr(backward, "differentiate", differentiate)
    monkeypatch.setattr(parts, "PARTITIONED", ("mosaic_gpu", "mosaic_gpu_interpret"))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", AUTO)
def test_the_compiler_splits_kernels_on_auto_axes(name, plain_kernels):
    make, arrays, specs = CALLS[name]
    placed = put(mesh_of(2, AxisType.Auto), specs, arrays)
    run = jax.jit(make(backend="mosaic_gpu_interpret"))
    wanted = make(backend="xla")(**arrays)
    assert "CustomSPMDPartitioning" in run.lower(**placed).as_text()
    assert not COLLECTIVE.search(run.lower(**placed).compile().as_text())
    for found, want in zip(jax.tree.leaves(run(**placed)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
        assert not found.sharding.is_fully_replicated


def gradients_of(run):
    """Of the sum of squares, in all arrays of floats by name."""

    def total(floats, others):
        return sum((a**2).sum() for a in run(**floats, **others))

    def gradients(arrays):
        floats = {name: a for name, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        return jax.grad(total)(floats, {name: a for name, a in arrays.items() if name not in floats})

    return gradients


def test_a_model_on_explicit_axes():
    """Channels of x and weight are split, those of the bias are not: no type stands in the way. Split tokens are refused."""
    mesh, arrays = mesh_of(2, AxisType.Explicit), MODEL | dict(cache=None)
    specs = dict(x=P(None, None, "d"), weight=P("d"))
    placed = put(mesh, specs, {name: a for name, a in arrays.items() if a is not None})
    gradients = jax.jit(gradients_of(functools.partial(pallas_impl.short_conv, backend="xla")))
    wanted = gradients_of(functools.partial(pallas_impl.short_conv, backend="xla"))(
        MODEL | dict(cache=0 * MODEL["cache"])
    )
    with jax.set_mesh(mesh):
        for name, found in gradients(placed).items():
            np.testing.assert_allclose(found, wanted[name], rtol=1e-5, atol=1e-5)
    tokens = jax.ShapeDtypeStruct((2, 6, DIM), jnp.float32, sharding=NamedSharding(mesh, P(None, "d")))
    with pytest.raises(Unsupported, match="axes: expected"):
        jax.eval_shape(lambda x: pallas_impl.short_conv(x, WEIGHT, backend="mosaic_gpu"), tokens)


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_on_auto_axes(name, plain_kernels):
    make, arrays, specs = CALLS[name]
    wanted = gradients_of(make(backend="xla"))(arrays)
    placed = put(mesh_of(2, AxisType.Auto), specs, arrays)
    run = jax.jit(gradients_of(make(backend="mosaic_gpu_interpret")))
    assert not COLLECTIVE.search(run.lower(placed).compile().as_text())
    for name, found in run(placed).items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-4)


def test_the_compiler_gathers_nothing_for_a_kernel(plain_kernels):
    mesh = mesh_of(2, AxisType.Auto)
    refused = [
        (
            training,
            DENSE | dict(x=DENSE["x"][:, :4]),
            dict(x=P(None, "d")),
            "x: expected axis 1 whole .* over 'd'",
        ),
        (CALLS["packed, channels"][0], PACKED, dict(x=P("d")), "x: expected axis 0 whole"),
    ]
    for make, arrays, specs, message in refused:
        with pytest.raises(
            Exception, match=f"Unsupported: {message}"
        ):  # by way of XLA, which raises its own class
            jax.jit(make(backend="mosaic_gpu_interpret")).lower(**put(mesh, specs, arrays)).compile()


# On GPUs: a mesh of one, or of two where there are two.


def on_gpus(name, kind):
    """(a call of `CALLS` on the kernels, its arrays with enough channels, the same split over at most two GPUs)."""
    make, arrays, specs = CALLS[name]
    arrays = widened(arrays)
    devices = jax.devices("gpu")[:2]
    mesh = jax.make_mesh((len(devices),), ("d",), axis_types=(kind,), devices=devices)
    return make(backend="mosaic_gpu"), jax.device_put(arrays, devices[0]), put(mesh, specs, arrays)


def same_bits(found, wanted):
    return np.array_equal(np.asarray(found).view(np.uint32), np.asarray(wanted).view(np.uint32))


@pytest.mark.gpu
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("kind", KINDS, ids=["explicit", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_gpus_give_the_bits_of_one(name, kind, wrap):
    run, arrays, placed = on_gpus(name, kind)
    wanted, got = run(**arrays), wrap(run)(**placed)
    for found, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert same_bits(found, want)
        assert len(found.sharding.device_set) == min(2, jax.device_count())
        chosen_by_xla = kind is AxisType.Auto and wrap is jax.jit
        assert jax.device_count() == 1 or chosen_by_xla or not found.sharding.is_fully_replicated
    if wrap is jax.jit:
        assert not COLLECTIVE.search(wrap(run).lower(**placed).compile().as_text())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=["explicit", "auto"])
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("training")])
def test_gpus_give_the_gradients_of_one(name, kind):
    """Those of weight and bias are sums over the devices that split rows, so of other roundings."""
    run, arrays, placed = on_gpus(name, kind)
    if name == "training, channels of x alone":
        placed |= {
            n: jax.device_put(placed[n], NamedSharding(placed["x"].sharding.mesh, P("d")))
            for n in ("weight", "bias")
        }
    gradients = jax.jit(gradients_of(run))
    wanted = gradients(arrays)
    with jax.set_mesh(placed["x"].sharding.mesh):
        found = gradients(placed)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-5, atol=1e-5)
        if kind is AxisType.Explicit:
            assert gradient.sharding.is_equivalent_to(placed[name].sharding, gradient.ndim)
