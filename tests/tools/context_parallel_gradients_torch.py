"""One rank of the checks of Torch's context parallel gradients, run as a script by the tests.

    python tests/tools/context_parallel_gradients_torch.py RANK WORLD_SIZE RENDEZVOUS_FILE DEVICE BACKEND [CASE,...]

Every rank makes the same batches and runs its part of each, forward and backward. `out` and `dx` must be the bits of
one device, all gradients lie within the reference's bounds. It prints how many batches agreed, and raises at the first
that does not.
"""

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist

from oracle.numerics import TypedArray
from tests.tools.context_parallel_cases import build, cases, judge, uneven_cases
from tests.tools.context_parallel_torch import finish
from triton_impl import causal_conv1d, context_parallel

FLOATS = ("x", "weight", "bias")


def to_torch(array, device):
    if array is None:
        return None
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.data.view(np.int16).copy()).view(torch.bfloat16).to(device)
    return torch.from_numpy(array.data.copy()).to(device)


def to_typed(tensor):
    if tensor.dtype == torch.bfloat16:
        return TypedArray("bfloat16", tensor.cpu().view(torch.int16).numpy().view(np.uint16))
    return TypedArray(str(tensor.dtype).removeprefix("torch."), tensor.cpu().numpy())


def same_bits(a, b):
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def differentiate(function, arguments, dout, **options):
    """(out, {name: gradient}), of arguments that are as before afterwards."""
    leaves = {name: arguments[name] for name in FLOATS if arguments[name] is not None}
    versions = {name: leaf._version for name, leaf in leaves.items()}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    out = function(**arguments | leaves, **options)
    out = getattr(out, "out", out)
    found = torch.autograd.grad(out, list(leaves.values()), dout)
    if versions != {name: arguments[name]._version for name in leaves}:
        raise SystemExit("an argument was written")
    return out.detach(), dict(zip(leaves, found, strict=True))


def gather(tensor):
    """The tensors of all ranks, of any lengths."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.cpu())
    return parts


def check(case, rank, ranks, device, backend):
    def expect(condition, what):
        if not condition:
            raise SystemExit(f"rank {rank} {case.name}: {what} differ")

    typed_arguments, typed_dout = build(case)
    arguments = {name: to_torch(array, device) for name, array in typed_arguments.items()}
    dout = to_torch(typed_dout, device)
    # A max_seqlen of the whole: parts of a row are never longer.
    options = dict(activation=case.activation, backend=backend, max_seqlen=max(case.lengths, default=0))
    out, whole = differentiate(causal_conv1d, arguments, dout, **options)

    sizes = case.parts or [len(dout) // ranks] * ranks
    here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = arguments | {"x": arguments["x"][here]}
    run = context_parallel.causal_conv1d
    options["part_lengths"] = case.parts
    got, found = differentiate(run, mine, dout[here], **options, sum_weight_gradients=True)
    expect(same_bits(got, out[here]), "outputs")
    expect(same_bits(found["x"], whole["x"][here]), "gradients of x")

    gathered = found | {"x": torch.cat(gather(found["x"]))}
    wrong = judge(case, typed_arguments, typed_dout, {name: to_typed(a) for name, a in gathered.items()})
    expect(wrong == [], f"gradients and reference {wrong}")

    _, again = differentiate(run, mine, dout[here], **options, sum_weight_gradients=True)
    _, partial = differentiate(run, mine, dout[here], **options)
    for name in found:
        expect(same_bits(again[name], found[name]), f"two runs' gradients of {name}")
        if name == "x":
            continue
        everywhere = gather(found[name])
        expect(all(same_bits(other, everywhere[0]) for other in everywhere), f"ranks' gradients of {name}")
        if partial[name].dtype == torch.float32:  # nothing is rounded: the caller's sum is the option's
            total, *rest = gather(partial[name])
            for part in rest:
                total = total + part
            expect(same_bits(total, found[name].cpu()), f"sums of the parts of {name}")


def main(rank, ranks, rendezvous, device, backend, names=""):
    rank, ranks = int(rank), int(ranks)
    if device == "cuda":
        torch.cuda.set_device(rank)
        device = f"cuda:{rank}"
    torch.set_num_threads(1)
    # What torch.empty returns is NaN, so that an element that was never written is seen.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch._C._set_deterministic_algorithms(True, warn_only=True)  # the public one imports the compiler
    dist.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=90),
    )
    done = 0
    for case in [*cases(ranks), *uneven_cases(ranks)]:
        if names and case.name not in names.split(","):
            continue
        check(case, rank, ranks, device, backend)
        done += 1

    def run(x, weight, offsets):
        return context_parallel.causal_conv1d(x.requires_grad_(), weight, None, offsets, backend=backend)

    finish(rank, device, run, done)


if __name__ == "__main__":
    main(*sys.argv[1:])
