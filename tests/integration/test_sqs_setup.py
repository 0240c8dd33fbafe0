"""SQS and SNS, on ministack, an emulator: what the service is set up from, what is made there, and what becomes of it."""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.integration.sqs_kit import SOON, Bench, at, broker_url, eventually, out, send, subscribe

from unibus import AuthenticationFailed, Bus, NotFound, PermissionDenied, Queue, Topic
from unibus.adapter import Declared, Secret, Topology, Url
from unibus.channel import dead_letter_queue
from unibus.url import parse


@pytest.fixture
async def lab() -> AsyncIterator[Bench]:
    async with at(broker_url()) as bench:
        yield bench


# Credentials and region


@pytest.fixture
def anonymous(lab: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Url:
    """The broker's URL without its credentials, in an environment that has none either."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return replace(parse(lab.url), username=None, password=None)


async def test_credentials_come_from_the_environment(
    lab: Bench, anonymous: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parse(lab.url)
    assert given.username is not None
    assert given.password is not None
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", given.username)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", given.password.value)
    adapter = await lab.adapter(queue := lab.queue(), endpoint=lab.endpoint(anonymous))
    await send(adapter, out(queue))


async def test_credentials_and_region_come_from_a_profile(
    lab: Bench, anonymous: Url, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = parse(lab.url)
    assert given.password is not None
    keys = f"aws_access_key_id = {given.username}\naws_secret_access_key = {given.password.value}\n"
    (tmp_path / "credentials").write_text("[shop]\n" + keys)
    (tmp_path / "config").write_text(f"[profile shop]\nregion = {given.hosts[0][0]}\n")
    monkeypatch.setenv("AWS_PROFILE", "shop")
    adapter = await lab.adapter(queue := lab.queue(), endpoint=lab.endpoint(replace(anonymous, hosts=())))
    await send(adapter, out(queue))


async def test_credentials_that_end_are_fetched_anew(
    lab: Bench, anonymous: Url, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As those of a role do. Here they end within the time in which botocore asks for new ones at each request."""
    soon = (dt.datetime.now(dt.UTC) + dt.timedelta(minutes=5)).isoformat()
    given, file = parse(lab.url), tmp_path / "keys.json"

    def hand_out(key: str, secret: str) -> None:
        keys = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret, "Expiration": soon}
        (tmp_path / "next").write_text(json.dumps(keys))
        (tmp_path / "next").rename(file)

    assert given.username is not None
    assert given.password is not None
    hand_out(given.username, given.password.value)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {file}\n")
    adapter = await lab.adapter(queue := lab.queue(), endpoint=lab.endpoint(anonymous))
    for _ in range(2):
        await send(adapter, out(queue))
    iam = await lab.client("iam")
    await iam.create_user(UserName=(name := f"u{secrets.token_hex(4)}"))  # who may do nothing
    other = (await iam.create_access_key(UserName=name))["AccessKey"]
    hand_out(other["AccessKeyId"], other["SecretAccessKey"])
    [error] = await adapter.send([out(queue)], SOON)
    assert isinstance(error, PermissionDenied)
    hand_out(given.username, given.password.value)
    await send(adapter, out(queue))


async def test_no_credentials_anywhere_is_said_so(lab: Bench, anonymous: Url) -> None:
    with pytest.raises(AuthenticationFailed, match="no AWS credentials"):
        await lab.adapter(endpoint=lab.endpoint(anonymous))


async def test_a_wrong_region_is_named_where_nothing_is_found(lab: Bench) -> None:
    queue = lab.queue()
    await lab.adapter(queue)
    elsewhere = await lab.adapter(endpoint=lab.endpoint(replace(parse(lab.url), hosts=(("us-west-2", None),))))
    with pytest.raises(NotFound, match=r"us-west-2.*queue 'q'"):
        await elsewhere.declare(Topology("verify", (queue,)))
    await elsewhere.declare(Topology("assume", (queue,)))
    [error] = await elsewhere.send([out(queue)], SOON)
    assert isinstance(error, NotFound)
    assert "us-west-2" in str(error)
    with pytest.raises(NotFound, match="us-west-2"):
        await subscribe(elsewhere, queue)


async def test_a_queue_or_topic_that_may_not_be_made_is_said_so(lab: Bench) -> None:
    iam = await lab.client("iam")
    name = f"u{secrets.token_hex(4)}"
    await iam.create_user(UserName=name)
    key = (await iam.create_access_key(UserName=name))["AccessKey"]
    url = replace(parse(lab.url), username=key["AccessKeyId"], password=Secret(key["SecretAccessKey"]))
    adapter = await lab.adapter(endpoint=lab.endpoint(url))
    for channel, name in ((lab.queue(), "_-q'"), (lab.topic(), "_-t'")):
        with pytest.raises(PermissionDenied, match=f"{name}.*not authorized"):
            await adapter.declare(Topology("create", (channel,)))


# What is made


async def test_what_is_made_on_aws(lab: Bench) -> None:
    queue = lab.queue(options={"retention": 3600, "kms_key": "alias/mine"})
    assert isinstance(queue.address, Queue)
    letters = Declared(dead_letter_queue(queue.address), queue.name + ".dlq", "dead letter")
    topic = lab.topic(options={"kms_key": "alias/mine"})
    await lab.adapter(queue, letters, topic, lab.group(topic))

    async def attributes(name: str) -> Any:
        answer = await lab.sqs.get_queue_attributes(QueueUrl=await lab.url_of(name), AttributeNames=["All"])
        return answer["Attributes"]

    made, of_letters, of_group = [await attributes(name) for name in ("q", "q_-dlq", "t_-g")]
    assert json.loads(made["RedrivePolicy"]) == {
        "deadLetterTargetArn": of_letters["QueueArn"],
        "maxReceiveCount": 100,
    }
    assert (made["MessageRetentionPeriod"], made["KmsMasterKeyId"]) == ("3600", "alias/mine")
    assert "RedrivePolicy" not in of_letters
    arn = await lab.topic_arn("t")
    assert (await lab.sns.get_topic_attributes(TopicArn=arn))["Attributes"]["KmsMasterKeyId"] == "alias/mine"
    [statement] = json.loads(of_group["Policy"])["Statement"]
    assert statement["Principal"] == {"Service": "sns.amazonaws.com"}
    assert (statement["Resource"], statement["Condition"]["ArnEquals"]) == (
        of_group["QueueArn"],
        {"aws:SourceArn": arn},
    )
    [subscription] = (await lab.sns.list_subscriptions_by_topic(TopicArn=arn))["Subscriptions"]
    found = await lab.sns.get_subscription_attributes(SubscriptionArn=subscription["SubscriptionArn"])
    assert found["Attributes"]["RawMessageDelivery"] == "true"


async def test_inspecting_tells_what_is_missing_and_what_may_lose_data(lab: Bench) -> None:
    queue, topic = lab.queue(options={"retention": 3600}), lab.topic()
    wanted = Topology("verify", (queue, topic, lab.group(topic)))
    adapter = await lab.adapter()
    found = await adapter.inspect(wanted)
    assert [(one.kind, one.exists) for one in found] == [
        ("SNS topic", False),
        ("SQS queue", False),
        ("SQS queue", False),
        ("SNS subscription", False),
    ]
    await adapter.declare(replace(wanted, mode="create"))
    found = await adapter.inspect(wanted)
    assert all(one.exists for one in found)
    assert [bool(one.risk) for one in found] == [False, True, False, False]


FILTERED = """
[topics.t]
sqs = { attributes = ["tenant"] }
[topics.t.groups]
some = { sqs = { filter_policy = { tenant = ["a"] } } }
inside = { sqs = { filter_policy = { kind = ["b"] }, filter_scope = "MessageBody" } }
"""


async def test_a_filter_policy_is_a_setting_of_the_group(lab: Bench, tmp_path: Path) -> None:
    (tmp_path / "unibus.toml").write_text(FILTERED)
    topic = Topic("t", bytes)
    bus = lab.bus(config=tmp_path / "unibus.toml")
    seen: dict[str, list[bytes]] = {"some": [], "inside": [], "every": []}

    def subscriber(group: str) -> None:
        @bus.subscriber(topic, group=group)
        async def handle(body: bytes) -> None:
            seen[group].append(body)

    for group in seen:
        subscriber(group)
    one, two = b'{"kind": "a"}', b'{"kind": "b"}'
    async with bus.running():
        await bus.publish(topic, one, headers={"tenant": "a"})
        await bus.publish(topic, two, headers={"tenant": "b"})

        async def handled() -> bool:
            return len(seen["every"]) == 2 and bool(seen["some"]) and bool(seen["inside"])

        await eventually(handled)
    assert (seen["some"], seen["inside"]) == ([one], [two])


# What becomes of it


async def test_a_deleted_topic_is_said_to_publishers_and_made_again_at_the_next_start(lab: Bench) -> None:
    topic, seen = Topic("t", bytes), list[bytes]()

    def service() -> Bus:
        bus = lab.bus()

        @bus.subscriber(topic, group="g")
        async def handle(body: bytes) -> None:
            seen.append(body)

        return bus

    async def reached() -> bool:
        return body in seen

    async with service().running() as bus:
        body = b"before"
        await bus.publish(topic, body)
        await eventually(reached)
        await lab.sns.delete_topic(TopicArn=await lab.topic_arn("t"))
        with pytest.raises(NotFound, match="topic 't'"):
            await bus.publish(topic, b"nowhere")
    async with service().running() as bus:
        body = b"after"
        await bus.publish(topic, body)
        await eventually(reached)
    assert seen == [b"before", b"after"]


async def test_a_deleted_group_is_made_again(lab: Bench) -> None:
    topic, bus, seen = Topic("t", bytes), lab.bus(), set[bytes]()

    @bus.subscriber(topic, group="g")
    async def handle(body: bytes) -> None:
        seen.add(body)

    async def published_and_handled() -> bool:
        await bus.publish(topic, body)
        return body in seen

    async with bus.running():
        body = b"before"
        await eventually(published_and_handled)
        arn = await lab.topic_arn("t")
        for found in (await lab.sns.list_subscriptions_by_topic(TopicArn=arn))["Subscriptions"]:
            await lab.sns.unsubscribe(SubscriptionArn=found["SubscriptionArn"])
        await lab.sqs.delete_queue(QueueUrl=await lab.url_of("t_-g"))
        body = b"after"
        await eventually(published_and_handled)
