"""The memory broker in disguise: it declares and refuses what the adapter of another broker does, without its client library."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unibus import (
    Bus,
    ConfigError,
    MessageTooLarge,
    Queue,
    RetryPolicy,
    Topic,
    Unsupported,
)
from unibus.adapter import Endpoint, Url
from unibus.channel import Group
from unibus.clock import VirtualClock
from unibus.memory_broker import MemoryBroker
from unibus.registry import profile_names, profile_of
from unibus.testing import in_memory
from unibus_contracts import pins
from unibus_contracts.kit import _as_dict
from unibus_contracts.saboteurs.run import contracts, installed, trial

PROFILES = ("kafka", "rabbitmq", "redis", "sqs")


def made(*channels: Any, **settings: Any) -> Bus:
    return Bus(service="svc", channels=channels, config=False, **settings)


def pinned(name: str) -> dict[str, Any]:
    (path,) = [path for path in pins.ANSWERS.glob("*.json") if path.stem.partition("-")[0] == name]
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def disguise(name: str) -> str:
    """The profile of the version that the answers are pinned of."""
    version = pinned(name)["version"]
    return f"{name}-{version}" if version else name


def test_each_broker_of_this_repository_has_a_profile() -> None:
    assert set(PROFILES) <= set(profile_names())


@pytest.mark.parametrize("name", PROFILES)
def test_an_adapter_declares_what_is_pinned(name: str) -> None:
    """Plans and profiles are told the same as who asks a server: one table, and the pins are its measurement."""
    endpoint = Endpoint(Url("memory"), "svc", "1", VirtualClock())
    told = _as_dict(profile_of(disguise(name), endpoint).capabilities)
    assert json.loads(json.dumps(told["features"])) == pinned(name)["features"]
    assert told["numbers"] == pinned(name)["numbers"]


@pytest.mark.timeout(300)  # 195 contracts on a machine that may be busy; alone it takes 8 s
@pytest.mark.parametrize("name", PROFILES)
def test_the_contract_suite_finds_in_a_profile_what_it_finds_on_the_broker(name: str) -> None:
    """Kept and refused, contract by contract. Time leaps, so nobody waits."""
    with installed() as folder:
        done = trial(folder, name, list(contracts().values()), url=f"memory://?profile={disguise(name)}")
        assert done.caught_by == [], done.output
        report = json.loads((folder / f"{name}-0.json").read_text(encoding="utf-8"))
    assert report["unexercised"] == []
    assert len(done.kept) == len(contracts())
    found, known = pins.answers(report), pinned(name)
    assert (found["features"], found["numbers"]) == (known["features"], known["numbers"])
    restarts = {id: answer for id, answer in found["contracts"].items() if id.startswith("fault.restart_")}
    assert set(restarts.values()) == {"kept"}  # in a run on a server nothing restarts it
    assert found["contracts"] == known["contracts"] | restarts


def test_a_profile_needs_no_client_library() -> None:
    code = """
import sys
for name in ("aiokafka", "aio_pika", "aiormq", "pamqp", "yarl", "redis", "hiredis", "aiobotocore", "botocore"):
    sys.modules[name] = None
import asyncio
from unibus import Bus, Queue
async def main():
    for name in ("kafka", "rabbitmq", "redis", "sqs"):
        queue = Queue("q", bytes)
        async with Bus(f"memory://?profile={name}", service="s", channels=[queue], config=False, environ={}) as bus:
            await bus.send(queue, b"x")
            print(bus.capabilities.adapter)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["kafka", "rabbitmq", "redis", "sqs"]


@pytest.mark.parametrize(
    ("profile", "channels", "error", "words"),
    [
        ("kafka", [Queue("q", bytes, priorities=2)], Unsupported, r"2 priorities: kafka can't .* read in its order"),
        ("kafka", [Queue("a.b", bytes), Queue("a_b", bytes)], ConfigError, "would both be"),
        ("sqs", [Queue("q", bytes, priorities=2)], Unsupported, "sqs can't do that"),
        ("redis", [Queue("q", bytes, ordered=True, priorities=2)], Unsupported, "breaks the order of a key"),
    ],
)
async def test_what_the_broker_refuses_is_refused_at_start(
    profile: str, channels: list[Any], error: type[Exception], words: str
) -> None:
    bus = made(*channels)
    with pytest.raises(error, match=words):
        async with in_memory(bus, profile=profile):
            pass
    async with in_memory(bus):
        pass


@pytest.mark.parametrize("profile", PROFILES)
async def test_a_body_that_the_broker_would_not_carry_is_too_large(profile: str) -> None:
    queue = Queue("q", bytes)
    bus = made(queue)
    async with in_memory(bus, profile=profile):
        limit = bus.capabilities.max_body
        assert limit is not None
        await bus.send(queue, bytes(limit))
        with pytest.raises(MessageTooLarge, match=profile):
            await bus.send(queue, bytes(limit + 1))


async def test_a_limit_that_only_the_driver_knows_is_met_too() -> None:
    """SNS carries 256 KiB, SQS four times as much."""
    queue, topic = Queue("q", bytes), Topic("t", bytes)
    bus = made(queue, topic)
    async with in_memory(bus, profile="sqs"):
        await bus.send(queue, bytes(300_000))
        with pytest.raises(MessageTooLarge, match="as SNS counts them"):
            await bus.publish(topic, b"x" * 300_000)


async def test_a_version_of_the_server_may_be_named() -> None:
    async def limit(profile: str) -> int | None:
        bus = made()
        async with in_memory(bus, profile=profile):
            return bus.capabilities.max_body

    assert await limit("rabbitmq-3.13") == 128 * 1024 * 1024
    assert await limit("rabbitmq-4.0") == await limit("rabbitmq") == 16 * 1024 * 1024


async def test_the_settings_of_the_broker_count(tmp_path: Path) -> None:
    """Its table and its channels' tables in unibus.toml, and not those of memory; so does a user, whom memory does not ask."""
    file = tmp_path / "unibus.toml"
    file.write_text(
        'url = "redis://somewhere"\nusername = "joe"\n[redis]\nretention = 3600\n'
        "[queues.q]\nkafka = { partitions = 3 }\nsqs = { retention = 1 }\n"
    )
    queue, topic = Queue("q", bytes), Topic("t", str)
    bus = Bus(service="svc", channels=[queue], config=file)
    seen: list[str] = []

    @bus.subscriber(topic, start="all")
    async def handle(body: str) -> None:
        seen.append(body)

    async with in_memory(bus, profile="redis") as lab:
        await bus.publish(topic, "x")
        await lab.idle()
        assert bus.settings.broker == "redis"
        assert bus.settings.source("redis.retention").startswith(str(file))
    assert seen == ["x"]
    with pytest.raises(Unsupported, match="rabbitmq can't do that"):
        async with in_memory(bus, profile="rabbitmq"):
            pass
    with pytest.raises(ConfigError, match=r"queues\.q\.sqs\.retention: expected a value .*60"):
        async with in_memory(Bus(service="svc", channels=[queue], config=file), profile="sqs"):
            pass


def waiting(bus: Bus, group: Group) -> list[str]:
    assert isinstance(bus.native, MemoryBroker)
    return [message.body.decode() for message in bus.native.waiting(group)]


async def test_history_begins_where_a_new_group_says() -> None:
    topic, clock = Topic("t", str), VirtualClock()

    def member(group: str, start: Any) -> Bus:
        bus = made(url="memory://history?profile=kafka", environ={})
        bus._clock = clock

        @bus.subscriber(topic, group=group, start=start)
        async def never(body: str) -> None: ...

        return bus

    async with member("g", "new") as bus:
        await bus.publish(topic, "1")
        clock.move(60)
        since = clock.time()
        await bus.publish(topic, "2")
        async with bus.receiver(topic, group="g") as receiver:
            found = [await receiver.receive(timeout=1) for _ in range(2)]
        positions = [delivery.position for delivery in found if delivery is not None]
    cases = {"all": ("all", ["1", "2"]), "time": (since, ["2"]), "position": (positions[1:], ["2"]), "now": ("new", [])}
    for group, (start, expected) in cases.items():
        async with member(group, start) as bus:
            assert waiting(bus, Group(topic, group)) == expected, group
    with pytest.raises(ConfigError, match="is no position of its topic"):
        async with member("none", ["nowhere"]):
            pass


@pytest.mark.parametrize("profile", PROFILES)
async def test_the_policies_are_those_of_the_core(profile: str) -> None:
    queue = Queue("q", str)
    bus, runs = made(queue), list[str]()

    @bus.consumer(queue, retry=RetryPolicy(max_retries=2, backoff=5, multiplier=1))
    async def fails(body: str) -> None:
        runs.append(body)
        raise ValueError(body)

    async with in_memory(bus, profile=profile) as lab:
        await bus.send(queue, "x")
        await lab.advance(9.9)
        assert runs == ["x", "x"]
        await lab.advance(0.1)
        assert runs == ["x", "x", "x"]
        (letter,) = lab.dead_letters(queue)
        assert letter.headers["x-dlq-reason"] == "retries_exhausted"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "memory://?profile=kafak",
            "profile=kafak: no installed adapter has a profile of that name; did you mean 'kafka'",
        ),
        ("memory://?profile=memory", "profile=memory: no installed adapter"),
        ("memory://?profile=", "profile=: no installed adapter has a profile of that name; there are .*kafka"),
        ("memory://?profile=kafka&partitons=3", r"kafka\.partitons: unknown key; did you mean 'partitions'"),
        ("memory://?profile=redis&lease=0", r"redis\.lease: expected a value"),
        ("memory://u:p@?profile=kafka", "user"),
    ],
)
async def test_a_url_that_is_wrong_says_in_what(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        async with made(url=url, environ={}):
            pass


async def test_one_broker_has_one_profile() -> None:
    async with made(url="memory://one-profile?profile=kafka", environ={}):
        for other in ("memory://one-profile", "memory://one-profile?profile=redis"):
            with pytest.raises(ConfigError, match="it has profile=kafka, and now"):
                async with made(url=other, environ={}):
                    pass


async def test_the_profile_is_no_setting_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "unibus.toml"
    file.write_text('url = "memory://"\n[memory]\nprofile = "kafka"\n')
    with pytest.raises(ConfigError, match=r"memory\.profile: .*memory://\?profile=kafka"):
        async with Bus(service="svc", config=file, environ={}):
            pass
