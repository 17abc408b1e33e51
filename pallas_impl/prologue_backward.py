"""Gradients of the prologue of the gated delta rule and of the gated short convolution.

Of the prologue, where a tile holds whole heads (`is_fused`), those of q, k and v are one pass, the kernel of `backward`
with the walk of `Front` in place of its own: between upstream gradient and the slope of the activation comes the norm's
derivative, from the value that is computed again. Those of the gated convolution are one pass where its slices are all
there is (`_is_one_pass`, `backward.Options.gates`). Else the convolution is computed again and differentiated by
`backward`, and XLA computes what lies behind it, and in front. A rounding inside counts as the identity, and gradients
are float32 up to the one rounding of each result.

In `Front`'s walk a warp holds all 128 channels of a tile, four neighbouring ones a thread, so that a head never leaves it,
and each of the four warps walks down a quarter of the block's tokens: a vector in registers is a token of each.
The gradient of x takes the place of the upstream gradient that was read in the same step, `width-1` tokens further on.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, memref, vector
from jaxlib.mlir.dialects import llvm  # not in jax.extend.mlir

from oracle.contract import FnCall
from pallas_impl import backward, plain
from pallas_impl.arithmetic import (
    WARPGROUP,
    activate,
    constant,
    convolve,
    div,
    in_layout,
    issue_loads,
    layout,
    load_taps,
    map_registers,
    ptx,
    silu_and_slope_of_register,
    silu_slope,
    silu_slope_of_register,
)
from pallas_impl.call import interpreter, run_prefill
from pallas_impl.config import BACKWARD_D, backward_config, cdiv
from pallas_impl.gated_conv import offsets, slices
from pallas_impl.plain_prologue import (
    heads_of,
    parameters_of,
    rounded,
    sigmoid,
    sigmoid_slope,
    softplus,
    tree_sum,
)
from pallas_impl.records import Heads
from pallas_impl.tracing import refuse_transforms

WARPS = 4  # each walks down tokens of its own
LANES = WARPS * BACKWARD_D
VECTOR = LANES // WARPGROUP  # neighbouring channels a thread
GROUP = 4  # tokens of a warp between two turns of the loop


def prologue(call, upstream):
    """The gradients of a checked `PrologueFnCall` without slots, `conv_states` being the rows' own.

    Args:
      call: the packed call; `conv_states` may be None.
      upstream: the gradients of the six results, None where no loss depends on one.

    Returns:
      {name: gradient} of x, weight, bias, conv_states, a, b, A_log and dt_bias; None for those that are None.
    """
    dq, dk, dv, dg, dbeta, dfinal = upstream
    heads, tokens = heads_of(call), call.x.shape[0]
    live = jnp.arange(tokens) < plain.offsets(call.query_start_loc, tokens)[-1]
    if is_fused(call):
        return _fused(call, heads, (dq, dk, dv), dfinal) | _gates(call, heads, live, dg, dbeta)
    stored = heads.storage or not heads.changes
    y = _convolved(call, call.x if stored else call.x.astype(jnp.float32))
    of_q, of_k, _ = heads.sizes
    q, k, v = jnp.split(y, (of_q, of_q + of_k), axis=1)
    parts = (
        _norm_gradient(q, dq, heads, heads.q_scale),
        _norm_gradient(k, dk, heads, 1.0),
        jnp.zeros(v.shape, jnp.float32) if dv is None else dv.reshape(v.shape).astype(jnp.float32),
    )
    dy = plain.where_live(live, jnp.concatenate(parts, axis=1))
    return _convolution(call, call.x, dy, dfinal) | _gates(call, heads, live, dg, dbeta)


def is_fused(call):
    """Whether one pass gives the gradients of q, k and v: tiles of whole heads, and a window that registers hold."""
    heads, size = heads_of(call), call.head_k_dim
    rows = call.query_start_loc.shape[0] - 1
    if call.backend == "xla" or not call.x.size or not rows or call.weight.shape[1] > GROUP + 1:
        return False
    whole = not heads.norm or (VECTOR <= size <= BACKWARD_D and not size & (size - 1))
    return whole and not any(part % BACKWARD_D for part in heads.sizes)


def _fused(call, heads, upstream, dfinal):
    """Gradients of the convolution's arguments, by name."""
    x, tokens = call.x, call.x.shape[0]
    douts = [
        jnp.zeros((tokens, size), x.dtype) if dout is None else dout.reshape(tokens, size)
        for dout, size in zip(upstream, heads.sizes, strict=True)
    ]
    front = Front(heads, call.backend == "mosaic_gpu_interpret")
    return _launch(call, x, douts, dfinal, dict(front=front))


def _launch(call, x, douts, dfinal, what):
    """Gradients of x and the convolution's other arguments, by name, from `backward`'s kernels with options `what`."""
    (dim, _), tokens, starts = call.weight.shape, x.shape[0], call.query_start_loc
    *douts, dfinal, x, weight, bias, pool = refuse_transforms(
        *douts, dfinal, x, call.weight, call.bias, call.conv_states
    )
    if starts.dtype != jnp.int32:
        starts = plain.offsets(starts, tokens)
    rows, arrays = starts.shape[0] - 1, 4 if "gates" in what else 2
    config = backward_config(tokens, dim, rows, x.dtype.itemsize, call.max_seqlen, call.schedule, arrays)
    interpret = interpreter(call.backend == "mosaic_gpu_interpret")
    options = backward.Options(call.activation is not None, config, interpret, **what)
    found = backward.launch(tuple(douts), dfinal, x, weight, bias, pool, starts, None, None, options)
    return dict(zip(("x", "weight", "bias", "conv_states"), found, strict=True))


def _convolved(call, x):
    """What the convolution of a call stores, for this x."""
    starts, pool = call.query_start_loc, call.conv_states
    has_state = None if pool is None else jnp.ones((starts.shape[0] - 1,), bool)
    conv = FnCall(x, call.weight, call.bias, pool, starts, None, has_state)
    options = dict(activation=call.activation, max_seqlen=call.max_seqlen)
    return run_prefill(conv._replace(**options, schedule=call.schedule, backend=call.backend)).out


def _convolution(call, x, dy, dfinal):
    names = "x", "weight", "bias", "conv_states", "query_start_loc"
    options = call.activation, call.max_seqlen, call.schedule, call.backend
    inputs = x, call.weight, call.bias, call.conv_states, call.query_start_loc
    return dict(zip(names[:4], backward.differentiate(options, inputs, (dy, dfinal)), strict=False))


def _norm_gradient(y, upstream, heads, scale):
    """The gradient of y [tokens, channels] through norm and scale."""
    if upstream is None:
        return jnp.zeros(y.shape, jnp.float32)
    dn = upstream.reshape(y.shape).astype(jnp.float32) * jnp.float32(scale)
    if not heads.norm:
        return dn
    shape, apart = y.shape, (y.shape[0], heads.num_k_heads, heads.head_k_dim)
    y, dn = y.astype(jnp.float32).reshape(apart), dn.reshape(apart)
    size = heads.head_k_dim
    padding = [(0, 0), (0, 0), (0, (1 << (size - 1).bit_length()) - size)]
    total = tree_sum(jnp.pad(rounded(y * y), padding))[..., None]
    r = 1.0 / jnp.sqrt(total + jnp.float32(heads.eps))
    along = (dn * (y * r)).sum(-1, keepdims=True)
    return (r * (dn - (y * r) * along)).reshape(shape)


def _gates(call, heads, live, dg, dbeta):
    found = dict.fromkeys(("a", "b", "A_log", "dt_bias"))
    if call.a is not None:
        dg = jnp.zeros(call.a.shape, jnp.float32) if dg is None else plain.where_live(live, dg)
        a, (A_log, dt_bias) = plain.where_live(live, call.a.astype(jnp.float32)), parameters_of(call)
        z = a if dt_bias is None else a + dt_bias
        scale = jnp.exp(A_log)
        if heads.lower_bound is None:
            dz = -dg * scale * jnp.where(z > 20.0, 1.0, sigmoid(z))
            dA_log = -dg * scale * softplus(z)
        else:
            t = scale * z
            dt = dg * heads.lower_bound * sigmoid_slope(t)
            dz, dA_log = dt * scale, dt * t
        found["a"] = dz.astype(call.a.dtype)
        found["A_log"] = dA_log.sum((0, *range(2, a.ndim))).astype(call.A_log.dtype)
        if call.dt_bias is not None:
            found["dt_bias"] = dz.sum(0).astype(call.dt_bias.dtype)
    if call.b is not None:
        b = plain.where_live(live, call.b.astype(jnp.float32))
        db = jnp.zeros_like(b) if dbeta is None else plain.where_live(live, dbeta)
        found["b"] = (db * sigmoid_slope(b)).astype(call.b.dtype)
    return found


def gated(call, upstream):
    """The gradients of a checked `GatedConvFnCall` without slots, by name: bcx, weight, bias and conv_states."""
    dout, dfinal = upstream
    bcx, tokens = call.bcx, call.bcx.shape[0]
    if _is_one_pass(call):
        return _one_pass(call, dout, dfinal)
    live = jnp.arange(tokens) < plain.offsets(call.query_start_loc, tokens)[-1]
    gate_in, gate_out, x = slices(call)
    u = plain.stored(gate_in * x)
    c = _convolved(call, u)
    wide = lambda array: plain.where_live(live, array.astype(jnp.float32))  # noqa: E731
    dout = jnp.zeros(x.shape, jnp.float32) if dout is None else wide(dout)
    found = _convolution(call, u.astype(jnp.float32), dout * wide(gate_out), dfinal)
    du = wide(found.pop("x"))
    parts = du * wide(x), dout * wide(c), du * wide(gate_in)
    parts = sorted(zip(offsets(call), parts, strict=True), key=lambda place: place[0])
    dim, begins = x.shape[1], [first for first, _ in parts]
    if all(b - a >= dim for a, b in itertools.pairwise(begins)):
        # slices of their own: one pass, of bcx's size
        ends, pieces = [0, *(first + dim for first in begins)], []
        for end, (first, part) in zip(ends, [*parts, (bcx.shape[1], None)], strict=True):
            pieces.append(jnp.zeros((tokens, first - end), bcx.dtype))
            pieces += [] if part is None else [part.astype(bcx.dtype)]
        return found | {"bcx": jnp.concatenate(pieces, axis=1)}
    dbcx = jnp.zeros(bcx.shape, jnp.float32)
    for first, part in parts:
        dbcx = dbcx.at[:, first : first + part.shape[1]].add(part)
    return found | {"bcx": dbcx.astype(bcx.dtype)}


def _is_one_pass(call):
    """Whether `backward`'s kernel reads the three slices in place: they are all there is, and each is of whole tiles."""
    dim, rows = call.weight.shape[0], call.query_start_loc.shape[0] - 1
    if call.backend == "xla" or not call.bcx.size or not rows or dim % BACKWARD_D:
        return False
    return sorted(offsets(call)) == [0, dim, 2 * dim] and call.bcx.shape[1] == 3 * dim


def _one_pass(call, dout, dfinal):
    """Gradients by name; those of B, C and x take the places of what they came from."""
    (dim, _), tokens = call.weight.shape, call.bcx.shape[0]
    dout = jnp.zeros((tokens, dim), call.bcx.dtype) if dout is None else dout
    found = _launch(call, call.bcx, [dout], dfinal, dict(gates=tuple(offsets(call))))
    return {"bcx": found.pop("x"), **found}


class Front(NamedTuple):
    """A prologue as the kernel of `backward` sees it."""

    heads: Heads
    interpret: bool

    def rows_of_sums(self, kinds, dtype):
        """Rows of a tile that hold the sums of every warp."""
        return cdiv(kinds * WARPS * 4, dtype.itemsize)

    def walk(self, refs, channel, block_t, rest, length, wait, *, silu):
        """The walk of a block of `length` tokens, the row having `rest` from there on.

        wait: waits for the copies and returns the inputs before the block: see `backward`.
        """
        interpret, history = self.interpret, refs.weight.shape[1] - 1
        taps, bias = load_taps(
            refs.weight, refs.bias, channel, BACKWARD_D, repeats=WARPS, interpret=interpret
        )
        zero = in_layout(jnp.zeros((LANES,), jnp.float32), interpret=interpret)
        before = wait(lambda rows, j: read_rows(rows, j, 0, interpret=interpret), (zero,) * history)
        of_q, of_k, _ = self.heads.sizes
        scale = jnp.where(channel < of_q, jnp.float32(self.heads.q_scale), jnp.float32(1.0))
        is_normed, inside = channel < of_q + of_k, rest >= block_t + history
        for normed in (True, False) if self.heads.norm else (False,):
            for whole in (True, False):
                step = _Step(refs, taps, bias, zero, scale, self.heads, silu, normed, whole, interpret)
                chosen = inside if whole else jnp.logical_not(inside)
                if self.heads.norm:
                    chosen &= is_normed if normed else jnp.logical_not(is_normed)
                pl.when(chosen)(functools.partial(step.walk, block_t, rest, length, before))


class _Step(NamedTuple):
    """One token of every warp; `whole`: each is in the row, and so are the `width-1` tokens behind the block."""

    refs: Any
    taps: Any
    bias: Any
    zero: Any
    scale: Any
    heads: Heads
    silu: bool
    normed: bool
    whole: bool
    interpret: bool

    def walk(self, block_t, rest, length, before):
        refs, interpret = self.refs, self.interpret
        history, kinds = len(before), refs.total.shape[0]
        per = block_t // WARPS  # tokens a warp
        if not self.whole:  # at least those that lie before the next warp's
            per = jnp.maximum(div(length + (WARPS - 1), WARPS), history)
        past = tuple(
            read_before(refs.tile, value, j - history, per, interpret=interpret)
            for j, value in enumerate(before)
        )

        # The first width-1 tokens complete entries of the initial state, or of another warp or block.
        def ahead(i, carry):
            gradient, carry = self.token(i, per, rest, carry, True)
            if refs.dwindow is not None:
                write_window(refs.dwindow, gradient, i, interpret=interpret)
            return carry

        def token(i, carry, counted=True):
            gradient, carry = self.token(i, per, rest, carry, counted)
            write_rows(refs.upstream, gradient, i, per, interpret=interpret)
            return carry

        carry = past, (self.zero,) * history, (self.zero,) * kinds
        carry = lax.fori_loop(np.int32(0), np.int32(history), ahead, carry)
        meet(interpret=interpret)  # so far the warp before leaves these tokens as they were
        if self.whole:

            def group(i, carry, last=False):
                for r in range(GROUP):
                    counted = not last or r < GROUP - history  # the others are the next warp's
                    carry = token(i * GROUP + (r + history), carry, counted)
                return carry

            groups = per // GROUP
            carry = lax.fori_loop(np.int32(0), np.int32(groups - 1), group, carry)
            carry = group(groups - 1, carry, last=True)
        else:
            carry = lax.fori_loop(np.int32(history), per + history, token, carry)
        leave_sums(refs.total, carry[2], refs.tile, interpret=interpret)

    def token(self, i, per, rest, carry, counted):
        """Token i of each warp's: the gradient of the entry that it completes, and what is carried on."""
        refs, interpret, late = self.refs, self.interpret, self.refs.late
        past, gs, sums = carry
        issue_loads(interpret=interpret)  # more tokens at once take more registers than three programs have
        past = (*past, read_rows(refs.tile, i, per, interpret=interpret))
        dout = read_rows(refs.upstream, i, per, interpret=interpret)
        pre = convolve(past, self.taps, self.bias, silu=False, interpret=interpret)
        g, *added = self.gradient(past, pre, dout, sums, i, per, rest)
        gs = (*gs, g)
        begin = self.zero
        if late is not None and not self.whole:
            begin = read_late(late, i, per, rest, interpret=interpret)
        gradient = convolve(gs, self.taps[::-1], begin, silu=False, interpret=interpret)
        return gradient, (past[1:], gs[1:], tuple(added) if counted else sums)

    def gradient(self, past, pre, dout, sums, i, per, rest):
        """g of a token of each warp, zero where it is not in the row, and the sums with it added."""
        width, count = len(past), len(sums)
        dtype = self.refs.dx.dtype if self.heads.storage else jnp.float32
        if self.interpret:
            g = self.plain_gradient(pre, dout, dtype)
            here = jnp.ones((LANES,), bool)
            if not self.whole:
                here = jnp.repeat(jnp.arange(WARPS) * per + i < rest, BACKWARD_D)
                g, here = jnp.where(here, g, 0.0), here & (i < per)
            terms = [value * g for value in past] + [g] * (count > width)
            return g, *(jnp.where(here, s + term, s) for s, term in zip(sums, terms, strict=True))

        scalar, kind = plgpu.Layout.WG_SPLAT, layout(LANES)

        @plgpu.inline_mgpu(
            arg_types=((scalar,) * 4, (kind,) * 2, (kind,) * width, (kind,) * count),
            return_type=(_row(),) * (1 + count),
        )
        def run(_, scalars, values, past, sums):
            scale, *place = (value.registers.item() for value in scalars)
            g = map_registers(lambda pre, g: self.gradient_of_register(pre, g, scale, dtype), *values)
            keep = lambda new, old: new  # noqa: E731
            if not self.whole:
                i, per, rest = place
                below = functools.partial(arith.cmpi, arith.CmpIPredicate.slt)
                here = below(_row_of_warp(i, per), rest)
                g = map_registers(lambda g: arith.select(here, g, constant(g.type, 0.0)), g)
                keep = functools.partial(arith.select, arith.andi(here, below(i, per)))
            new = [
                map_registers(lambda x, g, s: keep(math.fma(x, g, s), s), x, g, s)
                for x, s in zip(past, sums, strict=False)
            ]
            if count > width:
                new.append(map_registers(lambda g, s: keep(arith.addf(s, g), s), g, sums[width]))
            return g, *new

        scalars = self.scale, jnp.int32(i), jnp.int32(per), rest
        return run(scalars, (pre, dout), past, sums)

    def plain_gradient(self, pre, dout, dtype):
        heads, g = self.heads, dout
        if self.normed:
            y = (activate(pre) if self.silu else pre).astype(dtype).astype(jnp.float32)
            y, g = y.reshape(-1, heads.head_k_dim), dout.reshape(-1, heads.head_k_dim)
            r = 1.0 / jnp.sqrt((y * y).sum(-1, keepdims=True) + jnp.float32(heads.eps))
            along = (y * g).sum(-1, keepdims=True) * r
            g = ((g - y * (along * r)) * (r * self.scale)).reshape(-1)
        elif not heads.norm and heads.q_scale != 1.0:
            g = g * self.scale
        return g * silu_slope(pre) if self.silu else g

    def gradient_of_register(self, pre, dout, scale, dtype):
        """Four neighbouring channels, of a head if there is a norm."""
        heads, g, wide = self.heads, dout, pre.type
        if not self.normed:
            if not heads.norm and heads.q_scale != 1.0:
                g = arith.mulf(g, vector.broadcast(wide, scale))
            return arith.mulf(g, silu_slope_of_register(pre)) if self.silu else g
        y, slope = silu_and_slope_of_register(pre) if self.silu else (pre, None)
        if dtype != jnp.float32:
            kind = ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get()
            y = _as_stored(y, kind)
        lanes = heads.head_k_dim // VECTOR
        squares, along = (_sum_of_head(y, other, lanes) for other in (y, g))
        eps = arith.constant(squares.type, ir.FloatAttr.get(squares.type, heads.eps))
        r = _scalar(ptx("rsqrt.approx.f32", _vector(arith.addf(squares, eps))))
        along = arith.mulf(arith.mulf(along, r), r)
        g = math.fma(arith.negf(y), vector.broadcast(wide, along), g)
        g = arith.mulf(g, vector.broadcast(wide, arith.mulf(r, scale)))
        return arith.mulf(g, slope) if self.silu else g


def _vector(value):
    return vector.from_elements(ir.VectorType.get((1,), value.type), [value])


def _scalar(register, i=0):
    return vector.extract(register, dynamic_position=[], static_position=[i])


def _as_stored(values, kind):
    """Float32 values as 16 bits hold them, rounded in pairs: one by one, that is a conversion of a quarter of the speed."""
    name = "bf16" if kind == ir.BF16Type.get() else "f16"
    pairs = [
        llvm.inline_asm(
            ir.IntegerType.get_signless(32),
            [_scalar(values, i + 1), _scalar(values, i)],
            f"cvt.rn.{name}x2.f32 $0, $1, $2;",
            "=r,f,f",
        )
        for i in range(0, VECTOR, 2)
    ]
    pairs = vector.from_elements(ir.VectorType.get((VECTOR // 2,), pairs[0].type), pairs)
    return arith.extf(values.type, vector.bitcast(ir.VectorType.get((VECTOR,), kind), pairs))


def _sum_of_head(a, b, lanes):
    """The sum of a * b over a head, whose `lanes` neighbouring threads have one register of each."""
    total = None
    for i in range(VECTOR):
        a_i, b_i = _scalar(a, i), _scalar(b, i)
        total = arith.mulf(a_i, b_i) if total is None else math.fma(a_i, b_i, total)
    distance = 1
    while distance < lanes:
        total = arith.addf(total, mgpu.utils.shfl_bfly(total, distance))
        distance *= 2
    return total


# Rows of each warp. In the interpreter a vector is the warps' rows side by side.


def _row():
    return plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout(LANES))


def _fragments(register):
    kind = mgpu.WGStridedFragLayout((LANES,), VECTOR)
    registers = np.empty(kind.registers_shape((LANES,)), dtype=object)
    registers.flat[0] = register
    return mgpu.FragmentedArray(_registers=registers, _layout=kind, _is_signed=None)


def _integer(value):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _warp():
    return arith.shrui(mgpu.thread_idx(), _integer(5))


def _row_of_warp(i, per):
    return arith.addi(arith.muli(_warp(), per), i)


def _channel():
    """The first of a thread's."""
    return arith.muli(arith.andi(mgpu.thread_idx(), _integer(31)), _integer(VECTOR))


def _address(rows, row, element=None):
    """Of a thread's channels in a row of a tile, of `element`s if the tile holds others."""
    pointer = mgpu.utils.memref_ptr(rows)
    place = arith.addi(arith.muli(row, _integer(BACKWARD_D)), _channel())
    return mgpu.utils.getelementptr(pointer, [place], element or ir.MemRefType(rows.type).element_type)


def _load(rows, row):
    element, float32 = ir.MemRefType(rows.type).element_type, ir.F32Type.get()
    value = llvm.load(
        ir.VectorType.get((VECTOR,), element), _address(rows, row), alignment=VECTOR * mgpu.bytewidth(element)
    )
    return value if element == float32 else arith.extf(ir.VectorType.get((VECTOR,), float32), value)


def _store(rows, row, value):
    element = ir.MemRefType(rows.type).element_type
    if element != ir.F32Type.get():
        value = arith.truncf(ir.VectorType.get((VECTOR,), element), value)
    llvm.store(value, _address(rows, row), alignment=VECTOR * mgpu.bytewidth(element))


def _is_first_warp():
    return arith.cmpi(arith.CmpIPredicate.eq, _warp(), _integer(0))


def read_rows(rows, i, per, *, interpret):
    """Row `i` of each warp's `per` rows, in float32."""
    if interpret:
        return jnp.concatenate([rows[warp * per + i] for warp in range(WARPS)]).astype(jnp.float32)
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar), return_type=_row())
    def read(_, rows, i, per):
        return _fragments(_load(rows, _row_of_warp(i.registers.item(), per.registers.item())))

    return read(rows, jnp.int32(i), jnp.int32(per))


def read_before(rows, first, i, per, *, interpret):
    """Row `i`, below zero, before each warp's `per` rows; of the first warp `first`."""
    if interpret:
        others = [rows[jnp.maximum(warp * per + i, 0)].astype(jnp.float32) for warp in range(1, WARPS)]
        return jnp.concatenate([first[:BACKWARD_D], *others])
    scalar, kind = plgpu.Layout.WG_SPLAT, layout(LANES)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), kind, scalar), return_type=_row())
    def read(_, rows, first, per):
        row = arith.maxsi(_row_of_warp(_integer(i), per.registers.item()), _integer(0))
        value, is_first = _load(rows, row), _is_first_warp()
        return map_registers(lambda first: arith.select(is_first, first, value), first)

    return read(rows, first, jnp.int32(per))


def read_late(rows, i, per, rest, *, interpret):
    """What enters with token i of each warp's: a row of the final state's gradient behind the last token, else zero."""
    history = rows.shape[0]
    if interpret:
        c = jnp.arange(WARPS) * per + i - rest
        found = [rows[jnp.clip(c[warp], 0, history - 1)].astype(jnp.float32) for warp in range(WARPS)]
        return jnp.where(jnp.repeat((c >= 0) & (c < history), BACKWARD_D), jnp.concatenate(found), 0.0)
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (scalar,) * 3), return_type=_row())
    def read(_, rows, place):
        i, per, rest = (value.registers.item() for value in place)
        c, last = arith.subi(_row_of_warp(i, per), rest), _integer(history - 1)
        value = _load(rows, arith.minsi(arith.maxsi(c, _integer(0)), last))
        exists = arith.cmpi(arith.CmpIPredicate.ule, c, last)
        return _fragments(arith.select(exists, value, constant(value.type, 0.0)))

    return read(rows, (jnp.int32(i), jnp.int32(per), rest))


def write_rows(rows, value, i, per, *, interpret):
    """Leaves a vector in row `i` of each warp's `per` rows."""
    if interpret:
        for warp in range(WARPS):
            rows[warp * per + i] = value[warp * BACKWARD_D : (warp + 1) * BACKWARD_D].astype(rows.dtype)
        return
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout(LANES), scalar, scalar))
    def write(_, rows, value, i, per):
        row = _row_of_warp(i.registers.item(), per.registers.item())
        _store(rows, row, value.registers.item())

    write(rows, value, jnp.int32(i), jnp.int32(per))


def write_window(rows, value, i, *, interpret):
    """Leaves the first warp's part of a vector in row `i`."""
    if interpret:
        rows[i] = value[:BACKWARD_D].astype(rows.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout(LANES), plgpu.Layout.WG_SPLAT))
    def write(_, rows, value, i):
        with mgpu.when(_is_first_warp()):
            _store(rows, i.registers.item(), value.registers.item())

    write(rows, value, jnp.int32(i))


def meet(*, interpret):
    """All warps have come here."""
    if interpret:
        return

    @plgpu.inline_mgpu()
    def run(_):
        mgpu.warpgroup_barrier()

    run()


def leave_sums(total, sums, tile, *, interpret):
    """Adds up the sums of all warps, in their order, by way of the tile, which is no longer needed."""
    if interpret:
        for j, value in enumerate(sums):
            total[j] = functools.reduce(jnp.add, value.reshape(WARPS, BACKWARD_D))
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), (layout(LANES),) * len(sums)))
    def run(_, total, tile, sums):
        float32, index = ir.F32Type.get(), ir.IndexType.get()
        mgpu.warpgroup_barrier()
        for j, value in enumerate(sums):
            row = arith.addi(_warp(), _integer(j * WARPS))
            llvm.store(value.registers.item(), _address(tile, row, float32), alignment=16)
        mgpu.warpgroup_barrier()
        pointer, channel = mgpu.utils.memref_ptr(tile), mgpu.thread_idx()
        for j in range(len(sums)):
            places = [arith.addi(channel, _integer((j * WARPS + warp) * BACKWARD_D)) for warp in range(WARPS)]
            values = [
                llvm.load(float32, mgpu.utils.getelementptr(pointer, [place], float32)) for place in places
            ]
            target = [mgpu.c(j, index), arith.index_cast(index, channel)]
            memref.store(functools.reduce(arith.addf, values), total, target)

    run(total, tile, sums)
