"""The kernels of the serving arguments under the race detector of Pallas' GPU interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl import states, verify
from pallas_impl.backends import interpreter
from pallas_impl.xla_serving import Arrays, Options

DIM, LANES = 128, 128


def normal(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def index(*values):
    return jnp.asarray(values, jnp.int32)


def races(launch, *arguments):
    """Whether the detector sees a race in a call."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    interpret = type(interpreter(True))(out_of_bounds_reads="uninitialized", detect_races=True)
    try:
        jax.block_until_ready(jax.jit(functools.partial(launch, interpret=interpret))(*arguments))
        return gpu_callbacks.get_races().races_found
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()


def store_states(layout, **arrays):
    options = Options(False, -1, False, state_layout=layout, snapshot_block_size=3, apply_empty=True)

    def launch(x, pool, interpret):
        return states.launch(
            x, pool, index(0, 9, 9, 14), index(0, 1, 2), Arrays(jnp.asarray([True, False, True]), **arrays),
            after=x, history=3, options=options, lanes=LANES, interpret=interpret,
        )  # fmt: skip

    return races(launch, normal(0, 14, DIM), normal(1, 30, 11, DIM))


def decode(**arrays):
    options = Options(
        True, -1, True, commit="tree_parents" not in arrays, state_layout="back" if "tree_parents" not in arrays else "front"
    )  # fmt: skip

    def launch(x, weight, pool, interpret):
        return verify.launch(
            x, weight, None, pool, None, None, Arrays(window_out=normal(2, 2, 10, 3, DIM), **arrays), seqlen=10,
            options=options, lanes=LANES, interpret=interpret,
        )  # fmt: skip

    return races(launch, normal(3, 20, DIM), normal(4, DIM, 4), normal(5, 3, 11, DIM))


TABLE = jnp.arange(10, 28, dtype=jnp.int32).reshape(3, 6)
CASES = {
    "snapshots": (store_states, dict(layout="front", snapshot_indices=TABLE, track_indices=index(3, 4, 5))),
    "back": (store_states, dict(layout="back")),
    "ring": (store_states, dict(layout="ring", cache_seqlens=index(5, 0, 9), write_indices=index(0, 7, 8))),
    "verify": (decode, {}),
    "tree": (decode, dict(tree_parents=jnp.asarray([[-1, 0, 0, 1, 2, 2, 3, 4, 8, 0]] * 2, jnp.int32))),
}


@pytest.mark.parametrize(("run", "arrays"), CASES.values(), ids=CASES)
def test_no_data_races(run, arrays):
    assert not run(**arrays)


@pytest.mark.parametrize("case", ["snapshots", "tree"])
def test_a_missing_wait_is_seen(case, monkeypatch):
    """As a race, or by the interpreter where a barrier completes again before anyone looked."""
    monkeypatch.setattr(states.plgpu, "barrier_wait", lambda barrier: None)
    run, arrays = CASES[case]
    try:
        seen = run(**arrays)
    except jax.errors.JaxRuntimeError as error:
        seen = "previous completion was observed" in str(error) or "threads observed phase" in str(error)
    assert seen
