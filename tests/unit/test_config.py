"""Settings: which source wins, what is refused and in which words, where each came from, and that no secret shows."""

from __future__ import annotations

import ssl
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from unibus.adapter import Secret
from unibus.channel import DEAD_LETTER, Group, Queue, Topic
from unibus.config import ConsumerSettings, Settings, check_table, load
from unibus.errors import ConfigError
from unibus.retry import RetryPolicy

ORDERS = Queue[bytes]("orders")
CHARGED = Topic[bytes]("order.charged")
BILLING = Group(CHARGED, "billing")
MEMORY = {"url": "memory://"}

# The example of DESIGN.md, word for word.
EXAMPLE = """
app = "shop.main:bus"
service = "billing"
url = "amqp://rabbit-1.internal,rabbit-2.internal/shop"
username = "billing"
prefix = "staging."
declare = "verify"
delays = [5, 60, 600]
send_timeout = 30
shutdown_timeout = 25

[defaults]
concurrency = 10
timeout = 900
retry = { max_retries = 5, backoff = 1, multiplier = 4, max_backoff = 300 }

[queues.orders]
name = "ORDERS_V2"
concurrency = 64
retry = { max_retries = 8 }
rabbitmq = { queue_type = "classic" }
sqs = { retention = 1209600, kms_key = "alias/orders" }

[topics."order.charged".groups]
billing = { name = "billing-v1", concurrency = 32 }
audit = {}

[kafka]
partitions = 12
replication = 3

[bus.analytics]
url = "kafka://k1:9092"
"""


class Place:
    """A directory with a unibus.toml, and an environment."""

    def __init__(self, path: Path) -> None:
        self.file = path / "unibus.toml"

    def load(
        self,
        toml: str | None = None,
        env: Mapping[str, str] | None = None,
        code: Mapping[str, object] | None = None,
        **more: Any,
    ) -> Settings:
        if toml is not None:
            self.file.write_text(toml)
        more.setdefault("channels", [ORDERS, CHARGED])
        more.setdefault("groups", [BILLING])
        return load(MEMORY if code is None else code, environ=env or {}, **more)

    def refused(self, *args: Any, **more: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(*args, **more)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None  # where pydantic would show the value
        return str(caught.value)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def consumer(settings: Settings, address: Queue[Any] | Group = ORDERS, **code: Any) -> ConsumerSettings:
    return settings.consumer(address, code)


# --- what is in force


def test_built_in_values(place: Place) -> None:
    settings = place.load()
    assert (settings.prefix, settings.declare, settings.delays, settings.driver) == ("", "create", (), {})
    assert (settings.send_timeout, settings.request_timeout, settings.shutdown_timeout) == (30.0, 30.0, 25.0)
    assert consumer(settings) == ConsumerSettings(10, 20, 900.0, RetryPolicy(), "at-least-once", "mark")
    assert settings.app is None


def test_the_example(place: Place) -> None:
    settings = place.load(EXAMPLE, {"UNIBUS_PASSWORD": "s3"}, {})
    assert str(settings.url) == "amqp://rabbit-1.internal,rabbit-2.internal/shop"
    assert (settings.url.username, settings.url.password) == ("billing", Secret("s3"))
    assert (settings.app, settings.service, settings.broker) == ("shop.main:bus", "billing", "rabbitmq")
    assert (settings.prefix, settings.declare, settings.delays) == ("staging.", "verify", (5.0, 60.0, 600.0))
    assert settings.driver == {}
    assert consumer(settings) == ConsumerSettings(64, 128, 900.0, RetryPolicy(max_retries=8), "at-least-once", "mark")
    assert consumer(settings, BILLING).concurrency == 32
    assert settings.physical(ORDERS) == "staging.ORDERS_V2"
    assert settings.derived(ORDERS, DEAD_LETTER) == "staging.ORDERS_V2.dlq"
    assert settings.physical(CHARGED) == "staging.order.charged"
    assert settings.physical(BILLING) == "staging.billing-v1"
    assert settings.physical(Group(CHARGED, "audit")) == "staging.order.charged.audit"
    assert settings.options(ORDERS) == {"queue_type": "classic"}
    assert settings.options(BILLING) == {}
    assert settings.declared_channels() == []
    assert settings.declared_groups() == [Group(CHARGED, "audit")]


def test_the_other_side_of_the_swap(place: Place) -> None:
    settings = place.load(EXAMPLE, {"UNIBUS_URL": "memory://"}, {})
    assert settings.broker == "memory"
    assert settings.options(ORDERS) == {}
    assert settings.physical(ORDERS) == "staging.ORDERS_V2"


TOP = [
    ("service", "a", "b", "c"),
    ("username", "a", "b", "c"),
    ("prefix", "a.", "b.", "c."),
    ("declare", "create", "verify", "assume"),
    ("delays", [1], [2, 3], [4]),
    ("send_timeout", 1, 2, 3.5),
    ("request_timeout", 1, 2, 3.5),
    ("shutdown_timeout", 1, 2, 0),
]


@pytest.mark.parametrize(("key", "code", "toml", "env"), TOP)
def test_environment_over_file_over_code(place: Place, key: str, code: Any, toml: Any, env: Any) -> None:
    def value(settings: Settings) -> Any:
        return settings.url.username if key == "username" else getattr(settings, key)

    def expected(given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    text = f"{key} = {toml!r}"
    variable = {f"UNIBUS_{key.upper()}": ",".join(map(str, env)) if isinstance(env, list) else str(env)}
    given = {**MEMORY, key: code}
    assert value(place.load(None, {}, given)) == expected(code)
    assert value(place.load(text, {}, given)) == expected(toml)
    assert value(place.load(text, variable, given)) == expected(env)
    assert place.load(text, variable, given).source(key) == f"environment UNIBUS_{key.upper()}"
    assert place.load(text, {}, given).source(key) == "unibus.toml"
    place.file.unlink()
    assert place.load(None, {}, given).source(key) == "code"


# Each row adds a source that wins over those above it.
LADDER: list[tuple[str, dict[str, Any], int]] = [
    ("built-in", {}, 10),
    ("Bus(defaults=)", {"bus": {"concurrency": 11}}, 11),
    ("[defaults]", {"toml": ["[defaults]\nconcurrency = 12"]}, 12),
    ("environment defaults", {"env": {"UNIBUS_DEFAULTS__CONCURRENCY": "13"}}, 13),
    ("code", {"code": {"concurrency": 14}}, 14),
    ("[queues.orders]", {"toml": ["[queues.orders]\nconcurrency = 15"]}, 15),
    ("environment queue", {"env": {"UNIBUS_QUEUES__ORDERS__CONCURRENCY": "16"}}, 16),
]
TOPIC_LADDER: list[tuple[str, dict[str, Any], int]] = [
    *LADDER[:5],
    ("[topics.x]", {"toml": ['[topics."order.charged"]\nconcurrency = 15']}, 15),
    ("environment topic", {"env": {"UNIBUS_TOPICS__ORDER_CHARGED__CONCURRENCY": "16"}}, 16),
    ("[topics.x.groups]", {"toml": ['[topics."order.charged".groups]\nbilling = { concurrency = 17 }']}, 17),
    ("environment group", {"env": {"UNIBUS_TOPICS__ORDER_CHARGED__GROUPS__BILLING__CONCURRENCY": "18"}}, 18),
]


@pytest.mark.parametrize(
    ("address", "ladder", "height"),
    [(ORDERS, LADDER, n) for n in range(1, len(LADDER) + 1)]
    + [(BILLING, TOPIC_LADDER, n) for n in range(1, len(TOPIC_LADDER) + 1)],
)
def test_precedence(place: Place, address: Queue[Any] | Group, ladder: list[Any], height: int) -> None:
    toml: list[str] = []
    env: dict[str, str] = {}
    code: dict[str, object] = {}
    bus: dict[str, object] = {}
    for _, given, _ in ladder[:height]:
        toml += given.get("toml", [])
        env |= given.get("env", {})
        code |= given.get("code", {})
        bus |= given.get("bus", {})
    settings = place.load("\n".join(toml), env, {**MEMORY, "defaults": bus})
    found = consumer(settings, address, **code)
    assert found.concurrency == ladder[height - 1][2]
    assert found.prefetch == 2 * found.concurrency


def test_a_group_has_no_part_in_the_table_of_another(place: Place) -> None:
    settings = place.load('[topics."order.charged".groups]\naudit = { concurrency = 3 }')
    assert consumer(settings, BILLING).concurrency == 10
    assert consumer(settings, Group(CHARGED, "audit")).concurrency == 3


def test_a_retry_policy_is_merged_field_by_field(place: Place) -> None:
    policy = RetryPolicy(max_retries=1, backoff=2, retry_on=(OSError,), give_up_on=(KeyError,))
    settings = place.load(
        "[defaults]\nretry = { max_retries = 7, jitter = 0.5 }\n[queues.orders]\nretry = { multiplier = 2 }",
        {"UNIBUS_QUEUES__ORDERS__RETRY__MAX_BACKOFF": "9", "UNIBUS_DEFAULTS__RETRY": '{"immediate": 2}'},
    )
    assert consumer(settings).retry == RetryPolicy(max_retries=7, jitter=0.5, multiplier=2, max_backoff=9, immediate=2)
    found = consumer(settings, retry=policy).retry  # a policy in code says all its fields
    assert found == RetryPolicy(
        max_retries=1, backoff=2, multiplier=2, max_backoff=9, retry_on=(OSError,), give_up_on=(KeyError,)
    )


def test_a_policy_for_all_in_code(place: Place) -> None:
    policy = RetryPolicy(max_retries=1, give_up_on=(KeyError,))
    settings = place.load("[defaults]\nretry = { backoff = 7 }", {}, {**MEMORY, "defaults": {"retry": policy}})
    assert consumer(settings).retry == RetryPolicy(max_retries=1, backoff=7, give_up_on=(KeyError,))
    assert consumer(settings, retry=RetryPolicy()).retry == RetryPolicy()


@pytest.mark.parametrize(
    ("toml", "code", "timeout"),
    [("", {}, 900.0), ("timeout = 0", {}, None), ("timeout = 5", {}, 5.0), ("", {"timeout": None}, None)],
)
def test_handler_timeout(place: Place, toml: str, code: dict[str, Any], timeout: float | None) -> None:
    assert consumer(place.load(f"[queues.orders]\n{toml}"), **code).timeout == timeout


def test_prefetch_and_guarantee(place: Place) -> None:
    settings = place.load('[queues.orders]\nprefetch = 3\n[defaults]\nguarantee = "at-most-once"')
    assert consumer(settings) == ConsumerSettings(10, 3, 900.0, RetryPolicy(), "at-most-once", "mark")
    assert consumer(settings, BILLING, guarantee="at-least-once", prefetch=5).prefetch == 5


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ({"concurrency": 0}, "concurrency: expected a value greater than or equal to 1"),
        ({"concurrency": "3"}, "concurrency: expected a valid integer"),
        ({"guarantee": "never"}, "guarantee: expected 'at-least-once' or 'at-most-once'"),
        ({"on_lease_lost": "ignore"}, "on_lease_lost: expected 'mark' or 'cancel'"),
        ({"concurency": 3}, "concurency: unknown key; did you mean 'concurrency'?"),
        ({"retry": 3}, "retry: expected a table"),
    ],
)
def test_what_a_decorator_can_not_say(place: Place, code: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        consumer(place.load(), **code)
    assert str(caught.value) == f"consumer of queue 'orders': {words}"
    assert caught.value.__context__ is None


# --- channels that only the file declares


def test_channels_and_groups_of_the_file_alone(place: Place) -> None:
    settings = place.load(
        """
        [queues.extra]
        ordered = true
        priorities = 4
        delayed = true
        [queues.orders]
        [topics.news]
        groups = { a = {}, b = {} }
        [topics."order.charged".groups]
        billing = {}
        audit = {}
        """
    )
    queue, topic = settings.declared_channels()
    assert (queue, topic) == (Queue("extra"), Topic("news"))
    assert (queue.ordered, queue.priorities, queue.delayed, queue.body) == (True, 4, True, bytes)
    news = Topic[bytes]("news")
    assert settings.declared_groups() == [Group(news, "a"), Group(news, "b"), Group(CHARGED, "audit")]


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[queues.orders]\nordered = true", "[queues.orders]: ordered: the code declares False"),
        ("[queues.orders]\npriorities = 3", "[queues.orders]: priorities: the code declares 0"),
        ("[topics.orders]", "[topics.orders]: the code declares queue 'orders'; one name is one kind"),
        ('[queues."order.charged"]', "the code declares topic 'order.charged'"),
        ("[queues.x]\n[topics.x]", "[topics.x]: there is a queue of this name"),
        ("[queues.x]\npriorities = 1", "[queues.x]: priorities: expected 2 to 10"),
        ('[queues."a b"]', '[queues."a b"]: queue name'),
        ('[queues."x.dlq"]', "reserved"),
        ("[topics.x.groups]\n'a b' = {}", "[topics.x]: group name"),
    ],
)
def test_channels_that_can_not_be(place: Place, toml: str, words: str) -> None:
    assert words in place.refused(toml)


def test_a_feature_may_be_repeated(place: Place) -> None:
    assert place.load("[queues.orders]\nordered = false").declared_channels() == []


def test_names_on_the_broker(place: Place) -> None:
    settings = place.load(
        """
        prefix = "p."
        [topics."order.charged"]
        name = "OC"
        """
    )
    assert settings.physical(CHARGED) == "p.OC"
    assert settings.physical(BILLING) == "p.OC.billing"
    assert settings.derived(BILLING, DEAD_LETTER) == "p.OC.billing.dlq"
    assert settings.physical(ORDERS) == "p.orders"


# --- the environment


@pytest.mark.parametrize(
    ("variable", "value", "key", "expected"),
    [
        ("UNIBUS_DELAYS", "5, 60", "delays", [5.0, 60.0]),
        ("UNIBUS_DELAYS", "[5, 60]", "delays", [5.0, 60.0]),
        ("UNIBUS_DELAYS", "", "delays", []),
        ("UNIBUS_PREFIX", "", "prefix", ""),
        ("UNIBUS_APP", "a:b", "app", "a:b"),
        ("UNIBUS_SERVICE", "billing", "service", "billing"),
        ("UNIBUS_QUEUES__ORDERS__NAME", "O", "queues.orders.name", "O"),
        ("UNIBUS_QUEUES__ORDERS", '{"concurrency": 3}', "queues.orders.concurrency", 3),
        ("UNIBUS_QUEUES__ORDERS__MEMORY__A_B", "x", "queues.orders.memory.a_b", "x"),
        ("UNIBUS_MEMORY__DEEP__KEY", "x", "memory.deep.key", "x"),
        ("UNIBUS_MEMORY__LIST", "[1, 2]", "memory.list", [1, 2]),
        ("UNIBUS_MEMORY__ODD", "[no json", "memory.odd", "[no json"),
        ("UNIBUS_MEMORY", '{"a": {"b": 1}}', "memory.a.b", 1),
        (
            "UNIBUS_TOPICS__ORDER_CHARGED__GROUPS__BILLING__TIMEOUT",
            "3",
            'topics."order.charged".groups.billing.timeout',
            3.0,
        ),
    ],
)
def test_variables(place: Place, variable: str, value: str, key: str, expected: object) -> None:
    found = {s.key: s for s in place.load(None, {variable: value}).effective()}
    assert found[key].value == expected
    assert found[key].source == f"environment {variable}"


def test_names_with_underscores_at_their_ends(place: Place) -> None:
    channels = [Queue[bytes]("a"), Queue[bytes]("a_"), Queue[bytes]("a._b")]
    env = {"UNIBUS_QUEUES__A__PREFETCH": "1", "UNIBUS_QUEUES__A___PREFETCH": "2", "UNIBUS_QUEUES__A__B__PREFETCH": "3"}
    settings = place.load(None, env, channels=channels)
    assert [consumer(settings, c).prefetch for c in channels] == [1, 2, 3]


@pytest.mark.parametrize(
    "variable",
    [
        "UNIBUS_TEST_RABBITMQ_URL",
        "UNIBUS_SERVICE_HOST",
        "UNIBUS_SERVICE_PORT",
        "UNIBUS_SERVICE_PORT_AMQP",
        "UNIBUS_PORT",
        "UNIBUS_PORT_5672_TCP",
        "UNIBUS_PORT_5672_TCP_PROTO",
        "UNIBUS_PORT_5672_TCP_PORT",
        "UNIBUS_PORT_5672_UDP_ADDR",
        "UNIBUS_FOO_SERVICE_HOST",
        "UNIBUS_FOO_BAR_SERVICE_PORT_HTTP",
        "UNIBUS_FOO_PORT",
        "UNIBUS_FOO_PORT_5672_TCP_ADDR",
        "UNIBUSY_URL",
        "OTHER",
    ],
)
def test_variables_that_are_no_settings(place: Place, variable: str) -> None:
    assert place.load(None, {variable: "tcp://10.0.0.1:5672"}).url.scheme == "memory"


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"UNIBUS_ULR": "x"}, "environment UNIBUS_ULR: no setting has this name; did you mean UNIBUS_URL?"),
        ({"UNIBUS_PASWORD_FILE": "x"}, "did you mean UNIBUS_PASSWORD_FILE?"),
        ({"UNIBUS_QUEUES_ORDERS_CONCURRENCY": "1"}, "did you mean UNIBUS_QUEUES__ORDERS__CONCURRENCY?"),
        ({"UNIBUS_QUEUES__ORDRES__PREFETCH": "1"}, "did you mean UNIBUS_QUEUES__ORDERS__PREFETCH?"),
        ({"UNIBUS_QUEUES__XYZ__PREFETCH": "1"}, "no queue that is declared has this name"),
        ({"UNIBUS_TOPICS__ORDER_CHARGED__GROUPS__BILING__PREFETCH": "1"}, "GROUPS__BILLING__PREFETCH?"),
        ({"UNIBUS_DEFAULTS__RETRY__MAX_RETRY": "1"}, "did you mean UNIBUS_DEFAULTS__RETRY__MAX_RETRIES?"),
        ({"UNIBUS_DEFAULTS__CONCURRENCY__X": "1"}, "no setting has this name"),
        ({"UNIBUS_RABBITMQ__PORT__": "1"}, "no setting has this name"),
        ({"UNIBUS_": "1"}, "name the key"),
        ({"UNIBUS_QUEUES": "{}"}, "is a table; name the key in it"),
        ({"UNIBUS_SEND_TIMEOUT": "soon"}, "environment UNIBUS_SEND_TIMEOUT: expected a valid number"),
        ({"UNIBUS_SEND_TIMEOUT": "0"}, "expected a value greater than 0"),
        ({"UNIBUS_SEND_TIMEOUT": "inf"}, "UNIBUS_SEND_TIMEOUT: expected a finite number"),
        ({"UNIBUS_DELAYS": "1,x"}, "environment UNIBUS_DELAYS: [1]: expected a valid number"),
        ({"UNIBUS_DELAYS": "1,0"}, "greater than 0"),
        ({"UNIBUS_DELAYS": "[1"}, "environment UNIBUS_DELAYS: expected JSON"),
        ({"UNIBUS_DECLARE": "maybe"}, "UNIBUS_DECLARE: expected 'create', 'verify' or 'assume'"),
        ({"UNIBUS_DEFAULTS__RETRY": "5"}, "UNIBUS_DEFAULTS__RETRY: expected a table"),
        ({"UNIBUS_DEFAULTS__RETRY": '{"max": 5}'}, "UNIBUS_DEFAULTS__RETRY: max: unknown key"),
        ({"UNIBUS_PREFIX": "a b"}, "UNIBUS_PREFIX"),
        ({"UNIBUS_SERVICE": "a b"}, "service name 'a b'"),
        ({"UNIBUS_URL": "nope://h"}, "environment UNIBUS_URL: url: no adapter for nope://"),
        (
            {"UNIBUS_DEFAULTS__RETRY": '{"jitter": 1}', "UNIBUS_DEFAULTS__RETRY__JITTER": "1"},
            "UNIBUS_DEFAULTS__RETRY__JITTER: is set by another variable too",
        ),
        ({"UNIBUS_MEMORY__A": "1", "UNIBUS_MEMORY__A__B": "1"}, "is set by another variable too"),
        ({"UNIBUS_PASSWORD": "a", "UNIBUS_PASSWORD_FILE": "b"}, "UNIBUS_PASSWORD is set too"),
        ({"UNIBUS_PASSWORD_FILE": "nowhere"}, "environment UNIBUS_PASSWORD_FILE: names no file that can be read"),
        ({"UNIBUS_CONFIG": "nowhere.toml"}, "environment UNIBUS_CONFIG: there is no file 'nowhere.toml'"),
        ({"UNIBUS_CONFIG": ""}, "environment UNIBUS_CONFIG"),
    ],
)
def test_variables_that_are_wrong(place: Place, env: dict[str, str], words: str) -> None:
    assert words in place.refused(None, env)


def test_two_channels_that_meet_in_the_environment(place: Place) -> None:
    channels = [Queue[bytes]("a.b"), Queue[bytes]("a-b")]
    place.load(None, {}, channels=channels)  # nothing addresses them
    words = place.refused(None, {"UNIBUS_QUEUES__A_B__PREFETCH": "1"}, channels=channels)
    assert words == "environment UNIBUS_QUEUES__A_B__PREFETCH: means 'a-b' and 'a.b' alike; use unibus.toml for these"


# --- the file


def test_which_file_is_read(place: Place, tmp_path: Path) -> None:
    place.file.write_text('prefix = "cwd."')
    other = tmp_path / "other.toml"
    other.write_text('prefix = "other."')
    assert place.load().prefix == "cwd."
    assert place.load(None, {"UNIBUS_CONFIG": str(other)}).prefix == "other."
    assert place.load(None, {"UNIBUS_CONFIG": str(other)}).source("prefix") == str(other)
    assert place.load(None, {"UNIBUS_CONFIG": "nowhere"}, file=other).prefix == "other."
    assert place.load(None, {"UNIBUS_CONFIG": "nowhere"}, file=False).prefix == ""
    assert "file: there is no file 'x.toml'" in place.refused(file="x.toml")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("url = ", "unibus.toml: is not TOML"),
        ("'a[0]' = 1", "unibus.toml: a[0]: unknown key"),
        ("ulr = 1", "unibus.toml: ulr: unknown key; did you mean 'url'?"),
        ("[queue.orders]", "unibus.toml: queue: unknown key; did you mean 'queues'?"),
        ("[queues.orders]\nconcurency = 1", "[queues.orders]: concurency: unknown key; did you mean 'concurrency'?"),
        ("[queues.orders]\nretry = { max_retry = 1 }", "[queues.orders.retry]: max_retry: unknown key; did you mean"),
        ('[topics."order.charged".groups]\nbilling = { nam = "x" }', '[topics."order.charged".groups.billing]: nam'),
        ("[rabitmq]\nx = 1", "rabitmq: unknown key; did you mean 'rabbitmq'?"),
        ("[queues.orders]\nkafak = {}", "did you mean 'kafka'?"),
        ("[queues.orders]\nconcurrency = '64'", "[queues.orders]: concurrency: expected a valid integer"),
        ("[queues.orders]\nconcurrency = 0", "greater than or equal to 1"),
        ("[queues.orders]\nconcurrency = true", "expected a valid integer"),
        ("send_timeout = '30'", "unibus.toml: send_timeout: expected a valid number"),
        ("delays = [5, 0]", "unibus.toml: delays[1]: expected a value greater than 0"),
        ("delays = [0]\n[queues.orders.retry]\nbackoff = 1", "unibus.toml: delays[0]: expected a value greater than 0"),
        ("delays = 5", "unibus.toml: delays: expected a valid list"),
        ("defaults = 5", "unibus.toml: defaults: expected a table"),
        ("kafka = 5", "unibus.toml: kafka: expected a table"),
        ("queues = 5", "unibus.toml: queues: expected a table"),
        ("[queues]\norders = 5", "[queues]: orders: expected a table"),
        ("declare = 'maybe'", "unibus.toml: declare: expected 'create', 'verify' or 'assume'"),
        ("[defaults]\nretry = { jitter = 2 }", "[defaults.retry]: jitter: expected a value less than or equal to 1"),
        ("[bus.analytics]\nulr = 1", "[bus.analytics]: ulr: unknown key; did you mean 'url'?"),
        ("[bus.analytics]\napp = 'x'", "[bus.analytics]: app: unknown key"),
        ("password = 'hunter2'", "unibus.toml: password: no password is read from a file; set UNIBUS_PASSWORD, or"),
        ("password_file = 'x'", "UNIBUS_PASSWORD_FILE"),
        ("[bus.analytics]\npassword = 'hunter2'", "set UNIBUS_BUS__ANALYTICS__PASSWORD"),
        ("url = 'amqp://u:hunter2@h'", "unibus.toml: url: there is a password in it"),
        ("[bus.analytics]\nurl = 'amqp://u:hunter2@h'", "[bus.analytics]: url: there is a password in it"),
        ("url = 'amqp://u:hunter2@h:x'", "unibus.toml: url: the port of host 1"),
        ("url = 5", "unibus.toml: url: expected a valid string"),
    ],
)
def test_files_that_are_wrong(place: Place, toml: str, words: str) -> None:
    text = place.refused(toml)
    assert words in text
    assert "hunter2" not in text
    assert "no url" not in text


def test_a_file_that_is_no_text(place: Place) -> None:
    place.file.write_bytes(b"\xff")
    assert place.refused() == "unibus.toml: is not UTF-8"


def test_a_variable_does_not_hide_a_mistake_in_the_file(place: Place) -> None:
    assert "send_timeout" in place.refused("send_timeout = 'x'", {"UNIBUS_SEND_TIMEOUT": "3"})


def test_all_that_is_wrong_is_in_one_error(place: Place) -> None:
    text = place.refused(
        "ulr = 1\nprefix = 3\n[queues.orders]\nordered = true",
        {"UNIBUS_FOO": "1", "UNIBUS_DELAYS": "x", "UNIBUS_SERVICE": "a b"},
        {"send_timeout": "x", "wat": 1},
    )
    head, *lines = text.split("\n  - ")
    assert head == "9 settings are wrong:"
    assert [line.partition(":")[0] for line in lines] == [
        "environment UNIBUS_DELAYS",
        "environment UNIBUS_FOO",
        "unibus.toml",
        "unibus.toml",
        "Bus(...)",
        "Bus(...)",
        "unibus.toml [queues.orders]",
        "no url",
        "environment UNIBUS_SERVICE",
    ]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ({"send_timeout": "x"}, "Bus(...): send_timeout: expected a valid number"),
        ({"sendtimeout": 1}, "Bus(...): sendtimeout: unknown key; did you mean 'send_timeout'?"),
        (
            {"defaults": {"concurrency": 0}},
            "Bus(defaults=...): concurrency: expected a value greater than or equal to 1",
        ),
        ({"defaults": 3}, "Bus(...): defaults: expected a table"),
        ({"defaults": {1: 2}}, "Bus("),
        ({"settings": 3}, "Bus(settings=...): expected a table"),
        ({"settings": {1: 3}}, "Bus(settings=...): expected a table"),
        ({"url": "h:5672"}, "code: url: there is no scheme"),
        ({"delays": (1, -1)}, "Bus(...): delays[1]: expected a value greater than 0"),
    ],
)
def test_what_a_bus_can_not_be_given(place: Place, code: dict[str, object], words: str) -> None:
    for bus in (None, "analytics"):
        assert words in place.refused(None, {}, {**MEMORY, **code}, bus=bus)


# --- the URL, users and passwords


def test_no_url(place: Place) -> None:
    assert place.refused("", {}, {}) == "no url: set UNIBUS_URL, or url in unibus.toml, or pass Bus(url=...)"
    assert place.refused("", {}, {}, bus="an-other") == (
        "no url: set UNIBUS_BUS__AN_OTHER__URL, or url in [bus.an-other] of unibus.toml, or pass Bus(url=...)"
    )


def test_a_password_from_a_file(place: Place, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    for text, password in (("a\n", "a"), ("a", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), (" a ", " a ")):
        secret.write_bytes(text.encode())
        settings = place.load(None, {"UNIBUS_PASSWORD_FILE": str(secret)})
        assert settings.url.password == Secret(password)
        assert settings.source("password") == "environment UNIBUS_PASSWORD_FILE"
    secret.write_text("\n")
    assert "UNIBUS_PASSWORD_FILE: names a file that is empty" in place.refused(
        None, {"UNIBUS_PASSWORD_FILE": str(secret)}
    )
    assert "hunter2" not in place.refused(None, {"UNIBUS_PASSWORD_FILE": "hunter2"})  # a password by mistake


@pytest.mark.parametrize(
    ("toml", "env", "code", "user", "password"),
    [
        ("", {}, {"url": "amqp://a:b@h"}, "a", "b"),
        ("", {}, {"url": "amqp://a:b@h", "username": "c", "password": "d"}, "c", "d"),
        ("", {}, {"url": "amqp://a:b@h", "password": Secret("d")}, "a", "d"),
        ("", {"UNIBUS_URL": "amqp://a:b@h"}, {"username": "c", "password": "d"}, "a", "b"),
        ("username = 'c'", {"UNIBUS_URL": "amqp://a:b@h"}, {}, "a", "b"),
        ("username = 'c'", {"UNIBUS_URL": "amqp://h", "UNIBUS_PASSWORD": "d"}, {}, "c", "d"),
        ("url = 'amqp://a@h'", {"UNIBUS_PASSWORD": "d"}, {}, "a", "d"),
        ("url = 'amqp://a@h'", {"UNIBUS_USERNAME": "c"}, {}, "c", None),
        ("username = 'c'", {}, {"url": "amqp://a:b@h"}, "c", None),  # b is the password of a
        ("username = 'a'", {}, {"url": "amqp://a:b@h"}, "a", "b"),
        ("", {"UNIBUS_PASSWORD": "d"}, {"url": "memory://h"}, None, "d"),
    ],
)
def test_whose_user_and_password(
    place: Place, toml: str, env: dict[str, str], code: dict[str, object], user: str | None, password: str | None
) -> None:
    url = place.load(toml, env, code).url
    assert (url.username, url.password) == (user, None if password is None else Secret(password))


def test_no_secret_shows(place: Place) -> None:
    env = {
        "UNIBUS_URL": "amqp://u:pa%40ss@h?ssl_password=pa%40ss&proxy=http://u:pa@h",
        "UNIBUS_PASSWORD": "pa@ss",
        "UNIBUS_RABBITMQ__SASL__TOKEN": "pa@ss",
    }
    settings = place.load("[rabbitmq]\nsecret = 'pa@ss'\n", env, {"settings": {"a_token": "pa@ss"}})
    assert settings.url.password == Secret("pa@ss")
    shown = "\n".join([repr(settings), str(settings), repr(settings.url), *map(str, settings.effective())])
    for piece in ("pa@ss", "pa%40ss", "u:pa"):
        assert piece not in shown
    masked = {s.key for s in settings.effective() if s.value == "****"}
    assert masked == {
        "password",
        "rabbitmq.secret",
        "rabbitmq.ssl_password",
        "rabbitmq.sasl.token",
        "rabbitmq.a_token",
    }


@pytest.mark.parametrize(
    ("env", "code"),
    [
        ({"UNIBUS_URL": "amqp://u:pa%40ss@h:x"}, {}),
        ({"UNIBUS_URL": "amqp://u:pa@ss@h"}, {}),
        ({"UNIBUS_URL": "amqp://u:pa/ss@h"}, {}),
        ({"UNIBUS_URL": "u:pa%40ss@h"}, {}),
        ({"UNIBUS_PASSWORD": "pa@ss", "UNIBUS_SEND_TIMEOUT": "pa@ss"}, MEMORY),
        ({"UNIBUS_PASSWORD": "pa@ss", "UNIBUS_PASSWORD_FILE": "pa@ss"}, MEMORY),
        ({"UNIBUS_DEFAULTS__RETRY": '{"pa@ss'}, MEMORY),
        ({}, {"url": 3, "password": ["pa@ss"]}),
        ({}, {"url": ["amqp://u:pa%40ss@h"]}),
        ({}, {"url": "nope://u:pa%40ss@h"}),
    ],
)
def test_no_secret_in_an_error(place: Place, env: dict[str, str], code: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        place.load(None, env, code)
    shown = "".join(traceback.format_exception(caught.value))
    for piece in ("pa@ss", "pa%40ss", "pa/ss"):
        assert piece not in shown
    assert "pydantic" not in shown


# --- the driver's table


def test_the_table_of_the_driver(place: Place) -> None:
    settings = place.load(
        "[rabbitmq]\na = 1\nb = 1\nc = 1\ndeep = { x = 1, y = 1 }\n[kafka]\npartitions = 3",
        {"UNIBUS_RABBITMQ__B": "2", "UNIBUS_RABBITMQ__DEEP__Y": "2"},
        {"url": "amqp://h?c=3", "settings": {"a": 0, "d": 0}},
    )
    assert settings.driver == {"a": 1, "b": "2", "c": "3", "d": 0, "deep": {"x": 1, "y": "2"}}
    sources = {s.key: s.source for s in settings.effective() if s.key.startswith(("rabbitmq", "kafka"))}
    assert sources == {
        "rabbitmq.a": "unibus.toml [rabbitmq]",
        "rabbitmq.b": "environment UNIBUS_RABBITMQ__B",
        "rabbitmq.c": "query of url, code",
        "rabbitmq.d": "code",
        "rabbitmq.deep.x": "unibus.toml [rabbitmq.deep]",
        "rabbitmq.deep.y": "environment UNIBUS_RABBITMQ__DEEP__Y",
    }


def test_settings_in_code_are_of_the_broker_in_code(place: Place) -> None:
    code = {"url": "amqp://h", "settings": {"heartbeat": 3}}
    assert place.load(None, {}, code).driver == {"heartbeat": 3}
    assert place.load(None, {"UNIBUS_URL": "amqps://other"}, code).driver == {"heartbeat": 3}
    assert place.load(None, {"UNIBUS_URL": "memory://"}, code).driver == {}
    assert place.load(None, {"UNIBUS_URL": "amqp://h"}, {"settings": {"heartbeat": 3}}).driver == {"heartbeat": 3}


def test_settings_in_code_may_be_objects(place: Place) -> None:
    context = ssl.create_default_context()
    settings = place.load(None, {}, {"url": "amqp://h", "settings": {"ssl": context}})
    assert settings.driver["ssl"] is context


def test_options_are_of_the_broker_in_use(place: Place) -> None:
    settings = place.load(
        """
        url = "amqp://h"
        [queues.orders]
        rabbitmq = { queue_type = "classic" }
        sqs = { retention = 3 }
        [topics."order.charged"]
        rabbitmq = { kind = "t" }
        groups = { billing = { rabbitmq = { kind = "g" }, kafka = { x = 1 } } }
        """,
        {"UNIBUS_QUEUES__ORDERS__RABBITMQ__LENGTH": "3"},
        {},
    )
    assert settings.options(ORDERS) == {"queue_type": "classic", "length": "3"}
    assert settings.options(CHARGED) == {"kind": "t"}
    assert settings.options(BILLING) == {"kind": "g"}
    assert settings.options(Queue("other")) == {}
    keys = {s.key for s in settings.effective()}
    assert "queues.orders.rabbitmq.queue_type" in keys
    assert not {key for key in keys if "sqs" in key or "kafka" in key}


class Deep(BaseModel):
    model_config = ConfigDict(extra="forbid")
    port: int = 0


class Driver(BaseModel):
    heartbeat: int = 60
    channels: list[int] = []
    verify: bool = True
    password: SecretStr | None = None
    deep: Deep = Deep()
    named: int = Field(default=0, alias="as-named")

    @field_validator("heartbeat")
    @classmethod
    def _no_13(cls, value: int) -> int:
        if value == 13:
            raise ValueError(f"{value} is an unlucky heartbeat")
        if value == 14:
            raise PydanticCustomError("odd", "no {n} here", {"n": value})
        return value

    @field_validator("password")
    @classmethod
    def _long(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 8:
            raise ValueError(f"{value.get_secret_value()} is short")
        return value


def test_check_table() -> None:
    table = {"heartbeat": "30", "channels": "1,2", "verify": "no", "deep": '{"port": 1}', "as-named": "4"}
    found = check_table(Driver, table, "rabbitmq")
    assert (found.heartbeat, found.channels, found.verify, found.deep.port, found.named) == (30, [1, 2], False, 1, 4)
    assert check_table(Driver, {"channels": "[3]"}, "rabbitmq").channels == [3]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"heartbeat": "hunter2"},
            "rabbitmq.heartbeat: expected a valid integer, unable to parse string as an integer",
        ),
        ({"hearbeat": 1}, "rabbitmq.hearbeat: unknown key; did you mean 'heartbeat'?"),
        ({"named": 1}, "rabbitmq.named: unknown key; did you mean 'as-named'?"),
        ({"deep": {"prot": 1}}, "rabbitmq.deep.prot: unknown key; did you mean 'port'?"),
        ({"deep": {"port": "hunter2"}}, "rabbitmq.deep.port: expected a valid integer"),
        ({"deep": "hunter2"}, "rabbitmq.deep: expected JSON"),
        ({"channels": [1, "hunter2"]}, "rabbitmq.channels[1]: expected a valid integer"),
        ({"heartbeat": 13}, "rabbitmq.heartbeat: … is an unlucky heartbeat"),
        ({"heartbeat": 14}, "rabbitmq.heartbeat: no … here"),
        ({"password": "hunter2"}, "rabbitmq.password: is not valid"),
    ],
)
def test_check_table_refuses(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_table(Driver, table, "rabbitmq")
    assert str(caught.value).startswith(words)
    shown = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in shown
    assert caught.value.__context__ is None


def test_check_table_says_all_at_once() -> None:
    with pytest.raises(ConfigError, match="2 settings are wrong") as caught:
        check_table(Driver, {"x": 1, "heartbeat": "y"}, "rabbitmq")
    assert "rabbitmq.x: unknown key" in str(caught.value)
    assert "rabbitmq.heartbeat: expected" in str(caught.value)


# --- several buses, defaults, the whole picture


def test_another_bus(place: Place) -> None:
    toml = """
        app = "shop:bus"
        service = "billing"
        url = "amqp://top"
        prefix = "top."
        [defaults]
        concurrency = 3
        [rabbitmq]
        heartbeat = 3
        [queues.orders]
        concurrency = 4
        [bus.an-other]
        url = "amqp://h"
        queues = { orders = { concurrency = 5 } }
    """
    env = {
        "UNIBUS_PASSWORD": "top",
        "UNIBUS_SEND_TIMEOUT": "1",
        "UNIBUS_QUEUES__NOT_OF_THIS_BUS__CONCURRENCY": "1",
        "UNIBUS_BUS__AN_OTHER__REQUEST_TIMEOUT": "2",
        "UNIBUS_BUS__AN_OTHER__PASSWORD": "other",
        "UNIBUS_BUS__AN_OTHER__QUEUES__ORDERS__PREFETCH": "7",
        "UNIBUS_BUS__THIRD__URL": "not ours to judge",
        "UNIBUS_BUS__THIRD__QUEUES__X__PREFETCH": "1",
    }
    other = place.load(toml, env, {"declare": "assume"}, bus="an-other")
    assert (other.service, other.app, other.declare) == ("billing", "shop:bus", "assume")
    assert (str(other.url), other.url.password) == ("amqp://h", Secret("other"))
    assert (other.prefix, other.send_timeout, other.request_timeout, other.driver) == ("", 30.0, 2.0, {})
    assert (consumer(other).concurrency, consumer(other).prefetch) == (5, 7)
    assert other.source("url") == "unibus.toml [bus.an-other]"
    assert other.source("service") == "unibus.toml"
    assert "no queue" in place.refused(toml, {"UNIBUS_BUS__AN_OTHER__QUEUES__X__PREFETCH": "1"}, {}, bus="an-other")

    del env["UNIBUS_QUEUES__NOT_OF_THIS_BUS__CONCURRENCY"]
    top = place.load(toml, env, {})
    assert (str(top.url), top.url.password, top.send_timeout) == ("amqp://top", Secret("top"), 1.0)
    assert consumer(top).concurrency == 4
    assert top.driver == {"heartbeat": 3}
    assert not any(s.key.startswith("bus") for s in top.effective())
    assert place.load(toml, env, MEMORY, bus="undeclared").url.scheme == "memory"


@pytest.mark.parametrize(
    ("toml", "argv", "service"),
    [
        ("app = 'shop.main:bus'", "x", "shop"),
        ("", "/srv/billing.py", "billing"),
        ("", "/srv/billing/__main__.py", "billing"),
        ("", "/srv/a b.py", "a-b"),
        ("", "", "unibus"),
        ("", "-c", "c"),
    ],
)
def test_the_service_is_the_program_by_default(
    place: Place, monkeypatch: pytest.MonkeyPatch, toml: str, argv: str, service: str
) -> None:
    monkeypatch.setattr(sys, "argv", [argv])
    settings = place.load(toml)
    assert settings.service == service
    assert settings.source("service") == "built-in"


def test_where_everything_came_from(place: Place) -> None:
    settings = place.load(
        EXAMPLE, {"UNIBUS_PASSWORD": "s3", "UNIBUS_QUEUES__ORDERS__PREFETCH": "7"}, {"request_timeout": 3}
    )
    found = {s.key: (s.value, s.source) for s in settings.effective()}
    expected = {
        "url": ("amqp://rabbit-1.internal,rabbit-2.internal/shop", "unibus.toml"),
        "password": ("****", "environment UNIBUS_PASSWORD"),
        "request_timeout": (30.0, "built-in"),
        "defaults.concurrency": (10, "unibus.toml [defaults]"),
        "defaults.guarantee": ("at-least-once", "built-in"),
        "defaults.on_lease_lost": ("mark", "built-in"),
        "defaults.retry.jitter": (0.0, "built-in"),
        "queues.orders.prefetch": (7, "environment UNIBUS_QUEUES__ORDERS__PREFETCH"),
        "queues.orders.concurrency": (64, "unibus.toml [queues.orders]"),
        'topics."order.charged".groups.audit': ({}, 'unibus.toml [topics."order.charged".groups]'),
    }
    assert {key: found[key] for key in expected} == expected | {"request_timeout": (3.0, "code")}
    assert len(found) == len(settings.effective())


def test_the_group_that_is_called_like_the_service(place: Place) -> None:
    variable = {"UNIBUS_TOPICS__ORDER_CHARGED__GROUPS__SHOP_1__PREFETCH": "7"}
    shop = Group(CHARGED, "shop-1")
    for toml, env, code in (
        ("service = 'shop-1'", {}, {}),
        ("", {"UNIBUS_SERVICE": "shop-1"}, {}),
        ("", {}, {"service": "shop-1"}),
        ("app = 'shop-1:bus'", {}, {}),
    ):
        settings = place.load(toml, variable | env, {**MEMORY, **code})
        assert consumer(settings, shop).prefetch == 7
        assert settings.declared_groups() == []  # a variable declares nothing


def test_where_user_and_password_of_a_url_came_from(place: Place) -> None:
    settings = place.load("username = 'c'", {"UNIBUS_URL": "amqp://a:b@h"}, {"password": "d"})
    assert settings.source("username") == settings.source("password") == "environment UNIBUS_URL"
    settings = place.load("username = 'c'", {}, {"url": "amqp://a:b@h", "password": "d"})
    assert (settings.source("username"), settings.source("password")) == ("unibus.toml", "code")


def test_the_environment_of_the_process_is_the_default(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNIBUS_URL", "memory://here")
    assert str(load({}, file=False).url) == "memory://here"


def test_importing_unibus_does_not_load_pydantic_settings() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, unibus; print('pydantic_settings' in sys.modules, 'unibus.config' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]
