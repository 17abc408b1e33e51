"""One call of an operation: recognised, or checked, planned and remembered; then run.

The arguments come as one tuple in the order of the operation's record (`oracle.contract`), which is the signature's. The
call before is compared first, by PyTorch's own guard of compiled code, which looks at the type, dispatch keys, dtype,
device, sizes and strides of every tensor in a fraction of a microsecond: the layers of a model call alike. Other calls
are looked up by a key of the same facts. Only where both miss is a record made, and everything below takes that.
"""

import contextlib
import functools
import importlib
import math
from operator import itemgetter

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling, is_exporting

try:
    from torch._C._dynamo.guards import TensorGuards, _empty_strided_cuda
except (
    ImportError
):  # they have no public name; without them every call is looked up, and memory comes from torch.empty
    TensorGuards = _empty_strided_cuda = None

from oracle.contract import (
    CommitCall,
    FnCall,
    Memory,
    Unsupported,
    UpdateCall,
    check_backend,
    check_memory,
    given_arrays,
    normalised,
)
from oracle.contract_prologue import (
    GatedConvFnCall,
    GatedConvUpdateCall,
    PrologueFnCall,
    PrologueUpdateCall,
)
from triton_impl import gated_conv, plain, plain_prologue, tracing
from triton_impl.config import (
    kernel_of,
    prefill_config,
    prologue_config,
    prologue_update_config,
    row_config,
    short_rows_config,
    update_config,
    verify_config,
    walks,
)

BACKENDS = ("triton", "eager")
KEPT = 4096  # calls that are remembered; then all are forgotten
_calls = {}  # prepared calls by key
_patterns = {}  # by key, the call's recogniser
_last = {}  # by record, the recogniser of the call before, if it has one


def run(record, args, out=None):
    """Runs a call of an operation.

    Args:
      record: the operation's record.
      args: its arguments, a tuple in the order of the record.
      out: where the result goes; None: new memory. It may be x itself, if it is laid out as torch.empty_like(x) would
        be: each element is read before it is written. Without `channel_offset`, `split_sizes` and `tree_parents`.

    Returns:
      `out`; with `split_sizes` one flat tensor that holds the parts one after the other (`parts` are its views); None
      for a commit; of a prologue (flat q, k and v, g, beta), of no elements where there is none.

    Raises:
      ValueError, TypeError, Unsupported: as the public operations say.
    """
    if is_dynamo_compiling():
        return _traced(record, args)
    if (last := _last.get(record)) is not None and forward_ad._current_level < 0:
        if (prepared := last(args)) is not None:
            return prepared(args, out)
    return _unrecognised(record, args, out)


def run_real(record, args, out=None):
    """`run` for real tensors whose gradients are not asked for: an operator's implementation."""
    prepared = recall(record, args)
    if prepared is None:
        prepared, kept = prepare(record(*args))
        if kept:
            remember(record, args, prepared)
    return prepared(args, out)


def recall(kind, args):
    """What was prepared for such a call, or None.

    Args:
      kind: a record, or the name of something else that is prepared.
      args: tensors and other arguments; the second one is the weight.
    """
    if (last := _last.get(kind)) is not None and (prepared := last(args)) is not None:
        return prepared
    if (prepared := _calls.get(key := _key(kind, args))) is not None and TensorGuards is not None:
        pattern = _patterns.get(key)
        if pattern is None or pattern(args) is None:  # inference mode, say, is new
            pattern = _patterns[key] = recogniser(prepared, args)
        if pattern(args) is not None:  # not where two of its tensors are one
            _last[kind] = pattern
    return prepared


def remember(kind, args, prepared):
    """Keeps what was prepared for the calls that `recall` finds alike."""
    if (key := _key(kind, args)) is None:
        return
    if len(_calls) >= KEPT:
        forget()
    _calls[key] = prepared


def update_in_place(*arguments, **options):
    """`causal_conv1d_update` whose result replaces x, which is returned: what in-place peers are made of."""
    call = UpdateCall(*arguments, **options)
    x = call.x
    dense = x.is_contiguous() or (x.dim() == 3 and x.mT.is_contiguous())
    found = run(UpdateCall, tuple(call), x if dense and not is_dynamo_compiling() else None)
    return x if found is x else x.copy_(found)


def remembered():
    """How many calls are remembered."""
    return len(_calls)


def forget():
    """Drops every remembered call."""
    for kept in (_calls, _patterns, _last):
        kept.clear()


def check(call):
    """Everything that can be checked of a record without reading data; returns the sizes of the call."""
    tracing.refuse_odd(call._fields, call)  # which may have no shape
    sizes = call.check()
    if "backend" in call._fields:
        check_backend(call.backend, BACKENDS)
    arrays = given_arrays(call)
    first = next(iter(arrays))
    for name, array in arrays.items():
        if not isinstance(array, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(array).__name__}")
        if array.device != arrays[first].device:
            raise ValueError(
                f"{name}: expected a tensor on {first}'s device {arrays[first].device}, got {array.device}"
            )
    return sizes


def resolve(backend, device):
    """The backend that runs a call on a device: "triton", "eager", or "meta" where there is nothing to run.

    Raises:
      Unsupported: the one asked for cannot.
    """
    if device.type == "meta":
        return "meta"
    if backend == "auto":
        return "triton" if device.type == "cuda" else "eager"
    if backend == "triton":
        kernels("launch")
        if device.type != "cuda" and not interprets():
            raise Unsupported(
                f"backend: 'triton' runs on CUDA or ROCm tensors, or on CPU tensors with TRITON_INTERPRET=1; got {device}"
            )
    return backend


def interprets():
    """Whether Triton's interpreter runs kernels on CPU tensors."""
    import triton

    return triton.knobs.runtime.interpret


def parts(out, shape, split_sizes):
    """Views of the parts of a flat `out`: contiguous, each in `shape` but for its channels."""
    views, first = [], 0
    tokens = out.numel() // sum(split_sizes)
    for size in split_sizes:
        views.append(out[tokens * first : tokens * (first + size)].view(*shape[:-1], size))
        first += size
    return tuple(views)


def front_of(call, found):
    """q, k, v, g and beta of what a prologue's call returned: views of the flat tensor in their shapes, None for what is absent."""
    flat, g, beta = found
    leading = call.x.shape[:-1]
    keys = (*leading, call.num_k_heads, call.head_k_dim)
    wide = math.prod(keys)  # torch.Size.numel makes an int of a symbol
    return (
        flat[:wide].view(keys),
        flat[wide : 2 * wide].view(keys),
        flat[2 * wide :].view(*leading, call.num_v_heads, call.head_v_dim),
        None if call.a is None else g,
        None if call.b is None else beta,
    )


def unit_stride(offsets):
    """The offsets as the kernels read them; a copy if they are a strided view."""
    return offsets if offsets is None or offsets.stride(0) == 1 else offsets.contiguous()


def launch_on(device, function, *args):
    """Calls a function that launches on `device`, which need not be the current one."""
    if device.type == "cuda" and several_devices() and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return function(*args)
    return function(*args)


@functools.cache
def several_devices():
    """Whether launches have to look where the current device is."""
    return torch.cuda.device_count() > 1


# Calls that PyTorch has to see.


def _unrecognised(record, args, out):
    if is_dynamo_compiling():  # of a frame behind a graph break
        return _traced(record, args)
    tracing.refuse_transforms(record._fields, args)
    for name in written_fields(call := record(*args)):
        if isinstance(written := getattr(call, name), torch.Tensor) and (
            written.is_neg() or written._is_zerotensor()
        ):
            raise Unsupported(
                f"{name}: expected a tensor that holds its values, since it is written, got a lazy "
                f"{'negative' if written.is_neg() else 'zero'} (clone() makes one)"
            )
    args = tuple(arg.resolve_neg() if isinstance(arg, torch.Tensor) else arg for arg in args)
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    asks, seen = tracing.asks_for_gradient(*tensors), tracing.is_seen(tensors)
    if (asks or seen) and not torch.jit.is_tracing():  # whose sizes are tensors
        check(call)  # before anything is tied, or converted by an operator
        args = tuple(normalised(call))
    if seen:
        return tracing.through_operator(record, args)
    return tied(record, args, run_real) if asks else run_real(record, args, out)


def _traced(record, args):
    if not is_exporting() and tracing.asks_for_gradient(
        *[arg for arg in args if isinstance(arg, torch.Tensor)]
    ):
        # the compiler would ask for the backward pass at once
        torch._dynamo.graph_break(
            msg="Unsupported: expected a call under torch.no_grad() or torch.inference_mode(), got one whose gradient is asked "
            "for (the differentiable form is triton_impl.causal_conv1d)"
        )
        return tied(record, args, tracing.through_operator)
    return tracing.through_operator(record, args)


def tied(record, args, function):
    """`tracing.tied` of a call: `function` of the record and its arguments runs it."""
    call = record(*args)
    written = {name: getattr(call, name) for name in written_fields(call)}
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return tracing.tied(written, tensors, lambda: function(record, args))


def written_fields(call):
    """The names of what a call writes."""
    names = [name for name in call.WRITTEN if getattr(call, name) is not None]
    return [name for name in names if name != "conv_states" or getattr(call, "commit", True)]


# Calls that were prepared before.


def recogniser(prepared, args):
    """A function of a call's arguments: `prepared`, or None if anything but data is other than in `args`."""
    # a guard takes no tensor twice
    first = {id(arg): i for i, arg in reversed([*enumerate(args)])}
    places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and first[id(arg)] == i]
    twice = [
        (i, first[id(arg)]) for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and i not in places
    ]
    rest = [i for i, arg in enumerate(args) if not isinstance(arg, torch.Tensor)]
    tensors, others = getter(places), getter(rest)
    like, facts, low = guard(tensors(args)), others(args), _low(args)
    # 1 == 1.0 == True, so the types of numbers are compared as well
    types = tuple((i, type(arg)) for i, arg in enumerate(args) if isinstance(arg, int | float))
    inner = tuple((i, _types(arg)) for i, arg in enumerate(args) if isinstance(arg, tuple))

    def recognise(args):
        try:
            if not like(*tensors(args)) or others(args) != facts or args[1].data_ptr() & 15 != low:
                return None
            for i, kind in types:
                if type(args[i]) is not kind:
                    return None
            for i, kinds in inner:
                if _types(args[i]) != kinds:
                    return None
            for i, before in twice:
                if args[i] is not args[before]:
                    return None
        except (AttributeError, RuntimeError, TypeError, ValueError):  # an argument is odd: a check says how
            return None
        return prepared

    return recognise


def _low(args):
    """The weight is the second argument; `arithmetic.word_bits` reads its address."""
    return args[1].data_ptr() & 15


def _types(values):
    return [*map(type, values)]


def _key(kind, args):
    """All that a check or a launch depends on, but for the tensors' data; None if an argument is odd."""
    try:
        key = [kind, _low(args)]
        for arg in args:
            if isinstance(arg, torch.Tensor):
                key += (arg.shape, arg.is_contiguous() or arg.stride(), arg.dtype, arg.device)
            elif isinstance(arg, tuple | list):
                key += (type(arg), tuple(arg), *map(type, arg))
            else:
                key += (type(arg), arg)
        hash(key := tuple(key))
        return key
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def getter(places):
    """A function from a sequence to the tuple of its items at these places."""
    if len(places) == 1:
        (place,) = places
        return lambda items: (items[place],)
    return itemgetter(*places) if places else lambda items: ()


def guard(tensors):
    """A function of as many tensors: whether each is like these in all but its data, and no two are one."""
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check


def guard_works():
    """Whether a guard tells apart what a key does: it is no public interface, so this is tried once."""
    others = [
        torch.empty(2, 4),
        torch.empty(3, 2).mT,
        torch.empty(2, 3, dtype=torch.float64),
        torch.empty(2, 3, device="meta"),
        torch.empty(6),
        torch.nn.Parameter(torch.empty(2, 3)),
        torch._neg_view(torch.empty(2, 3)),
        None,
    ]
    try:
        like = guard([torch.empty(2, 3)])
        return bool(like(torch.empty(2, 3))) and not any(map(like, others))
    except (AttributeError, RuntimeError, SystemError, TypeError, ValueError):
        return False


if TensorGuards is not None and not guard_works():
    TensorGuards = None


# From a record to launches.


def prepare(call):
    """Checks a call and decides everything but its data.

    Returns:
      (a function of the arguments and `out` that runs it, whether it may be remembered).
    """
    sizes = check(call)
    backend = resolve(call.backend, given_arrays(call)[call.ARRAYS[0]].device)
    if call.validate:
        if backend == "meta":
            raise Unsupported("validate: expected False on meta, where there is no data, got True")
        call.check_values(sizes, lambda name, array: array.tolist())
    if backend != "meta":
        check_memory(call, _memory_of)
    if backend == "triton":
        prepared, device = _planned(normalised(call), sizes), call[0].device
        if device.type == "cuda" and several_devices():
            prepared = _OnDevice(prepared, device)
        return prepared, not call.validate
    return functools.partial(_eager if backend == "eager" else _meta, type(call)), False


def _memory_of(tensor):
    return Memory(
        tensor.device, tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tensor.stride()
    )


def _eager(record, args, out=None):
    found = _PLAIN[record](normalised(record(*args)))
    return found if out is None else out.copy_(found)


_PLAIN = {
    FnCall: plain.prefill,
    UpdateCall: plain.update,
    CommitCall: plain.commit,
    PrologueFnCall: plain_prologue.prologue,
    PrologueUpdateCall: plain_prologue.prologue,
    GatedConvFnCall: gated_conv.eager,
    GatedConvUpdateCall: gated_conv.eager,
}


def _meta(record, args, out=None):
    return empty_out(record(*args)) if out is None else out


def empty_out(call):
    """New memory for the result of a checked call; None for a commit."""
    if isinstance(call, CommitCall):
        return None
    if isinstance(call, PrologueFnCall | PrologueUpdateCall):
        return plain_prologue.empty_front(call)
    if isinstance(call, GatedConvFnCall | GatedConvUpdateCall):
        call = gated_conv.convolution_of(call)
    x = plain.input_channels(call)
    return torch.empty_like(x) if call.split_sizes is None else x.new_empty(x.numel())


def allocations(like, device):
    """Two functions that make memory on a device, laid out as a tensor without data: PyTorch's own, and the quickest.

    Memory that is to be filled (`torch.use_deterministic_algorithms`) is PyTorch's. The other is the allocation of compiled
    graphs, past PyTorch's dispatcher, which works on the current device.
    """
    layout = tuple(like.shape), like.stride()
    new = functools.partial(torch.empty_strided, *layout, dtype=like.dtype, device=device)
    if device.type != "cuda" or several_devices() or _empty_strided_cuda is None:
        return new, new
    return new, functools.partial(_empty_strided_cuda, *layout, like.dtype)


class Prepared:
    """A checked call with everything but its tensors decided: makes the result, then launches.

    Args:
      call: the record, whose tensors may be read for all but their data.
      outputs, states: Launches, or None, and the fields whose tensors they take; `outputs` takes the result as well.
      memory: a tensor without data that is laid out as the result will be; None: there is none.
    """

    def __init__(self, call, outputs, states=(None, ()), memory=None):
        (self.outputs, names), (self.states, state_names) = outputs, states
        self.arrays, self.state_arrays = _fields(call, names), _fields(call, state_names)
        written = written_fields(call)
        self.written = _fields(call, written) if written else None
        device = given_arrays(call)[call.ARRAYS[0]].device
        self.new_out, self.quick_out = (None, None) if memory is None else allocations(memory, device)

    def __call__(self, args, out=None):
        in_place = out is not None
        if not in_place and self.new_out is not None:
            out = (self.new_out if torch._C._get_deterministic_algorithms() else self.quick_out)()
        if self.outputs is not None:
            if out is None:
                self.outputs(*self.arrays(args))
            else:
                self.outputs(*self.arrays(args), out)
        if self.states is not None:
            self.states(*self.state_arrays(args))
        # Autograd tells by its counter that a tensor it keeps was written; kernels do not turn it.
        if self.written is not None:
            torch._C._increment_version(self.written(args))
        if in_place:
            torch._C._increment_version((out,))
        return out


class PreparedFront:
    """A checked prologue with everything but its tensors decided.

    Args:
      call: the record, whose tensors may be read for all but their data.
      outputs: the Launch of everything and the fields whose tensors it takes, or None: the plain convolution comes first,
        and then `behind`, if there is anything left to do.
      states: as in `Prepared`.
    """

    def __init__(self, call, outputs, states=(None, ()), convolution=None, behind=(None, ()), copies=False):
        (self.outputs, names), (self.states, state_names) = outputs, states
        self.arrays, self.state_arrays = _fields(call, names), _fields(call, state_names)
        self.behind, self.behind_arrays = behind[0], _fields(call, behind[1])
        self.record, self.convolution, self.copies = type(call), convolution, copies
        memory = plain_prologue.empty_front(call._replace(x=call.x.to("meta")))
        self.memory, self.quick = zip(*(allocations(t, call.x.device) for t in memory), strict=True)
        written = [] if convolution is not None else written_fields(call)
        self.written = _fields(call, written) if written else None

    def __call__(self, args, out=None):
        filled = torch._C._get_deterministic_algorithms()
        flat, g, beta = found = tuple([new() for new in (self.memory if filled else self.quick)])
        if self.convolution is not None:
            source = self.convolution(
                plain_prologue.convolution_of(self.record(*args)), None if self.copies else flat
            )
            if self.behind is not None:
                self.behind(*self.behind_arrays(args), source, flat, g, beta)
        elif self.outputs is not None:
            self.outputs(*self.arrays(args), flat, g, beta)
        if self.states is not None:
            self.states(*self.state_arrays(args))
        if self.written is not None:
            torch._C._increment_version(self.written(args))
        return found


class _OnDevice:
    """A prepared call on one of several devices, which need not be the current one."""

    def __init__(self, prepared, device):
        self.prepared, self.device = prepared, device

    def __call__(self, args, out=None):
        return launch_on(self.device, self.prepared, args, out)


def _fields(call, names):
    """A function from arguments in the order of the record to those of these names."""
    return getter([call._fields.index(name) for name in names])


def _planned(call, sizes):
    """The prepared launches of a normalised call."""
    if isinstance(call, CommitCall):
        return _plan_commit(call, sizes)
    if isinstance(call, GatedConvFnCall | GatedConvUpdateCall):
        return _plan_gated(call, sizes)
    if call.channel_offset is None and (call.query_start_loc is None or call.query_start_loc.stride(0) == 1):
        return _PLANS[type(call)](call, sizes)
    return _Views(_PLANS[type(call)](_views(call), sizes), type(call))


class _Views:
    """A prepared call that takes a part of x's channels, or copies offsets that lie strided."""

    def __init__(self, prepared, record):
        self.prepared, self.record = prepared, record

    def __call__(self, args, out=None):
        return self.prepared(_views(self.record(*args)), out)


def _views(call):
    return call._replace(
        x=plain.input_channels(call), channel_offset=None, query_start_loc=unit_stride(call.query_start_loc)
    )


@functools.cache
def kernels(name):
    """The module of a kernel: the plain path does without Triton.

    Raises:
      Unsupported: Triton is not installed.
    """
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise Unsupported(
            "backend: 'triton' needs the package triton, which is not installed (pip install 'twinconv[triton]' on Linux)"
        ) from error


def _plan_prefill(call, sizes, gate=None):
    """The outputs' kernel, which also leaves the state where that is the plain rule, and the states' kernel."""
    others = call.write_indices, call.snapshot_indices, call.track_indices
    own_state = call.state_layout == "front" and call.empty_rows == "skip" and all(o is None for o in others)
    outputs = states = (None, ())
    if call.x.numel():
        kernel = kernels("prefill")
        walk, warp_size = walks(*call.x.stride()), kernels("launch").warp_size()
        config = None
        if walk and call.schedule != "flat":
            config = short_rows_config(sizes.tokens, sizes.dim, call.max_seqlen, warp_size)
        if config is not None:
            kernel = kernels("short_rows")
        else:
            config = prefill_config(
                sizes.tokens,
                sizes.dim,
                sizes.batch,
                sizes.width,
                walk,
                call.max_seqlen,
                call.schedule,
                warp_size,
            )
        stores = own_state and call.conv_states is not None
        outputs = kernel.prepare(call, sizes, config, stores=stores, gate=gate), kernel.ARRAYS
    if call.conv_states is not None and not own_state and sizes.batch:
        kernel = kernels("states")
        config = row_config(
            sizes.tokens, sizes.dim, call.conv_states.element_size(), kernels("launch").warp_size()
        )
        states = kernel.prepare(call, sizes, config, gate), kernel.ARRAYS
    return Prepared(call, outputs, states, _memory(call))


def _plan_update(call, sizes, gate=None):
    if not call.x.numel():
        return Prepared(call, (None, ()), memory=_memory(call))
    kind, itemsize = kernel_of(call), call.x.element_size()
    kernel = kernels({"token": "update", "rows": "verify", "tree": "trees"}[kind])
    if kind == "token":
        config = update_config(sizes.batch, sizes.dim, itemsize, kernels("launch").warp_size())
        outputs = kernel.prepare(call, sizes, config)
    else:
        given = call.query_start_loc, call.window_out
        light = kind == "rows" and given == (None, None) and call.state_layout == "front"
        config = verify_config(
            call.x.numel() // sizes.dim, sizes.dim, itemsize, kernels("launch").warp_size(), light
        )
        outputs = kernel.prepare(call, sizes, config, gate)
    return Prepared(call, (outputs, kernel.ARRAYS), memory=_memory(call))


def _plan_commit(call, sizes):
    if not (sizes.batch and sizes.history):
        return Prepared(call, (None, ()))
    kernel = kernels("commit")
    config = row_config(
        sizes.batch, sizes.dim, call.conv_states.element_size(), kernels("launch").warp_size()
    )
    return Prepared(call, (kernel.prepare(call, sizes, config), kernel.ARRAYS))


def _plan_prologue(call, sizes):
    """One kernel for outputs and gates, and the states' kernel where it is not the plain rule; of channel-first x two."""
    conv = call.convolution()
    if not call.x.numel() or not walks(*call.x.stride()):
        return _plan_behind(call, sizes)
    plain_plan = _plan_prefill(conv, sizes.conv)
    kernel = kernels("prologue")
    config = prologue_config(
        sizes.conv.tokens, sizes.conv.dim, sizes.conv.batch, sizes.conv.width, kernel.lanes_of(sizes.head_k_dim),
        call.max_seqlen, call.schedule, kernels("launch").warp_size(),
    )  # fmt: skip
    others = plain_plan.states is not None
    outputs = kernel.prepare(call, sizes, config, stores=not others), kernel.ARRAYS
    return PreparedFront(call, outputs, (plain_plan.states, kernels("states").ARRAYS if others else ()))


def _plan_prologue_update(call, sizes):
    """One kernel for one token a row; else norm and gates behind the plain convolution."""
    if not call.x.numel() or kernel_of(call.convolution()) != "token":
        return _plan_behind(call, sizes)
    kernel, warp_size = kernels("prologue"), kernels("launch").warp_size()
    lanes = kernel.lanes_of(sizes.head_k_dim)
    config = prologue_update_config(sizes.conv.batch, sizes.conv.dim, lanes, warp_size)
    return PreparedFront(call, (kernel.prepare_update(call, sizes, config), kernel.UPDATE_ARRAYS))


def _plan_gated(call, sizes):
    """The plain kernels, with a gate in front of them and one behind."""
    conv = _gated_views(call)
    return _Gated(_PLANS[type(conv)](conv, sizes.conv, gated_conv.distance(call)), type(call))


class _Gated:
    """A prepared plain call that takes slices of a projection."""

    def __init__(self, prepared, record):
        self.prepared, self.record = prepared, record

    def __call__(self, args, out=None):
        return self.prepared(_gated_views(self.record(*args)), out)


def _gated_views(call):
    conv = gated_conv.convolution_of(call)
    return conv._replace(query_start_loc=unit_stride(conv.query_start_loc))


def _plan_behind(call, sizes):
    """The plain convolution, then norm and gates."""
    conv = plain_prologue.convolution_of(call)
    copies = conv.x.dtype != call.x.dtype
    convolution = _PLANS[type(conv)](conv, conv.check())
    behind = None, ()
    if call.x.numel():
        kernel, warp_size = kernels("prologue"), kernels("launch").warp_size()
        config = prologue_config(
            sizes.conv.tokens, sizes.conv.dim, sizes.conv.batch, sizes.conv.width, kernel.lanes_of(sizes.head_k_dim),
            warp_size=warp_size,
        )  # fmt: skip
        behind = kernel.prepare_behind(call, sizes, config, copies), kernel.BEHIND_ARRAYS
    return PreparedFront(call, (None, ()), convolution=convolution, behind=behind, copies=copies)


_PLANS = {
    FnCall: _plan_prefill,
    UpdateCall: _plan_update,
    PrologueFnCall: _plan_prologue,
    PrologueUpdateCall: _plan_prologue_update,
}


def _memory(call):
    """A tensor on meta laid out as the result will be."""
    if call.split_sizes is not None:
        return torch.empty(call.x.numel(), dtype=call.x.dtype, device="meta")
    return torch.empty_like(call.x, device="meta")


def _fake(record, args):
    call = record(*args)
    check(call)
    return empty_out(call)


tracing.define_operators(run_real, _fake)

KERNELS = (
    "prefill",
    "short_rows",
    "states",
    "update",
    "verify",
    "trees",
    "commit",
    "backward",
    "prologue",
    "prologue_backward",
)
with contextlib.suppress(Unsupported):  # without Triton, the plain path
    for _name in KERNELS:
        kernels(_name)
