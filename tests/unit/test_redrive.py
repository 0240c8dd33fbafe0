"""Redriving, on a broker that only estimates how many dead letters there are."""

import asyncio
import dataclasses
from typing import Any
from unittest.mock import patch

from tests.unit.core_lab import ORDERS, lab, later, make_bus, spy_of, until

from unibus import Queue, RetryPolicy, deadletter
from unibus import message as names
from unibus.adapter import Backlog
from unibus.channel import Group


async def test_what_dies_again_during_a_redrive_is_sent_back_once() -> None:
    """Where the broker only estimates how many there are, the redrive goes on until it finds no more."""
    bus = make_bus()

    @bus.consumer(ORDERS, retry=RetryPolicy(max_retries=0))
    async def handle(body: str) -> None:
        raise ValueError("always")

    async with lab(bus) as it:
        spy = spy_of(bus)
        exact = spy.backlog

        async def estimated(address: Queue[Any] | Group) -> Backlog:
            return dataclasses.replace(await exact(address), exact=False)

        with patch.object(spy, "backlog", estimated):
            await bus.send(ORDERS, "x")
            await until(lambda: bus.counts.get("dead_lettered") == 1)
            redriving = asyncio.ensure_future(deadletter.redrive(bus, ORDERS))
            await until(lambda: bus.counts.get("dead_lettered") == 2)
            await later(it, 20)
            assert await redriving == 1
        [letter] = it.dead_letters(ORDERS)
        assert letter.headers[names.REDRIVE_COUNT] == "1"
