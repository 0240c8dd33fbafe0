"""`@contract`: one promise, its stable id, and the capability it needs.

A contract is an async test of one argument, the `Kit`. Where the adapter declares the needed feature, it must pass; where
the adapter declares it refused, the refusal itself is checked instead (`refusals`). So a flag never removes an assertion.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

import pytest

from .kit import LIMIT, Kit
from .refusals import REFUSALS

Body = Callable[[Kit], Awaitable[None]]

_ID = re.compile(r"[a-z]+\.[a-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Terms:
    """What is promised. `capability`: the feature it needs, None for what every adapter must do. `assumes`: settings of
    the broker without which it can't be kept, beside those that the whole suite assumes (`catalogue.ALWAYS`).
    """

    id: str
    promise: str
    chapter: str
    capability: str | None = None
    assumes: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return asdict(self)


def contract(
    id: str, promise: str, *, needs: str | None = None, assumes: str | None = None, limit: float = LIMIT
) -> Callable[[Body], Body]:
    """Mark a test of the suite as a contract. `limit`: seconds that it may take in all."""
    if not _ID.fullmatch(id):
        raise ValueError(f"contract id {id!r}: use <group>.<words_with_underscores>")
    if not promise.endswith(".") or "\n" in promise:
        raise ValueError(f"contract {id}: the promise is one sentence on one line")
    if assumes is not None and (not assumes.endswith(".") or "\n" in assumes):
        raise ValueError(f"contract {id}: what it assumes is one line of sentences")
    if needs is not None and needs not in REFUSALS:
        raise ValueError(f"contract {id}: needs={needs!r} is no feature with a refusal; known: {', '.join(REFUSALS)}")

    def decorate(function: Body) -> Body:
        chapter = function.__module__.rpartition(".")[2].removeprefix("test_")
        terms = Terms(id, promise, chapter, needs, assumes)

        @functools.wraps(function)
        async def run(kit: Kit) -> None:
            await kit.run(function, needs, REFUSALS[needs] if needs else None, limit)

        run.__unibus_contract__ = terms  # type: ignore[attr-defined] # how the plugin knows a contract from a test
        run.__unibus_limit__ = limit  # type: ignore[attr-defined] # no part of the promise
        marked: Body = pytest.mark.asyncio(run)
        return marked

    return decorate


def limit_of(item: pytest.Item) -> float:
    """Seconds that the contract of this test may take."""
    return float(item.function.__unibus_limit__)  # type: ignore[attr-defined] # of a contract it is a function
