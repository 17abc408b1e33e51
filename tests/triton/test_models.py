"""Hugging Face models with the causal-conv1d adapter installed, against their own torch path.

Small random configurations of the four kinds of model that use the convolution. What is compared: logits of a
prefill, of a prefill in two chunks and of 64 greedy decode steps, the tokens of those steps, and `generate`. The calls
that reach the adapter are counted, so that a model that quietly takes another path fails.
"""

import functools
import importlib
import importlib.util
import os

import pytest
import torch

import triton_impl.compat
from triton_impl.compat import causal_conv1d as dao

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or matrix products warn in deterministic mode
torch.set_num_threads(1)  # the tensors are tiny
torch.backends.cudnn.allow_tf32 = False  # the model's own convolution is to be float32
if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)
# Largest difference of float32 logits, which reach 5: a few roundings of the convolution, passed on by the layers.
BOUND = {"cpu": 2e-4, "cuda": 1e-3}
PROMPT, CHUNK, STEPS, GENERATED = 21, 9, 64, 8
KINDS = ("prefill", "chunked", "decode")
NAMES = ("causal_conv1d_fn", "causal_conv1d_update")

attention = dict(num_attention_heads=2, num_key_value_heads=1)
# model: (class, configuration, layers with a convolution)
MODELS = {
    "qwen3_next": (
        "Qwen3Next",
        dict(
            num_hidden_layers=4, intermediate_size=48, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, **attention,
        ),
        3,
    ),
    "mamba2": (
        "Mamba2",
        dict(num_hidden_layers=2, num_heads=4, head_dim=16, expand=2, state_size=8, n_groups=1, chunk_size=16),
        2,
    ),
    "falcon_h1": (
        "FalconH1",
        dict(
            num_hidden_layers=2, intermediate_size=48, head_dim=16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
            mamba_n_groups=1, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=16, **attention,
        ),
        2,
    ),
    "lfm2": (
        "Lfm2",
        dict(num_hidden_layers=3, intermediate_size=48, layer_types=["conv", "full_attention", "conv"], **attention),
        2,
    ),
}  # fmt: skip


class Adapter:
    """What the models call: our functions, counted, and replaceable by a mutant."""

    def __init__(self):
        self.functions = {name: getattr(dao, name) for name in NAMES}
        self.calls = dict.fromkeys(NAMES, 0)

    def counted(self, name):
        @functools.wraps(self.functions[name])
        def call(*args, **kwargs):
            self.calls[name] += 1
            return self.functions[name](*args, **kwargs)

        return call


@pytest.fixture(scope="module")
def adapter():
    """Transformers decides when a model's file is imported, so the adapter is installed for those imports only."""
    adapter = Adapter()
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(dao, name, adapter.counted(name))
        triton_impl.compat.install("causal_conv1d")
        try:
            for model in MODELS:
                importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        finally:
            triton_impl.compat.uninstall("causal_conv1d")
    return adapter


def build(model, device, dtype=torch.float32, seed=0):
    prefix, options, _ = MODELS[model]
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{prefix}Config")(vocab_size=97, hidden_size=32, **options)
    torch.manual_seed(seed)
    network = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for parameter in network.parameters():
        if parameter.dim() > 1:  # larger than the usual start, so that logits spread and tokens vary
            torch.nn.init.normal_(parameter, std=0.2)
    return network.to(device, dtype)


@torch.no_grad()
def serve(network, steps=STEPS, tokens=None):
    """A prefill, the same in two chunks with a cache, then decode steps: greedy, or along `tokens`."""
    torch.manual_seed(1)
    ids = torch.randint(1, 97, (2, PROMPT)).to(network.device)
    whole = network(ids, use_cache=False).logits
    out = network(ids[:, :CHUNK], use_cache=True)
    cache = "past_key_values" if "past_key_values" in out else "cache_params"
    chunks, state = [out.logits], {cache: out[cache]}
    out = network(ids[:, CHUNK:], **state, use_cache=True)
    chunks.append(out.logits)
    said, heard = [], []
    for step in range(steps):
        token = out.logits[:, -1:].argmax(-1) if tokens is None else tokens[:, step : step + 1]
        said.append(token)
        out = network(token, **state, use_cache=True)
        heard.append(out.logits)
    return {
        "prefill": whole,
        "chunked": torch.cat(chunks, 1),
        "decode": torch.cat(heard, 1),
        "tokens": torch.cat(said, 1),
    }


@torch.no_grad()
def generate(network):
    torch.manual_seed(2)
    ids = torch.randint(1, 97, (2, PROMPT)).to(network.device)
    return network.generate(ids, max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)


def without_adapter(model, call):
    """`call()` while the model's file holds its own torch functions."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(module, name, getattr(module, name).__wrapped__)
        return call()


def worst(got, want):
    return {
        key: (got[key].double() - want[key]).abs().max().item() for key in ("prefill", "chunked", "decode")
    }


def test_transformers_finds_the_package():
    from transformers.utils.import_utils import _is_package_available

    triton_impl.compat.install("causal_conv1d")
    try:
        assert _is_package_available("causal_conv1d", return_version=True) == (True, dao.__version__)
    finally:
        triton_impl.compat.uninstall("causal_conv1d")


@DEVICES
@pytest.mark.parametrize("model", MODELS)
def test_model(model, adapter, device):
    network, layers = build(model, device), MODELS[model][2]
    adapter.calls = dict.fromkeys(NAMES, 0)
    got, continued = serve(network), generate(network)
    # Prefills: whole, two chunks, generate's. Decode steps: ours, and all of generate's tokens but the first.
    assert adapter.calls == {NAMES[0]: 4 * layers, NAMES[1]: (STEPS + GENERATED - 1) * layers}

    adapter.calls = dict.fromkeys(NAMES, 0)
    want = without_adapter(model, lambda: serve(network))
    assert torch.equal(continued, without_adapter(model, lambda: generate(network)))
    assert not any(adapter.calls.values())
    assert torch.equal(got["tokens"], want["tokens"])
    assert got["tokens"].unique().numel() > 20  # or equal tokens would say little
    assert max(worst(got, want).values()) <= BOUND[device], worst(got, want)
    assert torch.allclose(got["chunked"], got["prefill"], rtol=0, atol=BOUND[device])


@DEVICES
@pytest.mark.parametrize("model", MODELS)
def test_model_in_bfloat16(model, adapter, device):
    """Against float32 with the same weights, on the same tokens: no further off than the model's own path.

    A rounding can send a token to another expert or swing a recurrence, so errors are summed over eight models, and
    a quarter is left for chance. (The convolution itself is judged to the last bit by the conformance suite.)
    """
    mine, own = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for seed in range(8):
        network, wide = (build(model, device, torch.bfloat16, seed) for _ in range(2))
        exact = without_adapter(model, lambda wide=wide: serve(wide.float(), 16))
        run = functools.partial(serve, network, 16, exact["tokens"])
        for sums, got in ((mine, run()), (own, without_adapter(model, run))):
            for key in KINDS:
                sums[key] += (got[key].double() - exact[key]).abs().mean().item()
    for key in KINDS:
        assert mine[key] <= 1.25 * own[key], key


@DEVICES
@pytest.mark.parametrize("model", MODELS)
def test_model_trains(model, adapter, device):
    """A training step's gradients, of every parameter, with the adapter's convolution and with the model's own."""
    network = build(model, device).train()
    ids = torch.randint(1, 97, (2, PROMPT), generator=torch.Generator().manual_seed(3)).to(device)

    def step():
        network.zero_grad()
        network(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    adapter.calls = dict.fromkeys(NAMES, 0)
    got = step()
    assert adapter.calls == {NAMES[0]: MODELS[model][2], NAMES[1]: 0}
    want = without_adapter(model, step)
    assert got.keys() == want.keys()
    assert sum("conv" in name and bool(gradient.any()) for name, gradient in got.items()) >= MODELS[model][2]
    for name, gradient in got.items():
        scale = want[name].abs().max().item()
        torch.testing.assert_close(gradient, want[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


MUTANTS = {
    "taps reversed": (NAMES[0], lambda real: lambda x, w, b=None, **kw: real(x, w.flip(1), b, **kw)),
    "no activation": (NAMES[0], lambda real: lambda x, w, b=None, activation=None: real(x, w, b)),
    "a state that stands still": (NAMES[1], lambda real: lambda x, s, *rest, **kw: real(x, s.clone(), *rest, **kw)),
    "a window one token late": (
        NAMES[1],
        lambda real: lambda x, s, *rest, **kw: (real(x, s.roll(1, 2), *rest, **kw), real(x, s, *rest, **kw))[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_adapter_is_seen(mutant, adapter, monkeypatch):
    name, wrap = MUTANTS[mutant]
    network = build("mamba2", "cpu")
    want = without_adapter("mamba2", lambda: serve(network, 8))
    monkeypatch.setitem(adapter.functions, name, wrap(adapter.functions[name]))
    assert max(worst(serve(network, 8, want["tokens"]), want).values()) > 50 * BOUND["cpu"]
