"""Redis Streams behind the SPI."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from redis.asyncio import ConnectionPool, Redis

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Subscription, Topology
from unibus.channel import Address, Group, Inbox, Queue
from unibus.driver import linked, place_of
from unibus.driver import missing as not_there
from unibus.errors import (
    ConfigError,
    ConnectionLost,
    NotFound,
    TransportError,
    Unroutable,
    Unsupported,
)
from unibus.inboxes import inbox_name
from unibus.translation import first_that_answers
from unibus_redis import config, errors, scripts, topology, wire
from unibus_redis.capabilities import known
from unibus_redis.link import Link
from unibus_redis.subscription import INBOX_LIFE, Browser, Hooks, RedisSubscription

log = logging.getLogger("unibus.redis")

_OLDEST = (7, 0)

Host = tuple[str, Any, dict[str, Any]]  # its name for people, the client's class and arguments


class RedisAdapter:
    """One connection for all that is answered at once, and one for each subscription, whose reads wait."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._clock = endpoint.clock
        self._settings = config.settings(endpoint.settings)
        self._hosts = config.connections(endpoint.url, self._settings, f"{endpoint.service}-{endpoint.instance}")
        self._host = self._hosts[0]
        self._link: Link | None = None
        self._client: Redis | None = None
        self._places: dict[Address, topology.Place] = {}
        self._subscriptions: set[RedisSubscription] = set()
        self._set_capabilities(None)
        self._hooks = Hooks(
            self._clock, self._settings.lease, self._settings.retention, self._pack, self._subscriptions.discard, {}
        )

    def _set_capabilities(self, version: str | None) -> None:
        self.capabilities = known(version, lease=self._settings.lease, retention=self._settings.retention)

    @property
    def native(self) -> Redis | None:
        """redis-py's client with connections of its own, or None while not connected."""
        return self._client

    # -- the link ---------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """To the first host that answers and may be written to."""
        await self.close()
        await first_that_answers(self._hosts, self._use)
        self._client = Redis(connection_pool=ConnectionPool(connection_class=self._host[1], **self._host[2]))

    async def _use(self, host: Host) -> None:
        try:
            self._link = await self._open(host)
            self._host = host
            self._set_capabilities(await self._check_server(self._link))
            await self._link.load()
        except BaseException:
            await self.close()
            raise

    async def _open(self, host: Host) -> Link:
        where, kind, arguments = host
        return await Link.open(kind, arguments, where, self._settings.connect_timeout)

    async def _check_server(self, link: Link) -> str:
        """Its version. Raises what makes it unfit."""
        where = self._host[0]
        text = (await link.call("INFO", "server", "memory", "replication", "cluster")).decode(errors="replace")
        info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))
        version: str = info.get("redis_version", "?")
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
        if numbers and numbers < _OLDEST:
            raise ConfigError(f"Redis at {where} is {version}; 7.0 or newer is needed")
        if info.get("cluster_enabled") == "1":
            raise ConfigError(f"Redis at {where} is part of a cluster, which this adapter does not support yet")
        if info.get("role") == "slave":
            raise ConnectionLost(f"Redis at {where} is a replica, which takes no messages")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and not self._settings.allow_eviction:
            raise ConfigError(
                f"Redis at {where} has maxmemory-policy {policy}: when memory is short it deletes messages that nobody has read; set "
                "it to noeviction, or accept the loss with redis.allow_eviction = true"
            )
        return version

    async def close(self) -> None:
        for subscription in list(self._subscriptions):
            await subscription.close()
        self._subscriptions.clear()
        link, self._link = self._link, None
        client, self._client = self._client, None
        if client is not None:
            await client.connection_pool.disconnect()
        if link is not None:
            await link.close()

    def _linked(self) -> Link:
        return linked(self._link, "Redis")

    # -- channels ---------------------------------------------------------------------------------------------

    async def declare(self, topology_: Topology) -> None:
        link = self._linked()
        places = topology.plan(topology_, self._clock.time(), self._settings.retention)
        if topology_.mode != "assume":
            missing = await self._missing(link, places)
            if topology_.mode == "verify" and missing:
                raise not_there("Redis", dict.fromkeys(f"{address} ({stream})" for address, stream, _, _ in missing))
            for address, stream, group, start in missing:
                if await link.script(scripts.MAKE, [stream], (group, start or "$", "", 0), f"declare {address}"):
                    log.info("created %s: stream %r%s", address, stream, f", group {group!r}" if group else "")
        self._places = places

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        link = self._linked()
        places = topology.plan(topology_, self._clock.time(), self._settings.retention)
        missing = {made[:3] for made in await self._missing(link, places)}
        found = [
            Inspected("server", f"Redis {self.capabilities.version or ''}".rstrip(), True, risk=await self._risk(link))
        ]
        sets = {place.delayed[0]: address for address, place in places.items() if place.tag == place.streams[0]}
        for address, place in places.items():
            for stream, group, _ in place.made():
                name = f"{stream}, group {group}" if group else stream
                exists = (address, stream, group) not in missing
                found.append(Inspected("stream", name, exists, f"+xgroup|create on {stream}", address))
        # What is delayed waits in one set for a channel and all of its groups. It is made by the first delay.
        counts = await link.run(*(("ZCARD", key) for key in sets)) if sets else []
        for key, count in zip(sets, counts, strict=True):
            if isinstance(count, Exception):
                raise errors.translate(count, f"look at {key!r}") from count
            found.append(Inspected("delayed set", key, True, messages=count))
        return found

    async def _risk(self, link: Link) -> str:
        text = (await link.call("INFO", "persistence", "memory")).decode(errors="replace")
        info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        risks = []
        if info.get("aof_enabled") == "0":
            risks.append("appendonly is off: what came since the last snapshot is lost with the server")
        if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
            risks.append(f"maxmemory-policy {policy}: when memory is short it deletes messages that nobody has read")
        return "; ".join(risks)

    async def _missing(self, link: Link, places: dict[Address, topology.Place]) -> list[tuple[Address, str, str, str]]:
        """What is not there. Raises ConfigError for what is there and of another kind."""
        wanted = [(address, *made) for address, place in places.items() for made in place.made()]
        kinds = await link.run(*(("TYPE", stream) for _, stream, _, _ in wanted)) if wanted else []
        groups = await link.run(*(("XINFO", "GROUPS", stream) for _, stream, _, _ in wanted)) if wanted else []
        missing = []
        for (address, stream, group, start), kind, found in zip(wanted, kinds, groups, strict=True):
            for reply in (kind, found):
                if isinstance(reply, Exception) and kind != b"none":
                    if kind in (b"stream", reply):
                        raise errors.translate(reply, f"declare {address}") from reply
                    raise ConfigError(
                        f"{address}: the key {stream!r} is a {kind.decode()} on Redis, not a stream; rename the channel, or that key"
                    )
            there = set() if kind == b"none" else {flat[1].decode() for flat in found}
            self._check_kind(places[address], stream, group, there)
            if kind == b"none" or (group and group not in there):
                missing.append((address, stream, group, start))
        return missing

    def _check_kind(self, place: topology.Place, stream: str, group: str, there: set[str]) -> None:
        """A queue deletes what was handled: other groups on its stream would miss it."""
        shared = not place.group or stream in place.topic
        others = there - {group}
        if not shared and others:
            raise ConfigError(
                f"{place.address}: the stream {stream!r} has other consumer groups ({', '.join(sorted(others))}), and a queue deletes "
                "what it has handled; declare it as a topic with groups, or give the queue another name"
            )
        if shared and "unibus" in others:
            raise ConfigError(f"{place.address}: the stream {stream!r} is a queue on Redis; one name is one kind")

    def _place(self, address: Address) -> topology.Place:
        if isinstance(address, Inbox):
            return topology.inbox(address.name)
        return place_of(self._places, address)

    # -- sending ----------------------------------------------------------------------------------------------

    def _pack(self, batch: Sequence[Outgoing]) -> tuple[list[Any], str, list[list[Any]]]:
        """For the scripts: all keys, the kind of each destination, and of each message its first key and what follows."""
        keys: list[Any] = []
        kinds = ""
        known: dict[tuple[Address, int], int] = {}
        packed = []
        now = self._clock.time()
        last: Address | None = None
        place: topology.Place | None = None
        for outgoing in batch:
            if place is None or outgoing.to is not last:
                last, place = outgoing.to, self._place(outgoing.to)
            level = min(outgoing.message.priority or 0, len(place.streams) - 1)
            at = known.get((last, level))
            if at is None:
                at = known[last, level] = len(keys) + 1
                keys += (place.streams[level], *place.delayed)
                kinds += place.kind
            fields = wire.encode(outgoing, now)
            packed.append([at, wire.delay(outgoing, now), len(fields), *fields])
        return keys, kinds, packed

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        await asyncio.sleep(0)  # a sender in a loop must not starve the consumers; others join the next batch meanwhile
        link = self._linked()
        keys, kinds, packed = self._pack(batch)
        arguments: list[Any] = [kinds]
        for one in packed:
            arguments += one
        results: list[TransportError | None] = [None] * len(batch)
        try:
            bad = await link.script(scripts.SEND, keys, arguments, "send", timeout)
        except ConnectionLost:
            raise
        except TransportError as error:  # of the script as a whole
            return [error] * len(batch)
        for i, why in zip(bad[::2], bad[1::2], strict=True):
            to = batch[i].to
            refused = errors.refusal(why.decode(), f"send to {to}")
            results[i] = Unroutable(f"inbox {to.name!r} is gone") if isinstance(to, Inbox) else refused
        if any(outgoing.not_before for outgoing in batch):
            for subscription in self._subscriptions:
                subscription.nudge()
        return results

    # -- receiving --------------------------------------------------------------------------------------------

    async def subscribe(self, source: Source) -> Subscription:
        link = self._linked()
        address = source.address
        if source.start != "new" and not self._settings.retention:
            raise Unsupported(f"{address}: start={source.start!r}, but topics keep nothing; set redis.retention")
        token = secrets.token_hex(8)
        consumer = f"{self._endpoint.service}.{self._endpoint.instance}.{token}"
        life = 0
        if isinstance(address, Inbox):
            place = topology.inbox(inbox_name(self._endpoint.prefix, self._endpoint.service, token, wire.SEPARATOR))
            life = round(INBOX_LIFE * 1000)
        elif isinstance(address, Group) and address.ephemeral:
            topic = self._place(address.topic)
            place = topology.private(address, topic, f"{self._endpoint.prefix}{address.name}.{token}")
            if not await link.call("EXISTS", topic.streams[0]):
                raise NotFound(f"{address.topic} does not exist on Redis; declare it")
        else:
            place = self._place(address)
        if source.browse:
            return Browser(source, place, link, self._hooks)
        reads = await self._open(self._host)
        subscription = RedisSubscription(source, place, consumer, link, reads, self._hooks)
        self._subscriptions.add(subscription)
        try:
            if isinstance(address, Inbox):
                subscription.address = Inbox(place.streams[0])
            if life or place.group.startswith(topology.PRIVATE):
                for stream, group, start in place.made():
                    await link.script(scripts.MAKE, [stream], (group, start, consumer, life), f"subscribe to {address}")
            elif not isinstance(address, Inbox):
                await self.backlog(address)  # raises NotFound
            await subscription.start()
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        link = self._linked()
        place = self._place(address)
        work = "".join("0" if lane in place.topic else "1" for lane in place.lanes)
        arguments = (place.group, round(self._settings.lease * 1000), work)
        ready, held, age, exact = await link.script(scripts.BACKLOG, place.lanes, arguments, f"backlog of {address}")
        return Backlog(ready, held, None if age < 0 else age / 1000, bool(exact))

    async def check(self) -> Health:
        return Health(self._link is not None and self._link.lost is None)

    def reply_to(self, text: str) -> Address:
        return wire.reply_address(text)
