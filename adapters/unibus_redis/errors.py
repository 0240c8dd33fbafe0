"""Redis' errors as unibus': one table, used at every edge of the adapter."""

from __future__ import annotations

from hiredis import ReplyError

from unibus.errors import (
    AuthenticationFailed,
    ConfigError,
    ConnectionLost,
    LeaseLost,
    NotFound,
    PermissionDenied,
    Refused,
    Throttled,
    TransportError,
    UnibusError,
    Unroutable,
)
from unibus.translation import common, of_host, wrong_password

# By the first word of an error reply; what to say, where its own words do not.
_BY_CODE: dict[str, tuple[type[TransportError], str]] = {
    "LEASELOST": (LeaseLost, "the delivery is no longer held by this consumer"),
    "NOTFOUND": (NotFound, "there is no such stream; declare it"),
    "UNROUTABLE": (Unroutable, "the topic has no group"),
    "NOGROUP": (NotFound, "the stream or its consumer group is gone"),
    "WRONGTYPE": (Refused, "a key that should be a stream is of another type; rename the channel, or move that key"),
    "NOPERM": (PermissionDenied, "the user may not do this; see the rights in docs/brokers/redis.md"),
    "NOAUTH": (AuthenticationFailed, ""),
    "WRONGPASS": (AuthenticationFailed, ""),
    "OOM": (Throttled, "the server is at its maxmemory"),  # noeviction: it takes writes again once there is room
    "MISCONF": (Throttled, ""),  # it can't write to its disk
    "BUSY": (Throttled, ""),
    "TRYAGAIN": (Throttled, ""),
    "ASK": (Throttled, "the cluster is moving the channel to another master"),
    "NOREPLICAS": (Throttled, ""),
    "MOVED": (ConnectionLost, "the cluster has moved the channel to another master"),
    "READONLY": (ConnectionLost, ""),  # a master no more: look for the one that is
    "MASTERDOWN": (ConnectionLost, ""),
    "CLUSTERDOWN": (ConnectionLost, ""),
    "LOADING": (ConnectionLost, ""),
    "UNBLOCKED": (ConnectionLost, ""),  # a failover, while a read was waiting
}


def refusal(text: str, doing: str) -> TransportError:
    """Of an error reply, or of the reasons that a script gives."""
    code, _, rest = text.partition(" ")
    if "ACL failure" in text or "can't run this command" in text or "permissions" in text:  # inside a script
        code = "NOPERM"
    elif text.startswith("ERR WAIT cannot"):  # it has become a replica since it took the message
        code = "READONLY"
    elif text.startswith("ERR AUTH"):  # a password for a user who has none
        code = "WRONGPASS"
    elif text.removeprefix("ERR ").startswith("no such key"):  # what XINFO says of a stream that is not there
        code, text, rest = "NOTFOUND", "", ""
    kind, words = _BY_CODE.get(code, (Refused, ""))
    if kind is AuthenticationFailed:
        return wrong_password(doing)
    detail = rest.partition(" script: ")[0] if code in _BY_CODE else text
    return kind(f"{doing}: {words}{f' ({detail})' if words and detail else detail}")


def translate(exc: BaseException, doing: str) -> UnibusError:
    """The error to raise `from exc`. Never called with CancelledError."""
    if (known := common(exc, doing, "Redis")) is not None:
        return known
    if isinstance(exc, ReplyError):
        return refusal(str(exc), doing)
    return ConnectionLost(f"{doing}: {str(exc) or type(exc).__name__}")


def connecting(exc: Exception, where: str) -> UnibusError:
    """Of one host during connect."""
    doing = f"connect to Redis at {where}"
    if isinstance(exc, ReplyError) and ("DB index" in str(exc) or "SELECT" in str(exc)):
        return ConfigError(f"{doing}: it has no such database ({exc}); correct the path of url")
    return of_host(translate(exc, doing))
