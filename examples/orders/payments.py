"""The world outside: a payment provider, and the journal in which all effects of the service stand.

Both are stand-ins. The journal is a file, so that it survives a service that is killed, and can be read by a demo that
runs in another process.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Journal:
    """Lines `what id`, only ever appended. Several processes may write to one file, each line in one write."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()  # handlers that are plain functions run in threads
        self._at = 0
        self._seen: dict[str, Counter[str]] = {}
        self.lines = 0
        self.read()

    def add(self, what: str, which: str = "-") -> None:
        os.write(self._file, f"{what} {which}\n".encode())

    def read(self) -> None:
        """Take in what was added since, by whomever. A line that is not yet whole waits for the next time."""
        with self._lock:
            while chunk := os.pread(self._file, 1 << 20, self._at):
                whole = chunk[: chunk.rfind(b"\n") + 1]
                if not whole:
                    return
                self._at += len(whole)
                for line in whole.decode().splitlines():
                    what, _, which = line.partition(" ")
                    self._seen.setdefault(what, Counter())[which] += 1
                    self.lines += 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While no other process is in here; all that stands in the journal so far has been read."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self.read()
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def of(self, what: str) -> Counter[str]:
        """Id -> how often."""
        return self._seen.get(what, Counter())

    def repeated(self, what: str) -> int:
        """Effects beyond the first of each id."""
        return self.of(what).total() - len(self.of(what))

    def close(self) -> None:
        os.close(self._file)


class PaymentFailed(Exception):
    """The provider did not take the payment; it may next time."""


class Payments:
    """A provider that is idempotent by order id, as a real one is by the key that you give it. Its books are the journal.

    A `flaky-` card fails the first time. An `outage-` card fails until the provider is repaired.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._repaired = bool(journal.of("repaired"))

    def repair(self) -> None:
        self._repaired = True
        self._journal.add("repaired")

    async def charge(self, order: Any) -> None:
        with self._journal.alone():
            self._charge(order)

    def _charge(self, order: Any) -> None:
        journal = self._journal
        if order.id in journal.of("charged"):
            journal.add("asked-again", order.id)  # money moves once
            return
        first = order.id not in journal.of("declined")
        if not first:
            journal.add("retried", order.id)
        if order.payment.startswith("outage-") and not self._repaired:
            journal.add("declined", order.id)
            raise PaymentFailed("the bank behind this card does not answer")
        if order.payment.startswith("flaky-") and first:
            journal.add("declined", order.id)
            raise PaymentFailed("the line to the bank broke")
        journal.add("charged", order.id)
