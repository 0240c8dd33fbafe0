"""Channels and addresses: where a message can go and where it can be received.

`Queue` and `Topic` are what users declare. `Group` (one subscription of a topic) and `Inbox` (where the replies of one
process arrive) are addresses that only the core and the adapters handle.
"""

from __future__ import annotations

import re
from typing import Any, Generic, Protocol, TypeVar, overload

from unibus.errors import ConfigError

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9._-]{1,60}")
DEAD_LETTER = ".dlq"
INVALID = ".invalid"


class Codec(Protocol):
    """Turns bodies into bytes and back, for formats that unibus does not know."""

    content_type: str

    def encode(self, body: Any) -> bytes: ...

    def decode(self, data: bytes) -> Any: ...


def check_name(name: Any, what: str) -> str:
    """Return `name` if it is a legal logical name, else raise ConfigError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{what} name {name!r}: use 1 to 60 of A-Z a-z 0-9 . _ -")
    if name.endswith((DEAD_LETTER, INVALID)) or ".retry." in name:
        raise ConfigError(f"{what} name {name!r}: the endings .dlq, .invalid and .retry.* are reserved")
    return str(name)


class _Channel(Generic[T]):
    """What queues and topics share. Equal by kind and name, so that an address can be made where it is needed."""

    __slots__ = ("_hash", "body", "codec", "delayed", "name", "ordered", "priorities")

    name: str
    body: Any
    ordered: bool
    priorities: int
    delayed: bool
    codec: Codec | None

    def _init(self, name: str, body: Any, ordered: bool, priorities: int, delayed: bool, codec: Codec | None) -> None:
        if priorities and not 2 <= priorities <= 10:
            raise ConfigError(f"{self!s}: priorities={priorities}; use 2 to 10 levels, or 0 for none")
        self.name, self.body, self.ordered = name, body, ordered
        self.priorities, self.delayed, self.codec = priorities, delayed, codec
        self._hash = hash((type(self).__name__, name))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and other.name == self.name)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.name!r}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


class Queue(_Channel[T]):
    """A point-to-point channel: each message goes to one of the competing consumers.

    `body` is the type of its bodies: a pydantic model, a dataclass, `bytes`, `str`, or any type that pydantic can turn
    into JSON, also a discriminated union. `ordered`: messages of one key are handled one after the other, in the order
    of sending. `priorities=n`: sends may carry a priority of 0 (default) to n-1, higher first. `delayed`: sends may carry
    a delay. `reply`: the type of the answer, for `bus.request`. What the broker can't do is refused at start.
    """

    __slots__ = ("reply",)

    @overload
    def __init__(
        self: Queue[bytes],
        name: str,
        *,
        ordered: bool = ...,
        priorities: int = ...,
        delayed: bool = ...,
        reply: Any = ...,
        codec: Codec | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        body: type[T],
        *,
        ordered: bool = ...,
        priorities: int = ...,
        delayed: bool = ...,
        reply: Any = ...,
        codec: Codec | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Queue[Any],
        name: str,
        body: Any,
        *,
        ordered: bool = ...,
        priorities: int = ...,
        delayed: bool = ...,
        reply: Any = ...,
        codec: Codec | None = ...,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        body: Any = bytes,
        *,
        ordered: bool = False,
        priorities: int = 0,
        delayed: bool = False,
        reply: Any = None,
        codec: Codec | None = None,
    ) -> None:
        self.name = check_name(name, "queue")
        self._init(name, body, ordered, priorities, delayed, codec)
        self.reply = reply

    @classmethod
    def derived(cls, name: str) -> Queue[bytes]:
        """A queue that belongs to another channel (dead letters, invalid messages): bytes, any legal name."""
        queue: Queue[bytes] = Queue.__new__(Queue)
        queue.name = name
        queue._init(name, bytes, ordered=False, priorities=0, delayed=False, codec=None)
        queue.reply = None
        return queue


class Topic(_Channel[T]):
    """A publish-subscribe channel: each message goes to every group; consumers in one group compete.

    Parameters as for `Queue`. A group receives what was published after it was declared.
    """

    __slots__ = ()

    @overload
    def __init__(
        self: Topic[bytes],
        name: str,
        *,
        ordered: bool = ...,
        priorities: int = ...,
        delayed: bool = ...,
        codec: Codec | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        body: type[T],
        *,
        ordered: bool = ...,
        priorities: int = ...,
        delayed: bool = ...,
        codec: Codec | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: Topic[Any],
        name: str,
        body: Any,
        *,
        ordered: bool = ...,
        priorities: int = ...,
        delayed: bool = ...,
        codec: Codec | None = ...,
    ) -> None: ...
    def __init__(
        self,
        name: str,
        body: Any = bytes,
        *,
        ordered: bool = False,
        priorities: int = 0,
        delayed: bool = False,
        codec: Codec | None = None,
    ) -> None:
        self.name = check_name(name, "topic")
        self._init(name, body, ordered, priorities, delayed, codec)


class Group:
    """One subscription of a topic, itself a destination: a retry or redrive reaches only this group.

    An `ephemeral` group belongs to one process and ends with it: it keeps no backlog (`broadcast=True`).
    """

    __slots__ = ("_hash", "ephemeral", "name", "topic")

    def __init__(self, topic: Topic[Any], name: str, *, ephemeral: bool = False) -> None:
        self.topic = topic
        self.name = name if ephemeral else check_name(name, "group")
        self.ephemeral = ephemeral
        self._hash = hash((topic, name))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return type(other) is Group and other.name == self.name and other.topic == self.topic

    def __str__(self) -> str:
        return f"group {self.name!r} of {self.topic}"

    def __repr__(self) -> str:
        return f"Group({self.topic!r}, {self.name!r})"


class Inbox:
    """Where the replies to one process arrive. `name` is the text that goes into `reply_to`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return type(other) is Inbox and other.name == self.name

    def __repr__(self) -> str:
        return f"Inbox({self.name!r})"


Address = Queue[Any] | Topic[Any] | Group | Inbox


@overload
def stem(address: Queue[Any] | Group) -> str: ...
@overload
def stem(address: Address) -> str: ...
def stem(address: Address) -> str:
    """The logical name under which an address is known: `orders`, `order.charged`, `order.charged.billing`."""
    if isinstance(address, Group):
        return f"{address.topic.name}.{address.name}"
    return address.name


def dead_letter_queue(address: Queue[Any] | Group) -> Queue[bytes]:
    """Where the dead letters of a queue or group go: `<queue>.dlq` or `<topic>.<group>.dlq`."""
    return Queue.derived(stem(address) + DEAD_LETTER)


def invalid_queue(address: Queue[Any] | Group) -> Queue[bytes]:
    """Where the undecodable messages of a queue or group go: `<queue>.invalid` or `<topic>.<group>.invalid`."""
    return Queue.derived(stem(address) + INVALID)
