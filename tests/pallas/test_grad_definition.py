"""The reference gradients against autodiff of a plain definition in JAX, in float64."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tools import gradient_cases as gradients

# Few, since every new shape is compiled; torch's file has the others.
NAMES = ("width-1", "width-3", "width-8", "linear", "no-initial", "empty-rows", "dense-short")
CASES = {name: gradients.CASES[name] for name in NAMES}


def definition(x, weight, bias, initial_states, query_start_loc, activation):
    """Rows one by one, tap by tap."""
    dim, width = weight.shape
    if query_start_loc is None:
        query_start_loc = [i * x.shape[1] for i in range(len(x) + 1)]
    tokens = x.reshape(-1, dim)
    out, states = [], []
    for i, (start, end) in enumerate(pairwise(query_start_loc)):
        initial = jnp.zeros((width - 1, dim)) if initial_states is None else initial_states[i]
        entries = jnp.concatenate([initial, tokens[start:end]])
        pre = sum(weight[:, j] * entries[j : j + end - start] for j in range(width))
        pre = pre if bias is None else pre + bias
        out.append(jax.nn.silu(pre) if activation else pre)
        states.append(entries[end - start :])
    out.append(jnp.zeros_like(tokens[query_start_loc[-1] :]))
    states = jnp.stack(states) if states else jnp.zeros((0, width - 1, dim))
    return jnp.concatenate(out).reshape(x.shape), states


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reference_is_autodiff_of_the_definition(case):
    problem = gradients.build(case)
    starts = problem.arguments["query_start_loc"]
    leaves = {
        name: a.values()
        for name, a in problem.arguments.items()
        if a is not None and name != "query_start_loc"
    }

    def loss(leaves):
        arguments = dict.fromkeys(problem.arguments) | leaves
        arguments["query_start_loc"] = None if starts is None else starts.data.tolist()
        out, states = definition(**arguments, activation=problem.activation)
        total = (out * np.nan_to_num(problem.dout.values())).sum()
        return (
            total
            if problem.dfinal_states is None
            else total + (states * problem.dfinal_states.values()).sum()
        )

    with jax.enable_x64(True):
        found = jax.grad(loss)(jax.tree.map(jnp.asarray, leaves))
        exact = gradients.expected(problem)
        for name, gradient in found.items():
            assert gradient.dtype == np.float64
            assert np.allclose(gradient, getattr(exact, name), rtol=1e-11, atol=1e-11), name
