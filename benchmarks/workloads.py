"""Named workloads: axes, dtypes and layouts with where they come from. Standard library only.

A workload says what is computed and on what sizes, never how or by whom. It also knows the fewest bytes
that any implementation must move: each input read once, each result written once.
"""

from __future__ import annotations

import fnmatch
import random
from dataclasses import dataclass, replace

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
INDEX_BYTES = 4  # query_start_loc and cache_indices are int32 in every workload
PREFILL, UPDATE = "causal_conv1d_fn", "causal_conv1d_update"


@dataclass(frozen=True)
class Target:
    """What a result is held against.

    Attributes:
      clock: the clock it speaks of: "cold" (CUPTI, cold L2) or "graph" (a call inside a captured graph).
      unit: "ratio" (to the limit timed in the same run, by the same clock), "us", or "us over" (an empty kernel's).
      required, goal: upper bounds in that unit.
    """

    clock: str
    unit: str
    required: float
    goal: float | None = None


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
      layers: how often the call is made, each time with its own arrays; sizes and bytes are of one.
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
    layers: int = 1

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
    def limit_elements(self) -> int:
        """Elements of x's dtype that the limit copies: half the least bytes, up to whole pages of 4096.

        A copy of any other length takes longer, of 2.4 MB two to three times as long on an H100.
        """
        item = ITEMSIZE[self.dtype]
        return -(-self.least_bytes // 2 // 4096) * 4096 // item

    @property
    def x_bytes(self) -> int:
        """Bytes that a copy of x into out moves, read plus written."""
        return 2 * self.tokens * self.dim * ITEMSIZE[self.dtype]

    @property
    def least_ratio(self) -> float:
        """The least bytes over those of a copy of x."""
        return self.least_bytes / self.x_bytes


MB = 1 << 20


def prefill_target(w: Workload) -> Workload:
    """The workload with what is required of a prefill of so many bytes; between 4 and 16 MB nothing is."""
    if w.least_bytes >= 64 * MB:
        target = Target("cold", "ratio", 1.08, 1.03)
    elif w.least_bytes >= 16 * MB:
        target = Target("cold", "ratio", 1.15, 1.08)
    elif w.least_bytes < 4 * MB:
        target = Target("cold", "us over", 2.0, 1.5)
    else:
        target = None
    return replace(w, target=target)


def _main() -> list[Workload]:
    rows = {
        "8x2048-d8192": ([2048] * 8, 8192, "Qwen3-Next GDN, 8 prompts of 2048"),
        "8x2048-d2048": ([2048] * 8, 2048, "Qwen3-Next GDN on 4 shards"),
        "1x32768-d2048": ([32768], 2048, "one long prompt on 4 shards"),
        "64x128-d8192": ([128] * 64, 8192, "many short prompts"),
        "skew-d8192": ([16384] + [1] * 255, 8192, "one long prompt among 255 decode rows"),
        "mixed-d8192": ([2048] + [1] * 128, 8192, "a prefill chunk with 128 decode rows"),
        "seed-d8192": ((1, 9, 2, 17, 4), 8192, "ragged batch of an engine's own tests"),
    }
    found = [
        prefill_target(Workload(f"main/{name}", PREFILL, tuple(lengths), dim, source))
        for name, (lengths, dim, source) in rows.items()
    ]
    mixed = Target("cold", "ratio", 1.10, 1.05)
    return [replace(w, target=mixed) if w.name == "main/mixed-d8192" else w for w in found]


def _short() -> list[Workload]:
    """Rows of a few tokens, and chunks of a prompt among decode rows, as serving engines pack them."""
    rows = {
        "1500x5": ([5] * 1500, "rows of a few tokens"),
        "300x33": ([33] * 300, "rows of some tokens"),
        "4096x1": ([1] * 4096, "decode rows through the prefill"),
    } | {
        f"{chunk}+{decodes}": ([chunk] + [1] * decodes, f"a chunk of {chunk} tokens among {decodes} decode rows")
        for chunk in (512, 1024, 4096)
        for decodes in (16, 64, 256)
    }  # fmt: skip
    return [
        prefill_target(Workload(f"short/{name}-d{dim}", PREFILL, tuple(lengths), dim, source))
        for name, (lengths, source) in rows.items()
        for dim in (1280, 2048, 4096, 8192)
    ]


def _narrow() -> list[Workload]:
    """Few channels, as of small models and many shards."""
    target = Target("cold", "ratio", 1.15, 1.08)
    rows = [
        Workload(f"narrow/d{dim}", PREFILL, (2048,) * 8, dim, "16384 tokens of few channels")
        for dim in (256, 512, 768, 1152, 1280)
    ]
    return [replace(w, target=target) if w.dim <= 1024 else prefill_target(w) for w in rows]


def _steps() -> list[Workload]:
    """An engine's step: the calls of three layers on one batch, each with its own x, weight and pool."""
    rows = {"512+31-d2048": ([512] + [1] * 31, 2048), "2048+128-d8192": ([2048] + [1] * 128, 8192)}
    return [
        Workload(
            f"step/{name}", PREFILL, tuple(lengths), dim, "a step of an engine: 3 layers, one graph", layers=3
        )
        for name, (lengths, dim) in rows.items()
    ]


def _decode() -> list[Workload]:
    targets = {
        (1, 8192): Target("graph", "us", 1.45, 1.3),
        (256, 8192): Target("graph", "us", 7.3, 7.0),
        (1024, 8192): Target("graph", "us", 48.6, 47.0),
    }
    rows = [
        Workload(f"decode/b{batch}-d{dim}", UPDATE, (1,) * batch, dim, "decode step of Qwen3-Next, 1 or 4 shards",
                 target=targets.get((batch, dim)))
        for dim in (2048, 8192)
        for batch in (1, 32, 256, 1024)
    ]  # fmt: skip
    rows += [
        Workload(f"verify/64x4-d{dim}", UPDATE, (4,) * 64, dim, "verification of 3 draft tokens in 64 requests",
                 target=Target("cold", "ratio", 1.15, 1.05) if dim == 8192 else None)
        for dim in (2048, 8192)
    ]  # fmt: skip
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
    w.name: w
    for w in (*_main(), *_decode(), *_short(), *_narrow(), *_steps(), *_sweeps(), *_variants(), *_models())
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
