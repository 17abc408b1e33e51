"""The timing policy, one for both frameworks.

cold    GPU time of one call with a cold, clean L2: before each call a buffer of several times the L2 is read,
        behind which the call is queued, so that no host latency shows. The time is the sum of the durations
        of the call's kernels, copies and memsets as CUPTI's activity records give them.
warm    the same sum for the second of two calls in a row on the same buffers.
graph   a call inside a captured graph of many: gaps between kernels count, the host does not.
host    wall time of the host a call, calls not synchronised.

Contenders take turns (a different one first in each round), so that a clock or temperature drift hits all.
Every sample is kept; reports use the median with the 20th and 80th percentile.
"""

from __future__ import annotations

import ctypes
import gc
import glob
import os
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from benchmarks.record import Timing

FLUSH_BYTES = 256 << 20  # five times the 50 MB of an H100; 60 MB on an H200, 126 MB on a B200


class Activity(NamedTuple):
    """One GPU operation or one synchronisation; times in nanoseconds of the device's clock."""

    kind: str
    name: str
    start: int
    end: int


class CuptiUnavailable(RuntimeError):
    """CUPTI is not installed, not permitted, or delivers nothing."""


class Cupti:
    """CUPTI's activity records through ctypes: no profiler session, the same code under any framework.

    The framework must have loaded its own CUPTI, or none, before this is made: a second copy of the library
    in one process would receive nothing.
    """

    # Kinds and offsets of cupti_activity.h; the first 32 bytes of these records, and the kernel's name, have
    # kept their places from CUDA 12.0 (ActivityKernel9, Memcpy5, Memset4) to 13.0 (ActivityKernel10, Memcpy6).
    KINDS: ClassVar = {1: "memcpy", 2: "memset", 10: "kernel", 38: "synchronization"}
    _START, _END, _KERNEL_NAME, _COPY_KIND = 16, 24, 104, 4
    _WAIT_KIND, _STREAM_WAITS = (
        4,
        2,
    )  # a stream that waits for an event does so on the device: the host goes on
    _COPIES: ClassVar = {1: "host to device", 2: "device to host", 8: "device to device"}
    _BUFFER = 4 << 20
    _NO_MORE_RECORDS = 12  # CUPTI_ERROR_MAX_LIMIT_REACHED
    _FORCED = 1

    def __init__(self):
        path = find_cupti()
        try:
            self._lib = ctypes.CDLL(path)
        except OSError as error:
            raise CuptiUnavailable(f"cannot load {path}: {error}") from None
        self.path = path
        self._records: list[Activity] = []
        self._error: BaseException | None = None
        self._free: list[Any] = []
        self._in_use: dict[int, Any] = {}
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        requested = ctypes.CFUNCTYPE(
            None, ctypes.POINTER(pointer), ctypes.POINTER(size), ctypes.POINTER(size)
        )
        completed = ctypes.CFUNCTYPE(None, pointer, ctypes.c_uint32, pointer, size, size)
        self._callbacks = (
            requested(self._request),
            completed(self._complete),
        )  # kept alive: CUPTI calls them
        self._check("cuptiActivityRegisterCallbacks", *self._callbacks)
        version = ctypes.c_uint32()
        self._check("cuptiGetVersion", ctypes.byref(version))
        self.version = version.value

    def enable(self, kinds: tuple[str, ...] = ("kernel", "memcpy", "memset")) -> None:
        for number, name in self.KINDS.items():
            if name in kinds:
                self._check("cuptiActivityEnable", ctypes.c_int(number))

    def disable(self, kinds: tuple[str, ...] = ("kernel", "memcpy", "memset")) -> None:
        for number, name in self.KINDS.items():
            if name in kinds:
                self._check("cuptiActivityDisable", ctypes.c_int(number))

    def collect(self, at_least: int = 0, patience_s: float = 0.5) -> list[Activity]:
        """Records since the last call, by start time. The device must be idle."""
        deadline = time.monotonic() + patience_s
        while True:
            self._check("cuptiActivityFlushAll", ctypes.c_uint32(self._FORCED))
            if self._error is not None:
                raise CuptiUnavailable(f"reading a buffer failed: {self._error!r}")
            if len(self._records) >= at_least or time.monotonic() > deadline:
                break
            time.sleep(0.001)
        records, self._records = self._records, []
        return sorted(records, key=lambda r: r.start)

    def _check(self, function: str, *arguments) -> None:
        code = getattr(self._lib, function)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._lib.cuptiGetResultString(ctypes.c_int(code), ctypes.byref(text))
            raise CuptiUnavailable(f"{function}: {(text.value or b'?').decode()} ({code})")

    def _request(self, buffer, size, most) -> None:
        block = self._free.pop() if self._free else ctypes.create_string_buffer(self._BUFFER + 8)
        address = (ctypes.addressof(block) + 7) & ~7
        self._in_use[address] = block
        buffer[0], size[0], most[0] = address, self._BUFFER, 0

    def _complete(self, context, stream, buffer, size, valid) -> None:
        try:
            record = ctypes.c_void_p(None)
            while valid:
                code = self._lib.cuptiActivityGetNextRecord(
                    ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)
                )
                if code == self._NO_MORE_RECORDS:
                    break
                if code != 0:
                    raise RuntimeError(f"cuptiActivityGetNextRecord: {code}")
                self._take(record.value)
        except BaseException as error:  # an exception cannot leave a C callback
            self._error = error
        finally:
            self._free.append(self._in_use.pop(buffer))

    def _take(self, address: int) -> None:
        def word(offset: int, ctype=ctypes.c_uint64) -> int:
            return ctype.from_address(address + offset).value

        kind = self.KINDS.get(word(0, ctypes.c_uint32))
        if kind is None:
            return
        name = kind
        if kind == "kernel":
            pointer = word(self._KERNEL_NAME)
            name = ctypes.string_at(pointer).decode(errors="replace") if pointer else "?"
        elif kind == "memcpy":
            copy = word(self._COPY_KIND, ctypes.c_uint8)
            name = f"memcpy {self._COPIES.get(copy, copy)}"
        if kind == "synchronization":
            if word(self._WAIT_KIND, ctypes.c_uint32) != self._STREAM_WAITS:
                self._records.append(Activity(kind, name, 0, 0))
        else:
            self._records.append(Activity(kind, name, word(self._START), word(self._END)))


def find_cupti() -> str:
    """The CUPTI that the process has loaded, else the one of the framework's wheels, else the toolkit's.

    Raises:
      CuptiUnavailable: there is none.
    """
    try:
        with open("/proc/self/maps") as maps:
            loaded = sorted({line.split()[-1] for line in maps if "libcupti.so" in line})
    except OSError:
        loaded = []
    found = loaded[:1]
    for folder in sys.path:
        found += sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libcupti.so.*[0-9]")))
    for pattern in ("/usr/local/cuda/extras/CUPTI/lib64/libcupti.so", "/usr/local/cuda*/lib*/libcupti.so"):
        found += sorted(glob.glob(pattern))
    if not found:
        raise CuptiUnavailable("no libcupti.so: expected the wheel nvidia-cuda-cupti or a CUDA toolkit")
    return found[0]


class MosaicCupti:
    """The CUPTI reader inside jaxlib's Mosaic GPU extension: names and durations only."""

    path = "jaxlib"

    def __init__(self):
        try:
            from jax._src.lib import mosaic_gpu
        except ImportError:
            mosaic_gpu = None
        if mosaic_gpu is None:
            raise CuptiUnavailable("this jaxlib has no Mosaic GPU extension")
        self._extension = mosaic_gpu._mosaic_gpu_ext
        self._running = False

    def enable(self, kinds=()) -> None:
        self._extension._cupti_init()
        self._running = True

    def disable(self, kinds=()) -> None:
        if self._running:
            self._extension._cupti_get_timings(True)
            self._running = False

    def collect(self, at_least: int = 0, patience_s: float = 0.0) -> list[Activity]:
        timings = self._extension._cupti_get_timings(True)
        self._extension._cupti_init()
        clock, records = 0, []
        for name, milliseconds in timings:  # laid end to end: no start times are given
            end = clock + round(milliseconds * 1e6)
            records.append(Activity("kernel", name, clock, end))
            clock = end
        return records


class CuptiTimer:
    """Times single calls by activity records."""

    gpu = True

    def __init__(self, cupti: Cupti | MosaicCupti, device):
        self._cupti, self._device = cupti, device
        source = "activity records" if isinstance(cupti, Cupti) else "jaxlib's reader"
        self.cold_method = f"CUPTI ({source}), sum of kernels, L2 cold and clean"
        self.warm_method = f"CUPTI ({source}), sum of kernels, second of two calls"
        cupti.enable()
        device.flush()
        device.synchronize()
        cupti.collect(at_least=1)
        device.flush()
        device.synchronize()
        self._flush_names = [r.name for r in cupti.collect(at_least=1)]
        if not self._flush_names:
            raise CuptiUnavailable("no activity record came for a kernel that ran")

    def close(self) -> None:
        self._cupti.disable()

    def cold(self, call: Callable[[], Any]) -> tuple[float, int]:
        """Microseconds and GPU operations of one call behind an L2 flush."""
        self._device.synchronize()
        self._cupti.collect()  # what preparing the call left
        self._device.flush()
        call()
        self._device.synchronize()
        skip = len(self._flush_names)
        records = self._cupti.collect(at_least=skip + 1)
        if [r.name for r in records[:skip]] != self._flush_names:
            names = [r.name for r in records]
            raise CuptiUnavailable(f"expected the flush {self._flush_names} first, got {names[:8]}")
        return self._sum(records[skip:])

    def warm(self, call: Callable[[], Any]) -> tuple[float, int]:
        """Microseconds and GPU operations of the second of two calls."""
        self._device.synchronize()
        self._cupti.collect()
        call()
        call()
        self._device.synchronize()
        records = self._cupti.collect(at_least=2)
        if len(records) % 2:
            raise CuptiUnavailable(f"two equal calls gave {len(records)} records")
        return self._sum(records[len(records) // 2 :])

    def span(self, call: Callable[[], Any], calls: int) -> tuple[float, int]:
        """First start to last end of a program of `calls` calls, by call, after one untimed run."""
        call()
        self._device.synchronize()
        self._cupti.collect()
        call()
        self._device.synchronize()
        records = self._cupti.collect(at_least=calls)
        if not records:
            raise CuptiUnavailable("no activity record")
        return (max(r.end for r in records) - records[0].start) / 1e3 / calls, len(records) // calls

    def waits(self, call: Callable[[], Any], calls: int) -> tuple[int, int]:
        """How many synchronisations and host-device copies `calls` calls ask of the driver.

        Raises:
          CuptiUnavailable: this reader records no synchronisations.
        """
        if not isinstance(self._cupti, Cupti):
            raise CuptiUnavailable("jaxlib's reader records kernels only")
        self._device.synchronize()
        self._cupti.collect()
        self._cupti.enable(("synchronization",))
        try:
            for _ in range(calls):
                call()
        finally:
            self._cupti.disable(("synchronization",))
        self._device.synchronize()
        records = self._cupti.collect(at_least=calls)
        waits = sum(r.kind == "synchronization" for r in records)
        return waits, sum(r.name in ("memcpy host to device", "memcpy device to host") for r in records)

    @staticmethod
    def _sum(records: list[Activity]) -> tuple[float, int]:
        if not records:
            raise CuptiUnavailable("the call left no activity record: no GPU work, or records were lost")
        return sum(r.end - r.start for r in records) / 1e3, len(records)


class EventTimer:
    """Times single calls by the framework's own events: the fallback, coarser by launch gaps."""

    gpu = True
    cold_method = "CUDA events around one call, L2 cold and clean (no CUPTI)"
    warm_method = "CUDA events around the second of two calls (no CUPTI)"

    def __init__(self, device):
        self._device = device

    def close(self) -> None:
        pass

    def cold(self, call):
        self._device.flush()
        return self._device.event_us(call), None

    def warm(self, call):
        call()
        return self._device.event_us(call), None


class WallTimer:
    """For dry runs on a CPU; its numbers say nothing about a GPU."""

    gpu = False
    cold_method = warm_method = "wall clock on a CPU: a dry run, not a GPU result"

    def __init__(self, device):
        self._device = device

    def close(self) -> None:
        pass

    def cold(self, call):
        begin = time.perf_counter()
        call()
        self._device.synchronize()
        return (time.perf_counter() - begin) * 1e6, None

    warm = cold


def take_turns(
    calls: dict[str, Callable[[], Any]],
    sample: Callable[[Callable[[], Any]], tuple[float, int | None]],
    method: str,
    *,
    samples: int,
    warmup: int,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Samples every call `samples` times, in turn, after `warmup` untaken rounds.

    Returns:
      Timings by name, and for each call that failed the reason; a failure stops its call only.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    kernels: dict[str, set[int | None]] = {name: set() for name in calls}
    failed: dict[str, str] = {}
    names = list(calls)
    for turn in range(warmup + samples):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            if name in failed:
                continue
            try:
                microseconds, operations = sample(calls[name])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            if turn >= warmup:
                taken[name].append(microseconds)
                kernels[name].add(operations)
    timings = {}
    for name in names:
        if name not in failed:
            count = kernels[name].pop() if len(kernels[name]) == 1 else None
            timings[name] = Timing(taken[name], method, count)
    return timings, failed


HOST_METHOD = "wall clock of the host, calls not synchronised"


def host_time(
    calls: dict[str, Callable[[], Any]],
    synchronize: Callable[[], Any],
    *,
    samples: int = 7,
    repeats: int = 200,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Host time a call: the wall time of `repeats` calls, none waited for, by call."""

    def sample(call):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        elapsed = time.perf_counter() - begin
        synchronize()
        return elapsed * 1e6 / repeats, None

    enabled = gc.isenabled()
    gc.disable()
    try:
        return take_turns(calls, sample, f"{HOST_METHOD}, {repeats} in a row", samples=samples, warmup=1)
    finally:
        if enabled:
            gc.enable()
