"""The suite itself: inputs, layouts, selection, reports, and adapters that misbehave in every way."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from oracle import contract, numerics
from oracle.conformance import arrays, catalogue, commands, inputs, report, runner
from oracle.conformance.adapter import ARRAYS, OPS, SERVING_ARRAYS, SERVING_FEATURES
from oracle.conformance.cases import select

ROOT = Path(__file__).resolve().parents[2]
CASES = catalogue.catalogue()

BAD = """
import os, signal, sys, time
import numpy as np
from oracle.conformance.adapter import ARRAYS, SERVING_ARRAYS, NumpyAdapter
from oracle.conformance.model import Model
from oracle.contract import Unsupported

class Base(Model):
    def run(self, op, arrays, options):
        result = dict(super().run(op, arrays, options))
        self.spoil(arrays, result)
        return result
    def spoil(self, arrays, result): pass

class Good(Base): pass
class Loud(Base):
    def spoil(self, arrays, result): print("{ not a record", flush=True)
class Raises(Base):
    def spoil(self, arrays, result): raise RuntimeError("out of luck")
class ReturnsNone(Base):
    def run(self, op, arrays, options): return None
class ReturnsText(Base):
    def spoil(self, arrays, result): result["out"] = "zeros"
class ReturnsFloat64(Base):
    def spoil(self, arrays, result): result["out"] = result["out"].values()
class ReturnsTransposed(Base):
    def spoil(self, arrays, result): result["out"] = np.zeros((3, 1), np.float32)
class ForgetsStates(Base):
    def spoil(self, arrays, result): result["conv_states"] = None
class WritesWeight(Base):
    def spoil(self, arrays, result): arrays["weight"].data[...] = 0
class WritesBeforePool(Base):
    def spoil(self, arrays, result): arrays["conv_states"].base[arrays["conv_states"].offset - 1] = 0
class ReturnsShortMemory(Base):
    def spoil(self, arrays, result): result["memory"] = {"x": arrays["x"].base[:-1]}
class Sleeps(Base):
    def spoil(self, arrays, result):
        if arrays["x"].shape[0] == 4: time.sleep(600)
class Dies(Base):
    def spoil(self, arrays, result):
        if arrays["x"].shape[0] == 4: os.kill(os.getpid(), signal.SIGKILL)
class Exits(Base):
    def spoil(self, arrays, result):
        if arrays["x"].shape[0] == 4: os._exit(3)
class DeniesInVain(Base):
    def capabilities(self): return {"unsupported": {"width:4": "not today"}}
class DeniesTruly(Base):
    def capabilities(self): return {"unsupported": {"width:4": "not today"}}
    def spoil(self, arrays, result):
        if arrays["weight"].shape[1] == 4: raise NotImplementedError("width 4")
class ClaimsInVain(Base):
    def spoil(self, arrays, result):
        if arrays["weight"].shape[1] == 4: raise NotImplementedError("width 4")
class SupportsNothing(Base):
    def capabilities(self): return {}
    def run(self, op, arrays, options):
        assert set(arrays) == set(ARRAYS[op]) - set(SERVING_ARRAYS) and "state_layout" not in options
        return super().run(op, arrays, options)
class SupportsLayouts(Base):
    def capabilities(self): return {"supports": ["state_layout_*", "wri?e_indices"]}
    def run(self, op, arrays, options):
        new = {"cache_seqlens", "write_indices"}
        assert set(arrays) == set(ARRAYS[op]) - set(SERVING_ARRAYS) | new, sorted(arrays)
        return super().run(op, arrays, options)
class PrefillOnly(Base):
    def capabilities(self): return {"unsupported": {"op:causal_conv1d_update": "no decode step"}}
    def run(self, op, arrays, options):
        if op == "causal_conv1d_update": raise Unsupported("no decode step")
        return super().run(op, arrays, options)
class UnpackedStepsOnly(Base):
    def capabilities(self): return {"unsupported": {"update:packed": "no offsets", "update:multi_token": "one token"}}
    def run(self, op, arrays, options):
        if op == "causal_conv1d_update" and (arrays["query_start_loc"] is not None or len(arrays["x"].shape) == 3):
            raise Unsupported("rows of one token only")
        return super().run(op, arrays, options)
class DeniesAll(Base):
    def capabilities(self): return {"unsupported": {"*": "no"}}
class ReturnsLists(Base):
    def spoil(self, arrays, result):
        for name in ("out", "conv_states", "window_out"):
            if result.get(name) is not None and not isinstance(result[name], list):
                result[name] = result[name].values().tolist()
        if "parents" in result: result["parents"] = result["parents"].tolist()
class ReturnsRaggedList(Base):
    def spoil(self, arrays, result): result["out"] = [[1.0], [1.0, 2.0]]
class ForgetsOut(Base):
    def spoil(self, arrays, result): del result["out"]
class States(Base):
    STATED = {}
    def capabilities(self): return self.STATED
class TypoSupports(States): STATED = {"supports": ["statelayout_back"]}
class TypoDenied(States): STATED = {"unsupported": {"widht:5": "at most four"}}
class TypoKey(States): STATED = {"bitexact": True}
class SupportsText(States): STATED = {"supports": "split"}
class DeniedList(States): STATED = {"unsupported": ["width:5"]}
class PromisesText(States): STATED = {"path_invariant": "yes"}
class NoMapping(States): STATED = ["split"]
class SupportsAll(Base):
    def run(self, op, arrays, options):
        assert list(arrays) == list(ARRAYS[op])
        return super().run(op, arrays, options)
class JoinsParts(Base):
    def spoil(self, arrays, result): result["out"] = result["out"][0] if isinstance(result["out"], list) else result["out"]
class TooFewParts(Base):
    def spoil(self, arrays, result): result["out"] = result["out"][1:]
class PartsOfOtherSizes(Base):
    def spoil(self, arrays, result): result["out"] = result["out"][::-1]
class ForgetsWindows(Base):
    def spoil(self, arrays, result): result["window_out"] = None
class InventsWindows(Base):
    def spoil(self, arrays, result): result["window_out"] = result["out"]
class WritesOtherBuffer(Base):
    def spoil(self, arrays, result): result["window_out"].bits[1] = 0
class WritesBeforeWindows(Base):
    def spoil(self, arrays, result): arrays["window_out"].base[arrays["window_out"].offset - 1] = 0
class WritesPrefixSlot(Base):
    def spoil(self, arrays, result): result["conv_states"].bits[4, 0, 0] ^= 1
class CommitsElsewhere(Base):
    def spoil(self, arrays, result): result["conv_states"].bits[7] = 0
class ForgetsPool(Base):
    def spoil(self, arrays, result): del result["conv_states"]
class WideParents(Base):
    def spoil(self, arrays, result): result["parents"] = result["parents"].astype(np.int64)
class FlatParents(Base):
    def spoil(self, arrays, result): result["parents"] = result["parents"].reshape(-1)
class WrongParents(Base):
    def spoil(self, arrays, result): result["parents"][0, 1] += 1
class WritesLinks(Base):
    def spoil(self, arrays, result): arrays["next_token"].data[...] = 0
class Incomplete:
    def run(self, op, arrays, options): pass
class LoadsOnce(Dies):
    def __init__(self):
        with open(os.environ["MARK"], "x"): pass
class BadStart(Base):
    def __init__(self): raise OSError("no device")
"""

STATUS = {
    "Good": "passed", "Loud": "passed", "Raises": "wrong_error", "ReturnsNone": "wrong_dtype", "ReturnsText": "wrong_dtype",
    "ReturnsFloat64": "wrong_dtype", "ReturnsTransposed": "wrong_shape", "ForgetsStates": "wrong_shape",
    "WritesWeight": "wrong_memory", "WritesBeforePool": "wrong_memory", "ReturnsShortMemory": "wrong_shape",
    "ClaimsInVain": "wrong_error", "ReturnsLists": "passed", "ReturnsRaggedList": "wrong_dtype", "ForgetsOut": "wrong_dtype",
}  # fmt: skip
WORDS = {
    "ReturnsNone": "expected a mapping with 'out', got None", "ReturnsText": "out: expected an array, got str 'zeros'",
    "ForgetsOut": "expected a mapping with 'out', got one with ['conv_states', 'window_out']",
    "ForgetsStates": "conv_states: expected an array, got None",
    "ReturnsRaggedList": "out: expected an array, got a list of 2",
    "ReturnsFloat64": "out: expected dtype bfloat16, got float64",
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad_adapters.py").write_text(BAD)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])

    def run(name, patterns=("update/width-4", "update/width-2"), mark="", **options):
        cases = select(CASES, patterns=patterns)
        environment = {"PYTHONPATH": path, "MARK": str(mark)}
        return runner.run(f"bad_adapters:{name}", cases, environment=environment, **options)

    return run


@pytest.mark.parametrize("name", STATUS)
def test_misbehaviour_has_a_status(bad, name):
    result = bad(name)
    by_id = {case["id"]: case for case in result.cases}
    assert by_id["update/width-4"]["status"] == STATUS[name], by_id["update/width-4"]["detail"]
    assert result.good == (STATUS[name] == "passed")
    if STATUS[name] != "passed":
        assert by_id["update/width-4"]["detail"]
    assert WORDS.get(name, "") in by_id["update/width-4"]["detail"]


def test_lists_may_be_returned_wherever_arrays_may(bad):
    patterns = (
        "fn/seed",
        "fn/width-4-float32",
        "update/no-rows",
        "update/windows-width-4",
        "commit/steps",
        "links/tree",
    )
    assert bad("ReturnsLists", patterns).footer["counts"] == {"passed": len(patterns)}


@pytest.mark.parametrize(
    ("name", "message"),
    [("TypoSupports", "supports: 'statelayout_back' matches no feature; did you mean 'state_layout_back'"),
     ("TypoDenied", "unsupported: 'widht:5' matches no feature; did you mean 'width:5'"),
     ("TypoKey", "'bitexact': expected one of supports, .*; did you mean 'bit_exact'"),
     ("SupportsText", "supports: expected a list of names, got 'split'"),
     ("DeniedList", "unsupported: expected a mapping to reasons"),
     ("PromisesText", "path_invariant: expected True or False, got 'yes'")],
)  # fmt: skip
def test_a_typo_in_capabilities_is_an_error(bad, name, message):
    with pytest.raises(runner.ImplementationError, match=f"capabilities of model: {message}"):
        bad(name)


def test_capabilities_of_another_kind_are_an_error(bad):
    with pytest.raises(runner.ImplementationError, match="could not be loaded"):
        bad("NoMapping")


@pytest.mark.parametrize(
    ("name", "patterns"),
    [("PrefillOnly", ("fn/path-*", "fn/seed", "fn/serving-chunks", "update/width-4")),
     ("UnpackedStepsOnly", ("fn/path-*", "update/path-*", "update/width-4", "update/packed-f32"))],
)  # fmt: skip
def test_who_denies_an_operation_is_not_judged_by_relations_that_use_it(bad, name, patterns):
    result = bad(name, patterns)
    assert result.failures == []
    assert not [finding for finding in result.footer["findings"] if "denied" in finding]
    assert result.judged


def test_values_are_said_in_words_of_numbers(bad):
    """What an out and a state should have been, and were, without a table of bits."""
    (record,) = runner.run(
        "oracle.conformance.mutants.arithmetic:NeverSilu", select(CASES, patterns=["fn/seed"])
    ).cases
    assert re.search(
        r"out: \d+ of \d+ elements outside the bound, the worst at \[\d+, \d+\]: expected -?[\d.]+(e-?\d+)?, got "
        r"-?[\d.]+(e-?\d+)?, [\d.e+]+ times the bound", record["detail"],
    ), record["detail"]  # fmt: skip
    wrong = "oracle.conformance.mutants.states:StateHoldsOutputs"
    (record,) = runner.run(wrong, select(CASES, patterns=["update/stored"])).cases
    assert re.search(
        r"conv_states: \d+ elements wrong, the first at \[.*\]: expected -?[\d.e-]+ \(bits 0x[0-9a-f]{4}\), got -?[\d.e-]+ \(bits",
        record["detail"],
    ), record["detail"]  # fmt: skip


SERVING = {
    "fn/split": {"JoinsParts": "wrong_shape", "TooFewParts": "wrong_shape", "PartsOfOtherSizes": "wrong_value"},
    "fn/split-uneven": {"PartsOfOtherSizes": "wrong_shape"},
    "update/windows-width-4": {
        "ForgetsWindows": "wrong_shape", "WritesOtherBuffer": "wrong_memory", "WritesBeforeWindows": "wrong_memory",
    },
    "update/no-commit": {"InventsWindows": "wrong_shape"},
    "fn/shared-prefix": {"WritesPrefixSlot": "wrong_memory"},
    "commit/steps": {"CommitsElsewhere": "wrong_memory", "ForgetsPool": "wrong_dtype"},
    "links/tree": {
        "WideParents": "wrong_dtype", "FlatParents": "wrong_shape", "WrongParents": "wrong_value",
        "WritesLinks": "wrong_memory",
    },
}  # fmt: skip


@pytest.mark.parametrize(("case_id", "name"), [(c, name) for c, names in SERVING.items() for name in names])
def test_misbehaviour_in_serving_has_a_status(bad, case_id, name):
    (record,) = bad(name, (case_id,)).cases
    assert record["status"] == SERVING[case_id][name], record["detail"]


def test_serving_is_opt_in(bad):
    """An adapter that names nothing never meets a new argument, and one that names some is judged by those."""
    patterns = ("update/width-4", "fn/back-width-4-of-7", "fn/write-slots*", "fn/path-layouts-width-4", "commit/steps",
                "fn/path-prefixes-width-4", "fn/error-split-sum", "backward/width-4")  # fmt: skip
    nothing = {c["id"]: c for c in bad("SupportsNothing", patterns).cases}
    assert nothing.pop("update/width-4")["status"] == "passed"
    assert {c["status"] for c in nothing.values()} == {"unsupported"}
    assert nothing["fn/back-width-4-of-7"]["detail"] == "not among what it supports: state_layout_back"
    assert nothing["commit/steps"]["detail"] == "not among what it supports: commit_windows"
    assert nothing["backward/width-4"]["detail"] == "not among what it supports: causal_conv1d_backward"
    some = {c["id"]: c["status"] for c in bad("SupportsLayouts", patterns).cases}
    unsupported = {name for name, status in some.items() if status == "unsupported"}
    assert unsupported == {
        "commit/steps",
        "fn/path-prefixes-width-4",
        "fn/error-split-sum",
        "backward/width-4",
    }
    assert {status for name, status in some.items() if name not in unsupported} == {"passed"}


def test_arrays_are_those_of_the_contract_in_its_order(bad):
    """One list a call: None where a case has none."""
    patterns = (
        "update/width-4",
        "fn/seed",
        "fn/write-slots",
        "commit/steps",
        "links/tree",
        "backward/width-4",
    )
    assert bad("SupportsAll", patterns).footer["counts"] == {"passed": len(patterns)}
    for op, record in contract.RECORDS.items():
        if op in OPS:
            assert ARRAYS[op] == record.ARRAYS
    assert set(ARRAYS["causal_conv1d_backward"]) == {"dout", "dfinal_states", *contract.RowsCall.ARRAYS}
    forward = {name for op in (catalogue.FN, catalogue.UPDATE) for name in ARRAYS[op]}
    assert set(SERVING_ARRAYS) < forward
    assert set(SERVING_ARRAYS.values()) <= set(SERVING_FEATURES)


def test_every_serving_argument_has_a_feature():
    """No case of the serving arguments can reach an adapter that does not name what it needs."""
    known = {name for op in (catalogue.FN, catalogue.UPDATE) for name in ARRAYS[op]} - set(SERVING_ARRAYS)
    found = set()
    gigabytes = {"fn/many-channels", "fn/scale"}  # plain prefills, which have small twins
    for case in CASES:
        if case.id in gigabytes:
            assert not case.serving
            continue
        problem = inputs.build(case)
        new = {name for name in problem.arrays if name not in known}
        new |= set(problem.options) & {
            "state_layout",
            "empty_rows",
            "snapshot_block_size",
            "commit",
            "channel_offset",
            "split_sizes",
        }
        assert bool(case.serving) or not new, case.id
        assert set(case.serving) <= set(SERVING_FEATURES)
        assert set(case.serving) <= case.features
        found |= set(case.serving)
    assert found == set(SERVING_FEATURES)


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("Sleeps", "timed_out", "within 2 s"),
        ("Dies", "crashed", "SIGKILL"),
        ("Exits", "crashed", "exit status 3"),
    ],
)
def test_the_run_goes_on_after_a_dead_process(bad, name, status, detail):
    result = bad(name, ("update/width-4", "update/dim-7"), time_limit=2.0)
    by_id = {case["id"]: case for case in result.cases}
    assert by_id["update/width-4"]["status"] == status
    assert detail in by_id["update/width-4"]["detail"]
    assert by_id["update/dim-7"]["status"] == "passed"


def test_several_processes_give_the_same_report(bad):
    cases = ("update/width-[1-4]", "update/dim-[1-7]", "update/batch-*")
    one, three = bad("Dies", cases), bad("Dies", cases, jobs=3)
    assert [(c["id"], c["status"]) for c in one.cases] == [(c["id"], c["status"]) for c in three.cases]
    assert one.footer["counts"] == three.footer["counts"]
    assert one.footer["counts"]["crashed"] >= 2
    with pytest.raises(ValueError, match="jobs: expected 1 with outputs"):
        bad("Good", jobs=2, outputs="x.npz")
    with pytest.raises(ValueError, match="jobs: expected at least 1, got 0"):
        bad("Good", jobs=0)


def test_an_implementation_that_loads_only_once(bad, tmp_path):
    """After a crash it cannot be loaded again; the run still ends, with a record for every case."""
    (tmp_path / "used").unlink(missing_ok=True)
    result = bad("LoadsOnce", ("update/width-4", "update/dim-7"), mark=tmp_path / "used")
    assert {c["id"]: c["status"] for c in result.cases} == {
        "update/width-4": "crashed",
        "update/dim-7": "crashed",
    }
    assert "not loaded again" in result.cases[1]["detail"]


def test_capabilities_are_checked_both_ways(bad):
    vain = bad("DeniesInVain")
    assert [c["status"] for c in vain.cases] == ["passed", "unsupported"]
    assert "width:4: denied, but all 1 cases that need it pass" in vain.footer["findings"]
    assert not vain.good
    true = bad("DeniesTruly")
    assert true.good
    assert {c["id"]: c.get("probe") for c in true.cases} == {
        "update/width-4": "unsupported",
        "update/width-2": None,
    }
    assert "capabilities() claims this" in bad("ClaimsInVain").failures[0]["detail"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Incomplete", "'name'"),
        ("BadStart", "OSError: no device"),
        ("Missing", "Missing"),
        ("Good.run.x", "AttributeError"),
    ],
)
def test_what_cannot_be_loaded_is_said(bad, name, message):
    with pytest.raises(runner.ImplementationError, match=message):
        bad(name)


def test_a_spec_without_a_colon_is_refused():
    with pytest.raises(runner.ImplementationError, match=r"expected package\.module:object"):
        runner.run("oracle", CASES[:1])


def test_ids_are_unique_and_cases_are_json():
    assert max(Counter(case.id for case in CASES).values()) == 1
    for case in CASES:
        assert json.loads(json.dumps(case.to_json()))["id"] == case.id
        assert case.tier in ("core", "full", "large")
        assert case.features


def test_selection():
    everything = select(CASES)
    assert all(case.tier != "large" for case in everything)
    assert [c.id for c in select(CASES, patterns=["fn/pitch-2-31"])] == ["fn/pitch-2-31"]
    assert [c.id for c in select(CASES, patterns=["fn/pitch-2-31"], tiers=["core"])] == ["fn/pitch-2-31"]
    assert select(CASES, patterns=["fn/pitch-2-3*"], tiers=["core"]) == []
    assert all(c.op == catalogue.UPDATE for c in select(CASES, op=catalogue.UPDATE))
    assert all("sequence-leak" in c.flags for c in select(CASES, flags=["sequence-leak"]))
    for wrong in ({"patterns": ["nothing-*"]}, {"op": "conv"}, {"flags": ["typo"]}):
        with pytest.raises(ValueError, match="expected"):
            select(CASES, **wrong)


def test_the_hash_is_fixed():
    """Frozen: another language must be able to repeat these."""
    assert inputs.hash_uint32(0, "x", 4).tolist() == [2924369457, 666690619, 3160841089, 3066657168]
    assert inputs.hash_uint32(7, "weight", 2).tolist() == [3615008651, 1529838888]
    values = inputs.random_values(3, "x", (50_000,))
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 2 / 3**0.5) < 0.02
    assert np.abs(values).max() < 4
    other = inputs.random_values(4, "x", (50_000,))
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02


LAYOUTS = ("contiguous", "misaligned", "slice", "slice_odd", "transposed", "transposed_pages", "pages", "every_other",
           "odd_unit_axis")  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(6,), (5, 3), (1, 4), (4, 1), (3, 2, 5), (0, 4), (3, 1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_hold_the_array_and_guards(layout, shape, dtype):
    if len(shape) < 2 and layout in ("transposed_pages", "pages"):
        pytest.skip("these need an axis to put into pages")
    array = numerics.rounded(np.arange(1.0, np.prod(shape) + 1).reshape(shape), dtype)
    placed = arrays.place(array, layout)
    np.testing.assert_array_equal(placed.data, array.data)
    untouched = placed.base.copy()
    positions = sum(np.arange(n).reshape([-1 if a == i else 1 for i in range(len(shape))]) * s
                    for a, (n, s) in enumerate(zip(shape, placed.strides, strict=True)))  # fmt: skip
    assert np.unique(positions).size == np.prod(shape), "elements overlap"
    assert placed.offset >= arrays.GUARD
    assert (
        len(placed.base) - (placed.offset + (positions.max() if np.size(positions) else 0)) > arrays.GUARD - 1
    )
    placed.data[...] = 0
    changed = np.ones(shape, bool)
    assert not len(
        arrays.unchanged_outside(
            arrays.Array(dtype, untouched, placed.offset, shape, placed.strides), placed.base, changed
        )
    )
    if np.prod(shape):
        assert len(
            arrays.unchanged_outside(
                arrays.Array(dtype, untouched, placed.offset, shape, placed.strides), placed.base, None
            )
        )


def test_what_must_not_be_read_is_nan():
    problem = inputs.build(catalogue.find("fn/tail-packed"))
    x, pool = problem.arrays["x"], problem.arrays["conv_states"]
    assert numerics.is_nan(x.typed.bits[33:], "bfloat16").all()
    assert not numerics.is_nan(x.typed.bits[:33], "bfloat16").any()
    slots, has = problem.arrays["cache_indices"].data, problem.arrays["has_initial_state"].data
    for slot in range(pool.shape[0]):
        read = slot in slots[has]
        assert numerics.is_nan(pool.typed.bits[slot], "bfloat16").any() != read
    padding = inputs.build(catalogue.find("fn/padding-rows"))
    assert numerics.is_nan(padding.arrays["x"].typed.bits[4:6], "bfloat16").all()


def test_reports_round_trip_and_damage_is_named(tmp_path, bad):
    result = bad("Good")
    path = tmp_path / "report.jsonl"
    report.write(result, path)
    again = report.read(path)
    assert again == result
    lines = path.read_text().splitlines()
    damaged = {
        "footer: missing": lines[:-1],
        "line 2": [lines[0], lines[1][:-5], *lines[2:]],
        "seconds: expected number": [
            lines[0],
            lines[1].replace('"seconds": ', '"seconds": "x", "s": '),
            *lines[2:],
        ],
        "unknown field": [lines[0], lines[1].replace('{"kind"', '{"colour": 1, "kind"'), *lines[2:]],
        "status: expected one of": [lines[0], lines[1].replace('"passed"', '"fine"'), *lines[2:]],
        "flags: missing": [lines[0], lines[1].replace('"flags"', '"flag"'), *lines[2:]],
        "format: expected 1, got 9": [lines[0].replace('"format": 1', '"format": 9'), *lines[1:]],
        "the footer counts 2, the file has 1": [lines[0], *lines[2:]],
        "kind: expected header": lines[1:],
        "kind: expected nothing more": [*lines, lines[-1]],
        "the file is empty": [],
    }
    for message, wrong in damaged.items():
        path.write_text("\n".join(wrong))
        with pytest.raises(report.ReportError, match=f"{path}.*{message.replace('line 2', ':2: expected')}"):
            report.read(path)


def test_a_run_of_no_cases_is_no_success(bad):
    assert not report.close({}, [], 0.0, []).good


def oracle(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-m", "oracle", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("impl", "message"),
    [("nosuch", "expected package.module:object"), ("nosuch:x", "No module named 'nosuch'"),
     ("oracle.contract:nothing", "oracle.contract has no 'nothing'"), ("json:JSONDecoder", "expected an adapter with 'name'")],
)  # fmt: skip
def test_what_is_not_there_is_one_line(impl, message):
    done = oracle("run", "--impl", impl, "--cases", "fn/seed")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: impl: ")
    assert message in line


def test_a_module_that_fails_itself_keeps_its_traceback(tmp_path):
    (tmp_path / "mine.py").write_text("import no_such_framework\n")
    done = oracle("run", "--impl", "mine:adapter", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "No module named 'no_such_framework'" in done.stderr.splitlines()[-1]


def test_a_file_of_the_users_named_oracle_does_no_harm(tmp_path):
    """The console script finds the package, and so do the processes that it starts; the file itself is named."""
    (tmp_path / "oracle.py").write_text("adapter = None\n")
    (tmp_path / "mine.py").write_text("from oracle.conformance.model import Model\n")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from oracle.conformance.commands import main; sys.exit(main())"

    def run(impl):
        return subprocess.run(
            [sys.executable, "-c", code, "run", "--impl", impl, "--cases", "fn/seed"], cwd=tmp_path, capture_output=True,
            text=True, timeout=120, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        )  # fmt: skip

    good = run("mine:Model")
    assert good.returncode == 0, good.stderr
    hidden = run("oracle:adapter")
    assert hidden.returncode == 2
    assert f"oracle, the package at {ROOT / 'oracle' / '__init__.py'} has no 'adapter'" in hidden.stderr


def test_nothing_judged_is_no_success(tmp_path):
    (tmp_path / "bad_adapters.py").write_text(BAD)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = oracle("run", "--impl", "bad_adapters:DeniesAll", "--cases", "fn/seed", PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: nothing was judged: no case ran for its result"


def test_a_report_that_cannot_be_written_is_said_before_the_run(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "r.jsonl"):
        done = oracle(
            "run", "--impl", "oracle.conformance.model:Model", "--cases", "fn/seed", "--report", str(path)
        )
        assert done.returncode == 2
        assert f"error: report: expected the path of a file that can be written, got '{path}'" in done.stderr
        assert done.stdout == ""


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m oracle list | head -n 2"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr == ""


def test_an_interrupted_run_leaves_what_it_has(tmp_path):
    """A program that never answers its second case, and Ctrl-C."""
    (tmp_path / "bad_adapters.py").write_text(BAD)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    signals = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{signals}; from oracle.conformance.commands import main; raise SystemExit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "--impl", "bad_adapters:Sleeps", "--cases", "fn/width-1", "--cases", "update/width-4",
         "--cases", "update/width-2", "--jobs", "2", "--report", str(tmp_path / "r.jsonl")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    for line in process.stderr:  # progress: the third of three cases has begun, the first has ended
        if "2/3" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    text, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    left = report.read(tmp_path / "r.jsonl")
    assert left.interrupted
    assert "fn/width-1" in {case["id"] for case in left.cases}
    assert f"CAPABILITIES interrupted: {len(left.cases)} of 3 cases ran" in text
    assert f"{len(left.cases)} cases in" in text


def test_the_command_line(tmp_path):
    good = oracle(
        "run",
        "--impl",
        "oracle.conformance.model:Model",
        "--cases",
        "fn/seed",
        "--report",
        str(tmp_path / "r"),
    )
    assert good.returncode == 0, good.stderr
    assert "1 cases" in good.stdout
    assert report.read(tmp_path / "r").header["name"] == "model"
    wrong = oracle("run", "--impl", "oracle.conformance.mutants.arithmetic:NeverSilu", "--cases", "fn/se*")
    assert wrong.returncode == 1
    assert "WRONG_VALUE fn/seed" in wrong.stdout
    assert (
        "python -m oracle run --impl oracle.conformance.mutants.arithmetic:NeverSilu --cases fn/seed"
        in wrong.stdout
    )
    for arguments in (
        ("run", "--impl", "nowhere:x"),
        ("run", "--impl", "oracle:CONTRACT_VERSION", "--cases", "zzz"),
        ("nonsense",),
    ):
        failed = oracle(*arguments)
        assert failed.returncode == 2
        assert "error" in failed.stderr


def test_lists(capsys):
    assert commands.main(["list", "--cases", "fn/seed"]) == 0
    assert "fn/seed" in capsys.readouterr().out
    assert commands.main(["list", "--json"]) == 0
    assert all(json.loads(line)["since"] == 1 for line in capsys.readouterr().out.splitlines())
    assert commands.main(["list", "--features"]) == 0
    assert "width:4" in capsys.readouterr().out.splitlines()
    assert commands.main(["list", "--flags"]) == 0
    assert "sequence-leak (boundary)" in capsys.readouterr().out
    assert commands.main(["mutants", "--only", "taps-reversed"]) == 0
    assert "1 mutants, 1 caught" in capsys.readouterr().out


def test_numpy_functions_need_no_adapter_of_their_own(tmp_path):
    """The reference itself, through the adapter for plain NumPy functions."""
    result = runner.run("oracle.conformance.adapter:reference_adapter", select(CASES, tiers=["core"]))
    assert result.good, result.failures


def test_reports_and_adapters_know_every_operation():
    fields = report.schema.load("report_v1.json")["$defs"]["case"]["properties"]
    assert set(fields["op"]["enum"]) == {case.op for case in CASES}
    assert set(OPS) == {case.op for case in CASES} | {"short_conv"}  # which relations call
    assert set(ARRAYS) == set(OPS)


def conflict(case):
    """What the value checks say of a slot or buffer that rows of a case share, if they do."""
    arguments = inputs.build(case).typed()
    try:
        call = contract.RECORDS[case.op](**arguments)
        call.check_values(call.check(), lambda name, array: array.data.tolist())
    except ValueError as error:  # of other bad values there are plenty, with defined results
        return str(error) if "distinct" in str(error) or "no other row reads" in str(error) else None
    return None


def test_no_case_expects_an_order_of_writes():
    """Two rows that write one slot give what comes last, which on a GPU may be either."""
    judged = [
        case
        for case in CASES
        if case.expect == "value" and case.tier != "large" and case.op in (catalogue.FN, catalogue.UPDATE)
    ]
    assert len(judged) > 500
    assert {case.id: found for case in judged if (found := conflict(case))} == {}
    near = next(case for case in judged if case.id == "fn/snapshot-near-start")
    shared = replace(near, axes={**near.axes, "snapshot_indices": ((9, 3), (9, 4), (11, 5))})
    assert "distinct" in conflict(shared)
