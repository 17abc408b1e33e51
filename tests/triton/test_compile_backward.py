"""The backward kernels compiled with no GPU, as they are launched: no spills, wide accesses, no atomics, no inexact SiLU."""

import functools
import itertools
import re

import pytest
import torch
import triton

from tests.tools.code_calls import Array, backward
from tests.tools.covering import cover
from tests.tools.triton_code import TARGETS, accesses, launches_of, recorded, resources
from triton_impl import short_conv

CUDA = [name for name in TARGETS if name.startswith("sm")]  # the others: test_compile_amd.py
FIRST = "channel_first"
LAYOUTS = {
    "token-first": dict(),
    "channel-first": dict(layout=FIRST, seqlen=2048),
    "channel-first, expanded dout": dict(
        layout=FIRST, seqlen=2048, dout=Array((8, 2048, 8192), layout="expanded")
    ),
    "uneven rows": dict(layout=FIRST, tokens=16381),  # packed rows begin anywhere
    "slices of longer rows": dict(layout="sliced", tokens=16381),
}


@functools.cache
def launches(
    target="sm_90", dtype="bfloat16", width=4, flat=True, states=True, layout="token-first", wide=()
):
    """Of the sums by places, and of their reduction; `wide` are arrays in float32 where the others are `dtype`."""
    options = dict(schedule="flat" if flat else "per_sequence", max_seqlen=16384)
    call = backward(dtype=dtype, width=width, states=states, **LAYOUTS[layout], **options)
    arrays = {
        name: array._replace(dtype="float32") if name in wide else array
        for name, array in call.arrays.items()
    }
    walk, reduce = launches_of(call._replace(arrays=arrays), TARGETS[target])
    return walk, reduce


@functools.cache
def compiled(**case):
    return launches(**case)[0].compile()


def meetings(case):
    """Any two parts of a case, and every target with what most launches are; rarer layouts once."""
    target, layout, states = case
    if layout in ("channel-first, expanded dout", "slices of longer rows"):
        return {layout} if target == "sm_90" and not states else set()
    pairs = set(itertools.combinations(case, 2))
    return pairs | {target} if layout == "token-first" and states else pairs


@pytest.mark.parametrize(
    ("target", "layout", "states"), cover(itertools.product(CUDA, LAYOUTS, (True, False)), meetings)
)
def test_no_spills(target, layout, states):
    registers, spilled = resources(compiled(target=target, states=states, layout=layout))
    assert spilled == 0
    assert registers <= 128


@pytest.mark.parametrize("target", CUDA)
def test_no_spills_in_the_reduction(target):
    assert resources(launches(target)[1].compile())[1] == 0


# Widths, dtypes and layouts in turns with the schedule; the widest in every layout.
VARIANTS = [
    ("bfloat16", 1, "token-first", True, True),
    ("bfloat16", 2, "token-first", False, True),
    ("float16", 6, "token-first", False, False),
    ("float32", 4, "token-first", True, False),
    ("float32", 8, "token-first", False, True),
    ("bfloat16", 3, "channel-first", False, False),
    ("float32", 4, "channel-first", False, False),
    ("float32", 8, "channel-first", True, False),
    ("bfloat16", 2, "uneven rows", True, False),
    ("bfloat16", 8, "uneven rows", False, False),
]


@pytest.mark.parametrize(("dtype", "width", "layout", "flat", "states"), VARIANTS)
def test_no_spills_in_other_variants(dtype, width, layout, flat, states):
    assert resources(compiled(dtype=dtype, width=width, flat=flat, states=states, layout=layout))[1] == 0


ARRAYS = ("dout", "dfinal_states", "x", "weight", "bias", "initial_states")
# Sets of arrays that are float32 where the others are float16: of any two, each is in one without the other.
MIXTURES = cover(
    [wide for count in (3, 2, 4, 1, 5) for wide in itertools.combinations(ARRAYS, count)],
    lambda wide: itertools.product(wide, set(ARRAYS) - set(wide)),
)


# Of all mixtures one spills under two Tritons, measured on sm_90: 8 bytes a thread, none under 3.7.1 and 3.8.0.
SPILLS = {("3.6", ("weight", "bias", "initial_states")): 8, ("3.9", ("dout", "x", "bias")): 8}


@pytest.mark.parametrize("wide", MIXTURES, ids=" ".join)
def test_any_mixture_of_dtypes_compiles(wide):
    """Types of a loop's variables must stay what they were: the interpreter does not look."""
    flat = MIXTURES.index(wide) % 2 == 0
    layout = "token-first" if flat else "channel-first"
    known = SPILLS.get((triton.__version__.rpartition(".")[0], wide), 0)
    assert resources(compiled(dtype="float16", flat=flat, layout=layout, wide=wide))[1] == known


def test_the_spill_check_can_fail():
    launch = launches(states=False)[0]
    few = launch._replace(options=launch.options | {"maxnreg": 32}).compile()
    assert resources(few)[1] > 16


def test_every_token_is_read_and_written_once():
    """Four bytes a thread; the loop of eight tokens, three tokens before it and three of history."""
    counts = accesses(compiled(states=False))
    offsets = 1 + 2  # of the search, 4 bytes as well
    assert counts["load", 4] == 2 * (8 + 3) + 3 + 1 + offsets, "x and dout, history, bias"
    assert counts["store", 4] == 8 + 1, "dx, and the zeros of the tail"
    assert counts["store", 8] == 4 + 1, "the sums of taps and bias"
    assert not {kind for kind, _ in counts} & {"atom", "red"}


@pytest.mark.parametrize("layout", ["channel-first", "uneven rows"])
def test_runs_of_channel_first_rows_are_sixteen_byte_accesses(layout):
    """Lanes lie along a channel: half a warp's runs are one stretch of 256 bytes. Taken apart in registers."""
    binary = compiled(states=False, layout=layout)
    counts = accesses(binary)
    steps = 2 if layout == "channel-first" else 1  # at the ends of a row and between, or between alone
    assert counts["load", 16] == 2 * steps, "x and dout"
    assert counts["store", 16] == steps, "dx"
    if layout == "channel-first":
        assert counts["load", 8] == 3 * steps + 1, "tokens around a run of x, behind one of dout; the taps"
        assert counts["load", 2] == 1, "bias"
    assert not {kind for kind, _ in counts} & {"atom", "red"}
    ir = binary.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg.blocked<{(.*)}>", ir, re.MULTILINE))
    tiles = re.findall(r"tt\.(?:load|store) .*tensor<16x8x[48]x!tt\.ptr<bf16>, (#\w+)>", ir)
    assert len(tiles) == 2 * (5 + 1)
    if triton.__version__.startswith("3.6."):  # later ones order the lanes otherwise, see docs/versions.md
        assert all("threadsPerWarp = [16, 2, 1], warpsPerCTA = [1, 4, 1]" in layouts[name] for name in tiles)
    # 3.8's IR converts a mask to what is the same layout, which is no instruction; sums change lanes behind the loops
    ptx = binary.asm["ptx"]
    wide = [found.start() for found in re.finditer(r"\b(ld|st)\.global\S*\.v4\.b32", ptx)]
    between = re.compile(r"\b(shfl|bar|stmatrix|ldmatrix|(ld|st)\.shared)\b")
    assert between.search(ptx, wide[-1])
    assert not between.search(ptx, wide[0], wide[-1])


def test_the_silu_instructions():
    ptx = compiled().asm["ptx"]
    assert ptx.count("ex2.approx.ftz.f32") == ptx.count("rcp.approx.ftz.f32") == 2 * (8 + 3)
    assert not re.search(r"div\.\w+\.f32", ptx)


def test_the_reduction_has_no_atomics():
    assert not re.search(r"\b(atom|red)\.", launches()[1].compile().asm["ptx"])


@functools.cache
def document_launches(target, width, dtype, sums=True):
    """Of rows in which documents begin: outputs, gradients by places, and their reduction, the last two by `sums`."""

    def make():
        x, weight, bias = (
            torch.empty(*shape, dtype=dtype, requires_grad=True) for shape in ((8, 2048, 2048), (2048, width), (2048,))
        )  # fmt: skip
        ids = torch.zeros(8, 2048, dtype=torch.int32)
        out = short_conv(
            x, weight, bias, segment_ids=ids, activation="silu", want_cache=False, backend="triton"
        ).out
        torch.autograd.grad(out, (x, weight, bias), torch.empty_like(out))

    with recorded(TARGETS[target]) as launches:
        make()
    return [launch.compile() for launch in launches]


@pytest.mark.parametrize(
    ("target", "width", "dtype"),
    [
        ("sm_90", 4, torch.bfloat16),
        ("sm_80", 4, torch.bfloat16),
        ("sm_90", 2, torch.float32),
        ("sm_90", 8, torch.float16),
    ],
)
def test_documents_are_three_launches_without_spills(target, width, dtype):
    """One for all documents forward, as many backward, and the sums over places; a program loads marks and no offsets of them."""
    found = [resources(binary) for binary in document_launches(target, width, dtype)]
    assert len(found) == 3
    assert all(spilled == 0 for _, spilled in found)
    # (3.9 takes 147 registers for width 4 on sm_90; no other case or version more than 128)
    more = triton.__version__.startswith("3.9.") and (target, width) == ("sm_90", 4)
    assert width == 8 or max(registers for registers, _ in found) <= (147 if more else 128)
