"""The kernels of the serving arguments under the race detector of Pallas' GPU interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl import states, trees, verify
from pallas_impl.records import Arrays, Options
from tests.tools.races_jax import run_with_races

DIM = 128


def normal(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def index(*values):
    return jnp.asarray(values, jnp.int32)


def store_states(layout, **arrays):
    options = Options(state_layout=layout, snapshot_block_size=3, apply_empty=True, own_state=False)
    x = normal(0, 14, DIM)
    arrays = Arrays(
        x, normal(4, DIM, 4), None, normal(1, 30, 11, DIM), index(0, 9, 9, 14), index(0, 1, 2),
        jnp.asarray([True, False, True]), **arrays,
    )  # fmt: skip
    return run_with_races(states.launch, arrays, options, after=x)[1]


def decode(**arrays):
    tree = "tree_parents" in arrays
    options = Options(
        True, always_state=True, commit=not tree, state_layout="front" if tree else "back", seqlen=10
    )
    arrays = Arrays(
        normal(3, 20, DIM), normal(4, DIM, 4), None, normal(5, 3, 11, DIM), window_out=normal(2, 2, 10, 3, DIM), **arrays
    )  # fmt: skip
    return run_with_races((trees if tree else verify).launch, arrays, options)[1]


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
    assert run(**arrays)
