"""A simulated serving engine: random traffic through one pool, and every request ends with its own plain run's bits.

    python -m oracle engine --impl package.module:adapter --steps 2000

Requests arrive, find prefixes in a cache of block snapshots, are prefilled in chunks, decode, verify drafts in four
ways (rolling slots, windows per step, draft trees, and once more after a look without commit), fork, lose their
slots and come back, and leave them to others, in batches padded to fixed shapes. The engine is deterministic for a
seed, keeps its pool as bits, and knows an implementation only through its adapter. Whatever it must not use is NaN:
rejected drafts, padding rows and tails, channels beside the input.

Shapes of calls never change, so that a compiling framework compiles every kind of call once.
"""

from __future__ import annotations

import fnmatch
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle.conformance.adapter import Adapter, offered
from oracle.conformance.arrays import POISON_BITS, plain, poisoned
from oracle.conformance.inputs import random_values
from oracle.numerics import TypedArray, from_bits, round_bits, typed

ROWS = 8  # of every batch; requests that run at a time
SLOTS, CACHED = 40, 18  # all slots; those that hold block snapshots, at most
CHUNK, TOKENS = 16, 64  # tokens of a row and of the whole batch of a prefill
DRAFTS, NODES = 4, 6  # tokens of a verify step's row, nodes of a draft tree
BLOCK, BLOCKS = 8, 8  # tokens of a cache block; blocks of the longest sequence
LONGEST = BLOCK * BLOCKS
WORDS = 61  # different tokens
PAD = -1
FN, UPDATE = "causal_conv1d_fn", "causal_conv1d_update"
NEEDS = {
    "front": ("write_indices", "snapshot", "track", "window_out", "no_commit", "commit_windows", "tree_parents",
              "tree_parents_from_links", "channel_offset", "split"),
    "back": ("state_layout_back", "write_indices", "no_commit", "channel_offset", "split"),
    "ring": ("state_layout_ring", "write_indices", "no_commit", "channel_offset", "split"),
}  # fmt: skip


class EngineFailure(AssertionError):
    """A request did not end with the bits of its plain run; the text tells what happened to it."""


@dataclass
class Request:
    """A request.

    Attributes:
      number: from 0, in the order of arrival.
      words: every token it will ever have.
      known: how many of them the engine knows: the prompt, and what was accepted.
      done: how many of them its state has consumed.
      slot: its own slot while it runs.
      source: a slot that it reads instead, once: a snapshot, a checkpoint, its parent's.
      has: its state is somewhere; False: it starts from zeros.
      count: accepted tokens of its last rolling step, else 1.
      checkpoint: (slot, done) of a window that was tracked for it.
      outs: token -> bits of every output computed for it.
      log: what was done with it.
    """

    number: int
    words: list[int]
    known: int
    done: int = 0
    slot: int = PAD
    source: int | None = None
    has: bool = False
    count: int = 1
    checkpoint: tuple[int, int] | None = None
    outs: dict[int, list[np.ndarray]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """Known tokens that are not consumed."""
        return self.known - self.done


@dataclass
class Row:
    """A row of a call: of a request, or padding.

    Attributes:
      request: None for padding.
      words: the tokens; None is NaN, for rejected drafts and padding.
      read, write: the slots.
      parents: of the nodes of a tree.
    """

    request: Request | None
    words: list[int | None]
    read: int = PAD
    write: int = PAD
    parents: list[int] | None = None

    @property
    def path(self) -> list[int]:
        """The tokens that are accepted. In a tree a child has a larger number than its parent."""
        return [t for t, word in enumerate(self.words) if word is not None]


class Engine:
    """One engine on one implementation.

    Args:
      adapter: the implementation.
      layout: of the slots: "front", "back" or "ring".
      seed: of everything that is random.
      dtype: of inputs, parameters and the pool.

    Raises:
      ValueError: an unknown layout, or the implementation does not support what the engine needs.
    """

    def __init__(self, adapter: Adapter, layout: str = "front", seed: int = 0, dtype: str = "bfloat16"):
        if layout not in NEEDS:
            raise ValueError(f"layout: expected one of {tuple(NEEDS)}, got {layout!r}")
        missing = missing_features(adapter, layout)
        if missing:
            raise ValueError(f"impl: expected an implementation that supports {', '.join(missing)}")
        self.adapter, self.layout, self.dtype = adapter, layout, dtype
        self.supports = tuple(adapter.capabilities()["supports"])
        self.chance = random.Random(seed)
        self.width, self.dim, self.first, self.channels = 4, 8, 3, 13
        self.history = self.width - 1
        state_len = self.history + DRAFTS - 1 + (layout != "front")

        def values(name: str, *shape: int) -> TypedArray:
            return from_bits(round_bits(random_values(seed, name, shape), dtype), dtype)

        self.embedding = values("engine.x", WORDS, self.dim).bits
        self.weight, self.bias = (
            values("engine.weight", self.dim, self.width),
            values("engine.bias", self.dim),
        )
        self.pool = poisoned((SLOTS, state_len, self.dim), dtype)
        self.windows = poisoned((2 * ROWS, NODES, self.history, self.dim), dtype)
        self.free = list(range(SLOTS))
        self.cache: dict[tuple[int, ...], int] = {}  # prefix -> slot of its window; least recently used first
        self.pins: Counter[int] = Counter()
        self.queue: list[Request] = []
        self.running: list[Request] = []
        self.families = [[self.chance.randrange(WORDS) for _ in range(LONGEST)] for _ in range(4)]
        self.arrived = self.step = 0
        self.counts: Counter[str] = Counter()

    # One step.

    def run(self, steps: int) -> Counter[str]:
        """Runs `steps` steps, then until every request has ended; returns how often what was done.

        Raises:
          EngineFailure: a request's output or state differs from its plain run.
        """
        for _ in range(steps):
            if len(self.queue) < 4 and self.chance.random() < 0.5:
                self.arrive()
            if self.running and self.chance.random() < 0.08:
                self.preempt(self.chance.choice(self.running))
            self.advance()
        while self.queue or self.running:
            self.advance()
        return self.counts

    def advance(self) -> None:
        """Admits what fits, moves every running request on in one call of some kind, and checks what has ended."""
        self.step += 1
        while self.queue and len(self.running) < ROWS and self.admit(self.queue[0]):
            self.running.append(self.queue.pop(0))
        if self.chance.random() < 0.15:
            self.fork()
        groups: dict[str, list[Request]] = {}
        for request in self.running:
            groups.setdefault(self.kind(request), []).append(request)
        for kind, members in groups.items():
            self.counts[kind] += len(members)
            getattr(self, kind)(members)
        for request in [r for r in self.running if r.done == len(r.words)]:
            self.finish(request)

    def kind(self, request: Request) -> str:
        """How a request goes on."""
        if request.count != 1:
            return "verify_rolling"
        if not request.has or request.source is not None or request.waiting > CHUNK:
            return "prefill"
        if request.waiting > 1:
            return self.chance.choice(("prefill", "prefill", "extend"))
        if self.layout != "front":
            return self.chance.choice(("prefill", "decode", "decode", "verify_again", "idle"))
        verify = ("verify_rolling", "verify_windows", "verify_trees", "verify_again")
        return self.chance.choice(("prefill", "decode", "decode", *verify, *verify, "idle"))

    def idle(self, members: list[Request]) -> None:
        """Requests that sit this step out."""

    # Requests come and go.

    def arrive(self) -> None:
        family = self.chance.choice(self.families)
        shared = family[: self.chance.randrange(0, 40)]
        own = [self.chance.randrange(WORDS) for _ in range(self.chance.randrange(1, 8))]
        answer = [self.chance.randrange(WORDS) for _ in range(self.chance.randrange(1, 17))]
        self.queue.append(self.request(shared + own + answer, len(shared + own)))

    def request(self, words: list[int], known: int) -> Request:
        self.arrived += 1
        return Request(self.arrived - 1, words, known)

    def admit(self, request: Request) -> bool:
        """Gives a request a slot, and the longest state there is for its tokens: a checkpoint, a snapshot, none."""
        if (slot := self.allocate()) is None:
            return False
        request.slot, request.count = slot, 1
        request.source, request.done = self.resume(request)
        request.has = self.has_state(request)
        if request.source is not None:
            self.pins[request.source] += 1
        self.note(request, f"admitted at {request.done} from slot {request.source} to {slot}")
        return True

    def resume(self, request: Request) -> tuple[int | None, int]:
        """The slot to go on from, and how many tokens it has seen; at least one known token stays to be done."""
        if request.checkpoint is not None and request.checkpoint[1] < request.known:
            self.counts["resumed"] += 1
            return request.checkpoint
        for end in range((request.known - 1) // BLOCK * BLOCK, 0, -BLOCK):
            key = tuple(request.words[:end])
            if key in self.cache:
                self.cache[key] = self.cache.pop(key)  # now the most recently used
                self.counts["prefix hit"] += 1
                return self.cache[key], end
        return None, 0

    def has_state(self, request: Request) -> bool:
        return request.source is not None

    def preempt(self, request: Request) -> None:
        """Takes a request's slot away; it waits in front of the queue and is computed again from what is left."""
        self.running.remove(request)
        self.counts["preempted"] += 1
        self.note(request, f"preempted at {request.done}")
        self.unpin(request)
        self.release(request.slot)
        self.forget(request)
        self.queue.insert(0, request)

    def forget(self, request: Request) -> None:
        request.slot, request.count, request.done, request.has = PAD, 1, 0, False

    def fork(self) -> None:
        """Up to two children go on from a running request's slot, which they read in one call."""
        parents = [
            r for r in self.running if r.has and r.source is None and r.count == 1 and r.done + 4 < LONGEST
        ]
        room = min(ROWS - len(self.running), 2)
        if not parents or room < 1:
            return
        parent, children = self.chance.choice(parents), []
        for _ in range(room):
            if (slot := self.allocate()) is None:
                break
            known = parent.done + self.chance.randrange(1, 4)
            more = [self.chance.randrange(WORDS) for _ in range(min(12, LONGEST - parent.done))]
            child = self.request(parent.words[: parent.done] + more, min(known, parent.done + len(more)))
            child.slot, child.source, child.has, child.done = slot, parent.slot, True, parent.done
            self.pins[parent.slot] += 1
            self.note(
                child, f"forked from request {parent.number} at {child.done}, slot {parent.slot} to {slot}"
            )
            children.append(child)
        if children:
            self.counts["forked"] += len(children)
            self.prefill(children)
            self.running += children

    def finish(self, request: Request) -> None:
        """Compares a request with its plain run, and frees its slots."""
        out, window = self.plain_run(request.words)
        state, wanted = self.state_of(request), self.state_after(request.words, window)
        for token, computed in sorted(request.outs.items()):
            for bits in computed:
                if (bits != out[token]).any():
                    self.fail(
                        request,
                        f"output of token {token}: expected bits {_hex(out[token])}, got {_hex(bits)}",
                    )
        if (state != wanted).any():
            self.fail(request, f"last state: expected bits {_hex(wanted)}, got {_hex(state)}")
        self.counts["ended"] += 1
        self.counts["tokens"] += sum(map(len, request.outs.values()))
        self.running.remove(request)
        self.release(request.slot)
        if request.checkpoint is not None:
            self.release(request.checkpoint[0])

    def plain_run(self, words: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Output and last window of one prefill of a sequence alone, with no argument that it does not need."""
        x = self.poison(LONGEST)
        x[: len(words)] = self.embedding[words]
        pool = from_bits(poisoned((1, self.history, self.dim), self.dtype), self.dtype)
        result = self.ask(FN, {
            "x": plain(from_bits(x, self.dtype)), "weight": plain(self.weight), "bias": plain(self.bias),
            "conv_states": plain(pool), "query_start_loc": _integers([0, len(words)]),
        }, {"activation": "silu", "max_seqlen": LONGEST})  # fmt: skip
        return typed(result["out"]).bits, typed(result["conv_states"]).bits[0]

    def state_of(self, request: Request) -> np.ndarray:
        """The window in front; in other layouts the whole slot."""
        first = request.count - 1
        return (
            self.pool[request.slot, first : first + self.history]
            if self.layout == "front"
            else self.pool[request.slot]
        )

    def state_after(self, words: list[int], window: np.ndarray) -> np.ndarray:
        """What a slot holds after a sequence: the plain run's window, or all that other layouts keep."""
        state_len = self.pool.shape[1]
        inputs = np.concatenate([np.zeros((state_len, self.dim), window.dtype), self.embedding[words]])[
            -state_len:
        ]
        if self.layout == "front":
            return window
        # Of a ring, the column of the oldest of these inputs comes first.
        return inputs if self.layout == "back" else np.roll(inputs, len(words) % state_len, axis=0)

    def fail(self, request: Request, what: str) -> None:
        history = "\n".join(f"  {line}" for line in request.log)
        raise EngineFailure(f"step {self.step}, request {request.number}: {what}\n{history}")

    # Slots.

    def allocate(self) -> int | None:
        """A slot that nobody uses, with whatever its last user left in it."""
        return self.free.pop() if self.free else self.evict()

    def evict(self) -> int | None:
        """The slot of the block that was not used for longest, if there is one that nobody is about to read."""
        for key, slot in self.cache.items():
            if not self.pinned(slot):
                del self.cache[key]
                self.counts["evicted"] += 1
                return slot
        return None

    def pinned(self, slot: int) -> bool:
        return self.pins[slot] > 0

    def release(self, slot: int) -> None:
        self.free.append(slot)

    def unpin(self, request: Request) -> None:
        """A request's source is no longer read by it."""
        if request.source is not None:
            self.pins[request.source] -= 1
            request.source = None

    def target(self, request: Request) -> int:
        """The slot that a request's next state goes to: now and then another one."""
        if request.source is None and request.has and self.free and self.chance.random() < 0.2:
            self.counts["moved"] += 1
            return self.free.pop()
        return request.slot

    # Calls. Each takes requests that go on in the same way.

    def prefill(self, members: list[Request]) -> None:
        """The next chunk of each, of at most CHUNK tokens and together at most TOKENS."""
        rows, room = [], TOKENS
        for i, request in enumerate(members):
            most = min(request.waiting, CHUNK, room - (len(members) - 1 - i))
            rows.append(self.row(request, self.chance.randint(max(1, most // 2), most)))
            room -= len(rows[-1].words)
        stale = [r.slot for r in self.running if r not in members]
        while (
            len(rows) < ROWS
        ):  # padding: rows with a token and no slot, rows with a slot of others and no token
            named = self.chance.choice([*stale, PAD])
            rows.append(Row(None, [None] if named == PAD and room > 0 else [], named, named))
            room -= len(rows[-1].words)
        self.chance.shuffle(rows)
        arrays, options = self.packed(rows, TOKENS)
        arrays["has_initial_state"] = plain(
            TypedArray("bool", np.array([r.request is None or r.request.has for r in rows]))
        )
        options["max_seqlen"] = CHUNK
        saved: list[tuple[tuple[int, ...], int]] = []
        if self.layout == "front":
            saved = self.snapshot(rows, arrays, options)
            lengths = [self.chance.randint(0, len(row.words)) for row in rows]
            arrays["track_indices"] = _integers(self.track(rows, lengths))
            arrays["track_lengths"] = _integers(lengths)
        out = self.call(FN, rows, arrays, options)
        self.cache.update(saved)
        self.collect(rows, out)

    def snapshot(self, rows: list[Row], arrays: dict[str, Any], options: dict[str, Any]):
        """Names slots for the block boundaries that the rows reach; returns what the cache will hold after the call."""
        tempting = self.running[0].slot if self.running else 0
        blocks = np.full((ROWS, BLOCKS), tempting)
        saved: dict[tuple[int, ...], int] = {}
        for i, row in enumerate(rows):
            if row.request is None:
                continue
            for k in range(BLOCKS):
                end = (k + 1) * BLOCK
                if not row.request.done < end <= row.request.done + len(row.words):
                    continue
                key = tuple(row.request.words[:end])
                slot = None
                if key not in self.cache and key not in saved:
                    slot = self.allocate() if len(self.cache) + len(saved) < CACHED else self.evict()
                blocks[i, k] = PAD if slot is None else slot
                if slot is not None:
                    saved[key] = slot
        self.counts["snapshots"] += len(saved)
        arrays["snapshot_indices"] = _integers(blocks)
        arrays["num_computed_tokens"] = _integers([self.computed(row) for row in rows])
        options["snapshot_block_size"] = BLOCK
        return list(saved.items())

    def computed(self, row: Row) -> int:
        return 0 if row.request is None else row.request.done

    def track(self, rows: list[Row], lengths: list[int]) -> list[int]:
        """Checkpoints for some rows, each after `lengths` of its tokens."""
        slots = []
        for row, length in zip(rows, lengths, strict=True):
            request, slot = row.request, None
            if (
                request is not None
                and request.source is None
                and request.checkpoint is None
                and len(self.free) > ROWS
            ):
                if request.done + length and self.chance.random() < 0.2:
                    slot = self.free.pop()
                    request.checkpoint = slot, request.done + length
                    self.counts["tracked"] += 1
                    self.note(request, f"checkpoint at {request.done + length} in slot {slot}")
            slots.append(PAD if slot is None else slot)
        return slots

    def extend(self, members: list[Request]) -> None:
        """The next few known tokens of each, as a packed decode step."""
        rows = [self.row(r, self.chance.randint(1, min(r.waiting, DRAFTS))) for r in members]
        self.step_packed(rows)

    def step_packed(self, rows: list[Row], counts: bool = False) -> None:
        rows = self.padded(rows, self.chance.randint(0, 2))
        arrays, options = self.packed(rows, ROWS * DRAFTS)
        if counts:
            arrays["num_accepted_tokens"] = _integers([self.count(row) for row in rows])
            options["max_seqlen"] = DRAFTS
        out = self.call(UPDATE, rows, arrays, options)
        self.collect(rows, out, counts)

    def padded(self, rows: list[Row], size: int) -> list[Row]:
        """The rows of a batch in any order, with padding rows of `size` tokens between them."""
        rows = [*rows, *(Row(None, [None] * size, parents=[-1] * size) for _ in range(ROWS - len(rows)))]
        self.chance.shuffle(rows)
        return rows

    def count(self, row: Row) -> int:
        return 2 if row.request is None else row.request.count

    def decode(self, members: list[Request]) -> None:
        """One token of each."""
        rows = self.padded([self.row(request, 1) for request in members], 1)
        arrays, options = self.arguments(rows, self.inputs(rows))
        if self.layout == "front":
            arrays["track_indices"] = _integers(self.track(rows, [1] * ROWS))
        self.collect(rows, self.call(UPDATE, rows, arrays, options))

    def verify_rolling(self, members: list[Request]) -> None:
        """Drafts in a slot that keeps them; the next step's count says how many were accepted."""
        rows = [self.row(*self.drafts(request, self.chance.randint(1, DRAFTS))) for request in members]
        self.step_packed(rows, counts=True)

    def drafts(self, request: Request, size: int) -> tuple[Request, int, int]:
        """The next token and drafts behind it, `size` together, and how many are right."""
        return request, self.chance.randint(1, min(size, len(request.words) - request.done)), size

    def verify_windows(self, members: list[Request]) -> None:
        """Drafts whose windows are saved, and a commit of the accepted one."""
        self.verify_and_commit(
            [self.row(*self.drafts(request, DRAFTS), stay=True) for request in members], DRAFTS
        )

    def verify_trees(self, members: list[Request]) -> None:
        """Trees of drafts, of which one path is accepted."""
        rows = []
        for request in members:
            parents = [-1] + [self.chance.randrange(node) for node in range(1, NODES)]
            path = [self.chance.randrange(NODES)]
            while path[0]:
                path.insert(0, parents[path[0]])
            path = path[: self.chance.randint(1, min(len(path), len(request.words) - request.done))]
            row = self.row(request, 0, NODES, stay=True)
            for node, word in zip(path, request.words[request.done :], strict=False):
                row.words[node] = word
            row.parents = parents
            rows.append(row)
        self.verify_and_commit(rows, NODES, tree=True)

    def verify_and_commit(self, rows: list[Row], size: int, tree: bool = False) -> None:
        rows = self.padded(rows, size)
        arrays, options = self.arguments(rows, self.inputs(rows, size))
        del arrays["write_indices"]
        buffers = [(2 * i + self.step) % (2 * ROWS) for i in range(ROWS)]
        arrays["window_indices"] = _integers(buffers)
        arrays["window_out"] = plain(from_bits(self.windows, self.dtype))
        if tree:
            arrays["tree_parents"] = self.parents(rows)
        out = self.call(UPDATE, rows, arrays, options | {"commit": False})
        steps = [self.accepted(row.path) for row in rows]
        self.collect(rows, out)
        result = self.ask("commit_windows", {
            "conv_states": plain(from_bits(self.pool, self.dtype)),
            "window_out": plain(from_bits(self.windows, self.dtype)), "accepted_steps": _integers(steps),
            "cache_indices": _integers([row.read for row in rows]), "window_indices": _integers(buffers),
        }, {})  # fmt: skip
        self.pool = typed(result["conv_states"]).bits

    def accepted(self, path: list[int]) -> int:
        return path[-1] if path else -1

    def parents(self, rows: list[Row]) -> Any:
        """The parents of the trees, which the implementation makes of their links."""
        children, siblings = np.full((2, ROWS, NODES), -1)
        for i, row in enumerate(rows):
            for node in range(1, NODES):
                elder = [other for other in range(1, node) if row.parents[other] == row.parents[node]]
                if elder:
                    siblings[i, elder[-1]] = node
                elif row.parents[node] >= 0:
                    children[i, row.parents[node]] = node
        links = {"next_token": _integers(children), "next_sibling": _integers(siblings)}
        return plain(np.asarray(self.ask("tree_parents_from_links", links, {})["parents"]))

    def verify_again(self, members: list[Request]) -> None:
        """Drafts without a commit, then the accepted ones once more, for the state."""
        rows = [self.row(*self.drafts(request, DRAFTS), stay=True) for request in members]
        accepted = [(row.request, len(row.path), row.request.done) for row in rows]
        rows = self.padded(rows, DRAFTS)
        arrays, options = self.arguments(rows, self.inputs(rows, DRAFTS))
        del arrays["write_indices"]
        self.collect(rows, self.call(UPDATE, rows, arrays, options | {"commit": False}))
        for request, _, done in accepted:
            request.done = done
        self.step_packed([self.row(request, count) for request, count, _ in accepted])

    # What all calls share.

    def row(self, request: Request, right: int, size: int | None = None, stay: bool = False) -> Row:
        """A row of `size` tokens of a request, of which the first `right` are its own; `stay`: its slot is not written."""
        words: list[int | None] = list(request.words[request.done : request.done + right])
        words += [None] * ((right if size is None else size) - len(words))
        read = request.slot if request.source is None else request.source
        return Row(request, words, read, PAD if stay else self.target(request))

    def poison(self, tokens: int, channels: int | None = None) -> np.ndarray:
        return np.full((tokens, channels or self.dim), POISON_BITS[self.dtype], self.embedding.dtype)

    def inputs(self, rows: list[Row], size: int | None = None) -> np.ndarray:
        """x of rows of equal length: [batch, channels], or [batch, size, channels]."""
        x = self.poison(ROWS * (size or 1), self.channels)
        self.fill(x, [word for row in rows for word in row.words])
        return x if size is None else x.reshape(ROWS, size, self.channels)

    def fill(self, x: np.ndarray, words: list[int | None]) -> None:
        at = [t for t, word in enumerate(words) if word is not None]
        x[at, self.first : self.first + self.dim] = self.embedding[
            [word for word in words if word is not None]
        ]

    def packed(self, rows: list[Row], tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of rows of any lengths, with a padded tail."""
        x = self.poison(tokens, self.channels)
        self.fill(x, [word for row in rows for word in row.words])
        arrays, options = self.arguments(rows, x)
        arrays["query_start_loc"] = _integers(np.cumsum([0] + [len(row.words) for row in rows]))
        return arrays, options

    def arguments(self, rows: list[Row], x: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays: dict[str, Any] = {
            "x": plain(from_bits(x, self.dtype)), "weight": plain(self.weight), "bias": plain(self.bias),
            "conv_states": plain(from_bits(self.pool, self.dtype)),
            "cache_indices": _integers([row.read for row in rows]),
            "write_indices": _integers([row.write for row in rows]),
        }  # fmt: skip
        options = {"activation": "silu", "channel_offset": self.first, "split_sizes": (5, self.dim - 5)}
        if self.layout != "front":
            options["state_layout"] = self.layout
        if self.layout == "ring":
            arrays["cache_seqlens"] = _integers(
                [9 if row.request is None else row.request.done for row in rows]
            )
        return arrays, options

    def call(self, op: str, rows: list[Row], arrays: dict[str, Any], options: dict[str, Any]) -> np.ndarray:
        """Runs a call; takes pool and windows over and returns the bits of out, its parts joined."""
        result = self.ask(op, arrays, options)
        self.counts["calls"] += 1
        self.counts["padding rows"] += sum(row.request is None for row in rows)
        self.pool = typed(result["conv_states"]).bits
        if arrays.get("window_out") is not None:
            self.windows = typed(result["window_out"]).bits
        parts = [typed(part).bits.reshape(-1, typed(part).shape[-1]) for part in result["out"]]
        return np.concatenate(parts, axis=-1)

    def ask(self, op: str, arrays: dict[str, Any], options: dict[str, Any]) -> Mapping[str, Any]:
        """Runs one operation of the implementation."""
        return self.adapter.run(op, offered(op, arrays, self.supports), options)

    def collect(self, rows: list[Row], out: np.ndarray, counts: bool = False) -> None:
        """Hands outputs to their requests and moves these on; `counts`: their slots rolled."""
        start = 0
        for row in rows:
            request, path = row.request, row.path
            if request is not None:
                for position, t in enumerate(path):
                    request.outs.setdefault(request.done + position, []).append(out[start + t])
                self.note(request, f"tokens {request.done} to {request.done + len(path)} of {len(row.words)}, slot {row.read} "
                                   f"to {row.write}, count {request.count if counts else '-'}")  # fmt: skip
                request.done += len(path)
                request.known = min(max(request.known, request.done + 1), len(request.words))
                request.has = True
                request.count = len(path) if counts else 1
                self.unpin(request)
                if row.write not in (PAD, request.slot):
                    self.release(request.slot)
                    request.slot = row.write
            start += len(row.words)

    def note(self, request: Request, what: str) -> None:
        request.log.append(f"step {self.step}: {what}")


def missing_features(adapter: Adapter, layout: str) -> list[str]:
    """What the engine needs with this layout and the implementation does not name under "supports"."""
    supported = adapter.capabilities().get("supports", ())
    return [f for f in NEEDS[layout] if not any(fnmatch.fnmatchcase(f, pattern) for pattern in supported)]


def run_engines(adapter: Adapter, steps: int, seed: int = 0) -> Mapping[str, Counter[str]]:
    """Runs `steps` steps in front slots, and a quarter as many in each other layout; counts by layout.

    Raises:
      EngineFailure: a request's bits are not those of its plain run.
      ValueError: the implementation does not support what the engine needs.
    """
    return {
        layout: Engine(adapter, layout, seed).run(steps if layout == "front" else -(-steps // 4))
        for layout in NEEDS
    }


def _integers(values: Any) -> Any:
    return plain(np.array(values, dtype=np.int32))


def _hex(bits: np.ndarray) -> str:
    return " ".join(f"{b:x}" for b in bits.reshape(-1).tolist())
