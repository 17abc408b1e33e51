"""The simulated engine on the Torch twin: the plain path, the kernels in the interpreter, and on a GPU at full length."""

import pytest
import torch

from oracle.conformance.traffic.engine import Engine, EngineFailure, run_engines
from triton_impl import adapter

OTHERS = ("prefill", "extend", "decode", "verify_again", "moved", "ended")
FRONT = (*OTHERS, "verify_rolling", "verify_windows", "verify_trees", "snapshots", "tracked", "forked")


def test_eager():
    counts = run_engines(adapter.eager(), 240)
    assert counts["front"]["ended"] >= 100
    assert all(done["ended"] >= 5 for done in counts.values())


# Seeds whose two steps, and what it takes to end what arrives in them, hold every kind of call in few calls.
FEW_CALLS = {"front": (58, FRONT), "back": (30, OTHERS), "ring": (30, OTHERS)}


@pytest.mark.parametrize("layout", FEW_CALLS)
def test_kernels_in_the_interpreter(layout):
    seed, kinds = FEW_CALLS[layout]
    counts = Engine(adapter.adapter("cpu"), layout, seed).run(2)
    assert set(kinds) <= set(counts)
    assert counts["calls"] <= 30


def test_a_stale_pool_is_seen():
    """The tensor of the call before last comes back, as from a graph whose output nobody copied."""

    class Stale(adapter.TorchAdapter):
        pools = ()

        def run(self, op, arrays, options):
            result = super().run(op, arrays, options)
            if "out" in result and arrays["conv_states"].shape[0] > 1:
                self.pools = (*self.pools[-30:], result["conv_states"])
                if len(self.pools) > 30:
                    result["conv_states"] = self.pools[-2]
            return result

    with pytest.raises(EngineFailure, match="expected bits"):
        Engine(Stale("eager", "cpu")).run(100)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_kernels():
    assert torch.cuda.is_available()
    counts = run_engines(adapter.adapter("cuda"), 2000)
    assert counts["front"]["ended"] >= 1000
