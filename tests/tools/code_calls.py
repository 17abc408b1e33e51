"""Calls of the public operations whose machine code is looked at, without data: what `same_code.py` compiles.

They name arguments of the contract alone, so they are calls of both twins, before and after any change of the inside.
"""

from typing import Any, NamedTuple

TWINS = ("triton", "pallas")
T = ("triton",)  # a layout of x is nothing that JAX has


class Array(NamedTuple):
    """An argument's shape, dtype and layout.

    "dense"; "channel_first": the last axis but one has unit stride; "sliced": so has it, in longer rows; "expanded":
    all strides are 0; "odd": dense, one element off a boundary of 16 bytes.
    """

    shape: tuple
    dtype: str = "bfloat16"
    layout: str = "dense"


class Call(NamedTuple):
    """A call: name of a public operation, its arrays by argument, its other arguments, the twins it is a call of.

    With "gradient " before the name of a differentiable operation: forward and backward.
    """

    operation: str
    arrays: dict[str, Array]
    options: dict[str, Any]
    twins: tuple[str, ...] = TWINS

    def options_on(self, backend):
        """The other arguments, where the operation runs on this backend."""
        return (
            self.options
            if self.operation == "tree_parents_from_links"
            else self.options | {"backend": backend}
        )


def indices(*shape):
    return Array(shape, "int32")


def prefill(
    tokens=16384, batch=8, dim=8192, width=4, columns=None, dtype="bfloat16", pool=None, wide=0, layout="dense",
    without=(), twins=TWINS, **given,
):  # fmt: skip
    """A prefill of `batch` rows; `given`: more arrays and options, `without`: arguments to leave out."""
    arrays = dict(
        x=Array((tokens, dim + wide), dtype, layout),
        weight=Array((dim, width), dtype),
        bias=Array((dim,), dtype),
        conv_states=Array((256, width - 1 if columns is None else columns, dim), pool or dtype),
        query_start_loc=indices(batch + 1),
        cache_indices=indices(batch),
        has_initial_state=Array((batch,), "bool"),
    )
    return _call("causal_conv1d_fn", arrays, dict(activation="silu"), without, twins, given)


def update(
    batch=256, seqlen=None, dim=8192, width=4, columns=None, dtype="bfloat16", pool=None, wide=0, packed=None,
    without=(), twins=TWINS, **given,
):  # fmt: skip
    """A step of one token a row, of `seqlen`, or of `packed` tokens a row at most."""
    middle = () if seqlen is None else (seqlen,)
    first = batch if packed is None else batch * packed
    arrays = dict(
        x=Array((first, *middle, dim + wide), dtype),
        weight=Array((dim, width), dtype),
        bias=Array((dim,), dtype),
        conv_states=Array((2048, width - 1 if columns is None else columns, dim), pool or dtype),
        cache_indices=indices(batch),
    )
    options = dict(activation="silu")
    if packed is not None:
        arrays["query_start_loc"] = indices(batch + 1)
        options["max_seqlen"] = packed
    return _call("causal_conv1d_update", arrays, options, without, twins, given)


def verify(batch=64, steps=4, dim=8192, width=4, dtype="bfloat16", pack=False, windows=None, **given):
    """A step that keeps the window after every token, in dtype `windows` or `dtype`, and commits none."""
    kept = Array((batch, steps, width - 1, dim), windows or dtype)
    tokens = dict(packed=steps) if pack else dict(seqlen=steps)
    given = dict(commit=False, window_out=kept, window_indices=indices(batch)) | given
    return update(batch, dim=dim, width=width, dtype=dtype, **tokens, **given)


def commit(batch=64, steps=4, dim=8192, width=4, pool="bfloat16", **given):
    arrays = dict(
        conv_states=Array((256, width - 1, dim), pool),
        window_out=Array((batch, steps, width - 1, dim)),
        accepted_steps=indices(batch),
        cache_indices=indices(batch),
        window_indices=indices(batch),
    )
    return _call("commit_windows", arrays, {}, (), TWINS, given)


def gradient(
    tokens=16384,
    batch=8,
    seqlen=None,
    dim=8192,
    width=4,
    dtype="bfloat16",
    states=True,
    layout="dense",
    **given,
):
    """Forward and backward; `seqlen` makes x dense."""
    shape = (tokens, dim) if seqlen is None else (batch, seqlen, dim)
    arrays = dict(x=Array(shape, dtype, layout), weight=Array((dim, width), dtype), bias=Array((dim,), dtype))
    if states:
        arrays["initial_states"] = Array((batch, width - 1, dim), dtype)
    if seqlen is None:
        arrays["query_start_loc"] = indices(batch + 1)
    return _call(
        "gradient causal_conv1d",
        arrays,
        dict(activation="silu"),
        (),
        TWINS if layout == "dense" else T,
        given,
    )


def backward(dout=None, **given):
    """The backward pass alone, of PyTorch's operator; `dout`: its array, else as x; arguments of `gradient`."""
    call = gradient(**given)
    x, states = call.arrays["x"], call.arrays.get("initial_states")
    arrays = call.arrays | dict(dout=dout or x, **({} if states is None else {"dfinal_states": states}))
    return call._replace(operation="backward", arrays=arrays, twins=T)


HEADS = dict(num_k_heads=16, num_v_heads=32, head_k_dim=128, head_v_dim=128)


def front(call, channel=False, **given):
    """The prologue of the gated delta rule in place of the plain operation; `channel`: a gate a channel of k."""
    leading, heads = call.arrays["x"].shape[:-1], HEADS["num_v_heads"]
    last = (heads, HEADS["head_k_dim"]) if channel else (heads,)
    gates = dict(
        a=Array((*leading, *last)), b=Array((*leading, heads)), A_log=Array((heads,), "float32"), dt_bias=Array(last)
    )  # fmt: skip
    operation = call.operation.replace("causal_conv1d", "gated_delta_prologue")
    return call._replace(
        operation=operation, arrays=call.arrays | gates, options=call.options | HEADS | given
    )


def gated(call):
    """The gated short convolution in place of the plain operation."""
    *leading, dim = call.arrays["x"].shape
    arrays = {"bcx": Array((*leading, 3 * dim))} | {n: a for n, a in call.arrays.items() if n != "x"}
    options = call.options | dict(activation=None)
    return call._replace(
        operation=call.operation.replace("causal_conv1d", "gated_short_conv"), arrays=arrays, options=options
    )


REQUIRED = {"causal_conv1d_fn": ("bias", "conv_states"), "causal_conv1d_update": ("bias",)}  # or None


def _call(operation, arrays, options, without, twins, given):
    arrays = arrays | {name: value for name, value in given.items() if isinstance(value, Array)}
    options = options | {name: value for name, value in given.items() if not isinstance(value, Array)}
    kept = {name: array for name, array in arrays.items() if name not in without}
    options |= {name: None for name in REQUIRED.get(operation, ()) if name not in kept}
    return Call(operation, kept, options, twins)


QKV = (2048, 2048, 4096)
POOL = ("conv_states", "cache_indices", "has_initial_state")
CALLS = {
    "prefill flat": prefill(schedule="flat"),
    "prefill per_sequence": prefill(schedule="per_sequence", max_seqlen=2048),
    "prefill small": prefill(tokens=33, batch=5, max_seqlen=17),
    "prefill small flat": prefill(tokens=33, batch=5, schedule="flat"),
    "prefill short rows": prefill(tokens=2176, batch=129),
    "prefill short rows per_sequence": prefill(
        tokens=2176, batch=129, schedule="per_sequence", max_seqlen=2048
    ),
    "prefill one token a row": prefill(tokens=4096, batch=4096, dim=2048),
    "prefill many rows": prefill(
        tokens=200000, batch=70000, dim=1024, schedule="per_sequence", max_seqlen=64
    ),
    "prefill rows of 1 token": prefill(tokens=4096, batch=4096, max_seqlen=1),
    "prefill rows of 5 tokens": prefill(tokens=7500, batch=1500, max_seqlen=5),
    "prefill rows of 16 tokens": prefill(
        tokens=8000, batch=500, max_seqlen=16, residual=Array((8000, 8192)), split_sizes=QKV
    ),
    "prefill rows of 8 tokens in a ring": prefill(
        tokens=160000,
        batch=70000,
        dim=1280,
        max_seqlen=8,
        columns=5,
        state_layout="ring",
        cache_seqlens=indices(70000),
    ),
    "prefill float32": prefill(dtype="float32"),
    "prefill float16 width 3": prefill(dtype="float16", width=3),
    "prefill width 1": prefill(width=1),
    "prefill width 2 no activation": prefill(width=2, activation=None),
    "prefill width 5": prefill(width=5),
    "prefill width 8": prefill(width=8),
    "prefill no pool": prefill(without=POOL),
    "prefill no bias": prefill(without=("bias",)),
    "prefill no flags": prefill(without=("has_initial_state",)),
    "prefill pool float32": prefill(pool="float32"),
    "prefill dim 640": prefill(dim=640),
    "prefill dim 8190": prefill(dim=8190),
    "prefill channel-first": prefill(layout="channel_first", twins=T),
    "prefill channel-first uneven": prefill(tokens=16381, layout="channel_first", twins=T),
    "prefill channel-first float32 width 8": prefill(
        dtype="float32", width=8, layout="channel_first", twins=T
    ),
    "prefill channel-first short rows": prefill(tokens=2176, batch=129, layout="channel_first", twins=T),
    "prefill channel-first parts": prefill(
        layout="channel_first",
        twins=T,
        residual=Array((16384, 8192), layout="channel_first"),
        split_sizes=QKV,
    ),
    "prefill channel-first ring": prefill(
        layout="channel_first", twins=T, columns=5, state_layout="ring", cache_seqlens=indices(8)
    ),
    "prefill off 16 bytes": prefill(twins=T)._replace(
        arrays=prefill().arrays | dict(x=Array((16384, 8192), layout="odd"))
    ),
    "prefill parts": prefill(split_sizes=QKV),
    "prefill residual": prefill(residual=Array((16384, 8192))),
    "prefill part of a wider x": prefill(wide=4096, channel_offset=1024, split_sizes=QKV),
    "prefill back": prefill(columns=4, state_layout="back", write_indices=indices(8)),
    "prefill ring": prefill(columns=5, state_layout="ring", cache_seqlens=indices(8)),
    "prefill snapshots": prefill(
        snapshot_indices=indices(8, 64), snapshot_block_size=64, num_computed_tokens=indices(8)
    ),
    "prefill tracks": prefill(track_indices=indices(8), track_lengths=indices(8), empty_rows="apply"),
    "update 1 row": update(batch=1),
    "update 256 rows": update(),
    "update 1024 rows": update(batch=1024),
    "update many rows": update(batch=140000, dim=256),
    "update float32 width 3": update(dtype="float32", width=3),
    "update width 8": update(width=8),
    "update dim 8190": update(dim=8190),
    "update pool float32": update(pool="float32"),
    "update no bias no slots": update(without=("bias", "cache_indices")),
    "update part of a wider x": update(wide=4096, channel_offset=1024, split_sizes=QKV),
    "update residual": update(residual=Array((256, 8192))),
    "update 4 tokens": update(batch=64, seqlen=4),
    "update packed": update(batch=64, packed=4),
    "update rolling": update(batch=64, seqlen=4, columns=9, num_accepted_tokens=indices(64)),
    "update rolling packed": update(batch=64, packed=4, columns=9, num_accepted_tokens=indices(64)),
    "update rolling writes": update(
        batch=64, seqlen=4, columns=9, num_accepted_tokens=indices(64), write_indices=indices(64)
    ),
    "update back": update(columns=4, state_layout="back"),
    "update ring": update(columns=4, state_layout="ring", cache_seqlens=indices(256)),
    "update writes and tracks": update(write_indices=indices(256), track_indices=indices(256)),
    "verify": verify(),
    "verify commits": verify(commit=True),
    "verify packed": verify(pack=True),
    "verify width 8": verify(width=8),
    "verify float32": verify(dtype="float32"),
    "verify ring": verify(columns=9, state_layout="ring", cache_seqlens=indices(64)),
    "verify parts residual": verify(split_sizes=QKV, residual=Array((64, 4, 8192))),
    "tree": verify(steps=8, tree_parents=indices(64, 8)),
    "tree width 8": verify(steps=8, width=8, tree_parents=indices(64, 8)),
    "commit": commit(),
    "commit pool float32": commit(pool="float32"),
    "documents": Call(
        "short_conv",
        dict(
            x=Array((8, 2048, 2048)),
            weight=Array((2048, 4)),
            bias=Array((2048,)),
            segment_ids=indices(8, 2048),
        ),
        dict(activation="silu", want_cache=False),
    ),
    "links": Call(
        "tree_parents_from_links", dict(next_token=indices(64, 8), next_sibling=indices(64, 8)), {}
    ),
    "prologue prefill": front(prefill(max_seqlen=2048), q_scale=0.5),
    "prologue prefill flat": front(prefill(schedule="flat"), channel=True),
    "prologue prefill unrounded": front(prefill(max_seqlen=2048), norm_rounding="none"),
    "prologue update": front(update(), q_scale=0.5),
    "prologue update 1 row": front(update(batch=1), channel=True, lower_bound=-5.0),
    "prologue update 4 tokens": front(update(batch=64, seqlen=4)),
    "gated prefill": gated(prefill(dim=2048, width=3, max_seqlen=2048)),
    "gated update": gated(update(dim=2048, width=3)),
    "gradient flat": gradient(schedule="flat"),
    "gradient per_sequence": gradient(schedule="per_sequence", max_seqlen=2048, states=False),
    "gradient dense": gradient(batch=4, seqlen=2048, dim=4096),
    "gradient float32 width 8": gradient(dtype="float32", width=8),
    "gradient of the prologue": front(gradient(max_seqlen=2048), q_scale=0.5),
    "gradient of the gated convolution": gated(gradient(dim=2048, width=3, max_seqlen=2048)),
    "gradient channel-first": gradient(batch=4, seqlen=2048, dim=4096, layout="channel_first"),
    "gradient channel-first packed": gradient(tokens=4096, dim=2048, layout="channel_first"),
}
