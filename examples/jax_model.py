"""A public JAX model on these kernels: load, swap, generate, one training step.

    pip install '.[pallas,flax]' 'mamba2-jax==1.1.2'
    python examples/jax_model.py [a Hugging Face name or a folder of a Mamba2 checkpoint]

Without a checkpoint the model is small and random.
"""

import sys

import jax.numpy as jnp
import optax
from flax import nnx
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM, create_empty_cache

from pallas_impl.modules.nnx import swap


def main(name=None, tokens=8):
    if name is None:
        model = Mamba2ForCausalLM(Mamba2Config.tiny(), rngs=nnx.Rngs(0))
    else:
        model = Mamba2ForCausalLM.from_pretrained(name)
    print("replaced", swap(model))

    step = nnx.jit(lambda model, ids, cache: model(ids, cache=cache))
    ids, said = jnp.array([[1, 2, 3, 5, 8, 13]]), []
    out = step(model, ids, create_empty_cache(model.cfg, 1))
    for _ in range(tokens):
        said.append(jnp.argmax(out["logits"][:, -1:], -1))
        out = step(model, said[-1], out["cache"])
    print("generated", jnp.concatenate(said, 1)[0].tolist())

    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    loss, gradients = nnx.jit(nnx.value_and_grad(lambda model: model(ids, labels=ids)["loss"]))(model)
    optimizer.update(model, gradients)
    print(f"loss {loss:.3f}, after a step {model(ids, labels=ids)['loss']:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
