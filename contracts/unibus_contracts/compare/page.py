"""The document as one HTML page that needs nothing else: no network, no fonts, no images; it also reads without its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from .plot import plot

_HERE = Path(__file__).parent


def page(document: Mapping[str, Any]) -> str:
    """All text of the document is escaped, and the page allows no script but its own."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    names = [target["name"] for target in document["targets"]]
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
            f"<title>{_e(', '.join(names))}: compared</title><style>{style}</style></head><body>",
            '<a class="skip" href="#rows">To the table</a>',
            *_head(document, names),
            *_plots(document, names),
            *_table(document, names),
            *_methods(document),
            *_foot(document),
            f"<script>{script}</script></body></html>",
        ]
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _e(value: object) -> str:
    return escape(str(value), quote=True)


def _when(at: object) -> str:
    return f"{str(at)[:16].replace('T', ' ')} UTC"


def _head(document: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    machine = document["machine"]
    facts = [
        f"{_when(document['at'])}, on {machine['cores']} cores",
        f"load {(machine['load'] or ['unknown'])[0]} at the start",
        f"{machine['system']}, Python {machine['python']}, unibus {machine['unibus']}",
        f"{document['seconds']} s",
        *(["a quick run: few samples"] if document["quick"] else []),
    ]
    yield f"<header><h1>{'Brokers, compared' if len(names) > 1 else 'One broker, measured'}</h1>"
    yield f"<p>{_e('; '.join(facts))}.</p>"
    if not document["finished"]:
        yield '<p class="alarm" role="note"><strong>Partial:</strong> the run was broken off. What is missing says “not run”.</p>'
    if document.get("against"):
        yield f"<p>Changes are against a run of {_e(_when(document['against']))}.</p>"
    yield '<ul class="targets">'
    for number, target in enumerate(document["targets"]):
        yield f'<li><span class="swatch s{number % 8}" aria-hidden="true"></span><strong>{_e(target["name"])}</strong>'
        yield f"<code>{_e(target['url'])}</code>"
        if target["emulator"]:
            yield f"<em>An emulator: {_e(target['emulator'])}. What it does, the service may do otherwise.</em>"
        if target.get("left"):
            yield f"<em>Not deleted: {_e(target['left'])}</em>"
        if target["settings"]:
            yield f"<small>{_e(', '.join(f'{k}={v}' for k, v in target['settings'].items()))}</small>"
        yield "</li>"
    yield "</ul></header><main>"


def _plots(document: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    drawn = [(row, svg) for row in document["rows"] if (svg := plot(row, names))]
    if not drawn:
        return
    yield '<section aria-labelledby="plots"><h2 id="plots">Measured curves</h2><div class="plots">'
    for row, svg in drawn:
        yield f"<figure><figcaption><strong>{_e(row['chapter'])}: {_e(row['title'])}</strong></figcaption>{svg}"
        yield f"<details><summary>How it is measured</summary><p>{_e(row['how'])}</p></details></figure>"
    yield "</div></section>"


def _table(document: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    yield '<section aria-labelledby="rows"><h2 id="rows">Behaviour, row by row</h2>'
    yield '<form class="controls" role="search"><label>Find <input type="search" id="find" autocomplete="off"></label>'
    yield '<label>Show <select id="show">'
    yours = any(row["yours"] for row in document["rows"])
    for value, text in (
        ("", "all rows"),
        ("differs", "where brokers differ"),
        ("emulated", "emulated somewhere"),
        ("refused", "refused somewhere"),
        ("declared", "declared, not measured"),
        ("failed", "failed or not run"),
        *([("yours", "what your application touches")] if yours else []),
        *([("changed", "what has changed")] if document.get("against") else []),
    ):
        yield f'<option value="{value}">{text}</option>'
    yield '</select></label><output id="count" aria-live="polite"></output></form>'
    yield '<p class="legend">'
    for tag, text in (
        ("native", "the broker does it"),
        ("emulated", "unibus does it on this broker"),
        ("refused", "refused at start"),
        ("plain", "sending, receiving, settling: no feature is declared for it"),
        ("declared", "the adapter says so; not measured"),
    ):
        yield f'<span><span class="tag {tag}">{tag}</span> {text}</span>'
    yield '</p><table role="table"><caption class="away">Every row is a behaviour, every column a broker</caption>'
    yield '<thead role="rowgroup"><tr role="row"><th role="columnheader" scope="col"><button type="button">Behaviour</button></th>'
    for name in names:
        yield f'<th role="columnheader" scope="col"><button type="button">{_e(name)}</button></th>'
    yield '</tr></thead><tbody role="rowgroup">'
    for number, row in enumerate(document["rows"]):
        yield from _row(number, row, names)
    yield "</tbody></table></section></main>"


def _row(number: int, row: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    cells = row["cells"]
    shown = {(cell["text"], cell["level"]) for cell in cells}
    marks = {cell["level"] for cell in cells} | {cell["state"].replace("not run", "failed") for cell in cells}
    marks |= {"differs"} if len(shown) > 1 else set()
    marks |= {"yours"} if row["yours"] else set()
    marks |= {"changed"} if any(cell.get("change") for cell in cells) else set()
    yield f'<tr role="row" id="{_e(row["id"])}" data-at="{number}" data-marks="{_e(" ".join(sorted(marks)))}">'
    yield f'<th role="rowheader" scope="row"><span class="chapter">{_e(row["chapter"])}</span> {_e(row["title"])}'
    yield ' <span class="tag yours">yours</span>' if row["yours"] else ""
    yield f"<details><summary>How it is measured</summary><p>{_e(row['how'])}</p></details></th>"
    numbers = [cell["value"] for cell in cells if cell["value"] is not None]
    top = max(numbers, default=0.0) if row["unit"] and len(numbers) > 1 else 0.0
    for column, cell in enumerate(cells):
        yield _cell(cell, names[column], column, top, row["feature"] or "")
    yield "</tr>"


_RANK = {"native": 0, "plain": 1, "emulated": 2, "refused": 3}


def _cell(cell: Mapping[str, Any], name: str, column: int, top: float, feature: str) -> str:
    rank = _RANK.get(cell["level"], 4) + (10 if cell["state"] in {"failed", "not run"} else 0)
    level = cell["level"]
    if level == "refused" and cell["state"] == "measured":
        level = f"{feature} refused"  # what was measured is what there is without it
    tags = [(cell["level"], level)] if cell["state"] not in {"failed", "not run"} else []
    tags += [(cell["state"], cell["state"])] if cell["state"] in {"declared", "failed", "not run"} else []
    bar = ""
    if top > 0 and cell["value"] is not None and cell["value"] >= 0:
        width = max(1.0, cell["value"] / top * 100) if cell["value"] else 0.0
        bar = (
            '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="f{column % 8}" width="{width:.1f}" height="4"/></svg>'
        )
    more = "".join(f"<p>{_e(text)}</p>" for text in (cell["note"], cell["declared"]) if text)
    change = ""
    if cell.get("change"):
        change = f'<span class="change {_e(cell["change"])}">{_e(cell["change"])}: was {_e(cell["was"])}</span>'
    return "".join(
        [
            f'<td role="cell" data-name="{_e(name)}" data-rank="{rank}" class="{_e(cell["state"]).replace(" ", "-")}">',
            f'<span class="text">{_e(cell["text"])}</span>{bar}',
            "".join(f'<span class="tag {_e(kind).replace(" ", "-")}">{_e(tag)}</span>' for kind, tag in tags),
            change,
            f"<details><summary>more</summary>{more}</details>" if more else "",
            "</td>",
        ]
    )


def _methods(document: Mapping[str, Any]) -> Iterator[str]:
    """For paper alone, where nothing opens: in the rows it would be a column of one word a line."""
    yield '<section class="paper"><h2>How it is measured</h2><dl>'
    for how, rows in groupby(document["rows"], lambda row: row["how"]):
        yield from (f"<dt>{_e(row['chapter'])}: {_e(row['title'])}</dt>" for row in rows)
        yield f"<dd>{_e(how)}</dd>"
    yield "</dl></section>"


def _foot(document: Mapping[str, Any]) -> Iterator[str]:
    yield "<footer><p>Figures are of this machine, this load and these settings; they compare brokers only side by side in one run. "
    yield "Every number is of unibus on the broker, not of the broker alone. How each comes about stands in its row.</p></footer>"
