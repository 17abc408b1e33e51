"""Hugging Face models whose linear-attention layers, or short convolutions, have our front in place of their own.

Small random configurations. Of Qwen3-Next the convolution, the split, the norm of q and k and both gates are one call of
ours, of LFM2 the convolution between its two products. What is compared with the model's own path: logits of a prefill, of a
prefill in two chunks and of greedy decode steps, and the tokens of those steps; in bfloat16 along the same tokens, by
the distance that the model's own bfloat16 has from float32.
"""

import contextlib
import importlib

import pytest
import torch

import triton_impl
from tests.triton.test_models import BOUND, KINDS, build, serve

LAYERS = {
    "qwen3_next": ("Qwen3NextGatedDeltaNet", ("gated_delta_prologue_fn", "gated_delta_prologue_update"), 3),
    "lfm2": ("Lfm2ShortConv", ("gated_short_conv_fn", "gated_short_conv_update"), 2),
}
STEPS = 4


class Front:
    """The front of a layer, with a pool for each cache; counts its calls."""

    def __init__(self, operations):
        self.prefill, self.step = (getattr(triton_impl, name) for name in operations)
        self.calls, self.pools = {"prefill": 0, "step": 0}, {}

    def __call__(self, layer, cache, x, conv, gates=None, **options):
        """The operation on x [batch, seqlen, channels]; `gates` have its leading axes."""
        gates, key = gates or {}, (id(cache), layer.layer_idx)
        batch, seqlen, weight = x.shape[0], x.shape[1], conv.weight.squeeze(1)
        fresh = cache is None or key not in self.pools
        pool = x.new_zeros(batch, weight.shape[1] - 1, weight.shape[0]) if fresh else self.pools[key]
        if cache is not None:
            self.pools[key] = pool
        self.calls["step" if seqlen == 1 else "prefill"] += 1
        if seqlen == 1:
            arrays = {name: gate[:, 0] if name in ("a", "b") else gate for name, gate in gates.items()}
            found = self.step(x[:, 0], weight, conv.bias, pool, **arrays, **options)
        else:
            starts = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32)
            arrays = {
                name: gate.flatten(0, 1) if name in ("a", "b") else gate for name, gate in gates.items()
            }
            has = torch.full((batch,), not fresh)
            found = self.prefill(
                x.flatten(0, 1), weight, conv.bias, pool, starts, None, has, **arrays, **options
            )
        return [None if part is None else part.unflatten(0, (batch, seqlen)) for part in found[:-1]]


def qwen3_next(front, module):
    def forward(layer, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        old = None if cache_params is None else cache_params.get_recurrent_state(layer.layer_idx, state_idx=0)
        projected = layer.in_proj_qkvz(hidden_states), layer.in_proj_ba(hidden_states)
        q, k, v, z, b, a = layer.fix_query_key_value_ordering(*projected)
        x = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)
        q, k, v, g, beta = front(
            layer, cache_params, x, layer.conv1d, dict(a=a, b=b, A_log=layer.A_log, dt_bias=layer.dt_bias),
            num_k_heads=layer.num_k_heads, num_v_heads=layer.num_v_heads, head_k_dim=layer.head_k_dim,
            head_v_dim=layer.head_v_dim,
        )  # fmt: skip
        step = old is not None and x.shape[1] == 1
        rule = module.torch_recurrent_gated_delta_rule if step else module.torch_chunk_gated_delta_rule
        out, new = rule(
            q, k, v, g=g, beta=beta.to(x.dtype), initial_state=old, output_final_state=cache_params is not None,
            use_qk_l2norm_in_kernel=False,
        )  # fmt: skip
        if cache_params is not None:
            cache_params.update_recurrent_state(new, layer.layer_idx)
            cache_params.layers[layer.layer_idx].has_previous_state[0] = (
                True  # else the convolution's update says so
            )
        return layer.out_proj(layer.norm(out.flatten(0, 2), z.flatten(0, 2)).view(z.shape).flatten(2))

    return forward


def lfm2(front, module):
    def forward(layer, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        (out,) = front(layer, past_key_values, layer.in_proj(hidden_states), layer.conv)
        return layer.out_proj(out)

    return forward


@contextlib.contextmanager
def replaced(model):
    """The model's layers with our front."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    name, operations, _ = LAYERS[model]
    front = Front(operations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            getattr(module, name), "forward", {"qwen3_next": qwen3_next, "lfm2": lfm2}[model](front, module)
        )
        yield front


def distance(some, others):
    return max((some[kind].float() - others[kind].float()).abs().max().item() for kind in KINDS)


@pytest.mark.parametrize("model", LAYERS)
def test_own_front(model):
    network = build(model, "cpu")
    own = serve(network, STEPS)
    with replaced(model) as front:
        found = serve(network, STEPS)
    layers = LAYERS[model][2]
    assert front.calls == {"prefill": 3 * layers, "step": STEPS * layers}
    assert torch.equal(found["tokens"], own["tokens"])
    assert len(own["tokens"].unique()) > 1
    assert 0 < distance(found, own) < BOUND["cpu"]

    rough = build(model, "cpu", torch.bfloat16)
    noise = serve(rough, STEPS, own["tokens"])
    with replaced(model):
        found = serve(rough, STEPS, own["tokens"])
    assert distance(found, noise) <= distance(noise, own)


@pytest.mark.parametrize("model", LAYERS)
def test_a_wrong_front_is_seen(model):
    network = build(model, "cpu")
    own = serve(network, 1)
    with replaced(model) as front:
        step = front.step
        front.step = lambda x, weight, *args, **options: step(x, weight.flip(1), *args, **options)
        found = serve(network, 1)
    assert distance(found, own) > 10 * BOUND["cpu"]
