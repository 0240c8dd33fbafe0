"""What a send means: where nobody is there to take it, when it is sent twice, what the broker may still lose."""

from __future__ import annotations

from collections.abc import Mapping

from unibus import Message, Queue, UnibusError
from unibus.tooling import inspect

from ..lab import Lab, rest
from ..model import Found, Probe, Row, unmeasurable

CHAPTER = "sending"
QUIET = 1.5  # seconds without a message that count as the end

UNROUTABLE = Row(
    id="sending.unroutable",
    chapter=CHAPTER,
    title="send to a queue that is not there",
    how="A bus that declares nothing (`declare=assume`) sends to a queue that nobody has made.",
    touches=("queue",),
)
NOBODY = Row(
    id="sending.nobody",
    chapter=CHAPTER,
    title="publish to a topic without a group",
    how="A publish to a topic that stands and has no group.",
    touches=("topic",),
)
TWICE = Row(
    id="sending.twice",
    chapter=CHAPTER,
    title="one message id sent twice",
    how="Two messages of the same id are sent to a queue one after the other; how many arrive is counted.",
    feature="dedup",
    touches=("queue",),
)
RISKS = Row(
    id="sending.risks",
    chapter=CHAPTER,
    title="settings that can lose confirmed messages",
    how="What `inspect` of the adapter finds on the server and on a queue and a topic with one group made a moment before, in default settings. What the "
    "server does with a confirmed message when its power fails is not tried.",
    better="less",
    unit="risks",
)
CONFIRM = Row(
    id="sending.confirm",
    chapter=CHAPTER,
    title="a confirmed message when the power fails",
    how="Nothing is tried: a killed process leaves the page cache alone, so it says nothing of fsync.",
)
TRANSACTIONS = Row(
    id="sending.transactions",
    chapter=CHAPTER,
    title="several sends and settlements in one transaction",
    how="Nothing is tried, since there is nothing to call. What unibus does in one step where the broker can is a retry or dead letter.",
)


async def unroutable(lab: Lab) -> Mapping[str, Found]:
    missing: Queue[bytes] = lab.queue("missing")
    async with lab.bus(missing, declare="assume", send_timeout=5.0) as bus:
        try:
            await bus.send(missing, b"x")
        except UnibusError as error:
            return {UNROUTABLE.id: Found(text=f"refused: {type(error).__name__}")}
    return {UNROUTABLE.id: Found(text="accepted", note="nothing said that no queue was there to take it")}


async def nobody(lab: Lab) -> Mapping[str, Found]:
    topic = lab.topic("nobody")
    async with lab.bus(topic) as bus:
        await bus.publish(topic, b"x")
        counted = bus.counts.get("unrouted", 0)
    return {NOBODY.id: Found(text="accepted, and counted" if counted else "accepted, not counted")}


async def twice(lab: Lab) -> Mapping[str, Found]:
    queue = lab.queue("twice")
    async with lab.bus(queue) as bus:
        for _ in range(2):
            await bus.send(queue, Message(b"x", id="same"))
        async with bus.receiver(queue) as receiver:
            count = len(await rest(receiver, QUIET))
    return {TWICE.id: Found(text={1: "arrives once", 2: "arrives twice"}.get(count, f"arrives {count} times"))}


async def risks(lab: Lab) -> Mapping[str, Found]:
    queue, topic = lab.queue("risks"), lab.topic("risks")
    bus = lab.bus(queue)

    @bus.subscriber(topic, group="g")
    async def never(body: bytes) -> None: ...

    async with bus:
        found = {one.risk: one.kind for one in await inspect(bus) if one.risk}
    if not found:
        return {RISKS.id: Found(text="none found", value=0.0)}
    return {
        RISKS.id: Found(
            text=f"{len(found)} found",
            value=float(len(found)),
            note="; ".join(f"{kind}: {risk}" for risk, kind in found.items()),
        )
    }


PROBES = (
    Probe(name="unroutable", rows=(UNROUTABLE,), measure=unroutable),
    Probe(name="nobody", rows=(NOBODY,), measure=nobody),
    Probe(name="twice", rows=(TWICE,), measure=twice, waits=True),
    Probe(name="risks", rows=(RISKS,), measure=risks),
    Probe(
        name="confirm",
        rows=(CONFIRM,),
        measure=unmeasurable("its power would have to fail; the settings that it hangs on are among those above"),
    ),
    Probe(name="transactions", rows=(TRANSACTIONS,), measure=unmeasurable("unibus has none to offer, on any broker")),
)
