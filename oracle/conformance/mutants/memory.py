"""Mistakes in addresses, strides and in whose memory is written."""

from __future__ import annotations

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray


@mutant("state-length-from-stride")
class NeighboursOverwritten(Mutant):
    """The column count comes from the slot's stride, so the page after the columns is cleared."""

    def finish(self, call, out):
        array = self.arrays["conv_states"]
        for row in self.rows(call):
            start = array.offset + row.slot * array.strides[0]
            extent = 1 + sum((n - 1) * s for n, s in zip(array.shape[1:], array.strides[1:], strict=True))
            array.base[start + extent : start + array.strides[0]] = 0
        return super().finish(call, out)


@mutant("stale-strides-after-copy")
class UpdateStaysInCopy(Mutant):
    """A strided pool is copied, the copy updated, and the caller's pool returned."""

    def finish(self, call, out):
        result = dict(super().finish(call, out))
        pool = self.arrays["conv_states"]
        if pool is not None and not pool.contiguous:
            result["conv_states"] = pool.typed
        return result


@mutant("stale-strides-after-copy")
class OldStridesOnCopy(Mutant):
    """A strided pool is made contiguous and read with the slot stride of the original."""

    def read(self, arrays, name):
        array = arrays[name]
        if name != "conv_states" or array.contiguous:
            return super().read(arrays, name)
        flat, size = array.typed.data.reshape(-1), int(np.prod(array.shape[1:]))
        slots = [np.resize(np.roll(flat, -slot * array.strides[0]), size) for slot in range(array.shape[0])]
        return TypedArray(array.dtype, np.stack(slots).reshape(array.shape))


@mutant("layout-axes-swapped")
class AxesSwapped(Mutant):
    """A pool whose channels come before its columns is reshaped instead of transposed."""

    def read(self, arrays, name):
        array = arrays[name]
        if name != "conv_states" or len(array.shape) < 3 or array.strides[1] >= array.strides[2]:
            return super().read(arrays, name)
        swapped = np.ascontiguousarray(array.data.transpose(0, 2, 1)).reshape(array.shape)
        return TypedArray(array.dtype, swapped)


@mutant("stride-restriction-surprises")
class OddPitchRefused(Mutant):
    """Token pitches must be multiples of 8."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        if any(stride % 8 for stride in arrays["x"].strides[:-1]) and arrays["x"].strides[-1] == 1:
            raise RuntimeError("x: strides must be multiples of 8")


@mutant("stride-restriction-surprises")
class MisalignedRefused(Mutant):
    """Addresses must be multiples of 16 bytes."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        if arrays["x"].offset * arrays["x"].base.itemsize % 16:
            raise RuntimeError("misaligned address")


@mutant("degenerate-stride-misread")
class UnitAxisStrideUsed(Mutant):
    """A step of one token takes its row pitch from the token axis."""

    def read(self, arrays, name):
        array = arrays[name]
        if name != "x" or len(array.shape) != 3 or array.shape[1] != 1:
            return super().read(arrays, name)
        starts = array.offset + np.arange(array.shape[0])[:, None] * array.strides[1]
        return TypedArray(array.dtype, array.base[starts + np.arange(array.shape[2])][:, None])


@mutant("degenerate-stride-misread")
class UnitAxisStrideChecked(Mutant):
    """The channel stride must be 1 even when there is one channel."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        if arrays["x"].shape[-1] == 1 and arrays["x"].strides[-1] != 1:
            raise ValueError("x: must be contiguous in dim")


@mutant("fast-path-writes-input")
class ResultStoredInInput(Mutant):
    """The one-token path stores its results over x as well."""

    def finish(self, call, out):
        result = super().finish(call, out)
        if len(call.x.data) == len(call.slots):
            self.arrays["x"].data[...] = result["out"].data
        return result


@mutant("fast-path-writes-input")
class ResultOnlyInInput(Mutant):
    """The one-token path stores into x and leaves out unwritten."""

    def finish(self, call, out):
        result = super().finish(call, out)
        if len(call.x.data) == len(call.slots):
            self.arrays["x"].data[...] = result["out"].data
            result["out"].bits[...] = 0
        return result


class _Wrapped(Mutant):
    """Computes the address of one argument's first axis in too few bits; what lies outside reads as zero."""

    argument = "x"

    def wrap(self, address: int) -> int:
        raise NotImplementedError

    def read(self, arrays, name):
        array = arrays[name]
        data = super().read(arrays, name)
        if name != self.argument:
            return data
        for i in range(array.shape[0]):
            address = i * array.strides[0]
            if address >= 2**31:
                start = array.offset + self.wrap(address)
                inside = 0 <= start < len(array.base) - array.shape[-1]
                data.data[i] = array.base[start : start + array.shape[-1]] if inside else 0
        return data


@mutant("int32-token-offset")
class TokenOffsetSigned32(_Wrapped):
    """token * pitch is a signed 32-bit product."""

    def wrap(self, address):
        return (address + 2**31) % 2**32 - 2**31


@mutant("uint32-silent-wrap")
class TokenOffsetUnsigned32(_Wrapped):
    """token * pitch is an unsigned 32-bit product."""

    def wrap(self, address):
        return address % 2**32


@mutant("int32-slot-offset")
class SlotOffsetSigned32(_Wrapped):
    """slot * pitch is a signed 32-bit product."""

    argument = "conv_states"

    def wrap(self, address):
        return (address + 2**31) % 2**32 - 2**31


@mutant("uint32-silent-wrap")
class SlotOffsetUnsigned32(_Wrapped):
    """slot * pitch is an unsigned 32-bit product."""

    argument = "conv_states"

    def wrap(self, address):
        return address % 2**32
