"""SQS and SNS, on ministack, an emulator: what the contracts can't say, beside a raw aiobotocore client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.integration.sqs_kit import SOON, Bench, at, broker_url, eventually, out, send, subscribe, take

import unibus_sqs.adapter
import unibus_sqs.subscription
from unibus import (
    AuthenticationFailed,
    ConfigError,
    Delivery,
    LeaseLost,
    Message,
    MessageTooLarge,
    PermissionDenied,
    Queue,
    RetryPolicy,
    Throttled,
    Timeout,
    UnibusError,
    Unsupported,
    deadletter,
)
from unibus.adapter import Declared, Outcome, Outgoing, Secret, Source, Topology
from unibus.channel import Group, Inbox, Topic, dead_letter_queue
from unibus.message import NOT_BEFORE
from unibus.url import parse
from unibus_contracts import supply
from unibus_contracts.kit import until
from unibus_sqs import SqsAdapter, private, topology


@pytest.fixture
async def lab() -> AsyncIterator[Bench]:
    async with at(broker_url()) as bench:
        yield bench


# Interoperation


async def test_a_raw_consumer_reads_ours(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    await send(
        adapter, out(queue, b'{"a": 1}', id="i", type="t", key="k", headers={"tenant": "\u00fc"}), out(queue, b"\xff")
    )
    text, binary = await lab.raw_receive("q")
    assert text["Body"] == '{"a": 1}'
    assert set(text["MessageAttributes"]) == {"unibus"}
    headers = json.loads(text["MessageAttributes"]["unibus"]["StringValue"])
    assert headers == {"x-message-id": "i", "x-type": "t", "x-key": "k", "tenant": "\u00fc"}
    assert (binary["Body"], binary["MessageAttributes"]["unibus-encoding"]["StringValue"]) == ("/w==", "base64")


async def test_a_foreign_message_is_an_ordinary_message_and_a_copy_keeps_all_of_it(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    attributes = {
        "tenant": {"DataType": "String", "StringValue": "t"},
        "n": {"DataType": "Number", "StringValue": "7"},
        "raw": {"DataType": "Binary", "BinaryValue": b"\x00\xff"},
        "x-correlation-id": {"DataType": "String", "StringValue": "c"},
    }
    await lab.sqs.send_message(QueueUrl=await lab.url_of("q"), MessageBody="hi", MessageAttributes=attributes)
    subscription = await subscribe(adapter, queue)
    [first] = await take(subscription)
    message = first.message
    assert (message.body, message.correlation_id, dict(message.headers)) == (b"hi", "c", {"tenant": "t", "n": "7"})
    assert message.id == first.position
    assert message.timestamp == pytest.approx(time.time(), abs=60)
    await send(adapter, Outgoing(queue.address, message, None, first))
    await subscription.settle(Outcome.ACCEPTED, [first])
    [again] = await take(subscription)
    assert (again.message.id, dict(again.message.headers)) == (message.id, dict(message.headers))
    native: Any = again.native
    assert native["MessageAttributes"]["raw"]["BinaryValue"] == b"\x00\xff"


async def test_foreign_publishes_arrive_raw_or_in_an_envelope(lab: Bench) -> None:
    topic = lab.topic()
    adapter = await lab.adapter(topic, raw := lab.group(topic), plain := lab.queue())
    arn = await lab.topic_arn("t")
    url = await lab.url_of("q")
    queue = (await lab.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"]))["Attributes"]["QueueArn"]
    policy = {"Effect": "Allow", "Principal": "*", "Action": "sqs:SendMessage", "Resource": queue}
    await lab.sqs.set_queue_attributes(
        QueueUrl=url, Attributes={"Policy": json.dumps({"Version": "2012-10-17", "Statement": [policy]})}
    )
    await lab.sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=queue)
    attributes = {"tenant": {"DataType": "String", "StringValue": "t"}}
    await lab.sns.publish(TopicArn=arn, Message="news", MessageAttributes=attributes)
    await send(adapter, out(topic, b"\x00ours", headers={"a": "b"}))
    for place in (raw, plain):
        subscription = await subscribe(adapter, place)
        found = [d.message for d in await take(subscription, 2)]
        assert [(m.body, dict(m.headers)) for m in found] == [(b"news", {"tenant": "t"}), (b"\x00ours", {"a": "b"})]


async def test_a_filter_policy_lets_through_what_its_headers_say(lab: Bench) -> None:
    topic = lab.topic(options={"attributes": ["tenant"]})
    some = lab.group(topic, "some", {"filter_policy": {"tenant": ["a"]}})
    adapter = await lab.adapter(topic, lab.group(topic, "every"), some)
    await send(adapter, out(topic, b"1", headers={"tenant": "b"}), out(topic, b"2", headers={"tenant": "a"}))
    subscription = await subscribe(adapter, some)
    [delivery] = await take(subscription)
    assert (delivery.message.body, dict(delivery.message.headers)) == (b"2", {"tenant": "a"})
    assert (await adapter.backlog(some.address)).ready == 0  # type: ignore[arg-type]  # a Group


# Bad input


async def test_one_bad_entry_of_a_batch_fails_alone(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    await lab.sqs.set_queue_attributes(QueueUrl=await lab.url_of("q"), Attributes={"MaximumMessageSize": "1024"})
    results = await adapter.send([out(queue, body) for body in (b"1", b"x" * 2000, b"3")], SOON)
    assert [type(result) for result in results] == [type(None), MessageTooLarge, type(None)]
    subscription = await subscribe(adapter, queue)
    assert [d.message.body for d in await take(subscription, 2)] == [b"1", b"3"]


async def test_what_sqs_and_sns_would_not_carry_is_not_sent(lab: Bench) -> None:
    topic = lab.topic()
    adapter = await lab.adapter(topic, group := lab.group(topic), queue := lab.queue())
    big = b"x" * (250 * 1024)
    assert list(await adapter.send([out(queue, big), out(topic, big)], SOON)) == [None, None]
    results = await adapter.send(
        [out(topic, b"x" * (256 * 1024)), out(queue, b"x" * (1 << 20)), out(queue, b"\xff" * (800 << 10))], SOON
    )
    assert [type(result) for result in results] == [MessageTooLarge] * 3
    assert "SNS" in str(results[0])
    results = await adapter.send([out(group, big) for _ in range(9)], SOON)  # more than a request takes
    assert list(results) == [None] * 9


async def test_a_message_given_up_by_sqs_itself_is_a_dead_letter_with_headers(
    lab: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "MAX_RECEIVES", 2)
    queue = lab.queue()
    letters = Declared(dead_letter_queue(queue.address), queue.name + ".dlq", "dead letter")  # type: ignore[arg-type]  # a Queue
    adapter = await lab.adapter(queue, letters)
    await send(adapter, out(queue, b"x", id="me"))
    for _ in range(3):  # the third time it is moved
        await lab.raw_receive("q", VisibilityTimeout=0)
    subscription = await subscribe(adapter, letters)
    [delivery] = await take(subscription)
    headers = delivery.message.headers
    assert delivery.message.id == "me"
    assert (headers["x-dlq-reason"], headers["x-original-destination"]) == ("broker_limit", "q")


async def test_an_expired_receipt_handle_is_a_lost_lease(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue(), lease=3)
    first, second = await subscribe(adapter, queue), await subscribe(adapter, queue)
    await send(adapter, out(queue))
    [late] = await take(first)
    [delivery] = await take(second)  # after 3 s
    assert delivery.deliveries == 2
    [error] = await first.settle(Outcome.ACCEPTED, [late])
    assert isinstance(error, LeaseLost)
    [error] = await first.extend([late], 30)
    assert isinstance(error, LeaseLost)
    assert list(await second.settle(Outcome.ACCEPTED, [delivery])) == [None]


async def test_throttling_is_told_and_costs_nothing(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    subscription = await subscribe(adapter, queue)
    link: Any = adapter._link
    slow = ClientError({"Error": {"Code": "RequestThrottled", "Message": "slow down"}}, "x")

    async def throttled(**_: Any) -> None:
        raise slow

    with monkeypatch.context() as patch:
        for name in ("send_message_batch", "receive_message"):
            patch.setattr(link, name, throttled)
        [error] = await adapter.send([out(queue)], SOON)
        assert isinstance(error, Throttled)
        with pytest.raises(Throttled):
            await subscription.receive(1, 1)
    await send(adapter, out(queue))
    await take(subscription)


async def test_an_answer_that_does_not_come_is_a_timeout(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    link: Any = adapter._link

    async def silent(**_: Any) -> None:
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(link, "send_message_batch", silent)
        results = await adapter.send([out(queue) for _ in range(25)], 0.2)
    assert [type(result) for result in results] == [Timeout] * 25


async def test_wrong_credentials_are_said_so_and_shown_nowhere(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    url = replace(parse(lab.url), username="AKIANOBODY", password=Secret("secret-5f1d"))
    with caplog.at_level(logging.DEBUG), pytest.raises(AuthenticationFailed) as caught:
        await lab.adapter(endpoint=lab.endpoint(url))
    assert "secret-5f1d" not in caplog.text + str(caught.value) + repr(caught.value.__cause__)


async def test_the_secret_and_bodies_are_in_no_log(lab: Bench, caplog: pytest.LogCaptureFixture) -> None:
    password = parse(lab.url).password
    assert password is not None
    with caplog.at_level(logging.DEBUG):
        adapter = await lab.adapter(queue := lab.queue())
        await send(adapter, out(queue, b"canary"))
        await take(await subscribe(adapter, queue))
        await adapter.close()
    assert password.value not in caplog.text
    assert "canary" not in caplog.text


async def test_a_missing_right_is_said_so(lab: Bench) -> None:
    iam = await lab.client("iam")
    name = f"u{secrets.token_hex(4)}"
    await iam.create_user(UserName=name)
    statement = {"Effect": "Allow", "Action": ["sqs:GetQueueUrl", "sqs:ReceiveMessage"], "Resource": "*"}
    document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    await iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=document)
    key = (await iam.create_access_key(UserName=name))["AccessKey"]
    await lab.adapter(queue := lab.queue())
    url = replace(parse(lab.url), username=key["AccessKeyId"], password=Secret(key["SecretAccessKey"]))
    adapter = await lab.adapter(endpoint=lab.endpoint(url))  # it may not list queues, and need not
    await adapter.declare(Topology("assume", (queue,)))
    await subscribe(adapter, queue)
    [error] = await adapter.send([out(queue)], SOON)
    assert isinstance(error, PermissionDenied)
    with pytest.raises(PermissionDenied):
        await adapter.declare(Topology("create", (lab.queue("other"),)))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sqs://nowhere", "nowhere"),
        ("sqs://eu-west-1:80", "endpoint_url"),
        ("sqs://eu-west-1/path", "endpoint_url"),
        ("sqs://key@eu-west-1", "secret"),
        ("sqs://eu-west-1?wait=21", "sqs.wait"),
        ("sqs://eu-west-1?visibilty=3", "sqs.visibilty"),
    ],
)
async def test_a_wrong_url_is_a_config_error_that_names_it(lab: Bench, text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        await lab.adapter(endpoint=lab.endpoint(parse(text)))


async def test_unknown_options_and_a_history_are_refused(lab: Bench) -> None:
    adapter = await lab.adapter()
    with pytest.raises(ConfigError, match=r"queues\.q\.sqs\.retentoin.*retention"):
        await adapter.declare(Topology(channels=(lab.queue(options={"retentoin": 60}),)))
    with pytest.raises(Unsupported):
        await adapter.declare(Topology(channels=(topic := lab.topic(), replace(lab.group(topic), start="all"))))


@pytest.mark.parametrize(
    "forged", ["q", "unibus__reply_1", "../unibus__reply_" + "0" * 16, "http://x/unibus__all_" + "0" * 16]
)
async def test_a_forged_reply_address_is_refused(lab: Bench, forged: str) -> None:
    from unibus import Refused

    adapter = await lab.adapter()
    with pytest.raises(Refused):
        adapter.reply_to(forged)


# Order


async def test_any_key_is_a_message_group_and_a_second_copy_of_a_message_is_dropped(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue(ordered=True))
    keys = ["k", "k" * 200, "sch\u00fcssel", "a b", None]
    await send(adapter, *(out(queue, b"x", key=key, id=f"{n}") for n, key in enumerate(keys)))
    await send(adapter, out(queue, b"again", key="k", id="0"))
    subscription = await subscribe(adapter, queue)
    found = await take(subscription, 5)
    assert [d.message.key for d in found] == keys
    assert list(await subscription.settle(Outcome.ACCEPTED, found)) == [None] * 5
    assert (await adapter.backlog(queue.address)).ready == 0  # type: ignore[arg-type]  # a Queue


async def test_an_ordered_message_may_die_and_be_redriven_within_the_time_of_deduplication(lab: Bench) -> None:
    queue = Queue("q", ordered=True)
    bus = lab.bus()
    attempts: list[int] = []

    @bus.consumer(queue, retry=RetryPolicy(max_retries=1, backoff=0))
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        attempts.append(delivery.attempt)
        raise ValueError("always")

    async with bus.running():
        await bus.send(queue, b"x", key="k")
        for n in (1, 2, 3):

            async def dead(n: int = n) -> bool:
                return bus.counts.get("dead_lettered") == n

            await eventually(dead)
            if n < 3:
                assert await deadletter.redrive(bus, queue) == 1
        [letter] = [letter async for letter in deadletter.browse(bus, queue)]
    assert letter.message.headers["x-redrive-count"] == "2"
    assert attempts == [1, 2] * 3


# Delays


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_long_delay_goes_in_hops(lab: Bench, ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unibus_sqs.adapter, "LONGEST_DELAY", 1)
    monkeypatch.setattr(unibus_sqs.subscription, "LONGEST_DELAY", 1)
    adapter = await lab.adapter(queue := lab.queue(ordered=ordered, delayed=True))
    due = time.time() + 2.5
    await send(adapter, out(queue, b"\xfflater", due, id="me", headers={"a": "b"}))
    subscription = await subscribe(adapter, queue)
    [delivery] = await take(subscription)
    assert due <= time.time() <= due + 3
    assert (delivery.message.body, delivery.message.id, dict(delivery.message.headers)) == (
        b"\xfflater",
        "me",
        {"a": "b"},
    )
    assert NOT_BEFORE not in delivery.message.headers
    assert list(await subscription.settle(Outcome.ACCEPTED, [delivery])) == [None]
    backlog = await adapter.backlog(queue.address)  # type: ignore[arg-type]  # a Queue
    assert (backlog.ready, backlog.in_flight) == (0, 0)


async def test_a_hop_that_fails_comes_again_with_the_end_of_its_lease(
    lab: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unibus_sqs.adapter, "LONGEST_DELAY", 1)
    adapter = await lab.adapter(queue := lab.queue(delayed=True), lease=3)

    async def throttled(**_: Any) -> None:
        raise ClientError({"Error": {"Code": "RequestThrottled", "Message": "slow down"}}, "SendMessage")

    monkeypatch.setattr(adapter.native, "send_message", throttled)
    await send(adapter, out(queue, b"later", time.time() + 2.5))
    subscription = await subscribe(adapter, queue, prefetch=1)  # of which it must not keep a part
    [delivery] = await take(subscription)
    assert delivery.message.body == b"later"
    assert "comes again when its lease ends" in caplog.text


# Ends


async def test_a_cancelled_receive_loses_nothing(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    subscription = await subscribe(adapter, queue)
    receiving = asyncio.create_task(subscription.receive(10, 5))
    await until(lambda: list(subscription._polls), "a poll is under way")
    receiving.cancel()
    await send(adapter, out(queue, b"1"))
    [delivery] = await take(subscription)
    await subscription.settle(Outcome.ACCEPTED, [delivery])
    receiving = asyncio.create_task(subscription.receive(10, 5))
    await until(lambda: list(subscription._polls), "a poll is under way")
    receiving.cancel()
    await send(adapter, out(queue, b"2"))
    await subscription.stop()  # the poll that was left may have it
    other = await subscribe(adapter, queue)
    begun = time.monotonic()
    [delivery] = await take(other)
    assert delivery.message.body == b"2"
    assert time.monotonic() - begun < 10


async def test_a_deleted_queue_is_made_again_and_its_consumer_goes_on(lab: Bench) -> None:
    queue = Queue("q")
    bus = lab.bus()
    seen: list[bytes] = []

    @bus.consumer(queue)
    async def handle(body: bytes) -> None:
        seen.append(body)

    async def handled() -> bool:
        return len(seen) > before

    async with bus.running():
        before = 0
        await bus.send(queue, b"1")
        await eventually(handled)
        url = await lab.url_of("q")
        await lab.sqs.delete_queue(QueueUrl=url)

        async def back() -> bool:
            with contextlib.suppress(ClientError):
                return await lab.url_of("q") == url
            return False

        await eventually(back)
        before = 1
        await bus.send(queue, b"2")
        await eventually(handled)
    assert seen == [b"1", b"2"]


async def test_queues_of_a_process_end_with_it_and_those_of_dead_ones_are_cleaned_up(lab: Bench) -> None:
    topic = lab.topic()
    stem = lab.prefix.replace(".", "-") + "unibus__"

    async def there() -> list[str]:
        return list((await lab.sqs.list_queues(QueueNamePrefix=stem)).get("QueueUrls") or [])

    old = str(int(time.time() - private.DEAD - 60))
    await lab.sqs.create_queue(QueueName=stem + "reply_" + "0" * 16, tags={private.ALIVE: old})
    arn = await lab.topic_arn("t")
    bound = await lab.sns.subscribe(TopicArn=arn, Protocol="sqs", Endpoint=arn.replace(":sns:", ":sqs:"))
    tags = {private.ALIVE: old, private.SUBSCRIPTION: bound["SubscriptionArn"]}
    await lab.sqs.create_queue(QueueName=stem + "all_" + "0" * 16, tags=tags)
    await lab.sqs.create_queue(QueueName=stem + "reply_" + "1" * 16, tags={private.ALIVE: str(int(time.time()))})
    adapter = await lab.adapter(topic)
    assert isinstance(topic.address, Topic)
    await adapter.subscribe(Source(Inbox("x")))
    everywhere = await adapter.subscribe(Source(Group(topic.address, "svc.1.0", ephemeral=True)))

    async def cleaned() -> bool:
        return len(await there()) == 3

    await eventually(cleaned)
    await send(adapter, out(topic))
    await take(everywhere)
    await adapter.close()
    assert [url[-16:] for url in await there()] == ["1" * 16]
    assert (await lab.sns.list_subscriptions_by_topic(TopicArn=arn))["Subscriptions"] == []


async def test_a_broker_that_dies_and_comes_back_empty_is_set_up_again() -> None:
    broker = supply.start("sqs", instance="faults")
    try:
        bench = Bench(broker.url)
        queue = Queue("q")
        bus = bench.bus()
        seen: list[bytes] = []

        @bus.consumer(queue)
        async def handle(body: bytes) -> None:
            seen.append(body)

        async def handled() -> int:
            return len(seen)

        async def ill() -> bool:
            return (await bus.health()).status != "ok"

        async with bus.running():
            await bus.send(queue, b"1")
            await eventually(handled)
            await asyncio.to_thread(broker.kill)
            await eventually(ill)
            await asyncio.to_thread(broker.restart)
            deadline = time.monotonic() + 30
            while len(seen) < 2 and time.monotonic() < deadline:
                with contextlib.suppress(UnibusError):  # it is not back yet
                    await bus.send(queue, b"2", timeout=2)
                await asyncio.sleep(0.1)
        assert set(seen) == {b"1", b"2"}
    finally:
        await asyncio.to_thread(broker.stop)


# Requests


class Counted:
    """What a link was asked, and its real answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, link: Any, name: str) -> None:
        self.asked: list[dict[str, Any]] = []
        real = getattr(link, name)

        async def ask(**parameters: Any) -> Any:
            self.asked.append(parameters)
            return await real(**parameters)

        monkeypatch.setattr(link, name, ask)


async def test_an_idle_consumer_costs_one_long_poll_a_wait(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = await lab.adapter(queue := lab.queue(), wait=2)
    subscription = await subscribe(adapter, queue, prefetch=100)
    polls = Counted(monkeypatch, adapter._link, "receive_message")
    assert await asyncio.gather(*(subscription.receive(10, 2) for _ in range(8))) == [[]] * 8
    assert [poll["WaitTimeSeconds"] for poll in polls.asked[:1]] == [2]
    assert len(polls.asked) <= 2


def went_by_the_client(adapter: SqsAdapter) -> Counter[str]:
    """Requests from now on, by operation; those that the adapter makes itself are not among them."""
    seen: Counter[str] = Counter()
    client: Any = adapter.native
    client.meta.events.register("before-send.sqs", lambda event_name, **_: seen.update([event_name.rpartition(".")[2]]))
    return seen


async def test_the_first_request_is_the_clients_and_those_that_follow_do_the_same(lab: Bench) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    seen = went_by_the_client(adapter)
    subscription = await subscribe(adapter, queue)
    text = Message(b'"\xc3\xbc\\"', id="i", type="t", headers={"tenant": "\u00fc"})
    raw = {"raw": {"DataType": "Binary", "BinaryValue": b"\x00\xff"}}
    for _ in range(3):
        await send(adapter, Outgoing(queue.address, text))
        [delivery] = await take(subscription)
        assert (delivery.message.body, delivery.message.id, delivery.message.type) == (text.body, "i", "t")
        assert dict(delivery.message.headers) == {"tenant": "\u00fc"}
        assert list(await subscription.extend([delivery], 30)) == [None]
        assert list(await subscription.settle(Outcome.ACCEPTED, [delivery])) == [None]
        await lab.sqs.send_message(QueueUrl=await lab.url_of("q"), MessageBody="hi", MessageAttributes=raw)
        [foreign] = await take(subscription)
        await send(adapter, Outgoing(queue.address, foreign.message, None, foreign))
        assert list(await subscription.settle(Outcome.ACCEPTED, [foreign])) == [None]
        [copy] = await take(subscription)
        native: Any = copy.native
        assert native["MessageAttributes"]["raw"]["BinaryValue"] == b"\x00\xff"
        assert list(await subscription.settle(Outcome.ACCEPTED, [copy])) == [None]
    assert set(seen.values()) == {1}
    assert set(seen) >= {"SendMessageBatch", "ReceiveMessage", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"}


async def test_what_it_could_not_sign_like_the_client_it_leaves_to_the_client(lab: Bench) -> None:
    url = parse(lab.url)
    below = {**url.query, "endpoint_url": url.query["endpoint_url"] + "/aws"}  # as behind a gateway
    adapter = await lab.adapter(queue := lab.queue(), endpoint=lab.endpoint(replace(url, query=below)))
    seen = went_by_the_client(adapter)
    for _ in range(3):
        await send(adapter, out(queue))
    assert seen["SendMessageBatch"] == 3
    assert len(await take(await subscribe(adapter, queue), 3)) == 3


async def test_sends_and_acks_go_by_tens(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = await lab.adapter(queue := lab.queue())
    sends = Counted(monkeypatch, adapter._link, "send_message_batch")
    deletes = Counted(monkeypatch, adapter._link, "delete_message_batch")
    await send(adapter, *(out(queue, b"%d" % n) for n in range(25)))
    subscription = await subscribe(adapter, queue, prefetch=100)
    taken = await take(subscription, 25)
    assert list(await subscription.settle(Outcome.ACCEPTED, taken)) == [None] * 25
    for calls in (sends, deletes):
        assert sorted(len(call["Entries"]) for call in calls.asked) == [5, 10, 10]


async def test_only_the_entries_that_failed_are_sent_again(lab: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue("q", bytes)
    async with lab.bus(queue) as bus:
        link: Any = bus.adapter._link  # type: ignore[attr-defined]  # an SqsAdapter
        real = link.send_message_batch
        sent: list[list[str]] = []

        async def ask(**parameters: Any) -> Any:
            entries = parameters["Entries"]
            sent.append([entry["MessageBody"] for entry in entries])
            if len(sent) > 1:
                return await real(**parameters)
            answer = await real(**{**parameters, "Entries": entries[:1]})  # as if AWS had a bad moment for the others
            failed = [{"Id": entry["Id"], "SenderFault": False, "Code": "InternalError"} for entry in entries[1:]]
            return {**answer, "Failed": failed}

        monkeypatch.setattr(link, "send_message_batch", ask)
        await bus.send_many(queue, [b"1", b"2", b"3"])
        assert sent == [["1", "2", "3"], ["2", "3"]]
        async with bus.receiver(queue) as receiver:
            bodies = set()
            for _ in range(3):
                delivery = await receiver.receive(timeout=SOON)
                assert delivery is not None
                await delivery.ack()
                bodies.add(delivery.body)
    assert bodies == {b"1", b"2", b"3"}


async def test_messages_in_hand_and_waiting_stay_ours_beyond_their_lease(lab: Bench) -> None:
    queue = Queue("q", bytes)
    bus = lab.bus(environ={"UNIBUS_SQS__LEASE": "3"})
    started, go = asyncio.Event(), asyncio.Event()
    seen: list[tuple[bytes, int | None]] = []

    @bus.consumer(queue, concurrency=2)  # of four that it holds
    async def handle(body: bytes, delivery: Delivery[bytes]) -> None:
        started.set()
        await go.wait()
        seen.append((body, delivery.deliveries))

    async with bus.running():
        await bus.send_many(queue, [b"1", b"2", b"3", b"4"])
        async with asyncio.timeout(SOON):
            await started.wait()
        assert await lab.raw_receive("q", WaitTimeSeconds=5) == []  # longer than the lease
        go.set()

        async def handled() -> bool:
            return len(seen) == 4

        await eventually(handled)
    assert sorted(seen) == [(b"1", 1), (b"2", 1), (b"3", 1), (b"4", 1)]
