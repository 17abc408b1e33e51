"""The Torch twin's extended operations against their definition: kernels in Triton's interpreter, and eager path.

Inputs are small integers, so that every sum is exact in bfloat16 and the definition below, which is written with
Python loops over rows and tokens, must be met in every bit. Where many options meet, the eager path takes all
combinations and the kernels those in which any two of them meet, or any three; compiled on a GPU, the kernels are held
to the eager path.
"""

import functools
import itertools

import pytest
import torch

import triton_impl
from oracle.contract import UpdateCall
from tests.tools.covering import on_backends
from tests.tools.synchronisation import no_synchronisation
from triton_impl.call import run

torch.set_num_threads(1)  # the tensors are tiny
BACKENDS = pytest.mark.parametrize("backend", ["triton", "eager"])
covered = functools.partial(on_backends, few=("triton",), every=("eager",))
DIM, SLOTS = 20, 12
BF16 = torch.bfloat16


def integers(*shape, low=-8, high=8, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


class Definition:
    """SPEC: one row at a time; `pool` and `windows` are what the call leaves."""

    def __init__(self, weight, bias, pool, windows=None, pad=-1):
        self.weight, self.bias, self.before, self.pad = weight.double(), bias, pool, pad
        self.pool = None if pool is None else pool.clone()
        self.windows = None if windows is None else windows.clone()
        self.history = weight.shape[1] - 1

    def slot(self, indices, row):
        slot = row if indices is None else int(indices[row])
        return None if slot == self.pad or not 0 <= slot < self.before.shape[0] else slot

    def window_columns(self, layout, seqlens, row, count=None):
        columns, history = self.before.shape[1], self.history
        if count is not None:
            first = min(max(count, 1), columns - history + 1) - 1
            return [first + i for i in range(history)]
        if layout == "back":
            return [columns - history + i for i in range(history)]
        if layout == "ring":
            return [(max(int(seqlens[row]), 0) - history + i) % columns for i in range(history)]
        return list(range(history))

    def old_window(self, slot, columns, has_state):
        if slot is None or not has_state:
            return [torch.zeros(self.weight.shape[0], dtype=BF16)] * self.history
        return [self.before[slot, column] for column in columns]

    def outputs(self, entries, silu=False, residual=None):
        """The outputs of the tokens behind the first `history` entries."""
        out = []
        for t in range(len(entries) - self.history):
            value = torch.zeros(self.weight.shape[0]).double() if self.bias is None else self.bias.double()
            for j in range(self.history + 1):
                value = value + self.weight[:, j] * entries[t + j].double()
            out.append(value if residual is None else value + residual[t].double())
        return out

    def store(self, slot, columns, entries):
        for column, entry in zip(columns, entries, strict=True):
            self.pool[slot, column] = entry.to(self.pool.dtype)

    def new_state(self, row, slot, tokens, window, layout, seqlens, has_state, writes):
        write = slot if writes is None else self.slot(writes, row)
        if write is None or (len(tokens) == 0 and write == slot and has_state):
            return
        columns, entries = self.before.shape[1], [*window, *tokens]
        if layout == "front":
            self.store(write, range(self.history), entries[len(entries) - self.history :])
            return
        old = list(self.before[slot]) if has_state else list(torch.zeros_like(self.before[0]))
        if layout == "back":
            self.store(write, range(columns), [*old, *tokens][len(tokens) :])
        elif columns:
            new, consumed = list(old), max(int(seqlens[row]), 0)
            for t, token in enumerate(tokens):
                new[(consumed + t) % columns] = token
            self.store(write, range(columns), new)


def define_fn(
    x, weight, bias, pool, starts, slots=None, has=None, *, state_layout="front", cache_seqlens=None,
    write_indices=None, empty_rows="skip", snapshot_indices=None, snapshot_block_size=None, num_computed_tokens=None,
    track_indices=None, track_lengths=None, residual=None, channel_offset=None, split_sizes=None, pad_slot_id=-1,
):  # fmt: skip
    rule = Definition(weight, bias, pool, pad=pad_slot_id)
    dim, history = weight.shape[0], rule.history
    x = x if channel_offset is None else x[:, channel_offset : channel_offset + dim]
    out = torch.zeros(x.shape[0], dim).double()
    for row in range(len(starts) - 1):
        tokens = list(x[starts[row] : starts[row + 1]])
        slot = rule.slot(slots, row) if pool is not None else None
        if (pool is not None and slot is None) or (not tokens and empty_rows == "skip"):
            continue
        has_state = slot is not None and has is not None and bool(has[row])
        window = rule.old_window(
            slot, rule.window_columns(state_layout, cache_seqlens, row) if has_state else (), has_state
        )
        entries = [*window, *tokens]
        added = None if residual is None else residual[starts[row] : starts[row + 1]]
        for t, value in enumerate(rule.outputs(entries, residual=added)):
            out[starts[row] + t] = value
        if pool is None:
            continue
        rule.new_state(row, slot, tokens, window, state_layout, cache_seqlens, has_state, write_indices)
        if snapshot_indices is not None:
            consumed = max(int(num_computed_tokens[row]), 0) if num_computed_tokens is not None else 0
            for k in range(snapshot_indices.shape[1]):
                p = (k + 1) * snapshot_block_size - consumed
                target = rule.slot(snapshot_indices[row], k)
                if 0 < p <= len(tokens) and target is not None:
                    rule.store(target, range(history), entries[p : p + history])
        if track_indices is not None and rule.slot(track_indices, row) is not None:
            at = len(tokens)
            if track_lengths is not None:
                at = min(max(int(track_lengths[row]), 0), at)
            rule.store(rule.slot(track_indices, row), range(history), entries[at : at + history])
    return split(out.to(x.dtype), split_sizes), rule.pool


def define_update(
    x, weight, bias, pool, slots=None, *, query_start_loc=None, num_accepted_tokens=None, max_seqlen=None,
    state_layout="front", cache_seqlens=None, write_indices=None, track_indices=None, window_out=None,
    window_indices=None, commit=True, tree_parents=None, residual=None, channel_offset=None, split_sizes=None,
    pad_slot_id=-1,
):  # fmt: skip
    rule = Definition(weight, bias, pool, window_out, pad_slot_id)
    dim, history = weight.shape[0], rule.history
    x = x if channel_offset is None else x[..., channel_offset : channel_offset + dim]
    shape, batch = x.shape, x.shape[0]
    if query_start_loc is not None:
        starts, batch = query_start_loc.tolist(), len(query_start_loc) - 1
    else:
        seqlen = x.shape[1] if x.dim() == 3 else 1
        starts = [seqlen * row for row in range(batch + 1)]
    x = x.reshape(-1, dim)
    residual = None if residual is None else residual.reshape(-1, dim)
    out = torch.zeros(x.shape[0], dim).double()
    for row in range(batch):
        tokens, slot = list(x[starts[row] : starts[row + 1]]), rule.slot(slots, row)
        if slot is None or not tokens:
            continue
        count = None if num_accepted_tokens is None else int(num_accepted_tokens[row])
        window = rule.old_window(slot, rule.window_columns(state_layout, cache_seqlens, row, count), True)
        added = None if residual is None else residual[starts[row] : starts[row + 1]]
        buffer = None
        if window_out is not None:
            buffer = row if window_indices is None else int(window_indices[row])
            buffer = None if buffer == pad_slot_id or not 0 <= buffer < window_out.shape[0] else buffer
        for t in range(len(tokens)):
            chain = [*window, *tokens[: t + 1]]
            if tree_parents is not None:
                path, node = [], t
                while node >= 0:
                    path.insert(0, tokens[node])
                    node = min(int(tree_parents[row, node]), node - 1)
                chain = [*window, *path]
            one = None if added is None else added[t : t + 1]
            out[starts[row] + t] = rule.outputs(chain[len(chain) - history - 1 :], residual=one)[0]
            if buffer is not None:
                for j, entry in enumerate(chain[len(chain) - history :]):
                    rule.windows[buffer, t, j] = entry.to(rule.windows.dtype)
        if count is not None:
            write = slot if write_indices is None else rule.slot(write_indices, row)
            if write is not None and history:
                entries = [*window, *tokens][1:]
                rule.store(write, range(len(entries)), entries)
        elif commit:
            rule.new_state(row, slot, tokens, window, state_layout, cache_seqlens, True, write_indices)
        if track_indices is not None and rule.slot(track_indices, row) is not None:
            entries = [*window, *tokens]
            rule.store(rule.slot(track_indices, row), range(history), entries[len(entries) - history :])
    return split(out.to(x.dtype).view(shape), split_sizes), rule.pool, rule.windows


def split(out, sizes):
    return out if sizes is None else out.split(sizes, dim=-1)


def same_bits(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(77), want.nan_to_num(77))


def same_outputs(got, want, split_sizes):
    if split_sizes is None:
        same_bits(got, want)
        return
    assert isinstance(got, tuple)
    assert len(got) == len(want)
    for one, wanted in zip(got, want, strict=True):
        assert one.is_contiguous()
        same_bits(one, wanted)


def check_fn(backend, x, weight, bias, pool, *rest, **options):
    want, want_pool = define_fn(x, weight, bias, pool, *rest, **options)
    mine = None if pool is None else pool.clone(memory_format=torch.preserve_format)
    result = triton_impl.causal_conv1d_fn(x, weight, bias, mine, *rest, backend=backend, **options)
    assert result.conv_states is mine
    same_outputs(result.out, want, options.get("split_sizes"))
    if pool is not None:
        same_bits(mine, want_pool)
    return result


def check_update(backend, x, weight, bias, pool, slots=None, **options):
    want, want_pool, want_windows = define_update(x, weight, bias, pool, slots, **options)
    mine = pool.clone(memory_format=torch.preserve_format)
    windows = options.get("window_out")
    if windows is not None:
        options = options | {"window_out": windows.clone(memory_format=torch.preserve_format)}
    result = triton_impl.causal_conv1d_update(x, weight, bias, mine, slots, backend=backend, **options)
    assert result.conv_states is mine
    same_outputs(result.out, want, options.get("split_sizes"))
    same_bits(mine, want_pool)
    if windows is not None:
        assert result.window_out is options["window_out"]
        same_bits(result.window_out, want_windows)
    return result


def taps(width, dim=DIM, bias=True):
    return integers(dim, width, low=-3, high=3, seed=1), integers(
        dim, low=-3, high=3, seed=2
    ) if bias else None


def new_pool(columns, dim=DIM, slots=SLOTS, dtype=BF16):
    return integers(slots, columns, dim, dtype=dtype, seed=3)


# Prefill: rows of many lengths, one of them padding, one of them empty, and a tail.

LENGTHS = (5, 0, 1, 3, 14, 2, 0)
STARTS = [0, *itertools.accumulate(LENGTHS)]
ROW_SLOTS = [3, 7, -1, 0, 5, 9, 1]
HAS = [True, True, True, False, True, True, False]


def prefill(width=4, columns=None, dim=DIM, tail=3, dtype=BF16):
    x = integers(STARTS[-1] + tail, dim, dtype=dtype)
    x[STARTS[-1] :] = torch.nan
    weight, bias = taps(width, dim)
    pool = new_pool(width - 1 if columns is None else columns, dim)
    pool[2] = torch.nan  # no row reads it
    return (
        x,
        weight,
        bias,
        pool,
        torch.tensor(STARTS, dtype=torch.int32),
        torch.tensor(ROW_SLOTS),
        torch.tensor(HAS),
    )


LAYOUTS = {
    "front": dict(),
    "back": dict(state_layout="back"),
    "ring": dict(state_layout="ring", cache_seqlens=torch.tensor([7, 3, 5, 0, 2**40 + 1, -4, 9])),
}
WRITES = {
    "in place": None,
    "elsewhere": [4, 6, 8, 10, 2, 99, 11],
    "some": [3, 8, 8, -1, 2, 9, 1],
}  # row 1 and 6 have no token


@covered(
    size=[(4, 3), (4, 8), (1, 0), (3, 30)], layout=LAYOUTS, writes=WRITES, empty_rows=["skip", "apply"], strength=3
)  # fmt: skip
def test_prefill_layouts_and_write_slots(size, layout, writes, empty_rows, backend):
    writes = None if WRITES[writes] is None else torch.tensor(WRITES[writes], dtype=torch.int16)
    check_fn(backend, *prefill(*size), **LAYOUTS[layout], write_indices=writes, empty_rows=empty_rows)


SNAPSHOTS = dict(
    snapshot_indices=torch.tensor(
        [[4, 6, 8], [4, 4, 4], [8, 8, 8], [10, 99, 2], [11, -1, 2], [9, 1, 4], [2, 2, 2]]
    ),
    num_computed_tokens=torch.tensor([2, 5, 1, 0, 9, -7, 3]),
)


@covered(block_size=[1, 2, 3, 5, 7, 1000], width=[1, 2, 4, 8], counted=[False, True], first=[0, 3])
def test_snapshots(block_size, width, counted, first, backend):
    """Boundaries on a chunk's first and last token, nearer to its start than the window is long, past the table."""
    table = torch.arange(7 * 3).view(7, 3) + SLOTS  # a slot of its own for each; some are padding
    table[3, 1], table[4, 0] = -1, 10**6
    computed = None
    if counted:  # `first` blocks before the boundaries that the table names
        computed = SNAPSHOTS["num_computed_tokens"] + first * block_size
    x, weight, bias, _, *rest = prefill(width)
    pool = new_pool(width - 1, slots=SLOTS + 21)
    check_fn(
        backend, x, weight, bias, pool, *rest, num_computed_tokens=computed, snapshot_indices=table,
        snapshot_block_size=block_size,
    )  # fmt: skip


@BACKENDS
def test_snapshots_of_many_rows(backend):
    """More rows than a step of the search, more boundaries than rows, a table with strides."""
    lengths = torch.randint(0, 9, (70,), generator=torch.Generator().manual_seed(5))
    starts = torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])] * 2, 1)[:, 1]
    x, (weight, bias) = integers(int(starts[-1]), 5), taps(4, 5)
    table = (70 + torch.arange(70 * 12)).view(12, 70).int().t()
    check_fn(
        backend, x, weight, bias, new_pool(3, 5, 70 * 13), starts, None, torch.ones(70, dtype=torch.bool),
        snapshot_indices=table, snapshot_block_size=2, num_computed_tokens=torch.arange(70, dtype=torch.uint8) % 7,
    )  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("empty_rows", ["skip", "apply"])
@pytest.mark.parametrize("lengths", [None, [2, 0, 9, 7, 14, -3, 1]])
@pytest.mark.parametrize("width", [1, 4])
def test_tracked_windows(width, lengths, empty_rows, backend):
    lengths = lengths if lengths is None else torch.tensor(lengths)
    track = torch.tensor([4, 6, 8, 10, 99, -1, 11])
    check_fn(backend, *prefill(width, 5), track_indices=track, track_lengths=lengths, empty_rows=empty_rows)


@BACKENDS
def test_rows_share_a_prefix(backend):
    """Three rows read one slot and write their own, and leave a snapshot and a tracked window on the way."""
    x, (weight, bias) = integers(9, DIM), taps(4)
    starts = torch.tensor([0, 2, 5, 9])
    check_fn(
        backend, x, weight, bias, new_pool(4), starts, torch.tensor([1, 1, 1]), torch.tensor([True] * 3),
        write_indices=torch.tensor([2, 3, 4]), track_indices=torch.tensor([5, 6, 7]),
        snapshot_indices=torch.tensor([[8], [9], [10]]), snapshot_block_size=8,
        num_computed_tokens=torch.tensor([7, 6, 5]),
    )  # fmt: skip


# Decode steps


def step(width=4, columns=None, seqlen=None, batch=4, dim=DIM):
    shape = (batch, dim) if seqlen is None else (batch, seqlen, dim)
    weight, bias = taps(width, dim)
    return integers(*shape), weight, bias, new_pool(width - 1 if columns is None else columns, dim)


STEP_SLOTS = torch.tensor([3, -1, 0, 5])
STEP_LAYOUTS = {
    "front": dict(),
    "back": dict(state_layout="back"),
    "ring": dict(state_layout="ring", cache_seqlens=torch.tensor([7, 3, 0, 2**40 + 1])),
}


@covered(
    size=[(4, 3), (4, 9), (2, 2), (1, 0)], seqlen=[None, 2, 11], layout=STEP_LAYOUTS,
    writes=[None, [4, 6, 8, 99], [3, 8, 2, 5]], strength=3,
)  # fmt: skip
def test_step_layouts_and_write_slots(size, seqlen, layout, writes, backend):
    writes = None if writes is None else torch.tensor(writes)
    options = STEP_LAYOUTS[layout] | dict(write_indices=writes)
    if layout == "front":
        options |= dict(track_indices=torch.tensor([7, 7, 9, 99]))
    check_update(backend, *step(*size, seqlen), STEP_SLOTS, **options)


@BACKENDS
@pytest.mark.parametrize("layout", ["back", "ring"])
@pytest.mark.parametrize("seqlen", [None, 1, 13])
def test_the_result_may_replace_x(seqlen, layout, backend):
    """What in-place peers are made of: the state is made of x before x is overwritten."""
    x, weight, bias, pool = step(4, 6, seqlen)
    options = STEP_LAYOUTS[layout]
    want, want_pool, _ = define_update(x, weight, bias, pool, STEP_SLOTS, **options)
    call = UpdateCall(x, weight, bias, pool, STEP_SLOTS, backend=backend, **options)
    out = run(UpdateCall, tuple(call), out=x)
    assert out is x
    same_bits(x, want)
    same_bits(pool, want_pool)


@covered(
    size=[(4, None), (4, 3), (3, 13), (8, 5), (1, 2)], buffers=[None, [5, 2, 0, 4], [-1, 3, 99, 1]],
    layout=STEP_LAYOUTS, commit=[True, False], strength=3,
)  # fmt: skip
def test_windows_after_every_token(size, buffers, layout, commit, backend):
    width, seqlen = size
    buffers = None if buffers is None else torch.tensor(buffers)
    windows = torch.full((6, (seqlen or 1) + 2, width - 1, DIM), torch.nan, dtype=BF16)
    check_update(
        backend, *step(width, width + 2, seqlen), STEP_SLOTS, window_out=windows, window_indices=buffers, commit=commit,
        **STEP_LAYOUTS[layout],
    )  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("layout", STEP_LAYOUTS)
@pytest.mark.parametrize("commit", [True, False])
def test_packed_rows(layout, commit, backend):
    """Rows of 2, 0, 5 and 1 tokens and a tail of zeros."""
    starts = torch.tensor([0, 2, 2, 7, 8], dtype=torch.int32)
    weight, bias = taps(4)
    x = integers(75, DIM)
    x[8:] = torch.nan
    options = STEP_LAYOUTS[layout] | dict(query_start_loc=starts, max_seqlen=5, commit=commit)
    windows = torch.full((4, 5, 3, DIM), torch.nan)
    check_update(
        backend, x, weight, bias, new_pool(6), torch.tensor([3, 1, 0, 5]), window_out=windows, **options
    )
    check_update(backend, x, weight, bias, new_pool(6), torch.tensor([3, 1, -1, 5]), **options)


@BACKENDS
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("writes", [None, [4, 6, 8, 99]])
def test_rolling_slots_take_other_slots_and_a_residual(width, writes, backend):
    x, weight, bias, _ = step(width, seqlen=3)
    check_update(
        backend, x, weight, bias, new_pool(width + 3), STEP_SLOTS, num_accepted_tokens=torch.tensor([1, 2, 3, 9]),
        write_indices=None if writes is None else torch.tensor(writes), track_indices=torch.tensor([9, 9, 10, 11]),
        residual=integers(4, 3, DIM, seed=9),
    )  # fmt: skip


def tree(batch, nodes, seed=0):
    """Random parents, some of them out of range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, nodes + 2, (batch, nodes), generator=generator)


@covered(
    size=[(4, 1), (4, 4), (4, 9), (2, 6), (1, 3), (8, 12)], layout=STEP_LAYOUTS, given=["windows", "residual", None]
)  # fmt: skip
def test_trees(size, layout, given, backend):
    width, nodes = size
    windows = torch.full((4, nodes + 1, width - 1, DIM), torch.nan, dtype=BF16)
    parents = tree(4, nodes)
    parents[0] = torch.arange(nodes) - 1  # a chain
    options = {
        "windows": dict(window_out=windows),
        "residual": dict(residual=integers(4, nodes, DIM, seed=4)),
    }
    check_update(
        backend, *step(width, width + 1, nodes), STEP_SLOTS, tree_parents=parents, commit=False,
        **options.get(given, {}), **STEP_LAYOUTS[layout],
    )  # fmt: skip


@BACKENDS
def test_a_chain_is_a_tree(backend):
    x, weight, bias, pool = step(seqlen=6)
    windows = [torch.zeros(4, 6, 3, DIM, dtype=BF16) for _ in range(2)]
    chain = (torch.arange(6) - 1).expand(4, 6)
    options = dict(commit=False, backend=backend, activation="silu")
    one = triton_impl.causal_conv1d_update(x, weight, bias, pool, window_out=windows[0], **options)
    two = triton_impl.causal_conv1d_update(
        x, weight, bias, pool, window_out=windows[1], tree_parents=chain, **options
    )
    same_bits(one.out, two.out)
    same_bits(*windows)


# Commit


@BACKENDS
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("pad", [-1, 2])
def test_commit_moves_accepted_windows(width, pad, backend):
    """Steps, slots and buffers in and out of range; another dtype; a slot wider than the window."""
    slots, buffers, steps = [3, -1, 0, 5, 2, 7, 4], [4, 1, 99, 0, 3, 2, 1], [1, 0, 2, 2, 0, 3, -1]
    for step_dtype, pool_dtype in ((torch.int8, BF16), (torch.int64, torch.float32)):
        windows = integers(5, 3, DIM, width - 1).mT + 0.125  # strided, and rounded by bfloat16
        windows = windows.float() if pool_dtype is BF16 else windows
        pool = new_pool(width + 1, dtype=pool_dtype)
        want = pool.clone()
        for slot, buffer, step in zip(slots, buffers, steps, strict=True):
            if 0 <= slot < SLOTS and 0 <= buffer < 5 and 0 <= step < 3 and pad not in (slot, buffer):
                want[slot, : width - 1] = windows[buffer, step].to(pool_dtype)
        arguments = torch.tensor(steps, dtype=step_dtype), torch.tensor(slots), torch.tensor(buffers).int()
        same = triton_impl.commit_windows(pool, windows, *arguments, pad_slot_id=pad, backend=backend)
        assert same is pool
        same_bits(pool, want)
    rows = torch.zeros(5, dtype=torch.int32)
    pool, want = new_pool(width - 1), new_pool(width - 1)
    windows = integers(5, 3, width - 1, DIM)
    triton_impl.commit_windows(pool, windows, rows, backend=backend, pad_slot_id=pad)
    chosen = [row for row in range(5) if row != pad]
    want[chosen] = windows[chosen, 0]
    same_bits(pool, want)


@BACKENDS
@pytest.mark.parametrize("layout", ["front", "wide"])
def test_verify_and_commit_equals_the_plain_run(layout, backend):
    """Whatever number of drafts is accepted: the bits of a run that never guessed, with SiLU."""
    x, weight = torch.randn(9, DIM).to(BF16), torch.randn(DIM, 4).to(BF16)
    options = dict(activation="silu", backend=backend)
    plain_pool = torch.full((1, 3 if layout == "front" else 5, DIM), torch.nan, dtype=BF16)
    plain = triton_impl.causal_conv1d_fn(x, weight, None, plain_pool, torch.tensor([0, 9]), **options).out
    for accepted in range(4):
        pool = torch.full_like(plain_pool, torch.nan)
        out = [triton_impl.causal_conv1d_fn(x[:2], weight, None, pool, torch.tensor([0, 2]), **options).out]
        drafts = torch.full((1, 4, DIM), torch.nan, dtype=BF16)
        drafts[0, : accepted + 1] = x[2 : 3 + accepted]
        windows, before = torch.empty(1, 4, 3, DIM, dtype=BF16), pool.clone()
        result = triton_impl.causal_conv1d_update(
            drafts, weight, None, pool, window_out=windows, commit=False, **options
        )
        same_bits(pool, before)
        out.append(result.out[0, : accepted + 1])
        triton_impl.commit_windows(pool, windows, torch.tensor([accepted]), backend=backend)
        rest = x[None, 3 + accepted :]
        out.append(triton_impl.causal_conv1d_update(rest, weight, None, pool, **options).out[0])
        same_bits(torch.cat(out), plain)
        same_bits(pool[:, :3], plain_pool[:, :3])


# Residual, a part of the channels, split results

SPLITS = {"one": (20,), "three": (4, 6, 10), "eight": (1, 2, 3, 4, 4, 3, 2, 1)}


def channel_first(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@covered(
    schedule=["flat", "per_sequence"], view=["contiguous", "part", "transposed"], sizes=[None, *SPLITS]
)  # fmt: skip
def test_prefill_adds_and_splits(schedule, view, sizes, backend):
    x, weight, bias, pool, *rest = prefill(columns=6)
    options = dict(residual=integers(*x.shape, dtype=torch.float32), split_sizes=SPLITS.get(sizes))
    if view == "part":
        x, options["channel_offset"] = torch.cat([x + 1, x, x - 1], 1), DIM
        options["residual"] = torch.cat([options["residual"]] * 2, 1)[:, DIM // 2 : DIM // 2 + DIM]
    elif view == "transposed":
        x, options["residual"] = channel_first(x), channel_first(options["residual"]).to(BF16)
    want, want_pool = define_fn(x, weight, bias, pool, *rest, **options)
    result = triton_impl.causal_conv1d_fn(
        x, weight, bias, pool, *rest, backend=backend, schedule=schedule, **options
    )
    same_outputs(result.out, want, options["split_sizes"])
    same_bits(pool, want_pool)


@covered(
    rows=["single", "many", "packed"], view=["contiguous", "part", "transposed"], sizes=[None, *SPLITS]
)  # fmt: skip
def test_step_adds_and_splits(rows, view, sizes, backend):
    x, weight, bias, pool = step(seqlen=5 if rows == "many" else None, batch=9 if rows == "packed" else 4)
    options = dict(residual=integers(*x.shape, dtype=torch.float32), split_sizes=SPLITS.get(sizes))
    if rows == "packed":
        options |= dict(query_start_loc=torch.tensor([0, 2, 2, 5, 7]))
    if view == "part":
        x, options["channel_offset"] = torch.cat([x + 1, x, x - 1], -1), DIM
    elif view == "transposed":
        x, options["residual"] = channel_first(x), channel_first(options["residual"]).to(BF16)
    check_update(backend, x, weight, bias, pool, STEP_SLOTS, **options)


@BACKENDS
def test_a_call_without_a_pool_adds_and_splits(backend):
    x, weight, bias, _, starts, *_ = prefill()
    check_fn(backend, x, weight, bias, None, starts, residual=integers(*x.shape), split_sizes=(12, 8))
    check_fn(backend, x, weight, bias, None, starts, state_layout="back", empty_rows="apply")


@BACKENDS
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
def test_channel_blocks_of_the_parts(schedule, backend):
    """Parts of many blocks of channels each, which begin inside what would be a block of the whole."""
    sizes = (700, 30, 1300)
    x, (weight, bias) = integers(6, sum(sizes)), taps(4, sum(sizes))
    starts, has = torch.tensor([0, 4, 6]), torch.tensor([True, False])
    check_fn(
        backend, x, weight, bias, new_pool(3, sum(sizes), 3), starts, torch.tensor([2, 1]), has, split_sizes=sizes,
    )  # fmt: skip
    pool = new_pool(3, sum(sizes), 3)
    check_update(backend, x[:2], weight, bias, pool, torch.tensor([2, 1]), split_sizes=sizes)
    check_update(
        backend, x.view(2, 3, -1), weight, bias, pool, torch.tensor([2, 1]), split_sizes=sizes, commit=False,
        tree_parents=torch.tensor([[-1, 0, 0], [-1, -1, 1]]),
    )  # fmt: skip


# Safety


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_index_data_touches_nothing_outside(layout, backend):
    """Index data of any value: no fault; guards around the pool and the windows, and slots not named, stay."""
    generator = torch.Generator().manual_seed(3)

    def wild(*shape):
        values = torch.tensor([-(2**63), -(2**31), -5, -1, 0, 1, 2, 3, 4, 9, 24, 2**31, 2**62, 2**63 - 1])
        return values[torch.randint(len(values), shape, generator=generator)]

    ring = dict(state_layout=layout, cache_seqlens=wild(4) if layout == "ring" else None)
    for turn in range(10):
        guarded, guarded_windows = torch.full((12, 5, 16), 7.0), torch.full((9, 4, 3, 16), 7.0)
        pool, windows = guarded[4:8], guarded_windows[3:6]
        weight, slots, writes = torch.ones(16, 4), wild(4), wild(4)
        named = {*slots.tolist(), *writes.tolist()}
        if turn % 2:
            front = dict(
                snapshot_indices=wild(4, 3), snapshot_block_size=(1, 3, 2**40)[turn % 3],
                num_computed_tokens=wild(4), track_indices=wild(4), track_lengths=wild(4),
            )  # fmt: skip
            front = front if layout == "front" else {}
            for name in ("snapshot_indices", "track_indices"):
                named |= {*front[name].flatten().tolist()} if front else set()
            starts = wild(5).clamp(-(2**31), 2**31 - 1).int()
            triton_impl.causal_conv1d_fn(
                torch.ones(24, 16), weight, None, pool, starts, slots, torch.ones(4, dtype=torch.bool),
                write_indices=writes, empty_rows="apply", backend=backend, **ring, **front,
            )  # fmt: skip
        else:
            options = dict(window_out=windows, window_indices=wild(4), backend=backend)
            out = triton_impl.causal_conv1d_update(
                torch.ones(4, 3, 16), weight, None, pool, slots, write_indices=writes, **ring, **options
            ).out
            out += triton_impl.causal_conv1d_update(
                torch.ones(4, 3, 16), weight, None, pool, slots, commit=False, tree_parents=wild(4, 3), **ring, **options
            ).out  # fmt: skip
            assert not out.isnan().any()
            triton_impl.commit_windows(pool, windows, wild(4), slots, wild(4), backend=backend)
        others = [row for row in range(12) if row - 4 not in {slot for slot in named if 0 <= slot < 4}]
        assert (guarded[others] == 7).all()
        assert (guarded_windows[[0, 1, 2, 6, 7, 8]] == 7).all()


def test_a_prepared_call_is_not_reused_where_a_check_would_fail():
    x, weight, bias, pool, *rest = prefill(columns=5)
    good = dict(
        state_layout="front", write_indices=torch.tensor(ROW_SLOTS), snapshot_block_size=2, split_sizes=(12, 8),
        snapshot_indices=torch.tensor(ROW_SLOTS)[:, None] + 100, residual=torch.ones_like(x), channel_offset=0,
    )  # fmt: skip
    triton_impl.causal_conv1d_fn(x, weight, bias, pool, *rest, backend="triton", **good)
    for wrong in (
        dict(state_layout="middle"), dict(state_layout="back"), dict(state_layout="ring"), dict(channel_offset=1),
        dict(snapshot_block_size=0), dict(snapshot_block_size=None), dict(snapshot_indices=None), dict(empty_rows=""),
        dict(split_sizes=(12, 9)), dict(split_sizes=[12, 9]), dict(residual=torch.ones(3, 3)), dict(track_lengths=x),
        dict(residual=torch.ones_like(x).int()), dict(write_indices=good["write_indices"].float()),
        dict(write_indices=good["write_indices"].to("meta")),
    ):  # fmt: skip
        with pytest.raises(
            (ValueError, TypeError), match=f"{next(iter(wrong))}|snapshot_indices|snapshot_block_size"
        ):
            triton_impl.causal_conv1d_fn(x, weight, bias, pool, *rest, backend="triton", **good | wrong)
    x, weight, bias, pool = step(seqlen=3)
    good = dict(window_out=torch.zeros(4, 3, 3, DIM), commit=False, tree_parents=torch.zeros(4, 3).int())
    triton_impl.causal_conv1d_update(x, weight, bias, pool, STEP_SLOTS, backend="triton", **good)
    for wrong in (
        dict(window_out=torch.zeros(4, 2, 3, DIM)), dict(window_out=torch.zeros(3, 3, 3, DIM)), dict(commit=True),
        dict(tree_parents=torch.zeros(4, 4).int()), dict(window_indices=torch.zeros(3).int()),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            triton_impl.causal_conv1d_update(
                x, weight, bias, pool, STEP_SLOTS, backend="triton", **good | wrong
            )


@BACKENDS
def test_validate_reads_the_index_data(backend):
    x, weight, bias, pool, *rest = prefill()
    for wrong, text in (
        (dict(write_indices=torch.tensor([3, 8, 8, 0, 3, 9, 1])), "write_indices: .*distinct"),
        (dict(track_indices=torch.tensor([4, 6, 8, 10, 99, 2, 1])), "track_indices: .*in row 4, got 99"),
        (dict(snapshot_indices=torch.full((7, 1), 5), snapshot_block_size=4), "snapshot_indices: .*5"),
        (dict(cache_seqlens=torch.full((7,), -1), state_layout="ring"), "cache_seqlens: .*in row 0, got -1"),
    ):  # fmt: skip
        before = pool.clone()
        with pytest.raises(ValueError, match=text):
            triton_impl.causal_conv1d_fn(
                x, weight, bias, pool, *rest, backend=backend, validate=True, **wrong
            )
        same_bits(pool, before)
    x, weight, bias, pool = step(seqlen=2)
    windows = torch.zeros(4, 2, 3, DIM)
    for wrong, text in (
        (dict(window_out=windows, window_indices=torch.tensor([0, 1, 0, 2])), "window_indices: .*got 0 in rows 0 and 2"),
        (dict(tree_parents=torch.tensor([[-1, 1]] * 4)), r"tree_parents: .*at \[0, 1\], got 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            triton_impl.causal_conv1d_update(
                x, weight, bias, pool, STEP_SLOTS, backend=backend, validate=True, commit=False, **wrong
            )
    with pytest.raises(ValueError, match=r"accepted_steps: .*row 2, got 2"):
        triton_impl.commit_windows(
            pool, windows, torch.tensor([0, 5, 2, 1]), STEP_SLOTS, backend=backend, validate=True
        )


# Compiled, on a GPU

GPU = pytest.mark.gpu


def random(*shape, dtype=BF16, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def serving_step(batch=64, seqlen=4, dim=8192, width=4, columns=None):
    """A verify step with padding rows; 16-bit and no activation: the plain path has the same bits."""
    slots = torch.randperm(2 * batch, generator=torch.Generator().manual_seed(1)).cuda()[:batch]
    slots[batch // 2] = -1
    return dict(
        x=random(batch, seqlen, dim), weight=random(dim, width, seed=1), bias=random(dim, seed=2),
        conv_states=random(4 * batch, columns or width - 1, dim, seed=3), cache_indices=slots,
    )  # fmt: skip


def given(batch=64, seqlen=4, dim=8192, width=4):
    """What the steps below are given besides."""
    windows = dict(
        window_out=random(batch + 3, seqlen + 1, width - 1, dim, seed=4),
        window_indices=torch.arange(batch).cuda(),
    )
    lengths = torch.arange(batch, device="cuda") + seqlen
    writes = 2 * batch + torch.arange(batch, device="cuda").flip(0)
    return {
        "windows": windows | dict(commit=False),
        "tree": windows | dict(commit=False, tree_parents=tree(batch, seqlen).cuda()),
        "residual": dict(residual=random(batch, seqlen, dim, seed=5)),
        "split": dict(split_sizes=(dim // 4, dim // 4, dim - 2 * (dim // 4))),
        "uneven": dict(split_sizes=(dim - 3, 3)),
        "back": dict(state_layout="back", columns=width + 3),
        "ring": dict(state_layout="ring", cache_seqlens=lengths, columns=width + 3),
        "elsewhere": dict(write_indices=writes, track_indices=writes.flip(0) + batch),
    }


def run_both(operation, arguments):
    """Results and everything written, of the kernels and of the plain path."""
    found = []
    for backend in ("triton", "eager"):
        mine = {n: v.clone() if n in ("conv_states", "window_out") else v for n, v in arguments.items()}
        result = getattr(triton_impl, operation)(**mine, backend=backend)
        parts = result.out if isinstance(result.out, tuple) else (result.out,)
        found.append([*parts, *result[1:]])
    return found


@GPU
@pytest.mark.parametrize("name", given(2, 2, 8, 2) if torch.cuda.is_available() else [""])
@pytest.mark.parametrize(
    ("batch", "seqlen", "dim", "width"), [(64, 4, 8192, 4), (7, 1, 1040, 4), (5, 13, 6, 8)]
)
def test_compiled_steps_equal_the_plain_path(batch, seqlen, dim, width, name):
    options = dict(given(batch, seqlen, dim, width)[name])
    arguments = serving_step(batch, seqlen, dim, width, options.pop("columns", None))
    for got, want in zip(*run_both("causal_conv1d_update", arguments | options), strict=True):
        same_bits(got, want)


def serving_prefill(lengths, dim=1040, width=4, columns=None):
    rows = len(lengths)
    starts = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    return dict(
        x=random(sum(lengths) + 5, dim), weight=random(dim, width, seed=1), bias=random(dim, seed=2),
        conv_states=random(20 * rows, columns or width - 1, dim, seed=3), query_start_loc=starts,
        cache_indices=torch.arange(rows, device="cuda").flip(0),
        has_initial_state=torch.arange(rows, device="cuda") % 3 > 0,
    )  # fmt: skip


@GPU
@pytest.mark.parametrize("schedule", ["flat", "per_sequence"])
@pytest.mark.parametrize("lengths", [(2048,) * 3, (5000, *[1] * 100), (0, 0, 300), (1, 9, 2, 17, 4)])
def test_compiled_prefills_equal_the_plain_path(lengths, schedule):
    rows = len(lengths)
    row = torch.arange(rows, device="cuda")
    table = (rows + torch.arange(rows * 9, device="cuda")).view(rows, 9)
    variants = [
        dict(snapshot_indices=table, snapshot_block_size=64, num_computed_tokens=row * 13),
        dict(snapshot_indices=table, snapshot_block_size=2, track_indices=row + 12 * rows, track_lengths=row),
        dict(write_indices=row + 12 * rows, empty_rows="apply"),
        dict(residual=random(sum(lengths) + 5, 1040, seed=7), split_sizes=(16, 512, 512)),
        dict(split_sizes=(511, 529)),
        dict(state_layout="back", columns=6, write_indices=row + 12 * rows),
        dict(state_layout="ring", columns=6, cache_seqlens=row),
    ]
    for options in variants:
        arguments = serving_prefill(lengths, columns=options.pop("columns", None))
        options |= dict(schedule=schedule, max_seqlen=max(lengths))
        for got, want in zip(*run_both("causal_conv1d_fn", arguments | options), strict=True):
            same_bits(got, want)


@GPU
def test_nothing_synchronises():
    step_arguments, prefill_arguments = serving_step(), serving_prefill([100, 3, 64])
    windows, accepted = given()["windows"], torch.zeros(64, dtype=torch.int32, device="cuda")
    table = torch.arange(9, device="cuda").view(3, 3) + 10
    links = torch.full((64, 4), -1, device="cuda")

    def calls():
        triton_impl.causal_conv1d_update(**step_arguments, **windows)
        pool = step_arguments["conv_states"]
        triton_impl.commit_windows(pool, windows["window_out"], accepted, step_arguments["cache_indices"])
        parents = triton_impl.tree_parents_from_links(links, links)
        triton_impl.causal_conv1d_update(**step_arguments, **windows, tree_parents=parents)
        triton_impl.causal_conv1d_fn(
            **prefill_arguments, snapshot_indices=table, snapshot_block_size=32, split_sizes=(40, 1000)
        )

    calls()
    with no_synchronisation():
        calls()


@GPU
def test_a_captured_verify_follows_its_index_data():
    """Verify, commit, and a prefill with snapshots, captured once and replayed with other slots and steps."""
    arguments, options = serving_step(dim=1024), given(dim=1024)["windows"]
    accepted = torch.zeros(64, dtype=torch.int32, device="cuda")
    prefill_arguments = serving_prefill([40] * 8) | {"conv_states": random(160, 3, 1040, seed=9)}
    table = torch.arange(80, device="cuda").view(8, 10) + 10
    computed = torch.zeros(8, dtype=torch.int32, device="cuda")
    snapshots = dict(snapshot_indices=table, snapshot_block_size=16, num_computed_tokens=computed)

    def call(backend):
        pool = arguments["conv_states"]
        out = triton_impl.causal_conv1d_update(**arguments, **options, backend=backend).out
        triton_impl.commit_windows(
            pool, options["window_out"], accepted, arguments["cache_indices"], options["window_indices"],
            backend=backend,
        )  # fmt: skip
        return out, triton_impl.causal_conv1d_fn(**prefill_arguments, **snapshots, backend=backend).out

    call("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call("triton")
    written = arguments["conv_states"], options["window_out"], prefill_arguments["conv_states"]
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        accepted.copy_(torch.randint(-1, 4, (64,), generator=generator, device="cuda"))
        computed.copy_(torch.randint(30, (8,), generator=generator, device="cuda"))
        arguments["cache_indices"].copy_(torch.randperm(128, generator=generator, device="cuda")[:64])
        before = [tensor.clone() for tensor in written]
        want = call("eager")
        after = [tensor.clone() for tensor in written]
        for tensor, kept in zip(written, before, strict=True):
            tensor.copy_(kept)
        graph.replay()
        for one, other in zip((*got, *written), (*want, *after), strict=True):
            same_bits(one, other)


@GPU
def test_windows_past_two_to_the_31_elements():
    """Windows, and a pool, whose last entries start past 2**31 elements; a split out of 2**31 elements."""
    dim = 64
    pages = torch.empty(2**31 // (3 * 8192) + 10, 3, 8192, dtype=BF16, device="cuda")
    windows = pages[:, None, :, -dim:]
    last = windows.shape[0] - 1
    arguments = serving_step(2, 1, dim) | {"cache_indices": torch.tensor([1, 0], device="cuda")}
    buffers = torch.tensor([last, last - 1], device="cuda")
    small = torch.empty(2, 1, 3, dim, dtype=BF16, device="cuda")
    options = dict(commit=False)
    triton_impl.causal_conv1d_update(**arguments, **options, window_out=windows, window_indices=buffers)
    triton_impl.causal_conv1d_update(**arguments, **options, window_out=small)
    same_bits(windows[[last, last - 1]], small)
    pool = pages[:, :, :dim]
    triton_impl.commit_windows(pool, small, torch.zeros(2, dtype=torch.int32, device="cuda"), buffers)
    same_bits(pool[[last, last - 1]], small[:, 0])
    del pages, windows, pool
    tokens = 2**31 // 8192 + 8
    x = random(tokens, 8192, seed=3)
    starts = torch.tensor([0, tokens], device="cuda")
    weight = random(8192, 2, seed=1)
    parts = triton_impl.causal_conv1d_fn(x, weight, None, None, starts, split_sizes=(8128, 64)).out
    want = triton_impl.causal_conv1d_fn(x[-9:], weight, None, None, starts.clamp(max=9)).out[1:]
    same_bits(torch.cat([part[-8:] for part in parts], 1), want)
