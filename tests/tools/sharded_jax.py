"""One process of the multi-device JAX checks: a process and a communicator a device, run as a script by the tests.

    python tests/tools/sharded_jax.py RANK WORLD_SIZE PORT cpu|cuda [--timings FILE]

Every process makes the same batches, runs them alone on its own device, then all of them split over the processes:
channels, sequences, tokens. Its part of each result must be the same bits. With --timings (CUDA) it then measures the
speed-up over one device and rank 0 writes it to FILE.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import pallas_impl
from pallas_impl import sharding


def make_batch(lengths, tokens, dim, width, seed=0):
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    floats = lambda *shape: np.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)  # noqa: E731
    return dict(
        x=floats(tokens, dim),
        weight=floats(dim, width),
        bias=floats(dim),
        conv_states=floats(batch + 2, width - 1, dim),
        query_start_loc=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        cache_indices=rng.permutation(batch + 2)[:batch].astype(np.int32),
        has_initial_state=rng.random(batch) < 0.6,
    )


def spread(arguments, mesh, **axes):
    """The whole arguments, which every process has, as global arrays of which each device holds its part."""
    where = sharding.shardings(mesh, **axes)
    return {
        name: jax.make_array_from_callback(array.shape, where[name], lambda index, a=array: a[index])
        for name, array in arguments.items()
    }


def check(what, result, wanted):
    """Compares this process's parts of a global array with the same places of an ordinary one."""
    wanted = np.asarray(wanted)
    for shard in result.addressable_shards:
        got, part = np.asarray(shard.data), np.ascontiguousarray(wanted[shard.index])
        if not np.array_equal(got.view(np.uint16), part.view(np.uint16)):
            raise SystemExit(f"process {jax.process_index()}: {what}: parts differ")


def check_all(mesh, device, backend):
    ranks = mesh.size
    run = functools.partial(pallas_impl.causal_conv1d_fn, activation="silu", backend=backend)
    alone = jax.jit(run)
    cases = {
        "channels": ({"channel_axis": "d"}, [9, 0, 2, 1, 20], 40, 256 * ranks, 4),
        "tokens": ({"token_axis": "d"}, [19 * ranks, 0, 3, 8 * ranks], 32 * ranks, 256, 4),
        "short parts": ({"token_axis": "d"}, [2, 2 * ranks - 3], 2 * ranks, 256, 8),
        "packed rows": ({"token_axis": "d"}, [1] * (3 * ranks) + [13 * ranks], 16 * ranks, 256, 3),
    }
    for name, (axes, *sizes) in cases.items():
        arguments = make_batch(*sizes)
        with jax.default_device(device):
            wanted = alone(**arguments)
        split = jax.jit(
            functools.partial(
                sharding.causal_conv1d_fn, mesh=mesh, activation="silu", backend=backend, **axes
            )
        )
        got = split(**spread(arguments, mesh, **axes))
        check(f"{name}, out", got.out, wanted.out)
        check(f"{name}, states", got.conv_states, wanted.conv_states)

    batches = [make_batch([9, 0, 2, 1, 20], 40, 256, 4, seed) for seed in range(ranks)]
    batches = [batch | {name: batches[0][name] for name in ("weight", "bias")} for batch in batches]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    whole |= {name: batches[0][name] for name in ("weight", "bias")}
    with jax.default_device(device):
        wanted = [alone(**batch) for batch in batches]
    split = jax.jit(
        functools.partial(
            sharding.causal_conv1d_fn, mesh=mesh, batch_axis="d", activation="silu", backend=backend
        )
    )
    got = split(**spread(whole, mesh, batch_axis="d"))
    check("sequences, out", got.out, np.concatenate([np.asarray(w.out) for w in wanted]))
    check("sequences, states", got.conv_states, np.concatenate([np.asarray(w.conv_states) for w in wanted]))
    return len(cases) + 1


def median_seconds(call, repeats=20, inner=10):
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(inner):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - begin) / inner)
    return sorted(seconds)[repeats // 2]


def timings(mesh, device):
    """Seconds a call on one device and on all of them, the same work: {name: {...}}."""
    found = {}
    for name, axes, tokens, dim in (
        ("channels, 32768 tokens, dim 16384", {"channel_axis": "d"}, 32768, 16384),
        ("tokens, 131072 tokens, dim 4096", {"token_axis": "d"}, 131072, 4096),
    ):
        options = dict(activation="silu", backend="mosaic_gpu")
        sizes = dict(
            x=(tokens, dim), weight=(dim, 4), bias=(dim,), conv_states=(4, 3, dim), query_start_loc=None, cache_indices=None,
        )  # fmt: skip
        small = dict(
            query_start_loc=jnp.asarray([0, tokens], jnp.int32), cache_indices=jnp.asarray([1], jnp.int32)
        )

        def make(name, shape, out_sharding, small=small):
            if shape is None:
                return jax.device_put(np.asarray(small[name]), out_sharding)
            return jax.jit(lambda: jnp.ones(shape, jnp.bfloat16), out_shardings=out_sharding)()

        own = Mesh(np.array([device]), ("own",))
        one = {name: make(name, shape, NamedSharding(own, PartitionSpec())) for name, shape in sizes.items()}
        alone = jax.jit(functools.partial(pallas_impl.causal_conv1d_fn, **options))
        single = median_seconds(lambda one=one, alone=alone: alone(**one))
        del one
        where = sharding.shardings(mesh, **axes)
        parts = {name: make(name, shape, where[name]) for name, shape in sizes.items()}
        split = jax.jit(functools.partial(sharding.causal_conv1d_fn, mesh=mesh, **options, **axes))
        together = median_seconds(lambda parts=parts, split=split: split(**parts))
        found[name] = {"one": single, "all": together, "speed_up": single / together}
    return found


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--timings", type=Path)
    options = parser.parse_args(argv)
    jax.distributed.initialize(
        f"localhost:{options.port}",
        options.ranks,
        options.rank,
        local_device_ids=[options.rank] if options.device == "cuda" else None,
        initialization_timeout=90,
    )
    (device,) = jax.local_devices()
    mesh = Mesh(np.array(jax.devices()), ("d",), axis_types=(AxisType.Auto,))
    if mesh.size != options.ranks:
        raise SystemExit(f"expected {options.ranks} devices, one a process, got {mesh.size}")
    done = check_all(mesh, device, "mosaic_gpu" if options.device == "cuda" else "xla")
    if options.timings:
        found = {"devices": options.ranks, "kind": device.device_kind, "jax": jax.__version__} | timings(
            mesh, device
        )
        if options.rank == 0:
            options.timings.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))
    jax.distributed.shutdown()
    print(f"agreed: {done}")


if __name__ == "__main__":
    main(sys.argv[1:])
