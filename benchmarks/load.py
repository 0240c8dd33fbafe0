"""What every contestant sends, and how."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

BODY = b'{"order":"4711","lines":[' + b'{"sku":"a","n":1},' * 12 + b'{"end":0}]}'
BODY = BODY.ljust(256, b" ")
IN_FLIGHT = 500
TENANT = {"tenant": "acme"}  # one header of the user's own, where a case has it


class Miscount(AssertionError):
    """Messages are missing or came twice: then no figure of this run means anything."""


async def flood(send: Callable[[], Awaitable[object]], messages: int, in_flight: int = IN_FLIGHT) -> None:
    """`in_flight` callers, each awaiting its own message before it sends the next one."""

    async def work(share: int) -> None:
        for _ in range(share):
            await send()

    each, more = divmod(messages, in_flight)
    async with asyncio.TaskGroup() as tasks:
        for i in range(min(in_flight, messages)):
            tasks.create_task(work(each + (i < more)))
