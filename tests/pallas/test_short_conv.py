"""`short_conv`: the oracle's values for documents, padding, caches and layouts; gradients; vmap, meshes; bad input."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from oracle import reference_short
from pallas_impl import Unsupported, causal_conv1d, plain, short_conv
from tests.tools import short_conv_cases as cases

KERNEL = "mosaic_gpu_interpret"


def jnp_of(arrays):
    return {name: jnp.asarray(a) for name, a in arrays.items()}


def check(case, backend):
    rows, cached, weight_layout, cache_layout, extra = case
    activation = "silu" if cached else None
    arrays = cases.inputs(cached=cached, extra=extra)
    given = cases.in_layout(arrays, weight_layout, cache_layout) | cases.ROWS[rows]
    options = dict(weight_layout=weight_layout, cache_layout=cache_layout, activation=activation)
    out, cache = short_conv(**jnp_of(given), **options, backend=backend)
    want, new = reference_short.short_conv(**given, **options)
    np.testing.assert_allclose(out, want, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(cache, new)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: "-".join(map(str, case)))
def test_xla_documents_and_padding_are_rows_alone(case):
    check(case, "xla")


@pytest.mark.parametrize("case", cases.CASES[2:5], ids=lambda case: "-".join(map(str, case)))
def test_documents_and_padding_are_rows_alone(case):
    check(case, KERNEL)


def loss(backend, arrays, rows):
    out, new = short_conv(**arrays, **rows, activation="silu", backend=backend)
    return (out**2).sum() + (new**3).sum()


def alone(arrays, rows):
    """The same loss of every document as a call of its own."""
    total = 0.0
    for row in range(cases.BATCH):
        edges = cases.cuts(row, rows, cases.SEQLEN)
        for begin, end in itertools.pairwise(edges):
            out, new = causal_conv1d(
                arrays["x"][row : row + 1, begin:end], arrays["weight"], arrays["bias"],
                arrays["cache"][row : row + 1] if begin == 0 else None, activation="silu", backend="xla",
            )  # fmt: skip
            total += (out**2).sum()
        total += (new**3).sum()
    return total


@pytest.mark.parametrize(
    ("rows", "backend"), [("dense", "xla"), ("documents", "xla"), ("padding", "xla"), ("documents", KERNEL)]
)
def test_gradients_are_those_of_rows_alone(rows, backend):
    arrays = jnp_of(cases.inputs())
    got = jax.grad(functools.partial(loss, backend))(arrays, jnp_of(cases.ROWS[rows]))
    want = jax.jit(jax.grad(lambda arrays: alone(arrays, cases.ROWS[rows])))(arrays)
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-5, atol=2e-5, err_msg=name)


def test_padding_may_hold_anything():
    arrays = jnp_of(cases.inputs())
    arrays["x"] = arrays["x"].at[0, 5:].set(jnp.nan).at[1, 1:].set(jnp.inf)
    found = jax.grad(lambda arrays: loss("xla", arrays, {"lengths": jnp.asarray(cases.LENGTHS)}))(arrays)
    assert all(bool(jnp.isfinite(gradient).all()) for gradient in found.values())
    assert not found["x"][0, 5:].any()


@pytest.mark.parametrize("backend", ["xla", KERNEL])
def test_vmap_over_a_row_is_the_batch_axis(backend):
    arrays = jnp_of(cases.inputs())
    shared = dict(x=0, weight=None, bias=None, cache=0)

    def of_row(arrays):
        return loss(backend, arrays, {})

    got = jax.grad(lambda arrays: jax.vmap(of_row, (shared,))(arrays).sum())(arrays)
    want = jax.grad(lambda arrays: loss("xla", arrays, {}))(arrays)
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, want[name], rtol=1e-5, atol=2e-5, err_msg=name)


def test_a_row_without_batch_and_no_cache_wanted():
    arrays = jnp_of(cases.inputs())
    whole = short_conv(**arrays)
    one = short_conv(arrays["x"][1], arrays["weight"], arrays["bias"], cache=arrays["cache"][1])
    assert (one.out == whole.out[1]).all()
    assert (one.conv_states == whole.conv_states[1]).all()
    assert short_conv(**arrays, want_cache=False).conv_states is None


@pytest.mark.parametrize("rows", ["dense", "documents"])
def test_no_pool_where_no_cache_is_wanted(rows):
    """The kernels' programs, forward and backward, take no states and make none."""
    arrays = jnp_of(cases.inputs(cached=False, dim=128))
    run = functools.partial(short_conv, want_cache=False, backend="mosaic_gpu", **jnp_of(cases.ROWS[rows]))
    for call in (lambda a: run(**a), jax.grad(lambda a: run(**a).out.sum())):
        shapes = {v.aval.shape for e in _eqns(jax.make_jaxpr(call)(arrays)) for v in e.outvars}
        assert (cases.BATCH * cases.SEQLEN, 128) in shapes
        assert not any(len(shape) == 3 and shape[1:] == (3, 128) for shape in shapes)


def _eqns(jaxpr):
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from _eqns(value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_equal_rows_are_shifted_not_gathered(dtype):
    """The same bits as packed rows, forward and final states, with neither gather, sort nor scatter."""
    arrays = {name: array.astype(dtype) for name, array in jnp_of(cases.inputs()).items()}
    x, weight, bias, window = arrays["x"], arrays["weight"], arrays["bias"], arrays["cache"]
    options = dict(activation="silu", backend="xla")
    dense = causal_conv1d(x, weight, bias, window, **options)
    starts = plain.equal_rows(cases.BATCH, cases.BATCH * cases.SEQLEN)
    packed = causal_conv1d(x.reshape(-1, cases.DIM), weight, bias, window, starts, **options)
    assert (dense.out.reshape(packed.out.shape) == packed.out).all()
    assert (dense.conv_states == packed.conv_states).all()

    def total(x, weight, bias, window):
        return sum(
            jnp.sum(a.astype(jnp.float32) ** 2) for a in causal_conv1d(x, weight, bias, window, **options)
        )

    program = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3))).lower(x, weight, bias, window).as_text()
    assert not any(f"stablehlo.{name}" in program for name in ("gather", "scatter", "sort"))


@pytest.mark.parametrize(("changes", "error", "text"), cases.REFUSED)
def test_bad_input(changes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        short_conv(**cases.inputs() | changes)


def test_the_length_of_a_row_is_checked():
    arrays = cases.inputs(cached=False)
    with pytest.raises(ValueError, match="lengths: expected 0 to seqlen = 7, got 9"):
        short_conv(arrays["x"][0], arrays["weight"], lengths=np.int32(9))


def test_lengths_on_the_device_are_clamped():
    arrays = cases.inputs()
    got = short_conv(**arrays, lengths=jnp.array([99, -3]))
    want = short_conv(**arrays, lengths=np.array([cases.SEQLEN, 0]))
    assert (got.out == want.out).all()
    assert (got.conv_states == want.conv_states).all()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_axes(kind):
    """On a mesh of one device, here; the parts are those of tests/tools/sharded_jax.py on more."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(kind, kind))
    arrays = jnp_of(cases.inputs())
    want = jax.value_and_grad(lambda a: loss("xla", a, {}))(arrays)
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda a: a)(arrays)

        def run(arrays):
            out, new = short_conv(**arrays, activation="silu", backend="xla", axes=("data", "model"))
            return (out**2).sum() + (new**3).sum()

        got = jax.jit(jax.value_and_grad(run))(placed)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="axes: expected distinct axes of the mesh"):
            short_conv(**arrays, axes=("data", "data"))
    with pytest.raises(ValueError, match="axes: expected a mesh in context"):
        short_conv(**cases.inputs(), axes=("data", "model"))


def test_a_kernel_on_a_mesh_without_axes_is_refused():
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
    arrays = jnp_of(cases.inputs())
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(Unsupported, match="axes: expected"):
            jax.eval_shape(lambda a: short_conv(**a, backend="mosaic_gpu"), arrays)
        with pytest.raises(ValueError, match="x: expected axis 1 to be a multiple of 2"):
            jax.eval_shape(
                lambda x: short_conv(x, jnp.ones((3, 4)), axes=(None, "model")), arrays["x"][0, :, :3]
            )
