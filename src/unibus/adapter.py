"""The SPI: what an adapter implements. Lists in, one result per message out.

An adapter owns the link, the wire mapping, native batching limits, confirms and error translation. It never retries,
sleeps for back-off, logs payloads, reads the environment, spawns handler tasks or decides the fate of a message. A line
that two adapters share is a missing function of the core.

Rules
-----
- All methods may run concurrently. `asyncio.CancelledError` is never mapped to another error, and raised only where the
  caller was cancelled: for a client library that cancels its own calls there is `waiting.answered`.
- `send` and `settle` return one result per message, in order: None, or the TransportError of that message. They raise
  only when the link itself is gone (ConnectionLost), for all messages alike.
- `receive` is called only when there is room, and may be cancelled: what had arrived comes with the next call or goes
  back at `stop`. On brokers with leases nothing stays in a buffer of the driver.
- `stop`: take no more, hand back what was not given out; settle and extend still work. `close` afterwards; it gives
  back what is still held. Then `receive` raises, and `check` says `gone`.
- `Source.losing(deliveries, grace)` is awaited before a driver gives deliveries up, with grace 0 when they are gone
  already. Afterwards the driver marks the rest `lost`; settling those returns LeaseLost.
- Objects that belong to one process (inboxes, ephemeral groups) are made by `subscribe`, under every declare mode.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

from unibus.capabilities import Capabilities
from unibus.channel import Address, Group, Inbox, Queue, Topic
from unibus.clock import Clock
from unibus.delivery import Delivery
from unibus.errors import TransportError, UnknownChannel, Unsupported
from unibus.message import Message

Results = Sequence[TransportError | None]
Start = Literal["new", "all"] | float | tuple[str, ...]  # seconds since the epoch; or positions, as Delivery.position
DeclareMode = Literal["create", "verify", "assume"]


class Outcome(Enum):
    """How a delivery is settled (the AMQP 1.0 outcomes that every broker has in some form)."""

    ACCEPTED = "accepted"  # done: it leaves the queue
    RELEASED = "released"  # given back: it will be delivered again, here or elsewhere


@dataclass(slots=True)
class Outgoing:
    """One message on its way out.

    `not_before` (epoch seconds): not to be delivered earlier; rounded up to what the broker can do, never down.
    `origin`: the delivery that this is a copy of; the driver also copies native headers that the envelope can't hold.
    `mark`: the driver's own; it is still there when the same message is sent again after an outcome that is unknown.
    """

    to: Address
    message: Message
    not_before: float | None = None
    origin: Delivery[Any] | None = None
    mark: object = None


@dataclass(slots=True)
class Move:
    """Settle one delivery and send n messages in one step."""

    delivery: Delivery[Any]
    sends: Sequence[Outgoing]


Losing = Callable[[Sequence[Delivery[Any]], float], Awaitable[None]]


async def _nothing_to_lose(_deliveries: Sequence[Delivery[Any]], _grace: float) -> None:
    return None


@dataclass(slots=True, eq=False)
class Source:
    """What to receive. `prefetch`: the most deliveries held at once. `browse`: look without settling.

    `early`: also what is not due yet, as far as it can be taken; `Message.delay` of such a delivery is the rest of its
    wait, in seconds. However it goes back, by a crash too, it is not delivered before it is due, but to another `early`
    source. `subscribe` raises Unsupported where the driver can't do that.
    """

    address: Queue[Any] | Group | Inbox
    prefetch: int = 20
    ordered: bool = False
    start: Start = "new"
    browse: bool = False
    losing: Losing = _nothing_to_lose
    early: bool = False


@dataclass(frozen=True, slots=True)
class Backlog:
    """How much waits: `ready` to be received, `in_flight` with consumers, `oldest` waiting, seconds. None: unknown.

    `delayed`: what waits for its time, retries among it; None also where it waits in places that all channels share.
    """

    ready: int
    in_flight: int | None = None
    oldest: float | None = None
    exact: bool = True
    delayed: int | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Of the link: is it up, and does the broker take messages? `blocked` says why not.

    `mends`: while it is not up the client itself tries to come back; a new `connect` would only throw away what it holds.
    """

    up: bool
    blocked: str | None = None
    mends: bool = False


Standing = Literal["consuming", "standby", "gone"]


@dataclass(frozen=True, slots=True)
class Declared:
    """One channel of a topology. `name` is what the adapter maps to its alphabet: prefix and overrides applied."""

    address: Queue[Any] | Topic[Any] | Group
    name: str
    role: Literal["channel", "dead letter", "invalid"] = "channel"
    options: Mapping[str, object] = field(default_factory=dict)  # its section of this broker in unibus.toml
    start: Start = "new"  # of a group that is made now


@dataclass(frozen=True, slots=True)
class Topology:
    """All that a bus will ever need on the broker: finite and known at start. A topic stands before its groups."""

    mode: DeclareMode = "create"
    channels: tuple[Declared, ...] = ()
    delays: tuple[float, ...] = ()  # waits to keep ready, seconds, ascending

    def find(self, address: Address) -> Declared:
        """The declaration of `address`; raises UnknownChannel."""
        for declared in self.channels:
            if declared.address == address:
                return declared
        raise UnknownChannel(getattr(address, "name", str(address)), tuple(d.address.name for d in self.channels))


@dataclass(frozen=True, slots=True)
class Inspected:
    """One object on the broker that a topology needs. `exists` None: the broker can't tell.

    `rights`: what its user needs to make it, in the broker's own words; "" where `declare` doesn't make it. `address`: whose it is, None where many share
    it. `messages`: how many wait in what is shared. `risk`: a setting found on it that can lose messages.
    """

    kind: str
    name: str
    exists: bool | None
    rights: str = ""
    address: Address | None = None
    messages: int | None = None
    risk: str = ""


@dataclass(frozen=True, slots=True)
class Secret:
    """A password: `value` has it, every other way to print it does not."""

    value: str = field(repr=False)

    def __str__(self) -> str:
        return "****"


@dataclass(frozen=True, slots=True)
class Url:
    """A broker's address. Several hosts are tried in turn. `query` are driver settings given in the URL."""

    scheme: str
    hosts: tuple[tuple[str, int | None], ...] = ()
    path: str = ""  # without the leading slash, percent-decoded
    username: str | None = None
    password: Secret | None = None
    query: Mapping[str, str] = field(default_factory=dict)

    def targets(self, port: int) -> tuple[tuple[str, int], ...]:
        """Host and port of each to try, in this order. `port`: where none is given; without a host, this machine."""
        return tuple((host, given or port) for host, given in self.hosts or (("localhost", None),))

    def __str__(self) -> str:
        """For people: no credential, no query."""
        hosts = ",".join(f"{f'[{h}]' if ':' in h else h}{f':{p}' if p else ''}" for h, p in self.hosts)
        return f"{self.scheme}://{hosts}{f'/{self.path}' if self.path else ''}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """All that an adapter is made from. `settings` is the broker's own table, URL query included; the driver checks it."""

    url: Url
    service: str
    instance: str  # unique for each bus of each process
    clock: Clock
    prefix: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)


class Subscription(Protocol):
    """One place to receive from. `address` of an Inbox is the one that goes into `reply_to`."""

    @property
    def address(self) -> Address: ...

    async def receive(self, limit: int, timeout: float) -> Sequence[Delivery[Any]]:
        """1 to `limit` deliveries, or none after `timeout` seconds. Raises ConnectionLost or NotFound when it is over."""
        ...

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        """Settle; `delays` runs parallel to `deliveries` (RELEASED only). LeaseLost for what is no longer ours."""
        ...

    async def move(self, moves: Sequence[Move], timeout: float) -> Sequence[TransportError | Unsupported | None]:
        """All or nothing for each move. Only where `atomic_move` is declared; Unsupported for one pair is legal."""
        ...

    async def extend(self, deliveries: Sequence[Delivery[Any]], seconds: float) -> Results:
        """Keep these for `seconds` from now. Only where `lease` is declared."""
        ...

    async def check(self) -> Standing:
        """`standby`: healthy, and another member has the work. `gone`: it will never receive again."""
        ...

    async def stop(self) -> None: ...

    async def close(self) -> None: ...


class Adapter(Protocol):
    """One link to one broker. Made from an `Endpoint`; making it does no I/O."""

    @property
    def capabilities(self) -> Capabilities:
        """Before `connect`: of the newest known server. Afterwards: of the server that answered."""
        ...

    @property
    def native(self) -> object:
        """The client itself, for what unibus does not cover."""
        ...

    async def connect(self) -> None:
        """Raises ConnectionLost, AuthenticationFailed, PermissionDenied, ConfigError."""
        ...

    async def close(self) -> None:
        """Idempotent; works in every state."""
        ...

    async def declare(self, topology: Topology) -> None:
        """Make ready. create: make what is missing, log each. verify: one NotFound that lists all that is missing.

        assume: believe. Never alters, never deletes. Addresses are only known to the adapter after this call.
        """
        ...

    async def inspect(self, topology: Topology) -> Sequence[Inspected]:
        """All objects that `declare` would make, whether they are there or not, in that order. Changes nothing.

        The server itself may be one of them, for its risks. Raises ConfigError as `declare` does.
        """
        ...

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        """Confirmed: None means that the broker has it. What is undecided after `timeout` seconds is a Timeout.

        Messages are put on the wire in the order given. Unroutable: to a Topic it says that there is no group.
        """
        ...

    async def subscribe(self, source: Source) -> Subscription:
        """Returns when a message sent from now on would arrive."""
        ...

    async def backlog(self, address: Queue[Any] | Group) -> Backlog: ...

    async def check(self) -> Health: ...

    def reply_to(self, text: str) -> Address:
        """The address behind a `reply_to`. The text is untrusted: raises Refused unless it can only be an inbox."""
        ...


AdapterFactory = Callable[[Endpoint], Adapter]


def _no_refusal(_outgoing: Outgoing) -> TransportError | None:
    return None


@dataclass(frozen=True, slots=True)
class Profile:
    """What an adapter says without a broker, for `memory://?profile=` and plans.

    `capabilities`: with the settings of the endpoint. `plan`: raises what `declare` would raise before it asks the broker.
    `refusal`: what `send` would answer without asking. `versions`: of the server, from which on the answers are others, the oldest first;
    the last one counts where none is named. Empty: they depend on none.
    """

    capabilities: Capabilities
    plan: Callable[[Topology], object]
    refusal: Callable[[Outgoing], TransportError | None] = _no_refusal
    versions: tuple[str, ...] = ()


ProfileFactory = Callable[[Endpoint, str | None], Profile]  # the second: of this version, None for the newest
