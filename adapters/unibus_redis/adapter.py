"""Redis Streams behind the SPI."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from redis.asyncio import Redis, RedisCluster

from unibus.adapter import Backlog, Endpoint, Health, Inspected, Outgoing, Results, Source, Subscription, Topology
from unibus.channel import Address, Group, Inbox, Queue
from unibus.driver import all_there, by, nobody, place_of
from unibus.errors import ConfigError, ConnectionLost, NotFound, TransportError, Unsupported
from unibus.inboxes import inbox_name
from unibus_redis import config, errors, scripts, topology, wire
from unibus_redis.capabilities import known
from unibus_redis.early import Early
from unibus_redis.link import Link, Links
from unibus_redis.subscription import INBOX_LIFE, Browser, RedisSubscription
from unibus_redis.topology import Place

log = logging.getLogger("unibus.redis")


class RedisAdapter:
    """One connection for all that is answered at once (of a cluster: to each master), and one for each subscription, whose
    reads wait.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.clock = endpoint.clock
        self.settings = config.settings(endpoint.settings)
        config.database(endpoint.url)
        self._login: config.Login | None = None
        self.links = Links(endpoint.url, self.settings)
        self._client: Redis | RedisCluster | None = None
        self._places: dict[Address, topology.Place] = {}
        self.subscriptions: set[RedisSubscription] = set()
        self._marks = itertools.count(1)  # of messages, to know one that is sent again
        self._producer = secrets.token_hex(8)
        self._once: tuple[str, str] | None = None  # before a message, where the server can tell one that is sent again
        self.orphans: dict[Address, list[str]] = {}  # consumers whose connection was lost, and with it what they held
        self._set_capabilities(None)

    def _set_capabilities(self, version: str | None) -> None:
        self.capabilities = known(version, lease=self.settings.lease, retention=self.settings.retention)

    @property
    def native(self) -> Redis | RedisCluster | None:
        """redis-py's client with connections of its own, or None while not connected."""
        if self._client is None and self._login is not None and self.links.all:
            link = self.links.all[0]
            self._client = config.client(self.settings, self._login, link.host, link.port, cluster=self.links.cluster)
        return self._client

    # -- the link ---------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """To the first host that answers and may be written to, to the master of a sentinel, to all masters of a cluster."""
        await self.close()
        url, given = self._endpoint.url, self.settings
        name = f"{self._endpoint.service}-{self._endpoint.instance}"
        self._login = await asyncio.to_thread(config.login, url, given, name)
        self._set_capabilities(await self.links.open(self._login))
        once = all(link.version >= (8, 6) for link in self.links.all)
        self._once = ("IDMP", self._producer) if once else None

    async def close(self) -> None:
        for subscription in list(self.subscriptions):
            await subscription.close()
        self.subscriptions.clear()
        await self.links.close()
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _linked(self, place: Place) -> Link:
        """To the server that has the place. Raises ConnectionLost."""
        return self.links.of(place.first)

    # -- channels ---------------------------------------------------------------------------------------------

    async def declare(self, topology_: Topology) -> None:
        places = topology.plan(topology_, self.clock.time(), self.settings.retention)
        if topology_.mode != "assume":
            missing = await self._missing(places)
            if topology_.mode == "verify":
                all_there("Redis", (f"{place.address} ({stream})" for place, stream, _, _ in missing))
            for place, stream, group, start in missing:
                arguments = (group, start or "$", "", 0)
                if await self._linked(place).script(scripts.MAKE, [stream], arguments, f"declare {place.address}"):
                    log.info("created %s: stream %r%s", place.address, stream, f", group {group!r}" if group else "")
        self._places = places

    async def inspect(self, topology_: Topology) -> list[Inspected]:
        places = topology.plan(topology_, self.clock.time(), self.settings.retention)
        missing = {(place.address, stream, group) for place, stream, group, _ in await self._missing(places)}
        found = []
        for link in self.links.all:
            name = f"Redis {self.capabilities.version}{f' at {link.where}' if self.links.cluster else ''}"
            found.append(Inspected("server", name, True, risk=self._risk(await link.info())))
        for address, place in places.items():
            for stream, group, _ in place.made():
                name = f"{stream}, group {group}" if group else stream
                exists = (address, stream, group) not in missing
                found.append(Inspected("stream", name, exists, f"+xgroup|create on {stream}", address))
        # What is delayed waits in one set for a channel and all of its groups. It is made by the first delay.
        for place in places.values():
            if place.tag == place.first:
                count = await self._linked(place).call("ZCARD", place.delayed[0])
                found.append(Inspected("delayed set", place.delayed[0], True, messages=count))
        return found

    async def _missing(self, places: dict[Address, Place]) -> list[tuple[Place, str, str, str]]:
        looks = [self._look(place, *made) for place in places.values() for made in place.made()]
        return [found for found in await asyncio.gather(*looks) if found]

    async def _look(self, place: Place, stream: str, group: str, start: str) -> tuple[Place, str, str, str] | None:
        """What is not there. Raises ConfigError for what is there and of another kind."""
        kind, found = await self._linked(place).run(("TYPE", stream), ("XINFO", "GROUPS", stream))
        for reply in (kind, found):
            if isinstance(reply, Exception) and kind != b"none":
                if kind in (b"stream", reply):
                    raise errors.translate(reply, f"declare {place.address}") from reply
                raise ConfigError(
                    f"{place.address}: the key {stream!r} is a {kind.decode()} on Redis, not a stream; rename the channel, or that key"
                )
        there = set() if kind == b"none" else {flat[1].decode() for flat in found}
        shared = not place.group or stream in place.topic
        others = there - {group}
        if not shared and others:  # a queue deletes what was handled: other groups on its stream would miss it
            raise ConfigError(
                f"{place.address}: the stream {stream!r} has other consumer groups ({', '.join(sorted(others))}), and a queue deletes "
                "what it has handled; declare it as a topic with groups, or give the queue another name"
            )
        if shared and "unibus" in others:
            raise ConfigError(f"{place.address}: the stream {stream!r} is a queue on Redis; one name is one kind")
        return None if kind != b"none" and (not group or group in there) else (place, stream, group, start)

    def _risk(self, info: dict[str, str]) -> str:
        """Of what `Link.info` says: by what messages may be lost."""
        risks = []
        if info.get("aof_enabled") == "0":
            risks.append("appendonly is off: what came since the last snapshot is lost with the server")
        if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
            risks.append(f"maxmemory-policy {policy}: when memory is short it deletes messages that nobody has read")
        if info.get("connected_slaves", "0") != "0" and not self.settings.wait_replicas:
            risks.append(
                "replication is asynchronous: a failover loses confirmed messages that had not reached the replica; set "
                "redis.wait_replicas"
            )
        return "; ".join(risks)

    def _place(self, address: Address) -> Place:
        return topology.inbox(address.name) if isinstance(address, Inbox) else place_of(self._places, address)

    # -- sending ----------------------------------------------------------------------------------------------

    def slot(self, address: Address) -> int:
        """Addresses of one slot can be in one script."""
        return self.links.slot(self._place(address).first)

    def pack(self, batch: Sequence[Outgoing], source: str) -> tuple[list[Any], str, list[list[Any]]]:
        """For PUT: all keys, the kind of each destination, and the words of each message."""
        keys: list[Any] = [source]
        kinds = ""
        known: dict[tuple[Address, int], int] = {}
        packed = []
        now = self.clock.time()
        last: tuple[Address, int | None] | None = None  # most of a batch go to one place, which is looked up once
        at = 0
        for outgoing in batch:
            if last is None or outgoing.to is not last[0] or outgoing.message.priority != last[1]:
                last = outgoing.to, outgoing.message.priority
                place = self._place(outgoing.to)
                level = min(outgoing.message.priority or 0, len(place.streams) - 1)
                at = known.setdefault((outgoing.to, level), len(keys) + 1)
                if at > len(keys):
                    keys += (place.streams[level], *place.delayed)
                    kinds += place.kind
            fields = wire.encode(outgoing, now)
            if self._once and outgoing.origin is None:  # a copy is meant to be there twice: its original, and itself
                if outgoing.mark is None:
                    outgoing.mark = next(self._marks)
                packed.append(
                    [at, wire.delay(outgoing, now), len(fields) + 4, *self._once, outgoing.mark, "*", *fields]
                )
            else:
                packed.append([at, wire.delay(outgoing, now), len(fields) + 1, "*", *fields])
        return keys, kinds, packed

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        await asyncio.sleep(0)  # a sender in a loop must not starve the consumers; others join the next batch meanwhile
        parts = list(by(range(len(batch)), lambda i: self.slot(batch[i].to)).values()) if self.links.cluster else []
        if len(parts) < 2:
            return await self._send(batch, timeout)
        found = await asyncio.gather(*(self._send([batch[i] for i in part], timeout) for part in parts))
        results = {
            i: error for part, errors in zip(parts, found, strict=True) for i, error in zip(part, errors, strict=True)
        }
        return [results[i] for i in range(len(batch))]

    async def _send(self, batch: Sequence[Outgoing], timeout: float) -> list[TransportError | None]:
        place = self._place(batch[0].to)
        keys, kinds, packed = self.pack(batch, place.first)
        arguments: list[Any] = ["", "", "", kinds]
        for one in packed:
            arguments += one
        results: list[TransportError | None] = [None] * len(batch)
        try:
            link, replicas = self._linked(place).sending, self.settings.wait_replicas
            bad = await link.script(scripts.PUT, keys, arguments, "send", timeout, replicas)
        except ConnectionLost:
            raise
        except TransportError as error:  # of the script as a whole
            return [error] * len(batch)
        for i, why in zip(bad[::2], bad[1::2], strict=True):
            to = batch[i].to
            refused = errors.refusal(why.decode(), f"send to {to}")
            results[i] = nobody(to) if isinstance(to, Inbox) else refused
        if any(outgoing.not_before for outgoing in batch):
            for subscription in self.subscriptions:
                subscription.nudge()
        return results

    # -- receiving --------------------------------------------------------------------------------------------

    async def subscribe(self, source: Source) -> Subscription:
        address = source.address
        if source.start != "new" and not self.settings.retention:
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
            if not await self._linked(place).call("EXISTS", topic.streams[0]):
                raise NotFound(f"{address.topic} does not exist on Redis; declare it")
        else:
            place = self._place(address)
        link = self._linked(place)
        if source.browse:
            return Browser(self, source, place, link)
        made = Early if source.early else RedisSubscription
        subscription = made(self, source, place, consumer, link, await Link.open(link.login, link.host, link.port))
        self.subscriptions.add(subscription)
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
        place = self._place(address)
        work = "".join("0" if lane in place.topic else "1" for lane in place.lanes)
        arguments = (place.group, round(self.settings.lease * 1000), work)
        found = await self._linked(place).script(scripts.BACKLOG, place.lanes, arguments, f"backlog of {address}")
        ready, held, age, exact = found
        return Backlog(ready, held, None if age < 0 else age / 1000, bool(exact))

    async def check(self) -> Health:
        """At its maxmemory a server takes no message until there is room."""
        links, wanted = self.links.all, self.settings.wait_replicas
        if not links or any(one.lost is not None for link in links for one in (link, link.sending)):
            return Health(False)
        for link in links:
            info = await link.info()
            used, limit = int(info["used_memory"]), int(info["maxmemory"])
            if 0 < limit <= used:
                return Health(True, f"Redis at {link.where} uses {used} bytes, and its maxmemory is {limit}")
            if (count := int(info["connected_slaves"])) < wanted:
                return Health(
                    True, f"Redis at {link.where} has {count} replicas, and redis.wait_replicas asks for {wanted}"
                )
        return Health(True)

    def reply_to(self, text: str) -> Address:
        return wire.reply_address(text)
