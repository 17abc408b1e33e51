"""causal-conv1d's `cpp_functions`, its operators `torch.ops.DaoAILab.*` and its extension `causal_conv1d_cuda`.

mamba_ssm imports the first beside the two functions, and in old releases the last. `install` registers them.
"""

import torch

from triton_impl.compat import causal_conv1d as interface
from triton_impl.compat.causal_conv1d import causal_conv1d_fn

__all__ = ["causal_conv1d_bwd_function", "causal_conv1d_fwd_function", "causal_conv1d_update_function"]


def causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation):
    """`causal_conv1d_fn` in its low-level form; returns out alone, final states go to `final_states_out`."""
    wanted = final_states_out is not None
    options = wanted, final_states_out, "silu" if silu_activation else None
    result = causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, *options)
    return result[0] if wanted else result


def causal_conv1d_update_function(
    x, conv_state, weight, bias, silu_activation, cache_seqlens, conv_state_indices
):
    """`causal_conv1d_update` in its low-level form."""
    activation = "silu" if silu_activation else None
    rest = activation, cache_seqlens, conv_state_indices
    return interface.causal_conv1d_update(x, conv_state, weight, bias, *rest)


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


def _fwd_cpp(x, weight, bias, seq_idx, initial_states, out, final_states_out, silu_activation):
    out.copy_(
        causal_conv1d_fwd_function(
            x, weight, bias, seq_idx, initial_states, final_states_out, silu_activation
        )
    )


def _bwd_cpp(
    x,
    weight,
    bias,
    dout,
    seq_idx,
    initial_states,
    dfinal_states,
    dx,
    dweight,
    dbias,
    dinitial_states,
    silu_activation,
):
    """The sums are added to what `dweight` and `dbias` hold, as the peer's kernel does it."""
    rest = dfinal_states, dx, dinitial_states is not None, silu_activation
    _, *sums, dinitial = causal_conv1d_bwd_function(x, weight, bias, dout, seq_idx, initial_states, *rest)
    for total, part in zip((dweight, dbias), sums, strict=True):
        if total is not None:
            total.add_(part)
    if dinitial_states is not None:
        dinitial_states.copy_(dinitial)


def _update_cpp(x, conv_state, weight, bias, out, silu_activation, cache_seqlens, conv_state_indices):
    rest = silu_activation, cache_seqlens, conv_state_indices
    out.copy_(causal_conv1d_update_function(x, conv_state, weight, bias, *rest))


_OPERATORS = {
    "_causal_conv1d_fwd_cpp(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states,"
    " Tensor(a!) out, Tensor(b!)? final_states_out, bool silu_activation) -> ()": _fwd_cpp,
    "_causal_conv1d_bwd_cpp(Tensor x, Tensor weight, Tensor? bias, Tensor dout, Tensor? seq_idx,"
    " Tensor? initial_states, Tensor? dfinal_states, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias,"
    " Tensor(d!)? dinitial_states, bool silu_activation) -> ()": _bwd_cpp,
    "_causal_conv1d_update_cpp(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor(b!) out,"
    " bool silu_activation, Tensor? cache_seqlens, Tensor? conv_state_indices) -> ()": _update_cpp,
}


def register_operators():
    """Defines `torch.ops.DaoAILab.*` unless the peer has; returns their library, or None."""
    if hasattr(torch.ops.DaoAILab, "_causal_conv1d_fwd_cpp"):
        return None
    library = torch.library.Library("DaoAILab", "FRAGMENT")
    for schema, function in _OPERATORS.items():
        library.define(schema)
        name = schema.partition("(")[0]
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"DaoAILab::{name}", lambda *args: None, lib=library)
    return library


def forget_operators(library):
    """Undoes `register_operators`."""
    if library is not None:
        library._destroy()


# The extension itself: from 1.5 on it writes what it is given, before that it returned its results.


def causal_conv1d_fwd(*arguments):
    """(x, weight, bias[, seq_idx[, initial_states, final_states_out]], silu) -> out; since 1.5 `out` is fifth, from 0."""
    *tensors, silu = arguments
    if len(tensors) == 7:
        return _fwd_cpp(*tensors, silu)
    return causal_conv1d_fwd_function(*tensors, *[None] * (6 - len(tensors)), silu)


def causal_conv1d_bwd(*arguments):
    """The ten arguments of 1.2 to 1.4 -> (dx, dweight, dbias, dinitial_states), or the twelve since 1.5 -> None."""
    return (_bwd_cpp if len(arguments) == 12 else causal_conv1d_bwd_function)(*arguments)


def causal_conv1d_update(*arguments):
    """(x, conv_state, weight, bias, silu[, cache_seqlens[, conv_state_indices]]) -> out; since 1.5 `out` is fourth."""
    if len(arguments) == 8:
        return _update_cpp(*arguments)
    return causal_conv1d_update_function(*arguments, *[None] * (7 - len(arguments)))
