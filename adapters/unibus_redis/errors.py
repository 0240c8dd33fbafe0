"""Redis' and its client's errors, as unibus': one table, used at every edge of the adapter."""

from __future__ import annotations

from redis import exceptions as native

from unibus.errors import (
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
from unibus.translation import FATAL, common, wrong_password

# By the first word of an error reply. The client takes it off where it has a class of its own.
_BY_CODE: dict[str, type[TransportError]] = {
    "LEASELOST": LeaseLost,
    "NOTFOUND": NotFound,
    "UNROUTABLE": Unroutable,
    "NOGROUP": NotFound,
    "WRONGTYPE": Refused,
    "NOPERM": PermissionDenied,
    "OOM": Throttled,  # noeviction: it takes writes again once there is room
    "MISCONF": Throttled,  # it can't write to its disk
    "BUSY": Throttled,
    "TRYAGAIN": Throttled,
    "NOREPLICAS": Throttled,
    "READONLY": ConnectionLost,  # a master no more: look for the one that is
    "MASTERDOWN": ConnectionLost,
    "CLUSTERDOWN": ConnectionLost,
    "LOADING": ConnectionLost,
    "UNBLOCKED": ConnectionLost,  # a failover, while a read was waiting
}
_WORDS = {
    "LEASELOST": "the delivery is no longer held by this consumer",
    "NOTFOUND": "there is no such stream; declare it",
    "UNROUTABLE": "the topic has no group",
    "NOGROUP": "the stream or its consumer group is gone",
    "WRONGTYPE": "a key that should be a stream is of another type; rename the channel, or move that key",
    "NOPERM": "the user may not do this; see the rights in docs/brokers/redis.md",
    "OOM": "the server is at its maxmemory",
}


def refusal(text: str, doing: str) -> TransportError:
    """Of an error reply, or of the reasons that a script gives."""
    code, _, rest = text.partition(" ")
    if "ACL failure" in text or "can't run this command" in text or "permissions" in text:  # inside a script
        code = "NOPERM"
    kind = _BY_CODE.get(code, Refused)
    detail = rest.partition(" script: ")[0] if code in _BY_CODE else text
    words = _WORDS.get(code, "")
    return kind(f"{doing}: {words}{f' ({detail})' if words and detail else detail}")


def translate(exc: BaseException, doing: str) -> UnibusError:
    """The error to raise `from exc`. Never called with CancelledError."""
    if (known := common(exc, doing, "Redis")) is not None:
        return known
    if isinstance(exc, native.AuthenticationError | native.AuthenticationWrongNumberOfArgsError):
        return wrong_password(doing)
    if isinstance(exc, native.MovedError | native.ClusterCrossSlotError):
        return ConfigError(f"{doing}: the server is part of a Redis Cluster, which this adapter does not support")
    if isinstance(exc, native.ResponseError):
        code = getattr(exc, "status_code", None)
        return refusal(f"{code} {exc}" if code in _BY_CODE else str(exc), doing)
    return ConnectionLost(f"{doing}: {str(exc) or type(exc).__name__}")


def connecting(exc: Exception, where: str) -> UnibusError:
    """Of one host during connect."""
    doing = f"connect to Redis at {where}"
    text = str(exc)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return ConfigError(f"{doing}: its certificate is not trusted ({text}); set redis.ca_file")
    if isinstance(exc, native.ResponseError) and "DB index" in text:
        return ConfigError(f"{doing}: it has no such database; correct the path of url")
    error = translate(exc, doing)
    return error if isinstance(error, FATAL | ConnectionLost) else ConnectionLost(str(error))
