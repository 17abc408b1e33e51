"""Operations exported with symbolic sizes (`jax.export`) on plain jax.numpy, and run where these have values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import pallas_impl

DIM = 4


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def index(*values):
    return jnp.asarray(values, jnp.int32)


def prefill(**more):
    return dict(
        x=normal(7, DIM), weight=normal(DIM, 4), bias=normal(DIM), conv_states=normal(9, 5, DIM),
        query_start_loc=index(0, 4, 4, 6), cache_indices=index(2, 0, 1), has_initial_state=jnp.asarray([True, True, False]),
        **more,
    )  # fmt: skip


def step(**more):
    arrays = dict(weight=normal(DIM, 4), conv_states=normal(9, 6, DIM), cache_indices=index(2, -1, 1))
    return dict(x=normal(3, 2, DIM), bias=None) | arrays | more


# operation, arrays, options, and of each array that has symbols its shape
ROWS = dict(x="t, 4", query_start_loc="b + 1", cache_indices="b", has_initial_state="b")
CALLS = {
    "prefill": ("causal_conv1d_fn", prefill(), {}, ROWS),
    "no slots": (
        "causal_conv1d_fn", prefill() | dict(cache_indices=None, has_initial_state=None), dict(state_layout="back"), ROWS
    ),
    "snapshots": (
        "causal_conv1d_fn", prefill(snapshot_indices=index(5, -1, 6, 7, 8, -1).reshape(3, 2), residual=normal(7, DIM)),
        dict(snapshot_block_size=2), ROWS | dict(snapshot_indices="b, 2", residual="t, 4"),
    ),
    "decode": ("causal_conv1d_update", step() | dict(x=normal(3, DIM)), {}, dict(x="b, 4", cache_indices="b")),
    "several": (
        "causal_conv1d_update", step(), {}, dict(x="b, s, 4", cache_indices="b", conv_states="n, 6, 4")
    ),
    "rolling": (
        "causal_conv1d_update", step(num_accepted_tokens=index(1, 2, 1)), {},
        dict(x="b, 2, 4", cache_indices="b", num_accepted_tokens="b"),
    ),
    "packed": (
        "causal_conv1d_update", step(query_start_loc=index(0, 2, 3, 6)) | dict(x=normal(7, DIM)), dict(max_seqlen=3),
        dict(x="t, 4", query_start_loc="b + 1", cache_indices="b"),
    ),
    "tree": (
        "causal_conv1d_update", step(tree_parents=index(-1, 0, -1, -1, -1, 0).reshape(3, 2)), dict(commit=False),
        dict(x="b, s, 4", cache_indices="b", tree_parents="b, s"),
    ),
    "commit": (
        "commit_windows",
        dict(conv_states=normal(9, 3, DIM), window_out=normal(3, 2, 3, DIM), accepted_steps=index(0, 1, 5)), {},
        dict(window_out="b, 2, 3, 4", accepted_steps="b"),
    ),
    "links": (
        "tree_parents_from_links",
        dict(next_token=index(1, -1, -1).reshape(1, 3), next_sibling=index(-1, 2, -1).reshape(1, 3)), None,
        dict(next_token="b, n", next_sibling="b, n"),
    ),
    "rows": (
        "causal_conv1d", dict(x=normal(7, DIM), weight=normal(DIM, 4), query_start_loc=index(0, 4, 6)), {},
        dict(x="t, 4", query_start_loc="b + 1"),
    ),
    "dense": (
        "causal_conv1d", dict(x=normal(3, 2, DIM), weight=normal(DIM, 4), initial_states=normal(3, 3, DIM)), {},
        dict(x="b, s, 4", initial_states="b, 3, 4"),
    ),
    "documents": (
        "short_conv",
        dict(x=normal(2, 4, DIM), weight=normal(DIM, 4), cache=normal(2, 3, DIM), segment_ids=index(3, 3, 4, 3, 1, 1, 1, 1).reshape(2, 4)),
        {}, dict(x="b, s, 4", cache="b, 3, 4", segment_ids="b, s"),
    ),
    "padding": (
        "short_conv", dict(x=normal(2, 4, DIM), weight=normal(DIM, 4), lengths=index(1, 4)), {},
        dict(x="b, s, 4", lengths="b"),
    ),
}  # fmt: skip


def symbolic(arrays, shapes):
    scope = export.SymbolicScope()
    found = {}
    for name, array in arrays.items():
        shape = None if array is None else array.shape
        if array is not None and name in shapes:
            shape = export.symbolic_shape(shapes[name], scope=scope)
        found[name] = None if shape is None else jax.ShapeDtypeStruct(shape, array.dtype)
    return found


def function_of(case, backend="xla"):
    operation, arrays, options, shapes = CALLS[case]
    options = {} if options is None else options | dict(backend=backend)
    call = functools.partial(getattr(pallas_impl, operation), **options)

    def run(arrays):
        if operation not in ("causal_conv1d", "short_conv"):
            return call(**arrays)
        out, pull = jax.vjp(lambda x: call(**arrays | dict(x=x)), arrays["x"])
        return out, pull(out)

    return run, arrays, shapes


@pytest.mark.parametrize("case", CALLS)
def test_sizes_may_be_symbolic(case):
    run, arrays, shapes = function_of(case)
    exported = export.export(jax.jit(run))(symbolic(arrays, shapes))
    loaded = export.deserialize(exported.serialize()) if case == "prefill" else exported
    found, wanted = loaded.call(arrays), jax.jit(run)(arrays)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("case", "name"), [("prefill", "tokens"), ("decode", "batch"), ("several", "batch")])
def test_a_kernel_names_the_size_that_it_needs(case, name):
    run, arrays, shapes = function_of(case, "mosaic_gpu")
    with pytest.raises(pallas_impl.Unsupported, match=f"^{name}: a kernel is made for one size"):
        export.export(jax.jit(run), platforms=["cuda"])(symbolic(arrays, shapes))
