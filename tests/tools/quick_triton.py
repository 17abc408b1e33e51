"""Operations of Triton's interpreter on operands of like dtypes, with its checks left out: two thirds of the time of a kernel.

The interpreter finds the result's type anew for every operation, and spreads scalars over blocks. Here NumPy does the operation,
and spreads; what is not foreseen goes on to Triton. `tests/triton/test_interpreter.py` compares the two.
"""

import numpy as np
import triton

IS_KNOWN = triton.__version__.startswith("3.7.")  # of others the rounding of literals, say, is another
COMPARISONS = {
    "__lt__": np.less, "__le__": np.less_equal, "__gt__": np.greater, "__ge__": np.greater_equal,
    "__eq__": np.equal, "__ne__": np.not_equal,
}  # fmt: skip
ARITHMETIC = {"__add__": np.add, "__sub__": np.subtract, "__mul__": np.multiply}
BITS = {"__and__": np.bitwise_and, "__or__": np.bitwise_or}
SHIFTS = {"__lshift__": np.left_shift, "__rshift__": np.right_shift}
REVERSED = {"__radd__": np.add, "__rsub__": np.subtract, "__rmul__": np.multiply, "__rand__": np.bitwise_and}
OPERATORS = (*COMPARISONS, *ARITHMETIC, *BITS, *SHIFTS, *REVERSED)

INTEGERS = {"int32": np.int32, "int64": np.int64, "uint32": np.uint32}
NUMBERS = INTEGERS | {"fp32": np.float32}
CASTS = NUMBERS | {"fp16": np.float16, "uint16": np.uint16, "int16": np.int16}  # to these
SOURCES = {"int1", "uint16", "int16", *INTEGERS}  # from these, or one of FLOATS
FLOATS = {("fp16", "fp32"), ("fp32", "fp16")}
BITCASTS = CASTS | {"bf16": np.uint16}
PROMOTED = {"int32", "int64"}  # to the latter


def names_of(operator):
    """The names of the dtypes for which an operator is here."""
    if operator in SHIFTS:
        return {"uint32"}
    return {"int1", *INTEGERS} if operator in BITS or operator == "__rand__" else {*NUMBERS}


def alike(*kinds):
    """Whether these types of blocks are of one shape."""
    return all(kind.shape.values == kinds[0].shape.values for kind in kinds[1:])


class Operations:
    """The operations for the interpreter that is imported."""

    def __init__(self, interpreter):
        self.language, core = interpreter.tl, interpreter.tl.core
        self.tensor, self.constant, self.int1, self.int64 = core.tensor, core.constexpr, core.int1, core.int64
        self.handle, self.builder = interpreter.TensorHandle, interpreter.interpreter_builder
        self.numpy_type = interpreter._get_np_dtype
        self.types = {}

    def install(self, scope):
        """Puts these in place of what a launch has just put there, until it puts that back."""
        places = [(self.tensor, name, self.operator) for name in (*COMPARISONS, *ARITHMETIC, *BITS, *SHIFTS)]
        places += [(self.tensor, name, self.reversed) for name in REVERSED]
        places += [(self.tensor, "to", self.cast), (self.language, "cast", self.cast)]
        places += [(self.language, name, getattr(self, name)) for name in ("where", "fma", "load")]
        for place, name, make in places:
            slow = getattr(place, name)
            quick = make(slow, name)
            quick.slow = slow
            scope.set_attr(place, name, quick)

    def result(self, data, dtype, kind):
        """A tensor of type `kind` whose handle has this dtype, without a handle's checks."""
        handle = self.handle.__new__(self.handle)
        handle.data, handle.dtype, handle.attr = data, dtype, {}
        return self.tensor(handle, kind)

    def like(self, kind, dtype):
        """The type `kind` with other elements."""
        if not kind.is_block():
            return dtype
        key = kind.name, dtype.name
        found = self.types.get(key)
        if found is None:
            found = self.types[key] = kind.with_element_ty(dtype)
        return found

    def literal(self, value, name):
        """A number of Python as an array of one element, or None where Triton finds another dtype, or an error."""
        if type(value) is self.constant:
            value = value.value
        if type(value) is int:
            low = 0 if name == "uint32" else -(2**31)
            fits = name == "fp32" or (name in INTEGERS and low <= value < 2**31)
            return np.array([value], NUMBERS[name]) if fits else None
        if type(value) is bool:
            return np.array([value]) if name == "int1" else None
        normal = type(value) is float and (2**-126 <= abs(value) < 1e38 or value == 0 or abs(value) == np.inf)
        return (
            np.array([value or 0.0], np.float32) if normal and name == "fp32" else None
        )  # -0.0 is 0.0 there

    def array(self, operand, name):
        """The array of an operand of this dtype, or None."""
        if type(operand) is not self.tensor:
            return self.literal(operand, name)
        return operand.handle.data if operand.dtype.name == name else None

    def blocks(self, *operands):
        return [o.type for o in operands if type(o) is self.tensor and o.type.is_block()]

    def common(self, left, right):
        """The type of two tensors together, but for their dtype, or None."""
        first, second = left.type, right.type
        if first.is_block() and second.is_block():
            return first if alike(first, second) else None
        if not (first.is_block() or second.is_block()):
            return first
        block, scalar = (left, right) if first.is_block() else (right, left)
        # The handle of a comparison has the dtype of what was compared, and Triton spreads it as such.
        return block.type if scalar.handle.dtype.name == scalar.dtype.name else None

    def operator(self, slow, name):
        operation = (ARITHMETIC | COMPARISONS | BITS | SHIFTS)[name]
        tensor, names, compares = self.tensor, names_of(name), name in COMPARISONS
        promotes = compares or name in ARITHMETIC

        def quick(self_, other):
            dtype = self_.dtype
            left = dtype.name
            if left in names:
                kind, data, given = self_.type, self_.handle.data, None
                if type(other) is not tensor:
                    given = self.literal(other, left)
                elif other.dtype.name == left:
                    kind, given = self.common(self_, other), other.handle.data
                elif promotes and {left, other.dtype.name} == PROMOTED:
                    kind, dtype = self.common(self_, other), self.int64
                    data, given = data.astype(np.int64), other.handle.data.astype(np.int64)
                    kind = kind and self.like(kind, dtype)
                if given is not None and kind is not None and given.dtype == data.dtype:
                    kind = self.like(kind, self.int1) if compares else kind
                    return self.result(operation(data, given), dtype, kind)
            elif name == "__add__" and type(other) is tensor and dtype.is_ptr():
                return self.moved(self_, other) or slow(self_, other)
            return slow(self_, other)

        return quick

    def moved(self, pointer, offset):
        """A pointer and an offset in int32 or int64, or None."""
        if offset.dtype.name not in PROMOTED:
            return None
        kind, other = pointer.type, offset.type
        if not kind.is_block():
            kind = self.like(other, pointer.dtype)
        elif other.is_block() and not alike(kind, other):
            return None
        size = max(1, pointer.handle.get_element_ty().primitive_bitwidth // 8)
        data = pointer.handle.data + size * offset.handle.data.astype(np.uint64)
        return self.result(data, pointer.handle.dtype.scalar, kind)

    def reversed(self, slow, name):
        operation, names = REVERSED[name], names_of(name)

        def quick(self_, other):
            left, data = self_.dtype.name, self_.handle.data
            given = self.literal(other, left) if left in names else None
            if given is None or given.dtype != data.dtype:
                return slow(self_, other)
            return self.result(operation(given, data), self_.dtype, self_.type)

        return quick

    def cast(self, slow, name):
        tensor, constant = self.tensor, self.constant

        def quick(input, dtype, fp_downcast_rounding=None, bitcast=False):
            if type(input) is tensor and fp_downcast_rounding is None and not input.dtype.is_ptr():
                wanted = dtype.value if type(dtype) is constant else dtype
                source, target, data = input.dtype.name, wanted.name, input.handle.data
                if source == target:
                    return input
                if bitcast is True and source in BITCASTS and target in BITCASTS:
                    if data.itemsize == np.dtype(BITCASTS[target]).itemsize:
                        return self.result(data.view(BITCASTS[target]), wanted, self.like(input.type, wanted))
                if bitcast is False and target in CASTS and (source in SOURCES or (source, target) in FLOATS):
                    return self.result(data.astype(CASTS[target]), wanted, self.like(input.type, wanted))
            return slow(input, dtype, fp_downcast_rounding, bitcast)

        return quick

    def where(self, slow, name):
        tensor = self.tensor

        def quick(condition, x, y):
            one = x if type(x) is tensor else y
            if type(condition) is type(one) is tensor and condition.dtype.name == "int1":
                found = (
                    [self.array(o, one.dtype.name) for o in (x, y)] if one.dtype.name in BITCASTS else [None]
                )
                blocks, scalars = self.blocks(x, y, condition), [o for o in (x, y) if type(o) is tensor]
                scalars = [o for o in scalars if not o.type.is_block()]
                if (
                    not any(array is None for array in found)
                    and found[0].dtype == found[1].dtype
                    and (not blocks or alike(*blocks))
                    and all(o.handle.dtype.name == o.dtype.name for o in scalars)
                ):
                    kind = self.like(blocks[0], one.dtype) if blocks else one.type
                    return self.result(np.where(condition.handle.data, *found), one.dtype, kind)
            return slow(condition, x, y)

        return quick

    def fma(self, slow, name):
        def quick(x, y, z):
            data = [self.array(o, "fp32") for o in (x, y, z)]
            if not any(array is None for array in data):
                with_all = [*np.broadcast(*data).shape]
                for kind in self.blocks(x, y, z):
                    if kind.shape.values == with_all:
                        return self.result(data[0] * data[1] + data[2], kind.scalar, kind)
            return slow(x, y, z)

        return quick

    def load(self, slow, name):
        tensor = self.tensor

        def quick(pointer, mask=None, other=None, **others):
            if (
                type(pointer) is type(mask) is tensor
                and not others
                and type(other) in (int, float)
                and other == 0
            ):
                kinds = self.blocks(pointer, mask)
                if len(kinds) == 2 and alike(*kinds) and pointer.dtype.is_ptr():
                    element = pointer.dtype.element_ty
                    if element.name != "int1":
                        zeros = np.zeros(pointer.handle.data.shape, self.numpy_type(element))
                        handles = pointer.handle, mask.handle, self.handle(zeros, element)
                        found = self.builder.create_masked_load(*handles, None, None, False)
                        return self.tensor(found, self.like(kinds[0], element))
            return slow(pointer, mask, other, **others)

        return quick
