"""The simulated engine: the reference survives 2,000 steps of it, and no mistake, of an implementation or of an engine, does."""

import pytest

from oracle.conformance.adapter import NumpyAdapter, reference_adapter
from oracle.conformance.commands import main
from oracle.conformance.model import Model
from oracle.conformance.mutants import MUTANTS
from oracle.conformance.traffic.engine import NEEDS, Engine, EngineFailure, run_engines
from oracle.numerics import typed

EVERYTHING = {
    "prefill", "extend", "decode", "verify_rolling", "verify_windows", "verify_trees", "verify_again", "forked", "moved",
    "preempted", "resumed", "prefix hit", "snapshots", "evicted", "tracked", "padding rows", "ended",
}  # fmt: skip


def test_the_reference_survives():
    counts = run_engines(reference_adapter(), 2000)
    assert set(counts) == set(NEEDS)
    for what in EVERYTHING:
        assert counts["front"][what] >= 20, what
    assert counts["front"]["ended"] >= 1000
    assert min(counts["back"]["ended"], counts["ring"]["ended"]) >= 50


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_model_survives_with_other_numbers(dtype):
    for layout in NEEDS:
        assert Engine(Model(), layout, seed=7, dtype=dtype).run(120)["ended"] >= 10


@pytest.mark.parametrize("layout", NEEDS)
def test_all_traffic_is_valid(layout):
    """Every call passes the checks that read its data, so what the engine compares is defined."""

    class Validates(Model):
        def run(self, op, arrays, options):
            checked = {} if op == "tree_parents_from_links" else {"validate": True}
            return super().run(op, arrays, {**options, **checked})

    assert Engine(Validates(), layout, seed=11).run(150)["ended"] >= 15


def test_a_seed_is_a_run():
    first, second, other = (Engine(reference_adapter(), seed=seed).run(30) for seed in (5, 5, 6))
    assert first == second != other


# Mistakes of an implementation that only traffic of the right kind can show, by the layout that shows them.
IMPLEMENTATIONS = {
    "front": (
        "commits-step-before", "commits-step-after", "window-before-the-token", "always-commits", "tree-is-a-chain",
        "one-parent-hop", "sibling-is-a-child", "tree-windows-in-flat-order", "snapshot-at-chunk-end",
        "snapshot-from-chunk-start", "snapshot-one-token-late", "boundary-at-chunk-end-skipped",
        "boundary-near-start-skipped", "window-gathered-from-flat-tokens", "tracked-window-starts-from-zeros",
        "short-chunk-stays-in-source", "write-slots-ignored", "reads-the-write-slot", "other-slot-gets-inputs-only",
        "window-at-column-zero", "window-one-too-far", "slot-shifts-by-all-tokens", "only-first-window-stored",
        "count-limited-by-step", "counts-skip-padding-rows", "tail-joins-last-row-of-step", "history-dropped",
        "channel-offset-ignored", "parts-of-equal-size", "short-row-stale-left", "buffer-is-row-number",
    ),
    "back": ("back-read-in-front", "only-the-window-moves", "back-shifts-by-one", "reads-the-write-slot", "always-commits"),
    "ring": ("counter-never-read", "ring-one-column-late", "ring-never-wraps", "ring-truncates-towards-zero",
             "write-slots-ignored"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "name"), [(k, name) for k, names in IMPLEMENTATIONS.items() for name in names]
)
def test_an_implementation_with_a_mistake_is_caught(layout, name):
    # what is computed at all: a mistake shows as wrong bits, or as a call that fails
    with pytest.raises((EngineFailure, ValueError, IndexError)):
        Engine(MUTANTS[name](), layout).run(400)


class CommitsOneBefore(Engine):
    """The step before the accepted one is committed."""

    def accepted(self, path):
        return path[-2] if len(path) > 1 else super().accepted(path)


class StaleSlotAfterReuse(Engine):
    """A request that starts from nothing takes what its slot's last user left."""

    def has_state(self, request):
        return True


class BoundaryOffByOne(Engine):
    """The tokens before a chunk are counted one too many."""

    def computed(self, row):
        return super().computed(row) + (row.request is not None)


class HitOneTokenTooFar(Engine):
    """A request goes on one token behind its snapshot."""

    def resume(self, request):
        source, done = super().resume(request)
        return source, done + (source is not None and done + 1 < request.known)


class CountsLost(Engine):
    """Every verify step says that one token was accepted before."""

    def count(self, row):
        return 1


class PreemptedGoesOn(Engine):
    """A request that lost its slot goes on where it was."""

    def forget(self, request):
        request.slot = -1

    def resume(self, request):
        return (None, request.done) if request.done else super().resume(request)

    def has_state(self, request):
        return request.done > 0


class EvictsWhatIsRead(Engine):
    """The newest block is given away, though a request is about to read it."""

    def evict(self):
        return self.cache.popitem()[1] if self.cache else None


class KeepsOldSlotAfterMove(Engine):
    """A request whose state went to another slot goes on in the old one."""

    def collect(self, rows, out, counts=False):
        slots = {id(row.request): row.request.slot for row in rows if row.request is not None}
        super().collect(rows, out, counts)
        for row in rows:
            if row.request is not None:
                row.request.slot = slots[id(row.request)]


class PaddingRowsTakeLiveSlots(Engine):
    """Padding rows of a decode step name the slot of a live request."""

    def arguments(self, rows, x):
        for row in rows:
            if row.request is None and row.words and self.running:
                row.read = row.write = self.running[0].slot
        return super().arguments(rows, x)


ENGINES = (CommitsOneBefore, StaleSlotAfterReuse, BoundaryOffByOne, HitOneTokenTooFar, CountsLost, PreemptedGoesOn,
           EvictsWhatIsRead, KeepsOldSlotAfterMove, PaddingRowsTakeLiveSlots)  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_an_engine_with_a_mistake_is_caught(engine):
    with pytest.raises(EngineFailure) as failure:
        engine(reference_adapter()).run(800)
    text = str(failure.value)
    assert "expected bits" in text
    assert "admitted at" in text or "forked from" in text


def test_a_wrong_bit_is_told_with_its_history():
    class OneWrongBit(Model):
        calls = 0

        def run(self, op, arrays, options):
            result = dict(super().run(op, arrays, options))
            OneWrongBit.calls += "out" in result
            if OneWrongBit.calls == 40:
                part = result["out"][0] if isinstance(result["out"], list) else result["out"]
                typed(part).bits[...] ^= 1
            return result

    with pytest.raises(
        EngineFailure, match=r"(?s)step \d+, request \d+: output of token \d+: .*step \d+: tokens"
    ):
        Engine(OneWrongBit()).run(100)


def test_what_is_not_supported_is_said():
    plain = NumpyAdapter(None, None, capabilities={"supports": ["state_layout_*", "split"]})
    with pytest.raises(
        ValueError, match="impl: expected an implementation that supports write_indices, no_commit, channel"
    ):
        Engine(plain, "back")
    with pytest.raises(
        ValueError, match=r"layout: expected one of \('front', 'back', 'ring'\), got 'middle'"
    ):
        Engine(plain, "middle")


def test_the_command(capsys):
    assert main(["engine", "--impl", "oracle.conformance.adapter:reference_adapter", "--steps", "40"]) == 0
    assert "requests, each with the bits of its plain run" in capsys.readouterr().out
    wrong = "oracle.conformance.mutants.serving:CommitsStepBefore"
    assert main(["engine", "--impl", wrong, "--steps", "200"]) == 1
    assert "FAILED: step" in capsys.readouterr().out
    assert main(["engine", "--impl", wrong, "--steps", "0"]) == 2
    assert "steps: expected at least 1" in capsys.readouterr().err
