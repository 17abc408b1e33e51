"""The kernels of the serving arguments on a GPU, at sizes that an interpreter cannot run; the small ones of
test_serving.py and test_serving_jit.py run there too."""

import numpy as np
import pytest

from tests.pallas.test_serving import check_fn, check_update, free_slots, integers, problem

pytestmark = pytest.mark.gpu
GPU = "mosaic_gpu"


def traffic(seed, dim, rows=40, longest=150, **sizes):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, rows)
    lengths[:4] = rng.integers(0, longest, 4)
    given = problem(rng.permutation(lengths), dim=dim, spare=600, seed=seed, **sizes)
    given["slots"][rng.integers(0, rows, 3)] = -1
    return rng, given, rng.integers(0, 2, rows).astype(bool)


@pytest.mark.parametrize("dim", [128, 136, 640, 2048, 8192])
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
def test_prefills(dim, schedule):
    for seed, layout in enumerate(("front", "back", "ring")):
        rng, given, has = traffic(seed, dim, columns=9 if layout != "front" else 3)
        rows, free = len(has), np.array(free_slots(given), np.int32)
        options = dict(
            state_layout=layout, write_indices=np.where(has, free[:rows], given["slots"]).astype(np.int32)
        )
        if layout == "ring":
            options["cache_seqlens"] = rng.integers(-3, 99, rows).astype(np.int32)
        if layout == "front":
            options |= dict(
                snapshot_indices=free[100 : 100 + 10 * rows].reshape(rows, 10), snapshot_block_size=16,
                num_computed_tokens=rng.integers(0, 40, rows).astype(np.int32), track_indices=free[50 : 50 + rows],
                track_lengths=rng.integers(-2, 20, rows).astype(np.int32),
            )  # fmt: skip
        for empty_rows in ("skip", "apply"):
            check_fn(
                given, GPU, {"pool": "float32"}, has=has, schedule=schedule, empty_rows=empty_rows, **options
            )


@pytest.mark.parametrize(
    ("dim", "sizes"), [(640, (128, 512)), (2048, (256, 1024, 768)), (8192, (2048, 2048, 4096))]
)
def test_residual_split_and_a_wider_x(dim, sizes):
    _, given, has = traffic(7, dim, wide=512)
    residual = integers(np.random.default_rng(1), given["x"].shape[0], dim)
    options = dict(residual=residual, channel_offset=256, split_sizes=sizes)
    check_fn(given, GPU, {"residual": "float32"}, has=has, **options)
    check_update(given, GPU, **options)
    given = problem((1,) * 300, dim=dim, wide=512, tail=0)
    check_update(given, GPU, dense=0, **options | dict(residual=residual[:1].repeat(300, 0)))


@pytest.mark.parametrize("dim", [128, 136, 640, 8192])
@pytest.mark.parametrize("nodes", [3, 4, 70])
def test_verify_steps_and_trees(dim, nodes):
    rng = np.random.default_rng(nodes)
    given = problem((nodes,) * 33, dim=dim, tail=0)
    given["slots"][[4, 9]] = -1
    buffers = np.full((40, nodes, 3, dim), np.nan)
    indices = rng.permutation(40)[:33].astype(np.int32)
    parents = np.array([[rng.integers(-1, max(i, 1)) for i in range(nodes)] for _ in range(33)], np.int32)
    for tree in ({}, dict(tree_parents=parents)):
        check_update(
            given, GPU, {"window_out": "float32"}, dense=nodes, window_out=buffers, window_indices=indices,
            commit=False, **tree,
        )  # fmt: skip
