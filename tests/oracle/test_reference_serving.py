"""The reference's serving arguments against definitions that are not its own.

Layouts, write slots and snapshots against whole sequences, convolved by numpy.convolve, of which the slots are looked
up afterwards; trees against every path from the root, listed by brute force; the rest by hand.
"""

import itertools
import json

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from oracle import numerics, reference
from oracle.conformance.adapter import reference_adapter
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.catalogue import fn as fn_case
from oracle.conformance.catalogue import update as update_case
from oracle.conformance.judge import Promises, promises_of
from oracle.conformance.model import Model
from oracle.conformance.mutants import MUTANTS
from oracle.conformance.worker import run_case
from oracle.contract import ConvOutput, ConvWindowOutput
from oracle.numerics import TypedArray
from tests.tools.serving_brute_force import brute_force

RNG = np.random.default_rng(11)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def convolved(history, weight, bias):
    """Outputs of a whole sequence that begins with zeros, channel by channel; [tokens, dim] in float64."""
    width = weight.shape[1]
    padded = np.concatenate([np.zeros((width - 1, history.shape[1])), history.astype(np.float64)])
    columns = [
        np.convolve(padded[:, d], weight[d, ::-1].astype(np.float64), mode="valid")
        for d in range(len(weight))
    ]
    return np.stack(columns, axis=1) + bias


def last(history, count, dim):
    """The last `count` inputs of a sequence that begins with zeros."""
    return np.concatenate([np.zeros((count, dim), np.float32), history])[len(history) :]


class Sequence:
    """A whole sequence and how far it has come."""

    def __init__(self, slot, tokens, dim):
        self.slot, self.done, self.inputs = slot, 0, draw(tokens, dim)

    def take(self, count):
        part = self.inputs[self.done : self.done + count]
        self.done += len(part)
        return part

    @property
    def past(self):
        return self.inputs[: self.done]


def expected_slot(layout, sequence, state_len, width, dim):
    """What a slot holds after `sequence.past`, by definition; NaN where it may hold anything."""
    slot = np.full((state_len, dim), np.nan, np.float32)
    if layout == "front":
        slot[: width - 1] = last(sequence.past, width - 1, dim)
    elif layout == "back":
        slot[:] = last(sequence.past, state_len, dim)
    else:
        slot[:] = 0
        for position, entry in enumerate(sequence.past):
            slot[position % state_len] = entry
    return slot


@pytest.mark.parametrize("layout", ["front", "back", "ring"])
@pytest.mark.parametrize(("width", "state_len"), [(4, 3), (4, 4), (4, 9), (2, 1), (1, 2), (8, 7)])
def test_layouts_against_whole_sequences(layout, width, state_len):
    """Chunks, steps and steps of several tokens, each moving its sequence to another slot."""
    dim, weight, bias = 3, draw(3, width), draw(3)
    sequences = [Sequence(slot, 30, dim) for slot in (0, 2, 4)]
    pool = np.full((6, state_len, dim), np.nan, np.float32)
    outs = [[], [], []]
    for step in range(12):
        counts = RNG.integers(0, 6, 3).tolist()
        before = [sequence.done for sequence in sequences]
        parts = [sequence.take(count) for sequence, count in zip(sequences, counts, strict=True)]
        offsets = np.cumsum([0] + [len(part) for part in parts])
        slots = np.array([sequence.slot for sequence in sequences])
        more = {"state_layout": layout, "write_indices": slots ^ 1}
        if layout == "ring":
            more["cache_seqlens"] = np.array(before)
        x = np.concatenate(parts)
        if step % 2 and min(before) > 0:
            out, pool = reference.causal_conv1d_update(
                x, weight, bias, pool, slots, query_start_loc=offsets, **more
            )
        else:
            has = np.array(before) > 0
            out, pool = reference.causal_conv1d_fn(x, weight, bias, pool, offsets, slots, has, **more)
        for i, sequence in enumerate(sequences):
            outs[i].append(out[offsets[i] : offsets[i + 1]])
            if len(parts[i]):
                sequence.slot ^= 1
            if sequence.done:
                want = expected_slot(layout, sequence, state_len, width, dim)
                known = ~np.isnan(want)
                np.testing.assert_array_equal(pool[sequence.slot][known], want[known])
    for sequence, parts in zip(sequences, outs, strict=True):
        got = np.concatenate(parts)
        assert len(got) >= 10
        np.testing.assert_allclose(got, convolved(sequence.past, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("width", "block"), [(4, 8), (4, 1), (4, 3), (8, 2), (1, 4), (2, 5)])
def test_snapshots_against_whole_sequences(width, block):
    """Every block's slot holds the window at its end, however the sequence is cut; a tracked slot its own."""
    dim, weight, tokens = 2, draw(2, width), 29
    blocks = tokens // block
    for seed in range(4):
        cuts = np.random.default_rng(seed)
        sequences = [Sequence(0, tokens, dim), Sequence(1, tokens - block // 2, dim)]
        indices = 4 + np.arange(2 * blocks).reshape(2, blocks)
        pool = np.full((4 + 2 * blocks, width - 1, dim), np.nan, np.float32)
        while any(s.done < len(s.inputs) for s in sequences):
            before = [s.done for s in sequences]
            parts = [s.take(cuts.integers(0, 12)) for s in sequences]
            lengths = np.array([cuts.integers(0, len(part) + 1) for part in parts])
            _, pool = reference.causal_conv1d_fn(
                np.concatenate(parts), weight, None, pool, np.cumsum([0] + [len(part) for part in parts]), np.array([0, 1]),
                np.array(before) > 0, snapshot_indices=indices, snapshot_block_size=block,
                num_computed_tokens=np.array(before), track_indices=np.array([2, 3]), track_lengths=lengths,
            )  # fmt: skip
            for i, sequence in enumerate(sequences):
                if len(parts[i]):
                    tracked = sequence.inputs[: before[i] + lengths[i]]
                    np.testing.assert_array_equal(pool[2 + i], last(tracked, width - 1, dim))
        for i, sequence in enumerate(sequences):
            for k in range(blocks):
                end = (k + 1) * block
                if end <= len(sequence.inputs):
                    want = last(sequence.inputs[:end], width - 1, dim)
                    np.testing.assert_array_equal(pool[indices[i, k]], want)
                else:
                    assert np.isnan(pool[indices[i, k]]).all()


def paths(parents):
    """Every node's path from its root, listed by trying every sequence of nodes up to the node."""
    found = {}
    for node in range(len(parents)):
        for size in range(1, len(parents) + 1):
            for nodes in itertools.combinations(range(node + 1), size):
                starts = nodes[0] == 0 or parents[nodes[0]] < 0
                linked = all(parents[child] == parent for parent, child in itertools.pairwise(nodes))
                if nodes[-1] == node and starts and linked:
                    found[node] = nodes
    return found


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_trees_against_every_path(width):
    """A node's output and window are those of a chain of its path, fed token by token."""
    dim, nodes, weight, bias = 2, 7, draw(2, width), draw(2)
    for _ in range(6):
        parents = np.array(
            [[-1] + [int(RNG.integers(-1, node)) for node in range(1, nodes)] for _ in range(2)]
        )
        x, pool = draw(2, nodes, dim), draw(3, width + 1, dim)
        slots = np.array([2, 0])
        windows = np.zeros((2, nodes, width - 1, dim), np.float32)
        result = reference.causal_conv1d_update(
            x,
            weight,
            bias,
            pool,
            slots,
            tree_parents=parents,
            window_out=windows,
            commit=False,
            activation="silu",
        )
        assert isinstance(result, ConvWindowOutput)
        np.testing.assert_array_equal(result.conv_states, pool)
        for row in range(2):
            listed = paths(parents[row].tolist())
            assert sorted(listed) == list(range(nodes))
            for node, path in listed.items():
                states = pool
                for step in path:
                    out, states = reference.causal_conv1d_update(
                        x[row : row + 1, step], weight, bias, states, slots[row : row + 1], activation="silu"
                    )
                np.testing.assert_array_equal(result.out[row, node], out[0])
                np.testing.assert_array_equal(result.window_out[row, node], states[slots[row], : width - 1])


def test_a_tree_by_hand():
    """Weights 1, 10, 100, 1000: the digits of an output are its taps, newest first."""
    weight, pool = np.array([[1.0, 10, 100, 1000]], np.float32), np.array([[[7.0], [8], [9]]], np.float32)
    x = np.array([[[1.0], [2], [3], [4], [5]]], np.float32)
    parents = np.array([[-1, 0, 0, 1, -1]])
    out, _ = reference.causal_conv1d_update(x, weight, None, pool, tree_parents=parents, commit=False)
    #  node 2 sees node 0 and not node 1; node 3 its whole path; node 4 the slot again
    np.testing.assert_array_equal(out[0, :, 0], [1987, 2198, 3198, 4219, 5987])
    wild = np.array([[3, 99, 0, 1, -5]])  # node 0 has no parent; a parent is at most the node before
    again, _ = reference.causal_conv1d_update(x, weight, None, pool, tree_parents=wild, commit=False)
    np.testing.assert_array_equal(again, out)


def test_links_by_hand():
    """0 has children 1 and 2, 1 has 3, 2 has 4 and 5; in the second row nobody names 3."""
    children = np.array([[1, 3, 4, -1, -1, -1], [1, 2, -1, -1, 5, 0]])
    siblings = np.array([[-1, 2, -1, -1, 5, -1], [-1, -1, -1, 4, 9, 2]])
    parents = reference.tree_parents_from_links(children, siblings)
    np.testing.assert_array_equal(parents, [[-1, 0, 0, 1, 2, 2], [-1, 0, 1, 0, 0, 4]])
    assert parents.dtype == np.int32
    assert reference.tree_parents_from_links(np.zeros((0, 3), int), np.zeros((0, 3), int)).shape == (0, 3)
    assert reference.tree_parents_from_links(np.zeros((2, 0), int), np.zeros((2, 0), int)).shape == (2, 0)


def test_links_are_the_inverse_of_parents():
    for _ in range(50):
        parents = [-1] + [int(RNG.integers(0, node)) for node in range(1, 12)]
        children, siblings = np.full((2, 1, 12), -1)
        for node in range(12):
            own = [child for child in range(12) if parents[child] == node]
            if own:
                children[0, node] = own[0]
                siblings[0, own[:-1]] = own[1:]
        np.testing.assert_array_equal(reference.tree_parents_from_links(children, siblings)[0], parents)


def test_windows_and_a_commit_by_hand():
    weight = np.zeros((1, 3), np.float32)
    pool = np.array([[[1.0], [2], [9]], [[3.0], [4], [9]]], np.float32)
    x = np.array([[[5.0], [6]], [[7.0], [8]]], np.float32)
    windows = np.zeros((3, 2, 2, 1), np.float32)
    _, states, windows = reference.causal_conv1d_update(
        x, weight, None, pool, window_out=windows, window_indices=np.array([2, 0]), commit=False
    )
    np.testing.assert_array_equal(states, pool)
    np.testing.assert_array_equal(windows[..., 0], [[[4, 7], [7, 8]], [[0, 0], [0, 0]], [[2, 5], [5, 6]]])
    steps = np.array([0, 1])
    moved = reference.commit_windows(pool, windows, steps, np.array([1, 0]), np.array([2, 0]))
    np.testing.assert_array_equal(moved[..., 0], [[7, 8, 9], [2, 5, 9]])
    still = reference.commit_windows(pool, windows, np.array([-1, 2]), np.array([1, 0]), np.array([2, 0]))
    np.testing.assert_array_equal(still, pool)
    with pytest.raises(ValueError, match="accepted_steps: expected less than 2 steps in row 1, got 2"):
        reference.commit_windows(pool, windows, np.array([-1, 2]), validate=True)


def test_residual_and_parts_by_hand():
    x = np.array([[9.0, 1, 2, 9], [9, 3, 4, 9]], np.float32)
    weight, residual = np.array([[0.0, 1], [1, 1]], np.float32), np.array([[10.0, 20], [30, 40]], np.float32)
    out, states = reference.causal_conv1d_fn(
        x, weight, None, None, np.array([0, 2]), residual=residual, channel_offset=1, split_sizes=(1, 1)
    )
    assert states is None
    np.testing.assert_array_equal(out[0], [[11], [33]])
    np.testing.assert_array_equal(out[1], [[22], [46]])
    half = reference.causal_conv1d_fn(
        numerics.rounded(np.array([[1.0]]), "bfloat16"), np.ones((1, 1), np.float32), np.array([2.0**-9], np.float32), None,
        np.array([0, 1]), residual=np.array([[2.0**-9]], np.float32),
    ).out  # fmt: skip
    # A sum of 1 + 2**-8 is a tie, which goes to 1; one of 1 + 3 * 2**-9 is not, though each of its two parts alone is lost.
    assert half.values() == 1.0
    more = reference.causal_conv1d_fn(
        numerics.rounded(np.array([[1.0]]), "bfloat16"), np.ones((1, 1), np.float32), np.array([2.0**-9], np.float32), None,
        np.array([0, 1]), residual=np.array([[2.0**-8]], np.float32),
    ).out  # fmt: skip
    assert more.values() == 1.0 + 2.0**-7


def test_empty_rows_by_hand():
    pool = np.arange(1.0, 10).astype(np.float32).reshape(3, 3, 1)
    x, weight = np.zeros((0, 1), np.float32), np.ones((1, 3), np.float32)
    call = (x, weight, None, pool, np.array([0, 0, 0]), np.array([0, 1]), np.array([False, True]))
    np.testing.assert_array_equal(reference.causal_conv1d_fn(*call).conv_states, pool)
    cleared = reference.causal_conv1d_fn(*call, empty_rows="apply").conv_states
    np.testing.assert_array_equal(cleared[..., 0], [[0, 0, 3], [4, 5, 6], [7, 8, 9]])
    copied = reference.causal_conv1d_fn(
        *call, empty_rows="apply", write_indices=np.array([-1, 2])
    ).conv_states
    np.testing.assert_array_equal(copied[..., 0], [[1, 2, 3], [4, 5, 6], [4, 5, 9]])
    whole = reference.causal_conv1d_fn(*call, empty_rows="apply", state_layout="back").conv_states
    np.testing.assert_array_equal(whole[..., 0], [[0, 0, 0], [4, 5, 6], [7, 8, 9]])


def test_results_keep_their_types():
    x, weight, pool = draw(1, 1), draw(1, 2), draw(1, 1, 1)
    assert isinstance(reference.causal_conv1d_update(x, weight, None, pool), ConvOutput)
    with_windows = reference.causal_conv1d_update(x, weight, None, pool, window_out=draw(1, 1, 1, 1))
    assert isinstance(with_windows, ConvWindowOutput)


@pytest.mark.parametrize("case", [c for c in select(catalogue()) if c.serving], ids=lambda case: case.id)
def test_the_reference_passes_its_own_suite(case):
    """The judge, `touched` and the reference agree on every case of the serving arguments."""
    adapter = reference_adapter()
    if "backend" in case.options:
        pytest.skip("the reference ignores the name of a backend")
    verdict = run_case(adapter, case, promises_of(adapter))
    assert verdict.status == "passed", verdict.detail


@st.composite
def calls(draw):
    """A random valid call with any mixture of the serving arguments that may be combined, as a case."""
    width, layout = draw(st.integers(1, 5)), draw(st.sampled_from(("front", "front", "back", "ring")))
    rows, dim = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    state_len = width - 1 + draw(st.integers(0, 4))
    kind = draw(st.sampled_from(("prefill", "prefill", "packed", "dense", "rolling", "tree")))
    longest = draw(st.integers(0, 9 if kind == "prefill" else 4))
    lengths = tuple(draw(st.integers(0, longest)) for _ in range(rows))
    # Slots: those that are read come first; everything that is written is drawn from the rest without repeats.
    slots = tuple(draw(st.sampled_from((0, 1, 2, 3, -1, 60))) for _ in range(rows))
    fresh = iter(draw(st.permutations(range(4, 59))))

    def targets(count):
        return tuple(draw(st.sampled_from((next(fresh), next(fresh), -1, 77))) for _ in range(count))

    args, options = {"write_indices": targets(rows)}, {"activation": draw(st.sampled_from((None, "silu")))}
    if layout != "front":
        options["state_layout"] = layout
    if layout == "ring":
        args["cache_seqlens"] = tuple(draw(st.integers(-2, 30)) for _ in range(rows))
    if draw(st.booleans()):
        args["channels"], options["channel_offset"] = dim + 3, draw(st.integers(0, 3))
    if draw(st.booleans()):
        args["residual"] = True
    if dim > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, dim - 1))
        options["split_sizes"] = (cut, dim - cut)
    if layout == "front" and draw(st.booleans()):
        args["track_indices"] = targets(rows)
    common = {"dim": dim, "width": width, "slots": slots, "num_slots": 60, "state_len": state_len, "lengths": lengths,
              "tail": draw(st.integers(0, 2)), "args": args, "options": options,
              "dtype": draw(st.sampled_from(("bfloat16", "float32"))),
              "dtypes": {"conv_states": draw(st.sampled_from(("bfloat16", "float16", "float32")))}}  # fmt: skip
    if kind == "prefill":
        if draw(st.booleans()):
            options["empty_rows"] = "apply"
        if "track_indices" in args and draw(st.booleans()):
            args["track_lengths"] = tuple(draw(st.integers(-1, longest + 1)) for _ in range(rows))
        if layout == "front" and draw(st.booleans()):
            options["snapshot_block_size"] = draw(st.integers(1, 5))
            args["snapshot_indices"] = tuple(targets(4) for _ in range(rows))
            args["num_computed_tokens"] = tuple(draw(st.integers(-1, 12)) for _ in range(rows))
        return fn_case("drawn", has=tuple(draw(st.booleans()) for _ in range(rows)), **common)
    if kind == "rolling" and layout == "front" and state_len >= width - 2 + longest:
        common["counts"] = tuple(draw(st.integers(-1, 9)) for _ in range(rows))
        return update_case("drawn", **common)
    if draw(st.booleans()):
        args["window_out"], options["max_seqlen"] = (5, longest + draw(st.integers(0, 1))), longest
        args["window_indices"] = draw(st.permutations((-1, 0, 1, 3, 9)))[:rows]
    if kind in ("dense", "tree"):
        for name in ("lengths", "tail"):
            del common[name]
        options.pop("max_seqlen", None)
        common |= {"batch": rows, "seqlen": longest}
    if kind == "tree":
        args["tree_parents"] = tuple(
            tuple(draw(st.integers(-2, 5)) for _ in range(longest)) for _ in range(rows)
        )
    if kind == "tree" or draw(st.booleans()):
        options["commit"] = False
    if not options.get("commit", True):
        args.pop("write_indices"), args.pop("track_indices", None)
    return update_case("drawn", **common)


class WrittenOut:
    """The definition in tests/tools, in float64, as an implementation."""

    name, version = "written-out", "0"

    def capabilities(self):
        return {"supports": ["*"]}

    def run(self, op, arrays, options):
        given = {k: a.typed for k, a in arrays.items() if a is not None} | dict(options)
        x, pool, windows = given.pop("x"), given.pop("conv_states"), given.get("window_out")
        flat = x.values().reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        starts = given.pop("query_start_loc", None)
        starts = (
            np.arange(len(x.data) + 1) * (x.shape[1] if x.data.ndim == 3 else 1)
            if starts is None
            else starts.data
        )
        has = given.pop("has_initial_state", None)
        if op == "causal_conv1d_fn":
            has = np.zeros(len(starts) - 1, bool) if has is None else has.data
        activation, _ = given.pop("activation", None), given.pop("max_seqlen", None)
        residual, sizes = given.pop("residual", None), given.pop("split_sizes", None)
        weight, bias, slots = (given.pop(name, None) for name in ("weight", "bias", "cache_indices"))
        rest = {k: v.data if isinstance(v, TypedArray) else v for k, v in given.items() if k != "window_out"}
        rest |= {"window_out": None if windows is None else windows.values()}
        call = {"starts": starts, "slots": None if slots is None else slots.data, "has": has, **rest}
        bias = None if bias is None else bias.values()
        pre, new, kept = brute_force(flat, weight.values(), bias, pool.values(), **call)
        out = numerics.silu(pre) if activation else pre
        if residual is not None:  # of the rows that are computed
            added = residual.values().reshape(pre.shape)
            out = (
                out
                + brute_force(
                    0 * np.nan_to_num(flat), 0 * weight.values(), None, pool.values(), **call, residual=added
                )[0]
            )
        result = numerics.rounded(out.reshape(*x.shape[:-1], pre.shape[1]), x.dtype)
        return {
            "out": result if sizes is None else [TypedArray(x.dtype, a) for a in np.split(result.data, np.cumsum(sizes)[:-1], -1)],
            "conv_states": unless_same(pool, new), "window_out": unless_same(windows, kept),
        }  # fmt: skip


def unless_same(before, values):
    """Values rounded to the dtype of an array; bits of the array where nothing changed, NaN payloads included."""
    if before is None:
        return None
    same = (before.values() == values) | (np.isnan(before.values()) & np.isnan(values))
    after = numerics.rounded(values, before.dtype)
    return numerics.from_bits(np.where(same, before.bits, after.bits), before.dtype)


@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(calls())
def test_two_implementations_agree(case):
    """The call written out token by token is a second implementation; the judge compares it, and the model, with it."""
    for adapter, promises in ((Model(), Promises()), (WrittenOut(), Promises(bit_exact=False))):
        verdict = run_case(adapter, case, promises)
        assert verdict.status == "passed", f"{adapter.name}: {verdict.detail}\n{json.dumps(case.to_json())}"


@pytest.mark.parametrize(
    "name",
    ["snapshot-one-token-late", "tracked-length-not-clamped", "tree-is-a-chain", "fresh-slot-keeps-old-columns",
     "ring-never-wraps", "residual-dropped", "windows-share-columns", "window-one-too-far", "empty-rows-never-copied"],
)  # fmt: skip
def test_drawn_calls_find_mistakes(name):
    @settings(max_examples=400, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
    @given(calls())
    def check(case):
        assert run_case(MUTANTS[name](), case, Promises()).status == "passed"

    with pytest.raises(AssertionError):
        check()
