"""The prologue of the gated delta rule in plain torch, and what its paths share: the convolution inside, memory of the results."""

import torch

from oracle.contract_prologue import PrologueFnCall
from triton_impl import plain


def widths(call):
    """Channels of q, k and v."""
    keys = call.num_k_heads * call.head_k_dim
    return keys, keys, call.num_v_heads * call.head_v_dim


def convolution_of(call):
    """The call of the plain convolution whose flat result holds q, k and v before the norm.

    Without a rounding in between it is one of float32 x, whose result is not rounded.
    """
    conv = call.convolution()._replace(split_sizes=widths(call))
    if call.norm_rounding == "none" and (call.qk_l2norm or call.q_scale != 1.0):
        conv = conv._replace(x=call.x.float())
    return conv


def empty_front(call):
    """New memory for the results of a checked call: flat q, k and v, g, beta; no elements where there is none."""
    x, dim = call.x, call.weight.shape[0]
    tokens = x.shape[:-1]
    elements = dim
    for size in tokens:
        elements = elements * size
    g = x.new_empty(0 if call.a is None else call.a.shape, dtype=torch.float32)
    beta = x.new_empty(0 if call.b is None else (*tokens, call.num_v_heads), dtype=torch.float32)
    return x.new_empty(elements), g, beta


def prologue(call):
    """`gated_delta_prologue_fn` and `_update`: (flat q, k and v, g, beta); updates what the call writes."""
    conv = convolution_of(call)
    run = plain.prefill if isinstance(call, PrologueFnCall) else plain.update
    live = plain.live_tokens(conv)
    flat = run(conv)
    tokens = live.shape[0]
    parts = []
    for name, part in zip("qkv", flat.split([tokens * width for width in widths(call)]), strict=True):
        heads, channels = _heads(call, name)
        y = part.float().view(tokens, heads, channels)
        if name != "v":
            if call.qk_l2norm:
                total = _sum_of_neighbours(y * y) + call.norm_eps
                # by way of float64: torch's root of float32 may be an ulp off on a CPU
                y = y * (1.0 / torch.sqrt(total.double()).float())
            if name == "q" and call.q_scale != 1.0:
                y = y * call.q_scale
        parts.append(_alive(y, live).to(call.x.dtype).flatten())
    _, g, beta = empty_front(call)
    if call.a is not None:
        g.copy_(_alive(_decay(call), live.view(call.x.shape[:-1])))
    if call.b is not None:
        made = _sigmoid(call.b.float())
        if call.beta_rounding == "storage":
            made = made.to(call.b.dtype).float()
        beta.copy_(_alive(made, live.view(call.x.shape[:-1])))
    return torch.cat(parts), g, beta


def backward(call, upstream, dfinal, starts, initial_states):
    """(dx, dweight, dbias, dinitial) of the differentiable form in plain torch, on packed rows.

    Args:
      call: a `PrologueFnCall` of those rows, whose pool holds their initial states.
      upstream: gradients of q, k and v, [tokens, channels] each; dfinal: of the final states, or None.
      starts: where rows start; initial_states: [batch, width-1, dim] or None.
    """
    tokens, parts = call.x.shape[0], []
    flat = plain.prefill(convolution_of(call))
    values = flat.split([tokens * width for width in widths(call)])
    for name, part, given in zip("qkv", values, upstream, strict=True):
        heads, channels = _heads(call, name)
        y, g = part.float().view(tokens, heads, channels), given.float().reshape(tokens, heads, channels)
        if name == "q" and call.q_scale != 1.0:
            g = g * call.q_scale
        if name != "v" and call.qk_l2norm:
            r = 1.0 / torch.sqrt((y * y).sum(-1, keepdim=True) + call.norm_eps)
            n = y * r
            g = r * (g - n * (n * g).sum(-1, keepdim=True))
        parts.append(g.reshape(tokens, -1))
    return plain.backward(
        torch.cat(parts, 1), dfinal, call.x, call.weight, call.bias, initial_states, starts,
        silu=call.activation is not None,
    )  # fmt: skip


def gates_backward(call, dg, dbeta):
    """(da, db, dA_log, ddt_bias), None where there is none.

    Args:
      call: a `PrologueFnCall` of packed rows.
      dg, dbeta: upstream gradients, or None for zeros.
    """
    live = plain.live_tokens(call.convolution())
    da = db = drate = dbias = None
    if call.a is not None:
        rate, z = call.A_log.float().exp(), call.a.float()
        if z.dim() == 3:
            rate = rate[:, None]
        if call.dt_bias is not None:
            z = z + call.dt_bias.float()
        dg = torch.zeros_like(z) if dg is None else dg.float().view_as(z)
        if call.lower_bound is not None:
            s = _sigmoid(rate * z)
            dw = call.lower_bound * s * (1.0 - s) * dg
            dz, drate = rate * dw, rate * z * dw
        else:
            s = torch.where(z > 20.0, 1.0, _sigmoid(z))
            dz = -rate * s * dg
            drate = -rate * _softplus(z) * dg
        dz, drate = _alive(dz, live), _alive(drate, live)
        da, drate = dz.to(call.a.dtype), drate.sum([0, *range(2, drate.dim())]).to(call.A_log.dtype)
        if call.dt_bias is not None:
            dbias = dz.sum(0).to(call.dt_bias.dtype)
    if call.b is not None:
        s = _sigmoid(call.b.float())
        upstream = torch.zeros_like(s) if dbeta is None else dbeta.float().view_as(s)
        db = _alive(s * (1.0 - s) * upstream, live).to(call.b.dtype)
    return da, db, drate, dbias


def _heads(call, name):
    """Heads of q, k or v, and channels of one."""
    return (call.num_v_heads, call.head_v_dim) if name == "v" else (call.num_k_heads, call.head_k_dim)


def _sigmoid(z):
    """By functions of torch whose bits do not depend on an element's place in the tensor, as `plain`'s silu."""
    return torch.where(z < -80.0, torch.exp(z), 1.0 / (1.0 + torch.exp(-z)))  # exp(-z) overflows from -89 on


def _softplus(z):
    return torch.where(z > 20.0, z, torch.log1p(torch.exp(z.clamp(max=20.0))))


def _alive(values, live):
    return torch.where(live.view(*live.shape, *[1] * (values.dim() - live.dim())), values, 0.0)


def _sum_of_neighbours(values):
    """The sum over the last axis, which stays, as a perfect binary tree over neighbours."""
    width = values.shape[-1]
    values = torch.nn.functional.pad(values, (0, (1 << (width - 1).bit_length()) - width))
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values


def _decay(call):
    """g of all tokens."""
    rate, z = call.A_log.float().exp(), call.a.float()
    if z.dim() == call.x.dim() + 1:
        rate = rate[:, None]
    if call.dt_bias is not None:
        z = z + call.dt_bias.float()
    if call.lower_bound is not None:
        return call.lower_bound * _sigmoid(rate * z)
    return -rate * _softplus(z)
