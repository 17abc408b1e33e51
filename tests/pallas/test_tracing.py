"""The operations under JAX's transformations: jit, donation, scan, checkpoint, vmap, grad and export.

The compiled programs are looked at, not only their results: XLA's for the CPU, and what is lowered for CUDA with no
GPU, where the pool must be one buffer from the argument through every kernel to the result.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import pallas_impl
from oracle.contract import Unsupported
from pallas_impl import causal_conv1d_fn, causal_conv1d_update, plain

SLOTS = 300
# XLA of JAX 0.10 moves 16-bit floats through float32 on a CPU, a 16-bit pool as a whole.
POOLS = ["float32"] if plain.WIDENS_SCATTERS else ["float32", "bfloat16"]
FN = ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices", "has_initial_state")
UPDATE = ("x", "weight", "bias", "conv_states", "cache_indices")
OPERATIONS = {"causal_conv1d_fn": FN, "causal_conv1d_update": UPDATE}


def batch(operation, tokens=24, dim=256, width=4, seed=0, pool="bfloat16"):
    rng = np.random.default_rng(seed)
    floats = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)  # noqa: E731
    rows = 4
    lengths = rng.multinomial(tokens - 2, [0.1, 0.2, 0.3, 0.4])
    whole = dict(
        x=floats(tokens if operation == "causal_conv1d_fn" else rows, dim),
        weight=floats(dim, width),
        bias=floats(dim),
        conv_states=floats(SLOTS, width - 1, dim).astype(pool),
        query_start_loc=jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32),
        cache_indices=jnp.asarray(rng.permutation(SLOTS)[:rows], jnp.int32),
        has_initial_state=jnp.asarray(rng.random(rows) < 0.5),
    )
    return {name: whole[name] for name in OPERATIONS[operation]}


def shapes(arguments):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)


def call(operation, **options):
    return functools.partial(getattr(pallas_impl, operation), activation="silu", **options)


def equal(a, b):
    return all(np.array_equal(x.view(np.uint16), y.view(np.uint16)) for x, y in zip(a, b, strict=True))


def pool_copies(text, pool):
    """Instructions of an XLA program that copy something of the pool's shape."""
    shape = ",".join(map(str, pool.shape))
    return re.findall(rf"= \w+\[{shape}\]\S* copy(?:-start)?\(.*", text)


def lower_for_cuda(function, arguments, **jit_options):
    return jax.jit(function, **jit_options).trace(**arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("operation", OPERATIONS)
class TestDonation:
    @pytest.mark.parametrize("dtype", POOLS)
    def test_in_place_on_a_cpu(self, operation, dtype):
        arguments = batch(operation, pool=dtype)
        pool = arguments["conv_states"] = jnp.negative(arguments["conv_states"])  # XLA's own memory
        wanted = call(operation)(**arguments)
        step = jax.jit(call(operation), donate_argnames="conv_states")
        compiled = step.lower(**arguments).compile()
        assert pool_copies(compiled.as_text(), pool) == []
        assert compiled.memory_analysis().alias_size_in_bytes == pool.nbytes
        assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes / 2
        address = pool.unsafe_buffer_pointer()
        got = step(**arguments)
        assert pool.is_deleted()
        assert got.conv_states.unsafe_buffer_pointer() == address
        assert equal(got, wanted)

    def test_without_donation_the_copy_is_seen(self, operation):
        arguments = batch(operation, pool="float32")
        compiled = jax.jit(call(operation)).lower(**arguments).compile()
        assert len(pool_copies(compiled.as_text(), arguments["conv_states"])) == 1
        assert compiled.memory_analysis().alias_size_in_bytes == 0

    def test_in_place_for_cuda(self, operation):
        """The donated argument is the kernel's operand, the kernel's second result is that operand and is returned."""
        arguments = batch(operation)
        text = lower_for_cuda(call(operation, backend="mosaic_gpu"), arguments, donate_argnames="conv_states")
        position = sorted(arguments).index("conv_states")
        head = re.search(r"func.func public @main\((.*?)\) ->", text)[1]
        assert re.search(rf"%arg{position}: tensor<{SLOTS}x3x256xbf16> {{[^}}]*tf.aliasing_output = 1", head)
        found = re.search(
            r"(%\S+):2 = stablehlo.custom_call @mosaic_gpu_v2\(([^)]*)\).*?output_operand_aliases = "
            r"\[#stablehlo.output_operand_alias<output_tuple_indices = \[1\], operand_index = (\d+)",
            text,
        )
        result, operands, aliased = found[1], found[2].split(", "), int(found[3])
        caller = re.search(r"func.call @\w+|call @\w+", text)
        if caller is None:
            assert operands[aliased] == f"%arg{position}"
            assert re.search(rf"return {result}#0, {result}#1", text)
        else:
            assert aliased == len(operands) - 1
        assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1


class TestDecodeLoop:
    """A `lax.scan` over decode steps with the pool as its carry."""

    STEPS = 6

    def loop(self, backend):
        def decode(xs, weight, pool, slots):
            def step(pool, x):
                out, pool = causal_conv1d_update(
                    x, weight, None, pool, slots, activation="silu", backend=backend
                )
                return pool, out

            return lax.scan(step, pool, xs)

        return decode

    def arguments(self, dtype="bfloat16"):
        a = batch("causal_conv1d_update", pool=dtype)
        xs = jnp.stack([a["x"] * (i + 1) for i in range(self.STEPS)])
        return xs, a["weight"], jnp.negative(a["conv_states"]), a["cache_indices"]

    @pytest.mark.parametrize("dtype", POOLS)
    def test_no_copy_a_step_on_a_cpu(self, dtype):
        xs, weight, pool, slots = self.arguments(dtype)
        wanted, kept = [], pool
        for x in xs:
            out, kept = causal_conv1d_update(x, weight, None, kept, slots, activation="silu")
            wanted.append(out)
        decode = jax.jit(self.loop("xla"), donate_argnums=2)
        compiled = decode.lower(xs, weight, pool, slots).compile()
        assert pool_copies(compiled.as_text(), pool) == []
        assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes / 2
        new, outs = decode(xs, weight, pool, slots)
        assert equal([new, outs], [kept, jnp.stack(wanted)])
        assert pool.is_deleted()

    def test_one_buffer_for_cuda(self):
        text = lower_for_cuda(
            self.loop("mosaic_gpu"),
            dict(zip(("xs", "weight", "pool", "slots"), self.arguments(), strict=True)),
            donate_argnames="pool",
        )
        assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
        assert re.search(
            r"output_operand_aliases = \[#stablehlo.output_operand_alias<output_tuple_indices = \[1\]", text
        )
        assert re.search(rf"%arg\d: tensor<{SLOTS}x3x256xbf16> {{[^}}]*tf.aliasing_output = 0", text)
        others = rf"stablehlo\.(?!custom_call|while|return)\w+ [^\n]*-> tensor<{SLOTS}x3x256xbf16>"
        assert re.findall(others, text) == []


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event, seconds, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def compilations():
    return Compilations()


@pytest.mark.parametrize("backend", ["xla", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
def test_new_data_compiles_nothing(compilations, backend):
    """Lengths, slots and flags are data: 50 batches of one shape, one program."""
    step = jax.jit(call("causal_conv1d_fn", backend=backend))
    batches = [batch("causal_conv1d_fn", seed=seed) for seed in range(50)]
    lengths = {tuple(np.diff(b["query_start_loc"])) for b in batches}
    assert len(lengths) > 40
    step(**batches[0])
    before = compilations.count
    for arguments in batches:
        step(**arguments)
    assert compilations.count == before
    assert step._cache_size() == 1
    step(**batch("causal_conv1d_fn", tokens=25))
    assert compilations.count > before  # the listener works
    assert step._cache_size() == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_checkpoint(operation):
    """Under `jax.checkpoint` a call is the call, and with the xla backend its derivative too."""
    arguments = batch(operation, dim=32)
    plain = call(operation, backend="xla")
    assert equal(jax.jit(jax.checkpoint(plain))(**arguments), jax.jit(plain)(**arguments))
    text = lower_for_cuda(jax.checkpoint(call(operation, backend="mosaic_gpu")), batch(operation))
    assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1

    def loss(run, x):
        return run(**arguments | {"x": x}).out.astype(jnp.float32).sum()

    x = arguments["x"]
    gradient = jax.jit(jax.grad(functools.partial(loss, plain)))(x)
    again = jax.jit(jax.grad(functools.partial(loss, jax.checkpoint(plain))))(x)
    assert equal([gradient], [again])
    assert np.abs(np.asarray(gradient, np.float32)).max() > 0


@pytest.mark.parametrize("operation", OPERATIONS)
class TestVmap:
    SHARED = ("weight", "bias")

    def stacked(self, operation):
        batches = [batch(operation, dim=32, seed=seed) for seed in range(3)]
        stacked = {name: jnp.stack([b[name] for b in batches]) for name in batches[0]}
        stacked |= {name: batches[0][name] for name in self.SHARED}
        return [b | {name: batches[0][name] for name in self.SHARED} for b in batches], stacked

    def test_xla(self, operation):
        """Independent batches, each with a pool of its own."""
        batches, stacked = self.stacked(operation)
        axes = {name: None if name in self.SHARED else 0 for name in stacked}
        run = call(operation, backend="xla")
        got = jax.jit(jax.vmap(lambda a: run(**a), in_axes=(axes,)))(stacked)
        for i, arguments in enumerate(batches):
            assert equal([got.out[i], got.conv_states[i]], run(**arguments))

    @pytest.mark.parametrize("mapped", ["x", "conv_states", "weight", "cache_indices"])
    def test_kernels_say_what_to_do(self, operation, mapped):
        arguments = batch(operation)
        arguments[mapped] = jnp.stack([arguments[mapped]] * 2)
        axes = {name: 0 if name == mapped else None for name in arguments}
        run = jax.vmap(lambda a: call(operation, backend="mosaic_gpu")(**a), in_axes=(axes,))
        with pytest.raises(Unsupported, match=r"one packed batch .* or backend='xla'"):
            jax.jit(run).trace(arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "conv_states"])
def test_derivatives_of_kernels_say_what_to_do(operation, name):
    def loss(value, arguments):
        return (
            call(operation, backend="mosaic_gpu")(**arguments | {name: value}).out.astype(jnp.float32).sum()
        )

    arguments = batch(operation)
    with pytest.raises(Unsupported, match=r"no derivative; expected pallas_impl\.causal_conv1d"):
        jax.jit(jax.grad(loss)).trace(arguments[name], arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
class TestExport:
    """`jax.export` writes a program on a machine with no GPU that another machine runs."""

    def test_for_cuda(self, operation):
        arguments = batch(operation)
        step = jax.jit(call(operation, backend="mosaic_gpu"), donate_argnames="conv_states")
        exported = export.export(step, platforms=["cuda"])(**shapes(arguments))
        loaded = export.deserialize(exported.serialize())
        assert loaded.platforms == ("cuda",)
        assert [a.shape for a in loaded.out_avals] == [arguments["x"].shape, arguments["conv_states"].shape]
        assert loaded.out_tree == exported.out_tree  # a ConvOutput
        text = loaded.mlir_module()
        assert text == exported.mlir_module()
        assert text.count("stablehlo.custom_call @mosaic_gpu_v2") == 1
        assert re.search(r"tf.aliasing_output = 1|jax.buffer_donor = true", text)
        with pytest.raises(ValueError, match="cuda"):
            loaded.call(**arguments)

    def test_for_this_cpu(self, operation):
        arguments = batch(operation, dim=32)
        run = call(operation, backend="xla")
        exported = export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(**shapes(arguments))
        loaded = export.deserialize(exported.serialize())
        assert equal(jax.jit(loaded.call)(**arguments), jax.jit(run)(**arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("operation", OPERATIONS)
class TestOnAGpu:
    def test_donated_pool_stays_where_it_is(self, operation):
        arguments = batch(operation)
        wanted = call(operation, backend="mosaic_gpu")(**arguments)
        pool = arguments["conv_states"]
        address = pool.unsafe_buffer_pointer()
        step = jax.jit(call(operation, backend="mosaic_gpu"), donate_argnames="conv_states")
        compiled = step.lower(**arguments).compile()
        assert pool_copies(compiled.as_text(), pool) == []
        got = step(**arguments)
        assert got.conv_states.unsafe_buffer_pointer() == address
        assert equal(got, wanted)

    def test_export_runs(self, operation):
        arguments = batch(operation)
        step = jax.jit(call(operation, backend="mosaic_gpu"))
        exported = export.export(step, platforms=["cuda"])(**shapes(arguments))
        loaded = export.deserialize(exported.serialize())
        assert equal(jax.jit(loaded.call)(**arguments), step(**arguments))


@pytest.mark.gpu
def test_decode_loop_on_a_gpu():
    """As many kernels as steps, and no copy of the pool."""
    loop = TestDecodeLoop()
    xs, weight, pool, slots = loop.arguments()
    wanted, kept = [], pool
    for x in xs:
        out, kept = causal_conv1d_update(
            x, weight, None, kept, slots, activation="silu", backend="mosaic_gpu"
        )
        wanted.append(out)
    decode = jax.jit(loop.loop("mosaic_gpu"), donate_argnums=2)
    assert pool_copies(decode.lower(xs, weight, pool, slots).compile().as_text(), pool) == []
    new, outs = decode(xs, weight, pool + 0, slots)
    assert equal([new, outs], [kept, jnp.stack(wanted)])


def test_validate_is_refused_in_a_trace():
    with pytest.raises(Unsupported, match="validate"):
        jax.jit(functools.partial(causal_conv1d_fn, validate=True)).trace(**batch("causal_conv1d_fn"))
