"""Tries block sizes of the Triton kernels on the workloads of the main table: `python -m benchmarks.tune_triton [name]`.

Prints the time of every configuration over the time of copying x into out, each pair timed in turn with CUDA
events (small batches in a captured graph). Every configuration must first give the bits of the present choice;
one that does not is printed as WRONG and not timed. What wins goes into `triton_impl/config.py` by hand.
"""

import itertools
import multiprocessing
import sys

import torch

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
GRAPH_BELOW = 30_000_000  # elements; below, the host's launches would show


def prefill_choices(tokens, dim, batch):
    """(name, PrefillConfig): blocks around the present choice, asynchronous stages, register limits, both schedules."""
    now = config.prefill_config(tokens, dim, batch, 4, 2, True, None, "flat")
    yield "now", now
    yield "now, per_sequence", now._replace(flat=False, row_blocks=-(-tokens // now.block_t))
    for streams in (1, 2, 4, 16):
        yield f"now, streams{streams}", now._replace(streams=streams)
    blocks = [(256, 1), (512, 2), (512, 4), (1024, 4), (1024, 2), (2048, 8)]
    for block_t, (block_d, warps) in itertools.product([8, 16, 32, 64, 128], blocks):
        yield (
            f"t{block_t} d{block_d} w{warps}",
            now._replace(block_t=block_t, block_d=block_d, num_warps=warps),
        )
    for block_t, stages, maxnreg in itertools.product(
        [32, 64, 128], [1, 2, 3, 4], [None, 168, 144, 128, 112, 96]
    ):
        name = f"t{block_t} stages{stages} reg{maxnreg}"
        yield name, now._replace(block_t=block_t, block_d=512, num_warps=2, stages=stages, maxnreg=maxnreg)
    for group, stages in itertools.product([4, 16], [1, 3]):
        yield (
            f"t64 group{group} stages{stages}",
            now._replace(block_t=64, block_d=512, num_warps=2, group=group, stages=stages),
        )


def update_choices():
    for rows, (block_d, warps) in itertools.product(
        [1, 2, 4, 8], [(256, 1), (512, 2), (1024, 4), (512, 1), (128, 1)]
    ):
        yield f"r{rows} d{block_d} w{warps}", config.UpdateConfig(rows, block_d, warps)


def prefill_inputs(lengths, dim, copies, dtype=torch.bfloat16):
    torch.manual_seed(0)
    rows, tokens = len(lengths), sum(lengths)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    shared = (
        torch.randn(dim, 4, device="cuda", dtype=dtype),
        torch.randn(dim, device="cuda", dtype=dtype),
        torch.randn(2 * rows + 3, 3, dim, device="cuda", dtype=dtype),
        offsets,
        torch.randperm(2 * rows + 3, device="cuda")[:rows].to(torch.int32),
        torch.arange(rows, device="cuda") % 2 == 0,
    )
    return [(torch.randn(tokens, dim, device="cuda", dtype=dtype), *shared) for _ in range(copies)]


def update_inputs(batch, dim, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return (
        torch.randn(batch, dim, device="cuda", dtype=dtype),
        torch.randn(dim, 4, device="cuda", dtype=dtype),
        torch.randn(dim, device="cuda", dtype=dtype),
        torch.randn(batch + 3, 3, dim, device="cuda", dtype=dtype),
        torch.randperm(batch + 3, device="cuda")[:batch].to(torch.int32),
    )


def in_turn(calls, rounds=15):
    """Median microseconds of each call by CUDA events, contenders taking turns."""
    events = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(turn)
            end.record()
            if turn >= 2:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: sorted(a.elapsed_time(b) for a, b in pairs)[rounds // 2] * 1e3 for name, pairs in events.items()
    }


def in_graphs(calls, inside=20, rounds=15):
    """Median microseconds a call of graphs that hold `inside` calls each."""
    graphs = {}
    for name, call in calls.items():
        call(0)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for turn in range(inside):
                call(turn)
    times = in_turn({name: lambda turn, g=graph: g.replay() for name, graph in graphs.items()}, rounds)
    return {name: time / inside for name, time in times.items()}


def tune(name):
    if name in DECODE:
        batch, dim = DECODE[name]
        sets = [update_inputs(batch, dim)]
        moved = torch.empty(batch * 4 * dim, device="cuda", dtype=torch.bfloat16)
        target = torch.empty_like(moved)
        pool_at, choices, module = 3, list(update_choices()), update
        calls = {"copy": lambda turn: target.copy_(moved)}
        size = 0
    else:
        lengths, dim = WORKLOADS[name]
        size = sum(lengths) * dim
        sets = prefill_inputs(lengths, dim, max(2, min(8, 220_000_000 // (2 * size) + 1)))
        pool_at, choices, module = 3, list(prefill_choices(sum(lengths), dim, len(lengths))), prefill
    outs = [torch.empty_like(inputs[0]) for inputs in sets]
    if name not in DECODE:
        calls = {"copy": lambda turn: outs[turn % len(sets)].copy_(sets[turn % len(sets)][0])}
    start = sets[0][pool_at].clone()
    first = None
    wrong = []
    for label, chosen in choices:
        launch = module.prepare(*sets[0], True, -1, chosen)
        sets[0][pool_at].copy_(start)
        outs[0].fill_(torch.nan)
        launch(*sets[0], outs[0])
        result = outs[0].clone(), sets[0][pool_at].clone()
        first = first or result
        if all(torch.equal(a, b) for a, b in zip(result, first, strict=True)):
            calls[label] = lambda turn, go=launch: go(*sets[turn % len(sets)], outs[turn % len(sets)])
        else:
            wrong.append(label)
    times = (in_graphs if size < GRAPH_BELOW else in_turn)(calls)
    print(f"\n{name}: copy {times['copy']:.2f} us; times of the copy")
    for label, time in sorted(times.items(), key=lambda item: item[1]):
        print(f"  {time / times['copy']:7.3f}  {time:9.2f} us  {label}")
    for label in wrong:
        print(f"    WRONG  {label}")


def _compile_all(part):
    """Compiles every `part`-th variant on small inputs, so that the timing run finds them in the disk cache."""
    at, of = part
    for dim in (2048, 8192):
        inputs = prefill_inputs([3, 4], dim, 1)[0]
        for _, chosen in list(prefill_choices(16384, dim, 2))[at::of]:
            prefill.prepare(*inputs, True, -1, chosen)(*inputs, torch.empty_like(inputs[0]))
        inputs = update_inputs(8, dim)
        for _, chosen in list(update_choices())[at::of]:
            update.prepare(*inputs, None, None, True, -1, chosen)(
                *inputs, None, None, torch.empty_like(inputs[0])
            )


def main():
    names = sys.argv[1:] or [*WORKLOADS, *DECODE]
    if unknown := set(names) - set(WORKLOADS) - set(DECODE):
        sys.exit(f"unknown workload {sorted(unknown)}; known: {', '.join([*WORKLOADS, *DECODE])}")
    workers = 12
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile_all, [(i, workers) for i in range(workers)])
    for name in names:
        tune(name)


if __name__ == "__main__":
    main()
