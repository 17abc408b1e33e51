"""Every operator of the package under PyTorch's own check, whatever it is called: what it mutates, its fake kernel, dynamic shapes."""

import pytest
import torch

import triton_impl  # noqa: F401  (it defines the operators)
from oracle.contract import FnCall, UpdateCall
from oracle.contract_prologue import GatedConvFnCall, GatedConvUpdateCall, PrologueFnCall, PrologueUpdateCall
from triton_impl.packed_rows import document_marks

torch.set_num_threads(1)  # the tensors are tiny
OPERATORS = sorted(
    name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("twinconv::")
)
DIM, WIDTH, BATCH, STEPS, TOKENS, SLOTS = 32, 4, 3, 2, 10, 8
DEFAULTS = {}
for record in (FnCall, UpdateCall, PrologueFnCall, PrologueUpdateCall, GatedConvFnCall, GatedConvUpdateCall):
    DEFAULTS |= record._field_defaults
HEADS = dict(num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8)


def values(name):
    """What the arguments of an operator may be, by name; 32 channels are two heads of 8 for q and k and two for v."""
    leading = (BATCH, STEPS) if "_update" in name else (TOKENS,)

    def normal(*shape):
        return torch.randn(*leading, *shape)

    found = dict(
        x=normal(DIM), bcx=normal(3 * DIM), dout=normal(DIM), weight=torch.randn(DIM, WIDTH), bias=torch.randn(DIM),
        conv_states=torch.randn(SLOTS, WIDTH - 1, DIM), window_out=torch.randn(BATCH, STEPS, WIDTH - 1, DIM),
        initial_states=torch.randn(BATCH, WIDTH - 1, DIM), dfinal_states=torch.randn(BATCH, WIDTH - 1, DIM),
        cache_indices=torch.tensor([2, -1, 5]), accepted_steps=torch.tensor([1, -1, 0]),
        dq=normal(1, 8), dk=normal(1, 8), dv=normal(2, 8), dg=normal(2), dbeta=normal(2),
        a=normal(2), b=normal(2), A_log=torch.randn(2), dt_bias=torch.randn(2),
        need_sums=True, need_initial=True, need_dx=True, document_marks=None, **HEADS,
    )  # fmt: skip
    if "_update" not in name:
        found |= dict(query_start_loc=torch.tensor([0, 3, 3, 9], dtype=torch.int32))
        found |= dict(has_initial_state=torch.tensor([True, False, True]))
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    operator, given = getattr(torch.ops.twinconv, name).default, values(name)
    arguments = [
        given[a.name] if a.name in given else DEFAULTS[a.name] for a in operator._schema.arguments
    ]  # an argument that is new here is a KeyError
    assert set(torch.library.opcheck(operator, tuple(arguments)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["causal_conv1d_forward", "causal_conv1d_backward"])
def test_opcheck_with_documents(name):
    """Which dense rows have, and no final states."""
    operator, given = getattr(torch.ops.twinconv, name).default, values(name)
    ids = torch.tensor([[0] * 5 + [1] * 6]).repeat(BATCH, 1)
    given |= dict(
        x=torch.randn(BATCH, 11, DIM), dout=torch.randn(BATCH, 11, DIM), dfinal_states=None,
        query_start_loc=None, document_marks=document_marks(ids),
    )  # fmt: skip
    arguments = [given[a.name] if a.name in given else DEFAULTS[a.name] for a in operator._schema.arguments]
    assert set(torch.library.opcheck(operator, tuple(arguments)).values()) == {"SUCCESS"}


def test_drafts_are_among_them():
    """They mutate no pool: what a draft leaves are its results, and windows where these are asked for."""
    drafts = [name for name in OPERATORS if "_draft" in name]
    assert len(drafts) == 6
    for name in drafts:
        schema = getattr(torch.ops.twinconv, name).default._schema
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert written == (["window_out"] if name.endswith("_windows") else [])
