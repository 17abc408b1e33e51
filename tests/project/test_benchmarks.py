"""The benchmarks' own checks: no GPU, no framework in this process, every refusal shown."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import against, compare, environment, fronts, multi_gpu, plots, report, run, timing
from benchmarks import workloads as wl
from benchmarks.gate import Gate, make_inputs
from benchmarks.providers import PROVIDERS, Missing, Prepared, Provider, Unsupported
from benchmarks.record import Counter, Result, Run, Timing, join, quantile, read, write
from oracle import contract, reference
from oracle.numerics import from_bits, round_bits, to_float64
from tests.conftest import QUICK_COMPILE

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": QUICK_COMPILE,
}  # of dry runs


# Workloads.


def test_least_bytes_by_hand():
    one = wl.WORKLOADS["decode/b1-d2048"]
    x, window, weight, bias, slot = 2048 * 2, 3 * 2048 * 2, 2048 * 4 * 2, 2048 * 2, 4
    assert one.bytes_read == x + window + weight + bias + slot == 36868
    assert one.bytes_written == x + window == 16384
    assert one.least_bytes == 53252

    seed = wl.WORKLOADS["main/seed-d8192"]  # 33 tokens in 5 rows
    read = 33 * 8192 * 2 + 5 * 3 * 8192 * 2 + 8192 * 5 * 2 + 4 * 5 + 4 * 6 + 5
    written = 33 * 8192 * 2 + 5 * 3 * 8192 * 2
    assert (seed.bytes_read, seed.bytes_written) == (read, written)
    assert seed.x_bytes == 2 * 33 * 8192 * 2

    # float32 states under a bfloat16 x: 2 * 8 rows of 3 entries of 4 bytes instead of 2
    pool = wl.WORKLOADS["variants/float32-pool"]
    assert pool.least_bytes - wl.WORKLOADS["main/8x2048-d8192"].least_bytes == 2 * 8 * 3 * 8192 * 2


def test_the_limit_copies_whole_pages():
    for w in wl.WORKLOADS.values():
        copied = w.limit_elements * wl.ITEMSIZE[w.dtype]
        assert copied % 4096 == 0
        assert 0 <= copied - w.least_bytes // 2 < 4096
        assert w.limit_elements >= w.tokens * w.dim, "it begins with x"


def test_least_ratios_of_the_main_table():
    expected = {"8x2048-d8192": 1.00, "8x2048-d2048": 1.00, "1x32768-d2048": 1.00, "64x128-d8192": 1.02,
                "skew-d8192": 1.05, "mixed-d8192": 1.18}  # fmt: skip
    assert {name: round(wl.WORKLOADS[f"main/{name}"].least_ratio, 2) for name in expected} == expected


def test_workloads_are_calls_the_contract_accepts():
    class Shaped(SimpleNamespace):
        pass

    def array(*shape, dtype):
        return Shaped(shape=shape, dtype=dtype)

    assert len({w.name for w in wl.WORKLOADS.values()}) == len(wl.WORKLOADS)
    for w in wl.WORKLOADS.values():
        pool = array(w.batch, w.width - 1, w.dim, dtype=w.state_dtype)
        weight = array(w.dim, w.width, dtype=w.dtype)
        bias = array(w.dim, dtype=w.dtype) if w.bias else None
        if w.op == wl.PREFILL:
            offsets = array(w.batch + 1, dtype="int32")
            x = array(w.tokens, w.dim, dtype=w.dtype)
            contract.FnCall(x, weight, bias, pool, offsets, activation=w.activation).check()
        else:
            assert len(set(w.lengths)) == 1
            x = array(w.batch, w.lengths[0], w.dim, dtype=w.dtype)
            contract.UpdateCall(x, weight, bias, pool, activation=w.activation).check()
        assert w.source


def test_sweeps_move_one_axis():
    for prefix, fixed in (("skew", ("tokens", "batch", "dim")), ("batch", ("tokens", "dim")), ("dim", ("lengths",)),
                          ("tokens", ("batch", "dim"))):  # fmt: skip
        rows = wl.select([prefix])
        assert len(rows) > 4
        for axis in fixed:
            assert len({getattr(w, axis) for w in rows}) == 1, (prefix, axis)


def test_select():
    assert [w.name for w in wl.select(["main/skew*", "decode/b1-d2048"])] == [
        "main/skew-d8192",
        "decode/b1-d2048",
    ]
    assert len(wl.select(["verify"])) == 2
    with pytest.raises(ValueError, match="got 'nothing'"):
        wl.select(["main", "nothing"])


def test_random_batches_are_valid_and_differ():
    batches = wl.random_batches(50, 512, 16, 64)
    for offsets, indices, has, longest in batches:
        assert offsets[0] == 0
        assert offsets[-1] <= 512
        assert (len(offsets), len(indices), len(has)) == (17, 16, 16)
        pool = SimpleNamespace(shape=(64, 3, 8), dtype="bfloat16")
        call = contract.FnCall(None, None, None, pool, offsets, indices, max_seqlen=longest)
        call.check_values(contract.FnSizes(512, 8, 4, 16, 64, 3), lambda name, values: values)
        assert longest == max(b - a for a, b in itertools.pairwise(offsets))
    assert len({tuple(b[0]) for b in batches}) == 50
    assert max(b[3] for b in batches) == 512 - 15
    assert any(-1 in b[1] for b in batches)


def test_groups_of_short_rows_narrow_dims_and_steps():
    short = {name.split("/")[1].rsplit("-d", 1)[0] for name in wl.WORKLOADS if name.startswith("short/")}
    chunks = {f"{chunk}+{decodes}" for chunk in (512, 1024, 4096) for decodes in (16, 64, 256)}
    assert short == {"1500x5", "300x33", "4096x1"} | chunks
    assert wl.WORKLOADS["short/1500x5-d8192"].lengths == (5,) * 1500
    assert wl.WORKLOADS["short/1024+64-d1280"].lengths == (1024, *[1] * 64)
    assert {w.dim for w in wl.select(["short"])} == {1280, 2048, 4096, 8192}
    assert [w.dim for w in wl.select(["narrow"])] == [256, 512, 768, 1152, 1280]
    assert {w.tokens for w in wl.select(["narrow"])} == {16384}
    assert {w.layers for w in wl.select(["step"])} == {3}


@pytest.mark.parametrize(
    ("name", "unit", "required", "goal"),
    [
        ("main/8x2048-d2048", "ratio", 1.08, 1.03),
        ("main/mixed-d8192", "ratio", 1.10, 1.05),
        ("main/seed-d8192", "us over", 2.0, 1.5),
        ("short/1500x5-d8192", "ratio", 1.08, 1.03),
        ("short/300x33-d1280", "ratio", 1.15, 1.08),
        ("short/512+16-d1280", "us over", 2.0, 1.5),
        ("narrow/d768", "ratio", 1.15, 1.08),
        ("narrow/d1280", "ratio", 1.08, 1.03),
        ("decode/b1-d8192", "us", 1.45, 1.3),
        ("decode/b256-d8192", "us", 7.3, 7.0),
        ("decode/b1024-d8192", "us", 48.6, 47.0),
        ("verify/64x4-d8192", "ratio", 1.15, 1.05),
    ],
)
def test_targets_follow_the_bytes_that_must_move(name, unit, required, goal):
    target = wl.WORKLOADS[name].target
    assert (target.unit, target.required, target.goal) == (unit, required, goal)


# Records.


def result(status="passed", **changes) -> Result:
    fields = dict(workload="main/seed-d8192", provider="triton", framework="torch", status=status)
    if status != "passed":
        fields["reason"] = "because"
    return Result(**(fields | changes))


def test_quantiles_are_those_of_numpy():
    samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    timed = Timing(samples, "m")
    assert timed.median == np.median(samples)
    for q in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert math.isclose(quantile(samples, q), np.quantile(samples, q))
    assert (timed.p20, timed.p80) == (np.quantile(samples, 0.2), np.quantile(samples, 0.8))
    assert quantile([7.0], 0.8) == 7.0


@pytest.mark.parametrize("status", ["wrong_value", "wrong_state", "crashed", "missing", "unsupported"])
def test_no_time_without_a_right_answer(status):
    with pytest.raises(ValueError, match="expected none with status"):
        result(status, timings={"cold": Timing([1.0], "m")})
    with pytest.raises(ValueError, match="expected none with status"):
        result(status).add("cold", Timing([1.0], "m"))
    with pytest.raises(ValueError, match="reason"):
        result(status, reason="")


def test_records_refuse_what_is_not_one():
    with pytest.raises(ValueError, match="status"):
        result("fast")
    with pytest.raises(ValueError, match="clock"):
        result().add("best", Timing([1.0], "m"))
    for samples in ([], [float("nan")], [-1.0], [float("inf")]):
        with pytest.raises(ValueError, match="samples"):
            Timing(samples, "m")


def make_run(device="NVIDIA H100 80GB HBM3", clock="gpu", timer="CUPTI", scale=1.0, **header) -> Run:
    """A run of everything that tables and pictures show, with made-up times."""
    whole = Run({"device": device, "clock": clock, "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "dirty": False,
                 "contract_version": 1, "notes": [], "frameworks": {"torch": {"timer": timer}}, **header})  # fmt: skip
    providers = (
        "triton", "triton_per_sequence", "triton_flat", "torch_limit", "torch_copy", "pallas", "jax_limit", "jax_copy",
    )  # fmt: skip
    for w in wl.select(["main", "tokens", "skew"]):
        for number, name in enumerate(providers):
            time = w.least_bytes / 3e6 + 1 + number * 0.1
            base = time * (scale if PROVIDERS[name].role == "twin" else 1.0)
            samples = [round(base * f, 3) for f in (0.99, 1.0, 1.01)]
            whole.results.append(
                Result(
                    w.name,
                    name,
                    PROVIDERS[name].framework,
                    "passed",
                    timings={"cold": Timing(samples, timer, 1)},
                )
            )
    whole.counters.append(Counter("compilations", "triton", "torch", 0, "listener"))
    return whole


def test_files_round_trip_and_a_cut_file_is_refused(tmp_path):
    whole = make_run()
    whole.results.append(result("missing", provider="fla"))
    path = tmp_path / "a" / "r.jsonl"
    write(path, whole)
    again = read(path)
    assert again == whole
    assert all(
        json.loads(line)["kind"] in ("header", "result", "counter", "footer")
        for line in path.read_text().splitlines()
    )

    lines = path.read_text().splitlines()
    for cut, message in (
        (lines[:-1], "footer"),
        (lines[1:], "header"),
        (lines[:3] + lines[4:], "footer"),
        ([], "header"),
    ):
        path.write_text("\n".join(cut))
        with pytest.raises(ValueError, match=message):
            read(path)
    dishonest = json.loads(lines[1])
    dishonest |= dict(status="wrong_value", reason="off")
    path.write_text("\n".join([lines[0], json.dumps(dishonest), *lines[2:]]))
    with pytest.raises(ValueError, match="timings: expected none"):
        read(path)


def test_join_takes_a_framework_of_a_workload_whole():
    first, second = make_run(), make_run(scale=2.0)
    second.results = [
        r
        for r in second.results
        if r.workload == "main/skew-d8192" and r.provider in ("triton", "torch_copy")
    ]
    joined = join([first, second])
    assert joined.find("main/skew-d8192", "triton").timings["cold"] == second.results[0].timings["cold"]
    assert joined.find("main/skew-d8192", "triton_flat") is None  # its copy was of another run
    assert joined.find("main/skew-d8192", "pallas") is not None
    assert len(joined.counters) == 1
    with pytest.raises(ValueError, match="device"):
        join([first, make_run(device="NVIDIA H200")])


# The gate.

SMALL = wl.Workload("test/small", wl.PREFILL, (5, 0, 1, 9, 2), 300, "made up for this test")
STEP = wl.Workload("test/step", wl.UPDATE, (2, 2, 2), 300, "made up for this test")


def right_answer(inputs, **changes):
    """The oracle's answer, as a contender returns it; `changes` replace arguments."""
    w = inputs.workload
    arguments = dict(x=inputs.x, weight=inputs.weight, bias=inputs.bias, conv_states=inputs.pool,
                     cache_indices=inputs.cache_indices, activation=w.activation)  # fmt: skip
    if w.op == wl.PREFILL:
        arguments |= dict(query_start_loc=inputs.query_start_loc, has_initial_state=inputs.has_initial_state)
        output = reference.causal_conv1d_fn(**(arguments | changes))
    else:
        shape = (w.batch, w.lengths[0], w.dim)
        arguments["x"] = from_bits(inputs.x.bits.reshape(shape), w.dtype)
        output = reference.causal_conv1d_update(**(arguments | changes))
    return output.out.data.copy(), output.conv_states.data.copy()


@pytest.mark.parametrize("base", [SMALL, STEP], ids=["prefill", "update"])
@pytest.mark.parametrize(
    "change",
    [{}, dict(dtype="float32"), dict(dtype="float16"), dict(pool_dtype="float32"), dict(width=1), dict(width=2),
     dict(width=3), dict(bias=False, activation=None), dict(dim=1)],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()) or "plain",
)  # fmt: skip
def test_the_gate_accepts_the_oracle(base, change):
    inputs = make_inputs(dataclasses.replace(base, **change))
    verdict = Gate(inputs).judge(*right_answer(inputs))
    assert verdict.status == "passed", verdict
    assert verdict.worst <= 1


def other_tap(inputs):
    return right_answer(inputs, weight=from_bits(np.roll(inputs.weight.bits, 1, axis=1), "bfloat16"))


def no_bias(inputs):
    return right_answer(inputs, bias=None)


def no_activation(inputs):
    return right_answer(inputs, activation=None)


def forgets_states(inputs):
    return right_answer(inputs, has_initial_state=np.zeros_like(inputs.has_initial_state))[0], right_answer(
        inputs
    )[1]


def keeps_old_states(inputs):
    return right_answer(inputs)[0], inputs.pool.data.copy()


def writes_a_foreign_slot(inputs):
    out, pool = right_answer(inputs)
    foreign = np.setdiff1d(np.arange(len(pool)), inputs.cache_indices)[0]
    pool[foreign, 0, 7] = 0
    return out, pool


def touches_the_empty_row(inputs):
    out, pool = right_answer(inputs)
    pool[inputs.cache_indices[1], 2, 299] ^= 1
    return out, pool


def one_tile_of_one_token(inputs):
    out, pool = right_answer(inputs)
    out[8, 256:300] = 0
    return out, pool


def unwritten(inputs):
    out, pool = right_answer(inputs)
    out[3, 17] = 0x7FC0  # NaN, on a token and a channel that only the sampling of tokens reaches
    return out, pool


def no_pool(inputs):
    return right_answer(inputs)[0], None


def rounds_before_silu(inputs):
    out, pool = right_answer(inputs, activation=None)
    z = to_float64(out, "bfloat16")
    return round_bits(z / (1 + np.exp(-z)), "bfloat16"), pool


MUTANTS = {
    other_tap: "wrong_value",
    no_bias: "wrong_value",
    no_activation: "wrong_value",
    forgets_states: "wrong_value",
    one_tile_of_one_token: "wrong_value",
    unwritten: "wrong_value",
    keeps_old_states: "wrong_state",
    writes_a_foreign_slot: "wrong_state",
    touches_the_empty_row: "wrong_state",
    no_pool: "wrong_state",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_the_gate_refuses_a_mutant(mutant):
    inputs = make_inputs(SMALL)
    gate = Gate(inputs)
    for rule in (Gate.RULE, Gate.PEER_RULE):
        verdict = gate.judge(*mutant(inputs), rule)
        assert verdict.status == MUTANTS[mutant], (rule, verdict)
        assert verdict.reason


def test_only_peers_may_round_twice():
    inputs = make_inputs(SMALL)
    gate = Gate(inputs)
    assert gate.judge(*rounds_before_silu(inputs), Gate.RULE).status == "wrong_value"
    assert gate.judge(*rounds_before_silu(inputs), Gate.PEER_RULE).status == "passed"


def test_the_gate_judges_form_and_copies():
    inputs = make_inputs(SMALL)
    gate = Gate(inputs)
    out, pool = right_answer(inputs)
    assert gate.judge(out.view(np.int16), pool).status == "wrong_dtype"
    assert gate.judge(out[:-1], pool).status == "wrong_shape"
    assert gate.judge(out, pool[:-1]).status == "wrong_shape"
    assert gate.judge(inputs.x.data.copy(), None, Gate.COPY_RULE).status == "passed"
    other = inputs.x.data.copy()
    other[-1, -1] ^= 1
    assert gate.judge(other, None, Gate.COPY_RULE).status == "wrong_value"


def test_inputs_are_the_same_for_all_and_poisoned_elsewhere():
    first, second = make_inputs(SMALL), make_inputs(SMALL)
    assert np.array_equal(first.x.data, second.x.data)
    assert len({row.tobytes() for row in first.x.data}) == SMALL.tokens
    unused = np.setdiff1d(np.arange(SMALL.batch + 3), first.cache_indices)
    assert len(unused) == 3
    values = first.pool.values()
    assert np.isnan(values[unused]).all()
    assert np.isfinite(values[first.cache_indices]).all()


# Timing.


def test_contenders_take_turns_and_warmup_is_not_kept():
    order, clock = [], itertools.count()

    def sample(call):
        call()
        return float(next(clock)), 2

    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings, failed = timing.take_turns(calls, sample, "m", samples=4, warmup=2)
    assert not failed
    assert "".join(order) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"
    assert timings["a"].samples == [7.0, 9.0, 14.0, 16.0]
    assert timings["a"].kernels == 2


def test_a_failing_contender_stops_alone():
    def sample(call):
        return call(), None

    def broken():
        raise RuntimeError("no")

    timings, failed = timing.take_turns(
        {"good": lambda: 1.0, "bad": broken}, sample, "m", samples=3, warmup=0
    )
    assert timings.keys() == {"good"}
    assert failed == {"bad": "RuntimeError: no"}


def test_host_time_is_by_call():
    calls = []
    timings, _ = timing.host_time({"a": lambda: calls.append(1)}, lambda: None, samples=2, repeats=50)
    assert len(calls) == 150
    assert len(timings["a"].samples) == 2
    assert timings["a"].median < 1e4


class FakeDevice:
    """Issues activity records on a made-up clock in place of a GPU."""

    def __init__(self):
        self.records, self.now = [], 0

    def work(self, name, nanoseconds):
        self.records.append(timing.Activity("kernel", name, self.now, self.now + nanoseconds))
        self.now += nanoseconds + 500

    def flush(self):
        self.work("flush_a", 80_000)
        self.work("flush_b", 2_000)

    def synchronize(self):
        pass

    # CUPTI's side.

    def enable(self, kinds=()):
        pass

    disable = enable

    def collect(self, at_least=0):
        records, self.records = self.records, []
        return records


def test_the_flush_is_not_timed():
    device = FakeDevice()
    timer = timing.CuptiTimer(device, device)
    state = itertools.count()

    def call():
        cold = next(state) % 2 == 0
        device.work("kernel", 9_000 if cold else 3_000)
        device.work("tail", 1_000)

    assert timer.cold(call) == (10.0, 2)
    next(state)
    assert timer.warm(call) == (4.0, 2)  # the second of two
    assert timer.span(lambda: device.work("kernel", 4_000), 2) == (2.0, 0)


def test_a_call_without_gpu_work_is_no_fast_call():
    device = FakeDevice()
    timer = timing.CuptiTimer(device, device)
    with pytest.raises(timing.CuptiUnavailable, match="no activity record"):
        timer.cold(lambda: None)
    device.work("leftover", 1)
    assert timer.cold(lambda: device.work("kernel", 9_000)) == (9.0, 1)
    device.flush = lambda: device.work("other", 1)
    with pytest.raises(timing.CuptiUnavailable, match="flush"):
        timer.cold(lambda: device.work("kernel", 9_000))


FAKE_CUPTI = r"""
#include <cupti.h>
#include <pthread.h>
#include <string.h>
static CUpti_BuffersCallbackRequestFunc request;
static CUpti_BuffersCallbackCompleteFunc complete;
static uint8_t *buffer; static size_t size, most, used;
CUptiResult cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc r, CUpti_BuffersCallbackCompleteFunc c)
{ request = r; complete = c; return CUPTI_SUCCESS; }
CUptiResult cuptiGetVersion(uint32_t *v) { *v = CUPTI_API_VERSION; return CUPTI_SUCCESS; }
CUptiResult cuptiGetResultString(CUptiResult r, const char **s) { *s = "FAKE_ERROR"; return CUPTI_SUCCESS; }
CUptiResult cuptiActivityEnable(CUpti_ActivityKind k)
{ return k == CUPTI_ACTIVITY_KIND_SYNCHRONIZATION ? CUPTI_ERROR_INSUFFICIENT_PRIVILEGES : CUPTI_SUCCESS; }
CUptiResult cuptiActivityDisable(CUpti_ActivityKind k) { return CUPTI_SUCCESS; }
static void put(void *record, size_t bytes)
{ if (!buffer) { request(&buffer, &size, &most); used = 0; } memcpy(buffer + used, record, bytes); used += bytes; }
void fake_kernel(const char *name, uint64_t start, uint64_t end)
{ CUpti_ActivityKernel9 k; memset(&k, 0, sizeof k); k.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
  k.start = start; k.end = end; k.name = name; put(&k, sizeof k); }
void fake_copy(uint64_t start, uint64_t end)
{ CUpti_ActivityMemcpy5 c; memset(&c, 0, sizeof c); c.kind = CUPTI_ACTIVITY_KIND_MEMCPY;
  c.copyKind = CUPTI_ACTIVITY_MEMCPY_KIND_DTOH; c.start = start; c.end = end; put(&c, sizeof c); }
void fake_wait(int type)
{ CUpti_ActivitySynchronization w; memset(&w, 0, sizeof w); w.kind = CUPTI_ACTIVITY_KIND_SYNCHRONIZATION;
  w.type = type; put(&w, sizeof w); }
const int stream_waits = CUPTI_ACTIVITY_SYNCHRONIZATION_TYPE_STREAM_WAIT_EVENT;
const int host_waits = CUPTI_ACTIVITY_SYNCHRONIZATION_TYPE_STREAM_SYNCHRONIZE;
static void *deliver(void *unused)
{ if (buffer) { uint8_t *b = buffer; buffer = 0; complete(0, 0, b, size, used); } return 0; }
CUptiResult cuptiActivityFlushAll(uint32_t flag)
{ pthread_t thread; pthread_create(&thread, 0, deliver, 0); pthread_join(thread, 0); return CUPTI_SUCCESS; }
CUptiResult cuptiActivityGetNextRecord(uint8_t *b, size_t valid, CUpti_Activity **record)
{ uint8_t *p = b;
  if (*record) { CUpti_ActivityKind kind = (*record)->kind;
                 p = (uint8_t *)*record + (kind == CUPTI_ACTIVITY_KIND_MEMCPY ? sizeof(CUpti_ActivityMemcpy5)
                   : kind == CUPTI_ACTIVITY_KIND_SYNCHRONIZATION ? sizeof(CUpti_ActivitySynchronization)
                   : sizeof(CUpti_ActivityKernel9)); }
  if (p >= b + valid) return CUPTI_ERROR_MAX_LIMIT_REACHED;
  *record = (CUpti_Activity *)p; return CUPTI_SUCCESS; }
"""


def test_cupti_records_are_read_where_nvidias_header_puts_them(tmp_path, monkeypatch):
    """A library with CUPTI's functions and structures, built from NVIDIA's header, that delivers from a thread."""
    spec = importlib.util.find_spec("triton")
    include = Path(spec.origin).parent / "backends/nvidia/include" if spec else None
    if not shutil.which("cc") or include is None or not (include / "cupti.h").exists():
        pytest.skip("needs a C compiler and the CUPTI header in Triton's wheel")
    source, library = tmp_path / "fake.c", tmp_path / "libcupti.so"
    source.write_text(FAKE_CUPTI)
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library), "-lpthread"], check=True
    )
    monkeypatch.setattr(timing, "find_cupti", lambda: str(library))
    cupti = timing.Cupti()
    cupti.enable()
    from ctypes import c_char_p, c_int, c_uint64

    name = c_char_p(b"kernel_name")
    for _ in range(3):  # buffers go round
        cupti._lib.fake_copy(c_uint64(5000), c_uint64(7000))
        cupti._lib.fake_kernel(name, c_uint64(2**40), c_uint64(2**40 + 1500))
        cupti._lib.fake_kernel(name, c_uint64(100), c_uint64(350))
        assert cupti.collect() == [
            ("kernel", "kernel_name", 100, 350),
            ("memcpy", "memcpy device to host", 5000, 7000),
            ("kernel", "kernel_name", 2**40, 2**40 + 1500),
        ]
    for wait in ("stream_waits", "host_waits"):
        cupti._lib.fake_wait(c_int.in_dll(cupti._lib, wait))
    assert [r.kind for r in cupti.collect()] == ["synchronization"], "the host waits in one of the two only"
    assert cupti.collect(at_least=1, patience_s=0.01) == []
    with pytest.raises(timing.CuptiUnavailable, match=r"cuptiActivityEnable: FAKE_ERROR"):
        cupti.enable(("synchronization",))


# Running.


class FakeBackend:
    """Contenders in NumPy: one right, some wrong, one that cannot, one that is not there."""

    framework, is_gpu, device_name = "fake", False, "cpu"

    def load(self, inputs):
        return inputs

    def synchronize(self):
        pass

    def prepare(self, name, inputs):
        def crash():
            raise RuntimeError("out of memory")

        if name == "absent":
            raise Missing("no module named absent")
        if name == "limited":
            raise Unsupported("only on Sundays")
        answers = {
            "right": right_answer,
            "mutant": other_tap,
            "stale": keeps_old_states,
            "broken": lambda _: crash(),
        }
        return Prepared(lambda: None, lambda: answers[name](inputs))


@pytest.fixture
def fake_providers(monkeypatch):
    names = ("right", "mutant", "stale", "broken", "limited", "absent")
    for name in names:
        monkeypatch.setitem(PROVIDERS, name, Provider(name, "fake", "twin", Gate.RULE, ""))
    return list(names)


def test_a_wrong_contender_is_recorded_and_never_timed(fake_providers):
    backend = FakeBackend()
    session = run.Session(backend, fake_providers, samples=2, log=lambda text: None)
    session.gpu_times(SMALL, timing.WallTimer(backend))
    by_name = {r.provider: r for r in session.results}
    assert {name: r.status for name, r in by_name.items()} == {
        "right": "passed", "mutant": "wrong_value", "stale": "wrong_state", "broken": "crashed",
        "limited": "unsupported", "absent": "missing",
    }  # fmt: skip
    assert [name for name, r in by_name.items() if r.timings] == ["right"]
    assert by_name["right"].timings.keys() == {"wall"}
    assert "dry run" in by_name["right"].timings["wall"].method
    assert "out of memory" in by_name["broken"].reason
    assert "absent" in by_name["absent"].reason
    header = {"device": "cpu", "clock": "wall", "date": "d", "commit": "c", "dirty": None, "notes": []}
    shown = [dataclasses.replace(r, provider="triton", framework="torch") for r in session.results]
    text = report.text(Run(header, shown))
    for word in ("DRY RUN", "wrong_value", "wrong_state", "missing", "only on Sundays"):
        assert word in text


class FakeGpu(FakeBackend):
    """A backend with a made-up GPU: its only contender needs 4 us, 3 in a graph, and waits for nothing."""

    is_gpu, device_name = True, "Fake GPU"

    def __init__(self, framework):
        self.framework, self.device, self.loaded = framework, FakeDevice(), []
        self.synchronize = self.device.synchronize

    def prepare(self, name, inputs):
        def call():
            self.device.work(name, 4_000)

        if PROVIDERS[name].role == "floor":
            return Prepared(call, None)
        return Prepared(call, lambda: (self.loaded.append(inputs.workload.name), right_answer(inputs))[1])

    def graph(self, prepared, calls, samples):
        return {name: Timing([3.0] * samples, f"{calls}") for name in prepared}, {}


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_gpu_session_takes_every_clock_once(framework):
    backend = FakeGpu(framework)
    twin, floor = {"torch": ("triton", "triton_empty"), "jax": ("pallas", "jax_add")}[framework]
    session = run.Session(backend, [twin, floor], samples=4, log=lambda text: None)
    step = dataclasses.replace(STEP, target=wl.Target("graph", "us", 5.0))
    session.counters.append(Counter("compilations", twin, framework, 0, step.op))
    session.launches(step)
    timer = timing.CuptiTimer(backend.device, backend.device)
    session.gpu_times(step, timer)
    session.gpu_times(SMALL, timer)
    by_name = {(r.workload, r.provider): r for r in session.results}
    assert by_name[step.name, twin].timings.keys() == {"host", "graph", "cold", "warm"}
    assert by_name[step.name, twin].timings["cold"].samples == [4.0] * 4
    assert by_name[step.name, twin].timings["warm"].samples == [4.0] * 4
    assert by_name[SMALL.name, twin].timings.keys() == {"cold"}
    assert by_name[SMALL.name, floor].timings == {}
    assert "warm" in by_name[step.name, floor].timings
    assert backend.loaded == [step.name, SMALL.name]  # judged once each
    waits = [c for c in session.counters if c.name == run.WAITS]
    assert [(c.provider, c.value) for c in waits] == [
        (twin, None)
    ]  # a made-up CUPTI counts none, and says so
    assert "kernels only" in waits[0].reason


def test_providers_are_chosen_by_glob_and_limit_and_copy_always_run():
    assert run.choose_providers(["triton_f*"], "torch") == ["triton_flat", "torch_limit", "torch_copy"]
    assert run.choose_providers(["triton_f*"], "jax") == ["jax_limit", "jax_copy"]
    with pytest.raises(ValueError, match="got 'trition'"):
        run.choose_providers(["trition"], "torch")


def test_a_dry_run_never_lands_among_gpu_results(tmp_path):
    dry = make_run(device="cpu", clock="wall")
    with pytest.raises(ValueError, match="--out"):
        run.destination(dry, None)
    gpu = run.destination(make_run(), tmp_path)
    assert gpu.relative_to(tmp_path).as_posix() == "nvidia-h100-80gb-hbm3/2026-01-02-abc.jsonl"
    write(gpu, make_run())
    assert run.destination(make_run(), tmp_path).name == "2026-01-02-abc-2.jsonl"


def test_all_layers_of_a_step_are_called():
    backend = FakeGpu("torch")
    session = run.Session(backend, ["triton", "triton_empty"], samples=3, log=lambda text: None)
    step = dataclasses.replace(SMALL, layers=3)
    session.launches(step)
    session.gpu_times(step, timing.CuptiTimer(backend.device, backend.device))
    twin, floor = session.results
    assert twin.timings["cold"].samples == [12.0] * 3
    assert twin.timings.keys() == {"host", "graph", "cold", "warm"}
    assert floor.timings["cold"].samples == [4.0] * 3


def test_a_small_prefill_is_held_against_an_empty_kernel():
    backend = FakeGpu("torch")
    session = run.Session(backend, ["triton", "triton_empty"], samples=3, log=lambda text: None)
    small = dataclasses.replace(SMALL, target=wl.Target("cold", "us over", 2.0))
    session.gpu_times(small, timing.CuptiTimer(backend.device, backend.device))
    twin, floor = session.results
    floor.timings["cold"] = Timing([1.5] * 3, "m")
    assert report.measured(Run({}, session.results), twin, small.target) == (2.5, "cold")


def test_list_shows_every_workload(capsys):
    assert run.main(["--list"]) == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert shown == wl.WORKLOADS.keys() | PROVIDERS.keys()
    assert run.main(["--list", "--workloads", "narrow"]) == 0
    assert "main/" not in capsys.readouterr().out


@pytest.mark.parametrize("bad", [[], ["--out", "/dev/null/folder"]], ids=["no folder", "no such folder"])
def test_a_run_that_cannot_be_written_stops_before_it_begins(monkeypatch, capsys, bad):
    monkeypatch.setattr(environment, "gpu", dict)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: pytest.fail("it began"))
    assert run.main(["--workloads", "tokens/4", *bad]) == 2
    assert "--out: expected a folder" in capsys.readouterr().err


def test_frameworks_of_unlike_devices_are_not_merged():
    parts = {"torch": make_run(), "jax": make_run(device="NVIDIA H200")}
    with pytest.raises(ValueError, match="device"):
        run.merge(parts, {}, "command")


def test_a_dry_run_of_both_frameworks(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--workloads", "tokens/4", "decode/b1-d2048", "--samples", "2",
               "--providers", "torch_conv1d", "jax_shifted", "causal_conv1d", "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN" in done.stdout
    (path,) = tmp_path.glob("cpu/*.jsonl")
    found = read(path)
    assert found.header["clock"] == "wall"
    assert found.header["frameworks"].keys() == {"torch", "jax"}
    statuses = {(r.workload, r.provider): r.status for r in found.results}
    for workload in ("tokens/4", "decode/b1-d2048"):
        for provider in ("torch_limit", "torch_conv1d", "jax_limit", "jax_shifted"):
            assert statuses[workload, provider] == "passed"
        for provider in ("torch_copy", "jax_copy"):
            assert statuses[workload, provider] == ("passed" if workload == "tokens/4" else "unsupported")
        assert statuses[workload, "causal_conv1d"] in ("missing", "crashed")  # crashed: installed, but no GPU
    assert {clock for r in found.results for clock in r.timings} == {"wall"}


# Several GPUs.


def test_a_steady_time_has_neither_start_nor_end():
    asked = []

    def seconds(calls):
        asked.append(calls)
        return 400e-6 + 375e-6 * calls

    assert multi_gpu.steady(seconds, 20, 200) == pytest.approx(375e-6)
    assert sorted(asked) == [20, 220]


def test_a_dry_run_over_two_devices_writes_its_file(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.multi_gpu",
        "jax",
        "--dry-run",
        "--split",
        "tokens",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=ON_CPU, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-jax.json")
    found = json.loads(path.read_text())
    assert found["devices"] == 2
    assert found["dry_run"]
    assert [row["step"] for row in found["results"] if row["same_bits"]] == list(multi_gpu.STEPS)
    assert all(
        len(row["samples_us"][name]) == 1 for row in found["results"] for name in ("one", "part", "all")
    )


def test_both_frameworks_have_processes_of_their_own(monkeypatch):
    commands = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, check: commands.append(command[3:]) or SimpleNamespace(returncode=len(commands) - 1),
    )
    assert multi_gpu.main(["--dry-run"]) == 1  # that of the second
    assert commands == [["torch", "--dry-run"], ["jax", "--dry-run"]]


# Reports.


def test_compare_refuses_unlike_runs(tmp_path, capsys):
    same = make_run()
    for other, word in ((make_run(device="NVIDIA H200"), "device"), (make_run(clock="wall"), "clock"),
                        (make_run(timer="CUDA events"), "timer"), (make_run(contract_version=2), "contract_version")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            compare.table(same, other)
    write(tmp_path / "a.jsonl", same)
    write(tmp_path / "b.jsonl", make_run(device="NVIDIA H200"))
    assert compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 2
    assert "device" in capsys.readouterr().err


def test_compare_measures_noise_from_the_files_samples():
    """A run that is slower as a whole, copies and all, is no slower commit; nor is a copy ever one."""
    before, after = make_run(), make_run()
    for found in after.results:
        found.timings["cold"] = Timing([1.04 * s for s in found.timings["cold"].samples], "CUPTI", 1)
    assert compare.table(before, after)[1] == []
    for found in after.results:
        if found.provider == "triton":
            found.timings["cold"] = Timing([1.1 * s for s in found.timings["cold"].samples], "CUPTI", 1)
    slower = compare.table(before, after)[1]
    assert "main/skew-d8192 triton cold" in slower
    assert not any("copy" in name or "limit" in name or "pallas" in name for name in slower)
    ticks = Timing([2.016] * 4 + [2.048], "m"), Timing([2.048] * 5, "m")
    assert compare.verdict(*ticks) == "same"  # a tick of the clock
    assert compare.verdict(Timing([2.016] * 5, "m"), Timing([2.4] * 5, "m")) == "slower"
    assert compare.verdict(Timing([2.0, 2.0, 3.0, 3.0], "m"), Timing([2.4, 2.5, 2.6], "m")) == "same"


def test_compare_tells_a_change_from_noise():
    lines, slower = compare.table(make_run(), make_run())
    assert not slower
    assert all(" same " in line for line in lines[1:])
    _, slower = compare.table(make_run(), make_run(scale=1.005))
    assert not slower
    lines, slower = compare.table(make_run(), make_run(scale=1.1))
    assert "main/skew-d8192 triton cold" in slower
    assert not any("copy" in name for name in slower)
    assert sum(" faster " in line for line in compare.table(make_run(scale=1.1), make_run())[0]) == len(
        slower
    )


def test_report_marks_targets_and_slack():
    target = wl.Target("cold", "ratio", 1.2, 1.1)
    assert [report.mark(v, target) for v in (1.1, 1.15, 1.2, 1.21)] == ["goal", "met", "met", "MISS"]
    assert report.mark(1.0, wl.Target("cold", "us", 1.0)) == "met"

    whole = make_run()
    limit, copy = (
        whole.find("main/skew-d8192", n).timings["cold"].median for n in ("torch_limit", "torch_copy")
    )
    twin = whole.find("main/skew-d8192", "triton")
    assert report.ratio(whole, twin, "cold") == twin.timings["cold"].median / limit
    assert report.ratio_to_copy(whole, twin, "cold") == twin.timings["cold"].median / copy
    assert report.ratio(whole, twin, "graph") is None
    (line,) = (row for row in report.targets_table(whole) if row.startswith("main/skew-d8192"))
    assert f"{report.ratio(whole, twin, 'cold'):.3f} cold goal" in line

    slow = make_run(scale=1.0)
    slow.find("main/skew-d8192", "triton").timings["cold"] = Timing([1e5], "m")
    assert any("main/skew-d8192 triton: auto is" in line for line in report.checks(slow))
    assert not any("main/skew-d8192 triton: auto" in line for line in report.checks(whole))
    (line,) = (row for row in report.targets_table(slow) if row.startswith("main/skew-d8192"))
    assert "MISS" in line


def test_a_graph_target_is_read_from_the_warm_clock_where_there_is_no_graph():
    target = wl.WORKLOADS["decode/b256-d8192"].target
    fields = dict(workload="decode/b256-d8192", provider="pallas", framework="jax")
    warm = result(**fields, timings={"warm": Timing([8.5], "m")})
    assert report.measured(make_run(), warm, target) == (8.5, "warm")
    warm.add("graph", Timing([9.75], "m"))
    assert report.measured(make_run(), warm, target) == (9.75, "graph")
    assert report.mark(9.75, target) == "MISS"


def test_pictures_are_drawn_and_reproducible(tmp_path):
    first = plots.draw(make_run(), tmp_path / "a")
    assert [p.name for p in first] == ["ratio.svg", "tokens.svg", "skew.svg"]
    text = first[0].read_text()
    for word in ("255 x 1", "8192 channels", "required", "NVIDIA H100"):
        assert word in text
    second = plots.draw(make_run(), tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    empty = make_run()
    empty.results.clear()
    assert plots.draw(empty, tmp_path / "c") == []


def test_pictures_show_peers_of_the_file_alone(tmp_path):
    whole = make_run()
    text = (plots.draw(whole, tmp_path / "a")[0]).read_text()
    assert not [label for _, label in plots.PEERS.values() if label in text]
    limit = whole.find("main/skew-d8192", "torch_limit").timings["cold"].median
    for name, ratio in (("fla", 2.18), ("vllm", 31.5)):
        timings = {"cold": Timing([ratio * limit], "CUPTI", 1)}
        whole.results.append(Result("main/skew-d8192", name, "torch", "passed", timings=timings))
    whole.results.append(Result("main/skew-d8192", "causal_conv1d", "torch", "missing", "not installed"))
    text = (plots.draw(whole, tmp_path / "b")[0]).read_text()
    assert ">FLA<" in text
    assert "vLLM 31.5" in text
    assert "SGLang" not in text
    assert "causal-conv1d" not in text


def test_the_reports_help_and_its_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    assert "of as many bytes" in capsys.readouterr().out
    assert report.main([str(tmp_path / "nothing.jsonl")]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


def test_pictures_of_files_without_a_limit_say_what_they_divide_by(tmp_path):
    old = make_run()
    old.results = [r for r in old.results if PROVIDERS[r.provider].role != "limit"]
    text = (plots.draw(old, tmp_path)[0]).read_text()
    assert "time of copying x to out" in text
    assert "required" not in text


@pytest.mark.parametrize("path", ["README.md", "benchmarks/README.md"])
def test_a_row_of_a_table_says_its_clock(path):
    """Of tables of times of the twins side by side, where rows are of more than one clock."""
    lines = (ROOT / path).read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| decode", "| 8 x 2048"))]
    assert len(rows) >= 4
    for row in rows:
        clock = row.split("|")[2].strip()
        assert clock == ("graph" if row.startswith("| decode") else "cold"), row


# Two checkouts in turns.


def a_row(*turns, control=None):
    return against.Row(
        "main/seed-d8192", "torch", "cold", ([[2.0, 2.2]] * len(turns), [[2.1 * t] for t in turns]), control
    )


def test_a_row_is_the_median_of_its_turns():
    row = a_row(1.0, 1.5, 1.1, control=([[4.0], [4.0]], [[4.2], [4.2]]))
    assert row.ratios == pytest.approx([1.0, 1.5, 1.1])
    assert row.control_ratio == pytest.approx(1.05)
    assert row.line().split() == [
        "torch", "main/seed-d8192", "cold", "2.10", "2.31", "1.100", "1.040..1.340", "1.050",
    ]  # fmt: skip


@pytest.mark.parametrize(("turns", "code"), [((1.0, 1.019, 1.3), 0), ((1.0, 1.021, 1.3), 1), ((), 1)])
def test_a_row_above_the_allowance_fails(monkeypatch, capsys, turns, code):
    rows = [a_row(*turns)] if turns else []
    monkeypatch.setattr(against, "compare", lambda *arguments: rows)
    assert against.main([str(ROOT), "--frameworks", "torch"]) == code
    assert f"{len(rows)} rows" in capsys.readouterr().out


def test_two_checkouts_take_turns_and_a_wrong_answer_gets_no_time(tmp_path):
    for name in ("oracle", "triton_impl"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "triton_impl" / "__init__.py"
    text = package.read_text()

    def run_with(planted):
        package.write_text(text + planted)
        command = [sys.executable, "-m", "benchmarks.against", str(tmp_path), "--workloads", "decode/b1-d2048",
                   "--frameworks", "torch", "--turns", "2", "--allow", "1000"]  # fmt: skip
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200, check=False
        )

    slow = """
import time
_update = causal_conv1d_update
def causal_conv1d_update(*args, **options):
    time.sleep(0.05)
    return _update(*args, **options)
"""
    done = run_with(slow)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if " decode/b1-d2048 " in line)
    assert float(line.split()[5]) < 0.8, "after over before"
    done = run_with(slow.replace("time.sleep(0.05)", "args = (args[0], -args[1], *args[2:])"))
    assert done.returncode == 1
    assert "wrong_value" in done.stderr


CHAIN = """
import numpy as np
from benchmarks import chain
from benchmarks.providers import TWIN, open_backend
backend = open_backend({framework!r})
backend.without_gradients()
backend.capture = lambda call, calls: call
chain.LAYERS, chain.HIDDEN = 2, 64
(name,) = chain.right(backend, [TWIN[{framework!r}]], 2, 96)
chains = getattr(chain, {framework!r} + "_chains")(backend, [name], 2, 96)
assert list(chains) == [chain.ALONE, name]
for run in chains.values():
    run()
    run()
"""


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_chain_runs_each_contender_the_gate_accepts(framework):
    code = CHAIN.format(framework=framework)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ON_CPU,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# Fronts.


def test_fronts_cover_what_is_asked_of_them():
    found = fronts.shapes()
    assert {name.partition("/")[0] for name in found} == {"prefill", "decode", "lfm2", "backward"}
    assert {shape.dim for name, shape in found.items() if name.startswith("prefill/")} == {2048, 8192, 12288}
    assert {shape.tokens for name, shape in found.items() if name.startswith("decode/")} == {1, 32, 256}
    prefill = found["prefill/d8192"]
    assert prefill.least_bytes == 16384 * (2 * 8192 * 2 + 32 * 2 * (2 + 4))  # x, q, k and v; a, b, g and beta
    assert found["lfm2/prefill-d2048"].least_bytes == 16384 * 4 * 2048 * 2
    assert [shape.name for shape in fronts.select(["lfm2"], small=True)] == [
        "lfm2/prefill-d32",
        "lfm2/decode-b3-d32",
    ]
    with pytest.raises(ValueError, match="groups"):
        fronts.select(["prefil"])


def test_other_results_of_a_front_are_seen():
    right = np.linspace(-2, 2, 64).reshape(4, 16)
    assert fronts.differences([right * (1 + 2.0**-8)], [right]) is None
    assert "result 0" in fronts.differences([right[:, ::-1]], [right])
    assert "result 0" in fronts.differences([np.full_like(right, np.nan)], [right])


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_dry_run_of_the_fronts(framework, tmp_path):
    """Every group is judged and timed on a CPU; a peer that is not installed is reported as missing."""
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    path = tmp_path / "fronts.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.fronts",
        framework,
        "--small",
        "--samples",
        "1",
        "--out",
        path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=ON_CPU)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert set(rows) == set(fronts.shapes(small=True))
    assert all({"ours", "separate", "copy"} <= set(row["samples"]) for row in rows.values())
    peers = {"vllm", "sglang", "fla"} if framework == "torch" else {"jax-linear-attention"}
    prefill = rows["prefill/d64"]
    assert {*prefill["failed"], *prefill["samples"]} == peers | {"ours", "separate", "copy"}
    assert all(why.startswith("missing") for why in prefill["failed"].values())


def test_environment_needs_no_gpu(monkeypatch):
    monkeypatch.setenv("BENCHMARK_COMMIT", "feed")
    monkeypatch.setattr(environment, "_output", lambda command: "")
    assert environment.gpu() == {}
    assert environment.commit() == ("feed", None)
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
