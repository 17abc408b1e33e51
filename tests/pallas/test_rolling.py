"""The JAX twin's decode steps of packed rows and of rolling slots, on a CPU and lowered for CUDA."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import numerics, reference
from pallas_impl import Unsupported, causal_conv1d_fn, causal_conv1d_update, verify
from pallas_impl.records import Arrays, Options
from tests.tools.races_jax import run_with_races

BACKENDS = ("xla", "mosaic_gpu_interpret")


def normal(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def step(
    lengths,
    counts=None,
    dim=128,
    width=4,
    dtype="bfloat16",
    pool_dtype=None,
    columns=9,
    tail=0,
    padding=(),
    dense=False,
):
    """Arguments of a step with NaN wherever nothing may be read; `dense`: x has three axes, or two for one token."""
    rng = np.random.default_rng(sum(lengths))
    batch, starts = len(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    slots = rng.permutation(batch + 2)[:batch].astype(np.int32)
    slots[list(padding)] = -1
    x = np.array(normal(rng, (int(starts[-1]) + tail, dim), dtype))
    x[starts[-1] :] = np.nan
    pool = np.full((batch + 2, columns, dim), np.nan, np.dtype(jnp.dtype(pool_dtype or dtype)))
    for row in range(batch):
        first = 0 if counts is None else min(max(counts[row], 1), columns - width + 2) - 1
        if slots[row] >= 0:
            pool[slots[row], first : first + width - 1] = normal(rng, (width - 1, dim), dtype)
    arguments = dict(
        x=jnp.asarray(x), weight=normal(rng, (dim, width), dtype), bias=normal(rng, (dim,), dtype),
        conv_states=jnp.asarray(pool), cache_indices=jnp.asarray(slots),
    )  # fmt: skip
    if dense:
        shape = (batch, dim) if lengths[0] == 1 else (batch, lengths[0], dim)
        arguments["x"] = arguments["x"].reshape(shape)
    else:
        arguments["query_start_loc"] = jnp.asarray(starts)
    if counts is not None:
        arguments["num_accepted_tokens"] = jnp.asarray(counts, jnp.int32)
    return arguments


def bound(arguments):
    """max_seqlen, where a step needs it."""
    packed = "query_start_loc" in arguments and "num_accepted_tokens" in arguments
    return {"max_seqlen": int(np.diff(arguments["query_start_loc"]).max())} if packed else {}


def same_bits(got, expected):
    got, expected = numerics.typed(np.asarray(got)), numerics.typed(expected)
    assert got.dtype == expected.dtype
    nan = numerics.is_nan(got.bits, got.dtype) & numerics.is_nan(expected.bits, expected.dtype)
    np.testing.assert_array_equal(np.where(nan, 0, got.bits), np.where(nan, 0, expected.bits))


def check(arguments, backend, **options):
    """16-bit values and no activation: products are exact, so every bit is the oracle's float32 sum."""
    options = bound(arguments) | options
    host = {name: None if a is None else np.asarray(a) for name, a in arguments.items()}
    expected = reference.causal_conv1d_update(**host, **options)
    function = functools.partial(causal_conv1d_update, backend=backend, **options)
    result = jax.jit(function)(**arguments)
    sums, _ = reference.preactivation("causal_conv1d_update", host | options, "float32")
    dtype = numerics.typed(host["x"]).dtype
    same_bits(result.out, numerics.from_bits(numerics.round_bits(sums, dtype), dtype))
    same_bits(result.conv_states, expected.conv_states)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(lengths=(2, 0, 5, 1), counts=(3, 2, 1, 7), tail=9, padding=(2,)),
        dict(lengths=(10, 17), counts=(1, 9), dim=264, width=2, columns=20, pool_dtype="float32"),  # several blocks
        dict(lengths=(2, 2, 2), counts=(1, 2, 3), dtype="float16", width=8, columns=12, dense=True),
        dict(lengths=(1, 1, 1), counts=(1, 4, 2), dim=5, dense=True),  # rows that TMA cannot address
        dict(lengths=(1, 3), counts=(2, 1), width=1, columns=0, tail=3),
        dict(lengths=(2, 0, 5, 1), tail=3, padding=(0,)),  # packed, all tokens committed
    ],
    ids=str,
)  # fmt: skip
def test_a_step_equals_the_reference(sizes, backend):
    check(step(**sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_are_clamped_to_what_a_slot_can_hold(backend):
    arguments = step((2, 2, 2), (0, 6, -(2**31)), columns=6, padding=(1,))
    check(arguments, backend)
    check(arguments | {"num_accepted_tokens": jnp.asarray([2**31 - 1, 0, 1], jnp.int32)}, backend)


@pytest.mark.parametrize("dtype", ["int8", "uint32"])
def test_counts_of_any_integer_dtype(dtype):
    arguments = step((2, 1), (3, 1), columns=300)  # a slot holds more than an int8 counts
    for backend in BACKENDS:
        check(arguments | {"num_accepted_tokens": jnp.asarray([3, 1], dtype)}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_longer_than_promised_stay_in_their_slots(backend):
    arguments = step((9, 30), (1, 2), columns=5)
    result = causal_conv1d_update(**arguments, max_seqlen=2, backend=backend)
    others = np.setdiff1d(np.arange(4), arguments["cache_indices"])
    same_bits(result.conv_states[others], np.asarray(arguments["conv_states"][others]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_acceptance_equals_the_plain_run(backend):
    """Verify 3 drafts, accept some, go on: the bits of a run that never guessed."""
    rng = np.random.default_rng(0)
    dim, width = 128, 4
    shared = dict(weight=normal(rng, (dim, width), "bfloat16"), bias=None)
    x = normal(rng, (9, dim), "bfloat16")
    starts, no = jnp.asarray([0, 9], jnp.int32), jnp.asarray([False])
    blank = jnp.full((1, 6, dim), jnp.nan, "bfloat16")
    options = dict(backend="xla")
    whole = causal_conv1d_fn(
        x, **shared, conv_states=blank, query_start_loc=starts, has_initial_state=no, **options
    )
    head = causal_conv1d_fn(
        x[:2],
        **shared,
        conv_states=blank,
        query_start_loc=starts.clip(max=2),
        has_initial_state=no,
        **options,
    )
    verify = jax.jit(functools.partial(causal_conv1d_update, backend=backend))
    for accepted in (1, 2, 3, 4) if backend == "xla" else (3,):
        garbage = jnp.full((4 - accepted, dim), jnp.nan, "bfloat16")
        drafts = jnp.concatenate([x[2 : 2 + accepted], garbage])[None]
        first = verify(
            drafts, **shared, conv_states=head.conv_states, num_accepted_tokens=jnp.ones(1, "int32")
        )
        out, done, count, pool = list(first.out[0, :accepted]), 2 + accepted, accepted, first.conv_states
        while done < 9:  # plain tokens through the rolling step; after one of them the count is 1
            counts = jnp.asarray([count], jnp.int32)
            last = verify(x[None, done], **shared, conv_states=pool, num_accepted_tokens=counts)
            out, done, count, pool = [*out, last.out[0]], done + 1, 1, last.conv_states
        same_bits(np.stack(out), np.asarray(whole.out[2:]))
        same_bits(pool[:, : width - 1], np.asarray(whole.conv_states[:, : width - 1]))


def races_in_interpreter(arguments):
    """Runs the kernel with the race detector on; returns its result and whether there were races."""
    arrays = Arrays(**{name: array for name, array in arguments.items() if name in Arrays._fields})
    return run_with_races(verify.launch, arrays, Options())


def test_a_rolling_step_has_no_data_races(monkeypatch):
    arguments = step((2, 0, 11, 1), (3, 2, 1, 7), columns=16, tail=3)
    (out, pool, _), races = races_in_interpreter(arguments)
    host = {name: np.asarray(a) for name, a in arguments.items()}
    expected = reference.causal_conv1d_update(**host, max_seqlen=11)
    same_bits(out, expected.out)
    same_bits(pool, expected.conv_states)
    assert not races
    monkeypatch.setattr(verify.plgpu, "barrier_wait", lambda barrier: None)
    assert races_in_interpreter(step((3,), (1,), columns=6))[1], "the detector does not see a missing wait"


def test_a_donated_pool_is_updated_in_place():
    arguments = step((2, 1, 3), (1, 3, 2))
    function = functools.partial(causal_conv1d_update, backend="xla", max_seqlen=3)
    kept = jax.jit(function)(**arguments)
    donated = jax.jit(function, donate_argnames="conv_states")
    memory = donated.lower(**arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= arguments["conv_states"].nbytes
    pool = arguments["conv_states"]
    same_bits(donated(**arguments).conv_states, np.asarray(kept.conv_states))
    assert pool.is_deleted()


def test_new_lengths_and_counts_need_no_compilation():
    function = jax.jit(functools.partial(causal_conv1d_update, backend="xla", max_seqlen=4))
    for lengths, counts in (((4, 1), (1, 2)), ((0, 2), (3, 3)), ((2, 2), (1, 1))):
        arguments = step(lengths, counts, tail=5 - sum(lengths))
        function(**arguments)
    assert function._cache_size() == 1


def test_validate_reads_offsets_and_counts():
    arguments = step((2, 1), (1, 2), columns=5)
    good = functools.partial(causal_conv1d_update, validate=True, max_seqlen=3)
    good(**arguments)
    for name, bad, message in (
        ("query_start_loc", [0, 2, 1], "row 1 to end between"),
        ("num_accepted_tokens", [0, 1], "expected 1 to 3"),
        ("num_accepted_tokens", [1, 4], "in row 1, got 4"),
    ):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            good(**arguments | {name: jnp.asarray(bad, jnp.int32)})
    with pytest.raises(ValueError, match="max_seqlen"):
        causal_conv1d_update(**arguments, validate=True, max_seqlen=1)
    with pytest.raises(Unsupported, match=r"cache_indices"):
        jax.jit(good)(**arguments)


def lowered(arguments, **options):
    options = bound(arguments) | options
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arguments.items()}
    function = jax.jit(functools.partial(causal_conv1d_update, backend="mosaic_gpu", **options))
    return function.trace(**shapes).lower(lowering_platforms=("cuda",)).as_text()


def operations(text):
    """What is run; a reshape and a barrier move nothing."""
    found = [called or name for name, called in re.findall(r"(?<!#)stablehlo\.(\w+)(?: @(\w+))?", text)]
    return [name for name in found if name not in ("reshape", "optimization_barrier")]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "sizes", [dict(lengths=(4,) * 5, dense=True), dict(lengths=(4, 1, 2), tail=5)], ids=str
)
def test_a_rolling_step_is_one_kernel_that_writes_the_pool_in_place(sizes, activation):
    text = lowered(step(**sizes, counts=(1,) * len(sizes["lengths"]), dim=512), activation=activation)
    assert operations(text) == ["mosaic_gpu_v2"]
    # Outputs: out, pool. The pool is the last operand.
    operand = 5 if sizes.get("dense") else 6
    assert re.search(rf"output_tuple_indices = \[1\], operand_index = {operand},", text)


def test_a_packed_step_is_one_kernel():
    assert operations(lowered(step((4, 1, 2), dim=512))) == ["mosaic_gpu_v2"]


@pytest.mark.parametrize(
    "sizes",
    [
        *(dict(width=width) for width in range(1, 9)),
        *(dict(dim=dim) for dim in (1, 100, 136, 4352)),
        dict(dtype="float32", pool_dtype="bfloat16", dim=256),
        dict(dtype="float16", pool_dtype="float32", width=3),
        dict(dense=True, lengths=(1, 1, 1)),
    ],
    ids=str,
)
def test_every_size_lowers(sizes):
    arguments = step(**dict(lengths=(3, 1, 2), counts=(1, 2, 3), columns=12) | sizes)
    assert "mosaic_gpu" in lowered(arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        dict(dim=8192),
        dict(dim=8192, rolls=False),
        dict(dim=264, width=2),
        dict(dim=136, width=8, dtype="float16"),
        dict(dim=100, width=3),
        dict(dim=1, width=1),
    ],
    ids=str,
)
def test_compiled_steps_equal_xla_bit_for_bit(sizes):
    sizes = dict(sizes)
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 5, 64)
    counts = rng.integers(-1, 7, 64).tolist() if sizes.pop("rolls", True) else None
    arguments = step(lengths.tolist(), counts, columns=12, tail=9, padding=(3, 40), **sizes)
    expected, result = (
        jax.jit(functools.partial(causal_conv1d_update, backend=backend, **bound(arguments)))(**arguments)
        for backend in ("xla", "mosaic_gpu")
    )
    same_bits(result.out, np.asarray(expected.out))
    same_bits(result.conv_states, np.asarray(expected.conv_states))


@pytest.mark.gpu
def test_compiled_rows_longer_than_promised_stay_in_their_slots():
    arguments = step((9, 30), (1, 2), columns=5)
    result = jax.jit(functools.partial(causal_conv1d_update, max_seqlen=2, backend="mosaic_gpu"))(**arguments)
    others = np.setdiff1d(np.arange(4), arguments["cache_indices"])
    same_bits(result.conv_states[others], np.asarray(arguments["conv_states"][others]))
