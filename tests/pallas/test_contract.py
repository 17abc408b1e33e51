"""The contract on JAX's own objects: dimensions of exported programs, tracers and arrays as host integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from oracle.contract import CommitCall, FnCall, RowsCall, UpdateCall, normalised
from pallas_impl import causal_conv1d_fn

T, B, S, N = export.symbolic_shape("t, b, s, n")


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_symbolic_sizes_pass():
    weight, pool, starts, slots = (
        array(64, 4),
        array(N, 6, 64),
        array(B + 1, dtype="int32"),
        array(B, dtype="int32"),
    )
    call = FnCall(array(T, 64), weight, None, pool, starts, slots, max_seqlen=T, residual=array(T, 64))
    assert call.check()[:4] == (T, 64, 4, B)
    assert normalised(call).max_seqlen is T
    assert UpdateCall(array(B, 64), weight, None, pool).check().tokens == B
    several = UpdateCall(array(B, S, 64), weight, None, pool, window_out=array(N, S, 3, 64))
    assert several.check().tokens == B * S
    rolling = several._replace(window_out=None, conv_states=array(N, S + 3, 64), num_accepted_tokens=slots)
    assert rolling.check().state_len == S + 3
    assert CommitCall(pool, array(N, S, 3, 64), slots).check().batch == B
    assert RowsCall(array(B, S, T), array(T, 4), None, array(B, 3, T)).check().dim == T


def test_what_is_known_of_symbolic_sizes_is_checked():
    with pytest.raises(
        ValueError, match=r"^initial_states: expected shape \[batch=b, width-1=3, dim=64\], got \[s, 3, 64\]$"
    ):
        RowsCall(array(B, S, 64), array(64, 4), None, array(S, 3, 64)).check()
    with pytest.raises(TypeError, match=r"^pad_slot_id: expected an integer known on the host, got b$"):
        UpdateCall(array(B, 64), array(64, 4), None, array(N, 6, 64), pad_slot_id=B).check()


def test_arrays_and_tracers_are_no_host_integers():
    x, weight, starts = array(4, 8), array(8, 4), array(2, dtype="int32")
    text = "^max_seqlen: expected an integer known on the host, got "
    for value in (jnp.int32(4), np.array(4)):
        with pytest.raises(TypeError, match=text):
            FnCall(x, weight, None, None, starts, max_seqlen=value).check()

    def traced(longest):
        return FnCall(x, weight, None, None, starts, max_seqlen=longest).check().tokens

    with pytest.raises(TypeError, match=rf"{text}jax\.\w*Tracer \(make the argument static\)"):
        jax.jit(traced)(4)
    assert jax.jit(traced, static_argnums=0)(np.int64(4)) == 4


def test_validation_sees_the_slot_number_that_was_given():
    """One too large for an int64 marks no slot, so -1 is none either."""
    x, weight, pool, starts = jnp.ones((2, 8)), jnp.ones((8, 4)), jnp.ones((3, 3, 8)), jnp.array([0, 2])
    with pytest.raises(
        ValueError,
        match=rf"^cache_indices: expected pad_slot_id={2**70} or a slot in \[0, 3\) in row 0, got -1$",
    ):
        causal_conv1d_fn(x, weight, None, pool, starts, jnp.array([-1]), pad_slot_id=2**70, validate=True)
    out, _ = causal_conv1d_fn(x, weight, None, pool, starts, jnp.array([1]), pad_slot_id=2**70, validate=True)
    assert (out[1] == 2).all()
