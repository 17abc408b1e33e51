"""Mistakes in which window is read, and what is written back."""

from __future__ import annotations

import numpy as np

from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray, cast_bits, from_bits, is_nan, round_bits


@mutant("has-initial-ignored")
class HasIgnored(Mutant):
    """Every row continues from its slot."""

    def has(self, call, i):
        return call.pool is not None


@mutant("has-initial-ignored")
class HasNoneMeansAll(Mutant):
    """Without has_initial_state every row continues from its slot."""

    def has(self, call, i):
        missing = call.fn and self.arrays["has_initial_state"] is None and call.pool is not None
        return missing or super().has(call, i)


@mutant("has-initial-reduced-over-batch")
class HasAny(Mutant):
    """Any row's state switches all rows on."""

    def has(self, call, i):
        return any(call.has)


@mutant("has-initial-reduced-over-batch")
class HasAll(Mutant):
    """One row without state switches all rows off."""

    def has(self, call, i):
        return all(call.has)


@mutant("has-initial-reduced-over-batch")
class HasOfFirstRow(Mutant):
    """The first row decides."""

    def has(self, call, i):
        return call.has[0]


@mutant("initial-state-ignored-by-layout")
class StateIgnoredForTransposed(Mutant):
    """With unit stride along tokens the initial state is not read."""

    def has(self, call, i):
        array = self.arrays["x"]
        return super().has(call, i) and not (array.strides[0] == 1 and array.shape[-1] > 1 and call.fn)


@mutant("state-not-written")
class StateNotWritten(Mutant):
    """A prefill leaves the slot as it was."""

    def store(self, call, row, target, state):
        if not call.fn:
            super().store(call, row, target, state)


@mutant("state-not-written")
class StateNotWrittenForManyTokens(Mutant):
    """A decode step of several tokens leaves the slot as it was."""

    def store(self, call, row, target, state):
        if call.fn or row.count == 1:
            super().store(call, row, target, state)


@mutant("undeclared-mutation")
class UpdateDiscarded(Mutant):
    """The update goes to a copy of the pool that nobody sees."""

    def finish(self, call, out):
        return {
            **super().finish(call, out),
            "conv_states": self.arrays["conv_states"] and self.arrays["conv_states"].typed,
        }


@mutant("state-holds-post-activation")
class StateHoldsOutputs(Mutant):
    """The window is made of outputs."""

    def new_window(self, call, row, window, out):
        arrived = round_bits(out[row.start : row.stop], call.pool.dtype)
        return np.concatenate([window.bits, arrived])[-call.history :]


@mutant("state-not-bit-exact")
class StateNansCanonical(Mutant):
    """States pass through a conversion that makes every NaN the same."""

    def new_window(self, call, row, window, out):
        bits = super().new_window(call, row, window, out)
        quiet = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FFF}[call.pool.dtype]
        return np.where(is_nan(bits, call.pool.dtype), bits.dtype.type(quiet), bits)


@mutant("state-not-bit-exact")
class StateTinyFlushed(Mutant):
    """Subnormal states become zero."""

    def new_window(self, call, row, window, out):
        bits = super().new_window(call, row, window, out)
        exponent = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[call.pool.dtype]
        return np.where(bits & bits.dtype.type(exponent) == 0, bits.dtype.type(0), bits)


@mutant("state-not-bit-exact")
class StateZerosUnsigned(Mutant):
    """Adding zero to states turns -0 into +0."""

    def new_window(self, call, row, window, out):
        bits = super().new_window(call, row, window, out)
        return np.where(bits == bits.dtype.type(1 << (8 * bits.itemsize - 1)), bits.dtype.type(0), bits)


class _ShortRow(Mutant):
    """Writes another window for rows shorter than it."""

    def new_window(self, call, row, window, out):
        new = super().new_window(call, row, window, out)
        tokens = row.count
        return self.short(call, row, window.bits, new, tokens) if tokens < call.history else new

    def short(self, call, row, old, new, tokens):
        raise NotImplementedError


@mutant("short-sequence-state-shift")
class ShortRowKeepsColumns(_ShortRow):
    """The old columns stay in place and the last ones are overwritten."""

    def short(self, call, row, old, new, tokens):
        return np.concatenate([old[:-tokens], new[-tokens:]])


@mutant("short-sequence-state-shift")
class ShortRowZeroFilled(_ShortRow):
    """The part left of the new inputs becomes zero."""

    def short(self, call, row, old, new, tokens):
        return np.concatenate([np.zeros_like(new[:-tokens]), new[-tokens:]])


@mutant("short-sequence-state-shift")
class ShortRowWrittenAtFront(_ShortRow):
    """The new inputs go to the first columns."""

    def short(self, call, row, old, new, tokens):
        return np.concatenate([new[-tokens:], old[tokens:]])


@mutant("short-sequence-state-shift")
class ShortRowNotWritten(_ShortRow):
    """Rows shorter than the window write nothing."""

    def short(self, call, row, old, new, tokens):
        return call.pool.bits[row.slot, : call.history].copy()


@mutant("short-sequence-stale-left")
class ShortRowStaleLeft(_ShortRow):
    """A row without state shifts whatever the slot held."""

    def short(self, call, row, old, new, tokens):
        stale = call.pool.bits[row.slot, : call.history]
        return np.concatenate([stale[tokens:], new[-tokens:]])


@mutant("wide-slot-window-misplaced")
class WindowWrittenAtEnd(Mutant):
    """The window is written to the last columns of the slot."""

    def store(self, call, row, target, state):
        call.pool.bits[target, call.state_len - len(state) :] = state


@mutant("wide-slot-window-misplaced")
class WindowReadAtEnd(Mutant):
    """The window is read from the last columns of the slot."""

    def window(self, call, row):
        if call.pool is None or not row.has:
            return super().window(call, row)
        first = call.pool.shape[1] - call.history
        return TypedArray(call.pool.dtype, call.pool.data[row.slot, first:].copy())


@mutant("wide-slot-window-misplaced")
class SpareColumnsCleared(Mutant):
    """Columns after the window become zero."""

    def store(self, call, row, target, state):
        super().store(call, row, target, state)
        call.pool.bits[target, call.history :] = 0


@mutant("wide-slot-window-misplaced")
class WholeSlotShifted(Mutant):
    """All columns of the slot move left, spare ones too."""

    def store(self, call, row, target, state):
        tokens = min(row.count, call.state_len)
        call.pool.bits[target] = np.roll(call.pool.bits[target], -tokens, axis=0)
        super().store(call, row, target, state)


@mutant("state-dtype-differs-from-input")
class StateThroughFloat16(Mutant):
    """Inputs pass through float16 on their way to another dtype."""

    def cast(self, call, bits):
        if call.x.dtype == call.pool.dtype:
            return super().cast(call, bits)
        return cast_bits(cast_bits(bits, call.x.dtype, "float16"), "float16", call.pool.dtype)


@mutant("state-dtype-differs-from-input")
class StateCastTruncates(Mutant):
    """float32 inputs are cut to bfloat16 states."""

    def cast(self, call, bits):
        if (call.x.dtype, call.pool.dtype) == ("float32", "bfloat16"):
            return (bits >> np.uint32(16)).astype(np.uint16)
        return super().cast(call, bits)


@mutant("state-dtype-differs-from-input")
class MixedDtypesRefused(Mutant):
    """A pool of another dtype is refused."""

    def check(self, op, arrays, options):
        super().check(op, arrays, options)
        if arrays["conv_states"] is not None and arrays["conv_states"].dtype != arrays["x"].dtype:
            raise TypeError("conv_states: must have the dtype of x")


@mutant("state-dtype-differs-from-input")
class WeightsCastToInput(Mutant):
    """Weights and bias are rounded to x's dtype."""

    def prepare(self, op, given):
        call = super().prepare(op, given)
        call.weight = (
            from_bits(round_bits(call.weight, call.x.dtype), call.x.dtype).values().astype(np.float32)
        )
        return call


@mutant("history-overwritten-while-read")
class WindowStoredFirst(Mutant):
    """The new window is in place before the outputs are computed."""

    def extended(self, call, row, window):
        if call.pool is not None and row.has and call.history:
            arrived = self.cast(call, self.inputs(call, row).bits)
            moved = np.concatenate([window.bits, arrived])[-call.history :]
            window = from_bits(moved, window.dtype)
        return super().extended(call, row, window)


class _PartSeesShifted(Mutant):
    """A part of the work reads the window after another part moved it."""

    def convolve(self, call, row, e):
        pre = super().convolve(call, row, e)
        if call.pool is not None and row.has and call.history:
            moved = e.copy()
            moved[: call.history] = e[-call.history :]
            late = super().convolve(call, row, moved)
            self.late(pre, late)
        return pre

    def late(self, pre, late):
        raise NotImplementedError


@mutant("cross-program-state-shift")
class SecondHalfOfChannelsLate(_PartSeesShifted):
    """Channels from 32 on read the window after it was moved."""

    def late(self, pre, late):
        pre[:, 32:] = late[:, 32:]


@mutant("history-overwritten-while-read")
class SecondTokenLate(_PartSeesShifted):
    """Tokens after the first read the window after it was moved."""

    def late(self, pre, late):
        pre[1:] = late[1:]


@mutant("autotune-reruns-mutate-state")
class UpdateRunsTwice(Mutant):
    """A decode step is applied twice to the state."""

    def new_window(self, call, row, window, out):
        new = super().new_window(call, row, window, out)
        if call.fn:
            return new
        return super().new_window(call, row, from_bits(new, call.pool.dtype), out)


@mutant("autotune-reruns-mutate-state")
class ShortPrefillRunsTwice(Mutant):
    """A prefill that continues is applied twice to the state."""

    def new_window(self, call, row, window, out):
        new = super().new_window(call, row, window, out)
        if call.fn and row.has:
            return super().new_window(call, row, from_bits(new, call.pool.dtype), out)
        return new
