"""The operations over a mesh of eight CPU devices: the bits of one device, and no communication but what is needed.

The kernels are lowered for CUDA over a mesh with no GPU; on several GPUs see tests/pallas/test_multi_gpu.py.
"""

import functools
import inspect
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import pallas_impl
from oracle.contract import Unsupported
from pallas_impl import context_parallel, sharding
from tests.tools.kernel_results import written_into_kernels

if os.environ.get("JAX_PLATFORMS") == "cpu":  # not with --gpu, where other files may have started JAX
    jax.config.update("jax_num_cpu_devices", 8)

COLLECTIVE = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
)
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}


def make_mesh(shape, names, kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(names))


def draw(seed, lengths, tokens, dim, width, dtype=jnp.bfloat16, pool_dtype=jnp.bfloat16, extra=3):
    """A packed batch; rows 1 and 3 of more than four are padding, and one slot holds NaN."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    floats = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape, np.float32), dtype)  # noqa: E731
    slots = rng.permutation(batch + extra)[:batch]
    pool = floats((batch + extra, width + 1, dim), pool_dtype).at[slots[0], 0].set(jnp.nan)
    if batch > 4:
        slots[1], slots[3] = -1, batch + extra
    return dict(
        x=floats((tokens, dim), dtype),
        weight=floats((dim, width), dtype),
        bias=floats((dim,), dtype),
        conv_states=pool,
        query_start_loc=jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32),
        cache_indices=jnp.asarray(slots, jnp.int32),
        has_initial_state=jnp.asarray(rng.random(batch) < 0.6),
    )


def join(batches):
    """The batches of several devices, one after another along axis 0; weight and bias are the first one's."""
    whole = {name: jnp.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return whole | {name: batches[0][name] for name in ("weight", "bias")}


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@functools.cache
def jitted(operation, **options):
    return jax.jit(functools.partial(operation, **options))


def place(arguments, mesh, **axes):
    where = sharding.shardings(mesh, **axes)
    return {name: None if a is None else jax.device_put(a, where[name]) for name, a in arguments.items()}


def collectives(compiled):
    return sorted(set(COLLECTIVE.findall(compiled.as_text())))


def test_there_are_eight_devices():
    assert len(jax.devices("cpu")) == 8


LENGTHS = [9, 0, 2, 1, 20]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_channels(kind):
    """Tensor parallel: sharded inputs of a jit, nothing sent, results split as the inputs are."""
    mesh = make_mesh((8,), ("model",), kind)
    arguments = draw(0, LENGTHS, 40, 48, 4)
    wanted = jitted(pallas_impl.causal_conv1d_fn, activation="silu")(**arguments)
    placed = place(arguments, mesh, channel_axis="model")
    split = jitted(sharding.causal_conv1d_fn, mesh=mesh, channel_axis="model", activation="silu")
    got = split(**placed)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.conv_states, wanted.conv_states)
    assert got.out.sharding.shard_shape(got.out.shape) == (40, 6)
    assert got.conv_states.sharding.shard_shape(got.conv_states.shape) == (8, 5, 6)
    assert collectives(split.lower(**placed).compile()) == []


def test_plain_operation_on_sharded_channels():
    """The xla backend is ordinary array code: the compiler splits it along channels by itself."""
    mesh = make_mesh((8,), ("model",))
    arguments = draw(0, LENGTHS, 40, 48, 4)
    placed = place(arguments, mesh, channel_axis="model")
    plain = jitted(pallas_impl.causal_conv1d_fn, activation="silu", backend="xla")
    compiled = plain.lower(**placed).compile()
    assert collectives(compiled) == []
    wanted = plain(**arguments)
    got = compiled(**placed)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.conv_states, wanted.conv_states)


def test_a_gather_would_be_seen():
    """`collectives` sees what a wrong split compiles to."""
    mesh = make_mesh((8,), ("model",))
    arguments = place(draw(0, LENGTHS, 40, 48, 4), mesh, token_axis="model")  # tokens, not channels
    plain = jitted(pallas_impl.causal_conv1d_fn, backend="xla")
    assert collectives(plain.lower(**arguments).compile()) != []


def test_sequences_and_channels():
    """Data parallel times tensor parallel: a batch and a pool for each group of devices."""
    mesh = make_mesh((4, 2), ("data", "model"))
    axes = dict(batch_axis="data", channel_axis="model")
    lengths = [[9, 0, 2, 1, 20], [1, 1, 1, 1, 1], [0, 0, 0, 0, 32], [8, 8, 8, 4, 4]]
    batches = [draw(seed, rows, 32, 16, 4) for seed, rows in enumerate(lengths)]
    batches = [batch | {name: batches[0][name] for name in ("weight", "bias")} for batch in batches]
    alone = jitted(pallas_impl.causal_conv1d_fn, activation="silu")
    wanted = [alone(**batch) for batch in batches]
    placed = place(join(batches), mesh, **axes)
    split = jitted(sharding.causal_conv1d_fn, mesh=mesh, activation="silu", **axes)
    got = split(**placed)
    assert same_bits(got.out, np.concatenate([w.out for w in wanted]))
    assert same_bits(got.conv_states, np.concatenate([w.conv_states for w in wanted]))
    assert collectives(split.lower(**placed).compile()) == []


@pytest.mark.parametrize("packed", [True, False])
def test_rolling_steps(packed):
    """Counts are split with the sequences; packed rows are split by channels alone."""
    batch = draw(3, [2, 0, 1, 3, 2], 10, 16, 4)
    del batch["has_initial_state"]
    counts = jnp.array([1, 3, 2, 0, 2], jnp.int32)
    options = dict(activation="silu", num_accepted_tokens=counts)
    if packed:
        mesh, axes = make_mesh((8,), ("model",)), dict(channel_axis="model")
        options["max_seqlen"] = 3
    else:
        mesh, axes = make_mesh((1, 8), ("data", "model")), dict(batch_axis="data", channel_axis="model")
        del batch["query_start_loc"]
        batch["x"] = batch["x"].reshape(5, 2, 16)
    wanted = pallas_impl.causal_conv1d_update(**batch, **options)
    got = sharding.causal_conv1d_update(**batch, **options, mesh=mesh, **axes)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.conv_states, wanted.conv_states)
    if packed:
        with pytest.raises(ValueError, match="query_start_loc: expected None, since batch_axis is 'model'"):
            sharding.causal_conv1d_update(**batch, **options, mesh=mesh, batch_axis="model")


@pytest.mark.parametrize("seqlen", [None, 3])
def test_update(seqlen):
    mesh = make_mesh((4, 2), ("data", "model"))
    axes = dict(batch_axis="data", channel_axis="model")
    batches = []
    for seed in range(4):
        batch = draw(seed, [1] * 5, 5 * (seqlen or 1), 16, 4)
        del batch["query_start_loc"], batch["has_initial_state"]
        if seqlen:
            batch["x"] = batch["x"].reshape(5, seqlen, 16)
        batches.append(batch | {name: (batches or [batch])[0][name] for name in ("weight", "bias")})
    wanted = [pallas_impl.causal_conv1d_update(**batch, activation="silu") for batch in batches]
    split = jitted(sharding.causal_conv1d_update, mesh=mesh, activation="silu", **axes)
    whole = join(batches)
    got = split(**whole)
    assert same_bits(got.out, np.concatenate([w.out for w in wanted]))
    assert same_bits(got.conv_states, np.concatenate([w.conv_states for w in wanted]))
    assert got.conv_states.sharding.shard_shape(got.conv_states.shape) == (8, 5, 8)
    if seqlen is None:
        placed = place(whole, mesh, **axes)
        assert collectives(split.lower(**placed).compile()) == []


@pytest.mark.parametrize("tokens", [40, 64])
def test_the_pool_is_donated_on_every_device(tokens):
    """40 tokens: `out` is as large as the pool, which only `out_shardings` keeps apart (see `pallas_impl.sharding`)."""
    mesh = make_mesh((8,), ("model",))
    where = sharding.shardings(mesh, channel_axis="model")
    arguments = place(draw(0, LENGTHS, tokens, 48, 4), mesh, channel_axis="model")
    pool = jax.jit(jnp.negative, out_shardings=where["conv_states"])(
        arguments["conv_states"]
    )  # XLA's own memory
    split = jax.jit(
        functools.partial(sharding.causal_conv1d_fn, mesh=mesh, channel_axis="model"),
        donate_argnames="conv_states",
        out_shardings=pallas_impl.ConvOutput(where["out"], where["conv_states"]),
    )
    addresses = [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards]
    new = split(**arguments | {"conv_states": pool}).conv_states
    assert pool.is_deleted()
    assert [shard.data.unsafe_buffer_pointer() for shard in new.addressable_shards] == addresses


# Tokens split over devices. 8 devices: parts of 8, 4, 2 and 1 tokens.
CONTEXT = {
    "rows cross, end at and skip cuts": ([19, 0, 5, 32, 3], 64, 4, "bf16", "bf16"),
    "many short rows": ([1] * 20 + [40], 64, 4, "bf16", "bf16"),
    "parts of 4 tokens, windows of 7": ([3, 0, 21, 1, 4], 32, 8, "bf16", "bf16"),
    "parts of 1 token, windows over seven devices": ([1, 7], 8, 8, "bf16", "bf16"),
    "parts of 2 tokens and a padded tail": ([6, 3], 16, 4, "f16", "f16"),
    "two dtypes": ([19, 0, 5, 32, 3], 64, 4, "bf16", "f16"),
    "a halo that the pool's dtype would round": ([19, 0, 5, 32, 3], 64, 2, "f32", "bf16"),
    "no history": ([19, 0, 5, 32, 3], 64, 1, "bf16", "bf16"),
    "nothing but padding": ([0, 0, 0, 0, 0], 16, 4, "bf16", "bf16"),
}


@pytest.mark.parametrize("name", CONTEXT)
def test_tokens(name):
    lengths, tokens, width, dtype, pool_dtype = CONTEXT[name]
    mesh = make_mesh((8,), ("context",))
    arguments = draw(3, lengths, tokens, 24, width, DTYPES[dtype], DTYPES[pool_dtype])
    options = dict(activation="silu" if width % 2 else None, max_seqlen=max(lengths))
    wanted = jitted(pallas_impl.causal_conv1d_fn, **options)(**arguments)
    split = jitted(sharding.causal_conv1d_fn, mesh=mesh, token_axis="context", **options)
    got = split(**arguments)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.conv_states, wanted.conv_states)
    assert got.out.sharding.shard_shape(got.out.shape) == (tokens // 8, 24)


def test_tokens_without_a_pool():
    mesh = make_mesh((8,), ("context",))
    arguments = draw(4, [13, 50], 64, 24, 4)
    arguments = {name: arguments[name] for name in ("x", "weight", "bias", "query_start_loc")} | {
        "conv_states": None
    }
    wanted = jitted(pallas_impl.causal_conv1d_fn)(**arguments)
    got = jitted(sharding.causal_conv1d_fn, mesh=mesh, token_axis="context")(**arguments)
    assert same_bits(got.out, wanted.out)
    assert got.conv_states is None


def test_tokens_channels_and_sequences():
    mesh = make_mesh((2, 2, 2), ("data", "context", "model"))
    axes = dict(batch_axis="data", token_axis="context", channel_axis="model")
    batches = [draw(0, [9, 0, 2, 1, 20], 32, 16, 4), draw(1, [1, 2, 3, 4, 5], 32, 16, 4)]
    batches[1] |= {name: batches[0][name] for name in ("weight", "bias")}
    alone = jitted(pallas_impl.causal_conv1d_fn, activation="silu")
    wanted = [alone(**batch) for batch in batches]
    got = jitted(sharding.causal_conv1d_fn, mesh=mesh, activation="silu", **axes)(**join(batches))
    assert same_bits(got.out, np.concatenate([w.out for w in wanted]))
    assert same_bits(got.conv_states, np.concatenate([w.conv_states for w in wanted]))


def sent_sizes(split, placed):
    """What each kind of collective sends, in elements."""
    sent = {}
    for line in split.lower(**placed).compile().as_text().splitlines():
        if found := re.search(r"= \(?\w+\[([\d,]*)\].* (" + COLLECTIVE.pattern + r")(-start)?\(", line):
            sent.setdefault(found[2], []).append(int(np.prod([int(n) for n in found[1].split(",")])))
    return sent


@pytest.mark.parametrize("together", [True, False])
def test_only_the_halo_and_the_windows_travel(together, monkeypatch):
    """Sizes of what is sent: the rows' windows to all, width-1 tokens with them or to the neighbour; never x or the pool."""
    monkeypatch.setattr(context_parallel, "TOGETHER", 8 if together else 7)
    mesh = make_mesh((8,), ("context",))
    arguments = draw(5, [100, 28], 128, 64, 4, extra=30)
    placed = place(arguments, mesh, token_axis="context")
    split = jax.jit(functools.partial(sharding.causal_conv1d_fn, mesh=mesh, token_axis="context"))
    windows, halo = 2 * 3 * 64, 3 * 64
    wanted = {"all-reduce": [windows + 8 * halo]}
    if not together:
        wanted = {"all-reduce": [windows], "collective-permute": [halo]}
    assert sent_sizes(split, placed) == wanted
    wanted, got = pallas_impl.causal_conv1d_fn(**arguments), split(**placed)
    assert same_bits(got.out, wanted.out)
    assert same_bits(got.conv_states, wanted.conv_states)


def damaged(damage, real, *arguments):
    """The result with its first part, the tokens before the cut, damaged."""
    found = real(*arguments)
    return (damage(found[0]), *found[1:]) if isinstance(found, tuple) else damage(found)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("damage", [jnp.zeros_like, lambda halo: halo[::-1]], ids=["no halo", "newest first"])
def test_a_wrong_halo_is_seen(monkeypatch, damage, together):
    monkeypatch.setattr(context_parallel, "TOGETHER", 8 if together else 7)
    name = "_receive_together" if together else "_halo"
    real = getattr(context_parallel, name)
    monkeypatch.setattr(context_parallel, name, functools.partial(damaged, damage, real))
    arguments = draw(3, [19, 0, 5, 32, 3], 64, 24, 4)
    mesh = make_mesh((8,), ("context",))
    wanted = pallas_impl.causal_conv1d_fn(**arguments)
    got = jax.jit(functools.partial(sharding.causal_conv1d_fn, mesh=mesh, token_axis="context"))(**arguments)
    assert not same_bits(got.out, wanted.out)


@pytest.mark.parametrize("axes", [{"channel_axis": "d"}, {"batch_axis": "d"}, {"token_axis": "d"}], ids=str)
def test_kernels_lower_for_cuda(axes):
    """A mesh of two GPUs that this machine does not have."""
    mesh = AbstractMesh((2,), ("d",), axis_types=(AxisType.Auto,))
    batches = [draw(0, LENGTHS, 64, 512, 4)] * (2 if "batch_axis" in axes else 1)
    where = sharding.shardings(mesh, **axes)
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where[name])
        for name, array in join(batches).items()
    }
    split = functools.partial(
        sharding.causal_conv1d_fn, mesh=mesh, backend="mosaic_gpu", activation="silu", **axes
    )
    lowered = (
        jax.jit(split, donate_argnames="conv_states").trace(**shapes).lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    sent = sorted(re.findall(r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)", text))
    assert sent == (["all_gather"] if "token_axis" in axes else [])
    assert text.count("custom_call @mosaic_gpu") == (2 if "token_axis" in axes else 1)
    assert written_into_kernels(lowered) == []
    assert re.search(r"tf.aliasing_output|jax.buffer_donor", text)


SHARD_MAPS = [
    ("xla", 2),
    ("mosaic_gpu_interpret", 1),
]  # the interpreter's callbacks on several devices wait for each other


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["outside jit", "inside jit"])
@pytest.mark.parametrize(("backend", "devices"), SHARD_MAPS)
def test_training_inside_shard_map_as_it_comes(backend, devices, wrap):
    """Rows split, weight and bias the same everywhere: values and gradients, taken outside and inside."""
    rng = np.random.default_rng(0)
    x, weight, bias = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 5, 8), (8, 3), (8,)))
    part = lambda *leaves: pallas_impl.causal_conv1d(*leaves, activation="silu", backend=backend).out  # noqa: E731
    specs = P("d"), P(), P()
    split = jax.shard_map(part, mesh=make_mesh((devices,), ("d",)), in_specs=specs, out_specs=P("d"))
    loss = lambda f, *leaves: (f(*leaves) ** 2).sum()  # noqa: E731
    wanted = jax.grad(functools.partial(loss, part), (0, 1, 2))(x, weight, bias)
    inside = jax.shard_map(
        jax.grad(functools.partial(loss, part), (0, 1, 2)),
        mesh=make_mesh((devices,), ("d",)), in_specs=specs, out_specs=specs,
    )  # fmt: skip
    np.testing.assert_allclose(wrap(split)(x, weight, bias), part(x, weight, bias), rtol=1e-5, atol=1e-5)
    for found in (wrap(jax.grad(functools.partial(loss, split), (0, 1, 2))), wrap(inside)):
        for got, want in zip(found(x, weight, bias), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["outside jit", "inside jit"])
@pytest.mark.parametrize(("backend", "devices"), SHARD_MAPS)
@pytest.mark.parametrize("varying", [(), ("x", "pool"), ("pool",)], ids=str)
def test_pools_inside_shard_map_as_it_comes(backend, devices, wrap, varying):
    """Results vary over the axes over which any argument does, and over no other."""
    rng = np.random.default_rng(1)
    x, weight, pool = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((2 * devices if "x" in varying else 2, 8), (8, 3), (3 * devices, 2, 8))
    )
    spec = {name: P("d") if name in varying else P() for name in ("x", "pool")}
    out = P("d") if varying else P()

    def part(x, weight, pool):
        step = pallas_impl.causal_conv1d_update(x, weight, None, pool, backend=backend)
        starts = jnp.array([0, 1, 2], jnp.int32)
        last = pallas_impl.causal_conv1d_fn(step.out, weight, None, step.conv_states, starts, backend=backend)
        return pallas_impl.commit_windows(
            last.conv_states, jnp.ones((2, 1, 2, 8), x.dtype), jnp.array([0, -1]), backend=backend
        ), last.out

    split = jax.shard_map(
        part,
        mesh=make_mesh((devices,), ("d",)),
        in_specs=(spec["x"], P(), spec["pool"]),
        out_specs=(out, out),
    )
    got = wrap(split)(x, weight, pool)
    count = devices if varying else 1
    pieces = [
        part(
            x[2 * i : 2 * i + 2] if "x" in varying else x,
            weight,
            pool[3 * i : 3 * i + 3] if varying else pool,
        )
        for i in range(count)
    ]
    for found, want in zip(got, zip(*pieces, strict=True), strict=True):
        assert same_bits(found, jnp.concatenate(want))


def test_bad_arguments():
    mesh = make_mesh((8,), ("model",))
    arguments = draw(0, LENGTHS, 40, 20, 4)
    split = functools.partial(sharding.causal_conv1d_fn, **arguments, mesh=mesh)
    with pytest.raises(ValueError, match=r"x: expected axis 1 to be a multiple of 8.* got shape \[40, 20\]"):
        split(channel_axis="model")
    with pytest.raises(ValueError, match=r"mesh: expected an axis named 'data', got the axes \('model',\)"):
        split(batch_axis="data")
    with pytest.raises(ValueError, match="expected distinct axes, got 'model' twice"):
        split(token_axis="model", channel_axis="model")
    with pytest.raises(ValueError, match=r"query_start_loc: expected axis 0 to be a multiple of 8"):
        split(batch_axis="model")
    with pytest.raises(Unsupported, match="validate"):
        split(token_axis="model", validate=True)
    with pytest.raises(ValueError, match="schedule: expected one of"):
        split(token_axis="model", schedule="best")


@pytest.mark.parametrize("function", [sharding.causal_conv1d_fn, sharding.causal_conv1d_update])
def test_an_argument_that_the_operation_does_not_know(function):
    mesh = make_mesh((8,), ("model",))
    arguments = draw(0, LENGTHS, 40, 48, 4)
    names = ("x", "weight", "bias", "conv_states", "cache_indices")
    arguments = {
        name: arguments[name]
        for name in inspect.signature(function).parameters
        if name in names or name == "query_start_loc"
    }
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk_size'"):
        function(**arguments, mesh=mesh, chunk_size=64)


@pytest.mark.parametrize(
    ("split", "plain", "added"),
    [
        (context_parallel.causal_conv1d_fn, pallas_impl.causal_conv1d_fn, {"axis_name"}),
        (sharding.causal_conv1d_fn, pallas_impl.causal_conv1d_fn, {"mesh", "channel_axis", "batch_axis", "token_axis", "options"}),
        (sharding.causal_conv1d, pallas_impl.causal_conv1d, {"mesh", "channel_axis", "batch_axis", "token_axis", "options"}),
        (sharding.causal_conv1d_update, pallas_impl.causal_conv1d_update, {"mesh", "channel_axis", "batch_axis", "options"}),
    ],
)  # fmt: skip
def test_signatures_add_the_mesh(split, plain, added):
    """Names, kinds and defaults; inside a mesh arrays are JAX's own, which the types say."""
    plain, split = (
        {name: one.replace(annotation=one.empty) for name, one in inspect.signature(f).parameters.items()}
        for f in (plain, split)
    )
    assert split.keys() - plain.keys() == added
    assert {name: split[name] for name in split.keys() & plain.keys()} == {
        name: plain[name] for name in split.keys() & plain.keys()
    }
