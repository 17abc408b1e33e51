"""A serving loop in small: requests arrive, prefill in chunks, decode together and hand their slots on.

    python examples/torch_serving.py [--device cuda] [--requests 40] [--slots 8] [--budget 48]

The model is one Gated-DeltaNet-like layer between an embedding and a head: projection, causal convolution with SiLU
over q, k and v, gated delta rule, projection. Every step packs a chunk of waiting prompts and one token of each running
request into a single `prefill` call; a step that only decodes is a `step` call. Batches are padded, as for a captured
graph, and slots without an owner hold NaN.

At the end each request runs again alone, unchunked, in a pool of one slot: its logits must be the same bits. That is
asked of the convolution and the scheduling only, so the rest of the model is made exact: projections multiply values
on a grid in float64, where no order of a sum rounds, and the recurrence is written in element-wise steps.
"""

import argparse
import itertools
import random
import time
from dataclasses import dataclass, field

import torch

from triton_impl.modules import CausalConv1d, ConvStatePool

VOCAB, HIDDEN, HEADS, HEAD_DIM, WIDTH = 96, 64, 4, 8, 4
INNER = HEADS * HEAD_DIM
GRID = 64.0  # weights and hidden values are multiples of 1/64


def to_grid(value):
    return (value * GRID).round().clamp(-8 * GRID, 8 * GRID) / GRID


def gate(value):
    """A sigmoid made of correctly rounded operations only."""
    return 0.5 + 0.5 * value / (1 + value.abs())


class Model:
    """Embedding, one gated delta layer, head; holds no state of any request."""

    def __init__(self, device, dtype, seed=0):
        source = torch.Generator().manual_seed(seed)

        def weight(*shape, scale):
            return to_grid(torch.randn(*shape, generator=source, dtype=torch.float64) * scale).to(device)

        self.embedding = weight(VOCAB, HIDDEN, scale=1.0)
        self.project_in = weight(HIDDEN, 3 * INNER + 2 * HEADS, scale=0.3)
        self.project_out = weight(INNER, HIDDEN, scale=0.5)
        self.head = weight(HIDDEN, VOCAB, scale=0.3)
        self.conv = CausalConv1d(3 * INNER, WIDTH, dtype=dtype, device=device).requires_grad_(False)
        for parameter in self.conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.5)

    def forward(self, tokens, lengths, caches, slots, continues):
        """Logits [rows, VOCAB] behind each row's last token; the conv and delta states of `slots` move on.

        Args:
          tokens: host list, the rows' tokens one row after the other.
          lengths: host list, tokens of each row, each at least 1.
          caches: a Caches.
          slots: host list, one slot a row.
          continues: host list: whether the row's slot holds the state of its earlier tokens.
        """
        device, rows = self.head.device, len(lengths)
        hidden = self.embedding[torch.tensor(tokens, device=device)]
        mixed = hidden @ self.project_in
        qkv, decay, beta = mixed.split([3 * INNER, HEADS, HEADS], dim=1)
        convolved = self._convolve(qkv, lengths, caches.conv, slots, continues)
        q, k, v = convolved.float().view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        decay, beta = gate(decay.float() + 2)[..., None, None], gate(beta.float())[..., None]

        lengths_on_host = torch.tensor(lengths)
        starts = torch.tensor([0, *itertools.accumulate(lengths[:-1])], device=device)
        where = torch.tensor(slots, device=device)
        state = torch.where(
            torch.tensor(continues, device=device)[:, None, None, None], caches.delta[where], 0.0
        )
        last = torch.empty(rows, INNER, device=device)
        for t in range(max(lengths)):
            here = (lengths_on_host > t).nonzero().squeeze(1).to(device)
            token = starts[here] + t
            state[here], out = delta_step(
                state[here], q[token], k[token], v[token], decay[token], beta[token]
            )
            last[here] = out.flatten(1)
        caches.delta[where] = state
        return to_grid(to_grid(last.double()) @ self.project_out) @ self.head

    def _convolve(self, x, lengths, pool, slots, continues):
        """One padded call for all rows: rows of the padding slot at the end, unused tokens behind the last row."""
        device, tokens, rows = x.device, x.shape[0], len(lengths)
        padded_rows = -(-rows // 4) * 4
        indices = pool.indices(slots, batch=padded_rows)
        if max(lengths) == 1 and all(continues):
            padded = torch.full(
                (padded_rows, x.shape[1]), torch.nan, dtype=self.conv.weight.dtype, device=device
            )
            padded[:rows] = x
            return self.conv.step(padded, pool, indices)[:rows]
        padded = torch.full(
            (-(-tokens // 16) * 16, x.shape[1]), torch.nan, dtype=self.conv.weight.dtype, device=device
        )
        padded[:tokens] = x
        lengths = [*lengths, *[0] * (padded_rows - rows)]
        starts = torch.tensor([0, *itertools.accumulate(lengths)], device=device)
        has = torch.tensor([*continues, *[False] * (padded_rows - rows)], device=device)
        out = self.conv.prefill(padded, starts, pool, indices, has, max_seqlen=max(lengths))
        return out[:tokens]


def delta_step(state, q, k, v, decay, beta):
    """One token of the gated delta rule for each row, without a reduction whose order a library chooses."""
    norm = sum(k[..., i] * k[..., i] for i in range(HEAD_DIM)).sqrt()[..., None] + 1.0
    q, k = q / norm, k / norm
    state = decay * state
    seen = sum(k[..., i, None] * state[..., i, :] for i in range(HEAD_DIM))
    state = state + k[..., None] * (beta * (v - seen))[..., None, :]
    return state, sum(q[..., i, None] * state[..., i, :] for i in range(HEAD_DIM))


class Caches:
    """The states of all requests, by slot. Slots that nobody owns hold NaN."""

    def __init__(self, slots, device, dtype):
        self.conv = ConvStatePool(slots, 3 * INNER, WIDTH, dtype=dtype, device=device)
        self.delta = torch.full((slots, HEADS, HEAD_DIM, HEAD_DIM), torch.nan, device=device)
        self.conv.states.fill_(torch.nan)

    def free(self, slot):
        self.conv.layer()[slot] = torch.nan
        self.delta[slot] = torch.nan
        self.conv.free([slot])


@dataclass
class Request:
    """A prompt and how much to generate; what has come of it so far."""

    arrival: int
    prompt: list[int]
    new_tokens: int
    slot: int | None = None
    done: int = 0  # tokens in the caches
    generated: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def take(self, budget):
        """The next tokens to run: a chunk of the prompt, or the last generated token."""
        if self.done < len(self.prompt):
            return self.prompt[self.done : self.done + budget]
        return self.generated[-1:]


@torch.no_grad()
def serve(model, requests, slots, budget):
    """Runs all requests to their end; returns {"steps", "tokens", "most_rows", "reused"}.

    Args:
      slots: requests in flight at most.
      budget: tokens a step at most.
    """
    caches = Caches(slots, model.head.device, model.conv.weight.dtype)
    waiting, running = sorted(requests, key=lambda request: request.arrival), []
    owners, figures = set(), {"steps": 0, "tokens": 0, "most_rows": 0, "reused": 0}
    while waiting or running:
        while waiting and waiting[0].arrival <= figures["steps"] and caches.conv.num_free:
            request = waiting.pop(0)
            (request.slot,) = caches.conv.allocate()
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
            logits = model.forward(
                [token for _, chunk in batch for token in chunk],
                [len(chunk) for _, chunk in batch],
                caches,
                [request.slot for request, _ in batch],
                [request.done > 0 for request, _ in batch],
            )
            # ties go to the lower token: the logits are multiples of 1/GRID**2
            chosen = (logits - torch.arange(VOCAB, device=logits.device) / GRID**3 / VOCAB).argmax(1).tolist()
            for row, (request, chunk) in enumerate(batch):
                request.done += len(chunk)
                if request.done >= len(request.prompt):
                    request.generated.append(chosen[row])
                    request.logits.append(logits[row])
                if len(request.generated) == request.new_tokens:
                    caches.free(request.slot)
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


def positive(text):
    """A count of an option: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(argv=None):
    """Serves, prints what it took, and returns the number of requests that differ from a run of their own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--requests", type=positive, default=40)
    parser.add_argument("--slots", type=positive, default=8)
    parser.add_argument("--budget", type=positive, default=48, help="tokens a step")
    options = parser.parse_args(argv)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        parser.error(f"--device: expected one that torch has here, got {options.device!r}: {error}")

    model = Model(options.device, getattr(torch, options.dtype))
    requests = workload(options.requests)
    begin = time.perf_counter()
    figures = serve(model, requests, options.slots, options.budget)
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    print(
        f"{options.requests} requests through {options.slots} slots on {options.device}: {figures['steps']} steps, "
        f"up to {figures['most_rows']} rows a step, {figures['reused']} slots reused, "
        f"{figures['tokens']} tokens, {figures['tokens'] / seconds:.0f} tokens/s"
    )

    different = 0
    for request in requests:
        alone = Request(0, request.prompt, request.new_tokens)
        serve(model, [alone], slots=1, budget=len(alone.prompt))
        same = torch.equal(torch.stack(alone.logits), torch.stack(request.logits))
        different += not (same and alone.generated == request.generated)
    verdict = "every logit is the same bits" if not different else f"{different} requests DIFFER"
    print(f"against one request at a time, unchunked: {verdict}")
    return different


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
