"""A run: warm up, then fault after fault under work, each healed and followed by progress; a drain; the verdict."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from unibus import Bus, deadletter
from unibus_contracts import supply
from unibus_contracts.chaos import native, nodes, service
from unibus_contracts.chaos.faults import FAULTS, NOT_DRAWN, NoBite, Stage, not_tried
from unibus_contracts.chaos.proxy import Proxy
from unibus_contracts.chaos.workers import Worker
from unibus_contracts.history import History, Recorder, Tail, Verdict, check
from unibus_contracts.history.check import DEAD, LOGGED

_WARM = 60.0  # seconds until the first message must have been handled
_CONSUMERS = 2
_AT_ONCE = 500  # lines of the history that are read without looking up
_BACKLOG = 5000  # messages that may wait when the next fault comes: what is struck is work, not a heap
_PART = 2000  # messages that are sent without a look at what waits
_PULSE = 5  # messages a second beside the others, on a queue of their own: so few that they never wait for each other; and requests


@dataclass
class Plan:
    """What to do. `progress`: seconds in which messages must flow again; `drain`: until nothing is left.

    `minutes`: begin no fault after that; the faults are repeated until then, with as many messages for each.
    `cluster`: on three nodes that are one, with the faults of those.
    """

    kind: str
    seed: int
    messages: int
    faults: Sequence[str]
    hold: float = 3.0
    minutes: float | None = None
    progress: float = 180.0
    drain: float = 180.0
    cluster: bool = False


@dataclass
class Fault:
    """What one fault did. `recovery`: seconds from its end, when the broker takes requests again (of one that was started again:
    when the supply's own probe, which speaks its protocol without unibus, had an answer), until a message that was sent after
    that had been handled. There is a queue for that where nothing else waits: behind a heap of thousands one would measure the
    heap. `everywhere`: until each channel and group had handled something, old or new.
    """

    name: str
    proof: str = ""
    recovery: float | None = None
    everywhere: float | None = None

    def told(self) -> str:
        return f"{self.recovery} s until new messages were handled, {self.everywhere} s until each channel went on"


@dataclass
class Result:
    plan: Plan
    verdict: Verdict
    faults: list[Fault] = field(default_factory=list)
    adapter: str = ""
    version: str | None = None
    seconds: float = 0.0
    not_tried: dict[str, str] = field(default_factory=dict)
    unclean: list[str] = field(default_factory=list)  # consumers that did not end as they should

    @property
    def passed(self) -> bool:
        return self.verdict.status == "kept" and not self.unclean

    def as_json(self) -> str:
        return json.dumps(asdict(self) | {"passed": self.passed}, indent=2)


@asynccontextmanager
async def proxied(broker: supply.Broker) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy in front of the broker, and the URL that leads through it."""
    url = broker.url
    parts, given = urlsplit(url), parse_qs(urlsplit(url).query)
    told = broker.variables.get(next((name for name in broker.variables if name.endswith("_PROXY")), ""), "")
    if told:  # clients are sent to where the broker says it is, so it has to say the proxy's port
        front, behind = map(int, told.split(":"))
    elif "endpoint_url" in given:
        front, behind = 0, urlsplit(given["endpoint_url"][0]).port or 80
    else:
        assert parts.port is not None, f"the URL of {broker.name} has no port"
        front, behind = 0, parts.port
    async with Proxy(("127.0.0.1", behind), front) as proxy:
        if "endpoint_url" in given:
            query = {name: values[0] for name, values in given.items()}
            query["endpoint_url"] = f"http://127.0.0.1:{proxy.port}"
            yield proxy, parts._replace(query=urlencode(query, quote_via=quote)).geturl()
        else:
            account = parts.netloc.rpartition("@")[0]
            yield proxy, parts._replace(netloc=f"{account}@127.0.0.1:{proxy.port}").geturl()


class Progress:
    """What the processes have written so far. `read` is done bit by bit: the proxy works in the same loop."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder, ("send", "handle"))
        self._reading = asyncio.Lock()
        self.handled = 0
        self.owed: set[tuple[str, str]] = set()  # value and group of confirmed sends that nobody has handled
        self._early: set[tuple[str, str]] = set()  # handled, and not owed: not confirmed yet, or a repetition
        self._begun: dict[tuple[str, int], dict[str, Any]] = {}
        self._healed: int | None = None  # when the last fault was over, in the history's time
        self._sent_since: set[str] = set()
        self._handled_since: dict[str, int] = {}
        self._new: list[int] = []  # when messages that were sent since had been handled
        self.flowing: int | None = None  # when the first of them had
        self.again: dict[
            tuple[str, str], int
        ] = {}  # when each channel and group had handled anything since, old or new

    def heal(self, at: int) -> None:
        """A fault is over: what follows is measured from here."""
        self._healed, self.flowing = at, None
        for since in (self._sent_since, self._handled_since, self._new, self.again):
            since.clear()

    async def read(self) -> None:
        async with self._reading:
            for count, (process, said) in enumerate(self._tail.told(), 1):
                self._take(process, said)
                if count % _AT_ONCE == 0:
                    await asyncio.sleep(0)
        if self._new and self.flowing is None:
            self.flowing = min(self._new)

    def _take(self, process: str, said: dict[str, Any]) -> None:
        call, kind = (process, said["call"]), said["kind"]
        if kind == "invoke":
            self._begun[call] = said
            return
        begun = self._begun.pop(call)
        value, group = begun["value"], begun.get("group", "")
        sent = begun["what"] == "send"
        if self._healed is not None and begun["at"] >= self._healed:
            self._watch(begun, said)
        if not sent:
            done = kind == "ok"
            self.handled += done
            if done or begun["attempt"] > service.POLICY.max_retries:  # then it is a dead letter
                self._match(self.owed, self._early, (value, group))
        elif kind == "ok":
            for each in service.GROUPS if begun["place"] == service.told.name else ("",):
                self._match(self._early, self.owed, (value, each))

    def _watch(self, begun: dict[str, Any], said: dict[str, Any]) -> None:
        value = begun["value"]
        if begun["what"] == "send":
            self._sent_since.add(value)
        elif said["kind"] == "ok":
            self._handled_since.setdefault(value, said["at"])
            if begun["place"] != service.asks.name:  # whose sender may still wait for an answer that was lost
                self.again.setdefault((begun["place"], begun.get("group", "")), said["at"])
        if self.flowing is None and value in self._sent_since and value in self._handled_since:
            self._new.append(self._handled_since[value])

    @staticmethod
    def _match(waiting: set[tuple[str, str]], others: set[tuple[str, str]], name: tuple[str, str]) -> None:
        if name in waiting:
            waiting.discard(name)
        else:
            others.add(name)


class Run:
    """One run. `say` gets a line for people at each step."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        self.prefix = f"chaos-{secrets.token_hex(3)}-"
        self.faults: list[Fault] = []
        self.unclean: list[str] = []
        self._progress = Progress(folder)
        self._over = False  # nothing more is to be sent
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.jsonl")):
            raise FileExistsError(f"{folder} holds another run's history; name an empty folder")

    async def run(self) -> Result:
        if self.plan.cluster:
            cluster = await asyncio.to_thread(supply.cluster, self.plan.kind, "chaos")
            try:
                return await self._on(cluster.nodes[0], cluster)
            finally:
                await asyncio.to_thread(cluster.stop)
        broker = await asyncio.to_thread(supply.start, self.plan.kind, "chaos")
        try:
            return await self._on(broker)
        finally:
            await asyncio.to_thread(broker.stop)

    async def _on(self, broker: supply.Broker, cluster: supply.Cluster | None = None) -> Result:
        began = time.monotonic()
        with Recorder(self.folder, "runner") as recorder:
            bus = service.make(broker.url if cluster is None else nodes.url_of(cluster), self.prefix)
            service.Handling(recorder).register(
                bus
            )  # handles nothing here, but its groups are declared before anything is sent
            async with bus, proxied(broker) as (proxy, through):
                url = through if cluster is None else nodes.url_of(cluster)
                consumers = [
                    Worker("consume", self.folder, f"consumer{number}", self.prefix, url)
                    for number in range(_CONSUMERS)
                ]
                stage = Stage(broker, proxy, consumers, random.Random(self.plan.seed), self.plan.hold, cluster)  # noqa: S311  # repeatable
                producer = Worker("produce", self.folder, "producer", self.prefix, url)
                pulse = Worker("produce", self.folder, service.PULSE, self.prefix, url)
                asker = Worker("produce", self.folder, service.ASKER, self.prefix, url)
                workers = [*consumers, producer, pulse, asker]
                try:
                    for worker in workers:
                        await worker.start()
                    beating = asyncio.gather(self._beat(pulse), self._beat(asker))
                    try:
                        await self._work(stage, producer, recorder)
                        self._over = True
                        await beating
                    finally:
                        beating.cancel()
                    await self._end(stage, [producer, pulse, asker], recorder)
                finally:
                    proxy.heal()
                    for worker in workers:
                        await worker.kill()
                seen = broker if cluster is None else await nodes.looked_at(cluster)
                await self._look(bus, seen, recorder)
                expected = service.expected(bus)
                if cluster is not None:
                    expected = nodes.promised(cluster, expected)
                able = bus.capabilities
        verdict = await asyncio.to_thread(check, History(self.folder), expected)
        result = Result(self.plan, verdict, self.faults, able.adapter, able.version)
        result.seconds, result.unclean = round(time.monotonic() - began, 1), self.unclean
        passed_over = {n: why for n, why in NOT_DRAWN.get(self.plan.kind, {}).items() if n not in self.plan.faults}
        result.not_tried = {**not_tried(self.plan.kind, self.plan.cluster), **passed_over}
        (self.folder / "result.json").write_text(result.as_json())
        return result

    async def _work(self, stage: Stage, producer: Worker, recorder: Recorder) -> None:
        progress = self._progress
        share = max(1, self.plan.messages // (len(self.plan.faults) + 1))
        self.say(f"warm-up: {share} messages")
        sending = asyncio.create_task(self._send(producer, share, self.plan.hold))
        await self._flows(progress, _WARM)
        await sending
        for name in self._schedule():
            # Sent over the time of the fault and beyond, so that it strikes work.
            sending = asyncio.create_task(self._send(producer, share, self.plan.hold + 2.0))
            await self._flows(progress, self.plan.progress)
            fault, healed = await self._strike(stage, name, recorder)
            self.faults.append(fault)
            fault.recovery = await self._recovers(progress, healed)
            await sending
            await self._drain(progress, _BACKLOG)
            fault.everywhere = round((max(progress.again.values()) - healed) / 1e9, 2)
            self.say(f"{name}: {fault.proof}; {fault.told()}")

    async def _send(self, producer: Worker, messages: int, seconds: float) -> None:
        """Over so many seconds, where the consumers keep up: no more than `_BACKLOG` wait, and a part."""
        for begin in range(0, messages, _PART):
            part = min(_PART, messages - begin)
            await self._drain(self._progress, _BACKLOG)
            await producer.send(part, seconds * part / messages)

    async def _end(self, stage: Stage, senders: Sequence[Worker], recorder: Recorder) -> None:
        with recorder.during("drain") as ending:
            self.say("drain")
            left = await self._drain(self._progress)
            # The checker decides what is lost. Whether all that could come has come is decided here.
            if left:
                ending.detail = f"{left} still missing after {self.plan.drain:.0f} s"
        for sender in senders:
            await sender.end()
        for consumer in stage.consumers:
            status = await consumer.end()
            if status:
                self.unclean.append(f"{consumer.name} ended with status {status} after SIGTERM")

    def _schedule(self) -> Iterator[str]:
        if self.plan.minutes is None:
            yield from self.plan.faults
            return
        end = time.monotonic() + 60 * self.plan.minutes
        for name in cycle(self.plan.faults):
            if time.monotonic() > end:
                return
            yield name

    async def _strike(self, stage: Stage, name: str, recorder: Recorder) -> tuple[Fault, int]:
        """What it did, and when it was over."""
        stage.proof = ""
        fault = Fault(name)
        try:
            with recorder.during("fault", value=name) as ending:
                async with FAULTS[name](stage):
                    await asyncio.sleep(stage.pause)
                ending.detail = fault.proof = stage.proof
        except NoBite as error:
            fault.proof = f"did not bite: {error}"
        return fault, time.monotonic_ns()

    async def _recovers(self, progress: Progress, healed: int) -> float:
        progress.heal(healed)
        limit = time.monotonic() + self.plan.progress
        while progress.flowing is None:
            if time.monotonic() > limit:
                raise TimeoutError(f"no new message was handled for {self.plan.progress:.0f} s; see {self.folder}")
            await asyncio.sleep(0.05)
            await progress.read()
        return round((progress.flowing - healed) / 1e9, 2)

    async def _beat(self, sender: Worker) -> None:
        """Messages all the time, a few: whenever work can go on there is something to be seen by."""
        while not self._over:
            await sender.send(_PULSE, 1.0)

    async def _flows(self, progress: Progress, within: float) -> float:
        """Seconds until something more has been handled. TimeoutError: nothing was."""
        began = time.monotonic()
        await progress.read()
        goal = progress.handled + 1
        while progress.handled < goal:
            if time.monotonic() > began + within:
                raise TimeoutError(f"nothing was handled for {within:.0f} s; see the logs in {self.folder}")
            await asyncio.sleep(0.02)
            await progress.read()
        return round(time.monotonic() - began, 2)

    async def _drain(self, progress: Progress, to: int = 0) -> int:
        """Until all but `to` of what was confirmed was handled or is dead; how much is missing after `drain` seconds without any more."""
        seen, since = -1, time.monotonic()
        while True:
            await progress.read()
            if len(progress.owed) <= to:
                return 0
            if progress.handled != seen:
                seen, since = progress.handled, time.monotonic()
            elif time.monotonic() > since + self.plan.drain:
                return len(progress.owed)
            await asyncio.sleep(0.2)

    async def _look(self, bus: Bus, broker: supply.Broker, recorder: Recorder) -> None:
        """Write down what is on the broker, as its own client sees it; unibus has to see the same dead letters."""
        self.say("looking at what is left")
        seen: Counter[str] = Counter()
        missing = {value for value, _ in self._progress.owed}
        async for found in native.left(self.plan.kind, broker):
            if found.where == LOGGED and found.value not in missing:
                continue  # a log has all that was ever sent; it is asked for what nobody has handled
            place = service.place_of(found.value)
            group = found.group(service.GROUPS) if place is service.told else ""
            recorder.note("look", value=found.value, place=place.name, group=group, detail=found.where)
            seen[found.where] += 1
        ours = 0
        for place in service.CHANNELS:
            for each in service.GROUPS if place is service.told else ("",):
                ours += sum([1 async for _ in deadletter.browse(bus, place, group=each or None)])
        self.say(f"{seen.total()} messages: {dict(seen)}")
        if ours != seen[DEAD]:
            self.unclean.append(f"unibus sees {ours} dead letters, the broker's own client {seen[DEAD]}")
