"""What an update costs among other kernels: `python -m benchmarks.chain torch|jax [--rows 1 32 256] [--dim 8192]`.

A layer is a matrix product that writes x, the update, and an elementwise kernel that reads `out`. LAYERS of them run in
one captured graph (JAX: in one jitted program), as in an engine's decode step. The chain without an update, in which the
elementwise kernel reads x, is timed in the same turns; `update us` is what is left. In torch a second process
takes away programmatic dependent launch (PDL), which lets a kernel begin while the one before ends. A contender
whose update the gate refuses is not timed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from benchmarks.providers import TWIN, open_backend
from benchmarks.run import Session
from benchmarks.timing import take_turns
from benchmarks.workloads import UPDATE, Workload

LAYERS = 50
HIDDEN = 2048  # rows of the matrix, and what the elementwise kernel leaves of `out`
MATRICES = 4  # of different layers, in turn: their sum exceeds the L2 at D 8192
PEERS = ("sglang", "vllm")
ALONE = "no update"


def torch_update(name):
    """`update(x, weight, bias, pool, slots) -> out` of a contender; SGLang's and vLLM's may write over x."""
    if name == TWIN["torch"]:
        import triton_impl

        return lambda x, weight, bias, pool, slots: (
            triton_impl.causal_conv1d_update(x, weight, bias, pool, slots, activation="silu").out
        )
    from benchmarks.torch_backend import engine

    peer, more = engine(name)
    return lambda x, weight, bias, pool, slots: peer.causal_conv1d_update(
        x, pool.transpose(1, 2), weight, bias, "silu", conv_state_indices=slots, **more
    )


def torch_chains(backend, names, rows, dim):
    """A replay of the captured chain of each contender, by name."""
    import torch

    generator = torch.Generator(backend.device).manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, device=backend.device).mul_(scale).bfloat16()

    matrices = [normal(HIDDEN, dim, scale=HIDDEN**-0.5) for _ in range(MATRICES)]
    weights = [(normal(dim, 4, scale=0.5), normal(dim)) for _ in range(LAYERS)]
    slots = torch.randperm(rows + 3, device=backend.device)[:rows].int()
    chains = {}
    for name in (ALONE, *names):
        update = None if name == ALONE else torch_update(name)
        pools = None if update is None else [normal(rows + 3, 3, dim) for _ in range(LAYERS)]
        h, x = normal(rows, HIDDEN), torch.empty(rows, dim, dtype=torch.bfloat16, device=backend.device)

        def chain(update=update, pools=pools, h=h, x=x):
            for layer in range(LAYERS):
                torch.mm(h, matrices[layer % MATRICES], out=x)
                out = x if update is None else update(x, *weights[layer], pools[layer], slots)
                torch.mul(out[:, :HIDDEN], 0.5, out=h)

        chains[name] = backend.capture(chain, 1)
    return chains


def jax_chains(backend, names, rows, dim):
    """A run of the jitted chain of each contender, by name."""
    import jax
    import jax.numpy as jnp

    import pallas_impl

    keys = iter(jax.random.split(jax.random.key(0), 3 * LAYERS + 16))

    def normal(*shape, scale=1.0):
        return (jax.random.normal(next(keys), shape) * scale).astype(jnp.bfloat16)

    matrices = [normal(HIDDEN, dim, scale=HIDDEN**-0.5) for _ in range(MATRICES)]
    weights = [(normal(dim, 4, scale=0.5), normal(dim)) for _ in range(LAYERS)]
    slots = jax.random.permutation(next(keys), rows + 3)[:rows].astype(jnp.int32)

    def program(name, h, pools):
        for layer in range(LAYERS):
            x = jax.lax.optimization_barrier(h @ matrices[layer % MATRICES])
            if name == ALONE:
                out = x
            else:
                out, pools[layer] = pallas_impl.causal_conv1d_update(
                    x, *weights[layer], pools[layer], slots, activation="silu"
                )
            h = jax.lax.optimization_barrier(out[:, :HIDDEN] * 0.5)
        return h, pools

    chains = {}
    for name in (ALONE, *names):
        step = jax.jit(program, static_argnums=0, donate_argnums=2)
        h = normal(rows, HIDDEN)
        pools = [jnp.full((rows + 3, 3, dim), 0.5, jnp.bfloat16) for _ in range(LAYERS * (name != ALONE))]

        def run(name=name, step=step, h=h, state=[pools]):  # noqa: B006  the pools are donated, and come back
            out, state[0] = backend.remember(step(name, h, state[0]))
            return out

        chains[name] = run
    return chains


def right(backend, names, rows, dim):
    """Those of the contenders whose update the gate accepts; what is wrong with the others is printed."""
    workload = Workload(f"decode/b{rows}-d{dim}", UPDATE, (1,) * rows, dim, "a decode step")
    results, ready = Session(backend, list(names), log=lambda text: None).prepare(workload)
    for name, result in results.items():
        if name not in ready:
            print(f"{name}: {result.status}: {result.reason}")
    return list(ready)


def time_chains(framework, rows_of, dim, samples):
    """Prints microseconds a layer, and what of it is the update's, for each contender and number of rows."""
    backend = open_backend(framework)
    backend.without_gradients()
    if not backend.is_gpu:
        print(f"device: expected a GPU, got {backend.device_name}", file=sys.stderr)
        return 2
    timer = None
    names = [TWIN[framework], *(PEERS if framework == "torch" else ())]
    for rows in rows_of:
        found = right(backend, names, rows, dim)
        if framework == "torch":
            chains = torch_chains(backend, found, rows, dim)

            def sample(replay):
                replay()
                return backend.event_us(replay) / LAYERS, None

        else:
            chains = jax_chains(backend, found, rows, dim)
            timer = timer or backend.timer()[0]

            def sample(run, timer=timer):
                return timer.span(run, LAYERS)

        timings, failed = take_turns(chains, sample, f"{LAYERS} layers, by layer", samples=samples, warmup=2)
        for name, reason in failed.items():
            print(f"{name}: {reason}")
        base = timings[ALONE].median if ALONE in timings else float("nan")
        for name, timing in timings.items():
            left = "" if name == ALONE else f"{timing.median - base:10.2f}"
            print(
                f"{rows:6} x {dim:<6} {name:12} {timing.median:10.2f} {timing.p20:8.2f}..{timing.p80:<8.2f} {left}"
            )
    return 0


def without_pdl():
    """Makes every Triton launch of this process one without PDL, whatever its caller asks for."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def plain(kernel, *args, **options):
        return run(kernel, *args, **(options | {"launch_pdl": False} if "launch_pdl" in options else options))

    JITFunction.run = plain


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("framework", choices=TWIN)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--dim", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--no-pdl", action="store_true", help="of Triton: this process alone, without PDL")
    options = parser.parse_args(argv)
    if min(*options.rows, options.samples, options.samples) < 1:
        parser.error("--rows, --samples: expected at least 1")
    if options.dim < HIDDEN:
        parser.error(f"--dim: expected at least {HIDDEN}, got {options.dim}")
    if options.no_pdl:
        without_pdl()
    print(f"{options.framework}{', without PDL' if options.no_pdl else ''}", flush=True)
    print(f"{'rows x dim':15} {'':12} {'layer us':>10} {'p20..p80':>18} {'update us':>10}", flush=True)
    code = time_chains(options.framework, options.rows, options.dim, options.samples)
    if options.framework == "torch" and not options.no_pdl and not code:
        sys.stdout.flush()
        command = [
            sys.executable,
            "-m",
            "benchmarks.chain",
            *(sys.argv[1:] if argv is None else argv),
            "--no-pdl",
        ]
        code = subprocess.run(command, env=os.environ, check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
