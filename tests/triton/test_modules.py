"""CausalConv1d and ConvStatePool: parameters from elsewhere, dense and packed calls, slots and their owners."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import triton_impl
from triton_impl.modules import CausalConv1d, ConvStatePool, PoolExhausted

torch.set_num_threads(1)  # the tensors are tiny
torch.backends.cudnn.allow_tf32 = False  # nn.Conv1d is to compute in float32
DIM, WIDTH = 6, 4
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]
)


def conv1d(bias=True, device="cpu"):
    return nn.Conv1d(DIM, DIM, WIDTH, groups=DIM, padding=WIDTH - 1, bias=bias, device=device)


# The module


@DEVICES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_dense_forward_is_conv1d(activation, bias, device):
    conv = conv1d(bias, device)
    module = CausalConv1d(DIM, WIDTH, bias, activation, device=device)
    module.load_state_dict(conv.state_dict())
    assert module.weight.shape == (DIM, WIDTH)
    x = torch.randn(3, 7, DIM, device=device)
    with torch.no_grad():
        want = conv(x.transpose(1, 2))[:, :, :7].transpose(1, 2)
        torch.testing.assert_close(module(x), F.silu(want) if activation else want)
        other = CausalConv1d.from_conv1d(conv, activation)
        assert torch.equal(other(x), module(x))


def test_checkpoints_with_either_weight_shape():
    model = nn.ModuleDict({"mixer": nn.ModuleDict({"conv1d": CausalConv1d(DIM, WIDTH)})})
    weight, bias = torch.randn(DIM, WIDTH), torch.randn(DIM)
    for shape in ((DIM, WIDTH), (DIM, 1, WIDTH)):
        checkpoint = {"mixer.conv1d.weight": weight.view(shape), "mixer.conv1d.bias": bias}
        for assign in (False, True):
            model["mixer"]["conv1d"].reset_parameters()
            model.load_state_dict(checkpoint, assign=assign)
            assert torch.equal(model["mixer"]["conv1d"].weight, weight)
            assert torch.equal(model["mixer"]["conv1d"].bias, bias)
        assert checkpoint["mixer.conv1d.weight"].shape == shape
    assert model.state_dict()["mixer.conv1d.weight"].shape == (DIM, WIDTH)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(checkpoint | {"mixer.conv1d.weight": torch.randn(DIM, 2, WIDTH)})


def test_plain_parameters_survive_copies_and_casts():
    module = CausalConv1d(DIM, WIDTH)
    assert dict(module.named_parameters()).keys() == {"weight", "bias"}
    assert not dict(module.named_buffers())
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, module.weight)
    assert twin.weight is not module.weight
    twin.load_state_dict({"weight": torch.ones(DIM, 1, WIDTH), "bias": torch.zeros(DIM)})
    assert not torch.equal(twin.weight, module.weight)
    half = module.to(torch.bfloat16)
    assert half.weight.dtype == half.bias.dtype == torch.bfloat16
    with torch.no_grad():
        assert half(torch.randn(1, 3, DIM).bfloat16()).dtype == torch.bfloat16
    assert CausalConv1d(DIM, WIDTH, device="meta").weight.is_meta
    assert repr(CausalConv1d(DIM, 3, False, None)) == "CausalConv1d(6, width=3, bias=False, activation=None)"


@DEVICES
def test_autocast_gives_the_dtype_that_conv1d_gives(device):
    conv, x = conv1d(device=device), torch.randn(2, 5, DIM, device=device)
    module = CausalConv1d.from_conv1d(conv)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        out = module(x)
        assert out.dtype == conv(x.transpose(1, 2)).dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(out, module(x.bfloat16()))
        assert module(x).dtype == torch.float32


def test_every_call_goes_through_forward():
    """So that FSDP's and other hooks gather the parameters for prefill and step as well."""
    module, pool = CausalConv1d(DIM, WIDTH), ConvStatePool(2, DIM, WIDTH)
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append(len(args)))
    slots = pool.allocate(2)
    with torch.no_grad():
        module(torch.randn(1, 2, DIM))
        module.prefill(torch.randn(3, DIM), torch.tensor([0, 2, 3]), pool, slots)
        module.step(torch.randn(2, DIM), pool, slots)
    assert len(calls) == 3


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_fully_sharded(one_rank):
    """FSDP's hooks gather the sharded parameters for forward, prefill and step, and reduce their gradients."""
    from torch.distributed.fsdp import fully_shard

    module, x = CausalConv1d(DIM, WIDTH), torch.randn(2, 5, DIM)
    pool, theirs = ConvStatePool(2, DIM, WIDTH), ConvStatePool(2, DIM, WIDTH)
    slots = pool.allocate(2)
    assert theirs.allocate(2) == slots
    twin = copy.deepcopy(module)
    fully_shard(module, mesh=one_rank)
    assert isinstance(module.weight, torch.distributed.tensor.DTensor)
    with torch.no_grad():
        assert torch.equal(module(x), twin(x))
        assert torch.equal(module.prefill(x, None, pool, slots), twin.prefill(x, None, theirs, slots))
        assert torch.equal(module.step(x[:, 0], pool, slots), twin.step(x[:, 0], theirs, slots))
        assert torch.equal(pool.states, theirs.states)
    module(x).sum().backward()
    twin(x).sum().backward()
    assert torch.equal(module.weight.grad.full_tensor(), twin.weight.grad)


@DEVICES
def test_chunked_prefill_and_steps_are_one_prefill_bit_for_bit(device):
    module = CausalConv1d(DIM, WIDTH, device=device).requires_grad_(False)
    pool = ConvStatePool(6, DIM, WIDTH, layers=2, device=device, pad_slot_id=0)
    x = torch.randn(2, 9, DIM, device=device)
    want = module(x)
    slots = pool.allocate(2)
    assert slots == [1, 2]  # 0 is the padding slot
    starts = torch.tensor([0, 4, 8], device=device)
    first = module.prefill(x[:, :4].reshape(8, DIM), starts, pool, slots, layer=1, max_seqlen=4)
    goes_on = torch.ones(2, dtype=torch.bool, device=device)
    second = module.prefill(x[:, 4:7], None, pool, pool.indices(slots), goes_on, layer=1)
    third = module.step(x[:, 7], pool, slots, layer=1)
    fourth = module.step(torch.cat([x[:, 8], x[:1, 0]]), pool, pool.indices(slots, batch=3), layer=1)
    assert not fourth[2].any()  # a padding row
    got = torch.cat([first.view(2, 4, DIM), second, third[:, None], fourth[:2, None]], dim=1)
    assert torch.equal(got, want)
    assert torch.equal(pool.layer(1)[slots], x[:, -(WIDTH - 1) :])
    assert not pool.layer(0).any()
    assert not pool.layer(1)[[0, 3, 4, 5]].any()


def test_bad_modules_and_calls():
    module, x = CausalConv1d(DIM, WIDTH), torch.randn(2, 3, DIM)
    with pytest.raises(ValueError, match="width: expected 1 to 8, got 9"):
        CausalConv1d(DIM, 9)
    with pytest.raises(ValueError, match="dim"):
        CausalConv1d(0, WIDTH)
    with pytest.raises(ValueError, match="activation"):
        CausalConv1d(DIM, WIDTH, activation="relu")
    with pytest.raises(ValueError, match="conv: expected groups=6, got 1"):
        CausalConv1d.from_conv1d(nn.Conv1d(DIM, DIM, WIDTH))
    with pytest.raises(ValueError, match="conv: expected dilation"):
        CausalConv1d.from_conv1d(nn.Conv1d(DIM, DIM, WIDTH, groups=DIM, dilation=2))
    with pytest.raises(ValueError, match=r"x: expected shape .* without query_start_loc"):
        module(x[0])
    with pytest.raises(ValueError, match="has_initial_state: expected None with decode"):
        module(x[0], has_initial_state=torch.ones(3, dtype=torch.bool), decode=True)
    with pytest.raises(ValueError, match="conv_states"):
        module(x[0], decode=True)
    out = module(x, None, torch.zeros(2, WIDTH - 1, DIM))
    with pytest.raises(triton_impl.Unsupported, match="no_grad"):  # a pool is written, not differentiated
        out.sum().backward()


@DEVICES
def test_a_module_without_a_pool_trains(device):
    conv, x = conv1d(device=device), torch.randn(2, 7, DIM, device=device)
    module = CausalConv1d.from_conv1d(conv)
    conv(x.transpose(1, 2))[:, :, :7].square().sum().backward()
    module(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, conv.weight.grad.squeeze(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, conv.bias.grad, rtol=1e-4, atol=1e-5)
    module.zero_grad()
    module(x.view(14, DIM), torch.tensor([0, 7, 14], device=device)).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, conv.weight.grad.squeeze(1), rtol=1e-4, atol=1e-5)


# The pool


def test_allocation_and_its_errors():
    pool = ConvStatePool(4, DIM, WIDTH, pad_slot_id=2)
    assert (pool.num_slots, pool.num_free) == (4, 3)
    assert pool.allocate(2) == [0, 1]
    with pytest.raises(PoolExhausted, match="at most 1 slots"):
        pool.allocate(2)
    assert pool.num_free == 1  # nothing was taken
    assert pool.allocate() == [3]
    assert pool.allocate(0) == []
    with pytest.raises(ValueError, match="got 2, which is free"):
        pool.free([2])
    with pytest.raises(ValueError, match=r"in \[0, 4\), got 9"):
        pool.free([0, 9])
    with pytest.raises(ValueError, match=r"in \[0, 4\), got -1"):
        pool.reset([-1])
    with pytest.raises(ValueError, match="distinct slots, got 1 twice"):
        pool.free([1, 1])
    pool.free([1])
    with pytest.raises(ValueError, match="got 1, which is free"):
        pool.free([0, 1])
    assert pool.allocate(1) == [1]  # 0 was not freed by the refused call
    with pytest.raises(TypeError, match="host integers"):
        pool.free(torch.tensor([1]))
    with pytest.raises(TypeError):
        pool.free([1.5])
    with pytest.raises(ValueError, match="count"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="width"):
        ConvStatePool(4, DIM, 0)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("num_slots", 0, ValueError), ("num_slots", "4", TypeError), ("dim", 0, ValueError), ("dim", 8.0, TypeError),
     ("width", 0, ValueError), ("width", True, TypeError), ("layers", 0, ValueError), ("state_len", 2, ValueError),
     ("state_len", "3", TypeError), ("pad_slot_id", None, TypeError), ("layers", torch.tensor(1), TypeError)],
)  # fmt: skip
def test_sizes_of_a_pool(name, value, error):
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        ConvStatePool(**{"num_slots": 4, "dim": DIM, "width": WIDTH, name: value})


@pytest.mark.parametrize(
    ("name", "call", "error"),
    [("layer", lambda pool: pool.layer(2), ValueError), ("layer", lambda pool: pool.layer("0"), TypeError),
     ("layer", lambda pool: pool.layer(-3), ValueError), ("count", lambda pool: pool.allocate(1.0), TypeError),
     ("count", lambda pool: pool.allocate("1"), TypeError), ("slots", lambda pool: pool.free(0), TypeError),
     ("slots", lambda pool: pool.reset(["0"]), TypeError), ("sources", lambda pool: pool.copy(0, [1]), TypeError),
     ("targets", lambda pool: pool.copy([0], 1), TypeError), ("slots", lambda pool: pool.gather("01"), TypeError),
     ("batch", lambda pool: pool.indices([0], batch="2"), TypeError)],
)  # fmt: skip
def test_errors_of_a_pool_name_the_argument(name, call, error):
    pool = ConvStatePool(4, DIM, WIDTH, layers=2)
    pool.allocate(2)
    with pytest.raises(error, match=f"^{name}: expected .*, got "):
        call(pool)
    assert pool.num_free == 2


@pytest.mark.parametrize(
    ("arguments", "error"), [(("8", 4), TypeError), ((8, "4"), TypeError), ((8.0, 4), TypeError), ((0, 4), ValueError), ((8, 9), ValueError)]
)  # fmt: skip
def test_sizes_of_a_layer(arguments, error):
    with pytest.raises(error, match=r"^(dim|width): expected .*, got "):
        CausalConv1d(*arguments)


def test_what_they_are_is_shown():
    assert repr(CausalConv1d(8, 4, bias=False)) == "CausalConv1d(8, width=4, bias=False, activation='silu')"
    pool = ConvStatePool(4, 8, 3, layers=2, dtype=torch.float16)
    pool.allocate()
    assert repr(pool) == (
        "ConvStatePool(num_slots=4, dim=8, layers=2, state_len=2, dtype=torch.float16, device=cpu, free=3)"
    )


def test_windows_move_between_slots():
    pool = ConvStatePool(5, DIM, WIDTH, layers=2)
    slots = pool.allocate(4)
    pool.states.copy_(torch.randn(pool.states.shape))
    before = pool.states.clone()
    saved = pool.gather([2, 0])
    assert torch.equal(saved, before[:, [2, 0]])

    pool.copy([0, 1, 0], [1, 2, 3])  # all sources are read before a target is written
    assert torch.equal(pool.states, before[:, [0, 0, 1, 0, 4]])
    pool.scatter([2, 0], saved)
    assert torch.equal(pool.states[:, [2, 0]], saved)
    pool.reset([3])
    assert not pool.states[:, 3].any()
    assert torch.equal(pool.states[:, 4], before[:, 4])
    pool.reset([])

    with pytest.raises(ValueError, match="windows: expected shape"):
        pool.scatter([1], saved)
    with pytest.raises(ValueError, match="targets: expected 1 slots"):
        pool.copy([0], [1, 2])
    with pytest.raises(ValueError, match="sources: expected allocated slots, got 4"):
        pool.copy([4], [1])
    with pytest.raises(ValueError, match="targets: expected distinct"):
        pool.copy([0, 1], [2, 2])
    pool.free(slots)
    with pytest.raises(ValueError, match="allocated"):
        pool.gather([0])


def test_indices_are_padded():
    pool = ConvStatePool(5, DIM, WIDTH, pad_slot_id=-1)
    pool.allocate(3)
    indices = pool.indices([2, 0], batch=4)
    assert indices.dtype == torch.int32
    assert indices.tolist() == [2, 0, -1, -1]
    assert pool.indices([1]).tolist() == [1]
    with pytest.raises(ValueError, match="batch"):
        pool.indices([0, 1], batch=1)
    with pytest.raises(ValueError, match="4, which is free"):
        pool.indices([4])


def test_a_random_life_keeps_owners_apart():
    """No slot has two owners, none is lost, against a plain set."""
    pool, draw, owned = ConvStatePool(16, 1, 2, pad_slot_id=5), random.Random(0), set()
    for _ in range(2000):
        if draw.random() < 0.5:
            count = draw.randint(0, 4)
            if count > 15 - len(owned):
                with pytest.raises(PoolExhausted):
                    pool.allocate(count)
            else:
                slots = set(pool.allocate(count))
                assert len(slots) == count
                assert not slots & (owned | {5})
                owned |= slots
        elif owned:
            gone = draw.sample(sorted(owned), draw.randint(1, len(owned)))
            pool.free(gone)
            owned -= set(gone)
        assert pool.num_free == 15 - len(owned)
