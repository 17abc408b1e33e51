"""The same weights in PyTorch on triton_impl and in JAX on pallas_impl: the same tokens."""

import importlib.util

import pytest

from tests.conftest import QUICK_COMPILE
from tests.tools import same_tokens

NEEDED = ("torch", "transformers", "jax", "flax", "mamba2_jax")


@pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in NEEDED), reason=f"needs {', '.join(NEEDED)}"
)
def test_the_same_weights_say_the_same_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILE)
    found = same_tokens.both(str(tmp_path))
    assert found["ours"]
    assert found["tokens"] == same_tokens.IDS.shape[0] * same_tokens.STEPS
    assert found["distinct"] > 20
    assert found["logits"] <= 1e-5
    assert found["gradients"] <= 1e-6 < 1e-3 < found["largest gradient"]
