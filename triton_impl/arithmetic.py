"""Device code of one output: taps, their sum, SiLU and its slope, rounding.

One formula in one order everywhere is what makes prefill, decode, both schedules and all block sizes
agree bit for bit.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from triton_impl.records import Weights

# Triton's interpreter truncates where a device rounds float32 to bfloat16, and loses bfloat16 subnormals.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def native_ptx():
    """Whether SiLU is inline PTX, the very instructions that the Pallas twin uses; else Triton's own exp2 and division."""
    return torch.version.hip is None and not _INTERPRETED.value


def word_bits(weight):
    """32 or 64 if the taps of each channel fill one aligned machine word of that size, else 0."""
    width = weight.shape[1]
    bits = width * weight.element_size() * 8
    packed = weight.stride(1) == 1 and weight.stride(0) == width and weight.data_ptr() % 16 == 0
    return bits if packed and width > 1 and bits in (32, 64) else 0


@triton.jit
def widen(value):
    """The float32 value of a float block."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def round_to(value, dtype: tl.constexpr):
    """A float32 block rounded to `dtype`, to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, (bits >> 16) | 0x40)
        short = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        short = value.to(dtype)
    return short


@triton.jit
def rounded(value, dtype: tl.constexpr, o: tl.constexpr):
    """The float32 values of `round_to`; of neighbours two at a time, where one costs a conversion of its own."""
    if o.ptx and dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r",
            [value],
            tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        wide = widen(round_to(value, dtype))
    return wide


@triton.jit
def split_columns(tile, levels: tl.constexpr):
    """The 2**levels columns of a tile along its last axis, in their order."""
    columns = (tile,)
    if levels == 0:
        columns = (tl.reshape(tile, tile.shape[:-1]),)
    for level in tl.static_range(levels):
        even = ()
        odd = ()
        for i in tl.static_range(1 << level):
            column = columns[i]
            if level < levels - 1:
                column = tl.reshape(column, column.shape[:-1] + (1 << (levels - level - 1), 2))
            pair = tl.split(column)
            even = even + (pair[0],)
            odd = odd + (pair[1],)
        columns = even + odd
    return columns


@triton.jit
def join_columns(columns, levels: tl.constexpr):
    """The converse of `split_columns`."""
    for level in tl.static_range(levels):
        pairs = ()
        for i in tl.static_range(1 << (levels - level - 1)):
            pair = tl.join(columns[i], columns[i + (1 << (levels - level - 1))])
            if level > 0:
                pair = tl.reshape(pair, pair.shape[:-2] + (2 << level,))
            pairs = pairs + (pair,)
        columns = pairs
    return columns[0]


@triton.jit
def recast(value, dtype: tl.constexpr):
    """A float block in `dtype`: the very bits if it has that dtype already, else rounded once."""
    if value.dtype == dtype:
        same = value
    else:
        same = round_to(widen(value), dtype)
    return same


@triton.jit
def load_words(weight, strides, channels, o: tl.constexpr):
    """Asks for the taps of channels, for `unpack_taps`.

    `o.word_bits` is 32 or 64 when the taps of one channel fill one aligned machine word of that size
    (16-byte loads, no stride between lanes), else 0.
    """
    words = ()
    if o.word_bits == 0:
        for j in tl.static_range(o.width):
            tap = weight + channels.index * tl.cast(strides[0], tl.int64) + j * tl.cast(strides[1], tl.int64)
            words = words + (tl.load(tap, mask=channels.exist, other=0.0),)
    elif o.word_bits == 64:
        tap = weight.to(tl.pointer_type(tl.int64)) + channels.index
        words = (tl.load(tap, mask=channels.exist, other=0),)
    else:
        tap = weight.to(tl.pointer_type(tl.int32)) + channels.index
        words = (tl.load(tap, mask=channels.exist, other=0),)
    return words


@triton.jit
def unpack_taps(words, dtype: tl.constexpr, width: tl.constexpr):
    """Returns the taps as float32 vectors, oldest first."""
    taps = ()
    if words[0].dtype.is_int():
        bits: tl.constexpr = words[0].dtype.primitive_bitwidth // width
        for j in tl.static_range(width):
            lane = words[0] >> (j * bits)
            if bits == 32:
                taps = taps + (lane.to(tl.int32).to(tl.float32, bitcast=True),)
            else:
                taps = taps + (widen(lane.to(tl.int16).to(dtype, bitcast=True)),)
    else:
        for j in tl.static_range(width):
            taps = taps + (widen(words[j]),)
    return taps


@triton.jit
def load_weights(weight, bias, strides, channels, o: tl.constexpr):
    """Asks for the taps and the bias of a program's channels: `Weights`, for `taps_of` and `bias_of`."""
    words = load_words(weight, strides.weight, channels, o)
    if bias is not None:
        word = tl.load(
            bias + channels.index * tl.cast(strides.bias, tl.int64), mask=channels.exist, other=0.0
        )
    else:
        word = tl.zeros_like(channels.index).to(tl.float32)
    return Weights(weight, words, word)


@triton.jit
def load_taps(weights, o: tl.constexpr):
    """The taps and the bias of `load_weights` as float32 vectors, the taps oldest first."""
    return unpack_taps(weights.words, weights.ptr.dtype.element_ty, o.width), widen(weights.bias)


@triton.jit
def activate(z, o: tl.constexpr):
    """SiLU of a float32 block: z * sigmoid(z), scaled by 2**14 so that nothing over- or underflows early."""
    if o.silu:
        s = tl.fma(z, -1.4426950408889634, -14.0)
        if o.ptx:
            s = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;", "=f,f", [s], tl.float32, is_pure=True, pack=1
            )
            r = tl.inline_asm_elementwise(
                "rcp.approx.ftz.f32 $0, $1;", "=f,f", [s + 0.00006103515625], tl.float32, is_pure=True, pack=1
            )
        else:
            r = 1.0 / (tl.exp2(s) + 0.00006103515625)
        z = (z * 0.00006103515625) * r
    return z


@triton.jit
def silu_and_slope(z, o: tl.constexpr):
    """SiLU and its derivative s * (1 + z * (1 - s)); 2**14 * s in between, and no cancellation in 1 - s.

    Beyond 97 the derivative is 0 or 1 to the last bit of a float32, and SiLU 0 or z.
    """
    free = z
    z = tl.clamp(z, -97.0, 97.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = tl.fma(z, -1.4426950408889634, -14.0)
    if o.ptx:
        p = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], tl.float32, is_pure=True, pack=1
        )
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [p + 0.00006103515625], tl.float32, is_pure=True, pack=1
        )
    else:
        p = tl.exp2(exponent)
        r = 1.0 / (p + 0.00006103515625)
    return (free * 0.00006103515625) * r, r * tl.fma(z, p * r, 1.0) * 0.00006103515625


@triton.jit
def silu_slope(z, o: tl.constexpr):
    """The derivative of SiLU."""
    _, slope = silu_and_slope(z, o)
    return slope


@triton.jit
def convolve(window, taps, start, width: tl.constexpr):
    """start + sum of taps[j] * window[j], oldest first, one fused multiply-add a tap."""
    acc = start
    for j in tl.static_range(width):
        acc = tl.fma(widen(window[j]), taps[j], acc)
    return acc


@triton.jit
def load_input(place, mask, o: tl.constexpr):
    """Inputs of the convolution: x, or where `o.gate` says how far from it a gate lies, their product in x's dtype."""
    value = tl.load(place, mask=mask, other=0.0)
    if o.gate is not None:
        gate = tl.load(place + o.gate, mask=mask, other=0.0)
        value = round_to(widen(value) * widen(gate), value.dtype)
    return value


@triton.jit
def join_residual(value, residual, o: tl.constexpr):
    """The sum of a float32 block and the residual; of a gated convolution the product with it, of what would be stored."""
    if o.gate is None:
        joined = add_residual(value, widen(residual), o)
    else:
        joined = widen(round_to(value, residual.dtype)) * widen(residual)
    return joined


@triton.jit
def add_residual(value, residual, o: tl.constexpr):
    """The sum of two float32 blocks, never fused with the product before it."""
    if o.ptx:
        total = tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2;", "=f,f,f", [value, residual], tl.float32, is_pure=True, pack=1
        )
    else:
        total = value + residual
    return total


class Norm(NamedTuple):
    """What becomes of a value behind the activation, beyond rounding; constants.

    Attributes:
      lanes: of a head, side by side; a power of two. Channels behind a head's last one are zeros.
      eps, scale: float; the scale is left out where it is 1.
      stored: whether the value is rounded to the result's dtype before.
      l2: whether heads are normalised at all.
    """

    lanes: Any
    eps: Any
    scale: Any
    stored: Any
    l2: Any


@triton.jit
def _square(value, o: tl.constexpr):
    """The product of a float32 block with itself, never fused with the sum behind it."""
    if o.ptx:
        product = tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $1;", "=f,f", [value], tl.float32, is_pure=True, pack=1
        )
    else:
        product = value * value
    return product


# 1 / sqrt of a float32, both steps correctly rounded. The instructions that round correctly branch on numbers of a size that
# no total with an eps of this has; without them what remains of both is a Newton step each. Where the approximation is 0,
# infinite or no number, it is the result.
INVERSE_ROOT_OF_ALL = tl.constexpr("{ .reg .f32 t; sqrt.rn.f32 t, $1; rcp.rn.f32 $0, t; }")
INVERSE_ROOT = tl.constexpr("""{
    .reg .f32 r, s, h, e; .reg .pred p;
    rsqrt.approx.ftz.f32 r, $1;
    mul.rn.f32 s, $1, r; mul.rn.f32 h, r, 0f3F000000; neg.f32 e, s; fma.rn.f32 e, e, s, $1; fma.rn.f32 s, e, h, s;
    setp.nan.f32 p, s, s;
    rcp.approx.ftz.f32 h, s;
    neg.f32 e, s; fma.rn.f32 e, e, h, 0f3F800000; fma.rn.f32 h, h, e, h;
    selp.f32 $0, r, h, p; }""")


@triton.jit
def inverse_norms(y, lanes: tl.constexpr, eps: tl.constexpr, o: tl.constexpr):
    """1 / sqrt(sum(y * y) + eps) of each head of a vector of heads side by side, float32."""
    total = sum_of_heads(_square(y, o), lanes)
    if o.ptx:
        inverse = tl.inline_asm_elementwise(
            INVERSE_ROOT if eps >= 2.0**-60 else INVERSE_ROOT_OF_ALL, "=f,f", [total + eps], tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(total + eps))
    return inverse


@triton.jit
def sum_of_heads(values, lanes: tl.constexpr):
    """Sums over each head of a vector of heads side by side, by a tree of neighbours.

    A reduction over two is one addition, so its order holds in any layout.
    """
    size: tl.constexpr = values.shape[0]
    for level in tl.static_range(16):
        if (2 << level) <= lanes:
            values = tl.sum(tl.reshape(values, (size >> (level + 1), 2)), axis=1)
    return values


@triton.jit
def over_heads(values, factors, lanes: tl.constexpr):
    """The products of a vector of heads with a factor a head."""
    heads: tl.constexpr = values.shape[0] // lanes
    if heads == 1:  # as a number: a block of one row may be laid out so that its values have to move
        products = values * tl.sum(factors, axis=0)
    else:
        products = tl.reshape(tl.reshape(values, (heads, lanes)) * factors[:, None], values.shape)
    return products


@triton.jit
def _quick_inverse_root(total, o: tl.constexpr):
    """1 / sqrt(total) to 2**-22.9 of it, without a branch; total is no subnormal number."""
    if o.ptx:
        r = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [total], tl.float32, is_pure=True, pack=1
        )
    else:
        r = tl.div_rn(1.0, tl.sqrt_rn(total))
    return r


@triton.jit
def normalise_back(value, upstream, norm: tl.constexpr, o: tl.constexpr):
    """The gradient at an activated float32 vector of heads, given that of `normalise`; roundings count as the identity."""
    if norm.scale != 1.0:
        upstream = upstream * norm.scale
    if norm.l2:
        # both sums at a time: neither waits for the other
        along = sum_of_heads(value * upstream, norm.lanes)
        inverse = _quick_inverse_root(sum_of_heads(value * value, norm.lanes) + norm.eps, o)
        along = tl.where(inverse > 0.0, along * inverse * inverse, 0.0)  # 0: of a head whose squares overflow
        unit = over_heads(value, along, norm.lanes)
        upstream = over_heads(upstream - unit, inverse, norm.lanes)
    return upstream


@triton.jit
def normalise(y, norm: tl.constexpr, dtype: tl.constexpr, o: tl.constexpr):
    """A float32 vector of heads as `Norm` says, before the rounding at the store."""
    if norm.stored:
        y = rounded(y, dtype, o)
    if norm.l2:
        y = over_heads(y, inverse_norms(y, norm.lanes, norm.eps, o), norm.lanes)
    if norm.scale != 1.0:
        y = y * norm.scale
    return y


@triton.jit
def finish(value, dtype: tl.constexpr, o: tl.constexpr):
    """What is rounded and stored of an activated float32 vector."""
    if o.norm is not None:
        value = normalise(value, o.norm, dtype, o)
    return value
