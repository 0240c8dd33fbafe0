"""The ratios that are aimed at, and what a run says to each: 256-byte bodies, durable, confirmed, at least once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import OURS
from benchmarks.memory import PREFETCH

FASTSTREAM, MQ_BRIDGE = "FastStream", "mq-bridge, batches"
CONFLUENT_ENGINE = f"{OURS}, confluent engine"
_BUSY = 75.0  # percent of the time: from here on the client is what everything waits for
_NEAR = 1.5  # who gets so much more than unibus shows that the broker could give more

Cases = Mapping[str, Mapping[str, Any]]  # by name, as `--json` has them


@dataclass(frozen=True)
class Goal:
    """Of `figure` in `case`: the ratio of `who` to `to`, or without `to` the figure itself."""

    case: str
    to: str | None
    bound: float
    figure: str = "messages/s"
    who: str = OURS
    at_most: bool = False

    def found(self, cases: Cases) -> dict[str, float] | None:
        """Median, lowest and highest; None: not measured."""
        figures = cases.get(self.case, {}).get("contestants", {}).get(self.who, {})
        figure: dict[str, Any] = figures.get(self.figure, {})
        return (figure or None) if self.to is None else figure.get("to", {}).get(self.to)

    def reached(self, found: Mapping[str, float]) -> bool:
        return found["median"] <= self.bound if self.at_most else found["median"] >= self.bound


def _of(broker: str, to: str, send: float, consume: float, who: str = OURS) -> Iterator[Goal]:
    yield Goal(f"{broker}: send", to, send, who=who)
    yield Goal(f"{broker}: consume", to, consume, who=who)


def request(broker: str) -> str:
    return f"{broker}: request and reply, one at a time"


BASES = {"RabbitMQ": "aio-pika", "Kafka": "aiokafka", "Redis": "redis-py", "SQS": "aiobotocore"}
GOALS = (
    *_of("RabbitMQ", "aio-pika", 1.5, 1.5),
    *_of("RabbitMQ", FASTSTREAM, 3, 4),
    *_of("RabbitMQ", MQ_BRIDGE, 0.7, 0.7),
    *_of("Kafka", "aiokafka", 0.9, 0.6),
    *_of("Kafka", FASTSTREAM, 15, 40),
    *_of("Kafka", "aiokafka", 1.0, 1.0, CONFLUENT_ENGINE),
    *_of("Kafka", MQ_BRIDGE, 0.5, 0.4, CONFLUENT_ENGINE),
    *_of("Redis", "redis-py", 1.5, 0.6),
    *_of("Redis", FASTSTREAM, 6, 15),
    *_of("Redis", MQ_BRIDGE, 0.3, 0.5),
    *_of("SQS", "aiobotocore", 0.9, 0.9),
    *_of("SQS", MQ_BRIDGE, 1.0, 1.0),
    *(Goal(request(broker), base, 1.3, "p50 ms", at_most=True) for broker, base in BASES.items()),
    Goal(PREFETCH, None, 2.5, "CPU µs/message", at_most=True),
)


def bottleneck(case: Mapping[str, Any]) -> str:
    """Who keeps unibus from being faster: itself, the broker, or the way there and back."""
    ours = case["contestants"][OURS]
    if "busy %" not in ours:
        return ""
    busy = ours["busy %"]["median"]
    if busy >= _BUSY:
        return f"unibus: it computed {busy:.0f} % of the time"
    broker = case["name"].partition(":")[0]
    others = {name: own["messages/s"]["median"] for name, own in case["contestants"].items() if name != OURS}
    ahead = {name: rate / ours["messages/s"]["median"] for name, rate in others.items()}
    best = max(ahead, key=lambda name: ahead[name], default=None)
    waited = f"unibus waited {100 - busy:.0f} % of the time"
    if best is None or ahead[best] <= _NEAR:
        return f"{broker}: {waited}, and nobody got much more"
    return f"the way to {broker} and back: {waited}, {best} got {ahead[best]:.1f} times as much"
