"""jax-linear-attention's models (Equinox) with `short_conv` in the place of their ShortConv, as in test_models.py.

A Qwen3-Next of Gated DeltaNet, attention and experts, and a Mamba2, each a `jax.lax.scan` over two groups of layers under full
remat, with documents in a row. The package asks for a Python of 3.12 or later.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if importlib.util.find_spec("jla") is None:
    pytest.skip("needs jax-linear-attention (see requirements)", allow_module_level=True)

import equinox
from jla.layers.conv import ShortConv
from jla.models import build_model, get_preset
from jla.models.config import hybrid_pattern

from tests.tools import jax_models
from tests.tools.jax_models import BOUND, DOCUMENTS, IDS, MUTANTS, PROMPT, STEPS, VOCABULARY

OWN = ShortConv.__call__
CONV = jax_models.Counted()
SMALL = dict(vocab_size=VOCABULARY, scan_layers=True, remat="full", mtp=None)
KINDS = {  # what is changed, and convolutions of a group of layers
    "tiny-qwen3-next": (dict(layer_types=hybrid_pattern(4, "gated_deltanet", 2)), 3),
    "tiny-mamba2": ({}, 2),
}


def maker(name, dtype):
    config = dataclasses.replace(get_preset(name), **SMALL, **KINDS[name][0], compute_dtype=dtype)
    return functools.partial(build_model, config, key=jax.random.key(0))


@functools.cache
def parameters_of(name):
    """Float32 in any dtype of computation; larger than the usual start, so that logits spread and tokens vary."""
    parameters = equinox.filter(maker(name, "float32")(), equinox.is_array)
    return jax.tree.map(lambda p: 5 * p if p.ndim > 2 else p, parameters)


def built(name, dtype):
    """A model, which is the tree of its parameters."""
    shapes = equinox.filter_eval_shape(maker(name, dtype))
    leaves = jax.tree.leaves(parameters_of(name))
    assert [(p.shape, p.dtype) for p in leaves] == [(p.shape, p.dtype) for p in jax.tree.leaves(shapes)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


class Model:
    def __init__(self, name, swapped, dtype="float32", backend="auto"):
        self.parameters = built(name, dtype)
        self.call = OWN
        if swapped:
            self.call = lambda conv, x, *, segment_ids=None, state=None: CONV(
                x, conv.weight, conv.bias, cache=state, segment_ids=segment_ids,
                activation="silu" if conv.activation else None, backend=backend,
            )  # fmt: skip
        self.step = jax.jit(self._step)
        self.start = jax.jit(self._start)

    def _step(self, parameters, ids, where, cache):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShortConv, "__call__", self.call)
            return parameters.decode_step(cache, ids, where)

    def _start(self):
        return self.parameters.init_cache(2, PROMPT + STEPS)

    def extend(self, parameters, ids, position, cache):
        where = jnp.broadcast_to(position + jnp.arange(ids.shape[1]), ids.shape)
        return self.step(parameters, ids, where, cache)

    def loss(self, parameters):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShortConv, "__call__", self.call)
            out = parameters(IDS, segment_ids=DOCUMENTS)
            logits = parameters.logits(out.hidden)
            return jnp.square(logits).mean() + out.aux_loss, logits


@functools.cache
def with_its_own(name):
    """The model that the others are compared to, whose programs are compiled once."""
    return Model(name, False)


@pytest.fixture(autouse=True)
def counted():
    CONV.__init__()


@pytest.mark.parametrize("name", KINDS)
def test_model(name):
    own, model = with_its_own(name), Model(name, True)
    jax_models.compare(own, model)
    assert CONV.calls == 3 * KINDS[name][1]  # in three programs: a chunk, a step, the gradient
    jax_models.check_bfloat16(own, Model(name, False, "bfloat16"), Model(name, True, "bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_model_on_kernels(name):
    with jax.default_matmul_precision("highest"):
        jax_models.compare(Model(name, False), Model(name, True, backend="mosaic_gpu"))
    assert CONV.calls == 3 * KINDS[name][1]


@pytest.fixture(scope="module")
def wanted():
    return jax_models.chunks(with_its_own("tiny-mamba2"))[0]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_convolution_is_seen(mutant, wanted):
    CONV.replaced_by = MUTANTS[mutant]
    assert np.abs(jax_models.chunks(Model("tiny-mamba2", True))[0] - wanted).max() > 50 * BOUND
    assert CONV.calls


@pytest.mark.parametrize("name", KINDS)
def test_whole_models_lower_for_cuda(name):
    # of a group of layers, under remat: forward, forward again, two kernels backward
    assert jax_models.kernels_for_cuda(Model(name, True, backend="mosaic_gpu")) == 4 * KINDS[name][1]
