"""The Redis Streams adapter of unibus.

The client library is imported with the adapter, not with the package: plans and profiles need none.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unibus_redis.adapter import RedisAdapter
    from unibus_redis.wire import Entry

__all__ = ["Entry", "RedisAdapter"]


def __getattr__(name: str) -> Any:
    if name == "RedisAdapter":
        from unibus_redis.adapter import RedisAdapter

        return RedisAdapter
    if name == "Entry":
        from unibus_redis.wire import Entry

        return Entry
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
