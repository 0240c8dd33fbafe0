"""Where held deliveries wait: ready to be handed out, behind another one of their key, or parked until their time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import Any

from unibus.clock import Timer
from unibus.delivery import Delivery
from unibus.errors import UnibusError


class Lanes:
    """The waiting deliveries of one intake.

    With `ordered` there is a lane for each key: its first delivery is under way (ready, running, parked, or being moved),
    the others wait until `next_of_key` says that it is through.
    """

    def __init__(self, *, ordered: bool) -> None:
        self.ready: deque[Delivery[Any]] = deque()
        self.parked: dict[Delivery[Any], Timer] = {}
        self.over: UnibusError | None = None  # why nothing more will come
        self._ordered = ordered
        self._lanes: dict[str, deque[Delivery[Any]]] = {}
        self._takers: deque[asyncio.Future[None]] = deque()
        self._woken = False  # a taker is on its way

    def enqueue(self, delivery: Delivery[Any]) -> None:
        """A new one: behind those of its key, where order matters."""
        key = delivery.message.key
        if self._ordered and key is not None:
            lane = self._lanes.get(key)
            if lane is not None:
                lane.append(delivery)
                return
            self._lanes[key] = deque((delivery,))
        self.offer(delivery)

    def offer(self, delivery: Delivery[Any]) -> None:
        """To be handed out now."""
        self.ready.append(delivery)
        self.wake()

    def wake(self) -> None:
        """Something is ready: wake one taker. It wakes the next if it leaves something, so a fast handler wakes few in vain."""
        if self._takers and not self._woken:
            self._wake_one()

    def _wake_one(self) -> None:
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
                self._woken = True
                return

    async def wait(self, *, for_ever: bool) -> None:
        """Until something may be ready; several may wait. At the end: the reason is raised, unless `for_ever`."""
        if self.ready:
            return
        if self.over is not None and not for_ever:
            raise self.over.with_traceback(None)
        taker = asyncio.get_running_loop().create_future()
        self._takers.append(taker)
        try:
            await taker
        except asyncio.CancelledError:
            if taker.done() and not taker.cancelled():
                self._woken = False
                if self.ready:
                    self._wake_one()  # it was meant for us: pass it on
            elif taker in self._takers:
                self._takers.remove(taker)
            raise
        self._woken = False

    def take(self) -> Delivery[Any]:
        """The next one. Raises IndexError when none is ready."""
        delivery = self.ready.popleft()
        if self.ready and self._takers and not self._woken:
            self._wake_one()
        return delivery

    def next_of_key(self, delivery: Delivery[Any]) -> None:
        """`delivery` is through. If its key waited for it (an expired one never stood in its lane), the next one goes."""
        key = delivery.message.key
        if key is None or not (lane := self._lanes.get(key)) or lane[0] is not delivery:
            return
        lane.popleft()
        if lane:
            self.offer(lane[0])
        else:
            del self._lanes[key]

    def take_behind(self, delivery: Delivery[Any]) -> list[Delivery[Any]]:
        """Those that wait behind the first of their key; its lane is gone afterwards."""
        key = delivery.message.key
        if key is None or not (lane := self._lanes.get(key)) or lane[0] is not delivery:
            return []
        del self._lanes[key]
        return list(islice(lane, 1, None))

    def behind(self) -> Iterable[Delivery[Any]]:
        """All that wait behind another one."""
        return (delivery for lane in self._lanes.values() for delivery in islice(lane, 1, None))

    def __bool__(self) -> bool:
        """Is anything here, or expected to come back?"""
        return bool(self.ready or self._lanes)

    def empty(self, under_way: set[Delivery[Any]]) -> list[Delivery[Any]]:
        """Take all that waits. The lane of a key that one of `under_way` heads stays: its key is still taken."""
        for timer in self.parked.values():
            timer.cancel()
        waiting = [*self.ready, *self.parked, *self.behind()]
        self.ready.clear()
        self.parked.clear()
        self._lanes = {key: deque((lane[0],)) for key, lane in self._lanes.items() if lane[0] in under_way}
        return waiting

    def remove(self, losing: set[Delivery[Any]]) -> set[Delivery[Any]]:
        """Take out those of `losing` that wait. All others stay where they are, parked ones too."""
        gone = losing.intersection((*self.ready, *self.parked, *self.behind()))
        left = [delivery for delivery in self.ready if delivery not in gone]
        self.ready.clear()
        self.ready.extend(left)
        for delivery in gone:
            if (timer := self.parked.pop(delivery, None)) is not None:
                timer.cancel()
        for key, lane in list(self._lanes.items()):
            if not gone.intersection(lane):
                continue
            head = lane[0]
            stays = deque(delivery for delivery in lane if delivery not in gone)
            if not stays:
                del self._lanes[key]
                continue
            self._lanes[key] = stays
            if stays[0] is not head:
                self.offer(stays[0])
        return gone

    def end(self, why: UnibusError) -> None:
        """Nothing more will come: tell all who wait."""
        self.over = why
        while self._takers:
            self._wake_one()
