"""The document in a terminal: a table of all rows, or a list where the columns have no room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"native": "green", "emulated": "yellow", "refused": "red", "plain": ""}


def show(document: Mapping[str, Any], console: Console) -> None:
    """Text of the document is never read as markup, and control characters in it are not printed."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    made.add_column("behaviour", overflow="fold")
    for target in document["targets"]:
        made.add_column(_clean(target["name"]), overflow="fold")
    chapter = None
    for row in document["rows"]:
        if row["chapter"] != chapter:
            chapter = row["chapter"]
            made.add_row(Text(_clean(chapter), style="bold"))
        made.add_row(_title(row), *(_cell(cell, row["feature"]) for cell in row["cells"]))
    console.print(made)
    if not document["finished"]:
        console.print(Text("partial: the run was broken off; what is missing says so", style="bold red"))


def _title(row: Mapping[str, Any]) -> Text:
    return Text(("* " if row["yours"] else "  ") + _clean(row["title"]))


def _cell(cell: Mapping[str, Any], feature: str | None) -> Text:
    text = Text(_clean(cell["text"]), style="bold red" if cell["state"] == "failed" else "")
    tag = cell["level"] if cell["state"] in {"measured", "declared"} else cell["state"]
    if cell["state"] == "declared":
        tag = "declared"
    elif cell["state"] == "measured" and tag == "refused":
        tag = f"{feature} refused"
    if tag not in {"plain", cell["text"]}:
        text.append(f" [{tag}]", style=_STYLES.get(cell["level"], ""))
    if cell.get("change"):
        text.append(f" {cell['change']}: was {_clean(cell['was'])}", style="bold")
    return text


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in str(text))
