"""The serving arguments of the JAX twin against a definition token by token, on a CPU.

Where many options meet, plain jax.numpy and compiled kernels take all combinations, and kernels in the interpreter
those in which any two options meet; under a second JAX, every option once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_impl import causal_conv1d_fn, causal_conv1d_update, commit_windows, tree_parents_from_links
from tests.tools.covering import on_backends
from tests.tools.serving_brute_force import brute_force

GPU = pytest.param("mosaic_gpu", marks=pytest.mark.gpu)
BACKENDS = ("xla", "mosaic_gpu_interpret", GPU)
covered = functools.partial(on_backends, few=("mosaic_gpu_interpret",), every=("xla", GPU))


def integers(rng, *shape):
    return rng.integers(-4, 5, shape).astype(np.float64)


def problem(lengths, dim=128, width=4, columns=None, spare=6, tail=3, wide=0, seed=0):
    """Arrays of a packed batch in float64; slots of live rows are distinct and the pool is full of values."""
    rng = np.random.default_rng(seed)
    batch, starts = len(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    columns = width - 1 if columns is None else columns
    x = integers(rng, starts[-1] + tail, dim + wide)
    x[starts[-1] :] = np.nan
    return dict(
        x=x, weight=integers(rng, dim, width), bias=integers(rng, dim),
        pool=integers(rng, batch + spare, columns, dim), starts=starts,
        slots=rng.permutation(batch + spare)[:batch].astype(np.int32),
    )  # fmt: skip


def free_slots(given):
    return [s for s in range(given["pool"].shape[0]) if s not in given["slots"]]


FLOATS = ("x", "weight", "bias", "pool", "residual", "window_out")


def on_device(name, value, dtypes):
    if isinstance(value, np.ndarray):
        return jnp.asarray(value, dtypes.get(name, dtypes["x"]) if name in FLOATS else value.dtype)
    return value


def same(got, want):
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)


def check(result, wanted):
    outs = result.out if isinstance(result.out, tuple) else (result.out,)
    for got, want in zip(outs, wanted[0] if isinstance(wanted[0], tuple) else (wanted[0],), strict=True):
        same(got.reshape(want.shape), want)
    if wanted[1] is None:
        assert result.conv_states is None
    else:
        same(result.conv_states, wanted[1])
    if wanted[2] is not None:
        same(result.window_out, wanted[2])


def run_fn(given, backend, dtypes, has=None, schedule="auto", **options):
    arrays = {k: on_device(k, v, dtypes) for k, v in given.items()}
    static = {k: v for k, v in options.items() if not isinstance(v, np.ndarray)}
    dynamic = {k: on_device(k, v, dtypes) for k, v in options.items() if isinstance(v, np.ndarray)}
    function = functools.partial(causal_conv1d_fn, backend=backend, schedule=schedule, **static)
    return jax.jit(function)(
        arrays["x"], arrays["weight"], arrays["bias"], arrays["pool"], arrays["starts"], arrays["slots"],
        None if has is None else jnp.asarray(has), **dynamic,
    )  # fmt: skip


def check_fn(given, backend, dtypes=None, has=None, schedule="auto", **options):
    dtypes = {"x": "bfloat16"} | (dtypes or {})
    result = run_fn(given, backend, dtypes, has, schedule, **options)
    stateful = [False] * (len(given["starts"]) - 1) if has is None else has
    check(result, brute_force(**given, has=stateful, **options))
    assert result.conv_states is None or result.conv_states.dtype == dtypes.get("pool", dtypes["x"])


def check_update(given, backend, dtypes=None, dense=None, **options):
    """`dense`: tokens of every row, for x of three axes (of two for None and one token a row)."""
    dtypes = {"x": "bfloat16"} | (dtypes or {})
    wanted = brute_force(**given, **options)
    arrays = {k: on_device(k, v, dtypes) for k, v in given.items()}
    x, packed = arrays["x"], {}
    if dense is None:
        packed = dict(query_start_loc=arrays["starts"])
        if "window_out" in options or "num_accepted_tokens" in options:
            options["max_seqlen"] = int(np.diff(given["starts"]).max())
    elif dense:
        x = x.reshape(-1, dense, x.shape[1])
    if dense and "residual" in options:
        options["residual"] = options["residual"].reshape(*x.shape[:2], -1)
    static = {k: v for k, v in options.items() if not isinstance(v, np.ndarray)}
    dynamic = {k: on_device(k, v, dtypes) for k, v in options.items() if isinstance(v, np.ndarray)}
    function = functools.partial(causal_conv1d_update, backend=backend, **static)
    result = jax.jit(function)(
        x, arrays["weight"], arrays["bias"], arrays["pool"], arrays["slots"], **packed, **dynamic
    )
    check(result, wanted)


LENGTHS = (5, 0, 1, 12, 2)
HAS = (True, False, False, True, False)


@covered(layout=["front", "back", "ring"], empty_rows=["skip", "apply"])
def test_layouts_write_slots_and_empty_rows_in_a_prefill(backend, layout, empty_rows):
    given = problem(LENGTHS, columns=7)
    given["pool"][given["slots"][[1, 2, 4]]] = np.nan  # fresh rows
    free = free_slots(given)
    ring = dict(cache_seqlens=np.array([9, 0, 0, 2, 30], np.int32)) if layout == "ring" else {}
    options = dict(state_layout=layout, empty_rows=empty_rows, **ring)
    check_fn(given, backend, has=HAS, **options)
    writes = np.array([free[0], free[1], given["slots"][2], -1, 999], np.int32)
    check_fn(given, backend, has=HAS, write_indices=writes, **options)
    if backend == "xla":
        for seed in range(empty_rows == "apply", 10, 2):  # every width and number of columns in each layout
            given = problem(LENGTHS, columns=3 + seed % 9, width=1 + seed % 4, seed=seed)
            check_fn(
                given, backend, has=np.random.default_rng(seed).integers(0, 2, 5).astype(bool), **options
            )


COMPUTED = {3: None, 1: (0, 0, 4, 2), 4: (3, 9, 1, 30), 7: (-5, 0, 6, 13)}


@covered(width=[2, 4, 8], block=[None, *COMPUTED])
def test_snapshots_and_tracked_slots(backend, width, block):
    given = problem((9, 0, 3, 20), columns=width, spare=40, width=width)
    free = np.array(free_slots(given), np.int32)
    table = free[:32].reshape(4, 8).copy()
    table[3, 2], table[0, 3] = -1, 10**6
    if block is None:
        check_fn(given, backend, has=HAS[:4], track_indices=free[32:36])
        return
    computed = COMPUTED[block]
    counts = {} if computed is None else dict(num_computed_tokens=np.array(computed, np.int32))
    check_fn(
        given, backend, has=HAS[:4], snapshot_indices=table, snapshot_block_size=block, **counts,
        track_indices=free[32:36], track_lengths=np.array([4, 1, -2, 99], np.int32), empty_rows="apply",
    )  # fmt: skip


@covered(
    sizes=[(128, 256), (128, 128, 128), (384,), (5, 200, 179)], offset=[128, 3], call=["states", "no states", "update"]
)  # fmt: skip
def test_residual_split_and_a_wider_x(backend, sizes, offset, call):
    given = problem(LENGTHS, dim=384, wide=136)
    residual = integers(np.random.default_rng(1), given["x"].shape[0], 384)
    options = dict(residual=residual, channel_offset=offset, split_sizes=sizes)
    if call == "states":
        check_fn(given, backend, {"residual": "float32"}, has=HAS, schedule="flat", **options)
    elif call == "no states":
        check_fn(given | {"pool": None, "slots": None}, backend, **options)
    else:
        check_update(given, backend, {"residual": "float16"}, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(128, 256), (5, 379), None])
def test_residual_split_and_a_wider_x_of_one_token_a_row(backend, sizes):
    given = problem((1,) * 5, dim=384, wide=136, tail=0)
    given["slots"][3] = -1
    residual = integers(np.random.default_rng(1), 5, 384)
    split = {} if sizes is None else dict(split_sizes=sizes)
    check_update(
        given, backend, {"residual": "float32"}, dense=0, residual=residual, channel_offset=128, **split
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_windows_of_every_step(backend, dtype):
    given = problem(LENGTHS)
    buffers = np.full((7, 12, 3, 128), np.nan)
    indices = np.array([6, 0, 2, 5, -1], np.int32)
    for commit in (True, False):
        check_update(
            given, backend, {"window_out": dtype}, window_out=buffers, window_indices=indices, commit=commit
        )
    given = problem((4,) * 5, tail=0)
    given["slots"][2] = -1
    check_update(given, backend, {"pool": dtype}, dense=4, window_out=buffers, commit=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_trees(backend, width):
    rng = np.random.default_rng(width)
    nodes = 10
    given = problem((nodes,) * 3, tail=0, width=width)
    parents = np.array([[rng.integers(-1, i + 1) for i in range(nodes)] for _ in range(3)], np.int32)
    parents[0, 5], parents[1, 7] = 99, -7
    buffers = np.full((3, nodes + 1, width - 1, 128), np.nan)
    for dtypes in ({}, {"pool": "float32"}):
        check_update(
            given, backend, dtypes, dense=nodes, tree_parents=parents, commit=False, window_out=buffers
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["front", "back", "ring", "rolling"])
def test_layouts_and_write_slots_in_an_update(backend, layout):
    given = problem(LENGTHS, columns=16)
    free = free_slots(given)
    options = {} if layout == "rolling" else dict(state_layout=layout)
    if layout == "ring":
        options["cache_seqlens"] = np.array([9, -3, 0, 2, 30], np.int32)
    if layout == "rolling":
        options["num_accepted_tokens"] = np.array([1, 2, 5, 99, 3], np.int32)
    if layout in ("front", "rolling"):
        options["track_indices"] = np.array([free[3], free[4], -1, 77, free[5]], np.int32)
    check_update(given, backend, **options)
    writes = np.array([free[0], free[1], given["slots"][2], -1, free[2]], np.int32)
    check_update(given, backend, write_indices=writes, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_commit_windows(backend):
    rng = np.random.default_rng(0)
    pool, windows = integers(rng, 8, 5, 128), integers(rng, 6, 4, 3, 128)
    steps, slots = np.array([3, 0, -1, 4, 1, 2], np.int32), np.array([2, 0, 1, 3, -1, 7], np.int32)
    buffers = np.array([5, 1, 2, 3, 4, 99], np.int32)
    for rows in (None, buffers):
        wanted = pool.copy()
        wanted[2, :3], wanted[0, :3] = windows[0 if rows is None else 5, 3], windows[1, 0]
        if rows is None:
            wanted[7, :3] = windows[5, 2]
        for dtype in ("float32", "bfloat16"):
            got = jax.jit(functools.partial(commit_windows, backend=backend))(
                jnp.asarray(pool, "float32"), jnp.asarray(windows, dtype), steps, slots, rows
            )
            same(got, wanted)


def test_links_of_a_tree():
    #        0 -> 1, 2, 3;   1 -> 4, 5;   3 -> 6;   nobody names 7
    child = np.array([[1, 4, -1, 6, 9, 0, -1, 7]])
    sibling = np.array([[-1, 2, 3, -1, 5, -1, -1, 8]])
    same(tree_parents_from_links(child, sibling), [[-1, 0, 0, 0, 1, 1, 3, 0]])
    same(tree_parents_from_links(child.astype(np.uint8), sibling), [[-1, 0, 0, 0, 1, 1, 3, 0]])
    # The last namer counts, as a sibling rather than as a child; the root's sibling has its parent.
    child, sibling = np.array([[3, 3, 4, -1, -1]]), np.array([[1, -1, 4, -1, -1]])
    same(tree_parents_from_links(child, sibling), [[-1, -1, 0, 1, 0]])
    n = 100  # every node but the root is a sibling of the one before
    links = np.where(np.arange(n) < n - 1, np.arange(n) + 1, -1)
    flat = tree_parents_from_links(np.eye(1, n, dtype=int), np.where(np.arange(n) == 0, -1, links)[None])
    same(flat, [[-1] + [0] * (n - 1)])
    same(tree_parents_from_links(links[None], np.full((1, n), -1)), [np.arange(n) - 1])
