"""Every error that unibus raises.

    UnibusError
    ├── ConfigError                  a setting, a declaration or a handler is wrong; raised at start
    │   └── UnknownChannel           no channel of that name is declared
    ├── Unsupported                  this broker cannot do what was asked
    ├── Closed                       the bus is not open
    ├── CodecError (ValueError)      a body or header cannot be encoded or decoded
    ├── SendFailed                   some of many messages were not sent
    ├── RemoteError                  the responder answered with an error
    └── TransportError               the broker, or the way to it
        ├── ConnectionLost * (ConnectionError)
        ├── Timeout * (TimeoutError)
        ├── Throttled *
        ├── Refused                  the broker said no for good
        ├── NotFound                 the destination does not exist
        ├── AuthenticationFailed
        ├── PermissionDenied (PermissionError)
        ├── MessageTooLarge
        ├── Unroutable               nobody would get the message
        └── LeaseLost                the delivery is no longer ours

`*`: `retryable` is True; the same call may succeed later. Adapters translate native errors into
these with `raise ... from exc`; the native one stays on `__cause__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import ClassVar


class UnibusError(Exception):
    """Base of all errors of this library. Its text never holds a credential or a message body."""

    retryable: ClassVar[bool] = False


class ConfigError(UnibusError):
    """A setting, a declaration or a handler is wrong. The text names it and says what to do."""


class UnknownChannel(ConfigError):
    """No channel of this name was declared in code or in unibus.toml."""

    def __init__(self, name: str, known: tuple[str, ...] = ()) -> None:
        near = get_close_matches(name, known, n=1)
        if near:
            hint = f"did you mean {near[0]!r}?"
        else:
            hint = "declare it with Queue(...) or Topic(...), or in unibus.toml"
        super().__init__(f"no channel named {name!r} is declared; {hint}")
        self.name = name


class Unsupported(UnibusError):
    """The broker cannot do this, or the channel was not declared with the feature. Nothing was done."""


class Closed(UnibusError):
    """The bus is not open: it was never started, or it has been closed."""


class CodecError(UnibusError, ValueError):
    """A body, header or key cannot be encoded for the wire, or a received body cannot be decoded."""


class SendFailed(UnibusError):
    """Some messages of a `send_many` were not confirmed.

    `sent` maps the index of each confirmed message to its id; `failed` maps the others to their error.
    """

    def __init__(self, sent: Mapping[int, str], failed: Mapping[int, UnibusError]) -> None:
        first = next(iter(failed.items()), None)
        detail = f"; first: message {first[0]}: {first[1]}" if first else ""
        super().__init__(f"{len(failed)} of {len(sent) + len(failed)} messages were not sent{detail}")
        self.sent = sent
        self.failed = failed


class RemoteError(UnibusError):
    """The responder failed. `type` is the name of its exception class, `message` its text."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(f"{type}: {message}" if message else type)
        self.type = type
        self.message = message


class TransportError(UnibusError):
    """The broker refused or could not be reached."""


class ConnectionLost(TransportError, ConnectionError):
    """The link to the broker is down, or broke while the call was in flight: the outcome is unknown."""

    retryable = True


class Timeout(TransportError, TimeoutError):
    """No answer in time. For a send: the message may or may not be on the broker."""

    retryable = True


class Throttled(TransportError):
    """The broker asks to slow down."""

    retryable = True


class Refused(TransportError):
    """The broker refused, and would refuse again."""


class NotFound(TransportError):
    """The queue, topic, group or inbox does not exist on the broker."""


class AuthenticationFailed(TransportError):
    """Wrong user or password. Never retried."""


class PermissionDenied(TransportError, PermissionError):
    """The user may not do this. Never retried."""


class MessageTooLarge(TransportError):
    """Body, headers or key exceed what the broker carries; nothing was sent."""


class Unroutable(TransportError):
    """The broker took the message and found nobody to give it to; it is not stored."""


class LeaseLost(TransportError):
    """The delivery is no longer ours: its lease ended, or the link it came by is gone."""
