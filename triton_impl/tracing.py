"""The operations as PyTorch operators, `torch.ops.twinconv.*`, and what of PyTorch has to see a call.

An operator is what torch.compile, export, fake tensors, dispatch modes and torch.jit.trace record of a call. Schema and
implementation are made from a record's fields. What a call writes is declared mutable, so functionalisation keeps its
order and updates the caller's tensor; an operator mutates either nothing or tensors that are always there, since
compilers do not take optional ones. Nothing but `out` is returned, flat where it is split: an operator's results may
not share memory. Registered below Python's custom_op layer, which costs several times as much a call.
"""

import functools
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from oracle.contract import (
    CommitCall,
    ConvOutput,
    ConvWindowOutput,
    FnCall,
    Unsupported,
    UpdateCall,
    normalised,
)
from oracle.contract_prologue import (
    GatedConvFnCall,
    GatedConvUpdateCall,
    PrologueFnCall,
    PrologueOutput,
    PrologueUpdateCall,
    PrologueWindowOutput,
)

library = torch.library.Library("twinconv", "DEF")
OPERATORS: dict[Any, tuple["Operator", ...]] = {}  # of a record, the narrowest first

for _result in (
    ConvOutput,
    ConvWindowOutput,
    PrologueOutput,
    PrologueWindowOutput,
):  # so that torch.export can save programs that return them, and torch.load takes what torch.save made of them
    pytree._register_namedtuple(_result, serialized_type_name=f"twinconv.{_result.__name__}")
    torch.serialization.add_safe_globals([_result])


class Operator(NamedTuple):
    """One operator of an operation.

    Attributes:
      function: the operator; it takes the record's fields at `places`.
      places: positions of its arguments in the record.
      written: positions of what it writes, which must be given.
      absent, defaults: positions of what it does not take: must be None; must equal the default beside.
    """

    function: Any
    places: tuple[int, ...]
    written: tuple[int, ...]
    absent: tuple[int, ...]
    defaults: tuple[tuple[int, Any], ...]


def define(record, name, fields, direct, fake, draft=False):
    """Defines the operator `name` of an operation.

    Args:
      record: the operation's record, whose other fields keep their defaults.
      fields: names of its arguments, in the record's order.
      direct: runs a call on real tensors, given all arguments in the record's order.
      fake: the same for fake tensors: checks, and an empty result.
      draft: whether `commit` is False, and the pool is only read.
    """
    places = tuple(map(record._fields.index, fields))
    others = [i for i in range(len(record._fields)) if i not in places and record._fields[i] != "validate"]
    defaults = record._field_defaults | ({"commit": False} if draft else {})
    default = {i: defaults.get(record._fields[i]) for i in others}
    written = [f for f in fields if f in record.WRITTEN and not (draft and f == "conv_states")]
    schema = ", ".join(arguments(record, fields, written))
    library.define(f"{name}({schema}) -> {_returns(record)}")
    complete = _completion(record, fields, defaults)
    library.impl(name, lambda *values: direct(complete(values)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"twinconv::{name}", lambda *values: fake(complete(values)), lib=library)
    operator = getattr(torch.ops.twinconv, name).default
    _follow(name, operator, {field: fields.index(field) for field in written})
    absent = [i for i in others if default[i] is None]
    OPERATORS[record] = (
        *OPERATORS.get(record, ()),
        Operator(
            operator,
            places,
            tuple(map(record._fields.index, written)),
            tuple(absent),
            tuple((i, default[i]) for i in others if i not in absent),
        ),
    )


def _follow(name, operator, written):
    """Gives an operator what custom_op has: a gradient is not lost but refused, what is written is counted.

    Args:
      written: the places of what it writes among its arguments, by name.
    """

    def autograd(keys, *values):
        def run():
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & torch._C._after_autograd_keyset, *values)

        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if not asks_for_gradient(*tensors):
            return run()
        return tied({field: values[place] for field, place in written.items()}, tensors, run)

    def count(keys, *values):
        torch._C._increment_version([values[place] for place in written.values()])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *values)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    if written:
        library.impl(name, count, "ADInplaceOrView", with_keyset=True)


def arguments(record, fields, written=()):
    """The fields of a record as arguments in an operator's schema; it mutates those that are `written`."""
    letters = iter("abc")
    types = {"integer": "int", "size": "SymInt", "sizes": "SymInt[]"}
    for field in fields:
        kind = record.KINDS[field]
        if field in written:
            yield f"Tensor({next(letters)}!) {field}"
        else:
            type_ = "Tensor" if kind.endswith("array") else types.get(kind, kind)
            yield f"{type_}{'?' if field in record.OPTIONAL else ''} {field}"


def _returns(record):
    if record in (PrologueFnCall, PrologueUpdateCall):
        return "(Tensor, Tensor, Tensor)"
    return "()" if record is CommitCall else "Tensor"


def _completion(record, fields, defaults):
    """A function from an operator's arguments to all of the record's, in its order; others have their defaults."""
    rest = [name for name in record._fields if name not in fields]
    given = [*fields, *rest]
    pick = itemgetter(*(given.index(name) for name in record._fields))
    constants = tuple(map(defaults.get, rest))
    if "split_sizes" not in fields:
        return lambda values: pick((*values, *constants))
    sizes = fields.index("split_sizes")  # an operator gets a list

    def complete(values):
        if values[sizes] is not None:
            values = (*values[:sizes], tuple(values[sizes]), *values[sizes + 1 :])
        return pick((*values, *constants))

    return complete


def through_operator(record, args):
    """Runs a call, its arguments in the record's order, as one operator.

    Raises:
      ValueError, TypeError: arguments that no operator takes together, as the record says.
      Unsupported: `validate`.
    """
    if "validate" in record._fields and args[record._fields.index("validate")]:
        raise Unsupported("validate: expected False where the call is traced, since it reads data, got True")
    if not torch.jit.is_tracing():  # whose sizes are tensors
        args = tuple(normalised(record(*args)))  # no operator takes more than 64 bits
    for operator in OPERATORS[record]:
        if _takes(operator, args):
            return operator.function(*[args[i] for i in operator.places])
    record(*args).check()  # which says what is wrong, or that what lacks its pool would be ignored
    return OPERATORS[record][0].function(*[args[i] for i in OPERATORS[record][0].places])


def _takes(operator, args):
    for i in operator.written:
        if args[i] is None:
            return False
    for i in operator.absent:
        if args[i] is not None:
            return False
    return all(args[i] == default for i, default in operator.defaults)


def _bits(*names):
    """These dispatch keys, where this PyTorch has them, as bits."""
    keys = [getattr(torch._C.DispatchKey, name, None) for name in names]
    bits = 0
    for key in keys:
        bits |= 0 if key is None else torch._C.DispatchKeySet(key).raw_repr()
    return bits


_BACKENDS = ("CPU", "CUDA", "Meta", "XPU", "MPS", "HPU", "XLA", "MTIA", "IPU", "PrivateUse1")
_PLAIN = _bits(
    "ADInplaceOrView",
    "BackendSelect",
    *_BACKENDS,
    *(f"Autograd{b}" for b in _BACKENDS),
    *(f"Autocast{b}" for b in _BACKENDS),
)


def is_seen(tensors):
    """Whether anything in PyTorch's dispatcher is to see a call with these tensors.

    A mode or a tracer is active, or a tensor is more than memory with an address: a fake or otherwise overriding one, a lazy
    negative, a lazy zero. Where only plain kernels and autograd are concerned, the answer is no.
    """
    active = torch._C._dispatch_tls_local_include_set().raw_repr()
    active &= ~torch._C._dispatch_tls_local_exclude_set().raw_repr()
    for tensor in tensors:
        active |= torch._C._dispatch_keys(tensor).raw_repr()
    return active & ~_PLAIN & ~_FUNCTORCH != 0


_FUNCTORCH = _bits("FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode")


def refuse_odd(names, values):
    """Raises Unsupported for an argument that is a proxy, or a tensor that is not one dense block.

    Args:
      names, values: arguments and their names; those that are no tensors are passed over.
    """
    if torch.compiler.is_dynamo_compiling():  # its tensors are its own
        return
    for name, value in zip(names, values, strict=True):
        if type(value).__module__ == "torch.fx.proxy":
            raise Unsupported(
                f"{name}: expected a tensor, got a proxy of torch.fx.symbolic_trace (torch.export and make_fx trace calls)"
            )
        if isinstance(value, torch.Tensor) and (value.is_nested or value.layout is not torch.strided):
            raise Unsupported(
                f"{name}: expected a dense tensor, got a {'nested' if value.is_nested else value.layout} one (rows of "
                "different lengths are packed in x [tokens, dim], with query_start_loc)"
            )


def refuse_transforms(names, values):
    """`refuse_odd`, and Unsupported for a tensor that torch.func or forward mode transforms."""
    refuse_odd(names, values)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise Unsupported(
                f"{name}: expected a tensor outside of torch.func's transformations, got one inside (the differentiable "
                "form, triton_impl.causal_conv1d, takes torch.func.grad)"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
            raise Unsupported(
                f"{name}: expected a tensor without a tangent, since there is no forward-mode gradient, got one with"
            )


class NoGradient(torch.autograd.Function):
    """Passes a tensor on and ties it to inputs that ask for a gradient, so that a backward pass cannot miss them."""

    @staticmethod
    def forward(ctx, tensor, written, *inputs):
        if written:
            ctx.mark_dirty(tensor)
        elif type(tensor) is torch.Tensor and not torch.compiler.is_compiling():  # nor one that a trace wraps
            return tensor.new_empty(0).set_(tensor)  # no view of an input, so that it may be changed in place
        return tensor

    @staticmethod
    def backward(ctx, *grads):
        raise Unsupported(
            "backward: expected a call under torch.no_grad() or torch.inference_mode(), got one whose gradient is "
            "asked for (the differentiable form is triton_impl.causal_conv1d)"
        )


def tied(written, tensors, function):
    """Runs a call whose gradient is asked for: what it returns or writes refuses a backward pass, rather than to lose it.

    Args:
      written: what it writes, by name.
      tensors: all of its tensors.
      function: runs it; its result is a tensor, a tuple of them, or None.
    """
    inputs = [tensor for tensor in tensors if tensor.requires_grad]
    for name, tensor in written.items():
        root = tensor._base if tensor._is_view() else tensor
        if root.requires_grad and root.is_leaf:
            raise Unsupported(
                f"{name}: expected a tensor that asks for no gradient itself, since it is updated in place, got a leaf that does"
            )
        NoGradient.apply(tensor, True, *inputs)
    with torch.no_grad():
        result = function()
    if result is None:
        return None
    if isinstance(result, torch.Tensor):
        return NoGradient.apply(result, False, *inputs)
    return tuple(NoGradient.apply(part, False, *inputs) for part in result)


def refuse_second_gradient(ctx, *grads):
    """The backward pass of a backward pass."""
    raise Unsupported(
        "backward: expected a first gradient, got one of a gradient, which these operations lack"
    )


def refuse_mapping(info, in_dims, *arguments):
    """`torch.func.vmap` of a differentiable form."""
    raise Unsupported("vmap: expected the batch in x's first axis or in packed rows, got a mapped call")


def refuse_tangents(ctx, *tangents):
    """Forward mode through a differentiable form."""
    raise Unsupported(
        "x: expected tensors without a tangent, since there is no forward-mode gradient, got one with"
    )


class _FirstGradient(torch.autograd.Function):
    @staticmethod
    def forward(operator, *arguments):
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(refuse_second_gradient)
    vmap = staticmethod(refuse_mapping)
    jvp = staticmethod(refuse_tangents)


def first_gradient(name):
    """An operator that is a backward pass, as torch.func takes it: it does not see the operator's own autograd."""
    return functools.partial(_FirstGradient.apply, getattr(torch.ops.twinconv, name).default)


def asks_for_gradient(*tensors):
    """Whether a call with these tensors, or None, is to be differentiated."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and getattr(tensor, "requires_grad", False):
                return True
    return False


def register_differentiable(name, forward, backward, keep_inputs, differentiate):
    """Registers the operators `name`_forward and _backward, each of (what runs it, its fake), and their autograd."""
    for part, (run, fake) in (("forward", forward), ("backward", backward)):
        library.impl(f"{name}_{part}", run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"twinconv::{name}_{part}", fake, lib=library)
    autograd = functools.partial(torch.library.register_autograd, lib=library)
    autograd(f"twinconv::{name}_forward", differentiate, setup_context=keep_inputs)
    autograd(f"twinconv::{name}_backward", refuse_second_gradient)


def _convolution_flops(x_shape, weight_shape, *args, out_shape=None, **options):
    """A multiplication and an addition for every tap of every element of the output."""
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    return 2 * tokens * weight_shape[0] * weight_shape[1]


def backward_flops(dout_shape, dfinal_shape, x_shape, weight_shape, *args, out_shape=None, **options):
    """dx and the sums over tokens: a multiplication and an addition each for every tap of every element."""
    return 2 * x_shape.numel() * weight_shape[1] * (2 if args[-2] else 1)


def count_flops(name, formula=_convolution_flops):
    """Registers the formula of an operator with PyTorch's FlopCounterMode."""
    register_flop_formula(getattr(torch.ops.twinconv, name))(formula)


def define_operators(direct, fake):
    """Defines the operators of prefills, updates and commits; see `define`.

    Args:
      direct, fake: functions of a record and all arguments in its order.
    """
    pooled = {
        "conv_states",
        "cache_indices",
        "has_initial_state",
        "pad_slot_id",
        "state_layout",
        "cache_seqlens",
        "write_indices",
        "empty_rows",
        "snapshot_indices",
        "snapshot_block_size",
        "num_computed_tokens",
        "track_indices",
        "track_lengths",
    }
    windows = {"window_out", "window_indices"}
    drafts = {}
    for record in (UpdateCall, PrologueUpdateCall, GatedConvUpdateCall):
        fields = [f for f in record._fields if f != "commit"]
        drafts[f"{record.OPERATION}_draft"] = record, [f for f in fields if f not in windows]
        drafts[f"{record.OPERATION}_draft_windows"] = record, fields
    variants = drafts | {
        "causal_conv1d_fn_stateless": (FnCall, [f for f in FnCall._fields if f not in pooled]),
        "causal_conv1d_fn": (FnCall, FnCall._fields[: FnCall._fields.index("validate")]),
        "causal_conv1d_fn_serving": (FnCall, FnCall._fields),
        "causal_conv1d_update": (UpdateCall, UpdateCall._fields[: UpdateCall._fields.index("validate")]),
        "causal_conv1d_update_serving": (UpdateCall, [f for f in UpdateCall._fields if f not in windows]),
        "causal_conv1d_update_windows": (UpdateCall, UpdateCall._fields),
        "commit_windows": (CommitCall, CommitCall._fields),
        "gated_delta_prologue_fn_stateless": (
            PrologueFnCall,
            [f for f in PrologueFnCall._fields if f not in pooled],
        ),
        "gated_delta_prologue_fn": (PrologueFnCall, PrologueFnCall._fields),
        "gated_delta_prologue_update": (
            PrologueUpdateCall,
            [f for f in PrologueUpdateCall._fields if f not in windows],
        ),
        "gated_delta_prologue_update_windows": (PrologueUpdateCall, PrologueUpdateCall._fields),
        "gated_short_conv_fn_stateless": (
            GatedConvFnCall,
            [f for f in GatedConvFnCall._fields if f not in pooled],
        ),
        "gated_short_conv_fn": (GatedConvFnCall, GatedConvFnCall._fields),
        "gated_short_conv_update": (
            GatedConvUpdateCall,
            [f for f in GatedConvUpdateCall._fields if f not in windows],
        ),
        "gated_short_conv_update_windows": (GatedConvUpdateCall, GatedConvUpdateCall._fields),
    }
    for name, (record, fields) in variants.items():
        fields = tuple(field for field in fields if field != "validate")
        define(
            record,
            name,
            fields,
            lambda args, record=record: direct(record, args),
            lambda args, record=record: fake(record, args),
            draft=name in drafts,
        )
        if record is not CommitCall:
            count_flops(name)
