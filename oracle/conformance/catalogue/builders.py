"""What makes the catalogue's cases: one function an operation, with the defaults that most cases share."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from oracle.conformance.cases import Case

FN, UPDATE, BACKWARD = "causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_backward"
PREFILLS = {FN: FN, "front": "gated_delta_prologue_fn", "gated": "gated_short_conv_fn"}
BACKWARDS = {"front": "gated_delta_prologue_backward", "gated": "gated_short_conv_backward"}
X_OF = {BACKWARDS["gated"]: "bcx"}
STEPS = {UPDATE: UPDATE, "front": "gated_delta_prologue_update", "gated": "gated_short_conv_update"}
SEED_LENGTHS = (1, 9, 2, 17, 4)
ALL_LENGTHS = (0, 1, 2, 3, 4, 8, 9, 17)
INTEGER_AXES = (
    "cache_seqlens", "write_indices", "snapshot_indices", "num_computed_tokens", "track_indices", "track_lengths",
    "window_indices", "tree_parents", "accepted_steps", "next_token", "next_sibling",
)  # fmt: skip
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
BIG = 2**31 - 1
TREE = (-1, 0, 0, 1, 1, 4, -1, 2)  # two levels of forks, a long branch, and a second root
PREFIXES = {FN: "", UPDATE: ""} | {
    op: f"{kind}-" for kinds in (PREFILLS, STEPS) for kind, op in kinds.items() if kind != op
}
"""Of each forward operation, what the ids of its cases begin with."""
Make = Callable[..., Case]


def spread(batch: int) -> tuple[int, ...]:
    """Slots that are permuted, start above 0 and reach above the batch size: 2*batch, .., 4, 2."""
    return tuple(2 * (batch - i) for i in range(batch))


def fn(
    name: str,
    flags: str = "",
    *,
    lengths: tuple[int, ...] = SEED_LENGTHS,
    tail: int = 0,
    dim: int = 16,
    width: int = 4,
    slots: Any = "spread",
    num_slots: Any = "fit",
    state_len: int | None = None,
    has: Any = "alternate",
    args: dict[str, Any] | None = None,
    op: str = FN,
    **rest: Any,
) -> Case:
    """A prefill. Defaults: the seed's five rows, bfloat16, bias, every second row with state, no activation.

    `args` are serving arguments as axes, see `cases.Case`.
    """
    batch = len(lengths)
    slots = spread(batch) if slots == "spread" else slots
    if num_slots == "fit":
        num_slots = 2 * batch + 2
    if has == "alternate":
        has = tuple(i % 2 == 0 for i in range(batch))
    axes = {
        "lengths": lengths, "tail": tail, "dim": dim, "width": width, "slots": slots, "num_slots": num_slots,
        "state_len": (width - 1 if state_len is None else state_len), "has": has,
    }  # fmt: skip
    return _case(f"{PREFIXES[op]}fn/{name}", op, axes | (args or {}), flags, **rest)


def update(
    name: str,
    flags: str = "",
    *,
    batch: int = 4,
    seqlen: int | None = None,
    dim: int = 16,
    width: int = 4,
    slots: Any = "spread",
    num_slots: Any = "fit",
    state_len: int | None = None,
    lengths: tuple[int, ...] | None = None,
    counts: tuple[int, ...] | None = None,
    options: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    """A decode step. Defaults: four rows of one token (x has two axes), bfloat16, bias, no activation.

    With `lengths` the rows are packed, with `counts` slots roll, by default as wide as counts and lengths need.
    `args` are serving arguments as axes, `tail` the tokens behind packed rows.
    """
    args, tail, op = rest.pop("args", None), rest.pop("tail", 0), rest.pop("op", UPDATE)
    options = dict(options or {})
    if lengths is not None:
        batch = len(lengths)
    longest = seqlen or 1 if lengths is None else max(lengths, default=0)
    if counts is not None:
        if lengths is not None:
            options.setdefault("max_seqlen", longest)
        if state_len is None:
            state_len = max(width - 2 + max(longest, 1, *counts), 0)
    slots = spread(batch) if slots == "spread" else slots
    axes = {
        "batch": batch, "seqlen": seqlen, "dim": dim, "width": width, "slots": slots,
        "num_slots": 2 * batch + 2 if num_slots == "fit" else num_slots,
        "state_len": width - 1 if state_len is None else state_len,
    }  # fmt: skip
    if lengths is not None:
        axes |= {"lengths": lengths, "tail": tail}
    if counts is not None:
        axes["counts"] = counts
    return _case(f"{PREFIXES[op]}update/{name}", op, axes | (args or {}), flags, options=options, **rest)


def front(
    name: str, flags: str = "", *, heads: tuple[int, int, int, int] = (2, 4, 4, 6), **rest: Any
) -> Case:
    """A prologue. Defaults: two heads of q and k with 4 channels, four of v with 6, all gates, SiLU; a prefill.

    `heads` are num_k_heads, num_v_heads, head_k_dim and head_v_dim; `step` makes a decode step, `channel` a gate for
    each channel of k, `gates` names those of a, b, A_log and dt_bias that are given.
    """
    step = rest.pop("step", False)
    make, op = (update, STEPS["front"]) if step else (fn, PREFILLS["front"])
    return make(name, flags, op=op, **{"group": "fronts", **_with_heads(heads, rest)})


def _with_heads(heads: tuple[int, int, int, int], rest: dict[str, Any]) -> dict[str, Any]:
    """What describes a prologue's case, with dim, and dtypes and options of its heads and gates."""
    channel = rest.pop("channel", False)
    gates = rest.pop("gates", ("a", "b", "A_log", "dt_bias"))
    numbers = dict(zip(("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"), heads, strict=True))
    dtype = rest.get("dtype", "bfloat16")
    kinds: dict[str, Any] = {"a": dtype, "b": dtype, "A_log": "float32", "dt_bias": "float32"}
    kinds = {kind: kinds[kind] if kind in gates else None for kind in kinds} | rest.pop("dtypes", {})
    options = numbers | {"activation": "silu"} | rest.pop("options", {})
    args = {"channel_gate": channel} | rest.pop("args", {})
    dim = 2 * heads[0] * heads[2] + heads[1] * heads[3]
    return {"dim": dim, "dtypes": kinds, "options": options, "args": args, **rest}


def gated(name: str, flags: str = "", *, step: bool = False, **rest: Any) -> Case:
    """A gated short convolution. Defaults: as for the plain operations; a prefill, or with `step` a decode step."""
    make, op = (update, STEPS["gated"]) if step else (fn, PREFILLS["gated"])
    return make(name, flags, op=op, **{"group": "fronts", "dim": 10, "width": 3, **rest})


def commit(
    name: str,
    flags: str = "",
    *,
    steps: tuple[int, ...] = (0, 2, 1),
    dim: int = 8,
    width: int = 4,
    slots: Any = "spread",
    num_slots: int = 8,
    state_len: int | None = None,
    windows: tuple[int, int] = (6, 3),
    buffers: tuple[int, ...] | None = (4, 0, 5),
    **rest: Any,
) -> Case:
    """A commit of accepted steps. Defaults: three rows, bfloat16, permuted slots and buffers."""
    axes = {
        "dim": dim, "width": width, "slots": spread(len(steps)) if slots == "spread" else slots,
        "num_slots": num_slots, "state_len": width - 1 if state_len is None else state_len,
        "accepted_steps": steps, "window_out": windows, "window_indices": buffers,
    }  # fmt: skip
    return _case("commit/" + name, "commit_windows", axes, flags, **rest)


def links(name: str, flags: str, next_token: Any, next_sibling: Any, **rest: Any) -> Case:
    """A conversion of a draft tree's links to parents."""
    axes = {"next_token": next_token, "next_sibling": next_sibling}
    return _case("links/" + name, "tree_parents_from_links", axes, flags, **rest)


def backward(
    name: str,
    flags: str = "",
    *,
    lengths: tuple[int, ...] = (1, 9, 2, 0, 17, 3, 1, 0, 4),
    tail: int = 0,
    dim: int = 8,
    width: int = 4,
    dense: bool = False,
    dtype: str = "float32",
    initial: bool = True,
    final: bool = True,
    dtypes: dict[str, Any] | None = None,
    op: str = BACKWARD,
    **rest: Any,
) -> Case:
    """A backward pass. Defaults: short rows, float32, bias, SiLU, an initial state, a gradient of the final states.

    Of the operations of fronts too; `without` names incoming gradients that are None.
    """
    axes = {"lengths": lengths, "tail": tail, "dim": dim, "width": width, "dense": dense}
    args, without = rest.pop("args", {}), rest.pop("without", ())
    kinds: dict[str, Any] = dict.fromkeys((X_OF.get(op, "x"), "weight", "bias"), dtype)
    kinds |= {"initial_states": dtype if initial else None}
    kinds |= {"query_start_loc": None if dense else "int32"} | (dtypes or {})
    x = kinds[X_OF.get(op, "x")]
    if op == BACKWARDS["front"]:
        kinds |= dict.fromkeys(("dq", "dk", "dv"), x)
        kinds |= {name: kinds[of] and "float32" for name, of in (("dg", "a"), ("dbeta", "b"))}
    else:
        kinds["dout"] = x
    kinds |= {"dfinal_states": (kinds["initial_states"] or x) if final else None} | dict.fromkeys(without)
    rest = {"group": "gradients"} | ({"activation": "silu"} if op == BACKWARD else {}) | rest
    prefix = {of: f"{kind}-" for kind, of in BACKWARDS.items()}.get(op, "")
    return _case(f"{prefix}backward/{name}", op, axes | args, flags, dtypes=kinds, **rest)


def front_backward(
    name: str, flags: str = "", *, heads: tuple[int, int, int, int] = (2, 4, 4, 6), **rest: Any
) -> Case:
    """A backward pass of the prologue. Defaults: as of `front` and `backward`, three short rows and an empty one."""
    rest = {"lengths": (1, 6, 0, 3), "dtype": "float32", **rest}
    return backward(name, flags, op=BACKWARDS["front"], **_with_heads(heads, rest))


def gated_backward(name: str, flags: str = "", **rest: Any) -> Case:
    """A backward pass of the gated convolution. Defaults: as of `gated` and `backward`."""
    rest = {"lengths": (1, 6, 0, 3), "dim": 10, "width": 3, **rest}
    return backward(name, flags, op=BACKWARDS["gated"], **rest)


def _case(
    name: str,
    op: str,
    axes: dict[str, Any],
    flags: str,
    *,
    dtype: str = "bfloat16",
    dtypes: dict[str, Any] | None = None,
    bias: bool = True,
    activation: str | None = None,
    group: str = "",
    tier: str = "full",
    options: dict[str, Any] | None = None,
    **rest: Any,
) -> Case:
    kinds: dict[str, Any] = {}
    if op in PREFIXES:
        x = "bcx" if op.startswith("gated_short_conv") else "x"
        kinds = dict.fromkeys((x, "weight", "bias", "conv_states"), dtype) | {"cache_indices": "int32"}
    if op == "commit_windows":
        kinds = {"conv_states": dtype, "cache_indices": "int32"}
    if "lengths" in axes:
        kinds["query_start_loc"] = "int32"
    if "counts" in axes:
        kinds["num_accepted_tokens"] = "int32"
    kinds |= {name: dtype for name in ("residual", "window_out") if name in axes}
    kinds |= {name: "int32" for name in INTEGER_AXES if name in axes}
    kinds |= dtypes or {}
    if not bias:
        kinds["bias"] = None
    options = dict(options or {})
    if activation:
        options["activation"] = activation
    return Case(
        id=name,
        op=op,
        axes=axes,
        dtypes=kinds,
        options=options,
        seed=zlib.crc32(name.encode()) % 1000,
        flags=tuple(flags.split()),
        tier=tier,
        group=group or {FN: "prefill", UPDATE: "update"}.get(op, "speculation"),
        **rest,
    )
