"""One rank of the Torch context-parallel checks, run as a script by the tests.

    python tests/tools/context_parallel_torch.py RANK WORLD_SIZE RENDEZVOUS_FILE DEVICE BACKEND

Every rank makes the same batches, runs its part of each, gathers the parts, and compares them in every bit with the
run of the whole on this device. It prints how many batches agreed, and raises at the first that does not.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from triton_impl import causal_conv1d_fn, context_parallel

B, H, F = torch.bfloat16, torch.float16, torch.float32


def cases(ranks):
    """(row lengths, tokens, parts or None, width, x dtype, pool dtype, with pool): rows that cross, skip, end at cuts."""
    long = ([19 * ranks, 0, 3, 8 * ranks], 32 * ranks, None)
    ones = ([1] * (3 * ranks) + [13 * ranks], 16 * ranks, None)  # packed rows across every cut, no tail
    short = ([2, 2 * ranks - 3], 2 * ranks, None)  # parts of 2 tokens: a window of 7 spans several ranks
    single = ([ranks], ranks, None)
    parts = [5, 0, 1, 9, 2, 0, 3, 7][:ranks]
    uneven = ([3, sum(parts) - 4], sum(parts), parts)
    empty = ([0, 0], 4 * ranks, None)
    yield *long, 4, B, B, True
    yield *long, 8, F, F, True
    yield *ones, 4, H, F, True
    yield *ones, 3, F, B, True  # a halo that must not pass through the pool's dtype
    yield *short, 8, B, B, True
    yield *short, 4, H, B, True
    yield *single, 4, B, B, True
    yield *single, 8, B, B, False
    yield *uneven, 4, B, B, True
    yield *uneven, 8, F, F, True
    yield *long, 1, B, B, True
    yield *long, 2, B, B, False
    yield *empty, 4, B, B, True


def make_batch(number, lengths, tokens, width, dtype, pool_dtype, pooled, device, dim=40):
    generator = torch.Generator().manual_seed(number)

    def draw(*shape, dtype):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    batch, num_slots = len(lengths), len(lengths) + 3
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    arguments = dict(
        x=draw(tokens, dim, dtype=dtype), weight=draw(dim, width, dtype=dtype), bias=draw(dim, dtype=dtype)
    )
    if not pooled:
        return dict(**arguments, conv_states=None, query_start_loc=bounds)
    pool = draw(num_slots, width + 1, dim, dtype=pool_dtype)
    slots = torch.randperm(num_slots, generator=generator)[:batch]
    if batch > 4:
        slots[1], slots[3] = -1, num_slots  # padding rows: one by name, one out of range
    flags = torch.rand(batch, generator=generator) < 0.6
    pool[slots[0].clamp(0), 0] = float("nan")  # seen only if the row has a state, and then as it is
    return dict(
        **arguments, conv_states=pool, query_start_loc=bounds, cache_indices=slots.to(torch.int32).to(device),
        has_initial_state=flags.to(device),
    )  # fmt: skip


def bits(a):
    return a.contiguous().view({2: torch.int16, 4: torch.int32}[a.element_size()])


def same_outputs(a, b):
    """Equal bits, but for the payloads of NaNs, which arithmetic does not keep."""
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def check(number, case, rank, ranks, device, backend):
    lengths, tokens, parts, width, dtype, pool_dtype, pooled = case
    arguments = make_batch(number, lengths, tokens, width, dtype, pool_dtype, pooled, device)
    for activation in (None, "silu"):
        options = dict(activation=activation, backend=backend)
        pool = arguments["conv_states"]
        whole = causal_conv1d_fn(
            **{**arguments, "conv_states": None if pool is None else pool.clone()}, **options
        )
        sizes = parts or [tokens // ranks] * ranks
        first = sum(sizes[:rank])
        mine = {**arguments, "x": arguments["x"][first : first + sizes[rank]]}
        if pool is not None:
            mine["conv_states"] = pool.clone()
        # A max_seqlen of the whole: parts of a row are never longer.
        out, states = context_parallel.causal_conv1d_fn(
            **mine, **options, part_lengths=parts, max_seqlen=max(lengths)
        )
        if not same_outputs(out, whole.out[first : first + sizes[rank]]):
            raise SystemExit(f"rank {rank} case {number} {case} {activation}: outputs differ")
        if pool is not None and (
            states is not mine["conv_states"] or not torch.equal(bits(states), bits(whole.conv_states))
        ):
            raise SystemExit(f"rank {rank} case {number} {case} {activation}: states differ")


def check_unequal(rank, device, run):
    """Parts of different lengths have to be named: on a CPU every rank says so, a GPU asserts it, and is of no use afterwards.

    run: a function of x, weight and offsets.
    """
    x, weight = torch.ones(4 + rank, 8, device=device), torch.ones(8, 3, device=device)
    try:
        run(x, weight, torch.tensor([0, 9], device=device))
        if device != "cpu":
            torch.cuda.synchronize()
    except ValueError as error:
        if "part_lengths" in str(error):
            return
        raise
    except RuntimeError as error:
        if device != "cpu" and "device-side assert" in str(error):
            return
        raise
    raise SystemExit(f"rank {rank}: parts of different lengths went unseen")


def finish(rank, device, run, done):
    """The last check, the count of what agreed, and the end of the process group."""
    dist.barrier()
    check_unequal(rank, device, run)
    print(f"agreed: {done}", flush=True)
    if device != "cpu":
        os._exit(0)  # nothing on this GPU can end in order any more
    dist.destroy_process_group()


def main(rank, ranks, rendezvous, device, backend):
    rank, ranks = int(rank), int(ranks)
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=90),
    )
    done = 0
    for number, case in enumerate(cases(ranks)):
        check(number, case, rank, ranks, device, backend)
        done += 1

    def run(x, weight, offsets):
        return context_parallel.causal_conv1d_fn(x, weight, None, None, offsets, backend=backend)

    finish(rank, device, run, done)


if __name__ == "__main__":
    main(*sys.argv[1:])
