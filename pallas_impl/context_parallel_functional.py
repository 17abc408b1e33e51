"""Context parallel training: the differentiable form with the packed tokens split over devices, equal parts, in order.

Forward, a device needs the last width-1 tokens before its part. Backward, it needs the first width-1 tokens after its
part and their upstream gradient: from these it computes again what the later devices' outputs give to its own last
tokens. So `dx` is summed in one place, in the order of one device, and rounded once; sending finished gradients back
would add up rounded sums. It costs as many bytes as a float32 gradient would. Neither exchange makes the main
kernel wait: the width-1 tokens at the cut are computed again, by plain calls of the operation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from oracle.contract import check_causal_conv1d
from pallas_impl import api, context_parallel, functional, xla


def causal_conv1d(
    x,
    weight,
    bias,
    query_start_loc,
    *,
    axis_name,
    sum_weight_gradients=False,
    activation=None,
    max_seqlen=None,
    schedule="auto",
    backend="auto",
):
    """`causal_conv1d` inside `jax.shard_map(..., check_vma=False)`, x split by tokens over the mesh axis `axis_name`.

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
    check_causal_conv1d(
        x, weight, bias, None, query_start_loc,
        activation=activation, max_seqlen=max_seqlen, schedule=schedule, backend=backend,
    )  # fmt: skip
    options = _Options(
        axis_name, bool(sum_weight_gradients), activation, max_seqlen, schedule, api._resolve(backend, x)
    )
    return _convolve(options, x, weight, bias, query_start_loc)


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
            x[:count], weight, bias, windows, jnp.minimum(starts, count), None, stateful,
            activation=activation, max_seqlen=longest, schedule=schedule, backend=backend,
        ).out  # fmt: skip

    halo = jnp.zeros((history, x.shape[1]), x.dtype)
    if tokens and history:
        halo = context_parallel._halo(x, history, options.axis_name)
    head = min(tokens, history)
    windows = _windows(halo, offsets, begin)
    out = convolve(head, windows)
    if head < tokens:
        out = convolve(tokens, None).at[:head].set(out) if head else convolve(tokens, None)
    return out, (x, weight, bias, query_start_loc, halo)


def _backward(options, residuals, dout):
    x, weight, bias, query_start_loc, halo = residuals
    tokens, history = x.shape[0], weight.shape[1] - 1
    begin, offsets = _place(options, x, query_start_loc)
    starts = jnp.clip(offsets - begin, 0, tokens)

    # Float32 copies of weight and bias, which change no product, so that their gradients come unrounded.
    precise = weight.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)
    inputs = x, *precise, _windows(halo, offsets, begin), starts
    dx, dweight, dbias, *_ = functional._differentiate(options.of(tokens), inputs, (dout, None))
    if tokens and history:
        last = _last_dx(options, dout, x, weight, bias, offsets, halo, begin)
        dx = dx.at[tokens - last.shape[0] :].set(last)
    if options.sum_weight_gradients:
        dweight, dbias = (_sum_over_devices(part, options.axis_name) for part in (dweight, dbias))
    return dx, dweight.astype(weight.dtype), None if bias is None else dbias.astype(bias.dtype), None


_convolve.defvjp(_forward, _backward)


def _place(options, x, query_start_loc):
    """Where this device's part begins in the whole, and the whole's offsets."""
    tokens = x.shape[0]
    whole = lax.axis_size(options.axis_name) * tokens
    return lax.axis_index(options.axis_name) * tokens, xla.offsets(query_start_loc, whole)


def _windows(halo, offsets, begin):
    """[batch, width-1, dim]: the tokens before the cut that belong to the row that crosses it, zeros elsewhere."""
    position = begin - halo.shape[0] + jnp.arange(halo.shape[0], dtype=jnp.int32)
    crosses = (offsets[:-1] < begin) & (begin < offsets[1:])
    own = crosses[:, None] & (offsets[:-1, None] <= position)
    return jnp.where(own[:, :, None], halo, jnp.zeros_like(halo))


def _last_dx(options, dout, x, weight, bias, offsets, halo, begin):
    """dx of the part's last tokens, at most width-1: a plain call over them, as many before and as many after.

    g of a token reads the width-1 tokens before it, dx the width-1 values of g after it.
    """
    (tokens, dim), history = x.shape, halo.shape[0]
    tail = min(tokens, history)
    heads = jnp.concatenate([x[:history], dout[:history]], axis=1)
    after = context_parallel._halo(heads, history, options.axis_name, after=True)
    x_before = jnp.concatenate([halo, x[max(tokens - 2 * history, 0) :]])[-history - tail :]
    x_around = jnp.concatenate([x_before, after[:, :dim]])
    dout_around = jnp.concatenate([jnp.zeros_like(halo), dout[tokens - tail :], after[:, dim:]])
    count = x_around.shape[0]
    starts = jnp.clip(offsets - (begin + tokens - tail - history), 0, count)
    inputs = x_around, weight, bias, None, starts
    dx, *_ = functional._differentiate(options.of(count), inputs, (dout_around, None))
    return dx[history : history + tail]


def _sum_over_devices(part, axis_name):
    """The sum of all devices' parts, added in the order of the axis; None stays None."""
    if part is None:
        return None
    total, *rest = lax.all_gather(part, axis_name)
    for other in rest:
        total = total + other
    return total
