"""Public JAX models with their convolution replaced by `short_conv`, against the models' own.

Small random configurations: mamba2-jax (Flax NNX; `swap` replaces its layers) and recurrentgemma (Flax linen, remat; its
Conv1D calls `short_conv`). Compared are two chunks, 64 greedy steps, the whole prompt and the gradients of every
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

from pallas_impl.modules import nnx as layers  # noqa: E402
from tests.tools import jax_models  # noqa: E402
from tests.tools.jax_models import BOUND, IDS, MUTANTS, PROMPT, VOCABULARY  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own dependencies
CONV = jax_models.Counted()


class Mamba2:
    """mamba2-jax under remat, with its own convolution or with ours swapped in."""

    calls = 2 * 3  # of two layers, in three programs: a chunk, a step, the gradient

    def __init__(self, swapped, dtype=jnp.float32, backend="auto"):
        from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, create_empty_cache

        config = Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=8,
            head_dim=16,
            chunk_size=16,
            num_hidden_layers=2,
        )
        model = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
        self.replaced = layers.swap(model, backend=backend) if swapped else {}
        graph, parameters = nnx.split(model)
        # larger than the usual start, so that logits spread and tokens vary
        self.parameters = jax.tree.map(lambda p: ((5 if p.ndim == 2 else 1) * p).astype(dtype), parameters)

        def run(parameters, ids, cache):
            out = nnx.merge(graph, parameters)(ids, cache=cache)
            return out["logits"], out["cache"]

        self.run, self.call = run, jax.jit(run)
        self.start = lambda: create_empty_cache(config, 2, dtype)

    def extend(self, parameters, ids, position, cache):
        return self.call(parameters, ids, cache)

    def loss(self, parameters):
        logits, _ = jax.checkpoint(self.run)(parameters, IDS, self.start())
        return jnp.square(logits).mean(), logits


class Griffin:
    """recurrentgemma with nn.remat, with its own convolution or with `short_conv` in its Conv1D; it begins without a cache."""

    calls = 2 * 3
    start_of_all = None

    def __init__(self, swapped, dtype=jnp.float32, backend="auto"):
        from recurrentgemma import common
        from recurrentgemma.jax import griffin

        kinds = (
            common.TemporalBlockType.RECURRENT,
            common.TemporalBlockType.RECURRENT,
            common.TemporalBlockType.ATTENTION,
        )
        config = common.GriffinConfig(
            VOCABULARY, 32, 48, 2, kinds, False, 16, 0.0, scan_type=common.ScanType.LINEAR_NATIVE
        )
        model = griffin.Griffin(config, dtype=dtype)
        self.swapped, self.backend = swapped, backend
        if Griffin.start_of_all is None:  # alike for every dtype and convolution
            where = jnp.broadcast_to(jnp.arange(PROMPT), IDS.shape)
            Griffin.start_of_all = jax.jit(lambda key: model.init(key, IDS, where))(jax.random.key(0))
        self.parameters = jax.tree.map(
            lambda p: ((3 if p.ndim == 2 else 1) * p).astype(dtype), Griffin.start_of_all
        )
        self.run = functools.partial(self._patched, model.apply)
        self.call = jax.jit(self.run)

    def _patched(self, apply, *args):
        from recurrentgemma.jax import layers as own

        with pytest.MonkeyPatch.context() as patch:
            if self.swapped:
                patch.setattr(own.Conv1D, "__call__", functools.partialmethod(convolve, self.backend))
            return apply(*args)

    def start(self):
        return None

    def extend(self, parameters, ids, position, cache):
        if cache is None:
            return self.call(parameters, ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), None)
        outs = []
        for t in range(ids.shape[1]):  # with a cache, one token a call is all that it takes
            where = jnp.full((ids.shape[0], 1), position + t)
            logits, cache = self.call(parameters, ids[:, t : t + 1], where, cache)
            outs.append(logits)
        return jnp.concatenate(outs, axis=1), cache

    def loss(self, parameters):
        where = jnp.asarray([[*range(5), *range(PROMPT - 5)]] * 2)  # two documents
        logits, _ = self.run(parameters, IDS, where, None)
        return jnp.square(logits).mean(), logits


def convolve(module, backend, x, segment_pos, cache=None, return_cache=True):
    """recurrentgemma's Conv1D.__call__."""
    from flax.linen.dtypes import promote_dtype

    x, weight, bias = promote_dtype(x, module.w, module.b, dtype=module.dtype)
    documents = jnp.cumsum(segment_pos == 0, axis=1) if cache is None else None
    return CONV(
        x, weight, bias, cache=cache, segment_ids=documents, weight_layout="width_dim", want_cache=return_cache,
        backend=backend,
    )  # fmt: skip


@functools.cache
def with_its_own(kind):
    """The model that the others are compared to, whose programs are compiled once."""
    return kind(False)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    CONV.__init__()
    monkeypatch.setattr(layers, "short_conv", CONV)


@pytest.mark.parametrize("kind", [Mamba2, Griffin])
def test_model(kind):
    own, model = with_its_own(kind), kind(True)
    pieces, whole = jax_models.compare(own, model)
    assert CONV.calls == kind.calls
    if kind is Mamba2:
        assert model.replaced == {f"backbone.layers.{i}.mixer.conv1d": "DepthwiseConv1d" for i in range(2)}
        np.testing.assert_allclose(pieces, whole, rtol=0, atol=2 * BOUND)
    jax_models.check_bfloat16(own, kind(False, jnp.bfloat16), kind(True, jnp.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [Mamba2, Griffin])
def test_model_on_kernels(kind):
    own = kind(False)
    with jax.default_matmul_precision("highest"):
        # of one value of Mamba2's D a rounding moves 4e-5
        allowed = max(1e-4, 4 * jax_models.sensitivity(own))
        jax_models.compare(own, kind(True, backend="mosaic_gpu"), allowed)
    assert CONV.calls == kind.calls


@pytest.fixture(scope="module")
def wanted():
    return jax_models.chunks(with_its_own(Mamba2))[0]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_convolution_is_seen(mutant, wanted):
    CONV.replaced_by = MUTANTS[mutant]
    assert np.abs(jax_models.chunks(Mamba2(True))[0] - wanted).max() > 50 * BOUND
    assert CONV.calls


@pytest.mark.parametrize("kind", [Mamba2, Griffin])
def test_whole_models_lower_for_cuda(kind):
    # of two layers, under remat: forward, forward again, two kernels backward
    assert jax_models.kernels_for_cuda(kind(True, backend="mosaic_gpu")) == 2 * 4


def test_the_example(capsys):
    """examples/jax_model.py: it loads, swaps, generates and trains."""
    path = Path(__file__).resolve().parents[2] / "examples" / "jax_model.py"
    runpy.run_path(str(path))["main"](tokens=2)
    text = capsys.readouterr().out
    assert "'backbone.layers.1.mixer.conv1d': 'DepthwiseConv1d'" in text
    before, after = map(float, re.search(r"loss ([\d.]+), after a step ([\d.]+)", text).groups())
    assert after < before
