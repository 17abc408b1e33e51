"""The twins, kernels and plain paths, through the conformance suite: one process each, one test a case.

The tests of tests/triton/test_conformance.py and tests/pallas/test_conformance.py, which name the IMPLEMENTATIONS they run: two
files, so that they run side by side, and the second one under each JAX. The kernels run in their interpreters here
and so take the core tier; `python -m oracle run --device cuda` runs every tier compiled.
"""

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from oracle.conformance import ledger, report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from tests.conftest import QUICK_COMPILE, quick_interpreters
from tests.tools.covering import cover

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "reports"
KNOWN_FAILURES = {"pallas-exact": ROOT / "pallas_impl" / "known_failures_interpreter.toml"}
SPECIFICATIONS = {
    "triton": ("tests.tools.conformance_of_twins:triton", "torch", ("core",), {"TRITON_INTERPRET": "1"}),
    "triton-short": (
        "tests.tools.conformance_of_twins:triton_short",
        "torch",
        ("core",),
        {"TRITON_INTERPRET": "1"},
    ),
    "eager": ("triton_impl.adapter:eager", "torch", ("core", "full"), {"TRITON_INTERPRET": "0"}),
    "pallas": ("tests.tools.conformance_of_twins:pallas", "jax", ("core",), {"XLA_FLAGS": QUICK_COMPILE}),
    "pallas-short": (
        "tests.tools.conformance_of_twins:pallas_short",
        "jax",
        ("core",),
        {"XLA_FLAGS": QUICK_COMPILE},
    ),
    "pallas-exact": ("pallas_impl.adapter:adapter", "jax", ("core",), {}),  # in JAX's own interpreter
    "xla": (
        "pallas_impl.adapter:xla",
        "jax",
        ("core",),
        {},
    ),  # as users compile it: one case for every feature in NUMBERS
    "xla-quick": ("pallas_impl.adapter:xla", "jax", ("core",), {"XLA_FLAGS": QUICK_COMPILE}),  # the others
}
# Features on which it depends what arithmetic a program of XLA holds.
NUMBERS = (
    "op:",
    "dtypes:",
    "x:",
    "bcx:",
    "weight:",
    "conv_states:",
    "bias:",
    "width:",
    "activation:",
    "residual",
)
SUBNORMAL = (
    "nan_payload",
    "tiny",
)  # data that quickly compiled code of JAX 0.10 flushes: "pallas-exact" takes it


def quick(twin, device):
    """The kernels' adapter of a twin, in a quick interpreter."""
    found = importlib.import_module(f"{twin}.adapter").adapter(device)
    quick_interpreters()
    return found


def triton(device=None):
    return quick("triton_impl", device)


def triton_short(device=None):
    """Every prefill through the kernel of rows of few tokens, as if `max_seqlen` promised 1, 4, 8 or 16 of them."""
    found = triton(device)
    calls, config = (importlib.import_module(f"triton_impl.{name}") for name in ("call", "config"))
    real = config.short_rows_config

    def chosen(tokens, dim, max_seqlen, warp_size):
        promised = max_seqlen if max_seqlen is not None and max_seqlen <= 16 else (1, 4, 8, 16)[tokens % 4]
        return real(max(tokens, 1 << 22), dim, promised, warp_size)

    calls.short_rows_config = chosen
    return found


def pallas(device=None):
    return quick("pallas_impl", device)


def pallas_short(device=None):
    """The kernels, prefills on that for rows of few tokens wherever it takes them, however small they are."""
    config = importlib.import_module("pallas_impl.config")
    usual = config.prefill_config
    config.prefill_config = lambda *sizes: usual(*sizes)._replace(short_t=8)
    return pallas(device)


@functools.cache
def cases_of(name):
    """The cases of an implementation's tiers; under a second JAX those that `one_for_every_feature` leaves."""
    cases = select(catalogue(), tiers=SPECIFICATIONS[name][2])
    if os.environ.get("SECOND_JAX") == "1":
        chosen = one_for_every_feature(cases)
        cases = [case for case in cases if case in chosen or case.data in SUBNORMAL]
    if name.endswith("-short"):  # the kernels of rows of few tokens
        operations = (
            ("causal_conv1d_fn", "gated_short_conv_fn") if name == "triton-short" else ("causal_conv1d_fn",)
        )
        cases = [case for case in cases if case.op in operations and case.relation is None]
        if (
            name == "pallas-short"
        ):  # a program a case: those about rows and their ends, and one for every feature
            about = "lengths", "short", "tail", "empty", "tiles", "token", "hostile"
            chosen = one_for_every_feature(cases)
            cases = [c for c in cases if c in chosen or any(word in c.id for word in about)]
    if name.startswith("xla"):
        as_usual = one_for_every_feature(cases, NUMBERS)
        cases = [c for c in cases if (c in as_usual or c.data in SUBNORMAL) == (name == "xla")]
    if name.startswith("pallas"):
        cases = [case for case in cases if (case.data in SUBNORMAL) == (name == "pallas-exact")]
    return cases


def one_for_every_feature(cases, kinds=("",)):
    """Few cases, taken greedily, in which each operation meets every feature, dtype and option that it has in any.

    What rests on our code alone is judged by all cases, under the first JAX: relations between calls, and strides,
    which JAX arrays do not have. Besides, every dim of more than 128 channels: the interpreter of JAX 0.11 clips
    boxes as TMA does, that of 0.10 is given padded arrays. kinds: how features begin that count.
    """

    def features(case):
        found = {(case.op, f) for f in case.features if ".layout:" not in f and f.startswith(kinds)}
        return found | ({(case.op, case.axes["dim"])} if case.axes.get("dim", 0) > 128 else set())

    return cover([case for case in cases if case.relation is None], features)


@functools.cache
def judged(name):
    """The report of one implementation, run once."""
    impl, framework, _, environment = SPECIFICATIONS[name]
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    result = runner.run(impl, cases_of(name), device="cpu", environment=environment)
    if name in KNOWN_FAILURES:
        result = ledger.apply(result, ledger.read(KNOWN_FAILURES[name]))
    REPORTS.mkdir(exist_ok=True)
    report.write(
        result, REPORTS / f"conformance-{name}-py{sys.version_info.major}{sys.version_info.minor}.jsonl"
    )
    return result


def pytest_generate_tests(metafunc):
    names = metafunc.module.IMPLEMENTATIONS
    if "case_id" in metafunc.fixturenames:
        pairs = [(name, c.id) for name in names for c in cases_of(name)]
        metafunc.parametrize(("name", "case_id"), pairs, ids=[f"{name}-{case_id}" for name, case_id in pairs])
    else:
        metafunc.parametrize("name", names)


@pytest.mark.timeout(900)  # the first test of an implementation runs all its cases
def test_case(name, case_id):
    (record,) = [case for case in judged(name).cases if case["id"] == case_id]
    if record["status"] == "unsupported":
        pytest.skip(record["detail"])
    if record["status"] == "xfailed":
        pytest.xfail(record["detail"])
    assert record["status"] == "passed", f"{record['status']}: {record['detail']}\n{record['command']}"


@pytest.mark.timeout(900)
def test_capabilities_are_true(name):
    assert judged(name).footer["findings"] == []


@pytest.mark.timeout(900)
def test_little_is_unsupported(name):
    """A denial must not empty the suite."""
    counts = judged(name).footer["counts"]
    assert counts.get("unsupported", 0) <= 0.05 * sum(counts.values()), counts
