"""The fronts of linear-attention layers: the prologue of the gated delta rule, and LFM2's gated short convolution."""

from __future__ import annotations

from typing import Any

from oracle.conformance.cases import Case
from oracle.conformance.catalogue.builders import TREE, front, front_backward, gated, gated_backward

_NORM = "norm-over-all-heads norm-eps-outside-root norm-before-activation norm-of-v"
_HEADS = "heads-misordered head-tail-unmasked"
_GATES = "decay-misapplied beta-rounded"
_DEAD = "dead-rows-in-front pad-slot-not-skipped"
_GATED = "gate-slices-exchanged gated-product-misplaced"
_NORM_GRADIENT = "norm-gradient-wrong"
_GATE_GRADIENT = "gate-gradient-wrong"
_GATED_GRADIENT = "gate-slices-exchanged gated-gradient-wrong"
SCALE = 128**-0.5
SHORT: dict[str, Any] = {"tier": "core", "lengths": (1, 5, 3)}  # for kernels' interpreters


def prologues() -> list[Case]:
    """Packed prefills."""
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    linear: dict[str, Any] = {"options": {"activation": None}}
    found = [
        front(f"width-{width}", f"{_NORM} {_HEADS}", width=width, dtype=f32 if width % 2 else bf16, lengths=(1, 5, 3),
              tail=2, tier="core" if width == 4 else "full")
        for width in range(1, 9)
    ]  # fmt: skip
    found += [
        front(f"linear-{dtype}", f"{_NORM} {_HEADS} norm-rounding-misplaced norm-sum-order", dtype=dtype,
              heads=(1, 2, 48, 20), lengths=(3, 4), bias=dtype != f32, tier="core" if dtype == bf16 else "full", **linear)
        for dtype in (f32, f16, bf16)
    ]  # fmt: skip
    # sizes of heads: the fast ones, and others; heads of v as many as of k, twice, three times
    sizes = ((1, 1, 64, 64), (2, 2, 128, 128), (1, 2, 256, 256), (1, 3, 96, 33), (3, 3, 1, 1), (1, 2, 2, 256), (2, 6, 5, 3),
             (1, 1, 255, 100))  # fmt: skip
    found += [
        front(f"heads-{'-'.join(map(str, heads))}", f"{_NORM} {_HEADS}", heads=heads, lengths=(2, 3), tail=1,
              dtype=f16 if heads[2] % 2 else bf16, relation="separate_norm",
              tier="core" if heads == (2, 6, 5, 3) else "full")
        for heads in sizes
    ]  # fmt: skip
    return [
        *found,
        # the norm
        front("norm-none", "norm-misapplied", options={"qk_l2norm": False}, relation="separate_norm"),
        front("norm-none-scaled", "norm-misapplied q-scale-misapplied", dtype=f32,
              options={"qk_l2norm": False, "q_scale": 0.3}, relation="separate_norm"),
        front("scaled", "q-scale-misapplied", heads=(1, 2, 128, 32), lengths=(2, 3), options={"q_scale": SCALE}, relation="separate_norm"),
        front("scaled-f32", "q-scale-misapplied norm-sum-order", dtype=f32, heads=(2, 2, 13, 8), lengths=(4, 3),
              options={"q_scale": SCALE, "norm_eps": 1e-5}, relation="separate_norm"),
        front("near-eps", "norm-eps-outside-root", dtype=f32, data="near_eps", **SHORT, relation="separate_norm"),
        front("eps-large", "norm-eps-outside-root", options={"norm_eps": 0.5}),
        front("rounding-none", "norm-rounding-misplaced", options={"norm_rounding": "none"}, heads=(1, 2, 16, 16),
              lengths=(4, 9), tier="core"),
        front("rounding-none-f16-linear", "norm-rounding-misplaced", dtype=f16, heads=(1, 1, 32, 16), lengths=(4, 9),
              options={"norm_rounding": "none", "activation": None, "q_scale": 0.25}),
        front("zero-rows", "dead-rows-in-front", data="zero_weight", bias=False, options={"norm_eps": 2.0**-126}),
        # gates
        front("gates-none", "gates-not-optional", gates=(), **SHORT),
        front("gate-alone", "gates-not-optional decay-misapplied", gates=("a", "A_log")),
        front("beta-alone", "gates-not-optional beta-rounded", gates=("b",)),
        front("gates-f32", _GATES, dtypes={"a": f32, "b": f32, "dt_bias": bf16, "A_log": bf16}, lengths=(5, 9)),
        front("gates-far", "softplus-overflow", data="far_gates", dtypes={"a": f32}, **SHORT),
        front("gates-channel-far", "softplus-overflow", data="far_gates", channel=True, dtype=f16),
        front("gates-channel", _GATES, channel=True, **SHORT),
        front("gates-channel-no-dt", _GATES, channel=True, gates=("a", "b", "A_log"), dtype=f32, heads=(2, 2, 12, 4)),
        front("gates-bounded", _GATES, channel=True, options={"lower_bound": -5.0}, **SHORT),
        front("gates-bounded-heads", _GATES, data="far_gates", options={"lower_bound": -0.5}, dtypes={"a": f32, "b": f32}),
        front("beta-rounded", "beta-rounded", options={"beta_rounding": "storage"}, **SHORT),
        front("beta-rounded-f16", "beta-rounded", dtype=f16, options={"beta_rounding": "storage"}),
        # dtypes and memory
        front("dtypes-mixed", "state-dtype-differs-from-input", **SHORT,
              dtypes={"x": bf16, "weight": f32, "bias": f16, "conv_states": f32}, relation="separate_norm"),
        front("dtypes-mixed-back", "state-dtype-differs-from-input", dtypes={"x": f32, "weight": bf16, "conv_states": f16}),
        front("layout-slices", "stride-restriction-surprises", tail=2,
              layout={"x": "slice", "a": "slice", "b": "slice_odd", "A_log": "slice", "conv_states": "pages"}),
        front("layout-transposed", "stride-restriction-surprises", channel=True,
              layout={"x": "transposed", "a": "transposed", "dt_bias": "transposed", "conv_states": "transposed"}),
        front("channel-offset", "split-misplaced", args={"channels": 61}, options={"channel_offset": 9}, tail=2, **SHORT),
        front("nan", "state-not-bit-exact", data="nan_payload", dtype=f32, tail=2, **linear),
        # rows and slots
        front("stateless", "null-state-pointer", slots=None, num_slots=None, has=None, tail=3, **SHORT),
        front("padding", f"{_DEAD} padding-row-output-uninitialised", lengths=(2, 3, 1, 4), slots=(4, -1, 0, 9),
              num_slots=6, tail=5, tier="core"),
        front("padding-f32", _DEAD, dtype=f32, channel=True, lengths=(2, 3, 1, 4), slots=(4, -1, 0, 9), num_slots=6, tail=5,
              options={"qk_l2norm": False}),
        front("empty-rows", "empty-sequence-mishandled", lengths=(2, 0, 1, 0), slots=(3, 5, 1, 7), num_slots=8, tail=3,
              options={"empty_rows": "apply"}, has=(True, False, False, True)),
        front("no-rows", "empty-sequence-mishandled", lengths=(), tail=4),
        front("back", "wide-slot-window-misplaced", state_len=6, options={"state_layout": "back"}, lengths=(2, 9)),
        front("ring", "circular-buffer-ignored", state_len=6, options={"state_layout": "ring"}, lengths=(2, 9),
              args={"cache_seqlens": (7, 3)}, has=(True, True)),
        front("write-slots", "cross-block-migration", lengths=(2, 4), slots=(1, 4), num_slots=8,
              args={"write_indices": (0, 5)}),
        front("snapshots", "boundary-snapshot-wrong", lengths=(4, 9), has=(True, True), slots=(0, 1), num_slots=16,
              options={"snapshot_block_size": 8}, tier="core",
              args={"snapshot_indices": ((9, 3, 9), (4, 5, 6)), "num_computed_tokens": (7, 3), "track_indices": (10, 11)}),
        front("tracked", "tracked-window-from-flat-tokens pad-slot-not-skipped", lengths=(2, 5, 1), slots=(0, 1, 6), num_slots=9,
              args={"track_indices": (7, 8, 6), "track_lengths": (1, 9, 1)}, options={"pad_slot_id": 6}),
        front("long", "tile-halo-wrong launch-plan-too-small", lengths=(70, 33), heads=(1, 1, 8, 8), relation="front_schedules"),
        front("split", "history-dropped-on-continuation result-depends-on-batch", lengths=(4, 2), relation="front_split",
              slots=(4, 0), tier="core"),  # three numbers of tokens in all
        front("split-longer", "history-dropped-on-continuation result-depends-on-batch", lengths=(9, 2, 6),
              relation="front_split", slots=(4, 0, 2)),
    ]  # fmt: skip


def steps() -> list[Case]:
    """Decode steps of the prologue."""
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    drafts: dict[str, Any] = {"lengths": (2, 4, 3)}
    return [
        *(
            front(f"width-{width}", f"{_NORM} {_HEADS}", width=width, step=True, dtype=bf16 if width % 2 else f16,
                  tier="full")
            for width in (1, 2, 3, 4, 8)
        ),
        front("heads-128", f"{_NORM} {_HEADS}", step=True, heads=(1, 2, 128, 128), relation="separate_norm", tier="core",
              options={"q_scale": SCALE}),
        front("heads-256", _HEADS, step=True, heads=(1, 1, 256, 64), batch=2, relation="separate_norm"),
        front("heads-odd", _HEADS, step=True, heads=(2, 4, 7, 5), dtype=f32, relation="separate_norm", tier="core"),
        front("linear-f16", f"{_NORM} norm-rounding-misplaced norm-sum-order", step=True, dtype=f16, heads=(1, 2, 48, 20),
              options={"activation": None}),
        front("rounding-none", "norm-rounding-misplaced", step=True, heads=(1, 2, 48, 20), batch=3,
              options={"norm_rounding": "none"}),
        front("gates-channel", _GATES, step=True, channel=True, seqlen=2, tier="core", options={"lower_bound": -5.0}),
        front("gates-none", "gates-not-optional norm-misapplied", step=True, gates=(), options={"qk_l2norm": False}),
        front("gates-far", "softplus-overflow beta-rounded", step=True, data="far_gates", dtypes={"a": f32, "b": f32}),
        front("padding", f"{_DEAD} padding-row-output-uninitialised", step=True, slots=(4, -1, 0, 9), num_slots=6,
              tier="core"),
        front("tokens", "history-dropped-on-continuation", step=True, seqlen=3, relation="front_steps", batch=2,
              tier="core"),
        front("packed", "fixed-draft-width-assumed tail-padding-enters-state", step=True, **drafts, tail=2, tier="core"),
        front("rolling", "accepted-offset-ignored", step=True, **drafts, counts=(3, 1, 2), tail=2, tier="core"),
        front("ring", "circular-buffer-ignored", step=True, state_len=6, args={"cache_seqlens": (7, 3, 0, 12)},
              options={"state_layout": "ring"}),
        front("windows", "window-buffer-aliasing verify-commits-state", step=True, batch=2, seqlen=3, tier="core",
              args={"window_out": (4, 3), "window_indices": (3, 0)}, options={"commit": False}),
        front("tree", "tree-uses-flat-order", step=True, batch=1, seqlen=8, slots=(1,), num_slots=3,
              args={"tree_parents": (TREE,)}, options={"commit": False}, tier="core"),
        front("write-slots", "cross-block-migration pad-slot-not-skipped", step=True, batch=2, slots=(1, 4), num_slots=6,
              args={"write_indices": (0, 5)}, options={"pad_slot_id": 4, "beta_rounding": "storage", "norm_eps": 0.5}),
        front("channel-offset", "split-misplaced", step=True, args={"channels": 61}, options={"channel_offset": 9}),
        front("tracked", "tracked-window-from-flat-tokens", step=True, batch=2, seqlen=2, num_slots=9,
              args={"track_indices": (7, 8)}),
        front("layouts", "stride-restriction-surprises", step=True, seqlen=2, channel=True,
              layout={"x": "transposed", "a": "transposed", "b": "slice", "conv_states": "pages"}),
    ]  # fmt: skip


def gated_convolutions() -> list[Case]:
    """LFM2's form: prefills and decode steps."""
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    found = [
        gated(f"width-{width}", _GATED, width=width, step=step, tail=0 if step else 2,
              dtype=(bf16, f16, f32)[width % 3], tier="core" if width == 3 else "full",
              **({} if step else {"lengths": (1, 5, 0, 3)}))
        for width in range(2, 9)
        for step in (False, True)
    ]  # fmt: skip
    return [
        *found,
        gated("width-1", _GATED, width=1, dtype=f16),
        gated("silu", _GATED, activation="silu"),
        gated("silu-f32", _GATED, activation="silu", dtype=f32, step=True, seqlen=2),
        gated("no-bias", _GATED, bias=False, dtype=f16),
        gated("dim-130", f"{_GATED} channel-tail-unmasked", dim=130, lengths=(3, 2)),
        gated("offsets", _GATED, args={"channels": 40}, options={"channel_offsets": (29, 3, 14)}, tail=2, **SHORT),
        gated("offsets-step", _GATED, step=True, args={"channels": 45}, options={"channel_offsets": (11, 35, 0)}),
        gated("offsets-shared", _GATED, args={"channels": 25}, options={"channel_offsets": (0, 5, 5)}),
        gated("dtypes-mixed", "state-dtype-differs-from-input",
              dtypes={"bcx": bf16, "weight": f32, "bias": f16, "conv_states": f32}),
        gated("dtypes-mixed-back", "state-dtype-differs-from-input", dtypes={"bcx": f32, "conv_states": f16}, step=True),
        gated("layouts", "stride-restriction-surprises", layout={"bcx": "slice", "conv_states": "transposed", "weight": "transposed"}),
        gated("layout-transposed", "stride-restriction-surprises", layout={"bcx": "transposed"}, tail=2),
        gated("nan", "dead-rows-in-front", data="nan_payload", tail=3, dtype=f32),
        gated("stateless", "null-state-pointer", slots=None, num_slots=None, has=None, tail=3),
        gated("padding", f"{_DEAD} {_GATED}", lengths=(2, 3, 1, 4), slots=(4, -1, 0, 9), num_slots=6, tail=5, tier="core"),
        gated("padding-step", _DEAD, step=True, slots=(4, -1, 0, 9), num_slots=6),
        gated("ring", "circular-buffer-ignored", state_len=6, options={"state_layout": "ring"}, lengths=(2, 9),
              args={"cache_seqlens": (7, 3)}, has=(True, True)),
        gated("back-step", "wide-slot-window-misplaced", step=True, state_len=5, options={"state_layout": "back"}),
        gated("snapshots", "boundary-snapshot-wrong", lengths=(4, 9), has=(True, True), slots=(0, 1), num_slots=16,
              options={"snapshot_block_size": 8}, args={"snapshot_indices": ((9, 3, 9), (4, 5, 6)), "num_computed_tokens": (7, 3)}),
        gated("tracked", "tracked-window-from-flat-tokens", lengths=(2, 5), slots=(0, 1), num_slots=9,
              args={"track_indices": (7, 8), "track_lengths": (1, 9)}),
        gated("write-slots", "cross-block-migration pad-slot-not-skipped", lengths=(2, 0, 3), slots=(1, 4, 6), num_slots=8,
              has=(True, True, False), args={"write_indices": (0, 5, 7)}, options={"pad_slot_id": 6, "empty_rows": "apply"}),
        gated("write-slots-step", "cross-block-migration", step=True, batch=2, slots=(1, 4), num_slots=9,
              args={"write_indices": (0, 5), "track_indices": (7, 8)}, options={"pad_slot_id": 2}),
        gated("ring-step", "circular-buffer-ignored", step=True, state_len=6, args={"cache_seqlens": (7, 3, 0, 12)},
              options={"state_layout": "ring"}),
        gated("packed", "fixed-draft-width-assumed", step=True, lengths=(2, 4, 3), tail=2, tier="core"),
        gated("rolling", "accepted-offset-ignored", step=True, lengths=(2, 4, 3), counts=(3, 1, 2), tail=2),
        gated("windows", "window-buffer-aliasing gated-product-misplaced", step=True, batch=2, seqlen=3, tier="core",
              args={"window_out": (4, 3), "window_indices": (3, 0)}, options={"commit": False}),
        gated("tree", "tree-uses-flat-order", step=True, batch=1, seqlen=8, slots=(1,), num_slots=3,
              args={"tree_parents": (TREE,)}, options={"commit": False}),
        gated("long", "tile-halo-wrong launch-plan-too-small", lengths=(70, 33), dim=6, relation="front_schedules"),
        gated("split", "history-dropped-on-continuation", lengths=(9, 2, 6), relation="front_split", slots=(4, 0, 2)),
        gated("tokens", "history-dropped-on-continuation", step=True, seqlen=3, relation="front_steps", batch=2, tier="core"),
    ]  # fmt: skip


def prologue_gradients() -> list[Case]:
    """The differentiable prologue's backward pass."""
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    every = f"{_NORM_GRADIENT} {_GATE_GRADIENT} tail-enters-gradient dht-slot-clamped"
    storage = {"x": bf16, "weight": f32, "bias": f16, "initial_states": f32}
    found = [
        front_backward(f"width-{width}", every, width=width, tail=2, dtype=f32 if width % 2 else bf16,
                       tier="core" if width == 4 else "full", options={"q_scale": SCALE} if width == 4 else {})
        for width in (1, 2, 3, 4, 8)
    ]  # fmt: skip
    found += [
        front_backward(f"without-{name}", "gates-not-optional", without=(f"d{name}",)) for name in ("q", "v", "g", "beta")
    ]  # fmt: skip
    return [
        *found,
        front_backward("f16", every, dtype=f16, tail=2),
        front_backward("linear", _NORM_GRADIENT, options={"activation": None}),
        front_backward("heads-odd", _NORM_GRADIENT, heads=(1, 3, 5, 3)),
        front_backward("heads-128", _NORM_GRADIENT, heads=(1, 2, 128, 32), lengths=(2, 1), dtype=bf16),
        front_backward("tiles", every, heads=(1, 1, 128, 128), lengths=(37, 0, 3), tail=2, dtype=bf16, options={"q_scale": SCALE}),
        front_backward("tiles-heads", _NORM_GRADIENT, heads=(8, 8, 16, 16), lengths=(21, 2), options={"norm_rounding": "none"}),
        front_backward("tiles-scaled", "q-scale-misapplied", heads=(4, 4, 32, 32), lengths=(2, 20), dtype=f16,
                       options={"qk_l2norm": False, "q_scale": -0.3}),
        front_backward("norm-none", "norm-misapplied q-scale-misapplied",
                       options={"qk_l2norm": False, "q_scale": 0.3}),
        front_backward("scaled", "q-scale-misapplied", options={"q_scale": 0.3, "norm_eps": 0.5}),
        front_backward("near-eps", _NORM_GRADIENT, data="near_eps"),
        front_backward("zero-rows", "dead-rows-in-front", data="zero_weight", bias=False, options={"norm_eps": 2.0**-40}),
        front_backward("rounding-none", _NORM_GRADIENT, dtype=bf16, options={"norm_rounding": "none"}),
        front_backward("gates-none", "gates-not-optional", gates=()),
        front_backward("gate-alone", _GATE_GRADIENT, gates=("a", "A_log")),
        front_backward("beta-alone", _GATE_GRADIENT, gates=("b",)),
        front_backward("gates-far", "softplus-overflow", data="far_gates"),
        front_backward("gates-channel", _GATE_GRADIENT, channel=True),
        front_backward("gates-bounded", _GATE_GRADIENT, channel=True, dtype=bf16, options={"lower_bound": -5.0}),
        front_backward("gates-bounded-heads", f"{_GATE_GRADIENT} softplus-overflow", data="far_gates",
                       options={"lower_bound": -0.5}),
        front_backward("beta-rounded", _GATE_GRADIENT, dtype=bf16, options={"beta_rounding": "storage"}),
        front_backward("no-initial", "dht-slot-clamped", initial=False, bias=False),
        front_backward("no-final", _NORM_GRADIENT, final=False),
        front_backward("dense", every, lengths=(4, 4), dense=True),
        front_backward("mixed", "state-dtype-differs-from-input", dtypes=storage),
        front_backward("no-rows", "empty-sequence-mishandled", lengths=(), tail=2),
        front_backward("layout-slices", "dy-assumed-contiguous", dtype=bf16, layout={"dq": "slice", "dv": "slice_odd", "dg": "slice", "x": "slice"}),
        front_backward("layout-transposed", "dy-assumed-contiguous", layout={"dk": "transposed", "dbeta": "transposed", "a": "transposed"}),
        front_backward("schedules", "nondeterministic-dweight", lengths=(20, 3, 0, 9), heads=(1, 1, 4, 4), tail=2,
                       relation="backward_schedules"),
    ]  # fmt: skip


def gated_gradients() -> list[Case]:
    """The differentiable gated convolution's backward pass."""
    f32, f16, bf16 = "float32", "float16", "bfloat16"
    every = f"{_GATED_GRADIENT} tail-enters-gradient dht-slot-clamped"
    return [
        *(
            gated_backward(f"width-{width}", every, width=width, tail=2, dtype=(bf16, f16, f32)[width % 3],
                           tier="core" if width == 3 else "full")
            for width in (1, 2, 3, 4, 5, 8)
        ),
        gated_backward("bf16", every, dtype=bf16, tail=1),
        gated_backward("silu", _GATED_GRADIENT, activation="silu"),
        gated_backward("no-bias", _GATED_GRADIENT, bias=False, initial=False, final=False),
        gated_backward("dim-130", _GATED_GRADIENT, dim=130, lengths=(3, 2)),
        gated_backward("offsets", _GATED_GRADIENT, args={"channels": 40}, options={"channel_offsets": (29, 3, 14)}),
        gated_backward("offsets-shared", _GATED_GRADIENT, args={"channels": 25}, options={"channel_offsets": (0, 5, 5)}),
        gated_backward("dense", every, lengths=(4, 4), dense=True),
        gated_backward("mixed", "state-dtype-differs-from-input",
                       dtypes={"bcx": bf16, "weight": f32, "bias": f16, "initial_states": f32}),
        gated_backward("layouts", "dy-assumed-contiguous", layout={"dout": "transposed", "bcx": "slice"}),
        gated_backward("schedules", "nondeterministic-dweight", lengths=(20, 3, 0, 9), dim=4, tail=2,
                       relation="backward_schedules"),
    ]  # fmt: skip


def bad_calls() -> list[Case]:
    """Calls that break the contract."""
    flag, found = "bad-call-accepted", []

    def bad(make: Any, name: str, error: str, argument: str, **more: Any) -> None:
        sized = {"lengths": (3, 2)} if not more.get("step") else {"batch": 2}
        found.append(
            make(f"error-{name}", flag, **(sized | more), expect={"error": error, "names": argument})
        )

    def shape(name: str, *sizes: int) -> dict[str, Any]:
        return {"override": {name: {"shape": sizes}}}

    for step in (False, True):
        rows = 2 if step else 5
        bad(
            front,
            "heads-divide",
            "ValueError",
            "num_v_heads",
            step=step,
            options={"num_v_heads": 3},
            tier="core",
        )
        bad(front, "heads-sum", "ValueError", "weight", step=step, options={"head_v_dim": 7})
        bad(front, "head-large", "ValueError", "head_k_dim", step=step, options={"head_k_dim": 257})
        bad(front, "a-heads", "ValueError", "a:", step=step, **shape("a", rows, 2))
        bad(front, "a-tokens", "ValueError", "a:", step=step, **shape("a", rows + 1, 4), tier="core")
        bad(front, "b-heads", "ValueError", "b:", step=step, **shape("b", rows, 2), tier="core")
        bad(front, "b-dtype", "TypeError", "b:", step=step, override={"b": {"dtype": "int32"}})
        bad(front, "a-log-missing", "ValueError", "A_log", step=step, override={"A_log": {"none": True}})
        bad(front, "a-missing", "ValueError", "A_log", step=step, override={"a": {"none": True}})
        bad(
            front, "dt-bias-channels", "ValueError", "dt_bias", step=step, channel=True, **shape("dt_bias", 4)
        )
        bad(front, "eps-zero", "ValueError", "norm_eps", step=step, options={"norm_eps": 0.0})
        bad(front, "bound-positive", "ValueError", "lower_bound", step=step, options={"lower_bound": 1.0})
        bad(front, "rounding", "ValueError", "norm_rounding", step=step, options={"norm_rounding": "float32"})
        bad(gated, "channels", "ValueError", "bcx", step=step, **shape("bcx", rows, 31), tier="core")
        bad(
            gated,
            "offsets",
            "ValueError",
            "channel_offsets",
            step=step,
            options={"channel_offsets": (0, 10, 21)},
        )
        bad(gated, "offsets-two", "ValueError", "channel_offsets", step=step, options={"channel_offsets": (0, 10)},
            args={"channels": 30})  # fmt: skip
    return found
