"""RabbitMQ: the raw clients beside unibus."""

from __future__ import annotations

from benchmarks.flows import EACH, Contestant
from benchmarks.rabbitmq_raw import PREFETCH, AioPika, Aiormq
from benchmarks.rabbitmq_socket import Socket

__all__ = ["BASE", "PREFETCH", "contestants"]

BASE = "aio-pika"
EVERY = 100  # deliveries that a hand-tuned consumer acks at once


def contestants(url: str) -> list[Contestant]:
    """aio-pika at its best is the base."""
    raw: list[Contestant] = [
        AioPika(BASE, url, every=EVERY),
        AioPika(BASE + EACH, url, every=1),
        Aiormq(url, every=EVERY),
    ]
    return raw if url.startswith("amqps") else [*raw, Socket(url, every=EVERY)]
