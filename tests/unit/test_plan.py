"""`unibus plan`: each row, and that a plan and the start of a bus never disagree."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.cli_lab import Cli, Done
from tests.unit.snippets import blocks, compiled, read

from unibus import Bus, ConfigError, Queue, RetryPolicy, Topic, Unsupported
from unibus.swap import Plan, Row, plan
from unibus.tooling import attached, settings_of
from unibus_contracts.supply.kafka import VERSION as KAFKA

PROFILES = ("kafka", "rabbitmq", "redis", "sqs")
NEVER = RetryPolicy(max_retries=0)


def made(*channels: Any, file: Any = False, **more: Any) -> Bus:
    return Bus(service="svc", channels=channels, config=file, **more)


async def planned(bus: Bus, to: str, source: str | None = None) -> Plan:
    """What the command does."""
    target = attached(bus)
    target._environ = {"UNIBUS_URL": f"memory://?profile={to}"}
    before = attached(bus)
    before._environ = {"UNIBUS_URL": source} if source else {}
    return await plan(target, settings_of(before) if source else None)


def row(made: Plan, channel: str, feature: str) -> Row:
    (found,) = [row for row in made.rows if (row.channel, row.feature) == (channel, feature)]
    return found


def handled(bus: Bus, queue: Queue[Any], **options: Any) -> Bus:
    @bus.consumer(queue, **({"retry": NEVER} | options))
    async def handle(body: bytes) -> None: ...

    return bus


def subscribed(bus: Bus, topic: Topic[Any], **options: Any) -> Bus:
    @bus.subscriber(topic, **({"retry": NEVER} | options))
    async def handle(body: bytes) -> None: ...

    return bus


Q, T = Queue("q", bytes), Topic("t", bytes)
ORDERED = Queue("ordered", bytes, ordered=True)
ASK = Queue("ask", bytes, reply=bytes)
FAR = RetryPolicy(max_retries=1, backoff=400 * 86400, max_backoff=400 * 86400)
HOUR = RetryPolicy(max_retries=1, backoff=3600, max_backoff=3600)


@pytest.mark.parametrize(
    ("bus", "to", "channel", "feature", "level", "words", "limit"),
    [
        (made(ORDERED), "rabbitmq", "queue 'ordered'", "order", "emulated", "single active consumer", None),
        (made(ORDERED), "sqs", "queue 'ordered'", "order", "native", "FIFO", None),
        (
            made(Queue("p", bytes, priorities=3)),
            "kafka",
            "queue 'p'",
            "priority",
            "refused",
            "kafka can't do that",
            None,
        ),
        (made(Queue("p", bytes, priorities=3)), "redis", "queue 'p'", "priority", "emulated", "each level", 10),
        (made(Queue("d", bytes, delayed=True)), "sqs", "queue 'd'", "delay", "emulated", "15 minutes", 14 * 86400),
        (made(ASK), "kafka", "queue 'ask'", "reply", "emulated", "one reply topic", None),
        (made(ASK), "kafka", "queue 'ask'", "inbox", "absent", "dropped by its retention", None),
        (made(ASK), "redis", "queue 'ask'", "inbox", "native", "", None),
        (handled(made(), Q, retry=RetryPolicy()), "redis", "queue 'q'", "delay", "emulated", "sorted set", None),
        (
            handled(made(), Q, retry=FAR),
            "rabbitmq",
            "queue 'q'",
            "delay",
            "refused",
            "lower retry.max_backoff",
            366 * 86400,
        ),
        (handled(made(), ORDERED, retry=HOUR), "rabbitmq", "queue 'ordered'", "delay", "refused", "in place", 900),
        (handled(made(), ORDERED, retry=HOUR), "kafka", "queue 'ordered'", "delay", "emulated", "its key waits", 86400),
        (
            handled(made(), Q, retry=RetryPolicy(max_retries=1, jitter=0.5)),
            *("rabbitmq", "queue 'q'", "delay", "refused", "fixed steps; use jitter=0", 366 * 86400),
        ),
        (
            subscribed(made(), T, start="all"),
            "rabbitmq",
            "group 'svc' of topic 't'",
            "replay",
            "refused",
            "was acked",
            None,
        ),
        (
            subscribed(made(), T, start="all"),
            "kafka",
            "group 'svc' of topic 't'",
            "replay",
            "native",
            "retention",
            None,
        ),
        (
            subscribed(made(), T, start=["t/x"]),
            *("sqs", "group 'svc' of topic 't'", "replay", "refused", "deleted", None),
        ),
        (
            subscribed(made(), T, broadcast=True),
            "sqs",
            "broadcast of topic 't'",
            "broadcast",
            "native",
            "its process",
            None,
        ),
        (handled(made(), Q), "kafka", "queue 'q'", "share", "absent", "belongs to one consumer", None),
        (handled(made(), Q), "sqs", "queue 'q'", "share", "native", "", None),
        (handled(made(), Q, timeout=3600), "rabbitmq", "queue 'q'", "timeout", "absent", "consumer_timeout", 900),
        (handled(made(), Q, timeout=0), "sqs", "queue 'q'", "timeout", "absent", "12 hours", 42300),
        (made(), "kafka", "all", "delivery_count", "absent", "a partition has an offset", None),
        (made(), "sqs", "all", "attempt", "emulated", "a crash forgets", None),
        (made(), "redis", "all", "atomic_move", "native", "one script", None),
        (made(), "rabbitmq", "all", "settle_confirmed", "absent", "no answer to an ack", None),
        (made(), "rabbitmq", "all", "release", "native", "at once", None),
        (made(), "kafka", "all", "lease", "absent", "until the group rebalances", None),
        (made(), "sqs", "all", "browse", "emulated", "counts as a delivery", None),
        (made(), "sqs", "all", "max_body", "native", "MessageTooLarge", 681984),
        (made(), "kafka", "all", "max_key", "native", "MessageTooLarge", 4096),
        (made(), "redis", "all", "max_header_bytes", "native", "MessageTooLarge", 1048576),
        (made(Queue("a.b"), Queue("a_b")), "kafka", "all", "names and options", "refused", "rename one", None),
        (
            made(Queue("both", bytes, ordered=True, priorities=2)),
            *("redis", "queue 'both'", "names and options", "refused", "breaks the order of a key", None),
        ),
    ],
)
async def test_each_row(
    bus: Bus, to: str, channel: str, feature: str, level: str, words: str, limit: float | None
) -> None:
    found = await planned(bus, to)
    one = row(found, channel, feature)
    assert (one.level, one.limit) == (level, limit)
    assert words in one.how
    assert one.what
    await agrees(bus, to, found)


async def refusal(bus: Bus, to: str) -> str | None:
    """What the start of this bus is refused with, in that broker's disguise."""
    copy = attached(bus)
    copy._tool, copy._environ = None, {"UNIBUS_URL": f"memory://?profile={to}"}
    try:
        async with copy:
            return None
    except (Unsupported, ConfigError) as error:
        return masked(str(error))


def masked(text: str) -> str:
    """The group of a broadcast has another name each time."""
    return re.sub(r"group 'svc\.[0-9a-f]{8}\.\d+' of", "broadcast of", text)


async def agrees(bus: Bus, to: str, found: Plan) -> None:
    """Something is refused if and only if the bus is, and then the bus says the same."""
    said = await refusal(bus, to)
    assert bool(found.refused) == (said is not None), (said, found.refused)
    assert said is None or any(one.how in said or one.what in said for one in found.refused), (said, found.refused)


async def test_batches() -> None:
    bus = made()

    @bus.consumer(Q, batch=50)
    async def handle(bodies: list[bytes]) -> None: ...

    slow, fast = (
        row(await planned(bus, "sqs"), "queue 'q'", "batch"),
        row(await planned(bus, "redis"), "queue 'q'", "batch"),
    )
    assert (slow.level, slow.limit) == ("emulated", 10)
    assert (fast.level, fast.limit) == ("native", 1000)


async def test_a_responder_that_does_not_retry_has_no_row_of_it() -> None:
    bus = made()

    @bus.responder(ASK)
    async def answer(body: bytes) -> bytes:
        return body

    found = await planned(bus, "kafka")
    assert [one.feature for one in found.rows if one.channel == "queue 'ask'"] == ["reply", "inbox", "share"]


async def test_what_only_the_old_broker_reads(tmp_path: Path) -> None:
    file = tmp_path / "unibus.toml"
    file.write_text(
        '[rabbitmq]\nheartbeat = 5\n[kafka]\npartitions = 3\n[queues.q]\nrabbitmq = { queue_type = "classic" }\n'
        "kafka = { partitions = 6 }\n"
    )
    bus = handled(made(file=file), Q)
    found = await planned(bus, "kafka", "amqp://somewhere")
    settings = {one.channel: one.what for one in found.rows if one.feature == "settings"}
    assert settings == {"[rabbitmq]": "heartbeat", "queue 'q'": "queue_type"}
    assert "less than on rabbitmq (16777216)" in row(found, "all", "max_body").how
    assert [one for one in (await planned(bus, "kafka", "kafka://somewhere")).rows if one.feature == "settings"] == []


async def test_settings_of_the_target_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "unibus.toml"
    file.write_text("[queues.q]\nsqs = { retention = 1 }\n")
    bus = handled(made(file=file), Q)
    found = await planned(bus, "sqs")
    assert "queues.q.sqs.retention" in row(found, "all", "names and options").how
    await agrees(bus, "sqs", found)
    assert not (await planned(bus, "redis")).refused


# Any application: a plan and the start of the bus agree.

names = st.sampled_from(["a", "a.b", "a_b", "a-b", "b", "a" * 60])
policies = st.builds(
    lambda retries, wait, jitter: RetryPolicy(
        max_retries=retries, backoff=wait, multiplier=1, max_backoff=wait, jitter=jitter
    ),
    st.integers(0, 2),
    st.sampled_from([0, 1, 9, 60, 1000, 50_000, 90_000, 14 * 86400, 15 * 86400, 367 * 86400]),
    st.sampled_from([0, 0, 0.5]),
)
features = st.fixed_dictionaries(
    {"ordered": st.booleans(), "priorities": st.sampled_from([0, 0, 2, 10]), "delayed": st.booleans()}
)
queues = st.tuples(names, features, st.booleans(), st.none() | policies)
topics = st.tuples(names, features, st.none() | policies, st.sampled_from(["new", "new", "all", 0.0]), st.booleans())


def generated(of_queues: list[Any], of_topics: list[Any]) -> Bus:
    bus = made()
    taken = set()
    for name, more, answers, policy in of_queues:
        if name in taken:
            continue
        taken.add(name)
        queue = Queue(name, bytes, reply=bytes if answers else None, **more)
        if policy is None:
            bus.channels.append(queue)
        elif answers:

            @bus.responder(queue, retry=policy)
            async def answer(body: bytes) -> bytes:
                return body

        else:
            handled(bus, queue, retry=policy)
    for name, more, policy, start, broadcast in of_topics:
        if name in taken:
            continue
        taken.add(name)
        topic = Topic(name, bytes, **more)
        if policy is None:
            bus.channels.append(topic)
        elif broadcast:
            subscribed(bus, topic, retry=policy, broadcast=True)
        else:
            subscribed(bus, topic, retry=policy, start=start)
    return bus


@pytest.mark.timeout(240)  # a busy machine; alone it takes a few seconds
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(queues, max_size=3), st.lists(topics, max_size=2), st.sampled_from(PROFILES))
def test_a_plan_and_the_bus_never_disagree(of_queues: list[Any], of_topics: list[Any], to: str) -> None:
    async def both() -> None:
        bus = generated(of_queues, of_topics)
        await agrees(bus, to, await planned(bus, to))

    asyncio.run(both())


# The page that leads through a swap


async def test_the_tests_of_the_page_pass() -> None:
    (source,) = blocks(read("docs/swapping.md"), "python")
    names: dict[str, Any] = {}
    exec(compiled(source, "swapping"), names)  # noqa: S102  # that is the test
    tests = [function for name, function in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        await test()


def test_the_command_line_of_the_page_works(cli: Cli) -> None:
    (line,) = blocks(read("docs/swapping.md"), "console")
    assert line == "$ unibus plan shop:bus --to kafka\n"
    app = cli.app(APP)
    assert cli(*line.split()[2:3], app, *line.split()[4:], url=None).code == 1
    for target in re.findall(r"`unibus plan (--to \S+)`", read("docs/swapping.md")):
        assert cli("plan", app, *target.split(), url=None).code == 0


# The command

APP = """
    from unibus import Bus, Queue

    bus = Bus(service="svc", channels=[Queue("urgent", bytes, priorities=3)])

    @bus.consumer(Queue("orders", bytes))
    async def handle(body): ...
"""


def run(cli: Cli, *arguments: str) -> Done:
    return cli("plan", *arguments, url=None)


def test_the_command(cli: Cli) -> None:
    app = cli.app(APP)
    done = run(cli, app, "--to", "kafka")
    assert done.code == 1
    first = done.out.splitlines()[1]
    assert first.startswith("queue 'urgent'")
    assert "refused" in first
    assert "it would not start" in done.err
    done = run(cli, app, "--to", "rabbitmq-3.13")
    assert done.code == 0
    assert "it would start" in done.err


def test_the_command_for_scripts(cli: Cli) -> None:
    app = cli.app(APP)
    done = run(cli, app, "--to", "sqs", "--json")
    assert done.code == 1
    (told,) = done.lines
    assert told["target"] == "sqs"
    assert told["refused"] == 1
    assert told["rows"][0]["level"] == "refused"
    assert set(told["rows"][0]) == {"channel", "feature", "level", "what", "how", "limit"}
    assert told["pinned"]["kept"] > 150


@pytest.mark.parametrize(
    ("to", "version", "server", "says"),
    [
        ("rabbitmq-3.10", "3.10", "rabbitmq 3.10.8", "for 3.10; the contract suite on rabbitmq 3.10.8: "),
        ("rabbitmq-3.10.2", "3.10.2", "rabbitmq 3.10.8", "the contract suite on rabbitmq 3.10.8: "),
        ("rabbitmq-3.13", "3.13", None, "for 3.13; not measured on that version, only on rabbitmq 3.10.8"),
        ("rabbitmq", "4.3", None, "for 4.3; not measured on that version, only on rabbitmq 3.10.8"),
        ("redis-7.0", "7.0", "redis 7.0.15", "the contract suite on redis 7.0.15: "),
        ("redis", None, "redis 7.0.15", "the contract suite on redis 7.0.15: "),
        ("sqs", None, "SQS/SNS on ministack", "the contract suite on SQS/SNS on ministack: "),
        ("kafka", None, f"kafka {KAFKA}", f"the contract suite on kafka {KAFKA}: "),
    ],
)
def test_it_says_what_the_answers_were_measured_on(
    cli: Cli, to: str, version: str | None, server: str | None, says: str
) -> None:
    app = cli.app(APP)
    assert says in run(cli, app, "--to", to).err
    (told,) = run(cli, app, "--to", to, "--json").lines
    assert (told["version"], told["measured"]) == (version, server is not None)
    assert (told["pinned"] or {}).get("server") == server


def test_what_nobody_has_measured_says_so(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = cli.app(APP)
    monkeypatch.setattr("unibus_contracts.pins.ANSWERS", tmp_path)
    for to in ("kafka", "rabbitmq"):
        assert "; not measured: no answers of it are pinned" in run(cli, app, "--to", to).err
    monkeypatch.setitem(sys.modules, "unibus_contracts.pins", None)
    assert "declared by its adapter\n" in run(cli, app, "--to", "kafka").err
    (told,) = run(cli, app, "--to", "kafka", "--json").lines
    assert (told["measured"], told["pinned"]) == (None, None)


@pytest.mark.parametrize(
    ("to", "known"),
    [
        ("kafka-99", "kafka, the same on all versions"),
        ("redis-8.0", "redis, the same on all versions; measured: redis-7.0"),
        ("rabbitmq-99.1", "rabbitmq-3.10 to rabbitmq-4.3; measured: rabbitmq-3.10"),
        ("rabbitmq-3.9", "rabbitmq-3.10 to rabbitmq-4.3; measured: rabbitmq-3.10"),
        ("rabbitmq-4", "rabbitmq-3.10 to rabbitmq-4.3; measured: rabbitmq-3.10"),
        ("rabbitmq-", "rabbitmq-3.10 to rabbitmq-4.3; measured: rabbitmq-3.10"),
    ],
)
def test_a_version_that_nothing_is_known_of(cli: Cli, to: str, known: str) -> None:
    done = run(cli, cli.app(APP), "--to", to)
    assert (done.code, done.out) == (2, "")
    assert done.err == f"unibus: --to {to}: no such version is known; known: {known}\n"


def test_a_target_by_url_is_asked(cli: Cli) -> None:
    app = cli.app(APP)
    assert run(cli, app, "--to", "memory://").code == 0
    assert run(cli, app, "--to", "memory://?profile=kafka").code == 1
    unreachable = run(cli, app, "--to", "redis://127.0.0.1:1")
    assert (unreachable.code, unreachable.out) == (3, "")


def test_what_is_wrong_is_said(cli: Cli) -> None:
    app = cli.app(APP)
    done = run(cli, app, "--to", "kafak")
    assert done.code == 2
    assert done.err == "unibus: profile=kafak: no installed adapter has a profile of that name; did you mean 'kafka'?\n"
    assert run(cli, "nothing:bus", "--to", "kafka").code == 2
    assert run(cli, app).code == 2


def test_the_file_says_where_it_is_now(cli: Cli) -> None:
    cli.toml('url = "amqp://somewhere"\nusername = "joe"\n[rabbitmq]\nheartbeat = 5\n')
    (told,) = run(cli, cli.app(APP), "--to", "redis", "--json").lines
    assert told["from"] == "rabbitmq"
    assert ("[rabbitmq]", "heartbeat") in {(one["channel"], one["what"]) for one in told["rows"]}
