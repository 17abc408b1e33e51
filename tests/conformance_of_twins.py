"""The twins, kernels and plain paths, through the conformance suite: one process each, one test a case.

The tests of test_triton_conformance.py and test_pallas_conformance.py, which name the IMPLEMENTATIONS they run: two
files, so that they run side by side, and the second one under each JAX. The kernels run in their interpreters here
and so take the core tier; `python -m oracle run --device cuda` runs every tier compiled.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest

from oracle.conformance import ledger, report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
KNOWN_FAILURES = {"pallas": ROOT / "pallas_impl" / "known_failures_interpreter.toml"}
SPECIFICATIONS = {
    "triton": ("triton_impl.adapter:adapter", "torch", ("core",), {"TRITON_INTERPRET": "1"}),
    "eager": ("triton_impl.adapter:eager", "torch", ("core", "full"), {"TRITON_INTERPRET": "0"}),
    "pallas": ("pallas_impl.adapter:adapter", "jax", ("core",), {}),
    "xla": ("pallas_impl.adapter:xla", "jax", ("core",), {}),
}


@functools.cache
def judged(name):
    """The report of one implementation, run once."""
    impl, framework, tiers, environment = SPECIFICATIONS[name]
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    result = runner.run(impl, select(catalogue(), tiers=tiers), device="cpu", environment=environment)
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
        pairs = [(name, c.id) for name in names for c in select(catalogue(), tiers=SPECIFICATIONS[name][2])]
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
