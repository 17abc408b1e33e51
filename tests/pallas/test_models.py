"""Public JAX models with their convolution replaced by `short_conv`, against the models' own.

Small random configurations: mamba2-jax (Flax NNX; `swap` replaces its layers) and recurrentgemma (Flax linen, remat; its
Conv1D calls `short_conv`). Compared are a prefill, the same in two chunks, 64 greedy steps and the gradients of every
parameter. The calls are counted, so that a model that quietly keeps its own fails.
"""

import functools
import importlib.util
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

NEEDED = ("flax", "mamba2_jax", "recurrentgemma")
if any(importlib.util.find_spec(name) is None for name in NEEDED):
    pytest.skip("needs the extra jax-models (see requirements)", allow_module_level=True)

from flax import nnx  # noqa: E402

from pallas_impl import short_conv  # noqa: E402
from pallas_impl.modules import nnx as layers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own dependencies
BOUND = 2e-4  # of float32 logits that reach 10, as in tests/triton/test_models.py: a few roundings, passed on by the layers
PROMPT, CHUNK, STEPS = 13, 6, 64
IDS = jnp.asarray(np.random.default_rng(1).integers(1, 97, (2, PROMPT)), jnp.int32)


class Mamba2:
    """mamba2-jax, with its own convolution or with ours swapped in."""

    def __init__(self, swapped, backend="auto"):
        from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, create_empty_cache

        config = Mamba2Config(
            vocab_size=97, hidden_size=32, state_size=8, head_dim=16, chunk_size=16, num_hidden_layers=2
        )
        model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
        self.replaced = layers.swap(model, backend=backend) if swapped else {}
        graph, self.parameters = nnx.split(model)
        # larger than the usual start, so that logits spread and tokens vary
        self.parameters = jax.tree.map(lambda p: 5 * p if p.ndim == 2 else p, self.parameters)
        self.cache = create_empty_cache(config, 2)

        def run(parameters, ids, cache):
            out = nnx.merge(graph, parameters)(ids, cache=cache)
            return out["logits"], out["cache"]

        self.run, self.call = run, jax.jit(run)

    def prefill(self, ids):
        return self.call(self.parameters, ids, self.cache)

    def extend(self, ids, position, cache):
        return self.call(self.parameters, ids, cache)

    def loss(self, parameters):
        return jnp.square(jax.checkpoint(self.run)(parameters, IDS, self.cache)[0]).mean()


class Griffin:
    """recurrentgemma with nn.remat, with its own convolution or with `short_conv` in its Conv1D."""

    def __init__(self, swapped, backend="auto"):
        from recurrentgemma import common
        from recurrentgemma.jax import griffin

        kinds = (
            common.TemporalBlockType.RECURRENT,
            common.TemporalBlockType.RECURRENT,
            common.TemporalBlockType.ATTENTION,
        )
        config = common.GriffinConfig(
            97, 32, 48, 2, kinds, False, 16, 0.0, scan_type=common.ScanType.LINEAR_NATIVE
        )
        model = griffin.Griffin(config)
        self.swapped, self.backend = swapped, backend
        where = jnp.broadcast_to(jnp.arange(PROMPT), IDS.shape)
        self.parameters = jax.jit(lambda key: model.init(key, IDS, where))(jax.random.key(0))
        self.parameters = jax.tree.map(lambda p: 3 * p if p.ndim == 2 else p, self.parameters)
        self.run = lambda parameters, ids, where, cache: self._patched(
            model.apply, parameters, ids, where, cache
        )
        self.call = jax.jit(self.run)

    def _patched(self, apply, *args):
        from recurrentgemma.jax import layers as own

        with pytest.MonkeyPatch.context() as patch:
            if self.swapped:
                patch.setattr(own.Conv1D, "__call__", functools.partialmethod(convolve, self.backend))
            return apply(*args)

    def prefill(self, ids):
        return self.call(self.parameters, ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), None)

    def extend(self, ids, position, cache):  # one token a call is all that it takes
        outs = []
        for t in range(ids.shape[1]):
            where = jnp.full((ids.shape[0], 1), position + t)
            logits, cache = self.call(self.parameters, ids[:, t : t + 1], where, cache)
            outs.append(logits)
        return jnp.concatenate(outs, axis=1), cache

    def loss(self, parameters):
        where = jnp.asarray([[*range(5), *range(PROMPT - 5)]] * 2)  # two documents
        return jnp.square(self.run(parameters, IDS, where, None)[0]).mean()


CALLS = {"short_conv": short_conv}  # a mutant takes its place


def convolve(module, backend, x, segment_pos, cache=None, return_cache=True):
    """recurrentgemma's Conv1D.__call__."""
    from flax.linen.dtypes import promote_dtype

    x, weight, bias = promote_dtype(x, module.w, module.b, dtype=module.dtype)
    documents = jnp.cumsum(segment_pos == 0, axis=1) if cache is None else None
    return CALLS["short_conv"](
        x, weight, bias, cache=cache, segment_ids=documents, weight_layout="width_dim", want_cache=return_cache,
        backend=backend,
    )  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls that are traced."""
    calls = []

    def count(*args, **kwargs):
        calls.append(kwargs)
        return short_conv(*args, **kwargs)

    monkeypatch.setattr(layers, "short_conv", count)
    monkeypatch.setitem(CALLS, "short_conv", count)
    return calls


def serve(model, steps=STEPS, tokens=None):
    whole, _ = model.prefill(IDS)
    first, cache = model.prefill(IDS[:, :CHUNK])
    second, cache = model.extend(IDS[:, CHUNK:], CHUNK, cache)
    said, heard, logits = [], [], second
    for step in range(steps):
        token = jnp.argmax(logits[:, -1:], -1) if tokens is None else tokens[:, step : step + 1]
        said.append(token)
        logits, cache = model.extend(token, PROMPT + step, cache)
        heard.append(logits)
    join = lambda parts: np.asarray(jnp.concatenate(parts, axis=1), np.float32)  # noqa: E731
    return {
        "prefill": np.asarray(whole),
        "chunked": join([first, second]),
        "decode": join(heard),
        "tokens": join(said),
    }


def worst(got, want):
    return max(np.abs(got[key] - want[key]).max() for key in ("prefill", "chunked", "decode"))


@pytest.mark.parametrize("kind", [Mamba2, Griffin])
def test_model(kind, counted):
    own, model = kind(False), kind(True)
    want, got = serve(own), serve(model)
    # two layers; programs for the prompt, its first chunk, and one token or the second chunk and one token
    assert len(counted) == 2 * (4 if kind is Mamba2 else 3)
    if kind is Mamba2:
        assert model.replaced == {f"backbone.layers.{i}.mixer.conv1d": "DepthwiseConv1d" for i in range(2)}
    assert np.array_equal(got["tokens"], want["tokens"])
    assert np.unique(got["tokens"]).size > 10
    assert worst(got, want) <= BOUND
    np.testing.assert_allclose(got["chunked"], got["prefill"], rtol=0, atol=2 * BOUND)

    want, got = (jax.jit(jax.grad(m.loss))(m.parameters) for m in (own, model))
    flat = jax.tree_util.tree_flatten_with_path(want)[0]
    # the swapped tree has the same parameters in the same order
    for (path, wanted), gradient in zip(flat, jax.tree.leaves(got), strict=True):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-4 * scale + 1e-7, err_msg=str(path))


MUTANTS = {
    "taps reversed": lambda x, w, b=None, **kw: short_conv(x, w[::-1], b, **kw),
    "cache dropped": lambda x, w, b=None, cache=None, **kw: short_conv(x, w, b, **kw),
    "window late": lambda x, w, b=None, cache=None, **kw: short_conv(
        x, w, b, cache=None if cache is None else jnp.roll(cache, 1, -1), **kw
    ),
    "an activation too many": lambda x, w, b=None, **kw: short_conv(x, w, b, **kw, activation="silu"),
}


@pytest.fixture(scope="module")
def wanted():
    return serve(Mamba2(False), 3)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_convolution_is_seen(mutant, wanted, monkeypatch):
    monkeypatch.setattr(layers, "short_conv", MUTANTS[mutant])
    assert worst(serve(Mamba2(True), 3, wanted["tokens"].astype(int)), wanted) > 50 * BOUND


@pytest.mark.parametrize("kind", [Mamba2, Griffin])
def test_whole_models_lower_for_cuda(kind):
    model = kind(True, backend="mosaic_gpu")
    lowered = (
        jax.jit(jax.grad(model.loss)).trace(model.parameters).lower(lowering_platforms=("cuda",)).as_text()
    )
    assert lowered.count("mosaic_gpu") >= 4  # forward and backward of two layers


def test_the_example(capsys):
    """examples/jax_model.py: it loads, swaps, generates and trains."""
    path = Path(__file__).resolve().parents[2] / "examples" / "jax_model.py"
    runpy.run_path(str(path))["main"](tokens=2)
    text = capsys.readouterr().out
    assert "'backbone.layers.1.mixer.conv1d': 'DepthwiseConv1d'" in text
    before, after = map(float, re.search(r"loss ([\d.]+), after a step ([\d.]+)", text).groups())
    assert after < before
