"""One connection, used by many at once: calls are written as they come, and answered in order.

Not the client's pool: there a call that is cancelled costs its connection, and with a blocking read that is cut off the server
gives entries to nobody. Here the answer of a call whose caller has left is read all the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any

from hiredis import pack_command
from redis import exceptions as native
from redis.asyncio.connection import AbstractConnection

from unibus.errors import ConnectionLost, Timeout, TransportError, UnibusError
from unibus_redis import errors
from unibus_redis.scripts import ALL, Script

Reply = Any  # bytes, int, None, a list of these, or an error
TIMEOUT = 10.0  # of a call, unless it has its own
_CLOSE_TIMEOUT = 5.0


class Link:
    def __init__(self, connection: AbstractConnection, where: str) -> None:
        self.lost: ConnectionLost | None = None
        self.number = 0  # by which the server knows the connection
        self._connection = connection
        self._where = where
        self._waiting: deque[tuple[asyncio.Future[list[Reply]], int]] = deque()
        self._writes: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, kind: type[AbstractConnection], arguments: dict[str, Any], where: str, timeout: float) -> Link:
        """Connected and logged in. Raises the error of that host."""
        connection = kind(**arguments)
        link = cls(connection, where)
        try:
            async with asyncio.timeout(timeout):
                await connection.connect()  # type: ignore[no-untyped-call]  # the client leaves it untyped
                link._reader = asyncio.create_task(link._read(), name="unibus redis")
                link.number = await link.call("CLIENT", "ID")
        except Exception as exc:
            await link.close()
            raise errors.connecting(exc, where) from exc
        except BaseException:
            await link.close()
            raise
        return link

    async def run(self, *commands: tuple[Any, ...], timeout: float = TIMEOUT) -> list[Reply]:
        """The replies in order; an error reply is among them, not raised. Raises ConnectionLost, Timeout."""
        if self.lost is not None:
            raise self.lost
        future: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        # A task of its own: a caller that is cancelled must not leave half a command on the wire.
        task = asyncio.get_running_loop().create_task(self._write(commands, future))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            raise Timeout(f"no answer from Redis at {self._where} within {timeout:g} s") from None

    async def call(self, *command: Any) -> Reply:
        """The reply of one command. Raises what it answered."""
        (reply,) = await self.run(command)
        if isinstance(reply, Exception):
            raise errors.translate(reply, f"{command[0]} at {self._where}") from reply
        return reply

    async def script(
        self, script: Script, keys: Sequence[Any], arguments: Sequence[Any], doing: str, timeout: float = TIMEOUT
    ) -> Reply:
        """The reply of a script. Raises what it answered."""
        command = ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        (reply,) = await self.run(command, timeout=timeout)
        if isinstance(reply, native.NoScriptError):  # the server has restarted, or flushed them; nothing was done
            await self.load()
            (reply,) = await self.run(command, timeout=timeout)
        if isinstance(reply, Exception):
            raise errors.translate(reply, doing) from reply
        return reply

    async def load(self) -> None:
        """Make the server know the scripts."""
        for reply in await self.run(*(("SCRIPT", "LOAD", script.source) for script in ALL)):
            if isinstance(reply, Exception):
                raise errors.translate(reply, "load the scripts") from reply

    async def _write(self, commands: Sequence[tuple[Any, ...]], future: asyncio.Future[list[Reply]]) -> None:
        if self.lost is not None:
            future.set_exception(self.lost)
            return
        self._waiting.append((future, len(commands)))
        try:
            packed = b"".join(map(pack_command, commands))
            await self._connection.send_packed_command(packed)  # written before the first await inside
        except Exception as exc:
            self.lose(errors.translate(exc, f"write to Redis at {self._where}"))

    async def _read(self) -> None:
        replies: list[Reply] = []
        while True:
            try:
                reply = await self._connection.read_response()
            except native.ResponseError as exc:
                reply = exc
            except Exception as exc:
                self.lose(errors.translate(exc, f"read from Redis at {self._where}"))
                return
            if not self._waiting:
                self.lose(ConnectionLost(f"Redis at {self._where} sent what nobody asked for"))
                return
            replies.append(reply)
            if len(replies) == self._waiting[0][1]:
                future, _ = self._waiting.popleft()
                if not future.done():
                    future.set_result(replies)
                replies = []

    def lose(self, error: UnibusError) -> None:
        """The connection is over: all that wait are told."""
        if self.lost is None:
            self.lost = error if isinstance(error, ConnectionLost) else ConnectionLost(str(error))
            self.lost.__cause__ = error.__cause__
        while self._waiting:
            future, _ = self._waiting.popleft()
            if not future.done():
                future.set_exception(self.lost)

    async def close(self) -> None:
        """Idempotent."""
        self.lose(ConnectionLost(f"the connection to Redis at {self._where} is closed"))
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            self._reader = None
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await self._connection.disconnect()
        except (OSError, TimeoutError, native.RedisError, TransportError):
            await self._connection.disconnect(nowait=True)
