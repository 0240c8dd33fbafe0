"""A store in Redis (extra `redis`): for handlers whose effects are not in a database that the store could share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

try:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
except ImportError as error:
    raise ImportError("unibus.stores.redis needs redis-py: pip install 'unibus[redis]'") from error

from unibus.clock import Clock
from unibus.errors import ConfigError
from unibus.idempotency import KEEP, LEASE, Key, Standing, StoreUnavailable
from unibus.stores.checks import seconds

PREFIX = "unibus:handled:"
DONE = "done"  # no token is spelt like that
TIMEOUT = 5.0  # seconds for an answer

# One key a message: its value is the token of who is at it, or DONE. Redis removes it when its time is over.
BEGIN = """
local value = redis.call('GET', KEYS[1])
if value == 'done' then return 'done' end
if value and value ~= ARGV[1] then return 'taken' end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 'ours'
"""
RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
FINISH = """
local value = redis.call('GET', KEYS[1])
if value and value ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], 'done', 'PX', ARGV[2])
return 1
"""
FREE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class RedisStore:
    """Remembers in Redis, one key a message, in the time of the server.

    `url`: redis://, rediss:// or unix://, as redis-py reads it. `lease`, `keep`: seconds, see `unibus.stores.Store`. The marks are as
    safe as the server keeps its data: with `maxmemory-policy noeviction` and an append-only file; a failover may forget the newest.
    """

    def __init__(self, url: str, *, lease: float = LEASE, keep: float = KEEP) -> None:
        seconds("RedisStore", lease=lease, keep=keep)
        parts = urlsplit(url)
        if parts.scheme not in {"redis", "rediss", "unix"}:
            raise ConfigError(f"RedisStore: the URL begins with redis://, rediss:// or unix://, not {parts.scheme!r}")
        self.lease = lease
        self.keep = keep
        self._url = url
        self._place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        self._users = 0
        self._client: Redis | None = None

    def __repr__(self) -> str:
        return f"RedisStore({self._place!r})"

    def open(self, clock: Clock) -> None:
        self._users += 1
        if self._client is None:
            try:
                # Its own retries are off: who asks decides when to ask again.
                self._client = Redis.from_url(
                    self._url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)
                )
            except (ValueError, TypeError) as error:  # its text may hold the URL
                kind = type(error).__name__
            else:
                self._scripts = {name: self._client.register_script(name) for name in (BEGIN, RENEW, FINISH, FREE)}
                return
            raise ConfigError(f"RedisStore: redis-py can't read the URL of {self._place} ({kind})")

    async def close(self) -> None:
        self._users -= 1
        if not self._users and self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def create(self) -> None:
        """There is nothing to make; that it answers is worth knowing at start."""
        await self.verify()

    async def verify(self) -> None:
        async with self._asked() as client:
            await client.ping()

    async def begin(self, key: Key, token: str) -> Standing:
        async with self._asked():
            answer = await self._scripts[BEGIN](keys=[_name(key)], args=[token, _ms(self.lease)])
        return Standing(answer.decode() if isinstance(answer, bytes) else answer)

    async def renew(self, keys: Sequence[Key], token: str) -> Sequence[bool]:
        async with self._asked() as client, client.pipeline(transaction=False) as pipeline:
            for key in keys:
                await self._scripts[RENEW](keys=[_name(key)], args=[token, _ms(self.lease)], client=pipeline)
            return [bool(answer) for answer in await pipeline.execute()]

    async def finish(self, key: Key, token: str) -> bool:
        async with self._asked():
            return bool(await self._scripts[FINISH](keys=[_name(key)], args=[token, _ms(self.keep)]))

    async def free(self, key: Key, token: str) -> None:
        async with self._asked():
            await self._scripts[FREE](keys=[_name(key)], args=[token])

    async def tidy(self) -> None:
        """Redis does it."""

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[Redis]:
        if self._client is None:
            raise StoreUnavailable(f"{self!r} is closed")
        try:
            yield self._client
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"{self!r}: {type(error).__name__}: {error}") from error


def _name(key: Key) -> str:
    place, message_id = key
    return f"{PREFIX}{place}:{message_id}"


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
