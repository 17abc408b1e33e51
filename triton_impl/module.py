"""The former place of `triton_impl.modules.CausalConv1d`."""

from triton_impl.modules.conv import CausalConv1d

__all__ = ["CausalConv1d"]
