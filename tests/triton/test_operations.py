"""The Triton kernels in Triton's interpreter, and the eager path: what only this twin has, beside the conformance suite."""

import numpy as np
import pytest
import torch
import triton

import triton_impl
from oracle import numerics, reference, tolerance
from oracle.contract import FnCall, Unsupported, UpdateCall
from triton_impl import call as calls
from triton_impl import config, prefill, update, verify

LENGTHS = (1, 9, 2, 17, 0, 4)
SLOTS = (3, 0, -1, 5, 2, 20)
HAS = (True, False, True, True, True, True)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def seeded(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def batch(dim=24, width=4, dtype=torch.bfloat16, lengths=LENGTHS, tail=3, state_len=None, num_slots=8):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return dict(
        x=seeded(int(offsets[-1]) + tail, dim, dtype=dtype),
        weight=seeded(dim, width, dtype=dtype, seed=1),
        bias=seeded(dim, dtype=dtype, seed=2),
        conv_states=seeded(
            num_slots, width - 1 if state_len is None else state_len, dim, dtype=dtype, seed=3
        ),
        query_start_loc=torch.tensor(offsets, dtype=torch.int32),
        cache_indices=torch.tensor(SLOTS[: len(lengths)], dtype=torch.int64),
        has_initial_state=torch.tensor(HAS[: len(lengths)], dtype=torch.bool),
    )


def run_fn(arguments, **options):
    arguments = dict(arguments)
    if arguments["conv_states"] is not None:
        arguments["conv_states"] = arguments["conv_states"].clone(memory_format=torch.preserve_format)
    options = {"activation": "silu", "backend": "triton"} | options
    return triton_impl.causal_conv1d_fn(**arguments, **options)


def to_numpy(tensor):
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        return numerics.TypedArray("bfloat16", tensor.contiguous().view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()


def assert_right(arguments, result, activation="silu"):
    """`result` lies within the derived bound of the oracle, its states are bit-exact."""
    plain = {name: to_numpy(value) for name, value in arguments.items()}
    expected = reference.causal_conv1d_fn(**plain, activation=activation)
    pre, _ = reference.preactivation("causal_conv1d_fn", plain)
    size, _ = reference.preactivation("causal_conv1d_fn", plain, order="magnitude")
    dtype = DTYPES[result.out.dtype]
    bound = tolerance.error_bound(pre, size, arguments["weight"].shape[1], dtype, activation)
    exact = numerics.silu(pre) if activation else pre
    fraction = tolerance.fraction_of_bound(result.out.double().numpy(), exact, bound, dtype)
    assert fraction.max() <= 1, f"{fraction.max()} of the bound"
    if arguments["conv_states"] is not None:
        got, want = numerics.typed(to_numpy(result.conv_states)), numerics.typed(expected.conv_states)
        assert np.array_equal(got.bits, want.bits)


@pytest.mark.parametrize("schedule", ["per_sequence", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
@pytest.mark.parametrize("width", range(1, 9))
def test_prefill_against_the_oracle(width, dtype, schedule):
    arguments = batch(width=width, dtype=dtype, state_len=width + 1)
    assert_right(arguments, run_fn(arguments, schedule=schedule))


@pytest.mark.parametrize("dim", [1, 5, 16, 33, 640])
def test_any_dim(dim):
    arguments = batch(dim=dim)
    assert_right(arguments, run_fn(arguments))


LAYOUTS = {
    "channel-first": lambda x: x.t().contiguous().t(),
    "slice": lambda x: torch.cat([x, x, x], dim=1)[:, x.shape[1] : 2 * x.shape[1]],
    "every other token": lambda x: torch.stack([x, x], dim=1).flatten(0, 1)[::2],
    "every other channel": lambda x: torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2],
}


@pytest.mark.parametrize("schedule", ["per_sequence", "flat"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_of_x_do_not_change_a_bit(layout, schedule):
    arguments = batch(dim=37)
    plain = run_fn(arguments)
    viewed = run_fn(arguments | {"x": layout(arguments["x"])}, schedule=schedule)
    assert torch.equal(viewed.out, plain.out)
    assert torch.equal(viewed.conv_states, plain.conv_states)


def test_channel_first_output_keeps_the_layout():
    x = LAYOUTS["channel-first"](batch()["x"])
    assert run_fn(batch() | {"x": x}).out.stride() == x.stride()


POOLS = {
    "[slots, dim, state_len] memory": lambda p: p.transpose(1, 2).contiguous().transpose(1, 2),
    "pages": lambda p: torch.cat([p, torch.full_like(p, torch.nan)], dim=1)[:, : p.shape[1]],
    "[state_len, slots, dim] memory": lambda p: p.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", POOLS.values(), ids=POOLS)
def test_strides_of_the_pool_do_not_change_a_bit(layout):
    arguments = batch()
    plain = run_fn(arguments)
    pool = layout(arguments["conv_states"])
    out, same = triton_impl.causal_conv1d_fn(
        **arguments | {"conv_states": pool}, activation="silu", backend="triton"
    )
    assert same is pool
    assert torch.equal(out, plain.out)
    assert torch.equal(pool, plain.conv_states)


def test_weight_and_bias_of_any_stride():
    arguments = batch()
    plain = run_fn(arguments)
    weight = arguments["weight"].t().contiguous().t()
    bias = torch.stack([arguments["bias"]] * 2, dim=1)[:, 0]
    misaligned = torch.cat([weight.new_zeros(1), arguments["weight"].flatten()])[1:].view_as(weight)
    for other in (arguments | {"weight": weight, "bias": bias}, arguments | {"weight": misaligned}):
        assert torch.equal(run_fn(other).out, plain.out)


@pytest.mark.parametrize("index_dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_index_dtypes_and_strides(index_dtype):
    arguments = batch()
    plain = run_fn(arguments)
    slots = arguments["cache_indices"].clone()
    if index_dtype == torch.uint8:
        slots[slots < 0] = 255  # out of range, so padding as well
    table = torch.full((len(LENGTHS), 3), 7, dtype=index_dtype)
    table[:, 0] = slots
    result = run_fn(
        arguments | {"cache_indices": table[:, 0], "query_start_loc": arguments["query_start_loc"].long()}
    )
    assert torch.equal(result.out, plain.out)
    assert torch.equal(result.conv_states, plain.conv_states)


MIXED = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(("x", "weight", "pool"), MIXED)
def test_mixed_dtypes(x, weight, pool, backend):
    arguments = batch()
    arguments["x"] = arguments["x"].to(x)
    arguments["weight"] = arguments["weight"].to(weight)
    arguments["conv_states"] = arguments["conv_states"].to(pool)
    assert_right(arguments, run_fn(arguments, backend=backend))


@pytest.mark.parametrize("activation", [None, "swish"])
def test_eager_equals_the_oracle(activation):
    arguments = batch(state_len=5)
    assert_right(arguments, run_fn(arguments, backend="eager", activation=activation), activation)


def test_a_max_seqlen_that_is_too_small_skips_no_token():
    arguments = batch()
    plain = run_fn(arguments)
    for max_seqlen in (0, 1, 8):
        result = run_fn(arguments, schedule="per_sequence", max_seqlen=max_seqlen)
        assert torch.equal(result.out, plain.out)
        assert torch.equal(result.conv_states, plain.conv_states)


CONFIGS = [
    config.PrefillConfig(flat, True, block_t, block_d, group, 3, search, 1, stages)
    for flat in (True, False)
    for block_t, block_d, group, search, stages in [
        (4, 16, 4, 2, 1),
        (8, 16, 4, 2, 1),
        (16, 64, 8, 4, 3),
        (64, 32, 8, 32, 1),
    ]
] + [config.PrefillConfig(True, False, 16, 16, 8, 3, 32, 4)]


@pytest.mark.parametrize("chosen", CONFIGS)
def test_block_sizes_do_not_change_a_bit(chosen):
    """The search is made to take several steps: 6 rows with 2 or 4 candidates at a time."""
    arguments = batch()
    plain = run_fn(arguments)
    pool, out = arguments["conv_states"].clone(), torch.empty_like(arguments["x"])
    call = FnCall(**arguments | {"conv_states": pool}, activation="silu")
    launch = prefill.prepare(call, call.check(), chosen, stores=True)
    launch(*(getattr(call, name) for name in prefill.ARRAYS), out)
    assert torch.equal(out, plain.out)
    assert torch.equal(pool, plain.conv_states)


@pytest.mark.parametrize("chosen", [config.UpdateConfig(1, 16, 1), config.UpdateConfig(4, 32, 2)])
@pytest.mark.parametrize(("seqlen", "module"), [(1, update), (1, verify), (5, verify)])
def test_update_blocks_do_not_change_a_bit(chosen, seqlen, module):
    x, weight, bias, pool = seeded(6, seqlen, 24), seeded(24, 4), seeded(24), seeded(8, 4, 24)
    slots = torch.tensor(SLOTS)
    plain = triton_impl.causal_conv1d_update(x, weight, bias, pool.clone(), slots, backend="triton")
    out = torch.empty_like(x)
    call = UpdateCall(x, weight, bias, pool, slots)
    launch = module.prepare(call, call.check(), chosen)
    launch(*(getattr(call, name) for name in module.ARRAYS), out)
    assert torch.equal(out, plain.out)
    assert torch.equal(pool, plain.conv_states)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())
def test_any_split_equals_the_whole(dtype, backend):
    """One prefill = two chunks at every split = a chain of updates = one update of several tokens, in every bit."""
    x, weight, bias = seeded(9, 20, dtype=dtype), seeded(20, 4, dtype=dtype), seeded(20, dtype=dtype)
    options = dict(activation="silu", backend=backend)

    def chunk(x, pool, has):
        offsets, flags = torch.tensor([0, x.shape[0]]), torch.tensor([has])
        return triton_impl.causal_conv1d_fn(x, weight, bias, pool, offsets, None, flags, **options).out

    whole_pool = torch.full((1, 3, 20), torch.nan, dtype=dtype)
    whole = chunk(x, whole_pool, False)
    for split in range(1, 9):
        pool = torch.full_like(whole_pool, torch.nan)
        parts = [chunk(x[:split], pool, False), chunk(x[split:], pool, True)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(pool, whole_pool)

        pool = torch.full_like(whole_pool, torch.nan)
        parts = [chunk(x[:split], pool, False)]
        parts += [
            triton_impl.causal_conv1d_update(t[None], weight, bias, pool, **options).out for t in x[split:]
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(pool, whole_pool)

        pool = torch.full_like(whole_pool, torch.nan)
        parts = [chunk(x[:split], pool, False)]
        parts.append(triton_impl.causal_conv1d_update(x[None, split:], weight, bias, pool, **options).out[0])
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(pool, whole_pool)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize("schedule", ["per_sequence", "flat"])
def test_bad_index_data_touches_nothing_outside(backend, schedule):
    """Offsets and slots of any value: no fault, guard rows around every tensor stay as they were."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(12):
        guarded_x = torch.full((40, 16), 7.0)
        guarded_pool = torch.full((12, 3, 16), 7.0)
        x, pool = guarded_x[8:32], guarded_pool[4:8]
        offsets = torch.randint(-50, 80, (6,), generator=generator, dtype=torch.int64)
        offsets[1] = 2**40 if offsets[1] % 2 else -(2**40)
        slots = torch.randint(-3, 7, (5,), generator=generator)
        slots[0] = 2**62
        has = torch.randint(0, 2, (5,), generator=generator).bool()
        triton_impl.causal_conv1d_fn(
            x, seeded(16, 4), None, pool, offsets, slots, has, backend=backend, schedule=schedule
        )
        assert bool((guarded_x == 7).all())
        assert bool((guarded_pool[:4] == 7).all())
        assert bool((guarded_pool[8:] == 7).all())


def test_no_sequences_and_no_tokens():
    empty = batch(lengths=(), tail=5)
    for backend in ("triton", "eager"):
        result = run_fn(empty, backend=backend)
        assert bool((result.out == 0).all())
        assert torch.equal(result.conv_states, empty["conv_states"])
        nothing = batch(lengths=(0, 0), tail=0)
        result = run_fn(nothing, backend=backend)
        assert result.out.shape == (0, 24)
        assert torch.equal(result.conv_states, nothing["conv_states"])


def test_without_a_pool():
    arguments = batch() | {"conv_states": None, "cache_indices": None, "has_initial_state": None}
    for backend in ("triton", "eager"):
        result = run_fn(arguments, backend=backend)
        assert result.conv_states is None
        assert_right(arguments, result)


def test_validate_reads_the_values_before_anything_is_written():
    arguments = batch()
    bad = arguments | {"cache_indices": torch.tensor([3, 3, -1, 5, 2, 1])}
    pool = arguments["conv_states"].clone()
    with pytest.raises(
        ValueError, match="cache_indices: expected distinct slots for live rows, got 3 in rows 0 and 1"
    ):
        triton_impl.causal_conv1d_fn(**bad | {"conv_states": pool}, backend="triton", validate=True)
    slots = torch.tensor([3, 0, -1, 5, 2, 1])
    with pytest.raises(ValueError, match="max_seqlen: expected at least 17, the length of row 3, got 16"):
        triton_impl.causal_conv1d_fn(
            **bad | {"conv_states": pool, "cache_indices": slots},
            backend="eager",
            validate=True,
            max_seqlen=16,
        )
    with pytest.raises(
        ValueError, match=r"cache_indices: expected pad_slot_id=-1 or a slot in \[0, 8\) in row 1, got 9"
    ):
        triton_impl.causal_conv1d_update(
            seeded(2, 24, dtype=torch.bfloat16),
            bad["weight"],
            None,
            pool,
            torch.tensor([1, 9]),
            validate=True,
        )
    assert torch.equal(pool, arguments["conv_states"])


def test_devices_and_backends():
    arguments = batch()
    with pytest.raises(ValueError, match="weight: expected a tensor on x's device cpu, got meta"):
        run_fn(arguments | {"weight": arguments["weight"].to("meta")})
    with pytest.raises(
        ValueError, match=r"backend: expected one of \('auto', 'triton', 'eager'\), got 'cuda'"
    ):
        run_fn(arguments, backend="cuda")


def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    calls.forget()
    with pytest.raises(Unsupported, match="backend: 'triton' runs on CUDA"):
        run_fn(batch())
    assert_right(batch(), run_fn(batch(), backend="auto"))


def test_a_prepared_call_is_not_reused_where_a_check_would_fail():
    arguments = batch()
    run_fn(arguments)
    for name, wrong in {
        "bias": torch.zeros(23),
        "weight": torch.zeros(24),
        "cache_indices": torch.zeros(5),
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"{name}: expected"):
            run_fn(arguments | {name: wrong})


def test_config_is_small_for_small_batches_and_flat_for_skew():
    def chosen(**sizes):
        return config.prefill_config(
            **{"tokens": 16384, "dim": 8192, "batch": 8, "width": 4, "walk": True} | sizes
        )

    assert chosen().block_t == 16
    assert chosen().group == 16, "long rows: one group a block"
    assert chosen(tokens=2176, batch=129).group == 8, "short rows: fewer registers"
    assert chosen(tokens=33, batch=5).block_t == 4
    assert chosen(max_seqlen=2048).flat
    assert not chosen(tokens=33, batch=5, max_seqlen=17).flat
    assert chosen(tokens=33, batch=5).flat, "programs for rows that could be longer"
    assert not chosen(tokens=64, dim=2048, batch=1, max_seqlen=64).flat
    assert chosen(tokens=256, dim=2048, batch=1, max_seqlen=256).flat, "measured: a tenth faster"
    assert chosen(tokens=8192, dim=256, batch=4, max_seqlen=2048).flat, (
        "measured: 4 % faster, whatever fits at once"
    )
    assert chosen(tokens=16639, batch=256, max_seqlen=16384).flat
    assert chosen(max_seqlen=None).flat
    assert not chosen(tokens=4096, batch=4096, max_seqlen=16).flat
    assert chosen(tokens=4096, batch=4096, max_seqlen=17).flat
    assert chosen(dim=640).block_d == 128, "no lane idle"
    assert not chosen(max_seqlen=2048, schedule="per_sequence").flat
    assert chosen(batch=1, max_seqlen=16384).flat, "no row to find, and no programs for the tail"
    assert config.short_rows_config(7500, 8192, None) is None
    assert config.short_rows_config(7500, 8192, 17) is None
    assert config.short_rows_config(100, 8192, 5) is None, "small: all programs run at once as it is"
    assert config.short_rows_config(7500, 8192, 0).block_t == 1
    for longest in range(1, 17):
        for dim in (1, 5, 640, 8192):
            c = config.short_rows_config(1 << 20, dim, longest)
            assert longest <= c.block_t
            assert c.block_d & (c.block_d - 1) == 0
            assert 32 * c.num_warps <= c.block_d or c.num_warps == 1
    for dim in (1, 5, 640, 3712, 8192, 65536):
        for width in range(1, 9):
            for tokens in (1, 100, 10**6):
                c = chosen(tokens=tokens, dim=dim, width=width)
                assert c.block_t % c.group == 0
                assert c.block_t >= width - 1, "another program than the row's first would read its slot"
                assert c.block_d & (c.block_d - 1) == 0
