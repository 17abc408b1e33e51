"""The Flax NNX and the Equinox layer: they load, jit, donate and compute what the operations do."""

import functools
import importlib
import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_impl
from pallas_impl.modules import load_weight

LIBRARIES = {"nnx": "flax", "equinox": "equinox"}
RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((24, 4)).astype(np.float32)
BIAS = RNG.standard_normal(24).astype(np.float32)


@pytest.fixture(params=LIBRARIES)
def library(request):
    if importlib.util.find_spec(LIBRARIES[request.param]) is None:
        pytest.skip(f"needs {LIBRARIES[request.param]}: pip install 'twinconv[{LIBRARIES[request.param]}]'")
    return importlib.import_module(f"pallas_impl.modules.{request.param}")


def create(library, *sizes, **options):
    if library.__name__.endswith("nnx"):
        return library.CausalConv1d(*sizes, rngs=library.nnx.Rngs(params=1), **options)
    if "param_dtype" in options:
        options["dtype"] = options.pop("param_dtype")
    return library.CausalConv1d(*sizes, key=jax.random.key(1), **options)


def same(a, b):
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def batch():
    rng = np.random.default_rng(1)
    return dict(
        x=jnp.asarray(rng.standard_normal((20, 24)), jnp.bfloat16),
        query_start_loc=jnp.asarray([0, 7, 7, 18], jnp.int32),
        conv_states=jnp.asarray(rng.standard_normal((5, 3, 24)), jnp.bfloat16),
        cache_indices=jnp.asarray([4, 0, 2], jnp.int32),
        has_initial_state=jnp.asarray([True, True, False]),
    )


@pytest.mark.parametrize(
    "weight", [WEIGHT, WEIGHT[:, None, :], WEIGHT.T[:, None, :]], ids=["2d", "torch", "flax"]
)
def test_a_checkpoint_loads_from_every_layout(library, weight):
    module = library.CausalConv1d.from_weights(weight, BIAS)
    wanted = pallas_impl.causal_conv1d_fn(**batch(), weight=WEIGHT, bias=BIAS, activation="silu")
    assert same(module(**batch()), wanted)
    assert module.weight[...].shape == (24, 4)
    fresh = create(library, 24, 4)
    fresh = fresh.load(weight, BIAS) or fresh
    assert same(fresh(**batch()), wanted)


def test_weights_of_the_libraries_own_layers(library):
    """The same outputs as nnx.Conv and equinox.nn.Conv1d, from their own parameters."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 24)), jnp.float32)
    if library.__name__.endswith("nnx"):
        conv = library.nnx.Conv(24, 24, 4, feature_group_count=24, padding="CAUSAL", rngs=library.nnx.Rngs(0))
        weight, bias, wanted = conv.kernel[...], conv.bias[...], conv(x)
        assert weight.shape == (4, 1, 24)
    else:
        conv = library.equinox.nn.Conv1d(24, 24, 4, groups=24, padding=((3, 0),), key=jax.random.key(0))
        weight, bias = conv.weight, conv.bias[:, 0]
        wanted = jax.vmap(conv)(x.swapaxes(1, 2)).swapaxes(1, 2)
        assert weight.shape == (24, 1, 4)
    module = library.CausalConv1d.from_weights(weight, bias, activation=None)
    np.testing.assert_allclose(module(x).out, wanted, rtol=1e-5, atol=1e-6)


def test_prefill_then_decode_under_jit(library):
    """Modules are arguments of jit, the pool is donated."""
    module = create(library, 24, 4, param_dtype=jnp.bfloat16)
    weight, bias = module.weight[...], module.bias[...]
    pool = module.empty_states(5, jnp.bfloat16)
    assert pool.shape == (5, 3, 24)
    assert pool.dtype == jnp.bfloat16
    if library.__name__.endswith("nnx"):
        graph, state = library.nnx.split(module)
        run = lambda state, arguments, **options: library.nnx.merge(graph, state)(**arguments, **options)  # noqa: E731
    else:
        state, run = module, lambda module, arguments, **options: module(**arguments, **options)

    @functools.partial(jax.jit, donate_argnums=2, static_argnames="decode")
    def step(state, arguments, pool, decode=False):
        return run(state, arguments | {"conv_states": pool}, decode=decode)

    prefill = {name: a for name, a in batch().items() if name != "conv_states"}
    tokens = dict(x=prefill["x"][:3], cache_indices=prefill["cache_indices"])
    given = pool
    out, pool = step(state, prefill, given)
    assert given.is_deleted()
    outs, pool = step(state, tokens, pool, decode=True)

    wanted, states = pallas_impl.causal_conv1d_fn(
        **prefill,
        weight=weight,
        bias=bias,
        conv_states=jnp.zeros((5, 3, 24), jnp.bfloat16),
        activation="silu",
    )
    wanted_outs, states = pallas_impl.causal_conv1d_update(
        **tokens, weight=weight, bias=bias, conv_states=states, activation="silu"
    )
    assert same([out, outs, pool], [wanted, wanted_outs, states])


def test_dense_batches(library):
    module = create(library, 24, 4, use_bias=False)
    x = batch()["x"].reshape(2, 10, 24)
    out, pool = module(x)
    assert pool is None
    starts = jnp.asarray([0, 10, 20], jnp.int32)
    wanted = pallas_impl.causal_conv1d_fn(
        x.reshape(20, 24), module.weight[...], None, None, starts, activation="silu"
    )
    assert same([out], [wanted.out.reshape(2, 10, 24)])


def test_a_cache_that_is_given_is_read(library):
    module = create(library, 24, 4, use_bias=False)
    x = batch()["x"].reshape(2, 10, 24).astype(jnp.float32)
    first, pool = module(x[:, :6], conv_states=module.empty_states(2))
    second, _ = module(x[:, 6:], conv_states=pool)
    assert same([jnp.concatenate([first, second], axis=1)], [module(x).out])


@pytest.mark.parametrize(
    "backend", ["xla", "mosaic_gpu_interpret", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)]
)
def test_gradients(library, backend):
    """Of the parameters and of x, through the differentiable form."""
    module = create(library, 8, 3, backend=backend)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 5, 8)), jnp.float32)
    weight, bias = module.weight[...], module.bias[...]
    plain = lambda x, weight, bias: pallas_impl.causal_conv1d(x, weight, bias, activation="silu").out  # noqa: E731
    wanted = jax.grad(lambda *leaves: (plain(*leaves) ** 2).sum(), (0, 1, 2))(x, weight, bias)
    loss = lambda x, module: (module(x).out ** 2).sum()  # noqa: E731
    dx = jax.grad(loss)(x, module)
    if library.__name__.endswith("nnx"):
        found = library.nnx.grad(loss, argnums=1)(x, module)
    else:
        found = library.equinox.filter_grad(lambda module: loss(x, module))(module)
    for got, want in zip((dx, found.weight[...], found.bias[...]), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_training_on_explicit_axes(library):
    """Five steps on the kernels over a mesh as `jax.make_mesh` makes it, rows split: the losses of one GPU."""
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices)
    module = create(library, 256, 4)
    x = jnp.asarray(np.random.default_rng(4).standard_normal((4, 40, 256)), jnp.float32)
    if library.__name__.endswith("nnx"):
        graph, state = library.nnx.split(module)
        run = lambda state, x: library.nnx.merge(graph, state)(x).out  # noqa: E731
    else:
        state, static = library.equinox.partition(module, library.equinox.is_array)
        run = lambda state, x: library.equinox.combine(state, static)(x).out  # noqa: E731

    target = 2 * run(state, x)

    @jax.jit
    def step(state, x, target):
        loss, slope = jax.value_and_grad(lambda state: ((run(state, x) - target) ** 2).mean())(state)
        return loss, jax.tree.map(lambda a, g: a - 100 * g, state, slope)

    def losses(place):
        held, given, wanted = jax.device_put(state, place(())), *jax.device_put((x, target), place(("data",)))
        found = []
        for _ in range(5):
            loss, held = step(held, given, wanted)
            found.append(float(loss))
        return found

    alone = losses(lambda spec: devices[0])
    with jax.set_mesh(mesh):
        split = losses(lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    np.testing.assert_allclose(split, alone, rtol=1e-5)
    assert alone[-1] < 0.9 * alone[0]


def test_decode_takes_packed_rows_and_serving_arguments(library):
    module = create(library, 24, 4)
    weight, bias = module.weight[...], module.bias[...]
    given = dict(conv_states=batch()["conv_states"], cache_indices=jnp.asarray([4, 0], jnp.int32))
    given |= dict(
        query_start_loc=jnp.asarray([0, 2, 5], jnp.int32), write_indices=jnp.asarray([1, 2], jnp.int32)
    )
    x = batch()["x"][:5]
    wanted = pallas_impl.causal_conv1d_update(x, weight, bias, activation="silu", **given)
    assert same(module(x, decode=True, **given), wanted)


def test_fresh_parameters(library):
    module = create(library, 500, 4, param_dtype=jnp.bfloat16)
    for parameter, shape in ((module.weight, (500, 4)), (module.bias, (500,))):
        values = np.asarray(parameter[...], np.float32)
        assert values.shape == shape
        assert parameter[...].dtype == jnp.bfloat16
        assert 0.45 < np.abs(values).max() <= 0.5
        assert abs(values.mean()) < 0.1
    assert create(library, 8, 2, use_bias=False).bias is None


def test_errors(library):
    for sizes, options, match in (
        ((24, 9), {}, "width: expected 1 to 8, got 9"),
        ((0, 4), {}, "dim: expected at least 1, got 0"),
        ((24, 4), {"activation": "gelu"}, "activation: expected one of"),
    ):
        with pytest.raises(ValueError, match=match):
            create(library, *sizes, **options)
    for sizes in (("24", 4), (24, 4.0), (True, 4), (24, jnp.array(4))):
        with pytest.raises(TypeError, match=r"^(dim|width): expected an integer, got "):
            create(library, *sizes)
    module = create(library, 24, 4)
    assert "CausalConv1d(" in repr(module)
    with pytest.raises(TypeError, match=r"^num_slots: expected an integer, got '4'"):
        module.empty_states("4")
    with pytest.raises(ValueError, match=r"x: expected shape \[batch, seqlen, dim\] without query_start_loc"):
        module(jnp.zeros((3, 24)))
    with pytest.raises(ValueError, match="has_initial_state: expected None with decode"):
        module(**batch(), decode=True)
    with pytest.raises(TypeError, match="chunk_size"):
        module(**batch(), chunk_size=64)
    with pytest.raises(ValueError, match="bias: expected an array, as use_bias says, got NoneType"):
        module.load(WEIGHT)
    with pytest.raises(ValueError, match=r"bias: expected shape \[dim=24\], got \[1\]"):
        module.load(WEIGHT, np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"with width 1 to 8 and dim=24, width=4, got \[24, 3\]"):
        module.load(WEIGHT[:, :3], BIAS)


def test_load_weight():
    square = np.arange(16.0).reshape(4, 1, 4)
    with pytest.raises(
        ValueError, match=r"layout: expected 'torch' or 'flax' for a weight of shape \[4, 1, 4\]"
    ):
        load_weight(square)
    assert same(
        [load_weight(square, layout="torch"), load_weight(square, layout="flax")],
        [square[:, 0], square[:, 0].T],
    )
    assert load_weight(np.zeros((5, 1, 3)), dim=3).shape == (3, 5)
    assert load_weight(np.zeros((5, 1, 3)), dim=5).shape == (5, 3)
    for weight in (np.zeros((24, 2, 4)), np.zeros((24, 9)), np.zeros(24), np.zeros((24, 1, 24))):
        with pytest.raises(ValueError, match="weight: expected shape"):
            load_weight(weight)
    with pytest.raises(ValueError, match="layout: expected None or one of"):
        load_weight(square, layout="keras")


def test_the_layers_are_alike():
    found = {name for name in LIBRARIES if importlib.util.find_spec(LIBRARIES[name])}
    if len(found) < 2:
        pytest.skip("needs flax and equinox: pip install 'twinconv[flax,equinox]'")
    layers = [importlib.import_module(f"pallas_impl.modules.{name}").CausalConv1d for name in LIBRARIES]
    for method in ("__call__", "load", "empty_states", "from_weights"):
        first, second = (inspect.signature(getattr(layer, method)).parameters for layer in layers)
        assert first == second, method  # NNX loads in place, Equinox returns a new layer
