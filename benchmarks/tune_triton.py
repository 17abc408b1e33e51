"""Tries block sizes of the Triton kernels on the workloads of the main table: `python -m benchmarks.tune_triton [name]`.

Prints the time of every configuration over the time of copying x into out: prefills by the benchmarks' timer, L2
cold, decode steps in captured graphs. Every configuration must first give the bits of the present choice;
one that does not is printed as WRONG and not timed. What wins goes into `triton_impl/config.py` by hand.
"""

import itertools
import multiprocessing
import os
import sys

import torch

from benchmarks.timing import take_turns
from benchmarks.torch_backend import TorchBackend
from oracle.contract import FnCall, UpdateCall
from triton_impl import config, prefill, update

WORKLOADS = {
    "8x2048-d8192": ([2048] * 8, 8192),
    "8x2048-d2048": ([2048] * 8, 2048),
    "1x32768-d2048": ([32768], 2048),
    "64x128-d8192": ([128] * 64, 8192),
    "skew-d8192": ([16384] + [1] * 255, 8192),
    "mixed-d8192": ([2048] + [1] * 128, 8192),
    "seed-d8192": ([1, 9, 2, 17, 4], 8192),
}
DECODE = {f"decode-b{batch}-d{dim}": (batch, dim) for batch in (1, 32, 256, 1024) for dim in (2048, 8192)}


def prefill_choices(tokens, dim, batch):
    """(name, PrefillConfig): blocks around the present choice, asynchronous stages, both schedules."""
    now = config.prefill_config(tokens, dim, batch, 4, True, None, "flat")
    yield "now", now
    yield "now, per_sequence", now._replace(flat=False, row_blocks=-(-tokens // now.block_t))
    if tokens * dim < 1 << 20:
        blocks = [(4, 4, 1), (8, 8, 1), (8, 4, 2), (8, 4, 1)]
        warps = [(128, 1), (256, 2), (256, 1), (512, 4), (512, 2)]
    else:
        blocks = [
            (16, 8, 2),
            (16, 8, 3),
            (32, 8, 2),
            (32, 8, 3),
            (32, 8, 4),
            (32, 16, 2),
            (64, 8, 3),
            (64, 8, 4),
        ]
        warps = [(512, 2), (1024, 4), (512, 4), (256, 2), (256, 4)]
    for (block_t, group, stages), (block_d, num_warps) in itertools.product(blocks, warps):
        changes = dict(
            block_t=block_t, block_d=block_d, num_warps=num_warps, group=group, stages=stages, maxnreg=None
        )
        yield f"t{block_t} d{block_d} w{num_warps} group{group} stages{stages}", now._replace(**changes)


def update_choices():
    for rows, (block_d, warps) in itertools.product(
        [1, 2, 4, 8], [(256, 1), (512, 2), (1024, 4), (512, 1), (128, 1)]
    ):
        yield f"r{rows} d{block_d} w{warps}", config.UpdateConfig(rows, block_d, warps, False)


def prefill_inputs(lengths, dim, dtype=torch.bfloat16):
    torch.manual_seed(0)
    rows, tokens = len(lengths), sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    return FnCall(
        torch.randn(tokens, dim, device="cuda", dtype=dtype),
        torch.randn(dim, 4, device="cuda", dtype=dtype),
        torch.randn(dim, device="cuda", dtype=dtype),
        torch.randn(2 * rows + 3, 3, dim, device="cuda", dtype=dtype),
        offsets,
        torch.randperm(2 * rows + 3, device="cuda")[:rows].to(torch.int32),
        torch.arange(rows, device="cuda") % 2 == 0,
        activation="silu",
    )


def update_inputs(batch, dim, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return UpdateCall(
        torch.randn(batch, dim, device="cuda", dtype=dtype),
        torch.randn(dim, 4, device="cuda", dtype=dtype),
        torch.randn(dim, device="cuda", dtype=dtype),
        torch.randn(batch + 3, 3, dim, device="cuda", dtype=dtype),
        torch.randperm(batch + 3, device="cuda")[:batch].to(torch.int32),
        activation="silu",
    )


def prepared(call, chosen):
    """A function of `out` that launches the kernel of a call with these block sizes."""
    module, options = (prefill, dict(stores=True)) if isinstance(call, FnCall) else (update, {})
    launch = module.prepare(call, call.check(), chosen, **options)
    arrays = [getattr(call, name) for name in module.ARRAYS]
    return lambda out: launch(*arrays, out)


def behind_flushes(calls, rounds=15):
    """Median microseconds of each call by the benchmarks' own timer: L2 cold, contenders taking turns."""
    timer, notes = TorchBackend().timer()
    for note in notes:
        print(note)
    taken, failed = take_turns(calls, timer.cold, timer.cold_method, samples=rounds, warmup=2)
    timer.close()
    for label, reason in failed.items():
        print(f"    FAILED {label}: {reason}")
    return {name: timing.median for name, timing in taken.items()}


def in_graphs(calls, inside=20, rounds=15):
    """Median microseconds a call of graphs that hold `inside` calls each, taking turns."""
    graphs = {}
    for name, call in calls.items():
        call()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(inside):
                call()
    pairs = {name: [] for name in graphs}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            if turn >= 2:
                pairs[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: sorted(a.elapsed_time(b) for a, b in taken)[rounds // 2] * 1e3 / inside
        for name, taken in pairs.items()
    }


def tune(name):
    if name in DECODE:
        batch, dim = DECODE[name]
        inputs, choices, clock = update_inputs(batch, dim), list(update_choices()), in_graphs
        source = torch.empty(batch * 4 * dim, device="cuda", dtype=torch.bfloat16)
    else:
        lengths, dim = WORKLOADS[name]
        inputs, clock = prefill_inputs(lengths, dim), behind_flushes
        choices = list(prefill_choices(sum(lengths), dim, len(lengths)))
        source = inputs.x
    out, pool, copied = torch.empty_like(inputs.x), inputs.conv_states, torch.empty_like(source)
    calls = {"copy": lambda: copied.copy_(source)}
    start = pool.clone()
    first = None
    wrong = []
    for label, chosen in choices:
        launch = prepared(inputs, chosen)
        pool.copy_(start)
        out.fill_(torch.nan)
        launch(out)
        result = out.clone(), pool.clone()
        first = first or result
        if all(torch.equal(a, b) for a, b in zip(result, first, strict=True)):
            calls[label] = lambda go=launch: go(out)
        else:
            wrong.append(label)
    times = clock(calls)
    print(f"\n{name}: copy {times['copy']:.2f} us; times of the copy")
    for label, time in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {time / times['copy']:7.3f}  {time:9.2f} us  {label}")
    for label in wrong:
        print(f"    WRONG  {label}")


def _compile_all(part):
    """Compiles every `of`-th variant on small inputs, so that the timing run finds them in the disk cache."""
    names, at, of = part
    inputs = prefill_inputs([3, 4], 2048)
    variants = {
        chosen._replace(row_blocks=1)
        for name in names
        if name in WORKLOADS
        for _, chosen in prefill_choices(sum(WORKLOADS[name][0]), WORKLOADS[name][1], len(WORKLOADS[name][0]))
    }
    for chosen in sorted(variants, key=repr)[at::of]:
        prepared(inputs, chosen)(torch.empty_like(inputs.x))
    if set(names) & set(DECODE):
        inputs = update_inputs(8, 2048)
        for _, chosen in list(update_choices())[at::of]:
            prepared(inputs, chosen)(torch.empty_like(inputs.x))


def main():
    names = sys.argv[1:] or [*WORKLOADS, *DECODE]
    if unknown := set(names) - set(WORKLOADS) - set(DECODE):
        sys.exit(f"unknown workload {sorted(unknown)}; known: {', '.join([*WORKLOADS, *DECODE])}")
    workers = os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile_all, [(names, i, workers) for i in range(workers)])
    for name in names:
        tune(name)


if __name__ == "__main__":
    main()
