"""What has changed since an older document. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unibus import ConfigError

from .run import FORMAT, Document

NOISE = 0.3  # a figure that has moved by less, of the larger one, is taken for the same


def load(path: Path) -> Document:
    """A document that `--json` has written. Raises ConfigError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["compare"] != FORMAT:
            raise ConfigError(
                f"{path}: format {document['compare']!r}; this unibus reads {FORMAT}. Run the comparison again"
            )
        for cells in _columns(document).values():
            for cell in cells.values():
                if not isinstance(cell["value"], int | float | None) or not isinstance(cell["text"], str):
                    raise TypeError("a cell is no cell")
        if not isinstance(document["at"], str):
            raise TypeError("no time")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ConfigError(f"{path} is no document of `unibus compare --json`") from None
    found: Document = document
    return found


def _columns(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Target -> row -> its cell. A target is the same by its name."""
    columns: dict[str, dict[str, Any]] = {}
    for number, target in enumerate(document["targets"]):
        columns[target["name"]] = {
            row["id"]: {name: row["cells"][number][name] for name in ("state", "level", "text", "value")}
            for row in document["rows"]
        }
    return columns


def against(document: Document, old: Mapping[str, Any]) -> list[str]:
    """Mark the cells of `document` that have changed (`change`, `was`); a line for each. What is new is no change; of a target that is new
    a line says so.
    """
    document["against"] = old["at"]
    before = _columns(old)
    lines = [f"{one['name']}: is not in the older run" for one in document["targets"] if one["name"] not in before]
    for row in document["rows"]:
        for target, cell in zip(document["targets"], row["cells"], strict=True):
            was = before.get(target["name"], {}).get(row["id"])
            if was is None or "not run" in (was["state"], cell["state"]):
                continue
            if change := _change(row, cell, was):
                cell |= {"change": change, "was": _said(was, cell)}
                lines.append(f"{target['name']}: {row['title']}: {change}: {cell['text']}, was {cell['was']}")
    return lines


def _said(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    level = f" ({was['level']})" if was["level"] != now["level"] else ""
    return f"{was['text']}{level}"


def _change(row: Mapping[str, Any], now: Mapping[str, Any], was: Mapping[str, Any]) -> str:
    if (now["state"] == "failed") != (was["state"] == "failed"):
        return "worse" if now["state"] == "failed" else "better"
    if now["level"] != was["level"] or now["state"] != was["state"]:
        return "changed"
    new, old = now["value"], was["value"]
    if new is None or old is None or row["better"] is None:
        return "changed" if now["text"] != was["text"] and new == old and row["better"] is None else ""
    if abs(new - old) <= NOISE * max(abs(new), abs(old)):
        return ""
    return "better" if (new < old) == (row["better"] == "less") else "worse"
