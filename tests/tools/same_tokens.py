"""The same weights in two frameworks: transformers' Mamba2 on triton_impl, mamba2-jax on pallas_impl.

    python tests/tools/same_tokens.py [FOLDER]

Each runs in a process of its own. The torch model is drawn and its weights go through mamba2-jax's own loader; both say 64
tokens greedily from one prompt, and give the gradients of one loss at the convolutions' parameters. Files lie in FOLDER. Both run
on a GPU where they find one, kernels included, and print the device; products of matrices are float32 throughout.
"""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

LAYERS, PROMPT, STEPS = 2, 13, 64
SIZES = dict(vocab_size=97, hidden_size=32, state_size=8, head_dim=16, expand=2, chunk_size=16)
IDS = np.random.default_rng(1).integers(1, 97, (2, PROMPT))
CONV = "backbone.layers.{}.mixer.conv1d.{}"


def with_torch(folder):
    import torch

    import triton_impl.compat
    from triton_impl.compat import causal_conv1d as ours

    calls = dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update"), 0)

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in calls:
        setattr(ours, name, counted(name, getattr(ours, name)))
    triton_impl.compat.install("causal_conv1d")
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if device == 'cuda' else device}")
    config = Mamba2Config(
        num_hidden_layers=LAYERS, num_heads=4, n_groups=1, tie_word_embeddings=False, **SIZES,
        pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than the usual start, so that logits spread and tokens vary
            torch.nn.init.normal_(parameter, std=0.2)
    weights = {
        name.replace("embeddings", "embedding"): p.detach().numpy() for name, p in model.state_dict().items()
    }
    np.savez(folder / "weights.npz", **weights)

    model, ids = model.to(device), torch.tensor(IDS, device=device)
    model(ids, labels=ids, use_cache=False).loss.backward()
    found = {name: p.grad.cpu().numpy() for name, p in model.named_parameters() if "conv1d" in name}
    with torch.no_grad():
        out = model(ids, use_cache=True)
        logits, tokens = [out.logits], []
        for _ in range(STEPS):
            tokens.append(out.logits[:, -1:].argmax(-1))
            out = model(tokens[-1], cache_params=out.cache_params, use_cache=True)
            logits.append(out.logits)
    np.savez(
        folder / "torch.npz", tokens=torch.cat(tokens, 1).cpu().numpy(), logits=torch.cat(logits, 1).cpu().numpy(),
        ours=list(calls.values()) == [2 * LAYERS, STEPS * LAYERS], **found,
    )  # fmt: skip


def with_jax(folder):
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, create_empty_cache, load_pytorch_weights

    from pallas_impl.modules.nnx import swap

    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU's own is TensorFloat-32
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    config = Mamba2Config(num_hidden_layers=LAYERS, tie_word_embeddings=False, **SIZES)
    model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    weights = dict(np.load(folder / "weights.npz"))
    load_pytorch_weights(model, weights)
    replaced = swap(model)
    graph, parameters = nnx.split(model)

    @jax.jit
    def call(parameters, ids, cache):
        out = nnx.merge(graph, parameters)(ids, cache=cache)
        return out["logits"], out["cache"]

    @jax.jit
    @jax.grad
    def gradient(parameters, ids):
        return nnx.merge(graph, parameters)(ids, labels=ids)["loss"]

    ids = jnp.asarray(IDS)
    of = nnx.merge(graph, gradient(parameters, ids)).backbone.layers
    found = {}
    for i in range(LAYERS):
        conv = of[i].mixer.conv1d.conv
        found[CONV.format(i, "weight")] = np.asarray(conv.kernel[...]).transpose(2, 1, 0)
        found[CONV.format(i, "bias")] = np.asarray(conv.bias[...])
    out, cache = call(parameters, ids, create_empty_cache(config, 2))
    logits, tokens = [out], []
    for _ in range(STEPS):
        tokens.append(jnp.argmax(out[:, -1:], -1))
        out, cache = call(parameters, tokens[-1], cache)
        logits.append(out)
    join = lambda parts: np.asarray(jnp.concatenate(parts, 1))  # noqa: E731
    np.savez(
        folder / "jax.npz", tokens=join(tokens), logits=join(logits), ours=len(replaced) == LAYERS, **found
    )


def compare(folder):
    """What the two say of each other, by name."""
    first, second = (np.load(folder / f"{name}.npz") for name in ("torch", "jax"))
    off = lambda name: float(np.abs(first[name] - second[name]).max())  # noqa: E731
    return {
        "ours": bool(first["ours"]) and bool(second["ours"]),
        "tokens": int((first["tokens"] == second["tokens"]).sum()),
        "distinct": int(np.unique(first["tokens"]).size),
        "logits": off("logits"),
        "gradients": max(off(CONV.format(i, name)) for i in range(LAYERS) for name in ("weight", "bias")),
        "largest gradient": max(float(np.abs(first[CONV.format(i, "weight")]).max()) for i in range(LAYERS)),
    }


def both(folder):
    for name in ("torch", "jax"):
        subprocess.run([sys.executable, __file__, folder, name], check=True)
    return compare(Path(folder))


if __name__ == "__main__":
    if sys.argv[2:]:
        {"torch": with_torch, "jax": with_jax}[sys.argv[2]](Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            for what, value in both(sys.argv[1] if sys.argv[1:] else scratch).items():
                print(f"{what}: {value}")
