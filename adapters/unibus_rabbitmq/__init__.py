"""The RabbitMQ adapter of unibus.

The client library is imported with the adapter, not with the package: plans and profiles need none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unibus_rabbitmq.adapter import RabbitMQAdapter
    from unibus_rabbitmq.wire import Received

__all__ = ["RabbitMQAdapter", "Received"]


def __getattr__(name: str) -> Any:
    if name == "RabbitMQAdapter":
        from unibus_rabbitmq.adapter import RabbitMQAdapter

        return RabbitMQAdapter
    if name == "Received":
        from unibus_rabbitmq.wire import Received

        return Received
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
