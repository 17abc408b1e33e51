"""What the rest of the interface costs over a plain prefill or a copy: `python -m benchmarks.features torch|jax [--out FILE]`.

Serving features on 8 prompts of 2048 tokens (D 8192, bfloat16, width 4, bias, silu, state), a verify step of 64 x 4
tokens that keeps the window after every token and commits nothing, and the backward pass. Each is held against a
copy of the bytes that it must move. Before a time is taken, its results must be those of the plain operation.
In torch, causal-conv1d's and FLA's backward are timed beside ours where they are installed and right; and
ours also on rows in channel-first memory, of a whole number of 16 bytes a channel and of one token less.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks import environment
from benchmarks.timing import take_turns

ROWS, LENGTH, DIM, WIDTH = 8, 2048, 8192, 4
BLOCK = 64  # tokens between snapshots
DRAFTS = 64, 4
SIZES = 2048, 2048, 4096  # q, k, v
TOKENS = ROWS * LENGTH
SNAPSHOTS = LENGTH // BLOCK
ACTIVATION = "silu"
PEERS = ("backward of fla", "backward of causal_conv1d")


def torch_calls():
    """(backend, {name: call}, {name: (call, calls in a graph)}, failures, {name: why it has no time})."""
    import torch

    import triton_impl
    from benchmarks.torch_backend import TorchBackend
    from triton_impl.functional import causal_conv1d

    backend = TorchBackend()
    device = backend.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x, weight, bias = normal(TOKENS, DIM), normal(DIM, WIDTH), normal(DIM)
    pool = normal(ROWS * (2 + SNAPSHOTS), WIDTH - 1, DIM)
    offsets = torch.arange(ROWS + 1, device=device, dtype=torch.int32) * LENGTH
    slots = torch.arange(ROWS, device=device, dtype=torch.int32)
    has = slots % 2 == 0
    snapshots = (2 * ROWS + torch.arange(ROWS * SNAPSHOTS, device=device, dtype=torch.int32)).view(ROWS, -1)

    def fn(**more):
        with torch.no_grad():
            return triton_impl.causal_conv1d_fn(
                x, weight, bias, pool, offsets, slots, has, activation=ACTIVATION, **more
            )

    options = {
        "plain": {},
        "snapshots": {"snapshot_indices": snapshots, "snapshot_block_size": BLOCK},
        "split": {"split_sizes": SIZES},
        "residual": {"residual": x},
        "write slot": {"write_indices": slots + ROWS},
    }
    copied, kept = torch.empty_like(x), pool[2 * ROWS :]
    kept_copy = torch.empty_like(kept)
    dout = normal(TOKENS, DIM)
    moved = torch.cat([x, x[: TOKENS // 2]])
    moved_copy = torch.empty_like(moved)

    def backward():
        return torch.ops.twinconv.causal_conv1d_backward(
            dout, None, x, weight, bias, None, offsets, ACTIVATION, LENGTH, "auto", "auto", True, False
        )

    # the same values in [row, channel, token] memory; one token less, and channels begin on no 16 bytes
    first_x, first_dout = (t.view(ROWS, LENGTH, DIM).mT.contiguous().mT for t in (x, dout))

    def backward_channel_first(length=LENGTH):
        return torch.ops.twinconv.causal_conv1d_backward(
            first_dout[:, :length], None, first_x[:, :length], weight, bias, None, None, ACTIVATION, None, "auto", "auto",
            True, False,
        )  # fmt: skip

    calls = {name: lambda more=more: fn(**more) for name, more in options.items()}
    calls |= {
        "copy of x": lambda: copied.copy_(x),
        "copy of the snapshots": lambda: kept_copy.copy_(kept),
        "backward": backward,
        "backward, channel-first": backward_channel_first,
        "backward, uneven rows": lambda: backward_channel_first(LENGTH - 1),
        "copy of backward's bytes": lambda: moved_copy.copy_(moved),
    }

    failures = []
    start = pool.clone()
    plain = fn().out
    for name, more in options.items():
        pool.copy_(start)
        out = fn(**more).out
        out = torch.cat(out, 1) if isinstance(out, tuple) else out
        if name != "residual" and not torch.equal(out, plain):
            failures.append(f"{name}: other outputs than plain")
    pool.copy_(start)
    fn(**options["snapshots"])
    for row, k in ((0, 0), (3, 7), (ROWS - 1, SNAPSHOTS - 1)):
        end = row * LENGTH + (k + 1) * BLOCK
        if not torch.equal(pool[snapshots[row, k]], x[end - WIDTH + 1 : end]):
            failures.append(f"snapshots: other windows than x's, row {row}, block {k}")
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    causal_conv1d(*leaves, None, offsets, activation=ACTIVATION, max_seqlen=LENGTH).out.backward(dout)
    if not all(torch.equal(a, t.grad) for a, t in zip(backward(), leaves, strict=False)):
        failures.append("backward: other gradients than autograd's")
    gate = GradientGate(x, weight, bias, offsets, dout)
    ours = backward()
    if reason := gate.judge(*ours[:3]):
        failures.append(f"backward: {reason}")
    first = backward_channel_first()
    if not torch.equal(first[0].reshape(x.shape), ours[0]):
        failures.append("backward, channel-first: another gradient of x than of the same values channel-last")
    if reason := gate.judge(first[0].reshape(x.shape), *first[1:3]):
        failures.append(f"backward, channel-first: {reason}")
    uneven, dx = backward_channel_first(LENGTH - 1)[0], ours[0].view(ROWS, LENGTH, DIM)
    if not torch.equal(uneven[:, : LENGTH - WIDTH], dx[:, : LENGTH - WIDTH]):
        failures.append("backward, uneven rows: another gradient of x than of whole rows")
    del ours, first, uneven, dx

    found, absent = torch_peers(leaves, dout, offsets)
    for name, call in found.items():
        try:
            reason = gate.judge(call())
        except Exception as error:  # a peer's, of any kind: it gets no time, and the others do
            reason = f"{type(error).__name__}: {error}"
        if reason:
            absent[name] = reason
        else:
            calls[name] = call

    batch, n = DRAFTS
    drafts, windows = normal(batch, n, DIM), normal(batch, n, WIDTH - 1, DIM)

    def verify(commit=False, window_out=windows):
        with torch.no_grad():
            return triton_impl.causal_conv1d_update(
                drafts, weight, bias, pool, activation=ACTIVATION, window_out=window_out, commit=commit
            )

    pool.copy_(start)
    if not torch.equal(verify().out, verify(True, None).out):
        failures.append("verify: other outputs than an update")
    source = normal((drafts.numel() * 2 + batch * (WIDTH - 1) * DIM + windows.numel()) // 2)
    target = torch.empty_like(source)
    graphs = {"verify": verify, "copy of verify's bytes": lambda: target.copy_(source)}
    return backend, calls, graphs, failures, absent


def torch_peers(leaves, dout, offsets):
    """The peers' backward kernels by name, each a call that returns dx first; and why others are missing.

    Args:
      leaves: x [tokens, dim], weight and bias, which ask for gradients.
      dout: [tokens, dim]; offsets: [rows + 1] on the device.
    """
    import torch

    from benchmarks.providers import Missing
    from benchmarks.torch_backend import import_peer

    x, weight, bias = leaves

    def fla():
        ops = import_peer("fla.modules.causal_conv1d", "fla.modules.convolution")
        return ops.causal_conv1d(x[None], weight, bias, activation=ACTIVATION, cu_seqlens=offsets.long())[0][
            0
        ]

    def causal_conv1d():
        rows = x.view(ROWS, LENGTH, DIM).mT  # channel-last memory
        out = import_peer("causal_conv1d").causal_conv1d_fn(rows, weight, bias, activation=ACTIVATION)
        return out.mT.reshape(x.shape)

    found, absent = {}, {}
    for name, forward in zip(PEERS, (fla, causal_conv1d), strict=True):
        try:
            out = forward()
        except Missing as error:
            absent[name] = f"missing: {error}"
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = lambda out=out: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    found = {name: lambda call=call: call()[0] for name, call in found.items()}
    return found, absent


class GradientGate:
    """Judges gradients by the oracle, in one channel of 1024 and the last.

    The allowed error is the oracle's and, of dx, for 16-bit roundings inside a peer, half an ulp of bfloat16 of each product, of
    dout * act', of the sum, and of the pre-activation, of which act' has slope 1/2 at most.
    """

    def __init__(self, x, weight, bias, offsets, dout):
        from oracle import reference_grad, tolerance_grad

        self._channels = [*range(0, DIM, 1024), DIM - 1]
        x, dout = self._typed(x), self._typed(dout)
        weight, bias = self._typed(weight.t(), lambda a: a.T), self._typed(bias[None], lambda a: a[0])
        offsets = offsets.cpu().numpy()
        call = dict(
            dout=dout, dfinal_states=None, x=x, weight=weight, bias=bias, initial_states=None,
            query_start_loc=offsets, activation=ACTIVATION,
        )  # fmt: skip
        self._expected = reference_grad.causal_conv1d_backward(**call)
        self._bounds = tolerance_grad.gradient_bounds(**call)
        bound = self._bounds[0]
        taps, values = reference_grad.float64(weight), np.abs(reference_grad.float64(x))
        values = values.reshape(ROWS, LENGTH, -1)
        pre = np.zeros_like(values) + np.abs(reference_grad.float64(bias))
        for back in range(WIDTH):
            pre[:, back:] += values[:, : LENGTH - back] * np.abs(taps[:, WIDTH - 1 - back])
        g = np.abs(reference_grad.float64(dout)).reshape(values.shape)
        magnitude = np.zeros_like(g)
        for ahead in range(WIDTH):
            tap = np.abs(taps[:, WIDTH - 1 - ahead])
            magnitude[:, : LENGTH - ahead] += (g * (1.1 * (WIDTH + 2) + pre / 2))[:, ahead:] * tap
        self._allowed = bound + 2.0**-9 * magnitude.reshape(bound.shape)

    def _typed(self, tensor, back=lambda a: a):
        """The chosen channels, the last axis, of a bfloat16 tensor."""
        import torch

        from oracle.numerics import TypedArray

        bits = tensor[..., self._channels].contiguous().view(torch.int16).cpu().numpy().view(np.uint16)
        return TypedArray("bfloat16", np.ascontiguousarray(back(bits)))

    def judge(self, dx, dweight=None, dbias=None):
        """Why dx [tokens, dim] is wrong, or, of a backward of ours, dweight [dim, width] or dbias [dim]; or None."""
        from oracle.reference_grad import float64
        from oracle.tolerance import fraction_of_bound

        found = {"dx": (self._typed(dx), self._expected[0], self._allowed)}
        if dweight is not None:
            got = self._typed(dweight.t(), lambda a: a.T)
            found["dweight"] = got, self._expected[1], self._bounds[1]
            got = self._typed(dbias[None], lambda a: a[0])
            found["dbias"] = got, self._expected[2], self._bounds[2]
        for name, (got, expected, allowed) in found.items():
            worst = fraction_of_bound(float64(got), expected, allowed, "bfloat16").max()
            if not worst <= 1:
                return f"wrong: {name} is {worst:.3g} times the allowed error off"
        return None


def jax_calls():
    """The same in JAX; the verify step is timed warm, by CUPTI."""
    import jax
    import jax.numpy as jnp

    import pallas_impl
    from benchmarks.jax_backend import JaxBackend
    from pallas_impl.functional import causal_conv1d

    backend = JaxBackend()
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    def same(a, b):
        return bool(jnp.array_equal(a, b))

    x, weight, bias = normal(TOKENS, DIM), normal(DIM, WIDTH), normal(DIM)
    first = normal(ROWS * (2 + SNAPSHOTS), WIDTH - 1, DIM)
    offsets = jnp.arange(ROWS + 1, dtype=jnp.int32) * LENGTH
    slots = jnp.arange(ROWS, dtype=jnp.int32)
    has = slots % 2 == 0
    snapshots = (2 * ROWS + jnp.arange(ROWS * SNAPSHOTS, dtype=jnp.int32)).reshape(ROWS, -1)
    options = {
        "plain": ({}, {}),
        "snapshots": ({"snapshot_indices": snapshots}, {"snapshot_block_size": BLOCK}),
        "split": ({}, {"split_sizes": SIZES}),
        "residual": ({"residual": x}, {}),
        "write slot": ({"write_indices": slots + ROWS}, {}),
    }
    pools, calls, failures, plain = {}, {}, [], None
    for name, (arrays, static) in options.items():

        def run(x, pool, arrays, static=static):
            return pallas_impl.causal_conv1d_fn(
                x,
                weight,
                bias,
                pool,
                offsets,
                slots,
                has,
                activation=ACTIVATION,
                max_seqlen=LENGTH,
                **arrays,
                **static,
            )

        step = jax.jit(run, donate_argnums=1)
        out, pools[name] = step(x, jnp.copy(first), arrays)
        out = jnp.concatenate(out, 1) if isinstance(out, tuple) else out
        plain = out if plain is None else plain
        if name != "residual" and not same(out, plain):
            failures.append(f"{name}: other outputs than plain")

        def call(name=name, step=step, arrays=arrays):
            out, pools[name] = step(x, pools[name], arrays)
            backend.remember(jax.tree.leaves(out))

        calls[name] = call
    for row, k in ((0, 0), (3, 7), (ROWS - 1, SNAPSHOTS - 1)):
        end = row * LENGTH + (k + 1) * BLOCK
        if not same(pools["snapshots"][int(snapshots[row, k])], x[end - WIDTH + 1 : end]):
            failures.append(f"snapshots: other windows than x's, row {row}, block {k}")

    dout, moved = normal(TOKENS, DIM), jnp.concatenate([x, x[: TOKENS // 2]])
    copy = jax.jit(jnp.copy)

    @jax.jit
    def backward(x, weight, bias, dout):
        def forward(x, weight, bias):
            return causal_conv1d(x, weight, bias, None, offsets, activation=ACTIVATION, max_seqlen=LENGTH).out

        return jax.vjp(forward, x, weight, bias)[1](dout)

    kept = jnp.copy(first[2 * ROWS :])
    calls |= {
        "copy of x": lambda: backend.remember(copy(x)),
        "copy of the snapshots": lambda: backend.remember(copy(kept)),
        "backward": lambda: backend.remember(backward(x, weight, bias, dout)),
        "copy of backward's bytes": lambda: backend.remember(copy(moved)),
    }

    batch, n = DRAFTS
    drafts, windows = normal(batch, n, DIM), [normal(batch, n, WIDTH - 1, DIM)]

    @jax.jit
    def update(drafts, pool):
        return pallas_impl.causal_conv1d_update(drafts, weight, bias, pool, activation=ACTIVATION).out

    def keep(drafts, pool, window_out):
        result = pallas_impl.causal_conv1d_update(
            drafts, weight, bias, pool, activation=ACTIVATION, window_out=window_out, commit=False
        )
        return result.out, result.window_out

    step = jax.jit(keep, donate_argnums=2)

    def verify():
        out, windows[0] = step(drafts, first, windows[0])
        return backend.remember((out,))[0]

    if not same(verify(), update(drafts, first)):
        failures.append("verify: other outputs than an update")
    source = normal((drafts.size * 2 + batch * (WIDTH - 1) * DIM + windows[0].size) // 2)
    graphs = {"verify": verify, "copy of verify's bytes": lambda: backend.remember(copy(source))}
    backend.synchronize()
    return backend, calls, graphs, failures, {}


LIMITS = {  # name: (what it may take: factor times these, plus those)
    "snapshots": (1.1, "plain", "copy of the snapshots"),
    "split": (1.1, "plain", None),
    "verify": (1.3, "copy of verify's bytes", None),
    "backward": (1.25, "copy of backward's bytes", None),
    "backward, channel-first": (1.25, "copy of backward's bytes", None),
}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.features", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("framework", choices=("torch", "jax"))
    parser.add_argument("--out", type=Path, help="file for the times as JSON")
    parser.add_argument("--samples", type=int, default=15)
    options = parser.parse_args(argv)
    backend, calls, graphs, failures, absent = torch_calls() if options.framework == "torch" else jax_calls()
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        return 1
    taken, failed = {}, {}
    if backend.is_gpu and options.framework == "torch":  # before CUPTI is loaded, which slows launches
        from benchmarks.providers import Prepared

        taken, failed = backend.graph(
            {k: Prepared(call, None) for k, call in graphs.items()}, 50, options.samples
        )
    timer, _ = backend.timer()
    more, wrong = take_turns(calls, timer.cold, timer.cold_method, samples=options.samples, warmup=3)
    taken, failed = taken | more, failed | wrong
    if options.framework == "jax" or not backend.is_gpu:
        more, wrong = take_turns(graphs, timer.warm, timer.warm_method, samples=options.samples, warmup=3)
        taken, failed = taken | more, failed | wrong
    timer.close()
    failed |= absent
    times = {name: timing.median for name, timing in taken.items()}
    method = {name: timing.method for name, timing in taken.items()}
    print(f"{backend.device_name}, {options.framework}")
    for name, microseconds in times.items():
        line = f"{name:26} {microseconds:9.2f} us"
        factor, of, plus = LIMITS.get(name, (None, None, None))
        if factor is not None and of in times and (plus is None or plus in times):
            limit = factor * times[of] + (times[plus] if plus else 0)
            line += f"  {microseconds / times[of]:6.3f} of {of}, at most {limit:.2f} us: "
            line += "met" if microseconds <= limit else "MISS"
        print(line)
    for peer in PEERS:
        if peer in times:
            print(f"{'backward':26} {times['backward'] / times[peer]:6.3f} of {peer}")
    for name, reason in failed.items():
        print(f"{name:26} no time: {reason[:200]}")
    if options.out:
        record = {**environment.describe(), "device": backend.device_name, "framework": options.framework}
        record |= {
            "method": method,
            "samples": {name: t.samples for name, t in taken.items()},
            "failed": failed,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
