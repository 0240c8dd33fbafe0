"""The RabbitMQ adapter of unibus."""

from unibus_rabbitmq.adapter import RabbitMQAdapter
from unibus_rabbitmq.wire import Received

__all__ = ["RabbitMQAdapter", "Received"]
