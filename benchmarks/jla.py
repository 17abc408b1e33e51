"""Forward and training against jax-linear-attention's Mosaic GPU kernels: `python -m benchmarks.jla [ROW ...] [--out FILE]`.

Dense rows in bfloat16 with bias and silu, as its layers call it: dense, with two documents a row (`segment_ids`), and as the front
of a delta rule layer, where the heads of q and k get an L2 norm behind it. The peer asks for Python 3.12 and JAX 0.11.2:

    pip install --no-deps jax-linear-attention==0.1.0 equinox     (or its wheel on PYTHONPATH)

Contenders: `ours`, `documents as rows` (their offsets are known, as in packed training data), `jla`, and `xla`, shifted multiply-adds.
What a contender gives must be near the same in float32 before it is timed. `jla / ours` is to be 1.1 in every row.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from benchmarks.jax_backend import JaxBackend
from benchmarks.providers import Missing
from benchmarks.timing import take_turns

ACTIVATION, HEAD = "silu", 128
REQUIRED = 1.1
NEAR = (
    2.0**-6
)  # of the largest value: a rounding of bfloat16 of each factor of a gradient, of their sum, and of the result


class Row(NamedTuple):
    """One shape: `form` is "dense", "documents" or "norm" (q and k a quarter of the channels each, v the rest)."""

    form: str
    batch: int
    seqlen: int
    dim: int
    width: int = 4

    @property
    def name(self) -> str:
        return f"{self.form}/{self.batch}x{self.seqlen}-d{self.dim}-w{self.width}"


ROWS = [Row("dense", 8, 2048, dim, width) for dim in (2048, 4096) for width in (2, 3, 4)]
ROWS += [Row("dense", 64, 128, 8192)]
ROWS += [Row("documents", *sizes) for sizes in ((8, 2048, 2048), (8, 2048, 4096), (64, 128, 8192))]
ROWS += [Row("norm", *sizes) for sizes in ((8, 2048, 2048), (8, 2048, 4096), (8, 2048, 8192))]
ROWS = {row.name: row for row in ROWS}


def parts_of(row):
    """Where the channels of q, k and v end, or of all."""
    return [row.dim // 4, row.dim // 2, row.dim] if row.form == "norm" else [row.dim]


def cut(array, row, axis):
    """An array's parts as tuples, of q, k and v or of one."""
    return tuple(jnp.split(array, parts_of(row)[:-1], axis))


def inputs(row):
    """(x, weight, bias, dout) in bfloat16; dout in the parts of the results."""
    keys = jax.random.split(jax.random.key(0), 4)
    tokens = row.batch, row.seqlen, row.dim
    shapes = tokens, (row.dim, row.width), (row.dim,), tokens
    *arrays, dout = (jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))
    return *arrays, cut(dout, row, 2)


def segments(row):
    """[batch, seqlen]: two documents a row, cut at another place in each."""
    at = row.seqlen // 2 + jnp.arange(row.batch, dtype=jnp.int32) % (row.seqlen // 4)
    return (jnp.arange(row.seqlen)[None] >= at[:, None]).astype(jnp.int32)


def contenders(row, backend):
    """{name: f(x, weight, bias)}, which returns a tuple of q, k and v, or of one."""
    from pallas_impl import causal_conv1d, gated_delta_prologue, short_conv

    if row.form == "norm":
        heads = row.dim // 4 // HEAD
        sizes = dict(num_k_heads=heads, num_v_heads=2 * heads, head_k_dim=HEAD, head_v_dim=HEAD)

        def front(backend, x, weight, bias):
            found = gated_delta_prologue(x, weight, bias, **sizes, activation=ACTIVATION, backend=backend)
            return tuple(a.reshape(*x.shape[:2], -1) for a in found[:3])

        return {name: functools.partial(front, which) for name, which in (("ours", backend), ("xla", "xla"))}

    ids = segments(row) if row.form == "documents" else None

    def model(backend, *arrays):
        options = dict(segment_ids=ids, activation=ACTIVATION, want_cache=False, backend=backend)
        return (short_conv(*arrays, **options).out,)

    found = {name: functools.partial(model, which) for name, which in (("ours", backend), ("xla", "xla"))}
    if row.form == "documents":
        begins = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)], constant_values=True).reshape(-1)
        starts = jnp.append(jnp.flatnonzero(begins), begins.size).astype(jnp.int32)

        def packed(x, weight, bias):
            options = dict(activation=ACTIVATION, max_seqlen=row.seqlen, backend=backend)
            out = causal_conv1d(x.reshape(-1, row.dim), weight, bias, None, starts, **options).out
            return (out.reshape(x.shape),)

        found["documents as rows"] = packed
    return found


def peer(row, x, weight, bias):
    """jla's kernels: each argument a tuple of q, k and v, which its layers project apart, or of one."""
    try:
        from jla.ops.mosaic_gpu.short_conv import short_conv
        from jla.ops.mosaic_gpu.short_conv_l2norm import short_conv_l2norm
    except ImportError as error:
        raise Missing(str(error)) from None
    ids = segments(row) if row.form == "documents" else None
    plain = functools.partial(short_conv, activation=True, segment_ids=ids)
    normed = functools.partial(short_conv_l2norm, activation=True, head_dim=HEAD)
    calls = (normed, normed, plain) if row.form == "norm" else (plain,)
    return tuple(call(*part) for call, *part in zip(calls, x, weight, bias, strict=True))


def training(run):
    """The forward pass and its gradients: (outs, dx, dweight, dbias)."""

    def step(x, weight, bias, dout):
        out, back = jax.vjp(run, x, weight, bias)
        return out, *back(dout)

    return step


def judge(found, exact):
    """Why results differ from those in float32, or None; each is an array or a tuple of its parts."""
    for name, got, want in zip(("out", "dx", "dweight", "dbias"), found, exact, strict=True):
        got, want = (
            np.concatenate([np.asarray(part, np.float32) for part in parts], axis=-1 if name in ("out", "dx") else 0)
            for parts in (jax.tree.leaves(got), jax.tree.leaves(want))
        )  # fmt: skip
        off = np.abs(got - want).max() / np.abs(want).max()
        if not off <= NEAR:
            return f"wrong: {name} is {off:.2g} of its largest value off"
    return None


def prepare(row, backend, kernels):
    """({name: call} of forward and of training, {name: why it has no time})."""
    whole = inputs(row)
    apart = *(cut(a, row, axis) for a, axis in zip(whole, (2, 0, 0), strict=False)), whole[3]
    calls, absent, runs = {}, {}, contenders(row, kernels)
    exact = jax.jit(training(runs["xla"]))(*jax.tree.map(lambda a: a.astype(jnp.float32), whole))
    for name, run in (runs | {"jla": functools.partial(peer, row)}).items():
        arrays = apart if name == "jla" else whole
        try:
            forward, step = jax.jit(run), jax.jit(training(run))
            reason = judge((forward(*arrays[:3]), *step(*arrays)[1:]), exact)
        except Exception as error:  # a peer's, of any kind: it gets no time, and the others do
            reason = f"{type(error).__name__}: {error}"
        if reason:
            absent[name] = reason
            continue
        calls[f"{name}, forward"] = functools.partial(_call, backend, forward, arrays[:3])
        calls[f"{name}, training"] = functools.partial(_call, backend, step, arrays)
    return calls, absent


def _call(backend, run, arrays):
    return backend.remember(run(*arrays))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jla", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, help="file for the times as JSON")
    parser.add_argument("--samples", type=int, default=15)
    options = parser.parse_args(argv)
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"ROW: expected some of {list(ROWS)}, got {sorted(unknown)}")
    backend = JaxBackend()
    kernels = "auto" if backend.is_gpu else "xla"  # what a caller gets who names none
    timer, notes = backend.timer()
    record = {**environment.describe(), **backend.versions(), "device": backend.device_name, "rows": {}}
    print(f"{backend.device_name}, {timer.warm_method}", *notes, sep="; ")
    wrong = False
    for name in options.rows or ROWS:
        calls, absent = prepare(ROWS[name], backend, kernels)
        taken, failed = take_turns(calls, timer.warm, timer.warm_method, samples=options.samples, warmup=3)
        times = {call: timing.median for call, timing in taken.items()}
        wrong |= bool(failed) or any(one.startswith("wrong") for one in absent.values()) or "ours" in absent
        record["rows"][name] = {
            "samples": {call: timing.samples for call, timing in taken.items()},
            "failed": absent | failed,
        }
        for call, microseconds in times.items():
            ours = times.get(f"ours, {call.rpartition(', ')[2]}")
            line = f"{name:28} {call:28} {microseconds:9.2f} us {microseconds / ours if ours else 0:7.3f} of ours"
            if call.startswith("jla"):
                line += (
                    f", required {REQUIRED}: {'met' if ours and microseconds >= REQUIRED * ours else 'MISS'}"
                )
            print(line)
        for call, reason in (absent | failed).items():
            print(f"{name:28} {call:28} no time: {reason[:200]}")
    timer.close()
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
