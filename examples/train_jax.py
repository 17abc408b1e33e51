"""Trains the small hybrid language model of `train_common` with JAX.

    python examples/train_torch.py --losses torch.csv
    python examples/train_jax.py --compare torch.csv --plot loss.png

On an NVIDIA GPU from Hopper on the convolution and its gradients run in the Mosaic GPU kernels, elsewhere in plain XLA.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_common as common

from pallas_impl import causal_conv1d

jax.config.update("jax_default_matmul_precision", "highest")  # float32 on a GPU too, as in the other example


def rms_norm(x):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def forward(weights, characters):
    """Logits [batch, seqlen, characters]."""
    x = weights["embedding"][characters]
    for i in range(common.LAYERS):
        v, gate, keep = jnp.split(rms_norm(x) @ weights[f"w_in.{i}"], 3, axis=-1)
        v = causal_conv1d(v, weights[f"w_conv.{i}"], weights[f"b_conv.{i}"], activation="silu").out
        a = jax.nn.sigmoid(keep)

        def step(h, now):
            decay, entering = now
            h = decay * h + entering
            return h, h

        over_time = (a.swapaxes(0, 1), ((1 - a) * v).swapaxes(0, 1))
        _, states = jax.lax.scan(step, jnp.zeros_like(v[:, 0]), over_time)
        x = x + (states.swapaxes(0, 1) * jax.nn.silu(gate)) @ weights[f"w_out.{i}"]
    return rms_norm(x) @ weights["head"]


def loss_of(weights, inputs, targets):
    scores = jax.nn.log_softmax(forward(weights, inputs))
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1).mean()


@jax.jit
def update(weights, mean, square, step, inputs, targets):
    """One step of Adam, as torch.optim.Adam does it."""
    loss, gradient = jax.value_and_grad(loss_of)(weights, inputs, targets)
    mean = jax.tree.map(lambda m, g: common.BETA1 * m + (1 - common.BETA1) * g, mean, gradient)
    square = jax.tree.map(lambda s, g: common.BETA2 * s + (1 - common.BETA2) * g * g, square, gradient)
    rate = common.LEARNING_RATE / (1 - common.BETA1**step)
    weights = jax.tree.map(
        lambda w, m, s: w - rate * m / (jnp.sqrt(s / (1 - common.BETA2**step)) + common.EPSILON),
        weights, mean, square,
    )  # fmt: skip
    return weights, mean, square, loss


def train(weights, batches):
    """Yields the loss of every step."""
    weights = jax.tree.map(jnp.asarray, weights)
    mean = square = jax.tree.map(jnp.zeros_like, weights)
    for step, (inputs, targets) in enumerate(batches, start=1):
        weights, mean, square, loss = update(weights, mean, square, jnp.float32(step), inputs, targets)
        yield float(loss)


if __name__ == "__main__":
    sys.exit(common.main("jax", train))
