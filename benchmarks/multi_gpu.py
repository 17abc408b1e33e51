"""The same work on one GPU and split over all of this machine: `python -m benchmarks.multi_gpu [torch|jax]`, else both.

Channels split (tensor parallel, nothing is sent) and tokens split (context parallel: width-1 tokens to the neighbour,
the new window to all): a prefill with a pool, the training form forward, and its gradients. bfloat16, width 4, bias,
SiLU, one row. Each result must first have the bits of one GPU; then one GPU and all of them take turns. A time is a steady
one: `FEW` calls behind one another, then `--calls` more than that, each until the slowest GPU has ended; the difference is
that of the calls alone, since start and end are in both. Results go to `results/<device>-x<GPUs>/`, or to `--out`.

    NCCL_NVLS_ENABLE=0 python -m benchmarks.multi_gpu

"part": one GPU with its part alone, without a neighbour; what all of them take beyond it is the exchange.
--dry-run: few tokens and channels, two CPU devices, no kernels: checks the program, times nothing.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import environment

SPLITS = {"channels": (32768, 16384), "tokens": (131072, 4096)}
STEPS = ("prefill", "forward", "backward")
GOALS = {"channels": 1.95, "tokens": 1.9, "backward": 1.85}
WIDTH, SLOTS = 4, 4
FRAMEWORKS = ("torch", "jax")
FEW, SAMPLES = 20, 7  # in a dry run one of each
RESULTS = Path(__file__).parent / "results"


def steady(seconds, few, more):
    """Seconds a call without start and end, of `seconds(calls)` for `few` calls and for `more` besides."""
    return (seconds(few + more) - seconds(few)) / more


def goal(split, step):
    return GOALS["backward" if step == "backward" else split]


def jax_results(sizes, backend):
    """Yields a record a split and step; one process has all devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh

    import pallas_impl
    from pallas_impl import context_parallel, sharding

    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("d",), axis_types=(AxisType.Auto,))
    options = dict(activation="silu", backend=backend)
    leaves = ("x", "weight", "bias", "query_start_loc")

    def alone(x, weight, bias, starts):
        return pallas_impl.causal_conv1d(x, weight, bias, query_start_loc=starts, **options).out

    @jax.jit
    def backward(pull, dout):
        return pull(dout)

    def pulled(function, of):
        """A call of the backward pass alone; what it needs was kept by a forward pass."""
        keep = jax.jit(
            lambda x, weight, bias, starts: jax.vjp(lambda *a: function(*a, starts), x, weight, bias)[1]
        )
        arguments = keep(*(of[name] for name in leaves)), of["dout"]
        return functools.partial(backward, *arguments), backward.lower(*arguments)

    def same(whole, parts):
        """Whether every part has the bits of its place in the whole, compared on the first device."""
        integer = {2: jnp.uint16, 4: jnp.uint32}[whole.dtype.itemsize]
        equal = jax.jit(lambda a, b: (a.view(integer) == b.view(integer)).all())
        return all(
            equal(whole[shard.index], jax.device_put(shard.data, devices[0]))
            for shard in parts.addressable_shards
        )

    def seconds(call, calls):
        jax.block_until_ready(call())
        begin = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return time.perf_counter() - begin

    def prefill_call(function, arguments, where):
        """A call with a donated pool, which each hands to the next."""
        out = pallas_impl.ConvOutput(where["out"], where["conv_states"]) if where else None
        run = jax.jit(function, donate_argnames="conv_states", out_shardings=out)
        held = dict(pool=jnp.copy(arguments["conv_states"]))

        def call():
            result = run(**arguments | {"conv_states": held["pool"]})
            held["pool"] = result.conv_states
            return result

        return call, run

    for split, (tokens, dim) in sizes.items():
        axes = {"channels": {"channel_axis": "d"}, "tokens": {"token_axis": "d"}}[split]
        where = sharding.shardings(mesh, **axes)
        shapes = dict(
            x=(tokens, dim),
            weight=(dim, WIDTH),
            bias=(dim,),
            conv_states=(SLOTS, WIDTH - 1, dim),
            dout=(tokens, dim),
        )
        with jax.default_device(devices[0]):
            draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
            whole = {
                name: draw(jax.random.key(i), shape, jnp.bfloat16)
                for i, (name, shape) in enumerate(shapes.items())
            }
            whole |= dict(
                query_start_loc=jnp.array([0, tokens], jnp.int32), cache_indices=jnp.array([1], jnp.int32),
                has_initial_state=jnp.array([True]),
            )  # fmt: skip
        whole = jax.device_put(whole, devices[0])
        where["dout"] = where["x"]
        parts = {name: jax.device_put(array, where[name]) for name, array in whole.items()}
        own = {
            name: jax.device_put(parts[name].addressable_shards[0].data, devices[0]) for name in ("x", "dout")
        }
        width = own["x"].shape[1]
        own |= {"weight": whole["weight"][:width], "bias": whole["bias"][:width]}
        own |= {"query_start_loc": jnp.array([0, own["x"].shape[0]], jnp.int32)}
        own |= {name: whole[name] for name in ("cache_indices", "has_initial_state")}
        own |= {"conv_states": whole["conv_states"][:, :, :width]}
        own = jax.device_put(own, devices[0])

        specs = {name: value.spec for name, value in where.items()}
        inputs = tuple(specs[name] for name in ("x", "weight", "bias", "query_start_loc"))
        if split == "tokens":
            part = functools.partial(context_parallel.causal_conv1d, axis_name="d", **options)
        else:
            part = alone
        together = jax.shard_map(part, mesh=mesh, in_specs=inputs, out_specs=specs["x"], check_vma=False)
        names = ("conv_states", "cache_indices", "has_initial_state", *leaves)
        for step in STEPS:
            if step == "prefill":
                plain = functools.partial(pallas_impl.causal_conv1d_fn, **options)
                over = functools.partial(sharding.causal_conv1d_fn, mesh=mesh, **options, **axes)
                one, _ = prefill_call(plain, {name: whole[name] for name in names}, None)
                alone_call, _ = prefill_call(plain, {name: own[name] for name in names}, None)
                every, run = prefill_call(over, {name: parts[name] for name in names}, where)
                text = run.lower(**{name: parts[name] for name in names}).compile().as_text()
            elif step == "forward":
                plain, over = jax.jit(alone), jax.jit(together)
                one = functools.partial(plain, *(whole[name] for name in leaves))
                alone_call = functools.partial(plain, *(own[name] for name in leaves))
                arguments = [parts[name] for name in leaves]
                every, text = functools.partial(over, *arguments), over.lower(*arguments).compile().as_text()
            else:
                (one, _), (alone_call, _) = pulled(alone, whole), pulled(alone, own)
                every, lowered = pulled(together, parts)
                text = lowered.compile().as_text()
            wanted, found = jax.tree.leaves(one()), jax.tree.leaves(every())
            found_same = same(wanted[0], found[0]) and (step != "prefill" or same(wanted[1], found[1]))
            del wanted, found
            sent = sorted(
                {kind for kind in ("all-reduce", "all-gather", "collective-permute") if kind in text}
            )
            record = dict(
                split=split, step=step, tokens=tokens, dim=dim, same_bits=bool(found_same), sent=sent
            )
            yield record, {"one": one, "part": alone_call, "all": every}, seconds
            del one, every, alone_call


def torch_rank(rank, ranks, rendezvous, sizes, device, backend, few, more, samples, queue):
    """One process of the Torch half; rank 0 puts the records."""
    import torch
    import torch.distributed as dist

    import triton_impl
    from triton_impl import context_parallel

    split_training = getattr(context_parallel, "causal_conv1d", None)
    if split_training is None:
        from triton_impl.context_parallel_functional import causal_conv1d as split_training
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    device = torch.device(device, rank) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    options = dict(activation="silu", backend=backend)
    torch.set_num_threads(1)
    wait = torch.cuda.synchronize if cuda else (lambda: None)

    def seconds(call, everywhere, calls):
        """Of the slowest rank; without `everywhere` the others do nothing meanwhile."""
        wait()
        dist.barrier()
        wait()
        spent = 0.0
        if everywhere or rank == 0:
            call()
            wait()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            wait()
            spent = time.perf_counter() - begin
        slowest = torch.tensor([spent], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    for split, (tokens, dim) in sizes.items():
        generator = torch.Generator(device).manual_seed(0)  # the same on every rank: the same kind of device

        def draw(*shape, generator=generator):
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        whole = dict(x=draw(tokens, dim), dout=draw(tokens, dim), weight=draw(dim, WIDTH), bias=draw(dim))
        whole |= dict(conv_states=draw(SLOTS, WIDTH - 1, dim))
        small = dict(
            cache_indices=torch.tensor([1], device=device, dtype=torch.int32),
            has_initial_state=torch.tensor([True], device=device),
        )
        starts = torch.tensor([0, tokens], device=device, dtype=torch.int32)
        if split == "tokens":
            here = slice(rank * tokens // ranks, (rank + 1) * tokens // ranks)
            parts = whole | {"x": whole["x"][here], "dout": whole["dout"][here]}
        else:
            here = slice(rank * dim // ranks, (rank + 1) * dim // ranks)
            parts = {
                name: a[here] if name in ("weight", "bias") else a[..., here].contiguous()
                for name, a in whole.items()
            }
        parts["conv_states"] = parts["conv_states"].clone()
        over = context_parallel.causal_conv1d_fn if split == "tokens" else triton_impl.causal_conv1d_fn
        own_starts = torch.tensor([0, parts["x"].shape[0]], device=device, dtype=torch.int32)

        def prefill(function, of, offsets, small=small):
            with torch.no_grad():
                return function(
                    of["x"], of["weight"], of["bias"], of["conv_states"], offsets, **small, **options
                ).out

        def training(function, of, offsets, **summed):
            leaves = [of[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
            out = function(*leaves, query_start_loc=offsets, **options, **summed)
            out = getattr(out, "out", out)
            return out, functools.partial(torch.autograd.grad, out, leaves, of["dout"], retain_graph=True)

        def forward(function, of, offsets):
            with torch.no_grad():
                out = function(of["x"], of["weight"], of["bias"], query_start_loc=offsets, **options)
            return getattr(out, "out", out)

        function = split_training if split == "tokens" else triton_impl.causal_conv1d
        summed = dict(sum_weight_gradients=True) if split == "tokens" else {}
        given = starts if split == "tokens" else own_starts
        for step in STEPS:
            if step == "prefill":
                one = functools.partial(prefill, triton_impl.causal_conv1d_fn, dict(whole), starts)
                part = functools.partial(prefill, triton_impl.causal_conv1d_fn, dict(parts), own_starts)
                every = functools.partial(prefill, over, dict(parts), given)
            elif step == "forward":
                one = functools.partial(forward, triton_impl.causal_conv1d, whole, starts)
                part = functools.partial(forward, triton_impl.causal_conv1d, parts, own_starts)
                every = functools.partial(forward, function, parts, given)
            else:
                _, one = training(triton_impl.causal_conv1d, whole, starts)
                _, part = training(triton_impl.causal_conv1d, parts, own_starts)
                _, every = training(function, parts, given, **summed)
            wanted, found = one(), every()
            wanted, found = (a if torch.is_tensor(a) else a[0] for a in (wanted, found))
            place = wanted[here] if split == "tokens" else wanted[..., here]
            agrees = torch.tensor(
                [torch.equal(place.contiguous().view(torch.int16), found.view(torch.int16))]
            )
            agrees = agrees.to(device, torch.int32)
            dist.all_reduce(agrees, op=dist.ReduceOp.MIN)
            del wanted, found, place
            record = dict(split=split, step=step, tokens=tokens, dim=dim, same_bits=bool(agrees.item()))
            times = {"one": [], "part": [], "all": []}
            for _ in range(samples if record["same_bits"] else 0):
                for name, call in (("one", one), ("part", part), ("all", every)):
                    times[name].append(steady(functools.partial(seconds, call, call is every), few, more))
            if rank == 0:
                queue.put((record, times))
            one = part = every = call = None
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        queue.put(None)


def torch_results(sizes, device, backend, ranks, *counts):
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/rendezvous", sizes, device, backend, *counts, queue)
        started = multiprocessing.start_processes(
            torch_rank, arguments, ranks, join=False, start_method="spawn"
        )
        while True:
            if queue.empty():
                if started.join(timeout=0.2):  # it raises where a process did
                    break
                continue
            found = queue.get()
            if found is None:
                break
            yield found
        while not started.join():
            pass


def finish(record, times):
    """The record with its times in microseconds, printed in one line; no time without equal bits."""
    goal_of = goal(record["split"], record["step"])
    if not times["all"]:
        print(f"{record['split']:8} {record['step']:8} OTHER BITS THAN ONE GPU: no time", flush=True)
        return record
    one, part, together = (statistics.median(times[name]) * 1e6 for name in ("one", "part", "all"))
    record |= dict(one_us=one, part_us=part, all_us=together, speed_up=one / together, goal=goal_of)
    record |= dict(exchange=(together - part) / together)
    record["samples_us"] = {name: [round(s * 1e6, 2) for s in samples] for name, samples in times.items()}
    print(
        f"{record['split']:8} {record['step']:8} one {one:8.1f} us  part {part:8.1f}  all {together:8.1f}  "
        f"speed-up {one / together:.3f} (goal {goal_of})  beyond the part {record['exchange']:+.1%}  "
        f"{' '.join(record.get('sent', []))}",
        flush=True,
    )
    return record


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=FRAMEWORKS, nargs="?", help="default: both, one after the other")
    parser.add_argument(
        "--out", type=Path, help="folder; default: results/<device>-x<GPUs>, none in a dry run"
    )
    parser.add_argument(
        "--calls", type=int, default=200, help="beyond the few that are subtracted (default: 200)"
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--split", choices=SPLITS, action="append", help="only these; default: all")
    options = parser.parse_args(argv)
    if options.framework is None:  # a process of its own for each: either reserves the GPUs' memory
        command = [sys.executable, "-m", "benchmarks.multi_gpu"]
        return max(subprocess.run([*command, name, *argv], check=False).returncode for name in FRAMEWORKS)
    sizes = {name: (64, 256) if options.dry_run else SPLITS[name] for name in options.split or SPLITS}
    few, more, samples = (1, 1, 1) if options.dry_run else (FEW, options.calls, SAMPLES)
    records = []
    if options.framework == "jax":
        if options.dry_run:
            os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        import jax

        device, version, count = jax.devices()[0].device_kind, jax.__version__, len(jax.devices())
        for record, timed, seconds in jax_results(sizes, "xla" if options.dry_run else "mosaic_gpu"):
            times = {name: [] for name in timed}
            for _ in range(samples if record["same_bits"] else 0):
                for name in timed:
                    times[name].append(steady(functools.partial(seconds, timed[name]), few, more))
            records.append(finish(record, times))
            timed.clear()
    else:
        import torch

        version = torch.__version__
        device, count = "cpu", 2
        if not options.dry_run:
            device, count = torch.cuda.get_device_name(0), torch.cuda.device_count()
        kinds = ("cpu", "eager") if options.dry_run else ("cuda", "triton")
        records = [finish(*found) for found in torch_results(sizes, *kinds, count, few, more, samples)]
    where = environment.describe()
    folder = options.out
    if folder is None and not options.dry_run:
        folder = RESULTS / f"{environment.slug(device)}-x{count}"
    if folder is not None:
        header = where | dict(
            device=device, devices=count, framework=options.framework, version=version, dry_run=options.dry_run,
            method=f"wall clock of {few + more} calls behind one another less that of {few}, over {more}; median of "
            f"{samples} turns, slowest GPU",
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{where['date'][:10]}-{where['commit']}-{options.framework}.json"
        path.write_text(json.dumps(header | {"results": records}, indent=1) + "\n")
        print(path)
    return (
        0 if all(record["same_bits"] for record in records) and len(records) == len(sizes) * len(STEPS) else 1
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
