"""What a comparison looks like: the page, the table, the curves, and what has changed since. On documents made here."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.compare_documents import HOSTILE, document, measured, row

from unibus import ConfigError
from unibus_contracts.compare.against import against, load
from unibus_contracts.compare.page import page
from unibus_contracts.compare.plot import Scale, plot
from unibus_contracts.compare.table import show


class Tags(HTMLParser):
    """Every tag with its attributes, and that what is opened is closed."""

    VOID = frozenset(("meta", "link", "input"))
    OPTIONAL = frozenset(("html", "head", "body"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def text_table(found: Mapping[str, Any], width: int = 160) -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=width, highlight=False))
    return out.getvalue()


# The page


def test_the_page_has_a_row_for_each_row_and_a_cell_for_each_target() -> None:
    found = document(targets=3, rows=[row("a.one", 3), row("a.two", 3), row("b.three", 3)])
    tags = Tags(page(found))
    assert [a["id"] for a in tags.all("tr") if "id" in a] == ["a.one", "a.two", "b.three"]
    assert len(tags.all("td")) == 9
    assert [a.get("scope") for a in tags.all("th")] == ["col"] * 4 + ["row"] * 3


def test_the_page_asks_for_nothing_and_runs_no_script_but_its_own() -> None:
    tags = Tags(page(document(targets=2)))
    for name, attributes in tags.found:
        assert not {"src", "srcset", "style", "onclick", "onload"} & attributes.keys(), name
    assert [a["href"] for a in (*tags.all("a"), *tags.all("link"))] == ["#rows", "data:,"]
    [policy] = [a["content"] for a in tags.all("meta") if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert not re.search(r"url\(|@import|https?://", page(document(targets=2)).partition("<body>")[0])


def test_nothing_of_a_document_becomes_markup() -> None:
    found = document(targets=2, rows=[row("x", 2, cells=[measured(HOSTILE, note=HOSTILE), measured(HOSTILE)])])
    for target in found["targets"]:
        target |= {"name": HOSTILE, "url": HOSTILE, "emulator": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    for entry in found["rows"]:
        entry |= {"id": HOSTILE, "title": HOSTILE, "how": HOSTILE, "chapter": HOSTILE, "feature": HOSTILE}
        entry["axes"] = [HOSTILE, HOSTILE]
        for cell in entry["cells"]:
            cell |= {"points": {HOSTILE: [[1, 2], [2, 3]]}, "change": HOSTILE, "was": HOSTILE, "declared": HOSTILE}
            cell |= {"level": HOSTILE, "state": HOSTILE}
    found["against"] = found["machine"]["system"] = found["at"] = HOSTILE
    tags = Tags(page(found))
    assert len(tags.all("script")) == 1
    assert tags.all("img") == []
    assert all("onerror" not in attributes for _, attributes in tags.found)
    assert any(HOSTILE in text for text in tags.texts)


def test_every_cell_tells_native_from_emulated() -> None:
    cells = [
        measured("a", level="native"),
        measured("b", level="emulated"),
        measured("c", level="refused"),
        measured("d", state="declared", level="native"),
        measured("e", state="failed"),
    ]
    html = page(document(targets=5, rows=[row("x", 5, cells=cells, feature="delay")]))
    tags = re.findall(r'<span class="tag ([\w-]+)">([^<]+)</span>', html.partition("<tbody")[2])
    assert tags == [
        *(("native", "native"), ("emulated", "emulated"), ("refused", "delay refused")),
        *(("native", "native"), ("declared", "declared"), ("failed", "failed")),
    ]


def test_an_emulator_and_a_partial_run_are_told() -> None:
    found = document(targets=1, finished=False)
    found["targets"][0] |= {"name": "SQS/SNS on ministack", "emulator": "SQS/SNS on ministack"}
    html = page(found)
    assert "An emulator: SQS/SNS on ministack" in html
    assert "<strong>Partial:</strong>" in html
    assert "<strong>Partial:</strong>" not in page(document(targets=1))


def test_marks_of_a_row_are_what_the_filter_knows() -> None:
    found = document(
        targets=2,
        rows=[
            row("same", 2),
            row("differs", 2, cells=[measured("a"), measured("b")]),
            row("failed", 2, cells=[measured("a"), measured("a", state="not run")]),
            row("yours", 2, yours=True),
        ],
    )
    marks = {a["id"]: set((a["data-marks"] or "").split()) for a in Tags(page(found)).all("tr") if "id" in a}
    assert {id for id, found in marks.items() if "differs" in found} == {"differs"}
    assert {id for id, found in marks.items() if "failed" in found} == {"failed"}
    assert {id for id, found in marks.items() if "yours" in found} == {"yours"}


# Curves


def test_a_plot_has_a_line_for_each_curve() -> None:
    points = {"p50": [[1, 10], [100, 20]], "p99": [[1, 30], [100, 90]]}
    found = row("x", 2, axes=["load", "ms"], logarithmic=True, cells=[measured("a", points=points)] * 2)
    svg = plot(found, ["one", "two"])
    assert len(re.findall(r'<path class="line l[01]"', svg)) == 4
    assert svg.count("<title>") == 8
    assert plot(row("y", 2), ["one", "two"]) == ""


@pytest.mark.parametrize("points", [[[1, 0]], [[0, 0], [0, 0]], [[1, 5]], [[1, -3], [2, 7]], [[1e-9, 1e12]]])
@pytest.mark.parametrize("logarithmic", [True, False])
def test_a_plot_of_odd_points_stays_inside(points: list[list[float]], logarithmic: bool) -> None:
    found = row("x", 1, axes=["x", "y"], logarithmic=logarithmic, cells=[measured("a", points={"c": points})])
    svg = plot(found, ["one"])
    assert "nan" not in svg
    assert "inf" not in svg
    for x, y in re.findall(r"<text class=\"tick\" x=\"([-\d.]+)\" y=\"([-\d.]+)\"", svg):
        assert 0 <= float(x) <= 470
        assert 0 <= float(y) <= 275


def test_a_scale_goes_from_end_to_end() -> None:
    assert [Scale([1, 1000], 0, 300, logarithmic=True)(value) for value in (1, 10, 1000)] == [0, 100, 300]
    assert [Scale([5, 10], 0, 100, logarithmic=False)(value) for value in (0, 5, 10)] == [0, 50, 100]
    assert Scale([0, 10], 0, 100, logarithmic=True)(5) == 50  # nothing is logarithmic at 0


# The table


def test_the_table_has_every_row_and_marks() -> None:
    found = document(
        targets=2,
        rows=[
            row(
                "x.a", 2, cells=[measured("fast", level="emulated"), measured("slow", state="declared", level="native")]
            ),
            row(
                "x.b",
                2,
                cells=[measured("twice", level="refused"), measured("ValueError", state="failed")],
                feature="dedup",
                yours=True,
            ),
        ],
    )
    text = text_table(found)
    for expected in (
        "fast [emulated]",
        "slow [declared]",
        "twice [dedup refused]",
        "ValueError [failed]",
        "* title of x.b",
    ):
        assert expected in text
    assert "partial" not in text
    assert "partial" in text_table(document(targets=1, finished=False))


def test_the_table_prints_no_control_characters_and_reads_no_markup() -> None:
    found = document(targets=1, rows=[row("x", 1, cells=[measured("\x1b[31m[bold]red[/bold]\x07")])])
    text = text_table(found)
    assert "\x1b" not in text
    assert "[bold]red[/bold]" in text


# What has changed


def changes(was: dict[str, Any], now: dict[str, Any], **more: Any) -> tuple[list[str], dict[str, Any]]:
    old = document(targets=1, rows=[row("x", 1, cells=[was], **more)])
    new = document(targets=1, rows=[row("x", 1, cells=[now], **more)])
    lines = against(new, old)
    cell: dict[str, Any] = new["rows"][0]["cells"][0]
    return lines, cell


@pytest.mark.parametrize(
    ("better", "was", "now", "change"),
    [
        ("less", 10, 20, "worse"),
        ("less", 20, 10, "better"),
        ("more", 10, 20, "better"),
        ("more", 20, 10, "worse"),
        ("less", 10, 12, None),
        ("less", 0, 0, None),
        ("less", 0, 1, "worse"),
    ],
)
def test_a_figure_that_moved(better: str, was: float, now: float, change: str | None) -> None:
    lines, cell = changes(measured(f"{was}", value=was), measured(f"{now}", value=now), better=better)
    assert cell.get("change") == change
    assert len(lines) == (change is not None)


def test_other_changes() -> None:
    assert changes(measured("a"), measured("b"))[1]["change"] == "changed"
    assert changes(measured("a", level="native"), measured("a", level="emulated"))[1]["was"] == "a (native)"
    assert changes(measured("a"), measured("E", state="failed"))[1]["change"] == "worse"
    assert changes(measured("E", state="failed"), measured("a"))[1]["change"] == "better"
    assert changes(measured("a"), measured("a"))[0] == []
    assert changes(measured("a"), measured("", state="not run"))[0] == []


def test_a_row_that_was_not_there_is_no_change() -> None:
    old, new = document(targets=1, rows=[row("y", 1)]), document(targets=1, rows=[row("x", 1)])
    assert against(new, old) == []
    assert new["against"] == old["at"]


def test_a_target_that_was_not_there_is_said() -> None:
    old, new = document(targets=1, rows=[row("x", 1)]), document(targets=2, rows=[row("x", 2)])
    assert against(new, old) == ["broker 1: is not in the older run"]
    assert not any("change" in cell for cell in new["rows"][0]["cells"])


def test_what_is_left_on_a_broker_is_on_the_page() -> None:
    found = document(targets=2, rows=[row("x", 2)])
    found["targets"][1]["left"] = f"what begins with 'cmp-1.': {HOSTILE}"
    text = page(found)
    assert text.count("Not deleted: what begins with") == 1
    assert HOSTILE not in text


def test_how_it_is_measured_is_written_once_for_paper() -> None:
    rows = [row("a.one", 1), row("a.two", 1, how="the same"), row("a.three", 1, how="the same")]
    paper = page(document(targets=1, rows=rows)).partition('<section class="paper">')[2]
    assert paper.count("<dt>") == 3
    assert paper.count("<dd>") == 2


def test_a_change_is_on_the_page() -> None:
    old = document(targets=1, rows=[row("x", 1, cells=[measured("9 ms", value=9)], better="less")])
    new = document(targets=1, rows=[row("x", 1, cells=[measured("99 ms", value=99)], better="less")])
    against(new, old)
    assert '<span class="change worse">worse: was 9 ms</span>' in page(new)
    assert "99 ms worse: was 9 ms" in " ".join(text_table(new).split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"compare": 1}',
        '{"compare": 1, "targets": [{"name": "a"}], "rows": [{"id": "x", "cells": []}]}',
    ],
)
def test_what_is_no_document_is_said(text: str, tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"old\.json is no document of `unibus compare --json`"):
        load(file)


def test_a_document_of_other_types_is_said(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    for found in (
        document(targets=1, rows=[row("x", 1, cells=[measured("a", value="9")])]),
        document(targets=1, rows=[row("x", 1, cells=[measured(["a"])])]),  # type: ignore[arg-type]  # on purpose
        document(targets=1) | {"at": 1},
    ):
        file.write_text(json.dumps(found))
        with pytest.raises(ConfigError, match="is no document"):
            load(file)


def test_a_document_of_another_format_is_said(tmp_path: Path) -> None:
    file = tmp_path / "old.json"
    file.write_text(json.dumps(document(targets=1) | {"compare": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        load(file)
    file.write_text(json.dumps(document(targets=1)))
    assert load(file)["compare"] == 1
