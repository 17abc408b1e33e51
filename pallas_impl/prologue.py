"""The prologue of the gated delta rule: the convolution, the norm of q's and k's heads, and the gates.

The kernels are those of `prefill` and `update`. Between the convolution of a tile and its way out, `Finish` norms
the heads that lie in it, in shared memory or in registers; programs beside those of the tiles compute the gates of the
same tokens. What no such kernel does (`is_fused`), and backend "xla", is in `plain_prologue`.
"""

from typing import NamedTuple

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

from pallas_impl.arithmetic import WARPGROUP, div, layout, rem
from pallas_impl.config import cdiv
from pallas_impl.launch import parts, run
from pallas_impl.plain_prologue import decay, finished, heads_of, rate
from pallas_impl.records import Heads
from pallas_impl.rows import load_rows, store_rows
from pallas_impl.slots import part_of_out

VECTOR = 8  # neighbouring channels that a thread norms at a time
TURNS = 2  # of them whose sums are under way together
WARP = 32
GATES = 8 * WARPGROUP  # of g or of beta that a program computes
NORM_T = 16  # tokens of a tile of `norm_heads`


def is_fused(call, sizes, options):
    """Whether one kernel runs a call: of all tokens of a prefill, or of one token a row, in tiles of whole heads."""
    if options.kernel not in ("prefill", "token") or not call.x.size or not sizes.batch:
        return False
    if options.kernel == "token" and not options.config.in_registers:
        return False
    heads = heads_of(call)
    block_d = next((d for d in (options.config.block_d, 128) if not any(n % d for n in heads.sizes)), None)
    size = heads.head_k_dim
    whole = not heads.norm or (size >= VECTOR and not size & (size - 1))
    return block_d is not None and whole and (not heads.norm or size <= block_d)


def flat_gates(arrays):
    """The arrays with [tokens, channels] of a and b."""
    tokens = arrays.x.size // arrays.x.shape[-1]
    flat = {
        name: array.reshape(tokens, -1) for name, array in arrays.named("a", "b").items() if array is not None
    }
    if arrays.dt_bias is not None:
        flat["dt_bias"] = arrays.dt_bias.reshape(-1)
    return arrays._replace(**flat)


# The norm behind kernels that leave it out, so that the bits are those of the fused ones.


def has_norm_kernel(call, sizes):
    """Whether `norm_heads` takes what the convolution of a call stores."""
    heads = heads_of(call)
    if call.backend == "xla" or not heads.storage or not heads.norm or not call.x.size:
        return False
    return _norm_tile_of(heads) is not None and not sizes.dim % (16 // call.x.dtype.itemsize)


def _norm_tile_of(heads):
    """Channels of a tile of whole heads; None where there is none."""
    size, of_q = heads.head_k_dim, heads.sizes[0]
    if size < VECTOR or size & (size - 1):
        return None
    return next((d for d in (256, 128) if not of_q % d and size <= d), None)


def norm_heads(y, heads, interpret):
    """q and k, normed, of y [tokens, dim], a result of the convolution."""
    tokens, block_d = y.shape[0], _norm_tile_of(heads)
    of_q, of_k, _ = heads.sizes
    columns = (of_q + of_k) // block_d

    def body(refs):
        program = lax.axis_index("program")
        begin = div(program, columns) * NORM_T
        channels = pl.ds(rem(program, columns) * block_d, block_d)
        length = jnp.minimum(tokens - begin, NORM_T)
        load_rows(refs.y, channels, refs.tile, refs.tile_ready, begin, length)
        plgpu.barrier_wait(refs.tile_ready)
        scale = jnp.where(channels.start < of_q, heads.q_scale, 1.0)
        norm_tile(refs.tile, None, length, scale, heads, interpret=bool(interpret))
        plgpu.commit_smem()
        part_of_out(refs.outs, channels, lambda out, part: store_rows(refs.tile, out, part, begin, length))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return run(
        body,
        "norm",
        cdiv(tokens, NORM_T) * columns,
        dict(y=y),
        parts(y.dtype, tokens, of_q + of_k, (of_q, of_k)),
        dict(tile=plgpu.SMEM((NORM_T, block_d), y.dtype), tile_ready=plgpu.Barrier()),
        interpret=interpret,
        tokens=tokens,
    )


# In a kernel: a tile of shared memory.


def norm_tile(tile, wide, length, scale, heads, *, interpret):
    """Norms and scales the heads in the first `length` rows of a tile, read from `wide`, float32, if there is one.

    Every thread takes neighbouring channels of a head, whichever threads convolved them.
    """
    size, block_d = heads.head_k_dim, tile.shape[1]
    if interpret:

        def row(r, _):
            values = tile[r].astype(jnp.float32) if wide is None else wide[r]
            tile[r] = finished(values, scale, heads).astype(tile.dtype)

        lax.fori_loop(0, length, row, None)
        return

    turns = min(TURNS, tile.shape[0] * block_d // (WARPGROUP * VECTOR))
    count = turns * WARPGROUP * VECTOR // block_d  # rows at a time

    @plgpu.inline_mgpu()
    def meet(_):
        mgpu.warpgroup_barrier()

    source = tile if wide is None else wide

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT)
    )
    def rows(_, source, target, group, scale):
        int32 = ir.IntegerType.get_signless(32)
        place = arith.muli(
            arith.addi(
                arith.muli(group.registers.item(), mgpu.c(turns * WARPGROUP, int32)), mgpu.thread_idx()
            ),
            mgpu.c(VECTOR, int32),
        )
        step = mgpu.c(WARPGROUP * VECTOR, int32)
        places = [place]
        for _ in range(turns - 1):
            places.append(arith.addi(places[-1], step))
        found = [[_load(source, place)] for place in places]
        for place, (values,) in zip(places, _finished(found, scale, heads, size // VECTOR), strict=True):
            _store(target, place, values)

    meet()
    lax.fori_loop(
        0, div(length + (count - 1), count), lambda group, _: rows(source, tile, group, scale), None
    )


def _address(ref, place):
    kind = ir.MemRefType(ref.type)
    pointer = mgpu.utils.memref_ptr(ref)
    return mgpu.utils.getelementptr(pointer, [place], kind.element_type), kind.element_type


def _load(ref, place):
    """VECTOR neighbouring elements of an array in shared memory from number `place` on, in float32."""
    address, element = _address(ref, place)
    float32 = ir.F32Type.get()
    each = 16 // mgpu.bytewidth(element)  # what one access takes
    parts = []
    for first in range(0, VECTOR, each):
        part = mgpu.utils.getelementptr(address, [first], element)
        parts.append(llvm.load(ir.VectorType.get((each,), element), part, alignment=16))
    elements = [
        vector.extract(part, dynamic_position=[], static_position=[i]) for part in parts for i in range(each)
    ]
    if element != float32:
        elements = [arith.extf(float32, value) for value in elements]
    return vector.from_elements(ir.VectorType.get((VECTOR,), float32), elements)


def _store(ref, place, values):
    address, element = _address(ref, place)
    if element != ir.F32Type.get():
        values = arith.truncf(ir.VectorType.get((VECTOR,), element), values)
    each = 16 // mgpu.bytewidth(element)
    for first in range(0, VECTOR, each):
        elements = [
            vector.extract(values, dynamic_position=[], static_position=[first + i]) for i in range(each)
        ]
        part = mgpu.utils.getelementptr(address, [first], element)
        llvm.store(vector.from_elements(ir.VectorType.get((each,), element), elements), part, alignment=16)


def _elements(register):
    kind = ir.VectorType(register.type)
    return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(kind.shape[0])]


def _sums_of_squares(rows, lanes):
    """The sum of squares of neighbouring channels in each row: this thread's, then those of a group of neighbouring threads."""
    totals = []
    for registers in rows:
        values = [arith.mulf(value, value) for register in registers for value in _elements(register)]
        while len(values) > 1:
            values = [_add(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        totals += values
    distance = 1
    while distance < min(lanes, WARP):
        others = [_shuffled(total, distance) for total in totals]  # on their way together
        totals = [_add(total, other) for total, other in zip(totals, others, strict=True)]
        distance *= 2
    return totals


def _finished(rows, scale, heads, lanes, partial=None):
    """Rows of neighbouring channels of a head, normed and scaled; `partial`: shared memory for one row of heads of several warps."""
    factors = [[] for _ in rows]
    if heads.norm:
        totals = _sums_of_squares(rows, lanes)
        if lanes > WARP:
            totals = [_sum_of_warps(partial, *totals, lanes // WARP)]
        factors = [[_inverse_root(total, heads.eps)] for total in totals]
    if heads.q_scale != 1.0:
        factors = [[*each, scale.registers.item()] for each in factors]
    for i, found in enumerate(factors):
        for factor in found:
            rows[i] = [arith.mulf(each, vector.broadcast(each.type, factor)) for each in rows[i]]
    return rows


def _instruction(text, *operands):
    """One float32 of an instruction on float32 values."""
    names = ", ".join(f"${i}" for i in range(len(operands) + 1))
    constraints = ",".join(["=f"] + ["f"] * len(operands))
    return llvm.inline_asm(ir.F32Type.get(), list(operands), f"{text} {names};", constraints)


def _add(a, b):
    return _instruction("add.rn.f32", a, b)


def _shuffled(value, distance):
    return llvm.inline_asm(
        ir.F32Type.get(),
        [value],
        f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;",
        "=f,f",
        has_side_effects=True,
    )


# 1 / sqrt of a float32, both steps correctly rounded. The instructions that round correctly branch on numbers of a size that
# no total with an eps of this has; without them what remains of both is a Newton step each. Where the approximation is 0,
# infinite or no number, it is the result.
INVERSE_ROOT_OF_ALL = "{ .reg .f32 t; sqrt.rn.f32 t, $1; rcp.rn.f32 $0, t; }"
INVERSE_ROOT = """{
    .reg .f32 r, s, h, e; .reg .pred p;
    rsqrt.approx.ftz.f32 r, $1;
    mul.rn.f32 s, $1, r; mul.rn.f32 h, r, 0f3F000000; neg.f32 e, s; fma.rn.f32 e, e, s, $1; fma.rn.f32 s, e, h, s;
    setp.nan.f32 p, s, s;
    rcp.approx.ftz.f32 h, s;
    neg.f32 e, s; fma.rn.f32 e, e, h, 0f3F800000; fma.rn.f32 h, h, e, h;
    selp.f32 $0, r, h, p; }"""


def _inverse_root(total, eps):
    """1 / sqrt(total + eps), each of the three steps correctly rounded."""
    float32 = ir.F32Type.get()
    total = _add(total, arith.constant(float32, ir.FloatAttr.get(float32, eps)))
    text = INVERSE_ROOT if eps >= 2.0**-60 else INVERSE_ROOT_OF_ALL
    return llvm.inline_asm(float32, [total], text, "=f,f")


# In registers.


def norm_row(row, partial, scale, heads, *, interpret):
    """Norms the heads in a row of channels, a float32 vector in `layout`; `partial`: [4] float32 in shared memory."""
    block_d, size = row.shape[0], heads.head_k_dim
    if interpret:
        return finished(row, scale, heads)
    kind, scalar = layout(block_d), plgpu.Layout.WG_SPLAT
    lanes = size * WARPGROUP // block_d  # threads of a head
    crosses = heads.norm and lanes > WARP

    @plgpu.inline_mgpu(
        arg_types=(kind, scalar, *(plgpu.RefType(),) * crosses),
        return_type=plgpu.ShapeDtypeStruct(row.shape, jnp.float32, kind),
    )
    def run(_, row, scale, *partial):
        (registers,) = _finished([list(row.registers.flat)], scale, heads, lanes, *partial)
        return mgpu.FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(row.registers.shape),
            _layout=row.layout,
            _is_signed=None,
        )

    return run(row, scale, *(partial,) * crosses)


def _sum_of_warps(partial, total, warps):
    """The sum of the totals of 2 or 4 neighbouring warps, in the same order in each."""
    int32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    warp = arith.shrui(mgpu.thread_idx(), mgpu.c(5, int32))
    first = arith.andi(warp, mgpu.c(-warps, int32))
    place = lambda number: [arith.index_cast(index, number)]  # noqa: E731
    memref.store(total, partial, place(warp))
    mgpu.warpgroup_barrier()
    values = [memref.load(partial, place(arith.addi(first, mgpu.c(i, int32)))) for i in range(warps)]
    while len(values) > 1:
        values = [_add(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


# The gates.


def write_gates(refs, share, heads, *, interpret):
    """Computes g and beta of a share.

    Args:
      refs: a and g [tokens, HV] or [tokens, HV * K], A_log [HV], dt_bias like a row of a; b and beta [tokens, HV];
        None where absent.
    """
    if refs.a is not None:
        extra = (refs.A_log,) if refs.dt_bias is None else (refs.A_log, refs.dt_bias)
        each = refs.a.shape[1] // heads.num_v_heads

        def in_plain(value):
            A_log = jnp.repeat(refs.A_log[...].astype(jnp.float32), each)
            dt_bias = None if refs.dt_bias is None else refs.dt_bias[...].astype(jnp.float32)
            return decay(value.astype(jnp.float32), A_log, dt_bias, heads.lower_bound)

        def in_register(value, channel, A_log, dt_bias=None):
            index = ir.IndexType.get()
            head = channel if each == 1 else arith.divui(channel, mgpu.c(each, index))
            z = value if dt_bias is None else _add(value, _widened(memref.load(dt_bias, [channel])))
            scale = math.exp(_widened(memref.load(A_log, [head])))
            if heads.lower_bound is None:
                large = arith.cmpf(arith.CmpFPredicate.OGT, z, _float(20.0))
                soft = arith.select(large, z, math.log1p(math.exp(z)))
                return arith.mulf(arith.negf(scale), soft)
            return arith.mulf(_float(heads.lower_bound), _sigmoid(arith.mulf(scale, z)))

        _write(refs.a, refs.g, extra, share, in_plain, in_register, interpret)
    if refs.b is None:
        return

    storage = refs.b.dtype if heads.round_beta and refs.b.dtype != jnp.float32 else None

    def beta_in_register(value, _):
        found = _sigmoid(value)
        if storage is None:
            return found
        kind = ir.BF16Type.get() if storage == jnp.bfloat16 else ir.F16Type.get()
        return arith.extf(ir.F32Type.get(), arith.truncf(kind, found))

    in_plain = lambda value: rate(value, storage)  # noqa: E731
    _write(refs.b, refs.beta, (), share, in_plain, beta_in_register, interpret)


def _write(source, target, extra, share, in_plain, in_register, interpret):
    """target[t, c] = f(source[t, c]) for a share of tokens and all channels, an element a thread."""
    if interpret:

        def row(r, _):
            place = share.first + r
            target[place] = jnp.where(share.live, in_plain(source[place]), 0.0)

        lax.fori_loop(0, jnp.where(share.column == 0, share.count, 0), row, None)
        return

    scalar = plgpu.Layout.WG_SPLAT
    channels = source.shape[1]
    elements = cdiv(share.most * channels, share.columns)  # of this program

    @plgpu.inline_mgpu(arg_types=((plgpu.RefType(),) * (2 + len(extra)), (scalar,) * 5))
    def turn(_, arrays, place):
        source, target, *extra = arrays
        first, count, column, live, turn = (value.registers.item() for value in place)
        int32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        whole = lambda value: mgpu.c(value, int32)  # noqa: E731
        below = lambda a, b: arith.cmpi(arith.CmpIPredicate.slt, a, b)  # noqa: E731
        number = arith.addi(arith.muli(turn, whole(WARPGROUP)), mgpu.thread_idx())
        inside = below(number, whole(elements))
        number = arith.addi(arith.muli(column, whole(elements)), number)
        token = arith.divui(number, whole(channels))
        with mgpu.when(arith.andi(inside, below(token, count))):
            channel = arith.remui(number, whole(channels))
            at = [arith.index_cast(index, arith.addi(first, token)), arith.index_cast(index, channel)]
            found = in_register(_widened(memref.load(source, at)), at[1], *extra)
            is_live = arith.cmpi(arith.CmpIPredicate.ne, live, whole(0))
            memref.store(arith.select(is_live, found, _float(0.0)), target, at)

    arrays = (source, target, *extra)
    place = (share.first, share.count, share.column, share.live.astype(jnp.int32))
    if elements <= WARPGROUP:
        turn(arrays, (*place, jnp.int32(0)))
    else:
        lax.fori_loop(0, cdiv(elements, WARPGROUP), lambda i, _: turn(arrays, (*place, i)), None)


def _float(value):
    float32 = ir.F32Type.get()
    return arith.constant(float32, ir.FloatAttr.get(float32, value))


def _widened(value):
    return value if value.type == ir.F32Type.get() else arith.extf(ir.F32Type.get(), value)


def _sigmoid(z):
    return _instruction("rcp.rn.f32", _add(_float(1.0), math.exp(arith.negf(z))))


# What a kernel does besides.


def finish_of(arrays, options):
    """The `Finish` of a call of a kernel; None where it is no prologue."""
    if options.heads is None:
        return None
    gates = arrays.named("a", "b", "A_log", "dt_bias")
    return Finish(options.heads, **gates, interpret=bool(options.interpret))


class Finish(NamedTuple):
    """A prologue as the kernels of `prefill` and `update` see it."""

    heads: Heads
    a: jax.Array | None = None
    b: jax.Array | None = None
    A_log: jax.Array | None = None
    dt_bias: jax.Array | None = None
    interpret: bool = False

    def operands(self):
        return dict(a=self.a, b=self.b, A_log=self.A_log, dt_bias=self.dt_bias)

    def results(self):
        found = dict(g=self.a, beta=self.b)
        return {
            name: jax.ShapeDtypeStruct(array.shape, jnp.float32)
            for name, array in found.items()
            if array is not None
        }

    def scratch_of_tile(self, block_t, block_d, dtype):
        if self.heads.storage or dtype == jnp.float32 or not self.heads.changes:
            return {}
        return dict(wide=plgpu.SMEM((block_t, block_d), jnp.float32))

    def scratch_of_rows(self, rows, block_d):
        if not self.heads.norm or self.heads.head_k_dim * WARPGROUP // block_d <= WARP:
            return {}
        return {f"partial{r}": plgpu.SMEM((WARPGROUP // WARP,), jnp.float32) for r in range(rows)}

    def columns(self, tokens):
        """Programs beside those of `tokens` tokens' channels, for their gates."""
        widest = max((array.shape[1] for array in (self.a, self.b) if array is not None), default=0)
        return cdiv(tokens * widest, GATES)

    def gates(self, refs, share):
        """The gates of such a program."""
        write_gates(refs, share, self.heads, interpret=self.interpret)

    def _is_normed(self, channel):
        of_q, of_k, _ = self.heads.sizes
        return channel < of_q + of_k, jnp.where(channel < of_q, self.heads.q_scale, 1.0)

    def tile(self, tile, wide, length, channel):
        """Behind the convolution of a tile; its results lie in `wide`, if there is one."""
        if not self.heads.changes:
            return
        is_normed, scale = self._is_normed(channel)

        @pl.when(is_normed)
        def _():
            norm_tile(tile, wide, length, scale, self.heads, interpret=self.interpret)

        if wide is not None:

            @pl.when(jnp.logical_not(is_normed))
            def _():
                def row(r, _):
                    tile[r] = wide[r].astype(tile.dtype)

                lax.fori_loop(0, length, row, None)

    def row(self, y, partial, channel, dtype):
        """Behind the convolution of a row, a float32 vector."""
        if not self.heads.changes:
            return y
        if self.heads.storage:
            y = y.astype(dtype).astype(jnp.float32)
        is_normed, scale = self._is_normed(channel)
        return lax.cond(
            is_normed,
            lambda: norm_row(y, partial, scale, self.heads, interpret=self.interpret),
            lambda: y,
        )
