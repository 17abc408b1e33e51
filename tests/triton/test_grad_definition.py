"""The reference gradients against autograd of a plain definition in torch, in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from oracle import reference_grad
from tests.tools import gradient_cases as gradients

CASES = {name: case for name, case in gradients.CASES.items() if case.axes["dim"] <= 8}


def definition(x, weight, bias, initial_states, query_start_loc, activation):
    """Rows one by one through torch's own depthwise convolution."""
    dim, width = weight.shape
    if query_start_loc is None:
        query_start_loc = [i * x.shape[1] for i in range(len(x) + 1)]
    tokens = x.reshape(-1, dim)
    out, states = [], []
    for i, (start, end) in enumerate(pairwise(query_start_loc)):
        initial = x.new_zeros(width - 1, dim) if initial_states is None else initial_states[i]
        entries = torch.cat([initial, tokens[start:end]])
        if end > start:
            pre = torch.nn.functional.conv1d(entries.T[None], weight[:, None], bias, groups=dim)[0].T
            out.append(torch.nn.functional.silu(pre) if activation else pre)
        states.append(entries[end - start :])
    out.append(torch.zeros_like(tokens[query_start_loc[-1] :]))
    states = torch.stack(states) if states else x.new_zeros(0, width - 1, dim)
    return torch.cat(out).reshape(x.shape), states


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_is_autograd_of_the_definition(case):
    problem = gradients.build(case)
    arguments = {
        name: None
        if a is None
        else a.data.tolist()
        if name == "query_start_loc"
        else torch.tensor(a.values())
        for name, a in problem.arguments.items()
    }
    leaves = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, states = definition(**arguments, activation=problem.activation)
    live = torch.from_numpy(~np.isnan(problem.dout.values()))
    loss = (out * torch.where(live, torch.from_numpy(problem.dout.values()), 0)).sum()
    if problem.dfinal_states is not None:
        loss = loss + (states * torch.from_numpy(problem.dfinal_states.values())).sum()
    exact = gradients.expected(problem)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else ()
    for name, gradient in zip(leaves, found, strict=False):
        gradient = torch.zeros_like(leaves[name]) if gradient is None else gradient
        assert np.allclose(gradient.numpy(), getattr(exact, name), rtol=1e-11, atol=1e-11), name
    forward = reference_grad.causal_conv1d(**problem.arguments, activation=problem.activation)
    assert np.allclose(forward.out.values(), out.detach().numpy(), rtol=2**-7, atol=2**-20)
