"""JAX contenders and JAX's side of the timing policy."""

from __future__ import annotations

import functools
import importlib
import os
from types import SimpleNamespace

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX first opens the GPU

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from benchmarks.gate import Inputs
from benchmarks.providers import Missing, Prepared, Unsupported
from benchmarks.record import Counter
from benchmarks.timing import (
    FLUSH_BYTES,
    Cupti,
    CuptiTimer,
    CuptiUnavailable,
    MosaicCupti,
    WallTimer,
    take_turns,
)
from benchmarks.workloads import PREFILL, UPDATE, random_batches
from oracle.numerics import TypedArray


class JaxBackend:
    """Providers of JAX on the first GPU, or on the CPU for dry runs."""

    framework = "jax"

    def __init__(self):
        self.is_gpu = jax.default_backend() == "gpu"
        self.device = jax.devices()[0]
        self.device_name = self.device.device_kind if self.is_gpu else "cpu"
        self._last = self._flushed = None
        self._flush_sum = jax.jit(jnp.sum)
        if self.is_gpu:
            self._flush_buffer = jax.device_put(np.zeros(FLUSH_BYTES // 4, np.float32), self.device)
        self.cupti: Cupti | MosaicCupti | None = None

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__, "jaxlib": importlib.import_module("jaxlib").__version__}

    # The device, as timing.py needs it.

    def flush(self) -> None:
        """Reads a buffer several times the L2, which leaves only clean lines of it there."""
        if self.is_gpu:
            self._flushed = self._flush_sum(self._flush_buffer)

    def synchronize(self) -> None:
        """Waits for the last call and the last flush; programs run in order on one stream."""
        if self._last is not None:
            jax.block_until_ready(self._last)
        if self._flushed is not None:
            jax.block_until_ready(self._flushed)

    @staticmethod
    def without_gradients() -> None:
        """JAX records none unless asked."""

    def remember(self, result):
        """The result of a call, which `synchronize` is to wait for."""
        self._last = jax.tree.leaves(result)[0]  # the output; a pool is soon donated, and gone
        return result

    def timer(self) -> tuple[CuptiTimer | WallTimer, list[str]]:
        """The best timer there is, and notes on why it is not a better one."""
        if not self.is_gpu:
            return WallTimer(self), ["no GPU"]
        try:
            self.cupti = self.cupti or Cupti()
            return CuptiTimer(self.cupti, self), []
        except CuptiUnavailable as error:
            self.cupti = MosaicCupti()
            return CuptiTimer(self.cupti, self), [f"CUPTI by ctypes failed: {error}"]

    def graph(self, prepared: dict[str, Prepared], calls: int, samples: int):
        """GPU time a call in one jitted program of `calls` calls, by CUPTI, first start to last end.

        XLA runs such a program as a CUDA graph where it can. A copy cannot be chained: XLA removes it.
        """
        if not isinstance(self.cupti, Cupti):
            return {}, dict.fromkeys(prepared, "needs CUPTI's start times")
        timer = CuptiTimer(self.cupti, self)
        chains, failed = {}, {}
        for name, contender in prepared.items():
            if contender.chain is None:
                failed[name] = "cannot be chained in one program; see warm"
                continue
            try:
                chains[name] = contender.chain(calls)
                chains[name]()
                self.synchronize()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                chains.pop(name, None)
        method = (
            f"one jitted program of {calls} calls on the same buffers, CUPTI first start to last end, by call"
        )
        timings, more = take_turns(
            chains, lambda run: timer.span(run, calls), method, samples=samples, warmup=2
        )
        return timings, failed | more

    # Contenders.

    def load(self, inputs: Inputs) -> SimpleNamespace:
        """The workload's arguments on the device, shared by all contenders; pools are made by each."""
        w = inputs.workload
        if w.x_layout != "token_major" or w.pool_layout != "dim_last":
            raise Unsupported("a JAX array has no strides to choose")
        x = self._array(inputs.x)
        if w.op == UPDATE and w.lengths[0] > 1:
            x = x.reshape(w.batch, w.lengths[0], w.dim)
        return SimpleNamespace(
            inputs=inputs,
            workload=w,
            x=x,
            weight=self._array(inputs.weight),
            bias=None if inputs.bias is None else self._array(inputs.bias),
            query_start_loc=jnp.asarray(inputs.query_start_loc),
            cache_indices=jnp.asarray(inputs.cache_indices),
            has_initial_state=jnp.asarray(inputs.has_initial_state),
        )

    def prepare(self, name: str, args: SimpleNamespace) -> Prepared:
        """The named contender on these arguments.

        Raises:
          Missing: its package is not installed.
          Unsupported: it cannot run this workload.
        """
        return getattr(self, f"_{name}")(args)

    def _prepare_operation(self, args: SimpleNamespace, operation, note: str = "") -> Prepared:
        """From `operation(x, weight, bias, pool, offsets, slots, has) -> (out, pool)`; the pool is donated."""
        step = jax.jit(operation, donate_argnums=3)
        pool = self._array(args.inputs.pool)
        rest = (args.query_start_loc, args.cache_indices, args.has_initial_state)

        def call():
            nonlocal pool
            out, pool = self.remember(step(args.x, args.weight, args.bias, pool, *rest))
            return out

        def answer():
            out, fresh = step(args.x, args.weight, args.bias, self._array(args.inputs.pool), *rest)
            return self._numpy(out), self._numpy(fresh)

        def chain(calls: int):
            once = jax.jit(operation)  # traced and lowered once, however many calls there are

            def program(x, weight, bias, pool, *rest):
                out = None
                for _ in range(calls):
                    out, pool = once(x, weight, bias, pool, *rest)
                return out, pool

            many = jax.jit(program, donate_argnums=3)
            own = self._array(args.inputs.pool)

            def run():
                nonlocal own
                out, own = self.remember(many(args.x, args.weight, args.bias, own, *rest))
                return out

            return run

        return Prepared(call, answer, chain, note)

    def _twin(self, args: SimpleNamespace, schedule: str) -> Prepared:
        import pallas_impl

        w = args.workload
        if w.op == UPDATE:
            if schedule != "auto":
                raise Unsupported("an update has no schedule")

            def operation(x, weight, bias, pool, offsets, slots, has):
                return pallas_impl.causal_conv1d_update(x, weight, bias, pool, slots, activation=w.activation)

        else:
            longest = max(w.lengths)

            def operation(x, weight, bias, pool, offsets, slots, has):
                return pallas_impl.causal_conv1d_fn(
                    x, weight, bias, pool, offsets, slots, has,
                    activation=w.activation, max_seqlen=longest, schedule=schedule,
                )  # fmt: skip

        note = "" if self.is_gpu else "on a CPU: backend xla, not the kernel"
        return self._prepare_operation(args, operation, note)

    def _pallas(self, args):
        return self._twin(args, "auto")

    def _pallas_per_sequence(self, args):
        return self._twin(args, "per_sequence")

    def _pallas_flat(self, args):
        return self._twin(args, "flat")

    def _jax_limit(self, args) -> Prepared:
        w = args.workload  # as many bytes as the call must move; they start with x
        return self._copy_of(
            self._array(TypedArray(w.dtype, np.resize(args.inputs.x.data, w.limit_elements))), args
        )

    def _jax_copy(self, args) -> Prepared:
        if args.workload.op == UPDATE:
            raise Unsupported("x is the smallest part of what an update moves")
        return self._copy_of(args.x, args)

    def _copy_of(self, source, args) -> Prepared:
        copy = jax.jit(jnp.copy)
        out = copy(source)
        if out.unsafe_buffer_pointer() == source.unsafe_buffer_pointer():
            raise Unsupported("XLA returned the buffer itself instead of copying it")

        def answer():
            return self._numpy(copy(source) if source is args.x else copy(source)[: args.x.size]), None

        return Prepared(lambda: self.remember(copy(source)), answer)

    def _jax_conv(self, args) -> Prepared:
        w = args.workload
        if len(set(w.lengths)) != 1:
            raise Unsupported("lax convolution: rows of unequal length")
        keep = w.width - 1

        def operation(x, weight, bias, pool, offsets, slots, has):
            rows = x.reshape(w.batch, w.lengths[0], w.dim)
            e = jnp.concatenate([pool[slots].astype(x.dtype), rows], axis=1)
            out = lax.conv_general_dilated(
                e, weight.T[:, None, :], (1,), "VALID",
                dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=w.dim,
            )  # fmt: skip
            out = out if bias is None else out + bias
            out = jax.nn.silu(out) if w.activation else out
            return out.reshape(x.shape), pool.at[slots].set(e[:, e.shape[1] - keep :].astype(pool.dtype))

        return self._prepare_operation(args, operation)

    def _jax_shifted(self, args) -> Prepared:
        return self._prepare_operation(args, functools.partial(shifted_adds, args.workload))

    def _sgl_jax(self, args) -> Prepared:
        try:
            module = importlib.import_module("sgl_jax.srt.kernels.gdn.gated_delta")
        except ImportError as error:
            raise Missing(str(error)) from None
        w = args.workload
        if w.op == UPDATE and w.lengths[0] != 1:
            raise Unsupported("sgl_jax: several tokens an update")

        def operation(x, weight, bias, pool, offsets, slots, has):
            states = pool.transpose(0, 2, 1)
            if w.op == UPDATE:
                out, states = module.jax_causal_conv1d_update(
                    x, states, slots, weight, bias, activation=w.activation
                )
            else:
                out, states = module.jax_causal_conv1d_prefill(
                    x.T, weight, bias, cu_seqlens=offsets, conv_state=states, state_indices=slots,
                    has_initial_state=has, activation=w.activation,
                )  # fmt: skip
                out = out.T
            return out, states.transpose(0, 2, 1)

        return self._prepare_operation(args, operation, "pool transposed around the call, as its layout asks")

    def _jax_add(self, args) -> Prepared:
        one = jnp.ones(1)
        add = jax.jit(lambda v: v + 1)
        return Prepared(lambda: self.remember(add(one)), None)

    # Counters.

    def count(self) -> list[Counter]:
        """Compilations of the twin over random batches of one shape."""
        try:
            import pallas_impl
        except ImportError as error:
            return [Counter("compilations", "pallas", "jax", None, "", f"not importable: {error}")]
        if not self.is_gpu:
            return [Counter("compilations", "pallas", "jax", None, "", "no GPU")]
        compiled: list[str] = []

        def listen(event: str, duration: float, **_) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        counters = []
        for op in (PREFILL, UPDATE):
            dim, rows, slots = 2048, 16, 64
            tokens = 2048 if op == PREFILL else rows
            random = np.random.default_rng(0)
            x, weight, bias, pool = (
                jnp.asarray(random.standard_normal(shape).astype(ml_dtypes.bfloat16))
                for shape in ((tokens, dim), (dim, 4), (dim,), (slots, 3, dim))
            )
            batches = [
                (np.array(offsets, np.int32), np.array(indices, np.int32), np.array(has))
                for offsets, indices, has, _ in random_batches(204, tokens, rows, slots)
            ]

            def operation(x, weight, bias, pool, offsets, indices, has, op=op):
                if op == PREFILL:  # no max_seqlen: it is static, and lengths differ
                    return pallas_impl.causal_conv1d_fn(
                        x, weight, bias, pool, offsets, indices, has, activation="silu"
                    )
                return pallas_impl.causal_conv1d_update(x, weight, bias, pool, indices, activation="silu")

            step = jax.jit(operation, donate_argnums=3)
            heard = False
            for i, batch in enumerate(batches):
                if i == 4:
                    jax.block_until_ready(pool)
                    heard = bool(compiled)  # else its silence afterwards would prove nothing
                    compiled.clear()
                _, pool = step(x, weight, bias, pool, *batch)
            jax.block_until_ready(pool)
            method = (
                f"jax.monitoring's backend compilations, {len(batches) - 4} random batches of one shape "
                f"({op}, {tokens} tokens, {rows} rows, D {dim}), max_seqlen None"
            )
            reason = "" if heard else "the listener heard nothing of the first compilation"
            counters.append(
                Counter("compilations", "pallas", "jax", len(compiled) if heard else None, method, reason)
            )
        return counters

    # Arrays.

    def _array(self, array: TypedArray) -> jax.Array:
        data = array.data.view(ml_dtypes.bfloat16) if array.dtype == "bfloat16" else array.data
        return jax.device_put(data, self.device)

    @staticmethod
    def _numpy(array: jax.Array) -> np.ndarray:
        data = np.asarray(array)
        return data.view(np.uint16) if data.dtype == ml_dtypes.bfloat16 else data


def shifted_adds(workload, x, weight, bias, pool, offsets, slots, has):
    """The operation as XLA is usually given it: shifted multiply-adds in float32, rows' first tokens apart."""
    keep = workload.width - 1
    flat = x.reshape(-1, workload.dim)
    tokens = flat.shape[0]
    if workload.op == UPDATE:
        offsets = jnp.arange(workload.batch + 1, dtype=jnp.int32) * workload.lengths[0]
    start, length = offsets[:-1], offsets[1:] - offsets[:-1]
    taps = weight.astype(jnp.float32).T
    base = jnp.zeros((workload.dim,), jnp.float32) if bias is None else bias.astype(jnp.float32)

    padded = jnp.pad(flat, ((keep, 0), (0, 0)))
    body = base + sum(taps[j] * padded[j : j + tokens].astype(jnp.float32) for j in range(keep + 1))

    window = jnp.where(has[:, None, None], pool[slots], 0).astype(x.dtype)
    first = start[:, None] + jnp.arange(keep)
    e = jnp.concatenate([window, flat[jnp.clip(first, 0, tokens - 1)]], axis=1)
    head = base + sum(taps[j] * e[:, j : j + keep].astype(jnp.float32) for j in range(keep + 1))
    place = jnp.where(jnp.arange(keep) < length[:, None], first, tokens)
    pre = body.at[place].set(head, mode="drop")
    out = (jax.nn.silu(pre) if workload.activation else pre).astype(x.dtype).reshape(x.shape)

    column = length[:, None] + jnp.arange(keep)  # of window ++ x
    from_x = flat[jnp.clip(start[:, None] + column - keep, 0, tokens - 1)]
    from_window = jnp.take_along_axis(window, jnp.clip(column, 0, keep - 1)[..., None], axis=1)
    states = jnp.where((column < keep)[..., None], from_window, from_x).astype(pool.dtype)
    return out, pool.at[slots].set(states)
