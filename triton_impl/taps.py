"""Device code that both kernels share: the taps of a channel, one output, SiLU.

One formula in one order everywhere is what makes prefill, decode, both schedules and all block sizes
agree bit for bit.
"""

import torch
import triton
import triton.language as tl

# Inline PTX gives SiLU the very instructions the Pallas twin uses; other targets and the interpreter
# take Triton's own exp2 and division.
NATIVE_PTX = torch.version.hip is None and not triton.knobs.runtime.interpret

# Triton's interpreter truncates where a device rounds float32 to bfloat16, and loses bfloat16 subnormals.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def word_bits(weight):
    """32 or 64 if the taps of each channel fill one aligned machine word of that size, else 0."""
    width = weight.shape[1]
    bits = width * weight.element_size() * 8
    packed = weight.stride(1) == 1 and weight.stride(0) == width and weight.data_ptr() % 16 == 0
    return bits if packed and width > 1 and bits in (32, 64) else 0


@triton.jit
def channel_block_and_place(channel_blocks, FOLDED: tl.constexpr):
    """Which program of a `launch.program_grid` this is; without FOLDED, two registers and no division."""
    if FOLDED:
        return tl.program_id(0) % channel_blocks, tl.program_id(0) // channel_blocks
    else:
        return tl.program_id(0), tl.program_id(1)


@triton.jit
def offset(query_start_loc, i, batch, tokens):
    """Entry i of query_start_loc, clamped to [0, tokens]; entry 0 is taken as 0, entry batch+1 is `tokens`.

    It has the width of `tokens`, which is 32 bits wherever that is enough.
    """
    offset = tl.load(query_start_loc + i, mask=(i > 0) & (i <= batch), other=0)
    offset = tl.maximum(tl.minimum(offset, tokens), 0).to(tokens.dtype)
    return tl.where(i > batch, tokens, offset)


@triton.jit
def widen(value):
    """The float32 value of a float block."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def narrow(value, dtype: tl.constexpr):
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
def split_columns(tile, LEVELS: tl.constexpr):
    """The 2**LEVELS columns of a tile along its last axis, in their order."""
    columns = (tile,)
    if LEVELS == 0:
        columns = (tl.reshape(tile, tile.shape[:-1]),)
    for level in tl.static_range(LEVELS):
        even = ()
        odd = ()
        for i in tl.static_range(1 << level):
            column = columns[i]
            if level < LEVELS - 1:
                column = tl.reshape(column, column.shape[:-1] + (1 << (LEVELS - level - 1), 2))
            pair = tl.split(column)
            even = even + (pair[0],)
            odd = odd + (pair[1],)
        columns = even + odd
    return columns


@triton.jit
def join_columns(columns, LEVELS: tl.constexpr):
    """The converse of `split_columns`."""
    for level in tl.static_range(LEVELS):
        pairs = ()
        for i in tl.static_range(1 << (LEVELS - level - 1)):
            pair = tl.join(columns[i], columns[i + (1 << (LEVELS - level - 1))])
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
        same = narrow(widen(value), dtype)
    return same


@triton.jit
def load_words(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH: tl.constexpr, WORD_BITS: tl.constexpr):
    """Asks for the taps of channels `ch`, for `unpack_taps`.

    WORD_BITS is 32 or 64 when the taps of one channel fill one aligned machine word of that size
    (16-byte loads, no stride between lanes), else 0.
    """
    words = ()
    if WORD_BITS == 0:
        for j in tl.static_range(WIDTH):
            tap = weight + ch * tl.cast(stride_w_d, tl.int64) + j * tl.cast(stride_w_j, tl.int64)
            words = words + (tl.load(tap, mask=in_dim, other=0.0),)
    elif WORD_BITS == 64:
        words = (tl.load(weight.to(tl.pointer_type(tl.int64)) + ch, mask=in_dim, other=0),)
    else:
        words = (tl.load(weight.to(tl.pointer_type(tl.int32)) + ch, mask=in_dim, other=0),)
    return words


@triton.jit
def unpack_taps(words, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """Returns the taps as WIDTH float32 vectors, oldest first."""
    taps = ()
    if words[0].dtype.is_int():
        bits: tl.constexpr = words[0].dtype.primitive_bitwidth // WIDTH
        for j in tl.static_range(WIDTH):
            lane = words[0] >> (j * bits)
            if bits == 32:
                taps = taps + (lane.to(tl.int32).to(tl.float32, bitcast=True),)
            else:
                taps = taps + (widen(lane.to(tl.int16).to(DTYPE, bitcast=True)),)
    else:
        for j in tl.static_range(WIDTH):
            taps = taps + (widen(words[j]),)
    return taps


@triton.jit
def load_taps(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH: tl.constexpr, WORD_BITS: tl.constexpr):
    """Returns the taps of channels `ch` as WIDTH float32 vectors, oldest first."""
    words = load_words(weight, ch, in_dim, stride_w_d, stride_w_j, WIDTH, WORD_BITS)
    return unpack_taps(words, WIDTH, weight.dtype.element_ty)


@triton.jit
def load_bias_word(bias, ch, in_dim, stride_b, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        word = tl.load(bias + ch * tl.cast(stride_b, tl.int64), mask=in_dim, other=0.0)
    else:
        word = tl.zeros_like(ch).to(tl.float32)
    return word


@triton.jit
def load_bias(bias, ch, in_dim, stride_b, HAS_BIAS: tl.constexpr):
    return widen(load_bias_word(bias, ch, in_dim, stride_b, HAS_BIAS))


@triton.jit
def activate(z, SILU: tl.constexpr, PTX: tl.constexpr):
    """SiLU of a float32 block: z * sigmoid(z), scaled by 2**14 so that nothing over- or underflows early."""
    if SILU:
        s = tl.fma(z, -1.4426950408889634, -14.0)
        if PTX:
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
def convolve(window, taps, start, WIDTH: tl.constexpr):
    """start + sum of taps[j] * window[j], oldest first, one fused multiply-add a tap."""
    acc = start
    for j in tl.static_range(WIDTH):
        acc = tl.fma(widen(window[j]), taps[j], acc)
    return acc
