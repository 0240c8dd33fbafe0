"""What an adapter can do, as data: read at start, by `settlement`, and by the contract suite."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from unibus.errors import ConfigError

Level = Literal["native", "emulated", "refused"]


@dataclass(frozen=True, slots=True)
class Support:
    """How one feature is had. `how` says how it is emulated or why it is refused; `limit` is its bound, if any."""

    level: Level
    how: str = ""
    limit: float | None = None

    def __bool__(self) -> bool:
        return self.level != "refused"


def native(how: str = "", limit: float | None = None) -> Support:
    return Support("native", how, limit)


def emulated(how: str, limit: float | None = None) -> Support:
    return Support("emulated", how, limit)


def refused(why: str) -> Support:
    return Support("refused", why)


_PLAIN: dict[str, type | tuple[type, ...]] = {"str": str, "bool": bool, "int": int, "float": (int, float)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The facts of one adapter on one server version.

    Features are `Support` values. Times are seconds, sizes bytes; None means no bound that matters.
    """

    adapter: str
    version: str | None = None

    order: Support  # by key, over competing consumers
    delay: Support  # not_before on a send or retry; limit: the longest delay, seconds
    priority: Support  # limit: number of levels
    replay: Support  # a group may start at "all" or at a time
    browse: Support  # look without settling
    reply: Support  # an inbox per process
    release: Support  # give a delivery back, uncounted
    lease: Support  # deliveries expire unless extended; limit: the lease's length
    atomic_move: Support  # Subscription.move: sends and the settle in one step
    delivery_count: Support  # Delivery.deliveries is set
    attempt: Support  # Delivery.attempt is exact over a crash
    settle_confirmed: Support  # settle returns after the broker has it
    dedup: Support  # a message id sent twice arrives once; limit: window, seconds

    # Competing consumers take message by message. Where they don't, each has a share that waits for it alone.
    share: Support = Support("native")
    inbox: Support = Support("native")  # a reply to a process that has gone is an error, and is kept nowhere

    start_positions: bool = False  # with `replay`: a group may also start at positions
    same_in_names: str = ""  # characters that the broker can't tell apart in names
    max_body: int | None = None
    max_headers: int | None = None  # number of user headers
    max_header_bytes: int | None = None  # all names and values together
    max_key: int | None = None
    send_batch: int = 1000  # messages a call of send takes
    send_bytes: int | None = None  # bodies and headers of one call of send
    receive_batch: int = 1000
    settle_batch: int = 1000
    ordered_batches: bool = (
        False  # in a call of send, what is behind a failure that may pass fails too, by key at least
    )
    flights: int = 1  # sends worth having in flight at once, to one unordered destination
    release_counts: bool = False  # the broker counts a delivery that was given back like any other
    receivers: int = 1  # receives the core keeps running at once on one subscription
    delay_steps: bool = False  # delays are rounded up to steps known at start: no jitter
    park_below: float = 0.0  # retries sooner than this wait in place: cheaper than a copy
    park_limit: float | None = None  # the longest a delivery may be held

    def __post_init__(self) -> None:
        """Raises ConfigError: whoever reads a wrong type would stumble over it somewhere else, and say less."""
        for field in fields(self):
            value, told = getattr(self, field.name), str(field.type)
            kind, _, optional = told.partition(" | ")
            if kind == "Support":
                if not isinstance(value, Support) or value.level not in get_args(Level):
                    raise ConfigError(
                        f"{self.adapter} declares {field.name}={value!r}: use native(), emulated(how) or refused(why) of "
                        "unibus.capabilities"
                    )
            elif not (isinstance(value, _PLAIN[kind]) and isinstance(value, bool) == (kind == "bool")) and not (
                optional and value is None
            ):
                raise ConfigError(f"{self.adapter} declares {field.name}={value!r}: it is {told}")

    def features(self) -> dict[str, Support]:
        """Name -> support of every feature, in the order of declaration."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Support)}


def checked(capabilities: object) -> Capabilities:
    """The same. Raises ConfigError where an adapter has something else there: what stands in it was checked when it was made."""
    if not isinstance(capabilities, Capabilities):
        raise ConfigError(f"capabilities are {type(capabilities).__name__}, no Capabilities of unibus.capabilities")
    return capabilities
