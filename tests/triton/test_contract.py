"""The contract on torch's own objects: sizes of traced graphs, tensors as host integers, views of one storage."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from oracle.contract import FnCall, Memory, RowsCall, UpdateCall, check_memory, normalised


class Traced:
    """Makes fake tensors whose first sizes are symbols, and says which guards were installed."""

    def __init__(self):
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)

    def __call__(self, *shape, symbols=1, dtype=torch.float32):
        kinds = [DimDynamic.DYNAMIC if i < symbols else DimDynamic.STATIC for i in range(len(shape))]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return self.mode.from_tensor(torch.zeros(shape, dtype=dtype), symbolic_context=context)

    @property
    def guards(self):
        return [str(guard.expr) for guard in self.env.guards]


def test_a_prefill_is_guarded_by_equal_sizes_alone():
    fake = Traced()
    x, starts, slots = fake(33, 64), fake(6, dtype=torch.int32), fake(5, dtype=torch.int32)
    weight, pool = fake(64, 4, symbols=0), fake(8, 6, 64, symbols=2)
    call = FnCall(x, weight, None, pool, starts, slots, max_seqlen=x.shape[0], residual=x)
    sizes = call.check()
    assert isinstance(sizes.tokens, torch.SymInt)
    assert normalised(call).max_seqlen is call.max_seqlen
    assert len(fake.guards) == 1  # slots and offsets
    assert fake.guards[0].startswith("Eq(")


def test_a_decode_step_and_the_differentiable_form_have_no_guard():
    fake = Traced()
    weight, pool = fake(64, 4, symbols=0), fake(8, 6, 64)
    UpdateCall(fake(5, 64), weight, None, pool).check()
    UpdateCall(fake(5, 3, 64, symbols=2), weight, None, pool, window_out=fake(7, 9, 3, 64, symbols=2)).check()
    starts = fake(6, dtype=torch.int32)
    UpdateCall(fake(9, 64), weight, None, pool, query_start_loc=starts, max_seqlen=starts.shape[0]).check()
    RowsCall(fake(5, 3, 64, symbols=2), weight).check()
    assert fake.guards == []


def test_a_size_that_only_data_knows_passes():
    fake = Traced()
    tokens = fake.env.create_unbacked_symint()
    with fake.mode:
        x = torch.empty(tokens, 64)
    call = FnCall(x, fake(64, 4, symbols=0), None, None, fake(6, dtype=torch.int32), max_seqlen=tokens)
    assert str(call.check().tokens) == str(tokens)
    assert fake.guards == []


@pytest.mark.parametrize("name", ["pad_slot_id", "max_seqlen", "channel_offset"])
def test_a_tensor_is_no_host_integer_and_is_not_read(name):
    """A meta tensor has no data: reading or printing its value would fail."""
    x, weight, starts = torch.zeros(4, 8), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int32)
    for value in (torch.tensor(-1), torch.tensor(-1, device="meta"), torch.nn.Parameter(torch.zeros(()))):
        with pytest.raises(
            TypeError, match=rf"^{name}: expected an integer known on the host, got torch\.\w+$"
        ):
            FnCall(x, weight, None, None, starts, **{name: value}).check()


def test_views_of_one_storage_are_refused():
    def where(t):
        return Memory(t.device, t.data_ptr(), t.element_size(), t.shape, t.stride())

    pool, weight, starts = torch.zeros(5, 3, 8), torch.zeros(8, 4), torch.zeros(2, dtype=torch.int32)
    check_memory(FnCall(torch.zeros(4, 8), weight, None, pool, starts), where)
    with pytest.raises(
        ValueError, match=r"^x: expected memory of its own, since the call updates conv_states"
    ):
        check_memory(FnCall(pool[1], weight, None, pool, starts), where)
    with pytest.raises(ValueError, match=r"^conv_states: expected elements that share no memory"):
        check_memory(FnCall(torch.zeros(4, 8), weight, None, pool[:1].expand(5, 3, 8), starts), where)
