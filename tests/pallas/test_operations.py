"""The JAX twin on a CPU: the XLA path, the kernels in Pallas' GPU interpreter, and what only JAX has (jit, donation)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import numerics, reference, tolerance
from pallas_impl import (
    ConvOutput,
    Unsupported,
    causal_conv1d_fn,
    causal_conv1d_update,
    config,
    prefill,
    short_rows,
    update,
)
from pallas_impl.call import interpreter
from pallas_impl.records import Arrays, Options
from tests.tools.races_jax import run_with_races

CPU_BACKENDS = ("xla", "mosaic_gpu_interpret")
SEED_LENGTHS = (1, 9, 2, 17, 4)


def rounded(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def prefill_problem(
    lengths, dim=128, width=4, dtype="bfloat16", pool_dtype=None, tail=3, spare=1, padding=(), seed=0
):
    """Arguments of causal_conv1d_fn with NaN wherever nothing may be read."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = int(starts[-1]) + tail
    slots = rng.permutation(batch + 2)[:batch].astype(np.int32)
    has = rng.integers(0, 2, batch).astype(bool)
    slots[list(padding)] = -1
    x = np.array(rounded(rng, (tokens, dim), dtype))
    x[starts[-1] :] = np.nan
    for row in padding:
        x[starts[row] : starts[row + 1]] = np.nan
    pool = np.full((batch + 2, width - 1 + spare, dim), np.nan, np.dtype(jnp.dtype(pool_dtype or dtype)))
    for row in range(batch):
        if has[row] and slots[row] >= 0:
            pool[slots[row], : width - 1] = rounded(rng, (width - 1, dim), pool.dtype)
    return dict(
        x=jnp.asarray(x), weight=rounded(rng, (dim, width), dtype), bias=rounded(rng, (dim,), dtype),
        conv_states=jnp.asarray(pool), query_start_loc=jnp.asarray(starts), cache_indices=jnp.asarray(slots),
        has_initial_state=jnp.asarray(has),
    )  # fmt: skip


def bits(array):
    array = np.asarray(array)
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def same_bits(got, expected):
    """Equal bits, where any NaN equals any NaN and -0 is not 0."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    nan = np.isnan(got.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.where(nan, 0, bits(got)), np.where(nan, 0, bits(expected)))


def check(result, op, problem, **options):
    """Judges out by the derived bound (bit for bit where products are exact) and the pool bit for bit."""
    host = {k: None if v is None else np.asarray(v) for k, v in problem.items()}
    expected = getattr(reference, op)(**host, **options)
    if problem["conv_states"] is None:
        assert result.conv_states is None
    else:
        same_bits(result.conv_states, expected.conv_states)
    activation = options.get("activation")
    wide = numerics.typed(host["x"]).dtype == "float32"
    if activation is None and not wide:
        same_bits(np.asarray(result.out), expected.out)
        return
    host = host | {k: v for k, v in options.items() if k == "pad_slot_id"}
    pre, computed = reference.preactivation(op, host)
    magnitude, _ = reference.preactivation(op, host, "magnitude")
    dtype = numerics.typed(host["x"]).dtype
    bound = tolerance.error_bound(pre, magnitude, host["weight"].shape[1], dtype, activation)
    got = np.asarray(result.out).astype(np.float64)
    exact = numerics.silu(pre) if activation else pre
    zero = np.where(got == 0, 0, np.inf)  # of padding rows and tokens after the last row
    worst = np.where(computed, tolerance.fraction_of_bound(got, exact, bound, dtype), zero)
    assert worst.max(initial=0) <= 1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        (dict(lengths=SEED_LENGTHS), None),
        (dict(lengths=SEED_LENGTHS, dtype="float32", padding=(3,)), "silu"),
        (dict(lengths=(3, 0, 40), width=8, pool_dtype="float32", tail=0), "swish"),
        (dict(lengths=(12, 1), dim=5, width=3, dtype="float16", spare=0), None),  # rows that TMA cannot address
        (dict(lengths=(2, 1), dim=136, width=2, pool_dtype="float16", padding=(0,)), None),
        (dict(lengths=(2, 3), width=1, padding=(1,)), "silu"),
    ],
)  # fmt: skip
def test_prefill_agrees_with_the_reference(backend, shape, activation):
    problem = prefill_problem(**shape)
    result = causal_conv1d_fn(**problem, activation=activation, backend=backend)
    assert isinstance(result, ConvOutput)
    check(result, "causal_conv1d_fn", problem, activation=activation)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "problem",
    [
        dict(bias=None, has_initial_state=None),
        dict(cache_indices=None),
        dict(conv_states=None, cache_indices=None, has_initial_state=None),
    ],
    ids=lambda absent: "-".join(absent),
)
def test_arguments_may_be_absent(backend, problem):
    problem = prefill_problem((1, 11), tail=1) | problem
    if problem["cache_indices"] is None and problem["conv_states"] is not None:
        problem["conv_states"] = jnp.zeros_like(problem["conv_states"]) + 1
    check(causal_conv1d_fn(**problem, backend=backend), "causal_conv1d_fn", problem)


def update_problem(batch, dim, width=4, seqlen=None, dtype="bfloat16", pool_dtype=None, slots=None, seed=1):
    rng = np.random.default_rng(seed)
    slots = rng.permutation(batch + 3)[:batch] if slots is None else slots
    pool = np.array(rounded(rng, (batch + 3, width, dim), pool_dtype or dtype))
    pool[[s for s in range(batch + 3) if s not in slots]] = np.nan
    pool[:, width - 1 :] = np.nan
    return dict(
        x=rounded(rng, (batch, dim) if seqlen is None else (batch, seqlen, dim), dtype),
        weight=rounded(rng, (dim, width), dtype), bias=rounded(rng, (dim,), dtype),
        conv_states=jnp.asarray(pool), cache_indices=jnp.asarray(slots, jnp.int32),
    )  # fmt: skip


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("shape", "activation"),
    [
        (dict(batch=5, dim=128, slots=[3, -1, 0, 99, 7]), None),
        (dict(batch=3, dim=256, dtype="float32", width=2), "silu"),
        (dict(batch=2, dim=128, seqlen=3, pool_dtype="float32"), "silu"),
        (dict(batch=2, dim=7, seqlen=2, dtype="float16", width=5), None),
        (dict(batch=2, dim=128, width=1, slots=[-1, 0]), None),
    ],
)
def test_update_agrees_with_the_reference(backend, shape, activation):
    problem = update_problem(**shape)
    result = causal_conv1d_update(**problem, activation=activation, backend=backend)
    check(result, "causal_conv1d_update", problem, activation=activation)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0, 0), (0, 4)])
def test_empty_sizes(backend, lengths):
    problem = prefill_problem(lengths, tail=0)
    check(causal_conv1d_fn(**problem, backend=backend), "causal_conv1d_fn", problem)
    for shape in [dict(batch=0, dim=128), dict(batch=2, dim=128, seqlen=0)]:
        problem = update_problem(**shape)
        check(causal_conv1d_update(**problem, backend=backend), "causal_conv1d_update", problem)


def in_interpreter(problem, conf, races=False):
    """The prefill kernel's result; with `races`, that and whether the detector saw one."""
    arrays, options = Arrays(**problem), Options(config=config.PrefillConfig(*conf))
    if races:
        return run_with_races(prefill.launch, arrays, options)
    launch = functools.partial(prefill.launch, options=options._replace(interpret=interpreter(True)))
    return jax.jit(launch)(arrays)


def test_schedules_and_block_sizes_give_the_same_bits():
    problem = prefill_problem((1, 9, 0, 35), dim=256, tail=19, padding=(1,))
    configs = [
        (True, 8, 256, 0, 0), (True, 16, 128, 0, 0), (False, 8, 128, 5, 3),
        (False, 16, 256, 1, 1),  # too few programs: they walk on along rows and tail
    ]  # fmt: skip
    for conf in configs:
        check(ConvOutput(*in_interpreter(problem, conf)), "causal_conv1d_fn", problem)


def test_many_rows_in_interleaved_streams():
    lengths = [1, 0, 2] * 20
    problem = prefill_problem(lengths, tail=9)
    conf = config.PrefillConfig(True, 8, 128, 0, 0)
    check(ConvOutput(*in_interpreter(problem, conf)), "causal_conv1d_fn", problem)


@pytest.mark.parametrize(
    "shape",
    [
        dict(dtype="float32", padding=(2,)),
        dict(width=8, dtype="float16", pool_dtype="float32", tail=0),
        dict(width=2, dim=256, pool_dtype="float16"),
        dict(width=1, padding=(3,)),
        dict(dim=136),  # channels that no tile divides
    ],
    ids=str,
)
def test_rows_of_one_token_under_flat(shape):
    problem = prefill_problem((1, 0, 1, 2, 1, 9, 1), **shape, seed=3)
    assert set(np.asarray(problem["has_initial_state"])[[0, 2, 4, 6]]) == {False, True}
    result = causal_conv1d_fn(**problem, activation="silu", schedule="flat", backend="mosaic_gpu_interpret")
    check(result, "causal_conv1d_fn", problem, activation="silu")


BORDERS = (3, *(5,) * 7, 1, 9, 2, 8, 4, 17, 1, 1)  # rows that lie in any way over the borders of tiles of 8
EMPTY = (*(0,) * 40, 2, *(0, 1, 0) * 6, *(0,) * 70, 3, 0)


@pytest.mark.parametrize("short_t", [8, 16])
@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        (BORDERS, dict(padding=(2, 9, 13))),
        (BORDERS, dict(width=2, dim=256, tail=0, dtype="float32")),
        (EMPTY, dict(padding=(40,), width=3)),
        (EMPTY, dict(width=8, tail=9, dtype="float16")),
        ((1,) * 37, dict(padding=(5, 30), dim=256)),  # more windows in a tile than there is room for
    ],
    ids=["borders", "borders-float32", "empty", "empty-wide", "one-token"],
)
def test_rows_of_few_tokens(lengths, shape, short_t):
    problem = prefill_problem(lengths, **shape, seed=7)
    problem["has_initial_state"] = (
        problem["has_initial_state"].at[jnp.asarray(shape.get("padding", ()), int)].set(True)
    )
    options = Options(
        config=config.PrefillConfig(True, 8, 128, 0, 0, short_t), silu=True, interpret=interpreter(True)
    )
    assert short_rows.takes(Arrays(**problem), options)
    result = jax.jit(functools.partial(short_rows.launch, options=options))(Arrays(**problem))
    check(ConvOutput(*result), "causal_conv1d_fn", problem, activation="silu")


def test_rows_of_few_tokens_have_no_data_races():
    problem = prefill_problem((1, 0, 1, 9, *(1,) * 12, 4), padding=(4,), seed=3)
    options = Options(config=config.PrefillConfig(True, 8, 128, 0, 0, 16))
    result, races = run_with_races(short_rows.launch, Arrays(**problem), options)
    check(ConvOutput(*result), "causal_conv1d_fn", problem)
    assert not races


def test_rows_of_few_tokens_with_anything_else_are_the_other_kernels():
    arrays = Arrays(**prefill_problem((1, 2)))
    options = Options(config=config.PrefillConfig(True, 8, 128, 0, 0, 8))
    assert short_rows.takes(arrays, options)
    others = [
        arrays._replace(residual=arrays.x), arrays._replace(conv_states=arrays.conv_states.astype("float32")),
        arrays._replace(weight=arrays.weight[:, :1]), arrays._replace(weight=arrays.weight[:120]),
        arrays._replace(document_marks=arrays.cache_indices),
    ]  # fmt: skip
    assert not any(short_rows.takes(other, options) for other in others)
    for change in [
        dict(state_layout="ring"), dict(own_state=False), dict(gates=(0, 128)), dict(heads=()),
        dict(config=config.PrefillConfig(True, 8, 128, 0, 0)),
    ]:  # fmt: skip
        assert not short_rows.takes(arrays, options._replace(**change))


@pytest.mark.parametrize("flat", [True, False])
def test_no_data_races(flat):
    problem = prefill_problem((3, 20), padding=())
    assert not in_interpreter(problem, (flat, 8, 128, 1, 1), races=True)[1]


def test_rows_of_one_token_have_no_data_races():
    problem = prefill_problem((1, 0, 1, 9, 1, 1), padding=(4,), seed=3)
    result, races = in_interpreter(problem, (True, 8, 128, 0, 0), races=True)
    check(ConvOutput(*result), "causal_conv1d_fn", problem)
    assert not races


def test_a_missing_wait_is_a_data_race(monkeypatch):
    """Shows that the detector sees this kernel: without its waits it races."""
    problem = prefill_problem((3, 20), padding=(), seed=5)
    monkeypatch.setattr(prefill.plgpu, "barrier_wait", lambda barrier: None)
    assert in_interpreter(problem, (True, 8, 128, 0, 0), races=True)[1]


@pytest.mark.parametrize("conf", [(5, 128, False), (2, 128, True), (1, 256, True)])
def test_update_has_no_data_races(conf):
    problem = update_problem(5, 256, slots=[0, 2, -1, 4, 1])
    options = Options(config=config.UpdateConfig(*conf))
    result, races = run_with_races(update.launch, Arrays(**problem), options)
    check(ConvOutput(*result), "causal_conv1d_update", problem)
    assert not races


def chunked(backend, dtype, cuts, lengths=(23,), dim=128):
    """One row prefilled in chunks, each chunk continuing from the slot; a chunk of one token is an update."""
    whole = prefill_problem(lengths, dim=dim, dtype=dtype, tail=0)
    pool, outs = whole["conv_states"], []
    for begin, end in zip((0, *cuts), (*cuts, lengths[0]), strict=True):
        x = whole["x"][begin:end]
        common = dict(
            weight=whole["weight"], bias=whole["bias"], conv_states=pool, activation="silu", backend=backend
        )
        if end - begin == 1 and begin:
            part = causal_conv1d_update(x, cache_indices=whole["cache_indices"], **common)
        else:
            has = whole["has_initial_state"] if begin == 0 else jnp.ones((1,), bool)
            starts = jnp.asarray([0, end - begin], jnp.int32)
            part = causal_conv1d_fn(
                x,
                query_start_loc=starts,
                cache_indices=whole["cache_indices"],
                has_initial_state=has,
                **common,
            )
        pool = part.conv_states
        outs.append(part.out)
    one = causal_conv1d_fn(**whole, activation="silu", backend=backend)
    return (jnp.concatenate(outs), pool), one


@pytest.mark.parametrize(
    ("backend", "dtype", "cuts"),
    [
        *(
            ("xla", dtype, cuts)
            for dtype in ("bfloat16", "float32")
            for cuts in [(1, 2, 11), range(2, 23), (22,)]
        ),
        ("mosaic_gpu_interpret", "float32", (2, 11, 12)),
    ],
)
def test_chunks_equal_the_whole_bit_for_bit(backend, dtype, cuts):
    (out, pool), one = chunked(backend, dtype, cuts)
    same_bits(out, one.out)
    same_bits(pool, one.conv_states)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_alone_equal_rows_in_a_batch_in_xla(dtype):
    problem = prefill_problem((5, 1, 30, 2), dtype=dtype, tail=0)
    together = causal_conv1d_fn(**problem, activation="silu", backend="xla")
    starts = np.asarray(problem["query_start_loc"])
    for row in range(4):
        alone = problem | dict(
            x=problem["x"][starts[row] : starts[row + 1]],
            query_start_loc=jnp.asarray([0, starts[row + 1] - starts[row]], jnp.int32),
            cache_indices=problem["cache_indices"][row : row + 1],
            has_initial_state=problem["has_initial_state"][row : row + 1],
        )
        result = causal_conv1d_fn(**alone, activation="silu", backend="xla")
        same_bits(result.out, together.out[starts[row] : starts[row + 1]])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(("xla", dtype) for dtype in ("int8", "uint8", "int16", "uint16", "uint32")),
        ("mosaic_gpu_interpret", "uint8"),
    ],
)
def test_slots_of_any_integer_dtype(backend, dtype):
    problem = prefill_problem((4, 2, 1), dim=128)
    signed = np.array([1, 4, 0])
    signed[1] = 77 if dtype.startswith("u") else -5  # out of range is padding
    problem["cache_indices"] = jnp.asarray(signed, dtype)
    problem["has_initial_state"] = jnp.asarray([False, True, False])
    check(causal_conv1d_fn(**problem, backend=backend), "causal_conv1d_fn", problem)


def test_wide_index_dtypes():
    with jax.enable_x64(True):
        problem = prefill_problem((4, 2, 1))
        problem["query_start_loc"] = problem["query_start_loc"].astype(jnp.int64)
        problem["cache_indices"] = jnp.asarray([1, 2**32, 0], jnp.int64)  # its low half would name slot 0
        problem["has_initial_state"] = jnp.asarray([False, False, False])
        for backend in CPU_BACKENDS:
            check(causal_conv1d_fn(**problem, backend=backend), "causal_conv1d_fn", problem)


@pytest.mark.parametrize(
    ("backend", "pad_slot_id"), [("xla", 0), ("xla", 2**40), ("xla", -7), ("mosaic_gpu_interpret", 0)]
)
def test_pad_slot_id_is_any_integer(backend, pad_slot_id):
    problem = prefill_problem((3, 2, 1), dim=24)  # rows that TMA cannot address: slots are renumbered
    problem["cache_indices"] = jnp.asarray([3, 0, 1], jnp.int32)
    problem["has_initial_state"] = jnp.asarray([False, False, False])
    check(
        causal_conv1d_fn(**problem, backend=backend, pad_slot_id=pad_slot_id),
        "causal_conv1d_fn", problem, pad_slot_id=pad_slot_id,
    )  # fmt: skip


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
def test_a_max_seqlen_that_is_too_small_skips_no_token(backend, schedule):
    problem = prefill_problem((30, 2))
    result = causal_conv1d_fn(**problem, backend=backend, schedule=schedule, max_seqlen=1)
    check(result, "causal_conv1d_fn", problem)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize("starts", [(7, 12, 5, 20), (0, -4, 50, 2**31 - 1)])
def test_bad_offsets_do_not_fault_or_touch_other_slots(backend, schedule, starts):
    problem = prefill_problem((4, 8, 8), tail=0)
    problem["query_start_loc"] = jnp.asarray(starts, jnp.int32)
    result = causal_conv1d_fn(**problem, backend=backend, schedule=schedule)
    named = np.asarray(problem["cache_indices"])
    others = [s for s in range(problem["conv_states"].shape[0]) if s not in named]
    same_bits(np.asarray(result.conv_states)[others], np.asarray(problem["conv_states"])[others])
    same_bits(np.asarray(result.conv_states)[:, 3:], np.asarray(problem["conv_states"])[:, 3:])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_under_jit(backend):
    problem = prefill_problem(SEED_LENGTHS)
    jitted = jax.jit(functools.partial(causal_conv1d_fn, activation="silu", backend=backend))
    eager = causal_conv1d_fn(**problem, activation="silu", backend=backend)
    result = jitted(**problem)
    same_bits(result.conv_states, eager.conv_states)
    check(result, "causal_conv1d_fn", problem, activation="silu")


@pytest.mark.parametrize("op", ["fn", "update"])
def test_a_donated_pool_is_not_copied(op):
    # float32, since the CPU compiler of JAX 0.10 copies a bfloat16 pool to scatter into it.
    pool = jnp.zeros((1000, 3, 128), jnp.float32)
    if op == "fn":
        problem = prefill_problem(SEED_LENGTHS) | dict(conv_states=pool)
        function = functools.partial(causal_conv1d_fn, backend="xla")
    else:
        problem = update_problem(4, 128) | dict(conv_states=pool)
        function = functools.partial(causal_conv1d_update, backend="xla")
    compiled = jax.jit(function, donate_argnames="conv_states").lower(**problem).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= pool.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < pool.nbytes
    assert pool_copies(compiled) == []
    # Without donation the pool must be copied: the search finds a copy where there is one.
    assert pool_copies(jax.jit(function).lower(**problem).compile())


def pool_copies(compiled):
    return re.findall(r"= f32\[1000,3,128\]\S* copy\(.*", compiled.as_text())


def test_the_caller_keeps_a_pool_that_is_not_donated():
    problem = prefill_problem(SEED_LENGTHS)
    before = np.asarray(problem["conv_states"]).copy()
    for backend in CPU_BACKENDS:
        causal_conv1d_fn(**problem, backend=backend)
        same_bits(problem["conv_states"], before)


@pytest.mark.parametrize(("schedule", "lower"), [("flat", False), ("auto", False), ("flat", True)])
def test_new_lengths_do_not_compile_again(schedule, lower):
    backend = "mosaic_gpu" if lower else "xla"
    traces = []

    def traced(*arguments):
        traces.append(1)
        return causal_conv1d_fn(*arguments, schedule=schedule, backend=backend)

    rng = np.random.default_rng(0)
    jitted = jax.jit(traced)
    for _ in range(20 if lower else 200):
        lengths = rng.multinomial(30, [1 / 6] * 6)
        problem = prefill_problem(lengths, tail=2)
        if lower:
            jitted.trace(*problem.values()).lower(lowering_platforms=("cuda",))
        else:
            jitted(*problem.values())
    assert len(traces) == 1


def test_flat_does_not_compile_again_for_a_new_max_seqlen():
    assert config.prefill_config(4096, 8192, 64, 100, "flat") == config.prefill_config(
        4096, 8192, 64, 200, "flat"
    )


def test_mosaic_gpu_by_name_is_refused_on_a_cpu():
    problem = prefill_problem((2,))
    with pytest.raises(Unsupported, match=r"^backend: 'mosaic_gpu' needs an NVIDIA GPU"):
        causal_conv1d_fn(**problem, backend="mosaic_gpu")
    step = update_problem(2, 128)
    with pytest.raises(Unsupported, match=r"^backend: 'mosaic_gpu' needs an NVIDIA GPU"):
        causal_conv1d_update(**step, backend="mosaic_gpu")


def test_errors_of_the_contract_come_first():
    problem = prefill_problem((2,))
    with pytest.raises(ValueError, match=r"^backend: expected one of \('auto', 'mosaic_gpu', .*got 'cuda'"):
        causal_conv1d_fn(**problem, backend="cuda")
    with pytest.raises(ValueError, match=r"^weight: expected width 1 to 8"):
        causal_conv1d_fn(**(problem | dict(weight=jnp.zeros((128, 9), jnp.bfloat16))))
    with pytest.raises(TypeError, match=r"^max_seqlen: expected an integer known on the host"):
        jax.jit(lambda n: causal_conv1d_fn(**problem, max_seqlen=n))(3)


def test_validate_reads_and_names_row_and_value():
    problem = prefill_problem((2, 3))
    bad = problem | dict(query_start_loc=jnp.asarray([0, 4, 3], jnp.int32))
    with pytest.raises(
        ValueError, match=r"^query_start_loc: expected row 1 to end between its start 4 .* got 3"
    ):
        causal_conv1d_fn(**bad, validate=True)
    bad = problem | dict(cache_indices=jnp.asarray([1, 44], jnp.int32))
    with pytest.raises(ValueError, match=r"^cache_indices: .* in row 1, got 44"):
        causal_conv1d_fn(**bad, validate=True)
    step = update_problem(2, 128, slots=[1, 1])
    with pytest.raises(ValueError, match=r"^cache_indices: expected distinct slots for live rows, got 1"):
        causal_conv1d_update(**step, validate=True)
    with pytest.raises(Unsupported, match=r"^validate: expected concrete arrays"):
        jax.jit(functools.partial(causal_conv1d_fn, validate=True))(**problem)
    check(causal_conv1d_fn(**problem, validate=True), "causal_conv1d_fn", problem)


def test_numpy_arrays_are_taken():
    problem = {k: np.asarray(v) for k, v in prefill_problem((2, 5), dtype="float32").items()}
    check(causal_conv1d_fn(**problem), "causal_conv1d_fn", problem)


@pytest.mark.parametrize("dim", [1, 3, 100, 127, 128, 200, 384, 1280, 4352, 8192])
def test_tiles_cover_every_channel_once(dim):
    for itemsizes in [(2,), (4,), (2, 4)]:
        wide = config.tma_dim(dim, itemsizes)
        assert wide >= max(dim, 128)
        assert all(wide * size % 16 == 0 for size in itemsizes)
        assert wide - dim < 8 or wide == 128
        if dim % 8 == 0 and dim >= 128:
            assert wide == dim
    conf = config.prefill_config(1000, dim, 4, None, "auto")
    columns = config.prefill_grid(conf, 1000, dim, 4).columns
    assert (columns - 1) * conf.block_d < dim <= columns * conf.block_d


@pytest.mark.parametrize("tokens", [1, 7, 8, 33, 1000, 65536])
@pytest.mark.parametrize("batch", [1, 5, 256])
def test_every_block_has_a_program(tokens, batch):
    for schedule in ("flat", "per_sequence", "auto"):
        conf = config.prefill_config(tokens, 2048, batch, None, schedule)
        grid = config.prefill_grid(conf, tokens, 2048, batch)
        assert conf.block_t >= 8
        assert conf.block_t & (conf.block_t - 1) == 0
        if conf.flat:
            assert grid.blocks % config.STREAMS == 0
            assert grid.blocks >= tokens // conf.block_t + batch + 1
        else:
            assert conf.row_blocks * conf.block_t >= tokens
        assert schedule == "auto" or conf.flat == (schedule == "flat")


@pytest.mark.parametrize("dim", [128, 136, 200, 256, 384, 1152, 2048, 8192])
@pytest.mark.parametrize("batch", [1, 16, 256, 1024])
def test_decode_tiles(batch, dim):
    conf = config.update_config(batch, dim)
    assert conf.in_registers == (dim % 128 == 0)
    assert conf.block_d in ((128, 256, 512) if conf.in_registers else (128, 256))
    assert dim % conf.block_d == 0 or not conf.in_registers
    assert conf.rows == 1 or batch * dim >= 1 << 20


def test_auto_takes_per_sequence_only_where_its_grid_is_not_wasteful():
    flat = lambda *sizes: config.prefill_config(*sizes, "auto").flat  # noqa: E731
    assert not flat(32768, 2048, 1, None)  # one row
    assert not flat(16384, 8192, 8, 2048)  # equal rows, known on the host
    assert flat(16384, 8192, 8, None)  # lengths unknown
    assert flat(16639, 8192, 256, 16384)  # skew


def test_auto_takes_tokens_whatever_rows_they_are_of_where_many_rows_are_short():
    short = lambda *sizes, schedule="auto": config.prefill_config(*sizes, schedule).short_t  # noqa: E731
    assert short(4096, 8192, 4096, 1) == short(1024, 2048, 1024, None) == 8
    assert short(7500, 1280, 1500, 5) == short(1280, 8192, 257, 1024) == 16
    assert short(12000, 2048, 1000, 12) == 16
    assert not short(12000, 2048, 1000, None)
    assert not short(576, 8192, 65, 512)  # a chunk and few others
    assert not short(33, 8192, 5, 17)  # little work
    assert not short(16384, 8192, 8, 2048)
    assert not short(4096, 8192, 4096, 1, schedule="flat")
    assert not short(4096, 8192, 4096, 1, schedule="per_sequence")
