"""Mistakes in what a slot number means."""

from __future__ import annotations

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray
from oracle.reference_states import Row


@mutant("pad-slot-not-skipped")
class PadSlotWrapsToLast(Mutant):
    """-1 is an index from the end."""

    def padding(self, call, slot):
        return not -call.num_slots <= slot < call.num_slots

    def slot(self, call, i):
        slot = call.slots[i]
        return slot + call.num_slots if call.pool is not None and -call.num_slots <= slot < 0 else slot


@mutant("pad-slot-not-skipped")
class PadSlotWritesOnly(Mutant):
    """Padding rows give zeros and still write their window to the last slot."""

    def blank(self, call):
        for i, slot in enumerate(call.slots):
            row = Row(i, call.offsets[i], call.offsets[i + 1], slot, call.has[i])
            if call.pool is not None and slot == -1 and row.start < row.stop and call.history:
                last = self.cast(call, self.inputs(call, row).bits)[-call.history :]
                call.pool.bits[-1, : len(last)] = last
        return super().blank(call)


@mutant("pad-slot-clamped-to-zero")
class PadSlotClampedToZero(Mutant):
    """Negative slots become 0."""

    def slot(self, call, i):
        return max(call.slots[i], 0)

    def padding(self, call, slot):
        return slot >= call.num_slots


@mutant("out-of-range-slot-used")
class HighSlotClamped(Mutant):
    """Slots past the pool become its last one."""

    def slot(self, call, i):
        slot = call.slots[i]
        return slot if call.pool is None or slot == call.pad else min(slot, call.num_slots - 1)


@mutant("out-of-range-slot-used")
class HighSlotFaults(Mutant):
    """Slots past the pool are an error of the memory system."""

    def padding(self, call, slot):
        if slot != call.pad and slot >= call.num_slots:
            raise IndexError("index out of bounds")
        return super().padding(call, slot)


@mutant("out-of-range-slot-used")
class NegativeSlotWraps(Mutant):
    """Negative slots other than the padding one count from the end."""

    def slot(self, call, i):
        slot = call.slots[i]
        inside = call.pool is not None and slot != call.pad and -call.num_slots <= slot < 0
        return slot + call.num_slots if inside else slot


@mutant("slot-zero-treated-as-padding")
class SlotZeroSkipped(Mutant):
    """Slot 0 is a null block, whatever pad_slot_id says."""

    def padding(self, call, slot):
        return slot == 0 or super().padding(call, slot)


@mutant("slot-zero-treated-as-padding")
class SlotZeroSkippedInUpdate(Mutant):
    """The decode path skips slots of 0 and less."""

    def padding(self, call, slot):
        return (slot <= 0 and not call.fn) or super().padding(call, slot)


@mutant("null-block-processed")
class OnlyMinusOneIsPadding(Mutant):
    """pad_slot_id is not looked at."""

    def padding(self, call, slot):
        return not 0 <= slot < call.num_slots


class _PaddingOutputs(Mutant):
    def blank(self, call):
        out = super().blank(call)
        for i, slot in enumerate(call.slots):
            if call.pool is not None and self.padding(call, slot):
                rows = slice(call.offsets[i], max(call.offsets[i], call.offsets[i + 1]))
                out[rows] = self.padded(call, rows)
        return out

    def padded(self, call, rows):
        raise NotImplementedError


@mutant("padding-row-output-uninitialised")
class PaddingOutputsUnwritten(_PaddingOutputs):
    """Outputs of padding rows are whatever the memory held."""

    def padded(self, call, rows):
        return np.nan


@mutant("padding-row-output-uninitialised")
class PaddingOutputsCopied(_PaddingOutputs):
    """Outputs of padding rows are their inputs."""

    def padded(self, call, rows):
        return TypedArray(call.x.dtype, call.x.data[rows]).values()


@mutant("padding-row-output-uninitialised")
class PaddingOutputsMasked(_PaddingOutputs):
    """Padding rows are computed from their inputs and multiplied by zero."""

    def padded(self, call, rows):
        return TypedArray(call.x.dtype, call.x.data[rows]).values() * 0.0


@mutant("duplicate-slot-write")
class EmptyRowWritesBack(Mutant):
    """Rows of no tokens write back the window that their slot held before the call."""

    def finish(self, call, out):
        if call.pool is not None:
            old = self.arrays["conv_states"].typed.bits
            for i, slot in enumerate(call.slots):
                if call.offsets[i] >= call.offsets[i + 1] and not self.padding(call, slot):
                    call.pool.bits[slot, : call.history] = old[slot, : call.history]
        return super().finish(call, out)


@mutant("stale-index-in-graph-buffer")
class StaleRowsUpdate(Mutant):
    """Rows past the live ones store the inputs before them as their window."""

    def finish(self, call, out):
        for i, slot in enumerate(call.slots):
            empty = call.offsets[i] >= call.offsets[i + 1]
            if call.fn and call.pool is not None and empty and not self.padding(call, slot) and call.history:
                before = TypedArray(call.x.dtype, call.x.data[: call.offsets[i]]).bits[-call.history :]
                call.pool.bits[slot, : len(before)] = self.cast(call, before)
        return super().finish(call, out)


class _Dense(Mutant):
    """Reads one argument from consecutive memory."""

    dense = ""

    def read(self, arrays, name):
        array = arrays[name]
        if name != self.dense:
            return super().read(arrays, name)
        count = int(np.prod(array.shape))
        memory = array.base[array.offset : array.offset + count]
        memory = np.concatenate([memory, np.zeros(count - len(memory), array.base.dtype)])
        return TypedArray(array.dtype, memory.reshape(array.shape).copy())


@mutant("indices-read-with-unit-stride")
class IndicesDense(_Dense):
    """A column of a block table is read along its row."""

    dense = "cache_indices"


@mutant("indices-read-with-unit-stride")
class OffsetsDense(_Dense):
    """Strided offsets are read densely."""

    dense = "query_start_loc"


@mutant("indices-read-with-unit-stride")
class FlagsDense(_Dense):
    """Strided has_initial_state is read densely."""

    dense = "has_initial_state"


@mutant("stride-restriction-surprises")
class WeightDense(_Dense):
    """Strided weights are read densely."""

    dense = "weight"


@mutant("stride-restriction-surprises")
class BiasDense(_Dense):
    """A strided bias is read densely."""

    dense = "bias"


@mutant("stride-restriction-surprises")
class InputDense(_Dense):
    """A slice of a wider projection is read densely."""

    dense = "x"


@mutant("wrong-index-namespace")
class RowNumberAsSlot(Mutant):
    """Row i uses slot i."""

    def slot(self, call, i):
        return call.slots[i] if call.pool is None or self.padding(call, call.slots[i]) else i % call.num_slots


@mutant("slot-masked-by-batch-size")
class SlotsAboveBatchReadZero(Mutant):
    """Slots at or above the batch size read as zero."""

    def has(self, call, i):
        return super().has(call, i) and call.slots[i] < len(call.slots)


@mutant("valid-call-rejected")
class BatchAbovePoolRefused(Mutant):
    """More rows than slots are refused."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        pool, slots = arrays["conv_states"], arrays["cache_indices"]
        if pool is not None and slots is not None and slots.shape[0] > pool.shape[0]:
            raise ValueError("cache_indices: more rows than slots")


@mutant("valid-call-rejected")
class EmptyRowCountsAsDuplicate(Mutant):
    """validate=True takes an empty row for a live one."""

    def check_values(self, call, sizes):
        super().check_values(call, sizes)
        slots = [] if call.cache_indices is None else call.cache_indices.data.tolist()
        live = [s for s in slots if s != call.pad_slot_id]
        if len(set(live)) < len(live):
            raise ValueError("cache_indices: duplicate slots")


class _Narrowed(Mutant):
    kind: type = np.int32

    def slot(self, call, i):
        if call.pool is None:
            return call.slots[i]
        return int(np.array(call.slots[i] % 2**64, np.uint64).astype(self.kind))


@mutant("index-dtype-narrowed")
class SlotsNarrowedTo32(_Narrowed):
    """64-bit slots lose their upper half."""


@mutant("index-dtype-narrowed")
class SlotsReadAsSignedBytes(Mutant):
    """uint8 slots are read as int8."""

    def slot(self, call, i):
        slot = call.slots[i]
        return (
            slot - 256
            if self.arrays["cache_indices"] and self.arrays["cache_indices"].dtype == "uint8" and slot > 127
            else slot
        )


@mutant("index-dtype-narrowed")
class PadComparedInSlotType(Mutant):
    """pad_slot_id is cast to the dtype of the slots: -1 becomes 255 in uint8, a legal slot."""

    def padding(self, call, slot):
        array = self.arrays["cache_indices"]
        pad = call.pad if array is None else int(np.array(call.pad).astype(np.int64).astype(array.dtype))
        return slot == pad or not 0 <= slot < call.num_slots


@mutant("index-dtype-narrowed")
class NarrowOffsetsOnly(Mutant):
    """64-bit offsets are read as pairs of 32-bit ones."""

    def read(self, arrays, name):
        array = super().read(arrays, name)
        if name == "query_start_loc" and array.dtype == "int64":
            return TypedArray("int32", array.data.view(np.int32)[: len(array.data)].copy())
        return array


@mutant("offsets-trusted")
class BadOffsetsFault(Mutant):
    """Offsets outside the tensor are an error of the memory system."""

    def prepare(self, op, given):
        call = super().prepare(op, given)
        if call.fn and self.arrays["query_start_loc"].data.max() > len(call.x.data):
            raise IndexError("illegal memory access")
        return call


@mutant("offsets-trusted")
class BadOffsetsClobber(Mutant):
    """With offsets past the end the last slot of the pool is overwritten."""

    def finish(self, call, out):
        if call.fn and call.pool is not None and self.arrays["query_start_loc"].data.max() > len(call.x.data):
            call.pool.bits[-1] = 0
        return super().finish(call, out)


@mutant("offsets-trusted")
class DuplicateSlotsFault(Mutant):
    """Two live rows on one slot are refused even unasked."""

    def rows(self, call):
        rows = super().rows(call)
        if call.pool is not None and len({row.slot for row in rows}) < len(rows):
            raise RuntimeError("duplicate slots")
        return rows
