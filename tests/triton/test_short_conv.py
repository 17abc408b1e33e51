"""`short_conv`: the oracle's values for documents, padding, caches and layouts; gradients; bad input."""

import functools
import itertools
import re
from unittest import mock

import numpy as np
import pytest
import torch

from oracle import reference_short
from oracle.contract_checks import dtype_name
from tests.tools import short_conv_cases as cases
from triton_impl import backward, causal_conv1d, functional, prefill, short_conv
from triton_impl.call import forget
from triton_impl.packed_rows import document_marks


def tensors(arrays, **options):
    return {name: torch.tensor(np.ascontiguousarray(a), **options) for name, a in arrays.items()}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: "-".join(map(str, case)))
def test_documents_and_padding_are_rows_alone(case, backend):
    rows, cached, weight_layout, cache_layout, extra = case
    given = cases.in_layout(cases.inputs(cached=cached, extra=extra), weight_layout, cache_layout)
    given |= cases.ROWS[rows]
    options = dict(
        weight_layout=weight_layout, cache_layout=cache_layout, activation="silu" if cached else None
    )
    out, cache = short_conv(**tensors(given), **options, backend=backend)
    want, new = reference_short.short_conv(**given, **options)
    np.testing.assert_allclose(out.numpy(), want, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(cache.numpy(), new)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("rows", cases.ROWS)
def test_gradients_are_those_of_rows_alone(rows, backend):
    """Each document as a call of its own: one graph against the other."""
    sums = []
    for alone in (False, True):
        a = tensors(cases.inputs(), requires_grad=True)
        if not alone:
            out, new = short_conv(**a, **tensors(cases.ROWS[rows]), activation="silu", backend=backend)
            loss = (out**2).sum() + (new**3).sum()
        else:
            loss = 0.0
            for row in range(cases.BATCH):
                edges = cases.cuts(row, cases.ROWS[rows], cases.SEQLEN)
                for begin, end in itertools.pairwise(edges):
                    window = a["cache"][row : row + 1] if begin == 0 else None
                    out, new = causal_conv1d(
                        a["x"][row : row + 1, begin:end], a["weight"], a["bias"], window, activation="silu", backend=backend
                    )  # fmt: skip
                    loss = loss + (out**2).sum()
                loss = loss + (new**3).sum()
        loss.backward()
        sums.append({name: tensor.grad for name, tensor in a.items()})
    for name, gradient in sums[0].items():
        torch.testing.assert_close(gradient, sums[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_padding_may_hold_anything():
    a = tensors(cases.inputs(), requires_grad=True)
    with torch.no_grad():
        a["x"][0, 5:], a["x"][1, 1:] = torch.nan, torch.inf
    out, new = short_conv(**a, lengths=torch.tensor(cases.LENGTHS), activation="silu")
    (out.sum() + new.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in a.values())
    assert not a["x"].grad[0, 5:].any()


def test_a_row_without_batch_and_no_cache_wanted():
    a = tensors(cases.inputs())
    whole = short_conv(**a)
    one = short_conv(a["x"][1], a["weight"], a["bias"], cache=a["cache"][1])
    assert torch.equal(one.out, whole.out[1])
    assert torch.equal(one.conv_states, whole.conv_states[1])
    assert short_conv(**a, want_cache=False).conv_states is None


@pytest.mark.parametrize(("changes", "error", "text"), cases.REFUSED)
def test_bad_input(changes, error, text):
    a = tensors(cases.inputs()) | {
        name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in changes.items()
    }
    with pytest.raises(error, match=re.escape(text)):
        short_conv(**a)


def test_it_compiles_whole():
    a = tensors(cases.inputs())
    ids = torch.tensor(cases.IDS)
    dtype_name(np.dtype("float32"))  # NumPy's dtypes among the known ones are no obstacle
    compiled = torch.compile(
        lambda a, ids: short_conv(**a, segment_ids=ids, activation="silu"),
        fullgraph=True,
        backend="aot_eager",
    )
    got, want = compiled(a, ids), short_conv(**a, segment_ids=ids, activation="silu")
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.conv_states, want.conv_states)


def test_marks_know_the_tokens_around():
    ids = torch.tensor(cases.LONG_IDS)
    marks = document_marks(ids)
    begins = np.diff(cases.LONG_IDS, prepend=cases.LONG_IDS[:, :1]) != 0
    around = np.pad(begins, ((0, 0), (8, 32)))
    assert marks.dtype == torch.int32
    assert marks.shape == (2, cases.LONG // 8 + 2)
    for i in range(marks.shape[1]):
        for j in range(32):
            want = around[:, 8 * i + j] if j < 24 else 0
            np.testing.assert_array_equal(marks[:, i].numpy() >> (31 - j) & 1, want)


def gradients(call, *given):
    given = [a.detach().clone().requires_grad_() for a in given]
    out = call(*given)
    upstream = torch.tensor(np.random.default_rng(5).standard_normal(out.shape)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, given, upstream)


@functools.cache
def documents_on_kernels(width, dtype, cached, damage=None):
    """(the arrays, [out, dx, dweight, dbias] and dcache) of rows of documents on the kernels."""
    arrays = tensors(cases.inputs(width, cached=cached, seqlen=cases.LONG))
    x, weight, bias, *cache = (a.to(dtype) for a in arrays.values())
    if damage == "cache":
        cache[0][:] = torch.nan
    elif damage:
        x[damage] = torch.nan
    given = x, weight, bias, *cache
    return given, gradients(functools.partial(of_documents, "triton"), *given)


def of_documents(backend, x, weight, bias, cache=None):
    options = dict(
        segment_ids=torch.tensor(cases.LONG_IDS), want_cache=False, activation="silu", backend=backend
    )
    return short_conv(x, weight, bias, cache=cache, **options).out


@pytest.mark.parametrize(
    ("width", "dtype", "cached"),
    [
        (4, torch.float32, True),
        (2, torch.bfloat16, False),
        (3, torch.float16, True),
        (8, torch.float32, False),
    ],
)
def test_documents_at_the_borders_of_blocks(width, dtype, cached):
    """Plain torch has the kernels' order of operations; sums over all tokens to a last bit of each term."""
    given, found = documents_on_kernels(width, dtype, cached)
    wanted = gradients(functools.partial(of_documents, "eager"), *given)
    for name, got, want in zip(("out", "dx", "dweight", "dbias", "dcache"), found, wanted, strict=False):
        got, want = got.float(), want.float()
        near = 2 * torch.finfo(dtype).eps * want.abs().max().item()
        if name in ("dweight", "dbias"):
            terms = given[0].float().abs().max().clamp(min=1).item()
            near += given[0][..., 0].numel() * torch.finfo(torch.float32).eps * terms
        torch.testing.assert_close(
            got, want, rtol=0, atol=near, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("group", [4, 8, 16])
def test_documents_have_the_bits_of_rows_alone(monkeypatch, group):
    given, (out, *_) = documents_on_kernels(4, torch.float32, True)
    config = functional.prefill_config(2 * cases.LONG, cases.DIM, 2, 4, True)
    chosen = mock.Mock(return_value=config._replace(group=group, block_t=16))
    monkeypatch.setattr(functional, "prefill_config", chosen)
    forget()
    x, weight, bias, cache = given
    again = of_documents("triton", *given)
    assert chosen.called
    starts, rows, first = cases.starts_alone()
    windows = torch.where(torch.tensor(first)[:, None, None], cache[rows], 0)
    alone = causal_conv1d(
        x.reshape(-1, cases.DIM),
        weight,
        bias,
        windows,
        torch.tensor(starts),
        activation="silu",
        backend="triton",
    ).out.view(x.shape)
    forget()
    assert torch.equal(out, alone)
    assert torch.equal(again, alone)


@pytest.mark.parametrize(("block_t", "group"), [(8, 8), (32, 4), (64, 8)])
def test_gradients_of_documents_in_any_blocks(monkeypatch, block_t, group):
    given, found = documents_on_kernels(4, torch.float32, True)
    config = backward.backward_config(2 * cases.LONG, cases.DIM, 2, 4, 0, cases.LONG)
    chosen = mock.Mock(return_value=config._replace(block_t=block_t, group=group, row_blocks=2))
    monkeypatch.setattr(backward, "backward_config", chosen)
    forget()
    again = gradients(functools.partial(of_documents, "triton"), *given)
    forget()
    assert chosen.called
    for place, (got, want) in enumerate(zip(again, found, strict=True)):
        if place in (2, 3):  # sums over tokens, in an order that follows from the blocks
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, want)


def test_documents_are_one_launch_of_equal_rows():
    """No offset of a document and no sort: the kernels see two rows, whatever the ids say, and a second call prepares nothing."""
    given = [a.detach().clone().requires_grad_() for a in documents_on_kernels(4, torch.float32, True)[0]]
    with (
        mock.patch.object(prefill, "prepare", wraps=prefill.prepare) as forward,
        mock.patch.object(backward, "prepare", wraps=backward.prepare) as back,
        mock.patch.object(torch.Tensor, "sort", side_effect=AssertionError("a sort")),
    ):
        forget()
        for _ in range(2):
            of_documents("triton", *given).sum().backward()
        forget()
    assert forward.call_count == back.call_count == 1
    assert forward.call_args.args[0].query_start_loc.shape == (3,)
    assert back.call_args.args[6].shape == (3,)


@pytest.mark.parametrize("damage", ["cache", (0, 20), (1, 36), (1, 2)])
def test_a_nan_stays_in_its_document(damage):
    """Of its token, or of the cache; dweight, which is a sum over all, is one."""
    _, clean = documents_on_kernels(4, torch.float32, True)
    _, found = documents_on_kernels(4, torch.float32, True, damage)
    reached = cases.reached_from(damage)
    for got, want in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(got[~reached], want[~reached])
        assert got[reached].isnan().any()
    assert (found[4].isnan().any(2).any(1).numpy() == reached[:, 0]).all()


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_documents_in_any_memory(backend):
    """Rows that lie apart, channels that do, and both ends of a projection; gradients laid out as x."""
    arrays = tensors(cases.inputs(seqlen=cases.LONG))
    call = functools.partial(of_documents, backend)
    want = gradients(call, *arrays.values())
    x = arrays["x"]
    wide = torch.cat([x, x], 2)[..., cases.DIM :]
    apart = torch.cat([x, x[:, :3]], 1)[:, : cases.LONG]
    for layout in (wide, apart, x.transpose(1, 2).contiguous().transpose(1, 2)):
        given = layout.detach().requires_grad_(), *(arrays[name] for name in ("weight", "bias", "cache"))
        out = call(*given)
        upstream = torch.tensor(np.random.default_rng(5).standard_normal(out.shape)).float()
        (dx,) = torch.autograd.grad(out, given[0], upstream)
        assert torch.equal(out, want[0])
        assert torch.equal(dx, want[1])
        assert dx.stride() == torch.empty_like(layout).stride()


@pytest.mark.parametrize("cached", [True, False])
def test_documents_compile_to_one_operator(cached):
    """torch.compile's graph and export's hold no sort; gradients through the compiled graph are those of eager code."""
    arrays = tensors(cases.inputs(cached=cached), requires_grad=True)
    ids, graphs = torch.tensor(cases.IDS), []

    def call(arrays, ids):
        return short_conv(**arrays, segment_ids=ids, activation="silu", want_cache=False).out

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(call, fullgraph=True, backend=keep)(arrays, ids)
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")]
    assert sum("causal_conv1d_forward" in name for name in names) == 1
    assert not any("sort" in name for name in names)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, wanted = (
        torch.autograd.grad((run(arrays, ids) ** 2).sum(), list(arrays.values())) for run in (compiled, call)
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    shape = short_conv(
        **{name: a.detach().to("meta") for name, a in arrays.items()},
        segment_ids=ids.to("meta"),
        activation="silu",
    )
    assert shape.out.shape == arrays["x"].shape
    assert shape.conv_states.shape == (cases.BATCH, 3, cases.DIM)
