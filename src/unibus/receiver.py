"""Receiving by hand: an iterator over deliveries that the user settles."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from unibus import retry
from unibus.channel import Queue, Topic
from unibus.clock import within
from unibus.delivery import Delivery
from unibus.errors import Closed, CodecError
from unibus.intake import Intake
from unibus.retry import Action, Verdict
from unibus.session import Session


class Receiver:
    """Deliveries of one queue or group, decoded, one after the other. What can't be decoded goes to the invalid-message
    channel and is not shown. At the end, what was not settled goes back, uncounted.
    """

    def __init__(
        self, session: Session, channel: Queue[Any] | Topic[Any] | str, group: str | None, prefetch: int
    ) -> None:
        self._session = session
        self._address = session.address(channel, group)
        self._decode = session.codec(channel).decode
        self._prefetch = prefetch
        self._intake: Intake | None = None

    async def __aenter__(self) -> Self:
        self._intake = self._session.intake(self._address, self._prefetch)
        self._intake.begin()
        try:
            await self._session.started([self._intake])
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            await self._session.end(intake)

    def __aiter__(self) -> Receiver:
        return self

    async def __anext__(self) -> Delivery[Any]:
        """Ends when the receiver or its bus is closed."""
        try:
            return await self._next()
        except Closed:
            raise StopAsyncIteration from None

    async def receive(self, timeout: float | None = None) -> Delivery[Any] | None:
        """The next delivery; None after `timeout` seconds (None: wait for ever). Raises Closed."""
        if timeout is None:
            return await self._next()
        try:
            return await within(self._session.kit.clock, timeout, self._next())
        except TimeoutError:
            return None

    async def _next(self) -> Delivery[Any]:
        while True:
            intake = self._intake
            if intake is None:
                raise Closed("the receiver is closed; use `async with bus.receiver(...)`")
            try:
                delivery = intake.take()
            except IndexError:
                await intake.wait()
                continue
            message = delivery.message
            try:
                delivery.body = self._decode(message.body, message.content_type)
            except CodecError as error:
                intake.finish(delivery, Verdict(Action.INVALID, reason=retry.UNDECODABLE, error=error))
            else:
                return delivery
