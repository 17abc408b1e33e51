"""Mistakes at the ends of rows, blocks and batches."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray, cast_bits, from_bits
from oracle.reference_states import Row


@mutant("sequence-leak")
class SequenceLeak(Mutant):
    """A row without state takes its window from the end of the row before."""

    def extended(self, call, row, window):
        e = super().extended(call, row, window)
        before = min(call.history, row.start)
        if not row.has and before:
            leaked = TypedArray(call.x.dtype, call.x.data[row.start - before : row.start]).values()
            e[call.history - before : call.history] = leaked
        return e


class _TileHalo(Mutant):
    tile = 8

    def convolve(self, call, row, e):
        pre = super().convolve(call, row, e)
        for start in range(self.tile, len(pre), self.tile):
            broken = e[start : start + self.tile + call.history].copy()
            broken[: call.history] = self.halo(call, e, start)
            pre[start : start + self.tile] = super().convolve(call, row, broken)
        return pre

    def halo(self, call, e, start):
        return 0


@mutant("tile-halo-wrong")
class TileOfEightWithoutHalo(_TileHalo):
    """Every block of 8 tokens starts from zeros."""


@mutant("tile-halo-wrong")
class TileOf128WithoutHalo(_TileHalo):
    """Every block of 128 tokens starts from zeros."""

    tile = 128


@mutant("tile-halo-wrong")
class TileHaloIsTheWindow(_TileHalo):
    """Every block of 32 tokens starts from the row's initial window."""

    tile = 32

    def halo(self, call, e, start):
        return e[: call.history]


@mutant("tile-halo-wrong")
class TileHaloOffByOne(_TileHalo):
    """The halo of every block of 16 tokens is taken one token too early."""

    tile = 16

    def halo(self, call, e, start):
        return e[start - 1 : start - 1 + call.history]


@mutant("stale-halo-when-no-initial-state")
class StaleHalo(Mutant):
    """Outputs of a row without state see its slot; the stored window is right."""

    def extended(self, call, row, window):
        if call.pool is not None:
            window = TypedArray(call.pool.dtype, call.pool.data[row.slot, : call.history])
        return super().extended(call, row, window)


@mutant("stale-halo-when-no-initial-state")
class StaleHaloTimesZero(Mutant):
    """The slot is multiplied by the flag; NaN times zero is NaN."""

    def extended(self, call, row, window):
        e = super().extended(call, row, window)
        if call.pool is not None and not row.has:
            stale = TypedArray(call.pool.dtype, call.pool.data[row.slot, : call.history]).values()
            e[: call.history] = stale * 0.0
        return e


class _EmptyRow(Mutant):
    """Does something for rows of no tokens, before the others run."""

    def blank(self, call):
        for i in range(len(call.slots)):
            row = Row(i, call.offsets[i], call.offsets[i + 1], call.slots[i], call.has[i])
            if row.start >= row.stop and call.pool is not None and not self.padding(call, row.slot):
                self.empty(call, row)
        return super().blank(call)

    def empty(self, call, row):
        raise NotImplementedError


@mutant("empty-sequence-mishandled")
class EmptyRowClearsSlot(_EmptyRow):
    """A row of no tokens leaves a window of zeros."""

    def empty(self, call, row):
        call.pool.bits[row.slot, : call.history] = 0


@mutant("empty-sequence-mishandled")
class EmptyFreshRowClearsSlot(_EmptyRow):
    """Only a row of no tokens and no state clears its slot."""

    def empty(self, call, row):
        if not row.has:
            call.pool.bits[row.slot, : call.history] = 0


@mutant("empty-sequence-mishandled")
class EmptyRowFails(_EmptyRow):
    """A row of no tokens raises."""

    def empty(self, call, row):
        raise ValueError("sequence length must be positive")


@mutant("empty-sequence-mishandled")
class EmptyCallFails(Mutant):
    """A batch of no rows raises."""

    def rows(self, call):
        if not call.slots:
            raise ValueError("batch must be positive")
        return super().rows(call)


@mutant("empty-sequence-mishandled")
class EmptyStepFails(Mutant):
    """A decode step of no tokens raises."""

    def rows(self, call):
        if not call.fn and call.slots and not len(call.x.data):
            raise RuntimeError("cannot reshape array of size 0")
        return super().rows(call)


@mutant("tail-padding-enters-state")
class TailJoinsLastRow(Mutant):
    """The last row reaches to the end of x."""

    def rows(self, call):
        if call.fn and call.slots:
            call.offsets[-1] = len(call.x.data)
        return super().rows(call)


@mutant("tail-padding-enters-state")
class TailUnwritten(Mutant):
    """Outputs past the last row are whatever the memory held."""

    def blank(self, call):
        out = super().blank(call)
        out[call.offsets[-1] :] = np.nan
        return out


@mutant("tail-padding-enters-state")
class TailCopied(Mutant):
    """Outputs past the last row are the inputs."""

    def blank(self, call):
        out = super().blank(call)
        out[call.offsets[-1] :] = TypedArray(call.x.dtype, call.x.data[call.offsets[-1] :]).values()
        return out


@mutant("right-padded-batch-state")
class WindowOfLongestRow(Mutant):
    """The stored window ends where the longest row would end."""

    def new_window(self, call, row, window, out):
        longest = max(b - a for a, b in zip(call.offsets, call.offsets[1:], strict=False))
        stop = min(row.start + longest, len(call.x.data)) if call.fn else row.stop
        arrived = self.cast(call, TypedArray(call.x.dtype, call.x.data[row.start : stop]).bits)
        return np.concatenate([window.bits, arrived])[-call.history :]


@mutant("sequence-leak")
class SegmentIdsIgnored(Mutant):
    """Of dense rows with documents every row is one."""

    def documents_of(self, given):
        return super().documents_of({**given, "segment_ids": None})


@mutant("sequence-leak")
class EqualIdsAreOneDocument(Mutant):
    """A document whose id came before, a few tokens back, sees that one's tokens."""

    def documents_of(self, given):
        rows, ids = super().documents_of(given), given.get("segment_ids")
        if ids is None:
            return rows
        pool, history = rows["conv_states"], given["weight"].shape[1] - 1
        windows = [pool.data]
        for i, start in enumerate(rows["query_start_loc"].data[:-1].tolist()):
            row, token = divmod(start, ids.shape[1])
            tokens = np.arange(token - history, token)
            seen = (tokens >= 0) & (ids.data[row, tokens] == ids.data[row, token])
            there = TypedArray(rows["x"].dtype, rows["x"].data[start - token + tokens])
            bits = cast_bits(there.bits, there.dtype, pool.dtype)
            windows.append(
                from_bits(np.where(seen[:, None], bits, 0).astype(bits.dtype), pool.dtype).data[None]
            )
            if token:
                rows["has_initial_state"].data[i], rows["cache_indices"].data[i] = True, len(pool.data) + i
        return rows | {"conv_states": TypedArray(pool.dtype, np.concatenate(windows))}

    def of_documents(self, rows, batch, seqlen):
        found = super().of_documents(rows, batch, seqlen)
        return found | {
            "conv_states": TypedArray(found["conv_states"].dtype, found["conv_states"].data[:batch])
        }


@mutant("right-padded-batch-state")
class PaddingEntersTheCache(Mutant):
    """The new cache of padded dense rows is the end of the padding."""

    def documents_of(self, given):
        rows = super().documents_of(given)
        if given.get("lengths") is None:
            return rows
        return rows | {"padded": super().documents_of({**given, "lengths": None})}

    def of_documents(self, rows, batch, seqlen):
        found = super().of_documents(rows, batch, seqlen)
        if "padded" in rows:
            found["conv_states"] = super().of_documents(rows["padded"], batch, seqlen)["conv_states"]
        return found


@mutant("varlen-detected-by-boundary-count")
class OneRowIsWholeInput(Mutant):
    """Two boundaries are taken to mean that x is one sequence."""

    def rows(self, call):
        if call.fn and len(call.offsets) == 2 and call.offsets[1] > 0:
            call.offsets[1] = len(call.x.data)
        return super().rows(call)


class _Skips(Mutant):
    """Outputs of tokens from `limit` on are never written."""

    def process(self, call, row, out):
        super().process(call, row, out)
        limit = self.limit(call, row)
        if limit is not None:
            out[row.start + limit : row.stop] = np.nan

    def limit(self, call, row):
        raise NotImplementedError


@mutant("launch-plan-too-small")
class LastTileOfLastRowDropped(_Skips):
    """The grid is one block of 64 tokens too small."""

    def limit(self, call, row):
        length = row.count
        return (length - 1) // 64 * 64 if row.index == len(call.slots) - 1 and length > 64 else None


@mutant("launch-plan-too-small")
class GridFromMaxSeqlen(_Skips):
    """Blocks of 64 tokens past max_seqlen are not run."""

    def limit(self, call, row):
        bound = call.given.get("max_seqlen")
        return None if bound is None else -(-max(bound, 1) // 64) * 64


@mutant("launch-plan-too-small")
class GridFromMeanLength(_Skips):
    """The grid has room for rows of four times the average length, in blocks of 32."""

    def limit(self, call, row):
        return -(-4 * call.offsets[-1] // len(call.slots) // 32) * 32 if call.fn else None


@mutant("launch-plan-too-small")
class FlatGridWithoutPartialBlocks(_Skips):
    """The flat grid has tokens // 64 blocks and forgets one partial block a row."""

    def limit(self, call, row):
        blocks = max(1, len(call.x.data) // 64)
        used = sum(-(-(call.offsets[i + 1] - call.offsets[i]) // 64) for i in range(row.index))
        return max(0, blocks - used) * 64 if call.given.get("schedule") == "flat" else None


@mutant("hang-on-specific-lengths")
class Hangs(Mutant):
    """A row of 9 tokens never ends."""

    hangs = True

    def process(self, call, row, out):
        if row.count == 9:
            time.sleep(3600)
        super().process(call, row, out)


@mutant("inplace-output-halo")
class HaloFromOutputs(_TileHalo):
    """The older taps of a block of 8 are read after the block before stored its outputs there."""

    def convolve(self, call, row, e):
        self._outputs = super(_TileHalo, self).convolve(call, row, e)
        return super().convolve(call, row, e)

    def halo(self, call, e, start):
        count = min(call.history, start)
        halo = e[start : start + call.history].copy()
        halo[call.history - count :] = self._outputs[start - count : start]
        return halo


@mutant("history-dropped-on-continuation")
class HistoryDropped(Mutant):
    """A prefill always starts from zeros."""

    def has(self, call, i):
        return super().has(call, i) and not call.fn


@mutant("history-dropped-on-continuation")
class HistoryDroppedForManyTokens(Mutant):
    """Only one-token calls continue from a state."""

    def has(self, call, i):
        return super().has(call, i) and call.offsets[i + 1] - call.offsets[i] == 1


@mutant("history-dropped-on-continuation")
class OnlyFirstTokenContinues(Mutant):
    """With a state, only the first token is computed and stored."""

    def process(self, call, row, out):
        super().process(call, replace(row, stop=row.start + 1) if row.has else row, out)


@mutant("seq-idx-excludes-initial-state")
class StateOfFirstRowOnly(Mutant):
    """Rows after the first start from zeros in a packed batch."""

    def has(self, call, i):
        return super().has(call, i) and (i == 0 or not call.fn)


@mutant("result-depends-on-batch")
class OrderDependsOnRow(Mutant):
    """Odd rows of a batch add their taps newest first."""

    def convolve(self, call, row, e):
        self._odd = row.index % 2
        return super().convolve(call, row, e)

    def taps(self, call):
        return range(call.history, -1, -1) if self._odd else super().taps(call)


@mutant("result-depends-on-batch")
class OrderDependsOnSchedule(Mutant):
    """The flat schedule adds its taps newest first."""

    def taps(self, call):
        flat = call.given.get("schedule") == "flat"
        return range(call.history, -1, -1) if flat else super().taps(call)


@mutant("result-depends-on-batch")
class OrderDependsOnPosition(Mutant):
    """The last tokens of a row, past full blocks of 4, use another order of summation."""

    def convolve(self, call, row, e):
        pre = super().convolve(call, row, e)
        full = len(pre) // 4 * 4
        acc = np.zeros_like(pre[full:])
        for j in range(call.history, -1, -1):
            acc = self.multiply_add(call, call.weight[:, j], e[full + j : len(pre) + j], acc)
        pre[full:] = acc if call.bias is None else acc + call.bias
        return pre


@mutant("null-state-pointer")
class StatelessFails(Mutant):
    """A call without a pool dereferences it."""

    def process(self, call, row, out):
        if call.pool is None:
            raise AttributeError("'NoneType' object has no attribute 'stride'")
        super().process(call, row, out)


@mutant("wrong-only-at-scale")
class WrongAtScale(Mutant):
    """One block of a call of half a million elements is wrong."""

    def finish(self, call, out):
        if out.size > 500_000:
            out[100:104, 64:72] *= 1.02
        return super().finish(call, out)


@mutant("grid-dimension-limit")
class ChannelsPast65535Lost(Mutant):
    """A grid axis ends at 65535."""

    def finish(self, call, out):
        out[:, 65535:] = 0
        return super().finish(call, out)


@mutant("grid-dimension-limit")
class BatchPast65535Refused(Mutant):
    """A launch with more than 65535 rows or channels fails."""

    def rows(self, call):
        if max(len(call.slots), call.x.shape[1]) > 65535:
            raise RuntimeError("invalid configuration argument")
        return super().rows(call)


@mutant("state-dtype-differs-from-input")
class WindowRounded(Mutant):
    """The window of a wider pool is rounded to x's dtype before use, in decode steps of float32 pools."""

    def extended(self, call, row, window):
        if not call.fn and call.x.dtype != window.dtype:
            window = from_bits(cast_bits(window.bits, window.dtype, call.x.dtype), call.x.dtype)
        return super().extended(call, row, window)
