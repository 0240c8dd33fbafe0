"""Which dead letters: by error, digest, time and id."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from unibus import message as names
from unibus.deadletter import stamp
from unibus.delivery import Delivery
from unibus.errors import ConfigError

ErrorOption = Annotated[
    str | None, typer.Option("--error", metavar="TYPE", help="Of this class: ValueError, or shop.errors.BankClosed.")
]
DigestOption = Annotated[
    str | None, typer.Option("--digest", help="That failed on this path through the code, or its first digits.")
]
SinceOption = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Dead since: 30m, 2h or 7d ago, or 2026-01-31T12:00.")
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Dead before; as --since.")]
IdOption = Annotated[list[str] | None, typer.Option("--id", help="Of this message. May be repeated.")]

_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)")
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def choose(
    error: str | None, digest: str | None, since: str | None, until: str | None, ids: list[str] | None
) -> Callable[[Delivery[Any]], bool] | None:
    """The test that a dead letter has to pass; None: all do. A time that a letter does not have is in no range."""
    tests: list[Callable[[Delivery[Any]], bool]] = []
    if error is not None:
        tests.append(lambda d: _is_of(d.message.headers.get(names.ERROR_TYPE, ""), error))
    if digest is not None:
        tests.append(lambda d: d.message.headers.get(names.ERROR_STACK_DIGEST, "").startswith(digest.lower()))
    if ids:
        wanted = set(ids)
        tests.append(lambda d: d.message.id in wanted)
    if since is not None:
        begin = stamp(_time(since, "--since"))
        tests.append(lambda d: begin <= d.message.headers.get(names.MOVED_TO_DLQ_AT, ""))
    if until is not None:
        end = stamp(_time(until, "--until"))
        tests.append(lambda d: "" < d.message.headers.get(names.MOVED_TO_DLQ_AT, "") < end)
    return (lambda d: all(test(d) for test in tests)) if tests else None


def _is_of(found: str, asked: str) -> bool:
    """The class with or without its module."""
    return found == asked or found.endswith(f".{asked}")


def _time(text: str, option: str) -> float:
    if ago := _AGO.fullmatch(text.strip()):
        return time.time() - float(ago[1]) * _SECONDS[ago[2]]
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r}: write 30m, 2h or 7d, or a time as in 2026-01-31T12:00") from None
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
