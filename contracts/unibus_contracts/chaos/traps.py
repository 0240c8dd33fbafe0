"""What a worker does to itself when told: die at a chosen point of a message's way, block its event loop, have the wrong time.

The product knows nothing of it: the worker's own adapter and subscriptions are wrapped. An order is a file beside the history,
read when SIGUSR1 comes; what was done stands in a report, another file, so that it is still there when the process isn't.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from unibus import Bus, Delivery
from unibus.adapter import Adapter, Outcome, Outgoing, Results, Source, Subscription
from unibus.clock import SystemClock

Point = Literal["received", "handled", "copied"]

# received: deliveries have arrived, no handler has seen them. handled: handlers have succeeded, nothing is settled.
# copied: the copy of a retry or a dead letter is confirmed, its original isn't settled.
POINTS: tuple[Point, ...] = ("received", "handled", "copied")

_PATIENCE = 3.0  # seconds until a loop is blocked even though nothing has come
_BEAT = 0.02  # seconds until the event loop should have gone on


def order_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.order"


def report_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.report"


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, for whoever reads it at the same time."""
    draft = path.with_suffix(path.suffix + ".draft")
    draft.write_text(json.dumps(content))
    draft.replace(path)


class Traps:
    """Of one worker. `with traps.listening():` inside the event loop, then `set_into(bus)` once it is open.

    `flush`: called before it kills itself, so that the history says how far it had come.
    """

    def __init__(self, folder: Path, name: str, flush: Callable[[], None]) -> None:
        self._folder, self._name, self._flush = folder, name, flush
        self._point: Point | None = None
        self._offset = 0.0  # seconds by which the wall clock is wrong
        self._block = 0.0  # seconds to stand still when the next deliveries have come

    @contextmanager
    def listening(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        right = SystemClock.time
        # Before the bus is made: it takes its clock apart. The C library and the broker keep the right time.
        SystemClock.time = staticmethod(lambda: right() + self._offset)
        loop.add_signal_handler(signal.SIGUSR1, self._obey)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)
            SystemClock.time = staticmethod(right)

    def set_into(self, bus: Bus) -> None:
        """Wrap the adapter of an open bus; a new link uses the same one."""
        adapter: Any = bus.adapter
        adapter.send = partial(self._send, adapter, adapter.send)
        adapter.subscribe = partial(self._subscribe, adapter.subscribe)

    # Orders

    def _obey(self) -> None:
        order = json.loads(order_file(self._folder, self._name).read_text())
        self._point = order.get("die")
        self._offset = float(order.get("offset", 0.0))
        self._block = float(order.get("block", 0.0))
        if self._block:
            asyncio.get_running_loop().call_later(_PATIENCE, self._stand_still, 0)
        report = {"order": order["number"], "offset": SystemClock().time() - time.time()}
        write(report_file(self._folder, self._name), report)

    def _at(self, point: Point, where: object) -> None:
        if self._point == point:
            self._flush()
            write(report_file(self._folder, self._name), {"died": point, "where": str(where)})
            os.kill(os.getpid(), signal.SIGKILL)

    def _stand_still(self, held: int) -> None:
        """Nothing of this process's loop runs meanwhile. How late the loop was is measured, not assumed."""
        seconds, self._block = self._block, 0.0
        if not seconds:  # done already
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + _BEAT

        def late() -> None:
            write(report_file(self._folder, self._name), {"lag": loop.time() - due, "held": held})

        loop.call_at(due, late)
        time.sleep(seconds)

    # What is wrapped

    async def _send(self, adapter: Adapter, inner: Any, batch: Sequence[Outgoing], timeout: float) -> Results:
        results: Results = await inner(batch, timeout)
        for outgoing, error in zip(batch, results, strict=True):
            if outgoing.origin is not None and error is None:
                self._at("copied", outgoing.to)
        return results

    async def _subscribe(self, inner: Any, source: Source) -> Subscription:
        subscription: Any = await inner(source)
        # Its identity stays: adapters and intakes compare it.
        subscription.receive = partial(self._receive, subscription.receive, source)
        subscription.settle = partial(self._settle, subscription.settle, source)
        return subscription  # type: ignore[no-any-return]  # any adapter's

    async def _receive(self, inner: Any, source: Source, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        deliveries: Sequence[Delivery[Any]] = await inner(limit, timeout)
        if deliveries:
            self._at("received", source.address)
            self._stand_still(len(deliveries))
        return deliveries

    async def _settle(
        self, inner: Any, source: Source, outcome: Outcome, deliveries: Sequence[Delivery[Any]], **more: Any
    ) -> Results:
        if outcome is Outcome.ACCEPTED:
            self._at("handled", source.address)
        results: Results = await inner(outcome, deliveries, **more)
        return results
