"""Mistakes in what engines ask for besides: layouts, write slots, snapshots, windows, trees, residual, split."""

from __future__ import annotations

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray, round_bits, to_float64

# Layouts of a slot.


@mutant("circular-buffer-ignored")
class CounterNeverRead(Mutant):
    """The counter of a ring is taken as 0."""

    def seen(self, call, row):
        return 0


@mutant("circular-buffer-ignored")
class RingOneColumnLate(Mutant):
    """Token n lives in the column after its own."""

    def ring_column(self, call, row, t):
        return super().ring_column(call, row, t + (t >= 0))


@mutant("circular-buffer-ignored")
class RingNeverWraps(Mutant):
    """Columns past the end of the slot are clamped to the last one."""

    def ring_column(self, call, row, t):
        return (
            super().ring_column(call, row, t) if t < 0 else min(self.seen(call, row) + t, call.state_len - 1)
        )


@mutant("negative-ring-position")
class RingTruncatesTowardsZero(Mutant):
    """The remainder of a negative position is that of C, and is then clamped to 0."""

    def ring_column(self, call, row, t):
        return max(int(np.fmod(self.seen(call, row) + t, call.state_len)), 0)


@mutant("negative-ring-position")
class CounterBelowZeroUsed(Mutant):
    """A counter below 0 is used as it is."""

    def seen(self, call, row):
        return call.indices["cache_seqlens"][row.index]


@mutant("negative-ring-position")
class RingPositionIn32Bits(Mutant):
    """Positions wrap at 2**31 before the remainder is taken."""

    def ring_column(self, call, row, t):
        position = (self.seen(call, row) + t + 2**31) % 2**32 - 2**31
        return position % call.state_len


@mutant("index-dtype-narrowed")
class CounterNarrowed(Mutant):
    """64-bit counters are read as 32 bits."""

    def seen(self, call, row):
        return max((call.indices["cache_seqlens"][row.index] + 2**31) % 2**32 - 2**31, 0) % 2**31


@mutant("fresh-slot-not-cleared")
class FreshSlotKeepsOldColumns(Mutant):
    """A row without state moves its slot's old columns along."""

    def old_slot(self, call, row):
        return call.pool.bits[row.slot].copy()


@mutant("fresh-slot-not-cleared")
class FreshRingWritesOwnColumnsOnly(Mutant):
    """A row without state writes the columns of its tokens and leaves the rest of its ring."""

    def turned(self, call, row, slot):
        return super().turned(call, row, call.pool.bits[row.slot].copy() if not row.has else slot)


@mutant("back-slot-partly-moved")
class OnlyTheWindowMoves(Mutant):
    """The window at the slot's end is replaced; the columns before it stay."""

    def shifted(self, call, row, slot):
        moved = super().shifted(call, row, slot)
        kept = call.state_len - call.history
        return np.concatenate([slot[:kept], moved[kept:]])


@mutant("back-slot-partly-moved")
class BackReadInFront(Mutant):
    """The window is read from the slot's first columns in every layout."""

    def window_columns(self, call, row):
        return list(range(call.history)) if call.layout == "back" else super().window_columns(call, row)


@mutant("back-slot-partly-moved")
class BackShiftsByOne(Mutant):
    """A slot moves by one column whatever arrives."""

    def shifted(self, call, row, slot):
        arrived = self.cast(call, self.inputs(call, row).bits)
        return np.concatenate([slot[1:], arrived[-1:]]) if len(arrived) and len(slot) else slot


# Slots that are read and slots that are written.


@mutant("short-chunk-written-to-source-block")
class ShortChunkStaysInSource(Mutant):
    """A chunk shorter than the window is written to the slot that was read."""

    def target(self, call, row):
        return row.slot if row.count < call.history else super().target(call, row)


@mutant("short-chunk-written-to-source-block")
class WriteSlotsIgnored(Mutant):
    """The new state always goes to the slot that was read."""

    def target(self, call, row):
        return row.slot


@mutant("cross-block-migration")
class ReadsTheWriteSlot(Mutant):
    """The state is read from the slot that will be written."""

    def slot(self, call, i):
        target = call.indices.get("write_indices", call.slots)[i]
        return call.slots[i] if self.padding(call, target) else target


@mutant("cross-block-migration")
class OtherSlotGetsInputsOnly(Mutant):
    """In another slot only the new tokens are written; the part of the old window is left out."""

    def store(self, call, row, target, state):
        kept = len(state) - row.count if target != row.slot else 0
        if kept > 0:
            call.pool.bits[target, kept : len(state)] = state[kept:]
        else:
            super().store(call, row, target, state)


@mutant("pad-slot-not-skipped")
class WriteSlotDecidesPadding(Mutant):
    """A row is skipped if its write slot is padding."""

    def live(self, call, row):
        target = call.indices.get("write_indices", call.slots)[row.index]
        return super().live(call, row) and (call.pool is None or not self.padding(call, target))


# Snapshots and tracked windows.


@mutant("boundary-snapshot-wrong")
class SnapshotAtChunkEnd(Mutant):
    """A block gets the window at the chunk's end."""

    def snapshots(self, call, row):
        return [(slot, row.count) for slot, _ in super().snapshots(call, row)]


@mutant("boundary-snapshot-wrong")
class SnapshotFromChunkStart(Mutant):
    """Boundaries are counted from the chunk's start."""

    def computed(self, call, row):
        return 0


@mutant("boundary-snapshot-wrong")
class SnapshotOneTokenLate(Mutant):
    """The window ends one token after the boundary, where there is one."""

    def snapshots(self, call, row):
        return [(slot, min(after + 1, row.count)) for slot, after in super().snapshots(call, row)]


@mutant("boundary-snapshot-wrong")
class BoundaryAtChunkEndSkipped(Mutant):
    """A boundary at the very end of the chunk is left to the next one."""

    def snapshots(self, call, row):
        return [(slot, after) for slot, after in super().snapshots(call, row) if after < row.count]


@mutant("boundary-snapshot-wrong")
class BoundaryNearStartSkipped(Mutant):
    """A boundary nearer to the chunk's start than the window is long gets no snapshot."""

    def snapshots(self, call, row):
        return [(slot, after) for slot, after in super().snapshots(call, row) if after >= call.history]


@mutant("boundary-snapshot-wrong")
class LastBoundaryOnly(Mutant):
    """Of several boundaries in a chunk the last one is stored."""

    def snapshots(self, call, row):
        return super().snapshots(call, row)[-1:]


@mutant("tracked-window-from-flat-tokens")
class WindowGatheredFromFlatTokens(Mutant):
    """A snapshot or tracked window is gathered from x, the start clamped to 0: near a row's start, from other rows."""

    def window_after(self, call, row, window, after):
        end = row.start + after
        at = np.clip(np.arange(end - call.history, end), 0, max(len(call.x.data) - 1, 0))
        return self.cast(call, TypedArray(call.x.dtype, call.x.data[at]).bits)


@mutant("tracked-window-from-flat-tokens")
class TrackedWindowStartsFromZeros(Mutant):
    """Near the row's start the old window counts as zeros."""

    def window_after(self, call, row, window, after):
        got = super().window_after(call, row, window, after).copy()
        got[: max(call.history - after, 0)] = 0
        return got


@mutant("offsets-trusted")
class TrackedLengthNotClamped(Mutant):
    """A tracked length beyond the row is used as it is."""

    def tracked(self, call, row):
        lengths = call.indices.get("track_lengths")
        if lengths is None:
            return super().tracked(call, row)
        at = min(max(row.start + lengths[row.index] - row.start, 0), len(call.x.data) - row.start)
        return [(call.indices["track_indices"][row.index], at)]

    def window_after(self, call, row, window, after):
        tokens = TypedArray(call.x.dtype, call.x.data[row.start :])
        return np.concatenate([window.bits, self.cast(call, tokens.bits)])[after : after + call.history]


# Rows of no tokens.


@mutant("empty-row-rule-ignored")
class EmptyRowsAlwaysSkipped(Mutant):
    """empty_rows does nothing."""

    def applies(self, call):
        return False


@mutant("empty-row-rule-ignored")
class EmptyRowsAlwaysCleared(Mutant):
    """A row of no tokens clears its window even if it has a state."""

    def window(self, call, row):
        window = super().window(call, row)
        return TypedArray(window.dtype, np.zeros_like(window.data)) if not row.count else window


@mutant("empty-row-rule-ignored")
class EmptyRowsNeverCopied(Mutant):
    """A row of no tokens with a state does not reach its write slot."""

    def target(self, call, row):
        return row.slot if row.has and not row.count else super().target(call, row)


# Windows per step.


@mutant("verify-commits-state")
class AlwaysCommits(Mutant):
    """The slot moves on although the call says not to."""

    def commits(self, call):
        return True


@mutant("verify-commits-state")
class NoCommitSharedSlotSkipped(Mutant):
    """Of several rows that read one slot the first one is computed."""

    def live(self, call, row):
        return super().live(call, row) and row.slot not in call.slots[: row.index]


@mutant("window-buffer-aliasing")
class WindowBeforeTheToken(Mutant):
    """Step t holds the window that token t saw."""

    def step_window(self, call, row, window, t):
        if t or call.history == 0:
            return super().step_window(call, row, window, t - 1)
        return self.cast_to_windows(call, window)

    def cast_to_windows(self, call, window):
        return round_bits(to_float64(window.bits, window.dtype), call.windows.dtype)


@mutant("window-buffer-aliasing")
class WindowsShareColumns(Mutant):
    """The windows of a buffer lie one entry apart and overlap."""

    def save_step(self, call, row, buffer, t, window):
        flat = call.windows.bits[buffer].reshape(-1, call.windows.shape[3])
        flat[t : t + len(window)] = window
        call.windows.bits[buffer] = flat.reshape(call.windows.bits[buffer].shape)


@mutant("window-buffer-aliasing")
class OnlyTheLastWindow(Mutant):
    """Only the window after the last token is saved."""

    def save_step(self, call, row, buffer, t, window):
        if t == row.count - 1:
            super().save_step(call, row, buffer, t, window)


@mutant("window-buffer-aliasing")
class BufferIsRowNumber(Mutant):
    """Windows go to the buffer of the row's number."""

    def buffer(self, call, row):
        return row.index if row.index < call.windows.shape[0] else None


@mutant("commit-wrong-step")
class CommitsStepBefore(Mutant):
    """The window before the accepted one is committed."""

    def step(self, step):
        return max(step - 1, 0) if step >= 0 else step


@mutant("commit-wrong-step")
class CommitsStepAfter(Mutant):
    """The number of accepted tokens is taken for the step's."""

    def step(self, step):
        return step + 1 if step >= 0 else step


@mutant("commit-wrong-step")
class NothingAcceptedCommitsFirst(Mutant):
    """A row without an accepted step commits step 0."""

    def step(self, step):
        return max(step, 0)


@mutant("index-dtype-narrowed")
class AcceptedStepNarrowed(Mutant):
    """64-bit steps are read as 32 bits."""

    def step(self, step):
        return (step + 2**31) % 2**32 - 2**31


# Draft trees.


@mutant("tree-uses-flat-order")
class TreeIsAChain(Mutant):
    """A node sees the node before it in memory."""

    def parent(self, call, row, node):
        return node - 1


@mutant("tree-uses-flat-order")
class OneParentHop(Mutant):
    """Behind a node's parent comes the node before that in memory."""

    def chain(self, call, row, node):
        path = [node, self.parent(call, row, node)]
        while path[-1] >= 0 and len(path) <= call.history:
            path.append(path[-1] - 1)
        path = [i for i in path if i >= 0][: call.history + 1]
        before = call.history + 1 - len(path)
        return [*range(call.history - before, call.history), *(call.history + i for i in reversed(path))]


@mutant("tree-uses-flat-order")
class BranchesStartFromZeroNode(Mutant):
    """A node without a parent hangs on node 0."""

    def parent(self, call, row, node):
        return max(super().parent(call, row, node), 0) if node else -1


@mutant("tree-uses-flat-order")
class TreeWindowsInFlatOrder(Mutant):
    """Outputs follow the tree, windows the order in memory."""

    def step_window(self, call, row, window, t):
        kept = dict(call.indices)
        call.indices.pop("tree_parents", None)
        flat = super().step_window(call, row, window, t)
        call.indices = kept
        return flat


@mutant("tree-links-misread")
class SiblingIsAChild(Mutant):
    """A sibling is taken for a child of its elder sibling."""

    def parents(self, children, siblings):
        parents = super().parents(children, siblings)
        for node, sibling in enumerate(siblings):
            if node < sibling < len(parents):
                parents[sibling] = node
        return parents


@mutant("tree-links-misread")
class ChildrenOfTheRootOnly(Mutant):
    """Siblings beyond the first are left on the root."""

    def parents(self, children, siblings):
        return super().parents(children, [-1] * len(siblings))


@mutant("tree-links-misread")
class LinksBackwardsFollowed(Mutant):
    """A link to a node of a smaller number, or to the node itself, counts."""

    def parents(self, children, siblings):
        parents = super().parents(children, siblings)
        for node, child in enumerate(children):
            if 0 <= child <= node:
                parents[child] = node
        return parents


# Residual, projection, parts.


@mutant("residual-misapplied")
class ResidualDropped(Mutant):
    """The residual is not added."""

    def add_residual(self, call, row, out):
        return out


@mutant("residual-misapplied")
class ResidualBeforeActivation(Mutant):
    """The residual is added to the sum, before the activation."""

    def activate(self, call, row, pre):
        if call.residual is not None:
            pre = pre + call.residual[row.start : row.stop]
        return super().activate(call, row, pre)

    def add_residual(self, call, row, out):
        return out


@mutant("residual-misapplied")
class ResidualAfterRounding(Mutant):
    """The result is rounded, then the residual is added and the sum rounded again."""

    def add_residual(self, call, row, out):
        dtype = call.x.dtype
        return super().add_residual(call, row, to_float64(round_bits(out, dtype), dtype))


@mutant("residual-misapplied")
class ResidualOfTheFirstRows(Mutant):
    """A row's residual is read from the beginning."""

    def add_residual(self, call, row, out):
        if call.residual is None:
            return out
        return out + call.residual[: row.count]


@mutant("split-misplaced")
class PartsOfEqualSize(Mutant):
    """Part i begins at i times its own size."""

    def parts(self, call, out):
        sizes = call.given.get("split_sizes")
        if sizes is None:
            return out
        dim = out.shape[-1]
        at = [min(i * size, dim - size) for i, size in enumerate(sizes)]
        return [
            TypedArray(out.dtype, np.ascontiguousarray(out.data[..., first : first + size]))
            for first, size in zip(at, sizes, strict=True)
        ]


@mutant("split-misplaced")
class PartsInOtherOrder(Mutant):
    """The parts are cut from the end."""

    def parts(self, call, out):
        parts = super().parts(call, TypedArray(out.dtype, out.data[..., ::-1]))
        return parts if isinstance(parts, list) else out


@mutant("split-misplaced")
class ChannelOffsetIgnored(Mutant):
    """The input is the first channels of x."""

    def first_channel(self, given):
        return 0


@mutant("split-misplaced")
class SplitForgotten(Mutant):
    """The result is one array."""

    def parts(self, call, out):
        return out
