"""A call as everything below the public operations takes it: its arrays, a pytree, and what is static in it."""

from typing import Any, NamedTuple

from pallas_impl.config import PrefillConfig, UpdateConfig


class Arrays(NamedTuple):
    """The arrays of a call under the contract's names; None where absent."""

    x: Any = None
    weight: Any = None
    bias: Any = None
    conv_states: Any = None
    query_start_loc: Any = None
    cache_indices: Any = None
    has_initial_state: Any = None
    num_accepted_tokens: Any = None
    cache_seqlens: Any = None
    write_indices: Any = None
    snapshot_indices: Any = None
    num_computed_tokens: Any = None
    track_indices: Any = None
    track_lengths: Any = None
    window_out: Any = None
    window_indices: Any = None
    tree_parents: Any = None
    residual: Any = None
    accepted_steps: Any = None

    def named(self, *names):
        """{name: array} of these."""
        return {name: getattr(self, name) for name in names}


class Options(NamedTuple):
    """What is static in a call.

    Attributes:
      silu, pad_slot_id, state_layout, snapshot_block_size, split_sizes, commit: of the call.
      always_state: every live row has a state (an update).
      apply_empty: rows of zero tokens apply the rule of the state.
      channel: the first channel of x that is read.
      kernel: which one runs an update: see `config.kernel_of`; "" for a prefill; None: plain jax.numpy runs the call.
      config: block sizes of the kernels "" and "token".
      block_d: channels of a tile in the other kernels.
      seqlen: tokens of every row; not used with `query_start_loc`.
      own_state: the prefill kernel stores the new states itself.
      interpret: False; True, or the parameters of Pallas' GPU interpreter.
    """

    silu: bool = False
    pad_slot_id: int = -1
    always_state: bool = False
    state_layout: str = "front"
    apply_empty: bool = False
    snapshot_block_size: int | None = None
    channel: int = 0
    split_sizes: tuple[int, ...] | None = None
    commit: bool = True
    kernel: str | None = None
    config: PrefillConfig | UpdateConfig | None = None
    block_d: int = 128
    seqlen: int | None = None
    own_state: bool = True
    interpret: Any = False
