"""Trains the small hybrid language model of `train_common` with PyTorch.

    python examples/train_torch.py --losses torch.csv
    python examples/train_jax.py --compare torch.csv --plot loss.png

On an NVIDIA GPU the convolution and its gradients run in the Triton kernels, elsewhere in plain torch.
"""

import pathlib
import sys

import torch
from torch.nn.functional import cross_entropy, rms_norm, silu

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train_common as common

from triton_impl import causal_conv1d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def forward(weights, characters):
    """Logits [batch, seqlen, characters]."""
    x = weights["embedding"][characters]
    for i in range(common.LAYERS):
        u = rms_norm(x, (common.DIM,), eps=1e-6) @ weights[f"w_in.{i}"]
        v, gate, keep = u.split(common.DIM, dim=-1)
        v = causal_conv1d(v, weights[f"w_conv.{i}"], weights[f"b_conv.{i}"], activation="silu").out
        a = keep.sigmoid()
        h, states = torch.zeros_like(v[:, 0]), []
        for decay, entering in zip(a.unbind(1), ((1 - a) * v).unbind(1), strict=True):
            h = decay * h + entering
            states.append(h)
        x = x + (torch.stack(states, dim=1) * silu(gate)) @ weights[f"w_out.{i}"]
    return rms_norm(x, (common.DIM,), eps=1e-6) @ weights["head"]


def train(weights, batches):
    """Yields the loss of every step."""
    weights = {name: torch.tensor(w, device=DEVICE, requires_grad=True) for name, w in weights.items()}
    optimizer = torch.optim.Adam(
        weights.values(), lr=common.LEARNING_RATE, betas=(common.BETA1, common.BETA2), eps=common.EPSILON
    )
    for inputs, targets in batches:
        inputs, targets = (torch.from_numpy(a).long().to(DEVICE) for a in (inputs, targets))
        loss = cross_entropy(forward(weights, inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


if __name__ == "__main__":
    sys.exit(common.main("torch", train))
