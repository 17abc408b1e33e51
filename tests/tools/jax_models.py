"""Public JAX models, with their own convolution or with `short_conv` in its place: what they run, and how the two compare.

A model here has `parameters` and three functions of them: `start()`, a cache; `extend(parameters, ids, position, cache)`,
which returns logits and the new cache; and `loss(parameters)`, which returns a loss and the logits of the whole prompt.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_impl import short_conv

BOUND = 2e-4  # of float32 logits that reach 10, as in tests/triton/test_models.py: a few roundings, passed on by the layers
VOCABULARY, PROMPT, CHUNK, STEPS = 97, 12, 6, 64
IDS = jnp.asarray(np.random.default_rng(1).integers(1, VOCABULARY, (2, PROMPT)), jnp.int32)
DOCUMENTS = jnp.asarray([[5] * 5 + [6] + [5] * 6, [1] * PROMPT])  # an id comes back; a document of one token


def reversed_taps(weight, layout="dim_width"):
    return jnp.flip(weight, {"dim_width": 1, "width_dim": 0, "torch": 2, "flax": 0}[layout])


def _taps_reversed(x, weight, bias=None, *, weight_layout="dim_width", **options):
    return short_conv(x, reversed_taps(weight, weight_layout), bias, weight_layout=weight_layout, **options)


def _cache_dropped(*args, cache=None, **options):
    zeros = None if cache is None else jnp.zeros_like(cache)
    return short_conv(*args, cache=zeros, **options)


def _window_late(*args, cache=None, cache_layout="time", **options):
    late = None if cache is None else jnp.roll(cache, 1, 1 if cache_layout == "time" else 2)
    return short_conv(*args, cache=late, cache_layout=cache_layout, **options)


def _other_activation(*args, activation=None, **options):
    return short_conv(*args, activation=None if activation else "silu", **options)


MUTANTS = {
    "taps reversed": _taps_reversed, "cache dropped": _cache_dropped, "window late": _window_late,
    "no activation, or one too many": _other_activation,
}  # fmt: skip


class Counted:
    """`short_conv`, or what stands in its place, and how often it was traced."""

    def __init__(self):
        self.calls, self.replaced_by = 0, short_conv

    def __call__(self, *args, **options):
        self.calls += 1
        return self.replaced_by(*args, **options)


def chunks(model):
    """(logits of the prompt in two chunks, the cache)."""
    first, cache = model.extend(model.parameters, IDS[:, :CHUNK], 0, model.start())
    second, cache = model.extend(model.parameters, IDS[:, CHUNK:], CHUNK, cache)
    return jnp.concatenate([first, second], axis=1), cache


def serve(model, steps=STEPS):
    """The logits of two chunks and of so many greedy steps behind them, and the tokens."""
    logits, cache = chunks(model)
    heard, said = [logits], []
    for step in range(steps):
        said.append(jnp.argmax(heard[-1][:, -1:], -1).astype(jnp.int32))
        logits, cache = model.extend(model.parameters, said[-1], PROMPT + step, cache)
        heard.append(logits)
    return np.asarray(jnp.concatenate(heard, axis=1), np.float32), np.asarray(jnp.concatenate(said, axis=1))


def sensitivity(model):
    """How far a rounding of each parameter moves the model's own gradients, at most, over the largest value of each."""

    def nudged(seed):
        def nudge(path, a):
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(str(path).encode()))
            return a * (1 + 1.5 * 2.0**-24 * jax.random.rademacher(key, a.shape, jnp.float32)).astype(a.dtype)

        return jax.tree_util.tree_map_with_path(nudge, model.parameters)

    gradient = jax.jit(jax.grad(model.loss, has_aux=True))
    wanted, far = gradient(model.parameters)[0], 0.0
    for seed in range(3):
        for a, b in zip(jax.tree.leaves(gradient(nudged(seed))[0]), jax.tree.leaves(wanted), strict=True):
            far = max(far, float(jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-9)))
    return far


def compare(own, model, gradients=1e-4):
    """Asserts that the model says what it says with its own convolution; returns its logits of both chunks and of the whole.

    gradients: how far from its own they may be, over the largest value of each.
    """
    (want, tokens), (got, said) = serve(own), serve(model)
    assert np.array_equal(said, tokens)
    assert np.unique(tokens).size > 10
    assert np.abs(got - want).max() <= BOUND

    gradient = lambda m: jax.jit(jax.value_and_grad(m.loss, has_aux=True))(m.parameters)  # noqa: E731
    ((_, want), wanted), ((_, whole), found) = gradient(own), gradient(model)
    assert np.abs(whole - want).max() <= BOUND
    # the swapped tree has the same parameters in the same order
    flat = jax.tree_util.tree_flatten_with_path(wanted)[0]
    for (path, want), gradient in zip(flat, jax.tree.leaves(found), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(gradient, want, rtol=0, atol=gradients * scale + 1e-7, err_msg=str(path))
    return got[:, :PROMPT], np.asarray(whole)


def logits_of_prompts(model):
    """[64, CHUNK, VOCABULARY] of as many prompts, as float32."""
    prompts = np.random.default_rng(2).integers(1, VOCABULARY, (32, 2, CHUNK))
    found = [
        model.extend(model.parameters, jnp.asarray(ids, jnp.int32), 0, model.start())[0] for ids in prompts
    ]
    return np.asarray(jnp.concatenate(found), np.float32)


def check_bfloat16(own, rounded, model):
    """Asserts that the logits of `model` in bfloat16 are no further from those of `own`, in float32, than its own `rounded`.

    The distances scatter from prompt to prompt: what is no further on average is so within three standard errors.
    """
    exact = logits_of_prompts(own)
    theirs, ours = (np.abs(logits_of_prompts(m) - exact).mean((1, 2)) for m in (rounded, model))
    more = ours - theirs
    assert theirs.min() > 0
    assert more.mean() <= 3 * more.std() / len(more) ** 0.5 + 1e-6 * theirs.mean()


def kernels_for_cuda(model):
    """Launches of our kernels by the whole model's loss and gradient, lowered for a GPU that need not be there."""
    traced = jax.jit(jax.grad(lambda p: model.loss(p)[0])).trace(model.parameters)
    return launches(traced.lower(lowering_platforms=("cuda",)).as_text())


def launches(program, function="main"):
    """Of a function of a StableHLO program with what it calls; the body of a loop counts once."""
    body = re.search(rf"func\.func \w+ @{function}\(.*?(?=\n  func\.func |\Z)", program, re.S)[0]
    called = re.findall(r"call @(\w+)\(", body)
    return sum(name.startswith("mosaic_gpu") or launches(program, name) for name in called)
