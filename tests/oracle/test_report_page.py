"""The HTML page: every link leads somewhere, nothing is loaded, a failure shows bits and the command."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from oracle.conformance import html, report, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue
from oracle.conformance.commands import main

VOID = {"meta", "br", "input", "link"}
OPTIONAL_END = {"html", "body", "p", "tr", "td", "th", "thead", "tbody", "option"}


class Page(HTMLParser):
    """Collects ids, links and text, and checks that tags that must be closed are."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.stack, self.resources, self.words = [], [], [], [], []
        self.feed(text)
        assert [tag for tag in self.stack if tag not in OPTIONAL_END] == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        self.resources += [attributes[name] for name in ("src", "data", "action") if name in attributes]
        self.resources += [tag] * (tag in ("link", "iframe", "img", "object"))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        while self.stack and self.stack[-1] != tag:
            assert self.stack[-1] in OPTIONAL_END, f"<{self.stack[-1]}> is open where </{tag}> comes"
            self.stack.pop()
        self.stack.pop()

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def reports():
    cases = select(
        catalogue(), tiers=["core"], patterns=["fn/se*", "fn/silu*", "fn/swish", "update/no-bias", "fn/tail*"]
    )
    good = runner.run("oracle.conformance.model:Model", cases)
    wrong = runner.run("oracle.conformance.mutants.arithmetic:NeverSilu", cases)
    return [good, wrong]


def test_the_page(reports):
    text = html.page(reports)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert page.resources == []
    assert not re.search(r"url\(|@import|fetch\(|https?:", text)
    failure = reports[1].failures[0]
    for part in (
        failure["command"],
        failure["worst"]["got_bits"],
        failure["worst"]["expected_bits"],
        failure["id"],
    ):
        assert part in "".join(page.words)
    assert "FAIL" in text
    assert text.count("<details") == text.count("</details>") > 10
    assert "<p class=filter hidden>" in text, "without a script there is no filter that does nothing"


def test_cells_count_what_ran(reports):
    cell = html.cell("activation-hardwired", 1, reports[1])
    cases = [c for c in reports[1].cases if "activation-hardwired" in c["flags"]]
    passed = sum(c["status"] == "passed" for c in cases)
    assert f"part {passed}/{len(cases)}" in cell
    assert "class='cell part'" in cell
    assert "class='cell bad'" in html.cell("swish-alias-dropped", 1, reports[1])
    assert "class='cell good'" in html.cell("activation-hardwired", 0, reports[0])
    assert "not run" in html.cell("int32-slot-offset", 0, reports[0])


def test_text_from_reports_is_escaped(reports):
    header = {**reports[0].header, "name": "<script>alert(1)</script>", "device": "a & b"}
    text = html.page([replace(reports[0], header=header)])
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert "a &amp; b" in text


def test_the_command(reports, tmp_path, capsys):
    files = []
    for number, one in enumerate(reports):
        files.append(str(tmp_path / f"{number}.jsonl"))
        report.write(one, files[-1])
    assert main(["report", *files, "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == html.page(reports)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}")
    assert main(["report", str(broken), "-o", str(tmp_path / "other.html")]) == 2
    assert "broken.jsonl:1: kind" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least one"):
        html.page([])


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_meets_wcag_aa_in_both_modes():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    light, dark = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part))
                   for part in re.findall(r":root \{([^}]*)\}", html.STYLE))  # fmt: skip
    assert set(light) == set(dark) == {"page", "text", "link", "good", "bad", "part", "none"}
    for mode in (light, dark):
        for name, colour in mode.items():
            assert name == "page" or contrast(colour, mode["page"]) >= 4.5, (name, colour)
    used = re.findall(r"[^-]color: ([^;} ]+)", html.STYLE)
    assert len(used) >= 6
    assert all(colour.startswith("var(--") for colour in used), "a colour that this test does not see"


def test_unsupported_is_no_link_blue_and_versions_are_said(reports):
    assert ".none a { color: var(--none); }" in html.STYLE
    text = html.page(reports)
    header = reports[0].header
    assert (
        f"suite {header['suite']}, contract {header['contract']}, python {header['environment']['python']}"
        in text
    )
    assert text.count("<div class=wide>") == text.count("</div>") == 2
