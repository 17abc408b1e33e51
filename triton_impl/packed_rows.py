"""Dense or packed rows of a differentiable call: where they start, states of their own, results of their own."""

import torch

from triton_impl.call import unit_stride


def row_starts(x, sizes, query_start_loc, max_seqlen):
    """Where the rows start in packed tokens, and a bound of the longest."""
    if query_start_loc is not None:
        return unit_stride(query_start_loc), max_seqlen
    seqlen = x.shape[1]
    return torch.arange(sizes.batch + 1, dtype=torch.int32, device=x.device) * seqlen, seqlen


def folds(x):
    """Whether dense x is a view of one row of batch * dim channels ([batch, dim, seqlen] memory), not of packed rows."""
    if x.dim() == 2 or x.shape[0] == 1 or x.shape[1] == 1:
        return False
    return x.stride(0) == x.shape[2] * x.stride(2) and x.stride(0) != x.shape[1] * x.stride(1)


def fresh_states(x, initial_states, sizes):
    """Final states, still as the initial ones or zeros, which rows of zero tokens keep; they fold if x does."""
    like = x if initial_states is None else initial_states
    if folds(x):
        states = like.new_zeros(sizes.width - 1, sizes.batch, sizes.dim).transpose(0, 1)
    else:
        states = like.new_zeros(sizes.batch, sizes.width - 1, sizes.dim)
    return states if initial_states is None else states.copy_(initial_states)


def owned(result):
    """A tensor of its own on the memory of `result`: autograd lets nobody change a view among several results in place."""
    return result.new_empty(0).set_(result) if result._is_view() else result
