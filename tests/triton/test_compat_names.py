"""Names, layouts and versions of the peers beside their two functions, each against a definition written out here."""

import inspect
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F

import triton_impl.compat
from oracle.contract import Unsupported
from triton_impl.compat import aiter, cpp_functions, fla, sglang, vllm
from triton_impl.compat import causal_conv1d as dao

torch.set_num_threads(1)  # the tensors are tiny
DIM, WIDTH = 6, 4


def random(*shape):
    return torch.randn(*shape)


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def rows_by_ids(x, weight, bias, ids, initial=None, activation=None):
    """x [batch, dim, seqlen]: each run of equal ids as a row of its own, the first one behind its initial state."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for row in range(x.shape[0]):
        starts = [0, *[t for t in range(1, x.shape[2]) if ids[row, t] != ids[row, t - 1]], x.shape[2]]
        for start, end in itertools.pairwise(starts):
            before = x.new_zeros(DIM, WIDTH - 1) if start or initial is None else initial[row]
            extended = torch.cat([before, x[row, :, start:end]], dim=1).double()
            run = F.conv1d(extended[None], weight.double()[:, None], bias.double(), groups=DIM)[0]
            if ids[row, start] >= 0:
                out[row, :, start:end] = F.silu(run) if activation else run
    return out


IDS = torch.tensor(
    [[0, 0, 1, 1, 1, -1, 2, 2, 2], [7, 7, 7, 3, 3, 3, 3, 3, -5], [-2, -2, 4, 4, 4, 4, 4, 4, 4]]
).int()


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_sequence_ids_with_initial_states(activation, channel_last):
    """The state belongs to the first id of its row; gradients reach it through that run alone."""
    x = random(3, 9, DIM).mT if channel_last else random(3, DIM, 9)
    tensors = x, random(DIM, WIDTH), random(DIM), random(3, DIM, WIDTH - 1)
    upstream = random(3, DIM, 9)

    def results(call):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = call(*leaves)
        return out, torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    out, found = results(lambda x, w, b, s: dao.causal_conv1d_fn(x, w, b, IDS, s, activation=activation))
    want, expected = results(lambda x, w, b, s: rows_by_ids(x, w, b, IDS, s, activation))
    close(out, want)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-4)
    with torch.no_grad():
        close(dao.causal_conv1d_fn(x, *tensors[1:3], IDS, tensors[3], activation=activation), want)
    close(dao.causal_conv1d_ref(*tensors[:3], tensors[3], activation=activation, seq_idx=IDS), want)


def test_mixed_dtypes_with_ids_round_once():
    x, initial = random(3, DIM, 9).bfloat16(), random(3, DIM, WIDTH - 1)
    weight, bias = random(DIM, WIDTH), random(DIM)
    out = dao.causal_conv1d_fn(x, weight, bias, IDS, initial)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.double(), rows_by_ids(x, weight, bias, IDS, initial), rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("ids", [None, IDS])
@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_results_may_be_changed_in_place(final, channel_last, ids):
    """As `out += residual` after causal-conv1d's and FLA's training form."""
    x = random(3, 9, DIM).mT if channel_last else random(3, DIM, 9)
    weight = random(DIM, WIDTH).requires_grad_()
    if ids is None or not final:
        result = dao.causal_conv1d_fn(x, weight, None, ids, None, final)
        for tensor in result if final else (result,):
            tensor += 1
            tensor *= 2
        (result[0] if final else result).sum().backward()
        changed, weight.grad = weight.grad, None
        result = dao.causal_conv1d_fn(x, weight, None, ids, None, final)
        (((result[0] if final else result) + 1) * 2).sum().backward()
        assert torch.equal(changed, weight.grad)
    y, state = fla.causal_conv1d(x.mT, weight, None, None, None, final)
    y *= 3
    y.sum().backward()
    assert (state is not None) is final


def test_results_of_the_engines_may_be_changed_in_place_where_gradients_are_on():
    """A serving loop without torch.no_grad(), with weights that are parameters; a backward pass stays refused."""
    weight = random(DIM, WIDTH).requires_grad_()
    starts, pool = torch.tensor([0, 3]), random(1, DIM, WIDTH - 1)
    for out in (
        sglang.causal_conv1d_fn_triton(random(DIM, 3), weight, None, pool, starts, [3]),
        sglang.causal_conv1d_update_triton(random(1, DIM), pool, weight),
        vllm.causal_conv1d_fn(random(DIM, 3), weight, None, pool, starts),
    ):
        out *= 2
        with pytest.raises(Unsupported, match="backward"):
            out.sum().backward()


@pytest.mark.parametrize("cache_seqlens", [None, torch.tensor([3, 11, 0])])
@pytest.mark.parametrize("seqlen", [None, 1, 2, 9])
def test_the_references_of_causal_conv1d(seqlen, cache_seqlens):
    """A user's own tests compare with them, so they are written without the operations of this package."""
    x = random(3, DIM) if seqlen is None else random(3, DIM, seqlen)
    weight, bias, state = random(DIM, WIDTH), random(DIM), random(3, DIM, 5)
    states = state.clone(), state.clone()
    out = dao.causal_conv1d_update_ref(x, states[0], weight, bias, "silu", cache_seqlens)
    close(out, dao.causal_conv1d_update(x, states[1], weight, bias, "silu", cache_seqlens))
    assert torch.equal(*states)
    assert not torch.equal(states[0], state)
    with pytest.raises(ValueError, match="activation"):
        dao.causal_conv1d_ref(random(1, DIM, 2), weight, activation="relu")


def test_the_reference_of_a_prefill():
    x, weight, bias, initial = random(2, DIM, 5), random(DIM, WIDTH), random(DIM), random(2, DIM, WIDTH - 1)
    for state in (None, initial):
        mine = torch.empty(2, DIM, WIDTH - 1)
        found = dao.causal_conv1d_ref(x, weight, bias, state, True, mine, "silu")
        wanted = dao.causal_conv1d_fn(x, weight, bias, None, state, True, None, "silu")
        close(found[0], wanted[0])
        assert found[1] is mine
        assert torch.equal(mine, wanted[1])
    starts = torch.tensor([0, 2, 2, 9])
    tokens = random(9, DIM)
    assert torch.equal(
        dao.causal_conv1d_varlen_states_ref(tokens, starts, 4),
        dao.causal_conv1d_varlen_states(tokens, starts, 4),
    )


@pytest.fixture
def installed():
    triton_impl.compat.install("causal_conv1d")
    yield
    triton_impl.compat.uninstall("causal_conv1d")


def test_names_that_users_import_from_causal_conv1d(installed):
    import causal_conv1d
    from causal_conv1d.causal_conv1d_interface import (
        CausalConv1dFn,
        causal_conv1d_fn,
        causal_conv1d_ref,
        causal_conv1d_update,
        causal_conv1d_update_ref,
    )
    from causal_conv1d.causal_conv1d_varlen import (
        causal_conv1d_varlen_states,
        causal_conv1d_varlen_states_ref,
    )

    assert causal_conv1d.__version__ == "1.7.0"
    for function in (
        causal_conv1d_fn,
        causal_conv1d_ref,
        causal_conv1d_update,
        causal_conv1d_update_ref,
        causal_conv1d_varlen_states,
        causal_conv1d_varlen_states_ref,
    ):
        assert function is getattr(dao, function.__name__)
    x, weight = random(2, DIM, 5), random(DIM, WIDTH)
    assert torch.equal(CausalConv1dFn.apply(x, weight), dao.causal_conv1d_fn(x, weight))


def test_the_extension_of_old_and_new_releases(installed):
    import causal_conv1d_cuda as extension

    x, weight, bias, dout = random(2, DIM, 5), random(DIM, WIDTH), random(DIM), random(2, DIM, 5)
    want = dao.causal_conv1d_fn(x, weight, bias, activation="silu")
    for arguments in ((), (None,), (None, None, None)):
        assert torch.equal(extension.causal_conv1d_fwd(x, weight, bias, *arguments, True), want)
    out, final = torch.empty_like(x), torch.empty(2, DIM, WIDTH - 1)
    assert extension.causal_conv1d_fwd(x, weight, bias, None, None, out, final, True) is None
    assert torch.equal(out, want)
    assert torch.equal(final, x[:, :, -3:])

    gradients = cpp_functions.causal_conv1d_bwd_function(
        x, weight, bias, dout, None, None, None, None, False, True
    )
    old = extension.causal_conv1d_bwd(
        x, weight, bias, dout, None, None, None, torch.empty_like(x), False, True
    )
    new = torch.empty_like(x), torch.zeros(DIM, WIDTH), torch.ones(DIM)
    assert extension.causal_conv1d_bwd(x, weight, bias, dout, None, None, None, *new, None, True) is None
    for index, sums in enumerate((0, 0, 1)):  # sums are added to
        assert torch.equal(old[index], gradients[index])
        close(new[index], gradients[index] + sums)

    token, state = random(2, DIM), random(2, DIM, WIDTH)
    states = [state.clone() for _ in range(4)]
    want = dao.causal_conv1d_update(token, states[0], weight, bias)
    assert torch.equal(extension.causal_conv1d_update(token, states[1], weight, bias, False), want)
    assert torch.equal(
        extension.causal_conv1d_update(token, states[2], weight, bias, False, None, None), want
    )
    out = torch.empty_like(token)
    assert extension.causal_conv1d_update(token, states[3], weight, bias, out, False, None, None) is None
    assert torch.equal(out, want)
    for other in states[1:]:
        assert torch.equal(other, states[0])


def test_operators_of_causal_conv1d(installed):
    x, weight, initial, dout = random(2, DIM, 5), random(DIM, WIDTH), random(2, DIM, 3), random(2, DIM, 5)
    out, final = torch.empty_like(x), torch.empty(2, DIM, WIDTH - 1)
    operators = torch.ops.DaoAILab
    operators._causal_conv1d_fwd_cpp(x, weight, None, None, initial, out, final, True)
    want = dao.causal_conv1d_fn(x, weight, None, None, initial, True, None, "silu")
    assert torch.equal(out, want[0])
    assert torch.equal(final, want[1])
    found = torch.empty_like(x), torch.zeros_like(weight), None, torch.empty_like(initial)
    operators._causal_conv1d_bwd_cpp(x, weight, None, dout, None, initial, None, *found, True)
    wanted = cpp_functions.causal_conv1d_bwd_function(
        x, weight, None, dout, None, initial, None, None, True, True
    )
    for one, other in zip(found, wanted, strict=True):
        assert one is other is None or torch.equal(one, other)
    states = [random(2, DIM, WIDTH)] * 2
    states[1] = states[0].clone()
    out = torch.empty(2, DIM)
    operators._causal_conv1d_update_cpp(x[:, :, 0], states[0], weight, None, out, False, None, None)
    assert torch.equal(out, dao.causal_conv1d_update(x[:, :, 0], states[1], weight))
    assert torch.equal(*states)


def test_operators_go_with_the_adapter():
    triton_impl.compat.install("causal_conv1d")
    assert hasattr(torch.ops.DaoAILab, "_causal_conv1d_fwd_cpp")
    triton_impl.compat.uninstall("causal_conv1d")
    assert not hasattr(torch.ops.DaoAILab, "_causal_conv1d_fwd_cpp")


# flash-linear-attention

STARTS = torch.tensor([0, 2, 2, 9])


def test_heads_of_fla_are_channels():
    x, weight, bias = random(1, 9, 2, DIM // 2), random(DIM, WIDTH), random(DIM)
    residual, initial = random(1, 9, 2, DIM // 2), random(3, DIM, WIDTH)
    y, final = fla.causal_conv1d(x, weight, bias, residual, initial, True, "silu", cu_seqlens=STARTS)
    want = fla.causal_conv1d(
        x.flatten(2), weight, bias, residual.flatten(2), initial, True, "silu", cu_seqlens=STARTS
    )
    assert y.shape == x.shape
    assert torch.equal(y.flatten(2), want[0])
    assert torch.equal(final, want[1])
    for shape in ((3, 1, 2, 3), (1, 3, 2, 3), (3, 1, 3, 2, 1)):
        caches = [random(3, DIM, WIDTH)] * 2
        caches[1] = caches[0].clone()
        token = random(*shape)
        y, _ = fla.causal_conv1d_update(token, caches[0], token, weight, bias)
        flat, _ = fla.causal_conv1d_update(
            token.reshape(3, DIM), caches[1], token.reshape(3, DIM), weight, bias
        )
        assert y.shape == token.shape
        assert torch.equal(y.reshape(3, DIM), flat)
        assert torch.equal(*caches)


def test_keywords_that_fla_ignores():
    x, weight = random(1, 9, DIM), random(DIM, WIDTH)
    want, _ = fla.causal_conv1d(x, weight, cu_seqlens=STARTS)
    ids = torch.zeros(1, 9, dtype=torch.int32)
    found, _ = fla.causal_conv1d(
        x, weight, cu_seqlens=STARTS, seq_idx=ids, past_key_values=None, use_cache=True
    )
    assert torch.equal(found, want)


@pytest.mark.parametrize("backend", ["cuda", "mix"])
def test_other_backends_of_fla_run_here_and_say_so_once(backend, caplog):
    fla.say_once.cache_clear()
    x, weight, residual = random(1, 9, DIM), random(DIM, WIDTH), random(1, 9, DIM)
    want, _ = fla.causal_conv1d(x, weight, None, residual, cu_seqlens=torch.tensor([0, 2, 9]))
    with caplog.at_level(logging.WARNING):
        found, _ = fla.causal_conv1d(
            x, weight, None, residual, backend=backend, cu_seqlens=torch.tensor([0, 2, 9])
        )
        ids = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
        by_ids, _ = fla.causal_conv1d(x, weight, None, residual, backend=backend, seq_idx=ids)
    assert torch.equal(found, want)
    close(by_ids, want)
    assert [record.name for record in caplog.records] == ["fla.twinconv"]
    assert backend in caplog.text


@pytest.mark.parametrize("state_len", [2, 4, 7])
@pytest.mark.parametrize("with_initial", [False, True])
def test_states_of_fla(with_initial, state_len):
    x = random(1, 9, DIM)
    initial = random(3, DIM, state_len) if with_initial else None
    want = []
    for row, (start, end) in enumerate([(0, 2), (2, 2), (2, 9)]):
        before = torch.zeros(DIM, state_len) if initial is None else initial[row]
        want.append(torch.cat([before, x[0, start:end].t()], dim=1)[:, -state_len:])
    want = torch.stack(want)
    assert torch.equal(fla.causal_conv1d_update_states(x, state_len, initial, STARTS), want)
    assert torch.equal(fla.causal_conv1d_update_states(x[0], state_len, initial, STARTS), want)
    dense = fla.causal_conv1d_update_states(x.expand(2, -1, -1), state_len)
    assert torch.equal(dense[1], F.pad(x[0].t(), (state_len, 0))[:, -state_len:])


def test_halves_of_fla():
    """Its forward and its backward function, which other projects call by themselves."""
    x, weight, bias, initial = random(1, 9, DIM), random(DIM, WIDTH), random(DIM), random(3, DIM, WIDTH)
    residual, dy, dht = random(1, 9, DIM), random(1, 9, DIM), random(3, DIM, WIDTH)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual, initial)]
    results = fla.causal_conv1d(*leaves, True, "silu", cu_seqlens=STARTS)
    found = fla.causal_conv1d_fwd(x, weight, bias, residual, initial, True, "silu", STARTS)
    for one, other in zip(found, results, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    wanted = torch.autograd.grad(results, leaves, (dy, dht))
    gradients = fla.causal_conv1d_bwd(x, dy, dht, weight, bias, residual, initial, "silu", STARTS)
    for one, other in zip(gradients, wanted, strict=True):
        close(one, other)
    gradients = fla.causal_conv1d_bwd(x, dy, None, weight)
    assert [gradient is None for gradient in gradients] == [False, False, True, True, True]
    fast, none = fla.fast_causal_conv1d_fn(x, weight, bias, cu_seqlens=STARTS)
    assert none is None
    assert torch.equal(fast, fla.causal_conv1d(x, weight, bias, cu_seqlens=STARTS)[0])


# SGLang's registered kernels, vLLM's blocks, aiter


def test_kernels_below_sglangs_dispatcher():
    x, weight = random(9, DIM), random(DIM, WIDTH)
    starts, slots, has = torch.tensor([0, 4, 9]), torch.tensor([2, 0]), torch.tensor([True, False])
    pools = [random(3, DIM, WIDTH - 1)] * 2
    pools[1] = pools[0].clone()
    want = sglang.causal_conv1d_fn(x.clone().t(), weight, None, starts, slots, has, pools[0])
    for given in (x.clone().t(), x.t().contiguous()):
        pool = pools[1].clone()
        assert sglang.causal_conv1d_fwd_cuda(given, weight, None, pool, starts, slots, has, True, -1) is None
        assert torch.equal(given, want)
        assert torch.equal(pool, pools[0])
    token = random(2, DIM, 1)
    tokens = token.clone(), token.clone()
    assert sglang.causal_conv1d_update_cuda(tokens[0], pools[0], weight, None, False, None, slots, -1) is None
    sglang.causal_conv1d_update(tokens[1], pool, weight, None, None, None, slots)
    assert torch.equal(*tokens)
    assert torch.equal(pool, pools[0])
    assert not torch.equal(tokens[0], token)


@pytest.mark.parametrize(("computed", "lengths"), [((3, 0), (4, 5)), ((8, 7), (8, 1)), ((1, 2), (1, 1))])
def test_blocks_of_vllm(computed, lengths):
    """Every block of 4 tokens that a call completes keeps the window at its end, whatever it is made of."""
    block, blocks = 4, 5
    weight, bias = random(DIM, WIDTH), random(DIM)
    table = torch.arange(1, 1 + 2 * blocks).view(2, blocks).int()
    pool = random(1 + 2 * blocks, DIM, WIDTH - 1)
    before, starts = pool.clone(), torch.tensor([0, lengths[0], sum(lengths)]).int()
    x = random(sum(lengths), DIM)
    first = torch.tensor([max(c - 1, 0) // block for c in computed])
    last = torch.tensor([-(-(c + n) // block) - 1 for c, n in zip(computed, lengths, strict=True)])
    has = torch.tensor([c > 0 for c in computed])
    out = vllm.causal_conv1d_fn_blocks(
        x.t(), weight, bias, pool, starts, table, has, "silu",
        block_idx_first_scheduled_token=first, block_idx_last_scheduled_token=last, initial_state_idx=first,
        num_computed_tokens=torch.tensor(computed), block_size_to_align=block,
    )  # fmt: skip
    after = before.clone()
    for row in range(2):
        tokens = x[starts[row] : starts[row + 1]].t()
        window = before[table[row, first[row]]] * has[row]
        extended = torch.cat([window, tokens], dim=1)
        want = F.silu(F.conv1d(extended[None], weight[:, None], bias, groups=DIM)[0])
        close(out[:, starts[row] : starts[row + 1]], want)
        for k in range(blocks):
            end = (k + 1) * block - computed[row]
            if 0 < end <= lengths[row]:
                after[table[row, k]] = extended[:, end : end + WIDTH - 1]
        after[table[row, last[row]]] = extended[:, lengths[row] :]
    assert torch.equal(pool, after)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_decode_step_reads_one_block_of_vllm_and_writes_another(in_place):
    weight, pool, x = random(DIM, WIDTH), random(7, DIM, WIDTH - 1), random(2, DIM)
    table, before, token = torch.tensor([[1, 2, 3], [4, 5, 6]]), pool.clone(), x.clone()
    result = None if in_place else torch.empty_like(x)
    out = vllm.causal_conv1d_update_blocks(
        x, pool, weight, None, None, table, out=result,
        block_idx_last_scheduled_token=torch.tensor([1, 2]), initial_state_idx=torch.tensor([0, 2]),
    )  # fmt: skip
    assert out is (x if in_place else result)
    for row, (read, write) in enumerate(((1, 2), (6, 6))):
        extended = torch.cat([before[read], token[row, :, None]], dim=1)
        close(out[row], (extended * weight).sum(1))
        before[write] = extended[:, 1:]
    assert torch.equal(pool, before)


def test_a_step_of_aiter_is_in_place_and_its_windows_lie_by_slot():
    weight, pool, x = random(DIM, WIDTH), random(5, DIM, WIDTH - 1), random(2, DIM, 3)
    slots = torch.tensor([3, 1])
    windows, by_row = torch.zeros(5, 3, DIM, WIDTH - 1), torch.zeros(2, 3, DIM, WIDTH - 1)
    want = sglang.causal_conv1d_update_triton(x, pool.clone(), weight, None, None, None, slots, None, by_row)
    out = aiter.causal_conv1d_update(x, pool, weight, None, None, None, slots, None, windows)
    assert out is x
    assert torch.equal(out, want)
    assert torch.equal(windows[slots], by_row)
    with pytest.raises(ValueError, match="x: expected shape"):
        aiter.causal_conv1d_update_single_token(x, pool, weight)
    with pytest.raises(Unsupported, match="num_accepted_tokens"):
        aiter.causal_conv1d_update_single_token(x[:, :, 0], pool, weight, num_accepted_tokens=slots)


# Index tensors that are too short are still errors.


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: sglang.causal_conv1d_fn_triton(random(DIM, 3), W, None, P, S, None, None, B[:1]), "has_initial_state"),
        (lambda s: vllm.causal_conv1d_fn(random(DIM, 3), W, None, P, S, s, B[:1]), "has_initial_state"),
        (lambda s: vllm.causal_conv1d_update(random(3, DIM), P, W, conv_state_indices=s), "conv_state_indices"),
        (lambda s: sglang.causal_conv1d_update_triton(random(3, DIM), P, W, conv_state_indices=s), "conv_state_indices"),
        (lambda s: dao.causal_conv1d_update(random(3, DIM), P, W, conv_state_indices=s), "conv_state_indices"),
        (lambda s: dao.causal_conv1d_update(random(3, DIM), P, W, cache_seqlens=s), "cache_seqlens"),
        (lambda s: fla.causal_conv1d_update(random(4, DIM), P.repeat(1, 1, 2)[:3, :, :4], None, W), "cache"),
    ],
)  # fmt: skip
def test_shorter_than_the_batch(call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.tensor([1, 2]))


W, P, S = torch.ones(DIM, WIDTH), torch.zeros(4, DIM, WIDTH - 1), torch.tensor([0, 1, 3])
B = torch.tensor([True, True])


# Names, order and defaults of every function, as recorded from the sources of the releases named.

SIGNATURES = {
    "causal-conv1d 1.7.0": {
        dao.causal_conv1d_fn: "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None",
        dao.causal_conv1d_update: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None",
        dao.causal_conv1d_varlen_states: "x, cu_seqlens, state_len",
        dao.causal_conv1d_ref: "x, weight, bias=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None, seq_idx=None",
        dao.causal_conv1d_update_ref: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None",
        dao.causal_conv1d_varlen_states_ref: "x, cu_seqlens, state_len",
        cpp_functions.causal_conv1d_fwd_function: "x, weight, bias, seq_idx, initial_states, final_states_out, "
        "silu_activation",
        cpp_functions.causal_conv1d_bwd_function: "x, weight, bias, dout, seq_idx, initial_states, dfinal_states, dx, "
        "return_dinitial_states, silu_activation",
        cpp_functions.causal_conv1d_update_function: "x, conv_state, weight, bias, silu_activation, cache_seqlens, "
        "conv_state_indices",
    },
    "FLA 0.6.0": {
        fla.causal_conv1d: "x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, "
        "activation=None, backend='triton', cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, "
        "cp_context=None, **kwargs",
        fla.causal_conv1d_update: "x, cache, residual=None, weight=None, bias=None, activation=None",
        fla.causal_conv1d_fwd: "x, weight, bias, residual, initial_state=None, output_final_state=False, "
        "activation=None, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, chunk_size=64, "
        "layout_fallback=False",
        fla.causal_conv1d_bwd: "x, dy, dht, weight=None, bias=None, residual=None, initial_state=None, "
        "activation=None, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, chunk_size=64, "
        "layout_fallback=False",
        fla.causal_conv1d_update_states: "x, state_len, initial_state=None, cu_seqlens=None",
        fla.fast_causal_conv1d_fn: "x, weight=None, bias=None, residual=None, initial_state=None, "
        "output_final_state=False, activation=None, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, "
        "seq_idx=None",
    },
    "SGLang 0.5.23": {
        sglang.causal_conv1d_fn: "x, weight, bias=None, query_start_loc=None, cache_indices=None, "
        "has_initial_state=None, conv_states=None, activation='silu', pad_slot_id=-1, **kwargs",
        sglang.causal_conv1d_update: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None, pad_slot_id=-1",
        sglang.causal_conv1d_fn_triton: "x, weight, bias, conv_states, query_start_loc, seq_lens_cpu, "
        "cache_indices=None, has_initial_state=None, activation='silu', pad_slot_id=-1, validate_data=False, "
        "block_table=None, **kwargs",
        sglang.causal_conv1d_update_triton: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None, num_accept_tokens=None, intermediate_conv_window=None, "
        "intermediate_state_indices=None, retrieve_next_token=None, retrieve_next_sibling=None, "
        "retrieve_parent_token=None, pad_slot_id=-1, metadata=None, validate_data=False",
        sglang.causal_conv1d_fwd_cuda: "x, weight, bias_, conv_states, query_start_loc, cache_indices, "
        "has_initial_state, silu_activation, pad_slot_id",
        sglang.causal_conv1d_update_cuda: "x, conv_state, weight, bias_, silu_activation, cache_seqlens, "
        "conv_state_indices, pad_slot_id",
    },
    "vLLM 0.33.0": {
        vllm.causal_conv1d_fn: "x, weight, bias, conv_states, query_start_loc, cache_indices=None, "
        "has_initial_state=None, activation='silu', pad_slot_id=-1, null_block_id=0, metadata=None, "
        "validate_data=False",
        vllm.causal_conv1d_update: "x, conv_state, weight, bias=None, activation=None, conv_state_indices=None, "
        "num_accepted_tokens=None, query_start_loc=None, max_query_len=-1, null_block_id=0, validate_data=False, "
        "out=None",
    },
    "vLLM 0.32.0": {
        vllm.causal_conv1d_fn_blocks: "x, weight, bias, conv_states, query_start_loc, cache_indices=None, "
        "has_initial_state=None, activation='silu', pad_slot_id=-1, null_block_id=0, "
        "block_idx_first_scheduled_token=None, block_idx_last_scheduled_token=None, initial_state_idx=None, "
        "num_computed_tokens=None, block_size_to_align=0, metadata=None, validate_data=False",
        vllm.causal_conv1d_update_blocks: "x, conv_state, weight, bias=None, activation=None, "
        "conv_state_indices=None, num_accepted_tokens=None, query_start_loc=None, max_query_len=-1, null_block_id=0, "
        "block_idx_last_scheduled_token=None, initial_state_idx=None, validate_data=False, out=None",
    },
    "aiter 0e1be2b": {
        aiter.causal_conv1d_fn: "x, weight, bias, conv_states, query_start_loc, seq_lens_cpu, cache_indices=None, "
        "has_initial_state=None, activation='silu', pad_slot_id=-1, validate_data=False, **kwargs",
        aiter.causal_conv1d_update: "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, "
        "conv_state_indices=None, num_accepted_tokens=None, intermediate_conv_window=None, pad_slot_id=-1, "
        "metadata=None, validate_data=False",
        aiter.causal_conv1d_update_single_token: "x, conv_state, weight, bias=None, activation=None, "
        "conv_state_indices=None, num_accepted_tokens=None, query_start_loc=None, max_query_len=-1, pad_slot_id=-1, "
        "block_idx_last_scheduled_token=None, initial_state_idx=None, validate_data=False",
    },
}


@pytest.mark.parametrize("release", SIGNATURES)
def test_signatures_as_recorded(release):
    for function, wanted in SIGNATURES[release].items():
        assert str(inspect.signature(function)) == f"({wanted})", function.__name__


def test_every_public_function_is_recorded():
    recorded = {function for functions in SIGNATURES.values() for function in functions}
    for module in (aiter, cpp_functions, dao, fla, sglang, vllm):
        for name in module.__all__:
            value = getattr(module, name)
            assert not callable(value) or value in recorded, f"{module.__name__}.{name}"
