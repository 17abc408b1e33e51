"""What engines pass to their own causal conv1d functions, as data: one entry for every kind of call.

Read from the sources of the versions named. Shapes are small; what matters is which arguments come, in which layout,
how long buffers are beyond the batch, and what they hold there. `trimmed` names the arguments that are longer than the
batch, and how many entries count: the call with those alone must give the same bits.
"""

from typing import NamedTuple

import torch

DIM, WIDTH, SLOTS = 10, 4, 9


class Call(NamedTuple):
    """One call.

    Attributes:
      engine: name and version.
      kind: what the engine is doing.
      function: "module:function" in triton_impl.compat.
      arguments: {name: specification}, see `make`.
      trimmed: {name: entries that count}.
      written: names of the arguments that the call may write.
    """

    engine: str
    kind: str
    function: str
    arguments: dict
    trimmed: dict = {}  # noqa: RUF012
    written: tuple = ("conv_states", "conv_state")


def floats(*shape, order=None, wide=0):
    """A bfloat16 tensor; `order` permutes the axes of the memory, `wide` more channels lie behind its last axis."""
    return ("floats", shape, order, wide)


def ints(*values, dtype=torch.int32):
    return ("ints", values, dtype)


def flags(*values):
    return ("ints", values, torch.bool)


def make(specification, device, seed):
    """The tensor or host value of a specification, the same on every device."""
    if (
        not isinstance(specification, tuple)
        or not specification
        or specification[0] not in ("floats", "ints")
    ):
        return specification
    kind, values, *rest = specification
    if kind == "ints":
        return torch.tensor(values, dtype=rest[0]).to(device)
    order, wide = rest
    shape = values if order is None else [values[axis] for axis in order]
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(*shape[:-1], shape[-1] + wide, generator=generator).bfloat16().to(device)
    tensor = memory[..., : shape[-1]]
    if order is None:
        return tensor
    return tensor.permute([order.index(axis) for axis in range(len(order))])


def arguments(call, device, trim=False):
    """The arguments of a call; with `trim`, without the entries that do not count."""
    made = {}
    for seed, (name, specification) in enumerate(call.arguments.items()):
        made[name] = make(specification, device, seed)
        if trim and name in call.trimmed:
            made[name] = made[name][: call.trimmed[name]]
    return made


WEIGHTS = dict(weight=floats(DIM, WIDTH), bias=floats(DIM))
POOL = floats(SLOTS, DIM, WIDTH - 1, order=(0, 2, 1))  # channels have unit stride
ROLLING = floats(SLOTS, DIM, WIDTH - 1 + 2, order=(0, 2, 1))
TABLE = ints((1, 5, 0), (2, 6, 8), dtype=torch.int32)
PROJECTED = floats(DIM, 9, order=(1, 0), wide=6)  # [dim, tokens], a slice of a wider token-major projection

SGLANG, VLLM, VLLM_BLOCKS = "SGLang 0.5.23", "vLLM 0.33.0", "vLLM 0.32.0"
AITER, TRANSFORMERS, FLA = "aiter 0e1be2b", "transformers 5.24.0", "FLA 0.6.0"
PREFILL = dict(conv_states=POOL, activation="silu", query_start_loc=ints(0, 4, 5, 9))
FRESH = flags(True, False, True)

CALLS = [
    Call(SGLANG, "prefill", "sglang:causal_conv1d_fn", dict(
        x=PROJECTED, **WEIGHTS, **PREFILL, has_initial_state=FRESH, cache_indices=ints(3, 0, 5), seq_lens_cpu=[4, 1, 4],
    )),
    Call(SGLANG, "prefill of KDA in a captured graph: block table, padded rows and tokens", "sglang:causal_conv1d_fn_triton", dict(
        x=PROJECTED, **WEIGHTS, **PREFILL | dict(query_start_loc=ints(0, 4, 7, 7, 7)), seq_lens_cpu=None,
        has_initial_state=flags(True, False, False, False, False), cache_indices=ints(3, 0, -1, -1, -1),
        block_table=("ints", ((0, 0), (1, 0), (-1, -1)), torch.int32),
    ), dict(query_start_loc=3, cache_indices=2, has_initial_state=2)),
    Call(SGLANG, "prefill in place, channel-first", "sglang:causal_conv1d_fn", dict(
        x=floats(DIM, 9), **WEIGHTS, **PREFILL, has_initial_state=FRESH, cache_indices=ints(3, 0, 5, -1),
    ), dict(cache_indices=3), ("conv_states", "x")),
    Call(SGLANG, "prefill of an idle data-parallel rank", "sglang:causal_conv1d_fn", dict(
        x=floats(DIM, 0, order=(1, 0)), **WEIGHTS, conv_states=POOL, activation="silu", query_start_loc=ints(0),
        cache_indices=ints(-1, -1), has_initial_state=flags(False, False), seq_lens_cpu=[],
    ), dict(cache_indices=0, has_initial_state=0)),
    Call(SGLANG, "decode", "sglang:causal_conv1d_update_triton", dict(
        x=floats(3, DIM, wide=6), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, 0, 5),
    )),
    Call(SGLANG, "captured decode: buffers of the largest batch", "sglang:causal_conv1d_update_triton", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu",
        conv_state_indices=ints(3, -1, 5, 7, 2, dtype=torch.int64), intermediate_state_indices=ints(0, 1, 2, 3, 4),
    ), dict(conv_state_indices=3, intermediate_state_indices=3)),
    Call(SGLANG, "decode of the dispatcher", "sglang:causal_conv1d_update", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, -1, 5, 7),
    ), dict(conv_state_indices=3), ("conv_state", "x")),
    Call(SGLANG, "decode of the registered CUDA kernel", "sglang:causal_conv1d_update_cuda", dict(
        x=floats(3, DIM, 1), conv_state=POOL, weight=floats(DIM, WIDTH), bias_=None, silu_activation=True,
        cache_seqlens=None, conv_state_indices=ints(3, -1, 5, 7), pad_slot_id=-1,
    ), dict(conv_state_indices=3), ("conv_state", "x")),
    Call(SGLANG, "decode of an idle data-parallel rank", "sglang:causal_conv1d_update_triton", dict(
        x=floats(0, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(-1, -1),
    ), dict(conv_state_indices=0)),
    Call(SGLANG, "verification of a chain of drafts", "sglang:causal_conv1d_update_triton", dict(
        x=floats(2, DIM, 3, order=(0, 2, 1)), conv_state=POOL, **WEIGHTS, activation="silu",
        conv_state_indices=ints(3, 5, -1), intermediate_conv_window=floats(6, 3, DIM, WIDTH - 1),
        intermediate_state_indices=ints(4, 1, 2), retrieve_next_token=None, retrieve_next_sibling=None,
        retrieve_parent_token=None,
    ), dict(conv_state_indices=2, intermediate_state_indices=2), ("conv_state", "intermediate_conv_window")),
    Call(SGLANG, "verification of a tree of drafts", "sglang:causal_conv1d_update_triton", dict(
        x=floats(2, DIM, 4, order=(0, 2, 1)), conv_state=POOL, **WEIGHTS, activation="silu",
        conv_state_indices=ints(3, 5, -1), intermediate_conv_window=floats(6, 4, DIM, WIDTH - 1),
        intermediate_state_indices=ints(4, 1, 2),
        retrieve_next_token=ints((1, 3, -1, -1), (1, 2, 3, -1), (-1, -1, -1, -1), dtype=torch.int64),
        retrieve_next_sibling=ints((-1, 2, -1, -1), (-1, -1, -1, -1), (-1, -1, -1, -1), dtype=torch.int64),
        retrieve_parent_token=ints((7, 7, 7, 7), (7, 7, 7, 7), (7, 7, 7, 7), dtype=torch.int64),
    ), dict(conv_state_indices=2, intermediate_state_indices=2, retrieve_next_token=2, retrieve_next_sibling=2,
            retrieve_parent_token=2), ("conv_state", "intermediate_conv_window", "retrieve_parent_token")),
    Call(SGLANG, "a decode that is handed a parents' buffer and no tree", "sglang:causal_conv1d_update_triton", dict(
        x=floats(2, DIM), conv_state=POOL, **WEIGHTS, conv_state_indices=ints(3, 5), validate_data=True,
        intermediate_state_indices=ints(0, 1), retrieve_parent_token=ints((7,), (7,), dtype=torch.int64),
    )),
    Call(VLLM, "prefill of Mamba2 and GDN", "vllm:causal_conv1d_fn", dict(
        x=PROJECTED, **WEIGHTS, **PREFILL, has_initial_state=FRESH, cache_indices=ints(3, 1, 5), metadata=None,
    )),
    Call(VLLM, "prefill with padded slots", "vllm:causal_conv1d_fn", dict(
        x=PROJECTED, **WEIGHTS, **PREFILL, has_initial_state=flags(True, False, True, False),
        cache_indices=ints(3, 1, 5, 0, 0), validate_data=True,
    ), dict(cache_indices=3, has_initial_state=3)),
    Call(VLLM, "prefill of Mamba1, channel-first", "vllm:causal_conv1d_fn", dict(
        x=floats(DIM, 9), **WEIGHTS, **PREFILL, has_initial_state=FRESH, cache_indices=ints(3, 1, 5),
    )),
    Call(VLLM, "decode of GDN", "vllm:causal_conv1d_update", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, 0, 5),
        validate_data=True,
    ), {}, ("conv_state", "x")),
    Call(VLLM, "captured decode: slots of the largest batch", "vllm:causal_conv1d_update", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, 0, 5, 0, 0),
        validate_data=True,
    ), dict(conv_state_indices=3), ("conv_state", "x")),
    Call(VLLM, "decode of Mamba2: a table of slots", "vllm:causal_conv1d_update", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints((3,), (0,), (5,)),
        num_accepted_tokens=None, query_start_loc=None, max_query_len=1,
    ), {}, ("conv_state", "x")),
    Call(VLLM, "decode to another tensor", "vllm:causal_conv1d_update", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, 0, 5),
        out=floats(3, DIM),
    ), {}, ("conv_state", "out")),
    Call(VLLM, "speculative decode of GDN: slots cut, offsets and counts not", "vllm:causal_conv1d_update", dict(
        x=floats(6, DIM), conv_state=ROLLING, **WEIGHTS, activation="silu", conv_state_indices=ints(3, 5),
        num_accepted_tokens=ints(2, 1, 1, 1), query_start_loc=ints(0, 3, 6, 6, 6), max_query_len=3,
        validate_data=False,
    ), dict(num_accepted_tokens=2, query_start_loc=3), ("conv_state", "x")),
    Call(VLLM, "speculative decode of Mamba2: a table of slots", "vllm:causal_conv1d_update", dict(
        x=floats(5, DIM), conv_state=ROLLING, **WEIGHTS, activation="silu",
        conv_state_indices=ints((3, 4, 1), (5, 6, 7), (0, 0, 0)), num_accepted_tokens=ints(3, 1, 1),
        query_start_loc=ints(0, 3, 5, 5), max_query_len=3,
    ), dict(conv_state_indices=2, num_accepted_tokens=2, query_start_loc=3), ("conv_state", "x")),
    Call(VLLM, "decode of an idle data-parallel rank", "vllm:causal_conv1d_update", dict(
        x=floats(0, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(0, 0),
    ), dict(conv_state_indices=0), ("conv_state", "x")),
    Call(VLLM_BLOCKS, "prefill with a slot for every block", "vllm:causal_conv1d_fn_blocks", dict(
        x=PROJECTED, **WEIGHTS, **PREFILL | dict(query_start_loc=ints(0, 4, 9)), has_initial_state=flags(True, False),
        cache_indices=TABLE, block_idx_first_scheduled_token=ints(0, 0), block_idx_last_scheduled_token=ints(1, 1),
        initial_state_idx=ints(0, 0), num_computed_tokens=ints(3, 0), block_size_to_align=4, metadata=None,
    )),
    Call(VLLM_BLOCKS, "decode with a slot for every block", "vllm:causal_conv1d_update_blocks", dict(
        x=floats(2, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=TABLE,
        block_idx_last_scheduled_token=ints(1, 1), initial_state_idx=ints(0, 1), validate_data=True,
    ), {}, ("conv_state", "x")),
    Call(AITER, "prefill", "aiter:causal_conv1d_fn", dict(
        x=PROJECTED, **WEIGHTS, **PREFILL, has_initial_state=FRESH, cache_indices=ints(3, 0, 5, -1),
        seq_lens_cpu=[4, 1, 4], validate_data=True,
    ), dict(cache_indices=3)),
    Call(AITER, "decode", "aiter:causal_conv1d_update", dict(
        x=floats(3, DIM), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, -1, 5, -1),
    ), dict(conv_state_indices=3), ("conv_state", "x")),
    Call(AITER, "drafts: windows by slot", "aiter:causal_conv1d_update", dict(
        x=floats(2, DIM, 3, order=(0, 2, 1)), conv_state=POOL, **WEIGHTS, activation="silu",
        conv_state_indices=ints(3, 5, -1), intermediate_conv_window=floats(SLOTS, 3, DIM, WIDTH - 1),
    ), dict(conv_state_indices=2), ("conv_state", "x", "intermediate_conv_window")),
    Call(AITER, "decode of one token", "aiter:causal_conv1d_update_single_token", dict(
        x=floats(3, DIM, 1), conv_state=POOL, **WEIGHTS, activation="silu", conv_state_indices=ints(3, -1, 5, -1),
        validate_data=True,
    ), dict(conv_state_indices=3), ("conv_state", "x")),
    Call(TRANSFORMERS, "prefill, channel-first", "causal_conv1d:causal_conv1d_fn", dict(
        x=floats(2, DIM, 7), **WEIGHTS, activation="silu", seq_idx=None,
    )),
    Call(TRANSFORMERS, "prefill of a transposed projection with packed sequences", "causal_conv1d:causal_conv1d_fn", dict(
        x=floats(1, DIM, 7, order=(0, 2, 1), wide=6), **WEIGHTS, activation="silu", seq_idx=ints((0, 0, 0, 1, 1, 2, 2)),
    )),
    Call(TRANSFORMERS, "decode", "causal_conv1d:causal_conv1d_update", dict(
        x=floats(2, DIM, 1), conv_state=floats(2, DIM, WIDTH), **WEIGHTS, activation="silu",
    )),
    Call(FLA, "prefill of packed sequences with a cache", "fla:causal_conv1d", dict(
        x=floats(1, 9, DIM, wide=6), **WEIGHTS, initial_state=floats(3, DIM, WIDTH), output_final_state=True,
        activation="silu", backend="triton", cu_seqlens=ints(0, 4, 5, 9, dtype=torch.int64), chunk_indices=None,
        seq_idx=None, past_key_values=None,
    ), {}, ()),
    Call(FLA, "prefill of heads", "fla:causal_conv1d", dict(
        x=floats(2, 5, 2, DIM // 2), **WEIGHTS, residual=floats(2, 5, 2, DIM // 2), activation="silu",
    ), {}, ()),
    Call(FLA, "decode", "fla:causal_conv1d_update", dict(
        x=floats(3, 1, DIM), cache=floats(3, DIM, WIDTH), residual=None, **WEIGHTS, activation="silu",
    ), {}, ("cache",)),
    Call(FLA, "decode of packed heads", "fla:causal_conv1d_update", dict(
        x=floats(1, 3, 2, DIM // 2), cache=floats(3, DIM, WIDTH), residual=None, **WEIGHTS, activation="silu",
    ), {}, ("cache",)),
]  # fmt: skip
