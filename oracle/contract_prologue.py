"""The contract of the fused front of a linear-attention layer, and of LFM2's gated short convolution.

Standard library only, as `oracle.contract`, whose rules hold here: pools, rows, slots, offsets, windows, data out of
range, host integers and memory are those of the plain convolution inside, `convolution()` of each record.

The prologue of the gated delta rule (`gated_delta_prologue_*`). The weight's channels are `num_k_heads` heads of q with
`head_k_dim` channels each, as many of k, and `num_v_heads` heads of v with `head_v_dim` each. With y the convolution
and its activation in float32, and for `norm_rounding` "storage" rounded to x's dtype:

    q = y * r * q_scale,  k = y * r,  v = y,     r = 1 / sqrt(sum(y * y) + norm_eps) of the head's own channels

and without `qk_l2norm` r is left out. All of it is float32 with one rounding at the store. The squares are rounded, and
then added as a perfect binary tree over neighbouring channels: first channels 2i and 2i+1, then the neighbours of
those sums, and so on; a head of another size than a power of two is padded with zeros at its end. Root and division
are those of IEEE 754, so that with "storage" the bits of q and k follow from those of y: they are the bits of the plain
convolution and a separate norm. Where the sum overflows float32, r may be 0. In float32, with z = a + dt_bias,

    g = -exp(A_log) * softplus(z),  softplus(z) = z if z > 20 else log(1 + exp(z))
    g = lower_bound * sigmoid(exp(A_log) * z)     where `lower_bound` is given
    beta = sigmoid(b)                             for `beta_rounding` "storage" rounded to b's dtype

The gated short convolution (`gated_short_conv_*`). Of the three slices B, C and x of a projection

    u = round(B * x),  c = round(activation(convolution of u)),  out = round(C * c)

each rounded to the dtype of the projection. The pool holds windows of u.

Rows that do nothing, and the tail: zero in every result, g and beta too, whatever their data hold.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_type_hints

from oracle import contract_checks as checks
from oracle.contract import (
    Array,
    FnCall,
    Integer,
    OnHost,
    RowsCall,
    Sizes,
    UpdateCall,
    record,
)
from oracle.contract_checks import FLOAT_DTYPES, below, host_float, host_int, shown

NORM_ROUNDINGS = ("storage", "none")
BETA_ROUNDINGS = ("none", "storage")
HEAD_DIM_MAX = 256
SMALLEST_NORMAL = 2.0**-126
LARGEST = 2.0**128 - 2.0**104

RECORDS: dict[str, Any] = {}  # the record of each of these operations, by the operation's name


class PrologueOutput(NamedTuple):
    """Result of the prologue. Its leading axes are those of x: [tokens], [batch] or [batch, seqlen].

    Attributes:
      q, k: [..., num_k_heads, head_k_dim] in x's dtype.
      v: [..., num_v_heads, head_v_dim] in x's dtype.
      g: float32 in the shape of `a`; None without it.
      beta: float32 [..., num_v_heads]; None without `b`.
      conv_states: as in `ConvOutput`.
    """

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    conv_states: Any


class PrologueWindowOutput(NamedTuple):
    """Result of `gated_delta_prologue_update` with `window_out`.

    Attributes:
      q, k, v, g, beta, conv_states: as in `PrologueOutput`.
      window_out: as in `ConvWindowOutput`.
    """

    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any
    conv_states: Any
    window_out: Any


class PrologueSizes(NamedTuple):
    """Sizes of a checked call: those of the convolution, and of the heads.

    `gate` is None without `a`, "head" for one gate a head of v, "channel" for one for each of its channels of k.
    """

    conv: Any
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    gate: str | None


class GatedConvSizes(NamedTuple):
    """Sizes of a checked call: those of the convolution, and the first channels of B, C and x."""

    conv: Any
    offsets: tuple[int, int, int]


_record = functools.partial(record, registry=RECORDS)


def _fields(own: Any, plain: Any, without: Sequence[str] = (), x: str = "x") -> Any:
    """A tuple of the fields of a front's call: the convolution's positional ones, the front's own, the convolution's others.

    A field that both have stands among the front's own, with its default there.

    Args:
      own: a record of the front's own fields.
      plain: the record of the convolution, whose x is called `x` here.
      without: fields that it has and the front has not.
    """
    hints = get_type_hints(plain, include_extras=True) | get_type_hints(own, globals(), include_extras=True)
    defaults = plain._field_defaults | own._field_defaults
    shared = [name for name in plain._fields if name not in {*own._fields, *without}]
    names = [*shared[: plain.POSITIONAL], *own._fields, *shared[plain.POSITIONAL :]]
    called = {name: x if name == "x" else name for name in names}
    given = [defaults[name] for name in names if name in defaults]
    made: Any = collections.namedtuple(own.__name__, called.values(), defaults=given)  # type: ignore[misc]
    made.__annotations__ = {called[name]: hints[name] for name in names}
    return made


class PrologueArguments(NamedTuple):
    """What the prologue takes beside the arguments of the convolution, and with another default.

    Attributes:
      num_k_heads: host int >= 1, heads of q and of k.
      num_v_heads: host int, heads of v, a multiple of `num_k_heads`.
      head_k_dim, head_v_dim: host ints, channels of a head, 1 to 256; the weight has
        dim = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim.
      a: [tokens, num_v_heads] float; or a gate for each channel of k, [tokens, num_v_heads, head_k_dim]; or None: no g.
        Its leading axes are those of x, as those of b.
      b: [tokens, num_v_heads] float, or None: no beta.
      A_log: [num_v_heads] float; with `a`, and only there.
      dt_bias: float, one axis less than `a`: [num_v_heads] or [num_v_heads, head_k_dim]; None: zero. Only with `a`.
      qk_l2norm: False: heads of q and k are not normalised.
      norm_eps: a number from 2**-126 on, inside the root, rounded to float32.
      q_scale: a number, rounded to float32, that q is multiplied by, with and without the norm.
      lower_bound: a number < 0, rounded to float32: g is a sigmoid between it and 0; or None: a softplus.
      norm_rounding: "storage": y is rounded to x's dtype before the norm and the scale; "none": only q and k are.
      beta_rounding: "none", or "storage": beta is rounded to b's dtype, and still float32.
      activation: as in `FnCall`.
    """

    num_k_heads: Integer = None
    num_v_heads: Integer = None
    head_k_dim: Integer = None
    head_v_dim: Integer = None
    a: Array | None = None
    b: Array | None = None
    A_log: Array | None = None
    dt_bias: Array | None = None
    qk_l2norm: bool = True
    norm_eps: float = 1e-6
    q_scale: float = 1.0
    lower_bound: float | None = None
    norm_rounding: str = "storage"
    beta_rounding: str = "none"
    activation: str | None = "silu"


class GatedConvArguments(NamedTuple):
    """What the gated convolution takes beside the arguments of the plain one, whose x is `bcx`.

    Attributes:
      channel_offsets: three host ints, the first channels of B, C and x, each of dim channels, in a tuple; they may
        overlap. None: (0, dim, 2 * dim), and channels is 3 * dim.
      activation: as in `FnCall`.
    """

    channel_offsets: Sizes | None = None
    activation: str | None = None


class Front:
    """A call of a front around one of the plain convolution, whose record is `PLAIN`."""

    __slots__ = ()
    PLAIN: Any

    def convolution(self: Any) -> Any:
        """The call of the plain convolution, of the record `PLAIN`; of a gated one with `bcx` for u."""
        given = {name: getattr(self, name) for name in self.PLAIN._fields if name in self._fields}
        return self.PLAIN(**given | {"x": self[0]})

    def check_values(self, sizes: Any, on_host: OnHost) -> None:
        """Checks the index data, as the plain record does."""
        self.convolution().check_values(sizes.conv, on_host)


class Prologue(Front):
    """A call of the prologue."""

    __slots__ = ()

    def check(self) -> PrologueSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        return _check_prologue(self)


class GatedConv(Front):
    """A call of the gated convolution.

    AXES: what shape `bcx` may have, by the number of its axes: with `query_start_loc`, and without.
    """

    __slots__ = ()
    AXES: tuple[dict[int, str], dict[int, str]]

    def check(self) -> GatedConvSizes:
        """Checks the shapes, dtypes and options; reads no data.

        Raises:
          ValueError: a shape or an option is wrong.
          TypeError: a dtype or the type of an option is wrong.
        """
        return _check_gated(self)


_WHOLE = ("residual", "split_sizes")  # what the front does with the output itself
_OFFSETS = (*_WHOLE, "channel_offset")
_PACKED = {2: "[tokens, channels]"}
_prologue_fn: Any = _fields(PrologueArguments, FnCall, _WHOLE)
_prologue_update: Any = _fields(PrologueArguments, UpdateCall, _WHOLE)
_prologue_rows: Any = _fields(PrologueArguments, RowsCall)
_gated_fn: Any = _fields(GatedConvArguments, FnCall, _OFFSETS, "bcx")
_gated_update: Any = _fields(GatedConvArguments, UpdateCall, _OFFSETS, "bcx")
_gated_rows: Any = _fields(GatedConvArguments, RowsCall, (), "bcx")


@_record("gated_delta_prologue_fn", positional=7)
class PrologueFnCall(_prologue_fn, Prologue):
    """A packed prefill; the arguments of `FnCall` but `residual` and `split_sizes`, and `PrologueArguments`."""

    __slots__, PLAIN = (), FnCall


@_record("gated_delta_prologue_update", positional=5)
class PrologueUpdateCall(_prologue_update, Prologue):
    """A decode step; the arguments of `UpdateCall` but `residual` and `split_sizes`, and `PrologueArguments`."""

    __slots__, PLAIN = (), UpdateCall


@_record("gated_delta_prologue", positional=5)
class PrologueCall(_prologue_rows, Prologue):
    """The differentiable form; see `RowsCall` for its rows, its states and its arguments, and `PrologueArguments`.

    It mutates nothing. It is differentiable in x, weight, bias, initial_states, a, b, A_log and dt_bias, through every
    result; a rounding inside counts as the identity. `conv_states` of the result are the final states.
    """

    __slots__, PLAIN = (), RowsCall


@_record("gated_short_conv_fn", positional=7)
class GatedConvFnCall(_gated_fn, GatedConv):
    """A packed prefill of `bcx` [tokens, channels] float32, float16 or bfloat16, the projection that holds B, C and x.

    The other arguments are those of `FnCall` but `residual`, `split_sizes` and `channel_offset`, and `GatedConvArguments`.
    The result is a `ConvOutput`: out [tokens, dim] in the dtype of `bcx`, and the pool of u.
    """

    __slots__, PLAIN, AXES = (), FnCall, (_PACKED, _PACKED)


@_record("gated_short_conv_update", positional=5)
class GatedConvUpdateCall(_gated_update, GatedConv):
    """A decode step of `bcx` [batch, channels], [batch, seqlen, channels], or [tokens, channels] with `query_start_loc`.

    The other arguments are those of `UpdateCall` but `residual`, `split_sizes` and `channel_offset`, and
    `GatedConvArguments`. `window_out` receives windows of u. The result is a `ConvOutput`, with `window_out` a
    `ConvWindowOutput`.
    """

    __slots__, PLAIN = (), UpdateCall
    AXES = (_PACKED, {2: "[batch, channels] or [batch, seqlen, channels]", 3: ""})


@_record("gated_short_conv", positional=5)
class GatedConvCall(_gated_rows, GatedConv):
    """The differentiable form of `bcx` [tokens, channels] with `query_start_loc`, or [batch, seqlen, channels] without.

    See `RowsCall` for its rows, its states, which are those of u, and its arguments, and `GatedConvArguments`. It mutates
    nothing. It is differentiable in bcx, weight, bias and initial_states, through both results; a rounding inside
    counts as the identity.
    """

    __slots__, PLAIN, AXES = (), RowsCall, (_PACKED, {3: "[batch, seqlen, channels]"})


class Columns(NamedTuple):
    """Stands for a slice of channels, of which a check needs no more than this."""

    shape: tuple[Any, ...]
    dtype: Any


def _check_prologue(call: Any) -> PrologueSizes:
    num_k_heads = _size("num_k_heads", call.num_k_heads)
    num_v_heads = _size("num_v_heads", call.num_v_heads)
    if num_v_heads % num_k_heads:
        raise ValueError(f"num_v_heads: expected a multiple of num_k_heads={num_k_heads}, got {num_v_heads}")
    head_k_dim = _size("head_k_dim", call.head_k_dim, HEAD_DIM_MAX)
    head_v_dim = _size("head_v_dim", call.head_v_dim, HEAD_DIM_MAX)
    dim, _ = checks.weight_shape(call.weight)
    wanted = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim
    if dim != wanted:
        raise ValueError(
            f"weight: expected dim={wanted} on axis 0, of 2 * {num_k_heads} heads of {head_k_dim} and {num_v_heads} "
            f"heads of {head_v_dim}, got {dim}"
        )
    conv = call.convolution().check()
    leading = tuple(call.x.shape[:-1])
    axes = ("batch", "seqlen") if len(leading) == 2 else ("tokens",)
    gate = _check_gate(call, axes, leading, (num_v_heads, head_k_dim))
    if call.b is not None:
        checks.check_array("b", call.b, (*axes, "num_v_heads"), FLOAT_DTYPES, (*leading, num_v_heads))
    checks.check_flag("qk_l2norm", call.qk_l2norm)
    if not SMALLEST_NORMAL <= host_float("norm_eps", call.norm_eps) <= LARGEST:
        raise ValueError(f"norm_eps: expected a finite number >= 2**-126, got {shown(call.norm_eps)}")
    if not abs(host_float("q_scale", call.q_scale)) <= LARGEST:
        raise ValueError(f"q_scale: expected a finite number, got {shown(call.q_scale)}")
    checks.check_choice("norm_rounding", call.norm_rounding, NORM_ROUNDINGS)
    checks.check_choice("beta_rounding", call.beta_rounding, BETA_ROUNDINGS)
    return PrologueSizes(conv, num_k_heads, num_v_heads, head_k_dim, head_v_dim, gate)


def _check_gate(
    call: Any, axes: tuple[str, ...], leading: tuple[Any, ...], sizes: tuple[int, int]
) -> str | None:
    """Checks what g is made of; returns the kind of gate."""
    if call.a is None:
        for name in ("A_log", "dt_bias", "lower_bound"):
            if getattr(call, name) is not None:
                raise ValueError(f"{name}: expected None, since a is None")
        return None
    channel = len(checks.shape_of("a", call.a)) == len(leading) + 2
    names = ("num_v_heads", "head_k_dim")[: 1 + channel]
    checks.check_array("a", call.a, (*axes, *names), FLOAT_DTYPES, (*leading, *sizes[: len(names)]))
    if call.A_log is None:
        raise ValueError("A_log: expected shape [num_v_heads], since a is given, got None")
    checks.check_array("A_log", call.A_log, ("num_v_heads",), FLOAT_DTYPES, (sizes[0],))
    if call.dt_bias is not None:
        checks.check_array("dt_bias", call.dt_bias, names, FLOAT_DTYPES, sizes[: len(names)])
    if call.lower_bound is not None and not -LARGEST <= host_float("lower_bound", call.lower_bound) < 0:
        raise ValueError(
            f"lower_bound: expected None or a finite number below 0, got {shown(call.lower_bound)}"
        )
    return "channel" if channel else "head"


def _check_gated(call: Any) -> GatedConvSizes:
    shape = checks.shape_of("bcx", call.bcx)
    wanted = call.AXES[1 if call.query_start_loc is None else 0]  # PyTorch 2.11 compiles no bool as an index
    if len(shape) not in wanted:
        raise ValueError(f"bcx: expected shape {next(iter(wanted.values()))}, got {list(shape)}")
    checks.check_dtype("bcx", call.bcx, FLOAT_DTYPES)
    dim, _ = checks.weight_shape(call.weight)
    *leading, channels = call.bcx.shape
    offsets = _offsets(call.channel_offsets, dim, channels)
    u = Columns((*leading, dim), call.bcx.dtype)
    return GatedConvSizes(call.convolution()._replace(x=u).check(), offsets)


def _offsets(given: Sequence[Any] | None, dim: Any, channels: Any) -> tuple[int, int, int]:
    """The first channels of B, C and x."""
    if given is None:
        if channels != 3 * dim:
            raise ValueError(
                f"bcx: expected 3 * dim = {3 * dim} channels on the last axis, since channel_offsets is None and the "
                f"weight has dim={dim}, got {channels}"
            )
        return 0, dim, 2 * dim
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"channel_offsets: expected a tuple of integers, got {type(given).__name__}")
    offsets = [host_int("channel_offsets", offset) for offset in given]
    if len(offsets) != 3 or any(below(o, 0) or below(channels - dim, o) for o in offsets):
        raise ValueError(
            f"channel_offsets: expected None, or 3 integers >= 0 with offset + dim <= {channels}, the channels of bcx, "
            f"for dim={dim}, got {given}"
        )
    first, second, third = offsets
    return first, second, third


def _size(name: str, value: Any, most: int | None = None) -> int:
    """A host int from 1 on that a tracer's symbol cannot stand for."""
    size = host_int(name, value)
    if checks.is_symbol(size):
        raise TypeError(f"{name}: expected an integer known on the host, got {shown(value)}")
    if size < 1 or (most is not None and size > most):
        limit = ">= 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name}: expected an integer {limit}, got {size}")
    return int(size)
