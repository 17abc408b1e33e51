"""What the tests put in JAX's place, against JAX's own.

The interpreter that runs kernels on NumPy arrays (tests/tools/quick_pallas.py), and the layouts of lowered kernels
(tests/tools/quick_lowering.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreters
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import constraints
from jax.experimental.pallas import mosaic_gpu as plgpu

import pallas_impl
from pallas_impl.call import interpreter
from pallas_impl.launch import run
from tests.tools import code_calls, pallas_code, quick_pallas

pytestmark = pytest.mark.skipif(
    not jax.__version__.startswith(quick_pallas.VERSIONS),
    reason="other versions of JAX run in their own interpreter",
)


@pytest.fixture
def interpreters_own(monkeypatch):
    """Kernels that are lowered from here on run in JAX's interpreter."""

    def put():
        monkeypatch.setattr(interpreters, "interpret_pallas_call", interpreters.interpret_pallas_call.quick)
        jax.clear_caches()

    yield put
    jax.clear_caches()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bits_of_both(dtype, interpreters_own):
    random = np.random.default_rng(0)
    x, weight, pool = (
        jnp.asarray(random.standard_normal(shape), dtype) for shape in ((11, 40), (40, 4), (4, 3, 40))
    )
    offsets, slots = jnp.array([0, 5, 5, 11], jnp.int32), jnp.array([2, 0, 3], jnp.int32)

    def call():
        return pallas_impl.causal_conv1d_fn(
            x, weight, None, conv_states=pool, query_start_loc=offsets, cache_indices=slots,
            has_initial_state=jnp.array([True, True, False]), backend="mosaic_gpu_interpret",
        )  # fmt: skip

    quick = call()
    interpreters_own()
    for ours, theirs in zip(quick, call(), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def launched(body, **scratch):
    """What `body` leaves of two rows of four lanes."""
    result = dict(out0=jax.ShapeDtypeStruct((2, 4), jnp.float32))
    operands = dict(x=jnp.arange(8.0, dtype=jnp.float32).reshape(2, 4))
    found = run(body, "checked", 2, operands, result, scratch, interpret=interpreter(True))
    return np.asarray(found[0])


def test_what_no_program_writes_is_nan():
    def body(refs):
        @pl.when(jax.lax.axis_index("program") == 1)
        def _():
            refs.out0[1] = refs.x[0] + 1.0

    found = launched(body)
    assert np.isnan(found[0]).all()
    assert found[1].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_store_out_of_bounds_is_an_error():
    def body(refs):
        row = jax.lax.axis_index("program") + 1
        refs.out0[row] = refs.x[0]

    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds swap"):
        launched(body)


def test_a_barrier_that_completes_again_before_anyone_looked_is_an_error():
    def body(refs):
        for row in range(2):
            plgpu.copy_gmem_to_smem(refs.x.at[row], refs.tile, refs.ready)

    with pytest.raises(
        jax.errors.JaxRuntimeError,
        match=r"Barrier (arrival was completed again|completed phase 1, but no threads observed phase 0)",
    ):
        launched(body, tile=plgpu.SMEM((4,), jnp.float32), ready=plgpu.Barrier())


@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="this JAX infers layouts as it is")
@pytest.mark.parametrize(
    "call", [code_calls.prefill(dim=256), code_calls.verify(dim=256)], ids=["prefill", "verify"]
)
def test_layouts_are_those_that_jax_infers(call, monkeypatch):
    quick = pallas_code.lowered(call)
    monkeypatch.setattr(constraints, "reduce_constraint", constraints.reduce_constraint.whole)
    monkeypatch.setattr(constraints, "_reduce_system_once", constraints._reduce_system_once.whole)
    jax.clear_caches()
    assert pallas_code.lowered(call) == quick
