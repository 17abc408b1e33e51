"""The packed tokens split over devices, equal parts, in order: prefill, and the differentiable form for training.

Forward, a device needs the last width-1 tokens before its part and nothing else, so only those travel, from neighbour
to neighbour; a part shorter than width-1 is passed on as a whole. Backward, it needs the first width-1 tokens after
its part and their upstream gradient: from these it computes again what the later devices' outputs give to its own last
tokens. So `dx` is summed in one place, in the order of one device, and rounded once; sending finished gradients back
would add up rounded sums. It costs as many bytes as a float32 gradient would.

The main kernel waits for neither. It runs at once, wrong at the cut, while what it lacks is on its way; the width-1
tokens at the cut are then computed again and written over: on kernels by one small launch (`exchange`), else by plain
calls of the operation. Both use its own arithmetic, so the bits are those of one device.
"""

import functools
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from oracle.contract import ConvOutput, FnCall, RowsCall, Unsupported, normalised
from pallas_impl import api, exchange, plain
from pallas_impl.arithmetic import WARPGROUP
from pallas_impl.backward import differentiate
from pallas_impl.call import interpreter, prefill_part, resolve
from pallas_impl.config import cdiv
from pallas_impl.launch import run
from pallas_impl.records import Arrays
from pallas_impl.records import Options as KernelOptions
from pallas_impl.tracing import axes_are_typed, vary_alike

TOGETHER = 8  # devices whose last tokens travel with the new windows in one sum


def causal_conv1d_fn(
    x: Array,
    weight: Array,
    bias: Array | None,
    conv_states: Array | None,
    query_start_loc: Array,
    cache_indices: Array | None = None,
    has_initial_state: Array | None = None,
    *,
    axis_name: str,
    activation: str | None = None,
    pad_slot_id: SupportsIndex = -1,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
    validate: bool = False,
) -> ConvOutput:
    """`causal_conv1d_fn` inside `jax.shard_map`, with the tokens of x split over the mesh axis `axis_name`.

    Every argument but x is the whole of it, the same on every device of the axis; so is the pool that comes
    back. (`pallas_impl.sharding.causal_conv1d_fn` does the splitting; channels may be split besides.)

    Args:
      x: [tokens / devices, dim]: this device's part of the packed tokens. Rows may cross the cuts, any number of
        them; where the tokens do not divide, let padding follow the last row.
      axis_name: the mesh axis.
      query_start_loc: [batch+1], offsets into the whole.
      weight, bias, conv_states, cache_indices, has_initial_state, activation, pad_slot_id, max_seqlen, schedule,
        backend: as in `pallas_impl.causal_conv1d_fn`.
      validate: False; there is no data to read in a trace.

    Returns:
      ConvOutput(out, conv_states): this device's part of `out`, and the whole new pool, both with the bits of the
      run on one device.

    Raises:
      ValueError, TypeError, Unsupported: as `pallas_impl.causal_conv1d_fn`.
    """
    call = FnCall(
        x,
        weight,
        bias,
        conv_states,
        query_start_loc,
        cache_indices,
        has_initial_state,
        activation,
        pad_slot_id,
        max_seqlen,
        schedule,
        backend,
        validate,
    )
    sizes, call = call.check(), normalised(call)
    pad_slot_id, max_seqlen = call.pad_slot_id, call.max_seqlen
    backend = resolve(backend, x)
    tokens, history, batch = sizes.tokens, sizes.width - 1, sizes.batch
    begin = lax.axis_index(axis_name) * tokens
    offsets = plain.offsets(query_start_loc, lax.axis_size(axis_name) * tokens)
    starts = jnp.clip(offsets - begin, 0, tokens)
    if _mends_on_kernels(backend, x, weight, conv_states, axis_name) and batch:
        if conv_states is None:
            told = _halo(x, history, axis_name)[None]
        else:
            told = lax.all_gather(exchange.message(x, offsets, begin, history), axis_name)
        part = call._replace(query_start_loc=starts)
        return _prefill_on_kernels(part, told, offsets, _spread(begin, offsets), axis_name)
    here = offsets[:-1] >= begin  # the row does not begin in an earlier part

    slots = rows = None
    stateful = jnp.zeros((batch,), bool)
    windows = jnp.zeros((batch, history, sizes.dim), x.dtype)
    if conv_states is not None:
        slots = plain.live_slots(cache_indices, batch, sizes.num_slots, pad_slot_id)
        rows = jnp.where(slots >= 0, jnp.arange(batch, dtype=jnp.int32), -1)
        if has_initial_state is not None:
            stateful = has_initial_state & (slots >= 0)
        windows = plain.read_windows(conv_states, slots, stateful, history)

    def convolve(count, windows, stateful):
        """The first `count` tokens of the part, each row from its own window."""
        longest = None if max_seqlen is None else min(max_seqlen, count)
        return api.causal_conv1d_fn(
            x[:count],
            weight,
            bias,
            windows,
            jnp.minimum(starts, count),
            rows,
            stateful,
            activation=activation,
            pad_slot_id=-1,
            max_seqlen=longest,
            schedule=schedule,
            backend=backend,
            validate=validate,
        ).out

    if tokens == 0 or history == 0 or batch == 0:
        return ConvOutput(convolve(tokens, windows, stateful), conv_states)
    wide = x.dtype if windows.dtype == x.dtype else jnp.dtype(jnp.float32)  # which holds both
    arrived, past = plain.round_to(x, wide), plain.round_to(windows, wide)
    entry = jnp.arange(history, dtype=jnp.int32)[None]

    # Entry i of a row's new window is entry `length + i` of its old window ++ its tokens. Whoever holds a token gives
    # it, the first device what is old: one of all devices gives each entry, the others zero.
    given = None
    if slots is not None:
        kept = (offsets[1:] - offsets[:-1])[:, None] + entry
        place = offsets[1:, None] - history + entry - begin
        old = (kept < history) & (lax.axis_index(axis_name) == 0)
        given = plain.choose(old, plain.take_entries(past, kept), jnp.zeros_like(past))
        own = (kept >= history) & (place >= 0) & (place < tokens)
        given = plain.choose(own, plain.take_rows(arrived, place, wide), given)

    # Behind a barrier nothing has a type any more that says it is the same on all devices, as the new pool is.
    together = given is not None and lax.axis_size(axis_name) <= TOGETHER and not axes_are_typed(x)
    send = _send_together if together else _send_halo
    sent = send(given, arrived, history, axis_name)

    head, out = min(tokens, history), None
    if head < tokens:
        out = convolve(tokens, windows, stateful & here)
        out, sent, given = lax.optimization_barrier(
            (out, sent, given)
        )  # the kernel waits for nothing from afar
    halo, told = _receive_together(sent, given, x, history, axis_name) if together else (sent, given)
    # Entry i of a crossing row's window is entry `done + i` of its old window ++ its tokens before the cut.
    done = jnp.where(here, 0, begin - offsets[:-1])[:, None] + entry
    at_cut = plain.choose(done < history, plain.take_entries(past, done), halo[None])
    first = convolve(head, at_cut, stateful | ~here)
    out = first if out is None else overwrite(out, first, 0, backend)
    if given is None:
        return ConvOutput(out, None)
    if not together:
        told = _sum_of_one(told, axis_name)
    written = jnp.where(offsets[1:] > offsets[:-1], slots, -1)
    return ConvOutput(out, plain.write_windows(conv_states, written, plain.round_to(told, conv_states.dtype)))


def _mends_on_kernels(backend, x, weight, conv_states, axis_name):
    """Whether the kernels of `exchange` do what is left to do at the cuts."""
    if backend == "xla" or not exchange.fits(x.shape[0], x.shape[1], weight.shape[1] - 1):
        return False
    if conv_states is None:
        return True
    # A pool that is the same on all devices comes from a kernel without a type that says so.
    return lax.axis_size(axis_name) <= TOGETHER and conv_states.size > 0 and not axes_are_typed(x)


def _prefill_on_kernels(part, told, offsets, begin, axis_name):
    """A ConvOutput of a checked `FnCall` on a part of the tokens, with its own offsets; `offsets` are of the whole."""
    out, arrays, options = prefill_part(part)
    out, told = lax.optimization_barrier((out, told))  # the kernel waits for nothing from afar
    arrays = arrays._replace(query_start_loc=offsets)
    whole = lax.axis_size(axis_name) * part.x.shape[0]
    return ConvOutput(*exchange.mend_first(out, arrays, told, begin, whole=whole, options=options))


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None,
    query_start_loc: Array,
    *,
    axis_name: str,
    sum_weight_gradients: bool = False,
    activation: str | None = None,
    max_seqlen: SupportsIndex | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> Array:
    """`causal_conv1d` inside `jax.shard_map`, x split by tokens over the mesh axis `axis_name`.

    Every argument but x is the whole of it, the same on every device of the axis. Rows begin with zeros: there are no
    initial and final states here. Reverse-mode derivatives as those of `pallas_impl.causal_conv1d`.

    `dweight` and `dbias` are sums over the tokens of this device's part, so that the gradient of a loss that is a
    sum over devices is their sum over devices; see `sum_weight_gradients`.

    Args:
      x: [tokens / devices, dim]: this device's part of the packed tokens; float32, float16 or bfloat16. Rows may cross
        the cuts, any number of them; where the tokens do not divide, let padding follow the last row.
      weight: [dim, width]; bias: [dim] or None; any of the three dtypes; width 1 to 8.
      query_start_loc: [batch+1] int32 or int64, offsets into the whole.
      axis_name: the mesh axis.
      sum_weight_gradients: False: dweight and dbias are this device's part, rounded to the dtype of weight and bias,
        for whoever sums them: `jax.grad` outside `shard_map` does, for arguments that are not split. True, for
        `jax.grad` inside `shard_map` alone: the sum over the devices, added in float32 in the order of the
        axis and rounded once; the same bits on every device and in every run. It gathers [devices, dim, width+1]
        float32. Outside, the sums would be added up once more.
      activation, max_seqlen, schedule, backend: as in `pallas_impl.causal_conv1d`.

    Returns:
      [tokens / devices, dim]: this device's part of `out`, with the bits of one device. `dx` has them too, in the
      kernels; in "xla" where the compiler does not fuse otherwise.

    Raises:
      ValueError: no `query_start_loc`.
      ValueError, TypeError, Unsupported: as `pallas_impl.causal_conv1d`.
    """
    if query_start_loc is None:
        raise ValueError("query_start_loc: expected offsets into the whole, [batch+1], got None")
    call = RowsCall(x, weight, bias, None, query_start_loc, activation, max_seqlen, schedule, backend)
    call.check()
    max_seqlen = normalised(call).max_seqlen
    options = _Options(
        axis_name, bool(sum_weight_gradients), activation, max_seqlen, schedule, resolve(backend, x)
    )
    given = vary_alike(x, weight, bias, query_start_loc)
    if sum_weight_gradients and jax.typeof(given[1]).manual_axis_type != jax.typeof(weight).manual_axis_type:
        raise Unsupported(
            "sum_weight_gradients: expected False in a jax.shard_map that checks over which axes arrays vary, since it "
            "sums the gradient of a weight that is the same on every device, got True"
        )
    return _convolve(options, *given)


class _Options(NamedTuple):
    axis_name: str
    sum_weight_gradients: bool
    activation: str | None
    max_seqlen: int | None
    schedule: str
    backend: str

    def of(self, count):
        """The options of a plain call with `count` tokens: no row there is longer."""
        longest = None if self.max_seqlen is None else min(self.max_seqlen, count)
        return self.activation, longest, self.schedule, self.backend


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, x, weight, bias, query_start_loc):
    return _forward(options, x, weight, bias, query_start_loc)[0]


def _forward(options, x, weight, bias, query_start_loc):
    """This device's part of `out`, and what the backward pass needs: the inputs and the tokens before the part."""
    tokens, history = x.shape[0], weight.shape[1] - 1
    begin, offsets = _place(options, x, query_start_loc)
    starts = jnp.clip(offsets - begin, 0, tokens)

    def convolve(count, windows):
        activation, longest, schedule, backend = options.of(count)
        stateful = None if windows is None else jnp.ones((windows.shape[0],), bool)
        return api.causal_conv1d_fn(
            x[:count],
            weight,
            bias,
            windows,
            jnp.minimum(starts, count),
            None,
            stateful,
            activation=activation,
            max_seqlen=longest,
            schedule=schedule,
            backend=backend,
        ).out

    if not (tokens and history):
        return convolve(tokens, None), (
            x,
            weight,
            bias,
            query_start_loc,
            jnp.zeros((history, x.shape[1]), x.dtype),
        )
    halo, head, out = _halo(x, history, options.axis_name), min(tokens, history), None
    if _mends_on_kernels(options.backend, x, weight, None, options.axis_name):
        activation, max_seqlen, schedule, backend = options.of(tokens)
        part = FnCall(
            x,
            weight,
            bias,
            None,
            starts,
            activation=activation,
            max_seqlen=max_seqlen,
            schedule=schedule,
            backend=backend,
        )
        out = _prefill_on_kernels(part, halo[None], offsets, _spread(begin, offsets), options.axis_name).out
        return out, (x, weight, bias, query_start_loc, halo)
    if head < tokens:
        out, halo = lax.optimization_barrier((convolve(tokens, None), halo))  # as in a prefill
    first = convolve(head, _windows(halo, offsets, begin))
    out = first if out is None else overwrite(out, first, 0, options.backend)
    return out, (x, weight, bias, query_start_loc, halo)


def _backward(options, residuals, dout):
    x, weight, bias, query_start_loc, halo = residuals
    tokens, history = x.shape[0], weight.shape[1] - 1
    begin, offsets = _place(options, x, query_start_loc)
    starts = jnp.clip(offsets - begin, 0, tokens)

    after = None
    if tokens and history:  # asked for before the main kernel starts, read after it
        heads = jnp.concatenate([x[:history], dout[:history]], axis=1)
        after = _halo(heads, history, options.axis_name, after=True)
    inputs = x, weight, bias, _windows(halo, offsets, begin), starts
    # XLA hides one exchange behind what it takes for long enough; behind the sums alone it would not be hidden.
    dx, dweight, dbias, *_ = differentiate(
        options.of(tokens), inputs, (dout, None), unrounded=True, before_sums=after
    )
    if after is not None and _mends_on_kernels(options.backend, x, weight, None, options.axis_name):
        dx, after = lax.optimization_barrier((dx, after))
        arrays = Arrays(x=x, weight=weight, bias=bias, query_start_loc=offsets)
        interpret = interpreter(options.backend == "mosaic_gpu_interpret")
        static = KernelOptions(silu=options.activation is not None, interpret=interpret)
        whole = lax.axis_size(options.axis_name) * tokens
        dx = exchange.mend_last(dx, dout, arrays, after, _spread(begin, offsets), whole=whole, options=static)
    elif after is not None:
        dx, after = lax.optimization_barrier((dx, after))
        last = _last_dx(options, dout, x, weight, bias, offsets, halo, after, begin)
        dx = overwrite(dx, last, tokens - last.shape[0], options.backend)
    if options.sum_weight_gradients:
        dweight, dbias = (_sum_over_devices(part, options.axis_name) for part in (dweight, dbias))
    return dx, dweight.astype(weight.dtype), None if bias is None else dbias.astype(bias.dtype), None


_convolve.defvjp(_forward, _backward)


def _spread(begin, offsets):
    """The begin of a part as an array of the offsets' shape: XLA then computes both in one kernel."""
    return jnp.broadcast_to(begin, offsets.shape)


def _place(options, x, query_start_loc):
    """Where this device's part begins in the whole, and the whole's offsets."""
    tokens = x.shape[0]
    whole = lax.axis_size(options.axis_name) * tokens
    return lax.axis_index(options.axis_name) * tokens, plain.offsets(query_start_loc, whole)


def _windows(halo, offsets, begin):
    """[batch, width-1, dim]: the tokens before the cut that belong to the row that crosses it, zeros elsewhere."""
    position = begin - halo.shape[0] + jnp.arange(halo.shape[0], dtype=jnp.int32)
    crosses = (offsets[:-1] < begin) & (begin < offsets[1:])
    own = crosses[:, None] & (offsets[:-1, None] <= position)
    return jnp.where(own[:, :, None], halo, jnp.zeros_like(halo))


def _last_dx(options, dout, x, weight, bias, offsets, halo, after, begin):
    """dx of the part's last tokens, at most width-1: a plain call over them, as many before and as many after.

    g of a token reads the width-1 tokens before it, dx the width-1 values of g after it.
    """
    (tokens, dim), history = x.shape, halo.shape[0]
    tail = min(tokens, history)
    x_before = jnp.concatenate([halo, x[max(tokens - 2 * history, 0) :]])[-history - tail :]
    x_around = jnp.concatenate([x_before, after[:, :dim]])
    dout_around = jnp.concatenate([jnp.zeros_like(halo), dout[tokens - tail :], after[:, dim:]])
    count = x_around.shape[0]
    starts = jnp.clip(offsets - (begin + tokens - tail - history), 0, count)
    inputs = x_around, weight, bias, None, starts
    dx, *_ = differentiate(options.of(count), inputs, (dout_around, None))
    return dx[history : history + tail]


def _sum_over_devices(part, axis_name):
    """The sum of all devices' parts, added in the order of the axis; None stays None."""
    if part is None:
        return None
    total, *rest = lax.all_gather(part, axis_name)
    for other in rest:
        total = total + other
    return total


@functools.partial(jax.jit, static_argnames=("first", "backend"))
def overwrite(whole, rows, first, backend):
    """`whole` [tokens, dim] with `rows` [count, dim] at token `first`, in its own memory where XLA owns it.

    XLA (0.11 and 0.12) makes one fusion of a kernel and a slice that is written into its result, and refuses it then:
    "DUS target must be a fusion parameter". So a kernel writes into a kernel's result.
    """
    (tokens, dim), count = whole.shape, rows.shape[0]
    size = count * dim
    if backend == "xla" or not size:
        return whole.at[first : first + count].set(rows)
    if size < WARPGROUP:  # there is no register of fewer channels
        padded = jnp.pad(rows, ((first, tokens - first - count), (0, 0)))
        token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
        return jnp.where((token >= first) & (token < first + count), padded, whole)

    def kernel(refs):
        place = jnp.minimum(lax.axis_index("program") * WARPGROUP, size - WARPGROUP)
        refs.whole[pl.ds(place + first * dim, WARPGROUP)] = refs.rows[pl.ds(place, WARPGROUP)]

    (flat,) = run(
        kernel,
        "overwrite",
        cdiv(size, WARPGROUP),
        dict(rows=rows.reshape(-1), whole=whole.reshape(-1)),
        {},
        {},
        written=("whole",),
        interpret=interpreter(backend == "mosaic_gpu_interpret"),
    )
    return flat.reshape(whole.shape)


def _sum_of_one(given, axis_name):
    """The sum over the devices of values that all but one give as zeros, with their bits."""

    def add(_, given):
        integer = jnp.issubdtype(given.dtype, jnp.integer)  # else a tangent; NCCL adds no 16-bit integers
        return lax.psum(given.astype(jnp.uint32) if integer else given, axis_name).astype(given.dtype)

    return plain.moved(add, (), given)


def _send_halo(_, x, history, axis_name):
    """The tokens before this part as `_halo` gives them, with their bits."""
    return plain.moved(lambda _, x: _halo(x, history, axis_name), (), x)


def _send_together(given, x, history, axis_name):
    """The sum over the devices of `given`, and behind it each device's last tokens in a place of their own.

    XLA keeps one collective under way at a time, so that the main kernel would hide the exchange of the halo alone.
    Over many devices these are too many bytes.
    """
    mine = jnp.arange(lax.axis_size(axis_name), dtype=jnp.int32)[:, None] == lax.axis_index(axis_name)
    last = x[x.shape[0] - min(x.shape[0], history) :][None]
    last = plain.choose(mine, last, jnp.zeros_like(last))
    flat = [part.reshape(-1, x.shape[1]) for part in (given, last)]
    return _sum_of_one(plain.moved(lambda _, *flat: jnp.concatenate(flat), (), *flat), axis_name)


def _receive_together(told, given, x, history, axis_name):
    """(the tokens before this part as `_halo` gives them, the sum of `given`) of what was sent together."""
    count = given.shape[0] * history
    place = (
        lax.axis_index(axis_name) * min(x.shape[0], history) - history + jnp.arange(history, dtype=jnp.int32)
    )
    halo = plain.take(told, count + jnp.maximum(place, 0))
    return plain.choose(place >= 0, halo, jnp.zeros_like(halo)), told[:count].reshape(given.shape)


def _halo(x, history, axis_name, after=False):
    """[history, dim]: the tokens before this part, or those after it, oldest first; zeros outside the whole."""
    devices = lax.axis_size(axis_name)
    take = min(x.shape[0], history)
    sent = x[:take] if after else x[x.shape[0] - take :]
    parts = []
    for hop in range(-(-history // take), 0, -1):
        pairs = [(i + hop, i) if after else (i, i + hop) for i in range(devices - hop)]
        parts.append(lax.ppermute(sent, axis_name, pairs) if pairs else jnp.zeros_like(sent))
    return jnp.concatenate(parts[::-1])[:history] if after else jnp.concatenate(parts)[-history:]
