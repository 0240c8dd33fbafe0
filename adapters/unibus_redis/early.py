"""Receiving also what waits for its time: for `unibus move`.

A message stays in the delayed set until it is accepted, so nothing is lost with the process. While it is held its time is put
off to the end of the lease, if that is later; given back, it is what it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from unibus.adapter import Outcome, Results
from unibus.delivery import Delivery
from unibus.driver import lease_lost
from unibus.errors import TransportError
from unibus_redis import scripts
from unibus_redis.subscription import RedisSubscription
from unibus_redis.wire import Entry

_PAGE = 200


class Waiting(Entry):
    """In the delayed set. `due`: its score, in ms."""

    __slots__ = ("due", "member")

    def __init__(self, key: str, raw: list[Any], until: float, member: bytes, due: float) -> None:
        super().__init__(key, raw, 1, until)
        self.member = member
        self.due = due


class Early(RedisSubscription):
    """What may be received now comes first, in its order. A delayed message to a topic stays: it is nobody's yet."""

    _unseen: list[bytes] | None = None  # of the delayed set, name and score in turn

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        found = await super().receive(limit, timeout)
        room = min(limit, _PAGE, self.source.prefetch - len(self._held))
        if found or room <= 0 or self._inflow.stopped:
            return found
        if self._unseen is None:
            self._unseen = await self._link.call("ZRANGE", self._place.delayed[0], 0, -1, "WITHSCORES")
        early: list[Delivery[Any]] = []
        while self._unseen and not early:
            page, self._unseen = self._unseen[: 2 * room], self._unseen[2 * room :]
            early = await self._look(page)
        return early

    async def _look(self, page: list[bytes]) -> list[Delivery[Any]]:
        due = dict(zip(page[::2], map(float, page[1::2]), strict=True))
        lease = round(self._adapter.settings.lease * 1000)
        found = await self._early("1", lease, [*due])
        until, now = self._clock.monotonic() + self._adapter.settings.lease, self._clock.time()
        early = []
        for member, words in zip(found[::2], found[1::2], strict=True):
            key, fields = words[0].decode(), words[words.index(b"*") + 1 :]
            if key in self._place.streams and key not in self._shared:
                token = Waiting(key, [b"%d-0" % (now * 1000), fields], until, member, due[member])
                delivery = self._deliver(token)
                delivery.message.delay = max(0.0, due[member] / 1000 - now)
                early.append(delivery)
        return early

    async def _early(self, act: str, lease: int, members: Sequence[Any]) -> Any:
        """See `scripts.EARLY`."""
        return await self._link.script(
            scripts.EARLY, self._place.delayed, (act, lease, *members), f"look at {self.address}"
        )

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if not any(isinstance(delivery.token, Waiting) for delivery in deliveries):
            return await super().settle(outcome, deliveries, delays=delays)

        async def plain(indices: list[int]) -> Results:
            waits = [delays[i] for i in indices] if delays else ()
            return await super(Early, self).settle(outcome, [deliveries[i] for i in indices], delays=waits)

        async def waiting(token: Waiting) -> bool:
            if self._held.pop(token, None) is None:
                return False
            if outcome is Outcome.ACCEPTED:
                return bool(await self._early("0", 0, [token.member]))
            await self._link.call("ZADD", self._place.delayed[0], "XX", token.due, token.member)
            return True

        return await self._both(deliveries, plain, waiting)

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        async def plain(indices: list[int]) -> Results:
            return await super(Early, self).extend([deliveries[i] for i in indices], seconds)

        async def waiting(token: Waiting) -> bool:
            token.until = self._clock.monotonic() + self._adapter.settings.lease
            return bool(await self._early("1", round(self._adapter.settings.lease * 1000), [token.member]))

        results = await self._both(deliveries, plain, waiting)
        for delivery, error in zip(deliveries, results, strict=True):
            if error is None and isinstance(delivery.token, Waiting):
                delivery.lease_until = delivery.token.until
        return results

    async def _both(
        self,
        deliveries: Sequence[Delivery[Any]],
        plain: Callable[[list[int]], Awaitable[Results]],
        waiting: Callable[[Waiting], Awaitable[bool]],
    ) -> list[TransportError | None]:
        """The results of those from a stream, and of those that wait, side by side."""
        results: list[TransportError | None] = [None] * len(deliveries)
        early = [i for i, delivery in enumerate(deliveries) if isinstance(delivery.token, Waiting)]
        if rest := [i for i in range(len(deliveries)) if i not in set(early)]:
            for i, error in zip(rest, await plain(rest), strict=True):
                results[i] = error
        answers = await asyncio.gather(*(waiting(deliveries[i].token) for i in early))
        for i, ours in zip(early, answers, strict=True):
            results[i] = None if ours else lease_lost(deliveries[i], "it has fallen due meanwhile")
        return results
