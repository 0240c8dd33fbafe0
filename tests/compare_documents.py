"""Documents of `unibus compare`, as tests of its page need them."""

from typing import Any

HOSTILE = "\"><img src=x onerror='alert(1)'></script><script>alert(2)</script>&amp;\u202e"


def measured(text: str, *, state: str = "measured", level: str = "plain", **more: Any) -> dict[str, Any]:
    """A cell."""
    return {
        "state": state,
        "level": level,
        "text": text,
        "value": None,
        "note": "",
        "declared": "",
        "points": {},
        **more,
    }


def row(id: str, columns: int, **more: Any) -> dict[str, Any]:
    """One with the same cell in every column, unless `cells` are given."""
    return {
        "id": id,
        "chapter": id.partition(".")[0],
        "title": f"title of {id}",
        "how": f"how {id} is measured",
        "feature": None,
        "unit": "",
        "better": None,
        "axes": None,
        "logarithmic": False,
        "yours": None,
        "cells": [measured("fine") for _ in range(columns)],
        **more,
    }


def document(*, targets: int, rows: list[dict[str, Any]] | None = None, finished: bool = True) -> dict[str, Any]:
    """A whole one."""
    return {
        "compare": 1,
        "finished": finished,
        "quick": True,
        "only": [],
        "at": "2026-01-31T12:00:00+00:00",
        "seconds": 12.5,
        "machine": {"unibus": "0", "python": "3", "system": "Linux", "cores": 2, "load": [0.5, 0.5, 0.5]},
        "targets": [
            {
                "name": f"broker {n}",
                "adapter": "a",
                "version": "1",
                "given": f"x://{n}",
                "url": f"x://{n}",
                "emulator": None,
                "settings": {},
                "prefix": "cmp-1.",
            }
            for n in range(targets)
        ],
        "rows": [row("a.one", targets), row("b.two", targets)] if rows is None else rows,
    }
