"""Named workloads: axes, dtypes and layouts with where they come from. Standard library only.

A workload says what is computed and on what sizes, never how or by whom. It also knows the fewest bytes
that any implementation must move: each input read once, each result written once.
"""

from __future__ import annotations

import fnmatch
import random
from dataclasses import dataclass, field

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BYTES = 4  # query_start_loc and cache_indices are int32 in every workload
PREFILL, UPDATE = "causal_conv1d_fn", "causal_conv1d_update"


@dataclass(frozen=True)
class Target:
    """What a result is held against.

    Attributes:
      clock: the clock it speaks of: "cold" (CUPTI, cold L2) or "graph" (a call inside a captured graph).
      unit: "ratio" (to the copy timed in the same run, by the same clock) or "us".
      required, goal: upper bounds in that unit.
      peers: figures measured before on an H100 80GB, by contender, in that unit unless the key names another.
    """

    clock: str
    unit: str
    required: float
    goal: float | None = None
    peers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """One shape of one operation.

    Attributes:
      name: "group/detail".
      op: "causal_conv1d_fn" or "causal_conv1d_update".
      lengths: tokens of each row.
      dim, width: channels and taps.
      source: where the shape comes from.
      dtype: of x, weight and bias.
      pool_dtype: of conv_states; None = dtype.
      bias, activation: as the operation takes them.
      x_layout: "token_major", or "channel_first" for the transpose of a [dim, tokens] tensor.
      pool_layout: "dim_last", or "state_last" for a pool held in memory as [slots, dim, state_len].
      target: the row of the table of requirements, if it is one.
    """

    name: str
    op: str
    lengths: tuple[int, ...]
    dim: int
    source: str
    width: int = 4
    dtype: str = "bfloat16"
    pool_dtype: str | None = None
    bias: bool = True
    activation: str | None = "silu"
    x_layout: str = "token_major"
    pool_layout: str = "dim_last"
    target: Target | None = None

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def state_dtype(self) -> str:
        return self.pool_dtype or self.dtype

    @property
    def bytes_read(self) -> int:
        """x, the window of every row (all rows have a state), weight, bias, offsets, slots and the mask."""
        item = ITEMSIZE[self.dtype]
        windows = self.batch * (self.width - 1) * self.dim * ITEMSIZE[self.state_dtype]
        parameters = self.dim * (self.width + self.bias) * item
        indices = INDEX_BYTES * self.batch
        if self.op == PREFILL:
            indices += INDEX_BYTES * (self.batch + 1) + self.batch
        return self.tokens * self.dim * item + windows + parameters + indices

    @property
    def bytes_written(self) -> int:
        """The output and the new window of every row."""
        windows = self.batch * (self.width - 1) * self.dim * ITEMSIZE[self.state_dtype]
        return self.tokens * self.dim * ITEMSIZE[self.dtype] + windows

    @property
    def least_bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def copy_bytes(self) -> int:
        """Bytes that the limit moves, read plus written.

        Prefill: a copy of x into out. Update: a copy of half the least bytes, that is, the same traffic,
        since the windows of a decode step outweigh x three to one.
        """
        if self.op == PREFILL:
            return 2 * self.tokens * self.dim * ITEMSIZE[self.dtype]
        return 2 * (self.least_bytes // 2)

    @property
    def least_ratio(self) -> float:
        return self.least_bytes / self.copy_bytes


H100_FIGURES = "measured on an H100 80GB, bf16, width 4, bias, silu and state update, one run each"


def _main() -> list[Workload]:
    """The table of requirements for prefill."""

    def row(name, lengths, dim, source, required, goal, **peers):
        clock = Target("cold", "ratio", required, goal, peers)
        return Workload(f"main/{name}", PREFILL, tuple(lengths), dim, source, target=clock)

    return [
        row("8x2048-d8192", [2048] * 8, 8192, "Qwen3-Next GDN, 8 prompts of 2048", 1.10, 1.05,
            sglang=1.30, vllm=1.35, causal_conv1d=1.15, fla=2.14, torch_conv1d=9.6, jax_peers=2.4),
        row("8x2048-d2048", [2048] * 8, 2048, "Qwen3-Next GDN on 4 shards", 1.15, 1.05,
            sglang=1.34, vllm=1.40, causal_conv1d=1.19, fla=4.1, torch_conv1d=9.0, jax_peers=2.7),
        row("1x32768-d2048", [32768], 2048, "one long prompt on 4 shards", 1.12, 1.05,
            sglang=1.30, vllm=1.39, causal_conv1d=1.15, fla=1.62, torch_conv1d=9.2, jax_peers=2.5),
        row("64x128-d8192", [128] * 64, 8192, "many short prompts", 1.12, 1.06,
            sglang=1.32, vllm=1.37, causal_conv1d=1.12, fla=2.53, torch_conv1d=10.4, jax_peers=3.2),
        row("skew-d8192", [16384] + [1] * 255, 8192, "one long prompt among 255 decode rows", 1.18, 1.10,
            sglang=54, vllm=1.40, fla=4.1, jax_peers=3.7),
        row("mixed-d8192", [2048] + [1] * 128, 8192, "a prefill chunk with 128 decode rows", 1.45, 1.25,
            sglang=22, vllm=1.52, fla=8.5, jax_peers=7.2),
        Workload("main/seed-d8192", PREFILL, (1, 9, 2, 17, 4), 8192, "ragged batch of an engine's own tests",
                 target=Target("cold", "us", 4.0, 3.0,
                               dict(sglang_events=9.5, vllm_events=10.0, fla=136.0, jax_peers=15.6))),
    ]  # fmt: skip


def _decode() -> list[Workload]:
    targets = {
        (1, 8192): Target("graph", "us", 1.6, None, dict(sglang=1.6, vllm=1.6, causal_conv1d=2.7)),
        (256, 8192): Target("graph", "us", 9.5, None, dict(sglang=10.6, vllm=11.6, causal_conv1d=22.0, copy=8.0)),
        (1024, 8192): Target("graph", "us", 52.0, None, dict(sglang=57.8, vllm=143.7, causal_conv1d=97.4, copy=46.7)),
    }  # fmt: skip
    rows = [
        Workload(f"decode/b{batch}-d{dim}", UPDATE, (1,) * batch, dim, "decode step of Qwen3-Next, 1 or 4 shards",
                 target=targets.get((batch, dim)))
        for dim in (2048, 8192)
        for batch in (1, 32, 256, 1024)
    ]  # fmt: skip
    rows += [
        Workload(
            f"verify/64x4-d{dim}", UPDATE, (4,) * 64, dim, "verification of 3 draft tokens in 64 requests"
        )
        for dim in (2048, 8192)
    ]
    return rows


def _sweeps() -> list[Workload]:
    """How cost grows: one axis moves, the others stay."""
    rows = [
        Workload(f"tokens/{tokens}", PREFILL, (tokens,), 2048, "cost against tokens, one row")
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072)
    ]
    total, batch = 16640, 256
    for longest in (65, 256, 1024, 4096, 8192, 16385):
        short, extra = divmod(total - longest, batch - 1)
        lengths = (longest, *(short + (i < extra) for i in range(batch - 1)))
        rows.append(
            Workload(f"skew/{longest}", PREFILL, lengths, 2048, "256 rows, 16640 tokens, one row longer")
        )
    rows += [
        Workload(f"batch/{batch}", PREFILL, (16384 // batch,) * batch, 2048, "16384 tokens in equal rows")
        for batch in (1, 4, 16, 64, 256, 1024, 4096)
    ]
    rows += [
        Workload(
            f"dim/{dim}",
            PREFILL,
            (2048,) * 4,
            dim,
            "4 rows of 2048 tokens; also dims that are no multiple of 8",
        )
        for dim in (64, 100, 256, 640, 1001, 1024, 2048, 4096, 8192, 12288, 24576)
    ]
    return rows


# Channels of the convolution in real models, unsharded and on 2, 4 and 8 shards, from their configurations.
# GDN: 2 * k_heads * k_dim + v_heads * v_dim. Mamba2: heads * head_dim + 2 * groups * state, groups extended to
# a multiple of the shards. Mamba1: the inner size. KDA: 3 * heads * head_dim. LFM2: the hidden size.
MODELS = {
    "qwen3-next-80b": ((8192, 4096, 2048, 1024), 4, False, "silu"),
    "qwen3.5-27b": ((10240, 5120, 2560, 1280), 4, False, "silu"),
    "qwen3.5-397b": ((12288, 6144, 3072, 1536), 4, False, "silu"),
    "codestral-mamba-7b": ((10240, 5120, 2560, 1280), 4, True, "silu"),
    "nemotron-h-8b": ((10240, 5120, 2560, 1280), 4, True, "silu"),
    "nemotron-nano-9b-v2": ((12288, 6144, 3072, 1536), 4, True, "silu"),
    "falcon-h1-7b": ((3584, 2048, 1280, 896), 4, True, "silu"),
    "falcon-h1-3b": ((4608, 2560, 1536, 1024), 4, True, "silu"),
    "falcon-mamba-7b": ((8192, 4096, 2048, 1024), 4, True, "silu"),
    "lfm2-1.2b": ((2048, 1024, 512, 256), 3, False, None),
    "kimi-linear-48b": ((12288, 6144, 3072, 1536), 4, False, "silu"),
    "bamba-9b": ((8448, 4352, 2304, 1280), 4, True, "silu"),
    "granite-4.0-h-tiny": ((3328, 1792, 1024, 640), 4, True, "silu"),
}


def _models() -> list[Workload]:
    """4 prompts of 1024 tokens and 64 decode rows for every distinct convolution of `MODELS`."""
    users: dict[tuple, list[str]] = {}
    for model, (dims, width, bias, activation) in MODELS.items():
        for shards, dim in zip((1, 2, 4, 8), dims, strict=True):
            users.setdefault((dim, width, bias, activation), []).append(f"{model} on {shards}")
    rows = []
    for (dim, width, bias, activation), models in sorted(
        users.items(), key=lambda item: (item[0][1], str(item[0][2:]), item[0][0])
    ):
        detail = f"d{dim}-w{width}{'-bias' if bias else ''}{'-silu' if activation else ''}"
        options = dict(width=width, bias=bias, activation=activation)
        source = ", ".join(models)
        rows.append(Workload(f"models/prefill-{detail}", PREFILL, (1024,) * 4, dim, source, **options))
        rows.append(Workload(f"models/decode-{detail}", UPDATE, (1,) * 64, dim, source, **options))
    return rows


def _variants() -> list[Workload]:
    """The first row of the main table with one thing changed; none may exceed 1.6 times the copy."""
    limit = Target("cold", "ratio", 1.6)
    changes: dict[str, dict] = {
        "float32": dict(dtype="float32"),
        "float16": dict(dtype="float16"),
        "float32-pool": dict(pool_dtype="float32"),
        "w2": dict(width=2),
        "w3": dict(width=3),
        "linear": dict(activation=None, bias=False),
        "channel-first": dict(x_layout="channel_first"),
        "state-last": dict(pool_layout="state_last"),
        "channel-first-state-last": dict(x_layout="channel_first", pool_layout="state_last"),
    }
    return [
        Workload(
            f"variants/{name}",
            PREFILL,
            (2048,) * 8,
            8192,
            "8 x 2048, D 8192, changed",
            target=limit,
            **change,
        )
        for name, change in changes.items()
    ]


WORKLOADS: dict[str, Workload] = {
    w.name: w for w in (*_main(), *_decode(), *_sweeps(), *_variants(), *_models())
}


def select(patterns: list[str]) -> list[Workload]:
    """Workloads whose name matches a pattern, in table order; a pattern without "/" is a whole group.

    Raises:
      ValueError: a pattern matches nothing.
    """
    chosen = set()
    for pattern in patterns:
        glob = pattern if "/" in pattern else f"{pattern}/*"
        found = fnmatch.filter(WORKLOADS, glob)
        if not found:
            groups = sorted({name.partition("/")[0] for name in WORKLOADS})
            raise ValueError(f"workloads: expected a glob over names or a group of {groups}, got {pattern!r}")
        chosen.update(found)
    return [w for name, w in WORKLOADS.items() if name in chosen]


def random_batches(
    count: int, tokens: int, rows: int, slots: int, seed: int = 0
) -> list[tuple[list[int], list[int], list[bool], int]]:
    """Batches of one shape that differ in all that may change between steps of a server.

    The first four are extremes (equal rows, one long row first, one long row last, a padded tail), so that
    whatever compiles by kind of batch has been met after them.

    Returns:
      (query_start_loc, cache_indices, has_initial_state, longest row) for each batch.
    """
    source = random.Random(seed)
    extremes = [
        [tokens // rows] * rows,
        [tokens - rows + 1] + [1] * (rows - 1),
        [1] * (rows - 1) + [tokens - rows + 1],
        [1] * rows,
    ]
    batches = []
    for i in range(count):
        if i < len(extremes):
            lengths = extremes[i]
        else:
            used = source.randint(tokens // 2, tokens)
            cuts = sorted(source.randint(0, used) for _ in range(rows - 1))
            lengths = [b - a for a, b in zip([0, *cuts], [*cuts, used], strict=True)]
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        indices = [slot if source.random() < 0.9 else -1 for slot in source.sample(range(slots), rows)]
        has = [source.random() < 0.5 for _ in range(rows)]
        batches.append((offsets, indices, has, max(lengths)))
    return batches
