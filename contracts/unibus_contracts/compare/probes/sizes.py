"""The largest message: body, headers, key."""

from __future__ import annotations

from collections.abc import Mapping

from unibus import Bus, Queue, UnibusError

from ..lab import Lab, take
from ..model import Found, Probe, Row, unmeasurable

CHAPTER = "limits"

BODY = Row(
    id="limits.body",
    chapter=CHAPTER,
    title="largest body",
    how="Of the size that the adapter declares, and one byte more; it has to arrive byte for byte, and the larger one has to be refused by `send`. Where none "
    "is declared, or one larger than this run tries, that much is tried alone.",
    unit="bytes",
    better="more",
)
HEADERS = Row(
    id="limits.headers",
    chapter=CHAPTER,
    title="headers",
    how="A hundred headers of 20 characters, or as many as are declared; then a single one that fills what is declared for all together, up to 1 MB.",
    unit="bytes",
    better="more",
)
KEY = Row(
    id="limits.key",
    chapter=CHAPTER,
    title="longest key",
    how="Keys of 128, 1,024 and 4,096 characters.",
    unit="characters",
    better="more",
)
TRIMMING = Row(
    id="limits.trimming",
    chapter=CHAPTER,
    title="what the broker drops by itself, for age or length",
    how="Nothing is tried: retention is days, and to fill a broker to its limit is no way to treat one that others use.",
)


async def body(lab: Lab) -> Mapping[str, Found]:
    declared, most = lab.known.max_body, lab.sizes.largest
    queue = lab.queue("body")
    async with lab.bus(queue, send_timeout=40.0) as bus:
        if declared is not None and declared <= most:
            await _whole(bus, queue, declared)
            try:
                await bus.send(queue, bytes(declared + 1))
            except UnibusError as error:
                return {
                    BODY.id: Found(text=f"{_size(declared)}; one more is {type(error).__name__}", value=float(declared))
                }
            return {BODY.id: Found(text=f"{_size(declared)} declared, and more is taken", value=float(declared))}
        await _whole(bus, queue, most)
    says = "declares no limit" if declared is None else f"declares {_size(declared)}"
    return {BODY.id: Found(text=f"{_size(most)} tried; {says}", value=float(declared or most))}


async def _whole(bus: Bus, queue: Queue[bytes], size: int) -> None:
    sent = bytes(range(256)) * (size // 256) + bytes(size % 256)
    await bus.send(queue, sent)
    async with bus.receiver(queue, prefetch=1) as receiver:
        [delivery] = await take(receiver, 1, timeout=40)
        assert delivery.body == sent, f"{len(delivery.body)} bytes arrived that are not the {size} sent"
        await delivery.ack()


async def headers(lab: Lab) -> Mapping[str, Found]:
    known, queue = lab.known, lab.queue("headers")
    count = min(100, known.max_headers or 100)
    many = {f"h{n}": "x" * 20 for n in range(count)}
    total = min(known.max_header_bytes or 1_000_000, 1_000_000) - 100  # the name, and what the envelope itself needs
    async with lab.bus(queue, send_timeout=20.0) as bus:
        for sent in (many, {"h": "x" * total}):
            await bus.send(queue, b"x", headers=sent)
            async with bus.receiver(queue, prefetch=1) as receiver:
                [delivery] = await take(receiver, 1)
                lost = [name for name, value in sent.items() if delivery.message.headers.get(name) != value]
                assert not lost, f"{len(lost)} of {len(sent)} headers did not arrive as they were sent"
                await delivery.ack()
    limit = (
        "no limit is declared" if known.max_header_bytes is None else f"{_size(known.max_header_bytes)} are declared"
    )
    return {HEADERS.id: Found(text=f"{count} of them, and one of {_size(total)}; {limit}", value=float(total))}


async def key(lab: Lab) -> Mapping[str, Found]:
    queue, longest, refused = lab.queue("key"), 0, ""
    async with lab.bus(queue, send_timeout=10.0) as bus, bus.receiver(queue, prefetch=1) as receiver:
        for length in (128, 1024, 4096):
            try:
                await bus.send(queue, b"x", key="k" * length)
            except UnibusError as error:
                refused = f"; {length:,} is {type(error).__name__}"
                break
            [delivery] = await take(receiver, 1)
            await delivery.ack()
            assert delivery.message.key == "k" * length, (
                f"a key of {length} characters arrived with {len(delivery.message.key or '')}"
            )
            longest = length
    return {KEY.id: Found(text=f"{longest:,} characters{refused}", value=float(longest))}


def _size(count: int) -> str:
    for unit, size in (("MiB", 1024 * 1024), ("KiB", 1024)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


PROBES = (
    Probe(name="body", rows=(BODY,), measure=body, limit=120.0),
    Probe(name="headers", rows=(HEADERS,), measure=headers),
    Probe(name="key", rows=(KEY,), measure=key),
    Probe(
        name="trimming",
        rows=(TRIMMING,),
        measure=unmeasurable("its retention would have to pass; what is set is among the risks under sending"),
    ),
)
