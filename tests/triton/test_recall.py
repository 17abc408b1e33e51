"""A call prepared before is found again when, and only when, nothing differs but the data."""

import pytest
import torch

from triton_impl import call

OPTIONS = ("silu", -1, 17, False, (3, 5))


def tensors():
    return (torch.randn(5, 8), torch.randn(8, 4), torch.randn(8), None, torch.arange(3), None)


@pytest.fixture(params=["guard", "key"])
def found(request, monkeypatch):
    """A function: what is found for these arguments; the call of `tensors()` is prepared."""
    if request.param == "key":
        monkeypatch.setattr(call, "TensorGuards", None)
    else:
        assert call.TensorGuards is not None
    call.forget()
    assert call.recall("op", (*tensors(), *OPTIONS)) is None
    call.remember("op", (*tensors(), *OPTIONS), "launch")

    def find(arguments, options=OPTIONS, name="op"):
        return call.recall(name, (*arguments, *options))

    assert find(tensors()) == "launch"  # by the key
    yield find
    call.forget()


def test_other_data_is_the_same_call(found, monkeypatch):
    for _ in range(3):
        assert found(tensors()) == "launch"
    if call.TensorGuards is not None:
        monkeypatch.setattr(call, "_calls", {})
        assert found(tensors()) == "launch", "recognised without a key"


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


@pytest.mark.parametrize(
    "options",
    [
        (None, -1, 17, False, (3, 5)),
        ("silu", -1, 18, False, (3, 5)),
        ("silu", -1.0, 17, False, (3, 5)),
        ("silu", -1, 17.0, False, (3, 5)),
        ("silu", -1, 17, 0, (3, 5)),
        ("silu", -1, 17, False, (3.0, 5)),
        ("silu", -1, 17, False, [3, 5]),
        ("silu", torch.tensor(-1), 17, False, (3, 5)),
        ("silu", -1, torch.ones(2), False, (3, 5)),
    ],
)
def test_other_options_are_another_call(found, options):
    """Also such as are equal, but of another type: a check has not seen them."""
    for _ in range(2):
        assert found(tensors(), options) is None
        assert found(tensors()) == "launch"


def test_another_operation_is_another_call(found):
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


def test_one_tensor_for_two_arguments(found, monkeypatch):
    x, weight, bias, *_ = tensors()
    twice = (x, weight, bias, None, x, x)
    call.remember("op", (*twice, *OPTIONS), "twice")
    for _ in range(3):
        assert found(twice) == "twice"
        assert found(tensors()) == "launch"
    assert found(twice) == "twice"
    if call.TensorGuards is not None:
        monkeypatch.setattr(call, "_calls", {})
        y = torch.randn_like(x)
        assert found((y, weight, bias, None, y, y)) == "twice", "recognised without a key"
        assert found((x, weight, bias, None, y, x)) is None, "not where they are two"


def test_a_lazy_negative_is_another_call(found):
    if call.TensorGuards is not None:
        arguments = tensors()
        assert found(arguments) == "launch"
        assert call.recogniser("launch", (*arguments, *OPTIONS))(
            (torch._neg_view(arguments[0]), *arguments[1:], *OPTIONS)
        ) is None  # fmt: skip


def test_as_many_calls_as_there_is_room_for(found, monkeypatch):
    monkeypatch.setattr(call, "KEPT", 2)
    for tokens in (6, 7, 9):
        arguments = (torch.randn(tokens, 8), *tensors()[1:])
        call.remember("op", (*arguments, *OPTIONS), tokens)
        assert found(arguments) == tokens
    assert call.remembered() == 2, "two, then all were dropped, and two"
    assert found(tensors()) is None


def test_a_guard_that_overlooks_something_is_not_used(monkeypatch):
    class Blind:
        def __init__(self, *tensors, **sizes):
            pass

        def check(self, *tensors):
            return True

    assert call.guard_works()
    monkeypatch.setattr(call, "TensorGuards", Blind)
    assert not call.guard_works()
