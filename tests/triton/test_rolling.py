"""The Torch twin's decode steps of packed rows and of rolling slots: kernel in Triton's interpreter, and eager path."""

import numpy as np
import pytest
import torch

import triton_impl
from oracle import numerics, reference
from tests.tools.synchronisation import no_synchronisation

BACKENDS = ("triton", "eager")


def to_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return numerics.TypedArray("bfloat16", tensor.contiguous().view(torch.int16).numpy().view(np.uint16))
    return tensor.numpy()


def normal(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def step(lengths, counts=None, dim=24, width=4, dtype=torch.bfloat16, columns=9, tail=0, slots=None):
    """Arguments of a packed step, NaN wherever nothing may be read."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    slots = list(range(len(lengths), 0, -1)) if slots is None else slots
    x = normal(int(offsets[-1]) + tail, dim, dtype=dtype)
    x[int(offsets[-1]) :] = torch.nan
    pool = torch.full((len(lengths) + 2, columns, dim), torch.nan, dtype=dtype)
    for row, slot in enumerate(slots):
        first = 0 if counts is None else min(max(counts[row], 1), columns - width + 2) - 1
        if slot >= 0:
            pool[slot, first : first + width - 1] = normal(width - 1, dim, dtype=dtype, seed=row)
    arguments = dict(
        x=x, weight=normal(dim, width, dtype=dtype, seed=1), bias=normal(dim, dtype=dtype, seed=2), conv_states=pool,
        cache_indices=torch.tensor(slots), query_start_loc=offsets.int(),
    )  # fmt: skip
    if counts is not None:
        arguments |= dict(num_accepted_tokens=torch.tensor(counts), max_seqlen=max(lengths))
    return arguments


def run_step(arguments, backend, **options):
    pool = arguments["conv_states"].clone(memory_format=torch.preserve_format)
    return triton_impl.causal_conv1d_update(**arguments | {"conv_states": pool}, backend=backend, **options)


def assert_right(arguments, result):
    """16-bit and no activation: products are exact, so every bit is the oracle's float32 sum."""
    host = {k: to_numpy(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    expected = reference.causal_conv1d_update(**host)
    sums, _ = reference.preactivation("causal_conv1d_update", host, "float32")
    out, pool = numerics.typed(to_numpy(result.out)), numerics.typed(to_numpy(result.conv_states))
    assert np.array_equal(out.values(), numerics.rounded(sums, out.dtype).values())
    same = pool.bits == numerics.typed(expected.conv_states).bits
    assert (same | numerics.is_nan(pool.bits, pool.dtype)).all()
    assert np.array_equal(
        numerics.is_nan(pool.bits, pool.dtype), np.isnan(numerics.typed(expected.conv_states).values())
    )


STEPS = {
    "packed": dict(lengths=(2, 0, 5, 1), tail=3, slots=[4, 1, -1, 0]),
    "rolling": dict(lengths=(2, 0, 5, 1), counts=(3, 2, 1, 7), tail=70, slots=[4, 1, -1, 0]),
    "long": dict(lengths=(70, 1), counts=(9, 2), columns=90, dim=5, dtype=torch.float16),
    "width 1": dict(lengths=(2, 3), counts=(2, 1), width=1, columns=0, tail=2),
    "width 2": dict(lengths=(2, 3), counts=(2, 4), width=2, columns=6),
    "width 8": dict(lengths=(2, 3), counts=(2, 4), width=8, columns=11, dtype=torch.float16),
    "counts out of range": dict(lengths=(2, 2, 2), counts=(0, 10**9, -(10**9)), columns=6),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", STEPS.values(), ids=STEPS)
def test_a_step_equals_the_reference(sizes, backend):
    arguments = step(**sizes)
    assert_right(arguments, run_step(arguments, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seqlen", [None, 1, 3])
def test_dense_rows_roll(seqlen, backend):
    arguments = step((seqlen or 1,) * 3, (3, 1, 2))
    x = arguments["x"] if seqlen is None else arguments["x"].view(3, seqlen, -1)
    dense = arguments | dict(x=x, query_start_loc=None, max_seqlen=None)
    result = run_step(dense, backend)
    assert result.out.shape == x.shape
    assert_right(dense, result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_integer_types_do_not_change_a_bit(backend):
    arguments = step((2, 3, 1), (3, 1, 4))
    plain = run_step(arguments, backend)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        table = torch.full((4, 5), 2, dtype=dtype)
        table[:3, 3] = arguments["num_accepted_tokens"]
        table[:, 1] = arguments["query_start_loc"]
        offsets = table[:, 1] if dtype in (torch.int32, torch.int64) else arguments["query_start_loc"]
        x, pool = arguments["x"], arguments["conv_states"]
        viewed = arguments | dict(
            num_accepted_tokens=table[:3, 3], query_start_loc=offsets, x=x.t().contiguous().t(),
            conv_states=torch.cat([pool, pool], dim=1).transpose(1, 2).contiguous().transpose(1, 2)[:, : pool.shape[1]],
        )  # fmt: skip
        result = run_step(viewed, backend)
        assert torch.equal(result.out, plain.out)
        assert torch.equal(result.conv_states.nan_to_num(7), plain.conv_states.nan_to_num(7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_acceptance_equals_the_plain_run(backend):
    """Verify 3 drafts, accept some, go on: the bits of a run that never guessed."""
    x, weight = normal(9, 24), normal(24, 4, seed=1)
    options = dict(activation="silu", backend=backend)

    def prefill(x, pool):
        return triton_impl.causal_conv1d_fn(x, weight, None, pool, torch.tensor([0, len(x)]), **options).out

    plain_pool = torch.full((1, 6, 24), torch.nan, dtype=x.dtype)
    plain = prefill(x, plain_pool)
    for accepted in (1, 2, 3, 4):
        pool = torch.full_like(plain_pool, torch.nan)
        out = [prefill(x[:2], pool)]
        drafts = torch.cat([x[2 : 2 + accepted], torch.full((4 - accepted, 24), torch.nan, dtype=x.dtype)])[
            None
        ]
        counts = torch.tensor([1])
        out += triton_impl.causal_conv1d_update(
            drafts, weight, None, pool, num_accepted_tokens=counts, **options
        ).out[:, :accepted]
        counts = torch.tensor([accepted])
        rest = x[None, 2 + accepted : 3 + accepted]  # one token with the count, then plain steps
        out += triton_impl.causal_conv1d_update(
            rest, weight, None, pool, num_accepted_tokens=counts, **options
        ).out
        out += triton_impl.causal_conv1d_update(x[None, 3 + accepted :], weight, None, pool, **options).out
        assert torch.equal(torch.cat(out), plain)
        assert torch.equal(pool[:, :3], plain_pool[:, :3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_index_data_touches_nothing_outside(backend):
    """Offsets, counts and slots of any value: no fault, guards and slots not named stay as they were."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        guarded_x, guarded_pool = torch.full((40, 16), 7.0), torch.full((12, 5, 16), 7.0)
        x, pool = guarded_x[8:32], guarded_pool[4:8]
        offsets, slots, counts = (
            torch.tensor([-(2**31), -5, 0, 3, 9, 24, 25, 2**31 - 1])[
                torch.randint(8, (n,), generator=generator)
            ].int()
            for n in (5, 4, 4)
        )
        out, _ = triton_impl.causal_conv1d_update(
            x, torch.ones(16, 4), None, pool, slots,
            query_start_loc=offsets, num_accepted_tokens=counts, max_seqlen=2, backend=backend,
        )  # fmt: skip
        named = [4 + slot for slot in slots.tolist() if 0 <= slot < 4]
        others = [slot for slot in range(12) if slot not in named]
        assert (guarded_x == 7).all()
        assert (guarded_pool[others] == 7).all()
        assert not out.isnan().any()


def test_validate_reads_offsets_and_counts():
    arguments = step((2, 1), (1, 2), columns=5)
    good = arguments["conv_states"].clone()
    for name, bad, message in (
        ("query_start_loc", [0, 2, 1], "row 1 to end between"),
        ("num_accepted_tokens", [0, 1], "expected 1 to 3"),
        ("num_accepted_tokens", [1, 4], "in row 1, got 4"),
    ):
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=f"{name}: .*{message}"):
                triton_impl.causal_conv1d_update(
                    **arguments | {name: torch.tensor(bad, dtype=torch.int32)}, backend=backend, validate=True
                )
    with pytest.raises(ValueError, match="max_seqlen: expected at least 2"):
        triton_impl.causal_conv1d_update(**arguments | dict(max_seqlen=1), validate=True)
    assert torch.equal(arguments["conv_states"].nan_to_num(7), good.nan_to_num(7)), (
        "a rejected call changed the pool"
    )


def test_a_prepared_call_is_not_reused_where_a_check_would_fail():
    arguments = step((2, 1), (1, 2), columns=5)
    run_step(arguments, "triton")
    for wrong in (
        {"num_accepted_tokens": torch.ones(3)},
        {"num_accepted_tokens": torch.ones(2)},
        {"max_seqlen": 4},
        {"max_seqlen": None},
        {"query_start_loc": None},
    ):
        with pytest.raises((ValueError, TypeError), match="expected"):
            run_step(arguments | wrong, "triton")
    with pytest.raises(
        ValueError, match="num_accepted_tokens: expected a tensor on x's device cpu, got meta"
    ):
        run_step(
            arguments | {"num_accepted_tokens": torch.ones(2, dtype=torch.int32, device="meta")}, "triton"
        )


def serving_step(batch=64, dim=8192, rolls=True):
    """A verify step of up to 4 tokens a row on a GPU, with padding rows, empty rows and a tail."""
    generator = torch.Generator().manual_seed(batch)
    lengths = torch.randint(5, (batch,), generator=generator).tolist()
    slots = torch.randperm(batch, generator=generator).tolist()
    slots[3] = -1
    counts = (1 + torch.randint(4, (batch,), generator=generator)).tolist() if rolls else None
    arguments = step(lengths, counts, dim=dim, columns=7, tail=9, slots=slots)
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("rolls", [True, False])
@pytest.mark.parametrize(("batch", "dim"), [(64, 8192), (300, 1040), (5, 1)])
def test_compiled_steps_equal_the_plain_path(batch, dim, rolls):
    arguments = serving_step(batch, dim, rolls)
    plain, kernel = run_step(arguments, "eager"), run_step(arguments, "triton")
    assert torch.equal(kernel.out, plain.out)
    assert torch.equal(kernel.conv_states.nan_to_num(7), plain.conv_states.nan_to_num(7))


@pytest.mark.gpu
def test_a_step_does_not_synchronise():
    arguments = serving_step()
    run_step(arguments, "triton")
    with no_synchronisation():
        run_step(arguments, "triton")


@pytest.mark.gpu
def test_a_captured_step_follows_its_counts_and_lengths():
    arguments = serving_step()
    pool = arguments["conv_states"].clone()
    call = arguments | {"conv_states": pool}
    triton_impl.causal_conv1d_update(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = triton_impl.causal_conv1d_update(**call)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        arguments["num_accepted_tokens"].copy_(torch.randint(1, 5, (64,), generator=generator, device="cuda"))
        lengths = torch.randint(4, (64,), generator=generator, device="cuda")
        room = arguments["x"].shape[0]
        arguments["query_start_loc"][1:] = lengths.cumsum(0).clamp(max=room)
        arguments["x"].nan_to_num_(1.0)
        pool.copy_(arguments["conv_states"].nan_to_num_(1.0))
        expected = run_step(arguments, "eager")
        graph.replay()
        assert torch.equal(out, expected.out)
        assert torch.equal(pool, expected.conv_states)
