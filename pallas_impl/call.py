"""One checked call: which backend runs it, its arrays made ready for a kernel or for plain jax.numpy, its result.

A prefill is one kernel and, unless its own store of the state will do, a second that stores all states (`states`). An
update is one kernel: see `config.kernel_of`. Where TMA cannot address a dim, kernels get padded copies (`padded`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from oracle.contract import (
    ConvOutput,
    ConvWindowOutput,
    Unsupported,
    UpdateCall,
    check_backend,
    normalised,
)
from pallas_impl import (
    commit,
    config,
    gated_conv,
    parts,
    plain,
    plain_prologue,
    prefill,
    prologue,
    short_rows,
    states,
    trees,
    update,
    verify,
)
from pallas_impl.parts import BATCH, CHANNELS
from pallas_impl.records import Arrays, Options
from pallas_impl.tracing import refuse_transforms

CLIPS = hasattr(plgpu, "InterpretGPUParams")  # the interpreter of JAX 0.10 does not clip boxes as TMA does
BACKENDS = ("mosaic_gpu", "mosaic_gpu_interpret", "xla")


def run_prefill(call):
    """Runs an `FnCall`. Returns a ConvOutput."""
    call, sizes, backend = _checked(call, call.x)
    if (places := parts.places_of(call)) is not None:
        found = _run_parts(run_prefill, call, places, _roles(call), ("x", "conv_states"))
        if found is not None:
            return ConvOutput(*found)
    if parts.compiler_splits(backend, call.x):
        return _partitioned(_run_prefill, call, _roles(call), ("x", "conv_states"))
    return _run_prefill(call, sizes, backend)


def prefill_part(call):
    """Runs an `FnCall` on a kernel, which stores no state. Returns (out, `Arrays` behind it, `Options`) for other kernels."""
    call, sizes, backend = _checked(call, call.x)
    options = _prefill_options(call, sizes, backend)._replace(commit=False)
    arrays = _narrow(_arrays(call), sizes.batch, options)
    out, pool = _prefill(arrays, options)
    return out, arrays._replace(conv_states=pool), options._replace(interpret=interpreter(options.interpret))


def run_rows(arrays, activation, backend):
    """`out` [batch, seqlen, dim] on a kernel: x has rows of equal length, each of which begins with its window in `conv_states`.

    Nothing is stored. Where `document_marks` say that a document begins, a row begins anew with zeros.
    """
    (batch, seqlen, dim), width = arrays.x.shape, arrays.weight.shape[1]
    _refuse_symbols(dict(batch=batch, seqlen=seqlen, dim=dim, width=width))
    blocks = config.prefill_config(batch * seqlen, dim, batch, seqlen, "per_sequence")._replace(tail_blocks=0)
    options = Options(
        silu=activation is not None, always_state=True, kernel="prefill", config=blocks, seqlen=seqlen
    )
    options = options._replace(commit=False, interpret=backend == "mosaic_gpu_interpret")
    flat = arrays._replace(x=arrays.x.reshape(-1, dim))
    return _on_kernels(_launch_prefill, flat, options)[0].reshape(arrays.x.shape)


def _run_prefill(call, sizes, backend):
    return ConvOutput(*_prefill(_arrays(call), _prefill_options(call, sizes, backend)))


def _prefill_options(call, sizes, backend):
    options = _options(call, backend)._replace(
        apply_empty=call.empty_rows == "apply", snapshot_block_size=call.snapshot_block_size
    )
    if backend != "xla":
        schedule = call.max_seqlen, call.schedule
        blocks = config.prefill_config(sizes.tokens, sizes.dim, sizes.batch, *schedule)
        options = options._replace(kernel="prefill", config=blocks)
    return options


def run_update(call):
    """Runs an `UpdateCall`. Returns a ConvOutput, or with `window_out` a ConvWindowOutput."""
    call, sizes, backend = _checked(call, call.x)
    results = ("x", "conv_states") + ("window_out",) * (call.window_out is not None)
    if (places := parts.places_of(call)) is not None:
        found = _run_parts(run_update, call, places, _row_roles(call, sizes), results)
        if found is not None:
            return ConvOutput(*found) if call.window_out is None else ConvWindowOutput(*found)
    if parts.compiler_splits(backend, call.x):
        return _partitioned(_run_update, call, _row_roles(call, sizes), results)
    return _run_update(call, sizes, backend)


def _run_update(call, sizes, backend):
    out, pool, windows = _update(_arrays(call), _update_options(call, sizes, backend))
    return ConvOutput(out, pool) if call.window_out is None else ConvWindowOutput(out, pool, windows)


def _update_options(call, sizes, backend):
    options = _options(call, backend)._replace(always_state=True, commit=call.commit)
    if backend != "xla":
        options = options._replace(kernel=config.kernel_of(call), seqlen=sizes.seqlen)
        longest = sizes.seqlen if sizes.seqlen is not None else call.max_seqlen
        if options.kernel == "token":
            options = options._replace(config=config.update_config(sizes.batch, sizes.dim))
        elif config.has_long_rows(call, longest):
            # Rows of equal length need no flat schedule, and no offsets.
            schedule = "auto" if sizes.seqlen is None else "per_sequence"
            blocks = config.prefill_config(sizes.tokens, sizes.dim, sizes.batch, longest, schedule)
            options = options._replace(kernel="prefill", config=blocks)
    return options


def run_prologue(call):
    """Runs a `PrologueFnCall` or a `PrologueUpdateCall`. Returns a PrologueOutput, or a PrologueWindowOutput."""
    call, _, backend = _checked(call, call.x)
    if (places := parts.places_of(call)) is not None:
        # q, k and v share one axis, which no mesh splits into heads.
        parts.run_parts(_run_prologue, call, places, {}, ())
    if parts.compiler_splits(backend, call.x):
        return parts.partitioned(_run_prologue, call, {}, ((),) * plain_prologue.leaves(call))
    return _run_prologue(call)


def _run_prologue(call):
    return _prologue(
        {name: getattr(call, name) for name in call.ARRAYS}, call._replace(**dict.fromkeys(call.ARRAYS))
    )


@functools.partial(jax.jit, static_argnames=("call",))
def _prologue(arrays, call):
    call = call._replace(**arrays)
    sizes, conv, heads = call.check(), call.convolution(), plain_prologue.heads_of(call)
    is_update = isinstance(conv, UpdateCall)
    options_of = _update_options if is_update else _prefill_options
    options = options_of(conv, sizes.conv, call.backend)
    if prologue.is_fused(call, sizes.conv, options):
        options = options._replace(heads=heads, split_sizes=heads.sizes)
        flat = prologue.flat_gates(_arrays(call))
        out, pool, windows = _update(flat, options) if is_update else (*_prefill(flat, options), None)
        return plain_prologue.output(call, out, pool, windows)
    norm = None
    if prologue.has_norm_kernel(call, sizes.conv):
        norm = functools.partial(prologue.norm_heads, interpret=interpreter(options.interpret))
    return plain_prologue.composed(call, run_update if is_update else run_prefill, norm)


def run_gated(call):
    """Runs a `GatedConvFnCall` or a `GatedConvUpdateCall`. Returns a ConvOutput, or a ConvWindowOutput."""
    call, _, backend = _checked(call, call.bcx)
    if (places := parts.places_of(call)) is not None:
        parts.run_parts(_run_gated, call, places, {}, ())  # B, C and x share one axis
    if parts.compiler_splits(backend, call.bcx):
        leaves = 1 + (call.conv_states is not None) + (getattr(call, "window_out", None) is not None)
        return parts.partitioned(_run_gated, call, {}, ((),) * leaves)
    return _run_gated(call)


def _run_gated(call):
    return _gated(
        {name: getattr(call, name) for name in call.ARRAYS}, call._replace(**dict.fromkeys(call.ARRAYS))
    )


@functools.partial(jax.jit, static_argnames=("call",))
def _gated(arrays, call):
    call = call._replace(**arrays)
    sizes, conv = call.check().conv, call.convolution()
    is_update = isinstance(conv, UpdateCall)
    options = (_update_options if is_update else _prefill_options)(conv, sizes, call.backend)
    wide = tma_padding(sizes.dim, (call.bcx, call.conv_states), options.interpret)
    if wide or not gated_conv.is_fused(call, sizes, options):
        return gated_conv.composed(call, run_update if is_update else run_prefill)
    *gates, channel = gated_conv.offsets(call)
    options = options._replace(channel=channel, gates=tuple(gates))
    out, pool, _ = _update(_arrays(conv), options) if is_update else (*_prefill(_arrays(conv), options), None)
    return ConvOutput(out, pool)


def run_commit(call):
    """Runs a `CommitCall`. Returns the new pool."""
    call, _, backend = _checked(call, call.conv_states)
    roles = {"conv_states": (None, None, CHANNELS), "window_out": (None, None, None, CHANNELS)}
    if (places := parts.places_of(call)) is not None:
        found = parts.run_parts(_commit_only, call, places, roles, (roles["conv_states"],))
        if found is not None:
            return found[0]
    if parts.compiler_splits(backend, call.conv_states):
        return parts.partitioned(_run_commit, call, roles, (roles["conv_states"],))
    return _run_commit(call)


def _run_commit(call):
    kernel = None if call.backend == "xla" else "commit"
    options = Options(
        pad_slot_id=call.pad_slot_id, kernel=kernel, interpret=call.backend == "mosaic_gpu_interpret"
    )
    return _commit(_arrays(call), options)


def _commit_only(call):
    return (run_commit(call),)


# Arrays that are split over a mesh.


def _run_parts(run, call, places, roles, results):
    return parts.run_parts(run, call, places, roles, tuple(roles[name] for name in results))


def _partitioned(run, call, roles, results):
    def again(call):  # of a part, the sizes are others
        return run(call, call.check(), call.backend)

    out, *others = (roles[name] for name in results if getattr(call, name) is not None)
    leaves = (out,) * len(call.split_sizes or (1,)) + tuple(others)
    return parts.partitioned(again, call, roles, leaves)


def _roles(call):
    """What each axis of a call's arrays is, where channels alone may be split."""
    # A part of all channels would hold parts of all of these.
    channels = None if call.channel_offset is not None or call.split_sizes is not None else CHANNELS
    packed = (None,) * (len(call.x.shape) - 1) + (channels,)
    states = {"conv_states": (None, None, channels), "window_out": (None, None, None, channels)}
    return {"x": packed, "residual": packed, "weight": (channels, None), "bias": (channels,), **states}


def _row_roles(call, sizes):
    """As `_roles`; rows of equal length may be split too, where each has the slot and the buffer of its number."""
    roles = _roles(call)
    if sizes.seqlen is None:
        return roles
    names = ("x", "residual", "num_accepted_tokens", "cache_seqlens", "tree_parents")
    if call.cache_indices is None and call.write_indices is None and call.track_indices is None:
        names += ("conv_states",) * (sizes.num_slots == sizes.batch)
    if call.window_out is not None and call.window_indices is None:
        names += ("window_out",) * (call.window_out.shape[0] == sizes.batch)
    written = ("conv_states",) if call.window_out is None else ("conv_states", "window_out")
    if not set(written) <= set(names):
        return roles
    given = {name: getattr(call, name) for name in names if getattr(call, name) is not None}
    rows = {name: roles.get(name, (None,) * len(array.shape)) for name, array in given.items()}
    return roles | {name: (BATCH, *role[1:]) for name, role in rows.items()}


def _checked(call, on):
    """(call, sizes, backend): the call as it is taken below, its sizes, and the backend that runs it on `on`'s device."""
    sizes, backend = call.check(), resolve(call.backend, on)
    if call.validate:  # of the numbers that the caller gave
        call.check_values(sizes, on_host)
    call = normalised(call)._replace(backend=backend, validate=False)
    if backend != "xla":
        _refuse_symbols(getattr(sizes, "conv", sizes)._asdict())
    return call, sizes, backend


def _refuse_symbols(sizes):
    for name, size in sizes.items():
        if size is not None and not isinstance(size, int):
            raise Unsupported(
                f"{name}: a kernel is made for one size; expected an integer or backend='xla', got {size}"
            )


def _arrays(call):
    return Arrays(**{name: getattr(call, name) for name in call.ARRAYS})


def _options(call, backend):
    return Options(
        silu=call.activation is not None,
        pad_slot_id=call.pad_slot_id,
        state_layout=call.state_layout,
        channel=call.channel_offset or 0,
        split_sizes=call.split_sizes,
        interpret=backend == "mosaic_gpu_interpret",
    )


# Backends.


def resolve(backend, x):
    """The name of the backend that runs; raises where the one asked for cannot run on x's device."""
    check_backend(backend, BACKENDS)
    traced = isinstance(x, jax.core.Tracer)
    if backend == "auto":
        return "mosaic_gpu" if _runs_mosaic(_device(x)) else "xla"
    # A trace may be lowered for another machine, so only a call on real arrays is refused.
    if backend == "mosaic_gpu" and not traced and not _runs_mosaic(_device(x)):
        raise Unsupported(
            f"backend: 'mosaic_gpu' needs an NVIDIA GPU of compute capability 9.0 or newer, got {_device(x)}"
        )
    return backend


def interpreter(interpret):
    """False, or the parameters of Pallas' GPU interpreter; JAX 0.10 has them only under a private name."""
    if not interpret:
        return False
    if CLIPS:
        params = plgpu.InterpretGPUParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    # A box that ends past an array's end is clipped by TMA.
    return params(out_of_bounds_reads="uninitialized")


def on_host(name, array):
    """The values of an array as a list, for `validate`; None stays None."""
    if array is None:
        return None
    if isinstance(array, jax.core.Tracer):
        raise Unsupported(f"validate: expected concrete arrays to read, got a tracer for {name}")
    return np.asarray(array).tolist()


def _device(x):
    """The device of an array; of a tracer or a NumPy array, the default device."""
    if not isinstance(x, jax.core.Tracer) and isinstance(x, jax.Array):
        return min(x.devices(), key=lambda d: d.id)
    default = jax.config.jax_default_device
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def _runs_mosaic(device):
    if device.platform not in ("gpu", "cuda") or "rocm" in device.client.platform_version.lower():
        return False
    capability = str(getattr(device, "compute_capability", "0.0"))
    return capability[:1].isdigit() and float(capability) >= 9.0


# Programs.


@functools.partial(jax.jit, static_argnames=("options",))
def _prefill(arrays, options):
    """Returns (out, conv_states)."""
    arrays = jax.tree.map(jnp.asarray, arrays)  # under jax.disable_jit they come as they are
    x, starts = arrays.x, arrays.query_start_loc
    kernel = options.kernel is not None and x.size and starts.shape[0] > 1
    if not kernel or starts.dtype != jnp.int32:  # the kernels clamp them
        arrays = arrays._replace(query_start_loc=plain.offsets(starts, x.shape[0]))
    run = functools.partial(_on_kernels, _launch_prefill) if kernel else plain.run
    return run(arrays, options)[:2]


@functools.partial(jax.jit, static_argnames=("options",))
def _update(arrays, options):
    """Returns (out, conv_states, window_out)."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    shape, starts, dim = arrays.x.shape[:-1], arrays.query_start_loc, arrays.weight.shape[0]
    batch = shape[0] if starts is None else starts.shape[0] - 1
    kernel = options.kernel is not None and arrays.x.size and batch
    arrays = arrays._replace(x=arrays.x.reshape(-1, arrays.x.shape[-1]))
    if arrays.residual is not None:
        arrays = arrays._replace(residual=arrays.residual.reshape(-1, dim))
    tokens = arrays.x.shape[0]
    if starts is not None and (starts.dtype != jnp.int32 or not kernel):
        arrays = arrays._replace(query_start_loc=plain.offsets(starts, tokens))
    if kernel:
        out, pool, windows = _on_kernels(_launch_update, arrays, options)
    else:
        if (
            plain.WIDENS_SCATTERS
        ):  # that compiler widens the reshape as well, unless it is a tensor of its own
            arrays = arrays._replace(x=jax.lax.optimization_barrier(arrays.x))
        if starts is None:
            arrays = arrays._replace(query_start_loc=plain.equal_rows(batch, tokens))
        out, pool, windows = plain.run(arrays, options)
    return jax.tree.map(lambda out: out.reshape(*shape, out.shape[-1]), out), pool, windows


@functools.partial(jax.jit, static_argnames=("options",))
def _commit(arrays, options):
    """Returns the new pool."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    pool, windows = arrays.conv_states, arrays.window_out
    if windows.size == 0 or pool.shape[0] == 0 or arrays.accepted_steps.shape[0] == 0:
        return pool
    dim = pool.shape[2]
    if options.kernel is None or tma_padding(dim, (pool, windows), options.interpret):
        return plain.commit(arrays, options)
    (arrays,) = refuse_transforms(arrays)
    options = options._replace(block_d=config.choose_block_d(dim), interpret=interpreter(options.interpret))
    return commit.launch(_narrow(arrays, arrays.accepted_steps.shape[0], options), options)


def _launch_prefill(arrays, options):
    if short_rows.takes(arrays, options):
        return *short_rows.launch(arrays, options), None
    out, pool = prefill.launch(arrays, options, prologue.finish_of(arrays, options))
    width, front = arrays.weight.shape[1], options.state_layout == "front"
    if (
        not options.own_state
        and options.commit
        and pool is not None
        and pool.size
        and (width > 1 or not front)
    ):
        options = options._replace(block_d=config.choose_block_d(arrays.weight.shape[0]))
        pool = states.launch(arrays._replace(conv_states=pool), options, after=jax.tree.leaves(out)[0])
    return out, pool, None


def _launch_update(arrays, options):
    if options.kernel == "token":
        return *update.launch(arrays, options, prologue.finish_of(arrays, options)), None
    if options.kernel == "prefill":
        return *prefill.launch(arrays, options, prologue.finish_of(arrays, options)), None
    return (trees if options.kernel == "tree" else verify).launch(arrays, options)


def _on_kernels(launch, arrays, options):
    """Runs `launch(arrays, options)` on arrays and with options that kernels take. Returns (out, pool, window_out)."""
    (arrays,) = refuse_transforms(arrays)
    split_sizes = options.split_sizes
    options = options._replace(
        own_state=_stores_in_front(arrays, options), interpret=interpreter(options.interpret)
    )
    arrays, options = _fit(arrays, options)
    out, pool, windows = padded(launch, arrays, options)
    if split_sizes is not None and not isinstance(out, tuple):
        out = plain.split_out(out, options._replace(split_sizes=split_sizes))
    return out, pool, windows


def _stores_in_front(arrays, options):
    """Whether all that a call stores of its rows is a window in front of the slot that each reads."""
    others = (arrays.write_indices, arrays.snapshot_indices, arrays.track_indices)
    in_front = options.state_layout == "front" and options.commit and not options.apply_empty
    return in_front and all(other is None for other in others)


def _fit(arrays, options):
    """Decides how x is read and `out` written: (arrays, options).

    Channels that do not begin at a multiple of 16 bytes, or in rows that do not, are cut out of x first; parts
    that are no multiples of a tile's channels are cut from one result.
    """
    x, dim, sizes = arrays.x, arrays.weight.shape[0], options.split_sizes
    aligned = 16 // x.dtype.itemsize
    if options.channel % aligned or x.shape[1] % aligned:
        arrays = arrays._replace(x=plain.of_channels(x, dim, options))
        options = options._replace(channel=0)
    widest = config.choose_block_d(dim) if options.config is None else options.config.block_d
    fitting = [
        block_d for block_d in (widest, 128) if sizes is None or not any(size % block_d for size in sizes)
    ]
    if not fitting:
        options = options._replace(split_sizes=None)
    block_d = fitting[0] if fitting else widest
    if options.config is not None:
        options = options._replace(config=options.config._replace(block_d=block_d))
    return arrays, options._replace(block_d=block_d)


def padded(launch, arrays, options):
    """Runs `launch(arrays, options)` on arrays that TMA can address. Returns (out, pool, window_out).

    A dim whose rows are no multiple of 16 bytes, or too short, is padded, which copies x and out; of the pool only the
    windows of this batch are, never the pool itself. The kernel leaves new windows in that copy, from where they go
    to their slots; whatever else a call stores, XLA gathers and scatters.
    """
    (dim, width), pool, starts = arrays.weight.shape, arrays.conv_states, arrays.query_start_loc
    batch = arrays.x.shape[0] // options.seqlen if starts is None else starts.shape[0] - 1
    extra = tma_padding(dim, (arrays.x, pool, arrays.residual, arrays.window_out), options.interpret)
    if not extra:
        return launch(_narrow(arrays, batch, options), options)

    tokens = arrays.x.shape[0]
    clamped = plain.equal_rows(batch, tokens) if starts is None else plain.offsets(starts, tokens)
    given = arrays._replace(x=plain.of_channels(arrays.x, dim, options), query_start_loc=clamped)
    slots, live, windows = plain.rows_of(given, width - 1, options)
    own = pool is not None and options.own_state and arrays.window_out is None
    counts = arrays.num_accepted_tokens if own else None
    if counts is not None:
        windows = plain.read_windows(pool, slots, live, pool.shape[1])
    wide = functools.partial(_pad_last, extra=extra)
    copies = Arrays(
        x=wide(given.x),
        weight=jnp.pad(arrays.weight, ((0, extra), (0, 0))),
        bias=wide(arrays.bias),
        query_start_loc=starts,
        has_initial_state=arrays.has_initial_state,
        num_accepted_tokens=counts,
        tree_parents=arrays.tree_parents,
        residual=wide(arrays.residual),
        document_marks=arrays.document_marks,
    )
    if pool is not None:
        rows = jnp.where(live, jnp.arange(batch, dtype=jnp.int32), -1)
        copies = copies._replace(conv_states=wide(windows), cache_indices=rows)
    out, new, _ = launch(
        _narrow(copies, batch, options),
        options._replace(
            pad_slot_id=-1,
            channel=0,
            split_sizes=None,
            state_layout="front",
            apply_empty=False,
            own_state=own,
            commit=own,
        ),
    )
    out, window_out = out[:, :dim], plain.store_windows(given, live, windows, options)
    if own:
        pool = plain.write_windows(pool, jnp.where(clamped[1:] > clamped[:-1], slots, -1), new[:, :, :dim])
    elif pool is not None and options.commit:
        pool = plain.store_states(given, slots, windows, options)
    return out, pool, window_out


def tma_padding(dim, arrays, interpret):
    """By how many channels the arrays (or None) must be padded so that TMA can address them."""
    if interpret and not CLIPS:
        return -dim % config.choose_block_d(dim)
    return config.tma_dim(dim, tuple(a.dtype.itemsize for a in arrays if a is not None)) - dim


def _pad_last(array, extra):
    if array is None:
        return None
    padding = [(0, 0)] * (array.ndim - 1) + [(0, extra)]
    return plain.moved(lambda _, array: jnp.pad(array, padding), (), array)


def _narrow(arrays, batch, options):
    """The integer arrays as int32 (`num_computed_tokens` as it is); a conversion is a small kernel of its own."""
    is_wide = lambda array: array is not None and array.dtype != jnp.int32  # noqa: E731
    ends = {}
    if arrays.conv_states is not None:
        names = ("cache_indices", "write_indices", "snapshot_indices", "track_indices")
        ends |= dict.fromkeys(names, (arrays.conv_states.shape[0], options.pad_slot_id))
    if arrays.window_out is not None:
        ends |= dict(
            window_indices=(arrays.window_out.shape[0], options.pad_slot_id),
            accepted_steps=(arrays.window_out.shape[1], -1),
        )
    new = {
        name: plain.live_slots(getattr(arrays, name), batch, *end)
        for name, end in ends.items()
        if is_wide(getattr(arrays, name))
    }
    state_len = 0 if arrays.conv_states is None else arrays.conv_states.shape[1]
    if is_wide(arrays.cache_seqlens):
        new["cache_seqlens"] = plain.ring_phase(arrays.cache_seqlens, state_len)
    if is_wide(arrays.num_accepted_tokens):
        new["num_accepted_tokens"] = plain.first_columns(arrays.num_accepted_tokens, state_len) + 1
    if is_wide(arrays.track_lengths):
        new["track_lengths"] = plain.natural(arrays.track_lengths)
    if is_wide(arrays.tree_parents):
        new["tree_parents"] = plain.node_parents(arrays.tree_parents)
    return arrays._replace(**new)
