"""examples/jax_serving.py: it serves with the same bits as one request at a time, in two programs."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "jax_serving.py"


def load():
    spec = importlib.util.spec_from_file_location("jax_serving", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load()


def test_it_serves(example, capsys):
    assert example.main(["--requests", "9", "--slots", "4", "--budget", "24"]) == 0
    text = capsys.readouterr().out
    assert "9 requests through 4 slots on cpu" in text
    assert "every logit is the same bits" in text
    # the served shape and that of one request alone: lengths, slots and flags compile nothing
    assert (example.mixed._cache_size(), example.decode._cache_size(), example.poison._cache_size()) == (
        2,
        2,
        2,
    )


def test_the_caches_are_donated(example):
    model, caches = example.make_model(), example.empty_caches(4)
    request = example.Request(0, [1, 2, 3], 1, slot=2)
    example.run_step(model, caches, [(request, [1, 2, 3])], 4, 24)
    assert caches.conv.is_deleted()
    assert caches.delta.is_deleted()


def test_the_check_sees_a_wrong_convolution(monkeypatch):
    example = load()
    real = example.causal_conv1d_fn

    def wrong(x, weight, bias, states, starts, slots, continues, **options):
        """A chunk forgets the one before."""
        return real(x, weight, bias, states, starts, slots, jnp.zeros_like(continues), **options)

    monkeypatch.setattr(example, "causal_conv1d_fn", wrong)
    assert example.main(["--requests", "3", "--slots", "2", "--budget", "16"]) > 0


def test_the_peers_compute_the_same(example):
    timed = example.peers(3, 5, 16, repeats=1)
    out, windows = (np.asarray(a, np.float32) for a in timed.pop("ours")[1])
    assert set(timed) == {"gathered", "shifted", "convolved"}
    for _, (other, last) in timed.values():
        np.testing.assert_allclose(
            np.asarray(other, np.float32), out, rtol=2**-7, atol=2**-12
        )  # an ulp or two of bfloat16
        np.testing.assert_array_equal(np.asarray(last, np.float32), windows)


def test_options(example, capsys):
    for options, text in (
        (["--peers"], "--peers: expected a GPU, got cpu"),
        (["--budget", "2"], "at least --slots 8"),
    ):
        with pytest.raises(SystemExit):
            example.main(options)
        assert text in capsys.readouterr().err


@pytest.mark.gpu
def test_it_serves_on_a_gpu(example, capsys):
    assert example.main(["--requests", "14", "--slots", "5", "--budget", "24", "--peers"]) == 0
    assert "dim 8192: ours" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--requests", "--slots", "--budget"])
@pytest.mark.parametrize("value", ["0", "-3", "few"])
def test_a_bad_count_is_said_at_once(example, capsys, option, value):
    with pytest.raises(SystemExit) as ended:
        example.main([option, value])
    assert ended.value.code == 2
    assert (
        f"argument {option}: expected a whole number of at least 1, got '{value}'" in capsys.readouterr().err
    )
