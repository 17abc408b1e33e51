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
    a: Any = None
    b: Any = None
    A_log: Any = None
    dt_bias: Any = None
    document_marks: Any = (
        None  # not the contract's: where documents begin inside rows, see `rows.document_marks`
    )

    def named(self, *names):
        """{name: array} of these."""
        return {name: getattr(self, name) for name in names}


class Heads(NamedTuple):
    """What is static in a prologue of the gated delta rule.

    Attributes:
      num_k_heads, num_v_heads, head_k_dim, head_v_dim: of q and k, and of v.
      norm: whether q and k are normed; eps: inside the root; q_scale: of q, behind the norm.
      storage: the convolution's results are rounded to x's dtype before the norm.
      lower_bound: of the gate g, or None.
      round_beta: beta is rounded to b's dtype.
    """

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    norm: bool = True
    eps: float = 1e-6
    q_scale: float = 1.0
    storage: bool = True
    lower_bound: float | None = None
    round_beta: bool = False

    # Whether anything is done with what was convolved.
    changes = property(lambda self: self.norm or self.q_scale != 1.0)
    sizes = property(
        lambda self: (
            self.num_k_heads * self.head_k_dim,
            self.num_k_heads * self.head_k_dim,
            self.num_v_heads * self.head_v_dim,
        )
    )


class Share(NamedTuple):
    """Which gates a program computes: its share of those of tokens `first` to `first + count - 1`.

    Attributes:
      column, columns: which of the programs with these tokens it is.
      most: tokens at most, static.
      live: whether the tokens have gates; else they are zero.
    """

    first: Any
    count: Any
    column: Any
    columns: int
    most: int
    live: Any


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
      heads: of a prologue.
      gates: the first channels of B and C in x, of a gated short convolution.
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
    heads: Heads | None = None
    gates: tuple[int, int] | None = None
    interpret: Any = False
