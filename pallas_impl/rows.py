"""Rows of packed tokens on the device: where each lies, which one a block belongs to, its tokens in and out."""

import functools
import operator

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref
from jaxlib.mlir.dialects import llvm  # not in jax.extend.mlir

from pallas_impl.arithmetic import WARP, WARPGROUP, div, in_layout, keep
from pallas_impl.config import cdiv

GROUP = 4  # rows of a tile convolved between two turns of the loop; more take more registers
HIGHEST = np.int32(-(2**31))  # the bit of lane 0
NEAR = 16  # rows that a search does not tell apart, half of a warp's lanes
MARKED = 8  # tokens that a mark of documents stands for; blocks are multiples of it


def document_marks(segment_ids):
    """[batch, ceil(seqlen / 8)] int32, where documents begin: bit j of mark i, from the highest, is token 8 * (i - 1) + j.

    So the mark of any 8 tokens knows the 8 tokens before and behind them, which width-1 of a window never exceed. A row's
    first token continues what is before the row, and is no beginning.
    """
    batch, seqlen = segment_ids.shape
    marks = cdiv(seqlen, MARKED)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(changes, [(0, 0), (MARKED + 1, MARKED * (marks + 1) - seqlen)]).astype(jnp.int32)
    size = MARKED * marks
    bits = (
        lax.slice(begins, (0, j), (batch, j + size - MARKED + 1), (1, MARKED)) << (31 - j)
        for j in range(3 * MARKED)
    )  # one operation for XLA, no reduction
    return functools.reduce(operator.or_, bits)


def begins_in(mark, place, count):
    """Whether a document begins at one of `count` tokens of a mark, the first of them bit `place`."""
    return lax.shift_right_logical(mark << place, jnp.int32(32 - count)) != 0


def next_beginning(mark, place):
    """The first bit of a mark behind `place` at which a document begins; if none does, one behind those of its tokens."""
    return place + 1 + lax.clz(mark << (place + 1))


def marks_with(marks, row, first, size, place, count, *, interpret):
    """Bit i, from the highest, for mark `first + i` of a row, or its last: whether `begins_in`. At most 32, at one latency."""
    last = marks.shape[1] - 1
    if interpret:
        found = jnp.int32(0)
        for i in range(size):
            begins = begins_in(marks[row, jnp.minimum(first + i, last)], place, count)
            found |= jnp.where(begins, lax.shift_right_logical(HIGHEST, jnp.int32(i)), 0)
        return found

    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), scalar, scalar), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, scalar)
    )
    def ballot(_, marks, row, first):
        int32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        constant = lambda value: mgpu.c(value, int32)  # noqa: E731
        lane = _lane()
        mark = arith.minui(arith.addi(first.registers.item(), lane), constant(last))
        mark = memref.load(marks, [arith.index_cast(index, i) for i in (row.registers.item(), mark)])
        bits = arith.andi(mark, constant(((1 << count) - 1) << (32 - place - count)))
        begins = arith.cmpi(arith.CmpIPredicate.ne, bits, constant(0))
        begins = arith.andi(begins, arith.cmpi(arith.CmpIPredicate.ult, lane, constant(size)))
        found = _ballot(arith.extui(int32, begins))
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return ballot(marks, row, first)


def same_document(mark, place, entries, *, interpret):
    """Float32 vectors of the tokens before bit `place` of a mark, oldest first; zeros for those of other documents than the last's."""
    ages = range(len(entries) - 1, 0, -1)
    older = (
        keep(jnp.logical_not(begins_in(mark, place - age, age)), entry, interpret=interpret)
        for age, entry in zip(ages, entries, strict=False)
    )
    return (*older, *entries[-1:])


def row_facts(query_start_loc, row, batch, tokens, seqlen=None):
    """First token and end of a row, inside [0, tokens]; of the tail for row `batch`.

    Without offsets every row has `seqlen` tokens, and the tail none: there it may seem to end past the tokens.
    """
    if query_start_loc is None:
        return row * seqlen, (row + 1) * seqlen
    offset = lambda i: jnp.clip(query_start_loc[i], 0, tokens)  # noqa: E731
    start = jnp.where(row == 0, 0, offset(row))
    return start, jnp.where(row == batch, tokens, offset(jnp.minimum(row + 1, batch)))


def find_row(query_start_loc, block, block_t, batch, tokens, *, interpret):
    """The last row whose first block is at most `block`; blocks are numbered start // block_t + row.

    Row `batch` is the tail after the last row. With offsets that increase, as they must, the first blocks
    increase strictly, so a descent over powers of two finds the row; with others it finds some row. The
    last ten steps of a descent are one vote of the warpgroup, since each step waits for memory.
    """
    vote = 1 if interpret or batch < 8 else min(1024, -(-batch // WARPGROUP) * WARPGROUP)

    row = jnp.int32(0)
    for step in (1 << i for i in reversed(range(batch.bit_length())) if 1 << i >= vote):
        probe = row + step
        start = jnp.clip(query_start_loc[jnp.minimum(probe, batch)], 0, tokens)
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
                int32,
                [arith.extui(int32, ballot)],
                "{ .reg .pred p; setp.ne.u32 p, $1, 0; barrier.cta.red.popc.aligned.u32 $0, 0, p; }",
                "=r,r",
                has_side_effects=True,
            )
            row = arith.addi(row, found)
        return mgpu.FragmentedArray.splat(row, (), is_signed=True)

    return count(query_start_loc, row, block)


class Lanes:
    """Values of 32 rows, one row a lane of each warp: `values(lane)` are int32."""

    def __init__(self, values, interpret):
        self.values, self.interpret = values, interpret
        if not interpret:
            self.lane = _of_warp(_lane)
            self.held = values(self.lane)

    def __getitem__(self, lane):
        """The values of one lane, which may differ from program to program."""
        if self.interpret:
            return self.values(lane)
        shuffle = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
        return tuple(
            _of_warp(lambda value, lane: _asm(shuffle, value, lane), value, lane) for value in self.held
        )

    def where(self, condition):
        """Bit i, from the highest, for lane i: whether `condition(i, *its values)`."""
        if not self.interpret:
            return _of_warp(_ballot, condition(self.lane, *self.held).astype(jnp.int32))
        mask = jnp.int32(0)
        for i in range(8):  # a narrow warp, since each lane takes its time here
            lane = jnp.int32(i)
            mask |= jnp.where(condition(lane, *self.values(lane)), lax.shift_right_logical(HIGHEST, lane), 0)
        return mask


def rows_near(query_start_loc, token, beyond, facts, batch, tokens, *, interpret):
    """A row, the one that has a token or a few before it, and the `facts` of 32 rows from it on as `Lanes`.

    Asked for at once are those among which the tokens up to `beyond` would be if all rows were of one length, and the first step of
    a search, which goes on only where they are not.
    """
    find = functools.partial(
        _last_row, query_start_loc, token, batch=batch, tokens=tokens, interpret=interpret
    )
    strides = [NEAR]
    while strides[0] * WARPGROUP <= batch:
        strides.insert(0, strides[0] * WARPGROUP)
    if interpret:
        row = find(jnp.int32(0), strides)
        return row, Lanes(lambda lane: facts(row + lane), interpret)
    guess = jnp.maximum(_scaled(token, batch, tokens) - WARP // 4, 0) if batch >= WARP else jnp.int32(0)
    lanes = Lanes(lambda lane: facts(guess + lane), interpret)
    if batch < WARP:
        return guess, lanes
    found = find(jnp.int32(0), strides[:1])
    start, *_ = lanes[jnp.int32(0)]
    _, end, *_ = lanes[jnp.int32(WARP - 1)]
    held = lanes.held

    def search():
        row = find(found, strides[1:]) if strides[1:] else found
        return row, *facts(row + lanes.lane)

    right = (start <= token) & ((end >= beyond) | (guess + WARP > batch))
    row, *lanes.held = lax.cond(right, lambda: (guess, *held), search)
    return row, lanes


def _last_row(query_start_loc, token, row, strides, *, batch, tokens, interpret):
    """The last row, of those `strides[-1]` apart from `row` on, that begins at a token or before; each step compares 128 in each warp."""
    if interpret:
        for step in (1 << i for i in reversed(range(batch.bit_length()))):
            probe = row + step
            start = jnp.clip(query_start_loc[jnp.minimum(probe, batch)], 0, tokens)
            row = jnp.where((probe <= batch) & (start <= token), probe, row)
        return row
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), scalar, scalar), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, scalar)
    )
    def search(_, starts, token, row):
        int32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        constant = lambda value: mgpu.c(value, int32)  # noqa: E731
        at_most = lambda a, b: arith.cmpi(arith.CmpIPredicate.sle, a, b)  # noqa: E731
        row, token = row.registers.item(), token.registers.item()
        for stride in strides:
            votes = []
            for first in range(0, min(batch // stride, WARPGROUP), WARP):
                ahead = arith.muli(arith.addi(_lane(), constant(first + 1)), constant(stride))
                probe = arith.addi(row, ahead)
                start = memref.load(starts, [arith.index_cast(index, arith.minsi(probe, constant(batch)))])
                start = arith.minsi(arith.maxsi(start, constant(0)), constant(tokens))
                votes.append(arith.andi(at_most(probe, constant(batch)), at_most(start, token)))
            for vote in votes:
                found = _asm("popc.b32 $0, $1;", _ballot(arith.extui(int32, vote)))
                row = arith.addi(row, arith.muli(found, constant(stride)))
        return mgpu.FragmentedArray.splat(row, (), is_signed=True)

    return search(query_start_loc, token, row)


def _scaled(value, numerator, denominator):
    """value * numerator // denominator of an int32 and Python ints, none negative, in 64 bits."""

    def scale(value):
        int64 = ir.IntegerType.get_signless(64)
        product = arith.muli(arith.extui(int64, value), mgpu.c(numerator, int64))
        return arith.trunci(value.type, arith.divui(product, mgpu.c(denominator, int64)))

    return _of_warp(scale, value)


def _of_warp(function, *values):
    """`function` of int32 registers; what comes of it may differ from lane to lane."""
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(scalar,) * len(values), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, scalar)
    )
    def run(_, *values):
        return mgpu.FragmentedArray.splat(
            function(*(value.registers.item() for value in values)), (), is_signed=True
        )

    return run(*values)


def _lane():
    return arith.remui(mgpu.thread_idx(), mgpu.c(WARP, ir.IntegerType.get_signless(32)))


def _ballot(condition):
    """Bit i, from the highest, for lane i: whether its register is not zero."""
    return _asm(
        "{ .reg .pred p; .reg .b32 b; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 b, p, 0xffffffff; brev.b32 $0, b; }",
        condition,
    )


def _asm(code, *registers):
    constraints = ",".join(["=r"] + ["r"] * len(registers))
    return llvm.inline_asm(registers[0].type, registers, code, constraints, has_side_effects=True)


def load_rows(x, channels, tile, ready, begin, length, fewest=1):
    """Starts the copy of `length` tokens, or a few more, into the first rows of the tile: one of three boxes."""
    smaller = 0
    sizes = sorted({min(n, x.shape[0], tile.shape[0]) for n in (fewest, GROUP, tile.shape[0])})
    for size in sizes:

        @pl.when((length > smaller) & (length <= size))
        def _(size=size):
            plgpu.copy_gmem_to_smem(x.at[pl.ds(begin, size), channels], tile.at[pl.ds(0, size)], ready)

        smaller = size


def copy_out(rows, target, channels, dim):
    """Starts a copy from shared memory, [rows, lanes], to `target(channels)`, clipped at the last channel.

    Mosaic GPU makes a box of one row a plain run of bytes, which does not clip, so that one is cut to size.
    """
    rest = dim % channels.size
    if rows.shape[0] > 1 or not rest:
        plgpu.copy_smem_to_gmem(rows, target(channels))
        return

    @pl.when(channels.start + channels.size <= dim)
    def _():
        plgpu.copy_smem_to_gmem(rows, target(channels))

    @pl.when(channels.start + channels.size > dim)
    def _():
        plgpu.copy_smem_to_gmem(rows.at[:, pl.ds(0, rest)], target(pl.ds(channels.start, rest)))


def store_rows(tile, out, channels, begin, length):
    """Starts the copy of exactly `length` rows: one box if the tile is full, else row by row."""
    size = tile.shape[0]

    def store(done, rows):
        copy_out(
            tile.at[pl.ds(done, rows)], lambda c: out.at[pl.ds(begin + done, rows), c], channels, out.shape[1]
        )

    if size > 1 and size <= out.shape[0]:

        @pl.when(length == size)
        def _():
            store(0, size)

    rest = jnp.where(length == size, 0, length) if size > 1 and size <= out.shape[0] else length
    lax.fori_loop(0, rest, lambda row, _: store(row, 1), None)


def zero_tail(tile, interpret):
    """Zeroes a tile of shared memory, for rows without results; a loop to their end would be unrolled into more code."""
    for r in range(tile.shape[0]):
        store_zeros(tile, r, interpret)


def store_zeros(ref, row, interpret):
    """Zeroes a row of shared memory, each thread the channels that it convolves."""
    ref[row] = in_layout(jnp.zeros(ref.shape[-1:], ref.dtype), interpret=interpret)
