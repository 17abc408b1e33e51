"""Device code that both kernels share: the taps of a block of channels, one output row, the row search.

A warpgroup holds one row of `lanes` channels (128 or 256) as a vector, one or two neighbouring channels
a thread. One formula in one order everywhere is what makes prefill, decode, both schedules and all block
sizes agree bit for bit. The interpreter cannot run inline Mosaic GPU code, so each function has a plain
form as well; there SiLU uses exact exp2 and division.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, memref, vector
from jaxlib.mlir.dialects import llvm  # not in jax.extend.mlir

WARPGROUP = 128
LOG2E = 1.4426950408889634
SCALE = 2.0**-14


def layout(lanes):
    """How a row of `lanes` channels lies in a warpgroup's registers: neighbouring channels a thread."""
    return plgpu.Layout.WG_STRIDED((lanes,), vec_size=lanes // WARPGROUP)


def in_layout(value, *, interpret):
    """A row of channels as `layout` has it."""
    return value if interpret else plgpu.layout_cast(value, layout(value.shape[0]))


def load_taps(weight_ref, bias_ref, channel, lanes, *, interpret):
    """Loads the taps and the bias of channels `channel` to `channel + lanes - 1`, as float32 vectors.

    Channels past the end repeat the last one, so nothing outside the arrays is read; what is computed for
    them is never stored.

    Returns:
      (taps, start): `width` vectors, oldest tap first, and the bias or zeros.
    """
    dim, width = weight_ref.shape
    if interpret:
        columns = pl.ds(channel, lanes)
        taps = tuple(weight_ref[columns, j].astype(jnp.float32) for j in range(width))
        if bias_ref is None:
            return taps, jnp.zeros((lanes,), jnp.float32)
        return taps, bias_ref[columns].astype(jnp.float32)

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
        return tuple(_gather(column, first, dim, lanes) for column in columns)

    loaded = load(channel, *refs)
    if bias_ref is not None:
        return loaded[:width], loaded[width]
    return loaded, plgpu.layout_cast(jnp.zeros((lanes,), jnp.float32), layout(lanes))


def convolve(window, taps, start, *, silu, interpret):
    """act(start + sum of taps[j] * window[j]), oldest first, one fused multiply-add a tap; float32 vectors."""
    if interpret:
        total = start
        for tap, value in zip(taps, window, strict=True):
            total = multiply_add(split(tap), split(value), total)
        return activate(total) if silu else total

    lanes = start.shape[0]
    width = len(taps)
    kind = layout(lanes)

    @plgpu.inline_mgpu(
        arg_types=(kind,) * (2 * width + 1), return_type=plgpu.ShapeDtypeStruct((lanes,), jnp.float32, kind)
    )
    def run(_, total, *operands):
        for tap, value in zip(operands[:width], operands[width:], strict=True):
            total = _map(math.fma, tap, value, total)
        return _map(_silu, total) if silu else total

    return run(start, *taps, *window)


def add(total, value, *, interpret):
    """total + value of float32 vectors; the product that `total` ends with is rounded before."""
    if interpret:
        # Compilers fuse that product into the sum even across an optimization barrier, but not across a choice.
        return jnp.where(total == total, total, jnp.nan) + value
    kind = layout(total.shape[0])

    @plgpu.inline_mgpu(
        arg_types=(kind, kind), return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, kind)
    )
    def run(_, total, value):
        return _map(functools.partial(_ptx, "add.rn.f32"), total, value)

    return run(total, value)


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
        return _map(lambda register: arith.select(holds, register, _constant(register.type, 0.0)), value)

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


def div(a, b):
    """Quotient of an int32 and a Python int, both >= 0; the sizes stay int32 under jax_enable_x64 too."""
    return lax.div(a, jnp.int32(b))


def rem(a, b):
    return lax.rem(a, jnp.int32(b))


def find_row(starts_ref, block, block_t, batch, tokens, *, interpret):
    """The last row whose first block is at most `block`; blocks are numbered start // block_t + row.

    Row `batch` is the tail after the last row. With offsets that increase, as they must, the first blocks
    increase strictly, so a descent over powers of two finds the row; with others it finds some row. The
    last ten steps of a descent are one vote of the warpgroup, since each step waits for memory.
    """
    vote = 1 if interpret or batch < 8 else min(1024, -(-batch // WARPGROUP) * WARPGROUP)

    row = jnp.int32(0)
    for step in (1 << i for i in reversed(range(batch.bit_length())) if 1 << i >= vote):
        probe = row + step
        start = jnp.clip(starts_ref[jnp.minimum(probe, batch)], 0, tokens)
        row = jnp.where((probe <= batch) & (div(start, block_t) + probe <= block), probe, row)
    if vote == 1:
        return row

    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), scalar, scalar), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, scalar)
    )
    def count(_, starts, row, block):
        int32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        constant = lambda value: mgpu.c(value, int32)  # noqa: E731
        at_most = lambda a, b: arith.cmpi(arith.CmpIPredicate.sle, a, b)  # noqa: E731
        row, block = row.registers.item(), block.registers.item()
        lane = arith.addi(row, mgpu.thread_idx())
        votes = []
        for offset in range(0, vote, WARPGROUP):
            probe = arith.addi(lane, constant(offset + 1))
            start = memref.load(starts, [arith.index_cast(index, arith.minsi(probe, constant(batch)))])
            start = arith.minsi(arith.maxsi(start, constant(0)), constant(tokens))
            first = arith.addi(arith.divui(start, constant(block_t)), probe)
            votes.append(arith.andi(at_most(probe, constant(batch)), at_most(first, block)))
        for ballot in votes:
            found = llvm.inline_asm(
                int32, [arith.extui(int32, ballot)],
                "{ .reg .pred p; setp.ne.u32 p, $1, 0; barrier.cta.red.popc.aligned.u32 $0, 0, p; }",
                "=r,r", has_side_effects=True,
            )  # fmt: skip
            row = arith.addi(row, found)
        return mgpu.FragmentedArray.splat(row, (), is_signed=True)

    return count(starts_ref, row, block)


def _gather(load, first, dim, lanes):
    """A float32 FragmentedArray of `load(c)` for c from `first` on, clamped to the last channel."""
    index = ir.IndexType.get()
    float32 = ir.F32Type.get()
    kind = mgpu.WGStridedFragLayout((lanes,), lanes // WARPGROUP)
    registers = np.empty(kind.registers_shape((lanes,)), dtype=object)
    base = arith.index_cast(
        index, first.registers.item() if isinstance(first, mgpu.FragmentedArray) else first
    )
    for i, lane in enumerate(kind.linear_thread_idxs()):
        values = []
        for k in range(kind.vec_size):
            channel = arith.addi(arith.addi(base, lane), mgpu.c(k, index))
            value = load(arith.minui(channel, mgpu.c(dim - 1, index)))
            values.append(value if value.type == float32 else arith.extf(float32, value))
        registers[i] = vector.from_elements(ir.VectorType.get((kind.vec_size,), float32), values)
    return mgpu.FragmentedArray(_registers=registers, _layout=kind, _is_signed=None)


def _map(op, *arrays):
    registers = np.empty_like(arrays[0].registers)
    for i, parts in enumerate(zip(*(a.registers.flat for a in arrays), strict=True)):
        registers.flat[i] = op(*parts)
    return mgpu.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=None)


def _silu(z):
    """`activate` of a register, in the instructions of the Triton twin."""
    kind = z.type
    exponent = math.fma(z, _constant(kind, -LOG2E), _constant(kind, -14.0))
    power = arith.addf(_ptx("ex2.approx.ftz.f32", exponent), _constant(kind, SCALE))
    return arith.mulf(arith.mulf(z, _constant(kind, SCALE)), _ptx("rcp.approx.ftz.f32", power))


def _constant(kind, value):
    element = ir.FloatAttr.get(kind.element_type, value)
    return arith.constant(kind, ir.DenseElementsAttr.get_splat(kind, element))


def _ptx(instruction, *registers):
    kind = ir.VectorType(registers[0].type)
    names = ", ".join(f"${i}" for i in range(len(registers) + 1))
    parts = []
    for i in range(kind.shape[0]):
        operands = [vector.extract(r, dynamic_position=[], static_position=[i]) for r in registers]
        constraints = ",".join(["=f"] + ["f"] * len(operands))
        parts.append(llvm.inline_asm(kind.element_type, operands, f"{instruction} {names};", constraints))
    return vector.from_elements(kind, parts)
