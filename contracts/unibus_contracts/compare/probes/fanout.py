"""What a publish costs by the number of groups."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from time import perf_counter

from unibus import Bus, Topic

from ..lab import Lab, short, until
from ..model import Found, Probe, Row

CHAPTER = "topics"
ROUNDS, FEWEST = 5, 3
ENOUGH = 3.0  # seconds: where rounds take longer, there are fewer

FANOUT = Row(
    id="topics.fanout",
    chapter=CHAPTER,
    title="publishing, by number of groups",
    how="Five times (three where that takes more than three seconds) 200 messages (80 with --quick) of 256 bytes, by one `publish_many` to a topic with so many groups, each consumed in the same process; the median of until all are confirmed, and until "
    "every group has handled all. The value compared is the rate of confirmed publishes with the most groups, as a share of that with one.",
    touches=("topic",),
    unit="%",
    better="more",
    axes=("groups", "messages a second"),
    logarithmic=True,
)


async def measure(lab: Lab) -> Mapping[str, Found]:
    confirmed, everywhere = [], []
    for groups in lab.sizes.groups:
        rate, whole = await _publish(lab, groups)
        confirmed.append((groups, rate))
        everywhere.append((groups, whole))
    share = confirmed[-1][1] / confirmed[0][1] * 100
    note = "; ".join(
        f"{groups:g} groups: {short(rate)}/s confirmed, {short(whole)}/s handled everywhere"
        for (groups, rate), (_, whole) in zip(confirmed, everywhere, strict=True)
    )
    text = f"{short(share)} % of the rate with {confirmed[-1][0]} groups"
    return {FANOUT.id: Found(text=text, value=share, note=note, points={"confirmed": confirmed, "handled": everywhere})}


async def _publish(lab: Lab, groups: int) -> tuple[float, float]:
    topic, bus = lab.topic("fan"), lab.bus()
    handled = [0] * groups
    for number in range(groups):
        _subscribe(bus, topic, number, handled)
    async with bus.running():
        await bus.publish(topic, b"warm")
        await until(lambda: sum(handled) == groups, lambda: f"{sum(handled)} of {groups} groups got the first", 20)
        rounds: list[tuple[float, float]] = []
        while len(rounds) < FEWEST or (len(rounds) < ROUNDS and sum(whole for _, whole in rounds) < ENOUGH):
            rounds.append(await _round(bus, topic, lab.sizes.publishes, handled))
    count = lab.sizes.publishes
    return count / median(sent for sent, _ in rounds), count / median(whole for _, whole in rounds)


async def _round(bus: Bus, topic: Topic[bytes], count: int, handled: list[int]) -> tuple[float, float]:
    """Seconds until all are confirmed, and until all are handled."""
    total = sum(handled) + len(handled) * count
    begun = perf_counter()
    await bus.publish_many(topic, [b"x" * 256] * count)
    sent = perf_counter() - begun
    await until(lambda: sum(handled) >= total, lambda: f"{sum(handled)} of {total} handled", 40)
    return sent, perf_counter() - begun


def _subscribe(bus: Bus, topic: Topic[bytes], number: int, handled: list[int]) -> None:
    @bus.subscriber(topic, group=f"g{number}", concurrency=20)
    async def handle(body: bytes) -> None:
        handled[number] += 1


PROBES = (Probe(name="fan-out", rows=(FANOUT,), measure=measure, limit=300.0),)
