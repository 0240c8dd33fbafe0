"""A received message, and the right to settle it."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from unibus.message import Message
from unibus.retry import ACK, RELEASE, DeadLetter, Discard, Retry, Verdict

if TYPE_CHECKING:
    from unibus.adapter import Source

T = TypeVar("T")


class Settler(Protocol):
    """The part of the core that carries out the fate of a delivery."""

    async def settle(self, delivery: Delivery[Any], verdict: Verdict) -> None: ...

    def judge(self, delivery: Delivery[Any], error: BaseException | None) -> Verdict: ...


class Delivery(Generic[T]):
    """A received message with its attempt number, and the right to settle it.

    Set by the driver: `message`; `source`; `failures` (what the driver knows beyond the header `x-retry-count`, usually 0;
    the core adds the header); `deliveries` (how often the broker handed it out, None where it doesn't count);
    `lease_until` (monotonic seconds, None where deliveries don't expire); `lost` (set once it is no longer ours);
    `token` (the driver's own handle); `native` (the client's object); `position` (where it was, for people; None: as
    `native.position` says, which is asked when somebody asks).

    For users: `body` (decoded), `attempt` (1 on the first run), and one verb for each fate. A handler that settles its
    delivery itself has decided; what it raises afterwards is only logged. Used as `async with delivery:` it is acked at
    the end, and an exception goes to the retry policy.
    """

    __slots__ = (
        "_position",
        "body",
        "deliveries",
        "failures",
        "lease_until",
        "lost",
        "message",
        "native",
        "settled",
        "settler",
        "source",
        "token",
    )

    body: T
    settler: Settler

    def __init__(
        self,
        message: Message,
        source: Source,
        token: Any,
        failures: int = 0,
        deliveries: int | None = None,
        lease_until: float | None = None,
        native: object = None,
        position: str | None = "",
    ) -> None:
        self.message = message
        self.source = source
        self.token = token
        self.failures = failures
        self.deliveries = deliveries
        self.lease_until = lease_until
        self.native = native
        self._position = position
        self.lost = False
        self.settled = False

    @property
    def attempt(self) -> int:
        return self.failures + 1

    @property
    def position(self) -> str:
        if self._position is None:
            native: Any = self.native
            self._position = str(native.position)
        return self._position

    @position.setter
    def position(self, where: str) -> None:
        self._position = where

    async def ack(self) -> None:
        """The message is done; returns once the broker has been told. Raises LeaseLost if it is no longer ours."""
        await self.settler.settle(self, ACK)

    async def retry(self, reason: str = "", *, delay: float | None = None) -> None:
        """A failed attempt: again after `delay` seconds (default: the policy's), or a dead letter when none is left."""
        await self.settler.settle(self, self.settler.judge(self, Retry(reason, delay=delay)))

    async def dead_letter(self, reason: str = "") -> None:
        """To the dead-letter channel now."""
        await self.settler.settle(self, self.settler.judge(self, DeadLetter(reason)))

    async def discard(self, reason: str = "") -> None:
        """Counted and logged, then gone."""
        await self.settler.settle(self, self.settler.judge(self, Discard(reason)))

    async def release(self) -> None:
        """Give the message back; it does not count as an attempt."""
        await self.settler.settle(self, RELEASE)

    async def __aenter__(self) -> Delivery[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Settle by what happened. An Exception is taken by the policy and does not go on; cancellation does."""
        if not self.settled:
            await self.settler.settle(self, self.settler.judge(self, error))
        return error is None or isinstance(error, Exception)

    def __repr__(self) -> str:
        return f"<Delivery {self.message.id} attempt {self.attempt} of {self.source.address!r}>"
