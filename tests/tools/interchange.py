"""One request in two frameworks, run as a script by tests/test_interchange.py: this process holds torch and jax.

    python tests/tools/interchange.py cpu|cuda

A pool and weights move between the frameworks through DLPack, without a copy: the addresses are the same. A request is
prefilled in one framework and decoded in the other, and back, each step with the oracle's bits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch

import pallas_impl
import triton_impl
from oracle.numerics import TypedArray
from oracle.reference import causal_conv1d_fn as reference_fn
from oracle.reference import causal_conv1d_update as reference_update

DIM, WIDTH, SLOTS = 64, 4, 5
DTYPES = {"bfloat16": (torch.bfloat16, jnp.bfloat16), "float16": (torch.float16, jnp.float16)}


def to_torch(array):
    return torch.from_dlpack(jax.block_until_ready(array))


def to_jax(tensor):
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return jnp.from_dlpack(tensor)


def moved(before, after):
    """`after`, which must be `before` at the same address."""
    first, second = (
        a.data_ptr() if isinstance(a, torch.Tensor) else a.unsafe_buffer_pointer() for a in (before, after)
    )
    if first != second:
        raise SystemExit(
            f"copied: {type(before).__name__} at {first:x}, {type(after).__name__} at {second:x}"
        )
    return after


def bits(array):
    """A framework's 16-bit floats as uint16."""
    if isinstance(array, torch.Tensor):
        return array.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    return np.asarray(array).view(np.uint16)


def compare(what, got, wanted):
    if not np.array_equal(bits(got), wanted):
        raise SystemExit(f"{what}: {np.count_nonzero(bits(got) != wanted)} elements differ from the oracle's")


def main(device):
    done = 0
    for name, (torch_dtype, jax_dtype) in DTYPES.items():
        for first in ("torch", "jax"):
            exchange(device, name, torch_dtype, jax_dtype, first)
            done += 1
    print(f"agreed: {done}")


def exchange(device, name, torch_dtype, jax_dtype, first):
    rng = np.random.default_rng(0)
    draw = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=torch_dtype, device=device)  # noqa: E731
    x, weight, bias = draw(11, DIM), draw(DIM, WIDTH), draw(DIM)
    pool = torch.full((SLOTS, WIDTH - 1, DIM), torch.nan, dtype=torch_dtype, device=device)
    steps = [draw(1, DIM) for _ in range(4)]

    def typed(tensor):
        raw = bits(tensor)
        return TypedArray(name, raw if name == "bfloat16" else raw.view(np.float16))

    reference = dict(weight=typed(weight), bias=typed(bias))
    integers = lambda values: TypedArray("int32", np.array(values, np.int32))  # noqa: E731
    wanted, states = reference_fn(
        typed(x), conv_states=typed(pool), query_start_loc=integers([0, 11]), cache_indices=integers([3]), **reference
    )  # fmt: skip
    raw = lambda result: np.ascontiguousarray(result.data).view(np.uint16)  # noqa: E731

    # Weights are shared for good; each step takes x, and the pool, to the framework whose turn it is.
    jax_weight, jax_bias = moved(weight, to_jax(weight)), moved(bias, to_jax(bias))
    if device == "cuda":
        backends = {"torch": "triton", "jax": "mosaic_gpu"}
    else:
        backends = {"torch": "eager", "jax": "xla"}
    starts, slots = np.array([0, 11], np.int32), np.array([3], np.int32)
    prefill_jax = jax.jit(lambda *a: pallas_impl.causal_conv1d_fn(*a, backend=backends["jax"]))
    step_jax = jax.jit(lambda *a: pallas_impl.causal_conv1d_update(*a, backend=backends["jax"]))

    def run(framework, x, pool, prefill):
        if framework == "torch":
            if not isinstance(pool, torch.Tensor):
                pool = moved(pool, to_torch(pool))
            index = torch.tensor(slots, device=device)
            if prefill:
                bounds = torch.tensor(starts, device=device)
                return triton_impl.causal_conv1d_fn(
                    x, weight, bias, pool, bounds, index, backend=backends["torch"]
                )
            return triton_impl.causal_conv1d_update(x, weight, bias, pool, index, backend=backends["torch"])
        if isinstance(pool, torch.Tensor):
            pool = moved(pool, to_jax(pool))
        x = moved(x, to_jax(x))
        if prefill:
            return prefill_jax(x, jax_weight, jax_bias, pool, starts, slots)
        return step_jax(x, jax_weight, jax_bias, pool, slots)

    turns = ["torch", "jax"] if first == "torch" else ["jax", "torch"]
    out, pool = run(turns[0], x, pool, prefill=True)
    compare(f"{name}: prefill in {turns[0]}", out, raw(wanted))
    compare(f"{name}: states after prefill in {turns[0]}", pool[3], raw(states)[3])
    for i, token in enumerate(steps):
        framework = turns[(i + 1) % 2]
        wanted, states = reference_update(
            typed(token), conv_states=states, cache_indices=integers([3]), **reference
        )
        out, pool = run(framework, token, pool, prefill=False)
        compare(f"{name}: step {i} in {framework}", out, raw(wanted))
        compare(f"{name}: states after step {i} in {framework}", pool[3], raw(states)[3])


if __name__ == "__main__":
    main(*sys.argv[1:])
