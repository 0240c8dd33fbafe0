"""A store in this process' memory: for tests, and for what one process does alone. It forgets all at its end."""

from __future__ import annotations

from collections.abc import Sequence

from unibus.clock import Clock, SystemClock
from unibus.idempotency import KEEP, LEASE, Key, Standing
from unibus.stores.checks import seconds


class MemoryStore:
    """Remembers in memory, in the time of the bus that uses it: virtual time in tests.

    `lease`, `keep`: seconds, see `unibus.stores.Store`. It grows with what is handled in `keep` seconds.
    """

    def __init__(self, *, lease: float = LEASE, keep: float = KEEP) -> None:
        seconds("MemoryStore", lease=lease, keep=keep)
        self.lease = lease
        self.keep = keep
        self._clock: Clock = SystemClock()
        self._taken: dict[Key, tuple[str, float]] = {}  # token, and when its lease ends
        self._done: dict[Key, float] = {}  # until when it is kept, in that order

    def __repr__(self) -> str:
        return "MemoryStore()"

    def open(self, clock: Clock) -> None:
        self._clock = clock

    async def create(self) -> None:
        """There is nothing to make."""

    async def verify(self) -> None:
        """There is nothing to miss."""

    async def begin(self, key: Key, token: str) -> Standing:
        now = self._clock.time()
        if self._done.get(key, now) > now:
            return Standing.DONE
        owner, until = self._taken.get(key, (token, now))
        if owner != token and until > now:
            return Standing.TAKEN
        self._taken[key] = (token, now + self.lease)
        return Standing.OURS

    async def renew(self, keys: Sequence[Key], token: str) -> Sequence[bool]:
        until = self._clock.time() + self.lease
        results = [self._owner(key) == token for key in keys]
        self._taken.update((key, (token, until)) for key, ours in zip(keys, results, strict=True) if ours)
        return results

    async def finish(self, key: Key, token: str) -> bool:
        now = self._clock.time()
        if self._owner(key) not in {token, None} or self._done.get(key, now) > now:
            return False
        self._taken.pop(key, None)
        self._done.pop(key, None)  # so that it goes to the end
        self._done[key] = now + self.keep
        return True

    async def free(self, key: Key, token: str) -> None:
        if self._owner(key) == token:
            del self._taken[key]

    async def tidy(self) -> None:
        now = self._clock.time()
        while self._done:
            oldest = next(iter(self._done))
            if self._done[oldest] > now:
                break
            del self._done[oldest]
        for key in [key for key, (_, until) in self._taken.items() if until <= now]:
            del self._taken[key]

    async def close(self) -> None:
        """What it remembers stays, for the next bus that uses it."""

    def _owner(self, key: Key) -> str | None:
        return self._taken.get(key, (None, 0.0))[0]
