"""The layers that transformers asks a kernel of the hub for, with the signatures of its own functions (5.24)."""

from torch import nn

from triton_impl.compat import causal_conv1d as interface


class causal_conv1d_fn(nn.Module):
    """A convolution of whole sequences, with gradients."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states, weight, bias=None, activation=None, **kwargs):
        """As `causal_conv1d_fn` of causal-conv1d.

        Args:
          hidden_states: [batch, dim, seqlen], any strides.
          weight, bias: [dim, width]; [dim] or None.
          activation: None, "silu" or "swish".
          kwargs: `seq_idx` [batch, seqlen] keeps packed sequences apart; whatever else a model was called with is
            ignored, as transformers' own function does.

        Returns:
          [batch, dim, seqlen] in the dtype of hidden_states.
        """
        return interface.causal_conv1d_fn(
            hidden_states, weight, bias, kwargs.get("seq_idx"), activation=activation
        )


class causal_conv1d_update(nn.Module):
    """A decode step; `conv_state` is updated in place."""

    can_torch_compile = True
    has_backward = False

    def forward(self, hidden_states, conv_state, weight, bias=None, activation=None):
        """As `causal_conv1d_update` of causal-conv1d.

        Args:
          hidden_states: [batch, dim, seqlen].
          conv_state: [batch, dim, state_len], state_len >= width-1, the window in its last columns.
          weight, bias, activation: as in `causal_conv1d_fn`.

        Returns:
          [batch, dim, seqlen] in the dtype of hidden_states.
        """
        return interface.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
