"""Gradients on Mosaic GPU: one pass over the tokens, and a second, small one over partial sums.

One warpgroup a program, one block of tokens of one row, one tile of 128 channels. It walks the tokens of the block once,
and `width-1` tokens further: it recomputes the pre-activation and from it `g = dout * act'(pre)`; the last
`width` values of g give the gradient of the input `width-1` tokens back, or, at the start of a row, of an
entry of the initial state. The gradient of x takes the place of x in shared memory and leaves through TMA. Of a gated
convolution those of the gates do likewise: C's of the token itself, B's and x's of the token `width-1` further back.

Block k of row s has the number `query_start_loc[s] // block_t + s + k` in both schedules and leaves its sums for
weight and bias in that place of a float32 workspace; numbers that no block has get zeros. Rows of equal length need no
offsets, and have as many numbers as blocks. A second kernel adds the places up in their order, so the sums have the same
bits in every run and in both schedules.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math

from pallas_impl import plain
from pallas_impl.arithmetic import (
    constant,
    convolve,
    div,
    gated,
    in_layout,
    keep,
    layout,
    load_taps,
    map_registers,
    rem,
    silu_slope,
    silu_slope_of_register,
)
from pallas_impl.call import CLIPS, interpreter
from pallas_impl.config import BACKWARD_D, BackwardConfig, backward_config, cdiv, tma_dim
from pallas_impl.launch import run
from pallas_impl.rows import (
    MARKED,
    begins_in,
    copy_out,
    find_row,
    marks_with,
    row_facts,
    same_document,
    store_rows,
    store_zeros,
)
from pallas_impl.slots import part_of_out
from pallas_impl.tracing import refuse_transforms

GROUP = MARKED  # tokens between two turns of the loop, and places of the workspace loaded at a time


def differentiate(options, inputs, upstream, *, unrounded=False, before_sums=None, document_marks=None):
    """The gradients of the differentiable form.

    Args:
      options: (activation, max_seqlen, schedule, backend).
      inputs: x [tokens, dim], weight, bias, initial_states, query_start_loc, or None in its place: rows of `max_seqlen` tokens.
      upstream: the gradients of its two results, None where no loss depends on one.
      unrounded: those of weight and bias are wanted as float32.
      before_sums: an array, which is to have arrived before the kernel of the sums begins.
      document_marks: of `rows.document_marks`, for the kernels, on rows whose final states no loss depends on.

    Returns:
      A gradient for each of `inputs`, None for query_start_loc.
    """
    activation, max_seqlen, schedule, backend = options
    dout, dfinal = upstream
    if dout is None:
        dout = jnp.zeros_like(inputs[0])
    (tokens, dim), starts = inputs[0].shape, inputs[-1]
    batch = tokens // max(max_seqlen, 1) if starts is None else starts.shape[0] - 1

    if backend == "xla" or inputs[0].size == 0 or batch == 0:
        x, weight, bias, *others, starts = inputs
        others.append(plain.equal_rows(batch, tokens) if starts is None else starts)
        if unrounded:  # float32 copies change no product
            weight, bias = weight.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)
        found = plain.backward(dout, dfinal, x, weight, bias, *others, silu=activation is not None)
    else:
        arrays = refuse_transforms(dout, dfinal, *inputs[:4])
        schedule, seqlen = ("per_sequence", max_seqlen) if starts is None else (schedule, None)
        config = backward_config(tokens, dim, batch, inputs[0].dtype.itemsize, max_seqlen, schedule)
        static = Options(activation is not None, config, backend == "mosaic_gpu_interpret", unrounded, seqlen)
        found = _padded(*arrays, starts, document_marks, before_sums, static)
    return (*found, None)


class Options(NamedTuple):
    """What is static in a backward pass.

    Attributes:
      silu: whether the forward pass applied it.
      interpret: a bool, for `launch` False or the parameters of Pallas' GPU interpreter.
      unrounded: as in `differentiate`.
      seqlen: of rows of equal length.
      front: what the results went through, `prologue_backward.Front`, or None.
      gates: the first channels of B, C and x of a gated short convolution in x, or None.
    """

    silu: bool
    config: BackwardConfig
    interpret: Any
    unrounded: bool = False
    seqlen: int | None = None
    front: Any = None
    gates: tuple[int, int, int] | None = None


def _padded(dout, dfinal, x, weight, bias, initial_states, query_start_loc, document_marks, before_sums, o):
    """Calls the kernels with arrays that TMA can address: a dim that is too short or odd is padded."""
    tokens, dim = x.shape
    arrays = [a for a in (dout, dfinal, x, initial_states) if a is not None]
    extra = tma_dim(dim, tuple(a.dtype.itemsize for a in arrays)) - dim
    if o.interpret and not CLIPS:
        extra = -dim % BACKWARD_D
    starts = query_start_loc
    if starts is not None and starts.dtype != jnp.int32:
        starts = plain.offsets(starts, tokens)

    def wide(array):
        if array is None or not extra:
            return array
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, extra)])

    dx, dweight, dbias, dinitial = launch(
        wide(dout),
        wide(dfinal),
        wide(x),
        jnp.pad(weight, ((0, extra), (0, 0))),
        wide(bias),
        wide(initial_states),
        starts,
        document_marks,
        before_sums,
        o._replace(interpret=interpreter(o.interpret)),
    )
    return (
        dx[:, :dim],
        dweight[:dim],
        None if bias is None else dbias[:dim],
        None if initial_states is None else dinitial[..., :dim],
    )


def launch(dout, dfinal, x, weight, bias, initial_states, query_start_loc, document_marks, before_sums, o):
    """Runs both kernels.

    Args:
      dout, x: [tokens, dim]; rows of every array are multiples of 16 bytes and at least 128 channels long. With a front,
        dout is a tuple of arrays, each of whole tiles, which lie side by side. With gates, x is the projection, of nothing
        but the three slices, each of whole tiles.
      dfinal: [batch, width-1, dim], or None.
      weight, bias, initial_states: as in `causal_conv1d`.
      query_start_loc: [batch+1] int32; None: rows of `o.seqlen` tokens.
      document_marks, before_sums: as in `differentiate`.
      o: `Options`.

    Returns:
      (dx, dweight, dbias, dinitial), each in the dtype of its argument, dweight and dbias float32 if unrounded; dbias and
      dinitial None without one.
    """
    tokens, (dim, width) = x.shape[0], weight.shape
    history = width - 1
    if history == 0:
        dfinal = None
    columns = cdiv(dim, BACKWARD_D)
    if query_start_loc is None:
        places = blocks = tokens // o.seqlen * o.config.row_blocks
    else:
        batch = query_start_loc.shape[0] - 1
        places = tokens // o.config.block_t + batch + 1
        blocks = places if o.config.flat else (batch + 1) * o.config.row_blocks
    kinds = width + (bias is not None)

    douts = dout if isinstance(dout, tuple) else (dout,)
    operands = {"x": x, **{f"dout{i}": part for i, part in enumerate(douts)}}
    operands |= {"weight": weight, "query_start_loc": query_start_loc}
    operands |= {"bias": bias, "dfinal_states": dfinal, "initial_states": initial_states if history else None}
    outputs = {
        "dx": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "sums": jax.ShapeDtypeStruct((places, kinds, columns * BACKWARD_D), jnp.float32),
    }
    operands["document_marks"] = document_marks if history else None
    if operands["initial_states"] is not None:
        outputs["dinitial"] = jax.ShapeDtypeStruct(initial_states.shape, initial_states.dtype)

    rows = lambda n, dtype: plgpu.SMEM((n, BACKWARD_D), dtype)  # noqa: E731
    least = 0 if o.front is None else o.front.rows_of_sums(kinds, x.dtype)
    scratch = {
        "tile": rows(max(o.config.block_t + history, least), x.dtype),
        "upstream": rows(o.config.block_t + history, douts[0].dtype),
        "edge": rows(max(history, 1), x.dtype),
        "total": rows(kinds, jnp.float32),
        "tile_ready": plgpu.Barrier(num_arrivals=2 if o.gates is None else 4),
        "edge_ready": plgpu.Barrier(num_arrivals=1 if o.gates is None else 2),
    }
    if o.gates is not None:
        scratch |= dict(gate_in=scratch["tile"], gate_out=scratch["tile"], gate_edge=scratch["edge"])
    if operands["initial_states"] is not None:
        scratch |= {
            "window": rows(history, initial_states.dtype),
            "dwindow": rows(history, initial_states.dtype),
        }
        scratch |= {"window_ready": plgpu.Barrier(num_arrivals=1)}
    if dfinal is not None:
        scratch |= {"late": rows(history, dfinal.dtype), "late_ready": plgpu.Barrier(num_arrivals=1)}

    found = run(
        functools.partial(_kernel, columns=columns, o=o),
        "backward",
        blocks * columns,
        operands,
        outputs,
        scratch,
        interpret=o.interpret,
        tokens=places * o.config.block_t,
    )
    found = dict(zip(outputs, found, strict=True))
    sums = found["sums"]
    if before_sums is not None:
        sums, _ = lax.optimization_barrier((sums, before_sums))
    total = add_places(sums, o.interpret)[:, :dim]
    dinitial = found.get("dinitial", initial_states)  # with width 1 it has no elements
    rounded = lambda sums, array: sums if o.unrounded else sums.astype(array.dtype)  # noqa: E731
    dbias = None if bias is None else rounded(total[width], bias)
    return found["dx"], rounded(total[:width].T, weight), dbias, dinitial


def _kernel(refs, *, columns, o):
    config, silu, front, interpret = o.config, o.silu, o.front, bool(o.interpret)
    x, weight, query_start_loc = refs.x, refs.weight, refs.query_start_loc
    douts = [part for part in (refs.dout0, refs.dout1, refs.dout2) if part is not None]
    tile, upstream, edge, total = refs.tile, refs.upstream, refs.edge, refs.total
    window, dwindow, late = refs.window, refs.dwindow, refs.late
    tokens, (dim, width) = x.shape[0], weight.shape
    history, block_t = width - 1, config.block_t
    batch = tokens // o.seqlen if query_start_loc is None else query_start_loc.shape[0] - 1

    program = lax.axis_index("program")
    block, column = div(program, columns), rem(program, columns)
    channels = pl.ds(column * BACKWARD_D, BACKWARD_D)
    tiles, edges = [(tile, channels)], [(edge, channels)]  # and the channels of x that they hold
    if o.gates is not None:
        of_in, of_out, of_x = (pl.ds(channels.start + first, BACKWARD_D) for first in o.gates)
        tiles = [(tile, of_x), (refs.gate_in, of_in), (refs.gate_out, of_out)]
        edges = [(edge, of_x), (refs.gate_edge, of_in)]
    # where the gradient of x is left, from which row on
    results, shift = (tiles, 0) if front is None else ([(upstream, channels)], history)
    if config.flat:
        row = find_row(query_start_loc, block, block_t, batch, tokens, interpret=interpret)
    else:
        row = div(block, config.row_blocks)
    start, end = row_facts(query_start_loc, row, batch, tokens, o.seqlen)
    if query_start_loc is None:
        number, numbers = row * config.row_blocks, jnp.int32(config.row_blocks)
    else:
        number = div(start, block_t) + row  # of the row's first block
        numbers = div(end, block_t) + row + 1 - number  # up to the next row's; the last may be no block

    def run_block(index):
        begin = start + index * block_t
        rest = jnp.maximum(end - begin, 0)  # tokens of the row from here on
        length = jnp.minimum(rest, block_t)
        first = index == 0
        live = (row < batch) & ((rest > 0) | first)  # a row of zero tokens hands its state on

        @pl.when(live)
        def _():
            load(begin, rest, length, first)
            walk(index, rest, length, first)

        @pl.when(jnp.logical_not(live))
        def _():
            def zero(t, _):
                for result, _ in results:
                    store_zeros(result, t + shift, interpret)

            lax.fori_loop(0, length, zero, None)
            for j in range(total.shape[0]):
                store_zeros(total, j, interpret)

        plgpu.commit_smem()
        for result, part in results:
            store_rows(result.at[pl.ds(shift, block_t)], refs.dx, part, begin, length)
        plgpu.copy_smem_to_gmem(total, refs.sums.at[number + index, :, channels])
        if dwindow is not None:

            @pl.when(live & first)
            def _():
                copy_out(dwindow, lambda c: refs.dinitial.at[row, pl.ds(0, history), c], channels, dim)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def load(begin, rest, length, first):
        """Starts the copies; `width-1` tokens after the block come along, whosever they are."""
        smaller = 0
        for size in sorted({min(n, tokens) for n in (GROUP + history, block_t + history)}):

            @pl.when(
                (length > 0) & (length + history > smaller) & ((length + history <= size) | (size == tokens))
            )
            def _(size=size):
                def copy(target, source, part):
                    plgpu.copy_gmem_to_smem(
                        source.at[pl.ds(begin, size), part], target.at[pl.ds(0, size)], refs.tile_ready
                    )

                for target, part in tiles:
                    copy(target, x, part)
                part_of_out(douts, channels, functools.partial(copy, upstream))

            smaller = size
        if not history:
            return
        if tokens > block_t:

            @pl.when(jnp.logical_not(first))
            def _():
                for target, part in edges:
                    before = x.at[pl.ds(begin - history, history), part]
                    plgpu.copy_gmem_to_smem(before, target, refs.edge_ready)

        if window is not None:

            @pl.when(first)
            def _():
                plgpu.copy_gmem_to_smem(
                    refs.initial_states.at[row, pl.ds(0, history), channels], window, refs.window_ready
                )

        if late is not None:
            plgpu.copy_gmem_to_smem(
                refs.dfinal_states.at[row, pl.ds(0, history), channels], late, refs.late_ready
            )

    def wait(first, length, read, past):
        """Waits for the copies; returns the inputs before the block, by `read(rows, j)`; `past`: where there is none."""
        if history:
            if tokens > block_t:

                @pl.when(jnp.logical_not(first))
                def _():
                    plgpu.barrier_wait(refs.edge_ready)

            if window is not None:

                @pl.when(first)
                def _():
                    plgpu.barrier_wait(refs.window_ready)

            entries = lambda ref: tuple(read(ref, j) for j in range(history))  # noqa: E731
            initial = (lambda: entries(window)) if window is not None else (lambda: past)
            past = lax.cond(first, initial, lambda: entries(edge)) if tokens > block_t else initial()
            if late is not None:
                plgpu.barrier_wait(refs.late_ready)

        @pl.when(length > 0)
        def _():
            plgpu.barrier_wait(refs.tile_ready)

        return past

    def walk(index, rest, length, first):
        if front is not None:
            arrive = functools.partial(wait, first, length)
            front.walk(refs, channels.start, block_t, rest, length, arrive, silu=silu)
            return
        groups = div(length + GROUP - 1, GROUP)
        mark = None
        if refs.document_marks is not None:
            mark, left = mark_of(index, 0), groups_cut(index)  # while the tile is on its way
        taps, bias = load_taps(weight, refs.bias, channels.start, BACKWARD_D, interpret=interpret)
        zero = _zeros(interpret)

        def entry(rows, j):
            """A row of the tile, or of what lies before it, as the taps meet it."""
            if o.gates is None or rows is window:
                return rows[j]
            return gated(rows[j], (refs.gate_in if rows is tile else refs.gate_edge)[j], x.dtype)

        past = wait(first, length, lambda rows, j: entry(rows, j).astype(jnp.float32), (zero,) * history)

        def read(t):
            return entry(tile, t), *(rows[t] for rows in (upstream, refs.gate_out) if rows is not None)

        def step(t, token, carry, mark=None, place=None):
            """Token t of the block, as `read`, bit `place` of a mark; returns the gradient of the entry that it completes."""
            past, gs, sums = carry
            if mark is not None:
                past = tuple(keep_unless(begins_in(mark, place, 1), entry) for entry in past)
            value, dout, *gate = (entry.astype(jnp.float32) for entry in token)
            past = (*past, value)
            if gate:
                y = convolve(past, taps, bias, silu=silu, interpret=interpret).astype(x.dtype)
                refs.gate_out[t] = (dout * y.astype(jnp.float32)).astype(x.dtype)
                dout = dout * gate[0]
            g, *sums = gradient_step(
                past,
                taps,
                bias,
                dout,
                sums,
                t < rest,
                t < length,
                silu=silu,
                has_bias=refs.bias is not None,
                interpret=interpret,
            )
            gs = met = (*gs, g)
            if mark is not None:  # of the tokens that met the entry
                cuts = (begins_in(mark, place - history + 1, age) for age in range(1, history + 1))
                met = (gs[0], *map(keep_unless, cuts, gs[1:]))
            begin = zero
            if late is not None:
                c = t - rest
                final = lambda: late[jnp.clip(c, 0, history - 1)].astype(jnp.float32)  # noqa: E731
                begin = lax.cond((c >= 0) & (c < history), final, lambda: zero)
            gradient = convolve(met, taps[::-1], begin, silu=False, interpret=interpret)
            return gradient, (past[1:], gs[1:], tuple(sums))

        # the first width-1 tokens complete entries of the initial state, or of another block
        if mark is not None:
            past = same_document(mark, MARKED, past, interpret=interpret)
        carry = past, (zero,) * history, (zero,) * total.shape[0]
        for t in range(history):
            gradient, carry = step(t, read(t), carry, mark, MARKED + t)
            if dwindow is not None:
                dwindow[t] = gradient.astype(dwindow.dtype)

        def group(i, carry, mark=None):
            ahead = [i * GROUP + history + r for r in range(GROUP)]
            tokens = [read(t) for t in ahead]  # before any store, which the assembler moves no load across
            done = [i * GROUP + r for r in range(GROUP)]
            factors = [] if o.gates is None else [(tile[t], refs.gate_in[t]) for t in done]
            for r, (t, token) in enumerate(zip(ahead, tokens, strict=True)):
                gradient, carry = step(t, token, carry, mark, MARKED + history + r)
                if factors:
                    value, gate = (factor.astype(jnp.float32) for factor in factors[r])
                    refs.gate_in[done[r]] = (gradient * value).astype(x.dtype)
                    gradient = gradient * gate
                tile[done[r]] = gradient.astype(tile.dtype)
            return carry

        def up_to_cut(state):
            first, left, carry = state
            cut = jnp.minimum(lax.clz(left), groups)
            carry = lax.fori_loop(first, cut, group, carry)
            cut_group = functools.partial(group, cut, mark=mark_of(index, cut))
            carry = lax.cond(cut < groups, cut_group, lambda carry: carry, carry)
            return cut + 1, left & lax.shift_right_logical(jnp.int32(2**31 - 1), cut), carry

        if mark is None:
            _, _, sums = lax.fori_loop(0, groups, group, carry)
        else:
            state = jnp.int32(0), left, carry
            _, _, (_, _, sums) = lax.while_loop(lambda state: state[0] < groups, up_to_cut, state)
        for j, value in enumerate(sums):
            total[j] = value

    def mark_of(index, group):
        """The mark of a group of tokens of block `index`, or behind the row some mark."""
        last = refs.document_marks.shape[1] - 1
        return refs.document_marks[row, jnp.minimum(index * (block_t // MARKED) + group, last)]

    def groups_cut(index):
        """A bit for each group of a block, from the highest: whether it has tokens that others' gradients must not reach."""
        place, count = MARKED + 1, GROUP - 1 + history
        groups = block_t // GROUP
        return marks_with(refs.document_marks, row, index * groups, groups, place, count, interpret=interpret)

    def keep_unless(condition, value):
        return keep(jnp.logical_not(condition), value, interpret=interpret)

    if config.flat:
        index = block - number

        @pl.when((index >= 0) & (index < numbers))
        def _():
            run_block(index)

        return

    first = block - row * config.row_blocks
    turns = div(jnp.maximum(numbers - first + config.row_blocks - 1, 0), config.row_blocks)
    lax.fori_loop(0, turns, lambda turn, _: run_block(first + turn * config.row_blocks), None)


def _zeros(interpret):
    return in_layout(jnp.zeros((BACKWARD_D,), jnp.float32), interpret=interpret)


def gradient_step(past, taps, bias, dout, sums, here, counted, *, silu, has_bias, interpret):
    """One token: its g, zero unless it is `here` in the row, and the sums with it added where it is `counted`; True: always."""
    width, tested = len(taps), here is not True
    if interpret:
        return _gradient_step(
            tuple(past), tuple(taps), bias, dout, tuple(sums), here, counted, silu, has_bias
        )

    kind, scalar = layout(BACKWARD_D), plgpu.Layout.WG_SPLAT
    row = plgpu.ShapeDtypeStruct((BACKWARD_D,), jnp.float32, kind)

    @plgpu.inline_mgpu(
        arg_types=(scalar, scalar, *(kind,) * (2 * width + 2 + len(sums))),
        return_type=(row,) * (1 + len(sums)),
    )
    def run(_, here, counted, bias, g, *operands):
        past, taps, sums = operands[:width], operands[width : 2 * width], operands[2 * width :]
        if silu:
            pre = bias
            for tap, value in zip(taps, past, strict=True):
                pre = map_registers(math.fma, tap, value, pre)
            g = map_registers(lambda g, z: arith.mulf(g, silu_slope_of_register(z)), g, pre)
        select = lambda _, chosen, other: chosen  # noqa: E731
        if tested:
            select, nothing = arith.select, ir.IntegerType.get_signless(32)
            here, counted = (
                arith.cmpi(arith.CmpIPredicate.ne, flag.registers.item(), mgpu.c(0, nothing))
                for flag in (here, counted)
            )
        g = map_registers(lambda g: select(here, g, constant(g.type, 0.0)), g)
        new = [
            map_registers(lambda x, g, s: select(counted, math.fma(x, g, s), s), x, g, s)
            for x, s in zip(past, sums, strict=False)
        ]
        if has_bias:
            new.append(map_registers(lambda g, s: select(counted, arith.addf(s, g), s), g, sums[width]))
        return g, *new

    flags = (jnp.asarray(flag, jnp.int32) for flag in (here, counted))
    return run(*flags, bias, dout, *past, *taps, *sums)


@functools.partial(jax.jit, static_argnums=(7, 8))  # traced once for all tokens of a kernel
def _gradient_step(past, taps, bias, dout, sums, here, counted, silu, has_bias):
    """`gradient_step` in plain jax.numpy."""
    g = dout
    if silu:
        g = g * silu_slope(convolve(past, taps, bias, silu=False, interpret=True))
    g = jnp.where(here, g, 0.0)
    terms = [value * g for value in past] + [g] * has_bias
    return g, *(jnp.where(counted, s + term, s) for s, term in zip(sums, terms, strict=False))


def add_places(sums, interpret):
    """The sum of a workspace [places, kinds, channels] over its places, one after another."""
    places, kinds, channels = sums.shape
    columns = channels // BACKWARD_D

    def kernel(refs):
        program = lax.axis_index("program")
        kind, column = div(program, columns), rem(program, columns)
        lanes = pl.ds(column * BACKWARD_D, BACKWARD_D)

        def read(place):
            return in_layout(refs.sums[place, kind, lanes], interpret=interpret)

        def group(i, acc):
            loaded = [read(i * GROUP + r) for r in range(GROUP)]
            return functools.reduce(jnp.add, loaded, acc)

        acc = lax.fori_loop(0, places // GROUP, group, _zeros(interpret))
        for place in range(places - places % GROUP, places):
            acc = acc + read(place)
        refs.total[kind, lanes] = acc

    results = dict(total=jax.ShapeDtypeStruct((kinds, channels), jnp.float32))
    (total,) = run(
        kernel, "backward_sums", kinds * columns, dict(sums=sums), results, {}, interpret=interpret
    )
    return total
