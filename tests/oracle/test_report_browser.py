"""The HTML page in a real browser, headless: it loads nothing, filters, and opens a failing cell by keyboard.

Runs where Chromium and its driver are installed (`apt-get install chromium chromium-driver`), else it is skipped.
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest

from oracle.conformance import html, runner
from oracle.conformance.cases import select
from oracle.conformance.catalogue import catalogue

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="needs chromium and chromedriver on PATH",
)
ENTER, TAB = "\ue007", "\ue004"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic"]  # fmt: skip


class Browser:
    """As much of the WebDriver protocol as these tests need."""

    def __init__(self, port, script=True, profile=None):
        self._root = f"http://127.0.0.1:{port}"
        arguments = [*FLAGS, f"--user-data-dir={profile}"]
        options = {"args": arguments} if script else {
            "args": arguments, "prefs": {"profile.managed_default_content_settings.javascript": 2}
        }  # fmt: skip
        wanted = {
            "capabilities": {
                "alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            }
        }
        self._session = (
            f"{self._root}/session/{self._call('POST', f'{self._root}/session', wanted)['sessionId']}"
        )

    def _call(self, method, url, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script):
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def find(self, selector):
        found = self._call("POST", f"{self._session}/element", {"using": "css selector", "value": selector})
        return f"{self._session}/element/{next(iter(found.values()))}"

    def type(self, selector, text):
        self._call("POST", f"{self.find(selector)}/value", {"text": text})

    def text(self, selector):
        return self._call("GET", f"{self.find(selector)}/text")

    def shown(self, selector):
        return self._call("GET", f"{self.find(selector)}/displayed")

    def cdp(self, command, **parameters):
        return self._call("POST", f"{self._session}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self):
        return self._call("POST", f"{self._session}/se/log", {"type": "browser"})

    def close(self):
        self._call("DELETE", self._session)


@pytest.fixture(scope="module")
def driver():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield port
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    cases = select(
        catalogue(),
        tiers=["core"],
        patterns=["fn/seed", "fn/silu*", "fn/swish", "fn/dim-65", "update/no-bias"],
    )
    good = runner.run("oracle.conformance.model:Model", cases)
    wrong = runner.run("oracle.conformance.mutants.arithmetic:NeverSilu", cases)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html.page([good, wrong]))
    return path.as_uri()


@pytest.fixture
def browser(driver, tmp_path):
    opened = Browser(driver, profile=tmp_path / "profile")
    yield opened
    opened.close()


def rows_shown(browser):
    return browser.run(
        "return [...document.querySelectorAll('#matrix tr[data-flag]')].filter(r => !r.hidden).length"
    )


def test_it_loads_nothing_and_filters(browser, page):
    browser.open(page)
    assert browser.text("h1") == "Causal conv1d conformance"
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert [entry for entry in browser.log() if entry["level"] == "SEVERE"] == []
    every = rows_shown(browser)
    browser.type("#text", "swish")
    some = rows_shown(browser)
    assert 0 < some < every
    assert browser.text("#shown") == f"{some} failure modes shown"
    browser.type("#text", " no-such-word")
    assert rows_shown(browser) == 0
    browser.run("text.value = ''; text.dispatchEvent(new Event('input'))")
    browser.type("#state", "with failures")
    bad = rows_shown(browser)
    assert 0 < bad < every
    assert browser.run("return [...document.querySelectorAll('#matrix tr[data-flag]')]"
                       ".filter(r => !r.hidden).every(r => r.querySelector('td.bad, td.part'))")  # fmt: skip


def test_a_failing_cell_opens_by_keyboard(browser, page):
    browser.open(page)
    selector = "#matrix tr[data-flag='swish-alias-dropped'] td.bad a, #matrix tr[data-flag='swish-alias-dropped'] td.part a"
    target = browser.run(
        f"const a = document.querySelector(\"{selector}\"); a.focus(); return a.getAttribute('href')"
    )
    details = f"[id='{target[1:]}']"
    assert not browser.run(f'return document.querySelector("{details}").open')
    browser.type(selector, ENTER)
    assert browser.run(f'return document.querySelector("{details}").open')
    assert browser.run(f'return document.activeElement === document.querySelector("{details} summary")')
    words = browser.text(details)
    assert "wrong_value" in words
    assert "0x" in words
    assert "python -m oracle run" in words


def test_it_is_readable_without_javascript(driver, page, tmp_path):
    opened = Browser(driver, script=False, profile=tmp_path / "profile")
    try:
        opened.open(page)
        assert opened.text("#matrix tr[data-flag='swish-alias-dropped'] th") == "swish-alias-dropped"
        assert not opened.shown(".filter")
    finally:
        opened.close()


CONTRAST = """
const channels = text => text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255);
const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const luminance = text => channels(text).map(linear).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const page = luminance(getComputedStyle(document.body).backgroundColor);
let worst = [99, ''];
for (const node of document.querySelectorAll('body *')) {
  if (![...node.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !node.offsetParent) continue;
  if (['SCRIPT', 'OPTION', 'SELECT', 'INPUT'].includes(node.tagName)) continue;
  const [low, high] = [luminance(getComputedStyle(node).color), page].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  if (ratio < worst[0]) worst = [ratio, node.tagName + '.' + node.className + ' ' + node.textContent.slice(0, 40)];
}
return worst;
"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_meets_wcag_aa(browser, page, mode):
    browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
    browser.open(page)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}[mode]
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, where
    unsupported = browser.run(
        "const a = document.querySelector('td.none a'); return a && getComputedStyle(a).color"
    )
    assert unsupported != browser.run("return getComputedStyle(document.body).getPropertyValue('--link')")


@pytest.mark.parametrize("width", [420, 800])
def test_a_narrow_window_does_not_overflow(browser, page, width):
    browser.cdp(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
    )
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("return window.innerWidth") == width
    assert browser.run("return document.documentElement.scrollWidth") <= width
