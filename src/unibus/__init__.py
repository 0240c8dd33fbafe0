"""unibus: a service is written once against one interface; the broker it runs on is a setting."""

from unibus.bus import Bus, BusHealth
from unibus.channel import Codec, Queue, Topic
from unibus.delivery import Delivery
from unibus.errors import (
    AuthenticationFailed,
    Closed,
    CodecError,
    ConfigError,
    ConnectionLost,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    PermissionDenied,
    Refused,
    RemoteError,
    SendFailed,
    Throttled,
    Timeout,
    TransportError,
    UnibusError,
    UnknownChannel,
    Unroutable,
    Unsupported,
)
from unibus.handlers import Header
from unibus.message import Message
from unibus.registrations import Handlers
from unibus.retry import BatchFailed, DeadLetter, Discard, Retry, RetryPolicy

__all__ = [
    "AuthenticationFailed",
    "BatchFailed",
    "Bus",
    "BusHealth",
    "Closed",
    "Codec",
    "CodecError",
    "ConfigError",
    "ConnectionLost",
    "DeadLetter",
    "Delivery",
    "Discard",
    "Handlers",
    "Header",
    "LeaseLost",
    "Message",
    "MessageTooLarge",
    "NotFound",
    "PermissionDenied",
    "Queue",
    "Refused",
    "RemoteError",
    "Retry",
    "RetryPolicy",
    "SendFailed",
    "Throttled",
    "Timeout",
    "Topic",
    "TransportError",
    "UnibusError",
    "UnknownChannel",
    "Unroutable",
    "Unsupported",
]
