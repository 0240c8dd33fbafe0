"""The Apache Kafka adapter of unibus."""

from unibus_kafka.adapter import KafkaAdapter

__all__ = ["KafkaAdapter"]
