"""Saboteurs of places: topics and groups, order, delays, priorities, dead-letter channels, and what declaring does."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

from unibus.adapter import Backlog, Declared, Endpoint, Move, Outcome, Outgoing, Results, Source, Topology
from unibus.channel import DEAD_LETTER, Group, Inbox, Queue, Topic
from unibus.errors import ConnectionLost, NotFound, Refused, Unsupported
from unibus.message import Message

from .base import Adapter, Deaf, Subscription, changed, saboteur


class Renaming(Adapter):
    """The names on the broker are other ones than were asked for."""

    def renamed(self, declared: Declared) -> str:
        raise NotImplementedError

    async def declare(self, topology: Topology) -> None:
        channels = tuple(replace(d, name=self.renamed(d)) for d in topology.channels)
        await self.inner.declare(replace(topology, channels=channels))


class Reconnecting(Adapter):
    """It is right until its link is made anew."""

    connects = 0

    async def connect(self) -> None:
        await super().connect()
        self.connects += 1
        if self.connects > 1:
            self.linked_anew()

    def linked_anew(self) -> None:
        return


# Groups


@saboteur(
    "A publish reaches one group of its topic, each in turn.", "fanout.groups_get_all", "fanout.settle_is_per_group"
)
class ReachesOneGroup(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        for outgoing in batch:
            groups = self.inner.broker.groups(self.inner._keys.get(outgoing.to)) or []
            groups.append(groups.pop(0)) if groups else None
            if isinstance(outgoing.to, Topic) and groups:
                outgoing.to = groups[0].address
        return await super().send(batch, timeout)


@saboteur(
    "A group that nobody consumes gets nothing.",
    "fanout.offline_group_keeps_backlog",
    "fanout.declared_group_misses_nothing",
    "declare.again_keeps_everything",
)
class ForgetsOfflineGroups(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        if not isinstance(outgoing.to, Topic):
            return (outgoing,)
        groups = self.inner.broker.groups(self.inner._keys.get(outgoing.to)) or []
        return [replace(outgoing, to=group.address) for group in groups if group.consumers]


@saboteur(
    "A group begins when it is first consumed, not when it is declared.",
    "fanout.declared_group_misses_nothing",
    "declare.verify_accepts_what_is_there",
)
class GroupsBeginLate(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        subscription = await super().subscribe(source)
        begun = self.inner.broker.__dict__.setdefault("begun", set())
        place = subscription.inner.place
        if isinstance(source.address, Group) and place.key not in begun:
            begun.add(place.key)
            place.take(10_000)
        return subscription


@saboteur(
    "A failed attempt of one group is published again, to all groups.",
    "fanout.settle_is_per_group",
    "dlq.redrive_reaches_its_group_only",
)
class RetriesToTheTopic(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (replace(outgoing, to=outgoing.to.topic) if isinstance(outgoing.to, Group) else outgoing,)


@saboteur("What one group acks is gone for all.", "fanout.offline_group_keeps_backlog")
class AcksForAllGroups(Subscription):
    async def settle(self, outcome: Outcome, deliveries: Any, *, delays: Sequence[float] = ()) -> Results:
        ids = {delivery.message.id for delivery in deliveries}
        topic = ("topic", self.inner.place.key[1])
        for place in self.inner._broker.groups(topic) or []:
            for entry in place.take(10_000):
                if entry.fields[1] not in ids:
                    place.put(entry)
        return await self.inner.settle(outcome, deliveries, delays=delays)


@saboteur(
    "The dead letters of all groups of a topic share one queue.",
    "fanout.dead_letters_are_per_group",
)
class BuriesGroupsTogether(Renaming):
    def renamed(self, declared: Declared) -> str:
        parts = declared.name.split(".")
        return ".".join([*parts[:2], "dlq"]) if declared.role == "dead letter" and len(parts) > 3 else declared.name


@saboteur("There is one queue for all dead letters.", "dlq.one_queue_each", "fanout.dead_letters_are_per_group")
class BuriesAllTogether(Renaming):
    def renamed(self, declared: Declared) -> str:
        return "everybody.dlq" if declared.role == "dead letter" else declared.name


@saboteur(
    "A group is known by its name alone: two topics with a group of one name share it.",
    "fanout.groups_are_per_topic",
)
class SharesGroupsBetweenTopics(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        subscription = await super().subscribe(source)
        place = subscription.inner.place
        for other in self.inner.broker._places.values():
            if other is not place and isinstance(other.address, Group) and isinstance(source.address, Group):
                for entry in other.take(10_000 if other.address.name == source.address.name else 0):
                    place.put(entry)
        return subscription


@saboteur("A new group begins with the history of its topic.", "fanout.new_group_starts_now")
class GroupsBeginWithHistory(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        history = self.inner.broker.__dict__.setdefault("history", {})
        for outgoing in batch:
            history.setdefault(outgoing.to.name, []).append(outgoing)
        return await super().send(batch, timeout)

    async def declare(self, topology: Topology) -> None:
        new = [d.address for d in topology.channels if isinstance(d.address, Group)]
        old = {place.key for place in self.inner.broker._places.values()}
        await self.inner.declare(topology)
        for group in new:
            if self.inner._keys[group] not in old:
                past = self.inner.broker.__dict__.get("history", {}).get(group.topic.name, ())
                await self.inner.send([replace(outgoing, to=group) for outgoing in past], 1)


@saboteur(
    "All services are in one group, whatever its name.",
    "fanout.default_group_is_the_service",
    "fanout.groups_get_all",
)
class OneGroupForAll(Renaming):
    def renamed(self, declared: Declared) -> str:
        address = declared.address
        return f"{address.topic.name}.all" if isinstance(address, Group) else declared.name


@saboteur("The processes of a broadcast share its messages.", "fanout.broadcast_reaches_each")
class SharesBroadcasts(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        if isinstance(source.address, Group) and source.address.ephemeral:
            source.address = Group(source.address.topic, "everybody", ephemeral=True)
        return await super().subscribe(source)


@saboteur("The group of a broadcast stays when its process has left.", "fanout.broadcast_leaves_nothing")
class KeepsBroadcastGroups(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        subscription = await super().subscribe(source)
        subscription.inner.place.private = isinstance(source.address, Inbox)
        return subscription


@saboteur("Nothing is received from an inbox that was made anew with its link.", "fault.cut_ends_requests")
class DeafAfterTheCut(Reconnecting):
    async def subscribe(self, source: Source) -> Subscription:
        made = await super().subscribe(source)
        return Deaf(self, made.inner) if isinstance(source.address, Inbox) and self.connects > 1 else made


@saboteur(
    "Nothing is written to disk: what waits is gone when the broker has been restarted.",
    "fault.restart_keeps_what_waits",
    "fault.restart_loses_nothing",
)
class KeepsNothingOnDisk(Reconnecting):
    def linked_anew(self) -> None:
        broker = self.inner.broker
        for place in broker._places.values():
            place.take(sys.maxsize)
        broker._delayed.clear()


@saboteur("Dead letters are not written to disk.", "fault.restart_keeps_what_waits")
class KeepsNoDeadLettersOnDisk(Reconnecting):
    def linked_anew(self) -> None:
        for key, place in self.inner.broker._places.items():
            if key[-1].endswith(DEAD_LETTER):
                place.take(sys.maxsize)


@saboteur("The first two that waited when the link was lost go behind what came after them.", "fault.cut_keeps_order")
class GivesBackToTheEnd(Reconnecting):
    def linked_anew(self) -> None:
        for place in self.inner.broker._places.values():
            for lane in getattr(place, "_lanes", {}).values():
                lane.rotate(-2)


@saboteur("What was held when the link was lost comes back twice.", "fault.cut_repeats_what_runs")
class GivesBackTwice(Reconnecting):
    def linked_anew(self) -> None:
        for place in self.inner.broker._places.values():
            for entry in list(place):
                place.give_back(copy(entry))


@saboteur("Questions about queues go on to ask by the first link.", "fault.cut_heals_who_looks")
class AsksByTheFirstLink(Reconnecting):
    async def backlog(self, address: Queue[Any] | Group) -> Backlog:
        if self.connects > 1:
            raise ConnectionLost("the first link was cut")
        return await self.inner.backlog(address)


@saboteur("An inbox stays when its process has left, and takes late replies.", "reply.inbox_ends_with_its_process")
class KeepsInboxes(Adapter):
    async def subscribe(self, source: Source) -> Subscription:
        subscription = await super().subscribe(source)
        subscription.inner.place.private = isinstance(source.address, Group) and source.address.ephemeral
        return subscription


@saboteur(
    "A publish to a topic without groups is an error.", "publish.no_group_is_counted", "fanout.broadcast_leaves_nothing"
)
class WantsAGroup(Adapter):
    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        results = await super().send(batch, timeout)
        empty = [isinstance(o.to, Topic) and not self.inner.broker.groups(self.inner._key(o.to)) for o in batch]
        return [NotFound("no group") if e else result for e, result in zip(empty, results, strict=True)]


# Order


@saboteur(
    "Order by key is declared, and ends where consumers compete: what one of them holds does not hold up its key.",
    "order.per_key_competing",
)
class ForgetsOrder(Adapter):
    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(replace(topology, channels=tuple(map(self.unordered, topology.channels))))

    def unordered(self, declared: Declared) -> Declared:
        address = copy(declared.address)
        if isinstance(address, Queue):
            address.ordered = False
        return replace(declared, address=address)


@saboteur("All keys are one lane: a busy key holds up the others.", "order.keys_run_at_once", "order.kept_over_retries")
class OneLaneForAllKeys(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        ordered = isinstance(outgoing.to, Queue) and outgoing.to.ordered
        return (changed(outgoing, key="one"),) if ordered else (outgoing,)


@saboteur("A dead letter leaves its key blocked.", "order.dead_letter_frees_the_key")
class BlocksTheKeyOfTheDead(Subscription):
    async def move(self, moves: Sequence[Move], timeout: float) -> Results:
        done, self.inner.place.done = self.inner.place.done, None
        results = await super().move(moves, timeout)
        self.inner.place.done = done
        return results


@saboteur(
    "Of one key every second message overtakes the one before it.",
    "order.one_key",
    "order.per_publisher",
    "order.kept_over_takeover",
)
class SwapsWithinAKey(Adapter):
    held: Outgoing | None = None

    async def send(self, batch: Sequence[Outgoing], timeout: float) -> Results:
        late = self.held
        keyed = [outgoing for outgoing in batch if outgoing.message.key == "k"]
        self.held = keyed[0] if keyed and late is None else None
        now = [outgoing for outgoing in batch if outgoing is not self.held]
        await self.inner.send([*now, *([late] if late else [])], timeout)
        if self.held:
            asyncio.get_running_loop().call_later(0.2, self.flush, self.held)
        return [None] * len(batch)

    def flush(self, outgoing: Outgoing) -> None:
        if self.held is outgoing:
            self.held = None
            self.task = asyncio.create_task(self.inner.send([outgoing], 1))


# Time


@saboteur(
    "A delay is ignored.",
    "delay.is_floor",
    "delay.needs_no_consumer",
    "delay.short_not_behind_long",
    "retry.delay_is_floor",
    "retry.own_delay",
    "retry.others_progress",
)
class IgnoresDelays(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (replace(outgoing, not_before=None),)


@saboteur("A delay is rounded down.", "delay.is_floor", "retry.delay_is_floor", "retry.own_delay")
class RoundsDelaysDown(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        early = outgoing.not_before and outgoing.not_before - 0.3
        return (replace(outgoing, not_before=early),)


@saboteur("A delay takes ten times as long.", "delay.is_floor", "retry.delay_is_floor", "retry.own_delay")
class WaitsTooLong(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        now = self.inner.broker.clock.time()
        wait = (outgoing.not_before or now) - now
        return (replace(outgoing, not_before=now + 8 * wait) if wait > 0 else outgoing,)


@saboteur(
    "What is delayed waits in line: a short delay ends after a long one before it.", "delay.short_not_behind_long"
)
class DelaysInLine(Adapter):
    last = 0.0

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        if outgoing.not_before is None:
            return (outgoing,)
        self.last = max(self.last + 0.001, outgoing.not_before)
        return (replace(outgoing, not_before=self.last),)


@saboteur(
    "What is delayed waits in the client, and is lost when that is closed.",
    "delay.needs_no_consumer",
    "retry.goes_on_elsewhere",
)
class DelaysInTheClient(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        wait = (outgoing.not_before or 0.0) - self.inner.broker.clock.time()
        if wait <= 0:
            return (outgoing,)
        asyncio.get_running_loop().call_later(wait, self.due, replace(outgoing, not_before=None))
        return ()

    def due(self, outgoing: Outgoing) -> None:
        if self.inner._lost is None:
            self.task = asyncio.create_task(self.inner.send([outgoing], 1))


@saboteur("While a retry waits, nothing else of its queue is delivered.", "retry.others_progress")
class RetriesBlockTheQueue(Adapter):
    until = 0.0

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        if outgoing.origin is not None:
            self.until = max(self.until, outgoing.not_before or 0.0)
        return (replace(outgoing, not_before=max(self.until, outgoing.not_before or 0.0)),)


@saboteur("Of the copies for a retry every fiftieth is lost.", "retry.none_lost_in_a_crowd")
class LosesRetriesInACrowd(Adapter):
    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.copies = 0

    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        self.copies += outgoing.origin is not None
        return () if outgoing.origin is not None and self.copies % 50 == 0 else (outgoing,)


@saboteur("An expiry is taken for a delay.", "ttl.expired_is_not_handled", "ttl.is_told", "reply.roundtrip")
class TakesExpiryForDelay(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (replace(outgoing, not_before=outgoing.message.expires_at or outgoing.not_before),)


@saboteur("Priorities are ignored.", "priority.higher_first", "priority.levels_are_true")
class IgnoresPriorities(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        return (changed(outgoing, priority=None),)


@saboteur("Lower priorities come first.", "priority.higher_first", "priority.levels_are_true")
class TurnsPrioritiesRound(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        priority, levels = outgoing.message.priority, getattr(outgoing.to, "priorities", 0)
        return (changed(outgoing, priority=levels - 1 - priority if priority is not None else None),)


@saboteur("Of ten priorities that are declared there are five.", "priority.levels_are_true")
class HasFivePriorities(Adapter):
    def sending(self, outgoing: Outgoing) -> Iterable[Outgoing]:
        priority = outgoing.message.priority
        return (changed(outgoing, priority=None if priority is None else min(priority, 4)),)


# Declaring


@saboteur("Names are in lower case on the broker.", "consume.no_crosstalk")
class LowersNames(Renaming):
    def renamed(self, declared: Declared) -> str:
        return declared.name.lower()


@saboteur("A point in a name becomes a dash on the broker.", "consume.no_crosstalk")
class DashesNames(Renaming):
    def renamed(self, declared: Declared) -> str:
        return declared.name.replace(".", "-")


@saboteur(
    "Declaring a queue that is there empties it.",
    "declare.again_keeps_everything",
    "declare.policy_may_change",
    "cap.refusal_leaves_messages",
    "publish.returns_after_broker_accept",
    "dlq.redrive_some",
)
class DeclareEmpties(Adapter):
    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(topology)
        for declared in topology.channels:
            if (place := self.inner.broker.place(self.inner._keys.get(declared.address))) is not None:
                place.take(10_000)


@saboteur(
    "Declaring a queue leaves a message in it, to see whether it works.",
    "publish.closed_raises",
    "publish.refused_is_not_delivered",
    "publish.wrong_verb_is_refused",
    "body.wrong_type_is_refused",
    "size.over_max",
    "delay.undeclared_is_refused",
    "priority.undeclared_is_refused",
    "headers.illegal_are_refused",
    "headers.reserved_are_refused",
    "consume.connected_runs_no_handler",
    "reply.address_is_untrusted",
    "cap.refusal_leaves_messages",
    "declare.assume_makes_nothing",
)
class TriesItsQueues(Adapter):
    async def declare(self, topology: Topology) -> None:
        fresh = [d for d in topology.channels if isinstance(d.address, Queue) and d.role == "channel"]
        fresh = [d for d in fresh if not self.inner.broker.has(("queue", d.name))]
        await self.inner.declare(topology)
        await self.inner.send([Outgoing(d.address, Message(b"probe", id=f"probe-{d.name}")) for d in fresh], 1)


@saboteur(
    "Verify makes what is missing.",
    "declare.verify_tells_all_missing",
    "declare.assume_makes_nothing",
)
class VerifyCreates(Adapter):
    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(replace(topology, mode="create"))


@saboteur("Verify stops at the first thing that is missing.", "declare.verify_tells_all_missing")
class VerifyTellsTheFirst(Adapter):
    async def declare(self, topology: Topology) -> None:
        try:
            await self.inner.declare(topology)
        except NotFound as error:
            raise NotFound(str(error).partition(",")[0]) from None


@saboteur(
    "Verify makes what is missing, and then says that it was missing.",
    "declare.verify_tells_all_missing",
)
class VerifyCreatesInPassing(Adapter):
    async def declare(self, topology: Topology) -> None:
        try:
            await self.inner.declare(topology)
        except NotFound:
            await self.inner.declare(replace(topology, mode="create"))
            raise


@saboteur("Verify finds no group, though it is there.", "declare.verify_accepts_what_is_there")
class VerifyFindsNoGroup(Adapter):
    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(topology)
        if topology.mode == "verify" and any(isinstance(d.address, Group) for d in topology.channels):
            raise NotFound("a group is missing")


@saboteur(
    "Assume asks, and complains of what is missing.",
    "declare.assume_makes_nothing",
    "publish.missing_destination_raises",
)
class AssumeVerifies(Adapter):
    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(replace(topology, mode="verify") if topology.mode == "assume" else topology)


@saboteur("Assume makes what is missing.", "declare.assume_makes_nothing", "publish.missing_destination_raises")
class AssumeCreates(Adapter):
    async def declare(self, topology: Topology) -> None:
        await self.inner.declare(replace(topology, mode="create") if topology.mode == "assume" else topology)


@saboteur(
    "The waits of a retry policy are a part of its queue, which can't be declared with others.",
    "declare.policy_may_change",
)
class PolicyIsPartOfTheQueue(Adapter):
    async def declare(self, topology: Topology) -> None:
        known = self.inner.broker.__dict__.setdefault("delays", {})
        for declared in topology.channels:
            if known.setdefault(declared.name, topology.delays) != topology.delays:
                raise Refused(f"{declared.address} is there with other delays")
        await self.inner.declare(topology)


@saboteur("A queue in order is refused, though order is declared.", "cap.longest_park_is_true", "order.one_key")
class RefusesOrder(Adapter):
    async def declare(self, topology: Topology) -> None:
        if any(getattr(d.address, "ordered", False) for d in topology.channels):
            raise Unsupported("no order here")
        await self.inner.declare(topology)


@saboteur(
    "Waits are refused, though any delay is declared.",
    "cap.longest_delay_is_true",
    "cap.jitter_fits_the_delays",
)
class RefusesDelays(Adapter):
    async def declare(self, topology: Topology) -> None:
        if topology.delays:
            raise Unsupported("no delays here")
        await self.inner.declare(topology)
