"""What commands print: JSON lines for pipes, tables for people, progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from unibus.adapter import Backlog
from unibus.errors import ConfigError

_WIDE = 10_000  # columns where nobody looks: a table in a file is not cut


def piped() -> bool:
    """Is stdout anything but a terminal?"""
    return not sys.stdout.isatty()


def write_json(value: object) -> None:
    """One line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def flush() -> None:
    sys.stdout.flush()


def say(text: str) -> None:
    """For people, in the way of nobody's pipe."""
    print(text, file=sys.stderr, flush=True)


def writable(file: Path) -> None:
    """Now, not after ten minutes of measuring. Makes its folder, and leaves no empty file. Raises ConfigError."""
    there = os.path.lexists(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8"):
            pass
        if not there:
            file.unlink()
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """`columns`: a `>` in front aligns to the right."""
    from rich import box  # a tenth of a second: only for who looks at tables
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD if not piped() else None, pad_edge=False)
    for name in columns:
        made.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(width=_WIDE if piped() else None, highlight=False).print(made)


class Advance(Protocol):
    def __call__(self, n: int) -> None: ...


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Advance]:
    """Counts on stderr while it lasts, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _n: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn(what), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


def age(seconds: float | None) -> str:
    """12 s, 5 min, 3 h, 2 d."""
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size * 2:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def estimate(backlog: Backlog | None) -> str:
    """How many are ready; about so many where the broker only estimates."""
    return "" if backlog is None else f"{'' if backlog.exact else '~'}{backlog.ready}"


def plural(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def short(value: Any, limit: int = 60) -> str:
    """The beginning of a value in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def show(kind: str, body: Any) -> None:
    """A body in full: JSON indented, text as it is."""
    print(body if kind != "body" else json.dumps(body, ensure_ascii=False, indent=2))
