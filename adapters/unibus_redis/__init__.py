"""The Redis Streams adapter of unibus."""

from unibus_redis.adapter import RedisAdapter
from unibus_redis.wire import Entry

__all__ = ["Entry", "RedisAdapter"]
