"""`short_conv`: the oracle's values for documents, padding, caches and layouts; gradients; vmap, meshes; bad input."""

import functools
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from oracle import reference_short
from pallas_impl import Unsupported, backward, causal_conv1d, config, plain, short_conv
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


def gradients(run, *arrays):
    """The result of `run`, and its gradients for an upstream gradient that is the same in any order of tokens."""
    out, back = jax.vjp(run, *arrays)
    return out, *back(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))


@functools.cache
def documents_on_kernels(width, dtype, cached, damage=None):
    """(the arrays, [out, dx, dweight, dbias] and dcache) of rows of documents on the kernels."""
    arrays = jnp_of(cases.inputs(width, cached=cached, seqlen=cases.LONG))
    x, weight, bias, *cache = (a.astype(dtype) for a in arrays.values())
    if damage == "cache":
        cache[0] = jnp.full_like(cache[0], jnp.nan)
    elif damage:
        x = x.at[damage].set(jnp.nan)
    given = x, weight, bias, *cache
    return given, jax.jit(functools.partial(gradients, functools.partial(of_documents, KERNEL)))(*given)


def of_documents(backend, x, weight, bias, cache=None):
    ids = jnp.asarray(cases.LONG_IDS)
    given = x, weight, bias
    options = dict(cache=cache, segment_ids=ids, want_cache=False, activation="silu", backend=backend)
    return short_conv(*given, **options).out


def alone_on_kernels(x, weight, bias, cache):
    """`out` of the documents as packed rows of their own."""
    starts, rows, first = cases.starts_alone()
    windows = jnp.where(jnp.asarray(first)[:, None, None], cache[jnp.asarray(rows)], 0)
    flat = x.reshape(-1, cases.DIM), weight, bias, windows, jnp.asarray(starts)
    return causal_conv1d(*flat, activation="silu", backend=KERNEL).out.reshape(x.shape)


@pytest.mark.parametrize(
    ("width", "dtype", "cached"),
    [(4, "float32", True), (2, "bfloat16", False), (3, "float16", True), (8, "float32", False)],
)  # fmt: skip
def test_documents_at_the_borders_of_blocks(width, dtype, cached):
    """To a last bit or two of the largest value, since compilers fuse products; sums over all tokens to one of each term."""
    given, found = documents_on_kernels(width, dtype, cached)
    wanted = jax.jit(functools.partial(gradients, functools.partial(of_documents, "xla")))(*given)
    for name, got, want in zip(("out", "dx", "dweight", "dbias", "dcache"), found, wanted, strict=False):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        near = 2 * float(jnp.finfo(dtype).eps) * np.abs(want).max()
        if name in ("dweight", "dbias"):
            x = given[0].astype(jnp.float32)
            near += x[..., 0].size * float(jnp.finfo(jnp.float32).eps) * max(1, float(jnp.abs(x).max()))
        np.testing.assert_allclose(got, want, rtol=0, atol=near, err_msg=name)


@pytest.mark.parametrize("block_t", [8, 16])
def test_documents_have_the_bits_of_rows_alone(monkeypatch, block_t):
    given, (out, *_) = documents_on_kernels(4, "float32", True)
    if block_t == 16:  # as long rows have it
        blocks = config.PrefillConfig(False, 16, 128, row_blocks=3, tail_blocks=0)
        chosen = mock.Mock(return_value=blocks)
        jax.clear_caches()
        with monkeypatch.context() as patch:
            patch.setattr(config, "prefill_config", chosen)
            out = of_documents(KERNEL, *given)
        chosen.assert_called_once()
        jax.clear_caches()
    np.testing.assert_array_equal(out, alone_on_kernels(*given))


def test_gradients_of_documents_have_the_bits_of_any_block(monkeypatch):
    """A block of 8 groups: beginnings in one after another, none in two, and in the row's last."""
    given, (_, dx, *_, dcache) = documents_on_kernels(4, "float32", True)
    chosen = mock.Mock(return_value=config.BackwardConfig(False, 64, row_blocks=1))
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr(backward, "backward_config", chosen)
        _, one_dx, *_, one_dcache = gradients(functools.partial(of_documents, KERNEL), *given)
    chosen.assert_called_once()
    jax.clear_caches()
    np.testing.assert_array_equal(one_dx, dx)
    np.testing.assert_array_equal(one_dcache, dcache)


@pytest.mark.parametrize("damage", ["cache", (0, 9), (1, 36)])
def test_what_is_in_another_document_is_not_read(damage):
    """A NaN stays in the documents of its token, or of the cache; dweight, which is a sum over all, is one."""
    _, clean = documents_on_kernels(4, "float32", True)
    _, found = documents_on_kernels(4, "float32", True, damage)
    reached = cases.reached_from(damage)
    for got, want in zip(found[:2], clean[:2], strict=True):
        np.testing.assert_array_equal(got[~reached], want[~reached])
        assert np.isnan(np.asarray(got)[reached]).any()
    dcache = np.isnan(found[4]).any((1, 2))
    assert (dcache == reached[:, 0]).all()


def test_padding_may_hold_anything():
    arrays = jnp_of(cases.inputs())
    arrays["x"] = arrays["x"].at[0, 5:].set(jnp.nan).at[1, 1:].set(jnp.inf)
    found = jax.grad(lambda arrays: loss("xla", arrays, {"lengths": jnp.asarray(cases.LENGTHS)}))(arrays)
    assert all(bool(jnp.isfinite(gradient).all()) for gradient in found.values())
    assert not found["x"][0, 5:].any()


@pytest.mark.parametrize(("backend", "rows"), [("xla", "dense"), (KERNEL, "dense"), (KERNEL, "documents")])
def test_vmap_over_a_row_is_the_batch_axis(backend, rows):
    arrays, rows = jnp_of(cases.inputs()), jnp_of(cases.ROWS[rows])
    shared = dict(x=0, weight=None, bias=None, cache=0)

    def of_row(arrays, rows):
        return loss(backend, arrays, rows)

    got = jax.grad(lambda arrays: jax.vmap(of_row, (shared, 0))(arrays, rows).sum())(arrays)
    want = jax.grad(lambda arrays: loss("xla", arrays, rows))(arrays)
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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "dtype", "dim", "seqlen"),
    [(4, "bfloat16", 2048, 2048), (2, "bfloat16", 640, 1001), (3, "float16", 2048, 515), (4, "float32", 384, 300),
     (5, "bfloat16", 1032, 777), (8, "float32", 256, 130), (4, "bfloat16", 100, 61), (1, "bfloat16", 256, 40)],
)  # fmt: skip
@pytest.mark.parametrize("cached", [False, True])
def test_gpu_documents_have_the_bits_of_rows_alone(width, dtype, dim, seqlen, cached):
    """Forward, dx and the cache's gradient, of "auto"; the sums over all tokens to their rounding."""
    rng = np.random.default_rng(seqlen)
    begins = rng.random((3, seqlen)) < np.array([[0.3], [0.01], [0.0]])
    begins[:, 0] = True
    starts = np.append(np.flatnonzero(begins), begins.size).astype(np.int32)
    first, rows = starts[:-1] % seqlen == 0, starts[:-1] // seqlen
    ids = jnp.asarray(np.cumsum(begins, axis=1) % 3, jnp.int32)
    shapes = (3, seqlen, dim), (dim, width), (dim,), (3, seqlen, dim), (3, width - 1, dim)
    x, weight, bias, dout, cache = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype) for shape in shapes
    )
    cache = (cache,) if cached else ()

    def dense(x, weight, bias, cache=None):
        options = dict(segment_ids=ids, want_cache=False, activation="silu")
        return short_conv(x, weight, bias, cache=cache, **options).out

    def packed(x, weight, bias, cache=None):
        windows = None if cache is None else jnp.where(jnp.asarray(first)[:, None, None], cache[rows], 0)
        flat = x.reshape(-1, dim), weight, bias, windows, jnp.asarray(starts)
        return causal_conv1d(*flat, activation="silu", backend="mosaic_gpu").out.reshape(x.shape)

    def training(run):
        def step(dout, *arrays):
            out, back = jax.vjp(run, *arrays)
            return out, *back(dout)

        return jax.jit(step)(dout, x, weight, bias, *cache)

    for name, got, want in zip(
        ("out", "dx", "dweight", "dbias", "dcache"), training(dense), training(packed), strict=False
    ):
        got, want = (np.asarray(a, np.float32) for a in (got, want))
        if name in ("dweight", "dbias"):
            near = 2 * float(jnp.finfo(dtype).eps) * np.abs(want).max() + 3 * seqlen * 2.0**-20
            np.testing.assert_allclose(got, want, rtol=0, atol=near, err_msg=name)
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)
