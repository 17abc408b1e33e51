"""What the fronts of linear-attention layers cost over a copy: `python -m benchmarks.fronts torch|jax [GROUP ...]`.

Groups: `prefill` (8 prompts of 2048 tokens at D 2048, 8192 and 12288 with all gates), `decode` (1, 32 and 256 rows), `lfm2` (the gated
short convolution, a prefill and a step) and `backward`. Each contender of a group is a call on the same arrays: our operation, our
plain convolution with a split followed by the framework's own norm and gates (`separate`), a copy of the bytes that must move,
and what the peers have of this chain: vLLM's and SGLang's convolution with the separate norm behind, flash-linear-attention's convolution
and norm, jax-linear-attention's dense convolution with the norm. A peer that is not installed is reported as missing. No time is taken
before q, k, v, g and beta, or `out`, are those of `separate`, to a few roundings of bfloat16.

`--small` takes a few tokens and channels, for a run without a GPU, whose times mean nothing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import environment
from benchmarks.providers import Missing, Prepared
from benchmarks.timing import take_turns

WIDTH, ITEM = 4, 2
TOLERANCE = 2.0**-6  # of values that are about 1: two 16-bit roundings more, before and behind the norm
GRAPHED = "decode"  # small calls: timed in a graph where there is one


class Shape(NamedTuple):
    """One call. `heads`: num_k_heads, num_v_heads, head_k_dim, head_v_dim; None of a gated convolution, which has `dim`."""

    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int, int, int] | None
    dim: int
    step: bool = False
    backward: bool = False
    width: int = WIDTH

    @property
    def tokens(self):
        return sum(self.lengths)

    @property
    def least_bytes(self):
        """What must be read and written, but for windows and parameters."""
        gates = 0 if self.heads is None else self.heads[1] * 2 * (ITEM + 4)
        moved = {False: 2 if self.heads else 4, True: 3 if self.heads else 7}[self.backward]
        return self.tokens * (moved * self.dim * ITEM + gates)


def with_heads(name, lengths, heads, **more):
    hk, hv, k, v = heads
    return Shape(name, lengths, heads, 2 * hk * k + hv * v, **more)


def shapes(small=False):
    """Every shape, as {group/name: Shape}."""
    sizes = {"d2048": (4, 8, 128, 128), "d8192": (16, 32, 128, 128), "d12288": (32, 32, 128, 128)}
    rows, batches, hidden = (2048,) * 8, (1, 32, 256), 2048
    if small:
        sizes, rows, batches, hidden = {"d64": (1, 2, 16, 16)}, (7, 7), (3,), 32
    found = [with_heads(f"prefill/{name}", rows, heads) for name, heads in sizes.items()]
    found += [
        with_heads(f"decode/b{batch}-{name}", (1,) * batch, heads, step=True)
        for name, heads in list(sizes.items())[:2]
        for batch in batches
    ]
    found += [
        Shape(f"lfm2/prefill-d{hidden}", rows, None, hidden, width=3),
        Shape(f"lfm2/decode-b{batches[-1]}-d{hidden}", (1,) * batches[-1], None, hidden, step=True, width=3),
    ]
    found += [
        with_heads(f"backward/{name}", rows, heads, backward=True) for name, heads in list(sizes.items())[:2]
    ]
    found.append(Shape(f"backward/lfm2-d{hidden}", rows, None, hidden, backward=True, width=3))
    return {shape.name: shape for shape in found}


def select(groups, small=False):
    """The shapes of some groups, or all.

    Raises:
      ValueError: a group that is none.
    """
    known = shapes(small)
    names = sorted({name.partition("/")[0] for name in known})
    if wrong := sorted(set(groups) - set(names)):
        raise ValueError(f"groups: expected some of {names}, got {wrong[0]!r}")
    return [shape for name, shape in known.items() if not groups or name.partition("/")[0] in groups]


def options_of(shape):
    """Keywords of our operation."""
    if shape.heads is None:
        return {}
    names = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
    return dict(zip(names, shape.heads, strict=True))


def torch_side(shape):
    """(backend, {name: call}, {peer: why it is missing}, function that restores the pool) of a shape.

    Every call but the copy returns results to compare.
    """
    import torch
    import torch.nn.functional as F

    import triton_impl
    from benchmarks.torch_backend import ENGINES, TorchBackend, import_peer

    backend = TorchBackend()
    device, generator = backend.device, torch.Generator(backend.device).manual_seed(0)
    heads, options, batch = shape.heads, options_of(shape), len(shape.lengths)
    channels = shape.dim if heads else 3 * shape.dim

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, device=device).bfloat16()

    x, weight = normal(shape.tokens, channels), normal(shape.dim, shape.width)
    pool = normal(batch, shape.width - 1, shape.dim)
    starts = torch.tensor([0, *shape.lengths], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    has = torch.ones(batch, dtype=torch.bool, device=device)
    gates = {}
    if heads:
        gates = {name: normal(shape.tokens, heads[1]) for name in "ab"}
        gates |= {name: normal(heads[1]).float() for name in ("A_log", "dt_bias")}

    def plain(u, activation="silu", **more):
        if shape.step:
            return triton_impl.causal_conv1d_update(u, weight, None, pool, activation=activation, **more).out
        return triton_impl.causal_conv1d_fn(
            u,
            weight,
            None,
            pool,
            starts,
            None,
            has,
            activation=activation,
            max_seqlen=max(shape.lengths),
            **more,
        ).out

    def behind(q, k, v):
        """The framework's norm and gates of parts [tokens, channels]."""
        hk, hv, size, value = heads
        wide = [p.float().view(-1, hk, size) for p in (q, k)]
        q, k = ((p * torch.rsqrt((p * p).sum(-1, keepdim=True) + 1e-6)).bfloat16() for p in wide)
        g = -gates["A_log"].exp() * F.softplus(gates["a"].float() + gates["dt_bias"])
        return q, k, v.view(-1, hv, value), g, gates["b"].float().sigmoid()

    def sizes():
        hk, hv, size, value = heads
        return hk * size, hk * size, hv * value

    def separate():
        if heads:
            return behind(*plain(x, split_sizes=sizes()))
        b, c, own = x.chunk(3, -1)
        return (c * plain(b * own, None),)

    def ours():
        if heads is None:
            step, fn = triton_impl.gated_short_conv_update, triton_impl.gated_short_conv_fn
        else:
            step, fn = triton_impl.gated_delta_prologue_update, triton_impl.gated_delta_prologue_fn
        if shape.step:
            return step(x, weight, None, pool, **options, **gates)[:-1]
        longest = max(shape.lengths)
        return fn(x, weight, None, pool, starts, None, has, max_seqlen=longest, **options, **gates)[:-1]

    source = torch.empty(shape.least_bytes // 4, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    calls = {"ours": ours, "separate": separate}
    if shape.backward:
        calls = _torch_backward(shape, x, weight, starts, options, gates, behind, sizes)
    calls["copy"] = lambda: target.copy_(source)
    absent = {}
    for name, modules in {**ENGINES, "fla": ("fla.modules.convolution",)}.items():
        if shape.backward or heads is None:
            continue
        try:
            ops = import_peer(*modules)
        except Missing as error:
            absent[name] = f"missing: {error}"
            continue
        calls[name] = _torch_peer(name, ops, shape, x, weight, pool, starts, has, behind, sizes)
    first = pool.clone()
    return backend, calls, absent, lambda: pool.copy_(first)


def _torch_peer(name, ops, shape, x, weight, pool, starts, has, behind, sizes):
    """A peer's convolution with the framework's norm and gates behind."""
    import torch

    slots = torch.arange(len(shape.lengths), device=x.device, dtype=torch.int32)
    states = pool.transpose(1, 2)

    def call():
        if name == "fla":
            out = ops.causal_conv1d(x[None], weight, None, activation="silu", cu_seqlens=starts.long())[0][0]
        elif shape.step:
            out = ops.causal_conv1d_update(
                x, states, weight, None, activation="silu", conv_state_indices=slots
            )
        else:
            out = ops.causal_conv1d_fn(
                x.t(),
                weight,
                None,
                states,
                starts,
                *([list(shape.lengths)] if name == "sglang" else ()),
                cache_indices=slots,
                has_initial_state=has,
                activation="silu",
            ).t()
        return behind(*out.split(sizes(), -1))

    return call


def _torch_backward(shape, x, weight, starts, options, gates, behind, sizes):
    """The backward pass of the differentiable form, and of the plain one with autograd's norm behind."""
    import torch

    import triton_impl

    leaves = [t.clone().requires_grad_() for t in (x, weight, *gates.values())]

    def packed(x, weight, *rest):
        given = dict(query_start_loc=starts, max_seqlen=max(shape.lengths))
        if shape.heads is None:
            return triton_impl.gated_short_conv(x, weight, **given)[:1]
        return triton_impl.gated_delta_prologue(
            x, weight, **given, **options, **dict(zip(gates, rest, strict=True))
        )[:5]

    def apart(x, weight, *rest):
        given = dict(query_start_loc=starts, max_seqlen=max(shape.lengths))
        if shape.heads is None:
            b, c, own = x.chunk(3, -1)
            return (c * triton_impl.causal_conv1d(b * own, weight, **given).out,)
        gates.update(zip(gates, rest, strict=True))
        y = triton_impl.causal_conv1d(x, weight, activation="silu", **given).out
        return behind(*y.split(sizes(), -1))

    def gradients(forward):
        results = forward(*leaves)
        upstream = [torch.ones_like(part) for part in results]
        return lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True)

    return {"ours": gradients(packed), "separate": gradients(apart)}


def jax_side(shape):
    """The same in JAX."""
    import jax
    import jax.numpy as jnp

    import pallas_impl
    from benchmarks.jax_backend import JaxBackend

    backend, keys = JaxBackend(), iter(jax.random.split(jax.random.key(0), 9))
    heads, options, batch = shape.heads, options_of(shape), len(shape.lengths)

    def normal(*sizes):
        return jax.random.normal(next(keys), sizes, jnp.bfloat16)

    arrays = {
        "x": normal(shape.tokens, shape.dim if heads else 3 * shape.dim),
        "weight": normal(shape.dim, shape.width),
        "pool": normal(batch, shape.width - 1, shape.dim),
    }
    gates = {}
    if heads:
        gates = {name: normal(shape.tokens, heads[1]) for name in "ab"}
        gates |= {name: normal(heads[1]).astype(jnp.float32) for name in ("A_log", "dt_bias")}
    starts = jnp.cumsum(jnp.array([0, *shape.lengths])).astype(jnp.int32)
    has, longest = jnp.ones(batch, bool), max(shape.lengths)

    def run(kind, x, weight, pool, **more):
        if shape.step:
            return getattr(pallas_impl, f"{kind}_update")(x, weight, None, pool, **more)
        fn = getattr(pallas_impl, f"{kind}_fn")
        return fn(x, weight, None, pool, starts, None, has, max_seqlen=longest, **more)

    def ours(x, weight, pool, gates):
        return run(
            "gated_delta_prologue" if heads else "gated_short_conv", x, weight, pool, **options, **gates
        )[:-1]

    def separate(x, weight, pool, gates, conv=None):
        conv = conv or (
            lambda u, activation: run("causal_conv1d", u, weight, pool, activation=activation).out
        )
        if heads is None:
            b, c, own = jnp.split(x, 3, -1)
            return (c * conv(b * own, None),)
        hk, hv, size, value = heads
        q, k, v = jnp.split(conv(x, "silu"), (hk * size, 2 * hk * size), -1)
        wide = [part.astype(jnp.float32).reshape(-1, hk, size) for part in (q, k)]
        q, k = ((p * jax.lax.rsqrt((p * p).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype) for p in wide)
        g = -jnp.exp(gates["A_log"]) * jax.nn.softplus(gates["a"].astype(jnp.float32) + gates["dt_bias"])
        return q, k, v.reshape(-1, hv, value), g, jax.nn.sigmoid(gates["b"].astype(jnp.float32))

    def form(x, weight, pool, gates):
        given = dict(query_start_loc=starts, max_seqlen=longest)
        if heads is None:
            return pallas_impl.gated_short_conv(x, weight, **given)[:1]
        return pallas_impl.gated_delta_prologue(x, weight, **given, **options, **gates)[:5]

    def apart(x, weight, pool, gates):
        def conv(u, activation):
            return pallas_impl.causal_conv1d(
                u, weight, query_start_loc=starts, max_seqlen=longest, activation=activation
            ).out

        return separate(x, weight, pool, gates, conv)

    def timed(function):
        program = jax.jit(function)
        return lambda: backend.remember(program(**arrays, gates=gates))

    def gradients(forward):
        """What is kept for it, and the upstream gradients, are there when the program begins."""
        over = jax.jit(
            lambda x, weight, gates: jax.vjp(
                lambda *leaves: forward(*leaves[:2], arrays["pool"], leaves[2]), x, weight, gates
            )
        )
        results, back = over(arrays["x"], arrays["weight"], gates)
        upstream = jax.tree.map(jnp.ones_like, results)
        program = jax.jit(lambda back, upstream: back(upstream))
        return lambda: backend.remember(program(back, upstream))

    calls = {"ours": timed(ours), "separate": timed(separate)}
    if shape.backward:
        calls = {"ours": gradients(form), "separate": gradients(apart)}
    source, copy = jnp.zeros(shape.least_bytes // 4, jnp.bfloat16), jax.jit(jnp.copy)
    calls["copy"] = lambda: backend.remember(copy(source))
    absent = {}
    if heads and not shape.step and not shape.backward:
        try:
            dense = _dense_peer(shape, arrays["weight"])
        except ImportError as error:
            absent["jax-linear-attention"] = f"missing: {error}"
        else:
            calls["jax-linear-attention"] = timed(
                lambda x, weight, pool, gates: separate(x, weight, pool, gates, lambda u, _: dense(u, pool))
            )
    return backend, calls, absent, lambda: None


def _dense_peer(shape, weight):
    """jax-linear-attention's convolution of rows of equal length, a function of x and their windows."""
    import equinox
    from jla.layers.conv import ShortConv

    layer = ShortConv(shape.dim, shape.width, activation="silu", use_bias=False, axis=None)
    layer = equinox.tree_at(lambda conv: conv.weight, layer, weight)
    rows = len(shape.lengths), max(shape.lengths), shape.dim
    return lambda x, pool: layer(x.reshape(rows), state=pool)[0].reshape(x.shape)


def differences(ours, separate):
    """Why results are not those of the separate chain; None if they are. Sizes are about 1, but of gradients and v."""
    import numpy as np

    for i, (got, want) in enumerate(zip(ours, separate, strict=True)):
        got, want = (np.asarray(part, np.float32).reshape(-1) for part in (got, want))
        allowed = TOLERANCE * np.maximum(np.abs(want), np.sqrt(np.mean(want * want)))
        if not np.all(np.abs(got - want) <= allowed):
            return f"result {i}: off by up to {np.max(np.abs(got - want)):.3g}"
    return None


def on_host(results):
    """Results as NumPy arrays of float32."""
    return [part.detach().float().cpu().numpy() if hasattr(part, "detach") else part for part in results]


def measure(framework, shape, samples):
    """(device, {name: Timing}, {name: why it has no time}, why nothing has)."""
    backend, calls, absent, reset = (torch_side if framework == "torch" else jax_side)(shape)
    reset()
    compared = slice(1 if shape.backward else None)  # of gradients that of x
    wanted = on_host(calls["separate"]()[compared])
    for name in [name for name in calls if name not in ("separate", "copy")]:
        reset()  # a call leaves a state, and all are to meet the same
        reason = differences(on_host(calls[name]()[compared]), wanted)
        if reason:
            absent[name] = f"wrong: {reason}"
            del calls[name]
    if "ours" not in calls:
        return backend.device_name, {}, absent, absent["ours"]
    taken, failed = {}, {}
    if backend.is_gpu and framework == "torch" and shape.step:
        taken, failed = backend.graph({k: Prepared(call, None) for k, call in calls.items()}, 50, samples)
    else:
        timer, _ = backend.timer()
        once = (timer.warm, timer.warm_method) if shape.step else (timer.cold, timer.cold_method)
        taken, failed = take_turns(calls, *once, samples=samples, warmup=3)
        timer.close()
    return backend.device_name, taken, absent | failed, None


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fronts", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("framework", choices=("torch", "jax"))
    parser.add_argument("groups", nargs="*", help="default: all")
    parser.add_argument("--small", action="store_true", help="a few tokens, for a run without a GPU")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file for the times as JSON")
    options = parser.parse_args(argv)
    try:
        chosen = select(options.groups, options.small)
    except ValueError as error:
        parser.error(str(error))
    rows, code, device = {}, 0, None
    for shape in chosen:
        device, taken, absent, wrong = measure(options.framework, shape, options.samples)
        code |= wrong is not None
        copy = taken["copy"].median if "copy" in taken else None
        for name, timing in taken.items():
            print(f"{shape.name:28} {name:22} {timing.median:9.2f} us  {timing.median / copy:6.3f} of a copy")
        for name, reason in absent.items():
            print(f"{shape.name:28} {name:22} no time: {reason[:160]}")
        rows[shape.name] = {
            "samples": {name: timing.samples for name, timing in taken.items()},
            "method": {name: timing.method for name, timing in taken.items()},
            "failed": absent,
        }
    if options.out:
        record = {**environment.describe(), "device": device, "framework": options.framework, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
