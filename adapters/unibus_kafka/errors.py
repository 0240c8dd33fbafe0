"""aiokafka's errors as unibus': one table, used at every edge of the adapter."""

from __future__ import annotations

from aiokafka import errors as kafka

from unibus.errors import (
    AuthenticationFailed,
    ConnectionLost,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    Refused,
    Throttled,
    Timeout,
    TransportError,
    UnibusError,
)
from unibus.translation import common

# The first that fits. What is not here is ConnectionLost where the client says that it may pass, else Refused.
_TABLE: tuple[tuple[tuple[type[BaseException], ...], type[TransportError]], ...] = (
    ((kafka.UnknownTopicOrPartitionError, kafka.GroupIdNotFound, kafka.InvalidTopicError), NotFound),
    (
        (
            kafka.TopicAuthorizationFailedError,
            kafka.GroupAuthorizationFailedError,
            kafka.ClusterAuthorizationFailedError,
        ),
        PermissionDenied,
    ),
    (
        (
            kafka.AuthenticationFailedError,
            kafka.AuthenticationMethodNotSupported,
            kafka.SaslAuthenticationFailed,
            kafka.UnsupportedSaslMechanismError,
            kafka.IllegalSaslStateError,
        ),
        AuthenticationFailed,
    ),
    ((kafka.MessageSizeTooLargeError, kafka.RecordListTooLargeError, kafka.RecordTooLargeError), MessageTooLarge),
    ((kafka.CommitFailedError, kafka.IllegalStateError), LeaseLost),
    ((kafka.QuotaViolationError,), Throttled),
    ((kafka.KafkaTimeoutError, kafka.RequestTimedOutError), Timeout),
    (
        (
            OSError,
            kafka.KafkaConnectionError,
            kafka.NodeNotReadyError,
            kafka.ProducerClosed,
            kafka.ConsumerStoppedError,
            # The numbers of the idempotent producer are out of step: only a new producer helps.
            kafka.ProducerFenced,
            kafka.OutOfOrderSequenceNumber,
            kafka.UnknownProducerId,
            kafka.InvalidProducerEpoch,
        ),
        ConnectionLost,
    ),
)


def translate(exc: BaseException, doing: str, right: str = "Read") -> UnibusError:
    """The error to raise `from exc`. `doing`: what was tried, with the object's name; `right`: what a user needs for it.

    Never called with CancelledError.
    """
    if (known := common(exc, doing, "Kafka")) is not None:
        return known
    for natives, ours in _TABLE:
        if isinstance(exc, natives):
            hint = (
                "; check username and UNIBUS_PASSWORD, and kafka.sasl_mechanism" if ours is AuthenticationFailed else ""
            )
            text = _denied(exc, right) if ours is PermissionDenied else _text(exc)
            return ours(f"{doing}: {text}{hint}")
    if getattr(exc, "retriable", False) or type(exc) is kafka.KafkaError:
        return ConnectionLost(f"{doing}: {_text(exc)}")
    return Refused(f"{doing}: {_text(exc)}")


def _denied(exc: BaseException, right: str) -> str:
    """The server names no right, and often no object."""
    if isinstance(exc, kafka.ClusterAuthorizationFailedError):
        return "not authorized; this user needs IdempotentWrite on the cluster, or from Kafka 2.8 on Write on any topic"
    given = exc.args[0] if exc.args else ()
    names = [given] if isinstance(given, str) else sorted(map(str, given))
    kind = "group" if isinstance(exc, kafka.GroupAuthorizationFailedError) else "topic"
    return f"not authorized; this user needs {right} on {kind} {', '.join(map(repr, names))}".rstrip()


def _text(exc: BaseException) -> str:
    """The server's words; the client's own texts would repeat the class and its number."""
    description = getattr(exc, "description", "")
    return str(description or next((a for a in exc.args if isinstance(a, str)), "") or type(exc).__name__)
