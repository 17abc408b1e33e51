"""Programmatic dependent launch in the machine code: the wait for kernels ahead comes before anything else, on every path."""

import pytest

from tests.tools.code_calls import CALLS
from tests.tools.triton_code import TARGETS, instructions, launches_of

NAMES = (
    "prefill flat", "prefill per_sequence", "prefill small", "prefill channel-first", "prefill ring", "prefill snapshots",
    "prefill rows of 1 token", "prefill rows of 16 tokens",
    "update 1 row", "update 256 rows", "update rolling packed", "verify", "tree", "commit",
)  # fmt: skip
ACCESSES = ("LD", "ST", "ATOM", "RED", "UTMA", "UBLKCP")
CONTROL = ("BRA", "BRX", "EXIT", "CALL", "RET", "JMP", "BSSY")


def ahead_of_the_wait(names):
    """Instructions of a kernel that may access memory or leave the straight way before the wait."""
    wait = names.index("ACQBULK")
    constants = ("LDC", "LDCU")
    return [n for n in names[:wait] if n.startswith(ACCESSES + CONTROL) and n.split(".")[0] not in constants]


@pytest.mark.parametrize("name", NAMES)
def test_the_wait_is_first(name):
    for launch in launches_of(CALLS[name], TARGETS["sm_90"]):
        assert launch.options["launch_pdl"]
        names = instructions(launch.compile())
        assert names.count("ACQBULK") == 1
        assert ahead_of_the_wait(names) == []


def test_an_access_ahead_of_the_wait_would_be_seen():
    (launch,) = launches_of(CALLS["update 1 row"], TARGETS["sm_90"])
    names = instructions(launch.compile())
    names.remove("ACQBULK")
    first = next(i for i, n in enumerate(names) if n.startswith("LDG"))
    assert ahead_of_the_wait([*names[: first + 1], "ACQBULK"]) != []


def test_devices_without_it():
    (launch,) = launches_of(CALLS["update 1 row"], TARGETS["sm_80"])
    assert not launch.options.get("launch_pdl")
    assert "griddepcontrol" not in launch.compile().asm["ptx"]
