"""causal-conv1d's `cpp_functions`, which mamba_ssm imports beside the two functions; registered by `install`."""

from oracle.contract import Unsupported
from triton_impl.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update

__all__ = ["causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"]


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    """`causal_conv1d_fn` in its low-level form; returns out alone, final states go to `final_states_out`."""
    wanted = final_states_out is not None
    result = causal_conv1d_fn(
        x,
        weight,
        bias,
        seq_idx,
        initial_states,
        wanted,
        final_states_out,
        "silu" if silu_activation else None,
    )
    return result[0] if wanted else result


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):
    """`causal_conv1d_update` in its low-level form."""
    activation = "silu" if silu_activation else None
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


def causal_conv1d_bwd_function(*args, **kwargs):
    """Raises Unsupported: these operations serve, they have no gradient."""
    raise Unsupported(
        "causal_conv1d_bwd_function: expected inference, got a backward pass (there is no gradient)"
    )
