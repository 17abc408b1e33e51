"""The multi-device JAX checks, run as a script by the tests: a process and a communicator a device, or one for all.

    python tests/tools/sharded_jax.py RANK WORLD_SIZE PORT cpu|cuda

Every process makes the same batches, runs them alone on its own first device, then split over all devices: channels,
sequences, tokens; the training form forward and backward; donated pools. Its parts of each result must be the same
bits. With WORLD_SIZE 1 the process has every device, and also runs a call on one that is not the default.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_impl
from oracle.numerics import TypedArray
from pallas_impl import context_parallel, sharding
from tests.tools import context_parallel_cases


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
    if result.shape != wanted.shape:
        raise SystemExit(
            f"process {jax.process_index()}: {what}: expected {wanted.shape}, got {result.shape}"
        )
    for shard in result.addressable_shards:
        got, part = np.asarray(shard.data), np.ascontiguousarray(wanted[shard.index])
        if not np.array_equal(got.view(np.uint8), part.view(np.uint8)):
            raise SystemExit(f"process {jax.process_index()}: {what}: parts differ")


def prefills(ranks):
    """name: (axes, lengths, tokens, dim, width)."""
    yield "channels", ({"channel_axis": "d"}, [9, 0, 2, 1, 20], 40, 256 * ranks, 4)
    yield "tokens", ({"token_axis": "d"}, [19 * ranks, 0, 3, 8 * ranks], 32 * ranks, 256, 4)
    yield "a part of many blocks", ({"token_axis": "d"}, [3000 * ranks, 90 * ranks], 3096 * ranks, 256, 4)
    yield "short parts", ({"token_axis": "d"}, [2, 2 * ranks - 3], 2 * ranks, 256, 8)
    yield "packed rows", ({"token_axis": "d"}, [1] * (3 * ranks) + [13 * ranks], 16 * ranks, 256, 3)
    yield "a dim that TMA cannot address", ({"token_axis": "d"}, [19 * ranks, 5 * ranks], 24 * ranks, 201, 4)


def check_prefill(mesh, device, backend, name, axes, *sizes):
    """One prefill, its pool donated: the same memory on every device."""
    options = dict(activation="silu", backend=backend)
    arguments = make_batch(*sizes)
    with jax.default_device(device):
        wanted = jax.jit(functools.partial(pallas_impl.causal_conv1d_fn, **options))(**arguments)
    where = sharding.shardings(mesh, **axes)
    split = jax.jit(
        functools.partial(sharding.causal_conv1d_fn, mesh=mesh, **options, **axes),
        donate_argnames="conv_states",
        out_shardings=pallas_impl.ConvOutput(where["out"], where["conv_states"]),
    )
    placed = spread(arguments, mesh, **axes)
    pool = jax.jit(jnp.copy, out_shardings=where["conv_states"])(placed["conv_states"])  # in XLA's own memory
    addresses = [shard.data.unsafe_buffer_pointer() for shard in pool.addressable_shards]
    got = split(**placed | {"conv_states": pool})
    check(f"{name}, out", got.out, wanted.out)
    check(f"{name}, states", got.conv_states, wanted.conv_states)
    if addresses != [shard.data.unsafe_buffer_pointer() for shard in got.conv_states.addressable_shards]:
        raise SystemExit(f"process {jax.process_index()}: {name}: the donated pool was copied")


def check_sequences(mesh, device, backend):
    """Every device has a batch and a pool of its own; then a decode step of each."""
    options = dict(activation="silu", backend=backend)
    batches = [make_batch([9, 0, 2, 1, 20], 40, 256, 4, seed) for seed in range(mesh.size)]
    batches = [batch | {name: batches[0][name] for name in ("weight", "bias")} for batch in batches]
    step = ("x", "weight", "bias", "conv_states", "cache_indices")
    steps = [{name: batch[name][:5] if name == "x" else batch[name] for name in step} for batch in batches]
    for name, parts in (("causal_conv1d_fn", batches), ("causal_conv1d_update", steps)):
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        whole |= {key: parts[0][key] for key in ("weight", "bias")}
        alone = jax.jit(functools.partial(getattr(pallas_impl, name), **options))
        with jax.default_device(device):
            wanted = [alone(**part) for part in parts]
        split = functools.partial(getattr(sharding, name), mesh=mesh, batch_axis="d", **options)
        got = jax.jit(split)(**spread(whole, mesh, batch_axis="d"))
        check(f"{name}, out", got.out, np.concatenate([np.asarray(w.out) for w in wanted]))
        check(f"{name}, states", got.conv_states, np.concatenate([np.asarray(w.conv_states) for w in wanted]))


def to_jax(array):
    if array is None:
        return None
    return np.asarray(array.data.view(jnp.bfloat16) if array.dtype == "bfloat16" else array.data)


def to_typed(array):
    data = np.asarray(array)
    name = data.dtype.name
    return TypedArray(name, data.view(np.uint16) if name == "bfloat16" else data)


def differentiated(function):
    def run(x, weight, bias, starts, dout):
        out, pull = jax.vjp(lambda *leaves: function(*leaves, starts), x, weight, bias)
        return out, *pull(dout)

    return run


def check_training(mesh, device, backend, case, dim):
    """Tokens split: `out` and `dx` have the bits of one device, gradients lie within the reference's bounds."""
    options = dict(activation=case.activation, backend=backend)
    typed_arguments, typed_dout = context_parallel_cases.build(case, dim)
    x, weight, bias, starts = (
        to_jax(typed_arguments[name]) for name in ("x", "weight", "bias", "query_start_loc")
    )
    dout = to_jax(typed_dout)

    def alone(x, weight, bias, starts):
        return pallas_impl.causal_conv1d(x, weight, bias, query_start_loc=starts, **options).out

    part = functools.partial(
        context_parallel.causal_conv1d, axis_name="d", sum_weight_gradients=True, **options
    )

    def split(*arguments):
        out, dx, dweight, dbias = differentiated(part)(*arguments)
        return out, dx, dweight[None], dbias[None]

    specs = P("d"), P(), P(), P(), P("d")
    split = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=(P("d"),) * 4, check_vma=False)
    with jax.default_device(device):
        wanted = jax.jit(differentiated(alone))(x, weight, bias, starts, dout)
    placed = [
        jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index, a=array: a[index])
        for array, spec in zip((x, weight, bias, starts, dout), specs, strict=True)
    ]
    out, dx, dweight, dbias = jax.jit(split)(*placed)
    check(f"{case.name}, out", out, wanted[0])
    exact = case.activation is None and case.dtypes[0] == "bfloat16"
    if exact or backend != "xla":  # there XLA fuses as it likes
        check(f"{case.name}, dx", dx, wanted[1])
    dx, dweight, dbias = jax.jit(lambda *a: a, out_shardings=NamedSharding(mesh, P()))(dx, dweight, dbias)
    dx, dweights, dbiases = (a.addressable_data(0) for a in (dx, dweight, dbias))
    for name, summed in (("weight", dweights), ("bias", dbiases)):
        check(f"{case.name}, gradient of {name} on every device", summed, np.stack([summed[0]] * mesh.size))
    found = {name: to_typed(a) for name, a in (("x", dx), ("weight", dweights[0]), ("bias", dbiases[0]))}
    wrong = context_parallel_cases.judge(case, typed_arguments, typed_dout, found)
    if wrong:
        raise SystemExit(f"process {jax.process_index()}: {case.name}: {wrong}")


def check_another_device(devices, backend):
    """A call on arrays of a device that is not the default one runs there, in and outside jit, with the same bits."""
    arguments = make_batch([9, 0, 2, 1, 20], 40, 256, 4)
    run = functools.partial(pallas_impl.causal_conv1d_fn, activation="silu", backend=backend)
    with jax.default_device(devices[0]):
        wanted = run(**arguments)
        for call in (run, jax.jit(run)):
            got = call(**jax.device_put(arguments, devices[-1]))
            if got.out.devices() != {devices[-1]}:
                raise SystemExit(f"expected a result on {devices[-1]}, got one on {got.out.devices()}")
            check("another device, out", got.out, wanted.out)
            check("another device, states", got.conv_states, wanted.conv_states)


def checks(mesh, device, backend):
    """(name, what to run) of everything."""
    for name, sizes in prefills(mesh.size):
        yield name, functools.partial(check_prefill, mesh, device, backend, name, *sizes)
    yield "sequences", functools.partial(check_sequences, mesh, device, backend)
    for case in context_parallel_cases.cases(mesh.size):
        if case.name in ("long bf16", "linear", "packed", "short parts"):
            yield (
                f"training, {case.name}",
                functools.partial(check_training, mesh, device, backend, case, 256),
            )
    if jax.process_count() == 1:
        yield "another device", functools.partial(check_another_device, jax.local_devices(), backend)


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rank", type=int)
    parser.add_argument("ranks", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("device", choices=["cpu", "cuda"])
    options = parser.parse_args(argv)
    if options.ranks > 1:
        jax.distributed.initialize(
            f"localhost:{options.port}",
            options.ranks,
            options.rank,
            local_device_ids=[options.rank] if options.device == "cuda" else None,
            initialization_timeout=90,
        )
    device = jax.local_devices()[0]
    mesh = Mesh(np.array(jax.devices()), ("d",), axis_types=(AxisType.Auto,))
    if mesh.size < max(options.ranks, 2):
        raise SystemExit(f"expected {max(options.ranks, 2)} devices, got {mesh.size}")
    done, failed = 0, []
    for name, run in checks(mesh, device, "mosaic_gpu" if options.device == "cuda" else "xla"):
        try:
            run()
            done += 1
        except (Exception, SystemExit) as error:  # the others are run all the same
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    if options.ranks > 1:
        jax.distributed.shutdown()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    print(f"agreed: {done}")


if __name__ == "__main__":
    main(sys.argv[1:])
