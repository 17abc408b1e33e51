"""causal-conv1d's `cpp_functions`, which mamba_ssm imports beside the two functions; registered by `install`."""

import torch

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


def causal_conv1d_bwd_function(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    initial_states,
    dfinal_states,
    dx,
    return_dinitial_states,
    silu_activation,
):
    """Gradients (dx, dweight, dbias, dinitial_states), None where there is none; runs the forward pass once more.

    `dx`, if given, is written and returned.
    """
    inputs = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    if not return_dinitial_states:
        leaves.pop("initial_states", None)
    with torch.enable_grad():
        results = causal_conv1d_fn(
            **(inputs | leaves),
            seq_idx=seq_idx,
            return_final_states=dfinal_states is not None,
            activation="silu" if silu_activation else None,
        )
    results, upstream = ((results,), (dout,)) if dfinal_states is None else (results, (dout, dfinal_states))
    found = dict(zip(leaves, torch.autograd.grad(results, list(leaves.values()), upstream), strict=True))
    if dx is not None:
        found["x"] = dx.copy_(found["x"])
    return tuple(found.get(name) for name in inputs)
