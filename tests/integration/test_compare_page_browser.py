"""The page of `unibus compare` in a real browser: rows, sorting, filtering, at the width of a desk and of a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys
from tests.compare_documents import HOSTILE, document, measured, row
from tests.integration.browser_kit import FACTOR, Page, browser

from unibus_contracts.compare.page import page

# The first test may have to install the browser.
pytestmark = pytest.mark.timeout(600 * FACTOR)

VISIBLE = "[...document.querySelectorAll('tbody tr')].filter(r => r.offsetParent !== null).map(r => r.id)"
DESK, PHONE = 1280, 360


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = {"p50": [[50, 1.5], [200, 3]], "p99": [[50, 9], [200, 40]]}
    rows = [
        row(
            "latency.zebra",
            3,
            axes=["load", "ms"],
            logarithmic=True,
            cells=[measured("1 ms", value=1, points=points)] * 3,
        ),
        row(
            "order.apple",
            3,
            feature="order",
            cells=[
                measured("kept", level="native"),
                measured("kept", level="emulated"),
                measured("no", state="refused", level="refused"),
            ],
        ),
        row("x.mango", 3, cells=[measured("a" * 300), measured(HOSTILE), measured("ValueError", state="failed")]),
        row("x.berry", 3, feature="delay", cells=[measured("b", level="emulated")] * 3),
    ]
    found = document(targets=3, rows=rows)
    found["targets"][2] |= {
        "name": "SQS/SNS on ministack",
        "emulator": "SQS/SNS on ministack",
        "url": "sqs://" + "x" * 200,
    }
    file = tmp_path_factory.mktemp("page") / "compare.html"
    file.write_text(page(found), encoding="utf-8")
    return file


@pytest.fixture(params=[DESK, PHONE])
def opened(request: pytest.FixtureRequest, chromium: Page, written: Path) -> Iterator[Page]:
    """The page at both widths. Whatever a test did: no complaint, no request but for the file itself, nothing wider than the screen."""
    chromium.console()
    chromium.requests(written)
    chromium.open(written, width=request.param)
    yield chromium
    assert chromium.console() == []
    assert set(chromium.requests(written)) <= {written.as_uri(), "data:,"}
    assert chromium.run("document.documentElement.scrollWidth") <= request.param


def test_a_page_that_asks_for_more_would_be_noticed(chromium: Page, tmp_path: Path) -> None:
    file = tmp_path / "other.html"
    file.write_text("<!doctype html><title>x</title><img src='http://127.0.0.1:1/x.png'><script>nonsense()</script>")
    chromium.console()
    chromium.open(file)
    assert "http://127.0.0.1:1/x.png" in chromium.requests(file)
    assert any("nonsense" in line for line in chromium.console())


def test_all_rows_are_there(opened: Page) -> None:
    assert opened.run(VISIBLE) == ["latency.zebra", "order.apple", "x.mango", "x.berry"]
    assert opened.run("document.getElementById('count').textContent") == "4 of 4 rows"
    assert opened.run("document.querySelectorAll('figure svg.plot path.line').length") == 6
    assert "SQS/SNS on ministack" in opened.run("document.querySelector('thead').innerText")


def test_it_sorts_by_keyboard_too(opened: Page) -> None:
    def press(column: int) -> list[str]:
        opened.driver.find_elements("css selector", "thead button")[column].send_keys(Keys.ENTER)
        found: list[str] = opened.run(VISIBLE)
        return found

    by_title = ["latency.zebra", "order.apple", "x.berry", "x.mango"]
    assert press(0) == by_title
    assert opened.run("document.querySelector('thead th').getAttribute('aria-sort')") == "ascending"
    assert press(0) == by_title[::-1]
    assert press(0) == ["latency.zebra", "order.apple", "x.mango", "x.berry"]
    assert press(3) == ["latency.zebra", "x.berry", "order.apple", "x.mango"]  # plain, emulated, refused, failed
    assert opened.run("document.querySelectorAll('[aria-sort]').length") == 1


def test_it_filters(opened: Page) -> None:
    def find(text: str, show: str = "") -> list[str]:
        opened.run(
            "(() => { for (const [id, event, value] of [['find', 'input', arguments[0]], ['show', 'change', arguments[1]]]) {"
            " const field = document.getElementById(id); field.value = value; field.dispatchEvent(new Event(event)); } })()",
            text,
            show,
        )
        found: list[str] = opened.run(VISIBLE)
        return found

    assert find("VALUEERROR") == ["x.mango"]
    assert find("title x") == ["x.mango", "x.berry"]
    assert find("nothing like it") == []
    assert opened.run("document.getElementById('count').textContent") == "0 of 4 rows"
    assert find("", "emulated") == ["order.apple", "x.berry"]
    assert find("berry", "emulated") == ["x.berry"]
    assert find("", "failed") == ["x.mango"]
    assert find("", "differs") == ["order.apple", "x.mango"]


def test_what_is_hostile_is_text(opened: Page) -> None:
    assert opened.run("document.querySelectorAll('script').length") == 1
    assert opened.run("document.images.length") == 0
    assert HOSTILE in opened.run("document.getElementById('x.mango').textContent")


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(chromium: Page, written: Path, dark: bool) -> None:
    chromium.open(written, dark=dark)
    pairs = chromium.run(CONTRASTS)
    assert len(pairs) > 20
    assert [(text, ratio) for text, ratio in pairs if ratio < 4.5] == []


# Every text on its background, as WCAG 2 counts: 4.5 is enough for small print.
CONTRASTS = """(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!(rgb(c).length === 4 && rgb(c)[3] === 0)) return c; } return 'rgb(255,255,255)'; };
  return [...document.querySelectorAll('body *')].filter(e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return [e.textContent.slice(0, 40), (a + .05) / (b + .05)]; });
})()"""


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_is_wider_than_the_screen(chromium: Page, written: Path, width: int) -> None:
    """Nor with all of it open. Text in a plot stays large enough to read, and within the plot."""
    chromium.open(written, width=width)
    for _ in range(2):
        assert chromium.run("document.body.scrollWidth") <= width
        assert chromium.run("document.documentElement.scrollWidth") <= width
        chromium.run("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    for text, left, right, height in chromium.run(PLOT_TEXTS):
        assert left >= 0, text
        assert right >= 0, text
        assert height >= 9, text


# What each text of a plot leaves free on both sides of it, and its height, in pixels of the screen.
PLOT_TEXTS = """[...document.querySelectorAll('svg.plot text')].map(text => {
  const [own, all] = [text.getBoundingClientRect(), text.closest('svg').getBoundingClientRect()];
  return [text.textContent, own.left - all.left, all.right - own.right, Math.min(own.width, own.height) + 4];
})"""


@pytest.mark.parametrize("width", [DESK, 390])
def test_dark_is_dark(chromium: Page, written: Path, width: int) -> None:
    found = {}
    for dark in (False, True):
        chromium.open(written, width=width, dark=dark)
        body = chromium.run("getComputedStyle(document.body).backgroundColor")
        found[dark] = sum(map(int, body.removeprefix("rgb(").removesuffix(")").split(",")))
    assert found[True] < 3 * 48
    assert found[False] > 3 * 220


def test_on_paper_all_is_open(chromium: Page, written: Path) -> None:
    """And afterwards what the reader had opened. On paper a table stays a table, though paper is narrow."""
    chromium.open(written, width=717, media="print")
    open_ones = "[...document.querySelectorAll('details')].filter(one => one.open).length"
    chromium.run("document.querySelector('details').open = true")
    chromium.run("dispatchEvent(new Event('beforeprint'))")
    assert chromium.run("[...document.querySelectorAll('details')].every(one => one.open)") is True
    assert chromium.run("getComputedStyle(document.querySelector('tbody td')).display") == "table-cell"
    assert chromium.run("document.querySelector('.paper').offsetHeight") > 0
    assert chromium.run("document.documentElement.scrollWidth") <= 717
    printed = chromium.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert len(printed["data"]) > 10_000
    chromium.run("dispatchEvent(new Event('afterprint'))")
    assert chromium.run(open_ones) == 1
    chromium.open(written)
    assert chromium.run("document.querySelector('.paper').offsetHeight") == 0
