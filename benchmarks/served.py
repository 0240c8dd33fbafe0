"""The application that benchmarks.workers runs: each handling computes a little, and its process notes when."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

from benchmarks.load import STEP
from unibus import Bus, Queue

_BLOCK = bytes(100_000)  # to hash it takes about a quarter of a millisecond of a core
_handled = 0
_notes: list[float] = []


@asynccontextmanager
async def notes(_: Bus) -> AsyncIterator[None]:
    """Written when this process has drained."""
    yield
    place = Path(os.environ["BENCH_NOTES"]) / f"{os.getpid()}.json"
    place.write_text(json.dumps({"handled": _handled, "notes": _notes}), encoding="ascii")


bus = Bus(os.environ["BENCH_URL"], service="bench", declare="assume", config=False, environ={}, lifespan=notes)


@bus.consumer(Queue(os.environ["BENCH_QUEUE"], bytes))
async def handle(body: bytes) -> None:  # noqa: ARG001  # every handler takes a body
    global _handled  # noqa: PLW0603  # of this process, for `notes`
    hashlib.sha256(_BLOCK).digest()
    _handled += 1
    if not _handled % STEP:
        _notes.append(monotonic())
