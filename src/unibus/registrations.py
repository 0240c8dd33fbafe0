"""What decorators record: which function handles what. Nothing is looked at before the bus starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from unibus.adapter import Start
from unibus.channel import Queue, Topic
from unibus.errors import ConfigError
from unibus.handlers import Kind
from unibus.idempotency import Store
from unibus.retry import RetryPolicy

if TYPE_CHECKING:
    from unibus.bus import Bus

Function = TypeVar("Function", bound=Callable[..., Any])
Guarantee = Literal["at-least-once", "at-most-once"]
OnLeaseLost = Literal["mark", "cancel"]


@dataclass(frozen=True, slots=True)
class Registration:
    """One decorated function. `options` holds what the decorator was given, and nothing it was not."""

    kind: Kind
    channel: Queue[Any] | Topic[Any] | str
    function: Callable[..., Any]
    options: dict[str, Any]
    group: str | None = None  # None: the service's name
    broadcast: bool = False
    start: Start = "new"
    batch: int = 0
    idempotency: Store | None = None

    def __str__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        return f"{self.kind} {name}"


class Handlers:
    """Handlers for a bus, collected in a module of their own; `bus.include(handlers)` takes them in.

    The decorators return the function as it was: it stays callable, and testable without a bus.
    """

    def __init__(self) -> None:
        self.registrations: list[Registration] = []
        self._bus: Bus | None = None

    @property
    def bus(self) -> Bus:
        """The bus that these handlers were included in, for sending from them. Raises ConfigError before that."""
        if self._bus is None:
            raise ConfigError("these handlers belong to no bus yet; bus.include(handlers) comes first")
        return self._bus

    def consumer(
        self,
        queue: Queue[Any] | str,
        *,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        guarantee: Guarantee | None = None,
        on_lease_lost: OnLeaseLost | None = None,
        idempotency: Store | None = None,
        batch: int = 0,
    ) -> Callable[[Function], Function]:
        """Handle the messages of a queue; all its consumers, in all processes, compete.

        `concurrency`: handlers at once in this process (10). `prefetch`: messages held (twice that). `timeout`: seconds a
        handler may run (900; 0: no limit). `batch=n`: the handler takes a list of up to n bodies, settled one by one.
        `on_lease_lost`: when the message is no longer ours while its handler runs, and so is handled again, "mark" sets
        `delivery.lost` and lets it finish; "cancel" also cancels the handler, which is refused for a plain function.
        `idempotency`: a store of `unibus.stores`, which makes the handler effectively once.
        """
        options = _given(
            concurrency=concurrency,
            prefetch=prefetch,
            timeout=timeout,
            retry=retry,
            guarantee=guarantee,
            on_lease_lost=on_lease_lost,
        )
        return self._register("consumer", queue, options, batch=batch, idempotency=idempotency)

    def subscriber(
        self,
        topic: Topic[Any] | str,
        *,
        group: str | None = None,
        start: Literal["new", "all"] | datetime | float | Sequence[str] = "new",
        broadcast: bool = False,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        guarantee: Guarantee | None = None,
        on_lease_lost: OnLeaseLost | None = None,
        idempotency: Store | None = None,
        batch: int = 0,
    ) -> Callable[[Function], Function]:
        """Handle the messages of a topic, as a member of `group` (default: the service's name).

        Each group gets every message that is published after the group was declared; members of a group compete.
        `start`: where a group begins that is made now; one that is there goes on where it was. "all": with what the broker
        still has; a datetime with its time zone, or seconds since the epoch: with what was published since then; a list of
        positions (`Delivery.position`): with these messages in their parts of the topic, "new" in all others.
        `broadcast`: no group; each process gets every message while it runs, and keeps no backlog and no dead letters.
        `idempotency`: a store of `unibus.stores`, which makes the handler effectively once.
        """
        begin = _start(start, f"subscriber of {topic}")
        if broadcast and group is not None:
            raise ConfigError(f"subscriber of {topic}: broadcast=True has no group; drop group={group!r}")
        if broadcast and begin != "new":
            raise ConfigError(f"subscriber of {topic}: broadcast=True keeps no backlog; drop start, or name a group")
        options = _given(
            concurrency=concurrency,
            prefetch=prefetch,
            timeout=timeout,
            retry=retry,
            guarantee=guarantee,
            on_lease_lost=on_lease_lost,
        )
        more = {"group": group, "broadcast": broadcast, "start": begin, "batch": batch, "idempotency": idempotency}
        return self._register("subscriber", topic, options, **more)

    def responder(
        self,
        queue: Queue[Any] | str,
        *,
        concurrency: int | None = None,
        prefetch: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        on_lease_lost: OnLeaseLost | None = None,
        idempotency: None = None,
    ) -> Callable[[Function], Function]:
        """Answer the requests of a queue with what the function returns.

        An exception is answered at once, as RemoteError. With `retry` the request is tried again first, as long as its
        requester still waits. `idempotency`: refused at start, since a request that comes again needs its answer again.
        """
        options = _given(
            concurrency=concurrency, prefetch=prefetch, timeout=timeout, retry=retry, on_lease_lost=on_lease_lost
        )
        return self._register("responder", queue, options, idempotency=idempotency)

    def _register(
        self, kind: Kind, channel: Queue[Any] | Topic[Any] | str, options: dict[str, Any], **more: Any
    ) -> Callable[[Function], Function]:
        given: object = channel
        if not isinstance(given, Queue | Topic | str):
            raise ConfigError(f"@{kind} takes a queue or topic, or its name: @bus.{kind}(orders), not {given!r}")
        policy: object = options.get("retry")
        if policy is not None and not isinstance(policy, RetryPolicy):
            raise ConfigError(f"{kind} of {channel}: retry={policy!r}; use RetryPolicy(max_retries=...)")

        def register(function: Function) -> Function:
            self.registrations.append(Registration(kind, channel, function, options, **more))
            return function

        return register


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _start(given: object, where: str) -> Start:
    match given:
        case "new" | "all":
            return given
        case datetime() if given.tzinfo is not None:
            return given.timestamp()
        case int() | float() if not isinstance(given, bool) and isfinite(given) and given >= 0:
            return float(given)
        case list() | tuple() if given and all(isinstance(position, str) for position in given):
            return tuple(given)
    raise ConfigError(
        f'{where}: start={given!r}; use "new", "all", a datetime with a time zone, seconds since the epoch, or a list of '
        "positions"
    )
