"""One self-contained HTML page of several reports: implementations by failure modes.

Every cell is a link to its cases, so that the page works by keyboard and without JavaScript; the script only
filters. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from oracle.conformance.flags import FLAGS, KINDS
from oracle.conformance.report import GOOD, Report

STYLE = """
:root { color-scheme: light dark; --line: #8886; --page: #ffffff; --text: #1c1c1c; --link: #0b57d0; --good: #1e6b24; --bad: #b3261e;
  --part: #8a4f00; --none: #5c5c5c; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --text: #e6e6e6; --link: #8ab4f8; --good: #81d086; --bad: #ff8f85;
  --part: #f0b35a; --none: #b4b4b4; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text); }
a { color: var(--link); }
table { border-collapse: collapse; overflow-wrap: normal; } caption { text-align: left; }
@media (max-width: 60rem) { .wide { overflow-x: auto; } }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--page); }
td.cell { white-space: nowrap; } td.cell a { text-decoration: none; font-weight: 600; display: block; }
.good, .good a { color: var(--good); } .bad, .bad a { color: var(--bad); } .part, .part a { color: var(--part); } .none, .none a { color: var(--none); }
a:focus-visible, summary:focus-visible, input:focus-visible, select:focus-visible { outline: 3px solid Highlight; }
details { border: 1px solid var(--line); border-radius: 4px; margin: .4rem 0; padding: .2rem .7rem; }
details:target, details:has(:target) { border-color: Highlight; }
code { font-size: .92em; overflow-wrap: anywhere; } small, .rule { color: var(--none); }
.filter { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1rem 0; } [hidden] { display: none !important; }
"""

SCRIPT = """
const text = document.querySelector('#text'), state = document.querySelector('#state'), shown = document.querySelector('#shown');
function filter() {
  const words = text.value.toLowerCase().split(' ').filter(Boolean);
  let count = 0;
  for (const row of document.querySelectorAll('#matrix tbody tr[data-flag]')) {
    const fits = words.every(w => row.dataset.text.includes(w)) && (state.value === 'all' || row.dataset.state === state.value);
    row.hidden = !fits;
    count += fits;
    document.getElementById('flag-' + row.dataset.flag).hidden = !fits;
  }
  for (const head of document.querySelectorAll('#matrix tr.kind')) {
    let next = head.nextElementSibling, any = false;
    while (next && !next.classList.contains('kind')) { any = any || !next.hidden; next = next.nextElementSibling; }
    head.hidden = !any;
  }
  shown.textContent = count + ' failure modes shown';
}
function open() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let d = target; d; d = d.parentElement) if (d.tagName === 'DETAILS') d.open = true;
  if (target) { const s = target.querySelector('summary'); (s || target).focus(); target.scrollIntoView(); }
}
document.querySelector('.filter').hidden = false;
text.addEventListener('input', filter); state.addEventListener('change', filter);
window.addEventListener('hashchange', open); filter(); open();
"""


def page(reports: Iterable[Report]) -> str:
    """The page, as text.

    Raises:
      ValueError: there is no report.
    """
    reports = list(reports)
    if not reports:
        raise ValueError("reports: expected at least one, got none")
    names = [f"{r.header['name']} {r.header['version']}" for r in reports]
    carried = {flag for r in reports for case in r.cases for flag in case["flags"]}
    flags = [flag for kind in KINDS for flag in FLAGS.values() if flag.kind == kind and flag.id in carried]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Causal conv1d conformance</title><style>{STYLE}</style>",
        "<h1>Causal conv1d conformance</h1>",
        "<p>Rows are failure modes, columns implementations. A cell counts the cases that carry the failure mode and "
        "passed; it leads to those cases. A case carries several failure modes and one mistake fails many cases: where a row "
        "passes in part, the cause is often another row, one that fails altogether.</p>",
        _runs(reports, names),
        "<p class=filter hidden><label>Search <input id=text type=search></label><label>Show <select id=state>"
        "<option value=all>all<option value=bad>with failures<option value=good>without failures</select></label>"
        "<output id=shown></output></p>",
        "<div class=wide><table id=matrix><thead><tr><th scope=col>failure mode"
        + "".join(f"<th scope=col>{_e(n)}" for n in names),
        "<tbody>",
    ]
    kind = None
    for flag in flags:
        if flag.kind != kind:
            kind = flag.kind
            parts.append(
                f"<tr class=kind><th colspan={len(reports) + 1} scope=colgroup><small>{kind}</small>"
            )
        cells = [cell(flag.id, number, report) for number, report in enumerate(reports)]
        state = "bad" if any("cell bad" in cell or "cell part" in cell for cell in cells) else "good"
        searched = _e(f"{flag.id} {flag.kind} {flag.wrong} {flag.rule} {' '.join(flag.references)}".lower())
        parts.append(
            f"<tr data-flag='{flag.id}' data-state={state} data-text='{searched}'><th scope=row>{flag.id}{''.join(cells)}"
        )
    parts.append("</table></div><h2>Cases</h2>")
    for flag in flags:
        seen = f"<p><small>seen: {_e(', '.join(flag.references))}</small>" if flag.references else ""
        parts.append(f"<section id='flag-{flag.id}'><h3>{flag.id}</h3><p>{_e(flag.wrong)}.<br><span class=rule>Rule: "
                     f"{_e(flag.rule)}.</span>{seen}")  # fmt: skip
        for number, report in enumerate(reports):
            cases = [case for case in report.cases if flag.id in case["flags"]]
            if cases:
                parts.append(
                    f"<details id='cell-{flag.id}-{number}'><summary>{_e(names[number])}: {_count(cases)}</summary>"
                )
                parts += [_case(case) for case in sorted(cases, key=lambda c: c["status"] in GOOD)]
                parts.append("</details>")
        parts.append("</section>")
    parts.append(f"<script>{SCRIPT}</script></html>\n")
    return "\n".join(parts)


def matrix(reports: Iterable[Report]) -> str:
    """The same matrix as a Markdown table: passed and run cases of each failure mode."""
    reports = list(reports)
    names = [f"{r.header['name']} {r.header['version']}" for r in reports]
    lines = ["| failure mode | " + " | ".join(names) + " |", "|---" * (len(reports) + 1) + "|"]
    carried = {flag for r in reports for case in r.cases for flag in case["flags"]}
    for flag in (flag for flag in FLAGS.values() if flag.id in carried):
        cells = [_count([c for c in r.cases if flag.id in c["flags"]]) for r in reports]
        if any(cell != "unsupported" for cell in cells):
            lines.append(f"| {flag.id} | " + " | ".join(cell.partition(",")[0] for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _runs(reports: list[Report], names: list[str]) -> str:
    rows = []
    for report, name in zip(reports, names, strict=True):
        counts = ", ".join(f"{n} {status}" for status, n in sorted(report.footer["counts"].items()))
        findings = "".join(f"<br>{_e(f)}" for f in report.footer["findings"])
        style = "good" if report.good else "bad"
        rows.append(f"<tr><th scope=row>{_e(name)}<td>{_e(report.header['device'])}<td class={style}>{_e(counts)}{findings}"
                    f"<td>{report.footer['seconds']} s<td>{_e(report.header['started'])}<td>{_versions(report)}")  # fmt: skip
    return ("<div class=wide><table id=runs><caption>Runs</caption><thead><tr><th>implementation<th>device<th>cases<th>time"
            "<th>started<th>versions<tbody>" + "".join(rows) + "</table></div>")  # fmt: skip


def _versions(report: Report) -> str:
    header, environment = report.header, report.header["environment"]
    found = {"suite": header["suite"], "contract": header["contract"]}
    found |= {name: environment[name] for name in ("python", "numpy") if name in environment}
    return _e(", ".join(f"{name} {version}" for name, version in found.items()))


def cell(flag: str, number: int, report: Report) -> str:
    cases = [case for case in report.cases if flag in case["flags"]]
    ran = [case for case in cases if case["status"] != "unsupported"]
    if not cases:
        return "<td class='cell none'>not run"
    failing = any(case["status"] not in GOOD for case in ran)
    part = any(case["status"] == "passed" for case in ran)
    style = "none" if not ran else "good" if not failing else "part" if part else "bad"
    return f"<td class='cell {style}'><a href='#cell-{flag}-{number}'>{_count(cases)}</a>"


def _count(cases: list[dict[str, Any]]) -> str:
    ran = [case for case in cases if case["status"] != "unsupported"]
    passed = sum(case["status"] == "passed" for case in ran)
    if not ran:
        return "unsupported"
    failing = any(case["status"] not in GOOD for case in ran)
    word = "pass" if passed == len(ran) else "known" if not failing else "part" if passed else "FAIL"
    return f"{word} {passed}/{len(ran)}" + (
        f", {len(cases) - len(ran)} unsupported" if len(ran) < len(cases) else ""
    )


def _case(case: dict[str, Any]) -> str:
    style = "good" if case["status"] == "passed" else "none" if case["status"] in GOOD else "bad"
    text = f"<p><b class={style}>{case['status']}</b> <code>{_e(case['id'])}</code> <small>{case['tier']}, {case['seconds']} s</small>"
    if case["detail"]:
        text += f"<br>{_e(case['detail'])}"
    if case["worst"]:
        w = case["worst"]
        text += (f"<br><small>worst element {w['index']}: expected {w['expected']} ({w['expected_bits']}), got {w['got']} "
                 f"({w['got_bits']}), {w['dtype']}, {w['fraction']:.3g} of the bound</small>")  # fmt: skip
    return text + f"<br><code>{_e(case['command'])}</code>"


def _e(text: Any) -> str:
    return html.escape(str(text), quote=True)
