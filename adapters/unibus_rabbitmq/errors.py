"""RabbitMQ's and its client's errors, as unibus': one table, used at every edge of the adapter."""

from __future__ import annotations

import asyncio
import re

from aiormq import exceptions as amqp

from unibus import errors
from unibus.errors import ConfigError, ConnectionLost, PermissionDenied, UnibusError
from unibus.translation import common, of_host, wrong_password

# By AMQP reply code, or by the client's class where it keeps no code; what is not here is Refused.
_TABLE: dict[object, type[errors.TransportError]] = {
    311: errors.MessageTooLarge,
    320: ConnectionLost,  # connection-forced: an operator, or a node that shuts down
    403: PermissionDenied,
    amqp.ChannelAccessRefused: PermissionDenied,
    404: errors.NotFound,
    amqp.ChannelNotFoundEntity: errors.NotFound,
    405: PermissionDenied,  # resource-locked: another connection's exclusive queue
    amqp.ChannelLockedResource: PermissionDenied,
    amqp.ChannelPreconditionFailed: errors.Refused,
    506: errors.Throttled,
    amqp.ConnectionResourceError: errors.Throttled,
    530: PermissionDenied,  # not-allowed: the vhost
    amqp.ConnectionNotAllowed: PermissionDenied,
    541: ConnectionLost,
}
_MISMATCH = re.compile(
    r"inequivalent arg '(?P<argument>[^']+)' for (?P<object>\w+) '(?P<name>[^']+)'.*"
    r"received (?P<wanted>.+?) but current is (?P<found>.+)$",
    re.DOTALL,
)
# What a setting or a feature of the channel decides: queue_type, priorities, ordered, exchange_type.
_SETTABLE = frozenset(("x-queue-type", "x-max-priority", "x-single-active-consumer", "type"))


def largest(exc: BaseException | None) -> int | None:
    """The server's max_message_size, if a message above it is why the channel was closed."""
    found = re.search(r"larger than configured max size (\d+)", _text(exc)) if exc is not None else None
    return int(found[1]) if found else None


def translate(exc: BaseException, doing: str) -> UnibusError:
    """The error to raise `from exc`. `doing`: what was tried, with the object's name. Never called with CancelledError."""
    if (known := common(exc, doing, "RabbitMQ")) is not None:
        return known
    if isinstance(exc, amqp.AuthenticationError | amqp.ProbableAuthenticationError):
        return wrong_password(doing)
    code = getattr(exc, "code", None)
    if code is not None or type(exc) in _TABLE:
        return _TABLE.get(code or type(exc), errors.Refused)(f"{doing}: {_text(exc) or code}")
    if isinstance(exc, OSError | amqp.AMQPError | asyncio.CancelledError | RuntimeError):
        return ConnectionLost(f"{doing}: {_text(exc) or type(exc).__name__}")
    return errors.Refused(f"{doing}: {type(exc).__name__}")


def connecting(exc: BaseException, where: str, vhost: str, timeout: float, said: tuple[int, str]) -> UnibusError:
    """Of one host during connect. `said`: reply code and text of the server, where it has closed the connection."""
    doing = f"connect to RabbitMQ at {where}"
    code, text = said
    if code == 530 and "not found" in text:
        return ConfigError(f"{doing}: it has no vhost {vhost!r}; create it, or correct the path of url")
    if code == 530 and "refused" in text:
        return PermissionDenied(f"{doing}: the user has no permission on vhost {vhost!r}")
    if code == 403:
        return wrong_password(doing)
    if isinstance(exc, TimeoutError):
        return ConnectionLost(f"{doing}: no answer within {timeout:g} s")
    error = translate(exc, doing)
    if isinstance(error, PermissionDenied):  # 530 for what passes: a vhost that is down, or has too many connections
        return ConnectionLost(str(error))
    return of_host(error)


def mismatch(exc: BaseException, doing: str) -> UnibusError:
    """Of a declaration: an object that is there already, and different, is a ConfigError that says what to do."""
    found = _MISMATCH.search(_text(exc))
    if found is None:
        return translate(exc, doing)
    current, wanted = (re.sub(r"^the value (.*) of type '\w+'$", r"\1", found[part]) for part in ("found", "wanted"))
    what = f"{found['object']} {found['name']!r}"
    advice = f"use another name, or delete the {found['object']} once it is empty"
    if found["argument"] in _SETTABLE:
        advice = f"change the channel's settings to match, or {advice}"
    else:
        advice = f"something else has declared it, and RabbitMQ can't change it: {advice}"
    return ConfigError(
        f"{what} exists with {found['argument']} = {current}, and would be declared with {wanted}; {advice}"
    )


def _text(exc: BaseException) -> str:
    return str(getattr(exc, "text", "") or exc)
