"""A serving loop in small: requests arrive, prefill in chunks, decode together and hand their slots on.

    python examples/jax_serving.py [--requests 40] [--slots 8] [--budget 48] [--peers]

The model is one Gated-DeltaNet-like layer between an embedding and a head: projection, causal convolution with SiLU over
q, k and v, gated delta rule, projection. Two programs serve everything, whatever the lengths: `mixed` packs chunks of
waiting prompts and one token of each running request into one `causal_conv1d_fn`, `decode` runs a step that only decodes
through `causal_conv1d_update`. The caches are donated, so they stay where they are; batches are padded; slots without an
owner hold NaN.

At the end each request runs again alone, unchunked, in a pool of one slot: its logits must be the same bits. That is
asked of the convolution and the scheduling only, so the rest of the model is made exact: projections multiply values on
a grid so coarse that no order of a sum rounds, and the recurrence runs token by token.

With `--peers` it then times, on a GPU, the same convolution written for XLA in three ways.
"""

import argparse
import functools
import random
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_impl import causal_conv1d_fn, causal_conv1d_update

VOCAB, HIDDEN, HEADS, HEAD_DIM, WIDTH = 96, 64, 4, 8, 4
INNER = HEADS * HEAD_DIM
GRID = (
    16.0  # weights and hidden values are multiples of 1/16, at most 4: sums of 64 products fit into float32
)


class Caches(NamedTuple):
    """The states of all requests, by slot: conv [slots, width-1, 3 * INNER], delta [slots, HEADS, HEAD_DIM, HEAD_DIM]."""

    conv: jax.Array
    delta: jax.Array


def empty_caches(slots, dtype=jnp.bfloat16):
    return Caches(
        jnp.full((slots, WIDTH - 1, 3 * INNER), jnp.nan, dtype),
        jnp.full((slots, HEADS, HEAD_DIM, HEAD_DIM), jnp.nan),
    )


def to_grid(value):
    return jnp.clip(jnp.round(value * GRID), -4 * GRID, 4 * GRID) / GRID


def make_model(seed=0, dtype=jnp.bfloat16):
    """The parameters: embedding, projections and head on the grid, the convolution's weight and bias in `dtype`."""
    keys = jax.random.split(jax.random.key(seed), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape)  # noqa: E731
    return dict(
        embedding=to_grid(normal(keys[0], VOCAB, HIDDEN)),
        project_in=to_grid(normal(keys[1], HIDDEN, 3 * INNER + 2 * HEADS) * 0.3),
        project_out=to_grid(normal(keys[2], INNER, HIDDEN) * 0.5),
        head=to_grid(normal(keys[3], HIDDEN, VOCAB) * 0.3),
        weight=(normal(keys[4], 3 * INNER, WIDTH) * 0.5).astype(dtype),
        bias=(normal(keys[5], 3 * INNER) * 0.5).astype(dtype),
    )


multiply = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def gate(value):
    """A sigmoid made of correctly rounded operations only."""
    return 0.5 + 0.5 * value / (1 + jnp.abs(value))


def delta_rule(state, q, k, v, decay, beta):
    """One token of the gated delta rule, without a reduction whose order a compiler chooses."""
    norm = jnp.sqrt(sum(k[:, i] * k[:, i] for i in range(HEAD_DIM)))[:, None] + 1.0
    q, k = q / norm, k / norm
    state = decay[:, None, None] * state
    seen = sum(k[:, i, None] * state[:, i] for i in range(HEAD_DIM))
    state = state + k[:, :, None] * (beta[:, None] * (v - seen))[:, None, :]
    return state, sum(q[:, i, None] * state[:, i] for i in range(HEAD_DIM))


def recur(delta, qkv, gates, starts, slots, continues):
    """The gated delta rule over packed rows, token by token; returns (outputs [tokens, INNER], delta)."""
    tokens = qkv.shape[0]
    token = jnp.arange(tokens)
    row = jnp.minimum(jnp.searchsorted(starts[1:], token, side="right"), slots.shape[0] - 1)
    live = (token < starts[-1]) & (slots[row] >= 0)
    fresh = (token == starts[row]) & ~continues[row]
    q, k, v = jnp.moveaxis(qkv.reshape(tokens, 3, HEADS, HEAD_DIM), 1, 0).astype(jnp.float32)
    decay, beta = gate(gates[:, :HEADS] + 2), gate(gates[:, HEADS:])

    def step(delta, inputs):
        slot, live, fresh, *rest = inputs
        old = delta[slot]
        state, out = delta_rule(jnp.where(fresh, 0.0, old), *rest)
        return delta.at[slot].set(jnp.where(live, state, old)), out.reshape(INNER)

    inputs = (jnp.maximum(slots[row], 0), live, fresh, q, k, v, decay, beta)
    delta, out = lax.scan(step, delta, inputs)
    return out, delta


def project(model, tokens, dtype):
    mixed = multiply(model["embedding"][tokens], model["project_in"])
    return mixed[:, : 3 * INNER].astype(dtype), mixed[:, 3 * INNER :]


def logits_of(model, hidden):
    return multiply(to_grid(multiply(to_grid(hidden), model["project_out"])), model["head"])


def choose(logits):
    return jnp.argmax(logits, axis=1)  # the first of equals


@functools.partial(jax.jit, donate_argnames="caches")
def mixed(model, caches, tokens, starts, slots, continues):
    """Chunks of prompts and single tokens, packed.

    Args:
      model: from `make_model`.
      caches: donated.
      tokens: [budget] int32; starts: [rows+1]; slots: [rows], -1 for padding; continues: [rows] bool, whether the
        slot holds the state of the request's earlier tokens.

    Returns:
      (tokens chosen after each row's last one [rows], their logits [rows, VOCAB], caches)
    """
    qkv, gates = project(model, tokens, model["weight"].dtype)
    qkv, conv = causal_conv1d_fn(
        qkv, model["weight"], model["bias"], caches.conv, starts, slots, continues, activation="silu"
    )
    out, delta = recur(caches.delta, qkv, gates, starts, slots, continues)
    logits = logits_of(model, out[jnp.maximum(starts[1:] - 1, 0)])
    return choose(logits), logits, Caches(conv, delta)


@functools.partial(jax.jit, donate_argnames="caches")
def decode(model, caches, tokens, slots):
    """One token for each row, [rows]; else as `mixed`."""
    qkv, gates = project(model, tokens, model["weight"].dtype)
    qkv, conv = causal_conv1d_update(
        qkv, model["weight"], model["bias"], caches.conv, slots, activation="silu"
    )
    starts = jnp.arange(slots.shape[0] + 1)
    out, delta = recur(caches.delta, qkv, gates, starts, slots, jnp.ones(slots.shape, bool))
    logits = logits_of(model, out)
    return choose(logits), logits, Caches(conv, delta)


@functools.partial(jax.jit, donate_argnames="caches")
def poison(caches, slot):
    """NaN in a slot that nobody owns: a read of it would be seen."""
    return Caches(caches.conv.at[slot].set(jnp.nan), caches.delta.at[slot].set(jnp.nan))


@dataclass
class Request:
    """A prompt and how much to generate; what has come of it so far."""

    arrival: int
    prompt: list[int]
    new_tokens: int
    slot: int | None = None
    done: int = 0  # tokens in the caches
    generated: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    def take(self, budget):
        """The next tokens to run: a chunk of the prompt, or the last generated token."""
        if self.done < len(self.prompt):
            return self.prompt[self.done : self.done + budget]
        return self.generated[-1:]


def run_step(model, caches, batch, rows, budget):
    """Packs `batch`, a list of (request, tokens), into padded arrays and runs one program."""
    slots = np.full(rows, -1, np.int32)
    slots[: len(batch)] = [request.slot for request, _ in batch]
    if all(len(chunk) == 1 and request.done for request, chunk in batch):
        tokens = np.zeros(rows, np.int32)
        tokens[: len(batch)] = [chunk[0] for _, chunk in batch]
        return decode(model, caches, tokens, slots)
    tokens = np.zeros(budget, np.int32)
    packed = [token for _, chunk in batch for token in chunk]
    tokens[: len(packed)] = packed
    lengths = np.zeros(rows, np.int32)
    lengths[: len(batch)] = [len(chunk) for _, chunk in batch]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    continues = np.zeros(rows, bool)
    continues[: len(batch)] = [request.done > 0 for request, _ in batch]
    return mixed(model, caches, tokens, starts, slots, continues)


def serve(model, requests, slots, budget):
    """Runs all requests to their end; returns {"steps", "tokens", "most_rows", "reused"}.

    Args:
      slots: requests in flight at most, and rows of every batch.
      budget: tokens a step at most, at least `slots`.
    """
    caches = empty_caches(slots, model["weight"].dtype)
    waiting, running, free = sorted(requests, key=lambda request: request.arrival), [], list(range(slots))
    owners, figures = set(), {"steps": 0, "tokens": 0, "most_rows": 0, "reused": 0}
    while waiting or running:
        while waiting and waiting[0].arrival <= figures["steps"] and free:
            request = waiting.pop(0)
            request.slot = free.pop(0)
            figures["reused"] += request.slot in owners
            owners.add(request.slot)
            running.append(request)
        batch, left = [], budget
        for request in sorted(
            running, key=lambda request: request.done < len(request.prompt)
        ):  # decodes first
            chunk = request.take(left)
            if chunk and left:
                batch.append((request, chunk))
                left -= len(chunk)
        if batch:
            chosen, logits, caches = run_step(model, caches, batch, slots, budget)
            chosen, logits = np.asarray(chosen).tolist(), np.asarray(logits)
            for row, (request, chunk) in enumerate(batch):
                request.done += len(chunk)
                if request.done >= len(request.prompt):
                    request.generated.append(chosen[row])
                    request.logits.append(logits[row])
                if len(request.generated) == request.new_tokens:
                    caches = poison(caches, request.slot)
                    free.append(request.slot)
                    running.remove(request)
        figures["steps"] += 1
        figures["tokens"] += budget - left
        figures["most_rows"] = max(figures["most_rows"], len(batch))
    return figures


def workload(count, seed=0):
    """Requests with prompts of 1 to 60 tokens that arrive a few at a time."""
    draw = random.Random(seed)
    return [
        Request(
            arrival=draw.randrange(count),
            prompt=[draw.randrange(VOCAB) for _ in range(draw.choice((1, 2, 5, 17, 33, 60)))],
            new_tokens=draw.randint(1, 12),
        )
        for _ in range(count)
    ]


# The convolution as XLA gets it elsewhere: packed rows, each from its window; (out, new windows) in float32 sums.


def gathered(x, weight, bias, windows, starts):
    """A [tokens, width, dim] gather of every token's window, then one contraction, as serving code for TPUs has it."""
    taps = weight.shape[1]
    source, row, position = _sources(x, taps, starts)
    entry = jnp.clip(position[:, None] + jnp.arange(taps), 0, taps - 2)
    values = jnp.where(
        (source >= starts[row][:, None])[:, :, None], x[jnp.maximum(source, 0)], windows[row[:, None], entry]
    )
    out = jnp.einsum("tkd,dk->td", values, weight, preferred_element_type=jnp.float32) + bias
    return jax.nn.silu(out).astype(x.dtype), _last(x, windows, starts)


def shifted(x, weight, bias, windows, starts):
    """One shifted copy of x a tap, added up; the first tokens of each row from its window."""
    taps = weight.shape[1]
    source, row, position = _sources(x, taps, starts)
    out = jnp.zeros(x.shape, jnp.float32) + bias
    for j in range(taps):
        value = jnp.pad(x, ((taps - 1 - j, 0), (0, 0)))[: x.shape[0]]
        entry = jnp.clip(position + j, 0, taps - 2)
        value = jnp.where((source[:, j] >= starts[row])[:, None], value, windows[row, entry])
        out += weight[:, j].astype(jnp.float32) * value
    return jax.nn.silu(out).astype(x.dtype), _last(x, windows, starts)


def convolved(x, weight, bias, windows, starts):
    """`lax.conv_general_dilated` over rows of one length, [batch, tokens, dim] with the windows in front."""
    batch, dim, taps = windows.shape[0], *weight.shape
    rows = jnp.concatenate([windows, x.reshape(batch, -1, dim)], axis=1)
    out = lax.conv_general_dilated(
        rows, weight.T[:, None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=dim,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jax.nn.silu(out + bias).astype(x.dtype).reshape(x.shape), rows[:, 1 - taps :]


def _sources(x, taps, starts):
    token = jnp.arange(x.shape[0])
    row = jnp.searchsorted(starts[1:], token, side="right")
    return token[:, None] + jnp.arange(1 - taps, 1), row, token - starts[row]


def _last(x, windows, starts):
    history = windows.shape[1]
    source = starts[1:, None] + jnp.arange(-history, 0)
    old = jnp.clip(source - starts[:-1, None] + history, 0, history - 1)
    kept = jnp.take_along_axis(windows, old[:, :, None], axis=1)
    return jnp.where((source >= starts[:-1, None])[:, :, None], x[jnp.maximum(source, 0)], kept)


def ours(x, weight, bias, windows, starts):
    every = jnp.ones(windows.shape[:1], bool)
    return tuple(causal_conv1d_fn(x, weight, bias, windows, starts, None, every, activation="silu"))


def peers(batch, seqlen, dim, repeats=30):
    """Times all of them on one packed batch of equal rows; returns {name: (seconds a call, result)}."""
    keys = jax.random.split(jax.random.key(0), 4)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)  # noqa: E731
    arguments = (
        normal(keys[0], batch * seqlen, dim),
        normal(keys[1], dim, WIDTH),
        normal(keys[2], dim),
        normal(keys[3], batch, WIDTH - 1, dim),
        jnp.arange(batch + 1, dtype=jnp.int32) * seqlen,
    )
    timed = {}
    for function in (ours, gathered, shifted, convolved):
        call = jax.jit(function)
        result = jax.block_until_ready(call(*arguments))
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(10):  # the device is busy while the host queues
                last = call(*arguments)
            jax.block_until_ready(last)
            seconds.append((time.perf_counter() - begin) / 10)
        timed[function.__name__] = sorted(seconds)[repeats // 2], result
    return timed


def positive(text):
    """A count of an option: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv=None):
    """Serves, prints what it took, and returns the number of requests that differ from a run of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--requests", type=positive, default=40)
    parser.add_argument("--slots", type=positive, default=8)
    parser.add_argument("--budget", type=positive, default=48, help="tokens a step")
    parser.add_argument("--peers", action="store_true", help="time the convolution against XLA's, on a GPU")
    options = parser.parse_args(argv)
    if options.budget < options.slots:
        parser.error(f"--budget: expected at least --slots {options.slots}, got {options.budget}")
    if options.peers and jax.default_backend() != "gpu":
        parser.error(f"--peers: expected a GPU, got {jax.default_backend()}")

    model = make_model(dtype=jnp.dtype(options.dtype))
    requests = workload(options.requests)
    begin = time.perf_counter()
    figures = serve(model, requests, options.slots, options.budget)
    seconds = time.perf_counter() - begin
    print(
        f"{options.requests} requests through {options.slots} slots on {jax.default_backend()}: {figures['steps']} steps, "
        f"up to {figures['most_rows']} rows a step, {figures['reused']} slots reused, "
        f"{figures['tokens']} tokens, {figures['tokens'] / seconds:.0f} tokens/s with compilation"
    )

    different = 0
    for request in requests:
        alone = Request(0, request.prompt, request.new_tokens)
        serve(model, [alone], slots=1, budget=60)
        same = np.array_equal(np.stack(alone.logits), np.stack(request.logits))
        different += not (same and alone.generated == request.generated)
    verdict = "every logit is the same bits" if not different else f"{different} requests DIFFER"
    print(f"against one request at a time, unchunked: {verdict}")

    if options.peers:
        for batch, seqlen, dim in ((8, 2048, 8192), (64, 128, 8192), (1, 32768, 2048)):
            timed = peers(batch, seqlen, dim)
            base = timed["ours"][0]
            line = ", ".join(f"{name} {t * 1e6:.0f} us ({t / base:.2f})" for name, (t, _) in timed.items())
            print(f"{batch} x {seqlen} tokens, dim {dim}: {line}")
    return different


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
