"""oracle/README.md: what it shows runs as shown, and what it counts is true."""

import re
from pathlib import Path

from oracle.conformance import report, runner, vectors
from oracle.conformance.adapter import SERVING_FEATURES
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.flags import FLAGS
from oracle.conformance.mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "oracle" / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_the_first_adapter(tmp_path):
    """It loads, is judged, and fails on what the guide says it lacks, but not on a plain fresh prefill."""
    (tmp_path / "mine.py").write_text(next(b for b in blocks("python") if b.startswith("# mine.py")))
    cases = select(
        catalogue(), patterns=["fn/leak-stateless", "fn/silu-float32", "fn/width-2", "update/width-4-float32"]
    )
    result = runner.run("mine:adapter", cases, environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    status = {case["id"]: case["status"] for case in result.cases}
    assert status["fn/silu-float32"] == "wrong_value"
    assert status["fn/width-2"] == "unsupported"
    assert status["update/width-4-float32"] == "unsupported"
    assert result.header["name"] == "mine"


def test_counts():
    assert "more than 900 cases" in GUIDE
    assert len(catalogue()) > 900
    assert "over 100\nways" in GUIDE
    assert len(FLAGS) > 100
    assert "more than 240 wrong-on-purpose" in GUIDE
    assert len(MUTANTS) > 240
    frozen = int(re.search(r"holds (\d+) calls", GUIDE).group(1))
    assert vectors.verify() == frozen
    lines = int(re.search(r"program of (\d+) lines", GUIDE).group(1))
    assert (
        abs(len((ROOT / "oracle" / "examples" / "other_process.py").read_text().splitlines()) - lines) <= 15
    )


def test_statuses_are_all_explained():
    section = GUIDE.partition("## Reading a failure")[2].partition("\n## ")[0]
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*? \|", section, re.MULTILINE))))
    known = set(report.schema.load("report_v1.json")["$defs"]["case"]["properties"]["status"]["enum"])
    assert explained | {"passed"} == known


def test_the_table_of_what_is_supported_is_complete():
    table = re.findall(
        r"^\| `(\w+)` \|.*\|$", GUIDE.partition("| supports |")[2].partition("\n\n")[0], re.MULTILINE
    )
    assert sorted(table) == sorted(SERVING_FEATURES)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (ROOT / "oracle" / target).exists(), target


def test_the_ledger_and_histories_parse():
    import tomllib

    assert tomllib.loads(blocks("toml")[0])["failure"][0]["reason"]
    for block in blocks("python"):
        compile(block, "guide", "exec")
