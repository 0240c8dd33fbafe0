"""Access control lists of Kafka for the supply's user without rights: exactly what a test says, and nothing afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest, DescribeAclsRequest

SOON = 20.0

Entry = tuple[int, str, int, str, str, int, int]  # as the protocol spells it
Right = tuple[str, str, str]  # kind of resource; its name, a prefix with `*` at the end; operation

_ANY, _ALLOW, _LITERAL, _PREFIXED = 1, 3, 3, 4
_KINDS = {"topic": 2, "group": 3, "cluster": 4}
_OPERATIONS = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10, "IdempotentWrite": 12}


class Acls:
    """Of one user, by an administrator's client (aiokafka's AIOKafkaAdminClient, started)."""

    def __init__(self, admin: Any, user: str) -> None:
        self._admin = admin
        self._principal = f"User:{user}"
        self._given: set[Entry] = set()
        self._numbers = 0

    async def give(self, rights: Iterable[Right]) -> None:
        """These from now on, and no others. Returns once the broker goes by them."""
        await self._change(set(map(self._entry, rights)))
        # One node is broker and controller, each with its own copy, brought up to date one after the other. The broker tells
        # of its copy only; but what comes after a change is begun when that has reached both.
        self._numbers += 1
        await self._change({*self._given, self._entry(("group", f"change-{self._numbers}", "Describe"))})

    async def take(self) -> None:
        """All that was given."""
        await self._change(set())

    async def _change(self, wanted: set[Entry]) -> None:
        for entry in self._given - wanted:
            answer = await self._send(DeleteAclsRequest(*entry))
            assert [(code, len(gone)) for code, _, gone in answer.filter_responses] == [(0, 1)], answer
        for entry in wanted - self._given:
            answer = await self._send(CreateAclsRequest(*entry))
            assert [code for code, _ in answer.creation_responses] == [0], answer
        self._given = wanted
        deadline = time.monotonic() + SOON
        while await self._known() != wanted:
            assert time.monotonic() < deadline, f"the broker has other ACLs of {self._principal} than were given"
            await asyncio.sleep(0.02)

    def _entry(self, right: Right) -> Entry:
        kind, name, operation = right
        pattern = _PREFIXED if name.endswith("*") else _LITERAL
        return _KINDS[kind], name.removesuffix("*"), pattern, self._principal, "*", _OPERATIONS[operation], _ALLOW

    async def _known(self) -> set[Entry]:
        """Of this user, to the broker."""
        everything: Any = (_ANY, None, _ANY, self._principal, None, _ANY, _ANY)  # None: any, where the library says str
        answer = await self._send(DescribeAclsRequest(*everything))
        assert answer.error_code == 0, answer
        return {
            (kind, name, pattern, principal, host, operation, permission)
            for kind, name, pattern, entries in answer.resources
            for principal, host, operation, permission in entries
        }

    async def _send(self, request: Any) -> Any:
        client = self._admin._client
        return await client.send(client.get_random_node(), request)
