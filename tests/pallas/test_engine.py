"""The simulated engine on the JAX twin: the plain path, the kernels in the interpreter, and on a GPU at full length."""

import jax
import pytest

from oracle.conformance.traffic.engine import Engine, EngineFailure, run_engines
from oracle.numerics import TypedArray
from pallas_impl import adapter

OTHERS = ("prefill", "extend", "decode", "verify_again", "moved", "ended")
FRONT = (*OTHERS, "verify_rolling", "verify_windows", "verify_trees", "snapshots", "tracked", "forked")


class Compilations:
    """Counts what XLA compiles."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event, seconds, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def test_xla():
    """Every kind of call compiles once; whatever traffic comes then compiles nothing."""
    compilations = Compilations()
    counts = run_engines(adapter.xla(), 160)
    assert counts["front"]["ended"] >= 80
    assert all(done["ended"] >= 5 for done in counts.values())
    assert compilations.count > 0
    before = compilations.count
    run_engines(adapter.xla(), 80, seed=1)
    assert compilations.count == before


# Seeds whose two steps, and what it takes to end what arrives in them, hold every kind of call in few calls.
FEW_CALLS = {"front": (58, FRONT), "back": (30, OTHERS), "ring": (30, OTHERS)}


@pytest.mark.parametrize("layout", FEW_CALLS)
def test_kernels_in_the_interpreter(layout):
    seed, kinds = FEW_CALLS[layout]
    counts = Engine(adapter.adapter("cpu"), layout, seed).run(2)
    assert set(kinds) <= set(counts)
    assert counts["calls"] <= 30


def test_a_lost_update_is_seen():
    """The pool that came in is returned, as from a call whose donated result was dropped."""

    class Lost(adapter.JaxAdapter):
        calls = 0

        def run(self, op, arrays, options):
            result = super().run(op, arrays, options)
            self.calls += "out" in result
            if self.calls == 40 and "out" in result:
                pool = arrays["conv_states"]
                result["conv_states"] = TypedArray(pool.dtype, pool.typed.data)
            return result

    with pytest.raises(EngineFailure, match="expected bits"):
        Engine(Lost("xla", jax.devices("cpu")[0])).run(100)


@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_kernels():
    counts = run_engines(adapter.adapter("gpu"), 2000)
    assert counts["front"]["ended"] >= 1000
