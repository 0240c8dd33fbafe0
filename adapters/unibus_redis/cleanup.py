"""For the contract suite: delete all keys of a prefix. Nothing else calls this, and no service needs the right to."""

from __future__ import annotations

import re
from collections.abc import Collection

from unibus.driver import linked
from unibus_redis.adapter import RedisAdapter

_AT_ONCE = 500


async def delete(adapter: RedisAdapter, prefix: str, _names: Collection[str], _delays: Collection[float]) -> list[str]:
    """Streams, and what belongs to them: their names are hash tags, in braces."""
    client = linked(adapter.native, "Redis")
    plain = re.sub(r"([\\*?\[\]])", r"\\\1", prefix)
    found = set()
    for pattern in (f"{plain}*", f"{{{plain}*"):
        found |= {key async for key in client.scan_iter(pattern, count=_AT_ONCE)}
    for key in found:
        await client.execute_command("UNLINK", key)
    return sorted(key.decode(errors="replace") if isinstance(key, bytes) else str(key) for key in found)
