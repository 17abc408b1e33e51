"""PyTorch contenders and torch's side of the timing policy."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gate import Inputs
from benchmarks.providers import Missing, Prepared, Unsupported
from benchmarks.record import Counter
from benchmarks.timing import (
    FLUSH_BYTES,
    Cupti,
    CuptiTimer,
    CuptiUnavailable,
    EventTimer,
    WallTimer,
    take_turns,
)
from benchmarks.workloads import PREFILL, UPDATE, random_batches
from oracle.numerics import TypedArray


class TorchBackend:
    """Providers of torch on the first CUDA GPU, or on the CPU for dry runs."""

    framework = "torch"

    def __init__(self):
        self.is_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.is_gpu else torch.device("cpu")
        self.device_name = torch.cuda.get_device_name(0) if self.is_gpu else "cpu"
        self._flush_buffer = torch.zeros(FLUSH_BYTES // 4, device=self.device) if self.is_gpu else None
        self._flush_sum = torch.zeros((), device=self.device)
        self.cupti: Cupti | None = None

    def versions(self) -> dict[str, str]:
        found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
        with contextlib.suppress(ImportError):
            found["triton"] = importlib.import_module("triton").__version__
        return found

    # The device, as timing.py needs it.

    def flush(self) -> None:
        """Reads a buffer several times the L2, which leaves only clean lines of it there."""
        if self._flush_buffer is not None:
            torch.sum(self._flush_buffer, dim=0, out=self._flush_sum)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def event_us(self, call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def timer(self) -> tuple[CuptiTimer | EventTimer | WallTimer, list[str]]:
        """The best timer there is, and notes on why it is not a better one."""
        if not self.is_gpu:
            return WallTimer(self), ["no CUDA GPU"]
        try:
            self.cupti = self.cupti or Cupti()
            return CuptiTimer(self.cupti, self), []
        except CuptiUnavailable as error:
            return EventTimer(self), [f"no CUPTI: {error}"]

    def graph(self, prepared: dict[str, Prepared], calls: int, samples: int):
        """GPU time a call in a captured CUDA graph of `calls` calls on the same buffers, by CUDA events."""
        graphs, failed = {}, {}
        for name, contender in prepared.items():
            try:
                graphs[name] = self.capture(contender.call, calls)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"

        def sample(replay):
            replay()  # brings this contender's buffers into the L2
            return self.event_us(replay) / calls, None

        method = f"CUDA graph of {calls} calls on the same buffers, CUDA events around a replay, by call"
        timings, more = take_turns(graphs, sample, method, samples=samples, warmup=2)
        return timings, failed | more

    @staticmethod
    def without_gradients() -> None:
        """From here on this process records no gradients."""
        torch.set_grad_enabled(False)

    def capture(self, call, calls: int):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    # Contenders.

    def load(self, inputs: Inputs) -> SimpleNamespace:
        """The workload's arguments on the device, shared by all contenders; pools are made by each."""
        w = inputs.workload
        x = self._tensor(inputs.x)
        if w.op == UPDATE:
            seqlen = w.lengths[0]
            x = x.view(w.batch, seqlen, w.dim) if seqlen > 1 else x
        if w.x_layout == "channel_first":
            x = x.t().contiguous().t()
        return SimpleNamespace(
            inputs=inputs,
            workload=w,
            x=x,
            weight=self._tensor(inputs.weight),
            bias=None if inputs.bias is None else self._tensor(inputs.bias),
            query_start_loc=torch.from_numpy(inputs.query_start_loc).to(self.device),
            cache_indices=torch.from_numpy(inputs.cache_indices).to(self.device),
            has_initial_state=torch.from_numpy(inputs.has_initial_state).to(self.device),
        )

    def pool(self, args: SimpleNamespace) -> torch.Tensor:
        pool = self._tensor(args.inputs.pool)
        if args.workload.pool_layout == "state_last":
            pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
        return pool

    def prepare(self, name: str, args: SimpleNamespace) -> Prepared:
        """The named contender on these arguments.

        Raises:
          Missing: its package is not installed.
          Unsupported: it cannot run this workload.
        """
        return getattr(self, f"_{name}")(args)

    def _prepare_operation(self, args: SimpleNamespace, call) -> Prepared:
        """From `call(pool) -> out`, with the pool updated in place."""
        pool = self.pool(args)

        def answer():
            fresh = self.pool(args)
            torch.full_like(args.x, float("nan"))  # freed at once: the next allocation of this size holds NaN
            out = call(fresh)
            return self._numpy(out), self._numpy(fresh)

        return Prepared(lambda: call(pool), answer)

    def _twin(self, args: SimpleNamespace, schedule: str) -> Prepared:
        import triton_impl

        w, x, weight, bias, slots = args.workload, args.x, args.weight, args.bias, args.cache_indices
        if w.op == UPDATE:
            if schedule != "auto":
                raise Unsupported("an update has no schedule")

            def call(pool):
                return triton_impl.causal_conv1d_update(
                    x, weight, bias, pool, slots, activation=w.activation
                ).out

        else:
            offsets, flags, longest = args.query_start_loc, args.has_initial_state, max(w.lengths)

            def call(pool):
                return triton_impl.causal_conv1d_fn(
                    x, weight, bias, pool, offsets, slots, flags,
                    activation=w.activation, max_seqlen=longest, schedule=schedule,
                ).out  # fmt: skip

        prepared = self._prepare_operation(args, call)
        return prepared if self.is_gpu else prepared._replace(note="on a CPU: backend eager, not the kernel")

    def _triton(self, args):
        return self._twin(args, "auto")

    def _triton_per_sequence(self, args):
        return self._twin(args, "per_sequence")

    def _triton_flat(self, args):
        return self._twin(args, "flat")

    def _torch_limit(self, args) -> Prepared:
        w = args.workload  # as many bytes as the call must move; they start with x
        return self._copy_of(
            self._tensor(TypedArray(w.dtype, np.resize(args.inputs.x.data, w.limit_elements))), args
        )

    def _torch_copy(self, args) -> Prepared:
        if args.workload.op == UPDATE:
            raise Unsupported("x is the smallest part of what an update moves")
        return self._copy_of(args.x, args)

    def _copy_of(self, source, args) -> Prepared:
        out = torch.empty_like(source)

        def answer():
            out.fill_(float("nan"))
            out.copy_(source)
            return self._numpy(out if source is args.x else out[: args.x.numel()]), None

        return Prepared(lambda: out.copy_(source), answer)

    def _torch_conv1d(self, args) -> Prepared:
        w = args.workload
        if len(set(w.lengths)) != 1:
            raise Unsupported("torch conv1d: rows of unequal length")
        keep = w.width - 1
        slots = args.cache_indices.long()
        kernel = args.weight.unsqueeze(1)
        x = args.x.reshape(w.batch, w.lengths[0], w.dim)

        def call(pool):
            e = torch.cat([pool[slots].to(x.dtype), x], dim=1)
            out = F.conv1d(e.transpose(1, 2), kernel, args.bias, groups=w.dim)
            out = F.silu(out) if w.activation else out
            pool[slots] = e[:, e.shape[1] - keep :].to(pool.dtype)
            return out.transpose(1, 2).contiguous()

        return self._prepare_operation(args, call)

    def _causal_conv1d(self, args) -> Prepared:
        peer = import_peer("causal_conv1d")
        w = args.workload
        if len(set(w.lengths)) != 1:
            raise Unsupported("causal_conv1d: rows of unequal length with states")
        if w.op == UPDATE:
            x = args.x if args.x.dim() == 2 else args.x.transpose(1, 2)

            def call(pool):
                out = peer.causal_conv1d_update(
                    x, pool.transpose(1, 2), args.weight, args.bias, w.activation,
                    conv_state_indices=args.cache_indices,
                )  # fmt: skip
                return out if out.dim() == 2 else out.transpose(1, 2)

        else:
            x = args.x.view(w.batch, w.lengths[0], w.dim).transpose(1, 2)
            slots = args.cache_indices.long()

            def call(pool):
                out, last = peer.causal_conv1d_fn(
                    x, args.weight, args.bias, initial_states=pool[slots].transpose(1, 2),
                    return_final_states=True, activation=w.activation,
                )  # fmt: skip
                pool[slots] = last.transpose(1, 2)
                return out.transpose(1, 2)

        return self._prepare_operation(args, call)

    def _fla(self, args) -> Prepared:
        ops = import_peer("fla.modules.causal_conv1d", "fla.modules.convolution")
        w = args.workload
        slots = args.cache_indices.long()
        offsets = args.query_start_loc.long()

        if w.op == UPDATE:
            if w.lengths[0] != 1:
                raise Unsupported("fla: several tokens an update")

            def step(cache):
                return ops.causal_conv1d_update(
                    args.x, cache, weight=args.weight, bias=args.bias, activation=w.activation
                )

        else:

            def step(cache):
                out, last = ops.causal_conv1d(
                    args.x[None], args.weight, args.bias, initial_state=cache, output_final_state=True,
                    activation=w.activation, cu_seqlens=offsets,
                )  # fmt: skip
                return out[0], last

        def cache_of(pool):  # [batch, dim, width]; its oldest column is never read
            return F.pad(pool[slots].transpose(1, 2), (1, 0)).contiguous()

        cache = cache_of(self.pool(args))

        def answer():
            fresh = self.pool(args)
            out, last = step(cache_of(fresh))
            fresh[slots] = last[:, :, 1:].transpose(1, 2)
            return self._numpy(out), self._numpy(fresh)

        return Prepared(lambda: step(cache), answer, note="states are a dense tensor, not slots of a pool")

    def _sglang(self, args) -> Prepared:
        lengths = list(args.workload.lengths)
        return self._engine(args, *engine("sglang"), lambda: ([lengths], {}))

    def _vllm(self, args) -> Prepared:
        def metadata():
            utils = import_peer("vllm.v1.attention.backends.utils")
            numbers, batch, chunk = utils.compute_causal_conv1d_metadata(
                args.query_start_loc.cpu(), device=self.device
            )
            fields = dict(nums_dict=numbers, batch_ptr=batch, token_chunk_offset_ptr=chunk)
            return [], dict(metadata=SimpleNamespace(**fields))

        return self._engine(args, *engine("vllm"), metadata)

    def _engine(self, args, peer, options, prefill_arguments) -> Prepared:
        """SGLang and vLLM share channel-first x, [slots, dim, state] pools and most names."""
        w = args.workload
        if w.op == UPDATE:
            x = args.x if args.x.dim() == 2 else args.x.transpose(1, 2)

            def call(pool):
                out = peer.causal_conv1d_update(
                    x.clone(), pool.transpose(1, 2), args.weight, args.bias, w.activation,
                    conv_state_indices=args.cache_indices, **options,
                )  # fmt: skip
                return out if out.dim() == 2 else out.transpose(1, 2)

            return self._prepare_operation(args, call)._replace(
                note="includes a copy of x, which may be overwritten"
            )
        more, named = prefill_arguments()

        def call(pool):
            return peer.causal_conv1d_fn(
                args.x.t(), args.weight, args.bias, pool.transpose(1, 2), args.query_start_loc, *more,
                cache_indices=args.cache_indices, has_initial_state=args.has_initial_state,
                activation=w.activation, pad_slot_id=-1, **named, **options,
            ).t()  # fmt: skip

        return self._prepare_operation(args, call)

    def _triton_empty(self, args) -> Prepared:
        if not self.is_gpu:
            raise Unsupported("an empty kernel needs a GPU")
        import triton

        @triton.jit
        def empty():
            pass

        return Prepared(lambda: empty[(1,)](), None)

    def _torch_add(self, args) -> Prepared:
        one = torch.ones(1, device=self.device)
        return Prepared(lambda: one.add_(1.0), None)

    # Counters.

    def count(self) -> list[Counter]:
        """Compilations and synchronisations of the twin over random batches of one shape."""
        try:
            from triton import knobs

            import triton_impl
        except ImportError as error:
            return [Counter("compilations", "triton", "torch", None, "", f"not importable: {error}")]
        if not self.is_gpu:
            return [Counter("compilations", "triton", "torch", None, "", "no CUDA GPU")]
        compiled: list[str] = []
        before = knobs.compilation.listener
        knobs.compilation.listener = lambda **event: compiled.append(str(event.get("src")))
        counters = []
        try:
            for op in (PREFILL, UPDATE):
                batches, dim, tokens, rows, slots = self._batches(op)
                weight = torch.randn(dim, 4, device=self.device, dtype=torch.bfloat16)
                bias = torch.randn(dim, device=self.device, dtype=torch.bfloat16)
                pool = torch.randn(slots, 3, dim, device=self.device, dtype=torch.bfloat16)
                x = torch.randn(tokens, dim, device=self.device, dtype=torch.bfloat16)

                def run(batch, op=op, x=x, weight=weight, bias=bias, pool=pool):
                    offsets, indices, has, longest = batch
                    if op == PREFILL:
                        triton_impl.causal_conv1d_fn(
                            x,
                            weight,
                            bias,
                            pool,
                            offsets,
                            indices,
                            has,
                            activation="silu",
                            max_seqlen=longest,
                        )
                    else:
                        triton_impl.causal_conv1d_update(x, weight, bias, pool, indices, activation="silu")

                for batch in batches[:4]:
                    run(batch)
                torch.cuda.synchronize()
                heard = bool(
                    compiled
                )  # a listener that misses the first compilations proves nothing by its silence
                compiled.clear()
                waits, reason = 0, ""
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # "synchronization debug mode is a prototype feature"
                    torch.cuda.set_sync_debug_mode("error")
                try:
                    for batch in batches[4:]:
                        run(batch)
                except RuntimeError as error:
                    waits, reason = None, str(error).splitlines()[0]
                try:
                    pool[0, 0, 0].item()
                    waits, reason = None, "torch reported nothing of an item() either"
                except RuntimeError:
                    pass  # as it must
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                shape = f"{len(batches) - 4} random batches of one shape ({op}, {tokens} tokens, {rows} rows, D {dim})"
                deaf = "" if heard else "the listener heard nothing of the first compilations"
                counters += [
                    Counter("compilations", "triton", "torch", len(compiled) if heard else None,
                            f"Triton's compilation listener, {shape}", deaf),
                    Counter("synchronisations", "triton", "torch", waits,
                            f"torch.cuda.set_sync_debug_mode('error'), {shape}", reason),
                ]  # fmt: skip
        finally:
            knobs.compilation.listener = before
        return counters

    def _batches(self, op: str):
        dim, rows, slots = 2048, 16, 64
        tokens = 2048 if op == PREFILL else rows
        batches = [
            (
                torch.tensor(offsets, dtype=torch.int32, device=self.device),
                torch.tensor(indices, dtype=torch.int32, device=self.device),
                torch.tensor(has, device=self.device),
                longest,
            )
            for offsets, indices, has, longest in random_batches(204, tokens, rows, slots)
        ]
        return batches, dim, tokens, rows, slots

    # Arrays.

    def _tensor(self, array: TypedArray) -> torch.Tensor:
        if array.dtype == "bfloat16":
            return torch.from_numpy(array.data.view(np.int16)).to(self.device, copy=True).view(torch.bfloat16)
        return torch.from_numpy(array.data).to(self.device, copy=True)

    def _numpy(self, tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().contiguous().cpu()
        return (
            tensor.view(torch.int16).numpy().view(np.uint16)
            if tensor.dtype == torch.bfloat16
            else tensor.numpy()
        )


ENGINES = {
    "sglang": (
        "sglang.kernels.ops.mamba.causal_conv1d_triton",
        "sglang.srt.layers.attention.mamba.causal_conv1d_triton",
    ),
    "vllm": ("vllm.model_executor.layers.mamba.ops.causal_conv1d",),
}


def engine(name: str) -> tuple[Any, dict[str, Any]]:
    """The module of an engine's two operations, and what they are given besides what both engines take."""
    peer = import_peer(*ENGINES[name])
    options: dict[str, Any] = {}
    for operation in (peer.causal_conv1d_fn, peer.causal_conv1d_update):
        if "null_block_id" in inspect.signature(operation).parameters:
            options["null_block_id"] = -1  # slot 0 is an ordinary one here
    return peer, options


def import_peer(*names: str):
    """The first of these modules that is installed."""
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise Missing("; ".join(reasons))
