"""The contract of `short_conv`, the operation as models call it: dense rows, a cache beside them, any usual layout.

Standard library only. The value is that of `causal_conv1d`: documents are rows of their own, padding ends its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from oracle.contract_checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    WIDTH_MAX,
    WIDTH_MIN,
    below,
    check_activation,
    check_array,
    check_choice,
    check_dtype,
    check_flag,
    check_shape,
    shape_of,
)

WEIGHT_LAYOUTS = ("dim_width", "width_dim", "torch", "flax")
CACHE_LAYOUTS = ("time", "channels")


class ShortConvSizes(NamedTuple):
    """Sizes of a checked `short_conv` call; `batch` is None without that axis, `columns` those of the cache."""

    batch: int | None
    seqlen: int
    dim: int
    width: int
    columns: int


class ShortConvCall(NamedTuple):
    """A call of `short_conv`.

    Attributes:
      x: [batch, seqlen, dim], or [seqlen, dim] and then no array has the batch axis; float32, float16 or bfloat16.
      weight: float, in `weight_layout`; width 1..8.
      bias: [dim] float, or None.
      cache: the last inputs before x, float, oldest first, in `cache_layout`: width-1 of them, or width; None: zeros.
      segment_ids: [batch, seqlen] integer, or None. A document is a run of equal ids: none sees another, and an id that
        comes back is a new one. The cache belongs to the first document, the new cache to the last.
      lengths: [batch] integer, or None: what is behind the first so many tokens is padding. Its outputs are zero, it has
        no gradient, and the new cache ends before it. Clamped to [0, seqlen] where only the device knows them.
      weight_layout: "dim_width" [dim, width], "width_dim" [width, dim], "torch" [dim, 1, width] or "flax" [width, 1, dim].
      cache_layout: "time" [batch, columns, dim] or "channels" [batch, dim, columns].
      want_cache: False: no new cache is made.
      activation: None, "silu" or "swish".
      backend: "auto" or a name of the implementation.
    """

    x: Any
    weight: Any
    bias: Any = None
    cache: Any = None
    segment_ids: Any = None
    lengths: Any = None
    weight_layout: Any = "dim_width"
    cache_layout: Any = "time"
    want_cache: Any = True
    activation: Any = None
    backend: Any = "auto"

    def check(self) -> ShortConvSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        shape = shape_of("x", self.x)
        if len(shape) not in (2, 3) or below(shape[-1], 1):
            raise ValueError(
                f"x: expected shape [batch, seqlen, dim] or [seqlen, dim] with dim >= 1, got {list(shape)}"
            )
        check_dtype("x", self.x, FLOAT_DTYPES)
        *batch, seqlen, dim = shape
        axes = ("batch",) * len(batch)
        width = self._check_weight(dim)
        if self.bias is not None:
            check_array("bias", self.bias, ("dim",), FLOAT_DTYPES, (dim,))
        check_choice("cache_layout", self.cache_layout, CACHE_LAYOUTS)
        columns = width - 1
        if self.cache is not None:
            time = self.cache_layout == "time"
            last = ("columns", "dim") if time else ("dim", "columns")
            sizes = (*batch, None, dim) if time else (*batch, dim, None)
            got = check_array("cache", self.cache, (*axes, *last), FLOAT_DTYPES, sizes)
            columns = got[-2 if time else -1]
            if columns not in (width - 1, width):
                raise ValueError(
                    f"cache: expected width-1 = {width - 1} or width = {width} columns in cache_layout "
                    f"{self.cache_layout!r}, got {columns} of shape {list(got)}"
                )
        if self.segment_ids is not None:
            check_array("segment_ids", self.segment_ids, (*axes, "seqlen"), INDEX_DTYPES, (*batch, seqlen))
        if self.lengths is not None:
            check_array("lengths", self.lengths, axes, INDEX_DTYPES, tuple(batch))
            if self.segment_ids is not None:
                raise ValueError(
                    "lengths: expected None, since segment_ids is given (padding may be a document of its own)"
                )
        check_flag("want_cache", self.want_cache)
        check_activation(self.activation)
        return ShortConvSizes(batch[0] if batch else None, seqlen, dim, width, columns)

    def _check_weight(self, dim: Any) -> Any:
        """Returns the width."""
        check_choice("weight_layout", self.weight_layout, WEIGHT_LAYOUTS)
        axes = {"dim_width": ("dim", "width"), "width_dim": ("width", "dim"),
                "torch": ("dim", "1", "width"), "flax": ("width", "1", "dim")}[self.weight_layout]  # fmt: skip
        sizes = tuple({"dim": dim, "1": 1}.get(axis) for axis in axes)
        hint = f" (weight_layout is {self.weight_layout!r})"
        shape = check_shape("weight", self.weight, axes, sizes, hint)
        check_dtype("weight", self.weight, FLOAT_DTYPES)
        width = shape[axes.index("width")]
        if below(width, WIDTH_MIN) or below(WIDTH_MAX, width):
            raise ValueError(
                f"weight: expected width {WIDTH_MIN} to {WIDTH_MAX} on axis {axes.index('width')}, got {width}"
            )
        return width


def check_lengths(lengths: Sequence[int], seqlen: int) -> None:
    """Raises ValueError unless lengths that the host knows lie in [0, seqlen]."""
    for row, length in enumerate(lengths):
        if not 0 <= length <= seqlen:
            raise ValueError(f"lengths: expected 0 to seqlen = {seqlen}, got {length} in row {row}")
