"""Saboteurs of telling: capabilities that are not true, logs that say too much or nothing, and secrets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from unibus.adapter import Health, Inspected, Move, Outcome, Outgoing, Results, Source, Topology
from unibus.capabilities import Capabilities, emulated, native, refused
from unibus.channel import Inbox, Queue
from unibus.delivery import Delivery
from unibus.errors import ConnectionLost, Unsupported

from .base import SCHEME, Adapter, Subscription, saboteur

log = logging.getLogger("unibus.sabotaged")


@saboteur("Deduplication is declared, and there is none.", "dedup.id_sent_twice_arrives_once")
class ClaimsDedup(Adapter):
    claims: ClassVar[dict[str, Any]] = {"dedup": native(limit=300)}


@saboteur(
    "Replay is declared, and a group begins now all the same.",
    "fanout.new_group_may_start_at_all",
    "fanout.new_group_may_start_at_a_time",
    "fanout.new_group_may_start_at_a_position",
)
class ClaimsReplay(Adapter):
    claims: ClassVar[dict[str, Any]] = {"replay": native(), "start_positions": True}

    async def subscribe(self, source: Source) -> Subscription:
        return await super().subscribe(replace(source, start="new"))

    async def declare(self, topology: Topology) -> None:
        channels = tuple(replace(declared, start="new") for declared in topology.channels)
        await super().declare(replace(topology, channels=channels))


@saboteur("A group that is to begin with the history does so each time.", "fanout.start_is_for_new_groups")
class ReplaysEachTime(ClaimsReplay):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        self.inner.broker.__dict__.setdefault("history", []).extend(batch)
        return await super().send(batch, timeout)

    async def declare(self, topology: Topology) -> None:
        await super().declare(topology)
        for group in (declared.address for declared in topology.channels if declared.start == "all"):
            past = self.inner.broker.__dict__.get("history", ())
            await self.inner.send([replace(o, to=group) for o in past if o.to == getattr(group, "topic", None)], 1)


@saboteur("Replay is refused, and a group that asks for it begins now without a word.", "cap.undeclared_is_refused")
class TakesReplayInSilence(ClaimsReplay):
    claims: ClassVar[dict[str, Any]] = {}


@saboteur("Messages are deduplicated by id, though that is declared refused.", "cap.undeclared_is_refused")
class DeduplicatesInSilence(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        known = self.inner.broker.__dict__.setdefault("ids", set())
        place, id = (str(outgoing.to), outgoing.message.id), outgoing.message.id
        new = outgoing.origin is not None or place not in known
        known.add((str(outgoing.to), id))
        return (outgoing,) if new else ()


@saboteur(
    "Giving back is declared refused, and is done before it is refused.",
    "settle.release_is_uncounted",
    "cap.undeclared_is_refused",
)
class RefusesAfterActing(Adapter):
    claims: ClassVar[dict[str, Any]] = {"release": refused("this broker can't")}

    async def subscribe(self, source: Source) -> Subscription:
        return Acting(self, await self.inner.subscribe(source))


class Acting(Subscription):
    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        results = await self.inner.settle(outcome, deliveries)
        if outcome is Outcome.RELEASED:
            raise Unsupported("this broker can't")
        return results


@saboteur(
    "A server that turns out to be too old for priorities is refused, once the queue with its messages was made anew.",
    "cap.undeclared_is_refused",
    "priority.higher_first",
    "priority.levels_are_true",
)
class RemakesWhatItRefuses(Adapter):
    connected = False

    @property
    def capabilities(self) -> Capabilities:
        known = super().capabilities
        return replace(known, priority=refused("this server can't")) if self.connected else known

    async def connect(self) -> None:
        await super().connect()
        self.connected = True

    async def declare(self, topology: Topology) -> None:
        for declared in topology.channels:
            if getattr(declared.address, "priorities", None):
                known = [place.address for place in self.inner.broker._places.values()]
                for address in known:
                    if isinstance(address, Queue) and address.name == declared.address.name:
                        self.inner.broker.delete(address)
        await super().declare(topology)


@saboteur(
    "A move is declared refused, and sends before it is refused.",
    "settle.move_is_one_step",
    "cap.undeclared_is_refused",
)
class SendsBeforeItRefuses(Adapter):
    claims: ClassVar[dict[str, Any]] = {"atomic_move": refused("this broker can't")}

    async def subscribe(self, source: Source) -> Subscription:
        return Sending(self, await self.inner.subscribe(source))


class Sending(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        await self.adapter.send([send for move in moves for send in move.sends], timeout)
        raise Unsupported("this broker can't")


@saboteur("Looking is declared refused, and is done by the adapter all the same.", "dlq.browse_leaves_everything")
class LooksAllTheSame(Adapter):
    claims: ClassVar[dict[str, Any]] = {"browse": refused("this broker can't")}


@saboteur(
    "A settle is declared as not confirmed, and the last one takes no effect before another follows or the link ends.",
    "settle.is_confirmed",
)
class KeepsTheLastSettle(Adapter):
    claims: ClassVar[dict[str, Any]] = {"settle_confirmed": refused("this broker confirms nothing")}

    async def subscribe(self, source: Source) -> Subscription:
        return SettlingLate(self, await self.inner.subscribe(source))


class SettlingLate(Subscription):
    kept: Sequence[Delivery[Any]] = ()

    async def settle(
        self, outcome: Outcome, deliveries: Sequence[Delivery[Any]], *, delays: Sequence[float] = ()
    ) -> Results:
        if outcome is not Outcome.ACCEPTED:
            return await super().settle(outcome, deliveries, delays=delays)
        both = [*self.kept, *deliveries]
        self.kept = both[-1:]
        await self.inner.settle(outcome, both[:-1])
        return [None] * len(deliveries)

    async def close(self) -> None:
        await self.inner.settle(Outcome.ACCEPTED, self.kept)
        await self.inner.close()


@saboteur(
    "That each consumer has a share is declared, and one that takes message by message loses one when it leaves.",
    "competing.work_is_shared",
)
class LosesOfItsShare(Adapter):
    claims: ClassVar[dict[str, Any]] = {"share": refused("each consumer has its partitions")}

    async def subscribe(self, source: Source) -> Subscription:
        return Leaving(self, await self.inner.subscribe(source))


class Leaving(Subscription):
    async def close(self) -> None:
        await self.inner.close()
        if self.inner.source.prefetch == 1:
            self.inner.place.take(1)


@saboteur(
    "That replies to a process that has gone are taken is declared, and the next process of its service gets them.",
    "reply.inbox_ends_with_its_process",
)
class HandsInboxesOn(Adapter):
    claims: ClassVar[dict[str, Any]] = {"inbox": refused("the inbox of its service stays")}

    async def subscribe(self, source: Source) -> Subscription:
        made = await super().subscribe(source)
        if isinstance(source.address, Inbox):
            self.inner.broker.__dict__["heir"] = made.address
        return made

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        results = list(await super().send(batch, timeout))
        for n, (outgoing, error) in enumerate(zip(batch, results, strict=True)):
            if isinstance(outgoing.to, Inbox) and error is not None:
                heir = replace(outgoing, to=self.inner.broker.__dict__["heir"])
                (results[n],) = await super().send([heir], timeout)
        return results


@saboteur("No count is declared, and one is made up.", "consume.delivery_count", "cap.undeclared_is_refused")
class MakesUpACount(Adapter):
    claims: ClassVar[dict[str, Any]] = {"delivery_count": refused("this broker does not count")}


@saboteur("No lease is declared, and deliveries have an end.", "settle.extend_prolongs", "cap.undeclared_is_refused")
class HidesItsLeases(Adapter):
    claims: ClassVar[dict[str, Any]] = {"lease": refused("deliveries don't expire")}


@saboteur("A feature is emulated, and nothing says how.", "cap.every_level_is_explained")
class ExplainsNothing(Adapter):
    claims: ClassVar[dict[str, Any]] = {"order": emulated("")}


@saboteur("A largest body is declared that is too large by a byte.", "size.at_max")
class ClaimsAByteTooMany(Adapter):
    claims: ClassVar[dict[str, Any]] = {"max_body": 1001}

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (outgoing,) if len(outgoing.message.body) <= 1000 else ()


@saboteur(
    "Fewer messages a call are taken than is declared; the rest is dropped.",
    "publish.batches_are_split",
    "publish.many_returns_ids",
)
class ClaimsALargerBatch(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        taken = await super().send(batch[:100], timeout)
        return [*taken, *[None] * (len(batch) - len(taken))]


@saboteur("The link is never well.", "obs.health_is_ok", "competing.surplus_is_harmless")
class AlwaysIll(Adapter):
    async def check(self) -> Health:
        return Health(up=False)


@saboteur("The broker is always said to take no messages.", "obs.health_is_ok")
class AlwaysBlocked(Adapter):
    async def check(self) -> Health:
        return Health(up=True, blocked="no memory left")


@saboteur("Each send is worth a warning.", "obs.quiet_on_success")
class WarnsOfEverything(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        log.warning("sending %d messages", len(batch))
        return await super().send(batch, timeout)


@saboteur("The driver turns logging off.", "obs.every_end_is_logged", "obs.failed_attempt_is_one_record")
class TurnsLoggingOff(Adapter):
    async def connect(self) -> None:
        logging.disable()
        await super().connect()


@saboteur("The driver lets only warnings of unibus through.", "obs.every_discard_is_one_record")
class HushesTheCore(Adapter):
    async def connect(self) -> None:
        logging.getLogger("unibus").setLevel(logging.WARNING)
        await super().connect()


@saboteur("Bodies are in the log.", "sec.payload_not_logged")
class LogsBodies(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        log.debug("sending %r", outgoing.message.body)
        return (outgoing,)


@saboteur("Headers are in the log.", "sec.payload_not_logged")
class LogsHeaders(Adapter):
    def receiving(self, delivery: Delivery[Any]) -> Delivery[Any]:
        log.debug("received with %s", dict(delivery.message.headers))
        return delivery


@saboteur("The password is in the log.", "sec.credentials_not_logged")
class LogsThePassword(Adapter):
    async def connect(self) -> None:
        password = self.url.password.value if self.url.password else ""
        log.debug("connecting as %s:%s", self.url.username, password)
        await super().connect()


@saboteur("The password is in the error.", "publish.connect_failure_is_bounded", "sec.credentials_not_logged")
class TellsThePassword(Adapter):
    async def connect(self) -> None:
        if not self.reachable:
            password = self.url.password.value if self.url.password else ""
            raise ConnectionLost(f"nobody listens at {self.url}, {self.url.username}:{password}")
        await super().connect()


@saboteur("The password is in the repr of the adapter.", "sec.credentials_not_logged")
class ShowsThePassword(Adapter):
    def __repr__(self) -> str:
        return f"<{SCHEME} {self.url.password.value if self.url.password else ''}>"


@saboteur("A host that can't be reached is tried for ever.", "publish.connect_failure_is_bounded")
class ConnectsForEver(Adapter):
    async def connect(self) -> None:
        await (super().connect() if self.reachable else asyncio.Event().wait())


@saboteur("Any text is a return address.", "reply.address_is_untrusted")
class TrustsReturnAddresses(Adapter):
    def reply_to(self, text: str) -> Any:
        return next((address for address in self.inner._keys if str(address.name) in text), Inbox(text))


@saboteur("To look at what is there makes what is missing.", "cap.inspect_tells_what_is_there")
class MakesByLooking(Adapter):
    async def inspect(self, topology: Topology) -> Sequence[Inspected]:
        found = await self.inner.inspect(topology)
        await self.inner.declare(replace(topology, mode="create"))
        return found


@saboteur("All is said to be there.", "cap.inspect_tells_what_is_there")
class SeesEverything(Adapter):
    async def inspect(self, topology: Topology) -> Sequence[Inspected]:
        return [replace(one, exists=True) for one in await self.inner.inspect(topology)]
