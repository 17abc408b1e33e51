"""A call prepared before is found again when, and only when, nothing differs but the data."""

import pytest
import torch

from triton_impl import prepared

OPTIONS = ("silu", -1)


def tensors():
    return (torch.randn(5, 8), torch.randn(8, 4), torch.randn(8), None, torch.arange(3), None)


@pytest.fixture(params=["guard", "key"])
def found(request, monkeypatch):
    """A function: the launch found for these arguments; the launch of `tensors()` is prepared."""
    if request.param == "key":
        monkeypatch.setattr(prepared, "TensorGuards", None)
    else:
        assert prepared.TensorGuards is not None
    prepared.forget()
    key, none = prepared.recall("op", tensors(), OPTIONS)
    assert none is None
    prepared.remember(key, "launch")

    def find(arguments, options=OPTIONS, name="op"):
        return prepared.recall(name, arguments, options)[1]

    assert find(tensors()) == "launch"  # by the key
    yield find
    prepared.forget()


def test_other_data_is_the_same_call(found):
    for _ in range(3):
        assert found(tensors()) == "launch"
    if prepared.TensorGuards is not None:
        assert prepared.recall("op", tensors(), OPTIONS) == (None, "launch"), "recognised without a key"


CHANGES = {
    "shape": (0, torch.randn(6, 8)),
    "strides": (0, torch.randn(8, 5).mT),
    "dtype": (2, torch.randn(8).half()),
    "device": (2, torch.randn(8, device="meta")),
    "None": (2, None),
    "given": (3, torch.randn(5, 3, 8)),
    "rank": (4, torch.arange(3)[:, None]),
    "address": (1, torch.randn(33)[1:].view(8, 4)),
    "no tensor": (4, [0, 1, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_another_call(found, change):
    position, value = CHANGES[change]
    arguments = list(tensors())
    arguments[position] = value
    assert found(tuple(arguments)) is None
    assert found(tensors()) == "launch"


def test_other_options_are_another_call(found):
    assert found(tensors(), (None, -1)) is None
    assert found(tensors(), ("silu", -1, torch.ones(2))) is None
    assert found(tensors(), name="other") is None


def test_a_moved_none_is_another_call(found):
    x, weight, bias, *_ = tensors()
    assert found((x, weight, bias, torch.arange(3), None, None)) is None


def test_modes_of_torch_keep_the_call(found):
    """What a guard sees of a tensor depends on the mode; it is renewed, and nothing is prepared twice."""
    for _ in range(2):
        with torch.inference_mode():
            assert found(tensors()) == "launch"
            assert found(tensors()) == "launch"
        assert found(tensors()) == "launch"


def test_one_tensor_for_two_arguments(found):
    x, weight, bias, *_ = tensors()
    twice = (x, weight, bias, None, x, x)
    key, _ = prepared.recall("op", twice, OPTIONS)
    prepared.remember(key, "twice")
    for _ in range(3):
        assert found(twice) == "twice"
        assert found(tensors()) == "launch"


def test_as_many_calls_as_there_is_room_for(found, monkeypatch):
    monkeypatch.setattr(prepared, "_KEPT", 2)
    for tokens in (6, 7, 9):
        arguments = (torch.randn(tokens, 8), *tensors()[1:])
        prepared.remember(prepared.recall("op", arguments, OPTIONS)[0], tokens)
        assert found(arguments) == tokens
    assert len(prepared._calls) == 2, "two, then all were dropped, and two"
    assert found(tensors()) is None


def test_a_guard_that_overlooks_something_is_not_used(monkeypatch):
    class Blind:
        def __init__(self, *tensors, **sizes):
            pass

        def check(self, *tensors):
            return True

    assert prepared._guard_works()
    monkeypatch.setattr(prepared, "TensorGuards", Blind)
    assert not prepared._guard_works()
