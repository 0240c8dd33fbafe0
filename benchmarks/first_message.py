"""What one process does for its first message: `python -m benchmarks.first_message CLIENT`, how to connect as JSON on stdin.

Nothing is imported above but what an interpreter has in memory anyway: the import is a part of what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
from time import perf_counter, process_time
from typing import Any

_BODY = b'{"order":"4711"}'
_GROUP = "unibus"


class Steps:
    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._at = perf_counter()

    def done(self, step: str) -> None:
        now = perf_counter()
        self.found[step], self._at = now - self._at, now


async def unibus(own: dict[str, Any], steps: Steps) -> None:
    from unibus import Bus, Queue

    orders = Queue(own["queue"], bytes)
    bus = Bus(own["url"], channels=[orders], service="bench", declare="assume", config=False, environ={})
    handled = asyncio.Event()

    @bus.consumer(orders)
    async def handle(body: bytes) -> None:
        assert body == _BODY
        handled.set()

    async with bus:  # imports the client, too
        steps.done("import, connect")
        await bus.send(orders, _BODY)
        steps.done("send")
        async with bus.running():
            await handled.wait()
            steps.done("receive")


async def rabbitmq(own: dict[str, Any], steps: Steps) -> None:
    import aio_pika

    async with await aio_pika.connect(own["url"]) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        steps.done("import, connect")
        message = aio_pika.Message(_BODY, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, own["queue"], mandatory=True)
        steps.done("send")
        queue = await channel.get_queue(own["queue"], ensure=False)
        async with queue.iterator() as deliveries:
            delivery = await anext(deliveries)
            await delivery.ack()
        steps.done("receive")


async def kafka(own: dict[str, Any], steps: Steps) -> None:
    from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

    async with AIOKafkaProducer(**own["options"], acks="all", enable_idempotence=True) as producer:
        steps.done("import, connect")
        await producer.send_and_wait(own["queue"], _BODY)
        steps.done("send")
        async with AIOKafkaConsumer(
            own["queue"],
            **own["options"],
            group_id=own["queue"],
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        ) as consumer:
            await consumer.getone()
            await consumer.commit()
        steps.done("receive")


async def redis(own: dict[str, Any], steps: Steps) -> None:
    from redis.asyncio import Redis

    async with Redis.from_url(own["url"]) as client:
        await client.ping()
        steps.done("import, connect")
        await client.xadd(own["queue"], {"body": _BODY})
        steps.done("send")
        found: Any = await client.xreadgroup(_GROUP, "bench", {own["queue"]: ">"}, count=1, block=1000)
        entry = found[0][1][0][0]
        await client.xack(own["queue"], _GROUP, entry)
        await client.xdel(own["queue"], entry)
        steps.done("receive")


async def sqs(own: dict[str, Any], steps: Steps) -> None:
    from aiobotocore.session import get_session

    async with get_session().create_client("sqs", **own["options"]) as client:
        url = (await client.get_queue_url(QueueName=own["queue"]))["QueueUrl"]
        steps.done("import, connect")
        await client.send_message(QueueUrl=url, MessageBody=_BODY.decode())
        steps.done("send")
        found = await client.receive_message(QueueUrl=url, MaxNumberOfMessages=10, WaitTimeSeconds=1)
        await client.delete_message(QueueUrl=url, ReceiptHandle=found["Messages"][0]["ReceiptHandle"])
        steps.done("receive")


CLIENTS = {"unibus": unibus, "rabbitmq": rabbitmq, "kafka": kafka, "redis": redis, "sqs": sqs}


def main() -> None:
    own = json.loads(sys.stdin.read())
    steps = Steps()
    asyncio.run(CLIENTS[sys.argv[1]](own, steps))
    steps.done("close")
    sys.stdout.write(json.dumps({**steps.found, "CPU": process_time()}) + "\n")


if __name__ == "__main__":
    main()
