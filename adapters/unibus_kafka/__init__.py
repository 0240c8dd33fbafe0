"""The Apache Kafka adapter of unibus.

The client library is imported with the adapter, not with the package: plans and profiles need none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unibus_kafka.adapter import KafkaAdapter

__all__ = ["KafkaAdapter"]


def __getattr__(name: str) -> Any:
    if name == "KafkaAdapter":
        from unibus_kafka.adapter import KafkaAdapter

        return KafkaAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
