"""The Mosaic GPU kernels compiled and run on a GPU (Hopper or newer), against the XLA path on the same device.

Products of 16-bit inputs are exact in float32, so there both must agree bit for bit.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import reference
from pallas_impl import causal_conv1d_fn, causal_conv1d_update, config, prefill, update
from pallas_impl.call import resolve
from pallas_impl.records import Arrays, Options

pytestmark = pytest.mark.gpu
SEED_LENGTHS = (1, 9, 2, 17, 4)


def problem(lengths, dim, width=4, dtype="bfloat16", pool_dtype=None, tail=0, padding=(), spare=1, seed=0):
    """Arguments with NaN in every slot, spare column and token that nothing may read."""
    batch = len(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rng = np.random.default_rng(seed)
    slots = rng.permutation(batch + 3)[:batch].astype(np.int32)
    has = rng.integers(0, 2, batch).astype(bool)
    slots[list(padding)] = -1
    keys = jax.random.split(jax.random.key(seed), 4)
    normal = lambda key, shape, kind: jax.random.normal(key, shape, jnp.float32).astype(kind)  # noqa: E731
    # values of x's dtype whatever the pool's: XLA's sums of other float32 values round twice, the kernel's once
    pool = normal(keys[3], (batch + 3, width - 1 + spare, dim), dtype).astype(pool_dtype or dtype)
    used = np.zeros(batch + 3, bool)
    used[slots[has & (slots >= 0)]] = True
    pool = jnp.where(
        jnp.asarray(used)[:, None, None] & (jnp.arange(pool.shape[1]) < width - 1)[:, None], pool, jnp.nan
    )
    x = normal(keys[0], (int(starts[-1]) + tail, dim), dtype)
    return dict(
        x=x.at[starts[-1] :].set(jnp.nan), weight=normal(keys[1], (dim, width), dtype),
        bias=normal(keys[2], (dim,), dtype), conv_states=pool.astype(pool_dtype or dtype),
        query_start_loc=jnp.asarray(starts), cache_indices=jnp.asarray(slots), has_initial_state=jnp.asarray(has),
    )  # fmt: skip


def assert_same_bits(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    kind = {2: np.uint16, 4: np.uint32}[got.dtype.itemsize]
    nan = np.isnan(got.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.where(nan, 0, got.view(kind)), np.where(nan, 0, expected.view(kind)))


def run(arguments, conf, silu=False):
    options = Options(silu=silu, config=config.PrefillConfig(*conf))
    return jax.jit(functools.partial(prefill.launch, options=options))(Arrays(**arguments))


def test_auto_is_the_kernel():
    assert resolve("auto", jnp.zeros(1)) == "mosaic_gpu"


@pytest.mark.parametrize(
    "sizes",
    [
        dict(lengths=SEED_LENGTHS, dim=8192, tail=3),
        dict(lengths=(100, 1, 0, 33, 64, 200), dim=4352, tail=40, padding=(1, 3)),
        dict(
            lengths=(40, 3, 0, 1, 70) * 40, dim=264, width=2, tail=9, padding=(3,)
        ),  # one row cut at the last channel
        dict(lengths=(5, 1, 0, 1, 2) * 500, dim=136, width=3, tail=9, padding=(7,), pool_dtype="float32"),
        dict(lengths=(40, 3), dim=200, width=8, dtype="float16"),
        dict(lengths=(40, 3), dim=100, width=5, tail=1),
        dict(lengths=(3, 2), dim=1, width=1, padding=(1,)),
        dict(lengths=(1,), dim=256),
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
def test_prefill_equals_xla_bit_for_bit(sizes, schedule):
    arguments = problem(**sizes)
    expected = causal_conv1d_fn(**arguments, backend="xla")
    result = causal_conv1d_fn(**arguments, backend="mosaic_gpu", schedule=schedule)
    assert_same_bits(result.out, expected.out)
    assert_same_bits(result.conv_states, expected.conv_states)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(lengths=(1,) * 5000, dim=512, padding=(7, 4000)),
        dict(lengths=(5, 1, 0, 1, 2) * 1500, dim=256, tail=9, padding=(7,), width=3, dtype="float32"),
        dict(lengths=(0, 5, 3, 9, 2) * 1500, dim=384, tail=2, padding=(8,), width=8),
        dict(lengths=(4000, *(1, 2) * 2000), dim=768, dtype="float16"),  # rows are not where they would be, were all of one length
        dict(lengths=(*(0,) * 5000, *(1,) * 8300, *(0,) * 300), dim=256, width=2),
        dict(lengths=(900, *(1,) * 300), dim=8192, tail=30),
    ],
    ids=["one-token", "float32", "wide", "chunk-first", "empty-first", "chunk"],
)  # fmt: skip
def test_rows_of_few_tokens_have_the_bits_of_blocks_of_one_row(sizes):
    arguments = problem(**sizes)
    (tokens, dim), batch = arguments["x"].shape, arguments["cache_indices"].size
    assert config.prefill_config(tokens, dim, batch, None, "auto").short_t
    expected = causal_conv1d_fn(**arguments, backend="mosaic_gpu", schedule="flat")
    result = causal_conv1d_fn(**arguments, backend="mosaic_gpu")
    assert_same_bits(result.out, expected.out)
    assert_same_bits(result.conv_states, expected.conv_states)


def test_prefill_equals_the_reference():
    arguments = problem(SEED_LENGTHS, 512, tail=3)
    result = causal_conv1d_fn(**arguments)
    expected = reference.causal_conv1d_fn(**{k: np.asarray(v) for k, v in arguments.items()})
    assert_same_bits(result.out, expected.out)
    assert_same_bits(result.conv_states, expected.conv_states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_schedules_and_block_sizes_give_the_same_bits(dtype):
    arguments = problem((100, 1, 0, 33, 7), 1024, dtype=dtype, tail=40, padding=(1,))
    first = run(arguments, (True, 32, 256, 0, 0), silu=True)
    for conf in [
        (True, 8, 128, 0, 0),
        (True, 64, 256, 0, 0),
        (False, 16, 256, 7, 3),
        (False, 32, 128, 1, 1),
    ]:
        for got, expected in zip(run(arguments, conf, silu=True), first, strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chunks_equal_the_whole_bit_for_bit(dtype):
    arguments = problem((70,), 512, dtype=dtype)
    common = dict(weight=arguments["weight"], bias=arguments["bias"], activation="silu", backend="mosaic_gpu")
    whole = causal_conv1d_fn(**(arguments | common))
    pool, outs, has = arguments["conv_states"], [], arguments["has_initial_state"]
    for begin, end in [(0, 33), (33, 34), (34, 36), (36, 70)]:
        x = arguments["x"][begin:end]
        if end - begin == 1:
            part = causal_conv1d_update(
                x, conv_states=pool, cache_indices=arguments["cache_indices"], **common
            )
        else:
            part = causal_conv1d_fn(
                x, conv_states=pool, query_start_loc=jnp.asarray([0, end - begin], jnp.int32),
                cache_indices=arguments["cache_indices"], has_initial_state=has, **common,
            )  # fmt: skip
        has = jnp.ones((1,), bool)
        pool = part.conv_states
        outs.append(part.out)
    assert_same_bits(jnp.concatenate(outs), whole.out)
    assert_same_bits(pool, whole.conv_states)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("batch", "dim", "width", "pool_dtype"),
    [(300, 2048, 4, "bfloat16"), (7, 200, 4, "bfloat16"), (33, 264, 2, "float32"), (9, 100, 3, "bfloat16"), (5, 256, 1, "bfloat16")],
)  # fmt: skip
def test_update_equals_prefill_bit_for_bit(batch, dim, width, pool_dtype, activation):
    arguments = problem((1,) * batch, dim, width=width, pool_dtype=pool_dtype, padding=(1,))
    arguments |= dict(has_initial_state=jnp.ones((batch,), bool))
    expected = causal_conv1d_fn(**arguments, activation=activation, backend="mosaic_gpu")
    step = {k: arguments[k] for k in ("x", "weight", "bias", "conv_states", "cache_indices")}
    results = [causal_conv1d_update(**step, activation=activation, backend="mosaic_gpu")]
    results.append(causal_conv1d_update(**(step | dict(x=step["x"][:, None])), activation=activation))
    if dim == 2048:
        for conf in itertools.product((1, 2, 8), (128, 256, 512), (True, False)):
            if conf[1:] == (512, False):
                continue
            options = Options(silu=activation is not None, config=config.UpdateConfig(*conf))
            results.append(jax.jit(functools.partial(update.launch, options=options))(Arrays(**step)))
    for out, pool in results:
        assert_same_bits(out.reshape(batch, dim), expected.out)
        assert_same_bits(pool, expected.conv_states)


@pytest.mark.parametrize("op", ["fn", "update"])
def test_a_donated_pool_is_not_copied(op):
    arguments = problem((1,) * 16, 1024) | dict(conv_states=jnp.zeros((5000, 3, 1024), jnp.bfloat16))
    function = causal_conv1d_fn
    if op == "update":
        function = causal_conv1d_update
        arguments = {k: arguments[k] for k in ("x", "weight", "bias", "conv_states", "cache_indices")}
    function = functools.partial(function, activation="silu", backend="mosaic_gpu")
    compiled = jax.jit(function, donate_argnames="conv_states").lower(**arguments).compile()
    copies = r"= bf16\[5000,3,1024\]\S* (copy|fusion)\("
    assert re.findall(copies, compiled.as_text()) == []
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    assert compiled.memory_analysis().alias_size_in_bytes >= arguments["conv_states"].nbytes
    assert re.findall(copies, jax.jit(function).lower(**arguments).compile().as_text())


@pytest.mark.parametrize("starts", [(0, 120, 5, 200), (7, 90, 100, 110), (0, -4, 500, 2**31 - 1)])
def test_bad_offsets_and_slots_do_not_fault(starts):
    arguments = problem((4, 98, 98), 512)
    arguments |= dict(
        query_start_loc=jnp.asarray(starts, jnp.int32),
        cache_indices=jnp.asarray([2, 10**9, -(2**31)], jnp.int32),
    )
    for schedule in ("flat", "per_sequence"):
        result = causal_conv1d_fn(**arguments, schedule=schedule, max_seqlen=1, backend="mosaic_gpu")
        others = jnp.asarray([0, 1, 3, 4, 5])
        assert_same_bits(result.conv_states[others], arguments["conv_states"][others])
        assert_same_bits(result.conv_states[:, 3:], arguments["conv_states"][:, 3:])


def test_addresses_beyond_2_to_the_31_elements():
    dim, tokens, slots = 8192, (1 << 18) + 41, 90_000
    x = jnp.zeros((tokens, dim), jnp.bfloat16).at[-41:].set(1.5)
    pool = jnp.zeros((slots, 3, dim), jnp.bfloat16).at[-1].set(2.0)
    assert x.size > 2**31
    assert pool.size > 2**31
    weight = jnp.ones((dim, 4), jnp.bfloat16)
    starts = jnp.asarray([0, tokens - 41, tokens], jnp.int32)
    function = jax.jit(
        functools.partial(causal_conv1d_fn, backend="mosaic_gpu"), donate_argnames="conv_states"
    )
    indices = jnp.asarray([slots - 2, slots - 1], jnp.int32)
    out, pool = function(x, weight, None, pool, starts, indices, jnp.asarray([False, True]))
    tail = np.asarray(out[-41:, ::1000], np.float32)
    np.testing.assert_array_equal(tail[:4, 0], [7.5, 7.0, 6.5, 6.0])
    np.testing.assert_array_equal(tail[4:], 6.0)
    assert not np.asarray(out[:-41:4096]).any()
    np.testing.assert_array_equal(np.asarray(pool[-1], np.float32), 1.5)
    assert not np.asarray(pool[:-1:4096]).any()


def test_new_lengths_do_not_compile_again():
    traces = []

    def traced(*arguments):
        traces.append(1)
        return causal_conv1d_fn(*arguments, backend="mosaic_gpu")

    jitted = jax.jit(traced)
    rng = np.random.default_rng(0)
    for _ in range(200):
        arguments = problem(rng.multinomial(300, [1 / 6] * 6), 256)
        result = jitted(*arguments.values())
    assert len(traces) == 1
    expected = causal_conv1d_fn(*arguments.values(), backend="xla")
    assert_same_bits(result.out, expected.out)


def scanned(x, weight, pools, backend):
    def layer(x, given):
        weight, pool = given
        out, new = causal_conv1d_update(x, weight, None, pool, backend=backend)
        return out, (new, pool)

    return jax.lax.scan(layer, x, (weight, pools))


def one_of_many(x, weight, pools, backend):
    out, new = causal_conv1d_update(x, weight[2], None, pools[2], backend=backend)
    return out, new, pools[2], pools.at[2].set(new)


def outputs_of_layers(x, weight, pools, backend):
    outs = jnp.zeros((len(pools), *x.shape), x.dtype)
    for i in range(len(pools)):
        x = causal_conv1d_update(x, weight[i], None, pools[i], backend=backend).out
        outs = outs.at[i].set(x)
    return outs


@pytest.mark.parametrize("layers", [scanned, one_of_many, outputs_of_layers])
def test_pools_of_layers_in_one_array(layers):
    """XLA makes a kernel and such a slice one operation, in which the new windows were lost."""
    draw = np.random.default_rng(0).normal
    x, weight, pools = (
        jnp.asarray(draw(size=s), jnp.bfloat16) for s in ((4, 256), (3, 256, 4), (3, 4, 3, 256))
    )
    given = jnp.copy(pools)
    found = jax.jit(layers, static_argnames="backend")(x, weight, given, backend="mosaic_gpu")
    # layer by layer: in one program XLA leaves out the rounding between layers of its own
    wanted = layers(x, weight, given, backend="xla")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert np.array_equal(np.asarray(a).view(np.uint16), np.asarray(b).view(np.uint16))
    assert np.array_equal(np.asarray(given).view(np.uint16), np.asarray(pools).view(np.uint16))
