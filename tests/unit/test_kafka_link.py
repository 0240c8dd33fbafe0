"""What the Kafka adapter asks a cluster of which not every broker has heard the news; a client that says what it is told to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.metadata import MetadataRequest

from unibus.errors import ConnectionLost
from unibus_kafka.link import Link, by_name


class Client:
    """`brokers`: which topics each of them knows; None: it doesn't answer. What is learnt comes from `source`."""

    def __init__(self, source: int, **brokers: set[str] | None) -> None:
        self.brokers = {int(name[1:]): known for name, known in brokers.items()}
        self.source = source
        self.updates = 0
        self._topics: set[str] = set()
        self._learnt: set[str] = set()
        self.cluster = SimpleNamespace(
            brokers=lambda: [SimpleNamespace(nodeId=node) for node in self.brokers],
            partitions_for_topic=lambda topic: {0} if topic in self._learnt else None,
            update_metadata=self._learn,
        )

    async def send(self, node: int, request: MetadataRequest) -> Any:
        known = self.brokers[node]
        if known is None:
            raise KafkaConnectionError
        return SimpleNamespace(topics=[(0 if topic in known else 3, topic, False, [0]) for topic in request._topics])

    def _learn(self, answer: Any) -> None:
        self._learnt = {topic for error, topic, _, _ in answer.topics if not error}

    async def _metadata_update(self, cluster: Any, topics: tuple[str, ...]) -> bool:
        """The library's own, by which topics would be made."""
        assert topics == ()
        self.updates += 1
        return False

    async def set_topics(self, topics: set[str]) -> None:
        self._topics = topics
        await self.force_metadata_update()

    async def force_metadata_update(self) -> None:
        self.updates += 1
        if self.updates > 2:  # by and by it has heard
            self.source = 1
        self._learnt = (self.brokers[self.source] or set()) & self._topics


def link(client: Client) -> Link:
    made = Link.__new__(Link)  # it would make a client of the library
    made._client = client
    return made


async def test_a_topic_is_missing_when_no_broker_knows_it() -> None:
    """Else a send to a queue that was declared a moment ago was NotFound, when it came to a broker that lagged behind."""
    client = Client(1, n1={"new"}, n2=set(), n3=None)
    for _ in range(10):  # whichever is asked first
        assert await link(client).missing({"new", "old"}) == {"old"}
        assert await link(client).missing({"new"}, fresh=True) == set()


async def test_what_another_broker_knows_is_learnt_before_it_is_used() -> None:
    client = Client(2, n1={"new"}, n2=set())
    made = link(client)
    assert await made.missing({"new"}) == set()
    assert client.updates > 1
    assert client.cluster.partitions_for_topic("new")


async def test_when_nobody_answers_nothing_is_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unibus_kafka.link.TIMEOUT", 0.01)
    with pytest.raises((ConnectionLost, TimeoutError), match="look for topics"):
        await link(Client(1, n1=None, n2=None)).missing({"new"})


async def test_a_client_of_the_library_believes_the_broker_that_knows_most() -> None:
    """Else a consumer had no partition, and asked again after five minutes: once in 240 times on three nodes."""
    for _ in range(10):  # whichever is asked first
        client = by_name(Client(1, n1={"new", "newer"}, n2=set(), n3=None, n4={"new"}))
        assert await client._metadata_update(client.cluster, {"new", "newer", "gone"})
        known = [name for name in ("new", "newer", "gone") if client.cluster.partitions_for_topic(name)]
        assert known == ["new", "newer"]


@pytest.mark.parametrize("topics", [set(), {"new"}])
async def test_a_client_without_topics_or_without_an_answer_is_left_to_the_library(topics: set[str]) -> None:
    client = by_name(Client(1, n1=None))
    assert not await client._metadata_update(client.cluster, topics)
    assert client.updates == 1
