"""Mistakes in taking a call: axes exchanged, bad calls let through, other errors than the contract's."""

from __future__ import annotations

import numpy as np

from oracle import contract
from oracle.conformance.mutants.base import Mutant, mutant
from oracle.numerics import TypedArray


@mutant("positional-abi-drift")
class SquareInputTransposed(Mutant):
    """Channel-first x is guessed when the sizes allow it."""

    def read(self, arrays, name):
        data = super().read(arrays, name)
        if name == "x" and len(data.shape) == 2 and data.shape[0] == data.shape[1]:
            return TypedArray(data.dtype, np.ascontiguousarray(data.data.T))
        return data


@mutant("positional-abi-drift")
class SquareWeightTransposed(Mutant):
    """Weights of [width, dim] are guessed when the sizes allow it."""

    def read(self, arrays, name):
        data = super().read(arrays, name)
        if name == "weight" and data.shape[0] == data.shape[1]:
            return TypedArray(data.dtype, np.ascontiguousarray(data.data.T))
        return data


@mutant("positional-abi-drift")
class CubeTokensAndRowsExchanged(Mutant):
    """A decode step of [seqlen, batch, dim] is guessed when the sizes allow it."""

    def read(self, arrays, name):
        data = super().read(arrays, name)
        if name == "x" and len(data.shape) == 3 and data.shape[0] == data.shape[1]:
            return TypedArray(data.dtype, np.ascontiguousarray(data.data.transpose(1, 0, 2)))
        return data


class _Lenient(Mutant):
    """Swallows contract errors that name one argument, and returns zeros."""

    lets_through = ""

    def run(self, op, arrays, options):
        try:
            return super().run(op, arrays, options)
        except (ValueError, TypeError) as error:
            if not str(error).startswith(self.lets_through):
                raise
        x = TypedArray(arrays["x"].dtype, np.zeros_like(arrays["x"].data))
        return {
            "out": x,
            "conv_states": None if arrays["conv_states"] is None else arrays["conv_states"].typed,
        }


@mutant("bad-call-accepted")
class AnyWidthAccepted(_Lenient):
    """Weights are not looked at."""

    lets_through = "weight:"


@mutant("bad-call-accepted")
class AnyPoolAccepted(_Lenient):
    """The pool is not looked at."""

    lets_through = "conv_states:"


@mutant("bad-call-accepted")
class AnyIndicesAccepted(_Lenient):
    """Slots are not looked at."""

    lets_through = "cache_indices:"


@mutant("bad-call-accepted")
class AnyOffsetsAccepted(_Lenient):
    """Offsets are not looked at."""

    lets_through = "query_start_loc:"


@mutant("bad-call-accepted")
class UnknownActivationIgnored(_Lenient):
    """An unknown activation means none."""

    lets_through = "activation:"


@mutant("bad-call-accepted")
class UnknownBackendIgnored(Mutant):
    """An unknown backend means the default one."""

    def check(self, op, arrays, options):
        super().check(op, arrays, {**options, "backend": "auto"})


@mutant("bad-call-accepted")
class ValidateIgnored(Mutant):
    """validate=True reads nothing."""

    def check_values(self, call, sizes):
        pass


@mutant("bad-call-accepted")
class ValidateSkipsDuplicates(Mutant):
    """validate=True checks ranges and not that slots are distinct."""

    def check_values(self, call, sizes):
        try:
            super().check_values(call, sizes)
        except ValueError as error:
            if "distinct" not in str(error):
                raise


@mutant("bad-call-accepted")
class ErrorsAreAssertions(Mutant):
    """Bad calls end in an AssertionError."""

    def check(self, op, arrays, options):
        try:
            super().check(op, arrays, options)
        except (ValueError, TypeError) as error:
            raise AssertionError(str(error)) from None


@mutant("bad-call-accepted")
class ErrorsWithoutNames(Mutant):
    """Errors do not say which argument is wrong."""

    def check(self, op, arrays, options):
        try:
            super().check(op, arrays, options)
        except (ValueError, TypeError) as error:
            raise type(error)("invalid argument") from None


@mutant("bad-call-accepted")
class DtypeErrorsAreValueErrors(Mutant):
    """Wrong dtypes raise ValueError."""

    def check(self, op, arrays, options):
        try:
            super().check(op, arrays, options)
        except TypeError as error:
            raise ValueError(str(error)) from None


@mutant("bad-call-accepted")
class BadCallsUnsupported(Mutant):
    """Bad calls are declared unsupported instead of wrong."""

    def check(self, op, arrays, options):
        try:
            super().check(op, arrays, options)
        except ValueError as error:
            raise contract.Unsupported(str(error)) from None
