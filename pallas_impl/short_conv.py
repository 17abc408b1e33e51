"""The convolution as models call it: dense rows with a cache, documents or padding, in any usual layout.

Everything here is jax.numpy around one of two forms: `plain.dense`, or the kernels on rows of equal length (`_convolve`).
"""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from oracle.contract import ConvOutput, ShortConvCall, Unsupported, check_lengths
from pallas_impl import backward, parts, plain
from pallas_impl.call import resolve, run_rows
from pallas_impl.parts import BATCH, CHANNELS
from pallas_impl.records import Arrays
from pallas_impl.rows import document_marks
from pallas_impl.tracing import mappable, vary_alike

AxisNames: TypeAlias = str | tuple[str, ...] | None


def short_conv(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    cache: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    weight_layout: str = "dim_width",
    cache_layout: str = "time",
    want_cache: bool = True,
    activation: str | None = None,
    backend: str = "auto",
    axes: tuple[AxisNames, AxisNames] | None = None,
) -> ConvOutput:
    """Causal depthwise convolution of dense rows, for models: differentiable, and a cache that is given is read.

    Gradients of first order in x, weight, bias and cache. Works under `jax.jit`, `jax.checkpoint`, `jax.lax.scan` and
    `jax.vmap`, which joins the batch axis, on kernels too. Keyword arguments that are no arrays are static.

    Args:
      x: [batch, seqlen, dim], or [seqlen, dim] and then no array has the batch axis; float32, float16 or bfloat16.
      weight: any of the three dtypes, in `weight_layout`; width 1 to 8.
      bias: [dim], any of the three dtypes, or None.
      cache: the last inputs before x, oldest first, any of the three dtypes, in `cache_layout`: width-1 or width of
        them; None: zeros.
      segment_ids: [batch, seqlen] integer, or None. A document is a run of equal ids: none sees another, and an id that
        comes back is a new one. The cache belongs to the first document, the new cache to the last.
      lengths: [batch] integer, or None: what is behind the first so many tokens is padding. Its outputs are zero, it has
        no gradient, and the new cache ends before it. A NumPy array is checked, a JAX array clamped to [0, seqlen].
      weight_layout: "dim_width" [dim, width], "width_dim" [width, dim], "torch" [dim, 1, width] or "flax" [width, 1, dim].
      cache_layout: "time" [batch, columns, dim] or "channels" [batch, dim, columns].
      want_cache: False: no new cache is made, which costs nothing.
      activation: None, "silu" or "swish".
      backend: as in `causal_conv1d`.
      axes: (batch axis, channel axis) of the mesh in context (`jax.set_mesh`), or of the one that x lies on: a name, a
        tuple of names, or None. The call then runs on every device's part of x, in `jax.shard_map`. None: as x is split,
        where its type names the axes (explicit meshes), its sharding does (outside `jit`), or the compiler does
        ("mosaic_gpu" inside `jit` on Auto axes); a kernel on parts that depend on each other is refused.

    Returns:
      ConvOutput(out, conv_states): `out` in x's shape and dtype; `conv_states` the new cache, as the given one, or
      [batch, width-1, dim] (in `cache_layout`) in x's dtype; None without `want_cache`.

    Raises:
      ValueError, TypeError: as `oracle.contract.ShortConvCall`; axes that the mesh lacks, or that do not divide x.
      Unsupported: the backend asked for cannot run here; a kernel on x whose tokens are split, which on Auto axes inside
        `jit` XLA raises as its own error, or on a mesh without `axes` of which nobody says how it splits x.
    """
    call = ShortConvCall(
        x, weight, bias, cache, segment_ids, lengths, weight_layout, cache_layout, want_cache, activation, backend
    )  # fmt: skip
    sizes = call.check()
    if isinstance(lengths, np.ndarray | np.generic):
        check_lengths(np.atleast_1d(lengths).tolist(), sizes.seqlen)
    backend = resolve(backend, x)
    options = (activation, backend, weight_layout, cache_layout, want_cache)
    arrays = dict(x=x, weight=weight, bias=bias, cache=cache, segment_ids=segment_ids, lengths=lengths)
    mesh, axes = _mesh_axes(axes, x, backend)
    if mesh is None:
        return ConvOutput(*_run(options, arrays))
    return ConvOutput(*_split(options, arrays, mesh, axes))


@functools.partial(jax.jit, static_argnums=0)
def _run(options, arrays):
    if arrays["x"].ndim == 2:
        shared = ("weight", "bias")
        arrays = {
            name: a if a is None or name in shared else jnp.asarray(a)[None] for name, a in arrays.items()
        }
        return jax.tree.map(lambda result: result[0], _batched(options, arrays))
    return _batched(options, arrays)


def _batched(options, arrays):
    activation, backend, weight_layout, cache_layout, want_cache = options
    x, bias, lengths = jnp.asarray(arrays["x"]), arrays["bias"], arrays["lengths"]
    cache, seqlen = arrays["cache"], x.shape[1]
    weight = _dim_width(jnp.asarray(arrays["weight"]), weight_layout)
    history = weight.shape[1] - 1
    if cache is not None and cache_layout == "channels":
        cache = plain.moved(lambda _, cache: cache.swapaxes(1, 2), (), jnp.asarray(cache))
    x, weight, bias, cache = vary_alike(x, weight, bias, cache)
    ids = None if arrays["segment_ids"] is None else jnp.asarray(arrays["segment_ids"])
    whole, valid = x, None
    if lengths is not None:
        lengths = jnp.minimum(plain.natural(jnp.asarray(lengths)), seqlen)
        valid = (jnp.arange(seqlen, dtype=jnp.int32)[None] < lengths[:, None])[..., None]
        whole = jnp.where(valid, x, jnp.zeros((), x.dtype))  # so that no gradient multiplies what lies there

    window = None if cache is None else cache[:, cache.shape[1] - history :]
    if backend == "xla" or not x.size:
        documents = None if ids is None else _documents(ids)
        out, _ = plain.dense(activation is not None, whole, weight, bias, window, documents)
    else:
        marks = None if ids is None else document_marks(ids)
        out = _convolve((activation, backend), whole, weight, bias, window, marks)
    if valid is not None:
        out = jnp.where(valid, out, jnp.zeros((), out.dtype))
    if not want_cache:
        return out, None

    columns = history if cache is None else cache.shape[1]
    if lengths is None:
        tail = slice(max(seqlen - columns, 0) if isinstance(seqlen, int) else 0, None)
        documents = None if ids is None else _documents(ids[:, tail])
        new = plain.last_entries(x[:, tail], cache, documents, columns)
    else:
        new = _entries_before(whole, cache, lengths, columns)
    if cache_layout == "channels":
        new = plain.moved(lambda _, new: new.swapaxes(1, 2), (), new)
    return out, new


def _dim_width(weight, layout):
    if layout == "torch":
        return weight[:, 0]
    if layout == "flax":
        weight = weight[:, 0]
    return weight if layout == "dim_width" else weight.T


def _documents(segment_ids):
    """The number of each token's document, from 0: one more at each token whose id is not its predecessor's."""
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], [(0, 0), (1, 0)])
    return jnp.cumsum(begins[:, : segment_ids.shape[1]], axis=1, dtype=jnp.int32)


def _entries_before(x, cache, lengths, columns):
    """The `columns` entries of cache ++ x that end with the last of each row's tokens."""
    batch, seqlen, dim = x.shape
    if cache is None:
        cache = jnp.zeros((batch, columns, dim), x.dtype)
    if not columns or not seqlen:
        return cache
    index = lengths[:, None] + jnp.arange(columns, dtype=jnp.int32)[None]
    tokens = plain.round_to(plain.take_entries(x, index - columns), cache.dtype)
    return plain.choose(index < columns, plain.take_entries(cache, index), tokens)


# The kernels.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, *arrays):
    """arrays: x [batch, seqlen, dim], weight, bias, a window of each row or None, marks of documents or None."""
    return _mappable(_forward, options)(*arrays)


def _keep_inputs(options, *arrays):
    return _convolve(options, *arrays), arrays


def _differentiate(options, arrays, dout):
    gradients = _mappable(_backward, options)(*arrays, dout)
    return *gradients, None


_convolve.defvjp(_keep_inputs, _differentiate)


class _Dense(NamedTuple):
    """The arrays of `_convolve`, with the gradient of its result where that is asked for; `options` as there."""

    x: Any
    weight: Any
    bias: Any
    window: Any
    marks: Any
    dout: Any
    options: tuple

    ARRAYS = "x", "weight", "bias", "window", "marks", "dout"


TOKENS = BATCH, None, CHANNELS
ROLES = {"x": TOKENS, "dout": TOKENS, "window": TOKENS, "marks": (BATCH, None), "weight": (CHANNELS, None),
         "bias": (CHANNELS,)}  # fmt: skip


def _forward(options, *arrays):
    call = _Dense(*arrays, None, options)
    if parts.compiler_splits(options[1], call.x):
        return parts.partitioned(_run_forward, call, ROLES, (TOKENS,))[0]
    return _run_forward(call)[0]


def _run_forward(call):
    x, weight, bias, window, marks, _, (activation, backend) = call
    rows = Arrays(x=x, weight=weight, bias=bias, conv_states=window, document_marks=marks)
    return (run_rows(rows, activation, backend),)


def _backward(options, *arrays):
    call = _Dense(*arrays, options)
    if not parts.compiler_splits(options[1], call.x):
        return _run_backward(call)
    names = [name for name in call.ARRAYS[:4] if getattr(call, name) is not None]
    sums = [names.index(name) for name in ("weight", "bias") if name in names]
    run = functools.partial(_run_backward, unrounded=True)  # the sums over devices are rounded once
    found = parts.partitioned(run, call, ROLES, tuple(ROLES[name] for name in names), sums)
    return tuple(g if g is None else g.astype(a.dtype) for g, a in zip(found, arrays, strict=False))


def _run_backward(call, **options):
    x, weight, bias, window, marks, dout, (activation, backend) = call
    _, seqlen, dim = x.shape
    inputs = x.reshape(-1, dim), weight, bias, window, None
    given, upstream = (activation, seqlen, "auto", backend), (dout.reshape(-1, dim), None)
    dx, dweight, dbias, dwindow, _ = backward.differentiate(
        given, inputs, upstream, document_marks=marks, **options
    )
    return dx.reshape(x.shape), dweight, dbias, dwindow


def _mappable(operation, options):
    """`operation` under `jax.vmap`: a mapped axis joins the batch, or where each has weights of its own, is a loop."""

    def rule(size, batched, *arrays):
        flags = [bool(jax.tree.leaves(flag)) and all(jax.tree.leaves(flag)) for flag in batched]
        if operation is _backward or flags[1] or flags[2]:  # sums over tokens are each one's own
            return _loop(mapped, flags, arrays)

        def join(name, array):
            if array is None or name in (1, 2):
                return array
            array = array if flags[name] else jnp.broadcast_to(array[None], (size, *array.shape))
            return array.reshape(-1, *array.shape[2:])

        out = mapped(*(join(i, array) for i, array in enumerate(arrays)))
        return out.reshape(size, -1, *out.shape[1:]), True

    mapped = mappable(functools.partial(operation, options), rule)
    return mapped


def _loop(run, flags, arrays):
    """`run` once for each entry of the arrays' first axes, of those that are flagged."""

    def one(entries):
        given = iter(entries)
        return run(*(next(given) if flag else array for flag, array in zip(flags, arrays, strict=True)))

    results = jax.lax.map(one, tuple(array for flag, array in zip(flags, arrays, strict=True) if flag))
    return results, jax.tree.map(lambda _: True, results)


# Meshes.


def _mesh_axes(axes, x, backend):
    """(mesh, (batch axes, channel axes)) where the call is split over devices, else (None, None)."""
    own = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    where = own if isinstance(own, NamedSharding) else jax.typeof(x).sharding  # as far as it is known here
    mesh = jax.sharding.get_abstract_mesh()
    mesh = where.mesh if mesh.empty else mesh
    if axes is not None:
        if not isinstance(axes, tuple) or len(axes) != 2:
            raise ValueError(f"axes: expected (batch axis, channel axis), each a name or None, got {axes!r}")
        if mesh.empty:
            raise ValueError(f"axes: expected a mesh in context (jax.set_mesh), got none, and axes={axes!r}")
        return mesh, axes
    typed = {name for entry in where.spec for name in (entry if isinstance(entry, tuple) else (entry,))}
    free = {
        name: kind
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and (mesh.shape[name] > 1 or (kind == AxisType.Explicit and name in typed))
    }  # an explicit axis of one device is in the type all the same
    explicit = bool(free) and all(kind == AxisType.Explicit for kind in free.values())
    if explicit or (free and where is own and backend != "xla"):
        rest = (None,) * (x.ndim - len(where.spec))
        batch, tokens, channels = (None, None, None, *where.spec, *rest)[-3:]
        if tokens is None and (x.ndim == 3 or batch is None):
            return mesh, (batch, channels)
    # a program in which the compiler splits plain array code, or tells the kernels how it splits them
    if backend == "xla" or (parts.compiler_splits(backend, x) and not explicit):
        return None, None
    if free or (own is not None and len(own.device_set) > 1):
        over = f"the mesh {dict(mesh.shape)}" if free else f"{len(own.device_set)} devices"
        raise Unsupported(
            f"axes: expected (batch axis, channel axis), since a compiler cannot split a kernel over {over}; got None"
        )
    return None, None


def _split(options, arrays, mesh, axes):
    """Runs the call on every device's part."""
    batch, channels = axes
    _, _, weight_layout, cache_layout, want_cache = options
    if arrays["x"].ndim == 2 and batch is not None:
        raise ValueError(
            f"axes: expected no batch axis for x of shape {list(arrays['x'].shape)}, got {batch!r}"
        )
    rows = (batch,) if arrays["x"].ndim == 3 else ()
    weight = {"dim_width": P(channels, None), "width_dim": P(None, channels), "torch": P(channels, None, None),
              "flax": P(None, None, channels)}[weight_layout]  # fmt: skip
    cache = P(*rows, None, channels) if cache_layout == "time" else P(*rows, channels, None)
    specs = dict(x=P(*rows, None, channels), weight=weight, bias=P(channels), cache=cache,
                 segment_ids=P(*rows, None), lengths=P(*rows))  # fmt: skip
    given = {name: array for name, array in arrays.items() if array is not None}
    _check_axes(axes, mesh, arrays["x"].shape)
    if AxisType.Explicit in mesh.axis_types:  # there a mismatch is an error, elsewhere JAX moves the array
        given = {name: jax.reshard(a, NamedSharding(mesh, specs[name])) for name, a in given.items()}

    def run(parts):
        out, new = _run(options, dict.fromkeys(arrays) | parts)
        return (out, new) if want_cache else (out,)

    out, *new = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=({name: specs[name] for name in given},),
        out_specs=(specs["x"], cache) if want_cache else (specs["x"],),
        check_vma=False,  # a kernel's results carry no type that says over which axes they vary
    )(given)
    return out, new[0] if new else None


def _check_axes(axes, mesh, shape):
    sizes, seen = dict(mesh.shape), []
    for size, place, names in ((shape[0], 0, axes[0]), (shape[-1], len(shape) - 1, axes[1])):
        parts = 1
        for name in () if names is None else names if isinstance(names, tuple) else (names,):
            if name not in sizes or name in seen:
                raise ValueError(f"axes: expected distinct axes of the mesh {sizes}, got {axes!r}")
            seen.append(name)
            parts *= sizes[name]
        if size % parts:
            raise ValueError(
                f"x: expected axis {place} to be a multiple of {parts}, the devices that axes={axes!r} split it over, "
                f"got shape {list(shape)}"
            )
