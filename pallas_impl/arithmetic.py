"""The arithmetic of every kernel: the taps of a block of channels, the sum, SiLU and its slope, rounding.

A warpgroup holds one row of `block_d` channels (128 or 256) as a vector, one or two neighbouring channels
a thread. One formula in one order everywhere is what makes prefill, decode, both schedules and all block
sizes agree bit for bit. The interpreter cannot run inline Mosaic GPU code, so each function has a plain
form as well; there SiLU uses exact exp2 and division.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, memref, vector
from jaxlib.mlir.dialects import llvm  # not in jax.extend.mlir

WARP, WARPGROUP = 32, 128
LOG2E = 1.4426950408889634
SCALE = 2.0**-14


def layout(block_d):
    """How a row of `block_d` channels lies in a warpgroup's registers: neighbouring channels a thread."""
    return plgpu.Layout.WG_STRIDED((block_d,), vec_size=block_d // WARPGROUP)


def in_layout(value, *, interpret):
    """A row of channels as `layout` has it."""
    return value if interpret else plgpu.layout_cast(value, layout(value.shape[0]))


def load_taps(weight_ref, bias_ref, channel, block_d, *, repeats=1, interpret):
    """Loads the taps and the bias of channels `channel` to `channel + block_d - 1`, as float32 vectors.

    With `repeats`, vectors hold them so many times over. Channels past the end repeat the last one, so nothing outside the
    arrays is read; what is computed for them is never stored.

    Returns:
      (taps, start): `width` vectors, oldest tap first, and the bias or zeros.
    """
    dim, width = weight_ref.shape
    if interpret:
        columns = pl.ds(channel, block_d)
        wide = lambda values: jnp.tile(values.astype(jnp.float32), repeats)  # noqa: E731
        taps = tuple(wide(weight_ref[columns, j]) for j in range(width))
        if bias_ref is None:
            return taps, jnp.zeros((block_d * repeats,), jnp.float32)
        return taps, wide(bias_ref[columns])

    lanes = block_d * repeats
    row = plgpu.ShapeDtypeStruct((lanes,), jnp.float32, layout(lanes))
    refs = (weight_ref,) if bias_ref is None else (weight_ref, bias_ref)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT, *(plgpu.RefType() for _ in refs)),
        return_type=(row,) * (width + len(refs) - 1),
    )
    def load(_, first, weight, *bias):
        oldest_first = [mgpu.c(j, ir.IndexType.get()) for j in range(width)]
        columns = [lambda c, j=j: memref.load(weight, [c, j]) for j in oldest_first]
        columns += [lambda c, b=b: memref.load(b, [c]) for b in bias]
        return tuple(_gather(column, first, dim, block_d, repeats) for column in columns)

    loaded = load(channel, *refs)
    if bias_ref is not None:
        return loaded[:width], loaded[width]
    return loaded, plgpu.layout_cast(jnp.zeros((lanes,), jnp.float32), layout(lanes))


def convolve(window, taps, start, *, silu, interpret):
    """act(start + sum of taps[j] * window[j]), oldest first, one fused multiply-add a tap; float32 vectors."""
    if interpret:
        return _convolve(tuple(window), tuple(taps), start, silu)

    block_d = start.shape[0]
    width = len(taps)
    kind = layout(block_d)

    @plgpu.inline_mgpu(
        arg_types=(kind,) * (2 * width + 1), return_type=plgpu.ShapeDtypeStruct((block_d,), jnp.float32, kind)
    )
    def run(_, total, *operands):
        for tap, value in zip(operands[:width], operands[width:], strict=True):
            total = map_registers(math.fma, tap, value, total)
        return map_registers(silu_of_register, total) if silu else total

    return run(start, *taps, *window)


@functools.partial(jax.jit, static_argnums=3)  # traced once for all tokens of a kernel
def _convolve(window, taps, start, silu):
    """`convolve` in plain jax.numpy."""
    total = start
    for tap, value in zip(taps, window, strict=True):
        total = multiply_add(split(tap), split(value), total)
    return activate(total) if silu else total


def add_residual(total, value, *, interpret):
    """total + value of float32 vectors; the product that `total` ends with is rounded before."""
    if interpret:
        # Compilers fuse that product into the sum even across an optimization barrier, but not across a choice.
        return jnp.where(total == total, total, jnp.nan) + value
    kind = layout(total.shape[0])

    @plgpu.inline_mgpu(
        arg_types=(kind, kind), return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, kind)
    )
    def run(_, total, value):
        return map_registers(functools.partial(ptx, "add.rn.f32"), total, value)

    return run(total, value)


def gated(value, gate, dtype):
    """value * gate of one dtype, rounded once to it."""
    return (value.astype(jnp.float32) * gate.astype(jnp.float32)).astype(dtype)


def keep(condition, value, *, interpret):
    """`value`, a float32 vector, or zeros unless the scalar condition holds: a selection, no branch."""
    if interpret:
        return jnp.where(condition, value, 0.0)
    kind = layout(value.shape[0])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT, kind),
        return_type=plgpu.ShapeDtypeStruct(value.shape, jnp.float32, kind),
    )
    def run(_, condition, value):
        zero = mgpu.c(0, ir.IntegerType.get_signless(32))
        holds = arith.cmpi(arith.CmpIPredicate.ne, condition.registers.item(), zero)
        return map_registers(
            lambda register: arith.select(holds, register, constant(register.type, 0.0)), value
        )

    return run(condition.astype(jnp.int32), value)


def issue_loads(*, interpret):
    """Loads written before this are under way before anything after it waits: the assembler moves none across."""
    if interpret:
        return

    @plgpu.inline_mgpu()
    def run(_):
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [], "bar.warp.sync 0xffffffff;", "~{memory}", has_side_effects=True)

    run()


def split(value):
    """Float values as one or two float32 parts of at most 12 significant bits, whose sum they are.

    Products of such parts are exact, so it does not matter whether the compiler fuses them into the sums
    around them. XLA decides that anew for each shape, which would let results depend on the batch.
    """
    if value.dtype != jnp.float32:
        return (value.astype(jnp.float32),)
    high = lax.bitcast_convert_type(value, jnp.uint32) & jnp.uint32(0xFFFFF000)
    finite = jnp.isfinite(value)
    high = jnp.where(finite, lax.bitcast_convert_type(high, jnp.float32), value)
    return high, jnp.where(finite, value - high, 0.0)


def multiply_add(a, b, total):
    """total + a * b of split values, to within two roundings."""
    product = a[0] * b[0]
    rest = [x * y for x in reversed(a) for y in reversed(b)][:-1]
    if not rest:
        return total + product
    # An infinity has no second part, and 0 times it is not 0.
    return total + product + jnp.where(jnp.isfinite(product), functools.reduce(jnp.add, rest), 0.0)


def activate(z):
    """SiLU of float32 values: z * sigmoid(z), scaled by 2**14 so that nothing over- or underflows early."""
    exponent = multiply_add(split(z), split(jnp.float32(-LOG2E)), jnp.float32(-14.0))
    return (z * SCALE) * (1.0 / (jnp.exp2(exponent) + SCALE))


def silu_slope(z):
    """The derivative of SiLU, s * (1 + z * (1 - s)); 2**14 * s in between, and no cancellation in 1 - s.

    Beyond 97 it is 0 or 1 to the last bit of a float32.
    """
    z = jnp.clip(z, -97.0, 97.0)
    p = jnp.exp2(z * -LOG2E - 14.0)
    r = 1.0 / (p + SCALE)
    return r * (1.0 + z * (p * r)) * SCALE


def round_to(value, dtype):
    """The value in `dtype`; as it is where it has it, since a conversion may lose a NaN's payload."""
    return value if value.dtype == dtype else value.astype(dtype)


def div(a, b):
    """Quotient of an int32 and a Python int, both >= 0; the sizes stay int32 under jax_enable_x64 too."""
    return lax.div(a, jnp.int32(b))


def rem(a, b):
    return lax.rem(a, jnp.int32(b))


def _gather(load, first, dim, block_d, repeats):
    """A float32 FragmentedArray of `load(c)` for `block_d` channels from `first` on, clamped to the last channel."""
    index = ir.IndexType.get()
    float32 = ir.F32Type.get()
    lanes = block_d * repeats
    kind = mgpu.WGStridedFragLayout((lanes,), lanes // WARPGROUP)
    registers = np.empty(kind.registers_shape((lanes,)), dtype=object)
    base = arith.index_cast(
        index, first.registers.item() if isinstance(first, mgpu.FragmentedArray) else first
    )
    for i, lane in enumerate(kind.linear_thread_idxs()):
        values = []
        if repeats > 1:
            lane = arith.remui(lane, mgpu.c(block_d, index))
        for k in range(kind.vec_size):
            channel = arith.addi(arith.addi(base, lane), mgpu.c(k, index))
            value = load(arith.minui(channel, mgpu.c(dim - 1, index)))
            values.append(value if value.type == float32 else arith.extf(float32, value))
        registers[i] = vector.from_elements(ir.VectorType.get((kind.vec_size,), float32), values)
    return mgpu.FragmentedArray(_registers=registers, _layout=kind, _is_signed=None)


def map_registers(op, *arrays):
    registers = np.empty_like(arrays[0].registers)
    for i, parts in enumerate(zip(*(a.registers.flat for a in arrays), strict=True)):
        registers.flat[i] = op(*parts)
    return mgpu.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=None)


def silu_of_register(z):
    """`activate` of a register, in the instructions of the Triton twin."""
    kind = z.type
    exponent = math.fma(z, constant(kind, -LOG2E), constant(kind, -14.0))
    power = arith.addf(ptx("ex2.approx.ftz.f32", exponent), constant(kind, SCALE))
    return arith.mulf(arith.mulf(z, constant(kind, SCALE)), ptx("rcp.approx.ftz.f32", power))


def silu_slope_of_register(z):
    """`silu_slope` of a register, in the instructions of the Triton twin."""
    kind = z.type
    one = lambda value: constant(kind, value)  # noqa: E731
    z = arith.minimumf(arith.maximumf(z, one(-97.0)), one(97.0))
    p = ptx("ex2.approx.ftz.f32", math.fma(z, one(-LOG2E), one(-14.0)))
    r = ptx("rcp.approx.ftz.f32", arith.addf(p, one(SCALE)))
    return arith.mulf(arith.mulf(r, math.fma(z, arith.mulf(p, r), one(1.0))), one(SCALE))


def silu_and_slope_of_register(z):
    """`activate` and `silu_slope` of a register, which share exponential and quotient."""
    kind = z.type
    one = lambda value: constant(kind, value)  # noqa: E731
    above = arith.maximumf(z, one(-97.0))  # where SiLU is zero to a float32
    z = arith.minimumf(above, one(97.0))
    p = ptx("ex2.approx.ftz.f32", math.fma(z, one(-LOG2E), one(-14.0)))
    r = ptx("rcp.approx.ftz.f32", arith.addf(p, one(SCALE)))
    s = arith.mulf(r, one(SCALE))
    return arith.mulf(above, s), arith.mulf(s, math.fma(z, arith.mulf(p, r), one(1.0)))


def constant(kind, value):
    element = ir.FloatAttr.get(kind.element_type, value)
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, element))


def ptx(instruction, *registers):
    kind = ir.VectorType(registers[0].type)
    names = ", ".join(f"${i}" for i in range(len(registers) + 1))
    parts = []
    for i in range(kind.shape[0]):
        operands = [vector.extract(r, dynamic_position=[], static_position=[i]) for r in registers]
        constraints = ",".join(["=f"] + ["f"] * len(operands))
        parts.append(llvm.inline_asm(kind.element_type, operands, f"{instruction} {names};", constraints))
    return vector.from_elements(kind, parts)
