"""Causal depthwise conv1d for serving engines: Pallas Mosaic GPU kernels for JAX.

`causal_conv1d_fn` runs packed prefills, `causal_conv1d_update` decode steps; both keep the conv states
of all sequences in a pool addressed by slot. `commit_windows` and `tree_parents_from_links` serve speculative
decoding. `gated_delta_prologue_fn` and `_update` are the front of a linear-attention layer in one launch: convolution, split
into q, k and v, L2 norm, gates. `causal_conv1d` is the differentiable form, for training; `short_conv` the same as models call it, with a cache,
documents, padding and any usual layout.
The contract is in `oracle.contract`.
"""

try:
    from oracle import __version__
    from oracle.contract import ConvOutput, ConvWindowOutput, Unsupported
    from oracle.contract_prologue import PrologueOutput, PrologueWindowOutput
except ImportError as error:
    import sys

    _found = getattr(sys.modules.get("oracle"), "__file__", None)
    raise ImportError(
        "pallas_impl needs the package oracle, which is installed with it, but `import oracle` "
        + (f"finds {_found}, which hides it; rename that file" if _found else "finds none")
    ) from error

from pallas_impl.api import (
    causal_conv1d_fn,
    causal_conv1d_update,
    commit_windows,
    gated_delta_prologue_fn,
    gated_delta_prologue_update,
    gated_short_conv_fn,
    gated_short_conv_update,
    tree_parents_from_links,
)
from pallas_impl.functional import causal_conv1d
from pallas_impl.functional_prologue import gated_delta_prologue, gated_short_conv
from pallas_impl.short_conv import short_conv

__all__ = [
    "ConvOutput",
    "ConvWindowOutput",
    "PrologueOutput",
    "PrologueWindowOutput",
    "Unsupported",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "commit_windows",
    "gated_delta_prologue",
    "gated_delta_prologue_fn",
    "gated_delta_prologue_update",
    "gated_short_conv",
    "gated_short_conv_fn",
    "gated_short_conv_update",
    "short_conv",
    "tree_parents_from_links",
]
