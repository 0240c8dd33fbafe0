"""What moves the records: one producer and some consumers. The client library behind them is chosen by the URL.

Everything else that is asked of the cluster (topics, offsets, groups) goes through aiokafka's client with either engine, and
both raise aiokafka's errors, so that there is one table of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from aiokafka import TopicPartition

from unibus.errors import ConfigError
from unibus_kafka import config
from unibus_kafka.wire import Record


class Batch(Protocol):
    """Records of one partition that are sent together. `indices`: of those that are not confirmed; `failed`: why some never will."""

    @property
    def indices(self) -> Collection[int]: ...
    @property
    def failed(self) -> Mapping[int, Exception]: ...
    def append(
        self, i: int, key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes | None]], at: int
    ) -> bool:
        """False: there is no room for it; never for the first one."""
        ...

    async def send(self) -> asyncio.Future[Any]:
        """Ends once they are under way; the future when each is confirmed or has failed. What it raises is for all of them."""
        ...


class Producer(Protocol):
    """Idempotent. `client`: aiokafka's, by which the cluster is asked; it starts and ends with the producer."""

    native: Any
    client: Any

    async def start(self) -> None: ...
    async def close(self) -> None:
        """What was not confirmed by now is given up: its senders have been told."""
        ...

    def batch(self, tp: TopicPartition) -> Batch: ...


class Listener(Protocol):
    """Is told of rebalances, and awaited; heartbeats go on meanwhile."""

    def assigned(self, tps: Iterable[TopicPartition]) -> Awaitable[None]:
        """Calls `Consumer.begin`."""
        ...

    def revoked(self, *, lost: bool, member: str = "") -> Awaitable[None]:
        """All of them. `lost`: the group has gone on already, there is nothing to wait for. `member`: who we were, where the library
        has given that up by itself: the group may still wait for it.
        """
        ...


class Consumer(Protocol):
    async def start(self) -> None: ...
    def subscribe(self, topics: Sequence[str], listener: Listener) -> None:
        """As a member of the group."""
        ...

    async def begin(
        self, starts: Mapping[TopicPartition, int], paused: Collection[TopicPartition], *, assign: bool
    ) -> None:
        """Read these from there; `assign`: without a group, these and no others. Nothing read before is returned any more."""
        ...

    async def getmany(self) -> Mapping[TopicPartition, Sequence[Record]]:
        """What there is, after half a second at the latest. Raises OffsetOutOfRangeError with the partitions that have to begin
        anew.
        """
        ...

    def pause(self, tp: TopicPartition, *, on: bool) -> None:
        """Nothing where the partition was taken away."""
        ...

    async def commit(self, points: Mapping[TopicPartition, tuple[int, str]]) -> None:
        """As a member, offset and metadata. Raises CommitFailedError where that is over, from RebalanceInProgressError if not for long."""
        ...

    def forgets(self, topics: Collection[str]) -> bool:
        """One of them at least may be gone: ask somebody else, too. It goes on looking for them by itself."""
        ...

    async def close(self) -> None:
        """Leaves the group, so that others need not wait for the session's end."""
        ...


class Engine(Protocol):
    def producer(self, options: dict[str, Any], given: config.Settings) -> Producer: ...
    def consumer(self, options: dict[str, Any], given: config.Settings, group: str | None) -> Consumer: ...


def engine_of(scheme: str) -> Engine:
    """By what stands behind the + of an URL's scheme. Raises ConfigError where its client library is not installed."""
    if "+" not in scheme:
        from unibus_kafka.aio import AioEngine

        return AioEngine()
    try:
        from unibus_kafka.confluent import ConfluentEngine
    except ImportError as exc:
        text = (
            f"{scheme}:// needs the module {exc.name!r}, which is not installed; pip install 'unibus[kafka-confluent]'"
        )
        raise ConfigError(text) from exc
    return ConfluentEngine()
