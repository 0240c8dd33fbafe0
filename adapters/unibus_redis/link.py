"""Connections, each used by many at once: calls are written as they come, and answered in order.

Not the client's pool: there a call that is cancelled costs its connection, and with a blocking read that is cut off the server
gives entries to nobody. Here the answer of a call whose caller has left is read all the same. hiredis packs and parses.
"""

from __future__ import annotations

import asyncio
import socket
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from hiredis import Reader, pack_command
from redis.crc import key_slot

from unibus.adapter import Url
from unibus.errors import AuthenticationFailed, ConfigError, ConnectionLost, Timeout
from unibus.translation import first_that_answers
from unibus_redis import errors
from unibus_redis.config import Login, Settings
from unibus_redis.scripts import ALL, Script

Reply = Any  # bytes, int, None, a list of these, or an error
TIMEOUT = 10.0  # of a call, unless it has its own
_SILENCE = 20  # seconds after which a peer that does not answer is dead, as the operating system sees it
_LOOK = 2.5  # seconds
_LOOKS = 4  # without a byte while an answer is due: the peer hangs. Looks, since a process that stood still itself has heard nothing
_OLDEST = (7, 0)
_SECTIONS = ("server", "memory", "persistence", "replication", "cluster")


class Link(asyncio.Protocol):
    """One connection."""

    _transport: asyncio.Transport
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, login: Login, host: str, port: int, waits: bool = False) -> None:
        """`waits`: for its replicas, which may take long and is no silence."""
        self.login, self.host, self.port, self._waits = login, host, port, waits
        self.where = f"{host}:{port}"
        self.lost: ConnectionLost | None = None
        self.number = 0  # by which the server knows the connection
        self.version: tuple[int, ...] = ()
        self.sending = self  # to the same server, for what waits for its replicas; it ends with this one
        self._silent = 0  # looks
        self._ended = asyncio.get_running_loop().create_future()
        self._reader = Reader()
        self._waiting: deque[tuple[asyncio.Future[list[Reply]], int]] = deque()
        self._replies: list[Reply] = []

    @classmethod
    async def open(cls, login: Login, host: str, port: int, *, waits: bool = False) -> Link:
        """Connected and logged in. Raises the error of that host."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(login.timeout):
                _, link = await loop.create_connection(lambda: cls(login, host, port, waits), host, port, ssl=login.tls)
                try:
                    for reply in await link.run(*login.commands()):
                        if isinstance(reply, Exception):
                            raise reply
                        link.number = reply
                except BaseException:
                    await link.close()
                    raise
        except Exception as exc:
            raise errors.connecting(exc, f"{host}:{port}") from exc
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        _keep_alive(transport.get_extra_info("socket"))
        if not self._waits:
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        """A server that hangs keeps its connections, and its system acknowledges all it is sent: only the missing answer tells."""
        if self.sending is not self and self.sending._waiting and not self._waiting:
            self._ask()
        self._silent = self._silent + 1 if self._waiting else 0
        if self._silent > _LOOKS:
            self.lose(ConnectionLost(f"Redis at {self.where} has answered nothing for {_LOOKS * _LOOK:g} s"))
        else:
            self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _ask(self) -> None:
        """Whether the server is well, for a connection that waits for its replicas."""
        self._transport.write(pack_command(("PING",)))
        answer: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda it: it.exception())  # nobody waits for it: that something comes is enough
        self._waiting.append((answer, 1))

    def data_received(self, data: bytes) -> None:
        self._silent = 0
        reader, replies, waiting = self._reader, self._replies, self._waiting
        reader.feed(data)
        while (reply := reader.gets()) is not False:
            replies.append(reply)
            if not waiting:
                self.lose(ConnectionLost(f"Redis at {self.where} sent what nobody asked for"))
                return
            if len(replies) == waiting[0][1]:
                future, _ = waiting.popleft()
                if not future.done():
                    future.set_result(replies)
                self._replies = replies = []

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(exc or ConnectionLost(f"Redis at {self.where} has closed the connection"))
        self._ended.set_result(None)

    async def run(self, *commands: tuple[Any, ...], timeout: float = TIMEOUT) -> list[Reply]:
        """The replies in order; an error reply is among them, not raised. Raises ConnectionLost, Timeout."""
        if self.lost is not None:
            raise self.lost
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._transport.write(b"".join(map(pack_command, commands)))
        self._waiting.append((future, len(commands)))
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise Timeout(f"no answer from Redis at {self.where} within {timeout:g} s") from None

    async def call(self, *command: Any) -> Reply:
        """The reply of one command. Raises what it answered."""
        (reply,) = await self.run(command)
        if isinstance(reply, Exception):
            raise errors.translate(reply, f"{command[0]} at {self.where}") from reply
        return reply

    async def script(
        self,
        script: Script,
        keys: Sequence[Any],
        arguments: Sequence[Any],
        doing: str,
        timeout: float = TIMEOUT,
        replicas: int = 0,
    ) -> Reply:
        """The reply of a script, once so many replicas have what it did. Raises what it answered; Timeout."""
        commands: list[tuple[Any, ...]] = [("EVALSHA", script.sha, len(keys), *keys, *arguments)]
        if replicas:
            commands.append(("WAIT", replicas, max(1, round(timeout * 1000))))  # 0 would be for ever
        replies = await self.run(*commands, timeout=timeout)
        if isinstance(replies[0], Exception) and str(replies[0]).startswith("NOSCRIPT"):
            await self.load()  # the server has restarted, or flushed them; nothing was done
            replies = await self.run(*commands, timeout=timeout)
        for reply in replies:
            if isinstance(reply, Exception):
                raise errors.translate(reply, doing) from reply
        if replicas and replies[1] < replicas:
            raise Timeout(
                f"{doing}: Redis at {self.where} has it, but within {timeout:g} s {replies[1]} replicas of the {replicas} that "
                "redis.wait_replicas asks for"
            )
        return replies[0]

    async def load(self) -> None:
        """Make the server know the scripts."""
        for reply in await self.run(*(("SCRIPT", "LOAD", script.source) for script in ALL)):
            if isinstance(reply, Exception):
                raise errors.translate(reply, "load the scripts") from reply

    async def info(self) -> dict[str, str]:
        text = (await self.call("INFO", *_SECTIONS)).decode(errors="replace")
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))

    def lose(self, exc: Exception) -> None:
        """The connection is over: all that wait are told."""
        if self.lost is None:
            error = errors.translate(exc, f"the connection to Redis at {self.where}")
            self.lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error))
            self.lost.__cause__ = None if exc is error else exc
        while self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():
                future.set_exception(self.lost)
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        if self.sending is not self:
            self.sending.lose(exc)

    async def close(self) -> None:
        """Idempotent."""
        self.lose(ConnectionLost(f"the connection to Redis at {self.where} is closed"))
        await self._ended
        if self.sending is not self:
            await self.sending.close()


class Links:
    """To every server that takes messages: the one that answers and may be written to, or all masters of a cluster."""

    def __init__(self, url: Url, given: Settings) -> None:
        self._hosts = url.targets(26379 if given.sentinel else 6379)
        self._sentinel = given.sentinel
        self._allow_eviction = given.allow_eviction
        self._apart = bool(given.wait_replicas)  # WAIT holds up all that comes behind it on its connection
        self.cluster = False
        self.all: list[Link] = []
        self._last_slots: list[int] = []  # parallel to `_by_slot`
        self._by_slot: list[Link] = []

    async def open(self, login: Login) -> str:
        """The version of the servers. Raises what every host answered, or what makes one unfit."""

        async def use(host: tuple[str, int]) -> str:
            try:
                return await self._adopt(login, *(await self._master(login, *host) if self._sentinel else host))
            except BaseException:
                await self.close()
                raise

        return await first_that_answers(self._hosts, use)

    async def _master(self, login: Login, host: str, port: int) -> tuple[str, int]:
        """As this sentinel sees it. Sentinels have users of their own, or none at all."""
        login = replace(login, database=0)
        try:
            link = await Link.open(login, host, port)
        except AuthenticationFailed:
            link = await Link.open(replace(login, username=None, password=None), host, port)
        try:
            found = await link.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._sentinel)
        finally:
            await link.close()
        if found is None:
            raise ConfigError(f"redis.sentinel: the sentinel at {link.where} knows no master named {self._sentinel!r}")
        return found[0].decode(), int(found[1])

    async def _adopt(self, login: Login, host: str, port: int) -> str:
        link, info = await self._add(login, host, port)
        self._last_slots, self._by_slot = [0], [link]
        self.cluster = info.get("cluster_enabled") == "1"
        if self.cluster:
            slots = sorted(await link.call("CLUSTER", "SLOTS"))
            self.all.remove(link)  # it may be a replica
            await link.close()
            masters: dict[tuple[str, int], Link] = {}
            for _, _, (name, at, *_), *_ in slots:
                if (known := (name.decode() or host, at)) not in masters:
                    masters[known], _ = await self._add(login, *known)
            self._by_slot = [masters[name.decode() or host, at] for _, _, (name, at, *_), *_ in slots]
            self._last_slots = [last for _, last, *_ in slots]
        elif info.get("role") == "slave":
            raise ConnectionLost(f"Redis at {link.where} is a replica, which takes no messages")
        return info["redis_version"]

    async def _add(self, login: Login, host: str, port: int) -> tuple[Link, dict[str, str]]:
        link = await Link.open(login, host, port)
        self.all.append(link)
        info = await link.info()
        version = info["redis_version"]
        link.version = tuple(int(part) for part in version.split(".")[:2])
        if link.version < _OLDEST:
            raise ConfigError(f"Redis at {link.where} is {version}; 7.0 or newer is needed")
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and not self._allow_eviction:
            raise ConfigError(
                f"Redis at {link.where} has maxmemory-policy {policy}: when memory is short it deletes messages that nobody has "
                "read; set it to noeviction, or accept the loss with redis.allow_eviction = true"
            )
        await link.load()
        if self._apart:
            link.sending = await Link.open(login, host, port, waits=True)
        return link, info

    def slot(self, key: str) -> int:
        """Keys of one slot can be in one script. 0 for all where there is no cluster."""
        return key_slot(key.encode()) if self.cluster else 0

    def of(self, key: str) -> Link:
        """Of the server that has the key. Raises ConnectionLost."""
        at = bisect_left(self._last_slots, self.slot(key))
        if at == len(self._by_slot):
            raise ConnectionLost("not connected to Redis" if not self.all else f"no master of the cluster has {key!r}")
        link = self._by_slot[at]
        if link.lost is not None:
            raise link.lost
        return link

    async def close(self) -> None:
        links, self.all, self._last_slots, self._by_slot = self.all, [], [], []
        for link in links:  # at once: whoever is cancelled below does not come back
            link.lose(ConnectionLost(f"the connection to Redis at {link.where} is closed"))
        for link in links:
            await link.close()


def _keep_alive(sock: socket.socket) -> None:
    """So that a peer that vanished is noticed, also while nothing is sent. Names that this system does not know are left out."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": _SILENCE * 1000}
    for name, value in wanted.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
