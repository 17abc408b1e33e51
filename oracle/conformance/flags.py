"""Failure modes: what goes wrong, by which rule it is wrong, and where it has happened. One flag each.

References are projects and numbers of public issues or changes; a flag says what the contract demands, not
that any of those projects is wrong today.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "arithmetic", "boundary", "state", "index", "speculative", "prefix", "race", "addressing", "layout", "call",
    "gradient", "front",
)  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """A failure mode.

    Attributes:
      id: stable name.
      kind: one of KINDS.
      wrong: what an implementation does.
      rule: what the contract demands.
      references: "owner/repository#number", possibly none.
    """

    id: str
    kind: str
    wrong: str
    rule: str
    references: tuple[str, ...] = ()


_CAUSAL, _VLLM, _SGLANG = "Dao-AILab/causal-conv1d#", "vllm-project/vllm#", "sgl-project/sglang#"
_ASCEND, _NPU, _FLA = (
    "vllm-project/vllm-ascend#",
    "sgl-project/sgl-kernel-npu#",
    "fla-org/flash-linear-attention#",
)
_XPU, _TPU, _TRT = "vllm-project/vllm-xpu-kernels#", "vllm-project/tpu-inference#", "NVIDIA/TensorRT-LLM#"
_MAMBA, _GAUDI, _HF = "state-spaces/mamba#", "vllm-project/vllm-gaudi#", "huggingface/transformers#"


def _refs(prefix: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{number}" for number in numbers)


_ALL = [
    # Arithmetic of one window.
    Flag("tap-order-reversed", "arithmetic", "the newest token meets the weight of the oldest, for all taps or for the history alone",
         "with one-hot weights at tap j the output is the input delayed by width-1-j tokens", _refs(_ASCEND, 8544)),
    Flag("product-rounded-before-accumulate", "arithmetic", "products, or the running sum, are rounded to a 16-bit format",
         "products and sums are float32; one rounding, at the store", _refs(_VLLM, 52887, 52905, 57007)),
    Flag("preactivation-rounded", "arithmetic", "the sum is rounded to the output's dtype before the activation, or in one of several paths only",
         "one rounding, at the store, in every path", _refs(_NPU, 742) + _refs(_SGLANG, 25587) + _refs(_VLLM, 55524)),
    Flag("output-truncated", "arithmetic", "the store cuts bits off instead of rounding to nearest even",
         "one rounding to nearest even"),
    Flag("sum-order-changed", "arithmetic", "taps are added newest first, or the bias last",
         "start from the bias, taps from oldest to newest"),
    Flag("bias-misapplied", "arithmetic", "the bias is ignored, added after the activation, or required",
         "pre = bias + sum of products; no bias means zero", _refs(_CAUSAL, 61) + ("tile-ai/tilelang-ascend#926",)),
    Flag("activation-hardwired", "arithmetic", "SiLU is always applied, never applied, or lost on one path",
         "the activation is what the caller says, in every path", _refs(_NPU, 449) + ("tenstorrent/tt-metal#55272",)),
    Flag("swish-alias-dropped", "arithmetic", "only the name silu switches the activation on", "swish is silu", _refs(_GAUDI, 1484)),
    Flag("silu-inaccurate", "arithmetic", "SiLU overflows, underflows early, or uses a coarse or 16-bit sigmoid",
         "at most 1 ulp from the rounded value on 16-bit outputs, for every pre-activation"),
    Flag("wide-kernel-truncated", "arithmetic", "more than four taps are accepted and four are used",
         "every width from 1 to 8 uses all its taps", _refs(_SGLANG, 38622, 38623) + ("NVIDIA/cudnn-frontend#465",)),
    Flag("width-one-negative-zero-slice", "arithmetic", "with width 1 the empty window becomes the whole array",
         "width 1 is pointwise: no history is read, no state is written", _refs(_GAUDI, 1484) + _refs(_FLA, 1211) + ("open-lm-engine/lm-engine#502",)),
    Flag("output-not-truncated", "arithmetic", "the padded convolution is returned whole, or its wrong end is kept",
         "out has the shape of x, and no output depends on a later token", _refs(_MAMBA, 437) + ("jxiw/MambaInLlama#27",)),
    Flag("channel-tail-unmasked", "arithmetic", "channels past the last full block are dropped or mixed with neighbours",
         "a channel's result does not depend on dim", _refs(_NPU, 235) + ("XPU-Forces/mojo_opset#388",)),
    Flag("wrong-arch-binary", "arithmetic", "one build of the same source gives other outputs and loses the state",
         "every build passes every case", _refs(_CAUSAL, 105, 106, 119)),
    Flag("nan-spreads", "arithmetic", "a NaN or infinity reaches outputs whose window does not hold it",
         "an output depends on its own window and channel only"),
    # Boundaries and padding.
    Flag("sequence-leak", "boundary", "the first tokens of a row see the end of the row before",
         "packed rows equal the same rows alone", _refs(_HF, 46588) + ("pytorch/torchtitan#3892", "PrimeIntellect-ai/prime-rl#3003")),
    Flag("tile-halo-wrong", "boundary", "at a block boundary inside a row the older taps are zero or misplaced",
         "outputs do not depend on block sizes"),
    Flag("stale-halo-when-no-initial-state", "boundary", "a row without state reads its slot, or multiplies it by zero",
         "without a state no value in the pool matters, NaN included", _refs(_NPU, 601) + _refs(_ASCEND, 9720)),
    Flag("empty-sequence-mishandled", "boundary", "a row of zero tokens clears, shifts or overwrites its slot, or fails",
         "a row of zero tokens touches no slot", ("areal-project/AReaL#1103",) + _refs(_VLLM, 37728, 29437)),
    Flag("tail-padding-enters-state", "boundary", "tokens after the last row are convolved into it, or their outputs are left unwritten",
         "tokens at or after query_start_loc[-1] change nothing and give zeros", _refs(_NPU, 742) + _refs(_SGLANG, 28487, 26911)),
    Flag("right-padded-batch-state", "boundary", "the stored window ends where the longest row would end",
         "each row's window ends at its own last token", _refs(_HF, 48256) + ("ml-explore/mlx-swift-lm#264",)),
    Flag("varlen-detected-by-boundary-count", "boundary", "one row is taken to mean that x is one whole sequence",
         "boundaries come from query_start_loc, for one row too", ("pytorch/torchtitan#3892",)),
    Flag("launch-plan-too-small", "boundary", "a grid or list built from host lengths leaves blocks unwritten",
         "every token of a live row is written, whatever max_seqlen says", _refs(_VLLM, 18218, 20838, 55469) + _refs(_ASCEND, 11141)),
    # Initial state.
    Flag("has-initial-ignored", "state", "the slot's content is used although the row has no state",
         "has_initial_state false or None: the window is zero", _refs(_SGLANG, 24717) + _refs(_ASCEND, 9720) + _refs(_VLLM, 56524)),
    Flag("history-dropped-on-continuation", "state", "a later chunk starts from zeros, or only its first token is computed",
         "chunked prefill equals one prefill, at every split", _refs(_MAMBA, 641, 739) + _refs(_FLA, 90) + _refs(_HF, 46032, 46741)),
    Flag("has-initial-reduced-over-batch", "state", "one flag decides for all rows", "the flag belongs to its row", _refs(_NPU, 454)),
    Flag("initial-state-ignored-by-layout", "state", "one memory layout of x drops the initial state",
         "strides never change values", _refs(_CAUSAL, 106)),
    Flag("seq-idx-excludes-initial-state", "state", "only the first row's state is honoured in a packed batch",
         "states and packing work together", _refs(_CAUSAL, 75, 118)),
    Flag("null-state-pointer", "state", "a call without a pool fails", "conv_states None is a stateless call", _refs(_VLLM, 10895, 10928)),
    # Final state.
    Flag("state-not-written", "state", "outputs are right and the slot stays as it was", "the last width-1 inputs are in the slot after the call",
         _refs(_CAUSAL, 105) + ("modular/modular#5959",) + _refs(_NPU, 748)),
    Flag("state-holds-post-activation", "state", "the slot gets outputs instead of inputs", "the state is made of inputs", _refs(_MAMBA, 1027)),
    Flag("state-not-bit-exact", "state", "states pass through arithmetic: NaN payloads, signed zeros or tiny values change",
         "states are copies, bit for bit; cast once where dtypes differ"),
    Flag("short-sequence-state-shift", "state", "for rows shorter than the window the old part is not moved, or is lost",
         "the window is the end of old window ++ inputs", _refs(_MAMBA, 56) + _refs(_FLA, 546) + _refs(_SGLANG, 27514)),
    Flag("short-sequence-stale-left", "state", "a short row without state keeps the previous tenant's columns",
         "they are zero", _refs(_SGLANG, 27514)),
    Flag("wide-slot-window-misplaced", "state", "with spare columns the window is read or written at the far end, or they are touched",
         "the window is columns 0 to width-2; later columns are never touched", _refs(_SGLANG, 34794, 38622) + _refs(_TPU, 2522)),
    Flag("state-dtype-differs-from-input", "state", "a pool of another dtype is refused, truncated, or goes through float16",
         "every mixture of the three dtypes works; inputs are cast once", _refs(_VLLM, 24883) + _refs(_SGLANG, 38039, 27792, 24261)),
    Flag("undeclared-mutation", "state", "the update goes to a copy that is thrown away", "the returned pool carries the update", _refs(_TRT, 8068) + _refs(_NPU, 751)),
    # Layout.
    Flag("state-length-from-stride", "layout", "columns are counted from the slot's stride, so neighbours in a page are overwritten",
         "nothing outside a slot's columns changes", _refs(_XPU, 545)),
    Flag("stale-strides-after-copy", "layout", "a copy is made and the kernel uses the old strides, or the update stays in the copy",
         "a strided pool is updated where it lies", _refs(_NPU, 748) + _refs(_ASCEND, 15430)),
    Flag("layout-axes-swapped", "layout", "time and channel of a slot are confused", "strides never change values", _refs(_SGLANG, 26888, 32262) + _refs(_VLLM, 37416)),
    Flag("stride-restriction-surprises", "layout", "legal views are refused", "any strides are accepted", _refs(_FLA, 519) + _refs(_MAMBA, 362, 413, 643)),
    Flag("degenerate-stride-misread", "layout", "the stride of an axis of size 1 is used", "such a stride means nothing", ("EricLBuehler/mistral.rs#2357",)),
    # Slots, padding rows, graphs.
    Flag("pad-slot-not-skipped", "index", "the padding slot is used as an offset", "padding rows read and write no slot",
         _refs(_VLLM, 34685) + _refs(_CAUSAL, 78) + _refs(_SGLANG, 16714)),
    Flag("pad-slot-clamped-to-zero", "index", "the padding slot becomes slot 0", "slot 0 is an ordinary slot", ("lightseekorg/tokenspeed#700", "NVIDIA/Megatron-LM#6499")),
    Flag("out-of-range-slot-used", "index", "a slot past the pool is clamped, wrapped or dereferenced",
         "a slot outside the pool is padding"),
    Flag("slot-zero-treated-as-padding", "index", "slot 0 is skipped", "only pad_slot_id and slots out of range are padding", ("weicj/vLLM-2080Ti-Definitive#93", "ovg-project/kvcached#398")),
    Flag("null-block-processed", "index", "only -1 is skipped, whatever pad_slot_id says", "padding is what pad_slot_id says", _refs(_VLLM, 33937, 35431, 39064) + _refs(_GAUDI, 951)),
    Flag("padding-row-output-uninitialised", "index", "outputs of padding rows are left unwritten", "they are zero", _refs(_SGLANG, 30974) + ("NVIDIA/Megatron-LM#6595",)),
    Flag("duplicate-slot-write", "index", "a row that does nothing writes back the window it read, over a live row's",
         "rows that do nothing write nothing; validate=True rejects duplicates", _refs(_TPU, 2469) + _refs(_ASCEND, 12040)),
    Flag("stale-index-in-graph-buffer", "index", "rows past the live ones still update the slots of a former batch",
         "empty rows at the end of a fixed-size batch do nothing", _refs(_ASCEND, 12040, 10901) + _refs(_VLLM, 37728, 23035)),
    Flag("indices-read-with-unit-stride", "index", "a strided view of indices is read densely", "indices may have any stride", _refs(_VLLM, 55357)),
    Flag("wrong-index-namespace", "index", "the row number is used as the slot", "cache_indices names the slot", _refs(_SGLANG, 23975)),
    Flag("slot-masked-by-batch-size", "index", "slots at or above the batch size read as zero", "any slot of the pool works with any batch", ("ROCm/triton#941",)),
    Flag("valid-call-rejected", "index", "a batch larger than the pool is refused", "it is legal when indices are given", _refs(_VLLM, 36324, 36639, 34571)),
    Flag("index-dtype-narrowed", "index", "64-bit, unsigned or 8-bit indices are read as another type", "indices keep their value"),
    Flag("offsets-trusted", "index", "bad offsets or slots fault, or write outside the named slots",
         "no index value makes a call touch memory that is not its own"),
    # Speculative decoding.
    Flag("accepted-offset-ignored", "speculative", "the window is read at column 0, or one too far, so rejected drafts stay in the history",
         "a step after `a` accepted tokens finds its window in column a-1", _refs(_VLLM, 50272, 44296) + _refs(_XPU, 544)),
    Flag("shift-by-query-length", "speculative", "the slot keeps the last width-1 inputs only, so a partial acceptance cannot be taken back",
         "a row of n tokens leaves width-2+n columns", _refs(_VLLM, 50272)),
    Flag("rollback-snapshot-never-written", "speculative", "only the first or the last of the windows that acceptance may pick is stored",
         "every accepted count finds its window", ("ggml-org/llama.cpp#28461", "ggml-org/llama.cpp#28466", "ggml-org/llama.cpp#26695")),
    Flag("accepted-zero", "speculative", "a count of 0 reads before the slot, or commits rejected drafts",
         "counts below 1 are taken as 1; validate=True rejects them", _refs(_VLLM, 56419)),
    Flag("accepted-exceeds-current-length", "speculative", "the count is limited by this step's tokens",
         "the count belongs to the step before and is limited by the slot alone", _refs(_ASCEND, 14161, 9956, 10372, 10979)),
    Flag("fixed-draft-width-assumed", "speculative", "every row is taken to have as many tokens as the longest",
         "rows begin where query_start_loc says", _refs(_XPU, 599) + _refs(_ASCEND, 17250)),
    Flag("spec-to-plain-transition", "speculative", "a step of one token ignores the count of the step before",
         "any order of verify, decode and prefill steps equals the plain run", _refs(_VLLM, 39273, 40738, 52942, 56531)),
    Flag("partition-takes-other-rows-counts", "speculative", "a part of a mixed batch uses counts of another part",
         "a count belongs to its row", _refs(_VLLM, 55504, 53928) + _refs(_XPU, 510)),
    Flag("overlapping-shift-without-ordering", "speculative", "columns are moved inside a slot onto columns not yet read",
         "equals copying the slot first", _refs(_VLLM, 50729) + _refs(_ASCEND, 15592)),
    Flag("rolled-past-slot", "speculative", "more tokens than a slot has columns for are written into the next one",
         "columns end at state_len; too narrow a pool is refused"),
    Flag("verify-commits-state", "speculative", "a call that only saves windows advances the slot as well",
         "commit=False leaves the pool as it was, bit for bit", _refs(_SGLANG, 35835, 37851)),
    Flag("window-buffer-aliasing", "speculative", "windows of different steps or rows overlap, or hold the window before the token",
         "step t of a row's buffer is the window after token t", _refs(_SGLANG, 26888, 28302)),
    Flag("commit-wrong-step", "speculative", "the step before or after the accepted one is committed, or a row without an accepted step changes",
         "the slot gets the named step's window; a step out of range leaves the row alone", ("ggml-org/llama.cpp#26695",)),
    Flag("tree-uses-flat-order", "speculative", "nodes of a draft tree see the node before them in memory, or only one ancestor",
         "a node's result is that of its path from the root", _refs(_SGLANG, 11133, 35835) + _refs(_VLLM, 29846)),
    Flag("tree-links-misread", "speculative", "a sibling becomes a child, or links out of range are followed",
         "a sibling has its elder sibling's parent; links out of range mean none", _refs(_SGLANG, 11133)),
    # Prefix caching.
    Flag("short-chunk-written-to-source-block", "prefix", "a chunk shorter than the window is written to the slot it was read from",
         "reads use the read slot, writes the write slot; the read slot keeps every bit", _refs(_VLLM, 56196)),
    Flag("cross-block-migration", "prefix", "the state is read from the slot that is written, or copied the wrong way",
         "where a row's state is stored changes no value", _refs(_VLLM, 42792, 53505, 49291, 45473) + _refs(_XPU, 544)),
    Flag("boundary-snapshot-wrong", "prefix", "a block's snapshot is the window at the chunk's end, or counted from the chunk's start, or missing",
         "slot k holds the window after exactly (k+1) blocks of the sequence, however it is cut", _refs(_VLLM, 25752, 54505, 34798, 57278, 54076) + _refs(_SGLANG, 15829, 31833, 37836)),
    Flag("tracked-window-from-flat-tokens", "prefix", "a window near the row's start is gathered from x alone: another row's tokens, or zeros",
         "such a window begins with entries of the old one"),
    # Layouts of a slot.
    Flag("circular-buffer-ignored", "layout", "cache_seqlens is accepted and not used, or the ring is not wrapped",
         "token n lives in column n modulo state_len", _refs(_SGLANG, 38622) + _refs(_ASCEND, 9720)),
    Flag("negative-ring-position", "layout", "a position before the first column is not wrapped, or a counter below 0 is used",
         "columns are modulo state_len, never negative; counters below 0 count as 0"),
    Flag("fresh-slot-not-cleared", "layout", "a row without state keeps columns of the slot's former tenant",
         "a row without state counts its whole slot as zeros"),
    Flag("back-slot-partly-moved", "layout", "only the window at the end of a slot is moved, or it is read in front",
         "the slot is the last state_len inputs, and moves as a whole", _refs(_SGLANG, 38622)),
    # Rows of no tokens, fused forms.
    Flag("empty-row-rule-ignored", "state", "empty_rows does nothing, or clears a row that has a state",
         "with apply, a fresh row clears its window and a row with state keeps it"),
    Flag("residual-misapplied", "arithmetic", "the residual is dropped, added before the activation, or after a rounding",
         "out is the activation plus the residual, rounded once"),
    Flag("split-misplaced", "call", "parts begin at wrong channels, or the channel offset is ignored",
         "part i holds the channels behind the parts before it"),
    # Races and order, as far as values show them.
    Flag("history-overwritten-while-read", "race", "the new window is stored before the old one is read by all",
         "outputs use the window as it was", _refs(_TRT, 17522, 17539) + _refs(_SGLANG, 16714, 16899)),
    Flag("cross-program-state-shift", "race", "one group of channels or tokens shifts a window that another still reads",
         "every part of a row uses the window as it was", ("intel/llm-scaler#356", "intel/llm-scaler#677")),
    Flag("inplace-output-halo", "race", "a later block reads its older taps from outputs", "taps are inputs"),
    Flag("fast-path-writes-input", "race", "results are stored into x", "x is never written", _refs(_TRT, 13103)),
    Flag("autotune-reruns-mutate-state", "race", "the update runs more than once on the first call", "one call is one update", _refs(_FLA, 859, 860)),
    Flag("result-depends-on-batch", "race", "neighbours, block sizes or the schedule change bits", "a row's result depends on the row alone", _refs(_VLLM, 55524)),
    Flag("wrong-only-at-scale", "race", "large calls are wrong where small ones are right", "size changes nothing", _refs(_NPU, 572) + ("gittensor-ai-lab/sparkinfer#705",)),
    Flag("hang-on-specific-lengths", "race", "some lengths never return", "every legal call returns", _refs(_ASCEND, 5357, 5391) + _refs(_FLA, 992)),
    # Addresses.
    Flag("int32-token-offset", "addressing", "token times pitch wraps in 32 signed bits", "addresses are 64-bit", _refs(_SGLANG, 33665) + _refs(_VLLM, 41617)),
    Flag("int32-slot-offset", "addressing", "slot times pitch wraps in 32 signed bits", "addresses are 64-bit", _refs(_VLLM, 20838)),
    Flag("uint32-silent-wrap", "addressing", "an offset wraps in 32 unsigned bits and lands inside the buffer", "addresses are 64-bit", _refs(_CAUSAL, 114) + _refs(_SGLANG, 29602)),
    Flag("grid-dimension-limit", "addressing", "work past 65535 blocks of an axis is lost or refused", "any dim and any batch", _refs(_CAUSAL, 32, 48) + _refs(_FLA, 992)),
    # The call itself.
    Flag("positional-abi-drift", "call", "axes or arguments are exchanged and happen to fit", "axes are what the contract says, also when sizes are equal",
         _refs(_MAMBA, 168) + _refs(_CAUSAL, 22) + _refs(_FLA, 1176)),
    Flag("bad-call-accepted", "call", "a wrong shape, dtype, option or index is accepted, or fails with another error",
         "the contract's error, naming the argument"),
    # Fronts of linear-attention layers.
    Flag("norm-over-all-heads", "front", "the sum of squares runs over all heads, over q and k together, or is a mean",
         "each head has the sum over its own channels"),
    Flag("norm-eps-outside-root", "front", "eps is added behind the root, is left out, or bounds the norm from below",
         "1 / sqrt(sum + eps)"),
    Flag("norm-before-activation", "front", "heads are normalised before SiLU", "the norm meets activated values"),
    Flag("norm-of-v", "front", "heads of v are normalised as well, or those of k are not", "q and k are, v is not"),
    Flag("norm-misapplied", "front", "heads are normalised although the call says no", "qk_l2norm False leaves q and k as they are"),
    Flag("norm-rounding-misplaced", "front", "values are rounded before the norm where they must not be, or not where they must",
         "norm_rounding says whether the norm meets values of x's dtype or float32"),
    Flag("norm-sum-order", "front", "squares are added from one end to the other, or fused with the sum",
         "a perfect binary tree over neighbours, squares rounded"),
    Flag("q-scale-misapplied", "front", "q is scaled twice, or not without the norm, or k is scaled too", "q alone is scaled, once"),
    Flag("head-tail-unmasked", "front", "a head that is no power of two takes squares of its neighbour, or loses its last channels",
         "a head of another size is padded with zeros"),
    Flag("heads-misordered", "front", "k comes before q, heads interleave, or q is repeated for each head of v",
         "q heads, k heads, v heads, each as often as the weight has it"),
    Flag("softplus-overflow", "front", "exp overflows from 89 on and g is minus infinity, or a gate is NaN",
         "softplus is linear above 20, the sigmoid goes to its limits"),
    Flag("decay-misapplied", "front", "dt_bias is dropped, A_log is not taken through exp, a head has another's rate, or the bound is a clamp",
         "g = -exp(A_log) softplus(a + dt_bias), or lower_bound sigmoid(exp(A_log) (a + dt_bias))"),
    Flag("beta-rounded", "front", "beta is rounded to b's dtype although the call does not say so, or not although it does",
         "beta_rounding says it; the result is float32"),
    Flag("gates-not-optional", "front", "a call without a, or without b, fails or gets a gate", "what is not asked for is None"),
    Flag("dead-rows-in-front", "front", "padding rows or the tail get gates of what lies there, or NaN from 0 / 0",
         "every result is zero there"),
    Flag("gate-slices-exchanged", "front", "B, C and x of a gated convolution are confused, or read at fixed places",
         "the slices are where channel_offsets says"),
    Flag("gated-product-misplaced", "front", "the pool keeps x in place of B x, the product is not rounded, or C meets the unrounded sum",
         "u = round(B x), c = round(conv(u)), out = round(C c); windows are of u"),
    # Gradients.
    Flag("dht-slot-clamped", "gradient", "in a row shorter than the window the final state's gradient lands on shifted tokens",
         "the final state's gradient goes to the entries that it holds", _refs(_FLA, 1140, 1141)),
    Flag("dh0-passthrough-dropped", "gradient", "entries of the initial state that survive into the final one get no gradient",
         "in a short row the final state's gradient reaches the initial state", _refs(_FLA, 1140, 1141)),
    Flag("initial-state-missing-in-dweight", "gradient", "dweight leaves out taps that read the initial state",
         "dweight counts every entry that a tap has read", _refs(_FLA, 568, 714)),
    Flag("dy-assumed-contiguous", "gradient", "the upstream gradient is read with assumed strides",
         "strides of upstream gradients never change values", _refs(_FLA, 871, 1138)),
    Flag("dweight-multiplied-by-batch", "gradient", "dweight counts every row once for each row",
         "dweight is the sum over the tokens of all rows", _refs(_FLA, 955)),
    Flag("backward-halo-wrong", "gradient", "at the end of a block or row, dx misses later tokens or takes another row's",
         "dx of a token collects from the next width-1 tokens of its row"),
    Flag("tail-enters-gradient", "gradient", "tokens past the last row get a gradient, or give one",
         "they get zero, and what comes in for them is not read"),
    Flag("norm-gradient-wrong", "front", "the backward pass takes a head's norm for a constant, or projects on other channels than its own",
         "r * (dn - n * sum(n * dn)) of each head of q and k"),
    Flag("gate-gradient-wrong", "front", "a factor of the gates' gradients is missing: the rate, the sigmoid, the slope of beta, a sum over tokens",
         "the derivatives of g and beta as the contract writes them"),
    Flag("gated-gradient-wrong", "front", "gradients of B, C and x are exchanged, or overwrite each other where slices overlap",
         "dB = du * x, dC = dout * c, dx = du * B, added up by channel"),
    Flag("slope-of-rounded", "gradient", "SiLU' is taken of the rounded pre-activation, of another formula, or left out",
         "SiLU' of the float32 pre-activation"),
    Flag("partial-sums-rounded", "gradient", "dweight or dbias is summed in 16 bits", "sums are float32; one rounding, at the store"),
    Flag("nondeterministic-dweight", "gradient", "dweight or dbias is summed in an order that differs between runs or schedules",
         "the same call gives the same bits, in either schedule", _refs(_CAUSAL, 80, 88)),
]  # fmt: skip

FLAGS: dict[str, Flag] = {flag.id: flag for flag in _ALL}

NOT_EXPRESSIBLE = {
    "left-padding-leaks": "rows are packed; there is no padding inside a row",
    "final-state-exchange-overread": "reads past the end of registers need a memory checker",
    "context-parallel-halo": "one call runs on one device",
    "seq-index-tail-overread": "the contract has no per-token sequence numbers; guards hold tempting values",
}
"""Failure modes of this family of kernels that no call of this contract can show, and why."""
