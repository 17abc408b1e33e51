"""The calls that engines make (tests/tools/engine_calls.py), in plain torch, in the kernels, and in captured graphs."""

import importlib

import pytest
import torch

from tests.tools.engine_calls import CALLS, arguments
from tests.tools.synchronisation import no_synchronisation
from triton_impl import call as call_module

torch.set_num_threads(1)  # the tensors are tiny
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=[f"{c.engine}: {c.kind}" for c in CALLS])


def function(call):
    module, _, name = call.function.partition(":")
    return getattr(importlib.import_module(f"triton_impl.compat.{module}"), name)


def effects(call, result, given):
    """What a call returned and what it wrote, on the CPU."""
    results = result if isinstance(result, tuple) else (result,)
    written = [given[name] for name in call.written if name in given]
    return [tensor.detach().cpu() for tensor in (*results, *written) if tensor is not None]


def outcome(call, device="cpu", trim=False):
    given = arguments(call, device, trim)
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    result = function(call)(**given)
    for name, value in before.items():
        assert name in call.written or torch.equal(given[name], value), f"{name} was written"
    return effects(call, result, given)


def same(found, wanted, exact):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        if exact:
            assert torch.equal(one, other)
        else:  # SiLU may differ by one unit in the last place, of bfloat16's eight bits
            torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-9)


@EVERY_CALL
def test_entries_behind_the_batch_do_not_count(call):
    found, wanted = outcome(call), outcome(call, trim=True)
    if "retrieve_parent_token" in call.trimmed:
        rows = call.trimmed["retrieve_parent_token"]
        assert (found[-1][rows:] == 7).all()
        found[-1] = found[-1][:rows]
    same(found, wanted, exact=True)


@EVERY_CALL
def test_the_kernels_give_what_plain_torch_gives(call, monkeypatch):
    wanted = outcome(call)
    monkeypatch.setattr(call_module, "resolve", lambda backend, device: "triton")
    same(outcome(call), wanted, exact=False)


@pytest.mark.gpu
@EVERY_CALL
def test_in_a_captured_graph_and_without_synchronisation(call):
    """Each replay works on the arguments as they are then."""
    wanted = outcome(call)
    with torch.no_grad():
        same(outcome(call, "cuda"), wanted, exact=False)  # compiles
        given = arguments(call, "cuda")
        kept = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
        graph = torch.cuda.CUDAGraph()
        with no_synchronisation():
            function(call)(**arguments_on_device(kept, given))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        replays = torch.zeros((), device="cuda")
        with torch.cuda.graph(graph, stream=stream):
            replays.add_(1)  # a call of an idle rank launches nothing, and an empty graph is an error
            result = function(call)(**given)
        for count in (1, 2):
            for name, value in kept.items():
                given[name].copy_(value)
            graph.replay()
            assert replays.item() == count
            same(effects(call, result, given), wanted, exact=False)


def arguments_on_device(kept, given):
    """Fresh tensors beside the host values."""
    return {
        name: kept[name].clone() if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }


def test_the_table_covers_every_engine_and_kind():
    kinds = {call.engine.partition(" ")[0]: "" for call in CALLS}
    for call in CALLS:
        kinds[call.engine.partition(" ")[0]] += call.kind + "; "
    assert set(kinds) == {"SGLang", "vLLM", "aiter", "transformers", "FLA"}
    for engine, text in kinds.items():
        assert "prefill" in text, engine
        assert "decode" in text, engine
    for engine in ("SGLang", "vLLM"):
        for kind in ("captured", "idle data-parallel", "padded"):
            assert kind in kinds[engine], engine
    assert "speculative" in kinds["vLLM"]
    assert "verification" in kinds["SGLang"]
