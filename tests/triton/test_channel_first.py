"""Prefill of x with unit token stride: runs of 16 bytes along a channel, wherever rows begin and end."""

import pytest
import torch

import triton_impl

LENGTHS = {
    "aligned": [16, 8, 24],
    "ragged": [1, 9, 2, 17, 4, 7],
    "empty rows": [0, 3, 0, 0, 13, 0],
    "one token": [1],
    "long": [130, 5],  # several blocks of short rows' size
}


def batch(lengths, dtype, width, tail):
    """x [tokens, 41] with unit token stride, a pool, and rows with and without a state, one of them padding."""
    generator = torch.Generator().manual_seed(len(lengths) + width)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens, rows = sum(lengths) + tail, len(lengths)
    return dict(
        x=normal(41, tokens).mT,
        weight=normal(41, width),
        bias=normal(41),
        conv_states=normal(rows + 2, width + 1, 41),
        query_start_loc=torch.tensor([0, *lengths]).cumsum(0),
        cache_indices=torch.tensor([(i + 3) % (rows + 2) if i != 1 else -1 for i in range(rows)]),
        has_initial_state=torch.arange(rows) % 3 > 0,
    )


def both(arguments, **options):
    """The calls on x as it is and on its contiguous copy, each with a pool of its own."""
    results = []
    for x in (arguments["x"], arguments["x"].contiguous()):
        given = arguments | {"x": x, "conv_states": arguments["conv_states"].clone()}
        results.append(triton_impl.causal_conv1d_fn(**given, activation="silu", backend="triton", **options))
    return results


@pytest.mark.parametrize(
    ("lengths", "tail", "schedule"),
    [
        (lengths, tail, schedule)
        for i, lengths in enumerate(LENGTHS)
        for j, tail in enumerate((0, 3, 5))
        for k, schedule in enumerate(("flat", "per_sequence"))
        if (i + j + k) % 2 == 0  # every two of them meet
    ],
)
def test_every_row_has_the_bits_of_the_other_layout(lengths, tail, schedule):
    arguments = batch(LENGTHS[lengths], torch.bfloat16, 4, tail)
    found, expected = both(arguments, schedule=schedule)
    assert found.out.stride() == arguments["x"].stride()
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.conv_states, expected.conv_states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_any_width_and_dtype(width, dtype):
    for tail in (0, 1):
        found, expected = both(batch([1, 9, 2, 17, 4, 7], dtype, width, tail))
        assert torch.equal(found.out, expected.out)
        assert torch.equal(found.conv_states, expected.conv_states)


SERVING = {
    "residual": lambda a: dict(residual=a["x"].flip(0)),
    "split": lambda a: dict(split_sizes=(9, 32)),
    "back": lambda a: dict(state_layout="back"),
    "ring": lambda a: dict(state_layout="ring", cache_seqlens=torch.arange(len(a["cache_indices"])) * 2),
}


@pytest.mark.parametrize("name", SERVING)
def test_serving_arguments(name):
    arguments = batch([1, 9, 2, 17, 4, 7], torch.bfloat16, 4, 0)
    found, expected = both(arguments, **SERVING[name](arguments))
    for a, b in zip(
        *((r.out if isinstance(r.out, tuple) else (r.out,)) for r in (found, expected)), strict=True
    ):
        assert torch.equal(a, b)
    assert torch.equal(found.conv_states, expected.conv_states)


def test_channels_far_apart():
    """A slice of a wider buffer: tokens that are not the call's lie between the channels, and are left alone."""
    arguments = batch([5, 11], torch.bfloat16, 4, 0)
    wide = torch.full((41, 48), float("nan"), dtype=torch.bfloat16)
    wide[:, 8:24] = arguments["x"].mT
    found, expected = both(arguments | {"x": wide[:, 8:24].mT})
    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.conv_states, expected.conv_states)
