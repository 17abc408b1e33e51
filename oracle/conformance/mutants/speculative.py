"""Mistakes in rolling slots: which window is read, which tokens are kept, whose count is used."""

from __future__ import annotations

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray


@mutant("accepted-offset-ignored")
class WindowAtColumnZero(Mutant):
    """The window is read at column 0 whatever was accepted."""

    def column(self, call, i):
        return 0


@mutant("accepted-offset-ignored")
class WindowOneTooFar(Mutant):
    """The window begins in column `accepted` instead of one before."""

    def column(self, call, i):
        if call.counts is None:
            return 0
        return min(super().column(call, i) + 1, call.pool.shape[1] - call.history)


@mutant("shift-by-query-length")
class SlotShiftsByAllTokens(Mutant):
    """The slot drops as many columns as tokens arrive, as if all were committed."""

    def rolled(self, call, row, window, out):
        return self.new_window(call, row, window, out)


@mutant("shift-by-query-length")
class SlotShiftsByAccepted(Mutant):
    """The window is moved on by as many entries as were accepted, not by one."""

    def rolled(self, call, row, window, out):
        left = super().rolled(call, row, window, out)
        return np.concatenate(
            [left[min(row.column, len(left) - 1) :], left[: min(row.column, len(left) - 1)]]
        )


@mutant("rollback-snapshot-never-written")
class OnlyFirstWindowStored(Mutant):
    """Of all windows that the next count may pick, the one for a count of 1 is stored."""

    def rolled(self, call, row, window, out):
        return super().rolled(call, row, window, out)[: call.history]


@mutant("accepted-zero")
class ZeroReadsBeforeSlot(Mutant):
    """A count of 0 reads from the column before the slot."""

    def window(self, call, row):
        if call.counts is None or call.counts[row.index] > 0:
            return super().window(call, row)
        columns = call.pool.data.reshape(-1, call.pool.shape[2])
        first = row.slot * call.pool.shape[1] - 1
        return TypedArray(
            call.pool.dtype, np.take(columns, range(first, first + call.history), axis=0, mode="wrap")
        )


@mutant("accepted-zero")
class ZeroIsPadding(Mutant):
    """A row with a count of 0 is skipped."""

    def live(self, call, row):
        return super().live(call, row) and (call.counts is None or call.counts[row.index] > 0)


@mutant("accepted-exceeds-current-length")
class CountLimitedByStep(Mutant):
    """The count is limited to this step's tokens."""

    def count(self, call, i):
        return min(call.counts[i], call.offsets[i + 1] - call.offsets[i])


@mutant("accepted-exceeds-current-length")
class CountAboveStepRejected(Mutant):
    """A count above this step's tokens is an error."""

    def count(self, call, i):
        if call.counts[i] > call.offsets[i + 1] - call.offsets[i]:
            raise ValueError("num_accepted_tokens: more than the tokens of the row")
        return call.counts[i]


@mutant("fixed-draft-width-assumed")
class RowsOfEqualLength(Mutant):
    """Row i of a packed step begins at i times the longest row."""

    def prepare(self, op, given):
        call = super().prepare(op, given)
        if not call.fn and given.get("query_start_loc") is not None:
            longest = max(np.diff(call.offsets), default=0)
            call.offsets = [min(i * int(longest), call.x.shape[0]) for i in range(len(call.offsets))]
        return call


@mutant("fixed-draft-width-assumed")
class PackedStepRefusesRaggedRows(Mutant):
    """Rows of different lengths are refused."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        if op == "causal_conv1d_update" and arrays.get("query_start_loc") is not None:
            if len(set(np.diff(arrays["query_start_loc"].data.astype(np.int64)).tolist())) > 1:
                raise ValueError("query_start_loc: expected rows of equal length")


@mutant("spec-to-plain-transition")
class OneTokenIgnoresCount(Mutant):
    """Rows of one token take the plain path, which reads column 0."""

    def column(self, call, i):
        return 0 if call.offsets[i + 1] - call.offsets[i] == 1 else super().column(call, i)


@mutant("partition-takes-other-rows-counts")
class PlainRowsTakeFirstCounts(Mutant):
    """Rows of one token, put together, are paired with the first counts of the whole batch."""

    def count(self, call, i):
        single = [k for k in range(len(call.slots)) if call.offsets[k + 1] - call.offsets[k] == 1]
        return call.counts[single.index(i) if i in single else i]


@mutant("partition-takes-other-rows-counts")
class CountsSkipPaddingRows(Mutant):
    """Padding rows are left out of the batch and not out of the counts."""

    def count(self, call, i):
        return call.counts[sum(not self.padding(call, slot) for slot in call.slots[:i])]


@mutant("overlapping-shift-without-ordering")
class ShiftFromHighToLow(Mutant):
    """The kept columns are moved inside the slot from the last to the first."""

    def rolled(self, call, row, window, out):
        slot = call.pool.bits[row.slot].copy()
        for j in reversed(range(call.history - 1)):
            slot[j] = slot[row.column + 1 + j]
        kept = call.history - 1
        return np.concatenate([slot[:kept], super().rolled(call, row, window, out)[kept:]])


@mutant("rolled-past-slot")
class TokensPastSlot(Mutant):
    """Tokens that the slot has no columns for go to where the next columns are."""

    def store(self, call, row, target, state):
        if call.counts is None:
            super().store(call, row, target, state)
            return
        arrived = self.cast(call, self.inputs(call, row).bits)
        columns = call.pool.bits.reshape(-1, call.pool.shape[2])
        first = target * call.state_len
        state = np.concatenate([state[: call.history - 1], arrived])[: len(columns) - first]
        columns[first : first + len(state)] = state


@mutant("wide-slot-window-misplaced")
class ColumnsPastDraftsCleared(Mutant):
    """Columns of a rolling slot behind the new tokens become zero."""

    def store(self, call, row, target, state):
        super().store(call, row, target, state)
        if call.counts is not None:
            call.pool.bits[target, len(state) :] = 0


@mutant("empty-sequence-mishandled")
class EmptyStepRolls(Mutant):
    """A row of no tokens drops its oldest entry."""

    def live(self, call, row):
        if call.counts is None or row.start < row.stop:
            return super().live(call, row)
        return row.start == row.stop and not self.padding(call, row.slot)


@mutant("tail-padding-enters-state")
class TailJoinsLastRowOfStep(Mutant):
    """The last row of a packed step runs to the end of x."""

    def prepare(self, op, given):
        call = super().prepare(op, given)
        if not call.fn and len(call.offsets) > 1:
            call.offsets[-1] = call.x.shape[0]
        return call
