"""Tests of a service without a broker: the same handlers, the memory adapter, and a clock that the test drives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

from unibus.adapter import Outgoing
from unibus.bus import Bus
from unibus.channel import Queue, Topic, dead_letter_queue, invalid_queue
from unibus.clock import VirtualClock
from unibus.codec import codec_for
from unibus.deadletter import readable
from unibus.memory_broker import MemoryBroker
from unibus.message import Message

CALM = 10  # turns of the loop without anything to do that count as idle
SPINS = 200  # turns before we believe that a handler waits for the real world
REAL_WAIT = 0.001  # seconds to leave to threads and files then, each turn
PATIENCE = 0.25  # seconds that `advance` leaves to busy handlers at its end
STUCK = 0.02  # seconds that `advance` leaves to a busy handler before time goes on


class Lab:
    """A running bus on its own memory broker. `bus`, `clock` and `broker` are there for what the methods don't cover."""

    def __init__(self, bus: Bus, clock: VirtualClock, broker: MemoryBroker) -> None:
        self.bus = bus
        self.clock = clock
        self.broker = broker
        self._sent: dict[Any, list[Message]] = {}
        broker.on_send = self._record

    def _record(self, outgoing: Outgoing) -> None:
        if outgoing.origin is None:  # copies by the policies are not what the service sent
            self._sent.setdefault(outgoing.to, []).append(outgoing.message)

    async def idle(self, timeout: float = 5.0) -> None:
        """Until nothing is left to do now: what waits for a later time doesn't count.

        Raises AssertionError after `timeout` real seconds (more on a busy machine), naming what is still going on.
        """
        if not await self._calm(timeout):
            raise AssertionError(f"still busy after {timeout:g} s: {self._what()}")

    async def advance(self, seconds: float) -> None:
        """Let time pass; what falls due happens in order, with the handlers in between.

        Returns once idle, or when only handlers that wait for something are left.
        """
        end = self.clock.monotonic() + seconds
        await self._calm(STUCK, wait=False)
        while (due := self.clock.next_due()) is not None and self.clock.monotonic() + due <= end:
            self.clock.move(due)
            await self._calm(STUCK, wait=False)
        self.clock.move(max(0.0, end - self.clock.monotonic()))
        await self._calm(PATIENCE)

    def sent(self, channel: Queue[Any] | Topic[Any] | str) -> list[Any]:
        """The bodies that were sent or published to a channel so far, decoded, in order. Retries are not among them."""
        known = self.bus._opened().channels.find(channel)
        codec = codec_for(known)
        return [readable(codec, message) for message in self._sent.get(known, [])]

    def dead_letters(self, channel: Queue[Any] | Topic[Any] | str, *, group: str | None = None) -> list[Message]:
        """The dead letters of a queue, or of one group of a topic, oldest first; bodies decoded where possible."""
        return self._waiting(channel, group, invalid=False)

    def invalid(self, channel: Queue[Any] | Topic[Any] | str, *, group: str | None = None) -> list[Message]:
        """The messages in the invalid-message channel of a queue or group, oldest first; bodies in bytes."""
        return self._waiting(channel, group, invalid=True)

    def _waiting(self, channel: Queue[Any] | Topic[Any] | str, group: str | None, *, invalid: bool) -> list[Message]:
        session = self.bus._opened()
        address = session.address(channel, group)
        codec = session.codec(channel)
        messages = self.broker.waiting(invalid_queue(address) if invalid else dead_letter_queue(address))
        for message in messages:
            message.body = readable(codec, message)
        return messages

    def _busy(self) -> bool:
        return self.bus._opened().busy() or self.broker.ready() > 0

    async def _calm(self, patience: float, *, wait: bool = True) -> bool:
        """Turn the loop until nothing happens any more. False when `patience`, seconds, is over.

        It is counted in turns, not by a clock: a process that got no processor for a while has had no time either.
        Without `wait`, handlers that wait for something don't count as happening, unless they run in threads.
        """
        calm = spins = 0
        while calm < CALM:
            spins += 1
            await asyncio.sleep(0 if spins < SPINS else REAL_WAIT)
            if not self._busy() or not (wait or self._moving()):
                calm += 1
                continue
            calm = 0
            if spins >= SPINS + patience / REAL_WAIT:
                return False
        return True

    def _moving(self) -> bool:
        """Is anything under way besides handlers that wait?"""
        session = self.bus._opened()
        return self.broker.ready() > 0 or session.moving()

    def _what(self) -> str:
        session = self.bus._opened()
        running = [f"{c.name} ({n} running)" for c in session.consumers if (n := c.running())]
        if running:
            return ", ".join(running) + "; advance() the clock if it waits for time to pass"
        return f"{self.broker.ready()} messages ready that nobody takes; is the prefetch full of parked ones?"


@asynccontextmanager
async def in_memory(bus: Bus, *, profile: str | None = None) -> AsyncIterator[Lab]:
    """Run `bus` on a memory broker of its own, with virtual time. The environment is not read; unibus.toml is, its URL isn't.

    `profile`: the broker to imitate, by the name that it has in unibus.toml. Its settings there count, and what it can't do or
    carry is refused as its adapter would: Unsupported, ConfigError, MessageTooLarge. Afterwards the bus is as it was.
    """
    clock = VirtualClock()
    before = bus._clock, bus._environ
    url = "memory://" if profile is None else f"memory://?profile={quote(profile, safe='')}"
    bus._clock, bus._environ = clock, {"UNIBUS_URL": url}
    try:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(bus.running())
            broker = bus.native
            assert isinstance(broker, MemoryBroker)  # noqa: S101  # memory:// has no other
            try:
                yield Lab(bus, clock, broker)
            finally:
                # A drain has deadlines too: from here on time passes by itself.
                passing = asyncio.create_task(_pass_time(clock))
                try:
                    await stack.aclose()
                finally:
                    passing.cancel()
                    await asyncio.wait([passing])
    finally:
        bus._clock, bus._environ = before


async def _pass_time(clock: VirtualClock) -> None:
    while True:
        await asyncio.sleep(REAL_WAIT)
        for _ in range(2 * CALM):  # what fell due has its effects before the next thing does, on a busy machine too
            await asyncio.sleep(0)
        clock.move(clock.next_due() or 0.0)
